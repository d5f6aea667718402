"""The what-if audit: with nothing changed nothing differs; with something changed a world goes on as it would have."""

from __future__ import annotations

import itertools
from decimal import Decimal
from functools import cache
from typing import Any, Self

import msgspec
import pytest

from events.codec import decode
from events.types import (
    AutoDisarm,
    Decision,
    Event,
    HistoryAccepted,
    PermitConsumed,
    PlanLost,
    PlanReceived,
    Recorded,
    SettingsLoaded,
)
from governor import decider, policy
from governor.outcome import ASSUMPTIONS, Difference, Outcome, Verdict
from governor.policy import Limits, Policy
from governor.whatif import WhatIf, changed, lines, parse_overrides
from governor.world import STRETCHES, Thinned
from projections import totals
from projections.state import State, evolve, prune
from tests.spec import DAY, HOUR, MIDNIGHT, MINUTE, NOON, SECOND, Spec, market
from tests.test_properties import Oracle, walk


class Past(Spec):
    """A gate with a past that is kept."""

    def __init__(self, *, now: int = NOON, limits: dict[str, dict[str, str]] | None = None, **settings: str) -> None:
        settings.setdefault("credentials", "true")
        super().__init__(policy.from_texts(settings, limits), now=now)
        self.events: list[Recorded] = []
        self.load(limits, **settings)

    def load(self, limits: dict[str, dict[str, str]] | None = None, **settings: str) -> None:
        self.policy = policy.from_texts(settings, limits)
        digest = policy.digest(settings, limits or {})
        self.given(SettingsLoaded(digest=digest, settings=settings, limits=limits or {}))

    def given(self, *events: Event) -> Self:
        for event in events:
            recorded = Recorded(self.state.seq + 1, self.now, event, "")
            self.events.append(recorded)
            evolve(self.state, recorded)
        return self

    def plans(self, *plan_ids: str, every: int = MINUTE, **changed: Any) -> Self:
        for plan_id in plan_ids:
            self.after(every)
            self.plan(plan_id, **changed)
        return self

    def proof(self) -> Self:
        """The disarm is carried out."""
        disarm = self.state.mode.disarm
        assert disarm is not None
        return self.given(
            AutoDisarm(reason=disarm.reason, context=disarm.context, action_taken="", epoch=disarm.epoch, proof={})
        )


def what_if(past: Past, *, limits: Any = None, **overrides: Any) -> Outcome:
    return asked(past, limits=limits, **overrides).finish()


def asked(past: Past, *, rearm_after_us: int | None = None, limits: Any = None, **overrides: Any) -> WhatIf:
    it = WhatIf(overrides, limits=limits, rearm_after_us=rearm_after_us)
    it.feed(past.events)
    return it


def told(outcome: Outcome) -> dict[str, tuple[str, str]]:
    """Each difference as what was recorded and what is computed, reason or verdict."""
    return {
        each.plan_id: (each.recorded.reason or each.recorded.verdict, each.computed.reason or each.computed.verdict)
        for each in outcome.differences
    }


def assumed(outcome: Outcome) -> dict[str, int]:
    return {kind: count for kind, count in outcome.assumptions.items() if count}


def verdicts(past: Past) -> dict[str, str]:
    found = (each.event for each in past.events)
    return {event.plan_id: event.reason or event.verdict for event in found if isinstance(event, Decision)}


# -- properties over walks -----------------------------------------------------------------------------------------

