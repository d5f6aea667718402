"""The events as they come, over any trouble with the server: each once, none left out."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable

from events import chain
from events.store import EventStore, StoreError
from events.types import Entry, Head

WAIT_S = 1.0
"""How long one read waits for the next event."""
RETRY_S = 0.5
REMEMBERED = 20_000
"""So many events that were given out are known again by their hashes, should a server that lost them get them back."""


async def follow(
    store: EventStore, after: Head, *, at: str, key: bytes | None, tell: Callable[[str], None]
) -> AsyncIterator[list[Entry]]:
    """Entries after `after`, for ever.

    A server that lost events gets them back from a governor's journal: those are not given out again. Where it goes on
    with another history instead, that is given out from its beginning.

    Args:
        store: where they are.
        after: the last event that is known.
        at: its timestamp.
        key: of the chain, if it is keyed.
        tell: told when the server is away and when it is back, and when it has lost something.
    """
    seen, head, away, look = _Seen(after, at), after, False, False
    while True:
        try:
            if look:
                head = await _place(store, head, tell)
            if away:
                tell("Redis answers again")
                away = False
            entries = await store.follow(head.seq, timeout_s=WAIT_S)
        except (StoreError, OSError, ValueError) as error:
            if not away:
                tell(f"{error}; waiting for it, and going on after event {head.seq}")
            away = look = True
            await asyncio.sleep(RETRY_S)
            continue
        look = not entries
        if not entries:
            continue
        if not _continues(entries[0], head, key):
            tell(f"event {entries[0].seq} does not continue event {head.seq}: what differs is shown from the beginning")
            head = chain.GENESIS
            continue
        head = entries[-1].head
        if fresh := [entry for entry in entries if seen.take(entry)]:
            yield fresh


async def _place(store: EventStore, head: Head, tell: Callable[[str], None]) -> Head:
    """Where to go on. A stream that ends elsewhere than it should lost something: all of it is looked at again."""
    found = await store.head()
    if found == head or found.seq > head.seq:
        return head
    tell(f"Redis lost events: it ends at event {found.seq}, event {head.seq} had been seen; what comes now is shown")
    return chain.GENESIS


def _continues(entry: Entry, head: Head, key: bytes | None) -> bool:
    if head == chain.GENESIS and entry.seq != 1:
        return True  # the beginning was trimmed
    try:
        return list(chain.verify([entry], after=head, key=key)) == [entry]
    except chain.ChainError:
        return False


class _Seen:
    """What was given out before."""

    def __init__(self, after: Head, at: str) -> None:
        self._hashes: OrderedDict[int, str] = OrderedDict([after])
        self._first = after.seq
        self._latest = float(at)

    def take(self, entry: Entry) -> bool:
        """Whether it is new; from then on it is not."""
        known = self._hashes.get(entry.seq)
        # What was there before we began to look is not known by its hash, but by its time.
        if known == entry.hash or (entry.seq < self._first and float(entry.timestamp) <= self._latest):
            return False
        self._hashes[entry.seq] = entry.hash
        self._latest = max(self._latest, float(entry.timestamp))
        if len(self._hashes) > REMEMBERED:
            seq, _ = self._hashes.popitem(last=False)
            self._first = max(self._first, seq + 1)
        return True
