"""Brings alerts to their targets, each in a thread of its own: one that hangs or fails is in nobody's way.

What cannot be sent is tried again, later and later, until it is too old; what no longer fits drops the oldest. Both
are counted, and the next alert that arrives says how many are missing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from governor.alerts.messages import Tone
from governor.alerts.targets import Sending
from governor.logs import Logger

log = Logger("governor.alerts")

WAITING_MOST = 100
"""Alerts a target may have waiting."""
OLDEST_S = 6 * 3600.0
"""An alert older than this is not sent any more."""
BACK_OFF_S = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)
"""Waits after a failed attempt; the last one from then on."""
IN_TURN = 3
"""Attempts after which those that wait behind it have their turn: one that a service refuses holds up no other."""

Count = Callable[[Literal["sent", "failed", "dropped"]], None]


class Message(NamedTuple):
    """An alert laid out."""

    title: str
    body: str
    tone: Tone


class _Waiting:
    def __init__(self, message: Message, now: float) -> None:
        self.message = message
        self.made = now
        self.attempts = 0


class Target:
    """One target's queue and thread.

    Args:
        sending: its name, and how to send there.
        count: told how each attempt or alert ended, in the thread.
        back_off_s: waits between attempts.
        oldest_s: age from which on an alert is dropped.
        most: how many may wait, two at least.
    """

    def __init__(
        self,
        sending: Sending,
        count: Count,
        *,
        back_off_s: Sequence[float] = BACK_OFF_S,
        oldest_s: float = OLDEST_S,
        most: int = WAITING_MOST,
    ) -> None:
        self.name = sending.name
        self._send = sending.send
        self._count = count
        self._back_off_s = back_off_s
        self._oldest_s = oldest_s
        self._most = most
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._trying: _Waiting | None = None
        self._closing = False
        self._over = False
        """Whether nobody waits for the thread any more: it says nothing into a process that ends."""
        self._failures = 0
        self._missing = 0
        """Alerts dropped since one arrived."""
        self._thread = threading.Thread(target=self._run, name=f"alerts {self.name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Alerts that have not arrived yet."""
        return len(self._queue)

    def put(self, message: Message) -> None:
        """Take one. Never waits: the lock is held for no longer than a queue takes."""
        with self._changed:
            if len(self._queue) >= self._most:
                oldest = next(one for one in self._queue if one is not self._trying)
                self._queue.remove(oldest)
                self._drop(oldest, "too many wait")
            self._queue.append(_Waiting(message, time.monotonic()))
            self._changed.notify()

    def close(self) -> None:
        """Try what is left once, now, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, within_s: float) -> None:
        """Wait for that; what has not arrived by then is lost, and told in the log."""
        self._thread.join(max(0.0, within_s))
        with self._changed:
            self._over = True
        if self._queue:
            log.error("alerts were not sent before the end", target=self.name, alerts=len(self._queue))

    def _run(self) -> None:
        while (waiting := self._next()) is not None:
            self._attempt(waiting)

    def _next(self) -> _Waiting | None:
        """The next one to try, once it is time for it; None at the end."""
        with self._changed:
            until = time.monotonic() + self._pause_s()
            while not self._over:
                self._drop_old()
                left_s = until - time.monotonic()
                if self._queue and (self._closing or left_s <= 0):
                    self._trying = self._queue[0]
                    return self._trying
                if self._closing:
                    return None
                self._changed.wait(left_s if self._queue else None)
            return None

    def _drop_old(self) -> None:
        while self._queue and time.monotonic() - self._queue[0].made > self._oldest_s:
            self._drop(self._queue.popleft(), "too old")

    def _pause_s(self) -> float:
        if self._failures == 0:
            return 0.0
        return self._back_off_s[min(self._failures, len(self._back_off_s)) - 1]

    def _attempt(self, waiting: _Waiting) -> None:
        title, body, tone = waiting.message
        missing = self._missing
        if missing:
            body += f"{missing} alerts before this one did not arrive.\n"
        waiting.attempts += 1
        error = self._send(title, body, tone)
        with self._changed:
            self._trying = None
            if error is None:
                self._arrived(waiting, missing)
            elif not self._over:
                self._failed(waiting, error)

    def _arrived(self, waiting: _Waiting, missing: int) -> None:
        if self._failures and not self._over:
            log.info("alerts are sent again", target=self.name, failed_attempts=self._failures)
        self._failures = 0
        self._missing -= missing
        self._queue.remove(waiting)
        self._count("sent")

    def _failed(self, waiting: _Waiting, error: str) -> None:
        self._failures += 1
        self._count("failed")
        log.warning(
            "alert not sent", target=self.name, alert=waiting.message.title, attempt=waiting.attempts, error=error
        )
        if self._closing:
            self._queue.remove(waiting)
            self._drop(waiting, "the end")
        elif waiting.attempts % IN_TURN == 0:
            self._queue.remove(waiting)
            self._queue.append(waiting)

    def _drop(self, waiting: _Waiting, why: str) -> None:
        self._missing += 1
        self._count("dropped")
        log.error("alert dropped", target=self.name, alert=waiting.message.title, why=why)


class Delivery:
    """All targets.

    Args:
        sendings: the targets; their threads begin at once.
        count: told how each attempt or alert ended.
    """

    def __init__(self, sendings: Sequence[Sending], count: Count) -> None:
        self.targets = [Target(sending, count) for sending in sendings]

    @property
    def waiting(self) -> int:
        """Alerts that have not arrived yet, over all targets."""
        return sum(target.waiting for target in self.targets)

    def put(self, message: Message) -> None:
        """Have it sent to every target. Never waits."""
        for target in self.targets:
            target.put(message)

    def close(self, within_s: float) -> None:
        """Try what is left once more, for at most `within_s`."""
        until = time.monotonic() + within_s
        for target in self.targets:
            target.close()
        for target in self.targets:
            target.join(until - time.monotonic())
