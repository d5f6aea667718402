"""The table of gates: one alone, two together, the cases without an answer, and the fail-closed matrix."""

from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import combinations
from typing import Any

import pytest

from events.types import AutoDisarm, Check, DisarmStarted, Event, HistoryRestored, Throttled
from governor import gates
from governor.gates import TABLE, Situation, case, evaluate, needs_market
from governor.market import Market
from governor.plans import Plan
from governor.policy import Limits, Policy
from projections.state import State
from tests.spec import DAY, HOUR, MINUTE, NOON, SECOND, Spec, check, decision, market, names, reason

NAMES = (
    "history", "armed", "plan_age", "action", "kill_score", "exec_1h", "exec_5min", "position_read", "position_open",
    "quantity", "daily_notional", "total_daily_notional", "throttle",
)  # fmt: skip
"""In the order of the contract."""


@dataclass
class Setup:
    """A situation in which every gate passes, and what a test changes of it."""

    plan: dict[str, Any] = field(default_factory=lambda: {"action": "PARTIAL_75", "kill_score": Decimal("0.1")})
    policy: dict[str, Any] = field(default_factory=lambda: {"credentials": True})
    limits: dict[str, Any] = field(default_factory=dict)
    situation: dict[str, Any] = field(default_factory=dict)
    market: Market | None = field(default_factory=market)
    past: list[Event] = field(default_factory=list)
    granted: list[str] = field(default_factory=list)

    def evaluate(self) -> tuple[tuple[Check, ...], str | None]:
        return evaluate(self.case())

    def case(self) -> gates.Case:
        usual: dict[str, Any] = {
            "plan_id": "p1",
            "symbol": "BTCUSDT",
            "decision": "EXECUTE",
            "entry_id": "1-1",
            "at": NOON - SECOND,
        }
        policy = Policy(limits=Limits(**self.limits), **self.policy)
        now: dict[str, Any] = {"now": NOON}
        situation = Situation(**now | self.situation)
        return case(Plan(**usual | self.plan), policy, self.state(), self.market, situation)

    def state(self) -> State:
        """The past, a minute ago: permits of 0.01 BTC first, then the events."""
        spec = Spec(now=NOON - MINUTE)
        for plan_id in self.granted:
            spec.granted(plan_id, action="PARTIAL_50")
        return spec.given(*self.past).state


Break = Callable[[Setup], None]


def quarantined(s: Setup) -> None:
    s.situation["history"] = "quarantined"


def held(s: Setup) -> None:
    s.past.append(HistoryRestored(events=3, hold_until_us=NOON + 1))


def disarmed(s: Setup) -> None:
    s.past.append(DisarmStarted(reason="drill", context={}, epoch=2))


def halted(s: Setup) -> None:
    s.situation["halt"] = True


def stale(s: Setup) -> None:
    s.plan["at"] = NOON - 61 * SECOND


def unknown(s: Setup) -> None:
    s.plan["action"] = "OPEN_LONG"


def killed(s: Setup) -> None:
    s.plan |= {"action": "UPDATE_SL", "kill_score": Decimal("0.8")}


def hourly(s: Setup) -> None:
    s.granted = ["a"]
    s.limits["per_hour"] = 1


def burst(s: Setup) -> None:
    s.granted = ["a"]
    s.limits["per_5min"] = 1


def unread(s: Setup) -> None:
    s.policy["credentials"] = True
    s.market = market(position=None)


def flat(s: Setup) -> None:
    s.policy["credentials"] = True
    s.market = market(position="0")


def quantityless(s: Setup) -> None:
    s.policy["credentials"] = False
    s.market = None


def daily(s: Setup) -> None:
    s.limits["notional_per_day"] = Decimal("1425.49999999")


def daily_without_price(s: Setup) -> None:
    s.market = market(price=None)
    s.limits["qty_per_day"] = Decimal("0.01499999")


def total(s: Setup) -> None:
    s.policy["total_notional_per_day"] = Decimal("1425.49999999")


def throttled(s: Setup) -> None:
    s.granted = ["a"]
    s.past.append(Throttled(symbol="BTCUSDT", reason="hourly_limit_exceeded", until_us=NOON + HOUR))


