"""The exchange adapter against the simulated exchange: what it asks, when, and what it makes of the answers."""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from governor import binance
from governor.binance import Binance, ExchangeError
from governor.binance_errors import SECOND_TRY_AFTER_S
from governor.binance_wire import PING
from governor.market import Market, position_amt
from governor.sim.exchange import ExchangeSim, Fault, Request, Response

KEY = "K" * 32 + "4f" * 16
SECRET = "S" * 32 + "9c" * 16
NOW_US = 1_700_000_000_000_000
ERRORS = msgspec.json.decode((Path(__file__).parent / "data/binance/errors/errors.json").read_bytes())
V2, V3 = "/v2/positionRisk", "/v3/positionRisk"
MARK = "/premiumIndex"
D = Decimal


class Clock:
    """Microseconds since the epoch, moved by hand."""

    def __init__(self) -> None:
        self.us = NOW_US

    def __call__(self) -> int:
        return self.us

    def pass_s(self, seconds: float) -> None:
        self.us += round(seconds * 1e6)

    def ticks(self, _: Request) -> float:
        """A latency that takes a millisecond of this clock and no real time."""
        self.pass_s(0.001)
        return 0.0

    def monotonic(self) -> float:
        return self.us / 1e6


class Script:
    """Answers to give in turn to the requests whose path ends so; the last one over and over."""

    def __init__(self, path: str, *answers: Response | Fault | None, symbol: str | None = "any") -> None:
        self.path, self.symbol = path, symbol
        self.answers = deque(answers)

    def __call__(self, request: Request) -> Response | Fault | None:
        if not request.path.endswith(self.path) or self.symbol not in ("any", request.symbol):
            return None
        return self.answers.popleft() if len(self.answers) > 1 else self.answers[0]


class Hold:
    """Hangs some requests: `wanted` says which."""

    def __init__(self, wanted: Callable[[Request], bool] = lambda _: True) -> None:
        self.wanted = wanted

    def __call__(self, request: Request) -> Fault | None:
        return Fault.HANG if self.wanted(request) else None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binance, "SECOND_TRY_AFTER_S", dict.fromkeys(SECOND_TRY_AFTER_S, 0.0))


@pytest.fixture
async def sim(clock: Clock) -> AsyncIterator[ExchangeSim]:
    async with ExchangeSim(api_key=KEY, api_secret=SECRET, now=clock) as running:
        running.set_price("BTCUSDT", "17000.5")
        running.set_position("BTCUSDT", "0.015")
        yield running


class Rig:
    """Makes clients of the simulated exchange and closes them."""

    def __init__(self, sim: ExchangeSim, clock: Clock) -> None:
        self.sim, self.clock = sim, clock
        self.clients: list[Binance] = []
        self.calls: list[tuple[str, str]] = []

    def __call__(self, **options: Any) -> Binance:
        settings: dict[str, Any] = {"base_url": self.sim.base_url, "api_key": KEY, "api_secret": SECRET}
        settings |= {"now": self.clock, "monotonic": self.clock.monotonic, "timeout_s": 5.0}
        settings["on_call"] = lambda endpoint, _, outcome: self.calls.append((endpoint, outcome))
        self.clients.append(Binance(**(settings | options)))
        return self.clients[-1]


@pytest.fixture
async def rig(sim: ExchangeSim, clock: Clock) -> AsyncIterator[Rig]:
    made = Rig(sim, clock)
    yield made
    for client in made.clients:
        await client.aclose()


def many(sim: ExchangeSim, number: int) -> list[str]:
    symbols = [f"C{index}USDT" for index in range(number)]
    for index, symbol in enumerate(symbols):
        sim.set_price(symbol, str(index + 1))
        sim.set_position(symbol, f"0.{index + 1:02}")
    return symbols


async def together(client: Binance, symbols: list[str]) -> list[Market]:
    return list(await asyncio.gather(*(client.market(symbol) for symbol in symbols)))


# What one check asks.


async def test_a_check_is_two_requests_at_the_same_time(sim: ExchangeSim, rig: Rig) -> None:
    sim.faults = Hold()
    asked = asyncio.create_task(rig().market("BTCUSDT"))
    await sim.arrived(2)
    sim.release()
    assert await asked == Market(legs={"BOTH": D("0.015")}, mark_price=D("17000.5"))
    assert sorted(request.path for request in sim.requests) == ["/fapi/v1/premiumIndex", "/fapi/v2/positionRisk"]
    assert {request.symbol for request in sim.requests} == {"BTCUSDT"}
    assert sorted(rig.calls) == [("mark", "ok"), ("position", "ok")]


async def test_a_signed_request_is_the_text_that_was_signed_and_only_it_carries_the_key(
    sim: ExchangeSim, rig: Rig
) -> None:
    await rig(recv_window_ms=4321).market("BTCUSDT")
    signed = next(request for request in sim.requests if request.path.endswith(V2))
    payload, _, signature = signed.query.partition("&signature=")
    assert payload == f"symbol=BTCUSDT&recvWindow=4321&timestamp={NOW_US // 1000}"
    assert signature == binance.sign(SECRET, payload)
    assert signed.headers["x-mbx-apikey"] == KEY
    plain = next(request for request in sim.requests if request.path.endswith(MARK))
    assert plain.query == "symbol=BTCUSDT"
    assert "x-mbx-apikey" not in plain.headers


