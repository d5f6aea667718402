"""Windows, totals, errors, the forkable table, the fold, and its digest."""

from decimal import Decimal
from itertools import pairwise

import msgspec
import pytest

from events.chain import GENESIS
from events.types import (
    AutoDisarm,
    Decision,
    DisarmFailed,
    DisarmStarted,
    ErrorRecorded,
    Event,
    Execution,
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
from projections import errors, permits, totals, windows
from projections.state import (
    Counts,
    Disarm,
    GapError,
    Mode,
    State,
    digest,
    evolve,
    fold,
    initial,
    prune,
)
from projections.table import Table
from projections.totals import Day
from tests.spec import DAY, HOUR, MINUTE, NOON, SECOND

TODAY = NOON // DAY


def received(entry_id: str = "1-1", plan_id: str = "p1") -> PlanReceived:
    return PlanReceived(
        plan_id=plan_id, symbol="BTCUSDT", action="PARTIAL_75", decision="EXECUTE", entry_id=entry_id, fields={}
    )


def decided(
    plan_id: str = "p1",
    verdict: str = "EXECUTE",
    *,
    symbol: str = "BTCUSDT",
    action: str = "PARTIAL_75",
    qty: str | None = "0.015",
    notional: str | None = "1425.5",
    expires: int | None = NOON + MINUTE,
) -> Decision:
    return Decision(
        plan_id=plan_id,
        symbol=symbol,
        action=action,
        verdict=verdict,
        reason=None if verdict == "EXECUTE" else "x",
        computed_qty=None if qty is None else Decimal(qty),
        computed_notional=None if notional is None else Decimal(notional),
        entry_id="1-1",
        mode="ARMED",
        epoch=1,
        settings="",
        expires_us=expires,
    )


def expired(plan_id: str = "p1", symbol: str = "BTCUSDT") -> PermitExpired:
    return PermitExpired(plan_id=plan_id, symbol=symbol)


def executed(plan_id: str = "p1", *, counted: bool, entry_id: str = "9-1") -> Execution:
    return Execution(
        plan_id=plan_id,
        symbol="BTCUSDT",
        decision="EXECUTE",
        executed=True,
        entry_id=entry_id,
        permit="expired" if counted else "consumed",
        counted=counted,
    )


def state_after(*events: Event, at: int = NOON, state: State | None = None) -> State:
    state = initial() if state is None else state
    start = state.seq + 1
    return fold((Recorded(seq, at, event, f"h{seq}") for seq, event in enumerate(events, start)), state)


# -- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "found"), [(100, 3), (109, 3), (110, 2), (129, 2), (130, 1), (139, 1), (140, 0), (10**9, 0)]
)
def test_a_window_holds_what_is_strictly_younger_than_it(now: int, found: int) -> None:
    assert windows.count((10, 30, 40), now=now, window=100) == found


def test_a_window_counts_executions_of_one_moment_each() -> None:
    assert windows.count((10, 10, 10), now=10, window=1) == 3
    assert windows.count((), now=10, window=1) == 0


def test_the_list_keeps_a_hundred_of_a_day_and_all_of_the_last_hour() -> None:
    times: tuple[int, ...] = ()
    for minute in range(30):
        times = windows.add(times, minute * MINUTE)
    assert len(times) == 30
    for minute in range(200):
        times = windows.add(times, DAY + minute * MINUTE)
    assert len(times) == 100
    assert times[-1] == DAY + 199 * MINUTE
    for number in range(300):
        times = windows.add(times, 2 * DAY + number)
    assert times == tuple(2 * DAY + number for number in range(300))


def test_what_is_a_day_old_is_dropped() -> None:
    assert windows.live((0, 1), now=DAY) == (1,)
    assert windows.live((0, 1), now=DAY + 1) == ()


def test_one_occurrence_is_removed_and_only_if_it_is_there() -> None:
    assert windows.remove((1, 2, 2, 3), 2) == (1, 2, 3)
    assert windows.remove((1, 2), 5) == (1, 2)


@pytest.mark.parametrize(
    ("times", "limit", "free"),
    [((), 2, 50), ((10,), 2, 50), ((10, 20), 2, 110), ((10, 20, 30), 2, 120), ((10, 20), 0, None), ((), 1, 50)],
)
def test_it_is_known_when_a_window_next_has_room(times: tuple[int, ...], limit: int, free: int | None) -> None:
    assert windows.next_free(times, now=50, window=100, limit=limit) == free


