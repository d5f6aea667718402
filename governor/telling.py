"""One plan's life as a person would tell it."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from events.decimals import text
from events.types import (
    DisarmStarted,
    Throttled,
)
from governor.gates import UPDATE_SL
from governor.next_allowed import NEVER
from governor.times import utc

UNITS = {"plan_age": "s", "daily_notional": "USD", "total_daily_notional": "USD"}


def permit_told(permit: dict[str, Any]) -> str:
    """What became of a permit, in a sentence."""
    if permit["at"] is None:
        return "outstanding: no event tells yet what became of it"
    when = moment(permit["at"])
    disarm = permit["disarm"]
    by = "a disarm" if disarm is None else f"the disarm at event {disarm['seq']} ({clean(disarm['reason'])})"
    if permit["corrected"]:
        return f"consumed: the client had taken it before {by}, which was to delete it and did not find it"
    again = permit["counted_again_at"]
    late = "" if again is None else f"; EXECUTED ALL THE SAME, told at {moment(again)}: counted again"
    early = span(permit["expires_at"] - permit["at"])
    return {
        "observed": f"consumed: found gone at {when}, {early} before its time: the client took it",
        "result": f"consumed: a result told at {when} that it was executed",
        "assumed": f"taken for consumed: found gone at {when}, nobody was watching when its time ended",
        "expired": f"taken back unused at {when}, its place in windows and totals released{late}",
        "revoked": f"revoked at {when} by {by}; it stays counted",
    }.get(permit["source"] or permit["status"], f"{permit['status']} at {when}")


def answer(told: dict[str, Any]) -> str:
    """The first line: what became of the plan."""
    decision, plan_id = told["decision"], clean(told["plan_id"])
    accused = "; UNPERMITTED EXECUTION" if told["unpermitted"] else ""
    if decision is None:
        return f"plan {plan_id}: {_undecided(told)}{accused}"
    head = f"plan {plan_id}  {clean(decision['symbol'])} {clean(decision['action'])}: "
    if decision["verdict"] == "SKIP":
        asked = "" if told["plan"] is None else f" (its decision is {clean(told['plan']['decision'])})"
        return f"{head}SKIPPED, {decision['reason']}{asked}{accused}"
    if decision["verdict"] == "BLOCK":
        return f"{head}BLOCKED, {decision['reason']}; {_condition(told)}{_disarmed(told)}{accused}"
    ended = {
        "outstanding": "its permit is outstanding",
        "consumed": "its permit was consumed",
        "expired": "its permit was taken back unused",
        "revoked": "its permit was revoked by a disarm",
    }[told["permit"]["status"]]
    done = [number(result["executed_qty"], "an unknown quantity") for result in told["results"] if result["executed"]]
    executed = f"; executed {done[-1]}" if done else ""
    if done and told["permit"]["status"] in ("expired", "revoked"):
        executed += " ALL THE SAME"
    return f"{head}PERMITTED, {ended}{executed}{_disarmed(told)}{accused}"


def _undecided(told: dict[str, Any]) -> str:
    if not told["known"]:
        return "nobody ever saw it"
    if told["rejected"]:
        return f"REJECTED, {clean(told['rejected'][-1]['reason'])}"
    if told["plan"] is not None:
        return "received, but no decision is recorded"
    return "never received, but a result tells of it"


def _condition(told: dict[str, Any]) -> str:
    """What it would have taken for a blocked plan to pass."""
    decision = told["decision"]
    failed = [check for check in decision["checks"] if check["ok"] is False]
    if not failed:
        return f"something went wrong inside: {clean(decision['error'] or 'nobody knows what')}"
    if nevers := [check["note"].removeprefix(NEVER) for check in failed if (check["note"] or "").startswith(NEVER)]:
        return f"it would never have passed: {', '.join(dict.fromkeys(nevers))}"
    times = [check["next_allowed"] for check in failed if check["next_allowed"] is not None]
    takes = [check["note"] for check in failed if check["next_allowed"] is None]
    if times:
        takes.append(f"from {moment(max(times), up=True)} on")
    unasked = any(check["gate"] == "quantity" and check["ok"] is None for check in decision["checks"])
    open_yet = unasked and not decision["asked"] and decision["action"] != UPDATE_SL
    rest = ", if what the exchange says had allowed it" if open_yet else ""
    return f"it would have passed {' and '.join(takes)}{rest}"


def _disarmed(told: dict[str, Any]) -> str:
    found = [each for each in told["followed"] if each["event"] == DisarmStarted.NAME]
    return f"; IT DISARMED (event {found[0]['seq']}): from then on a person had to re-arm" if found else ""


def lines(told: dict[str, Any]) -> list[str]:
    """What `Explainer.finish` told, for a terminal. The first line is the answer."""
    found = [told["answer"]]
    if not told["known"]:
        return found + _unseen_lines(told["unseen"])
    since = told["plan"]["received_at"] if told["plan"] is not None else told["events"][0]["timestamp"]
    if told["plan"] is not None:
        found += _plan_lines(told["plan"])
    if told["decision"] is not None:
        found += _decision_lines(told)
    if told["permit"] is not None:
        found += _permit_lines(told["permit"])
    found += _result_lines(told, since)
    found += _other_lines(told, since)
    found.append("  events")
    rows = [
        (
            str(event["seq"]),
            moment(event["timestamp"]),
            event["event"],
            "" if event["timestamp"] == since else after(event["timestamp"], since),
        )
        for event in told["events"]
    ]
    return found + aligned(rows, right=(0,))


def _unseen_lines(unseen: dict[str, Any]) -> list[str]:
    if unseen["first_at"] is None:
        return ["  There are no events at all: no governor ever ran on this stream."]
    found = [
        f"  None of {unseen['events']} events is about it. That can mean:",
        "    - it was never written to the plan stream, or no governor has read it yet;",
        "    - it was written under another plan_id"
        + (f": nearest are {', '.join(map(clean, unseen['nearest']))};" if unseen["nearest"] else ";"),
        "    - it was trimmed from the plan stream unread: "
        + (
            f"{unseen['lost']} plans were lost so (PLAN_LOST);" if unseen["lost"] else "no plan is known to be lost so;"
        ),
        f"    - it is from before the first event, {moment(unseen['first_at'])} (last: {moment(unseen['last_at'])}).",
    ]
    if unseen["entry_of"] is not None:
        found.insert(1, f"  It is the id of a stream entry, that of plan {clean(unseen['entry_of'])}.")
    return found


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    fields, received = plan["fields"], plan["received_at"]
    shown = [f"{name}={clean(fields[name])}" for name in _SHOWN if fields.get(name)]
    return [
        f"  written    {moment(plan['written_at'])}  entry {plan['entry_id']}",
        f"  received   {moment(received)}  {after(received, plan['written_at'], 'written')}, event {plan['seq']}",
        f"  asked      {' '.join(shown)}" + ("  (shortened)" if plan["truncated"] else ""),
    ]


_SHOWN = ("decision", "symbol", "action", "kill_score", "close_qty", "position_side", "reason_codes")


def _decision_lines(told: dict[str, Any]) -> list[str]:
    decision, market = told["decision"], told["market"]
    found = []
    if decision["verdict"] != "SKIP":
        found.append(f"  exchange   {_market(market)}")
    if decision["checks"]:
        found.append("  checks")
        head = ("", "gate", "used", "limit", "left", "asks", "next allowed")
        found += aligned([head, *map(_check_row, decision["checks"])], right=(2, 3, 4, 5))
    reason = f", {decision['reason']}" if decision["reason"] else ""
    amounts = ""
    if decision["computed_qty"] is not None:
        amounts = f"  quantity {number(decision['computed_qty'])}, {number(decision['computed_notional'])} USD"
    found.append(f"  verdict    {decision['verdict']}{reason}{amounts}  at {moment(decision['at'])}"
                 f" while {decision['mode']}, epoch {decision['epoch']}, event {decision['seq']}")  # fmt: skip
    if decision["error"]:
        found.append(f"  error      {clean(decision['error'])}")
    found += [f"  followed   {_consequence(each)}, event {each['seq']}" for each in told["followed"]]
    if decision["verdict"] == "BLOCK":
        found.append("  again      only as a new plan: this plan_id is used up")
    return found


def _market(market: dict[str, Any]) -> str:
    if not market["asked"]:
        return "not asked"
    legs = market["legs"]
    sides = "" if not legs or set(legs) == {"BOTH"} else f" ({', '.join(f'{s} {number(a)}' for s, a in legs.items())})"
    position = f"not read: {market['position_error']}" if legs is None else number(market["position_amt"], "?") + sides
    price = market["mark_price"]
    return f"position {position}, mark price " + (
        f"not read: {market['price_error']}" if price is None else number(price)
    )


def _check_row(check: dict[str, Any]) -> tuple[str, ...]:
    mark = {True: "PASS", False: "FAIL", None: "–"}[check["ok"]]  # noqa: RUF001 - a dash, as for "does not apply"
    unit = UNITS.get(check["gate"])
    when = "" if check["next_allowed"] is None else moment(check["next_allowed"], up=True)
    return (
        mark,
        check["gate"] + (f" ({unit})" if unit else ""),
        *(number(check[name], "") for name in ("used", "limit", "left", "asks")),
        "  ".join(filter(None, (when, check["note"]))),
    )


def _consequence(event: dict[str, Any]) -> str:
    data = event["data"]
    if event["event"] == Throttled.NAME:
        where = "all symbols" if data["symbol"] is None else clean(data["symbol"])
        return f"{where} throttled until {moment(data['until_us'] / 1e6)} ({data['reason']})"
    return f"DISARMED ({data['reason']}), until a person re-arms"


def _permit_lines(permit: dict[str, Any]) -> list[str]:
    time = span(permit["expires_at"] - permit["granted_at"])
    return [
        f"  permit     granted {moment(permit['granted_at'])} for {time}, until {moment(permit['expires_at'])}",
        f"             {permit['told']}" + (f", event {permit['event']}" if permit["event"] is not None else ""),
    ]


def _result_lines(told: dict[str, Any], since: float) -> list[str]:
    granted = None if told["permit"] is None else told["permit"]["computed_qty"]
    found = []
    for result in told["results"]:
        quantity = number(result["executed_qty"], "an unknown quantity")
        done = f"executed {quantity}" if result["executed"] else "not executed"
        of = f", permitted {number(granted)}" if result["executed"] and granted is not None else ""
        error = f", error: {clean(result['error'])}" if result["error"] else ", a step failed" * result["failed"]
        found.append(f"  result     {moment(result['at'])}  {done}{of} (permit {result['permit']}){error}"
                     f", {after(result['at'], since)}, event {result['seq']}")  # fmt: skip
    found += [
        f"  UNPERMITTED EXECUTION  {moment(each['at'])}  its permit was: {each['permit']}, event {each['seq']}"
        for each in told["unpermitted"]
    ]
    return found + [
        f"  counted    {moment(error['at'])}  an error, {error['kind']}: {clean(error['detail'])}, event {error['seq']}"
        for error in told["errors"]
    ]


def _other_lines(told: dict[str, Any], since: float) -> list[str]:
    found = []
    for entry in told["rejected"]:
        fields = " ".join(f"{clean(name)}={clean(value)}" for name, value in entry["fields"].items())
        found.append(f"  rejected   {moment(entry['at'])}  entry {clean(entry['entry_id'])}: {clean(entry['reason'])}"
                     f", event {entry['seq']}")  # fmt: skip
        found.append(f"             it said: {fields or 'nothing'}" + ("  (shortened)" if entry["truncated"] else ""))
    for skip in told["skipped"]:
        asked = "" if skip["asked_for"] is None else f" (its decision was {clean(skip['asked_for'])})"
        found.append(f"  also seen  {moment(skip['at'])}  entry {skip['entry_id']}: SKIP, {skip['reason']}{asked}"
                     f", {after(skip['at'], since)}, event {skip['seq']}")  # fmt: skip
    for later in told["decided_again"]:
        permit = "" if later["permit"] is None else f"; permit {later['permit']['told']}"
        reason = f", {later['reason']}" if later["reason"] else ""
        found.append(f"  DECIDED AGAIN  {moment(later['at'])}  {later['verdict']}{reason}{permit}"
                     f", {after(later['at'], since)}, event {later['seq']}")  # fmt: skip
    return found


def moment(unix: float, *, up: bool = False) -> str:
    """UTC with milliseconds; `up` rounds up, for a time from which on something holds."""
    try:
        return utc(-(-round(unix * 1e6) // 1000) / 1000 if up else unix)
    except (ValueError, OverflowError, OSError):
        return f"{unix:.3f} s after 1970"


def span(seconds: float) -> str:
    """A duration, as exact as a reader needs it."""
    amount = abs(seconds)
    sign = "-" if seconds < 0 else ""
    if amount < 0.9995:
        return f"{sign}{amount * 1000:.0f} ms"
    if amount < 59.95:
        return f"{sign}{amount:.1f} s"
    minutes, rest = divmod(round(amount), 60)
    if minutes < 60:
        return f"{sign}{minutes} min" + (f" {rest} s" if rest else "")
    hours, minutes = divmod(minutes, 60)
    return f"{sign}{hours} h {minutes} min" if hours < 48 else f"{sign}{hours // 24} d {hours % 24} h"


def after(unix: float, since: float, what: str = "received") -> str:
    """How long after (or before) something happened to the plan."""
    return f"{span(abs(unix - since))} {'before' if unix < since else 'after'} it was {what}"


def number(value: Decimal | None, missing: str = "") -> str:
    """Digits, never an exponent."""
    return missing if value is None else text(value)


def clean(value: str, most: int = 300) -> str:
    """Text from outside, on one line and without what steers a terminal."""
    shown = value if len(value) <= most else value[: most - 3] + "..."
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in shown)


def aligned(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...]) -> list[str]:
    """Rows as columns; those in `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "    " + "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]  # fmt: skip
