"""What can be measured without a client: deciding, reading a history, starting, memory, a command."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from decimal import Decimal
from functools import partial
from pathlib import Path

import structlog
import uvloop

from events.chain import GENESIS
from events.journal import Journal
from events.store import Commit, ConflictError, Write
from events.types import Entry, Head, Recorded
from governor import decider
from governor.durability import Server
from governor.gates import Situation
from governor.history import Keeper
from governor.ledger import Ledger, Proposal
from governor.market import Market
from governor.plans import parse_plan
from governor.policy import Limits, Policy
from governor.results import parse_result
from governor.sim.apply_layer import plan_fields, result_fields
from projections.state import State, evolve, initial
from tests.benchmarks import audit
from tests.benchmarks.accounts import resident_mib
from tests.benchmarks.figures import Figure, Line, Samples, Sizes, at, compared, held_within, rated
from tests.benchmarks.gate import KEYS, OPEN, SYMBOLS, Client, gate
from tests.daemon import Daemon
from tests.servers import RedisServer

MORNING = 1_769_212_800_000_000
"""2026-01-24 00:00:00 UTC, microseconds."""
DAY_US = 86_400_000_000
WIDE = Policy(
    credentials=True,
    limits=Limits(per_hour=100_000, per_5min=100_000, notional_per_day=Decimal(10**12), qty_per_day=Decimal(10**12)),
    total_notional_per_day=Decimal(10**15),
)
"""Every limit is there to be looked at, and none is reached."""
MARKET = Market(legs={"BOTH": Decimal("1.250")}, mark_price=Decimal("95033.33333333"))
DECIDED_EVERY_US = 10_000_000
MEMORY_SYMBOLS = 500
RUN = 32
"""Plans of a commit, where memory is looked at."""
READY_S = 900.0


def quiet() -> None:
    """Keep what the program logs out of stdout, which is the document's."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def _step(state: State, number: int, now: int, symbols: Sequence[str]) -> tuple[float, float]:
    """Decide and fold one plan; microseconds it took by the clock and of the processor, without parsing and hashing."""
    symbol = symbols[number % len(symbols)]
    fields = plan_fields({"plan_id": f"{symbol}-{number:07}", "symbol": symbol, "action": "PARTIAL_25"}, now=now / 1e6)
    plan = parse_plan(fields, entry_id=f"{now // 1000}-0", now=now, needs_close_qty=False)
    situation = Situation(now=now, apply_mode="testnet")
    begun = time.perf_counter_ns(), time.thread_time_ns()
    decided = decider.decide(state, plan, MARKET, WIDE, situation, fields=fields, settings="benchmark")
    for event in decided.events:
        evolve(state, Recorded(state.seq + 1, now, event, ""))
    worked, took = (time.thread_time_ns() - begun[1]) / 1000, (time.perf_counter_ns() - begun[0]) / 1000
    assert decided.decision is not None
    assert decided.decision.verdict == "EXECUTE"
    for event in decider.take_back(state, plan.plan_id, gone=True, now=now):
        evolve(state, Recorded(state.seq + 1, now, event, ""))
    return took, worked


def deciding(_server: RedisServer, sizes: Sizes) -> Figure:
    """`decide` and `evolve` alone, in a state that has seen as much before."""
    state = initial()
    each = [_step(state, number, MORNING + number * DECIDED_EVERY_US, SYMBOLS) for number in range(2 * sizes.decisions)]
    took, worked = ([one[column] for one in each[sizes.decisions :]] for column in (0, 1))
    return Figure(
        name="deciding alone",
        how=f"decide and evolve without input and output, every limit on, {len(SYMBOLS)} symbols, {sizes.decisions:,} "
        "plans decided before; parsing, hashing and encoding are not in it",
        lines=(
            Line(what="p50", value=at(took, 50), unit="us"),
            Line(what="p99", value=at(took, 99), unit="us", must="< 100 us", reached=at(took, 99) < 100),
            Line(what="p99, processor time", value=at(worked, 99), unit="us"),
        ),
        blocks=1,
        samples=len(took),
    )


# -- a history ----------------------------------------------------------------------------------------------------


def loaded(server: RedisServer, events: int) -> int:
    """See to it that the server has a history of at least so many events. Returns how many it has."""
    with server.client() as connection:
        if not connection.exists(audit.KEYS.events):
            audit.load(server, events, 1)
        return int(connection.xlen(audit.KEYS.events))


