import hashlib
import hmac
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from events.chain import GENESIS, ChainError, link, verify
from events.codec import encode_all
from events.types import Entry, ErrorRecorded, Head

AT = 1_763_870_400_123_456


def history(count: int = 5, *, key: bytes | None = None, after: Head = GENESIS) -> list[Entry]:
    events = [ErrorRecorded(kind="plan_lost", detail=f"ü {number}") for number in range(count)]
    return encode_all(events, after=after, at=AT, key=key)


def broken_at(entries: list[Entry], *, after: Head = GENESIS, key: bytes | None = None) -> tuple[int, list[int]]:
    """Where the chain breaks, and what was passed on before."""
    passed: list[int] = []

    def seen() -> Iterator[Entry]:
        for entry in verify(entries, after=after, key=key):
            passed.append(entry.seq)
            yield entry

    with pytest.raises(ChainError) as caught:
        list(seen())
    assert str(caught.value) == f"event {caught.value.seq}: {caught.value.problem}"
    return caught.value.seq, passed


def test_the_beginning_is_event_0_with_64_zeros() -> None:
    assert (GENESIS.seq, GENESIS.hash) == (0, "0" * 64)


def test_a_known_hash_stays_what_it_is() -> None:
    covered = b"0" * 64 + b"\nRECOVERED\n1\n1763870400.123456\n" + b'{"v":1}'
    assert link("0" * 64, "RECOVERED", 1, "1763870400.123456", b'{"v":1}') == hashlib.sha256(covered).hexdigest()
    assert (
        link("0" * 64, "RECOVERED", 1, "1763870400.123456", b'{"v":1}', key=b"secret")
        == hmac.new(b"secret", covered, hashlib.sha256).hexdigest()
    )


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(1, 10**12), st.binary(), st.binary())
def test_hash_is_that_of_the_parts_one_a_line(previous: str, seq: int, data: bytes, key: bytes) -> None:
    covered = b"\n".join([previous.encode(), b"E", str(seq).encode(), b"1.000000", data])
    expected = hmac.digest(key, covered, "sha256").hex() if key else hashlib.sha256(covered).hexdigest()
    assert link(previous, "E", seq, "1.000000", data, key=key) == expected


@pytest.mark.parametrize("key", [None, b"secret"])
def test_a_history_as_it_was_written_passes_whole(key: bytes | None) -> None:
    entries = history(key=key)
    assert list(verify(entries, key=key)) == entries
    after = entries[1].head
    assert list(verify(entries[2:], after=after, key=key)) == entries[2:]
    assert list(verify([])) == []


@pytest.mark.parametrize(
    "change",
    [
        {"name": "PLAN_LOST"},
        {"timestamp": "1763870400.123457"},
        {"data": b'{"v":1,"kind":"plan_lost","detail":"another"}'},
        {"data": b""},
        {"hash": "0" * 64},
        {"hash": ""},
    ],
)
def test_a_changed_entry_breaks_the_chain_where_it_stands(change: dict[str, object]) -> None:
    entries = history()
    entries[2] = replace(entries[2], **change)
    assert broken_at(entries) == (3, [1, 2])


def test_an_entry_changed_together_with_its_hash_breaks_the_chain_after_it() -> None:
    entries = history()
    forged = link(entries[1].hash, entries[2].name, 3, entries[2].timestamp, b"{}")
    entries[2] = replace(entries[2], data=b"{}", hash=forged)
    assert broken_at(entries) == (4, [1, 2, 3])


@pytest.mark.parametrize(("order", "at"), [((0, 2, 3), 3), ((0, 0, 1), 1), ((1, 2), 2), ((0, 2, 1), 3)])
def test_a_missing_repeated_or_displaced_entry_breaks_the_chain(order: tuple[int, ...], at: int) -> None:
    entries = history()
    assert broken_at([entries[place] for place in order])[0] == at


def test_an_entry_with_another_number_breaks_the_chain() -> None:
    entries = history()
    entries[2] = replace(entries[2], seq=9)
    assert broken_at(entries) == (9, [1, 2])


@pytest.mark.parametrize("seq", [2, 4, 9])
def test_a_gap_whose_hashes_hold_breaks_the_chain_too(seq: int) -> None:
    first, second, _ = history(3)
    forged = link(second.hash, "RECOVERED", seq, second.timestamp, b"{}")
    assert broken_at([first, second, Entry("RECOVERED", seq, second.timestamp, b"{}", forged)]) == (seq, [1, 2])


def test_a_history_continues_only_the_one_before_it() -> None:
    entries = history(after=Head(3, "a" * 64))
    assert list(verify(entries, after=Head(3, "a" * 64))) == entries
    assert broken_at(entries, after=Head(3, "b" * 64)) == (4, [])
    assert broken_at(entries) == (4, [])


@pytest.mark.parametrize(("written", "read"), [(b"secret", None), (None, b"secret"), (b"secret", b"another")])
def test_a_history_needs_the_key_it_was_written_with(written: bytes | None, read: bytes | None) -> None:
    assert broken_at(history(key=written), key=read) == (1, [])


def test_an_empty_key_is_no_key() -> None:
    assert list(verify(history(key=b""), key=None)) == history()
