import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import codec, types
from events.chain import GENESIS
from events.codec import CodecError, decode, encode, encode_all, microseconds, seconds
from events.types import (
    ALL,
    ApplyModeDrifted,
    ApplyModeRestored,
    AutoDisarm,
    Check,
    Decision,
    DisarmFailed,
    DisarmStarted,
    DriftEnded,
    Entry,
    ErrorRecorded,
    Event,
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

AT = 1_763_870_400_000_042
WIRE: dict[str, tuple[str, ...]] = {
    "PLAN_RECEIVED": ("v", "plan_id", "symbol", "action", "decision", "entry_id", "fields", "truncated"),
    "PLAN_REJECTED": ("v", "entry_id", "reason", "plan_id", "symbol", "decision", "fields", "truncated"),
    "PLAN_LOST": ("v", "count", "entry_ids"),
    "DECISION": (
        *("v", "plan_id", "symbol", "action", "verdict", "reason", "computed_qty", "computed_notional"),
        *("position_amt", "mark_price", "apply_mode", "checks", "entry_id", "mode", "epoch", "settings", "history"),
        *("halt", "asked", "legs", "position_error", "price_error", "expires_us", "error"),
    ),
    "PERMIT_CONSUMED": ("v", "plan_id", "symbol", "source"),
    "PERMIT_EXPIRED": ("v", "plan_id", "symbol"),
    "PERMIT_REVOKED": ("v", "plan_id", "symbol"),
    "EXECUTION": (
        *("v", "plan_id", "symbol", "decision", "executed", "entry_id", "permit", "executed_qty", "counted", "failed"),
        *("error", "fields", "truncated"),
    ),
    "UNPERMITTED_EXECUTION": ("v", "plan_id", "symbol", "entry_id", "permit"),
    "ERROR_RECORDED": ("v", "kind", "detail", "plan_id", "symbol"),
    "THROTTLED": ("v", "symbol", "reason", "until_us"),
    "RECOVERED": ("v",),
    "DISARM_STARTED": ("v", "reason", "context", "epoch", "manual", "operator"),
    "AUTO_DISARM": ("v", "reason", "context", "action_taken", "epoch", "proof"),
    "MANUAL_DISARM": ("v", "reason", "context", "action_taken", "epoch", "operator", "proof"),
    "DISARM_FAILED": ("v", "epoch", "attempt", "step", "error"),
    "REARMED": ("v", "reason", "operator", "epoch", "forced"),
    "APPLY_MODE_DRIFTED": ("v", "epoch", "apply_mode"),
    "DRIFT_ENDED": ("v", "epoch"),
    "APPLY_MODE_RESTORED": ("v", "epoch", "reason", "operator", "apply_mode", "proof"),
    "SETTINGS_LOADED": ("v", "digest", "settings", "limits", "version", "host"),
    "HISTORY_RESTORED": ("v", "events", "hold_until_us"),
    "HISTORY_ACCEPTED": ("v", "reason", "operator", "hold_until_us"),
}
"""What is on the wire, and so in histories that have to stay readable: a field may be added, never renamed."""

PLAN: dict[str, Any] = {"plan_id": "plan-1", "symbol": "BTCUSDT"}
EXAMPLES: tuple[Event, ...] = (
    PlanReceived(**PLAN, action="PARTIAL_50", decision="EXECUTE", entry_id="1-0", fields={"ü": "\x00", "a": ""}),
    PlanRejected(entry_id="1-0", reason="kill_score is 'NaN'"),
    PlanRejected(entry_id="1-0", reason="no symbol", plan_id="p", symbol="S", decision="EXECUTE", fields={"a": "b"}),
    PlanLost(count=3),
    PlanLost(count=2, entry_ids=("1-0", "2-0")),
    Decision(
        **PLAN,
        action="FULL_CLOSE_PROPOSED",
        verdict="EXECUTE",
        reason=None,
        computed_qty=Decimal("0.015"),
        computed_notional=Decimal("1425.5"),
        position_amt=Decimal("0.015"),
        mark_price=Decimal("95033.33333333333333333333"),
        apply_mode="live",
        checks=(Check("history", True), Check("hourly_limit", True, Decimal(1), Decimal(3)), Check("x", None)),
        entry_id="1-0",
        mode="ARMED",
        epoch=1,
        settings="abc",
        halt=True,
        asked=True,
        legs={"LONG": Decimal("-0.015")},
        expires_us=AT,
    ),
    Decision(
        **PLAN,
        action="X",
        verdict="BLOCK",
        reason="unknown_action",
        computed_qty=None,
        computed_notional=None,
        entry_id="1-0",
        mode="DISARMED",
        epoch=2,
        settings="",
        history="quarantined",
        position_error="timeout",
        price_error="timeout",
        error="boom",
    ),
    PermitConsumed(**PLAN, source="observed"),
    PermitExpired(**PLAN),
    PermitRevoked(**PLAN),
    Execution(
        **PLAN,
        decision="EXECUTE",
        executed=True,
        entry_id="1-0",
        permit="consumed",
        executed_qty=Decimal("0.00000001"),
        counted=True,
        error="e",
        fields={"a": "b"},
    ),
    UnpermittedExecution(**PLAN, entry_id="1-0", permit="none"),
    ErrorRecorded(kind="plan_lost", detail="2 plans"),
    Throttled(symbol=None, reason="total_daily_limit_exceeded", until_us=AT),
    Throttled(symbol="BTCUSDT", reason="hourly_limit_exceeded", until_us=AT),
    Recovered(),
    DisarmStarted(reason="burst_limit_breach", context={"symbol": "BTCUSDT", "exec_5min": 3, "limit": 2}, epoch=2),
    DisarmStarted(reason="by hand", context={}, epoch=3, manual=True, operator="ops"),
    AutoDisarm(
        reason="repeated_errors",
        context={"error_count": 5, "threshold": 5},
        action_taken="APPLY_MODE=dry_run + restart",
        epoch=2,
        proof={"mode": "dry_run", "pid": 4711, "took": 0.25, "lines": ["a"], "none": None},
    ),
    ManualDisarm(reason="news", context={}, action_taken="APPLY_MODE=dry_run", epoch=2, operator="ops"),
    DisarmFailed(epoch=2, attempt=3, step="restart", error="exit code 1"),
    Rearmed(reason="looked at it", operator="ops", epoch=3, forced=True),
    ApplyModeDrifted(epoch=2, apply_mode="live # was dry_run"),
    DriftEnded(epoch=2),
    ApplyModeRestored(epoch=3, reason="checked", operator="ops", apply_mode="testnet", proof={"apply_mode": "testnet"}),
    SettingsLoaded(digest="abc", settings={"A": "1"}, limits={"BTCUSDT": {"A": "2"}}, version="1", host="h"),
    HistoryRestored(events=3, hold_until_us=AT),
    HistoryAccepted(reason="looked at it", operator="ops", hold_until_us=AT),
)


def stored(name: str, data: object, *, seq: int = 7, timestamp: str = "1.000000") -> Entry:
    return Entry(name, seq, timestamp, data if isinstance(data, bytes) else json.dumps(data).encode(), "ff")


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.NAME)
def test_an_event_is_read_back_as_it_was_written(event: Event) -> None:
    entry = encode(event, after=Head(6, "a" * 64), at=AT)
    assert decode(entry) == Recorded(7, AT, event, entry.hash)
    assert json.loads(entry.data).keys() == set(WIRE[event.NAME])


