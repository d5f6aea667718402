"""`governor events`: what is chosen, how it looks, and following over whatever happens to the server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from events import chain
from events.codec import encode_all
from events.reading import before
from events.store import Commit, EventStore, MemoryStore, UnavailableError
from events.types import Entry, Execution, Head, PermitExpired, Recorded
from governor import following, printing
from governor.following import follow
from governor.listing import CLOCK_BACK_US
from tests.conftest import NewServer
from tests.daemon import Daemon, daemon, publish, wait_for
from tests.servers import RedisServer
from tests.terminal import terminal

SETTINGS = {"GOV_FALLBACK_QTY": "0.001", "GOV_ENABLE_AUTO_DISARM": "false"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A history: two permits, a block, a plan that cannot be read; nobody writes to it any more."""
    with RedisServer("valkey") as server:
        home = tmp_path_factory.mktemp("told")
        with daemon(home, port=server.port, environ=SETTINGS) as one, server.client() as client:
            for plan_id, symbol in (("p1", "BTCUSDT"), ("p2", "BTCUSDT"), ("p3", "BTCUSDT"), ("e1", "ETHUSDT")):
                publish(client, plan_id, symbol)
            publish(client, "bad", "BTCUSDT", kill_score="NaN")
            publish(client, "s1", "ETHUSDT", decision="SKIP")
            wait_for(lambda: one.json("status")["counts"]["plans"] == 5)
            one.stop()
            yield one


def names(one: Daemon, *words: str) -> list[str]:
    return [event["event"] for event in one.json("events", *words)]


# -- which ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--verdict", "BLOCK"], ["DECISION"]),
        (["--verdict", "EXECUTE", "--symbol", "BTCUSDT"], ["DECISION"] * 2),
        (["--verdict", "EXECUTE", "--symbol", "btcusdt"], ["DECISION"] * 2),
        (["--verdict", "EXECUTE", "--verdict", "SKIP"], ["DECISION"] * 4),
        (["--plan", "p1", "--level", "warning"], []),
        (["--name", "permit_expired"], []),
        (["--name", "PLAN_REJECTED", "--level", "critical"], []),
        (["--name", "PLAN_REJECTED", "--level", "warning"], ["PLAN_REJECTED"]),
        (["--since", "2100-01-01"], []),
        (["-n", "0"], None),
        (["--since", "-1h"], None),
        (["--level", "info", "-n", "0"], None),
    ],
)
def test_what_was_asked_for_is_printed(told: Daemon, words: list[str], expected: list[str] | None) -> None:
    everything = [event["event"] for event in told.json("events", "-n", "1000")]
    assert names(told, *words) == (everything if expected is None else expected)


def test_what_is_not_ordinary_is_one_level(told: Daemon) -> None:
    found = told.json("events", "--level", "warning")
    assert {event["event"] for event in found} == {"DECISION", "THROTTLED", "PLAN_REJECTED", "ERROR_RECORDED"}
    assert [event["data"]["verdict"] for event in found if event["event"] == "DECISION"] == ["BLOCK"]


def test_since_begins_with_the_first_event_from_then_on(told: Daemon) -> None:
    everything = told.json("events", "-n", "0")
    third = everything[2]["timestamp"]
    expected = [event["seq"] for event in everything if event["timestamp"] >= third]
    assert [event["seq"] for event in told.json("events", "--since", f"{third:.6f}")] == expected
    assert [event["seq"] for event in told.json("events", "--since", "-1h", "-n", "2")] == expected[-2:]


