"""Prometheus metrics. Counters follow the events; gauges are computed at scrape time from the live state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from events.keys import day_of
from events.types import (
    Decision,
    DisarmFailed,
    DisarmStarted,
    ErrorRecorded,
    PlanRejected,
    Recorded,
    Throttled,
    UnpermittedExecution,
)
from governor.binance_errors import ERROR_KINDS as EXCHANGE_ERRORS
from governor.gates import REASONS
from governor.machine import STATES
from governor.plans import entry_time
from governor.policy import Policy
from projections import totals, windows
from projections.state import State

OTHER = "other"
DISARM_REASONS = ("burst_limit_breach", "repeated_errors", "unpermitted_execution", "manual")
ERROR_KINDS = (
    "malformed_plan", "plan_lost", "evaluation_error", "expired_permit_executed", "excess_quantity", "execution_error",
)  # fmt: skip
ALERT_RESULTS = ("sent", "failed", "dropped")
"""Taken by the target; not taken, and tried again; given up."""
ENDPOINTS = ("position", "mark", "mark_all", "time", "ping")
DECISION_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 30)
EXCHANGE_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class SymbolRow(NamedTuple):
    """What is told of one symbol."""

    symbol: str
    hour: int
    five_minutes: int
    notional: float
    quantity: float
    notional_limit: float | None
    quantity_limit: float | None
    hour_limit: int | None = None
    five_minutes_limit: int | None = None


class Snapshot(NamedTuple):
    """The gauges' values at one moment, taken in the loop so that rendering can happen outside of it."""

    state: str
    epoch: int
    outstanding: int
    disarm_pending: bool
    total_notional: float
    total_limit: float | None
    symbols: tuple[SymbolRow, ...]
    truncated: int
    plan_lag: float
    events: int
    conflicts: int
    errors: int
    exchange_weight: int
    exchange_weight_limit: int
    store_up: bool
    loop_at: float
    inflight: int
    apply_dry_run: bool
    active: bool = True
    quarantined: bool = False
    hold_seconds: float = 0.0
    journal_up: bool = True
    drift: bool = False
    ready: bool = True
    disarmed: str | None = None
    """Why it is disarmed, as `disarm_label` has it; None while it is not."""
    errors_limit: int | None = None
    alerts_waiting: int = 0


def snapshot_symbols(state: State, policy: Policy, now: int, most: int) -> tuple[tuple[SymbolRow, ...], int]:
    """Rows of the symbols with something counted, the last active first, at most `most`; and how many are left out."""
    day, left = day_of(max(now, state.time)), 0
    rows: list[SymbolRow] = []
    at = max(now, state.time)
    for symbol, book in reversed(list(state.books.items())):
        if len(rows) >= most:
            left += 1
            continue
        counted, limits = totals.on(book.days, day), policy.of(symbol)
        rows.append(
            SymbolRow(
                symbol,
                windows.count(book.executions, now=at, window=windows.HOUR_US),
                windows.count(book.executions, now=at, window=windows.FIVE_MINUTES_US),
                float(counted.notional),
                float(counted.quantity),
                None if limits.notional_per_day is None else float(limits.notional_per_day),
                None if limits.qty_per_day is None else float(limits.qty_per_day),
                limits.per_hour,
                limits.per_5min,
            )
        )
    return tuple(rows), left


