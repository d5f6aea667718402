"""Root's helper for a disarm, its client, the dead man's run, and the notes they leave.

The script under test is the one that is deployed, with another place to look for systemctl and shorter waits.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import pwd
import re
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.codec import decode
from events.types import DisarmStarted, ManualDisarm, Rearmed
from governor import envfile, helper
from governor.actuator import Actuator, ActuatorError, Pending, PendingNote, Proof
from governor.helper import Helper, actuator_of, hand_of_a_person, line_of, note_to_write, notes_of
from governor.ledger import Proposal
from governor.settings import SettingsError, load, load_for_stop
from tests.conftest import NewServer, missing
from tests.daemon import daemon, events_of, publish, wait_for
from tests.servers import Kind, RedisServer
from tests.test_service import running

SCRIPT = Path(__file__).parents[1] / "deploy/libexec/quantum-governor-disarm"
SERVICE = "quantum-apply-layer.service"
LIVE = b"# keys of caf\xe9\nAPI_KEY='a APPLY_MODE=b'\r\nAPPLY_MODE=testnet\nTAIL=1"
DRY = b"# keys of caf\xe9\nAPI_KEY='a APPLY_MODE=b'\r\nAPPLY_MODE=dry_run\nTAIL=1"
PYTHON = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
UP = "LoadState=loaded\nActiveState=active\nInvocationID={0}\nMainPID={1}\n"
DOWN = "LoadState=loaded\nActiveState=inactive\nInvocationID=\nMainPID=0\n"
SYSTEMCTL = """#!/bin/sh
cd '{directory}'
echo "$*" >> calls
[ -e "hang-$1" ] && exec sleep 600
[ -e "fail-$1" ] && {{ cat "fail-$1" >&2; exit 1; }}
case $1 in
show) cat shown ;;
restart)
    [ -e then-restart ] && . ./then-restart
    echo x >> n; sed "s/=bb$/&$(wc -l < n)/" shown-after > shown; exit 0 ;;
stop) printf '%b' '{down}' > shown ;;
esac
"""


def _constant(value: str, found: re.Match[str]) -> str:
    return found[1] + value


def adapted(place: Path, **constants: str) -> Path:
    """The script with other constants, each of which it must have once."""
    source = SCRIPT.read_text()
    for name, value in constants.items():
        source, count = re.subn(rf"(?m)^({re.escape(name)} = ).*$", partial(_constant, value), source)
        assert count == 1, name
    place.write_text(source)
    return place


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script's functions."""
    loader = importlib.machinery.SourceFileLoader("quantum_governor_disarm", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


class Host:
    """A file, a stand-in systemctl told by files what to do, and a socket that starts the script as systemd does."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = home / "etc" / "apply-layer.env"
        self.config.parent.mkdir(mode=0o755)
        self.config.write_bytes(LIVE)
        self.config.chmod(0o640)
        self.bin = home / "bin"
        self.bin.mkdir()
        (self.bin / "systemctl").write_text(SYSTEMCTL.format(directory=self.bin, down=DOWN.replace("\n", "\\n")))
        (self.bin / "systemctl").chmod(0o755)
        self.tell("shown", UP.format("aa", 0))
        self.tell("shown-after", UP.format("bb", 0))
        self.script = home / "disarm"
        self.environ = {"APPLY_CONFIG_PATH": str(self.config), "APPLY_SERVICE": SERVICE, "PATH": "/nowhere"}
        self.socket = home / "sock"
        self.log = home / "stderr"
        self.use()
        self._children: list[subprocess.Popen[bytes]] = []
        self._listening: socket.socket | None = None

    def use(self, *, restart_s: float = 10.0, silence_s: float = 10.0, lock_s: float = 5.0) -> None:
        adapted(
            self.script,
            PATH=repr(f"{self.bin}:/usr/bin:/bin"),
            **{
                "SILENCE_S, GOODBYE_S, LOCK_S, AGAIN_S": f"{silence_s}, 5.0, {lock_s}, 0.05",
                "SHOW_S, RESTART_S, SETTLE_S": f"3.0, {restart_s}, 0.0",
            },
        )

    def tell(self, name: str, content: str | bytes = "") -> None:
        (self.bin / name).write_bytes(content.encode() if isinstance(content, str) else content)

    @property
    def calls(self) -> list[str]:
        calls = self.bin / "calls"
        return [line.partition(" -p")[0] for line in calls.read_text().splitlines()] if calls.exists() else []

    @property
    def backups(self) -> list[Path]:
        return sorted(self.config.parent.glob(f"{self.config.name}.bak.*"))

    @property
    def leftovers(self) -> set[str]:
        kept = {self.config.name, f"{self.config.name}.lock", *(path.name for path in self.backups)}
        return {path.name for path in self.config.parent.iterdir()} - kept

    def helper(self, **options: Any) -> Helper:
        return Helper(self.socket, config_path=self.config, service=SERVICE, **options)

    def disarm(self, reason: str = "drill") -> Proof:
        one = self.helper()
        with one.locked() as taken:
            assert taken
            return one.force_dry_run(reason)

    def failure(self) -> ActuatorError:
        with pytest.raises(ActuatorError) as caught:
            self.disarm()
        return caught.value

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PYTHON, "-I", self.script, *words],
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    @contextlib.contextmanager
    def listening(self, environ: dict[str, str] | None = None) -> Iterator[None]:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(self.socket))
            listening.listen()
            thread = threading.Thread(target=self._accept, args=(listening, environ or self.environ))
            thread.start()
            try:
                yield
            finally:
                listening.shutdown(socket.SHUT_RDWR)
                thread.join()
                for child in self._children:
                    child.kill()
                    child.wait()

    def _accept(self, listening: socket.socket, environ: dict[str, str]) -> None:
        with self.log.open("ab") as log:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    command = [PYTHON, "-I", str(self.script)]
                    end = connection.fileno()
                    child = subprocess.Popen(command, stdin=end, stdout=end, stderr=log, env=environ)
                self._children.append(child)


@pytest.fixture
def quiet(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def host(quiet: Host) -> Iterator[Host]:
    with quiet.listening():
        yield quiet


@contextlib.contextmanager
def sleeping(**environ: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], **environ}) as process:
        try:
            yield process
        finally:
            process.kill()


def ask(host: Host, *lines: bytes) -> list[dict[str, Any]]:
    """What the helper answers to these bytes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(host.socket))
        with connection.makefile("rb") as file:
            answers = [json.loads(file.readline())]
            for line in lines:
                connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # it left what it does not take unread
                for line in file:
                    answers.append(json.loads(line))  # noqa: PERF401 - what came before the reset is kept
    return answers


