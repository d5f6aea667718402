"""How every command and the daemon reach Redis: a client, the store and the ledger on it, and the clock.

Three ways, one client. Without Sentinels and without a hash tag in the prefix it connects to REDIS_HOST. With
Sentinels it asks them for the primary, and with a hash tag a node of the cluster for the owner of the tag's slot,
whenever it connects: after a failover, a broken connection or a word of the server that it is not the one any more,
the next command finds the new one. A command is never sent twice for that: it fails, and its caller looks and
proposes again, as after any lost answer.

All keys are in one slot, so the cluster needs no cluster client; redis-py's sends keyless commands to any node,
asks the server for the keys of others, and does not know a command named in bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import redis.asyncio
import redis.exceptions
from redis.asyncio.connection import SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool, SentinelManagedConnection
from redis.backoff import NoBackoff
from redis.crc import key_slot

from events import store
from events.archive import ArchivedStore
from events.keys import Keys
from governor.durability import Server, identity
from governor.logs import Logger
from governor.settings import Settings, SettingsError

if TYPE_CHECKING:
    from governor.ledger import Ledger

log = Logger("governor")

ANSWER_S = 5.0
"""How long Redis has for an answer; reads that block wait for less."""
CONNECT_S = 2.0
"""How long it has to take a connection."""
FIND_S = 1.0
"""How long a Sentinel or a node of the cluster has to say who is in charge, before another one is asked."""
WATCH_S = 0.5
"""How often the Sentinels are asked whether the primary is still the primary."""
Address = tuple[str, int]


def now() -> int:
    """Wall clock, microseconds since the epoch."""
    return time.time_ns() // 1000


class Door:
    """Lets no connection lead to another server process than the one that was looked at.

    redis-py connects anew without a word when it finds a connection closed, in the middle of a command. What that
    command grants would then rest on a server nobody has compared with the journal.
    """

    def __init__(self) -> None:
        self._run_id: str | None = None
        """Of the process that was looked at; None: any may be connected to, in order to look at it."""
        self._looked_at: str | None = None
        """The same, also while it is looked again."""

    async def look(self, connection: redis.asyncio.Redis) -> Server:
        """Look which process answers now. From here on no connection leads to another one, be it old or new.

        Raises:
            UnavailableError: no server, or no answer.
        """
        self._run_id = None
        server = await identity(connection)
        if self._looked_at not in (None, server.run_id):
            with suppress(redis.exceptions.RedisError):
                await connection.connection_pool.disconnect()  # the process before may go on and take commits
        self._run_id = self._looked_at = server.run_id
        return server

    async def greet(self, connection: Any) -> None:
        """What a new connection does first.

        Raises:
            redis.exceptions.ConnectionError: it leads to another process.
        """
        await connection.on_connect()
        if not self._run_id:
            return
        await connection.send_command("INFO", "server")
        try:
            told = bytes(await connection.read_response())
        except redis.exceptions.ResponseError:  # INFO is forbidden: every process counts as another anyway
            return
        if f"run_id:{self._run_id}".encode() not in told:
            raise redis.exceptions.ConnectionError(f"not {store.UNSENT} another process before it was looked at")


def client(settings: Settings, *, answer_s: float = ANSWER_S, door: Door | None = None) -> redis.asyncio.Redis:
    """A client for the settings' server, whichever that is at the time; its owner closes it."""
    options: dict[str, Any] = {
        "db": settings.redis_db,
        "username": settings.redis_username or None,
        "password": settings.redis_password or None,
        "socket_timeout": answer_s,
        **(tls := _tls(settings)),
    }
    greeted = {} if door is None else {"redis_connect_func": door.greet}
    within_s = min(FIND_S, answer_s)
    if settings.redis_sentinels:
        sentinels = _Sentinels(settings.redis_sentinels, within_s=within_s, **tls)
        return _found(settings.redis_sentinel_name, sentinels, **options, **greeted)
    if (tag := hash_tag(settings.key_prefix)) is not None:
        nodes = _Nodes((settings.redis_host, settings.redis_port), within_s=within_s, **options)
        kind = _NodeTlsConnection if settings.redis_tls else _NodeConnection
        return _found(str(key_slot(tag.encode())), nodes, connection_class=kind, **options, **greeted)
    return store.client(host=settings.redis_host, port=settings.redis_port, **options, **greeted)


