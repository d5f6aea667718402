"""The last 24 hours in steps of five minutes: verdicts, errors, notional, state and latency."""

from __future__ import annotations

from collections import OrderedDict
from decimal import Decimal
from statistics import median_low
from typing import Any

from events.decimals import ZERO, total
from events.keys import DAY_US, day_of
from events.types import (
    Decision,
    DisarmStarted,
    ErrorRecorded,
    Event,
    Execution,
    PermitExpired,
    PlanRejected,
    Rearmed,
    Recorded,
    Recovered,
    Throttled,
)
from projections import totals
from projections.state import ARMED, DISARMED, THROTTLED, State

STEP_US = 300_000_000
STEPS = DAY_US // STEP_US
SAMPLES = 512
"""Latencies kept of a step; of more every second one is left out, then every fourth, and so on."""
GRANTS_KEPT = 20_000
"""Plans whose notional is remembered, for the permits that expire."""
_WORST = (ARMED, THROTTLED, DISARMED)


class _Step:
    __slots__ = ("allowed", "blocked", "counted", "errors", "latest_mode", "modes", "rejected", "samples", "skipped",
                 "slowest", "stride", "timed")  # fmt: skip

    def __init__(self) -> None:
        self.allowed = self.blocked = self.skipped = self.rejected = self.errors = 0
        self.counted: dict[int, Decimal] = {}
        """USD that came to, or went from, each day's total."""
        self.modes: set[str] = set()
        self.latest_mode: str | None = None
        self.samples: list[int] = []
        self.stride, self.timed, self.slowest = 1, 0, None

    slowest: int | None

    def time(self, micros: int) -> None:
        """Take in a latency."""
        self.slowest = micros if self.slowest is None else max(self.slowest, micros)
        if self.timed % self.stride == 0:
            self.samples.append(micros)
            if len(self.samples) > SAMPLES:
                self.samples = self.samples[::2]
                self.stride *= 2
        self.timed += 1


class Chart:
    """Counts what it is told of, newest step last; what is older than a day is forgotten."""

    def __init__(self) -> None:
        self._steps: dict[int, _Step] = {}
        self._first_mode: str | None = None
        self._time = 0
        self._granted: OrderedDict[str, tuple[int, Decimal]] = OrderedDict()

    def note(self, recorded: Recorded, *, latency_us: int | None) -> None:
        """The next event, and how long its plan waited for it where it is a decision."""
        event = recorded.event
        at = self._time = max(self._time, recorded.at)  # clocks step back; the state's time does not either
        step = self._step(at // STEP_US)
        match event:
            case Decision(verdict="EXECUTE"):
                step.allowed += 1
                self._grant(step, event, day_of(at))
            case Decision(verdict="BLOCK"):
                step.blocked += 1
            case Decision():
                step.skipped += 1
            case PlanRejected():
                step.rejected += 1
            case ErrorRecorded():
                step.errors += 1
            case PermitExpired() | Execution(counted=True):
                day, amount = self._granted.get(event.plan_id, (0, ZERO))
                expired = isinstance(event, PermitExpired)
                _count(step, day if expired else day_of(at), amount.copy_negate() if expired else amount)
            case _:
                pass
        if latency_us is not None:
            step.time(latency_us)
        self._note_mode(step, event)

    def _step(self, number: int) -> _Step:
        step = self._steps.get(number)
        if step is None:
            step = self._steps[number] = _Step()
            for old in [each for each in self._steps if each <= number - STEPS]:
                del self._steps[old]
        return step

    def _grant(self, step: _Step, event: Decision, day: int) -> None:
        if event.action == "UPDATE_SL" or event.computed_notional is None:
            return
        self._granted[event.plan_id] = (day, event.computed_notional)
        if len(self._granted) > GRANTS_KEPT:
            self._granted.popitem(last=False)
        _count(step, day, event.computed_notional)

    def _note_mode(self, step: _Step, event: Event) -> None:
        before, after = _modes(event)
        if self._first_mode is None:
            self._first_mode = before
        for mode in (before, after):
            if mode is not None:
                step.modes.add(mode)
                step.latest_mode = mode

    def told(self, state: State, now: int) -> dict[str, Any]:
        """The whole chart as plain JSON values; times are unix seconds, latencies milliseconds."""
        last = now // STEP_US
        numbers = range(last - STEPS + 1, last + 1)
        steps = [self._steps.get(number, _NOTHING) for number in numbers]
        return {
            "from": numbers[0] * STEP_US / 1e6,
            "to": now / 1e6,
            "step_s": STEP_US // 1_000_000,
            "t": [number * STEP_US / 1e6 for number in numbers],
            **{name: [getattr(step, name) for step in steps] for name in _COUNTS},
            "notional": self._notional(numbers, state),
            "state": self._states(numbers, state),
            "latency_ms": [median_low(step.samples) / 1e3 if step.samples else None for step in steps],
            "latency_max_ms": [None if step.slowest is None else step.slowest / 1e3 for step in steps],
        }

    def _notional(self, numbers: range, state: State) -> list[Decimal]:
        """USD counted since midnight at the end of each step: backwards from the totals that the state has."""
        known = {day: totals.on(state.days, day).notional for day in {day_of(n * STEP_US) for n in numbers}}
        found = []
        for number in reversed(numbers):
            found.append(max(ZERO, known[day_of(number * STEP_US)]))
            for day, amount in self._steps.get(number, _NOTHING).counted.items():
                if day in known:
                    known[day] = total(known[day], amount.copy_negate())
        return found[::-1]

    def _states(self, numbers: range, state: State) -> list[str | None]:
        """The worst state in each step; None before the first event there is."""
        mode = self._first_mode or state.mode.state
        begins = None if state.first_at is None else state.first_at // STEP_US
        found: list[str | None] = []
        for number in numbers:
            step = self._steps.get(number, _NOTHING)
            worst = max({mode, *step.modes}, key=_WORST.index)
            found.append(worst if begins is not None and number >= begins else None)
            mode = step.latest_mode or mode
        return found


_COUNTS = ("allowed", "blocked", "skipped", "rejected", "errors")
_NOTHING = _Step()


def _count(step: _Step, day: int, amount: Decimal) -> None:
    step.counted[day] = total(step.counted.get(day, ZERO), amount)


def _modes(event: Event) -> tuple[str | None, str | None]:
    """The state before and after an event, where it tells."""
    match event:
        case Decision():
            return event.mode, None
        case Throttled():
            return None, THROTTLED
        case Recovered():
            return THROTTLED, ARMED
        case DisarmStarted():
            return None, DISARMED
        case Rearmed():
            return DISARMED, ARMED
        case _:
            return None, None
