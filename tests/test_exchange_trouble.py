"""The whole gate while the exchange is in trouble: what is decided, what is asked for, and what is left alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from governor.gate import PermitGate
from governor.sim.exchange import Fault, Faults, Request, Response
from tests.conftest import build
from tests.daemon import Daemon, daemon, events_of, publish, wait_for
from tests.proxy import Proxy
from tests.servers import Kind, RedisServer
from tests.test_end_to_end import CREDENTIALS, Exchange

V2, MARK = "/fapi/v2/positionRisk", "/fapi/v1/premiumIndex"
LIMITS = {"GOV_MAX_EXEC_PER_HOUR": "off", "GOV_MAX_EXEC_PER_5MIN": "off", "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "off"}
TROUBLED = {**CREDENTIALS, **LIMITS, "GOV_MAX_REDUCE_QTY_PER_DAY": "off", "BINANCE_TIMEOUT_SEC": "0.4"}
HALF = b'[{"symbol":"BTCUSDT","positionAmt":"0.0'


@pytest.fixture
def server(running_server: Callable[[Kind], RedisServer]) -> RedisServer:
    """One kind: the server has no part in what is held here."""
    return running_server("valkey")


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    with Exchange() as one:
        for symbol in ("BTCUSDT", "ETHUSDT"):
            one.set(symbol, "0.020", "1000")
        yield one


def on(path: str, symbol: str | None, fault: Response | Fault) -> Faults:
    """The fault for the requests of a path, and of a symbol unless that is None."""
    return lambda request: fault if request.path == path and (symbol is None or request.symbol == symbol) else None


def decision(client: redis.Redis, plan_id: str, *, within_s: float = 10.0) -> dict[str, Any]:
    """A plan's decision, once it is there."""
    told: dict[str, Any] = wait_for(
        lambda: next((e for e in events_of(client, "DECISION") if e["plan_id"] == plan_id), {}),
        within_s=within_s,
        what=f"the decision on {plan_id}",
    )
    return told


def blocked(told: dict[str, Any]) -> tuple[Any, ...]:
    return told["verdict"], told["reason"], told.get("position_error")


def asked(exchange: Exchange, *paths: str) -> list[Request]:
    return [request for request in list(exchange.sim.requests) if request.path in (paths or (V2, MARK))]


def errors(one: Daemon) -> tuple[str, int]:
    status = one.json("status")
    return status["state"], status["counts"]["errors"]


