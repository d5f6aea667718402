"""The simulated exchange answers as the real one does, and misbehaves as told."""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from itertools import pairwise
from typing import Any

import httpx
import pytest

from governor.sim.exchange import Candle, ExchangeSim, Fault, PriceTape, Response

NOW_MS = 1_700_000_000_123
SECRET = "secret"
D = Decimal


@pytest.fixture
async def sim() -> AsyncIterator[ExchangeSim]:
    async with ExchangeSim(api_key="key", api_secret="secret", now=lambda: NOW_MS * 1000) as running:
        running.set_price("BTCUSDT", "17000.5")
        yield running


@pytest.fixture
async def http(sim: ExchangeSim) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=sim.base_url, trust_env=False) as client:
        yield client


def signed(query: str = "symbol=BTCUSDT", *, at_ms: int = NOW_MS, secret: str = SECRET) -> str:
    payload = f"{query}&timestamp={at_ms}".lstrip("&")
    return f"{payload}&signature={hmac.new(secret.encode(), payload.encode(), hashlib.sha256).hexdigest()}"


async def position_risk(http: httpx.AsyncClient, query: str, *, key: str = "key", version: int = 2) -> Any:
    answer = await http.get(f"/fapi/v{version}/positionRisk?{query}", headers={"X-MBX-APIKEY": key} if key else {})
    body = answer.json()
    return body if isinstance(body, list) else (answer.status_code, body["code"])


async def test_it_is_up_at_once_on_a_port_of_its_own() -> None:
    started = time.monotonic()
    async with ExchangeSim() as one, ExchangeSim() as other:
        assert one.base_url != other.base_url
        assert one.base_url.startswith("http://127.0.0.1:")
    assert time.monotonic() - started < 0.5


async def test_time_ping_and_weight(sim: ExchangeSim, http: httpx.AsyncClient) -> None:
    sim.skew_ms = 77
    answer = await http.get("/fapi/v1/time")
    assert answer.json() == {"serverTime": NOW_MS + 77}
    assert answer.headers["x-mbx-used-weight-1m"] == "1"
    assert (await http.get("/fapi/v1/ping")).json() == {}
    await http.get("/fapi/v1/premiumIndex")
    await http.get("/fapi/v1/premiumIndex?symbol=BTCUSDT")
    assert (await http.get("/fapi/v2/positionRisk")).headers["x-mbx-used-weight-1m"] == str(1 + 1 + 10 + 1 + 5)
    assert sim.weight_used == 18


async def test_a_mark_price_is_an_object_and_all_are_a_list(sim: ExchangeSim, http: httpx.AsyncClient) -> None:
    sim.set_price("ETHUSDT", "1200")
    one = (await http.get("/fapi/v1/premiumIndex?symbol=BTCUSDT")).json()
    assert (one["symbol"], one["markPrice"], one["time"]) == ("BTCUSDT", "17000.50000000", NOW_MS - 123)
    every = (await http.get("/fapi/v1/premiumIndex")).json()
    assert [row["symbol"] for row in every] == ["BTCUSDT", "ETHUSDT"]
    unknown = await http.get("/fapi/v1/premiumIndex?symbol=NOPE")
    assert (unknown.status_code, unknown.json()["code"]) == (400, -1121)


async def test_v2_shows_a_flat_position_and_v3_does_not(sim: ExchangeSim, http: httpx.AsyncClient) -> None:
    (flat,) = await position_risk(http, signed())
    assert (flat["positionAmt"], flat["positionSide"], flat["leverage"]) == ("0", "BOTH", "20")
    assert await position_risk(http, signed(), version=3) == []
    sim.set_position("BTCUSDT", "-0.010")
    (short,) = await position_risk(http, signed(""), version=3)
    assert (short["positionAmt"], short["notional"], short["marginAsset"]) == ("-0.010", "-170.00500000", "USDT")
    assert "leverage" not in short


