from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from governor.demo.run import _home
from tests.daemon import wait_for


def _left_running(home: Path) -> list[str]:
    """Command lines of processes that have to do with this directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words, environ = path.read_bytes(), (path.parent / "environ").read_bytes()
        except OSError:
            continue
        if str(home).encode() in words + environ and path.parent.name != str(os.getpid()):
            found.append(words.replace(b"\0", b" ").decode())
    return found


def test_the_demo_shows_permits_blocks_an_expiry_a_disarm_and_a_rearm(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "governor", "demo", "--seconds", "13", "--speed", "5",
            "--var", str(tmp_path), "--svg", str(tmp_path / "live.svg"), "--json",
        ],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["plans"] == told["allowed"] + told["blocked"] + told["skipped"]
    assert told["daemon_exit"] == 0
    assert min(told[name] for name in ("allowed", "expired", "consumed", "disarms", "proven_disarms", "rearmed")) >= 1
    assert {"no_position", "unknown_action", "kill_score_critical_non_close", "daily_limit_exceeded",
            "burst_limit_exceeded", "disarmed", "duplicate_plan", "not_execute"} <= told["reasons"].keys()  # fmt: skip
    assert told["restarts"] >= 2
    assert list(Path(told["data"]).glob("apply-layer.env.bak.*"))
    assert "DISARMED" in (tmp_path / "live.svg").read_text()
    assert _left_running(tmp_path) == []


def test_without_a_terminal_what_happens_is_told_line_by_line_while_it_happens(tmp_path: Path) -> None:
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "governor", "demo", "--speed", "10", "--var", str(tmp_path)],
            stdout=said, stderr=said, cwd=tmp_path, start_new_session=True,
        )  # fmt: skip
    try:
        for line in (
            r"EXECUTE +btc-1 ",
            r"BLOCK +btc-3 .* kill_score_critical_non_close",
            "a burst: third execution",
            "AUTO_DISARM",
            r"REARMED +demo: looked at it",
        ):
            wait_for(lambda: re.search(line, (tmp_path / "said").read_text()), within_s=20, what=line)  # noqa: B023
    finally:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 0
    assert "\x1b" not in (tmp_path / "said").read_text()
    assert _left_running(tmp_path) == []


def test_a_run_has_a_directory_of_its_own_for_as_long_as_it_takes(tmp_path: Path) -> None:
    first = _home(tmp_path)
    with (first / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for number in range(6):
            (tmp_path / f"demo-20261123T10000{number}").mkdir()
        oldest = first.rename(tmp_path / "demo-20200101T000000")
        newest = _home(tmp_path)
        assert oldest.exists()
        assert len(list(tmp_path.iterdir())) == 1 + 4 + 1
    newest.rename(tmp_path / "demo-20261123T100009")
    _home(tmp_path)
    assert not oldest.exists()


def test_ctrl_c_in_the_live_view_leaves_nothing_running(tmp_path: Path) -> None:
    main, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "governor", "demo", "--speed", "5", "--var", str(tmp_path)],
        stdin=other, stdout=other, stderr=other, cwd=tmp_path, env=os.environ | {"TERM": "xterm"},
        start_new_session=True,
    )  # fmt: skip
    os.close(other)
    os.set_blocking(main, False)
    seen = bytearray()

    def shown() -> bool:
        with contextlib.suppress(OSError):  # nothing to read, or nobody at the other end any more
            seen.extend(os.read(main, 65536))
        return b"btc-1" in seen

    wait_for(shown, within_s=20, what="the first permit on the screen")
    (exports,) = tmp_path.glob("demo-*/env")
    look = f". {exports}; governor check --json; governor settings"
    looked = subprocess.run(["sh", "-c", look], capture_output=True, text=True, timeout=20, check=True)
    check, _, settings = looked.stdout.partition("\n")
    assert json.loads(check)["state"] in ("ARMED", "THROTTLED", "DISARMED")
    (port,) = (line.partition("=")[2] for line in settings.splitlines() if line.startswith("DASHBOARD_PORT="))

    def dashboard() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return bool(httpx.get(f"http://127.0.0.1:{port}/api/snapshot", trust_env=False).json()["seq"])
        return False

    wait_for(dashboard, within_s=20, what="the dashboard of the demo")
    os.killpg(process.pid, signal.SIGINT)
    until = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < until:
        shown()
    os.close(main)
    assert process.poll() == 0
    assert _left_running(tmp_path) == []
