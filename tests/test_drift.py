"""Somebody sets APPLY_MODE by hand while DISARMED; what a re-arm puts back, in which order, and when it does not."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import click
import pytest
import redis
from click.testing import CliRunner

from events.chain import GENESIS
from events.codec import encode_all
from events.store import UnavailableError
from events.types import (
    ApplyModeDrifted,
    ApplyModeRestored,
    AutoDisarm,
    DisarmStarted,
    DriftEnded,
    Entry,
    Event,
    ManualDisarm,
    Rearmed,
    Recorded,
)
from governor import by_hand, decider, printing, rearming, status
from governor.actuator import Actuator, ActuatorError, PendingNote, mode_in
from governor.cli import main
from governor.connection import connected, ledger_on
from governor.ledger import Ledger, Proposal
from governor.replay import replay
from governor.settings import Settings, load
from governor.whatif import WhatIf
from projections import checkpoint
from projections.state import State
from tests.conftest import NewServer
from tests.daemon import SYSTEMCTL, Daemon, daemon, events_of, wait_for
from tests.servers import RedisServer
from tests.spec import SECOND, TESTNET, Spec, names, reason

STARTED = DisarmStarted(reason="drill", context={"operator": "anna"}, epoch=2, manual=True, operator="anna")
DONE = ManualDisarm(reason="drill", context={}, action_taken="", epoch=2, operator="anna")
DRIFTED = ApplyModeDrifted(epoch=2, apply_mode="testnet")


def drift(*past: Event, mode: str | None) -> list[Event]:
    return decider.drift(Spec().given(*past).state, mode)


# -- what is a drift -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["testnet", "live", "", "DRY_RUN", "dry_run # for now"])
def test_any_other_mode_than_dry_run_after_the_proof_is_a_drift(mode: str) -> None:
    assert drift(STARTED, DONE, mode=mode) == [ApplyModeDrifted(epoch=2, apply_mode=mode)]


@pytest.mark.parametrize(
    "past",
    [(), (STARTED,), (STARTED, DONE, Rearmed(reason="r", operator="o", epoch=3))],
    ids=["armed", "not proven", "armed again"],
)
def test_without_a_disarm_that_is_done_nothing_drifts(past: tuple[Event, ...]) -> None:
    assert drift(*past, mode="live") == drift(*past, mode="dry_run") == []


def test_it_is_told_once_for_each_change_and_so_is_its_end() -> None:
    spec = Spec().given(STARTED, DONE)
    told = [names(spec.look(mode)) for mode in ("dry_run", "testnet", "testnet", "live", "dry_run", "dry_run", "live")]
    assert told == [[], ["APPLY_MODE_DRIFTED"], [], ["APPLY_MODE_DRIFTED"], ["DRIFT_ENDED"], [], ["APPLY_MODE_DRIFTED"]]


def test_a_file_that_gives_no_mode_neither_begins_nor_ends_a_drift() -> None:
    assert drift(STARTED, DONE, mode=None) == []
    assert drift(STARTED, DONE, DRIFTED, mode=None) == []


def test_a_long_mode_is_cut_and_told_once() -> None:
    spec = Spec().given(STARTED, DONE)
    assert spec.look("x" * 500) == [ApplyModeDrifted(epoch=2, apply_mode="x" * 64)]
    assert spec.look("x" * 400) == []


def test_another_disarm_and_a_rearm_end_it_without_a_word() -> None:
    disarmed, armed = Spec().given(STARTED, DONE, DRIFTED), Spec().given(STARTED, DONE, DRIFTED)
    assert {disarmed.state.mode.drift, armed.state.mode.drift} == {"testnet"}
    assert names(disarmed.disarm()) == ["DISARM_STARTED"], "the file is not in dry run any more"
    assert names(armed.rearm()) == ["REARMED"]
    assert {disarmed.state.mode.drift, armed.state.mode.drift} == {None}


def test_no_permit_is_granted_while_it_lasts() -> None:
    assert reason(Spec().given(STARTED, DONE, DRIFTED).plan("p1")) == "disarmed"


def test_a_checkpoint_keeps_it_and_the_copy_of_the_file() -> None:
    state = Spec().given(STARTED, ManualDisarm(**as_dict(DONE) | {"proof": {"backup": "/etc/b"}}), DRIFTED).state
    kept = checkpoint.read(checkpoint.write(state))
    assert kept.mode == state.mode
    assert (kept.mode.drift, kept.mode.disarm and kept.mode.disarm.backup) == ("testnet", "/etc/b")


def as_dict(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in event.__struct_fields__}


# -- audit, what-if ------------------------------------------------------------------------------------------------


def stored(*events: Event) -> list[Entry]:
    return encode_all(events, after=GENESIS, at=1_769_256_000_000_000)


def test_an_audit_decides_it_again() -> None:
    found, _ = replay(stored(STARTED, DONE, DRIFTED, DriftEnded(epoch=2)))
    assert found.clean, found


@pytest.mark.parametrize(
    "forged",
    [
        (DRIFTED,),
        (STARTED, DRIFTED),
        (STARTED, DONE, DRIFTED, DRIFTED),
        (STARTED, DONE, DriftEnded(epoch=2)),
        (STARTED, DONE, ApplyModeDrifted(epoch=7, apply_mode="live")),
    ],
    ids=["while armed", "before the proof", "twice", "an end without a beginning", "of another epoch"],
)
def test_an_audit_finds_one_that_could_not_be(forged: tuple[Event, ...]) -> None:
    found, _ = replay(stored(*forged))
    assert [difference.seq for difference in found.differences] == [len(forged)]


def test_in_another_world_the_file_drifts_only_if_it_disarmed_there_too() -> None:
    def other(disarms: str) -> State:
        it = WhatIf({"GOV_ENABLE_AUTO_DISARM": disarms}, policies={"s": TESTNET})
        it.feed(Recorded(seq, at, event, "") for seq, (at, event) in enumerate(past, start=1))
        it.finish()
        return it.computed

    spec = Spec()
    past: list[tuple[int, Event]] = []
    for _ in range(3):
        past += [(spec.now, event) for event in spec.plan(f"p{len(past)}")]
    assert spec.state.mode.state == "DISARMED"
    past += [(spec.now, event) for event in proof(spec)]
    past += [(spec.now, event) for mode in ("live", "dry_run", "testnet") for event in spec.after(SECOND).look(mode)]
    assert (other("true").mode.state, other("true").mode.drift) == ("DISARMED", "testnet")
    assert (other("false").mode.state, other("false").mode.drift) == ("THROTTLED", None)


def proof(spec: Spec) -> list[Event]:

    disarm = spec.state.mode.disarm
    assert disarm is not None
    done = AutoDisarm(reason=disarm.reason, context=disarm.context, action_taken="", epoch=disarm.epoch)
    spec.given(done)
    return [done]


# -- what people see -----------------------------------------------------------------------------------------------


def test_the_status_tells_it_in_red(capsys: pytest.CaptureFixture[str]) -> None:
    for past, seen in (((), None), ((ApplyModeDrifted(epoch=2, apply_mode="li\x1bve"),), "li\x1bve")):
        state = Spec().given(STARTED, DONE, *past).state
        told = status.describe(state, TESTNET, state.time)
        assert told["drift"] == seen
        printing.print_status(told | {"halted": None})
        out = capsys.readouterr().out
        assert ("DRIFT: the Apply Layer's file says APPLY_MODE=li\\u001bve, set by hand" in out) == (seen is not None)


def test_nothing_is_allowed_now_in_a_status_that_is_disarmed(capsys: pytest.CaptureFixture[str]) -> None:
    def row(spec: Spec) -> str:
        printing.print_status(status.describe(spec.state, TESTNET, spec.state.time + 7_200_000_000) | {"halted": None})
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("BTCUSDT"))

    permitted = Spec()
    permitted.plan("p1")
    assert row(permitted).endswith("now")
    assert row(permitted.given(STARTED)).endswith("once re-armed")


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (DRIFTED, "epoch=2 apply_mode=testnet"),
        (DriftEnded(epoch=2), "DRIFT_ENDED            epoch=2"),
        (
            ApplyModeRestored(epoch=3, reason="checked", operator="anna", apply_mode="testnet"),
            "reason=checked operator=anna epoch=3 apply_mode=testnet",
        ),
    ],
    ids=["drifted", "ended", "restored"],
)
def test_a_line_of_the_events_says_which_mode_and_who(event: Event, says: str) -> None:
    assert says in click.unstyle(printing.event_line(Recorded(7, 1_769_256_000_000_000, event, "")))


# -- the file and the service --------------------------------------------------------------------------------------


class Host:
    """A directory with the Apply Layer's file, and a stand-in systemctl."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = home / "apply-layer.env"
        self.config.write_text("# how it runs\nAPPLY_MODE=testnet\nOTHER=1\n")
        self.config.chmod(0o640)
        (home / "bin").mkdir()
        script = home / "bin" / "systemctl"
        script.write_text(SYSTEMCTL.format(log=home / "log", count=home / "count", fails=home / "fails"))
        script.chmod(0o755)
        self.actuator = Actuator(config_path=self.config, service="apply.service", clock=lambda: 1, timeout_s=5)

    @property
    def restarts(self) -> int:
        log = self.home / "log"
        return log.read_text().count("restart ") if log.exists() else 0


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return Host(tmp_path)


