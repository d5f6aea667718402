"""What follows from a plan, from errors, from time and from a person."""

import json
from decimal import Decimal
from typing import Any

import pytest

from events.types import (
    Decision,
    DisarmFailed,
    DisarmStarted,
    ErrorRecorded,
    Event,
    HistoryRestored,
    ManualDisarm,
    PermitConsumed,
    PermitExpired,
    PermitRevoked,
    PlanLost,
    PlanReceived,
    PlanRejected,
    Rearmed,
    Recovered,
    Throttled,
)
from governor import decider, permits
from governor.decider import MarketNeededError, RearmRefusedError
from governor.plans import parse_plan
from governor.policy import Limits, Policy
from tests.spec import DAY, HOUR, MINUTE, NOON, SECOND, Spec, decision, market, names, only, plan_fields, reason

PERMITTED = ["PLAN_RECEIVED", "DECISION"]
HOURLY = Limits(per_hour=1, per_5min=None)


def policy(*, credentials: bool = True, **changed: Any) -> Policy:
    return Policy(credentials=credentials, **changed)


def malformed(spec: Spec, count: int) -> list[Event]:
    """Errors that count: plans that cannot be read."""
    return [event for _ in range(count) for event in spec.plan(kill_score="NaN")]


# -- permits -------------------------------------------------------------------------------------------------------


def test_the_example_of_the_requirement() -> None:
    events = Spec().plan("plan-1", market=market("0.020", "95033.33333333"), action="PARTIAL_75")
    found = decision(events)
    assert names(events) == PERMITTED
    assert (found.verdict, found.reason) == ("EXECUTE", None)
    assert (found.computed_qty, found.computed_notional) == (Decimal("0.015"), Decimal("1425.5"))
    assert (found.position_amt, found.mark_price) == (Decimal("0.020"), Decimal("95033.33333333"))
    written = permits.permit(found, at=1_737_753_600_250_000, seq=2)
    assert b'"computed_qty":0.015,' in written
    assert b'"computed_notional":1425.5,' in written
    assert json.loads(written) == {
        "granted": True,
        "symbol": "BTCUSDT",
        "decision": "EXECUTE",
        "computed_qty": 0.015,
        "computed_notional": 1425.5,
        "created_at": 1737753600.25,
        "consumed": False,
        "plan_id": "plan-1",
        "expires_at": (NOON + MINUTE) / SECOND,
        "epoch": 1,
        "seq": 2,
    }


@pytest.mark.parametrize(
    ("price", "notional"),
    [
        ("100.00000033", "1.50000000"),  # 1.50000000495
        ("100.000000333333333333333333333333334", "1.50000001"),  # 1.50000000500000000000000000000000001
        ("100.0000003333", "1.50000000"),  # 1.5000000049995
        ("0.00000001", "0"),
        ("1e3", "15"),
    ],
)
def test_notional_is_rounded_half_up_to_eight_decimals(price: str, notional: str) -> None:
    assert decision(Spec().plan(market=market(price=price))).computed_notional == Decimal(notional)


def test_a_permit_without_a_price_says_zero_notional() -> None:
    found = decision(Spec().plan(market=market(price=None)))
    assert (found.computed_qty, found.computed_notional) == (Decimal("0.015"), Decimal(0))
    assert found.mark_price is None
    assert found.price_error == "timeout"


def test_a_decision_holds_everything_it_was_made_from() -> None:
    spec = Spec()
    spec.given(DisarmStarted(reason="drill", context={}, epoch=2), Rearmed(reason="r", operator="o", epoch=3))
    found = decision(spec.plan(market=market(None, "7", LONG="0.01", SHORT="-0.01"), entry=f"{NOON // 1000}-7"))
    assert found == Decision(
        plan_id="p1",
        symbol="BTCUSDT",
        action="PARTIAL_75",
        verdict="EXECUTE",
        reason=None,
        computed_qty=Decimal("0.015"),
        computed_notional=Decimal("0.105"),
        position_amt=Decimal("0.02"),
        mark_price=Decimal(7),
        apply_mode="testnet",
        checks=found.checks,
        entry_id=f"{NOON // 1000}-7",
        mode="ARMED",
        epoch=3,
        settings="s",
        history="whole",
        halt=False,
        asked=True,
        legs={"LONG": Decimal("0.01"), "SHORT": Decimal("-0.01")},
        expires_us=NOON + MINUTE,
    )


