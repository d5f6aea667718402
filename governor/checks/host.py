"""Checks of what is on this host: the service, its port, its settings, its files and its log."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from events.segments import JournalError, find
from events.segments import told as told_head
from events.types import Head
from governor import envfile
from governor.checks import AS_ROOT, UNIT, Findings, Look, run, shown, some
from governor.disarming import in_thread
from governor.http_client import UnreadableError
from governor.readiness import Routes
from governor.service import VERSION
from governor.settings import TABLE

SECRETS = tuple(row.name for row in TABLE if row.secret)
REQUIRED = ("allow", "block", "disarm", "exec_count_hour", "exec_count_5min")
"""The requirement's five metrics, behind `quantum_govern_`."""
HTTP_S = 3.0
STALLED_S = 5.0
RECENT_START_S = 3600.0
JOURNAL_S = 2.0
"""How long the journal has to catch up with the stream while events come."""
FULL_BYTES, LOW_BYTES = 200 * 2**20, 2**30
LOG_LINES = 5000
SHOW_LOG_S = 4.0
DEADMAN = "quantum-governor-deadman.service"
_LOOPBACK = ("localhost", "127.", "::1", "[::1]", "/")


async def service(_look: Look, found: Findings) -> None:
    """The daemon's unit, as systemd sees it."""
    unit = await shown(
        UNIT, "LoadState", "ActiveState", "SubState", "Result", "ActiveEnterTimestamp",
        "ActiveEnterTimestampMonotonic", "NRestarts", "User", "WatchdogUSec", "OnFailure", "NeedDaemonReload",
    )  # fmt: skip
    match unit.get("LoadState"):
        case None:
            found.skip("systemd does not answer here")
            return
        case "not-found":
            found.warn(f"{UNIT} is not installed here", "Run deploy/install.sh, or look on the host it runs on.")
            return
    _running(unit, found)
    if unit.get("User") in ("", "root"):
        found.warn("it runs as root", "Give it the user quantum-governor (docs/installing.md).")
    else:
        found.ok(f"as {unit.get('User')}")
    if unit.get("WatchdogUSec") in ("0", "infinity"):
        found.warn("no watchdog: a hang is not noticed", "Set WatchdogSec= as in deploy/systemd/.")
    else:
        found.ok(f"watchdog {unit.get('WatchdogUSec')}")
    if DEADMAN not in unit.get("OnFailure", ""):
        found.warn(
            f"OnFailure= does not name {DEADMAN}: a governor that cannot be kept up leaves the Apply Layer trading",
            "Install the units again with deploy/install.sh.",
        )
    if unit.get("NeedDaemonReload") == "yes":
        found.warn("its unit file changed on disk", "systemctl daemon-reload, then restart it.")


def _running(unit: dict[str, str], found: Findings) -> None:
    state = f"{unit.get('ActiveState')} ({unit.get('SubState')})"
    if unit.get("ActiveState") != "active":
        found.fail(
            f"{state}, result {unit.get('Result')}",
            f"No permits until it runs: systemctl start {UNIT}; if it ends again: journalctl -u {UNIT} -n 50.",
        )
        return
    found.ok(f"{state} since {unit.get('ActiveEnterTimestamp')}")
    restarts = unit.get("NRestarts", "0")
    began = unit.get("ActiveEnterTimestampMonotonic", "")
    age_s = time.monotonic() - int(began) / 1e6 if began.isdecimal() else RECENT_START_S
    if restarts not in ("", "0") and age_s < RECENT_START_S:
        found.warn(
            f"restarted by systemd {restarts} times, the last time {age_s:.0f} s ago",
            f"Find out why: journalctl -u {UNIT} --since -1h.",
        )
    else:
        found.ok(f"{restarts or '0'} restarts")


async def metrics(look: Look, found: Findings) -> None:
    """/metrics, /healthz and /readyz."""
    settings = look.settings
    if settings.metrics_port == 0:
        found.skip("METRICS_PORT is 0: the daemon took a free one")
        return
    routes = Routes(settings, within_s=HTTP_S)
    base = routes.base
    try:
        pages = [await routes.get(path) for path in ("/metrics", "/healthz", "/readyz")]
    except (OSError, UnreadableError) as error:
        found.fail(
            f"{base} does not answer ({str(error) or type(error).__name__})",
            f"Is the daemon running (systemctl status {UNIT}), and is METRICS_PORT={settings.metrics_port} the one it "
            "was started with?",
        )
        return
    finally:
        await routes.aclose()
    page, health, ready = pages
    text = ready.body.decode(errors="replace")
    _metrics_page(page.body.decode(errors="replace"), look.clock() / 1e6, found)
    if health.status != 200:
        found.fail("/healthz: the loop does not answer", f"The daemon hangs: systemctl restart {UNIT}.")
    try:
        _readiness(ready.status, json.loads(text), found)
    except (ValueError, AttributeError, TypeError):
        found.fail(f"/readyz answers {text[:80]!r}", f"Something else listens on {base}: set METRICS_PORT.")


