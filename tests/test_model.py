"""The real decider against the executable model of the contract: they have to agree after every input."""

import json
from decimal import Decimal
from itertools import chain, product
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from events.types import AutoDisarm, Decision, DisarmStarted, ErrorRecorded, Event
from governor import decider
from governor.market import Market
from governor.policy import Limits, Policy
from tests.model import DAY, FIVE_MINUTES, HOUR, MEMORY, Answer, Asked, Model
from tests.spec import MIDNIGHT, MINUTE, NOON, SECOND, Spec
from tests.test_properties import ACTIONS, POLICIES, SYMBOLS

LIMITS = [
    *POLICIES,
    Policy(
        credentials=True,
        limits=Limits(per_hour=5, per_5min=5, notional_per_day=Decimal(600)),
        by_symbol={
            "ETHUSDT": Limits(notional_per_day=Decimal(0), qty_per_day=Decimal(0)),
            "DOGEUSDT": Limits(per_5min=0),
        },
        total_notional_per_day=Decimal(750),
        disarm_on_errors=0,
        throttle_per_5min=0,
    ),
    Policy(
        limits=Limits(per_hour=None, per_5min=None, qty_per_day=Decimal("0.025")),
        auto_disarm=False,
        disarm_on_errors=3,
        error_window_us=10 * MINUTE,
        throttle_cooldown_us=HOUR,
        max_plan_age_us=5 * SECOND,
        kill_score_critical=Decimal("0.5"),
    ),
    Policy(
        credentials=True,
        limits=Limits(per_hour=None, per_5min=None, notional_per_day=None),
        total_notional_per_day=Decimal(1100),
        max_plan_age_us=None,
        kill_score_critical=None,
    ),
]
WINDOWS = [FIVE_MINUTES, HOUR, 10 * MINUTE, MINUTE, 10 * SECOND, DAY, MEMORY]


class Moment(NamedTuple):
    """When the next input comes: so long after an earlier one, or at a midnight, give or take a microsecond."""

    back: int
    span: int
    off: int
    midnight: bool


