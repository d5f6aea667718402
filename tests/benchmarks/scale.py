"""How the gate scales: symbols, plans waiting, history, governors, accounts. One picture each, and one document.

    python -m tests.benchmarks.scale [--quick] [--out DIRECTORY] [--draw FILE] [AXIS …]

Along each axis the daemon and its floor (`tests.benchmarks.floor`) are measured in turn, in the same run. Next to each
point stands what part of the machine went to others meanwhile. A point where that was much, or whose floor is off
from both its neighbours, is measured again. Exit code 0: all were measured; 1: one could not be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import msgspec
import uvloop

from events.chain import GENESIS, link
from events.codec import encode, seconds
from events.keys import Keys
from events.store import client as connect
from events.types import Entry, Recorded, SettingsLoaded
from governor import decider
from governor.gates import Situation
from governor.ledger import Ledger
from governor.plans import parse_plan
from governor.policy import DEFAULTS
from governor.results import parse_result
from governor.sim.apply_layer import plan_fields, result_fields
from projections import checkpoint
from projections.state import evolve, initial
from tests.benchmarks import accounts, audit
from tests.benchmarks import floor as floors
from tests.benchmarks.__main__ import setting
from tests.benchmarks.accounts import resident_mib
from tests.benchmarks.alone import MARKET, WIDE, Forgetful, Starts, quiet, resident_mib_here
from tests.benchmarks.figures import at
from tests.benchmarks.floor import Record, Script, floor
from tests.benchmarks.gate import (
    KEYS,
    OPEN,
    PATIENT,
    PAUSE_S,
    PLAN_EVENTS,
    SYMBOLS,
    WARM,
    Client,
    gate,
    one_plan,
    stopped,
    worked_ms,
)
from tests.benchmarks.pictures import FLOOR, OTHER, Line, Panel, Point, draw
from tests.daemon import Daemon, fields_of, wait_for
from tests.servers import RedisServer

Values = dict[str, float]
"""Of one point, by name."""
KEPT = {"GOV_PERMIT_TTL_SEC": "600"}
"""So that no permit ends while plans are counted by the events they leave."""
UNDISTURBED = {"GOV_CHECKPOINT_EVENTS": "off", "GOV_CHECKPOINT_SEC": "off"}
"""No checkpoint is written meanwhile: it is a process of its own, and comes when it likes."""
GAP_US = 6_500_000
"""Between two plans of a made up history: 13,000 a day."""
NOISY = 0.15
"""Part of the machine that others may take before a point is told to be disturbed."""
OFF = 2.0
"""Times by which a floor may differ from both of its neighbours."""
AGAIN = 2
LONGEST_S = 600
CLIENT_WAITS_S, PLAN_LIVES_S = 1.2, 60.0


class Extent(msgspec.Struct, frozen=True, kw_only=True):
    """How far and how long is measured."""

    symbols: tuple[int, ...]
    waiting: tuple[int, ...]
    history: tuple[int, ...]
    governors: tuple[int, ...]
    accounts: tuple[int, ...]
    stored: int
    """Longest history that is written to a server; longer ones are made up as they are read."""
    idle: int
    """Most idle governors that are started."""
    idle_s: float
    blocks: int
    rounds: int
    """Timed plans of a block."""
    flood: int
    """Plans that wait, where that is not the axis."""
    floods: int
    """How often they do; the median counts."""
    past: int
    """Events before, where that is not the axis."""
    starts: int
    committed: int
    """Plans committed one by one, over all accounts."""


QUICK = Extent(
    symbols=(1, 100), waiting=(1, 100), history=(1000, 10_000), governors=(1, 2), accounts=(1, 10), stored=1000,
    idle=1, idle_s=0.5, blocks=1, rounds=20, flood=300, floods=1, past=1000, starts=1, committed=100,
)  # fmt: skip
USUAL = Extent(
    symbols=(1, 10, 100, 1000, 10_000),
    waiting=(1, 10, 100, 1000, 10_000, 100_000),
    history=(1000, 10_000, 100_000, 1_000_000, 10_000_000),
    governors=(1, 2, 3, 4),
    accounts=(1, 3, 10, 30, 100, 300, 1000),
    stored=1_000_000, idle=30, idle_s=4.0, blocks=4, rounds=150, flood=4000, floods=3, past=40_000, starts=3,
    committed=4000,
)  # fmt: skip


# -- the parts --------------------------------------------------------------------------------------------------------


class Spread(Client):
    """A client that publishes for these symbols in turn, whichever it is asked to."""

    def __init__(self, server: RedisServer, keys: Keys, symbols: Sequence[str] = SYMBOLS) -> None:
        super().__init__(server, keys)
        self._turn = cycle(symbols)

    def fields(self, symbol: str) -> dict[str, str]:
        return super().fields(next(self._turn))


@contextlib.contextmanager
def all_stopped(daemons: Sequence[Daemon]) -> Iterator[None]:
    """None of them runs meanwhile."""
    with contextlib.ExitStack() as stack:
        for daemon in daemons:
            stack.enter_context(stopped(daemon.process))
        yield


def latency(
    server: RedisServer, daemons: Sequence[Daemon], home: Path, extent: Extent, symbols: Sequence[str] = SYMBOLS
) -> Values:
    """Milliseconds from a plan to its permit, of the daemons and of the floor, in turn."""
    ours: list[float] = []
    bare: list[float] = []
    with Spread(server, KEYS, symbols) as client, Spread(server, floors.KEYS, symbols) as other:
        client.block(WARM, pause_s=0)
        for _ in range(extent.blocks):
            ours += client.block(extent.rounds, pause_s=PAUSE_S)
            record = one_plan(server, client)
            with all_stopped(daemons), floor(server, record, home):
                bare += other.block(extent.rounds, pause_s=PAUSE_S)
    return {
        "p50": at(ours, 50), "p99": at(ours, 99), "floor p50": at(bare, 50), "floor p99": at(bare, 99),
    }  # fmt: skip


def _last(server: RedisServer, keys: Keys) -> int:
    """Number of the last event."""
    rows = server.ask("XREVRANGE", keys.events, "+", "-", "COUNT", 1)
    return int(rows[0][0].partition("-")[0]) if rows else 0


def flood_s(server: RedisServer, keys: Keys, client: Client, waiting: int, *, held: Any, events: int) -> float:
    """Seconds from the moment it may read until every one of the plans that wait has its events.

    Args:
        server: where.
        keys: whose plans and events.
        client: makes the plans.
        waiting: how many.
        held: context in which nobody reads.
        events: of each plan.
    """
    with server.client(decode_responses=False) as connection:
        connection.config_set("notify-keyspace-events", "")
        last = _last(server, keys) + waiting * events
        with held:
            for first in range(0, waiting, 1000):
                pipe = connection.pipeline(transaction=False)
                for _ in range(first, min(first + 1000, waiting)):
                    pipe.xadd(keys.plans, cast("Any", client.fields("")))
                pipe.execute()
            waits = floors.link(server, timeout_s=2 * LONGEST_S)
            # Answered the moment that event is there: looking again and again would take the server's time.
            waits.send_command("XREAD", "COUNT", 1, "BLOCK", LONGEST_S * 1000, "STREAMS", keys.events, f"{last - 1}-0")
            begun = time.perf_counter()
        found = waits.read_response()
        took = time.perf_counter() - begun
        waits.disconnect()
    assert found, f"{waiting} plans were not decided within {LONGEST_S} s"
    return took


def floods(
    server: RedisServer,
    daemons: Sequence[Daemon],
    home: Path,
    waiting: int,
    symbols: Sequence[str] = SYMBOLS,
    *,
    times: int = 1,
) -> Values:
    """Decisions a second where so many plans wait, and until the last of them; the median of so many times."""
    with Spread(server, KEYS, symbols) as client:
        client.block(WARM, pause_s=0)
        record = one_plan(server, client)
        wait_for(lambda: server.ask("XPENDING", KEYS.plans, "governor")["pending"] == 0)
        ours = [
            flood_s(server, KEYS, client, waiting, held=all_stopped(daemons), events=PLAN_EVENTS) for _ in range(times)
        ]
    with (
        all_stopped(daemons),
        floor(server, record, home, pipelined=True) as process,
        Spread(server, floors.KEYS, symbols) as client,
    ):
        client.block(WARM, pause_s=0)
        bare = [
            flood_s(server, floors.KEYS, client, waiting, held=stopped(process), events=record.events)
            for _ in range(times)
        ]
    mine, least = at(ours, 50), at(bare, 50)
    return {"rate": waiting / mine, "floor rate": waiting / least, "last": mine, "floor last": least}


def busy() -> tuple[float, float, float]:
    """Processor time: of this process's group, of everybody, and all there was; ticks since the machine began."""
    fields = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    everything = sum(fields)
    ours = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = path.read_text().rpartition(")")[2].split()
            if int(words[2]) == os.getpgrp():
                ours += sum(int(word) for word in words[11:15])
    return ours, everything - fields[3] - fields[4], everything