def test_while_one_symbol_hangs_the_others_are_permitted_and_it_is_blocked_when_its_time_is_over(
    server: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    exchange.sim.faults = on(V2, "BTCUSDT", Fault.HANG)
    patient = {**TROUBLED, "BINANCE_TIMEOUT_SEC": "1.5"}
    with daemon(tmp_path, port=server.port, base_url=exchange.base_url, environ=patient) as one:
        publish(client, "hangs", "BTCUSDT")
        wait_for(lambda: asked(exchange, V2))
        publish(client, "behind-it", "BTCUSDT")
        for n in range(5):
            publish(client, f"other-{n}", "ETHUSDT")
            assert PermitGate(client).consume(f"other-{n}", symbol="ETHUSDT").plan_id == f"other-{n}"
        assert not [e for e in events_of(client, "DECISION") if e["symbol"] == "BTCUSDT"], "it still hangs"
        assert blocked(decision(client, "hangs")) == ("BLOCK", "position_fetch_failed", "timeout")
        assert blocked(decision(client, "behind-it")) == ("BLOCK", "position_fetch_failed", "timeout")
        assert errors(one) == ("ARMED", 0)


def test_an_exchange_that_hangs_altogether_blocks_is_not_pressed_and_is_used_again_once_it_answers(
    server: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    symbols = [f"S{n}USDT" for n in range(30)]
    for symbol in symbols:
        exchange.set(symbol, "1", "10")
    with (
        Proxy(int(exchange.base_url.rpartition(":")[2])) as proxy,
        daemon(tmp_path, port=server.port, base_url=proxy.base_url, environ=TROUBLED) as one,
    ):
        proxy.stall()
        before = proxy.accepted
        for n in range(4):
            for symbol in symbols:
                publish(client, f"{symbol}-{n}", symbol)
        wait_for(lambda: len(events_of(client, "DECISION")) == 120, within_s=20)
        told = events_of(client, "DECISION")
        assert {blocked(each) for each in told} == {("BLOCK", "position_fetch_failed", "timeout")}
        assert proxy.accepted - before < 2.5 * 120, "two calls a plan, and some shared ones before"
        assert errors(one) == ("ARMED", 0)
        assert "alive" in one.http("/healthz")
        proxy.resume()
        publish(client, "after", "S1USDT")
        assert PermitGate(client).consume("after", symbol="S1USDT", wait_s=3).plan_id == "after"


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Response(200, HALF), "bad_response"),
        (Response(200, b"<html>maintenance</html>"), "bad_response"),
        (Response(200, b""), "bad_response"),
        (Response(200, b'{"positionAmt":"1"}'), "bad_response"),
        (Response(200, b"[]"), "bad_response"),
        (Response(200, b"\xff\xfe[]"), "bad_response"),
        (Response(200, b'[{"symbol":"BTCUSDT","positionSide":"BOTH","positionAmt":"NaN"}]'), "bad_response"),
        (Response(503, b"Service Unavailable."), "server_error"),
        (Response(400, {"code": -1121, "msg": "Invalid symbol."}), "bad_symbol"),
        (Fault.CUT, "connection"),
        (Fault.RESET, "connection"),
    ],
    ids=["half", "html", "empty", "object", "no-rows", "no-utf8", "nan", "503", "unlisted", "cut", "reset"],
)
def test_an_answer_that_proves_no_position_blocks_its_symbol_alone_and_is_asked_for_twice_at_most(
    fault: Response | Fault, kind: str, broken: Broken
) -> None:
    broken.exchange.sim.faults = on(V2, "BTCUSDT", fault)
    before = len(asked(broken.exchange, V2))
    plan_id = broken.publish("BTCUSDT")
    other = broken.publish("ETHUSDT")
    assert blocked(decision(broken.client, plan_id)) == ("BLOCK", "position_fetch_failed", kind)
    assert decision(broken.client, other)["verdict"] == "EXECUTE"
    of_it = [r for r in asked(broken.exchange, V2)[before:] if r.symbol == "BTCUSDT"]
    assert 1 <= len(of_it) <= 2
    broken.exchange.sim.faults = None
    again = broken.publish("BTCUSDT")
    assert decision(broken.client, again)["verdict"] == "EXECUTE"
    assert errors(broken.daemon) == ("ARMED", 0)


class Broken:
    """A daemon that several cases share, since each leaves it as it was."""

    def __init__(self, one: Daemon, client: redis.Redis, exchange: Exchange) -> None:
        self.daemon = one
        self.client = client
        self.exchange = exchange
        self._plans = 0

    def publish(self, symbol: str) -> str:
        self._plans += 1
        publish(self.client, f"plan-{self._plans}", symbol)
        return f"plan-{self._plans}"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broken]:
    with Exchange() as exchange, build("valkey") as server, server.client() as client:
        for symbol in ("BTCUSDT", "ETHUSDT"):
            exchange.set(symbol, "0.020", "1000")
        home = tmp_path_factory.mktemp("broken")
        with daemon(home, port=server.port, base_url=exchange.base_url, environ=TROUBLED) as one:
            yield Broken(one, client, exchange)


@pytest.mark.parametrize(
    "fault", [Response(500), Response(200, b"nonsense"), Fault.CUT, Fault.HANG], ids=["500", "no-json", "cut", "hang"]
)
def test_without_a_price_the_quantity_limit_decides(fault: Response | Fault, broken: Broken) -> None:
    broken.exchange.sim.faults = on(MARK, None, fault)
    told = decision(broken.client, broken.publish("BTCUSDT"))
    broken.exchange.sim.faults = None
    assert (told["verdict"], told["computed_qty"], told["computed_notional"]) == ("EXECUTE", 0.005, 0)
    assert told["price_error"] in ("server_error", "bad_response", "connection", "timeout")


