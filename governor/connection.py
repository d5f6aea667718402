"""How every command and the daemon reach Redis: a client, the store and the ledger on it, and the clock."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import redis.asyncio

from events import store
from events.archive import ArchivedStore
from events.keys import Keys
from governor.settings import Settings

if TYPE_CHECKING:
    from governor.ledger import Ledger

ANSWER_S = 5.0
"""How long Redis has for an answer; reads that block wait for less."""


def now() -> int:
    """Wall clock, microseconds since the epoch."""
    return time.time_ns() // 1000


def client(settings: Settings, *, answer_s: float = ANSWER_S) -> redis.asyncio.Redis:
    """A client for the settings' server; its owner closes it."""
    return store.client(
        host=settings.redis_host,
        port=settings.redis_port,
        db=settings.redis_db,
        username=settings.redis_username or None,
        password=settings.redis_password or None,
        ssl=settings.redis_tls,
        socket_timeout=answer_s,
    )


@asynccontextmanager
async def connected(settings: Settings, *, answer_s: float = ANSWER_S) -> AsyncIterator[redis.asyncio.Redis]:
    """A client that is closed at the end."""
    one = client(settings, answer_s=answer_s)
    try:
        yield one
    finally:
        await one.aclose()


def stream_on(connection: redis.asyncio.Redis, settings: Settings) -> store.RedisStore:
    """The event stream under the settings' prefix, as far back as Redis has it."""
    keys = Keys(settings.key_prefix)
    return store.RedisStore(connection, stream=keys.events, halt=keys.halt)


def store_on(connection: redis.asyncio.Redis, settings: Settings) -> ArchivedStore:
    """The event store: that stream, and before it what was archived."""
    return ArchivedStore(stream_on(connection, settings), settings.archive_dir)


def ledger_on(connection: redis.asyncio.Redis, settings: Settings, **options: Any) -> Ledger:
    """The ledger over it, not yet opened; `options` as for `Ledger`."""
    from governor.ledger import Ledger  # noqa: PLC0415 - commands that only read events do without

    key = settings.audit_key.encode() or None
    return Ledger(store_on(connection, settings), Keys(settings.key_prefix), now, audit_key=key, **options)
