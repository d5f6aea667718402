"""The whole program from one seed: governors, store, exchange, clients, people, clocks and everything that breaks.

    python -m tests.simulation --seed 7 --trace       one schedule, told
    python -m tests.simulation --seeds 0..5000        many, until one fails
    python -m tests.simulation --minutes 10           seeds nobody has seen before

The service, the ledger, the decider, the intake and the commands disarm and rearm run as they are. What they touch of
the outside is made here and misbehaves as the seed says. Nothing waits: time is a number that jumps to the next timer,
and threads run only while the loop stands still, so a seed is one story, told the same way in every process.

After each commit an auditor reads what was written and holds it to the promises. It shares nothing with the
projections. One schedule is a few seconds of virtual time; then all faults end and everything that is still open has
to be settled soon.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import heapq
import itertools
import json
import sys
import threading
import time as real_time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextvars import Context, ContextVar, copy_context
from decimal import Decimal
from functools import cache, partial
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import redis.exceptions

from events.codec import decode
from events.intake import GROUP, SHA, Intake
from events.keys import Keys
from events.store import Commit, MemoryStore, RefusedError, StoreError, UnavailableError, Write
from events.types import (
    ApplyModeDrifted,
    ApplyModeRestored,
    AutoDisarm,
    Decision,
    DisarmStarted,
    DriftEnded,
    Entry,
    Event,
    Execution,
    Head,
    ManualDisarm,
    PermitConsumed,
    PermitExpired,
    PermitRevoked,
    PlanLost,
    PlanReceived,
    PlanRejected,
    Rearmed,
    UnpermittedExecution,
)
from governor import by_hand, disarming, ledger, outside, rearming, service
from governor.actuator import ActuatorError, Pending, Proof
from governor.ledger import Ledger
from governor.market import Market
from governor.notify import Notifier
from governor.policy import Policy
from governor.service import Governor
from governor.settings import Settings, load
from projections.state import State, digest, evolve, initial

KEYS = Keys()
PERMIT = KEYS.permit("")
SYMBOLS = ("BTCUSDT", "ETHUSDT", "DOGEUSDT")
ACTIONS = ("FULL_CLOSE_PROPOSED", "PARTIAL_75", "PARTIAL_50", "PARTIAL_25", "UPDATE_SL", "OPEN_LONG")
NOON_US = 1_769_256_000_000_000
"""2026-01-24 12:00:00 UTC."""
GRANT_US = 2_001_000
"""A permit reaches the store within two seconds of its decision (by a clock that tells milliseconds)."""
MARKET_US = 7_100_000
"""What the exchange said is this old at most when it is decided on: five seconds, and its timeout."""
HOUR_US, DAY_US = 3_600_000_000, 86_400_000_000
FIVE_MINUTES_US = 300_000_000
STEPS = 24
ANSWER_S = 2.0
"""How long a request waits for its answer."""
SETTLED_S = 15.0
"""Once faults have ended, what is open is settled within this virtual time; a disarm waits for its back-off too."""
DISARMED_S = 30.0
HANDLE_S = 0.000_005
"""What running one callback costs: a program that spins does not stop time."""
TESTNET = {"BINANCE_TESTNET_API_KEY": "k", "BINANCE_TESTNET_API_SECRET": "s"}
ENVIRONMENTS: tuple[dict[str, str], ...] = (
    TESTNET,
    TESTNET | {"GOV_PERMIT_TTL_SEC": "2", "GOV_THROTTLE_COOLDOWN_SEC": "2"},
    TESTNET
    | {
        "GOV_MAX_EXEC_PER_HOUR": "off", "GOV_MAX_EXEC_PER_5MIN": "off", "GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD": "3000",
        "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "1500", "GOV_PERMIT_TTL_SEC": "3", "GOV_DISARM_ON_ERROR_COUNT": "3",
    },
    TESTNET | {"GOV_MAX_EXEC_PER_HOUR": "6", "GOV_MAX_EXEC_PER_5MIN": "4", "GOV_PERMIT_TTL_SEC": "4",
               "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "off"},
    TESTNET | {"GOV_ENABLE_AUTO_DISARM": "false", "GOV_MAX_EXEC_PER_5MIN": "1", "GOV_THROTTLE_COOLDOWN_SEC": "1"},
    {"GOV_FALLBACK_QTY": "0.003", "GOV_MAX_EXEC_PER_5MIN": "off", "GOV_MAX_EXEC_PER_HOUR": "8",
     "GOV_PERMIT_TTL_SEC": "2", "GOV_DISARM_ON_ERROR_COUNT": "off"},
)  # fmt: skip


@cache
def settings_of(index: int) -> Settings:
    return load(ENVIRONMENTS[index])


class Violation(BaseException):
    """A promise was broken. No Exception, so that nobody keeps it."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant
        self.detail = detail


class NobodyThoughtOfThisError(Exception):
    """What the simulated exchange raises at times: the program has to live with it."""


# -- time and processes --------------------------------------------------------------------------------------------


class Process:
    """Something that runs beside others, can stand still, and can be gone from one callback to the next."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.offset_us = 0
        """Its clock minus the world's."""
        self.dead = False
        self.leaving = False
        self.frozen_until = 0.0
        self.deferred: list[Handle] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.puppets: list[Puppet] = []
        self.context = copy_context()
        self.context.run(PROCESS.set, self)
        self.governor: Governor | None = None
        self.running: asyncio.Task[None] | None = None


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class Handle:
    """One callback, due now or later."""

    __slots__ = ("args", "callback", "cancelled_", "context", "process", "when_")

    def __init__(self, when: float, callback: Callable[..., Any], args: tuple[Any, ...], context: Context) -> None:
        self.when_ = when
        self.callback = callback
        self.args = args
        self.context = context
        self.process: Process | None = context.get(PROCESS)
        self.cancelled_ = False

    def cancel(self) -> None:
        self.cancelled_ = True

    def cancelled(self) -> bool:
        return self.cancelled_

    def when(self) -> float:
        return self.when_

    def run(self) -> None:
        if not self.cancelled_:
            self.context.run(self.callback, *self.args)


