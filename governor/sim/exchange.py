"""A simulated exchange: the USD-M futures endpoints the Governor uses, over real HTTP on the loopback.

It checks keys, signatures and timestamps as the real one does, holds positions and mark prices that its owner
sets, and misbehaves on request, so that every row of the error table can be played. `PriceTape` moves the mark
prices along recorded candles.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from importlib.resources import files
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl

import h11
import msgspec

SIDES = ("BOTH", "LONG", "SHORT")
MAX_RECV_WINDOW_MS = 60_000
MAX_AHEAD_MS = 1000
_POSITION = ("/fapi/v2/positionRisk", "/fapi/v3/positionRisk")
_WEIGHTS = {True: 1, False: 10}  # premiumIndex with and without a symbol


class Candle(msgspec.Struct, frozen=True, array_like=True):
    """Prices of one candle in quote units, as recorded."""

    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal


class _Recording(msgspec.Struct, frozen=True):
    symbol: str
    interval_s: int
    rows: tuple[Candle, ...]


class PriceTape:
    """Recorded candles played as a moving mark price; the same for the same elapsed time.

    Args:
        recordings: candles and the seconds between them, by symbol.
        speed: recorded seconds that pass in one second.
    """

    def __init__(self, recordings: Mapping[str, tuple[int, tuple[Candle, ...]]], *, speed: float = 60.0) -> None:
        self._recordings = dict(recordings)
        self.speed = speed

    @classmethod
    def load(cls, *, speed: float = 60.0) -> PriceTape:
        """Play what comes with the package: BTCUSDT and LTCUSDT."""
        read = msgspec.json.Decoder(_Recording).decode
        found = [
            read(entry.read_bytes())
            for entry in files("governor.sim").joinpath("data").iterdir()
            if entry.name.endswith(".json")
        ]
        return cls({one.symbol: (one.interval_s, one.rows) for one in found}, speed=speed)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbols on the tape, in order of the alphabet."""
        return tuple(sorted(self._recordings))

    def price(self, symbol: str, elapsed_s: float) -> Decimal:
        """Mark price in quote units, 8 decimals.

        Args:
            symbol: one of `symbols`.
            elapsed_s: seconds since the tape was started. At its end it runs backwards, without a jump.
        """
        interval_s, candles = self._recordings[symbol]
        position = max(elapsed_s, 0.0) * self.speed / interval_s % (2 * len(candles))
        if position >= len(candles):
            position = max(2 * len(candles) - position, 0.0)
        index = min(int(position), len(candles) - 1)
        return _within(candles[index], min(position - index, 1.0))