# -- what it writes --------------------------------------------------------------------------------------------------

TOKENS = st.sampled_from(
    [
        *(b"APPLY_MODE=", b"APPLY_MODE", b"B=", b" ", b"\t", b"=", b"\n", b"\r\n", b"\r", b"\\", b"'", b'"', b"#"),
        *(b";", b"x", b"\xe9", b"\0", b"dry_run", b"APPLY_MODE=live", b"\nAPPLY_MODE=live", b"#\\\n", b"\\\n"),
        *(b"\nAPPLY_MODE = dry_run\n", b"\n\tAPPLY_MODE='dry_run' \n", b"export APPLY_MODE=live\n", b"\nB='", b'\nB="'),
    ]
)
FILES = st.lists(TOKENS, max_size=20).map(b"".join) | st.binary(max_size=60)


def others(data: bytes, *, since_254: bool) -> list[tuple[bytes, bytes]]:
    return [pair for pair in envfile._pairs(data, since_254=since_254) if pair[0] != b"APPLY_MODE"]


@given(FILES)
@settings(max_examples=800, deadline=None)
def test_what_it_writes_is_dry_run_to_every_systemd_or_it_refuses(script: ModuleType, data: bytes) -> None:
    try:
        result = script.with_dry_run(data)
    except OSError:
        return
    assert envfile.readings(result, "APPLY_MODE") == ("dry_run", "dry_run")
    assert envfile.refusal(result) is None
    assert script.with_dry_run(result) == result
    for since_254 in (False, True):
        assert others(result, since_254=since_254) == others(data, since_254=since_254)
    if result == data:
        assert [
            pair for pair in envfile._pairs(data, since_254=False) if pair not in others(data, since_254=False)
        ] == [(b"APPLY_MODE", b"dry_run")]


VALUES = st.text("aZ0 =#;\t'\"\\$é-", max_size=12).map(str.strip)


@given(st.lists(VALUES, max_size=6), st.sampled_from([b"\n", b"\r\n"]), st.sampled_from([b"", b"\n"]))
def test_whatever_values_are_quoted_as_they_should_be_it_does_not_refuse(
    script: ModuleType, values: list[str], end: bytes, last: bytes
) -> None:
    plain = [re.sub(r"[\\\"$]", r"\\\g<0>", value) for value in values]
    lines = [f'V{number}="{value}"'.encode() for number, value in enumerate(plain)]
    data = end.join([b"APPLY_MODE=live", b"# it's \xe9", *lines]) + last
    result = script.with_dry_run(data)
    assert result == data.replace(b"=live", b"=dry_run", 1)
    assert [value.decode() for _, value in others(result, since_254=True)] == values


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (LIVE, DRY),
        (b"", b"APPLY_MODE=dry_run\n"),
        (b"X=1", b"APPLY_MODE=dry_run\nX=1"),
        (b"X=1\r\nY=2\r\n", b"APPLY_MODE=dry_run\r\nX=1\r\nY=2\r\n"),
        (b"APPLY_MODE=live", b"APPLY_MODE=dry_run"),
        (b"A=1\n\t APPLY_MODE = live \nB=2\n", b"A=1\nAPPLY_MODE=dry_run\nB=2\n"),
        (b"A=1\nAPPLY_MODE=a\nB=2\n  APPLY_MODE = x\nC=3", b"A=1\nAPPLY_MODE=dry_run\nB=2\nC=3"),
        (b"APPLY_MODE=live\nAPPLY_MODE=dry_run\n", b"APPLY_MODE=dry_run\n"),
        (b"APPLY_MODE=dry_run\nAPPLY_MODE=dry_run\n", b"APPLY_MODE=dry_run\n"),
        (b"APPLY_MODE=a\r\nAPPLY_MODE=b\r\nX=1", b"APPLY_MODE=dry_run\r\nX=1"),
        (b"X=1\rAPPLY_MODE=a\rY=2", b"X=1\rAPPLY_MODE=dry_run\rY=2"),
        (b"#APPLY_MODE=x\nexport APPLY_MODE=x\n", b"APPLY_MODE=dry_run\n#APPLY_MODE=x\nexport APPLY_MODE=x\n"),
        (b"APPLY_MODE=live # was dry_run\n", b"APPLY_MODE=dry_run\n"),
        (b'X=it\'s "quoted" inside\nAPPLY_MODE=live\n', b'X=it\'s "quoted" inside\nAPPLY_MODE=dry_run\n'),
        (b'X={"a": "\\n"}\nAPPLY_MODE="live"\n', b'X={"a": "\\n"}\nAPPLY_MODE=dry_run\n'),
    ],
)
def test_it_changes_the_mode_and_not_one_other_byte(script: ModuleType, data: bytes, result: bytes) -> None:
    assert script.with_dry_run(data) == result


@pytest.mark.parametrize(
    "data",
    [
        b"APPLY_MODE=dry_run\n",
        b"A=1\n  APPLY_MODE = dry_run \nB=2",
        b"APPLY_MODE='dry_run'\n",
        b'APPLY_MODE="dry_run" \r\n',
    ],
)
def test_a_file_that_says_dry_run_once_stays_as_it_is(script: ModuleType, data: bytes) -> None:
    assert script.with_dry_run(data) == data


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"X='never closed\n", 1),
        (b"X='closed\nbelow'\n", 1),
        (b'A=1\nX="never closed\\"\n', 2),
        (b"X='one' 'never closed\n", 1),
        (b"=='never closed\n", 1),
        (b"X=1\\", 1),
        (b"X=1\\\r\nAPPLY_MODE=live\r\n", 1),
        (b"A=1\n# note \\\nAPPLY_MODE=live\n", 2),
        (b"# note \\", 1),
        (b"A=1\nX=caf\xe9\n", 2),
        (b"A=1\n# a NUL: \0\n", 2),
    ],
)
def test_a_line_that_systemd_may_not_read_by_itself_is_refused_with_its_number(
    script: ModuleType, data: bytes, line: int
) -> None:
    with pytest.raises(OSError, match=f"apply-layer.env line {line} has an open quote, a backslash"):
        script.with_dry_run(data)


