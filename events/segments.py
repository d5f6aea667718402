"""The journal's files: segments of records, one a line, `<crc32 of the rest> <kind> <JSON>`.

    H  first of each segment: format, and the head before its first event
    I  the intent: what the next commit is about to append, whole, onto which head, and to which server
    C  the intent before was committed, up to this head
    V  the intent before did not happen; the head is still this one
    E  an event committed by somebody else, or by ourselves without an intent
    N  a note for whoever reads it: no part of the history

Errors:

    JournalError
     ├─ DiskError       it could not be written, synced or opened; what was to be written is not in it
     ├─ DamagedError    what is on disk is not what was written
     └─ MismatchError   what it was given does not continue what it holds
"""

from __future__ import annotations

import base64
import re
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import msgspec

from events import chain
from events.chain import GENESIS
from events.histories import Intent
from events.types import Entry, Head

_FORMAT, _VERSION = "governor-journal", 1
_SEGMENT = re.compile(r"events-(\d{20})(?:\.(\d+))?\.log")


class JournalError(Exception):
    """The journal cannot do what it was asked; the subclass says why."""


class DiskError(JournalError):
    """The disk is full, read-only or broken, or the directory cannot be used."""


class DamagedError(JournalError):
    """A record is not what was written, or the chain does not hold (with the key it was opened with)."""


class MismatchError(JournalError):
    """What was given does not continue what the journal holds."""


def head_of(entry: Entry) -> Head:
    """Head of a history that ends with this entry."""
    return entry.head


def told(head: Head) -> str:
    """Tell a head."""
    return f"{head.seq} ({head.hash[:8]}…)"


# --- records -------------------------------------------------------------------------------------------------------


class _Header(msgspec.Struct, frozen=True):
    format: str
    version: int
    after: Head


class _Stored(msgspec.Struct, frozen=True):
    event: str
    seq: int
    timestamp: str
    data: msgspec.Raw
    """The event's own bytes; as a string, in base64, where they would not come back as they were."""
    hash: str


class _StoredIntent(msgspec.Struct, frozen=True):
    expected: Head
    server: str
    entries: list[_Stored]


class _Object(msgspec.Struct, frozen=True):
    """Any JSON object."""


_ENCODE = msgspec.json.Encoder().encode
_OBJECT = msgspec.json.Decoder(_Object)
_HEADER = msgspec.json.Decoder(_Header)
_HEAD = msgspec.json.Decoder(Head)
_EVENT = msgspec.json.Decoder(_Stored)
_INTENT = msgspec.json.Decoder(_StoredIntent)


class Record(msgspec.Struct, frozen=True):
    """A line, and what it does to the history."""

    kind: Literal["I", "C", "V", "E", "N"]
    line: bytes
    before: Head
    """The head before it: where a segment that begins with it begins."""
    entries: tuple[Entry, ...] = ()
    """The events it makes part of the history."""


def _line(kind: str, payload: bytes) -> bytes:
    rest = b"%c %b" % (kind.encode(), payload)
    return b"%08x %b\n" % (zlib.crc32(rest), rest)


def parse(line: bytes) -> tuple[str, bytes] | None:
    """Kind and payload of a line without its end, or None when it is not whole."""
    rest = line[9:]
    if line[:9] != b"%08x " % zlib.crc32(rest) or rest[1:2] != b" ":
        return None
    return chr(rest[0]), rest[2:]


def _is_verbatim(data: bytes) -> bool:
    """Whether data inside a line comes back as the bytes it was: one JSON object, and nothing around it."""
    if data[:1] != b"{" or data[-1:] != b"}" or b"\n" in data:
        return False
    try:
        _OBJECT.decode(data)
    except msgspec.MsgspecError:
        return False
    return True


def _stored(entry: Entry) -> _Stored:
    data = entry.data if _is_verbatim(entry.data) else b'"%b"' % base64.b64encode(entry.data)
    return _Stored(entry.name, entry.seq, entry.timestamp, msgspec.Raw(data), entry.hash)


def _entry(stored: _Stored) -> Entry:
    data = bytes(stored.data)
    if data.startswith(b'"'):
        data = base64.b64decode(data[1:-1], validate=True)
    return Entry(stored.event, stored.seq, stored.timestamp, data, stored.hash)


