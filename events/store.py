"""The event store: append at an expected head, read, follow.

The one promise everything else stands on: a commit is all or nothing, and it happens only if the stream still
ends where the caller thinks it ends. Two governors, or a governor and the command line, can therefore never both
grant a plan; whoever comes second gets a ConflictError, reads on, and decides again.

A reply that got lost leaves the outcome unknown. Nobody has to find out which it was: the caller reads the
stream, folds what is there and decides again from that; a late copy of the lost commit expects a head that is no
longer there, or makes the second attempt conflict. That is why the Redis client must never retry by itself, and
why every proposal is written so that proposing it twice says nothing new.

Errors:

    StoreError
     ├─ ConflictError        the head moved; nothing was written
     ├─ RequirementError     a key that should be there is gone, or the other way round; nothing was written
     ├─ HaltedError          the emergency brake is set and the commit grants permits; nothing was written
     ├─ LateError            it grants permits and came too late for that; nothing was written
     ├─ RefusedError         the server cannot write now (memory, replica, disk); nothing was written
     └─ UnavailableError     no server, or no answer: the outcome is unknown
         └─ UnsentError      no connection: nothing was sent
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol

import hiredis
import msgspec
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from events.chain import GENESIS
from events.codec import plain_fields
from events.types import Entry, Head
from events.wire import Wire, ends

_SCRIPT = (Path(__file__).parent / "commit.lua").read_text("utf-8")


_REFUSALS = (
    "NOREPLICAS", "MISCONF", "READONLY", "OOM ", "NOPERM", "ACL failure", "WRONGTYPE", "CLUSTERDOWN", "CROSSSLOT",
    "equal or smaller",
)  # fmt: skip
_REFUSED = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.NoPermissionError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.ClusterCrossSlotError,
)
"""The same where redis-py takes the code out of the text and makes a class of it."""


UNSENT = "connecting to"
"""What redis-py says where it could not connect, and only there."""


class StoreError(Exception):
    """Nothing was committed, or nobody knows; the subclass says which."""


class ConflictError(StoreError):
    """The stream does not end where the commit expected."""

    def __init__(self, expected: Head, actual: Head) -> None:
        super().__init__(f"expected the stream to end at event {expected.seq}, it ends at {actual.seq}")
        self.expected = expected
        self.actual = actual


class RequirementError(StoreError):
    """A key the commit depends on is not as required."""

    def __init__(self, index: int, key: str) -> None:
        super().__init__(f"{key} is not as this commit requires")
        self.index = index
        """Position in the commit's requirements."""
        self.key = key


class HaltedError(StoreError):
    """The emergency brake is set."""

    def __init__(self, value: str) -> None:
        super().__init__(f"the emergency brake is set: {value}")
        self.value = value


class LateError(StoreError):
    """The commit grants permits and reached the server after the time until which it may."""


class RefusedError(StoreError):
    """The server refused to write."""


class UnavailableError(StoreError):
    """No server, or no answer in time."""


class UnsentError(UnavailableError):
    """No connection could be made, so nothing was sent."""


class Require(msgspec.Struct, frozen=True, gc=False):
    """A key that has to be present, or absent, for the commit to happen."""

    key: str
    present: bool


class Write(msgspec.Struct, frozen=True, gc=False):
    """One key to set, delete, or replace by a list. `ttl_ms` 0 means that it stays."""

    op: str
    key: str
    values: tuple[bytes, ...] = ()
    ttl_ms: int = 0


class Ack(msgspec.Struct, frozen=True, gc=False):
    """A stream entry the group has dealt with."""

    stream: str
    group: str
    entry_id: str


class Commit(msgspec.Struct, frozen=True):
    """Everything that happens in one atomic step."""

    expected: Head
    entries: Sequence[Entry]
    requires: Sequence[Require] = ()
    writes: Sequence[Write] = ()
    acks: Sequence[Ack] = ()
    grants: bool = False
    """Whether it grants a permit, and so must be refused while the emergency brake is set."""
    not_after_us: int = 1 << 52
    """Server time, microseconds, after which it must not grant any more."""


