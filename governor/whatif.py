"""The what-if audit: the recorded past, decided under other settings, in a world that goes on as it then would have.

Two states are folded side by side: what was recorded, and what would have been decided. What came from outside (plans,
results, people, the brake, history) is the same in both; the other world's decisions are made by `governor.decider`
and by nothing else. Memory does not grow with the stream, apart from the differences.

Nobody can know all of it, and what is assumed is counted and told:

    position, price   of the last time the exchange told the symbol's position, where it was not asked
    consumption       a permit only the other world grants, or only the record revokes, is used up when its time is over
    results           of plans that are not permitted there do not happen; what went around the gate happens in both
    APPLY_MODE        as recorded; `dry_run` after a disarm only the other world has, as it was before one it has not
    proof             a disarm in the other world is carried out at once
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

import msgspec

from events.types import (
    ApplyModeDrifted,
    AutoDisarm,
    Decision,
    DisarmFailed,
    DisarmStarted,
    DriftEnded,
    ErrorRecorded,
    Event,
    Execution,
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
from governor import decider
from governor.gates import Situation
from governor.market import Market
from governor.outcome import (
    ASSUMPTIONS,
    Assumed,
    Difference,
    Disarmed,
    Moved,
    MovedBoth,
    Outcome,
    SecondsBoth,
    StatesBoth,
    Verdict,
    lines,
)
from governor.plans import MalformedPlanError, parse_plan
from governor.policy import NAMES, SYMBOL_NAMES, Limits, Policy, from_texts, read
from governor.recorded import history_of, market_of, result_of
from governor.replay import NO_POLICIES
from governor.world import STATES, Rules, World, series
from projections.state import DISARMED, State

__all__ = ["Outcome", "WhatIf", "check_overrides", "lines", "parse_overrides"]

PERMITTED = ("outstanding", "consumed", "expired")
"""What becomes of a permit that a client could use."""
OVERRIDABLE = tuple(name for name in (*SYMBOL_NAMES, *NAMES) if name != "credentials")


# -- settings ------------------------------------------------------------------------------------------------------


def parse_overrides(texts: Sequence[str]) -> dict[str, str]:
    """Read `NAME=VALUE`, each name once.

    Raises:
        ValueError: names what is wrong, its value and what is allowed.
    """
    found: dict[str, str] = {}
    for given in texts:
        name, equals, value = given.partition("=")
        if not equals:
            raise ValueError(f"{given!r} is no NAME=VALUE")
        if name in found:
            raise ValueError(f"{name} is given twice: {found[name]!r} and {value!r}")
        found[name] = value
    check_overrides(found)
    return found


def check_overrides(overrides: Mapping[str, str]) -> None:
    """Hold overrides to the names and values a decision knows.

    Raises:
        ValueError: names the variable, its value and what is allowed.
    """
    for name, value in overrides.items():
        if name not in OVERRIDABLE:
            near = difflib.get_close_matches(name, OVERRIDABLE, n=1, cutoff=0)[0]
            raise ValueError(
                f"{name} = {value!r}: no setting of that name takes part in a decision; did you mean {near}?"
            )
        read(name, value, SYMBOL_NAMES if name in SYMBOL_NAMES else NAMES)


def changed(policy: Policy, overrides: Mapping[str, str], limits: Mapping[str, Mapping[str, str]] | None) -> Policy:
    """A policy under other settings. A symbol keeps what it has of its own, unless there are other `limits`."""
    general = dict(read(name, value, SYMBOL_NAMES) for name, value in overrides.items() if name in SYMBOL_NAMES)
    account = dict(read(name, value, NAMES) for name, value in overrides.items() if name in NAMES)
    now: Limits = msgspec.structs.replace(policy.limits, **general)
    if limits is not None:
        by_symbol = {
            symbol: msgspec.structs.replace(now, **dict(read(name, value, SYMBOL_NAMES) for name, value in own.items()))
            for symbol, own in limits.items()
        }
    else:
        by_symbol = {
            symbol: msgspec.structs.replace(
                own,
                **{name: new for name, new in general.items() if getattr(own, name) == getattr(policy.limits, name)},
            )
            for symbol, own in policy.by_symbol.items()
        }
    return msgspec.structs.replace(policy, limits=now, by_symbol=by_symbol, **account)


# -- both ----------------------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    """What the exchange told about a symbol when it was last asked and told the position."""

    seq: int
    at: int
    market: Market


_NEVER = Market(position_error="never_recorded", price_error="never_recorded")


class WhatIf:
    """The recorded past under other settings, a page at a time.

    Args:
        overrides: settings by variable name, as texts; they hold throughout, whatever was loaded meanwhile.
        limits: limits of single symbols (symbol, variable name, text) in place of the recorded ones.
        policies: the recorded policies by digest, in place of what SETTINGS_LOADED recorded under it.
        rearm_after_us: a person re-arms this long after a disarm that only the other settings have; None: nobody does
            before the next recorded re-arm.

    Raises:
        ValueError: a name or value is wrong; it is named, with what is allowed.
    """

    def __init__(
        self,
        overrides: Mapping[str, str],
        *,
        limits: Mapping[str, Mapping[str, str]] | None = None,
        policies: Mapping[str, Policy] = NO_POLICIES,
        rearm_after_us: int | None = None,
    ) -> None:
        check_overrides(overrides)
        from_texts({}, limits)
        if rearm_after_us is not None and rearm_after_us < 0:
            raise ValueError(f"rearm_after_us is {rearm_after_us}, expected at least 0")
        self.overrides = dict(overrides)
        self.limits = None if limits is None else {symbol: dict(own) for symbol, own in limits.items()}
        self.differences: list[Difference] = []
        self._record, self._other = World(), World()
        self._policies = {
            digest: Rules(0, policy, changed(policy, overrides, limits)) for digest, policy in policies.items()
        }
        self._now = Rules(0, Policy(), changed(Policy(), overrides, limits))
        self._rules: list[Rules] = []
        self._rearm_after = rearm_after_us
        self._rearm_at: int | None = None
        self._held: Recorded | None = None
        """A plan whose decision comes next."""
        self._open: Disarmed | None = None
        """The other world disarmed at the present input; whether the record did is told by what comes next."""
        self._added = False
        """The other world is disarmed and the record was not, or not yet."""
        self._avoided = False
        """The record was disarmed where the other world was not, and not re-armed since."""
        self._apply_mode: str | None = None
        """The last one recorded while the record was not disarmed."""
        self._own: list[tuple[int, str]] = []
        """Permits of the other world whose end nobody recorded: when, and which. A heap."""
        self._looks: dict[str, _Look] = {}
        self._assumptions: Counter[str] = Counter()
        self._decisions = 0

    @property
    def recorded(self) -> State:
        """The state as it was."""
        return self._record.state

    @property
    def computed(self) -> State:
        """The state as it would have been. Its events are numbered by themselves."""
        return self._other.state

    def feed(self, recorded: Iterable[Recorded]) -> None:
        """The next events, from the first one on.

        Raises:
            GapError: one does not follow the one before it.
            ValueError: recorded settings cannot be read.
        """
        for each in recorded:
            self._take(each)

    def finish(self) -> Outcome:
        """There is no more."""
        if self._held is not None:
            self._unfinished(self._held)
            self._held = None
        end = self.recorded.time
        self._begin(end)
        return self._outcome(end)

    # -- what comes from outside

    def _take(self, recorded: Recorded) -> None:
        held, self._held = self._held, None
        event = recorded.event
        if held is not None:
            if isinstance(event, Decision) and event.plan_id == getattr(held.event, "plan_id", None):
                self._plan(held, recorded, event)
                return
            self._unfinished(held)
        if isinstance(event, PlanReceived):
            self._held = recorded
            return
        match event:
            case DisarmStarted(manual=False):
                self._record_disarmed(recorded, event)
            case PermitRevoked():
                self._end_by_itself(event.plan_id)
            case (
                Decision() | ErrorRecorded() | Throttled() | UnpermittedExecution() | PermitConsumed(source="result")
                | AutoDisarm() | ManualDisarm() | DisarmFailed()
            ):  # fmt: skip
                pass  # these follow, or prove what the record did
            case _:
                self._begin(recorded.at)
                self._happen(self._led_to(event, recorded.at), recorded)
                if isinstance(event, DisarmStarted):
                    self._record_disarmed(recorded, event)
        self._record.fold(recorded)

    def _unfinished(self, held: Recorded) -> None:
        """A plan whose decision is not there."""
        self._begin(held.at)
        self._happen([held.event], held)
        self._record.fold(held)

    def _begin(self, at: int) -> None:
        """Before an input: what the one before led to is known now, and what is due by time alone happens."""
        if self._open is not None:
            started, self._open = self._open, None
            self._other.disarms.append(msgspec.structs.replace(started, already=self.recorded.mode.state == DISARMED))
            self._added = True
            if self._rearm_after is not None:
                self._rearm_at = self.computed.mode.since + self._rearm_after
        now = max(at, self.computed.time, self.recorded.time)
        while (due := self._due(now)) is not None:
            self._other.happen(due[1], due[0])
        self._other.reach(self.recorded.time)

    def _due(self, now: int) -> tuple[int, Sequence[Event]] | None:
        """The next thing in the other world that nobody recorded, and when."""
        until = self.computed.mode.until
        if until is not None and until == self.recorded.mode.until:
            until = None  # the record tells when somebody looked
        first = min(
            (at for at in (until, self._rearm_at, self._own[0][0] if self._own else None) if at is not None),
            default=None,
        )
        if first is None or first > now:
            return None
        if first == until:
            return first, decider.tick(self.computed, first)
        if first == self._rearm_at:
            self._rearm_at, self._added = None, False
            self._assumptions["rearms"] += 1
            return first, decider.rearm(self.computed, reason="assumed", operator="assumed", force=False, halt=False)
        plan_id = heappop(self._own)[1]
        events = decider.take_back(self.computed, plan_id, gone=True, now=first)
        self._assumptions["consumption"] += len(events)
        return first, events

    def _led_to(self, event: Event, at: int) -> Sequence[Event]:  # noqa: C901, PLR0911, PLR0912 - one case an event
        state, policy = self.computed, self._now.computed
        match event:
            case PlanRejected():
                problem = MalformedPlanError(
                    event.reason,
                    plan_id=event.plan_id,
                    symbol=event.symbol,
                    counts=event.decision in (None, "EXECUTE"),
                )
                return decider.reject(
                    state, problem, policy, Situation(now=at), fields=event.fields, entry_id=event.entry_id
                )
            case PlanLost():
                return decider.lose(state, event.entry_ids, policy, at, count=event.count)
            case Execution():
                if not self._happens(event, at):
                    self._assumptions["results_left_out"] += 1
                    return ()
                return decider.execution(state, result_of(event), policy, at, fields=event.fields)
            case PermitExpired():
                return decider.take_back(state, event.plan_id, gone=False, now=at)
            case PermitConsumed():
                if state.permits.get(event.plan_id) is not None:
                    return decider.take_back(state, event.plan_id, gone=True, now=at)
                corrects = not self._added and self.recorded.permits.get(event.plan_id) is None
                return decider.correct_revoked(state, [event.plan_id]) if corrects else ()
            case Recovered():
                return decider.tick(state, at)
            case DisarmStarted():
                mode = decider.DRY_RUN if self._added else None
                led_to = decider.disarm_by_hand(
                    state, reason=event.reason, operator=event.operator or "", apply_mode=mode
                )
                return [
                    msgspec.structs.replace(each, context=event.context) if isinstance(each, DisarmStarted) else each
                    for each in led_to
                ]
            case Rearmed():
                self._added = self._avoided = False
                self._rearm_at = None
                return decider.rearm(
                    state, reason=event.reason, operator=event.operator, force=event.forced, halt=False
                )
            case ApplyModeDrifted():
                return decider.drift(state, event.apply_mode)
            case DriftEnded():
                return decider.drift(state, decider.DRY_RUN)
            case SettingsLoaded():
                self._load(event, at)
                return (event,)
            case _:
                return (event,)  # what was done about history, and with the Apply Layer after a re-arm

    def _happens(self, event: Execution, at: int) -> bool:
        """Whether a recorded result happens in the other world too: a client that obeyed the gate does so there."""
        plan = self.computed.plan(event.plan_id, now=at)
        had, has = event.permit in PERMITTED, plan is not None and plan.permit in PERMITTED
        return (not had or has) if event.executed else had == has

    def _load(self, event: SettingsLoaded, at: int) -> None:
        rules = self._policies.get(event.digest)
        if rules is None:
            limits = event.limits if self.limits is None else self.limits
            rules = self._policies[event.digest] = Rules(
                0, from_texts(event.settings, event.limits), from_texts(event.settings | self.overrides, limits)
            )
        self._now = rules._replace(at=at)
        if not self._rules or self._rules[-1][1:] != rules[1:]:
            self._rules.append(self._now)

    def _happen(self, events: Sequence[Event], cause: Recorded) -> None:
        """What an input leads to in the other world."""
        self._other.happen(events, cause.at)
        for event in events:
            if isinstance(event, DisarmStarted):
                self._open = Disarmed(
                    seq=cause.seq, at=cause.at / 1e6, reason=event.reason, context=event.context, matched=False,
                    already=False,
                )  # fmt: skip
                self._other.happen([_done(event)], cause.at)

    def _record_disarmed(self, recorded: Recorded, event: DisarmStarted) -> None:
        """The record disarms: at the present input, as the other world may have done."""
        both, self._open = self._open, None
        self._avoided = both is None
        self._record.disarms.append(
            Disarmed(
                seq=recorded.seq,
                at=recorded.at / 1e6,
                reason=event.reason,
                context=event.context,
                matched=both is not None,
                already=both is None and self.computed.mode.state == DISARMED,
            )
        )
        if both is not None:
            self._other.disarms.append(msgspec.structs.replace(both, matched=True, seq=recorded.seq))

    def _end_by_itself(self, plan_id: str) -> None:
        """A permit whose end in the other world nobody recorded."""
        held = self.computed.permits.get(plan_id)
        if held is not None:
            heappush(self._own, (held.expires_us, plan_id))

    # -- plans

    def _plan(self, received: Recorded, recorded: Recorded, was: Decision) -> None:
        plan = received.event
        assert isinstance(plan, PlanReceived)
        self._begin(received.at)
        self._decisions += 1
        mode = self._mode(was)
        events, assumed = self._decide(plan, was, mode, received.at)
        now = next((event for event in events if isinstance(event, Decision)), None)
        if now is None:
            self._assumptions["taken_as_recorded"] += 1
            events, now, assumed = (plan, was), was, None
        elif mode != was.apply_mode and now.verdict != "SKIP":
            self._assumptions["apply_mode"] += 1
        self._happen(events, msgspec.structs.replace(received, seq=recorded.seq))
        self._record.fold(received)
        self._record.fold(recorded)
        if now.verdict == "EXECUTE" and was.verdict != "EXECUTE":
            self._end_by_itself(now.plan_id)
        if assumed is not None:
            self._assumptions["positions" if assumed.seq is not None else "positions_unknown"] += 1
        if (was.verdict, was.reason) != (now.verdict, now.reason):
            self.differences.append(
                Difference(
                    plan_id=was.plan_id,
                    seq=recorded.seq,
                    at=recorded.at / 1e6,
                    symbol=was.symbol,
                    recorded=Verdict(was.verdict, was.reason),
                    computed=Verdict(now.verdict, now.reason),
                    assumed=assumed,
                )
            )
        if was.mode != DISARMED:
            self._apply_mode = was.apply_mode
        if was.asked and was.legs is not None:
            self._looks[was.symbol] = _Look(recorded.seq, recorded.at, market_of(was))

    def _mode(self, was: Decision) -> str | None:
        """APPLY_MODE in the other world."""
        if self._added:
            return decider.DRY_RUN
        return self._apply_mode if self._avoided else was.apply_mode

    def _decide(
        self, received: PlanReceived, was: Decision, apply_mode: str | None, at: int
    ) -> tuple[Sequence[Event], Assumed | None]:
        """What a plan leads to in the other world. No events: it cannot be decided again."""
        policy = self._policies.get(was.settings, self._now).computed
        history = history_of(self.recorded, was, at)
        situation = Situation(now=at, apply_mode=apply_mode, halt=was.halt, history=history)
        fields, settings, state = received.fields, was.settings, self.computed
        try:
            plan = parse_plan(fields, entry_id=received.entry_id, now=at, needs_close_qty=not policy.credentials)
        except MalformedPlanError:
            return (), None
        if was.reason == "evaluation_error":
            error = was.error or ""
            failed = decider.fail(state, plan, policy, situation, fields=fields, error=error, settings=settings)
            return failed.events, None
        known = (policy, situation)
        try:
            seen = market_of(was) if was.asked else None
            return decider.decide(state, plan, seen, *known, fields=fields, settings=settings).events, None
        except decider.MarketNeededError:
            look = self._looks.get(plan.symbol)
            seen = look.market if look is not None else _NEVER
            decided = decider.decide(state, plan, seen, *known, fields=fields, settings=settings)
        if look is None or decided.decision is None:
            return decided.events, Assumed()
        assumed = Assumed(
            position_amt=decided.decision.position_amt,
            mark_price=look.market.mark_price,
            seq=look.seq,
            age_s=(at - look.at) / 1e6,
        )
        return decided.events, assumed

    # -- the end

    def _outcome(self, end: int) -> Outcome:
        record, other = self._record, self._other
        allowed = sum(each.computed.verdict == "EXECUTE" for each in self.differences)
        blocked = sum(each.recorded.verdict == "EXECUTE" for each in self.differences)
        return Outcome(
            events=self.recorded.seq,
            plans=self.recorded.counts.plans,
            decisions=self._decisions,
            overrides=self.overrides,
            limits=self.limits,
            differences=tuple(self.differences),
            newly_allowed=allowed,
            newly_blocked=blocked,
            reason_changed=len(self.differences) - allowed - blocked,
            symbols={
                symbol: MovedBoth(recorded=record.moved.get(symbol, Moved()), computed=other.moved.get(symbol, Moved()))
                for symbol in sorted(record.moved.keys() | other.moved.keys())
            },
            recorded_disarms=tuple(record.disarms),
            computed_disarms=tuple(other.disarms),
            seconds={
                name: SecondsBoth(recorded=record.micros[name] / 1e6, computed=other.micros[name] / 1e6)
                for name in STATES
            },
            state=StatesBoth(recorded=self.recorded.mode.state, computed=self.computed.mode.state),
            assumptions={kind: self._assumptions[kind] for kind in ASSUMPTIONS},
            series=series(record, other, self._rules or [self._now], end),
        )


def _done(started: DisarmStarted) -> Event:
    told: dict[str, Any] = {"reason": started.reason, "context": started.context, "epoch": started.epoch}
    told["action_taken"] = decider.ACTION_TAKEN
    return ManualDisarm(operator=started.operator or "", **told) if started.manual else AutoDisarm(**told)