def reading(server: RedisServer, sizes: Sizes) -> Figure:
    """Events a second, rebuilt and replayed."""
    events = loaded(server, sizes.events)
    rates: dict[str, list[float]] = {"rebuild": [], "replay": []}
    floors: dict[str, list[float]] = {"rebuild": [], "replay": []}
    for _ in range(sizes.readings):
        before = audit.apart("floor", server.port, events).seconds
        for name, found in rates.items():
            seconds = audit.apart(name, server.port, events).seconds
            after = audit.apart("floor", server.port, events).seconds
            found.append(events / seconds)
            floors[name].append(2 * events / (before + after))
            before = after
    return Figure(
        name=f"reading {events:,} events",
        how="each a process of its own, the floor before and after it: redis-py with hiredis, pages of 10,000",
        lines=tuple(rated(name, rates[name], floors[name], audit.WORK[name][1], unit="/s") for name in rates),
        blocks=sizes.readings,
        samples=sizes.readings,
    )


class Starts:
    """Starts of a daemon in one home, from the process's beginning to READY."""

    def __init__(self, home: Path, server: RedisServer, environ: Mapping[str, str]) -> None:
        home.mkdir()
        self._address = str(home / "notify")
        off = {"GOV_CHECKPOINT_EVENTS": "off", "GOV_CHECKPOINT_SEC": "off", "NOTIFY_SOCKET": self._address}
        self._daemon = Daemon(home, port=server.port, environ={**off, **environ})

    def start_s(self) -> float:
        """Start, and stop again; seconds until it was ready."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.bind(self._address)
            link.settimeout(READY_S)
            try:
                begun = time.perf_counter()
                self._daemon.start(ready=False)
                while b"READY=1" not in link.recv(4096).split(b"\n"):
                    pass
                took = time.perf_counter() - begun
                self._daemon.stop()
                return took
            finally:
                self._daemon.kill()
                Path(self._address).unlink()


def start(server: RedisServer, sizes: Sizes) -> Figure:
    """A start with a long history and a checkpoint, beside one with nothing."""
    events = loaded(server, sizes.events)
    asyncio.run(audit.write_checkpoint(server.port, events))
    ours: Samples = []
    bare: Samples = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        full = Starts(home / "full", server, {})
        full.start_s()  # its journal takes the history over
        for number in range(sizes.starts):
            bare.append(Starts(home / f"{number}", server, {"GOV_KEY_PREFIX": f"empty{number}"}).start_s())
            ours.append(full.start_s())
    line = compared("p50", [[one] for one in ours], [[one] for one in bare], 50, 1, unit="s")
    return Figure(
        name=f"start with {events:,} events",
        how=f"a daemon's process until READY, journal in place, the checkpoint {audit.TAIL:,} events before the end; "
        "floor: where nothing ever happened",
        lines=(held_within(line, 1),),
        blocks=sizes.starts,
        samples=sizes.starts,
    )


# -- memory -------------------------------------------------------------------------------------------------------


class Forgetful:
    """A store that takes every commit and keeps only where the stream ends."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._head, self._clock = GENESIS, clock

    async def commit(self, commit: Commit) -> frozenset[str]:
        if commit.expected != self._head:
            raise ConflictError(commit.expected, self._head)
        if commit.entries:
            self._head = commit.entries[-1].head
        return frozenset()

    async def head(self) -> Head:
        return self._head

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        return []

    async def follow(self, after: int, *, timeout_s: float) -> list[Entry]:
        return []

    async def values(self, *keys: str) -> list[bytes | None]:
        return [None for _ in keys]

    async def exists(self, key: str) -> bool:
        return False

    async def write(self, writes: Sequence[Write]) -> None:
        pass

    async def clock(self) -> int:
        return self._clock()