class Metrics(Collector):
    """All metrics of one daemon.

    Args:
        snapshot: the gauges' values, or None when the loop does not answer.
        max_symbols: how many symbols get labels of their own; the rest is `other`.
    """

    def __init__(self, snapshot: Callable[[], Snapshot | None], *, max_symbols: int, version: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self._snapshot = snapshot
        self._max = max_symbols
        self._symbols: set[str] = set()
        self._allow: dict[str, Counter] = {}
        """Of `allow`, by symbol."""
        self.allow = Counter("quantum_govern_allow", "Plans allowed.", ["symbol"], registry=registry)
        self.block = Counter("quantum_govern_block", "Plans blocked.", ["symbol", "reason"], registry=registry)
        self.skip = Counter("quantum_govern_skip", "Plans skipped.", ["reason"], registry=registry)
        self.disarm = Counter("quantum_govern_disarm", "Disarms.", ["reason"], registry=registry)
        self.disarm_failed = Counter(
            "quantum_govern_disarm_failed", "Attempts to force dry run that failed.", registry=registry
        )
        self.throttled = Counter("quantum_govern_throttled", "New causes to throttle.", registry=registry)
        self.unpermitted = Counter(
            "quantum_govern_unpermitted_execution", "Executions nobody permitted.", registry=registry
        )
        self.error = Counter("quantum_govern_error", "Errors that count, by kind.", ["kind"], registry=registry)
        self.exchange_error = Counter(
            "quantum_govern_exchange_error", "Exchange calls that failed, by kind.", ["kind"], registry=registry
        )
        self.decision_seconds = Histogram(
            "quantum_govern_decision_seconds",
            "From the plan's stream entry to its committed decision.",
            registry=registry,
            buckets=DECISION_BUCKETS,
        )
        self.exchange_seconds = Histogram(
            "quantum_govern_exchange_seconds",
            "Duration of exchange calls.",
            ["endpoint"],
            registry=registry,
            buckets=EXCHANGE_BUCKETS,
        )
        self.alerts = Counter(
            "quantum_govern_alerts", "Attempts to send an alert to a target, by how they ended.", ["result"],
            registry=registry,
        )  # fmt: skip
        info = Gauge("quantum_govern_build_info", "Version of the program.", ["version"], registry=registry)
        info.labels(version).set(1)
        Gauge(
            "quantum_govern_start_time_seconds", "When this process started.", registry=registry
        ).set_to_current_time()
        # A counter that is not there before its first increment hides that increment from increase().
        for reason in DISARM_REASONS:
            self.disarm.labels(reason)
        for kind in ERROR_KINDS:
            self.error.labels(kind)
        for kind in EXCHANGE_ERRORS:
            self.exchange_error.labels(kind)
        for endpoint in ENDPOINTS:
            self.exchange_seconds.labels(endpoint)
        for reason in ("not_execute", "duplicate_plan", "evaluation_error"):
            self.skip.labels(reason)
        for result in ALERT_RESULTS:
            self.alerts.labels(result)
        registry.register(self)

    def symbol(self, symbol: str | None) -> str:
        """A label value for a symbol: itself while there is room."""
        if not symbol:
            return OTHER
        if symbol not in self._symbols:
            if len(self._symbols) >= self._max:
                return OTHER
            self._symbols.add(symbol)
        return symbol

    def observe(self, recorded: Recorded, now: int) -> None:
        """Count one event."""
        match recorded.event:
            case Decision(verdict="EXECUTE") as event:
                self._allowed(self.symbol(event.symbol)).inc()
                self._decided(event, now)
            case Decision(verdict="BLOCK") as event:
                self.block.labels(self.symbol(event.symbol), _known(event.reason)).inc()
                self._decided(event, now)
            case Decision() as event:
                self.skip.labels(_known(event.reason)).inc()
            case PlanRejected() as event:
                self.block.labels(self.symbol(event.symbol), "invalid_plan").inc()
            case DisarmStarted() as event:
                self.disarm.labels(disarm_label(event.reason, manual=event.manual)).inc()
            case DisarmFailed():
                self.disarm_failed.inc()
            case ErrorRecorded() as event:
                self.error.labels(event.kind if event.kind in ERROR_KINDS else OTHER).inc()
            case Throttled():
                self.throttled.inc()
            case UnpermittedExecution():
                self.unpermitted.inc()
            case _:
                pass

    def _allowed(self, symbol: str) -> Counter:
        counter = self._allow.get(symbol)
        if counter is None:
            counter = self._allow[symbol] = self.allow.labels(symbol)
        return counter

    def _decided(self, event: Decision, now: int) -> None:
        self.decision_seconds.observe(max(0, now - entry_time(event.entry_id)) / 1e6)

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        if snapshot is None:
            return
        state = GaugeMetricFamily("quantum_govern_state", "1 for the state the gate is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == snapshot.state))
        yield state
        disarmed = GaugeMetricFamily(
            "quantum_govern_disarmed", "1 for what disarmed the gate, while it is.", labels=["reason"]
        )
        for name in (*DISARM_REASONS, OTHER):
            disarmed.add_metric([name], float(name == snapshot.disarmed))
        yield disarmed
        for name, text, value in (
            ("epoch", "Epoch; a disarm and a re-arm begin a new one.", snapshot.epoch),
            ("permits_outstanding", "Permits granted and not yet settled.", snapshot.outstanding),
            ("disarm_pending", "1 while a disarm has no proof yet.", snapshot.disarm_pending),
            ("daily_notional_usd", "Notional counted today over all symbols.", snapshot.total_notional),
            ("plan_lag_seconds", "Age of the oldest plan that waits for a decision.", snapshot.plan_lag),
            ("plans_waiting", "Plans read and not yet decided.", snapshot.inflight),
            ("events", "Number of the last event.", snapshot.events),
            ("errors_in_window", "Errors that count towards the disarm now.", snapshot.errors),
            ("exchange_weight_used", "Request weight used in this minute.", snapshot.exchange_weight),
            ("exchange_weight_limit", "Request weight allowed a minute.", snapshot.exchange_weight_limit),
            ("store_up", "1 while the event store answers.", snapshot.store_up),
            ("last_evaluation_timestamp_seconds", "When the evaluation loop last went round.", snapshot.loop_at),
            ("symbols_truncated", "Symbols without metrics of their own.", snapshot.truncated),
            ("apply_dry_run", "1 while the Apply Layer's file says dry run.", snapshot.apply_dry_run),
            ("drift", "1 while DISARMED with the Apply Layer's file set off dry run by hand.", snapshot.drift),
            ("active", "1 for the governor that reads plans, 0 for a standby.", snapshot.active),
            ("quarantined", "1 while the stream's history contradicts the journal's.", snapshot.quarantined),
            ("hold_seconds", "How long permits are still held back after history was lost.", snapshot.hold_seconds),
            ("journal_up", "1 while the journal can be written.", snapshot.journal_up),
            ("alerts_waiting", "Alerts that have not reached their target yet.", snapshot.alerts_waiting),
            ("ready", "1 while plans are being decided, as /readyz has it.", snapshot.ready),
        ):
            yield GaugeMetricFamily(f"quantum_govern_{name}", text, value=float(value))
        if snapshot.total_limit is not None:
            yield GaugeMetricFamily(
                "quantum_govern_daily_notional_limit_usd", "Limit over all symbols.", value=snapshot.total_limit
            )
        if snapshot.errors_limit is not None:
            yield GaugeMetricFamily(
                "quantum_govern_errors_limit", "Errors that disarm; half of them throttle.", value=snapshot.errors_limit
            )
        conflicts = Metric("quantum_govern_commit_conflicts", "Commits that found the head moved.", "counter")
        conflicts.add_sample("quantum_govern_commit_conflicts_total", {}, float(snapshot.conflicts))
        yield conflicts
        yield from _by_symbol(snapshot.symbols)


def _by_symbol(rows: tuple[SymbolRow, ...]) -> Iterator[Metric]:
    for name, text, values in (
        ("exec_count_hour", "Executions in the last hour.", [row.hour for row in rows]),
        ("exec_count_5min", "Executions in the last 5 minutes.", [row.five_minutes for row in rows]),
        ("exec_limit_hour", "Executions allowed in an hour.", [row.hour_limit for row in rows]),
        ("exec_limit_5min", "Executions allowed in 5 minutes.", [row.five_minutes_limit for row in rows]),
        ("symbol_daily_notional_usd", "Notional counted today.", [row.notional for row in rows]),
        ("symbol_daily_quantity", "Quantity counted today, base units.", [row.quantity for row in rows]),
        ("symbol_daily_notional_limit_usd", "Its limit.", [row.notional_limit for row in rows]),
        ("symbol_daily_quantity_limit", "Its limit.", [row.quantity_limit for row in rows]),
    ):
        family = GaugeMetricFamily(f"quantum_govern_{name}", text, labels=["symbol"])
        for row, value in zip(rows, values, strict=True):
            if value is not None:
                family.add_metric([row.symbol], float(value))
        yield family


def disarm_label(reason: str, *, manual: bool) -> str:
    """The label value for what disarmed: one of a closed set."""
    told = "manual" if manual else reason
    return told if told in DISARM_REASONS else OTHER


def _known(reason: str | None) -> str:
    return reason if reason in REASONS else OTHER
