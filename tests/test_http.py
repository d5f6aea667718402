import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from governor.http import Answer, HttpServer

ROUTES = ("/metrics", "/healthz", "/readyz")


@contextmanager
def serving(
    healthy: Callable[[], Answer] = lambda: (True, {"loop": "alive"}),
    ready: Callable[[], Answer] = lambda: (True, {"ready": True}),
    registry: CollectorRegistry | None = None,
    port: int = 0,
) -> Iterator[HttpServer]:
    registry = registry or CollectorRegistry()
    server = HttpServer("127.0.0.1", port, registry=registry, healthy=healthy, ready=ready)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def plain() -> Iterator[HttpServer]:
    """A server that has nothing special to say."""
    registry = CollectorRegistry()
    Counter("quantum_govern_test", "A test.", registry=registry)
    with serving(registry=registry) as server:
        yield server


def ask(server: HttpServer, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def raw(server: HttpServer, request: bytes) -> bytes:
    """Everything the server says to a request, to the end of the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
        link.sendall(request)
        link.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: link.recv(65536), b""))


# ---------------------------------------------------------------- routes


@pytest.mark.parametrize(("path", "key"), [("/healthz", "loop"), ("/readyz", "ready"), ("/readyz?verbose=1", "ready")])
def test_health_and_readiness_are_told_as_json(plain: HttpServer, path: str, key: str) -> None:
    response, body = ask(plain, path)
    assert response.status == 200
    assert response.getheader("Content-Type") == "application/json"
    assert key in json.loads(body)
    assert response.getheader("Content-Length") == str(len(body))


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_what_is_not_well_is_503_and_says_why(path: str) -> None:
    def answer() -> Answer:
        return False, {"problems": ["Redis is not reachable", "ü"]}

    with serving(healthy=answer, ready=answer) as server:
        response, body = ask(server, path)
    assert (response.status, response.reason) == (503, "Service Unavailable")
    assert json.loads(body) == {"problems": ["Redis is not reachable", "ü"]}


def test_health_and_readiness_are_asked_anew_every_time() -> None:
    fine = iter([True, False, True])
    with serving(healthy=lambda: (next(fine), {})) as server:
        assert [ask(server, "/healthz")[0].status for _ in range(3)] == [200, 503, 200]


def test_metrics_are_those_of_the_registry_in_prometheus_text() -> None:
    registry = CollectorRegistry()
    counter = Counter("quantum_govern_test", "A test.", registry=registry)
    with serving(registry=registry) as server:
        values = []
        for _ in range(2):
            counter.inc()
            response, body = ask(server, "/metrics")
            assert response.status == 200
            assert str(response.getheader("Content-Type")).startswith("text/plain; version=")
            families = text_string_to_metric_families(body.decode())
            samples = [sample for family in families for sample in family.samples]
            values += [sample.value for sample in samples if sample.name == "quantum_govern_test_total"]
    assert values == [1.0, 2.0]


@pytest.mark.parametrize(
    "path", ["/", "", "/metrics/", "/METRICS", "/healthz/x", "/../metrics", "/favicon.ico", "/%00"]
)
def test_any_other_path_is_404_and_names_the_routes(plain: HttpServer, path: str) -> None:
    response, body = ask(plain, path)
    assert response.status == 404
    assert body.decode().split() == list(ROUTES)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_any_other_method_is_405_and_names_those_allowed(method: str) -> None:
    called = []

    def answer() -> Answer:
        called.append(method)
        return True, {}

    with serving(healthy=answer) as server:
        response, _ = ask(server, "/healthz", method)
    assert response.status == 405
    assert response.getheader("Allow") == "GET, HEAD"
    assert called == []


@pytest.mark.parametrize("path", [*ROUTES, "/nowhere"])
def test_head_has_the_same_headers_and_no_body(plain: HttpServer, path: str) -> None:
    got, body = ask(plain, path)
    head = raw(plain, f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
    lines, _, after = head.partition(b"\r\n\r\n")
    assert after == b""
    assert f" {got.status} ".encode() in lines.splitlines()[0]
    assert f"Content-Length: {len(body)}".encode() in lines.splitlines()


def test_nonsense_does_not_stop_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        for request in (b"\x16\x03\x01\r\n\r\n", b"GET\r\n\r\n", b"", b"GET /healthz HTTP/1.0\r\nx"):
            raw(server, request)
        assert ask(server, "/healthz")[0].status == 200
    assert capsys.readouterr() == ("", "")


def test_requests_are_not_logged(plain: HttpServer, capsys: pytest.CaptureFixture[str]) -> None:
    ask(plain, "/healthz")
    ask(plain, "/nowhere")
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- a loop that hangs, a scrape that is slow


@contextmanager
def hanging_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that is busy until the end."""
    loop = asyncio.new_event_loop()
    busy, release = threading.Event(), threading.Event()

    def hang() -> None:
        busy.set()
        release.wait(10)

    thread = threading.Thread(target=loop.run_forever)
    loop.call_soon(hang)
    thread.start()
    busy.wait(10)
    try:
        yield loop
    finally:
        release.set()
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(5)  # what was asked meanwhile ends first
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_loop_that_hangs_shows_as_503_while_metrics_are_still_served() -> None:
    async def alive() -> bool:
        return True

    def answer() -> Answer:
        try:
            return asyncio.run_coroutine_threadsafe(alive(), loop).result(0.05), {}
        except TimeoutError:
            return False, {"loop": "does not answer"}

    with hanging_loop() as loop, serving(healthy=answer, ready=answer) as server:
        for path in ("/healthz", "/readyz"):
            response, body = ask(server, path)
            assert response.status == 503
            assert json.loads(body) == {"loop": "does not answer"}
        assert ask(server, "/metrics")[0].status == 200


def test_one_answer_that_takes_long_does_not_hold_up_the_others() -> None:
    release = threading.Event()
    entered = threading.Event()

    def slow() -> Answer:
        entered.set()
        release.wait(10)
        return True, {}

    with serving(ready=slow) as server, ExitStack() as stack:
        stack.callback(release.set)
        link = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        link.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
        assert entered.wait(5)
        assert ask(server, "/healthz")[0].status == 200
        release.set()
        assert b" 200 " in link.recv(65536)


# ---------------------------------------------------------------- the port


def test_port_0_takes_a_free_one_and_tells_it() -> None:
    with serving() as first, serving() as second:
        assert first.port != second.port
        assert {ask(each, "/healthz")[0].status for each in (first, second)} == {200}


def test_it_listens_where_it_was_told_and_nowhere_else() -> None:
    with serving() as server, pytest.raises(OSError, match=r"refused"):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


def test_a_port_that_is_taken_is_told() -> None:
    with serving() as server, pytest.raises(OSError, match=r"in use"), serving(port=server.port):
        pass


def test_closing_frees_the_port_and_ends_its_thread() -> None:
    before = threading.active_count()
    with serving() as server:
        port = server.port
        assert ask(server, "/healthz")[0].status == 200
    with pytest.raises(OSError, match=r"refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert threading.active_count() <= before + 1  # a request's own thread may still be on its way out
    with serving(port=port) as again:
        assert ask(again, "/healthz")[0].status == 200
