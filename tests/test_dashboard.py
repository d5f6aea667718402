"""The dashboard as people run it: a process beside a real daemon on a real server."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from governor.connection import connected, ledger_on
from governor.dashboard import serving
from governor.dashboard.feed import HALT
from governor.settings import load
from tests.conftest import NewServer
from tests.daemon import Daemon, daemon, events_of, publish, wait_for
from tests.dashboard import TOKEN, Dashboard, dashboard, free_port, token_file, watching
from tests.servers import RedisServer
from tests.test_end_to_end import CREDENTIALS, Exchange
from tests.test_notify import systemd
from tests.test_redis_access import Guarded

PERMITTING = {"GOV_MAX_REDUCE_QTY_PER_DAY": "off", "GOV_FALLBACK_QTY": "0.001"}


def words(*names: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "governor", *names],
        env=environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


class Scene(NamedTuple):
    """A daemon, a dashboard with control, and the server both are on."""

    server: RedisServer
    daemon: Daemon
    board: Dashboard


@pytest.fixture
def scene(new_server: NewServer, tmp_path: Path) -> Iterator[Scene]:
    server = new_server("valkey", appendonly=True)
    metrics = {"METRICS_PORT": str(free_port())}
    with (
        daemon(tmp_path, port=server.port, environ=PERMITTING | metrics) as one,
        dashboard(tmp_path, one.environ, DASHBOARD_TOKEN_FILE=token_file(tmp_path)) as board,
    ):
        board.ready()
        yield Scene(server, one, board)


def comparable(status: Any) -> Any:
    """Without what only the moment of asking makes."""
    symbols = {
        symbol: {
            name: "now" if name == "next_allowed" and value is not None and value <= status["time"] else value
            for name, value in values.items()
            if name != "last"
        }
        for symbol, values in status["symbols"].items()
    }
    return {**status, "symbols": symbols, "time": None}


def test_it_shows_what_the_status_command_tells_and_what_was_before_it_began(scene: Scene) -> None:
    with scene.server.client() as client:
        for number in range(2):
            publish(client, f"p{number}", "BTCUSDT")
        publish(client, "e0", "ETHUSDT", decision="SKIP")
        client.xadd("quantum:stream:apply.plan", {"plan_id": "bad", "symbol": ""})
        publish(client, "e1", "ETHUSDT")
        told = scene.board.wait(lambda seen: seen["status"]["counts"]["plans"] == 4)
        told = scene.board.wait(lambda seen: seen["seq"] == len(events_of(client)))
    assert comparable(told["status"]) == comparable(scene.daemon.json("status"))
    assert told["status"]["symbols"]["BTCUSDT"]["last"]["plan_id"] == "p1"
    with dashboard(scene.daemon.home, scene.daemon.environ) as later:
        seen = later.ready()
    assert seen["plans"] == told["plans"]
    assert seen["incidents"] == told["incidents"]
    verdicts = {row["plan_id"]: (row["verdict"], row["permit"] and row["permit"]["status"]) for row in told["plans"]}
    assert verdicts == {
        "p0": ("EXECUTE", "outstanding"), "p1": ("EXECUTE", "outstanding"), "e0": ("SKIP", None),
        "bad": ("REJECTED", None), "e1": ("EXECUTE", "outstanding"),
    }  # fmt: skip
    assert [row["seq"] for row in told["plans"]] == sorted((row["seq"] for row in told["plans"]), reverse=True)
    assert sum(seen["chart"]["allowed"]) == 3


def test_a_disarm_reaches_an_open_page_and_so_does_all_else(scene: Scene) -> None:
    with watching(scene.board.url) as page, scene.server.client() as client:
        first = page.wait("snapshot")
        assert page.headers is not None
        assert page.headers["x-accel-buffering"] == "no"
        publish(client, "p1", "BTCUSDT")
        rows = page.wait("plans", lambda told: told["rows"][-1]["plan_id"] == "p1")["rows"]
        assert rows[-1]["permit"]["status"] == "outstanding"
        scene.daemon.json("disarm", "--reason", "night")
        tick = page.wait("tick", lambda told: told["status"]["state"] == "DISARMED")
        assert tick["last_disarm"]["reason"] == "night"
        page.wait("tick", lambda told: told["last_disarm"] and told["last_disarm"]["done_at"])
        assert page.wait("incidents", lambda told: told["rows"][0]["event"] == "DISARM_STARTED")["rows"][0]["told"]
        page.wait("plans", lambda told: told["rows"][0]["permit"]["status"] == "revoked")
        assert tick.keys() == {"now", "status", "health", "control", "last_disarm"}
        assert first.keys() == tick.keys() | {"seq", "about", "plans", "incidents", "chart"}
        assert tick["health"].keys() == {"events", "daemon", "exchange", "redis", "journal"}
        ticks = len(page.of("tick"))
        wait_for(lambda: len(page.of("tick")) >= ticks + 2, what="ticks while nothing happens")


def test_the_health_of_daemon_journal_and_redis_is_told_and_that_the_daemon_is_away(scene: Scene) -> None:
    told = scene.board.wait(lambda seen: seen["health"]["journal"]["ok"])
    health = told["health"]
    assert (health["daemon"]["answers"], health["daemon"]["ready"], health["daemon"]["problems"]) == (True, True, [])
    assert health["redis"]["memory_bytes"] > 0
    assert health["redis"]["durable"] in ("ok", "bad", "warn")
    assert health["redis"]["latency_ms"] > 0
    assert health["exchange"]["configured"] is False
    scene.daemon.stop()
    told = scene.board.wait(lambda seen: not seen["health"]["daemon"]["answers"])
    assert "/readyz" in told["health"]["daemon"]["error"]
    assert told["health"]["events"]["trusted"]
    scene.board.wait(lambda seen: seen["health"]["journal"]["ok"] is None)


def test_the_exchange_is_told_of_without_its_key(new_server: NewServer, tmp_path: Path) -> None:
    server = new_server("valkey")
    with Exchange() as exchange, server.client() as client:
        exchange.set("BTCUSDT", "0.020", "50000")
        metrics = {"METRICS_PORT": str(free_port())}
        with daemon(
            tmp_path, port=server.port, base_url=exchange.base_url, environ=CREDENTIALS | PERMITTING | metrics
        ) as one:
            environ = {name: value for name, value in one.environ.items() if name not in CREDENTIALS}
            with dashboard(tmp_path, environ) as board:
                publish(client, "p1", "BTCUSDT")
                told = board.wait(lambda seen: seen["plans"])
                assert told["about"]["exchange"] == exchange.base_url
                assert told["plans"][0]["price"] == 50000
                told = board.wait(lambda seen: seen["health"]["exchange"]["weight_used"], within_s=20)
    health = told["health"]["exchange"]
    assert health["configured"] is True
    assert 0 < health["weight_used"] <= health["weight_limit"]
    assert health["errors_1h"] == 0
    assert told["chart"]["notional"][-1] == told["status"]["total_daily_notional"]["used"] == 250


def test_it_goes_on_through_an_outage_of_redis_and_says_so(scene: Scene) -> None:
    with scene.server.client() as client:
        publish(client, "p1", "BTCUSDT")
        scene.board.wait(lambda seen: seen["plans"])
    with watching(scene.board.url) as page:
        page.wait("snapshot")
        scene.server.kill()
        away = page.wait("tick", lambda told: not told["health"]["events"]["reachable"])
        assert away["health"]["events"]["error"]
        assert away["status"]["state"] == "ARMED"
        ticks = len(page.of("tick"))
        wait_for(lambda: len(page.of("tick")) >= ticks + 2, what="ticks while Redis is away")
        scene.server.start()
        back = len(page.of("tick"))
        wait_for(lambda: any(t["health"]["events"]["trusted"] for t in page.of("tick")[back:]), what="Redis back")
        with scene.server.client() as client:
            publish(client, "p2", "BTCUSDT")
        page.wait("plans", lambda told: told["rows"][-1]["plan_id"] == "p2", within_s=20)
        assert not page.ended.is_set()


def test_a_plan_is_explained_as_the_command_does(scene: Scene) -> None:
    with scene.server.client() as client:
        publish(client, "odd/id with ü", "BTCUSDT")
        scene.board.wait(lambda seen: seen["plans"])
    answer = scene.board.http.get("/api/plans/odd%2Fid%20with%20%C3%BC")
    told = answer.json()
    assert told.pop("lines")[0] == told["answer"]
    assert told == scene.daemon.json("explain", "odd/id with ü")
    missing = scene.board.http.get("/api/plans/nobody")
    assert missing.status_code == 404
    assert "nobody ever saw it" in missing.json()["error"]
    assert scene.board.http.get("/api/plans/" + "x" * 600).status_code == 404


def test_of_a_trimmed_stream_it_shows_what_the_checkpoint_and_the_rest_say(scene: Scene) -> None:
    with scene.server.client() as client:
        for name in ("p1", "p2"):
            publish(client, name, "BTCUSDT")
        scene.board.wait(lambda seen: len(seen["plans"]) == 2)
        settings = load({"REDIS_PORT": str(scene.server.port), "HOME": str(scene.daemon.home)})

        async def checkpoint() -> None:
            async with connected(settings) as connection:
                ledger = ledger_on(connection, settings)
                await ledger.open()
                await ledger.write_checkpoint()

        asyncio.run(checkpoint())
        client.xtrim("quantum:stream:governor.events", minid="4-0", approximate=False)
    with dashboard(scene.daemon.home, scene.daemon.environ) as board:
        told = board.ready()
        assert told["status"]["counts"]["plans"] == 2
        assert [row["plan_id"] for row in told["plans"]] == ["p2"]
        assert board.http.get("/api/plans/p2").json()["decision"]["verdict"] == "EXECUTE"
        assert board.http.get("/api/plans/p1").status_code == 404


def test_a_person_with_the_token_disarms_and_re_arms_and_is_recorded(scene: Scene) -> None:
    board = scene.board
    assert board.login("not-the-token-at-all").status_code == 401
    assert board.http.post("/api/disarm", json={"reason": "x"}).status_code == 401
    assert board.login().status_code == 200
    with watching(board.url) as page:
        done = board.http.post("/api/disarm", json={"reason": "bad fills"}).json()
        assert (done["state"], done["done"], done["code"], done["epoch"]) == ("DISARMED", True, 0, 2)
        assert done["operator"] == "dashboard:127.0.0.1"
        page.wait("tick", lambda told: told["status"]["disarm"] and told["status"]["disarm"]["done"])
    assert "APPLY_MODE=dry_run" in scene.daemon.config.read_text()
    preview = board.http.get("/api/rearm").json()
    assert (preview["allowed"], preview["refusal"], preview["type"]) == (True, None, "rearm")
    assert any("never changes it" in sentence for sentence in preview["says"])
    armed = board.http.post("/api/rearm", json={"reason": "looked at it", "typed": "rearm"}).json()
    assert (armed["state"], armed["code"], armed["restored"], armed["epoch"]) == ("ARMED", 0, False, 3)
    assert "APPLY_MODE=dry_run" in scene.daemon.config.read_text()
    board.wait(lambda seen: seen["last_disarm"]["rearmed"])
    again = board.http.post("/api/rearm", json={"reason": "once more", "typed": "rearm"})
    assert (again.status_code, "nothing to re-arm" in again.json()["error"]) == (409, True)
    with scene.server.client() as client:
        by = {event["event"]: event["operator"] for event in events_of(client, "DISARM_STARTED", "REARMED")}
    assert by == dict.fromkeys(("DISARM_STARTED", "REARMED"), "dashboard:127.0.0.1")
    session = board.http.cookies[f"governor-{board.port}"]
    assert board.stop() == 0
    for secret in (TOKEN, "not-the-token-at-all", session):
        assert secret not in board.log
    assert "Traceback" not in board.log


def test_a_re_arm_waits_for_the_end_of_the_disarm(scene: Scene) -> None:
    (scene.daemon.home / "fails").write_text("1")
    scene.board.login()
    with scene.server.client() as client:
        client.set("quantum:governor:halt", "stop")
        scene.board.wait(lambda seen: seen["status"]["state"] == "DISARMED")
    told = scene.board.http.get("/api/rearm").json()
    assert not told["allowed"]
    assert "unfinished" in told["refusal"]
    answer = scene.board.http.post("/api/rearm", json={"reason": "now", "typed": "rearm"})
    assert (answer.status_code, "unfinished" in answer.json()["error"]) == (409, True)
    assert scene.board.wait(lambda seen: seen["status"]["disarm"]["error"])["status"]["state"] == "DISARMED"


def test_before_a_re_arm_the_file_is_told_as_it_is(scene: Scene) -> None:
    scene.board.login()
    assert scene.board.http.post("/api/disarm", json={"reason": "bad fills"}).json()["done"] is True
    scene.board.wait(lambda seen: seen["status"]["state"] == "DISARMED")
    assert "says dry run" in " ".join(scene.board.http.get("/api/rearm").json()["says"])
    scene.daemon.config.write_text("APPLY_MODE=live\n")
    scene.board.wait(lambda seen: seen["status"]["drift"])
    told = " ".join(scene.board.http.get("/api/rearm").json()["says"])
    assert "says dry run" not in told
    assert "was set to APPLY_MODE=live by hand" in told


def test_the_feed_goes_on_while_a_disarm_takes_its_time(scene: Scene) -> None:
    stand_in = scene.daemon.home / "bin" / "systemctl"
    wait = f"#!/bin/sh\nuntil [ -e {scene.daemon.home}/go ]; do sleep 0.02; done"
    stand_in.write_text(stand_in.read_text().replace("#!/bin/sh", wait))
    scene.board.login()
    with watching(scene.board.url) as page, ThreadPoolExecutor(1) as elsewhere:
        page.wait("snapshot")
        asked = elsewhere.submit(scene.board.http.post, "/api/disarm", json={"reason": "slow"})
        page.wait("tick", lambda told: told["status"]["state"] == "DISARMED")
        ticks = len(page.of("tick"))
        wait_for(lambda: len(page.of("tick")) >= ticks + 2, what="ticks meanwhile")
        assert not asked.done()
        (scene.daemon.home / "go").touch()
        assert asked.result(30).json()["done"] is True


def test_a_disarm_of_an_emptied_stream_pulls_the_brake_and_begins_no_second_history(scene: Scene) -> None:
    scene.daemon.kill()
    scene.board.login()
    with scene.server.client() as client:
        client.flushall()
        scene.board.wait(lambda seen: seen["status"]["state"] is None and seen["health"]["events"]["trusted"])
        told = scene.board.http.post("/api/disarm", json={"reason": "what is this"}).json()
        assert (told["code"], told["done"], told["state"]) == (1, False, None)
        assert client.exists("quantum:stream:governor.events") == 0
        scene.daemon.start()
        seen = scene.board.wait(lambda seen: seen["status"]["disarm"] and seen["status"]["disarm"]["done"])
    assert (seen["status"]["reason"], seen["status"]["disarm"]["operator"]) == ("what is this", "dashboard:127.0.0.1")
    assert seen["health"]["events"]["began_again"]


def test_a_disarm_right_after_redis_lost_its_events_begins_no_second_history_either(
    scene: Scene, tmp_path: Path
) -> None:
    elsewhere = {"GOV_JOURNAL_DIR": str(tmp_path / "none"), "DASHBOARD_TOKEN_FILE": token_file(tmp_path)}
    with dashboard(tmp_path, scene.daemon.environ, **elsewhere) as board, scene.server.client() as client:
        board.ready()
        board.login()
        scene.daemon.kill()
        client.flushall()
        told = board.http.post("/api/disarm", json={"reason": "what is this"}).json()
        assert (told["code"], told["state"]) == (1, None)
        assert client.exists("quantum:stream:governor.events") == 0
        scene.daemon.start()
        board.wait(lambda seen: seen["status"]["disarm"] and seen["status"]["disarm"]["done"])
    assert scene.daemon.readiness()["ready"]


def test_connections_that_ask_for_nothing_keep_nobody_out(scene: Scene) -> None:
    scene.board.login()
    with ExitStack() as open_ones:
        for number in range(serving.CONNECTIONS + 20):
            one = open_ones.enter_context(socket.create_connection(("127.0.0.1", scene.board.port)))
            if number % 2:
                one.sendall(b"GET / HTTP/1.1\r\nHost: ")
        with watching(scene.board.url) as page:
            page.wait("snapshot")
            assert scene.board.http.post("/api/disarm", json={"reason": "crowded"}).json()["done"] is True
            page.wait("tick", lambda told: told["status"]["state"] == "DISARMED")


def test_a_brake_that_no_daemon_sees_is_told_in_short_and_keeps_no_re_arm_waiting(scene: Scene) -> None:
    scene.daemon.kill()
    scene.board.login()
    with scene.server.client() as client:
        client.set("quantum:governor:halt", "stop " * 100_000)
        told = scene.board.wait(lambda seen: seen["status"]["halted"])
    assert len(told["status"]["halted"]) == HALT
    preview = scene.board.http.get("/api/rearm").json()
    assert not preview["allowed"]
    assert "the emergency brake is set" in preview["refusal"]


def test_it_writes_nothing_and_needs_no_more_than_to_read(tmp_path: Path) -> None:
    with Guarded("valkey", tmp_path) as server:
        rights = {"METRICS_PORT": str(free_port()), **PERMITTING}
        with daemon(tmp_path, port=server.port, environ=rights | server.environ()) as one:
            with server.client() as admin:
                publish(admin, "p1", "BTCUSDT")
                wait_for(lambda: events_of(admin, "DECISION"), what="the decision")
                admin.acl_log_reset()
            with dashboard(tmp_path, one.environ, **server.environ("dashboard")) as board:
                told = board.ready()
                assert told["plans"][0]["plan_id"] == "p1"
                board.wait(lambda seen: seen["health"]["redis"]["memory_bytes"])
                assert board.http.get("/api/plans/p1").status_code == 200
                assert board.stop() == 0
            assert {what for user, what in server.refused() if user == "dashboard"} <= {"config|get"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_at_once_although_pages_are_open(scene: Scene, number: int) -> None:
    with watching(scene.board.url) as one, watching(scene.board.url) as other:
        one.wait("tick")
        other.wait("tick")
        began = time.monotonic()
        assert scene.board.stop(number) == 0
        assert time.monotonic() - began < 2
        assert one.ended.wait(5)
        assert other.ended.wait(5)
    assert "Traceback" not in scene.board.log


def test_systemd_is_told_when_it_listens_and_when_it_stops(flushed: RedisServer, tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "REDIS_PORT": str(flushed.port)}
    with systemd(str(tmp_path / "notify")) as listening:
        with dashboard(tmp_path, environ, NOTIFY_SOCKET=str(tmp_path / "notify")) as board:
            told = listening.recv(4096).decode()
            assert told.splitlines() == ["READY=1", f"STATUS=on 127.0.0.1 port {board.port}"]
            board.stop()
        assert listening.recv(4096) == b"STOPPING=1"


def test_it_starts_without_redis_and_without_a_daemon_and_says_so(tmp_path: Path) -> None:
    ports = {"REDIS_PORT": str(free_port()), "METRICS_PORT": str(free_port())}
    with dashboard(tmp_path, {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **ports}) as board:
        told = board.wait(lambda seen: seen["health"]["events"]["error"] != "the events are being read")
        assert told["status"]["state"] is None
        assert not told["health"]["events"]["reachable"]
        assert not told["health"]["daemon"]["answers"]
        assert board.stop() == 0


def test_a_stream_nobody_ever_wrote_to_has_no_state(flushed: RedisServer, tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "REDIS_PORT": str(flushed.port)}
    with dashboard(tmp_path, environ) as board:
        told = board.ready()
        assert (told["status"]["state"], told["plans"], told["seq"]) == (None, [], 0)
        assert told["control"] == {"enabled": False, "logged_in": False}
        assert board.login().status_code == 403


def test_a_port_that_is_taken_is_a_wrong_setting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = words("dashboard", environ=os.environ | {"DASHBOARD_PORT": str(port), "HOME": str(tmp_path)})
    assert done.returncode == 78
    assert f"DASHBOARD_PORT is {port}, expected a free port on DASHBOARD_HOST 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_token_that_is_none_is_a_wrong_setting(tmp_path: Path) -> None:
    done = words("dashboard", environ=os.environ | {"DASHBOARD_TOKEN_FILE": token_file(tmp_path, "short")})
    assert done.returncode == 78
    assert "DASHBOARD_TOKEN_FILE is" in done.stderr
    assert "short" not in done.stderr


def test_without_its_packages_it_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "starlette.py").write_text("raise ImportError('No module named starlette')\n")
    done = words("dashboard", environ=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "the dashboard needs the packages of the extra 'dashboard': pip install '.[dashboard]'" in done.stderr


def test_an_address_others_reach_is_warned_about_but_for_a_proxy(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "REDIS_PORT": str(free_port())}
    for proxy, told in (("false", True), ("true", False)):
        with dashboard(tmp_path, environ, DASHBOARD_HOST="0.0.0.0", DASHBOARD_BEHIND_PROXY=proxy) as board:  # noqa: S104
            assert ("whoever reaches this address" in board.log) == told
            assert board.http.get("/healthz").status_code == 200
            assert board.http.get("/healthz", headers={"Host": "10.1.2.3"}).status_code == 421


def test_a_client_that_resets_its_connection_leaves_nothing(scene: Scene) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", scene.board.port)) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.sendall(b"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert one.recv(100)
    wait_for(lambda: scene.board.http.get("/healthz").json()["streams"] == 0, what="the streams' end")
    assert not re.search("Traceback|error", scene.board.log)
