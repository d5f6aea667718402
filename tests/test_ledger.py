"""The ledger over a store in memory: batches, conflicts, unmet requirements, unknown outcomes, lost history."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import pytest
import structlog.testing
from msgspec.structs import replace

from events import codec
from events.chain import GENESIS, link, verify
from events.keys import Keys
from events.store import (
    Ack,
    Commit,
    ConflictError,
    LateError,
    MemoryStore,
    RefusedError,
    Require,
    RequirementError,
    StoreError,
    UnavailableError,
    UnsentError,
    Write,
)
from events.types import (
    Decision,
    Entry,
    ErrorRecorded,
    Event,
    Head,
    PermitExpired,
    PlanReceived,
    PlanRejected,
    Recorded,
    Recovered,
)
from governor import decider
from governor import ledger as module
from governor.gates import Situation
from governor.ledger import HistoryError, Ledger, Outcome, Proposal, Propose
from governor.plans import parse_plan
from projections import views
from projections.state import State, digest, fold
from tests.spec import NOON, SECOND, TESTNET, market, plan_fields

KEYS = Keys()
PERMIT = "quantum:permit:p1"


class Flaky(MemoryStore):
    """A store whose next commits or reads fail as told: `before` and `after` mean without and with having happened."""

    def __init__(self, *trouble: str) -> None:
        super().__init__(lambda: NOON // 1000)
        self.trouble = list(trouble)
        self.commits: list[Commit] = []

    async def commit(self, commit: Commit) -> frozenset[str]:
        trouble = self.trouble.pop(0) if self.trouble else "none"
        if trouble == "before":
            raise UnavailableError("no answer")
        if trouble == "refused":
            raise RefusedError("OOM command not allowed")
        gone = await super().commit(commit)
        self.commits.append(commit)
        if trouble == "after":
            raise UnavailableError("no answer")
        return gone


def ledger(store: MemoryStore | None = None, **options: object) -> Ledger:
    async def no_wait(_seconds: float) -> None:
        await asyncio.sleep(0)

    given: dict[str, object] = {"sleep": no_wait} | options
    return Ledger(store or Flaky(), KEYS, lambda: NOON, **given)  # type: ignore[arg-type]


async def opened(store: MemoryStore | None = None, **options: object) -> Ledger:
    it = ledger(store, **options)
    await it.open()
    return it


def say(*events: Event, value: object = None) -> Propose:
    return lambda _state, _now: Proposal(events, value=value)


def error(kind: str) -> ErrorRecorded:
    return ErrorRecorded(kind=kind, detail="")


def plan(it: Ledger, plan_id: str = "p1", *, entry: str | None = None) -> Propose:
    """One plan's decision, as the daemon proposes it."""

    def propose(state: State, now: int) -> Proposal:
        fields, entry_id = plan_fields(plan_id=plan_id), entry or f"{NOON // 1000}-{plan_id[1:]}"
        parsed = parse_plan(fields, entry_id=entry_id, now=now, needs_close_qty=False)
        situation = Situation(now=now, apply_mode="testnet", halt=it.halted)
        decided = decider.decide(state, parsed, market(), TESTNET, situation, fields=fields)
        return Proposal(decided.events, acks=[Ack(KEYS.plans, "governor", entry_id)], value=decided.decision)

    return propose


def take_back(plan_id: str, *, gone: bool) -> Propose:
    def propose(state: State, now: int) -> Proposal:
        events = decider.take_back(state, plan_id, gone=gone, now=now)
        return Proposal(events, requires=[Require(KEYS.permit(plan_id), present=not gone)] if events else [])

    return propose


def names(store: MemoryStore) -> list[str]:
    return [entry.name for entry in store.entries]


def refold(store: MemoryStore) -> str:
    return digest(fold(codec.decode(entry) for entry in verify(store.entries)))


