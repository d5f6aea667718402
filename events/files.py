"""Exported event streams: a header, then one stored event a line, `.jsonl` or `.jsonl.zst` by name.

The first line is a JSON header: the format and its version, the head before the first event (`after`), the head at
the end, how many events there are, the timestamp of the first (`first_at`) and the latest one (`last_at`), and whether
the chain is keyed. Every other line is one event, `data` being the very bytes that are stored, so that grep and jq
work on it and its hash still covers it. There is exactly one way to write an entry as a line, and a line written in
any other is refused.

Writing verifies the chain. Reading does not: whoever reads holds the entries to `events.chain.verify`, as with any
stream. Nothing here holds more than a page of a file in memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, NamedTuple, Protocol, Self

import msgspec
import zstandard

from events import chain
from events.types import Entry, Head

FORMAT, VERSION = "governor-events", 1
PLAIN, COMPRESSED = ".jsonl", ".jsonl.zst"
MAX_LINE = 1 << 24
"""Bytes of a line; an event is far smaller, and a file without newlines must not fill the memory."""
_LEVEL = 3
_CHUNK = 1 << 13
"""Bytes read at once. Small, since what they decompress to is held in memory."""


class FileError(ValueError):
    """A file that is no exported event stream, is damaged, or does not fit the others."""

    def __init__(self, path: Path, problem: str, *, line: int | None = None) -> None:
        super().__init__(f"{path}: {problem}" if line is None else f"{path}: line {line}: {problem}")
        self.path = path
        self.line = line
        """Where it was found, the header being line 1; None where it is the file as a whole."""


class Header(NamedTuple):
    """What a file says about itself."""

    after: Head
    """The head before the first event."""
    head: Head
    events: int
    first_at: str | None
    """Timestamp of the first event; None where there is none."""
    last_at: str | None
    """The latest timestamp; that of the last event may be earlier, since clocks step back."""
    keyed: bool
    """Whether the chain was verified with a key."""


class _Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seq: int
    hash: str


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["governor-events"]
    version: int
    after: _Place
    head: _Place
    events: int
    first_at: str | None
    last_at: str | None
    keyed: bool


class _Kind(msgspec.Struct, frozen=True):
    """As much of a header as every version has."""

    format: Literal["governor-events"]
    version: int


class _Line(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    event: str
    seq: int
    timestamp: str
    data: msgspec.Raw
    hash: str


_ENCODE = msgspec.json.Encoder().encode
_DECODE = msgspec.json.Decoder(_Line).decode


class History(Protocol):
    """As much of a store as an export reads: `EventStore`, `FileStore` and others have it."""

    async def head(self) -> Head:
        """Where the history ends."""
        ...

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        """Entries after event number `after`, in order, at most `limit`."""
        ...


# ---------------------------------------------------------------------------------------------------------- writing


class Writer:
    """A file being written, a page of entries at a time. Nothing is there under its name before `close`.

    Leaving the `with` block without `close` leaves no file.

    Args:
        path: where to; a file of that name is replaced by `close`.
        after: the head before the first entry.
        key: `GOV_AUDIT_KEY`, if the chain is keyed.

    Raises:
        FileError: the name ends neither in `.jsonl` nor in `.jsonl.zst`.
        OSError: the directory cannot be written to.
    """

    def __init__(self, path: Path | str, *, after: Head = chain.GENESIS, key: bytes | None = None) -> None:
        self.path = Path(path)
        self.head = after
        """The last entry that was added."""
        self._after = after
        self._key = key
        self._first: str | None = None
        self._last: str | None = None
        self._compressed = _is_compressed(self.path)
        # The header tells what only the end knows, so the body waits in a file without a name.
        self._body: IO[bytes] = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 - closed by __exit__
        self._out: Any = _compressor().stream_writer(self._body, closefd=False) if self._compressed else self._body

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def add(self, entries: Iterable[Entry]) -> None:
        """The next entries.

        Raises:
            ChainError: they do not continue what was added before.
            ValueError: an entry that cannot be a line; the message names it.
            OSError: no space.
        """
        for entry in chain.verify(entries, after=self.head, key=self._key):
            self._out.write(line_of(entry))
            self._first = self._first or entry.timestamp
            self._last = _later(self._last, entry.timestamp)
            self.head = entry.head

    def close(self) -> Header:
        """Put the file in its place, safely on disk.

        Raises:
            OSError: it could not be written; what was there before is still there.
        """
        if self._compressed:
            self._out.close()
        header = Header(
            after=self._after,
            head=self.head,
            events=self.head.seq - self._after.seq,
            first_at=self._first,
            last_at=self._last,
            keyed=bool(self._key),
        )
        top = _header_line(header)
        self._put(_compressor().compress(top) if self._compressed else top)
        return header

    def discard(self) -> None:
        """Give up what was added; after `close` there is nothing to give up."""
        self._body.close()

    def _put(self, top: bytes) -> None:
        directory = self.path.parent
        descriptor, name = tempfile.mkstemp(dir=directory, prefix=f".{self.path.name}.", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(top)
                self._body.seek(0)
                shutil.copyfileobj(self._body, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self.path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
        sync(directory)


def write(
    path: Path | str, entries: Iterable[Entry], *, after: Head = chain.GENESIS, key: bytes | None = None
) -> Header:
    """Write a file of these entries, verifying them. Arguments and errors as for `Writer` and `Writer.add`."""
    with Writer(path, after=after, key=key) as writer:
        writer.add(entries)
        return writer.close()


async def export(history: History, path: Path | str, *, key: bytes | None = None, page: int = 1000) -> Header:
    """Write a whole history to a file, up to where it ends now.

    Raises:
        ChainError: it does not hold, or its beginning is missing; there is no file.
        FileError: the name is of no known kind, or the history ends before the head it claims to have.
        StoreError: it cannot be read.
    """
    head = await history.head()
    with Writer(path, key=key) as writer:
        while (left := head.seq - writer.head.seq) > 0:
            entries = await history.read(writer.head.seq, limit=min(page, left))
            if not entries:
                break
            writer.add(entries)
        if writer.head != head:
            raise FileError(
                writer.path,
                f"not written: the history ends at event {writer.head.seq} {writer.head.hash}, "
                f"expected event {head.seq} {head.hash}",
            )
        return writer.close()


def line_of(entry: Entry) -> bytes:
    """The line of an entry, with its newline.

    Raises:
        ValueError: its data is no JSON object, or holds a newline; nobody could read it back.
    """
    try:
        line: bytes = _encode(entry)
        if b"\n" in line:
            raise ValueError("it holds a newline")
        if len(line) >= MAX_LINE:
            raise ValueError(f"it is longer than {MAX_LINE} bytes")
        line.decode()
        _entry(line)  # nothing that could not be read back
    except ValueError as error:  # what msgspec and UTF-8 have to say included
        raise ValueError(f"event {entry.seq}: its data cannot be written as one line of JSON: {error}") from None
    return line + b"\n"


def sync(path: Path) -> None:
    """Have what was written to a file or directory on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)