@pytest.mark.parametrize(
    ("stop", "kind", "wait_s"),
    [
        (Response(429, b"", {"retry-after": "1"}), "rate_limited", 1),
        (Response(429, {"code": -1003, "msg": "Too many requests"}), "rate_limited", 5),
        (Response(418, b"", {"retry-after": "1"}), "banned", 1),
        (Response(418, {"code": -1003, "msg": "Way too many requests; IP banned."}), "banned", 120),
        (Response(403, b"<html>"), "waf_blocked", 60),
    ],
    ids=["429-retry-after", "429", "418-retry-after", "418", "403"],
)
def test_one_stop_stops_the_calls_of_all_symbols_until_its_time_is_over(
    *,
    stop: Response,
    kind: str,
    wait_s: int,
    server: RedisServer,
    client: redis.Redis,
    exchange: Exchange,
    tmp_path: Path,
) -> None:
    symbols = [f"S{n}USDT" for n in range(20)]
    for symbol in symbols:
        exchange.set(symbol, "1", "10")
    with daemon(tmp_path, port=server.port, base_url=exchange.base_url, environ=TROUBLED) as one:
        exchange.sim.faults = on(V2, None, stop)
        publish(client, "first", "S0USDT")
        assert blocked(decision(client, "first")) == ("BLOCK", "position_fetch_failed", kind)
        stopped = time.time()
        seen = len(exchange.sim.requests)
        exchange.sim.faults = None  # it would answer; nobody asks
        for symbol in symbols:
            publish(client, f"held-{symbol}", symbol)
        wait_for(lambda: len(events_of(client, "DECISION")) == 21)
        told = events_of(client, "DECISION")[1:]
        assert {blocked(each) for each in told} == {("BLOCK", "position_fetch_failed", kind)}
        assert {each["price_error"] for each in told} == {kind}
        assert len(exchange.sim.requests) == seen
        (note,) = json.loads(one.http("/readyz"))["notes"]
        assert f"held back for {wait_s}" in note or f"held back for {wait_s - 1}" in note or wait_s > 5, note
        assert errors(one) == ("ARMED", 0)
        if wait_s > 2:
            return
        wait_for(lambda: not json.loads(one.http("/readyz"))["notes"])
        assert time.time() - stopped > wait_s - 0.2
        assert len(exchange.sim.requests) == seen, "nothing was asked before its time"
        publish(client, "after", "S0USDT")
        assert decision(client, "after")["verdict"] == "EXECUTE"


