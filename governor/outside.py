"""What is true outside the events: the mode in the Apply Layer's file, and notes of disarms that are no event yet."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import NamedTuple

from governor.actuator import Hand, Pending, PendingNote
from governor.logs import Logger
from governor.lookout import Lookout

log = Logger("governor")

LOOK_S = 0.1


class Seen(NamedTuple):
    """One look."""

    apply_mode: str | None
    """Mode the file gives; None where it is not known."""
    notes: tuple[Pending, ...]


class Outside:
    """Looks at the file and the notes, and spares it where the kernel says that they are as they were.

    Args:
        lookout: of the file and every note; without one they are looked at each time.
    """

    def __init__(self, actuator: Hand, notes: Sequence[PendingNote], lookout: Lookout | None = None) -> None:
        self._actuator = actuator
        self.notes = notes
        self._lookout = lookout
        self._seen: Seen | None = None

    def now(self) -> Seen:
        """What is so at this moment."""
        if self._seen is None or self._lookout is None or not self._lookout.quiet():
            return self._look()
        return self._seen

    async def run(self) -> None:
        """Look ten times a second as well: what the kernel does not tell is seen then. For ever, with a lookout."""
        while self._lookout is not None:
            try:
                self._look()
            except Exception:
                log.exception("looking at the file and the notes failed in an unexpected way")
            await asyncio.sleep(LOOK_S)

    def close(self) -> None:
        """Have the kernel tell nothing more."""
        if self._lookout is not None:
            self._lookout.close()

    def _look(self) -> Seen:
        self._seen = None
        if self._lookout is not None and not self._lookout.quiet():
            self._lookout.watch()
        notes = (note.read_pending() for note in self.notes if os.path.lexists(note.path))
        self._seen = Seen(self._actuator.apply_mode(), tuple(note for note in notes if note is not None))
        return self._seen
