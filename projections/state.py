"""The fold: everything the events say, as one state.

Live, rebuild, replay and every reader fold with this `evolve` and no other. It knows no settings, no clock and no
policy: a mode event is a fact, and all time is the events' own. The state's time never steps back; an event whose
clock did is folded at the latest time seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from copy import copy
from decimal import Decimal
from typing import Any, assert_never

import msgspec

from events.chain import GENESIS
from events.decimals import ZERO
from events.keys import day_of
from events.types import (
    ApplyModeDrifted,
    ApplyModeRestored,
    AutoDisarm,
    Context,
    Decision,
    DisarmFailed,
    DisarmStarted,
    DriftEnded,
    ErrorRecorded,
    Execution,
    Head,
    HistoryAccepted,
    HistoryRestored,
    ManualDisarm,
    PermitConsumed,
    PermitExpired,
    PermitRevoked,
    PlanLost,
    PlanReceived,
    PlanRejected,
    Rearmed,
    Recorded,
    Recovered,
    SettingsLoaded,
    Throttled,
    UnpermittedExecution,
)
from projections import errors, totals, windows
from projections.permits import ENTRIES_KEPT, MEMORY_US, Plan, Reservation
from projections.table import Table
from projections.totals import Day

VERSION = 3
"""Of the state's shape: a checkpoint of another version is not read."""

ARMED, THROTTLED, DISARMED = "ARMED", "THROTTLED", "DISARMED"
_PRUNE_EVERY = 1024
NOTES_KEPT = 16
_CANONICAL = msgspec.json.Encoder(decimal_format="number", order="sorted")


class GapError(Exception):
    """An event does not continue the state it is folded into."""

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(f"event {actual} does not follow: expected event {expected}")
        self.expected = expected
        self.actual = actual


class Book(msgspec.Struct, frozen=True, gc=False):
    """What is counted for one symbol."""

    executions: tuple[int, ...] = ()
    """Times of the executions counted, ascending, microseconds."""
    stops: tuple[int, ...] = ()
    """The same for UPDATE_SL, which has windows of its own."""
    days: tuple[Day, ...] = ()


class Disarm(msgspec.Struct, frozen=True, gc=False):
    """The disarm of the present epoch."""

    at: int
    reason: str
    context: Context
    epoch: int
    manual: bool
    operator: str | None
    done: bool = False
    attempts: int = 0
    error: str | None = None
    notes: tuple[str, ...] = ()
    """What the proof leaves open."""
    backup: str | None = None
    """Copy of the Apply Layer's file as it was before."""


class Mode(msgspec.Struct, frozen=True, gc=False):
    """The state the gate is in, and why."""

    state: str = ARMED
    since: int = 0
    reason: str | None = None
    epoch: int = 1
    seq: int = 0
    """Event that brought it about."""
    causes: tuple[tuple[str | None, str], ...] = ()
    """Why it is throttled: symbol (None for all) and reason."""
    until: int | None = None
    """When a throttle ends if nothing new happens."""
    disarm: Disarm | None = None
    drift: str | None = None
    """Mode the Apply Layer's file was set to by hand since the disarm; None while it says dry run."""

    def throttles(self, symbol: str) -> bool:
        return any(where is None or where == symbol for where, _ in self.causes)


class Counts(msgspec.Struct, gc=False):
    """Totals over the whole stream; they add up: plans = allowed + blocked + skipped. Counted in place."""

    plans: int = 0
    allowed: int = 0
    blocked: int = 0
    skipped: int = 0
    rejected: int = 0
    lost: int = 0
    consumed: int = 0
    expired: int = 0
    revoked: int = 0
    executions: int = 0
    errors: int = 0
    disarms: int = 0


