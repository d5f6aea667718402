"""`governor check`: what a monitoring system is told, with real servers and real daemons behind it."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.conftest import NewServer
from tests.daemon import Daemon, daemon, publish, wait_for
from tests.servers import RedisServer
from tests.test_watch import free_port

SETTINGS = {"GOV_FALLBACK_QTY": "0.001", "GOV_DISARM_ON_ERROR_COUNT": "5", "GOV_THROTTLE_COOLDOWN_SEC": "300"}
CODES = {"OK": 0, "WARNING": 1, "CRITICAL": 2, "UNKNOWN": 3}


@contextmanager
def governor(home: Path, server: RedisServer, **environ: str) -> Iterator[Daemon]:
    home.mkdir(exist_ok=True)
    with daemon(home, port=server.port, environ=SETTINGS | {"METRICS_PORT": free_port()} | environ) as one:
        yield one


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that has permitted one plan, and that nothing else happens to."""
    with RedisServer("valkey") as server, governor(tmp_path_factory.mktemp("calm"), server) as one:
        with server.client() as client:
            publish(client, "calm-1", "BTCUSDT")
        wait_for(lambda: one.json("status")["counts"]["plans"] == 1)
        yield one


def check(one: Daemon, status: str, *words: str, **environ: str) -> str:
    """The one line, which has to be of this status, in words and as exit code."""
    done = one.command("check", *words, **environ)
    assert done.stdout.startswith(f"GOVERNOR {status} - "), done.stdout + done.stderr
    assert done.returncode == CODES[status]
    assert done.stdout.count("\n") == 1
    return done.stdout


def malformed(client: Any, number: int) -> None:
    publish(client, f"bad-{number}", "BTCUSDT", kill_score="NaN")


# -- as it should be ---------------------------------------------------------------------------------------------------


def test_an_armed_governor_is_ok_in_one_line_with_performance_data(calm: Daemon) -> None:
    line = check(calm, "OK")
    assert re.match(
        r"GOVERNOR OK - ARMED since \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ, "
        r"1 plans \(1 allowed, 0 blocked\), daemon active \| ",
        line,
    )
    data = dict(pair.split("=", 1) for pair in line.partition(" | ")[2].split())
    assert data["plans"] == "1c"
    assert data["errors"] == "0;4;5;0;5"
    assert data["state"] == "0;;;0;2"
    assert re.fullmatch(r"[\d.]+s;;;0", data["event_age"])
    assert re.fullmatch(r"[\d.]+s;5;10;0", data["plan_lag"])
    assert re.fullmatch(r"[\d.]+s;;15;0", data["loop_age"])
    number = r"-?[\d.]*"
    assert all(re.fullmatch(rf"{number}[a-z]*(;{number}){{0,4}}", value) for value in data.values())


def test_the_same_as_json(calm: Daemon) -> None:
    told = calm.json("check")
    assert (told["status"], told["code"], told["state"], told["findings"]) == ("OK", 0, "ARMED", [])
    assert told["values"]["plans"]["value"] == 1
    assert told["message"].startswith("GOVERNOR OK - ARMED since ")


def test_the_limits_of_every_symbol_are_looked_at_where_that_is_asked_for(calm: Daemon) -> None:
    assert "BTCUSDT" not in check(calm, "OK", "-w", "30")
    line = check(calm, "WARNING", "--limits", "-w", "30")
    assert "BTCUSDT exec 5min 1 of 2" in line
    assert "BTCUSDT_exec_1h=1;0.9;3;0;3" in line
    assert "BTCUSDT exec 5min 1 of 2" in check(calm, "CRITICAL", "--limits", "-w", "30", "-c", "50")


def test_a_governor_nobody_hears_of_may_be_told_by_the_age_of_its_last_event(calm: Daemon) -> None:
    assert "the last event is " in check(calm, "WARNING", "--age-warning", "0.01s")
    assert "the last event is " in check(calm, "CRITICAL", "--age-warning", "0.01s", "--age-critical", "0.02s")
    check(calm, "OK", "--age-warning", "1h")