def test_there_is_an_example_of_every_event() -> None:
    assert {type(event) for event in EXAMPLES} == set(ALL)


def test_names_and_fields_are_those_of_the_contract() -> None:
    assert {cls.NAME: cls.__struct_fields__ for cls in ALL} == WIRE


def test_every_event_starts_with_its_version() -> None:
    assert [json.loads(encode(event, after=GENESIS, at=0).data)["v"] for event in EXAMPLES] == [
        event.VERSION for event in EXAMPLES
    ]


def test_decimals_are_written_as_numbers_without_float_noise() -> None:
    entry = encode(EXAMPLES[5], after=GENESIS, at=0)
    for digits in (
        b'"computed_qty":0.015,',
        b'"computed_notional":1425.5,',
        b'"mark_price":95033.33333333333333333333,',
    ):
        assert digits in entry.data


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30, places=12) | st.none(),
    st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=3),
)
def test_any_amount_and_any_text_is_read_back_as_it_was_written(amount: Decimal | None, fields: dict[str, str]) -> None:
    event = Execution(**PLAN, decision="", executed=True, entry_id="", permit="", executed_qty=amount, fields=fields)
    assert decode(encode(event, after=GENESIS, at=0)).event == event


def test_events_of_one_moment_are_linked_one_to_the_next() -> None:
    entries = encode_all(EXAMPLES, after=Head(3, "a" * 64), at=AT)
    assert [entry.seq for entry in entries] == list(range(4, 4 + len(EXAMPLES)))
    assert {entry.timestamp for entry in entries} == {"1763870400.000042"}
    heads = [Head(3, "a" * 64), *(entry.head for entry in entries[:-1])]
    one_by_one = [encode(event, after=head, at=AT) for event, head in zip(EXAMPLES, heads, strict=True)]
    assert one_by_one == entries
    assert encode_all([], after=GENESIS, at=AT) == []


