"""One of the two worlds of a what-if audit: a state, and what is told about how it got there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from events.decimals import ZERO, total
from events.keys import DAY_US, day_of
from events.types import Decision, Event, Execution, PermitExpired, Recorded
from governor.outcome import Disarmed, Moved, Panel, Series
from governor.policy import Policy
from projections import totals
from projections.permits import Reservation
from projections.state import State, evolve, initial

STATES = ("ARMED", "THROTTLED", "DISARMED")
"""From harmless to not; where a picture has no room for both, the later one is shown."""
SECOND_US = 1_000_000
STRETCHES = 600
"""A series keeps this many stretches of time at most, and three points of each."""
PANELS = 4
"""Symbols with a series of their own in the outcome: those that moved most."""
SYMBOLS_KEPT = 100
"""Symbols of which a series is kept on the way there."""

Point: TypeAlias = tuple[int, float, float]
"""Time in microseconds, notional, quantity."""
P = TypeVar("P", bound=tuple[Any, ...])
"""A point in time: microseconds first."""


class Thinned(Generic[P]):
    """Points in time, a bounded number of them: of each stretch of time the lowest, the highest and the last stay.

    Stretches are equally long, and twice as long whenever there are too many, so no part of the past is told worse
    than another.
    """

    def __init__(self, size: Callable[[P], Any]) -> None:
        self._size = size
        self._width = SECOND_US
        self._stretches: list[tuple[int, list[P]]] = []

    def add(self, point: P) -> None:
        """One more; its time is not before the last one's."""
        self._put(point[0] // self._width, [point])
        while len(self._stretches) > STRETCHES:
            before, self._stretches = self._stretches, []
            self._width *= 2
            for at, points in before:
                self._put(at // 2, points)

    @property
    def points(self) -> list[P]:
        return [point for _, points in self._stretches for point in points]

    @property
    def last(self) -> P | None:
        return self._stretches[-1][1][-1] if self._stretches else None

    def _put(self, at: int, points: list[P]) -> None:
        if not self._stretches or self._stretches[-1][0] != at:
            self._stretches.append((at, points))
            return
        found = [*self._stretches[-1][1], *points]
        sizes = [self._size(point) for point in found]
        keep = {sizes.index(min(sizes)), sizes.index(max(sizes)), len(found) - 1}
        self._stretches[-1] = (at, [found[i] for i in sorted(keep)])


class Steps:
    """What is counted on the day, over time: it begins each UTC day at zero."""

    def __init__(self) -> None:
        self._thinned: Thinned[Point] = Thinned(lambda point: point[1:])

    def add(self, time: int, day: totals.Day) -> None:
        self._pass_midnight(time)
        self._thinned.add((time, float(day.notional), float(day.quantity)))

    def read(self, at: int, end: int) -> list[Point]:
        """From `at` to `end`, a midnight in between included."""
        self._pass_midnight(end)
        return [(at, 0.0, 0.0), *self._thinned.points]

    def _pass_midnight(self, time: int) -> None:
        last = self._thinned.last
        if last is not None and day_of(last[0]) < day_of(time) and (last[1] or last[2]):
            self._thinned.add(((day_of(last[0]) + 1) * DAY_US, 0.0, 0.0))


class World:
    """A state, and what is told about how it got there."""

    def __init__(self) -> None:
        self.state: State = initial()
        self.moved: dict[str, Moved] = {}
        self.micros: Counter[str] = Counter()
        self.disarms: list[Disarmed] = []
        self.all = Steps()
        self.symbols: dict[str, Steps] = {}
        self.states: Thinned[tuple[int, str]] = Thinned(lambda point: STATES.index(point[1]))

    def happen(self, events: Iterable[Event], at: int) -> None:
        """Events that nobody recorded."""
        for event in events:
            self.fold(Recorded(self.state.seq + 1, at, event, ""))

    def fold(self, recorded: Recorded) -> None:
        state, event = self.state, recorded.event
        before, since, counted = state.mode.state, state.time, _counted(state, event)
        evolve(state, recorded)
        if state.seq == 1:
            self.states.add((state.time, before))
        else:
            self.micros[before] += state.time - since
        if state.mode.state != before:
            self.states.add((state.time, state.mode.state))
        if counted is not None:
            self._moves(*counted)

    def reach(self, time: int) -> None:
        """Time passes up to `time` (microseconds) without an event."""
        if self.state.seq and time > self.state.time:
            self.micros[self.state.mode.state] += time - self.state.time
            self.state.time = time

    def _moves(self, symbol: str, one: int, notional: Decimal, quantity: Decimal) -> None:
        was = self.moved.get(symbol, Moved())
        self.moved[symbol] = Moved(
            executions=was.executions + one,
            notional=total(was.notional, notional),
            quantity=total(was.quantity, quantity),
        )
        time, day = self.state.time, day_of(self.state.time)
        self.all.add(time, totals.on(self.state.days, day))
        steps = self.symbols.get(symbol)
        if steps is None:
            if len(self.symbols) >= SYMBOLS_KEPT:
                return
            steps = self.symbols[symbol] = Steps()
        steps.add(time, totals.on(self.state.book(symbol).days, day))


def _counted(state: State, event: Event) -> tuple[str, int, Decimal, Decimal] | None:
    """What an event adds to what is moved, or takes away from it: symbol, executions, notional, quantity."""
    held: Reservation | None = None
    if isinstance(event, Decision):
        if event.verdict == "EXECUTE" and event.action != "UPDATE_SL":
            return event.symbol, 1, event.computed_notional or ZERO, event.computed_qty or ZERO
    elif isinstance(event, PermitExpired):
        held = state.permits.get(event.plan_id)
        if held is not None and held.moves:
            return held.symbol, -1, held.notional.copy_negate(), held.quantity.copy_negate()
    elif isinstance(event, Execution) and event.counted:
        plan = state.plan(event.plan_id)
        held = plan.reservation if plan is not None else None
        if held is not None and held.moves:
            return held.symbol, 1, held.notional, held.quantity
    return None


class Rules(NamedTuple):
    """The settings in force from a time on (microseconds)."""

    at: int
    recorded: Policy
    computed: Policy


def series(record: World, other: World, rules: Sequence[Rules], end: int) -> Series:
    """Both worlds over time, up to `end` (microseconds), with the limits that were in force."""
    start = record.state.first_at or end

    def size(symbol: str) -> tuple[Decimal, Decimal, str]:
        both = [world.moved.get(symbol, Moved()) for world in (record, other)]
        return -max(each.notional for each in both), -max(each.quantity for each in both), symbol

    symbols = sorted(record.symbols.keys() | other.symbols.keys(), key=size)[:PANELS]
    none = Steps()
    panels = [_panel(None, record.all.read(start, end), other.all.read(start, end), rules)]
    panels += [
        _panel(
            symbol,
            record.symbols.get(symbol, none).read(start, end),
            other.symbols.get(symbol, none).read(start, end),
            rules,
        )
        for symbol in symbols
    ]
    return Series(
        start=start / 1e6,
        end=end / 1e6,
        panels=tuple(panels),
        recorded_states=_states(record),
        computed_states=_states(other),
    )


def _states(world: World) -> tuple[tuple[float, str], ...]:
    points = world.states.points
    return tuple((at / 1e6, name) for i, (at, name) in enumerate(points) if i == 0 or name != points[i - 1][1])


def _panel(symbol: str | None, was: Sequence[Point], now: Sequence[Point], rules: Sequence[Rules]) -> Panel:
    points = (*was, *now)
    # A symbol that was never priced moved no notional; its quantity tells the story.
    priced = symbol is None or any(point[1] for point in points) or not any(point[2] for point in points)
    which = 1 if priced else 2

    def limit(policy: Policy) -> float | None:
        if symbol is None:
            found = policy.total_notional_per_day
        else:
            limits = policy.of(symbol)
            found = limits.notional_per_day if priced else limits.qty_per_day
        return None if found is None else float(found)

    return Panel(
        symbol=symbol,
        unit="USD" if priced else "base units",
        recorded=tuple((point[0] / 1e6, point[which]) for point in was),
        computed=tuple((point[0] / 1e6, point[which]) for point in now),
        recorded_limit=tuple((each.at / 1e6, limit(each.recorded)) for each in rules),
        computed_limit=tuple((each.at / 1e6, limit(each.computed)) for each in rules),
    )
