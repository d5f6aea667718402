"""A server that dies, hangs, refuses or forgets, under a real daemon: no plan is decided twice, and none is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import redis

from tests.conftest import NewServer
from tests.daemon import daemon, events_of, publish, wait_for
from tests.proxy import How, Proxy
from tests.servers import KINDS, Kind, RedisServer

OPEN = {
    "GOV_FALLBACK_QTY": "0.001",
    "GOV_MAX_EXEC_PER_HOUR": "off",
    "GOV_MAX_EXEC_PER_5MIN": "off",
    "GOV_MAX_REDUCE_QTY_PER_DAY": "off",
}
"""Nothing is blocked but for what is tested."""


@contextmanager
def kept(new_server: NewServer, kind: Kind, fsync: Literal["always", "everysec"] = "everysec") -> Iterator[RedisServer]:
    yield new_server(kind, appendonly=True, appendfsync=fsync)


def decided(client: redis.Redis, *plan_ids: str) -> None:
    """Every one of them was decided, once."""

    def all_there() -> bool:
        try:
            return set(plan_ids) <= {event["plan_id"] for event in events_of(client, "DECISION")}
        except redis.RedisError:
            return False

    wait_for(all_there, within_s=20, what="every plan decided")
    counted = Counter(event["plan_id"] for event in events_of(client, "DECISION"))
    assert {counted[plan_id] for plan_id in plan_ids} == {1}


def published(client: redis.Redis, plan_id: str, symbol: str) -> None:
    """Publish, however often it takes: the producer's own persistence."""

    def accepted() -> bool:
        with suppress(redis.RedisError):
            publish(client, plan_id, symbol)
            return True
        return False

    wait_for(accepted, within_s=15, what=f"{plan_id} published")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fsync", ["everysec", "always"])
def test_a_server_killed_at_any_moment_loses_no_plan_and_none_is_decided_twice(
    new_server: NewServer, tmp_path: Path, kind: Kind, fsync: Literal["always", "everysec"]
) -> None:
    chance = random.Random(7)  # noqa: S311
    with (
        kept(new_server, kind, fsync) as server,
        server.client() as client,
        daemon(tmp_path, port=server.port, environ=OPEN) as one,
    ):
        plans = [f"p{number}" for number in range(60)]
        kills = set(chance.sample(range(60), 3))
        for number, plan_id in enumerate(plans):
            published(client, plan_id, f"S{number % 9}USDT")
            if number in kills:
                server.kill()
                server.start()
        written = {fields["plan_id"] for _, fields in client.xrange("quantum:stream:apply.plan")}  # type: ignore[union-attr, index]
        # With everysec a server answers before it has written, while a flush takes its time.
        assert fsync == "everysec" or written == set(plans), "the server itself kept them"
        plans = [plan_id for plan_id in plans if plan_id in written]
        first = {event["plan_id"]: event["verdict"] for event in reversed(events_of(client, "DECISION"))}
        wait_for(lambda: set(plans) <= {event["plan_id"] for event in events_of(client, "DECISION")}, within_s=20)
        granted = Counter(e["plan_id"] for e in events_of(client, "DECISION") if e["verdict"] == "EXECUTE")
        assert set(granted.values()) <= {1}
        # A commit that was under way may have been seen before the kill; it counts as made, and permits are held back.
        assert all(event["events"] <= 200 for event in events_of(client, "HISTORY_RESTORED"))
        assert first.items() <= {e["plan_id"]: e["verdict"] for e in reversed(events_of(client, "DECISION"))}.items()
        assert one.json("replay")["differences"] == []


@pytest.mark.parametrize("how", get_args(How))
def test_a_commit_whose_connection_breaks_is_made_once(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path, how: How
) -> None:
    with Proxy(flushed.port) as proxy, daemon(tmp_path, port=proxy.port, environ=OPEN) as one:
        publish(client, "before", "BTCUSDT")
        decided(client, "before")
        trip = proxy.trip(b'"plan_id":"broken"', how)
        publish(client, "broken", "ETHUSDT")
        trip.wait()
        if how in ("late", "hold", "stall"):
            publish(client, "meanwhile", "SOLUSDT")
        if how == "late":
            decided(client, "broken")
        trip.release()
        publish(client, "after", "XRPUSDT")
        decided(client, "before", "broken", "after")
        assert one.json("replay")["differences"] == []


