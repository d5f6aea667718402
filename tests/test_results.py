"""Results: how they are read, and the table of what follows from them."""

import json
from decimal import Decimal
from typing import Any

import pytest

from events.types import (
    AutoDisarm,
    DisarmStarted,
    ErrorRecorded,
    Execution,
    PermitConsumed,
    Rearmed,
    SettingsLoaded,
    Throttled,
    UnpermittedExecution,
)
from governor.policy import Limits, Policy
from governor.results import parse_result
from projections import views
from tests.spec import DAY, HOUR, MINUTE, NOON, SECOND, Spec, names, only, reason

TOLD = ["EXECUTION"]
AROUND = ["EXECUTION", "UNPERMITTED_EXECUTION"]
LOADED = SettingsLoaded(digest="s", settings={})


def steps(*quantities: object, status: str = "ok") -> str:
    return json.dumps([{"step": "close", "status": status, "executed_qty": quantity} for quantity in quantities])


def consumed(**changed: Any) -> Spec:
    spec = Spec(Policy(credentials=True, **changed)).granted("p1")
    spec.after(59 * SECOND).take_back("p1", gone=True)
    return spec


def expired(**changed: Any) -> Spec:
    spec = Spec(Policy(credentials=True, **changed)).granted("p1")
    spec.after(59 * SECOND).take_back("p1")
    return spec


def revoked(**changed: Any) -> Spec:
    """A permit revoked by a disarm, and armed again since."""
    spec = Spec(Policy(credentials=True, **changed)).granted("p1")
    spec.disarm()
    spec.rearm(force=True)
    return spec


def refused(**changed: Any) -> Spec:
    spec = Spec(Policy(credentials=True, **changed))
    spec.plan("p1", action="BUY")
    return spec


# -- what follows --------------------------------------------------------------------------------------------------


def test_an_execution_with_a_consumed_permit_leads_to_nothing_more() -> None:
    events = consumed().result()
    assert names(events) == TOLD
    told = only(events, Execution)
    assert (told.permit, told.executed, told.counted, told.error) == ("consumed", True, False, None)


def test_an_execution_with_an_outstanding_permit_consumes_it() -> None:
    spec = Spec().granted("p1")
    events = spec.result()
    assert names(events) == ["EXECUTION", "PERMIT_CONSUMED"]
    assert only(events, Execution).permit == "outstanding"
    assert only(events, PermitConsumed) == PermitConsumed(plan_id="p1", symbol="BTCUSDT", source="result")
    assert spec.after(59 * SECOND).take_back("p1") == ()
    assert len(spec.state.book("BTCUSDT").executions) == 1


def test_an_execution_with_an_expired_permit_is_counted_again_and_one_error() -> None:
    spec = expired()
    assert spec.state.book("BTCUSDT").executions == ()
    events = spec.after(MINUTE).result()
    assert names(events) == ["EXECUTION", "ERROR_RECORDED"]
    assert (only(events, Execution).permit, only(events, Execution).counted) == ("expired", True)
    assert only(events, ErrorRecorded).kind == "expired_permit_executed"
    assert spec.state.book("BTCUSDT").executions == (spec.now,)
    assert spec.state.book("BTCUSDT").days[0].notional == Decimal("1425.5")
    assert spec.state.days[0].notional == Decimal("1425.5")


def test_an_execution_counted_again_is_counted_once_only() -> None:
    spec = expired()
    spec.result()
    again = spec.result()
    assert names(again) == TOLD
    assert only(again, Execution).permit == "consumed"
    assert len(spec.state.book("BTCUSDT").executions) == 1


def test_an_execution_counted_again_counts_past_a_limit_and_blocks_the_next() -> None:
    spec = expired(limits=Limits(per_hour=2, per_5min=None)).granted("p2", "p3")
    spec.result("p1")
    assert len(spec.state.book("BTCUSDT").executions) == 3
    assert reason(spec.plan("p4")) == "hourly_limit_exceeded"


def test_an_execution_counted_again_counts_on_the_day_it_was_told() -> None:
    spec = Spec(now=NOON + 12 * HOUR - MINUTE).granted("p1")
    spec.after(59 * SECOND).take_back("p1")
    spec.after(MINUTE).result()
    (day,) = spec.state.book("BTCUSDT").days
    assert day.day == (NOON + 12 * HOUR) // DAY