@contextlib.asynccontextmanager
async def running(it: Ledger) -> AsyncIterator[None]:
    task = asyncio.create_task(it.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# -- the next one is decided while one is on its way -----------------------------------------------------------------


class Slow(Flaky):
    """A store whose commits wait until they are let go."""

    def __init__(self, *trouble: str) -> None:
        super().__init__(*trouble)
        self.asked = 0
        self.go = asyncio.Event()

    async def commit(self, commit: Commit) -> frozenset[str]:
        self.asked += 1
        await self.go.wait()
        return await super().commit(commit)


class Told:
    """Proposes an event, and tells what it saw each time it was asked."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.saw: list[tuple[int, int]] = []
        """Number of the last event and errors counted."""

    def __call__(self, state: State, _now: int) -> Proposal:
        self.saw.append((state.seq, len(state.errors)))
        return Proposal([error(self.kind)], value=self.kind)


def once(kind: str) -> Propose:
    return lambda state, _now: Proposal([] if state.errors else [error(kind)])


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0)


async def two_in_turn(it: Ledger, store: Slow, first: Propose, second: Told) -> list[asyncio.Task[Outcome]]:
    """Two submissions; the first is on its way, the second was decided on what it will leave."""
    tasks = [asyncio.create_task(it.submit(each)) for each in (first, second)]
    await until(lambda: store.asked and second.saw)
    assert second.saw == [(1, 1)]
    assert it.state.seq == 0
    assert not any(task.done() for task in tasks)
    return tasks


@pytest.fixture
def one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every proposal is a commit of its own."""
    monkeypatch.setattr(module, "MAX_PROPOSALS", 1)


@pytest.mark.usefixtures("one_each")
async def test_what_waits_is_decided_while_a_commit_is_on_its_way() -> None:
    it = await opened(store := Slow())
    async with running(it):
        tasks = await two_in_turn(it, store, say(error("a")), second := Told("b"))
        store.go.set()
        await asyncio.gather(*tasks)
    assert second.saw == [(1, 1)]
    assert [commit.expected.seq for commit in store.commits] == [0, 1]
    assert digest(it.state) == refold(store)


@pytest.mark.usefixtures("one_each")
@pytest.mark.parametrize("trouble", ["before", "after", "refused"])
async def test_what_was_decided_ahead_is_decided_again_where_the_commit_before_it_went_wrong(trouble: str) -> None:
    it = await opened(store := Slow(trouble))
    async with running(it):
        tasks = await two_in_turn(it, store, once("a"), second := Told("b"))
        store.go.set()
        await asyncio.gather(*tasks)
    assert second.saw == [(1, 1), (1, 1)]
    assert [codec.decode(entry).event.kind for entry in store.entries] == ["a", "b"]  # type: ignore[union-attr]
    assert digest(it.state) == refold(store)


@pytest.mark.usefixtures("one_each")
async def test_what_was_decided_ahead_is_decided_again_where_others_wrote_first() -> None:
    store = Slow()
    it, other = await opened(store), await opened(store)
    async with running(it):
        tasks = await two_in_turn(it, store, say(error("a")), second := Told("b"))
        store.entries += codec.encode_all([error("theirs")], after=GENESIS, at=NOON)
        store.go.set()
        await asyncio.gather(*tasks)
    assert second.saw == [(1, 1), (2, 2)]
    assert it.conflicts == 1
    await other.catch_up()
    assert digest(it.state) == digest(other.state) == refold(store)


@pytest.mark.usefixtures("one_each")
async def test_what_was_decided_ahead_is_decided_again_where_the_answer_took_long() -> None:
    time = NOON
    store = Slow()
    it = Ledger(store, KEYS, lambda: time)
    await it.open()
    async with running(it):
        tasks = await two_in_turn(it, store, say(error("a")), second := Told("b"))
        time += module.AHEAD_US + 1
        store.go.set()
        await asyncio.gather(*tasks)
    assert second.saw == [(1, 1), (1, 1)]
    assert it.state.time == time


@pytest.mark.usefixtures("one_each")
async def test_what_is_urgent_comes_before_what_was_decided_ahead() -> None:
    it = await opened(store := Slow())
    async with running(it):
        tasks = await two_in_turn(it, store, say(error("a")), second := Told("b"))
        urgent = asyncio.create_task(it.submit(say(error("urgent")), urgent=True))
        await asyncio.sleep(0)
        store.go.set()
        await asyncio.gather(*tasks, urgent)
    assert second.saw == [(1, 1), (2, 2)]
    assert digest(it.state) == refold(store)


async def test_nothing_is_decided_ahead_of_what_a_revocation_found() -> None:
    it = await opened(store := Slow())
    store.go.set()
    async with running(it):
        await it.submit(plan(it))
        store.go.clear()
        burst = lambda state, now: Proposal(decider.disarm_by_hand(state, reason="r", operator="o", apply_mode=None))  # noqa: ARG005, E731
        tasks = [asyncio.create_task(it.submit(burst)), asyncio.create_task(it.submit(second := Told("b")))]
        await until(lambda: store.asked == 2)
        for _ in range(20):
            await asyncio.sleep(0)
        assert second.saw == []
        store.go.set()
        await asyncio.gather(*tasks)
    assert len(second.saw) == 1


async def test_what_is_started_is_sent_before_the_loop_comes_to_it() -> None:
    it = await opened(store := Slow())
    outcome = it.enter(say(error("a"), value="a"))
    it.start()
    it.start()
    await until(lambda: store.asked == 1)
    store.go.set()
    async with running(it):
        assert await outcome == Outcome(["a"], None)
        assert (await it.submit(say(error("b"), value="b"))).values == ["b"]
    assert [len(commit.entries) for commit in store.commits] == [1, 1]
    assert digest(it.state) == refold(store)


@pytest.mark.parametrize("trouble", ["before", "refused"])
async def test_what_is_urgent_comes_before_what_was_started_and_not_committed(trouble: str) -> None:
    it = await opened(store := Slow(trouble))
    started = it.enter(say(error("a")))
    it.start()
    urgent = [it.enter(say(error(kind)), urgent=True) for kind in ("first", "second")]
    store.go.set()
    async with running(it):
        await asyncio.gather(started, *urgent)
    assert [codec.decode(entry).event.kind for entry in store.entries] == ["first", "second", "a"]  # type: ignore[union-attr]


async def test_what_cannot_be_started_waits_for_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    it = await opened(store := Slow())

    def broken(_: object) -> NoReturn:
        raise RuntimeError("unexpected")

    waiting = [it.enter(say(error(kind)), wake=False) for kind in ("a", "b")]
    with monkeypatch.context() as patch:
        patch.setattr(store, "commit", broken)
        it.start()
    store.go.set()
    async with running(it):
        await asyncio.gather(*waiting)
    assert [codec.decode(entry).event.kind for entry in store.entries] == ["a", "b"]  # type: ignore[union-attr]


async def test_what_asks_for_news_is_not_started() -> None:
    it = await opened(store := Slow())
    asked = [asyncio.create_task(it.refresh()), asyncio.create_task(it.submit(say(error("a"))))]
    await asyncio.sleep(0)
    it.start()
    await asyncio.sleep(0)
    assert store.asked == 0
    store.go.set()
    async with running(it):
        await asyncio.gather(*asked)


# -- one ledger ----------------------------------------------------------------------------------------------------


async def test_what_is_proposed_is_stored_folded_and_acknowledged_in_one_step() -> None:
    it = await opened(store := Flaky())
    outcome = await it.propose(plan(it))
    (granted,) = outcome.values
    assert (granted.verdict, outcome.error) == ("EXECUTE", None)
    assert names(store) == ["PLAN_RECEIVED", "DECISION"]
    assert len(store.commits) == 1
    assert store.commits[0].grants
    assert store.acknowledged == {Ack(KEYS.plans, "governor", f"{NOON // 1000}-1")}
    assert digest(it.state) == refold(store)
    permit = store.get(PERMIT)
    assert permit is not None
    assert json.loads(permit[0])["computed_qty"] == 0.015
    assert json.loads(permit[0])["seq"] == 2
    assert store.get("quantum:governor:exec:BTCUSDT") == (b"1769256000.000000",)


async def test_a_permits_key_lives_as_long_as_the_permit() -> None:
    it = await opened(store := Flaky())
    await it.propose(plan(it))
    (write,) = (w for w in store.commits[0].writes if w.key == PERMIT)
    assert (write.op, write.ttl_ms) == ("set", 60_000)
    assert Write("del", KEYS.block("p1")) in store.commits[0].writes


async def test_a_block_writes_its_record_and_no_permit() -> None:
    it = await opened(store := Flaky())
    it.halted = True
    await it.propose(plan(it))
    record = store.get("quantum:governor:block:p1")
    assert record is not None
    assert json.loads(record[0]) == {"reason": "halted", "timestamp": NOON / SECOND, "symbol": "BTCUSDT"}
    assert store.get(PERMIT) is None
    assert store.commits[0].writes[0].ttl_ms == 3_600_000
    assert not store.commits[0].grants


@pytest.mark.parametrize(
    ("rejected", "record"),
    [
        (PlanRejected(entry_id="1-1", reason="x", plan_id="p1", symbol="S", decision="EXECUTE"), "S"),
        (PlanRejected(entry_id="1-1", reason="x", plan_id="p1"), ""),
        (PlanRejected(entry_id="1-1", reason="x", plan_id="p1", decision="SKIP"), None),
        (PlanRejected(entry_id="1-1", reason="x", symbol="S", decision="EXECUTE"), None),
    ],
)
async def test_a_rejected_plan_with_a_usable_id_gets_a_block_record(rejected: PlanRejected, record: str | None) -> None:
    it = await opened(store := Flaky())
    await it.propose(say(rejected))
    stored = store.get("quantum:governor:block:p1")
    assert (stored is None) is (record is None)
    if stored is not None:
        assert json.loads(stored[0]) == {"reason": "invalid_plan", "timestamp": NOON / SECOND, "symbol": record}


async def test_a_disarm_deletes_every_outstanding_permit_in_its_own_commit() -> None:
    it = await opened(store := Flaky())
    await it.propose(plan(it, "p1"), plan(it, "p2"))
    assert store.get(PERMIT) is not None
    outcome = await it.propose(plan(it, "p3"))
    assert outcome.values[0].reason == "burst_limit_exceeded"
    assert (store.get(PERMIT), store.get("quantum:permit:p2")) == (None, None)
    assert names(store)[-3:] == ["DISARM_STARTED", "PERMIT_REVOKED", "PERMIT_REVOKED"]
    assert len(store.commits) == 2


async def test_a_healed_key_never_takes_back_what_the_same_commit_says() -> None:
    store = Flaky()
    one = await opened(store)
    heal: Propose = lambda state, _now: Proposal(writes=[views.state_write(state, KEYS)])  # noqa: E731
    disarm: Propose = lambda state, _now: Proposal(  # noqa: E731
        decider.disarm_by_hand(state, reason="r", operator="anna", apply_mode="testnet")
    )
    await one.propose(heal, disarm)
    (value,) = await store.values(KEYS.state)
    assert value is not None
    assert json.loads(value)["state"] == "DISARMED"


async def test_each_proposal_of_a_batch_sees_what_the_ones_before_it_leave() -> None:
    it = await opened(store := Flaky())
    outcome = await it.propose(*(plan(it, f"p{number}") for number in range(1, 5)))
    assert [value.reason for value in outcome.values] == [None, None, "burst_limit_exceeded"]
    assert len(store.commits) == 1
    assert digest(it.state) == refold(store)
    outcome = await it.propose(plan(it, "p4"))
    assert [value.reason for value in outcome.values] == ["disarmed"], "decided once it is known what was revoked"


async def test_a_permit_that_is_revoked_in_the_commit_that_grants_it_leaves_no_key() -> None:
    it = await opened(store := Flaky())
    await it.propose(plan(it, "p1"), plan(it, "p2"), plan(it, "p3"))
    assert store.get(PERMIT) is None


async def test_a_proposal_without_events_only_acknowledges() -> None:
    it = await opened(store := Flaky())
    await it.propose(plan(it))
    outcome = await it.propose(plan(it))
    assert outcome.values == [None]
    assert names(store) == ["PLAN_RECEIVED", "DECISION"]
    assert store.commits[1].entries == []
    assert store.commits[1].acks


async def test_a_proposal_of_nothing_commits_nothing() -> None:
    it = await opened(store := Flaky())
    assert await it.propose(say(value=7)) == Outcome([7], None)
    assert await it.propose() == Outcome([], None)
    assert store.commits == []


async def test_a_proposal_that_raises_stops_its_own_sequence_only() -> None:
    def refuse(_state: State, _now: int) -> Proposal:
        raise LookupError("not like this")

    it = await opened(store := Flaky())
    async with running(it):
        first, second, third = await asyncio.gather(
            it.submit(say(error("a"), value=1), refuse, say(error("never"), value=2)),
            it.submit(refuse),
            it.submit(say(error("b"), value=3)),
        )
    assert (first.values, str(first.error)) == ([1], "not like this")
    assert (second.values, str(second.error)) == ([], "not like this")
    assert third == Outcome([3], None)
    assert [codec.decode(entry).event for entry in store.entries] == [error("a"), error("b")]


async def test_an_event_that_cannot_be_stored_is_its_proposers_trouble() -> None:
    it = await opened(store := Flaky())
    outcome = await it.propose(say(error("\ud800")), say(error("b")))
    assert isinstance(outcome.error, UnicodeEncodeError)
    assert (outcome.values, names(store)) == ([], [])
    assert (await it.propose(say(error("b")))).error is None


async def test_what_is_submitted_together_is_committed_together() -> None:
    it = await opened(store := Flaky())
    async with running(it):
        await asyncio.gather(*(it.submit(say(error(str(number)))) for number in range(10)))
    assert len(store.commits) == 1
    assert len(store.entries) == 10


async def test_a_batch_larger_than_a_commit_is_committed_in_parts() -> None:
    it = await opened(store := Flaky())
    many = [error("x")] * 200
    async with running(it):
        outcomes = await asyncio.gather(*(it.submit(say(*many, value=number)) for number in range(7)))
    assert [outcome.values for outcome in outcomes] == [[number] for number in range(7)]
    assert [len(commit.entries) for commit in store.commits] == [600, 600, 200]
    assert all(len(commit.entries) <= module.MAX_EVENTS + len(many) for commit in store.commits)
    assert digest(it.state) == refold(store)


async def test_what_is_folded_is_observed_and_what_was_there_at_the_start_is_not() -> None:
    seen: list[tuple[int, int]] = []

    def observe(recorded: Recorded, state: State) -> None:
        seen.append((recorded.seq, state.seq))

    store = Flaky()
    await (await opened(store)).propose(say(error("a"), error("b")))
    it = await opened(store, observe=observe)
    assert seen == []
    await (await opened(store)).propose(say(error("c")))
    await it.propose(say(error("d")))
    assert seen == [(3, 3), (4, 4)]


async def test_the_loop_tells_that_it_goes_round() -> None:
    turns: list[int] = []
    it = await opened(Flaky("before", "before"), turned=lambda: turns.append(1))
    async with running(it):
        await it.submit(say(error("a")))
    assert len(turns) == 3


async def test_a_cancelled_submitter_disturbs_nobody() -> None:
    it = await opened(store := Flaky())
    gone = asyncio.create_task(it.submit(say(error("a"))))
    await asyncio.sleep(0)
    gone.cancel()
    async with running(it):
        assert (await it.submit(say(error("b")))).error is None
    assert len(store.entries) == 2


async def test_a_cancelled_submitter_whose_requirement_is_unmet_disturbs_nobody() -> None:
    it = await opened(store := Flaky())
    unmet = Proposal([error("mine")], requires=[Require("nowhere", present=True)])
    gone = asyncio.create_task(it.submit(lambda _state, _now: unmet))
    await asyncio.sleep(0)
    gone.cancel()
    async with running(it), asyncio.timeout(2):
        assert (await it.submit(say(error("b")))).error is None
    assert [codec.decode(entry).event for entry in store.entries] == [error("b")]


async def test_a_keyed_chain_is_read_with_its_key_only() -> None:
    store = Flaky()
    it = await opened(store, audit_key=b"secret")
    await it.propose(say(error("a")))
    assert (await opened(store, audit_key=b"secret")).state.seq == 1
    with pytest.raises(HistoryError, match="event 1: its hash does not cover"):
        await opened(store)


# -- several ledgers -----------------------------------------------------------------------------------------------


async def test_whoever_comes_second_reads_on_and_decides_again() -> None:
    store = Flaky()
    one, two = await opened(store), await opened(store)
    await one.propose(plan(one, "p1"))
    outcome = await two.propose(plan(two, "p1", entry="1769256000000-77"))
    assert outcome.values[0].reason == "duplicate_plan"
    assert two.conflicts == 1
    await one.propose(say(error("a")))
    async with running(two):
        await two.refresh()
    assert digest(one.state) == digest(two.state) == refold(store)


async def test_two_ledgers_never_both_grant_the_last_place() -> None:
    store = Flaky()
    one, two = await opened(store), await opened(store)
    async with running(one), running(two):
        outcomes = await asyncio.gather(
            *(it.submit(plan(it, f"p{number}")) for number, it in enumerate([one, two] * 3, 1))
        )
        await asyncio.gather(one.refresh(), two.refresh())
    verdicts = [outcome.values[0].verdict for outcome in outcomes]
    assert verdicts.count("EXECUTE") == 2
    assert digest(one.state) == digest(two.state) == refold(store)
    assert one.conflicts + two.conflicts > 0


async def test_a_refresh_folds_what_others_committed() -> None:
    store = Flaky()
    one, two = await opened(store), await opened(store)
    await one.propose(say(error("a")))
    async with running(two):
        await two.refresh()
    assert two.state.seq == 1


async def test_what_is_committed_between_reading_and_looking_at_the_end_is_read_too() -> None:
    class Busy(Flaky):
        late: Propose | None = None

        async def head(self) -> Head:
            late, self.late = self.late, None
            if late is not None:
                await (await opened(self)).propose(late)
            return await super().head()

    store = Busy()
    it = await opened(store)
    await it.propose(say(error("a")))
    store.late = say(error("b"))
    await it.catch_up()
    assert it.state.seq == 2


async def test_a_long_history_is_read_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Flaky()
    await (await opened(store)).propose(say(*[error("x")] * 10))
    for page in (1, 3, 5, 10, 11):
        monkeypatch.setattr(module, "PAGE", page)
        it = await opened(store)
        assert (it.state.seq, digest(it.state)) == (10, refold(store))


# -- requirements and the brake ------------------------------------------------------------------------------------


async def test_a_permit_is_taken_back_only_while_its_key_is_there() -> None:
    it = await opened(store := Flaky())
    await it.propose(plan(it))
    assert store.take(PERMIT)
    with pytest.raises(RequirementError):
        await it.propose(take_back("p1", gone=False))
    assert it.state.permits.get("p1") is not None
    await it.propose(take_back("p1", gone=True))
    assert names(store)[-1] == "PERMIT_CONSUMED"


async def test_a_permit_that_is_still_there_was_not_consumed() -> None:
    it = await opened(store := Flaky())
    await it.propose(plan(it))
    with pytest.raises(RequirementError):
        await it.propose(take_back("p1", gone=True))
    await it.propose(take_back("p1", gone=False))
    assert names(store)[-1] == "PERMIT_EXPIRED"
    assert store.commits[-1].writes[0] == Write("del", PERMIT)
    assert store.get(PERMIT) is None


async def test_an_unmet_requirement_fails_only_the_one_who_required_it() -> None:
    it = await opened(store := Flaky())
    await it.propose(plan(it))
    needs = Proposal([PermitExpired(plan_id="p1", symbol="BTCUSDT")], requires=[Require("nowhere", present=True)])
    async with running(it):
        outcomes = await asyncio.gather(
            it.submit(say(error("a"))),
            it.submit(say(error("mine")), lambda _state, _now: needs),
            it.submit(say(error("b"))),
            return_exceptions=True,
        )
    assert [type(outcome) for outcome in outcomes] == [Outcome, RequirementError, Outcome]
    assert [codec.decode(entry).event for entry in store.entries[2:]] == [error("a"), error("b")]
    assert digest(it.state) == refold(store)


async def test_a_permit_that_the_brake_stops_is_decided_again_as_halted() -> None:
    it = await opened(store := Flaky())
    await store.write([Write("set", KEYS.halt, (b"stop",))])
    outcome = await it.propose(plan(it))
    assert outcome.values[0].reason == "halted"
    assert it.halted
    assert names(store) == ["PLAN_RECEIVED", "DECISION"]
    assert store.get(PERMIT) is None


async def test_what_grants_nothing_is_committed_although_the_brake_is_set() -> None:
    it = await opened(store := Flaky())
    await store.write([Write("set", KEYS.halt, (b"stop",))])
    assert (await it.propose(say(error("a")))).error is None
    assert names(store) == ["ERROR_RECORDED"]


# -- unknown outcomes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [("before",), ("after",), ("before", "after"), ("after", "before"), ("refused", "before", "after"), ("after",) * 3],
    ids="-".join,
)
async def test_an_unknown_outcome_never_leads_to_two_decisions(trouble: tuple[str, ...]) -> None:
    it = await opened(store := Flaky(*trouble))
    async with running(it):
        outcomes = await asyncio.gather(it.submit(plan(it, "p1")), it.submit(plan(it, "p2")))
    decisions = [r.event for r in map(codec.decode, store.entries) if isinstance(r.event, Decision)]
    received = [r.event for r in map(codec.decode, store.entries) if isinstance(r.event, PlanReceived)]
    assert [d.plan_id for d in decisions] == [r.plan_id for r in received] == ["p1", "p2"]
    assert all(outcome.error is None for outcome in outcomes)
    assert digest(it.state) == refold(store)
    assert it.problem is None