async def test_since_is_found_without_reading_everything() -> None:
    class Counting(MemoryStore):
        reads = 0

        async def read(self, after: int, *, limit: int = 1000) -> list[Entry]:
            self.reads += 1
            return await super().read(after, limit=limit)

    store, head = Counting(), chain.GENESIS
    for minute in range(1, 2001):
        head = await grow(store, head, 1, at=minute * 60_000_000)
    at = await before(store, 1000 * 60_000_000 - CLOCK_BACK_US, last=head.seq)
    assert 997 <= at <= 999
    assert store.reads < 15


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name", "DISARM_STARTD"], "'DISARM_STARTD' is no event; did you mean DISARM_STARTED?"),
        (["--name", "xyz"], "'xyz' is no event; expected one of PLAN_RECEIVED, "),
        (["--verdict", "MAYBE"], "'MAYBE' is not one of 'EXECUTE', 'BLOCK', 'SKIP'"),
        (["--level", "loud"], "'loud' is not one of 'info', 'warning', 'critical'"),
        (["--since", "soon"], "'soon', expected ISO 8601"),
        (["--export", "x.jsonl", "--verdict", "BLOCK"], "--export writes all events"),
        (["--export", "x.jsonl", "-n", "3"], "--export writes all events"),
        (["--export", "x.jsonl", "--plan", ""], "--export writes all events"),
    ],
)
def test_a_word_nobody_knows_is_a_usage_error_that_says_what_was_expected(
    told: Daemon, words: list[str], said: str
) -> None:
    done = told.command("events", *words, COLUMNS="200")
    assert done.returncode == 2
    assert said in done.stderr


# -- colours -----------------------------------------------------------------------------------------------------------


def test_colours_are_for_terminals_that_want_them(told: Daemon) -> None:
    command = [sys.executable, "-m", "governor", "events", "-n", "0"]
    assert "\x1b[" not in told.command("events", "-n", "0").stdout
    for words, environ, coloured in (([], {}, True), (["--no-color"], {}, False), ([], {"NO_COLOR": "1"}, False)):
        with terminal([*command, *words], environ=told.environ | environ, columns=200, rows=50) as shown:
            assert shown.ends() == 0
            assert (b"\x1b[33m" in shown.written) is coloured
            assert b"THROTTLED" in shown.written


def test_what_others_wrote_cannot_steer_the_terminal() -> None:
    error = "no\x1b[2Jthing\nREARMED"
    event = Execution(
        plan_id="p1", symbol="X", decision="EXECUTE", executed=False, entry_id="1-0", permit="none", error=error
    )
    line = printing.event_line(Recorded(1, 1_000_000, event, ""))
    assert "no\\u001b[2Jthing\\u000aREARMED" in line
    assert "\n" not in line


# -- following ---------------------------------------------------------------------------------------------------------


@contextmanager
def followed(one: Daemon, *words: str) -> Iterator[tuple[Path, Path]]:
    """The files in which a follower's output and errors are."""
    out, err = one.home / "follow.out", one.home / "follow.err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        command = [sys.executable, "-u", "-m", "governor", "events", "-f", "-n", "0", "--json", *words]
        process = subprocess.Popen(command, env=one.environ, stdout=stdout, stderr=stderr)
    try:
        yield out, err
    finally:
        process.terminate()
        process.wait(10)


