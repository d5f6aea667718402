"""`governor doctor`: live checks on the running system, each with what was seen and what to do.

A check is a small function in `governor.checks`; CHECKS is the list of them. One that breaks fails alone, one that
hangs is given up, and those that need what is not there are skipped. Nothing is written, and nothing is changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from events.store import StoreError, UnavailableError
from governor.checks import AS_ROOT, Check, Findings, Look, host, keys, outside, store
from governor.checks.alerts import alerts
from governor.connection import connected, ledger_on, now
from governor.console import DONE, FAILED, NO_REDIS
from governor.settings import Settings

WITHIN_S = 5.0
FOLD_S = 60.0
"""A long history without a checkpoint takes a while."""
ANSWER_S = 3.0
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "bright_black"}


class Probe(NamedTuple):
    """A check and what it needs."""

    name: str
    look: Callable[[Look, Findings], Awaitable[None]]
    needs: Literal["redis", "state", "history", ""] = ""
    """Redis; the folded state; or only to come after the events were read, where that was possible."""


CHECKS: tuple[Probe, ...] = (
    Probe("service", host.service),
    Probe("metrics", host.metrics),
    Probe("settings", host.settings, "history"),
    Probe("redis", store.server, "redis"),
    Probe("access", store.access, "redis"),
    Probe("stream", store.stream, "redis"),
    Probe("state", store.state, "state"),
    Probe("plans", keys.plans, "redis"),
    Probe("permits", keys.permits, "state"),
    Probe("blocks", keys.blocks, "state"),
    Probe("executions", keys.executions, "state"),
    Probe("exchange", outside.exchange, "history"),
    Probe("credentials", outside.credentials, "history"),
    Probe("apply-layer", outside.apply_layer, "history"),
    Probe("disarm", outside.disarm_path),
    Probe("journal", host.journal, "history"),
    Probe("disk", host.disk),
    Probe("log", host.log),
    Probe("alerts", alerts),
)
"""In the order they are told."""


async def examine(
    settings: Settings,
    *,
    environ: Mapping[str, str],
    env_file: Path | None = None,
    full: bool = False,
    clock: Callable[[], int] = now,
    probes: Sequence[Probe] = CHECKS,
) -> tuple[list[Check], int]:
    """Run the checks.

    Args:
        settings: where everything is.
        environ: where the settings came from.
        env_file: the file they came from, if one was named.
        full: whether to verify all events, and not only the last ones.
        clock: microseconds since the epoch.
        probes: what to run.

    Returns:
        What each came to, in their order, and the exit code: 0 nothing failed, 1 something did, 4 Redis is away.
    """
    async with connected(settings, answer_s=ANSWER_S) as connection:
        ledger = ledger_on(connection, settings)
        look = Look(
            settings, environ=environ, connection=connection, ledger=ledger, clock=clock, env_file=env_file, full=full
        )
        alone = {probe: asyncio.create_task(_run(probe, look)) for probe in probes if not probe.needs}
        found: dict[str, Check] = {}
        # One after the other: they share a connection and a state, and one that finds Redis away spares the others.
        for probe in probes:
            if probe.needs in ("redis", "state"):
                found[probe.name] = await _run(probe, look)
        last = [probe for probe in probes if probe.needs == "history"]
        for probe, check in zip(last, await asyncio.gather(*(_run(probe, look) for probe in last)), strict=True):
            found[probe.name] = check
        for probe, task in alone.items():
            found[probe.name] = await task
    checks = [found[probe.name] for probe in probes]
    failed = any(check.verdict == "fail" for check in checks)
    return checks, NO_REDIS if look.away is not None else FAILED if failed else DONE


async def _run(probe: Probe, look: Look) -> Check:
    found = Findings()
    if look.away is not None and probe.needs in ("redis", "state"):
        found.skip("Redis is not reachable")
    elif probe.needs == "state" and look.state is None:
        found.skip("there is no state: the events cannot be folded, or there are none")
    else:
        await _bounded(probe, look, found)
    return found.summed_up(probe.name)


async def _bounded(probe: Probe, look: Look, found: Findings) -> None:
    within_s = None if look.full and probe.name == "stream" else WITHIN_S
    needs_redis = probe.needs in ("redis", "state")
    try:
        async with asyncio.timeout(within_s):
            await probe.look(look, found)
        if probe.name == "redis":
            await _fold(look)
    except (UnavailableError, TimeoutError) as error:
        why = str(error) if isinstance(error, UnavailableError) else f"no answer within {within_s or FOLD_S:g} s"
        if needs_redis:
            look.away = why
        found.fail(why, _way_back(why) if needs_redis else "What it asks hangs; the others count.")
    except PermissionError as error:
        found.skip(f"this user may not look at {error.filename or error}", AS_ROOT)
    except Exception as error:  # noqa: BLE001 - one broken check must not take the others along
        found.fail(f"this check broke: {type(error).__name__}: {error}", "The others count; report this one.")


def _way_back(why: str) -> str:
    """What to do about a Redis that does not answer."""
    if any(word in why for word in ("NOAUTH", "WRONGPASS", "AuthenticationError", "invalid username-password")):
        return "Correct REDIS_USERNAME and REDIS_PASSWORD. No permits until then."
    return "Bring it back: systemctl status redis-server, REDIS_HOST and REDIS_PORT. No permits until then."


async def _fold(look: Look) -> None:
    """Read the state, once Redis is known to answer.

    Raises:
        UnavailableError: Redis does not answer any more.
        TimeoutError: it takes too long.
    """
    try:
        async with asyncio.timeout(FOLD_S):
            await look.ledger.open()
    except UnavailableError:
        raise
    except (StoreError, ValueError) as error:
        look.problem = str(error)


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "ok": all(check.verdict != "fail" for check in checks),
        "checks": [
            {"name": check.name, "verdict": check.verdict, "seen": check.seen, "todo": check.todo} for check in checks
        ],
    }


def print_checks(checks: Sequence[Check]) -> None:
    """A line a check, and below it what to do where there is something."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = click.style(f"{check.verdict:<5}", fg=COLOURS[check.verdict], bold=check.verdict == "fail")
        click.echo(f"{verdict} {check.name:<{width}}  {check.seen}")
        if check.todo is not None and check.verdict != "ok":
            click.echo(f"{'':<{6 + width}}  -> {check.todo}")
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in COLOURS}
    click.echo(f"{len(checks)} checks: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