def test_a_blocked_plan_tells_what_it_would_have_moved() -> None:
    found = decision(Spec(policy(limits=Limits(notional_per_day=Decimal(1)))).plan())
    assert (found.verdict, found.computed_qty, found.computed_notional) == (
        "BLOCK",
        Decimal("0.015"),
        Decimal("1425.5"),
    )
    assert found.expires_us is None
    unread = decision(Spec().plan(market=market(None)))
    assert (unread.computed_qty, unread.computed_notional, unread.position_error) == (None, None, "timeout")


def test_the_plan_is_kept_as_its_producer_wrote_it() -> None:
    told = only(Spec().plan(R_net="nan", whatever="ü"), PlanReceived)
    assert told.fields == plan_fields(R_net="nan", whatever="ü")
    assert not told.truncated


def test_a_plan_larger_than_an_event_may_be_is_cut_and_says_so() -> None:
    told = only(Spec().plan(steps="x" * 100_000), PlanReceived)
    assert told.truncated
    assert told.fields["kill_score"] == "0.1"
    assert 60_000 < sum(len(name) + len(value) for name, value in told.fields.items()) <= 65_536


def test_the_exchange_is_asked_once_and_only_where_needed() -> None:
    spec = Spec().granted("a")
    assert spec.asked == 1
    spec.plan("a")
    spec.plan("b", decision="SKIP")
    spec.plan("c", action="BUY")
    spec.plan("d", action="UPDATE_SL")
    spec.plan("e", age=HOUR)
    assert spec.asked == 1


def test_deciding_without_data_that_is_needed_asks_for_it() -> None:
    spec, fields = Spec(), plan_fields()
    plan = parse_plan(fields, entry_id=spec.entry(), now=NOON, needs_close_qty=False)
    with pytest.raises(MarketNeededError):
        decider.decide(spec.state, plan, None, spec.policy, spec.situation, fields=fields)


def test_deciding_changes_nothing_by_itself() -> None:
    spec, fields = Spec(), plan_fields()
    plan = parse_plan(fields, entry_id=spec.entry(), now=NOON, needs_close_qty=False)
    first, second = (
        decider.decide(spec.state, plan, market(), spec.policy, spec.situation, fields=fields) for _ in range(2)
    )
    assert first == second
    assert spec.state.seq == 0


# -- once ----------------------------------------------------------------------------------------------------------


def test_the_same_entry_again_says_nothing() -> None:
    spec = Spec()
    spec.plan(entry="1769256000000-5")
    assert spec.plan(entry="1769256000000-5") == ()
    spec.plan("bad", kill_score="x", entry="1769256000000-6")
    assert spec.plan("bad", kill_score="x", entry="1769256000000-6") == ()
    assert spec.state.counts.rejected == 1


@pytest.mark.parametrize("limits", [Limits(), Limits(notional_per_day=Decimal(0))], ids=["permitted", "blocked"])
def test_a_plan_id_is_decided_once_whatever_it_got(limits: Limits) -> None:
    spec = Spec(policy(limits=limits))
    first = decision(spec.plan("p"))
    again = spec.after(SECOND).plan("p")
    assert names(again) == PERMITTED
    assert (decision(again).verdict, reason(again), decision(again).checks) == ("SKIP", "duplicate_plan", ())
    assert first.verdict == ("EXECUTE" if limits == Limits() else "BLOCK")


def used(plan_id: str) -> Spec:
    """A gate that permitted a plan just now, and whose client took the permit."""
    spec = Spec().granted(plan_id)
    spec.take_back(plan_id, gone=True)
    return spec


def test_a_plan_id_stays_used_up_for_a_day_and_longer() -> None:
    spec = used("p").after(DAY + HOUR - 1)
    assert reason(spec.plan("p")) == "duplicate_plan"
    assert reason(spec.after(1).plan("p")) is None


