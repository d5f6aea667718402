"""When a checkpoint is due, and a real daemon that starts from one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from governor import checkpointing
from governor.checkpointing import Checkpointer, due
from tests.daemon import Daemon, daemon, events_of, publish, wait_for
from tests.servers import RedisServer

SNAPSHOT = "quantum:governor:snapshot"


@pytest.mark.parametrize(
    ("seq", "written", "since_s", "events", "seconds", "is_due"),
    [
        (0, 0, 9e9, 10, 1.0, False),
        (10, 0, 0.0, 10, None, True),
        (9, 0, 0.0, 10, None, False),
        (25, 20, 60.0, 10, 60.0, True),
        (25, 20, 59.9, 10, 60.0, False),
        (20, 20, 9e9, 10, 60.0, False),
        (9_999_999, 0, 9e9, None, None, False),
    ],
)
def test_a_checkpoint_is_due_by_events_or_by_time_and_only_where_something_happened(
    seq: int, written: int, since_s: float, events: int | None, seconds: float | None, *, is_due: bool
) -> None:
    assert due(seq=seq, written=written, since_s=since_s, events=events, seconds=seconds) is is_due


async def looks(
    monkeypatch: pytest.MonkeyPatch, code: str, *, longest_s: float = 600.0
) -> tuple[Checkpointer, list[int]]:
    """A checkpointer whose writer is a program of the test's own, after one look at ten events."""
    monkeypatch.setattr(checkpointing, "COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(checkpointing, "LONGEST_S", longest_s)
    seq = [10]
    one = Checkpointer(lambda: seq[0], written=0, events=10, seconds=None, clock=lambda: 0.0)
    await one.look()
    return one, seq


async def test_it_is_written_once_and_again_when_it_is_due_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    one, seq = await looks(monkeypatch, f"open({str(runs)!r}, 'a').write('x')")
    await one.look()
    assert runs.read_text() == "x"
    seq[0] = 20
    await one.look()
    assert runs.read_text() == "xx"


@pytest.mark.parametrize(("code", "longest_s"), [("raise SystemExit(4)", 600.0), ("import time; time.sleep(60)", 0.0)])
async def test_a_writer_that_fails_or_hangs_is_told_and_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str, longest_s: float
) -> None:
    await looks(monkeypatch, code, longest_s=longest_s)
    told = capsys.readouterr()
    assert "no checkpoint was written" in told.out + told.err


# -- the daemon ----------------------------------------------------------------------------------------------------


@pytest.fixture
def one(flushed: RedisServer, tmp_path: Path) -> Iterator[Daemon]:
    environ = {"GOV_FALLBACK_QTY": "0.001", "GOV_CHECKPOINT_EVENTS": "20"}
    with daemon(tmp_path, port=flushed.port, environ=environ) as running:
        yield running


def decided(client: redis.Redis, first: int, count: int) -> None:
    for number in range(first, first + count):
        publish(client, f"p{number}", f"S{number}USDT")
    wait_for(lambda: len(events_of(client, "DECISION")) == first + count)


def header(server: RedisServer) -> dict[str, int]:
    with server.client(decode_responses=False) as raw:
        value = raw.get(SNAPSHOT)
    assert isinstance(value, bytes)
    told: dict[str, int] = json.loads(value.partition(b"\n")[0])
    return told


def logged(one: Daemon, event: str) -> list[dict[str, object]]:
    lines = (json.loads(line) for line in one.log.splitlines() if line.startswith("{"))
    return [line for line in lines if line["event"] == event]


def test_a_daemon_has_checkpoints_written_and_starts_from_the_last_one_after_a_crash(
    one: Daemon, client: redis.Redis, flushed: RedisServer
) -> None:
    decided(client, 0, 12)
    wait_for(lambda: client.exists(SNAPSHOT), what="a checkpoint")
    wait_for(lambda: header(flushed)["seq"] >= 20)
    one.kill()
    kept = header(flushed)["seq"]
    one.start()
    assert [line["checkpoint"] for line in logged(one, "history read")] == [0, kept]
    decided(client, 12, 1)
    status = one.json("status")
    assert status["counts"]["plans"] == status["counts"]["allowed"] == 13
    replayed = one.json("replay")
    assert (replayed["differences"], replayed["chain"], replayed["plans"]) == ([], "ok", 13)


def test_a_damaged_checkpoint_is_ignored_with_one_warning_and_named_and_removed_by_rebuild(
    one: Daemon, client: redis.Redis
) -> None:
    decided(client, 0, 3)
    assert one.json("checkpoint")["seq"] == len(events_of(client))
    assert one.json("rebuild", "--check")["differences"] == []
    client.set(SNAPSHOT, b'{"version":1}\nnothing')
    one.kill()
    one.start()
    assert len(logged(one, "checkpoint ignored: everything is folded from the first event")) == 1
    checked = one.command("rebuild", "--check", "--json")
    assert checked.returncode == 3
    assert [d["key"] for d in json.loads(checked.stdout)["differences"]] == [SNAPSHOT]
    assert one.json("rebuild")["keys_written"] == 1
    assert not client.exists(SNAPSHOT)


def test_the_head_is_logged_as_an_anchor_that_replay_holds_the_history_to(one: Daemon, client: redis.Redis) -> None:
    anchors = wait_for(lambda: logged(one, "anchor"))
    decided(client, 0, 1)
    head = str(anchors[0]["head"])
    assert one.command("replay", "--expect-head", head).returncode == 0
    printed = one.command("replay", "--anchor")
    assert (printed.returncode, printed.stdout.count("\n")) == (0, 1)
    assert one.command("replay", "--expect-head", printed.stdout.strip()).returncode == 0
    seq, _, digest = head.partition(":")
    assert one.command("replay", "--expect-head", f"{seq}:{digest[::-1]}").returncode == 3
