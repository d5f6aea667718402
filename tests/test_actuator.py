import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from governor import actuator, envfile
from governor.actuator import Actuator, ActuatorError, Pending, PendingNote, Proof
from tests.conftest import missing

SERVICE = "quantum-apply-layer.service"
NOW_US = 1_769_207_000_123_456
STAMP = "20260123T222320Z"
LIVE = b"# keys of caf\xe9\nAPI_KEY='a\nAPPLY_MODE=b'\r\nAPPLY_MODE=testnet\nTAIL=1"
DRY = b"# keys of caf\xe9\nAPI_KEY='a\nAPPLY_MODE=b'\r\nAPPLY_MODE=dry_run\nTAIL=1"

SYSTEMCTL = """#!/bin/sh
cd '{directory}'
echo "$*" >> calls
case $1 in
show) [ -e hang-show ] && exec sleep 600; [ -e fail-show ] && exit 1; cat shown 2>&1 ;;
reset-failed) exit 1 ;;
restart)
  cp '{config}' at-restart
  [ -e hang ] && {{ sleep 600; }}
  [ -e keeps-stdout ] && {{ sleep 600 & echo $! > background; }}
  [ -e rewrites ] && cp rewrites '{config}'
  [ -e removes ] && rm '{config}'
  [ -e shown-after ] && cp shown-after shown
  [ -e fail ] && {{ cat fail >&2; exit 1; }}
  exit 0 ;;
esac
"""


