"""The limits decisions are made under, and what follows from them, as plain values.

`from_texts` reads them from the same names and texts the environment has, so that the settings recorded in the
event stream decide again exactly as they did, or differently where a what-if changes one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import msgspec

from events.decimals import parse, text

OFF = "off"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one symbol. None: switched off. Zero: nothing is allowed."""

    per_hour: int | None = 3
    per_5min: int | None = 2
    notional_per_day: Decimal | None = Decimal(5000)
    """USD."""
    qty_per_day: Decimal | None = Decimal("0.02")
    """Base units; decides when there is no price."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that takes part in a decision beside the plan, the market and the time."""

    limits: Limits = Limits()
    by_symbol: dict[str, Limits] = {}
    total_notional_per_day: Decimal | None = None
    kill_score_critical: Decimal | None = Decimal("0.8")
    max_plan_age_us: int | None = 60_000_000
    permit_ttl_us: int = 60_000_000
    fallback_qty: Decimal | None = None
    credentials: bool = False
    """Whether the exchange can be asked at all."""
    auto_disarm: bool = True
    disarm_on_burst: bool = True
    disarm_on_unpermitted: bool = True
    disarm_on_errors: int | None = 5
    error_window_us: int = 3_600_000_000
    throttle_cooldown_us: int = 300_000_000
    throttle_per_5min: int | None = 1

    def of(self, symbol: str) -> Limits:
        """Limits of a symbol: its own where the limits file has some."""
        return self.by_symbol.get(symbol, self.limits)


def whole(low: int, high: int, *, off: bool = False) -> Callable[[str], int | None]:
    """Reader of a whole number within bounds, or `off` where that is allowed."""

    def read(value: str) -> int | None:
        if off and value == OFF:
            return None
        if not (value.isascii() and value.isdecimal() and len(value) < 20 and low <= int(value) <= high):
            raise ValueError(f"a whole number from {low} to {high}" + (" or off" if off else ""))
        return int(value)

    return read


def amount(value: str) -> Decimal | None:
    """Reader of a number of at least zero, or `off`."""
    if value == OFF:
        return None
    try:
        number = parse(value)
    except ValueError:
        number = Decimal(-1)
    if number < 0:
        raise ValueError("a number of at least 0 or off")
    return number


def seconds(low: str, high: str, *, off: bool = False) -> Callable[[str], int | None]:
    """Reader of a duration in seconds, as microseconds."""

    def read(value: str) -> int | None:
        if off and value == OFF:
            return None
        try:
            number = parse(value)
        except ValueError:
            number = Decimal(-1)
        if not Decimal(low) <= number <= Decimal(high):
            raise ValueError(f"seconds from {low} to {high}" + (" or off" if off else ""))
        return int(number * 1_000_000)

    return read


def flag(value: str) -> bool:
    """Reader of true or false."""
    if value.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return value.lower() == "true"


def optional_amount(value: str) -> Decimal | None:
    """Reader of a number above zero; empty means that there is none."""
    if not value:
        return None
    try:
        number = parse(value)
    except ValueError:
        number = Decimal(0)
    if number <= 0:
        raise ValueError("a number above 0, or empty")
    return number


SYMBOL_NAMES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "GOV_MAX_EXEC_PER_HOUR": ("per_hour", whole(0, 100_000, off=True)),
    "GOV_MAX_EXEC_PER_5MIN": ("per_5min", whole(0, 100_000, off=True)),
    "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": ("notional_per_day", amount),
    "GOV_MAX_REDUCE_QTY_PER_DAY": ("qty_per_day", amount),
}
"""Variable to field and reader, for limits that a symbol can have of its own."""