async def test_connections_are_kept(sim: ExchangeSim, rig: Rig) -> None:
    client = rig()
    await client.warm_up()
    for _ in range(5):
        await client.market("BTCUSDT")
    assert sim.most_connections == 2
    assert {request.connection for request in sim.requests} == {1, 2}


async def test_warming_up_opens_two_connections_and_syncs_the_clock(sim: ExchangeSim, rig: Rig, clock: Clock) -> None:
    sim.skew_ms = -300
    client = rig()
    await client.warm_up()
    assert client.offset_ms == -300
    assert sim.open_connections == 2
    before = len(sim.requests)
    assert (await client.market("BTCUSDT")).position_error is None
    assert len(sim.requests) == before + 2


@pytest.mark.parametrize("symbol", ["", "btcusdt", "BTC/USDT", "BTCUSDT&x=1", "A" * 33, "币安USDT", "BTCUSDT\n"])
async def test_what_is_no_symbol_is_not_asked_for(sim: ExchangeSim, rig: Rig, symbol: str) -> None:
    assert await rig().market(symbol) == Market(position_error="bad_symbol", price_error="bad_symbol")
    assert not sim.requests


async def test_hedge_legs_come_apart(clock: Clock) -> None:
    async with ExchangeSim(api_key=KEY, api_secret=SECRET, now=clock, hedge=True) as sim:
        sim.set_position("ETHUSDT", "2", "LONG")
        sim.set_position("ETHUSDT", "-0.5", "SHORT")
        sim.set_price("ETHUSDT", "1200")
        made = Rig(sim, clock)
        client = made()
        market = await client.market("ETHUSDT")
        sim.v2_retired = True
        sim.set_position("ETHUSDT", "0", "LONG")
        later = await client.market("ETHUSDT")
        await client.aclose()
    assert market.legs == {"LONG": D(2), "SHORT": D("-0.5")}
    assert position_amt(market.legs, None) == D("2.5")
    assert position_amt(market.legs, "SHORT") == D("0.5")
    assert later.legs == {"SHORT": D("-0.5")}


async def test_scientific_notation_travels(sim: ExchangeSim, rig: Rig) -> None:
    sim.faults = Script(MARK, Response(body={"symbol": "BTCUSDT", "markPrice": "2.8E-4", "time": "quoted"}))
    assert (await rig().market("BTCUSDT")).mark_price == D("0.00028")


# Many symbols.


async def test_two_symbols_share_the_call_for_all_positions(sim: ExchangeSim, rig: Rig) -> None:
    symbols = many(sim, 2)
    client = rig()
    markets = await together(client, symbols)
    assert [market.legs for market in markets] == [{"BOTH": D("0.01")}, {"BOTH": D("0.02")}]
    assert [market.mark_price for market in markets] == [1, 2]
    assert sorted(rig.calls) == [("mark", "ok"), ("mark", "ok"), ("position_all", "ok")]
    assert client.weight_used == 5 + 2
    assert client.stats.groups == 1


@pytest.mark.parametrize(("number", "marks", "weight"), [(10, ["mark"] * 10, 15), (11, ["mark_all"], 15)])
async def test_all_marks_are_asked_for_where_that_is_cheaper(
    sim: ExchangeSim, rig: Rig, number: int, marks: list[str], weight: int
) -> None:
    symbols = many(sim, number)
    client = rig()
    markets = await together(client, symbols)
    assert [market.mark_price for market in markets] == [index + 1 for index in range(number)]
    assert all(market.position_error is None for market in markets)
    assert sorted(rig.calls) == sorted([(mark, "ok") for mark in marks] + [("position_all", "ok")])
    assert client.weight_used == weight


async def test_the_same_symbol_at_the_same_moment_is_asked_once(sim: ExchangeSim, rig: Rig) -> None:
    first, second = await together(rig(), ["BTCUSDT", "BTCUSDT"])
    assert first == second
    assert len(sim.requests) == 2


async def test_a_request_that_has_left_is_not_shared(sim: ExchangeSim, rig: Rig) -> None:
    client = rig()
    sim.faults = Hold()
    early = asyncio.create_task(client.market("BTCUSDT"))
    await sim.arrived(2)
    late = asyncio.create_task(client.market("BTCUSDT"))
    await sim.arrived(4)
    sim.release()
    assert (await early).position_error is None
    assert (await late).position_error is None
    assert len(sim.requests) == 4


async def test_a_symbol_missing_from_the_call_for_all_is_asked_alone(sim: ExchangeSim, rig: Rig) -> None:
    symbols = many(sim, 12)
    one = [{"symbol": symbols[0], "positionAmt": "9", "positionSide": "BOTH"}]
    price = [{"symbol": symbols[0], "markPrice": "9"}]

    def lacking(request: Request) -> Response | None:
        if request.symbol is not None:
            return None
        return Response(body=one if request.path.endswith(V2) else price)

    sim.faults = lacking
    markets = await together(rig(), symbols)
    assert markets[0] == Market(legs={"BOTH": D(9)}, mark_price=D(9))
    assert [market.mark_price for market in markets[1:]] == list(range(2, 13))
    assert all(market.legs for market in markets)
    assert (sim.count(V2), sim.count(MARK)) == (12, 12)