def test_a_plan_id_is_free_again_however_quiet_it_was_since() -> None:
    assert reason(used("p").after(DAY + HOUR).plan("p")) is None
    assert decision(failed(used("p").after(DAY + HOUR), "p")).verdict == "BLOCK"


def test_a_plan_id_is_not_free_again_while_nobody_saw_the_end_of_its_permit() -> None:
    assert reason(Spec().granted("p").after(3 * DAY).plan("p")) == "duplicate_plan"


def test_a_skipped_duplicate_does_not_lengthen_the_memory() -> None:
    spec = used("p").after(DAY)
    spec.plan("p")
    assert reason(spec.after(HOUR).plan("p")) is None


def test_a_plan_that_is_not_to_be_executed_does_not_use_up_its_id() -> None:
    spec = Spec()
    before = spec.plan("p", decision="SKIP")
    assert (decision(before).verdict, reason(before)) == ("SKIP", "not_execute")
    assert decision(spec.plan("p")).verdict == "EXECUTE"
    assert reason(spec.plan("p", decision="BLOCKED")) == "not_execute"
    assert reason(spec.plan("p")) == "duplicate_plan"


def test_an_entry_that_comes_again_after_its_plan_was_forgotten_says_nothing() -> None:
    spec = Spec(policy(max_plan_age_us=None))
    spec.plan(entry="1769256000000-5")
    assert spec.after(26 * HOUR).plan(entry="1769256000000-5") == ()


def test_a_skipped_plan_says_no_quantity() -> None:
    spec = Spec(policy(credentials=False)).granted("p", close_qty="0.01")
    found = decision(spec.plan("p", close_qty="0.01"))
    assert found.reason == "duplicate_plan"
    assert (found.computed_qty, found.computed_notional, found.expires_us) == (None, None, None)


def test_a_skipped_plan_counts_nowhere() -> None:
    spec = Spec()
    spec.plan("p", decision="SKIP")
    assert (spec.state.book("BTCUSDT").executions, spec.state.days) == ((), ())
    assert spec.state.counts.skipped == 1


def test_a_rejected_plan_does_not_use_up_its_id() -> None:
    spec = Spec()
    spec.plan("p", kill_score="NaN")
    assert decision(spec.plan("p")).verdict == "EXECUTE"


# -- malformed, lost, failed ---------------------------------------------------------------------------------------


def test_a_malformed_execute_plan_is_rejected_and_one_error() -> None:
    events = Spec().plan("p", kill_score="NaN")
    assert names(events) == ["PLAN_REJECTED", "ERROR_RECORDED"]
    rejected, error = only(events, PlanRejected), only(events, ErrorRecorded)
    assert rejected.reason == "kill_score is 'NaN', expected a finite number"
    assert (rejected.plan_id, rejected.symbol, rejected.decision) == ("p", "BTCUSDT", "EXECUTE")
    assert rejected.fields == plan_fields(plan_id="p", kill_score="NaN")
    assert (error.kind, error.detail, error.plan_id) == ("malformed_plan", rejected.reason, "p")


def test_an_entry_without_a_decision_is_one_error() -> None:
    events = Spec().plan(decision=None)
    assert names(events) == ["PLAN_REJECTED", "ERROR_RECORDED"]
    assert only(events, PlanRejected).decision is None
    assert only(Spec().plan(decision="D" * 50, kill_score=None), PlanRejected).decision == "D" * 32


def test_a_malformed_entry_with_another_decision_is_no_error() -> None:
    assert names(Spec().plan(decision="SKIP", kill_score=None)) == ["PLAN_REJECTED"]


def test_a_rejected_plans_fields_are_cut_at_four_kibibytes() -> None:
    told = only(Spec().plan(kill_score="x", steps="y" * 10_000), PlanRejected)
    assert sum(len(name) + len(value) for name, value in told.fields.items()) == 4096


