"""The client the exchange is asked with, against servers that say byte for byte what they are told to."""

import asyncio
import contextlib
import gc
import gzip
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import certifi
import pytest

from governor.http_client import Answer, HttpClient, UnreadableError
from tests.conftest import missing
from tests.daemon import until

MOST = 1000
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n\r\nok"


def packed(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class Server:
    """Says `says` to each request; what it may do beside that is in its attributes.

    Attributes:
        requests: what came, and the number of its connection, from 1.
        closes: whether it closes a connection after it has answered.
        by_byte: whether an answer comes in packets of one byte.
    """

    def __init__(self, says: bytes = OK) -> None:
        self.says = says
        self.closes = self.by_byte = False
        self.requests: list[tuple[int, bytes]] = []
        self.links: list[asyncio.StreamWriter] = []
        self.ended = 0

    @contextlib.asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
        """Yields its port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for link in self.links:
                link.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.links.append(writer)
        number = len(self.links)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                self.requests.append((number, await reader.readuntil(b"\r\n\r\n")))
                for piece in [bytes([byte]) for byte in self.says] if self.by_byte else [self.says]:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.closes:
                    break
        self.ended += 1
        writer.close()


@pytest.fixture
async def server() -> Server:
    return Server()


@pytest.fixture
async def port(server: Server) -> AsyncIterator[int]:
    async with server.running() as number:
        yield number


@pytest.fixture
async def client(port: int) -> AsyncIterator[HttpClient]:
    troubles: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
    one = HttpClient(f"http://127.0.0.1:{port}", {"user-agent": "test"}, connections=2, idle_s=60)
    yield one
    await one.aclose()
    gc.collect()
    assert not troubles, "what nobody caught"


async def ask(client: HttpClient, target: str = "/", **headers: str) -> Answer:
    async with asyncio.timeout(5):
        return await client.get(target, headers, most=MOST)


async def test_a_request_is_what_was_asked_for_and_no_more(client: HttpClient, server: Server, port: int) -> None:
    assert await ask(client, "/path?a=1&b=%20", key="k") == Answer(200, {"content-length": "2"}, b"ok")
    head = f"GET /path?a=1&b=%20 HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nuser-agent: test\r\nkey: k\r\n\r\n"
    assert server.requests == [(1, head.encode())]


async def test_a_connection_is_used_again_and_there_are_as_many_as_requests_at_once(
    client: HttpClient, server: Server
) -> None:
    for _ in range(3):
        await ask(client)
    assert [number for number, _ in server.requests] == [1, 1, 1]
    assert [answer.body for answer in await asyncio.gather(*(ask(client) for _ in range(5)))] == [b"ok"] * 5
    assert {number for number, _ in server.requests} == {1, 2}, "two at once are allowed, the others wait"


@pytest.mark.parametrize(
    ("says", "closes"),
    [
        (OK, False),
        (CHUNKED, False),
        (packed(gzip.compress(b"ok")), False),
        (b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + OK, False),
        (UNTIL_CLOSED, True),
    ],
    ids=["length", "chunked", "gzip", "hints", "until closed"],
)
async def test_an_answer_is_whole_however_it_comes(
    client: HttpClient, server: Server, says: bytes, *, closes: bool
) -> None:
    server.says, server.closes, server.by_byte = says, closes, True
    answer = await ask(client)
    assert (answer.status, answer.body) == (503 if closes else 200, b"ok")


@pytest.mark.parametrize(
    "says",
    [OK.replace(b"1.1", b"1.0"), OK.replace(b"content", b"connection: close\r\ncontent"), OK + OK, OK + b"x"],
    ids=["1.0", "close", "two answers", "a byte more"],
)
async def test_a_connection_that_ends_or_says_more_than_was_asked_is_not_used_again(
    client: HttpClient, server: Server, says: bytes
) -> None:
    server.says = says
    with contextlib.suppress(ConnectionError):  # what is not even the beginning of an answer spoils this one
        await ask(client)
    server.says = OK
    assert (await ask(client)).body == b"ok"
    assert [number for number, _ in server.requests] == [1, 2]


async def test_what_comes_unasked_is_nobodys_answer(client: HttpClient, server: Server) -> None:
    await ask(client)
    server.links[0].write(OK.replace(b"ok", b"no"))
    await until(lambda: server.ended == 1)
    assert (await ask(client)).body == b"ok"


async def test_a_connection_that_was_closed_while_nothing_was_asked_is_no_trouble(
    client: HttpClient, server: Server
) -> None:
    await ask(client)
    server.links[0].close()
    await until(client._idle[0].closed.done)
    assert (await ask(client)).status == 200
    assert [number for number, _ in server.requests] == [1, 2]


async def test_a_connection_not_used_for_long_is_closed(server: Server, port: int) -> None:
    client = HttpClient(f"http://127.0.0.1:{port}", {}, connections=2, idle_s=0)
    await ask(client)
    await ask(client)
    await until(lambda: server.ended == 1)
    assert [number for number, _ in server.requests] == [1, 2]
    await client.aclose()


@pytest.mark.parametrize("says", [b"", OK[:-1], OK[:20], CHUNKED[:-5], UNTIL_CLOSED[:30]])
async def test_an_answer_that_is_cut_is_a_broken_connection(client: HttpClient, server: Server, says: bytes) -> None:
    server.says, server.closes = says, True
    with pytest.raises(ConnectionError):
        await ask(client)


@pytest.mark.parametrize(
    "says", [b"+PONG\r\n", b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nwhat follows"]
)
async def test_what_is_not_http_is_a_broken_connection(client: HttpClient, server: Server, says: bytes) -> None:
    server.says = says
    with pytest.raises(ConnectionError):
        await ask(client)
    await until(lambda: server.ended == 1)


@pytest.mark.parametrize(
    "says",
    [
        OK.replace(b"2", b"2000").replace(b"ok", b"o" * 2000),
        OK.replace(b"\r\n\r\n", b"\r\nx: " + b"x" * 2000),
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
        packed(gzip.compress(b"o" * (MOST + 1))),
        packed(gzip.compress(b"ok")[:-1]),
        packed(b"no gzip"),
    ],
    ids=["body", "header", "interim answers", "unpacked", "cut gzip", "no gzip"],
)
async def test_an_answer_larger_than_allowed_or_not_packed_as_it_says_is_given_up(
    client: HttpClient, server: Server, says: bytes
) -> None:
    server.says = says
    with pytest.raises(UnreadableError):
        await ask(client)
    server.says = OK
    assert (await ask(client)).body == b"ok"


async def test_a_request_that_is_given_up_leaves_no_connection_that_hears_its_answer(
    client: HttpClient, server: Server
) -> None:
    await ask(client)
    server.says = b""
    asked = asyncio.create_task(ask(client))
    await until(lambda: len(server.requests) == 2)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await until(lambda: server.ended == 1)


async def test_a_connection_that_ends_before_it_is_asked_is_a_broken_one(client: HttpClient, server: Server) -> None:
    connection = await client._connect()
    await until(lambda: len(server.links) == 1)
    server.links[0].write(OK)
    server.links[0].close()
    await asyncio.wait_for(connection.closed, 5)
    with pytest.raises(ConnectionError):
        await connection.ask("GET / HTTP/1.1\r\n\r\n", MOST)


async def test_closing_ends_what_is_asked_and_what_is_kept(client: HttpClient, server: Server) -> None:
    await asyncio.gather(ask(client), ask(client))
    server.says = b""
    asked = asyncio.create_task(ask(client))
    await until(lambda: len(server.requests) == 3)
    await client.aclose()
    with pytest.raises(ConnectionError):
        await asked
    await until(lambda: server.ended == 2)
    await client.aclose()


async def test_an_error_tells_neither_address_nor_header(client: HttpClient, server: Server) -> None:
    for says in (b"+PONG\r\n", packed(b"no gzip"), OK[:-1]):
        server.says, server.closes = says, True
        with pytest.raises((OSError, UnreadableError)) as failed:
            await ask(client, "/?signature=abc", key="secret")
        shown: list[Any] = [failed.value, failed.value.__context__, failed.value.__cause__]
        assert not [error for error in shown if "abc" in repr(error) or "secret" in repr(error)]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificate and key in one file, for localhost."""
    if shutil.which("openssl") is None:
        missing("openssl is not on PATH: apt-get install openssl")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2", "-keyout", file, "-out", file],
        check=True, capture_output=True,
    )  # fmt: skip
    return file


@pytest.mark.parametrize(
    ("host", "trusted", "answers"),
    [("localhost", True, True), ("127.0.0.1", True, False), ("localhost", False, False)],
    ids=["good", "another host", "unknown authority"],
)
async def test_with_https_the_certificate_has_to_be_one_for_the_host_by_a_known_authority(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, host: str, *, trusted: bool, answers: bool
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    if trusted:
        monkeypatch.setattr(certifi, "where", lambda: str(certificate))
    server = Server()
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the server's own, of a handshake that failed
    async with server.running(tls) as port:
        client = HttpClient(f"https://{host}:{port}", {}, connections=1, idle_s=60)
        if answers:
            assert (await ask(client)).body == b"ok"
            assert (await ask(client)).body == b"ok"
        else:
            with pytest.raises(ssl.SSLCertVerificationError):
                await ask(client)
        assert [number for number, _ in server.requests] == ([1, 1] if answers else [])
        await client.aclose()
