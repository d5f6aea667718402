"""The commands that audit, export, archive and mend, on real servers, and histories somebody touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import redis
from msgspec.structs import replace

from events.files import line_of, open_file, write
from events.types import Entry
from tests.daemon import Daemon, daemon, events_of, fields_of, publish, wait_for
from tests.golden import entries as golden
from tests.servers import RedisServer

STREAM = "quantum:stream:governor.events"
MADE = lru_cache(golden)
LAST = len(MADE())
BEFORE = "2026-01-25"
"""The history is of two days; this one begins the second."""


@pytest.fixture
def here(flushed: RedisServer, tmp_path: Path) -> Daemon:
    """Where commands run: a home, a server, no daemon."""
    return Daemon(tmp_path, port=flushed.port, environ={})


@pytest.fixture
def offline(tmp_path: Path) -> Daemon:
    """The same without any server."""
    return Daemon(tmp_path, port=1, environ={})


def fill(client: redis.Redis, entries: list[Entry]) -> None:
    """Put entries into the stream as somebody does who may write to Redis, whatever they are."""
    client.delete(STREAM)
    for number, entry in enumerate(entries, start=1):
        fields: Any = fields_of(entry)
        if entry.name == "AUTO_DISARM":
            data = json.loads(entry.data)
            fields |= {"reason": data["reason"], "context": json.dumps(data["context"], separators=(",", ":"))}
            fields |= {"action_taken": data["action_taken"]}
        client.xadd(STREAM, fields, id=f"{number}-0")


def lines(path: Path, body: list[bytes]) -> None:
    header = path.read_bytes().partition(b"\n")[0]
    path.write_bytes(b"\n".join([header, *body]) + b"\n")


def flipped(entry: Entry) -> Entry:
    """One digit of its data is another one."""
    at = next(i for i, byte in enumerate(entry.data) if chr(byte).isdigit() and i > 4)
    return replace(entry, data=entry.data[:at] + bytes([entry.data[at] ^ 1]) + entry.data[at + 1 :])


Touch = Callable[[list[Entry]], list[Entry]]
TOUCHED: dict[str, tuple[Touch, int | None]] = {
    "a byte is flipped": (lambda e: [*e[:29], flipped(e[29]), *e[30:]], 30),
    "a hash is another one": (lambda e: [*e[:29], replace(e[29], hash="0" * 64), *e[30:]], 30),
    "a time is another one": (lambda e: [*e[:29], replace(e[29], timestamp=e[28].timestamp + "1"), *e[30:]], 30),
    "a name is another one": (lambda e: [*e[:29], replace(e[29], name="RECOVERED"), *e[30:]], 30),
    "two are swapped": (lambda e: [*e[:29], e[30], e[29], *e[31:]], 31),
    "one is dropped": (lambda e: [*e[:29], *e[30:]], 31),
    "two are dropped": (lambda e: [*e[:29], *e[31:]], 32),
    "one is put in": (lambda e: [*e[:29], e[28], *e[29:]], 29),
    "the tail is cut": (lambda e: e[:-5], None),
    "the first is dropped": (lambda e: e[1:], 2),
}
"""What is done to the history, and the event at which it shows (None: only against a head that was kept)."""


def audited(here: Daemon, *words: str) -> tuple[int, dict[str, Any]]:
    done = here.command("replay", *words, "--json")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


# -- tampering -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", list(TOUCHED))
def test_what_was_done_to_the_stream_is_found_and_located(here: Daemon, client: redis.Redis, what: str) -> None:
    touch, at = TOUCHED[what]
    fill(client, touch(MADE()))
    head = f"{LAST}:{MADE()[-1].hash}"
    code, told = audited(here, "--expect-head", head)
    assert code == 3
    if at is None:
        assert (told["chain"], told["complete"], told["events"]) == ("ok", False, LAST - 5)
    elif what == "the first is dropped":
        assert told["chain"]["broken_at"] == 1, "the stream begins late: its beginning is missing"
    else:
        assert told["chain"]["broken_at"] == at
        assert told["events"] <= at


@pytest.mark.parametrize("what", list(TOUCHED))
def test_what_was_done_to_a_file_is_found_and_located(offline: Daemon, tmp_path: Path, what: str) -> None:
    touch, at = TOUCHED[what]
    path = tmp_path / "history.jsonl"
    write(path, MADE())
    lines(path, [line_of(entry).rstrip(b"\n") for entry in touch(MADE())])
    code, told = audited(offline, "--from", str(path))
    assert code == 3
    if at is None:
        assert (told["chain"], told["complete"]) == ("ok", False), "a file tells where it should end"
    else:
        assert told["chain"]["broken_at"] == at


def test_a_line_that_is_no_event_is_located(offline: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write(path, MADE())
    body = path.read_bytes().split(b"\n")[1:-1]
    lines(path, [*body[:29], body[29][:-9], *body[30:]])
    code, told = audited(offline, "--from", str(path))
    assert (code, told["chain"]["broken_at"], told["events"]) == (3, 30, 29)
    assert "line 31" in told["chain"]["problem"]


def test_a_stream_entry_that_is_no_event_is_located(here: Daemon, client: redis.Redis) -> None:
    fill(client, MADE()[:29])
    client.xadd(STREAM, {"event": "DECISION", "seq": "30"}, id="30-0")
    code, told = audited(here)
    assert (code, told["chain"]["broken_at"], told["events"]) == (3, 30, 29)


def test_the_plain_fields_of_a_disarm_say_what_its_data_says_or_it_is_found(here: Daemon, client: redis.Redis) -> None:
    fill(client, MADE())
    at = next(entry.seq for entry in MADE() if entry.name == "AUTO_DISARM")
    found: Any = client.xrange(STREAM, f"{at}-0", f"{at}-0")
    fields = found[0][1]
    fill(client, MADE()[: at - 1])
    client.xadd(STREAM, fields | {"reason": "nothing happened"}, id=f"{at}-0")
    code, told = audited(here)
    assert (code, told["chain"]["broken_at"]) == (3, at)


def test_a_chain_written_again_without_the_key_is_found(here: Daemon, client: redis.Redis, tmp_path: Path) -> None:
    fill(client, MADE())
    (tmp_path / "GOV_AUDIT_KEY").write_text("k")
    code, told = audited(here)
    assert (code, told["chain"]) == (0, "ok")
    done = here.command("replay", "--json", CREDENTIALS_DIRECTORY=str(tmp_path))
    assert json.loads(done.stdout)["chain"]["broken_at"] == 1


def test_the_state_before_the_first_event_is_none_and_not_armed(offline: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write(path, MADE())
    done = offline.command("replay", "--at-seq", "0", "--from", str(path))
    assert done.returncode == 0
    assert done.stdout.startswith("there was no event yet\n")


# -- under other settings ------------------------------------------------------------------------------------------


def test_what_if_tells_what_would_have_changed_and_draws_it(offline: Daemon, tmp_path: Path) -> None:
    path, picture = tmp_path / "history.jsonl", tmp_path / "other.svg"
    write(path, MADE())
    words = ["--what-if", "GOV_DISARM_ON_BURST_BREACH=false", "--plot", str(picture), "--from", str(path)]
    code, told = audited(offline, *words)
    assert code == 3
    changed = {each["plan_id"]: (each["recorded"], each["computed"]) for each in told["differences"]}
    recorded, computed = changed["after1"]
    assert recorded == {"verdict": "BLOCK", "reason": "disarmed"}
    assert computed["reason"] != "disarmed"
    assert (told["chain"], told["state"], told["events"]) == ("ok", "ARMED", LAST)
    assert picture.read_text().startswith("<?xml")
    table = offline.command("replay", "--what-if", "GOV_DISARM_ON_BURST_BREACH=false", "--from", str(path), "--all")
    assert (table.returncode, "after1" in table.stdout) == (3, True)


def test_what_if_nothing_changes_says_so(offline: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write(path, MADE())
    code, told = audited(offline, "--what-if", "GOV_MAX_EXEC_PER_HOUR=3", "--from", str(path))
    assert (code, told["differences"]) == (0, [])
    limits = tmp_path / "limits.toml"
    limits.write_text("[DOGEUSDT]\nGOV_MAX_EXEC_PER_HOUR = 1\n")
    code, told = audited(offline, "--limits", str(limits), "--from", str(path))
    (only,) = told["differences"]
    assert (only["plan_id"], only["computed"]["verdict"]) == ("d1", "BLOCK")
    assert only["assumed"] is not None, "nobody had asked for its position"


def test_nothing_follows_from_a_history_that_does_not_hold(offline: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write(path, MADE())
    lines(path, [line_of(entry).rstrip(b"\n") for entry in TOUCHED["two are swapped"][0](MADE())])
    done = offline.command("replay", "--what-if", "GOV_MAX_EXEC_PER_HOUR=5", "--from", str(path))
    assert (done.returncode, "event 31" in done.stderr) == (3, True)


# -- export and archive --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["history.jsonl", "history.jsonl.zst"])
def test_everything_that_reads_the_stream_reads_an_exported_file(
    here: Daemon, client: redis.Redis, tmp_path: Path, name: str
) -> None:
    fill(client, MADE())
    path = str(tmp_path / name)
    exported = here.json("events", "--export", path)
    assert (exported["events"], exported["head"]) == (LAST, {"seq": LAST, "hash": MADE()[-1].hash})
    assert list(open_file(path)[1]) == MADE()
    questions = (("replay",), ("replay", "--at-seq", "40"), ("explain", "p1"), ("explain", "no-such-plan"),
                 ("events", "-n", "0"), ("events", "--plan", "p1"))  # fmt: skip
    live = {words: here.json(*words) for words in questions}
    status = here.json("status")
    client.flushall()
    for words in questions:
        assert here.json(*words, "--from", path) == live[words], words
    kept = here.json("status", "--from", path)
    assert {name: kept[name] for name in ("state", "epoch", "seq", "hash", "counts")} == {
        name: status[name] for name in ("state", "epoch", "seq", "hash", "counts")
    }


def test_a_broken_chain_is_not_exported(here: Daemon, client: redis.Redis, tmp_path: Path) -> None:
    fill(client, TOUCHED["two are swapped"][0](MADE()))
    done = here.command("events", "--export", str(tmp_path / "history.jsonl"))
    assert (done.returncode, "event 31" in done.stderr) == (3, True)
    assert not list(tmp_path.glob("*.jsonl*"))


def test_files_and_stream_are_one_history_once_the_old_part_is_archived(
    here: Daemon, client: redis.Redis, tmp_path: Path
) -> None:
    fill(client, MADE())
    whole = {words: here.json(*words) for words in (("replay",), ("explain", "p1"), ("events", "-n", "0"))}
    assert here.json("rebuild")["events"] == LAST
    done = here.json("archive", "--before", BEFORE)
    assert done["trimmed"] == LAST - client.xlen(STREAM) > 0
    assert [Path(each["file"]).name for each in done["written"]] == ["events-2026-01-24.jsonl.zst"]
    for words, answer in whole.items():
        assert here.json(*words) == answer, words
    assert here.json("rebuild", "--check")["differences"] == []
    assert here.json("archive", "--before", BEFORE)["trimmed"] == 0
    here.start()
    try:
        publish(client, "after-the-archive", "BTCUSDT")
        wait_for(lambda: client.exists("quantum:governor:block:after-the-archive"))
    finally:
        here.kill()
    assert here.json("replay")["differences"] == []


def test_without_files_a_start_uses_the_checkpoint_and_without_both_it_says_what_is_missing(
    here: Daemon, client: redis.Redis, tmp_path: Path
) -> None:
    fill(client, MADE())
    done = here.json("archive", "--before", BEFORE)
    first = LAST - client.xlen(STREAM) + 1
    (file,) = (Path(each["file"]) for each in done["written"])
    file.rename(tmp_path / "elsewhere.jsonl.zst")
    assert here.json("status")["seq"] == LAST
    code, told = audited(here)
    assert (code, told["chain"]["broken_at"]) == (3, 1)
    client.delete("quantum:governor:snapshot")
    failed = here.command("status")
    assert failed.returncode == 1
    assert f"begins at event {first}; the events from 1 on" in failed.stderr
    assert str(file.parent) in failed.stderr


@pytest.mark.parametrize("before", ["2999-01-01", "-0d"])
def test_only_days_that_are_over_are_archived(here: Daemon, client: redis.Redis, before: str) -> None:
    fill(client, MADE())
    done = here.command("archive", "--before", before)
    if before == "-0d":
        assert (done.returncode, client.xlen(STREAM)) == (0, 1), "the last event stays"
    else:
        assert (done.returncode, client.xlen(STREAM)) == (1, LAST)
        assert "2999-01-01" in done.stderr


# -- bringing a broken server back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1, 40, LAST])
def test_what_a_server_lost_is_written_back_with_the_public_keys_and_a_hold_and_never_a_permit(
    here: Daemon, client: redis.Redis, tmp_path: Path, left: int
) -> None:
    path = str(tmp_path / "history.jsonl.zst")
    fill(client, MADE())
    here.json("events", "--export", path)
    client.flushall()
    fill(client, MADE()[:left])
    ended = [entry for entry in MADE()[left:] if entry.name in ("PERMIT_CONSUMED", "PERMIT_EXPIRED", "PERMIT_REVOKED")]
    assert bool(ended) == (left < LAST)
    for entry in ended:
        client.set(f"quantum:permit:{json.loads(entry.data)['plan_id']}", "came back with the server")
    told = here.json("rebuild", "--from", path)
    assert told["events_restored"] == LAST - left
    entries = events_of(client)
    assert [entry["event"] for entry in entries[:LAST]] == [entry.name for entry in MADE()]
    assert [entry["event"] for entry in entries[LAST:]] == (["HISTORY_RESTORED"] if left < LAST else [])
    assert client.exists("quantum:governor:state")
    assert not client.keys("quantum:permit:*")
    assert (here.json("status")["hold_until"] is not None) == (left < LAST)
    again = here.json("rebuild", "--from", path)
    assert (again["events_restored"], again["differences"]) == (0, [])
    assert audited(here)[0] == 0


def test_a_stream_that_went_on_is_kept_and_two_histories_are_never_made_one(
    here: Daemon, client: redis.Redis, tmp_path: Path
) -> None:
    path = tmp_path / "history.jsonl"
    write(path, MADE()[:50])
    fill(client, MADE())
    assert here.json("rebuild", "--from", str(path))["events_restored"] == 0
    assert client.xlen(STREAM) == LAST
    client.delete(STREAM)
    fill(client, [*MADE()[:19], replace(MADE()[19], hash="f" * 64)])
    refused = here.command("rebuild", "--from", str(path))
    assert refused.returncode == 1
    assert "two histories" in refused.stderr
    assert client.xlen(STREAM) == 20


def test_a_check_against_a_file_writes_nothing(here: Daemon, client: redis.Redis, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write(path, MADE())
    done = here.command("rebuild", "--check", "--from", str(path), "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["events"], told["keys_written"]) == (3, LAST, 0)
    assert "quantum:governor:state" in {difference["key"] for difference in told["differences"]}
    assert client.keys("*") == []


def test_a_daemon_that_met_the_loss_goes_on_once_the_history_is_back(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, GOV_FALLBACK_QTY="0.001", GOV_PERMIT_TTL_SEC="2") as one:
        publish(client, "p1", "BTCUSDT")
        wait_for(lambda: client.exists("quantum:permit:p1"))
        path = str(tmp_path / "history.jsonl")
        one.json("events", "--export", path)
        one.kill()
        client.flushall()
        one.command("rebuild", "--from", path)
        one.start()
        publish(client, "p2", "ETHUSDT")
        wait_for(lambda: client.exists("quantum:governor:block:p2"))
        assert json.loads(str(client.get("quantum:governor:block:p2")))["reason"] == "history_hold"
        publish(client, "p1", "BTCUSDT")
        wait_for(lambda: any(d["reason"] == "duplicate_plan" for d in events_of(client, "DECISION")))
        assert one.json("replay")["differences"] == []