class State:
    """All projections at one event."""

    __slots__ = (
        "books", "counts", "days", "entries", "errors", "first_at", "forked", "hash", "hold_until", "mode", "noted",
        "permits", "plans", "results", "seq", "settings", "time",
    )  # fmt: skip

    def __init__(self) -> None:
        self.seq, self.hash = GENESIS
        self.time = 0
        """Latest event time, microseconds."""
        self.first_at: int | None = None
        """Time of the first event."""
        self.mode = Mode()
        self.settings: SettingsLoaded | None = None
        """The settings in force."""
        self.hold_until = 0
        """No permits before this time, after history was restored or accepted."""
        self.counts = Counts()
        self.days: tuple[Day, ...] = ()
        """Notional over all symbols."""
        self.errors: tuple[int, ...] = ()
        self.noted: tuple[int, ...] = ()
        """Notes of disarms by hand that became events: when they were written, the latest ones."""
        self.books: Table[str, Book] = Table()
        self.plans: Table[str, Plan] = Table()
        self.permits: Table[str, Reservation] = Table()
        """Outstanding ones."""
        self.entries: Table[str, int] = Table()
        """Plan entries that were dealt with, against redelivery."""
        self.results: Table[str, int] = Table()
        """The same for result entries."""
        self.forked = False

    @property
    def head(self) -> Head:
        """The event it is the state at."""
        return Head(self.seq, self.hash)

    def fork(self) -> State:
        """A state to try events on; this one stays as it is."""
        other = State.__new__(State)  # one by one, and nothing made in vain: every plan comes here
        other.seq, other.hash, other.time, other.first_at = self.seq, self.hash, self.time, self.first_at
        other.mode, other.settings, other.hold_until = self.mode, self.settings, self.hold_until
        other.days, other.errors, other.noted = self.days, self.errors, self.noted
        other.books, other.plans, other.permits = self.books.fork(), self.plans.fork(), self.permits.fork()
        other.entries, other.results = self.entries.fork(), self.results.fork()
        other.counts = copy(self.counts)
        other.forked = True
        return other

    def rebase(self, state: State) -> None:
        """Stand on another state that answers the same as the one it was forked from."""
        for name in ("books", "plans", "permits", "entries", "results"):
            getattr(self, name).rebase(getattr(state, name))

    def book(self, symbol: str) -> Book:
        """What is counted for a symbol."""
        return self.books.get(symbol) or _EMPTY

    def plan(self, plan_id: str, *, now: int = 0) -> Plan | None:
        """What is remembered of a plan, None when it is unknown or too long ago."""
        plan = self.plans.get(plan_id)
        return plan if plan is not None and _remembered(plan, max(now, self.time)) else None


_EMPTY = Book()


def _remembered(plan: Plan, now: int) -> bool:
    """A plan whose permit nobody saw the end of may still be executed, however old it is."""
    return plan.at > now - MEMORY_US or plan.permit == "outstanding"


def initial() -> State:
    """The state before the first event."""
    return State()


