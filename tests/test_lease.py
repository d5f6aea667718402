"""The lease among several governors, on real servers; what they do with it when one is stopped or killed."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any, Self

import pytest
import redis.asyncio

from events import store
from events.codec import decode
from events.keys import Keys
from events.store import RedisStore
from events.types import Decision
from events.wire import Then, Wire
from governor import decider
from governor.connection import now
from governor.gates import Situation
from governor.lease import LIFE, Lease, died_here, new_owner
from governor.ledger import Ledger, Proposal
from governor.plans import parse_plan
from governor.policy import Policy
from governor.sim.apply_layer import plan_fields
from projections.state import State
from tests.generated import ROOT
from tests.servers import RedisServer

KEYS = Keys()
SECONDS = 3.0
LIFE_S = round(SECONDS * LIFE, 6)
LAST_EPOCH = 1 << 52


class Clock:
    def __init__(self, at: float = 100.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


class Place:
    """Contenders on one server. Time passes only by `pass_time`, on their clocks and, in the key, on the server's."""

    def __init__(self, server: RedisServer, stack: AsyncExitStack) -> None:
        self.server = server
        self._stack = stack
        self.clock = Clock()
        self.redis: Any = self.client()

    def client(self, port: int | None = None) -> redis.asyncio.Redis:
        made = store.client(host=self.server.host, port=port or self.server.port, socket_timeout=5)
        self._stack.push_async_callback(made.aclose)
        return made

    def lease(self, owner: str, *, seconds: float = SECONDS, clock: Callable[[], float] | None = None) -> Lease:
        return Lease(self.client(), KEYS.lease, owner=owner, seconds=seconds, clock=clock or self.clock)

    async def value(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.redis.get(KEYS.lease))
        return found

    async def write(self, **parts: object) -> None:
        await self.redis.set(KEYS.lease, json.dumps(await self.value() | parts))

    async def server_clock_moves(self, seconds: float) -> None:
        """As the key sees it: what lies in the future comes nearer."""
        held = await self.value()
        await self.write(until=round(held["until"] - seconds, 6), since=round(held["since"] - seconds, 6))

    async def pass_time(self, seconds: float) -> None:
        self.clock.at += seconds
        await self.server_clock_moves(seconds)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as closing:
        yield closing


@pytest.fixture
def place(flushed: RedisServer, stack: AsyncExitStack) -> Place:
    return Place(flushed, stack)


@pytest.fixture
def own_place(own_server: RedisServer, stack: AsyncExitStack) -> Place:
    return Place(own_server, stack)


# ---------------------------------------------------------------- names and values


def test_the_key_is_the_contracts() -> None:
    assert (Keys().lease, Keys("{q}").lease) == ("quantum:governor:lease", "{q}:governor:lease")


def test_an_owners_name_tells_host_and_process_and_is_never_the_same() -> None:
    host, pid, chance = new_owner().rsplit(":", 2)
    assert host
    assert pid == str(os.getpid())
    assert chance != new_owner().rsplit(":", 1)[1]


@pytest.mark.parametrize("owner", ["", "two words", "ümlaut", "line\n", "x" * 201])
async def test_an_owner_that_is_no_name_is_refused(owner: str, place: Place) -> None:
    with pytest.raises(ValueError, match=r"owner is .*expected 1 to 200 printable ASCII"):
        place.lease(owner)


@pytest.mark.parametrize("seconds", [0, -3, 0.049, 3601, float("nan"), float("inf")])
async def test_a_length_that_is_none_is_refused(seconds: float, place: Place) -> None:
    with pytest.raises(ValueError, match=r"seconds is .*, expected 0\.05 to 3600"):
        place.lease("a", seconds=seconds)


