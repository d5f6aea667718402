import shutil
import subprocess
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from events.types import (
    Decision,
    DisarmFailed,
    DisarmStarted,
    ErrorRecorded,
    Event,
    PermitExpired,
    PlanReceived,
    PlanRejected,
    Recorded,
    Recovered,
    Throttled,
    UnpermittedExecution,
)
from governor.gates import REASONS
from governor.metrics import DISARM_REASONS, ERROR_KINDS, Metrics, Snapshot, SymbolRow, snapshot_symbols
from governor.policy import Limits, Policy
from projections.state import State, fold, initial
from tests.conftest import missing

HOUR, MINUTE, SECOND, DAY = 3_600_000_000, 60_000_000, 1_000_000, 86_400_000_000
NOON = 20_415 * DAY + 12 * HOUR
Labels = tuple[tuple[str, str], ...]


def decision(
    verdict: str = "EXECUTE", *, symbol: str = "BTCUSDT", reason: str | None = None, at: int = NOON
) -> Decision:
    return Decision(
        plan_id=f"plan-{at}",
        symbol=symbol,
        action="FULL_CLOSE_PROPOSED",
        verdict=verdict,
        reason=reason,
        computed_qty=Decimal("0.005"),
        computed_notional=Decimal("475.25"),
        entry_id=f"{at // 1000}-0",
        mode="ARMED",
        epoch=1,
        settings="",
        expires_us=at + MINUTE,
    )


def recorded(*events: tuple[int, Event]) -> list[Recorded]:
    return [Recorded(seq, at, event, "") for seq, (at, event) in enumerate(events, start=1)]


def executions(*times: int, symbol: str = "BTCUSDT") -> State:
    return fold(recorded(*((at, decision(symbol=symbol, at=at)) for at in times)))


QUIET = Snapshot(
    state="ARMED",
    epoch=1,
    outstanding=0,
    disarm_pending=False,
    total_notional=0.0,
    total_limit=None,
    symbols=(),
    truncated=0,
    plan_lag=0.0,
    events=0,
    conflicts=0,
    errors=0,
    exchange_weight=0,
    exchange_weight_limit=2400,
    store_up=True,
    loop_at=1.5,
    inflight=0,
    apply_dry_run=False,
)


def metrics(snapshot: Snapshot | None = QUIET, *, max_symbols: int = 200) -> Metrics:
    return Metrics(lambda: snapshot, max_symbols=max_symbols, version="1.2.3")


def observe(into: Metrics, *events: Event, now: int = NOON) -> None:
    for event in events:
        into.observe(Recorded(1, now, event, ""), now)


