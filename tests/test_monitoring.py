"""Alert rules and dashboard against what a real daemon serves. Prometheus' own tool evaluates both."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from governor.settings import TABLE
from tests.conftest import build, missing
from tests.daemon import daemon, events_of, publish, wait_for
from tests.test_end_to_end import CREDENTIALS, Exchange

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS, GRAFANA = ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "governor.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
NAME = re.compile(r"quantum_govern_[a-z0-9_]+").findall
FROM_THE_FIRST_PLAN = re.compile(r"quantum_govern_(allow_total|block_total|exec_|symbol_)").match
TARGET = {"job": "quantum-governor", "instance": "127.0.0.1:8044", "account": "quantum"}


class Scrapes(NamedTuple):
    """What one daemon served."""

    fresh: str
    trading: str
    disarmed: str


@pytest.fixture(scope="module")
def scrapes(tmp_path_factory: pytest.TempPathFactory) -> Scrapes:
    """Scrape a daemon before its first plan, after the first permit and block, and disarmed by a burst."""
    limits = {"GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD": "9000"}
    with build("valkey") as server, server.client() as client, Exchange() as exchange:
        exchange.set("BTCUSDT", "0.020", "95000")
        exchange.set("ETHUSDT", "0.5", "2000")
        home = tmp_path_factory.mktemp("daemon")
        with daemon(home, port=server.port, base_url=exchange.base_url, environ=CREDENTIALS | limits) as one:
            fresh = one.http("/metrics")
            publish(client, "btc-1", "BTCUSDT")
            publish(client, "btc-2", "BTCUSDT", "NO_SUCH_ACTION")
            wait_for(lambda: len(events_of(client, "DECISION")) == 2)
            trading = one.http("/metrics")
            for n in range(3):
                publish(client, f"eth-{n}", "ETHUSDT")
            wait_for(lambda: events_of(client, "AUTO_DISARM"))
            wait_for(lambda: "\nquantum_govern_disarm_pending 0.0\n" in one.http("/metrics"))
            return Scrapes(fresh, trading, one.http("/metrics"))


def samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def names(text: str) -> set[str]:
    return {name for name, _, _ in samples(text)}


def promtool(*words: str, given: str | None = None) -> str:
    """Run it; what it printed. It has to be satisfied."""
    program = shutil.which("promtool")
    if program is None:
        missing("promtool is not on PATH: it comes with Prometheus")
    done = subprocess.run([program, *words], input=given, capture_output=True, text=True, check=False, cwd=PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def series(text: str) -> list[dict[str, str]]:
    """The samples of a scrape as promtool's input, unchanged for twenty minutes."""
    found = [*samples(text), ("up", {}, 1.0)]
    return [{"series": selector(name, labels | TARGET), "values": f"{value:f}x240"} for name, labels, value in found]


def selector(name: str, labels: dict[str, str]) -> str:
    return f"{name}{{{', '.join(f'{key}={json.dumps(value)}' for key, value in labels.items())}}}"


def evaluate(where: Path, text: str, expected: Iterable[tuple[str, list[dict[str, Any]]]]) -> None:
    """Hold expressions to what they have to give ten minutes after a scrape went on unchanged."""
    checks = [{"expr": expr, "eval_time": "10m", "exp_samples": given} for expr, given in expected]
    test = {"interval": "5s", "input_series": series(text), "promql_expr_test": checks}
    file = where / "tests.json"  # JSON is YAML
    file.write_text(
        json.dumps({"rule_files": [str(PROMETHEUS / "rules.yml")], "evaluation_interval": "10s", "tests": [test]})
    )
    promtool("test", "rules", str(file))


def firing(alertname: str, severity: str, **labels: str) -> dict[str, Any]:
    told = {"alertname": alertname, "alertstate": "firing", "severity": severity, "account": "quantum"} | labels
    return {"labels": selector("ALERTS", told), "value": 1}


def alerts() -> dict[str, str]:
    """The text of every alert by its name."""
    _, *found = re.split(r"- alert: (\w+)\n", (PROMETHEUS / "rules.yml").read_text())
    return dict(zip(found[::2], found[1::2], strict=True))