def test_a_long_file_takes_no_quadratic_time(script: ModuleType) -> None:
    started = time.process_time()
    for data in (b"X='" + b'a\\"$ \n' * 50_000, b"#\\x\n" * 100_000, b'X="' + b"\\\\" * 200_000, b"a" * 500_000):
        with contextlib.suppress(OSError):
            script.with_dry_run(data)
    assert time.process_time() - started < 2


def test_it_needs_nothing_newer_than_python_3_9() -> None:
    compile(SCRIPT.read_text(), str(SCRIPT), "exec", dont_inherit=True)
    import ast  # noqa: PLC0415

    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 9))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= sys.stdlib_module_names
    assert SCRIPT.read_text().startswith("#!/usr/bin/python3 -I\n")
    assert os.access(SCRIPT, os.X_OK)


# -- what a disarm does ----------------------------------------------------------------------------------------------


def test_the_file_is_rewritten_a_backup_stays_and_the_service_is_restarted(host: Host) -> None:
    proof = host.disarm("burst_limit_breach")
    (backup,) = host.backups
    assert (host.config.read_bytes(), backup.read_bytes()) == (DRY, LIVE)
    assert re.fullmatch(r"apply-layer\.env\.bak\.\d{8}T\d{6}Z", backup.name)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (host.config, backup)] == [0o640, 0o640]
    assert host.leftovers == set()
    assert host.calls == [f"show {SERVICE}", f"reset-failed {SERVICE}", f"restart {SERVICE}", f"show {SERVICE}"]
    assert proof == Proof(
        backup=str(backup),
        apply_mode="dry_run",
        service=SERVICE,
        invocation_before="aa",
        invocation_after="bb1",
        active_state="active",
        notes=(f"{SERVICE} is active, without a process whose environment can be read",),
        seconds=proof.seconds,
    )
    assert 0 < proof.seconds < 5
    assert "disarm (burst_limit_breach): {" in wait_for(host.log.read_text)


def test_the_environment_of_the_new_process_is_read(host: Host) -> None:
    with sleeping(APPLY_MODE="dry_run") as process:
        host.tell("shown-after", UP.format("bb", process.pid))
        proof = host.disarm()
    assert (proof.main_pid, proof.environ_mode, proof.notes) == (process.pid, "dry_run", ())


@pytest.mark.parametrize(
    ("mode", "named", "seen"),
    [("live", "other", "has APPLY_MODE=live"), (None, "ours", "has APPLY_MODE=None")],
    ids=["overridden", "not-loaded"],
)
def test_a_process_that_does_not_run_dry_is_stopped(host: Host, mode: str | None, named: str, seen: str) -> None:
    with sleeping(**({"APPLY_MODE": mode} if mode else {})) as process:
        files = f"EnvironmentFiles={host.config} (ignore_errors=no)\n" if named == "ours" else ""
        host.tell("shown-after", UP.format("bb", process.pid) + files)
        error = host.failure()
    assert error.step == "verify"
    assert f"process {process.pid} {seen}" in str(error)
    assert f"{SERVICE} was stopped, which is safe, but not dry run" in str(error)
    assert (error.proof.active_state, error.proof.apply_mode) == ("inactive", "dry_run")
    assert host.calls[-2:] == [f"stop {SERVICE}", f"show {SERVICE}"]
    again = host.disarm()
    assert (again.active_state, again.apply_mode) == ("inactive", "dry_run")
    assert "is left so" in again.notes[0]
    assert host.calls.count(f"restart {SERVICE}") == 1


def test_a_service_that_does_not_run_is_not_started(host: Host) -> None:
    for state in ("inactive", "failed"):
        host.tell("shown", DOWN.replace("inactive", state))
        proof = host.disarm()
        assert proof.active_state == state
        assert proof.notes == (f"{SERVICE} was {state} and is left so: it neither trades nor runs",)
    assert host.config.read_bytes() == DRY
    assert not [call for call in host.calls if not call.startswith("show")]


def test_a_service_that_systemd_does_not_know_is_no_service_that_is_down(host: Host) -> None:
    host.tell("shown", DOWN.replace("loaded", "not-found"))
    host.tell("shown-after", DOWN.replace("loaded", "not-found"))
    host.tell("fail-restart", "Unit not found.\n")
    host.tell("fail-stop", "Unit not loaded.\n")
    error = host.failure()
    assert error.step == "restart"
    assert "(Unit not found.)" in str(error)
    assert (
        "COULD NOT BE STOPPED and is inactive, stop it by hand (systemctl stop ended with 1 (Unit not loaded.))"
        in str(error)
    )
    assert host.config.read_bytes() == DRY


def test_a_restart_that_fails_ends_in_a_stop(host: Host) -> None:
    host.tell("fail-restart", "Job failed.\n" + "x" * 5000)
    error = host.failure()
    assert (error.step, error.proof.active_state) == ("restart", "inactive")
    assert "restart: systemctl restart ended with 1 (Job failed. xxx" in str(error)
    assert len(str(error)) < 1000
    assert error.proof.backup == str(host.backups[0])


def test_a_restart_without_an_answer_ends_in_a_stop(host: Host) -> None:
    host.use(restart_s=0.2)
    host.tell("hang-restart")
    with sleeping(APPLY_MODE="testnet") as process:
        host.tell("shown", UP.format("aa", process.pid))
        error = host.failure()
    assert error.step == "restart"
    assert "systemctl restart gave no answer within 0.2 s" in str(error)
    assert "was stopped" in str(error)


def test_a_stop_that_takes_its_time_is_told_as_that(host: Host) -> None:
    host.use(restart_s=0.2)
    host.tell("shown", UP.format("aa", 0).replace("=active", "=deactivating"))
    for verb in ("restart", "stop"):
        host.tell(f"hang-{verb}")
    error = host.failure()
    assert (error.step, error.proof.active_state) == ("restart", "deactivating")
    assert f"{SERVICE} COULD NOT BE STOPPED and is deactivating, stop it by hand" in str(error)