def _metrics_page(text: str, now_s: float, found: Findings) -> None:
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415

    try:
        families = {family.name: family for family in text_string_to_metric_families(text)}
    except ValueError as error:
        found.fail(f"/metrics cannot be parsed ({error})", "Something else listens on METRICS_PORT.")
        return
    missing = [name for name in REQUIRED if f"quantum_govern_{name}" not in families]
    if missing:
        found.fail(
            f"/metrics lacks quantum_govern_{{{','.join(missing)}}}",
            f"The event loop does not answer, or something else listens there: systemctl restart {UNIT}.",
        )
        return
    found.ok(f"/metrics has {len(families)} metrics")
    stamp = families.get("quantum_govern_last_evaluation_timestamp_seconds")
    idle_s = now_s - stamp.samples[0].value if stamp is not None and stamp.samples else 0.0
    if idle_s > STALLED_S:
        found.fail(f"the evaluation loop went round {idle_s:.0f} s ago", f"It hangs: systemctl restart {UNIT}.")


def _readiness(status: int, told: dict[str, Any], found: Findings) -> None:
    for problem in told["problems"]:
        found.fail(f"/readyz: {problem}", "docs/promises.md says what follows from it and what to do.")
    standby = not told.get("active", True)
    for note in told["notes"]:
        if note.startswith("standby"):
            found.ok(note)
        else:
            found.warn(f"/readyz: {note}", "docs/promises.md says what follows from it and what to do.")
    if status == 200 and not told["problems"]:
        found.ok("ready, standby" if standby else "ready, active")


async def settings(look: Look, found: Findings) -> None:
    """What is on disk, who may read it, and whether the daemon runs under it."""
    where = str(look.env_file) if look.env_file is not None else "the environment"
    for warning in look.settings.warnings:
        found.warn(warning, f"Correct it in {where}.")
    _readers(look, found)
    state = look.state
    if state is None or state.settings is None:
        found.ok(f"from {where}, digest {look.settings.digest}")
        return
    loaded = state.settings
    other = _differences(look, loaded.settings, loaded.limits)
    if loaded.digest == look.settings.digest:
        found.ok(f"from {where}, digest {loaded.digest}, the daemon's too")
    elif list(other) == ["credentials"] and not look.settings.credentials:
        found.skip("the credentials cannot be seen by this user: nothing else differs from the daemon's", AS_ROOT)
    else:
        told = some([f"{name} {was!r} -> {now!r}" for name, (was, now) in other.items()], most=5)
        found.warn(
            f"the daemon decides under other settings than {where} has: {told}",
            f"Restart to apply: systemctl restart {UNIT}.",
        )
    if loaded.version != VERSION:
        found.warn(
            f"the daemon is version {loaded.version}, this program {VERSION}",
            f"Restart to apply: systemctl restart {UNIT}.",
        )


def _differences(
    look: Look, texts: dict[str, str], limits: dict[str, dict[str, str]]
) -> dict[str, tuple[object, object]]:
    mine, own = look.settings.texts, look.settings.symbol_texts
    found: dict[str, tuple[object, object]] = {
        name: (texts.get(name), mine.get(name))
        for name in sorted(texts.keys() | mine.keys())
        if texts.get(name) != mine.get(name)
    }
    for symbol in sorted(limits.keys() | own.keys()):
        if limits.get(symbol) != own.get(symbol):
            found[f"[{symbol}]"] = (limits.get(symbol), own.get(symbol))
    return found


def _readers(look: Look, found: Findings) -> None:
    """Whether anybody may read a secret, or write a setting."""
    if look.env_file is not None:
        _reader(look.env_file, found)
    directory = look.environ.get("CREDENTIALS_DIRECTORY")
    for name in SECRETS if directory else ():
        path = Path(directory or "", name)
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if mode & stat.S_IRWXO:
            found.fail(f"{path} is open to everybody (mode {stat.S_IMODE(mode):04o})", f"chmod o= {path}; change it.")


def _reader(path: Path, found: Findings) -> None:
    try:
        mode, data = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        found.skip(f"{path} cannot be read ({error.strerror})", AS_ROOT)
        return
    held = [name for name in SECRETS if envfile.effective(data, name)]
    shown_mode = f"mode {stat.S_IMODE(mode):04o}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        found.fail(f"{path} can be written by others than its owner ({shown_mode})", f"chmod go-w {path}")
    if mode & stat.S_IROTH and held:
        found.fail(
            f"{path} can be read by everybody ({shown_mode}) and holds {some(held)}",
            f"chmod 0640 {path}, and exchange what it held.",
        )
    elif mode & stat.S_IROTH:
        found.warn(f"{path} can be read by everybody ({shown_mode})", f"chmod 0640 {path}")
    else:
        found.ok(shown_mode)


