"""Rolling windows over executions, by the events' own time.

A window holds what is strictly younger than it: an execution exactly one hour old is no longer in the last hour.
"""

from __future__ import annotations

from bisect import bisect_right

HOUR_US = 3_600_000_000
FIVE_MINUTES_US = 300_000_000
KEPT_US = 86_400_000_000
"""The list of executions outside readers see goes back one day."""
KEPT = 100
"""And holds this many, unless more of them are younger than the longest window."""


def count(times: tuple[int, ...], *, now: int, window: int) -> int:
    """How many of `times` (ascending, microseconds) are strictly younger than `window` at `now`."""
    return len(times) - bisect_right(times, now - window)


def add(times: tuple[int, ...], time: int) -> tuple[int, ...]:
    """With one more, the newest, and without what no window and no reader needs any more."""
    longer = (*times, time)
    return longer if len(longer) <= KEPT and longer[0] > time - KEPT_US else live(longer, now=time)


def live(times: tuple[int, ...], *, now: int) -> tuple[int, ...]:
    """Without what no window and no reader needs at `now`."""
    start = bisect_right(times, now - KEPT_US)
    if len(times) - start > KEPT:
        start = min(bisect_right(times, now - HOUR_US), len(times) - KEPT)
    return times[start:]


def remove(times: tuple[int, ...], time: int) -> tuple[int, ...]:
    """Without one occurrence of `time`, if it is still there."""
    if time not in times:
        return times
    at = times.index(time)
    return times[:at] + times[at + 1 :]


def next_free(times: tuple[int, ...], *, now: int, window: int, limit: int) -> int | None:
    """When the window next has room: `now` or later; None if it never will (a limit of zero)."""
    if limit <= 0:
        return None
    used = count(times, now=now, window=window)
    return now if used < limit else times[-limit] + window