def test_plans_that_were_trimmed_are_lost_once_and_one_error() -> None:
    spec = Spec()
    events = spec.fold(decider.lose(spec.state, ("1-1", "1-2"), spec.policy, NOON, count=5))
    assert names(events) == ["PLAN_LOST", "ERROR_RECORDED"]
    assert only(events, PlanLost) == PlanLost(count=5, entry_ids=("1-1", "1-2"))
    assert only(events, ErrorRecorded).kind == "plan_lost"
    more = decider.lose(spec.state, ("1-2", "1-3"), spec.policy, NOON, count=2)
    assert only(more, PlanLost) == PlanLost(count=1, entry_ids=("1-3",))
    assert decider.lose(spec.state, ("1-1", "1-2"), spec.policy, NOON, count=2) == ()
    assert spec.state.counts.lost == 5


def failed(
    spec: Spec, plan_id: str = "p", *, entry: str | None = None, error: str = "KeyError('x')", **changed: str
) -> tuple[Event, ...]:
    fields, entry = plan_fields(plan_id=plan_id, **changed), entry or spec.entry()
    plan = parse_plan(fields, entry_id=entry, now=spec.now, needs_close_qty=False)
    told = decider.fail(spec.state, plan, spec.policy, spec.situation, fields=fields, error=error, settings="")
    spec.fold(told.events)
    assert told.decision == (decision(told.events) if told.events else None)
    return told.events


def test_a_plan_whose_evaluation_fails_is_blocked_and_one_error() -> None:
    spec = Spec()
    events = failed(spec, entry="5-5")
    assert names(events) == ["PLAN_RECEIVED", "DECISION", "ERROR_RECORDED"]
    found = decision(events)
    assert (found.verdict, found.reason, found.error) == ("BLOCK", "evaluation_error", "KeyError('x')")
    assert (found.computed_qty, found.checks, len(spec.state.permits)) == (None, (), 0)
    assert only(events, ErrorRecorded).kind == "evaluation_error"
    assert failed(spec, entry="5-5") == ()


def test_a_failed_evaluation_never_revokes_what_a_plan_id_got_before() -> None:
    spec = Spec().granted("p")
    assert decision(failed(spec, "p")).verdict == "SKIP"
    assert decision(failed(spec, "q", decision="SKIP")).verdict == "SKIP"
    assert decision(failed(spec, "q")).verdict == "BLOCK"
    assert spec.state.plan("p") is not None
    assert len(spec.state.permits) == 1


# -- throttle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "account", "apply_mode", "why", "where"),
    [
        (Limits(per_hour=0), {}, "testnet", "hourly_limit_exceeded", "BTCUSDT"),
        (Limits(notional_per_day=Decimal(0)), {}, "testnet", "daily_limit_exceeded", "BTCUSDT"),
        (Limits(per_5min=0), {}, "dry_run", "burst_limit_exceeded", "BTCUSDT"),
        (Limits(per_5min=0), {"disarm_on_burst": False}, "testnet", "burst_limit_exceeded", "BTCUSDT"),
        (Limits(per_5min=0), {"auto_disarm": False}, "testnet", "burst_limit_exceeded", "BTCUSDT"),
        (Limits(), {"total_notional_per_day": Decimal(0)}, "testnet", "total_daily_limit_exceeded", None),
    ],
    ids=["hourly", "daily", "burst in dry run", "burst disarm off", "auto disarm off", "total"],
)
def test_a_cause_throttles_where_it_lies(
    limits: Limits, account: dict[str, Any], apply_mode: str, why: str, where: str | None
) -> None:
    spec = Spec(policy(limits=limits, **account))
    spec.apply_mode = apply_mode
    events = spec.plan()
    assert names(events) == [*PERMITTED, "THROTTLED"]
    assert reason(events) == why
    assert only(events, Throttled) == Throttled(symbol=where, reason=why, until_us=NOON + 5 * MINUTE)
    assert spec.state.mode.state == "THROTTLED"


@pytest.mark.parametrize(
    "changed", [{"market": market(None)}, {"market": market("0")}, {"action": "BUY"}, {"age": HOUR}]
)
def test_what_is_no_breach_has_no_consequences(changed: dict[str, Any]) -> None:
    assert names(Spec().plan(**changed)) == PERMITTED


