"""A long stream, page by page: the server looks for the next page while the caller works on this one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from events.codec import microseconds
from events.store import EventStore
from events.types import Entry

if TYPE_CHECKING:
    from events.files import FileStore

PAGE = 1000
"""Larger ones are slower: what a page is made of no longer fits the processor's cache."""


async def pages(store: EventStore, after: int, *, size: int = PAGE) -> AsyncGenerator[list[Entry], None]:
    """Entries after event number `after`, in order, up to where the stream ends when the last page is read.

    Close it (`contextlib.aclosing`) where reading may stop early: a page may be on its way.

    Raises:
        StoreError: it cannot be read.
    """
    page = await store.read(after, limit=size)
    while len(page) == size:
        ahead = asyncio.create_task(store.read(page[-1].seq, limit=size))
        try:
            for _ in range(2):  # once to write the request, once for the loop to send it
                await asyncio.sleep(0)
            yield page
            page = await ahead
        finally:
            if not ahead.done():
                ahead.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await ahead
    if page:
        yield page


async def before(store: EventStore | FileStore, since_us: int, *, first: int = 0, last: int) -> int:
    """The last event before a time (microseconds), by halving; `first` where none comes after that one.

    Times may step back with a clock: then it is one of several.

    Args:
        store: where they are; the beginning may be gone from it.
        since_us: the time.
        first: the event behind which it is looked for.
        last: the last event it may be.

    Raises:
        StoreError: they cannot be read.
    """
    low, high = first, last
    while low < high:
        middle = (low + high) // 2
        found = await store.read(middle, limit=1)
        if not found or microseconds(found[0].timestamp) >= since_us:
            high = middle
        else:
            low = max(middle + 1, min(found[0].seq, high))
    return low