def _tls(settings: Settings) -> dict[str, Any]:
    if not settings.redis_tls:
        return {"ssl": False}
    given = {
        "ssl_ca_certs": settings.redis_tls_ca,
        "ssl_certfile": settings.redis_tls_cert,
        "ssl_keyfile": settings.redis_tls_key,
    }
    return {"ssl": True, **{name: str(path) for name, path in given.items() if path is not None}}


@asynccontextmanager
async def connected(settings: Settings, *, answer_s: float = ANSWER_S) -> AsyncIterator[redis.asyncio.Redis]:
    """A client that is closed at the end."""
    one = client(settings, answer_s=answer_s)
    try:
        yield one
    finally:
        await one.aclose()


async def watch(connection: redis.asyncio.Redis, *, every_s: float = WATCH_S) -> None:
    """Leave a primary that the Sentinels have replaced while it is still there; runs until it is cancelled.

    Nobody tells a client. After a planned failover, or one because the Sentinels alone could not reach it, an old
    primary goes on for eight seconds or more and acknowledges what is lost when it becomes a replica. A connection
    that is left fails what waits on it; the next command finds the new primary. Without Sentinels there is nothing
    to watch, and this returns at once.
    """
    pool = connection.connection_pool
    if not isinstance(pool, SentinelConnectionPool) or not isinstance(pool.sentinel_manager, _Sentinels):
        return
    while True:
        await asyncio.sleep(every_s)
        known = pool.master_address
        with suppress(redis.exceptions.RedisError):
            found = await pool.sentinel_manager.discover_master(pool.service_name)
            if known is not None and known == pool.master_address != found:
                log.warning("the primary was replaced", was="{}:{}".format(*known), now="{}:{}".format(*found))
                await pool.disconnect()


def place(settings: Settings) -> str:
    """Where the client connects, for people."""
    if settings.redis_sentinels:
        sentinels = ", ".join(f"{host}:{port}" for host, port in settings.redis_sentinels)
        return f"{settings.redis_sentinel_name} of the Sentinels {sentinels}"
    return f"{settings.redis_host}:{settings.redis_port}"


def hash_tag(prefix: str) -> str | None:
    """The part of a key prefix that alone decides the slot: what stands in its first braces, if anything does."""
    _, opened, rest = prefix.partition("{")
    tag, closed, _ = rest.partition("}")
    return tag if opened and closed and tag else None


async def refuse_plain_prefix(connection: redis.asyncio.Redis, settings: Settings) -> None:
    """Hold the settings against a cluster, if there is one. Not reachable, or INFO not allowed: nothing is refused.

    Raises:
        SettingsError: a cluster, and the keys would be spread over it.
    """
    if hash_tag(settings.key_prefix) is not None:
        return
    try:
        info = await connection.info("cluster")
    except Exception as error:  # noqa: BLE001 - redis-py lets more than its own errors out of broken connections
        log.debug("cluster state unknown", error=str(error))
        return
    if info.get("cluster_enabled"):
        raise SettingsError(
            f"GOV_KEY_PREFIX is {settings.key_prefix!r}, expected one with a hash tag such as '{{quantum}}': "
            "on a Redis Cluster all keys of an account have to be in one slot"
        )


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

    key = settings.chain_key
    return Ledger(store_on(connection, settings), Keys(settings.key_prefix), now, audit_key=key, **options)


def _found(name: str, finder: Any, **options: Any) -> redis.asyncio.Redis:
    """A client that asks `finder.discover_master(name)` for the address of every connection it makes.

    As `events.store.client` otherwise: RESP2, and never a retry of its own.
    """
    pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
        name,
        finder,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
        socket_connect_timeout=CONNECT_S,
        **options,
    )
    return store.Client.from_pool(pool)