def intent_record(intent: Intent) -> Record:
    """A commit about to be made, of events just encoded: their data needs no look to be known for JSON."""
    entries = [
        _Stored(each.name, each.seq, each.timestamp, msgspec.Raw(each.data), each.hash) for each in intent.entries
    ]
    payload = _ENCODE(_StoredIntent(intent.expected, intent.server, entries))
    return Record("I", _line("I", payload), intent.expected)


def entries_of(kind: str, payload: bytes) -> list[Entry]:
    """The entries an `I` or `E` holds."""
    return [_entry(stored) for stored in (_INTENT.decode(payload).entries if kind == "I" else [_EVENT.decode(payload)])]


def header_line(after: Head) -> bytes:
    """What a segment begins with."""
    return _line("H", _ENCODE(_Header(_FORMAT, _VERSION, after)))


def event_record(entry: Entry, before: Head) -> Record:
    """An event, after this head."""
    return Record("E", _line("E", _ENCODE(_stored(entry))), before, (entry,))


def note_record(text: str, head: Head) -> Record:
    """A note; the head stays."""
    return Record("N", _line("N", _ENCODE({"note": text})), head)


def committed_record(intent: Intent, count: int) -> Record:
    """That many of the intent's events are in the stream."""
    entries = intent.entries[:count]
    return Record("C", _line("C", _ENCODE(entries[-1].head)), intent.expected, entries)


def void_record(expected: Head) -> Record:
    """The intent after this head did not happen."""
    return Record("V", _line("V", _ENCODE(expected)), expected)


# --- a segment, read -----------------------------------------------------------------------------------------------


class Scan:
    """The fold over a segment's records.

    Args:
        key: of the chain, if it is keyed.
    """

    def __init__(self, key: bytes | None) -> None:
        self._key = key
        self._first = 0
        self.after: Head | None = None
        self.head = GENESIS
        self.index = array("Q")
        """Where the record of each event begins, by event."""
        self.intent: Intent | None = None
        self.intent_at = 0
        self.whole = 0
        """Bytes up to the end of the last whole record."""
        self.torn: str | None = None

    def read(self, path: Path, first: int, *, until: Head | None = None) -> Self:
        """Take in a segment.

        Args:
            path: of the segment.
            first: number of its first event, by its name.
            until: where the next segment begins; None for the last one, the end of which may be torn.

        Raises:
            DamagedError: naming file, line and problem.
            OSError: it cannot be read.
        """
        blob = path.read_bytes()
        number = 0
        self._first = first
        while self.whole < len(blob) and not self._reached(until):
            number += 1
            end = blob.find(b"\n", self.whole)
            record = parse(blob[self.whole : end]) if end >= 0 else None
            if record is None:
                if until is not None or _holds_a_record(blob[end + 1 :] if end >= 0 else b""):
                    raise DamagedError(f"{path}, line {number}: the record is not what was written (checksum)")
                self.torn = f"{path.name}: {len(blob) - self.whole} bytes after line {number - 1} were no whole record"
                break
            try:
                self._apply(*record)
            except (msgspec.MsgspecError, chain.ChainError, ValueError) as error:
                raise DamagedError(f"{path}, line {number}: {error}") from error
            self.whole = end + 1
        if until is not None and self.head != until:
            raise DamagedError(
                f"{path}, line {number}: it ends at event {told(self.head)}, the next one follows {told(until)}"
            )
        return self

    def _reached(self, until: Head | None) -> bool:
        return until is not None and self.after is not None and self.head.seq >= until.seq

    def _apply(self, kind: str, payload: bytes) -> None:
        if (self.after is None) != (kind == "H"):
            raise ValueError(
                f"a record {kind!r} where {'a header' if self.after is None else 'no header'} was expected"
            )
        match kind:
            case "H":
                self.after = self.head = _header(payload, self._first)
            case "I":
                self._no_intent(kind)
                stored = _INTENT.decode(payload)
                entries = tuple(_entry(each) for each in stored.entries)
                if stored.expected != self.head or not entries:
                    raise ValueError(f"an intent after event {stored.expected.seq}, expected {self.head.seq}")
                self._verify(entries)
                self.intent, self.intent_at = Intent(stored.expected, entries, stored.server), self.whole
            case "C":
                head = _HEAD.decode(payload)
                count = _count(self._one_intent(kind), head)
                self.index.extend([self.intent_at] * count)
                self.head, self.intent = head, None
            case "V":
                if _HEAD.decode(payload) != self._one_intent(kind).expected:
                    raise ValueError("an intent is void that is not the one before")
                self.intent = None
            case "E":
                self._no_intent(kind)
                entry = _entry(_EVENT.decode(payload))
                self._verify([entry])
                self.index.append(self.whole)
                self.head = entry.head
            case "N":
                _OBJECT.decode(payload)
            case _:
                raise ValueError(f"a record of unknown kind {kind!r}")

    def _verify(self, entries: Sequence[Entry]) -> None:
        for _ in chain.verify(entries, after=self.head, key=self._key):
            pass

    def _no_intent(self, kind: str) -> None:
        if self.intent is not None:
            raise ValueError(f"a record {kind!r} while the intent before is open")

    def _one_intent(self, kind: str) -> Intent:
        if self.intent is None:
            raise ValueError(f"a record {kind!r} without an intent before it")
        return self.intent


