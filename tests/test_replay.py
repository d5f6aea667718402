"""The auditor finds what was changed, and nothing where nothing was."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from events import chain
from events.codec import decode, encode
from events.types import Decision, Entry, Event, Head, Throttled
from governor.policy import Policy
from governor.replay import Replay, replay
from projections.state import digest, fold
from tests.test_properties import walk

World = Any


def history(seed: int = 1) -> tuple[list[Entry], dict[str, Policy]]:
    world = walk(seed)
    return list(world.store.entries), {"s": world.policy}


def rechained(entries: list[Entry], change: dict[int, Event | None], more: list[Event] | None = None) -> list[Entry]:
    """A history somebody wrote again whole: the chain holds, but events were changed, or left out (None)."""
    head, found = chain.GENESIS, []
    for recorded in map(decode, entries):
        event = change.get(recorded.seq, recorded.event)
        for each in ([] if event is None else [event]) + (more or [] if recorded.seq == len(entries) else []):
            found.append(encode(each, after=head, at=recorded.at))
            head = found[-1].head
    return found


def audit(entries: list[Entry], policies: dict[str, Policy], **options: Any) -> Replay:
    return replay(entries, policies=policies, **options)[0]


@pytest.mark.parametrize("seed", range(6))
def test_what_was_decided_live_is_decided_again_without_a_difference(seed: int) -> None:
    entries, policies = history(seed)
    found, state = replay(entries, policies=policies)
    assert found.differences == ()
    assert found.clean
    assert (found.events, found.chain) == (len(entries), "ok")
    assert found.digest == digest(state) == digest(fold(map(decode, entries)))
    assert found.plans == found.decisions == state.counts.plans


def first(entries: list[Entry], verdict: str) -> tuple[int, Decision]:
    for recorded in map(decode, entries):
        if isinstance(recorded.event, Decision) and recorded.event.verdict == verdict:
            return recorded.seq, recorded.event
    raise AssertionError(verdict)


def test_a_verdict_somebody_turned_is_found_although_the_chain_was_written_again() -> None:
    entries, policies = history()
    seq, event = first(entries, "BLOCK")
    turned = msgspec.structs.replace(event, verdict="EXECUTE", reason=None)
    found = audit(rechained(entries, {seq: turned}), policies)
    assert found.chain == "ok"
    assert {d.field for d in found.differences if d.seq == seq} >= {"verdict", "reason"}
    assert found.differences[0].seq == seq


def test_a_mark_price_somebody_changed_is_found_by_what_it_leads_to() -> None:
    entries, policies = history()
    seq, event = next(
        (r.seq, r.event)
        for r in map(decode, entries)
        if isinstance(r.event, Decision) and r.event.verdict == "EXECUTE" and r.event.mark_price
    )
    assert event.mark_price is not None
    changed = msgspec.structs.replace(event, mark_price=event.mark_price / 2)
    found = audit(rechained(entries, {seq: changed}), policies)
    assert (seq, "computed_notional") in {(d.seq, d.field) for d in found.differences}


def test_a_decision_left_out_and_one_nobody_asked_for_are_found() -> None:
    entries, policies = history()
    seq, _ = first(entries, "BLOCK")
    assert audit(rechained(entries, {seq: None}), policies).differences[0].field == "event"
    spare = Throttled(symbol="BTCUSDT", reason="hourly_limit_exceeded", until_us=0)
    (difference,) = audit(rechained(entries, {}, [spare]), policies).differences
    assert (difference.field, difference.recorded, difference.computed) == ("event", "THROTTLED", None)


def test_other_settings_than_those_in_force_are_found() -> None:
    entries, policies = history()
    loosened = msgspec.structs.replace(policies["s"], kill_score_critical=None, max_plan_age_us=None)
    assert not audit(entries, {"s": loosened}).clean


@pytest.mark.parametrize("seq", [1, 7, 50])
def test_a_flipped_byte_is_located(seq: int) -> None:
    entries, policies = history()
    entry = entries[seq - 1]
    entries[seq - 1] = msgspec.structs.replace(entry, data=bytes([entry.data[0] ^ 1]) + entry.data[1:])
    found = audit(entries, policies)
    assert isinstance(found.chain, dict)
    assert found.chain["broken_at"] == seq
    assert found.events == seq - 1


def test_a_dropped_a_swapped_and_an_inserted_entry_are_located() -> None:
    entries, policies = history()
    assert audit(entries[:9] + entries[10:], policies).chain == {
        "broken_at": 11,
        "problem": "follows event 9, expected 10",
    }
    swapped = [*entries[:9], entries[10], entries[9], *entries[11:]]
    assert audit(swapped, policies).chain == {"broken_at": 11, "problem": "follows event 9, expected 10"}
    inserted = [*entries[:9], entries[8], *entries[9:]]
    assert audit(inserted, policies).chain == {"broken_at": 9, "problem": "follows event 9, expected 10"}


def test_a_tail_that_was_cut_shows_against_a_head_kept_elsewhere() -> None:
    entries, policies = history()
    head = entries[-1].head
    assert audit(entries, policies, expect=head).complete
    cut = audit(entries[:-3], policies, expect=head)
    assert (cut.chain, cut.complete, cut.clean) == ("ok", False, False)
    assert not audit(entries, policies, expect=Head(head.seq, "0" * 64)).complete


def test_the_state_as_it_was_is_the_fold_of_what_was_there() -> None:
    entries, policies = history()
    for seq in range(60, 120):
        found, state = replay(entries, policies=policies, until_seq=seq)
        assert (found.events, state.seq, found.clean) == (seq, seq, True)
    at = max(decode(entry).at for entry in entries[:201])
    _, earlier = replay(entries, policies=policies, until_us=at)
    assert earlier.seq >= 201
    assert all(decode(entry).at <= at for entry in entries[: earlier.seq])


def test_an_empty_history_is_clean() -> None:
    found = audit([], {})
    assert (found.events, found.plans, found.clean) == (0, 0, True)