# -- a history that is made up ----------------------------------------------------------------------------------------


@cache
def life() -> tuple[tuple[str, bytes, int], ...]:
    """One plan's events, as the gate decides them: name, data with places for what differs, microseconds after it."""
    now, later, symbol, plan_id = 1_111_111_111_111_111, 1_000_000, "SAMPLEUSDT", "SAMPLE-PLAN"
    asked, told = f"{now // 1000 - 100}-0", f"{now // 1000 + 1000}-0"
    fields = plan_fields({"plan_id": plan_id, "symbol": symbol, "action": "PARTIAL_25"}, now=now / 1e6)
    plan = parse_plan(fields, entry_id=asked, now=now, needs_close_qty=False)
    state, situation = initial(), Situation(now=now, apply_mode="testnet")
    decided = decider.decide(state, plan, MARKET, WIDE, situation, fields=fields, settings="benchmark")
    for event in decided.events:
        evolve(state, Recorded(state.seq + 1, now, event, ""))
    raw = result_fields(fields, executed=True, qty="0.1", error="", now=now / 1e6)
    executed = decider.execution(state, parse_result(raw, entry_id=told), WIDE, now + later, fields=raw)
    places = {
        plan_id: b"plan", symbol: b"symbol", asked: b"asked", told: b"told",
        str(now + WIDE.permit_ttl_us): b"ends",
    }  # fmt: skip
    found = []
    for events, after in ((decided.events, 0), (executed, later)):
        for event in events:
            data = encode(event, after=GENESIS, at=now).data.replace(b"%", b"%%")
            for text, place in places.items():
                data = data.replace(text.encode(), b"%(" + place + b")b")
            found.append((event.NAME, data, after))
    return tuple(found)