def test_a_stop_met_by_many_symbols_at_once_is_not_pressed(
    server: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    symbols = [f"S{n}USDT" for n in range(60)]
    for symbol in symbols:
        exchange.set(symbol, "1", "10")
    exchange.sim.faults = on(V2, None, Response(429, b"", {"retry-after": "60"}))
    with daemon(tmp_path, port=server.port, base_url=exchange.base_url, environ=TROUBLED):
        pipe = client.pipeline(transaction=True)
        for n in range(5):
            for symbol in symbols:
                publish(pipe, f"{symbol}-{n}", symbol)
        pipe.execute()
        wait_for(lambda: len(events_of(client, "DECISION")) == 300)
    assert {each["position_error"] for each in events_of(client, "DECISION")} == {"rate_limited"}
    assert len(asked(exchange, V2)) <= 25, "only what was under way when the first stop came"


def test_a_restart_is_no_reason_to_come_back_before_a_ban_is_over(
    server: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    exchange.set("BTCUSDT", "1", "10")
    with daemon(tmp_path, port=server.port, base_url=exchange.base_url, environ=TROUBLED) as one:
        exchange.sim.faults = on(V2, None, Response(418, b"", {"retry-after": "600"}))
        publish(client, "first", "BTCUSDT")
        assert blocked(decision(client, "first")) == ("BLOCK", "position_fetch_failed", "banned")
        wait_for(lambda: any(one.home.rglob("exchange-ban")))
        one.kill()
        exchange.sim.faults = None
        seen = len(exchange.sim.requests)
        one.start()
        publish(client, "second", "BTCUSDT")
        assert blocked(decision(client, "second")) == ("BLOCK", "position_fetch_failed", "banned")
        assert len(exchange.sim.requests) == seen, "not one request, not even a ping"


@pytest.mark.parametrize("skew_ms", [3_000, -3_000])
@pytest.mark.parametrize("when", ["from the start", "while it runs"])
def test_a_clock_three_seconds_off_costs_no_plan_its_permit(
    *, skew_ms: int, when: str, server: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    if when == "from the start":
        exchange.sim.skew_ms = skew_ms
    with daemon(tmp_path, port=server.port, base_url=exchange.base_url, environ=TROUBLED):
        publish(client, "one", "BTCUSDT")
        assert PermitGate(client).consume("one", symbol="BTCUSDT", wait_s=3).plan_id == "one"
        exchange.sim.skew_ms = skew_ms
        for n in range(3):
            publish(client, f"two-{n}", "BTCUSDT")
            assert PermitGate(client).consume(f"two-{n}", symbol="BTCUSDT", wait_s=3).computed_qty
    refused = len(asked(exchange, V2)) - 4
    assert refused == (1 if when == "while it runs" and skew_ms < 0 else 0), "resynced once, and not asked for again"


def test_each_plan_is_decided_on_the_position_of_its_own_call(
    server: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    amounts = iter(["0.4", "0.3", "-0.2", "0.1", "0"])

    def moves(request: Request) -> None:
        if request.path == V2 and request.symbol == "BTCUSDT":
            exchange.sim.set_position("BTCUSDT", next(amounts))

    exchange.sim.faults = moves
    with daemon(tmp_path, port=server.port, base_url=exchange.base_url, environ=TROUBLED):
        pipe = client.pipeline(transaction=True)
        for n in range(5):
            publish(pipe, f"plan-{n}", "BTCUSDT", "FULL_CLOSE_PROPOSED")
        pipe.execute()
        wait_for(lambda: len(events_of(client, "DECISION")) == 5)
    told = [(each["verdict"], each["computed_qty"], each["reason"]) for each in events_of(client, "DECISION")]
    assert told[:4] == [("EXECUTE", qty, None) for qty in (0.4, 0.3, 0.2, 0.1)]
    assert (told[4][0], told[4][2]) == ("BLOCK", "no_position")


def test_a_symbol_that_always_fails_costs_the_others_nothing_also_where_they_share_their_calls(
    server: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    good = [f"S{n}USDT" for n in range(12)]
    for symbol in good:
        exchange.set(symbol, "1", "10")
    exchange.sim.set_position("BADUSDT", "1")  # no price: the exchange says 0, which is none

    def fails(request: Request) -> Response | None:
        if request.path == V2 and request.symbol is None:
            whole: Any = exchange.sim.answer(request).body
            return Response(body=[row | {"positionAmt": "x"} if row["symbol"] == "BADUSDT" else row for row in whole])
        return Response(500) if request.symbol == "BADUSDT" else None

    exchange.sim.faults = fails
    with daemon(tmp_path, port=server.port, base_url=exchange.base_url, environ=TROUBLED) as one:
        for n in range(3):
            pipe = client.pipeline(transaction=True)
            for symbol in (*good, "BADUSDT"):
                publish(pipe, f"{symbol}-{n}", symbol)
            pipe.execute()
            wait_for(lambda n=n: len(events_of(client, "DECISION")) == 13 * (n + 1))  # type: ignore[misc]
        told = events_of(client, "DECISION")
        assert {each["verdict"] for each in told if each["symbol"] in good} == {"EXECUTE"}
        bad = [each for each in told if each["symbol"] == "BADUSDT"]
        assert {blocked(each) for each in bad} == {("BLOCK", "position_fetch_failed", bad[0]["position_error"])}
        assert errors(one) == ("ARMED", 0)
    assert any(request.symbol is None for request in asked(exchange, V2)), "some of them shared their calls"


def test_half_an_answer_on_the_wire_is_no_position(
    server: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with (
        Proxy(int(exchange.base_url.rpartition(":")[2])) as proxy,
        daemon(tmp_path, port=server.port, base_url=proxy.base_url, environ=TROUBLED),
    ):
        trip = proxy.trip(b"positionRisk", "half_reply", times=2)
        publish(client, "half", "BTCUSDT")
        assert blocked(decision(client, "half")) == ("BLOCK", "position_fetch_failed", "connection")
        assert trip.happened == 2
        once = proxy.trip(b"positionRisk", "before")
        publish(client, "again", "BTCUSDT")
        assert decision(client, "again")["verdict"] == "EXECUTE", "one lost call is got over"
        assert once.happened == 1
