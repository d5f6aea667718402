"""What was counted a UTC day: notional and quantity, each by itself, for one symbol or for all."""

from __future__ import annotations

from decimal import Decimal

import msgspec

from events.decimals import ZERO, total

KEPT_DAYS = 2
"""Today and yesterday: a permit granted before midnight may be taken back after it."""


class Day(msgspec.Struct, frozen=True, gc=False):
    """Totals of one UTC day."""

    day: int
    """Days since the epoch."""
    notional: Decimal = ZERO
    """USD."""
    quantity: Decimal = ZERO
    """Base units; of no meaning over all symbols, and not counted there."""


def on(days: tuple[Day, ...], day: int) -> Day:
    """The totals of one day, zero if nothing was counted."""
    for kept in days:
        if kept.day == day:
            return kept
    return Day(day)


def add(days: tuple[Day, ...], day: int, notional: Decimal, quantity: Decimal) -> tuple[Day, ...]:
    """With an amount counted on `day`; negative amounts release. Days out of reach are left out."""
    known = on(days, day)
    added = total(known.quantity, quantity) if quantity else known.quantity
    changed = Day(day, total(known.notional, notional), added)
    if days and days[-1] is known and (changed.notional or changed.quantity):
        return (*days[:-1], changed)  # the others were looked at when this day began
    return live(tuple(sorted((*(d for d in days if d.day != day), changed), key=lambda d: d.day)), day=day)


def live(days: tuple[Day, ...], *, day: int) -> tuple[Day, ...]:
    """Without days that nothing can reach any more, nor days on which nothing is counted."""
    return tuple([d for d in days if d.day > day - KEPT_DAYS and (d.notional or d.quantity)])
