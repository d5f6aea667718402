"""Given, when, then for the decider: a past, one step at its own time, and the events that follow.

    spec = Spec().given(loaded).after(MINUTE)
    assert names(spec.plan("p1")) == ["PLAN_RECEIVED", "DECISION"]

What a step returns is folded as a commit would fold it, so steps follow each other. Time moves only when told to.
"""

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any, Self, TypeVar

from events.types import Check, Decision, Event, Recorded
from governor import decider
from governor.gates import Situation
from governor.market import Market
from governor.plans import MalformedPlanError, parse_plan
from governor.policy import Policy
from governor.results import parse_result
from projections.state import State, evolve, initial

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
MIDNIGHT = 1_769_212_800 * SECOND
"""2026-01-24 00:00:00 UTC."""
NOON = MIDNIGHT + 12 * HOUR
TESTNET = Policy(credentials=True)
E = TypeVar("E", bound=Event)


def names(events: Iterable[Event]) -> list[str]:
    return [event.NAME for event in events]


def only(events: Iterable[Event], kind: type[E]) -> E:
    """The one event of that type."""
    (found,) = (event for event in events if isinstance(event, kind))
    return found


def decision(events: Iterable[Event]) -> Decision:
    return only(events, Decision)


def reason(events: Iterable[Event]) -> str | None:
    return decision(events).reason


def check(events: Iterable[Event], gate: str) -> Check:
    (found,) = (each for each in decision(events).checks if each.gate == gate)
    return found


def market(position: str | None = "0.020", price: str | None = "95033.33333333", **legs: str) -> Market:
    """One look at the exchange; None for what it did not tell."""
    amounts = legs or ({} if position is None else {"BOTH": position})
    return Market(
        legs={side: Decimal(amount) for side, amount in amounts.items()} if amounts else None,
        mark_price=None if price is None else Decimal(price),
        position_error=None if amounts else "timeout",
        price_error=None if price is not None else "timeout",
    )


def plan_fields(**changed: str | None) -> dict[str, str]:
    """A plan as the Apply Layer writes it; None leaves a field out."""
    usual = {"plan_id": "p1", "symbol": "BTCUSDT", "action": "PARTIAL_75", "decision": "EXECUTE", "kill_score": "0.1"}
    return {name: value for name, value in (usual | changed).items() if value is not None}


class Spec:
    """A gate with a past."""

    def __init__(self, policy: Policy = TESTNET, *, now: int = NOON) -> None:
        self.policy = policy
        self.now = now
        self.state: State = initial()
        self.apply_mode: str | None = "testnet"
        self.halt = False
        self.history = "whole"
        self.settings = "s"
        """Digest of the policy, as decisions record it."""
        self.asked = 0
        """How often the exchange was asked."""
        self._entries = 0

    @property
    def situation(self) -> Situation:
        return Situation(now=self.now, apply_mode=self.apply_mode, halt=self.halt, history=self.history)

    def given(self, *events: Event) -> Self:
        for event in events:
            evolve(self.state, Recorded(self.state.seq + 1, self.now, event, ""))
        return self

    def after(self, span: int) -> Self:
        self.now += span
        return self

    def at(self, time: int) -> Self:
        self.now = time
        return self

    def granted(self, *plan_ids: str, **changed: Any) -> Self:
        """Plans that were permitted just now."""
        for plan_id in plan_ids:
            assert decision(self.plan(plan_id, **changed)).verdict == "EXECUTE"
        return self

    def plan(
        self,
        plan_id: str | None = "p1",
        *,
        market: Market | Callable[[], Market] = market,
        age: int = 0,
        entry: str | None = None,
        **changed: str | None,
    ) -> Sequence[Event]:
        """One stream entry, decided as the daemon does: without the exchange first, with it where it is needed."""
        fields, entry = plan_fields(plan_id=plan_id, **changed), entry or self.entry(age=age)
        needs_qty = not self.policy.credentials
        try:
            plan = parse_plan(fields, entry_id=entry, now=self.now, needs_close_qty=needs_qty)
        except MalformedPlanError as problem:
            return self.fold(
                decider.reject(self.state, problem, self.policy, self.situation, fields=fields, entry_id=entry)
            )
        given = (self.state, plan)
        try:
            decided = decider.decide(*given, None, self.policy, self.situation, fields=fields, settings=self.settings)
        except decider.MarketNeededError:
            assert decider.must_ask(*given, self.policy, self.situation)
            self.asked += 1
            seen = market if isinstance(market, Market) else market()
            decided = decider.decide(*given, seen, self.policy, self.situation, fields=fields, settings=self.settings)
        else:
            assert not decider.must_ask(*given, self.policy, self.situation)
        return self.fold(decided.events)

    def result(self, plan_id: str = "p1", *, entry: str | None = None, **changed: str) -> Sequence[Event]:
        fields = {"plan_id": plan_id, "symbol": "BTCUSDT", "decision": "EXECUTE", "executed": "True"} | changed
        told = parse_result(fields, entry_id=entry or self.entry())
        return self.fold(decider.execution(self.state, told, self.policy, self.now, fields=fields))

    def take_back(self, plan_id: str = "p1", *, gone: bool = False) -> Sequence[Event]:
        return self.fold(decider.take_back(self.state, plan_id, gone=gone, now=self.now))

    def tick(self) -> Sequence[Event]:
        return self.fold(decider.tick(self.state, self.now))

    def tick_all(self) -> None:
        """What a daemon would have done by now: ends of permits, and of a throttle."""
        for plan_id, held in list(self.state.permits.items()):
            if held.expires_us <= self.now:
                self.take_back(plan_id, gone=True)
        self.tick()

    def disarm(self, why: str = "drill", operator: str = "anna") -> Sequence[Event]:
        return self.fold(decider.disarm_by_hand(self.state, reason=why, operator=operator, apply_mode=self.apply_mode))

    def rearm(self, why: str = "checked", operator: str = "anna", *, force: bool = False) -> Sequence[Event]:
        return self.fold(decider.rearm(self.state, reason=why, operator=operator, force=force, halt=self.halt))

    def look(self, apply_mode: str | None) -> Sequence[Event]:
        """The daemon looks at the Apply Layer's file."""
        return self.fold(decider.drift(self.state, apply_mode))

    def fold(self, events: Sequence[Event]) -> Sequence[Event]:
        self.given(*events)
        return events

    def entry(self, *, age: int = 0) -> str:
        """A new stream entry's id."""
        self._entries += 1
        return f"{(self.now - age) // 1000}-{self._entries}"