def test_a_result_that_tells_no_execution_neither_consumes_nor_counts_again() -> None:
    failure = {"executed": "False", "decision": "ERROR"}
    spec = Spec().granted("p1")
    assert names(spec.result(**failure)) == ["EXECUTION", "ERROR_RECORDED"]
    assert len(spec.state.permits) == 1
    spec = expired()
    assert only(spec.result(**failure), Execution).counted is False
    assert spec.state.book("BTCUSDT").executions == ()
    assert names(revoked().result(**failure))[:2] == ["EXECUTION", "ERROR_RECORDED"]
    assert names(refused().result(**failure)) == TOLD


@pytest.mark.parametrize(("past", "permit"), [(revoked, "revoked"), (refused, "none")], ids=["revoked", "refused"])
def test_an_execution_nobody_permitted_disarms(past: Any, permit: str) -> None:
    spec = past().granted("other")
    epoch = spec.state.mode.epoch
    events = spec.result()
    assert names(events) == [*AROUND, "DISARM_STARTED", "PERMIT_REVOKED"]
    assert only(events, Execution).permit == permit
    told = only(events, UnpermittedExecution)
    assert (told.plan_id, told.symbol, told.permit) == ("p1", "BTCUSDT", permit)
    started = only(events, DisarmStarted)
    assert (started.reason, started.epoch, started.manual) == ("unpermitted_execution", epoch + 1, False)
    assert started.context == {"plan_id": "p1", "symbol": "BTCUSDT", "permit": permit}


def test_a_plan_that_was_only_skipped_was_never_permitted() -> None:
    spec = Spec()
    spec.plan("p1", decision="SKIP")
    assert only(spec.result(), Execution).permit == "none"
    assert spec.state.mode.state == "DISARMED"


def test_an_execution_of_an_unknown_plan_younger_than_our_first_event_disarms() -> None:
    spec = Spec().given(LOADED).after(MINUTE)
    events = spec.result("never-seen", symbol="ETHUSDT")
    assert names(events) == [*AROUND, "DISARM_STARTED"]
    told = only(events, UnpermittedExecution)
    assert (told.permit, told.symbol) == ("unknown", "ETHUSDT")


@pytest.mark.parametrize(("age", "follows"), [(MINUTE - 1000, AROUND), (MINUTE, TOLD), (DAY, TOLD)])
def test_an_execution_of_an_unknown_plan_from_before_our_first_event_leads_to_nothing(
    age: int, follows: list[str]
) -> None:
    spec = Spec().given(LOADED).after(MINUTE)
    events = spec.result("never-seen", entry=spec.entry(age=age))
    assert names(events)[:2] == follows
    assert only(events, Execution).permit == "unknown"


@pytest.mark.parametrize(("age", "follows"), [(25 * HOUR - 1000, AROUND), (25 * HOUR, TOLD)])
def test_an_execution_of_a_plan_older_than_we_can_know_leads_to_nothing(age: int, follows: list[str]) -> None:
    spec = Spec().given(LOADED).after(3 * DAY)
    assert names(spec.result("long-ago", entry=spec.entry(age=age)))[:2] == follows


def test_what_the_memory_has_just_lost_is_not_counted_again() -> None:
    spec = expired().after(25 * HOUR)
    told = only(spec.result(entry=spec.entry(age=25 * HOUR)), Execution)
    assert (told.permit, told.counted) == ("unknown", False)
    assert spec.state.book("BTCUSDT").executions == ()


def test_a_result_of_an_unknown_plan_before_the_very_first_event_leads_to_nothing() -> None:
    assert names(Spec().result("never-seen")) == TOLD


def test_a_result_entry_whose_time_cannot_be_read_is_taken_for_young() -> None:
    assert names(Spec().given(LOADED).result("never-seen", entry="whenever"))[:2] == AROUND


@pytest.mark.parametrize("account", [{"disarm_on_unpermitted": False}, {"auto_disarm": False}])
def test_an_execution_nobody_permitted_throttles_all_where_it_may_not_disarm(account: dict[str, Any]) -> None:
    spec = refused(**account)
    events = spec.result()
    assert names(events) == [*AROUND, "THROTTLED"]
    assert only(events, Throttled) == Throttled(symbol=None, reason="unpermitted_execution", until_us=NOON + 5 * MINUTE)
    assert names(spec.result()) == AROUND


def test_an_execution_nobody_permitted_is_told_and_disarms_nothing_more_while_disarmed() -> None:
    spec = Spec().granted("p1")
    spec.disarm()
    assert names(spec.result()) == AROUND
    assert spec.state.mode.epoch == 2