def _count(intent: Intent, head: Head) -> int:
    """How many of the intent's events lead to a head.

    Raises:
        ValueError: none of them does.
    """
    for count, entry in enumerate(intent.entries, 1):
        if entry.seq == head.seq and entry.hash == head.hash:
            return count
    raise ValueError(f"event {head.seq} is not one the intent before was about to commit")


def _header(payload: bytes, first: int) -> Head:
    header = _HEADER.decode(payload)
    if (header.format, header.version) != (_FORMAT, _VERSION):
        raise ValueError(
            f"format {header.format!r} version {header.version}, this program reads {_FORMAT!r} version {_VERSION}"
        )
    if header.after.seq != first - 1:
        raise ValueError(f"it follows event {header.after.seq}, by its name it follows {first - 1}")
    return header.after


def _holds_a_record(blob: bytes) -> bool:
    return any(parse(line) is not None for line in blob.split(b"\n")[:-1])


class Segment:
    """A segment's file. `index` is None until somebody reads it."""

    def __init__(self, path: Path, first: int, after: Head | None = None, index: array[int] | None = None) -> None:
        self.path = path
        self.first = first
        self.index = index
        self._after = after

    @property
    def after(self) -> Head:
        """The head before its first event."""
        if self._after is None:
            with self.path.open("rb") as file:
                record = parse(file.readline()[:-1])
            try:
                if record is None or record[0] != "H":
                    raise ValueError("no header")
                self._after = _header(record[1], self.first)
            except (msgspec.MsgspecError, ValueError) as error:
                raise DamagedError(f"{self.path}, line 1: {error}") from error
        return self._after


class Found(NamedTuple):
    """What a slot holds."""

    segments: list[Segment]
    scan: Scan
    """Of the last segment."""
    stillborn: list[Path]
    """Segments that ended before their header."""


def find(slot: Path, key: bytes | None) -> Found:
    """Read a slot: its names, and its last segment whole."""
    named = [(match, path) for path in slot.iterdir() if (match := _SEGMENT.fullmatch(path.name))]
    ordered = sorted((int(match[1]), int(match[2] or 0), path) for match, path in named)
    segments = [Segment(path, first) for first, _, path in ordered]
    stillborn: list[Path] = []
    torn = None
    while segments:
        scan = Scan(key).read(segments[-1].path, segments[-1].first)
        if scan.after is not None:
            segments[-1].index = scan.index
            scan.torn = torn or scan.torn
            return Found(segments, scan, stillborn)
        torn = torn or scan.torn or f"{segments[-1].path.name}: empty"
        stillborn.append(segments.pop().path)
    scan = Scan(key)
    scan.torn = torn
    return Found([], scan, stillborn)


def holds_events(directory: Path) -> bool:
    """Whether any slot of a journal's directory holds an event; False too where it may not be read. Takes no lock."""
    try:
        for path in directory.glob("*/events-*.log"):
            with path.open("rb") as file:
                if any(line[9:10] in (b"E", b"C") for line in file):
                    return True
    except OSError:
        pass
    return False