@pytest.mark.parametrize(
    "trouble",
    [Response(503, b"oops"), Response(body={}), Response(body=[{}]), Fault.RESET, Fault.CUT, Response(400, b"{}")],
    ids=["503", "object", "rows", "reset", "cut", "400"],
)
async def test_a_failed_call_for_all_falls_back_to_each_alone(
    sim: ExchangeSim, rig: Rig, trouble: Response | Fault
) -> None:
    symbols = many(sim, 11)
    sim.faults = lambda request: trouble if request.symbol is None else None
    markets = await together(rig(), symbols)
    assert [market.mark_price for market in markets] == list(range(1, 12))
    assert all(market.legs for market in markets)
    assert (sim.count(V2), sim.count(MARK)) == (12, 12)


async def test_a_call_for_all_that_hangs_leaves_time_to_ask_alone(sim: ExchangeSim, rig: Rig) -> None:
    symbols = many(sim, 11)
    sim.faults = Hold(lambda request: request.symbol is None)
    markets = await together(rig(timeout_s=0.8), symbols)
    assert all(market.legs and market.mark_price for market in markets)


async def test_falling_back_is_the_second_try(sim: ExchangeSim, rig: Rig) -> None:
    symbols = many(sim, 3)
    sim.faults = Script(V2, Response(503, b"oops"))
    markets = await together(rig(), symbols)
    assert {market.position_error for market in markets} == {"server_error"}
    assert all(market.price_error is None for market in markets)
    assert sim.count(V2) == 1 + 3


@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limited"), (418, "banned"), (403, "waf_blocked")])
async def test_a_call_for_all_that_says_stop_stops(sim: ExchangeSim, rig: Rig, status: int, kind: str) -> None:
    symbols = many(sim, 12)
    sim.faults = lambda _: Response(status, b"<html>")
    for market in await together(rig(), symbols):
        assert (market.position_error, market.price_error) == (kind, kind)
    assert len(sim.requests) == 2


async def test_one_broken_symbol_does_not_spoil_the_others(sim: ExchangeSim, rig: Rig) -> None:
    symbols = many(sim, 3)
    sim.set_price(symbols[1], "0")

    def broken(request: Request) -> Response | None:
        if request.path.endswith(V2) and request.symbol in (None, symbols[1]):
            rows = [{"symbol": name, "positionAmt": "1", "positionSide": "BOTH"} for name in symbols]
            rows[1]["positionAmt"] = "NaN"
            return Response(body=rows)
        return None

    sim.faults = broken
    good, bad, fine = await together(rig(), symbols)
    assert good == Market(legs={"BOTH": D(1)}, mark_price=D(1))
    assert bad == Market(position_error="bad_response", price_error="bad_response")
    assert fine == Market(legs={"BOTH": D(1)}, mark_price=D(3))


async def test_a_symbol_that_is_not_listed_fails_alone(sim: ExchangeSim, rig: Rig) -> None:
    known, unknown = await together(rig(), ["BTCUSDT", "NOSUCHUSDT"])
    assert known == Market(legs={"BOTH": D("0.015")}, mark_price=D("17000.5"))
    assert unknown == Market(position_error="bad_symbol", price_error="bad_symbol")


async def test_a_slow_symbol_holds_up_no_other(sim: ExchangeSim, rig: Rig) -> None:
    slow, *others = many(sim, 4)
    client = rig()
    sim.faults = Hold(lambda request: request.symbol == slow)
    waits = asyncio.create_task(client.market(slow))
    await sim.arrived(2)
    apart = await client.market(others[0])
    with_the_slow_one = asyncio.create_task(client.market(slow))
    grouped = await together(client, others)
    assert all(market.legs and market.mark_price for market in [apart, *grouped])
    assert not waits.done()
    assert not with_the_slow_one.done()
    sim.release()
    assert (await waits).mark_price == 1
    assert (await with_the_slow_one).legs == {"BOTH": D("0.01")}


async def test_twenty_lone_checks_are_under_way_at_once(sim: ExchangeSim, rig: Rig) -> None:
    symbols = many(sim, 20)
    client = rig()
    sim.faults = Hold()
    checks = []
    for index, symbol in enumerate(symbols):
        checks.append(asyncio.create_task(client.market(symbol)))
        await sim.arrived(2 * index + 2)
    assert sim.open_connections == 40
    sim.release()
    assert all(market.legs and market.mark_price for market in await asyncio.gather(*checks))
    assert len(sim.requests) == 40


async def test_symbols_that_wait_for_room_leave_together(
    sim: ExchangeSim, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binance, "MAX_IN_FLIGHT", 4)
    symbols = many(sim, 8)
    client = rig()
    sim.faults = Hold(lambda request: request.symbol in symbols[:2])
    checks = []
    for index, symbol in enumerate(symbols[:2]):
        checks.append(asyncio.create_task(client.market(symbol)))
        await sim.arrived(2 * index + 2)
    for symbol in symbols[2:]:
        checks.append(asyncio.create_task(client.market(symbol)))
        await asyncio.sleep(0)
    sim.release()
    markets = await asyncio.gather(*checks)
    assert [market.mark_price for market in markets] == list(range(1, 9))
    assert (sim.count(V2), sim.count(MARK)) == (2 + 1, 8)


