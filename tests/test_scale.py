"""How scaling is measured: the made up history, what makes a point disturbed, and the pictures. No number is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest

from events.codec import microseconds
from events.store import RedisStore
from governor.ledger import Ledger
from tests.benchmarks.gate import KEYS
from tests.benchmarks.pictures import OTHER, Line, Panel, Point, draw, short
from tests.benchmarks.scale import AXES, GAP_US, QUICK, MadeUp, busy, disturbed, life, made_up, named, seed
from tests.servers import RedisServer

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"


async def test_a_made_up_history_is_one_the_ledger_takes() -> None:
    ledger = Ledger(MadeUp(4001), KEYS, lambda: 0)
    await ledger.open()
    state = ledger.state
    assert (state.seq, state.mode.state) == (4001, "ARMED")
    assert (state.counts.allowed, state.counts.consumed, state.counts.executions) == (1000, 1000, 1000)
    assert (len(state.permits), state.counts.errors, state.counts.disarms) == (0, 0, 0)


def test_a_made_up_history_has_as_many_events_as_asked_and_its_symbols_in_turn() -> None:
    entries = list(made_up(1000, ("AUSDT", "BUSDT"), start=1_769_212_800_000_000))
    assert len(entries) == 1001
    plans = [entry for entry in entries if entry.name == "DECISION"]
    assert [b'"symbol":"AUSDT"' in plan.data for plan in plans[:4]] == [True, False, True, False]
    assert len({msgspec.json.decode(plan.data)["plan_id"] for plan in plans}) == len(plans)
    assert {microseconds(b.timestamp) - microseconds(a.timestamp) for a, b in pairwise(plans)} == {GAP_US}
    assert not [entry for entry in entries if b"%" in entry.data or b"SAMPLE" in entry.data]


async def test_a_seeded_history_ends_now_and_holds(flushed: RedisServer) -> None:
    last = seed(flushed, 400, named(7))
    async with flushed.async_client(decode_responses=False) as connection:
        ledger = Ledger(RedisStore(connection, stream=KEYS.events, halt=KEYS.halt), KEYS, lambda: 0)
        await ledger.open()
    assert (ledger.state.seq, last) == (401, 401)
    assert 0 < time.time_ns() // 1000 - ledger.state.time < 2 * GAP_US
    assert {symbol for symbol, _ in ledger.state.books.items()} == set(named(7))


def test_the_life_of_a_plan_is_what_the_decider_says() -> None:
    assert [(name, after) for name, _, after in life()] == [
        ("PLAN_RECEIVED", 0), ("DECISION", 0), ("EXECUTION", 1_000_000), ("PERMIT_CONSUMED", 1_000_000),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("floors", "others", "found"),
    [
        pytest.param((1, 1, 1), (0, 0, 0), [], id="quiet"),
        pytest.param((1, 1, 2.5, 1, 1), (0, 0, 0, 0, 0), [2], id="a slow one"),
        pytest.param((3, 3, 1, 3, 3), (0, 0, 0, 0, 0), [2], id="a fast one"),
        pytest.param((3, 1, 1), (0, 0, 0), [0], id="the first one"),
        pytest.param((1, 1.9, 3.7), (0, 0, 0), [], id="a slope"),
        pytest.param((1, 1, 1), (0, 0.2, 0), [1], id="others took much"),
    ],
)
def test_a_disturbed_point_is_found(floors: tuple[float, ...], others: tuple[float, ...], found: list[int]) -> None:
    points = [Point(x, {"floor": value}, other) for x, (value, other) in enumerate(zip(floors, others, strict=True))]
    assert disturbed(points, "floor") == found


def test_a_floor_that_changes_by_itself_disturbs_nothing() -> None:
    points = [Point(1, {"floor": 1}, 0), Point(2, {"floor": 100}, 0)]
    assert disturbed(points, None) == []


WORK = "import time\nwhile time.process_time() < 0.3: pass"


def measure(*, apart: bool) -> None:
    """Print the seconds of our group and of everybody while a process works, in our group or apart from it."""
    before = busy()
    with subprocess.Popen([sys.executable, "-c", WORK], start_new_session=apart, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()
        # Not waited for yet: what it did is not added to this process's own account.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        mine, everybody, _ = (b - a for a, b in zip(before, busy(), strict=True))
    tick = 1 / os.sysconf("SC_CLK_TCK")
    print(json.dumps([mine * tick, everybody * tick]))  # noqa: T201 - for the test


@pytest.mark.parametrize(("apart", "ours"), [(False, True), (True, False)], ids=["own", "another group"])
def test_what_others_do_is_told_from_what_we_do(*, apart: bool, ours: bool) -> None:
    start = f"from tests.test_scale import measure; measure(apart={apart})"
    # In a group of its own: other tests run beside this one in ours.
    done = subprocess.run(
        [sys.executable, "-c", start], start_new_session=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    mine, everybody = json.loads(done.stdout)
    assert (mine >= 0.25) is ours
    assert everybody >= 0.25


def test_a_count_is_short_on_an_axis() -> None:
    assert [short(x) for x in (1, 300, 1000, 10_000, 2_500_000)] == ["1", "300", "1k", "10k", "2.5M"]


PANELS = (
    Panel("latency", "ms", (Line("p50", "gate"), Line("all", "all", OTHER, goes_on=True)), marks=((5.0, "a limit"),)),
    Panel("rate", "1/s", (Line("rate", "gate"), Line("nothing", "never measured")), log=False),
)
POINTS = [Point(1, {"p50": 1, "all": 2, "rate": 5}, 0.0), Point(100, {"p50": 3, "rate": 4}, 0.5)]


def test_a_picture_has_its_text_as_text_and_is_always_the_same(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        draw("Things", "how many", PANELS, POINTS, tmp_path / name, noisy=0.15)
    one = (tmp_path / "one.svg").read_bytes()
    assert one == (tmp_path / "two.svg").read_bytes()
    texts = {"".join(each.itertext()).strip() for each in ET.fromstring(one).iter(f"{SVG}text")}  # noqa: S314 - our own
    assert {"Things", "how many", "latency", "ms", "1/s", "a limit", "all", "100"} <= texts
    assert "never measured" not in texts


def test_a_disturbed_point_is_marked(tmp_path: Path) -> None:
    for name, noisy in (("quiet.svg", 0.6), ("noisy.svg", 0.15)):
        draw("Things", "how many", PANELS, POINTS, tmp_path / name, noisy=noisy)
    quiet, noisy_one = ((tmp_path / name).read_text().count("fill: #ffffff") for name in ("quiet.svg", "noisy.svg"))
    assert noisy_one > quiet


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.scale", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_one_axis_is_measured_told_and_drawn_and_can_be_drawn_again(tmp_path: Path) -> None:
    done = run("--quick", "--out", str(tmp_path), "waiting")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert json.loads((tmp_path / "scale.json").read_text())["axes"] == told["axes"]
    assert [point["x"] for point in told["axes"]["waiting"]] == list(QUICK.waiting)
    assert all(point["values"]["rate"] > 0 for point in told["axes"]["waiting"])
    drawn = (tmp_path / "waiting.svg").read_bytes()
    again = run("--draw", str(tmp_path / "scale.json"), "--out", str(tmp_path))
    assert (again.returncode, again.stdout) == (0, "")
    assert (tmp_path / "waiting.svg").read_bytes() == drawn


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("nothing",), "unknown axis 'nothing', expected one of symbols, waiting, history, governors, accounts"),
        (("--draw", "scale.json"), "--draw needs --out"),
    ],
    ids=["axis", "draw"],
)
def test_what_cannot_be_done_is_named(words: tuple[str, ...], why: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert why in done.stderr


@pytest.mark.parametrize("name", AXES)
def test_the_page_shows_every_picture_and_each_is_small(name: str) -> None:
    picture = ROOT / "docs" / "performance" / f"{name}.svg"
    assert picture.stat().st_size < 60_000
    assert f"](performance/{name}.svg)" in (ROOT / "docs" / "performance.md").read_text()
