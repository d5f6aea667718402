"""Follows the event stream with the ledger's own fold; reads, and never writes.

    feed = Feed(settings, client)
    task = asyncio.create_task(feed.run())
    feed.status(now)       # as `governor status --json`, from what was folded last

Everything else is told by `health`: Redis away, a history that does not hold, or one that is another than the one seen
before. In the last two cases it begins again from the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any

import redis.asyncio

from events import chain
from events.codec import decode
from events.keys import DAY_US
from events.reading import before, pages
from events.store import EventStore, RefusedError, UnavailableError
from events.types import Recorded
from governor.connection import ledger_on, now, stream_on
from governor.dashboard.day import Day
from governor.ledger import HistoryError, Ledger
from governor.logs import Logger
from governor.policy import Policy
from governor.settings import Settings
from governor.status import describe_live, policy_of
from projections import checkpoint
from projections.state import DISARMED, State

log = Logger("governor.dashboard")

LOOK_S = 0.1
"""How often the stream is asked for news."""
AGAIN_S = 0.5
"""How long it waits while Redis is away."""
ANEW_S = (0.2, 1.0, 5.0, 15.0)
"""How long it waits before it begins again from the stream; the last one from then on."""
EVENTS_READ = 100_000
"""At most so many events of the last day are read for rows and chart when it begins."""
ANCHOR_EVENTS = 5_000
"""So many events apart the state is kept as it was, to explain a plan from there and not from the first event."""
ANCHORS = 40
HALT = 2_000
"""Bytes of what the emergency brake is set to: everybody is told them all the time."""
PROOF_WITHIN = 5_000
"""The proof of a disarm that is older than a day is looked for in so many events after it."""


class Feed:
    """The state, and what is shown of the events.

    Args:
        settings: where the events are, and the policy where they tell none.
        client: a connection of its own.
    """

    def __init__(self, settings: Settings, client: redis.asyncio.Redis) -> None:
        self.settings = settings
        self.version = 0
        """Grows with everything new."""
        self.day = Day()
        self.halted: str | None = None
        self.latency_s: float | None = None
        self.read_at: float | None = None
        """When Redis last answered, unix seconds."""
        self.error: str | None = "the events are being read"
        """Why what is shown may not be how it is; None while it is."""
        self.reachable = False
        self.began_again: dict[str, Any] | None = None
        """When it last had to begin again from the stream, and why."""
        self._anchors: deque[tuple[int, bytes]] = deque(maxlen=ANCHORS)
        """The state at some events, as checkpoints; oldest first."""
        self._client = client
        self._ledger: Ledger | None = None
        self._rules: tuple[str | None, Policy] = (None, settings.policy)

    @property
    def state(self) -> State | None:
        """As folded last; None before anything was read."""
        return None if self._ledger is None else self._ledger.state

    async def run(self) -> None:
        """Follow until cancelled; nothing that goes wrong ends it."""
        opened: Ledger | None = None
        failures = 0
        while True:
            try:
                if opened is None:
                    opened = self._ledger = await self._open()
                    self.version += 1
                await self._look(opened)
                wait, failures = LOOK_S, 0
            except (UnavailableError, RefusedError) as error:
                self._trouble(error)
                wait = AGAIN_S
            except Exception as error:  # noqa: BLE001 - whatever it is, what is in the stream is what is to be shown
                if opened is not None:
                    self.began_again = {"at": now() / 1e6, "why": str(error)}
                opened = None
                self._trouble(error)
                wait = ANEW_S[min(failures, len(ANEW_S) - 1)]
                failures += 1
            await asyncio.sleep(wait)

    def _trouble(self, error: Exception) -> None:
        told = str(error) or type(error).__name__
        if self.error != told:
            log.warning("what is shown is not up to date", problem=told)
            self.version += 1
        self.error = told
        self.reachable = not isinstance(error, UnavailableError)
        if self.reachable:
            self.read_at = now() / 1e6

    async def _open(self) -> Ledger:
        """Fold everything up to now, then look at the last day's events once more, for rows and chart."""
        day = Day()
        ledger = ledger_on(
            self._client, self.settings, observe=lambda recorded, state: self._note(day, recorded, state)
        )
        await ledger.open()
        await _read_day(stream_on(self._client, self.settings), ledger, day)
        day.take()
        self._anchors.clear()
        if ledger.checkpoint_seq:
            (value,) = await ledger.store.values(ledger.keys.snapshot)
            with contextlib.suppress(checkpoint.CheckpointError):
                state = checkpoint.read(value or b"", key=ledger.audit_key)
                self._keep(state if state.seq < ledger.state.seq else ledger.state)
        self._keep(ledger.state)
        self.day = day
        return ledger

    def _note(self, day: Day, recorded: Recorded, state: State) -> None:
        day.note(recorded)
        self.version += 1
        if not state.seq % ANCHOR_EVENTS:
            self._keep(state)

    def _keep(self, state: State) -> None:
        self._anchors.append((state.seq, checkpoint.write(state)))

    def before(self, plan_id: str) -> State | None:
        """A state from before everything that is shown of a plan, to be folded on; None: only the first one is."""
        if plan_id in self.day.odd:
            return None
        first = min((seq for seq, row in self.day.plans.items() if row["plan_id"] == plan_id), default=0)
        # Its PLAN_RECEIVED stands right before its decision.
        found = next((value for seq, value in reversed(self._anchors) if seq < first - 1), None)
        state = None if found is None else checkpoint.read(found)
        return state if state is not None and state.plan(plan_id) is None else None

    async def _look(self, ledger: Ledger) -> None:
        began = time.perf_counter()
        await ledger.catch_up()
        (halt,) = await ledger.store.values(ledger.keys.halt)
        self.latency_s = (time.perf_counter() - began) / 2
        halted = None if halt is None else halt[:HALT].decode(errors="replace")
        if halted != self.halted or self.error is not None or not self.reachable:
            self.version += 1
        self.halted, self.error, self.reachable = halted, None, True
        self.read_at = now() / 1e6

    def status(self, at: int) -> dict[str, Any]:
        """What `governor status --json` tells at `at` (microseconds), and each symbol's last verdict as `last`."""
        state = self.state
        if state is None:
            return {"state": None, "since": None, "epoch": None, "symbols": {}, "permits": [], "halted": self.halted}
        told = describe_live(state, self._policy(state), at)
        for symbol, values in told["symbols"].items():
            values["last"] = self.day.last.get(symbol)
        return told | {"halted": self.halted}

    @property
    def credentials(self) -> bool:
        """Whether the governor asks the exchange: as the events have it, else as the settings here do."""
        state = self.state
        return self.settings.credentials if state is None else self._policy(state).credentials

    def _policy(self, state: State) -> Policy:
        digest = state.settings.digest if state.settings is not None else None
        if digest is None or digest != self._rules[0]:
            self._rules = (digest, policy_of(state, self.settings.policy))
        return self._rules[1]

    def health(self) -> dict[str, Any]:
        """Whether what is shown is how it is."""
        state = self.state
        return {
            "reachable": self.reachable,
            "trusted": self.error is None,
            "error": self.error,
            "read_at": self.read_at,
            "last_event_at": state.time / 1e6 if state is not None and state.seq else None,
            "began_again": self.began_again,
        }


