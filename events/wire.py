"""A connection of redis-py's with nothing in between: for the two commands every plan waits for.

redis-py finds the server, connects, and says who we are; then the connection is taken from its pool and read and
written here: a command goes out with the call, and its answer is there with the bytes that bring it. Only plain
connections are taken: what leads to a Sentinel's primary or a cluster's node looks at answers itself.

Nothing is ever sent twice. A command that is given up, or that has no answer in time, aborts the connection, so that
nothing of it is sent any more and no answer is taken for another's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import hiredis
import redis.asyncio
import redis.exceptions
from redis._parsers.base import BaseParser
from redis.asyncio.connection import Connection, SSLConnection

Then: TypeAlias = Callable[[Any], Any]


def ends(error: BaseException) -> bool:
    """Whether a connection is of no use after this: a replica's, too, for its name may lead to the primary by now."""
    return not isinstance(error, redis.exceptions.ResponseError) or isinstance(error, redis.exceptions.ReadOnlyError)


class Wire(asyncio.Protocol):
    """One connection of a client, connected when it is first asked and whenever it was lost.

    Args:
        client: as `events.store.client` makes it, or any other: then there is no wire, see `takes`.
        text: whether answers are text, bytes that are no UTF-8 told by their numbers.
    """

    def __init__(self, client: redis.asyncio.Redis, *, text: bool = False) -> None:
        self._pool: Any = client.connection_pool
        self._decoding: dict[str, str] = {"encoding": "utf-8", "errors": "backslashreplace"} if text else {}
        self._connection: Any = None
        self._transport: Any = None
        self._streams: Any = None
        """redis-py's own protocol, which has to hear of the end."""
        self._connecting = asyncio.Lock()
        self._loop: Any = None
        self._asked: deque[tuple[asyncio.Future[Any], Then | None]] = deque()
        self._within_s: float | None = None
        """How long the server may be silent while something is asked."""
        self._silent_since = 0.0
        self._watch: asyncio.TimerHandle | None = None

    @staticmethod
    def takes(client: object) -> bool:
        """Whether the client's connections can be taken."""
        pool = getattr(client, "connection_pool", None)
        return getattr(pool, "connection_class", None) in (Connection, SSLConnection)

    @property
    def up(self) -> bool:
        """Whether `send` can be called now."""
        return self._transport is not None

    async def connect(self) -> None:
        """Be up.

        Raises:
            redis.exceptions.RedisError, OSError: as redis-py where it cannot connect.
        """
        async with self._connecting:
            if self.up:
                return
            await self._let_go()
            self._loop = asyncio.get_running_loop()
            self._connection = connection = await self._pool.get_connection()
            self._within_s = connection.socket_timeout
            self._transport = transport = connection._writer.transport  # noqa: SLF001 - the way past its streams
            self._streams = transport.get_protocol()
            self._parser = hiredis.Reader(
                protocolError=redis.exceptions.InvalidResponse, replyError=BaseParser.parse_error, **self._decoding
            )
            transport.set_protocol(self)

    def send(self, *words: Any, then: Then | None = None) -> asyncio.Future[Any]:
        """Send a command; it must be up. The answer, for `heard`, raises what the server says is wrong and the like."""
        command = hiredis.pack_command(words)
        answer: asyncio.Future[Any] = self._loop.create_future()
        if not self._asked:
            self._silent_since = self._loop.time()
        self._asked.append((answer, then))
        self._transport.write(command)
        if self._watch is None and self._within_s is not None:
            self._watch = self._loop.call_later(self._within_s, self._look)
        return answer

    async def heard(self, answer: asyncio.Future[Any]) -> Any:
        """Wait for an answer. Whoever stops waiting gives the command up, and the connection with it."""
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.cancelled():
                self._abort(redis.exceptions.ConnectionError("a command before it was given up"))
            raise

    async def ask(self, *words: Any, then: Then | None = None) -> Any:
        """Send a command, connecting first if need be, and wait for its answer.

        Args:
            words: the command.
            then: makes the answer of what the server says, with the bytes that bring it: before any task hears of it.
        """
        if not self.up:
            await self.connect()
        return await self.heard(self.send(*words, then=then))

    # -- what asyncio tells

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not False:
                self._answered(reply)
        except Exception as error:  # noqa: BLE001 - not what a server says
            self._abort(error)

    def connection_lost(self, error: Exception | None) -> None:
        self._streams.connection_lost(error)
        self._abort(error or redis.exceptions.ConnectionError("Connection closed by server."))

    def eof_received(self) -> None:
        """Closed by asyncio then."""

    def pause_writing(self) -> None:
        """What waits to be sent is bounded by what is asked."""

    def resume_writing(self) -> None:
        """As above."""

    # -- answers

    def _answered(self, reply: Any) -> None:
        answer, then = self._asked.popleft()
        if answer.cancelled():
            return  # given up: whoever waited is about to abort the connection
        if isinstance(reply, Exception):
            answer.set_exception(reply)
        elif then is None:
            answer.set_result(reply)
        else:
            try:
                answer.set_result(then(reply))
            except Exception as error:  # noqa: BLE001 - whose it is hears of it
                answer.set_exception(error)
        self._silent_since = self._loop.time()
        if isinstance(reply, Exception) and ends(reply):
            self._abort(reply)

    def _look(self) -> None:
        """Whether the server is silent for too long. One timer for many commands: most are answered at once."""
        self._watch = None
        if not self._asked or self._within_s is None:
            return
        left_s = self._silent_since + self._within_s - self._loop.time()
        if left_s > 0:
            self._watch = self._loop.call_later(left_s, self._look)
        else:
            self._abort(redis.exceptions.TimeoutError("Timeout reading from the server"))

    def _abort(self, why: Exception) -> None:
        """Nobody knows what became of what was asked."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        asked, self._asked = self._asked, deque()
        for answer, _ in asked:
            if not answer.done():
                answer.set_exception(why)

    async def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)
            await self._pool.release(connection)