def test_a_slow_start_of_a_process_that_is_in_dry_run_is_no_reason_to_stop_it(host: Host) -> None:
    host.tell("then-restart", "cp shown-after shown; exec sleep 600")
    host.use(restart_s=0.3)
    with sleeping(APPLY_MODE="dry_run") as process:
        host.tell("shown-after", UP.format("bb", process.pid))
        proof = host.disarm()
    assert proof.environ_mode == "dry_run"
    assert "gave no answer within 0.3 s; the process is a new one, in dry run" in proof.notes[0]
    assert f"stop {SERVICE}" not in host.calls


def test_the_same_invocation_is_no_restart(host: Host) -> None:
    host.tell("shown-after", UP.format("aa", 0))
    error = host.failure()
    assert (error.step, "still invocation aa" in str(error)) == ("verify", True)
    assert host.calls[-2] == f"stop {SERVICE}"


@pytest.mark.parametrize(
    ("content", "step", "seen"),
    [
        (None, "read", "No such file or directory: '{}'"),
        (b"APPLY_MODE=live\nX='open\n", "write", "{} line 2 has an open quote"),
        (b"APPLY_MODE=live\nX=\xe9\n", "write", "{} line 2 has an open quote, a backslash at its end, NUL or no UTF-8"),
        (b"x" * ((1 << 20) + 1), "read", "{} is not a regular file of at most 1048576 bytes"),
    ],
    ids=["missing", "open-quote", "not-utf-8", "huge"],
)
def test_a_file_that_cannot_be_set_stays_as_it_is_is_told_before_and_the_service_is_stopped(
    host: Host, content: bytes | None, step: str, seen: str
) -> None:
    if content is None:
        host.config.unlink()
    else:
        host.config.write_bytes(content)
    one = host.helper()
    with one.locked() as taken:
        assert (taken, seen.format(host.config) in str(one.problem)) == (True, True)
        with pytest.raises(ActuatorError) as caught:
            one.force_dry_run("drill")
    error = caught.value
    assert (error.step, seen.format(host.config) in str(error)) == (step, True), str(error)
    assert host.calls == [f"stop {SERVICE}", f"show {SERVICE}"]
    assert error.proof.active_state == "inactive"
    assert content is None or host.config.read_bytes() == content
    assert host.backups == []


def test_a_fifo_in_the_place_of_the_file_is_not_waited_for(host: Host) -> None:
    host.config.unlink()
    os.mkfifo(host.config)
    assert "is not a regular file" in str(host.failure())


def test_a_file_written_back_by_somebody_else_is_no_proof(host: Host) -> None:
    host.tell("live", LIVE)
    host.tell("then-restart", f"cp live '{host.config}'")
    error = host.failure()
    assert (error.step, "find out what else writes it" in str(error)) == ("verify", True)
    assert error.proof.apply_mode is None


def test_without_systemctl_the_file_is_done_all_the_same(host: Host) -> None:
    adapted(host.script, PATH="'/nowhere'")
    error = host.failure()
    assert error.step == "restart"
    assert "No such file or directory: 'systemctl'" in str(error)
    assert "COULD NOT BE STOPPED" in str(error)
    assert host.config.read_bytes() == DRY


def test_a_second_disarm_makes_no_second_backup_and_an_armed_file_gets_its_own(host: Host) -> None:
    first = host.disarm().backup
    assert host.disarm().backup is None
    host.config.write_bytes(LIVE + b"1")
    second = host.disarm().backup
    assert [str(path) for path in host.backups] == sorted([str(first), str(second)])


def test_a_try_that_ended_before_the_rewrite_has_left_its_backup(host: Host) -> None:
    kept = host.config.with_name(f"{host.config.name}.bak.19700101T000000Z")
    kept.write_bytes(LIVE)
    (host.config.parent / f".{host.config.name}.tmp").write_bytes(b"half")
    assert host.disarm().backup == str(kept)
    assert (host.backups, host.leftovers) == ([kept], set())


def test_a_symbolic_link_stays_and_its_target_is_rewritten(host: Host) -> None:
    target = host.home / "real" / "live.env"
    target.parent.mkdir(mode=0o755)
    host.config.rename(target)
    host.config.symlink_to("../real/live.env")
    proof = host.disarm()
    assert host.config.is_symlink()
    assert target.read_bytes() == DRY
    assert proof.backup is not None
    assert Path(proof.backup).parent == host.config.parent
    assert {path.name for path in target.parent.iterdir()} == {"live.env", "live.env.lock"}


