"""What is true outside the events is known at each moment, whether it is looked at or kept."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from governor import outside
from governor.actuator import Actuator, PendingNote
from governor.lookout import Lookout
from governor.outside import Outside, Seen
from governor.settings import state_directory
from tests.conftest import NewServer, missing
from tests.daemon import daemon, events_of, publish, until, wait_for

MODES = ("testnet", "dry_run", "live")


class Counting(Actuator):
    """Counts how often the file is read."""

    looks = 0

    def apply_mode(self) -> str | None:
        self.looks += 1
        return super().apply_mode()


class Host:
    """A file with two notes, one beside it and one elsewhere; what one process keeps and what another sees."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.directory = home / "etc" / "quantum"
        self.config = self.directory / "apply-layer.env"
        self.elsewhere = home / "elsewhere"
        self.elsewhere.mkdir()
        self.notes = (PendingNote(self.config), PendingNote.at(home / "state" / "disarm-pending"))
        self.hand = Counting(config_path=self.config, service="x.service", clock=lambda: 0)
        self.lookout = Lookout([self.config, *(note.path for note in self.notes)])
        self.outside = Outside(self.hand, self.notes, self.lookout)
        self._times = 0

    def fresh(self) -> Seen:
        hand = Actuator(config_path=self.config, service="x.service", clock=lambda: 0)
        return Outside(hand, self.notes).now()

    def leave(self, number: int) -> None:
        self._times += 1
        self.notes[number].write_pending(
            reason="by hand", context={}, operator="anna", timestamp_us=self._times, proof=None
        )

    def settle(self, number: int) -> None:
        note = self.notes[number]
        if (pending := note.read_pending()) is not None:
            note.clear_pending(pending)

    def replace(self, path: Path, text: str) -> None:
        new = self.home / "new"
        new.write_text(text)
        new.replace(path)

    def swap(self, link: Path, target: Path) -> None:
        new = self.home / "new-link"
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(link)


@contextlib.contextmanager
def host(home: Path, *, text: str = "APPLY_MODE=testnet\n") -> Iterator[Host]:
    one = Host(home)
    one.directory.mkdir(parents=True)
    one.config.write_text(text)
    try:
        one.outside.now()
        if not one.lookout.quiet():
            missing(f"the kernel tells nothing of {home}: see the log")
        yield one
    finally:
        one.outside.close()


def test_the_file_is_read_again_only_after_a_change(tmp_path: Path) -> None:
    with host(tmp_path) as one:
        looks = one.hand.looks
        assert [one.outside.now().apply_mode for _ in range(5)] == ["testnet"] * 5
        assert one.hand.looks == looks
        one.config.write_text("APPLY_MODE=live\n")
        assert [one.outside.now().apply_mode for _ in range(5)] == ["live"] * 5
        assert one.hand.looks == looks + 1
        one.leave(0)
        assert [note.operator for note in one.outside.now().notes] == ["anna"]
        one.outside.close()
        one.config.write_text("APPLY_MODE=dry_run\n")
        assert one.outside.now().apply_mode == "dry_run"


def test_without_a_lookout_it_is_looked_at_each_time(tmp_path: Path) -> None:
    with host(tmp_path) as one:
        outside = Outside(one.hand, one.notes)
        looks = one.hand.looks
        assert [outside.now().apply_mode for _ in range(3)] == ["testnet"] * 3
        assert one.hand.looks == looks + 3


def test_a_look_that_fails_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: PendingNote) -> None:
        raise RecursionError

    with host(tmp_path) as one:
        one.leave(0)
        with monkeypatch.context() as patched:
            patched.setattr(PendingNote, "read_pending", breaks)
            for _ in range(2):
                with pytest.raises(RecursionError):
                    one.outside.now()
        assert one.outside.now() == one.fresh()
        assert one.outside.now().notes


async def test_what_the_kernel_does_not_tell_is_seen_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "LOOK_S", 0.001)
    with host(tmp_path) as one:
        monkeypatch.setattr(one.lookout, "quiet", lambda: True)
        one.config.write_text("APPLY_MODE=live\n")
        assert one.outside.now().apply_mode == "testnet"
        task = asyncio.create_task(one.outside.run())
        await until(lambda: one.outside.now().apply_mode == "live")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


