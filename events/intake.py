"""Reading the plan and result streams through a consumer group.

A delivery stays pending until the commit that decides it acknowledges it, so a crash in between delivers it
again. Deliveries are read in two steps, as the facts of redis ask: after a start or any error first what is
pending (id 0), then what is new (`>`); a lost reply would otherwise reorder plans silently.

What is new is read in one of two ways. Usually everything has been read and one blocking read waits for the next
entry. Where more may be there than one read gives, or nobody has read for a while, a script reads: it looks first
whether entries were trimmed that nobody had read, which can only have happened then, and it stops at a number of
bytes.

The server remembers how many entries it ever took and how many of them the group was given. What is missing is told
before anything behind it is read, and then the group is moved over the gap. A crash in between makes the next start
find the same gap, whose name (`Lost.marker`) says what is known of it already.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import redis.asyncio
import redis.exceptions

from events.store import StoreError, UnavailableError
from events.wire import Wire

FIELDS, NAME_BYTES, VALUE_BYTES, SHORT_BYTES = 257, 1_000, 70_000, 512
"""Kept of an entry: fields, of each name, of all longer values together, and up to what size a value is no longer one.
Each is more than an event keeps, so that the event can tell that something was cut."""
GROUP = "governor"
CONSUMER = "governor"
WAIT_MOST = 20
"""Entries a blocking read takes, and a look at pending ones: they may be large, and no server bounds them by size."""
PAGE_BYTES = 8_000_000
STEP = 10
LOOK_AFTER_S = 1.0
"""Without a read for this long, entries may have been trimmed unread."""
PENDING_EVERY_S = 5.0
PENDING_IDLE_S = 10.0
"""Pending for this long and not given to this process: somebody else's, who is gone."""
PENDING_PAGE = 1_000

