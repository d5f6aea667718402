import contextlib
import errno
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.chain import GENESIS, link
from events.codec import encode_all
from events.histories import Comparison, Intent, Relation, Verdict, compare, settle
from events.journal import Fsync, Journal
from events.segments import DamagedError, DiskError, JournalError, MismatchError, head_of
from events.types import Entry, ErrorRecorded, Head

AT = 1_763_870_400_123_456
OTHER = Head(3, "e" * 64)


def some(count: int, *, after: Head = GENESIS, text: str = "ü", key: bytes | None = None) -> list[Entry]:
    events = [ErrorRecorded(kind="plan_lost", detail=f"{text} {after.seq + place}") for place in range(1, count + 1)]
    return encode_all(events, after=after, at=AT, key=key)


def with_data(data: bytes, *, after: Head = GENESIS) -> Entry:
    digest = link(after.hash, "RECOVERED", after.seq + 1, "1.000000", data)
    return Entry("RECOVERED", after.seq + 1, "1.000000", data, digest)


def commit(journal: Journal, count: int = 3) -> list[Entry]:
    entries = some(count, after=journal.head)
    journal.intend(journal.head, entries, "run")
    journal.committed(head_of(entries[-1]))
    return entries


def everything(journal: Journal) -> list[Entry]:
    return journal.read(journal.first - 1, limit=1_000_000)


def segments(slot: Path) -> list[Path]:
    return sorted(slot.glob("events-*.log"))


def kinds(file: Path) -> str:
    return "".join(line[9] for line in file.read_text().splitlines())


def last_segment(directory: Path) -> Path:
    return segments(directory / "0")[-1]


def rewrite(file: Path, blob: bytes | bytearray) -> None:
    with file.open("r+b") as opened:  # file systems wait for the disk when a file is truncated first
        opened.write(blob)
        opened.truncate()


def record(kind: str, payload: str) -> bytes:
    rest = f"{kind} {payload}".encode()
    return f"{zlib.crc32(rest):08x} ".encode() + rest + b"\n"


def write_segment(directory: Path, *records: bytes, name: str = f"events-{1:020d}.log") -> Path:
    slot = directory / "0"
    slot.mkdir(parents=True, exist_ok=True)
    (slot / name).write_bytes(b"".join(records))
    return slot / name


HEADER = record("H", f'{{"format":"governor-journal","version":1,"after":[0,"{"0" * 64}"]}}')


def told(entry: Entry) -> str:
    return (
        f'{{"event":"{entry.name}","seq":{entry.seq},"timestamp":"{entry.timestamp}",'
        f'"data":{entry.data.decode()},"hash":"{entry.hash}"}}'
    )


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """A disk that is full from there on: writes are short first, then fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Disk:
    """Counts what would reach the disk, quickly; fails when told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.synced = 0
        self.fail: list[bool] = []
        self.meanwhile: Callable[[], None] = lambda: None
        patch.setattr(os, "fdatasync", self._fdatasync)
        patch.setattr(os, "fsync", lambda _descriptor: None)

    def _fdatasync(self, _descriptor: int) -> None:
        self.meanwhile, meanwhile = (lambda: None), self.meanwhile
        meanwhile()
        if self.fail and self.fail.pop(0):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.synced += 1


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def problem_of(journal: Journal) -> str | None:
    return journal.problem


# --- what is written is there again


def test_a_new_journal_is_empty_and_made_for_its_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "journal"
    with Journal.open(directory) as journal:
        assert (journal.head, journal.first, journal.dangling) == (GENESIS, 1, None)
        assert (journal.torn, journal.problem) == (None, None)
        assert everything(journal) == []
        assert journal.entry(1) is None
        assert journal.hash_at(0) == GENESIS.hash
        assert journal.hash_at(1) is None
    assert {stat.S_IMODE(path.stat().st_mode) for path in (directory, directory / "0")} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*") if path.is_file()} == {0o600}


@pytest.mark.parametrize("key", [None, b"secret"])
def test_what_was_committed_and_seen_is_there_after_opening_again(tmp_path: Path, key: bytes | None) -> None:
    entries = some(5, key=key)
    with Journal.open(tmp_path, key=key) as journal:
        journal.intend(GENESIS, entries[:2], "run")
        assert journal.head == GENESIS
        journal.committed(head_of(entries[1]))
        journal.append(entries[2:])
        assert everything(journal) == entries
    with Journal.open(tmp_path, key=key) as journal:
        assert (journal.head, journal.first, journal.dangling) == (head_of(entries[-1]), 1, None)
        assert everything(journal) == entries
        assert [journal.entry(seq) for seq in range(7)] == [None, *entries, None]
        assert [journal.hash_at(seq) for seq in range(7)] == [GENESIS.hash, *(each.hash for each in entries), None]
        assert journal.read(1, limit=2) == entries[1:3]
        assert journal.read(5) == journal.read(9) == []


def test_the_format_stays_what_it_is(tmp_path: Path) -> None:
    first, second, third = some(3)
    records = [
        HEADER,
        record("I", f'{{"expected":[0,"{"0" * 64}"],"server":"run","entries":[{told(first)},{told(second)}]}}'),
        record("V", f'[0,"{"0" * 64}"]'),
        record("I", f'{{"expected":[0,"{"0" * 64}"],"server":"run","entries":[{told(first)},{told(second)}]}}'),
        record("C", f'[2,"{second.hash}"]'),
        record("E", told(third)),
    ]
    with Journal.open(tmp_path) as journal:
        journal.intend(GENESIS, [first, second], "run")
        journal.void()
        journal.intend(GENESIS, [first, second], "run")
        journal.committed(head_of(second))
        journal.append([third])
    assert last_segment(tmp_path).read_bytes() == b"".join(records)
    assert last_segment(tmp_path).name == "events-00000000000000000001.log"


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1}',
        b'{"a":\n1}',
        b' {"a":1}',
        b'{"a":1} ',
        b'{"a":"\xff"}',
        b'{"a":1},"hash":"x"',
        b'{"a":1}{"a":2}',
        b'{"a":1}\x00}',
        b'"aGk="',
        b"{",
        b"",
        bytes(range(256)),
    ],
)
def test_the_bytes_of_an_event_come_back_as_they_were(tmp_path: Path, data: bytes) -> None:
    seen = with_data(data)
    (own,) = some(1, after=head_of(seen))
    with Journal.open(tmp_path) as journal:
        journal.append([seen])
        journal.intend(journal.head, [own], "run")
        journal.committed(head_of(own))
        assert everything(journal) == [seen, own]
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == [seen, own]


