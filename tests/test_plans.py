"""Reading plans: strict where a value is used, indifferent where it is not."""

from decimal import Decimal
from typing import Any

import pytest

from governor.plans import REQUIRED, MalformedPlanError, Plan, cut, entry_time, parse_plan
from tests.spec import NOON, SECOND, plan_fields

ENTRY = f"{NOON // 1000}-3"


def parse(*, entry_id: str = ENTRY, needs_close_qty: bool = False, now: int = NOON, **changed: Any) -> Plan:
    return parse_plan(plan_fields(**changed), entry_id=entry_id, now=now, needs_close_qty=needs_close_qty)


def refused(*, entry_id: str = ENTRY, needs_close_qty: bool = False, **changed: Any) -> MalformedPlanError:
    with pytest.raises(MalformedPlanError) as problem:
        parse(entry_id=entry_id, needs_close_qty=needs_close_qty, **changed)
    return problem.value


def test_a_plan_is_read_from_its_fields_and_its_entrys_id() -> None:
    assert parse(kill_score="0.35", close_qty="7", position_side="LONG", whatever="x") == Plan(
        plan_id="p1",
        symbol="BTCUSDT",
        action="PARTIAL_75",
        decision="EXECUTE",
        entry_id=ENTRY,
        at=NOON,
        kill_score=Decimal("0.35"),
        close_qty=None,
        position_side="LONG",
    )


def test_a_position_side_that_names_no_leg_means_the_whole_position() -> None:
    assert [parse(position_side=side).position_side for side in ("", "UP", "long")] == [None, None, "LONG"]


def test_a_stop_needs_no_quantity_and_so_none_is_looked_at() -> None:
    assert parse(action="UPDATE_SL", close_qty="NaN", needs_close_qty=True).close_qty is None


def test_the_close_quantity_is_read_only_where_it_is_used() -> None:
    assert parse(close_qty="0.010", needs_close_qty=True).close_qty == Decimal("0.01")
    assert parse(close_qty="nonsense").close_qty is None
    assert parse(close_qty="", needs_close_qty=True).close_qty is None
    assert parse(needs_close_qty=True).close_qty is None


def test_numbers_of_a_plan_that_is_not_to_be_executed_are_not_read() -> None:
    plan = parse(decision="SKIP", kill_score="NaN", close_qty="NaN", position_side="UP", needs_close_qty=True)
    assert (plan.execute, plan.kill_score, plan.close_qty) == (False, None, None)


def test_an_old_or_future_plan_that_is_not_to_be_executed_is_read() -> None:
    assert parse(decision="SKIP", entry_id="9999999999999-0").at == 9_999_999_999_999_000


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize(("value", "problem"), [(None, "missing"), ("", "empty")])
def test_a_required_field_that_is_not_there_is_named(name: str, value: str | None, problem: str) -> None:
    changed: dict[str, Any] = {name: value}
    assert str(refused(**changed)) == f"{name} is {problem}"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"plan_id": "a b"}, "plan_id is 'a b', expected 1 to 128 of A-Z a-z 0-9 . _ : -"),
        ({"plan_id": "p\n"}, "plan_id is 'p\\n', expected 1 to 128 of A-Z a-z 0-9 . _ : -"),
        ({"plan_id": "ü"}, "plan_id is 'ü', expected 1 to 128 of A-Z a-z 0-9 . _ : -"),
        ({"plan_id": "*"}, "plan_id is '*', expected 1 to 128 of A-Z a-z 0-9 . _ : -"),
        ({"symbol": "btcusdt"}, "symbol is 'btcusdt', expected 1 to 32 of A-Z 0-9 _"),
        ({"symbol": "BTC-USDT"}, "symbol is 'BTC-USDT', expected 1 to 32 of A-Z 0-9 _"),
        ({"kill_score": "NaN"}, "kill_score is 'NaN', expected a finite number"),
        ({"kill_score": "1e999"}, "kill_score is '1e999', expected a finite number"),
        ({"kill_score": "0,5"}, "kill_score is '0,5', expected a finite number"),
        ({"kill_score": "٣"}, "kill_score is '٣', expected a finite number"),
    ],
)
def test_a_problem_names_the_field_its_value_and_what_was_expected(changed: dict[str, Any], message: str) -> None:
    assert str(refused(**changed)) == message


def test_a_long_value_is_shown_shortened() -> None:
    assert str(refused(symbol="b" * 500)) == f"symbol is '{'b' * 57}...', expected 1 to 32 of A-Z 0-9 _"


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "-NaN", "sNaN", "0x1", "1_000", " 1", "1 ", "1" * 80, "1e31"])
def test_only_finite_numbers_of_a_likely_size_are_numbers(number: str) -> None:
    assert "kill_score" in str(refused(kill_score=number))
    assert "close_qty" in str(refused(close_qty=number, needs_close_qty=True))


