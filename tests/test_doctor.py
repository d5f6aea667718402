"""`governor doctor`: a healthy system is told as one, each fault by the check it belongs to, with what to do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import redis
from click.testing import CliRunner

from governor import doctor, drill
from governor.checks import Check, Findings, Look
from governor.cli import main
from governor.settings import load
from tests.conftest import NewServer, build
from tests.daemon import Daemon, daemon, events_of, publish, wait_for
from tests.generated import ROOT
from tests.servers import KINDS, Kind, RedisServer
from tests.test_end_to_end import CREDENTIALS, Exchange, result

EVENTS = "quantum:stream:governor.events"
Environ = dict[str, str]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class System(NamedTuple):
    """A daemon that has granted, blocked and seen an execution."""

    server: RedisServer
    exchange: Exchange
    daemon: Daemon
    client: redis.Redis

    def examine(self, **changed: str) -> dict[str, Check]:
        """Every check by name, under the daemon's settings with some of them changed."""
        return self.run(changed)[0]

    def run(
        self, changed: Mapping[str, str] = MappingProxyType({}), *, full: bool = False, env_file: Path | None = None
    ) -> tuple[dict[str, Check], int]:
        environ = {**self.daemon.environ, **changed}
        checks, code = asyncio.run(doctor.examine(load(environ), environ=environ, full=full, env_file=env_file))
        return {check.name: check for check in checks}, code


@contextmanager
def healthy(kind: Kind, home: Path) -> Iterator[System]:
    with (
        build(kind, appendonly=True) as server,
        Exchange() as exchange,
        server.client() as client,
        pytest.MonkeyPatch.context() as patch,
    ):
        for symbol in ("BTCUSDT", "ETHUSDT", "LTCUSDT"):
            exchange.set(symbol, "0.020", "50000")
        with daemon(
            home, port=server.port, base_url=exchange.base_url, METRICS_PORT=str(free_port()), environ=CREDENTIALS
        ) as one:
            patch.setenv("PATH", one.environ["PATH"])
            one.config.chmod(0o640)
            publish(client, "executed", "BTCUSDT")
            wait_for(lambda: client.delete("quantum:permit:executed"))
            result(client, "executed", "BTCUSDT", "0.005")
            publish(client, "refused", "ETHUSDT", "INCREASE")
            publish(client, "alive", "LTCUSDT")
            wait_for(lambda: events_of(client, "EXECUTION") and len(events_of(client, "DECISION")) == 3)
            wait_for(lambda: one.json("status")["permits"][0]["plan_id"] == "alive")
            yield System(server, exchange, one, client)