ALONE: list[tuple[int, Break, str, str]] = [
    # gate, what breaks it, its reason, and every check: + passed, - failed, . not evaluated
    (1, quarantined, "quarantined", "-++++++++++++"),
    (1, held, "history_hold", "-++++++++++++"),
    (2, disarmed, "disarmed", "+-+++++++++++"),
    (2, halted, "halted", "+-+++++++++++"),
    (3, stale, "plan_stale", "++-++++++++++"),
    (4, unknown, "unknown_action", "+++-+++-....+"),
    (5, killed, "kill_score_critical_non_close", "++++-++.....+"),
    (6, hourly, "hourly_limit_exceeded", "+++++-+++++++"),
    (7, burst, "burst_limit_exceeded", "++++++-++++++"),
    (8, unread, "position_fetch_failed", "+++++++-....+"),
    (9, flat, "no_position", "++++++++-++++"),
    (10, quantityless, "quantity_unknown", "+++++++..-..+"),
    (11, daily, "daily_limit_exceeded", "++++++++++-++"),
    (11, daily_without_price, "daily_limit_exceeded", "++++++++++-.+"),
    (12, total, "total_daily_limit_exceeded", "+++++++++++-+"),
    (13, throttled, "throttled", "++++++++++++-"),
]
SIGN = {True: "+", False: "-", None: "."}


def signs(checks: tuple[Check, ...]) -> str:
    return "".join(SIGN[each.ok] for each in checks)


def test_every_gate_passes_in_the_usual_situation() -> None:
    checks, why = Setup().evaluate()
    assert (signs(checks), why) == ("+" * 13, None)
    assert tuple(each.gate for each in checks) == NAMES


@pytest.mark.parametrize(("gate", "breaks", "why", "answers"), ALONE, ids=[row[1].__name__ for row in ALONE])
def test_a_gate_that_alone_fails_gives_its_reason(gate: int, breaks: Break, why: str, answers: str) -> None:
    setup = Setup()
    breaks(setup)
    checks, found = setup.evaluate()
    assert (signs(checks), found) == (answers, why)
    assert answers.count("-") == 1 or gate == 4
    assert all(each.gate in row.names for each, row in zip(checks, TABLE, strict=True))
    assert found in TABLE[gate - 1].reasons


@pytest.mark.parametrize(
    ("early", "late"),
    [pair for pair in combinations(ALONE, 2) if pair[0][0] < pair[1][0]],
    ids=lambda row: row[1].__name__,
)
def test_of_two_gates_that_fail_the_earlier_gives_the_reason(
    early: tuple[int, Break, str, str], late: tuple[int, Break, str, str]
) -> None:
    setup = Setup()
    late[1](setup)
    early[1](setup)
    checks, why = setup.evaluate()
    assert why == early[2]
    assert checks[early[0] - 1].ok is False
    assert len(checks) == 13


def test_of_two_reasons_of_one_gate_the_graver_is_given() -> None:
    both = Setup()
    quarantined(both)
    held(both)
    assert both.evaluate()[1] == "quarantined"
    off = Setup()
    disarmed(off)
    halted(off)
    assert off.evaluate()[1] == "disarmed"


def test_all_gates_can_fail_at_once_and_every_one_is_recorded() -> None:
    setup = Setup()
    for breaks in (throttled, quarantined, disarmed, stale, unknown, hourly, burst, unread):
        breaks(setup)
    setup.plan["kill_score"] = Decimal("0.9")
    checks, why = setup.evaluate()
    assert (signs(checks), why) == ("--------....+", "quarantined")


def test_the_table_names_its_checks_and_reasons_once() -> None:
    assert tuple(name for row in TABLE for name in row.names if name != "daily_qty") == NAMES
    assert len(set(gates.REASONS)) == len(gates.REASONS)
    assert set(gates.REASONS) >= {row[2] for row in ALONE}
    assert {reason for row in TABLE for reason in row.reasons} == {row[2] for row in ALONE}