def test_a_field_of_a_later_version_of_the_program_is_no_trouble() -> None:
    entry = stored("PERMIT_EXPIRED", {"v": 1, "plan_id": "p", "symbol": "S", "added later": [1, {"a": None}]})
    assert decode(entry).event == PermitExpired(plan_id="p", symbol="S")


def test_only_auto_disarm_has_plain_fields() -> None:
    for event in EXAMPLES:
        fields = codec.plain_fields(encode(event, after=GENESIS, at=0))
        names = ["reason", "context", "action_taken"] if isinstance(event, AutoDisarm) else []
        assert [name for name, _ in fields] == names


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("NEWS", {"v": 1}, "unknown event 'NEWS'"),
        ("", {"v": 1}, "unknown event ''"),
        ("PERMIT_EXPIRED", {"v": 2, "plan_id": "p", "symbol": "S"}, "PERMIT_EXPIRED version 2"),
        ("PERMIT_EXPIRED", {"v": 0, "plan_id": "p", "symbol": "S"}, "PERMIT_EXPIRED version 0"),
        ("PERMIT_EXPIRED", {"v": "1", "plan_id": "p", "symbol": "S"}, "PERMIT_EXPIRED cannot be read"),
        ("PERMIT_EXPIRED", {"v": 1, "plan_id": "p"}, "missing required field `symbol`"),
        ("PERMIT_EXPIRED", {"plan_id": "p"}, "PERMIT_EXPIRED cannot be read"),
        ("PERMIT_EXPIRED", {"v": 1, "plan_id": 7, "symbol": "S"}, "plan_id"),
        ("PERMIT_EXPIRED", [], "PERMIT_EXPIRED cannot be read"),
        ("PERMIT_EXPIRED", b"", "PERMIT_EXPIRED cannot be read"),
        ("PERMIT_EXPIRED", b'{"v":1,"plan_id":"p"', "PERMIT_EXPIRED cannot be read"),
        ("PERMIT_EXPIRED", b'{"v":1,"plan_id":"\xff","symbol":"S"}', "PERMIT_EXPIRED cannot be read"),
    ],
)
def test_what_cannot_be_read_names_the_event_and_the_problem(name: str, data: object, problem: str) -> None:
    with pytest.raises(CodecError) as caught:
        decode(stored(name, data))
    assert str(caught.value).startswith("event 7: ")
    assert problem in str(caught.value)


def test_an_unreadable_time_names_the_event_and_the_problem() -> None:
    with pytest.raises(CodecError, match="event 7: RECOVERED cannot be read: timestamp '1' is not unix seconds"):
        decode(stored("RECOVERED", {"v": 1}, timestamp="1"))


# ---------------------------------------------------------------- older versions


class Renewed(types._Event, frozen=True, kw_only=True):
    """An event in its third version."""

    NAME: ClassVar[str] = "RENEWED"
    VERSION: ClassVar[int] = 3
    v: int = 3
    amount: Decimal
    unit: str
    tags: tuple[str, ...] = ()


def rename(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "qty"} | {"amount": data["qty"]}


STEPS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {
    ("RENEWED", 1): rename,
    ("RENEWED", 2): lambda data: data | {"unit": "base"},
}