def evolve(state: State, recorded: Recorded) -> State:  # noqa: C901, PLR0912, PLR0915 - one case an event
    """Fold one event in. Changes and returns `state`; fork it first to keep it.

    Raises:
        GapError: the event is not the next one.
    """
    seq, at, event = recorded.seq, recorded.at, recorded.event
    if seq != state.seq + 1:
        raise GapError(state.seq + 1, seq)
    state.seq, state.hash = seq, recorded.hash
    if at > state.time:  # noqa: PLR1730 - `max` takes four times as long, and this runs for every event
        state.time = at
    time = state.time
    if state.first_at is None:
        state.first_at = time
    counts = state.counts
    match event:
        case PlanReceived():
            state.entries.renew(event.entry_id, time)
            counts.plans += 1
        case Decision():
            _decided(state, event)
        case Execution():
            state.results.renew(event.entry_id, time)
            if event.counted and (plan := state.plan(event.plan_id)) is not None and plan.reservation is not None:
                state.plans.set(event.plan_id, msgspec.structs.replace(plan, permit="consumed"))
                _reserve(state, msgspec.structs.replace(plan.reservation, at=time))
            counts.executions += 1
        case PermitConsumed():
            if state.permits.get(event.plan_id) is None and (plan := state.plan(event.plan_id)) is not None:
                # It was gone before the disarm that was to delete it: it had been consumed, not revoked.
                counts.revoked -= plan.permit == "revoked"
            _settle(state, event.plan_id, "consumed")
            counts.consumed += 1
        case PermitExpired():
            if (reservation := _settle(state, event.plan_id, "expired")) is not None:
                _release(state, reservation)
            counts.expired += 1
        case PermitRevoked():
            _settle(state, event.plan_id, "revoked")
            counts.revoked += 1
        case PlanRejected():
            state.entries.renew(event.entry_id, time)
            counts.rejected += 1
        case ErrorRecorded():
            state.errors = errors.add(state.errors, time)
            counts.errors += 1
        case Throttled():
            _throttled(state, event)
        case Recovered():
            state.mode = Mode(ARMED, time, None, state.mode.epoch, seq)
        case DisarmStarted():
            disarm = Disarm(time, event.reason, event.context, event.epoch, event.manual, event.operator)
            state.mode = Mode(DISARMED, time, event.reason, event.epoch, seq, disarm=disarm)
            if isinstance(noted := event.context.get("noted_us"), int):
                state.noted = (*state.noted[1 - NOTES_KEPT :], noted)
            counts.disarms += 1
        case AutoDisarm() | ManualDisarm():
            notes = tuple(str(note) for note in event.proof.get("notes", ()))
            backup = None if (made := event.proof.get("backup")) is None else str(made)
            _disarm_changed(state, event.epoch, done=True, error=None, notes=notes, backup=backup)
        case DisarmFailed():
            _disarm_changed(state, event.epoch, attempts=event.attempt, error=event.error)
        case Rearmed():
            state.mode = Mode(ARMED, time, event.reason, event.epoch, seq)
            state.errors = ()
        case ApplyModeDrifted():
            state.mode = msgspec.structs.replace(state.mode, drift=event.apply_mode)
        case DriftEnded():
            state.mode = msgspec.structs.replace(state.mode, drift=None)
        case SettingsLoaded():
            state.settings = event
            if state.mode.seq == 0:
                state.mode = msgspec.structs.replace(state.mode, since=time, seq=seq)
        case HistoryRestored() | HistoryAccepted():
            state.hold_until = max(state.hold_until, event.hold_until_us)
        case PlanLost():
            for entry_id in event.entry_ids:
                state.entries.renew(entry_id, time)
            counts.lost += event.count
        case UnpermittedExecution() | ApplyModeRestored():
            pass
        case _:
            assert_never(event)
    if seq % _PRUNE_EVERY == 0 and not state.forked:
        prune(state)
    return state


def fold(events: Iterable[Recorded], state: State | None = None) -> State:
    """Fold events into `state`, or from the beginning."""
    state = initial() if state is None else state
    for recorded in events:
        evolve(state, recorded)
    return state


def _decided(state: State, event: Decision) -> None:
    counts = state.counts
    if event.verdict == "SKIP":
        if state.plan(event.plan_id) is None:
            state.plans.renew(event.plan_id, Plan(state.time, event.symbol, event.entry_id, "SKIP"))
        counts.skipped += 1
        return
    if event.verdict == "BLOCK":
        state.plans.renew(event.plan_id, Plan(state.time, event.symbol, event.entry_id, "BLOCK"))
        counts.blocked += 1
        return
    reservation = Reservation(
        event.symbol,
        state.time,
        event.expires_us or state.time,
        event.computed_qty or ZERO,
        event.computed_notional or ZERO,
        event.action != "UPDATE_SL",
        event.epoch,
    )
    plan = Plan(state.time, event.symbol, event.entry_id, "EXECUTE", "outstanding", reservation)
    state.plans.renew(event.plan_id, plan)
    state.permits.renew(event.plan_id, reservation)
    _reserve(state, reservation)
    counts.allowed += 1