def test_an_intent_of_which_nobody_knows_the_end_is_told_after_opening_again(tmp_path: Path) -> None:
    entries = some(2)
    with Journal.open(tmp_path) as journal:
        journal.intend(GENESIS, entries, "run 1")
    with Journal.open(tmp_path) as journal:
        assert journal.dangling == Intent(GENESIS, tuple(entries), "run 1")
        assert journal.dangling.head == head_of(entries[1])
        assert (journal.head, everything(journal)) == (GENESIS, [])
        journal.committed(head_of(entries[1]))
        assert everything(journal) == entries
    with Journal.open(tmp_path) as journal:
        assert (journal.dangling, everything(journal)) == (None, entries)


def test_a_void_intent_leaves_nothing(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        journal.intend(GENESIS, some(2), "run")
        journal.void()
        assert (journal.dangling, journal.head) == (None, GENESIS)
        other = commit(journal, 1)
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == other


# --- what it refuses


def test_events_it_has_already_are_skipped(tmp_path: Path) -> None:
    entries = some(4)
    with Journal.open(tmp_path) as journal:
        journal.append(entries[:3])
        size = last_segment(tmp_path).stat().st_size
        journal.append(entries[:3])
        journal.append(entries[1:2])
        journal.append([])
        assert last_segment(tmp_path).stat().st_size == size
        journal.append(entries)
        assert everything(journal) == entries


def test_another_event_in_the_place_of_one_it_has_is_refused(tmp_path: Path) -> None:
    entries, others = some(3), some(4, text="another")
    with Journal.open(tmp_path) as journal:
        journal.append(entries)
        with pytest.raises(MismatchError, match=f"event 1 is {others[0].hash}, the journal has {entries[0].hash}"):
            journal.append(others)
        with pytest.raises(MismatchError, match="event 4: its hash does not cover"):
            journal.append(others[3:])
        assert everything(journal) == entries


def test_a_gap_is_refused(tmp_path: Path) -> None:
    entries = some(4)
    with Journal.open(tmp_path) as journal:
        journal.append(entries[:2])
        with pytest.raises(MismatchError, match="not a continuation of event 2: event 4: follows event 2, expected 3"):
            journal.append(entries[3:])
        assert journal.head == head_of(entries[1])


def test_an_intent_must_continue_the_head(tmp_path: Path) -> None:
    entries = some(3)
    with Journal.open(tmp_path) as journal:
        journal.append(entries[:1])
        for expected, own in ((GENESIS, entries[1:]), (head_of(entries[1]), entries[2:]), (journal.head, [])):
            with pytest.raises(MismatchError, match=r"the journal ends at 1 \("):
                journal.intend(expected, own, "run")
        with pytest.raises(MismatchError, match="event 3: follows event 1, expected 2"):
            journal.intend(journal.head, entries[2:], "run")
        assert journal.dangling is None
        commit(journal)


def test_an_intent_has_to_be_settled_before_the_next(tmp_path: Path) -> None:
    entries = some(2)
    with Journal.open(tmp_path) as journal:
        for settle_none in (journal.void, lambda: journal.committed(head_of(entries[1]))):
            with pytest.raises(MismatchError, match="there is no intent"):
                settle_none()
        journal.intend(GENESIS, entries, "run")
        with pytest.raises(MismatchError, match="the intent after event 0 is not settled"):
            journal.intend(GENESIS, entries, "run")
        with pytest.raises(MismatchError, match="is not the end of the intent"):
            journal.committed(head_of(entries[0]))
        assert journal.dangling == Intent(GENESIS, tuple(entries), "run")


def test_what_is_not_held_any_more_cannot_be_read_from_the_beginning(tmp_path: Path) -> None:
    with Journal.open(tmp_path, segment_bytes=1) as journal:
        commit(journal)
        commit(journal)
        assert journal.prune(4) == 1
        with pytest.raises(MismatchError, match="event 1 was asked for, the journal begins at 4"):
            journal.read(0)


def test_a_closed_journal_refuses(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    journal.close()
    journal.close()
    for call in (lambda: commit(journal), lambda: journal.append(some(1)), journal.sync, lambda: journal.prune(1)):
        with pytest.raises(JournalError, match="the journal is closed"):
            call()


# --- the stream settles an intent


def test_reading_the_intent_in_the_stream_commits_it(tmp_path: Path) -> None:
    entries = some(4)
    with Journal.open(tmp_path) as journal:
        journal.intend(GENESIS, entries[:2], "run")
        journal.append(entries)
        assert (journal.dangling, everything(journal)) == (None, entries)
    assert last_segment(tmp_path).read_bytes().count(entries[0].hash.encode()) == 1
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == entries


def test_reading_a_part_of_the_intent_commits_that_part(tmp_path: Path) -> None:
    entries = some(4)
    with Journal.open(tmp_path) as journal:
        journal.intend(GENESIS, entries[:3], "run")
        journal.append(entries[:1])
        assert (journal.dangling, everything(journal)) == (None, entries[:1])
        journal.append(entries[1:])
        assert everything(journal) == entries
        assert journal.read(0, limit=1) == entries[:1]
    assert kinds(last_segment(tmp_path)) == "HICEEE"
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == entries


def test_what_follows_a_part_of_the_intent_may_be_another_event(tmp_path: Path) -> None:
    own = some(3)
    theirs = some(2, after=head_of(own[0]), text="theirs")
    with Journal.open(tmp_path) as journal:
        journal.intend(GENESIS, own, "run")
        journal.append(own[:1])
        journal.append(theirs)
        assert everything(journal) == [own[0], *theirs]
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == [own[0], *theirs]


@pytest.mark.parametrize("common", [0, 1])
def test_reading_something_else_in_its_place_makes_an_intent_void(tmp_path: Path, common: int) -> None:
    own = some(3)
    theirs = own[:common]
    theirs += some(3, after=head_of(own[common - 1]) if common else GENESIS, text="theirs")
    with Journal.open(tmp_path) as journal:
        journal.intend(GENESIS, own, "run")
        journal.append(theirs)
        assert (journal.dangling, everything(journal)) == (None, theirs)
    assert kinds(last_segment(tmp_path)) == "HIV" + "E" * len(theirs)
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == theirs


def test_reading_what_was_known_says_nothing_about_an_intent(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        known = commit(journal)
        journal.intend(journal.head, some(1, after=journal.head), "run")
        journal.append(known)
        assert journal.dangling is not None


# --- torn ends and damage


def written(directory: Path, kind: str) -> tuple[list[Entry], Intent | None]:
    """A journal whose last record is of that kind; what it holds without that record, and the intent open then."""
    with Journal.open(directory) as journal:
        entries = commit(journal)
        own = some(2, after=journal.head)
        if kind == "E":
            journal.append(own)
            return [*entries, own[0]], None
        journal.intend(journal.head, own, "run")
        if kind == "C":
            journal.committed(head_of(own[-1]))
        if kind == "V":
            journal.void()
        return entries, None if kind == "I" else Intent(head_of(entries[-1]), tuple(own), "run")


@pytest.mark.parametrize("behind", [b"", b"\0" * 700, b"\xff\0\n\n x"], ids=["nothing", "zeros", "garbage"])
@pytest.mark.parametrize("kind", ["I", "C", "V", "E"])
def test_a_torn_end_is_cut_off_wherever_it_is_torn(tmp_path: Path, disk: Disk, kind: str, behind: bytes) -> None:
    entries, intent = written(tmp_path, kind)
    file = last_segment(tmp_path)
    blob = file.read_bytes()
    begin = blob.rindex(b"\n", 0, -1) + 1
    step = 1 if not behind else 17
    for cut in range(begin, len(blob), step):
        rewrite(file, blob[:cut] + behind)
        with Journal.open(tmp_path) as journal:
            assert (everything(journal), journal.dangling) == (entries, intent)
            gone = cut - begin + len(behind)
            line = blob.count(b"\n") - 1
            assert journal.torn == (
                f"{file.name}: {gone} bytes after line {line} were no whole record" if gone else None
            )
            assert file.read_bytes() == blob[:begin]
            if intent:
                journal.void()
            entries_then = [*entries, *commit(journal, 1)]
        with Journal.open(tmp_path) as journal:
            assert (everything(journal), journal.torn) == (entries_then, None)


@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_flipped_byte_in_the_middle_is_told_with_file_and_line(tmp_path: Path, disk: Disk, line: int) -> None:
    written(tmp_path, "E")
    file = last_segment(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    begin = sum(len(each) for each in lines[: line - 1])
    for place in range(begin, begin + len(lines[line - 1])):
        blob = bytearray(b"".join(lines))
        blob[place] ^= 0x04
        rewrite(file, blob)
        with pytest.raises(DamagedError, match=rf"{file.name}, line {line}: the record is not what was written"):
            Journal.open(tmp_path)
        assert file.read_bytes() == bytes(blob), "nobody may mend what was damaged"
    rewrite(file, b"".join(lines))
    Journal.open(tmp_path).close()


FIRST, SECOND, THIRD = some(3)
INTENT = record("I", f'{{"expected":[0,"{"0" * 64}"],"server":"run","entries":[{told(FIRST)}]}}')
COMMITTED = record("C", f'[1,"{FIRST.hash}"]')


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ([INTENT], "line 1: a record 'I' where a header was expected"),
        ([HEADER, HEADER], "line 2: a record 'H' where no header was expected"),
        ([HEADER, record("X", "{}")], "line 2: a record of unknown kind 'X'"),
        ([HEADER, COMMITTED], "line 2: a record 'C' without an intent before it"),
        ([HEADER, record("V", f'[0,"{"0" * 64}"]')], "line 2: a record 'V' without an intent before it"),
        ([HEADER, INTENT, INTENT], "line 3: a record 'I' while the intent before is open"),
        ([HEADER, INTENT, record("E", told(FIRST))], "line 3: a record 'E' while the intent before is open"),
        ([HEADER, INTENT, record("C", f'[2,"{SECOND.hash}"]')], "line 3: event 2 is not one the intent before"),
        ([HEADER, INTENT, record("V", f'[2,"{SECOND.hash}"]')], "line 3: an intent is void that is not the one before"),
        ([HEADER, INTENT, COMMITTED, INTENT], "line 4: an intent after event 0, expected 1"),
        (
            [HEADER, record("I", f'{{"expected":[0,"{"0" * 64}"],"server":"run","entries":[]}}')],
            "line 2: an intent after",
        ),
        ([HEADER, record("E", told(SECOND))], "line 2: event 2: follows event 0, expected 1"),
        (
            [HEADER, record("E", told(FIRST).replace("plan_lost", "plan_lust"))],
            "line 2: event 1: its hash does not cover",
        ),
        ([HEADER, record("E", '{"seq":1}')], "line 2: Object missing required field"),
        ([HEADER, record("E", told(FIRST).replace(FIRST.data.decode(), '"?"'))], "line 2: Only base64 data is allowed"),
        ([HEADER, INTENT.replace(b"run", b"ran"), COMMITTED], "line 2: the record is not what was written (checksum)"),
        ([record("H", "{}")], "line 1: Object missing required field"),
        ([record("H", f'{{"format":"x","version":1,"after":[0,"{"0" * 64}"]}}')], "line 1: format 'x' version 1, this"),
        (
            [record("H", f'{{"format":"governor-journal","version":2,"after":[0,"{"0" * 64}"]}}')],
            "line 1: format 'governor-journal' version 2, this program reads 'governor-journal' version 1",
        ),
        (
            [record("H", f'{{"format":"governor-journal","version":1,"after":[7,"{"0" * 64}"]}}')],
            "line 1: it follows event 7, by its name it follows 0",
        ),
    ],
)
def test_whole_records_that_make_no_history_are_told_with_file_and_line(
    tmp_path: Path, records: list[bytes], problem: str
) -> None:
    file = write_segment(tmp_path, *records)
    with pytest.raises(DamagedError) as caught:
        Journal.open(tmp_path)
    assert str(caught.value).startswith(f"{file}, {problem}")


def test_another_key_than_it_was_written_with_is_told(tmp_path: Path) -> None:
    with Journal.open(tmp_path, key=b"secret") as journal:
        journal.append(some(1, key=b"secret"))
    with pytest.raises(DamagedError, match="line 2: event 1: its hash does not cover"):
        Journal.open(tmp_path, key=b"another")


def test_a_damaged_slot_is_given_back(tmp_path: Path) -> None:
    file = write_segment(tmp_path, INTENT)
    with pytest.raises(DamagedError):
        Journal.open(tmp_path)
    file.unlink()
    Journal.open(tmp_path).close()


@pytest.mark.parametrize("rest", [b"", HEADER[:20], b"\0" * 500], ids=["empty", "half a header", "zeros"])
def test_a_segment_that_did_not_live_to_have_a_header_is_removed(tmp_path: Path, rest: bytes) -> None:
    with Journal.open(tmp_path) as journal:
        entries = commit(journal)
    write_segment(tmp_path, rest, name=f"events-{4:020d}.log")
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == entries
        assert journal.torn is not None
        assert f"events-{4:020d}.log" in journal.torn
        assert [file.name for file in segments(journal.slot)] == [f"events-{1:020d}.log"]
        commit(journal)


# --- segments


@pytest.fixture
def long(tmp_path: Path, disk: Disk) -> tuple[Path, list[Entry]]:
    """A journal of many segments, and its events."""
    entries: list[Entry] = []
    with Journal.open(tmp_path, segment_bytes=1200) as journal:
        for number in range(12):
            entries += commit(journal, 1 + number % 3)
            journal.append(seen := some(2, after=journal.head, text="theirs"))
            entries += seen
    return tmp_path, entries


def test_reads_cross_segments(long: tuple[Path, list[Entry]]) -> None:
    directory, entries = long
    assert len(segments(directory / "0")) > 5
    with Journal.open(directory) as journal:
        assert everything(journal) == entries
        for after in range(len(entries) + 1):
            for limit in (1, 2, 7):
                assert journal.read(after, limit=limit) == entries[after : after + limit]
        for entry in random.Random(1).sample(entries, len(entries)):  # noqa: S311 - an order, no secret
            assert journal.entry(entry.seq) == entry
            assert journal.hash_at(entry.seq) == entry.hash
            assert sum(segment.index is not None for segment in journal._segments) <= 2, "memory does not grow"


def test_a_segment_begins_where_the_one_before_ends(long: tuple[Path, list[Entry]]) -> None:
    directory, entries = long
    for file in segments(directory / "0")[1:]:
        first = int(file.stem.removeprefix("events-"))
        header = file.read_text().splitlines()[0]
        assert header.endswith(f'"after":[{first - 1},"{entries[first - 2].hash}"]}}')


def test_opening_reads_only_the_last_segment(long: tuple[Path, list[Entry]]) -> None:
    directory, entries = long
    for file in segments(directory / "0")[:-1]:
        file.write_bytes(b"")
    with Journal.open(directory) as journal:
        assert journal.head == head_of(entries[-1])


def test_damage_in_an_older_segment_is_told_when_it_is_read(long: tuple[Path, list[Entry]]) -> None:
    directory, entries = long
    file = segments(directory / "0")[1]
    blob = file.read_bytes()
    for damaged in (
        blob[:-1],
        blob.replace(b"theirs", b"thairs", 1),
        blob[:300],
        b"",
        b"".join(blob.splitlines(True)[:-1]),
    ):
        rewrite(file, damaged)
        with Journal.open(directory) as journal:
            with pytest.raises(DamagedError, match=rf"{file.name}, line \d+: "):
                everything(journal)
            last = segments(directory / "0")[-1]
            assert journal.read(int(last.stem.removeprefix("events-")) - 1)[-1] == entries[-1]


def test_damage_that_happens_while_it_is_open_is_told_when_it_is_read(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(some(3))
        file = last_segment(tmp_path)
        rewrite(file, file.read_bytes().replace(SECOND.data, SECOND.data.replace(b"lost", b"last")))
        assert journal.read(0, limit=1) == [FIRST]
        with pytest.raises(DamagedError, match=rf"{file.name}, byte \d+: the record is not what was written"):
            journal.read(0)


def test_a_segment_that_is_gone_is_told(long: tuple[Path, list[Entry]]) -> None:
    directory, entries = long
    with Journal.open(directory) as journal:
        file = segments(journal.slot)[1]
        file.unlink()
        with pytest.raises(DiskError, match=rf"{file.name}: cannot be read: No such file"):
            journal.read(0, limit=len(entries))
        with pytest.raises(DiskError, match=rf"{file.name}: cannot be removed: No such file"):
            journal.prune(len(entries))
        assert journal.first == int(file.stem.removeprefix("events-"))


def test_an_append_of_many_events_is_spread_over_segments(tmp_path: Path) -> None:
    entries = some(40)
    with Journal.open(tmp_path, segment_bytes=1000) as journal:
        journal.intend(GENESIS, entries[:20], "run")
        journal.append(entries)
        assert everything(journal) == entries
        assert max(file.stat().st_size for file in segments(journal.slot)[1:]) < 1500
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == entries


def test_an_intent_and_what_became_of_it_are_in_one_segment(tmp_path: Path) -> None:
    with Journal.open(tmp_path, segment_bytes=1) as journal:
        for _ in range(3):
            journal.intend(journal.head, some(1, after=journal.head), "run")
            journal.void()
            commit(journal)
            assert {kinds(file) for file in segments(journal.slot)} <= {"HIV", "HIC"}


def test_pruning_removes_whole_segments_before_a_number(long: tuple[Path, list[Entry]]) -> None:
    directory, entries = long
    with Journal.open(directory) as journal:
        everything(journal)
        firsts = [int(file.stem.removeprefix("events-")) for file in segments(journal.slot)]
        assert journal.prune(firsts[2] + 1) == 2
        assert journal.first == firsts[2]
        assert journal.hash_at(firsts[2] - 1) == entries[firsts[2] - 2].hash
        assert journal.hash_at(firsts[2] - 2) is None
        assert journal.entry(firsts[2] - 1) is None
        assert everything(journal) == entries[firsts[2] - 1 :]
        journal.append(entries)
        assert journal.prune(10**9) == len(firsts) - 3
        assert journal.head == head_of(entries[-1])
    with Journal.open(directory) as journal:
        assert journal.first == firsts[-1]
        commit(journal)


@pytest.mark.parametrize("after", [GENESIS, OTHER])
def test_a_history_set_aside_is_kept_and_another_begun(long: tuple[Path, list[Entry]], after: Head) -> None:
    directory, _ = long
    with Journal.open(directory) as journal:
        journal.intend(journal.head, some(1, after=journal.head), "run")
        before = {file.name: file.read_bytes() for file in segments(journal.slot)}
        aside = journal.set_aside("2026-11-23", after=after)
        assert {file.name: file.read_bytes() for file in segments(aside)} == before
        assert (journal.head, journal.dangling, journal.first) == (after, None, after.seq + 1)
        assert journal.hash_at(after.seq) == after.hash
        entries = [*commit(journal), *commit(journal)]
        assert everything(journal) == entries
    with Journal.open(directory) as journal:
        assert everything(journal) == entries
        assert journal.hash_at(after.seq) == after.hash


def test_setting_aside_goes_on_where_a_crash_stopped_it(long: tuple[Path, list[Entry]]) -> None:
    directory, entries = long
    files = segments(directory / "0")
    (directory / "0" / "aside-x").mkdir()
    files[0].rename(directory / "0" / "aside-x" / files[0].name)
    with Journal.open(directory) as journal:
        assert journal.head == head_of(entries[-1])
        assert len(segments(journal.set_aside("x"))) == len(files)
        assert journal.head == GENESIS


def test_setting_aside_overwrites_nothing(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        commit(journal)
        aside = journal.set_aside("x")
        kept = segments(aside)[0].read_bytes()
        entries = commit(journal, 1)
        with pytest.raises(DiskError, match=r"aside-x/events-0+1.log: cannot be set aside: is there already"):
            journal.set_aside("x")
        assert segments(aside)[0].read_bytes() == kept
        assert everything(journal) == entries
        commit(journal)
        assert journal.problem is None


@pytest.mark.parametrize("suffix", ["", "..", "a/b", ".x", "a b"])
def test_a_suffix_is_a_plain_name(tmp_path: Path, suffix: str) -> None:
    with Journal.open(tmp_path) as journal, pytest.raises(ValueError, match="expected letters"):
        journal.set_aside(suffix)


# --- several daemons, and killed ones

HOLDER = """
import sys
from pathlib import Path
from events.journal import Journal
journal = Journal.open(Path(sys.argv[1]))
print(journal.slot.name, flush=True)
sys.stdin.read()
"""


def start(program: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def line_of(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def test_daemons_on_one_directory_take_a_slot_each(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(3):
            processes.append(stack.enter_context(start(HOLDER, tmp_path)))
            stack.callback(processes[-1].kill)
        assert sorted(line_of(process) for process in processes) == [b"0\n", b"1\n", b"2\n"]
        with Journal.open(tmp_path) as journal:
            assert journal.slot.name == "3"


def test_the_free_slot_that_goes_furthest_is_taken(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as first, Journal.open(tmp_path) as second, Journal.open(tmp_path) as third:
        commit(first, 1)
        commit(second, 3)
        commit(third, 2)
        (tmp_path / "notes").mkdir()
    with Journal.open(tmp_path) as second, Journal.open(tmp_path) as third, Journal.open(tmp_path) as first:
        assert [journal.slot.name for journal in (first, second, third)] == ["0", "1", "2"]


WRITER = """
import sys
from pathlib import Path
from events.codec import encode_all
from events.journal import Journal
from events.types import ErrorRecorded, Head
journal = Journal.open(Path(sys.argv[1]), segment_bytes=20_000)
if journal.dangling:
    journal.committed(journal.dangling.head)
while True:
    def some(count):
        events = [ErrorRecorded(kind="plan_lost", detail=f"{journal.head.seq} {n}" * 20) for n in range(count)]
        return encode_all(events, after=journal.head, at=1)
    journal.append(some(2))
    entries = some(3)
    journal.intend(journal.head, entries, "run")
    journal.committed(Head(entries[-1].seq, entries[-1].hash))
    print(*journal.head, flush=True)
"""


def test_a_killed_process_loses_nothing_it_was_told_is_written(tmp_path: Path) -> None:
    moments = random.Random(7)  # noqa: S311 - moments, no secret
    for _ in range(6):
        with start(WRITER, tmp_path) as process:
            lines = [line_of(process) for _ in range(moments.randint(1, 150))]
            process.kill()
            assert process.stdout is not None
            lines += process.stdout.readlines()
        told = [Head(int(seq), digest) for seq, digest in (line.decode().split() for line in lines if b"\n" in line)]
        with Journal.open(tmp_path) as journal:
            assert [journal.hash_at(head.seq) for head in told] == [head.hash for head in told]
            assert journal.head.seq >= told[-1].seq
            assert journal.slot.name == "0"
    assert len(segments(tmp_path / "0")) > 1


# --- full, read-only and broken disks


@pytest.mark.parametrize("spare", [0, 1, 100])
def test_a_full_disk_means_no_intent_and_a_clear_state(tmp_path: Path, spare: int) -> None:
    with Journal.open(tmp_path) as journal:
        entries = commit(journal)
        file = last_segment(tmp_path)
        blob = file.read_bytes()
        own = some(2, after=journal.head)
        with no_file_larger_than(len(blob) + spare):
            for _ in range(2):
                with pytest.raises(DiskError, match=rf"{file.name}: the journal cannot be written: File too large"):
                    journal.intend(journal.head, own, "run")
                with pytest.raises(DiskError):
                    journal.append(own)
                assert (journal.head, journal.dangling) == (head_of(entries[-1]), None)
                assert journal.problem == f"{file}: the journal cannot be written: File too large"
                assert file.read_bytes() == blob
        journal.intend(journal.head, own, "run")
        assert journal.problem is None
        journal.committed(head_of(own[-1]))
    with Journal.open(tmp_path) as journal:
        assert (everything(journal), journal.torn) == ([*entries, *own], None)


@pytest.mark.parametrize("happened", [True, False])
def test_what_became_of_an_intent_counts_though_the_disk_is_full(tmp_path: Path, happened: bool) -> None:  # noqa: FBT001 - a parameter
    with Journal.open(tmp_path) as journal:
        entries = commit(journal)
        own = some(2, after=journal.head)
        journal.intend(journal.head, own, "run")
        settled: Callable[[], None] = partial(journal.committed, head_of(own[-1])) if happened else journal.void
        expected = [*entries, *own] if happened else [*entries]
        with no_file_larger_than(last_segment(tmp_path).stat().st_size + 10):
            with pytest.raises(DiskError):
                settled()
            assert (everything(journal), journal.dangling) == (expected, None)
            assert journal.head == head_of(expected[-1])
            assert journal.read(3, limit=1) == expected[3:4]
            with pytest.raises(DiskError):
                journal.intend(journal.head, some(1, after=journal.head), "run")
            shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
        assert everything(journal) == expected
        expected += commit(journal)
        assert everything(journal) == expected
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == expected
    with Journal.open(tmp_path / "copy") as killed:
        assert killed.dangling is not None
        assert everything(killed) == entries


def test_what_is_owed_is_written_by_the_next_sync_or_close(tmp_path: Path) -> None:
    for number, later in enumerate((Journal.sync, Journal.close)):
        with Journal.open(tmp_path / str(number)) as journal:
            own = some(2)
            journal.intend(GENESIS, own, "run")
            with no_file_larger_than(1), pytest.raises(DiskError):
                journal.committed(head_of(own[-1]))
            later(journal)
            assert journal.problem is None
        with Journal.open(tmp_path / str(number)) as journal:
            assert (everything(journal), journal.dangling) == (own, None)


def test_a_segment_that_cannot_be_begun_leaves_nothing_behind(tmp_path: Path) -> None:
    with Journal.open(tmp_path, segment_bytes=1) as journal:
        entries = commit(journal)
        with no_file_larger_than(50), pytest.raises(DiskError):
            journal.intend(journal.head, some(1, after=journal.head), "run")
        assert len(segments(journal.slot)) == 1
        entries += commit(journal)
        assert everything(journal) == entries
        assert len(segments(journal.slot)) == 2


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("")
    with pytest.raises(DiskError, match=r"journal: the journal cannot be opened: File exists"):
        Journal.open(tmp_path / "journal")
    with pytest.raises(DiskError, match=r"the journal cannot be opened: Not a directory"):
        Journal.open(tmp_path / "journal" / "below")


def test_a_directory_that_takes_no_files_is_told(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="the journal cannot be opened: "):
        Journal.open(Path("/proc/self/task"))
    with no_file_larger_than(0), pytest.raises(DiskError, match="the journal cannot be opened: File too large"):
        Journal.open(tmp_path)
    with Journal.open(tmp_path) as journal:
        assert journal.slot.name == "0", "what failed has given the slot back"
        commit(journal)


def test_always_has_the_intent_on_disk_before_the_commit(tmp_path: Path, disk: Disk) -> None:
    with Journal.open(tmp_path, fsync="always") as journal:
        for count in (1, 2):
            entries = some(1, after=journal.head)
            journal.intend(journal.head, entries, "run")
            assert disk.synced == count
            journal.committed(head_of(entries[-1]))
            assert disk.synced == count


def test_interval_syncs_when_it_is_due(tmp_path: Path, disk: Disk) -> None:
    with Journal.open(tmp_path, sync_s=0.5) as journal:
        assert not journal.sync_if_due(10.0)
        commit(journal)
        assert disk.synced == 0
        assert journal.sync_if_due(10.1)
        assert not journal.sync_if_due(11.0)
        commit(journal)
        assert journal.sync_if_due(11.0)
        commit(journal)
        assert [journal.sync_if_due(now) for now in (11.1, 11.4, 11.5, 11.6)] == [False, False, True, False]
        assert disk.synced == 3
        commit(journal)
    assert disk.synced == 4, "closing syncs"


def test_a_segment_is_on_disk_before_the_next_is_begun(tmp_path: Path, disk: Disk) -> None:
    with Journal.open(tmp_path, segment_bytes=500) as journal:
        commit(journal)
        assert (disk.synced, len(segments(journal.slot))) == (0, 1)
        commit(journal)
        assert (disk.synced, len(segments(journal.slot))) == (1, 2)


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("lost", [b"", b"\0" * 3000], ids=["cut", "zeros"])
def test_what_a_failed_sync_leaves_unknown_is_written_again(
    tmp_path: Path,
    disk: Disk,
    lost: bytes,
    dangling: bool,  # noqa: FBT001 - a parameter
) -> None:
    with Journal.open(tmp_path) as journal:
        entries = commit(journal)
        journal.sync()
        on_disk = last_segment(tmp_path).read_bytes()
        entries += commit(journal)
        own = some(2, after=journal.head)
        if dangling:
            journal.intend(journal.head, own, "run")
        disk.fail = [True]
        journal.sync()
        assert (disk.synced, journal.problem) == (2, None)
        old, new = segments(journal.slot)
        assert new.name == f"events-{4:020d}.log"
        assert everything(journal) == entries
        if dangling:
            journal.committed(head_of(own[-1]))
            entries += own
        entries += commit(journal)
        assert everything(journal) == entries
    old.write_bytes(on_disk + lost)
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == entries


def test_a_committed_intent_is_written_again_with_its_intent(tmp_path: Path, disk: Disk) -> None:
    with Journal.open(tmp_path, fsync="always") as journal:
        entries = commit(journal)
        disk.fail = [True]
        journal.sync()
        assert [file.name for file in segments(journal.slot)] == [f"events-{1:020d}.1.log"], "the old one is all in it"
        entries += commit(journal)
        assert everything(journal) == entries
    with Journal.open(tmp_path, fsync="always") as journal:
        own = some(1, after=journal.head)
        journal.intend(journal.head, own, "run")
    with Journal.open(tmp_path) as journal:
        journal.committed(head_of(own[0]))
        disk.fail = [True]
        journal.sync()
        entries += own
        assert everything(journal) == entries
    with Journal.open(tmp_path) as journal:
        assert (everything(journal), journal.dangling) == (entries, None)


def test_an_intent_that_does_not_reach_the_disk_is_none(tmp_path: Path, disk: Disk) -> None:
    with Journal.open(tmp_path, fsync="always") as journal:
        entries = commit(journal)
        own = some(2, after=journal.head)
        disk.fail = [True, True]
        with pytest.raises(DiskError, match=r"events-.*log: cannot be synced: Input/output error"):
            journal.intend(journal.head, own, "run")
        assert journal.dangling is None
        assert "cannot be synced" in str(problem_of(journal))
        assert everything(journal) == entries
        disk.fail = [True, True]
        with pytest.raises(DiskError):
            journal.sync()
        entries += commit(journal)
        assert journal.problem is None
        assert everything(journal) == entries
    with Journal.open(tmp_path) as journal:
        assert (everything(journal), journal.dangling) == (entries, None)


def test_a_disk_that_neither_syncs_nor_writes_keeps_what_happened_in_memory(tmp_path: Path, disk: Disk) -> None:
    with Journal.open(tmp_path) as journal:
        entries = commit(journal)
        journal.sync()
        on_disk = last_segment(tmp_path).stat().st_size
        entries += commit(journal)
        journal.intend(journal.head, own := some(2, after=journal.head), "run")
        disk.fail = [True]
        with no_file_larger_than(10):
            with pytest.raises(DiskError):
                journal.sync()
            os.truncate(last_segment(tmp_path), on_disk)
            with pytest.raises(DiskError):
                journal.committed(head_of(own[-1]))
            entries += own
            assert everything(journal) == entries
            with pytest.raises(DiskError):
                journal.append(some(1, after=journal.head))
            assert "cannot be written: File too large" in str(problem_of(journal))
        assert journal.sync_if_due(1.0)
        assert journal.problem is None
        entries += commit(journal)
        assert everything(journal) == entries
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == entries


def test_what_cannot_be_written_during_a_sync_that_fails_is_kept_too(tmp_path: Path, disk: Disk) -> None:
    with Journal.open(tmp_path) as journal:
        journal.intend(GENESIS, own := some(2), "run")

        def meanwhile() -> None:
            with no_file_larger_than(10), pytest.raises(DiskError):
                journal.committed(head_of(own[-1]))

        disk.fail, disk.meanwhile = [True], meanwhile
        journal.sync()
        assert everything(journal) == own
    with Journal.open(tmp_path) as journal:
        assert (everything(journal), journal.dangling) == (own, None)


def test_a_part_of_a_record_that_could_not_be_cut_off_at_once_is_cut_off_later(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: int, _size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Journal.open(tmp_path) as journal:
        entries = commit(journal)
        size = last_segment(tmp_path).stat().st_size
        with monkeypatch.context() as patch, no_file_larger_than(size + 20):
            patch.setattr(os, "ftruncate", refuse)
            for problem in ("File too large", "Input/output error"):
                with pytest.raises(DiskError, match=problem):
                    journal.intend(journal.head, some(1, after=journal.head), "run")
            assert last_segment(tmp_path).stat().st_size == size + 20
        entries += commit(journal)
    with Journal.open(tmp_path) as journal:
        assert (everything(journal), journal.torn) == (entries, None)


def test_another_thread_may_sync_while_one_writes(tmp_path: Path, disk: Disk) -> None:
    entries: list[Entry] = []
    done = threading.Event()
    with Journal.open(tmp_path, segment_bytes=5000) as journal:

        def syncing() -> None:
            while not done.is_set():
                journal.sync()

        thread = threading.Thread(target=syncing)
        thread.start()
        try:
            for number in range(150):
                if number % 10 == 0:
                    disk.fail = [True]
                entries += commit(journal)
                journal.append(seen := some(1, after=journal.head))
                entries += seen
        finally:
            done.set()
            thread.join()
        assert everything(journal) == entries
    with Journal.open(tmp_path) as journal:
        assert everything(journal) == entries


# --- comparing, settling

LONG = some(6)
NOTHING: dict[int, str] = {}
HASHES = {0: GENESIS.hash} | {entry.seq: entry.hash for entry in LONG}
FORKED = {seq: digest for seq, digest in HASHES.items() if seq < 3} | {
    entry.seq: entry.hash for entry in some(4, after=head_of(LONG[1]), text="forked")
}


def at(hashes: dict[int, str], seq: int) -> Head:
    return Head(seq, hashes[seq])


@pytest.mark.parametrize(
    ("journal", "stream", "relation", "common"),
    [
        (0, 0, Relation.SAME, 0),
        (6, 6, Relation.SAME, 6),
        (0, 6, Relation.STREAM_LONGER, 0),
        (4, 6, Relation.STREAM_LONGER, 4),
        (6, 0, Relation.JOURNAL_LONGER, 0),
        (6, 4, Relation.JOURNAL_LONGER, 4),
    ],
)
def test_of_one_history_the_shorter_is_the_beginning(
    journal: int, stream: int, relation: Relation, common: int
) -> None:
    found = compare(at(HASHES, journal), HASHES.get, at(HASHES, stream), HASHES.get)
    assert found == Comparison(relation, at(HASHES, common))


@pytest.mark.parametrize(("journal", "stream"), [(3, 3), (3, 6), (6, 3), (4, 5), (5, 4)])
def test_two_histories_contradict(journal: int, stream: int) -> None:
    found = compare(at(HASHES, journal), HASHES.get, at(FORKED, stream), FORKED.get)
    assert found == Comparison(Relation.CONTRADICTION, None)


def test_a_stream_whose_beginning_was_archived_contradicts_nothing() -> None:
    archived = {seq: digest for seq, digest in HASHES.items() if seq >= 4}
    assert compare(at(HASHES, 6), HASHES.get, at(HASHES, 5), archived.get).relation is Relation.JOURNAL_LONGER
    assert compare(at(HASHES, 4), HASHES.get, at(HASHES, 6), archived.get).at == at(HASHES, 4)
    assert compare(at(HASHES, 0), HASHES.get, at(HASHES, 6), archived.get) == (Relation.STREAM_LONGER, GENESIS)
    assert compare(at(HASHES, 2), HASHES.get, at(HASHES, 6), archived.get) == (Relation.STREAM_LONGER, None)


def test_a_journal_that_begins_after_the_stream_ends_has_nothing_to_write_back() -> None:
    pruned = {seq: digest for seq, digest in HASHES.items() if seq >= 4}
    assert compare(at(HASHES, 6), pruned.get, at(HASHES, 4), HASHES.get).relation is Relation.JOURNAL_LONGER
    assert compare(at(HASHES, 6), pruned.get, at(HASHES, 3), HASHES.get).relation is Relation.CONTRADICTION


def test_an_emptied_stream_is_the_beginning_of_everything() -> None:
    assert compare(at(HASHES, 6), NOTHING.get, GENESIS, NOTHING.get) == (Relation.JOURNAL_LONGER, GENESIS)


def test_a_journal_and_a_stream_compare_with_their_own_functions(long: tuple[Path, list[Entry]]) -> None:
    directory, entries = long
    with Journal.open(directory) as journal:
        stream = {entry.seq: entry.hash for entry in entries[:9]}
        found = compare(journal.head, journal.hash_at, head_of(entries[8]), stream.get)
        assert found == (Relation.JOURNAL_LONGER, head_of(entries[8]))
        assert journal.read(9, limit=100) == entries[9:]


OWN = Intent(at(HASHES, 2), tuple(LONG[2:4]), "run 1")


@pytest.mark.parametrize(
    ("stream", "end", "server", "verdict"),
    [
        (HASHES, 4, "run 1", "committed"),
        (HASHES, 6, "run 2", "committed"),
        (HASHES, 3, "run 2", "committed"),
        (FORKED, 3, "run 1", "void"),
        (FORKED, 6, "run 2", "void"),
        ({6: HASHES[6]}, 6, "run 1", "void"),
        (HASHES, 2, "run 1", "void"),
        (HASHES, 2, "run 2", "lost"),
        (HASHES, 1, "run 1", "lost"),
        (HASHES, 0, "run 2", "lost"),
    ],
)
def test_what_became_of_an_intent_follows_from_the_stream(
    stream: dict[int, str], end: int, server: str, verdict: Verdict
) -> None:
    assert settle(OWN, at(stream, end) if end else GENESIS, stream.get, server) == verdict


def test_an_intent_half_of_which_is_in_the_stream_differently_is_void() -> None:
    other = some(1, after=at(HASHES, 3), text="other")[0]
    stream = HASHES | {4: other.hash}
    assert settle(OWN, at(stream, 4), stream.get, "run 1") == "void"


# --- any sequence

STEPS = (
    "intend", "intend", "committed", "committed", "void", "append", "own", "part", "reopen", "kill", "full", "sync",
    "unsynced", "read",
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from(STEPS), max_size=40),
    st.sampled_from([1, 700, 100_000]),
    st.sampled_from(["interval", "always"]),
)
def test_any_sequence_leaves_what_a_list_would_have(
    operations: Sequence[str], segment_bytes: int, fsync: Fsync
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        disk = Disk(patch)
        directory = Path(name) / "0"
        journal = stack.enter_context(Journal.open(directory, fsync=fsync, segment_bytes=segment_bytes))
        history: list[Entry] = []
        intent: list[Entry] = []
        for number, operation in enumerate(operations):
            end = head_of(history[-1]) if history else GENESIS
            match operation:
                case "intend" if not intent:
                    intent = some(1 + number % 3, after=end, text=f"own {number}")
                    journal.intend(end, intent, "run")
                case "committed" if intent:
                    journal.committed(head_of(intent[-1]))
                    history, intent = [*history, *intent], []
                case "void" if intent:
                    journal.void()
                    intent = []
                case "append":
                    seen = some(1 + number % 4, after=end, text=f"theirs {number}")
                    journal.append([*history[-2:], *seen])
                    history, intent = [*history, *seen], []
                case "own" | "part" if intent:
                    seen = intent[:1] if operation == "part" else intent
                    journal.append(seen)
                    history, intent = [*history, *seen], []
                case "reopen":
                    journal.close()
                    journal = stack.enter_context(Journal.open(directory, fsync=fsync, segment_bytes=segment_bytes))
                case "kill":
                    copy = Path(name) / str(number + 1)
                    shutil.copytree(directory, copy)
                    directory, journal = (
                        copy,
                        stack.enter_context(Journal.open(copy, fsync=fsync, segment_bytes=segment_bytes)),
                    )
                case "full":
                    with no_file_larger_than(60), pytest.raises(DiskError):
                        journal.append(some(1, after=end, text="full"))
                case "sync":
                    journal.sync()
                case "unsynced":
                    disk.fail = [True]
                    journal.sync()
                    disk.fail = []
                case "read":
                    after = number % (len(history) + 1)
                    assert journal.read(after, limit=3) == history[after : after + 3]
                case _:
                    pass
            assert journal.head == (head_of(history[-1]) if history else GENESIS)
            assert (list(journal.dangling.entries) if journal.dangling else []) == intent
            assert journal.torn is None
            assert sum(segment.index is not None for segment in journal._segments) <= 2, "memory does not grow"
        assert everything(journal) == history
        journal.close()
        with Journal.open(directory) as again:
            assert everything(again) == history
            assert (list(again.dangling.entries) if again.dangling else []) == intent
