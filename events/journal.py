"""The daemon's own copy of the events, on its own disk.

What it is for: the day Redis comes back with less than it had. The journal then has what is missing, and it says
which permits were about to be given by a commit nobody saw the end of.

On disk, the journal's directory holds slots `0`, `1`, …; a daemon takes one that nobody has locked. A slot holds
segments, `events-<first seq>.log`; `events.segments` says what is in them.

A record goes to the kernel in one write before the call returns, so a killed process loses nothing. A power cut
may tear the end of the last segment: what is not whole there is cut off when opening. Anything else that is not as it
was written is a DamagedError. After a failed fdatasync the kernel may have dropped the pages and call the next one a
success: that segment is left, and what was not known to be on disk is written again into a new one, which begins
where it left off. So a segment counts only up to the head at which the next one begins.

What the caller does:

    on (re)connect      `compare`. STREAM_LONGER: read the stream from `head.seq` on and `append` it. If an intent
                        dangles then, or with SAME and JOURNAL_LONGER, `settle` it: "void" → `void()`, "committed" or
                        "lost" → `committed(intent.head)`. Compare again. JOURNAL_LONGER now: what `read` gives from the
                        stream's end on is written back, lost commits among it. Permits never are. CONTRADICTION:
                        leave everything as it is until somebody accepts the stream's history, then `set_aside`.
    before a commit     `intend`. No intent, no commit: a DiskError means that nothing may be permitted.
    after it            `committed`, or `void` when the store said that nothing was written. When nobody knows: read
                        the stream on and `append` what is there, which settles the intent if anything is; otherwise
                        `settle`.
    reading on          `append`. After a DiskError, read the stream from `head.seq` on again.

One thread at a time may write and read; `sync` and `sync_if_due` may be called from another.
Errors are those of `events.segments`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Literal, Self, TypeAlias

from events import chain
from events.chain import GENESIS
from events.histories import Intent
from events.segments import (
    DamagedError,
    DiskError,
    Found,
    JournalError,
    MismatchError,
    Record,
    Scan,
    Segment,
    committed_record,
    entries_of,
    event_record,
    find,
    head_of,
    header_line,
    intent_record,
    note_record,
    parse,
    told,
    void_record,
)
from events.types import Entry, Head

SEGMENT_BYTES = 16 * 1024 * 1024
SYNC_S = 0.5
"""Age at which `sync_if_due` syncs. Called twice a second, it keeps the promise of one second."""
Fsync: TypeAlias = Literal["interval", "always"]

_SLOT = re.compile(r"0|[1-9][0-9]*")
_SUFFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class Journal:
    """One daemon's journal. See the module for what it promises; `Journal.open` makes one."""

    def __init__(
        self,
        slot: Path,
        lock: int,
        found: Found,
        *,
        key: bytes | None,
        fsync: Fsync,
        segment_bytes: int,
        sync_s: float,
    ) -> None:
        self.slot = slot
        """The directory it has taken."""
        self.torn = found.scan.torn
        """What was cut off when opening: the file and how much; None if nothing was."""
        self._key = key
        self._fsync = fsync
        self._segment_bytes = segment_bytes
        self._sync_s = sync_s
        self._slot_lock = lock
        self._lock = Lock()
        self._sync_lock = Lock()
        """Taken before `_lock`, and held while the disk is waited for."""
        self._segments = found.segments
        self._head = found.scan.head
        self._intent = found.scan.intent
        self._intent_at = found.scan.intent_at
        self._descriptor: int | None = None
        """The last segment, to be appended to; None: the next write begins a new one."""
        self._size = found.scan.whole
        self._uneven = False
        """Whether there may be bytes behind `_size`, of a write that failed."""
        self._unsynced = [intent_record(self._intent)] if self._intent else []
        """Written, not known to be on disk. An open intent stays: its `C` must not be written anywhere without it."""
        self._pending: list[Record] = []
        """Not written, though the journal has gone on: they go first with the next write."""
        self._write_problem: str | None = None
        self._sync_problem: str | None = None
        self._synced_at: float | None = None

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        key: bytes | None = None,
        fsync: Fsync = "interval",
        segment_bytes: int = SEGMENT_BYTES,
        sync_s: float = SYNC_S,
    ) -> Self:
        """Take a slot: of those that nobody has, the one that goes furthest; a new one if there is none.

        Args:
            directory: holds the slots; made if it is not there.
            key: `GOV_AUDIT_KEY`, if the chain is keyed.
            fsync: "always": `intend` returns once the intent is on disk. "interval": the caller of `sync_if_due` sees
                to it.
            segment_bytes: a segment that has grown to this is followed by a new one.
            sync_s: seconds after which `sync_if_due` syncs again.

        Raises:
            DiskError: the directory cannot be used.
            DamagedError: a slot that nobody has taken is not as it was written.
        """
        try:
            if not directory.is_dir():
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                _sync_directory(directory.parent)
            with _locked(directory / "lock"):
                slot, lock, found = _choose(directory, key)
                journal = cls(slot, lock, found, key=key, fsync=fsync, segment_bytes=segment_bytes, sync_s=sync_s)
                try:
                    journal._continue(found.stillborn)
                except OSError:
                    os.close(lock)
                    raise
        except OSError as error:
            raise DiskError(f"{error.filename or directory}: the journal cannot be opened: {error.strerror}") from error
        return journal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Sync, and give the slot back.

        Raises:
            DiskError: not everything is on disk.
        """
        if self._slot_lock < 0:
            return
        try:
            self.sync()
        finally:
            with self._sync_lock, self._lock:
                if self._descriptor is not None:
                    os.close(self._descriptor)
                    self._descriptor = None
                os.close(self._slot_lock)
                self._slot_lock = -1

    @property
    def head(self) -> Head:
        """The last event known to be committed."""
        return self._head

    @property
    def dangling(self) -> Intent | None:
        """The intent of which nobody has said what became of it."""
        return self._intent

    @property
    def first(self) -> int:
        """The first event it holds; one more than `head.seq` when it holds none."""
        return self._segments[0].first if self._segments else self._head.seq + 1

    @property
    def problem(self) -> str | None:
        """Why it cannot be written, or is not known to reach the disk; None when the last attempt went well."""
        return self._write_problem or self._sync_problem

    def intend(self, expected: Head, entries: Sequence[Entry], server: str) -> None:
        """Write what the next commit is about to append. Only then may it be sent.

        Args:
            expected: the head the commit expects, which must be the journal's.
            entries: what it appends, as `events.codec.encode_all` has just made it.
            server: identity of the server process it goes to.

        Raises:
            DiskError: it is not written, or with "always" not on disk; there is no intent now.
            MismatchError: the entries do not follow the head, or the intent before is not settled.
        """
        intent = Intent(expected, tuple(entries), server)
        if self._intent is not None:
            raise MismatchError(f"the intent after event {self._intent.expected.seq} is not settled")
        if expected != self._head or not entries:
            raise MismatchError(
                f"an intent of {len(entries)} events after {told(expected)}, the journal ends at {told(self._head)}"
            )
        self._follow(intent.entries)
        self._make_room()
        with self._lock:
            self._write([intent_record(intent)])
            self._intent = intent
        if self._fsync == "always":
            try:
                self.sync()
            except DiskError:
                with self._lock:
                    self._intent = None
                    self._pending.append(void_record(expected))
                raise

    def committed(self, head: Head) -> None:
        """The intent was committed.

        Args:
            head: where it left the stream.

        Raises:
            DiskError: it could not be written down; it counts all the same, and is written with what comes next.
            MismatchError: there is no such intent.
        """
        with self._lock:
            intent = self._open_intent()
            if head != intent.head:
                raise MismatchError(f"event {told(head)} is not the end of the intent, {told(intent.head)}")
            record = committed_record(intent, len(intent.entries))
            self._head, self._intent = head, None
            self._write_or_keep(record)

    def void(self) -> None:
        """The intent did not happen.

        Raises:
            DiskError: it could not be written down; it counts all the same, and is written with what comes next.
            MismatchError: there is no intent.
        """
        with self._lock:
            record = void_record(self._open_intent().expected)
            self._intent = None
            self._write_or_keep(record)

    def append(self, entries: Sequence[Entry]) -> None:
        """Take over events of the stream, in order. Those it has already are skipped, if they are the same.

        Settles an open intent: it was committed if these are its events, and is void if others stand in their place.

        Raises:
            DiskError: some could not be written; `head` says how far it came.
            MismatchError: they do not follow the head, or differ from what the journal has.
        """
        new = [entry for entry in entries if entry.seq > self._head.seq]
        for entry in (entry for entry in entries if entry.seq <= self._head.seq):
            held = self.hash_at(entry.seq)
            if held is not None and held != entry.hash:
                raise MismatchError(f"event {entry.seq} is {entry.hash}, the journal has {held}")
        self._verify(new)
        records, rest = self._settled_by(new)
        head = head_of(records[-1].entries[-1]) if records and records[-1].entries else self._head
        size = self._size
        for entry in rest:
            if size >= self._segment_bytes:
                self._take_over(records, head)
                records, size = [], self._size
            records.append(event_record(entry, head))
            head, size = head_of(entry), size + len(records[-1].line)
        self._take_over(records, head)

    def note(self, text: str) -> None:
        """Write a note down. Also tells whether it can be written to again.

        Raises:
            DiskError: it cannot.
        """
        with self._lock:
            self._write([note_record(text, self._head)])

    def entry(self, seq: int) -> Entry | None:
        """An event, or None if the journal does not have it.

        Raises:
            DamagedError: its segment is not as it was written.
            DiskError: it cannot be read.
        """
        return self.read(seq - 1, limit=1)[0] if self.first <= seq <= self._head.seq else None

    def hash_at(self, seq: int) -> str | None:
        """Hash of an event, also of the one before the first, or None if the journal does not know it.

        Raises:
            DamagedError: its segment is not as it was written.
            DiskError: it cannot be read.
        """
        if seq == self._head.seq:
            return self._head.hash
        if self._segments and seq == self.first - 1:
            with self._reading():
                return self._segments[0].after.hash
        entry = self.entry(seq)
        return entry.hash if entry else None

    def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        """Events after event number `after`, in order, at most `limit`.

        Raises:
            MismatchError: it begins later than that.
            DamagedError: a segment is not as it was written.
            DiskError: it cannot be read.
        """
        if after < self.first - 1:
            raise MismatchError(f"event {after + 1} was asked for, the journal begins at {self.first}")
        found: list[Entry] = []
        with self._lock, self._reading():
            while len(found) < limit and (seq := after + 1 + len(found)) <= self._head.seq:
                found += self._read_segment(seq, limit - len(found)) or self._read_pending(seq, limit - len(found))
        return found

    def sync(self) -> None:
        """Have everything written so far on disk.

        Raises:
            DiskError: it is not, not even after it was written again into a new segment.
        """
        with self._sync_lock:
            for _ in range(2):
                with self._lock:
                    self._write([])
                    if self._descriptor is None or not self._unsynced:
                        return
                    count, descriptor = len(self._unsynced), os.dup(self._descriptor)
                try:
                    os.fdatasync(descriptor)
                except OSError as error:
                    self._sync_problem = f"{self._segments[-1].path}: cannot be synced: {error.strerror}"
                    with self._lock:
                        self._abandon()
                else:
                    self._sync_problem = None
                    with self._lock:
                        self._synced(count)
                    return
                finally:
                    os.close(descriptor)
            raise DiskError(self._sync_problem)

    def sync_if_due(self, now: float) -> bool:
        """Sync if something waits for it and the last time is long enough ago.

        Args:
            now: seconds, of a clock that only goes forward.

        Raises:
            DiskError: as `sync`.
        """
        with self._lock:
            waits = bool(self._unsynced or self._pending)
        if not waits or (self._synced_at is not None and now - self._synced_at < self._sync_s):
            return False
        self._synced_at = now
        self.sync()
        return True

    def set_aside(self, suffix: str, *, after: Head = GENESIS) -> Path:
        """Move everything it holds out of the way, an open intent too, and begin anew.

        Args:
            suffix: names the directory in the slot it is moved to, `aside-<suffix>`.
            after: the head before the first event it will take.

        Returns:
            That directory.

        Raises:
            DiskError: it could not be done; a second call goes on with it.
            ValueError: the suffix is no plain name.
        """
        if not _SUFFIX.fullmatch(suffix):
            raise ValueError(f"suffix {suffix!r}: expected letters, digits, '.', '_' and '-'")
        self._held()
        aside = self.slot / f"aside-{suffix}"
        with self._sync_lock, self._lock:
            try:
                aside.mkdir(mode=0o700, exist_ok=True)
                while self._segments:  # the oldest first: what is left after a crash still ends where it ended
                    target = aside / self._segments[0].path.name
                    if target.exists():
                        raise FileExistsError(errno.EEXIST, "is there already", str(target))
                    self._segments[0].path.rename(target)
                    del self._segments[0]
                if self._descriptor is not None:
                    os.close(self._descriptor)
                    self._descriptor = None
                self._unsynced, self._pending = [], []
                self._head, self._intent, self._size = after, None, 0
                _sync_directory(aside)
                self._begin(after, b"")
                self._write_problem = self._sync_problem = None
            except OSError as error:
                self._write_problem = f"{error.filename or aside}: cannot be set aside: {error.strerror}"
                raise DiskError(self._write_problem) from error
        return aside

    def prune(self, before_seq: int) -> int:
        """Remove the segments all events of which are before `before_seq`. The last one always stays.

        Returns:
            How many were removed.

        Raises:
            DiskError: one could not be removed.
        """
        self._held()
        removed = 0
        with self._sync_lock, self._lock:
            try:
                while len(self._segments) > 1 and self._segments[1].first <= before_seq:
                    self._segments[0].path.unlink()
                    del self._segments[0]
                    removed += 1
            except OSError as error:
                raise DiskError(f"{error.filename}: cannot be removed: {error.strerror}") from error
        return removed

    # --- writing

    def _continue(self, stillborn: Sequence[Path]) -> None:
        """Open the last segment for writing, whole; begin the first if there is none. Raises OSError."""
        for path in stillborn:
            path.unlink()
        if not self._segments:
            self._begin(self._head, b"")
            return
        path = self._segments[-1].path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        if os.fstat(self._descriptor).st_size > self._size:
            os.ftruncate(self._descriptor, self._size)
        os.fdatasync(self._descriptor)  # what a killed process had written and not synced

    def _write(self, records: Sequence[Record]) -> None:
        """Write what is pending and then these, all or nothing."""
        self._held()
        records = [*self._pending, *records]
        if not records:
            return
        block = b"".join([record.line for record in records])
        full = self._size >= self._segment_bytes and records[0].kind in "IE"
        try:
            if self._descriptor is None or full:
                self._begin(records[0].before, block)
            else:
                self._extend(self._descriptor, block)
        except OSError as error:
            path = self._segments[-1].path if self._segments else self.slot
            self._write_problem = f"{path}: the journal cannot be written: {error.strerror}"
            raise DiskError(self._write_problem) from error
        self._write_problem = None
        self._note(records, self._size - len(block))
        self._pending = []
        self._unsynced += records

    def _take_over(self, records: Sequence[Record], head: Head) -> None:
        if not records:
            return
        if records[0].kind == "E":
            self._make_room()
        with self._lock:
            self._write(records)
            self._head, self._intent = head, None

    def _write_or_keep(self, record: Record) -> None:
        try:
            self._write([record])
        except DiskError:
            self._pending.append(record)
            raise

    def _extend(self, descriptor: int, block: bytes) -> None:
        if self._uneven:
            os.ftruncate(descriptor, self._size)
        self._uneven = True
        try:
            _write_all(descriptor, block)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self._size)
                self._uneven = False
            raise
        self._uneven = False
        self._size += len(block)

    def _begin(self, after: Head, block: bytes) -> None:
        """A new segment that begins with these records."""
        path = self._new_path(after.seq + 1)
        header = header_line(after)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _write_all(descriptor, header + block)
            _sync_directory(self.slot)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._size, self._uneven = descriptor, len(header) + len(block), False
        for segment in self._segments[:-1]:
            segment.index = None
        self._segments.append(Segment(path, after.seq + 1, after, array("Q")))

    def _new_path(self, first: int) -> Path:
        path, generation = self.slot / f"events-{first:020d}.log", 0
        while path.exists():
            generation += 1
            path = self.slot / f"events-{first:020d}.{generation}.log"
        return path

    def _note(self, records: Sequence[Record], offset: int) -> None:
        """Remember where the events are that these records, written at an offset, make part of the history."""
        index = self._segments[-1].index
        assert index is not None
        for record in records:
            if record.kind == "I":
                self._intent_at = offset
            index.extend([self._intent_at if record.kind == "C" else offset] * len(record.entries))
            offset += len(record.line)

    def _make_room(self) -> None:
        # A segment is left only when it is on disk, so that a torn one is always the last.
        if self._size >= self._segment_bytes:
            self.sync()

    def _abandon(self) -> None:
        """Leave the segment: what is not known to be on disk is to be written again."""
        self._pending = [*self._unsynced, *self._pending]
        self._unsynced = []
        segment = self._segments[-1]
        assert segment.index is not None
        del segment.index[self._pending[0].before.seq + 1 - segment.first :]
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None

    def _synced(self, count: int) -> None:
        rest = self._unsynced[count:]
        needs_intent = rest[0].kind in "CV" if rest else self._unsynced[-1].kind == "I"
        self._unsynced = self._unsynced[count - needs_intent :]
        while len(self._segments) > 1 and self._segments[-2].first == self._segments[-1].first:
            with contextlib.suppress(OSError):
                self._segments[-2].path.unlink()
            del self._segments[-2]

    # --- reading

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(f"{error.filename or self.slot}: cannot be read: {error.strerror}") from error

    def _read_segment(self, seq: int, limit: int) -> list[Entry]:
        """Events from one segment, from `seq` on."""
        place = bisect_right(self._segments, seq, key=lambda segment: segment.first) - 1
        segment = self._segments[place]
        index = self._index(place)
        found: list[Entry] = []
        with segment.path.open("rb") as file:
            while len(found) < limit and (at := seq + len(found) - segment.first) < len(index):
                file.seek(index[at])
                record = parse(file.readline()[:-1])
                wanted = range(segment.first + at, segment.first + min(at + limit - len(found), len(index)))
                entries = [
                    entry
                    for entry in (entries_of(*record) if record else [])
                    if entry.seq in wanted and index[entry.seq - segment.first] == index[at]
                ]
                if not entries:
                    raise DamagedError(f"{segment.path}, byte {index[at]}: the record is not what was written")
                found += entries
        return found

    def _read_pending(self, seq: int, limit: int) -> list[Entry]:
        entries = [entry for record in self._pending for entry in record.entries if entry.seq >= seq]
        assert entries, f"event {seq} is nowhere"
        return entries[:limit]

    def _index(self, place: int) -> array[int]:
        segment = self._segments[place]
        if segment.index is None:
            for other in self._segments[:-1]:
                other.index = None
            segment.index = (
                Scan(self._key).read(segment.path, segment.first, until=self._segments[place + 1].after).index
            )
        return segment.index

    # --- holding the caller to it

    def _held(self) -> None:
        if self._slot_lock < 0:
            raise JournalError(f"{self.slot}: the journal is closed")

    def _open_intent(self) -> Intent:
        if self._intent is None:
            raise MismatchError("there is no intent to settle")
        return self._intent

    def _verify(self, entries: Sequence[Entry]) -> None:
        try:
            for _ in chain.verify(entries, after=self._head, key=self._key):
                pass
        except chain.ChainError as error:
            raise MismatchError(f"not a continuation of event {self._head.seq}: {error}") from error

    def _follow(self, entries: Sequence[Entry]) -> None:
        # Their hashes are not looked at: whoever is about to commit them has just made these.
        for expected, entry in enumerate(entries, self._head.seq + 1):
            if entry.seq != expected:
                raise MismatchError(
                    f"not a continuation of event {self._head.seq}: "
                    f"event {entry.seq}: follows event {expected - 1}, expected {expected}"
                )

    def _settled_by(self, new: Sequence[Entry]) -> tuple[list[Record], Sequence[Entry]]:
        """What the stream's next events say of the open intent, and those of them that are not its own."""
        if self._intent is None or not new:
            return [], new
        own = self._intent.entries
        same = 0
        while same < min(len(own), len(new)) and own[same].hash == new[same].hash:
            same += 1
        if same in (len(own), len(new)):
            return [committed_record(self._intent, same)], new[same:]
        return [void_record(self._intent.expected)], new