async def test_an_impatient_proposal_tells_that_nobody_knows_and_can_be_repeated() -> None:
    it = await opened(store := Flaky("after"))
    with pytest.raises(UnavailableError):
        await it.propose(plan(it))
    assert it.problem == "no answer"
    assert it.state.seq == 0
    outcome = await it.propose(plan(it))
    assert outcome == Outcome([None], None)
    assert names(store) == ["PLAN_RECEIVED", "DECISION"]
    assert it.problem is None


async def test_a_late_copy_of_a_lost_commit_does_no_harm() -> None:
    it = await opened(store := Flaky())
    await it.propose(plan(it, "p1"))
    with pytest.raises(ConflictError):
        await store.commit(store.commits[0])
    assert len(store.entries) == 2


async def test_while_the_server_is_away_it_waits_longer_and_longer() -> None:
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    it = await opened(Flaky(*["before"] * 7), sleep=wait)
    async with running(it):
        await it.submit(say(error("a")))
        assert waits == [0.05, 0.1, 0.2, 0.5, 1.0, 1.0, 1.0]
        await it.submit(say(error("b")))
    assert len(waits) == 7


async def test_a_server_that_refuses_is_told_and_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    it = await opened(Flaky("refused", "refused"))
    async with running(it):
        await it.submit(say(error("a")))
    told = capsys.readouterr().out
    assert "cannot commit" in told
    assert "kind=refused" in told