# -- totals and errors ---------------------------------------------------------------------------------------------


def test_a_day_adds_up_exactly() -> None:
    days: tuple[Day, ...] = ()
    for _ in range(10):
        days = totals.add(days, 5, Decimal("0.1"), Decimal("0.00000001"))
    assert days == (Day(5, Decimal(1), Decimal("0.0000001")),)


def test_a_day_on_which_everything_was_released_is_gone() -> None:
    days = totals.add((), 5, Decimal(3), Decimal(1))
    assert totals.add(days, 5, Decimal(-3), Decimal(-1)) == ()
    assert totals.on((), 5) == Day(5)


def test_today_and_yesterday_are_kept() -> None:
    days = tuple(Day(day, Decimal(1)) for day in (3, 4, 5))
    assert totals.live(days, day=5) == days[1:]
    assert [d.day for d in totals.add(days, 6, Decimal(1), Decimal(1))] == [5, 6]


def test_yesterday_can_be_released_after_midnight() -> None:
    days = totals.add(totals.add((), 4, Decimal(2), Decimal(1)), 5, Decimal(7), Decimal(3))
    assert totals.add(days, 4, Decimal(-2), Decimal(-1)) == (Day(5, Decimal(7), Decimal(3)),)


def test_errors_are_kept_for_a_day_and_never_more_than_a_thousand() -> None:
    times: tuple[int, ...] = ()
    for number in range(1500):
        times = errors.add(times, number)
    assert times == tuple(range(500, 1500))
    assert errors.live(times, now=DAY + 600) == tuple(range(601, 1500))


# -- table ---------------------------------------------------------------------------------------------------------


def test_a_fork_reads_through_and_keeps_its_writes_to_itself() -> None:
    base: Table[str, int] = Table()
    base.set("a", 1)
    base.set("b", 2)
    fork = base.fork()
    fork.set("a", 10)
    assert (fork.pop("b"), base.get("b")) == (2, 2)
    fork.set("c", 3)
    assert (fork.get("a"), fork.get("b"), fork.get("c"), fork.get("d")) == (10, None, 3, None)
    assert (base.get("a"), base.get("b"), base.get("c"), base.get("d")) == (1, 2, None, None)
    assert list(fork.items()) == [("a", 10), ("c", 3)]
    assert list(base.items()) == [("a", 1), ("b", 2)]
    assert (len(fork), len(base)) == (2, 2)


def test_a_fork_of_a_fork_reads_through_both() -> None:
    base: Table[str, int] = Table()
    base.set("a", 1)
    middle = base.fork()
    middle.set("b", 2)
    top = middle.fork()
    top.pop("a")
    assert list(top.items()) == [("b", 2)]
    assert list(middle.items()) == [("a", 1), ("b", 2)]


def test_a_written_key_keeps_its_place_and_a_renewed_one_is_the_newest() -> None:
    table: Table[str, int] = Table()
    for key in "abc":
        table.set(key, 0)
    table.set("a", 1)
    assert [key for key, _ in table.items()] == ["a", "b", "c"]
    table.renew("a", 2)
    assert [key for key, _ in table.items()] == ["b", "c", "a"]
    fork = table.fork()
    fork.renew("b", 3)
    assert [key for key, _ in fork.items()] == ["c", "a", "b"]


def test_the_oldest_are_dropped_up_to_the_first_that_is_not_old() -> None:
    table = Table.of({"a": 1, "b": 2, "c": 9, "d": 3})
    table.drop_while(lambda value: value < 5)
    assert list(table.items()) == [("c", 9), ("d", 3)]
    table.drop_while(lambda _: True)
    assert len(table) == 0


def test_the_newest_are_kept() -> None:
    table = Table.of({"a": 1, "b": 2, "c": 3})
    for count, kept in ((4, "abc"), (3, "abc"), (1, "c"), (0, "")):
        table.keep(count)
        assert "".join(key for key, _ in table.items()) == kept


def test_discarding_what_is_not_there_does_nothing() -> None:
    table: Table[str, int] = Table()
    assert table.pop("a") is None
    assert len(table) == 0
    fork = table.fork()
    assert fork.pop("a") is None
    assert list(fork.items()) == []
    assert fork.get("a") is None


# -- the fold ------------------------------------------------------------------------------------------------------