async def test_the_value_says_who_has_it_since_when_and_until_when(place: Place) -> None:
    assert await place.lease('a:1:"\\x%s').look() is True
    seconds, micros = await place.redis.time()
    value = await place.value()
    assert list(value) == ["owner", "epoch", "since", "until", "seconds"]
    assert (value["owner"], value["epoch"], value["seconds"]) == ('a:1:"\\x%s', 1, LIFE_S)
    assert value["until"] - value["since"] == pytest.approx(LIFE_S, abs=1e-5)
    assert value["since"] == pytest.approx(seconds + micros / 1e6, abs=5)
    assert await place.redis.pttl(KEYS.lease) == -1


# ---------------------------------------------------------------- one has it, the others do not


async def test_of_two_the_second_waits_and_knows_for_whom(place: Place) -> None:
    first, second = place.lease("a"), place.lease("b")
    assert (first.held, second.held, first.owner_now, first.epoch) == (False, False, None, 0)
    assert await first.look() is True
    assert await second.look() is False
    assert (first.held, first.owner_now, first.epoch) == (True, "a", 1)
    assert (second.held, second.owner_now, second.epoch) == (False, "a", 1)


async def test_of_five_that_look_at_once_one_has_it_each_time_it_runs_out(place: Place) -> None:
    five = [place.lease(name) for name in "abcde"]
    for epoch in range(1, 6):
        found = await asyncio.gather(*(lease.look() for lease in five))
        assert sorted(found) == [False, False, False, False, True]
        assert [lease.held for lease in five] == found
        owner = five[found.index(True)].owner
        assert {(lease.owner_now, lease.epoch) for lease in five} == {(owner, epoch)}
        five = [lease for lease in five if lease.owner != owner]
        await place.pass_time(LIFE_S)
        five.append(place.lease(f"{owner}+"))


async def test_renewing_moves_the_end_and_nothing_else(place: Place) -> None:
    lease, other = place.lease("a"), place.lease("b")
    await lease.look()
    for _ in range(5):
        await place.pass_time(LIFE_S * 0.9)
        before = await place.value()
        assert await lease.look() is True
        after = await place.value()
        assert after["until"] > before["until"]
        assert after | {"until": 0} == before | {"until": 0}
    assert await other.look() is False


async def test_one_that_is_not_renewed_goes_to_a_standby_with_the_next_epoch(place: Place) -> None:
    gone, standby = place.lease("a"), place.lease("b")
    await gone.look()
    await place.pass_time(LIFE_S - 0.5)
    assert await standby.look() is False
    await place.pass_time(0.5)
    assert gone.held is False
    assert await standby.look() is True
    assert (standby.epoch, (await place.value())["epoch"]) == (2, 2)
    assert await gone.look() is False
    assert (gone.owner_now, gone.epoch) == ("b", 2)


async def test_one_that_ran_out_and_that_nobody_took_goes_on_with_its_epoch(place: Place) -> None:
    lease = place.lease("a")
    await lease.look()
    await place.pass_time(100)
    assert lease.held is False
    assert await lease.look() is True
    assert lease.epoch == 1


async def test_a_standby_respects_the_length_its_owner_has_set(place: Place) -> None:
    slow, quick = place.lease("a", seconds=30), place.lease("b", seconds=1)
    await slow.look()
    await place.pass_time(20)
    assert await quick.look() is False
    await place.pass_time(4)
    assert await quick.look() is True


async def test_released_it_goes_to_whoever_looks_next_with_the_next_epoch(place: Place) -> None:
    first, second = place.lease("a"), place.lease("b")
    await first.look()
    await first.release()
    assert (first.held, first.owner_now, first.epoch) == (False, None, 1)
    assert (await place.value())["owner"] is None
    assert await second.look() is True
    assert second.epoch == 2


async def test_who_does_not_have_it_cannot_release_it(place: Place) -> None:
    first, second = place.lease("a"), place.lease("b")
    await first.look()
    before = await place.value()
    await second.release()
    assert await place.value() == before
    assert (second.owner_now, first.held) == ("a", True)


