"""What must hold whatever happens, in whatever order.

A machine of random plans, prices, clocks, clients, results, restarts and people runs two ledgers on one store. After
each step the stream is read by an oracle that shares no code with the projections, and by a fold of its own.
"""

import asyncio
import contextlib
import types as python_types
from collections import Counter
from collections.abc import Coroutine, Iterator
from decimal import Decimal
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from events import codec
from events.chain import GENESIS, verify
from events.decimals import parse, plain
from events.keys import Keys
from events.store import Commit, MemoryStore, Require, RequirementError, UnavailableError, Write
from events.types import (
    ALL,
    AutoDisarm,
    Decision,
    DisarmFailed,
    DisarmStarted,
    Event,
    Execution,
    ManualDisarm,
    PermitConsumed,
    PermitExpired,
    PermitRevoked,
    PlanReceived,
    Recorded,
    SettingsLoaded,
)
from governor import decider
from governor.decider import MarketNeededError
from governor.gates import Situation
from governor.ledger import Ledger, Proposal, Propose
from governor.market import Market
from governor.permits import TAKE_BACK_US
from governor.plans import MalformedPlanError, parse_plan
from governor.policy import Limits, Policy
from governor.results import parse_result
from projections import views
from projections.state import State, digest, evolve, initial
from tests.spec import DAY, HOUR, MIDNIGHT, MINUTE, NOON, SECOND, plan_fields

T = TypeVar("T")
REPEATABLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
KEYS = Keys()
SYMBOLS = ("BTCUSDT", "ETHUSDT", "DOGEUSDT")
ACTIONS = ("FULL_CLOSE_PROPOSED", "PARTIAL_75", "PARTIAL_50", "PARTIAL_25", "UPDATE_SL", "OPEN_LONG")

POLICIES = [
    Policy(credentials=True),
    Policy(
        credentials=True,
        limits=Limits(per_hour=4, per_5min=1, notional_per_day=Decimal(3000), qty_per_day=Decimal("0.03")),
        total_notional_per_day=Decimal(5000),
        auto_disarm=False,
        permit_ttl_us=10 * SECOND,
    ),
    Policy(
        credentials=True,
        limits=Limits(per_hour=None, per_5min=3, notional_per_day=Decimal("1425.5"), qty_per_day=Decimal("0.015")),
        by_symbol={"DOGEUSDT": Limits(per_hour=0), "ETHUSDT": Limits(per_5min=None, notional_per_day=None)},
        disarm_on_burst=False,
        disarm_on_errors=2,
        throttle_per_5min=None,
    ),
    Policy(
        limits=Limits(qty_per_day=Decimal("0.05"), per_5min=None),
        fallback_qty=Decimal("0.01"),
        disarm_on_unpermitted=False,
        disarm_on_errors=None,
        permit_ttl_us=HOUR,
    ),
]


# -- the oracle ----------------------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """One execution that takes a place."""

    plan_id: str
    symbol: str
    stop: bool
    at: int
    quantity: Decimal
    notional: Decimal
    priced: bool
    again: bool
    """Counted again because it was executed after it had been taken back: may pass a limit."""


