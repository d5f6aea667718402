"""An audit in two parts finds what one audit finds, wherever the history is cut and whatever was done to it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import redis
from click.testing import CliRunner

from events import chain
from events.codec import decode
from events.files import line_of, write
from events.store import UnavailableError
from events.types import Decision, Entry, Event, Head, PlanReceived, Throttled
from governor import parallel
from governor.cli import main
from governor.parallel import Source, WorkerError, audit
from governor.policy import Policy
from governor.replay import Auditor, Replay, joined, replay
from governor.settings import load
from tests.daemon import wait_for
from tests.golden import entries as golden
from tests.servers import RedisServer
from tests.test_audit import TOUCHED, fill
from tests.test_replay import history, rechained

MADE = lru_cache(golden)
LAST = len(MADE())
NONE: dict[str, Policy] = {}


# -- two parts, in one process -------------------------------------------------------------------------------------


def in_two(
    entries: list[Entry], cut: int, *, policies: dict[str, Policy] = NONE, expect: Head | None = None
) -> Replay | None:
    first = Auditor(policies=policies, expect=expect, until_plan=cut)
    second = Auditor(policies=policies, expect=expect, from_plan=cut)
    for auditor in (first, second):
        for at in range(0, len(entries), 7):
            if not auditor.feed(entries[at : at + 7]):
                break
    return joined(first.finish()[0], first.cut, second)


def turned(event: Event) -> Event:
    """The same event, saying something else."""
    for name in ("verdict", "reason", "plan_id", "error", "hold_until_us", "count", "step", "digest"):
        if name in event.__struct_fields__:
            old = getattr(event, name)
            return msgspec.structs.replace(event, **{name: old + 1 if isinstance(old, int) else f"not {old}"})
    return event


def flipped(entry: Entry) -> Entry:
    return msgspec.structs.replace(entry, data=bytes([entry.data[0] ^ 1]) + entry.data[1:])


def test_a_whole_history_cut_anywhere_is_audited_as_one() -> None:
    whole = replay(MADE())[0]
    assert whole.clean
    assert whole.decisions
    for cut in range(LAST + 3):
        assert in_two(MADE(), cut) == whole, cut


SPARE = Throttled(symbol="BTCUSDT", reason="hourly_limit_exceeded", until_us=0)
DONE_TO: dict[str, Callable[[int], list[Entry]]] = {
    "left out, and the chain written again": lambda at: rechained(MADE(), {at: None}),
    "turned, and the chain written again": lambda at: rechained(MADE(), {at: turned(decode(MADE()[at - 1]).event)}),
    "replaced, and the chain written again": lambda at: rechained(MADE(), {at: SPARE}),
    "flipped": lambda at: [*MADE()[: at - 1], flipped(MADE()[at - 1]), *MADE()[at:]],
    "dropped": lambda at: [*MADE()[: at - 1], *MADE()[at:]],
    "the last": lambda at: MADE()[:at],
}


@pytest.mark.parametrize("what", list(DONE_TO))
def test_whatever_was_done_near_the_cut_is_found_as_by_one(what: str) -> None:
    bad = 0
    head = Head(LAST, MADE()[-1].hash)
    for at in range(1, LAST + 1):
        entries = DONE_TO[what](at)
        whole = replay(entries, expect=head)[0]
        bad += not whole.clean
        for cut in range(at - 2, at + 4, 2):
            assert in_two(entries, cut, expect=head) == whole, (at, cut)
    assert bad > LAST * 0.9


@pytest.mark.parametrize("seed", range(6))
def test_random_walks_with_random_damage_are_audited_as_by_one(seed: int) -> None:
    chance = Random(seed)  # noqa: S311 - a walk, no secret
    entries, policies = history(seed)
    differences = 0
    for _ in range(8):
        change: dict[int, Event | None] = {}
        for seq in chance.sample(range(1, len(entries) + 1), chance.randrange(8)):
            event = decode(entries[seq - 1]).event
            change[seq] = chance.choice([None, SPARE, turned(event)])
        touched = rechained(entries, change)
        if chance.random() < 0.2:
            at = chance.randrange(len(touched))
            touched[at] = flipped(touched[at])
        known = chance.choice(touched)
        expect = chance.choice([None, Head(known.seq, known.hash), Head(known.seq, "0" * 64)])
        whole = replay(touched, policies=policies, expect=expect)[0]
        differences += len(whole.differences)
        for cut in [*(seq + chance.randrange(-2, 3) for seq in change), chance.randrange(1, len(touched))]:
            assert in_two(touched, cut, policies=policies, expect=expect) == whole
    assert differences


def test_a_kept_head_is_known_in_either_part_and_at_the_cut() -> None:
    cut = next(entry.seq for entry in MADE() if entry.seq > LAST // 2 and entry.name == PlanReceived.NAME)
    for seq in (1, cut - 1, cut, cut + 1, LAST):
        kept = Head(seq, MADE()[seq - 1].hash)
        found = in_two(MADE(), cut, expect=kept)
        assert found is not None
        assert found.complete
        other = in_two(MADE(), cut, expect=Head(seq, "0" * 64))
        assert other is not None
        assert not other.complete


def test_parts_of_two_histories_are_not_put_together() -> None:
    other = rechained(MADE(), {1: turned(decode(MADE()[0]).event)})
    for one, two in ((MADE(), other), (MADE(), MADE()[:5])):
        first, second = Auditor(until_plan=50), Auditor(from_plan=50)
        first.feed(one)
        second.feed(two)
        assert first.cut is not None
        assert joined(first.finish()[0], first.cut, second) is None


def test_what_the_first_part_never_reached_it_audited_whole() -> None:
    first, second = Auditor(until_plan=LAST), Auditor(from_plan=LAST)
    first.feed(MADE())
    assert first.cut is None
    assert joined(first.finish()[0], None, second) == replay(MADE())[0]


# -- two processes -------------------------------------------------------------------------------------------------


def settings(**given: str) -> Any:
    return load({"REDIS_PORT": "1", "GOV_ARCHIVE_DIR": "/nowhere"} | given)


def both(source: Source) -> tuple[Replay, Replay]:
    """What one process finds, and what two find."""
    (one, state), (two, elsewhere) = (asyncio.run(audit(source, jobs=jobs, long=1)) for jobs in (1, 2))
    assert state is not None
    assert elsewhere is None
    return one, two


def test_two_processes_find_in_a_stream_what_one_finds(client: redis.Redis, flushed: RedisServer) -> None:
    at, event = next((r.seq, r.event) for r in map(decode, MADE()) if isinstance(r.event, Decision))
    fill(client, rechained(MADE(), {at: turned(event), LAST - 1: None}))
    one, two = both(Source(settings(REDIS_PORT=str(flushed.port)), expect=Head(3, MADE()[2].hash)))
    assert one == two
    assert len({difference.seq for difference in one.differences}) > 1


@pytest.mark.parametrize("what", ["a byte is flipped", "two are swapped", "the tail is cut"])
def test_two_processes_find_in_a_file_what_one_finds(tmp_path: Path, what: str) -> None:
    path = tmp_path / "history.jsonl"
    write(path, MADE())
    header = path.read_bytes().partition(b"\n")[0] + b"\n"
    path.write_bytes(header + b"".join(map(line_of, TOUCHED[what][0](MADE()))))
    one, two = both(Source(settings(), [path]))
    assert one == two
    assert not one.clean


@pytest.mark.parametrize("at", [10, LAST - 5])
def test_a_line_that_is_no_event_is_located_in_either_part(tmp_path: Path, at: int) -> None:
    path = tmp_path / "history.jsonl"
    write(path, MADE())
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:at], lines[at][:-9], *lines[at + 1 :]]))
    one, two = both(Source(settings(), [path]))
    assert one == two
    assert isinstance(one.chain, dict)
    assert one.chain["broken_at"] == at


def test_a_keyed_history_needs_its_key_in_both(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    head, entries = chain.GENESIS, []
    for entry in MADE():
        entries.append(
            msgspec.structs.replace(entry, hash=chain.link(head.hash, *msgspec.structs.astuple(entry)[:4], key=b"k"))
        )
        head = Head(entry.seq, entries[-1].hash)
    write(path, entries, key=b"k")
    one, two = both(Source(settings(GOV_AUDIT_KEY="k"), [path]))
    assert one == two
    assert one.clean


def test_a_short_history_and_one_process_need_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.jsonl"
    write(path, MADE())
    monkeypatch.setattr(parallel, "_first_part", None)
    source = Source(settings(), [path])
    for jobs, long, until in ((2, LAST + 1, None), (1, 1, None), (2, 1, LAST)):
        found, state = asyncio.run(audit(source, jobs=jobs, until_seq=until, long=long))
        assert found.clean
        assert state is not None


# -- what goes wrong -----------------------------------------------------------------------------------------------


def dies(_sender: Connection, _source: Source, _cut: int) -> None:
    os._exit(9)


def never_ends(_sender: Connection, source: Source, _cut: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Path(source.settings.archive_dir).write_text(str(os.getpid()))
    while True:
        signal.pause()


def says_nothing_readable(sender: Connection, _source: Source, _cut: int) -> None:
    sender.send((replay(MADE()[:3])[0], Head(3, "0" * 64)))


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "history.jsonl"
    write(path, MADE())
    return Source(settings(GOV_ARCHIVE_DIR=str(tmp_path / "pid")), [path])


def test_a_process_that_dies_is_told(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_work", dies)
    with pytest.raises(WorkerError, match="--jobs 1"):
        asyncio.run(audit(source, jobs=2, long=1))


def test_parts_that_do_not_meet_are_audited_again_as_one(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_work", says_nothing_readable)
    found, state = asyncio.run(audit(source, jobs=2, long=1))
    assert found == replay(MADE())[0]
    assert state is not None


def test_an_interrupt_leaves_no_process_behind(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_work", never_ends)
    told = Path(source.settings.archive_dir)

    async def interrupted() -> None:
        work = asyncio.create_task(audit(source, jobs=2, long=1))
        await asyncio.to_thread(wait_for, lambda: told.exists() and told.read_text())
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(interrupted())
    assert gone(int(told.read_text()))


class Told:
    """Where the other process sends what it found."""

    def __init__(self) -> None:
        self.found: Any = None

    def send(self, found: Any) -> None:
        self.found = found


@pytest.fixture
def work() -> Iterator[Callable[[Source, int], Any]]:
    """Do the other process's work in this one."""

    def work(source: Source, cut: int) -> Any:
        told = Told()
        parallel._work(told, source, cut)  # type: ignore[arg-type]
        return told.found

    before = signal.getsignal(signal.SIGINT)
    yield work
    signal.signal(signal.SIGINT, before)


def test_the_other_process_tells_what_it_found_and_where_it_stopped(
    source: Source, work: Callable[[Source, int], Any]
) -> None:
    found, cut = work(source, 50)
    assert (found.head, found.clean) == (cut, True)
    assert MADE()[cut.seq].name == PlanReceived.NAME


def test_the_other_process_tells_what_went_wrong(source: Source, work: Callable[[Source, int], Any]) -> None:
    assert isinstance(work(Source(settings()), 50), UnavailableError)
    source.files[0].write_text("{}")
    assert isinstance(work(source, 50), ValueError)


def test_no_process_at_all_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["replay", "--jobs", "0"], env={"REDIS_PORT": "1"}).exit_code == 2