class EventStore(Protocol):
    """What the rest of the program knows of a store."""

    def commit(self, commit: Commit) -> Coroutine[Any, Any, frozenset[str]]:
        """All of it or nothing. Raises one of StoreError, once it is awaited; it may be sent with the call.

        Returns:
            The keys it was to delete that were not there.
        """
        ...

    async def head(self) -> Head:
        """Where the stream ends now."""
        ...

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        """Entries after event number `after`, in order, at most `limit`."""
        ...

    async def follow(self, after: int, *, timeout_s: float) -> list[Entry]:
        """Like read, but waits up to `timeout_s` for the first one."""
        ...

    async def values(self, *keys: str) -> list[bytes | None]:
        """Values of string keys, None where there is none."""
        ...

    async def exists(self, key: str) -> bool:
        """Whether a key is there, of whatever type."""
        ...

    async def write(self, writes: Sequence[Write]) -> None:
        """Write public keys that need no event, such as one that somebody deleted."""
        ...

    async def clock(self) -> int:
        """The server's clock, microseconds since the epoch."""
        ...


FIELDS = 5
"""Of every entry; some carry more, see `events.codec.plain_fields`."""


def entry_of(fields: dict[bytes, bytes]) -> Entry:
    """The entry in a stream entry's fields.

    Raises:
        KeyError: a field is missing.
        ValueError: seq is no number, or text is not UTF-8.
    """
    return Entry(
        fields[b"event"].decode(),
        int(fields[b"seq"]),
        fields[b"timestamp"].decode(),
        fields[b"data"],
        fields[b"hash"].decode(),
    )


class Client(redis.asyncio.Redis):
    """redis-py's client without what it does around each command: retries, hooks, and a task for every write.

    Its connections, pools and parsers are as they were. A command that failed with anything but the server's own answer
    leaves its connection closed, and so does one a replica refuses.
    """

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """As in redis-py."""
        pool: Any = self.connection_pool
        connection = await pool.get_connection()
        try:
            await _send(connection, args)
            return await self.parse_response(connection, args[0], **options)
        except BaseException as error:
            if ends(error):
                if (writer := connection._writer) is not None:  # noqa: SLF001
                    writer.transport.abort()  # closed, it would still send what is left of a command that was given up
                await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)


async def _send(connection: Any, args: tuple[Any, ...]) -> None:
    name = args[0]
    words = (*name.split(), *args[1:]) if isinstance(name, str) else args
    writer = connection._writer  # noqa: SLF001 - the public way packs in Python and makes a task
    writer.write(hiredis.pack_command(words))
    if writer.transport.get_write_buffer_size():
        try:
            async with asyncio.timeout(connection.socket_timeout):
                await writer.drain()
        except TimeoutError:
            raise redis.exceptions.TimeoutError(f"nothing was taken within {connection.socket_timeout} s") from None


def client(**options: Any) -> Client:
    """A Redis client as this program needs it: RESP2, and never a retry of its own.

    redis-py's default repeats any command up to ten times after a lost reply, an append included.
    """
    return Client(protocol=2, retry=Retry(NoBackoff(), 0), health_check_interval=0, socket_connect_timeout=2, **options)


def _unavailable(error: Exception) -> StoreError:
    text = str(error)
    if isinstance(error, _REFUSED) or any(word in text for word in _REFUSALS):
        return RefusedError(text)
    if UNSENT in text and isinstance(error, redis.exceptions.ConnectionError | redis.exceptions.TimeoutError):
        return UnsentError(f"{type(error).__name__}: {text}")
    return UnavailableError(f"{type(error).__name__}: {text}")