class Oracle:
    """Reads the stream and checks the promises, as slowly and as plainly as it can."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.time = 0
        self.counted: list[Counted] = []
        self.granted: dict[str, Counted] = {}
        self.granted_at: dict[str, int] = {}
        self.last: Event | None = None
        self.verdicts: Counter[str] = Counter()
        self.plans = 0
        self.outstanding: set[str] = set()
        self.ends: Counter[str] = Counter()

    def read(self, at: int, event: Event) -> None:
        self.time = max(self.time, at)
        if isinstance(self.last, PlanReceived):
            assert isinstance(event, Decision), "a decision follows its plan"
            assert (event.plan_id, event.entry_id) == (self.last.plan_id, self.last.entry_id)
        match event:
            case PlanReceived():
                self.plans += 1
            case Decision():
                assert isinstance(self.last, PlanReceived), "a decision has its plan"
                self.verdicts[event.verdict] += 1
                if event.verdict == "EXECUTE":
                    self.grant(event)
            case PermitExpired():
                self.end(event.plan_id, "expired")
                self.counted.remove(self.granted[event.plan_id])
            case PermitConsumed():
                self.end(event.plan_id, "consumed")
            case PermitRevoked():
                self.end(event.plan_id, "revoked")
            case DisarmStarted():
                self.disarmed = set(self.outstanding)
            case Execution(counted=True):
                self.counted.append(self.granted[event.plan_id]._replace(at=self.time, again=True))
            case _:
                pass
        self.last = event

    def end(self, plan_id: str, how: str) -> None:
        assert plan_id in self.outstanding, "a permit ends once"
        self.outstanding.remove(plan_id)
        self.ends[how] += 1

    def grant(self, event: Decision) -> None:
        before = self.granted_at.get(event.plan_id)
        assert before is None or self.time - before >= DAY, "one permit a plan_id"
        assert event.computed_qty is not None
        assert event.computed_notional is not None
        new = Counted(
            event.plan_id,
            event.symbol,
            event.action == "UPDATE_SL",
            self.time,
            event.computed_qty,
            event.computed_notional,
            priced=event.mark_price is not None,
            again=False,
        )
        self.admissible(new)
        self.counted.append(new)
        self.granted[event.plan_id] = new
        self.granted_at[event.plan_id] = self.time
        self.outstanding.add(event.plan_id)

    def admissible(self, new: Counted) -> None:
        """What was granted had its place: in both windows, and in the totals of its day."""
        limits = self.policy.of(new.symbol)
        same = [c for c in self.counted if (c.symbol, c.stop) == (new.symbol, new.stop)]
        for span, limit in ((HOUR, limits.per_hour), (5 * MINUTE, limits.per_5min)):
            assert limit is None or sum(c.at > new.at - span for c in same) < limit
        if new.stop:
            return
        today = [c for c in self.counted if c.at // DAY == new.at // DAY and not c.stop]
        mine = [c for c in today if c.symbol == new.symbol]
        if new.priced:
            used, limit = sum(c.notional for c in mine) + new.notional, limits.notional_per_day
            everything, total = sum(c.notional for c in today) + new.notional, self.policy.total_notional_per_day
            assert total is None or everything <= total
        else:
            used, limit = sum(c.quantity for c in mine) + new.quantity, limits.qty_per_day
        assert limit is None or used <= limit

    def check(self) -> None:
        """Every position of every window, and every day, over all that was granted and not released."""
        held = [c for c in self.counted if not c.again]
        for symbol in SYMBOLS:
            limits = self.policy.of(symbol)
            for stop in (False, True):
                times = [c.at for c in held if (c.symbol, c.stop) == (symbol, stop)]
                for span, limit in ((HOUR, limits.per_hour), (5 * MINUTE, limits.per_5min)):
                    for end in times:
                        assert limit is None or sum(end - span < time <= end for time in times) <= limit
            self.check_days([c for c in held if c.symbol == symbol], limits.notional_per_day)
        self.check_days(held, self.policy.total_notional_per_day)

    def check_days(self, held: list[Counted], limit: Decimal | None) -> None:
        days: Counter[int] = Counter()
        for c in held:
            days[c.at // DAY] += c.notional  # type: ignore[assignment]
        assert limit is None or all(used <= limit for used in days.values())


# -- the machine ---------------------------------------------------------------------------------------------------


class Unreliable(MemoryStore):
    """A store that loses the next replies, before or after the commit happened."""

    def __init__(self, world: "Gate") -> None:
        super().__init__(lambda: world.real // 1000)
        self.lose: list[str] = []

    async def commit(self, commit: Commit) -> None:
        lost = self.lose.pop() if self.lose else ""
        if lost == "before":
            raise UnavailableError("no answer")
        await super().commit(commit)
        if lost == "after":
            raise UnavailableError("no answer")


amounts = st.sampled_from(["0.02", "-0.02", "0.013333333", "0.2", "0", "1e-8", "0.000000000001"])
prices = st.sampled_from(["95033.33333333", "3300.12345678", "0.00000001", "1e6"])
markets = st.builds(
    lambda amount, price, hedge: Market(
        legs=None if amount is None else {"LONG" if hedge else "BOTH": parse(amount)},
        mark_price=None if price is None else parse(price),
    ),
    st.one_of(amounts, amounts, amounts, st.none()),
    st.one_of(prices, prices, st.none()),
    st.booleans(),
)
spans = st.sampled_from(
    [0, 1, SECOND, 30 * SECOND, MINUTE - 1, MINUTE, 5 * MINUTE - 1, 5 * MINUTE, HOUR - 1, HOUR, 7 * HOUR, 25 * HOUR]
)
ledgers = st.integers(0, 1)


class Gate(RuleBasedStateMachine):
    """Two daemons, their clients, an exchange, people, and time."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.real = NOON
        self.offset = [0, 0]
        self.policy = POLICIES[0]
        self.store = Unreliable(self)
        self.shadow = initial()
        self.digests: list[str] = []
        self.plan_ids: list[str] = []
        self.entries: list[tuple[str, dict[str, str]]] = []
        self.entry = 0

    @initialize(which=st.integers(0, len(POLICIES) - 1), start=st.sampled_from([NOON, MIDNIGHT - MINUTE]))
    def begin(self, which: int, start: int) -> None:
        self.policy, self.real = POLICIES[which], start
        self.oracle = Oracle(self.policy)
        self.ledgers = [self.new_ledger(0), self.new_ledger(1)]
        self.submit(0, lambda _state, _now: Proposal([SettingsLoaded(digest="s", settings={})]))

    def teardown(self) -> None:
        self.runner.close()

    def new_ledger(self, which: int) -> Ledger:
        async def at_once(_seconds: float) -> None:
            return None

        made = Ledger(
            self.store,
            KEYS,
            lambda: self.real + self.offset[which],
            observe=lambda recorded, state: self.note(recorded.seq, digest(state)),
            sleep=at_once,
        )
        self.run(made.open())
        return made

    def note(self, seq: int, found: str) -> None:
        """The digest at each event is the same, whoever folds it and whenever."""
        assert seq <= len(self.digests) + 1
        if seq > len(self.digests):
            self.digests.append(found)
        assert self.digests[seq - 1] == found

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def submit(self, which: int, *proposals: Propose) -> list[Any]:
        """Through the running loop, as the daemon does it: waits out whatever trouble the store makes."""
        it = self.ledgers[which]

        async def work() -> list[Any]:
            loop = asyncio.create_task(it.run())
            try:
                outcome = await it.submit(*proposals)
            finally:
                loop.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await loop
            if outcome.error is not None:
                raise outcome.error
            return outcome.values

        return self.run(work())

    # -- plans

    def propose(
        self, which: int, entry_id: str, fields: dict[str, str], market: Market, state: State, now: int
    ) -> Proposal:
        situation = Situation(now=now, apply_mode="testnet", halt=self.ledgers[which].halted)
        needs_qty = not self.policy.credentials
        try:
            plan = parse_plan(fields, entry_id=entry_id, now=now, needs_close_qty=needs_qty)
        except MalformedPlanError as problem:
            return Proposal(
                decider.reject(state, problem, self.policy, situation, fields=fields, entry_id=entry_id)
            )
        try:
            decided = decider.decide(state, plan, None, self.policy, situation, fields=fields, settings="s")
        except MarketNeededError:
            decided = decider.decide(state, plan, market, self.policy, situation, fields=fields, settings="s")
        again = decider.decide(state, plan, market, self.policy, situation, fields=fields, settings="s")
        if decided.decision is not None and decided.decision.asked:
            assert again == decided
        elif decided.decision is not None:
            assert again.decision is not None
            assert again.decision.reason == decided.decision.reason
        return Proposal(decided.events, value=decided.decision)

    @rule(
        which=ledgers,
        count=st.integers(1, 3),
        symbol=st.sampled_from(SYMBOLS),
        action=st.sampled_from(ACTIONS),
        market=markets,
        score=st.sampled_from(["0.1", "0.1", "0.79", "0.8"]),
        old=st.booleans(),
        decision=st.sampled_from(["EXECUTE", "EXECUTE", "EXECUTE", "SKIP"]),
        close_qty=st.sampled_from(["", "0", "0.01", "0.02"]),
    )
    def plans_come(
        self, which: int, count: int, symbol: str, action: str, market: Market, score: str, close_qty: str,
        decision: str, *, old: bool,
    ) -> None:  # fmt: skip
        proposals = []
        for _ in range(count):
            if not (old and self.plan_ids):
                self.plan_ids.append(f"p{len(self.plan_ids)}")
            fields = plan_fields(
                plan_id=self.plan_ids[len(self.plan_ids) // 2 if old else -1],
                symbol=symbol,
                action=action,
                kill_score=score,
                decision=decision,
                close_qty=close_qty,
            )
            entry_id = self.new_entry(which)
            self.entries.append((entry_id, fields))
            proposals.append(partial(self.propose, which, entry_id, fields, market))
        self.submit(which, *proposals)

    @rule(which=ledgers, field=st.sampled_from(["symbol", "kill_score", "decision", "action"]))
    def a_malformed_plan_comes(self, which: int, field: str) -> None:
        fields = plan_fields(plan_id="bad") | {field: "" if field == "action" else "?" if field == "symbol" else ""}
        self.submit(which, partial(self.propose, which, self.new_entry(which), fields, Market()))

    @precondition(lambda self: self.entries)
    @rule(which=ledgers, data=st.data())
    def an_entry_is_delivered_again(self, which: int, data: st.DataObject) -> None:
        entry_id, fields = data.draw(st.sampled_from(self.entries[-20:]))
        before = len(self.store.entries)
        self.submit(which, partial(self.propose, which, entry_id, fields, Market()))
        assert len(self.store.entries) == before

    @rule(which=ledgers)
    def an_evaluation_fails(self, which: int) -> None:
        fields, entry_id = plan_fields(plan_id=f"f{self.entry}"), self.new_entry(which)

        def propose(state: State, now: int) -> Proposal:
            plan = parse_plan(fields, entry_id=entry_id, now=now, needs_close_qty=False)
            situation = Situation(now=now)
            failed = decider.fail(state, plan, self.policy, situation, fields=fields, error="boom", settings="s")
            return Proposal(failed.events)

        self.submit(which, propose)

    def new_entry(self, which: int) -> str:
        self.entry += 1
        return f"{(self.real + self.offset[which]) // 1000}-{self.entry}"

    # -- clients

    @precondition(lambda self: self.outstanding())
    @rule(data=st.data())
    def a_client_consumes(self, data: st.DataObject) -> None:
        self.store.take(KEYS.permit(data.draw(st.sampled_from(self.outstanding()))))

    @rule(which=ledgers)
    def permits_at_their_end_are_taken_back(self, which: int) -> None:
        now = self.real + self.offset[which]
        with contextlib.suppress(UnavailableError):
            self.run(self.ledgers[which].catch_up())
        held = list(self.ledgers[which].state.permits.items())
        for plan_id in [plan_id for plan_id, r in held if now >= r.expires_us - TAKE_BACK_US]:
            for gone in (False, True):
                with contextlib.suppress(RequirementError):
                    self.submit(which, partial(self.take_back, plan_id, gone))
                    break

    def take_back(self, plan_id: str, gone: bool, state: State, now: int) -> Proposal:  # noqa: FBT001
        events = decider.take_back(state, plan_id, gone=gone, now=now)
        return Proposal(events, requires=[Require(KEYS.permit(plan_id), present=not gone)] if events else [])

    @precondition(lambda self: self.plan_ids)
    @rule(
        which=ledgers,
        data=st.data(),
        executed=st.sampled_from(["True", "True", "False"]),
        quantity=st.sampled_from(["0.015", "0.3"]),
        status=st.sampled_from(["ok", "ok", "error"]),
    )
    def a_result_comes(self, which: int, data: st.DataObject, executed: str, quantity: str, status: str) -> None:
        plan_id = data.draw(st.sampled_from([*self.plan_ids[-8:], "never-seen"]))
        fields = {
            "plan_id": plan_id,
            "symbol": "BTCUSDT",
            "decision": "EXECUTE",
            "executed": executed,
            "steps_results": f'[{{"status": "{status}", "executed_qty": "{quantity}"}}]',
        }
        told = parse_result(fields, entry_id=self.new_entry(which))
        propose = lambda state, now: Proposal(decider.execution(state, told, self.policy, now, fields=fields))  # noqa: E731
        self.submit(which, propose)
        before = len(self.store.entries)
        self.submit(which, propose)
        assert len(self.store.entries) == before

    def outstanding(self) -> list[str]:
        return [plan_id for plan_id, _ in self.shadow.permits.items()]

    # -- people, time, trouble

    @rule(which=ledgers)
    def somebody_disarms(self, which: int) -> None:
        self.submit(
            which,
            lambda state, _now: Proposal(
                decider.disarm_by_hand(state, reason="drill", operator="anna", apply_mode="testnet")
            ),
        )

    @rule(which=ledgers, manual=st.booleans(), works=st.booleans())
    def a_disarm_is_carried_out(self, which: int, *, manual: bool, works: bool) -> None:
        def propose(state: State, _now: int) -> Proposal:
            disarm = state.mode.disarm
            if disarm is None or disarm.done:
                return Proposal()
            if not works:
                return Proposal([DisarmFailed(epoch=disarm.epoch, attempt=1, step="restart", error="boom")])
            if manual:
                return Proposal(
                    [ManualDisarm(reason="r", context={}, action_taken="", epoch=disarm.epoch, operator="anna")]
                )
            return Proposal([AutoDisarm(reason="r", context={}, action_taken="", epoch=disarm.epoch)])

        self.submit(which, propose)

    @rule(which=ledgers, force=st.sampled_from([True, True, False]))
    def somebody_rearms(self, which: int, *, force: bool) -> None:
        def propose(state: State, _now: int) -> Proposal:
            return Proposal(decider.rearm(state, reason="r", operator="anna", force=force, halt=False))

        with contextlib.suppress(decider.RearmRefusedError):
            self.submit(which, propose)
            assert self.ledgers[which].state.mode.state != "DISARMED"

    @rule(which=ledgers, on=st.booleans())
    def the_brake_is_set_or_released(self, which: int, *, on: bool) -> None:
        self.run(self.store.write([Write("set" if on else "del", KEYS.halt, (b"stop",) if on else ())]))
        if not on:
            self.ledgers[0].halted = self.ledgers[1].halted = False

    @rule(which=ledgers)
    def what_is_due_by_time_happens(self, which: int) -> None:
        self.submit(which, lambda state, now: Proposal(decider.tick(state, now)))

    @rule(span=spans)
    def time_passes(self, span: int) -> None:
        self.real += span

    @rule(which=ledgers, span=st.sampled_from([0, 1, -1, SECOND, -SECOND, -10 * MINUTE, -2 * HOUR]))
    def a_clock_is_set(self, which: int, span: int) -> None:
        self.offset[which] = span

    @rule(which=ledgers)
    def a_daemon_restarts(self, which: int) -> None:
        self.ledgers[which] = self.new_ledger(which)
        assert digest(self.ledgers[which].state) == digest(self.shadow)

    @rule(lost=st.lists(st.sampled_from(["before", "after"]), min_size=1, max_size=2))
    def replies_will_be_lost(self, lost: list[str]) -> None:
        self.store.lose = lost

    # -- what must hold

    def fresh(self) -> Iterator[Recorded]:
        after = codec.Head(self.shadow.seq, self.shadow.hash)
        for entry in verify(self.store.entries[self.shadow.seq :], after=after):
            yield codec.decode(entry)

    @invariant()
    def the_promises_hold(self) -> None:
        if not hasattr(self, "oracle"):
            return
        news = False
        for recorded in self.fresh():
            news = True
            evolve(self.shadow, recorded)
            self.note(recorded.seq, digest(self.shadow))
            self.oracle.read(recorded.at, recorded.event)
        if not news:
            return
        assert not isinstance(self.oracle.last, PlanReceived)
        self.oracle.check()
        self.counts_add_up()
        self.windows_and_totals_are_the_oracles()
        self.public_keys_are_those_of_the_state()

    def counts_add_up(self) -> None:
        counts, oracle = self.shadow.counts, self.oracle
        assert counts.plans == oracle.plans == counts.allowed + counts.blocked + counts.skipped
        assert oracle.verdicts == Counter(
            {"EXECUTE": counts.allowed, "BLOCK": counts.blocked, "SKIP": counts.skipped}
        )
        assert counts.allowed == counts.consumed + counts.expired + counts.revoked + len(self.shadow.permits)
        assert set(self.outstanding()) == oracle.outstanding
        assert not (self.shadow.mode.state == "DISARMED" and oracle.outstanding)
        assert oracle.ends == Counter(consumed=counts.consumed, expired=counts.expired, revoked=counts.revoked)

    def windows_and_totals_are_the_oracles(self) -> None:
        now, today = self.shadow.time, self.shadow.time // DAY
        for symbol in SYMBOLS:
            book = self.shadow.book(symbol)
            for times, stop in ((book.executions, False), (book.stops, True)):
                mine = sorted(c.at for c in self.oracle.counted if (c.symbol, c.stop) == (symbol, stop))
                assert list(times) == sorted(times)
                assert [t for t in times if t > now - HOUR] == [t for t in mine if t > now - HOUR]
            for day in (today - 1, today):
                held = [c for c in self.oracle.counted if c.symbol == symbol and c.at // DAY == day and not c.stop]
                (found,) = [d for d in book.days if d.day == day] or [None]
                assert sum(c.notional for c in held) == (found.notional if found else 0)
                assert sum(c.quantity for c in held) == (found.quantity if found else 0)

    def public_keys_are_those_of_the_state(self) -> None:
        held = {key: values for key, (values, _) in self.store._keys.items()}
        assert held[KEYS.state] == views.state_write(self.shadow, KEYS).values
        for symbol in SYMBOLS:
            for write in views.symbol_writes(self.shadow, symbol, KEYS):
                if write.op == "list":
                    assert held.get(write.key, ()) == write.values
                elif write.op == "set":
                    assert held[write.key] == write.values
        for plan_id in self.outstanding():
            assert self.shadow.plan(plan_id) is not None
        assert {key for key in held if ":permit:" in key} <= {KEYS.permit(plan_id) for plan_id in self.outstanding()}


Gate.TestCase.settings = REPEATABLE
TestGate = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")(Gate.TestCase)


# -- events --------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(-(10**18), 10**18).flatmap(
    lambda digits: st.integers(-12, 12).map(lambda exponent: plain(Decimal(digits).scaleb(exponent)))
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    simple: dict[Any, st.SearchStrategy[Any]] = {
        str: texts,
        int: st.integers(-(2**53), 2**63 - 1),
        bool: st.booleans(),
        Decimal: numbers,
        Any: json_values,
        type(None): st.none(),
    }
    if annotation in simple:
        return simple[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is python_types.UnionType:
        return st.one_of(*map(values_of, args))
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=3)
    if origin is tuple:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    return structs(annotation)


def structs(cls: type[T]) -> st.SearchStrategy[T]:
    hints = get_type_hints(cls)
    names = [name for name in cls.__struct_fields__ if name != "v"]  # type: ignore[attr-defined]
    return st.builds(cls, **{name: values_of(hints[name]) for name in names})


events = st.one_of(*map(structs, ALL))


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.NAME)
def test_an_event_written_and_read_is_the_same_event(cls: type[Event]) -> None:
    @settings(REPEATABLE, max_examples=40)
    @given(event=structs(cls), at=st.integers(0, 4 * 10**15))
    def holds(event: Event, at: int) -> None:
        entry = codec.encode(event, after=GENESIS, at=at)
        assert codec.decode(entry) == Recorded(1, at, event, entry.hash)
        assert codec.encode(codec.decode(entry).event, after=GENESIS, at=at) == entry

    holds()


@settings(REPEATABLE, max_examples=60)
@given(happened=st.lists(st.tuples(st.integers(0, 3 * DAY), events), max_size=30))
def test_any_history_folds_the_same_in_one_go_in_parts_and_on_a_fork(happened: list[tuple[int, Event]]) -> None:
    recorded = [Recorded(seq, NOON + at, event, f"h{seq}") for seq, (at, event) in enumerate(happened, 1)]
    whole, parts, fork = initial(), initial(), initial().fork()
    for each in recorded:
        time = whole.time
        evolve(whole, each)
        assert whole.time >= time
        evolve(fork, each)
        parts = evolve(parts, each) if each.seq % 2 else evolve(parts.fork(), each)
    assert digest(whole) == digest(parts) == digest(fork)


@settings(REPEATABLE, max_examples=60)
@given(happened=st.lists(events, max_size=20))
def test_any_history_forms_a_chain_that_verifies_and_breaks_where_it_is_changed(happened: list[Event]) -> None:
    entries = codec.encode_all(happened, after=GENESIS, at=NOON)
    assert list(verify(entries)) == entries
    for one, two in pairwise(entries):
        assert two.seq == one.seq + 1
