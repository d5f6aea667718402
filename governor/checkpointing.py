"""When a checkpoint is due, and the process that writes it.

Folding and packing a day's plans takes longer than a permit may wait, so a process of its own does it: it starts from
the last checkpoint, folds what came since, writes the next one and ends.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable

from governor.logs import Logger

log = Logger("governor.checkpoint")

LOOK_S = 1.0
LONGEST_S = 600.0
"""A writer that takes longer is stuck."""
NICE = 10
COMMAND = (sys.executable, "-m", "governor", "checkpoint", "--json")


def due(*, seq: int, written: int, since_s: float, events: int | None, seconds: float | None) -> bool:
    """Whether a checkpoint is due.

    Args:
        seq: the last event.
        written: the event of the last checkpoint, 0 without one.
        since_s: seconds since it was written or tried.
        events: how many events are enough; None: no number is.
        seconds: how long is enough where anything happened; None: no time is.
    """
    behind = seq - written
    return behind > 0 and ((events is not None and behind >= events) or (seconds is not None and since_s >= seconds))


class Checkpointer:
    """Has checkpoints written while the daemon runs.

    Args:
        seq: tells the last event.
        written: the event of the checkpoint the daemon started from.
        events: as for `due`.
        seconds: as for `due`.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        seq: Callable[[], int],
        *,
        written: int,
        events: int | None,
        seconds: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._seq = seq
        self._written = written
        self._events, self._seconds = events, seconds
        self._clock = clock
        self._since = clock()

    async def run(self) -> None:
        """For ever."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Have one written if it is due. A failure is told, and tried again when the next one is due."""
        seq = self._seq()
        since_s = self._clock() - self._since
        if not due(seq=seq, written=self._written, since_s=since_s, events=self._events, seconds=self._seconds):
            return
        try:
            await _write()
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("no checkpoint was written; the next start takes longer", error=str(error))
        self._written, self._since = seq, self._clock()


async def _write() -> None:
    """Raises OSError or SubprocessError where it fails."""
    # subprocess in a thread, not asyncio's: it starts by vfork, which costs a large process nothing.
    process = await asyncio.to_thread(subprocess.Popen, COMMAND, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(LONGEST_S):
            while (code := process.poll()) is None:
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise subprocess.TimeoutExpired(COMMAND, LONGEST_S) from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if code:
        raise subprocess.CalledProcessError(code, COMMAND)


def give_way() -> None:
    """Let every permit go first: this process has time."""
    os.nice(NICE)
