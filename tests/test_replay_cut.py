"""Results and rejected entries whose fields were cut are decided again from what the event itself says."""

import json

import msgspec
import pytest

from events import chain
from events.codec import decode, encode
from events.types import Entry, Event, Execution, Head, PlanRejected, SettingsLoaded
from governor.replay import Replay, replay
from tests.spec import SECOND, Spec, names

STEPS = [{"step": "CLOSE", "status": "filled", "executed_qty": "0.001", "note": "x" * 200}] * 40
LONG = json.dumps(STEPS)


class Told(Spec):
    """A gate whose past is kept as entries."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        super().__init__()
        self.given(SettingsLoaded(digest="s", settings={}))

    def given(self, *events: Event) -> "Told":
        for event in events:
            head = Head(self.state.seq, self.entries[-1].hash if self.entries else chain.GENESIS.hash)
            self.entries.append(encode(event, after=head, at=self.now))
            super().given(event)
        return self

    def audit(self) -> Replay:
        return replay(self.entries, policies={"s": self.policy})[0]

    def audit_with(self, changed: Event, seq: int) -> Replay:
        head, entries = chain.GENESIS, []
        for recorded in map(decode, self.entries):
            event = changed if recorded.seq == seq else recorded.event
            entries.append(encode(event, after=head, at=recorded.at))
            head = entries[-1].head
        return replay(entries, policies={"s": self.policy})[0]


def last(told: Told, kind: type[Event]) -> tuple[int, Event]:
    return next((r.seq, r.event) for r in map(decode, reversed(told.entries)) if isinstance(r.event, kind))


@pytest.mark.parametrize(
    ("result", "follows"),
    [
        ({}, ["EXECUTION", "PERMIT_CONSUMED", "ERROR_RECORDED"]),
        ({"error": "too much " * 900}, ["EXECUTION", "PERMIT_CONSUMED", "ERROR_RECORDED"]),
        ({"executed": "False", "decision": "ERROR"}, ["EXECUTION", "ERROR_RECORDED", "ERROR_RECORDED"]),
    ],
)
def test_a_result_that_was_cut_is_decided_again_from_its_event(result: dict[str, str], follows: list[str]) -> None:
    told = Told().granted("p1").after(SECOND)
    assert isinstance(told, Told)
    events = told.result(steps_results=LONG, **result)
    assert names(events) == follows
    assert isinstance(events[0], Execution)
    assert events[0].truncated
    assert told.audit().clean, told.audit().differences


def test_a_failed_step_behind_the_cut_still_counts() -> None:
    told = Told().granted("p1").after(SECOND)
    assert isinstance(told, Told)
    events = told.result(steps_results=json.dumps([*STEPS, {"step": "SL", "status": "error"}]))
    assert names(events).count("ERROR_RECORDED") == 2
    assert told.audit().clean


@pytest.mark.parametrize(
    ("plan_id", "action", "kill_score"),
    [("p1", "PARTIAL_75", "9" * 9000), ("p" * 9000, "PARTIAL_75", "0.1"), ("p1", "", "1" * 9000)],
)
def test_an_entry_rejected_for_bytes_that_were_cut_is_decided_again(plan_id: str, action: str, kill_score: str) -> None:
    told = Told()
    events = told.plan(plan_id, action=action, kill_score=kill_score)
    assert names(events) == ["PLAN_REJECTED", "ERROR_RECORDED"]
    assert isinstance(events[0], PlanRejected)
    assert events[0].truncated
    assert told.audit().clean, told.audit().differences


def test_what_somebody_changed_in_a_cut_result_is_found_by_what_it_leads_to() -> None:
    told = Told().granted("p1").after(SECOND)
    assert isinstance(told, Told)
    told.result(steps_results=LONG)
    seq, event = last(told, Execution)
    assert not told.audit_with(msgspec.structs.replace(event, executed=False), seq).clean
    assert not told.audit_with(msgspec.structs.replace(event, executed_qty=None), seq).clean
    assert not told.audit_with(msgspec.structs.replace(event, permit="expired"), seq).clean


def test_a_cut_entry_whose_error_somebody_dropped_is_found() -> None:
    told = Told()
    told.plan(kill_score="9" * 9000)
    seq, event = last(told, PlanRejected)
    assert not told.audit_with(msgspec.structs.replace(event, decision="SKIP"), seq).clean
