from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

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