async def test_releasing_where_nobody_ever_had_it_writes_nothing(place: Place) -> None:
    lease = place.lease("a")
    await lease.release()
    assert await place.redis.exists(KEYS.lease) == 0
    assert (lease.problem, lease.owner_now) == (None, None)


async def test_whatever_happens_one_at_most_has_it_and_epochs_tell_owners_apart(place: Place) -> None:
    for seed in range(5):
        await place.redis.delete(KEYS.lease)
        chance = random.Random(seed)  # noqa: S311 - a walk, no secret
        leases = [place.lease(f"{seed}{name}") for name in "abc"]
        owners: dict[int, str] = {}
        for _ in range(60):
            lease = chance.choice(leases)
            match chance.randrange(8):
                case 0:
                    await lease.release()
                case 1 | 2 if await place.redis.exists(KEYS.lease):
                    await place.pass_time(chance.choice([0.1, LIFE_S / 3, LIFE_S, 10]))
                case _:
                    await lease.look()
            holding = [lease for lease in leases if lease.held]
            assert len(holding) <= 1
            for one in holding:
                assert owners.setdefault(one.epoch, one.owner) == one.owner
                assert one.epoch == max(owners)
        assert len(set(owners.values())) == 3


# ---------------------------------------------------------------- clocks


async def test_it_is_held_for_its_life_counted_from_before_the_request_was_sent(place: Place) -> None:
    lease = place.lease("a")
    slowly(lease, lambda: place.clock, 1.0)
    asked = place.clock.at
    assert await lease.look() is True
    place.clock.at = asked + LIFE_S - 0.001
    assert lease.held is True
    place.clock.at = asked + LIFE_S
    assert lease.held is False


async def test_an_answer_that_comes_after_the_lease_has_ended_does_not_make_it_held(place: Place) -> None:
    lease = place.lease("a")
    slowly(lease, lambda: place.clock, LIFE_S)
    assert await lease.look() is False
    assert (await place.value())["owner"] == "a"


def slowly(lease: Lease, clock: Callable[[], Clock], seconds: float) -> None:
    """Let the lease's next answers take this long on its clock."""
    answer = lease._execute

    async def execute(*command: Any) -> Any:
        reply = await answer(*command)
        clock().at += seconds
        return reply

    lease._execute = execute


async def test_clocks_of_hosts_may_differ_by_years(place: Place) -> None:
    past, future = Clock(0.0), Clock(1e9)
    first, second = place.lease("a", clock=past), place.lease("b", clock=future)
    assert (await first.look(), await second.look()) == (True, False)
    await place.server_clock_moves(LIFE_S)
    future.at += LIFE_S
    assert await second.look() is True
    past.at += LIFE_S
    assert (await first.look(), second.held) == (False, True)


@pytest.mark.parametrize("seconds", [-86_400, 86_400, -LIFE_S, LIFE_S])
async def test_an_owner_keeps_it_over_a_step_of_the_servers_clock(seconds: float, place: Place) -> None:
    lease, standby = place.lease("a"), place.lease("b")
    await lease.look()
    await place.server_clock_moves(seconds)
    assert await lease.look() is True
    assert lease.epoch == 1
    assert await standby.look() is False


async def test_a_servers_clock_that_was_put_back_keeps_nobody_waiting_for_a_dead_owner(place: Place) -> None:
    dead, standby = place.lease("a"), place.lease("b")
    await dead.look()
    await place.server_clock_moves(-3600)
    assert await standby.look() is True


# ---------------------------------------------------------------- the key in other hands


async def test_a_key_that_was_deleted_comes_back_with_the_next_epoch(place: Place) -> None:
    lease, standby = place.lease("a"), place.lease("b")
    for epoch in (1, 2, 3):
        assert await lease.look() is True
        assert lease.epoch == epoch
        assert await standby.look() is False
        await place.redis.delete(KEYS.lease)
    assert await standby.look() is True
    assert standby.epoch == 4
    assert await lease.look() is False