NAMES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD": ("total_notional_per_day", amount),
    "GOV_KILL_SCORE_CRITICAL": ("kill_score_critical", amount),
    "GOV_MAX_PLAN_AGE_SEC": ("max_plan_age_us", seconds("0", "86400", off=True)),
    "GOV_PERMIT_TTL_SEC": ("permit_ttl_us", seconds("2", "3600")),
    "GOV_FALLBACK_QTY": ("fallback_qty", optional_amount),
    "GOV_ENABLE_AUTO_DISARM": ("auto_disarm", flag),
    "GOV_DISARM_ON_BURST_BREACH": ("disarm_on_burst", flag),
    "GOV_DISARM_ON_UNPERMITTED_EXECUTION": ("disarm_on_unpermitted", flag),
    "GOV_DISARM_ON_ERROR_COUNT": ("disarm_on_errors", whole(0, 1000, off=True)),
    "GOV_ERROR_WINDOW_SEC": ("error_window_us", seconds("1", "86400")),
    "GOV_THROTTLE_COOLDOWN_SEC": ("throttle_cooldown_us", seconds("1", "86400")),
    "GOV_THROTTLE_MAX_EXEC_PER_5MIN": ("throttle_per_5min", whole(0, 100_000, off=True)),
    "credentials": ("credentials", flag),
}
"""The same for what holds for the whole account. `credentials` is no variable: it says whether there are any."""

DEFAULTS: dict[str, str] = {
    "GOV_MAX_EXEC_PER_HOUR": "3",
    "GOV_MAX_EXEC_PER_5MIN": "2",
    "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "5000",
    "GOV_MAX_REDUCE_QTY_PER_DAY": "0.02",
    "GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD": OFF,
    "GOV_KILL_SCORE_CRITICAL": "0.8",
    "GOV_MAX_PLAN_AGE_SEC": "60",
    "GOV_PERMIT_TTL_SEC": "60",
    "GOV_FALLBACK_QTY": "",
    "GOV_ENABLE_AUTO_DISARM": "true",
    "GOV_DISARM_ON_BURST_BREACH": "true",
    "GOV_DISARM_ON_UNPERMITTED_EXECUTION": "true",
    "GOV_DISARM_ON_ERROR_COUNT": "5",
    "GOV_ERROR_WINDOW_SEC": "3600",
    "GOV_THROTTLE_COOLDOWN_SEC": "300",
    "GOV_THROTTLE_MAX_EXEC_PER_5MIN": "1",
    "credentials": "false",
}


def read(name: str, value: str, readers: Mapping[str, tuple[str, Callable[[str], Any]]]) -> tuple[str, Any]:
    """One setting's field and value.

    Raises:
        ValueError: names the variable, its value and what is allowed.
    """
    field, reader = readers[name]
    try:
        if value == "" and DEFAULTS[name] != "":
            raise ValueError(_allowed(reader))
        return field, reader(value)
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}, expected {error}") from None


def _allowed(reader: Callable[[str], Any]) -> str:
    try:
        reader("\0")
    except ValueError as error:
        return str(error)
    return "a value"  # pragma: no cover - every reader refuses a NUL


def from_texts(values: Mapping[str, str], by_symbol: Mapping[str, Mapping[str, str]] | None = None) -> Policy:
    """Policy from texts by variable name; what is not given has its default.

    Args:
        values: settings of the account, and the limits every symbol has.
        by_symbol: limits of single symbols, by symbol, then by variable name.

    Raises:
        ValueError: names the variable (and symbol), its value and what is allowed.
    """
    given = DEFAULTS | {name: value for name, value in values.items() if name in DEFAULTS}
    limits = dict(read(name, given[name], SYMBOL_NAMES) for name in SYMBOL_NAMES)
    account = dict(read(name, given[name], NAMES) for name in NAMES)
    own: dict[str, Limits] = {}
    for symbol, texts in (by_symbol or {}).items():
        try:
            own[symbol] = Limits(**limits | dict(read(name, value, SYMBOL_NAMES) for name, value in texts.items()))
        except KeyError as error:
            raise ValueError(
                f"limits of {symbol}: {error.args[0]!r} is no limit, expected one of {', '.join(SYMBOL_NAMES)}"
            ) from None
        except ValueError as error:
            raise ValueError(f"limits of {symbol}: {error}") from None
    return Policy(limits=Limits(**limits), by_symbol=own, **account)


def digest(values: Mapping[str, str], by_symbol: Mapping[str, Mapping[str, str]]) -> str:
    """Short name of a set of settings."""
    return hashlib.sha256(msgspec.json.encode([dict(values), by_symbol], order="sorted")).hexdigest()[:16]


def shown(number: Decimal | int | None) -> str:
    """A limit for a reader."""
    return OFF if number is None else text(Decimal(number))
