"""What was counted a UTC day: notional and quantity, each by itself, for one symbol or for all."""

from __future__ import annotations

from decimal import Decimal

import msgspec

from events.decimals import MATH, ZERO, plain

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
    return shown((_kept(days, day),))[0]


def shown(days: tuple[Day, ...]) -> tuple[Day, ...]:
    """Amounts without the zeros a sum may end in."""
    return tuple([Day(each.day, plain(each.notional), plain(each.quantity)) for each in days])


def _kept(days: tuple[Day, ...], day: int) -> Day:
    for kept in days:
        if kept.day == day:
            return kept
    return Day(day)


def add(days: tuple[Day, ...], day: int, notional: Decimal, quantity: Decimal) -> tuple[Day, ...]:
    """With an amount counted on `day`; negative amounts release. Days out of reach are left out."""
    if not notional and not quantity:
        return days
    known = days[-1] if days and days[-1].day == day else _kept(days, day)
    # Exact, and kept with whatever zeros it ends in: `on` is for whoever looks at it.
    added = MATH.add(known.quantity, quantity) if quantity else known.quantity
    changed = Day(day, MATH.add(known.notional, notional), added)
    if days and known is days[-1] and (changed.notional or changed.quantity):
        return (*days[:-1], changed)  # the others were looked at when this day began
    return live(tuple(sorted((*(d for d in days if d.day != day), changed), key=lambda d: d.day)), day=day)


def live(days: tuple[Day, ...], *, day: int) -> tuple[Day, ...]:
    """Without days that nothing can reach any more, nor days on which nothing is counted."""
    return tuple([d for d in days if d.day > day - KEPT_DAYS and (d.notional or d.quantity)])