class RedisStore:
    """Events on a Redis stream, entry ids `<seq>-0`."""

    def __init__(self, connection: redis.asyncio.Redis, *, stream: str, halt: str) -> None:
        self._execute: Callable[..., Any] = connection.execute_command
        self._stream = stream
        self._halt = halt
        self._sha: str | None = None
        self._wire = Wire(connection) if Wire.takes(connection) else None
        """For commits, one at a time, as the ledger makes them."""

    def commit(self, commit: Commit) -> Coroutine[Any, Any, frozenset[str]]:
        if not commit.entries and (commit.requires or commit.grants):
            raise ValueError("a commit without events has nothing to protect")
        words = self._pack(commit)
        wire = self._wire
        sent = wire.send("EVALSHA", self._sha, *words) if wire is not None and wire.up and self._sha else None
        return self._committed(commit, words, sent)

    async def _committed(
        self, commit: Commit, words: list[str | bytes | int], sent: asyncio.Future[Any] | None
    ) -> frozenset[str]:
        reply = await self._evaluate(words, sent)
        match reply[0]:
            case b"OK":
                return frozenset(commit.writes[int(index)].key for index in reply[1:])
            case b"LATE":
                raise LateError("the commit reached the server too late to grant a permit")
            case b"CONFLICT":
                raise ConflictError(commit.expected, _head_of(reply[1], reply[2]))
            case b"REQUIREMENT":
                index = int(reply[1])
                raise RequirementError(index, commit.requires[index].key)
            case _:
                raise HaltedError(reply[1].decode(errors="replace"))

    async def head(self) -> Head:
        last = await self._call("XREVRANGE", self._stream, "+", "-", "COUNT", 1)
        entries = _entries(last)
        return Head(entries[0].seq, entries[0].hash) if entries else GENESIS

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        # Named in bytes, redis-py leaves the reply as it came: making a dict of every entry takes a third of the time.
        reply = await self._call(b"XRANGE", self._stream, f"{after + 1}-0", "+", "COUNT", limit)
        return _entries(reply)

    async def follow(self, after: int, *, timeout_s: float) -> list[Entry]:
        block = max(1, int(timeout_s * 1000))
        reply = await self._call("XREAD", "COUNT", 1000, "BLOCK", block, "STREAMS", self._stream, f"{after}-0")
        return _entries(reply[0][1]) if reply else []

    async def values(self, *keys: str) -> list[bytes | None]:
        values: list[bytes | None] = await self._call("MGET", *keys) if keys else []
        return values

    async def write(self, writes: Sequence[Write]) -> None:
        for write in writes:
            ttl = ("PX", write.ttl_ms) if write.ttl_ms else ()
            if write.op == "set":
                await self._call("SET", write.key, write.values[0], *ttl)
            else:
                await self._call("DEL", write.key)
                if write.op == "list" and write.values:
                    await self._call("RPUSH", write.key, *write.values)
                    if write.ttl_ms:
                        await self._call("PEXPIRE", write.key, write.ttl_ms)

    async def exists(self, key: str) -> bool:
        return bool(await self._call("EXISTS", key))

    async def trim(self, before: int) -> int:
        """Remove the entries before event number `before`, for whoever keeps them elsewhere. Returns how many."""
        return int(await self._call("XTRIM", self._stream, "MINID", f"{before}-0"))

    async def clock(self) -> int:
        seconds, micros = await self._call("TIME")
        return int(seconds) * 1_000_000 + int(micros)

    def _pack(self, commit: Commit) -> list[str | bytes | int]:
        """Number of keys, keys and arguments, as commit.lua takes them."""
        acks: dict[tuple[str, str], list[str]] = {}
        for ack in commit.acks:
            acks.setdefault((ack.stream, ack.group), []).append(ack.entry_id)
        requires, writes = commit.requires, commit.writes
        words: list[str | bytes | int] = [2 + len(requires) + len(writes) + len(acks), self._stream, self._halt]
        words += [require.key for require in requires]
        words += [write.key for write in writes]
        words += [stream for stream, _ in acks]
        words += commit.expected
        words += (
            commit.not_after_us if commit.grants else 0,
            len(requires),
            len(commit.entries),
            len(writes),
            len(acks),
        )
        words += [int(require.present) for require in requires]
        for entry in commit.entries:
            words += (entry.name, entry.seq, entry.timestamp, entry.data, entry.hash)
            further = plain_fields(entry)
            words.append(2 * len(further))
            for pair in further:
                words += pair
        for write in writes:
            match write.op:
                case "set":
                    words += ("set", write.ttl_ms, write.values[0])
                case "del":
                    words.append("del")
                case _:
                    words += ("list", write.ttl_ms, len(write.values), *write.values)
        for (_, group), ids in acks.items():
            words += (group, len(ids), *ids)
        return words

    async def _evaluate(self, words: list[str | bytes | int], sent: asyncio.Future[Any] | None) -> list[bytes]:
        wire = self._wire
        execute = self._execute if wire is None else wire.ask
        for _ in range(3):
            if self._sha is None:
                self._sha = await self._call("SCRIPT LOAD", _SCRIPT)
            try:
                reply: list[bytes] = (
                    await wire.heard(sent)
                    if wire is not None and sent is not None
                    else await execute("EVALSHA", self._sha, *words)
                )
                return reply
            except redis.exceptions.NoScriptError:
                self._sha = sent = None  # a restart or a promotion emptied the script cache
            except Exception as error:
                raise _unavailable(error) from error
        raise UnavailableError("the server forgets the commit script as soon as it is loaded")

    async def _call(self, *command: Any) -> Any:
        try:
            return await self._execute(*command)
        except Exception as error:  # redis-py lets TypeError and AttributeError out of broken connections too
            raise _unavailable(error) from error


def _head_of(seq: bytes, digest: bytes) -> Head:
    try:
        return Head(int(seq), digest.decode())
    except ValueError as error:
        raise StoreError(f"the event stream ends with an entry that is no event: {error}") from error