@pytest.mark.parametrize(
    ("breaks", "asks"),
    [(row[1], row[0] >= 8 and row[1] is not quantityless) for row in ALONE],
    ids=[row[1].__name__ for row in ALONE],
)
def test_the_exchange_is_needed_only_when_the_gates_before_it_pass(breaks: Break, asks: bool) -> None:  # noqa: FBT001
    setup = Setup()
    breaks(setup)
    setup.market = None
    assert needs_market(setup.case()) is asks


def test_without_credentials_the_exchange_is_never_asked_and_its_gates_do_not_apply() -> None:
    setup = Setup(policy={"credentials": False}, market=None)
    setup.plan["close_qty"] = Decimal("0.02")
    checks, why = setup.evaluate()
    assert (signs(checks), why) == ("+++++++..++.+", None)
    assert checks[10] == Check("daily_qty", ok=True, used=Decimal(0), limit=Decimal("0.02"))
    assert not needs_market(setup.case())


@pytest.mark.parametrize("credentials", [True, False])
def test_a_stop_update_needs_no_exchange_data(*, credentials: bool) -> None:
    setup = Setup(market=None, policy={"credentials": credentials})
    setup.plan["action"] = "UPDATE_SL"
    checks, why = setup.evaluate()
    assert (signs(checks), why) == ("+++++++.....+", None)
    assert all(each.gate in row.names for each, row in zip(checks, TABLE, strict=True))
    assert not needs_market(setup.case())


def test_what_the_exchange_was_not_asked_for_is_not_evaluated() -> None:
    setup = Setup(market=None)
    setup.plan["close_qty"] = Decimal("0.01")
    stale(setup)
    checks, why = setup.evaluate()
    assert (signs(checks), why) == ("++-++++.....+", "plan_stale")
    assert all(each.gate in row.names for each, row in zip(checks, TABLE, strict=True))
    assert setup.case().quantity is None


def test_without_credentials_data_of_the_exchange_is_not_used() -> None:
    setup = Setup(policy={"credentials": False})
    setup.plan["close_qty"] = Decimal("0.001")
    found = setup.case()
    assert (found.position, found.quantity, found.notional) == (None, Decimal("0.001"), None)


def test_without_credentials_an_unknown_action_has_no_quantity() -> None:
    setup = Setup(policy={"credentials": False}, market=None)
    setup.plan |= {"action": "BUY", "close_qty": Decimal("0.001")}
    assert signs(setup.evaluate()[0]) == "+++-+++.....+"
    assert setup.case().quantity is None


def test_a_kill_score_that_is_not_there_is_as_bad_as_a_critical_one() -> None:
    setup = Setup()
    setup.plan |= {"action": "UPDATE_SL", "kill_score": None}
    assert setup.evaluate()[1] == "kill_score_critical_non_close"
    setup.policy["kill_score_critical"] = None
    assert setup.evaluate()[1] is None


def test_without_a_price_the_quantity_decides_and_the_total_over_all_symbols_cannot() -> None:
    setup = Setup(market=market(price=None))
    setup.policy["total_notional_per_day"] = Decimal(0)
    checks, why = setup.evaluate()
    assert (signs(checks), why) == ("+++++++++++.+", None)
    assert checks[10].gate == "daily_qty"


def test_data_of_the_exchange_that_came_although_it_was_not_needed_is_recorded() -> None:
    setup = Setup()
    stale(setup)
    checks, why = setup.evaluate()
    assert (why, checks[7].ok, checks[8].used) == ("plan_stale", True, Decimal("0.020"))


def test_a_check_says_what_was_used_and_what_is_allowed() -> None:
    setup = Setup(granted=["a"])
    setup.policy |= {"total_notional_per_day": Decimal(9000)}
    told = {each.gate: (each.used, each.limit) for each in setup.evaluate()[0]}
    assert told == {
        "history": (None, None),
        "armed": (None, None),
        "plan_age": (Decimal(1), Decimal(60)),
        "action": (None, None),
        "kill_score": (Decimal("0.1"), Decimal("0.8")),
        "exec_1h": (1, 3),
        "exec_5min": (1, 2),
        "position_read": (None, None),
        "position_open": (Decimal("0.020"), None),
        "quantity": (Decimal("0.015"), None),
        "daily_notional": (Decimal("950.33333333"), 5000),
        "total_daily_notional": (Decimal("950.33333333"), 9000),
        "throttle": (None, None),
    }