@pytest.fixture(scope="module", params=KINDS)
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One for all the faults that can be undone."""
    with healthy(request.param, tmp_path_factory.mktemp("system")) as one:
        yield one


def failed(found: dict[str, Check]) -> set[str]:
    return {name for name, check in found.items() if check.verdict == "fail"}


def test_a_healthy_system_has_nothing_to_do_but_give_redis_a_password(system: System) -> None:
    found, code = system.run()
    assert {name: check for name, check in found.items() if check.verdict not in ("ok", "skip")}.keys() <= {"access"}
    assert {check.verdict for name, check in found.items() if name not in ("service", "log", "alerts")} <= {
        "ok",
        "warn",
    }
    assert code == 0
    assert list(found) == [probe.name for probe in doctor.CHECKS]
    assert "without a password" in found["access"].seen
    assert "all verified" in found["stream"].seen
    assert "LTCUSDT 0.005, 250 USD" in found["permits"].seen
    assert "1 alive" in found["permits"].seen
    assert "1 of the last hour" in found["blocks"].seen
    assert "1 results in the last hour" in found["executions"].seen
    assert "3 open positions" in found["credentials"].seen
    assert "the daemon's too" in found["settings"].seen
    assert "ARMED, epoch 1" in found["state"].seen


def test_nothing_is_written_and_nothing_is_restarted_by_looking(system: System) -> None:
    def all_of_it() -> Any:
        names: Any = system.client.keys("quantum:*")
        held = {name: system.client.dump(name) for name in names if "lease" not in name and "stream" not in name}
        held |= {name: system.client.xinfo_stream(name)["last-generated-id"] for name in names if "stream" in name}
        return held, system.daemon.config.read_bytes(), system.daemon.config.stat().st_mtime_ns

    before = all_of_it()
    system.examine()
    assert all_of_it() == before
    assert not [call for call in system.daemon.systemctl_calls if call.split()[0] != "show"]


def test_no_secret_is_in_what_is_told(system: System) -> None:
    told = system.daemon.command("doctor", BINANCE_TESTNET_API_SECRET="wrong-but-secret")
    assert "wrong-but-secret" not in told.stdout + told.stderr
    assert CREDENTIALS["BINANCE_TESTNET_API_KEY"] not in told.stdout + told.stderr
    assert told.returncode == 1


# --- faults, one at a time ------------------------------------------------------------------------------------------

Fault = Callable[[System], AbstractContextManager[Environ | None]]


class Case(NamedTuple):
    check: str
    verdict: str
    seen: str
    todo: str
    fault: Fault


CASES: dict[str, Case] = {}


def fault(check: str, verdict: str, *, seen: str, todo: str) -> Callable[[Callable[[System], Any]], None]:
    def add(function: Callable[[System], Any]) -> None:
        CASES[function.__name__] = Case(check, verdict, seen, todo, contextmanager(function))

    return add


@fault("redis", "fail", seen="aof_enabled is '0'", todo="AOF on")
def a_server_that_keeps_nothing_although_it_has_to(system: System) -> Iterator[Environ]:
    system.server.ask("CONFIG", "SET", "appendonly", "no")
    yield {"GOV_REQUIRE_DURABLE": "true"}
    system.server.ask("CONFIG", "SET", "appendonly", "yes")


@fault("redis", "warn", seen="maxmemory_policy is 'allkeys-lru'", todo="noeviction")
def a_server_that_evicts(system: System) -> Iterator[None]:
    system.server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    yield
    system.server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


@fault("credentials", "fail", seen="code -1022", todo="correct BINANCE_TESTNET_API_SECRET")
def a_wrong_secret(_system: System) -> Iterator[Environ]:
    yield {"BINANCE_TESTNET_API_SECRET": "another"}


@fault("credentials", "fail", seen="code -2015", todo="BINANCE_TESTNET_API_KEY is unknown")
def a_wrong_key(_system: System) -> Iterator[Environ]:
    yield {"BINANCE_TESTNET_API_KEY": "another"}


@fault("alerts", "fail", seen="number 2 of 2, tgram://…, is none", todo="Correct GOV_ALERT_URLS")
def a_url_for_alerts_that_is_none(_system: System) -> Iterator[Environ]:
    yield {"GOV_ALERT_URLS": "json://127.0.0.1/ tgram://x"}


@fault("exchange", "fail", seen="its clock is +10", todo="Synchronise this host's clock")
def a_clock_far_from_the_exchanges(system: System) -> Iterator[None]:
    system.exchange.sim.skew_ms = 10_400
    yield
    system.exchange.sim.skew_ms = 0


@fault("exchange", "warn", seen="its clock is -2", todo="Synchronise this host's clock")
def a_clock_somewhat_off_the_exchanges(system: System) -> Iterator[None]:
    system.exchange.sim.skew_ms = -2_500
    yield
    system.exchange.sim.skew_ms = 0


@fault("exchange", "fail", seen="told us to stay away for", todo="Wait")
def a_ban_the_daemon_remembers(system: System) -> Iterator[None]:
    path = load(system.daemon.environ).own_journal / "exchange-ban"
    before = len(system.exchange.sim.requests)
    path.write_text(str(time.time_ns() // 1000 + 60_000_000))
    yield
    path.unlink()
    asked = [request for request in list(system.exchange.sim.requests)[before:] if not request.path.endswith("/ping")]
    assert not asked, "whoever is banned does not ask"


@fault("stream", "fail", seen="event 3: its hash does not cover", todo="governor replay names the place")
def an_event_that_was_tampered_with(system: System) -> Iterator[None]:
    entries: Any = system.client.xrange(EVENTS)

    def write(changed: bool) -> None:  # noqa: FBT001
        with system.client.pipeline() as pipe:
            pipe.delete(EVENTS)
            for entry_id, fields in entries:
                data = fields["data"].replace("BTCUSDT", "ETHUSDT") if changed and fields["seq"] == "3" else None
                pipe.xadd(EVENTS, fields | ({} if data is None else {"data": data}), id=entry_id)
            pipe.execute()

    write(changed=True)
    yield
    write(changed=False)


@fault("permits", "fail", seen="quantum:permit:alive lives 6", todo="redis-cli DEL quantum:permit:alive")
def a_permit_that_lives_too_long(system: System) -> Iterator[None]:
    value: Any = system.client.get("quantum:permit:alive")
    system.client.set("quantum:permit:alive", value, ex=600)
    yield
    system.client.set("quantum:permit:alive", value, ex=60)


@fault("permits", "fail", seen="quantum:permit:alive never expires", todo="redis-cli DEL quantum:permit:alive")
def a_permit_that_never_ends(system: System) -> Iterator[None]:
    value: Any = system.client.get("quantum:permit:alive")
    system.client.persist("quantum:permit:alive")
    yield
    system.client.set("quantum:permit:alive", value, ex=60)


@fault("permits", "fail", seen="does not say what its decision said", todo="who may write permits")
def a_permit_for_more_than_was_granted(system: System) -> Iterator[None]:
    value: Any = system.client.get("quantum:permit:alive")
    system.client.set("quantum:permit:alive", value.replace('"computed_qty":0.005', '"computed_qty":5'), keepttl=True)
    yield
    system.client.set("quantum:permit:alive", value, ex=60)


@fault("permits", "fail", seen="quantum:permit:forged names event 1, which did not grant it", todo="who may write")
def a_permit_nobody_granted(system: System) -> Iterator[None]:
    permit = {"granted": True, "plan_id": "forged", "symbol": "BTCUSDT", "seq": 1, "computed_qty": 1, "epoch": 1}
    system.client.set("quantum:permit:forged", json.dumps(permit), ex=50)
    yield
    system.client.delete("quantum:permit:forged")


@fault("permits", "fail", seen="is no permit of Governor's", todo="who may write permits")
def a_permit_of_rubbish(system: System) -> Iterator[None]:
    system.client.set("quantum:permit:rubbish", b"\xff\x00", ex=50)
    yield
    system.client.delete("quantum:permit:rubbish")


@fault("blocks", "fail", seen="quantum:governor:block:refused is missing, expected", todo="Who deletes")
def a_block_record_that_is_gone(system: System) -> Iterator[None]:
    value, left = _taken(system, "quantum:governor:block:refused")
    yield
    system.client.set("quantum:governor:block:refused", value, px=left)


@fault("blocks", "fail", seen="says 'something else', expected unknown_action", todo="Who deletes")
def a_block_record_with_another_reason(system: System) -> Iterator[None]:
    value, left = _taken(system, "quantum:governor:block:refused")
    system.client.set("quantum:governor:block:refused", json.dumps({"reason": "something else"}), px=left)
    yield
    system.client.set("quantum:governor:block:refused", value, px=left)


@fault("executions", "fail", seen="quantum:governor:exec:BTCUSDT is None, expected", todo="governor rebuild")
def an_execution_list_that_is_gone(system: System) -> Iterator[None]:
    values: Any = system.client.lrange("quantum:governor:exec:BTCUSDT", 0, -1)
    system.client.delete("quantum:governor:exec:BTCUSDT")
    yield
    system.client.rpush("quantum:governor:exec:BTCUSDT", *values)


@fault("executions", "fail", seen="quantum:governor:daily:BTCUSDT:", todo="governor rebuild")
def a_daily_total_that_was_changed(system: System) -> Iterator[None]:
    names: Any = system.client.keys("quantum:governor:daily:BTCUSDT:*")
    (name,) = names
    value: Any = system.client.get(name)
    system.client.set(name, "0")
    yield
    system.client.set(name, value)


@fault("state", "fail", seen="quantum:governor:state is", todo="governor rebuild")
def a_state_key_that_says_something_else(system: System) -> Iterator[None]:
    value: Any = system.client.get("quantum:governor:state")
    system.client.set("quantum:governor:state", value.replace("ARMED", "DISARMED"))
    yield
    system.client.set("quantum:governor:state", value)


@fault("settings", "warn", seen="GOV_MAX_EXEC_PER_HOUR '3' -> '9'", todo="Restart to apply")
def settings_on_disk_the_daemon_does_not_have(_system: System) -> Iterator[Environ]:
    yield {"GOV_MAX_EXEC_PER_HOUR": "9"}


@fault("settings", "warn", seen="did you mean GOV_MAX_EXEC_PER_HOUR?", todo="Correct it in the environment")
def a_setting_that_is_none(_system: System) -> Iterator[Environ]:
    yield {"GOV_MAX_EXEC_PER_HOURS": "9"}


@fault("settings", "fail", seen="is open to everybody", todo="chmod o= ")
def a_secret_everybody_may_read(system: System) -> Iterator[Environ]:
    directory = system.daemon.home / "credentials"
    directory.mkdir()
    secret = directory / "BINANCE_TESTNET_API_SECRET"
    secret.write_text(CREDENTIALS["BINANCE_TESTNET_API_SECRET"])
    secret.chmod(0o644)
    yield {"CREDENTIALS_DIRECTORY": str(directory)}
    secret.unlink()
    directory.rmdir()


@fault("apply-layer", "warn", seen="can be read by everybody", todo="chmod o= ")
def an_apply_layers_file_everybody_may_read(system: System) -> Iterator[None]:
    system.daemon.config.chmod(0o644)
    yield
    system.daemon.config.chmod(0o640)


@fault("apply-layer", "fail", seen="NUL byte", todo="Correct it by hand")
def an_apply_layers_file_systemd_refuses(system: System) -> Iterator[None]:
    kept = system.daemon.config.read_bytes()
    system.daemon.config.write_bytes(kept + b"\0")
    yield
    system.daemon.config.write_bytes(kept)


@fault("disarm", "fail", seen="cannot lock /proc/version.lock", todo="but not stop the Apply Layer")
def a_config_directory_that_cannot_be_written(_system: System) -> Iterator[Environ]:
    yield {"APPLY_CONFIG_PATH": "/proc/version"}


@fault("disarm", "fail", seen="cannot connect to GOV_DISARM_SOCKET=", todo="but not stop the Apply Layer")
def a_helper_that_is_not_there(system: System) -> Iterator[Environ]:
    yield {"GOV_DISARM_SOCKET": str(system.daemon.home / "nobody.sock")}


@fault("disarm", "warn", seen="somebody holds the lock", todo="Look again")
def a_disarm_under_way(system: System) -> Iterator[None]:
    with drill._actuator(load(system.daemon.environ)).locked() as taken:
        assert taken
        yield


@fault("disarm", "fail", seen="no systemctl on PATH", todo="cannot be restarted")
def no_systemctl(_system: System) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        yield


@fault("journal", "fail", seen="no slot in", todo="systemctl restart")
def a_journal_slot_that_is_gone(system: System) -> Iterator[None]:
    (slot,) = [path for path in load(system.daemon.environ).own_journal.iterdir() if path.name.isdecimal()]
    aside = slot.rename(slot.with_name("aside"))
    yield
    aside.rename(slot)


@fault("journal", "fail", seen="No such file or directory", todo="GOV_JOURNAL_DIR")
def a_journal_somewhere_else(system: System) -> Iterator[Environ]:
    yield {"GOV_JOURNAL_DIR": str(system.daemon.home / "nothing-here")}


@fault("journal", "fail", seen="it cannot be read", todo="Move the slot's directory away")
def a_damaged_journal(system: System) -> Iterator[None]:
    (segment,) = load(system.daemon.environ).own_journal.glob("*/events-*.log")
    kept = segment.read_bytes()
    with segment.open("r+b") as file:  # the daemon goes on writing into the same file
        file.seek(40)
        file.write(b"X")
    yield
    with segment.open("r+b") as file:
        file.write(kept[:100])


@fault("metrics", "fail", seen="does not answer", todo="METRICS_PORT=")
def another_metrics_port(_system: System) -> Iterator[Environ]:
    yield {"METRICS_PORT": str(free_port())}


@fault("metrics", "fail", seen="/metrics lacks quantum_govern_", todo="something else listens")
def something_else_on_the_metrics_port(_system: System) -> Iterator[Environ]:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"up 1\n" if self.path == "/metrics" else b"hello")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        yield {"METRICS_PORT": str(other.server_port)}
        other.shutdown()
        thread.join()


def _taken(system: System, name: str) -> tuple[Any, int]:
    value, left = system.client.get(name), system.client.pttl(name)
    system.client.delete(name)
    assert isinstance(left, int)
    return value, left


IN_REDIS = ("redis", "stream", "state", "permits", "blocks", "executions")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.check in IN_REDIS])
def test_a_fault_in_redis_is_told_by_its_check_with_what_to_do(system: System, name: str) -> None:
    told_by_its_check(system, CASES[name])


@pytest.mark.parametrize("system", KINDS[:1], indirect=True, scope="module")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.check not in IN_REDIS])
def test_a_fault_elsewhere_is_told_by_its_check_with_what_to_do(system: System, name: str) -> None:
    told_by_its_check(system, CASES[name])


def told_by_its_check(system: System, case: Case) -> None:
    with case.fault(system) as changed:
        found = system.examine(**(changed or {}))
    check = found[case.check]
    assert (check.verdict, case.seen in check.seen) == (case.verdict, True), check
    assert case.todo in (check.todo or ""), check
    assert failed(found) == ({case.check} if case.verdict == "fail" else set()), found


# --- faults that cannot be undone, or are about the whole ------------------------------------------------------------


def test_a_file_set_back_by_hand_while_disarmed_is_told(tmp_path: Path) -> None:
    with healthy("valkey", tmp_path) as system:
        assert system.daemon.command("disarm", "--reason", "test").returncode == 0
        found, code = system.run()
        assert (found["state"].verdict, failed(found), code) == ("warn", set(), 0)
        assert "governor rearm" in (found["state"].todo or "")
        system.daemon.config.write_text("APPLY_MODE=live\n")
        found, code = system.run()
        assert (failed(found), code) == ({"apply-layer"}, 1)
        assert "APPLY_MODE=live" in found["apply-layer"].seen
        assert "governor rearm" in (found["apply-layer"].todo or "")


def test_a_daemon_that_hangs_and_a_plan_nobody_reads(tmp_path: Path) -> None:
    with healthy("valkey", tmp_path) as system:
        assert system.daemon.process is not None
        system.daemon.process.send_signal(signal.SIGSTOP)
        try:
            entry_id = publish(system.client, "waits", "BTCUSDT")
            wait_for(lambda: time.time() * 1000 - int(entry_id.split("-")[0]) > 20)
            found, code = system.run({"GOV_MAX_PLAN_AGE_SEC": "0.01"})
        finally:
            system.daemon.process.send_signal(signal.SIGCONT)
        assert (failed(found), code) == ({"metrics", "plans"}, 1)
        assert ", the oldest for" in found["plans"].seen


def test_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    with healthy("valkey", tmp_path) as system:
        system.daemon.stop()
        found, code = system.run()
        assert (failed(found), code) == ({"metrics"}, 1)
        entry_id = publish(system.client, "waits", "BTCUSDT")
        wait_for(lambda: time.time() * 1000 - int(entry_id.split("-")[0]) > 20)
        found, _ = system.run({"GOV_MAX_PLAN_AGE_SEC": "0.01"})
        assert failed(found) == {"metrics", "plans"}
        assert "unread plans, the oldest for" in found["plans"].seen
        assert "plans: 0 pending, 1 unread" in found["plans"].seen
        assert "Is the daemon running" in (found["metrics"].todo or "")


def test_without_redis_the_rest_is_told_and_the_exit_code_is_4(tmp_path: Path) -> None:
    with healthy("valkey", tmp_path) as system:
        system.server.kill()
        done = system.daemon.command("doctor", "--json")
        told = json.loads(done.stdout)
        verdicts = {check["name"]: check["verdict"] for check in told["checks"]}
        assert done.returncode == 4
        assert told["ok"] is False
        assert verdicts["redis"] == "fail"
        assert verdicts["exchange"] == verdicts["credentials"] == verdicts["disarm"] == "ok"
        assert {verdicts[name] for name in ("stream", "permits", "blocks", "executions", "plans")} == {"skip"}
        (check,) = [check for check in told["checks"] if check["name"] == "redis"]
        assert "Bring it back" in check["todo"]
        assert check.keys() == {"name", "verdict", "seen", "todo"}


def test_a_redis_that_hangs_is_given_up(new_server: NewServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WITHIN_S", 0.3)
    server = new_server("valkey")
    environ = {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(server.port), "HOME": str(tmp_path), "METRICS_PORT": "0"}
    os.kill(server.pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        checks, code = asyncio.run(doctor.examine(load(environ), environ=environ))
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert code == 4
    assert time.monotonic() - began < 3
    assert {check.name: check.verdict for check in checks}["redis"] == "fail"


def test_a_wrong_redis_password_says_so(new_server: NewServer, tmp_path: Path) -> None:
    server = new_server("valkey")
    server.ask("CONFIG", "SET", "requirepass", "right")
    environ = {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(server.port), "HOME": str(tmp_path), "METRICS_PORT": "0"}
    for password in ("", "wrong"):
        mine = environ | {"REDIS_PASSWORD": password}
        checks, code = asyncio.run(doctor.examine(load(mine), environ=mine))
        check = {check.name: check for check in checks}["redis"]
        assert (check.verdict, code) == ("fail", 4)
        assert "REDIS_PASSWORD" in (check.todo or "")


def test_an_empty_redis_says_that_no_daemon_has_run(new_server: NewServer, tmp_path: Path) -> None:
    server = new_server("valkey")
    environ = {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(server.port), "HOME": str(tmp_path), "METRICS_PORT": "0"}
    checks, code = asyncio.run(doctor.examine(load(environ), environ=environ))
    found = {check.name: check for check in checks}
    assert code == 1
    assert "no daemon has ever run here" in found["stream"].seen
    assert found["plans"].verdict == "fail"
    assert found["permits"].verdict == "skip"


def test_a_bad_setting_ends_with_78() -> None:
    told = CliRunner().invoke(main, ["doctor"], env={"GOV_MAX_EXEC_PER_HOUR": "many"})
    assert told.exit_code == 78
    assert "GOV_MAX_EXEC_PER_HOUR is 'many'" in told.output


def test_one_check_that_breaks_or_hangs_does_not_take_the_others_along(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(_look: Look, found: Findings) -> None:
        found.ok("so far")
        raise LookupError("nobody thought of this")

    async def hangs(_look: Look, _found: Findings) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(doctor, "WITHIN_S", 0.5)
    environ = system.daemon.environ
    broken = (doctor.Probe("breaks", breaks), doctor.Probe("hangs", hangs), doctor.Probe("breaks too", breaks, "state"))
    checks, code = asyncio.run(doctor.examine(load(environ), environ=environ, probes=(*doctor.CHECKS, *broken)))
    found = {check.name: check for check in checks}
    assert code == 1
    assert failed(found) == {"breaks", "hangs", "breaks too"}
    assert "LookupError: nobody thought of this" in found["breaks"].seen
    assert "so far" in found["breaks"].seen
    assert "no answer within 0.5 s" in found["hangs"].seen


def test_the_whole_history_is_verified_where_it_is_asked_for(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("governor.checks.store.LAST", 3)
    found, _ = system.run()
    assert "the last 3 verified" in found["stream"].seen
    found, _ = system.run(full=True)
    assert "all verified" in found["stream"].seen


@pytest.mark.parametrize(
    ("mode", "content", "verdict", "seen"),
    [
        (0o640, "BINANCE_TESTNET_API_KEY=k\n", "ok", "mode 0640"),
        (0o644, "GOV_LOG_LEVEL=INFO\n", "warn", "can be read by everybody"),
        (0o644, "BINANCE_TESTNET_API_KEY=k\n", "fail", "holds BINANCE_TESTNET_API_KEY"),
        (0o660, "GOV_LOG_LEVEL=INFO\n", "fail", "can be written by others"),
    ],
)
def test_who_may_read_and_write_the_settings_file(
    system: System, tmp_path: Path, *, mode: int, content: str, verdict: str, seen: str
) -> None:
    path = tmp_path / "governor.env"
    path.write_text(content)
    path.chmod(mode)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    found, _ = system.run(env_file=path)
    assert (found["settings"].verdict, seen in found["settings"].seen) == (verdict, True), found["settings"]


# --- with systemd and a journal, as far as a stand-in can say it --------------------------------------------------

HEALTHY_UNIT = {
    "LoadState": "loaded", "ActiveState": "active", "SubState": "running", "Result": "success", "NRestarts": "0",
    "ActiveEnterTimestamp": "Mon", "ActiveEnterTimestampMonotonic": "1", "User": "quantum-governor",
    "WatchdogUSec": "20s", "OnFailure": "quantum-governor-deadman.service", "NeedDaemonReload": "no",
}  # fmt: skip


@pytest.mark.parametrize(
    ("unit", "verdict", "seen", "todo"),
    [
        ({}, "ok", "as quantum-governor", ""),
        ({"LoadState": "not-found"}, "warn", "is not installed here", "install.sh"),
        ({"ActiveState": "failed", "Result": "start-limit-hit"}, "fail", "start-limit-hit", "systemctl start"),
        ({"User": ""}, "warn", "runs as root", "quantum-governor"),
        ({"WatchdogUSec": "0"}, "warn", "no watchdog", "WatchdogSec="),
        ({"OnFailure": ""}, "warn", "leaves the Apply Layer trading", "install.sh"),
        ({"NeedDaemonReload": "yes"}, "warn", "changed on disk", "daemon-reload"),
        ({"NRestarts": "4", "ActiveEnterTimestampMonotonic": "now"}, "warn", "restarted by systemd 4", "journalctl"),
    ],
    ids=["healthy", "missing", "failed", "root", "no-watchdog", "no-deadman", "reload", "restarts"],
)
def test_the_service_as_systemd_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, unit: dict[str, str], verdict: str, seen: str, todo: str
) -> None:
    told = HEALTHY_UNIT | unit
    if told["ActiveEnterTimestampMonotonic"] == "now":
        told["ActiveEnterTimestampMonotonic"] = str(int(time.monotonic() * 1e6))
    stand_in(tmp_path, "systemctl", "\n".join(f"{name}={value}" for name, value in told.items()))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = alone("service")
    assert (check.verdict, seen in check.seen, todo in (check.todo or "")) == (verdict, True, True), check


@pytest.mark.parametrize(
    ("entries", "verdict", "seen"),
    [
        ([{"MESSAGE": json.dumps({"event": "decided", "level": "info"}), "PRIORITY": "6"}], "ok", "no error"),
        (
            [{"MESSAGE": json.dumps({"event": "sweep failed", "error": "gone", "level": "error"}), "PRIORITY": "6"}],
            "warn",
            "1 errors in the last hour, the last one: sweep failed gone",
        ),
        ([{"MESSAGE": "Failed with result 'watchdog'.", "PRIORITY": "3"}], "warn", "result 'watchdog'"),
        ([{"MESSAGE": [1, 2], "PRIORITY": "6"}, {"MESSAGE": "plain"}], "ok", "2 lines"),
        ([], "skip", "no line"),
    ],
    ids=["info", "error", "priority", "odd", "none"],
)
def test_errors_in_the_log_are_told_by_level_or_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, entries: list[dict[str, Any]], verdict: str, seen: str
) -> None:
    stand_in(tmp_path, "journalctl", "\n".join(map(json.dumps, entries)))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = alone("log")
    assert (check.verdict, seen in check.seen) == (verdict, True), check


@pytest.mark.parametrize(
    ("unit", "verdict", "seen"),
    [
        ("LoadState=not-found", "fail", "there is no quantum-apply-layer.service"),
        ("LoadState=loaded\nEnvironmentFiles=/other (ignore_errors=no)", "warn", "does not name"),
        ("LoadState=loaded\nActiveState=failed", "warn", "is failed"),
        ("LoadState=loaded\nMainPID={pid}", "warn", "has live"),
        ("LoadState=loaded", "ok", "APPLY_MODE=testnet"),
    ],
    ids=["no-unit", "another-file", "failed", "another-mode", "healthy"],
)
def test_the_apply_layers_unit_and_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, unit: str, verdict: str, seen: str
) -> None:
    config = tmp_path / "apply-layer.env"
    config.write_text("APPLY_MODE=testnet\n")
    config.chmod(0o640)
    with subprocess.Popen(["sleep", "60"], env={"APPLY_MODE": "live", "PATH": os.environ["PATH"]}) as process:
        wait_for(lambda: b"APPLY_MODE" in Path(f"/proc/{process.pid}/environ").read_bytes())
        named = f"EnvironmentFiles={config} (ignore_errors=no)\n"
        stand_in(tmp_path, "systemctl", named + unit.format(pid=process.pid))
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        check = alone("apply-layer", APPLY_CONFIG_PATH=str(config))
        process.kill()
    assert (check.verdict, seen in check.seen) == (verdict, True), check


@pytest.mark.parametrize(
    ("answer", "verdict", "seen"),
    [
        ('{"lock":"taken"}\n', "ok", "the lock was taken and given back"),
        ('{"lock":"busy"}\n', "warn", "somebody holds the lock"),
        ('{"lock":"failed","error":"the directory is gone"}\n', "fail", "the directory is gone"),
        ("nonsense\n", "fail", "the helper answered"),
        ("", "fail", "ended without an answer"),
    ],
    ids=["taken", "busy", "failed", "nonsense", "nothing"],
)
def test_the_helper_is_asked_for_its_lock_and_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, answer: str, verdict: str, seen: str
) -> None:
    stand_in(tmp_path, "systemctl", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    received: list[bytes] = []

    def serve() -> None:
        one, _ = listening.accept()
        with one:
            one.sendall(answer.encode())
            if answer:
                received.append(one.recv(1000))

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        check = alone("disarm", GOV_DISARM_SOCKET=str(tmp_path / "s"), APPLY_CONFIG_PATH=str(tmp_path / "apply.env"))
        thread.join()
    assert (check.verdict, seen in check.seen) == (verdict, True), check
    assert received == ([b""] if answer else []), "a reason would disarm"


def stand_in(directory: Path, name: str, output: str) -> None:
    (directory / "output").write_text(output + "\n" if output else "")
    program = directory / name
    program.write_text(f"#!/bin/sh\ncat {directory}/output\n")
    program.chmod(0o755)


def alone(name: str, **environ: str) -> Check:
    """One check that needs no Redis."""
    given = {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": "1", "HOME": "/nowhere", **environ}
    probes = [probe for probe in doctor.CHECKS if probe.name == name]
    ((check,), _) = asyncio.run(doctor.examine(load(given), environ=given, probes=probes))
    return check


# --- the drill ------------------------------------------------------------------------------------------------------


def test_a_drill_disarms_times_and_arms_again(tmp_path: Path) -> None:
    with healthy("redis7", tmp_path) as system:
        told = system.daemon.command("doctor", "--drill", "--yes", "--restore", "--json", SUDO_USER="ann")
        assert told.returncode == 0, told.stderr + told.stdout
        drilled = json.loads(told.stdout)
        assert drilled["state"] == "ARMED"
        steps = {step["step"]: step["seconds"] for step in drilled["steps"]}
        assert list(steps) == [
            "disarmed", "permits gone", "file says dry run", "service restarted and verified", "armed again",
            "Apply Layer put back",
        ]  # fmt: skip
        assert all(isinstance(seconds, float) and 0 <= seconds < 10 for seconds in steps.values()), steps
        assert steps["disarmed"] <= steps["service restarted and verified"]
        assert "APPLY_MODE=testnet" in system.daemon.config.read_text()
        assert not system.client.keys("quantum:permit:*")
        (disarmed,) = events_of(system.client, "MANUAL_DISARM")
        (rearmed,) = events_of(system.client, "REARMED")
        assert {(event["reason"], event["operator"]) for event in (disarmed, rearmed)} == {("drill", "ann")}
        assert sum(call.startswith("restart") for call in system.daemon.systemctl_calls) == 2
        assert failed(system.examine()) == set()


def test_a_drill_leaves_dry_run_where_it_is_not_told_otherwise(tmp_path: Path) -> None:
    with healthy("valkey", tmp_path) as system:
        told = system.daemon.command("doctor", "--drill", "--yes")
        assert told.returncode == 0, told.stderr
        assert "APPLY_MODE=dry_run" in system.daemon.config.read_text()
        assert "to trade again set APPLY_MODE" in told.stdout
        assert events_of(system.client, "REARMED")


def test_a_drill_that_cannot_force_dry_run_ends_disarmed_and_says_so(tmp_path: Path) -> None:
    with healthy("valkey", tmp_path) as system:
        (system.daemon.home / "fails").write_text("1")
        told = system.daemon.command("doctor", "--drill", "--yes", "--json")
        drilled = json.loads(told.stdout)
        assert told.returncode == 1
        assert "ended DISARMED" in drilled["message"]
        assert "systemctl restart" in drilled["message"]
        assert not events_of(system.client, "REARMED")


def test_a_drill_does_not_arm_what_somebody_else_stopped_meanwhile(tmp_path: Path) -> None:
    with healthy("valkey", tmp_path) as system:
        settings = load(system.daemon.environ)
        assert system.daemon.process is not None

        def somebody_else() -> None:
            wait_for(lambda: events_of(system.client, "DISARM_STARTED"))
            system.client.set("quantum:governor:halt", "stop it all")

        async def drilled() -> dict[str, Any]:
            before = await drill.prepare(settings, restore=False)
            both = (drill.carry_out(settings, before, operator="ann", restore=False), asyncio.to_thread(somebody_else))
            told: dict[str, Any] = (await asyncio.gather(*both))[0]
            return told

        system.daemon.process.send_signal(signal.SIGSTOP)  # it would take the brake away
        told = asyncio.run(drilled())
        system.daemon.process.send_signal(signal.SIGCONT)
        assert told["code"] == 1
        assert "stop it all" in told["message"] or "emergency brake" in told["message"]
        assert not events_of(system.client, "REARMED")


def test_there_is_no_drill_while_disarmed_halted_or_without_asking(tmp_path: Path) -> None:
    with healthy("valkey", tmp_path) as system:
        system.daemon.stop()
        nobody = system.daemon.command("doctor", "--drill")
        assert (nobody.returncode, "--yes" in nobody.stderr) == (2, True)
        system.client.set("quantum:governor:halt", "stop")
        halted = system.daemon.command("doctor", "--drill", "--yes")
        assert (halted.returncode, "the emergency brake is set (stop)" in halted.stderr) == (1, True)
        system.client.delete("quantum:governor:halt")
        assert system.daemon.command("disarm", "--reason", "test").returncode == 0
        disarmed = system.daemon.command("doctor", "--drill", "--yes")
        assert (disarmed.returncode, "expected ARMED or THROTTLED" in disarmed.stderr) == (1, True)
        assert not events_of(system.client, "REARMED")


@pytest.mark.parametrize("words", [["--yes"], ["--restore"], ["--drill", "--full"]], ids=" ".join)
def test_options_that_do_not_belong_together_are_a_usage_error(words: list[str]) -> None:
    assert CliRunner().invoke(main, ["doctor", *words]).exit_code == 2


def on_a_terminal(system: System, *answers: str) -> tuple[int, str]:
    """The drill with a person at a terminal; exit code and what they saw."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "governor", "doctor", "--drill"]
    with subprocess.Popen(command, env=system.daemon.environ, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, "".join(f"{answer}\n" for answer in answers).encode())
        seen = b""
        with contextlib.suppress(OSError):  # the terminal's end
            while piece := os.read(ours, 4096):
                seen += piece
        code = process.wait(30)
    os.close(ours)
    return code, seen.decode()


