"""Three real Sentinels, a primary and two replicas, and what the program's own client makes of a failover."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from redis.asyncio.sentinel import SentinelManagedSSLConnection

from events import chain
from events.chain import GENESIS
from events.keys import Keys
from events.store import Commit, RedisStore, StoreError, UnavailableError, Write
from events.types import Entry, Head
from governor import connection
from governor.connection import client, connected, place, stream_on, watch
from governor.durability import Server, changed, durability, identity, refusal
from governor.settings import Settings, load
from tests.conftest import NewServer, missing
from tests.daemon import daemon, events_of, publish, wait_for
from tests.servers import KINDS, Kind, RedisServer, ServerUnavailable, Watched
from tests.test_store import Proxy

KEYS = Keys()
TTL_MS = 400
BACK_S = 10.0
"""A failover takes about 2.5 s here; the machine may be busy."""


def started(kind: Kind) -> Watched:
    try:
        return Watched(kind)
    except ServerUnavailable as reason:
        missing(str(reason))


@pytest.fixture(params=KINDS)
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    with started(request.param) as group:
        yield group


@pytest.fixture(scope="module", params=KINDS)
def untouched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    """Shared by the tests that only look."""
    with started(request.param) as group:
        yield group


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as closing:
        yield closing


def settings_of(watched: Watched, **more: str) -> Settings:
    # Nobody listens on port 1: with Sentinels, REDIS_PORT must not be used.
    return load({"REDIS_HOST": "127.0.0.1", "REDIS_PORT": "1", "REDIS_SENTINELS": watched.addresses} | more)


def entry_after(head: Head, plan: str) -> Entry:
    data = plan.encode()
    return Entry(
        "DECISION", head.seq + 1, "1.000000", data, chain.link(head.hash, "DECISION", head.seq + 1, "1.000000", data)
    )


def grant(head: Head, plan: str, keys: Keys = KEYS) -> Commit:
    return Commit(
        expected=head,
        entries=[entry_after(head, plan)],
        writes=[Write("set", keys.permit(plan), (plan.encode(),), TTL_MS)],
        grants=True,
    )


async def whole(store: RedisStore) -> list[str]:
    """The plans of the stream, in order; its chain holds."""
    plans: list[str] = []
    seq = 0
    head = GENESIS
    while page := await store.read(seq):
        plans += [entry.data.decode() for entry in chain.verify(page, after=head)]
        seq = page[-1].seq
        head = Head(seq, page[-1].hash)
    return plans


class Bot:
    """Grants plan after plan as a governor would: no plan twice, and a hold of one TTL on another server."""

    def __init__(self, redis_: redis.asyncio.Redis, settings: Settings) -> None:
        self.redis = redis_
        self.store = stream_on(redis_, settings)
        self.granted: Counter[str] = Counter()
        self.lost: list[str] = []
        """Acknowledged, and not in the history that went on."""
        self.errors: list[str] = []
        self.changes: list[str] = []
        self.held_s = self.back_s = 0.0
        self._head = GENESIS
        self._number = 0
        self._server: Server | None = None
        self._last = time.monotonic()

    async def run(self, until: asyncio.Event) -> None:
        self._server = await identity(self.redis)
        while not until.is_set():
            plan = f"plan-{self._number}"
            try:
                await self.store.commit(grant(self._head, plan))
            except StoreError as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                await self._look()
                continue
            self._head = Head(self._head.seq + 1, entry_after(self._head, plan).hash)
            self._last = time.monotonic()
            self.granted[plan] += 1
            self._number += 1

    async def _look(self) -> None:
        """Find out who is there and what is in its stream; what was in doubt is never asked for again."""
        assert self._server is not None
        while True:
            try:
                since = time.monotonic() - self._last
                server = await identity(self.redis)
                self.changes.append(changed(self._server, server, since))
                plans = await whole(self.store)
                self._head = await self.store.head()
                if self.changes[-1] == "another":
                    self.back_s = time.monotonic() - self._last
                    until = await self.store.clock() + TTL_MS * 1000
                    while await self.store.clock() < until:
                        await asyncio.sleep(0.01)
                    self.held_s = time.monotonic() - self._last - self.back_s
                    self.lost = [plan for plan in self.granted if plan not in plans]
                break
            except StoreError as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.01)
        self._server = server
        self._number += 1


class Consumer:
    """Takes every permit it sees, from whichever server is in charge."""

    def __init__(self, redis_: redis.asyncio.Redis, bot: Bot) -> None:
        self.redis: Any = redis_
        self.bot = bot
        self.took: Counter[str] = Counter()

    async def run(self, until: asyncio.Event) -> None:
        while not until.is_set():
            for plan in list(self.bot.granted)[-20:]:
                try:
                    self.took[plan] += int(await self.redis.delete(KEYS.permit(plan)))
                except redis.exceptions.RedisError:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0)


async def reached(condition: Any, problem: str) -> None:
    async with asyncio.timeout(BACK_S):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), problem


async def test_a_killed_primary_under_load_permits_nothing_twice_and_is_replaced_within_seconds(
    watched: Watched, stack: AsyncExitStack
) -> None:
    settings = settings_of(watched)
    bot = Bot(await stack.enter_async_context(connected(settings)), settings)
    consumer = Consumer(await stack.enter_async_context(connected(settings)), bot)
    done = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bot.run(done))
        tasks.create_task(consumer.run(done))
        await reached(lambda: len(bot.granted) >= 200, "no load")
        old, before = watched.primary(), len(bot.granted)
        await asyncio.to_thread(old.kill)
        await reached(lambda: bot.held_s and len(bot.granted) >= before + 200, "not back")
        done.set()

    assert set(bot.granted.values()) == {1}, "acknowledged once each"
    assert max(consumer.took.values()) == 1, "consumed once each"
    assert len(consumer.took) > 200
    assert bot.changes[-1] == "another"
    assert all(error.startswith("UnavailableError") for error in bot.errors)
    assert bot.held_s >= TTL_MS / 1000
    assert bot.back_s < BACK_S
    plans = await whole(bot.store)
    assert max(Counter(plans).values()) == 1
    assert set(bot.granted) - set(plans) == set(bot.lost), "only a tail that no replica had is gone"

    # An old primary that comes back is not believed, not even by those who come new.
    old.start()
    async with connected(settings) as new:
        assert (await identity(new)).address == (await identity(bot.redis)).address != f"127.0.0.1:{old.port}"


async def test_a_primary_that_was_replaced_and_is_still_there_is_left_within_seconds(
    watched: Watched, stack: AsyncExitStack
) -> None:
    settings = settings_of(watched)
    bot = Bot(await stack.enter_async_context(connected(settings)), settings)
    done = asyncio.Event()
    old = watched.primary()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bot.run(done))
        watching = tasks.create_task(watch(bot.redis, every_s=0.1))
        await reached(lambda: len(bot.granted) >= 100, "no load")
        watched.sentinels[0].ask("SENTINEL", "FAILOVER", "mymaster")
        await reached(lambda: bot.held_s, "never left")
        before = len(bot.granted)
        with old.client() as there:
            assert there.info("replication")["role"] == "master", "it would have gone on"
        await reached(lambda: len(bot.granted) >= before + 100, "not back")
        watching.cancel()
        done.set()
    assert bot.changes[-1] == "another"
    plans = await whole(bot.store)
    assert set(bot.granted.values()) == {1} == set(Counter(plans).values())
    assert set(bot.granted) - set(plans) == set(bot.lost)


async def test_sentinels_may_be_down_once_the_primary_is_known_and_one_is_enough_to_find_it(
    watched: Watched, stack: AsyncExitStack
) -> None:
    settings = settings_of(watched)
    known = await stack.enter_async_context(connected(settings))
    primary = f"127.0.0.1:{watched.primary().port}"
    assert (await identity(known)).address == primary
    for sentinel in watched.sentinels[:2]:
        sentinel.kill()
    async with connected(settings) as new:
        assert (await identity(new)).address == primary
    watched.sentinels[2].kill()
    async with connected(settings) as new:
        with pytest.raises(UnavailableError, match=r"'mymaster' is: 127.*failed.*; 127.*failed.*; 127.*failed"):
            await stream_on(new, settings).head()
    await stream_on(known, settings).commit(grant(GENESIS, "plan"))


async def test_a_sentinel_that_hangs_is_passed_over(untouched: Watched) -> None:
    settings = settings_of(untouched)
    async with asyncio.timeout(3), silent() as port:
        sentinels = ((("127.0.0.1", port)), *settings.redis_sentinels)
        more = ",".join(f"{host}:{number}" for host, number in sentinels)
        async with connected(load({"REDIS_SENTINELS": more}), answer_s=0.3) as new:
            assert (await identity(new)).address == f"127.0.0.1:{untouched.primary().port}"


async def test_a_name_nobody_watches_is_told(untouched: Watched) -> None:
    settings = settings_of(untouched, REDIS_SENTINEL_NAME="other")
    async with connected(settings) as new:
        with pytest.raises(
            UnavailableError, match=r"where the primary 'other' is: 127.0.0.1:\d+: knows none of this name; "
        ):
            await identity(new)


async def test_a_sentinel_that_missed_a_failover_is_not_believed_unless_all_were_set_up_anew(
    untouched: Watched,
) -> None:
    addresses = settings_of(untouched).redis_sentinels
    primary = ("127.0.0.1", untouched.primary().port)
    finder = connection._Sentinels((("127.0.0.1", 1), *addresses), within_s=1)
    finder._epoch = 5
    for _ in range(3):
        with pytest.raises(redis.exceptions.ConnectionError, match="has not heard of the last failover"):
            await finder.discover_master("mymaster")
    finder = connection._Sentinels(addresses, within_s=1)
    finder._epoch = 5
    with pytest.raises(redis.exceptions.ConnectionError, match="has not heard of the last failover"):
        await finder.discover_master("mymaster")
    assert await finder.discover_master("mymaster") == primary


async def test_a_watched_primary_with_aof_is_durable_and_warned_about_without_min_replicas(untouched: Watched) -> None:
    async with connected(settings_of(untouched)) as redis_:
        found = await durability(redis_)
    assert refusal(found, attested=False) is None
    assert [finding.name for finding in found.findings if finding.verdict == "warn"] == ["min-replicas-to-write"]


# ---------------------------------------------------------------- without Sentinels: who is found is scripted


class Finder:
    """Says what it was told to; the last one again and again."""

    def __init__(self, *ports: int) -> None:
        self._ports = list(ports)

    async def discover_master(self, _name: str) -> tuple[str, int]:
        return "127.0.0.1", self._ports.pop(0) if len(self._ports) > 1 else self._ports[0]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_primary_that_was_demoted_under_the_connection_is_left(kind: Kind, new_server: NewServer) -> None:
    one, two = new_server(kind), new_server(kind)
    async with connection._found("mymaster", Finder(one.port, two.port), socket_timeout=5) as redis_:
        store = RedisStore(redis_, stream=KEYS.events, halt=KEYS.halt)
        await store.commit(grant(GENESIS, "plan-1"))
        with one.client() as there:
            there.replicaof("127.0.0.1", str(two.port))
        with pytest.raises(UnavailableError, match="previous master is now a slave"):
            await store.commit(grant(Head(1, entry_after(GENESIS, "plan-1").hash), "plan-2"))
        await store.commit(grant(GENESIS, "plan-3"))
    with two.client() as there:
        assert there.get(KEYS.permit("plan-3")) == "plan-3"
        assert there.exists(KEYS.permit("plan-2")) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["before", "after", "half"])
async def test_a_commit_whose_answer_is_lost_is_never_sent_again_by_the_client(
    kind: Kind, new_server: NewServer, stack: AsyncExitStack, cut: Any
) -> None:
    server = new_server(kind)
    proxy = await stack.enter_async_context(Proxy(server.port, b"EVALSHA"))
    redis_ = await stack.enter_async_context(connection._found("mymaster", Finder(proxy.port), socket_timeout=2))
    store = RedisStore(redis_, stream=KEYS.events, halt=KEYS.halt)
    await store.head()
    proxy.cut = cut
    async with asyncio.timeout(10):
        with pytest.raises(UnavailableError):
            await store.commit(grant(GENESIS, "plan-1"))
    with server.client() as there:
        ran = there.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]
    assert ran == (1 if cut == "after" else 0)
    assert (await store.head()).seq == ran


class silent:  # noqa: N801 - used like a function
    """A port that takes connections and says nothing."""

    async def __aenter__(self) -> int:
        self._writers: list[asyncio.StreamWriter] = []
        self._server = await asyncio.start_server(lambda _, writer: self._writers.append(writer), "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        for writer in self._writers:
            writer.close()
        self._server.close()


async def test_tls_is_for_the_sentinels_too() -> None:
    one = client(load({"REDIS_SENTINELS": "one:1,two:2", "REDIS_TLS": "true"}))
    pool: Any = one.connection_pool
    assert pool.connection_class is SentinelManagedSSLConnection
    assert pool.sentinel_manager._options["ssl"] is True
    await one.aclose()


def test_where_the_server_is_looked_for_is_told() -> None:
    assert place(load({})) == "localhost:6379"
    environ = {"REDIS_SENTINELS": "one:1,[::1]:2", "REDIS_SENTINEL_NAME": "bot"}
    assert place(load(environ)) == "bot of the Sentinels one:1, ::1:2"


async def test_a_single_server_is_reached_as_before(flushed: RedisServer) -> None:
    settings = load({"REDIS_HOST": flushed.host, "REDIS_PORT": str(flushed.port), "REDIS_DB": "3"})
    async with connected(settings) as redis_:
        await redis_.set("here", "1")
        assert (await identity(redis_)).address == f"127.0.0.1:{flushed.port}"
    with flushed.client() as there:
        assert there.exists("here") == 0
        there.select(3)
        assert there.get("here") == "1"


async def test_without_sentinels_there_is_nothing_to_watch(flushed: RedisServer) -> None:
    for prefix in ("quantum", "{quantum}"):
        settings = load({"REDIS_HOST": flushed.host, "REDIS_PORT": str(flushed.port), "GOV_KEY_PREFIX": prefix})
        async with connected(settings) as redis_, asyncio.timeout(5):
            await watch(redis_)


def test_a_daemon_goes_on_with_the_new_primary_and_holds_permits_back_for_one_life(
    watched: Watched, tmp_path: Path
) -> None:
    environ = {"REDIS_SENTINELS": watched.addresses, "GOV_FALLBACK_QTY": "0.001", "GOV_PERMIT_TTL_SEC": "3"}
    old = watched.primary()
    with daemon(tmp_path, port=1, environ=environ) as one:
        with old.client() as client:
            publish(client, "before", "BTCUSDT")
            wait_for(lambda: client.exists("quantum:permit:before"))
            before = len(events_of(client))
            client.wait(2, 1000)
        old.kill()
        wait_for(lambda: watched.primary() is not old, what="a new primary")
        with watched.primary().client() as client:
            wait_for(lambda: "another server" in one.log, what="the new primary found")
            publish(client, "held", "ETHUSDT")
            block: Any = wait_for(lambda: client.get("quantum:governor:block:held"), what="a verdict")
            assert json.loads(block)["reason"] == "history_hold"
            tried = iter(range(1000))

            def passes() -> bool:
                plan_id = f"after{next(tried)}"
                publish(client, plan_id, "SOLUSDT", "UPDATE_SL")
                wait_for(lambda: client.exists(f"quantum:permit:{plan_id}", f"quantum:governor:block:{plan_id}"))
                return bool(client.exists(f"quantum:permit:{plan_id}"))

            wait_for(passes, what="a permit after the hold")
            publish(client, "before", "BTCUSDT")
            wait_for(lambda: [d for d in events_of(client, "DECISION") if d["reason"] == "duplicate_plan"])
            assert len(events_of(client)) > before
        audit = one.json("replay")
        assert (audit["differences"], audit["chain"]) == ([], "ok")
