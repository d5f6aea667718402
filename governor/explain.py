"""One plan's life, from its events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from events.types import Decision, Execution, PermitConsumed, PermitExpired, PermitRevoked, PlanReceived, Recorded
from governor.times import utc


def explain(plan_id: str, events: Iterable[Recorded]) -> dict[str, Any]:
    """What was asked, what the exchange said, every check, and what became of the permit, in order."""
    mine = [recorded for recorded in events if getattr(recorded.event, "plan_id", None) == plan_id]
    plan: dict[str, Any] | None = None
    decision: Decision | None = None
    permit: dict[str, Any] | None = None
    for seq, at, event, _ in mine:
        match event:
            case PlanReceived() if plan is None or decision is None or decision.verdict == "SKIP":
                plan = {"received_at": at / 1e6, "entry_id": event.entry_id, "fields": event.fields}
            case Decision() if decision is None or decision.verdict == "SKIP":
                decision = event
                if event.verdict == "EXECUTE":
                    permit = {"status": "outstanding", "granted_at": at / 1e6, "epoch": event.epoch, "seq": seq,
                              "expires_at": (event.expires_us or at) / 1e6}  # fmt: skip
            case PermitConsumed() if permit is not None:
                permit |= {"status": "consumed", "at": at / 1e6, "source": event.source}
            case PermitExpired() if permit is not None:
                permit |= {"status": "expired", "at": at / 1e6}
            case PermitRevoked() if permit is not None:
                permit |= {"status": "revoked", "at": at / 1e6}
            case _:
                pass
    return {
        "plan_id": plan_id,
        "known": bool(mine),
        "plan": plan,
        "decision": None if decision is None else msgspec.structs.asdict(decision),
        "market": None
        if decision is None
        else {
            "asked": decision.asked,
            "position_amt": decision.position_amt,
            "legs": decision.legs,
            "mark_price": decision.mark_price,
            "position_error": decision.position_error,
            "price_error": decision.price_error,
        },
        "permit": permit,
        "results": [
            msgspec.structs.asdict(recorded.event) | {"at": recorded.at / 1e6}
            for recorded in mine
            if isinstance(recorded.event, Execution)
        ],
        "events": [
            {"seq": r.seq, "timestamp": r.at / 1e6, "event": r.event.NAME, "data": msgspec.structs.asdict(r.event)}
            for r in mine
        ],
    }


def lines(told: dict[str, Any]) -> list[str]:
    """The same for a person."""
    if not told["known"]:
        return [f"{told['plan_id']}: no event knows this plan. It was never read, or its events were archived."]
    found = [f"plan {told['plan_id']}"]
    plan, decision, market, permit = told["plan"], told["decision"], told["market"], told["permit"]
    if plan is not None:
        fields = plan["fields"]
        found.append(f"  received   {utc(plan['received_at'])}  {fields.get('symbol')} {fields.get('action')} "
                     f"decision={fields.get('decision')} kill_score={fields.get('kill_score')}")  # fmt: skip
    if decision is not None:
        if market["asked"]:
            position = market["position_amt"] if market["legs"] is not None else market["position_error"]
            price = market["mark_price"] or market["price_error"]
            found.append(f"  exchange   position {position}  mark price {price}")
        else:
            found.append("  exchange   not asked")
        for check in decision["checks"]:
            mark = {True: "pass", False: "FAIL", None: "-"}[check.ok]
            amounts = "" if check.used is None else f"  used {check.used}"
            amounts += "" if check.limit is None else f"  limit {check.limit}"
            found.append(f"    {check.gate:<22} {mark:<4}{amounts}")
        found.append(f"  verdict    {decision['verdict']}" + (f": {decision['reason']}" if decision["reason"] else "")
                     + f"  qty {decision['computed_qty']}  notional {decision['computed_notional']}")  # fmt: skip
    if permit is not None:
        source = f" ({permit['source']})" if "source" in permit else ""
        found.append(f"  permit     {permit['status']}{source}  granted {utc(permit['granted_at'])}"
                     f"  until {utc(permit['expires_at'])}")  # fmt: skip
    found += [
        f"  {event['event'].lower():<24} {utc(event['timestamp'])}  event {event['seq']}" for event in told["events"]
    ]
    return found