def _header_line(header: Header) -> bytes:
    after, head = _Place(*header.after), _Place(*header.head)
    fields = (header.events, header.first_at, header.last_at, header.keyed)
    line: bytes = _ENCODE(_Header("governor-events", VERSION, after, head, *fields))
    return line + b"\n"


def _encode(entry: Entry) -> bytes:
    line: bytes = _ENCODE(_Line(entry.name, entry.seq, entry.timestamp, msgspec.Raw(entry.data), entry.hash))
    return line


def _later(latest: str | None, timestamp: str) -> str:
    """The later of two timestamps, by their digits, whatever they are."""
    return timestamp if latest is None else max(latest, timestamp, key=lambda one: (len(one), one))


def _is_compressed(path: Path) -> bool:
    if path.name.endswith((PLAIN, COMPRESSED)):
        return path.name.endswith(COMPRESSED)
    raise FileError(path, f"expected a name that ends in {PLAIN} or {COMPRESSED}")


# ---------------------------------------------------------------------------------------------------------- reading


def open_file(path: Path | str) -> tuple[Header, Iterator[Entry]]:
    """Header and entries of a file. The entries are read, and not verified, as they are asked for.

    A file that was cut ends before the header's head.

    Raises:
        FileError: no file, no header, another format or version; from the entries also: a line that is no entry,
            damaged compression, or a header that does not fit what follows it.
    """
    path = Path(path)
    header = read_header(path)
    return header, _entries(path, header)


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        FileError: no file, no header, another format or version.
    """
    with closing(_lines(path)) as lines:
        return _header(path, next(lines, b""))


def _header(path: Path, line: bytes) -> Header:
    try:
        kind = msgspec.json.decode(line, type=_Kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FileError(path, f"no header of an event export (format {FORMAT!r}): {error}", line=1) from None
    if kind.version != VERSION:
        raise FileError(path, f"format version {kind.version} (this program knows {VERSION})", line=1)
    try:
        read = msgspec.json.decode(line, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FileError(path, f"the header cannot be read: {error}", line=1) from None
    after, head = Head(read.after.seq, read.after.hash), Head(read.head.seq, read.head.hash)
    header = Header(after, head, read.events, read.first_at, read.last_at, read.keyed)
    holds = (
        (after.seq > 0 or after == chain.GENESIS)
        and 0 <= header.events == head.seq - after.seq
        and (header.events > 0 or after == head)
        and (header.events > 0) == (header.first_at is not None) == (header.last_at is not None)
        and _header_line(header) == line + b"\n"
    )
    if not holds:
        raise FileError(path, "the header contradicts itself, or was not written by this program", line=1)
    return header


def _entries(path: Path, header: Header) -> Iterator[Entry]:
    with closing(_lines(path)) as lines:
        if _header(path, next(lines, b"")) != header:
            raise FileError(path, "was replaced while it was read")
        latest: str | None = None
        for number, line in enumerate(lines, 1):
            try:
                entry = _entry(line)
            except ValueError as error:
                raise FileError(path, f"no event: {error}", line=number + 1) from None
            if number > header.events:
                raise FileError(path, f"event {entry.seq} behind the end, event {header.head.seq}", line=number + 1)
            if number == 1 and entry.seq == header.after.seq + 1 and entry.timestamp != header.first_at:
                raise FileError(path, f"the first event is of {entry.timestamp}, expected {header.first_at}", line=2)
            latest = _later(latest, entry.timestamp)
            if number == header.events and entry.seq == header.head.seq and latest != header.last_at:
                problem = f"the latest event is of {latest}, expected {header.last_at}"
                raise FileError(path, problem, line=number + 1)
            yield entry


def _entry(line: bytes) -> Entry:
    """The entry of a line without its newline. Raises ValueError."""
    read = _DECODE(line)
    entry = Entry(read.event, read.seq, read.timestamp, bytes(read.data), read.hash)
    if not entry.data.startswith(b"{"):
        raise ValueError("data is no JSON object")
    if _encode(entry) != line:
        raise ValueError("not written in the one way an event is written")
    return entry


def _lines(path: Path) -> Generator[bytes]:
    """Lines of a file without their newlines."""
    compressed = _is_compressed(path)
    number, rest = 1, b""
    try:
        with path.open("rb") as file:
            chunks: Iterator[bytes] = iter(partial(file.read, _CHUNK), b"")
            for chunk in _decompressed(chunks) if compressed else chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line
                    number += 1
                if len(rest) > MAX_LINE:
                    raise FileError(path, f"longer than {MAX_LINE} bytes", line=number)
    except zstandard.ZstdError as error:
        raise FileError(path, f"damaged compression here or up to 128 KiB behind: {error}", line=number) from error
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    if rest:
        raise FileError(path, "cut off, it has no end", line=number)


def _decompressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    frame: zstandard.ZstdDecompressionObj | None = None
    for chunk in chunks:
        rest = chunk
        while rest:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(rest)
            rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise zstandard.ZstdError("it is cut off")


# -------------------------------------------------------------------------------------------- several files as one


class FileStore:
    """One history from files and directories of them, read only, with `head` and `read` as a store has them.

    Files may overlap where they are of the same history. They are opened when they are read, one at a time.

    Args:
        paths: files, and directories whose `.jsonl` and `.jsonl.zst` files are meant.
        start: the head before the first event; None for wherever the files begin.

    Raises:
        FileError: no file, or a header that cannot be read; the files begin later than `start`, leave a gap, or are
            not of the same history. Reading them raises it as `open_file` does.
    """

    def __init__(self, paths: Iterable[Path | str], *, start: Head | None = chain.GENESIS) -> None:
        found = [(read_header(path), path) for path in _expand(map(Path, paths))]
        found.sort(key=lambda file: (file[0].after.seq, file[0].head.seq))
        self.files: Sequence[tuple[Header, Path]] = found
        self.after = _first(found, start)
        """The head before the first event."""
        self._claims: dict[int, tuple[str, Path]] = {}
        self.end = self._connect()
        """Where the last of them says that it ends."""
        self._seq: int | None = None
        """Event number behind which the cursor stands."""
        self._cursor: Iterator[Entry] = iter(())

    async def head(self) -> Head:
        """The same as `end`."""
        return self.end

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        """Entries after event number `after`, in order; fewer than `limit` only at the end.

        Quick where it continues the last read. Somewhere else it begins to read a file anew.

        Raises:
            FileError: one of these entries cannot be read; ask for fewer to have those before it.
        """
        if after != self._seq:
            self._cursor = self._from(after)
        self._seq = None  # a read that fails is no place to go on from
        found = list(islice(self._cursor, limit))
        self._seq = found[-1].seq if found else after
        return found

    def _connect(self) -> Head:
        """Hold each file to those before it, by what they say. Returns the last head."""
        head, owner = self.after, self.files[0][1]
        for header, path in self.files:
            if header.after.seq > head.seq:
                problem = f"begins after event {header.after.seq}, and {owner} before it ends at event {head.seq}"
                raise FileError(path, f"{problem}: give the files between them too")
            for place in (header.after, header.head):
                self._agree(place, path)
            if header.head.seq > head.seq:
                head, owner = header.head, path
        return head

    def _agree(self, place: Head, path: Path) -> None:
        claimed, other = self._claims.setdefault(place.seq, (place.hash, path))
        if claimed != place.hash:
            raise FileError(path, f"event {place.seq} is another one than {other} says it is")

    def _from(self, seq: int) -> Iterator[Entry]:
        """Entries after `seq`. Only what an overlap repeats is left out: disorder is for the chain to find."""
        for header, path in self.files:
            if header.head.seq <= seq:
                continue
            _, entries = open_file(path)
            repeated = header.after.seq < seq
            for entry in entries:
                if entry.seq in self._claims:
                    self._agree(entry.head, path)
                repeated = repeated and entry.seq <= seq
                if not repeated:
                    yield entry
            seq = header.head.seq


def _expand(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        files = [file for file in sorted(path.iterdir()) if file.name.endswith((PLAIN, COMPRESSED))]
        files = [file for file in files if not file.name.startswith(".")]
        if not files:
            raise FileError(path, f"a directory without any {PLAIN} or {COMPRESSED} file")
        yield from files


def _first(files: Sequence[tuple[Header, Path]], start: Head | None) -> Head:
    if not files:
        raise ValueError("no file to read")
    header, path = files[0]
    if start is None:
        return header.after
    if header.after.seq > start.seq:
        raise FileError(path, f"begins after event {header.after.seq}: give the files before it too")
    if header.after.seq == start.seq and header.after != start:
        raise FileError(path, f"does not continue event {start.seq} {start.hash}")
    return header.after
