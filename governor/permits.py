"""What an event does to the keys of permits and blocks, in the same commit as the event."""

from __future__ import annotations

from collections.abc import Iterable

from events.codec import decode, dumps
from events.decimals import ZERO
from events.keys import Keys
from events.store import Write
from events.types import (
    Decision,
    Entry,
    Event,
    PermitConsumed,
    PermitExpired,
    PermitRevoked,
    PlanRejected,
    Recorded,
)

BLOCK_MS = 3_600_000
_ENDS = frozenset({PermitConsumed.NAME, PermitExpired.NAME, PermitRevoked.NAME})
TAKE_BACK_US = 500_000
"""How long before its TTL ends an unused permit is taken back."""


def permit(decision: Decision, *, at: int, seq: int) -> bytes:
    """The permit's JSON: the requirement's seven fields, and what ties it to its decision.

    Args:
        decision: the EXECUTE decision that grants it.
        at: when, microseconds.
        seq: of the decision's event.
    """
    return dumps(
        {
            "granted": True,
            "symbol": decision.symbol,
            "decision": "EXECUTE",
            "computed_qty": decision.computed_qty or ZERO,
            "computed_notional": decision.computed_notional or ZERO,
            "created_at": at / 1_000_000,
            "consumed": False,
            "plan_id": decision.plan_id,
            "expires_at": (decision.expires_us or at) / 1_000_000,
            "epoch": decision.epoch,
            "seq": seq,
        }
    )


def block(reason: str, *, at: int, symbol: str | None) -> bytes:
    """The block record's JSON."""
    return dumps({"reason": reason, "timestamp": at / 1_000_000, "symbol": symbol or ""})


def writes(recorded: Iterable[Recorded], keys: Keys) -> list[Write]:
    """Permits and block records that these events write and delete, in order."""
    found: list[Write] = []
    for each in recorded:
        at, event = each.at, each.event
        match event:
            case Decision(verdict="EXECUTE"):
                ttl_ms = ((event.expires_us or at) - at) // 1000
                found.append(Write("set", keys.permit(event.plan_id), (permit(event, at=at, seq=each.seq),), ttl_ms))
                found.append(Write("del", keys.block(event.plan_id)))
            case Decision(verdict="BLOCK"):
                record = block(event.reason or "", at=at, symbol=event.symbol)
                found.append(Write("set", keys.block(event.plan_id), (record,), BLOCK_MS))
            case PlanRejected(plan_id=str(plan_id)) if event.decision in (None, "EXECUTE"):
                record = block("invalid_plan", at=at, symbol=event.symbol)
                found.append(Write("set", keys.block(plan_id), (record,), BLOCK_MS))
            case PermitExpired() | PermitRevoked() | PermitConsumed():
                found.append(Write("del", keys.permit(event.plan_id)))
            case _:
                pass
    return found


def ended(entries: Iterable[Entry], keys: Keys) -> list[Write]:
    """Deletes the permits these events ended: a server that lost the events may have them back."""
    return writes([decode(entry) for entry in entries if entry.name in _ENDS], keys)


def grants(event: Event) -> bool:
    """Whether it grants a permit."""
    return isinstance(event, Decision) and event.verdict == "EXECUTE"
