"""Holds the stream to the daemon's own journal: what got lost comes back, what contradicts it stops the permits.

    found                                   what follows
    both end alike                          go on
    the journal is the stream's beginning   it takes over what others wrote
    the stream is the journal's beginning   what is missing is written back, public keys too, permits never; then a hold
    neither                                 quarantine, until a person accepts the stream's history

It looks when it is due: at the start, after anything that may have been another server or another history, and once
a second while something is wrong. A commit that grants waits for that, and has its events in the journal before it is
sent. A server that is another one than before holds permits back for one permit's life: what it never heard of may
have been granted by the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from events.codec import CodecError, decode
from events.histories import Relation, compare, settle
from events.journal import Journal
from events.segments import DiskError, JournalError
from events.store import Commit, ConflictError, EventStore, StoreError, UnavailableError, Write
from events.types import Entry, Head, HistoryAccepted, HistoryRestored
from governor import permits
from governor.durability import Server, changed
from governor.logs import Logger
from projections.state import initial

if TYPE_CHECKING:
    from governor.ledger import Ledger

log = Logger("governor.history")

LOOK_US = 1_000_000
"""How often it is looked again while something is wrong."""
SURE_US = 500_000
"""How long whoever wrote the last event it knows waits for one that knows more; while active, only after a loss."""
UNSURE_US = 3_000_000
"""How long any other one waits after a server began anew, with nothing lost that it knows of."""
PATIENCE_US = 5_000_000
"""How long it waits where something was lost: whoever knows the end may just be starting."""
CLAIM_MS = 2000
"""Life of a claim that nobody renews, because whoever made it is gone."""
BATCH = 500
ACCEPTED_WITHIN = 5000
"""A person's acceptance is looked for among this many of the stream's last events."""
REMEMBERED = "server.json"


class QuarantineError(StoreError):
    """The stream's history and the journal's contradict each other: nothing is written."""


class UnjournaledError(StoreError):
    """The journal cannot take what a commit is about to grant, so it is not sent."""


class Keeper:
    """One daemon's journal beside one event store.

    Args:
        open_journal: takes a slot. Raises JournalError.
        identify: asks which server this is. Raises StoreError when it does not answer.
        permit_ttl_us: life of a permit, microseconds: how long a hold lasts.
        clock: microseconds since the epoch.
        always: whether an intent is to be on disk before its commit is sent, which is waited for in a thread.
        active: whether this governor holds the lease.
    """

    def __init__(
        self,
        open_journal: Callable[[], Journal],
        identify: Callable[[], Awaitable[Server]],
        *,
        permit_ttl_us: int,
        clock: Callable[[], int],
        always: bool = False,
        active: Callable[[], bool] = lambda: False,
    ) -> None:
        self.journal: Journal | None = None
        """None until it could be opened."""
        self.quarantine: str | None = None
        """Why nothing may be written; None when the histories agree."""
        self.hold_until_us = 0
        """No permits before this time, because the server is another one."""
        self.behind: str | None = None
        """Why the journal cannot take what happens; None when it could, the last time."""
        self._open_journal = open_journal
        self._identify = identify
        self._ttl_us = permit_ttl_us
        self._clock = clock
        self.always = always
        """Whether an intent is to be on disk before its commit is sent."""
        self._active = active
        self._name = uuid.uuid4().hex
        self._wrote_last = False
        """Whether the journal's last event is one of ours."""
        self._since_us: int | None = None
        """Since when others are given the time to say that they know more; None: there is no reason to."""
        self._was: tuple[bool, bool] = (False, False)
        """Whether we were active then, and had written the last event."""
        self._written_back = 0
        """Events written back since, of which HISTORY_RESTORED is still to tell."""
        self._due = True
        self._next_us = 0
        self._server: Server | None = None
        self._heard_us = 0
        """When the server answered the last time."""

    @property
    def due(self) -> bool:
        """Whether the histories have to be compared before anything is granted."""
        wrong = self.quarantine is not None or self.behind is not None
        return (self._due or wrong) and self._clock() >= self._next_us

    @property
    def verdict(self) -> str:
        """Input of the first gate: `whole`, `quarantined` or `history_hold`."""
        if self.quarantine is not None or self.behind is not None:
            return "quarantined"
        return "history_hold" if self._clock() < self.hold_until_us else "whole"

    @property
    def doubts(self) -> bool:
        """Whether they have to be compared before the next commit, or contradicted each other when they were."""
        return self.due or self.quarantine is not None

    def knows_more(self, seq: int) -> bool:
        """Whether the journal goes on behind this event."""
        return self.behind is None and self.journal is not None and self.journal.head.seq > seq

    def doubt(self) -> None:
        """Something may be another server or another history: look before the next commit."""
        self._due, self._next_us = True, 0

    def heard(self) -> None:
        """The server answered just now."""
        self._heard_us = self._clock()

    # -- around a commit -----------------------------------------------------------------------------------------

    def intend(self, expected: Head, entries: Sequence[Entry]) -> None:
        """Write down what is about to be granted.

        Raises:
            UnjournaledError: it cannot be.
        """
        try:
            self._opened().intend(expected, entries, self._run_id)
        except JournalError as error:
            raise self._unjournaled(error) from error

    async def intend_on_disk(self, expected: Head, entries: Sequence[Entry]) -> None:
        """The same where the disk has to be waited for, which is done in a thread. Raises as `intend` does."""
        try:
            await asyncio.to_thread(self._opened().intend, expected, entries, self._run_id)
        except JournalError as error:
            raise self._unjournaled(error) from error

    @property
    def _run_id(self) -> str:
        return self._server.run_id if self._server is not None else ""

    def _unjournaled(self, error: JournalError) -> UnjournaledError:
        self._failed(error)
        return UnjournaledError(str(error))

    def committed(self, entries: Sequence[Entry]) -> None:
        """These are in the stream now."""
        if not entries or self.journal is None:
            return
        self._note_writer(self.journal, ours=True)
        try:
            if self.journal.dangling is not None:
                self.journal.committed(entries[-1].head)
            else:
                self.journal.append(entries)
        except JournalError as error:
            self._failed(error)

    def refused(self) -> None:
        """Nothing was written: the intent, if there is one, did not happen."""
        if self.journal is not None and self.journal.dangling is not None:
            try:
                self.journal.void()
            except JournalError as error:
                self._failed(error)

    def follow(self, entries: Sequence[Entry]) -> None:
        """These were read from the stream."""
        if self.journal is None or self.quarantine is not None or self.behind is not None or not entries:
            return
        if entries[-1].seq > self.journal.head.seq:
            self._note_writer(self.journal, ours=False)
            try:
                self.journal.append([entry for entry in entries if entry.seq > self.journal.head.seq])
            except JournalError as error:
                self._failed(error)

    async def sync(self) -> None:
        """Have what was written reach the disk, if it is time for that. Waits in a thread."""
        if self.journal is not None:
            try:
                await asyncio.to_thread(self.journal.sync_if_due, time.monotonic())
            except JournalError as error:
                self._failed(error)

    def close(self) -> None:
        """Give the journal back."""
        if self.journal is not None:
            with contextlib.suppress(JournalError):
                self.journal.close()

    def _opened(self) -> Journal:
        if self.journal is None:
            self.journal = self._open_journal()
            log.info("journal", slot=str(self.journal.slot), head=self.journal.head.seq)
            if self.journal.torn is not None:
                log.warning("the end of the journal was torn, and was cut off", torn=self.journal.torn)
        return self.journal

    def _failed(self, error: JournalError) -> None:
        if self.behind != str(error):
            log.error("the journal cannot take it: nothing is granted", error=str(error))
        self.behind = str(error)
        self._next_us = self._clock() + LOOK_US

    # -- the comparison ------------------------------------------------------------------------------------------

    async def reconcile(self, ledger: Ledger) -> None:
        """Compare the histories, and do what follows.

        Raises:
            QuarantineError: they contradict each other.
            StoreError: Redis cannot be read or written.
        """
        self._next_us = self._clock() + LOOK_US
        try:
            journal = self._opened()
            await self._look_at_server(journal)
            relation, head = await self._settled(journal, ledger.store)
            if relation is Relation.CONTRADICTION and await self._accepted(journal, ledger.store, head):
                self._start_over(journal, ledger)
                relation, head = await self._settled(journal, ledger.store)
            if relation is Relation.CONTRADICTION:
                raise self._contradicted(_two_histories(journal, head))
            if relation is Relation.JOURNAL_LONGER:
                await self._write_back(journal, ledger, head)
            if self._since_us is not None:
                await self._hear_others(journal, ledger)
            if self._written_back:
                await self._tell_restored(journal, ledger)
            self._since_us = None
            if self.behind is not None:
                journal.note("writable again")
            self.behind = None
        except DiskError as error:
            self._failed(error)
            if self.quarantine is not None:  # nobody looked to the end, so it stands
                raise QuarantineError(self.quarantine) from error
        except JournalError as error:
            raise self._contradicted(
                f"the journal cannot be used: {error}; look at it, and move it away to begin a new one"
            ) from error
        if self.quarantine is not None:
            log.warning("quarantine ended")
        self.quarantine = None
        self._due = False

    async def _look_at_server(self, journal: Journal) -> None:
        server = await self._identify()
        before = self._server
        if before is None and (known := _remembered(journal)) is not None:
            before, self._heard_us = known.server, known.heard_us
            self._wrote_last, self._written_back = known.wrote_last, known.written_back
        change = "same" if before is None else changed(before, server, (self._clock() - self._heard_us) / 1e6)
        if before is not None and change == "another":
            self.hold_until_us = self._clock() + self._ttl_us
            log.warning("another server: no permits for one permit's life", was=before.run_id, now=server.run_id)
        if change != "same" or (self._written_back and self._since_us is None):
            self._doubt_the_end()
        self._server, self._heard_us = server, self._clock()
        self._remember(journal)

    def _remember(self, journal: Journal) -> None:
        if self._server is None:
            return
        known = _Known(
            server=self._server,
            heard_us=self._heard_us,
            wrote_last=self._wrote_last,
            written_back=self._written_back,
        )
        with contextlib.suppress(OSError):  # without it the next start takes the server for the same
            (journal.slot / REMEMBERED).write_bytes(msgspec.json.encode(known))

    def _note_writer(self, journal: Journal, *, ours: bool) -> None:
        if self._wrote_last != ours:
            self._wrote_last = ours
            self._remember(journal)

    def _doubt_the_end(self) -> None:
        """The stream may have lost its end. Whether it did, only the longest journal can tell."""
        self._since_us = self._clock()
        self._was = (self._active(), self._wrote_last)

    async def _settled(self, journal: Journal, store: EventStore) -> tuple[Relation, Head]:
        """How the histories relate, and where the stream ends, once the journal has taken over what it can."""
        while True:
            head = await store.head()
            hashes = await _hashes(store, journal.head.seq) if head.seq > journal.head.seq else {}
            found = compare(journal.head, journal.hash_at, head, hashes.get)
            if found.relation is Relation.STREAM_LONGER:
                if found.at is None:
                    raise self._contradicted(
                        f"the stream and the archive no longer have event {journal.head.seq}, at which the journal in "
                        f"{journal.slot} ends"
                    )
                self._note_writer(journal, ours=False)
                if await _take_over(journal, store, head):
                    self._since_us, self._written_back = None, 0  # others have settled it
                continue
            intent = journal.dangling
            if intent is None or found.relation is Relation.CONTRADICTION:
                return found.relation, head
            first, last = intent.entries[0].seq, intent.head.seq
            hashes = await _hashes(store, min(head.seq, last)) if head.seq >= first else {}
            if settle(intent, head, hashes.get, self._run_id) == "void":
                journal.void()
            else:
                journal.committed(intent.head)

    # -- what follows --------------------------------------------------------------------------------------------

    async def _write_back(self, journal: Journal, ledger: Ledger, head: Head) -> None:
        """Write back what the stream lost behind `head`, never a permit; no event, for others may know still more."""
        if self._since_us is None:
            self._doubt_the_end()
        begun, store, keys = head.seq, ledger.store, ledger.keys
        try:
            while entries := journal.read(head.seq, limit=BATCH):
                # A permit that was used up or revoked in what was lost may have come back with the server.
                await store.commit(Commit(expected=head, entries=entries, writes=permits.ended(entries, keys)))
                head = entries[-1].head
                self._written_back += len(entries)
        except ConflictError as error:
            raise StoreError("the stream lost events; another governor writes them back as well") from error
        finally:
            if head.seq > begun:
                log.warning("events written back", events=head.seq - begun, after=begun)
                self._remember(journal)

    async def _hear_others(self, journal: Journal, ledger: Ledger) -> None:
        """Say how far our journal reaches, and append nothing while another one reaches further, or may.

        Raises:
            StoreError: it does, or the time is not over.
        """
        assert self._since_us is not None
        seq = journal.head.seq
        (held,) = await ledger.store.values(ledger.keys.restorer)
        known, name = _claim(held)
        if name != self._name and known > seq:
            raise StoreError(
                f"the stream lost events; the governor whose journal ends at event {known} writes them back"
            )
        if name == self._name or known < seq:
            claim = f"{seq} {self._name}".encode()
            await ledger.store.write([Write("set", ledger.keys.restorer, (claim,), CLAIM_MS)])
        if self._clock() - self._since_us < self._wait_us():
            raise StoreError(f"waiting whether another governor's journal reaches further than event {seq}")

    def _wait_us(self) -> int:
        active, ours = self._was
        if ours:
            return 0 if active and not self._written_back else SURE_US
        return PATIENCE_US if self._written_back else UNSURE_US

    async def _tell_restored(self, journal: Journal, ledger: Ledger) -> None:
        """The stream is whole again: hold permits back, and write the public keys."""
        log.warning("history restored", events=self._written_back)
        await ledger.restored(HistoryRestored(events=self._written_back, hold_until_us=self._clock() + self._ttl_us))
        self._written_back = 0
        self._remember(journal)

    async def _accepted(self, journal: Journal, store: EventStore, head: Head) -> bool:
        """Whether a person has accepted the stream's history after the journal's last event was written."""
        last = journal.entry(journal.head.seq)
        since = decode(last).at if last is not None else 0
        seq = max(0, head.seq - ACCEPTED_WITHIN)
        while entries := await store.read(seq, limit=BATCH):
            seq = entries[-1].seq
            for entry in entries:
                with contextlib.suppress(CodecError):
                    recorded = decode(entry)
                    if isinstance(recorded.event, HistoryAccepted) and recorded.at > since:
                        return True
        return False

    def _start_over(self, journal: Journal, ledger: Ledger) -> None:
        """Take the stream's history: the journal's is set aside, and everything is folded again."""
        aside = journal.set_aside(f"until-{journal.head.seq}-{self._clock()}")
        log.warning("history accepted: the journal's was set aside", aside=str(aside))
        ledger.state = initial()

    def _contradicted(self, why: str) -> QuarantineError:
        if self.quarantine is None:
            log.error("quarantine: nothing is permitted", why=why)
            if self.journal is not None:
                with contextlib.suppress(JournalError):
                    self.journal.note(f"quarantine: {why}")
            self.quarantine = why
        return QuarantineError(self.quarantine)