GARBAGE: list[bytes] = [
    b"", b"x", b"5", b"null", b"[]", b"{}", b"\x00\xff\xfe", b"[" * 5000, b'{"owner":"x"', b'"owner"',
    b'{"owner":5,"epoch":7,"until":9e9,"seconds":3}',
    b'{"owner":"","epoch":7,"until":9e9,"seconds":3}',
    b'{"owner":"x","epoch":7,"until":9e9,"seconds":9e9}',
    b'{"owner":"x","epoch":7,"until":4e9,"seconds":4e9}',
    b'{"owner":"x","epoch":7,"until":"soon","seconds":3}',
    b'{"owner":"x","epoch":7,"until":1e999,"seconds":1e999}',
    b'{"owner":"x","epoch":7,"until":NaN,"seconds":3}',
    b'{"owner":"x","epoch":7,"until":-1,"seconds":-1}',
    b'{"owner":"x","epoch":-7,"until":9e9,"seconds":9e9}',
    b'{"owner":"x","epoch":1.5,"until":9e9,"seconds":9e9}',
    b'{"owner":"x","epoch":1e300,"until":9e9,"seconds":9e9}',
    b'{"owner":"x","epoch":NaN,"until":9e9,"seconds":9e9}',
    b'{"owner":"x","epoch":"7","until":9e9,"seconds":9e9}',
    b'{"owner":"a","epoch":[],"until":[],"seconds":{}}',
]  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_a_key_with_garbage_is_taken_over_with_an_epoch_beyond_the_last(garbage: bytes, place: Place) -> None:
    lease, standby = place.lease("a"), place.lease("b")
    await lease.look()
    await standby.look()
    await place.redis.set(KEYS.lease, garbage)
    assert await standby.look() is True
    assert standby.epoch == (8 if b'"epoch":7' in garbage else 2)
    assert standby.problem is None
    assert (await place.value())["owner"] == "b"
    assert await lease.look() is False
    await place.redis.set(KEYS.lease, garbage)
    assert await standby.look() is True
    assert standby.epoch == (9 if b'"epoch":7' in garbage else 3)
    await place.redis.set(KEYS.lease, garbage)
    await lease.release()
    assert lease.problem is None


@pytest.mark.parametrize("epoch", [1.5, -1, "2", None, float("nan"), 1e300, 2 * LAST_EPOCH, [2]])
async def test_an_owner_without_a_readable_epoch_is_none(epoch: object, place: Place) -> None:
    lease, standby = place.lease("a"), place.lease("b")
    await lease.look()
    await place.write(epoch=epoch)
    assert await standby.look() is True
    assert standby.epoch == 1  # it had seen none


@pytest.mark.parametrize("command", ["RPUSH {} x", "HSET {} owner x", "XADD {} * owner x", "SADD {} x"])
async def test_a_key_of_another_type_is_taken_over(command: str, place: Place) -> None:
    lease = place.lease("a")
    await lease.look()
    await place.redis.delete(KEYS.lease)
    await place.redis.execute_command(*command.format(KEYS.lease).split())
    assert await lease.look() is True
    assert lease.epoch == 2


async def test_a_copy_brought_back_does_not_take_the_epoch_back(place: Place) -> None:
    lease, other = place.lease("a"), place.lease("b")
    await lease.look()
    old = await place.redis.get(KEYS.lease)
    await place.pass_time(LIFE_S)
    await other.look()
    await other.release()
    await lease.look()
    assert lease.epoch == 3
    await place.redis.set(KEYS.lease, old)
    assert await lease.look() is True
    assert lease.epoch == (await place.value())["epoch"] == 4


