"""A soak with real processes: load, kills at random moments, cut connections, an emptied server; then one table.

    python -m tests.soak --minutes 10 [--seed N] [--server valkey|redis7]

Two governors, clients that publish, consume and report, and a server with an append-only file. Governors, server and
clients are killed (SIGKILL) or stopped for a while (SIGSTOP), connections are cut, the server is emptied, people
disarm and arm again. Each client writes down what it executed before it reports it. At the end everything is let
come to rest, and the promises are held against what the clients executed and what the stream says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import redis

from governor.gate import PermitDenied, PermitGate
from governor.sim.apply_layer import PLAN_STREAM, RESULT_STREAM, plan_fields, result_fields
from tests.daemon import Daemon
from tests.servers import Kind, RedisServer

STREAM = "quantum:stream:governor.events"
CLIENTS, GOVERNORS = 3, 2
PER_5MIN = 3
ENVIRON = {
    "GOV_MAX_EXEC_PER_HOUR": "off",
    "GOV_MAX_EXEC_PER_5MIN": str(PER_5MIN),
    "GOV_MAX_REDUCE_QTY_PER_DAY": "off",
    "GOV_FALLBACK_QTY": "0.001",
    "GOV_PERMIT_TTL_SEC": "2",
    "GOV_DISARM_ON_BURST_BREACH": "false",
    "GOV_DISARM_ON_ERROR_COUNT": "off",
    "GOV_CHECKPOINT_EVENTS": "500",
    "GOV_LEASE_SEC": "1",
}
LATE_S = 1.0
"""A plan that waits longer than this for its verdict was without service."""
REST_S = 30.0
REARMS = 50


def client(number: int, port: int, book: Path, seed: int) -> None:
    """Publish plans, consume their permits, write down what was executed, report it. For ever."""
    chance = random.Random(seed)  # noqa: S311
    connection = redis.Redis(port=port, decode_responses=True, socket_timeout=2)
    gate = PermitGate(connection)
    count = 0
    with book.open("a") as executed:
        while True:
            count += 1
            plan_id = f"c{number}-{os.getpid()}-{count}"
            proposal = {"plan_id": plan_id, "symbol": f"S{chance.randrange(400)}USDT", "action": "PARTIAL_50"}
            try:
                for _ in range(2 if chance.random() < 0.05 else 1):  # some are written twice
                    connection.xadd(PLAN_STREAM, cast("Any", plan_fields(proposal, now=time.time())))
                if chance.random() < 0.1:
                    continue  # never fetched: it runs out
                permit = gate.consume(plan_id, symbol=proposal["symbol"], wait_s=1.2)
            except (PermitDenied, redis.RedisError):
                time.sleep(0.01)
                continue
            executed.write(f"{plan_id}\n")
            executed.flush()
            fields = result_fields(proposal, executed=True, qty=str(permit.computed_qty), error="", now=time.time())
            for _ in range(50):
                try:
                    connection.xadd(RESULT_STREAM, cast("Any", fields))
                    break
                except redis.RedisError:
                    time.sleep(0.1)


class Soak:
    """One run."""

    def __init__(self, kind: Kind, seed: int, home: Path) -> None:
        self.chance = random.Random(seed)  # noqa: S311
        self.home = home
        self.server = RedisServer(kind, appendonly=True)
        self.done: Counter[str] = Counter()
        self.conflicts = 0
        """Of governors that are gone, and at the end of all."""
        self.clients: dict[int, subprocess.Popen[bytes]] = {}
        self.governors: list[Daemon] = []
        self.seed = seed

    def run(self, minutes: float) -> dict[str, Any]:
        until = time.monotonic() + 60 * minutes
        with self.server:
            try:
                self._begin()
                while time.monotonic() < until:
                    time.sleep(self.chance.uniform(0.2, 1.5))
                    self._disturb()
                return self._rest()
            finally:
                self._end()

    def _begin(self) -> None:
        for number in range(GOVERNORS):
            home = self.home / f"governor{number}"
            home.mkdir(parents=True)
            self.governors.append(Daemon(home, port=self.server.port, environ=ENVIRON))
            self.governors[-1].start()
        for number in range(CLIENTS):
            self._start_client(number)

    def _start_client(self, number: int) -> None:
        words = ["client", str(number), str(self.server.port), str(self.home / f"executed{number}")]
        self.clients[number] = subprocess.Popen(
            [sys.executable, "-m", "tests.soak", *words, str(self.chance.getrandbits(32))]
        )

    def _disturb(self) -> None:
        what: list[tuple[Callable[[], None], float]] = [
            (self._kill_governor, 4),
            (self._freeze_governor, 3),
            (self._kill_server, 2),
            (self._freeze_server, 2),
            (self._kill_client, 3),
            (self._cut, 4),
            (self._empty, 0.5),
            (self._disarm, 1),
        ]
        action = self.chance.choices([each for each, _ in what], [weight for _, weight in what])[0]
        self.done[action.__name__.strip("_").replace("_", " ")] += 1
        action()

    def _kill_governor(self) -> None:
        one = self.chance.choice(self.governors)
        self.conflicts += _conflicts(one)
        one.kill()
        one.start(ready=False)

    def _freeze_governor(self) -> None:
        process = self.chance.choice(self.governors).process
        self._freeze(process.pid if process is not None else 0, self.chance.uniform(0.1, 2.5))

    def _kill_server(self) -> None:
        self.server.kill()
        time.sleep(self.chance.uniform(0, 0.5))
        self.server.start()

    def _freeze_server(self) -> None:
        self._freeze(self.server.pid, self.chance.uniform(0.1, 1.5))

    def _freeze(self, pid: int, seconds: float) -> None:
        try:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)

    def _kill_client(self) -> None:
        number = self.chance.choice(list(self.clients))
        self.clients[number].kill()
        self.clients[number].wait()
        self._start_client(number)

    def _cut(self) -> None:
        with self.server.client() as connection:
            for each in connection.client_list():
                if self.chance.random() < 0.5:
                    connection.client_kill_filter(_id=each["id"], skipme=True)

    def _empty(self) -> None:
        with self.server.client() as connection:
            connection.flushall()

    def _disarm(self) -> None:
        self.governors[0].command("disarm", "--reason", "soak")
        self.governors[0].config.write_text("APPLY_MODE=testnet\n")
        for _ in range(REARMS):  # an emptied server cannot be armed before its history is back
            if self.governors[0].command("rearm", "--reason", "soak", "--force").returncode == 0:
                return
            time.sleep(0.2)

    def _end(self) -> None:
        for process in self.clients.values():
            process.kill()
            process.wait()
        for one in self.governors:
            one.kill()

    # -- the verdict ---------------------------------------------------------------------------------------------

    def _rest(self) -> dict[str, Any]:
        for process in self.clients.values():
            process.kill()
            process.wait()
        for one in self.governors:
            if one.process is not None and one.process.poll() is not None:
                self.done["governor ended by itself"] += 1
        with self.server.client() as connection:
            until = time.monotonic() + REST_S
            while time.monotonic() < until and not self._at_rest(connection):
                time.sleep(0.2)
            events = [
                json.loads(fields["data"]) | {"event": fields["event"], "at": float(fields["timestamp"])}
                for _, fields in cast("Any", connection.xrange(STREAM))
            ]
            self.conflicts += sum(map(_conflicts, self.governors))
            waiting = cast("Any", connection.xpending(PLAN_STREAM, "governor"))["pending"]
        audit = self.governors[0].json("replay")
        return self._table(events, audit, waiting)

    def _at_rest(self, connection: redis.Redis) -> bool:
        try:
            pending = cast("Any", connection.xpending(PLAN_STREAM, "governor"))["pending"]
            (group,) = cast("Any", connection.xinfo_groups(PLAN_STREAM))
            return not pending and not group["lag"] and not connection.keys("quantum:permit:*")
        except (redis.RedisError, ValueError):
            return False

    def _table(self, events: list[dict[str, Any]], audit: dict[str, Any], waiting: int) -> dict[str, Any]:
        executed = [line for path in self.home.glob("executed*") for line in path.read_text().split()]
        decisions = [event for event in events if event["event"] == "DECISION"]
        granted = Counter(event["plan_id"] for event in decisions if event["verdict"] == "EXECUTE")
        names = Counter(event["event"] for event in events)
        verdicts = Counter(event["verdict"] for event in decisions)
        broken = {
            "a plan executed twice": _more_than_once(executed),
            "a plan permitted twice": _more_than_once(granted.elements()),
            "executed without a permit": sum(plan_id not in granted for plan_id in executed),
            "past a limit": _past_the_limit(events),
            "accused of an execution it was permitted": names["UNPERMITTED_EXECUTION"],
            "plans are not allowed + blocked + skipped": abs(names["PLAN_RECEIVED"] - sum(verdicts.values())),
            "the audit finds a difference": len(audit["differences"]) + (audit["chain"] != "ok"),
            "left undecided": waiting,
        }
        late = _without_service(events)
        return {
            "server": self.server.kind,
            "seed": self.seed,
            "plans": names["PLAN_RECEIVED"],
            "decisions": dict(verdicts),
            "permits": len(granted),
            "executed by clients": len(executed),
            "conflicts": self.conflicts,
            "disturbances": dict(self.done),
            "history restored": names["HISTORY_RESTORED"],
            "disarms": names["DISARM_STARTED"],
            "seconds without service": round(sum(late), 1),
            "longest": round(max(late, default=0.0), 1),
            "promises broken": sum(broken.values()),
            "which": {name: count for name, count in broken.items() if count},
        }


def _conflicts(one: Daemon) -> int:
    """Commits of a governor that another one was ahead of, since it was started; 0 where it cannot be asked."""
    try:
        told = re.search(r"^quantum_govern_commit_conflicts_total (\S+)", one.http("/metrics"), re.MULTILINE)
    except (OSError, IndexError):
        return 0
    return int(float(told[1])) if told else 0


def _more_than_once(plan_ids: Iterable[str]) -> int:
    return sum(count > 1 for count in Counter(plan_ids).values())


def _past_the_limit(events: list[dict[str, Any]]) -> int:
    """Grants that had no place in their five minutes, counted as plainly as can be."""
    held: dict[str, list[tuple[float, str]]] = {}
    past, latest = 0, 0.0
    for event in events:
        latest = max(latest, event["at"])
        if event["event"] == "DECISION" and event["verdict"] == "EXECUTE":
            mine = held.setdefault(event["symbol"], [])
            past += sum(at > latest - 300 for at, _ in mine) >= PER_5MIN
            mine.append((latest, event["plan_id"]))
        elif event["event"] == "PERMIT_EXPIRED":
            held[event["symbol"]] = [each for each in held[event["symbol"]] if each[1] != event["plan_id"]]
        elif event["event"] == "EXECUTION" and event["counted"]:
            held[event["symbol"]].append((latest, event["plan_id"]))
    return past


def _without_service(events: list[dict[str, Any]]) -> list[float]:
    """Spans in which some plan had waited longer than `LATE_S` for its verdict."""
    spans: list[list[float]] = []
    waits = sorted(
        (int(event["entry_id"].partition("-")[0]) / 1000 + LATE_S, event["at"])
        for event in events
        if event["event"] == "DECISION"
    )
    for begin, end in waits:
        if end <= begin:
            continue
        if spans and begin <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([begin, end])
    return [end - begin for begin, end in spans]


def main(words: list[str]) -> int:
    if words[:1] == ["client"]:
        client(int(words[1]), int(words[2]), Path(words[3]), int(words[4]))
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--seed", type=int, default=None, help="of what is disturbed, and when")
    options.add_argument("--server", choices=["valkey", "redis7"], default="valkey")
    given = options.parse_args(words)
    seed = given.seed if given.seed is not None else random.SystemRandom().getrandbits(32)
    with tempfile.TemporaryDirectory(prefix="governor-soak-") as home:
        told = Soak(given.server, seed, Path(home)).run(given.minutes)
        if told["promises broken"]:
            told["kept in"] = tempfile.mkdtemp(prefix="governor-soak-broken-")
            shutil.copytree(home, told["kept in"], dirs_exist_ok=True)
    for name, value in told.items():
        sys.stdout.write(f"{name:26} {value}\n")
    return 1 if told["promises broken"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
