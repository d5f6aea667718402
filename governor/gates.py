"""The gates, in the order in which the first that fails becomes the reason.

A gate is a small function from the situation to a Check: passed, failed, or None where it could not be evaluated
or does not concern the plan. All are evaluated and recorded for every plan; the table at the end is the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import NamedTuple

import msgspec

from events.decimals import ZERO, notional, product, total
from events.keys import day_of
from events.types import Check
from governor.market import Market, position_amt
from governor.plans import CLOSE_FRACTIONS, Plan
from governor.policy import Limits, Policy
from projections import totals, windows
from projections.state import DISARMED, Book, State

UPDATE_SL = "UPDATE_SL"
FULL_CLOSE = "FULL_CLOSE_PROPOSED"
SECOND_US = Decimal(1_000_000)


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """What is true outside the events at the moment of a decision."""

    now: int
    """The clock, microseconds. Ages and expiries use it as it is; windows the later of it and the last event."""
    apply_mode: str | None = None
    """`APPLY_MODE` in the Apply Layer's file, None when it cannot be read."""
    halt: bool = False
    """Whether the emergency brake is set."""
    history: str = "whole"
    """`whole`, or the reason for which nothing may be permitted: `quarantined` or `history_hold`."""


class Case(msgspec.Struct, frozen=True):
    """Everything the gates look at."""

    plan: Plan
    policy: Policy
    limits: Limits
    state: State
    book: Book
    market: Market | None
    """None: the exchange was not asked."""
    situation: Situation
    now: int
    """For windows: the later of the clock and the last event."""
    position: Decimal | None
    quantity: Decimal | None
    notional: Decimal | None
    """None without a price."""
    moves: bool
    """Whether the plan moves a quantity."""
    times: tuple[int, ...]
    """The executions that share windows with this plan."""


def case(plan: Plan, policy: Policy, state: State, market: Market | None, situation: Situation) -> Case:
    """Put together what the gates look at, quantities computed where they can be."""
    position = price = quantity = None
    fraction = CLOSE_FRACTIONS.get(plan.action)
    moves = plan.action != UPDATE_SL
    if not moves:
        quantity = ZERO
    elif fraction is not None and policy.credentials and market is not None:
        price = market.mark_price
        if market.legs is not None:
            position = position_amt(market.legs, plan.position_side)
            quantity = product(position, fraction)
    elif fraction is not None and not policy.credentials:
        quantity = plan.close_qty if plan.close_qty is not None and plan.close_qty > 0 else policy.fallback_qty
    book = state.book(plan.symbol)
    return Case(
        plan,
        policy,
        policy.of(plan.symbol),
        state,
        book,
        market,
        situation,
        max(situation.now, state.time),
        position,
        quantity,
        None if quantity is None or price is None else notional(quantity, price),
        moves,
        book.executions if moves else book.stops,
    )


Gate = Callable[[Case], Check]


def history(case: Case) -> Check:
    """History is whole (not quarantined, no hold after it was restored)."""
    return Check("history", history_of(case) == "whole")


def armed(case: Case) -> Check:
    """The state is not DISARMED, and the emergency brake is not set."""
    return Check("armed", case.state.mode.state != DISARMED and not case.situation.halt)


def plan_age(case: Case) -> Check:
    """The plan is not older than `GOV_MAX_PLAN_AGE_SEC` (seconds, by its stream entry's id)."""
    age, limit = case.situation.now - case.plan.at, case.policy.max_plan_age_us
    used = Decimal(age) / SECOND_US
    return Check("plan_age", limit is None or age <= limit, used, None if limit is None else limit / SECOND_US)


def action(case: Case) -> Check:
    """The action is known."""
    return Check("action", known_action(case))


def kill_score(case: Case) -> Check:
    """The kill score is below `GOV_KILL_SCORE_CRITICAL`, or the action is a CLOSE action."""
    score, limit = case.plan.kill_score, case.policy.kill_score_critical
    fine = limit is None or (score is not None and score < limit)
    return Check("kill_score", fine or case.plan.action in CLOSE_FRACTIONS, score, limit)


def exec_1h(case: Case) -> Check:
    """Executions of the symbol in the last hour."""
    return _window("exec_1h", case, windows.HOUR_US, case.limits.per_hour)


def exec_5min(case: Case) -> Check:
    """Executions of the symbol in the last five minutes."""
    return _window("exec_5min", case, windows.FIVE_MINUTES_US, case.limits.per_5min)


def position_read(case: Case) -> Check:
    """The exchange told the position. Does not concern UPDATE_SL, nor an account without credentials."""
    if not _asks(case) or case.market is None:
        return Check("position_read", None)
    return Check("position_read", case.position is not None)


def position_open(case: Case) -> Check:
    """The position is not flat."""
    return Check("position_open", None if case.position is None else case.position != 0, case.position)


def quantity(case: Case) -> Check:
    """It is known how much the plan would move."""
    if not case.moves or not known_action(case) or (case.policy.credentials and case.position is None):
        return Check("quantity", None)
    return Check("quantity", case.quantity is not None, case.quantity)


