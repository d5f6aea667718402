"""When a check would have passed, from the state right before the decision."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from events.decimals import ZERO, total
from events.keys import DAY_US, day_of
from events.types import (
    Check,
    Decision,
)
from governor.gates import UPDATE_SL
from projections import windows
from projections.state import DISARMED, State

WINDOWS = {"exec_1h": windows.HOUR_US, "exec_5min": windows.FIVE_MINUTES_US}
NEVER = "never: "


def look(check: Check, decision: Decision, state: State | None, at: int) -> dict[str, Any]:
    """A check as a reader wants it.

    Args:
        check: as recorded.
        decision: it belongs to.
        state: right before the decision; None when it is not known.
        at: when it was decided, microseconds.

    Returns:
        The check's fields, `asks` (what the plan would add), `left` of the limit before it, `next_allowed` (unix
        seconds; None where it did not fail, never passes, or nobody can know) and a `note` where one is needed.
    """
    when, note = None, None
    if check.ok is False:
        when, note = (
            (None, "unknown: earlier events are missing") if state is None else opens(check, decision, state, at)
        )
    elif check.ok is None:
        note = unanswered(check, decision)
    left = (
        None if check.used is None or check.limit is None else max(ZERO, total(check.limit, check.used.copy_negate()))
    )
    return {
        "gate": check.gate,
        "ok": check.ok,
        "used": check.used,
        "limit": check.limit,
        "asks": asks(check, decision),
        "left": left,
        "next_allowed": None if when is None else when / 1e6,
        "note": note,
    }


def asks(check: Check, decision: Decision) -> Decimal | None:
    """What the plan would add to what a check counts; None where nothing is counted."""
    match check.gate:
        case "exec_1h" | "exec_5min" | "throttle" if check.used is not None:
            return Decimal(1)
        case "daily_notional" | "total_daily_notional" if check.ok is not None:
            return decision.computed_notional
        case "daily_qty" if check.ok is not None:
            return decision.computed_qty
        case _:
            return None


def opens(  # noqa: PLR0911 - one answer a gate
    check: Check, decision: Decision, state: State, at: int
) -> tuple[int | None, str | None]:
    """When a check that failed would have passed if nothing else had happened (microseconds), and what that takes.

    Windows and days go by the later of the decision's time and the last event, as the gates do.
    """
    now = max(at, state.time)
    limit = ZERO if check.limit is None else check.limit
    match check.gate:
        case "history":
            return _history(decision, state, at)
        case "armed":
            brake = decision.mode != DISARMED
            return None, "when a person re-arms" + (" (the emergency brake was set)" if brake else "")
        case "exec_1h" | "exec_5min":
            free = _free(decision, state, now, WINDOWS[check.gate], int(limit))
            return (free, None) if free is not None else (None, f"{NEVER}a limit of zero")
        case "daily_notional" | "total_daily_notional" | "daily_qty":
            if (asked := asks(check, decision)) is not None and asked <= limit:
                return (day_of(now) + 1) * DAY_US, "at the next UTC day, if nothing else is counted"
            return None, NEVER + ("more than a whole day's limit" if limit else "a limit of zero")
        case "throttle":
            return _throttle(decision, state, now, int(limit))
        case _:
            return None, TAKES.get(check.gate, "unknown")


TAKES = {
    "plan_age": "with a newer plan",
    "action": f"{NEVER}an unknown action",
    "kill_score": "as a close or with a lower score",
    "position_read": "when the exchange tells the position",
    "position_open": "when there is a position",
    "quantity": "with a close_qty, or with GOV_FALLBACK_QTY set",
}
"""What it takes to pass a gate that no time opens."""


def _history(decision: Decision, state: State, at: int) -> tuple[int | None, str]:
    if decision.history == "quarantined":
        return None, "when a person accepts the history"
    return (state.hold_until if state.hold_until > at else None), "when the hold is over"


def _throttle(decision: Decision, state: State, now: int, limit: int) -> tuple[int | None, str]:
    end, free = state.mode.until, _free(decision, state, now, windows.FIVE_MINUTES_US, limit)
    if free is not None and (end is None or free < end):
        return free, "when the throttled five minutes have room"
    return end, "when the throttle ends, if nothing new happens"


def _free(decision: Decision, state: State, now: int, window: int, limit: int) -> int | None:
    book = state.book(decision.symbol)
    times = book.stops if decision.action == UPDATE_SL else book.executions
    return windows.next_free(times, now=now, window=window, limit=limit)


def unanswered(check: Check, decision: Decision) -> str:
    """Why a check has no answer."""
    if decision.action == UPDATE_SL:
        return f"does not concern {UPDATE_SL}"
    if not decision.asked:
        return "the exchange was not asked"
    if decision.legs is None:
        return "no position was read"
    return "no price was read" if check.gate == "total_daily_notional" else "not known"


def whole(checks: Iterable[dict[str, Any]]) -> float | None:
    """When all checks that failed would have passed: the latest of them. None: none failed, never, or unknown."""
    times = [check["next_allowed"] for check in checks if check["ok"] is False]
    return None if not times or None in times else max(times)
