"""`governor status --watch` on a real pseudo-terminal, with a real server and a real daemon behind it."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from events.types import (
    AutoDisarm,
    Decision,
    DisarmFailed,
    DisarmStarted,
    Event,
    Execution,
    HistoryRestored,
    PermitExpired,
    PlanReceived,
    Rearmed,
    Recorded,
    Throttled,
)
from governor import last_disarm
from governor.last_disarm import LastDisarm
from governor.levels import colour_of, level_of
from governor.policy import Policy
from governor.readiness import Readiness
from governor.screen import Screen
from governor.status import describe
from governor.view import Around, View
from projections.state import State, initial
from tests.conftest import NewServer
from tests.daemon import Daemon, daemon, publish, wait_for
from tests.servers import RedisServer
from tests.terminal import terminal

WATCH = [sys.executable, "-m", "governor", "status", "--watch"]
SETTINGS = {"GOV_FALLBACK_QTY": "0.001", "GOV_MAX_EXEC_PER_HOUR": "5", "GOV_MAX_EXEC_PER_5MIN": "2"}
ENTERED, LEFT = b"\x1b[?1049h", b"\x1b[?25h\x1b[?1049l"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def governor(home: Path, server: RedisServer) -> Iterator[Daemon]:
    """A daemon whose METRICS_PORT is known to the view."""
    home.mkdir(exist_ok=True)
    with daemon(home, port=server.port, environ=SETTINGS | {"METRICS_PORT": free_port()}) as one:
        yield one


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that nothing happens to: for looking only."""
    with RedisServer("valkey") as server, governor(tmp_path_factory.mktemp("calm"), server) as one:
        with server.client() as client:
            publish(client, "calm-1", "BTCUSDT")
        yield one


def watched(one: Daemon, *words: str, columns: int = 80, rows: int = 24, **environ: Any) -> Any:
    return terminal([*WATCH, *words], environ=one.environ | environ, columns=columns, rows=rows)


# -- what it shows ---------------------------------------------------------------------------------------------------