def test_the_state_before_the_first_event_is_armed_in_the_first_epoch() -> None:
    state = initial()
    assert (state.seq, state.hash) == GENESIS
    assert (state.mode, state.counts, state.time, state.first_at) == (Mode(), Counts(), 0, None)
    assert state.plan("p1") is None
    assert state.book("BTCUSDT").executions == ()


@pytest.mark.parametrize("seq", [0, 2, 5])
def test_an_event_that_does_not_follow_is_refused(seq: int) -> None:
    with pytest.raises(GapError, match=f"event {seq} does not follow: expected event 1") as refused:
        evolve(initial(), Recorded(seq, NOON, Recovered(), ""))
    assert (refused.value.expected, refused.value.actual) == (1, seq)


def test_folding_nothing_is_the_beginning() -> None:
    assert digest(fold([])) == digest(initial())


def test_time_never_steps_back_and_the_first_events_time_is_kept() -> None:
    state = state_after(Recovered())
    state_after(Recovered(), at=NOON - HOUR, state=state)
    assert (state.time, state.first_at, state.seq, state.hash) == (NOON, NOON, 2, "h2")
    state_after(decided(), at=NOON - HOUR, state=state)
    assert state.book("BTCUSDT").executions == (NOON,)


def test_a_received_plan_is_counted_and_its_entry_remembered() -> None:
    state = state_after(received("7-1"))
    assert (state.counts.plans, state.entries.get("7-1"), state.entries.get("7-2")) == (1, NOON, None)


def test_a_permit_holds_its_place_in_windows_and_totals() -> None:
    state = state_after(decided())
    book = state.book("BTCUSDT")
    assert (book.executions, book.stops) == ((NOON,), ())
    assert book.days == (Day(TODAY, Decimal("1425.5"), Decimal("0.015")),)
    assert state.days == (Day(TODAY, Decimal("1425.5")),)
    held = state.permits.get("p1")
    assert held is not None
    assert (held.symbol, held.at, held.expires_us, held.moves, held.epoch) == ("BTCUSDT", NOON, NOON + MINUTE, True, 1)
    plan = state.plan("p1")
    assert plan is not None
    assert (plan.verdict, plan.permit, plan.decided, plan.reservation) == ("EXECUTE", "outstanding", True, held)
    assert state.counts.allowed == 1


def test_a_permit_without_amounts_holds_a_place_and_no_amount() -> None:
    state = state_after(decided(qty=None, notional=None, expires=None))
    assert state.book("BTCUSDT").executions == (NOON,)
    assert state.book("BTCUSDT").days == ()
    held = state.permits.get("p1")
    assert held is not None
    assert held.expires_us == NOON


def test_a_stop_update_holds_its_place_apart() -> None:
    state = state_after(decided(action="UPDATE_SL", qty="0", notional="0"))
    assert (state.book("BTCUSDT").executions, state.book("BTCUSDT").stops) == ((), (NOON,))
    assert state.days == ()
    state_after(expired(), state=state)
    assert state.book("BTCUSDT").stops == ()


def test_a_block_and_a_skip_are_remembered_and_hold_no_place() -> None:
    state = state_after(decided("a", "BLOCK"), decided("b", "SKIP"))
    blocked, skipped = state.plan("a"), state.plan("b")
    assert blocked is not None
    assert skipped is not None
    assert (blocked.verdict, blocked.decided, skipped.verdict, skipped.decided) == ("BLOCK", True, "SKIP", False)
    assert (state.counts.blocked, state.counts.skipped, state.counts.allowed) == (1, 1, 0)
    assert state.book("BTCUSDT").executions == ()


def test_a_skip_does_not_forget_what_was_decided_before() -> None:
    state = state_after(decided("a"), decided("a", "SKIP"))
    plan = state.plan("a")
    assert plan is not None
    assert (plan.verdict, plan.permit) == ("EXECUTE", "outstanding")


@pytest.mark.parametrize(
    ("event", "permit", "executions"),
    [
        (PermitConsumed(plan_id="p1", symbol="BTCUSDT", source="observed"), "consumed", 1),
        (PermitExpired(plan_id="p1", symbol="BTCUSDT"), "expired", 0),
        (PermitRevoked(plan_id="p1", symbol="BTCUSDT"), "revoked", 1),
    ],
)
def test_only_an_expired_permit_gives_up_its_place(event: Event, permit: str, executions: int) -> None:
    state = state_after(decided(), event)
    plan = state.plan("p1")
    assert plan is not None
    assert plan.permit == permit
    assert len(state.book("BTCUSDT").executions) == executions
    assert len(state.days) == executions
    assert len(state.permits) == 0
    assert getattr(state.counts, permit) == 1


