"""The benchmark's own parts: what it records, what its floor writes, how it judges. No number here depends on time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from events.keys import Keys
from tests.benchmarks import floor as floors
from tests.benchmarks.__main__ import resized
from tests.benchmarks.figures import QUICK, Figure, Line, at, compared, held_within, rated, table
from tests.benchmarks.floor import floor, parse, recorded
from tests.benchmarks.gate import KEYS, OPEN, Client, gate
from tests.servers import RedisServer


def test_a_line_of_monitor_is_read_byte_for_byte() -> None:
    line = rb'1700000000.123456 [0 127.0.0.1:4711] "set" "a b" "{\"n\":1}" "\x00\xff\\\n"'
    assert parse(line) == (b"127.0.0.1:4711", [b"set", b"a b", b'{"n":1}', b"\x00\xff\\\n"])
    assert parse(b'1700000000.1 [0 lua] "XACK" "s" "g" "1-1"')[0] == b"lua"


def test_what_is_no_line_of_monitor_is_told() -> None:
    with pytest.raises(ValueError, match=r"b'\+OK' is no line of MONITOR"):
        parse(b"+OK")


def _shape(server: RedisServer, keys: Keys, plan_id: str) -> dict[str, object]:
    """What a consumer left behind, as far as gate and floor have to be alike."""
    with server.client() as client:
        connection: Any = client
        entries = connection.xrange(keys.events)[-2:]
        own = {name.removeprefix(keys.prefix) for name in connection.keys(f"{keys.prefix}:governor:*")}
        return {
            "events": [sorted((name, len(value)) for name, value in fields.items()) for _, fields in entries],
            "permit": len(connection.get(keys.permit(plan_id))),
            "counted": {name for name in own if name.split(":")[2] in ("exec", "daily", "daily_qty")},
            "pending": connection.xpending(keys.plans, "governor")["pending"],
            "lives": connection.pttl(keys.permit(plan_id)) > 0,
        }


def test_the_floor_writes_what_the_gate_wrote(own_server: RedisServer, tmp_path: Path) -> None:
    with gate(own_server, tmp_path / "gate", OPEN), Client(own_server, KEYS) as client:
        fields = client.fields("BTCUSDT")
        record = recorded(own_server, KEYS, fields["plan_id"], lambda: client.publish(fields))
        assert client.heard() == fields["plan_id"]
        wrote = _shape(own_server, KEYS, fields["plan_id"])
    assert record.events == 2
    with floor(own_server, record, tmp_path), Client(own_server, floors.KEYS) as other:
        for _ in range(2):
            fields = other.fields("BTCUSDT")
            other.publish(fields)
            assert other.heard() == fields["plan_id"]
    assert _shape(own_server, floors.KEYS, fields["plan_id"]) == wrote
    assert wrote["pending"] == 0
    assert wrote["lives"]


def test_two_clients_never_publish_the_same_plan(own_server: RedisServer) -> None:
    with Client(own_server, KEYS) as one, Client(own_server, KEYS) as other:
        made = [client.fields("BTCUSDT")["plan_id"] for client in (one, other) for _ in range(3)]
    assert len(set(made)) == 6


def test_percentiles_are_values_that_were_measured() -> None:
    assert at([5, 1, 4, 2, 3], 50) == 3
    assert at(list(range(1, 101)), 99) == 99
    assert at([7], 99) == 7


def test_a_line_is_held_to_its_floor_over_all_blocks_and_tells_the_spread() -> None:
    line = compared("p50", [[1.0, 1.2], [2.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]], 50, 1.5)
    assert (line.value, line.floor, line.ratio, line.spread, line.reached) == (1.2, 1.0, 1.2, (1.0, 2.0), True)
    assert compared("p50", [[1.6]], [[1.0]], 50, 1.5).reached is False
    assert held_within(compared("p50", [[3.5]], [[1.0]], 50, 1), 2).reached is False
    assert held_within(compared("p50", [[2.5]], [[1.0]], 50, 1), 2).must == "≤ floor + 2 ms"


def test_a_rate_has_to_be_a_part_of_its_floor() -> None:
    assert rated("plans", [400.0], [1000.0], 0.5, unit="/s").reached is False
    assert rated("plans", [600.0], [1000.0], 0.5, unit="/s").reached is True
    assert rated("plans", [600.0], [1000.0], None, unit="/s").reached is None


def test_the_table_says_what_was_missed() -> None:
    missed = Line(what="p50", value=3, unit="ms", floor=1, ratio=3, spread=(2, 4), must="≤ 1.5 x floor", reached=False)
    figure = Figure(name="a", how="b", lines=(missed, Line(what="p99", value=4, unit="ms")), blocks=1, samples=1)
    _, first, second = table([figure])
    assert first.endswith("NO")
    assert second.endswith("stated")


def test_one_size_can_be_changed() -> None:
    assert resized(QUICK, ["rounds=7"]) == msgspec.structs.replace(QUICK, rounds=7)


@pytest.mark.parametrize("given", ["round=7", "rounds=", "rounds=0", "rounds=-1", "rounds"])
def test_what_is_no_size_is_named(given: str) -> None:
    with pytest.raises(ValueError, match=rf"--size '{given}': expected NAME=NUMBER.*rounds"):
        resized(QUICK, [given])


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_it_prints_one_table_and_one_document(tmp_path: Path) -> None:
    done = run("--quick", "--size", "decisions=50", "--json", str(tmp_path / "found.json"), "deciding", "memory")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [figure["name"] for figure in told["figures"]] == ["deciding alone", "memory, 400 plans a day"]
    assert told["sizes"]["decisions"] == 50
    assert told["figures"][0]["samples"] == 50
    assert json.loads((tmp_path / "found.json").read_text()) == told
    head, *lines = done.stderr.splitlines()[-7:]
    assert head.split() == ["figure", "value", "floor", "ratio", "over", "blocks", "asked"]
    assert [line.split()[0] for line in lines] == ["deciding", "p99", "p99,", "memory,", "day", "day"]


def test_an_unknown_figure_is_named() -> None:
    done = run("nothing")
    assert done.returncode == 2
    assert "unknown figure 'nothing', expected one of permit" in done.stderr
