"""The floor: a consumer that does for a plan what the gate writes for it, and nothing else.

It is a process of its own, as the daemon is: asyncio on uvloop, one script a plan. What the script writes is recorded
from a running daemon, every command its commit script called that changes something, with bodies of the same sizes.
It checks nothing, decides nothing and remembers nothing.

    python -m tests.benchmarks.floor PORT RECORD [--disk FILE] [--pipelined]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import redis
import redis.asyncio
import uvloop

from events.intake import CONSUMER, GROUP, WAIT_MOST
from events.keys import Keys
from events.store import client
from tests.servers import RedisServer

KEYS = Keys("floor00")
"""As long as the gate's own names."""
READS = frozenset({b"XREVRANGE", b"EXISTS", b"TIME", b"TYPE", b"GET"})
"""What the gate's script asks before it writes."""
PAGE = 200
"""Plans of a pipeline."""
_TOLD = re.compile(rb"^\S+ \[\d+ (\S+)\] (.*)$")
_WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(rb"\\(x[0-9a-f]{2}|.)")
_NAMED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}


class Record(msgspec.Struct, frozen=True):
    """What a daemon wrote for one plan, every command in order."""

    plan_id: bytes
    entry_id: bytes
    commands: list[list[bytes]]

    @property
    def body_bytes(self) -> int:
        """Of the events."""
        return sum(len(word) for command in self.commands if command[0] == b"XADD" for word in command[3:])

    @property
    def events(self) -> int:
        return sum(command[0] == b"XADD" for command in self.commands)


def parse(line: bytes) -> tuple[bytes, list[bytes]]:
    """Who sent it (an address, or `lua`) and the words of a command, as MONITOR tells them.

    Raises:
        ValueError: it is no such line.
    """
    found = _TOLD.match(line)
    if found is None:
        raise ValueError(f"{line!r} is no line of MONITOR")
    return found[1], [_ESCAPED.sub(_meant, word) for word in _WORD.findall(found[2])]


def _meant(escaped: re.Match[bytes]) -> bytes:
    what = escaped[1]
    return bytes([int(what[1:], 16)]) if len(what) == 3 else _NAMED.get(what, what)


def link(server: RedisServer, *, timeout_s: float) -> Any:
    """A connection of one's own, to be read from as answers come."""
    connect: Any = redis.Connection
    return connect(host=server.host, port=server.port, protocol=2, socket_timeout=timeout_s)


def recorded(server: RedisServer, keys: Keys, plan_id: str, publish: Callable[[], str]) -> Record:
    """Watch the server while a daemon decides one plan.

    Args:
        server: where it runs.
        keys: names of its keys.
        plan_id: of the plan.
        publish: publishes it; returns its stream entry's id.
    """
    watching = link(server, timeout_s=10)
    try:
        watching.send_command("MONITOR")
        watching.read_response()
        entry_id = publish().encode()
        script: list[list[bytes]] = []
        while True:
            sender, words = parse(_line(watching.read_response()))
            if sender != b"lua":
                script = []
            elif words[0].upper() not in READS:
                script.append([words[0].upper(), *words[1:]])
            done = [b"XACK", keys.plans.encode(), GROUP.encode(), entry_id]
            if script and script[0][0] == b"XADD" and script[-1] == done:
                return Record(plan_id.encode(), entry_id, script)
    finally:
        watching.disconnect()


def _line(raw: Any) -> bytes:
    return raw if isinstance(raw, bytes) else str(raw).encode()


class Script:
    """A record as a script that writes the same for any plan."""

    def __init__(self, record: Record, *, own: Keys, keys: Keys) -> None:
        self._record = record
        self._names: dict[bytes, int] = {}
        self._words: list[bytes] = []
        self._plans: list[int] = []
        """Keys that are named after the plan."""
        self._ids: list[int] = []
        """Arguments that are ids of events."""
        was, now = own.events.partition(":")[0].encode(), keys.events.partition(":")[0].encode()
        lines = [self._call(command, was, now) for command in record.commands]
        self._keys = list(self._names)
        self._plans = [number for number, name in enumerate(self._keys) if record.plan_id in name]
        self._entry = next(number for number, word in enumerate(self._words) if word == record.entry_id)
        self.text = "\n".join(lines)

    def _call(self, command: list[bytes], was: bytes, now: bytes) -> str:
        name, key, *rest = command
        place = self._names.setdefault(key.replace(was, now, 1), len(self._names)) + 1
        if name == b"XADD":
            self._ids.append(len(self._words))
        first = len(self._words) + 1
        self._words += rest
        words = "".join(f", ARGV[{number}]" for number in range(first, first + len(rest)))
        return f"redis.call('{name.decode()}', KEYS[{place}]{words})"

    def arguments(self, plan_id: bytes, entry_id: bytes, seq: int) -> list[Any]:
        """What EVALSHA takes behind the script's name; the events' numbers begin behind `seq`."""
        keys: list[Any] = self._keys.copy()
        words: list[Any] = self._words.copy()
        for number in self._plans:
            keys[number] = keys[number].replace(self._record.plan_id, plan_id)
        for offset, number in enumerate(self._ids, 1):
            words[number] = f"{seq + offset}-0"
        words[self._entry] = entry_id
        return [len(keys), *keys, *words]


async def consume(port: int, record: Record, *, disk: Path | None, pipelined: bool) -> None:
    """Serve for ever."""
    script = Script(record, own=Keys(), keys=KEYS)
    connection = client(host=RedisServer.host, port=port)
    run: Callable[..., Any] = connection.execute_command
    with contextlib.suppress(redis.ResponseError):
        await run("XGROUP CREATE", KEYS.plans, GROUP, "0", "MKSTREAM")
    sha = await run("SCRIPT LOAD", script.text)
    last: Any = await run("XREVRANGE", KEYS.events, "+", "-", "COUNT", 1)
    seq = int(last[0][0].partition(b"-")[0]) if last else 0
    payload = b"x" * record.body_bytes
    file = None if disk is None else os.open(disk, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    count = PAGE if pipelined else WAIT_MOST
    while True:
        reply: Any = await connection.xreadgroup(GROUP, CONSUMER, {KEYS.plans: ">"}, count=count, block=500)
        calls = []
        for _, entries in reply or []:
            for entry_id, fields in entries:
                calls.append(("EVALSHA", sha, *script.arguments(fields[b"plan_id"], entry_id, seq)))
                seq += record.events
        if pipelined and calls:
            together: Any = connection.pipeline(transaction=False)
            for call in calls:
                together.execute_command(*call)
            await together.execute()
            continue
        for call in calls:
            if file is not None:
                os.write(file, payload)
                os.fdatasync(file)
            await run(*call)


@contextlib.contextmanager
def floor(
    server: RedisServer, record: Record, home: Path, *, fsync: bool = False, pipelined: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A running consumer that reads; killed at the end."""
    (home / "record").write_bytes(msgspec.msgpack.encode(record))
    words = [*(["--disk", str(home / "disk")] if fsync else []), *(["--pipelined"] if pipelined else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.floor", str(server.port), str(home / "record"), *words],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the floor did not start"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def main(arguments: Sequence[str]) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("port", type=int)
    options.add_argument("record", type=Path)
    options.add_argument("--disk", type=Path, help="append the events to this file and have it on disk, before each")
    options.add_argument("--pipelined", action="store_true", help="many scripts in one round trip")
    given = options.parse_args(arguments)
    record = msgspec.msgpack.decode(given.record.read_bytes(), type=Record)
    uvloop.run(consume(given.port, record, disk=given.disk, pipelined=given.pipelined))


if __name__ == "__main__":
    main(sys.argv[1:])
