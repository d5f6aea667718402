"""The decider: what happens next, as events. Pure: given the state, the input and the time, the same events.

Every function here takes the state as it is and returns the events that follow; nobody changes anything. What is
returned is written in one commit or not at all. Each is also idempotent against what is already in the state: a
redelivered plan, a result told twice or a disarm that somebody else began says nothing new. That is what makes an
unknown outcome harmless: read the stream, fold it, ask again.

The verdict comes from the table in `governor.gates`; what follows from a reason (throttle, disarm) is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from events.decimals import ZERO
from events.types import (
    ApplyModeDrifted,
    Check,
    Context,
    Decision,
    DisarmStarted,
    DriftEnded,
    ErrorRecorded,
    Event,
    Execution,
    PermitConsumed,
    PermitExpired,
    PermitRevoked,
    PlanLost,
    PlanReceived,
    PlanRejected,
    Rearmed,
    Recorded,
    Recovered,
    Throttled,
    UnpermittedExecution,
)
from governor.gates import UPDATE_SL, Case, Situation, case, evaluate, history_of, needs_market
from governor.machine import advance, allows
from governor.market import Market
from governor.plans import FIELDS_BYTES, REJECTED_BYTES, MalformedPlanError, Plan, cut, entry_time
from governor.policy import Policy
from governor.results import Result
from projections import errors, windows
from projections.permits import MEMORY_US
from projections.state import DISARMED, State, evolve

DRY_RUN = "dry_run"
ACTION_TAKEN = "APPLY_MODE=dry_run + restart"
DRIFT_MOST = 64
"""Characters kept of a mode that somebody wrote by hand."""
ALL = None
"""Scope of a throttle that holds for every symbol."""


class Decided(msgspec.Struct, frozen=True):
    """What a plan led to."""

    events: tuple[Event, ...]
    """Empty for a redelivered entry."""
    decision: Decision | None = None


class MarketNeededError(Exception):
    """The exchange has to be asked before this plan can be decided."""


def tick(state: State, now: int) -> list[Event]:
    """What is due by time alone: the end of a throttle."""
    until = state.mode.until
    if until is not None and max(now, state.time) >= until:
        advance(state.mode.state, "recover")
        return [Recovered()]
    return []


def decide(
    state: State,
    plan: Plan,
    market: Market | None,
    policy: Policy,
    situation: Situation,
    *,
    fields: dict[str, str],
    settings: str = "",
) -> Decided:
    """Decide one plan.

    Args:
        state: all events so far.
        plan: the plan.
        market: what the exchange said; None if it was not asked.
        policy: limits in force.
        situation: the time and what else is true outside the events.
        fields: the plan as its producer wrote it, for the event.
        settings: digest of the policy.

    Raises:
        MarketNeededError: the gates before the exchange pass and the market is None.
    """
    if state.entries.get(plan.entry_id) is not None:
        return Decided(())
    state, before = _caught_up(state, situation.now)
    received = _received(plan, fields)
    known = state.plan(plan.plan_id, now=situation.now)
    if not plan.execute or (known is not None and known.decided):
        why = "duplicate_plan" if plan.execute else "not_execute"
        decision = _decision(case(plan, policy, state, None, situation), "SKIP", why, settings)
        return Decided((*before, received, decision), decision)
    the_case = case(plan, policy, state, market, situation)
    if market is None and needs_market(the_case):
        raise MarketNeededError
    checks, reason = evaluate(the_case)
    decision = _decision(the_case, "BLOCK" if reason else "EXECUTE", reason, settings, checks=checks)
    after = _consequences(the_case, reason) if reason else ()
    return Decided((*before, received, decision, *after), decision)


def must_ask(state: State, plan: Plan, policy: Policy, situation: Situation) -> bool:
    """Whether deciding this plan now needs the exchange."""
    known = state.plan(plan.plan_id, now=situation.now)
    if not plan.execute or (known is not None and known.decided) or state.entries.get(plan.entry_id) is not None:
        return False
    state, _ = _caught_up(state, situation.now)
    return needs_market(case(plan, policy, state, None, situation))


def fail(
    state: State, plan: Plan, policy: Policy, situation: Situation, *, fields: dict[str, str], error: str, settings: str
) -> Decided:
    """Decide a plan whose evaluation went wrong in an unexpected way: it alone is blocked, and one error counted."""
    if state.entries.get(plan.entry_id) is not None:
        return Decided(())
    received = _received(plan, fields)
    known = state.plan(plan.plan_id, now=situation.now)
    verdict = "BLOCK" if plan.execute and not (known is not None and known.decided) else "SKIP"
    decision = Decision(
        plan_id=plan.plan_id,
        symbol=plan.symbol,
        action=plan.action,
        verdict=verdict,
        reason="evaluation_error",
        computed_qty=None,
        computed_notional=None,
        entry_id=plan.entry_id,
        mode=state.mode.state,
        epoch=state.mode.epoch,
        settings=settings,
        history=situation.history,
        halt=situation.halt,
        apply_mode=situation.apply_mode,
        error=error[:500],
    )
    counted = record_error(
        state, policy, situation.now, kind="evaluation_error", detail=error, plan_id=plan.plan_id, symbol=plan.symbol
    )
    return Decided((received, decision, *counted), decision)


def reject(
    state: State,
    problem: MalformedPlanError,
    policy: Policy,
    situation: Situation,
    *,
    fields: dict[str, str],
    entry_id: str,
) -> tuple[Event, ...]:
    """A stream entry that is no plan."""
    if state.entries.get(entry_id) is not None:
        return ()
    kept, truncated = cut(fields, REJECTED_BYTES)
    rejected = PlanRejected(
        entry_id=entry_id,
        reason=str(problem),
        plan_id=problem.plan_id,
        symbol=problem.symbol,
        decision=fields.get("decision", "")[:32] or None,
        fields=kept,
        truncated=truncated,
    )
    if not problem.counts:
        return (rejected,)
    counted = record_error(
        state,
        policy,
        situation.now,
        kind="malformed_plan",
        detail=str(problem),
        plan_id=problem.plan_id,
        symbol=problem.symbol,
    )
    return (rejected, *counted)


def lose(state: State, entry_ids: tuple[str, ...], policy: Policy, now: int, *, count: int) -> tuple[Event, ...]:
    """Plans that were trimmed from the stream before they were decided."""
    fresh = tuple(entry_id for entry_id in entry_ids if state.entries.get(entry_id) is None)
    count -= len(entry_ids) - len(fresh)
    if count <= 0:
        return ()
    detail = f"{count} trimmed from the stream before they were decided"
    return (PlanLost(count=count, entry_ids=fresh), *record_error(state, policy, now, kind="plan_lost", detail=detail))


def execution(state: State, result: Result, policy: Policy, now: int, *, fields: dict[str, str]) -> tuple[Event, ...]:
    """A result, matched to its permit."""
    if not result.matters or state.results.get(result.entry_id) is not None:
        return ()
    plan = state.plan(result.plan_id, now=now)
    permit, symbol = (plan.permit, plan.symbol) if plan is not None else ("unknown", result.symbol)
    again = result.executed and permit == "expired"
    kept, truncated = cut(fields, REJECTED_BYTES)
    told = Execution(
        plan_id=result.plan_id,
        symbol=symbol,
        decision=result.decision,
        executed=result.executed,
        entry_id=result.entry_id,
        permit=permit,
        executed_qty=result.executed_qty,
        counted=again,
        failed=result.failed,
        error=result.error[:500] if result.error else None,
        fields=kept,
        truncated=truncated,
    )
    found: list[Event] = [told]
    if result.executed and permit == "outstanding":
        found.append(PermitConsumed(plan_id=result.plan_id, symbol=symbol, source="result"))
    around = result.executed and (
        permit in ("revoked", "none") or (permit == "unknown" and _should_know(state, result, now))
    )
    if around:
        found.append(
            UnpermittedExecution(plan_id=result.plan_id, symbol=symbol, entry_id=result.entry_id, permit=permit)
        )
    problems: list[tuple[str, str]] = []
    if again:
        problems.append(("expired_permit_executed", "executed with a permit that had been taken back"))
    granted = plan.reservation if plan is not None else None
    if granted is not None and result.executed_qty is not None and result.executed_qty > granted.quantity:
        problems.append(("excess_quantity", f"executed {result.executed_qty}, permitted {granted.quantity}"))
    if granted is not None and result.failed:
        problems.append(("execution_error", result.error or "a step failed"))
    for kind, detail in problems:
        found.append(ErrorRecorded(kind=kind, detail=detail[:500], plan_id=result.plan_id, symbol=symbol))
    if not around and not problems:
        return tuple(found)
    tried = _tried(state, found, now)
    if around and policy.auto_disarm and policy.disarm_on_unpermitted and state.mode.state != DISARMED:
        context: Context = {"plan_id": result.plan_id, "symbol": symbol, "permit": permit}
        return (*found, *_disarm(tried, "unpermitted_execution", context))
    if around:
        throttled = _throttle(tried, policy, max(now, state.time), ALL, "unpermitted_execution")
        found += throttled
        tried = _tried(tried, throttled, now)
    if problems:
        found += _after_errors(tried, policy, max(now, state.time))
    return tuple(found)


def record_error(
    state: State,
    policy: Policy,
    now: int,
    *,
    kind: str,
    detail: str,
    plan_id: str | None = None,
    symbol: str | None = None,
) -> list[Event]:
    """One error that counts, and what follows from their number."""
    error = ErrorRecorded(kind=kind, detail=detail[:500], plan_id=plan_id, symbol=symbol)
    return [error, *_after_errors(_tried(state, [error], now), policy, max(now, state.time))]


def take_back(state: State, plan_id: str, *, gone: bool, now: int) -> tuple[Event, ...]:
    """The end of an outstanding permit's time.

    Args:
        state: all events so far.
        plan_id: the permit.
        gone: whether its key is no longer there.
        now: the clock, microseconds.
    """
    reservation = state.permits.get(plan_id)
    if reservation is None:
        return ()
    if not gone:
        return (PermitExpired(plan_id=plan_id, symbol=reservation.symbol),)
    source = "observed" if now < reservation.expires_us else "assumed"
    return (PermitConsumed(plan_id=plan_id, symbol=reservation.symbol, source=source),)


def correct_revoked(state: State, plan_ids: Iterable[str]) -> list[Event]:
    """Permits a disarm was to delete and did not find: they had been consumed before it."""
    return [
        PermitConsumed(plan_id=plan_id, symbol=plan.symbol, source="observed")
        for plan_id in plan_ids
        if (plan := state.plan(plan_id)) is not None and plan.permit == "revoked"
    ]


def disarm_by_hand(state: State, *, reason: str, operator: str, apply_mode: str | None) -> list[Event]:
    """A person disarms. Nothing follows while a disarm is under way, or done with the file still at dry run."""
    disarm = state.mode.disarm
    if disarm is not None and (not disarm.done or apply_mode == DRY_RUN):
        return []
    return _disarm(state, reason, {"operator": operator}, manual=True, operator=operator)


class RearmRefusedError(Exception):
    """Arming is not possible now; the message says why."""


def rearm(state: State, *, reason: str, operator: str, force: bool, halt: bool) -> list[Event]:
    """A person arms again.

    Raises:
        RearmRefusedError: a disarm is unfinished or the emergency brake is set, and it is not forced.
    """
    disarm = state.mode.disarm
    if disarm is None:
        return []
    if not disarm.done and not force:
        why = f": {disarm.error}" if disarm.error else ""
        raise RearmRefusedError(
            f"the disarm of {disarm.reason} is unfinished, the Apply Layer may still trade{why}; "
            "wait until it is done, or use --force"
        )
    if halt and not force:
        raise RearmRefusedError("the emergency brake is set; delete its key (governor:halt), or use --force")
    advance(state.mode.state, "rearm")
    return [Rearmed(reason=reason, operator=operator, epoch=state.mode.epoch + 1, forced=force)]


def drift(state: State, apply_mode: str | None) -> list[Event]:
    """What the mode in the Apply Layer's file says after a disarm is done. A file that gives none says nothing."""
    mode = state.mode
    if mode.disarm is None or not mode.disarm.done or apply_mode is None:
        return []
    if apply_mode == DRY_RUN:
        return [] if mode.drift is None else [DriftEnded(epoch=mode.epoch)]
    seen = apply_mode[:DRIFT_MOST]
    return [] if seen == mode.drift else [ApplyModeDrifted(epoch=mode.epoch, apply_mode=seen)]


