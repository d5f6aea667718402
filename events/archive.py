"""The archive: events older than a day, as one verified file a UTC day, so that the stream can be trimmed.

An event's day is that of the latest timestamp up to it, since clocks step back; a timestamp from after today is a
wrong clock's and counts for nothing. Once a day has its segment, it is closed: whatever comes later belongs to a later
day. So segments are contiguous ranges, each continuing the one before, and their names sort as they do.

The order is what makes it safe. Every segment is written, on disk, read back and verified, every one from an earlier
run as well as long as the stream still holds its events, and the stream still has the event at the cut; then, and only
then, the stream is trimmed. Whatever fails on the way leaves every event in the stream, in a segment, or in both, and
the next run goes on from there.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from events import chain
from events.codec import microseconds
from events.files import COMPRESSED, FileError, FileStore, Header, History, Writer, open_file, read_header, sync
from events.keys import date_of, day_of
from events.store import Commit, EventStore, StoreError, Write
from events.types import Entry, Head

PAGE = 1000
_NAME = re.compile(rf"events-(\d{{4}}-\d\d-\d\d){re.escape(COMPRESSED)}", re.ASCII).fullmatch
_FIRST_DAY = dt.date(1970, 1, 1)


class ArchiveError(StoreError):
    """A segment cannot be trusted or does not fit; nothing was trimmed."""


class Segment(NamedTuple):
    """One day's file."""

    path: Path
    header: Header


class Archived(NamedTuple):
    """What one run did."""

    written: tuple[Segment, ...]
    verified: tuple[Segment, ...]
    """Those from earlier runs whose events were still in the stream."""
    trimmed: int
    """Events removed from the stream."""


class Trimmable(History, Protocol):
    """What of a store the archive needs."""

    async def trim(self, before: int) -> int:
        """Remove the entries before event number `before`. Returns how many."""
        ...


