"""Three real nodes, and a replica of the one that has the keys: everything on a prefix with a hash tag."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.cluster
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from events.chain import GENESIS
from events.intake import Intake
from events.keys import Keys
from events.store import ConflictError, RedisStore, RefusedError, StoreError, UnavailableError, Write
from events.types import Head
from governor import connection, rebuild
from governor.connection import client, connected, hash_tag, refuse_plain_prefix, stream_on
from governor.durability import changed, durability, identity, refusal
from governor.gate import AsyncPermitGate, PermitDenied, PermitGate
from governor.settings import Settings, SettingsError, load
from governor.sim.apply_layer import plan_fields
from tests.conftest import NewServer, missing
from tests.daemon import daemon, wait_for
from tests.servers import KINDS, Cluster, RedisServer, ServerUnavailable, wait_until
from tests.test_gate import permit_json
from tests.test_sentinel import entry_after, grant, whole
from tests.test_store import Scripted

PREFIX = "{quantum}"
KEYS = Keys(PREFIX)
SLOT = key_slot(b"quantum")
BACK_S = 10.0


@pytest.fixture(scope="module", params=KINDS)
def formed(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    try:
        cluster = Cluster(request.param, replicas=1, of=2)
    except ServerUnavailable as reason:
        missing(str(reason))
    with cluster:
        yield cluster


@pytest.fixture
def cluster(formed: Cluster) -> Cluster:
    """Whole and empty; its keys are on the third node or on the replica that took over."""
    wait_until(formed.whole, "the cluster is not whole")
    formed.owner(SLOT).ask("FLUSHALL")
    return formed


def settings_of(node: RedisServer, prefix: str = PREFIX) -> Settings:
    return load({"REDIS_HOST": node.host, "REDIS_PORT": str(node.port), "GOV_KEY_PREFIX": prefix})


@asynccontextmanager
async def reached(cluster: Cluster, seed: int = 0) -> AsyncIterator[tuple[redis.asyncio.Redis, RedisStore]]:
    settings = settings_of(cluster.nodes[seed])
    async with connected(settings) as one:
        yield one, stream_on(one, settings)


@pytest.mark.parametrize("seed", range(3))
async def test_a_store_works_from_whichever_node_is_named(cluster: Cluster, seed: int) -> None:
    async with reached(cluster, seed) as (one, store):
        assert await store.head() == GENESIS
        await store.commit(grant(GENESIS, "plan-1", KEYS))
        first = Head(1, entry_after(GENESIS, "plan-1").hash)
        assert await store.head() == first
        with pytest.raises(ConflictError):
            await store.commit(grant(GENESIS, "plan-2", KEYS))
        following = asyncio.create_task(store.follow(1, timeout_s=5))
        async with reached(cluster, (seed + 1) % 3) as (_, other):
            await other.commit(grant(first, "plan-2", KEYS))
        assert [entry.data for entry in await following] == [b"plan-2"]
        assert await whole(store) == ["plan-1", "plan-2"]
        assert await store.values(KEYS.permit("plan-1"), KEYS.permit("plan-3")) == [b"plan-1", None]
        await store.write([Write("set", KEYS.state, (b"{}",)), Write("list", KEYS.executions("A"), (b"1", b"2"), 1000)])
        assert await store.exists(KEYS.state)
        assert abs(await store.clock() / 1e6 - time.time()) < 1
        held = await rebuild.found(one, KEYS)
        assert held == {KEYS.state: [b"{}"], KEYS.executions("A"): [b"1", b"2"]}


async def test_plans_are_read_and_acknowledged(cluster: Cluster) -> None:
    async with reached(cluster) as (one, _):
        intake = Intake(one, {KEYS.plans: "0", KEYS.results: "$"})
        await intake.open()
        await one.xadd(KEYS.plans, {"plan_id": "plan-1"}, id="1-0")
        (delivery,) = await intake.read(count=10, block_s=5)
        assert delivery.fields == {"plan_id": "plan-1"}
        await intake.open()
        assert await intake.read(count=10, block_s=0.01) == [delivery], "pending until it is acknowledged"
        await intake.acknowledge([delivery])
        await intake.open()
        assert await intake.read(count=10, block_s=0.01) == []


async def test_a_permit_is_consumed_once_through_redis_pys_cluster_clients(cluster: Cluster) -> None:
    seed = cluster.nodes[0]
    owner = cluster.owner(SLOT)
    with owner.client() as there:
        there.set(KEYS.state, json.dumps({"state": "ARMED", "epoch": 7}))
        for plan in ("plan-1", "plan-2", "plan-3"):
            there.set(KEYS.permit(plan), permit_json(time.time(), plan_id=plan))
    blocking = redis.cluster.RedisCluster(host=seed.host, port=seed.port, retry=Retry(NoBackoff(), 0))
    try:
        gate = PermitGate(blocking, key_prefix=PREFIX)  # type: ignore[arg-type]
        assert gate.consume("plan-1", symbol="BTCUSDT").plan_id == "plan-1"
        with pytest.raises(PermitDenied, match="no_permit"):
            gate.consume("plan-1", symbol="BTCUSDT", wait_s=0)
    finally:
        blocking.close()
    other = redis.asyncio.cluster.RedisCluster(host=seed.host, port=seed.port, retry=AsyncRetry(NoBackoff(), 0))
    async with other, reached(cluster) as (one, _):
        mixed: list[Any] = [other, one]
        for plan, asking in zip(("plan-2", "plan-3"), mixed, strict=True):
            assert (await AsyncPermitGate(asking, key_prefix=PREFIX).consume(plan, symbol="BTCUSDT")).seq == 42
        for asking in mixed:
            with pytest.raises(PermitDenied, match="no_permit"):
                await AsyncPermitGate(asking, key_prefix=PREFIX).consume("plan-3", symbol="BTCUSDT", wait_s=0)


async def test_a_whole_governor_runs_on_it(cluster: Cluster, tmp_path: Path) -> None:
    with daemon(tmp_path, port=cluster.nodes[0].port, GOV_KEY_PREFIX=PREFIX, GOV_FALLBACK_QTY="0.001") as governor:
        async with reached(cluster) as (one, _):
            plan = plan_fields({"plan_id": "plan-1", "symbol": "BTCUSDT", "action": "PARTIAL_25"}, now=time.time())
            await one.xadd(KEYS.plans, plan)  # type: ignore[arg-type]
            permit = await AsyncPermitGate(one, key_prefix=PREFIX).consume("plan-1", symbol="BTCUSDT", wait_s=5)
        assert permit.symbol == "BTCUSDT"
        wait_for(lambda: governor.json("status")["state"] == "ARMED")
        assert governor.json("disarm", "--reason", "test")["state"] == "DISARMED"
        assert governor.json("replay")["differences"] == []
        assert governor.json("rebuild", "--check")["differences"] == []


# ---------------------------------------------------------------- the prefix


def test_a_daemon_with_the_plain_prefix_is_refused_with_the_reason(cluster: Cluster, tmp_path: Path) -> None:
    with daemon(tmp_path, port=cluster.nodes[0].port, ready=False) as governor:
        assert governor.process is not None
        assert governor.process.wait(20) == 78
        assert "GOV_KEY_PREFIX is 'quantum', expected one with a hash tag such as '{quantum}'" in governor.log
        assert "have to be in one slot" in governor.log


@pytest.mark.parametrize("prefix", ["quantum", "{quantum", "{}quantum", "}q{", "{}{quantum}"])
async def test_a_prefix_that_spreads_the_keys_is_refused(cluster: Cluster, prefix: str) -> None:
    settings = settings_of(cluster.nodes[0], prefix)
    async with connected(settings) as one:
        with pytest.raises(SettingsError, match=r"GOV_KEY_PREFIX is .*, expected one with a hash tag such as"):
            await refuse_plain_prefix(one, settings)


@pytest.mark.parametrize("prefix", ["{quantum}", "bots:{one}:x", "{a}{b}", "{{a}}"])
async def test_a_prefix_with_a_hash_tag_has_all_keys_where_the_client_is(cluster: Cluster, prefix: str) -> None:
    keys = Keys(prefix)
    tag = hash_tag(prefix)
    assert tag is not None
    for key in (keys.plans, keys.events, keys.permit("plan-1"), keys.daily("BTCUSDT", 1)):
        assert cluster.nodes[0].ask("CLUSTER", "KEYSLOT", key) == key_slot(tag.encode())
    settings = settings_of(cluster.nodes[0], prefix)
    async with connected(settings) as one:
        await refuse_plain_prefix(one, settings)
        await stream_on(one, settings).commit(grant(GENESIS, "plan-1", keys))
        await one.delete(keys.events)


async def test_a_node_that_forbids_cluster_slots_is_followed_by_its_redirections(cluster: Cluster) -> None:
    seed = cluster.nodes[0]
    seed.ask("ACL", "SETUSER", "default", "-cluster|slots")
    try:
        async with reached(cluster) as (_, store):
            with pytest.raises(UnavailableError, match="the slot moved"):
                await store.head()
            await store.commit(grant(GENESIS, "plan-1", KEYS))
    finally:
        seed.ask("ACL", "SETUSER", "default", "+cluster|slots")


async def test_another_database_is_told(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    settings = load({"REDIS_HOST": node.host, "REDIS_PORT": str(node.port), "REDIS_DB": "3", "GOV_KEY_PREFIX": PREFIX})
    async with connected(settings) as one:
        with pytest.raises(UnavailableError, match=r"SELECT is not allowed in cluster mode|DB index is out of range"):
            await stream_on(one, settings).head()


async def test_a_cluster_is_as_durable_as_the_node_that_has_the_keys(cluster: Cluster) -> None:
    async with reached(cluster) as (one, _):
        found = await durability(one)
    assert found.address == f"127.0.0.1:{cluster.owner(SLOT).port}"
    assert refusal(found, attested=False) is None


# ---------------------------------------------------------------- slots that move, nodes that go


def move(cluster: Cluster, source: RedisServer, target: RedisServer) -> Iterator[None]:
    """Move the slot with its keys, stopping once half way."""
    from_id, to_id = source.ask("CLUSTER", "MYID"), target.ask("CLUSTER", "MYID")
    target.ask("CLUSTER", "SETSLOT", SLOT, "IMPORTING", from_id)
    source.ask("CLUSTER", "SETSLOT", SLOT, "MIGRATING", to_id)
    source.ask("MIGRATE", target.host, target.port, KEYS.state, 0, 5000)
    yield
    keys = source.ask("CLUSTER", "GETKEYSINSLOT", SLOT, 1000)
    source.ask("MIGRATE", target.host, target.port, "", 0, 5000, "KEYS", *keys)
    for node in (target, source):
        node.ask("CLUSTER", "SETSLOT", SLOT, "NODE", to_id)


async def test_a_slot_that_moves_is_followed_and_nothing_is_written_half(cluster: Cluster) -> None:
    source, target = cluster.owner(SLOT), cluster.nodes[1]
    async with reached(cluster) as (one, store):
        await store.write([Write("set", KEYS.state, (b"{}",))])
        await store.commit(grant(GENESIS, "plan-1", KEYS))
        head, before = await store.head(), await identity(one)
        there = move(cluster, source, target)
        next(there)
        with pytest.raises(StoreError):
            await store.commit(grant(head, "plan-2", KEYS))  # the permit's key could be on either
        assert await whole(store) == ["plan-1"]
        next(there, None)
        with pytest.raises(UnavailableError, match="the slot moved"):
            await store.head()
        assert await store.head() == head
        await store.commit(grant(head, "plan-2", KEYS))
        now = await identity(one)
        assert now.address == f"127.0.0.1:{target.port}"
        assert changed(before, now, 60.0) == "another"
        assert target.ask("GET", KEYS.permit("plan-2")) == "plan-2"
    back = move(cluster, target, source)
    next(back)
    next(back, None)
    wait_until(lambda: all(node.ask("CLUSTER", "SLOTS") for node in cluster.nodes), "no answer")
    wait_until(lambda: cluster.owner(SLOT) is source, "the slot did not come back")


async def test_a_killed_owner_is_replaced_within_seconds_and_nothing_is_written_twice(cluster: Cluster) -> None:
    old = cluster.owner(SLOT)
    replica = next(node for node in (*cluster.nodes, *cluster.replicas) if _follows(node, old))
    try:
        async with reached(cluster, 0) as (one, store):
            await store.commit(grant(GENESIS, "plan-0", KEYS))
            before, last = await identity(one), time.monotonic()
            with replica.client() as there:
                wait_until(lambda: there.info("replication")["slave_repl_offset"] > 0, "no replication")
            assert old.ask("WAIT", 1, 5000) == 1
            old.kill()
            errors: list[StoreError] = []
            async with asyncio.timeout(BACK_S):
                while True:
                    try:
                        head = await store.head()
                        await store.commit(grant(head, f"plan-{head.seq}", KEYS))
                        break
                    except StoreError as error:
                        errors.append(error)
                        await asyncio.sleep(0.01)
            assert all(isinstance(error, UnavailableError | RefusedError) for error in errors)
            assert await whole(store) == ["plan-0", "plan-1"]
            now = await identity(one)
            assert now.address == f"127.0.0.1:{replica.port}"
            assert changed(before, now, time.monotonic() - last) == "another"
    finally:
        if not old.running:
            old.start()


def _follows(node: RedisServer, primary: RedisServer) -> bool:
    with node.client() as there:
        info = there.info("replication")
    return (info["role"], info.get("master_port")) == ("slave", primary.port)


# ---------------------------------------------------------------- servers that are no cluster


async def test_a_server_without_a_cluster_takes_any_prefix(flushed: RedisServer) -> None:
    for prefix in ("quantum", "{quantum}"):
        settings = settings_of(flushed, prefix)
        async with connected(settings) as one:
            await refuse_plain_prefix(one, settings)
            await stream_on(one, settings).commit(grant(GENESIS, "plan-1", Keys(prefix)))
            assert (await identity(one)).address == f"127.0.0.1:{flushed.port}"


async def test_a_server_that_does_not_say_whether_it_is_a_cluster_is_not_refused(own_server: RedisServer) -> None:
    settings = settings_of(own_server, "quantum")
    async with connected(settings) as one:
        own_server.ask("ACL", "SETUSER", "default", "-info", "-cluster")
        await refuse_plain_prefix(one, settings)
        own_server.kill()
        await refuse_plain_prefix(one, settings)


@pytest.mark.parametrize(
    ("line", "kind"), [(b"-CLUSTERDOWN The cluster is down", RefusedError), (b"-MOVED 1 :1", UnavailableError)]
)
async def test_a_node_that_cannot_serve_the_slot_is_left(
    new_server: NewServer, line: bytes, kind: type[StoreError]
) -> None:
    server = new_server()
    async with AsyncExitStack() as stack:
        down = await stack.enter_async_context(Scripted(line))
        nodes = connection._Nodes(("127.0.0.1", down.port), within_s=1)
        one = connection._found("1", nodes, connection_class=connection._NodeConnection, socket_timeout=5)
        stack.push_async_callback(one.aclose)
        nodes.moved(("127.0.0.1", down.port))
        store = RedisStore(one, stream=KEYS.events, halt=KEYS.halt)
        with pytest.raises(kind):
            await store.commit(grant(GENESIS, "plan-1", KEYS))
        if kind is UnavailableError:
            assert nodes._moved == ("127.0.0.1", 1), "a node without a name of its own is where it was asked"
        nodes.moved(("127.0.0.1", server.port))
        await store.commit(grant(GENESIS, "plan-2", KEYS))


async def test_with_no_node_left_it_says_whom_it_asked(own_server: RedisServer) -> None:
    own_server.kill()
    one = client(settings_of(own_server))
    try:
        with pytest.raises(redis.exceptions.ConnectionError) as caught:
            await one.ping()
    finally:
        await one.aclose()
    assert str(caught.value).startswith(
        f"no node of the cluster tells who owns slot {SLOT}: 127.0.0.1:{own_server.port}: "
    )