def daily_limit(case: Case) -> Check:
    """What the symbol moves a UTC day: notional (USD), or quantity without a price. May be reached, not passed."""
    counted = totals.on(case.book.days, day_of(case.now))
    name = "daily_qty" if case.notional is None else "daily_notional"
    if not case.moves or case.quantity is None:
        return Check(name, None)
    if case.notional is None:
        return _amount(name, counted.quantity, case.quantity, case.limits.qty_per_day)
    return _amount(name, counted.notional, case.notional, case.limits.notional_per_day)


def total_daily_limit(case: Case) -> Check:
    """Notional over all symbols a UTC day (USD). Cannot be evaluated without a price."""
    name = "total_daily_notional"
    if case.notional is None:
        return Check(name, None)
    counted = totals.on(case.state.days, day_of(case.now))
    return _amount(name, counted.notional, case.notional, case.policy.total_notional_per_day)


def throttle(case: Case) -> Check:
    """While throttled for this symbol or for all: executions in five minutes. A full close never waits."""
    mode, limit = case.state.mode, case.policy.throttle_per_5min
    if not mode.throttles(case.plan.symbol) or case.plan.action == FULL_CLOSE:
        return Check("throttle", True)
    return _window("throttle", case, windows.FIVE_MINUTES_US, limit)


def known_action(case: Case) -> bool:
    """Whether it can be told what the plan would move."""
    return case.plan.action in CLOSE_FRACTIONS or case.plan.action == UPDATE_SL


def history_of(case: Case) -> str:
    """Input of the first gate: the situation's, or the hold that the events themselves ask for."""
    if case.situation.history != "whole":
        return case.situation.history
    return "history_hold" if case.situation.now < case.state.hold_until else "whole"


def _window(name: str, case: Case, window: int, limit: int | None) -> Check:
    used = windows.count(case.times, now=case.now, window=window)
    if limit is None:
        return Check(name, True, Decimal(used))
    return Check(name, used < limit, Decimal(used), Decimal(limit))


def _amount(name: str, used: Decimal, asked: Decimal, limit: Decimal | None) -> Check:
    # Zero means that nothing is allowed, not even what rounds to nothing.
    return Check(name, limit is None or (limit > 0 and total(used, asked) <= limit), used, limit)


def _asks(case: Case) -> bool:
    return case.moves and case.policy.credentials


class Row(NamedTuple):
    """A gate and the reasons it can give."""

    gate: Gate
    names: tuple[str, ...]
    """Names of its checks in the events."""
    reasons: tuple[str, ...]


def reason_of(row: Row, case: Case, check: Check) -> str:
    """The reason a failed gate gives."""
    if row.gate is history:
        return history_of(case)
    if row.gate is armed:
        return "disarmed" if case.state.mode.state == DISARMED else "halted"
    assert len(row.reasons) == 1, check.gate
    return row.reasons[0]


TABLE: tuple[Row, ...] = (
    Row(history, ("history",), ("quarantined", "history_hold")),
    Row(armed, ("armed",), ("disarmed", "halted")),
    Row(plan_age, ("plan_age",), ("plan_stale",)),
    Row(action, ("action",), ("unknown_action",)),
    Row(kill_score, ("kill_score",), ("kill_score_critical_non_close",)),
    Row(exec_1h, ("exec_1h",), ("hourly_limit_exceeded",)),
    Row(exec_5min, ("exec_5min",), ("burst_limit_exceeded",)),
    Row(position_read, ("position_read",), ("position_fetch_failed",)),
    Row(position_open, ("position_open",), ("no_position",)),
    Row(quantity, ("quantity",), ("quantity_unknown",)),
    Row(daily_limit, ("daily_notional", "daily_qty"), ("daily_limit_exceeded",)),
    Row(total_daily_limit, ("total_daily_notional",), ("total_daily_limit_exceeded",)),
    Row(throttle, ("throttle",), ("throttled",)),
)
"""In order: the first that fails is the reason."""
_GATES = tuple(row.gate for row in TABLE)
MARKET_FROM = 7
"""Gates before this one need no exchange data; it is asked only when they all pass."""
OTHER_REASONS = ("not_execute", "duplicate_plan", "evaluation_error", "invalid_plan")
"""Reasons no gate gives: two kinds of SKIP, a failure inside, an entry that is no plan."""
REASONS: tuple[str, ...] = (*(reason for row in TABLE for reason in row.reasons), *OTHER_REASONS)


def evaluate(case: Case) -> tuple[tuple[Check, ...], str | None]:
    """Every check, and the reason: None when no gate failed."""
    checks = tuple([gate(case) for gate in _GATES])
    verdicts = [check.ok for check in checks]
    if False not in verdicts:
        return checks, None
    first = verdicts.index(False)
    return checks, reason_of(TABLE[first], case, checks[first])


def needs_market(case: Case) -> bool:
    """Whether the exchange has to be asked: the plan concerns it and nothing before it fails."""
    return _asks(case) and all(gate(case).ok is True for gate in _GATES[:MARKET_FROM])
