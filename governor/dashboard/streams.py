"""Server-sent events: one message for everybody, encoded once; who cannot keep up is cut off and comes again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.types import Receive, Scope, Send

CLIENTS = 100
"""More of them are refused."""
QUEUED = 64
"""Messages that wait for one client before it is cut off: some ten seconds of a busy account."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


def message(event: str, data: bytes, seq: int) -> bytes:
    """One event as it is sent; `data` is JSON on one line."""
    return b"event: %s\nid: %d\ndata: %s\n\n" % (event.encode(), seq, data)


class Client:
    """Somebody who watches.

    Args:
        abort: closes its connection at once, with whatever waits to be sent.
        logged_in: whether it may act, asked each time it is told.
    """

    def __init__(self, abort: Callable[[], None], logged_in: Callable[[], bool]) -> None:
        self._abort = abort
        self.logged_in = logged_in
        self.cut_off = False
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUED)

    def put(self, what: bytes) -> bool:
        """Queue a message. False, and the client is cut off, where it has not taken the ones before."""
        try:
            self._queue.put_nowait(what)
        except asyncio.QueueFull:
            self.cut_off = True
            self.end()
            self._abort()
            return False
        return True

    def end(self) -> None:
        """Nothing more comes."""
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    async def next(self) -> bytes | None:
        """The next message; None at the end."""
        return await self._queue.get()


class Hub:
    """Everybody who watches."""

    def __init__(self) -> None:
        self.clients: set[Client] = set()
        self.cut_off = 0
        """How many could not keep up."""
        self._closed = False

    @property
    def full(self) -> bool:
        return self._closed or len(self.clients) >= CLIENTS

    def send(self, what: Callable[[Client], bytes]) -> None:
        """Queue a message for everybody."""
        for client in list(self.clients):
            if not client.put(what(client)):
                self.clients.discard(client)
                self.cut_off += 1

    def close(self) -> None:
        """End every stream; whoever comes after that is refused."""
        self._closed = True
        for client in self.clients:
            client.end()

    async def serve(
        self, client: Client, first: Callable[[], bytes], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer one request until its client goes, is cut off, or the hub closes.

        Args:
            client: whom to tell.
            first: the first message, made when nothing can come in between.
            scope: ASGI's, as the two that follow.
            receive: tells when the client has gone.
            send: what goes out.
        """
        gone = asyncio.create_task(_gone(receive))
        gone.add_done_callback(lambda _task: client.end())
        client.put(b"retry: 1000\n" + first())
        self.clients.add(client)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            while scope["method"] != "HEAD" and (what := await client.next()) is not None:
                await send({"type": "http.response.body", "body": what, "more_body": True})
            if client.cut_off:
                await asyncio.sleep(0)  # until the server has noticed
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.clients.discard(client)
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
