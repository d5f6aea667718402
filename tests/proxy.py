"""A TCP proxy in a thread of its own, for trouble between the daemon and Redis, or the daemon and the exchange.

    with Proxy(server.port) as proxy, daemon(home, port=proxy.port):
        lost = proxy.trip(b"EVALSHA", "after")
        publish(...)
        lost.wait()

Bytes pass as they are. A trip waits for the next piece of a request that contains a word, and then does what its
name says, to that connection alone. What is tripped on is counted per connection and across pieces, so a word that
is split by the network is found too.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

How = Literal["before", "half", "late", "after", "half_reply", "hold", "stall"]
"""What becomes of the request, and of its connection:

before      it never reaches the server; the connection ends
half        half of it reaches the server; the connection ends
late        the connection ends; it reaches the server when the trip is released
after       the server answers; the connection ends without the answer
half_reply  the first half of the first piece of the answer arrives; then the connection ends
hold        the server answers; the answer waits until the trip is released
stall       nothing more passes in either direction until the trip is released; the connection stays open
"""
T = TypeVar("T")
_PIECE = 1 << 18


class Trip:
    """One arranged trouble.

    Attributes:
        happened: how often it has.
    """

    def __init__(self, proxy: Proxy, word: bytes, how: How, times: int) -> None:
        self.word = word
        self.how = how
        self.left = times
        self.happened = 0
        self._proxy = proxy
        self._changed = asyncio.Event()
        self.released = asyncio.Event()
        self.sent = asyncio.Event()
        """A late request was answered by the server."""

    def wait(self, times: int = 1, *, within_s: float = 10.0) -> None:
        """Return when it has happened so often."""
        self._proxy.call(self._wait(times), within_s=within_s, what=f"{self.how} at {self.word!r}")

    def release(self) -> None:
        """Let what it holds go on; returns when a late request was answered."""
        self._proxy.call(self._release(), what=f"the release of {self.how}")

    def cancel(self) -> None:
        """Do not trip any more; what is held stays held."""
        self.left = 0

    def hit(self) -> None:
        self.left -= 1
        self.happened += 1
        self._changed.set()

    async def _wait(self, times: int) -> None:
        while self.happened < times:
            self._changed.clear()
            await self._changed.wait()

    async def _release(self) -> None:
        self.released.set()
        if self.how == "late" and self.happened:
            await self.sent.wait()


class Proxy:
    """Passes connections on to a port of 127.0.0.1, as long as the `with` block lasts.

    Args:
        upstream: the port; may be changed to lead new connections elsewhere.

    Attributes:
        port: its own.
        accepted: connections accepted so far.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.port = 0
        self.accepted = 0
        self._refusing = False
        self._trips: list[Trip] = []
        self._lines: set[_Line] = set()
        self._flowing: asyncio.Event
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        self.call(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def base_url(self) -> str:
        """Where it is, for HTTP."""
        return f"http://127.0.0.1:{self.port}"

    def trip(self, word: bytes, how: How, *, times: int = 1) -> Trip:
        """Arrange trouble for the next requests that contain `word`; what was arranged first comes first."""
        return self.call(self._arrange(word, how, times))

    def stall(self) -> None:
        """Let nothing pass on any connection, old or new, until `resume`. Connections stay open."""
        self._set(self._stall)

    def resume(self) -> None:
        """End `stall` and `refuse`."""
        self._set(self._resume)

    def drop(self) -> None:
        """End every connection there is."""
        self._set(self._drop)

    def refuse(self) -> None:
        """End every connection there is, and every new one at once, until `resume`."""
        self._refusing = True
        self.drop()

    @property
    def open(self) -> int:
        """Connections open now."""
        return len(self._lines)

    def call(self, work: Coroutine[Any, Any, T], *, within_s: float = 10.0, what: str = "it") -> T:
        """Run something in the proxy's thread."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(within_s)
        except FutureTimeoutError:
            future.cancel()
            raise AssertionError(f"{what} did not happen within {within_s} s") from None

    def _set(self, change: Callable[[], object]) -> None:
        async def run() -> None:
            change()

        self.call(run())

    def _drop(self) -> None:
        for line in self._lines:
            line.end()

    def _stall(self) -> None:
        self._flowing.clear()

    def _resume(self) -> None:
        self._refusing = False
        self._flowing.set()

    async def _arrange(self, word: bytes, how: How, times: int) -> Trip:
        trip = Trip(self, word, how, times)
        self._trips.append(trip)
        return trip

    async def _open(self) -> None:
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=256)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        await self._turn()  # what was being accepted becomes a line
        while self._lines:
            lines = list(self._lines)
            for line in lines:
                line.end()
            await asyncio.gather(*(line.task for line in lines if line.task is not None), return_exceptions=True)
        await self._server.wait_closed()
        await self._turn()  # what was aborted is closed

    async def _turn(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._refusing:
            writer.transport.abort()
            return
        line = _Line(self, reader, writer)
        line.task = asyncio.current_task()
        self._lines.add(line)
        try:
            await line.run()
        finally:
            self._lines.discard(line)

    def due(self, data: bytes) -> Trip | None:
        """The first trip that this part of a request meets."""
        return next((trip for trip in self._trips if trip.left > 0 and trip.word in data), None)

    async def flowing(self) -> None:
        await self._flowing.wait()


class _Line:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.task: asyncio.Task[None] | None = None
        self._proxy = proxy
        self._reader, self._writer = reader, writer
        self._trip: Trip | None = None
        """What the next answer meets."""
        self._answered = asyncio.Event()
        self._tail = b""

    async def run(self) -> None:
        try:
            there, upstream = await asyncio.open_connection("127.0.0.1", self._proxy.upstream)
        except BaseException as error:
            self._writer.transport.abort()
            if isinstance(error, OSError):
                return
            raise
        back = asyncio.create_task(self._answers(there))
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                await self._requests(upstream)
        finally:
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)
            self._writer.transport.abort()
            upstream.transport.abort()

    def end(self) -> None:
        if self.task is not None:
            self.task.cancel()

    async def _requests(self, upstream: asyncio.StreamWriter) -> None:
        while data := await self._reader.read(_PIECE):
            trip = self._proxy.due(self._tail + data)
            self._tail = b"" if trip is not None else (self._tail + data)[-64:]
            await self._proxy.flowing()
            if trip is None:
                upstream.write(data)
                await upstream.drain()
            elif not await self._tripped(trip, data, upstream):
                return

    async def _tripped(self, trip: Trip, data: bytes, upstream: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        if trip.how in ("before", "late"):
            trip.hit()
            self._writer.transport.abort()
            if trip.how == "late":
                self._trip = trip
                await trip.released.wait()
                await self._ask(data, upstream)
                trip.sent.set()
            return False
        if trip.how == "half":
            upstream.write(data[: len(data) // 2])
            await upstream.drain()
            trip.hit()
            return False
        if trip.how == "stall":
            self._trip = trip
            trip.hit()
            await trip.released.wait()
            self._trip = None
            upstream.write(data)
            return True
        self._trip = trip
        await self._ask(data, upstream)
        return trip.how == "hold"

    async def _ask(self, data: bytes, upstream: asyncio.StreamWriter) -> None:
        self._answered.clear()
        upstream.write(data)
        await self._answered.wait()

    async def _answers(self, there: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while data := await there.read(_PIECE):
                trip, self._trip = self._trip, None
                await self._proxy.flowing()
                match trip.how if trip is not None else None:
                    case "half_reply":
                        self._writer.write(data[: len(data) // 2])
                        await self._writer.drain()
                    case "hold" if trip is not None:
                        trip.hit()
                        self._answered.set()
                        await trip.released.wait()
                        self._writer.write(data)
                    case "stall" if trip is not None:
                        await trip.released.wait()
                        self._writer.write(data)
                    case None:
                        self._writer.write(data)
                if trip is not None and trip.how in ("after", "half_reply"):
                    trip.hit()
                self._answered.set()
                if trip is not None and trip.how in ("after", "half_reply", "late"):
                    return
        self._answered.set()
        if self._trip is None:
            self.end()