# -- lost history --------------------------------------------------------------------------------------------------


def cut_to(count: int) -> Callable[[MemoryStore], None]:
    def change(store: MemoryStore) -> None:
        del store.entries[count:]

    return change


def replace_by(count: int) -> Callable[[MemoryStore], None]:
    def change(store: MemoryStore) -> None:
        store.entries[:] = codec.encode_all([error("other")] * count, after=GENESIS, at=NOON)

    return change


def lose_the_front(store: MemoryStore) -> None:
    del store.entries[:3]
    store.entries += codec.encode_all([Recovered()], after=store.entries[-1].head, at=NOON)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (cut_to(2), "ends at event 2, after event 5 had been seen"),
        (cut_to(0), "ends at event 0, after event 5 had been seen"),
        (replace_by(5), "event 5 is another one than the one seen before"),
        (replace_by(4), "ends at event 4, after event 5 had been seen"),
        (replace_by(6), "event 6: its hash does not cover"),
    ],
    ids=["cut", "emptied", "replaced", "replaced by less", "replaced by more"],
)
async def test_a_history_that_does_not_go_on_is_noticed(change: Callable[[MemoryStore], None], problem: str) -> None:
    it = await opened(store := Flaky())
    await it.propose(say(*[error("x")] * 5))
    change(store)
    with pytest.raises(HistoryError, match=problem):
        await it.catch_up()
    with pytest.raises(HistoryError, match=problem):
        await it.propose(plan(it))
    assert "DECISION" not in names(store)
    assert it.problem is not None