class Pair:
    """The decider and the model, given the same."""

    def __init__(self, policy: Policy, start: int) -> None:
        self.spec = Spec(policy, now=start)
        self.model = Model(policy)
        self.moments = [start]
        self.plans: list[Asked] = []
        self.permits: list[str] = []
        self.results: list[str] = []
        self.disarms: list[str] = []
        self.errors = 0

    def go(self, moment: Moment) -> None:
        start = self.moments[-1 - moment.back % len(self.moments)]
        at = (self.spec.now // DAY + 1) * DAY if moment.midnight else start + moment.span
        self.spec.now = at + moment.off
        self.moments = [*self.moments, self.spec.now][-12:]
        for plan_id, held in list(self.spec.state.permits.items()):
            if self.spec.now - held.expires_us > DAY - HOUR:  # a daemon that was away looks after its permits first
                self.model.take_back(self.spec.now, plan_id, gone=True)
                self.spec.take_back(plan_id, gone=True)

    def agree(self, events: tuple[Event, ...] | list[Event] = ()) -> None:
        """Compare everything that can be seen from outside."""
        self.disarms += [event.reason for event in events if isinstance(event, DisarmStarted)]
        self.errors += sum(isinstance(event, ErrorRecorded) for event in events)
        state, now = self.spec.state, self.spec.now
        mode = state.mode
        over = bool(decider.tick(state, now))
        seen = ("ARMED", mode.epoch, []) if over else (mode.state, mode.epoch, list(mode.causes))
        assert seen == self.model.view(now)
        assert self.disarms == self.model.disarms
        assert self.errors == len(self.model.errors)
        for plan_id in {plan.plan_id for plan in self.plans}:
            found, fate = state.plan(plan_id, now=now), self.model.known(plan_id, now)
            assert (found and found.permit) == (fate and fate.permit)

    def plan_id(self, back: int) -> str:
        """One that was permitted, one that was seen, or one that never was."""
        known = self.permits if back % 4 else [plan.plan_id for plan in self.plans]
        return known[-1 - back // 4] if back // 4 < len(known) else f"x{back}"

    def plan(self, asked: Asked, *, age: int = 0, again: int | None = None, same_entry: bool = False) -> None:
        spec = self.spec
        if again is not None and again < len(self.plans):
            old = self.plans[-1 - again]
            asked = old if same_entry else asked._replace(plan_id=old.plan_id)
        else:
            asked, same_entry = asked._replace(plan_id=f"p{len(self.plans)}"), False
        if not same_entry:
            entry = spec.entry(age=age)
            asked = asked._replace(entry=entry, written=int(entry.split("-")[0]) * 1000)
        self.plans.append(asked)
        spec.apply_mode, spec.halt, spec.history = asked.apply_mode, asked.halt, asked.history
        events = spec.plan(
            asked.plan_id,
            market=Market(legs=asked.legs, mark_price=asked.price),
            entry=asked.entry,
            symbol=asked.symbol,
            action=asked.action,
            decision=asked.decision,
            kill_score=str(asked.kill_score),
            close_qty=str(asked.close_qty),
            position_side=asked.side,
        )
        decided = [
            Answer(event.verdict, event.reason, event.computed_qty, event.computed_notional, event.asked)
            for event in events
            if isinstance(event, Decision)
        ]
        answer = self.model.plan(spec.now, asked)
        assert decided == ([] if answer is None else [answer])
        self.permits += [asked.plan_id] if answer is not None and answer.verdict == "EXECUTE" else []
        self.agree(list(events))

    def malformed(self, decision: str | None, *, again: bool) -> None:
        entry = self.plans[-1].entry if again and self.plans else self.spec.entry()
        self.model.malformed(self.spec.now, entry, decision or "")
        self.agree(list(self.spec.plan("bad", symbol="", decision=decision, entry=entry)))

    def result(self, back: int, age: int, *, executed: bool, failed: str, quantity: str, again: bool) -> None:
        entry = self.results[-1] if again and self.results else self.spec.entry(age=age)
        self.results.append(entry)
        step = {"step": "close", "status": "error" if failed == "step" else "ok", "executed_qty": quantity}
        changed = {"decision": "ERROR"} if failed == "decision" else {}
        plan_id = self.plan_id(back)
        events = self.spec.result(
            plan_id, entry=entry, executed=str(executed), steps_results=json.dumps([step]), **changed
        )
        self.model.result(
            self.spec.now,
            plan_id,
            entry,
            int(entry.split("-")[0]) * 1000,
            executed=executed,
            failed=failed != "",
            quantity=Decimal(quantity),
        )
        self.agree(list(events))

    def take_back(self, back: int, *, gone: bool) -> None:
        self.model.take_back(self.spec.now, self.plan_id(back), gone=gone)
        self.agree(list(self.spec.take_back(self.plan_id(back), gone=gone)))

    def consumed_before_the_disarm(self, back: int) -> None:
        self.model.consumed_before_the_disarm(self.spec.now, self.plan_id(back))
        self.agree(list(self.spec.fold(decider.correct_revoked(self.spec.state, [self.plan_id(back)]))))

    def tick(self) -> None:
        self.model.tick(self.spec.now)
        self.agree(list(self.spec.tick()))

    def disarm(self, apply_mode: str | None) -> None:
        self.spec.apply_mode = apply_mode
        self.model.disarm_by_hand(self.spec.now, "drill", apply_mode)
        self.agree(list(self.spec.disarm("drill")))

    def prove(self) -> None:
        disarm = self.spec.state.mode.disarm
        if disarm is not None:
            self.model.prove(self.spec.now)
            self.spec.given(AutoDisarm(reason="", context={}, action_taken="", epoch=disarm.epoch))
            self.agree()

    def rearm(self, *, force: bool, halt: bool) -> None:
        self.spec.halt = halt
        may = self.model.rearm(self.spec.now, force=force, halt=halt)
        try:
            events = list(self.spec.rearm(force=force))
        except decider.RearmRefusedError:
            assert not may
        else:
            assert may
            self.agree(events)


class Input(NamedTuple):
    """A method of Pair, what it is given, and when."""

    moment: Moment
    name: str
    given: dict[str, Any]


def usually(usual: object, *others: object) -> st.SearchStrategy[Any]:
    """The usual value three times in four."""
    return st.sampled_from([*[usual] * 3 * len(others), *others])


def inputs(name: str, **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Input]:
    return st.builds(Input, moments, st.just(name), st.fixed_dictionaries(given))


def plans(**given: st.SearchStrategy[Any]) -> st.SearchStrategy[Asked]:
    return st.fixed_dictionaries(given).map(lambda values: Asked("", "", 0, **values))


def legs(**amounts: str) -> dict[str, Decimal]:
    return {side: Decimal(amount) for side, amount in amounts.items()}


SPANS = [0, SECOND, MINUTE, -MINUTE, 7 * HOUR, *WINDOWS]
NOW = Moment(0, 0, 0, midnight=False)
moments = st.sampled_from(
    [
        *[NOW] * 400,
        *(
            Moment(back, span, off, midnight=False)
            for back in (0, 0, 1, 2, 4, 8)
            for span in SPANS
            for off in (0, 0, -1, 1)
        ),
        *(Moment(0, 0, off, midnight=True) for off in (0, -1, 1)),
    ]
)
"""One draw where several would do: drawing takes longer than deciding."""
OPEN = [legs(BOTH="0.004"), legs(BOTH="-0.02"), legs(BOTH="0.013333333")]
UNUSUAL = [None, legs(BOTH="0"), legs(LONG="0.01", SHORT="-0.02"), legs(BOTH="0.5"), legs(BOTH="0.000000000001")]
PRICES = [Decimal(price) for price in ("25000", "95033.33333333", "3300.123465", "200000")]
usual = st.sampled_from(
    [
        Asked("", "", 0, symbol, action, close_qty=qty, legs=held, price=price, apply_mode=mode)
        for symbol, action, held, price, qty, mode in product(
            ("BTCUSDT", *SYMBOLS),
            [action for action in ACTIONS if action != "OPEN_LONG"],
            OPEN,
            PRICES,
            [Decimal("0.005"), Decimal("0.01"), Decimal("0.02")],
            ["testnet", "testnet", "dry_run"],
        )
    ]
)
unusual = plans(
    symbol=st.sampled_from(SYMBOLS),
    action=st.sampled_from(ACTIONS),
    decision=usually("EXECUTE", "SKIP", "BLOCKED"),
    kill_score=st.sampled_from([Decimal(score) for score in ("0.1", "0.4999", "0.5", "0.7999", "0.8", "0.9", "-1")]),
    close_qty=st.sampled_from([Decimal(0), Decimal("-0.01"), Decimal("0.001")]),
    side=usually(None, "LONG", "SHORT", "BOTH"),
    legs=st.sampled_from(UNUSUAL + OPEN),
    price=st.sampled_from([None, *PRICES]),
    apply_mode=usually("testnet", "dry_run", None),
    halt=st.sampled_from([False] * 15 + [True]),
    history=st.sampled_from(["whole"] * 14 + ["quarantined", "history_hold"]),
)
backs = usually(1, *range(16))
ages = usually(0, -2 * SECOND, 5 * SECOND, 5 * SECOND + 1000, MINUTE, MINUTE + 1000, HOUR)
seldom = usually(False, True)
results = inputs(
    "result",
    back=backs,
    age=usually(0, MINUTE, 13 * HOUR, MEMORY - 1000, MEMORY),
    executed=usually(True, False),
    failed=usually("", "step", "decision"),
    quantity=usually("0", "0.005", "0.013", "0.3"),
    again=seldom,
)
KINDS = {
    "plan": (12, inputs("plan", asked=usual)),
    "unusual": (4, inputs("plan", asked=unusual, age=ages)),
    "known": (2, inputs("plan", asked=unusual, again=st.integers(0, 6), same_entry=st.booleans())),
    "malformed": (1, inputs("malformed", decision=st.sampled_from(["EXECUTE", "SKIP", None]), again=seldom)),
    "result": (4, results),
    "take_back": (4, inputs("take_back", back=backs, gone=st.booleans())),
    "consumed": (1, inputs("consumed_before_the_disarm", back=backs)),
    "tick": (3, inputs("tick")),
    "disarm": (0.5, inputs("disarm", apply_mode=st.sampled_from(["testnet", "dry_run", None]))),
    "prove": (1, inputs("prove")),
    "rearm": (3, inputs("rearm", force=usually(True, False), halt=seldom)),
}
anything = st.sampled_from([kind for kind, (weight, _) in KINDS.items() for _ in range(int(2 * weight))]).flatmap(
    lambda kind: KINDS[kind][1]
)
histories = st.lists(st.lists(anything, min_size=1, max_size=15), min_size=1, max_size=15)
"""Lists of lists come out longer than lists do."""


@pytest.mark.parametrize("policy", LIMITS, ids=range(len(LIMITS)))
def test_the_decider_and_the_model_agree_on_every_input(policy: Policy) -> None:
    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=20,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(start=st.sampled_from([NOON, MIDNIGHT - MINUTE]), happens=histories)
    def agree(start: int, happens: list[list[Input]]) -> None:
        pair = Pair(policy, start)
        for moment, name, given_to_it in chain.from_iterable(happens):
            pair.go(moment)
            getattr(pair, name)(**given_to_it)

    agree()


def asked(**changed: Any) -> Asked:
    return Asked("", "", 0, legs=legs(BOTH="0.004"), price=Decimal(25000), close_qty=Decimal("0.001"))._replace(
        **changed
    )


@pytest.mark.parametrize("action", ["PARTIAL_25", "UPDATE_SL"])
@pytest.mark.parametrize("policy", LIMITS, ids=range(len(LIMITS)))
def test_they_agree_to_the_microsecond_where_a_window_ends(policy: Policy, action: str) -> None:
    for window, off, filled in product(WINDOWS, (-1, 0), (1, 2, 3, 4)):
        pair = Pair(policy, NOON)
        for _ in range(filled):
            pair.plan(asked(action=action))
            pair.malformed("EXECUTE", again=False)
        pair.spec.now = NOON + window + off
        pair.agree()
        pair.plan(asked(action=action), again=filled - 1)
        pair.plan(asked(action=action))
        pair.malformed("EXECUTE", again=False)
        pair.result(4, 0, executed=True, failed="", quantity="0", again=False)


@pytest.mark.parametrize("action", ["PARTIAL_25", "UPDATE_SL", "OPEN_LONG"])
@pytest.mark.parametrize("held", [None, legs(BOTH="0"), legs(BOTH="0.5")], ids=["unread", "flat", "open"])
def test_they_agree_on_the_first_of_several_gates_that_fail(action: str, held: dict[str, Decimal] | None) -> None:
    either = (False, True)
    for situation, old, high, hour, burst, daily, total in product(range(3), *[either] * 6):
        one, none = Decimal(1), 0
        limits = Limits(
            per_hour=none if hour else None, per_5min=none if burst else None, notional_per_day=one if daily else None
        )
        policy = Policy(
            credentials=True,
            limits=limits,
            total_notional_per_day=one if total else None,
            disarm_on_errors=2,
            throttle_per_5min=0,
        )
        pair = Pair(policy, NOON)
        pair.malformed("EXECUTE", again=False)
        plan = asked(action=action, legs=held, kill_score=Decimal("0.9" if high else "0.1"), halt=situation > 0)
        pair.plan(plan._replace(history="quarantined" if situation > 1 else "whole"), age=HOUR if old else 0)


def test_they_agree_on_every_order_of_errors_disarms_proofs_and_rearms() -> None:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("malformed", {"decision": "EXECUTE", "again": False}),
        ("disarm", {"apply_mode": "testnet"}),
        ("disarm", {"apply_mode": "dry_run"}),
        ("prove", {}),
        ("rearm", {"force": False, "halt": False}),
        ("rearm", {"force": True, "halt": True}),
    ]
    for happens in product(kinds, repeat=4):
        pair = Pair(Policy(disarm_on_errors=2), NOON)
        for name, given_to_it in happens:
            getattr(pair, name)(**given_to_it)


@pytest.mark.parametrize("span", [0, MEMORY - 1, MEMORY])
def test_they_agree_on_a_plan_id_that_comes_again(span: int) -> None:
    for decisions, gone in product(product(("SKIP", "EXECUTE"), repeat=3), (False, True)):
        pair = Pair(Policy(credentials=True), NOON)
        for decision in decisions:
            pair.plan(asked(decision=decision), again=0)
            pair.spec.now += span
            pair.take_back(0, gone=gone)
        pair.result(0, 0, executed=True, failed="", quantity="0", again=False)


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_they_agree_on_the_day_at_midnight(off: int) -> None:
    pair = Pair(Policy(credentials=True, limits=Limits(per_hour=None, per_5min=None)), MIDNIGHT - SECOND)
    for _ in range(2):
        pair.plan(asked(action="FULL_CLOSE_PROPOSED", legs=legs(BOTH="0.1")))
    pair.spec.now = MIDNIGHT + off
    pair.plan(asked(action="FULL_CLOSE_PROPOSED", legs=legs(BOTH="0.2")))


def test_they_agree_on_dust_where_no_notional_is_allowed() -> None:
    pair = Pair(Policy(credentials=True, limits=Limits(notional_per_day=Decimal(0))), NOON)
    pair.plan(asked(legs=legs(BOTH="0.000000000001"), price=Decimal("0.01")))


def test_they_agree_on_a_permit_left_over_from_a_forgotten_plan() -> None:
    pair = Pair(Policy(credentials=True), NOON)
    pair.plan(asked())
    pair.spec.now += MEMORY
    pair.plan(asked(action="OPEN_LONG"), again=0)
    pair.take_back(0, gone=False)
