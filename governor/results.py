"""Results as the Apply Layer writes them."""

from __future__ import annotations

import json
from decimal import Decimal

import msgspec

from events.decimals import ZERO, parse, total

_decode = json.JSONDecoder(parse_float=Decimal).decode


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One result entry, read leniently: a result tells what happened, so nothing in it is refused."""

    plan_id: str
    symbol: str
    decision: str
    entry_id: str
    executed: bool
    error: str | None
    step_failed: bool
    """A step with status `error`."""
    executed_qty: Decimal | None
    """Over all steps, base units; None where no step tells a readable quantity."""

    @property
    def matters(self) -> bool:
        """Whether it becomes an event; everything else is only acknowledged."""
        return self.executed or bool(self.error) or self.step_failed or self.decision == "ERROR"

    @property
    def failed(self) -> bool:
        return self.step_failed or self.decision == "ERROR"


def parse_result(fields: dict[str, str], *, entry_id: str) -> Result:
    """Read a stream entry."""
    steps = _steps(fields.get("steps_results", ""))
    quantities = [number for step in steps if (number := _quantity(step.get("executed_qty"))) is not None]
    return Result(
        plan_id=_shown(fields.get("plan_id", ""), 128),
        symbol=_shown(fields.get("symbol", ""), 32),
        decision=_shown(fields.get("decision", ""), 32),
        entry_id=entry_id,
        executed=fields.get("executed", "").strip().lower() in ("true", "1"),
        error=_shown(fields.get("error", ""), 500) or None,
        step_failed="error" in [str(step.get("status", "")).lower() for step in steps],
        executed_qty=_sum(quantities) if quantities else None,
    )


def _steps(text: str) -> list[dict[str, object]]:
    try:
        steps = _decode(text or "[]")
    except (ValueError, RecursionError):
        return []
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _shown(text: str, most: int) -> str:
    """Text a terminal can be shown: nothing in a result is refused, so anything may be in it."""
    if text.isprintable():
        return text[:most]
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text[:most])


def _quantity(value: object) -> Decimal | None:
    try:
        return parse(str(value)).copy_abs()
    except ValueError:
        return None


def _sum(quantities: list[Decimal]) -> Decimal:
    summed = ZERO
    for quantity in quantities:
        summed = total(summed, quantity)
    return summed
