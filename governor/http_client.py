"""GET over connections that are kept: as much of HTTP/1.1 as asking the exchange takes, around a parser in C.

A connection asks one thing at a time, and what it hears while nothing is asked ends it. So does an answer that did
not come to its end: an answer is always that of its own request. Neither an address nor a header shows in an error.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import zlib
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import aiohappyeyeballs
import httptools

OTHER_FAMILY_AFTER_S = 0.25
"""How long IPv6 may take to connect before IPv4 is tried beside it."""
_GZIP = zlib.MAX_WBITS | 16


class Answer(NamedTuple):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    """By name in lower case; of one that comes twice, the last."""
    body: bytes


class UnreadableError(Exception):
    """The answer is larger than allowed, or not packed as it says."""


class HttpClient:
    """Asks one place, over as many connections as there are requests at the same time.

    Args:
        base_url: `scheme://host[:port]`; with https the certificate has to be one for the host.
        headers: sent with every request.
        connections: the most at once; a request beyond them waits.
        idle_s: a connection that was not used for so long is closed.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str], *, connections: int, idle_s: float) -> None:
        place = urlsplit(base_url)
        self._host = place.hostname or ""
        self._tls = _verifying() if place.scheme == "https" else None
        self._port = place.port or (80 if self._tls is None else 443)
        self._every = _lines({"host": place.netloc, **headers})
        self._idle_s = idle_s
        self._room = asyncio.Semaphore(connections)
        self._idle: deque[_Connection] = deque()
        """The one used last at the end."""
        self._open: set[_Connection] = set()

    async def get(self, target: str, headers: Mapping[str, str], *, most: int) -> Answer:
        """Ask once. Cancelled, it leaves no connection that still hears the answer.

        Args:
            target: path and query, as they are sent.
            headers: beside those of every request.
            most: bytes of an answer, as it comes and unpacked.

        Raises:
            OSError: no connection, or it broke, or what came over it is not HTTP.
            UnreadableError: see there.
        """
        async with self._room:
            connection = self._kept() or await self._connect()
            try:
                answer = await connection.ask(f"GET {target} HTTP/1.1\r\n{self._every}{_lines(headers)}\r\n", most)
            finally:
                if connection.free:
                    self._idle.append(connection)
                else:
                    connection.abort()
        return answer._replace(body=_unpacked(answer, most))

    async def aclose(self) -> None:
        """Close all connections."""
        connections = tuple(self._open)
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(connection.closed for connection in connections))

    def _kept(self) -> _Connection | None:
        oldest = asyncio.get_running_loop().time() - self._idle_s
        while self._idle and self._idle[0].answered_at <= oldest:
            self._idle.popleft().abort()
        while self._idle:
            if (connection := self._idle.pop()).free:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        link = await aiohappyeyeballs.start_connection(found, happy_eyeballs_delay=OTHER_FAMILY_AFTER_S)
        name = self._host if self._tls is not None else None
        _, connection = await loop.create_connection(_Connection, sock=link, ssl=self._tls, server_hostname=name)
        self._open.add(connection)
        connection.closed.add_done_callback(lambda _: self._open.discard(connection))
        return connection


class _Connection(asyncio.Protocol):
    """One connection, and the answer that is coming in over it.

    Attributes:
        free: whether it can be asked.
        answered_at: when its latest answer was whole, on the event loop's clock.
        closed: done once it is.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.free = False
        self.answered_at = 0.0
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._answer: asyncio.Future[Answer] = self._loop.create_future()
        self._answer.cancel()  # nobody waits for one
        self._left = 0
        self._until_closed = False

    def ask(self, request: str, most: int) -> asyncio.Future[Answer]:
        """Send a request; the answer, or how it failed."""
        self._answer = self._loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._left = most
        self.free = False
        self._until_closed = False
        if self.closed.done():
            self._fail(ConnectionError("the connection was closed"))
        else:
            self._transport.write(request.encode("ascii"))
        return self._answer

    def abort(self) -> None:
        self.free = False
        self._transport.abort()

    def _fail(self, error: Exception) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)
        self.abort()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._answer.done():
            self.abort()
        elif self._left < 0:
            self._fail(UnreadableError("larger than allowed"))
        else:
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                self._fail(ConnectionError("not HTTP"))

    def connection_lost(self, error: Exception | None) -> None:
        if error is None and self._until_closed:
            self.on_message_complete()
        self._fail(ConnectionError("the connection was closed"))
        self.closed.set_result(None)

    # What the parser calls.

    def on_message_begin(self) -> None:
        self.free = False  # more than was asked for
        self._headers: dict[str, str] = {}
        self._body = bytearray()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._until_closed = not {"content-length", "transfer-encoding"} & self._headers.keys()

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 or self._answer.done():  # the answer is yet to come, or was given up
            return
        self._answer.set_result(Answer(status, self._headers, bytes(self._body)))
        self.free = self._parser.should_keep_alive()
        self.answered_at = self._loop.time()


def _verifying() -> ssl.SSLContext:
    import certifi  # noqa: PLC0415 - a loopback address needs none

    context = ssl.create_default_context(cafile=certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


def _lines(headers: Mapping[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def _unpacked(answer: Answer, most: int) -> bytes:
    if not answer.body or answer.headers.get("content-encoding", "").lower() != "gzip":
        return answer.body
    unpacker = zlib.decompressobj(_GZIP)
    try:
        body = unpacker.decompress(answer.body, most)
    except zlib.error:
        raise UnreadableError("not gzip") from None
    if not unpacker.eof:
        raise UnreadableError("larger than allowed, or cut")
    return body
