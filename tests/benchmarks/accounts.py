"""What an account costs on a server that many share: an idle governor, and plans in one namespace or in a thousand.

.venv/bin/python tests/benchmarks/accounts.py --accounts 1000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from events.keys import Keys
from events.store import RedisStore, client
from governor import decider
from governor.gates import Situation
from governor.ledger import Ledger, Proposal
from governor.market import Market
from governor.plans import parse_plan
from governor.policy import Limits, Policy
from projections.state import State
from tests.daemon import Daemon
from tests.servers import RedisServer
from tests.spec import market, plan_fields

POLICY = Policy(credentials=True, limits=Limits(per_hour=None, per_5min=None, notional_per_day=None, qty_per_day=None))
MARKET: Market = market()
TICKS_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def idle(server: RedisServer, seconds: float) -> dict[str, Any]:
    """A real daemon with nothing to do."""
    with tempfile.TemporaryDirectory() as home, server.client() as connection:
        one = Daemon(Path(home), port=server.port, environ={})
        one.start()
        assert one.process is not None
        try:
            time.sleep(2)
            begun = time.monotonic(), cpu_s(one.process.pid), cpu_s(server.pid)
            before: Any = connection.info("stats")
            time.sleep(seconds)
            after: Any = connection.info("stats")
            span = time.monotonic() - begun[0]
            return {
                "commands a second": (after["total_commands_processed"] - before["total_commands_processed"]) / span,
                "governor, % of a core": 100 * (cpu_s(one.process.pid) - begun[1]) / span,
                "server, % of a core": 100 * (cpu_s(server.pid) - begun[2]) / span,
                "governor, MiB": resident_mib(one.process.pid),
            }
        finally:
            one.kill()


def decide(number: int, state: State, now: int) -> Proposal:
    fields = plan_fields(plan_id=f"p{number}", symbol=f"S{number % 50}USDT")
    plan = parse_plan(fields, entry_id=f"{now // 1000}-{number}", now=now, needs_close_qty=False)
    decided = decider.decide(state, plan, MARKET, POLICY, Situation(now=now), fields=fields)
    return Proposal(decided.events)


async def plans(server: RedisServer, accounts: int, count: int) -> dict[str, Any]:
    """Plans decided and committed one by one, each in a random one of the accounts, by one client."""
    connection = client(host=server.host, port=server.port, max_connections=accounts + 10)  # one each, for commits
    chance = random.Random(1)  # noqa: S311
    ledgers = []
    with server.client() as look:
        look.flushall()
        empty: Any = look.info("memory")
        for number in range(accounts):
            keys = Keys(f"a{number}")
            store = RedisStore(connection, stream=keys.events, halt=keys.halt)
            ledgers.append(Ledger(store, keys, lambda: time.time_ns() // 1000))
        took = []
        for number in range(count):
            ledger = chance.choice(ledgers)
            begun = time.perf_counter()
            await ledger.propose(lambda state, now, number=number: decide(number, state, now))  # type: ignore[misc]
            took.append(time.perf_counter() - begun)
        full: Any = look.info("memory")
    await connection.aclose()
    return {
        "accounts": accounts,
        "plans": count,
        "plans a second": count / sum(took),
        "p50, us": statistics.median(took) * 1e6,
        "p99, us": statistics.quantiles(took, n=100)[98] * 1e6,
        "server bytes a plan": (full["used_memory"] - empty["used_memory"]) / count,
    }


def main(words: Sequence[str]) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--accounts", type=int, default=1000)
    options.add_argument("--plans", type=int, default=20_000)
    options.add_argument("--seconds", type=float, default=10.0, help="for which an idle governor is watched")
    given = options.parse_args(words)
    with RedisServer() as server:
        found: dict[str, Any] = {"an idle governor": idle(server, given.seconds)}
        for accounts in (1, given.accounts):
            found[f"plans in {accounts}"] = uvloop.run(plans(server, accounts, given.plans))
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