async def _read_day(store: EventStore, ledger: Ledger, day: Day) -> None:
    """Tell `day` the last 24 hours' events up to where `ledger` is.

    Raises:
        HistoryError: they do not lead to where it is.
        StoreError: they cannot be read.
    """
    state = ledger.state
    end = state.head
    if state.mode.state == DISARMED and state.mode.disarm is not None:
        await _read_disarm(store, state.mode.seq, end.seq, day)
    since = await before(store, now() - DAY_US, first=max(0, end.seq - EVENTS_READ), last=end.seq)
    if since >= end.seq:
        return
    head = chain.GENESIS
    (first,) = await store.read(max(0, since - 1), limit=1) or (None,)
    if first is None or first.seq > end.seq:
        return
    if since or first.seq > 1:
        # It is not shown, but what follows is held against its hash: the one before it may be gone from the stream.
        head = first.head
    try:
        async with contextlib.aclosing(pages(store, head.seq)) as read:
            async for entries in read:
                mine = [entry for entry in entries if entry.seq <= end.seq]
                for entry in chain.verify(mine, after=head, key=ledger.audit_key):
                    day.note(decode(entry))
                    head = entry.head
                if head.seq >= end.seq:
                    break
    except (chain.ChainError, ValueError) as error:
        raise HistoryError(f"the event stream does not hold: {error}") from error
    if head != end:
        raise HistoryError(
            f"the last day's events lead to event {head.seq}, another than event {end.seq} that was seen"
        )


async def _read_disarm(store: EventStore, seq: int, end: int, day: Day) -> None:
    """The disarm that is in force, however long ago it began."""
    async with contextlib.aclosing(pages(store, seq - 1)) as read:
        async for entries in read:
            for entry in entries:
                if entry.seq <= end:
                    day.note_disarm(decode(entry))
            if (
                day.disarm is None
                or day.disarm.proven_at is not None
                or entries[-1].seq >= min(end, seq + PROOF_WITHIN)
            ):
                break
