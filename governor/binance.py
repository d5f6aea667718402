"""The exchange: positions and mark prices of Binance USD-M futures, asked for fresh, or the kind of trouble.

How a call travels. `market(symbol)` puts the symbol among those that wait; at the end of the same turn of the
event loop all that wait leave together, as single calls or, where that costs less weight, as calls for all
symbols. A request that has left is never shared with a later caller, so every answer was asked for after the
call for it began. Each answer goes to its symbol the moment it is there; a slow symbol holds up no other.

An exchange that is near is waited for awake: a processor that sleeps meanwhile, a virtual one above all, takes its
time to come back, and is given back with cold caches.

An answer counts as a position only when it proves one: v2 sends a row for a flat symbol too, so an empty list
from it is trouble. v3, used once v2 is retired, sends no row for a flat symbol.

What went wrong is an `ExchangeError` inside this module and a kind, one of `ERROR_KINDS`, outside; the tree of
kinds stands in `governor.binance_errors`. No URL leaves this module: a signed one is as good as a key for as
long as its window lasts. That is why errors of the HTTP client are replaced, never chained.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TypeVar

import msgspec

from governor.binance_errors import (
    ERROR_KINDS,
    SECOND_TRY_AFTER_S,
    STOPPED,
    Breaker,
    ExchangeError,
    refusal,
)
from governor.binance_wire import (
    MARK,
    MARKS,
    PING,
    POSITION_V2,
    POSITION_V3,
    TIME,
    WEIGHT_BUDGET,
    WEIGHT_LIMIT,
    MarkRow,
    PositionRow,
    Route,
    Weight,
    mark_price,
    position_legs,
    sign,
    signer,
)
from governor.hosts import check_base_url
from governor.http_client import Answer, HttpClient, UnreadableError
from governor.logs import Logger
from governor.market import Market

__all__ = ["ERROR_KINDS", "Binance", "ExchangeError", "sign"]

T = TypeVar("T")
log = Logger("governor.binance")

MAX_CONNECTIONS = 64
MAX_IN_FLIGHT = 48
"""Above this, symbols wait and then share the calls for all symbols. Room for 24 lone checks at once."""
SINGLE_MARKS_UP_TO = 10
"""All mark prices cost weight 10, one costs 1."""
KEEP_ALIVE_EVERY_S = 20.0
IDLE_S = 300.0
SYNC_EVERY_S = 900.0
MAX_BODY = 4_000_000
_AGENT = {"user-agent": "quantum-governor"}
_PACKED = {"accept-encoding": "gzip"}
"""For answers of all symbols; that of one fits into a packet as it is."""
MAX_AHEAD_MS = 2000

_SYMBOL = re.compile(r"[A-Z0-9_]{1,32}").fullmatch
_NOT_ALONE_EITHER = (*STOPPED, "auth", "clock")


@dataclass(slots=True, eq=False)
class _Ask:
    """One symbol's question, shared by the callers that came before it was sent."""

    symbol: str
    deadline: float = 0.0
    position: dict[str, Decimal] | ExchangeError | None = None
    """None: not known yet."""
    price: Decimal | ExchangeError | None = None
    """None: not known yet."""
    callers: list[asyncio.Future[None]] = field(default_factory=list)

    def found_position(self, answer: dict[str, Decimal] | ExchangeError) -> None:
        self.position = answer
        self._look()

    def found_price(self, answer: Decimal | ExchangeError) -> None:
        self.price = answer
        self._look()

    def _look(self) -> None:
        if self.position is not None and self.price is not None:
            for caller in self.callers:
                _go_on(caller)


@dataclass(slots=True)
class Stats:
    """Counts since the start, for metrics."""

    requests: int = 0
    second_tries: int = 0
    groups: int = 0
    """Times that several symbols shared the calls."""
    resyncs: int = 0
    """Clock resynced because the exchange refused a timestamp."""


