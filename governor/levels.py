"""How much an event matters, in the words of the alerts' severities, and the colour that goes with it."""

from __future__ import annotations

from events.types import Decision, Event, Execution

LEVELS = ("info", "warning", "critical")
"""From the ordinary up."""
_CRITICAL = frozenset(
    {
        "DISARM_STARTED", "AUTO_DISARM", "MANUAL_DISARM", "DISARM_FAILED", "UNPERMITTED_EXECUTION",
        "APPLY_MODE_DRIFTED",
    }
)  # fmt: skip
_WARNING = frozenset(
    {
        "THROTTLED", "ERROR_RECORDED", "PLAN_REJECTED", "PLAN_LOST", "PERMIT_REVOKED", "HISTORY_RESTORED",
        "HISTORY_ACCEPTED",
    }
)  # fmt: skip
_GOOD = frozenset({"REARMED", "RECOVERED", "DRIFT_ENDED", "APPLY_MODE_RESTORED"})


def level_of(event: Event) -> str:
    """One of LEVELS. A blocked plan and an execution that failed are warnings; skipped plans are ordinary."""
    if event.NAME in _CRITICAL:
        return "critical"
    blocked = isinstance(event, Decision) and event.verdict == "BLOCK"
    failed = isinstance(event, Execution) and (event.failed or event.error is not None)
    return "warning" if blocked or failed or event.NAME in _WARNING else "info"


def colour_of(event: Event) -> str | None:
    """Red for critical, yellow for warning, green for a permit and what ends a trouble; None for the rest."""
    level = level_of(event)
    if level != "info":
        return {"warning": "yellow", "critical": "red"}[level]
    permitted = isinstance(event, Decision) and event.verdict == "EXECUTE"
    return "green" if permitted or event.NAME in _GOOD else None
