"""The state machine that drives the disarm: ARMED → THROTTLED → DISARMED.

The machine is policy: it says what may follow from where. The mode itself is folded from the events, which are
facts; `advance` asks the machine before an event is written, and the replay asks it again.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Literal, cast

from transitions import Machine, MachineError

logging.getLogger("transitions").setLevel(logging.WARNING)

STATES = ("ARMED", "THROTTLED", "DISARMED")
Trigger = Literal["throttle", "recover", "disarm", "rearm"]
TRIGGERS: tuple[Trigger, ...] = ("throttle", "recover", "disarm", "rearm")
TRANSITIONS: tuple[tuple[Trigger, str, str], ...] = (
    ("throttle", "ARMED", "THROTTLED"),
    ("throttle", "THROTTLED", "THROTTLED"),
    ("recover", "THROTTLED", "ARMED"),
    ("disarm", "ARMED", "DISARMED"),
    ("disarm", "THROTTLED", "DISARMED"),
    ("disarm", "DISARMED", "DISARMED"),
    ("rearm", "DISARMED", "ARMED"),
)
"""Trigger, from, to. A disarm by hand is possible from everywhere, also where the file was armed behind our back."""


class TransitionError(Exception):
    """A trigger that does not exist in that state."""

    def __init__(self, state: str, trigger: str) -> None:
        super().__init__(f"{trigger!r} is not possible while {state}")
        self.state = state
        self.trigger = trigger


class _Model:
    state: str


_MODEL = _Model()
# Without auto transitions nobody can jump from DISARMED to ARMED; ignored triggers would hide a misspelt one.
_MACHINE = Machine(
    model=_MODEL,
    states=list(STATES),
    transitions=[cast("Any", list(row)) for row in TRANSITIONS],
    initial="ARMED",
    auto_transitions=False,
    ignore_invalid_triggers=False,
    send_event=False,
    queued=False,
)


@cache
def advance(state: str, trigger: Trigger) -> str:
    """The state `trigger` leads to from `state`.

    Raises:
        TransitionError: it leads nowhere from there.
    """
    try:
        _MACHINE.set_state(state, _MODEL)
        _MODEL.trigger(trigger)  # type: ignore[attr-defined]
    except (MachineError, ValueError, AttributeError):
        raise TransitionError(state, trigger) from None
    return _MODEL.state


@cache
def allows(state: str, trigger: Trigger) -> bool:
    """Whether `trigger` exists in `state`."""
    try:
        advance(state, trigger)
    except TransitionError:
        return False
    return True


def diagram() -> str:
    """The machine as a mermaid state diagram, for the docs."""
    rows = "\n".join(f"    {source} --> {target}: {trigger}" for trigger, source, target in TRANSITIONS)
    return f"stateDiagram-v2\n    [*] --> {STATES[0]}\n{rows}\n"
