"""A governor at work for a browser to look at: a day of history, plans that keep coming, and dashboards."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Self

import redis
from msgspec.structs import asdict

from governor import decider
from governor.gate import PermitDenied, PermitGate
from governor.sim.apply_layer import RESULT_STREAM, result_fields
from tests.benchmarks.history import SECOND, History
from tests.daemon import Daemon, publish
from tests.dashboard import Dashboard, free_port, token_file
from tests.servers import RedisServer
from tests.test_end_to_end import CREDENTIALS, Exchange

PAST = (
    "BTCUSDT", "ETHUSDT", "LTCUSDT", "ADAUSDT", "BNBUSDT", "AVAXUSDT", "LINKUSDT", "DOTUSDT", "ATOMUSDT", "NEARUSDT",
    "TRXUSDT", "UNIUSDT",
)  # fmt: skip
BUSY = ("XRPUSDT", "DOGEUSDT")
BURSTS, HOURLY = "SOLUSDT", "FILUSDT"
LIMITS = f"""
[{BURSTS}]
GOV_MAX_EXEC_PER_5MIN = 2
[{HOURLY}]
GOV_MAX_EXEC_PER_HOUR = 1
[XRPUSDT]
GOV_MAX_EXEC_PER_HOUR = 2000
GOV_MAX_EXEC_PER_5MIN = 1000
[DOGEUSDT]
GOV_MAX_EXEC_PER_HOUR = 2000
GOV_MAX_EXEC_PER_5MIN = 1000
"""
HOUR_US = 3600 * SECOND
EVENTS = "quantum:stream:governor.events"


def yesterday(client: redis.Redis, *, seed: int = 4) -> None:
    """Write a day's events up to now, as a governor would have; eight hours ago somebody disarmed it for a while."""
    now = time.time_ns() // 1000
    start = now - 23 * HOUR_US
    history = History(seed, start_us=start, symbols=PAST, slowest_ms=25)
    drill = None
    while history.now < now:
        history.gap_us = (105 + 60 * math.sin((history.now - start) / (3.1 * HOUR_US))) * SECOND
        history.plan()
        if drill is None and history.now > now - 8 * HOUR_US and history.state.mode.state == "ARMED":
            drill = decider.disarm_by_hand(history.state, reason="drill", operator="anna", apply_mode="testnet")
            history._write(drill)
    pipe = client.pipeline(transaction=False)
    for entry in history.entries:
        # Nothing in the last minutes: whatever throttled it then is over now.
        if float(entry.timestamp) > now / SECOND - 320:
            break
        fields: dict[Any, Any] = asdict(entry)
        pipe.xadd(EVENTS, {"event": fields.pop("name"), **fields}, id=f"{entry.seq}-0")
    pipe.execute()


class Load:
    """Plans all the time, from a thread; most permits are consumed, some forgotten."""

    def __init__(self, server: RedisServer, *, every_s: float = 0.2) -> None:
        self._server, self._every_s = server, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        chance, number = Random(5), 0  # noqa: S311 - a load, made again by its seed
        with self._server.client() as client:
            gate = PermitGate(client)
            while not self._stop.wait(self._every_s):
                number += 1
                with contextlib.suppress(redis.RedisError, PermitDenied):
                    self._one(client, gate, chance, f"{chance.choice(PAST)[:3].lower()}-{7000 + number}", number)

    def _one(self, client: redis.Redis, gate: PermitGate, chance: Random, plan_id: str, number: int) -> None:
        match number % 8:
            case 0 | 4:
                symbol = chance.choice(BUSY)
                publish(client, plan_id, symbol, "PARTIAL_25")
                if number % 16:
                    self._execute(client, gate, plan_id, symbol)
            case 1:
                publish(client, plan_id, chance.choice(PAST), "UPDATE_SL", kill_score=0.93)
            case 2:
                publish(client, plan_id, "SHIBUSDT", "PARTIAL_50")
            case _:
                publish(client, plan_id, chance.choice(PAST), "PARTIAL_50", decision="SKIP")

    def _execute(self, client: redis.Redis, gate: PermitGate, plan_id: str, symbol: str) -> None:
        permit = gate.consume(plan_id, symbol=symbol, wait_s=0.3)
        proposal = {"plan_id": plan_id, "symbol": symbol}
        told = result_fields(proposal, executed=True, qty=str(permit.computed_qty), error="", now=time.time())
        client.xadd(RESULT_STREAM, told)  # type: ignore[arg-type]