def test_a_stop_updates_windows_block_and_lead_to_nothing() -> None:
    spec = Spec(policy(limits=Limits(per_hour=0)))
    assert names(spec.plan(action="UPDATE_SL")) == PERMITTED
    spec = Spec(policy(limits=Limits(per_5min=0)))
    assert names(spec.plan(action="UPDATE_SL")) == PERMITTED
    assert spec.state.mode.state == "ARMED"


def test_the_same_cause_again_does_not_lengthen_a_throttle() -> None:
    spec = Spec(policy(limits=HOURLY)).granted("a")
    spec.plan("b")
    assert names(spec.after(4 * MINUTE).plan("c")) == PERMITTED
    assert spec.state.mode.until == NOON + 5 * MINUTE
    assert names(spec.after(MINUTE).tick()) == ["RECOVERED"]


def test_a_new_cause_lengthens_a_throttle() -> None:
    spec = Spec(policy(limits=HOURLY)).granted("a")
    spec.plan("b")
    spec.after(4 * MINUTE).granted("c", symbol="ETHUSDT")
    assert only(spec.plan("d", symbol="ETHUSDT"), Throttled).symbol == "ETHUSDT"
    assert spec.state.mode.causes == (
        ("BTCUSDT", "hourly_limit_exceeded"),
        ("ETHUSDT", "hourly_limit_exceeded"),
    )
    assert spec.after(MINUTE).tick() == []
    assert spec.after(4 * MINUTE - 1).tick() == []
    assert names(spec.after(1).tick()) == ["RECOVERED"]


def test_another_reason_of_the_same_symbol_is_a_new_cause() -> None:
    spec = Spec(policy(limits=Limits(per_hour=1, per_5min=None, notional_per_day=Decimal(1426)))).granted("a")
    assert only(spec.plan("b"), Throttled).reason == "hourly_limit_exceeded"
    spec.policy = policy(limits=Limits(notional_per_day=Decimal(0)))
    assert only(spec.after(MINUTE).plan("c", action="FULL_CLOSE_PROPOSED"), Throttled).reason == "daily_limit_exceeded"
    assert spec.state.mode.until == NOON + 6 * MINUTE


def test_a_throttle_that_is_over_ends_before_the_next_plan_is_decided() -> None:
    spec = Spec(policy(limits=HOURLY)).granted("a")
    spec.plan("b")
    events = spec.after(5 * MINUTE).plan("c")
    assert names(events) == ["RECOVERED", *PERMITTED, "THROTTLED"]
    assert decision(events).mode == "ARMED"
    assert spec.state.mode.until == NOON + 10 * MINUTE


def test_a_throttle_that_is_over_is_over_for_the_question_whether_to_ask_the_exchange() -> None:
    spec = Spec(policy(throttle_per_5min=0, limits=HOURLY)).granted("a")
    spec.plan("b")
    assert reason(spec.plan("c", symbol="BTCUSDT")) == "hourly_limit_exceeded"
    spec.policy = policy(throttle_per_5min=0)
    assert names(spec.after(5 * MINUTE).plan("d")) == ["RECOVERED", *PERMITTED]


def test_a_throttle_ends_by_the_last_event_when_the_clock_steps_back() -> None:
    spec = Spec(policy(limits=HOURLY)).granted("a")
    spec.plan("b")
    spec.after(5 * MINUTE).given(ErrorRecorded(kind="x", detail=""))
    assert names(spec.after(-HOUR).tick()) == ["RECOVERED"]


def test_nothing_is_due_while_armed_or_disarmed() -> None:
    spec = Spec()
    assert spec.after(DAY).tick() == []
    spec.disarm()
    assert spec.after(DAY).tick() == []


def test_the_cause_of_a_throttle_that_is_over_counts_anew_even_where_no_plan_came_between() -> None:
    spec = Spec()
    malformed(spec, 3)
    assert spec.state.mode.state == "THROTTLED"
    events = spec.after(10 * MINUTE).plan(kill_score="NaN")
    assert names(events) == ["PLAN_REJECTED", "ERROR_RECORDED", "RECOVERED", "THROTTLED"]
    assert spec.state.mode.causes == ((None, "repeated_errors"),)
    assert spec.state.mode.until == NOON + 15 * MINUTE


# -- disarm --------------------------------------------------------------------------------------------------------


