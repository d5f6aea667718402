"""The public keys, written again from the events, on a real server beside a live daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from governor.gate import PermitGate
from tests.daemon import Daemon, daemon, events_of, publish, wait_for
from tests.servers import RedisServer


@pytest.fixture
def one(flushed: RedisServer, client: redis.Redis, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with some history: two executions counted, a permit outstanding."""
    with daemon(tmp_path, port=flushed.port, GOV_FALLBACK_QTY="0.001") as running:
        for plan_id, symbol in (("a", "BTCUSDT"), ("b", "BTCUSDT"), ("c", "ETHUSDT")):
            publish(client, plan_id, symbol, "PARTIAL_50")
            wait_for(lambda: client.exists(f"quantum:permit:{plan_id}"))  # noqa: B023
        PermitGate(client).consume("a", symbol="BTCUSDT")
        yield running


def public(client: redis.Redis) -> dict[str, Any]:
    names: Any = [*client.scan_iter("quantum:governor:*"), *client.scan_iter("quantum:permit:*")]
    return {
        name: client.lrange(name, 0, -1) if client.type(name) == "list" else client.get(name)
        for name in sorted(names)
        if ":block:" not in name and not name.endswith(":lease")
    }


def test_nothing_differs_where_nothing_was_touched(one: Daemon) -> None:
    checked = one.command("rebuild", "--check", "--json")
    assert checked.returncode == 0, checked.stdout
    assert one.json("rebuild", "--check")["differences"] == []


def test_what_was_deleted_changed_or_made_up_is_named_and_mended_and_twice_is_once(
    one: Daemon, client: redis.Redis
) -> None:
    before = public(client)
    (day,) = {name.rpartition(":")[2] for name in before if ":daily:" in name}
    client.delete("quantum:governor:exec:BTCUSDT")
    client.set(f"quantum:governor:daily_qty:ETHUSDT:{day}", "999")
    client.set("quantum:governor:daily:DOGEUSDT:2020-01-01", "1")
    client.hset("quantum:governor:exec:XRPUSDT", "not", "a list")
    checked = one.command("rebuild", "--check", "--json")
    assert checked.returncode == 3
    assert client.exists("quantum:governor:daily:DOGEUSDT:2020-01-01"), "a check writes nothing"
    told = one.json("rebuild")
    assert {d["key"]: d["expected"] is None for d in told["differences"]} == {
        "quantum:governor:exec:BTCUSDT": False,
        f"quantum:governor:daily_qty:ETHUSDT:{day}": False,
        "quantum:governor:daily:DOGEUSDT:2020-01-01": True,
        "quantum:governor:exec:XRPUSDT": True,
    }
    assert told["keys_written"] == 4
    assert public(client) == before
    assert one.json("rebuild") == {"events": told["events"], "keys_written": 0, "differences": []}


def test_a_permit_is_never_written_and_no_event_either(one: Daemon, client: redis.Redis) -> None:
    seen = len(events_of(client))
    client.delete("quantum:permit:b", "quantum:governor:exec:ETHUSDT")
    one.json("rebuild")
    assert not client.exists("quantum:permit:b")
    assert client.exists("quantum:permit:c")
    assert len(events_of(client)) == seen


def test_the_disarm_of_today_comes_back(one: Daemon, client: redis.Redis) -> None:
    assert one.command("disarm", "--reason", "drill").returncode == 0
    (name,) = client.scan_iter("quantum:governor:disarm:*")
    was = client.get(name)
    client.delete(name, "quantum:governor:state")
    assert one.command("rebuild").returncode == 0
    assert client.get(name) == was
