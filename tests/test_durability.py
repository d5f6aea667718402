"""What a server says of itself, judged; asked of real ones."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import redis.asyncio

from events import store
from events.store import UnavailableError
from governor.durability import (
    PASSING,
    Durability,
    Finding,
    Server,
    changed,
    durability,
    identity,
    judge,
    refusal,
)
from tests.conftest import NewServer
from tests.servers import KINDS, Kind, RedisServer, wait_until

GOOD: dict[str, Any] = {
    "role": "master",
    "loading": 0,
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "maxmemory": 0,
    "maxmemory_policy": "noeviction",
    "connected_slaves": 0,
}
FSYNC = {"appendfsync": "everysec"}


def found(info: dict[str, Any], config: dict[str, str] | None) -> Durability:
    return Durability("redis:6379", judge(info, config))


def verdicts(info: dict[str, Any], config: dict[str, str] | None) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in judge(info, config)}


@asynccontextmanager
async def reached(server: RedisServer, **options: Any) -> AsyncIterator[redis.asyncio.Redis]:
    async with store.client(host=server.host, port=server.port, socket_timeout=5, **options) as client:
        yield client


# ---------------------------------------------------------------- durability, judged


def test_a_server_that_keeps_everything_is_not_refused() -> None:
    good = found(GOOD, FSYNC)
    assert {finding.verdict for finding in good.findings} == {"ok"} == {good.verdict}
    assert refusal(good, attested=False) is None
    assert refusal(found(GOOD, {"appendfsync": "always"}), attested=False) is None


@pytest.mark.parametrize(
    ("info", "config", "problem"),
    [
        ({"aof_enabled": 0}, FSYNC, "aof_enabled is '0', expected 1"),
        ({"maxmemory_policy": "allkeys-lru"}, FSYNC, "maxmemory_policy is 'allkeys-lru', expected noeviction"),
        ({"maxmemory_policy": "volatile-ttl", "maxmemory": 1}, FSYNC, "maxmemory_policy is 'volatile-ttl', expected"),
        ({}, {"appendfsync": "no"}, "appendfsync is 'no', expected everysec or always"),
    ],
)
def test_what_loses_data_is_refused_whatever_is_attested(
    info: dict[str, Any], config: dict[str, str], problem: str
) -> None:
    bad = found(GOOD | info, config)
    assert bad.verdict == "bad"
    for attested in (False, True):
        message = refusal(bad, attested=attested)
        assert message is not None
        assert message.startswith("GOV_REQUIRE_DURABLE is 'true', expected a server that keeps data, redis:6379: ")
        assert problem in message
        assert "GOV_DURABILITY_ATTESTED" not in message


@pytest.mark.parametrize(
    ("name", "info", "config"),
    [
        ("appendfsync", GOOD, None),
        ("appendfsync", GOOD, {}),
        *(
            (name, {key: GOOD[key] for key in GOOD if key != name}, FSYNC)
            for name in ("aof_enabled", "maxmemory_policy")
        ),
    ],
)
def test_what_is_not_told_is_refused_unless_it_is_attested(
    name: str, info: dict[str, Any], config: dict[str, str] | None
) -> None:
    unknown = found(info, config)
    assert unknown.verdict == "unknown"
    message = refusal(unknown, attested=False)
    assert message is not None
    assert f"it does not tell {name} (GOV_DURABILITY_ATTESTED=true if you know" in message
    assert refusal(unknown, attested=True) is None


def test_a_server_that_tells_nothing_is_unknown_in_everything() -> None:
    assert set(verdicts({}, None).values()) == {"unknown"}
    message = refusal(found({}, None), attested=False)
    assert message is not None
    assert "it does not tell aof_enabled, appendfsync, maxmemory_policy (" in message


def test_everything_that_is_wrong_is_said_at_once() -> None:
    message = refusal(found(GOOD | {"aof_enabled": 0, "maxmemory_policy": "allkeys-lfu"}, None), attested=False)
    assert message is not None
    assert message.count("; ") == 2
    assert "\n" not in message


@pytest.mark.parametrize(("name", "value"), [("loading", 1), ("role", "slave"), ("aof_last_write_status", "err")])
def test_what_passes_by_itself_is_told_and_no_reason_to_refuse(name: str, value: object) -> None:
    passing = found(GOOD | {name: value}, FSYNC)
    assert [finding for finding in passing.findings if finding.verdict == "bad"] == [
        Finding(name, str(value), str(GOOD[name]), "bad")
    ]
    assert name in PASSING
    assert refusal(passing, attested=False) is None


@pytest.mark.parametrize(
    ("info", "verdict"),
    [
        ({"connected_slaves": 0}, None),
        ({"connected_slaves": 1}, "warn"),
        ({"connected_slaves": 2, "min_slaves_good_slaves": 2}, "ok"),
    ],
)
def test_min_replicas_are_asked_for_where_there_are_replicas(info: dict[str, Any], verdict: str | None) -> None:
    assert verdicts(GOOD | info, FSYNC).get("min-replicas-to-write") == verdict
    assert refusal(found(GOOD | info, FSYNC), attested=False) is None
    assert found(GOOD | info, FSYNC).verdict == (verdict or "ok")


# ---------------------------------------------------------------- durability, asked


@pytest.mark.parametrize("kind", KINDS)
async def test_real_servers_are_told_apart(kind: Kind, new_server: NewServer) -> None:
    async with reached(new_server(kind, appendonly=True)) as client:
        assert refusal(await durability(client), attested=False) is None
        await client.config_set("maxmemory-policy", "allkeys-lru")
        assert "maxmemory_policy is 'allkeys-lru'" in str(refusal(await durability(client), attested=False))
    async with reached(new_server(kind, appendonly=True, appendfsync="no")) as client:
        assert "appendfsync is 'no'" in str(refusal(await durability(client), attested=False))
    plain = new_server(kind)
    async with reached(plain) as client:
        there = await durability(client)
        assert there.address == f"127.0.0.1:{plain.port}"
        assert "aof_enabled is '0'" in str(refusal(there, attested=True))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_with_replicas_tells_whether_it_waits_for_them(kind: Kind, new_server: NewServer) -> None:
    primary, replica = new_server(kind, appendonly=True), new_server(kind)
    follow(replica, primary)
    async with reached(primary) as client:
        assert (await durability(client)).verdict == "warn"
        await client.config_set("min-replicas-to-write", "1")
        assert (await durability(client)).verdict == "ok"
    async with reached(replica) as client:
        told = {finding.name: finding for finding in (await durability(client)).findings}
        assert told["role"] == Finding("role", "slave", "master", "bad")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_forbids_config_or_info_is_unknown(kind: Kind, new_server: NewServer) -> None:
    server = new_server(kind, appendonly=True)
    with server.client() as admin:
        admin.acl_setuser("managed", enabled=True, nopass=True, commands=["+@all", "-config"])
        admin.acl_setuser("closed", enabled=True, nopass=True, commands=["+@all", "-config", "-info"])
    async with reached(server, username="managed", password="x") as client:
        there = await durability(client)
        assert [f.name for f in there.findings if f.verdict == "unknown"] == ["appendfsync"]
        assert refusal(there, attested=False) is not None
        assert refusal(there, attested=True) is None
    async with reached(server, username="closed", password="x") as client:
        assert {finding.verdict for finding in (await durability(client)).findings} == {"unknown"}
        nobody = await identity(client)
        assert (nobody.run_id, nobody.master_replid, nobody.role) == ("", "", "")
        assert changed(nobody, nobody, 1.0) == "another"


async def test_a_server_that_is_away_is_unavailable_and_not_unknown(own_server: RedisServer) -> None:
    async with reached(own_server) as client:
        own_server.kill()
        with pytest.raises(UnavailableError):
            await durability(client)
        with pytest.raises(UnavailableError):
            await identity(client)


# ---------------------------------------------------------------- identity, judged

ONE = Server("a" * 40, "1" * 40, "", "master", 1000, "redis:6379")


@pytest.mark.parametrize(
    ("now", "since_s", "change"),
    [
        ({}, 1.0, "same"),
        ({"uptime_s": 2000}, 1000.0, "same"),
        # A first replica came, or the last one went long ago: a new id, and nothing it went on from.
        ({"master_replid": "2" * 40}, 5.0, "same"),
        # It followed another one meanwhile, whatever that one wrote.
        ({"master_replid": "2" * 40, "master_replid2": "3" * 40}, 5.0, "another"),
        # It was made a replica and promoted again.
        ({"master_replid": "2" * 40, "master_replid2": "1" * 40}, 5.0, "another"),
        ({"role": "slave"}, 1.0, "another"),
        ({"address": "redis:6380"}, 1.0, "another"),
        # A restart on the same address, within the time nobody answered.
        ({"run_id": "b" * 40, "master_replid": "2" * 40, "uptime_s": 0}, 0.4, "restarted"),
        ({"run_id": "b" * 40, "master_replid": "2" * 40, "uptime_s": 4}, 3.0, "restarted"),
        ({"run_id": "b" * 40, "master_replid": "2" * 40, "uptime_s": 5}, 3.0, "another"),
        ({"run_id": "b" * 40, "master_replid": "2" * 40, "uptime_s": 500}, 3.0, "another"),
        # A replica that was promoted, however young.
        ({"run_id": "b" * 40, "master_replid": "2" * 40, "master_replid2": "1" * 40, "uptime_s": 0}, 3.0, "another"),
        ({"run_id": "b" * 40, "master_replid": "2" * 40, "uptime_s": 0, "address": "other:6379"}, 3.0, "another"),
        ({"run_id": "b" * 40, "master_replid": "1" * 40, "uptime_s": 0, "role": "slave"}, 3.0, "another"),
        ({"run_id": ""}, 1.0, "another"),
        ({"master_replid": ""}, 1.0, "another"),
        ({"role": ""}, 1.0, "another"),
    ],
)
def test_a_changed_server_is_known_by_its_ids_its_age_and_its_place(
    now: dict[str, Any], since_s: float, change: str
) -> None:
    assert changed(ONE, ONE._replace(**now), since_s) == change


@pytest.mark.parametrize("missing", ["run_id", "master_replid"])
def test_a_server_that_did_not_say_who_it_was_is_never_the_same(missing: str) -> None:
    gone: dict[str, Any] = {missing: ""}
    assert changed(ONE._replace(**gone), ONE, 1.0) == "another"


# ---------------------------------------------------------------- identity, asked


def follow(replica: RedisServer, primary: RedisServer) -> None:
    """Return when it has all of it."""
    with primary.client() as there:
        there.config_set("repl-diskless-sync-delay", "0")
    with replica.client() as client:
        client.replicaof(primary.host, str(primary.port))
        wait_until(lambda: client.info("replication")["master_link_status"] == "up", "no replication")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_restart_is_no_other_server_and_a_promoted_replica_is(kind: Kind, new_server: NewServer) -> None:
    at_once = {"repl-diskless-sync-delay": "0"}
    primary, replica = (new_server(kind, appendonly=True, options=at_once) for _ in range(2))
    async with reached(primary) as one, reached(replica) as two:
        first = await identity(one)
        assert (first.role, first.address) == ("master", f"127.0.0.1:{primary.port}")
        assert (len(first.run_id), len(first.master_replid), first.master_replid2) == (40, 40, "")

        follow(replica, primary)
        watched = await identity(one)
        assert changed(first, watched, 0.0) == "same", "a first replica is no other history"

        primary.kill()
        primary.start()
        with pytest.raises(UnavailableError):
            await identity(one)
        restarted = await identity(one)
        assert changed(watched, restarted, 60.0) == "restarted"
        assert changed(watched, restarted._replace(uptime_s=5), 1.0) == "another", "it ran while the old one answered"

        with replica.client() as there:
            wait_until(lambda: there.info("replication")["master_link_status"] == "up", "no replication")
            there.replicaof("NO", "ONE")
        promoted = await identity(two)
        assert promoted.master_replid2 == (await identity(one)).master_replid
        young = promoted._replace(address=restarted.address, uptime_s=0)
        assert changed(await identity(one), young, 60.0) == "another", "behind a virtual address and just started"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_primary_that_followed_another_for_a_while_is_not_the_same(kind: Kind, new_server: NewServer) -> None:
    one, two = new_server(kind), new_server(kind)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(reached(one))
        before = await identity(client)
        follow(one, two)
        assert changed(before, await identity(client), 0.0) == "another", "it is a replica now"
        with one.client() as there:
            there.replicaof("NO", "ONE")
        after = await identity(client)
        assert (after.run_id, after.role) == (before.run_id, "master")
        assert changed(before, after, 0.0) == "another"