async def test_a_history_whose_front_is_gone_goes_on_but_cannot_be_read_anew() -> None:
    it = await opened(store := Flaky())
    await it.propose(say(*[error("x")] * 5))
    lose_the_front(store)
    await it.catch_up()
    assert it.state.seq == 6
    with pytest.raises(HistoryError, match="event 4: follows event 0, expected 1"):
        await opened(store)


@pytest.mark.parametrize(
    "changed",
    [{"name": "RECOVERED"}, {"seq": 7}, {"timestamp": "1.000000"}, {"data": b"{}"}, {"hash": "0" * 64}],
    ids=lambda changed: next(iter(changed)),
)
async def test_an_entry_that_was_changed_is_noticed_at_the_start(changed: dict[str, Any]) -> None:
    store = Flaky()
    await (await opened(store)).propose(say(*[error("x")] * 3))
    store.entries[1] = replace(store.entries[1], **changed)
    with pytest.raises(HistoryError, match="event"):
        await opened(store)


async def test_an_event_this_program_does_not_know_is_noticed_at_the_start() -> None:
    store = Flaky()
    await (await opened(store)).propose(say(error("x")))
    entry = replace(store.entries[0], name="FROM_THE_FUTURE")
    digest_of = link(GENESIS.hash, entry.name, 1, entry.timestamp, entry.data)
    store.entries[0] = replace(entry, hash=digest_of)
    with pytest.raises(HistoryError, match="unknown event 'FROM_THE_FUTURE'"):
        await opened(store)