async def journal(look: Look, found: Findings) -> None:
    """The daemon's own copy of the events, against the stream."""
    settings = look.settings
    own = settings.own_journal
    try:
        slots = sorted(path for path in own.iterdir() if path.name.isdecimal())
    except PermissionError:
        found.skip(f"{own} cannot be read by this user", AS_ROOT)
        return
    except OSError as error:
        found.fail(
            f"{own}: {error.strerror}",
            f"No daemon has written a journal there: is it running, with this GOV_JOURNAL_DIR? systemctl status {UNIT}",
        )
        return
    found.ok(f"{own}, fsync {settings.journal_fsync}")
    if os.statvfs(own).f_flag & os.ST_RDONLY:
        found.fail(f"{own} is read-only", "Mount it to be written; nothing is granted until then.")
    remote = settings.redis_sentinels or not settings.redis_host.startswith(_LOOPBACK)
    if remote and settings.journal_fsync == "interval":
        found.warn(
            "Redis is on another machine, and a power cut here can lose the journal's last second",
            "GOV_JOURNAL_FSYNC=always.",
        )
    if not slots:
        found.fail(f"no slot in {own}", f"Its directory was removed under the daemon: systemctl restart {UNIT}.")
    elif look.away is None:
        await _heads(look, slots, found)


async def _heads(look: Look, slots: list[Path], found: Findings) -> None:
    key = look.settings.chain_key
    until = time.monotonic() + JOURNAL_S
    while True:
        before = await look.ledger.store.head()
        try:
            heads = await in_thread(lambda: [find(slot, key).scan.head for slot in slots])
        except (JournalError, OSError) as error:
            found.fail(
                f"it cannot be read: {error}",
                "Move the slot's directory away and restart the daemon: a new one takes everything over from Redis.",
            )
            return
        after = await look.ledger.store.head()
        furthest = max(heads)
        if before.seq <= furthest.seq <= after.seq and await _same(look, furthest):
            found.ok(f"{len(slots)} slots, up to event {furthest.seq} as the stream")
            return
        if time.monotonic() >= until:
            break
        await asyncio.sleep(0.2)
    found.fail(
        f"it ends at event {told_head(furthest)}, the stream at {told_head(after)}",
        f"If the daemon does not run, start it: it compares both. If it does: journalctl -u {UNIT} -n 50.",
    )


async def _same(look: Look, head: Head) -> bool:
    if head.seq == 0:
        return True
    entries = await look.ledger.store.read(head.seq - 1, limit=1)
    return bool(entries) and entries[0].hash == head.hash


async def disk(look: Look, found: Findings) -> None:
    """Room where the daemon writes."""
    wanted = (look.settings.journal_dir, look.settings.archive_dir, look.settings.apply_config_path.parent)
    seen: set[int] = set()
    for path in map(_existing, wanted):
        device = path.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        room = os.statvfs(path)
        if not room.f_blocks:
            continue  # not on a disk
        free, share = room.f_bavail * room.f_frsize, room.f_bavail / room.f_blocks
        told = f"{free / 2**30:.1f} GiB free ({share:.0%}) at {path}"
        inodes = room.f_favail == 0 and room.f_files > 0
        if free < FULL_BYTES or inodes:
            found.fail(
                f"no inodes left at {path}" if inodes else told, "Make room: with a full disk nothing is granted."
            )
        elif free < LOW_BYTES:
            found.warn(told, "Make room: with a full disk nothing is granted.")
        else:
            found.ok(told)


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


async def log(_look: Look, found: Findings) -> None:
    """Errors in the daemon's log within the last hour."""
    program = shutil.which("journalctl")
    if program is None:
        found.skip("no journalctl here")
        return
    command = [program, "-u", UNIT, "--since", "-1h", "-n", str(LOG_LINES), "-o", "json", "--no-pager", "-q"]
    answer = await in_thread(lambda: run(command, within_s=SHOW_LOG_S))
    if answer is None or answer.returncode != 0:
        found.skip(f"journalctl tells nothing ({(answer.stderr.strip() if answer else '') or 'no answer'})", AS_ROOT)
        return
    lines = answer.stdout.splitlines()
    if not lines:
        found.skip("no line of it in the last hour", "" if os.geteuid() == 0 else AS_ROOT)
        return
    errors = [text for text in map(_error, lines) if text is not None]
    if errors:
        found.warn(
            f"{len(errors)} errors in the last hour, the last one: {errors[-1][:200]}",
            f"journalctl -u {UNIT} --since -1h",
        )
    else:
        found.ok(f"no error in the last hour's {len(lines)} lines")


def _error(line: str) -> str | None:
    """A journal entry's text if it tells of an error: by its priority, or by the level the daemon wrote."""
    try:
        entry = json.loads(line)
        text = str(entry.get("MESSAGE", ""))
        loud = str(entry.get("PRIORITY", "6")) <= "3"
    except (ValueError, AttributeError):
        return None
    try:
        written = json.loads(text)
        told = " ".join(str(written[name]) for name in ("event", "error", "problem") if name in written)
        return told if loud or written["level"] in ("error", "critical") else None
    except (ValueError, KeyError, TypeError):
        return text if loud else None