def test_the_end_of_a_permit_that_nobody_remembers_changes_only_the_counts() -> None:
    state = state_after(expired("never"))
    assert (state.counts.expired, len(state.plans), len(state.books)) == (1, 0, 0)


def test_an_execution_counts_again_only_when_it_says_so() -> None:
    state = state_after(decided(), expired(), executed(counted=False, entry_id="9-1"))
    assert state.book("BTCUSDT").executions == ()
    state_after(executed(counted=True, entry_id="9-2"), at=NOON + HOUR, state=state)
    assert state.book("BTCUSDT").executions == (NOON + HOUR,)
    assert state.counts.executions == 2
    assert (state.results.get("9-1"), state.results.get("9-2")) == (NOON, NOON + HOUR)


def test_an_execution_of_an_unknown_or_refused_plan_counts_nothing() -> None:
    state = state_after(decided("a", "BLOCK"), executed("a", counted=True), executed("never", counted=True))
    assert len(state.books) == 0
    assert state.counts.executions == 2


def test_rejected_and_lost_entries_are_remembered() -> None:
    state = state_after(PlanRejected(entry_id="7-1", reason="x"), PlanLost(count=3, entry_ids=("7-2",)))
    assert (state.entries.get("7-1"), state.entries.get("7-2")) == (NOON, NOON)
    assert (state.counts.rejected, state.counts.lost) == (1, 3)


def test_errors_are_counted_until_a_rearm() -> None:
    state = state_after(ErrorRecorded(kind="x", detail=""), ErrorRecorded(kind="y", detail=""))
    assert (state.errors, state.counts.errors) == ((NOON, NOON), 2)
    state_after(Rearmed(reason="r", operator="o", epoch=2), state=state)
    assert (state.errors, state.counts.errors) == ((), 2)


def test_a_throttle_keeps_when_and_why_it_began_and_gathers_causes() -> None:
    state = state_after(Throttled(symbol="BTCUSDT", reason="a", until_us=NOON + MINUTE))
    state_after(Throttled(symbol=None, reason="b", until_us=NOON + HOUR), at=NOON + SECOND, state=state)
    assert state.mode == Mode("THROTTLED", NOON, "a", 1, 1, causes=(("BTCUSDT", "a"), (None, "b")), until=NOON + HOUR)
    state_after(Recovered(), at=NOON + HOUR, state=state)
    assert state.mode == Mode("ARMED", NOON + HOUR, None, 1, 3)


def test_a_throttle_concerns_its_symbol_or_all() -> None:
    mode = Mode(causes=(("BTCUSDT", "a"),))
    assert (mode.throttles("BTCUSDT"), mode.throttles("ETHUSDT")) == (True, False)
    assert Mode(causes=((None, "a"),)).throttles("ETHUSDT")


def test_a_disarm_goes_from_started_over_failed_to_done() -> None:
    state = state_after(DisarmStarted(reason="drill", context={"a": 1}, epoch=2, manual=True, operator="anna"))
    assert state.mode.disarm == Disarm(NOON, "drill", {"a": 1}, 2, manual=True, operator="anna")
    assert (state.mode.state, state.mode.epoch, state.counts.disarms) == ("DISARMED", 2, 1)
    state_after(DisarmFailed(epoch=2, attempt=3, step="restart", error="boom"), state=state)
    assert state.mode.disarm is not None
    assert (state.mode.disarm.attempts, state.mode.disarm.error, state.mode.disarm.done) == (3, "boom", False)
    state_after(
        ManualDisarm(reason="drill", context={}, action_taken="", epoch=2, operator="anna"), at=NOON + 1, state=state
    )
    assert (state.mode.disarm.done, state.mode.disarm.error) == (True, None)
    assert (state.mode.since, state.mode.seq) == (NOON, 1)