async def test_the_owner_in_a_copy_brought_back_is_waited_for_and_then_passed(place: Place) -> None:
    lease, other = place.lease("a"), place.lease("b")
    await other.look()
    await place.pass_time(LIFE_S)
    await lease.look()
    assert lease.epoch == 2
    await place.write(owner="b", epoch=1)
    assert await lease.look() is False
    assert (lease.owner_now, lease.epoch) == ("b", 2)
    await place.pass_time(LIFE_S)
    assert await lease.look() is True
    assert lease.epoch == 3


async def test_epochs_written_as_high_as_they_go_do_not_make_it_change_hands(place: Place) -> None:
    lease, standby = place.lease("a"), place.lease("b")
    await lease.look()
    await place.write(owner="x", epoch=LAST_EPOCH, until=0)
    for _ in range(3):
        assert (await lease.look(), await standby.look()) == (True, False)
        assert lease.epoch == LAST_EPOCH


# ---------------------------------------------------------------- the server in trouble


async def test_a_server_that_is_away_costs_the_lease_only_at_its_end(own_place: Place) -> None:
    lease = own_place.lease("a")
    await lease.look()
    asked = own_place.clock.at
    own_place.server.kill()
    for passed in (0.0, LIFE_S / 3, LIFE_S - 0.001):
        own_place.clock.at = asked + passed
        assert await lease.look() is True
        assert lease.problem is not None
    own_place.clock.at = asked + LIFE_S
    assert lease.held is False
    assert await lease.look() is False
    await lease.release()
    own_place.server.start()  # it kept nothing: the epoch is known to the contenders alone
    assert await lease.look() is True
    assert (lease.epoch, lease.problem) == (2, None)


async def test_a_server_that_hangs_keeps_nobody_waiting_for_an_answer(own_place: Place) -> None:
    lease, standby = own_place.lease("a", seconds=0.9), own_place.lease("b", seconds=0.9)
    await lease.look()
    with stopped(own_place.server.pid):
        async with asyncio.timeout(2):
            assert await standby.look() is False
            assert await lease.look() is True
        own_place.clock.at += 1
        assert lease.held is False
    assert "TimeoutError" in str(lease.problem)
    async with asyncio.timeout(5):
        while lease.problem is not None:  # what was sent meanwhile is answered first
            await lease.look()
    assert lease.epoch == 1


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_server_that_takes_no_writes_gives_it_to_nobody(own_place: Place) -> None:
    lease, standby = own_place.lease("a"), own_place.lease("b")
    await lease.look()
    await own_place.redis.config_set("min-replicas-to-write", 1)
    assert (await lease.look(), await standby.look()) == (True, False)
    assert "replicas" in str(lease.problem)
    assert standby.problem is None
    own_place.clock.at += LIFE_S
    assert lease.held is False
    await own_place.redis.config_set("min-replicas-to-write", 0)
    assert await lease.look() is True


async def test_a_user_who_may_not_read_the_key_does_not_take_it_from_its_owner(own_place: Place) -> None:
    lease = own_place.lease("a")
    await lease.look()
    before = await own_place.value()
    await own_place.redis.execute_command("ACL", "SETUSER", "default", "-get")
    blind = own_place.lease("b")
    assert await blind.look() is False
    assert blind.problem is not None
    await own_place.redis.execute_command("ACL", "SETUSER", "default", "+get")
    assert await own_place.value() == before


async def test_a_server_that_forgot_the_script_is_told_it_again(place: Place) -> None:
    lease = place.lease("a")
    await lease.look()
    await place.redis.script_flush()
    assert await lease.look() is True
    assert lease.problem is None


@pytest.mark.parametrize("reply", [None, [], [b"a"], [b"a", b"x", b"1"], b"abc", [None, b"1", b"1"], 5])
async def test_an_answer_that_is_none_is_a_problem_and_no_lease(reply: object, place: Place) -> None:
    lease = place.lease("a")

    async def execute(*_command: Any) -> object:
        return reply

    lease._execute = execute
    assert await lease.look() is False
    assert lease.problem is not None
    assert lease.owner_now is None


