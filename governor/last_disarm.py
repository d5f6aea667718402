"""The last disarm and what became of it, which the state forgets with a re-arm."""

from __future__ import annotations

from typing import Any

import msgspec

from events.codec import decode
from events.store import EventStore
from events.types import AutoDisarm, Context, DisarmFailed, DisarmStarted, Entry, ManualDisarm, Rearmed, Recorded

NAMES = frozenset(kind.NAME for kind in (AutoDisarm, DisarmFailed, DisarmStarted, ManualDisarm, Rearmed))
PAGE = 1000
LOOKED_AT = 20_000
"""How many events back it is looked for."""


class LastDisarm(msgspec.Struct, frozen=True):
    """A disarm: when and why, whether it is proven, whether a person has re-armed since. Times are microseconds."""

    at: int
    reason: str
    context: Context
    epoch: int
    manual: bool
    operator: str | None
    proven_at: int | None = None
    """When file and service had been read back; None while the Apply Layer is not proven to be in dry run."""
    action_taken: str | None = None
    attempts: int = 0
    """That failed."""
    error: str | None = None
    """What the last failed one came to."""
    rearmed_at: int | None = None
    rearmed_by: str | None = None
    rearmed_why: str | None = None
    seq: int = 0
    """Event that began it."""
    proof: dict[str, Any] = {}
    """What was read back."""


def fold(last: LastDisarm | None, recorded: Recorded) -> LastDisarm | None:
    """What is known of the last disarm after one more event."""
    at, event = recorded.at, recorded.event
    if isinstance(event, DisarmStarted):
        return LastDisarm(at, event.reason, event.context, event.epoch, event.manual, event.operator, seq=recorded.seq)
    if last is None:
        return None
    match event:
        case AutoDisarm() | ManualDisarm() if event.epoch == last.epoch:
            done = {"proven_at": at, "action_taken": event.action_taken, "proof": event.proof}
            return msgspec.structs.replace(last, **done, error=None)
        case DisarmFailed() if event.epoch == last.epoch:
            return msgspec.structs.replace(last, attempts=event.attempt, error=event.error)
        case Rearmed() if last.rearmed_at is None:
            return msgspec.structs.replace(last, rearmed_at=at, rearmed_by=event.operator, rearmed_why=event.reason)
        case _:
            return last


async def find(store: EventStore, up_to: int) -> LastDisarm | None:
    """The last disarm among the events up to number `up_to`; None where the last LOOKED_AT have none.

    Raises:
        StoreError: they cannot be read.
    """
    found: list[Entry] = []
    end = up_to
    while end > max(0, up_to - LOOKED_AT) and not any(entry.name == DisarmStarted.NAME for entry in found):
        start = max(0, end - PAGE)
        page = await store.read(start, limit=end - start)
        found = [entry for entry in page if entry.name in NAMES and entry.seq <= end] + found
        end = start
    last: LastDisarm | None = None
    for entry in found:
        last = fold(last, decode(entry))
    return last