def anchors(markdown: str) -> set[str]:
    """What a heading's link is called."""
    heads = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


# ---------------------------------------------------------------- rules


def test_the_rules_are_what_prometheus_takes() -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml")


def test_the_example_configuration_is_what_prometheus_takes_and_reads_the_rules() -> None:
    assert "1 rule files found" in promtool("check", "config", "prometheus.yml")


def test_the_example_configuration_scrapes_where_a_governor_serves_under_the_name_the_rules_know() -> None:
    text = (PROMETHEUS / "prometheus.yml").read_text()
    defaults = {row.name: row.default for row in TABLE}
    assert f'targets: ["{defaults["METRICS_HOST"]}:{defaults["METRICS_PORT"]}"]' in text
    (job,) = re.findall(r"job_name: (\S+)", text)
    assert set(re.findall(r'job="([^"]+)"', (PROMETHEUS / "rules.yml").read_text())) == {job}


def test_every_alert_fires_in_its_case_and_not_in_the_healthy_one() -> None:
    assert "SUCCESS" in promtool("test", "rules", "tests.yml")
    fires = set(re.findall(r'alertname="(\w+)"', (PROMETHEUS / "tests.yml").read_text()))
    assert fires == set(alerts())


@pytest.mark.parametrize("name", sorted(alerts()))
def test_an_alert_says_how_bad_it_is_what_it_is_and_where_to_read_what_to_do(name: str) -> None:
    text = alerts()[name]
    assert re.search(r"severity: (critical|warning)\n", text)
    assert re.search(r'summary: ".{20,}"\n', text)
    (description,) = re.findall(r"description: >-\n((?: {12}.+\n)+)", text)
    assert len(description) > 100
    assert "{{ $labels.account }}" in description or name == "GovernorNotScraped"  # it has no target to name
    (anchor,) = re.findall(
        r'runbook_url: "\{\{ \$externalLabels\.runbook_base \}\}docs/troubleshooting\.md#([a-z-]+)"\n', text
    )
    assert anchor in anchors((ROOT / "docs" / "troubleshooting.md").read_text())


def test_the_documentation_lists_every_alert() -> None:
    assert set(re.findall(r"^\| `(Governor\w+)`", (ROOT / "docs" / "monitoring.md").read_text(), re.MULTILINE)) == set(
        alerts()
    )


# ---------------------------------------------------------------- what the daemon really serves


def test_a_live_scrape_holds_what_promtool_asks_of_it(scrapes: Scrapes) -> None:
    for text in scrapes:
        assert promtool("check", "metrics", given=text) == ""


def test_every_metric_of_the_rules_is_there_from_the_start(scrapes: Scrapes) -> None:
    used = set(NAME("".join(alerts().values()) + (PROMETHEUS / "rules.yml").read_text()))
    assert {name for name in used if not FROM_THE_FIRST_PLAN(name)} - names(scrapes.fresh) == set()


@pytest.mark.parametrize("file", ["rules.yml", "tests.yml"])
def test_every_metric_of_the_rules_and_of_their_tests_is_one_the_daemon_has(file: str, scrapes: Scrapes) -> None:
    assert set(NAME((PROMETHEUS / file).read_text())) - names(scrapes.disarmed) == set()


def test_no_series_of_a_counter_that_alerts_appears_only_with_its_first_increment(scrapes: Scrapes) -> None:
    def known(text: str) -> set[tuple[str, str]]:
        counted = ("disarm", "disarm_failed", "error", "unpermitted_execution", "exchange_error")
        return {
            (name, str(labels))
            for name, labels, _ in samples(text)
            if name in {f"quantum_govern_{of}_total" for of in counted}
        }

    assert known(scrapes.fresh) == known(scrapes.disarmed)


def test_a_real_daemon_that_trades_raises_no_alert(scrapes: Scrapes, tmp_path: Path) -> None:
    evaluate(tmp_path, scrapes.trading, [('ALERTS{alertstate="firing"}', [])])


