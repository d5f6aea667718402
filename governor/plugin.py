"""`governor check`: one look for Nagios, Icinga and whatever speaks their plugin convention.

It reads the events itself and asks the daemon, so that either can be down and be told. Nothing is written.
"""

from __future__ import annotations

import asyncio
import contextlib
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from events.store import StoreError, UnavailableError
from governor.connection import connected, ledger_on, now, place
from governor.http_client import UnreadableError
from governor.readiness import Readiness, Routes
from governor.settings import Settings
from governor.status import describe, policy_of
from governor.telling import clean, span
from governor.times import utc

OK, WARNING, CRITICAL, UNKNOWN = range(4)
WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
_RANK = (OK, UNKNOWN, WARNING, CRITICAL)
"""The worst comes last."""
ANSWER_S = 3.0
"""Redis and the daemon have this long each."""
LAG_S = (5.0, 10.0)
"""WARNING and CRITICAL for how long the oldest plan waits; the second as the alert GovernorPlanLag."""
STALLED_S = 15.0
"""CRITICAL when the evaluation loop went round so long ago; as the alert GovernorLoopStalled."""


class Thresholds(NamedTuple):
    """From when on something is WARNING or CRITICAL."""

    warning: float = 80.0
    """Percent of a limit."""
    critical: float = 100.0
    age_warning_s: float | None = None
    """Age of the last event; None: however old."""
    age_critical_s: float | None = None


class Value(msgspec.Struct, frozen=True):
    """One of the performance data."""

    value: float | int | Decimal
    unit: str = ""
    warning: float | Decimal | None = None
    critical: float | Decimal | None = None
    min: float | None = None
    max: float | Decimal | None = None

    def shown(self) -> str:
        parts = [f"{_plain(self.value)}{self.unit}", *map(_plain, (self.warning, self.critical, self.min, self.max))]
        return ";".join(parts).rstrip(";")


class Result:
    """What one look came to."""

    def __init__(self) -> None:
        self.findings: list[tuple[int, str]] = []
        self.values: dict[str, Value] = {}
        self.state: dict[str, Any] | None = None
        """What `describe` tells; None where it is not known."""
        self.daemon: Readiness | None = None

    def found(self, severity: int, what: str) -> None:
        self.findings.append((severity, what))

    @property
    def code(self) -> int:
        return max((severity for severity, _ in self.findings), key=_RANK.index, default=OK)

    @property
    def message(self) -> str:
        """One line: the state, what is wrong with the worst first, and what has been done."""
        ranked = sorted(self.findings, key=lambda finding: -_RANK.index(finding[0]))
        parts = [what for _, what in ranked]
        told = self.state
        if told is not None:
            if told["state"] == "ARMED":
                parts = [_state(told), *parts]
            counts = told["counts"]
            parts.append(f"{counts['plans']} plans ({counts['allowed']} allowed, {counts['blocked']} blocked)")
        if self.daemon is not None and self.daemon.ready:
            parts.append("daemon active" if self.daemon.active else "daemon on standby")
        return f"GOVERNOR {WORDS[self.code]} - {clean(', '.join(parts), 2000)}".replace("|", "/")

    def line(self) -> str:
        """The message with the performance data behind it."""
        data = " ".join(f"{name}={value.shown()}" for name, value in self.values.items())
        return f"{self.message} | {data}" if data else self.message

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        told = self.state or {}
        return {
            "status": WORDS[self.code],
            "code": self.code,
            "message": self.message,
            "findings": [{"severity": WORDS[severity], "what": what} for severity, what in self.findings],
            **{name: told.get(name) for name in ("state", "since", "reason", "epoch", "seq")},
            "values": {name: msgspec.structs.asdict(value) for name, value in self.values.items()},
        }


async def examine(
    settings: Settings, thresholds: Thresholds, *, daemon: bool, limits: bool, timeout_s: float
) -> Result:
    """Look once, within `timeout_s`.

    Args:
        settings: where Redis and the daemon are.
        thresholds: from when on what counts.
        daemon: whether to ask the daemon too.
        limits: whether to hold every symbol's windows and totals to the thresholds, and not only the errors.
        timeout_s: how long it may take; what is not known then is UNKNOWN.
    """
    result = Result()
    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
            group.create_task(_look_at_events(settings, thresholds, result, limits=limits))
            if daemon and settings.metrics_port:
                group.create_task(_look_at_daemon(settings, result))
    except TimeoutError:
        result.found(UNKNOWN, f"no answer within {timeout_s:g} s")
    return result


async def _look_at_events(settings: Settings, thresholds: Thresholds, result: Result, *, limits: bool) -> None:
    try:
        async with connected(settings, answer_s=ANSWER_S) as client:
            ledger = ledger_on(client, settings)
            await ledger.open()
            (halt,) = await ledger.store.values(ledger.keys.halt)
    except UnavailableError as error:
        result.found(CRITICAL, f"Redis at {place(settings)} is not reachable, no permits: {error}")
        return
    except (StoreError, ValueError, OSError) as error:
        result.found(CRITICAL, f"the events cannot be read: {error}")
        return
    if halt is not None:
        result.found(CRITICAL, f"emergency brake: {halt.decode(errors='replace')}")
    if not ledger.state.seq:
        result.found(UNKNOWN, f"no event at {place(settings)}: no daemon has ever run here")
        return
    at = now()
    told = result.state = describe(ledger.state, policy_of(ledger.state, settings.policy), at)
    _mode(told, at / 1e6, result)
    _age(max(0.0, (at - ledger.state.time) / 1e6), thresholds, result)
    _limits(told, thresholds, result, every=limits)


