"""Long streams are read page by page, and folded from no more than a fold looks at."""

import asyncio
import contextlib

import pytest

from events.codec import FOLDED, decode
from events.reading import pages
from events.store import MemoryStore, StoreError, UnavailableError
from events.types import Decision, Entry, Execution, PlanReceived
from projections.state import digest, evolve, fold, initial
from tests.benchmarks.history import written


def history(events: int = 3000) -> list[Entry]:
    return [entry for page in written(events, size=500) for entry in page]


def stored(entries: list[Entry]) -> MemoryStore:
    store = MemoryStore()
    store.entries += entries
    return store


@pytest.mark.parametrize("size", [1, 7, 10, 11, 1000])
async def test_pages_are_the_stream_in_order(size: int) -> None:
    entries = history(100)
    for after in (0, 90, 99, 100):
        read = [page async for page in pages(stored(entries), after, size=size)]
        assert [entry for page in read for entry in page] == entries[after:]
        assert all(len(page) == size for page in read[:-1])


async def test_whoever_stops_reading_early_leaves_nothing_under_way() -> None:
    class Slow(MemoryStore):
        async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
            if after:
                await asyncio.Event().wait()
            return await super().read(after, limit=limit)

    store = Slow()
    store.entries += history(100)
    before = asyncio.all_tasks()
    async with contextlib.aclosing(pages(store, 0, size=10)) as read:
        async for page in read:
            assert asyncio.all_tasks() > before
            assert page[-1].seq == 10
            break
    assert asyncio.all_tasks() == before


async def test_a_page_that_cannot_be_read_is_told_after_those_before_it() -> None:
    class Breaks(MemoryStore):
        async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
            if after >= 20:
                raise UnavailableError("gone")
            return await super().read(after, limit=limit)

    store = Breaks()
    store.entries += history(100)
    read = pages(store, 0, size=10)
    assert [(await anext(read))[-1].seq for _ in range(2)] == [10, 20]
    with pytest.raises(StoreError, match="gone"):
        await anext(read)


def test_what_a_fold_leaves_out_changes_no_state() -> None:
    whole, least = initial(), initial()
    kinds = set()
    for entry in history():
        full, short = decode(entry), decode(entry, FOLDED)
        kinds.add(type(full.event))
        assert (short.seq, short.at, short.hash) == (full.seq, full.at, full.hash)
        assert isinstance(short.event, type(full.event))
        evolve(whole, full)
        evolve(least, short)
    assert digest(whole) == digest(least)
    assert kinds >= {PlanReceived, Decision, Execution}


def test_what_a_fold_leaves_out_is_left_out() -> None:
    events = [decode(entry, FOLDED).event for entry in history(200)]
    assert {len(event.checks) for event in events if isinstance(event, Decision)} == {0}
    assert [e.fields for e in events if isinstance(e, PlanReceived | Execution) and e.fields] == []


def test_the_history_that_is_measured_is_the_same_each_time() -> None:
    first, second = history(500), history(500)
    assert first == second
    assert digest(fold(map(decode, first))) == digest(fold(map(decode, second)))