def test_a_real_daemon_that_was_disarmed_raises_the_alert_with_its_reason(scrapes: Scrapes, tmp_path: Path) -> None:
    expected = [
        firing("GovernorDisarmed", "critical", reason="burst_limit_breach"),
        firing("GovernorLimitNear", "warning", limit="exec_5min", symbol="ETHUSDT"),
    ]
    evaluate(tmp_path, scrapes.disarmed, [('ALERTS{alertstate="firing"}', expected)])


# ---------------------------------------------------------------- dashboard


def expressions() -> list[str]:
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    asked = [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"] if "expr" in annotation]
    variables = [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    series_of = [query.removeprefix("label_values(").rpartition(",")[0] for query in variables]
    return [_filled_in(query) for query in (*queries, *asked, *series_of)]


def _filled_in(query: str) -> str:
    return query.replace("$__rate_interval", "1m").replace("$account", ".*").replace("$symbol", ".*")


def test_the_dashboard_has_an_address_of_its_own_and_takes_any_data_source() -> None:
    assert DASHBOARD["uid"] == "quantum-governor"
    assert DASHBOARD["id"] is None
    assert "__inputs" not in DASHBOARD
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "account", "symbol"]
    assert variables["datasource"]["query"] == "prometheus"
    sources = {str(found) for found in _all_of("datasource", DASHBOARD)}
    assert sources == {
        "{'type': 'prometheus', 'uid': '${datasource}'}",
        "{'type': 'grafana', 'uid': '-- Grafana --'}",  # Grafana's own annotations
    }


def _all_of(key: str, value: object) -> Iterable[object]:
    match value:
        case dict():
            if key in value:
                yield value[key]
            for inner in value.values():
                yield from _all_of(key, inner)
        case list():
            for inner in value:
                yield from _all_of(key, inner)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel['id']}-{panel['title']}")
def test_a_panel_has_a_unit_an_explanation_and_a_query_of_the_chosen_account(panel: dict[str, Any]) -> None:
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["description"].endswith(".")
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["expr"].count("quantum_govern_") == target["expr"].count('{account=~"$account"')


def test_panels_lie_beside_each_other() -> None:
    taken: dict[tuple[int, int], int] = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert taken.setdefault(cell, panel["id"]) == panel["id"], panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_dashboard_marks_the_time_it_was_disarmed() -> None:
    marks = {one["name"]: one.get("expr", "") for one in DASHBOARD["annotations"]["list"]}
    assert "quantum_govern_disarmed" in marks["Disarmed"]


def test_every_query_of_the_dashboard_finds_something_in_a_live_scrape(scrapes: Scrapes, tmp_path: Path) -> None:
    queries = [query for query in expressions() if "changes(" not in query]  # nothing was started anew
    assert len(queries) > 40
    found: list[tuple[str, list[dict[str, Any]]]] = [
        (f"count({query}) > bool 0", [{"labels": "{}", "value": 1}]) for query in queries
    ]
    evaluate(tmp_path, scrapes.disarmed, found)


def test_the_dashboard_asks_only_for_metrics_the_daemon_has_and_shows_every_one(scrapes: Scrapes) -> None:
    asked = set(NAME(" ".join(expressions())))
    told = names(scrapes.disarmed)
    assert asked - told == set()
    shown = {re.sub("_(bucket|count|sum)$", "", name) if "_seconds_" in name else name for name in told}
    assert shown - {name.removesuffix("_bucket") for name in asked} == set()


def test_grafana_finds_the_dashboard_where_a_release_has_it() -> None:
    (path,) = re.findall(r"path: (\S+)", (GRAFANA / "provisioning" / "dashboards" / "governor.yaml").read_text())
    assert (ROOT / path.removeprefix("/opt/quantum/governor/current/") / "governor.json").exists()


# ---------------------------------------------------------------- documentation


def test_the_documentation_lists_every_metric_the_daemon_serves(scrapes: Scrapes) -> None:
    table = (ROOT / "docs" / "monitoring.md").read_text().partition("## Metrics")[2]
    rows = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    listed = {f"quantum_govern_{name}" for row in rows for name in re.findall(r"`(\w+)`", row)}
    served = {
        re.sub("_(bucket|count|sum)$", "", name) if "_seconds_" in name else name for name in names(scrapes.disarmed)
    }
    assert listed == served
