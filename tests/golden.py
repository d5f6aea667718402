"""Golden histories: written once for each version of the events, never edited, read by every later program.

An event that is added without a new version of the others gets a history of its own beside them. `python -m
tests.golden` writes those of today's version that are not there yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from events.chain import GENESIS
from events.codec import encode
from events.files import Writer
from events.types import (
    ALL,
    ApplyModeRestored,
    AutoDisarm,
    DisarmFailed,
    Entry,
    Event,
    HistoryAccepted,
    HistoryRestored,
    ManualDisarm,
    SettingsLoaded,
)
from governor import decider, policy
from governor.plans import parse_plan
from governor.policy import DEFAULTS
from tests.spec import DAY, HOUR, MINUTE, SECOND, Spec, market, plan_fields

DATA = Path(__file__).parent / "data"
VERSION = max(cls.VERSION for cls in ALL)
TEXTS = DEFAULTS | {"credentials": "true", "GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD": "13000"}
LIMITS = {"DOGEUSDT": {"GOV_MAX_EXEC_PER_HOUR": "0"}}


class Recorder(Spec):
    """A Spec that keeps what was folded, and when."""

    def __init__(self) -> None:
        super().__init__(policy.from_texts(TEXTS, LIMITS))
        self.recorded: list[tuple[int, Event]] = []

    def fail(self, plan_id: str, *, error: str) -> None:
        """A plan whose evaluation went wrong inside."""
        fields, entry = plan_fields(plan_id=plan_id), self.entry()
        plan = parse_plan(fields, entry_id=entry, now=self.now, needs_close_qty=False)
        decided = decider.fail(
            self.state, plan, self.policy, self.situation, fields=fields, error=error, settings=self.settings
        )
        self.fold(decided.events)

    def proven(self, *, notes: Sequence[str] = (), backup: str | None = None) -> None:
        """The disarm in force was carried out."""
        disarm = self.state.mode.disarm
        assert disarm is not None
        taken = decider.ACTION_TAKEN
        proof = {"notes": list(notes)} | ({} if backup is None else {"backup": backup})
        self.given(
            AutoDisarm(
                reason=disarm.reason, context=disarm.context, action_taken=taken, epoch=disarm.epoch, proof=proof
            )
        )

    def given(self, *events: Event) -> Recorder:
        self.recorded += [(self.now, event) for event in events]
        return super().given(*events)


def story() -> list[tuple[int, Event]]:
    """Two days with everything that can happen."""
    one = Recorder()
    digest = policy.digest(TEXTS, LIMITS)
    one.given(SettingsLoaded(digest=digest, settings=TEXTS, limits=LIMITS, version="0.1.0", host="golden"))
    one.settings = digest
    one.plan("p0", decision="SKIP")
    one.plan("p1")
    one.after(3 * SECOND)
    one.take_back("p1", gone=True)
    one.result("p1", steps_results='[{"step": "CLOSE", "status": "ok", "executed_qty": 0.015}]')
    one.plan("p1")
    one.after(MINUTE).plan("p2", symbol="ETHUSDT", market=market("-1.5", "3120.55"))
    one.after(59 * SECOND).take_back("p2")
    one.after(SECOND).result("p2")
    one.plan("sl1", action="UPDATE_SL")
    one.plan("d1", symbol="DOGEUSDT")
    one.plan("k1", action="OPEN_LONG")
    one.plan("k2", kill_score="nan")
    one.plan("é", symbol="BTCUSDT")
    one.after(10 * MINUTE).tick_all()
    one.plan("old", age=2 * MINUTE)
    one.plan("dark", market=market(None, None))
    one.plan("priceless", action="PARTIAL_25", market=market("0.020", None))
    one.plan("flat", symbol="XRPUSDT", market=market("0", "0.5"))
    one.fold(decider.lose(one.state, ("1-1", "1-2"), one.policy, one.now, count=2))
    one.after(MINUTE).result("sl1", decision="ERROR", executed="False", error="no such order")
    one.proven()
    one.after(HOUR).rearm()
    one.plan("killed", action="UPDATE_SL", kill_score="0.9")
    one.halt = True
    one.plan("halted")
    one.halt = False
    one.plan("daily", symbol="BNBUSDT", market=market("10", "600"))
    one.plan("again", symbol="BNBUSDT", market=market("1", "700"))
    one.after(SECOND).plan("throttled", symbol="BNBUSDT", action="PARTIAL_25", market=market("1", "600"))
    one.after(10 * MINUTE).tick_all()
    one.plan("total1", symbol="LTCUSDT", action="FULL_CLOSE_PROPOSED", market=market("30", "100"))
    one.plan("total2", symbol="ADAUSDT", action="FULL_CLOSE_PROPOSED", market=market("8000", "0.5"))
    one.after(10 * MINUTE).tick_all()
    one.fail("failed", error="KeyError('x')")
    one.plan("burst1", symbol="SOLUSDT", market=market("1", "150"))
    one.plan("burst2", symbol="SOLUSDT", market=market("0.25", "150"))
    one.plan("burst3", symbol="SOLUSDT")
    one.given(DisarmFailed(epoch=one.state.mode.epoch, attempt=1, step="restart", error="timed out"))
    one.after(2 * SECOND).proven(notes=["the service was not running"])
    one.plan("after1")
    one.result("burst1")
    one.after(MINUTE).rearm()
    one.result("nobody")
    one.rearm(force=True)
    one.after(HOUR).plan("late1")
    one.disarm()
    one.given(
        ManualDisarm(reason="drill", context={"operator": "anna"}, action_taken=decider.ACTION_TAKEN,
                     epoch=one.state.mode.epoch, operator="anna", proof={})
    )  # fmt: skip
    one.after(MINUTE).rearm()
    one.given(HistoryRestored(events=3, hold_until_us=one.now + MINUTE))
    one.plan("held")
    one.given(HistoryAccepted(reason="looked at it", operator="anna", hold_until_us=one.now))
    one.after(DAY).plan("next", market=market("0.020", "95033.33333333333333333333"))
    one.at(one.now - 5 * SECOND).plan("back")
    return one.recorded


def drift() -> list[tuple[int, Event]]:
    """A disarm, the file changed by hand while it is in force, and the Apply Layer put back after the re-arm."""
    one = Recorder()
    digest = policy.digest(TEXTS, LIMITS)
    one.given(SettingsLoaded(digest=digest, settings=TEXTS, limits=LIMITS, version="0.2.0", host="golden"))
    one.settings = digest
    one.plan("p1")
    one.disarm()
    one.look("testnet")
    one.after(SECOND).proven(backup="/etc/quantum/apply-layer.env.bak.20260124T120000Z")
    one.look("dry_run")
    one.after(MINUTE).look("testnet")
    one.plan("p2")
    one.look("live")
    one.look("live")
    one.after(SECOND).look(None)
    one.look("dry_run")
    one.look("x" * 100)
    one.after(MINUTE).disarm()
    one.proven()
    one.look("live")
    one.after(MINUTE).rearm()
    one.given(
        ApplyModeRestored(epoch=one.state.mode.epoch, reason="checked", operator="anna", apply_mode="testnet",
                          proof={"apply_mode": "testnet", "service": "quantum-apply-layer.service", "notes": []})
    )  # fmt: skip
    one.look("live")
    one.after(MINUTE).plan("p3")
    return one.recorded


STORIES: dict[str, Callable[[], list[tuple[int, Event]]]] = {"": story, "-drift": drift}
"""By what the file's name has behind the version."""


def entries(name: str = "") -> list[Entry]:
    """A story as stored."""
    head, found = GENESIS, []
    for at, event in STORIES[name]():
        found.append(encode(event, after=head, at=at))
        head = found[-1].head
    return found


def path(name: str = "", version: int = VERSION) -> Path:
    return DATA / f"events-v{version}{name}.jsonl"


if __name__ == "__main__":
    missing = [name for name in STORIES if not path(name).exists()]
    if not missing:
        sys.exit("all of them are there: a golden history is never written again")
    for each in missing:
        with Writer(path(each), after=GENESIS, key=None) as writer:
            writer.add(entries(each))
            writer.close()