async def test_a_ledger_that_was_never_opened_catches_up_by_itself() -> None:
    store = Flaky()
    await (await opened(store)).propose(say(error("x")))
    it = ledger(store)
    await it.propose(say(error("y")))
    assert it.state.seq == 2
    assert it.problem is None


async def test_a_store_that_cannot_be_read_is_told_at_the_start() -> None:
    class Away(Flaky):
        async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
            raise UnavailableError("connection refused")

    with pytest.raises(StoreError, match="connection refused"):
        await opened(Away())


# -- lateness, corrections, urgency --------------------------------------------------------------------------------


async def test_a_grant_that_came_too_late_is_decided_again_by_the_servers_clock() -> None:
    store = MemoryStore(lambda: NOON // 1000 + 10_000)
    it = await opened(store)
    outcome = await it.propose(plan(it))
    assert outcome.values[0].verdict == "EXECUTE"
    assert it.skew_us == 10 * SECOND
    assert len(store.entries) == 2


async def test_a_grant_that_is_late_again_and_again_gives_no_permit_once_the_plan_is_stale() -> None:
    clock = [NOON]
    frozen = MemoryStore(lambda: NOON // 1000)
    it = Ledger(frozen, KEYS, lambda: clock[0], sleep=lambda _s: asyncio.sleep(0))
    await it.open()
    real, seen = frozen.commit, []

    async def thaws(commit: Commit) -> frozenset[str]:
        seen.append(commit.grants)
        if len(seen) < 3:
            clock[0] += 40 * SECOND
            raise LateError("too late")
        return await real(commit)

    frozen.commit = thaws  # type: ignore[method-assign]
    outcome = await it.propose(plan(it))
    assert (outcome.values[0].verdict, outcome.values[0].reason) == ("BLOCK", "plan_stale")
    assert frozen.get(PERMIT) is None


def burst(state: State, _now: int) -> Proposal:
    return Proposal(decider.disarm_by_hand(state, reason="r", operator="o", apply_mode=None))


async def test_a_permit_taken_before_the_disarm_that_was_to_delete_it_is_consumed_and_not_revoked() -> None:
    store = Flaky()
    it = await opened(store)
    await it.propose(plan(it, "p1"), plan(it, "p2"))
    store.take(PERMIT)
    await it.propose(burst)
    assert [(p := it.state.plan(plan_id)) and p.permit for plan_id in ("p1", "p2")] == ["consumed", "revoked"]
    assert (it.state.counts.consumed, it.state.counts.revoked) == (1, 1)
    assert digest(fold(map(codec.decode, store.entries))) == digest(it.state)


async def test_what_follows_a_disarm_in_the_same_batch_is_decided_after_the_correction() -> None:
    store = Flaky()
    it = await opened(store)
    await it.propose(plan(it, "p1"))
    store.take(PERMIT)
    seen: list[str] = []

    def look(state: State, _now: int) -> Proposal:
        known = state.plan("p1")
        seen.append(known.permit if known is not None else "")
        return Proposal([error("looked")])

    async with running(it), asyncio.timeout(2):
        await asyncio.gather(it.submit(burst), it.submit(look))
    assert seen == ["consumed"]


async def test_what_is_urgent_comes_before_what_waits() -> None:
    store = Flaky()
    it = await opened(store)
    waiting = [asyncio.create_task(it.submit(say(*[error(str(n))] * 300))) for n in range(4)]
    await asyncio.sleep(0)
    urgent = asyncio.create_task(it.submit(say(error("urgent")), urgent=True))
    await asyncio.sleep(0)
    async with running(it), asyncio.timeout(2):
        await asyncio.gather(*waiting, urgent)
    kinds = [getattr(codec.decode(entry).event, "kind", None) for entry in store.entries]
    assert kinds.index("urgent") <= module.MAX_EVENTS + 300 < len(kinds)


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (UnavailableError("no answer"), "unavailable"),
        (UnsentError("connecting to"), "unavailable"),
        (RefusedError("OOM"), "refused"),
        (HistoryError("cut"), "history"),
    ],
)
async def test_why_nothing_can_be_committed_is_logged_as_what_it_is(trouble: StoreError, kind: str) -> None:
    class Away(MemoryStore):
        async def commit(self, _commit: Commit) -> NoReturn:
            raise trouble

    it = await opened(Away())
    with structlog.testing.capture_logs() as logged, pytest.raises(type(trouble)):
        await it.propose(say(error("a")))
    assert [line["kind"] for line in logged] == [kind]


async def test_a_refusal_to_write_stands_until_something_is_written() -> None:
    it = await opened(Flaky("refused", "refused"))
    with pytest.raises(RefusedError):
        await it.propose(say(error("a")))
    await it.catch_up()
    assert it.problem is not None
    with pytest.raises(RefusedError):
        await it.propose(say(error("a")))
    assert it.problem is not None
    await it.propose(say(error("a")))
    assert it.problem is None


async def test_an_observer_that_fails_does_not_stop_deciding() -> None:
    def broken(_recorded: Recorded, _state: State) -> None:
        raise BrokenPipeError

    it = await opened(Flaky(), observe=broken)
    assert (await it.propose(say(error("a")))).error is None
    assert it.state.seq == 1
    assert it.untold == "BrokenPipeError()"
