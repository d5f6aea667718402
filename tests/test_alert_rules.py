"""Which alerts follow from events, conditions and time, and what they say. No clock, no thread, no network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.types import (
    ALL,
    ApplyModeDrifted,
    AutoDisarm,
    DisarmFailed,
    DisarmStarted,
    DriftEnded,
    ErrorRecorded,
    Event,
    ManualDisarm,
    PermitRevoked,
    Rearmed,
    Recorded,
    Recovered,
    Throttled,
    UnpermittedExecution,
)
from governor.alerts.conditions import CONDITIONS
from governor.alerts.messages import KINDS, TITLE_MOST, TOLD, Alert, Place, of_test, render
from governor.alerts.rules import ANSWERS, AT_ONCE, REFUSALS, AlertRules, Calm, ExchangeHealth, Readings
from governor.binance_errors import ERROR_KINDS
from governor.policy import Policy
from projections.state import Disarm, State, evolve, initial

ROOT = Path(__file__).resolve().parent.parent
PLACE = Place("quantum", "vps1", "", "/etc/quantum/apply-layer.env", "quantum-apply-layer.service", Policy())
S = 1_000_000
AT = 1_769_256_000 * S
"""2026-01-24 12:00:00 UTC."""
AFTER_US = 10 * S
WELL = Readings("", "", "", "")
BURST = DisarmStarted(reason="burst_limit_breach", context={"symbol": "BTCUSDT", "exec_5min": 3, "limit": 2}, epoch=2)
BY_HAND = DisarmStarted(reason="bad fills", context={}, epoch=2, manual=True, operator="alice")
DONE = AutoDisarm(
    reason="burst_limit_breach",
    context={},
    action_taken="APPLY_MODE=dry_run + restart",
    epoch=2,
    proof={"notes": ["the process could not be read"]},
)
DONE_BY_HAND = ManualDisarm(
    reason="bad fills", context={}, action_taken="APPLY_MODE=dry_run + restart", epoch=2, operator="alice"
)
FAILED = DisarmFailed(epoch=2, attempt=1, step="restart", error="systemctl restart ended with 1")
THROTTLED = Throttled(symbol="BTCUSDT", reason="hourly_limit_exceeded", until_us=AT + 300 * S)
AROUND = UnpermittedExecution(plan_id="p-77", symbol="BTCUSDT", entry_id="1-0", permit="none")
DRIFTED = ApplyModeDrifted(epoch=2, apply_mode="live")
REARMED = Rearmed(reason="limits checked", operator="alice", epoch=3)


class History:
    """Events folded one after the other, a second apart, as a daemon does."""

    def __init__(self, place: Place = PLACE) -> None:
        self.state: State = initial()
        self.rules = AlertRules(place, after_us=AFTER_US)
        self.now = AT

    def add(self, *events: Event, apart_us: int = S) -> list[Alert]:
        told = []
        for event in events:
            recorded = Recorded(self.state.seq + 1, self.now, event, "0" * 64)
            evolve(self.state, recorded)
            told += self.rules.event(recorded, self.state, self.now)
            self.now += apart_us
        return told

    def look(self, readings: Readings = WELL, *, after_us: int = 0) -> list[Alert]:
        self.now += after_us
        return self.rules.look(readings, self.now)


def titles(alerts: list[Alert], place: Place = PLACE) -> list[str]:
    return [render(alert, place)[0].removeprefix("[quantum@vps1] ") for alert in alerts]


# ---------------------------------------------------------------- events


@pytest.mark.parametrize(
    ("past", "event", "kind", "title"),
    [
        ((), BURST, "disarm_started", "DISARMED: burst_limit_breach (BTCUSDT 3 in 5 min, limit 2)"),
        ((), BY_HAND, "disarm_started", "DISARMED by alice: bad fills"),
        (
            (),
            DisarmStarted(reason="repeated_errors", context={"error_count": 5, "threshold": 5}, epoch=2),
            "disarm_started",
            "DISARMED: repeated_errors (5 errors, limit 5)",
        ),
        (
            (),
            DisarmStarted(reason="unpermitted_execution", context={"plan_id": "p", "symbol": "BTCUSDT"}, epoch=2),
            "disarm_started",
            "DISARMED: unpermitted_execution (BTCUSDT, plan p)",
        ),
        ((BURST,), DONE, "disarm_done", "DISARM DONE: APPLY_MODE=dry_run + restart, proven after 1.0 s"),
        ((BY_HAND,), DONE_BY_HAND, "disarm_done", "DISARM DONE: APPLY_MODE=dry_run + restart, proven after 1.0 s"),
        ((BURST,), FAILED, "disarm_failed", "DISARM FAILED: restart: systemctl restart ended with 1"),
        ((BURST, DONE), REARMED, "rearmed", "RE-ARMED by alice: limits checked"),
        ((), THROTTLED, "throttled", "THROTTLED: hourly_limit_exceeded (BTCUSDT)"),
        (
            (),
            Throttled(symbol=None, reason="repeated_errors", until_us=0),
            "throttled",
            "THROTTLED: repeated_errors (all symbols)",
        ),
        ((THROTTLED,), Recovered(), "recovered", "RECOVERED: ARMED again"),
        ((), AROUND, "unpermitted_execution", "UNPERMITTED EXECUTION: BTCUSDT, plan p-77 (permit none)"),
        ((BURST, DONE), DRIFTED, "apply_mode_drifted", "DRIFT: APPLY_MODE=live while DISARMED"),
        ((BURST, DONE, DRIFTED), DriftEnded(epoch=2), "drift_ended", "DRIFT ENDED: APPLY_MODE=dry_run again"),
    ],
    ids=lambda value: value if isinstance(value, str) and "_" in value and " " not in value else "",
)
def test_an_event_is_told_in_a_line(past: tuple[Event, ...], event: Event, kind: str, title: str) -> None:
    history = History()
    history.add(*past)
    (alert,) = history.add(event)
    assert (alert.kind, alert.seq, alert.at_us) == (kind, len(past) + 1, AT + len(past) * S)
    assert titles([alert]) == [title]


def test_the_body_says_what_happened_what_was_done_what_to_do_and_when() -> None:
    place = PLACE._replace(link="https://ops.example/governor")
    (alert,) = History(place).add(BURST)
    assert render(alert, place)[1] == (
        "The gate is DISARMED: nothing can trade, exits neither.\n"
        "Done: every outstanding permit is revoked. /etc/quantum/apply-layer.env is being set to dry run and "
        "quantum-apply-layer.service restarted; another alert says whether that is proven.\n"
        'Do: `governor status`, find the cause; then `governor rearm --reason "…"` is the only way back.\n'
        "2026-01-24 12:00:00.000Z, event 1, account quantum on vps1\n"
        "https://ops.example/governor\n"
    )
    assert "https" not in render(alert, PLACE)[1]


def test_a_proof_says_what_it_leaves_open_and_how_often_it_was_tried() -> None:
    history = History()
    history.add(BURST, FAILED)
    (done,) = history.add(DONE)
    assert done.happened == (
        "File and service were read back, after 1 attempts that failed. Not verified: the process could not be read."
    )


@pytest.mark.parametrize(
    ("past", "policy", "says"),
    [
        ((), Policy(), "the gate disarms"),
        ((), Policy(disarm_on_unpermitted=False), "the settings do not let it disarm"),
        ((), Policy(auto_disarm=False), "the settings do not let it disarm"),
        ((BURST, DONE), Policy(), "DISARMED already"),
    ],
)
def test_an_execution_nobody_permitted_says_whether_the_gate_disarms(
    past: tuple[Event, ...], policy: Policy, says: str
) -> None:
    history = History(PLACE._replace(policy=policy))
    history.add(*past)
    (alert,) = history.add(AROUND)
    assert says in alert.done


def test_the_events_that_are_told_are_those_a_reader_of_the_rules_expects() -> None:
    assert {cls.NAME for cls in ALL} >= TOLD
    assert History().add(
        ErrorRecorded(kind="malformed_plan", detail="x"), PermitRevoked(plan_id="p", symbol="BTCUSDT")
    ) == []  # fmt: skip


@pytest.mark.parametrize("reason", ["two\nlines", "\x1b[31mred", "x" * 2000])
def test_a_title_stays_one_short_line_whatever_a_person_typed(reason: str) -> None:
    (alert,) = History().add(DisarmStarted(reason=reason, context={}, epoch=2, manual=True, operator="al\nice"))
    title, body = render(alert, PLACE)
    assert title.isprintable()
    assert len(title) <= TITLE_MOST
    assert "\x1b" not in body


def test_every_kind_is_on_the_page_about_alerts_with_words_that_begin_its_title() -> None:
    page = (ROOT / "docs" / "alerting.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)`", page.partition("## What is told")[2], re.MULTILINE)
    assert [kind for kind, _ in rows] == list(KINDS)
    history = History()
    alerts = history.add(BURST, FAILED, DONE, DRIFTED, DriftEnded(epoch=2), REARMED, THROTTLED, Recovered(), AROUND)
    alerts += [of_test(AT), *every_condition(), *lost_and_back("quarantine"), unfinished_alert()]
    begun = {alert.kind: alert.headline.split(":")[0].split(" after")[0].split(" by")[0] for alert in alerts}
    assert begun.keys() == KINDS.keys()
    assert {kind: example for kind, example in rows if not example.startswith(begun[kind])} == {}


# ---------------------------------------------------------------- a storm, and the same again


def test_the_same_failure_is_told_at_once_and_then_every_five_minutes_with_their_number() -> None:
    history = History()
    history.add(BURST)
    told = []
    for attempt in range(1, 41):
        told += (
            history.add(DisarmFailed(epoch=2, attempt=attempt, step="restart", error="no"), apart_us=15 * S)
            + history.look()
        )
    assert [(alert.more, alert.happened.split()[1]) for alert in told] == [(0, "1"), (18, "20"), (19, "40")]
    assert titles(told)[1] == "DISARM FAILED: restart: no and 18 more"
    assert f"{told[1].more + 1} of these since 2026-01-24 12:00:16" in render(told[1], PLACE)[1]


def test_the_step_that_failed_is_named_once() -> None:
    failed = DisarmFailed(epoch=2, attempt=1, step="restart", error="restart: no answer")
    assert titles(History().add(BURST, failed))[1] == "DISARM FAILED: restart: no answer"


def test_a_failure_that_was_held_back_is_not_told_after_the_proof() -> None:
    history = History()
    history.add(BURST, FAILED, FAILED)
    assert [alert.kind for alert in history.add(DONE)] == ["disarm_done"]
    assert history.look(after_us=3600 * S) == []


def test_a_storm_of_one_kind_is_summed_up() -> None:
    history = History()
    storm = [UnpermittedExecution(plan_id=f"p-{n}", symbol="BTCUSDT", entry_id="1-0", permit="none") for n in range(40)]
    told = history.add(*storm, apart_us=1000)
    assert len(told) == AT_ONCE
    assert history.look(after_us=59 * S) == []
    (summed,) = history.look(after_us=S)
    assert titles([summed]) == ["UNPERMITTED EXECUTION: BTCUSDT, plan p-39 (permit none) and 36 more"]
    assert history.look(after_us=3600 * S) == []


def test_another_disarm_is_told_at_once_however_soon_after_the_last_one() -> None:
    history = History()
    again = DisarmStarted(reason="burst_limit_breach", context={}, epoch=4)
    assert [alert.kind for alert in history.add(BURST, DONE, REARMED, again)] == [
        "disarm_started", "disarm_done", "rearmed", "disarm_started",
    ]  # fmt: skip


def test_what_is_summed_up_after_something_newer_was_told_says_so() -> None:
    calm = Calm()
    for number in range(AT_ONCE + 1):
        calm.offer(alert_of("disarm_started", f"{number}", AT + number), AT + number)
    assert calm.offer(alert_of("rearmed", "", AT + 10), AT + 10)
    (late,) = calm.due(AT + 61 * S)
    assert late.headline == "EARLIER: x"
    for number in range(AT_ONCE + 1):
        calm.offer(alert_of("throttled", f"{number}", AT + 100 * S), AT + 100 * S)
    (last,) = calm.due(AT + 161 * S)
    assert last.headline == "x"


@given(
    st.lists(
        st.tuples(
            st.integers(0, 120 * S),
            st.sampled_from(("throttled", "disarm_failed", "rearmed")),
            st.sampled_from("abcdef"),
        ),
        max_size=60,
    )
)
def test_nothing_is_told_twice_or_not_at_all(offers: list[tuple[int, str, str]]) -> None:
    calm, now = Calm(), AT
    told: list[Alert] = []
    for apart_us, kind, subject in offers:
        now += apart_us
        told += calm.due(now)
        told += calm.offer(alert_of(kind, subject, now), now)
    told += calm.due(now + 3600 * S)
    assert sum(alert.more + 1 for alert in told) == len(offers)
    assert calm.due(now + 7200 * S) == []


@given(st.lists(st.tuples(st.integers(0, 20 * S), st.sampled_from("abcdef")), max_size=80))
def test_no_more_than_four_of_a_kind_are_told_within_its_quiet_time(offers: list[tuple[int, str]]) -> None:
    calm, now = Calm(), AT
    times: list[int] = []
    for apart_us, subject in offers:
        now += apart_us
        times += [now] * (len(calm.due(now)) + len(calm.offer(alert_of("throttled", subject, now), now)))
    quiet_us = KINDS["throttled"].quiet_us
    assert all(sum(at <= other < at + quiet_us for other in times) <= AT_ONCE + 1 for at in times)


def alert_of(kind: str, subject: str, at_us: int) -> Alert:
    return Alert(kind=kind, subject=subject, headline="x", happened="", done="", todo="", at_us=at_us)


# ---------------------------------------------------------------- conditions


def lost_and_back(name: str) -> list[Alert]:
    history = History()
    lost = Readings(**{**WELL._asdict(), name: "why it is so"})
    told = history.look(lost) + history.look(lost, after_us=AFTER_US)
    return told + history.look(WELL, after_us=2 * S) + history.look(WELL, after_us=AFTER_US)


def every_condition() -> list[Alert]:
    return [alert for name in CONDITIONS if name != "quarantine" for alert in lost_and_back(name)]


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_is_told_once_it_has_lasted_and_so_is_its_end(name: str) -> None:
    lost, back = lost_and_back(name)
    assert (lost.kind, back.kind) == (CONDITIONS[name].lost, CONDITIONS[name].back)
    assert "why it is so" in lost.happened
    assert back.headline.endswith("after 12.0 s")
    assert (lost.tone, back.tone) == ("failure", "success")


@pytest.mark.parametrize("name", ["redis", "journal"])
def test_a_blip_is_not_told_neither_lost_nor_back(name: str) -> None:
    history = History()
    lost = Readings(**{**WELL._asdict(), name: "away"})
    for _ in range(10):
        assert history.look(lost) == []
        assert history.look(lost, after_us=AFTER_US - 1) == []
        assert history.look(WELL, after_us=1) == []
    history.look(lost)
    assert len(history.look(lost, after_us=AFTER_US)) == 1
    for _ in range(10):
        assert history.look(WELL, after_us=1) == []
        assert history.look(WELL, after_us=AFTER_US - 1) == []
        assert history.look(lost, after_us=1) == []


def test_what_nobody_knows_is_neither_lost_nor_back() -> None:
    history = History()
    lost, unknown = WELL._replace(quarantine="two histories"), Readings()
    assert len(history.look(lost)) == 1
    assert history.look(unknown, after_us=3600 * S) == [], "a standby does not know whether it ended"
    assert history.look(lost, after_us=S) == []
    (ended,) = history.look(WELL, after_us=S)
    assert ended.kind == "quarantine_ended"


def unfinished_alert() -> Alert:
    (alert,) = History().look(WELL._replace(unfinished=disarm(2)))
    return alert


def disarm(epoch: int) -> Disarm:
    return Disarm(AT - 60 * S, "repeated_errors", {"error_count": 5, "threshold": 5}, epoch, False, None)


def test_a_disarm_that_was_left_unfinished_is_told_once() -> None:
    history = History()
    (alert,) = history.look(WELL._replace(unfinished=disarm(2)))
    assert titles([alert]) == ["DISARM UNFINISHED: DISARMED: repeated_errors (5 errors, limit 5)"]
    assert "began at 2026-01-24 11:59:00.000Z and has no proof yet" in alert.happened
    assert history.look(WELL._replace(unfinished=disarm(2)), after_us=3600 * S) == []
    assert len(history.look(WELL._replace(unfinished=disarm(4)), after_us=S)) == 1


def test_a_disarm_whose_beginning_was_told_is_not_told_again_while_it_is_unfinished() -> None:
    history = History()
    history.add(BURST)
    assert history.look(WELL._replace(unfinished=disarm(2)), after_us=3600 * S) == []


def test_what_follows_from_an_unfinished_disarm_is_not_told_before_it() -> None:
    history = History()
    evolve(history.state, Recorded(1, AT, BURST, "0" * 64))  # folded at the start, untold
    told = history.add(FAILED, DONE)
    assert [alert.kind for alert in told] == ["disarm_unfinished", "disarm_failed", "disarm_done"]


# ---------------------------------------------------------------- the exchange, from its calls


def health(*calls: tuple[float, str, str]) -> str:
    one = ExchangeHealth(after_us=AFTER_US)
    for at_s, endpoint, outcome in calls:
        one.called(endpoint, outcome, AT + round(at_s * S))
    return one.lost


@pytest.mark.parametrize(
    ("calls", "lost"),
    [
        ([], ""),
        ([(0, "ping", "timeout"), (0.1, "ping", "timeout")], ""),
        ([(0, "ping", "timeout"), (20, "ping", "connection")], "connection"),
        ([(0, "ping", "timeout"), (9, "mark", "ok"), (20, "ping", "timeout")], ""),
        ([(0, "ping", "timeout"), (20, "ping", "timeout"), (21, "ping", "ok")], ""),
        ([(0, "position", "auth")], "auth"),
        ([(0, "position", "auth"), (20, "ping", "ok")], "auth"),
        ([(0, "position", "auth"), (20, "ping", "timeout"), (60, "position_all", "ok")], ""),
        ([(0, "position", "banned")], "banned"),
        ([(0, "position", "banned"), (20, "ping", "ok")], ""),
        ([(n, "position", "bad_symbol") for n in range(60)], ""),
        ([(0, "ping", "timeout"), (5, "position", "bad_symbol"), (11, "ping", "timeout")], "timeout"),
    ],
)
def test_an_exchange_is_lost_once_calls_fail_for_so_long_with_none_answered(
    calls: list[tuple[float, str, str]], lost: str
) -> None:
    assert health(*calls) == lost


def test_the_kinds_of_trouble_are_those_the_exchange_has() -> None:
    assert {*REFUSALS, *ANSWERS} <= set(ERROR_KINDS)


def test_every_kind_has_a_tone_that_apprise_knows() -> None:
    tones: set[Any] = {kind.tone for kind in KINDS.values()}
    assert tones == {"failure", "warning", "success", "info"}
