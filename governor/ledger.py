"""The ledger: the live state, and the only way to change it.

Whoever wants something to happen submits a proposal, a pure function of the state and the time. The ledger takes
whatever waits, lets each proposal see what the ones before it leave (on a fork of the state), and writes all of it
in one commit. The state itself only ever folds what was committed. When the stream's head has moved, or nobody
knows whether a commit happened, it reads on, folds, and asks every proposal again: a proposal looks at the state
first and says nothing new where its work is already done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from events import chain
from events.codec import FOLDED, WHOLE, Decoders, decode, encode_all
from events.keys import Keys
from events.reading import PAGE, pages
from events.store import (
    Ack,
    Commit,
    ConflictError,
    EventStore,
    HaltedError,
    LateError,
    RefusedError,
    Require,
    RequirementError,
    StoreError,
    UnavailableError,
    UnsentError,
    Write,
)
from events.types import Entry, Event, HistoryRestored, PermitRevoked, Recorded
from governor import permits
from governor.decider import correct_revoked
from governor.history import Keeper, QuarantineError, UnjournaledError
from governor.logs import Logger, together
from projections import checkpoint, views
from projections.state import State, evolve, initial

log = Logger("governor.ledger")

MAX_EVENTS = 512
"""A commit is closed once it holds this many events,"""
MAX_PROPOSALS = 64
"""or this many proposals: the next ones are decided while it is on its way."""
AHEAD_US = 100_000
"""What was decided while the commit before it was on its way is sent within this time, or decided again."""
GRANT_US = 2_000_000
"""A permit reaches the server within this time of its decision, or it is decided again."""
RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0)
UNKNOWN = "not connected yet"
"""What a ledger has for a problem before its first contact."""


class HistoryError(StoreError):
    """The stream does not continue what was already folded: it was cut, emptied or replaced."""


class Proposal(msgspec.Struct, frozen=True):
    """What should happen, decided on a state."""

    events: Sequence[Event] = ()
    requires: Sequence[Require] = ()
    writes: Sequence[Write] = ()
    """Beside the permits and public keys, which follow from the events."""
    acks: Sequence[Ack] = ()
    value: Any = None
    """For the one who proposed it."""


Propose = Callable[[State, int], Proposal]
"""Given the state and the clock (microseconds), what should happen. Pure; may raise to say "not like this"."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of a sequence of proposals."""

    values: list[Any]
    """Of those that were committed, in order."""
    error: Exception | None
    """Raised by the next one; those after it were not looked at."""


class _Item(msgspec.Struct, frozen=True, eq=False):
    proposals: Sequence[Propose]
    done: asyncio.Future[Outcome]


def _item(proposals: Sequence[Propose]) -> _Item:
    return _Item(proposals, _future())


def _future() -> asyncio.Future[Outcome]:
    return asyncio.get_running_loop().create_future()


class _Draft:
    """A commit in the making, on a fork of the state it expects."""

    def __init__(self, state: State, now: int, key: bytes | None) -> None:
        self.before = state
        self.expected = state.head
        self.fork = state.fork()
        self.now = now
        self._key = key
        self.written: list[Recorded] = []
        self.entries: list[Entry] = []
        self.requires: list[Require] = []
        self.owners: list[_Item] = []
        """Of each requirement."""
        self.writes: list[Write] = []
        self.acks: list[Ack] = []
        self.revoked = False
        """Whether a permit is revoked in it."""
        self.grants = False
        """Whether one is granted."""
        self.proposals = 0
        """How many were taken in."""
        self.outcomes: list[tuple[_Item, Outcome]] = []
        """Of whom it holds something, once it is committed."""

    @property
    def full(self) -> bool:
        # After a revocation nothing is decided until it is known which of the permits had been consumed.
        return self.revoked or len(self.entries) >= MAX_EVENTS or self.proposals >= MAX_PROPOSALS

    @property
    def does_something(self) -> bool:
        return bool(self.entries or self.acks or self.writes)

    def take(self, batch: list[_Item]) -> None:
        """Take in what fits of a batch, from its beginning."""
        count = 0
        while count < len(batch) and not self.full:
            self.outcomes.append((batch[count], self._add(batch[count])))
            count += 1
        del batch[:count]

    def _add(self, item: _Item) -> Outcome:
        """Take in what an item proposes, up to one that raises or revokes a permit."""
        values: list[Any] = []
        fork, now = self.fork, self.now
        for propose in item.proposals:
            try:
                proposal = propose(fork, now)
                events = proposal.events
                entries = encode_all(events, after=fork.head, at=now, key=self._key)
            except Exception as raised:  # noqa: BLE001 - whatever it is, it is the proposer's
                return Outcome(values, raised)
            for entry, event in zip(entries, events, strict=True):
                recorded = Recorded(entry.seq, now, event, entry.hash)
                evolve(fork, recorded)
                self.written.append(recorded)
                self.revoked = self.revoked or isinstance(event, PermitRevoked)
                self.grants = self.grants or permits.grants(event)
            self.entries += entries
            if proposal.requires:
                self.requires += proposal.requires
                self.owners += [item] * len(proposal.requires)
            self.writes += proposal.writes
            self.acks += proposal.acks
            values.append(proposal.value)
            self.proposals += 1
            if self.revoked:
                break
        return Outcome(values, None)