def test_a_person_is_told_what_a_drill_does_and_has_to_type_it(tmp_path: Path) -> None:
    with healthy("valkey", tmp_path) as system:
        code, seen = on_a_terminal(system, "yes")
        assert (code, "nothing was done" in seen) == (1, True)
        assert "1 outstanding permits die" in seen
        assert "APPLY_MODE=dry_run (it says testnet)" in seen
        assert not events_of(system.client, "DISARM_STARTED")
        code, seen = on_a_terminal(system, "drill", "n")
        assert (code, "Set APPLY_MODE back to testnet at the end?" in seen) == (0, True)
        assert "service restarted and verified" in seen
        assert "APPLY_MODE=dry_run" in system.daemon.config.read_text()


# --- the proof ------------------------------------------------------------------------------------------------------


def proof(system: System, **environ: str) -> tuple[int, str]:
    command = system.daemon.home / "bin" / "governor"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m governor "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(
        [ROOT / "deploy" / "proof.sh"],
        env=system.daemon.environ | {"GOVERNOR": str(command)} | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_proof_shows_everything_and_ends_with_the_worst_code(tmp_path: Path) -> None:
    with healthy("redis7", tmp_path) as system:
        code, told = proof(system)
        assert code == 0, told
        assert [line for line in told.splitlines() if line.startswith("== ")] == [
            "== what is installed", "== units", "== checks", "== state", "== audit", "== the last of the log",
            "== result",
        ]  # fmt: skip
        for expected in ("version      governor, version", "ok    permits", "ARMED", "no differences", "all well"):
            assert expected in told
        assert not [secret for secret in CREDENTIALS.values() if secret in told]
        code, told = proof(system, BINANCE_TESTNET_API_SECRET="another")
        assert (code, "NOT WELL (exit code 1)" in told) == (1, True)
        system.server.kill()
        code, told = proof(system)
        assert (code, "NOT WELL (exit code 4)" in told) == (4, True)


def test_a_proof_without_the_command_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "deploy" / "proof.sh"], env={"PATH": os.environ["PATH"], "GOVERNOR": str(tmp_path / "none")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "is Governor installed?" in done.stderr) == (1, True)