def scrape(of: Metrics) -> dict[str, dict[Labels, float]]:
    """Every sample by its name and labels."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(generate_latest(of.registry).decode()):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), sample.name
            found[sample.name][labels] = sample.value
    return found


def value(of: Metrics, name: str, **labels: str) -> float | None:
    return scrape(of).get(f"quantum_govern_{name}", {}).get(tuple(sorted(labels.items())))


def full() -> Metrics:
    """Metrics with a sample of everything."""
    row = SymbolRow("BTCUSDT", 2, 1, 950.5, 0.01, 5000.0, 0.02, 3, 2)
    made = metrics(QUIET._replace(symbols=(row,), total_limit=9000.0, total_notional=950.5, errors_limit=5))
    observe(
        made,
        decision(),
        decision("BLOCK", reason="hourly_limit_exceeded"),
        decision("SKIP", reason="duplicate_plan"),
        PlanRejected(entry_id="1-0", reason="x"),
        DisarmStarted(reason="burst_limit_breach", context={}, epoch=2),
        DisarmFailed(epoch=2, attempt=1, step="restart", error="x"),
        ErrorRecorded(kind="plan_lost", detail="x"),
        Throttled(symbol=None, reason="x", until_us=0),
        UnpermittedExecution(plan_id="p", symbol="BTCUSDT", entry_id="1-0", permit="none"),
    )
    made.exchange_seconds.labels("positionRisk").observe(0.1)
    made.exchange_error.labels("timeout").inc()
    return made


# ---------------------------------------------------------------- names


def test_the_requirements_five_names_are_there_as_they_are_spelt() -> None:
    found = scrape(full())
    labels = {
        name: {tuple(label for label, _ in of) for of in found[name]}
        for name in (
            "quantum_govern_allow_total",
            "quantum_govern_block_total",
            "quantum_govern_disarm_total",
            "quantum_govern_exec_count_hour",
            "quantum_govern_exec_count_5min",
        )
    }
    assert labels == {
        "quantum_govern_allow_total": {("symbol",)},
        "quantum_govern_block_total": {("reason", "symbol")},
        "quantum_govern_disarm_total": {("reason",)},
        "quantum_govern_exec_count_hour": {("symbol",)},
        "quantum_govern_exec_count_5min": {("symbol",)},
    }


def test_every_name_has_the_same_prefix_and_an_explanation() -> None:
    families = list(text_string_to_metric_families(generate_latest(full().registry).decode()))
    assert len(families) > 20
    for family in families:
        assert family.name.startswith("quantum_govern_")
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")


def test_counters_that_were_never_increased_are_there_at_zero() -> None:
    found = scrape(metrics())
    assert found["quantum_govern_disarm_total"] == {(("reason", reason),): 0.0 for reason in DISARM_REASONS}
    assert found["quantum_govern_error_total"] == {(("kind", kind),): 0.0 for kind in ERROR_KINDS}
    for name in ("disarm_failed", "throttled", "unpermitted_execution", "commit_conflicts"):
        assert found[f"quantum_govern_{name}_total"] == {(): 0.0}


def test_the_version_is_told() -> None:
    assert value(metrics(), "build_info", version="1.2.3") == 1.0


def test_there_are_no_timestamps_of_creation() -> None:
    assert not [name for name in scrape(full()) if name.endswith("_created")]


def test_a_scrape_holds_what_promtool_asks_of_it() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        missing("promtool is not on PATH: it comes with Prometheus")
    text = generate_latest(full().registry)
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout.decode(), checked.stderr.decode()) == (0, "", "")


# ---------------------------------------------------------------- counters follow the events


def test_verdicts_are_counted_by_symbol_and_reason() -> None:
    made = metrics()
    observe(
        made,
        decision(),
        decision(),
        decision(symbol="ETHUSDT"),
        decision("BLOCK", reason="hourly_limit_exceeded"),
        decision("BLOCK", reason="disarmed", symbol="ETHUSDT"),
        decision("SKIP", reason="duplicate_plan"),
        PlanRejected(entry_id="1-0", reason="no symbol"),
        PlanRejected(entry_id="1-0", reason="x", symbol="BTCUSDT"),
    )
    found = scrape(made)
    assert found["quantum_govern_allow_total"] == {(("symbol", "BTCUSDT"),): 2.0, (("symbol", "ETHUSDT"),): 1.0}
    assert found["quantum_govern_block_total"] == {
        (("reason", "hourly_limit_exceeded"), ("symbol", "BTCUSDT")): 1.0,
        (("reason", "disarmed"), ("symbol", "ETHUSDT")): 1.0,
        (("reason", "invalid_plan"), ("symbol", "other")): 1.0,
        (("reason", "invalid_plan"), ("symbol", "BTCUSDT")): 1.0,
    }
    assert value(made, "skip_total", reason="duplicate_plan") == 1.0


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_a_label_of_its_own(reason: str) -> None:
    made = metrics()
    observe(made, decision("BLOCK", reason=reason))
    assert value(made, "block_total", symbol="BTCUSDT", reason=reason) == 1.0


@pytest.mark.parametrize("reason", [None, "", "anything a later version says"])
def test_an_unknown_reason_is_other(reason: str | None) -> None:
    made = metrics()
    observe(made, decision("BLOCK", reason=reason), decision("SKIP", reason=reason))
    assert value(made, "block_total", symbol="BTCUSDT", reason="other") == 1.0
    assert value(made, "skip_total", reason="other") == 1.0


@pytest.mark.parametrize(
    ("event", "label"),
    [
        *((DisarmStarted(reason=reason, context={}, epoch=2), reason) for reason in DISARM_REASONS[:3]),
        (DisarmStarted(reason="what a person says", context={}, epoch=2, manual=True, operator="ops"), "manual"),
        (DisarmStarted(reason="what a later version says", context={}, epoch=2), "other"),
    ],
)
def test_disarms_are_counted_by_a_closed_set_of_reasons(event: Event, label: str) -> None:
    made = metrics()
    observe(made, event)
    counted = scrape(made)["quantum_govern_disarm_total"]
    assert {dict(labels)["reason"] for labels, count in counted.items() if count} == {label}


@pytest.mark.parametrize(("kind", "label"), [*((kind, kind) for kind in ERROR_KINDS), ("something new", "other")])
def test_errors_are_counted_by_a_closed_set_of_kinds(kind: str, label: str) -> None:
    made = metrics()
    observe(made, ErrorRecorded(kind=kind, detail="x"))
    assert value(made, "error_total", kind=label) == 1.0


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (DisarmFailed(epoch=2, attempt=1, step="restart", error="x"), "disarm_failed_total"),
        (Throttled(symbol="BTCUSDT", reason="x", until_us=0), "throttled_total"),
        (UnpermittedExecution(plan_id="p", symbol="S", entry_id="1-0", permit="none"), "unpermitted_execution_total"),
    ],
)
def test_other_events_of_interest_are_counted(event: Event, name: str) -> None:
    made = metrics()
    observe(made, event, event)
    assert value(made, name) == 2.0


def test_events_of_no_interest_count_nothing() -> None:
    made = metrics()
    before = scrape(made)
    received = PlanReceived(plan_id="p", symbol="S", action="A", decision="EXECUTE", entry_id="1-0", fields={})
    observe(made, Recovered(), PermitExpired(plan_id="p", symbol="S"), received)
    assert scrape(made) == before


def test_a_decisions_time_counts_from_its_stream_entry() -> None:
    made = metrics()
    observe(made, decision(at=NOON), decision("BLOCK", reason="disarmed", at=NOON), now=NOON + 30_000)
    observe(made, decision(at=NOON), now=NOON - SECOND)  # a clock that stepped back
    observe(made, decision("SKIP", reason="duplicate_plan", at=NOON), now=NOON + HOUR)
    found = scrape(made)
    assert found["quantum_govern_decision_seconds_count"] == {(): 3.0}
    assert found["quantum_govern_decision_seconds_sum"] == {(): pytest.approx(0.06)}
    buckets = found["quantum_govern_decision_seconds_bucket"]
    assert (buckets[(("le", "0.02"),)], buckets[(("le", "0.05"),)]) == (1.0, 3.0)


# ---------------------------------------------------------------- few enough labels


def test_symbols_beyond_the_cap_are_other() -> None:
    made = metrics(max_symbols=2)
    for symbol in ("A", "B", "C", "D", "A", "C"):
        observe(made, decision(symbol=symbol), decision("BLOCK", symbol=symbol, reason="disarmed"))
    allowed = {dict(labels)["symbol"]: count for labels, count in scrape(made)["quantum_govern_allow_total"].items()}
    assert allowed == {"A": 2.0, "B": 1.0, "other": 3.0}
    assert value(made, "block_total", symbol="other", reason="disarmed") == 3.0


def test_no_symbol_is_other() -> None:
    assert [metrics().symbol(symbol) for symbol in (None, "", "BTCUSDT")] == ["other", "other", "BTCUSDT"]


def test_symbols_beyond_the_cap_are_left_out_of_the_gauges_and_told() -> None:
    state = initial()
    for number in range(5):
        state = fold([Recorded(number + 1, NOON + number, decision(symbol=f"S{number}", at=NOON + number), "")], state)
    rows, left = snapshot_symbols(state, Policy(), NOON, 2)
    assert ([row.symbol for row in rows], left) == (["S4", "S3"], 3)
    made = metrics(QUIET._replace(symbols=rows, truncated=left))
    assert len(scrape(made)["quantum_govern_exec_count_hour"]) == 2
    assert value(made, "symbols_truncated") == 3.0


# ---------------------------------------------------------------- gauges are of the moment


def test_windows_that_pass_without_any_event_lower_the_gauges() -> None:
    state = executions(NOON, NOON + MINUTE)
    now = NOON + 2 * MINUTE

    def snapshot() -> Snapshot:
        return QUIET._replace(symbols=snapshot_symbols(state, Policy(), now, 200)[0])

    made = Metrics(snapshot, max_symbols=200, version="1")

    def counts() -> tuple[float | None, float | None]:
        names = ("exec_count_5min", "exec_count_hour")
        return value(made, names[0], symbol="BTCUSDT"), value(made, names[1], symbol="BTCUSDT")

    assert counts() == (2.0, 2.0)
    now = NOON + 5 * MINUTE - 1
    assert counts() == (2.0, 2.0)
    now = NOON + 5 * MINUTE
    assert counts() == (1.0, 2.0)
    now = NOON + 6 * MINUTE
    assert counts() == (0.0, 2.0)
    now = NOON + HOUR
    assert counts() == (0.0, 1.0)
    now = NOON + HOUR + MINUTE
    assert counts() == (0.0, 0.0)


def test_a_clock_that_is_behind_the_last_event_does_not_empty_the_windows() -> None:
    rows, _ = snapshot_symbols(executions(NOON), Policy(), NOON - HOUR, 200)
    assert (rows[0].hour, rows[0].five_minutes, rows[0].notional) == (1, 1, 475.25)


def test_daily_totals_are_those_of_the_utc_day_and_stand_beside_their_limits() -> None:
    policy = Policy(by_symbol={"BTCUSDT": Limits(notional_per_day=Decimal(1000), qty_per_day=None)})
    state = executions(NOON, NOON + 1)
    (row,), _ = snapshot_symbols(state, policy, NOON + 2, 200)
    assert row == SymbolRow("BTCUSDT", 2, 2, 950.5, 0.01, 1000.0, None, 3, 2)
    (tomorrow,), _ = snapshot_symbols(state, policy, NOON + DAY, 200)
    assert (tomorrow.notional, tomorrow.quantity) == (0.0, 0.0)


def test_a_limit_that_is_off_has_no_sample() -> None:
    rows = (SymbolRow("A", 0, 0, 0.0, 0.0, None, 0.02), SymbolRow("B", 0, 0, 0.0, 0.0, 5000.0, None))
    made = metrics(QUIET._replace(symbols=rows))
    found = scrape(made)
    assert found["quantum_govern_symbol_daily_notional_limit_usd"] == {(("symbol", "B"),): 5000.0}
    assert found["quantum_govern_symbol_daily_quantity_limit"] == {(("symbol", "A"),): 0.02}
    assert "quantum_govern_daily_notional_limit_usd" not in found
    assert "quantum_govern_errors_limit" not in found
    assert "quantum_govern_exec_limit_hour" not in found
    assert value(metrics(QUIET._replace(total_limit=0.0)), "daily_notional_limit_usd") == 0.0


@pytest.mark.parametrize("state", ["ARMED", "THROTTLED", "DISARMED"])
def test_the_state_is_1_where_it_is_and_0_elsewhere(state: str) -> None:
    states = scrape(metrics(QUIET._replace(state=state)))["quantum_govern_state"]
    assert {dict(labels)["state"]: is_there for labels, is_there in states.items()} == {
        name: float(name == state) for name in ("ARMED", "THROTTLED", "DISARMED")
    }


@pytest.mark.parametrize("reason", [None, *DISARM_REASONS, "other"])
def test_what_disarmed_is_told_as_long_as_it_lasts(reason: str | None) -> None:
    told = scrape(metrics(QUIET._replace(disarmed=reason)))["quantum_govern_disarmed"]
    assert {dict(labels)["reason"]: value for labels, value in told.items()} == {
        name: float(name == reason) for name in (*DISARM_REASONS, "other")
    }


@pytest.mark.parametrize(
    ("field", "given", "name", "told"),
    [
        ("epoch", 7, "epoch", 7.0),
        ("outstanding", 2, "permits_outstanding", 2.0),
        ("disarm_pending", True, "disarm_pending", 1.0),
        ("total_notional", 950.5, "daily_notional_usd", 950.5),
        ("total_limit", 9000.0, "daily_notional_limit_usd", 9000.0),
        ("truncated", 3, "symbols_truncated", 3.0),
        ("plan_lag", 0.25, "plan_lag_seconds", 0.25),
        ("events", 42, "events", 42.0),
        ("conflicts", 5, "commit_conflicts_total", 5.0),
        ("errors", 4, "errors_in_window", 4.0),
        ("exchange_weight", 12, "exchange_weight_used", 12.0),
        ("exchange_weight_limit", 1200, "exchange_weight_limit", 1200.0),
        ("store_up", False, "store_up", 0.0),
        ("loop_at", 12.5, "last_evaluation_timestamp_seconds", 12.5),
        ("inflight", 9, "plans_waiting", 9.0),
        ("active", False, "active", 0.0),
        ("quarantined", True, "quarantined", 1.0),
        ("hold_seconds", 12.5, "hold_seconds", 12.5),
        ("journal_up", False, "journal_up", 0.0),
        ("apply_dry_run", True, "apply_dry_run", 1.0),
        ("ready", False, "ready", 0.0),
        ("errors_limit", 5, "errors_limit", 5.0),
    ],
)
def test_every_value_of_the_snapshot_has_its_gauge(field: str, given: object, name: str, told: float) -> None:
    changed: dict[str, Any] = {field: given}
    assert value(metrics(QUIET._replace(**changed)), name) == told


def test_a_loop_that_does_not_answer_leaves_the_counters_and_no_stale_gauge() -> None:
    answers: Iterable[Snapshot | None] = iter([QUIET, None])
    made = Metrics(lambda: next(iter(answers)), max_symbols=200, version="1")
    observe(made, decision())
    assert value(made, "epoch") == 1.0
    found = scrape(made)
    assert "quantum_govern_epoch" not in found
    assert found["quantum_govern_allow_total"] == {(("symbol", "BTCUSDT"),): 1.0}


def test_two_daemons_in_one_process_have_metrics_of_their_own() -> None:
    first, second = metrics(), metrics()
    observe(first, decision())
    assert (value(first, "allow_total", symbol="BTCUSDT"), value(second, "allow_total", symbol="BTCUSDT")) == (
        1.0,
        None,
    )
