"""Putting the Apply Layer back to work after a re-arm, when a person asked for it: file, service, proof, event.

The other way round than a disarm. REARMED is committed first, so that nothing trades before the gate is open; then,
with the lock beside the file, it is looked at whether it still holds, and only then file and service are touched. A
disarm always wins: one that was committed before that look is seen by it; one that comes later waits for the lock
with its own work, and sets dry run again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from events.store import StoreError
from events.types import ApplyModeRestored
from governor.actuator import DRY_RUN, Actuator, ActuatorError, PendingNote, Proof, mode_in
from governor.disarming import STORE_S, in_thread
from governor.ledger import Ledger, Proposal
from governor.logs import Logger
from projections.state import State

log = Logger("governor.rearm")

T = TypeVar("T")
WAIT_S = 30.0
"""How long whoever else holds the lock may take: a whole disarm."""


class RestoreRefusedError(Exception):
    """It was asked for and cannot be done; nothing was changed. The message says why and what to do."""


class PutBack(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it."""

    proof: Proof | None = None
    """None: file and service are not known to be as they were asked to be."""
    problem: str | None = None
    """What a person has to know; None when it is done, verified and recorded."""


def mode_wanted(
    state: State,
    actuator: Actuator,
    *,
    restore: bool | None = None,
    apply_mode: str | None = None,
    ask: Callable[[str], bool] | None = None,
) -> str | None:
    """The mode to put back, None where nothing is to be put back. Changes nothing.

    Args:
        state: before the re-arm.
        actuator: of the Apply Layer's file and service.
        restore: what the person said; None: nothing.
        apply_mode: the mode the person named.
        ask: puts a question to the person; None where nobody can be asked.

    Raises:
        RestoreRefusedError: the person said so, but which mode it was is not known, or it may not be written here.
    """
    told = bool(restore) or apply_mode is not None
    if not told and (restore is False or ask is None or state.mode.disarm is None):
        return None
    now = actuator.apply_mode()
    mode = apply_mode or _before(state) or (now if now != DRY_RUN else None)
    try:
        if not mode:
            raise RestoreRefusedError(
                f"which APPLY_MODE {actuator.config_path} had before the disarm is not known; say it with --apply-mode"
            )
        actuator.check_put_back(mode)
    except (ActuatorError, RestoreRefusedError) as error:
        if told:
            raise RestoreRefusedError(str(error)) from error
        return None
    return mode if told or (ask is not None and ask(question(actuator, mode, now))) else None


def question(actuator: Actuator, mode: str, now: str | None) -> str:
    """What a person is asked."""
    if mode == now:
        return f"{actuator.config_path} says APPLY_MODE={mode} already. Restart {actuator.service}?"
    instead = "" if now in (DRY_RUN, None) else f" (it says {now} now, set by hand)"
    return f"Set APPLY_MODE back to {mode}{instead} and restart {actuator.service}?"


def _before(state: State) -> str | None:
    """The mode in the copy that the disarm made."""
    backup = state.mode.disarm.backup if state.mode.disarm is not None else None
    mode = mode_in(Path(backup)) if backup is not None else None
    return None if mode == DRY_RUN else mode


async def put_back(
    ledger: Ledger, actuator: Actuator, notes: Sequence[PendingNote], *, mode: str, reason: str, operator: str
) -> PutBack:
    """Put the mode back, unless a disarm came in between.

    Args:
        ledger: as the re-arm left it: its epoch is the one this belongs to.
        actuator: of the Apply Layer's file and service.
        notes: of disarms that no event may tell of yet.
        mode: as `mode_wanted` has it.
        reason: recorded.
        operator: recorded.
    """
    loop, epoch = asyncio.get_running_loop(), ledger.state.mode.epoch
    until = time.monotonic() + WAIT_S

    def wait_for(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(STORE_S)

    def attempt() -> PutBack | None:
        # The lock belongs to this thread, so that it outlives a caller who is cancelled in the middle.
        with actuator.locked() as taken:
            if not taken:
                return None
            try:
                closed = wait_for(in_between(ledger, notes, epoch))
            except (TimeoutError, StoreError) as error:
                closed = f"whether a disarm came in between cannot be seen: {str(error) or 'Redis does not answer'}"
            if closed is not None:
                return PutBack(problem=closed)
            proof = actuator.put_back(mode)
            log.warning("apply mode restored", epoch=epoch, apply_mode=mode, reason=reason, operator=operator)
            restored = ApplyModeRestored(
                epoch=epoch, reason=reason, operator=operator, apply_mode=mode, proof=msgspec.to_builtins(proof)
            )
            try:
                wait_for(_record(ledger, restored))
                return PutBack(proof=proof, problem=wait_for(in_between(ledger, notes, epoch)))
            except (TimeoutError, StoreError) as error:
                why = str(error) or "Redis does not answer"
                return PutBack(proof=proof, problem=f"whether that was recorded is not known: {why}")

    try:
        while (done := await in_thread(attempt)) is None and time.monotonic() < until:
            await asyncio.sleep(0.1)
    except (ActuatorError, OSError) as error:
        return PutBack(problem=str(error))
    return done or PutBack(problem="somebody else holds the lock beside the file")


async def in_between(ledger: Ledger, notes: Sequence[PendingNote], epoch: int) -> str | None:
    """What closed the gate again since it was armed, if anything did.

    Raises:
        StoreError: that cannot be seen.
    """
    # Notes and brake first: what is not there any more has become an event by then, and the events come last.
    noted = [found for note in notes if (found := note.read_pending()) is not None]
    halted = await ledger.store.exists(ledger.keys.halt)
    await ledger.catch_up()
    state, mode = ledger.state, ledger.state.mode
    if mode.epoch != epoch:
        again = "" if mode.disarm is not None else ", and somebody armed it again"
        return f"a disarm came in between{again}: epoch {mode.epoch}, {mode.reason}"
    if halted:
        return "the emergency brake was set in between"
    untold = next((note for note in noted if note.timestamp_us not in state.noted), None)
    return None if untold is None else f"a disarm came in between ({untold.reason})"


async def _record(ledger: Ledger, restored: ApplyModeRestored) -> None:
    outcome = await ledger.propose(lambda _state, _now: Proposal([restored]))
    if outcome.error is not None:
        raise outcome.error
