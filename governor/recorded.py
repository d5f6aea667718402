"""What was recorded of the outside, as the decider takes it: whoever decides again reads it here."""

from __future__ import annotations

from events.types import Decision, Execution
from governor.market import Market
from governor.results import Result, parse_result
from projections.state import State


def history_of(state: State, decision: Decision, at: int) -> str:
    """Input of the first gate. A hold that the events ask for is found again; another one came from outside.

    Args:
        state: as recorded, before the decision.
        decision: the recorded one.
        at: its time, microseconds.
    """
    held = decision.history == "history_hold" and at >= state.hold_until
    return decision.history if held or decision.history == "quarantined" else "whole"


def market_of(decision: Decision) -> Market:
    """What the exchange had answered; only of a decision that asked it."""
    return Market(
        legs=decision.legs,
        mark_price=decision.mark_price,
        position_error=decision.position_error,
        price_error=decision.price_error,
    )


def result_of(event: Execution) -> Result:
    """The result it was; where its fields were cut, what the event itself keeps of it."""
    if not event.truncated:
        return parse_result(event.fields, entry_id=event.entry_id)
    return Result(
        plan_id=event.plan_id,
        symbol=event.symbol,
        decision=event.decision,
        entry_id=event.entry_id,
        executed=event.executed,
        error=event.error,
        step_failed=event.failed,
        executed_qty=event.executed_qty,
    )