# ---------------------------------------------------------------- the loop


class Loop:
    """`run` of one lease, a step of it at a time: a pause lasts until the test ends it."""

    def __init__(self, place: Place, owner: str, *, seconds: float = SECONDS) -> None:
        self.told: list[str] = []
        self.pause_s = 0.0
        self._asleep = asyncio.Event()
        self._wake = asyncio.Event()
        self._place = place
        self.lease = Lease(
            place.client(), KEYS.lease, owner=owner, seconds=seconds, clock=place.clock, sleep=self._sleep
        )
        self.task: asyncio.Task[None] | None = None

    async def _sleep(self, seconds: float) -> None:
        self.pause_s = seconds
        self._asleep.set()
        await self._wake.wait()
        self._wake.clear()

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(
            self.lease.run(lambda: self.told.append(f"gained {self.lease.epoch}"), lambda: self.told.append("lost"))
        )
        await self._paused()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def end(self) -> None:
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def _paused(self) -> None:
        async with asyncio.timeout(5):
            await self._asleep.wait()
        self._asleep.clear()

    async def go_on(self, after_s: float | None = None) -> None:
        """Let the pause end, by default when it is over, and wait for the next one."""
        await self._place.pass_time(self.pause_s if after_s is None else after_s)
        self._wake.set()
        await self._paused()


async def test_the_owner_renews_every_third_of_its_life_and_is_told_once(place: Place) -> None:
    async with Loop(place, "a") as one:
        for _ in range(10):
            assert one.pause_s == pytest.approx(LIFE_S / 3)
            await one.go_on()
        assert one.told == ["gained 1"]
        assert one.lease.held is True


async def test_a_standby_looks_again_the_moment_the_lease_may_run_out(place: Place) -> None:
    owner = place.lease("a")
    await owner.look()
    await place.pass_time(waited := LIFE_S / 20)
    async with Loop(place, "b") as standby:
        while not standby.told:
            assert standby.pause_s <= LIFE_S / 10
            waited += standby.pause_s
            await standby.go_on()
        assert standby.told == ["gained 2"]
        assert waited == pytest.approx(LIFE_S, abs=LIFE_S / 40)


async def test_an_owner_that_was_stopped_for_too_long_is_told_that_it_lost_it(place: Place) -> None:
    async with Loop(place, "a") as one:
        other = place.lease("b")
        await place.pass_time(LIFE_S)
        assert await other.look() is True
        await one.go_on(100)
        # Lost at once, before the server is asked; by then the other one's had run out as well.
        assert one.told == ["gained 1", "lost", "gained 3"]


async def test_an_owner_that_was_stopped_is_told_even_where_nobody_took_over(place: Place) -> None:
    async with Loop(place, "a") as one:
        await one.go_on(LIFE_S)
        assert one.told == ["gained 1", "lost", "gained 1"]


async def test_an_owner_is_told_of_an_epoch_it_did_not_see_go_by(place: Place) -> None:
    async with Loop(place, "a") as one:
        await place.redis.delete(KEYS.lease)
        other = place.lease("b")
        await other.look()
        await other.look()
        await other.release()
        await one.go_on(0.1)
        assert one.told == ["gained 1", "lost", "gained 2"]


async def test_an_owner_whose_server_is_away_is_told_at_the_end_of_its_life(own_place: Place) -> None:
    async with Loop(own_place, "a") as one:
        began = own_place.clock.at
        own_place.server.kill()
        own_place.redis = None
        while one.told == ["gained 1"]:
            assert one.pause_s <= LIFE_S / 3
            own_place.clock.at += one.pause_s
            one._wake.set()
            await one._paused()
        assert one.told == ["gained 1", "lost"]
        assert own_place.clock.at - began == pytest.approx(LIFE_S)
        assert one.lease.problem is not None