async def test_a_symbol_among_586_rows_is_found(sim: ExchangeSim, rig: Rig) -> None:
    symbols = ["BLURUSDT", "BTCUSDT"]
    template = {"entryPrice": "0.0", "maxNotionalValue": "1.0E7", "isolated": False, "adlQuantile": 0}
    rows = [
        template | {"symbol": f"C{index}USDT", "positionAmt": "0", "positionSide": side}
        for index in range(292)
        for side in ("LONG", "SHORT")
    ]
    rows[400:400] = [template | {"symbol": "BLURUSDT", "positionAmt": "-10.000", "positionSide": "SHORT"}]
    rows.append(template | {"symbol": "BTCUSDT", "positionAmt": "1E-3", "positionSide": "LONG"})
    assert len(rows) == 586
    sim.set_price("BLURUSDT", "0.5")
    sim.faults = Script(V2, Response(body=rows))
    blur, bitcoin = await together(rig(), symbols)
    assert blur.legs == {"SHORT": D(-10)}
    assert bitcoin.legs == {"LONG": D("0.001")}


# The error table, live.

TRIES = {
    "bad_symbol": 1,
    "auth": 1,
    "clock": 2,
    "banned": 1,
    "rate_limited": 1,
    "server_error": 2,
    "overloaded": 2,
    "server_timeout": 2,
    "retired": 2,
    "bad_request": 1,
    "waf_blocked": 1,
    "bad_response": 2,
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error["name"])
async def test_each_recorded_error_is_tried_again_as_the_table_says(
    sim: ExchangeSim, rig: Rig, error: dict[str, Any]
) -> None:
    body = error["body_text"].encode() if error["body"] is None else error["body"]
    sim.faults = Script("/positionRisk", Response(error["http_status"] or 400, body, error["headers"]))
    market = await rig().market("BTCUSDT")
    assert market.legs is None
    assert market.mark_price == D("17000.5")
    assert market.position_error in TRIES
    assert sim.count("/positionRisk") == TRIES[market.position_error]
    assert sim.count("/time") == (1 if market.position_error == "clock" else 0)
    assert sim.count(MARK) == 1


@pytest.mark.parametrize(
    "trouble",
    [
        Response(408, {"code": -1007, "msg": "Timeout"}),
        Response(503, {"code": -1008, "msg": "Request throttled by system-level protection."}),
        Response(503, {"msg": "Service Unavailable."}),
        Response(500, b"oops"),
        Response(202, b""),
        Response(200, b"111 107"),
        Response(200, {"symbol": "BTCUSDT"}),
        Response(200, b"\x1f\x8b broken", {"content-encoding": "gzip"}),
        Response(302, b"", {"location": "https://evil.example/"}),
        Fault.CUT,
        Fault.RESET,
    ],
    ids=["408", "-1008", "503", "500", "202", "text", "object", "gzip", "302", "cut", "reset"],
)
async def test_passing_trouble_is_got_over_with_a_second_try(
    sim: ExchangeSim, rig: Rig, clock: Clock, trouble: Response | Fault
) -> None:
    sim.faults = Script(V2, trouble, None)
    sim.latency_s = clock.ticks
    client = rig()
    assert (await client.market("BTCUSDT")).legs == {"BOTH": D("0.015")}
    first, second = (request for request in sim.requests if request.path.endswith(V2))
    assert first.params["timestamp"] != second.params["timestamp"]
    assert first.params["signature"] != second.params["signature"]
    assert client.stats.second_tries == 1


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(Fault.RESET, "connection"), (Fault.CUT, "connection"), (Response(200, b"[" * 9), "bad_response")],
)
async def test_trouble_that_stays_ends_after_two_tries(
    sim: ExchangeSim, rig: Rig, fault: Response | Fault, kind: str
) -> None:
    sim.faults = lambda _: fault
    assert await rig().market("BTCUSDT") == Market(position_error=kind, price_error=kind)
    assert len(sim.requests) == 4


async def test_an_answer_that_proves_nothing_is_not_asked_for_twice(sim: ExchangeSim, rig: Rig) -> None:
    sim.faults = Script(V2, Response(body=[]))
    assert (await rig().market("BTCUSDT")).position_error == "bad_response"
    assert sim.count(V2) == 1


async def test_a_body_without_end_is_given_up(sim: ExchangeSim, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binance, "MAX_BODY", 1000)
    sim.faults = Script(V2, Response(body=b"[" + b" " * 5000 + b"]"))
    assert (await rig().market("BTCUSDT")).position_error == "bad_response"


async def test_nobody_there_is_connection(rig: Rig) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    client = rig(base_url=f"http://127.0.0.1:{port}")
    assert await client.market("BTCUSDT") == Market(position_error="connection", price_error="connection")


