"""A checkpoint is a cache: with it, without it, and with a bad one the state is the same."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest

from events import chain
from events.codec import decode
from events.keys import Keys
from events.store import MemoryStore, Write
from events.types import Entry
from governor.ledger import Ledger
from projections import checkpoint
from projections.checkpoint import CheckpointError
from projections.state import VERSION, State, digest, evolve, fold, initial
from tests.test_properties import walk

KEYS = Keys()


@lru_cache
def history(seed: int) -> list[Entry]:
    entries: list[Entry] = walk(seed).store.entries
    return entries


@pytest.fixture(autouse=True, scope="module")
def _histories() -> None:
    """Made before a test's own event loop runs: a walk runs one itself."""
    for seed in (3, 4, 6):
        history(seed)


def state_of(entries: list[Entry]) -> State:
    return fold(map(decode, entries))


@pytest.mark.parametrize("seed", range(4))
def test_at_every_prefix_the_live_the_folded_and_the_checkpointed_state_are_one(seed: int) -> None:
    entries = history(seed)
    live = initial()
    behind = initial()
    """Started from a checkpoint some events ago, and from that one again, and so on."""
    for count, recorded in enumerate(map(decode, entries), start=1):
        evolve(live, recorded)
        evolve(behind, recorded)
        if count % 7 == seed % 7:
            behind = checkpoint.read(checkpoint.write(behind))
        assert digest(checkpoint.read(checkpoint.write(live))) == digest(live) == digest(behind)
        if count % 50 == 0:
            assert digest(state_of(entries[:count])) == digest(live)
    assert live.seq == len(entries) > 100


def test_a_state_that_was_pruned_and_one_that_was_not_have_checkpoints_that_lead_on_alike() -> None:
    entries = history(5)
    half = len(entries) // 2
    first = checkpoint.read(checkpoint.write(state_of(entries[:half])))
    fold(map(decode, entries[half:]), first)
    assert digest(first) == digest(state_of(entries))


def damaged(value: bytes) -> dict[str, tuple[bytes, str]]:
    line, _, body = value.partition(b"\n")
    header = json.loads(line)
    other = json.dumps(header | {"version": VERSION + 1}).encode() + b"\n" + body
    moved = json.dumps(header | {"seq": header["seq"] + 1}).encode() + b"\n" + body
    return {
        "another version": (other, f"of version {VERSION + 1}"),
        "a body of another": (line + b"\n" + body[:-1] + bytes([body[-1] ^ 1]), "hash does not cover"),
        "a header of another": (moved, "hash does not cover"),
        "cut": (line, "hash does not cover"),
        "no header": (b"{}\n" + body, "cannot be read"),
        "no JSON": (b"\xff\xfe", "cannot be read"),
        "empty": (b"", "cannot be read"),
        "a list": (b"[1]\n", "cannot be read"),
    }


@pytest.mark.parametrize("case", list(damaged(checkpoint.write(initial()))))
def test_a_checkpoint_that_cannot_be_used_says_why(case: str) -> None:
    value, why = damaged(checkpoint.write(state_of(history(1))))[case]
    with pytest.raises(CheckpointError, match=why):
        checkpoint.read(value)


def test_a_checkpoint_written_with_a_key_is_read_only_with_that_key() -> None:
    state = state_of(history(2))
    value = checkpoint.write(state, key=b"k")
    assert digest(checkpoint.read(value, key=b"k")) == digest(state)
    for key in (None, b"other"):
        with pytest.raises(CheckpointError, match="hash does not cover"):
            checkpoint.read(value, key=key)


# -- how a start uses it -------------------------------------------------------------------------------------------


class CountingStore(MemoryStore):
    """Tells which events were read."""

    def __init__(self, entries: list[Entry]) -> None:
        super().__init__()
        self.entries = entries
        self.read_first: list[int] = []

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        found = await super().read(after, limit=limit)
        self.read_first += [found[0].seq] if found else []
        return found


async def opened(entries: list[Entry], value: bytes | None, **options: Any) -> tuple[Ledger, CountingStore]:
    store = CountingStore(entries)
    if value is not None:
        await store.write([Write("set", KEYS.snapshot, (value,))])
    ledger = Ledger(store, KEYS, lambda: 0, **options)
    await ledger.open()
    return ledger, store


@pytest.mark.parametrize("behind", [0, 1, 30])
async def test_a_start_reads_the_checkpoint_and_the_events_behind_it_only(behind: int) -> None:
    entries = history(3)
    kept = len(entries) - behind
    ledger, store = await opened(entries, checkpoint.write(state_of(entries[:kept])))
    assert (ledger.checkpoint_seq, ledger.state.seq) == (kept, len(entries))
    assert digest(ledger.state) == digest(state_of(entries))
    assert set(store.read_first) <= {kept + 1}


async def test_a_checkpoint_ahead_of_the_stream_of_another_history_or_damaged_is_ignored_with_one_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    entries, other = history(3), history(4)
    good = checkpoint.write(state_of(entries))
    foreign = state_of(entries[:90])
    foreign.hash = chain.link(foreign.hash, "X", 1, "1.000000", b"{}")
    for value, why in (
        (good, "the stream ends at event 100"),
        (checkpoint.write(foreign), "event 91: its hash does not cover"),
        (checkpoint.write(state_of(other[:100])), "event 100"),
        *damaged(good).values(),
    ):
        ledger, store = await opened(entries[:100], value)
        assert (ledger.checkpoint_seq, digest(ledger.state)) == (0, digest(state_of(entries[:100])))
        assert 1 in store.read_first
        told = capsys.readouterr()
        warnings = [line for line in (told.out + told.err).splitlines() if "checkpoint ignored" in line]
        assert len(warnings) == 1
        assert why in warnings[0]


async def test_a_checkpoint_is_one_write_and_the_next_start_uses_it() -> None:
    entries = history(6)
    ledger, store = await opened(entries, None)
    size = await ledger.write_checkpoint()
    held = store.get(KEYS.snapshot)
    assert held is not None
    assert len(held[0]) == size
    again, _ = await opened(entries, held[0])
    assert again.checkpoint_seq == len(entries)