Change = Callable[[Host, str], object]
CHANGES: dict[str, Change] = {
    "write": lambda one, text: one.config.write_text(text),
    "write elsewhere": lambda one, text: (one.elsewhere / "apply-layer.env").write_text(text),
    "write another name": lambda one, text: (one.home / "other-name").write_text(text),
    "another name": lambda one, _: (one.home / "other-name").hardlink_to(one.config),
    "truncate": lambda one, _: one.config.write_text(""),
    "replace": lambda one, text: one.replace(one.config, text),
    "replace elsewhere": lambda one, text: one.replace(one.elsewhere / "apply-layer.env", text),
    "remove": lambda one, _: one.config.unlink(),
    "remove elsewhere": lambda one, _: (one.elsewhere / "apply-layer.env").unlink(),
    "link the file": lambda one, _: one.swap(one.config, one.elsewhere / "apply-layer.env"),
    "link the directory": lambda one, _: one.directory.symlink_to(one.elsewhere),
    "link the directory to a link": lambda one, _: one.swap(one.directory, one.home / "link"),
    "set the link": lambda one, _: one.swap(one.home / "link", one.elsewhere),
    "set the link to nothing": lambda one, _: one.swap(one.home / "link", one.home / "nothing"),
    "remove the directory": lambda one, _: shutil.rmtree(one.directory),
    "unlink the directory": lambda one, _: one.directory.unlink(),
    "make the directory": lambda one, _: one.directory.mkdir(parents=True),
    "move the directory away": lambda one, _: one.directory.rename(one.home / "aside"),
    "move it back": lambda one, _: (one.home / "aside").rename(one.directory),
    "move what is above": lambda one, _: (one.home / "etc").rename(one.home / "etc-before"),
    "move it back above": lambda one, _: (one.home / "etc-before").rename(one.home / "etc"),
    "leave a note": lambda one, _: one.leave(0),
    "leave a note in the state": lambda one, _: one.leave(1),
    "take the note": lambda one, _: one.settle(0),
    "take the note in the state": lambda one, _: one.settle(1),
    "break the note": lambda one, _: one.notes[0].path.write_text("{"),
    "make the state": lambda one, _: (one.home / "state").mkdir(),
    "remove the state": lambda one, _: shutil.rmtree(one.home / "state"),
    "a directory for the file": lambda one, _: one.config.mkdir(),
    "another file beside it": lambda one, text: (one.directory / "other").write_text(text),
}
STEPS = st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.sampled_from(MODES), st.booleans()), max_size=25)


@given(steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_what_is_kept_is_what_a_fresh_look_sees(steps: list[tuple[str, str, bool]]) -> None:
    with tempfile.TemporaryDirectory() as home, host(Path(home)) as one:
        for name, mode, look in steps:
            with contextlib.suppress(OSError):
                CHANGES[name](one, f"APPLY_MODE={mode}\n")
            if look:
                assert one.outside.now() == one.fresh(), name
        assert one.outside.now() == one.fresh()


OFF = {"GOV_MAX_EXEC_PER_HOUR": "off", "GOV_MAX_EXEC_PER_5MIN": "off"}


def decided(client: redis.Redis, plan_id: str) -> dict[str, Any]:
    """The decision on a plan published now."""
    publish(client, plan_id, "BTCUSDT")

    def found() -> list[dict[str, Any]]:
        return [event for event in events_of(client, "DECISION") if event["plan_id"] == plan_id]

    (decision,) = wait_for(found, what=f"the decision on {plan_id}")
    return decision


def test_a_plan_published_right_after_a_change_of_the_mode_is_decided_with_the_new_one(
    new_server: NewServer, tmp_path: Path
) -> None:
    server = new_server("valkey")
    with server.client() as client, daemon(tmp_path, port=server.port, environ=OFF) as one:
        for number in range(30):
            mode = MODES[number % len(MODES)]
            one.config.write_text(f"APPLY_MODE={mode}\n")
            assert decided(client, f"plan-{number}")["apply_mode"] == mode
        assert "cannot tell when they change" not in one.log
        assert one.stop()[0] == 0


@pytest.mark.parametrize("number", [0, 1], ids=["beside the file", "in the state directory"])
def test_a_plan_published_right_after_a_note_was_left_gets_no_permit(
    new_server: NewServer, tmp_path: Path, number: int
) -> None:
    server = new_server("valkey")
    with server.client() as client, daemon(tmp_path, port=server.port, environ=OFF) as one:
        note = (PendingNote(one.config), PendingNote.at(state_directory(one.environ) / "disarm-pending"))[number]
        assert decided(client, "before")["reason"] not in {"halted", "disarmed"}
        note.write_pending(reason="by hand", context={}, operator="anna", timestamp_us=1, proof=None)
        assert decided(client, "after")["reason"] in {"halted", "disarmed"}
        (started,) = wait_for(lambda: events_of(client, "DISARM_STARTED"))
        assert (started["reason"], started["operator"]) == ("by hand", "anna")