def test_putting_back_changes_one_line_keeps_a_copy_and_verifies_the_restart(host: Host) -> None:
    host.actuator.force_dry_run()
    inode, restarts = host.config.stat().st_ino, host.restarts
    proof = host.actuator.put_back("testnet")
    assert host.config.read_text() == "# how it runs\nAPPLY_MODE=testnet\nOTHER=1\n"
    assert oct(host.config.stat().st_mode & 0o777) == "0o640"
    assert host.config.stat().st_ino != inode, "written beside it and renamed"
    assert host.restarts == restarts + 1
    assert (proof.apply_mode, proof.active_state) == ("testnet", "active")
    assert proof.invocation_before != proof.invocation_after
    assert proof.backup is not None
    assert mode_in(Path(proof.backup)) == "dry_run"


def test_a_restart_that_fails_is_told_with_the_mode_that_is_in_the_file(host: Host) -> None:
    (host.home / "fails").write_text("1")
    with pytest.raises(ActuatorError, match=r"restart: .*the file says live") as failed:
        host.actuator.put_back("live")
    assert failed.value.step == "restart"


def test_a_mode_of_no_file_or_of_one_systemd_refuses_is_not_known(host: Host) -> None:
    assert mode_in(host.home / "none") is None
    host.config.write_bytes(b"APPLY_MODE=live\0\n")
    assert mode_in(host.config) is None


