"""The auditor: decides everything that was recorded again, from its recorded inputs, and compares.

Three verdicts are told apart. Integrity: the chain holds. Completeness: no number is missing, and the history contains
a head that was kept elsewhere. Agreement: what was decided is what the recorded plan, market data, settings and time
lead to. Nothing is written, and no daemon is needed.

An input (a plan, a result, the end of a permit …) is decided again on the state before it, by the same functions that
decided it, and held against as many recorded events as that leads to. An event that only ever follows from an input
and follows from none is a difference too. What was recorded is what is folded, so one difference stays one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from events import chain
from events.codec import FOLDED, decode
from events.types import (
    ApplyModeDrifted,
    Context,
    Decision,
    DisarmStarted,
    DriftEnded,
    Entry,
    ErrorRecorded,
    Event,
    Execution,
    Head,
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
from governor import decider
from governor.gates import Situation
from governor.plans import MalformedPlanError, Plan, parse_plan
from governor.policy import Policy, from_texts
from governor.recorded import history_of, market_of, result_of
from projections.state import State, digest, evolve, initial

NO_POLICIES: Mapping[str, Policy] = MappingProxyType({})
_DEFAULT = Policy()


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One field in which what was recorded is not what its inputs lead to."""

    seq: int
    plan_id: str | None
    field: str
    """Of the event, or `event` where there is one too many, too few, or another one."""
    recorded: Any
    computed: Any


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit found."""

    events: int
    plans: int
    decisions: int
    differences: tuple[Difference, ...]
    chain: str | dict[str, Any]
    """`ok`, or where it does not hold: `{"broken_at": seq, "problem": …}`. Nothing behind that was looked at."""
    complete: bool
    """False when the history does not contain the head that was expected."""
    digest: str
    """Of the state at the end."""
    state: str
    head: Head

    @property
    def clean(self) -> bool:
        """Whether all three verdicts are good."""
        return self.chain == "ok" and self.complete and not self.differences


def replay(
    entries: Iterable[Entry],
    *,
    key: bytes | None = None,
    expect: Head | None = None,
    until_us: int | None = None,
    until_seq: int | None = None,
    policies: Mapping[str, Policy] = NO_POLICIES,
) -> tuple[Replay, State]:
    """Audit a history.

    Args:
        entries: the stored events, from the first.
        key: `GOV_AUDIT_KEY`, if the chain is keyed.
        expect: a head that was kept elsewhere; the history must contain it.
        until_us: stop before the first event later than this (microseconds).
        until_seq: stop after this event.
        policies: by digest, in place of what SETTINGS_LOADED recorded under it.

    Returns:
        What was found, and the state at the end.
    """
    auditor = Auditor(key=key, expect=expect, until_us=until_us, until_seq=until_seq, policies=policies)
    auditor.feed(entries)
    return auditor.finish()


class Auditor:
    """The same a page at a time, for histories that should not be held in memory.

    It can audit a part: the history is cut before a plan, since a plan always begins what is decided together.

    Args:
        key: as for `replay`, and so are `expect`, `until_us`, `until_seq` and `policies`.
        expect: see there.
        until_us: see there.
        until_seq: see there.
        policies: see there.
        until_plan: stop before the first plan received at this event or later.
        from_plan: only fold what is before the first plan received at this event or later.
    """

    def __init__(
        self,
        *,
        key: bytes | None = None,
        expect: Head | None = None,
        until_us: int | None = None,
        until_seq: int | None = None,
        policies: Mapping[str, Policy] = NO_POLICIES,
        until_plan: int | None = None,
        from_plan: int | None = None,
    ) -> None:
        self.seq, self._hash = chain.GENESIS
        """The last event that was looked at."""
        self._key, self._expect = key, expect
        self._until_us, self._until_seq = until_us, until_seq
        self._until_plan, self._from_plan = until_plan, from_plan
        self._audit = _Audit(policies)
        self._seen = expect is None or expect.seq == 0
        self._broken: str | dict[str, Any] = "ok"
        self.stopped = False
        """Whether it ended before the history did, as it was told to."""
        self.cut: Head | None = None
        """The head before the plan at which the history is cut, once that plan was reached."""

    def feed(self, entries: Iterable[Entry]) -> bool:
        """The next entries. False when nothing behind them needs to be looked at."""
        bounded = self._until_us is not None or self._until_seq is not None
        try:
            verified = chain.verify(entries, after=Head(self.seq, self._hash), key=self._key)
            for entry in verified if self._from_plan is None else self._folded(verified, self._from_plan):
                recorded = decode(entry)
                if self._until_plan is not None and _cuts(entry, self._until_plan):
                    self._audit.finish_before(recorded)
                    self.cut = Head(self.seq, self._hash)
                    return False
                if bounded and self._beyond(recorded):
                    self.stopped = True
                    return False
                if not self._seen:
                    self._seen = self._expect == (entry.seq, entry.hash)
                self._audit.take(recorded)
                self.seq, self._hash = entry.seq, entry.hash
        except chain.ChainError as error:
            self._broken = {"broken_at": error.seq, "problem": error.problem}
        except ValueError as error:
            self._broken = {"broken_at": self.seq + 1, "problem": str(error)}
        return self._broken == "ok"

    def damaged(self, problem: str) -> None:
        """What comes next in the history is no event."""
        self._broken = {"broken_at": self.seq + 1, "problem": problem}

    def finish(self) -> tuple[Replay, State]:
        """What was found, and the state at the end."""
        # A history that is stopped on purpose may stop between an input and what followed from it.
        self._audit.finish(compared=not self.stopped)
        state = self._audit.state
        found = Replay(
            events=state.seq,
            plans=state.counts.plans,
            decisions=self._audit.decisions,
            differences=tuple(self._audit.differences),
            chain=self._broken,
            complete=self._seen,
            digest=digest(state),
            state=state.mode.state,
            head=state.head,
        )
        return found, state

    def _folded(self, entries: Iterator[Entry], from_plan: int) -> Iterator[Entry]:
        """Fold, and pass on what is to be audited."""
        for entry in entries:
            if _cuts(entry, from_plan):
                self.cut, self._from_plan = Head(self.seq, self._hash), None
                yield entry
                yield from entries
                return
            self._audit.fold(decode(entry, FOLDED))
            self.seq, self._hash = entry.seq, entry.hash

    def _beyond(self, recorded: Recorded) -> bool:
        return (self._until_us is not None and recorded.at > self._until_us) or (
            self._until_seq is not None and recorded.seq > self._until_seq
        )


def _cuts(entry: Entry, seq: int) -> bool:
    return entry.seq >= seq and entry.name == PlanReceived.NAME


def joined(first: Replay, cut: Head | None, second: Auditor) -> Replay | None:
    """What audits of two parts found, as one audit of the whole would have found it.

    Args:
        first: of the part `until_plan`.
        cut: where that ended; None where it never came to that plan, and so was an audit of the whole.
        second: of the part `from_plan`, fed and not finished.

    Returns:
        None where the two did not read the same history.
    """
    if cut is None:
        return first
    if cut != second.cut:
        return None
    found, _ = second.finish()
    return msgspec.structs.replace(
        found,
        decisions=first.decisions + found.decisions,
        differences=first.differences + found.differences,
        complete=first.complete or found.complete,
    )


def decide_again(  # noqa: C901, PLR0911, PLR0912 - one case an event
    state: State, first: Recorded, second: Event | None, policies: Mapping[str, Policy]
) -> Sequence[Event]:
    """The events an input leads to, by the recorded inputs. Empty: it could not have happened.

    Args:
        state: before the input.
        first: the input.
        second: what was recorded next: a plan's decision, which holds the market data.
        policies: by the digest their SETTINGS_LOADED has.
    """
    at, event = first.at, first.event
    policy = policies.get(state.settings.digest if state.settings is not None else "", _DEFAULT)
    match event:
        case PlanReceived():
            if not isinstance(second, Decision) or second.plan_id != event.plan_id:
                return ()
            return _plan(state, event, second, policies.get(second.settings, policy), at)
        case PlanRejected():
            return _rejected(state, event, policy, at)
        case PlanLost():
            return decider.lose(state, event.entry_ids, policy, at, count=event.count)
        case Execution():
            return _execution(state, event, policy, at)
        case PermitExpired():
            return decider.take_back(state, event.plan_id, gone=False, now=at)
        case PermitConsumed(source="observed" | "assumed"):
            if state.permits.get(event.plan_id) is None:
                return decider.correct_revoked(state, [event.plan_id])
            return decider.take_back(state, event.plan_id, gone=True, now=at)
        case Recovered():
            return decider.tick(state, at)
        case DisarmStarted(manual=True):
            operator = event.operator or ""
            led_to = decider.disarm_by_hand(state, reason=event.reason, operator=operator, apply_mode=None)
            noted = {name: value for name, value in event.context.items() if name == "noted_us"}
            return [_noted(each, noted) for each in led_to]
        case Rearmed():
            try:
                return decider.rearm(
                    state, reason=event.reason, operator=event.operator, force=event.forced, halt=False
                )
            except decider.RearmRefusedError:
                return ()
        case ApplyModeDrifted():
            return decider.drift(state, event.apply_mode)
        case DriftEnded():
            return decider.drift(state, decider.DRY_RUN)
        case (
            Decision() | DisarmStarted() | PermitRevoked() | PermitConsumed() | ErrorRecorded() | Throttled()
            | UnpermittedExecution()
        ):  # fmt: skip
            return ()  # these only follow
        case _:
            return (event,)  # settings, proofs and what was done about history come from outside


def _noted(event: Event, noted: Context) -> Event:
    if isinstance(event, DisarmStarted):
        return msgspec.structs.replace(event, context=event.context | noted)
    return event


def _plan(state: State, received: PlanReceived, decision: Decision, policy: Policy, at: int) -> Sequence[Event]:
    situation = Situation(
        now=at,
        apply_mode=decision.apply_mode,
        halt=decision.halt,
        history=history_of(state, decision, at),
    )
    fields, settings = received.fields, decision.settings
    try:
        plan: Plan = parse_plan(fields, entry_id=received.entry_id, now=at, needs_close_qty=not policy.credentials)
        if decision.reason == "evaluation_error":
            error = decision.error or ""
            return decider.fail(state, plan, policy, situation, fields=fields, error=error, settings=settings).events
        market = market_of(decision) if decision.asked else None
        return decider.decide(state, plan, market, policy, situation, fields=fields, settings=settings).events
    except (MalformedPlanError, decider.MarketNeededError):
        return ()


def _execution(state: State, event: Execution, policy: Policy, at: int) -> Sequence[Event]:
    led_to = decider.execution(state, result_of(event), policy, at, fields=event.fields)
    return _as_cut(led_to) if event.truncated else led_to


def _rejected(state: State, event: PlanRejected, policy: Policy, at: int) -> Sequence[Event]:
    problem = _problem(event, policy, at)
    if problem is None:
        return ()
    led_to = decider.reject(state, problem, policy, Situation(now=at), fields=event.fields, entry_id=event.entry_id)
    return _as_cut(led_to, decision=event.decision) if event.truncated else led_to


def _problem(event: PlanRejected, policy: Policy, at: int) -> MalformedPlanError | None:
    """What is wrong with it: told by its fields, or where they were cut, by the event."""
    if event.truncated:
        counts = event.decision in (None, "", "EXECUTE")
        return MalformedPlanError(event.reason, plan_id=event.plan_id, symbol=event.symbol, counts=counts)
    try:
        parse_plan(event.fields, entry_id=event.entry_id, now=at, needs_close_qty=not policy.credentials)
    except MalformedPlanError as problem:
        return problem
    return None


def _as_cut(led_to: Sequence[Event], **kept: Any) -> Sequence[Event]:
    """What cut fields led to: what is left of them is short enough, but not whole."""
    return (msgspec.structs.replace(led_to[0], truncated=True, **kept), *led_to[1:]) if led_to else ()


class _Audit:
    """Holds back what is recorded until its input can be decided again; compares; folds."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.state = initial()
        self.differences: list[Difference] = []
        self.decisions = 0
        self._policies = dict(policies)
        self._waiting: list[Recorded] = []
        self._computed: Sequence[Event] | None = None

    def take(self, recorded: Recorded) -> None:
        """One more recorded event."""
        event = recorded.event
        if isinstance(event, Decision):
            self.decisions += 1
        elif isinstance(event, SettingsLoaded):
            self._know(event)
        self._waiting.append(recorded)
        self._settle(last=False)

    def fold(self, recorded: Recorded) -> None:
        """One more recorded event, which somebody else audits."""
        if isinstance(recorded.event, SettingsLoaded):
            self._know(recorded.event)
        evolve(self.state, recorded)

    def finish(self, *, compared: bool) -> None:
        """There is no more: settle what still waits, or only fold it."""
        if compared:
            self._settle(last=True)
        for recorded in self._waiting:
            evolve(self.state, recorded)
        self._waiting.clear()

    def finish_before(self, plan: Recorded) -> None:
        """Settle what still waits, knowing that this comes next. It is never part of what was before it."""
        self._waiting.append(plan)
        self._settle(last=True, until=plan)
        self._waiting.clear()

    def _know(self, event: SettingsLoaded) -> None:
        self._policies.setdefault(event.digest, from_texts(event.settings, event.limits))

    def _settle(self, *, last: bool, until: Recorded | None = None) -> None:
        waiting, state = self._waiting, self.state
        while waiting and waiting[0] is not until:
            computed = self._computed
            if computed is None:
                first = waiting[0]
                if len(waiting) == 1 and not last and isinstance(first.event, PlanReceived):
                    return
                second = waiting[1].event if len(waiting) > 1 else None
                computed = self._computed = decide_again(state, first, second, self._policies)
            if len(waiting) < len(computed) and not last:
                return
            taken = waiting[: len(computed) or 1]
            if [recorded.event for recorded in taken] != [*computed]:
                found, count = compare(taken, computed)
                self.differences += found
                taken = taken[:count]
            for recorded in taken:
                evolve(state, recorded)
            del waiting[: len(taken)]
            self._computed = None


def compare(recorded: Sequence[Recorded], computed: Sequence[Event]) -> tuple[list[Difference], int]:
    """Field by field, event by event, up to the first event that is another one.

    Returns:
        The differences, and how many recorded events they cover: at least one.
    """
    found: list[Difference] = []
    for index, each in enumerate(recorded):
        seq, was = each.seq, each.event
        now = computed[index] if index < len(computed) else None
        plan_id = getattr(was, "plan_id", None)
        if now is None or type(was) is not type(now):
            name = None if now is None else now.NAME
            found.append(Difference(seq=seq, plan_id=plan_id, field="event", recorded=was.NAME, computed=name))
            return found, max(1, index)
        found += [
            Difference(seq=seq, plan_id=plan_id, field=name, recorded=old, computed=new)
            for name in was.__struct_fields__
            if (old := getattr(was, name)) != (new := getattr(now, name))
        ]
    if len(computed) > len(recorded):
        missing = computed[len(recorded)].NAME
        found.append(Difference(seq=recorded[-1].seq, plan_id=None, field="event", recorded=None, computed=missing))
    return found, len(recorded)