def segments(directory: Path) -> list[Path]:
    """The segments in a directory, oldest first. None where there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if segment_day(path) is not None)


def segment_day(path: Path) -> int | None:
    """The day (days since the epoch) of the segment of that name; None for any other name."""
    named = _NAME(path.name)
    try:
        return (dt.date.fromisoformat(named[1]) - _FIRST_DAY).days if named else None
    except ValueError:
        return None


def path_of(directory: Path, day: int) -> Path:
    """Where the segment of a day (days since the epoch) is."""
    return directory / f"events-{date_of(day)}{COMPRESSED}"


# -------------------------------------------------------------------------------------------------------- archiving


async def archive(
    store: Trimmable, directory: Path, *, before_day: int, today: int, key: bytes | None = None
) -> Archived:
    """Move everything older than the start of a UTC day from the stream to segments, but for its last event.

    Args:
        store: the stream itself, without an archive before it.
        directory: where the segments are; made if it is missing.
        before_day: days since the epoch (`events.keys.day_of`).
        today: the day it is now.
        key: `GOV_AUDIT_KEY`, if the chain is keyed.

    Raises:
        ValueError: `before_day` is later than `today`.
        ArchiveError: see there; the message names the segment.
        StoreError: the stream cannot be read or trimmed.
        OSError: a segment cannot be written.
    """
    if before_day > today:
        raise ValueError(f"cannot archive what is older than {date_of(before_day)}: today is {date_of(today)}")
    with _alone(directory):
        try:
            return await _archive(store, directory, before_day=before_day, today=today, key=key)
        except FileError as error:
            raise ArchiveError(str(error)) from error


async def _archive(store: Trimmable, directory: Path, *, before_day: int, today: int, key: bytes | None) -> Archived:
    page = await store.read(0, limit=PAGE)
    if not page:
        return Archived((), (), 0)
    found = [Segment(path, read_header(path)) for path in segments(directory)]
    _hold_together(found, page[0].seq, directory)
    older = [segment for segment in found if segment.path < path_of(directory, before_day)]
    doubled = [segment for segment in older if segment.header.head.seq >= page[0].seq]
    for segment in doubled:
        _verify(segment, key)
        await _still_there(store, segment)
    written: list[Segment] = []
    if older == found:
        end = found[-1].header.head if found else chain.GENESIS
        async with aclosing(_by_day(store, end.seq, floor=_floor(found, page, today), today=today)) as chunks:
            written = await _write(chunks, directory, after=end, before_day=before_day, key=key)
    sync(directory)
    done = [*doubled, *written]
    trimmed = 0
    if done:
        await _still_there(store, done[-1])
        last = (await store.head()).seq
        for segment in done:  # a day at a time, so that nobody waits long for the server
            trimmed += await store.trim(min(segment.header.head.seq + 1, last))
    return Archived(tuple(written), tuple(doubled), trimmed)


async def _write(
    chunks: AsyncIterator[tuple[int, list[Entry]]], directory: Path, *, after: Head, before_day: int, key: bytes | None
) -> list[Segment]:
    written: list[Segment] = []
    writer: Writer | None = None
    try:
        async for day, entries in chunks:
            if day >= before_day:
                break
            path = path_of(directory, day)
            if writer is None or writer.path != path:
                if writer is not None:
                    written.append(_finish(writer, key))
                    after = writer.head
                writer = Writer(path, after=after, key=key)
            writer.add(entries)
        if writer is not None:
            written.append(_finish(writer, key))
    except chain.ChainError as error:
        raise ArchiveError(f"the event stream does not hold: {error}") from error
    finally:
        if writer is not None:
            writer.discard()
    return written


def _finish(writer: Writer, key: bytes | None) -> Segment:
    with writer:
        segment = Segment(writer.path, writer.close())
    _verify(segment, key)
    return segment


async def _by_day(store: History, after: int, *, floor: int, today: int) -> AsyncGenerator[tuple[int, list[Entry]]]:
    """Days and their entries after `after`, a day once or several times in a row."""
    latest = floor

    def day(entry: Entry) -> int:
        nonlocal latest
        own = _day(entry)
        if latest < own <= today:
            latest = own
        return latest

    while entries := await store.read(after, limit=PAGE):
        after = entries[-1].seq
        for each, group in groupby(entries, day):
            yield each, list(group)


def _floor(found: Sequence[Segment], page: Sequence[Entry], today: int) -> int:
    """The first day that is not closed."""
    if found:
        return (segment_day(found[-1].path) or 0) + 1
    return next((day for day in map(_day, page) if day <= today), today)


def _day(entry: Entry) -> int:
    try:
        return day_of(microseconds(entry.timestamp))
    except ValueError as error:
        raise ArchiveError(f"event {entry.seq} belongs to no day: {error}") from error


def _hold_together(found: Sequence[Segment], first: int, directory: Path) -> None:
    """Segments continue each other, and nothing is missing between them and the stream's first event."""
    for before, segment in pairwise(found):
        if segment.header.after != before.header.head:
            raise ArchiveError(
                f"{segment.path} continues event {segment.header.after.seq} {segment.header.after.hash}, "
                f"and {before.path} before it ends at event {before.header.head.seq} {before.header.head.hash}"
            )
    end = found[-1].header.head.seq if found else 0
    if first > end + 1:
        raise ArchiveError(_missing(first, end + 1, directory))
    if found and found[0].header.after.seq >= first:
        raise ArchiveError(
            f"{found[0].path} begins after event {found[0].header.after.seq}: the events from {first} on, which are "
            f"still in the stream, are in no segment before it"
        )


def _verify(segment: Segment, key: bytes | None) -> None:
    """Read a segment back, and have it on disk."""
    path, expected = segment
    header, entries = open_file(path)
    if header.keyed != bool(key):
        was = "with" if header.keyed else "without"
        raise ArchiveError(f"{path} was written {was} a key (GOV_AUDIT_KEY) and is read {'with' if key else 'without'}")
    last = header.after
    try:
        for entry in chain.verify(entries, after=header.after, key=key):
            last = entry.head
    except chain.ChainError as error:
        raise ArchiveError(f"{path} does not hold: {error}") from error
    if header != expected or last != header.head:
        head = expected.head
        raise ArchiveError(f"{path} ends at event {last.seq} {last.hash}, expected event {head.seq} {head.hash}")
    sync(path)