def _should_know(state: State, result: Result, now: int) -> bool:
    """Whether an unknown plan is too young to have been forgotten or to be from before our time."""
    try:
        at = entry_time(result.entry_id)
    except ValueError:
        return True
    first = state.first_at
    return first is not None and at > first and at > max(now, state.time) - MEMORY_US


def _received(plan: Plan, fields: dict[str, str]) -> PlanReceived:
    kept, truncated = cut(fields, FIELDS_BYTES)
    return PlanReceived(
        plan_id=plan.plan_id,
        symbol=plan.symbol,
        action=plan.action,
        decision=plan.decision,
        entry_id=plan.entry_id,
        fields=kept,
        truncated=truncated,
    )


def _caught_up(state: State, now: int) -> tuple[State, list[Event]]:
    due = tick(state, now)
    return (_tried(state, due, now), due) if due else (state, [])


def _tried(state: State, events: Iterable[Event], now: int) -> State:
    """The state as it would be after `events`."""
    tried = state.fork()
    for event in events:
        evolve(tried, Recorded(tried.seq + 1, now, event, ""))
    return tried


def _decision(
    case: Case, verdict: str, reason: str | None, settings: str, *, checks: tuple[Check, ...] = ()
) -> Decision:
    plan, market, situation = case.plan, case.market, case.situation
    granted = verdict == "EXECUTE"
    skipped = verdict == "SKIP"
    quantity = None if skipped else case.quantity
    return Decision(
        plan_id=plan.plan_id,
        symbol=plan.symbol,
        action=plan.action,
        verdict=verdict,
        reason=reason,
        computed_qty=quantity,
        computed_notional=None if quantity is None else (case.notional if case.notional is not None else ZERO),
        position_amt=case.position,
        mark_price=market.mark_price if market is not None else None,
        apply_mode=situation.apply_mode,
        checks=checks,
        entry_id=plan.entry_id,
        mode=case.state.mode.state,
        epoch=case.state.mode.epoch,
        settings=settings,
        history=history_of(case),
        halt=situation.halt,
        asked=market is not None,
        legs=market.legs if market is not None else None,
        position_error=market.position_error if market is not None else None,
        price_error=market.price_error if market is not None else None,
        expires_us=situation.now + case.policy.permit_ttl_us if granted else None,
    )


