"""One plan's life, from its events: asked, answered, checked, permitted, used.

    explainer = Explainer("p7")
    for entry in entries:
        if explainer.wants(entry):
            explainer.feed(decode(entry))
    told = explainer.finish()      # plain JSON values; decimals stay decimals
    for line in lines(told):       # the same for a person
        print(line)

When a check would have passed follows from the state right before the decision, so events are folded up to there.
What was recorded is told, never decided again: whether it is right is the audit's question (`governor replay`).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import msgspec

from events.codec import dumps
from events.types import (
    Decision,
    DisarmStarted,
    Entry,
    ErrorRecorded,
    Event,
    Execution,
    PermitConsumed,
    PermitExpired,
    PermitRevoked,
    PlanLost,
    PlanReceived,
    PlanRejected,
    Recorded,
    Recovered,
    Throttled,
    UnpermittedExecution,
)
from governor.next_allowed import look, whole
from governor.plans import entry_time
from governor.telling import answer, permit_told
from projections.state import GapError, State, evolve, initial

IDS_KEPT = 2_000
"""How many of the latest plan_ids an unknown one is compared with."""
ALIKE = 0.75
"""How alike an id has to be to be shown (difflib's ratio)."""
PART = 4
"""From this length on, ids that contain the one asked for are shown too: it may have been cut off."""
AROUND = frozenset({DisarmStarted.NAME, Throttled.NAME})
"""Events without a plan_id that a plan can lead to, or that end its permit."""


def explain(plan_id: str, events: Iterable[Recorded]) -> dict[str, Any]:
    """What `Explainer` tells after these events."""
    explainer = Explainer(plan_id)
    for recorded in events:
        explainer.feed(recorded)
    return explainer.finish()


class Explainer:
    """Collects one plan's life from the events, in the order of the stream.

    Args:
        plan_id: which plan.
        state: where the events fed do not begin with the first one: the state before them. It is folded on.
    """

    def __init__(self, plan_id: str, *, state: State | None = None) -> None:
        self.plan_id = plan_id.encode(errors="replace").decode()
        self.decided = False
        """Whether the plan's one decision and what followed from it are known: no more state is needed."""
        self._needle = dumps(self.plan_id)[1:-1]
        self._state: State | None = initial() if state is None else state
        self._mine: list[Recorded] = []
        self._received: Recorded | None = None
        self._lives: list[dict[str, Any]] = []
        self._skips: list[dict[str, Any]] = []
        self._disarm: Recorded | None = None
        self._chain = -1
        """The last event of the plan, or that followed from it."""
        self._followed: list[Recorded] = []
        self._unseen = _Unseen(self.plan_id)

    def wants(self, entry: Entry) -> bool:
        """Whether this stored event has to be decoded and fed. All of them, until the plan is decided."""
        return not self.decided or entry.name in AROUND or self._needle in entry.data

    def feed(self, recorded: Recorded) -> None:
        """The next event. Where earlier ones are missing, it cannot be told when a check would have passed."""
        seq, event = recorded.seq, recorded.event
        if concerns(event, self.plan_id):
            self._mine.append(recorded)
            self._take(recorded)
            self._chain = seq
        elif seq == self._chain + 1 and _follows(event):
            self._chain = seq
            if not isinstance(event, PermitRevoked | Recovered):
                self._followed.append(recorded)
        elif self._lives:
            self.decided = True
        if isinstance(event, DisarmStarted):
            self._disarm = recorded
        if not self.decided:
            self._unseen.feed(recorded)
            self._fold(recorded)

    def finish(self) -> dict[str, Any]:
        """Everything there is to tell, as plain JSON values (decimals stay decimals). Times are unix seconds."""
        skips = list(self._skips)
        life = self._lives[0] if self._lives else (skips.pop() if skips else self._life(None))
        decision: dict[str, Any] | None = life["decision"]
        told = {
            "plan_id": self.plan_id,
            "known": bool(self._mine),
            "plan": life["plan"],
            "decision": decision,
            "next_allowed": None if decision is None else whole(decision["checks"]),
            "market": None if decision is None else {name: decision[name] for name in _MARKET},
            "permit": life["permit"],
            "results": self._of(Execution),
            "unpermitted": self._of(UnpermittedExecution),
            "errors": self._of(ErrorRecorded),
            "followed": [_plain(recorded) for recorded in self._followed],
            "skipped": [_brief(skip) for skip in skips],
            "rejected": self._of(PlanRejected),
            "decided_again": [_brief(later) for later in self._lives[1:]],
            "events": [_plain(recorded) for recorded in self._mine],
            "unseen": None if self._mine else self._unseen.finish(),
        }
        return {"answer": answer(told)} | told

    def _of(self, kind: type[Event]) -> list[dict[str, Any]]:
        return [
            {"seq": recorded.seq, "at": recorded.at / 1e6} | msgspec.structs.asdict(recorded.event)
            for recorded in self._mine
            if isinstance(recorded.event, kind)
        ]

    def _fold(self, recorded: Recorded) -> None:
        if self._state is None:
            return
        try:
            evolve(self._state, recorded)
        except GapError:
            self._state = None

    def _take(self, recorded: Recorded) -> None:
        seq, at, event = recorded.seq, recorded.at, recorded.event
        permit = next((life["permit"] for life in reversed(self._lives) if life["permit"]), None)
        match event:
            case PlanReceived():
                self._received = recorded
            case Decision():
                self._decision(recorded, event)
            case PermitConsumed() if permit is not None:
                corrected = permit["status"] == "revoked"
                permit |= {"status": "consumed", "at": at / 1e6, "event": seq, "source": event.source}
                permit |= {"corrected": corrected}
            case PermitExpired() if permit is not None:
                permit |= {"status": "expired", "at": at / 1e6, "event": seq}
            case PermitRevoked() if permit is not None:
                permit |= {
                    "status": "revoked",
                    "at": at / 1e6,
                    "event": seq,
                    "disarm": _disarm(self._disarm, after=permit["seq"]),
                }
            case Execution(counted=True) if permit is not None:
                permit |= {"counted_again_at": at / 1e6, "counted_again_event": seq}
            case _:
                pass
        if permit is not None:
            permit["told"] = permit_told(permit)

    def _decision(self, recorded: Recorded, event: Decision) -> None:
        seq, at = recorded.seq, recorded.at
        # After the first decision the state is no longer followed, and it was of another day: a plan_id is forgotten
        # after 25 hours and can then be decided again.
        state = None if self._lives or (self._state is not None and self._state.seq != seq - 1) else self._state
        checks = [look(check, event, state, at) for check in event.checks]
        life = self._life(event.entry_id) | {
            "decision": msgspec.structs.asdict(event) | {"seq": seq, "at": at / 1e6, "checks": checks},
            "permit": _permit(recorded, event) if event.verdict == "EXECUTE" else None,
        }
        (self._skips if event.verdict == "SKIP" else self._lives).append(life)

    def _life(self, entry_id: str | None) -> dict[str, Any]:
        received = self._received
        mine = received is not None and entry_id in (None, getattr(received.event, "entry_id", None))
        return {"plan": _plan(received) if received is not None and mine else None, "decision": None, "permit": None}


_MARKET = ("asked", "position_amt", "legs", "mark_price", "position_error", "price_error")


class _Unseen:
    """What may help when no event knows the plan."""

    def __init__(self, plan_id: str) -> None:
        self._plan_id = plan_id
        self._ids: dict[str, None] = {}
        self._entry_of: str | None = None
        self._first: int | None = None
        self._last: int | None = None
        self._events = self._lost = 0

    def feed(self, recorded: Recorded) -> None:
        event = recorded.event
        self._first = recorded.at if self._first is None else self._first
        self._last = recorded.at
        self._events += 1
        match event:
            case PlanLost():
                self._lost += event.count
            case PlanReceived(plan_id=str(found)) | PlanRejected(plan_id=str(found)) | Execution(plan_id=str(found)):
                self._ids.pop(found, None)
                self._ids[found] = None
                if len(self._ids) > IDS_KEPT:
                    del self._ids[next(iter(self._ids))]
                if event.entry_id == self._plan_id:
                    self._entry_of = found
            case _:
                pass

    def finish(self) -> dict[str, Any]:
        """Number and span of the events, plans lost unread, ids that are alike, and whose stream entry the id is."""
        wanted = self._plan_id[:256]
        parts = [found for found in reversed(self._ids) if len(wanted) >= PART and wanted in found]
        alike = get_close_matches(wanted, self._ids, n=3, cutoff=ALIKE)
        return {
            "events": self._events,
            "first_at": None if self._first is None else self._first / 1e6,
            "last_at": None if self._last is None else self._last / 1e6,
            "lost": self._lost,
            "nearest": list(dict.fromkeys(parts + alike))[:3],
            "entry_of": self._entry_of,
        }


def concerns(event: Event, plan_id: str) -> bool:
    """Whether an event is about the plan; a rejected entry also by an id that cannot be used as one."""
    if getattr(event, "plan_id", None) == plan_id:
        return True
    return isinstance(event, PlanRejected) and event.fields.get("plan_id") == plan_id


def _follows(event: Event) -> bool:
    """Whether the event can follow from the one before it: a Recovered only in front of a Throttled that does."""
    return isinstance(event, Throttled | PermitRevoked | Recovered) or (
        isinstance(event, DisarmStarted) and not event.manual
    )


def _plan(recorded: Recorded) -> dict[str, Any]:
    seq, at, event = recorded.seq, recorded.at, recorded.event
    assert isinstance(event, PlanReceived)
    written = entry_time(event.entry_id)
    return {"received_at": at / 1e6, "written_at": written / 1e6, "seq": seq} | {
        name: getattr(event, name) for name in ("entry_id", "symbol", "action", "decision", "fields", "truncated")
    }


def _permit(recorded: Recorded, decision: Decision) -> dict[str, Any]:
    permit = {
        "status": "outstanding",
        "granted_at": recorded.at / 1e6,
        "expires_at": (decision.expires_us or recorded.at) / 1e6,
        "epoch": decision.epoch,
        "seq": recorded.seq,
        "computed_qty": decision.computed_qty,
        "computed_notional": decision.computed_notional,
        "at": None,
        "event": None,
        "source": None,
        "disarm": None,
        "corrected": False,
        "counted_again_at": None,
        "counted_again_event": None,
    }
    return permit | {"told": permit_told(permit)}


def _disarm(recorded: Recorded | None, *, after: int) -> dict[str, Any] | None:
    """The disarm that revoked a permit granted at event `after`; None when its event was not fed."""
    if recorded is None or recorded.seq < after or not isinstance(event := recorded.event, DisarmStarted):
        return None
    return {"seq": recorded.seq, "reason": event.reason, "operator": event.operator}


def _plain(recorded: Recorded) -> dict[str, Any]:
    seq, at, event = recorded.seq, recorded.at, recorded.event
    return {"seq": seq, "timestamp": at / 1e6, "event": event.NAME, "data": msgspec.structs.asdict(event)}


def _brief(life: dict[str, Any]) -> dict[str, Any]:
    names = ("seq", "at", "entry_id", "verdict", "reason")
    asked = None if life["plan"] is None else life["plan"]["decision"]
    return {name: life["decision"][name] for name in names} | {"asked_for": asked, "permit": life["permit"]}