async def test_hedge_mode_has_two_rows() -> None:
    async with ExchangeSim(api_key="key", api_secret="secret", now=lambda: NOW_MS * 1000, hedge=True) as sim:
        sim.set_position("BTCUSDT", "1", "LONG")
        async with httpx.AsyncClient(base_url=sim.base_url, trust_env=False) as http:
            both = await position_risk(http, signed())
            one = await position_risk(http, signed(), version=3)
        with pytest.raises(ValueError, match="BOTH"):
            sim.set_position("BTCUSDT", "1")
    assert [(row["positionSide"], row["positionAmt"]) for row in both] == [("LONG", "1"), ("SHORT", "0")]
    assert [row["positionSide"] for row in one] == ["LONG"]


@pytest.mark.parametrize(
    ("query", "key", "refusal"),
    [
        (signed(), "", (401, -2014)),
        (signed(), "other", (401, -2015)),
        (signed(secret="other"), "key", (400, -1022)),
        (signed() + "0", "key", (400, -1022)),
        (signed() + "&symbol=ETHUSDT", "key", (400, -1101)),
        (signed() + "&x=1", "key", (400, -1022)),
        (signed(at_ms=NOW_MS + 1000), "key", (400, -1021)),
        (signed(at_ms=NOW_MS - 5001), "key", (400, -1021)),
        (signed("symbol=BTCUSDT&recvWindow=100", at_ms=NOW_MS - 101), "key", (400, -1021)),
        (signed("symbol=BTCUSDT&recvWindow=60001"), "key", (400, -1131)),
        (signed("symbol=BTCUSDT&recvWindow=five"), "key", (400, -1100)),
        (signed("symbol=NOPE"), "key", (400, -1121)),
        ("symbol=BTCUSDT", "key", (400, -1102)),
        (f"symbol=BTCUSDT&timestamp={NOW_MS}", "key", (400, -1102)),
    ],
)
async def test_it_refuses_as_the_real_one_does(
    http: httpx.AsyncClient, query: str, key: str, refusal: tuple[int, int]
) -> None:
    assert await position_risk(http, query, key=key) == refusal


@pytest.mark.parametrize("at_ms", [NOW_MS + 999, NOW_MS - 5000])
async def test_a_timestamp_inside_the_window_is_taken(http: httpx.AsyncClient, at_ms: int) -> None:
    assert len(await position_risk(http, signed(at_ms=at_ms))) == 1


async def test_a_retired_route_says_so_in_a_200(sim: ExchangeSim, http: httpx.AsyncClient) -> None:
    sim.v2_retired = True
    assert await position_risk(http, signed()) == (200, -5000)
    assert await position_risk(http, signed(), version=3) == []


async def test_other_paths_and_methods_are_refused(http: httpx.AsyncClient) -> None:
    assert (await http.get("/fapi/v1/order")).status_code == 404
    assert (await http.post("/fapi/v1/time", content=b"x=1")).status_code == 405


def test_reducing_trades_down_and_never_past_zero() -> None:
    sim = ExchangeSim()
    sim.set_position("BTCUSDT", "-1.5")
    assert sim.reduce("BTCUSDT", "1") == 1
    assert sim.position("BTCUSDT") == D("-0.5")
    assert sim.reduce("BTCUSDT", "9") == D("0.5")
    assert sim.position("BTCUSDT") == 0
    assert sim.reduce("ETHUSDT", "1") == 0
    hedged = ExchangeSim(hedge=True)
    hedged.set_position("BTCUSDT", "1", "LONG")
    hedged.set_position("BTCUSDT", "-3", "SHORT")
    hedged.reduce("BTCUSDT", "1")
    hedged.reduce("BTCUSDT", "0.4", "LONG")
    assert (hedged.position("BTCUSDT", "LONG"), hedged.position("BTCUSDT", "SHORT")) == (D("0.6"), D(-2))


