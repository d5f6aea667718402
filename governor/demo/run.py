"""Directing the demo: the daemon as its own process, the story, the view, and a summary at the end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import redis.asyncio
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from events import store
from events.keys import Keys
from events.types import Decision, Execution, Recorded
from governor.connection import now
from governor.decider import DRY_RUN
from governor.demo.stage import Stage, stop
from governor.demo.story import REARM_AFTER_S, scenes
from governor.envfile import effective
from governor.ledger import Ledger
from governor.policy import Policy
from governor.sim.apply_layer import PROPOSALS
from governor.sim.exchange import PriceTape
from governor.status import describe, policy_of
from governor.view import Around, View, event_text, worth_seeing
from projections.state import DISARMED, State

RUNS_KEPT = 5
FRAME_S = 0.25
LOCK = "lock"
"""Held for as long as a run takes."""


def main(*, directory: str, port: int, seconds: float | None, speed: float, svg: str | None, as_json: bool) -> int:
    """Run the demo; returns the exit code."""
    home = _home(Path(directory))
    with (home / LOCK).open("wb") as lock, contextlib.suppress(KeyboardInterrupt):
        fcntl.flock(lock, fcntl.LOCK_EX)
        asyncio.run(_Demo(home, port=port, seconds=seconds, speed=speed, svg=svg, as_json=as_json).run())
    return 0


def _home(directory: Path) -> Path:
    """A new directory for this run; of those that are over, only the last few are kept."""
    for path in sorted(directory.glob("demo-*"))[: -(RUNS_KEPT - 1)]:
        with contextlib.suppress(OSError), (path / LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    home = (directory / f"{time.strftime('demo-%Y%m%dT%H%M%S')}-{os.getpid()}").absolute()
    home.mkdir(parents=True)
    return home


class _Demo:
    def __init__(
        self, home: Path, *, port: int, seconds: float | None, speed: float, svg: str | None, as_json: bool
    ) -> None:
        self.home, self.port, self.seconds, self.svg, self.as_json = home, port, seconds, svg, as_json
        self.speed = speed
        self.reasons: dict[str, int] = {}
        self.executions = 0
        self.view = View()
        self.console = Console(stderr=True)
        self.live = seconds is None and self.console.is_terminal
        """Whether the view is drawn; otherwise what happens is told line by line, unless a program asked."""
        self.tells = ""
        self.place = ""
        self.seen: dict[str, int] = {}
        self.started = time.monotonic()

    async def run(self) -> None:
        async with Stage(self.home, port=self.port, speed=self.speed).open() as stage:
            self.stage = stage
            self.beside = f"in another terminal: . {_short(stage.exports)}"
            client = store.client(host="127.0.0.1", port=stage.port, socket_timeout=5)
            keys = Keys()
            self.ledger = Ledger(
                store.RedisStore(client, stream=keys.events, halt=keys.halt), keys, now, observe=self._observe
            )
            print(f"demo: Valkey on 127.0.0.1:{stage.port}, data and logs in {self.home}", file=sys.stderr)  # noqa: T201
            daemon = await self._start("run", log="governor.log")
            # The demo also goes without: its packages are of another extra.
            dashboard = await self._start("dashboard", log="dashboard.log") if find_spec("starlette") else None
            if dashboard is not None:
                self.place = f"dashboard http://127.0.0.1:{stage.dashboard_port}"
                print(f"demo: {self.place} (token to disarm: {stage.token.read_text()})", file=sys.stderr)  # noqa: T201
            print(f"demo: {self.beside}, then governor status, …", file=sys.stderr)  # noqa: T201
            print("demo: permits live 12 s here, so that one can be seen to expire", file=sys.stderr)  # noqa: T201
            try:
                await self._play(client, daemon)
            finally:
                code = await stop(daemon)
                if dashboard is not None:
                    await stop(dashboard)
                with contextlib.suppress(store.StoreError):
                    await self.ledger.catch_up()
                await client.aclose()
            self._sum_up(code)

    async def _start(self, command: str, *, log: str) -> asyncio.subprocess.Process:
        with (self.home / log).open("ab") as kept:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-m", "governor", command,
                env=self.stage.environ(), stdout=kept, stderr=kept, start_new_session=True,
            )  # fmt: skip

    async def _play(self, client: redis.asyncio.Redis, daemon: asyncio.subprocess.Process) -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        self.started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._tell_story(client)),
                group.create_task(self._move_prices()),
                group.create_task(self._be_a_person()),
                group.create_task(self._show()),
            ]
            ended = group.create_task(daemon.wait())
            stopping = group.create_task(stopped.wait())
            await asyncio.wait({ended, stopping}, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            for task in (*tasks, ended, stopping):
                task.cancel()
        if daemon.returncode is not None:
            print(f"demo: the daemon ended by itself, see {self.home / 'governor.log'}", file=sys.stderr)  # noqa: T201

    async def _tell_story(self, client: redis.asyncio.Redis) -> None:
        while not self.ledger.state.seq:  # until the daemon has begun
            await asyncio.sleep(0.05)
        self.started = time.monotonic()
        for scene in scenes():
            await asyncio.sleep(max(0.0, self.started + scene.at / self.speed - time.monotonic()))
            self._tell(scene.tells)
            await client.rpush(PROPOSALS, json.dumps(scene.proposals))

    def _tell(self, tells: str) -> None:
        if self._apply_mode() == DRY_RUN and self.ledger.state.mode.state != DISARMED:
            tells = "armed, but the Apply Layer is still in dry run: nothing trades, and a burst only throttles"
        self.tells = tells
        if not (self.live or self.as_json):
            self.console.print(f"\n{tells}", style="dim", highlight=False, soft_wrap=True)

    def _apply_mode(self) -> str | None:
        return effective(self.stage.config.read_bytes(), "APPLY_MODE")

    async def _be_a_person(self) -> None:
        while True:
            disarm = self.ledger.state.mode.disarm
            if disarm is not None and disarm.done:
                await asyncio.sleep(REARM_AFTER_S / self.speed)
                await self._rearm()
            await asyncio.sleep(FRAME_S)

    async def _rearm(self) -> None:
        """What a person does after looking at it: arm again and put the Apply Layer back."""
        self._tell("a person looked at it, arms again and puts the Apply Layer back")
        environ = self.stage.environ() | {"SUDO_USER": "demo-operator"}
        # Where it was in dry run before, nobody but the person knows what it is to be put back to.
        for how in (["--restore"], ["--apply-mode", "testnet"]):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "governor", "rearm", "--reason", "demo: looked at it", *how,
                env=environ, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            if await process.wait() == 0:
                return

    async def _move_prices(self) -> None:
        tape = PriceTape.load()
        while True:
            for symbol in tape.symbols:
                self.stage.exchange.set_price(symbol, tape.price(symbol, time.monotonic() - self.started))
            await asyncio.sleep(0.2)

    async def _show(self) -> None:
        live = Live(console=self.console, refresh_per_second=8, screen=True)
        with live if self.live else contextlib.nullcontext():
            while True:
                with contextlib.suppress(store.UnavailableError):
                    await self.ledger.catch_up()
                if self.live:
                    live.update(self._picture(self.console.width, self.console.height))
                await asyncio.sleep(FRAME_S)

    def _observe(self, recorded: Recorded, _state: State) -> None:
        name = recorded.event.NAME
        self.seen[name] = self.seen.get(name, 0) + 1
        self.view.note(recorded)
        if not (self.live or self.as_json) and worth_seeing(recorded.event):
            self.console.print(event_text(recorded), soft_wrap=True)
        if name == "AUTO_DISARM" and self.svg:
            # A picture of the moment that matters, right after the disarm was proven.
            asyncio.get_running_loop().call_later(0.5 / self.speed, self._keep_picture)
        event = recorded.event
        if isinstance(event, Decision) and event.reason is not None:
            self.reasons[event.reason] = self.reasons.get(event.reason, 0) + 1
        if isinstance(event, Execution) and event.executed and event.executed_qty is not None:
            self.executions += 1
            self.stage.exchange.reduce(event.symbol, event.executed_qty)

    def _picture(self, width: int, height: int) -> Any:
        state, at = self.ledger.state, now()
        mode = self._apply_mode()
        around = Around(now=at, place=self.place, heard_at=at, apply_mode=mode or "unknown", tells=self.tells)
        told = describe(state, policy_of(state, Policy()), at) if state.seq else None
        beside = Text(self.beside, style="dim", no_wrap=True, overflow="ellipsis")
        return Group(*self.view.lines(told, around, width=width, height=height - 1), beside)

    def _keep_picture(self) -> None:
        if self.svg is None:
            return
        with Path(os.devnull).open("w") as nowhere:
            console = Console(record=True, width=110, file=nowhere, force_terminal=True, color_system="truecolor")
            console.print(self._picture(console.width, 28))
            console.save_svg(self.svg, title="governor demo")
        self.svg = None

    def _sum_up(self, code: int | None) -> None:
        counts = self.ledger.state.counts
        told = {
            "seconds": round(time.monotonic() - self.started, 1),
            "state": self.ledger.state.mode.state,
            "epoch": self.ledger.state.mode.epoch,
            "plans": counts.plans,
            "allowed": counts.allowed,
            "blocked": counts.blocked,
            "skipped": counts.skipped,
            "rejected": counts.rejected,
            "consumed": counts.consumed,
            "expired": counts.expired,
            "revoked": counts.revoked,
            "executions": self.executions,
            "disarms": counts.disarms,
            "proven_disarms": self.seen.get("AUTO_DISARM", 0) + self.seen.get("MANUAL_DISARM", 0),
            "rearmed": self.seen.get("REARMED", 0),
            "restarts": self.stage.restarts,
            "apply_mode": self._apply_mode(),
            "reasons": self.reasons,
            "daemon_exit": code,
            "events": self.ledger.state.seq,
            "data": str(self.home),
        }
        if self.as_json:
            print(json.dumps(told, default=_plain))  # noqa: T201
            return
        for name, value in told.items():
            print(f"{name:>16}  {value}")  # noqa: T201


def _short(path: Path) -> str:
    """As seen from here, where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else str(value)