def test_owner_and_group_are_kept_and_the_lock_is_roots_alone(host: Host) -> None:
    if os.geteuid() != 0:
        missing("only root can give files to another user")
    os.chown(host.config, 12345, 23456)
    with Actuator(config_path=host.config, service=SERVICE, clock=lambda: 0).locked():
        Path(f"{host.config}.lock").chmod(0o644)
    host.disarm()
    for path in (host.config, host.backups[0]):
        assert (path.stat().st_uid, path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (12345, 23456, 0o640)
    lock = Path(f"{host.config}.lock").stat()
    assert (lock.st_uid, stat.S_IMODE(lock.st_mode)) == (0, 0o600)


def test_an_access_list_is_kept_so_that_the_group_gets_no_more(host: Host) -> None:
    # user::rw-, user:12345:r--, group::---, mask::r--, other::---; the mode shows the mask where the group's bits are.
    entries = ((0x01, 6, 2**32 - 1), (0x02, 4, 12345), (0x04, 0, 2**32 - 1), (0x10, 4, 2**32 - 1), (0x20, 0, 2**32 - 1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(host.config, "system.posix_acl_access", acl)
    except OSError:
        missing("this file system has no access lists")
    host.disarm()
    for path in (host.config, *host.backups):
        assert os.getxattr(path, "system.posix_acl_access") == acl


@pytest.mark.parametrize("place", ["etc", "."])
def test_root_does_not_rewrite_where_others_may_put_links_and_stops_the_service_instead(host: Host, place: str) -> None:
    (host.home / place).chmod(0o777)
    one = host.helper()
    assert not one.answers()
    with one.locked() as taken:
        assert taken
        assert "can be written by others than root" in str(one.problem)
        with pytest.raises(ActuatorError, match=r"can be written by others than root.* was stopped") as caught:
            one.force_dry_run("drill")
    assert caught.value.step == "lock"
    assert host.config.read_bytes() == LIVE
    assert host.calls == [f"stop {SERVICE}", f"show {SERVICE}"]
    (host.home / place).chmod(0o755)


# -- what can be asked of it -----------------------------------------------------------------------------------------


def test_a_connection_that_is_closed_gives_the_lock_back_and_nothing_is_done(host: Host) -> None:
    one = host.helper()
    with one.locked() as taken:
        assert taken
        with host.helper().locked() as also:
            assert not also
    wait_for(lambda: host.helper().answers() and free(host))
    assert (host.config.read_bytes(), host.calls) == (LIVE, [])


def free(host: Host) -> bool:
    with host.helper().locked() as taken:
        return taken


def test_the_lock_is_the_one_that_governor_disarm_takes_and_is_kept_until_they_close(host: Host) -> None:
    here = Actuator(config_path=host.config, service=SERVICE, clock=lambda: 0)
    with here.locked() as mine:
        assert mine
        assert ask(host) == [{"lock": "busy"}]
    one = host.helper()
    with one.locked():
        one.force_dry_run("drill")
        with here.locked() as mine:
            assert not mine
    wait_for(lambda: unlocked(here))


def unlocked(here: Actuator) -> bool:
    with here.locked() as mine:
        return mine


def test_silence_gives_the_lock_back(host: Host) -> None:
    host.use(silence_s=0.1)
    one = host.helper()
    with one.locked() as taken:
        assert taken
        wait_for(lambda: unlocked(Actuator(config_path=host.config, service=SERVICE, clock=lambda: 0)))
        with pytest.raises(ActuatorError, match=r"lock was held too long|ended without an answer"):
            one.force_dry_run("too late")
    assert host.config.read_bytes() == LIVE


@pytest.mark.parametrize(
    "line",
    [
        *(
            b"\n",
            b"x" * 201 + b"\n",
            b"x" * 5000,
            b"half",
            b"a\tb\n",
            b"\x1b[31mred\n",
            b"\xff\xfe\n",
            b"a\0b\n",
            b"a\rb\n",
        ),
        "\N{RIGHT-TO-LEFT OVERRIDE}x\n".encode(),
    ],
    ids=["empty", "long", "endless", "half", "tab", "escape", "not-utf-8", "nul", "return", "override"],
)
def test_nothing_but_one_bounded_printable_line_is_taken(host: Host, line: bytes) -> None:
    answers = ask(host, line)
    assert answers[0] == {"lock": "taken"}
    assert answers[1:] == [
        {
            "service": SERVICE,
            "step": "helper",
            "error": "no reason: expected one line of 1 to 200 printable characters, UTF-8; nothing was done",
        }
    ]
    assert (host.config.read_bytes(), host.calls) == (LIVE, [])


def test_what_is_said_decides_nothing_and_more_lines_are_not_read(host: Host) -> None:
    (taken, done) = ask(host, b'$(touch /pwned) APPLY_MODE=live "; {}\nAPPLY_MODE=live\nagain\n')
    assert (taken, done["apply_mode"], "error" in done) == ({"lock": "taken"}, "dry_run", False)
    assert host.config.read_bytes() == DRY
    assert host.calls.count(f"restart {SERVICE}") == 1


def test_a_disarm_is_finished_although_who_asked_is_gone(host: Host) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(host.socket))
        assert connection.recv(100) == b'{"lock": "taken"}\n'
        connection.sendall(b"killed\n")
    wait_for(lambda: host.config.read_bytes() == DRY and host.calls[-2:-1] == [f"restart {SERVICE}"])


def test_many_at_once_make_one_backup_and_one_restart_each_that_had_the_lock(host: Host) -> None:
    done: list[Proof] = []

    def attempt() -> None:
        one = host.helper()
        with one.locked() as taken:
            if taken:
                done.append(one.force_dry_run("flood"))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(host.backups) == 1
    assert len(done) == host.calls.count(f"restart {SERVICE}") >= 1


def test_a_path_that_is_not_absolute_is_told_and_the_service_stopped(quiet: Host) -> None:
    with quiet.listening(quiet.environ | {"APPLY_CONFIG_PATH": "etc/file"}):
        first, done = ask(quiet, b"drill\n")
    assert first == {"lock": "failed", "error": "APPLY_CONFIG_PATH is 'etc/file', expected an absolute path"}
    assert done["step"] == "lock"
    assert quiet.calls == [f"stop {SERVICE}", f"show {SERVICE}"]


@pytest.mark.parametrize("name", ["--force", "a b", "x\n", "*"], ids=["option", "space", "newline", "pattern"])
def test_what_is_no_name_of_a_unit_never_gets_to_systemctl_and_the_file_is_done(quiet: Host, name: str) -> None:
    with quiet.listening(quiet.environ | {"APPLY_SERVICE": name}):
        _, done = ask(quiet, b"drill\n")
    assert (done["step"], done["apply_mode"]) == ("restart", "dry_run")
    assert done["error"].startswith(
        f"APPLY_SERVICE is {name!r}, expected the name of a unit; {name} COULD NOT BE STOPPED"
    )
    assert quiet.calls == []
    assert quiet.config.read_bytes() == DRY


def test_a_wrong_word_on_its_command_line_does_nothing(quiet: Host) -> None:
    done = quiet.run("--deadmen")
    assert (done.returncode, quiet.calls) == (1, [])
    assert "--deadman" in done.stderr


# -- the dead man's run ----------------------------------------------------------------------------------------------


def note_of(home: Path) -> Pending:
    found = PendingNote.at(home / "state" / "disarm-pending").read_pending()
    assert found is not None
    return found


def test_the_dead_mans_run_disarms_and_leaves_a_note_that_everybody_may_read(quiet: Host) -> None:
    state = quiet.home / "state"
    state.mkdir()
    (state / "disarm-pending").write_text("an old one")
    before = time.time_ns() // 1000
    done = quiet.run("--deadman", STATE_DIRECTORY=str(state))
    assert (done.returncode, done.stdout) == (0, "")
    assert "disarm (governor cannot be kept up)" in done.stderr
    assert quiet.config.read_bytes() == DRY
    note = note_of(quiet.home)
    assert (note.reason, note.operator, note.context) == ("governor cannot be kept up", "systemd", {})
    assert before <= note.timestamp_us <= time.time_ns() // 1000
    assert note.proof is not None
    assert (note.proof.apply_mode, note.proof.invocation_after) == ("dry_run", "bb1")
    assert [(path.name, stat.S_IMODE(path.stat().st_mode)) for path in state.iterdir()] == [("disarm-pending", 0o644)]


def test_the_dead_mans_run_does_not_wait_for_ever_for_the_lock(quiet: Host) -> None:
    quiet.use(lock_s=0.1)
    (quiet.home / "state").mkdir()
    with Actuator(config_path=quiet.config, service=SERVICE, clock=lambda: 0).locked():
        done = quiet.run("--deadman", STATE_DIRECTORY=str(quiet.home / "state"))
    assert done.returncode == 0
    assert quiet.config.read_bytes() == DRY


def test_where_the_dead_mans_run_can_only_stop_the_service_its_note_has_no_proof(quiet: Host) -> None:
    (quiet.home / "state").mkdir()
    quiet.config.write_bytes(b"X='open\n")
    assert quiet.run("--deadman", STATE_DIRECTORY=str(quiet.home / "state")).returncode == 1
    assert note_of(quiet.home).proof is None
    assert quiet.calls == [f"stop {SERVICE}", f"show {SERVICE}"]


@pytest.mark.parametrize("ends", ["governor", "stopped"])
def test_the_dead_mans_run_tries_until_it_is_stopped_or_the_governor_is_back(quiet: Host, ends: str) -> None:
    (quiet.home / "state").mkdir()
    quiet.tell("fail-restart")
    quiet.tell("fail-stop")
    quiet.tell("fail-is-active")
    command = [PYTHON, "-I", str(quiet.script), "--deadman"]
    environ = quiet.environ | {"STATE_DIRECTORY": str(quiet.home / "state")}
    with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: quiet.calls.count(f"restart {SERVICE}") >= 2)
        (quiet.bin / ("fail-is-active" if ends == "governor" else "fail-stop")).unlink()
        assert process.wait(10) == 1
    assert "is-active quantum-governor.service" in quiet.calls


def test_a_note_that_cannot_be_left_is_told_and_the_disarm_done_all_the_same(quiet: Host) -> None:
    done = quiet.run("--deadman", STATE_DIRECTORY=str(quiet.home / "nowhere"))
    assert done.returncode == 0
    assert "cannot leave a note for the governor" in done.stderr
    assert quiet.config.read_bytes() == DRY


# -- the client ------------------------------------------------------------------------------------------------------


def test_each_way_not_to_get_an_answer_says_what_to_do(quiet: Host) -> None:
    with pytest.raises(ActuatorError, match=r"cannot connect .*No such file.*restart quantum-governor-disarm.socket"):
        quiet.disarm()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(quiet.socket))
    with pytest.raises(ActuatorError, match=r"Connection refused.*restart quantum-governor-disarm.socket") as caught:
        quiet.disarm()
    assert caught.value.step == "helper"
    assert caught.value.proof == Proof(service=SERVICE)
    quiet.socket.unlink()
    with quiet.listening():
        quiet.script.write_text("import sys; sys.exit(1)")
        with pytest.raises(ActuatorError, match="ended without an answer; look at journalctl"):
            quiet.disarm()
        quiet.script.write_text("print('what?')")
        with pytest.raises(ActuatorError, match="answered b'what"):
            quiet.disarm()
        quiet.script.write_text('print(\'{"lock":"taken"}\', flush=True); input()')
        with pytest.raises(ActuatorError, match="ended without an answer"):
            quiet.disarm()
        quiet.script.write_text("input()")
        with (
            pytest.raises(ActuatorError, match=r"gave no answer within 0.1 s \(timed out\)"),
            quiet.helper(lock_s=0.1).locked(),
        ):
            pass
        assert not quiet.helper(lock_s=0.1).answers()


