"""`governor doctor --drill`: a whole disarm and re-arm, for real, timed step by step.

Nothing is rehearsed apart: it is `governor disarm` and `governor rearm`, watched from outside as a bot and an auditor
would see them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from events.codec import decode
from events.keys import Keys
from events.store import EventStore, StoreError
from events.types import DisarmStarted, ManualDisarm
from governor import by_hand
from governor.actuator import DRY_RUN, Actuator, ActuatorError
from governor.connection import connected, ledger_on, now, store_on
from governor.console import DONE, FAILED
from governor.settings import Settings
from governor.telling import clean
from projections.state import DISARMED

REASON = "drill"
LOOK_S = 0.005
LAST_LOOK_S = 1.0
"""How long after the command has ended its events may take to be seen."""


class Before(msgspec.Struct, frozen=True, kw_only=True):
    """What was there before the drill."""

    refusal: str | None = None
    """Why there is no drill."""
    apply_mode: str | None = None
    """What the Apply Layer's file says."""
    permits: int = 0
    """How many are outstanding, and will die."""
    seq: int = 0
    keys: tuple[str, ...] = ()
    """Of the outstanding permits."""

    @property
    def trades(self) -> bool:
        """Whether the Apply Layer's file says something else than dry run, which could be put back."""
        return self.apply_mode not in (None, DRY_RUN)


class Step(msgspec.Struct, frozen=True):
    """One step and when it was seen."""

    step: str
    seconds: float | None
    """Since the command was given; None: it was not seen."""
    seen: str = ""


async def prepare(settings: Settings, *, restore: bool | None) -> Before:
    """Look whether there can be a drill. Changes nothing.

    Args:
        settings: where everything is.
        restore: whether the Apply Layer is to be put back afterwards; where it cannot be, there is no drill.

    Raises:
        StoreError: Redis cannot be read.
    """
    async with connected(settings, answer_s=by_hand.REDIS_S) as client:
        ledger = ledger_on(client, settings)
        await ledger.open()
        state = ledger.state
        (halt,) = await ledger.store.values(ledger.keys.halt)
        mode = _actuator(settings).apply_mode()
        refusal = None
        if not state.seq:
            refusal = by_hand.nothing_here(settings)
        elif state.mode.state == DISARMED:
            refusal = f"the state is DISARMED ({state.mode.reason}), expected ARMED or THROTTLED"
        elif halt is not None:
            refusal = f"the emergency brake is set ({clean(halt.decode(errors='replace'), 100)})"
        elif restore:
            refusal = _cannot_put_back(settings, mode)
        plan_ids = [plan_id for plan_id, _ in state.permits.items()]
        return Before(
            refusal=refusal,
            apply_mode=mode,
            permits=len(plan_ids),
            seq=state.seq,
            keys=tuple(ledger.keys.permit(plan_id) for plan_id in plan_ids),
        )


def explanation(settings: Settings, before: Before) -> str:
    """What a person is told before they are asked."""
    return (
        f"This disarms for real: {before.permits} outstanding permits die, {settings.apply_config_path} is set to "
        f"APPLY_MODE={DRY_RUN} (it says {before.apply_mode}), {settings.apply_service} is restarted. Then the gate is "
        "armed again. Plans that come meanwhile are blocked (disarmed). It is recorded with your name and the reason "
        f"{REASON!r}. See that nobody else disarms meanwhile: a disarm during a drill adds nothing to it."
    )


async def carry_out(settings: Settings, before: Before, *, operator: str, restore: bool) -> dict[str, Any]:
    """The drill.

    Args:
        settings: where everything is.
        before: what `prepare` saw.
        operator: who; recorded.
        restore: whether to put the Apply Layer's mode back at the end.

    Returns:
        `steps`, `message`, `code` (0 all of it was done and seen, 1 not), `state`, `epoch`, `operator`.

    Raises:
        StoreError: Redis cannot be read.
    """
    async with connected(settings, answer_s=by_hand.REDIS_S) as client:
        watch = _Watch(store_on(client, settings), Keys(settings.key_prefix), settings, before, operator)
        looking = asyncio.create_task(watch.run())
        try:
            told = await by_hand.disarm(settings, reason=REASON, operator=operator)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(watch.complete.wait(), LAST_LOOK_S if told["code"] == DONE else 0)
        finally:
            watch.over = True  # and no cancellation: a client may swallow one
            await looking
    steps = watch.steps()
    found: dict[str, Any] = {"operator": operator, "steps": steps, "state": told["state"], "epoch": told["epoch"]}
    if told["code"] != DONE or told.get("reason") != REASON or watch.another is not None:
        why = f"somebody else stopped it meanwhile ({watch.another})" if watch.another else told["message"]
        return found | {
            "code": FAILED,
            "message": f"The drill ended DISARMED and nothing was armed again: {why}",
        }
    return found | await _back(settings, before, operator=operator, restore=restore, steps=steps)


