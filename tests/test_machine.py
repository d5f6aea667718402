"""The machine, every pair of state and trigger, and its page of the docs."""

import logging
from typing import get_args

import pytest

from governor.machine import STATES, TRANSITIONS, TRIGGERS, TransitionError, Trigger, advance, allows, diagram
from projections import state
from tests.generated import check_generated, table

NOWHERE = None
LEADS: dict[tuple[str, Trigger], str | None] = {
    ("ARMED", "throttle"): "THROTTLED",
    ("ARMED", "recover"): NOWHERE,
    ("ARMED", "disarm"): "DISARMED",
    ("ARMED", "rearm"): NOWHERE,
    ("THROTTLED", "throttle"): "THROTTLED",
    ("THROTTLED", "recover"): "ARMED",
    ("THROTTLED", "disarm"): "DISARMED",
    ("THROTTLED", "rearm"): NOWHERE,
    ("DISARMED", "throttle"): NOWHERE,
    ("DISARMED", "recover"): NOWHERE,
    ("DISARMED", "disarm"): "DISARMED",
    ("DISARMED", "rearm"): "ARMED",
}
MEANING: dict[Trigger, str] = {
    "throttle": "a limit was reached, or errors pile up: fewer permits where the cause lies",
    "recover": "the cool-down after the last new cause is over",
    "disarm": "a breach, too many errors, an execution nobody permitted, or a person: no permits at all",
    "rearm": "a person, and nobody else, says that it may go on",
}


@pytest.mark.parametrize(("now", "trigger"), LEADS, ids=lambda value: value)
def test_every_trigger_leads_where_it_should_from_every_state(now: str, trigger: Trigger) -> None:
    leads = LEADS[now, trigger]
    assert allows(now, trigger) is (leads is not NOWHERE)
    if leads is not NOWHERE:
        assert advance(now, trigger) == leads
        return
    with pytest.raises(TransitionError, match=f"'{trigger}' is not possible while {now}") as refused:
        advance(now, trigger)
    assert (refused.value.state, refused.value.trigger) == (now, trigger)


def test_every_pair_of_state_and_trigger_is_tested() -> None:
    assert set(LEADS) == {(one, trigger) for one in STATES for trigger in TRIGGERS}
    assert {(source, trigger): target for trigger, source, target in TRANSITIONS} == {
        pair: leads for pair, leads in LEADS.items() if leads is not NOWHERE
    }


def test_only_a_person_leads_out_of_disarmed() -> None:
    assert {trigger for trigger, source, target in TRANSITIONS if source == "DISARMED" != target} == {"rearm"}


def test_a_state_or_a_trigger_that_does_not_exist_leads_nowhere() -> None:
    assert not allows("ASLEEP", "disarm")
    for word in ("to_ARMED", "disarmm", "", "state"):
        assert not allows("DISARMED", word)


def test_a_refused_trigger_leaves_nothing_behind() -> None:
    with pytest.raises(TransitionError):
        advance("DISARMED", "recover")
    assert advance("ARMED", "throttle") == "THROTTLED"
    assert advance("ARMED", "throttle") == "THROTTLED"


def test_the_machine_and_the_fold_speak_of_the_same_states() -> None:
    assert STATES == (state.ARMED, state.THROTTLED, state.DISARMED)
    assert get_args(Trigger) == TRIGGERS


def test_the_machine_says_nothing_in_the_log() -> None:
    assert not logging.getLogger("transitions.core").isEnabledFor(logging.INFO)


def test_the_page_about_the_machine_is_up_to_date() -> None:
    rows = [(f"`{trigger}`", source, target, MEANING[trigger]) for trigger, source, target in TRANSITIONS]
    check_generated(
        "docs/machine.md",
        "# States\n\n"
        "The gate is always in one of three states. `governor status` shows it, and so does the key\n"
        "`quantum:governor:state`.\n\n"
        "- **ARMED**: plans are decided, and permitted within the limits.\n"
        "- **THROTTLED**: the same, but where the cause lies only `GOV_THROTTLE_MAX_EXEC_PER_5MIN` executions pass in\n"
        "  five minutes. A full close never waits. It ends by itself, `GOV_THROTTLE_COOLDOWN_SEC` after the last new\n"
        "  cause.\n"
        "- **DISARMED**: no permits. All outstanding permits are revoked in the same step, and the Apply Layer is\n"
        "  forced to dry run. It never ends by itself: a person runs `governor rearm`.\n\n"
        f"```mermaid\n{diagram()}```\n\n"
        "What is not in this table cannot happen.\n\n"
        + table(("trigger", "from", "to", "because"), rows)
        + "\nEvery disarm and every rearm begins a new epoch. A permit of an older epoch is worth nothing.\n\n"
        "This page is written from `governor/machine.py` by its test.\n",
    )
