"""What happened beside the ordinary life of single plans, a sentence each."""

from __future__ import annotations

from typing import Any

from events.types import (
    ApplyModeDrifted,
    ApplyModeRestored,
    AutoDisarm,
    DisarmFailed,
    DisarmStarted,
    DriftEnded,
    ErrorRecorded,
    Event,
    HistoryAccepted,
    HistoryRestored,
    ManualDisarm,
    PlanLost,
    Rearmed,
    Recorded,
    Recovered,
    SettingsLoaded,
    Throttled,
    UnpermittedExecution,
)
from governor.levels import level_of
from governor.telling import clean, moment


def incident(recorded: Recorded) -> dict[str, Any] | None:
    """A row: `seq`, `at` (unix seconds), `event`, `level`, `told`; None for the ordinary life of one plan."""
    told = tell(recorded.event)
    if told is None:
        return None
    level = level_of(recorded.event)
    return {
        "seq": recorded.seq,
        "at": recorded.at / 1e6,
        "event": recorded.event.NAME,
        "level": "alarm" if level == "critical" else level,
        "told": told,
    }


def tell(event: Event) -> str | None:  # noqa: C901, PLR0911, PLR0912 - one case an event
    """The sentence."""
    match event:
        case DisarmStarted():
            who = f" by {clean(event.operator)}" if event.operator else ""
            return f"DISARMED{who}: {clean(event.reason)}{_about(event.context)}. No permits, epoch {event.epoch}."
        case AutoDisarm() | ManualDisarm():
            notes = "; ".join(clean(str(note)) for note in event.proof.get("notes", ()))
            verified = f"Not verified: {notes}." if notes else "File and service were verified."
            return f"The Apply Layer was set to dry run and restarted. {verified}"
        case DisarmFailed():
            return (
                f"The Apply Layer could not be forced to dry run, attempt {event.attempt} ({event.step}): "
                f"{clean(event.error)}"
            )
        case UnpermittedExecution():
            return (
                f"{clean(event.symbol)}: plan {clean(event.plan_id)} was executed without a permit "
                f"(its permit: {event.permit})."
            )
        case ApplyModeDrifted():
            return f"While DISARMED the Apply Layer's file was set to APPLY_MODE={clean(event.apply_mode)} by hand."
        case Throttled():
            where = "All symbols" if event.symbol is None else clean(event.symbol)
            return f"{where} throttled until {moment(event.until_us / 1e6)}: {clean(event.reason)}."
        case ErrorRecorded():
            plan = f" (plan {clean(event.plan_id)})" if event.plan_id else ""
            return f"An error counts towards the automatic disarm, {event.kind}: {clean(event.detail)}{plan}"
        case PlanLost():
            return f"{event.count} plans were trimmed from the stream before they were decided."
        case HistoryRestored():
            return (
                f"{event.events} events that Redis had lost were written back; no permits until "
                f"{moment(event.hold_until_us / 1e6)}."
            )
        case HistoryAccepted():
            return f"{clean(event.operator)} took Redis' history: {clean(event.reason)}"
        case Recovered():
            return "ARMED again: the cool-down of the throttle is over."
        case Rearmed():
            forced = " (forced)" if event.forced else ""
            return f"ARMED again by {clean(event.operator)}{forced}: {clean(event.reason)}. Epoch {event.epoch}."
        case DriftEnded():
            return "The Apply Layer's file says dry run again."
        case ApplyModeRestored():
            return (
                f"{clean(event.operator)} set APPLY_MODE={clean(event.apply_mode)} again and had the Apply Layer "
                f"restarted: {clean(event.reason)}"
            )
        case SettingsLoaded():
            return f"A governor loaded settings {event.digest[:12]} on {clean(event.host) or 'some host'}."
        case _:
            return None


def _about(context: dict[str, str | int]) -> str:
    told = ", ".join(f"{clean(name)} {clean(str(value))}" for name, value in context.items() if name != "noted_us")
    return f" ({told})" if told else ""