async def _still_there(store: History, segment: Segment) -> None:
    """The stream has the event a segment ends with."""
    head = segment.header.head
    entries = await store.read(head.seq - 1, limit=1)
    if not entries or (entries[0].seq, entries[0].hash) != head:
        raise ArchiveError(f"{segment.path} ends at event {head.seq} {head.hash}, which is not in the event stream")


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """The directory, for one run at a time: two could disagree about where a day ends."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    sync(directory.parent)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ArchiveError(f"{directory} is being archived to by another process") from error
    finally:
        os.close(descriptor)


def _missing(first: int | None, wanted: int, directory: Path) -> str:
    stream = f"the event stream begins at event {first}" if first else f"the event stream ends before event {wanted}"
    return f"{stream}; the events from {wanted} on are neither in it nor in {directory}"


# --------------------------------------------------------------------------------------------- reading both as one


class ArchivedStore:
    """A store and the segments before it as one history. Only `read` and `follow` are more than the store's own.

    As long as the stream has what is asked for, the segments are not looked at.

    Args:
        store: the stream.
        directory: of its segments; it need not exist.
    """

    def __init__(self, store: EventStore, directory: Path) -> None:
        self._store = store
        self._directory = directory
        self._files: FileStore | None = None
        self._changed_ns: int | None = None

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        """Entries after event number `after`, in order, at most `limit`; fewer only at the end.

        Raises:
            StoreError: the stream cannot be read; it begins later and no segment has what is missing; a segment is
                damaged or of another history.
        """
        entries = await self._store.read(after, limit=limit)
        if entries and entries[0].seq <= after + 1:
            return entries
        try:
            return await self._read_before(entries, after, limit)
        except FileError as error:
            raise StoreError(f"the archive cannot be read: {error}") from error

    async def follow(self, after: int, *, timeout_s: float) -> list[Entry]:
        """Like read, but waits up to `timeout_s` for the first one. Raises as `read` does."""
        entries = await self._store.follow(after, timeout_s=timeout_s)
        return await self.read(after) if entries and entries[0].seq > after + 1 else entries

    def commit(self, commit: Commit) -> Coroutine[Any, Any, frozenset[str]]:
        return self._store.commit(commit)

    async def head(self) -> Head:
        return await self._store.head()

    async def values(self, *keys: str) -> list[bytes | None]:
        return await self._store.values(*keys)

    async def exists(self, key: str) -> bool:
        return await self._store.exists(key)

    async def write(self, writes: Sequence[Write]) -> None:
        await self._store.write(writes)

    async def clock(self) -> int:
        return await self._store.clock()

    async def _read_before(self, entries: list[Entry], after: int, limit: int) -> list[Entry]:
        """What the segments have after `after`, up to where the stream's own `entries` begin, and then those."""
        first = entries[0].seq if entries else None
        try:
            files = self._segments(0 if first is None else first - 1)
        except FileError:
            if first is None and after and (await self._store.head()).seq >= after:
                return []  # the stream has all of it: a damaged archive is no reason to stop
            raise
        if files is None and first is None:
            return []
        end = 0 if files is None else files.end.seq
        until = end if first is None else first - 1
        if files is not None and after < min(until, files.after.seq):
            raise StoreError(_missing(first, after + 1, self._directory))
        found: list[Entry] = []
        while files is not None and len(found) < limit and after < min(until, end):
            page = await files.read(after, limit=min(limit - len(found), until - after))
            if not page:
                raise StoreError(_missing(first, after + 1, self._directory))
            found += page
            after = page[-1].seq
        if len(found) < limit and after < until:
            raise StoreError(_missing(first, after + 1, self._directory))
        if entries and len(found) < limit and files is not None:
            await self._hold_together(files, entries[0])
        return found + entries[: limit - len(found)]

    async def _hold_together(self, files: FileStore, first: Entry) -> None:
        """What segments and stream both have is the same: the stream's first event and the segments' last one."""
        if files.end.seq < first.seq:
            return
        same = await files.read(first.seq - 1, limit=1) == [first]
        if same and (last := await self._store.read(files.end.seq - 1, limit=1)):
            same = last[0].hash == files.end.hash
        if not same:
            raise StoreError(
                f"the event stream, from event {first.seq} on, and {self._directory}, up to event {files.end.seq}, "
                f"are not the same history"
            )

    def _segments(self, needed: int) -> FileStore | None:
        """The segments there are, read anew when the directory has changed or they do not go as far as `needed`."""
        try:
            changed = self._directory.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if changed != self._changed_ns or self._files is None or self._files.end.seq < needed:
            paths = segments(self._directory)
            self._files = FileStore(paths, start=None) if paths else None
            self._changed_ns = changed
        return self._files