def test_a_burst_breach_disarms_and_revokes_every_outstanding_permit() -> None:
    spec = Spec().granted("a", "b").granted("x", symbol="ETHUSDT")
    spec.result("a")
    events = spec.plan("c")
    assert names(events) == [*PERMITTED, "DISARM_STARTED", "PERMIT_REVOKED", "PERMIT_REVOKED"]
    assert reason(events) == "burst_limit_exceeded"
    assert only(events, DisarmStarted) == DisarmStarted(
        reason="burst_limit_breach", context={"symbol": "BTCUSDT", "exec_5min": 3, "limit": 2}, epoch=2
    )
    assert [event for event in events if isinstance(event, PermitRevoked)] == [
        PermitRevoked(plan_id="b", symbol="BTCUSDT"),
        PermitRevoked(plan_id="x", symbol="ETHUSDT"),
    ]
    assert (spec.state.mode.state, spec.state.mode.epoch, len(spec.state.permits)) == ("DISARMED", 2, 0)


def test_a_burst_limit_of_zero_is_breached_by_the_first_plan() -> None:
    events = Spec(policy(limits=Limits(per_5min=0))).plan()
    assert only(events, DisarmStarted).context == {"symbol": "BTCUSDT", "exec_5min": 1, "limit": 0}


def test_an_unreadable_mode_of_the_apply_layer_is_no_dry_run() -> None:
    spec = Spec()
    spec.apply_mode = None
    assert "DISARM_STARTED" in names(spec.granted("a", "b").plan("c"))


def test_a_burst_that_the_hourly_limit_hides_throttles() -> None:
    spec = Spec(policy(limits=Limits(per_hour=2, per_5min=2))).granted("a", "b")
    events = spec.plan("c")
    assert reason(events) == "hourly_limit_exceeded"
    assert names(events) == [*PERMITTED, "THROTTLED"]


def test_a_burst_while_throttled_disarms() -> None:
    spec = Spec().granted("a", "b").given(Throttled(symbol="ETHUSDT", reason="x", until_us=NOON + HOUR))
    assert "DISARM_STARTED" in names(spec.plan("c"))
    assert spec.state.mode.until is None


def test_while_disarmed_nothing_disarms_or_throttles_again() -> None:
    spec = Spec().granted("a", "b")
    spec.disarm()
    assert names(spec.plan("c")) == PERMITTED
    assert reason(spec.plan("d")) == "disarmed"
    assert names(malformed(spec, 6)) == ["PLAN_REJECTED", "ERROR_RECORDED"] * 6
    assert spec.state.mode.epoch == 2


# -- errors --------------------------------------------------------------------------------------------------------


def test_errors_that_reach_half_of_their_limit_throttle_all_and_all_of_it_disarms() -> None:
    spec = Spec()
    assert names(malformed(spec, 2)) == ["PLAN_REJECTED", "ERROR_RECORDED"] * 2
    third = spec.plan(kill_score="NaN")
    assert only(third, Throttled) == Throttled(symbol=None, reason="repeated_errors", until_us=NOON + 5 * MINUTE)
    assert names(spec.plan(kill_score="NaN")) == ["PLAN_REJECTED", "ERROR_RECORDED"]
    fifth = spec.plan(kill_score="NaN")
    assert names(fifth) == ["PLAN_REJECTED", "ERROR_RECORDED", "DISARM_STARTED"]
    assert only(fifth, DisarmStarted) == DisarmStarted(
        reason="repeated_errors", context={"error_count": 5, "threshold": 5}, epoch=2
    )


def test_the_error_that_disarms_revokes_outstanding_permits() -> None:
    spec = Spec(policy(disarm_on_errors=1)).granted("a")
    assert names(spec.plan(kill_score="NaN"))[-2:] == ["DISARM_STARTED", "PERMIT_REVOKED"]


@pytest.mark.parametrize(
    ("limit", "first"),
    [(0, "DISARM_STARTED"), (1, "DISARM_STARTED"), (2, "THROTTLED"), (3, None), (None, None)],
)
def test_what_the_first_error_leads_to_depends_on_the_limit(limit: int | None, first: str | None) -> None:
    events = Spec(policy(disarm_on_errors=limit)).plan(kill_score="NaN")
    assert names(events)[2:] == ([] if first is None else [first])