def test_a_proof_of_another_epoch_proves_nothing() -> None:
    state = state_after(DisarmStarted(reason="drill", context={}, epoch=3))
    state_after(AutoDisarm(reason="drill", context={}, action_taken="", epoch=2), state=state)
    assert state.mode.disarm is not None
    assert not state.mode.disarm.done
    armed = state_after(AutoDisarm(reason="drill", context={}, action_taken="", epoch=1))
    assert armed.mode.disarm is None


def test_the_settings_in_force_are_the_last_ones_loaded() -> None:
    first, second = (SettingsLoaded(digest=name, settings={}) for name in "ab")
    state = state_after(first)
    assert (state.mode.since, state.mode.seq) == (NOON, 1)
    state_after(second, at=NOON + HOUR, state=state)
    assert state.settings == second
    assert (state.mode.since, state.mode.seq) == (NOON, 1)


def test_a_hold_only_ever_gets_longer() -> None:
    state = state_after(HistoryRestored(events=1, hold_until_us=NOON + MINUTE))
    state_after(HistoryAccepted(reason="r", operator="o", hold_until_us=NOON), state=state)
    assert state.hold_until == NOON + MINUTE


def test_an_unpermitted_execution_by_itself_changes_nothing() -> None:
    state, other = state_after(Recovered()), state_after(Recovered())
    state_after(UnpermittedExecution(plan_id="p", symbol="S", entry_id="1-1", permit="none"), state=state)
    assert (state.mode, state.counts) == (other.mode, other.counts)


def test_a_fork_of_the_state_leaves_it_as_it_is() -> None:
    state = state_after(received(), decided())
    before = digest(state)
    fork = state.fork()
    state_after(received("1-2", "p2"), decided("p2"), expired(), executed(counted=True), state=fork)
    assert digest(state) == before
    assert digest(fork) != before
    again = state_after(received("1-2", "p2"), decided("p2"), expired(), executed(counted=True), state=state)
    assert digest(again) == digest(fork)


def test_a_plan_is_forgotten_after_twenty_five_hours() -> None:
    state = state_after(
        decided(), executed(counted=False), PermitConsumed(plan_id="p1", symbol="BTCUSDT", source="result")
    )
    state_after(Recovered(), at=NOON + 25 * HOUR - 1, state=state)
    assert state.plan("p1") is not None
    state_after(Recovered(), at=NOON + 25 * HOUR, state=state)
    assert state.plan("p1") is None


def test_a_plan_whose_permit_nobody_saw_the_end_of_is_remembered_however_old_it_is() -> None:
    state = state_after(decided())
    state_after(Recovered(), at=NOON + 9 * DAY, state=state)
    prune(state)
    assert state.plan("p1", now=NOON + 10 * DAY) is not None
    state_after(PermitConsumed(plan_id="p1", symbol="BTCUSDT", source="assumed"), at=NOON + 9 * DAY, state=state)
    assert state.plan("p1") is None


def test_what_a_permit_of_a_forgotten_plan_comes_to_is_not_said_of_the_plan_that_came_after_it() -> None:
    state = state_after(decided(), PermitConsumed(plan_id="p1", symbol="BTCUSDT", source="assumed"))
    state_after(decided(verdict="BLOCK"), at=NOON + 26 * HOUR, state=state)
    state_after(PermitExpired(plan_id="p1", symbol="BTCUSDT"), at=NOON + 26 * HOUR, state=state)
    plan = state.plan("p1")
    assert plan is not None
    assert (plan.verdict, plan.permit) == ("BLOCK", "none")


def test_the_latest_notes_are_remembered() -> None:
    started = [
        DisarmStarted(reason="r", context={"noted_us": n}, epoch=n, manual=True, operator="anna") for n in range(1, 30)
    ]
    assert state_after(*started).noted == tuple(range(14, 30))


# -- memory and digest ---------------------------------------------------------------------------------------------


def busy(count: int, *, every: int, symbols: int) -> list[Recorded]:
    """A long history: plans of changing symbols, every third permit taken back, and some results."""
    events: list[Recorded] = []
    for number in range(count):
        at, plan_id, symbol = NOON + number * every, f"p{number}", f"S{number % symbols}"
        told: list[Event] = [received(f"{number}-1", plan_id), decided(plan_id, symbol=symbol)]
        if number % 3 == 0:
            told.append(expired(plan_id, symbol))
        else:
            told.append(PermitConsumed(plan_id=plan_id, symbol=symbol, source="observed"))
        told.append(executed(plan_id, counted=number % 6 == 0, entry_id=f"{number}-2"))
        events += [Recorded(len(events) + i, at, event, f"h{len(events) + i}") for i, event in enumerate(told, 1)]
    return events