class Stage:
    """Everything that runs, and what a test does to it."""

    def __init__(self, server: RedisServer, governor: Daemon, token: str) -> None:
        self.server, self.governor = server, governor
        self._more = {"DASHBOARD_PORT": str(free_port()), "DASHBOARD_TOKEN_FILE": token}
        self.open()

    def open(self) -> None:
        """Start the dashboard, always on the same port."""
        self.dashboard = Dashboard(self.governor.home, self.governor.environ | self._more)
        self.dashboard.ready()

    def close(self) -> None:
        """End the dashboard at once."""
        self.dashboard.close()

    def arm(self) -> None:
        """Back to ARMED."""
        state = self.dashboard.snapshot()["status"]["state"]
        if state == "THROTTLED":
            self.governor.json("disarm", "--reason", "not to wait for the cool-down")
        if state != "ARMED":
            self.dashboard.wait(lambda told: (told["status"]["disarm"] or {}).get("done"))
            done = self.governor.command("rearm", "--reason", "limits checked", "--no-restore")
            assert done.returncode == 0, done.stderr + done.stdout
        self.governor.config.write_text("APPLY_MODE=testnet\n")
        self.dashboard.wait(lambda told: told["status"]["state"] == "ARMED")

    def burst(self) -> None:
        """More executions of one symbol within five minutes than it may have."""
        with self.server.client() as client:
            for number in range(3):
                publish(client, f"burst-{number}-{time.time_ns()}", BURSTS, "PARTIAL_25")

    def disarmed_at(self) -> float:
        """Unix seconds of the last DISARM_STARTED."""
        with self.server.client() as client:
            found: Any = client.xrevrange(EVENTS, count=400)
        return next(float(fields["timestamp"]) for _, fields in found if fields["event"] == "DISARM_STARTED")

    @contextlib.contextmanager
    def frozen(self, pid: int) -> Iterator[None]:
        """A process hangs: its connections stay, and nothing is answered."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def stage(home: Path, server: RedisServer) -> Iterator[Stage]:
    """All of it, started and stopped in order."""
    limits = home / "limits.toml"
    limits.write_text(LIMITS)
    with contextlib.ExitStack() as stack:
        with server.client() as client:
            yesterday(client)
        exchange = stack.enter_context(Exchange())
        for symbol, amount, price in (
            ("XRPUSDT", "420", "0.62"),
            ("DOGEUSDT", "2400", "0.11"),
            (BURSTS, "30", "24.1"),
            (HOURLY, "90", "5.4"),
        ):
            exchange.set(symbol, amount, price)
        exchange.set("SHIBUSDT", "0", "0.00002")
        environ = CREDENTIALS | {
            "METRICS_PORT": str(free_port()),
            "GOV_LIMITS_FILE": str(limits),
            "GOV_PERMIT_TTL_SEC": "25",
            "GOV_MAX_EXEC_PER_HOUR": "6",
            "GOV_MAX_EXEC_PER_5MIN": "3",
            "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "60000",
            "GOV_MAX_REDUCE_QTY_PER_DAY": "off",
            "GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD": "900000",
            "GOV_DISARM_ON_ERROR_COUNT": "20",
        }
        governor = Daemon(home, port=server.port, base_url=exchange.base_url, environ=environ)
        stack.callback(governor.kill)
        governor.start()
        stack.enter_context(Load(server))
        one = Stage(server, governor, token_file(home))
        stack.callback(one.close)
        yield one