def test_with_auto_disarm_off_errors_throttle_and_never_disarm() -> None:
    spec = Spec(policy(auto_disarm=False))
    assert names(malformed(spec, 9)).count("THROTTLED") == 1
    assert spec.state.mode.state == "THROTTLED"


@pytest.mark.parametrize(("age", "follows"), [(HOUR - 1, ["DISARM_STARTED"]), (HOUR, [])])
def test_errors_count_while_strictly_younger_than_their_window(age: int, follows: list[str]) -> None:
    spec = Spec(policy(disarm_on_errors=3))
    malformed(spec, 1)
    spec.after(age)
    spec.given(Recovered())
    malformed(spec, 1)
    assert [name for name in names(malformed(spec, 1)) if name == "DISARM_STARTED"] == follows


def test_errors_of_any_kind_count_together() -> None:
    spec = Spec()
    malformed(spec, 2)
    failed(spec)
    spec.fold(decider.lose(spec.state, ("1-1",), spec.policy, NOON, count=1))
    assert names(spec.fold(tuple(failed(spec, "q"))))[3:4] == ["DISARM_STARTED"]


def test_failures_of_the_exchange_do_not_count() -> None:
    spec = Spec()
    for number in range(20):
        assert names(spec.plan(f"p{number}", market=market(None, None))) == PERMITTED
    assert spec.state.counts.errors == 0


def test_rearming_clears_the_errors() -> None:
    spec = Spec()
    malformed(spec, 5)
    spec.rearm(force=True)
    assert names(malformed(spec, 2)) == ["PLAN_REJECTED", "ERROR_RECORDED"] * 2


def test_a_long_error_is_cut() -> None:
    spec = Spec()
    events = failed(spec, error="y" * 900)
    assert (decision(events).error, only(events, ErrorRecorded).detail) == ("y" * 500, "y" * 500)
    (error,) = decider.record_error(spec.state, spec.policy, NOON, kind="x", detail="y" * 900)
    assert isinstance(error, ErrorRecorded)
    assert len(error.detail) == 500


# -- the end of permits --------------------------------------------------------------------------------------------


def test_an_unused_permit_is_taken_back_and_its_place_released() -> None:
    spec = Spec().granted("a")
    assert spec.after(59 * SECOND).take_back("a") == (PermitExpired(plan_id="a", symbol="BTCUSDT"),)
    assert spec.state.book("BTCUSDT").executions == ()
    assert spec.state.book("BTCUSDT").days == ()
    assert spec.state.days == ()
    assert spec.take_back("a") == ()


@pytest.mark.parametrize(("left", "source"), [(1, "observed"), (0, "assumed"), (-HOUR, "assumed")])
def test_a_permit_that_is_gone_counts_as_used(left: int, source: str) -> None:
    spec = Spec().granted("a").after(MINUTE - left)
    assert spec.take_back("a", gone=True) == (PermitConsumed(plan_id="a", symbol="BTCUSDT", source=source),)
    assert len(spec.state.book("BTCUSDT").executions) == 1
    assert spec.take_back("a", gone=True) == ()