@pytest.fixture
def renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(types.BY_NAME, "RENEWED", Renewed)
    monkeypatch.setitem(codec._DECODERS, "RENEWED", msgspec.json.Decoder(Renewed))
    for place, step in STEPS.items():
        monkeypatch.setitem(codec.UPCASTERS, place, step)


@pytest.mark.usefixtures("renewed")
@pytest.mark.parametrize(
    "data",
    [
        {"v": 1, "qty": 0.25, "tags": ["a"]},
        {"v": 2, "amount": 0.25, "tags": ["a"]},
        {"v": 3, "amount": 0.25, "unit": "base", "tags": ["a"]},
    ],
)
def test_every_older_version_is_read_as_the_present_one(data: dict[str, Any]) -> None:
    expected: Any = Renewed(amount=Decimal("0.25"), unit="base", tags=("a",))
    assert decode(stored("RENEWED", data)).event == expected


@pytest.mark.usefixtures("renewed")
def test_amounts_of_an_older_version_keep_every_digit() -> None:
    data = b'{"v":1,"qty":12345678901234567890.123456789012345678}'
    event: Any = decode(stored("RENEWED", data)).event
    assert event.amount == Decimal("12345678901234567890.123456789012345678")


@pytest.mark.usefixtures("renewed")
def test_an_older_version_that_happens_to_fit_goes_up_the_ladder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codec.UPCASTERS, ("RENEWED", 2), lambda data: data | {"unit": "changed"})
    event: Any = decode(stored("RENEWED", {"v": 2, "amount": 1, "unit": "was there"})).event
    assert (event.unit, event.v) == ("changed", 3)


@pytest.mark.usefixtures("renewed")
@pytest.mark.parametrize("data", [{"v": 1}, {"v": 1, "qty": "x"}, {"v": 4, "amount": 1, "unit": "base"}, {"qty": 1}])
def test_an_older_version_that_does_not_fit_its_step_cannot_be_read(data: dict[str, Any]) -> None:
    with pytest.raises(CodecError, match="event 7: RENEWED"):
        decode(stored("RENEWED", data))


@pytest.mark.usefixtures("renewed")
def test_a_missing_step_is_told_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(codec.UPCASTERS, ("RENEWED", 2))
    with pytest.raises(CodecError, match="event 7: RENEWED"):
        decode(stored("RENEWED", {"v": 1, "qty": 1}))


def test_the_ladder_of_the_program_is_whole() -> None:
    codec.check_ladder()
    codec.check_ladder([*ALL, Renewed], codec.UPCASTERS | STEPS)  # type: ignore[list-item]


@pytest.mark.parametrize("missing", STEPS)
def test_a_missing_step_of_the_ladder_is_refused(missing: tuple[str, int]) -> None:
    steps = {place: step for place, step in STEPS.items() if place != missing}
    with pytest.raises(CodecError, match="no upcaster"):
        codec.check_ladder([Renewed], steps)  # type: ignore[list-item]


@pytest.mark.parametrize("spare", [("RENEWED", 0), ("RENEWED", 3), ("NEWS", 1)])
def test_a_step_of_the_ladder_that_leads_nowhere_is_refused(spare: tuple[str, int]) -> None:
    with pytest.raises(CodecError, match="lead nowhere"):
        codec.check_ladder([Renewed], STEPS | {spare: rename})  # type: ignore[list-item]


# ---------------------------------------------------------------- time


@given(st.integers(min_value=0, max_value=4_102_444_800_000_000))
def test_times_are_read_back_as_they_were_written(at: int) -> None:
    assert microseconds(seconds(at)) == at
    assert float(seconds(at)) == pytest.approx(at / 1e6)


@pytest.mark.parametrize(
    ("at", "written"), [(0, "0.000000"), (1, "0.000001"), (1_763_870_400_100_000, "1763870400.100000")]
)
def test_times_are_unix_seconds_with_six_decimals(at: int, written: str) -> None:
    assert seconds(at) == written


@pytest.mark.parametrize(
    "written",
    [
        "",
        "1",
        "1.",
        "1.5",
        "1.0000000",
        "-1.000000",
        "1,000000",
        "1.00000x",
        " 1.000000",
        "1e3.000000",
        "\u0661.000000",
    ],
)
def test_any_other_time_is_refused(written: str) -> None:
    with pytest.raises(CodecError, match="six decimals"):
        microseconds(written)