SEEDS = range(8)
OTHERS = (
    {"GOV_MAX_EXEC_PER_5MIN": "5", "GOV_MAX_EXEC_PER_HOUR": "20", "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "20000"},
    {"GOV_MAX_EXEC_PER_5MIN": "1"},
    {"GOV_MAX_EXEC_PER_5MIN": "off", "GOV_MAX_EXEC_PER_HOUR": "2", "GOV_MAX_REDUCE_QTY_PER_DAY": "0.01"},
    {"GOV_ENABLE_AUTO_DISARM": "false", "GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD": "4000"},
    {"GOV_DISARM_ON_ERROR_COUNT": "1", "GOV_THROTTLE_COOLDOWN_SEC": "3600"},
)


@cache
def walked(seed: int) -> tuple[list[Recorded], Policy]:
    world = walk(seed)
    return [decode(entry) for entry in world.store.entries], world.policy


def kept(state: State) -> dict[str, Any]:
    """What a later plan can depend on, and the counts. Numbers of events are the world's own, and so is a proof."""
    prune(state)
    mode = state.mode
    return {
        "tables": {
            name: dict(getattr(state, name).items()) for name in ("books", "plans", "permits", "entries", "results")
        },
        "counts": msgspec.structs.asdict(state.counts),
        "mode": (mode.state, mode.since, mode.reason, mode.epoch, mode.causes, mode.until),
        "rest": (state.time, state.first_at, state.settings, state.hold_until, state.days, state.errors),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_with_nothing_changed_nothing_differs_and_both_worlds_end_alike(seed: int) -> None:
    events, rules = walked(seed)
    it = WhatIf({}, policies={"s": rules})
    it.feed(events)
    outcome = it.finish()
    assert outcome.differences == ()
    assert (outcome.events, outcome.plans, outcome.decisions) == (
        len(events), it.recorded.counts.plans, it.recorded.counts.plans,
    )  # fmt: skip
    assert kept(it.computed) == kept(it.recorded)
    assert assumed(outcome) == {}
    assert all(both.recorded == both.computed for both in outcome.symbols.values())
    assert all(both.recorded == both.computed for both in outcome.seconds.values())
    assert outcome.recorded_disarms == outcome.computed_disarms
    assert all(disarm.matched for disarm in outcome.recorded_disarms)
    assert all(panel.recorded == panel.computed for panel in outcome.series.panels)
    assert outcome.series.recorded_states == outcome.series.computed_states


@pytest.mark.parametrize("rearm_after_us", [None, 10 * SECOND])
@pytest.mark.parametrize("seed", SEEDS)
def test_in_the_other_world_no_limit_of_the_other_settings_is_passed(seed: int, rearm_after_us: int | None) -> None:
    events, rules = walked(seed)
    for overrides in OTHERS:
        it = WhatIf(overrides, policies={"s": rules}, rearm_after_us=rearm_after_us)
        oracle = Oracle(changed(rules, overrides, None))
        fold = it._other.fold

        def read(recorded: Recorded, it: WhatIf = it, oracle: Oracle = oracle, fold: Any = fold) -> None:
            fold(recorded)
            oracle.read(it.computed.time, recorded.event)

        it._other.fold = read  # type: ignore[method-assign]
        it.feed(events)
        outcome = it.finish()
        oracle.check()
        for state in (it.recorded, it.computed):
            counts = state.counts
            assert counts.allowed + counts.blocked + counts.skipped == counts.plans == outcome.plans
            assert counts.allowed == counts.consumed + counts.expired + counts.revoked + len(state.permits)
        span = outcome.series.end - outcome.series.start
        for world in ("recorded", "computed"):
            assert sum(getattr(both, world) for both in outcome.seconds.values()) == pytest.approx(span)
        gone = it.recorded.counts.allowed - outcome.newly_blocked + outcome.newly_allowed
        assert it.computed.counts.allowed == gone
        assert outcome.newly_allowed + outcome.newly_blocked + outcome.reason_changed == len(outcome.differences)


def test_the_walks_come_across_everything_that_is_assumed() -> None:
    found: set[str] = set()
    for seed in SEEDS:
        events, rules = walked(seed)
        for overrides in OTHERS:
            it = WhatIf(overrides, policies={"s": rules}, rearm_after_us=10 * SECOND)
            it.feed(events)
            found |= assumed(it.finish()).keys()
    assert found == ASSUMPTIONS.keys() - {"taken_as_recorded"}


# -- limits --------------------------------------------------------------------------------------------------------


def test_a_higher_hourly_limit_allows_the_fourth_plan_with_an_assumed_position() -> None:
    past = Past().plans("p1", "p2", "p3", "p4", every=6 * MINUTE, action="PARTIAL_25", market=market("0.01", "90000"))
    assert verdicts(past)["p4"] == "hourly_limit_exceeded"
    outcome = what_if(past, GOV_MAX_EXEC_PER_HOUR="4")
    (difference,) = outcome.differences
    assert difference == Difference(
        plan_id="p4",
        seq=past.events[-2].seq,  # a throttle follows it
        at=past.now / 1e6,
        symbol="BTCUSDT",
        recorded=Verdict("BLOCK", "hourly_limit_exceeded"),
        computed=Verdict("EXECUTE", None),
        assumed=difference.assumed,
    )
    assert difference.assumed is not None
    assert (difference.assumed.position_amt, difference.assumed.mark_price) == (Decimal("0.01"), Decimal(90000))
    assert (difference.assumed.seq, difference.assumed.age_s) == (past.events[6].seq, 360)
    assert (outcome.newly_allowed, outcome.newly_blocked, outcome.reason_changed) == (1, 0, 0)
    moved = outcome.symbols["BTCUSDT"]
    assert (moved.recorded.notional, moved.computed.notional) == (Decimal(675), Decimal(900))
    assert (moved.recorded.executions, moved.computed.executions) == (3, 4)
    assert moved.computed.quantity == Decimal("0.01")
    assert outcome.state.recorded == "THROTTLED"
    assert outcome.state.computed == "ARMED"


def test_a_lower_limit_blocks_a_plan_and_the_room_it_leaves_lets_a_later_one_pass() -> None:
    past = Past(GOV_MAX_EXEC_PER_5MIN="off", GOV_MAX_EXEC_PER_HOUR="2", GOV_THROTTLE_MAX_EXEC_PER_5MIN="off")
    past.plans("p1", "p2", every=20 * MINUTE, action="PARTIAL_25")
    past.plans("p3", every=45 * MINUTE, action="PARTIAL_25").plans("p4", every=10 * MINUTE, action="PARTIAL_25")
    past.plans("p5", every=6 * MINUTE, action="PARTIAL_25")
    assert verdicts(past) == {"p1": "EXECUTE", "p2": "EXECUTE", "p3": "EXECUTE", "p4": "hourly_limit_exceeded",
                              "p5": "EXECUTE"}  # fmt: skip
    outcome = what_if(past, GOV_MAX_EXEC_PER_HOUR="1")
    assert told(outcome) == {"p2": ("EXECUTE", "hourly_limit_exceeded"), "p5": ("EXECUTE", "hourly_limit_exceeded")}
    assert assumed(outcome) == {}


def test_a_total_over_all_symbols_leaves_room_for_a_plan_that_had_none() -> None:
    past = Past(GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD="3000")
    past.plans("p1", market=market("0.02", "100000")).plans("p2", symbol="ETHUSDT", market=market("0.01", "200000"))
    past.plans("p3", symbol="SOLUSDT", market=market("0.02", "100000"))
    assert verdicts(past) == {"p1": "EXECUTE", "p2": "EXECUTE", "p3": "total_daily_limit_exceeded"}
    outcome = what_if(past, limits={"BTCUSDT": {"GOV_MAX_EXEC_PER_HOUR": "0"}})
    assert told(outcome) == {
        "p1": ("EXECUTE", "hourly_limit_exceeded"),
        "p3": ("total_daily_limit_exceeded", "EXECUTE"),
    }
    assert outcome.limits == {"BTCUSDT": {"GOV_MAX_EXEC_PER_HOUR": "0"}}
    assert [difference.assumed for difference in outcome.differences] == [None, None]  # p3 had been asked for


def test_a_symbol_keeps_its_own_limits_unless_others_are_given() -> None:
    past = Past(limits={"BTCUSDT": {"GOV_MAX_EXEC_PER_HOUR": "1"}}).plans("p1", "p2", every=6 * MINUTE)
    assert told(what_if(past, GOV_MAX_EXEC_PER_HOUR="50")) == {}
    assert "p2" in told(what_if(past, limits={}))


def test_an_override_holds_through_settings_that_are_loaded_later() -> None:
    past = Past(GOV_KILL_SCORE_CRITICAL="0.5").plans("p1", action="UPDATE_SL", kill_score="0.6")
    past.load(GOV_KILL_SCORE_CRITICAL="0.9", credentials="true")
    past.plans("p2", action="UPDATE_SL", kill_score="0.6")
    assert told(what_if(past, GOV_KILL_SCORE_CRITICAL="0.55")) == {"p2": ("EXECUTE", "kill_score_critical_non_close")}
    assert told(what_if(past, GOV_KILL_SCORE_CRITICAL="off")) == {"p1": ("kill_score_critical_non_close", "EXECUTE")}


def test_a_position_the_exchange_had_never_told_is_unknown_and_said_so() -> None:
    past = Past(GOV_MAX_EXEC_PER_HOUR="0").plans("p1")
    outcome = what_if(past, GOV_MAX_EXEC_PER_HOUR="3")
    assert told(outcome) == {"p1": ("hourly_limit_exceeded", "position_fetch_failed")}
    (difference,) = outcome.differences
    assert difference.assumed is not None
    assert set(msgspec.structs.astuple(difference.assumed)) == {None}
    assert assumed(outcome) == {"positions_unknown": 1}


def test_an_answer_without_a_position_is_not_taken_for_the_last_one() -> None:
    past = Past().plans("p1", every=6 * MINUTE, action="PARTIAL_25")
    past.plans("p2", every=6 * MINUTE, market=market(None))
    past.load(GOV_MAX_EXEC_PER_HOUR="0", credentials="true")
    past.plans("p3", every=6 * MINUTE)
    (difference,) = what_if(past, GOV_MAX_EXEC_PER_HOUR="3").differences
    assert difference.assumed is not None
    assert difference.assumed.seq == past.events[2].seq


def test_without_credentials_nothing_is_assumed_and_the_quantity_is_told() -> None:
    past = Past(credentials="false").plans("p1", "p2", every=6 * MINUTE, close_qty="0.015")
    assert verdicts(past)["p2"] == "daily_limit_exceeded"
    outcome = what_if(past, GOV_MAX_REDUCE_QTY_PER_DAY="0.03")
    assert told(outcome) == {"p2": ("daily_limit_exceeded", "EXECUTE")}
    assert assumed(outcome) == {}
    panel = outcome.series.panels[1]
    assert (panel.symbol, panel.unit) == ("BTCUSDT", "base units")
    assert panel.computed[-1][1] == pytest.approx(0.03)
    assert [limit for _, limit in panel.recorded_limit + panel.computed_limit] == [0.02, 0.03]


# -- permits and results -------------------------------------------------------------------------------------------


def fourth() -> Past:
    """The fourth plan in an hour is blocked; the what-if allows it."""
    return Past(GOV_MAX_EXEC_PER_5MIN="off").plans("p1", "p2", "p3", "p4", action="PARTIAL_25")


def test_a_permit_granted_in_both_worlds_has_its_recorded_fate() -> None:
    past = fourth()
    past.after(MINUTE).take_back("p3")
    past.result("p2")
    it = asked(past, GOV_MAX_EXEC_PER_HOUR="4")
    outcome = it.finish()
    fates = {plan_id: plan.permit for plan_id, plan in it.computed.plans.items()}
    assert {**fates, "p4": ""} == {"p1": "outstanding", "p2": "consumed", "p3": "expired", "p4": ""}
    assert outcome.symbols["BTCUSDT"].computed.executions == 3


def test_a_permit_only_the_other_world_grants_is_taken_for_consumed_when_its_time_is_over() -> None:
    past = fourth()
    past.after(59 * SECOND).given(HistoryAccepted(reason="r", operator="anna", hold_until_us=0))
    it = asked(past, GOV_MAX_EXEC_PER_HOUR="4")
    permit = it.computed.permits.get("p4")
    assert permit is not None
    past.after(SECOND).given(HistoryAccepted(reason="r", operator="anna", hold_until_us=0))
    it.feed(past.events[-1:])
    assert it.computed.permits.get("p4") is None
    outcome = it.finish()
    assert assumed(outcome) == {"positions": 1, "consumption": 1}
    assert it.computed.counts.consumed == 1
    assert outcome.symbols["BTCUSDT"].computed.executions == 4


def test_results_of_a_plan_that_is_blocked_in_the_other_world_do_not_happen_there() -> None:
    past = Past().plans("p1").plans("p2", symbol="ETHUSDT", market=market("1", "3000"))
    past.result("p2", executed="True", steps_results='[{"status": "error", "executed_qty": "9"}]')
    assert past.state.counts.errors == 2
    it = asked(past, limits={"ETHUSDT": {"GOV_MAX_EXEC_PER_HOUR": "0"}})
    outcome = it.finish()
    assert (it.computed.counts.executions, it.computed.counts.errors) == (0, 0)
    assert it.computed.mode.state == "THROTTLED"
    assert assumed(outcome) == {"results_left_out": 1}


def test_an_execution_around_the_gate_happens_in_both_worlds() -> None:
    past = fourth()
    past.after(SECOND).result("p4")
    assert past.state.mode.state == "DISARMED"
    outcome = what_if(past)
    assert outcome.state.computed == "DISARMED"
    it = asked(past, GOV_MAX_EXEC_PER_HOUR="4")
    outcome = it.finish()
    plan = it.computed.plans.get("p4")
    assert plan is not None
    assert plan.permit == "consumed"  # permitted there, so it is no accusation
    assert outcome.state.computed == "ARMED"
    assert [disarm.reason for disarm in outcome.avoided] == ["unpermitted_execution"]


def test_a_refusal_told_for_a_plan_that_is_permitted_in_the_other_world_is_left_out() -> None:
    past = fourth()
    past.after(SECOND).result("p4", executed="False", decision="ERROR", error="no permit")
    it = asked(past, GOV_MAX_EXEC_PER_HOUR="4")
    outcome = it.finish()
    assert it.computed.counts.errors == 0
    assert outcome.assumptions["results_left_out"] == 1


def test_what_was_executed_after_it_had_been_taken_back_counts_again_in_both() -> None:
    past = Past().plans("p1")
    past.after(MINUTE).take_back()
    past.after(SECOND).result()
    outcome = what_if(past, GOV_MAX_EXEC_PER_HOUR="9")
    moved = outcome.symbols["BTCUSDT"]
    assert moved.recorded == moved.computed
    assert (moved.recorded.executions, moved.recorded.quantity) == (1, Decimal("0.015"))


def test_a_result_whose_fields_were_cut_is_read_from_its_event() -> None:
    past = Past().plans("p1")
    steps = '[{"status": "error", "executed_qty": "9", "note": "' + "x" * 5000 + '"}]'
    past.result(steps_results=steps)
    assert past.state.counts.errors == 2
    it = asked(past)
    it.finish()
    assert it.computed.counts == past.state.counts


# -- disarms -------------------------------------------------------------------------------------------------------


def burst() -> Past:
    """Three plans within five minutes: a disarm, and an hour of blocks until a person re-arms."""
    past = Past().plans("p1", "p2", "p3", action="PARTIAL_25", every=SECOND)
    assert past.state.mode.state == "DISARMED"
    past.proof()
    past.apply_mode = "dry_run"
    past.plans("p4", every=20 * MINUTE, action="PARTIAL_25").plans("p5", every=20 * MINUTE, symbol="ETHUSDT")
    past.after(20 * MINUTE).rearm()
    past.apply_mode = "testnet"
    return past.plans("p6", every=10 * MINUTE, action="PARTIAL_25")


@pytest.mark.parametrize(
    ("overrides", "p3", "p4"),
    [
        ({"GOV_DISARM_ON_BURST_BREACH": "false"}, None, "EXECUTE"),
        ({"GOV_MAX_EXEC_PER_5MIN": "5"}, "EXECUTE", "hourly_limit_exceeded"),
    ],
)
def test_a_disarm_that_is_avoided_changes_every_block_that_followed(
    overrides: dict[str, str], p3: str | None, p4: str
) -> None:
    past = burst()
    assert verdicts(past)["p5"] == "disarmed"
    outcome = what_if(past, **overrides)
    wanted = {"p4": ("disarmed", p4), "p5": ("disarmed", "position_fetch_failed")}
    assert told(outcome) == wanted | ({"p3": ("burst_limit_exceeded", p3)} if p3 else {})
    (disarm,) = outcome.avoided
    assert (disarm.reason, disarm.context["symbol"], disarm.already) == ("burst_limit_breach", "BTCUSDT", False)
    assert (len(outcome.recorded_disarms), outcome.computed_disarms) == (1, ())
    assert outcome.seconds["DISARMED"].recorded == 3600
    assert outcome.seconds["DISARMED"].computed == 0
    assert outcome.assumptions["apply_mode"] == 2  # p4 and p5, decided while the record's file said dry run


def test_permits_a_disarm_revoked_that_does_not_happen_there_are_taken_for_consumed() -> None:
    it = asked(burst(), GOV_DISARM_ON_BURST_BREACH="false")
    it.finish()
    for plan_id in ("p1", "p2"):
        was, now = it.recorded.plans.get(plan_id), it.computed.plans.get(plan_id)
        assert was is not None
        assert now is not None
        assert (was.permit, now.permit) == ("revoked", "consumed")


def test_with_the_disarm_avoided_the_apply_mode_is_the_one_before_it_until_the_rearm() -> None:
    past = burst()
    modes: dict[str, str | None] = {}
    it = WhatIf({"GOV_DISARM_ON_BURST_BREACH": "false"})
    fold = it._other.fold

    def note(recorded: Recorded) -> None:
        if isinstance(recorded.event, Decision):
            modes[recorded.event.plan_id] = recorded.event.apply_mode
        fold(recorded)

    it._other.fold = note  # type: ignore[method-assign]
    past.apply_mode = "mainnet"
    it.feed(past.plans("p7").events)
    assert modes == {
        **dict.fromkeys(("p1", "p2", "p3", "p4", "p5", "p6"), "testnet"),
        "p7": "mainnet",
    }


def test_a_disarm_that_is_added_stays_until_the_next_recorded_rearm() -> None:
    past = Past(GOV_DISARM_ON_BURST_BREACH="false", GOV_MAX_EXEC_PER_HOUR="off")
    past.plans("p1", "p2", "p3", every=SECOND, action="PARTIAL_25").plans("p4", every=HOUR, action="PARTIAL_25")
    past.after(HOUR).disarm()
    past.proof().after(HOUR).rearm()
    past.plans("p5", every=HOUR, action="PARTIAL_25")
    outcome = what_if(past, GOV_DISARM_ON_BURST_BREACH="true")
    assert told(outcome) == {"p4": ("EXECUTE", "disarmed")}
    assert [(disarm.reason, disarm.already) for disarm in outcome.added] == [("burst_limit_breach", False)]
    # A person who disarms there finds it done.
    assert [(disarm.reason, disarm.already) for disarm in outcome.avoided] == [("drill", True)]
    assert outcome.assumptions["apply_mode"] == 1  # p4; p5 comes after the re-arm
    assert outcome.seconds["DISARMED"].computed == 3 * 3600
    assert outcome.seconds["DISARMED"].recorded == 3600


def test_after_an_added_disarm_apply_mode_is_dry_run_and_a_person_may_be_assumed_to_rearm() -> None:
    past = Past(GOV_DISARM_ON_BURST_BREACH="false", GOV_MAX_EXEC_PER_HOUR="off")
    past.plans("p1", "p2", "p3", every=SECOND, action="PARTIAL_25").plans("p4", every=HOUR, action="PARTIAL_25")
    assert what_if(past, GOV_DISARM_ON_BURST_BREACH="true").assumptions["apply_mode"] == 1
    outcome = asked(past, rearm_after_us=HOUR // 2, GOV_DISARM_ON_BURST_BREACH="true").finish()
    assert told(outcome) == {}
    assert outcome.seconds["DISARMED"].computed == 1800
    assert assumed(outcome) == {"rearms": 1}
    never = asked(past, rearm_after_us=2 * HOUR, GOV_DISARM_ON_BURST_BREACH="true").finish()
    assert told(never) == {"p4": ("EXECUTE", "disarmed")}


def test_nobody_is_assumed_to_rearm_what_a_person_rearmed_before() -> None:
    past = Past(GOV_DISARM_ON_BURST_BREACH="false").plans("p1", "p2", "p3", every=SECOND, action="PARTIAL_25")
    past.after(MINUTE).disarm()
    past.proof().after(10 * MINUTE).rearm()
    past.after(10 * MINUTE).disarm()
    past.after(HOUR).proof()
    outcome = asked(past, rearm_after_us=30 * MINUTE, GOV_DISARM_ON_BURST_BREACH="true").finish()
    assert outcome.state.computed == "DISARMED"
    assert outcome.assumptions["rearms"] == 0
    assert [disarm.matched for disarm in outcome.computed_disarms] == [False, True]


def test_a_permit_revoked_by_an_added_disarm_stays_revoked_whatever_is_recorded_of_it() -> None:
    past = Past(GOV_DISARM_ON_BURST_BREACH="false")
    past.plans("p1", "p2", "p3", every=SECOND, action="PARTIAL_25")
    past.after(SECOND).take_back("p1", gone=True)
    past.result("p2")
    it = asked(past, GOV_DISARM_ON_BURST_BREACH="true")
    outcome = it.finish()
    assert (it.computed.counts.revoked, it.computed.counts.consumed) == (2, 0)
    assert outcome.assumptions["results_left_out"] == 1
    assert outcome.state.computed == "DISARMED"


def test_a_correction_of_a_later_disarm_does_not_touch_a_permit_that_an_added_one_revoked() -> None:
    past = Past(GOV_DISARM_ON_BURST_BREACH="false").plans("p1", "p2", "p3", every=SECOND, action="PARTIAL_25")
    past.after(SECOND).disarm()
    past.given(*decider.correct_revoked(past.state, ["p1"]))
    assert past.state.counts.consumed == 1
    it = asked(past, GOV_DISARM_ON_BURST_BREACH="true")
    it.finish()
    assert (it.computed.counts.revoked, it.computed.counts.consumed) == (2, 0)


def test_a_permit_that_was_consumed_before_a_disarm_by_hand_is_so_in_both_worlds() -> None:
    past = Past().plans("p1")
    past.disarm()
    past.given(*decider.correct_revoked(past.state, ["p1"]))
    assert isinstance(past.events[-1].event, PermitConsumed)
    it = asked(past, GOV_MAX_EXEC_PER_HOUR="9")
    outcome = it.finish()
    assert it.computed.counts == past.state.counts
    assert [disarm.matched for disarm in outcome.computed_disarms] == [True]


def test_errors_that_did_not_happen_there_do_not_disarm() -> None:
    past = Past(GOV_DISARM_ON_ERROR_COUNT="2").plans("p1").plans("p2", symbol="ETHUSDT")
    failed = {"executed": "False", "steps_results": '[{"status": "error"}]'}
    past.result("p1", **failed)
    past.result("p2", **failed)
    assert past.state.mode.reason == "repeated_errors"
    outcome = what_if(past, limits={"ETHUSDT": {"GOV_MAX_EXEC_PER_5MIN": "0"}}, GOV_DISARM_ON_BURST_BREACH="false")
    assert [disarm.reason for disarm in outcome.avoided] == ["repeated_errors"]
    assert outcome.state.computed == "THROTTLED"


def test_the_other_world_recovers_when_its_own_throttle_is_over() -> None:
    past = Past(GOV_MAX_EXEC_PER_HOUR="1", GOV_THROTTLE_COOLDOWN_SEC="3600").plans("p1", "p2", action="PARTIAL_25")
    past.after(2 * HOUR).tick()
    outcome = what_if(past, GOV_THROTTLE_COOLDOWN_SEC="60")
    assert outcome.seconds["THROTTLED"].recorded == 2 * 3600  # it was noticed late
    assert outcome.seconds["THROTTLED"].computed == 60


# -- what else comes from outside ----------------------------------------------------------------------------------


def test_lost_and_rejected_plans_and_a_failed_evaluation_count_in_both_worlds() -> None:
    past = Past(GOV_DISARM_ON_ERROR_COUNT="4")
    past.plan("p1", symbol="")
    past.plan("p2", kill_score="", decision="")
    lost = (past.entry(), past.entry())
    past.given(*decider.lose(past.state, lost, past.policy, past.now, count=2))
    assert any(isinstance(each.event, PlanLost) for each in past.events)
    assert past.state.counts.errors == 3
    it = asked(past)
    outcome = it.finish()
    assert kept(it.computed) == kept(it.recorded)
    assert what_if(past, GOV_DISARM_ON_ERROR_COUNT="3").state.computed == "DISARMED"
    assert outcome.state.computed == "THROTTLED"


def test_a_plan_that_cannot_be_decided_again_is_taken_as_recorded_and_said_so() -> None:
    past = Past().plans("p1")
    received = past.events[1].event
    assert isinstance(received, PlanReceived)
    past.events[1] = msgspec.structs.replace(
        past.events[1], event=msgspec.structs.replace(received, fields={"plan_id": "p1"})
    )
    it = asked(past, GOV_MAX_EXEC_PER_HOUR="0")
    outcome = it.finish()
    assert (outcome.differences, assumed(outcome)) == ((), {"taken_as_recorded": 1})
    assert it.computed.counts.allowed == 1


def test_a_hold_after_a_failover_holds_in_the_other_world_too() -> None:
    past = Past()
    past.history = "history_hold"
    past.plans("held")
    past.history = "whole"
    past.plans("free")
    assert verdicts(past) == {"held": "history_hold", "free": "EXECUTE"}
    assert told(what_if(past)) == {}
    assert told(what_if(past, GOV_MAX_EXEC_PER_5MIN="0")) == {"free": ("EXECUTE", "burst_limit_exceeded")}


def test_a_history_that_stops_between_a_plan_and_its_decision_is_no_difference() -> None:
    past = Past().plans("p1", "p2")
    it = WhatIf({})
    it.feed(past.events[:-1])
    outcome = it.finish()
    assert (outcome.events, outcome.plans, outcome.decisions) == (len(past.events) - 1, 2, 1)
    assert outcome.differences == ()


def test_a_plan_whose_decision_was_left_out_is_no_difference_and_the_rest_is_still_decided() -> None:
    past = Past().plans("p1", "p2", every=6 * MINUTE)
    received = past.events[1]
    events = [*past.events[:2], *(msgspec.structs.replace(each, seq=each.seq - 1) for each in past.events[3:])]
    it = WhatIf({"GOV_MAX_EXEC_PER_HOUR": "0"})
    it.feed(events)
    outcome = it.finish()
    assert isinstance(received.event, PlanReceived)
    assert (outcome.plans, outcome.decisions, list(told(outcome))) == (2, 1, ["p2"])


def test_no_history_has_an_outcome() -> None:
    outcome = WhatIf({"GOV_MAX_EXEC_PER_HOUR": "5"}).finish()
    assert (outcome.events, outcome.plans, outcome.symbols) == (0, 0, {})
    assert "the same verdict" in "\n".join(lines(outcome))


def test_pages_of_any_size_give_the_same_outcome() -> None:
    events = burst().events
    whole = WhatIf({"GOV_MAX_EXEC_PER_5MIN": "5"})
    whole.feed(events)
    paged = WhatIf({"GOV_MAX_EXEC_PER_5MIN": "5"})
    for event in events:
        paged.feed([event])
    assert paged.finish() == whole.finish()


# -- settings ------------------------------------------------------------------------------------------------------


def test_overrides_are_read_as_name_and_value() -> None:
    assert parse_overrides(["GOV_MAX_EXEC_PER_HOUR=5", "GOV_FALLBACK_QTY="]) == {
        "GOV_MAX_EXEC_PER_HOUR": "5",
        "GOV_FALLBACK_QTY": "",
    }


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["GOV_MAX_EXEC_PER_HOUR"], "'GOV_MAX_EXEC_PER_HOUR' is no NAME=VALUE"),
        (["GOV_MAX_EXEC_PER_HUOR=5"], "GOV_MAX_EXEC_PER_HUOR = '5'.*did you mean GOV_MAX_EXEC_PER_HOUR?"),
        (["credentials=false"], "credentials = 'false'.*did you mean"),
        (["METRICS_PORT=1"], "METRICS_PORT = '1': no setting of that name takes part in a decision"),
        (["GOV_MAX_EXEC_PER_HOUR=many"], "GOV_MAX_EXEC_PER_HOUR is 'many', expected a whole number from 0 to 100000"),
        (["GOV_MAX_EXEC_PER_HOUR="], "GOV_MAX_EXEC_PER_HOUR is '', expected"),
        (["GOV_KILL_SCORE_CRITICAL=NaN"], "GOV_KILL_SCORE_CRITICAL is 'NaN', expected a number"),
        (["GOV_MAX_EXEC_PER_HOUR=5", "GOV_MAX_EXEC_PER_HOUR=6"], "GOV_MAX_EXEC_PER_HOUR is given twice: '5' and '6'"),
    ],
)
def test_a_wrong_override_names_itself_its_value_and_what_is_allowed(texts: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_overrides(texts)


def test_what_is_wrong_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match=r"GOV_NONSENSE.*did you mean"):
        WhatIf({"GOV_NONSENSE": "1"})
    with pytest.raises(ValueError, match=r"limits of BTCUSDT: 'GOV_PERMIT_TTL_SEC' is no limit"):
        WhatIf({}, limits={"BTCUSDT": {"GOV_PERMIT_TTL_SEC": "5"}})
    with pytest.raises(ValueError, match="rearm_after_us is -1"):
        WhatIf({}, rearm_after_us=-1)


