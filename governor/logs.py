"""Structured logs: for people on a terminal, JSON otherwise, to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

import msgspec

_wanted: dict[str, str] | None = None
"""What was configured before there was anything to log."""
_configured = 0
"""How often logging was set up."""


class Logger:
    """A structlog logger. structlog is imported with the first line: a command that has nothing to tell starts sooner.

    Args:
        name: of the part that logs.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger: Any = None
        self._made = -1

    def __getattr__(self, level: str) -> Any:
        if self._made != _configured or not _configured:
            import structlog  # noqa: PLC0415

            _configure_now()
            # Bound once: bound with every line, it takes as long as half the line.
            self._logger, self._made = structlog.get_logger(self._name).bind(), _configured
        return getattr(self._logger, level)


class _Held(threading.local):
    lines: list[str] | None = None
    """What is to be written together; other threads write as ever."""


_held = _Held()


class _Unbreakable:
    """A stream whose reader may go away: a log line is lost then, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if _held.lines is not None:
            _held.lines.append(text)
            return len(text)
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is logged in it is written at its end, in one go. Nothing may be waited for in it."""
    lines: list[str] = []
    _held.lines = lines
    try:
        yield
    finally:
        _held.lines = None
        if lines:
            _Unbreakable(sys.stderr).write("".join(lines))


_ENCODER = msgspec.json.Encoder(enc_hook=str)


def _json(content: dict[str, Any], **_: Any) -> str:
    """As `json.dumps`, in a third of the time."""
    try:
        encoded = msgspec.json.format(_ENCODER.encode(content), indent=0)
        if encoded.isascii():
            return encoded.decode()
    except (UnicodeError, OverflowError, TypeError, ValueError):
        pass
    return json.dumps(content, default=str)


def configure(*, log_format: str, level: str) -> None:
    """Set logging up for the process.

    Args:
        log_format: `json`, `console`, or empty: console on a terminal.
        level: `DEBUG`, `INFO`, `WARNING` or `ERROR`.
    """
    global _wanted, _configured  # noqa: PLW0603 - one process, one log
    _wanted = {"log_format": log_format, "level": level}
    _configured += 1
    if "structlog" in sys.modules:
        _configure_now()
    logging.getLogger("transitions").setLevel(logging.WARNING)


def _configure_now() -> None:
    global _wanted  # noqa: PLW0603
    if _wanted is not None:
        _configure(**_wanted)
        _wanted = None


def _configure(*, log_format: str, level: str) -> None:
    import structlog  # noqa: PLC0415

    console = log_format == "console" or (not log_format and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ and sys.stderr.isatty())
        if console
        else structlog.processors.JSONRenderer(serializer=_json)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(_Unbreakable(sys.stderr)),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
