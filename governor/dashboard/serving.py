"""The dashboard's process: settings, a socket, the loop, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from governor.connection import connected, watch
from governor.dashboard.app import application
from governor.dashboard.board import Board, publish
from governor.dashboard.control import Control
from governor.dashboard.feed import Feed
from governor.dashboard.login import Failures, Sessions, read_token
from governor.dashboard.streams import Hub
from governor.dashboard.vitals import Vitals
from governor.logs import Logger, configure
from governor.notify import Notifier
from governor.settings import Settings, SettingsError

log = Logger("governor.dashboard")

VERSION = importlib.metadata.version("quantum-governor")

REDIS_S = 2.0
"""Redis has this long for an answer."""
CONNECTIONS = 250
"""More are refused: those that stream, twice."""
IDLE_FROM = 200
"""From so many on, the oldest one that asks for nothing makes room for a new one."""
STOP_S = 1


class Protocol(H11Protocol):
    """uvicorn's, whose requests can close their connection at once: a client that does not read never ends itself.

    Nor does one that never says what it wants; enough of those would keep everybody else out.
    """

    def connection_made(self, transport: Any) -> None:
        self.app_state = self.app_state | {"abort": transport.abort}
        self.opened = self.loop.time()
        if len(self.connections) >= IDLE_FROM:
            idle = [each for each in self.connections if isinstance(each, Protocol) and each.idle]
            if idle:
                min(idle, key=lambda each: each.opened).transport.abort()
        super().connection_made(transport)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return getattr(self.cycle, "response_complete", True) and not self.transport.is_closing()


class _Server(uvicorn.Server):
    """Signals are ours: the streams have to end first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    configure(log_format=settings.log_format, level=settings.log_level)
    # What they tell at lower levels names addresses and requests; uvicorn warns of each request it cannot read.
    for name, level in (("uvicorn", logging.ERROR), ("asyncio", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    try:
        token = None if settings.dashboard_token_file is None else read_token(settings.dashboard_token_file)
        listening = listen(settings)
    except SettingsError as error:
        log.error("cannot start", error=str(error))
        return 78
    if not settings.dashboard_behind_proxy and not _loopback(settings.dashboard_host):
        log.warning(
            "whoever reaches this address sees everything, unencrypted: keep it on loopback, or behind a proxy with "
            "TLS and DASHBOARD_BEHIND_PROXY",
            host=settings.dashboard_host,
        )
    try:
        asyncio.run(serve(settings, listening, token=token))
    except Exception:
        log.exception("the dashboard failed")
        return 1
    return 0


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(settings: Settings) -> socket.socket:
    """A socket on the settings' address.

    Raises:
        SettingsError: it is taken, or no address of this machine.
    """
    host, port = settings.dashboard_host, settings.dashboard_port
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SettingsError(
            f"DASHBOARD_PORT is {port}, expected a free port on DASHBOARD_HOST {host}: {error.strerror or error}"
        ) from error


async def serve(settings: Settings, listening: socket.socket, *, token: str | None) -> None:
    """The dashboard's life, on a socket that is open already.

    Raises:
        Exception: what goes on in the background failed; a page that stands still would look as if all were quiet.
    """
    notifier = Notifier()
    async with connected(settings, answer_s=REDIS_S) as events, connected(settings, answer_s=REDIS_S) as asking:
        feed, vitals, hub = Feed(settings, events), Vitals(settings, asking), Hub()
        board = Board(settings, feed, vitals, version=VERSION, controls=token is not None)
        sessions = None if token is None else Sessions(token, time.monotonic)
        control = Control(settings, feed, board, sessions, Failures(time.monotonic))
        server = _Server(config(application(settings, asking, board, hub, control)))

        def stop() -> None:
            notifier.send(STOPPING="1")
            hub.close()
            server.should_exit = True

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        work = [feed.run(), vitals.run(), publish(board, feed, hub), watch(events), watch(asking)]
        tasks = [loop.create_task(each) for each in work]
        for task in tasks:
            task.add_done_callback(lambda done: stop() if not done.cancelled() and done.exception() else None)
        host, port = listening.getsockname()[:2]
        log.info("ready", host=host, dashboard_port=port, control=token is not None)
        notifier.send(READY="1", STATUS=f"on {host} port {port}")
        try:
            await server.serve(sockets=[listening])
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        log.info("stopped")
        for error in ended:
            if isinstance(error, Exception):
                raise error


def config(app: Any) -> uvicorn.Config:
    """How uvicorn serves it: no log of requests, no word of proxies believed, everything bounded."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=STOP_S,
        h11_max_incomplete_event_size=16_384,
    )
