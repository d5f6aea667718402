"""What must hold whatever happens, in whatever order.

A machine of random plans, prices, clocks, clients, results, restarts and people runs two ledgers on one store. After
each step the stream is read by an oracle that shares no code with the projections, and by a fold of its own.
"""

import asyncio
import contextlib
import types as python_types
from collections import Counter
from collections.abc import Coroutine
from decimal import Decimal
from functools import partial
from random import Random
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec.structs import replace

from events import codec
from events.chain import GENESIS, ChainError, verify
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
    Throttled,
)
from governor import decider
from governor.decider import MarketNeededError
from governor.gates import REASONS, Situation
from governor.ledger import Ledger, Proposal, Propose
from governor.market import Market
from governor.permits import TAKE_BACK_US
from governor.plans import MalformedPlanError, parse_plan
from governor.policy import Limits, Policy
from governor.results import parse_result
from projections import totals, views
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
    Policy(limits=Limits(per_hour=10, per_5min=4), throttle_per_5min=2, throttle_cooldown_us=10 * MINUTE),
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
        self.revoked: set[str] = set()
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
            case PermitConsumed() if event.plan_id in self.revoked:
                # The disarm that revoked it did not find it: a client had been faster.
                self.revoked.remove(event.plan_id)
                self.ends.update(revoked=-1, consumed=1)
            case PermitConsumed():
                self.end(event.plan_id, "consumed")
            case PermitRevoked():
                self.end(event.plan_id, "revoked")
                self.revoked.add(event.plan_id)
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
        for span, most in ((HOUR, limits.per_hour), (5 * MINUTE, limits.per_5min)):
            assert most is None or sum(c.at > new.at - span for c in same) < most
        if new.stop:
            return
        today = [new, *(c for c in self.counted if c.at // DAY == new.at // DAY and not c.stop)]
        mine = [c for c in today if c.symbol == new.symbol]
        if new.priced:
            assert within(sum(c.notional for c in mine), limits.notional_per_day)
            assert within(sum(c.notional for c in today), self.policy.total_notional_per_day)
        else:
            assert within(sum(c.quantity for c in mine), limits.qty_per_day)

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
        for day in {c.at // DAY for c in held}:
            assert within(sum(c.notional for c in held if c.at // DAY == day), limit)


def within(used: Decimal | int, limit: Decimal | None) -> bool:
    return limit is None or used <= limit


# -- the world -----------------------------------------------------------------------------------------------------


class Unreliable(MemoryStore):
    """A store that loses the next replies, before or after the commit happened."""

    def __init__(self, world: "World") -> None:
        super().__init__(lambda: world.real // 1000)
        self.lose: list[str] = []

    async def commit(self, commit: Commit) -> frozenset[str]:
        lost = self.lose.pop() if self.lose else ""
        if lost == "before":
            raise UnavailableError("no answer")
        gone = await super().commit(commit)
        if lost == "after":
            raise UnavailableError("no answer")
        return gone


class World:
    """Two daemons on one store, their clients, an exchange, people, and time."""

    def __init__(self, policy: Policy, start: int) -> None:
        self.runner = asyncio.Runner()
        self.policy = policy
        self.real = start
        self.offset = [0, 0]
        self.store = Unreliable(self)
        self.shadow = initial()
        self.oracle = Oracle(policy)
        self.digests: list[str] = []
        self.plan_ids: list[str] = []
        self.entries: list[tuple[str, dict[str, str]]] = []
        self.entry = 0
        self.taken: set[str] = set()
        """Permits a client took."""
        self.ends: dict[str, int] = {}
        """When the server lets a permit's key go, by the real time."""
        self.ledgers = [self.new_ledger(0), self.new_ledger(1)]
        self.submit(0, lambda _state, _now: Proposal([SettingsLoaded(digest="s", settings={})]))

    def close(self) -> None:
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

    def nothing_new(self, which: int, propose: Propose) -> None:
        before = len(self.store.entries)
        self.submit(which, propose)
        assert len(self.store.entries) == before

    def new_entry(self, which: int) -> str:
        self.entry += 1
        return f"{(self.real + self.offset[which]) // 1000}-{self.entry}"

    def outstanding(self) -> list[str]:
        return [plan_id for plan_id, _ in self.shadow.permits.items()]

    # -- what can happen

    def plans(self, which: int, count: int, market: Market, *, old: bool, **changed: str | None) -> None:
        """Plans of one symbol come together; old: with an id that was there before."""
        proposals = []
        for _ in range(count):
            if not (old and self.plan_ids):
                self.plan_ids.append(f"p{len(self.plan_ids)}")
            fields = plan_fields(plan_id=self.plan_ids[len(self.plan_ids) // 2 if old else -1], **changed)
            entry_id = self.new_entry(which)
            self.entries.append((entry_id, fields))
            proposals.append(partial(self.propose, which, entry_id, fields, market))
        self.submit(which, *proposals)

    def propose(  # noqa: PLR0917 - the last two are the ledger's
        self, which: int, entry_id: str, fields: dict[str, str], market: Market, state: State, now: int
    ) -> Proposal:
        situation = Situation(now=now, apply_mode="testnet", halt=self.ledgers[which].halted)
        needs_qty = not self.policy.credentials
        try:
            plan = parse_plan(fields, entry_id=entry_id, now=now, needs_close_qty=needs_qty)
        except MalformedPlanError as problem:
            return Proposal(decider.reject(state, problem, self.policy, situation, fields=fields, entry_id=entry_id))
        known = (self.policy, situation)
        seen: Market | None = None
        try:
            decided = decider.decide(state, plan, seen, *known, fields=fields, settings="s")
        except MarketNeededError:
            seen = market
            decided = decider.decide(state, plan, seen, *known, fields=fields, settings="s")
        assert decided == decider.decide(state, plan, seen, *known, fields=fields, settings="s")
        return Proposal(decided.events)

    def redelivery(self, which: int, back: int) -> None:
        if self.entries:
            entry_id, fields = self.entries[-1 - back % len(self.entries)]
            self.nothing_new(which, partial(self.propose, which, entry_id, fields, Market()))

    def failure(self, which: int) -> None:
        fields, entry_id = plan_fields(plan_id=f"f{self.entry}"), self.new_entry(which)

        def propose(state: State, now: int) -> Proposal:
            plan = parse_plan(fields, entry_id=entry_id, now=now, needs_close_qty=False)
            situation = Situation(now=now)
            failed = decider.fail(state, plan, self.policy, situation, fields=fields, error="boom", settings="s")
            return Proposal(failed.events)

        self.submit(which, propose)
        self.nothing_new(which, propose)

    def consumption(self, back: int) -> None:
        """A client takes a permit."""
        if held := self.outstanding():
            plan_id = held[-1 - back % len(held)]
            if self.store.take(KEYS.permit(plan_id)):
                self.taken.add(plan_id)

    def sweep(self, which: int) -> None:
        """Permits at their end are taken back, or found gone."""
        self.run(self.ledgers[which].catch_up())
        now = self.real + self.offset[which]
        held = list(self.ledgers[which].state.permits.items())
        for plan_id in [plan_id for plan_id, r in held if now >= r.expires_us - TAKE_BACK_US]:
            for gone in (False, True):
                with contextlib.suppress(RequirementError):
                    self.submit(which, partial(self.take_back, plan_id, gone))
                    break

    def end(self, which: int) -> None:
        """The time of the oldest permit comes to its end."""
        for _, held in list(self.shadow.permits.items())[:1]:
            self.real = max(self.real, held.expires_us - TAKE_BACK_US // 2 - self.offset[which])
            self.sweep(which)

    def take_back(self, plan_id: str, gone: bool, state: State, now: int) -> Proposal:  # noqa: FBT001
        events = decider.take_back(state, plan_id, gone=gone, now=now)
        return Proposal(events, requires=[Require(KEYS.permit(plan_id), present=not gone)] if events else [])

    def result(self, which: int, back: int, *, executed: str, quantity: str, status: str) -> None:
        known = ["never-seen", *self.plan_ids]
        fields = {
            "plan_id": known[-1 - back % len(known)],
            "symbol": "BTCUSDT",
            "decision": "EXECUTE",
            "executed": executed,
            "steps_results": f'[{{"status": "{status}", "executed_qty": "{quantity}"}}]',
        }
        told = parse_result(fields, entry_id=self.new_entry(which))

        def propose(state: State, now: int) -> Proposal:
            return Proposal(decider.execution(state, told, self.policy, now, fields=fields))

        self.submit(which, propose)
        self.nothing_new(which, propose)

    def disarm(self, which: int) -> None:
        self.submit(
            which,
            lambda state, _now: Proposal(
                decider.disarm_by_hand(state, reason="drill", operator="anna", apply_mode="testnet")
            ),
        )

    def actuation(self, which: int, *, manual: bool, works: bool) -> None:
        """A disarm under way is carried out, or fails."""

        def propose(state: State, _now: int) -> Proposal:
            disarm = state.mode.disarm
            if disarm is None or disarm.done:
                return Proposal()
            told: dict[str, Any] = {"reason": "r", "context": {}, "action_taken": "", "epoch": disarm.epoch}
            if not works:
                return Proposal([DisarmFailed(epoch=disarm.epoch, attempt=1, step="restart", error="boom")])
            return Proposal([ManualDisarm(operator="anna", **told) if manual else AutoDisarm(**told)])

        self.submit(which, propose)

    def look(self, which: int, apply_mode: str | None) -> None:
        """A daemon looks at the Apply Layer's file."""

        def propose(state: State, _now: int) -> Proposal:
            return Proposal(decider.drift(state, apply_mode))

        self.submit(which, propose)
        self.nothing_new(which, propose)

    def rearm(self, which: int, *, force: bool) -> None:
        def propose(state: State, _now: int) -> Proposal:
            return Proposal(decider.rearm(state, reason="r", operator="anna", force=force, halt=False))

        with contextlib.suppress(decider.RearmRefusedError):
            self.submit(which, propose)
            assert self.ledgers[which].state.mode.state != "DISARMED"

    def brake(self, *, on: bool) -> None:
        self.run(self.store.write([Write("set" if on else "del", KEYS.halt, (b"stop",) if on else ())]))
        if not on:
            self.ledgers[0].halted = self.ledgers[1].halted = False

    def tick(self, which: int) -> None:
        self.submit(which, lambda state, now: Proposal(decider.tick(state, now)))

    def restart(self, which: int) -> None:
        self.ledgers[which] = self.new_ledger(which)
        assert self.ledgers[which].state.seq == len(self.digests)
        self.note(len(self.digests), digest(self.ledgers[which].state))

    # -- what must hold

    def check(self) -> None:
        """Read what is new in the stream, and hold everything to it."""
        entries = self.store.entries[self.shadow.seq :]
        for entry in verify(entries, after=self.shadow.head):
            recorded = codec.decode(entry)
            evolve(self.shadow, recorded)
            self.note(recorded.seq, digest(self.shadow))
            self.only_what_is_gone_was_consumed(recorded)
            self.oracle.read(recorded.at, recorded.event)
        if not entries:
            return
        assert not isinstance(self.oracle.last, PlanReceived)
        self.oracle.check()
        self.counts_add_up()
        self.windows_and_totals_are_the_oracles()
        self.public_keys_are_those_of_the_state()

    def only_what_is_gone_was_consumed(self, recorded: Recorded) -> None:
        match recorded.event:
            case Decision(verdict="EXECUTE", expires_us=int(expires)) as granted:
                self.ends[granted.plan_id] = self.real + expires - recorded.at
            case PermitConsumed(source="observed" | "assumed", plan_id=plan_id):
                assert plan_id in self.taken or self.real >= self.ends[plan_id] - 1000
            case PermitExpired(plan_id=plan_id):
                assert plan_id not in self.taken
            case _:
                pass

    def counts_add_up(self) -> None:
        counts, oracle = self.shadow.counts, self.oracle
        assert counts.plans == oracle.plans == counts.allowed + counts.blocked + counts.skipped
        assert oracle.verdicts == Counter(EXECUTE=counts.allowed, BLOCK=counts.blocked, SKIP=counts.skipped)
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
                (found,) = [d for d in book.days if d.day == day] or [totals.Day(day)]
                assert sum(c.notional for c in held) == found.notional
                assert sum(c.quantity for c in held) == found.quantity

    def public_keys_are_those_of_the_state(self) -> None:
        held = {key: values for key, (values, _) in self.store._keys.items()}
        assert held[KEYS.state] == views.state_write(self.shadow, KEYS).values
        for symbol in SYMBOLS:
            for write in views.symbol_writes(self.shadow, symbol, KEYS):
                if write.op == "list":
                    assert held.get(write.key, ()) == write.values
                elif write.op == "set":
                    assert held[write.key] == write.values
        permitted = {key for key in held if key.startswith(KEYS.permit(""))}
        assert permitted <= {KEYS.permit(plan_id) for plan_id in self.outstanding()}


# -- a machine whose failures are made small -----------------------------------------------------------------------

AMOUNTS = ["0.02", "0.02", "0.013333333", "-0.02", "0.2", "0", "1e-8", "0.000000000001", None]
PRICES = ["95033.33333333", "3300.12345678", "0.00000001", "1e6", None]
MODES = ["testnet", "live", "dry_run", None]
SPANS = [SECOND, MINUTE - 1, MINUTE, 5 * MINUTE - 1, 5 * MINUTE, HOUR - 1, HOUR, 7 * HOUR, 25 * HOUR, 1, 0]
STEPS_BACK = [0, 1, -1, SECOND, -SECOND, -10 * MINUTE, -2 * HOUR]
FIELDS = ["symbol", "kill_score", "decision", "action"]


def seen(amount: str | None, price: str | None, *, hedge: bool) -> Market:
    return Market(
        legs=None if amount is None else {"LONG" if hedge else "BOTH": parse(amount)},
        mark_price=None if price is None else parse(price),
    )


ledgers = st.integers(0, 1)
backs = st.integers(0, 9)
usually = st.sampled_from([True, True, True, False])
seldom = st.sampled_from([False, False, False, True])
markets = st.builds(seen, st.sampled_from(AMOUNTS), st.sampled_from(PRICES), hedge=seldom)


class Gate(RuleBasedStateMachine):
    """Any order of anything. The long walks below go deeper; this one finds the shortest way to a failure."""

    world: World | None = None

    @initialize(policy=st.sampled_from(POLICIES), start=st.sampled_from([NOON, MIDNIGHT - MINUTE]))
    def begin(self, policy: Policy, start: int) -> None:
        self.world = World(policy, start)

    def teardown(self) -> None:
        if self.world is not None:
            self.world.close()

    @property
    def it(self) -> World:
        assert self.world is not None
        return self.world

    @invariant()
    def the_promises_hold(self) -> None:
        if self.world is not None:
            self.world.check()

    @rule(which=ledgers, count=st.integers(1, 3), symbol=st.sampled_from(SYMBOLS), action=st.sampled_from(ACTIONS))
    def plans_come(self, which: int, count: int, symbol: str, action: str) -> None:
        usual = seen("0.02", "95033.33333333", hedge=False)
        self.it.plans(which, count, usual, old=False, symbol=symbol, action=action)

    @rule(
        which=ledgers,
        market=markets,
        old=seldom,
        symbol=st.sampled_from(SYMBOLS),
        action=st.sampled_from(ACTIONS),
        decision=st.sampled_from(["EXECUTE", "SKIP"]),
        kill_score=st.sampled_from(["0.1", "0.8"]),
        close_qty=st.sampled_from(["", "0", "0.02"]),
    )
    def an_unusual_plan_comes(self, which: int, market: Market, *, old: bool, **changed: str) -> None:
        self.it.plans(which, 1, market, old=old, **changed)

    @rule(which=ledgers, field=st.sampled_from(FIELDS))
    def a_malformed_plan_comes(self, which: int, field: str) -> None:
        self.it.plans(which, 1, Market(), old=False, **{field: ""})

    @rule(which=ledgers, back=backs)
    def an_entry_is_delivered_again(self, which: int, back: int) -> None:
        self.it.redelivery(which, back)

    @rule(which=ledgers, really=seldom)
    def an_evaluation_fails(self, which: int, *, really: bool) -> None:
        if really:
            self.it.failure(which)

    @rule(back=backs)
    def a_client_consumes(self, back: int) -> None:
        self.it.consumption(back)

    @rule(which=ledgers)
    def permits_at_their_end_are_taken_back(self, which: int) -> None:
        self.it.sweep(which)

    @rule(which=ledgers)
    def the_oldest_permit_comes_to_its_end(self, which: int) -> None:
        self.it.end(which)

    @rule(
        which=ledgers,
        back=backs,
        executed=st.sampled_from(["True", "False"]),
        quantity=st.sampled_from(["0.015", "0.3"]),
        status=st.sampled_from(["ok", "error"]),
    )
    def a_result_comes(self, which: int, back: int, executed: str, quantity: str, status: str) -> None:
        self.it.result(which, back, executed=executed, quantity=quantity, status=status)

    @rule(which=ledgers, really=seldom)
    def somebody_disarms(self, which: int, *, really: bool) -> None:
        if really:
            self.it.disarm(which)

    @rule(which=ledgers, manual=st.booleans(), works=usually)
    def a_disarm_is_carried_out(self, which: int, *, manual: bool, works: bool) -> None:
        self.it.actuation(which, manual=manual, works=works)

    @rule(which=ledgers, apply_mode=st.sampled_from(MODES))
    def the_file_is_looked_at(self, which: int, apply_mode: str | None) -> None:
        self.it.look(which, apply_mode)

    @rule(which=ledgers, force=usually)
    def somebody_rearms(self, which: int, *, force: bool) -> None:
        self.it.rearm(which, force=force)

    @rule(on=seldom)
    def the_brake_is_set_or_released(self, *, on: bool) -> None:
        self.it.brake(on=on)

    @rule(which=ledgers)
    def what_is_due_by_time_happens(self, which: int) -> None:
        self.it.tick(which)

    @rule(span=st.sampled_from(SPANS))
    def time_passes(self, span: int) -> None:
        self.it.real += span

    @rule(which=ledgers, span=st.sampled_from(STEPS_BACK))
    def a_clock_is_set(self, which: int, span: int) -> None:
        self.it.offset[which] = span

    @rule(which=ledgers)
    def a_daemon_restarts(self, which: int) -> None:
        self.it.restart(which)

    @rule(lost=st.lists(st.sampled_from(["before", "after"]), min_size=1, max_size=2))
    def replies_will_be_lost(self, lost: list[str]) -> None:
        self.it.store.lose = lost


Gate.TestCase.settings = REPEATABLE
TestGate = Gate.TestCase


# -- long walks ----------------------------------------------------------------------------------------------------

WALKS = 10
STEPS = 600
OUTSIDE = ("PLAN_LOST", "APPLY_MODE_RESTORED", "HISTORY_RESTORED", "HISTORY_ACCEPTED")
EVERYTHING = (
    *(cls.NAME for cls in ALL if cls.NAME not in OUTSIDE),
    *(reason for reason in REASONS if reason not in ("quarantined", "history_hold", "plan_stale", "invalid_plan")),
    *("observed", "assumed", "result", "counted again", "conflict"),
    *(f"{permit} True" for permit in ("consumed", "outstanding", "expired", "revoked", "none", "unknown")),
    *(f"DISARM_STARTED {why}" for why in ("drill", "burst_limit_breach", "repeated_errors", "unpermitted_execution")),
)
"""What the walks have to come across, or they show nothing."""
WEIGHTS = {
    "plans": 30, "unusual": 6, "malformed": 1, "redelivery": 3, "failure": 0.5, "consumption": 8, "end": 12, "sweep": 6,
    "result": 6, "disarm": 0.5, "actuation": 5, "rearm": 8, "brake": 2, "tick": 6, "time": 30, "clock": 2, "restart": 1,
    "lose": 2,
}  # fmt: skip


def step(world: World, chance: Random) -> None:
    """One thing that happens, more or less as often as it does."""
    which, back = chance.randrange(2), chance.randrange(6)
    common = {"symbol": chance.choice(SYMBOLS), "action": chance.choices(ACTIONS, [3, 6, 6, 6, 3, 0])[0]}
    match chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]:
        case "plans":
            market = seen(chance.choice(["0.02", "0.01", "-0.004"]), chance.choice(PRICES[:2]), hedge=False)
            qty = chance.choice(["0.001", "0.01"])
            world.plans(which, chance.randint(1, 2), market, old=False, close_qty=qty, **common)
        case "unusual":
            market = seen(chance.choice(AMOUNTS), chance.choice(PRICES), hedge=chance.random() < 0.3)
            common |= {"action": chance.choice(ACTIONS), "decision": chance.choice(["EXECUTE", "SKIP"])}
            world.plans(which, 1, market, old=chance.random() < 0.5, kill_score=chance.choice(["0.1", "0.8"]), **common)
        case "malformed":
            world.plans(which, 1, Market(), old=False, **{chance.choice(FIELDS): ""})
        case "redelivery":
            world.redelivery(which, back)
        case "failure":
            world.failure(which)
        case "consumption":
            world.consumption(back)
        case "end":
            world.end(which)
        case "sweep":
            world.sweep(which)
        case "result":
            told = {
                "executed": chance.choice(["True", "True", "False"]),
                "status": chance.choice(["ok", "ok", "error"]),
            }
            world.result(which, back, quantity=chance.choice(["0.0001", "0.3"]), **told)
        case "disarm":
            world.disarm(which)
        case "actuation":
            world.actuation(which, manual=chance.random() < 0.5, works=chance.random() < 0.7)
        case "rearm":
            for mode in MODES[:back]:  # somebody edited the Apply Layer's file before
                world.look(which, mode)
            world.rearm(which, force=chance.random() < 0.6)
        case "brake":
            world.brake(on=chance.random() < 0.15)
        case "tick":
            world.tick(which)
        case "time":
            world.real += chance.choices(SPANS, [8, 4, 8, 2, 2, 1, 1, 1, 0.3, 2, 2])[0]
        case "clock":
            world.offset[which] = chance.choice(STEPS_BACK)
        case "restart":
            world.restart(which)
        case "lose":
            world.store.lose = chance.choices(["before", "after"], k=chance.randint(1, 2))


def walk(seed: int) -> World:
    """Walk on, everything checked after every step, and once more from the beginning."""
    chance = Random(seed)  # noqa: S311 - a walk, no secret
    world = World(POLICIES[seed % len(POLICIES)], chance.choice([NOON, MIDNIGHT - MINUTE]))
    with contextlib.closing(world):
        for _ in range(STEPS):
            step(world, chance)
            world.check()
    again = initial()
    for recorded, found in zip(map(codec.decode, verify(world.store.entries)), world.digests, strict=True):
        assert digest(evolve(again, recorded)) == found
    return world


def test_the_promises_hold_all_along_long_walks() -> None:
    happened: Counter[str] = Counter()
    for seed in range(WALKS):
        world = walk(seed)
        happened["conflict"] += world.ledgers[0].conflicts + world.ledgers[1].conflicts
        for event in (codec.decode(entry).event for entry in world.store.entries):
            happened[event.NAME] += 1
            match event:
                case Decision():
                    happened[event.reason or event.verdict] += 1
                case PermitConsumed():
                    happened[event.source] += 1
                case DisarmStarted() | Throttled():
                    happened[f"{event.NAME} {event.reason}"] += 1
                case Execution():
                    happened[f"{event.permit} {event.executed}"] += 1
                    happened["counted again"] += event.counted
                case _:
                    pass
    assert [thing for thing in EVERYTHING if not happened[thing]] == []


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
@given(happened=st.lists(events, min_size=1, max_size=12), data=st.data())
def test_any_history_forms_a_chain_that_breaks_wherever_it_is_changed(
    happened: list[Event], data: st.DataObject
) -> None:
    entries = codec.encode_all(happened, after=GENESIS, at=NOON)
    assert list(verify(entries)) == entries
    at = data.draw(st.integers(0, len(entries) - 1))
    changed = data.draw(st.sampled_from(["name", "timestamp", "data"]))
    other: dict[str, Any] = {"name": "OTHER", "timestamp": "0.000000", "data": entries[at].data + b" "}
    entries[at] = replace(entries[at], **{changed: other[changed]})
    with pytest.raises(ChainError) as broken:
        list(verify(entries))
    assert broken.value.seq == at + 1
