"""The public keys that follow from events."""

import json

import pytest

from events.keys import Keys
from events.store import Write
from events.types import (
    ApplyModeDrifted,
    ApplyModeRestored,
    AutoDisarm,
    DisarmStarted,
    DriftEnded,
    Event,
    HistoryAccepted,
    HistoryRestored,
    PermitConsumed,
    Rearmed,
    Recovered,
    SettingsLoaded,
    Throttled,
)
from projections import views
from projections.state import State, initial
from tests.spec import DAY, HOUR, NOON, SECOND
from tests.test_projections import decided, executed, expired, received, state_after

KEYS = Keys()
DAY_MS = 86_400_000
EXEC, DAILY, QTY = (f"quantum:governor:{name}" for name in ("exec:BTCUSDT", "daily:BTCUSDT", "daily_qty:BTCUSDT"))
STATE = "quantum:governor:state"
TODAY = "2026-01-24"
DISARM = DisarmStarted(reason="burst_limit_breach", context={"symbol": "BTCUSDT", "exec_5min": 3, "limit": 2}, epoch=2)


def written(*events: Event, state: State | None = None, at: int = NOON) -> dict[str, Write]:
    before = initial() if state is None else state
    after = state_after(*events, at=at, state=before.fork())
    writes = views.writes(before, after, events, KEYS)
    found = {write.key: write for write in writes}
    assert len(found) == len(writes)
    return found


def content(write: Write) -> object:
    return json.loads(write.values[0])


def test_a_permit_writes_the_executions_and_totals_of_its_symbol() -> None:
    found = written(received(), decided())
    assert found == {
        EXEC: Write("list", EXEC, (b"1769256000.000000",), DAY_MS),
        f"{DAILY}:{TODAY}": Write("set", f"{DAILY}:{TODAY}", (b"1425.5",), DAY_MS),
        f"{QTY}:{TODAY}": Write("set", f"{QTY}:{TODAY}", (b"0.015",), DAY_MS),
    }


def test_executions_are_listed_newest_first_and_at_most_a_hundred() -> None:
    state = initial()
    for number in range(120):
        state_after(decided(f"p{number}", expires=None), at=NOON + number * SECOND, state=state)
    (listed,) = (write for write in views.symbol_writes(state, "BTCUSDT", KEYS) if write.op == "list")
    assert len(listed.values) == 100
    assert listed.values[0] == b"1769256119.000000"
    assert listed.values[-1] == b"1769256020.000000"


def test_yesterdays_totals_are_written_too() -> None:
    state = state_after(decided("a"), decided("b", notional="0", qty="0.00000001"))
    state_after(decided("c", notional="0"), at=NOON + DAY, state=state)
    found = {write.key: write for write in views.symbol_writes(state, "BTCUSDT", KEYS)}
    assert found[f"{DAILY}:{TODAY}"].values == (b"1425.5",)
    assert found[f"{QTY}:{TODAY}"].values == (b"0.01500001",)
    assert found[f"{DAILY}:2026-01-25"].values == (b"0",)
    assert found[f"{QTY}:2026-01-25"].values == (b"0.015",)


def test_a_permit_taken_back_removes_what_it_counted() -> None:
    found = written(expired(), state=state_after(decided()))
    assert found[EXEC] == Write("list", EXEC, (), DAY_MS)
    assert found[f"{DAILY}:{TODAY}"].op == "del"


def test_an_execution_counted_again_writes_its_symbol_and_another_does_not() -> None:
    state = state_after(decided(), expired())
    assert written(executed(counted=True), state=state)[EXEC].values == (b"1769256000.000000",)
    assert written(executed(counted=False), state=state) == {}


@pytest.mark.parametrize(
    "event",
    [
        received(),
        decided(verdict="BLOCK"),
        decided(verdict="SKIP"),
        PermitConsumed(plan_id="p1", symbol="BTCUSDT", source="observed"),
        HistoryRestored(events=1, hold_until_us=1),
        HistoryAccepted(reason="r", operator="o", hold_until_us=1),
        AutoDisarm(reason="r", context={}, action_taken="", epoch=2),
        ApplyModeDrifted(epoch=2, apply_mode="live"),
        DriftEnded(epoch=2),
        ApplyModeRestored(epoch=3, reason="r", operator="o", apply_mode="live"),
    ],
    ids=lambda event: event.NAME,
)
def test_what_changes_no_public_key_writes_none(event: Event) -> None:
    assert written(event) == {}
    assert views.touched([event]) == (set(), False)