def test_forcing_without_the_lock_is_refused(quiet: Host) -> None:
    with pytest.raises(ActuatorError, match="for who has the lock"):
        quiet.helper().force_dry_run("drill")


def test_another_user_may_not_connect(host: Host) -> None:
    if os.geteuid() != 0:
        missing("only root can become another user")
    nobody = pwd.getpwnam("nobody").pw_uid
    host.socket.chmod(0o600)
    for path in (host.home, *host.home.parents):
        if path.stat().st_uid == 0 and not path.stat().st_mode & 0o001:
            path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o001)
    told = host.home / "told"
    child = os.fork()
    if child == 0:
        os.setuid(nobody)
        try:
            assert not host.helper().permitted()
            host.disarm()
        except ActuatorError as error:
            os._exit(0 if "Permission denied" in str(error) and "SocketUser=" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not told.exists()
    assert host.calls == []


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("bad fills", b"bad fills\n"),
        ("two\nlines\tand \x1b[31m", b"two lines and  [31m\n"),
        ("", b"no reason given\n"),
        (" \n ", b"no reason given\n"),
        ("x" * 500, b"x" * 200 + b"\n"),
        ("é" * 500, "é".encode() * 200 + b"\n"),
        ("a\udcffb\N{REPLACEMENT CHARACTER}", b"a?b?\n"),
    ],
)
def test_whatever_a_person_wrote_becomes_a_line_the_helper_takes(script: ModuleType, reason: str, line: bytes) -> None:
    assert line_of(reason) == line


@given(st.text(max_size=300))
def test_every_reason_is_taken(reason: str) -> None:
    text = line_of(reason).decode()
    assert text.endswith("\n")
    assert 1 <= len(text[:-1]) <= 200
    assert text[:-1].isprintable()


def test_the_mode_is_read_without_the_helper(quiet: Host) -> None:
    assert quiet.helper().apply_mode() == "testnet"