def test_a_throttled_check_says_what_was_used_and_what_is_allowed() -> None:
    setup = Setup()
    throttled(setup)
    found = setup.evaluate()[0][12]
    assert found == Check("throttle", ok=False, used=Decimal(1), limit=Decimal(1))


@pytest.mark.parametrize(
    ("action", "position", "quantity"),
    [
        ("FULL_CLOSE_PROPOSED", "0.020", "0.02"),
        ("PARTIAL_75", "0.020", "0.015"),
        ("PARTIAL_50", "0.020", "0.01"),
        ("PARTIAL_25", "0.020", "0.005"),
        ("PARTIAL_75", "-0.020", "0.015"),
        ("PARTIAL_25", "0.001", "0.00025"),
        ("UPDATE_SL", "0.020", "0"),
        ("OPEN_LONG", "0.020", None),
    ],
)
def test_an_action_closes_its_fraction_of_the_position(action: str, position: str, quantity: str | None) -> None:
    setup = Setup(market=market(position))
    setup.plan["action"] = action
    assert setup.case().quantity == (None if quantity is None else Decimal(quantity))


@pytest.mark.parametrize(
    ("side", "legs", "position"),
    [
        (None, {"LONG": "0.02", "SHORT": "-0.03"}, "0.05"),
        ("BOTH", {"LONG": "0.02", "SHORT": "-0.03"}, "0.05"),
        ("LONG", {"LONG": "0.02", "SHORT": "-0.03"}, "0.02"),
        ("SHORT", {"LONG": "0.02", "SHORT": "-0.03"}, "0.03"),
        ("LONG", {"BOTH": "0.02"}, "0.02"),
        ("SHORT", {"BOTH": "-0.02"}, "0.02"),
        ("LONG", {"BOTH": "-0.02"}, "0"),
        ("SHORT", {"BOTH": "0.02"}, "0"),
        ("SHORT", {"LONG": "0.02"}, "0"),
    ],
)
def test_the_position_is_all_legs_together_or_the_leg_the_plan_names(
    side: str | None, legs: dict[str, str], position: str
) -> None:
    setup = Setup(market=market(**legs))
    setup.plan["position_side"] = side
    assert setup.case().position == Decimal(position)


# -- fail closed ---------------------------------------------------------------------------------------------------
#
# Each input that can be missing, stale or wrong, and the one verdict it leads to.


@dataclass
class Cell:
    """One input gone wrong."""

    what: str
    verdict: str
    plan: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    past: tuple[Event, ...] = ()


KEYLESS = {"credentials": False}
DISARMED = DisarmStarted(reason="drill", context={}, epoch=2)
DONE = AutoDisarm(reason="drill", context={}, action_taken="", epoch=2)

