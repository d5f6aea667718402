"""How fast a history is read, rebuilt and replayed, beside the floor: the same stream read with redis-py, and no more.

    .venv/bin/python tests/benchmarks/audit.py --events 1000000

Every row is a process of its own against one server, so that its memory is its own; a replay of a long history takes a
second one. The floor is measured between the others; ratios are to the median of its rates.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import msgspec
import redis
import uvloop

from events.codec import FOLDED, decode
from events.keys import Keys
from events.reading import PAGE, pages
from events.store import RedisStore, client
from events.types import Entry
from governor.ledger import Ledger
from governor.parallel import Source, audit
from governor.replay import Auditor
from governor.settings import load as settings
from projections.state import evolve
from tests.benchmarks.history import written
from tests.daemon import fields_of
from tests.servers import RedisServer

KEYS = Keys()
EMPTY = Keys("empty")
WARM = 0.1
"""Memory is compared from here on: by then what a state remembers (a day, 20,000 entries) is nearly full."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One run over the whole stream."""

    seconds: float
    peak_mib: float
    grown_mib: float | None
    """Peak memory at the end, less what it was after the first tenth."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table."""

    name: str
    events_per_s: float
    ratio: float
    """To the floor of the same run."""
    target: float | None
    seconds: float
    peak_mib: float
    grown_mib: float | None


class Watched(RedisStore):
    """The store, noting what memory was in use when a part of the stream had been read."""

    def __init__(self, port: int, events: int, *, keys: Keys = KEYS) -> None:
        self.port = port
        self.connection = client(host=RedisServer.host, port=port)
        super().__init__(self.connection, stream=keys.events, halt=keys.halt)
        self._warm = int(events * WARM)
        self.warm_mib = 0.0

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        self.noted(after)
        return await super().read(after, limit=limit)

    def noted(self, after: int) -> None:
        if not self.warm_mib and after >= self._warm:
            self.warm_mib = peak_mib()


Work = Callable[[Watched, int], Awaitable[None]]


async def read_plainly(store: Watched, events: int) -> None:
    """The floor: redis-py as it comes, pages of 10,000, every page dropped."""
    after = 0
    with redis.Redis(host=RedisServer.host, port=store.port) as connection:
        while after < events:
            store.noted(after)
            reply: Any = connection.xrange(KEYS.events, f"{after + 1}-0", "+", count=10_000)
            after = int(reply[-1][0].partition(b"-")[0])


async def read_fast(store: Watched, events: int) -> None:
    """The same as quick as redis-py can: our client, and our page size."""
    after = 0
    while after < events:
        store.noted(after)
        reply: Any = await store.connection.xrange(KEYS.events, f"{after + 1}-0", "+", count=PAGE)
        after = int(reply[-1][0].partition(b"-")[0])


async def rebuild(store: Watched, events: int) -> None:
    """Verify, decode and fold, as every start does."""
    ledger = Ledger(store, KEYS, lambda: 0)
    await ledger.open()
    assert ledger.state.seq == events


async def replay(store: Watched, events: int) -> None:
    """Decide everything again, as `governor replay` does."""
    given = settings({"REDIS_PORT": str(store.port), "GOV_ARCHIVE_DIR": "/nonexistent"})
    found, _ = await audit(Source(given), jobs=len(os.sched_getaffinity(0)))
    assert found.events == events
    assert found.clean, found.differences[:3]


async def replay_alone(store: Watched, events: int) -> None:
    """The same in one process."""
    auditor = Auditor()
    async for entries in pages(store, 0):
        auditor.feed(entries)
    found, _ = auditor.finish()
    assert found.events == events
    assert found.clean, found.differences[:3]


async def start(store: Watched, events: int) -> None:
    """A start from the checkpoint there is."""
    ledger = Ledger(store, KEYS, lambda: 0)
    await ledger.open()
    assert ledger.state.seq == events
    assert ledger.checkpoint_seq == events - TAIL


async def start_empty(store: Watched, _events: int) -> None:
    """A start where nothing ever happened."""
    store = Watched(store.port, 0, keys=EMPTY)
    ledger = Ledger(store, EMPTY, lambda: 0)
    await ledger.open()
    assert ledger.state.seq == 0
    await store.connection.aclose()


WORK: dict[str, tuple[Work, float | None]] = {
    "floor": (read_plainly, None),
    "floor, tuned": (read_fast, None),
    "rebuild": (rebuild, 0.4),
    "replay": (replay, 0.15),
    "replay, one process": (replay_alone, None),
    "start, empty": (start_empty, None),
    "start, checkpoint": (start, None),
}
"""What is measured, and the least ratio to the floor asked of it.

The floor is redis-py with its defaults and pages of 10,000. The reader here has a client and a page size often
quicker, so that floor is told as well. A start from a checkpoint has `TAIL` events behind it, and may take a second
more than an empty one."""
TIMED = ("start, empty", "start, checkpoint")
"""What is told in seconds: there are no events to count."""
TAIL = 10_000


