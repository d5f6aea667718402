"""A terminal's whole screen for a live view, given back as it was.

Only lines that changed are written, in one piece, so nothing flickers and a slow line has little to carry.
"""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from collections.abc import Sequence
from itertools import zip_longest
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.text import Text

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"
"""The alternate screen, no cursor, cleared."""
_LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"
_FALLBACK = (80, 24)
"""A terminal that does not know its size."""


class Screen:
    """The screen of a terminal, and its keys.

    Args:
        out: the terminal.
        keys: descriptor to read keys from; None where there is none.
        color: False for no colours, whatever the terminal can.
    """

    def __init__(self, out: TextIO, keys: int | None, *, color: bool) -> None:
        self.keys = keys
        self._out = out
        self._before: list[Any] | None = None
        self._shown: list[str] = []
        self._console = Console(file=out, force_terminal=True, no_color=not color, highlight=False, width=80, height=24)

    @property
    def plain(self) -> bool:
        """Whether it can show no more than ASCII."""
        return self._console.options.ascii_only

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows, now."""
        with contextlib.suppress(OSError):
            width, height = os.get_terminal_size(self._out.fileno())
            return width or _FALLBACK[0], height or _FALLBACK[1]
        return _FALLBACK

    def __enter__(self) -> Self:
        if self.keys is not None:
            self._before = termios.tcgetattr(self.keys)
            tty.setcbreak(self.keys)
        self._shown = []
        self._write(_ENTER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # it may be gone
            self._write(_LEAVE)
        if self.keys is not None and self._before is not None:
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(self.keys, termios.TCSADRAIN, self._before)

    def resized(self) -> None:
        """Everything is drawn anew with the next picture."""
        self._shown = []
        self._write("\x1b[0m\x1b[2J")

    def show(self, lines: Sequence[Text], width: int) -> None:
        """Put a picture there; each line at most `width` columns."""
        self._console.width = width
        drawn = [self._drawn(line, width) for line in lines]
        changed = [
            f"\x1b[{row};1H\x1b[0m{new or ''}\x1b[0m" + ("" if new and lines[row - 1].cell_len >= width else "\x1b[K")
            for row, (new, old) in enumerate(zip_longest(drawn, self._shown), 1)
            if new != old
        ]
        self._shown = drawn
        if changed:
            self._write("".join(changed))

    def _drawn(self, line: Text, width: int) -> str:
        with self._console.capture() as captured:
            self._console.print(line, end="", no_wrap=True, overflow="crop", crop=True, width=width)
        return captured.get()

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
