"""The dashboard's routes without a process: who may ask for what, and what every answer carries."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.routing import Mount, Route

from governor.connection import client as client_of
from governor.connection import connected, now
from governor.dashboard import serving
from governor.dashboard.app import application
from governor.dashboard.board import Board
from governor.dashboard.control import REARMS, Control, refusal_of
from governor.dashboard.feed import Feed
from governor.dashboard.guard import HEADERS, Guard, host_name
from governor.dashboard.login import FAILURES, SESSION_S, Failures, Sessions, read_token
from governor.dashboard.streams import QUEUED, Client, Hub
from governor.dashboard.vitals import Growth, Vitals, read_metrics
from governor.readiness import base_url
from governor.settings import SettingsError, load
from tests.dashboard import TOKEN, token_file
from tests.servers import RedisServer

PAGE = {"X-Governor": "1", "Origin": "http://localhost"}


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


class Web:
    """The application on settings of its own, and somebody who asks it. There is no Redis behind it."""

    def __init__(self, *, token: str | None, **environ: str) -> None:
        self.clock = Clock()
        settings = load({"HOME": "/nowhere", "REDIS_PORT": "1", "METRICS_PORT": "0", **environ})
        redis = client_of(settings)
        feed, vitals, self.hub = Feed(settings, redis), Vitals(settings, redis), Hub()
        board = Board(settings, feed, vitals, version="1", controls=token is not None)
        sessions = None if token is None else Sessions(token, self.clock)
        self.control = Control(settings, feed, board, sessions, Failures(self.clock))
        self.feed = feed
        self.app = application(settings, redis, board, self.hub, self.control)

    @asynccontextmanager
    async def open(self, *, address: str = "127.0.0.1", scheme: str = "http") -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, client=(address, 1234), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"{scheme}://localhost") as http:
            yield http


def routes(app: Any) -> Iterator[Route]:
    for route in app.app.routes:
        assert isinstance(route, Route | Mount)
        if isinstance(route, Route):
            yield route


WRITING = ["/api/login", "/api/logout", "/api/disarm", "/api/rearm"]


# -- control is off by default ---------------------------------------------------------------------------------------


async def test_without_a_token_every_writing_route_answers_403() -> None:
    web = Web(token=None)
    found = [route for route in routes(web.app) if set(route.methods or ()) - {"GET", "HEAD"}]
    assert sorted(route.path for route in found) == sorted(WRITING)
    async with web.open() as http:
        for route in found:
            for method in set(route.methods or ()) - {"GET", "HEAD"}:
                answer = await http.request(method, route.path, json={"reason": "x", "token": TOKEN}, headers=PAGE)
                assert answer.status_code == 403, route.path
                assert "DASHBOARD_TOKEN_FILE" in answer.json()["error"]
        assert (await http.get("/api/rearm", headers=PAGE)).status_code == 403


async def test_nothing_else_takes_anything_but_get() -> None:
    web = Web(token=TOKEN)
    async with web.open() as http:
        for route in routes(web.app):
            for method in ("PUT", "DELETE", "PATCH", *(() if route.path in WRITING else ("POST",))):
                path = route.path.replace("{plan_id:path}", "p1")
                assert (await http.request(method, path, headers=PAGE)).status_code == 405, (method, path)
        for method in ("POST", "PUT", "DELETE"):
            assert (await http.request(method, "/static/app.js", headers=PAGE)).status_code == 405


@pytest.mark.parametrize("path", ["/api/disarm", "/api/rearm"])
async def test_who_is_not_logged_in_changes_nothing(path: str) -> None:
    async with Web(token=TOKEN).open() as http:
        answer = await http.post(path, json={"reason": "x", "typed": "rearm"}, headers=PAGE)
        assert (answer.status_code, answer.json()) == (401, {"error": "log in first"})
        forged = {**PAGE, "Cookie": f"governor-80={TOKEN}; governor=x"}
        assert (await http.post(path, json={"reason": "x", "typed": "rearm"}, headers=forged)).status_code == 401
        assert (await http.get("/api/rearm")).status_code == 401


# -- logging in ------------------------------------------------------------------------------------------------------


async def test_a_login_gives_a_cookie_no_script_sees_and_no_other_site_sends() -> None:
    web = Web(token=TOKEN)
    async with web.open() as http:
        answer = await http.post("/api/login", json={"token": TOKEN}, headers=PAGE)
        assert answer.json() == {"control": {"enabled": True, "logged_in": True}}
        name, *flags = answer.headers["set-cookie"].split("; ")
        assert set(flags) == {"HttpOnly", "SameSite=strict", "Path=/", f"Max-Age={int(SESSION_S)}"}
        assert TOKEN not in name
        assert (await http.get("/api/snapshot")).json()["control"]["logged_in"]
        again = await http.post("/api/logout", json={}, headers=PAGE)
        assert again.json()["control"] == {"enabled": True, "logged_in": False}
        kept = {"Cookie": name}
        assert not (await http.get("/api/snapshot", headers=kept)).json()["control"]["logged_in"]


async def test_over_tls_the_cookie_travels_only_there() -> None:
    page = {"X-Governor": "1", "Origin": "https://localhost"}
    for web, scheme in (
        (Web(token=TOKEN), "https"),
        (Web(token=TOKEN, DASHBOARD_BEHIND_PROXY="true"), "http"),
    ):
        async with web.open(scheme=scheme) as http:
            cookie = (await http.post("/api/login", json={"token": TOKEN}, headers=page)).headers["set-cookie"]
        assert cookie.startswith("__Host-governor=")
        assert "; Secure" in cookie


async def test_a_session_ends_after_twelve_hours() -> None:
    web = Web(token=TOKEN)
    async with web.open() as http:
        await http.post("/api/login", json={"token": TOKEN}, headers=PAGE)
        web.clock.at += SESSION_S - 1
        assert (await http.get("/api/snapshot")).json()["control"]["logged_in"]
        web.clock.at += 1
        assert not (await http.get("/api/snapshot")).json()["control"]["logged_in"]
        assert (await http.post("/api/disarm", json={"reason": "x"}, headers=PAGE)).status_code == 401


async def test_guessing_is_slowed_down_for_an_address_and_for_all_together() -> None:
    web = Web(token=TOKEN)
    async with web.open() as http, web.open(address="10.0.0.2") as other:
        for _ in range(FAILURES):
            wrong = await http.post("/api/login", json={"token": "wrong"}, headers=PAGE)
            assert (wrong.status_code, wrong.json()["error"]) == (401, "that is not the token")
        for token in ("wrong", TOKEN):
            slow = await http.post("/api/login", json={"token": token}, headers=PAGE)
            assert slow.status_code == 429
            assert slow.headers["retry-after"] == "60"
            assert slow.json()["retry_after_s"] == 60
        assert (await other.post("/api/login", json={"token": TOKEN}, headers=PAGE)).status_code == 200
        web.clock.at += 60
        assert (await http.post("/api/login", json={"token": TOKEN}, headers=PAGE)).status_code == 200
    for number in range(30):
        async with web.open(address=f"10.1.0.{number}") as http:
            assert (await http.post("/api/login", json={"token": "x"}, headers=PAGE)).status_code == 401
    async with web.open(address="10.2.0.1") as http:
        assert (await http.post("/api/login", json={"token": TOKEN}, headers=PAGE)).status_code == 429


async def test_a_proxy_tells_the_address_only_where_a_setting_says_so() -> None:
    named = {"X-Forwarded-For": "1.2.3.4, 10.9.9.9"}
    proxied = {"X-Governor": "1", "Origin": "https://localhost", **named}
    behind, plain = Web(token=TOKEN, DASHBOARD_BEHIND_PROXY="true"), Web(token=TOKEN)
    async with behind.open() as http:
        for _ in range(FAILURES):
            await http.post("/api/login", json={"token": "x"}, headers=proxied)
        assert (await http.post("/api/login", json={"token": "x"}, headers=proxied)).status_code == 429
        elsewhere = proxied | {"X-Forwarded-For": "10.9.9.9, 10.9.9.8"}
        assert (await http.post("/api/login", json={"token": "x"}, headers=elsewhere)).status_code == 401
        nonsense = proxied | {"X-Forwarded-For": "<script>"}
        assert (await http.post("/api/login", json={"token": "x"}, headers=nonsense)).status_code == 401
    async with plain.open() as http:
        for number in range(FAILURES):
            spoofed = {**PAGE, "X-Forwarded-For": f"10.0.0.{number}"}
            await http.post("/api/login", json={"token": "x"}, headers=spoofed)
        assert (await http.post("/api/login", json={"token": "x"}, headers=spoofed)).status_code == 429


# -- other sites -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://localhost"},
        {"X-Governor": "1"},
        {"X-Governor": "1", "Origin": "https://localhost"},
        {"X-Governor": "1", "Origin": "http://localhost:81"},
        {"X-Governor": "1", "Origin": "http://evil.example"},
        {"X-Governor": "1", "Origin": "null"},
        {"X-Governor": "1", "Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"},
        {"X-Governor": "1", "Origin": "http://localhost", "Sec-Fetch-Site": "same-site"},
        {"X-Governor": "1", "Sec-Fetch-Site": "none"},
    ],
)
async def test_a_request_that_is_not_our_pages_own_is_refused(headers: dict[str, str]) -> None:
    async with Web(token=TOKEN).open() as http:
        logged_in = await http.post("/api/login", json={"token": TOKEN}, headers=PAGE)
        assert logged_in.status_code == 200
        for path in WRITING:
            answer = await http.post(path, json={"token": TOKEN, "reason": "x", "typed": "rearm"}, headers=headers)
            assert answer.status_code == 403, path
            assert answer.json()["error"].startswith("refused: ")


async def test_only_json_and_only_a_little_of_it_is_read() -> None:
    async with Web(token=TOKEN).open() as http:
        form = await http.post("/api/login", data={"token": TOKEN}, headers=PAGE)
        assert form.status_code == 415
        json = {**PAGE, "Content-Type": "application/json"}
        assert (await http.post("/api/login", content=b"{", headers=json)).status_code == 400
        assert (await http.post("/api/login", content=b"[]", headers=json)).status_code == 400
        assert (await http.post("/api/login", json={"token": 7}, headers=PAGE)).status_code == 400
        assert (await http.post("/api/login", content=b'"' + b"x" * 20_000, headers=json)).status_code == 413


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("localhost", True), ("localhost:9999", True), ("127.0.0.1:8045", True), ("[::1]:8045", True),
        ("LOCALHOST", True), ("bot.example.org", True), ("bot.example.org:443", True), ("10.0.0.9", True),
        ("evil.example", False), ("localhost.evil.example", False), ("", False), ("127.0.0.1.nip.io:8045", False),
    ],
)  # fmt: skip
async def test_only_our_own_names_are_answered(host: str, fine: bool) -> None:  # noqa: FBT001
    web = Web(token=TOKEN, DASHBOARD_HOST="10.0.0.9", DASHBOARD_ALLOWED_HOSTS="bot.example.org")
    async with web.open() as http:
        for path in ("/api/snapshot", "/healthz", "/nothing"):
            answer = await http.get(path, headers={"Host": host})
            assert (answer.status_code != 421) == fine, path


def test_a_host_header_has_a_name_and_maybe_a_port() -> None:
    assert [host_name(text) for text in ("A:1", "a", "[::1]:80", "[::1]", ":80", "")] == [
        "a", "a", "[::1]", "[::1]", "", "",
    ]  # fmt: skip


# -- every answer ----------------------------------------------------------------------------------------------------


async def test_every_answer_forbids_frames_foreign_scripts_and_sniffing() -> None:
    web = Web(token=TOKEN)
    web.hub.close()  # a stream would not end
    async with web.open() as http:
        paths = [route.path.replace("{plan_id:path}", "p1") for route in routes(web.app)]
        for path in (*paths, "/nothing", "/static/nothing.js", "/static/../app.py"):
            for host in ("localhost", "evil.example"):
                answer = await http.get(path, headers={"Host": host})
                for name, value in HEADERS.items():
                    assert answer.headers[name] == value, path
                assert "access-control-allow-origin" not in answer.headers
    for word in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
        assert word in HEADERS["Content-Security-Policy"]
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


async def test_what_the_api_says_is_not_kept_and_the_page_is_asked_about_each_time() -> None:
    async with Web(token=TOKEN).open() as http:
        for path in ("/api/snapshot", "/api/rearm", "/healthz", "/nothing"):
            assert (await http.get(path)).headers["cache-control"] == "no-store"


async def test_a_failure_inside_is_an_answer_without_its_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    web = Web(token=TOKEN)

    def fails(*, logged_in: bool) -> bytes:
        raise KeyError("something secret")

    monkeypatch.setattr("governor.dashboard.board.Board.snapshot", lambda _self, **_: fails(logged_in=False))
    async with web.open() as http:
        answer = await http.get("/api/snapshot")
    assert (answer.status_code, answer.json()) == (500, {"error": "it failed: KeyError"})
    assert answer.headers["X-Frame-Options"] == "DENY"


def test_the_guard_is_around_everything() -> None:
    assert isinstance(Web(token=None).app, Guard)


async def test_what_another_site_begins_is_not_even_worked_on() -> None:
    async with Web(token=None).open() as http:
        for path in ("/api/snapshot", "/api/stream", "/api/plans/p1"):
            for site in ("cross-site", "same-site"):
                assert (await http.get(path, headers={"Sec-Fetch-Site": site})).status_code == 403, (path, site)
        for site in ("same-origin", "none"):
            assert (await http.get("/api/snapshot", headers={"Sec-Fetch-Site": site})).status_code == 200
        assert (await http.get("/", headers={"Sec-Fetch-Site": "cross-site"})).status_code == 200  # a link in an alert


# -- what a person asks for ------------------------------------------------------------------------------------------


async def test_a_disarm_needs_a_reason_and_a_re_arm_the_word_as_well() -> None:
    async with Web(token=TOKEN).open() as http:
        await http.post("/api/login", json={"token": TOKEN}, headers=PAGE)
        for path, told in (
            ("/api/disarm", {"reason": "  "}),
            ("/api/disarm", {}),
            ("/api/rearm", {"reason": "", "typed": "rearm"}),
            ("/api/rearm", {"reason": "looked", "typed": "re-arm"}),
            ("/api/rearm", {"reason": "looked"}),
        ):
            assert (await http.post(path, json=told, headers=PAGE)).status_code == 400, (path, told)


async def test_a_re_arm_is_refused_while_nobody_knows_the_state() -> None:
    web = Web(token=TOKEN)
    async with web.open() as http:
        await http.post("/api/login", json={"token": TOKEN}, headers=PAGE)
        told = (await http.get("/api/rearm")).json()
        assert not told["allowed"]
        assert told["refusal"] == refusal_of(web.feed)
        assert "not up to date" in told["refusal"]
        answer = await http.post("/api/rearm", json={"reason": "looked", "typed": "rearm"}, headers=PAGE)
        assert (answer.status_code, answer.json()["error"]) == (409, f"refused: {told['refusal']}")


async def test_a_disarm_does_not_wait_for_re_arms_that_hang() -> None:
    web, let_go = Web(token=TOKEN), threading.Event()

    async def hangs() -> dict[str, Any]:
        assert let_go.wait(20)
        return {"code": 0, "message": "done"}

    async def works() -> dict[str, Any]:
        return {"code": 0, "message": "done"}

    carry_out = web.control._carry_out
    re_arms = [asyncio.create_task(carry_out(hangs, refused=409, most=REARMS)) for _ in range(REARMS)]
    await asyncio.sleep(0)  # they have begun
    assert (await carry_out(works, refused=409, most=REARMS)).status_code == 503
    assert (await carry_out(works)).status_code == 200
    let_go.set()
    assert [(await each).status_code for each in re_arms] == [200] * REARMS


# -- the token -------------------------------------------------------------------------------------------------------


async def test_a_clock_that_is_not_redis_is_told(flushed: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load({"HOME": "/nowhere", "REDIS_PORT": str(flushed.port), "METRICS_PORT": "0"})

    async def ahead_s() -> float:
        async with connected(settings) as redis:
            vitals = Vitals(settings, redis)
            await vitals._ask_redis()
            told: float = vitals.health(None, credentials=False)["redis"]["clock_ahead_s"]
            return told

    assert abs(await ahead_s()) < 1
    monkeypatch.setattr("governor.dashboard.vitals.now", lambda: now() + 3600 * 1_000_000)
    assert abs(await ahead_s() - 3600) < 1


def test_a_token_file_holds_one_token_and_is_not_for_others(tmp_path: Path) -> None:
    assert read_token(Path(token_file(tmp_path))) == TOKEN
    for token, mode, told in (
        ("", 0o600, "expected a token of at least 16 characters"),
        ("x" * 15, 0o600, "expected a token of at least 16 characters"),
        (TOKEN, 0o604, "expected a file that others may not read"),
        (TOKEN, 0o602, "expected a file that others may not read"),
    ):
        with pytest.raises(SettingsError, match=told) as refused:
            read_token(Path(token_file(tmp_path, token, mode)))
        assert "DASHBOARD_TOKEN_FILE is" in str(refused.value)
        assert "xxx" not in str(refused.value)
    with pytest.raises(SettingsError, match="expected a readable text file: No such file"):
        read_token(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(SettingsError, match="expected a readable text file"):
        read_token(tmp_path / "binary")


def test_sessions_are_few_and_the_oldest_ends_first() -> None:
    clock = Clock()
    sessions = Sessions(TOKEN, clock)
    opened = [sessions.login(TOKEN) for _ in range(101)]
    assert sessions.valid(opened[1])
    assert not sessions.valid(opened[0])
    assert not sessions.valid(None)
    assert len(set(opened)) == 101


# -- streams ---------------------------------------------------------------------------------------------------------


async def test_a_client_that_takes_nothing_is_cut_off_and_the_others_are_not() -> None:
    hub, aborted = Hub(), []
    slow, quick = Client(lambda: aborted.append("slow"), bool), Client(lambda: aborted.append("quick"), bool)
    hub.clients |= {slow, quick}
    for number in range(QUEUED + 1):
        hub.send(lambda _client, number=number: b"%d" % number)  # type: ignore[misc]
        assert await quick.next() == b"%d" % number
    assert aborted == ["slow"]
    assert hub.clients == {quick}
    assert hub.cut_off == 1
    assert await slow.next() is None


async def test_a_connection_nobody_reads_from_is_closed_and_costs_the_others_nothing() -> None:
    web = Web(token=None)
    server = uvicorn.Server(serving.config(web.app))
    listening = socket.create_server(("127.0.0.1", 0))
    request = b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"
    running = asyncio.create_task(server._serve([listening]))
    stuck, stuck_writer = await asyncio.open_connection(*listening.getsockname(), limit=1024)
    quick, quick_writer = await asyncio.open_connection(*listening.getsockname())
    big = b"x" * 200_000
    async with asyncio.timeout(20):
        for writer in (stuck_writer, quick_writer):
            writer.write(request)
        while len(web.hub.clients) < 2:
            await asyncio.sleep(0.01)
        while not web.hub.cut_off:
            web.hub.send(lambda _client: big)
            await quick.readuntil(big)
        while len(server.server_state.connections) > 1:
            await asyncio.sleep(0.01)
        assert len(web.hub.clients) == 1
        web.hub.send(lambda _client: b"the last one")
        await quick.readuntil(b"the last one")
        web.hub.close()
        server.should_exit = True
        await running
    for writer in (stuck_writer, quick_writer):
        writer.close()
    assert not stuck.at_eof()


async def test_a_hub_that_is_full_or_closed_takes_nobody() -> None:
    web = Web(token=None)
    for _ in range(100):
        web.hub.clients.add(Client(lambda: None, bool))
    async with web.open() as http:
        answer = await http.get("/api/stream")
        assert (answer.status_code, answer.json()) == (503, {"error": "too many open streams"})
    web.hub.clients.clear()
    web.hub.close()
    async with web.open() as http:
        assert (await http.get("/api/stream")).status_code == 503


async def test_a_stream_begins_with_the_whole_and_ends_with_the_hub() -> None:
    web = Web(token=None)
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "method": "GET", "path": "/api/stream", "raw_path": b"/api/stream", "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"last-event-id", b"7")], "client": ("127.0.0.1", 1), "scheme": "http",
        "server": ("localhost", 80), "state": {"abort": lambda: None}, "http_version": "1.1",
    }  # fmt: skip

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 2:
            web.hub.close()

    async with asyncio.timeout(5):
        await web.app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
    assert headers["x-frame-options"] == "DENY"
    assert sent[1]["body"].startswith(b"retry: 1000\nevent: snapshot\nid: 0\ndata: {")
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert not web.hub.clients


async def test_what_fails_in_the_background_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> None:
        raise RuntimeError("something unexpected")

    monkeypatch.setattr(serving, "publish", fails)
    settings = load({"HOME": "/nowhere", "REDIS_PORT": "1", "METRICS_PORT": "0", "DASHBOARD_PORT": "0"})
    async with asyncio.timeout(10):
        with pytest.raises(RuntimeError, match="something unexpected"):
            await serving.serve(settings, serving.listen(settings), token=None)


# -- the daemon's own routes -----------------------------------------------------------------------------------------


def test_a_counter_grows_over_restarts_and_within_its_hour() -> None:
    grown = Growth()
    assert grown.over(3600) == 0
    for at, value in ((0, 10), (1800, 12), (3000, 1), (3700, 4)):
        grown.note(at, value)
    assert grown.over(3600) == 4
    assert grown.over(800) == 3
    assert grown.over(100_000) == 6


def test_metrics_are_summed_over_their_labels() -> None:
    text = (
        '# TYPE quantum_govern_exchange_error counter\nquantum_govern_exchange_error_total{kind="a"} 2.0\n'
        'quantum_govern_exchange_error_total{kind="b"} 3.0\n# TYPE other gauge\nother 1.0\n'
    )
    assert read_metrics(text) == {"exchange_error_total": 5.0}


def test_where_the_daemon_is_asked() -> None:
    def url(**environ: str) -> str:
        return base_url(load({"HOME": "/nowhere", **environ}))

    assert url() == "http://127.0.0.1:8044"
    assert url(METRICS_HOST="0.0.0.0", METRICS_PORT="1") == "http://127.0.0.1:1"  # noqa: S104 - nothing listens
    assert url(METRICS_HOST="::", METRICS_PORT="1") == "http://[::1]:1"