async def test_connections_are_kept_and_requests_remembered(sim: ExchangeSim, http: httpx.AsyncClient) -> None:
    for _ in range(3):
        await http.get("/fapi/v1/premiumIndex?symbol=BTCUSDT")
    assert sim.most_connections == 1
    assert [(one.method, one.path, one.symbol, one.time_us, one.connection) for one in sim.requests] == [
        ("GET", "/fapi/v1/premiumIndex", "BTCUSDT", NOW_MS * 1000, 1)
    ] * 3
    assert sim.count("/premiumIndex") == 3
    await http.aclose()
    await sim.all_closed()
    assert sim.open_connections == 0


async def test_faults(sim: ExchangeSim, http: httpx.AsyncClient) -> None:
    sim.faults = lambda _: Response(418, {"code": -1003}, {"Retry-After": "9"})
    answer = await http.get("/fapi/v1/time")
    assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (418, {"code": -1003}, "9")
    sim.faults = lambda _: Response(403, b"<html>", {"content-type": "text/html"})
    assert (await http.get("/fapi/v1/time")).content == b"<html>"
    sim.faults = lambda _: Fault.CUT
    with pytest.raises(httpx.RemoteProtocolError):
        await http.get("/fapi/v1/time")
    sim.faults = lambda _: Fault.RESET
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        await http.get("/fapi/v1/time")
    sim.faults = lambda _: Fault.HANG
    with pytest.raises(httpx.ReadTimeout):
        await http.get("/fapi/v1/time", timeout=0.05)
    sim.release()
    assert (await http.get("/fapi/v1/time")).status_code == 200


async def test_latency_takes_time(sim: ExchangeSim, http: httpx.AsyncClient) -> None:
    sim.latency_s = 0.05
    started = time.monotonic()
    await http.get("/fapi/v1/time")
    assert time.monotonic() - started >= 0.04


async def test_what_is_no_http_ends_the_connection(sim: ExchangeSim) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(sim.base_url.rpartition(":")[2]))
    writer.write(b"hello\r\n\r\n")
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    await sim.all_closed()
    assert not sim.requests


CANDLES = (Candle(D(10), D(16), D(8), D(14)), Candle(D(14), D(15), D(5), D(6)))


def test_a_tape_runs_through_the_extremes_of_each_candle_and_back() -> None:
    tape = PriceTape({"A": (60, CANDLES)}, speed=60.0)
    third = 1 / 3
    at = [0, third, 2 * third, 1, 1 + third, 1 + 2 * third, 2, 3, 4, -5]
    assert [round(tape.price("A", seconds), 3) for seconds in at] == [10, 8, 16, 14, 15, 5, 6, 14, 10, 10]


def test_a_tape_is_the_same_for_the_same_time_and_never_jumps() -> None:
    first, second = PriceTape.load(speed=300), PriceTape.load(speed=300)
    assert first.symbols == ("BTCUSDT", "LTCUSDT")
    for symbol in first.symbols:
        played = [first.price(symbol, step / 100) for step in range(8000)]
        assert played == [second.price(symbol, step / 100) for step in range(8000)]
        assert len(set(played)) > 1000
        steps = [abs(later - price) / price for price, later in pairwise(played)]
        assert max(steps) < D("0.02")
        assert all(price > 0 and price.is_finite() for price in played)


async def test_a_tape_moves_the_mark_prices_and_an_owners_price_goes_first() -> None:
    at_us = [NOW_MS * 1000]
    tape = PriceTape({"A": (60, CANDLES)}, speed=60.0)
    async with (
        ExchangeSim(now=lambda: at_us[0], tape=tape) as sim,
        httpx.AsyncClient(base_url=sim.base_url, trust_env=False) as http,
    ):
        at_us[0] += 1_000_000
        answer = await http.get("/fapi/v1/premiumIndex?symbol=A")
        assert json.loads(answer.content)["markPrice"] == "14.00000000"
        sim.set_price("A", "3")
        assert sim.price("A") == 3
        assert sim.symbols == ("A",)