def peak_mib() -> float:
    """The most memory this process has had resident."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(name: str, port: int, events: int) -> Measured:
    """One row's work, in the process this is called in."""

    gc.freeze()  # as the commands do: what was imported need not be looked at again and again

    async def run() -> Measured:
        store = Watched(port, events)
        begun = time.perf_counter()
        await WORK[name][0](store, events)
        seconds = time.perf_counter() - begun
        await store.connection.aclose()
        second_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        grown_mib = peak_mib() - store.warm_mib if store.warm_mib else None
        return Measured(seconds=seconds, peak_mib=peak_mib() + second_mib, grown_mib=grown_mib)

    return uvloop.run(run())


def apart(name: str, port: int, events: int) -> Measured:
    """The same in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, name, port, events).result()


def load(server: RedisServer, events: int, seed: int) -> int:
    """Write a history as the commit script does: ids `<seq>-0`, five fields. Returns how many events it has."""
    count = 0
    with server.client() as connection:
        for page in written(events, seed=seed):
            pipe = connection.pipeline(transaction=False)
            for entry in page:
                pipe.xadd(KEYS.events, cast("Any", fields_of(entry)), id=f"{entry.seq}-0")
            pipe.execute()
            count += len(page)
    return count


async def write_checkpoint(port: int, events: int) -> int:
    """Write the checkpoint a start is measured from, `TAIL` events before the end. Returns its size in bytes."""
    store = Watched(port, events)
    ledger = Ledger(store, KEYS, lambda: 0)
    async for entries in pages(store, 0):
        for entry in entries:
            if entry.seq <= events - TAIL:
                evolve(ledger.state, decode(entry, FOLDED))
    size = await ledger.write_checkpoint()
    await store.connection.aclose()
    return size


def rows(port: int, events: int, names: Sequence[str]) -> list[Row]:
    """Every row's work, the floor around each."""
    floors = [apart("floor", port, events)]
    measured: dict[str, Measured] = {}
    for name in names:
        if name == "start, checkpoint":
            uvloop.run(write_checkpoint(port, events))
        measured[name] = apart(name, port, events)
        if name not in TIMED:
            floors.append(apart("floor", port, events))
    floor = sorted(floors, key=lambda each: each.seconds)[len(floors) // 2]
    return [
        Row(
            name=name,
            events_per_s=events / run.seconds,
            ratio=floor.seconds / run.seconds,
            target=WORK[name][1],
            seconds=run.seconds,
            peak_mib=run.peak_mib,
            grown_mib=run.grown_mib,
        )
        for name, run in {"floor": floor, **measured}.items()
    ]


def table(found: Sequence[Row]) -> list[str]:
    """For a terminal."""
    lines = [f"{'':20}{'events/s':>10}{'of floor':>10}{'asked':>8}{'seconds':>9}{'peak MiB':>10}{'grown MiB':>11}"]
    for row in found:
        asked = "" if row.target is None else f"{row.target:.2f}"
        rate = f"{'':>20}" if row.name in TIMED else f"{row.events_per_s:>10,.0f}{row.ratio:>10.3f}"
        grown = "" if row.grown_mib is None else f"{row.grown_mib:.1f}"
        lines.append(f"{row.name:20}{rate}{asked:>8}{row.seconds:>9.2f}{row.peak_mib:>10.1f}{grown:>11}")
    return lines


def main(arguments: Sequence[str]) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--events", type=int, default=1_000_000, help="length of the history (1,000,000)")
    options.add_argument("--seed", type=int, default=1, help="of the history (1)")
    options.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    given = options.parse_args(arguments)
    with RedisServer() as server:
        events = load(server, given.events, given.seed)
        with server.client() as connection:
            about: dict[str, Any] = connection.info("server")
        found = rows(server.port, events, [name for name in WORK if name != "floor"])
    setting = {
        "events": events,
        "seed": given.seed,
        "python": platform.python_version(),
        "client": f"redis-py {redis.__version__} asyncio, hiredis {version('hiredis')}, uvloop {version('uvloop')}",
        "server": f"valkey {about.get('valkey_version')}",
        "page": PAGE,
    }
    if given.json:
        lines = [json.dumps(setting | {"rows": msgspec.to_builtins(found)})]
    else:
        lines = [", ".join(f"{name} {value}" for name, value in setting.items()), *table(found)]
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main(sys.argv[1:])