def test_what_cannot_be_put_back_is_seen_before_anything_is_done(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.actuator.check_put_back("testnet")
    with pytest.raises(ActuatorError, match="needs quoting"):
        host.actuator.check_put_back("live # was")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ActuatorError, match=r"cannot set APPLY_MODE=live in .*Permission denied\); try it as root"):
        host.actuator.check_put_back("live")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(host.home))
    with pytest.raises(ActuatorError, match="no systemctl on PATH"):
        host.actuator.check_put_back("live")
    host.config.unlink()
    with pytest.raises(ActuatorError, match="read: cannot set APPLY_MODE=live"):
        host.actuator.check_put_back("live")
    assert host.restarts == 0


# -- a re-arm, on a real server and in this process ----------------------------------------------------------------


@pytest.fixture
def settings(host: Host, flushed: RedisServer) -> Settings:
    return load(
        {
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(flushed.port),
            "APPLY_CONFIG_PATH": str(host.config),
            "APPLY_SERVICE": "apply.service",
            "GOV_JOURNAL_DIR": str(host.home / "journal"),
        }
    )


def disarm(settings: Settings, why: str = "drill") -> dict[str, Any]:
    return asyncio.run(by_hand.disarm(settings, reason=why, operator="anna"))


def rearm(settings: Settings, *, force: bool = False, **more: Any) -> dict[str, Any]:
    return asyncio.run(by_hand.rearm(settings, reason="checked", operator="bert", force=force, **more))


