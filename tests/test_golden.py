"""Golden histories: every later program reads them, decides them alike and folds them to the same state."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from events.chain import GENESIS, verify
from events.codec import decode
from events.files import open_file
from events.types import ALL, Entry
from governor.replay import replay
from projections import checkpoint
from projections.state import VERSION, digest, evolve, fold, initial
from tests import golden

FILES = sorted(golden.DATA.glob("events-v*.jsonl"))
DIGESTS = json.loads((golden.DATA / "digests.json").read_text())
"""File, then version of the fold, to the digest of the state at the file's end."""


def entries(path: Path) -> list[Entry]:
    return list(verify(open_file(path)[1], after=GENESIS))


def test_there_is_one_for_every_version_of_the_events() -> None:
    wanted = {f"events-v{n}.jsonl" for n in range(1, golden.VERSION + 1)}
    assert {path.name for path in FILES} == wanted | {golden.path(name).name for name in golden.STORIES}


def test_todays_hold_every_event_there_is() -> None:
    found = {entry.name for name in golden.STORIES for entry in entries(golden.path(name))}
    assert found == {cls.NAME for cls in ALL}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_decided_again_without_a_difference(path: Path) -> None:
    header, read = open_file(path)
    found, _ = replay(read, expect=header.head)
    assert found.clean, found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_folds_to_the_state_it_folded_to_when_it_was_written(path: Path) -> None:
    """Where this fails, the fold changed: raise `projections.state.VERSION`, and add the new digest beside the old."""
    assert digest(fold(map(decode, entries(path)))) == DIGESTS[path.name][f"fold {VERSION}"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_at_every_event_checkpoint_and_tail_lead_to_the_same_state(path: Path) -> None:
    recorded = list(map(decode, entries(path)))
    live = initial()
    for at in range(len(recorded)):
        evolve(live, recorded[at])
        kept = checkpoint.read(checkpoint.write(live))
        assert digest(kept) == digest(live)
        assert digest(fold(recorded[at + 1 :], kept)) == DIGESTS[path.name][f"fold {VERSION}"]


@pytest.mark.parametrize("name", golden.STORIES)
def test_a_story_told_again_is_the_same_history(name: str) -> None:
    """The decider of today writes what it wrote then, byte for byte."""
    assert golden.entries(name) == entries(golden.path(name))


def test_numbers_of_a_golden_history_have_no_gap() -> None:
    for path in FILES:
        assert all(second.seq == first.seq + 1 for first, second in pairwise(entries(path)))