def test_symbols_are_written_in_order_whatever_the_events_order() -> None:
    events = [decided("a", symbol="B"), decided("b", symbol="A"), decided("c", symbol="C")]
    lists = [key for key, write in written(*events).items() if write.op == "list"]
    assert lists == [f"quantum:governor:exec:{symbol}" for symbol in "ABC"]


@pytest.mark.parametrize(
    ("event", "state", "reason", "epoch"),
    [
        (SettingsLoaded(digest="s", settings={}), "ARMED", None, 1),
        (Throttled(symbol="BTCUSDT", reason="why", until_us=1), "THROTTLED", "why", 1),
        (Recovered(), "ARMED", None, 1),
        (DISARM, "DISARMED", "burst_limit_breach", 2),
        (Rearmed(reason="checked", operator="o", epoch=3), "ARMED", "checked", 3),
    ],
    ids=lambda value: getattr(value, "NAME", ""),
)
def test_the_state_is_written_when_it_changes(event: Event, state: str, reason: str | None, epoch: int) -> None:
    write = written(event)[STATE]
    assert (write.op, write.ttl_ms) == ("set", 0)
    assert content(write) == {"state": state, "since": NOON / SECOND, "reason": reason, "epoch": epoch, "seq": 1}


def test_a_disarm_writes_its_lock_of_the_day() -> None:
    write = written(DISARM)[f"quantum:governor:disarm:{TODAY}"]
    assert (write.op, write.ttl_ms) == ("set", DAY_MS)
    assert content(write) == {
        "reason": "burst_limit_breach",
        "context": {"symbol": "BTCUSDT", "exec_5min": 3, "limit": 2},
        "timestamp": NOON / SECOND,
    }


def test_a_rearm_removes_the_lock_of_the_disarms_day_and_of_today() -> None:
    rearmed = Rearmed(reason="r", operator="o", epoch=3)
    found = written(rearmed, state=state_after(DISARM), at=NOON + HOUR)
    assert set(found) == {STATE, f"quantum:governor:disarm:{TODAY}"}
    found = written(rearmed, state=state_after(DISARM), at=NOON + DAY)
    assert {key for key, write in found.items() if write.op == "del"} == {
        f"quantum:governor:disarm:{TODAY}", "quantum:governor:disarm:2026-01-25",
    }  # fmt: skip


def test_a_rearm_without_a_disarm_removes_nothing() -> None:
    assert set(written(Rearmed(reason="r", operator="o", epoch=3))) == {STATE}


def test_a_disarm_and_a_rearm_in_one_commit_leave_no_lock() -> None:
    assert set(written(DISARM, Rearmed(reason="r", operator="o", epoch=3))) == {STATE}


def test_a_second_disarm_in_force_writes_its_own_lock() -> None:
    again = DisarmStarted(reason="again", context={}, epoch=3)
    found = written(again, state=state_after(DISARM), at=NOON + DAY)
    assert set(found) == {STATE, "quantum:governor:disarm:2026-01-25"}


def test_without_a_disarm_there_is_no_lock_to_write() -> None:
    with pytest.raises(ValueError, match="no disarm is in force"):
        views.disarm_write(initial(), KEYS)


def test_every_key_begins_with_the_prefix() -> None:
    keys = Keys("{acme}")
    events = (decided(), DISARM)
    after = state_after(*events)
    assert all(write.key.startswith("{acme}:governor:") for write in views.writes(initial(), after, events, keys))


def test_what_the_events_ask_for_is_the_state_and_what_was_counted_in_the_last_day() -> None:
    state = state_after(decided("p1"), decided("p2"))
    today = {STATE, EXEC, f"{DAILY}:{TODAY}", f"{QTY}:{TODAY}"}
    assert views.expected(state, KEYS, NOON).keys() == today
    assert views.expected(state, KEYS, NOON + DAY - SECOND).keys() == {STATE, EXEC}, "yesterday's totals are no loss"
    assert views.expected(state, KEYS, NOON + DAY).keys() == {STATE}


def test_the_disarm_in_force_is_asked_for_for_a_day() -> None:
    state = state_after(DISARM)
    assert views.expected(state, KEYS, NOON + DAY - 1).keys() == {STATE, f"quantum:governor:disarm:{TODAY}"}
    assert views.expected(state, KEYS, NOON + DAY).keys() == {STATE}