class _Finder:
    """Somebody to ask where to connect; connections to them last for one question."""

    who: str

    def __init__(self, addresses: tuple[Address, ...], *, within_s: float, **options: Any) -> None:
        self._addresses = addresses
        self._within_s = within_s
        self._options = options
        self._turn = 0

    async def discover_master(self, name: str) -> Address:
        """The address to connect to; the name of this method is redis-py's.

        Raises:
            redis.exceptions.ConnectionError: nobody could tell; the message has each one's answer.
        """
        # Another one first each time: one that was cut off from the rest goes on believing what it knew.
        turn = self._turn % len(self._addresses)
        self._turn += 1
        errors: dict[Address, Exception] = {}
        for host, port in self._addresses[turn:] + self._addresses[:turn]:
            try:
                async with asyncio.timeout(self._within_s), store.client(host=host, port=port, **self._options) as one:
                    return await self._ask(one, name, host)
            except Exception as error:  # noqa: BLE001 - whatever one's trouble is, the next one may know
                errors[host, port] = error
        self._gave_up(list(errors.values()))
        told = "; ".join(f"{host}:{port}: {str(error) or 'no answer'}" for (host, port), error in errors.items())
        raise redis.exceptions.ConnectionError(f"{self.who.format(name)}: {told}")

    async def _ask(self, one: redis.asyncio.Redis, name: str, host: str) -> Address:
        raise NotImplementedError

    def _gave_up(self, errors: list[Exception]) -> None:
        """Nobody could tell, for these reasons."""


class _BehindError(LookupError):
    """A Sentinel that has not heard of a failover another one told of."""


class _Sentinels(_Finder):
    """They know a primary by its name. Each failover has an epoch; who tells of an earlier one is not believed."""

    who = "no Sentinel tells where the primary {!r} is"

    _epoch = 0

    async def _ask(self, one: redis.asyncio.Redis, name: str, _host: str) -> Address:
        primaries: Any = await one.sentinel_masters()
        # While it carries a failover out it still lists the old one, and answers with the new one.
        answer: Any = await one.sentinel_get_master_addr_by_name(name)
        known = primaries.get(name)
        if known is None or answer is None:
            raise LookupError("knows none of this name")
        host, port = _text(answer[0]), answer[1]
        if (known["ip"], known["port"]) == (host, port) and (known["is_sdown"] or known["is_odown"]):
            raise LookupError("takes it for down")
        epoch = int(known["config-epoch"])
        if epoch < self._epoch:
            raise _BehindError("has not heard of the last failover")
        self._epoch = epoch
        return host, port

    def _gave_up(self, errors: list[Exception]) -> None:
        if all(isinstance(error, _BehindError) for error in errors):
            self._epoch = 0  # all of them were set up anew; the next attempt takes their word


class _Nodes(_Finder):
    """The nodes of a cluster know who owns a slot; where there is no cluster it is the one server."""

    who = "no node of the cluster tells who owns slot {}"

    _moved: Address | None = None

    def __init__(self, seed: Address, *, within_s: float, **options: Any) -> None:
        super().__init__((seed,), within_s=within_s, **options)
        self._seed = seed

    def moved(self, owner: Address) -> None:
        """Take a node's word for who owns the slot, once: gossip may not have told the others yet."""
        self._moved = owner

    async def discover_master(self, name: str) -> Address:
        if self._moved is not None:
            owner, self._moved = self._moved, None
            return owner
        return await super().discover_master(name)

    async def _ask(self, one: redis.asyncio.Redis, name: str, host: str) -> Address:
        ask: Callable[..., Any] = one.execute_command
        try:
            ranges = await ask("CLUSTER", "SLOTS")
        except redis.exceptions.ResponseError:  # no cluster, or not allowed to ask: then a MOVED tells
            return self._seed
        # A node that does not know its own name leaves it out: it is the one that was asked.
        owners = [
            (first, last, [(_text(node) or host, int(port)) for node, port, *_ in nodes])
            for first, last, *nodes in ranges
        ]
        self._addresses = tuple(dict.fromkeys([self._seed, *(node for _, _, nodes in owners for node in nodes)]))
        for first, last, nodes in owners:
            if first <= int(name) <= last:
                return nodes[0]
        raise LookupError("knows no owner")


def _text(name: bytes | None) -> str:
    return "" if name in (None, b"?") else name.decode()


class _NodeConnection(SentinelManagedConnection):
    """To the owner of a slot; one that is not the owner any more, or cannot be, is left."""

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except redis.exceptions.MovedError as error:
            self.connection_pool.sentinel_manager.moved((error.host or self.host, error.port))
            await self.disconnect()
            raise redis.exceptions.ConnectionError(f"the slot moved: {error}") from error
        except redis.exceptions.ClusterDownError:
            await self.disconnect()
            raise


class _NodeTlsConnection(_NodeConnection, SSLConnection):
    """The same over TLS."""