def _consequences(case: Case, reason: str) -> list[Event]:
    """What follows from a blocked plan's reason."""
    if case.plan.action == UPDATE_SL:
        return []  # its windows block and never disarm: three trailed stops are no burst
    policy, symbol, now = case.policy, case.plan.symbol, case.now
    if reason == "burst_limit_exceeded":
        dry = case.situation.apply_mode == DRY_RUN
        if policy.auto_disarm and policy.disarm_on_burst and not dry:
            limit = case.limits.per_5min or 0
            context: Context = {"symbol": symbol, "exec_5min": _in_5min(case) + 1, "limit": limit}
            return _disarm(case.state, "burst_limit_breach", context)
        return _throttle(case.state, policy, now, symbol, reason)
    if reason in ("hourly_limit_exceeded", "daily_limit_exceeded"):
        return _throttle(case.state, policy, now, symbol, reason)
    if reason == "total_daily_limit_exceeded":
        return _throttle(case.state, policy, now, ALL, reason)
    return []


def _in_5min(case: Case) -> int:
    return windows.count(case.times, now=case.now, window=windows.FIVE_MINUTES_US)


def _after_errors(state: State, policy: Policy, now: int) -> list[Event]:
    if policy.disarm_on_errors is None:
        return []
    threshold = max(1, policy.disarm_on_errors)
    found = errors.count(state.errors, now=now, window=policy.error_window_us)
    if found >= threshold and policy.auto_disarm:
        if state.mode.state == DISARMED:
            return []
        return _disarm(state, "repeated_errors", {"error_count": found, "threshold": policy.disarm_on_errors})
    return _throttle(state, policy, now, ALL, "repeated_errors") if 2 * found >= threshold else []


def _throttle(state: State, policy: Policy, now: int, symbol: str | None, reason: str) -> list[Event]:
    """A new cause throttles, or throttles longer; the same cause again says nothing, unless its time is over."""
    over = tick(state, now)
    if not allows(state.mode.state, "throttle") or (not over and (symbol, reason) in state.mode.causes):
        return []
    advance(state.mode.state, "throttle")
    return [*over, Throttled(symbol=symbol, reason=reason, until_us=now + policy.throttle_cooldown_us)]


def _disarm(
    state: State, reason: str, context: Context, *, manual: bool = False, operator: str | None = None
) -> list[Event]:
    """Disarm and revoke every outstanding permit, in one step."""
    advance(state.mode.state, "disarm")
    started = DisarmStarted(
        reason=reason, context=context, epoch=state.mode.epoch + 1, manual=manual, operator=operator
    )
    revoked = [PermitRevoked(plan_id=plan_id, symbol=held.symbol) for plan_id, held in state.permits.items()]
    return [started, *revoked]