_READ = (Path(__file__).parent / "intake.lua").read_text("utf-8")
# A group made at 0 reads from the first entry that is there; what was removed before that is nobody's loss.
_CREATE = """
local added, length = 0, 0
if redis.call('EXISTS', KEYS[1]) == 1 then
  local reply = redis.call('XINFO', 'STREAM', KEYS[1])
  for i = 1, #reply, 2 do
    if reply[i] == 'entries-added' then added = reply[i + 1] elseif reply[i] == 'length' then length = reply[i + 1] end
  end
end
local read = ARGV[2] == '0' and added - length or added
return redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], ARGV[2], 'MKSTREAM', 'ENTRIESREAD', read)
"""
_SKIP = """
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local at = {}
  for i = 1, #group, 2 do at[group[i]] = group[i + 1] end
  if at.name == ARGV[1] and at['last-delivered-id'] == ARGV[2] then
    return redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], ARGV[3], 'ENTRIESREAD', ARGV[4])
  end
end
return 'MOVED'
"""
_SCRIPTS = {"create": _CREATE, "read": _READ, "skip": _SKIP}
SHA = {name: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in _SCRIPTS.items()}
"""What each script is called on the server."""


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One stream entry as delivered."""

    stream: str
    entry_id: str
    fields: dict[str, str] | None
    """None: the entry was trimmed from the stream while it was pending."""


class Lost(NamedTuple):
    """Entries that were trimmed from a stream before anybody read them."""

    stream: str
    after: str
    """Id of the last entry the group was given before them."""
    missing: int
    """How many."""

    @property
    def marker(self) -> str:
        """What stands for them where entry ids are remembered: theirs are not known."""
        return f"{self.after}+{self.missing}"

    def untold(self, told: Iterable[str]) -> int:
        """How many of them are not among what was told.

        A gap is found again where it was told but not yet passed, and may have grown.

        Args:
            told: entry ids and markers.
        """
        start = f"{self.after}+"
        known = max((int(one[len(start) :]) for one in told if one.startswith(start)), default=0)
        return max(0, self.missing - known)


Take: TypeAlias = Callable[[list[Delivery]], None]


class Intake:
    """The consumer group `governor` on some streams, one consumer.

    Args:
        connection: its own client, since reads block.
        streams: stream name to the id its group is created at (`0`: from the beginning, `$`: from now on).
        on_lost: told of entries of a stream read from the beginning that were trimmed unread; may be set later.
            Nothing behind them is read before it returns. Told again after a crash, see `Lost.untold`.
        clock: seconds, for durations.
    """

    def __init__(
        self,
        connection: redis.asyncio.Redis,
        streams: dict[str, str],
        *,
        on_lost: Callable[[Lost], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_lost = on_lost
        self._redis = connection
        self._streams = streams
        self._clock = clock
        self._wire = Wire(connection, text=True) if Wire.takes(connection) else None
        """For the read that waits for plans."""
        self._begin()

    def _begin(self) -> None:
        self._pending = dict.fromkeys(self._streams, "0")
        self._drained = False
        self._behind = True
        """Whether there may be more than a blocking read gives."""
        self._read_at = self._pending_at = self._clock()
        self._given: dict[str, set[str]] = {stream: set() for stream in self._streams}
        """What was delivered since, as far as it was pending when that was last looked at."""

    async def open(self) -> None:
        """Create what is missing of streams and groups, and begin with what is pending.

        Raises:
            UnavailableError: no server.
        """
        for stream, start in self._streams.items():
            try:
                await self._evaluate("create", stream, GROUP, start)
            except redis.exceptions.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise StoreError(f"cannot create group {GROUP!r} on {stream}: {error}") from error
            except Exception as error:
                raise UnavailableError(f"{type(error).__name__}: {error}") from error
        self._begin()

    async def read(self, *, count: int, block_s: float, take: Take = lambda _deliveries: None) -> list[Delivery]:
        """The next deliveries in stream order: pending ones first, then new ones, waiting for those.

        Every few seconds, what is pending and was given to nobody who is still there comes in between.

        Args:
            count: at most this many of a stream; fewer where they are large.
            block_s: how long to wait for the first one.
            take: given what is returned, before anything else happens; usually with the bytes that bring it.

        Raises:
            UnavailableError: no server or no answer; call `open` and go on, what was in flight is pending.
            StoreError: the stream or its group is gone; `open` makes them again.
        """
        try:
            return await self._next(count, block_s, take)
        except StoreError:
            raise
        except redis.exceptions.ResponseError as error:
            raise StoreError(str(error)) from error
        except Exception as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge what needs no event.

        Raises:
            UnavailableError: no server; they will be delivered again, which is harmless.
        """
        try:
            for delivery in deliveries:
                await self._redis.xack(delivery.stream, GROUP, delivery.entry_id)
        except Exception as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error

    def _give(self, deliveries: list[Delivery], take: Take) -> list[Delivery]:
        for delivery in deliveries:
            self._given[delivery.stream].add(delivery.entry_id)
        take(deliveries)
        return deliveries

    async def _next(self, count: int, block_s: float, take: Take) -> list[Delivery]:
        while not self._drained:
            if deliveries := await self._read_pending(count):
                return self._give(deliveries, take)
        if self._clock() - self._pending_at >= PENDING_EVERY_S:
            if deliveries := await self._abandoned(min(count, WAIT_MOST)):
                return self._give(deliveries, take)
            self._pending_at = self._clock()
        if (self._behind or self._clock() - self._read_at >= LOOK_AFTER_S) and (
            deliveries := await self._catch_up(count)
        ):
            return self._give(deliveries, take)
        return await self._wait(min(count, WAIT_MOST), block_s, take)

    async def _read_pending(self, count: int) -> list[Delivery]:
        reply = await self._redis.xreadgroup(GROUP, CONSUMER, self._pending, count=min(count, WAIT_MOST))  # type: ignore[arg-type]
        deliveries = _deliveries(reply)
        for delivery in deliveries:
            self._pending[delivery.stream] = delivery.entry_id
        self._drained = not deliveries
        return deliveries

    async def _wait(self, count: int, block_s: float, take: Take) -> list[Delivery]:
        block = max(1, int(block_s * 1000))
        # Named in bytes, redis-py leaves the reply as it came.
        words: list[Any] = [b"XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", count, "BLOCK", block, "STREAMS"]
        words += [*self._streams, *[">"] * len(self._streams)]

        def arrived(reply: Any) -> list[Delivery]:
            deliveries = _deliveries(reply)
            self._read_at = self._clock()
            self._behind = len(deliveries) >= count
            return self._give(deliveries, take)

        if self._wire is None:
            execute: Callable[..., Any] = self._redis.execute_command
            return arrived(await execute(*words))
        found: list[Delivery] = await self._wire.ask(*words, then=arrived)
        return found

    async def _catch_up(self, count: int) -> list[Delivery]:
        """What is new, as far as one look goes, of every stream; the order of the streams is that of `streams`."""
        found: list[Delivery] = []
        for stream, start in self._streams.items():
            entries = await self._page(stream, count, look=start == "0" and self.on_lost is not None)
            found += _deliveries([(stream, entries)])
        self._read_at = self._clock()
        self._behind = bool(found)
        return found

    async def _page(self, stream: str, count: int, *, look: bool) -> list[Any]:
        while True:
            reply = await self._evaluate(
                "read", stream, GROUP, CONSUMER, int(look), count, PAGE_BYTES, min(STEP, count)
            )
            if _text(reply[0]) == "OK":
                entries: list[Any] = reply[1:]
                return entries
            after, first, last = map(_text, reply[1:4])
            if self.on_lost is not None:
                await self.on_lost(Lost(stream, after, int(reply[4])))
            # Not if somebody has read on meanwhile: that would deliver again what they were given.
            await self._evaluate("skip", stream, GROUP, after, _before(first) if first else last, int(reply[5]))

    async def _abandoned(self, count: int) -> list[Delivery]:
        """Pending entries that this process was never given and whose reader has had its time.

        They were given to a peer under the same name that is gone, or to a read whose answer nobody waited for.
        """
        found: list[Delivery] = []
        for stream, given in self._given.items():
            pending: set[str] = set()
            left: list[str] = []
            page, start = PENDING_PAGE, "-"
            while page == PENDING_PAGE:
                rows: Any = await self._redis.xpending_range(stream, GROUP, start, "+", PENDING_PAGE, CONSUMER)
                ids = [_text(row["message_id"]) for row in rows]
                pending.update(ids)
                left += [
                    entry_id
                    for entry_id, row in zip(ids, rows, strict=True)
                    if entry_id not in given and row["time_since_delivered"] >= PENDING_IDLE_S * 1000
                ]
                page, start = len(rows), f"({ids[-1]}" if ids else "-"
            given.intersection_update(pending)
            for entry_id in left[: count - len(found)]:
                at: Any = {stream: _before(entry_id)}
                reply = await self._redis.xreadgroup(GROUP, CONSUMER, at, count=1)
                # Another one where it was acknowledged meanwhile; that one's turn comes by itself.
                found += [delivery for delivery in _deliveries(reply) if delivery.entry_id == entry_id]
        return found

    async def _evaluate(self, script: str, stream: str, *arguments: str | int) -> Any:
        run: Any = self._redis
        with suppress(redis.exceptions.NoScriptError):
            return await run.evalsha(SHA[script], 1, stream, *arguments)
        return await run.eval(_SCRIPTS[script], 1, stream, *arguments)


