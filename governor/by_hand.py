"""`governor disarm` and `governor rearm`: a person acts, with or without a daemon, with or without Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from events.segments import holds_events
from events.store import StoreError, Write
from events.types import HistoryAccepted
from governor import decider, disarming, rearming
from governor.actuator import Actuator, ActuatorError, Hand, PendingNote, Proof
from governor.connection import connected, ledger_on, now, place
from governor.helper import Helper, hand_of_a_person, note_to_write, notes_of
from governor.ledger import Ledger, Proposal
from governor.settings import Settings
from governor.status import policy_of
from governor.telling import clean
from projections.state import State

REDIS_S = 2.0
"""Redis has this long to answer before file and service come first."""
WAIT_S = 30.0


async def disarm(settings: Settings, *, reason: str, operator: str) -> dict[str, Any]:
    """Disarm by hand.

    Returns:
        What to tell: `message`, `code` (0 done, 1 the Apply Layer could not be forced, 4 Redis not reachable),
        `state`, `epoch`, `done`, `reason`, `operator`.
    """
    actuator, at = _actuator(settings), now()
    try:
        async with connected(settings, answer_s=REDIS_S) as client:
            ledger = ledger_on(client, settings)
            brake = json.dumps({"operator": operator, "reason": reason, "noted_us": at}).encode()
            # The brake first: it takes effect with this write, whatever a busy daemon commits meanwhile.
            await ledger.store.write([Write("set", ledger.keys.halt, (brake,))])
            await ledger.open()
            _refuse_emptied(ledger, settings)
            mode = actuator.apply_mode()
            outcome = await ledger.propose(
                lambda state, _now: Proposal(
                    decider.disarm_by_hand(state, reason=reason, operator=operator, apply_mode=mode),
                    writes=[Write("del", ledger.keys.halt)],
                )
            )
            if outcome.error is not None:
                raise outcome.error
            await _finish(ledger, settings)
            return _told(ledger, operator)
    except StoreError as error:
        return await _without_redis(settings, error, reason=reason, operator=operator, at=at)


class EmptiedError(StoreError):
    """The stream is empty although there were events: whoever wrote now would begin a second history."""


def _refuse_emptied(ledger: Ledger, settings: Settings) -> None:
    if not ledger.state.seq and holds_events(settings.own_journal):
        raise EmptiedError(
            f"{place(settings)} lost its events, which the journal in {settings.own_journal} has: the daemon writes "
            "them back"
        )


async def rearm(
    settings: Settings,
    *,
    reason: str,
    operator: str,
    force: bool,
    accept_history: bool = False,
    restore: bool | None = None,
    apply_mode: str | None = None,
    ask: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """Arm again, and put the Apply Layer's file and service back where a person says so.

    Args:
        settings: where Redis and the Apply Layer are.
        reason: why; recorded.
        operator: who.
        force: although a disarm is unfinished or the emergency brake is set.
        accept_history: first take Redis' history where it contradicts a daemon's journal. The daemon sets its journal
            aside when it reads of it.
        restore: whether to put back the mode of before the disarm; None: as `ask` answers.
        apply_mode: the mode to put back instead.
        ask: puts a question to the person; None where nobody can be asked.

    Returns:
        What to tell: `message`, `code` (0 done, 1 refused, or armed and the Apply Layer not put back), `state`,
        `epoch`, `apply_mode` (what the file says now), `restored` (whether it was put back and verified), and its
        `proof`.

    Raises:
        StoreError: Redis is not reachable.
    """
    async with connected(settings, answer_s=REDIS_S) as client:
        ledger = ledger_on(client, settings)
        await ledger.open()
        _refuse_emptied(ledger, settings)
        if not ledger.state.seq:
            return {"code": 1, "state": None, "epoch": None, "message": f"refused: {nothing_here(settings)}"}
        was = ledger.state.mode
        # Our own hand on the file, never the helper's: that one can only disarm.
        actuator = Actuator(config_path=settings.apply_config_path, service=settings.apply_service, clock=now)
        told: dict[str, Any] = {"state": was.state, "epoch": was.epoch, "reason": reason, "operator": operator}
        told |= {"restored": False, "proof": None, "apply_mode": actuator.apply_mode()}
        try:
            wanted = rearming.mode_wanted(ledger.state, actuator, restore=restore, apply_mode=apply_mode, ask=ask)
        except rearming.RestoreRefusedError as error:
            return told | {"code": 1, "message": f"refused, nothing was done: {error}"}
        accepted = await _accept_history(ledger, settings, reason, operator) if accept_history else ""
        (halt,) = await ledger.store.values(ledger.keys.halt)

        def propose(state: State, _now: int) -> Proposal:
            if wanted is not None and state.mode.epoch != was.epoch:
                raise decider.RearmRefusedError(
                    f"meanwhile it is epoch {state.mode.epoch}, {state.mode.state}; look again"
                )
            return Proposal(
                decider.rearm(state, reason=reason, operator=operator, force=force, halt=halt is not None),
                writes=[Write("del", ledger.keys.halt)] if force and halt is not None else [],
            )

        outcome = await ledger.propose(propose)
        mode = ledger.state.mode
        told |= {"state": mode.state, "epoch": mode.epoch}
        if isinstance(outcome.error, decider.RearmRefusedError):
            return told | {"code": 1, "message": f"{accepted}refused: {outcome.error}"}
        if outcome.error is not None:
            raise outcome.error
        _clear_told(settings, ledger.state)
        if wanted is not None:
            notes = notes_of(settings)
            done = await rearming.put_back(ledger, actuator, notes, mode=wanted, reason=reason, operator=operator)
            return told | _put_back(done, ledger, actuator, wanted, accepted)
        if was.state != "DISARMED":
            return told | {"code": 0, "message": f"{accepted or 'nothing to do: '}the state is {mode.state}"}
        return told | {"code": 0, "message": f"{accepted}{mode.state}, epoch {mode.epoch}. {_left(actuator)}"}


def _left(actuator: Actuator) -> str:
    """What to tell of an Apply Layer that was not put back."""
    now = actuator.apply_mode()
    if now in (decider.DRY_RUN, None):
        return (
            "The Apply Layer is still as the disarm left it; to trade again set APPLY_MODE in "
            f"{actuator.config_path} and restart {actuator.service}."
        )
    return (
        f"The Apply Layer's file says APPLY_MODE={clean(now or '')} already, set by hand; restart {actuator.service} "
        "if it does not run with it yet."
    )


def _put_back(done: rearming.PutBack, ledger: Ledger, actuator: Actuator, mode: str, accepted: str) -> dict[str, Any]:
    now, armed = actuator.apply_mode(), ledger.state.mode
    told: dict[str, Any] = {
        "state": armed.state,
        "epoch": armed.epoch,
        "apply_mode": now,
        "restored": done.proof is not None,
        "proof": None if done.proof is None else msgspec.to_builtins(done.proof),
        "code": 0 if done.problem is None else 1,
    }
    head = f"{accepted}{armed.state}, epoch {armed.epoch}. "
    if done.proof is not None:
        verified = "Not verified: " + "; ".join(done.proof.notes) + "." if done.proof.notes else "Both were verified."
        head += f"The Apply Layer's file says APPLY_MODE={mode}, its service was restarted. {verified}"
        again = "" if armed.disarm is None else " It sets dry run again."
        return told | {"message": head if done.problem is None else f"{head} BUT {done.problem}.{again}"}
    again = "" if armed.disarm is not None else f" To try again: governor rearm --reason ... --apply-mode {mode}"
    return told | {
        "message": f"{head}BUT THE APPLY LAYER WAS NOT PUT BACK: {done.problem}. "
        f"Its file {'gives no APPLY_MODE' if now is None else f'says APPLY_MODE={clean(now)}'}.{again}"
    }


async def _accept_history(ledger: Ledger, settings: Settings, reason: str, operator: str) -> str:
    """Write HISTORY_ACCEPTED. Returns what to tell."""
    hold_us = policy_of(ledger.state, settings.policy).permit_ttl_us
    outcome = await ledger.propose(
        lambda _state, at: Proposal([HistoryAccepted(reason=reason, operator=operator, hold_until_us=at + hold_us)])
    )
    if outcome.error is not None:
        raise outcome.error
    return f"history accepted, no permits for {hold_us / 1e6:.0f} s; "


def nothing_here(settings: Settings) -> str:
    """What to tell where there is no event at all."""
    return (
        f"no event in database {settings.redis_db} of {settings.redis_host}:{settings.redis_port} "
        f"under the prefix {settings.key_prefix!r}: no daemon has ever run here"
    )


def _clear_told(settings: Settings, state: State) -> None:
    """Remove what notes of disarms the daemon told and could not remove; whoever re-arms is root as a rule."""
    for note in notes_of(settings):
        with contextlib.suppress(OSError):
            if (pending := note.read_pending()) is not None and pending.timestamp_us in state.noted:
                note.clear_pending(pending)


async def _finish(ledger: Ledger, settings: Settings) -> None:
    """See the disarm through: ourselves where we may, else by waiting for the daemon."""
    hand = await _hand(settings)
    mine = hand.permitted() if isinstance(hand, Helper) else os.access(settings.apply_config_path.parent, os.W_OK)
    attempts = ledger.state.mode.disarm.attempts if ledger.state.mode.disarm is not None else 0
    until = time.monotonic() + WAIT_S
    while disarming.pending(ledger.state) is not None and time.monotonic() < until:
        done = None
        if mine:
            done = await disarming.carry_out(ledger, hand, submit=ledger.propose, refresh=ledger.catch_up)
        else:
            await ledger.catch_up()
            pending = disarming.pending(ledger.state)
            done = False if pending is not None and pending.attempts > attempts else None
        if done is not None:
            return
        await asyncio.sleep(0.1)


def _told(ledger: Ledger, operator: str) -> dict[str, Any]:
    mode, held = ledger.state.mode, ledger.state.mode.disarm
    done = held is not None and held.done
    told: dict[str, Any] = {
        "state": mode.state,
        "epoch": mode.epoch,
        "reason": mode.reason,
        "operator": held.operator if held is not None and held.operator else operator,
        "done": done,
        "code": 0 if done else 1,
    }
    if done:
        notes = held.notes if held is not None else ()
        message = f"DISARMED, epoch {mode.epoch}. {_carried_out(notes)}"
        return told | {"notes": list(notes), "message": message}
    why = (held.error if held is not None else None) or "nobody has carried it out yet"
    return told | {
        "message": f"DISARMED, epoch {mode.epoch}: no permits. BUT THE APPLY LAYER IS NOT PROVEN TO BE IN DRY RUN: "
        f"{why}. "
        "The daemon tries again; stop the service by hand if you cannot wait."
    }


def _carried_out(notes: tuple[str, ...]) -> str:
    verified = "Not verified: " + "; ".join(notes) + "." if notes else "Both were verified."
    return f"The Apply Layer's file says dry run, its service was restarted. {verified}"


async def _without_redis(
    settings: Settings, error: StoreError, *, reason: str, operator: str, at: int
) -> dict[str, Any]:
    hand = await _hand(settings)
    note = PendingNote(settings.apply_config_path) if settings.disarm_socket is None else note_to_write(settings)
    told: dict[str, Any] = {"state": None, "epoch": None, "reason": reason, "operator": operator, "code": 4}
    proof: Proof | None = None
    problem = kept = ""
    try:
        async with _lock(hand):
            try:
                proof = await asyncio.to_thread(lambda: hand.force_dry_run(reason))
            except (ActuatorError, OSError) as failed:
                problem = str(failed)
            context = {"operator": operator}
            note.write_pending(reason=reason, operator=operator, context=context, timestamp_us=at, proof=proof)
            kept = "It becomes an event as soon as the daemon reaches Redis."
    except (ActuatorError, OSError) as failed:
        problem = problem or str(failed)
        kept = f"It could not be noted for later: {failed}."
    why = str(error) if isinstance(error, EmptiedError) else f"Redis is not reachable ({error})"
    if proof is None:
        message = f"{why} AND THE APPLY LAYER COULD NOT BE FORCED TO DRY RUN: {problem}. {kept}"
    else:
        message = f"{_carried_out(proof.notes)} {why}. {kept}"
    return told | {"done": proof is not None, "message": message}


@asynccontextmanager
async def _lock(hand: Hand) -> AsyncIterator[None]:
    """Wait for the lock beside the file: somebody who holds it is disarming as well."""
    until = time.monotonic() + WAIT_S
    while True:
        with hand.locked() as taken:
            if taken:
                yield
                return
        if time.monotonic() >= until:
            raise OSError("another disarm holds the lock beside the file")
        await asyncio.sleep(0.1)


async def _hand(settings: Settings) -> Hand:
    """Who carries a disarm out. Chosen late: looking for the helper may take seconds, and permits die first."""
    if settings.disarm_socket is None:
        return _actuator(settings)
    return await asyncio.to_thread(lambda: hand_of_a_person(settings))


def _actuator(settings: Settings) -> Actuator:
    return Actuator(config_path=settings.apply_config_path, service=settings.apply_service, clock=now)
