"""What `governor doctor` looks at. A check writes what it finds into `Findings`; `governor.doctor` runs them all."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import redis.asyncio

from events.types import Recorded
from governor.disarming import in_thread
from governor.ledger import Ledger
from governor.settings import Settings
from projections.state import State

Verdict: TypeAlias = Literal["ok", "warn", "fail", "skip"]
UNIT = "quantum-governor.service"
AS_ROOT = "Look again as root."
SHOW_S = 3.0
_WORST_FIRST: tuple[Verdict, ...] = ("fail", "warn", "skip", "ok")


class Check(msgspec.Struct, frozen=True):
    """What one check came to."""

    name: str
    verdict: Verdict
    seen: str
    """One line."""
    todo: str | None = None
    """What to do; None where there is nothing to do."""


class Findings:
    """What a check finds, bit by bit. The worst decides; what could not be looked at is worse than what is well."""

    def __init__(self) -> None:
        self._found: list[tuple[Verdict, str, str]] = []

    def ok(self, seen: str) -> None:
        """As it should be."""
        self._found.append(("ok", seen, ""))

    def warn(self, seen: str, todo: str) -> None:
        """It works, and somebody should look."""
        self._found.append(("warn", seen, todo))

    def fail(self, seen: str, todo: str) -> None:
        """It does not do what it is there for."""
        self._found.append(("fail", seen, todo))

    def skip(self, seen: str, todo: str = "") -> None:
        """It cannot be looked at from here."""
        self._found.append(("skip", seen, todo))

    def summed_up(self, name: str) -> Check:
        """All of it, the worst first."""
        found = sorted(self._found, key=lambda one: _WORST_FIRST.index(one[0]))
        if not found:
            return Check(name, "skip", "nothing to look at")
        todos = dict.fromkeys(todo for _, _, todo in found if todo)
        return Check(name, found[0][0], "; ".join(_line(seen) for _, seen, _ in found), " ".join(todos) or None)


class Look:
    """What the checks share.

    Args:
        settings: the settings on disk, as a daemon that starts now would have them.
        environ: where they came from.
        connection: to Redis; nobody says that it answers.
        ledger: over the event stream, not opened.
        clock: microseconds since the epoch.
        env_file: the file the settings came from, if one was named.
        full: whether the whole history is verified, and not only its end.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        environ: Mapping[str, str],
        connection: redis.asyncio.Redis,
        ledger: Ledger,
        clock: Callable[[], int],
        env_file: Path | None = None,
        full: bool = False,
    ) -> None:
        self.settings = settings
        self.environ = environ
        self.connection = connection
        self.ledger = ledger
        self.clock = clock
        self.env_file = env_file
        self.full = full
        self.away: str | None = None
        """Why Redis cannot be asked; None while it answers."""
        self.problem: str | None = None
        """Why the events cannot be folded; None when they were."""
        self.recent: list[Recorded] | None = None
        """The last events, as far as they can be read; None where nobody has read them."""

    @property
    def state(self) -> State | None:
        """The state at the last event; None where it is not known, or nothing ever happened."""
        state = self.ledger.state
        return state if state.seq and self.problem is None and self.away is None else None

    def events(self, found: Findings) -> list[Recorded]:
        """The last events; where they were not read, that is found."""
        if self.recent is None:
            found.skip("the last events could not be read")
        return self.recent or []

    @property
    def folded(self) -> State:
        """The same, for a check that is not run without it."""
        assert self.state is not None
        return self.state


async def shown(unit: str, *names: str) -> dict[str, str]:
    """`systemctl show`: a property each; empty where there is no systemd, or no answer. Of several lines the last."""
    program = shutil.which("systemctl")
    if program is None:
        return {}
    wanted = [word for name in names for word in ("-p", name)]
    answer = await in_thread(lambda: run([program, "show", unit, *wanted], within_s=SHOW_S))
    if answer is None or answer.returncode != 0:
        return {}
    pairs = [line.partition("=") for line in answer.stdout.splitlines()]
    return {name: value.strip() for name, _, value in pairs if name}


def run(command: list[str], *, within_s: float) -> subprocess.CompletedProcess[str] | None:
    """A program's answer; None where it gave none in time."""
    try:
        return subprocess.run(  # noqa: S603 - a list, no shell
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=within_s,
            check=False,
            env=os.environ | {"LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def some(things: list[Any], *, most: int = 3) -> str:
    """The first few, and how many more."""
    told = ", ".join(map(str, things[:most]))
    return told if len(things) <= most else f"{told} and {len(things) - most} more"


def _line(text: str) -> str:
    """Text from anywhere as one line without control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