@pytest.mark.parametrize(
    ("quantity", "kinds"),
    [("0.015", []), ("0.01500001", ["excess_quantity"]), ("-0.02", ["excess_quantity"]), (None, []), ("nan", [])],
)
def test_more_than_was_permitted_is_one_error(quantity: str | None, kinds: list[str]) -> None:
    events = consumed().result(steps_results=steps(quantity))
    assert [event.kind for event in events if isinstance(event, ErrorRecorded)] == kinds


def test_without_a_permit_no_quantity_is_too_much() -> None:
    events = refused().result(executed="False", error="x", steps_results=steps("5", status="error"))
    assert names(events) == TOLD
    assert only(events, Execution).executed_qty == Decimal(5)


def test_what_follows_goes_by_the_last_event_when_the_clock_steps_back() -> None:
    spec = refused(auto_disarm=False).after(-HOUR)
    assert only(spec.result(), Throttled).until_us == NOON + 5 * MINUTE
    spec = consumed(disarm_on_errors=2).after(-HOUR)
    events = spec.result(steps_results=steps("0.02"))
    assert only(events, Throttled).until_us == NOON + 59 * SECOND + 5 * MINUTE


def test_the_quantities_of_all_steps_add_up() -> None:
    events = consumed().result(steps_results=steps("0.010", 0.005, "1e-8"))
    assert only(events, Execution).executed_qty == Decimal("0.01500001")
    assert only(events, ErrorRecorded).detail == "executed 0.01500001, permitted 0.015"


def test_a_step_that_failed_is_one_error() -> None:
    events = consumed().result(steps_results=steps("0.015", status="error"))
    error = only(events, ErrorRecorded)
    assert (error.kind, error.detail, error.plan_id, error.symbol) == (
        "execution_error", "a step failed", "p1", "BTCUSDT",
    )  # fmt: skip


def test_a_decision_error_for_a_plan_that_had_a_permit_is_one_error() -> None:
    events = consumed().result(decision="ERROR", executed="False", error="no margin")
    assert names(events) == ["EXECUTION", "ERROR_RECORDED"]
    assert only(events, Execution).error == "no margin"
    assert only(events, ErrorRecorded).detail == "no margin"


def test_a_decision_error_for_a_plan_that_never_had_a_permit_is_only_told() -> None:
    assert names(refused().result(decision="ERROR", executed="False", error="x")) == TOLD
    assert names(Spec().result("never-seen", decision="ERROR", executed="False")) == TOLD


def test_a_refusal_at_the_gate_is_told_and_no_error() -> None:
    events = refused().result(decision="BLOCKED", executed="False", error="missing_permit_or_redis")
    assert names(events) == TOLD
    assert only(events, Execution).executed is False


def test_a_result_that_tells_nothing_becomes_no_event() -> None:
    assert Spec().granted("p1").result(executed="False", decision="SKIP") == ()


def test_the_same_result_entry_again_says_nothing() -> None:
    spec = expired()
    spec.result(entry="1769256100000-9")
    assert spec.result(entry="1769256100000-9") == ()
    assert spec.state.counts.executions == 1


def test_an_excess_and_a_failed_step_are_two_errors() -> None:
    events = consumed().result(steps_results=steps("0.02", status="error"))
    assert [event.kind for event in events if isinstance(event, ErrorRecorded)] == [
        "excess_quantity",
        "execution_error",
    ]


def test_errors_of_results_count_towards_the_disarm() -> None:
    spec = consumed(disarm_on_errors=2)
    events = spec.result(steps_results=steps("0.02", status="error"))
    assert names(events)[-1] == "DISARM_STARTED"
    assert only(events, DisarmStarted).context == {"error_count": 2, "threshold": 2}


def test_errors_of_an_execution_nobody_permitted_count_where_it_does_not_disarm_itself() -> None:
    spec = revoked(disarm_on_errors=2, disarm_on_unpermitted=False)
    events = spec.result(steps_results=steps("0.02", status="error"))
    assert names(events) == [
        *AROUND, "ERROR_RECORDED", "ERROR_RECORDED", "THROTTLED", "DISARM_STARTED",
    ]  # fmt: skip
    assert only(events, DisarmStarted).reason == "repeated_errors"


def test_errors_of_an_execution_nobody_permitted_disarm_once() -> None:
    events = revoked(disarm_on_errors=1).result(steps_results=steps("0.02"))
    assert names(events) == [*AROUND, "ERROR_RECORDED", "DISARM_STARTED"]
    assert only(events, DisarmStarted).reason == "unpermitted_execution"


