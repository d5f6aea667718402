"""Checks of what others read and write in Redis: plans that wait, permits, block records, executions."""

from __future__ import annotations

import re
import time
from decimal import Decimal
from typing import Any

import msgspec
import redis.exceptions

from events.codec import decode
from events.decimals import ZERO
from events.intake import GROUP
from events.types import (
    Decision,
    Entry,
    Execution,
    HistoryAccepted,
    HistoryRestored,
    PlanRejected,
    UnpermittedExecution,
)
from governor.checks import UNIT, Findings, Look, some
from governor.checks.public import differences, expected, is_of_a_symbol, pipelined, tell
from governor.permits import BLOCK_MS
from governor.plans import entry_time
from projections.state import State

HOUR_US = 3_600_000_000
ENDING_US = 30_000_000
"""A block record this close to its end may be gone."""
TTL_MOST_S = 60.0
SCAN_S = 2.0
RECORDS_MOST = 1000


async def plans(look: Look, found: Findings) -> None:
    """The group `governor` on both streams: what waits, and for how long."""
    patience = look.settings.policy.max_plan_age_us or HOUR_US
    for stream_name in (look.ledger.keys.plans, look.ledger.keys.results):
        try:
            groups: Any = await look.connection.xinfo_groups(stream_name)
        except redis.exceptions.ResponseError as error:
            found.fail(f"{stream_name}: {error}", f"The daemon makes it when it starts: systemctl status {UNIT}.")
            continue
        group = next((one for one in groups if _text(one["name"]) == GROUP), None)
        if group is None:
            found.fail(
                f"{stream_name} has no group {GROUP!r}",
                f"The daemon makes it when it starts: systemctl restart {UNIT}.",
            )
            continue
        await _waiting(look, stream_name, group, patience, found)


async def _waiting(look: Look, name: str, group: Any, patience: int, found: Findings) -> None:
    what = "plans" if name == look.ledger.keys.plans else "results"
    todo = f"Nobody reads them in time: systemctl status {UNIT}, then journalctl -u {UNIT} -n 50."
    unread: Any = await look.connection.xrange(name, min=f"({_text(group['last-delivered-id'])}", count=1)
    pending: Any = await look.connection.xpending(name, GROUP)
    for ids, told in (
        ([_text(entry_id) for entry_id, _ in unread], f"unread {what}"),
        ([_text(pending["min"])] if pending["pending"] else [], f"{what} read and not decided"),
    ):
        age_us = look.clock() - entry_time(ids[0]) if ids else 0
        if age_us > patience:
            found.fail(f"{told}, the oldest for {age_us / 1e6:.0f} s", todo)
    lag = group.get("lag")
    found.ok(f"{what}: {pending['pending']} pending, {'?' if lag is None else lag} unread")


async def permits(look: Look, found: Findings) -> None:
    """Permits that are alive, and those that were granted lately: computed values, life, and their decision."""
    _granted(look, found)
    names, whole = await _scan(look, "permit")
    if not whole:
        found.warn(
            f"only {len(names)} permits looked at: the database is large", "Give Governor a database of its own."
        )
    replies = await pipelined(look, [part for name in names for part in (("GET", name), ("PTTL", name))])
    await look.ledger.catch_up()
    alive = 0
    for name, value, ttl_ms in zip(names, replies[::2], replies[1::2], strict=True):
        if value is None or ttl_ms == -2:
            continue  # consumed meanwhile
        problem = await _permit_problem(look, name.removeprefix(look.ledger.keys.permit("")), value, ttl_ms)
        if problem is None:
            alive += 1
        elif await look.ledger.store.values(name) == [value]:  # or a disarm has deleted it meanwhile
            found.fail(
                f"{name} {problem}",
                f"redis-cli DEL {name}; then find out who may write permits beside Governor (deploy/redis/users.acl).",
            )
    found.ok(f"{alive} alive")


def _granted(look: Look, found: Findings) -> None:
    granted = [
        one for one in look.events(found) if isinstance(one.event, Decision) and one.event.verdict == "EXECUTE"
        and one.event.action != "UPDATE_SL"
    ]  # fmt: skip
    if not granted:
        found.ok("none granted in the events looked at")
        return
    loaded = look.folded.settings
    priced = loaded is not None and loaded.settings.get("credentials") == "true"
    since = look.clock() - HOUR_US
    for one in granted:
        event = one.event
        assert isinstance(event, Decision)
        if one.at < since:
            continue
        if (event.computed_qty or ZERO) <= ZERO:
            found.fail(
                f"{event.plan_id} was permitted with quantity {event.computed_qty}", f"governor explain {event.plan_id}"
            )
        elif priced and (event.computed_notional or ZERO) <= ZERO:
            found.warn(
                f"{event.plan_id} was permitted without a price ({event.price_error}): the quantity limit decided",
                "If it goes on: the exchange's mark price (check exchange).",
            )
    last = granted[-1].event
    assert isinstance(last, Decision)
    lately = sum(one.at >= since for one in granted)
    notional = f", {last.computed_notional} USD" if last.computed_notional else ""
    found.ok(f"{lately} granted in the last hour, the last one: {last.symbol} {last.computed_qty}{notional}")