def seqs(out: Path) -> list[int]:
    return [json.loads(line)["seq"] for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("keeps", [True, False], ids=["with its events", "empty"])
def test_following_survives_a_restart_of_the_server_without_a_gap_or_a_double(
    tmp_path: Path, new_server: NewServer, *, keeps: bool
) -> None:
    server = new_server("redis7", appendonly=keeps, appendfsync="always")
    with daemon(tmp_path, port=server.port, environ=SETTINGS) as one, followed(one) as (out, err):
        with server.client() as client:
            publish(client, "first-plan", "BTCUSDT")
        wait_for(lambda: "first-plan" in out.read_text())
        server.kill()
        wait_for(lambda: "waiting for it" in err.read_text())
        server.start()
        wait_for(lambda: one.json("status")["counts"]["plans"] == 1, within_s=20)
        with server.client() as client:
            publish(client, "last-plan", "ETHUSDT")
        wait_for(lambda: "last-plan" in out.read_text(), within_s=20)
        found = seqs(out)
        assert found == list(range(1, len(found) + 1))
        assert "Redis answers again" in err.read_text()
        assert not keeps or "Redis lost events" not in err.read_text()
        assert err.read_text().count("waiting for it") == 1


def test_a_history_that_begins_anew_is_shown_from_its_beginning(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with (
        daemon(tmp_path / "one", port=server.port, environ=SETTINGS) as one,
        server.client() as client,
        followed(one) as (out, err),
    ):
        publish(client, "first-plan", "BTCUSDT")
        wait_for(lambda: "first-plan" in out.read_text())
        one.stop()
        client.flushall()
        with daemon(tmp_path / "other", port=server.port, environ=SETTINGS):
            publish(client, "second-plan", "BTCUSDT")
            wait_for(lambda: "second-plan" in out.read_text())
        assert seqs(out).count(1) == 2
        assert "Redis lost events" in err.read_text() or "does not continue" in err.read_text()


async def grow(store: MemoryStore, head: Head, count: int, *, at: int, name: str = "p") -> Head:
    events = [PermitExpired(plan_id=f"{name}{head.seq + number}", symbol="X") for number in range(count)]
    entries = encode_all(events, after=head, at=at, key=None)
    await store.commit(Commit(head, entries))
    return Head(entries[-1].seq, entries[-1].hash)


class Troubled:
    """A store that can be away, and be replaced."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.away = 0

    async def head(self) -> Head:
        return await self.store.head()

    async def follow(self, after: int, *, timeout_s: float) -> list[Entry]:
        if self.away:
            self.away -= 1
            raise UnavailableError("away")
        return await self.store.follow(after, timeout_s=min(timeout_s, 0.01))


async def taken(
    store: Any, head: Head, wanted: int, *, at: str = "0", change: Any = None
) -> tuple[list[Entry], list[str]]:
    """The first `wanted` entries that are given out; `change` is called after the first ones."""
    found: list[Entry] = []
    said: list[str] = []
    source: EventStore = store
    async for entries in follow(source, head, at=at, key=None, tell=said.append):
        found += entries
        if len(found) >= wanted:
            return found, said
        if change is not None:
            change = await change()
    raise AssertionError("it ended")


async def test_events_that_come_back_are_not_given_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "RETRY_S", 0.0)
    whole = MemoryStore()
    head = await grow(whole, chain.GENESIS, 10, at=1_000_000)
    cut = MemoryStore()
    cut.entries = whole.entries[:4]
    troubled = Troubled(whole)
    after = whole.entries[5]

    async def lose() -> None:
        troubled.store, troubled.away = cut, 1
        cut.entries = list(whole.entries)
        await grow(cut, head, 3, at=2_000_000)

    found, said = await taken(troubled, Head(after.seq, after.hash), 7, at=after.timestamp, change=lose)
    assert [entry.seq for entry in found] == [7, 8, 9, 10, 11, 12, 13]
    assert len(said) == 2


async def test_another_history_is_given_out_whole_be_it_shorter_or_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "RETRY_S", 0.0)
    for count in (2, 20):
        old = MemoryStore()
        await grow(old, chain.GENESIS, 5, at=1_000_000)
        new = MemoryStore()
        await grow(new, chain.GENESIS, count, at=2_000_000, name="q")
        troubled = Troubled(old)

        async def replace(troubled: Troubled = troubled, new: MemoryStore = new) -> None:
            troubled.store = new

        found, said = await taken(troubled, chain.GENESIS, 5 + count, change=replace)
        assert [entry.seq for entry in found] == [*range(1, 6), *range(1, count + 1)]
        assert len(said) == 1


async def test_only_the_last_events_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "REMEMBERED", 3)
    store = MemoryStore()
    await grow(store, chain.GENESIS, 10, at=1_000_000)
    seen = following._Seen(chain.GENESIS, "0")
    assert all(seen.take(entry) for entry in store.entries)
    assert not any(seen.take(entry) for entry in store.entries)
    assert len(seen._hashes) == 3


def test_ctrl_c_ends_following(told: Daemon) -> None:
    command = [sys.executable, "-m", "governor", "events", "--follow"]
    with terminal(command, environ=told.environ, columns=200, rows=50) as shown:
        shown.shows("PLAN_REJECTED")
        shown.press("\x03")
        assert shown.ends() == 130


def test_since_works_on_exported_files_too(told: Daemon, tmp_path: Path) -> None:
    path = str(tmp_path / "all.jsonl.zst")
    told.json("events", "--export", path)
    everything = told.json("events", "-n", "0")
    third = everything[2]["timestamp"]
    expected = [event["seq"] for event in everything if event["timestamp"] >= third]
    found = told.json("events", "--since", f"{third:.6f}", "--from", path)
    assert [event["seq"] for event in found] == expected
