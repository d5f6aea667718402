"""What the command line says without a server."""

from __future__ import annotations

import io
import json

import pytest
from click.testing import CliRunner

from governor.cli import main
from governor.console import LONG, duration, moment, progress

COMMANDS = (
    "run", "demo", "status", "events", "explain", "replay", "rebuild", "archive", "checkpoint", "settings", "disarm",
    "rearm", "doctor", "check", "completion", "alerts",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_begins_with_a_sentence(command: str) -> None:
    told = CliRunner().invoke(main, [command, "--help"])
    assert told.exit_code == 0
    assert "Usage: main " + command in told.output.replace("governor ", "main ")
    assert "\b" not in told.output


def test_the_examples_in_the_help_are_lines_of_their_own() -> None:
    lines = CliRunner().invoke(main, ["--help"]).output.splitlines()
    assert any(line.strip().startswith("governor status ") for line in lines)
    assert not any("governor run" in line and "governor status" in line for line in lines)


def test_no_color_takes_the_colour_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOV_MAX_EXEC", "1")
    plain = CliRunner().invoke(main, ["settings"], color=True, env={"NO_COLOR": "1"}).output
    assert "\x1b[" not in plain


def test_settings_mask_secrets_and_warn_on_stderr() -> None:
    environ = {"BINANCE_TESTNET_API_KEY": "kkk", "GOV_MAX_EXEC_PER_HOURS": "1"}
    told = CliRunner().invoke(main, ["settings"], env=environ)
    assert "BINANCE_TESTNET_API_KEY=(set)" in told.stdout
    assert "kkk" not in told.output
    assert "did you mean GOV_MAX_EXEC_PER_HOUR?" in told.stderr
    assert "only one of" in told.stderr
    assert json.loads(CliRunner().invoke(main, ["settings", "--json"], env=environ).stdout)["warnings"]


@pytest.mark.parametrize(
    ("text", "micros"),
    [
        ("1700000000", 1_700_000_000_000_000),
        ("1700000000.5", 1_700_000_000_500_000),
        ("2023-11-14T22:13:20", 1_700_000_000_000_000),
        ("2023-11-14T23:13:20+01:00", 1_700_000_000_000_000),
        ("-2h", 1_700_000_000_000_000 - 7_200_000_000),
        ("-30s", 1_700_000_000_000_000 - 30_000_000),
    ],
)
def test_a_moment_is_iso_or_unix_or_so_long_ago(text: str, micros: int) -> None:
    assert moment(text, 1_700_000_000_000_000, option="--at") == micros


@pytest.mark.parametrize(("text", "micros"), [("90s", 90_000_000), ("1.5m", 90_000_000), ("2h", 7_200_000_000)])
def test_a_span_has_a_unit(text: str, micros: int) -> None:
    assert duration(text, option="--rearm-after") == micros


@pytest.mark.parametrize(
    "words",
    [
        ["replay", "--at", "soon"],
        ["replay", "--at", "1e400"],
        ["replay", "--expect-head", "12"],
        ["replay", "--from", "/nowhere"],
        ["replay", "--plot", "a.svg"],
        ["replay", "--rearm-after", "5m"],
        ["replay", "--what-if", "GOV_MAX_EXEC_PER_HOUR=5", "--anchor"],
        ["replay", "--what-if", "GOV_MAX_EXEC_PER_HOUR"],
        ["replay", "--what-if", "GOV_MAX_EXEC_PER_HOURS=5"],
        ["replay", "--what-if", "GOV_MAX_EXEC_PER_HOUR=many"],
        ["replay", "--what-if", "GOV_MAX_EXEC_PER_HOUR=5", "--rearm-after", "soon"],
        ["events", "--export", "a.jsonl", "--follow"],
        ["events", "--export", "a.jsonl", "--plan", "p1"],
        ["archive"],
        ["archive", "--before", "soon"],
        ["explain"],
        ["nope"],
    ],
)
def test_a_word_nobody_understands_is_a_usage_error(words: list[str]) -> None:
    assert CliRunner().invoke(main, words, env={"REDIS_PORT": "1"}).exit_code == 2


@pytest.mark.parametrize(
    ("total", "terminal", "shown"), [(LONG, True, True), (LONG - 1, True, False), (LONG, False, False)]
)
def test_how_far_it_is_shows_on_a_terminal_for_long_histories(
    monkeypatch: pytest.MonkeyPatch, *, total: int, terminal: bool, shown: bool
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", screen)
    with progress(total, label="replaying") as told:
        told(total // 2)
        told(total - total // 2)
    assert (f"{total}/{total}" in screen.getvalue()) is shown