class Account:
    """A ledger with a journal on disk and its own time; every plan is permitted, executed and reported."""

    def __init__(self, home: Path, symbols: int) -> None:
        self.now = MORNING
        self._chance = random.Random(1)  # noqa: S311 - which symbol is next
        self._symbols = [f"M{number:03}USDT" for number in range(symbols)]
        self._made = 0
        keeper = Keeper(
            lambda: Journal.open(home), self._identify, permit_ttl_us=WIDE.permit_ttl_us, clock=lambda: self.now
        )
        self.ledger = Ledger(Forgetful(lambda: self.now), KEYS, lambda: self.now, keeper=keeper)
        self._keeper = keeper

    async def _identify(self) -> Server:
        return Server(run_id="0", master_replid="", master_replid2="", role="master", uptime_s=0, address="")

    async def plans(self, count: int, span_us: int) -> None:
        """That many plans in one commit, and in the next one what became of them."""
        self.now += span_us
        made = [self._plan() for _ in range(count)]
        for proposals in (
            [partial(self._decide, fields, number) for number, fields in enumerate(made)],
            [partial(self._tell, fields, number) for number, fields in enumerate(made)],
        ):
            outcome = await self.ledger.propose(*proposals)
            assert outcome.error is None, outcome.error
        if self._keeper.journal is not None:
            self._keeper.journal.sync_if_due(self.now / 1e6)

    def close(self) -> None:
        self._keeper.close()

    def _plan(self) -> dict[str, str]:
        self._made += 1
        symbol = self._chance.choice(self._symbols)
        proposal = {"plan_id": f"{symbol}-{self._made:08}", "symbol": symbol, "action": "PARTIAL_25"}
        return plan_fields(proposal, now=self.now / 1e6)

    def _decide(self, fields: dict[str, str], number: int, state: State, now: int) -> Proposal:
        plan = parse_plan(fields, entry_id=f"{now // 1000}-{number}", now=now, needs_close_qty=False)
        decided = decider.decide(state, plan, MARKET, WIDE, Situation(now=now), fields=fields, settings="benchmark")
        return Proposal(decided.events)

    def _tell(self, fields: dict[str, str], number: int, state: State, now: int) -> Proposal:
        told = result_fields(fields, executed=True, qty="0.1", error="", now=now / 1e6)
        result = parse_result(told, entry_id=f"{now // 1000}-{number}")
        return Proposal(decider.execution(state, result, WIDE, now, fields=told))


async def _peaks_mib(day: int, days: int) -> list[float]:
    found = []
    with tempfile.TemporaryDirectory() as home:
        account = Account(Path(home), MEMORY_SYMBOLS)
        for _ in range(days):
            peak, left = 0.0, day
            while left > 0:
                count = min(RUN, left)
                await account.plans(count, DAY_US * count // day)
                left -= count
                if left // RUN % 64 == 0:
                    peak = max(peak, resident_mib(os.getpid()))
            found.append(peak)
        account.close()
        assert account.ledger.state.counts.allowed == day * days
    return found


def peaks_mib(day: int, days: int) -> list[float]:
    """Resident memory, the most of each day, in the process this is called in."""
    quiet()
    return uvloop.run(_peaks_mib(day, days))


def memory(_server: RedisServer, sizes: Sizes) -> Figure:
    """Memory of the ledger over days of many plans."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        empty = pool.submit(resident_mib_here).result()
        peaks = pool.submit(peaks_mib, sizes.day, sizes.days).result()
    last = Line(
        what=f"day {sizes.days}, most",
        value=peaks[-1],
        unit="MiB",
        floor=peaks[-2],
        ratio=peaks[-1] / peaks[-2],
        must="≤ 1.05 x the day before",
        reached=peaks[-1] <= 1.05 * peaks[-2],
    )
    first = [
        Line(what=f"day {number}, most", value=peak, unit="MiB") for number, peak in enumerate(peaks[:-1], start=1)
    ]
    return Figure(
        name=f"memory, {sizes.day:,} plans a day",
        how=f"a ledger and its journal in a process of their own, {MEMORY_SYMBOLS} symbols, every plan permitted, "
        "executed and reported, days of virtual time",
        lines=(Line(what="before", value=empty, unit="MiB"), *first, last),
        blocks=sizes.days,
        samples=sizes.day * sizes.days,
    )


def resident_mib_here() -> float:
    return resident_mib(os.getpid())


# -- a command ----------------------------------------------------------------------------------------------------


def status(server: RedisServer, sizes: Sizes) -> Figure:
    """`governor status` beside an interpreter that does nothing."""
    ours: Samples = []
    bare: Samples = []
    server.ask("FLUSHALL")
    with tempfile.TemporaryDirectory() as name, gate(server, Path(name), OPEN) as daemon:
        with Client(server, KEYS) as client:
            client.block(len(SYMBOLS), pause_s=0)
        for _ in range(sizes.commands):
            bare.append(_took_ms([sys.executable, "-c", "pass"], daemon.environ))
            ours.append(_took_ms([sys.executable, "-m", "governor", "status", "--json"], daemon.environ))
    line = compared("p50", [[one] for one in ours], [[one] for one in bare], 50, 20)
    return Figure(
        name="governor status",
        how=f"the command beside a running daemon with {len(SYMBOLS)} symbols; floor: python -c pass",
        lines=(line,),
        blocks=sizes.commands,
        samples=sizes.commands,
    )


def _took_ms(words: Sequence[str], environ: Mapping[str, str]) -> float:
    begun = time.perf_counter()
    subprocess.run(words, env=dict(environ), check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - begun) * 1000