MATRIX = [
    Cell("nothing is wrong", "EXECUTE"),
    # The plan
    Cell("no plan_id", "REJECTED", {"plan_id": None}),
    Cell("empty plan_id", "REJECTED", {"plan_id": ""}),
    Cell("plan_id with a blank", "REJECTED", {"plan_id": "p 1"}),
    Cell("plan_id too long", "REJECTED", {"plan_id": "p" * 129}),
    Cell("longest plan_id", "EXECUTE", {"plan_id": "p" * 128}),
    Cell("no symbol", "REJECTED", {"symbol": None}),
    Cell("symbol in small letters", "REJECTED", {"symbol": "btcusdt"}),
    Cell("symbol with a colon", "REJECTED", {"symbol": "BTC:USDT"}),
    Cell("symbol too long", "REJECTED", {"symbol": "B" * 33}),
    Cell("no action", "REJECTED", {"action": None}),
    Cell("unknown action", "unknown_action", {"action": "OPEN_LONG"}),
    Cell("action in small letters", "unknown_action", {"action": "partial_75"}),
    Cell("no decision", "REJECTED", {"decision": None}),
    Cell("empty decision", "REJECTED", {"decision": ""}),
    Cell("decision SKIP", "not_execute", {"decision": "SKIP"}),
    Cell("decision in small letters", "not_execute", {"decision": "execute"}),
    Cell("no kill score", "REJECTED", {"kill_score": None}),
    Cell("empty kill score", "REJECTED", {"kill_score": ""}),
    Cell("kill score NaN", "REJECTED", {"kill_score": "NaN"}),
    Cell("kill score infinite", "REJECTED", {"kill_score": "inf"}),
    Cell("kill score minus infinite", "REJECTED", {"kill_score": "-Infinity"}),
    Cell("kill score no number", "REJECTED", {"kill_score": "high"}),
    Cell("kill score critical", "kill_score_critical_non_close", {"action": "UPDATE_SL", "kill_score": "0.8"}),
    Cell("kill score just below", "EXECUTE", {"action": "UPDATE_SL", "kill_score": "0.79999999"}),
    Cell("kill score critical, a close", "EXECUTE", {"kill_score": "1"}),
    Cell("kill score critical of zero", "kill_score_critical_non_close", {"action": "UPDATE_SL", "kill_score": "0"},
         {"kill_score_critical": Decimal(0)}),
    Cell("kill score off", "EXECUTE", {"action": "UPDATE_SL", "kill_score": "9"}, {"kill_score_critical": None}),
    Cell("plan as old as allowed", "EXECUTE", {"age": 60 * SECOND}),
    Cell("plan a millisecond too old", "plan_stale", {"age": 60 * SECOND + 1000}),
    Cell("plan a day old, age off", "EXECUTE", {"age": DAY}, {"max_plan_age_us": None}),
    Cell("plan of this millisecond, age zero", "EXECUTE", {}, {"max_plan_age_us": 0}),
    Cell("plan a millisecond old, age zero", "plan_stale", {"age": 1000}, {"max_plan_age_us": 0}),
    Cell("plan 5 s in the future", "EXECUTE", {"age": -5 * SECOND}),
    Cell("plan more than 5 s in the future", "REJECTED", {"age": -5 * SECOND - 1000}),
    Cell("entry id that is none", "REJECTED", {"entry": "yesterday"}),
    Cell("position side that names no leg", "EXECUTE", {"position_side": "UP"}),
    Cell("position on the other side", "no_position", {"position_side": "SHORT"}),
    Cell("unused number NaN", "EXECUTE", {"R_net": "nan", "price": "nan", "close_qty": "nan"}),
    # The exchange
    Cell("position not read", "position_fetch_failed", {"market": market(position=None)}),
    Cell("nothing read", "position_fetch_failed", {"market": market(position=None, price=None)}),
    Cell("position flat", "no_position", {"market": market(position="0")}),
    Cell("price missing, quantity within its limit", "EXECUTE", {"market": market(price=None)}),
    Cell("price missing, quantity past its limit", "daily_limit_exceeded",
         {"market": market(position="0.0266666668", price=None)}),
    Cell("position not read, a close_qty", "position_fetch_failed",
         {"market": market(position=None), "close_qty": "0.01"}),
    Cell("stop update while the exchange is away", "EXECUTE",
         {"action": "UPDATE_SL", "market": market(position=None, price=None)}),
    # No credentials
    Cell("no close_qty", "quantity_unknown", {}, KEYLESS),
    Cell("close_qty zero", "quantity_unknown", {"close_qty": "0.0"}, KEYLESS),
    Cell("close_qty negative", "quantity_unknown", {"close_qty": "-0.01"}, KEYLESS),
    Cell("close_qty NaN", "REJECTED", {"close_qty": "nan"}, KEYLESS),
    Cell("close_qty within the limit", "EXECUTE", {"close_qty": "0.02"}, KEYLESS),
    Cell("close_qty past the limit", "daily_limit_exceeded", {"close_qty": "0.02000001"}, KEYLESS),
    Cell("fallback quantity", "EXECUTE", {}, KEYLESS | {"fallback_qty": Decimal("0.02")}),
    Cell("fallback quantity past the limit", "daily_limit_exceeded", {}, KEYLESS | {"fallback_qty": Decimal("0.03")}),
    Cell("close_qty before the fallback", "daily_limit_exceeded", {"close_qty": "0.03"},
         KEYLESS | {"fallback_qty": Decimal("0.01")}),
    Cell("unknown action with a close_qty", "unknown_action", {"action": "BUY", "close_qty": "0.01"}, KEYLESS),
    Cell("stop update without credentials", "EXECUTE", {"action": "UPDATE_SL"}, KEYLESS),
    # The gate itself
    Cell("emergency brake", "halted", gate={"halt": True}),
    Cell("quarantine", "quarantined", gate={"history": "quarantined"}),
    Cell("a hold", "history_hold", past=(HistoryRestored(events=1, hold_until_us=NOON + 1),)),
    Cell("a hold that is over", "EXECUTE", past=(HistoryRestored(events=1, hold_until_us=NOON),)),
    Cell("disarm under way", "disarmed", past=(DISARMED,)),
    Cell("disarm done", "disarmed", past=(DISARMED, DONE)),
    Cell("disarmed and the brake", "disarmed", gate={"halt": True}, past=(DISARMED,)),
    Cell("Apply Layer's file unreadable", "EXECUTE", gate={"apply_mode": None}),
    Cell("Apply Layer in dry run", "EXECUTE", gate={"apply_mode": "dry_run"}),
    # Limits of zero
    Cell("hourly limit zero", "hourly_limit_exceeded", {}, {"limits": Limits(per_hour=0)}),
    Cell("burst limit zero", "burst_limit_exceeded", {}, {"limits": Limits(per_5min=0)}),
    Cell("daily limit zero", "daily_limit_exceeded", {}, {"limits": Limits(notional_per_day=Decimal(0))}),
    Cell("daily quantity zero, no price", "daily_limit_exceeded", {"market": market(price=None)},
         {"limits": Limits(qty_per_day=Decimal(0))}),
    Cell("daily quantity zero does not concern a priced plan", "EXECUTE", {},
         {"limits": Limits(qty_per_day=Decimal(0))}),
    Cell("total limit zero", "total_daily_limit_exceeded", {}, {"total_notional_per_day": Decimal(0)}),
    Cell("stop update, hourly limit zero", "hourly_limit_exceeded", {"action": "UPDATE_SL"},
         {"limits": Limits(per_hour=0)}),
    Cell("every limit off", "EXECUTE", {"market": market("900")},
         {"limits": Limits(per_hour=None, per_5min=None, notional_per_day=None, qty_per_day=None)}),
    Cell("limits of the symbol's own", "hourly_limit_exceeded", {},
         {"by_symbol": {"BTCUSDT": Limits(per_hour=0)}}),
    Cell("limits of another symbol", "EXECUTE", {}, {"by_symbol": {"ETHUSDT": Limits(per_hour=0)}}),
]  # fmt: skip


