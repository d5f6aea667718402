"""The daemon: plans in, decisions out, and what has to happen in between.

    intake ─► one queue a symbol ─► exchange ─► ledger ─► events, permits
                                                  │
    sweeper (permits at their end, brake, throttle's end, missing keys) ─┤
    disarmer (file and service, until proven) ──────────────────────────┘

Plans of one symbol are decided in the order in which they came; different symbols do not wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from decimal import Decimal
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from events.decimals import text
from events.intake import GROUP, Delivery, Intake, Lost
from events.keys import Keys, day_of
from events.store import Ack, Require, RequirementError, StoreError, Write
from events.types import Decision, Event, Recorded, SettingsLoaded
from governor import decider, disarming, permits
from governor.actuator import Hand, Pending, PendingNote
from governor.checkpointing import Checkpointer
from governor.gates import Situation
from governor.history import QuarantineError
from governor.lease import Lease
from governor.ledger import Ledger, Outcome, Proposal
from governor.logs import Logger
from governor.lookout import Lookout
from governor.market import Market
from governor.metrics import Metrics, Snapshot, disarm_label, snapshot_symbols
from governor.notify import Notifier
from governor.outside import Outside
from governor.plans import MalformedPlanError, Plan, entry_time, parse_plan
from governor.results import parse_result
from governor.settings import Settings
from projections import errors, totals, views
from projections.state import DISARMED, State

log = Logger("governor")

VERSION = version("quantum-governor")
WAITING_MOST = 2000
"""Deliveries read and not yet decided; more are left in Redis."""
READ_MOST = 200
RUN_MOST = 32
"""Plans of one symbol put into one commit."""
SWEEP_S = 0.1
SLOWER = 5
"""Sweeps from one look at the public state and the server's clock to the next."""
BUSY_S = 0.5
"""Whoever else disarms is given this long; asking root's helper starts a process each time."""
BEAT_S = 1.0
SYNC_S = 0.25
MARKET_FRESH_US = 5_000_000
"""Exchange data older than this at the moment of the decision is asked for again."""
CLOCK_OFF_S = 5.0
GIVE_WAY = 6
"""Turns of the loop that a plan just read takes until the exchange is asked; then it is time to read on."""


class Exchange(Protocol):
    """What the daemon needs of an exchange adapter."""

    @property
    def weight_used(self) -> int: ...

    @property
    def weight_limit(self) -> int: ...

    async def market(self, symbol: str) -> Market:
        """One look; never raises for exchange trouble."""
        ...

    async def warm_up(self) -> None: ...

    async def keep_alive(self) -> None:
        """Runs for ever."""
        ...

    async def aclose(self) -> None: ...


