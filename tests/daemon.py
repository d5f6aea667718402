"""The real daemon as a real process, against a real server and the exchange simulator."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

import msgspec
import redis

from events.types import Entry
from governor.sim.apply_layer import PLAN_STREAM, plan_fields

T = TypeVar("T")
SYSTEMCTL = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
  restart) echo $(( $(cat {count} 2>/dev/null || echo 0) + 1 )) > {count}; exit $(cat {fails} 2>/dev/null || echo 0) ;;
  show) printf 'ActiveState=active\\nInvocationID=%032x\\nMainPID=0\\n' "$(cat {count} 2>/dev/null || echo 0)" ;;
esac
"""


def wait_for(look: Callable[[], T], *, within_s: float = 10.0, what: str = "it") -> T:
    """Look until something true is seen; polling is what following another process comes to."""
    until = time.monotonic() + within_s
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < until, f"{what} did not happen within {within_s} s"
        time.sleep(0.01)


async def until(look: Callable[[], object], *, within_s: float = 20.0) -> None:
    """The same from within an event loop, which goes on meanwhile."""
    async with asyncio.timeout(within_s):
        while not look():
            await asyncio.sleep(0.001)


class Daemon:
    """A governor in a directory of its own, with a stand-in systemctl that keeps a log."""

    def __init__(self, home: Path, *, port: int, base_url: str | None = None, environ: Mapping[str, str]) -> None:
        self.home = home
        self.config = home / "etc" / "apply-layer.env"
        self.config.parent.mkdir(parents=True, exist_ok=True)
        self.config.write_text("# how the Apply Layer runs\nAPPLY_MODE=testnet\nOTHER=1\n")
        (home / "bin").mkdir(exist_ok=True)
        stand_in = home / "bin" / "systemctl"
        stand_in.write_text(SYSTEMCTL.format(log=home / "log", count=home / "count", fails=home / "fails"))
        stand_in.chmod(0o755)
        self.environ = {
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
            "HOME": str(home),
            "USER": "tester",
            "LOGNAME": "tester",
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(port),
            "METRICS_PORT": "0",
            "APPLY_CONFIG_PATH": str(self.config),
            "GOV_LOG_FORMAT": "json",
            **({} if base_url is None else {"BINANCE_BASE_URL": base_url}),
            **environ,
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.home / "governor.log").read_text()

    @property
    def systemctl_calls(self) -> list[str]:
        path = self.home / "log"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, *, ready: bool = True) -> None:
        with (self.home / "governor.log").open("ab") as log:
            at = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "governor", "run"], env=self.environ, stdout=log, stderr=log
            )
        if ready:
            wait_for(lambda: '"ready"' in self.log[at:] or self._died(), what="ready")

    def _died(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        return False

    def stop(self) -> tuple[int, float]:
        """SIGTERM; exit code and seconds it took."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(10)
        return code, time.monotonic() - began

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def command(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "governor", *words],
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def json(self, *words: str) -> Any:
        done = self.command(*words, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def http(self, path: str) -> str:
        ports = re.findall(r'"metrics_port": (\d+)', self.log)
        with urlopen(f"http://127.0.0.1:{ports[-1]}{path}", timeout=5) as answer:
            body: bytes = answer.read()
        return body.decode()

    def readiness(self) -> dict[str, Any]:
        """What /readyz says, ready or not."""
        try:
            told: dict[str, Any] = json.loads(self.http("/readyz"))
        except HTTPError as error:
            told = json.loads(error.read())
        return told


@contextmanager
def daemon(
    home: Path,
    *,
    port: int,
    base_url: str | None = None,
    ready: bool = True,
    environ: Mapping[str, str] = MappingProxyType({}),
    **more: str,
) -> Iterator[Daemon]:
    """A running daemon, killed at the end if it is still there."""
    one = Daemon(home, port=port, base_url=base_url, environ={**environ, **more})
    try:
        one.start(ready=ready)
        yield one
    finally:
        one.kill()


def publish(client: redis.Redis, plan_id: str, symbol: str, action: str = "PARTIAL_25", **more: Any) -> str:
    """Publish a plan exactly as the Apply Layer does; returns the entry id."""
    fields = plan_fields({"plan_id": plan_id, "symbol": symbol, "action": action, **more}, now=time.time())
    entry_id: Any = client.xadd(PLAN_STREAM, fields, maxlen=10_000, approximate=True)  # type: ignore[arg-type]
    return str(entry_id)


def fields_of(entry: Entry) -> dict[str, Any]:
    """What every entry of the event stream has for fields, in a commit's order."""
    told = msgspec.structs.asdict(entry)
    return {"event": told.pop("name"), **told}


def events_of(client: redis.Redis, *names: str) -> list[dict[str, Any]]:
    """Data of the events in the stream, of these names."""
    entries: Any = client.xrange("quantum:stream:governor.events")
    return [
        json.loads(fields["data"]) | {"event": fields["event"], "seq": int(fields["seq"])}
        for _, fields in entries
        if not names or fields["event"] in names
    ]