def test_a_policy_under_other_settings_leaves_what_a_symbol_has_of_its_own() -> None:
    rules = Policy(by_symbol={"A": Limits(per_hour=7), "B": Limits(per_5min=9)})
    now = changed(rules, {"GOV_MAX_EXEC_PER_HOUR": "5", "GOV_PERMIT_TTL_SEC": "10"}, None)
    assert (now.limits.per_hour, now.permit_ttl_us) == (5, 10 * SECOND)
    assert now.by_symbol == {"A": Limits(per_hour=7), "B": Limits(per_hour=5, per_5min=9)}
    assert changed(rules, {}, {"C": {"GOV_MAX_EXEC_PER_5MIN": "off"}}).by_symbol == {"C": Limits(per_5min=None)}


# -- for a reader --------------------------------------------------------------------------------------------------


def test_the_table_begins_with_the_answer_and_tells_what_was_assumed() -> None:
    shown = lines(what_if(burst(), GOV_MAX_EXEC_PER_5MIN="5"))
    assert shown[:5] == [
        "what if GOV_MAX_EXEC_PER_5MIN=5",
        "  plans      1 newly allowed, 2 not allowed for another reason of 6 plans",
        "  notional   1,900.67 USD instead of 1,425.50 (+475.17)",
        "  disarms    0 instead of 1: 1 avoided, 0 added",
        "  state      ARMED at the end, recorded ARMED",
    ]
    text = "\n".join(shown)
    assert "avoided  burst_limit_breach  symbol=BTCUSDT exec_5min=3 limit=2" in text
    assert "DISARMED       01:00:00  00:00:00  -01:00:00" in text
    assert "position never told" in text
    assert "assumed: position 0.02, price 95033.33333333, 1.0 s old" in text