def test_a_disarm_is_on_the_screen_at_once_and_not_with_the_next_picture(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one, server.client() as client, watched(one, "600", rows=30) as shown:
        shown.shows("● ARMED", "last disarm none", "daemon ready, active", "errors", "0/5")
        for number in range(3):
            publish(client, f"p{number}", "BTCUSDT")
        shown.shows("■ DISARMED  burst_limit_breach  symbol=BTCUSDT exec_5min=3 limit=2")
        shown.shows("proven", "later: burst_limit_breach", "2/5", "2/2", "in 5 min")
        shown.shows("BLOCK           p2           BTCUSDT   burst_limit_exceeded", "PERMIT_REVOKED  p0 BTCUSDT")
        assert one.command("rearm", "--reason", "looked at it", "--no-restore").returncode == 0
        shown.shows("● ARMED  looked at it", "epoch 3", "later, re-armed")


def test_permits_have_their_seconds_and_the_brake_and_a_brake_nobody_turns_into_a_disarm_is_told(
    tmp_path: Path, new_server: NewServer
) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one, server.client() as client, watched(one) as shown:
        publish(client, "p1", "ETHUSDT")
        shown.shows("1 outstanding permits")
        wait_for(lambda: shown.read() or re.search(r"5\d s  p1           ETHUSDT   0\.001", shown.text))
        wait_for(lambda: shown.read() or re.search(r"5[0-7] s  p1 ", shown.text), what="its seconds going down")
        one.kill()
        client.set("quantum:governor:halt", "look at this\x1b[31m")
        shown.shows("EMERGENCY BRAKE: look at this\\u001b[31m", "DAEMON DOES NOT ANSWER")


def test_without_a_server_it_says_since_when_and_goes_on_when_it_is_back(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey", appendonly=True, appendfsync="always")
    with governor(tmp_path, server) as one, watched(one, columns=110) as shown:
        shown.shows("● ARMED", "ready, active")
        server.kill()
        shown.shows(
            "▲ STALE  for ", "last known: ARMED", f"STALE: no answer from Redis at 127.0.0.1:{server.port} since 20"
        )
        shown.shows("daemon NOT READY")
        server.start()
        shown.shows("● ARMED", "ready, active")
        with server.client() as client:
            publish(client, "after", "BTCUSDT")
        assert "STALE" not in shown.shows("EXECUTE         after")


def test_a_server_that_hangs_makes_it_stale_too(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one, watched(one) as shown:
        shown.shows("● ARMED")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            shown.shows("▲ STALE")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        shown.shows("● ARMED")


def test_a_server_that_lost_everything_is_told_and_what_it_gets_back_is_shown(
    tmp_path: Path, new_server: NewServer
) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one, server.client() as client, watched(one) as shown:
        publish(client, "before", "BTCUSDT")
        shown.shows("EXECUTE         before")
        client.flushall()
        shown.shows("HISTORY_RESTORED", "no permits for", "EXECUTE         before")
        assert shown.text.count("EXECUTE         before") == 1


def test_it_may_be_opened_before_there_is_a_server_or_an_event(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    one = Daemon(tmp_path, port=server.port, environ={"METRICS_PORT": free_port()})
    server.kill()
    with watched(one) as shown:
        shown.shows("▲ NO DATA", "STALE: no answer from Redis", "yet")
        server.start()
        shown.shows("no daemon has ever run here", "DAEMON DOES NOT ANSWER")
        one.start()
        try:
            shown.shows("● ARMED", "ready, active")
        finally:
            one.kill()


# -- the terminal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda shown: shown.press("q"), 0),
        (lambda shown: shown.press("\x03"), 130),
        (lambda shown: shown.process.send_signal(signal.SIGTERM), 143),
        (lambda shown: shown.process.send_signal(signal.SIGHUP), 129),
    ],
    ids=["q", "ctrl-c", "sigterm", "sighup"],
)
def test_the_terminal_is_left_as_it_was(calm: Daemon, end: Any, code: int) -> None:
    with watched(calm) as shown:
        shown.shows("ARMED")
        assert ENTERED in shown.written
        assert shown.now_modes() != shown.modes
        end(shown)
        assert shown.ends() == code
        assert shown.written.endswith(LEFT)
        assert shown.now_modes() == shown.modes


def test_a_wrong_setting_is_told_on_the_terminal_as_it_is(calm: Daemon) -> None:
    with watched(calm, GOV_MAX_EXEC_PER_HOUR="many") as shown:
        assert shown.ends() == 78
        assert "GOV_MAX_EXEC_PER_HOUR" in shown.text
        assert ENTERED not in shown.written


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(calm: Daemon) -> None:
    with watched(calm) as shown:
        shown.shows("ARMED")
        shown.press("\x1a")
        stat = Path(f"/proc/{shown.process.pid}/stat")
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", what="being stopped")
        shown.read()
        assert shown.written.endswith(LEFT)
        assert shown.now_modes() == shown.modes
        shown.screen.reset()
        shown.process.send_signal(signal.SIGCONT)
        shown.shows("ARMED", "q quits")
        shown.press("q")
        assert shown.ends() == 0
        assert shown.now_modes() == shown.modes


@pytest.mark.parametrize(("columns", "rows"), [(40, 10), (60, 16), (132, 40), (200, 60)])
def test_it_fits_any_terminal_also_one_that_changes(calm: Daemon, columns: int, rows: int) -> None:
    with watched(calm, columns=columns, rows=rows) as shown:
        shown.shows("ARMED", "q quits", "UTC", "BTCUSDT")
        assert "q quits" in shown.text.splitlines()[rows - 1]
        shown.screen.reset()
        shown.resize(80, 24)
        wait_for(lambda: shown.read() or "q quits" in shown.screen.display[23], what="the smaller or larger picture")
        assert "ARMED" in shown.screen.display[0]
        assert shown.text.count("q quits") == 1


@pytest.mark.parametrize(("words", "environ"), [((), {"NO_COLOR": "1"}), (("--no-color",), {})])
def test_without_colour_there_is_none(calm: Daemon, words: tuple[str, ...], environ: dict[str, Any]) -> None:
    with watched(calm, *words, **environ) as shown:
        shown.shows("● ARMED")
        codes = {code for codes in re.findall(rb"\x1b\[([\d;]*)m", shown.written) for code in codes.split(b";")}
        assert codes <= {b"", b"0", b"1", b"2", b"4", b"7"}


def test_a_terminal_without_unicode_gets_ascii(calm: Daemon) -> None:
    with watched(calm, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="en_US", PYTHONIOENCODING="ascii") as shown:
        shown.shows("* ARMED", "calm-1")
        assert bytes(shown.written).isascii()


def test_an_unchanged_line_is_not_written_again(calm: Daemon) -> None:
    with watched(calm, "0.1") as shown:
        shown.shows("● ARMED", "ready, active", "calm-1")
        before = len(shown.written)
        clock = shown.screen.display[23]
        wait_for(lambda: shown.read() or shown.screen.display[23] != clock, what="the next second")
        assert b"ARMED" not in shown.written[before:]


@pytest.mark.parametrize(
    ("words", "environ", "said"),
    [
        (["--watch"], {}, "needs a terminal"),
        (["--watch", "2", "--json"], {}, "without --from and --json"),
        (["--watch", "0"], {}, "0.1<=x<=3600"),
        (["--watch", "soon"], {}, "not a valid float"),
    ],
)
def test_it_says_what_it_needs(calm: Daemon, words: list[str], environ: dict[str, str], said: str) -> None:
    done = calm.command("status", *words, **environ)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())


def test_a_terminal_that_cannot_move_its_cursor_is_none(calm: Daemon) -> None:
    with watched(calm, TERM="dumb") as shown:
        assert shown.ends() == 2
        assert "needs a terminal" in " ".join(shown.text.split())


# -- the picture -----------------------------------------------------------------------------------------------------

AT = 1_700_000_000_000_000
DECISION: dict[str, Any] = {"entry_id": "1-0", "mode": "ARMED", "epoch": 1, "settings": ""}


def blocked(plan_id: str, symbol: str = "BTCUSDT") -> Decision:
    return Decision(
        plan_id=plan_id, symbol=symbol, action="FULL_CLOSE_PROPOSED", verdict="BLOCK", reason="daily_limit_exceeded",
        computed_qty=None, computed_notional=None, **DECISION,
    )  # fmt: skip


def permitted(plan_id: str, symbol: str, notional: str = "4999.999") -> Decision:
    return Decision(
        plan_id=plan_id, symbol=symbol, action="PARTIAL_75", verdict="EXECUTE", reason=None,
        computed_qty=Decimal("0.12345678"), computed_notional=Decimal(notional), expires_us=AT + 60_000_000, **DECISION,
    )  # fmt: skip


def folded(*events: Event) -> tuple[State, View]:
    from projections.state import evolve  # noqa: PLC0415

    state, view = initial(), View()
    for seq, event in enumerate(events, 1):
        recorded = Recorded(seq, AT, event, "")
        evolve(state, recorded)
        view.note(recorded)
    return state, view


def drawn(state: State, view: View, width: int, height: int, **around: Any) -> list[Text]:
    daemon = Readiness("http://x", answers=True, problems=("a reason " * 20,))
    given = Around(now=AT, place="127.0.0.1:6379", heard_at=AT, daemon=daemon, hint="q quits")
    given = Around(**({name: getattr(given, name) for name in given.__struct_fields__} | around))
    return view.lines(describe(state, Policy(), AT), given, width=width, height=height)


@pytest.mark.parametrize("height", [1, 2, 5, 10, 24, 31, 32, 60])
@pytest.mark.parametrize("width", [1, 10, 39, 80, 109, 110, 250])
def test_a_picture_is_never_larger_than_the_terminal(width: int, height: int) -> None:
    events: list[Event] = [permitted(f"p{number}", f"SYMBOL{number}USDT") for number in range(40)]
    events += [
        Throttled(symbol=None, reason="errors", until_us=AT + 5_000_000),
        DisarmStarted(reason="漢字" * 60, context={"note": "x" * 100}, epoch=2, manual=True, operator="somebody"),
        DisarmFailed(epoch=2, attempt=3, step="restart", error="no such unit " * 10),
    ]
    for stale in (False, True):
        lines = drawn(*folded(*events), width, height, stale=stale, halted="stop " * 30)
        assert len(lines) == height
        assert max(line.cell_len for line in lines) <= width


def test_more_symbols_and_permits_than_fit_are_counted() -> None:
    text = "\n".join(line.plain for line in drawn(*folded(*(permitted(f"p{n}", f"S{n}") for n in range(40))), 80, 24))
    assert re.search(r"and \d+ more symbols", text)
    assert re.search(r"and \d+ more permits", text)
    assert "S39" in text, "the last active comes first"
    assert "plans and verdicts" in text


def test_a_limit_that_is_nearly_reached_is_not_shown_as_reached() -> None:
    line = next(
        line for line in drawn(*folded(permitted("p1", "BTCUSDT")), 130, 24) if line.plain.startswith("BTCUSDT")
    )
    assert "4999.999/5000" not in line.plain  # two decimals are enough
    assert "5000/5000" not in line.plain
    assert "4999.99/5000" in line.plain


def test_nothing_is_called_allowed_while_it_is_disarmed() -> None:
    disarm = DisarmStarted(reason="repeated_errors", context={}, epoch=2)
    text = "\n".join(line.plain for line in drawn(*folded(permitted("p1", "BTCUSDT"), disarm), 80, 24))
    assert "once re-armed" in text
    assert "DISARM UNFINISHED" in text
    assert "NOT PROVEN" in text


def test_nothing_is_called_allowed_while_the_brake_is_set_or_permits_are_held_back() -> None:
    lost = HistoryRestored(events=3, hold_until_us=AT + 30_000_000)
    for events, halted, word in (((), "stop", "brake is set"), ((lost,), None, "held back")):
        state, view = folded(permitted("p1", "BTCUSDT"), *events)
        (row,) = (line for line in drawn(state, view, 80, 40, halted=halted) if line.plain.startswith("BTCUSDT"))
        assert row.plain.rstrip().endswith(word)


def test_what_is_ordinary_is_left_out_and_every_verdict_is_there() -> None:
    plan = PlanReceived(plan_id="p1", symbol="X", action="PARTIAL_25", decision="EXECUTE", entry_id="1-0", fields={})
    text = "\n".join(line.plain for line in drawn(*folded(plan, blocked("p1")), 100, 24))
    assert "PLAN_RECEIVED" not in text
    assert "BLOCK           p1           BTCUSDT   daily_limit_exceeded" in text


# -- the last disarm, and how much an event matters --------------------------------------------------------------------

DISARM = DisarmStarted(reason="repeated_errors", context={}, epoch=2)
PROOF = AutoDisarm(reason="repeated_errors", context={}, action_taken="APPLY_MODE=dry_run + restart", epoch=2)


def last_of(*events: Event) -> LastDisarm:
    last: LastDisarm | None = None
    for seq, event in enumerate(events, 1):
        last = last_disarm.fold(last, Recorded(seq, AT + seq, event, ""))
    assert last is not None
    return last


def test_a_disarm_is_proven_by_its_own_proof_only() -> None:
    assert last_of(DISARM).proven_at is None
    assert last_of(DISARM, PROOF).proven_at == AT + 2
    assert last_of(PROOF, DISARM).proven_at is None
    other = DisarmStarted(reason="burst_limit_breach", context={}, epoch=4)
    assert last_of(DISARM, other, PROOF).proven_at is None


def test_a_re_arm_is_told_once_and_a_failure_until_the_proof() -> None:
    failed = DisarmFailed(epoch=2, attempt=2, step="restart", error="no unit")
    assert (last_of(DISARM, failed).attempts, last_of(DISARM, failed).error) == (2, "no unit")
    assert last_of(DISARM, failed, PROOF).error is None
    rearmed = Rearmed(reason="r", operator="o", epoch=3)
    assert last_of(DISARM, PROOF, rearmed, rearmed).rearmed_at == AT + 3
    assert last_disarm.fold(None, Recorded(1, AT, rearmed, "")) is None


async def test_a_disarm_of_long_ago_is_found_and_one_too_long_ago_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from events.chain import GENESIS  # noqa: PLC0415
    from events.codec import encode_all  # noqa: PLC0415
    from events.store import Commit, MemoryStore  # noqa: PLC0415

    store = MemoryStore()
    filler = [PermitExpired(plan_id=f"p{number}", symbol="X") for number in range(2500)]
    entries = encode_all([DISARM, PROOF, *filler], after=GENESIS, at=AT, key=None)
    await store.commit(Commit(GENESIS, entries))
    found = await last_disarm.find(store, len(entries))
    assert found is not None
    assert found.proven_at == AT
    monkeypatch.setattr(last_disarm, "LOOKED_AT", 1000)
    assert await last_disarm.find(store, len(entries)) is None


@pytest.mark.parametrize(
    ("event", "level", "colour"),
    [
        (DISARM, "critical", "red"),
        (blocked("p1"), "warning", "yellow"),
        (permitted("p1", "X"), "info", "green"),
        (Rearmed(reason="r", operator="o", epoch=3), "info", "green"),
        (PermitExpired(plan_id="p1", symbol="X"), "info", None),
        (
            Execution(
                plan_id="p", symbol="X", decision="EXECUTE", executed=False, entry_id="1-0", permit="none", failed=True
            ),
            "warning",
            "yellow",
        ),
    ],
)
def test_an_event_has_a_level_and_a_colour(event: Event, level: str, colour: str | None) -> None:
    assert (level_of(event), colour_of(event)) == (level, colour)


def test_a_screen_without_a_size_has_the_usual_one() -> None:
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        assert Screen(nowhere, None, color=True).size == (80, 24)