class VirtualLoop:
    """An event loop whose time is a number. Timers that are due together run in an order the seed chooses.

    It has what tasks, futures, timeouts and sleeps ask of a loop, and nothing of files and sockets.
    """

    def __init__(self, random: Random) -> None:
        self.now = 0.0
        self.violation: Violation | None = None
        self._random = random
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, float, int, Handle]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What nobody awaited. It is told when the collector comes, so it can be no part of the story."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name or "", context=context)  # type: ignore[arg-type]
        process = PROCESS.get() if context is None else context.get(PROCESS)
        if process is not None:
            if len(process.tasks) > 64:
                process.tasks = [each for each in process.tasks if not each.done()]
            process.tasks.append(task)
        return task

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Handle:
        handle = Handle(self.now, callback, args, copy_context() if context is None else context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Handle:
        return self.call_at(self.now + max(0.0, delay), callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Handle:
        handle = Handle(when, callback, args, copy_context() if context is None else context)
        heapq.heappush(self._timers, (when, self._random.random(), next(self._numbers), handle))
        return handle

    def run(self, work: Coroutine[Any, Any, Any], *, context: Context, most_s: float) -> None:
        """Run until `work` is done. Raises the violation, if there was one."""
        asyncio._set_running_loop(self)  # type: ignore[arg-type]
        try:
            main = context.run(self.create_task, work)
            while not main.done():
                if self.now > most_s:
                    raise Violation("it comes to an end", f"still busy after {most_s} virtual seconds")
                self._turn()
            main.result()
        finally:
            asyncio._set_running_loop(None)

    def _turn(self) -> None:
        ready, timers = self._ready, self._timers
        if not ready:
            self.now = max(self.now, timers[0][0])
        while timers and timers[0][0] <= self.now:
            ready.append(heapq.heappop(timers)[3])
        for _ in range(len(ready)):
            if not ready:
                return  # a process that was killed took what was its own
            handle = ready.popleft()
            if handle.cancelled_:
                continue
            process = handle.process
            if process is not None:
                if process.dead:
                    continue
                if process.frozen_until > self.now:
                    process.deferred.append(handle)
                    continue
            self.now += HANDLE_S
            handle.run()
            if self.violation is not None:
                raise self.violation

    def freeze(self, process: Process, seconds: float) -> None:
        process.frozen_until = max(process.frozen_until, self.now + seconds)
        self.call_at(process.frozen_until, self._thaw, process)

    def _thaw(self, process: Process) -> None:
        if process.frozen_until <= self.now:
            self._ready.extend(process.deferred)
            process.deferred.clear()

    def kill(self, process: Process) -> None:
        """End a process here and now: whatever it would still do on its way out reaches nobody."""
        if process.dead:
            return
        process.dead = True
        for puppet in process.puppets:
            puppet.kill()
        for _ in range(50):
            left = [task for task in process.tasks if not task.done()]
            if not left:
                break
            for task in left:
                task.cancel()
            while mine := [*process.deferred, *(each for each in self._ready if each.process is process)]:
                process.deferred.clear()
                others = [each for each in self._ready if each.process is not process]
                self._ready.clear()
                self._ready.extend(others)
                for handle in mine:
                    handle.run()
        else:
            raise AssertionError(f"{process.name} cannot be killed: {left}")

    def close(self, processes: Sequence[Process]) -> None:
        """End all of them, so that nothing is left to the collector."""
        asyncio._set_running_loop(self)  # type: ignore[arg-type]
        try:
            for process in processes:
                self.kill(process)
        finally:
            asyncio._set_running_loop(None)


class Killed(BaseException):
    """The process of this thread is gone."""


class Puppet:
    """A thread that runs only while the loop stands still, so that what it waits for comes in virtual time.

    Takes the place of `threading.Thread`.
    """

    def __init__(self, target: Callable[[], None], daemon: bool) -> None:  # noqa: FBT001 - the original's
        process = PROCESS.get()
        assert process is not None
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()
        self._target = target
        self._process = process
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=daemon)
        self._started = False
        self._done = threading.Event()

    def start(self) -> None:
        self._process.puppets = [each for each in self._process.puppets if not each._done.is_set()]
        self._process.puppets.append(self)
        self._loop.call_soon(self.resume)

    def resume(self) -> None:
        """Let the thread run until it waits or ends. Called by the loop."""
        if self._done.is_set():
            return
        if self._started:
            self._mine.release()
        else:
            self._started = True
            self._thread.start()
        self._theirs.acquire()
        if self._done.is_set():
            self._thread.join()

    def kill(self) -> None:
        if self._started:
            self.resume()
        self._done.set()

    def wait(self) -> None:
        """Give way to the loop until `resume`. Called by the thread."""
        self._theirs.release()
        self._mine.acquire()
        if self._process.dead:
            raise Killed

    def sleep(self, seconds: float) -> None:
        self._loop.call_later(seconds, self.resume)
        self.wait()

    def result(self, work: Coroutine[Any, Any, Any], timeout: float) -> Any:
        """What `asyncio.run_coroutine_threadsafe(work, loop).result(timeout)` is."""
        over: list[asyncio.Task[Any] | None] = []

        def end(task: asyncio.Task[Any] | None) -> None:
            if task is not None and not task.cancelled():
                task.exception()  # looked at: it may come after the timeout
            if not over:
                over.append(task)
                self.resume()

        def begin() -> None:
            task = self._loop.create_task(work)
            task.add_done_callback(end)
            self._loop.call_later(timeout, end, None)

        self._loop.call_soon(begin)
        self.wait()
        if over[0] is None:
            raise TimeoutError
        return over[0].result()

    def _run(self) -> None:
        _THREAD.puppet = self
        with contextlib.suppress(Killed):
            self._context.run(self._target)
        self._done.set()
        self._theirs.release()


_THREAD = threading.local()


class Asyncio:
    """The module, with its two ways between threads and the loop led through puppets."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    def run_coroutine_threadsafe(work: Coroutine[Any, Any, Any], _loop: Any) -> Any:
        puppet: Puppet = _THREAD.puppet
        return SimpleNamespace(result=lambda timeout: puppet.result(work, timeout))

    @staticmethod
    async def to_thread(work: Callable[[], Any]) -> Any:
        return await disarming.in_thread(work)


# -- the auditor ---------------------------------------------------------------------------------------------------


class Grant(NamedTuple):
    """One execution that was permitted and takes a place."""

    plan_id: str
    symbol: str
    stop: bool
    at: int
    seq: int
    epoch: int
    quantity: Decimal
    notional: Decimal
    priced: bool


def need(holds: object, invariant: str, detail: Callable[[], object] | str = "") -> None:
    if not holds:
        raise Violation(invariant, str(detail if isinstance(detail, str) else detail()))


class Auditor:
    """Reads every commit, keeps plain lists, and holds them to the promises."""

    def __init__(self, policy: Policy, world: World) -> None:
        self.policy = policy
        self.world = world
        self.hashes: list[str] = []
        self.head = Head(0, "0" * 64)
        self.time = 0
        self.first_at = 0
        self.counted: list[Grant] = []
        self.granted: dict[str, Grant] = {}
        self.granted_wall: dict[str, int] = {}
        self.fate: dict[str, str] = {}
        """Of plan_ids: outstanding, consumed, expired, revoked, none."""
        self.decided_at: dict[str, int] = {}
        self.disarmed = False
        self.epoch = 1
        self.pending: int | None = None
        """Epoch of the disarm that has no proof."""
        self.forced_before = 0
        self.drift: str | None = None
        """What the Apply Layer's file was set to by hand, as far as it was told."""
        self.noted: set[str | int | None] = set()
        self.told: dict[str, str] = {}
        """Plan entry to the event that told it."""
        self.results: set[str] = set()
        self.taken: set[str] = set()
        """Permits whose key a client deleted itself."""
        self.counts: Counter[str] = Counter()
        self.blamed = 0
        """Executions with a permit that were told as unpermitted: a disarm came between."""
        self._last: Event | None = None

    def committed(self, commit: Commit, store: MemoryStore, *, halted: bool) -> None:
        """One commit happened. `halted`: the brake had been there before it."""
        told: set[str] = set()
        events = [event for entry in commit.entries if (event := self.entry(entry)) is not None]
        for event in events:
            told |= self.told_by(event)
        need(not isinstance(self._last, PlanReceived), "a plan and its decision are one commit")
        acked = {ack.entry_id for ack in commit.acks if ack.stream == KEYS.plans}
        need(told <= acked, "what is told is acknowledged in the same step", lambda: sorted(told - acked))
        lost = sorted(entry_id for entry_id in acked if entry_id not in self.told)
        need(not lost, "no plan is acknowledged without its event", lambda: lost)
        for ack in commit.acks:
            matters = self.world.server.matters.get(ack.entry_id) if ack.stream == KEYS.results else None
            known = not matters or ack.entry_id in self.results
            need(known, "no execution is acknowledged without its event", ack.entry_id)
        around = {event.entry_id for event in events if isinstance(event, UnpermittedExecution)}
        for event in events:
            if isinstance(event, Execution) and event.entry_id not in around:
                need(not self.around_the_gate(event), "an execution without a permit is told", event.plan_id)
        strict = self.policy.auto_disarm and self.policy.disarm_on_unpermitted
        need(not (around and strict) or self.disarmed, "an execution without a permit disarms")
        for write in commit.writes:
            if write.op == "set" and write.key.startswith(PERMIT):
                self.permit_written(write, halted=halted)
        self.permit_keys(store)

    def around_the_gate(self, event: Execution) -> bool:
        """Whether it had no permit, and that can be known: it is from our time."""
        at = int(event.entry_id.partition("-")[0]) * 1000
        ours = self.first_at < at and at > self.time - DAY_US and "clock" not in self.world.faults
        return event.executed and (event.permit in ("none", "revoked") or (event.permit == "unknown" and ours))

    def permit_keys(self, store: MemoryStore) -> None:
        for key in [key for key in store._keys if key.startswith(PERMIT)]:
            if store.get(key) is not None:
                plan_id = key[len(PERMIT) :]
                need(not self.disarmed, "no permit while DISARMED", plan_id)
                need(self.fate.get(plan_id) == "outstanding", "every permit key is a grant's", self.about(plan_id))
                need(self.granted[plan_id].epoch == self.epoch, "no permit of an epoch that is over", plan_id)

    def permit_written(self, write: Write, *, halted: bool) -> None:
        need(not halted, "no permit once the brake is set", write.key)
        permit = json.loads(write.values[0], parse_float=Decimal)
        grant = self.granted.get(permit["plan_id"])
        said = (permit["plan_id"], permit["symbol"], permit["seq"], permit["epoch"], Decimal(permit["computed_qty"]))
        granted = grant and (write.key[len(PERMIT) :], grant.symbol, grant.seq, grant.epoch, grant.quantity)
        need(said == granted, "a permit says what its decision says", lambda: f"{permit} of {grant}")
        need(write.ttl_ms > 0, "a permit ends", write.key)

    def entry(self, entry: Entry) -> Event | None:
        """One event, linked to the one before. None: it was there before, and has been written back."""
        covered = f"{self.head.hash}\n{entry.name}\n{entry.seq}\n{entry.timestamp}\n".encode() + entry.data
        need(entry.seq == self.head.seq + 1, "no gap", lambda: f"{entry.seq} after {self.head.seq}")
        need(hashlib.sha256(covered).hexdigest() == entry.hash, "the chain holds", f"event {entry.seq}")
        self.head = entry.head
        if entry.seq <= len(self.hashes):
            need(self.hashes[entry.seq - 1] == entry.hash, "one history", f"event {entry.seq} is another one now")
            return None
        self.hashes.append(entry.hash)
        recorded = decode(entry)
        self.time = max(self.time, recorded.at)
        self.first_at = self.first_at or self.time
        self.read(recorded.seq, recorded.at, recorded.event)
        self.world.say("event", f"{entry.seq} {entry.name} {brief(recorded.event)} {entry.hash[:8]}")
        return recorded.event

    def told_by(self, event: Event) -> set[str]:
        match event:
            case PlanReceived() | PlanRejected():
                entry_ids: tuple[str, ...] = (event.entry_id,)
            case PlanLost():
                entry_ids = event.entry_ids
            case _:
                return set()
        for entry_id in entry_ids:
            need(entry_id not in self.told, "an entry is told once", entry_id)
            self.told[entry_id] = event.NAME
        return set(entry_ids)

    def read(self, seq: int, at: int, event: Event) -> None:
        if isinstance(self._last, PlanReceived):
            same = isinstance(event, Decision) and (event.plan_id, event.entry_id) == (
                self._last.plan_id,
                self._last.entry_id,
            )
            need(same, "a decision follows its plan", event.NAME)
        self.counts[event.NAME] += 1
        match event:
            case Decision():
                need(isinstance(self._last, PlanReceived), "a decision has its plan", event.plan_id)
                self.counts[event.verdict] += 1
                if event.verdict == "EXECUTE":
                    self.grant(seq, event)
                    self.fresh(at, event)
                elif event.verdict == "BLOCK" and self.fate.get(event.plan_id) != "outstanding":
                    self.fate[event.plan_id] = "none"
                if event.verdict == "BLOCK":
                    self.refused(event)
                if event.verdict != "SKIP":
                    self.decided_at[event.plan_id] = self.time
            case PermitExpired():
                self.end(event.plan_id, "expired")
                need(event.plan_id not in self.taken, "what a client took is not given back", event.plan_id)
                self.counted.remove(self.granted[event.plan_id])
            case PermitConsumed():
                self.end(event.plan_id, "consumed")
            case PermitRevoked():
                self.end(event.plan_id, "revoked")
            case Execution():
                self.execution(event)
            case DisarmStarted():
                need(event.epoch == self.epoch + 1, "a disarm begins the next epoch", f"{event.epoch}")
                noted = event.context.get("noted_us")
                need(noted is None or noted not in self.noted, "a note is told once", str(noted))
                self.noted.add(noted)
                self.disarmed, self.epoch, self.pending, self.drift = True, event.epoch, event.epoch, None
                self.forced_before = self.world.host.forced - (noted is not None)
            case AutoDisarm() | ManualDisarm():
                need(event.epoch == self.pending, "a proof has its disarm", f"{event.epoch}, open is {self.pending}")
                need(self.world.host.forced > self.forced_before, "proven is what was done", f"epoch {event.epoch}")
                self.pending = None
            case Rearmed():
                need(self.disarmed and event.epoch == self.epoch + 1, "only a disarm is re-armed", f"{event.epoch}")
                need(event.forced or self.pending is None, "no re-arming while a disarm is unfinished")
                self.disarmed, self.epoch, self.pending, self.drift = False, event.epoch, None, None
            case ApplyModeDrifted(apply_mode=mode):
                need(self.disarmed and self.pending is None, "only a file in dry run drifts", mode)
                need((mode != self.drift, event.epoch) == (True, self.epoch), "a drift is told once", mode)
                self.drift = mode
            case DriftEnded():
                need(self.drift is not None and event.epoch == self.epoch, "only a drift ends")
                self.drift = None
            case ApplyModeRestored():
                need(event.epoch <= self.epoch, "what was put back was armed", f"epoch {event.epoch}")
            case _:
                pass
        self._last = event

    def end(self, plan_id: str, how: str) -> None:
        fate = self.fate.get(plan_id)
        corrected = fate == "revoked" and how == "consumed"
        need(fate == "outstanding" or corrected, "a permit ends once", lambda: f"{how}: {self.about(plan_id)}")
        self.fate[plan_id] = how

    def execution(self, event: Execution) -> None:
        need(event.entry_id not in self.results, "a result is told once", event.entry_id)
        self.results.add(event.entry_id)
        fate = self.fate.get(event.plan_id)
        if fate is not None and self.time - self.decided_at[event.plan_id] < DAY_US:
            matched = event.permit == fate
            need(matched, "a result is matched to its permit", lambda: f"{event.permit}: {self.about(event.plan_id)}")
        if event.executed and event.plan_id in self.taken and event.permit == "revoked":
            self.blamed += 1
            need(self.world.faults & UNKNOWN, "who had a permit is not blamed", event.plan_id)
        if event.counted:
            self.counted.append(self.granted[event.plan_id]._replace(at=self.time))
            self.fate[event.plan_id] = "consumed"

    def grant(self, seq: int, event: Decision) -> None:
        before = self.granted.get(event.plan_id)
        wall = self.world.wall_us()
        need(
            before is None or min(self.time - before.at, wall - self.granted_wall[event.plan_id]) >= DAY_US,
            "one permit a plan_id",
            lambda: f"events {before.seq if before else 0} and {seq}: {event.plan_id}",
        )
        need(not self.disarmed, "nothing is granted while DISARMED", event.plan_id)
        need(event.epoch == self.epoch, "a permit is of the present epoch", event.plan_id)
        new = self.asked(seq, event)
        self.admissible(new)
        self.counted.append(new)
        self.granted[event.plan_id] = new
        self.granted_wall[event.plan_id] = wall
        self.fate[event.plan_id] = "outstanding"
        self.taken.discard(event.plan_id)

    def places(self, new: Grant) -> dict[str, tuple[Decimal | int, Decimal | int | None]]:
        """What a plan would use of each limit, itself included, and the limit; by the reason for refusing it."""
        limits = self.policy.of(new.symbol)
        same = [c.at for c in self.counted if (c.symbol, c.stop) == (new.symbol, new.stop)]
        used: dict[str, tuple[Decimal | int, Decimal | int | None]] = {
            "hourly_limit_exceeded": (1 + sum(at > new.at - HOUR_US for at in same), limits.per_hour),
            "burst_limit_exceeded": (1 + sum(at > new.at - FIVE_MINUTES_US for at in same), limits.per_5min),
        }
        if new.stop:
            return used
        today = [new, *(c for c in self.counted if c.at // DAY_US == new.at // DAY_US and not c.stop)]
        mine = [c for c in today if c.symbol == new.symbol]
        if new.priced:
            used["daily_limit_exceeded"] = (sum(c.notional for c in mine), limits.notional_per_day)
            most = self.policy.total_notional_per_day
            used["total_daily_limit_exceeded"] = (sum(c.notional for c in today), most)
        else:
            used["daily_limit_exceeded"] = (sum(c.quantity for c in mine), limits.qty_per_day)
        return used

    def admissible(self, new: Grant) -> None:
        """It had its place: in both windows, and in the totals of its day."""
        for reason, (used, most) in self.places(new).items():
            need(most is None or used <= most, "no limit is passed", f"{reason}: {used} of {most}, {new}")

    def fresh(self, at: int, event: Decision) -> None:
        """Its decision is young, and so is what the exchange said. Where clocks step, nobody could know."""
        if "clock" in self.world.faults:
            return
        need(self.world.wall_us() - at <= GRANT_US, "no permit on a decision that is old", event.plan_id)
        young = not event.asked or self.world.exchange.told_since(at - MARKET_US, event)
        need(young, "no permit on exchange data that is old", event.plan_id)

    def refused(self, event: Decision) -> None:
        """There was no place: nothing is counted that is not taken."""
        asked = self.asked(0, event)
        if event.reason in (places := self.places(asked)):
            used, most = places[event.reason]
            need(
                most is not None and used > most,
                "only a full limit refuses",
                f"{event.reason}: {used} of {most}, {asked}",
            )

    def asked(self, seq: int, event: Decision) -> Grant:
        return Grant(
            event.plan_id,
            event.symbol,
            event.action == "UPDATE_SL",
            self.time,
            seq,
            event.epoch,
            event.computed_qty or Decimal(0),
            event.computed_notional or Decimal(0),
            event.mark_price is not None,
        )

    def took(self, plan_id: str) -> None:
        """A client deleted the key itself: it may execute."""
        need(self.fate.get(plan_id) == "outstanding", "only what is granted is taken", lambda: self.about(plan_id))
        need(plan_id not in self.taken, "a permit is taken once", plan_id)
        self.taken.add(plan_id)

    def about(self, plan_id: str) -> str:
        return f"{plan_id} is {self.fate.get(plan_id)}, {self.granted.get(plan_id)}"

    def outstanding(self) -> list[Grant]:
        """The oldest first."""
        found = [self.granted[plan_id] for plan_id, fate in self.fate.items() if fate == "outstanding"]
        return sorted(found, key=lambda grant: grant.seq)

    def agrees(self, state: State) -> None:
        """The fold counts what was counted here."""
        ours = self.counts
        theirs = state.counts
        need(
            (theirs.plans, theirs.allowed, theirs.blocked, theirs.skipped)
            == (ours["PLAN_RECEIVED"], ours["EXECUTE"], ours["BLOCK"], ours["SKIP"])
            and theirs.plans == theirs.allowed + theirs.blocked + theirs.skipped,
            "allowed, blocked and skipped are the plans",
            lambda: f"{theirs}, {ours}",
        )
        need(
            sorted(grant.plan_id for grant in self.outstanding())
            == sorted(plan_id for plan_id, _ in state.permits.items()),
            "the same permits are out",
        )
        need((state.mode.state == "DISARMED", state.mode.epoch) == (self.disarmed, self.epoch), "the same state")


def brief(event: Event) -> str:
    names = ("plan_id", "verdict", "reason", "permit", "source", "epoch", "symbol", "kind")
    return " ".join(str(value) for name in names if (value := getattr(event, name, None)) is not None)


# -- the server and the way to it ----------------------------------------------------------------------------------


class Group:
    """A consumer group: what was delivered, and what of it is not acknowledged."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.pending: dict[str, float] = {}
        """When each was delivered."""


class Server:
    """Redis as far as the program uses it: the event store, two streams with their groups, and its moods."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = MemoryStore(lambda: world.wall_us() // 1000, halt=KEYS.halt)
        self.streams: dict[str, dict[str, dict[str, str] | None]] = {KEYS.plans: {}, KEYS.results: {}}
        """Entries by id; None: trimmed."""
        self.order: dict[str, list[str]] = {KEYS.plans: [], KEYS.results: []}
        self.groups: dict[str, Group] = {}
        self.matters: dict[str, bool] = {}
        """Results that have to become an event."""
        self.away_until = self.stalled_until = self.refusing_until = 0.0
        self.refusal = "OOM command not allowed when used memory > 'maxmemory'."
        self.waiting: list[asyncio.Future[None]] = []
        self._number = 0

    def refuse(self) -> None:
        if self.world.loop.now < self.refusing_until:
            raise RefusedError(self.refusal)

    def commit(self, commit: Commit) -> frozenset[str]:
        self.refuse()
        halted = self.store.get(KEYS.halt) is not None
        gone: frozenset[str] = at_once(self.store.commit(commit))
        for ack in commit.acks:
            if (group := self.groups.get(ack.stream)) is not None:
                group.pending.pop(ack.entry_id, None)
        self.world.auditor.committed(commit, self.store, halted=halted)
        return gone

    def write(self, writes: Sequence[Write]) -> None:
        self.refuse()
        at_once(self.store.write(writes))

    def add(self, stream: str, fields: dict[str, str]) -> str:
        self._number += 1
        entry_id = f"{self.world.wall_us() // 1000}-{self._number}"
        self.streams[stream][entry_id] = fields
        self.order[stream].append(entry_id)
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
        return entry_id

    def create_group(self, stream: str, start: str) -> None:
        self.refuse()
        if stream in self.groups:
            raise redis.exceptions.ResponseError("BUSYGROUP Consumer Group name already exists")
        self.groups[stream] = Group(0 if start == "0" else len(self.order[stream]))

    def deliver(self, wanted: dict[str, str], count: int) -> list[tuple[str, list[tuple[str, dict[str, str] | None]]]]:
        """XREADGROUP: what is new (`>`), or what is pending after an id."""
        reply = []
        for stream, after in wanted.items():
            group = self.groups.get(stream)
            if group is None:
                raise redis.exceptions.ResponseError(f"NOGROUP No such key '{stream}' or consumer group '{GROUP}'")
            entries = self.streams[stream]
            if after != ">":
                rank = {entry_id: number for number, entry_id in enumerate(self.order[stream])}
                start = rank.get(after, -1)
                ids = [each for each in sorted(group.pending, key=rank.__getitem__) if rank[each] > start][:count]
            else:
                ids = []
                while len(ids) < count and group.position < len(self.order[stream]):
                    entry_id = self.order[stream][group.position]
                    group.position += 1
                    if entries[entry_id] is not None:
                        ids.append(entry_id)
            group.pending.update(dict.fromkeys(ids, self.world.loop.now))
            if ids or after != ">":
                reply.append((stream, [(entry_id, entries[entry_id]) for entry_id in ids]))
        return reply

    def pending(self, stream: str, start: str, count: int) -> list[dict[str, Any]]:
        """XPENDING: ids and how long ago each was delivered, in milliseconds."""
        group = self.groups.get(stream)
        if group is None:
            raise redis.exceptions.ResponseError(f"NOGROUP No such key '{stream}' or consumer group '{GROUP}'")
        rank = {entry_id: number for number, entry_id in enumerate(self.order[stream])}
        after = rank.get(start.removeprefix("("), -1)
        ids = [each for each in sorted(group.pending, key=rank.__getitem__) if rank[each] > after][:count]
        now = self.world.loop.now
        return [{"message_id": each, "time_since_delivered": (now - group.pending[each]) * 1000} for each in ids]

    def consume(self, plan_id: str, symbol: str) -> dict[str, Any] | str:
        """What `governor/consume.lua` does: one step, the permit or why not."""
        if self.store.get(KEYS.halt) is not None:
            return "blocked"
        text = self.store.get(KEYS.permit(plan_id))
        if text is None:
            return "blocked" if self.store.get(KEYS.block(plan_id)) is not None else "no_permit"
        permit: dict[str, Any] = json.loads(text[0], parse_float=Decimal)
        if permit["symbol"] != symbol:
            return "wrong_symbol"
        if self.world.wall_us() >= permit["expires_at"] * 1_000_000:
            return "expired"
        state = self.store.get(KEYS.state)
        if state is None:
            return "stale_epoch"
        told = json.loads(state[0])
        if told["epoch"] != permit["epoch"]:
            self.store.take(KEYS.permit(plan_id))
            return "stale_epoch"
        if told["state"] not in ("ARMED", "THROTTLED"):
            return "stale_epoch"
        self.take(plan_id)
        return permit

    def take(self, plan_id: str) -> bool:
        """A client's DEL."""
        if not self.store.take(KEYS.permit(plan_id)):
            return False
        self.world.auditor.took(plan_id)
        return True

    def lose_tail(self, count: int) -> None:
        """It comes back without its last events, as after a power cut or on another replica."""
        kept = self.store.entries[: max(0, len(self.store.entries) - count)]
        self.store.entries[:] = kept
        self.world.auditor.head = kept[-1].head if kept else Head(0, "0" * 64)


def at_once(work: Coroutine[Any, Any, Any]) -> Any:
    """The value of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits for something")


class Link:
    """One process's way to the server. A request and its answer are each late or lost as the seed says."""

    def __init__(self, world: World, process: Process) -> None:
        self.world = world
        self.process = process

    async def call(self, what: str, operation: Callable[[], Any]) -> Any:
        world = self.world
        if self.process.dead:
            raise asyncio.CancelledError
        answer: asyncio.Future[Any] = world.loop.create_future()
        fate = world.fate()
        if fate != "well":
            world.say(self.process.name, f"{what}: {fate}")
        if fate == "dies before it":
            world.later(0, world.crash, self.process)
        elif fate == "request lost":
            world.later(world.patience(), self._fail, answer)
        else:
            world.later(world.latency(), self._arrive, what, operation, answer, fate, world.loop.now)
        return await answer

    def _arrive(
        self, what: str, operation: Callable[[], Any], answer: asyncio.Future[Any], fate: str, sent: float
    ) -> None:
        world, server = self.world, self.world.server
        now = world.loop.now
        if now < server.stalled_until:
            if fate != "waited":
                world.later(sent + ANSWER_S - now, self._fail, answer)
            world.later(server.stalled_until - now, self._arrive, what, operation, answer, "waited", sent)
            return
        if fate == "waited" and answer.done() and what == "xreadgroup" and "late-reads" not in world.faults:
            return
        if now < server.away_until:
            world.later(world.latency(), self._fail, answer)
            return
        outcome: Any
        try:
            outcome = operation()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's
            outcome = error
        if what in ("commit", "write") or isinstance(outcome, Exception):
            world.say("server", f"{what} of {self.process.name}: {type(outcome).__name__}")
        if fate == "dies after it":
            world.crash(self.process)
        elif fate == "answer lost":
            world.later(world.patience(), self._fail, answer)
        else:
            world.later(world.latency(), self._settle, answer, outcome)

    def _settle(self, answer: asyncio.Future[Any], outcome: Any) -> None:
        if answer.done():
            return
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    def _fail(self, answer: asyncio.Future[Any]) -> None:
        self._settle(answer, UnavailableError("no answer"))


class SimulatedStore:
    """The event store at the end of a link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._server = link.world.server

    async def commit(self, commit: Commit) -> frozenset[str]:
        gone: frozenset[str] = await self._link.call("commit", lambda: self._server.commit(commit))
        return gone

    async def head(self) -> Head:
        head: Head = await self._ask("head", lambda store: store.head())
        return head

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        entries: list[Entry] = await self._ask("read", lambda store: store.read(after, limit=limit))
        return entries

    async def follow(self, after: int, *, timeout_s: float) -> list[Entry]:
        await asyncio.sleep(timeout_s)
        return await self.read(after)

    async def values(self, *keys: str) -> list[bytes | None]:
        def look(found: MemoryStore) -> Coroutine[Any, Any, list[bytes | None]]:
            self._link.world.looked_at(keys)
            return found.values(*keys)

        values: list[bytes | None] = await self._ask("values", look)
        return values

    async def exists(self, key: str) -> bool:
        return bool(await self._ask("exists", lambda store: store.exists(key)))

    async def clock(self) -> int:
        return int(await self._ask("clock", lambda store: store.clock()))

    async def write(self, writes: Sequence[Write]) -> None:
        await self._link.call("write", lambda: self._server.write(writes))

    async def _ask(self, what: str, question: Callable[[MemoryStore], Coroutine[Any, Any, Any]]) -> Any:
        return await self._link.call(what, lambda: at_once(question(self._server.store)))


class SimulatedRedis:
    """What `events.intake` needs of a client."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._server = link.world.server

    async def evalsha(self, script: str, _keys: int, stream: str, *arguments: str | int) -> Any:
        """The scripts of `events.intake`; nothing is ever trimmed unread here."""
        if script == SHA["create"]:
            return await self._link.call("xgroup", lambda: self._server.create_group(stream, str(arguments[1])))
        count = int(arguments[3])
        reply = await self._link.call("xreadgroup", lambda: self._server.deliver({stream: ">"}, count))
        return ["OK", *(reply[0][1] if reply else [])]

    async def xpending_range(
        self, stream: str, _group: str, start: str, _end: str, count: int, _consumer: str
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = await self._link.call(
            "xpending", lambda: self._server.pending(stream, start, count)
        )
        return rows

    async def execute_command(self, *words: Any) -> Any:
        """XREADGROUP GROUP group consumer COUNT n BLOCK ms STREAMS key … id …."""
        names = words[9:]
        half = len(names) // 2
        wanted = dict(zip(names[:half], names[half:], strict=True))
        return await self.xreadgroup(words[2], words[3], wanted, count=words[5], block=words[7])

    async def xreadgroup(
        self, _group: str, _consumer: str, wanted: dict[str, str], *, count: int, block: int | None = None
    ) -> Any:
        wanted = dict(wanted)
        reply = await self._link.call("xreadgroup", lambda: self._server.deliver(wanted, count))
        if reply or not block:
            return reply
        loop = self._link.world.loop
        grown = loop.create_future()
        self._server.waiting.append(grown)
        timer = loop.call_later(block / 1000, lambda: None if grown.done() else grown.set_result(None))
        try:
            await grown
        finally:
            timer.cancel()
        return await self._link.call("xreadgroup", lambda: self._server.deliver(wanted, count))


# -- the host: file, service, lock, note ---------------------------------------------------------------------------


class Host:
    """The machine with the Apply Layer on it: its file, its service, the lock and the note beside the file."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.mode = "testnet"
        self.running = "testnet"
        """Mode the service was started with."""
        self.forced = 0
        self.forced_at = 0
        self.broken_until = 0.0
        self.holder: Process | None = None
        self.note: Pending | None = None
        self.writable = True
        """Whether the person who disarms may write the file."""
        self.path = self.config_path = settings_of(0).apply_config_path
        self.service = "apply"
        self.edited = False
        """Whether a person wrote the file by hand since the program last did."""

    def lexists(self, _path: Any) -> bool:
        return self.note is not None

    def access(self, _path: Any, _mode: int) -> bool:
        return self.writable

    # -- as governor.actuator.Actuator

    def apply_mode(self) -> str | None:
        return self.mode

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        mine = self.holder is None
        if mine:
            self.holder = PROCESS.get()
        try:
            yield mine
        finally:
            if mine:
                self.holder = None

    def force_dry_run(self, _reason: str = "", /) -> Proof:
        proof = self._set("dry_run")
        self.forced += 1
        self.forced_at = self.world.wall_us()
        return proof

    def check_put_back(self, mode: str) -> None:
        if not self.writable:
            raise ActuatorError("write", f"{mode} cannot be written", Proof(service="apply"))

    def put_back(self, mode: str) -> Proof:
        return self._set(mode)

    def _set(self, mode: str) -> Proof:
        world, puppet = self.world, _THREAD.puppet
        if self.holder is not PROCESS.get():
            world.fail("file and service are touched by who holds the lock", str(self.holder))
        puppet.sleep(world.random.choice((0.01, 0.1, 0.3, 3.0 if world.faulty("slow actuator") else 0.2)))
        if world.loop.now < self.broken_until:
            if world.random.random() < 0.5:
                self.mode, self.edited = mode, False
            world.say("host", f"{mode} failed")
            raise ActuatorError("restart", "the service does not start", Proof(service="apply"))
        self.mode, self.edited = mode, False
        puppet.sleep(0.05)
        self.running = mode
        world.say("host", f"{mode} forced")
        return Proof(service="apply", apply_mode=mode, active_state="active", seconds=0.1)

    def edit(self, mode: str) -> None:
        """A person with an editor, and with systemctl."""
        self.mode = self.running = mode
        self.edited = True

    # -- as governor.actuator.PendingNote

    def read_pending(self) -> Pending | None:
        return self.note

    def clear_pending(self, told: Pending) -> None:
        if self.note != told:
            return
        if self.world.faulty("stuck-note"):
            raise OSError("read-only file system")
        auditor = self.world.auditor
        undone = told.proof is None and self.forced_at < told.timestamp_us
        if undone and auditor.pending is None and told.timestamp_us not in auditor.noted:
            self.world.fail("no disarm by hand is forgotten", f"{told.reason}, noted {told.timestamp_us}")
        self.note = None

    def write_pending(self, **said: Any) -> None:
        self.note = Pending(**said)


class Exchange:
    """Positions and prices that move, answers that are late, missing or worse."""

    weight_used = 0
    weight_limit = 2400

    def __init__(self, world: World) -> None:
        self.world = world
        self.position = dict.fromkeys(SYMBOLS, Decimal("0.02"))
        self.price = {"BTCUSDT": Decimal(95000), "ETHUSDT": Decimal(3000), "DOGEUSDT": Decimal("0.2")}
        self.told: list[tuple[int, str, Market]] = []
        """When it was asked (wall clock), for what, and what it answered."""

    def told_since(self, asked_us: int, event: Decision) -> bool:
        """Whether a decision's data is an answer to a question asked since then."""
        data = (event.symbol, event.legs, event.mark_price)
        return any(at >= asked_us and (symbol, it.legs, it.mark_price) == data for at, symbol, it in self.told)

    async def market(self, symbol: str) -> Market:
        world = self.world
        bad = world.faulty("exchange") and world.random.random() < 0.3
        slow = world.faulty("exchange") and world.random.random() < 0.1
        asked, position, price = world.wall_us(), self.position[symbol], self.price[symbol]
        await asyncio.sleep(world.random.uniform(0.001, 12.0 if slow else 0.2))
        answer = Market(legs={"BOTH": position}, mark_price=price)
        match world.random.randrange(4) if bad else None:
            case 0:
                answer = Market(position_error="timeout", price_error="timeout")
            case 1:
                answer = Market(legs={"BOTH": position}, price_error="timeout")
            case 2:
                answer = Market(position_error="timeout", mark_price=price)
            case 3:
                raise NobodyThoughtOfThisError
        self.told.append((asked, symbol, answer))
        return answer

    async def warm_up(self) -> None: ...

    async def keep_alive(self) -> None: ...

    async def aclose(self) -> None: ...


class Log:
    """Where the program's own log goes. What it calls unexpected is a broken promise."""

    def __init__(self, world: World) -> None:
        self.world = world

    def debug(self, message: str, **values: Any) -> None: ...

    info = debug

    def warning(self, message: str, **values: Any) -> None:
        self._say(message, values)

    def error(self, message: str, **values: Any) -> None:
        self._say(message, values)
        cause = values.get("exc_info")
        known = isinstance(cause, NobodyThoughtOfThisError)
        lost = values.get("kind") == "history" and "tail" not in self.world.faults
        if (isinstance(cause, BaseException) and not known) or lost:
            self.world.fail("nothing unexpected happens", f"{message}: {values}")

    def exception(self, message: str, **values: Any) -> None:
        self.world.fail("nothing unexpected happens", f"{message}: {sys.exc_info()[1]!r} {values}")

    def _say(self, message: str, values: dict[str, Any]) -> None:
        process = PROCESS.get()
        if process is not None and not process.dead:
            told = " ".join(f"{name}={value!r}" for name, value in values.items() if name != "exc_info")
            self.world.say(process.name, f"log: {message} {told}")


# -- the world -----------------------------------------------------------------------------------------------------

FAULTS = (
    "network", "crash", "freeze", "clock", "jump", "away", "stall", "refuse", "keys", "groups", "trim", "exchange",
    "actuator", "slow actuator", "rogue", "legacy", "people", "results", "snatch",
    "two",
)  # fmt: skip
"""Each schedule has some of them: what always happens together hides what happens alone."""

UNKNOWN = frozenset({"crash", "network", "away", "stall", "freeze", "two"})
"""With these a daemon may not learn, or learn too late, that a permit it revoked had been taken before."""

EXTRA = ("tail", "late-reads", "stuck-note")
"""Faults the program does not recover from by itself, only there when asked for: the server comes back without its
last events; a read that its client has given up is carried out after the client looked at what is pending; the note of
a disarm cannot be removed."""

MOVES: dict[str, tuple[int, str]] = {
    "plans": (10, ""),
    "burst": (2, ""),
    "repeat_plan": (2, ""),
    "malformed_plan": (1, ""),
    "move_market": (2, ""),
    "look": (1, ""),
    "odd_result": (2, "results"),
    "rogue": (2, "rogue"),
    "crash_one": (2, "crash"),
    "leave": (1, "crash"),
    "freeze_one": (2, "freeze"),
    "step_clock": (2, "clock"),
    "jump": (2, "jump"),
    "go_away": (1, "away"),
    "stall": (2, "stall"),
    "refuse": (1, "refuse"),
    "drop_key": (1, "keys"),
    "destroy_group": (1, "groups"),
    "trim": (3, "trim"),
    "break_actuator": (2, "actuator"),
    "disarm": (2, "people"),
    "rearm": (3, ""),
    "edit": (2, "people"),
    "brake": (1, "people"),
    "release_brake": (1, "people"),
    "lose_tail": (1, "tail"),
}
"""What can happen: how often, and the fault it belongs to."""


class World:
    """One schedule."""

    def __init__(self, seed: int, *, steps: int, extra: Sequence[str], trace: bool) -> None:
        self.random = random = Random(seed)  # noqa: S311 - the same again, not hard to guess
        self.steps = steps
        self.step = 0
        self.trace = trace
        self.story: list[str] = []
        self.loop = VirtualLoop(random)
        self.base_us = NOON_US + random.choice((0, 11 * HOUR_US + 3_595_000_000))
        self.settings = settings_of(random.randrange(len(ENVIRONMENTS)))
        self.faults = {fault for fault in FAULTS if random.random() < 0.4} | set(extra)
        self.calm = False
        self.loss = random.choice((0.005, 0.02, 0.1))
        self.slowness = random.choice((0.0003, 0.002, 0.02))
        self.pace = random.choice((0.05, 0.2, 0.4))
        self.auditor = Auditor(self.settings.policy, self)
        self.host = Host(self)
        self.exchange = Exchange(self)
        self.server = Server(self)
        self.itself = Process("world")
        self.context = self.itself.context
        self.processes = [self.itself]
        self.shadow = initial()
        self.governors: list[Process | None] = [None] * (2 if "two" in self.faults else 1)
        self.offsets = [0] * len(self.governors)
        self.people: list[asyncio.Task[Any]] = []
        self.clients: list[asyncio.Task[Any]] = []
        self.plan_ids: list[tuple[str, str]] = []
        self.sizes = {
            "sweep": random.choice((0.1, 0.25, 0.5)), "waiting": random.choice((3, 2000)),
            "read": random.choice((2, 200)), "run": random.choice((1, 2, 32)), "events": random.choice((1, 8, 512)),
            "proposals": random.choice((1, 2, 64)),
            "page": random.choice((3, 5000)),
        }  # fmt: skip
        names = sorted(self.faults)
        self.say("seed", f"{seed} {self.settings.digest} {' '.join(names)} loss={self.loss} {self.sizes}")

    # -- what everything here uses

    def wall_us(self) -> int:
        return self.base_us + int(self.loop.now * 1_000_000)

    def say(self, who: str, what: str) -> None:
        line = f"{self.loop.now:10.6f} #{self.step} {who}: {what}"
        self.story.append(line)
        if self.trace:
            print(line)  # noqa: T201 - a command's output

    def fail(self, invariant: str, detail: str) -> NoReturn:
        process = PROCESS.get()
        violation = Violation(invariant, detail)
        if process is None or not process.dead:
            self.loop.violation = self.loop.violation or violation
        raise violation

    def faulty(self, fault: str) -> bool:
        return not self.calm and fault in self.faults

    def later(self, delay: float, work: Callable[..., Any], *args: Any) -> None:
        """Something that happens outside of every process."""
        self.loop.call_later(delay, work, *args, context=self.context)

    def latency(self) -> float:
        return self.random.uniform(0.1, 2.0) * self.slowness

    def patience(self) -> float:
        """When it shows that an answer will not come: a reset soon, silence after the whole wait."""
        return self.random.choice((0.01, 0.01, ANSWER_S))

    def fate(self) -> str:
        """What becomes of a request."""
        if self.calm:
            return "well"
        chance = self.random.random()
        if "network" in self.faults and chance < self.loss:
            return "request lost" if chance < self.loss / 3 else "answer lost"
        if "crash" in self.faults and chance > 0.999:
            return self.random.choice(("dies before it", "dies after it"))
        return "well"

    async def reach(self) -> None:
        """A client's way to the server: it tries until it gets there."""
        await asyncio.sleep(self.latency())
        while (until := max(self.server.away_until, self.server.stalled_until)) > self.loop.now:
            await asyncio.sleep(until - self.loop.now + self.latency())

    # -- processes

    def process(self, name: str) -> Process:
        process = Process(name)
        self.processes.append(process)
        return process

    def start(self, number: int) -> None:
        """A daemon starts with nothing but what the store has."""
        process = self.process(f"g{number}")
        process.offset_us = self.offsets[number]
        self.governors[number] = process
        self.say(process.name, "starts")
        process.context.run(self._start, process)

    def _start(self, process: Process) -> None:
        link = Link(self, process)
        clock = partial(self._clock, process)
        governor: Governor
        the_ledger = Ledger(
            SimulatedStore(link),
            KEYS,
            clock,
            observe=lambda recorded, state: governor.observe(recorded, state),  # noqa: PLW0108 - bound below
            turned=lambda: governor.beat(),  # noqa: PLW0108
        )
        governor = process.governor = Governor(
            self.settings,
            ledger=the_ledger,
            intake=Intake(
                SimulatedRedis(link),  # type: ignore[arg-type]
                {KEYS.plans: "0", KEYS.results: "$"},
                clock=self.loop.time,
            ),
            exchange=self.exchange if self.settings.credentials else None,
            actuator=self.host,  # type: ignore[arg-type]
            note=self.host,  # type: ignore[arg-type]
            notifier=Notifier({}),
            clock=clock,
        )
        running = process.running = self.loop.create_task(governor.run())
        running.add_done_callback(partial(self._ended, process), context=self.context)

    def _clock(self, process: Process) -> int:
        return self.wall_us() + process.offset_us

    def _ended(self, process: Process, running: asyncio.Task[None]) -> None:
        if not process.dead and not process.leaving:
            error = None if running.cancelled() else running.exception()
            self.fail("a daemon runs until it is told to stop", f"{process.name}: {error!r}")

    def crash(self, process: Process) -> None:
        """Between two callbacks, since no task can be ended from within another."""
        self.loop.call_soon(self._crash, process, context=self.context)

    def _crash(self, process: Process) -> None:
        if process.dead:
            return
        self.say(process.name, "is gone")
        self.loop.kill(process)
        for number, each in enumerate(self.governors):
            if each is process:
                self.governors[number] = None
                self.later(self.random.choice((0.05, 0.5, 2.0)), self._again, number)

    def _again(self, number: int) -> None:
        if self.governors[number] is None:
            self.start(number)

    async def _leave(self, process: Process) -> None:
        """What `governor.daemon` does on SIGTERM."""
        governor, running = process.governor, process.running
        assert governor is not None
        assert running is not None
        await governor.stop(1.5)
        for _ in range(25):
            running.cancel()
            governor.cancel()
            await asyncio.wait({running}, timeout=0.2)
            if running.done():
                break
        else:
            self.fail("a daemon that is told to stop does", process.name)
        self.later(0, self.crash, process)

    def person(self, work: Coroutine[Any, Any, dict[str, Any]], then: Callable[[dict[str, Any]], None]) -> None:
        """A command, as a process of its own."""
        process = self.process(f"person{len(self.people)}")
        self.people.append(process.context.run(self.loop.create_task, self._person(process, work, then)))

    async def _person(
        self, process: Process, work: Coroutine[Any, Any, dict[str, Any]], then: Callable[[dict[str, Any]], None]
    ) -> None:
        try:
            told = await work
        except StoreError as error:
            self.say(process.name, f"Redis is not reachable: {error}")
        except Exception as error:  # noqa: BLE001 - any other is what must not happen
            self.fail("a command tells what it did", repr(error))
        else:
            self.say(process.name, f"{told['code']} {told['message']}")
            then(told)

    @contextlib.asynccontextmanager
    async def connected(self, _settings: Settings, **_options: Any) -> Any:
        process = PROCESS.get()
        assert process is not None
        yield Link(self, process)

    def ledger_on(self, link: Link, _settings: Settings, **_options: Any) -> Ledger:
        return Ledger(SimulatedStore(link), KEYS, partial(self._clock, link.process))

    # -- moves

    def one(self) -> Process | None:
        """A daemon that is there, if the one chosen is."""
        return self.governors[self.random.randrange(len(self.governors))]

    def fields(self, plan_id: str, symbol: str) -> dict[str, str]:
        return {
            "plan_id": plan_id, "symbol": symbol, "action": self.random.choice(ACTIONS), "decision": "EXECUTE",
            "kill_score": self.random.choice(("0.1", "0.31", "0.9")), "close_qty": self.random.choice(("0.001", "0.0")),
        }  # fmt: skip

    def plans(self, most: int = 2, symbol: str | None = None) -> None:
        for _ in range(self.random.randint(1, most)):
            plan_id = f"p{len(self.plan_ids)}"
            where = symbol or self.random.choice(SYMBOLS)
            self.plan_ids.append((plan_id, where))
            self.client(self._apply(plan_id, where, self.fields(plan_id, where)))

    def burst(self) -> None:
        self.plans(6, self.random.choice(SYMBOLS))

    def client(self, work: Coroutine[Any, Any, None]) -> None:
        self.clients.append(self.loop.create_task(self._client(work), context=self.context.copy()))

    async def _client(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Violation as violation:
            self.fail(violation.invariant, violation.detail)
        except Exception as error:  # noqa: BLE001 - a mistake of the simulation must not pass for calm
            self.fail("the simulation itself works", repr(error))

    async def _apply(self, plan_id: str, symbol: str, fields: dict[str, str]) -> None:
        """An Apply Layer with one plan: publishes, consumes, executes, reports; each in its own way."""
        kind = self.random.choice(("atomic", "get and del", "get") if "legacy" in self.faults else ("atomic",))
        if self.random.random() < 0.15:
            fields = fields | {"decision": self.random.choice(("SKIP", "BLOCKED"))}
        await self._publish(fields)
        if self.host.running == "dry_run" or self.random.random() < 0.25:
            return
        permit = await self._consume(kind, plan_id, symbol)
        if permit is not None:
            await self._report(plan_id, symbol, str(permit["computed_qty"]))

    async def _publish(self, fields: dict[str, str]) -> None:
        await self.reach()
        entry_id = self.server.add(KEYS.plans, fields)
        self.say("client", f"plan {fields.get('plan_id')} {fields.get('decision')} {entry_id}")

    async def _consume(self, kind: str, plan_id: str, symbol: str) -> dict[str, Any] | None:
        ttl = self.settings.policy.permit_ttl_us / 1_000_000
        if ttl < 5 and self.random.random() < 0.3:  # at the last moment
            await asyncio.sleep(ttl - 0.5 + self.random.uniform(-0.05, 0.2))
        until = self.loop.now + 1.2
        while True:
            await self.reach()
            if kind == "atomic":
                answer = self.server.consume(plan_id, symbol)
                if isinstance(answer, dict):
                    self.say("client", f"consumes {plan_id}")
                    return answer
                if answer != "no_permit":
                    return None
            elif (text := self.server.store.get(KEYS.permit(plan_id))) is not None:
                await asyncio.sleep(self.random.choice((0.01, 0.5, 2.5)))
                await self.reach()
                took = self.server.take(plan_id)
                self.say("client", f"{kind} {plan_id}: {took}")
                permit: dict[str, Any] = json.loads(text[0], parse_float=Decimal)
                return permit if took or kind == "get" else None
            if self.loop.now > until:
                return None
            await asyncio.sleep(0.1)

    def looked_at(self, keys: Sequence[str]) -> None:
        """Somebody asks whether permits are still there. That is when a client takes one."""
        for key in keys:
            plan_id = key.removeprefix(PERMIT)
            if plan_id != key and "snatch" in self.faults and self.random.random() < 0.5:
                self.client(self._snatch(plan_id, self.auditor.granted[plan_id].symbol))

    async def _snatch(self, plan_id: str, symbol: str) -> None:
        await self.reach()
        permit = self.server.consume(plan_id, symbol)
        if isinstance(permit, dict):
            self.say("client", f"consumes {plan_id} at the last moment")
            await self._report(plan_id, symbol, str(permit["computed_qty"]))

    async def _report(self, plan_id: str, symbol: str, quantity: str, *, executed: bool = True) -> None:
        """A result: soon, late, twice or never."""
        odd = "results" in self.faults
        await asyncio.sleep(self.random.choice((0.05, 1.0, 4.0) if odd else (0.05,)))
        chance = self.random.random() if odd else 1.0
        if chance < 0.1:
            return
        status = "error" if chance > 0.95 and odd else "filled"
        steps = [{"step": "CLOSE", "status": status, "executed_qty": "9" if 0.9 < chance < 0.95 else quantity}]
        fields = {
            "plan_id": plan_id, "symbol": symbol, "decision": "EXECUTE", "executed": str(executed),
            "steps_results": json.dumps(steps), "error": "",
        }  # fmt: skip
        for _ in range(2 if chance < 0.2 else 1):
            await self.reach()
            listens = KEYS.results in self.server.groups
            entry_id = self.server.add(KEYS.results, fields)
            self.server.matters[entry_id] = executed and listens
            self.say("client", f"result of {plan_id} {executed} {entry_id}")

    def repeat_plan(self) -> None:
        if self.plan_ids:
            plan_id, symbol = self.random.choice(self.plan_ids[-8:])
            self.client(self._apply(plan_id, symbol, self.fields(plan_id, symbol)))

    def malformed_plan(self) -> None:
        fields = self.fields(f"bad{self.step}", "BTCUSDT")
        name = self.random.choice(("plan_id", "symbol", "kill_score", "decision"))
        fields[name] = self.random.choice(("", "\u00e9?"))
        self.client(self._publish(fields))

    def odd_result(self) -> None:
        """About a plan that was there or never was."""
        plan_id, symbol = self.random.choice(self.plan_ids) if self.plan_ids else ("never", "BTCUSDT")
        self.client(self._report(plan_id, symbol, "0.001", executed=False))

    def rogue(self) -> None:
        """Something that trades around the gate."""
        known = self.random.random() < 0.5 and self.plan_ids
        plan_id, symbol = self.random.choice(self.plan_ids) if known else (f"rogue{self.step}", "BTCUSDT")
        self.client(self._report(plan_id, symbol, "0.001"))

    def move_market(self) -> None:
        symbol = self.random.choice(SYMBOLS)
        self.exchange.position[symbol] = Decimal(self.random.choice(("0", "0.02", "-0.01", "0.4")))
        self.exchange.price[symbol] *= Decimal(self.random.choice(("0.9", "1.1")))

    def look(self) -> None:
        for process in self.governors:
            if process is not None and process.governor is not None:
                process.governor.ready()
                process.governor.snapshot()

    def crash_one(self) -> None:
        if (process := self.one()) is not None:
            self.crash(process)

    def leave(self) -> None:
        process = self.one()
        if process is not None and not process.leaving:
            self.say(process.name, "is asked to stop")
            process.leaving = True
            process.context.run(self.loop.create_task, self._leave(process))

    def freeze_one(self) -> None:
        if (process := self.one()) is not None:
            seconds = self.random.choice((0.1, 1.0, 3.0, 6.0))
            self.say(process.name, f"stands still for {seconds} s")
            self.loop.freeze(process, seconds)

    def step_clock(self) -> None:
        number = self.random.randrange(len(self.governors))
        self.offsets[number] = int(self.random.choice((-8, -2.5, -0.5, 0, 0.5, 2.5, 8)) * 1_000_000)
        if (process := self.governors[number]) is not None:
            process.offset_us = self.offsets[number]
            self.say(process.name, f"clock is {process.offset_us} us off")

    def jump(self, seconds: float | None = None) -> None:
        """Everything stands still for a while, as a suspended machine does."""
        span = seconds if seconds is not None else self.random.choice((1.7, 5, 61, 299, 3601, 90_000))
        self.say("world", f"suspended for {span} s")
        self.base_us += int(span * 1_000_000)

    def go_away(self) -> None:
        self.server.away_until = self.loop.now + self.random.choice((0.1, 1.0, 3.0))
        self.say("server", f"away until {self.server.away_until:.3f}")

    def stall(self) -> None:
        span = self.random.choice((0.1, 1.0, 2.5, 4.0))
        self.server.stalled_until = max(self.server.stalled_until, self.loop.now) + span
        self.say("server", f"stalled until {self.server.stalled_until:.3f}")

    def refuse(self) -> None:
        self.server.refusing_until = self.loop.now + self.random.choice((0.1, 1.0, 3.0))
        self.server.refusal = self.random.choice(("OOM command not allowed", "READONLY You can't write"))
        self.say("server", f"refuses until {self.server.refusing_until:.3f}")

    def drop_key(self) -> None:
        """Somebody deletes a public key."""
        symbol = self.random.choice(SYMBOLS)
        key = self.random.choice((KEYS.state, KEYS.executions(symbol), KEYS.daily(symbol, self.wall_us() // DAY_US)))
        self.server.store.take(key)
        self.say("somebody", f"deletes {key}")

    def destroy_group(self) -> None:
        """All plans are delivered again."""
        self.server.groups.pop(KEYS.plans, None)
        self.say("somebody", "destroys the group")

    def trim(self) -> None:
        """The producer's MAXLEN, at its worst."""
        for entry_id in self.server.order[KEYS.plans][
            : len(self.server.order[KEYS.plans]) - self.random.choice((0, 0, 2))
        ]:
            self.server.streams[KEYS.plans][entry_id] = None
        self.say("somebody", "trims the plans")

    def break_actuator(self) -> None:
        self.host.broken_until = self.loop.now + self.random.choice((0.5, 3.0, 8.0))
        self.say("host", f"broken until {self.host.broken_until:.3f}")

    def disarm(self) -> None:
        self.host.writable = self.random.random() < 0.7
        for _ in range(self.random.choice((1, 1, 2))):
            self.say("person", "disarms")
            reason = f"step {self.step}"
            self.person(by_hand.disarm(self.settings, reason=reason, operator="anna"), lambda _told: None)

    def rearm(self) -> None:
        def edit(told: dict[str, Any]) -> None:
            if told["code"] == 0 and not told["restored"]:
                self.host.edit("testnet")

        self.say("person", "re-arms")
        self.host.writable = self.random.random() < 0.7
        force, restore = self.random.random() < 0.2, self.random.random() < 0.5
        again = by_hand.rearm(
            self.settings, reason="checked", operator="bert", force=force, apply_mode="testnet" if restore else None
        )
        self.person(again, edit)

    def edit(self) -> None:
        """Whoever may write the file does so."""
        self.host.edit(self.random.choice(("testnet", "live", "dry_run")))
        self.say("person", f"edits the file: {self.host.mode}")

    def brake(self) -> None:
        """Nothing but redis-cli, while plans are on their way."""
        self.plans(3)
        self.later(self.random.uniform(0, 0.05), self._brake)

    def _brake(self) -> None:
        self.say("person", "sets the brake")
        with contextlib.suppress(RefusedError):
            self.server.write([Write("set", KEYS.halt, (b"too hot",))])

    def release_brake(self) -> None:
        self.say("person", "removes the brake")
        self.server.store.take(KEYS.halt)

    def lose_tail(self) -> None:
        count = self.random.choice((1, 3, 1000))
        self.say("server", f"loses its last {count} events")
        self.server.lose_tail(count)

    # -- the schedule

    def close(self) -> None:
        self.loop.close(self.processes[::-1])

    async def live(self) -> None:
        for number in range(len(self.governors)):
            self.later(self.random.choice((0, 0, 0.3)), self._again, number)
        moves = [(name, weight) for name, (weight, fault) in MOVES.items() if not fault or fault in self.faults]
        names, weights = [name for name, _ in moves], [weight for _, weight in moves]
        while self.step < self.steps:
            self.step += 1
            await asyncio.sleep(self.random.expovariate(1 / self.pace))
            move = self.random.choices(names, weights)[0]
            with contextlib.suppress(RefusedError):
                getattr(self, move)()
            self.look_at_states()
        await self.settle()

    def look_at_states(self) -> None:
        """Whatever a daemon holds in memory is the fold of what is stored, at its place in the stream."""
        entries = self.server.store.entries
        for process in self.governors:
            if process is None or process.governor is None:
                continue
            state = process.governor.ledger.state
            if self.shadow.seq <= state.seq <= len(entries) and state.seq - self.shadow.seq > 20:
                self.compare(state)

    def compare(self, state: State) -> None:
        for entry in self.server.store.entries[self.shadow.seq : state.seq]:
            evolve(self.shadow, decode(entry))
        same = self.shadow.seq == state.seq and digest(self.shadow) == digest(state)
        need(same, "the live state is the fold of the stream", f"at event {state.seq}")

    async def settle(self) -> None:
        """The faults end; what is open is settled soon."""
        self.say("world", "calm")
        self.calm = True
        now, server, host = self.loop.now, self.server, self.host
        server.away_until = min(server.away_until, now)
        server.stalled_until = min(server.stalled_until, now)
        server.refusing_until = min(server.refusing_until, now)
        host.broken_until = min(host.broken_until, now)
        self.offsets = [0] * len(self.offsets)
        for number, process in enumerate(self.governors):
            if process is not None:
                process.offset_us = 0
            else:
                self.later(2.0, self._again, number)
        await self.until("clients end", lambda: all(task.done() for task in self.clients), 30)
        await self.until("every plan is decided", self.decided, SETTLED_S)
        await self.until("commands end", lambda: all(task.done() for task in self.people), 60)
        await self.until("a disarm is carried out", self.carried_out, DISARMED_S)
        await self.until("a drift is told, and nothing else is one", self.drift_told, 2)
        if self.auditor.disarmed and not self.host.edited:
            need((self.host.mode, self.host.running) == ("dry_run", "dry_run"), "a disarm wins", self.host.running)
        await self.end_permits()
        await self.until("every permit ends", self.ended, SETTLED_S)
        for process in self.governors:
            assert process is not None
            assert process.governor is not None
            state = process.governor.ledger.state
            self.shadow = self.shadow if self.shadow.seq <= state.seq else initial()
            self.compare(state)
            self.auditor.agrees(state)
        await self.until("the state key says what the events say", self.told_outside, 3)

    async def end_permits(self) -> None:
        """Time goes on to where the oldest permit is about to end, then behind the last one."""
        ttl_us, out = self.settings.policy.permit_ttl_us, self.auditor.outstanding()
        if out:
            ahead_us = out[0].at + ttl_us - 450_000 - self.wall_us()
            self.jump(max(0, ahead_us) / 1_000_000)
            await asyncio.sleep(0.7)
        self.jump(ttl_us / 1_000_000)

    def decided(self) -> bool:
        server = self.server
        for stream, order in server.order.items():
            group = server.groups.get(stream)
            if group is None or group.pending or group.position < len(order):
                return False
        return True

    def carried_out(self) -> bool:
        return self.auditor.pending is None and self.host.note is None and self.server.store.get(KEYS.halt) is None

    def drift_told(self) -> bool:
        off = self.host.mode if self.auditor.disarmed and self.host.mode != "dry_run" else None
        return self.auditor.drift == off

    def ended(self) -> bool:
        head = self.auditor.head.seq
        return all(
            process is not None
            and process.governor is not None
            and process.governor.following
            and process.governor.ledger.state.seq == head
            and not len(process.governor.ledger.state.permits)
            for process in self.governors
        )

    def told_outside(self) -> bool:
        """Outside readers see the state the events say, also after somebody deleted it."""
        value = self.server.store.get(KEYS.state)
        told = json.loads(value[0]) if value is not None else {}
        return (told.get("state") == "DISARMED", told.get("epoch")) == (self.auditor.disarmed, self.auditor.epoch)

    async def until(self, what: str, true: Callable[[], bool], within_s: float) -> None:
        start = self.loop.now
        while not true():
            if self.loop.now - start > within_s:
                self.fail(f"in the end {what}", f"not within {within_s} virtual seconds: {self.open_ends()}")
            await asyncio.sleep(0.05)

    def open_ends(self) -> str:
        pending = {stream: list(group.pending) for stream, group in self.server.groups.items()}
        problems = [p.governor.ready()[1] if p is not None and p.governor is not None else None for p in self.governors]
        return f"pending {pending}, disarm of epoch {self.auditor.pending}, {problems}"


class Told(NamedTuple):
    """What became of one schedule."""

    seed: int
    step: int
    violation: Violation | None
    digest: str
    """Hash over the whole story."""
    seconds: float
    """Virtual ones."""
    counts: Counter[str]
    blamed: int
    story: list[str]


@contextlib.contextmanager
def replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    """Modules whose own way to the outside leads into the simulation for a while."""
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


def run(seed: int, *, steps: int = STEPS, extra: Sequence[str] = (), trace: bool = False) -> Told:
    """One schedule from beginning to end."""
    world = World(seed, steps=steps, extra=extra, trace=trace)
    log, sizes, host = Log(world), world.sizes, world.host
    clock = SimpleNamespace(monotonic=world.loop.time)
    violation = None
    with replaced(
        (service, "log", log),
        (service, "time", clock),
        (outside, "log", log),
        (outside, "os", SimpleNamespace(path=host)),
        (service, "socket", SimpleNamespace(gethostname=lambda: "host")),
        (service, "SWEEP_S", sizes["sweep"]),
        (service, "WAITING_MOST", sizes["waiting"]),
        (service, "READ_MOST", sizes["read"]),
        (service, "RUN_MOST", sizes["run"]),
        (ledger, "log", log),
        (ledger, "MAX_EVENTS", sizes["events"]),
        (ledger, "MAX_PROPOSALS", sizes["proposals"]),
        (ledger, "PAGE", sizes["page"]),
        (disarming, "log", log),
        (disarming, "asyncio", Asyncio()),
        (disarming, "threading", SimpleNamespace(Thread=Puppet)),
        (rearming, "log", log),
        (rearming, "asyncio", Asyncio()),
        (rearming, "time", clock),
        (by_hand, "asyncio", Asyncio()),
        (by_hand, "time", clock),
        (by_hand, "os", SimpleNamespace(access=host.access, W_OK=2)),
        (by_hand, "now", world.wall_us),
        (by_hand, "connected", world.connected),
        (by_hand, "ledger_on", world.ledger_on),
        (by_hand, "Actuator", lambda **_: host),
        (by_hand, "notes_of", lambda _settings: (host,)),
        (by_hand, "PendingNote", lambda _path: host),
    ):
        try:
            world.loop.run(world.live(), context=world.context, most_s=600)
        except Violation as broken:
            violation = broken
            world.say("VIOLATION", str(broken))
        finally:
            world.close()
    story = hashlib.sha256("\n".join(world.story).encode(errors="backslashreplace")).hexdigest()
    return Told(
        seed, world.step, violation, story, world.loop.now, world.auditor.counts, world.auditor.blamed, world.story
    )


# -- the command ---------------------------------------------------------------------------------------------------


def command(seed: int, *, steps: int = STEPS, extra: Sequence[str] = ()) -> str:
    """What tells that schedule again."""
    more = (f" --steps {steps}" if steps != STEPS else "") + "".join(f" --with {fault}" for fault in extra)
    return f"python -m tests.simulation --seed {seed}{more} --trace"


def tell(told: Told, again: str) -> None:
    if told.violation is None:
        print(f"seed {told.seed}: well, {told.seconds:.1f} virtual seconds, story {told.digest}")  # noqa: T201
        return
    print(f"seed {told.seed} breaks a promise at step {told.step}")  # noqa: T201
    print(f"  promise: {told.violation.invariant}")  # noqa: T201
    print(f"  found:   {told.violation.detail[:2000]}")  # noqa: T201
    print(f"  again:   {again}", flush=True)  # noqa: T201


def many(seeds: Iterator[int], *, steps: int, extra: Sequence[str], minutes: float | None, most: int) -> int:
    """Seeds until they or the time are at an end, or `most` of them failed. Returns how many did."""
    start, failed, done = real_time.monotonic(), 0, 0
    counts: Counter[str] = Counter()
    for seed in seeds:
        told = run(seed, steps=steps, extra=extra)
        done += 1
        counts += told.counts
        counts["virtual seconds"] += int(told.seconds)
        counts["blamed"] += told.blamed
        if told.violation is not None:
            failed += 1
            tell(told, command(seed, steps=steps, extra=extra))
            if failed >= most:
                break
        if minutes is not None and real_time.monotonic() - start > minutes * 60:
            break
    spent = real_time.monotonic() - start
    print(f"{done} schedules, {failed} failed, {spent:.1f} s, {done / spent * 60:.0f} a minute")  # noqa: T201
    print(" ".join(f"{name}={count}" for name, count in sorted(counts.items())))  # noqa: T201
    return failed


def seed_range(text: str) -> range:
    first, _, last = text.partition("..")
    return range(int(first), int(last) + 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.partition("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="one schedule")
    which.add_argument("--seeds", type=seed_range, metavar="A..B", help="many, both ends included")
    which.add_argument("--minutes", type=float, help="new ones for so long")
    parser.add_argument("--steps", type=int, default=STEPS, help="things that happen in one schedule (%(default)s)")
    parser.add_argument("--trace", action="store_true", help="tell the whole story (with --seed)")
    parser.add_argument("--with", dest="extra", action="append", choices=EXTRA, default=[], help="a fault more")
    parser.add_argument("--most", type=int, default=1, help="end after so many failed (%(default)s)")
    given = parser.parse_args(arguments)
    if given.seed is not None:
        told = run(given.seed, steps=given.steps, extra=given.extra, trace=given.trace)
        tell(told, command(given.seed, steps=given.steps, extra=given.extra))
        return int(told.violation is not None)
    seeds = iter(given.seeds) if given.seeds is not None else itertools.count(real_time.time_ns() // 1_000_000)
    failed = many(seeds, steps=given.steps, extra=given.extra, minutes=given.minutes, most=given.most)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