def made_up(events: int, symbols: Sequence[str], *, start: int) -> Iterator[Entry]:
    """A history of at least so many events: plans permitted, executed and reported, the symbols in turn.

    Args:
        events: how many.
        symbols: of the plans.
        start: of the first one, microseconds.
    """
    loaded = SettingsLoaded(digest="benchmark", settings=DEFAULTS, limits={}, version="0", host="benchmark")
    entry = encode(loaded, after=GENESIS, at=start)
    yield entry
    seq, digest = entry.seq, entry.hash
    plan = life()
    for number in range(-(-(events - 1) // len(plan))):
        now = start + number * GAP_US
        symbol = symbols[number % len(symbols)].encode()
        parts = {
            b"plan": b"%b-%d-%06d" % (symbol, now // 1_000_000, number),
            b"symbol": symbol,
            b"asked": b"%d-0" % (now // 1000 - 100),
            b"told": b"%d-0" % (now // 1000 + 1000),
            b"ends": b"%d" % (now + WIDE.permit_ttl_us),
        }
        for name, template, later in plan:
            seq += 1
            timestamp, data = seconds(now + later), template % parts
            digest = link(digest, name, seq, timestamp, data)
            yield Entry(name, seq, timestamp, data, digest)


def named(count: int) -> tuple[str, ...]:
    """So many symbols."""
    return tuple(f"S{number:05}USDT" for number in range(count))


def seed(server: RedisServer, events: int, symbols: Sequence[str]) -> int:
    """Write a made up history that ends now. Returns the number of its last event."""
    plans = events // len(life())
    entries = made_up(events, symbols, start=time.time_ns() // 1000 - (plans + 1) * GAP_US)
    last = 0
    with server.client(decode_responses=False) as connection:
        while page := list(islice(entries, 2000)):
            pipe = connection.pipeline(transaction=False)
            for entry in page:
                pipe.xadd(KEYS.events, cast("Any", fields_of(entry)), id=f"{entry.seq}-0")
            pipe.execute()
            last = page[-1].seq
    return last


class MadeUp(Forgetful):
    """A store whose history is made up as it is read, once, from the beginning."""

    def __init__(self, events: int) -> None:
        super().__init__(lambda: 0)
        self._entries = made_up(events, SYMBOLS, start=1_769_212_800_000_000)
        self.making_s = 0.0
        """What that took, which is no part of reading."""

    async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
        begun = time.perf_counter()
        assert after == self._head.seq
        page = list(islice(self._entries, limit))
        if page:
            self._head = page[-1].head
        self.making_s += time.perf_counter() - begun
        return page


async def _fold(events: int) -> Values:
    store = MadeUp(events)
    ledger = Ledger(store, KEYS, lambda: 0)
    begun = time.perf_counter()
    await ledger.open()
    took = time.perf_counter() - begun - store.making_s
    assert ledger.state.seq >= events
    return {
        "folded": took,
        "folded MiB": resident_mib_here(),
        "checkpoint kB": len(checkpoint.write(ledger.state)) / 1000,
        "plans remembered": len(ledger.state.plans),
    }


def fold(events: int) -> Values:
    """Fold a history that is nowhere, with the ledger that every start has, in the process this is called in."""
    quiet()
    return uvloop.run(_fold(events))


# -- the axes ---------------------------------------------------------------------------------------------------------


def symbols(count: int, extent: Extent) -> Values:
    """Every one of the symbols was traded within the last day, and is again."""
    traded = named(count)
    with RedisServer(appendonly=True) as server, tempfile.TemporaryDirectory() as name:
        seed(server, extent.past, traded)
        with gate(server, Path(name) / "gate", OPEN | KEPT | UNDISTURBED) as daemon:
            assert daemon.process is not None
            found = latency(server, [daemon], Path(name), extent, traded)
            found |= floods(server, [daemon], Path(name), extent.flood, traded, times=extent.floods)
            return found | {"MiB": resident_mib(daemon.process.pid)}


def waiting(count: int, extent: Extent) -> Values:
    """So many plans wait when it goes on reading."""
    times = max(1, min(30, extent.floods * extent.flood // count))
    environ = OPEN | KEPT | PATIENT | UNDISTURBED
    with (
        RedisServer(appendonly=True) as server,
        tempfile.TemporaryDirectory() as name,
        gate(server, Path(name) / "gate", environ) as daemon,
    ):
        assert daemon.process is not None
        found = floods(server, [daemon], Path(name), count, times=times)
        return found | {"MiB": resident_mib(daemon.process.pid)}


def history(count: int, extent: Extent) -> Values:
    """So many events happened before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(fold, count).result()
    return found if count > extent.stored else found | stored(count, extent)


def stored(count: int, extent: Extent) -> Values:
    """The same with the events in a server and in the daemon's journal."""
    with RedisServer(appendonly=True) as server, tempfile.TemporaryDirectory() as name:
        home = Path(name)
        before = int(server.ask("INFO", "memory")["used_memory"])
        last = seed(server, count, SYMBOLS)
        each = (int(server.ask("INFO", "memory")["used_memory"]) - before) / last
        full = Starts(home / "full", server, OPEN | KEPT)
        taking = full.start_s()  # its journal takes the history over
        first = at([full.start_s() for _ in range(1 if count > 100_000 else extent.starts)], 50)
        behind = min(audit.TAIL, last // 10)
        asyncio.run(audit.write_checkpoint(server.port, last - behind + audit.TAIL))
        bare, ours = [], []
        for number in range(extent.starts):
            bare.append(Starts(home / f"{number}", server, {"GOV_KEY_PREFIX": f"empty{number}"}).start_s())
            ours.append(full.start_s())
        with gate(server, home / "full", OPEN | KEPT | UNDISTURBED) as daemon:
            assert daemon.process is not None
            found = {"MiB": resident_mib(daemon.process.pid)} | latency(server, [daemon], home, extent)
        return found | {
            "start, first event": first,
            "start, journal new": taking,
            "start": at(ours, 50),
            "floor start": at(bare, 50),
            "server bytes an event": each,
            "server MiB": each * last / 2**20,
        }


def governors(count: int, extent: Extent) -> Values:
    """So many daemons on one stream: with the lease one decides and the others stand by, without it all compete."""
    found: Values = {}
    for prefix, lease in (("", "10"), ("all ", "off")):
        with RedisServer(appendonly=True) as server, tempfile.TemporaryDirectory() as name:
            home = Path(name)
            with contextlib.ExitStack() as stack:
                environ = OPEN | KEPT | UNDISTURBED | {"GOV_LEASE_SEC": lease}
                daemons = [stack.enter_context(gate(server, home / f"{n}", environ)) for n in range(count)]
                one = latency(server, daemons, home, extent) | floods(
                    server, daemons, home, extent.flood, times=extent.floods
                )
                conflicts = sum(map(_conflicts, daemons))
            plans = (_last(server, KEYS) - count) / PLAN_EVENTS
            one["conflicts"] = 100 * conflicts / plans
        found |= {f"{prefix}{key}": value for key, value in one.items()}
    return found


def _conflicts(daemon: Daemon) -> float:
    told = re.search(r"^quantum_govern_commit_conflicts_total (\S+)$", daemon.http("/metrics"), re.MULTILINE)
    assert told is not None, "the daemon does not tell its conflicts"
    return float(told[1])


def many_accounts(count: int, extent: Extent) -> Values:
    """So many namespaces of one server: plans in all of them, and governors that have nothing to do."""
    with RedisServer() as server:
        found = uvloop.run(accounts.plans(server, count, extent.committed))
        server.ask("FLUSHALL")
        bare = uvloop.run(_bare(server, usual_record(), count, extent.committed))
    values = {
        "p50": found["p50, us"] / 1000, "p99": found["p99, us"] / 1000,
        "floor p50": at(bare, 50), "floor p99": at(bare, 99), "server bytes a plan": found["server bytes a plan"],
    }  # fmt: skip
    return values if count > extent.idle else values | idle(count, extent.idle_s)


@cache
def usual_record() -> Record:
    """What a daemon writes for a plan."""
    with (
        RedisServer() as server,
        tempfile.TemporaryDirectory() as name,
        gate(server, Path(name), OPEN),
        Spread(server, KEYS) as client,
    ):
        client.block(WARM, pause_s=0)
        return one_plan(server, client)


async def _bare(server: RedisServer, record: Record, count: int, plans: int) -> list[float]:
    """The same in one script a plan, without looking; milliseconds."""
    scripts = [Script(record, own=Keys(), keys=Keys(f"a{number}")) for number in range(count)]
    connection = connect(host=server.host, port=server.port)
    run: Callable[..., Any] = connection.execute_command
    sha = await run("SCRIPT LOAD", scripts[0].text)
    chance, last, took = random.Random(1), [0] * count, []  # noqa: S311 - which account is next
    for number in range(plans):
        account = chance.randrange(count)
        begun = time.perf_counter()
        words = scripts[account].arguments(b"p%d" % number, b"%d-0" % number, last[account])
        await run("EVALSHA", sha, *words)
        took.append((time.perf_counter() - begun) * 1000)
        last[account] += record.events
    await connection.aclose()
    return took


def idle(count: int, span_s: float) -> Values:
    """What so many daemons cost that have nothing to do, each for an account of its own."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        connection = stack.enter_context(server.client())
        daemons = []
        for number in range(count):
            one = Daemon(home / f"{number}", port=server.port, environ={"GOV_KEY_PREFIX": f"idle{number}"})
            stack.callback(one.kill)
            one.start(ready=False)
            daemons.append(one)
        for one in daemons:
            wait_for(lambda: '"ready"' in one.log, within_s=60, what="ready")  # noqa: B023 - looked at here
        processes = [one.process for one in daemons if one.process is not None]

        def so_far() -> tuple[float, float, float, int]:
            told: Any = connection.info("stats")
            worked = sum(map(worked_ms, processes)) / 1000, worked_ms(server._process) / 1000
            return time.monotonic(), *worked, int(told["total_commands_processed"])

        time.sleep(1)  # what a start leaves to be done
        before = so_far()
        time.sleep(span_s)
        span, governed, served, commands = (b - a for a, b in zip(before, so_far(), strict=True))
        return {
            "commands": commands / span,
            "governors %": 100 * governed / span,
            "server %": 100 * served / span,
            "governors MiB": sum(resident_mib(process.pid) for process in processes),
        }


# -- what is shown ----------------------------------------------------------------------------------------------------


def _beside(prefix: str = "") -> tuple[Line, ...]:
    """A plan's way to its permit, and the floor's."""
    return (
        Line(f"{prefix}p99", "gate, p99", dashed=True),
        Line(f"{prefix}p50", "gate, p50"),
        Line(f"{prefix}floor p99", "floor, p99", FLOOR, dashed=True, marker="s"),
        Line(f"{prefix}floor p50", "floor, p50", FLOOR, marker="s"),
    )


def _with_others(value: str) -> tuple[Line, ...]:
    """A value without the lease, with it, and the floor's."""
    return (
        Line(f"all {value}", "all compete", OTHER, marker="^"),
        Line(value, "one decides, others stand by"),
        Line(f"floor {value}", "floor", FLOOR, marker="s"),
    )


class Axis(msgspec.Struct, frozen=True):
    """What is measured along what, and how it is shown."""

    title: str
    along: str
    measure: Callable[[int, Extent], Values]
    panels: tuple[Panel, ...]
    floor: str | None
    """Value by which a disturbed point is known; None where it changes a lot by itself."""


PERMIT = "plan to permit"
RATE = "decisions a second"
BOTH = (Line("rate", "gate"), Line("floor rate", "floor", FLOOR, marker="s"))
AXES: dict[str, Axis] = {
    "symbols": Axis(
        "Symbols: each traded today, and again",
        "symbols",
        symbols,
        (Panel(PERMIT, "ms", _beside(), log=False), Panel(RATE, "1/s", BOTH, log=False)),
        "floor p50",
    ),
    "waiting": Axis(
        "Plans waiting, of 200 symbols",
        "plans that wait",
        waiting,
        (
            Panel(RATE, "1/s", BOTH, log=False),
            Panel(
                "until the last is decided",
                "s",
                (Line("last", "gate"), Line("floor last", "floor", FLOOR, marker="s")),
                marks=((CLIENT_WAITS_S, "the client waits 1.2 s"), (PLAN_LIVES_S, "a plan lives 60 s")),
            ),
        ),
        None,
    ),
    "history": Axis(
        "History: events that happened before (one plan in 6.5 s)",
        "events",
        history,
        (
            Panel(
                "until it is ready",
                "s",
                (
                    Line("start, first event", "from the first event", OTHER),
                    Line("folded", "its folding alone, made up events", OTHER, dashed=True, marker="^"),
                    Line("start", "from the checkpoint"),
                    Line("floor start", "nothing ever happened", FLOOR, marker="s"),
                ),
            ),
            Panel(
                "memory",
                "MiB",
                (
                    Line("server MiB", "the server's, for the events", OTHER, goes_on=True),
                    Line("MiB", "the daemon's"),
                    Line("folded MiB", "a fold's, made up events", OTHER, dashed=True, marker="^"),
                ),
            ),
            Panel(PERMIT, "ms", _beside(), log=False),
        ),
        "floor p50",
    ),
    "governors": Axis(
        "Governors on one stream, all on this machine",
        "governors",
        governors,
        (
            Panel(f"{PERMIT}, p50", "ms", _with_others("p50"), log=False),
            Panel(RATE, "1/s", _with_others("rate"), log=False),
            Panel("commits refused, of 100 plans", "conflicts", _with_others("conflicts")[:-1], log=False),
        ),
        "floor p50",
    ),
    "accounts": Axis(
        "Accounts (namespaces) of one server",
        "accounts",
        many_accounts,
        (
            Panel("a plan decided and committed", "ms", _beside(), log=False),
            Panel(
                "idle governors, one an account",
                "% of a core",
                (
                    Line("governors %", "the governors", goes_on=True),
                    Line("server %", "the server", OTHER, marker="^", goes_on=True),
                ),
                marks=((100.0, "one core"),),
            ),
        ),
        "floor p50",
    ),
}


# -- a run ------------------------------------------------------------------------------------------------------------


def disturbed(points: Sequence[Point], floor_key: str | None) -> list[int]:
    """Which of the points are to be measured again: others took too much, or the floor is off from its neighbours."""
    found = []
    for number, point in enumerate(points):
        beside = [points[other] for other in (number - 1, number + 1) if 0 <= other < len(points)]
        values = [other.values[floor_key] for other in beside if floor_key is not None and floor_key in other.values]
        mine = None if floor_key is None else point.values.get(floor_key)
        off = bool(values) and mine is not None and (mine > OFF * max(values) or mine < min(values) / OFF)
        if off or point.others >= NOISY:
            found.append(number)
    return found


def point_of(axis: Axis, x: int, extent: Extent, *, again: int = 0) -> Point:
    """One point, and what else happened on the machine."""
    before = busy()
    values = axis.measure(x, extent)
    ours, everybody, everything = (b - a for a, b in zip(before, busy(), strict=True))
    return Point(x, values, max(0.0, (everybody - ours) / everything), again)


def along(axis: Axis, xs: Sequence[int], extent: Extent, told: Callable[[Point], None]) -> list[Point]:
    """All points of an axis; a disturbed one is measured again, and the quieter one kept."""
    points: list[Point] = []
    for x in xs:
        points.append(point_of(axis, x, extent))
        told(points[-1])
    for again in range(1, AGAIN + 1):
        for number in disturbed(points, axis.floor):
            another = point_of(axis, points[number].x, extent, again=again)
            told(another)
            if another.others <= max(points[number].others, NOISY):
                points[number] = another
    return points


def pictures(document: dict[str, Any], directory: Path) -> list[Path]:
    """Draw what a document tells. Returns the files.

    Raises:
        PlotUnavailableError: matplotlib is missing.
        OSError: one cannot be written.
    """
    found = []
    for name, axis in AXES.items():
        if rows := document["axes"].get(name):
            path = directory / f"{name}.svg"
            points = msgspec.convert(rows, list[Point])
            draw(axis.title, axis.along, axis.panels, points, path, noisy=NOISY)
            found.append(path)
    return found


def keep(document: dict[str, Any], directory: Path) -> None:
    """Write the pictures and what they show, `scale.json`; axes that were not measured stay as they were there.

    Raises:
        PlotUnavailableError: matplotlib is missing.
        OSError: one cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "scale.json"
    earlier = json.loads(path.read_text())["axes"] if path.exists() else {}
    axes = earlier | document["axes"]
    told = document | {"axes": {name: axes[name] for name in AXES if name in axes}}
    path.write_text(json.dumps(told) + "\n")
    pictures(document, directory)


def rounded(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Plain values, with as many digits as mean something."""
    return [
        {
            "x": point.x,
            "values": {key: float(f"{value:.4g}") for key, value in point.values.items()},
            "others": round(point.others, 3),
            "again": point.again,
        }
        for point in points
    ]


def main(words: Sequence[str]) -> None:
    options = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.scale", description=(__doc__ or "").partition("\n")[0]
    )
    options.add_argument("axes", nargs="*", metavar="AXIS", help=f"of {', '.join(AXES)} (all)")
    options.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; says nothing")
    options.add_argument("--out", type=Path, metavar="DIRECTORY", help="write a picture an axis and scale.json there")
    options.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing, draw what an earlier run found")
    given = options.parse_args(words)
    if unknown := [name for name in given.axes if name not in AXES]:
        options.error(f"unknown axis {unknown[0]!r}, expected one of {', '.join(AXES)}")
    if given.draw is not None:
        if given.out is None:
            options.error("--draw needs --out, the directory of the pictures")
        pictures(json.loads(given.draw.read_text()), given.out)
        return
    quiet()
    extent = QUICK if given.quick else USUAL
    tell = partial(print, file=sys.stderr, flush=True)
    begun = time.monotonic()
    document: dict[str, Any] = {**setting("valkey"), "axes": {}}
    failures: dict[str, str] = {}
    for name in given.axes or AXES:
        try:
            points = along(
                AXES[name], getattr(extent, name), extent,
                lambda point: tell(f"{time.monotonic() - begun:5.0f} s  {name} {point.x:,}: {shown(point)}"),  # noqa: B023
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - one axis does not take the others with it
            failures[name] = f"{type(error).__name__}: {error}"
            tell(f"{name} was not measured: {failures[name]}")
        else:
            document["axes"][name] = rounded(points)
            if given.out is not None:
                keep(document, given.out)
    text = json.dumps(document | {"failures": failures}, ensure_ascii=False)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(text + "\n")
    sys.exit(1 if failures else 0)


def shown(point: Point) -> str:
    """A point in a line."""
    told = ", ".join(f"{key} {value:.4g}" for key, value in point.values.items())
    return f"{told}; others {point.others:.0%}" + (f", again {point.again}" if point.again else "")


if __name__ == "__main__":
    main(sys.argv[1:])