async def _back(
    settings: Settings, before: Before, *, operator: str, restore: bool, steps: list[Step]
) -> dict[str, Any]:
    began = time.monotonic()
    wanted = restore and before.trades
    told = await by_hand.rearm(
        settings, reason=REASON, operator=operator, force=False, restore=wanted, apply_mode=before.apply_mode if wanted
        else None,
    )  # fmt: skip
    took = round(time.monotonic() - began, 3)
    armed = told["state"] != DISARMED
    missed = [step.step for step in steps if step.seconds is None]
    steps.append(Step("armed again", took if armed else None, f"epoch {told['epoch']}"))
    if wanted:
        back = bool(told.get("restored"))
        steps.append(Step("Apply Layer put back", took if back else None, f"APPLY_MODE={told.get('apply_mode')}"))
    message = told["message"]
    if missed:
        message = f"NOT SEEN: {', '.join(missed)}. {message}"
    return {
        "steps": steps,
        "state": told["state"],
        "epoch": told["epoch"],
        "code": DONE if told["code"] == DONE and armed and not missed else FAILED,
        "message": message,
    }


class _Watch:
    """Sees from outside what a disarm does, and when."""

    def __init__(self, store: EventStore, keys: Keys, settings: Settings, before: Before, operator: str) -> None:
        self.complete = asyncio.Event()
        """Everything was seen."""
        self.another: str | None = None
        """The brake of somebody else that was seen meanwhile."""
        self.over = False
        """Whether there is nothing more to see."""
        self._store = store
        self._keys = keys
        self._before = before
        self._operator = operator
        self._actuator = _actuator(settings)
        self._began = time.monotonic()
        self._seen: dict[str, tuple[float, str]] = {}

    async def run(self) -> None:
        """Look until it is over. What cannot be looked at is not seen."""
        after = self._before.seq
        with contextlib.suppress(StoreError, ValueError):
            while not self.over:
                after = await self._read_on(after)
                await self._look()
                await asyncio.sleep(LOOK_S)

    def steps(self) -> list[Step]:
        """In order; what was not seen too."""
        rows = (
            ("disarmed", "no permit from here on"),
            ("permits gone", f"{self._before.permits} were outstanding"),
            ("file says dry run", str(self._actuator.config_path)),
            ("service restarted and verified", ""),
        )
        return [
            Step(name, *(self._seen[name][0], self._seen[name][1] or told) if name in self._seen else (None, told))
            for name, told in rows
        ]

    def _see(self, name: str, told: str = "") -> None:
        if name not in self._seen:
            self._seen[name] = (round(time.monotonic() - self._began, 3), told)
        if len(self._seen) == len(self.steps()):
            self.complete.set()

    async def _read_on(self, after: int) -> int:
        for entry in await self._store.read(after, limit=100):
            after = entry.seq
            event = decode(entry).event
            if isinstance(event, DisarmStarted):
                self._see("disarmed", f"event {entry.seq}, epoch {event.epoch}")
            elif isinstance(event, ManualDisarm):
                self._see("service restarted and verified", _proven(event))
        return after

    async def _look(self) -> None:
        if "disarmed" in self._seen and not any(await self._store.values(*self._before.keys)):
            self._see("permits gone")
        if self._actuator.apply_mode() == DRY_RUN:
            self._see("file says dry run")
        (brake,) = await self._store.values(self._keys.halt)
        if brake is not None and not _ours(brake, self._operator):
            self.another = clean(brake.decode(errors="replace"), 100)


def _ours(brake: bytes, operator: str) -> bool:
    try:
        told: Any = msgspec.json.decode(brake)
        return bool(told["reason"] == REASON and told["operator"] == operator)
    except (msgspec.MsgspecError, LookupError, TypeError):
        return False


def _proven(event: ManualDisarm) -> str:
    proof = event.proof
    parts = [
        f"{proof.get('service')} {proof.get('active_state')}",
        f"invocation {str(proof.get('invocation_after'))[:8]}",
    ]
    if proof.get("environ_mode") is not None:
        parts.append(f"its process has APPLY_MODE={proof['environ_mode']}")
    return ", ".join(parts + [str(note) for note in proof.get("notes", ())])


def _cannot_put_back(settings: Settings, mode: str | None) -> str | None:
    if mode in (None, DRY_RUN):
        return None
    try:
        _actuator(settings).check_put_back(mode or "")
    except ActuatorError as error:
        return f"the Apply Layer could not be put back: {error}"
    return None


def _actuator(settings: Settings) -> Actuator:
    return Actuator(config_path=Path(settings.apply_config_path), service=settings.apply_service, clock=now)


def print_drill(told: dict[str, Any]) -> None:
    """A table of the steps, then what came of it."""
    steps: list[Step] = told["steps"]
    width = max(len(step.step) for step in steps)
    for step in steps:
        when = "not seen" if step.seconds is None else f"{step.seconds:.3f} s"
        colour = "red" if step.seconds is None else None
        click.echo(f"{step.step:<{width}}  {click.style(f'{when:>9}', fg=colour)}  {step.seen}")
    click.echo(told["message"], err=told["code"] != DONE)
