"""The gate as its client sees it: a plan goes in, a permit is there, or is gone.

The daemon is the real one, a process of its own against a real server with an append-only file. The client is one and
the same for gate and floor. It hears of a permit by the server's keyspace notification, on a connection of its own: a
client that asked again and again would take the server's time, and one of two processors, from what is measured. A
round begins before the plan is sent and ends when the notification is read. Between rounds there is a pause, as plans
come apart from each other; without it the daemon's work behind a permit (fold, journal, log) would be in the next
round, which is told as well. In each block the one that is not measured does not run: the daemon is stopped
(SIGSTOP), the floor not started.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import msgspec
import redis

from events.keys import Keys
from governor.by_hand import rearm
from governor.settings import load
from governor.sim.apply_layer import MAXLEN, plan_fields
from tests.benchmarks import floor as floors
from tests.benchmarks.exchange import KEY, SECRET, exchange, slower_ms
from tests.benchmarks.figures import Figure, Line, Samples, Sizes, at, compared, held_within, rated
from tests.benchmarks.floor import Record, floor, link, recorded
from tests.daemon import Daemon, events_of, wait_for
from tests.servers import RedisServer

KEYS = Keys()
SYMBOLS = tuple(f"C{number:03}USDT" for number in range(200))
OPEN = {
    "GOV_MAX_EXEC_PER_HOUR": "off",
    "GOV_MAX_EXEC_PER_5MIN": "off",
    "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "off",
    "GOV_MAX_REDUCE_QTY_PER_DAY": "off",
    "GOV_FALLBACK_QTY": "0.001",
    "GOV_MAX_PLAN_AGE_SEC": "off",
}
"""Settings under which every plan is permitted."""
PATIENT = {"GOV_LEASE_SEC": "60"}
"""So that it is still the active one after it was stopped for as long as it takes to publish thousands of plans."""
NUMBERS = count(1)
"""Of plans, over all clients: a second one within the same second must not publish the same plan_id again."""
WARM = 20
"""Rounds before each block."""
PAUSE_S = 0.004
"""Longest pause between two rounds; each is random up to it."""
CALL_S = 0.020
OUTSTANDING = 10
"""Permits that a breach takes away."""
HEARD_S = 20.0
"""The longest a permit is waited for."""
PLAN_EVENTS = 2
"""Of a plan that is permitted: PLAN_RECEIVED and DECISION."""
LONGEST_S = 600.0


class Client:
    """Publishes plans under one prefix and hears of their permits.

    Args:
        server: where.
        keys: whose plans and permits.
        on: what is heard of a permit: `set` or `del`.
    """

    def __init__(self, server: RedisServer, keys: Keys, *, on: str = "set") -> None:
        self._redis = redis.Redis(host=server.host, port=server.port, protocol=2)
        self._link = link(server, timeout_s=HEARD_S)
        self._keys, self._on = keys, on.encode()
        self._chance = random.Random(1)  # noqa: S311 - pauses
        self._made = 0
        # No more than what is listened for: each notification is work for the server.
        self._redis.config_set("notify-keyspace-events", "K$" if on == "set" else "K$g")
        self._link.send_command("PSUBSCRIBE", f"__keyspace@0__:{keys.permit('*')}")
        self._link.read_response()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.disconnect()
        self._redis.close()

    def fields(self, symbol: str) -> dict[str, str]:
        """A new plan, as the Apply Layer writes it."""
        self._made += 1
        now = time.time()
        return plan_fields(
            {"plan_id": f"{symbol}-{int(now)}-{next(NUMBERS):06}", "symbol": symbol, "action": "PARTIAL_25"}, now=now
        )

    def publish(self, fields: dict[str, str]) -> str:
        entry_id: Any = self._redis.xadd(self._keys.plans, cast("Any", fields), maxlen=MAXLEN, approximate=True)
        return cast("bytes", entry_id).decode()

    def heard(self) -> str:
        """Waits for the next permit that was set, or deleted; its plan_id."""
        while True:
            message = cast("list[bytes]", self._link.read_response())
            if message[3] == self._on:
                return message[2].decode().rpartition(":")[2]

    def round_ms(self, symbol: str) -> float:
        """From before the plan is sent until its permit is there; then the permit is consumed."""
        fields = self.fields(symbol)
        begun = time.perf_counter()
        self.publish(fields)
        try:
            while self.heard() != fields["plan_id"]:
                pass
        except redis.TimeoutError as error:
            why = self._redis.get(self._keys.block(fields["plan_id"]))
            raise RuntimeError(
                f"plan {fields['plan_id']} has no permit after {HEARD_S:g} s; its block record is {why!r}"
            ) from error
        took = time.perf_counter() - begun
        self._redis.delete(self._keys.permit(fields["plan_id"]))
        return took * 1000

    def block(self, rounds: int, *, pause_s: float) -> Samples:
        """Timed rounds, after some that are not, the symbols in turn."""
        took = []
        for _ in range(WARM + rounds):
            time.sleep(self._chance.uniform(0, pause_s))
            took.append(self.round_ms(SYMBOLS[self._made % len(SYMBOLS)]))
        return took[WARM:]


def worked_ms(process: subprocess.Popen[bytes] | None) -> float:
    """Processor time of a process so far, all its threads; what else runs on the machine hardly changes it."""
    assert process is not None
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


@contextlib.contextmanager
def gate(
    server: RedisServer, home: Path, environ: Mapping[str, str], *, base_url: str | None = None
) -> Iterator[Daemon]:
    """A daemon that reads plans; killed at the end."""
    home.mkdir(parents=True, exist_ok=True)
    one = Daemon(home, port=server.port, base_url=base_url, environ=environ)
    try:
        one.start()
        yield one
    finally:
        one.kill()


@contextlib.contextmanager
def stopped(process: subprocess.Popen[bytes] | None) -> Iterator[None]:
    """Does not run meanwhile."""
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def one_plan(server: RedisServer, client: Client) -> Record:
    """What the daemon writes for a plan now, alone: a commit may also hold what was due by time."""
    while True:
        fields = client.fields(SYMBOLS[0])
        record = recorded(server, KEYS, fields["plan_id"], partial(client.publish, fields))
        if [KEYS.permit(fields["plan_id"]).encode()] not in [command[1:2] for command in record.commands]:
            raise RuntimeError(f"plan {fields['plan_id']} was not permitted: there is nothing to compare with")
        if record.events == PLAN_EVENTS:
            return record


class Blocks(NamedTuple):
    """Rounds of one side, and the processor time of its process for a plan of each block; milliseconds."""

    rounds: list[Samples]
    worked: list[float]

    def measure(self, client: Client, process: subprocess.Popen[bytes] | None, rounds: int, *, pause_s: float) -> None:
        """One block more."""
        before = worked_ms(process)
        self.rounds.append(client.block(rounds, pause_s=pause_s))
        self.worked.append((worked_ms(process) - before) / (WARM + rounds))


def alternating(server: RedisServer, sizes: Sizes, *, fsync: bool, pause_s: float) -> tuple[Blocks, Blocks]:
    """Blocks of the gate and of the floor, in turn."""
    ours, bare = Blocks([], []), Blocks([], [])
    environ = OPEN | ({"GOV_JOURNAL_FSYNC": "always"} if fsync else {})
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        daemon = stack.enter_context(gate(server, home, environ))
        client = stack.enter_context(Client(server, KEYS))
        other = stack.enter_context(Client(server, floors.KEYS))
        client.block(len(SYMBOLS), pause_s=0)
        for _ in range(sizes.blocks):
            ours.measure(client, daemon.process, sizes.rounds, pause_s=pause_s)
            record = one_plan(server, client)
            with floor(server, record, home, fsync=fsync) as process, stopped(daemon.process):
                bare.measure(other, process, sizes.rounds, pause_s=pause_s)
    return ours, bare


def _worked(ours: Sequence[float], bare: Sequence[float]) -> Line:
    line = compared("processor time a plan", [[one] for one in ours], [[one] for one in bare], 50, 1)
    return msgspec.structs.replace(line, must="stated", reached=None)


def _round(server: RedisServer, sizes: Sizes, *, name: str, how: str, fsync: bool) -> Figure:
    ours, bare = alternating(server, sizes, fsync=fsync, pause_s=PAUSE_S)
    hasty, hasty_bare = alternating(server, sizes, fsync=fsync, pause_s=0)
    lines = (
        compared("p50", ours.rounds, bare.rounds, 50, 1.5),
        compared("p99", ours.rounds, bare.rounds, 99, 2),
        compared("p50, no pause", hasty.rounds, hasty_bare.rounds, 50, 1.5),
        compared("p99, no pause", hasty.rounds, hasty_bare.rounds, 99, 2),
        _worked(hasty.worked, hasty_bare.worked),
    )
    return Figure(name=name, how=how, lines=lines, blocks=sizes.blocks, samples=sizes.blocks * sizes.rounds)


def permit(server: RedisServer, sizes: Sizes) -> Figure:
    """Plan written until the permit is visible, without an exchange, the journal at its default."""
    how = "a round trip of one client; floor: a consumer that runs one script with the same writes"
    return _round(server, sizes, name="plan to permit", how=how, fsync=False)


def fsync(server: RedisServer, sizes: Sizes) -> Figure:
    """The same with every intent on disk before its commit."""
    how = "as before with GOV_JOURNAL_FSYNC=always; floor: the same consumer with one fdatasync before its script"
    return _round(server, sizes, name="plan to permit, fsync always", how=how, fsync=True)


def with_exchange(server: RedisServer, sizes: Sizes) -> Figure:
    """The same with an exchange that takes its time; the floor is the slower of the two calls."""
    ours: list[Samples] = []
    bare: list[Samples] = []
    credentials = {"BINANCE_TESTNET_API_KEY": KEY, "BINANCE_TESTNET_API_SECRET": SECRET}
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base_url = stack.enter_context(exchange(CALL_S, SYMBOLS))
        daemon = stack.enter_context(gate(server, home, OPEN | credentials, base_url=base_url))
        client = stack.enter_context(Client(server, KEYS))
        for _ in range(sizes.blocks):
            ours.append(client.block(sizes.exchange_rounds, pause_s=PAUSE_S))
            with stopped(daemon.process):
                bare.append(slower_ms(base_url, SYMBOLS[: sizes.exchange_rounds]))
        decisions = events_of_decisions(server)
    assert all(decision["mark_price"] is not None for decision in decisions), "the exchange did not answer"
    lines = (
        held_within(compared("p50", ours, bare, 50, 1), 2),
        msgspec.structs.replace(compared("p99", ours, bare, 99, 1), must="stated", reached=None),
    )
    return Figure(
        name=f"plan to permit, exchange at {CALL_S * 1000:g} ms",
        how="a round trip of one client; floor: the slower of the two calls, over a bare socket",
        lines=lines,
        blocks=sizes.blocks,
        samples=sizes.blocks * sizes.exchange_rounds,
    )


def events_of_decisions(server: RedisServer) -> list[dict[str, Any]]:
    """Data of every decision so far."""
    with server.client() as connection:
        return events_of(connection, "DECISION")


def throughput(server: RedisServer, sizes: Sizes) -> Figure:
    """Decisions a second where plans wait."""
    ours: list[float] = []
    bare: list[float] = []
    worked: list[float] = []
    bare_worked: list[float] = []
    for _ in range(sizes.floods):
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            server.ask("FLUSHALL")
            with gate(server, home, OPEN | PATIENT) as daemon, Client(server, KEYS) as client:
                client.block(len(SYMBOLS), pause_s=0)
                record = one_plan(server, client)
                wait_for(lambda: server.ask("XPENDING", KEYS.plans, "governor")["pending"] == 0)
                before = worked_ms(daemon.process)
                ours.append(_flood(server, KEYS, daemon.process, client, waiting=sizes.waiting, events=PLAN_EVENTS))
                worked.append((worked_ms(daemon.process) - before) / sizes.waiting)
                verdicts = [decision["verdict"] for decision in events_of_decisions(server)[-sizes.waiting :]]
                assert set(verdicts) == {"EXECUTE"}, "not every plan was permitted"
            server.ask("FLUSHALL")
            with floor(server, record, home, pipelined=True) as process, Client(server, floors.KEYS) as client:
                client.block(WARM, pause_s=0)
                before = worked_ms(process)
                bare.append(_flood(server, floors.KEYS, process, client, waiting=sizes.waiting, events=record.events))
                bare_worked.append((worked_ms(process) - before) / sizes.waiting)
    return Figure(
        name="decisions a second",
        how=f"{sizes.waiting:,} plans of {len(SYMBOLS)} symbols wait when it goes on reading; floor: a consumer that "
        f"reads {floors.PAGE} at a time and pipelines one script with the same writes a plan",
        lines=(rated("plans", ours, bare, 0.5, unit="/s"), _worked(worked, bare_worked)),
        blocks=sizes.floods,
        samples=sizes.floods * sizes.waiting,
    )


def _flood(
    server: RedisServer,
    keys: Keys,
    process: subprocess.Popen[bytes] | None,
    client: Client,
    *,
    waiting: int,
    events: int,
) -> float:
    """Plans a second, from the moment it may read until every plan has its events."""
    with server.client(decode_responses=False) as connection:
        connection.config_set("notify-keyspace-events", "")
        before = int(connection.xlen(keys.events))
        with stopped(process):
            for first in range(0, waiting, 1000):
                pipe = connection.pipeline(transaction=False)
                for number in range(first, min(first + 1000, waiting)):
                    pipe.xadd(keys.plans, cast("Any", client.fields(SYMBOLS[number % len(SYMBOLS)])))
                pipe.execute()
            begun = time.perf_counter()
        until = begun + LONGEST_S
        while int(connection.xlen(keys.events)) < before + waiting * events:
            assert time.perf_counter() < until, f"{waiting} plans were not decided within {LONGEST_S:g} s"
            time.sleep(0.002)
        return waiting / (time.perf_counter() - begun)


def breach(server: RedisServer, sizes: Sizes) -> Figure:
    """From the plan that breaches until the last outstanding permit is gone."""
    took: Samples = []
    environ = {"GOV_MAX_REDUCE_QTY_PER_DAY": "off", "GOV_FALLBACK_QTY": "0.001"}
    server.ask("FLUSHALL")
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        daemon = stack.enter_context(gate(server, home, environ))
        grants = stack.enter_context(Client(server, KEYS))
        ends = stack.enter_context(Client(server, KEYS, on="del"))
        armed, settings = daemon.config.read_bytes(), load(daemon.environ)
        for number in range(sizes.breaches):
            symbols = [f"B{number}X{other}USDT" for other in range(OUTSTANDING - 1)]
            for symbol in (symbols[0], *symbols):
                grants.publish(grants.fields(symbol))
            alive = {grants.heard() for _ in range(OUTSTANDING)}
            fields = grants.fields(symbols[0])
            begun = time.perf_counter()
            grants.publish(fields)
            while alive:
                alive.discard(ends.heard())
            took.append((time.perf_counter() - begun) * 1000)
            wait_for(lambda: _disarms(server) == number + 1, within_s=30, what="the proof of the disarm")  # noqa: B023
            told = asyncio.run(rearm(settings, reason="benchmark", operator="benchmark", force=False))
            assert told["state"] == "ARMED", told
            daemon.config.write_bytes(armed)
    return Figure(
        name="breach to permits gone",
        how=f"from before the plan that breaches is sent until the last of {OUTSTANDING} permits is gone",
        lines=(
            Line(what="p50", value=at(took, 50), unit="ms"),
            Line(what="p99", value=at(took, 99), unit="ms", must="≤ 10 ms", reached=at(took, 99) <= 10),
        ),
        blocks=1,
        samples=len(took),
    )


def _disarms(server: RedisServer) -> int:
    with server.client() as connection:
        return len(events_of(connection, "AUTO_DISARM"))
