"""Times of the errors that count towards the automatic disarm."""

from __future__ import annotations

from projections.windows import KEPT_US, count

KEPT = 1000
"""More errors than this in a window need not be told apart: no threshold is higher."""

__all__ = ["KEPT", "add", "count", "live"]


def add(times: tuple[int, ...], time: int) -> tuple[int, ...]:
    """With one more, the newest."""
    return live((*times, time), now=time)


def live(times: tuple[int, ...], *, now: int) -> tuple[int, ...]:
    """The newest ones of the last day."""
    recent = count(times, now=now, window=KEPT_US)
    return times[len(times) - min(KEPT, recent) :]