def _entries(reply: Any) -> list[Entry]:
    entries = []
    for entry_id, fields in reply:
        try:
            match fields:
                # As a commit writes them: a pattern is the quickest way to see that.
                case [b"event", name, b"seq", seq, b"timestamp", timestamp, b"data", data, b"hash", digest]:
                    entry = Entry(name.decode(), int(seq), timestamp.decode(), data, digest.decode())
                case list():
                    entry = _entry_with_more(dict(zip(fields[::2], fields[1::2], strict=True)))
                case _:
                    entry = _entry_with_more(fields)
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise StoreError(f"entry {entry_id!r} of the event stream is no event: {error!r}") from error
        entries.append(entry)
    return entries


def _entry_with_more(fields: dict[bytes, bytes]) -> Entry:
    entry = entry_of(fields)
    if len(fields) > FIELDS:
        _hold_plain_fields(entry, fields)
    return entry


def _hold_plain_fields(entry: Entry, fields: dict[bytes, bytes]) -> None:
    """The hash does not cover what is repeated for readers with nothing but redis-cli: it has to say the same."""
    for name, value in plain_fields(entry):
        if fields.get(name.encode()) != value:
            raise ValueError(f"its field {name} is not what its data says")


class MemoryStore:
    """The same promises without a server, for tests, the simulation and dry evaluation.

    Args:
        now_ms: the server's clock, milliseconds; keys expire by it.
    """

    def __init__(self, now_ms: Any = lambda: 0, *, halt: str = "quantum:governor:halt") -> None:
        self._now_ms = now_ms
        self._halt = halt
        self.entries: list[Entry] = []
        self.acknowledged: set[Ack] = set()
        self._keys: dict[str, tuple[tuple[bytes, ...], int | None]] = {}
        self._grown = asyncio.Event()

    def get(self, key: str) -> tuple[bytes, ...] | None:
        """A key's value or list, or None when it is not there (any more)."""
        held = self._keys.get(key)
        if held is None or (held[1] is not None and held[1] <= self._now_ms()):
            self._keys.pop(key, None)
            return None
        return held[0]

    def take(self, key: str) -> bool:
        """Delete a key, as a client does that consumes a permit. True if it was there."""
        there = self.get(key) is not None
        self._keys.pop(key, None)
        return there

    async def commit(self, commit: Commit) -> frozenset[str]:
        if not commit.entries and (commit.requires or commit.grants):
            raise ValueError("a commit without events has nothing to protect")
        actual = await self.head()
        if actual != commit.expected:
            raise ConflictError(commit.expected, actual)
        for index, require in enumerate(commit.requires):
            if (self.get(require.key) is not None) != require.present:
                raise RequirementError(index, require.key)
        if commit.grants and await self.clock() > commit.not_after_us:
            raise LateError("the commit reached the server too late to grant a permit")
        if commit.grants and (brake := self.get(self._halt)) is not None:
            raise HaltedError(brake[0].decode(errors="replace"))
        self.entries += commit.entries
        gone = set()
        for write in commit.writes:
            if write.op == "del" and self.get(write.key) is None:
                gone.add(write.key)
            await self.write([write])
        self.acknowledged.update(commit.acks)
        if commit.entries:
            self._grown.set()
        return frozenset(gone)

    async def head(self) -> Head:
        return Head(self.entries[-1].seq, self.entries[-1].hash) if self.entries else GENESIS

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        first = self.entries[0].seq if self.entries else 1
        start = max(0, after + 1 - first)
        return self.entries[start : start + limit]

    async def follow(self, after: int, *, timeout_s: float) -> list[Entry]:
        if not await self.read(after, limit=1):
            self._grown.clear()
            try:
                await asyncio.wait_for(self._grown.wait(), timeout_s)
            except TimeoutError:
                return []
        return await self.read(after)

    async def values(self, *keys: str) -> list[bytes | None]:
        held = [self.get(key) for key in keys]
        return [value[0] if value else None for value in held]

    async def exists(self, key: str) -> bool:
        return self.get(key) is not None

    async def trim(self, before: int) -> int:
        """Remove the entries before event number `before`, for whoever keeps them elsewhere. Returns how many."""
        kept = [entry for entry in self.entries if entry.seq >= before]
        removed = len(self.entries) - len(kept)
        self.entries = kept
        return removed

    async def clock(self) -> int:
        return int(self._now_ms()) * 1000

    async def write(self, writes: Sequence[Write]) -> None:
        for write in writes:
            self._keys.pop(write.key, None)
            if write.op == "set" or (write.op == "list" and write.values):
                expires = self._now_ms() + write.ttl_ms if write.ttl_ms else None
                self._keys[write.key] = (write.values, expires)