# --- slots and files -----------------------------------------------------------------------------------------------


def _choose(directory: Path, key: bytes | None) -> tuple[Path, int, Found]:
    """The slot to take, its lock, and what it holds."""
    numbers = sorted(int(path.name) for path in directory.iterdir() if _SLOT.fullmatch(path.name))
    new = directory / str(numbers[-1] + 1 if numbers else 0)
    slots = [directory / str(number) for number in numbers]
    free: dict[Path, int] = {}
    try:
        free |= {slot: lock for slot in slots if (lock := _take(slot / "lock")) is not None}
        if not free:
            new.mkdir(mode=0o700)
            _sync_directory(directory)
            free[new] = _lock(new / "lock", fcntl.LOCK_EX)
        found = {slot: find(slot, key) for slot in free}
        slot = max(found, key=lambda slot: found[slot].scan.head.seq)
        return slot, free.pop(slot), found[slot]
    finally:
        for lock in free.values():
            os.close(lock)


def _lock(path: Path, operation: int) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, operation)
    except OSError:
        os.close(lock)
        raise
    return lock


def _take(path: Path) -> int | None:
    """A lock, or None when somebody has it."""
    try:
        return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for a lock, and hold it."""
    lock = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _write_all(descriptor: int, block: bytes) -> None:
    written = os.write(descriptor, block)
    while written < len(block):  # a full disk takes a part, and says why with the next
        written += os.write(descriptor, block[written:])


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
