"""Brings back a stream that lost events, from an exported copy of it. Never a permit.

Only what the stream lost is written, and only where the stream is the beginning of the copy: two histories that
contradict each other are never made one. Whoever was granted a permit on what was lost may still hold it, so
HISTORY_RESTORED begins a hold of one permit's life.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence

from events import chain
from events.chain import GENESIS
from events.files import FileStore
from events.histories import compare
from events.store import Commit
from events.types import Entry, Head, HistoryRestored
from governor import permits
from governor.ledger import Ledger, Proposal
from governor.policy import Policy
from governor.status import policy_of
from projections.state import State

BATCH = 500
"""Events a commit."""


class ContradictionError(ValueError):
    """The stream and the copy are two histories; the message says where they part."""


async def restore(
    ledger: Ledger, copy: FileStore, pages: AsyncIterable[Sequence[Entry]], *, key: bytes | None, default: Policy
) -> int:
    """Write back what the stream lost.

    Args:
        ledger: over the stream, not opened; opened when this returns.
        copy: the exported history.
        pages: all of it, for reading once.
        key: `GOV_AUDIT_KEY`, if the chain is keyed.
        default: policy in force where the events tell none.

    Returns:
        How many events were written back.

    Raises:
        ContradictionError: neither is the beginning of the other.
        ChainError: the copy does not hold; what came before is written.
        StoreError: Redis cannot be read or written.
    """
    head = await _common_head(ledger, copy)
    written, previous = 0, GENESIS
    async for page in pages:
        missing = [entry for entry in chain.verify(page, after=previous, key=key) if entry.seq > head.seq]
        previous = page[-1].head
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            writes = permits.ended(batch, ledger.keys)
            await ledger.store.commit(Commit(expected=head, entries=batch, writes=writes))
            head = batch[-1].head
            written += len(batch)
    await ledger.open()
    if written:
        await ledger.propose(lambda state, now: Proposal([_restored(state, written, now, default)]))
    return written


def _restored(state: State, events: int, now: int, default: Policy) -> HistoryRestored:
    return HistoryRestored(events=events, hold_until_us=now + policy_of(state, default).permit_ttl_us)


async def _common_head(ledger: Ledger, copy: FileStore) -> Head:
    """Where the stream ends, if the copy contains that; or the copy's end, if the stream contains that."""
    ends, copied = await ledger.store.head(), await copy.head()
    longer, shorter, end = (copy, "the stream", ends) if ends.seq <= copied.seq else (ledger.store, "the copy", copied)
    held = {entry.seq: entry.hash for entry in await longer.read(end.seq - 1, limit=1)} if end.seq else {}
    if compare(copied, held.get, ends, held.get).at is None:
        raise ContradictionError(
            f"{shorter} ends at event {end.seq} with hash {end.hash}, and the other one has another event there: "
            "these are two histories, nothing was written"
        )
    return ends
