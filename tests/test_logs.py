import datetime as dt
import io
import json
import logging
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import structlog

from governor import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level = logging.getLogger("transitions").level
    yield
    structlog.reset_defaults()
    logging.getLogger("transitions").setLevel(level)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A terminal as standard error; what was written to it is told at the end."""
    outside, inside = pty.openpty()
    written: list[str] = []
    with os.fdopen(inside, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield written
        stream.flush()
        written.append(os.read(outside, 65536).decode())
    os.close(outside)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    out, err = capsys.readouterr()
    assert out == ""
    return [json.loads(line) for line in err.splitlines()]


@pytest.mark.parametrize("log_format", ["json", ""])
def test_where_nobody_watches_every_line_is_json_on_standard_error(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(log_format=log_format, level="INFO")
    log = structlog.get_logger("governor")
    log.info("ready", port=8044, amount=Decimal("0.015"), path=Path("/x"), text="ü\n\x00", nothing=None)
    log.warning("throttled", symbol="BTCUSDT")
    first, second = lines(capsys)
    assert dt.datetime.fromisoformat(first.pop("timestamp")).tzinfo == dt.UTC
    assert first == {
        "event": "ready",
        "level": "info",
        "port": 8044,
        "amount": "0.015",
        "path": "/x",
        "text": "ü\n\x00",
        "nothing": None,
    }
    assert (second["event"], second["level"], second["symbol"]) == ("throttled", "warning", "BTCUSDT")


def test_an_exception_is_one_line_of_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(log_format="json", level="INFO")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        structlog.get_logger().exception("evaluation failed")
    (line,) = lines(capsys)
    assert line["level"] == "error"
    assert "ValueError: two\nlines" in line["exception"]


@pytest.mark.parametrize(
    ("level", "seen"),
    [
        ("DEBUG", ["debug", "info", "warning", "error"]),
        ("INFO", ["info", "warning", "error"]),
        ("WARNING", ["warning", "error"]),
        ("ERROR", ["error"]),
    ],
)
def test_what_is_below_the_level_is_not_written(
    level: str, seen: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(log_format="json", level=level)
    log = structlog.get_logger()
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)("x")
    assert [line["level"] for line in lines(capsys)] == seen


def test_configuring_again_takes_effect_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = structlog.get_logger("governor")
    logs.configure(log_format="json", level="ERROR")
    log.info("not seen")
    logs.configure(log_format="json", level="INFO")
    log.info("seen")
    assert [line["event"] for line in lines(capsys)] == ["seen"]


def test_on_a_terminal_lines_are_for_people_and_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal(monkeypatch) as written:
        logs.configure(log_format="", level="INFO")
        structlog.get_logger().info("ready", port=8044)
    assert "ready" in written[0]
    assert "\x1b[" in written[0]
    assert "{" not in written[0]


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal(monkeypatch) as written:
        logs.configure(log_format="", level="INFO")
        structlog.get_logger().warning("throttled", symbol="BTCUSDT")
    assert "symbol=BTCUSDT" in written[0]
    assert "\x1b[" not in written[0]


def test_json_may_be_asked_for_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        logs.configure(log_format="json", level="INFO")
        structlog.get_logger().info("ready")
    assert json.loads(written[0])["event"] == "ready"


def test_console_may_be_asked_for_without_a_terminal_and_has_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(log_format="console", level="INFO")
    structlog.get_logger().info("ready", port=8044)
    _, err = capsys.readouterr()
    assert "port=8044" in err
    assert "\x1b[" not in err


def test_an_exception_on_a_terminal_shows_no_values_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        logs.configure(log_format="", level="INFO")
        _fail("hunter" + "2")
    assert "RuntimeError" in written[0]
    assert "hunter2" not in written[0]


def _fail(api_secret: str) -> None:
    try:
        raise RuntimeError(f"{len(api_secret)} characters")
    except RuntimeError:
        structlog.get_logger().exception("failed")


def test_the_library_that_writes_every_transition_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logs.configure(log_format="json", level="DEBUG")
    logging.getLogger("transitions").info("Executed callback")
    logging.getLogger("transitions").warning("told")
    assert caplog.messages == ["told"]


def test_a_command_that_has_nothing_to_tell_does_not_wait_for_the_library() -> None:
    code = """
import sys
import governor.connection, governor.ledger, governor.status
from governor.logs import Logger, configure
configure(log_format="json", level="INFO")
assert "structlog" not in sys.modules
Logger("test").info("told", number=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr) | {"timestamp": ""} == {
        "event": "told", "number": 1, "level": "info", "timestamp": "",
    }  # fmt: skip


def test_what_is_logged_together_is_written_in_one_go_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Stream())
    logs.configure(log_format="json", level="INFO")
    log = structlog.get_logger()
    with logs.together():
        log.info("a")
        log.info("b")
    log.info("c")
    assert [[json.loads(line)["event"] for line in text.splitlines()] for text in written] == [["a", "b"], ["c"]]


def test_what_another_thread_logs_meanwhile_is_written_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(log_format="json", level="INFO")
    log = structlog.get_logger()
    with logs.together():
        log.info("held")
        thread = threading.Thread(target=log.info, args=["another's"])
        thread.start()
        thread.join()
        assert json.loads(capsys.readouterr().err)["event"] == "another's"
    assert json.loads(capsys.readouterr().err)["event"] == "held"


@pytest.mark.parametrize("value", ["plain", "ü", "\ud800", "\u2028", None, True, 7, 1 << 70, 0.25, ["a", 1], {"b": {}}])
def test_a_line_reads_as_json_dumps_writes_it(value: object, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(log_format="json", level="INFO")
    structlog.get_logger().info("x", value=value)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == json.dumps(json.loads(line))
    assert json.loads(line)["value"] == value


def test_a_logger_that_was_used_heeds_what_is_configured_later(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(log_format="json", level="INFO")
    log = logs.Logger("governor")
    log.info("before")
    logs.configure(log_format="json", level="WARNING")
    log.info("not any more")
    log.warning("after")
    assert [line["event"] for line in lines(capsys)] == ["before", "after"]