async def _permit_problem(look: Look, plan_id: str, value: Any, ttl_ms: Any) -> str | None:
    """What is wrong with a permit that is there, if anything."""
    try:
        permit: dict[str, Any] = msgspec.json.decode(value)
        entries = await look.ledger.store.read(int(permit["seq"]) - 1, limit=1)
        decision = _decision(entries[0]) if entries else None
        if decision is None or plan_id != decision.plan_id:
            return f"names event {permit['seq']}, which did not grant it"
        if not _says(permit, decision):
            return "does not say what its decision said"
    except (msgspec.MsgspecError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        return f"is no permit of Governor's ({error})"
    held = look.folded
    if permit.get("epoch") != held.mode.epoch:
        return f"is of epoch {permit.get('epoch')}, now it is {held.mode.epoch}: a disarm should have deleted it"
    return _life_problem(held, ttl_ms)


def _life_problem(held: State, ttl_ms: Any) -> str | None:
    rules = held.settings.settings if held.settings is not None else {}
    most_s = min(TTL_MOST_S, float(rules.get("GOV_PERMIT_TTL_SEC", TTL_MOST_S)))
    if not isinstance(ttl_ms, int) or ttl_ms < 0:
        return "never expires"
    if ttl_ms > most_s * 1000:
        return f"lives {ttl_ms / 1000:.0f} s more, expected at most {most_s:g}"
    return None


def _says(permit: dict[str, Any], decision: Decision) -> bool:
    granted = (decision.computed_qty or ZERO, decision.computed_notional or ZERO)
    told = tuple(Decimal(str(permit[name])) for name in ("computed_qty", "computed_notional"))
    return (permit["plan_id"], permit["symbol"], told) == (decision.plan_id, decision.symbol, granted)


def _decision(entry: Entry) -> Decision | None:
    try:
        event = decode(entry).event
    except ValueError:
        return None
    return event if isinstance(event, Decision) and event.verdict == "EXECUTE" else None


async def blocks(look: Look, found: Findings) -> None:
    """Block records of the plans blocked within the hour."""
    keys, now = look.ledger.keys, look.clock()
    wanted: dict[str, str] = {}
    for one in look.events(found):
        event = one.event
        if isinstance(event, HistoryRestored | HistoryAccepted):
            wanted.clear()  # what a server lost comes back, these records do not
        elif one.at <= now - HOUR_US + ENDING_US:
            continue
        elif isinstance(event, Decision) and event.verdict == "BLOCK":
            wanted[event.plan_id] = event.reason or ""
        elif isinstance(event, Decision) and event.verdict == "EXECUTE":
            wanted.pop(event.plan_id, None)
        elif isinstance(event, PlanRejected) and event.plan_id and event.decision in (None, "EXECUTE"):
            wanted[event.plan_id] = "invalid_plan"
    names = list(wanted)[-RECORDS_MOST:]
    replies = await pipelined(
        look, [part for name in names for part in (("GET", keys.block(name)), ("PTTL", keys.block(name)))]
    )
    wrong = []
    for name, value, ttl_ms in zip(names, replies[::2], replies[1::2], strict=True):
        problem = _record_problem(value, ttl_ms, wanted[name])
        if problem is not None:
            wrong.append(f"{keys.block(name)} {problem}")
    if wrong:
        found.fail(
            some(wrong),
            "A client is told no_permit instead of why. Who deletes or evicts keys? noeviction (check redis), "
            "deploy/redis/users.acl.",
        )
    else:
        found.ok(f"{len(names)} of the last hour, each with its reason")


def _record_problem(value: Any, ttl_ms: Any, reason: str) -> str | None:
    if value is None:
        return f"is missing, expected {reason}"
    if not isinstance(ttl_ms, int) or not 0 <= ttl_ms <= BLOCK_MS:
        return f"has a TTL of {ttl_ms} ms, expected at most {BLOCK_MS}"
    try:
        told = msgspec.json.decode(value)["reason"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return "is no block record"
    return None if told == reason else f"says {told!r}, expected {reason}"


async def executions(look: Look, found: Findings) -> None:
    """Execution lists and daily totals, against the events."""
    names = [name for name in expected(look) if is_of_a_symbol(look, name)]
    differing = await differences(look, names)
    since = look.clock() - HOUR_US
    lately = [one.event for one in look.events(found) if one.at >= since]
    told = [event for event in lately if isinstance(event, Execution)]
    around = [event for event in lately if isinstance(event, UnpermittedExecution)]
    tell(differing, found)
    if around:
        found.warn(
            f"{len(around)} executions that nobody permitted in the last hour",
            "Something trades around the gate: governor explain PLAN_ID.",
        )
    if not differing:
        found.ok(f"{len(names)} keys say what the events say; {len(told)} results in the last hour")


async def _scan(look: Look, kind: str) -> tuple[list[str], bool]:
    """Keys of a kind, and whether all of the database was looked at."""
    prefix = re.sub(r"([*?\[\]\\])", r"\\\1", look.ledger.keys.prefix)
    until = time.monotonic() + SCAN_S
    names: list[str] = []
    cursor = 0
    while True:
        cursor, page = await look.connection.scan(cursor, match=f"{prefix}:{kind}:*", count=1000)
        names += [_text(name) for name in page]
        if not cursor:
            return sorted(set(names)), True
        if time.monotonic() >= until:
            return sorted(set(names)), False


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode(errors="surrogateescape")