def test_memory_is_bounded_and_what_is_forgotten_changes_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("projections.state.ENTRIES_KEPT", 50)
    events = busy(1200, every=3 * MINUTE, symbols=1200)
    pruned = fold(events)
    kept = initial()
    kept.forked = True  # the one way to fold without ever pruning
    fold(events, kept)
    assert (len(kept.plans), len(kept.entries), len(kept.results)) == (1200, 1200, 1200)
    assert digest(kept) == digest(pruned)
    prune(pruned)
    assert digest(kept) == digest(pruned)
    assert len(pruned.plans) == 25 * 20
    assert (len(pruned.entries), len(pruned.results), len(pruned.permits)) == (50, 50, 0)
    assert len(pruned.books) == 1200 - 240  # those of the day before yesterday are gone


def test_an_idle_book_goes_when_the_days_it_counts_are_out_of_reach() -> None:
    state = state_after(decided("a", symbol="OLD"), decided("b", symbol="STOP", action="UPDATE_SL"))
    state_after(Recovered(), at=NOON + DAY - 1, state=state)
    prune(state)
    assert [symbol for symbol, _ in state.books.items()] == ["OLD", "STOP"]
    state_after(Recovered(), at=NOON + DAY + 12 * HOUR, state=state)
    prune(state)
    assert list(state.books.items()) == []


def test_pruning_happens_by_itself_and_never_on_a_fork() -> None:
    state = state_after(*[Recovered()] * 1021, decided(), PermitRevoked(plan_id="p1", symbol="BTCUSDT"))
    fork = state_after(Recovered(), at=NOON + 2 * DAY, state=state.fork())
    assert (fork.seq, len(fork.plans)) == (1024, 1)
    unpruned = digest(fork)
    state_after(Recovered(), at=NOON + 2 * DAY, state=state)
    assert (state.seq, len(state.plans)) == (1024, 0)
    assert digest(state) == unpruned


def test_the_digest_of_every_beginning_is_its_own() -> None:
    events = busy(20, every=SECOND, symbols=3)
    digests = [digest(fold(events[:n])) for n in range(len(events) + 1)]
    assert len(set(digests)) == len(digests)


def test_folding_on_is_folding_from_the_beginning() -> None:
    events = busy(30, every=MINUTE, symbols=3)
    whole = digest(fold(events))
    for cut in (0, 1, 17, len(events)):
        assert digest(fold(events[cut:], fold(events[:cut]))) == whole


@pytest.mark.parametrize(
    "change",
    [
        decided("q"),
        decided("q", "BLOCK"),
        decided("q", "SKIP"),
        expired(),
        ErrorRecorded(kind="x", detail=""),
        Throttled(symbol=None, reason="x", until_us=1),
        DisarmStarted(reason="x", context={}, epoch=2),
        SettingsLoaded(digest="other", settings={}),
        HistoryRestored(events=1, hold_until_us=NOON * 2),
        PlanLost(count=1),
        received("5-5"),
        executed(counted=True),
    ],
    ids=lambda event: event.NAME,
)
def test_the_digest_sees_every_part_of_the_state(change: Event) -> None:
    start = (received(), decided())
    plain = UnpermittedExecution(plan_id="p", symbol="S", entry_id="1-1", permit="none")
    assert digest(state_after(*start, change)) != digest(state_after(*start, plain))


def test_the_digest_sees_what_became_of_a_permit_while_the_plan_is_remembered() -> None:
    one, two = (state_after(decided(), executed(counted=False)) for _ in range(2))
    plan = two.plan("p1")
    assert plan is not None
    one.plans.set("p1", msgspec.structs.replace(plan, permit="consumed"))
    two.plans.set("p1", msgspec.structs.replace(plan, permit="revoked"))
    assert digest(one) != digest(two)
    for state in (one, two):
        state_after(Recovered(), at=NOON + 25 * HOUR, state=state)
    assert digest(one) == digest(two)


def test_reservations_expire_later_than_they_begin() -> None:
    assert permits.MEMORY_US > DAY
    held = [r for _, r in state_after(decided("a"), decided("b")).permits.items()]
    assert all(one.at <= two.at < two.expires_us for one, two in pairwise(held))
