"""Some schedules of the simulation in the ordinary run, and proof that it finds what is broken."""

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from events.store import Commit, MemoryStore
from governor import by_hand, decider, disarming, ledger, rearming, service
from governor.ledger import Proposal
from projections.permits import Plan
from tests.simulation import Told, VirtualLoop, command, main, run

Break = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_no_schedule_breaks_a_promise(first: int) -> None:
    for seed in range(first, first + 20):
        told = run(seed)
        assert told.violation is None, f"{told.violation}\n{command(seed)}"


def test_schedules_do_what_they_are_for() -> None:
    wanted = {
        "is gone", "stands still", "suspended", "request lost", "answer lost", "away until", "stalled until",
        "refuses until", "ConflictError", "RequirementError", "HaltedError", "LateError", "RefusedError",
        "UNPERMITTED_EXECUTION", "PERMIT_REVOKED", "PERMIT_EXPIRED", "MANUAL_DISARM", "AUTO_DISARM", "DISARM_FAILED",
        "REARMED", "PLAN_LOST", "duplicate_plan", "Redis is not reachable", "evaluation_error", "is asked to stop",
    }  # fmt: skip
    for seed in range(140, 400):
        story = "\n".join(run(seed).story)
        wanted = {words for words in wanted if words not in story}
        if not wanted:
            return
    pytest.fail(f"never seen: {sorted(wanted)}")


def test_a_seed_tells_the_same_story_in_every_process() -> None:
    ask = "from tests.simulation import run; print(*[run(seed).digest for seed in range(300, 312)])"

    def stories(hash_seed: str) -> list[str]:
        environ = os.environ | {"PYTHONHASHSEED": hash_seed}
        return subprocess.run(
            [sys.executable, "-c", ask], env=environ, capture_output=True, text=True, check=True
        ).stdout.split()

    first, second = stories("1"), stories("2")
    assert first == second
    assert len(set(first)) == 12


def test_fewer_steps_are_the_beginning_of_the_same_story() -> None:
    whole, part = run(5), run(5, steps=10)
    moves = [line for line in whole.story if "#10 " not in line][: len(part.story)]
    told = [line for line in part.story if "#10 " not in line]
    assert told
    assert moves[: len(told)] == told


def test_nothing_of_the_simulation_stays_behind() -> None:
    modules = (service, ledger, disarming, rearming, by_hand)
    before = [dict(vars(module)) for module in modules]
    threads = threading.active_count()
    for seed in range(5):
        run(seed)
    assert [dict(vars(module)) for module in modules] == before
    assert threading.active_count() == threads
    assert asyncio._get_running_loop() is None


# -- programs that are broken --------------------------------------------------------------------------------------


def forget_the_head(patch: pytest.MonkeyPatch) -> None:
    commit = MemoryStore.commit

    async def careless(self: MemoryStore, it: Commit) -> frozenset[str]:
        return await commit(self, replace(it, expected=await self.head()))

    patch.setattr(MemoryStore, "commit", careless)


def forget_the_brake(patch: pytest.MonkeyPatch) -> None:
    commit = MemoryStore.commit

    async def careless(self: MemoryStore, it: Commit) -> frozenset[str]:
        return await commit(self, replace(it, grants=False))

    patch.setattr(MemoryStore, "commit", careless)


def forget_the_plans(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plan, "decided", property(lambda _self: False))


def forget_to_revoke(patch: pytest.MonkeyPatch) -> None:
    disarm = decider._disarm
    patch.setattr(decider, "_disarm", lambda *args, **more: disarm(*args, **more)[:1])


def forget_what_a_client_took(patch: pytest.MonkeyPatch) -> None:
    take_back = service._take_back

    def careless(*args: Any) -> Proposal:
        return replace(take_back(*args), requires=[])

    patch.setattr(service, "_take_back", careless)


def forget_to_acknowledge(patch: pytest.MonkeyPatch) -> None:
    propose = service.Governor._propose

    def careless(*args: Any) -> Proposal:
        return replace(propose(*args), acks=[])

    patch.setattr(service.Governor, "_propose", careless)


def forget_to_try_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(disarming, "back_off", lambda _attempts: 1e9)


def forget_to_look_in_between(patch: pytest.MonkeyPatch) -> None:
    async def careless(*_args: Any) -> None: ...

    patch.setattr(rearming, "in_between", careless)


def forget_the_drift(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decider, "drift", lambda _state, _mode: [])


@pytest.mark.parametrize(
    ("broken", "promise", "within"),
    [
        (forget_to_look_in_between, "a disarm wins", 400),
        (forget_the_drift, "in the end a drift is told, and nothing else is one", 120),
        (forget_the_head, "no gap", 5),
        (forget_the_brake, "no permit once the brake is set", 120),
        (forget_the_plans, "a result is matched to its permit", 40),
        (forget_to_revoke, "no permit while DISARMED", 40),
        (forget_what_a_client_took, "what a client took is not given back", 120),
        (forget_to_acknowledge, "what is told is acknowledged in the same step", 5),
        (forget_to_try_again, "in the end a disarm is carried out", 200),
    ],
)
def test_a_broken_program_is_found(broken: Break, promise: str, within: int, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    assert violated(promise, within).violation is not None


def violated(promise: str, within: int) -> Told:
    """The first schedule that breaks this promise; what is broken breaks others as well."""
    for seed in range(within):
        told = run(seed)
        if told.violation is not None and told.violation.invariant == promise:
            return told
    pytest.fail(f"not found by {within} seeds")


def test_a_failing_seed_is_told_with_the_command_that_tells_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_the_head(monkeypatch)
    assert main(["--seeds", "0..40"]) == 1
    printed = capsys.readouterr().out
    assert "breaks a promise at step" in printed
    assert "promise: no gap" in printed
    again = next(line.split("tests.simulation ")[1] for line in printed.splitlines() if "again:" in line)
    assert re.fullmatch(r"--seed \d+ --trace", again)
    assert main(again.split()) == 1
    story = capsys.readouterr().out
    assert "VIOLATION: no gap" in story
    assert "g0: starts" in story


def test_a_command_line_that_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--seeds", "twelve"])
    assert "twelve" in capsys.readouterr().err


def test_a_store_that_would_lose_its_tail_is_noticed() -> None:
    found = [violation.invariant for seed in range(20) if (violation := run(seed, extra=["tail"]).violation)]
    assert "one history" in found


# -- the loop ------------------------------------------------------------------------------------------------------


def test_time_jumps_to_the_next_timer() -> None:
    loop = VirtualLoop(Random(1))  # noqa: S311 - any order will do
    seen = []

    async def sleeper() -> None:
        await asyncio.sleep(3600)
        seen.append(round(loop.time()))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await loop.create_future()
        seen.append(round(loop.time()))

    loop.run(sleeper(), context=copy_context(), most_s=1e6)
    assert seen == [3600, 3610]