async def test_the_end_of_the_loop_is_told_as_lost(place: Place) -> None:
    async with Loop(place, "a") as one, Loop(place, "b") as other:
        await one.end()
        await other.end()
        assert (one.told, other.told) == (["gained 1", "lost"], [])
        await one.lease.release()
        assert await other.lease.look() is True


async def test_an_owner_that_cannot_act_ends_its_loop(place: Place) -> None:
    def gained() -> None:
        raise RuntimeError("cannot act")

    with pytest.raises(RuntimeError, match="cannot act"):
        await place.lease("a").run(gained, lambda: None)


async def test_an_owner_whose_server_hangs_is_told_in_time(own_place: Place) -> None:
    gained, lost = asyncio.Event(), asyncio.Event()
    lease = Lease(own_place.client(), KEYS.lease, owner="a", seconds=1.0)
    running = asyncio.create_task(lease.run(gained.set, lost.set))
    try:
        async with asyncio.timeout(5):
            await gained.wait()
        began = time.monotonic()
        with stopped(own_place.server.pid):
            async with asyncio.timeout(5):
                await lost.wait()
            assert time.monotonic() - began < 1.0
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


# ---------------------------------------------------------------- processes


def child(what: str, port: str, seconds: str, entry_id: str) -> None:
    """Another governor, as a process: holds the lease until it is killed, or commits and stops itself in the middle."""
    asyncio.run(
        _hold(int(port), float(seconds)) if what == "hold" else _commit(what, int(port), float(seconds), entry_id)
    )


async def _hold(port: int, seconds: float) -> None:
    lease = Lease(store.client(host="127.0.0.1", port=port), KEYS.lease, owner=new_owner(), seconds=seconds)
    await lease.run(lambda: print("gained", flush=True), lambda: print("lost", flush=True))  # noqa: T201 - for the test


async def _commit(what: str, port: int, seconds: float, entry_id: str) -> None:
    connection = store.client(host="127.0.0.1", port=port)
    lease = Lease(connection, KEYS.lease, owner=new_owner(), seconds=seconds)
    ledger = ledger_on(connection)
    await ledger.open()
    assert await lease.look()
    stop_itself_at_the_commit(what)
    await decide_plan(ledger, entry_id)
    # The events are read before the lease is asked for again.
    told = {"held": lease.held, "conflicts": ledger.conflicts, "seq": ledger.state.seq, "again": await lease.look()}
    print(json.dumps(told), flush=True)  # noqa: T201 - for the test
    await connection.aclose()


def stop_itself_at_the_commit(when: str) -> None:
    send = Wire.send
    done = False

    def stop_and_send(wire: Wire, *words: Any, then: Then | None = None) -> asyncio.Future[Any]:
        nonlocal done
        now_is_it = not done and words[0] == "EVALSHA" and KEYS.events in words
        done = done or now_is_it
        if now_is_it and when == "before":
            os.kill(os.getpid(), signal.SIGSTOP)
        answer = send(wire, *words, then=then)
        if now_is_it and when == "after":
            os.kill(os.getpid(), signal.SIGSTOP)
        return answer

    Wire.send = stop_and_send  # type: ignore[method-assign, assignment]


def ledger_on(connection: redis.asyncio.Redis) -> Ledger:
    return Ledger(RedisStore(connection, stream=KEYS.events, halt=KEYS.halt), KEYS, now)


async def decide_plan(ledger: Ledger, entry_id: str) -> None:
    outcome = await ledger.propose(partial(_propose, entry_id))
    assert outcome.error is None


def _propose(entry_id: str, state: State, at: int) -> Proposal:
    proposal = {"plan_id": "plan-1", "symbol": "BTCUSDT", "action": "PARTIAL_25"}
    fields = plan_fields(proposal, now=at / 1e6) | {"close_qty": "0.01"}
    plan = parse_plan(fields, entry_id=entry_id, now=at, needs_close_qty=True)
    policy = Policy()
    return Proposal(decider.decide(state, plan, None, policy, Situation(now=at), fields=fields).events)