class Systemctl:
    """A stand-in on PATH, told by files what to do."""

    def __init__(self, directory: Path, config: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.path = directory / "systemctl"
        self.path.write_text(SYSTEMCTL.format(directory=directory, config=config))
        self.path.chmod(0o755)

    def tell(self, name: str, content: str | bytes = "") -> None:
        (self.directory / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def show(self, before: str, after: str) -> None:
        self.tell("shown", before)
        self.tell("shown-after", after)

    @property
    def calls(self) -> list[str]:
        calls = self.directory / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    @property
    def restarts(self) -> int:
        return self.calls.count(f"restart {SERVICE}")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    directory = tmp_path / "etc"
    directory.mkdir()
    path = directory / "apply-layer.env"
    path.write_bytes(LIVE)
    path.chmod(0o640)
    return path


@pytest.fixture
def systemctl(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> Systemctl:
    stand_in = Systemctl(tmp_path / "bin", config)
    monkeypatch.setenv("PATH", f"{stand_in.directory}:{os.environ['PATH']}")
    monkeypatch.setattr(Actuator, "settle_s", 0.0)
    return stand_in


def ownership(proof: Proof) -> tuple[str, ...]:
    return tuple(note for note in proof.notes if "systemctl" not in note)


def new(config: Path, **options: Any) -> Actuator:
    return Actuator(**{"config_path": config, "service": SERVICE, "clock": lambda: NOW_US, **options})


def backups(config: Path) -> list[Path]:
    return sorted(config.parent.glob(f"{config.name}.bak.*"))


def leftovers(config: Path) -> list[str]:
    kept = {config.name, f"{config.name}.lock", f"{config.name}.disarm-pending", *(b.name for b in backups(config))}
    return sorted({path.name for path in config.parent.iterdir()} - kept)


def failure(act: Actuator) -> ActuatorError:
    with pytest.raises(ActuatorError) as caught:
        act.force_dry_run()
    assert str(caught.value).startswith(f"{caught.value.step}: ")
    assert caught.value.proof.service == SERVICE
    return caught.value


def wait_for_a_later_ctime(path: Path) -> None:
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        path.chmod(stat.S_IMODE(path.stat().st_mode))


# --- what a disarm does ---------------------------------------------------------------------------------------------


def test_the_file_says_dry_run_a_backup_stays_and_the_service_is_restarted(config: Path, systemctl: Systemctl) -> None:
    systemctl.show("InvocationID=aa\n", "InvocationID=bb\nActiveState=active\nMainPID=0\n")
    proof = new(config).force_dry_run()
    backup = Path(f"{config}.bak.{STAMP}")
    assert config.read_bytes() == DRY
    assert backup.read_bytes() == LIVE
    assert stat.S_IMODE(config.stat().st_mode) == stat.S_IMODE(backup.stat().st_mode) == 0o640
    assert leftovers(config) == []
    show = f"show {SERVICE} -p InvocationID -p ActiveState -p MainPID -p EnvironmentFiles"
    assert systemctl.calls == [show, f"reset-failed {SERVICE}", f"restart {SERVICE}", show]
    assert (systemctl.directory / "at-restart").read_bytes() == DRY
    assert proof == Proof(
        backup=str(backup),
        apply_mode="dry_run",
        service=SERVICE,
        invocation_before="aa",
        invocation_after="bb",
        active_state="active",
        main_pid=None,
        environ_mode=None,
        seconds=proof.seconds,
    )
    assert 0 < proof.seconds < 10


def test_a_proof_survives_json() -> None:
    proof = Proof(service=SERVICE, main_pid=3, notes=("owner was 0, is 7",))
    assert msgspec.json.decode(msgspec.json.encode(proof), type=Proof) == proof


@pytest.mark.parametrize("silence", [None, "fail-show", "hang-show"])
def test_a_systemctl_that_can_only_restart_is_enough(
    config: Path, systemctl: Systemctl, silence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actuator, "_SHORT_TIMEOUT_S", 0.05 if silence == "hang-show" else 3.0)
    if silence is not None:
        systemctl.tell(silence)
    proof = new(config).force_dry_run()
    assert config.read_bytes() == DRY
    assert (proof.apply_mode, proof.invocation_before, proof.invocation_after) == ("dry_run", None, None)
    assert (proof.active_state, proof.main_pid, proof.environ_mode) == (None, None, None)


@pytest.mark.parametrize("junk", ["no equals\n\xff", "MainPID=none\nActiveState=\n", "MainPID=-3\n", "=\n=x\n"])
def test_junk_from_systemctl_show_counts_as_no_answer(config: Path, systemctl: Systemctl, junk: str) -> None:
    systemctl.tell("shown", junk)
    proof = new(config).force_dry_run()
    assert (proof.invocation_before, proof.active_state, proof.main_pid) == (None, None, None)


def test_a_service_that_the_stand_in_starts_itself_does_not_hold_up_the_answer(
    config: Path, systemctl: Systemctl
) -> None:
    systemctl.tell("keeps-stdout")
    try:
        assert new(config).force_dry_run().seconds < 10
    finally:
        os.kill(int((systemctl.directory / "background").read_text()), 9)


def test_a_file_that_says_dry_run_gets_no_backup_and_still_a_restart(config: Path, systemctl: Systemctl) -> None:
    config.write_bytes(DRY)
    before = config.stat()
    proof = new(config).force_dry_run()
    assert proof.backup is None
    assert proof.apply_mode == "dry_run"
    assert (config.stat().st_ino, config.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert backups(config) == []
    assert systemctl.restarts == 1


def test_duplicates_are_removed_even_when_the_last_one_says_dry_run(config: Path, systemctl: Systemctl) -> None:
    config.write_bytes(b"APPLY_MODE=testnet\nAPPLY_MODE=dry_run\n")
    assert new(config).force_dry_run().backup is not None
    assert config.read_bytes() == b"APPLY_MODE=dry_run\n"


def test_a_backup_is_never_overwritten(config: Path, systemctl: Systemctl) -> None:
    names = []
    for number in range(3):
        config.write_bytes(LIVE + b"%d" % number)
        names.append(new(config).force_dry_run().backup)
    first = f"{config}.bak.{STAMP}"
    assert names == [first, f"{first}.1", f"{first}.2"]
    assert [Path(name or "").read_bytes() for name in names] == [LIVE + b"0", LIVE + b"1", LIVE + b"2"]


def test_the_same_file_armed_again_gets_a_backup_of_its_own(config: Path, systemctl: Systemctl) -> None:
    first = new(config).force_dry_run().backup
    config.write_bytes(LIVE)
    wait_for_a_later_ctime(config)
    second = new(config).force_dry_run().backup
    assert first != second
    assert len(backups(config)) == 2


def test_a_symbolic_link_stays_and_its_target_is_rewritten(config: Path, systemctl: Systemctl, tmp_path: Path) -> None:
    target = tmp_path / "real" / "live.env"
    target.parent.mkdir()
    config.rename(target)
    config.symlink_to("../real/live.env")
    act = new(config)
    with act.locked(), new(target).locked() as held:
        assert not held
        proof = act.force_dry_run()
    assert config.is_symlink()
    assert target.read_bytes() == DRY
    assert proof.backup == f"{config}.bak.{STAMP}"
    assert {path.name for path in target.parent.iterdir()} == {"live.env", "live.env.lock"}
    assert act.apply_mode() == "dry_run"


def test_a_restrictive_or_open_umask_changes_nothing(config: Path, systemctl: Systemctl) -> None:
    for umask in (0o000, 0o777):
        config.write_bytes(LIVE)
        wait_for_a_later_ctime(config)
        previous = os.umask(umask)
        try:
            proof = new(config).force_dry_run()
        finally:
            os.umask(previous)
        assert stat.S_IMODE(config.stat().st_mode) == 0o640
        assert stat.S_IMODE(Path(proof.backup or "").stat().st_mode) == 0o640


# --- owner, group, access list --------------------------------------------------------------------------------------


def test_owner_and_group_of_the_file_are_kept(config: Path, systemctl: Systemctl) -> None:
    if os.geteuid() != 0:
        missing("only root can give files to another user")
    os.chown(config, 12345, 23456)
    act = new(config)
    with act.locked():
        proof = act.force_dry_run()
    for path in (config, Path(proof.backup or "")):
        assert (path.stat().st_uid, path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (12345, 23456, 0o640)
    assert ownership(proof) == ()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL])
def test_an_owner_that_cannot_be_kept_is_told_and_grants_nobody_more(
    config: Path, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, uid: int, gid: int) -> None:
        raise OSError(code, os.strerror(code))

    real_stat, original = os.fstat, config.stat().st_ino

    def from_elsewhere(fd: int) -> os.stat_result:
        found = real_stat(fd)
        return os.stat_result((*found[:4], 4711, 4712, *found[6:])) if found.st_ino == original else found

    monkeypatch.setattr(os, "fchown", refuse)
    monkeypatch.setattr(os, "fstat", from_elsewhere)
    monkeypatch.setattr(Actuator, "_backup_of_an_earlier_try", lambda *_: None)
    proof = new(config).force_dry_run()
    assert config.read_bytes() == DRY
    assert stat.S_IMODE(config.stat().st_mode) == stat.S_IMODE(Path(proof.backup or "").stat().st_mode) == 0o600
    assert ownership(proof) == (
        f"owner was 4711, is {os.geteuid()}",
        f"group was 4712, is {os.getegid()}, which got no access",
    )


def test_the_group_is_kept_when_only_the_owner_cannot_be(
    config: Path, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = os.fchown, []

    def only_the_group(fd: int, uid: int, gid: int) -> None:
        asked.append((uid, gid))
        if uid != -1:
            raise PermissionError(errno.EPERM, "no")
        real(fd, uid, gid)

    monkeypatch.setattr(os, "fchown", only_the_group)
    found = config.stat()
    assert ownership(new(config).force_dry_run()) == ()
    assert asked[:2] == [(found.st_uid, found.st_gid), (-1, found.st_gid)]
    assert stat.S_IMODE(config.stat().st_mode) == 0o640


def test_another_failure_of_chown_is_no_matter_of_permission(
    config: Path, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, uid: int, gid: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fchown", fail)
    assert failure(new(config)).step == "backup"
    assert config.read_bytes() == LIVE
    assert leftovers(config) == []


def test_an_access_list_goes_with_the_file(config: Path, systemctl: Systemctl) -> None:
    entries = [(1, 6, -1), (2, 4, 4711), (4, 0, -1), (16, 4, -1), (32, 0, -1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(config, "system.posix_acl_access", acl)
    except OSError as error:
        missing(f"no access lists on this file system ({error})")
    proof = new(config).force_dry_run()
    for path in (config, Path(proof.backup or "")):
        assert os.getxattr(path, "system.posix_acl_access") == acl


# --- failures, each with its step -----------------------------------------------------------------------------------


def test_a_missing_file_names_the_setting_and_nothing_is_restarted(config: Path, systemctl: Systemctl) -> None:
    config.unlink()
    error = failure(new(config))
    assert error.step == "read"
    assert f"APPLY_CONFIG_PATH={config}" in str(error)
    assert "No such file" in str(error)
    assert systemctl.calls == []
    assert leftovers(config) == []


def test_a_fifo_in_the_place_of_the_file_is_refused_and_not_waited_for(config: Path, systemctl: Systemctl) -> None:
    config.unlink()
    os.mkfifo(config)
    assert "not a regular file" in str(failure(new(config)))
    assert new(config).apply_mode() is None


def test_a_file_that_cannot_be_edited_stays_as_it_is(
    config: Path, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envfile, "_overwrite", lambda data, *_: data)
    error = failure(new(config))
    assert error.step == "write"
    assert "by hand" in str(error)
    assert error.proof.apply_mode == "testnet"
    assert config.read_bytes() == LIVE


def test_a_full_disk_leaves_the_old_file_whole(config: Path, systemctl: Systemctl) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        error = failure(new(config))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.step == "backup"
    assert config.read_bytes() == LIVE
    assert leftovers(config) == []
    assert backups(config) == []
    assert systemctl.calls == []
    assert new(config).force_dry_run().apply_mode == "dry_run"


def test_without_systemctl_the_file_is_done_all_the_same(
    config: Path, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    error = failure(new(config))
    assert error.step == "restart"
    assert "no systemctl on PATH=/nowhere" in str(error)
    assert error.proof.backup == str(backups(config)[0])
    assert error.proof.apply_mode == "dry_run"
    assert config.read_bytes() == DRY


def test_systemctl_is_looked_for_each_time(config: Path, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch) -> None:
    act, path = new(config), os.environ["PATH"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert failure(act).step == "restart"
    monkeypatch.setenv("PATH", path)
    assert act.force_dry_run().backup is None
    assert len(backups(config)) == 1
    assert new(config, systemctl=str(systemctl.path)).force_dry_run().apply_mode == "dry_run"


def test_a_systemctl_that_cannot_be_executed_is_a_failed_restart(config: Path, systemctl: Systemctl) -> None:
    systemctl.path.write_bytes(b"\x7fELF junk")
    error = failure(new(config))
    assert error.step == "restart"
    assert "cannot be started (Exec format error)" in str(error)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("ActiveState=failed\n", "the service is failed, which is safe, but not dry run"),
        ("ActiveState=active\n", "the service is active and may run as it did"),
        ("", "the service is in an unknown state and may run as it did"),
    ],
)
def test_a_failing_restart_keeps_the_file_and_tells_what_was_seen(
    config: Path, systemctl: Systemctl, state: str, told: str
) -> None:
    systemctl.show("InvocationID=aa\n", f"InvocationID=aa\n{state}")
    systemctl.tell("fail", "Job for the service failed.\n" + "x" * 5000)
    error = failure(new(config))
    assert error.step == "restart"
    assert f"restart {SERVICE} ended with 1 (Job for the service failed. xxx" in str(error)
    assert told in str(error)
    assert len(str(error)) < 1000
    assert error.proof.invocation_before == error.proof.invocation_after == "aa"
    assert config.read_bytes() == DRY
    systemctl.tell("fail", "")
    assert "ended with 1 (no output)" in str(failure(new(config)))
    (systemctl.directory / "fail").unlink()
    systemctl.tell("shown-after", "InvocationID=bb\n")
    assert new(config).force_dry_run().invocation_after == "bb"
    assert len(backups(config)) == 1


def test_a_restart_without_an_answer_ends_at_the_time_limit(config: Path, systemctl: Systemctl) -> None:
    systemctl.tell("hang")
    error = failure(new(config, timeout_s=0.2))
    assert error.step == "restart"
    assert "gave no answer within 0.2 s" in str(error)
    assert error.proof.seconds < 10
    assert config.read_bytes() == DRY


@pytest.mark.parametrize("content", [LIVE, b"", b"APPLY_MODE=dry_run\n#\\\nAPPLY_MODE=testnet\n"])
def test_a_file_written_back_by_somebody_else_is_no_proof(config: Path, systemctl: Systemctl, content: bytes) -> None:
    systemctl.tell("rewrites", content)
    error = failure(new(config))
    assert error.step == "verify"
    assert error.proof.apply_mode != "dry_run"
    assert "after it was rewritten" in str(error)


def test_a_file_that_is_gone_after_the_restart_is_no_proof(config: Path, systemctl: Systemctl) -> None:
    systemctl.tell("removes")
    error = failure(new(config))
    assert error.step == "verify"
    assert error.proof.apply_mode is None


def test_the_same_invocation_after_the_restart_is_no_restart(config: Path, systemctl: Systemctl) -> None:
    systemctl.tell("shown", "InvocationID=aa\nActiveState=active\n")
    error = failure(new(config))
    assert error.step == "verify"
    assert "still invocation aa" in str(error)


def test_a_service_that_ended_again_after_a_good_restart_is_done(config: Path, systemctl: Systemctl) -> None:
    systemctl.show("InvocationID=aa\n", "InvocationID=bb\nActiveState=failed\n")
    assert new(config).force_dry_run().active_state == "failed"


# --- the running process --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(*command: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, env={"PATH": os.environ["PATH"], **environ}, stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_environment_of_the_running_process_is_the_strongest_proof(config: Path, systemctl: Systemctl) -> None:
    with running("sleep", "600", APPLY_MODE="dry_run") as process:
        systemctl.tell("shown", f"MainPID={process.pid}\n")
        proof = new(config).force_dry_run()
    assert (proof.main_pid, proof.environ_mode) == (process.pid, "dry_run")


@pytest.mark.parametrize(
    ("environ", "unit", "told"),
    [
        ("live", "", "APPLY_MODE=live"),
        (None, "EnvironmentFiles={config} (ignore_errors=no)\n", "no APPLY_MODE"),
    ],
)
def test_a_process_with_another_mode_is_no_proof(
    config: Path, systemctl: Systemctl, environ: str | None, unit: str, told: str
) -> None:
    with running("sleep", "600", **({"APPLY_MODE": environ} if environ else {})) as process:
        systemctl.tell("shown", f"MainPID={process.pid}\n" + unit.format(config=config))
        error = failure(new(config))
    assert error.step == "verify"
    assert f"process {process.pid} has {told}" in str(error)
    assert "EnvironmentFile=" in str(error)
    assert "drop-in" in str(error)
    assert error.proof.environ_mode == environ


def test_a_service_that_reads_the_file_itself_need_not_have_it_in_its_environment(
    config: Path, systemctl: Systemctl
) -> None:
    with running("sleep", "600") as process:
        systemctl.tell("shown", f"MainPID={process.pid}\nEnvironmentFiles=/etc/other.env (ignore_errors=yes)\n")
        proof = new(config).force_dry_run()
    assert (proof.main_pid, proof.environ_mode) == (process.pid, None)


def test_a_process_is_given_time_until_its_environment_is_its_own(
    config: Path, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Actuator, "settle_s", 30.0)
    wait = time.sleep  # waiting for a process sleeps too
    with running("sh", "-c", "read go; exec env APPLY_MODE=dry_run sleep 600") as process:

        def let_go(seconds: float) -> None:
            if seconds != actuator._LOOK_AGAIN_S:
                wait(seconds)
                return
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()

        monkeypatch.setattr(time, "sleep", let_go)
        systemctl.tell("shown", f"MainPID={process.pid}\n")
        assert new(config).force_dry_run().environ_mode == "dry_run"


def test_a_process_that_is_gone_proves_nothing_and_disproves_nothing(config: Path, systemctl: Systemctl) -> None:
    with running("true") as process:
        process.wait()
    systemctl.tell("shown", f"MainPID={process.pid}\n")
    assert new(config).force_dry_run().environ_mode is None


def listed(*paths: object) -> str:
    return "".join(f"EnvironmentFiles={path} (ignore_errors=no)\n" for path in paths)


def test_a_later_environment_file_with_another_mode_is_found_without_access_to_the_process(
    config: Path, systemctl: Systemctl
) -> None:
    other = config.with_name("10-other.env")
    other.write_text("APPLY_MODE=testnet\n")
    systemctl.tell("shown", listed(config, "/no/such/file", config.parent / "*-other.env"))
    error = failure(new(config))
    assert error.step == "verify"
    assert f"{other} has APPLY_MODE=testnet" in str(error)
    for harmless in ("APPLY_MODE=dry_run\n", "OTHER=1\n"):
        other.write_text(harmless)
        assert new(config).force_dry_run().apply_mode == "dry_run"
    other.write_text("APPLY_MODE=testnet\n")
    for shown in (listed(other, config), listed(other)):
        systemctl.tell("shown", shown)
        assert new(config).force_dry_run().apply_mode == "dry_run"


def test_a_file_that_systemd_would_refuse_is_no_proof_where_the_unit_names_it(
    config: Path, systemctl: Systemctl
) -> None:
    config.write_bytes(b"APPLY_MODE=live\nNAME=caf\xe9\n")
    act = new(config)
    assert act.apply_mode() is None
    assert act.force_dry_run().apply_mode == "dry_run"
    systemctl.tell("shown", listed(config))
    error = failure(act)
    assert error.step == "verify"
    assert "does not load" in str(error)
    assert "NAME is not UTF-8" in str(error)


# --- a process killed, or a call failing, at any moment -------------------------------------------------------------

CALLS = ("open", "fstat", "fchown", "removexattr", "getxattr", "fchmod", "fsync", "link", "replace", "unlink")


class Killed(BaseException):
    pass


def at_call(
    monkeypatch: pytest.MonkeyPatch, number: int, raising: Callable[[], BaseException], *, once: bool
) -> Callable[[], int]:
    """Let the n-th operating system call raise, and with `once=False` each one after it too."""
    count = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number or (count > number and not once):
                raise raising()
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return lambda: count


@pytest.mark.parametrize("kind", ["killed", "failing"])
def test_whatever_call_ends_it_the_file_is_whole_and_the_next_try_finishes(
    config: Path, systemctl: Systemctl, kind: str
) -> None:
    renewed = set()
    for number in range(1, 100):
        for path in config.parent.iterdir():
            path.unlink()
        config.write_bytes(LIVE)
        with pytest.MonkeyPatch.context() as patch:
            if kind == "killed":
                calls = at_call(patch, number, Killed, once=False)
            else:
                calls = at_call(patch, number, lambda: OSError(errno.EIO, "Input/output error"), once=True)
            with contextlib.suppress(Killed, ActuatorError, OSError):
                new(config, systemctl="/nowhere").force_dry_run()
            made = calls()
        if made < number:
            break
        assert config.read_bytes() in {LIVE, DRY}
        assert all(backup.read_bytes() == LIVE for backup in backups(config))
        renewed.add(config.read_bytes())
        new(config).force_dry_run()
        assert config.read_bytes() == DRY
        assert [backup.read_bytes() for backup in backups(config)] == [LIVE]
        assert leftovers(config) == []
    else:
        pytest.fail("never ran through")
    assert number > 15
    assert renewed == {LIVE, DRY}


def test_a_write_that_failed_makes_no_second_backup(
    config: Path, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        patch.setattr(os, "replace", refuse)
        error = failure(new(config))
    assert error.step == "write"
    assert error.proof.apply_mode == "testnet"
    assert (config.read_bytes(), leftovers(config)) == (LIVE, [])
    assert systemctl.calls == []
    later = new(config, clock=lambda: NOW_US + 60_000_000)
    assert later.force_dry_run().backup == error.proof.backup == str(backups(config)[0])
    assert len(backups(config)) == 1


# --- the lock -------------------------------------------------------------------------------------------------------


def test_one_lock_for_all_and_free_again_afterwards(config: Path) -> None:
    first, second = new(config), new(config)
    with first.locked() as held:
        assert held
        with second.locked() as also:
            assert not also
    with second.locked() as held:
        assert held


def test_two_at_once_make_one_backup_and_one_restart(config: Path, systemctl: Systemctl) -> None:
    barrier, done = threading.Barrier(2), []

    def disarm() -> None:
        act = new(config)
        with act.locked() as held:
            barrier.wait(10)
            if held:
                done.append(act.force_dry_run())
            barrier.wait(10)

    threads = [threading.Thread(target=disarm) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(done) == len(backups(config)) == systemctl.restarts == 1


def test_another_process_is_kept_out_and_a_killed_one_leaves_no_lock(config: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from governor.actuator import Actuator\n"
        f"with Actuator(config_path=Path({str(config)!r}), service='s', clock=lambda: 0).locked() as held:\n"
        "    print(held, flush=True); sys.stdin.read()"
    )
    with running(sys.executable, "-c", script) as idle:
        idle.kill()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with new(config).locked() as held:
            assert not held
        process.kill()
    with new(config).locked() as held:
        assert held


def test_the_lock_is_not_inherited_by_what_systemctl_starts(config: Path, systemctl: Systemctl) -> None:
    systemctl.tell("keeps-stdout")
    act = new(config)
    with act.locked():
        act.force_dry_run()
    try:
        with act.locked() as held:
            assert held
    finally:
        os.kill(int((systemctl.directory / "background").read_text()), 9)


def test_the_lock_may_be_taken_by_whoever_may_write_the_directory_and_nobody_else(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = Path(f"{config}.lock")
    config.chmod(0o644)
    config.parent.chmod(0o755)
    with new(config).locked():
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    lock.unlink()
    config.unlink()
    config.parent.chmod(0o2770)
    with new(config).locked() as held:
        assert held
        assert stat.S_IMODE(lock.stat().st_mode) == 0o660
    lock.unlink()

    def fail(fd: int, uid: int, gid: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fchown", fail)
    with new(config).locked() as held:
        assert held


def test_a_lock_that_cannot_be_had_names_the_setting(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = config.parent / "missing" / "file.env"
    with pytest.raises(ActuatorError, match=re.escape(f"APPLY_CONFIG_PATH={nowhere}")) as caught, new(nowhere).locked():
        pass
    assert caught.value.step == "lock"
    assert caught.value.proof == Proof(service=SERVICE)

    def none_left(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none_left)
    with pytest.raises(ActuatorError, match="No locks available"), new(config).locked():
        pass


# --- the mode of the file -------------------------------------------------------------------------------------------


def test_the_mode_is_what_the_file_says_now(config: Path) -> None:
    act = new(config)
    assert act.apply_mode() == "testnet"
    inode, before = config.stat().st_ino, config.stat().st_mtime_ns
    with config.open("r+b") as file:
        file.write(LIVE.replace(b"testnet", b"dry_run"))
    os.utime(config, ns=(before, before))
    assert config.stat().st_ino == inode
    assert act.apply_mode() == "dry_run"
    config.unlink()
    assert act.apply_mode() is None
    config.write_bytes(b"")
    assert act.apply_mode() is None
    config.write_bytes(b"APPLY_MODE=\n")
    assert act.apply_mode() == ""


def test_the_file_is_parsed_once_while_it_stays_the_same(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act = new(config)
    assert act.apply_mode() == "testnet"
    monkeypatch.setattr(envfile, "readings", lambda *_: pytest.fail("parsed again"))
    assert act.apply_mode() == "testnet"


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (b"APPLY_MODE=dry_run\n# note \\\nAPPLY_MODE=testnet\n", "testnet"),
        (b"APPLY_MODE=testnet\n# note \\\nAPPLY_MODE=dry_run\n", "testnet"),
        (b"# note \\\nAPPLY_MODE=dry_run\n", None),
        (b"APPLY_MODE=dry_run\n# caf\xe9\n", "dry_run"),
        (b"APPLY_MODE=dry_run\nX=caf\xe9\n", None),
        (b"APPLY_MODE=dry_run\n\0", None),
    ],
)
def test_dry_run_is_only_believed_when_every_systemd_would_read_it(
    config: Path, content: bytes, mode: str | None
) -> None:
    config.write_bytes(content)
    assert new(config).apply_mode() == mode


# --- the note of a disarm by hand -----------------------------------------------------------------------------------

NOTE = Pending(
    reason="redis is down",
    context={"host": "h", "n": 1},
    operator="ann",
    timestamp_us=NOW_US,
    proof=Proof(service=SERVICE, apply_mode="dry_run", notes=("x",)),
)


def write(note: PendingNote, pending: Pending = NOTE) -> None:
    note.write_pending(
        reason=pending.reason,
        context=pending.context,
        operator=pending.operator,
        timestamp_us=pending.timestamp_us,
        proof=pending.proof,
    )


def test_a_note_is_kept_until_it_is_cleared(config: Path) -> None:
    note = PendingNote(config)
    assert note.read_pending() is None
    write(note)
    assert PendingNote(config).read_pending() == NOTE
    assert stat.S_IMODE(note.path.stat().st_mode) == 0o640
    assert json.loads(note.path.read_bytes())["operator"] == "ann"
    write(note, Pending(reason="again", context={}, operator="bob", timestamp_us=1))
    assert note.read_pending() == Pending(reason="again", context={}, operator="bob", timestamp_us=1, proof=None)
    assert leftovers(config) == []
    note.clear_pending(NOTE)
    assert note.read_pending() is not None, "another note came meanwhile, and that one is not told yet"
    again = Pending(reason="again", context={}, operator="bob", timestamp_us=1)
    note.clear_pending(again)
    note.clear_pending(again)
    assert note.read_pending() is None


def test_a_note_that_comes_while_another_is_cleared_is_kept(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note, again = PendingNote(config), Pending(reason="again", context={}, operator="bob", timestamp_us=1)
    write(note)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith(".told"):
            monkeypatch.setattr(os, "replace", real)
            write(note, again)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    note.clear_pending(NOTE)
    assert note.read_pending() == again
    note.clear_pending(again)
    assert (note.read_pending(), leftovers(config)) == (None, [])


def test_a_note_elsewhere_is_its_writers_own(config: Path) -> None:
    note = PendingNote.at(config.parent / "elsewhere")
    write(note)
    assert (note.path.name, stat.S_IMODE(note.path.stat().st_mode)) == ("elsewhere", 0o600)
    assert note.read_pending() == NOTE


def test_a_note_needs_no_config_file_and_goes_to_its_owner_if_there_is_one(config: Path) -> None:
    config.chmod(0o666)
    if os.geteuid() == 0:
        os.chown(config, 12345, 23456)
    owner = config.stat()
    note = PendingNote(config)
    write(note)
    assert (note.path.stat().st_uid, note.path.stat().st_gid) == (owner.st_uid, owner.st_gid)
    assert stat.S_IMODE(note.path.stat().st_mode) == 0o640
    config.unlink()
    write(note)
    assert note.read_pending() == NOTE
    assert stat.S_IMODE(note.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"{", b'{"reason": 1}', b"[]", b'{"reason":"\xff"}', b"\xff" * 5000])
def test_a_note_that_cannot_be_read_is_still_a_disarm(config: Path, content: bytes) -> None:
    note = PendingNote(config)
    note.path.write_bytes(content)
    os.utime(note.path, ns=(0, NOW_US * 1000))
    pending = note.read_pending()
    assert pending is not None
    assert (pending.reason, pending.operator, pending.timestamp_us) == ("unreadable note", "unknown", NOW_US)
    assert pending.context["error"]
    assert pending.context["content"] == content[:500].decode(errors="replace")
    assert pending.proof is None


def test_a_note_that_may_not_be_read_is_still_a_disarm(config: Path) -> None:
    note = PendingNote(config)
    note.path.mkdir()
    pending = note.read_pending()
    assert pending is not None
    assert pending.context == {"error": f"[Errno {errno.EISDIR}] Is a directory: '{note.path}'", "content": ""}


def test_a_note_that_cannot_be_written_is_an_error_and_the_old_one_stays(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = PendingNote(config)
    write(note)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        write(note, Pending(reason="again", context={}, operator="bob", timestamp_us=1))
    assert note.read_pending() == NOTE
    assert leftovers(config) == []