@pytest.mark.parametrize("cell", MATRIX, ids=lambda cell: cell.what)
def test_each_missing_or_stale_input_has_one_verdict(cell: Cell) -> None:
    spec = Spec(Policy(**{"credentials": True} | cell.policy)).given(*cell.past)
    for name, value in cell.gate.items():
        setattr(spec, name, value)
    events = spec.plan(**cell.plan)
    if cell.verdict == "REJECTED":
        assert names(events)[0] == "PLAN_REJECTED"
        assert len(spec.state.permits) == 0
        return
    found = decision(events)
    assert (found.reason or found.verdict) == cell.verdict
    assert len(spec.state.permits) == (found.verdict == "EXECUTE") == (found.reason is None)
    assert len(found.checks) == (0 if found.verdict == "SKIP" else 13)


# -- boundaries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "why"),
    [(HOUR - 1, "hourly_limit_exceeded"), (HOUR, None), (HOUR + 1, None)],
    ids=["59:59.999999", "60:00.000000", "60:00.000001"],
)
def test_an_execution_exactly_one_hour_old_is_out_of_the_hour(age: int, why: str | None) -> None:
    spec = Spec(Policy(limits=Limits(per_hour=1), credentials=True)).granted("a").after(age)
    assert reason(spec.plan("b")) == why


