"""The whole gate: a real daemon, a real server, the exchange over HTTP, and clients as they exist in the wild."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.request import urlopen

import httpx
import pytest
import redis

from governor.binance import sign
from governor.gate import PermitDenied, PermitGate
from governor.sim.apply_layer import result_fields
from governor.sim.exchange import ExchangeSim
from tests.conftest import NewServer
from tests.daemon import Daemon, daemon, events_of, publish, wait_for
from tests.servers import RedisServer

KEY, SECRET = "test-key", "test-secret"
CREDENTIALS = {"BINANCE_TESTNET_API_KEY": KEY, "BINANCE_TESTNET_API_SECRET": SECRET}
T = TypeVar("T")


class Exchange:
    """The simulator in a thread of its own, since daemon and clients are elsewhere."""

    def __init__(self, **options: Any) -> None:
        self._options = {"api_key": KEY, "api_secret": SECRET} | options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        self.sim = self.call(self._open)
        self.base_url = self.sim.base_url
        return self

    def __exit__(self, *_: object) -> None:
        self.call(lambda: self.sim.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> ExchangeSim:
        return await ExchangeSim(**self._options).__aenter__()

    def call(self, work: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(10)

    def set(self, symbol: str, amount: str, price: str) -> None:
        self.sim.set_position(symbol, amount)
        self.sim.set_price(symbol, price)


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    with Exchange() as one:
        one.set("BTCUSDT", "0.020", "95033.33333333")
        one.set("ETHUSDT", "-0.5", "2000")
        yield one


def legacy_client(client: redis.Redis, plan_id: str, symbol: str, base_url: str) -> dict[str, Any] | None:
    """The client in the wild: publishes, pings the exchange and reads its position over new connections, then does
    GET and DEL once. No waiting, no retry. Returns the permit it would execute, or None where it blocks."""
    publish(client, plan_id, symbol, "PARTIAL_75")
    with urlopen(f"{base_url}/fapi/v1/ping", timeout=5) as answer:  # noqa: S310 - loopback
        answer.read()
    query = f"symbol={symbol}&timestamp={int(time.time() * 1000)}"
    headers = {"X-MBX-APIKEY": KEY}
    httpx.get(f"{base_url}/fapi/v2/positionRisk?{query}&signature={sign(SECRET, query)}", headers=headers)
    permit_key = f"quantum:permit:{plan_id}"
    permit_data: Any = client.get(permit_key)
    if not permit_data:
        return None
    permit: dict[str, Any] = json.loads(permit_data)
    if not permit.get("granted") or permit.get("consumed"):
        return None
    client.delete(permit_key)
    f"qty={permit['computed_qty']:.4f}, notional=${permit['computed_notional']:.2f}"  # what its log line formats
    return permit


def test_the_client_in_the_wild_executes_on_its_first_try_every_time(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with Exchange(latency_s=0.03) as exchange:
        symbols = [f"S{n}USDT" for n in range(20)]
        for symbol in symbols:
            exchange.set(symbol, "0.020", "95033.33333333")
        limits = {"GOV_MAX_REDUCE_QTY_PER_DAY": "off"}
        with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS | limits):
            permits = [legacy_client(client, f"plan-{s}", s, exchange.base_url) for s in symbols]
    assert [permit is not None for permit in permits] == [True] * 20
    assert {(p["computed_qty"], p["computed_notional"]) for p in permits if p} == {(0.015, 1425.5)}


def test_the_requirements_example_gives_those_digits_in_the_permit(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS):
        publish(client, "plan-1", "BTCUSDT", "PARTIAL_75")
        raw: Any = wait_for(lambda: client.get("quantum:permit:plan-1"))
        ttl: Any = client.ttl("quantum:permit:plan-1")
    assert '"computed_qty":0.015,"computed_notional":1425.5,' in raw
    permit = json.loads(raw)
    assert permit.keys() == {
        "granted", "symbol", "decision", "computed_qty", "computed_notional", "created_at", "consumed", "plan_id",
        "expires_at", "epoch", "seq",
    }  # fmt: skip
    assert 58 <= ttl <= 60
    assert permit["expires_at"] - permit["created_at"] == pytest.approx(60)


def test_a_burst_disarms_the_file_and_the_service_and_a_person_arms_again(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS) as one:
        for n in range(3):
            publish(client, f"eth-{n}", "ETHUSDT")
        (done,) = wait_for(lambda: events_of(client, "AUTO_DISARM"))
        assert done["reason"] == "burst_limit_breach"
        assert done["context"] == {"symbol": "ETHUSDT", "exec_5min": 3, "limit": 2}
        assert done["action_taken"] == "APPLY_MODE=dry_run + restart"
        assert not list(client.scan_iter("quantum:permit:*"))
        assert one.config.read_text() == "# how the Apply Layer runs\nAPPLY_MODE=dry_run\nOTHER=1\n"
        assert [call for call in one.systemctl_calls if call.startswith("restart")] == [
            "restart quantum-apply-layer.service"
        ]
        assert len(list(one.config.parent.glob("apply-layer.env.bak.*"))) == 1
        status = one.command("status", "--json")
        assert status.returncode == 3
        assert json.loads(status.stdout)["state"] == "DISARMED"
        assert "DISARMED" in one.command("status").stdout

        publish(client, "eth-9", "ETHUSDT")
        block: Any = wait_for(lambda: client.get("quantum:governor:block:eth-9"))
        assert json.loads(block)["reason"] == "disarmed"

        armed = one.command("rearm", "--reason", "looked at it", "--json", SUDO_USER="alice")
        assert armed.returncode == 0, armed.stderr
        assert not list(client.scan_iter("quantum:governor:disarm:*"))
        (event,) = events_of(client, "REARMED")
        assert (event["operator"], event["reason"], event["epoch"]) == ("alice", "looked at it", 3)
        publish(client, "btc-9", "BTCUSDT")
        gate = PermitGate(client)
        permit = gate.consume("btc-9", symbol="BTCUSDT")
        assert (permit.plan_id, permit.epoch) == ("btc-9", 3)


def test_an_entry_that_is_no_utf8_and_one_with_no_fields_of_ours_do_not_stop_the_next_plan(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS) as one:
        client.xadd("quantum:stream:apply.plan", {"plan_id": b"\xff\xfe", "decision": "EXECUTE"})
        client.xadd("quantum:stream:apply.plan", {"x": "y" * 1_000_000})
        publish(client, "nan", "BTCUSDT", kill_score="NaN")
        publish(client, "fine", "BTCUSDT")
        assert PermitGate(client).consume("fine", symbol="BTCUSDT").symbol == "BTCUSDT"
        wait_for(lambda: len(events_of(client, "PLAN_REJECTED")) == 3)
        block: Any = client.get("quantum:governor:block:nan")
        assert json.loads(block)["reason"] == "invalid_plan"
        pending: Any = client.xpending("quantum:stream:apply.plan", "governor")
        assert pending["pending"] == 0
        assert one.json("status")["counts"]["rejected"] == 3


def test_an_unused_permit_is_taken_back_and_a_used_one_is_seen(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(
        tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS, GOV_PERMIT_TTL_SEC="2"
    ) as one:
        publish(client, "left", "BTCUSDT")
        publish(client, "used", "ETHUSDT")
        PermitGate(client).consume("used", symbol="ETHUSDT")
        (expired,) = wait_for(lambda: events_of(client, "PERMIT_EXPIRED"))
        (consumed,) = wait_for(lambda: events_of(client, "PERMIT_CONSUMED"))
        assert (expired["plan_id"], consumed["plan_id"], consumed["source"]) == ("left", "used", "observed")
        symbols = one.json("status")["symbols"]
        assert symbols["ETHUSDT"]["exec_1h"]["used"] == 1
        assert "BTCUSDT" not in symbols or symbols["BTCUSDT"]["exec_1h"]["used"] == 0
        with pytest.raises(PermitDenied, match="left"):
            PermitGate(client).consume("left", symbol="BTCUSDT", wait_s=0)


def test_an_execution_nobody_permitted_disarms(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS) as one:
        result: Any = {"plan_id": "ghost", "symbol": "BTCUSDT", "decision": "EXECUTE", "executed": "True", "error": ""}
        client.xadd("quantum:stream:apply.result", result)
        (event,) = wait_for(lambda: events_of(client, "UNPERMITTED_EXECUTION"))
        assert event["plan_id"] == "ghost"
        wait_for(lambda: events_of(client, "AUTO_DISARM"))
        assert one.json("status")["reason"] == "unpermitted_execution"


def test_the_emergency_brake_blocks_at_once_and_becomes_a_disarm_by_hand(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS) as one:
        client.set("quantum:governor:halt", "funny prices")
        publish(client, "after", "BTCUSDT")
        (done,) = wait_for(lambda: events_of(client, "MANUAL_DISARM"))
        assert (done["reason"], done["operator"]) == ("funny prices", "redis")
        assert client.get("quantum:governor:halt") is None
        block: Any = wait_for(lambda: client.get("quantum:governor:block:after"))
        assert json.loads(block)["reason"] in ("halted", "disarmed")
        assert one.config.read_text().count("APPLY_MODE=dry_run") == 1


def test_a_disarm_that_fails_is_tried_again_until_it_is_proven(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port) as one:
        (tmp_path / "fails").write_text("1")
        assert one.command("disarm", "--reason", "drill").returncode == 1
        (failed, *_) = events_of(client, "DISARM_FAILED")
        assert (failed["step"], failed["attempt"]) == ("restart", 1)
        refused = one.command("rearm", "--reason", "too early")
        assert refused.returncode == 1
        assert "unfinished" in refused.stderr
        (tmp_path / "fails").write_text("0")
        (done,) = wait_for(lambda: events_of(client, "MANUAL_DISARM"), within_s=20)
        assert done["operator"] == "tester"
        assert len(list(one.config.parent.glob("apply-layer.env.bak.*"))) == 1


def test_a_disarm_by_hand_works_without_a_daemon(flushed: RedisServer, client: redis.Redis, tmp_path: Path) -> None:
    with daemon(tmp_path, port=flushed.port) as one:
        assert one.stop()[0] == 0
        told = one.command("disarm", "--reason", "night", "--json")
        assert told.returncode == 0, told.stderr
        assert json.loads(told.stdout)["done"] is True
        assert [e["event"] for e in events_of(client)][-2:] == ["DISARM_STARTED", "MANUAL_DISARM"]
        assert "APPLY_MODE=dry_run" in one.config.read_text()
        again = one.command("disarm", "--reason", "again")
        assert again.returncode == 0
        assert len(events_of(client, "DISARM_STARTED")) == 1
        assert client.get("quantum:governor:halt") is None


def test_a_disarm_by_hand_works_without_redis_and_becomes_events_later(new_server: NewServer, tmp_path: Path) -> None:
    own_server = new_server("valkey", appendonly=True)
    with daemon(tmp_path, port=own_server.port) as one:
        own_server.kill()
        told = one.command("disarm", "--reason", "redis is gone")
        assert told.returncode == 4, told.stderr
        assert "APPLY_MODE=dry_run" in one.config.read_text()
        own_server.restart()
        with own_server.client() as client:
            (done,) = wait_for(lambda: events_of(client, "MANUAL_DISARM"), within_s=20)
            assert (done["reason"], done["operator"]) == ("redis is gone", "tester")
            assert [call for call in one.systemctl_calls if call.startswith("restart")] == [
                "restart quantum-apply-layer.service"
            ]


def test_a_stop_is_quick_and_clean_and_the_next_start_goes_on(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS) as one:
        publish(client, "before", "BTCUSDT")
        PermitGate(client).consume("before", symbol="BTCUSDT")
        code, seconds = one.stop()
        assert (code, seconds < 3) == (0, True)
        publish(client, "meanwhile", "BTCUSDT")
        one.start()
        assert PermitGate(client).consume("meanwhile", symbol="BTCUSDT").plan_id == "meanwhile"
        assert len(events_of(client, "DECISION")) == 2


def test_killed_at_any_moment_no_plan_is_decided_twice_and_none_is_lost(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS) as one:
        for round_ in range(4):
            for n in range(60):
                publish(client, f"plan-{round_}-{n}", "BTCUSDT", "UPDATE_SL")
            wait_for(lambda: len(events_of(client, "DECISION")) > 60 * round_ + 5 * round_)  # noqa: B023
            one.kill()
            one.start()
        wait_for(lambda: len(events_of(client, "DECISION")) == 240)
        decided = [event["plan_id"] for event in events_of(client, "DECISION")]
        assert len(decided) == len(set(decided)) == 240
        assert [e["seq"] for e in events_of(client)] == list(range(1, len(events_of(client)) + 1))


def test_ten_thousand_plans_waiting_are_worked_off_in_order_with_bounded_memory(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    symbols = [f"S{n}USDT" for n in range(50)]
    for symbol in symbols:
        exchange.set(symbol, "1", "1")
    pipe = client.pipeline(transaction=False)
    for n in range(10_000):
        publish(pipe, f"p{n}", symbols[n % 50], "PARTIAL_25" if n % 3 else "UPDATE_SL")
    pipe.execute()
    began = time.monotonic()
    with daemon(
        tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS, GOV_DISARM_ON_BURST_BREACH="false"
    ) as one:
        wait_for(lambda: one.json("status")["counts"]["plans"] == 10_000, within_s=60)
        seconds = time.monotonic() - began
        assert one.process is not None
        pages = int(Path(f"/proc/{one.process.pid}/statm").read_text().split()[1])
    order: dict[str, list[int]] = {}
    for event in events_of(client, "DECISION"):
        order.setdefault(event["symbol"], []).append(int(event["plan_id"][1:]))
    assert sum(map(len, order.values())) == 10_000
    assert all(decided == sorted(decided) for decided in order.values())
    assert pages * os.sysconf("SC_PAGE_SIZE") < 300 * 2**20
    assert seconds < 60


def test_two_governors_on_one_stream_decide_every_plan_once(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    first = daemon(tmp_path / "a", port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS)
    second = daemon(tmp_path / "b", port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with first, second:
        with ThreadPoolExecutor(4) as pool:
            for n in range(200):
                pool.submit(publish, client, f"plan-{n}", f"S{n % 7}USDT", "UPDATE_SL")
        wait_for(lambda: len(events_of(client, "DECISION")) == 200)
    decided = [event["plan_id"] for event in events_of(client, "DECISION")]
    assert len(set(decided)) == 200


def test_the_http_routes_tell_the_truth(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS) as one:
        publish(client, "one", "BTCUSDT")
        PermitGate(client).consume("one", symbol="BTCUSDT")
        publish(client, "two", "BTCUSDT", "NOBODY_KNOWS")
        wait_for(lambda: client.get("quantum:governor:block:two"))
        text = one.http("/metrics")
        assert 'quantum_govern_allow_total{symbol="BTCUSDT"} 1.0' in text
        assert 'quantum_govern_block_total{reason="unknown_action",symbol="BTCUSDT"} 1.0' in text
        assert 'quantum_govern_exec_count_hour{symbol="BTCUSDT"} 1.0' in text
        assert 'quantum_govern_exec_count_5min{symbol="BTCUSDT"} 1.0' in text
        assert 'quantum_govern_state{state="ARMED"} 1.0' in text
        assert "alive" in one.http("/healthz")
        assert one.readiness()["ready"] is True


def test_the_commands_answer_in_json(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS) as one:
        publish(client, "one", "BTCUSDT", "PARTIAL_75")
        PermitGate(client).consume("one", symbol="BTCUSDT")
        told = one.json("explain", "one")
        assert told["decision"]["verdict"] == "EXECUTE"
        assert told["market"]["mark_price"] == 95033.33333333
        assert told["decision"]["checks"][0]["gate"] == "history"
        assert told["permit"]["status"] == "outstanding"
        assert "PARTIAL_75" in one.command("explain", "one").stdout
        unknown = one.command("explain", "nobody", "--json")
        assert (unknown.returncode, json.loads(unknown.stdout)["known"]) == (1, False)
        assert [e["event"] for e in one.json("events", "--plan", "one")] == ["PLAN_RECEIVED", "DECISION"]
        audit = one.json("replay")
        assert (audit["decisions"], audit["differences"], audit["chain"]) == (1, [], "ok")
        assert one.command("replay", "--expect-head", "1:00").returncode == 3
        assert one.json("replay", "--at-seq", "1")["status"]["state"] == "ARMED"
        assert one.json("settings")["settings"]["BINANCE_TESTNET_API_SECRET"] == "(set)"
        assert SECRET not in one.log + one.command("settings").stdout + one.command("events").stdout
        assert one.json("status").keys() >= {"state", "since", "reason", "epoch", "seq", "symbols"}


def test_the_exit_codes_are_those_of_the_contract(flushed: RedisServer, tmp_path: Path) -> None:
    with daemon(tmp_path, port=flushed.port) as one:
        assert one.command("status").returncode == 0
        assert one.command("disarm").returncode == 2
        assert one.command("rearm").returncode == 2
        assert one.command("status", REDIS_PORT="1").returncode == 4
        wrong = one.command("run", GOV_MAX_EXEC_PER_HOUR="many")
        assert wrong.returncode == 78
        assert "GOV_MAX_EXEC_PER_HOUR" in wrong.stderr
        assert "'many'" in wrong.stderr
        assert one.command("run", METRICS_HOST="127.0.0.1", METRICS_PORT=str(flushed.port)).returncode == 78


def test_the_daemon_waits_for_redis_instead_of_ending(new_server: NewServer, tmp_path: Path) -> None:
    own_server = new_server("valkey", appendonly=True)
    own_server.kill()
    with daemon(tmp_path, port=own_server.port, ready=False) as one:
        wait_for(lambda: "waiting for the event store" in one.log)
        own_server.restart()
        wait_for(lambda: '"ready"' in one.log)
        with own_server.client() as client:
            publish(client, "late", "BTCUSDT", "UPDATE_SL")
            assert PermitGate(client).consume("late", symbol="BTCUSDT", wait_s=5).plan_id == "late"
            own_server.kill()
            own_server.restart()
            publish(client, "later", "BTCUSDT", "UPDATE_SL")
            wait_for(lambda: client.get("quantum:permit:later"), within_s=15)


def test_a_missing_state_key_comes_back_within_a_second(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port):
        client.delete("quantum:governor:state")
        raw: Any = wait_for(lambda: client.get("quantum:governor:state"), within_s=1.0)
        assert json.loads(raw).keys() == {"state", "since", "reason", "epoch", "seq"}


def result(client: redis.Redis, plan_id: str, symbol: str, qty: str) -> None:
    fields: Any = result_fields(
        {"plan_id": plan_id, "symbol": symbol}, executed=True, qty=qty, error="", now=time.time()
    )
    client.xadd("quantum:stream:apply.result", fields)


def test_an_execution_whose_permit_was_taken_before_the_disarm_is_no_accusation(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS) as one:
        for n in range(2):
            publish(client, f"eth-{n}", "ETHUSDT")
            PermitGate(client).consume(f"eth-{n}", symbol="ETHUSDT")
        publish(client, "eth-2", "ETHUSDT")
        wait_for(lambda: events_of(client, "AUTO_DISARM"))
        assert one.command("rearm", "--reason", "looked at it").returncode == 0
        for n in range(2):
            result(client, f"eth-{n}", "ETHUSDT", "0.125")
        wait_for(lambda: len(events_of(client, "EXECUTION")) == 2)
        told = events_of(client, "EXECUTION")
        assert [event["permit"] for event in told] == ["consumed", "consumed"]
        assert events_of(client, "UNPERMITTED_EXECUTION") == []
        status = one.json("status")
        assert (status["state"], status["counts"]["consumed"], status["counts"]["revoked"]) == ("ARMED", 2, 0)
        assert one.json("replay")["differences"] == []


def test_the_brake_does_not_wait_behind_the_plans(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    pipe = client.pipeline(transaction=False)
    for n in range(8_000):
        publish(pipe, f"p{n}", f"S{n % 40}USDT", "UPDATE_SL")
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=CREDENTIALS):
        pipe.execute()
        wait_for(lambda: client.xlen("quantum:stream:governor.events") > 500)
        client.set("quantum:governor:halt", "now")
        wait_for(lambda: client.exists("quantum:governor:halt") == 0)
        wait_for(lambda: len(events_of(client, "DECISION")) == 8_000, within_s=40)
    (started,) = events_of(client, "DISARM_STARTED")
    after = [event for event in events_of(client, "DECISION") if event["seq"] > started["seq"]]
    assert len(after) > 1_000, "the disarm came before the plans that were waiting already"


def test_a_disarm_is_carried_out_although_redis_hangs(new_server: NewServer, tmp_path: Path) -> None:
    server = new_server("valkey", appendonly=True)
    with daemon(tmp_path, port=server.port) as one, server.client() as client:
        (tmp_path / "fails").write_text("1")
        client.set("quantum:governor:halt", "stop")
        wait_for(lambda: events_of(client, "DISARM_FAILED"))
        assert one.process is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            (tmp_path / "fails").write_text("0")
            before = len(one.systemctl_calls)
            wait_for(lambda: any(call.startswith("restart") for call in one.systemctl_calls[before:]), within_s=20)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        wait_for(lambda: events_of(client, "MANUAL_DISARM"), within_s=20)


def test_a_log_whose_reader_is_gone_does_not_stop_a_disarm(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    one = Daemon(tmp_path, port=flushed.port, environ={})
    process = subprocess.Popen([sys.executable, "-m", "governor", "run"], env=one.environ, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        wait_for(lambda: client.exists("quantum:governor:state"))
        process.stderr.close()
        client.set("quantum:governor:halt", "[" * 100_000)  # nor does a value made to hurt
        (done,) = wait_for(lambda: events_of(client, "MANUAL_DISARM"))
        assert done["operator"] == "redis"
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_where_no_daemon_ever_ran_nothing_is_claimed_and_a_blank_reason_is_none(
    flushed: RedisServer, tmp_path: Path
) -> None:
    one = Daemon(tmp_path, port=flushed.port, environ={})
    told = one.command("status", "--json")
    assert (told.returncode, json.loads(told.stdout)["state"]) == (3, None)
    assert "no daemon has ever run here" in one.command("status").stdout
    assert one.command("rearm", "--reason", "x").returncode == 1
    assert one.command("disarm", "--reason", "  ").returncode == 2
    assert one.command("events", "--name", "NOPE").returncode == 2
    assert one.command("disarm", "--reason", "a wrong limit does not matter", GOV_MAX_EXEC_PER_HOUR="x").returncode == 0
    assert "APPLY_MODE=dry_run" in one.config.read_text()


def test_systemd_is_told_ready_alive_what_the_state_is_and_that_it_stops(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        with daemon(tmp_path, port=flushed.port, NOTIFY_SOCKET=str(tmp_path / "notify")) as one:
            told = ""
            while "READY=1" not in told or "WATCHDOG=1" not in told or "STATUS=ARMED epoch=1" not in told:
                told += systemd.recv(4096).decode() + "\n"
            client.set("quantum:governor:halt", "for a test")
            while "STATUS=DISARMED epoch=2 reason=for a test" not in told:
                told += systemd.recv(4096).decode() + "\n"
            one.stop()
            while "STOPPING=1" not in told:
                told += systemd.recv(4096).decode() + "\n"