@pytest.mark.parametrize("path", [V2, MARK])
async def test_the_deadline_holds_and_keeps_the_other_half(sim: ExchangeSim, rig: Rig, path: str) -> None:
    sim.faults = Script(path, Fault.HANG)
    started = time.monotonic()
    market = await rig(timeout_s=0.2).market("BTCUSDT")
    assert 0.15 < time.monotonic() - started < 1.0
    assert (market.position_error, market.price_error) == (("timeout", None) if path == V2 else (None, "timeout"))
    assert sim.count(path) == 1


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the processor was kept awake, on the real clock."""
    found: list[float] = []
    monkeypatch.setattr(os, "sched_yield", lambda: found.append(time.monotonic()))
    return found


async def test_an_exchange_that_is_near_is_waited_for_awake_and_no_longer(rig: Rig, turns: list[float]) -> None:
    client = rig(awake_s=1.0)
    assert (await client.market("BTCUSDT")).position_error is None
    assert turns
    for _ in range(20):
        await asyncio.sleep(0)
    known = len(turns)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(turns) == known


async def test_an_exchange_that_is_far_is_waited_for_asleep(
    sim: ExchangeSim, rig: Rig, clock: Clock, turns: list[float]
) -> None:
    def far(_: Request) -> float:
        clock.pass_s(0.06)
        return 0.0

    sim.latency_s = far
    client = rig(awake_s=0.05)
    await client.warm_up()
    assert (await client.market("BTCUSDT")).position_error is None
    assert turns == []
    assert (await rig().market("BTCUSDT")).position_error is None, "nor where it is not wished for"
    assert turns == []


async def test_an_exchange_that_hangs_is_soon_waited_for_asleep(sim: ExchangeSim, rig: Rig, turns: list[float]) -> None:
    sim.faults = Script(V2, Fault.HANG)
    assert (await rig(awake_s=0.02, timeout_s=0.3).market("BTCUSDT")).position_error == "timeout"
    assert turns
    assert turns[-1] - turns[0] < 0.15


async def test_an_exchange_that_hangs_is_no_longer_taken_for_near(
    sim: ExchangeSim, rig: Rig, turns: list[float]
) -> None:
    client = rig(awake_s=0.05, timeout_s=0.2, monotonic=time.monotonic)
    await client.warm_up()
    sim.faults = lambda _: Fault.HANG
    assert (await client.market("BTCUSDT")).position_error == "timeout"
    for _ in range(20):
        await asyncio.sleep(0)
    assert turns
    turns.clear()
    assert (await client.market("BTCUSDT")).position_error == "timeout"
    assert turns == []


async def test_a_caller_that_leaves_takes_no_answer_from_another(sim: ExchangeSim, rig: Rig) -> None:
    client = rig()
    leaves, stays = (asyncio.create_task(client.market("BTCUSDT")) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    assert (await stays).legs == {"BOTH": D("0.015")}
    assert leaves.cancelled()
    assert sim.count(V2) == 1


async def test_the_deadline_covers_the_second_try(sim: ExchangeSim, rig: Rig) -> None:
    sim.faults = Script(V2, Response(500, b""), Fault.HANG)
    started = time.monotonic()
    assert (await rig(timeout_s=0.2).market("BTCUSDT")).position_error == "timeout"
    assert time.monotonic() - started < 1.0
    assert sim.count(V2) == 2


async def test_no_second_try_begins_that_cannot_end_in_time(
    sim: ExchangeSim, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binance, "SECOND_TRY_AFTER_S", {"server_error": 60.0})
    sim.faults = Script(V2, Response(500, b""))
    assert (await rig().market("BTCUSDT")).position_error == "server_error"
    assert sim.count(V2) == 1


async def test_what_waited_past_its_deadline_is_not_sent(sim: ExchangeSim, rig: Rig) -> None:
    client = rig()
    with pytest.raises(ExchangeError, match="timeout"):
        await client._attempt(PING, None, asyncio.get_running_loop().time())
    assert not sim.requests


async def test_a_hung_connection_is_not_used_again(sim: ExchangeSim, rig: Rig) -> None:
    client = rig(timeout_s=0.2)
    sim.faults = Hold()
    assert (await client.market("BTCUSDT")).position_error == "timeout"
    sim.faults = None
    assert (await client.market("BTCUSDT")).position_error is None
    assert {request.connection for request in sim.requests} == {1, 2, 3, 4}


# Stops.


async def test_a_stop_is_honoured_by_all_calls_until_its_end(sim: ExchangeSim, rig: Rig, clock: Clock) -> None:
    client = rig()
    sim.faults = Script(V2, Response(429, b"", {"retry-after": "7"}), None)
    assert (await client.market("BTCUSDT")).position_error == "rate_limited"
    assert client.blocked_until_us == clock.us + 7_000_000
    before = len(sim.requests)
    clock.pass_s(6.999)
    held = await together(client, ["BTCUSDT", "ETHUSDT"])
    assert held == [Market(position_error="rate_limited", price_error="rate_limited")] * 2
    with pytest.raises(ExchangeError, match="rate_limited"):
        await client.sync_clock()
    with capture_logs() as logs:
        await client.warm_up()
    assert [entry["error"] for entry in logs] == ["rate_limited"]
    assert len(sim.requests) == before
    clock.pass_s(0.001)
    assert client.blocked_until_us == 0
    assert (await client.market("BTCUSDT")).position_error is None


async def test_repeated_stops_last_longer_until_a_good_answer(sim: ExchangeSim, rig: Rig, clock: Clock) -> None:
    client = rig()
    sim.faults = lambda _: Response(429, {"code": -1003, "msg": "Too many requests"})
    for expected in (5, 10, 20, 40, 40):
        assert (await client.market("BTCUSDT")).position_error == "rate_limited"
        assert expected <= (client.blocked_until_us - clock.us) / 1e6 <= expected * 1.1
        clock.us = client.blocked_until_us
    sim.faults = None
    assert (await client.market("BTCUSDT")).legs
    sim.faults = lambda _: Response(429)
    await client.market("BTCUSDT")
    assert client.blocked_until_us - clock.us < 6_000_000


async def test_a_ban_lasts_until_the_moment_it_names(sim: ExchangeSim, rig: Rig, clock: Clock) -> None:
    client = rig()
    sim.skew_ms = 500
    await client.sync_clock()
    until_ms = clock.us // 1000 + sim.skew_ms + 3_600_000
    text = f"Way too many requests; IP(203.0.113.7) banned until {until_ms}. Please use the websocket."
    sim.faults = Script(V2, Response(418, {"code": -1003, "msg": text}), None)
    with capture_logs() as logs:
        assert (await client.market("BTCUSDT")).position_error == "banned"
    assert client.blocked_until_us == clock.us + 3_601_000_000
    assert [(entry["event"], entry["error"], entry["wait_s"]) for entry in logs] == [
        ("exchange_calls_held_back", "banned", 3601)
    ]
    later = rig(blocked_until_us=client.blocked_until_us)
    assert (await later.market("BTCUSDT")).position_error == "banned"
    clock.pass_s(3601)
    assert (await later.market("BTCUSDT")).position_error is None


async def test_a_firewall_page_stops_for_a_minute_at_least(sim: ExchangeSim, rig: Rig, clock: Clock) -> None:
    client = rig()
    sim.faults = Script(MARK, Response(403, b"<html>", {"retry-after": "1"}))
    assert (await client.market("BTCUSDT")).price_error == "waf_blocked"
    assert client.blocked_until_us == clock.us + 60_000_000


async def test_a_refused_key_is_not_tried_again_for_a_minute_and_prices_go_on(
    sim: ExchangeSim, rig: Rig, clock: Clock
) -> None:
    client = rig(api_key="W" * 64)
    for _ in range(3):
        market = await client.market("BTCUSDT")
        assert (market.position_error, market.mark_price) == ("auth", D("17000.5"))
    assert (sim.count(V2), sim.count(MARK)) == (1, 3)
    assert client.blocked_until_us == 0
    clock.pass_s(70)
    await client.market("BTCUSDT")
    assert sim.count(V2) == 2


async def test_a_wrong_secret_is_auth(sim: ExchangeSim, rig: Rig) -> None:
    assert (await rig(api_secret="wrong").market("BTCUSDT")).position_error == "auth"
    assert sim.count(V2) == 1


# The clock.


@pytest.mark.parametrize("skew_ms", [-8_000, 60_000])
async def test_a_refused_timestamp_is_resynced_once(sim: ExchangeSim, rig: Rig, skew_ms: int) -> None:
    client = rig()
    sim.skew_ms = skew_ms
    assert (await client.market("BTCUSDT")).legs == {"BOTH": D("0.015")}
    assert client.offset_ms == skew_ms
    assert (await client.market("BTCUSDT")).legs == {"BOTH": D("0.015")}
    assert (sim.count(V2), sim.count("/time")) == (3, 1)
    assert client.stats.resyncs == 1


async def test_refusals_at_the_same_time_share_one_resync(sim: ExchangeSim, rig: Rig) -> None:
    symbols = many(sim, 5)
    client = rig()
    sim.faults = Hold(lambda request: not request.path.endswith("/time"))
    checks = []
    for index, symbol in enumerate(symbols):
        checks.append(asyncio.create_task(client.market(symbol)))
        await sim.arrived(2 * index + 2)
    sim.skew_ms = 60_000
    sim.release()
    assert all(market.legs for market in await asyncio.gather(*checks))
    assert (sim.count(V2), sim.count("/time")) == (10, 1)


async def test_a_clock_that_cannot_be_read_leaves_the_refusal(sim: ExchangeSim, rig: Rig) -> None:
    client = rig()
    sim.skew_ms = 60_000
    sim.faults = Script("/time", Response(500, b""))
    assert (await client.market("BTCUSDT")).position_error == "clock"
    assert (sim.count(V2), sim.count("/time")) == (1, 1)
    assert client.offset_ms == 0


async def test_a_group_with_a_refused_timestamp_is_no_storm(sim: ExchangeSim, rig: Rig) -> None:
    symbols = many(sim, 6)
    sim.faults = Script(V2, Response(400, {"code": -1021, "msg": "Timestamp"}))
    assert {market.position_error for market in await together(rig(), symbols)} == {"clock"}
    assert (sim.count(V2), sim.count("/time")) == (2, 1)


async def test_an_old_price_is_stale_where_that_is_looked_at(sim: ExchangeSim, rig: Rig, clock: Clock) -> None:
    sim.skew_ms = 30_000
    server_ms = clock.us // 1000 + sim.skew_ms
    strict, lenient = rig(max_price_age_ms=5000), rig()
    await strict.sync_clock()
    for age_ms, kind in ((0, None), (5000, None), (5001, "stale_price"), (-2000, None), (-2001, "stale_price")):
        body = {"symbol": "BTCUSDT", "markPrice": "5", "time": server_ms - age_ms}
        sim.faults = Script(MARK, Response(body=body))
        market = await strict.market("BTCUSDT")
        assert (market.price_error, market.mark_price) == (kind, None if kind else D(5))
        assert (await lenient.market("BTCUSDT")).mark_price == 5
    sim.faults = Script(MARK, Response(body={"symbol": "BTCUSDT", "markPrice": "5", "time": str(server_ms)}))
    assert (await strict.market("BTCUSDT")).price_error == "bad_response"


# Retired routes.


async def test_a_retired_v2_falls_to_v3_for_good_and_says_so_once(sim: ExchangeSim, rig: Rig) -> None:
    sim.v2_retired = True
    sim.set_price("FLATUSDT", "3")
    client = rig()
    with capture_logs() as logs:
        assert (await client.market("BTCUSDT")).legs == {"BOTH": D("0.015")}
        assert (await client.market("FLATUSDT")).legs == {"BOTH": D(0)}
        both = await together(client, ["BTCUSDT", "FLATUSDT"])
    assert [market.legs for market in both] == [{"BOTH": D("0.015")}, {"BOTH": D(0)}]
    assert [entry["event"] for entry in logs] == ["position_route_retired"]
    assert sim.count(V2) == 1


async def test_checks_that_meet_the_retirement_together_all_succeed(sim: ExchangeSim, rig: Rig) -> None:
    sim.v2_retired = True
    client = rig()
    symbols = many(sim, 3)
    sim.faults = Hold(lambda request: request.path.endswith(V2))
    checks = []
    for index, symbol in enumerate(symbols):
        checks.append(asyncio.create_task(client.market(symbol)))
        await sim.arrived(2 * index + 2)
    with capture_logs() as logs:
        sim.release()
        markets = await asyncio.gather(*checks)
    assert all(market.legs for market in markets)
    assert len(logs) == 1


async def test_a_missing_v2_route_falls_to_v3_too(sim: ExchangeSim, rig: Rig) -> None:
    sim.faults = Script(V2, Response(404, b"<html>"))
    assert (await rig().market("BTCUSDT")).legs == {"BOTH": D("0.015")}


async def test_v3_that_answers_with_other_symbols_is_no_flat_position(sim: ExchangeSim, rig: Rig) -> None:
    sim.v2_retired = True
    sim.set_price("FLATUSDT", "3")
    sim.faults = Script(V3, Response(body=[{"symbol": "BTCUSDT", "positionAmt": "1", "positionSide": "BOTH"}]))
    assert (await rig().market("FLATUSDT")).position_error == "bad_response"


# Weight.


async def test_the_exchanges_count_replaces_a_lower_one_and_a_minute_ends(
    sim: ExchangeSim, rig: Rig, clock: Clock
) -> None:
    client = rig()
    sim.faults = Script(
        MARK, Response(body={"symbol": "BTCUSDT", "markPrice": "1"}, headers={"x-mbx-used-weight-1m": "77"})
    )
    await client.market("BTCUSDT")
    assert client.weight_used == 77
    assert client.weight_limit == 2400
    clock.us += 60_000_000 - clock.us % 60_000_000 - 1
    assert client.weight_used == 77
    clock.us += 1
    assert client.weight_used == 0


async def test_a_budget_that_is_used_up_is_told_once_a_minute_and_refuses_nothing(
    sim: ExchangeSim, rig: Rig, clock: Clock
) -> None:
    client = rig()
    heavy = {"x-mbx-used-weight-1m": "2399"}
    sim.faults = Script(MARK, Response(body={"symbol": "BTCUSDT", "markPrice": "1"}, headers=heavy))
    with capture_logs() as logs:
        for _ in range(3):
            assert (await client.market("BTCUSDT")).mark_price == 1
        assert len(logs) == 1
        clock.pass_s(60)
        for _ in range(3):
            assert (await client.market("BTCUSDT")).legs
    assert [entry["event"] for entry in logs] == ["exchange_weight_over_budget"] * 2


async def test_a_weight_that_is_no_number_is_not_believed(sim: ExchangeSim, rig: Rig) -> None:
    sim.faults = Script(
        MARK, Response(body={"symbol": "BTCUSDT", "markPrice": "1"}, headers={"x-mbx-used-weight-1m": "-9e9"})
    )
    client = rig()
    await client.market("BTCUSDT")
    assert client.weight_used == 6


# Staying alive.


async def test_keeping_alive_pings_over_two_connections_and_syncs_when_due(
    sim: ExchangeSim, rig: Rig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binance, "KEEP_ALIVE_EVERY_S", 0.0)
    client = rig()
    await client.warm_up()
    assert sim.count("/time") == 1
    task = asyncio.create_task(client.keep_alive())
    await sim.arrived(3 + 10)
    assert sim.count("/time") == 1
    clock.pass_s(900)
    sim.skew_ms = 40
    await sim.arrived(len(sim.requests) + 10)
    assert sim.count("/time") == 2
    assert client.offset_ms == 40
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sim.most_connections == 2
    assert sim.count("/ping") > 10


async def test_keeping_alive_survives_trouble_and_tells_it_once(
    sim: ExchangeSim, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binance, "KEEP_ALIVE_EVERY_S", 0.0)
    client = rig()
    sim.faults = lambda _: Response(500, b"")
    with capture_logs() as logs:
        await client.warm_up()
        task = asyncio.create_task(client.keep_alive())
        await sim.arrived(12)
    assert not task.done()
    assert logs == [{"event": "exchange_unreachable", "error": "server_error", "log_level": "warning"}]
    sim.faults = None
    await sim.arrived(len(sim.requests) + 8)
    assert sim.count("/time") > 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_caller_that_goes_away_harms_nobody(sim: ExchangeSim, rig: Rig) -> None:
    client = rig()
    sim.faults = Hold()
    leaves, stays = (asyncio.create_task(client.market("BTCUSDT")) for _ in range(2))
    await sim.arrived(2)
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    sim.release()
    assert (await stays).legs == {"BOTH": D("0.015")}
    assert len(sim.requests) == 2


async def test_closing_gives_up_what_is_under_way(sim: ExchangeSim, rig: Rig) -> None:
    client = rig(timeout_s=0.3)
    sim.faults = Hold()
    check = asyncio.create_task(client.market("BTCUSDT"))
    await sim.arrived(2)
    await client.aclose()
    assert (await check).position_error == "timeout"
    assert await client.market("BTCUSDT") == Market(position_error="connection", price_error="connection")


async def test_a_bug_is_a_kind_too(sim: ExchangeSim, rig: Rig) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(f"https://host/?signature=abc {SECRET}")

    with capture_logs() as logs:
        market = await rig(on_call=broken).market("BTCUSDT")
    assert market == Market(position_error="internal", price_error="internal")
    assert [entry["error"] for entry in logs] == ["RuntimeError"] * 2
    assert SECRET not in str(logs)


# Secrets.


@pytest.mark.parametrize("bad", ["", "with space", "line\nbreak", "schlüssel", "x" * 513])
@pytest.mark.parametrize("name", ["api_key", "api_secret"])
def test_a_key_that_cannot_be_one_is_refused_without_showing_it(name: str, bad: str) -> None:
    keys: dict[str, Any] = {"api_key": KEY, "api_secret": SECRET, name: bad}
    with pytest.raises(ValueError, match=name) as refused:
        Binance(base_url="http://127.0.0.1:1", now=Clock(), **keys)
    assert not bad or bad not in str(refused.value)


def test_a_mainnet_address_needs_its_switch() -> None:
    with pytest.raises(ValueError, match="GOV_ALLOW_MAINNET"):
        Binance(base_url="https://fapi.binance.com", api_key=KEY, api_secret=SECRET, now=Clock())


TROUBLE: list[Response | Fault] = [
    Response(401, {"code": -2015, "msg": "Invalid API-key"}),
    Response(400, {"code": -1022, "msg": "Signature for this request is not valid."}),
    Response(403, b"<html>"),
    Response(429, b""),
    Response(500, b"oops"),
    Response(200, b"111 107"),
    Response(302, b"", {"location": "http://127.0.0.1:1/"}),
    Fault.RESET,
    Fault.CUT,
    Fault.HANG,
]


def echo(request: Request) -> Response:
    """What a careless proxy does: it sends the request back."""
    url = f"{request.path}?{request.query}"
    return Response(400, {"code": -1100, "msg": f"Illegal {url} {request.headers.get('x-mbx-apikey')} {SECRET}"})


@pytest.mark.parametrize("trouble", [None, *TROUBLE, echo], ids=lambda one: getattr(one, "name", None) or "x")
async def test_no_key_secret_or_signed_url_shows_anywhere(
    sim: ExchangeSim,
    rig: Rig,
    trouble: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)
    asyncio.get_running_loop().set_debug(True)
    sim.faults = trouble if callable(trouble) else lambda _: trouble
    told: list[object] = []
    real = binance._answer

    async def spy(work: Any) -> Any:
        told.append(await real(work))
        return told[-1]

    monkeypatch.setattr(binance, "_answer", spy)
    client = rig(timeout_s=0.3)
    with capture_logs() as logs:
        markets = await together(client, ["BTCUSDT"])
        markets += await together(client, ["BTCUSDT", "ETHUSDT"])
        await client.warm_up()
    asyncio.get_running_loop().set_debug(False)
    signatures = {request.params["signature"] for request in sim.requests if "signature" in request.params}
    assert signatures
    errors = [error for error in told if isinstance(error, ExchangeError)]
    assert errors
    for error in errors:
        assert (error.__cause__, error.__context__, error.__traceback__) == (None, None, None)
    seen = [caplog.text, str(logs), repr(client), repr(markets), repr(vars(client))]
    seen += [f"{error} {error!r} {vars(error)}" for error in errors]
    for text in seen:
        assert KEY not in text
        assert SECRET not in text
        assert "signature=" not in text
        assert not any(signature in text for signature in signatures)


async def test_an_error_that_is_raised_has_nothing_of_the_http_client_in_it(sim: ExchangeSim, rig: Rig) -> None:
    client = rig()
    for fault in (Fault.RESET, Fault.CUT, Response(200, b"[")):
        sim.faults = Script("/time", fault)
        with pytest.raises(ExchangeError) as failed:
            await client.sync_clock()
        assert failed.value.__cause__ is None
        assert failed.value.__context__ is None


async def test_a_request_is_no_line_of_the_log_whatever_the_level(
    sim: ExchangeSim, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert (await rig().market("BTCUSDT")).legs
    assert not caplog.records


async def test_the_environment_does_not_lead_calls_elsewhere(
    sim: ExchangeSim, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert (await rig().market("BTCUSDT")).position_error is None


async def test_a_redirect_is_not_followed(sim: ExchangeSim, rig: Rig) -> None:
    async with ExchangeSim(api_key=KEY, api_secret=SECRET) as elsewhere:
        sim.faults = lambda request: Response(307, b"", {"location": f"{elsewhere.base_url}{request.path}"})
        assert (await rig().market("BTCUSDT")).position_error == "bad_response"
        assert not elsewhere.requests


async def test_closing_leaves_no_connection(sim: ExchangeSim, rig: Rig) -> None:
    client = rig()
    await client.market("BTCUSDT")
    assert sim.open_connections == 2
    await client.aclose()
    await client.aclose()
    await sim.all_closed()


def test_it_says_where_it_points_and_nothing_else() -> None:
    client = Binance(base_url="https://DEMO-fapi.binance.com/", api_key=KEY, api_secret=SECRET, now=Clock())
    assert repr(client) == "<Binance https://demo-fapi.binance.com>"
    assert (client.offset_ms, client.weight_used, client.blocked_until_us) == (0, 0, 0)