def test_it_is_put_back_after_the_rearm_and_recorded_with_who_and_why(
    settings: Settings, host: Host, client: redis.Redis
) -> None:
    assert disarm(settings)["code"] == 0
    told = rearm(settings, restore=True)
    assert (told["code"], told["state"], told["restored"], told["apply_mode"]) == (0, "ARMED", True, "testnet")
    assert told["message"] == (
        "ARMED, epoch 3. The Apply Layer's file says APPLY_MODE=testnet, its service was restarted. Both were verified."
    )
    assert host.restarts == 2
    armed, restored = events_of(client, "REARMED", "APPLY_MODE_RESTORED")
    assert armed["seq"] < restored["seq"]
    assert (restored["epoch"], restored["reason"], restored["operator"]) == (3, "checked", "bert")
    assert (restored["apply_mode"], restored["proof"]["apply_mode"]) == ("testnet", "testnet")
    assert restored["proof"]["invocation_before"] != restored["proof"]["invocation_after"]
    json.dumps(told)


@pytest.mark.parametrize(
    ("said", "code"), [({}, 0), ({"restore": False}, 0), ({"ask": lambda _: False}, 0)], ids=["nothing", "no", "asked"]
)
def test_without_a_word_nothing_is_put_back(
    settings: Settings, host: Host, client: redis.Redis, said: dict[str, Any], code: int
) -> None:
    disarm(settings)
    told = rearm(settings, **said)
    assert (told["code"], told["state"], told["restored"], told["apply_mode"]) == (code, "ARMED", False, "dry_run")
    assert told["message"].endswith(f"to trade again set APPLY_MODE in {host.config} and restart apply.service.")
    assert host.restarts == 1
    assert events_of(client, "APPLY_MODE_RESTORED") == []


def test_a_person_is_asked_what_exactly_will_be_done(settings: Settings, host: Host) -> None:
    asked: list[str] = []

    def yes(question: str) -> bool:
        assert host.actuator.apply_mode() == "dry_run", "asked before anything is done"
        asked.append(question)
        return True

    disarm(settings)
    assert rearm(settings, ask=yes)["restored"]
    assert asked == ["Set APPLY_MODE back to testnet and restart apply.service?"]
    assert rearm(settings, ask=yes)["message"] == "nothing to do: the state is ARMED"
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("by_then", "question"),
    [
        ("testnet", "{path} says APPLY_MODE=testnet already. Restart apply.service?"),
        ("live", "Set APPLY_MODE back to testnet (it says live now, set by hand) and restart apply.service?"),
    ],
)
def test_a_file_that_was_set_by_hand_is_told_in_the_question_and_in_the_answer(
    settings: Settings, host: Host, by_then: str, question: str
) -> None:
    disarm(settings)
    host.config.write_text(f"APPLY_MODE={by_then}\n")
    asked: list[str] = []

    def no(text: str) -> bool:
        asked.append(text)
        return False

    told = rearm(settings, ask=no)
    assert asked == [question.format(path=host.config)]
    assert told["message"] == (
        f"ARMED, epoch 3. The Apply Layer's file says APPLY_MODE={by_then} already, set by hand; restart apply.service "
        "if it does not run with it yet."
    )


def test_where_the_mode_before_is_not_known_it_has_to_be_said(
    settings: Settings, host: Host, client: redis.Redis
) -> None:
    host.config.write_text("APPLY_MODE=dry_run\n")
    disarm(settings)
    refused = rearm(settings, restore=True)
    assert refused["code"] == 1
    assert refused["message"].startswith("refused, nothing was done: which APPLY_MODE")
    assert "say it with --apply-mode" in refused["message"]
    assert events_of(client, "REARMED") == []
    assert rearm(settings, apply_mode="testnet")["restored"]
    assert host.config.read_text() == "APPLY_MODE=testnet\n"


def test_a_copy_that_is_gone_leaves_the_mode_unknown_and_nobody_is_asked(settings: Settings, host: Host) -> None:
    disarm(settings)
    for copy in host.home.glob("*.bak.*"):
        copy.unlink()

    def never(question: str) -> bool:
        raise AssertionError(question)

    told = rearm(settings, ask=never)
    assert (told["code"], told["restored"]) == (0, False)


