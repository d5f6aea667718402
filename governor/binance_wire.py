"""What goes over the wire to Binance USD-M futures and back: addresses, signatures, routes, rows, weight."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Generic, TypeVar

import msgspec

from events import decimals
from governor.binance_errors import ExchangeError
from governor.market import LEGS

T = TypeVar("T")


WEIGHT_LIMIT = 2400
"""Per minute and address on mainnet; the testnet allows more."""
WEIGHT_BUDGET = WEIGHT_LIMIT // 2


def sign(secret: str, payload: str) -> str:
    """HMAC-SHA-256 of the very text that is sent, as lower-case hex."""
    return hmac.new(secret.encode(), payload.encode(), hashlib.sha256).hexdigest()


class PositionRow(msgspec.Struct, rename="camel"):
    """One row of positionRisk, v2 or v3; the fields not needed are not looked at."""

    symbol: str
    position_amt: str
    position_side: str = "BOTH"


class MarkRow(msgspec.Struct, rename="camel"):
    """One object of premiumIndex."""

    symbol: str
    mark_price: str
    time: object = None  # only looked at when the age is checked


class ServerTime(msgspec.Struct, rename="camel"):
    """The exchange's clock, milliseconds since the epoch."""

    server_time: int


@dataclass(frozen=True, slots=True)
class Route(Generic[T]):
    """Where a request goes, what it costs and what a good answer decodes to."""

    name: str
    path: str
    weight: int
    decoder: msgspec.json.Decoder[T]
    signed: bool = False


_ROWS = msgspec.json.Decoder(list[PositionRow])
# One page says 10 for v2 since 2024; the header of each answer corrects the count.
POSITION_V2 = Route("position", "/fapi/v2/positionRisk", 5, _ROWS, signed=True)
POSITION_V3 = Route("position", "/fapi/v3/positionRisk", 5, _ROWS, signed=True)
MARK = Route("mark", "/fapi/v1/premiumIndex", 1, msgspec.json.Decoder(MarkRow))
MARKS = Route("mark_all", "/fapi/v1/premiumIndex", 10, msgspec.json.Decoder(list[MarkRow]))
TIME = Route("time", "/fapi/v1/time", 1, msgspec.json.Decoder(ServerTime))
PING = Route("ping", "/fapi/v1/ping", 1, msgspec.json.Decoder(dict[str, object]))


def position_legs(rows: Iterable[PositionRow], symbol: str, *, none_is_flat: bool) -> dict[str, Decimal]:
    """Signed amount by side of one symbol, in base units.

    Args:
        rows: rows of any symbols.
        symbol: the one asked for.
        none_is_flat: whether an answer without any row means a flat position (v3) or trouble (v2).

    Raises:
        ExchangeError: `bad_response`.
    """
    rows = list(rows)
    legs: dict[str, Decimal] = {}
    for row in rows:
        if row.symbol != symbol:
            continue
        if row.position_side not in LEGS or row.position_side in legs:
            raise ExchangeError("bad_response", "a side twice, or an unknown one")
        legs[row.position_side] = _number(row.position_amt)
    if legs.get("BOTH") and any(amount for side, amount in legs.items() if side != "BOTH"):
        raise ExchangeError("bad_response", "one-way and hedge positions at once")
    if legs:
        return legs
    if none_is_flat and not rows:
        return {"BOTH": decimals.ZERO}
    raise ExchangeError("bad_response", "no row of the symbol")


def mark_price(mark: MarkRow, symbol: str) -> Decimal:
    """Mark price of the symbol in quote units, always > 0.

    Raises:
        ExchangeError: `bad_response`.
    """
    price = _number(mark.mark_price)
    if mark.symbol != symbol or price <= 0:
        raise ExchangeError("bad_response", "another symbol, or no price above zero")
    return price


def _number(text: str) -> Decimal:
    try:
        return decimals.parse(text)
    except ValueError:
        pass
    raise ExchangeError("bad_response", "not a finite number")


class Weight:
    """Request weight in fixed minutes of the exchange's clock."""

    def __init__(self) -> None:
        self._minute = 0
        self._used = 0
        self._warned = False

    def used(self, server_ms: int) -> int:
        self._turn(server_ms)
        return self._used

    def add(self, weight: int, server_ms: int) -> bool:
        """Count a request; True the first time in a minute that the budget is passed."""
        self._turn(server_ms)
        self._used += weight
        over = self._used > WEIGHT_BUDGET and not self._warned
        self._warned = self._warned or over
        return over

    def told(self, header: str, server_ms: int) -> None:
        """Take over what the exchange counts, where that is more."""
        self._turn(server_ms)
        if header.isascii() and header.isdigit():
            self._used = max(self._used, int(header[:9]))

    def _turn(self, server_ms: int) -> None:
        if server_ms // 60_000 != self._minute:
            self._minute, self._used, self._warned = server_ms // 60_000, 0, False


def signer(api_key: str, api_secret: str) -> Callable[[str], tuple[str, Mapping[str, str]]]:
    """Hold key and secret where no attribute, repr or dump shows them."""
    for name, value in (("api_key", api_key), ("api_secret", api_secret)):
        if not re.fullmatch(r"[!-~]{1,512}", value):
            raise ValueError(f"{name} is empty or holds characters no key has")
    headers = {"X-MBX-APIKEY": api_key}
    return lambda query: (f"{query}&signature={sign(api_secret, query)}", headers)
