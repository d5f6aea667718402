"""What the exchange said about one symbol at one moment, as plain values."""

from __future__ import annotations

from decimal import Decimal

import msgspec

from events.decimals import ZERO, total

LEGS = ("BOTH", "LONG", "SHORT")


class Market(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the exchange: the position's legs and the mark price, or why there is none.

    An error never becomes "flat": either `legs` is there or `position_error` says why not, and the
    same for `mark_price` and `price_error`.
    """

    legs: dict[str, Decimal] | None = None
    """Signed position amount by side (`BOTH`, or `LONG` and `SHORT` in hedge mode), in base units."""
    mark_price: Decimal | None = None
    """Mark price in quote units (USD), always > 0."""
    position_error: str | None = None
    """Kind of failure, from the closed set `governor.binance.ERROR_KINDS`."""
    price_error: str | None = None
    """Kind of failure, from the same set."""


def position_amt(legs: dict[str, Decimal], side: str | None) -> Decimal:
    """Size of the position a plan touches: all legs together, or one leg when the plan names it.

    In one-way mode a named side means the one position, provided that it lies on that side.

    Args:
        legs: signed amounts by side.
        side: `LONG`, `SHORT`, `BOTH` or None.
    """
    if side in (None, "BOTH"):
        size = ZERO
        for amount in legs.values():
            size = total(size, amount.copy_abs())
        return size
    if side in legs:
        return legs[side].copy_abs()
    both = legs.get("BOTH", Decimal(0))
    held = "LONG" if both > 0 else "SHORT"
    return both.copy_abs() if held == side else Decimal(0)