def _within(candle: Candle, share: float) -> Decimal:
    """Price at a share (0 to 1) of the candle: from open by way of both extremes to close."""
    extremes = (candle.low, candle.high) if candle.close >= candle.open else (candle.high, candle.low)
    points = (candle.open, *extremes, candle.close)
    leg = min(int(share * 3), 2)
    start, end = points[leg], points[leg + 1]
    price = start + (end - start) * Decimal(repr(round(share * 3 - leg, 6)))
    return price.quantize(Decimal("0.00000001"))


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came in.

    Attributes:
        method: GET and so on.
        path: without the query.
        query: as sent.
        params: decoded; the last one counts when a name comes twice.
        headers: names in lower case.
        time_us: when, microseconds since the epoch by the clock the exchange was given.
        connection: number of the connection, counted from 1.
    """

    method: str
    path: str
    query: str
    params: Mapping[str, str]
    headers: Mapping[str, str]
    time_us: int
    connection: int

    @property
    def symbol(self) -> str | None:
        """The symbol asked for, None for all."""
        return self.params.get("symbol")


@dataclass(frozen=True, slots=True)
class Response:
    """One answer.

    Attributes:
        status: HTTP status.
        body: bytes as they are, anything else as JSON.
        headers: added to the usual ones, or in their place.
    """

    status: int = 200
    body: object = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        """The body in bytes."""
        return self.body if isinstance(self.body, bytes) else msgspec.json.encode(self.body)


class Fault(Enum):
    """Ways not to answer."""

    HANG = "hang"
    """Wait until `ExchangeSim.release` is called, then answer."""
    CUT = "cut"
    """Send the headers and half of the body, then close."""
    RESET = "reset"
    """Close at once, as after a crash."""


Faults = Callable[[Request], "Response | Fault | None"]


class ExchangeSim:
    """An exchange with one account, on a port of its own while the `async with` block lasts.

    Args:
        api_key: the only key it knows.
        api_secret: its secret.
        hedge: positions by side instead of one a symbol.
        now: wall clock, microseconds since the epoch.
        tape: mark prices of its symbols, unless `set_price` sets one.
        latency_s: seconds before each answer, or a function of the request.
        faults: asked first about each request; None answers properly.
        v2_retired: /fapi/v2/positionRisk answers as a retired route does.

    Attributes:
        requests: the latest 10,000 requests.
        skew_ms: added to its own clock.
        open_connections: how many are open now.
        most_connections: how many were open at the same time.
    """

    def __init__(
        self,
        *,
        api_key: str = "simulated-key",
        api_secret: str = "simulated-secret",  # noqa: S107 - known to everybody, guards nothing
        hedge: bool = False,
        now: Callable[[], int] = lambda: time.time_ns() // 1000,
        tape: PriceTape | None = None,
        latency_s: float | Callable[[Request], float] = 0.0,
        faults: Faults | None = None,
        v2_retired: bool = False,
    ) -> None:
        self.api_key = api_key
        self.hedge = hedge
        self.latency_s = latency_s
        self.faults = faults
        self.v2_retired = v2_retired
        self.skew_ms = 0
        self.requests: deque[Request] = deque(maxlen=10_000)
        self.open_connections = 0
        self.most_connections = 0
        self._secret = api_secret
        self._now = now
        self._tape = tape
        self._started_us = now()
        self._prices: dict[str, Decimal] = {}
        self._positions: dict[tuple[str, str], Decimal] = {}
        self._weight: Counter[int] = Counter()
        self._connections = 0
        self._received = 0
        self._arrived = asyncio.Condition()
        self._released = asyncio.Event()
        self._handlers: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.base_url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=256)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    # What the owner sets and looks at.

    def set_position(self, symbol: str, amt: str | Decimal, side: str = "BOTH") -> None:
        """Set a position: base units, below zero for a short. In hedge mode `side` is LONG or SHORT."""
        if side not in SIDES or (side == "BOTH") == self.hedge:
            raise ValueError(f"{side!r} is no side in {'hedge' if self.hedge else 'one-way'} mode")
        self._positions[symbol, side] = Decimal(amt)

    def set_price(self, symbol: str, price: str | Decimal) -> None:
        """Set a mark price in quote units, in place of the tape's."""
        self._prices[symbol] = Decimal(price)

    def reduce(self, symbol: str, qty: str | Decimal, side: str | None = None) -> Decimal:
        """Trade a position down, never past zero.

        Args:
            symbol: whose.
            qty: base units, above zero.
            side: the leg in hedge mode, None for the larger one.

        Returns:
            The quantity that was traded.
        """
        legs = {leg: amt for (name, leg), amt in self._positions.items() if name == symbol}
        if not legs:
            return Decimal(0)
        leg = side or max(legs, key=lambda one: abs(legs[one]))
        held = legs.get(leg, Decimal(0))
        traded = min(Decimal(qty), abs(held))
        self._positions[symbol, leg] = held - traded.copy_sign(held)
        return traded

    def position(self, symbol: str, side: str = "BOTH") -> Decimal:
        """Signed position in base units."""
        return self._positions.get((symbol, side), Decimal(0))

    def price(self, symbol: str) -> Decimal:
        """Mark price in quote units, zero for a symbol that has none."""
        if symbol in self._prices or self._tape is None or symbol not in self._tape.symbols:
            return self._prices.get(symbol, Decimal(0))
        return self._tape.price(symbol, (self._now() - self._started_us) / 1e6)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Listed symbols: whatever has a price or a position."""
        held = {symbol for symbol, _ in self._positions}
        return tuple(sorted({*self._prices, *held, *(self._tape.symbols if self._tape else ())}))

    @property
    def weight_used(self) -> int:
        """Request weight in the current minute."""
        return self._weight[self._server_ms() // 60_000]

    def count(self, path: str) -> int:
        """How many requests there were whose path ends so."""
        return sum(request.path.endswith(path) for request in self.requests)

    async def arrived(self, number: int) -> None:
        """Wait until so many requests have come in since the start."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: self._received >= number)

    async def all_closed(self) -> None:
        """Wait until no connection is open."""
        while self._handlers:
            await asyncio.wait(self._handlers)

    def release(self) -> None:
        """Let everything that hangs, now or later, answer."""
        self._released.set()

    # HTTP.

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        if handler is not None:
            self._handlers.add(handler)
        self._connections += 1
        self.open_connections += 1
        self.most_connections = max(self.most_connections, self.open_connections)
        try:
            with contextlib.suppress(h11.RemoteProtocolError, ConnectionError, asyncio.CancelledError):
                await self._serve(self._connections, reader, writer)
        finally:
            self.open_connections -= 1
            if handler is not None:
                self._handlers.discard(handler)
            writer.close()

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with contextlib.aclosing(_requests(number, reader, self._now)) as requests:
            async for http, request in requests:
                self.requests.append(request)
                self._received += 1
                async with self._arrived:
                    self._arrived.notify_all()
                if not await self._reply(http, request, writer):
                    return

    async def _reply(self, http: h11.Connection, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False ends the connection."""
        fault = self.faults(request) if self.faults is not None else None
        pause = self.latency_s(request) if callable(self.latency_s) else self.latency_s
        if pause > 0:
            await asyncio.sleep(pause)
        if fault is Fault.RESET:
            writer.transport.abort()
            return False
        if fault is Fault.HANG:
            await self._released.wait()
        response = fault if isinstance(fault, Response) else self.answer(request)
        whole = self._encode(http, response)
        if fault is Fault.CUT:
            writer.write(whole[: len(whole) - (len(response.content) + 1) // 2])
            await writer.drain()
            return False
        writer.write(whole)
        await writer.drain()
        return http.our_state is h11.DONE and http.their_state is h11.DONE

    def _encode(self, http: h11.Connection, response: Response) -> bytes:
        content = response.content
        headers = {
            "content-type": "application/json",
            "content-length": str(len(content)),
            "x-mbx-used-weight-1m": str(self.weight_used),
        } | {name.lower(): value for name, value in response.headers.items()}
        head = http.send(h11.Response(status_code=response.status, headers=list(headers.items()))) or b""
        body = http.send(h11.Data(data=content)) or b""
        return head + body + (http.send(h11.EndOfMessage()) or b"")

    # The exchange.

    def answer(self, request: Request) -> Response:
        """What the exchange says to a request."""
        self._weight[self._server_ms() // 60_000] += _weight(request)
        if request.method != "GET":
            return Response(405, {"code": -1000, "msg": f"Request method '{request.method}' not supported"})
        if request.path == "/fapi/v1/ping":
            return Response(body={})
        if request.path == "/fapi/v1/time":
            return Response(body={"serverTime": self._server_ms()})
        if request.path == "/fapi/v1/premiumIndex":
            return self._premium_index(request)
        if request.path in _POSITION:
            return self._position_risk(request)
        return Response(404, {"status": 404, "error": "Not Found", "path": request.path})

    def _premium_index(self, request: Request) -> Response:
        if request.symbol is None:
            return Response(body=[self._mark_row(symbol) for symbol in self.symbols])
        if request.symbol not in self.symbols:
            return _refuse(400, -1121, "Invalid symbol.")
        return Response(body=self._mark_row(request.symbol))

    def _position_risk(self, request: Request) -> Response:
        v2 = request.path == _POSITION[0]
        if v2 and self.v2_retired:
            return _refuse(200, -5000, f"GET {_POSITION[0]} is retired, please use GET {_POSITION[1]}")
        refused = self._check_signed(request)
        if refused is not None:
            return refused
        if request.symbol is not None and request.symbol not in self.symbols:
            return _refuse(400, -1121, "Invalid symbol.")
        wanted = self.symbols if request.symbol is None else (request.symbol,)
        legs = ("LONG", "SHORT") if self.hedge else ("BOTH",)
        held = [(symbol, leg) for symbol in wanted for leg in legs if v2 or self.position(symbol, leg)]
        return Response(body=[self._position_row(symbol, leg, v2=v2) for symbol, leg in held])

    def _check_signed(self, request: Request) -> Response | None:
        """Refuse as the exchange would, in its order: key, parameters, timestamp, signature."""
        return (
            self._check_key(request.headers.get("x-mbx-apikey", ""))
            or _check_parameters(request)
            or self._check_time(request)
            or self._check_signature(request.query)
        )

    def _check_key(self, key: str) -> Response | None:
        if not key:
            return _refuse(401, -2014, "API-key format invalid.")
        if not hmac.compare_digest(key.encode(), self.api_key.encode()):
            return _refuse(401, -2015, "Invalid API-key, IP, or permissions for action.")
        return None

    def _check_time(self, request: Request) -> Response | None:
        window = int(request.params.get("recvWindow", "5000"))
        if window > MAX_RECV_WINDOW_MS:
            return _refuse(400, -1131, "recvWindow must be less than 60000")
        age = self._server_ms() - int(request.params["timestamp"])
        if age <= -MAX_AHEAD_MS:
            return _refuse(400, -1021, "Timestamp for this request was 1000ms ahead of the server's time.")
        if age > window:
            return _refuse(400, -1021, "Timestamp for this request is outside of the recvWindow.")
        return None

    def _check_signature(self, query: str) -> Response | None:
        payload, _, signature = query.rpartition("&signature=")
        expected = hmac.new(self._secret.encode(), payload.encode(), hashlib.sha256).hexdigest()
        if not hmac.compare_digest(signature.lower().encode(), expected.encode()):
            return _refuse(400, -1022, "Signature for this request is not valid.")
        return None

    def _mark_row(self, symbol: str) -> dict[str, object]:
        price = f"{self.price(symbol):.8f}"
        return {
            "symbol": symbol,
            "markPrice": price,
            "indexPrice": price,
            "estimatedSettlePrice": price,
            "lastFundingRate": "0.00010000",
            "interestRate": "0.00010000",
            "nextFundingTime": (self._server_ms() // 28_800_000 + 1) * 28_800_000,
            "time": self._server_ms() // 1000 * 1000,
        }

    def _position_row(self, symbol: str, side: str, *, v2: bool) -> dict[str, object]:
        amt, price = self.position(symbol, side), self.price(symbol)
        row: dict[str, object] = {
            "symbol": symbol,
            "positionAmt": f"{amt:f}",
            "entryPrice": "0.0",
            "breakEvenPrice": "0.0",
            "markPrice": f"{price:.8f}",
            "unRealizedProfit": "0.00000000",
            "liquidationPrice": "0",
            "isolatedMargin": "0.00000000",
            "positionSide": side,
            "notional": f"{amt * price:.8f}",
            "isolatedWallet": "0",
            "updateTime": 0,
        }
        own: dict[str, object] = (
            {"leverage": "20", "maxNotionalValue": "100000", "marginType": "cross", "isAutoAddMargin": "false"}
            if v2
            else {"marginAsset": "USDT", "initialMargin": "0", "maintMargin": "0", "adl": 0}
        )
        return row | own

    def _server_ms(self) -> int:
        return self._now() // 1000 + self.skew_ms


async def _requests(
    number: int, reader: asyncio.StreamReader, now: Callable[[], int]
) -> AsyncGenerator[tuple[h11.Connection, Request], None]:
    """Requests of one connection, each with the state machine its answer goes through."""
    http = h11.Connection(h11.SERVER)
    head: h11.Request | None = None
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(65_536))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            yield http, _parse(head, now(), number)
            http.start_next_cycle()
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return


def _parse(head: h11.Request, time_us: int, connection: int) -> Request:
    path, _, query = head.target.decode("ascii", "replace").partition("?")
    return Request(
        method=head.method.decode(),
        path=path,
        query=query,
        params=dict(parse_qsl(query, keep_blank_values=True)),
        headers={name.decode(): value.decode("latin-1") for name, value in head.headers},
        time_us=time_us,
        connection=connection,
    )


def _check_parameters(request: Request) -> Response | None:
    names = [name for name, _ in parse_qsl(request.query, keep_blank_values=True)]
    if len(names) != len(set(names)):
        return _refuse(400, -1101, "Duplicate values for a parameter detected.")
    for name in ("timestamp", "signature"):
        if not request.params.get(name):
            text = f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed."
            return _refuse(400, -1102, text)
    numbers = (request.params["timestamp"], request.params.get("recvWindow", "5000"))
    if not all(text.isascii() and text.isdigit() for text in numbers):
        return _refuse(400, -1100, "Illegal characters found in a parameter.")
    return None


def _weight(request: Request) -> int:
    if request.path in _POSITION:
        return 5
    return _WEIGHTS[request.symbol is not None] if request.path.endswith("/premiumIndex") else 1


def _refuse(status: int, code: int, message: str) -> Response:
    return Response(status, {"code": code, "msg": message})
