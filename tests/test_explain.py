"""One plan's life as a person would tell it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Self

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.codec import decode, dumps, encode
from events.types import (
    Entry,
    Event,
    Head,
    HistoryRestored,
    PlanLost,
    Recorded,
    SettingsLoaded,
    Throttled,
)
from governor import decider
from governor.explain import IDS_KEPT, Explainer, explain
from governor.plans import parse_plan
from governor.policy import Limits, Policy
from governor.telling import lines, span
from projections.state import State, evolve
from tests.spec import DAY, HOUR, MIDNIGHT, MINUTE, NOON, SECOND, Spec, check, decision, market, plan_fields, reason

TTL = 60 * SECOND


class Told(Spec):
    """A gate with a past that was written down."""

    def __init__(self, policy: Policy | None = None, **account: Any) -> None:
        self.recorded: list[Recorded] = []
        super().__init__(policy or Policy(credentials=True, **account))

    def given(self, *events: Event) -> Self:
        for event in events:
            self.recorded.append(Recorded(self.state.seq + 1, self.now, event, ""))
            evolve(self.state, self.recorded[-1])
        return self

    def told(self, plan_id: str = "p1") -> dict[str, Any]:
        return explain(plan_id, self.recorded)

    def text(self, plan_id: str = "p1") -> list[str]:
        return lines(self.told(plan_id))

    def entries(self) -> list[Entry]:
        return [encode(it.event, after=Head(it.seq - 1, "0" * 64), at=it.at) for it in self.recorded]


def limited(**limits: Any) -> Told:
    return Told(limits=Limits(**limits))


def checked(told: dict[str, Any], gate: str) -> dict[str, Any]:
    (found,) = (each for each in told["decision"]["checks"] if each["gate"] == gate)
    return dict(found)


def us(unix: float) -> int:
    return round(unix * 1e6)


# -- when it would have passed -------------------------------------------------------------------------------------


@dataclass
class Timed:
    """A gate that time opens."""

    what: str
    gate: str
    spec: Callable[[], Told]
    opens: int
    plan: dict[str, Any] = field(default_factory=dict)


def spread(spec: Told, *gaps: int, **changed: Any) -> Told:
    for index, gap in enumerate(gaps):
        spec.granted(f"before{index}", **changed).after(gap)
    return spec


def throttled(until: int, *, limit: int | None = 1) -> Told:
    spec = Told(throttle_per_5min=limit).granted("before").after(SECOND)
    return spec.given(Throttled(symbol=None, reason="repeated_errors", until_us=until))


TIMED = [
    Timed("the oldest of the hour", "exec_1h", lambda: spread(limited(per_hour=2, per_5min=None), 7, MINUTE),
          NOON + HOUR),
    Timed("the newest, once the limit was lowered", "exec_1h",
          lambda: lowered(spread(limited(per_5min=None), MINUTE, 1, HOUR // 2)), NOON + MINUTE + 1 + HOUR),
    Timed("five minutes", "exec_5min", lambda: spread(limited(), 7, MINUTE), NOON + 5 * MINUTE),
    Timed("stops of their own", "exec_5min", lambda: spread(limited(), 7, MINUTE, action="UPDATE_SL").granted("other"),
          NOON + 5 * MINUTE, {"action": "UPDATE_SL"}),
    Timed("the clock stepped back", "exec_1h", lambda: spread(limited(per_hour=1), -HOUR), NOON + HOUR),
    Timed("the throttle's end", "throttle", lambda: throttled(NOON + 2 * MINUTE), NOON + 2 * MINUTE),
    Timed("room in the throttled window", "throttle", lambda: throttled(NOON + HOUR), NOON + 5 * MINUTE),
    Timed("a throttle that allows nothing", "throttle", lambda: throttled(NOON + HOUR, limit=0), NOON + HOUR),
    Timed("the day's notional", "daily_notional", lambda: limited(notional_per_day=Decimal(1500)).granted("before"),
          MIDNIGHT + DAY),
    Timed("the day's notional, to the last digit", "daily_notional",
          lambda: limited(notional_per_day=Decimal("1425.5")).granted("before"), MIDNIGHT + DAY),
    Timed("the day after the last event's, the clock back before midnight", "daily_notional",
          lambda: limited(notional_per_day=Decimal(1500)).at(MIDNIGHT + DAY).granted("before").after(-HOUR),
          MIDNIGHT + 2 * DAY),
    Timed("the day's quantity", "daily_qty", lambda: limited(qty_per_day=Decimal("0.015")).granted("before"),
          MIDNIGHT + DAY, {"market": market(price=None)}),
    Timed("all symbols' notional", "total_daily_notional",
          lambda: Told(total_notional_per_day=Decimal(2000)).granted("before", symbol="ETHUSDT"), MIDNIGHT + DAY),
    Timed("a hold", "history", lambda: Told().given(HistoryRestored(events=3, hold_until_us=NOON + TTL)), NOON + TTL),
]  # fmt: skip


def lowered(spec: Told) -> Told:
    spec.policy = Policy(credentials=True, limits=Limits(per_hour=1, per_5min=None))
    return spec


def again(spec: Told, before: State, at: int, gate: str, **plan: Any) -> bool | None:
    """The same plan, decided at another time by the decider itself."""
    other = Spec(spec.policy, now=at)
    other.state = before.fork()
    return check(other.plan("again", **plan), gate).ok


@pytest.mark.parametrize("timed", TIMED, ids=lambda timed: timed.what)
def test_a_check_passes_at_its_next_allowed_time_and_not_a_microsecond_before(timed: Timed) -> None:
    spec = timed.spec()
    before = spec.state.fork()
    assert check(spec.plan(**timed.plan), timed.gate).ok is False
    told = spec.told()
    found = checked(told, timed.gate)
    assert us(found["next_allowed"]) == timed.opens
    assert us(told["next_allowed"]) == timed.opens
    assert again(spec, before, timed.opens, timed.gate, **timed.plan) is True
    assert again(spec, before, timed.opens - 1, timed.gate, **timed.plan) is False
    assert f"it would have passed from {utc_of(timed.opens)} on" in spec.text()[0]


def utc_of(at: int) -> str:
    hours, rest = divmod(at - MIDNIGHT, HOUR)
    minutes, rest = divmod(rest, MINUTE)
    # Rounded up to the millisecond, since it has to hold from there on.
    return f"2026-01-{24 + hours // 24} {hours % 24:02d}:{minutes:02d}:{-(-rest // 1000) / 1000:06.3f}Z"


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 20 * MINUTE), max_size=8),
    per_hour=st.one_of(st.none(), st.integers(1, 4)),
    per_5min=st.one_of(st.none(), st.integers(1, 3)),
    throttle=st.one_of(st.none(), st.integers(0, 2)),
)
def test_a_blocked_plan_passes_from_its_next_allowed_time_on(
    gaps: list[int], per_hour: int | None, per_5min: int | None, throttle: int | None
) -> None:
    limits = Limits(per_hour=per_hour, per_5min=per_5min, notional_per_day=None)
    spec = Told(Policy(credentials=True, limits=limits, auto_disarm=False, throttle_per_5min=throttle))
    for index, gap in enumerate(gaps):
        spec.plan(f"before{index}")
        spec.after(gap)
    before = spec.state.fork()
    blocked = decision(spec.plan("p1"))
    told = spec.told()
    if blocked.verdict == "EXECUTE":
        assert told["next_allowed"] is None
        return
    for each in blocked.checks:
        if each.ok is False:
            opens = us(checked(told, each.gate)["next_allowed"])
            assert again(spec, before, opens, each.gate) is True
            assert again(spec, before, opens - 1, each.gate) is False
    other = Spec(spec.policy, now=us(told["next_allowed"]))
    other.state = before.fork()
    assert reason(other.plan("again")) is None


def test_the_whole_plan_would_have_passed_when_the_last_of_its_checks_would() -> None:
    spec = spread(limited(per_hour=2), 7, MINUTE)
    spec.plan()
    told = spec.told()
    assert us(checked(told, "exec_5min")["next_allowed"]) == NOON + 5 * MINUTE
    assert us(told["next_allowed"]) == NOON + HOUR


def untimed(**gate: Any) -> Callable[[], Told]:
    def build() -> Told:
        spec = Told()
        for name, value in gate.items():
            setattr(spec, name, value)
        return spec

    return build


def disarmed() -> Told:
    spec = Told()
    spec.disarm()
    return spec


KEYLESS = Policy(credentials=False)
UNTIMED: list[tuple[str, Callable[[], Told], dict[str, Any], str]] = [
    ("history", untimed(history="quarantined"), {}, "when a person accepts the history"),
    ("armed", disarmed, {}, "when a person re-arms"),
    ("armed", untimed(halt=True), {}, "when a person re-arms (the emergency brake was set)"),
    ("plan_age", Told, {"age": 61 * SECOND}, "with a newer plan"),
    ("action", Told, {"action": "OPEN_LONG"}, "never: an unknown action"),
    ("kill_score", Told, {"action": "UPDATE_SL", "kill_score": "0.8"}, "as a close or with a lower score"),
    ("exec_1h", lambda: limited(per_hour=0), {}, "never: a limit of zero"),
    ("exec_5min", lambda: limited(per_5min=0), {}, "never: a limit of zero"),
    ("position_read", Told, {"market": market(position=None)}, "when the exchange tells the position"),
    ("position_open", Told, {"market": market(position="0")}, "when there is a position"),
    ("quantity", lambda: Told(KEYLESS), {}, "with a close_qty, or with GOV_FALLBACK_QTY set"),
    ("daily_notional", Told, {"market": market(position="3")}, "never: more than a whole day's limit"),
    ("daily_notional", lambda: limited(notional_per_day=Decimal(0)), {}, "never: a limit of zero"),
]


@pytest.mark.parametrize(("gate", "spec", "plan", "note"), UNTIMED, ids=[f"{row[0]}: {row[3]}" for row in UNTIMED])
def test_a_check_that_no_time_opens_says_what_would(
    gate: str, spec: Callable[[], Told], plan: dict[str, Any], note: str
) -> None:
    made = spec()
    assert check(made.plan(**plan), gate).ok is False
    told = made.told()
    found = checked(told, gate)
    assert (found["next_allowed"], found["note"], told["next_allowed"]) == (None, note, None)
    never, _, why = note.partition("never: ")[::1]
    expected = f"it would have passed {note}" if never else f"it would never have passed: {why}"
    assert expected in told["answer"]


def test_a_plan_that_waits_for_a_person_and_for_time_says_both() -> None:
    spec = spread(limited(per_hour=1), MINUTE)
    spec.disarm()
    spec.plan()
    assert "would have passed when a person re-arms and from 2026-01-24 13:00:00.000Z on" in spec.text()[0]


def test_what_was_not_looked_at_is_not_promised() -> None:
    spec = spread(limited(per_hour=1), MINUTE)
    spec.plan()
    assert spec.text()[0].endswith("on, if what the exchange says had allowed it")
    assert checked(spec.told(), "quantity")["note"] == "the exchange was not asked"
    spec.plan("stop", action="UPDATE_SL", age=61 * SECOND)
    assert spec.text("stop")[0].endswith("it would have passed with a newer plan")
    assert checked(spec.told("stop"), "quantity")["note"] == "does not concern UPDATE_SL"


def test_a_check_says_what_was_left_and_what_was_asked_for() -> None:
    spec = limited(notional_per_day=Decimal(2000)).granted("before")
    spec.plan()
    found = checked(spec.told(), "daily_notional")
    assert (found["used"], found["limit"], found["left"], found["asks"]) == (
        Decimal("1425.5"), 2000, Decimal("574.5"), Decimal("1425.5"),
    )  # fmt: skip
    assert checked(spec.told(), "exec_1h")["left"] == 2
    (row,) = (line for line in spec.text() if "daily_notional" in line and "total" not in line)
    assert row.split()[:7] == ["FAIL", "daily_notional", "(USD)", "1425.5", "2000", "574.5", "1425.5"]


def test_what_is_left_is_never_below_zero() -> None:
    spec = lowered(spread(limited(per_5min=None), MINUTE, MINUTE))
    spec.plan()
    assert (checked(spec.told(), "exec_1h")["used"], checked(spec.told(), "exec_1h")["left"]) == (2, 0)


def test_where_earlier_events_are_missing_the_next_time_is_unknown_and_the_rest_is_told() -> None:
    spec = spread(limited(per_hour=1), MINUTE)
    spec.plan()
    told = explain("p1", spec.recorded[2:])
    found = checked(told, "exec_1h")
    assert (found["next_allowed"], found["note"]) == (None, "unknown: earlier events are missing")
    assert (told["decision"]["reason"], found["used"], found["limit"]) == ("hourly_limit_exceeded", 1, 1)


# -- the first line, and what a decision led to --------------------------------------------------------------------


def test_the_first_line_is_the_answer() -> None:
    spec = Told().granted("p1")
    assert spec.text()[0] == "plan p1  BTCUSDT PARTIAL_75: PERMITTED, its permit is outstanding"
    assert spec.told()["answer"] == spec.text()[0]


def test_a_history_that_ends_between_a_plan_and_its_decision_says_so() -> None:
    spec = Told().granted("p1")
    assert explain("p1", spec.recorded[:1])["answer"] == "plan p1: received, but no decision is recorded"


def test_a_block_that_disarmed_says_so_in_the_first_line() -> None:
    spec = spread(Told(), 1, MINUTE)
    spec.plan()
    assert "IT DISARMED (event 7)" in spec.text()[0]
    assert [each["event"] for each in spec.told()["followed"]] == ["DISARM_STARTED"]


def test_a_block_that_throttled_says_until_when() -> None:
    spec = spread(limited(per_hour=1), MINUTE)
    spec.plan()
    assert any("BTCUSDT throttled until 2026-01-24 12:06:00.000Z" in line for line in spec.text())


def test_what_follows_from_somebody_elses_plan_is_not_told() -> None:
    spec = Told(limits=Limits(per_hour=1)).granted("p1").after(SECOND)
    spec.plan("other")
    spec.disarm()
    assert spec.told()["followed"] == []


def test_a_throttle_that_followed_an_error_of_the_plan_is_told_also_where_one_had_just_ended() -> None:
    spec = Told(disarm_on_errors=2).given(Throttled(symbol=None, reason="repeated_errors", until_us=NOON + MINUTE))
    spec.granted("p1").after(2 * MINUTE)
    events = spec.result(steps_results='[{"step": "close", "status": "error"}]')
    assert [event.NAME for event in events][-3:] == ["ERROR_RECORDED", "RECOVERED", "THROTTLED"]
    assert [each["event"] for each in spec.told()["followed"]] == ["THROTTLED"]


def test_what_the_exchange_said_is_told() -> None:
    spec = Told()
    spec.plan(market=market(LONG="0.02", SHORT="-0.03", price=None))
    told = spec.told()
    assert told["market"]["legs"] == {"LONG": Decimal("0.02"), "SHORT": Decimal("-0.03")}
    (line,) = (line for line in spec.text() if line.startswith("  exchange"))
    assert line == "  exchange   position 0.05 (LONG 0.02, SHORT -0.03), mark price not read: timeout"


def test_an_exchange_that_did_not_answer_is_not_told_as_flat() -> None:
    spec = Told()
    spec.plan(market=market(position=None))
    (line,) = (line for line in spec.text() if line.startswith("  exchange"))
    assert line == "  exchange   position not read: timeout, mark price 95033.33333333"


def test_an_inner_failure_is_told() -> None:
    spec = Told()
    plan = parse_plan(plan_fields(), entry_id=spec.entry(), now=spec.now, needs_close_qty=False)
    spec.fold(
        decider.fail(spec.state, plan, spec.policy, spec.situation, fields=plan_fields(), error="boom", settings="s")
        .events
    )  # fmt: skip
    assert spec.text()[0].endswith("BLOCKED, evaluation_error; something went wrong inside: boom")
    assert [error["kind"] for error in spec.told()["errors"]] == ["evaluation_error"]


# -- how a permit ends ---------------------------------------------------------------------------------------------


def ended(spec: Told) -> tuple[str, str]:
    permit = spec.told()["permit"]
    return permit["status"], permit["told"]


def test_an_outstanding_permit() -> None:
    spec = Told().granted("p1")
    permit = spec.told()["permit"]
    assert (permit["status"], us(permit["granted_at"]), us(permit["expires_at"])) == ("outstanding", NOON, NOON + TTL)
    assert (permit["epoch"], permit["seq"], permit["at"]) == (1, 2, None)


def test_a_permit_that_was_gone_before_its_time_was_taken_by_the_client() -> None:
    spec = Told().granted("p1").after(TTL - SECOND // 2)
    spec.take_back(gone=True)
    status, told = ended(spec)
    assert status == "consumed"
    assert told == "consumed: found gone at 2026-01-24 12:00:59.500Z, 500 ms before its time: the client took it"


def test_a_permit_that_a_result_consumed() -> None:
    spec = Told().granted("p1").after(SECOND)
    spec.result()
    assert ended(spec) == ("consumed", "consumed: a result told at 2026-01-24 12:00:01.000Z that it was executed")


def test_a_permit_that_nobody_watched_is_assumed_to_be_consumed() -> None:
    spec = Told().granted("p1").after(HOUR)
    spec.take_back(gone=True)
    status, told = ended(spec)
    assert (status, spec.told()["permit"]["source"]) == ("consumed", "assumed")
    assert told.startswith("taken for consumed: found gone at 2026-01-24 13:00:00.000Z, nobody was watching")


def test_a_permit_that_was_taken_back_unused() -> None:
    spec = Told().granted("p1").after(TTL)
    spec.take_back()
    status, told = ended(spec)
    assert status == "expired"
    assert told == "taken back unused at 2026-01-24 12:01:00.000Z, its place in windows and totals released"


def test_a_permit_executed_after_it_was_taken_back_is_counted_again() -> None:
    spec = Told().granted("p1").after(TTL)
    spec.take_back()
    spec.after(SECOND).result()
    permit = spec.told()["permit"]
    assert (permit["status"], us(permit["counted_again_at"])) == ("expired", NOON + TTL + SECOND)
    assert "EXECUTED ALL THE SAME, told at 2026-01-24 12:01:01.000Z: counted again" in permit["told"]
    assert "executed an unknown quantity ALL THE SAME" in spec.text()[0]
    assert [error["kind"] for error in spec.told()["errors"]] == ["expired_permit_executed"]


def test_a_permit_that_a_disarm_revoked_names_the_disarm() -> None:
    spec = Told().granted("other", "p1").after(SECOND)
    spec.disarm("bad fills")
    permit = spec.told()["permit"]
    assert permit["disarm"] == {"seq": 5, "reason": "bad fills", "operator": "anna"}
    assert (
        permit["told"] == "revoked at 2026-01-24 12:00:01.000Z by the disarm at event 5 (bad fills); it stays counted"
    )
    assert spec.told()["followed"] == []


def test_a_permit_that_a_disarm_did_not_find_was_consumed() -> None:
    spec = Told().granted("p1").after(SECOND)
    spec.disarm()
    spec.fold(decider.correct_revoked(spec.state, ["p1"]))
    status, told = ended(spec)
    assert status == "consumed"
    assert told.startswith(
        "consumed: the client had taken it before the disarm at event 3 (drill), which was to delete"
    )


def test_an_execution_with_a_revoked_permit_is_told_as_an_accusation() -> None:
    spec = Told().granted("p1").after(SECOND)
    spec.disarm()
    spec.result()
    assert spec.text()[0].endswith("executed an unknown quantity ALL THE SAME; UNPERMITTED EXECUTION")
    assert [each["permit"] for each in spec.told()["unpermitted"]] == ["revoked"]


# -- results -------------------------------------------------------------------------------------------------------


def test_results_are_told_with_their_quantities_and_errors() -> None:
    spec = Told().granted("p1").after(SECOND)
    spec.result(steps_results='[{"step": "close", "status": "error", "executed_qty": "0.5"}]', error="-2019 margin")
    told = spec.told()
    (result,) = told["results"]
    assert (result["executed"], result["executed_qty"], result["failed"]) == (True, Decimal("0.5"), True)
    assert {error["kind"] for error in told["errors"]} == {"excess_quantity", "execution_error"}
    (line,) = (line for line in spec.text() if line.startswith("  result"))
    assert (
        "executed 0.5, permitted 0.015 (permit outstanding), error: -2019 margin, 1.0 s after it was received" in line
    )


def test_an_execution_around_the_gate_is_told_for_a_plan_that_never_came() -> None:
    spec = Told().given(SettingsLoaded(digest="s", settings={})).after(SECOND)
    spec.result("ghost")
    told = spec.told("ghost")
    assert (told["known"], told["plan"], told["decision"], told["permit"]) == (True, None, None, None)
    assert told["answer"] == "plan ghost: never received, but a result tells of it; UNPERMITTED EXECUTION"
    assert [each["event"] for each in told["followed"]] == ["DISARM_STARTED"]


# -- the same plan_id again ----------------------------------------------------------------------------------------


def test_duplicates_and_earlier_skips_are_told_beside_the_decision() -> None:
    spec = Told()
    spec.plan(decision="SKIP")
    spec.after(SECOND).granted("p1").after(SECOND)
    spec.plan()
    told = spec.told()
    assert (told["decision"]["verdict"], told["plan"]["decision"]) == ("EXECUTE", "EXECUTE")
    assert us(told["plan"]["received_at"]) == NOON + SECOND
    assert [(skip["reason"], skip["asked_for"]) for skip in told["skipped"]] == [
        ("not_execute", "SKIP"), ("duplicate_plan", "EXECUTE"),
    ]  # fmt: skip
    assert sum(line.startswith("  also seen") for line in spec.text()) == 2


def test_a_plan_that_never_was_an_execute_is_told_as_skipped() -> None:
    spec = Told()
    spec.plan(decision="SKIP")
    spec.plan(decision="BLOCKED")
    assert spec.text()[0] == "plan p1  BTCUSDT PARTIAL_75: SKIPPED, not_execute (its decision is BLOCKED)"
    assert [skip["asked_for"] for skip in spec.told()["skipped"]] == ["SKIP"]


def test_a_plan_id_decided_again_after_it_was_forgotten_keeps_the_two_apart() -> None:
    spec = Told().granted("p1").after(TTL)
    spec.take_back()
    spec.after(26 * HOUR).granted("p1").after(SECOND)
    spec.take_back(gone=True)
    told = spec.told()
    assert (told["decision"]["seq"], told["permit"]["status"]) == (2, "expired")
    (later,) = told["decided_again"]
    assert (later["verdict"], later["permit"]["status"]) == ("EXECUTE", "consumed")
    assert any(line.startswith("  DECIDED AGAIN") for line in spec.text())


# -- rejected and unknown ------------------------------------------------------------------------------------------


def test_a_rejected_plan_is_known_and_says_what_was_wrong() -> None:
    spec = Told()
    spec.plan(kill_score="NaN")
    told = spec.told()
    assert (told["known"], told["plan"], told["unseen"]) == (True, None, None)
    assert told["answer"] == "plan p1: REJECTED, kill_score is 'NaN', expected a finite number"
    (entry,) = told["rejected"]
    assert entry["fields"]["kill_score"] == "NaN"
    assert any("kill_score=NaN" in line for line in spec.text())


def test_a_rejected_plan_is_found_by_an_id_that_cannot_be_used_as_one() -> None:
    spec = Told()
    spec.plan("p 1")
    assert "REJECTED, plan_id is 'p 1'" in spec.told("p 1")["answer"]


def test_a_rejected_entry_beside_a_decision_is_told_below_it() -> None:
    spec = Told()
    spec.plan(kill_score=None)
    spec.after(SECOND).granted("p1")
    assert "PERMITTED" in spec.text()[0]
    assert any("kill_score is missing" in line for line in spec.text())


def test_a_plan_nobody_ever_saw_says_what_that_can_mean() -> None:
    spec = Told().granted("plan-0041", "plan-0042").after(SECOND)
    spec.given(PlanLost(count=3, entry_ids=("1-1",)), PlanLost(count=2))
    told = spec.told("plan-0043")
    assert told["known"] is False
    assert told["unseen"]["lost"] == 5
    assert set(told["unseen"]["nearest"]) == {"plan-0041", "plan-0042"}
    assert us(told["unseen"]["first_at"]) == NOON
    text = spec.text("plan-0043")
    assert text[0] == "plan plan-0043: nobody ever saw it"
    for part in (
        "never written",
        "another plan_id: nearest are plan-004",
        "5 plans were lost",
        "before the first event",
    ):
        assert any(part in line for line in text), part


def test_no_id_is_suggested_that_is_not_alike() -> None:
    spec = Told().granted("btc-close-1")
    assert spec.told("zzzz")["unseen"]["nearest"] == []
    assert any(line.endswith("no plan is known to be lost so;") for line in spec.text("zzzz"))


def test_an_id_that_was_cut_off_leads_to_the_whole_one() -> None:
    whole = "0b5c1d1e-9a53-4c9e-8a0e-3a1f0c2d7e55"
    spec = Told().granted(whole)
    assert spec.told(whole[:12])["unseen"]["nearest"] == [whole]
    assert spec.told(whole[:3])["unseen"]["nearest"] == []


def test_the_id_of_a_stream_entry_leads_to_its_plan() -> None:
    spec = Told().granted("p1")
    entry_id = spec.told()["plan"]["entry_id"]
    assert spec.told(entry_id)["unseen"]["entry_of"] == "p1"
    assert any("that of plan p1" in line for line in spec.text(entry_id))


def test_without_any_event_that_is_said() -> None:
    assert lines(explain("p1", [])) == [
        "plan p1: nobody ever saw it",
        "  There are no events at all: no governor ever ran on this stream.",
    ]


def test_only_the_latest_ids_are_kept() -> None:
    explainer = Explainer("nobody")
    lost = [Recorded(seq, NOON, event, "") for seq, event in enumerate(received(IDS_KEPT + 50), 1)]
    for recorded in lost:
        explainer.feed(recorded)
    assert len(explainer._unseen._ids) == IDS_KEPT
    assert f"id{IDS_KEPT + 49}" in explainer._unseen._ids


def received(count: int) -> Iterable[Event]:
    one = Told().granted("p1").recorded[0].event
    return [msgspec.structs.replace(one, plan_id=f"id{index}", entry_id=f"1-{index}") for index in range(count)]


# -- streaming, and what leaves it ---------------------------------------------------------------------------------


def lived() -> Told:
    spec = spread(limited(per_hour=4, per_5min=None, notional_per_day=None), MINUTE, MINUTE)
    spec.granted("p1", "other").after(SECOND)
    spec.plan("blocked")
    spec.after(SECOND).disarm("bad fills")
    spec.plan("later")
    spec.after(SECOND).result("p1")
    return spec


@pytest.mark.parametrize("plan_id", ["p1", "other", "blocked", "later", "before0", "nobody"])
def test_feeding_only_what_is_wanted_tells_the_same(plan_id: str) -> None:
    spec = lived()
    some, skipped = Explainer(plan_id), 0
    for entry in spec.entries():
        if some.wants(entry):
            some.feed(decode(entry))
        else:
            skipped += 1
    assert dumps(some.finish()) == dumps(spec.told(plan_id))
    assert (skipped > 0) == (plan_id != "nobody")


def test_a_disarm_that_was_not_fed_is_not_named() -> None:
    spec = Told()
    spec.disarm("an old one")
    spec.rearm(force=True)
    spec.granted("p1").after(SECOND).granted("other")
    spec.disarm("the new one")
    fed = [each for each in spec.recorded if each.event.NAME != "DISARM_STARTED" or each.seq < 3]
    assert explain("p1", fed)["permit"]["told"].startswith("revoked at 2026-01-24 12:00:01.000Z by a disarm;")


def test_what_is_told_is_plain_json_with_the_keys_readers_know() -> None:
    told = Told().granted("p1").told()
    assert told.keys() >= {"plan_id", "known", "plan", "decision", "market", "permit", "results", "events"}
    assert b'"mark_price":95033.33333333' in dumps(told)
    assert [event["event"] for event in told["events"]] == ["PLAN_RECEIVED", "DECISION"]


def test_numbers_have_no_exponent_and_text_does_not_steer_the_terminal() -> None:
    spec = Told()
    spec.plan(market=market("0.00000004"), reason_codes="a\x1b[2Jb\nc")
    spec.plan("p 1\x1b[2J", kill_score="x")
    text = spec.text() + spec.text("p 1\x1b[2J")
    assert any("position 0.00000004," in line for line in text)
    assert all(line.isprintable() for line in text)


def test_a_plan_of_a_clock_far_ahead_can_be_told() -> None:
    spec = Told()
    spec.plan(decision="SKIP", entry="999999999999999-1")
    assert any("s after 1970" in line for line in spec.text())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.12, "120 ms"), (0.9996, "1.0 s"), (12.34, "12.3 s"), (59.96, "1 min"), (250, "4 min 10 s"),
     (7500, "2 h 5 min"), (273_600, "3 d 4 h"), (-1.5, "-1.5 s")],
)  # fmt: skip
def test_a_duration_is_as_exact_as_a_reader_needs_it(seconds: float, text: str) -> None:
    assert span(seconds) == text