def test_a_server_that_hangs_is_waited_for(own_server: RedisServer, tmp_path: Path) -> None:
    with own_server.client() as client, daemon(tmp_path, port=own_server.port, environ=OPEN) as one:
        publish(client, "a", "BTCUSDT")
        decided(client, "a")
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            wait_for(lambda: not one.readiness()["ready"], what="not ready")
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        publish(client, "b", "ETHUSDT")
        decided(client, "a", "b")
        wait_for(lambda: one.readiness()["ready"])
        assert one.json("replay")["differences"] == []


def test_out_of_memory_grants_nothing_and_goes_on_when_there_is_some(own_server: RedisServer, tmp_path: Path) -> None:
    with own_server.client() as client, daemon(tmp_path, port=own_server.port, environ=OPEN) as one:
        publish(client, "a", "BTCUSDT")
        publish(client, "b", "ETHUSDT")
        decided(client, "a", "b")
        publish(client, "c", "SOLUSDT")
        client.config_set("maxmemory", 1)
        client.delete("quantum:governor:state")  # which is to be written again, whether or not the plan was in time
        wait_for(lambda: not one.readiness()["ready"], what="not ready")
        assert "OOM" in one.readiness()["problems"][0] or "maxmemory" in one.readiness()["problems"][0]
        client.config_set("maxmemory", 0)
        decided(client, "a", "b", "c")
        wait_for(lambda: one.readiness()["ready"])


def test_a_demoted_server_grants_nothing_and_goes_on_once_it_is_primary_again(
    own_server: RedisServer, tmp_path: Path
) -> None:
    with own_server.client() as client, daemon(tmp_path, port=own_server.port, environ=OPEN) as one:
        publish(client, "a", "BTCUSDT")
        decided(client, "a")
        publish(client, "b", "ETHUSDT")
        client.replicaof("127.0.0.1", 1)
        wait_for(lambda: not one.readiness()["ready"], what="not ready")
        client.replicaof("NO", "ONE")
        wait_for(lambda: one.readiness()["ready"], what="ready")
        publish(client, "c", "SOLUSDT")
        decided(client, "a", "b", "c")


def test_a_name_that_leads_to_another_primary_is_followed_though_the_one_before_lets_no_connection_go(
    new_server: NewServer, tmp_path: Path
) -> None:
    before, after = new_server(), new_server()
    with (
        before.client() as old,
        after.client() as new,
        Proxy(before.port) as name,
        daemon(tmp_path, port=name.port, environ=OPEN),
    ):
        publish(old, "a", "BTCUSDT")
        decided(old, "a")
        new.replicaof(before.host, str(before.port))
        wait_for(lambda: new.exists("quantum:permit:a"), what="a replica")
        new.replicaof("NO", "ONE")
        old.replicaof(after.host, str(after.port))
        name.upstream = after.port
        publish(new, "b", "ETHUSDT")
        decided(new, "a", "b")


def test_a_server_that_forgets_the_scripts_is_given_them_again(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, environ=OPEN):
        publish(client, "a", "BTCUSDT")
        decided(client, "a")
        client.script_flush()
        publish(client, "b", "ETHUSDT")
        wait_for(lambda: client.exists("quantum:permit:b"))


def test_a_group_somebody_deleted_is_made_again_and_no_plan_is_decided_twice(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, environ=OPEN) as one:
        for number in range(10):
            publish(client, f"p{number}", "BTCUSDT", "UPDATE_SL")
        decided(client, *(f"p{number}" for number in range(10)))
        client.xgroup_destroy("quantum:stream:apply.plan", "governor")
        publish(client, "after", "ETHUSDT")
        decided(client, "after", *(f"p{number}" for number in range(10)))
        assert one.json("replay")["differences"] == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "aof_enabled"),
        ({"appendonly": True, "options": {"maxmemory-policy": "allkeys-lru"}}, "maxmemory_policy"),
    ],
)
def test_a_server_that_may_lose_what_it_was_told_is_told_of_and_refused_where_it_has_to_last(
    new_server: NewServer, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    server = new_server("valkey", **options)
    with daemon(tmp_path, port=server.port, environ=OPEN) as one:
        assert "the server may lose what it was told" in one.log
        assert named in one.log
        one.kill()
        done = subprocess.run(
            [sys.executable, "-m", "governor", "run"],
            env=one.environ | {"GOV_REQUIRE_DURABLE": "true"},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 78
        assert named in done.stdout + done.stderr


def test_a_server_that_lasts_is_accepted(new_server: NewServer, tmp_path: Path) -> None:
    with (
        kept(new_server, "valkey") as server,
        server.client() as client,
        daemon(tmp_path, port=server.port, environ=OPEN | {"GOV_REQUIRE_DURABLE": "true"}),
    ):
        publish(client, "a", "BTCUSDT")
        decided(client, "a")
