"""A real program on a real pseudo-terminal, and what its screen shows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyte


class Terminal:
    """A pseudo-terminal with a program on it; the program is a session of its own, as under a shell."""

    def __init__(
        self, command: Sequence[str], *, environ: Mapping[str, str], columns: int = 80, rows: int = 24
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.written = bytearray()
        """Everything that came over the line."""
        self._main, self._other = pty.openpty()
        self._set_size(columns, rows)
        self.modes = termios.tcgetattr(self._other)
        """How the terminal was set before the program."""
        self.process = subprocess.Popen(
            command, stdin=self._other, stdout=self._other, stderr=self._other, env=dict(environ),
            preexec_fn=self._own_session,  # noqa: PLW1509 - a controlling terminal is only to be had there
        )  # fmt: skip

    def _own_session(self) -> None:
        os.setsid()
        fcntl.ioctl(self._other, termios.TIOCSCTTY, 0)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """As a window manager does it; the kernel tells the program."""
        self.screen.resize(rows, columns)
        self._set_size(columns, rows)

    def press(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def read(self, within_s: float = 0.05) -> None:
        """Take in what has been written."""
        while select.select([self._main], [], [], within_s)[0]:
            with contextlib.suppress(OSError):
                data = os.read(self._main, 65536)
                self.written += data
                self._stream.feed(data)
            within_s = 0.0

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def shows(self, *words: str, within_s: float = 10.0) -> str:
        """Wait until all of the words are on the screen; what it shows then."""
        until = time.monotonic() + within_s
        while not all(word in self.text for word in words):
            self.read()
            assert time.monotonic() < until, f"{words} not within {within_s} s on\n{self.text}"
        return self.text

    def ends(self, within_s: float = 10.0) -> int:
        """Wait for the program to end; its exit code."""
        until = time.monotonic() + within_s
        while (code := self.process.poll()) is None:
            self.read()
            assert time.monotonic() < until, f"it did not end within {within_s} s:\n{self.text}"
        self.read()
        return code

    def now_modes(self) -> list[Any]:
        """How the terminal is set now."""
        return termios.tcgetattr(self._other)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        for descriptor in (self._main, self._other):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextmanager
def terminal(
    command: Sequence[str], *, environ: Mapping[str, str], columns: int = 80, rows: int = 24
) -> Iterator[Terminal]:
    """Yield a terminal with a program on it, killed at the end if it is still there."""
    one = Terminal(command, environ={"TERM": "xterm-256color", "LANG": "C.UTF-8"} | dict(environ),
                   columns=columns, rows=rows)  # fmt: skip
    try:
        yield one
    finally:
        one.close()