def _reserve(state: State, reservation: Reservation) -> None:
    book = state.book(reservation.symbol)
    if not reservation.moves:
        book = Book(book.executions, windows.add(book.stops, reservation.at), book.days)
    else:
        days = _count(state, book, reservation, reservation.notional, reservation.quantity)
        book = Book(windows.add(book.executions, reservation.at), book.stops, days)
    state.books.renew(reservation.symbol, book)


def _release(state: State, reservation: Reservation) -> None:
    book = state.book(reservation.symbol)
    if not reservation.moves:
        book = Book(book.executions, windows.remove(book.stops, reservation.at), book.days)
    else:
        days = _count(state, book, reservation, reservation.notional.copy_negate(), reservation.quantity.copy_negate())
        book = Book(windows.remove(book.executions, reservation.at), book.stops, days)
    state.books.set(reservation.symbol, book)


def _count(state: State, book: Book, reservation: Reservation, notional: Decimal, quantity: Decimal) -> tuple[Day, ...]:
    """Count on the day for all symbols; the symbol's own days with it."""
    day = day_of(reservation.at)
    state.days = totals.add(state.days, day, notional, ZERO)
    return totals.add(book.days, day, notional, quantity)


def _settle(state: State, plan_id: str, permit: str) -> Reservation | None:
    reservation = state.permits.pop(plan_id)
    # A plan_id that came again after it was forgotten is another plan, whatever its old permit comes to.
    if (plan := state.plans.get(plan_id)) is not None and plan.reservation is not None:
        settled = Plan(plan.at, plan.symbol, plan.entry_id, plan.verdict, permit, plan.reservation)
        state.plans.set(plan_id, settled)
    return reservation


def _throttled(state: State, event: Throttled) -> None:
    mode = state.mode
    cause = (event.symbol, event.reason)
    if mode.state == THROTTLED:
        state.mode = msgspec.structs.replace(mode, causes=(*mode.causes, cause), until=event.until_us)
    else:
        state.mode = Mode(
            THROTTLED, state.time, event.reason, mode.epoch, state.seq, causes=(cause,), until=event.until_us
        )


def _disarm_changed(state: State, epoch: int, **changes: Any) -> None:
    disarm = state.mode.disarm
    if disarm is not None and disarm.epoch == epoch:
        state.mode = msgspec.structs.replace(state.mode, disarm=msgspec.structs.replace(disarm, **changes))


def prune(state: State) -> None:
    """Forget what nothing can ask for any more. Never changes an answer, nor the digest."""
    time = state.time
    state.plans.drop_while(lambda plan: not _remembered(plan, time))
    state.books.drop_while(lambda book: _live(book, time) == _EMPTY)
    state.entries.keep(ENTRIES_KEPT)
    state.results.keep(ENTRIES_KEPT)


def _live(book: Book, time: int) -> Book:
    return Book(
        windows.live(book.executions, now=time),
        windows.live(book.stops, now=time),
        totals.live(book.days, day=day_of(time)),
    )


def digest(state: State) -> str:
    """SHA-256 over everything the state can still answer; equal states have equal digests, pruned or not."""
    time = state.time
    content = {
        "version": VERSION,
        "head": state.head,
        "time": time,
        "first_at": state.first_at,
        "mode": state.mode,
        "settings": state.settings,
        "hold_until": state.hold_until,
        "counts": state.counts,
        "days": totals.shown(totals.live(state.days, day=day_of(time))),
        "errors": errors.live(state.errors, now=time),
        "noted": state.noted,
        "books": {
            symbol: Book(live.executions, live.stops, totals.shown(live.days))
            for symbol, book in state.books.items()
            if (live := _live(book, time)) != _EMPTY
        },
        "plans": {plan_id: plan for plan_id, plan in state.plans.items() if _remembered(plan, time)},
        "permits": dict(state.permits.items()),
        "entries": list(state.entries.items())[-ENTRIES_KEPT:],
        "results": list(state.results.items())[-ENTRIES_KEPT:],
    }
    return hashlib.sha256(_CANONICAL.encode(content)).hexdigest()