def test_a_disarm_by_a_result_revokes_what_is_outstanding_but_not_what_it_just_consumed() -> None:
    spec = Spec(Policy(credentials=True, disarm_on_errors=1)).granted("p1", "p2")
    assert names(spec.result("p1", steps_results=steps("0.02"))) == [
        "EXECUTION", "PERMIT_CONSUMED", "ERROR_RECORDED", "DISARM_STARTED", "PERMIT_REVOKED",
    ]  # fmt: skip
    assert spec.state.counts.revoked == 1


def test_a_result_that_names_another_symbol_is_booked_where_its_permit_was() -> None:
    spec = expired()
    events = spec.result(symbol="ETHUSDT")
    assert only(events, Execution).symbol == "BTCUSDT"
    assert only(events, Execution).fields["symbol"] == "ETHUSDT"
    assert views.touched(events) == ({"BTCUSDT"}, False)
    assert len(spec.state.book("BTCUSDT").executions) == 1


def test_a_stop_updates_result_counted_again_counts_in_its_own_window() -> None:
    spec = Spec().granted("p1", action="UPDATE_SL").after(59 * SECOND)
    spec.take_back("p1")
    spec.result()
    assert (len(spec.state.book("BTCUSDT").stops), len(spec.state.book("BTCUSDT").executions)) == (1, 0)


def test_a_result_after_a_rearm_is_matched_to_the_permit_of_the_epoch_before() -> None:
    spec = consumed()
    spec.disarm()
    spec.given(AutoDisarm(reason="r", context={}, action_taken="", epoch=2), Rearmed(reason="r", operator="o", epoch=3))
    assert only(spec.result(), Execution).permit == "consumed"


def test_a_long_error_and_long_fields_are_cut() -> None:
    told = only(consumed().result(error="e" * 9000, steps_results="s" * 9000), Execution)
    assert told.error == "e" * 500
    failed = consumed().result(error="e" * 9000, decision="ERROR")
    assert only(failed, ErrorRecorded).detail == "e" * 500
    assert sum(len(name) + len(value) for name, value in told.fields.items()) == 4096


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "executed"),
    [("True", True), ("true", True), (" TRUE ", True), ("1", True), ("False", False), ("", False), ("yes", False)],
)
def test_executed_is_read_as_python_writes_it(text: str, executed: bool) -> None:  # noqa: FBT001
    assert parse_result({"executed": text}, entry_id="1-1").executed is executed


@pytest.mark.parametrize(
    ("text", "quantity", "failed"),
    [
        ("", None, False),
        ("[]", None, False),
        ("not json", None, False),
        ('{"step": "close"}', None, False),
        ("[1, 2]", None, False),
        ('[{"executed_qty": "0.010"}, {"executed_qty": 0.005}, {"step": "sl"}]', "0.015", False),
        ('[{"executed_qty": null}, {"executed_qty": true}, {"executed_qty": "NaN"}]', None, False),
        ('[{"executed_qty": {}}, {"executed_qty": 1}]', "1", False),
        ('[{"executed_qty": "-0.5"}]', "0.5", False),
        (
            '[{"executed_qty": "12345678901234567890.123456789012345678"}]',
            "12345678901234567890.123456789012345678",
            False,
        ),
        ('[{"status": "ok"}, {"status": "ERROR"}]', None, True),
        ('[{"status": null}]', None, False),
    ],
)
def test_steps_are_read_leniently(text: str, quantity: str | None, failed: bool) -> None:  # noqa: FBT001
    found = parse_result({"steps_results": text}, entry_id="1-1")
    assert found.executed_qty == (None if quantity is None else Decimal(quantity))
    assert found.step_failed is failed


@pytest.mark.parametrize(
    ("fields", "matters"),
    [
        ({}, False),
        ({"executed": "False", "decision": "EXECUTE"}, False),
        ({"executed": "True"}, True),
        ({"error": "boom"}, True),
        ({"error": ""}, False),
        ({"decision": "ERROR"}, True),
        ({"steps_results": '[{"status": "error"}]'}, True),
    ],
)
def test_a_result_matters_when_it_tells_an_execution_or_an_error(
    fields: dict[str, str],
    matters: bool,  # noqa: FBT001
) -> None:
    assert parse_result(fields, entry_id="1-1").matters is matters


def test_long_names_are_cut() -> None:
    found = parse_result(dict.fromkeys(("plan_id", "symbol", "decision"), "x" * 200), entry_id="1-1")
    assert (found.plan_id, found.symbol, found.decision) == ("x" * 128, "x" * 32, "x" * 32)


def test_an_empty_result_is_read() -> None:
    found = parse_result({}, entry_id="1-1")
    assert (found.plan_id, found.symbol, found.decision, found.error, found.failed) == ("", "", "", None, False)
