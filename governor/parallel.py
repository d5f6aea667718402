"""The audit of a whole history, a long one on two processors.

The history is cut before a plan. A process of its own audits what is before the cut. This one meanwhile folds that
part, which is several times quicker, and audits the rest. Each reads for itself and verifies the chain of all it reads;
what was found is put together only if both came to the same cut.
"""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from events.files import FileStore
from events.store import EventStore, StoreError, UnavailableError
from events.types import Entry, Head
from governor.console import DamagedError, history, length, pages
from governor.replay import Auditor, Replay, joined
from governor.settings import Settings
from projections.state import State

LONG = 100_000
"""Events from which on a second process is worth its start."""
FIRST = 0.6
"""The part audited by the other process, so that both have as much to do."""


class Source(NamedTuple):
    """What is audited; plain, so that another process can be told."""

    settings: Settings
    files: Sequence[Path] = ()
    """Exported files instead of Redis."""
    expect: Head | None = None

    def auditor(self, **part: Any) -> Auditor:
        """An auditor of it; `part` as for `Auditor`."""
        return Auditor(key=self.settings.chain_key, expect=self.expect, **part)


async def audit(
    source: Source, *, jobs: int, until_us: int | None = None, until_seq: int | None = None, long: int = LONG
) -> tuple[Replay, State | None]:
    """Audit a history, page by page.

    Args:
        source: where it is.
        jobs: processes that may be used; more than two are no help.
        until_us: stop before the first event later than this (microseconds); this takes one process.
        until_seq: stop after this event; the same.
        long: events from which on two are used.

    Returns:
        What was found, and the state at the end, unless that is in another process.

    Raises:
        StoreError: it cannot be read.
        WorkerError: the other process died.
        ValueError: what went wrong in the other process.
    """
    whole = until_us is None and until_seq is None
    async with history(source.settings, source.files) as store:
        claimed = await store.head() if source.files else None
        events = await length(store) if whole and jobs > 1 else 0
        found = await _in_two(source, store, round(events * FIRST)) if events >= long else None
        state, stopped = None, False
        if found is None:
            auditor = source.auditor(until_us=until_us, until_seq=until_seq)
            await _feed(auditor, pages(store, label="replaying"))
            (found, state), stopped = auditor.finish(), auditor.stopped
    if claimed is not None and not stopped and found.chain == "ok" and found.head != claimed:
        found = msgspec.structs.replace(found, complete=False)
    return found, state


async def _feed(auditor: Auditor, read: AsyncIterator[list[Entry]]) -> None:
    """Audit page by page, up to where nothing more needs to be looked at."""
    try:
        async for entries in read:
            if not auditor.feed(entries):
                return
            await asyncio.sleep(0)  # reading files never waits, and somebody may want it to stop
    except DamagedError as error:
        auditor.damaged(str(error))


class WorkerError(ValueError):
    """The other process died."""


async def _in_two(source: Source, store: EventStore | FileStore, cut: int) -> Replay | None:
    with _first_part(source, cut) as receiver:
        second = source.auditor(from_plan=cut)
        await _feed(second, pages(store, label="replaying"))
        try:
            told = await asyncio.to_thread(receiver.recv)
        except EOFError:
            raise WorkerError("the process that audits the first part died; --jobs 1 does without one") from None
    if isinstance(told, Exception):
        raise told
    first, reached = told
    return joined(first, reached, second)


@contextmanager
def _first_part(source: Source, cut: int) -> Iterator[Connection]:
    """The other process: its answer comes over the connection. It does not outlive the block."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(sender, source, cut), daemon=True)
    process.start()
    sender.close()
    try:
        yield receiver
    finally:
        process.kill()
        process.join()
        receiver.close()


def _work(sender: Connection, source: Source, cut: int) -> None:
    """In the other process: audit up to the cut, and tell what was found and where that was, or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it

    async def work() -> tuple[Replay, Head | None]:
        async with history(source.settings, source.files) as store:
            auditor = source.auditor(until_plan=cut)
            with redirect_stderr(io.StringIO()):  # how far it is is shown by the one that started it
                await _feed(auditor, pages(store, label=""))
            return auditor.finish()[0], auditor.cut

    try:
        sender.send(asyncio.run(work()))
    except UnavailableError as error:
        sender.send(error)
    except (StoreError, OSError, ValueError) as error:
        sender.send(ValueError(str(error)))  # plain: not every error can be sent
