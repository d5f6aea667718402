"""Old events move to segments, and nothing is ever in neither place."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from events import archive as archiving
from events import chain
from events.archive import Archived, ArchivedStore, ArchiveError, archive, path_of, segments
from events.chain import GENESIS
from events.codec import encode_all, microseconds
from events.files import FileError, FileStore, Writer, open_file, read_header, write
from events.keys import DAY_US, Keys, day_of
from events.store import Commit, MemoryStore, RedisStore, StoreError, UnavailableError, Write
from events.types import Entry, ErrorRecorded, Head
from governor.ledger import Ledger
from governor.policy import Policy
from governor.replay import Auditor, replay
from tests.servers import RedisServer
from tests.test_files import body, put, walk

KEYS = Keys()
DAY = 20_000
"""2024-10-04."""
KEY = b"secret"


def on(*days: float, after: Head = GENESIS, key: bytes | None = None, mark: str = "") -> list[Entry]:
    """One event at each of these times, in days after DAY."""
    found: list[Entry] = []
    for day in days:
        event = ErrorRecorded(kind="plan_lost", detail=f"{day}{mark}")
        found += encode_all([event], after=after, at=round((DAY + day) * DAY_US), key=key)
        after = end_of(found)
    return found


def end_of(entries: list[Entry]) -> Head:
    return entries[-1].head


def memory(entries: list[Entry]) -> MemoryStore:
    store = MemoryStore()
    store.entries = list(entries)
    return store


FOUR_DAYS = on(0, 0.5, 0.9, 1, 1.1, 2.2, 2.3, 2.999999, 3, 3.5)
"""Ten events: three, two and three a day, and two of today."""


async def run(store: Any, directory: Path, before: int = 3, today: int = 3, key: bytes | None = None) -> Archived:
    return await archive(store, directory, before_day=DAY + before, today=DAY + today, key=key)


async def whole(store: Any, *, page: int = 3, after: int = 0) -> list[Entry]:
    found: list[Entry] = []
    while entries := await store.read(after, limit=page):
        found += entries
        after = entries[-1].seq
    return found


def seqs(entries: list[Entry]) -> list[int]:
    return [entry.seq for entry in entries]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def content(directory: Path) -> dict[str, list[int]]:
    return {
        path.name[7:17]: list(range(read_header(path).after.seq + 1, read_header(path).head.seq + 1))
        for path in segments(directory)
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state" / "archive"


@pytest.fixture
def made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
async def stream(flushed: RedisServer) -> AsyncIterator[RedisStore]:
    async with flushed.async_client(decode_responses=False) as client:
        yield RedisStore(client, stream=KEYS.events, halt=KEYS.halt)


async def fill(store: Any, entries: list[Entry]) -> None:
    for begin in range(0, len(entries), 200):
        await store.commit(Commit(expected=await store.head(), entries=entries[begin : begin + 200]))


# ------------------------------------------------------------------------------------------------------ archiving


async def test_a_stream_is_trimmed_by_number(stream: RedisStore) -> None:
    held = memory(FOUR_DAYS)
    await fill(stream, FOUR_DAYS)
    for store in (stream, held):
        assert [await store.trim(before) for before in (1, 4, 4, 10)] == [0, 3, 0, 6]
        assert await whole(store) == FOUR_DAYS[9:]
    more = on(3.6, after=end_of(FOUR_DAYS))
    await fill(stream, more)
    assert seqs(await whole(stream)) == [10, 11]


async def test_each_day_is_a_segment_and_the_stream_keeps_the_rest(stream: RedisStore, directory: Path) -> None:
    await fill(stream, FOUR_DAYS)
    done = await run(stream, directory)
    assert [segment.path.name for segment in done.written] == [
        "events-2024-10-04.jsonl.zst",
        "events-2024-10-05.jsonl.zst",
        "events-2024-10-06.jsonl.zst",
    ]
    assert content(directory) == {"2024-10-04": [1, 2, 3], "2024-10-05": [4, 5], "2024-10-06": [6, 7, 8]}
    assert (done.verified, done.trimmed) == ((), 8)
    assert [segment.header for segment in done.written] == [read_header(path) for path in segments(directory)]
    assert await whole(stream) == FOUR_DAYS[8:]
    assert await whole(ArchivedStore(stream, directory)) == FOUR_DAYS
    assert await whole(FileStore([directory])) == FOUR_DAYS[:8]
    assert mode(directory) == 0o700


async def test_a_second_run_does_nothing_and_a_later_one_goes_on(stream: RedisStore, directory: Path) -> None:
    await fill(stream, FOUR_DAYS)
    await run(stream, directory)
    before = {path: path.read_bytes() for path in segments(directory)}
    assert await run(stream, directory) == Archived((), (), 0)
    assert {path: path.read_bytes() for path in segments(directory)} == before
    await fill(stream, on(4, 5, after=end_of(FOUR_DAYS)))
    later = await run(stream, directory, 5, 5)
    assert [segment.header.events for segment in later.written] == [2, 1]
    assert later.trimmed == 3
    assert seqs(await whole(ArchivedStore(stream, directory))) == list(range(1, 13))


async def test_the_last_event_always_stays_in_the_stream(stream: RedisStore, directory: Path) -> None:
    await fill(stream, FOUR_DAYS)
    done = await run(stream, directory, 9, 9)
    assert (sum(segment.header.events for segment in done.written), done.trimmed) == (10, 9)
    assert await whole(stream) == FOUR_DAYS[9:]
    assert await stream.head() == end_of(FOUR_DAYS)
    again = await run(stream, directory, 9, 9)
    assert (again.written, [segment.path for segment in again.verified]) == ((), segments(directory)[-1:])
    assert again.trimmed == 0
    await fill(stream, on(8.5, 9, after=end_of(FOUR_DAYS)))
    assert (await run(stream, directory, 9, 9)).trimmed == 2
    assert seqs(await whole(stream)) == [12]
    assert seqs(await whole(ArchivedStore(stream, directory))) == list(range(1, 13))


async def test_only_what_is_older_is_archived(directory: Path) -> None:
    store = memory(FOUR_DAYS)
    assert await run(store, directory, 0) == Archived((), (), 0)
    assert (await run(store, directory, 1)).trimmed == 3
    assert content(directory) == {"2024-10-04": [1, 2, 3]}


async def test_segments_younger_than_asked_for_are_not_trimmed(directory: Path) -> None:
    store = memory(FOUR_DAYS)
    await run(store, directory)
    store.entries = list(FOUR_DAYS)
    done = await run(store, directory, 1)
    assert (len(done.verified), done.trimmed) == (1, 3)
    assert store.entries == FOUR_DAYS[3:]


async def test_an_empty_stream_has_nothing_to_archive(stream: RedisStore, directory: Path) -> None:
    assert await run(stream, directory) == Archived((), (), 0)
    assert segments(directory) == []
    assert segments(directory / "none") == []


async def test_a_day_that_is_not_over_is_refused_with_both_dates(directory: Path) -> None:
    with pytest.raises(ValueError, match="older than 2024-10-08: today is 2024-10-07"):
        await run(memory(FOUR_DAYS), directory, 4, 3)
    assert names(directory.parent.parent) == set()


async def test_a_clock_that_stepped_back_does_not_tear_a_day_apart(directory: Path) -> None:
    store = memory(on(0.9, 1.1, 0.95, 1.2, 2.1))
    await run(store, directory, 2)
    assert content(directory) == {"2024-10-04": [1], "2024-10-05": [2, 3, 4]}


async def test_a_clock_that_was_ahead_of_today_does_not_hold_everything_up(directory: Path) -> None:
    store = memory(on(0.9, 400, 1.2, 2.1))
    await run(store, directory, 2)
    assert content(directory) == {"2024-10-04": [1, 2], "2024-10-05": [3]}
    directory = directory / "first"
    await run(memory(on(400, 0.9, 1.2, 2.1)), directory, 2)
    assert content(directory) == {"2024-10-04": [1, 2], "2024-10-05": [3]}


async def test_what_comes_after_a_day_was_closed_belongs_to_the_next(directory: Path) -> None:
    store = memory(on(0.9, 0.99))
    await run(store, directory, 1, 1)
    late = [*store.entries, *on(0.999, 1.5, 2.5, after=end_of(store.entries))]
    store.entries = late
    assert await run(store, directory, 1, 1) == Archived((), (archiving.Segment(*_one(directory)),), 1)
    await run(store, directory, 2, 2)
    assert content(directory) == {"2024-10-04": [1, 2], "2024-10-05": [3, 4]}


def _one(directory: Path) -> tuple[Path, Any]:
    (path,) = segments(directory)
    return path, read_header(path)


async def test_a_keyed_history_needs_its_key(directory: Path) -> None:
    entries = on(0, 1, 2, 3, key=KEY)
    store = memory(entries)
    with pytest.raises(ArchiveError, match="the event stream does not hold: event 1"):
        await run(store, directory)
    assert (store.entries, segments(directory)) == (entries, [])
    await run(store, directory, key=KEY)
    assert store.entries == entries[3:]
    store.entries = list(entries)
    with pytest.raises(ArchiveError, match=r"2024-10-04\.jsonl\.zst was written with a key .* and is read without"):
        await run(store, directory)
    assert store.entries == entries


async def test_two_runs_at_once_are_refused(made: Path) -> None:
    descriptor = os.open(made, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ArchiveError, match="is being archived to by another process"):
            await run(memory(FOUR_DAYS), made)
    finally:
        os.close(descriptor)
    assert (await run(memory(FOUR_DAYS), made)).trimmed == 8


# ------------------------------------------------------------------------------------------ nothing is ever lost


class Step(Exception):  # noqa: N818 - a crash
    """Stands for a crash at this point."""


class Failing:
    """A store, and a disk, that fail at the nth thing they are asked to do."""

    def __init__(self, store: Any, nth: int) -> None:
        self.store = store
        self.left = nth

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Step

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **options: Any) -> Any:
            self.step()
            return call(*args, **options)

        return stepping

    def after(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **options: Any) -> Any:
            result = call(*args, **options)
            self.step()
            return result

        return stepping

    async def head(self) -> Head:
        self.step()
        return Head(*await self.store.head())

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        self.step()
        found: list[Entry] = await self.store.read(after, limit=limit)
        return found

    async def trim(self, before: int) -> int:
        self.step()
        removed: int = await self.store.trim(before)
        self.step()  # the reply got lost
        return removed


async def test_a_run_that_fails_at_any_step_loses_nothing_and_the_next_one_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiving, "PAGE", 2)
    steps = 0
    while True:
        steps += 1
        store, directory = memory(FOUR_DAYS), tmp_path / str(steps)
        failing = Failing(store, steps)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failing.before(os.fsync))
            patched.setattr(Path, "replace", failing.after(failing.before(Path.replace)))
            patched.setattr(archiving, "open_file", failing.before(open_file))
            patched.setattr(archiving, "Writer", failing.before(Writer))
            try:
                await run(failing, directory)
                break
            except Step:
                pass
        assert await whole(ArchivedStore(store, directory)) == FOUR_DAYS, steps
        assert names(directory) == {path.name for path in segments(directory)}
        await run(store, directory)
        assert store.entries == FOUR_DAYS[8:]
        assert content(directory) == {"2024-10-04": [1, 2, 3], "2024-10-05": [4, 5], "2024-10-06": [6, 7, 8]}
        assert await whole(ArchivedStore(store, directory)) == FOUR_DAYS
    assert steps > 35
    assert store.entries == FOUR_DAYS[8:]


async def test_what_a_killed_run_left_half_written_is_no_segment(made: Path) -> None:
    half = made / ".events-2024-10-04.jsonl.zst.abc.part"
    half.write_bytes(b"half")
    store = memory(FOUR_DAYS)
    await run(store, made)
    assert await whole(ArchivedStore(store, made)) == FOUR_DAYS


async def test_a_file_of_another_name_is_no_segment(made: Path) -> None:
    for name in (
        "events-2024-02-31.jsonl.zst",
        "events-2024-10-04.jsonl",
        "events.jsonl.zst",
        "xevents-2024-10-04.jsonl.zst",
    ):
        (made / name).write_bytes(b"?")
    assert segments(made) == []
    assert (await run(memory(FOUR_DAYS), made)).trimmed == 8


async def test_a_server_that_is_away_is_told_and_nothing_is_trimmed(flushed: RedisServer, directory: Path) -> None:
    async with flushed.async_client(decode_responses=False) as client:
        store = RedisStore(client, stream=KEYS.events, halt=KEYS.halt)
        await fill(store, FOUR_DAYS)
        real = store._call

        async def away(*command: Any) -> Any:
            if command[0] == "XTRIM":
                raise UnavailableError("no answer")
            return await real(*command)

        store._call = away  # type: ignore[method-assign]
        with pytest.raises(UnavailableError):
            await run(store, directory)
        store._call = real  # type: ignore[method-assign]
        assert await whole(store) == FOUR_DAYS
        done = await run(store, directory)
        assert (len(done.written), len(done.verified), done.trimmed) == (0, 3, 8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: put(path, b"".join(body(path).splitlines(keepends=True)[:-1])),
        lambda path: put(path, body(path).replace(b"plan_lost", b"plan_l0st", 1)),
        lambda path: path.write_bytes(b""),
        lambda path: write(path, on(1, 1.1, after=end_of(FOUR_DAYS[:3]), mark="!"), after=end_of(FOUR_DAYS[:3])),
        lambda path: write(path, on(1, 1.1)),
    ],
    ids=["cut", "a line less", "changed", "emptied", "another end", "another beginning"],
)
async def test_a_segment_of_an_earlier_run_is_verified_before_anything_is_trimmed(
    directory: Path, damage: Callable[[Path], Any]
) -> None:
    store = memory(FOUR_DAYS)
    await run(store, directory, 2)
    store.entries = list(FOUR_DAYS)
    damage(path_of(directory, DAY + 1))
    with pytest.raises(ArchiveError, match=r"events-2024-10-05\.jsonl\.zst"):
        await run(store, directory)
    assert store.entries == FOUR_DAYS


async def test_what_was_written_is_read_back_before_anything_is_trimmed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def bad_disk(self: Path, target: Path) -> Path:
        self.write_bytes(self.read_bytes()[:-10])
        return real(self, target)

    monkeypatch.setattr(Path, "replace", bad_disk)
    store = memory(FOUR_DAYS)
    with pytest.raises(ArchiveError, match=r"events-2024-10-04\.jsonl\.zst: .*damaged compression"):
        await run(store, directory)
    assert store.entries == FOUR_DAYS


async def test_a_stream_that_was_replaced_meanwhile_is_not_trimmed(directory: Path) -> None:
    store = memory(FOUR_DAYS)

    class Replaced(Failing):
        async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
            if limit == 1:
                store.entries = on(*range(10), mark="!")
            return await super().read(after, limit=limit)

    with pytest.raises(ArchiveError, match=r"ends at event 8 .*, which is not in the event stream"):
        await run(Replaced(store, 0), directory)
    assert len(store.entries) == 10


async def test_events_in_no_segment_are_not_trimmed(directory: Path) -> None:
    store = memory(FOUR_DAYS)
    await run(store, directory)
    store.entries = list(FOUR_DAYS)
    path_of(directory, DAY).unlink()
    with pytest.raises(ArchiveError, match=r"10-05\.jsonl\.zst begins after event 3: the events from 1 on"):
        await run(store, directory)
    store.entries = FOUR_DAYS[3:]
    assert (await run(store, directory)).trimmed == 5, "the oldest segments may be kept elsewhere"


async def test_segments_that_do_not_continue_each_other_or_the_stream_are_refused(directory: Path) -> None:
    store = memory(FOUR_DAYS)
    await run(store, directory)
    path_of(directory, DAY + 1).unlink()
    with pytest.raises(ArchiveError, match=r"10-06\.jsonl\.zst continues event 5 .*10-04\.jsonl\.zst before it ends"):
        await run(store, directory)
    path_of(directory, DAY + 2).unlink()
    with pytest.raises(ArchiveError, match=r"begins at event 9; the events from 4 on are neither in it nor in /"):
        await run(store, directory)
    assert store.entries == FOUR_DAYS[8:]


async def test_a_stream_that_does_not_hold_is_not_archived(directory: Path) -> None:
    store = memory([*FOUR_DAYS[:6], *FOUR_DAYS[7:]])
    with pytest.raises(ArchiveError, match="the event stream does not hold: event 8: follows event 6"):
        await run(store, directory)
    assert len(store.entries) == 9
    timeless = Entry("RECOVERED", 1, "now", b"{}", chain.link(GENESIS.hash, "RECOVERED", 1, "now", b"{}"))
    with pytest.raises(ArchiveError, match="event 1 belongs to no day: timestamp 'now'"):
        await run(memory([timeless]), directory / "other")


# --------------------------------------------------------------------------------------- reading both as one history


class Counting(MemoryStore):
    reads = heads = 0

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        self.reads += 1
        return await super().read(after, limit=limit)

    async def head(self) -> Head:
        self.heads += 1
        return await super().head()


@pytest.mark.parametrize("page", [1, 2, 3, 4, 8, 9, 10, 11, 1000])
async def test_pages_over_segments_and_stream_are_full_until_the_end(directory: Path, page: int) -> None:
    store = memory(FOUR_DAYS)
    await run(store, directory)
    both = ArchivedStore(store, directory)
    for after in range(12):
        assert await both.read(after, limit=page) == FOUR_DAYS[after : after + page]
    assert await whole(both, page=page) == FOUR_DAYS
    assert await both.head() == end_of(FOUR_DAYS)


async def test_the_segments_are_not_looked_at_while_the_stream_has_everything(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Counting()
    store.entries = list(FOUR_DAYS)
    both = ArchivedStore(store, directory)
    monkeypatch.setattr(archiving, "segments", lambda _: pytest.fail("looked at"))
    assert await whole(both, page=1000) == FOUR_DAYS
    assert (store.reads, store.heads) == (2, 0)


@pytest.fixture(scope="module")
def walked() -> tuple[list[Entry], dict[str, Policy]]:
    entries, policies = walk()
    return list(entries), policies


async def test_a_daemon_starts_and_an_audit_goes_over_both(
    walked: tuple[list[Entry], dict[str, Policy]], stream: RedisStore, directory: Path
) -> None:
    entries, policies = walked
    tomorrow = day_of(microseconds(entries[-1].timestamp)) + 1
    await fill(stream, entries)
    done = await archive(stream, directory, before_day=tomorrow, today=tomorrow)
    assert done.trimmed == len(entries) - 1
    both = ArchivedStore(stream, directory)
    auditor = Auditor(policies=policies, expect=end_of(entries))
    assert auditor.feed(await both.read(0, limit=len(entries) + 1))
    assert auditor.finish()[0] == replay(entries, policies=policies, expect=end_of(entries))[0]
    ledger = Ledger(both, KEYS, lambda: 0)
    await ledger.open()
    assert ledger.state.head == end_of(entries)


async def test_following_goes_over_both(directory: Path) -> None:
    store = memory(FOUR_DAYS)
    await run(store, directory)
    both = ArchivedStore(store, directory)
    assert await both.follow(2, timeout_s=0) == FOUR_DAYS[2:]
    assert await both.follow(8, timeout_s=0) == FOUR_DAYS[8:]
    assert await both.follow(10, timeout_s=0) == []


async def test_everything_else_is_the_stores_own(stream: RedisStore, directory: Path) -> None:
    both = ArchivedStore(stream, directory)
    await fill(both, FOUR_DAYS)
    assert await both.head() == end_of(FOUR_DAYS)
    await both.write([Write("set", "k", (b"v",))])
    assert (await both.values("k", "none"), await both.exists("k")) == ([b"v", None], True)
    assert await both.clock() > 1_700_000_000_000_000


async def test_what_is_in_neither_is_told(made: Path) -> None:
    store = memory(FOUR_DAYS)
    both = ArchivedStore(store, made)
    store.entries = FOUR_DAYS[5:]
    told = rf"the event stream begins at event 6; the events from 1 on are neither in it nor in {made}"
    with pytest.raises(StoreError, match=told):
        await both.read(0)
    assert await both.read(5) == FOUR_DAYS[5:]
    write(path_of(made, DAY), FOUR_DAYS[:3])
    assert await both.read(0, limit=3) == FOUR_DAYS[:3]
    for after, limit in ((0, 4), (3, 1), (4, 1)):
        with pytest.raises(StoreError, match=rf"begins at event 6; the events from {max(after, 3) + 1} on"):
            await both.read(after, limit=limit)
    write(path_of(made, DAY + 1), FOUR_DAYS[3:5], after=end_of(FOUR_DAYS[:3]))
    assert await whole(both) == FOUR_DAYS
    path_of(made, DAY).unlink()
    with pytest.raises(StoreError, match="the events from 1 on are neither"):
        await both.read(0)
    assert await both.read(3) == FOUR_DAYS[3:]


async def test_a_stream_that_was_emptied_or_cut_below_the_segments_still_has_its_history(directory: Path) -> None:
    store = memory(FOUR_DAYS)
    await run(store, directory)
    both = ArchivedStore(store, directory)
    store.entries = []
    assert await whole(both) == FOUR_DAYS[:8]
    store.entries = FOUR_DAYS[:2]
    assert await whole(both) == FOUR_DAYS[:8]
    assert await both.read(8) == []


async def test_a_segment_written_while_it_is_read_is_seen(directory: Path) -> None:
    store = memory(FOUR_DAYS)
    both = ArchivedStore(store, directory)
    await run(store, directory, 1)
    assert await both.read(0, limit=2) == FOUR_DAYS[:2]
    await run(store, directory)
    assert await whole(both) == FOUR_DAYS


@pytest.mark.parametrize("place", ["first of the stream", "last of the segments"])
async def test_an_overlap_that_differs_is_told(directory: Path, place: str) -> None:
    store = memory(FOUR_DAYS)
    await run(store, directory)
    store.entries = FOUR_DAYS[5:]
    both = ArchivedStore(store, directory)
    assert await whole(both) == FOUR_DAYS
    other = on(2.2, 2.3, 2.999999, 3, 3.5, after=end_of(FOUR_DAYS[:5]), mark="!")
    store.entries = other if place == "first of the stream" else [FOUR_DAYS[5], *other[1:]]
    with pytest.raises(StoreError, match=r"from event 6 on, and .*, up to event 8, are not the same history"):
        await whole(both)


async def test_a_damaged_segment_is_told_and_does_not_concern_who_does_not_need_it(directory: Path) -> None:
    store = memory(FOUR_DAYS)
    await run(store, directory)
    damaged = path_of(directory, DAY + 1)
    put(damaged, body(damaged).replace(b'"seq":5,"t', b'"seq":x,"t'))
    both = ArchivedStore(store, directory)
    assert await both.read(0, limit=4) == FOUR_DAYS[:4]
    with pytest.raises(StoreError, match=r"the archive cannot be read: .*2024-10-05\.jsonl\.zst: line 3: no event"):
        await both.read(0, limit=5)
    damaged.write_bytes(b"")
    with pytest.raises(StoreError, match=r"2024-10-05\.jsonl\.zst: line 1: no header") as caught:
        await both.read(0)
    assert isinstance(caught.value.__cause__, FileError)
    with pytest.raises(StoreError, match=r"2024-10-05\.jsonl\.zst: line 1: no header"):
        await ArchivedStore(store, directory).read(0)
    for one in (both, ArchivedStore(store, directory)):
        assert await one.read(8) == FOUR_DAYS[8:]
        assert await one.read(10) == []


async def test_a_segment_that_was_cut_is_told_where_it_ends(directory: Path) -> None:
    store = memory(FOUR_DAYS)
    await run(store, directory)
    cut = path_of(directory, DAY + 2)
    put(cut, b"".join(body(cut).splitlines(keepends=True)[:-2]))
    both = ArchivedStore(store, directory)
    assert await both.read(0, limit=6) == FOUR_DAYS[:6]
    with pytest.raises(StoreError, match="begins at event 9; the events from 7 on are neither in it nor in"):
        await both.read(0, limit=7)