def _two_histories(journal: Journal, head: Head) -> str:
    mine = journal.head
    return (
        f"the stream (it ends at event {head.seq} {head.hash[:8]}) and the journal in {journal.slot} (it ends at event "
        f"{mine.seq} {mine.hash[:8]}) are two histories; look which one is right, then "
        "governor rearm --accept-history --reason … takes the stream's"
    )


def _claim(held: bytes | None) -> tuple[int, str]:
    """Where a claimed journal ends, and whose it is; before every event where there is none that can be read."""
    seq, _, name = (held or b"").decode(errors="replace").partition(" ")
    return (int(seq), name) if seq.isascii() and seq.isdecimal() else (-1, "")


async def _take_over(journal: Journal, store: EventStore, head: Head) -> bool:
    """The journal reads on. Whether it read that a lost history was written back."""
    restored = False
    while journal.head.seq < head.seq and (entries := await store.read(journal.head.seq, limit=BATCH)):
        journal.append(entries)
        restored |= any(entry.name == HistoryRestored.NAME for entry in entries)
    return restored


class _Known(msgspec.Struct, frozen=True):
    """What the next start has to know."""

    server: Server
    """The one the journal's last owner was connected to."""
    heard_us: int
    """When that answered."""
    wrote_last: bool = False
    written_back: int = 0
    """Events written back of which nobody has been told."""


def _remembered(journal: Journal) -> _Known | None:
    try:
        return msgspec.json.decode((journal.slot / REMEMBERED).read_bytes(), type=_Known)
    except (OSError, msgspec.MsgspecError):
        return None


async def _hashes(store: EventStore, seq: int) -> dict[int, str]:
    """Hash of one of the store's events, if it has it."""
    if seq <= 0:
        return {}
    try:
        entries = await store.read(seq - 1, limit=1)
    except UnavailableError:
        raise
    except StoreError:  # older than what is left, and not archived here
        return {}
    return {entry.seq: entry.hash for entry in entries}