# -- who does it -----------------------------------------------------------------------------------------------------


def given_settings(quiet: Host, **more: str) -> Any:
    return load({"APPLY_CONFIG_PATH": str(quiet.config), "STATE_DIRECTORY": str(quiet.home / "own"), **more})


def test_the_settings_choose_who_disarms(quiet: Host) -> None:
    alone = actuator_of(given_settings(quiet))
    assert isinstance(alone, Actuator)
    assert alone.describe() == ("in-process as root" if os.geteuid() == 0 else f"in-process as uid {os.geteuid()}")
    helped = actuator_of(given_settings(quiet, GOV_DISARM_SOCKET="/run/x.sock"))
    assert isinstance(helped, Helper)
    assert helped.describe() == "helper at /run/x.sock"
    assert load_for_stop({"GOV_DISARM_SOCKET": "/run/x.sock"}).disarm_socket == Path("/run/x.sock")
    for wrong, why in (("run/x", "an absolute path"), ("/" + "x" * 107, "at most 107 bytes")):
        with pytest.raises(SettingsError, match=f"^GOV_DISARM_SOCKET is '{wrong}', expected .*{why}"):
            load({"GOV_DISARM_SOCKET": wrong})


def test_a_person_who_may_write_the_file_does_it_where_the_helper_does_not_answer(
    quiet: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = given_settings(quiet, GOV_DISARM_SOCKET=str(quiet.socket))
    assert isinstance(hand_of_a_person(chosen), Actuator)
    monkeypatch.setattr(helper, "writable", lambda _settings: False)
    assert isinstance(hand_of_a_person(chosen), Helper)
    monkeypatch.undo()
    with quiet.listening():
        assert isinstance(hand_of_a_person(chosen), Helper)
        quiet.config.parent.chmod(0o777)
        assert isinstance(hand_of_a_person(chosen), Actuator), "the helper could only stop the service"


def test_where_notes_lie(quiet: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = given_settings(quiet, GOV_DISARM_SOCKET="/run/x.sock")
    beside, own = Path(f"{quiet.config}.disarm-pending"), quiet.home / "own" / "disarm-pending"
    deadman = Path("/var/lib/quantum-governor-disarm/disarm-pending")
    assert [note.path for note in notes_of(chosen)] == [beside, own, deadman]
    assert [note.path for note in notes_of(chosen, deadman=Path("/x"))][2] == Path("/x")
    assert note_to_write(chosen).path == beside
    monkeypatch.setattr(helper, "writable", lambda _settings: False)
    assert note_to_write(chosen).path == own
    assert note_to_write(given_settings(quiet)).path == beside


# -- notes that stay -------------------------------------------------------------------------------------------------


class StuckNote(PendingNote):
    """One in a directory that is somebody else's."""

    tries = 0

    def clear_pending(self, told: Pending) -> None:
        self.tries += 1
        raise PermissionError(13, "Permission denied")


def leave(path: Path, at: int, *, proof: bool = True) -> None:
    told = Pending(
        reason="governor cannot be kept up",
        context={},
        operator="systemd",
        timestamp_us=at,
        proof=Proof(service=SERVICE, apply_mode="dry_run") if proof else None,
    )
    path.write_bytes(msgspec.json.encode(told))


async def test_a_note_that_cannot_be_removed_is_told_once_and_does_no_harm(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        stuck = StuckNote.at(tmp_path / "note")
        one.governor.outside.notes = (PendingNote(tmp_path / "apply-layer.env"), stuck)
        leave(stuck.path, 1_000)
        one.deliver(one.plan("halted", "BTCUSDT", "UPDATE_SL"))
        await one.settled()
        assert [d.reason for d in one.decisions()] == ["halted"]
        for _ in range(5):
            await one.governor._sweep()
        events = [decode(entry).event for entry in one.store.entries]
        told = [event for event in events if isinstance(event, DisarmStarted | ManualDisarm)]
        assert [(e.NAME, e.operator) for e in told] == [("DISARM_STARTED", "systemd"), ("MANUAL_DISARM", "systemd")]
        assert one.ledger.state.mode.state == "DISARMED"
        assert stuck.tries == 1
        await one.ledger.submit(lambda state, _now: Proposal([rearmed(state.mode.epoch)]))
        for _ in range(5):
            await one.governor._sweep()
        one.governor._kept.clear()  # as after a restart
        await one.governor._sweep()
        one.deliver(one.plan("again", "BTCUSDT", "UPDATE_SL"))
        await one.settled()
        assert one.ledger.state.mode.state == "ARMED"
        assert [d.verdict for d in one.decisions()] == ["BLOCK", "EXECUTE"]
        leave(stuck.path, 2_000)
        await one.governor._sweep()
        assert one.ledger.state.mode.state == "DISARMED"


def rearmed(epoch: int) -> Rearmed:
    return Rearmed(reason="looked", operator="ann", epoch=epoch + 1, forced=False)


async def test_two_notes_are_both_told_and_what_may_be_removed_is(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        stuck, own = StuckNote.at(tmp_path / "note"), PendingNote.at(tmp_path / "own")
        one.governor.outside.notes = (own, stuck)
        leave(own.path, 1_000)
        leave(stuck.path, 2_000)
        await one.governor._sweep()
        assert one.ledger.state.noted == (1_000, 2_000)
        assert not own.path.exists()


async def test_a_note_that_stays_is_told_after_a_disarm_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a governor that starts after the re-arm would take it for news."""
    async with running(tmp_path) as one:
        stuck = StuckNote.at(tmp_path / "note")
        one.governor.outside.notes = (stuck,)
        started = DisarmStarted(reason="burst_limit_breach", context={}, epoch=2, manual=False)
        await one.ledger.submit(lambda _state, _now: Proposal([started]))
        leave(stuck.path, 1_000)
        for _ in range(3):
            await one.governor._sweep()
        assert not one.ledger.state.noted
        proven = ManualDisarm(reason="x", context={}, action_taken="x", epoch=2, operator="x", proof={})
        await one.ledger.submit(lambda _state, _now: Proposal([proven]))
        for _ in range(3):
            await one.governor._sweep()
        assert one.ledger.state.noted == (1_000,)


# -- the whole of it -------------------------------------------------------------------------------------------------


def disarming_through(quiet: Host, tmp_path: Path) -> dict[str, str]:
    """Settings of a daemon whose file and service are those of the helper."""
    return {
        "APPLY_CONFIG_PATH": str(quiet.config),
        "GOV_DISARM_SOCKET": str(quiet.socket),
        "STATE_DIRECTORY": str(tmp_path / "own"),
    }


@pytest.fixture
def valkey(running_server: Callable[[Kind], RedisServer]) -> RedisServer:
    """A server emptied, where its kind is of no matter."""
    server = running_server("valkey")
    server.ask("FLUSHALL")
    return server


@pytest.fixture
def elsewhere(tmp_path: Path) -> Host:
    home = tmp_path / "host"
    home.mkdir()
    return Host(home)


def test_a_burst_is_disarmed_through_the_helper_and_the_proof_recorded(
    flushed: RedisServer, elsewhere: Host, tmp_path: Path
) -> None:
    given = disarming_through(elsewhere, tmp_path)
    with (
        flushed.client() as client,
        elsewhere.listening(),
        daemon(tmp_path, port=flushed.port, environ=given, GOV_FALLBACK_QTY="0.001") as one,
    ):
        assert f'"disarm": "helper at {elsewhere.socket}"' in one.log
        for number in range(3):
            publish(client, f"eth-{number}", "ETHUSDT")
        (done,) = wait_for(lambda: events_of(client, "AUTO_DISARM"))
        assert done["reason"] == "burst_limit_breach"
        assert (done["proof"]["apply_mode"], done["proof"]["invocation_after"]) == ("dry_run", "bb1")
        assert done["proof"]["backup"] == str(elsewhere.backups[0])
        assert elsewhere.config.read_bytes() == DRY
        assert elsewhere.calls.count(f"restart {SERVICE}") == 1
        assert one.systemctl_calls == [], "the daemon itself touches nothing"
        assert "disarm (burst_limit_breach)" in elsewhere.log.read_text()


def test_a_helper_that_is_not_there_is_told_and_tried_again_until_it_is(
    valkey: RedisServer, elsewhere: Host, tmp_path: Path
) -> None:
    given = disarming_through(elsewhere, tmp_path)
    with valkey.client() as client, daemon(tmp_path, port=valkey.port, environ=given):
        client.set("quantum:governor:halt", "stop")
        (failed, *_) = wait_for(lambda: events_of(client, "DISARM_FAILED"))
        assert (failed["step"], failed["attempt"]) == ("helper", 1)
        assert "restart quantum-governor-disarm.socket" in failed["error"]
        with elsewhere.listening():
            (done,) = wait_for(lambda: events_of(client, "MANUAL_DISARM"))
        assert done["proof"]["apply_mode"] == "dry_run"


def test_a_service_that_could_only_be_stopped_is_told_so_and_then_proven(
    valkey: RedisServer, elsewhere: Host, tmp_path: Path
) -> None:
    elsewhere.tell("fail-restart", "Job failed.")
    with (
        valkey.client() as client,
        elsewhere.listening(),
        daemon(tmp_path, port=valkey.port, environ=disarming_through(elsewhere, tmp_path)),
    ):
        client.set("quantum:governor:halt", "stop")
        (failed,) = wait_for(lambda: events_of(client, "DISARM_FAILED"))
        assert failed["step"] == "restart"
        assert "was stopped, which is safe, but not dry run" in failed["error"]
        (done,) = wait_for(lambda: events_of(client, "MANUAL_DISARM"))
        assert done["proof"]["active_state"] == "inactive"


def test_a_person_disarms_through_the_helper_with_and_without_redis(
    new_server: NewServer, elsewhere: Host, tmp_path: Path
) -> None:
    server = new_server("valkey", appendonly=True)
    with (
        elsewhere.listening(),
        daemon(tmp_path, port=server.port, environ=disarming_through(elsewhere, tmp_path)) as one,
    ):
        server.kill()
        told = one.command("disarm", "--reason", "redis is gone")
        assert told.returncode == 4, told.stderr
        assert elsewhere.config.read_bytes() == DRY
        assert "disarm (redis is gone)" in elsewhere.log.read_text()
        note = Path(f"{elsewhere.config}.disarm-pending")
        assert note.exists() or os.geteuid() != 0
        server.restart()
        with server.client() as client:
            (done,) = wait_for(lambda: events_of(client, "MANUAL_DISARM"), within_s=20)
            assert (done["reason"], done["proof"]["apply_mode"]) == ("redis is gone", "dry_run")
            wait_for(lambda: not note.exists())
            elsewhere.config.write_bytes(LIVE)
            again = one.command("disarm", "--reason", "by hand", "--json")
            assert json.loads(again.stdout)["done"] is True
            assert elsewhere.config.read_bytes() == DRY
        assert one.systemctl_calls == []


def test_root_disarms_itself_where_the_helper_does_not_answer(
    valkey: RedisServer, elsewhere: Host, tmp_path: Path
) -> None:
    with valkey.client() as client, daemon(tmp_path, port=valkey.port) as one:
        one.stop()
        told = one.command("disarm", "--reason", "night", **disarming_through(elsewhere, tmp_path))
        assert told.returncode == 0, told.stdout + told.stderr
        assert events_of(client, "MANUAL_DISARM")
    assert elsewhere.config.read_bytes() == DRY
    assert one.systemctl_calls.count(f"restart {SERVICE}") == 1


def test_a_re_arm_removes_the_note_that_the_daemon_could_not(
    valkey: RedisServer, elsewhere: Host, tmp_path: Path
) -> None:
    with (
        valkey.client() as client,
        elsewhere.listening(),
        daemon(tmp_path, port=valkey.port, environ=disarming_through(elsewhere, tmp_path)) as one,
    ):
        note = Path(f"{elsewhere.config}.disarm-pending")
        leave(note, 1_000)
        wait_for(lambda: events_of(client, "MANUAL_DISARM") and not note.exists())
        leave(note, 1_000)
        one.stop()
        assert one.command("rearm", "--reason", "looked").returncode == 0
        assert not note.exists()
