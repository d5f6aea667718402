"""An exported history is the history: byte for byte, and what was done to the file is found and located."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from events import chain, files
from events.chain import GENESIS, ChainError
from events.codec import encode_all
from events.files import FileError, FileStore, Header, Writer, export, open_file, read_header, write
from events.store import MemoryStore
from events.types import Entry, ErrorRecorded, Head
from governor.policy import Policy
from governor.replay import Replay, replay
from tests.test_replay import history as walked

AT = 1_763_870_400_123_456
NAMES = ("h.jsonl", "h.jsonl.zst")
either = pytest.mark.parametrize("name", NAMES)


@cache
def walk() -> tuple[tuple[Entry, ...], dict[str, Policy]]:
    entries, policies = walked(1)
    return tuple(entries), policies


def entries_of(
    count: int = 9, *, after: Head = GENESIS, key: bytes | None = None, at: int = AT, mark: str = ""
) -> list[Entry]:
    found: list[Entry] = []
    for number in range(count):
        event = ErrorRecorded(kind="plan_lost", detail=f"ü{mark} {number}")
        found += encode_all([event], after=after, at=at + number * 1_000_000, key=key)
        after = end_of(found)
    return found


def end_of(entries: list[Entry]) -> Head:
    return entries[-1].head


def body(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".zst":
        return data
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
        return reader.read()


def put(path: Path, data: bytes) -> Path:
    """A file of that content, compressed where its name says so."""
    path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(data) if path.suffix == ".zst" else data)
    return path


def audit(path: Path) -> Replay:
    header, entries = open_file(path)
    return replay(entries, expect=header.head, policies=walk()[1])[0]


# ---------------------------------------------------------------------------------------------------- round trips


@either
@pytest.mark.parametrize("key", [None, b"secret"])
def test_what_is_written_is_read_again_byte_for_byte(tmp_path: Path, name: str, key: bytes | None) -> None:
    entries = entries_of(key=key)
    written = write(tmp_path / name, entries, key=key)
    header, read = open_file(tmp_path / name)
    assert list(read) == entries
    assert header == written == Header(
        after=GENESIS,
        head=end_of(entries),
        events=9,
        first_at="1763870400.123456",
        last_at="1763870408.123456",
        keyed=bool(key),
    )  # fmt: skip
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [name]


@either
def test_a_real_history_is_audited_from_its_file_as_from_the_stream(tmp_path: Path, name: str) -> None:
    entries, policies = walk()
    write(tmp_path / name, entries)
    assert audit(tmp_path / name) == replay(entries, expect=end_of(list(entries)), policies=policies)[0]


def test_the_lines_are_json_for_any_other_tool(tmp_path: Path) -> None:
    entries = entries_of(2)
    write(tmp_path / "h.jsonl", entries)
    zeros, (one, two) = "0" * 64, entries
    top = (
        f'{{"format":"governor-events","version":1,"after":{{"seq":0,"hash":"{zeros}"}},'
        f'"head":{{"seq":2,"hash":"{two.hash}"}},"events":2,'
        '"first_at":"1763870400.123456","last_at":"1763870401.123456","keyed":false}\n'
    )
    lines = [
        f'{{"event":"ERROR_RECORDED","seq":{entry.seq},"timestamp":"{entry.timestamp}",'
        f'"data":{entry.data.decode()},"hash":"{entry.hash}"}}\n'
        for entry in (one, two)
    ]
    assert (tmp_path / "h.jsonl").read_text(encoding="utf-8") == top + "".join(lines)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_the_zstd_program_reads_a_compressed_file(tmp_path: Path) -> None:
    write(tmp_path / "h.jsonl.zst", entries_of())
    out = subprocess.run(["zstd", "-dc", tmp_path / "h.jsonl.zst"], capture_output=True, check=True).stdout
    assert [json.loads(line).get("seq") for line in out.splitlines()] == [None, *range(1, 10)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner, max_size=3)
)


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=9),
            st.dictionaries(st.text(), json_values, max_size=3),
            st.booleans(),
            st.integers(0, 2**53),
        ),
        max_size=5,
    )
)
def test_whatever_an_event_holds_comes_back_as_it_was(tmp_path_factory: Any, events: list[Any]) -> None:
    directory = tmp_path_factory.mktemp("any")
    entries: list[Entry] = []
    head = GENESIS
    for name, value, escaped, at in events:
        try:
            data = json.dumps(value, ensure_ascii=escaped).encode()
        except UnicodeEncodeError:
            continue
        timestamp = f"{at // 1_000_000}.{at % 1_000_000:06d}"
        digest = chain.link(head.hash, name, head.seq + 1, timestamp, data)
        entries.append(Entry(name, head.seq + 1, timestamp, data, digest))
        head = end_of(entries)
    for name in NAMES:
        header = write(directory / name, entries)
        assert list(chain.verify(open_file(directory / name)[1])) == entries
        assert (header.head, header.events) == (head, len(entries))


@either
def test_an_empty_history_has_a_file_too(tmp_path: Path, name: str) -> None:
    header = write(tmp_path / name, [])
    assert header == Header(GENESIS, GENESIS, 0, None, None, False)
    assert (read_header(tmp_path / name), list(open_file(tmp_path / name)[1])) == (header, [])


def test_the_latest_time_is_kept_where_the_clock_stepped_back(tmp_path: Path) -> None:
    entries = entries_of(2)
    entries += encode_all([ErrorRecorded(kind="plan_lost", detail="x")], after=end_of(entries), at=5_000_000)
    header = write(tmp_path / "h.jsonl", entries)
    assert (header.first_at, header.last_at) == ("1763870400.123456", "1763870401.123456")
    assert list(open_file(tmp_path / "h.jsonl")[1]) == entries


# -------------------------------------------------------------------------------------------------------- writing


@either
def test_a_broken_chain_leaves_no_file_and_an_older_one_as_it_was(tmp_path: Path, name: str) -> None:
    entries = entries_of()
    broken = [*entries[:4], *entries[5:]]
    with pytest.raises(ChainError, match="event 6: follows event 4"):
        write(tmp_path / name, broken)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / name, entries[:2])
    with pytest.raises(ChainError):
        write(tmp_path / name, broken)
    assert list(open_file(tmp_path / name)[1]) == entries[:2]
    with pytest.raises(ChainError, match="event 1"):
        write(tmp_path / name, entries, key=b"another")


@either
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_disk_that_fails_leaves_no_file(
    tmp_path: Path, name: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / name, entries_of())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a":\n1}', "newline"),
        (b"[1]", "no JSON object"),
        (b"12", "no JSON object"),
        (b"", "malformed"),
        (b'{"a":', "malformed|truncated"),
        (b'{"a":"\xff"}', "utf-8"),
        (b' {"a":1}', "one way"),
        (b'{"a":1},"data":{"b":2}', "one way"),
        (b'{"a":"' + b"x" * files.MAX_LINE + b'"}', "longer than"),
    ],
)
def test_data_that_cannot_be_a_line_is_refused_and_named(tmp_path: Path, data: bytes, why: str) -> None:
    entry = Entry("RECOVERED", 1, "1.000000", data, chain.link(GENESIS.hash, "RECOVERED", 1, "1.000000", data))
    with pytest.raises(ValueError, match=rf"event 1: its data cannot be written as one line of JSON: .*({why})"):
        write(tmp_path / "h.jsonl", [entry])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["h", "h.json", "h.zst", "h.jsonl.gz"])
def test_a_name_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match=r"expected a name that ends in \.jsonl or \.jsonl\.zst"):
        Writer(tmp_path / name)
    (tmp_path / name).write_bytes(b"{}\n")
    with pytest.raises(FileError, match=r"expected a name that ends in"):
        open_file(tmp_path / name)


@either
async def test_a_store_is_exported_up_to_where_it_ends(tmp_path: Path, name: str) -> None:
    store = MemoryStore()
    store.entries = entries_of(25)
    header = await export(store, tmp_path / name, page=10)
    assert (header.events, header.head) == (25, end_of(store.entries))
    store.entries = store.entries[5:]
    with pytest.raises(ChainError, match="event 6: follows event 0"):
        await export(store, tmp_path / name)
    assert read_header(tmp_path / name) == header


@either
async def test_a_file_that_was_cut_is_not_exported_again_as_if_it_were_whole(tmp_path: Path, name: str) -> None:
    entries = entries_of()
    write(tmp_path / name, entries)
    put(tmp_path / name, b"".join(body(tmp_path / name).splitlines(keepends=True)[:-2]))
    with pytest.raises(FileError, match=r"the history ends at event 7 .*expected event 9"):
        await export(FileStore([tmp_path / name]), tmp_path / "again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()


# -------------------------------------------------------------------------------------------------------- reading


def replaced(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda header: header | changes


@either
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (replaced(format="another"), "no header of an event export"),
        (replaced(version=2), r"format version 2 \(this program knows 1\)"),
        (replaced(version="1"), "no header"),
        (replaced(more=1), "unknown field `more`"),
        (replaced(events=8), "contradicts itself"),
        (replaced(after={"seq": 1, "hash": "0" * 64}), "contradicts itself"),
        (replaced(after={"seq": 0, "hash": "1" * 64}), "contradicts itself"),
        (replaced(first_at=None), "contradicts itself"),
        (replaced(keyed=1), "cannot be read"),
    ],
)
def test_a_header_that_is_none_is_told_in_words(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]], problem: str
) -> None:
    write(tmp_path / name, entries_of())
    first, rest = body(tmp_path / name).split(b"\n", 1)
    put(tmp_path / name, json.dumps(change(json.loads(first)), separators=(",", ":")).encode() + b"\n" + rest)
    with pytest.raises(FileError, match=rf"{name}: line 1: .*{problem}"):
        open_file(tmp_path / name)


@either
@pytest.mark.parametrize("data", [b"", b"\n", b"PK\x03\x04", b"{}\n", b'{"event":"X"}\n', b"\xff\xfe\n"])
def test_another_file_is_no_event_export(tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(FileError, match=rf"{name}: line 1: "):
        open_file(put(tmp_path / name, data))


def test_a_file_that_is_not_there_or_not_compressed_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no\.jsonl: cannot be read: No such file"):
        open_file(tmp_path / "no.jsonl")
    (tmp_path / "h.jsonl.zst").write_bytes(b"{}\n")
    with pytest.raises(FileError, match="line 1: damaged compression"):
        open_file(tmp_path / "h.jsonl.zst")


@either
def test_a_line_without_an_end_does_not_fill_the_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_LINE", 100_000)
    put(tmp_path / name, b"x" * 1_000_000)
    with pytest.raises(FileError, match="line 1: longer than 100000 bytes"):
        open_file(tmp_path / name)


def test_an_entry_is_written_in_one_way_only(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    write(path, entries_of())
    lines = path.read_bytes().split(b"\n")
    for line in (lines[3] + b" ", lines[3] + b"\r", lines[3].replace(b'"seq":3', b'"seq":2,"seq":3')):
        path.write_bytes(b"\n".join([*lines[:3], line, *lines[4:]]))
        with pytest.raises(FileError, match="line 4: no event: not written in the one way"):
            list(open_file(path)[1])


def test_a_file_replaced_between_header_and_entries_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "h.jsonl", entries_of())
    _, entries = open_file(tmp_path / "h.jsonl")
    write(tmp_path / "h.jsonl", entries_of(4))
    with pytest.raises(FileError, match="was replaced"):
        next(entries)


# ------------------------------------------------------------------------------------------------------- tampering


def broken_at(found: Replay) -> int:
    assert isinstance(found.chain, dict), found.chain
    at: int = found.chain["broken_at"]
    return at


@either
@pytest.mark.parametrize(
    ("change", "at"),
    [
        (lambda lines: [*lines[:20], *lines[21:]], 21),  # line 20 of the list is event 20
        (lambda lines: [*lines[:20], *lines[22:]], 22),
        (lambda lines: [*lines[:20], lines[21], lines[20], *lines[22:]], 21),
        (lambda lines: [*lines[:20], lines[30], *lines[21:30], lines[20], *lines[31:]], 30),
        (lambda lines: [*lines[:20], lines[19], *lines[20:]], 19),
        (lambda lines: [*lines[:20], lines[40], *lines[20:]], 40),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: [*lines, lines[-1]], None),
    ],
    ids=["dropped", "two dropped", "swapped", "swapped far", "repeated", "inserted", "first dropped", "last repeated"],
)
def test_lines_dropped_swapped_or_put_in_are_located(tmp_path: Path, name: str, change: Any, at: int | None) -> None:
    entries, _ = walk()
    write(tmp_path / name, entries)
    put(tmp_path / name, b"".join(change(body(tmp_path / name).splitlines(keepends=True))))
    assert broken_at(audit(tmp_path / name)) == (at or len(entries) + 1)


@either
@pytest.mark.parametrize("left", [1, 2, 300, -1])
def test_a_tail_cut_at_a_line_is_incomplete(tmp_path: Path, name: str, left: int) -> None:
    entries, _ = walk()
    write(tmp_path / name, entries)
    lines = body(tmp_path / name).splitlines(keepends=True)[:left]
    put(tmp_path / name, b"".join(lines))
    found = audit(tmp_path / name)
    assert (found.chain, found.complete, found.clean) == ("ok", False, False)
    assert found.events == len(lines) - 1


@either
@pytest.mark.parametrize("cut", [1, 2, 70, 5000])
def test_a_tail_cut_inside_a_line_is_located(tmp_path: Path, name: str, cut: int) -> None:
    entries, _ = walk()
    write(tmp_path / name, entries)
    data = body(tmp_path / name)[:-cut]
    put(tmp_path / name, data)
    whole = data.count(b"\n") - 1
    found = audit(tmp_path / name)
    assert broken_at(found) == whole + 1
    assert isinstance(found.chain, dict)
    assert f"line {whole + 2}: cut off" in found.chain["problem"]


@pytest.mark.parametrize("cut", [1, 4, 5, 100, 5000])
def test_a_tail_cut_from_the_compressed_bytes_is_located(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "h.jsonl.zst"
    write(path, walk()[0])
    path.write_bytes(path.read_bytes()[:-cut])
    found = audit(path)
    assert isinstance(found.chain, dict)
    assert "damaged compression" in found.chain["problem"]
    assert "it is cut off" in found.chain["problem"]


def test_every_flipped_byte_of_a_file_is_found_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    entries = entries_of(4)
    write(path, entries)
    data = path.read_bytes()
    for place in range(len(data)):
        line = data.count(b"\n", 0, place) + 1
        for bit in (1, 2, 4, 0x20, 0x80):
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            found: Replay | None = None
            with suppress(FileError):
                found = audit(path)
            assert found is None or not found.clean, (place, bit)
            if line > 1:
                assert found is not None
                assert isinstance(found.chain, dict)
                assert found.events == line - 2, "what stands before it was read"


def test_no_flipped_byte_of_a_compressed_file_changes_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl.zst"
    entries = entries_of(4)
    write(path, entries)
    data = path.read_bytes()
    harmless = 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        try:
            harmless += audit(path).clean
            assert list(open_file(path)[1])[: len(entries)] == entries
        except FileError:
            continue
    assert harmless <= 4, "bits of the frame headers that mean nothing"


# ------------------------------------------------------------------------------------------- several files as one


def parts(directory: Path, *ends: int, name: str = "part", count: int = 30) -> tuple[list[Path], list[Entry]]:
    """A history of 30 as files that end at these events."""
    entries = entries_of(count)
    paths = []
    begin = 0
    for end in (*ends, count):
        after = end_of(entries[:begin]) if begin else GENESIS
        paths.append(directory / f"{name}-{begin:02}.jsonl{'.zst' if begin % 2 else ''}")
        write(paths[-1], entries[begin:end], after=after)
        begin = end
    return paths, entries


async def all_of(store: FileStore, *, page: int = 7, after: int = 0) -> list[Entry]:
    found: list[Entry] = []
    while entries := await store.read(after, limit=page):
        found += entries
        after = entries[-1].seq
    return found


async def test_several_files_are_one_history_in_whatever_order_they_are_given(tmp_path: Path) -> None:
    paths, entries = parts(tmp_path, 11, 12, 25)
    for given_paths in (paths, paths[::-1], [tmp_path], [paths[1], tmp_path]):
        store = FileStore(given_paths)
        assert await store.head() == end_of(entries)
        assert await all_of(store) == entries
    assert [len(await store.read(seq, limit=7)) for seq in (0, 23, 25, 30, 99)] == [7, 7, 5, 0, 0]


async def test_a_read_elsewhere_starts_over_and_a_continued_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, entries = parts(tmp_path, 11)
    opened: list[Path] = []
    real = files.open_file

    def counted(path: Path) -> Any:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(files, "open_file", counted)
    store = FileStore(paths)
    assert await all_of(store, page=1) == entries
    assert opened == paths
    assert await store.read(3, limit=2) == entries[3:5]
    assert await store.read(29) == entries[29:]
    assert opened == [*paths, paths[0], paths[1]]


async def test_files_may_overlap_where_they_are_the_same_history(tmp_path: Path) -> None:
    entries = entries_of(30)
    write(tmp_path / "a.jsonl", entries[:20])
    write(tmp_path / "b.jsonl", entries[10:25], after=end_of(entries[:10]))
    write(tmp_path / "c.jsonl", entries[14:16], after=end_of(entries[:14]))
    write(tmp_path / "d.jsonl", entries[5:], after=end_of(entries[:5]))
    store = FileStore([tmp_path])
    assert (await all_of(store), await store.head()) == (entries, end_of(entries))
    assert await all_of(store, after=17) == entries[17:]


async def test_files_that_begin_late_or_leave_a_gap_or_are_another_history_are_refused(tmp_path: Path) -> None:
    paths, entries = parts(tmp_path, 10, 20)
    with pytest.raises(FileError, match=r"part-10\.jsonl: begins after event 10: give the files before it too"):
        FileStore(paths[1:])
    late = FileStore(paths[1:], start=None)
    assert (late.after, await all_of(late)) == (end_of(entries[:10]), entries[10:])
    assert await all_of(FileStore(paths[1:], start=end_of(entries[:10]))) == entries[10:]
    with pytest.raises(FileError, match=r"part-10\.jsonl: does not continue event 10 0000"):
        FileStore(paths[1:], start=Head(10, "0" * 64))
    with pytest.raises(FileError, match=r"part-20\.jsonl: begins after event 20, and .*part-00\.jsonl before it ends"):
        FileStore([paths[0], paths[2]])
    other = entries_of(30, mark="!")
    write(paths[1], other[10:20], after=end_of(other[:10]))
    with pytest.raises(FileError, match=r"part-10\.jsonl: event 10 is another one than .*part-00\.jsonl says it is"):
        FileStore(paths)
    with pytest.raises(ValueError, match="no file"):
        FileStore([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="a directory without any"):
        FileStore([tmp_path / "empty"])


async def test_an_overlap_of_another_history_is_found_where_it_is_read(tmp_path: Path) -> None:
    entries, other = entries_of(30), entries_of(30, mark="!")
    write(tmp_path / "a.jsonl", entries[:20])
    write(tmp_path / "b.jsonl", other[10:], after=end_of(other[:10]))
    store = FileStore([tmp_path])
    assert await store.read(0, limit=9) == entries[:9]
    with pytest.raises(FileError, match=r"a\.jsonl: event 10 is another one than .*b\.jsonl says it is"):
        await store.read(9)


async def test_a_file_that_ends_early_ends_before_the_head_it_claims(tmp_path: Path) -> None:
    paths, entries = parts(tmp_path)
    put(paths[0], b"".join(body(paths[0]).splitlines(keepends=True)[:-5]))
    store = FileStore(paths)
    assert await all_of(store) == entries[:-5]
    assert await store.head() == end_of(entries)


async def test_a_file_that_ends_early_before_another_breaks_the_chain_there(tmp_path: Path) -> None:
    paths, entries = parts(tmp_path, 10)
    put(paths[0], b"".join(body(paths[0]).splitlines(keepends=True)[:-2]))
    found = await all_of(FileStore(paths))
    assert found == entries[:8] + entries[10:]
    with pytest.raises(ChainError, match="event 11: follows event 8"):
        list(chain.verify(found))


async def test_a_repeated_line_at_the_beginning_of_a_later_file_is_not_taken_for_an_overlap(tmp_path: Path) -> None:
    paths, entries = parts(tmp_path, 10)
    write(paths[1].with_name("b.jsonl"), entries[10:], after=end_of(entries[:10]))
    paths = [paths[0], paths[1].with_name("b.jsonl")]
    top, *lines = body(paths[1]).splitlines(keepends=True)
    first = body(paths[0]).splitlines(keepends=True)[-1]
    put(paths[1], b"".join([top.replace(entries[10].timestamp.encode(), entries[9].timestamp.encode()), first, *lines]))
    with pytest.raises(ChainError, match="event 10: follows event 10"):
        list(chain.verify(await FileStore(paths).read(0, limit=15)))


@either
async def test_a_page_is_never_short_because_of_damage_behind_it(tmp_path: Path, name: str) -> None:
    entries = entries_of(30)
    write(tmp_path / name, entries)
    lines = body(tmp_path / name).splitlines(keepends=True)
    put(tmp_path / name, b"".join([*lines[:13], b"#" + lines[13], *lines[14:]]))
    store = FileStore([tmp_path / name])
    for after, limit in ((0, 1000), (0, 13), (12, 1), (12, 1)):
        with pytest.raises(FileError, match="line 14: no event"):
            await store.read(after, limit=limit)
    assert await store.read(0, limit=12) == entries[:12]
    assert await store.read(5, limit=3) == entries[5:8]