class Binance:
    """One account at one address of the exchange.

    Args:
        base_url: see `check_base_url`.
        api_key: the key that goes with the address.
        api_secret: its secret.
        timeout_s: seconds one `market` call may take, a second try included.
        allow_mainnet: whether `base_url` may be the mainnet.
        now: wall clock, microseconds since the epoch.
        monotonic: seconds, for durations.
        on_call: told about each request: endpoint, seconds, `ok` or a kind.
        recv_window_ms: how long a signed request stays valid.
        max_price_age_ms: mark prices older than this are `stale_price`; None does not look.
        blocked_until_us: end of a ban remembered from before.
        awake_s: an answer that usually comes sooner is waited for without sleeping; 0: never.

    Raises:
        ValueError: an address that is not allowed, or a key that cannot be one.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        api_secret: str,
        timeout_s: float = 2.0,
        allow_mainnet: bool = False,
        now: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
        on_call: Callable[[str, float, str], None] | None = None,
        recv_window_ms: int = 5000,
        max_price_age_ms: int | None = None,
        blocked_until_us: int = 0,
        awake_s: float = 0.0,
    ) -> None:
        self.base_url = check_base_url(base_url, allow_mainnet=allow_mainnet)
        self.stats = Stats()
        self._signed = signer(api_key, api_secret)
        self._timeout_s = timeout_s
        self._now = now
        self._monotonic = monotonic
        self._on_call = on_call
        self._recv_window_ms = recv_window_ms
        self._max_price_age_ms = max_price_age_ms
        self._position_route = POSITION_V2
        self._waiting: dict[str, _Ask] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._all_calls = Breaker(until_us=blocked_until_us)
        self._signed_calls = Breaker(kind="auth")
        self._weight = Weight()
        self._offset_ms = 0
        self._synced = 0
        self._synced_at = 0.0
        self._sync_lock = asyncio.Lock()
        self._last_trouble = ""
        self._closed = False
        self._awake_s = awake_s
        self._awake_until = 0.0
        """On the event loop's clock."""
        self._turning = False
        self._took_s = 0.0
        """The latest answer, or how long it was waited for in vain."""
        self._http = HttpClient(self.base_url, _AGENT, connections=MAX_CONNECTIONS, idle_s=IDLE_S)

    def __repr__(self) -> str:
        return f"<Binance {self.base_url}>"

    @property
    def offset_ms(self) -> int:
        """The exchange's clock minus ours, in milliseconds."""
        return self._offset_ms

    @property
    def weight_used(self) -> int:
        """Request weight of the current minute: our count, or the exchange's where that is higher."""
        return self._weight.used(self._server_ms())

    @property
    def weight_limit(self) -> int:
        """Request weight the exchange allows in a minute."""
        return WEIGHT_LIMIT

    @property
    def blocked_until_us(self) -> int:
        """When calls go out again, microseconds since the epoch; 0 when nothing holds them back."""
        until = self._all_calls.until_us
        return until if until > self._now() else 0

    async def market(self, symbol: str) -> Market:
        """Ask for the position and the mark price of a symbol, at the same time. Never raises for trouble."""
        if not _SYMBOL(symbol):
            return Market(position_error="bad_symbol", price_error="bad_symbol")
        if self._closed:
            return Market(position_error="connection", price_error="connection")
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._dispatch)
        ask = self._waiting.get(symbol)
        if ask is None:
            ask = self._waiting[symbol] = _Ask(symbol)
        ask.deadline = loop.time() + self._timeout_s
        caller: asyncio.Future[None] = loop.create_future()
        ask.callers.append(caller)
        timer = loop.call_at(ask.deadline, _go_on, caller)
        try:
            await caller
        finally:
            timer.cancel()
        return _as_market(ask)

    async def sync_clock(self) -> None:
        """Measure how far the exchange's clock is from ours, at the middle of the round trip.

        Raises:
            ExchangeError: no usable answer; the offset stays as it was.
        """
        await self._sync(self._deadline())

    async def warm_up(self) -> None:
        """Open two connections and sync the clock, so that the first check pays for neither."""
        await self._beat(sync=True)

    async def keep_alive(self) -> None:
        """Keep two connections open and the clock in step, until cancelled."""
        while True:
            await asyncio.sleep(KEEP_ALIVE_EVERY_S)
            due = self._synced == 0 or self._monotonic() - self._synced_at >= SYNC_EVERY_S
            await self._beat(sync=due)

    async def aclose(self) -> None:
        """Give up what is under way and close all connections."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    async def _beat(self, *, sync: bool) -> None:
        # Two at the same time need two connections, as a check does; the clock is read over a warm one, since
        # the time it takes to connect would count as half an offset.
        answers = list(await asyncio.gather(_answer(self._ping()), _answer(self._ping())))
        if sync:
            answers.append(await _answer(self._sync(self._deadline())))
        troubles = [answer.kind for answer in answers if isinstance(answer, ExchangeError)]
        trouble = troubles[0] if troubles else ""
        if trouble and trouble != self._last_trouble:
            log.warning("exchange_unreachable", error=trouble)
        self._last_trouble = trouble

    async def _ping(self) -> None:
        await self._attempt(PING, None, self._deadline())

    async def _sync(self, deadline: float) -> None:
        sent = self._now()
        answer = await self._attempt(TIME, None, deadline)
        self._offset_ms = answer.server_time - (sent + self._now()) // 2000
        self._synced += 1
        self._synced_at = self._monotonic()

    async def _resync(self, synced: int, deadline: float) -> bool:
        """Sync once for all requests that were refused under the same offset."""
        async with self._sync_lock:
            if self._synced == synced:
                self.stats.resyncs += 1
                return not isinstance(await _answer(self._sync(deadline)), ExchangeError)
        return True

    def _dispatch(self) -> None:
        """Send off every symbol that waits."""
        if not self._waiting or len(self._tasks) >= MAX_IN_FLIGHT:
            return
        asks = list(self._waiting.values())
        self._waiting = {}
        if len(asks) == 1:
            self._spawn(self._position(asks[0]))
        else:
            self.stats.groups += 1
            self._spawn(self._positions_of(asks))
        if len(asks) > SINGLE_MARKS_UP_TO:
            self._spawn(self._prices_of(asks))
        else:
            for ask in asks:
                self._spawn(self._price(ask))
        if self._took_s < self._awake_s:
            self._awake_until = asyncio.get_running_loop().time() + self._awake_s
            if not self._turning:
                self._stay_awake()

    def _stay_awake(self) -> None:
        """Have the event loop go round, letting others have the processor, where it would sleep until an answer."""
        loop = asyncio.get_running_loop()
        self._turning = bool(self._tasks) and loop.time() < self._awake_until
        if self._turning:
            os.sched_yield()
            loop.call_soon(self._stay_awake)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._waiting and not self._closed:
            asyncio.get_running_loop().call_soon(self._dispatch)

    async def _position(self, ask: _Ask, *, again: bool = True) -> None:
        ask.found_position(await _answer(self._one_position(ask, again=again)))

    async def _price(self, ask: _Ask, *, again: bool = True) -> None:
        ask.found_price(await _answer(self._one_price(ask, again=again)))

    async def _one_position(self, ask: _Ask, *, again: bool) -> dict[str, Decimal]:
        rows, route = await self._rows(ask.symbol, ask.deadline, again=again)
        return position_legs(rows, ask.symbol, none_is_flat=route is POSITION_V3)

    async def _one_price(self, ask: _Ask, *, again: bool) -> Decimal:
        mark = await self._request(MARK, ask.symbol, ask.deadline, again=again)
        return self._fresh_price(mark, ask.symbol)

    async def _positions_of(self, asks: list[_Ask]) -> None:
        """Position of several symbols in one call; what it does not answer is asked alone."""
        answer = await _answer(self._rows(None, _halfway(asks), again=False))
        if isinstance(answer, ExchangeError) and answer.kind in _NOT_ALONE_EITHER:
            for ask in asks:
                ask.found_position(answer)
            return
        failed = isinstance(answer, ExchangeError)
        rows: dict[str, list[PositionRow]] = defaultdict(list)
        if not isinstance(answer, ExchangeError):
            for row in answer[0]:
                rows[row.symbol].append(row)
        for ask in asks:
            try:
                ask.found_position(position_legs(rows[ask.symbol], ask.symbol, none_is_flat=False))
            except ExchangeError:
                self._spawn(self._position(ask, again=not failed))

    async def _prices_of(self, asks: list[_Ask]) -> None:
        """Mark price of many symbols in one call; what it does not answer is asked alone."""
        answer = await _answer(self._request(MARKS, None, _halfway(asks), again=False))
        if isinstance(answer, ExchangeError) and answer.kind in _NOT_ALONE_EITHER:
            for ask in asks:
                ask.found_price(answer)
            return
        failed = isinstance(answer, ExchangeError)
        marks = {} if isinstance(answer, ExchangeError) else {mark.symbol: mark for mark in answer}
        for ask in asks:
            try:
                ask.found_price(self._fresh_price(marks[ask.symbol], ask.symbol))
            except (ExchangeError, KeyError):
                self._spawn(self._price(ask, again=not failed))

    def _fresh_price(self, mark: MarkRow, symbol: str) -> Decimal:
        price = mark_price(mark, symbol)
        if self._max_price_age_ms is not None:
            if not isinstance(mark.time, int):
                raise ExchangeError("bad_response", "no time of the mark price")
            if not -MAX_AHEAD_MS <= self._server_ms() - mark.time <= self._max_price_age_ms:
                raise ExchangeError("stale_price")
        return price

    async def _rows(
        self, symbol: str | None, deadline: float, *, again: bool
    ) -> tuple[list[PositionRow], Route[list[PositionRow]]]:
        """Position rows, and the route they came by."""
        route = self._position_route
        try:
            return await self._request(route, symbol, deadline, again=again), route
        except ExchangeError as error:
            if error.kind != "retired" or route is POSITION_V3:
                raise
        if self._position_route is not POSITION_V3:
            self._position_route = POSITION_V3
            log.warning("position_route_retired", retired=POSITION_V2.path, now=POSITION_V3.path)
        return await self._request(POSITION_V3, symbol, deadline, again=again), POSITION_V3

    async def _request(self, route: Route[T], symbol: str | None, deadline: float, *, again: bool) -> T:
        """One request, and at most one more where the kind of trouble allows it.

        Args:
            route: where to.
            symbol: one, or None for all.
            deadline: on the event loop's clock.
            again: whether a failure other than the clock's may be tried once more.
        """
        synced = self._synced
        try:
            return await self._attempt(route, symbol, deadline)
        except ExchangeError as error:
            first = error
        if first.kind == "clock":
            if not await self._resync(synced, deadline):
                raise first
        else:
            pause = SECOND_TRY_AFTER_S.get(first.kind)
            if not again or pause is None or asyncio.get_running_loop().time() + pause >= deadline:
                raise first
            await asyncio.sleep(pause)
        self.stats.second_tries += 1
        return await self._attempt(route, symbol, deadline)

    async def _attempt(self, route: Route[T], symbol: str | None, deadline: float) -> T:
        """Send one request with a timestamp of its own, and read the answer.

        Raises:
            ExchangeError: any kind.
        """
        if asyncio.get_running_loop().time() >= deadline:
            raise ExchangeError("timeout")
        self._all_calls.check(self._now())
        if route.signed:
            self._signed_calls.check(self._now())
        target, headers = self._address(route, symbol)
        if self._weight.add(route.weight, self._server_ms()):
            log.warning("exchange_weight_over_budget", used=self.weight_used, budget=WEIGHT_BUDGET)
        self.stats.requests += 1
        name = f"{route.name}_all" if route.signed and symbol is None else route.name
        outcome = "internal"
        started = self._monotonic()
        try:
            answer = self._read(route, *await self._exchange(target, headers, deadline))
            outcome = "ok"
            return answer
        except ExchangeError as error:
            outcome = error.kind
            raise
        except asyncio.CancelledError:
            outcome = "connection"
            raise
        finally:
            took_s = self._monotonic() - started
            if outcome in ("ok", "timeout"):
                self._took_s = took_s
            if self._on_call is not None:
                self._on_call(name, took_s, outcome)

    def _address(self, route: Route[T], symbol: str | None) -> tuple[str, Mapping[str, str]]:
        """Path with query, and headers. The query is sent as it stands, because so it is signed."""
        query = f"symbol={symbol}" if symbol else ""
        headers: Mapping[str, str] = {} if symbol else _PACKED
        if route.signed:
            stamp = f"recvWindow={self._recv_window_ms}&timestamp={self._server_ms()}"
            query, key = self._signed(f"{query}&{stamp}" if query else stamp)
            headers = {**headers, **key}
        return f"{route.path}?{query}" if query else route.path, headers

    async def _exchange(self, target: str, headers: Mapping[str, str], deadline: float) -> Answer:
        try:
            async with asyncio.timeout_at(deadline):
                return await self._http.get(target, headers, most=MAX_BODY)
        except TimeoutError:
            kind = "timeout"
        except UnreadableError:
            kind = "bad_response"
        except OSError:
            kind = "connection"
        # Raised out here so that it carries nothing of the HTTP client, in whose frames the target is.
        raise ExchangeError(kind)

    def _read(self, route: Route[T], status: int, headers: Mapping[str, str], body: bytes) -> T:
        server_ms = self._server_ms()
        self._weight.told(headers.get("x-mbx-used-weight-1m", ""), server_ms)
        refused = refusal(status, headers, body, server_ms)
        if refused is not None:
            self._stop(refused)
            raise refused
        try:
            answer = route.decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            why = str(error) if isinstance(error, msgspec.ValidationError) else "not JSON"
        else:
            self._all_calls.good(self._now())
            return answer
        raise ExchangeError("bad_response", why, status=status)

    def _stop(self, error: ExchangeError) -> None:
        if error.kind not in (*STOPPED, "auth"):
            return
        breaker = self._signed_calls if error.kind == "auth" else self._all_calls
        opened = breaker.opened
        breaker.trip(error, self._now())
        if breaker.opened > opened:
            wait_s = round((breaker.until_us - self._now()) / 1e6)
            log.warning("exchange_calls_held_back", error=error.kind, code=error.code, wait_s=wait_s)

    def _server_ms(self) -> int:
        return self._now() // 1000 + self._offset_ms

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s


async def _answer(work: Awaitable[T]) -> T | ExchangeError:
    """What the work came to; trouble is an answer too."""
    try:
        return await work
    except ExchangeError as error:
        return error.with_traceback(None)  # whose frames hold the URL
    except Exception as error:  # noqa: BLE001 - the text could hold a URL, so only the type is told
        log.error("exchange_call_broken", error=type(error).__name__)
        return ExchangeError("internal")


def _go_on(caller: asyncio.Future[None]) -> None:
    if not caller.done():
        caller.set_result(None)


def _halfway(asks: list[_Ask]) -> float:
    """A deadline that leaves as much time again for asking alone."""
    return (asyncio.get_running_loop().time() + min(ask.deadline for ask in asks)) / 2


def _as_market(ask: _Ask) -> Market:
    legs = ExchangeError("timeout") if ask.position is None else ask.position
    price = ExchangeError("timeout") if ask.price is None else ask.price
    return Market(
        legs=None if isinstance(legs, ExchangeError) else legs,
        mark_price=None if isinstance(price, ExchangeError) else price,
        position_error=legs.kind if isinstance(legs, ExchangeError) else None,
        price_error=price.kind if isinstance(price, ExchangeError) else None,
    )