def _mode(told: dict[str, Any], now_s: float, result: Result) -> None:
    state, disarm = told["state"], told["disarm"]
    if state != "ARMED":
        result.found({"THROTTLED": WARNING}.get(state, CRITICAL), _state(told))
    if disarm is not None and not disarm["done"]:
        why = f": {disarm['error']}" if disarm["error"] else ""
        result.found(CRITICAL, f"the disarm is unfinished after {disarm['attempts']} attempts{why}")
    if told["drift"] is not None:
        result.found(CRITICAL, f"drift: the Apply Layer's file says APPLY_MODE={told['drift']}, set by hand")
    if told["hold_until"] is not None:
        result.found(WARNING, f"no permits for {span(told['hold_until'] - now_s)} more: history was lost")
    result.values["state"] = Value(["ARMED", "THROTTLED", "DISARMED"].index(state), min=0, max=2)
    for name in ("plans", "allowed", "blocked", "skipped", "rejected"):
        result.values[name] = Value(told["counts"][name], "c")
    result.values["permits"] = Value(len(told["permits"]), min=0)


def _state(told: dict[str, Any]) -> str:
    reason = f" ({told['reason']})" if told["reason"] else ""
    return f"{told['state']} since {utc(told['since'])[:-5]}Z{reason}"


def _age(age_s: float, thresholds: Thresholds, result: Result) -> None:
    warning, critical = thresholds.age_warning_s, thresholds.age_critical_s
    result.values["event_age"] = Value(round(age_s, 3), "s", warning, critical, 0)
    for severity, most in ((CRITICAL, critical), (WARNING, warning)):
        if most is not None and age_s >= most:
            result.found(severity, f"the last event is {span(age_s)} old")
            return


def _limits(told: dict[str, Any], thresholds: Thresholds, result: Result, *, every: bool) -> None:
    pairs = {"errors": told["errors"]}
    if every:
        pairs["total_daily_notional"] = told["total_daily_notional"]
        for symbol, values in told["symbols"].items():
            names = ("exec_1h", "exec_5min", "daily_notional")
            pairs |= {f"{symbol}_{name}": values[name] for name in names}
    for name, pair in pairs.items():
        used, limit = Decimal(pair["used"]), pair["limit"]
        if limit is None:
            result.values[name] = Value(used, min=0)
            continue
        bounds = [Decimal(limit) * Decimal(str(share)) / 100 for share in (thresholds.warning, thresholds.critical)]
        result.values[name] = Value(used, "", bounds[0], bounds[1], 0, Decimal(limit))
        if used and used >= bounds[0]:
            severity = CRITICAL if used >= bounds[1] else WARNING
            result.found(severity, f"{name.replace('_', ' ')} {_plain(used)} of {_plain(Decimal(limit))}")


async def _look_at_daemon(settings: Settings, result: Result) -> None:
    async with contextlib.aclosing(Routes(settings, within_s=ANSWER_S)) as routes:
        result.daemon = told = await routes.readiness()
        for problem in told.problems:
            result.found(CRITICAL, f"daemon not ready: {problem}" if told.answers else f"daemon down: {problem}")
        for note in told.notes:
            if not note.startswith(("standby:", "drift:")):  # the one is as it should be, the other is in the events
                result.found(WARNING, f"daemon: {note}")
        if told.answers:
            _metrics(await _gauges(routes), result)


async def _gauges(routes: Routes) -> dict[str, float]:
    """The metrics without labels; empty where they cannot be had."""
    found: dict[str, float] = {}
    try:
        page = (await routes.get("/metrics")).body.decode(errors="replace")
    except (OSError, UnreadableError):
        return found
    for line in page.splitlines():
        name, _, value = line.partition(" ")
        if name.startswith("quantum_govern_") and "{" not in name:
            with contextlib.suppress(ValueError):
                found[name.removeprefix("quantum_govern_")] = float(value)
    return found


def _metrics(gauges: dict[str, float], result: Result) -> None:
    if (turned := gauges.get("last_evaluation_timestamp_seconds")) is not None:
        idle_s = max(0.0, now() / 1e6 - turned)
        result.values["loop_age"] = Value(round(idle_s, 3), "s", None, STALLED_S, 0)
        if idle_s >= STALLED_S:
            result.found(CRITICAL, f"the evaluation loop went round {span(idle_s)} ago")
    if (lag_s := gauges.get("plan_lag_seconds")) is not None:
        result.values["plan_lag"] = Value(round(lag_s, 3), "s", *LAG_S, 0)
        if lag_s >= LAG_S[0]:
            result.found(CRITICAL if lag_s >= LAG_S[1] else WARNING, f"the oldest plan waits for {span(lag_s)}")


def _plain(value: float | Decimal | None) -> str:
    """Digits, never an exponent."""
    if value is None:
        return ""
    digits = f"{Decimal(str(value)):f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