def test_what_may_not_be_written_is_refused_before_the_gate_is_armed(
    settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    disarm(settings)
    monkeypatch.setattr("governor.actuator.os.access", lambda *_: False)
    told = rearm(settings, restore=True)
    assert (told["code"], told["state"]) == (1, "DISARMED")
    assert "refused, nothing was done" in told["message"]
    assert "try it as root" in told["message"]
    assert events_of(client, "REARMED") == []


def test_a_rearm_that_is_refused_puts_nothing_back(settings: Settings, host: Host, client: redis.Redis) -> None:
    disarm(settings)
    client.set("quantum:governor:halt", "too hot")
    told = rearm(settings, restore=True)
    assert (told["code"], told["state"], told["restored"]) == (1, "DISARMED", False)
    assert host.actuator.apply_mode() == "dry_run"


def test_a_restart_that_fails_leaves_it_armed_and_says_how_to_go_on(
    settings: Settings, host: Host, client: redis.Redis
) -> None:
    disarm(settings)
    (host.home / "fails").write_text("1")
    told = rearm(settings, restore=True)
    assert (told["code"], told["state"], told["restored"]) == (1, "ARMED", False)
    assert (
        "BUT THE APPLY LAYER WAS NOT PUT BACK: restart: systemctl restart apply.service ended with 1" in told["message"]
    )
    assert told["message"].endswith(
        "Its file says APPLY_MODE=testnet. To try again: governor rearm --reason ... --apply-mode testnet"
    )
    assert events_of(client, "APPLY_MODE_RESTORED") == []
    (host.home / "fails").write_text("0")
    again = rearm(settings, apply_mode="testnet")
    assert (again["code"], again["epoch"], again["restored"]) == (0, 3, True)
    assert len(events_of(client, "REARMED")) == len(events_of(client, "APPLY_MODE_RESTORED")) == 1


# -- and a disarm in between ---------------------------------------------------------------------------------------


def interrupted(monkeypatch: pytest.MonkeyPatch, what: Callable[[Ledger], Any], *, after: bool = False) -> None:
    """Something happens between REARMED and the look under the lock, or between the restart and the second look."""
    look, looks = rearming.in_between, []

    async def meanwhile(ledger: Ledger, notes: Sequence[PendingNote], epoch: int) -> str | None:
        looks.append(epoch)
        if len(looks) == 1 + after:
            done = what(ledger)
            if asyncio.iscoroutine(done):
                await done
        return await look(ledger, notes, epoch)

    monkeypatch.setattr(rearming, "in_between", meanwhile)


def commit_a_disarm(settings: Settings) -> Callable[[Ledger], Any]:

    async def somebody(_ledger: Ledger) -> None:
        async with connected(settings) as client:
            ledger = ledger_on(client, settings)
            await ledger.open()
            await ledger.propose(
                lambda state, _now: Proposal(
                    decider.disarm_by_hand(state, reason="again", operator="carl", apply_mode=None)
                )
            )

    return somebody


def test_a_disarm_between_the_rearm_and_the_file_wins(
    settings: Settings, host: Host, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    disarm(settings)
    interrupted(monkeypatch, commit_a_disarm(settings))
    told = rearm(settings, restore=True)
    assert (told["code"], told["state"], told["epoch"], told["restored"]) == (1, "DISARMED", 4, False)
    assert "NOT PUT BACK: a disarm came in between: epoch 4, again" in told["message"]
    assert "To try again" not in told["message"]
    assert host.actuator.apply_mode() == "dry_run"
    assert host.restarts == 1
    assert events_of(client, "APPLY_MODE_RESTORED") == []


def test_a_disarm_during_the_restart_is_told_and_sets_dry_run_again(
    settings: Settings, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    disarm(settings)
    interrupted(monkeypatch, commit_a_disarm(settings), after=True)
    told = rearm(settings, restore=True)
    assert (told["code"], told["state"], told["epoch"], told["restored"]) == (1, "DISARMED", 4, True)
    assert told["message"].endswith("BUT a disarm came in between: epoch 4, again. It sets dry run again.")
    assert disarm(settings)["done"], "whoever carries the pending one out"
    assert host.actuator.apply_mode() == "dry_run"


def test_a_disarm_and_another_rearm_in_between_leave_it_to_that_one(
    settings: Settings, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    disarm(settings)

    async def both(ledger: Ledger) -> None:
        await commit_a_disarm(settings)(ledger)
        monkeypatch.undo()
        monkeypatch.setenv("PATH", f"{host.home / 'bin'}:{os.environ['PATH']}")
        await by_hand.rearm(settings, reason="mine", operator="dora", force=True)

    interrupted(monkeypatch, both)
    told = rearm(settings, restore=True)
    assert (told["code"], told["state"], told["epoch"], told["restored"]) == (1, "ARMED", 5, False)
    assert "a disarm came in between, and somebody armed it again: epoch 5, mine" in told["message"]
    assert host.actuator.apply_mode() == "dry_run"


@pytest.mark.parametrize("how", ["brake", "note"])
def test_a_disarm_that_is_no_event_yet_wins_too(
    settings: Settings, host: Host, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def stop(_ledger: Ledger) -> None:
        if how == "brake":
            client.set("quantum:governor:halt", "too hot")
        else:
            PendingNote(host.config).write_pending(
                reason="by night", context={}, operator="carl", timestamp_us=1, proof=None
            )

    disarm(settings)
    interrupted(monkeypatch, stop)
    told = rearm(settings, restore=True)
    assert (told["code"], told["restored"], told["apply_mode"]) == (1, False, "dry_run")
    assert {"brake": "the emergency brake was set", "note": "a disarm came in between (by night)"}[how] in (
        told["message"]
    )


@pytest.mark.parametrize("how", ["brake", "note"])
def test_a_disarm_that_becomes_an_event_during_the_look_is_not_overlooked(
    settings: Settings, host: Host, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The daemon tells a note and removes it in the moment between reading the events and looking for notes."""
    note, catch_up = PendingNote(host.config), Ledger.catch_up

    async def then_told(self: Ledger) -> None:
        await catch_up(self)
        monkeypatch.setattr(Ledger, "catch_up", catch_up)
        await commit_a_disarm(settings)(self)
        client.delete("quantum:governor:halt")
        note.path.unlink(missing_ok=True)

    def stop(_ledger: Ledger) -> None:
        monkeypatch.setattr(Ledger, "catch_up", then_told)
        if how == "brake":
            client.set("quantum:governor:halt", "too hot")
        else:
            note.write_pending(reason="by night", context={}, operator="carl", timestamp_us=1, proof=None)

    disarm(settings)
    interrupted(monkeypatch, stop)
    told = rearm(settings, restore=True)
    assert (told["code"], told["restored"], told["apply_mode"]) == (1, False, "dry_run")


def test_a_note_that_was_told_long_ago_is_not_in_the_way(settings: Settings, host: Host) -> None:
    disarm(settings)
    note = PendingNote(host.config)
    note.write_pending(reason="old", context={}, operator="carl", timestamp_us=77, proof=None)

    async def look() -> tuple[str | None, str | None]:
        async with connected(settings) as one:
            ledger = ledger_on(one, settings)
            await ledger.open()
            untold = await rearming.in_between(ledger, [note], 2)
            ledger.state.noted = (77,)
            return untold, await rearming.in_between(ledger, [note], 2)

    assert asyncio.run(look()) == ("a disarm came in between (old)", None)


def test_without_a_view_of_the_events_nothing_is_written(
    settings: Settings, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_ledger: Ledger) -> None:
        raise UnavailableError("connection refused")

    disarm(settings)
    interrupted(monkeypatch, away)
    told = rearm(settings, restore=True)
    assert (told["code"], told["restored"], told["apply_mode"]) == (1, False, "dry_run")
    assert "whether a disarm came in between cannot be seen: connection refused" in told["message"]
    assert host.restarts == 1


def test_what_is_done_and_could_not_be_recorded_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_args: Any) -> None:
        raise UnavailableError("connection refused")

    disarm(settings)
    monkeypatch.setattr(rearming, "_record", away)
    told = rearm(settings, restore=True)
    assert (told["code"], told["state"], told["restored"], told["apply_mode"]) == (1, "ARMED", True, "testnet")
    assert told["message"].endswith("BUT whether that was recorded is not known: connection refused.")


def test_whoever_holds_the_lock_is_waited_for_and_not_for_ever(
    settings: Settings, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    disarm(settings)
    monkeypatch.setattr(rearming, "WAIT_S", 0.2)
    with host.actuator.locked() as taken:
        assert taken
        told = rearm(settings, restore=True)
    assert (told["code"], told["state"], told["apply_mode"]) == (1, "ARMED", "dry_run")
    assert "somebody else holds the lock beside the file" in told["message"]


def test_an_epoch_that_is_not_the_one_that_was_shown_is_not_armed(
    settings: Settings, host: Host, client: redis.Redis
) -> None:
    """While the person reads the question, somebody else arms and it disarms again: for a reason nobody looked at."""

    def slow(_question: str) -> bool:
        def meanwhile() -> None:
            rearm(settings)
            disarm(settings, "another reason")

        thread = Thread(target=meanwhile)
        thread.start()
        thread.join(20)
        return True

    disarm(settings)
    told = rearm(settings, ask=slow)
    assert (told["code"], told["state"]) == (1, "DISARMED")
    assert told["message"] == "refused: meanwhile it is epoch 4, DISARMED; look again"
    assert len(events_of(client, "REARMED")) == 1
    assert host.actuator.apply_mode() == "dry_run"


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dry_run", "", "live now", "a\nb"])
def test_a_mode_that_cannot_be_put_back_is_a_usage_error(mode: str) -> None:
    told = CliRunner().invoke(main, ["rearm", "--reason", "r", "--apply-mode", mode])
    assert told.exit_code == 2
    assert f"{mode!r}, expected another mode than dry_run" in told.output


def test_two_options_that_contradict_each_other_are_a_usage_error() -> None:
    told = CliRunner().invoke(main, ["rearm", "--reason", "r", "--apply-mode", "live", "--no-restore"])
    assert told.exit_code == 2
    assert "contradict" in told.output


def on_a_terminal(one: Daemon, *words: str, answer: str) -> tuple[int, str]:
    """A command whose input and diagnostics are a terminal; its code and what the terminal showed."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "governor", *words], env=one.environ, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, answer.encode())
        try:
            while more := os.read(ours, 4096):
                shown += more
        except OSError:  # the other side is closed
            pass
        return process.wait(20), shown.decode()
    finally:
        os.close(ours)


def test_the_daemon_notices_and_a_person_puts_it_back(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port) as one:

        def gauge() -> bool:
            return "quantum_govern_drift 1.0" in one.http("/metrics")

        disarmed = one.command("disarm", "--reason", "drill")
        assert disarmed.returncode == 0, disarmed.stdout
        assert not gauge()
        one.config.write_text("APPLY_MODE=live\n")
        (found,) = wait_for(lambda: events_of(client, "APPLY_MODE_DRIFTED"), within_s=2)
        assert (found["epoch"], found["apply_mode"]) == (2, "live")
        wait_for(gauge)
        (note,) = json.loads(one.http("/readyz"))["notes"]
        assert note == (
            f"drift: {one.config} says APPLY_MODE=live while DISARMED, set by hand; governor disarm undoes it"
        )
        wait_for(lambda: '"apply_mode_drifted"' in one.log)
        assert one.json("status")["drift"] == "live"
        one.config.write_text("APPLY_MODE=dry_run\n")
        wait_for(lambda: events_of(client, "DRIFT_ENDED"), within_s=2)
        wait_for(lambda: not gauge())
        one.config.write_text("# nothing\n")
        wait_for(lambda: f"{one.config} gives no APPLY_MODE that can be read" in one.http("/readyz"))
        one.config.write_text("APPLY_MODE=dry_run\n")
        code, shown = on_a_terminal(one, "rearm", "--reason", "looked at it", answer="y\n")
        assert code == 0, shown
        assert "Set APPLY_MODE back to testnet and restart quantum-apply-layer.service? [y/N]" in shown
        assert one.config.read_text() == "APPLY_MODE=testnet\n"
        (restored,) = events_of(client, "APPLY_MODE_RESTORED")
        assert (restored["reason"], restored["operator"]) == ("looked at it", "tester")
        assert one.command("replay").returncode == 0
    assert len(events_of(client, "APPLY_MODE_DRIFTED")) == 1


def test_a_disarm_during_the_restart_waits_and_has_the_last_word(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port) as one:
        assert one.command("disarm", "--reason", "drill").returncode == 0
        hold = tmp_path / "hold"
        os.mkfifo(hold)
        script = tmp_path / "bin" / "systemctl"
        script.write_text(script.read_text().replace("restart)", f"restart) [ ! -p {hold} ] || read -r _ < {hold};"))
        arming = subprocess.Popen(
            [sys.executable, "-m", "governor", "rearm", "--reason", "too soon", "--restore", "--json"],
            env=one.environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: one.systemctl_calls.count("restart quantum-apply-layer.service") == 2)
        client.set("quantum:governor:halt", "too hot")
        wait_for(lambda: len(events_of(client, "DISARM_STARTED")) == 2)
        assert "APPLY_MODE=testnet" in one.config.read_text()
        assert len(events_of(client, "MANUAL_DISARM")) == 1, "the second one waits for the lock"
        with hold.open("w") as pipe:
            hold.unlink()
            pipe.write("\n")
        told = json.loads(arming.communicate(timeout=20)[0])
        assert (arming.returncode, told["state"], told["restored"]) == (1, "DISARMED", True)
        wait_for(lambda: len(events_of(client, "MANUAL_DISARM")) == 2)
        assert "APPLY_MODE=dry_run" in one.config.read_text()
        assert one.systemctl_calls.count("restart quantum-apply-layer.service") == 3
        order = [event["event"] for event in events_of(client) if event["event"] != "SETTINGS_LOADED"]
        assert order[-4:] == ["REARMED", "DISARM_STARTED", "APPLY_MODE_RESTORED", "MANUAL_DISARM"]
        assert one.command("replay").returncode == 0
        assert events_of(client, "APPLY_MODE_DRIFTED") == [], "what we did ourselves is no drift"


def test_no_on_the_terminal_leaves_the_file_alone(new_server: NewServer, tmp_path: Path) -> None:
    server = new_server("valkey")
    one = Daemon(tmp_path, port=server.port, environ={})
    assert one.command("disarm", "--reason", "drill").returncode == 0
    code, shown = on_a_terminal(one, "rearm", "--reason", "later", answer="n\n")
    assert code == 0, shown
    assert "as the disarm left it" in shown
    assert "APPLY_MODE=dry_run" in one.config.read_text()
    with server.client(decode_responses=True) as client:
        assert events_of(client, "APPLY_MODE_RESTORED") == []


def test_a_standby_says_nothing_of_it_until_it_is_active(new_server: NewServer, tmp_path: Path) -> None:
    """One event, however many governors look at the file."""
    server = new_server("valkey")
    file = str(tmp_path / "a" / "etc" / "apply-layer.env")
    with (
        server.client(decode_responses=True) as client,
        daemon(tmp_path / "a", port=server.port, GOV_LEASE_SEC="1") as one,
        daemon(tmp_path / "b", port=server.port, GOV_LEASE_SEC="1", APPLY_CONFIG_PATH=file) as two,
    ):
        assert one.command("disarm", "--reason", "drill").returncode == 0
        one.config.write_text("APPLY_MODE=live\n")
        wait_for(lambda: events_of(client, "APPLY_MODE_DRIFTED"))
        wait_for(lambda: "quantum_govern_drift 1.0" in two.http("/metrics"))
        assert "apply_mode_drifted" not in two.log
        assert one.process is not None
        one.process.send_signal(signal.SIGSTOP)
        try:
            one.config.write_text("APPLY_MODE=dry_run\n")
            wait_for(lambda: events_of(client, "DRIFT_ENDED"), what="the standby takes over")
        finally:
            one.process.send_signal(signal.SIGCONT)
        assert len(events_of(client, "APPLY_MODE_DRIFTED", "DRIFT_ENDED")) == 2
