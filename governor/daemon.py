"""The composition root of `governor run`: everything is put together here and nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from pathlib import Path
from typing import TypeVar

import redis.asyncio
import uvloop

from events.intake import Intake
from events.journal import Journal
from events.keys import Keys
from events.store import UnavailableError
from governor import access, logs
from governor.alerts.watch import Alerts
from governor.binance import Binance
from governor.connection import Door, client, ledger_on, now, place, refuse_plain_prefix, watch
from governor.durability import Server, durability, refusal
from governor.helper import actuator_of, notes_of
from governor.history import Keeper
from governor.http import Answer, HttpServer
from governor.lease import Lease, new_owner
from governor.logs import Logger
from governor.lookout import Lookout
from governor.metrics import Metrics
from governor.notify import Notifier
from governor.service import VERSION, Governor
from governor.settings import Settings, SettingsError

log = Logger("governor")

STOP_S = 1.5
"""How long a stop waits for what is being decided."""
RELEASE_S = 0.3
LONGEST_BAN_US = 3 * 86_400_000_000
"""The exchange bans for three days at most."""
THREAD_SWITCH_S = 0.0005
"""The default of 5 ms lets a scrape hold a permit up that long."""
YOUNG = 10_000
"""New objects until garbage is looked for; the default of 700 is a few plans."""
T = TypeVar("T")


def main(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    logs.configure(log_format=settings.log_format, level=settings.log_level)
    sys.setswitchinterval(THREAD_SWITCH_S)
    try:
        uvloop.run(serve(settings))
    except SettingsError as error:
        log.error("cannot start", error=str(error))
        return 78
    return 0


async def serve(settings: Settings) -> None:
    """The daemon's life.

    Raises:
        SettingsError: a setting that only shows as wrong against what is there: a port taken, a cluster.
    """
    for warning in settings.warnings:
        log.warning("setting ignored", problem=warning)
    loop = asyncio.get_running_loop()
    keys = Keys(settings.key_prefix)
    door = Door()
    commits, reads = client(settings, door=door), client(settings)  # reads block: they have a connection of their own
    leases = client(settings, answer_s=settings.lease_s / 3) if settings.lease_s is not None else None
    lease = (
        Lease(leases, keys.lease, owner=new_owner(), seconds=settings.lease_s) if leases and settings.lease_s else None
    )
    governor: Governor | None = None

    own = settings.own_journal
    keeper = Keeper(
        lambda: Journal.open(
            own,
            key=settings.chain_key,
            fsync=settings.journal_fsync,
        ),
        partial(_look_at_server, commits, door, settings),
        permit_ttl_us=settings.policy.permit_ttl_us,
        clock=now,
        always=settings.journal_fsync == "always",
        active=lambda: lease is not None and lease.held,
    )
    ledger = ledger_on(
        commits,
        settings,
        keeper=keeper,
        observe=lambda recorded, state: governor.observe(recorded, state) if governor is not None else None,
        turned=lambda: governor.beat() if governor is not None else None,
    )
    metrics = Metrics(
        lambda: _in_loop(loop, lambda: governor.snapshot() if governor is not None else None),
        max_symbols=settings.symbol_labels,
        version=VERSION,
    )
    ban = own / "exchange-ban"
    alerts = Alerts(settings, lambda result: metrics.alerts.labels(result).inc(), clock=now)
    exchange = _exchange(settings, metrics, alerts, blocked_until_us=_ban(ban)) if settings.credentials else None
    notifier = Notifier()
    governor = Governor(
        settings,
        ledger=ledger,
        intake=Intake(reads, {keys.plans: "0", keys.results: "$"}),
        exchange=exchange,
        actuator=actuator_of(settings),
        note=notes_of(settings)[0],
        more_notes=notes_of(settings)[1:],
        lookout=Lookout([settings.apply_config_path, *(note.path for note in notes_of(settings))]),
        notifier=notifier,
        clock=now,
        metrics=metrics,
        lease=lease,
        remember_ban=partial(_keep_ban, ban),
        tell=alerts.event,
        alerts_waiting=lambda: alerts.waiting,
    )
    http = _listen(settings, loop, metrics, governor)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info(
        "starting",
        version=VERSION,
        settings=settings.digest,
        redis=place(settings),
        exchange=settings.base_url if exchange is not None else None,
        metrics_port=http.port,
        disarm=governor.actuator.describe(),
    )
    try:
        await _refuse_place(commits, settings)
        accept = partial(_accept_server, commits, settings)
        watches = [alerts.watch(governor), *(watch(each) for each in (commits, reads, leases) if each is not None)]
        watching = [loop.create_task(each) for each in watches]
        running = loop.create_task(governor.run(ready=lambda: _ready(notifier), accept=accept))
        stopping = loop.create_task(stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        notifier.send(STOPPING="1")
        await governor.stop(STOP_S)
        for task in (stopping, *watching):
            task.cancel()
        while not running.done():
            running.cancel()
            governor.cancel()
            await asyncio.wait({running}, timeout=0.2)
        if not running.cancelled() and (error := running.exception()) is not None:
            raise error
        log.info("stopped", seq=ledger.state.seq)
    finally:
        for close in (keeper.close, governor.outside.close, http.close):
            close()
        if exchange is not None:
            await exchange.aclose()
        await _release(lease)
        for connection in (commits, reads, leases):
            if connection is not None:
                await connection.aclose()
        alerts.close()  # last: whoever takes over does not wait for it


async def _release(lease: Lease | None) -> None:
    if lease is None:
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RELEASE_S):
            await lease.release()


def _ban(path: Path) -> int:
    """Until when the exchange told us to stay away, microseconds; a restart is no reason to come back."""
    try:
        return min(int(path.read_text()), now() + LONGEST_BAN_US)
    except (OSError, ValueError):
        return 0


def _keep_ban(path: Path, until_us: int) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(until_us))


def _exchange(settings: Settings, metrics: Metrics, alerts: Alerts, *, blocked_until_us: int) -> Binance:
    def called(endpoint: str, seconds: float, outcome: str) -> None:
        alerts.called(endpoint, outcome)
        metrics.exchange_seconds.labels(endpoint).observe(seconds)
        if outcome != "ok":
            metrics.exchange_error.labels(outcome).inc()

    return Binance(
        base_url=settings.base_url,
        api_key=settings.api_key,
        api_secret=settings.api_secret,
        timeout_s=settings.binance_timeout_s,
        allow_mainnet=settings.allow_mainnet,
        now=now,
        on_call=called,
        blocked_until_us=blocked_until_us,
        awake_s=settings.awake_s if len(os.sched_getaffinity(0)) > 1 else 0.0,  # with one processor, others need it
    )


async def _refuse_place(connection: redis.asyncio.Redis, settings: Settings) -> None:
    """Hold the settings against what they lead to. Not reachable: nothing is refused, `_look_at_server` tells later.

    Raises:
        SettingsError: a cluster, and the keys would be spread over it; a user without the rights the daemon needs.
    """
    try:
        found = await access.missing(connection, Keys(settings.key_prefix))
    except UnavailableError:
        return
    await refuse_plain_prefix(connection, settings)
    for finding in found:
        log.warning("the Redis user lacks a right", right=finding.name, needed_by_daemon=finding.verdict == "bad")
    if (why := access.refusal(settings.redis_username, found)) is not None:
        raise SettingsError(why)


async def _look_at_server(connection: redis.asyncio.Redis, door: Door, settings: Settings) -> Server:
    """Who answers now, and lets us do what we do; from here on no other process does.

    Raises:
        UnavailableError: no server, no answer, or no use: without its rights a commit would be cut off in the middle.
    """
    server = await door.look(connection)
    found = await access.missing(connection, Keys(settings.key_prefix))
    if (why := access.refusal(settings.redis_username, found)) is not None:
        raise UnavailableError(why)
    return server


async def _accept_server(connection: redis.asyncio.Redis, settings: Settings) -> None:
    """Tell whether the server keeps what it is told, and refuse it where it has to and does not.

    Raises:
        SettingsError: GOV_REQUIRE_DURABLE is set, and it does not.
    """
    while True:
        try:
            found = await durability(connection)
            break
        except UnavailableError:
            await asyncio.sleep(1.0)
    default = await access.default_user(connection, settings)
    for finding in default:
        log.warning("not as it should be", what=finding.name, seen=finding.seen, wanted=finding.wanted)
        if finding.verdict == "bad" and settings.require_durable:
            raise SettingsError(
                f"GOV_REQUIRE_DURABLE is true, expected a server that keeps what it is told: its {finding.name} "
                f"{finding.seen}, expected {finding.wanted}"
            )
    for finding in found.findings:
        if finding.verdict != "ok":
            log.warning(
                "the server may lose what it was told", what=finding.name, seen=finding.seen, wanted=finding.wanted
            )
    why = refusal(found, attested=settings.durability_attested)
    if why is not None and settings.require_durable:
        raise SettingsError(f"GOV_REQUIRE_DURABLE is true, expected a server that keeps what it is told: {why}")


def _ready(notifier: Notifier) -> None:
    gc.collect()
    gc.set_threshold(YOUNG)
    gc.freeze()  # what a start leaves behind lives as long as the process: no permit waits for it to be looked at again
    notifier.send(READY="1")
    log.info("ready")


def _listen(settings: Settings, loop: asyncio.AbstractEventLoop, metrics: Metrics, governor: Governor) -> HttpServer:
    def healthy() -> Answer:
        alive = _in_loop(loop, lambda: True) is True
        return alive, {"loop": "alive" if alive else "does not answer"}

    def ready() -> Answer:
        answer = _in_loop(loop, governor.ready)
        return answer if answer is not None else (False, {"ready": False, "problems": ["the loop does not answer"]})

    try:
        return HttpServer(
            settings.metrics_host, settings.metrics_port, registry=metrics.registry, healthy=healthy, ready=ready
        )
    except OSError as error:
        raise SettingsError(
            f"METRICS_PORT is {settings.metrics_port}, expected a free port on {settings.metrics_host}: "
            f"{error.strerror}"
        ) from error


def _in_loop(loop: asyncio.AbstractEventLoop, ask: Callable[[], T], *, within_s: float = 1.0) -> T | None:
    """Ask the event loop from another thread; None when it does not answer."""

    async def answer() -> T:
        return ask()

    coroutine = answer()
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(within_s)
    except FutureTimeoutError:
        return None
    except RuntimeError:  # the loop is closed
        coroutine.close()
        return None