def _before(entry_id: str) -> str:
    """The highest id below this one."""
    ms, _, sequence = entry_id.partition("-")
    return f"{ms}-{int(sequence) - 1}" if int(sequence) else f"{int(ms) - 1}-{2**64 - 1}"


def _deliveries(reply: Any) -> list[Delivery]:
    return [
        Delivery(_text(stream), _text(entry_id), _fields(fields))
        for stream, entries in reply or []
        for entry_id, fields in entries
    ]


def _fields(fields: Any) -> dict[str, str] | None:
    """Fields as text, cut behind what an event keeps, so that what waits stays bounded.

    Short values are all kept: whatever a decision uses is short, wherever it stands.
    """
    if not fields:
        return None
    told = type(fields) is list and type(fields[0]) is str
    if told and len(fields) <= 2 * FIELDS and len("".join(fields)) <= NAME_BYTES:
        return dict(zip(fields[::2], fields[1::2], strict=True))  # the usual case, told quickly: nothing is cut
    pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True)
    kept: dict[str, str] = {}
    room = VALUE_BYTES
    for name, value in islice(pairs, FIELDS):
        if len(value) > SHORT_BYTES:
            text = _text(value[:room])[:room]
            room -= len(text)
        else:
            text = _text(value)
        kept[_text(name[:NAME_BYTES])] = text
    return kept


def _text(raw: bytes | str) -> str:
    """Text for an event: bytes that are no UTF-8 stay readable and tell what they were."""
    return raw if isinstance(raw, str) else raw.decode(errors="backslashreplace")