@contextmanager
def process(what: str, port: int, *, seconds: float, entry_id: str = "0-0") -> Iterator[subprocess.Popen[str]]:
    start = "import sys; from tests.test_lease import child; child(*sys.argv[1:])"
    command = [sys.executable, "-c", start, what, str(port), str(seconds), entry_id]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as one:
        try:
            yield one
        finally:
            if one.poll() is None:
                one.kill()


async def taken_over(lease: Lease) -> None:
    """Run it until it is gained."""
    gained = asyncio.Event()
    running = asyncio.create_task(lease.run(gained.set, lambda: None))
    try:
        async with asyncio.timeout(10):
            await gained.wait()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize(
    ("when", "conflicts"), [("before", 1), ("after", 0)], ids=["not yet sent", "sent and not yet answered"]
)
async def test_one_stopped_past_its_lease_in_the_middle_of_a_commit_grants_nothing_twice(
    when: str, conflicts: int, place: Place
) -> None:
    entry_id = f"{now() // 1000}-0"
    with process(when, place.server.port, seconds=1.0, entry_id=entry_id) as sleeper:
        await asyncio.to_thread(_wait_until_stopped, sleeper.pid)
        standby = Lease(place.client(), KEYS.lease, owner=new_owner(), seconds=SECONDS)
        await taken_over(standby)
        ledger = ledger_on(place.redis)
        await ledger.open()
        await decide_plan(ledger, entry_id)
        assert standby.held is True
        await place.redis.delete(KEYS.permit("plan-1"))  # the client consumed it
        os.kill(sleeper.pid, signal.SIGCONT)
        out, _ = await asyncio.to_thread(sleeper.communicate, timeout=10)
        told = json.loads(out)
    assert told == {"held": False, "conflicts": conflicts, "seq": ledger.state.seq, "again": False}
    events = [decode(entry).event for entry in await ledger.store.read(0)]
    assert [event.verdict for event in events if isinstance(event, Decision)] == ["EXECUTE"]
    assert await place.redis.exists(KEYS.permit("plan-1")) == 0
    assert standby.epoch == 2


def _wait_until_stopped(pid: int) -> None:
    found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert found is not None
    assert found.si_code == os.CLD_STOPPED, found


async def test_a_standby_takes_over_from_one_that_was_killed_within_the_promised_time(place: Place) -> None:
    seconds = 1.5
    standby = Lease(place.client(), KEYS.lease, owner=new_owner(), seconds=seconds)
    with process("hold", place.server.port, seconds=seconds) as active:
        assert active.stdout is not None
        assert await asyncio.to_thread(active.stdout.readline) == "gained\n"
        assert await standby.look() is False
        active.kill()
        began = time.monotonic()
        await taken_over(standby)
        assert time.monotonic() - began < seconds
    assert standby.epoch == 2


async def test_a_process_of_this_host_that_is_no_more_is_not_waited_for(place: Place) -> None:
    host, _, rest = new_owner().partition(":")
    gone = subprocess.Popen([sys.executable, "-c", ""])  # noqa: ASYNC220 - it ends at once
    gone.wait()
    assert await place.lease(f"{host}:{gone.pid}:dead").look()
    after = place.lease(new_owner())
    assert await after.look()
    assert (after.epoch, after.owner_now) == (2, after.owner)
    alive = place.lease(f"{host}:{os.getpid()}:other")
    assert not await alive.look(), "one that lives is"
    assert rest


@pytest.mark.parametrize("owner", ["", "a", "a:b:c", "elsewhere:1:x", "{host}:0:x", "{host}:{pid}:x"])
def test_of_what_is_no_dead_process_of_this_host_nobody_can_tell(owner: str) -> None:
    host, pid, _ = new_owner().split(":")
    assert not died_here(owner.format(host=host, pid=pid))
