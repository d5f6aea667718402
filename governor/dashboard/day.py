"""What the dashboard shows of single events: plans, incidents, the chart, the last disarm. Bounded, newest last."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

from events.types import (
    Decision,
    ErrorRecorded,
    Event,
    Execution,
    PermitConsumed,
    PermitExpired,
    PermitRevoked,
    PlanRejected,
    Recorded,
    UnpermittedExecution,
)
from governor import last_disarm
from governor.dashboard.chart import Chart
from governor.dashboard.incidents import incident
from governor.last_disarm import LastDisarm
from governor.plans import entry_time

PLANS_KEPT = 500
INCIDENTS_KEPT = 200
SYMBOLS_KEPT = 5_000
ODD_KEPT = 10_000

_SETTLED = {PermitConsumed.NAME: "consumed", PermitExpired.NAME: "expired", PermitRevoked.NAME: "revoked"}


class Day:
    """Told every event once, in order; `take` gives what came since the last time."""

    def __init__(self) -> None:
        self.chart = Chart()
        self.plans: OrderedDict[int, dict[str, Any]] = OrderedDict()
        """By the number of the decision's event."""
        self.incidents: deque[dict[str, Any]] = deque(maxlen=INCIDENTS_KEPT)
        self.last: OrderedDict[str, dict[str, Any]] = OrderedDict()
        """The last verdict of each symbol."""
        self.disarm: LastDisarm | None = None
        self.odd: OrderedDict[str, None] = OrderedDict()
        """Plans that something was told of which may have come before their decision."""
        self._permits: dict[str, int] = {}
        self._changed: set[int] = set()
        self._new: list[dict[str, Any]] = []

    def note(self, recorded: Recorded) -> None:
        """The next event."""
        event = recorded.event
        self.chart.note(recorded, latency_us=_latency(recorded))
        if isinstance(event, Decision | PlanRejected):
            self._show(recorded.seq, row_of(recorded, event))
        elif isinstance(event, PermitConsumed | PermitExpired | PermitRevoked):
            self._settle(event.plan_id, _SETTLED[event.NAME])
        elif isinstance(event, Execution) and event.counted:
            self._settle(event.plan_id, "consumed")
        if isinstance(event, Execution | UnpermittedExecution | ErrorRecorded) and event.plan_id not in self._permits:
            self.odd[event.plan_id or ""] = None
            if len(self.odd) > ODD_KEPT:
                self.odd.popitem(last=False)
        self.note_disarm(recorded)
        if (told := incident(recorded)) is not None:
            self.incidents.append(told)
            self._new.append(told)
            del self._new[:-INCIDENTS_KEPT]

    def take(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of plans that are new or changed, and new incidents, since this was last called."""
        plans = [self.plans[seq] for seq in sorted(self._changed) if seq in self.plans]
        incidents = self._new
        self._changed, self._new = set(), []
        return plans, incidents

    def _show(self, seq: int, row: dict[str, Any]) -> None:
        self.plans[seq] = row
        self._changed.add(seq)
        if row["permit"] is not None:
            self._permits[row["plan_id"]] = seq
        if row["symbol"] and row["verdict"] != "REJECTED":
            self.last[row["symbol"]] = {name: row[name] for name in ("plan_id", "verdict", "reason", "at")}
            self.last.move_to_end(row["symbol"])
            if len(self.last) > SYMBOLS_KEPT:
                self.last.popitem(last=False)
        while len(self.plans) > PLANS_KEPT:
            gone, old = self.plans.popitem(last=False)
            self._changed.discard(gone)
            if self._permits.get(old["plan_id"]) == gone:
                del self._permits[old["plan_id"]]

    def _settle(self, plan_id: str, status: str) -> None:
        seq = self._permits.get(plan_id)
        if seq is not None:
            self.plans[seq]["permit"]["status"] = status
            self._changed.add(seq)

    def note_disarm(self, recorded: Recorded) -> None:
        """Follow the last disarm from its intent to its proof, and to the re-arm."""
        self.disarm = last_disarm.fold(self.disarm, recorded)

    @property
    def last_disarm(self) -> dict[str, Any] | None:
        """The last disarm as plain JSON values; times are unix seconds."""
        return None if self.disarm is None else _disarm(self.disarm)


def row_of(recorded: Recorded, event: Decision | PlanRejected) -> dict[str, Any]:
    """A plan as a row, as plain JSON values; decimals stay decimals, times are unix seconds."""
    seq, at = recorded.seq, recorded.at
    latency = _latency(recorded)
    if isinstance(event, PlanRejected):
        found: dict[str, Any] = dict.fromkeys(("action", "qty", "notional", "price", "apply_mode", "permit"))
        found |= {"verdict": "REJECTED"}
    else:
        granted = event.verdict == "EXECUTE"
        found = {
            "action": event.action,
            "verdict": event.verdict,
            "qty": event.computed_qty,
            "notional": event.computed_notional,
            "price": event.mark_price,
            "apply_mode": event.apply_mode,
            "permit": {"status": "outstanding", "expires_at": (event.expires_us or at) / 1e6} if granted else None,
        }
    return {
        "seq": seq,
        "plan_id": event.plan_id,
        "symbol": event.symbol,
        "at": at / 1e6,
        "reason": event.reason,
        "latency_ms": None if latency is None else latency / 1e3,
        **found,
    }


def _latency(recorded: Recorded) -> int | None:
    """Microseconds from the plan's stream entry to its decision; clocks may differ by a little."""
    event: Event = recorded.event
    if not isinstance(event, Decision):
        return None
    try:
        return max(0, recorded.at - entry_time(event.entry_id))
    except ValueError:
        return None


def _disarm(last: LastDisarm) -> dict[str, Any]:
    same = ("seq", "reason", "context", "manual", "operator", "epoch", "attempts", "error", "action_taken", "proof")
    rearmed = None
    if last.rearmed_at is not None:
        rearmed = {"at": last.rearmed_at / 1e6, "reason": last.rearmed_why, "operator": last.rearmed_by}
    return {name: getattr(last, name) for name in same} | {
        "at": last.at / 1e6,
        "done_at": None if last.proven_at is None else last.proven_at / 1e6,
        "notes": [str(note) for note in last.proof.get("notes", ())],
        "rearmed": rearmed,
    }
