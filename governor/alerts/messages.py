"""What an alert says: an event or a condition in, words out. Pure; the words are those of the events and the docs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from events.types import (
    ApplyModeDrifted,
    AutoDisarm,
    Context,
    DisarmFailed,
    DisarmStarted,
    DriftEnded,
    ManualDisarm,
    Rearmed,
    Recorded,
    Recovered,
    Throttled,
    UnpermittedExecution,
)
from governor.policy import Policy
from governor.telling import clean, span
from governor.times import utc
from projections.state import DISARMED, Disarm, State

Tone: TypeAlias = Literal["failure", "warning", "success", "info"]
_MINUTE_US = 60_000_000
TITLE_MOST = 200


class Kind(NamedTuple):
    """One kind of alert."""

    tone: Tone
    quiet_us: int = _MINUTE_US
    """What is held back is summed up once nothing of this kind was told for so long."""


KINDS: Mapping[str, Kind] = {
    "disarm_started": Kind("failure"),
    "disarm_unfinished": Kind("failure"),
    "disarm_done": Kind("warning"),
    "disarm_failed": Kind("failure", 5 * _MINUTE_US),
    "rearmed": Kind("success"),
    "throttled": Kind("warning"),
    "recovered": Kind("success"),
    "unpermitted_execution": Kind("failure"),
    "apply_mode_drifted": Kind("failure"),
    "drift_ended": Kind("success"),
    "quarantined": Kind("failure"),
    "quarantine_ended": Kind("success"),
    "redis_lost": Kind("failure"),
    "redis_back": Kind("success"),
    "journal_lost": Kind("failure"),
    "journal_back": Kind("success"),
    "exchange_lost": Kind("failure"),
    "exchange_back": Kind("success"),
    "test": Kind("info"),
}


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """One message, before it is laid out."""

    kind: str
    """One of KINDS."""
    subject: str = ""
    """Which one of its kind: the same is not told again at once."""
    headline: str
    happened: str
    done: str
    todo: str
    at_us: int
    seq: int | None = None
    """Event it tells of; None for a condition."""
    more: int = 0
    """How many others of its kind were held back and are told with it."""
    since_us: int = 0
    """When the first of those happened."""

    @property
    def tone(self) -> Tone:
        return KINDS[self.kind].tone


class Place(NamedTuple):
    """Whose alerts these are, and what a person there would type."""

    account: str
    """The key prefix."""
    host: str
    link: str
    config_path: str
    service: str
    policy: Policy


def render(alert: Alert, place: Place) -> tuple[str, str]:
    """Title, one line, and body, plain text."""
    more = f" and {alert.more} more" if alert.more else ""
    title = clean(f"[{place.account}@{place.host}] {alert.headline}", TITLE_MOST - len(more)) + more
    lines = [alert.happened, f"Done: {alert.done}", f"Do: {alert.todo}"]
    if alert.more:
        lines.append(f"{alert.more + 1} of these since {utc(alert.since_us / 1e6)}; this is the last one.")
    event = "" if alert.seq is None else f", event {alert.seq}"
    lines.append(f"{utc(alert.at_us / 1e6)}{event}, account {place.account} on {place.host}")
    if place.link:
        lines.append(place.link)
    return title, "\n".join(lines) + "\n"


TOLD = frozenset(
    {
        "DISARM_STARTED", "AUTO_DISARM", "MANUAL_DISARM", "DISARM_FAILED", "REARMED", "THROTTLED", "RECOVERED",
        "UNPERMITTED_EXECUTION", "APPLY_MODE_DRIFTED", "DRIFT_ENDED",
    }
)  # fmt: skip
"""Names of the events that are told."""
_REARM = '`governor status`, find the cause; then `governor rearm --reason "…"` is the only way back.'


def of_event(recorded: Recorded, state: State, place: Place) -> Alert | None:  # noqa: PLR0911 - one case an event
    """What to tell of an event; `state` is the one after it. None: nothing."""
    seq, at, event = recorded.seq, recorded.at, recorded.event
    match event:
        case DisarmStarted():
            return _disarm_started(event, place, at, seq)
        case AutoDisarm() | ManualDisarm():
            return _disarm_done(event, state, at, seq)
        case DisarmFailed():
            return _disarm_failed(event, place, at, seq)
        case Rearmed():
            return _rearmed(event, at, seq)
        case Throttled():
            return _throttled(event, at, seq)
        case Recovered():
            return _recovered(at, seq)
        case UnpermittedExecution():
            return _unpermitted(event, state, place, at, seq)
        case ApplyModeDrifted():
            return _drifted(event, place, at, seq)
        case DriftEnded():
            return _drift_ended(place, at, seq)
        case _:
            return None


def why_disarmed(reason: str, context: Context, *, manual: bool, operator: str | None) -> str:
    """Why, as a title has it: `burst_limit_breach (BTCUSDT 3 in 5 min, limit 2)`."""
    if manual:
        return f"by {clean(operator or 'unknown', 64)}: {clean(reason, 120)}"
    symbol = clean(str(context.get("symbol", "?")), 32)
    facts = {
        "burst_limit_breach": f"{symbol} {context.get('exec_5min')} in 5 min, limit {context.get('limit')}",
        "repeated_errors": f"{context.get('error_count')} errors, limit {context.get('threshold')}",
        "unpermitted_execution": f"{symbol}, plan {clean(str(context.get('plan_id', '?')), 128)}",
    }.get(reason)
    return clean(reason) if facts is None else f"{reason} ({facts})"


def _disarm_started(event: DisarmStarted, place: Place, at_us: int, seq: int | None) -> Alert:
    why = why_disarmed(event.reason, event.context, manual=event.manual, operator=event.operator)
    return Alert(
        kind="disarm_started",
        subject=str(event.epoch),
        headline=f"DISARMED{' ' if event.manual else ': '}{why}",
        happened="The gate is DISARMED: nothing can trade, exits neither.",
        done=f"every outstanding permit is revoked. {place.config_path} is being set to dry run and {place.service} "
        "restarted; another alert says whether that is proven.",
        todo=_REARM,
        at_us=at_us,
        seq=seq,
    )


def _disarm_done(event: AutoDisarm | ManualDisarm, state: State, at_us: int, seq: int) -> Alert:
    began = state.mode.disarm
    took = f" after {span((at_us - began.at) / 1e6)}" if began is not None else ""
    failed = f", after {began.attempts} attempts that failed" if began is not None and began.attempts else ""
    notes = "".join(f" Not verified: {clean(str(note)).rstrip('.')}." for note in event.proof.get("notes", ()))
    return Alert(
        kind="disarm_done",
        subject=str(event.epoch),
        headline=f"DISARM DONE: {clean(event.action_taken)}, proven{took}",
        happened=f"File and service were read back{failed}.{notes}",
        done=f"{clean(event.action_taken)}; no permit until a person re-arms.",
        todo=_REARM,
        at_us=at_us,
        seq=seq,
    )


def _disarm_failed(event: DisarmFailed, place: Place, at_us: int, seq: int) -> Alert:
    error = event.error if event.error.startswith(f"{event.step}:") else f"{event.step}: {event.error}"
    error = clean(error, 240)
    return Alert(
        kind="disarm_failed",
        subject=str(event.epoch),
        headline=f"DISARM FAILED: {error}",
        happened=f"Attempt {event.attempt} to force the Apply Layer to dry run failed: {error}",
        done="no permit is granted. It is tried again at least every 15 s until it is proven.",
        todo=f"what does not ask the gate may still trade: set APPLY_MODE=dry_run in {place.config_path} and "
        f"`systemctl restart {place.service}` by hand, then `governor doctor`.",
        at_us=at_us,
        seq=seq,
    )


def _rearmed(event: Rearmed, at_us: int, seq: int) -> Alert:
    who, reason = clean(event.operator, 64), clean(event.reason, 200)
    return Alert(
        kind="rearmed",
        subject=str(event.epoch),
        headline=f"RE-ARMED by {who}: {reason}",
        happened=f"{who} armed the gate again{', with --force' if event.forced else ''}: {reason}",
        done=f"permits are granted again, epoch {event.epoch}.",
        todo='if it was nobody you know: `governor disarm --reason "…"`.',
        at_us=at_us,
        seq=seq,
    )


def _throttled(event: Throttled, at_us: int, seq: int) -> Alert:
    where = "all symbols" if event.symbol is None else clean(event.symbol, 32)
    return Alert(
        kind="throttled",
        subject=f"{where} {event.reason}",
        headline=f"THROTTLED: {clean(event.reason)} ({where})",
        happened=f"The gate is THROTTLED for {where}: {clean(event.reason)}.",
        done=f"fewer permits for {where} until {utc(event.until_us / 1e6)}, if nothing new happens; "
        "FULL_CLOSE_PROPOSED does not wait.",
        todo="`governor status` shows windows and totals.",
        at_us=at_us,
        seq=seq,
    )


def _recovered(at_us: int, seq: int) -> Alert:
    return Alert(
        kind="recovered",
        headline="RECOVERED: ARMED again",
        happened="The cool-down after the last new cause to throttle is over.",
        done="permits are granted as usual.",
        todo="nothing.",
        at_us=at_us,
        seq=seq,
    )


def _unpermitted(event: UnpermittedExecution, state: State, place: Place, at_us: int, seq: int) -> Alert:
    symbol, plan_id = clean(event.symbol, 32), clean(event.plan_id, 128)
    disarms = place.policy.auto_disarm and place.policy.disarm_on_unpermitted
    return Alert(
        kind="unpermitted_execution",
        subject=plan_id,
        headline=f"UNPERMITTED EXECUTION: {symbol}, plan {plan_id} (permit {event.permit})",
        happened=f"{symbol} was executed without a permit: something trades around the gate.",
        done=(
            "the gate is DISARMED already."
            if state.mode.state == DISARMED
            else "the gate disarms; another alert tells that."
            if disarms
            else "it is recorded; the settings do not let it disarm."
        ),
        todo=f"look at the exchange first: positions, open orders, keys. Then `governor explain {plan_id}`.",
        at_us=at_us,
        seq=seq,
    )


def _drifted(event: ApplyModeDrifted, place: Place, at_us: int, seq: int) -> Alert:
    mode = clean(event.apply_mode, 64)
    return Alert(
        kind="apply_mode_drifted",
        subject=mode,
        headline=f"DRIFT: APPLY_MODE={mode} while DISARMED",
        happened=f"Somebody set {place.config_path} to APPLY_MODE={mode} after the disarm.",
        done="no permit is granted; the file is left as it is.",
        todo='find out who. `governor disarm --reason "…"` sets it back; `governor rearm` is the way to trade.',
        at_us=at_us,
        seq=seq,
    )


def _drift_ended(place: Place, at_us: int, seq: int) -> Alert:
    return Alert(
        kind="drift_ended",
        headline="DRIFT ENDED: APPLY_MODE=dry_run again",
        happened=f"{place.config_path} says APPLY_MODE=dry_run again.",
        done="still DISARMED: no permit is granted.",
        todo="`governor rearm` once all is well.",
        at_us=at_us,
        seq=seq,
    )


def unfinished(disarm: Disarm, at_us: int, place: Place) -> Alert:
    """A disarm that was begun and not proven, found at a start or by whoever took over."""
    began = DisarmStarted(
        reason=disarm.reason,
        context=disarm.context,
        epoch=disarm.epoch,
        manual=disarm.manual,
        operator=disarm.operator,
    )
    as_begun = _disarm_started(began, place, at_us, None)
    return msgspec.structs.replace(
        as_begun,
        kind="disarm_unfinished",
        headline=f"DISARM UNFINISHED: {as_begun.headline}",
        happened=f"{as_begun.happened} This disarm began at {utc(disarm.at / 1e6)} and has no proof yet.",
    )


def of_test(at_us: int) -> Alert:
    """What `governor alerts test` sends."""
    return Alert(
        kind="test",
        headline="TEST: alerts reach you here",
        happened="Somebody ran `governor alerts test`: nothing happened to the gate.",
        done="this message was sent to every target.",
        todo="see that a phone rings for it, if it should at night.",
        at_us=at_us,
    )