def test_the_table_is_cut_unless_everything_is_asked_for() -> None:
    past = Past(GOV_MAX_EXEC_PER_HOUR="0").plans(*(f"p{i}" for i in range(15)))
    outcome = what_if(past, GOV_MAX_EXEC_PER_HOUR="1")
    assert len(outcome.differences) == 15
    assert "and 5 more" in lines(outcome)
    other = what_if(past, limits={"ETHUSDT": {"GOV_MAX_EXEC_PER_HOUR": "1"}}, GOV_MAX_EXEC_PER_5MIN="1")
    assert lines(other)[0] == "what if GOV_MAX_EXEC_PER_5MIN=1, limits of 1 symbol"
    everything = lines(outcome, everything=True)
    assert not [line for line in everything if "more" in line]
    assert [line for line in everything if " p14 " in line]


def test_an_outcome_is_json() -> None:
    outcome = what_if(burst(), GOV_MAX_EXEC_PER_5MIN="5", limits={})
    read = msgspec.json.decode(msgspec.json.encode(outcome))
    assert read["differences"][0]["recorded"] == {"verdict": "BLOCK", "reason": "burst_limit_exceeded"}
    assert read["differences"][0]["assumed"]["position_amt"] == "0.02"
    assert read["newly_allowed"] == 1
    assert msgspec.json.decode(msgspec.json.encode(outcome), type=Outcome) == outcome