def test_a_permit_granted_before_midnight_and_taken_back_after_it_releases_yesterday() -> None:
    midnight = NOON + 12 * HOUR
    spec = Spec(now=midnight - SECOND // 10).granted("a")
    yesterday = spec.state.book("BTCUSDT").days
    spec.after(30 * SECOND).granted("b")
    assert [day.notional for day in spec.state.book("BTCUSDT").days] == [Decimal("1425.5")] * 2
    spec.after(29 * SECOND).take_back("a")
    (kept,) = spec.state.book("BTCUSDT").days
    assert kept.day == yesterday[0].day + 1
    assert spec.state.days[0].notional == Decimal("1425.5")
    assert len(spec.state.book("BTCUSDT").executions) == 1


def test_a_stop_update_taken_back_releases_its_own_window() -> None:
    spec = Spec().granted("a", action="UPDATE_SL").granted("b")
    spec.take_back("a")
    assert (len(spec.state.book("BTCUSDT").stops), len(spec.state.book("BTCUSDT").executions)) == (0, 1)


def test_a_revoked_permit_counts() -> None:
    spec = Spec().granted("a")
    spec.disarm()
    assert len(spec.state.book("BTCUSDT").executions) == 1
    assert spec.take_back("a") == ()


# -- by hand -------------------------------------------------------------------------------------------------------


def test_a_person_disarms() -> None:
    spec = Spec().granted("a")
    assert spec.disarm("fire drill", "anna") == [
        DisarmStarted(reason="fire drill", context={"operator": "anna"}, epoch=2, manual=True, operator="anna"),
        PermitRevoked(plan_id="a", symbol="BTCUSDT"),
    ]


def done(spec: Spec) -> Spec:
    epoch = spec.state.mode.epoch
    return spec.given(ManualDisarm(reason="r", context={}, action_taken="", epoch=epoch, operator="anna"))


@pytest.mark.parametrize("apply_mode", ["testnet", "dry_run", None])
def test_disarming_again_while_it_is_under_way_says_nothing(apply_mode: str | None) -> None:
    spec = Spec()
    spec.disarm()
    spec.apply_mode = apply_mode
    assert spec.disarm() == []


def test_disarming_again_when_it_is_done_says_nothing_while_the_file_is_at_dry_run() -> None:
    spec = Spec()
    spec.disarm()
    done(spec).apply_mode = "dry_run"
    assert spec.disarm() == []


@pytest.mark.parametrize("apply_mode", ["testnet", None])
def test_disarming_again_when_the_file_was_armed_behind_our_back_begins_a_new_epoch(apply_mode: str | None) -> None:
    spec = Spec()
    spec.disarm()
    done(spec).apply_mode = apply_mode
    assert only(spec.disarm(), DisarmStarted).epoch == 3


def test_a_person_disarms_whatever_the_automatic_settings_say() -> None:
    assert names(Spec(policy(auto_disarm=False)).disarm()) == ["DISARM_STARTED"]


def test_a_person_arms_again_and_begins_the_next_epoch() -> None:
    spec = Spec()
    spec.disarm()
    assert done(spec).rearm("checked", "bert") == [Rearmed(reason="checked", operator="bert", epoch=3, forced=False)]
    assert (spec.state.mode.state, spec.state.mode.disarm) == ("ARMED", None)
    assert decision(spec.plan()).epoch == 3


@pytest.mark.parametrize("spec", [Spec(), Spec().given(Throttled(symbol=None, reason="x", until_us=NOON + HOUR))])
def test_arming_what_is_armed_says_nothing(spec: Spec) -> None:
    spec.halt = True
    assert spec.rearm() == []


def test_arming_is_refused_while_a_disarm_is_unfinished() -> None:
    spec = Spec()
    spec.disarm("drill")
    with pytest.raises(RearmRefusedError, match="disarm of drill is unfinished, the Apply Layer may still trade; wait"):
        spec.rearm()
    spec.given(DisarmFailed(epoch=2, attempt=1, step="restart", error="no systemctl"))
    with pytest.raises(RearmRefusedError, match="may still trade: no systemctl; wait"):
        spec.rearm()
    assert only(spec.rearm(force=True), Rearmed).forced


def test_arming_is_refused_while_the_brake_is_set() -> None:
    spec = Spec()
    spec.disarm()
    done(spec).halt = True
    with pytest.raises(RearmRefusedError, match="emergency brake"):
        spec.rearm()
    assert names(spec.rearm(force=True)) == ["REARMED"]


def test_after_rearming_the_windows_are_as_full_as_before() -> None:
    spec = Spec().granted("a", "b")
    spec.plan("c")
    spec.rearm(force=True)
    assert reason(spec.plan("d")) == "burst_limit_exceeded"
    assert spec.state.mode.epoch == 4


def test_a_hold_blocks_and_says_so() -> None:
    spec = Spec().given(HistoryRestored(events=1, hold_until_us=NOON + SECOND))
    found = decision(spec.plan())
    assert (found.reason, found.history, found.asked) == ("history_hold", "history_hold", False)