def test_a_daemon_on_another_host_is_not_asked(calm: Daemon) -> None:
    assert "daemon down: http://127.0.0.1:1 does not answer" in check(calm, "CRITICAL", METRICS_PORT="1")
    assert "daemon" not in check(calm, "OK", "--no-daemon", METRICS_PORT="1")


def test_a_standby_is_ok(tmp_path: Path, calm: Daemon) -> None:
    standby = {**calm.environ, "METRICS_PORT": free_port(), "HOME": str(tmp_path)}
    with daemon(tmp_path, port=int(calm.environ["REDIS_PORT"]), environ=standby) as one:
        assert "daemon on standby" in check(one, "OK")


# -- what is wrong with the state --------------------------------------------------------------------------------------


def test_errors_warn_near_their_limit_and_a_throttle_warns(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one, server.client() as client:
        for number in range(4):
            malformed(client, number)
        wait_for(lambda: one.json("status")["errors"]["used"] == 4)
        line = check(one, "WARNING")
        assert "THROTTLED since " in line
        assert "errors 4 of 5" in line
        assert "errors 4 of 5" in check(one, "CRITICAL", "-w", "50", "-c", "80")


def test_a_disarm_is_critical_and_so_are_one_that_is_unfinished_and_drift(
    tmp_path: Path, new_server: NewServer
) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one:
        (tmp_path / "fails").write_text("1")
        one.command("disarm", "--reason", "a | bar in the reason")
        line = check(one, "CRITICAL")
        assert "DISARMED since " in line
        assert "(a / bar in the reason)" in line
        assert "the disarm is unfinished after " in line
        assert line.count("|") == 1
        (tmp_path / "fails").unlink()
        wait_for(lambda: one.json("status")["disarm"]["done"], within_s=20)
        assert "unfinished" not in check(one, "CRITICAL")
        one.config.write_text("APPLY_MODE=testnet\n")
        wait_for(lambda: one.json("status")["drift"] == "testnet")
        assert "drift: the Apply Layer's file says APPLY_MODE=testnet, set by hand" in check(one, "CRITICAL")


def test_the_emergency_brake_is_critical_whoever_is_there_to_see_it(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one, server.client() as client:
        one.stop()
        client.set("quantum:governor:halt", "look at this")
        assert "emergency brake: look at this" in check(one, "CRITICAL", "--no-daemon")


def test_history_that_was_lost_is_told_while_permits_are_held_back(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one, server.client() as client:
        client.flushall()
        wait_for(lambda: one.json("status")["hold_until"] is not None, within_s=20)
        assert "no permits for " in check(one, "WARNING")


def test_nothing_at_all_is_unknown(tmp_path: Path, new_server: NewServer) -> None:
    one = Daemon(tmp_path, port=new_server("valkey").port, environ={})
    assert "no daemon has ever run here" in check(one, "UNKNOWN", "--no-daemon")


# -- what is wrong with the daemon and the server ----------------------------------------------------------------------


def test_without_a_server_there_are_no_permits(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one:
        server.kill()
        line = check(one, "CRITICAL")
        assert f"Redis at 127.0.0.1:{server.port} is not reachable, no permits" in line
        wait_for(lambda: "daemon not ready: " in one.command("check").stdout)


def test_a_server_that_hangs_is_critical_and_the_answer_comes_in_time(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    one = Daemon(tmp_path, port=server.port, environ={})
    os.kill(server.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert "is not reachable" in check(one, "CRITICAL", "--no-daemon", "--timeout", "8")
        assert "no answer within 0.5 s" in check(one, "UNKNOWN", "--no-daemon", "--timeout", "0.5")
        assert time.monotonic() - began < 10
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_daemon_that_hangs_is_critical(tmp_path: Path, new_server: NewServer) -> None:
    with governor(tmp_path, new_server("valkey")) as one:
        assert one.process is not None
        os.kill(one.process.pid, signal.SIGSTOP)
        try:
            assert "daemon down: " in check(one, "CRITICAL")
        finally:
            os.kill(one.process.pid, signal.SIGCONT)


def test_a_quarantine_is_critical(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    with governor(tmp_path / "one", server) as one, server.client() as client:
        publish(client, "p1", "BTCUSDT")
        wait_for(lambda: one.json("status")["counts"]["plans"] == 1)
        one.stop()
        client.flushall()
        with governor(tmp_path / "other", server) as other:
            publish(client, "p2", "ETHUSDT")
            wait_for(lambda: other.json("status")["counts"]["plans"] == 1)
            other.stop()
        one.start(ready=False)
        wait_for(lambda: "quarantine" in one.command("check").stdout, within_s=20)
        assert "daemon not ready: " in check(one, "CRITICAL")


def test_a_journal_that_cannot_be_written_is_critical(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one, server.client() as client:
        assert one.process is not None
        full = 1  # byte: as on a disk without room
        resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
        publish(client, "p1", "BTCUSDT")
        wait_for(lambda: "daemon not ready: " in one.command("check").stdout)
        assert "journal" in check(one, "CRITICAL")


def test_a_history_that_somebody_changed_is_critical(tmp_path: Path, new_server: NewServer) -> None:
    server = new_server("valkey")
    with governor(tmp_path, server) as one, server.client() as client:
        one.stop()
        client.delete("quantum:governor:snapshot")
        client.xadd(
            "quantum:stream:governor.events",
            {"event": "REARMED", "seq": "2", "timestamp": "1", "data": "{}", "hash": "x"},
        )
        assert "the events cannot be read: " in check(one, "CRITICAL", "--no-daemon")


class _Other(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[1, 2]")

    def log_message(self, *_: Any) -> None:
        pass


def test_somebody_else_on_the_daemons_port_is_no_daemon(calm: Daemon) -> None:
    with HTTPServer(("127.0.0.1", 0), _Other) as other:
        thread = Thread(target=other.serve_forever, args=(0.05,))
        thread.start()
        try:
            line = check(calm, "CRITICAL", METRICS_PORT=str(other.server_port))
        finally:
            other.shutdown()
            thread.join()
    assert "/readyz is not Governor's" in line


# -- used wrongly ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "environ", "said"),
    [
        (["--nope"], {}, "No such option"),
        (["-w", "many"], {}, "is not a valid float"),
        (["-w", "nan"], {}, "'nan' is not a number"),
        (["-t", "nan"], {}, "'nan' is not a number"),
        (["-w", "90", "-c", "10"], {}, "--warning 90 is above --critical 10"),
        (["--age-warning", "soon"], {}, "expected a span such as 90s"),
        ([], {"GOV_MAX_EXEC_PER_HOUR": "many"}, "GOV_MAX_EXEC_PER_HOUR"),
    ],
)
def test_what_cannot_be_understood_is_unknown_and_never_another_status(
    calm: Daemon, words: list[str], environ: dict[str, str], said: str
) -> None:
    assert said in check(calm, "UNKNOWN", *words, **environ)


def test_a_file_of_settings_that_cannot_be_read_is_unknown(calm: Daemon, tmp_path: Path) -> None:
    done = calm.command("--env-file", str(tmp_path / "nowhere"), "check")
    assert (done.returncode, done.stdout.startswith("GOVERNOR UNKNOWN - --env-file ")) == (3, True)


def test_it_ends_in_time_whatever_holds_it_up(tmp_path: Path) -> None:
    hanging = tmp_path / "sitecustomize.py"
    hanging.write_text(
        "import socket, time\n"
        "socket.getaddrinfo = lambda *a, **k: time.sleep(60)\n"  # as a resolver that does not answer
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "REDIS_HOST": "redis.invalid", "METRICS_PORT": "0"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "governor", "check", "--timeout", "1"],
        env=environ, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "GOVERNOR UNKNOWN - no answer within 1 s\n")
    assert time.monotonic() - began < 10
