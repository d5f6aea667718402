"""Several governors on one stream: one is active, the others take over, and no promise rests on that."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.daemon import Daemon, events_of, publish, wait_for
from tests.servers import RedisServer

TAKEN_OVER_S = 3.0


@pytest.fixture
def both(flushed: RedisServer, tmp_path: Path) -> Iterator[list[Daemon]]:
    """Two daemons, as on two hosts; the first one is active."""
    environ = {"GOV_FALLBACK_QTY": "0.001", "GOV_MAX_EXEC_PER_HOUR": "off", "GOV_MAX_REDUCE_QTY_PER_DAY": "off"}
    found = [Daemon(tmp_path / name, port=flushed.port, environ=environ) for name in ("first", "second")]
    for one in found:
        one.home.mkdir(exist_ok=True)
    try:
        for one in found:
            one.start()
        yield found
    finally:
        for one in found:
            if one.process is not None and one.process.poll() is None:
                one.process.send_signal(signal.SIGCONT)
            one.kill()


def decided(client: redis.Redis, plan_id: str) -> dict[str, Any]:
    found = wait_for(lambda: [d for d in events_of(client, "DECISION") if d["plan_id"] == plan_id], what=plan_id)
    assert len(found) == 1
    return found[0]


def test_one_is_active_and_the_other_follows_and_says_so(both: list[Daemon], client: redis.Redis) -> None:
    publish(client, "a", "BTCUSDT")
    assert decided(client, "a")["verdict"] == "EXECUTE"
    first, second = both[0].readiness(), both[1].readiness()
    assert (first["active"], second["active"], second["ready"]) == (True, False, True)
    assert any("standby" in note for note in second["notes"])
    assert len(events_of(client, "SETTINGS_LOADED")) == 1, "a standby's settings are not in force"
    assert '"decided"' not in both[1].log
    lease = json.loads(str(client.get("quantum:governor:lease")))
    assert lease["epoch"] == 1


def test_a_standby_takes_over_within_the_lease_of_a_kill(both: list[Daemon], client: redis.Redis) -> None:
    publish(client, "a", "BTCUSDT")
    decided(client, "a")
    both[0].kill()
    began = time.monotonic()
    publish(client, "b", "ETHUSDT")
    assert decided(client, "b")["verdict"] == "EXECUTE"
    assert time.monotonic() - began < TAKEN_OVER_S + 1, "within the lease, and what this machine needs"
    assert len(events_of(client, "SETTINGS_LOADED")) == 2
    publish(client, "a", "BTCUSDT")
    wait_for(lambda: [d for d in events_of(client, "DECISION") if d["reason"] == "duplicate_plan"])
    both[0].start()
    wait_for(lambda: not both[0].readiness()["active"])
    assert both[1].json("replay")["differences"] == []


def test_an_orderly_stop_hands_over_at_once(both: list[Daemon], client: redis.Redis) -> None:
    both[0].stop()
    began = time.monotonic()
    wait_for(lambda: both[1].readiness()["active"])
    assert time.monotonic() - began < TAKEN_OVER_S / 2


def test_one_that_was_stopped_past_its_lease_and_wakes_up_grants_nothing_twice(
    both: list[Daemon], client: redis.Redis
) -> None:
    first = both[0].process
    assert first is not None
    for number in range(40):
        publish(client, f"p{number}", f"S{number % 8}USDT", "UPDATE_SL")
        if number == 20:
            os.kill(first.pid, signal.SIGSTOP)  # in the middle of whatever it does
    wait_for(lambda: len(events_of(client, "DECISION")) == 40, what="every plan decided by the other one")
    os.kill(first.pid, signal.SIGCONT)
    for number in range(40, 60):
        publish(client, f"p{number}", f"S{number % 8}USDT", "UPDATE_SL")
    wait_for(lambda: len(events_of(client, "DECISION")) >= 60)
    wait_for(lambda: not both[0].readiness()["active"])
    verdicts = Counter((d["plan_id"], d["verdict"]) for d in events_of(client, "DECISION"))
    assert all(count == 1 for count in verdicts.values()), "no plan was decided twice"
    assert both[1].json("replay")["differences"] == []


def test_the_standby_turns_the_brake_into_a_disarm_once_it_is_active_and_carries_it_out(
    both: list[Daemon], client: redis.Redis
) -> None:
    both[0].kill()
    client.set("quantum:governor:halt", "stop")
    wait_for(lambda: events_of(client, "MANUAL_DISARM"), what="the disarm proven")
    assert "APPLY_MODE=dry_run" in both[1].config.read_text()
    assert "APPLY_MODE=testnet" in both[0].config.read_text(), "each host has its own"
    assert not client.exists("quantum:governor:halt")


@pytest.mark.parametrize("restarted", [False, True], ids=["after it hung", "after it was started anew"])
def test_a_lost_history_is_written_back_by_the_governor_that_knows_its_end(
    both: list[Daemon], client: redis.Redis, *, restarted: bool
) -> None:
    first, second = both[0].process, both[1].process
    assert first is not None
    assert second is not None
    publish(client, "a", "BTCUSDT")
    decided(client, "a")
    second.send_signal(signal.SIGSTOP)
    publish(client, "b", "ETHUSDT")
    decided(client, "b")
    if restarted:
        both[0].kill()
    else:
        first.send_signal(signal.SIGSTOP)
    client.flushall()
    second.send_signal(signal.SIGCONT)
    wait_for(lambda: client.exists("quantum:governor:restorer"), what="the claim of the one that knows less")
    if restarted:
        both[0].start(ready=False)
    else:
        first.send_signal(signal.SIGCONT)
    wait_for(lambda: events_of(client, "HISTORY_RESTORED"), what="the history")
    assert [d["plan_id"] for d in events_of(client, "DECISION")][:2] == ["a", "b"]
    for one in both:
        wait_for(lambda: one.readiness()["ready"], what="ready")  # noqa: B023
        assert "quarantine" not in one.log
    assert len(events_of(client, "HISTORY_RESTORED")) == 1
    assert both[1].json("replay")["differences"] == []


def test_without_a_lease_any_number_is_safe(flushed: RedisServer, client: redis.Redis, tmp_path: Path) -> None:
    environ = {"GOV_FALLBACK_QTY": "0.001", "GOV_LEASE_SEC": "off"}
    many = [Daemon(tmp_path / str(number), port=flushed.port, environ=environ) for number in range(3)]
    try:
        for one in many:
            one.start()
        for number in range(30):
            publish(client, f"p{number}", f"S{number % 5}USDT", "UPDATE_SL")
        wait_for(lambda: len(events_of(client, "DECISION")) >= 30)
        verdicts = Counter(d["plan_id"] for d in events_of(client, "DECISION"))
        assert set(verdicts.values()) == {1}
        assert many[0].json("replay")["differences"] == []
    finally:
        for one in many:
            one.kill()
