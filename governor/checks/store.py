"""Checks of what is in Redis: the server, the events, and the keys that others rely on."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

import redis.exceptions

from events import chain, reading
from events.chain import GENESIS
from events.codec import decode
from events.store import StoreError, UnavailableError
from events.types import Head, Recorded
from governor import access as rights
from governor import disarming
from governor.by_hand import nothing_here
from governor.checks import UNIT, Findings, Look
from governor.checks.public import differences, expected, is_of_a_symbol, tell
from governor.connection import place
from governor.console import pages
from governor.durability import durability, refusal
from projections.state import ARMED, DISARMED

LAST = 10_000
"""Events at the end of the stream that are verified unless all are asked for."""
PINGS = 5
SLOW_MS = 50.0
CLOCK_WARN_US, CLOCK_FAIL_US = 1_000_000, 5_000_000
FULL_SHARE = 0.9
DISARM_US = 5_000_000
"""A disarm without a proof may be under way for so long."""
_DURABLE = "docs/promises.md: AOF on, maxmemory-policy noeviction, on the primary."


async def server(look: Look, found: Findings) -> None:
    """Whether Redis answers, how fast, whether it keeps what it is told, and its clock."""
    settings = look.settings
    took: list[float] = []
    offsets: list[tuple[float, int]] = []
    for _ in range(PINGS):
        began, sent = time.perf_counter(), look.clock()
        there = await look.ledger.store.clock()
        took.append((time.perf_counter() - began) * 1000)
        offsets.append((took[-1], there - (sent + look.clock()) // 2))
    middle = statistics.median(took)
    if middle > SLOW_MS:
        found.warn(f"answers in {middle:.1f} ms", "Every decision waits for it: find out what slows it (SLOWLOG GET).")
    else:
        found.ok(f"{place(settings)} answers in {middle:.1f} ms")
    _clock(min(offsets), found)
    kept = await durability(look.connection)
    why = refusal(kept, attested=settings.durability_attested)
    for finding in kept.findings:
        unknown = finding.verdict == "unknown" and settings.durability_attested
        if finding.verdict == "ok" or unknown:
            continue
        seen = f"{finding.name} is {finding.seen!r}, expected {finding.wanted}"
        if finding.verdict != "warn" and (finding.name == "role" or (settings.require_durable and why is not None)):
            found.fail(seen, _DURABLE)
        else:
            found.warn(seen, _DURABLE)
    if kept.verdict == "ok":
        found.ok("keeps what it is told")
    await _memory(look, found)


def _clock(best: tuple[float, int], found: Findings) -> None:
    took_ms, offset_us = best
    told = f"its clock is {offset_us / 1e6:+.3f} s of ours (±{took_ms / 2000:.3f})"
    todo = "Synchronise the clocks of both hosts: timedatectl, chronyc tracking."
    if abs(offset_us) > CLOCK_FAIL_US:
        found.fail(told, todo)
    elif abs(offset_us) > CLOCK_WARN_US:
        found.warn(told, todo)
    else:
        found.ok(told)


async def _memory(look: Look, found: Findings) -> None:
    try:
        info: dict[str, Any] = await look.connection.info("memory")
    except redis.exceptions.ResponseError:
        return
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if most and used > most * FULL_SHARE:
        found.warn(
            f"{used / most:.0%} of maxmemory used",
            "Raise maxmemory, or archive old events (governor archive): a full server writes nothing.",
        )


async def access(look: Look, found: Findings) -> None:
    """Whether the Redis user may do what the daemon does."""
    left = await rights.missing(look.connection, look.ledger.keys)
    left_open = await rights.default_user(look.connection, look.settings)
    for one in (*left, *left_open):
        tell = found.warn if one.verdict == "warn" else found.fail
        tell(
            f"{one.name}: {one.seen or 'refused'}, expected {one.wanted}",
            "docs/redis.md; deploy/redis/users.acl has what each user needs.",
        )
    if not left:
        found.ok(f"user {look.settings.redis_username or 'default'} may do what the daemon does")


async def stream(look: Look, found: Findings) -> None:
    """The events: how many, and whether the chain holds."""
    todo = "governor replay names the place; governor replay --from an export says whether it ever was otherwise."
    try:
        head = await look.ledger.store.head()
        verified, problem = await _verify(look, head)
    except UnavailableError:
        raise
    except (StoreError, ValueError) as error:
        found.fail(str(error), todo)
        return
    if head.seq == 0:
        found.fail(nothing_here(look.settings), f"Start the daemon: systemctl start {UNIT}.")
        return
    told = f"{head.seq} events, head {head.seq}:{head.hash}"
    if problem is not None:
        key = " If the daemon has a GOV_AUDIT_KEY, this command needs it too." if not look.settings.audit_key else ""
        found.fail(f"the chain is broken: {problem}", todo + key)
    elif look.problem is not None:
        found.fail(look.problem, todo)
    else:
        found.ok(f"{told}, the last {verified} verified" if verified < head.seq else f"{told}, all verified")


async def _verify(look: Look, head: Head) -> tuple[int, str | None]:
    """Read the end of the history, or all of it, and keep its last events. How many hold, and what is wrong."""
    store, key = look.ledger.store, look.settings.chain_key
    recent: deque[Recorded] = deque(maxlen=LAST)
    after, last = 0 if look.full else max(0, head.seq - LAST), GENESIS
    if after:
        (before,) = await store.read(after - 1, limit=1)
        last = before.head
    verified, problem = 0, None
    async for entries in pages(store, label="verifying") if look.full else reading.pages(store, after):
        for entry in entries:
            if problem is None:
                try:
                    list(chain.verify([entry], after=last, key=key))
                    verified += 1
                except chain.ChainError as error:
                    problem = str(error)
            last = entry.head
            try:
                recent.append(decode(entry))
            except ValueError as error:
                problem = problem or str(error)
    look.recent = list(recent)
    return verified, problem


async def state(look: Look, found: Findings) -> None:
    """Whether the gate is open, and whether outside readers are told the same."""
    held = look.folded
    mode, disarm = held.mode, disarming.pending(held)
    told = f"{mode.state}, epoch {mode.epoch}" + (f" ({mode.reason})" if mode.reason else "")
    if disarm is not None and disarm.error is None and look.clock() - disarm.at < DISARM_US:
        found.warn("a disarm is being carried out", "Look again.")
    elif disarm is not None:
        found.fail(
            f"a disarm is not proven after {disarm.attempts} attempts: {disarm.error or 'nobody has begun'}",
            f"Stop the Apply Layer by hand (systemctl stop {look.settings.apply_service}), then mend what is named.",
        )
    if mode.state == DISARMED:
        found.warn(told, "No permits until governor rearm --reason …, once you know why (governor status).")
    elif mode.state == ARMED:
        found.ok(told)
    else:
        found.warn(told, "Fewer permits where the cause lies (governor status); it ends by itself.")
    (brake,) = await look.ledger.store.values(look.ledger.keys.halt)
    if brake is not None:
        found.warn(
            f"the emergency brake is set: {brake.decode(errors='replace')[:100]}",
            "A running daemon turns it into a disarm within a second; is it running?",
        )
    if held.hold_until > look.clock():
        found.warn("permits are held back after history was restored", "It ends by itself within a permit's life.")
    tell(await differences(look, [name for name in expected(look) if not is_of_a_symbol(look, name)]), found)