class _Flight(msgspec.Struct, frozen=True, eq=False):
    """A commit on its way."""

    draft: _Draft
    answer: asyncio.Future[frozenset[str]] | None
    """None: there was nothing to commit."""


def _refuse(batch: Sequence[_Item], error: StoreError) -> None:
    """Answer everybody who waits: nothing can be written, and nobody knows for how long."""
    for item in batch:
        if not item.done.done():
            item.done.set_result(Outcome([], error))


class Ledger:
    """State and commits over one event store.

    Args:
        store: where the events are.
        keys: names of the public keys.
        clock: microseconds since the epoch.
        audit_key: key of the chain, if it is keyed.
        observe: called with every event folded after `open`, and the state after it.
        turned: called each time the loop goes round, also while the server is away.
        sleep: waits between attempts while the server is away.
        keeper: the daemon's journal, which only daemons have.
    """

    def __init__(
        self,
        store: EventStore,
        keys: Keys,
        clock: Callable[[], int],
        *,
        audit_key: bytes | None = None,
        observe: Callable[[Recorded, State], None] = lambda _recorded, _state: None,
        turned: Callable[[], None] = lambda: None,
        sleep: Callable[[float], Any] = asyncio.sleep,
        keeper: Keeper | None = None,
    ) -> None:
        self.store = store
        self.keeper = keeper
        self.keys = keys
        self.state = initial()
        self.untold: str | None = None
        """What went wrong when an event was last told to the outside."""
        self.halted = False
        """The emergency brake, as last seen."""
        self.problem: str | None = UNKNOWN
        """Why nothing can be committed; None when the last contact went well."""
        self.checkpoint_seq = 0
        """The event of the checkpoint it was opened from, or wrote; 0 without one."""
        self._refused = False
        self.conflicts = 0
        self.skew_us = 0
        """The server's clock minus ours, as last measured."""
        self._clock = clock
        self.audit_key = audit_key
        self._observe = observe
        self._turned = turned
        self._sleep = sleep
        self._future: Callable[[], asyncio.Future[Outcome]] = _future
        self._queue: deque[_Item] = deque()
        self._urgent: deque[_Item] = deque()
        self._waits = asyncio.Event()
        """Whether there is something for the loop to do."""
        self._busy = False
        """Whether somebody is committing."""
        self._flight: _Flight | None = None

    async def open(self) -> None:
        """Fold the stream, verifying it: from its checkpoint where there is one that fits, else from the first event.

        Raises:
            StoreError: it cannot be read, or its chain does not hold.
        """
        if self.keeper is not None:
            await self.keeper.reconcile(self)
        await self._open()

    async def _open(self) -> None:
        observe, self._observe = self._observe, lambda _recorded, _state: None
        try:
            if self.state.seq == 0:
                await self._take_checkpoint()
            try:
                await self._read_on(decoders=FOLDED)
            except HistoryError:
                if self.keeper is None or self.state.seq == 0:
                    raise
                # The histories agree, so it is this state that knows too much: of events that reached neither disk.
                log.warning("everything is folded again", seq=self.state.seq)
                self.state = initial()
                await self._read_on(decoders=FOLDED)
        finally:
            self._observe = observe
        if self.keeper is not None and self.keeper.knows_more(self.state.seq):
            self.keeper.doubt()
            raise HistoryError(f"the event stream lost its end while it was read: it was event {self.state.seq}")

    async def restored(self, event: HistoryRestored) -> None:
        """The stream has back what it had lost: fold it, and tell, with the public keys.

        Raises:
            StoreError: it could not be done; it is to be tried again.
        """
        await self._open()
        while True:
            draft = self._draft(self.state, [_item([lambda _state, _now: Proposal([event])])])
            draft.writes += views.expected(draft.fork, self.keys, draft.now).values()
            try:
                await self._landed(await self._launch(draft))
            except ConflictError:
                await self._read_on()
            else:
                self._take(draft)
                return

    async def _take_checkpoint(self) -> None:
        (value,) = await self.store.values(self.keys.snapshot)
        if value is None:
            return
        try:
            state = checkpoint.read(value, key=self.audit_key)
            head = state.head
            following = await self.store.read(head.seq, limit=1)
            if not following and (end := await self.store.head()) != head:
                raise checkpoint.CheckpointError(f"it is of event {head.seq}, the stream ends at event {end.seq}")
            for _ in chain.verify(following, after=head, key=self.audit_key):
                pass
        except (checkpoint.CheckpointError, chain.ChainError) as problem:
            log.warning("checkpoint ignored: everything is folded from the first event", problem=str(problem))
            return
        self.state, self.checkpoint_seq = state, state.seq

    async def write_checkpoint(self) -> int:
        """Write the state as the new checkpoint, in one write. Returns its size in bytes.

        Raises:
            StoreError: it could not be written.
        """
        value = checkpoint.write(self.state, key=self.audit_key)
        await self.store.write([Write("set", self.keys.snapshot, (value,))])
        self.checkpoint_seq = self.state.seq
        return len(value)

    async def catch_up(self) -> None:
        """Fold what others committed, once the histories were compared where that is due.

        Raises:
            HistoryError: the stream does not continue the state.
            QuarantineError: it contradicts the journal.
            StoreError: it cannot be read.
        """
        keeper = self.keeper
        if keeper is None:
            await self._read_on()
            return
        if keeper.due:
            await keeper.reconcile(self)
        elif keeper.quarantine is not None:
            raise QuarantineError(keeper.quarantine)
        try:
            await self._read_on()
        except HistoryError:
            await keeper.reconcile(self)
            await self._open()

    async def _read_on(self, *, decoders: Decoders = WHOLE) -> None:
        """Fold what is there. `FOLDED` decoders where nobody observes: what no fold looks at is then left out."""
        if self.state.seq and await self.store.head() == self.state.head:
            self._well()  # idle governors come here ten times a second: one command
            return
        entries: list[Entry] = []
        async with contextlib.aclosing(pages(self.store, self.state.seq, size=PAGE)) as read:
            async for entries in read:
                try:
                    for entry in chain.verify(entries, after=self.state.head, key=self.audit_key):
                        self._fold(decode(entry, decoders))
                except (chain.ChainError, ValueError) as error:
                    raise HistoryError(f"the event stream does not hold: {error}") from error
                if self.keeper is not None:
                    self.keeper.follow(entries)
        if not entries and self.state.seq and (head := await self.store.head()) != self.state.head:
            if head.seq > self.state.seq:
                await self._read_on(decoders=decoders)
                return
            raise HistoryError(
                f"the event stream ends at event {head.seq}, after event {self.state.seq} had been seen"
                if head.seq != self.state.seq
                else f"event {head.seq} is another one than the one seen before"
            )
        self._well()

    async def submit(self, *proposals: Propose, urgent: bool = False) -> Outcome:
        """Have proposals committed, in order, by the running loop. Stops at the first that raises.

        Args:
            proposals: what should happen.
            urgent: before everything that waits: a person wants it to stop.

        Raises:
            RequirementError: a key one of them requires is not so; none of them was committed.
        """
        return await self.enter(*proposals, urgent=urgent)

    def enter(self, *proposals: Propose, urgent: bool = False, wake: bool = True) -> asyncio.Future[Outcome]:
        """As `submit`, without waiting: the outcome raises what that does. `start` wakes the loop, too."""
        item = _Item(proposals, self._future())
        (self._urgent if urgent else self._queue).append(item)
        if wake:
            self._waits.set()
        return item.done

    def start(self) -> None:
        """Send what waits at once, where nothing is on its way and nothing has to be looked at before.

        The loop goes on with it, or does all of it.
        """
        self._start()
        self._waits.set()

    def _start(self) -> None:
        keeper = self.keeper
        if self._busy or self._flight is not None or self._urgent or not self._queue:
            return
        if (keeper is not None and keeper.always) or self._has_to_look(self._queue):
            return
        waiting = list(self._queue)
        left = list(waiting)
        try:
            self._flight = self._launched(self._draft(self.state, left))
        except Exception:  # noqa: BLE001 - the loop finds the same, where it is handled
            return
        self._queue = deque(left)

    async def refresh(self) -> None:
        """Have the running loop fold what others committed."""
        await self.submit()

    async def run(self) -> None:
        """Commit what is submitted, for ever. Waits for the server where it is away."""
        self._future = asyncio.get_running_loop().create_future  # asked for each time, the loop costs a system call
        while True:
            await self._waits.wait()
            self._waits.clear()
            batch = list(self._queue)
            self._queue.clear()
            await self.commit(batch)

    async def propose(self, *proposals: Propose) -> Outcome:
        """Commit without a running loop, for a single command.

        Raises:
            StoreError: it could not be committed, or nobody knows.
        """
        item = _item(proposals)
        await self.commit([item], patient=False)
        return await item.done

    async def commit(self, batch: list[_Item], *, patient: bool = True) -> None:
        """Commit a batch, however often it takes.

        Raises:
            StoreError: the server is away or refuses, and `patient` is False.
        """
        self._busy = True
        try:
            await self._commit(batch, patient=patient)
        finally:
            self._busy = False

    async def _commit(self, batch: list[_Item], *, patient: bool) -> None:
        attempt = 0
        fresh = True
        while batch or self._urgent or self._flight is not None:
            self._turned()
            if self._flight is None:  # what is decided ahead of a commit that fails comes again behind it
                batch[:0] = self._urgent
                self._urgent.clear()
            try:
                if self._flight is None and (not fresh or self._has_to_look(batch)):
                    await self._look(batch)
                await self._attempt(batch)
                self._well()
                fresh, attempt = True, 0
            except ConflictError:
                self.conflicts += 1
                fresh = False
            except HaltedError:
                self.halted = True
            except LateError:
                with contextlib.suppress(StoreError):
                    self.skew_us = await self.store.clock() - self._clock()
            except UnjournaledError:
                await self._sleep(RETRY_S[0])  # asked again, they know that nothing may be granted
            except RequirementError:
                raise  # pragma: no cover - _attempt hands it to the one who required it
            except QuarantineError as error:
                self._trouble(error)
                _refuse(batch, error)
                return
            except StoreError as error:
                self._trouble(error)
                if not patient:
                    raise
                fresh = False
                await self._sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1

    def _has_to_look(self, batch: Iterable[_Item]) -> bool:
        if self.keeper is not None and self.keeper.doubts:
            return True
        return any(not item.proposals for item in batch)

    async def _look(self, batch: list[_Item]) -> None:
        """Catch up, and answer those who asked for no more."""
        await self.catch_up()
        for item in batch:
            if not item.proposals and not item.done.done():
                item.done.set_result(Outcome([], None))
        batch[:] = [item for item in batch if item.proposals]

    def _well(self) -> None:
        if self.keeper is not None:
            self.keeper.heard()
        # Reading well says nothing about writing: a refusal stands until something was written.
        if not self._refused:
            self.problem = None

    def _trouble(self, error: StoreError) -> None:
        self._refused = isinstance(error, RefusedError)
        if self.keeper is not None and not self._refused and not isinstance(error, QuarantineError):
            self.keeper.doubt()
        if self.problem != str(error):
            known = ((RefusedError, "refused"), (UnavailableError, "unavailable"))
            kind = next((kind for each, kind in known if isinstance(error, each)), "history")
            log.error("cannot commit", kind=kind, error=str(error))
        self.problem = str(error)

    async def _attempt(self, batch: list[_Item]) -> None:
        """Commit what fits of the batch, or see the end of what was sent already. What is left stays in it."""
        flight, self._flight = self._flight, None
        draft = flight.draft if flight is not None else self._draft(self.state, batch)
        ahead: _Draft | None = None
        try:
            if flight is None:
                flight = await self._launch(draft)
            if flight.answer is not None:
                ahead = self._ahead(draft, batch)
            gone = await self._landed(flight)
        except StoreError as error:
            batch[:0] = [item for one in (draft, ahead) if one is not None for item, _ in one.outcomes]
            if not isinstance(error, RequirementError):
                raise
            owner = draft.owners[error.index]
            if not owner.done.done():
                owner.done.set_exception(error)
            batch[:] = [item for item in batch if item is not owner]
            return
        if ahead is not None:
            self._follow(ahead, batch)
        self._take(draft)
        if ahead is not None:
            ahead.fork.rebase(self.state)
        for item, outcome in draft.outcomes:
            if not item.done.done():
                item.done.set_result(outcome)
        batch[:0] = self._correction(draft.written, gone)

    def _draft(self, state: State, batch: list[_Item]) -> _Draft:
        draft = _Draft(state, self._clock(), self.audit_key)
        draft.take(batch)
        return draft

    def _ahead(self, draft: _Draft, batch: list[_Item]) -> _Draft | None:
        """The commit after this one, decided on what this one will leave while the server is at work."""
        if draft.revoked or self._urgent or (self.keeper is not None and self.keeper.always):
            return None
        batch += self._queue
        self._queue.clear()
        if not batch or self._has_to_look(batch):
            return None
        return self._draft(draft.fork, batch)

    def _follow(self, ahead: _Draft, batch: list[_Item]) -> None:
        """Send what was drafted ahead, if nothing has come up; else it is decided again."""
        old = self._clock() - ahead.now > AHEAD_US
        if not old and not self._urgent and (self.keeper is None or not self.keeper.doubts):
            with contextlib.suppress(UnjournaledError):  # the next attempt finds the same, where it is handled
                self._flight = self._launched(ahead)
                return
        batch[:0] = [item for item, _ in ahead.outcomes]

    async def _launch(self, draft: _Draft) -> _Flight:
        """Send a commit, once its intent is where it has to be."""
        if self.keeper is not None and self.keeper.always and draft.grants:
            await self.keeper.intend_on_disk(draft.expected, draft.entries)
            return self._send(draft)
        return self._launched(draft)

    def _launched(self, draft: _Draft) -> _Flight:
        if self.keeper is not None and draft.grants:
            self.keeper.intend(draft.expected, draft.entries)
        return self._send(draft)

    def _send(self, draft: _Draft) -> _Flight:
        if not draft.does_something:
            return _Flight(draft, None)
        commit = Commit(
            expected=draft.expected,
            entries=draft.entries,
            requires=draft.requires,
            writes=[
                *permits.writes(draft.written, self.keys),
                *draft.writes,  # before what the events say: a healed key must not bring back what they have just ended
                *views.writes(draft.before, draft.fork, [recorded.event for recorded in draft.written], self.keys),
            ],
            acks=draft.acks,
            grants=draft.grants,
            not_after_us=draft.now + self.skew_us + GRANT_US,
        )
        return _Flight(draft, asyncio.ensure_future(self.store.commit(commit)))

    async def _landed(self, flight: _Flight) -> frozenset[str]:
        if flight.answer is None:
            return frozenset()
        keeper = self.keeper
        try:
            # A commit is never cancelled: its outcome would be unknown for no reason.
            gone = await asyncio.shield(flight.answer)
        except StoreError as error:
            if keeper is not None and (isinstance(error, UnsentError) or not isinstance(error, UnavailableError)):
                keeper.refused()
            raise
        if keeper is not None:
            keeper.committed(flight.draft.entries)
            keeper.heard()
        os.sched_yield()  # a client woken by its permit comes before what is left here: the fold, metrics, the log line
        self._refused = False
        return gone

    def _take(self, draft: _Draft) -> None:
        """What was committed becomes the state."""
        with together():
            for recorded in draft.written:
                self._fold(recorded)

    def _correction(self, written: Sequence[Recorded], gone: frozenset[str]) -> list[_Item]:
        """Permits this commit revoked and did not find were consumed before: that comes next."""
        late = [
            recorded.event.plan_id
            for recorded in written
            if isinstance(recorded.event, PermitRevoked) and self.keys.permit(recorded.event.plan_id) in gone
        ]
        if not late:
            return []
        correct: Propose = lambda state, _now: Proposal(correct_revoked(state, late))  # noqa: E731
        return [_item((correct,))]

    def _fold(self, recorded: Recorded) -> None:
        evolve(self.state, recorded)
        try:
            self._observe(recorded, self.state)
        except Exception as error:  # noqa: BLE001 - telling comes after doing, and never stops it
            self.untold = repr(error)