class Governor:
    """One daemon over a ledger, an intake, an exchange and an actuator."""

    def __init__(
        self,
        settings: Settings,
        *,
        ledger: Ledger,
        intake: Intake,
        exchange: Exchange | None,
        actuator: Hand,
        note: PendingNote,
        more_notes: Sequence[PendingNote] = (),
        lookout: Lookout | None = None,
        notifier: Notifier,
        clock: Callable[[], int],
        metrics: Metrics | None = None,
        lease: Lease | None = None,
        remember_ban: Callable[[int], None] = lambda _until_us: None,
        tell: Callable[[Recorded, State], None] = lambda _recorded, _state: None,
        alerts_waiting: Callable[[], int] = lambda: 0,
    ) -> None:
        self.settings = settings
        self._tell = tell
        self._alerts_waiting = alerts_waiting
        self._remember_ban = remember_ban
        self._ban_us = 0
        """The end of the exchange's last ban that was remembered."""
        self.lease = lease
        self.policy = settings.policy
        self.ledger = ledger
        self.keys: Keys = ledger.keys
        self.intake = intake
        if intake is not None:  # tests go without
            intake.on_lost = self._tell_lost
        self.exchange = exchange
        self.actuator = actuator
        self.outside = Outside(actuator, (note, *more_notes), lookout)
        self._kept: set[tuple[Path, int]] = set()
        """Notes that could not be removed, by path and time: not tried again, and no harm once they are told."""
        self.notifier = notifier
        self.clock = clock
        self.metrics = metrics
        self.following = False
        """Whether the plan stream is being read."""
        self.loop_at = 0
        self.stopping = False
        self._told = ("", 0.0)
        self._queues: dict[str, deque[Delivery]] = {}
        self._begun: dict[str, asyncio.Future[Outcome]] = {}
        """First outcomes of workers that have not started, by symbol."""
        self._waiting = 0
        self._settled = asyncio.Event()
        """Reading plans, from the moment the results' group was made; or waiting for whoever does."""
        self._lease_epoch = 0
        self._reopen = False
        """Whether what is pending has to be read again, because another one may have been given it."""
        self._room = asyncio.Event()
        self._room.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._workers: set[asyncio.Task[None]] = set()
        self._disarm_due = 0.0
        self._disarming: asyncio.Task[None] | None = None
        self._announced = False
        self._sweeps = 0
        self._turned_away = False
        """Whether plans were read that could not be decided; they are pending, and read again."""
        self._anchored: int | None = None
        """The day whose anchor was told."""

    async def run(
        self, *, ready: Callable[[], None] = lambda: None, accept: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Serve until cancelled. Waits for Redis where it is away.

        Args:
            ready: called once plans are read, or somebody else does.
            accept: looks at the server once it answers; raises where it is not to be used.
        """
        await self._open()
        if accept is not None:
            await accept()
        async with asyncio.TaskGroup() as group:
            self._tasks.add(group.create_task(self.ledger.run()))
            self._tasks.add(group.create_task(self.outside.run()))
            if self.exchange is not None:
                await self.exchange.warm_up()
                self._tasks.add(group.create_task(self.exchange.keep_alive()))
            if self.lease is not None:
                await self.lease.look()
                self._tasks.add(group.create_task(self.lease.run(self._gained, self._lost)))
            await self._sweep_safely()
            self._tasks.add(group.create_task(self._sweep_for_ever()))
            self._tasks.add(group.create_task(self._stop_for_ever()))
            self._tasks.add(group.create_task(self._checkpointer().run()))
            self._tasks.add(group.create_task(self._sync_for_ever()))
            self._tasks.add(group.create_task(self._read_for_ever()))
            await self._settled.wait()
            ready()

    @property
    def active(self) -> bool:
        """Whether this is the one that reads plans; the others follow the events and wait."""
        return self.lease is None or self.lease.held

    @property
    def stands_by(self) -> bool:
        """Whether somebody else is known to be active. A store that is away makes nobody a standby."""
        return self.lease is not None and not self.lease.held and self.lease.owner_now not in (None, self.lease.owner)

    def _gained(self) -> None:
        epoch = self.lease.epoch if self.lease is not None else 0
        log.warning("active", epoch=epoch)
        self._reopen = True
        if epoch != self._lease_epoch:  # somebody else's settings may have been in force
            self._lease_epoch, self._announced = epoch, False

    def _lost(self) -> None:
        log.warning("standby", active=self.lease.owner_now if self.lease is not None else None)

    async def stop(self, within_s: float) -> None:
        """Read nothing more; let what is being decided be committed and a disarm be proven, within `within_s`."""
        self.stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while busy := {*self._workers, *([self._disarming] if self._disarming is not None else [])}:
                    await asyncio.wait(busy)

    def cancel(self) -> None:
        """Cancel everything under way. To be repeated until it ends: a client may swallow one cancellation."""
        for task in (*self._tasks, *self._workers, *([self._disarming] if self._disarming is not None else [])):
            task.cancel()

    # -- start ---------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        told = None
        while True:
            try:
                await self.ledger.open()
                log.info("history read", seq=self.ledger.state.seq, checkpoint=self.ledger.checkpoint_seq)
                return
            except QuarantineError as error:
                self.ledger.problem = str(error)
                return
            except StoreError as error:
                self.ledger.problem = str(error)
                if str(error) != told:
                    log.error("waiting for the event store", error=str(error))
                    told = str(error)
                self.beat("waiting for the event store")
                await asyncio.sleep(1.0)

    async def _announce(self) -> None:
        """Say under which settings decisions are made; told once, and first of all."""
        loaded = SettingsLoaded(
            digest=self.settings.digest,
            settings=self.settings.texts,
            limits=self.settings.symbol_texts,
            version=VERSION,
            host=socket.gethostname(),
        )
        outcome = await self.ledger.submit(lambda _state, _now: Proposal([loaded]))
        self._announced = outcome.error is None

    def _checkpointer(self) -> Checkpointer:
        return Checkpointer(
            lambda: self.ledger.state.seq if self.active else 0,
            written=self.ledger.checkpoint_seq,
            events=self.settings.checkpoint_events,
            seconds=self.settings.checkpoint_s,
            clock=time.monotonic,
        )

    # -- plans and results ---------------------------------------------------------------------------------------

    async def _read_for_ever(self) -> None:
        wait = 0.05
        opened = False
        while not self.stopping:
            try:
                if not self.active or not (self._announced or self.quarantine is not None):
                    opened = self.following = opened and self.active
                    await asyncio.sleep(SWEEP_S / 4)
                    continue
                if self._reopen or (self._turned_away and self.quarantine is None):
                    self._reopen = self._turned_away = opened = False
                if not opened:
                    await self.intake.open()
                    opened = self.following = True
                    self._settled.set()
                await self._room.wait()
                deliveries = await self.intake.read(count=READ_MOST, block_s=0.5, take=self._take)
                wait = 0.05
            except StoreError as error:
                if self.following:
                    log.error("lost the plan stream", error=str(error))
                opened = self.following = False
                await asyncio.sleep(wait)
                wait = min(1.0, wait * 2)
                continue
            for _ in range(GIVE_WAY if deliveries and self.policy.credentials else 0):
                await asyncio.sleep(0)

    def _take(self, deliveries: list[Delivery]) -> None:
        """Decide what can be decided at once, and have the rest wait its turn."""
        results: list[Delivery] = []
        symbols: list[str] = []
        for delivery in deliveries:
            if delivery.stream == self.keys.results:
                results.append(delivery)
            elif (symbol := self._enqueue(delivery)) is not None:
                symbols.append(symbol)
        if not self.policy.credentials:
            self._decide_at_once(symbols)
        for symbol in symbols:
            self._begin(self._decide_symbol(symbol), 0)
        if results:
            self._begin(self._settle_results(results), len(results))

    async def _tell_lost(self, lost: Lost) -> None:
        """Plans that were trimmed unread become an event before anything behind them is read."""
        outcome = await self.ledger.submit(partial(self._propose_lost, lost))
        if outcome.error is not None:
            raise outcome.error

    def _propose_lost(self, lost: Lost, state: State, now: int) -> Proposal:
        missing = lost.untold(entry_id for entry_id, _ in state.entries.items())
        return Proposal(decider.lose(state, (lost.marker,), self.policy, now, count=missing))

    def _enqueue(self, delivery: Delivery) -> str | None:
        """Have a plan wait. Returns its symbol where nobody is at work on one of the same yet."""
        symbol = (delivery.fields or {}).get("symbol", "")
        self._take_room(1)
        queue = self._queues.get(symbol)
        if queue is not None:
            queue.append(delivery)
            return None
        self._queues[symbol] = deque([delivery])
        return symbol

    def _decide_at_once(self, symbols: Iterable[str]) -> None:
        """Send what waits for no exchange before anything else happens; their workers hear of the outcome."""
        for symbol in symbols:
            self._begun[symbol] = self._submit(self._queues[symbol], None, None, wake=False)
        self.ledger.start()

    def _submit(
        self, queue: deque[Delivery], market: tuple[Market, int] | None, failed: Exception | None, *, wake: bool = True
    ) -> asyncio.Future[Outcome]:
        proposals = [partial(self._propose, queue[0], market, failed)]
        if len(queue) > 1:
            proposals += [partial(self._propose, delivery, None, None) for delivery in islice(queue, 1, RUN_MOST)]
        return self.ledger.enter(*proposals, wake=wake)

    def _begin(self, work: Any, room: int) -> None:
        self._take_room(room)
        task = asyncio.get_running_loop().create_task(work)
        self._workers.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._workers.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a worker failed", exc_info=error)

    def _take_room(self, count: int) -> None:
        self._waiting += count
        if self._waiting >= WAITING_MOST:
            self._room.clear()

    def _give_room(self, count: int) -> None:
        self._waiting -= count
        if self._waiting < WAITING_MOST:
            self._room.set()

    async def _decide_symbol(self, symbol: str) -> None:
        queue = self._queues[symbol]
        begun = self._begun.pop(symbol, None)
        market: tuple[Market, int] | None = None
        failed: Exception | None = None
        ask = False
        while queue:
            try:
                if begun is None:
                    if market is None and failed is None and (ask or self._asks_first(queue[0])):
                        market = await self._ask(symbol)
                    begun = self._submit(queue, market, failed, wake=False)
                    self.ledger.start()
                outcome = await begun
            except Exception as error:  # noqa: BLE001 - whatever it was, it blocks this plan alone
                outcome = Outcome([], error)
            begun = None
            done = len(outcome.values)
            for _ in range(done):
                queue.popleft()
            self._give_room(done)
            if isinstance(outcome.error, QuarantineError):
                await self._turn_away(queue)
                continue
            if done:
                market = failed = None
            ask = isinstance(outcome.error, decider.MarketNeededError) and not done
            if ask:
                market = None
            elif outcome.error is not None and not isinstance(outcome.error, decider.MarketNeededError):
                failed = self._after_failure(queue, outcome.error, failed if not done else None)
        del self._queues[symbol]

    async def _turn_away(self, queue: deque[Delivery]) -> None:
        """Block plans without a word in the stream, which is not ours to write. They stay pending, for later."""
        if not self._turned_away:
            log.error("plans are turned away", why=self.quarantine)
        self._turned_away = True
        now = self.clock()
        writes = []
        for delivery in queue:
            with contextlib.suppress(MalformedPlanError):
                plan = self._parse(delivery, now)
                if plan.execute:
                    record = permits.block("quarantined", at=now, symbol=plan.symbol)
                    writes.append(Write("set", self.keys.block(plan.plan_id), (record,), permits.BLOCK_MS))
        self._give_room(len(queue))
        queue.clear()
        with contextlib.suppress(StoreError):
            await self.ledger.store.write(writes)

    def _after_failure(self, queue: deque[Delivery], error: Exception, before: Exception | None) -> Exception | None:
        """What the plan at the head is blocked with. One that cannot even be blocked stays pending, and is told."""
        log.error("evaluation failed", plan_id=_plan_id(queue[0]), exc_info=error)
        if before is None:
            return error
        queue.popleft()
        self._give_room(1)
        return None

    async def _ask(self, symbol: str) -> tuple[Market, int]:
        asked = self.clock()
        if self.exchange is None:
            return Market(position_error="no_exchange", price_error="no_exchange"), asked
        return await self.exchange.market(symbol), asked

    def _asks_first(self, delivery: Delivery) -> bool:
        if not self.policy.credentials or delivery.fields is None:
            return False
        try:
            now = self.clock()
            plan = self._parse(delivery, now)
            return decider.must_ask(self.ledger.state, plan, self.policy, self._situation(now))
        except Exception:  # noqa: BLE001 - the proposal meets the same, where it is handled
            return False

    def _parse(self, delivery: Delivery, now: int) -> Plan:
        return parse_plan(
            delivery.fields or {}, entry_id=delivery.entry_id, now=now, needs_close_qty=not self.policy.credentials
        )

    @property
    def quarantine(self) -> str | None:
        """Why nothing can be decided, if it cannot."""
        return self.ledger.keeper.quarantine if self.ledger.keeper is not None else None

    def _situation(self, now: int) -> Situation:
        seen, ledger = self.outside.now(), self.ledger
        halt = ledger.halted or any(note.timestamp_us not in ledger.state.noted for note in seen.notes)
        history = ledger.keeper.verdict if ledger.keeper is not None else "whole"
        return Situation(now=now, apply_mode=seen.apply_mode, halt=halt, history=history)

    def _propose(
        self,
        delivery: Delivery,
        market: tuple[Market, int] | None,
        failed: Exception | None,
        state: State,
        now: int,
    ) -> Proposal:
        """What follows from one plan entry: its events and its acknowledgement, whatever it holds."""
        acks = [Ack(delivery.stream, GROUP, delivery.entry_id)]
        if delivery.fields is None:
            return Proposal(decider.lose(state, (delivery.entry_id,), self.policy, now, count=1), acks=acks)
        situation = self._situation(now)
        fields = delivery.fields
        try:
            plan = self._parse(delivery, now)
        except MalformedPlanError as problem:
            rejected = decider.reject(state, problem, self.policy, situation, fields=fields, entry_id=delivery.entry_id)
            return Proposal(rejected, acks=acks)
        if failed is not None:
            decided = decider.fail(
                state, plan, self.policy, situation, fields=fields, error=repr(failed), settings=self.settings.digest
            )
            return Proposal(decided.events, acks=acks)
        patience = MARKET_FRESH_US + int(self.settings.binance_timeout_s * 1_000_000)
        fresh = market is not None and abs(now - market[1]) <= patience
        decided = decider.decide(
            state,
            plan,
            market[0] if market is not None and fresh else None,
            self.policy,
            situation,
            fields=fields,
            settings=self.settings.digest,
        )
        return Proposal(decided.events, acks=acks)

    async def _settle_results(self, deliveries: list[Delivery]) -> None:
        proposals = [partial(self._propose_result, delivery) for delivery in deliveries]
        while proposals:
            outcome = await self.ledger.submit(*proposals[:RUN_MOST])
            done = len(outcome.values)
            if isinstance(outcome.error, QuarantineError):
                self._turned_away = True
                self._give_room(len(proposals))
                return
            if outcome.error is not None:
                log.error("a result could not be matched", exc_info=outcome.error)
                done += 1
            proposals = proposals[done:]
            self._give_room(min(done, len(deliveries)))

    def _propose_result(self, delivery: Delivery, state: State, now: int) -> Proposal:
        acks = [Ack(delivery.stream, GROUP, delivery.entry_id)]
        if delivery.fields is None:
            return Proposal(acks=acks)
        result = parse_result(delivery.fields, entry_id=delivery.entry_id)
        events = decider.execution(state, result, self.policy, now, fields=delivery.fields)
        return Proposal(events, acks=acks)

    # -- what time and others bring ------------------------------------------------------------------------------

    async def _sync_for_ever(self) -> None:
        """What the journal was told reaches the disk within a second."""
        while self.ledger.keeper is not None:
            await self.ledger.keeper.sync()
            await asyncio.sleep(SYNC_S)

    async def _sweep_for_ever(self) -> None:
        while True:
            await self._sweep_safely()
            await asyncio.sleep(SWEEP_S)

    async def _sweep_safely(self) -> None:
        try:
            await self._sweep()
        except StoreError as error:
            log.error("sweep failed", error=str(error))
        except Exception:
            log.exception("sweep failed in an unexpected way")

    async def _sweep(self) -> None:
        await self.ledger.refresh()
        if self.quarantine is not None:
            return
        if not self.active:
            self._settled.set()
            return
        if not self._announced:
            await self._announce()
        await self._end_permits()
        await self._end_throttle()
        if self._sweeps % SLOWER == 0:
            (state,) = await self.ledger.store.values(self.keys.state)
            self.ledger.skew_us = await self.ledger.store.clock() - self.clock()
            if state is None:
                await self.ledger.submit(lambda state, _now: Proposal(writes=[views.state_write(state, self.keys)]))
        self._sweeps += 1
        for note in self.outside.notes:
            await self._take_note(note)
        await self._look_for_drift()
        self._tell_anchor()
        held_back = getattr(self.exchange, "blocked_until_us", 0)
        if held_back != self._ban_us:
            self._ban_us = held_back
            self._remember_ban(held_back)

    def _tell_anchor(self) -> None:
        """The head, once a UTC day, where a history that is cut or written again later cannot reach it."""
        state, day = self.ledger.state, day_of(self.clock())
        if state.seq and day != self._anchored:
            self._anchored = day
            log.info("anchor", head=f"{state.seq}:{state.hash}")

    async def _stop_for_ever(self) -> None:
        """What stops trading, beside the sweep: neither waits behind plans, and file and service not for the store."""
        while True:
            self._begin_disarm()
            try:
                await self._look_at_brake()
            except StoreError as error:
                log.debug("cannot look at the emergency brake", error=str(error))
            except Exception:
                log.exception("looking at the emergency brake failed in an unexpected way")
            await asyncio.sleep(SWEEP_S)

    async def _look_at_brake(self) -> None:
        self.ledger.halted = await self.ledger.store.exists(self.keys.halt)
        if self.ledger.halted:
            (value,) = await self.ledger.store.values(self.keys.halt)
            if self.active:
                await self._brake(value or b"")

    async def _end_permits(self) -> None:
        until = self.clock() + permits.TAKE_BACK_US
        due = [plan_id for plan_id, held in self.ledger.state.permits.items() if held.expires_us <= until]
        if due:
            there = await self.ledger.store.values(*map(self.keys.permit, due))
            ends = (self._end_permit(plan_id, gone=held is None) for plan_id, held in zip(due, there, strict=True))
            await asyncio.gather(*ends)

    async def _end_permit(self, plan_id: str, *, gone: bool) -> None:
        key = self.keys.permit(plan_id)
        for now_gone in (gone, not gone):
            try:
                await self.ledger.submit(partial(_take_back, plan_id, key, now_gone))
                return
            except RequirementError:
                continue  # it was consumed: the same question the other way round

    async def _end_throttle(self) -> None:
        if decider.tick(self.ledger.state, self.clock()):
            await self.ledger.submit(lambda state, now: Proposal(decider.tick(state, now)))

    async def _brake(self, value: bytes) -> None:
        brake = read_brake(value)
        await self.ledger.submit(
            lambda state, _now: Proposal(
                disarming.braked(state, brake, apply_mode=self.actuator.apply_mode()),
                writes=[Write("del", self.keys.halt)],
            ),
            urgent=True,
        )

    async def _take_note(self, note: PendingNote) -> None:
        """A disarm that could not become an event becomes one now: done by hand without Redis, or by the dead man."""
        pending = note.read_pending()
        if pending is None:
            return
        kept = (note.path, pending.timestamp_us)
        if pending.timestamp_us not in self.ledger.state.noted:
            if kept in self._kept and disarming.pending(self.ledger.state) is not None:
                return  # another disarm is to be proven first; then this one is told
            outcome = await self.ledger.submit(partial(self._propose_noted, pending))
            if outcome.error is not None:
                raise outcome.error
        if kept in self._kept:
            return
        try:
            note.clear_pending(pending)
        except OSError as error:
            self._kept.add(kept)
            log.warning("the note of a disarm stays where it is", path=str(note.path), error=str(error))

    def _propose_noted(self, pending: Pending, state: State, _now: int) -> Proposal:
        return Proposal(
            disarming.told_later(
                state,
                reason=pending.reason,
                operator=pending.operator,
                proof=pending.proof,
                noted_us=pending.timestamp_us,
            )
        )

    async def _look_for_drift(self) -> None:
        if self.ledger.state.mode.state == DISARMED and self._drift(self.ledger.state):
            await self.ledger.submit(lambda state, _now: Proposal(self._drift(state)))

    def _drift(self, state: State) -> list[Event]:
        return decider.drift(state, self.actuator.apply_mode())

    def _begin_disarm(self) -> None:
        if disarming.pending(self.ledger.state) is None or self.stands_by:
            self._disarm_due = 0.0
        elif self._disarming is None and time.monotonic() >= self._disarm_due:
            self._disarming = asyncio.get_running_loop().create_task(self._disarm())

    async def _disarm(self) -> None:
        try:
            done = await disarming.carry_out(
                self.ledger, self.actuator, submit=self.ledger.submit, refresh=self.ledger.refresh
            )
            if done is None:
                self._disarm_due = time.monotonic() + BUSY_S
            if done is False:
                disarm = self.ledger.state.mode.disarm
                self._disarm_due = time.monotonic() + disarming.back_off(disarm.attempts if disarm is not None else 1)
        except Exception:
            log.exception("disarming failed in an unexpected way")
            self._disarm_due = time.monotonic() + disarming.back_off(1)
        finally:
            self._disarming = None

    # -- telling -------------------------------------------------------------------------------------------------

    def observe(self, recorded: Recorded, state: State) -> None:
        """Told of every event once it is folded. What has to be done comes before what has to be told."""
        if state.mode.state == DISARMED and recorded.event.NAME == "DISARM_STARTED":
            self._begin_disarm()
        if not self.active:
            return  # whoever is tells it
        self._tell(recorded, state)
        if self.metrics is not None:
            self.metrics.observe(recorded, self.clock())
        event = recorded.event
        match event:
            case Decision():
                log.info(
                    "decided", plan_id=event.plan_id, symbol=event.symbol, action=event.action, verdict=event.verdict,
                    reason=event.reason, computed_qty=_digits(event.computed_qty),
                    computed_notional=_digits(event.computed_notional),
                    seq=recorded.seq,
                )  # fmt: skip
            case _ if event.NAME in _TOLD:
                level = log.warning if event.NAME in _LOUD else log.info
                level(event.NAME.lower(), seq=recorded.seq, **_details(event))

    def beat(self, status: str | None = None) -> None:
        """Tell systemd and the metrics that the evaluation loop went round."""
        self.loop_at = self.clock()
        mode = self.ledger.state.mode
        told = status or ("" if self.active else "standby, ") + f"{mode.state} epoch={mode.epoch}" + (
            f" reason={mode.reason}" if mode.reason else ""
        )
        if self.ledger.problem is not None and status is None:
            told += f"; {self.ledger.problem}"
        if told != self._told[0] or time.monotonic() - self._told[1] >= BEAT_S:
            self._told = (told, time.monotonic())
            self.notifier.send(WATCHDOG="1", STATUS=told)

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Whether plans are being decided, and why not."""
        mode = self.ledger.state.mode
        problems = [
            p
            for p in (
                self.ledger.problem,
                None if self.following or not self.active else "the plan stream is not followed",
            )
            if p
        ]
        notes = []
        if (keeper := self.ledger.keeper) is not None:
            problems += [why for why in (keeper.quarantine, keeper.behind) if why is not None and why not in problems]
            if (hold_s := self._hold_s()) > 0:
                notes.append(f"no permits for {hold_s:.0f} s more: what was granted before may still be alive")
        skew_s = self.ledger.skew_us / 1e6
        if abs(skew_s) > CLOCK_OFF_S:
            notes.append(f"this clock is {abs(skew_s):.1f} s {'behind' if skew_s > 0 else 'ahead of'} Redis'")
        if mode.drift is not None:
            notes.append(f"drift: {self._file_says(mode.drift)} while DISARMED, set by hand; governor disarm undoes it")
        elif mode.state == DISARMED and self.actuator.apply_mode() is None:
            notes.append(self._file_says(None))
        held_back = getattr(self.exchange, "blocked_until_us", 0)
        if held_back > self.clock():
            notes.append(f"exchange calls are held back for {(held_back - self.clock()) / 1e6:.0f} s more")
        if self.ledger.untold is not None:
            notes.append(f"an event could not be told: {self.ledger.untold}")
        if self.lease is not None and not self.active:
            notes.append(f"standby: {self.lease.owner_now or 'nobody'} is active")
        known = self.ledger.state.seq > 0
        content = {
            "ready": not problems,
            "active": self.active,
            "problems": problems,
            "notes": notes,
            "state": mode.state if known else None,
            "reason": mode.reason,
            "epoch": mode.epoch if known else None,
            "disarm_pending": disarming.pending(self.ledger.state) is not None,
            "halted": self.ledger.halted,
        }
        return not problems, content

    def _file_says(self, apply_mode: str | None) -> str:
        said = "gives no APPLY_MODE that can be read" if apply_mode is None else f"says APPLY_MODE={apply_mode}"
        return f"{self.settings.apply_config_path} {said}"

    def _hold_s(self) -> float:
        """How long permits are still held back because history was lost."""
        until = max(
            self.ledger.keeper.hold_until_us if self.ledger.keeper is not None else 0, self.ledger.state.hold_until
        )
        return max(0.0, (until - self.clock()) / 1e6)

    def snapshot(self) -> Snapshot:
        """The gauges' values now."""
        state, now = self.ledger.state, self.clock()
        rows, left = snapshot_symbols(state, self.policy, now, self.settings.symbol_labels)
        oldest = min((queue[0].entry_id for queue in self._queues.values() if queue), default=None, key=entry_time)
        limit = self.policy.total_notional_per_day
        at = max(now, state.time)
        disarm = state.mode.disarm if state.mode.state == DISARMED else None
        return Snapshot(
            state=state.mode.state,
            epoch=state.mode.epoch,
            outstanding=len(state.permits),
            disarm_pending=disarming.pending(state) is not None,
            total_notional=float(totals.on(state.days, day_of(at)).notional),
            total_limit=None if limit is None else float(limit),
            symbols=rows,
            truncated=left,
            plan_lag=max(0.0, (now - entry_time(oldest)) / 1e6) if oldest else 0.0,
            events=state.seq,
            conflicts=self.ledger.conflicts,
            errors=errors.count(state.errors, now=at, window=self.policy.error_window_us),
            exchange_weight=self.exchange.weight_used if self.exchange is not None else 0,
            exchange_weight_limit=self.exchange.weight_limit if self.exchange is not None else 0,
            store_up=self.ledger.problem is None,
            loop_at=self.loop_at / 1e6,
            inflight=self._waiting,
            apply_dry_run=self.actuator.apply_mode() == decider.DRY_RUN,
            active=self.active,
            quarantined=self.quarantine is not None,
            hold_seconds=self._hold_s(),
            journal_up=self.ledger.keeper is None or self.ledger.keeper.behind is None,
            drift=state.mode.drift is not None,
            ready=self.ready()[0],
            disarmed=None if disarm is None else disarm_label(disarm.reason, manual=disarm.manual),
            errors_limit=self.policy.disarm_on_errors,
            alerts_waiting=self._alerts_waiting(),
        )


_TOLD = frozenset(
    {
        "PLAN_REJECTED", "PLAN_LOST", "PERMIT_CONSUMED", "PERMIT_EXPIRED", "PERMIT_REVOKED", "EXECUTION",
        "UNPERMITTED_EXECUTION", "ERROR_RECORDED", "THROTTLED", "RECOVERED", "DISARM_STARTED", "REARMED",
        "APPLY_MODE_DRIFTED", "DRIFT_ENDED", "APPLY_MODE_RESTORED",
    }
)  # fmt: skip
_LOUD = frozenset(
    {
        "PLAN_REJECTED", "PLAN_LOST", "UNPERMITTED_EXECUTION", "ERROR_RECORDED", "THROTTLED", "DISARM_STARTED",
        "APPLY_MODE_DRIFTED",
    }
)  # fmt: skip


def _details(event: Event) -> dict[str, Any]:
    names = (
        "plan_id",
        "symbol",
        "reason",
        "kind",
        "detail",
        "source",
        "permit",
        "executed",
        "epoch",
        "operator",
        "apply_mode",
        "count",
    )
    return {name: getattr(event, name) for name in names if getattr(event, name, None) is not None}


def _take_back(plan_id: str, key: str, gone: bool, state: State, now: int) -> Proposal:  # noqa: FBT001
    events = decider.take_back(state, plan_id, gone=gone, now=now)
    return Proposal(events, requires=[Require(key, present=not gone)] if events else [])


def read_brake(value: bytes) -> disarming.Brake:
    """An emergency brake: what a person wrote, or what `governor disarm` did."""
    written = value.decode(errors="replace")
    try:
        told = json.loads(written)
        noted_us = told.get("noted_us")
        noted_us = noted_us if type(noted_us) is int else None
        return disarming.Brake(str(told["reason"])[:500], str(told["operator"])[:64], noted_us)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return disarming.Brake(written[:500] or "emergency brake", "redis")


def _digits(number: Decimal | None) -> str | None:
    return None if number is None else text(number)


def _plan_id(delivery: Delivery) -> str:
    return (delivery.fields or {}).get("plan_id", "?")[:128]