# -- series --------------------------------------------------------------------------------------------------------


def test_a_series_begins_each_utc_day_at_zero() -> None:
    past = Past(now=MIDNIGHT + 23 * HOUR).plans("p1", action="PARTIAL_25")
    past.plans("p2", every=2 * HOUR, action="PARTIAL_25").plans("p3", every=47 * HOUR, market=market("0"))
    panel = what_if(past).series.panels[0]
    day = (MIDNIGHT + DAY) / 1e6
    first, zero, second, end = panel.recorded[-4:]
    assert first[0] < day == zero[0] < second[0] < end[0] == day + 86400
    assert first[1] == second[1] == pytest.approx(475.16666667)
    assert zero[1] == end[1] == 0


def test_limits_in_a_series_change_when_settings_do() -> None:
    past = Past(GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD="7000").plans("p1")
    past.after(MINUTE).load(credentials="true", GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD="7000")
    at = past.after(MINUTE).now
    past.load(credentials="true")
    panel = what_if(past, GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD="100").series.panels[0]
    assert list(panel.recorded_limit) == [(NOON / 1e6, 7000), (at / 1e6, None)]
    assert {limit for _, limit in panel.computed_limit} == {100}


def test_a_series_is_bounded_keeps_its_extremes_and_tells_no_part_of_the_past_worse() -> None:
    thinned: Thinned[tuple[int, float]] = Thinned(lambda point: point[1])
    for i, span in zip(range(20_000), itertools.cycle([SECOND, 61 * SECOND, HOUR]), strict=False):
        thinned.add((i * HOUR + span, float(1e6 if i == 777 else i % 24)))
    points = thinned.points
    assert len(points) <= 3 * STRETCHES
    assert max(points, key=lambda point: point[1])[1] == 1e6
    assert points[-1][1] == 19_999 % 24
    assert points == sorted(points, key=lambda point: point[0])
    half = sum(point[0] < 10_000 * HOUR for point in points)
    assert 0.4 < half / len(points) < 0.6


def test_many_symbols_have_a_bounded_number_of_panels() -> None:
    past = Past(GOV_MAX_EXEC_PER_HOUR="off").plans(
        *(f"p{i}" for i in range(5)), symbol="AUSDT", every=10 * MINUTE, market=market("0.01", "1000"),
    )  # fmt: skip
    for i in range(120):
        past.plans(f"q{i}", symbol=f"S{i}USDT", market=market("0.01", str(1000 + i)))
    outcome = what_if(past)
    assert len(outcome.symbols) == 121
    assert [panel.symbol for panel in outcome.series.panels[:2]] == [None, "AUSDT"]
    assert len(outcome.series.panels) == 5
    assert totals.on(past.state.days, past.now // DAY).notional == Decimal(
        str(outcome.series.panels[0].recorded[-1][1])
    )