@pytest.mark.parametrize(
    ("age", "why"),
    [(5 * MINUTE - 1, "burst_limit_exceeded"), (5 * MINUTE, None), (5 * MINUTE + 1, None)],
    ids=["4:59.999999", "5:00.000000", "5:00.000001"],
)
def test_an_execution_exactly_five_minutes_old_is_out_of_the_five_minutes(age: int, why: str | None) -> None:
    spec = Spec(Policy(limits=Limits(per_5min=1), credentials=True)).granted("a").after(age)
    assert reason(spec.plan("b")) == why


@pytest.mark.parametrize(("late", "why"), [(0, None), (1, "plan_stale")], ids=["60.000000", "60.000001"])
def test_a_plan_exactly_as_old_as_allowed_is_not_stale(late: int, why: str | None) -> None:
    spec = Spec(now=NOON + late)
    events = spec.plan(entry=f"{(NOON - MINUTE) // 1000}-0")
    assert reason(events) == why
    assert check(events, "plan_age").used == Decimal(60) + Decimal(late) / SECOND


@pytest.mark.parametrize(
    ("limit", "why"), [("2851", None), ("2850.99999999", "daily_limit_exceeded")], ids=["reached", "one digit past"]
)
def test_a_daily_total_may_reach_its_limit_to_the_last_digit(limit: str, why: str | None) -> None:
    spec = Spec(Policy(limits=Limits(notional_per_day=Decimal(limit)), credentials=True)).granted("a")
    assert reason(spec.plan("b")) == why


@pytest.mark.parametrize(
    ("limit", "why"), [("0.03", None), ("0.02999999", "daily_limit_exceeded")], ids=["reached", "one digit past"]
)
def test_a_daily_quantity_may_reach_its_limit_to_the_last_digit(limit: str, why: str | None) -> None:
    spec = Spec(Policy(limits=Limits(qty_per_day=Decimal(limit)), credentials=True))
    spec.granted("a")
    assert reason(spec.plan("b", market=market(price=None))) == why


@pytest.mark.parametrize(
    ("limit", "why"), [("2851", None), ("2850.99999999", "total_daily_limit_exceeded")], ids=["reached", "past"]
)
def test_the_total_over_all_symbols_counts_every_symbol(limit: str, why: str | None) -> None:
    spec = Spec(Policy(total_notional_per_day=Decimal(limit), credentials=True)).granted("a", symbol="ETHUSDT")
    events = spec.plan("b")
    assert reason(events) == why
    assert check(events, "daily_notional").used == 0
    assert check(events, "total_daily_notional").used == Decimal("1425.5")


def test_amounts_counted_without_a_price_and_with_one_add_up_as_quantity() -> None:
    spec = Spec(Policy(credentials=True)).granted("a")
    found = check(spec.plan("b", market=market(price=None), action="PARTIAL_25"), "daily_qty")
    assert (found.used, found.ok) == (Decimal("0.015"), True)
    assert spec.state.book("BTCUSDT").days[0].quantity == Decimal("0.02")
    assert spec.state.book("BTCUSDT").days[0].notional == Decimal("1425.5")


def test_windows_go_by_the_last_event_when_the_clock_steps_back() -> None:
    spec = Spec(Policy(limits=Limits(per_hour=1), credentials=True)).granted("a")
    spec.after(-2 * HOUR)
    assert reason(spec.plan("b")) == "hourly_limit_exceeded"
    spec.at(NOON + HOUR)
    assert reason(spec.plan("c")) is None


def test_plan_age_and_permit_expiry_go_by_the_clock_itself_when_it_steps_back() -> None:
    spec = Spec().granted("a").after(-HOUR)
    events = spec.plan("b", age=MINUTE)
    assert reason(events) is None
    assert decision(events).expires_us == NOON - HOUR + MINUTE
    assert reason(spec.plan("c", age=MINUTE + 1000)) == "plan_stale"


