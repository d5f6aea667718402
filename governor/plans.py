"""Plans as the Apply Layer writes them, read strictly where they are used.

Only numbers that take part in a decision are looked at; everything else is kept in the event as it came.
"""

from __future__ import annotations

import string
from decimal import Decimal
from itertools import islice

import msgspec

from events.decimals import parse

CLOSE_FRACTIONS: dict[str, Decimal] = {
    "FULL_CLOSE_PROPOSED": Decimal(1),
    "PARTIAL_75": Decimal("0.75"),
    "PARTIAL_50": Decimal("0.5"),
    "PARTIAL_25": Decimal("0.25"),
}
"""Fraction of the position each CLOSE action closes."""
REQUIRED = ("plan_id", "symbol", "action", "decision", "kill_score")
_FIRST = (*REQUIRED, "close_qty", "position_side")
"""Fields a decision uses: where an entry has to be cut, they are kept."""
SIDES = ("BOTH", "LONG", "SHORT")
FUTURE_US = 5_000_000
"""An entry further ahead of the clock than this was written by a clock nobody can reckon with."""
FIELDS_BYTES = 65_536
"""A received plan's fields are kept up to this size, a rejected one's and a result's up to REJECTED_BYTES."""
REJECTED_BYTES = 4_096
NAME_MOST = 128
"""Characters kept of a field's name."""
FIELDS_MOST = 256
"""Fields kept."""

_LETTERS = string.ascii_letters + string.digits + "._:-"
_CAPITALS = string.ascii_uppercase + string.digits + "_"


def _plan_id(value: str) -> bool:
    return 1 <= len(value) <= 128 and not value.strip(_LETTERS)  # nothing is left where all of it may be there


def _symbol(value: str) -> bool:
    return 1 <= len(value) <= 32 and not value.strip(_CAPITALS)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that can be decided."""

    plan_id: str
    symbol: str
    action: str
    decision: str
    entry_id: str
    at: int
    """When it was written, microseconds: the stream entry's own time."""
    kill_score: Decimal | None = None
    """None unless the decision is EXECUTE."""
    close_qty: Decimal | None = None
    """What the client would close, base units; only read when the exchange cannot be asked."""
    position_side: str | None = None
    """The leg it touches; None, also where the field names no leg: the whole position."""

    @property
    def execute(self) -> bool:
        return self.decision == "EXECUTE"


class MalformedPlanError(ValueError):
    """The entry is no plan; the message names the field, its value and what was expected.

    Attributes:
        plan_id: its plan_id where that can be used as one.
        symbol: the same for the symbol.
        counts: whether it counts as an error: EXECUTE plans and entries without a decision do.
    """

    def __init__(self, message: str, *, plan_id: str | None, symbol: str | None, counts: bool) -> None:
        super().__init__(message)
        self.plan_id = plan_id
        self.symbol = symbol
        self.counts = counts


def entry_time(entry_id: str) -> int:
    """Microseconds since the epoch of a stream entry's id.

    Raises:
        ValueError: not a stream entry id.
    """
    ms, dash, number = entry_id.partition("-")
    digits = ms + number
    if not (dash and digits.isascii() and digits.isdecimal() and 1 <= len(ms) <= 15 and 1 <= len(number) <= 20):
        raise ValueError(f"{entry_id!r} is no stream entry id")
    return int(ms) * 1000


def parse_plan(fields: dict[str, str], *, entry_id: str, now: int, needs_close_qty: bool) -> Plan:
    """Read a stream entry.

    Args:
        fields: as the producer wrote them.
        entry_id: of the stream entry.
        now: the clock, microseconds.
        needs_close_qty: whether `close_qty` takes part in the decision (no exchange credentials).

    Raises:
        MalformedPlanError: see there.
    """
    decision = fields.get("decision", "")
    execute = decision == "EXECUTE"
    try:
        for name in REQUIRED:
            if not fields.get(name):
                raise ValueError(f"{name} is {'empty' if name in fields else 'missing'}")
        if not _plan_id(fields["plan_id"]):
            raise ValueError(f"plan_id is {_shown(fields['plan_id'])}, expected 1 to 128 of A-Z a-z 0-9 . _ : -")
        if not _symbol(fields["symbol"]):
            raise ValueError(f"symbol is {_shown(fields['symbol'])}, expected 1 to 32 of A-Z 0-9 _")
        at = entry_time(entry_id)
        if execute and at > now + FUTURE_US:
            raise ValueError(f"entry id is {(at - now) / 1e6:.1f} s in the future, expected at most 5 s")
        side = fields.get("position_side", "").upper()
        needs_close_qty = needs_close_qty and fields["action"] in CLOSE_FRACTIONS
        return Plan(
            plan_id=fields["plan_id"],
            symbol=fields["symbol"],
            action=fields["action"][:64],
            decision=decision[:64],
            entry_id=entry_id,
            at=at,
            kill_score=_number(fields, "kill_score") if execute else None,
            close_qty=_number(fields, "close_qty") if execute and needs_close_qty else None,
            position_side=side if side in SIDES else None,
        )
    except ValueError as error:
        plan_id, symbol = fields.get("plan_id", ""), fields.get("symbol", "")
        raise MalformedPlanError(
            str(error),
            plan_id=plan_id if _plan_id(plan_id) else None,
            symbol=symbol if _symbol(symbol) else None,
            counts=execute or not decision,
        ) from None


def cut(fields: dict[str, str], size: int) -> tuple[dict[str, str], bool]:
    """Fields that together take at most about `size` bytes; the ones a decision uses come first.

    Returns:
        The fields kept, values shortened where they had to be, and whether anything was left out.
    """
    names, values = "".join(fields), "".join(fields.values())
    fits = len(names) + len(values) <= size and max(map(len, fields), default=0) <= NAME_MOST
    fits = fits and len(fields) <= FIELDS_MOST
    if fits and names.isascii() and values.isascii():
        return fields, False  # the usual case, told quickly
    ordered = {name: fields[name] for name in _FIRST if name in fields} | fields
    kept: dict[str, str] = {}
    left = size
    whole = len(fields) <= FIELDS_MOST
    for name, value in islice(ordered.items(), FIELDS_MOST):
        shown = name[:NAME_MOST]
        room = left - len(shown.encode(errors="replace"))
        short = value.encode(errors="replace")[: max(0, room)].decode(errors="ignore")
        whole = whole and room >= 0 and short == value and shown == name
        if room > 0 or (room == 0 and not value):
            kept[shown] = short
            left = room - len(short.encode())
    return kept, not whole


def _number(fields: dict[str, str], name: str) -> Decimal | None:
    if not fields.get(name):
        return None
    try:
        return parse(fields[name])
    except ValueError as error:
        raise ValueError(f"{name} is {_shown(fields[name])}, expected a finite number") from error


def _shown(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:57] + "...")
