"""Carrying a disarm out: intent (an event), effect (file and service), proof (an event).

The daemon and the command line both come through here. Whoever holds the lock beside the file looks at the events
first, so one disarm touches the file and the service once, and a start after a crash finishes what has no proof.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from events.store import StoreError
from events.types import AutoDisarm, DisarmFailed, DisarmStarted, Event, ManualDisarm
from governor.actuator import ActuatorError, Hand, Proof
from governor.decider import ACTION_TAKEN, disarm_by_hand
from governor.ledger import Outcome, Proposal, Propose
from governor.logs import Logger
from projections.state import Disarm, State

log = Logger("governor.disarm")

STORE_S = 2.0
"""The effect does not wait longer than this for the store, nor does the lock beside the file."""
T = TypeVar("T")
BACK_OFF_S = (2.0, 4.0, 8.0, 15.0)
"""Waits after a failed attempt; the last one from then on."""


class Submits(Protocol):
    """The ledger, with or without its loop."""

    state: State


def pending(state: State) -> Disarm | None:
    """The disarm that has an intent and no proof."""
    disarm = state.mode.disarm
    return disarm if disarm is not None and not disarm.done else None


async def carry_out(
    ledger: Submits,
    actuator: Hand,
    *,
    submit: Callable[[Propose], Awaitable[Outcome]],
    refresh: Callable[[], Awaitable[None]],
) -> bool | None:
    """One attempt at the pending disarm. The store is waited for, but not for long: the effect is what counts.

    Returns:
        True when it is done (by anyone), False when it failed, None when somebody else is at it.
    """
    loop = asyncio.get_running_loop()

    def wait_for(work: Awaitable[Any]) -> None:
        with contextlib.suppress(TimeoutError, StoreError):  # without the store, what is known has to do
            asyncio.run_coroutine_threadsafe(_awaited(work), loop).result(STORE_S)

    def attempt() -> bool | None:
        # The lock belongs to this thread, so that it outlives a caller who is cancelled in the middle.
        with actuator.locked() as taken:
            if not taken:
                return None
            wait_for(refresh())
            disarm = pending(ledger.state)
            if disarm is None:
                return True
            proof = msgspec.to_builtins(actuator.force_dry_run(disarm.reason))
            log.warning(
                "disarmed", reason=disarm.reason, epoch=disarm.epoch, action_taken=ACTION_TAKEN, **_short(proof)
            )
            wait_for(submit(_only_while_pending(disarm.epoch, proven(disarm, proof))))
            return True

    try:
        return await in_thread(attempt)
    except (ActuatorError, OSError) as error:
        disarm = pending(ledger.state)
        if disarm is None:
            return True
        step = error.step if isinstance(error, ActuatorError) else "unexpected"
        log.error("disarm failed", reason=disarm.reason, epoch=disarm.epoch, step=step, error=str(error))
        failed = DisarmFailed(epoch=disarm.epoch, attempt=disarm.attempts + 1, step=step, error=str(error)[:500])
        with contextlib.suppress(TimeoutError, StoreError):
            await asyncio.wait_for(submit(_only_while_pending(disarm.epoch, failed)), STORE_S)
        return False


async def in_thread(work: Callable[[], T]) -> T:
    """Like `asyncio.to_thread`, but a process that ends does not wait for a systemctl that hangs."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(setter: Callable[[Any], None], value: Any) -> None:
        if not done.done():
            setter(value)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (done.set_result, work())
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            outcome = (done.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(tell, *outcome)

    threading.Thread(target=run, daemon=True).start()
    return await done


async def _awaited(work: Awaitable[T]) -> T:
    return await work


def proven(disarm: Disarm, proof: dict[str, Any]) -> Event:
    """The event that says what was done and verified."""
    if disarm.manual:
        return ManualDisarm(
            reason=disarm.reason,
            context=disarm.context,
            action_taken=ACTION_TAKEN,
            epoch=disarm.epoch,
            operator=disarm.operator or "unknown",
            proof=proof,
        )
    return AutoDisarm(
        reason=disarm.reason, context=disarm.context, action_taken=ACTION_TAKEN, epoch=disarm.epoch, proof=proof
    )


class Brake(NamedTuple):
    """An emergency brake that was found set."""

    reason: str
    operator: str
    noted_us: int | None = None
    """The note of the same act, if its file and service could not wait: the two are told once."""


def braked(state: State, brake: Brake, *, apply_mode: str | None) -> list[Event]:
    """Events of an emergency brake."""
    if brake.noted_us in state.noted:
        return []
    events = disarm_by_hand(state, reason=brake.reason, operator=brake.operator, apply_mode=apply_mode)
    return events if brake.noted_us is None else _marked(events, brake.noted_us)


def _marked(events: list[Event], noted_us: int) -> list[Event]:
    """Events of a disarm, the first of which says which note it tells of."""
    return [
        msgspec.structs.replace(event, context=event.context | {"noted_us": noted_us})
        if isinstance(event, DisarmStarted)
        else event
        for event in events
    ]


def told_later(state: State, *, reason: str, operator: str, proof: Proof | None, noted_us: int) -> list[Event]:
    """Events of a disarm by hand that was carried out while nothing could be committed. Told once a note."""
    if noted_us in state.noted:
        return []
    events = _marked(disarm_by_hand(state, reason=reason, operator=operator, apply_mode=None), noted_us)
    started = events[0] if events else None
    if isinstance(started, DisarmStarted) and proof is not None:
        disarm = Disarm(0, reason, started.context, started.epoch, manual=True, operator=operator)
        events.append(proven(disarm, msgspec.to_builtins(proof)))
    return events


def back_off(attempts: int) -> float:
    """Seconds to wait after that many failed attempts."""
    return BACK_OFF_S[min(max(attempts, 1), len(BACK_OFF_S)) - 1]


def _only_while_pending(epoch: int, event: Event) -> Propose:
    def propose(state: State, _now: int) -> Proposal:
        disarm = pending(state)
        told = isinstance(event, DisarmFailed) and disarm is not None and disarm.attempts >= event.attempt
        return Proposal([event] if disarm is not None and disarm.epoch == epoch and not told else [])

    return propose


def _short(proof: dict[str, Any]) -> dict[str, Any]:
    return {name: proof.get(name) for name in ("backup", "invocation_after", "active_state", "seconds")}
