"""How the daemon, the exchange, Redis and the journal are: asked of the daemon's own routes, and of Redis."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from http import HTTPStatus
from typing import Any

import msgspec
import redis.asyncio
from prometheus_client.parser import text_string_to_metric_families

from governor.connection import now
from governor.durability import durability
from governor.http_client import UnreadableError
from governor.readiness import Routes
from governor.settings import Settings

READY_S = 1.0
METRICS_S = 5.0
REDIS_S = 15.0
ANSWER_S = 2.0
HOUR_S = 3600.0
_PREFIX = "quantum_govern_"
_WANTED = tuple(f"{_PREFIX}{name}" for name in ("exchange_", "journal_up", "quarantined"))


class Vitals:
    """Asked in the background; `health` tells the last answers.

    Args:
        settings: where the daemon listens.
        client: Redis, for its memory and how it keeps data.
    """

    def __init__(self, settings: Settings, client: redis.asyncio.Redis) -> None:
        self._settings = settings
        self._client = client
        self._daemon: dict[str, Any] = {
            "answers": False, "ready": None, "problems": [], "notes": [], "asked_at": None,
            "error": "not asked yet" if settings.metrics_port
            else "METRICS_PORT is 0: where the daemon listens is not known",
        }  # fmt: skip
        self._metrics: dict[str, float] | None = None
        self._exchange_errors = Growth()
        self._calls = Growth()
        self._call_seconds = Growth()
        self._memory: int | None = None
        self._ahead_s: float | None = None
        self._durable: str | None = None

    def health(self, redis_latency_s: float | None, *, credentials: bool) -> dict[str, Any]:
        """The document's part `health`, but for the events.

        Args:
            redis_latency_s: how long Redis took for an answer.
            credentials: whether the daemon asks the exchange.
        """
        return {
            "daemon": self._daemon,
            "exchange": {"configured": credentials} | self._exchange(),
            "redis": {
                "latency_ms": None if redis_latency_s is None else round(redis_latency_s * 1e3, 3),
                "memory_bytes": self._memory,
                "clock_ahead_s": self._ahead_s,
                "durable": self._durable,
            },
            "journal": self._journal(),
        }

    async def run(self) -> None:
        """Ask until cancelled."""
        routes = Routes(self._settings, within_s=ANSWER_S)
        async with contextlib.aclosing(routes), asyncio.TaskGroup() as group:
            if self._settings.metrics_port:
                group.create_task(_repeat(lambda: self._ask_ready(routes), READY_S))
                group.create_task(_repeat(lambda: self._ask_metrics(routes), METRICS_S))
            group.create_task(_repeat(self._ask_redis, REDIS_S))

    async def _ask_ready(self, routes: Routes) -> None:
        told: dict[str, Any] = {"answers": False, "ready": None, "problems": [], "notes": [], "error": None}
        try:
            answer = await routes.get("/readyz")
            ready = msgspec.json.decode(answer.body, type=_Ready)
            told |= {"answers": True, "ready": answer.status == HTTPStatus.OK}
            told |= {"problems": ready.problems, "notes": ready.notes}
        except (msgspec.MsgspecError, OSError, UnreadableError, ValueError) as error:
            told["error"] = f"{routes.base}/readyz: {str(error) or type(error).__name__}"
        self._daemon = told | {"asked_at": time.time()}

    async def _ask_metrics(self, routes: Routes) -> None:
        try:
            found = read_metrics((await routes.get("/metrics")).body.decode())
        except (OSError, UnreadableError, ValueError):
            self._metrics = None
            return
        self._metrics, at = found, time.monotonic()
        self._exchange_errors.note(at, found.get("exchange_error_total", 0.0))
        self._calls.note(at, found.get("exchange_seconds_count", 0.0))
        self._call_seconds.note(at, found.get("exchange_seconds_sum", 0.0))

    async def _ask_redis(self) -> None:
        try:
            self._durable = (await durability(self._client)).verdict
            info = await self._client.info("memory")
            self._memory = int(info["used_memory"])
            self._ahead_s = await self._ahead()
        except Exception:  # noqa: BLE001 - redis-py lets more than its own errors out of broken connections
            self._durable = self._memory = self._ahead_s = None

    async def _ahead(self) -> float:
        """By how much this clock is ahead of Redis': seconds and windows that are shown are off by as much."""
        asked = now()
        told = await self._client.info("server")
        return round(((asked + now()) / 2 - int(told["server_time_usec"])) / 1e6, 3)

    def _exchange(self) -> dict[str, Any]:
        found = self._metrics or {}
        calls = self._calls.over(HOUR_S)
        return {
            "weight_used": found.get("exchange_weight_used"),
            "weight_limit": found.get("exchange_weight_limit") or None,
            "errors_1h": None if self._metrics is None else self._exchange_errors.over(HOUR_S),
            "latency_ms": round(self._call_seconds.over(HOUR_S) / calls * 1e3, 3) if found and calls else None,
        }

    def _journal(self) -> dict[str, Any]:
        found = self._metrics or {}
        if "journal_up" not in found:
            return {"ok": None, "note": "the daemon does not tell"}
        if found.get("quarantined"):
            return {"ok": False, "note": "quarantined: the stream's history contradicts the journal's"}
        if not found["journal_up"]:
            return {"ok": False, "note": "it cannot be written"}
        return {"ok": True, "note": None}


class _Ready(msgspec.Struct):
    problems: list[str] = []
    notes: list[str] = []


class Growth:
    """By how much a counter grew: since a time ago, or since it was first seen. A restart begins it anew."""

    def __init__(self) -> None:
        self._grown = 0.0
        self._last: float | None = None
        self._seen: deque[tuple[float, float]] = deque(maxlen=int(HOUR_S / METRICS_S) + 2)

    def note(self, at: float, value: float) -> None:
        """The counter's value at `at` (seconds of any clock that goes on)."""
        if self._last is not None:
            self._grown += value - self._last if value >= self._last else value
        self._last = value
        self._seen.append((at, self._grown))

    def over(self, seconds: float) -> float:
        """The growth within that time before the last value."""
        if not self._seen:
            return 0.0
        since = self._seen[-1][0] - seconds
        return self._grown - next(grown for at, grown in self._seen if at >= since)


def read_metrics(text: str) -> dict[str, float]:
    """Those of the daemon's metrics that are shown, without their prefix, summed over their labels."""
    found: dict[str, float] = {}
    lines = [line for line in text.splitlines() if line.startswith(_WANTED)]
    for family in text_string_to_metric_families("".join(f"{line}\n" for line in lines)):
        for sample in family.samples:
            name = sample.name.removeprefix(_PREFIX)
            found[name] = found.get(name, 0.0) + sample.value
    return found


async def _repeat(ask: Any, every_s: float) -> None:
    while True:
        await ask()
        await asyncio.sleep(every_s)