@pytest.mark.parametrize(
    ("text", "number"), [("0", "0"), ("-0.0", "0"), ("+.5", "0.5"), ("5.", "5"), ("8E-1", "0.8"), ("1e2", "100")]
)
def test_numbers_may_be_written_as_python_writes_them(text: str, number: str) -> None:
    assert parse(kill_score=text).kill_score == Decimal(number)


@pytest.mark.parametrize("entry_id", ["", "1", "1-", "-1", "a-b", "1-2-3", "1.5-0", " 1-0", "1" * 16 + "-0", "1-0\n"])
def test_an_entry_id_that_is_none_is_refused(entry_id: str) -> None:
    assert "is no stream entry id" in str(refused(entry_id=entry_id))
    with pytest.raises(ValueError, match="is no stream entry id"):
        entry_time(entry_id)


def test_an_entry_up_to_five_seconds_ahead_of_the_clock_is_read() -> None:
    assert parse(entry_id=f"{(NOON + 5 * SECOND) // 1000}-0").at == NOON + 5 * SECOND
    assert str(refused(entry_id=f"{(NOON + 5 * SECOND) // 1000 + 1}-0")) == (
        "entry id is 5.0 s in the future, expected at most 5 s"
    )


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ({"kill_score": None}, True),
        ({"decision": None}, True),
        ({"decision": ""}, True),
        ({"decision": "SKIP", "kill_score": None}, False),
        ({"decision": "BLOCKED", "symbol": "?"}, False),
    ],
)
def test_execute_plans_and_entries_without_a_decision_count_as_errors(
    changed: dict[str, Any],
    counts: bool,  # noqa: FBT001
) -> None:
    assert refused(**changed).counts is counts


@pytest.mark.parametrize(
    ("changed", "usable"),
    [
        ({"kill_score": "x"}, ("p1", "BTCUSDT")),
        ({"plan_id": "a b"}, (None, "BTCUSDT")),
        ({"plan_id": None}, (None, "BTCUSDT")),
        ({"symbol": "?"}, ("p1", None)),
        ({"symbol": None, "plan_id": ""}, (None, None)),
    ],
)
def test_a_problem_keeps_the_plan_id_and_the_symbol_where_they_can_be_used(
    changed: dict[str, Any], usable: tuple[str | None, str | None]
) -> None:
    problem = refused(**changed)
    assert (problem.plan_id, problem.symbol) == usable


def test_no_fields_at_all_is_a_problem_that_counts() -> None:
    with pytest.raises(MalformedPlanError, match="plan_id is missing") as problem:
        parse_plan({}, entry_id=ENTRY, now=NOON, needs_close_qty=True)
    assert problem.value.counts


# -- cutting -------------------------------------------------------------------------------------------------------


def test_fields_that_fit_are_kept_as_they_are() -> None:
    fields = {"b": "2", "plan_id": "p", "a": "1", "c": ""}
    assert cut(fields, 13) == (fields, False)
    assert list(cut(fields, 13)[0]) == ["b", "plan_id", "a", "c"]


def test_what_a_decision_uses_is_kept_first_and_the_rest_is_shortened() -> None:
    fields = {"steps": "x" * 100, "plan_id": "p", "kill_score": "0.5"}
    assert cut(fields, 50) == ({"plan_id": "p", "kill_score": "0.5", "steps": "x" * 24}, True)
    used = {"steps": "x" * 100, "position_side": "LONG", "close_qty": "1"}
    assert list(cut(used, 60)[0]) == ["close_qty", "position_side", "steps"]


def test_a_field_for_whose_name_there_is_no_room_is_left_out() -> None:
    assert cut({"plan_id": "p", "steps": "x"}, 10) == ({"plan_id": "p"}, True)
    assert cut({"plan_id": "p", "steps": "x"}, 13) == ({"plan_id": "p"}, True)
    assert cut({"plan_id": "p", "steps": ""}, 10) == ({"plan_id": "p"}, True)


def test_a_long_name_is_shortened() -> None:
    assert cut({"n" * 200: "v", "a": "1"}, 1000) == ({"n" * 128: "v", "a": "1"}, True)


def test_a_value_is_never_cut_within_a_character() -> None:
    kept, cut_something = cut({"a": "üüü"}, 4)
    assert (kept, cut_something) == ({"a": "ü"}, True)