def test_the_day_does_not_change_back_when_the_clock_steps_back_over_midnight() -> None:
    limits = Limits(notional_per_day=Decimal(1426))
    spec = Spec(Policy(limits=limits, credentials=True), now=NOON + 12 * HOUR)
    spec.granted("a").after(-HOUR)
    assert reason(spec.plan("b")) == "daily_limit_exceeded"


def test_a_new_utc_day_begins_at_midnight() -> None:
    limits = Limits(notional_per_day=Decimal(1426), per_5min=None, per_hour=None)
    spec = Spec(Policy(limits=limits, credentials=True), now=NOON + 12 * HOUR - 1)
    spec.granted("a")
    assert reason(spec.plan("b")) == "daily_limit_exceeded"
    assert check(spec.after(1).plan("c"), "daily_notional") == Check("daily_notional", True, Decimal(0), Decimal(1426))


def test_a_named_symbol_reaches_its_own_limits_while_others_keep_theirs() -> None:
    own = {"DOGEUSDT": Limits(per_hour=1, per_5min=None, qty_per_day=Decimal(50000))}
    spec = Spec(Policy(by_symbol=own, credentials=True)).granted("a", symbol="DOGEUSDT").granted("b")
    assert reason(spec.plan("c", symbol="DOGEUSDT")) == "hourly_limit_exceeded"
    assert reason(spec.plan("d")) is None


def test_stop_updates_have_windows_of_their_own() -> None:
    spec = Spec().granted("a", "b", action="UPDATE_SL").granted("c", "d")
    events = spec.plan("e", action="UPDATE_SL")
    assert reason(events) == "burst_limit_exceeded"
    assert names(events) == ["PLAN_RECEIVED", "DECISION"]
    assert spec.state.book("BTCUSDT").days[0].quantity == Decimal("0.03")


def test_a_stop_update_moves_nothing() -> None:
    found = decision(Spec().plan(action="UPDATE_SL"))
    assert (found.computed_qty, found.computed_notional) == (Decimal(0), Decimal(0))
    assert not found.asked


def test_a_throttle_of_another_symbol_does_not_matter() -> None:
    spec = Spec().granted("a").given(Throttled(symbol="ETHUSDT", reason="x", until_us=NOON + HOUR))
    assert reason(spec.plan("b")) is None


def test_a_throttle_of_all_symbols_matters() -> None:
    spec = Spec().granted("a").given(Throttled(symbol=None, reason="x", until_us=NOON + HOUR))
    assert reason(spec.plan("b")) == "throttled"


def test_a_full_close_is_exempt_from_the_throttle_but_not_from_the_windows() -> None:
    spec = Spec().granted("a").given(Throttled(symbol=None, reason="x", until_us=NOON + HOUR))
    assert reason(spec.plan("b", action="FULL_CLOSE_PROPOSED")) is None
    assert reason(spec.plan("c", action="FULL_CLOSE_PROPOSED")) == "burst_limit_exceeded"


@pytest.mark.parametrize(("limit", "why"), [(0, "throttled"), (1, None), (None, None)])
def test_while_throttled_the_first_permit_depends_on_the_throttles_limit(limit: int | None, why: str | None) -> None:
    spec = Spec(Policy(throttle_per_5min=limit, credentials=True))
    spec.given(Throttled(symbol=None, reason="x", until_us=NOON + HOUR))
    assert reason(spec.plan("a")) == why


def test_a_throttled_block_leads_to_nothing_more() -> None:
    spec = Spec().granted("a").given(Throttled(symbol=None, reason="x", until_us=NOON + HOUR))
    assert names(spec.plan("b")) == ["PLAN_RECEIVED", "DECISION"]


def test_a_hold_goes_by_the_clock_itself() -> None:
    spec = Spec().given(HistoryRestored(events=1, hold_until_us=NOON + MINUTE))
    assert reason(spec.after(MINUTE - 1).plan("a")) == "history_hold"
    assert decision(spec.plan("b")).history == "history_hold"
    assert reason(spec.after(1).plan("c")) is None
