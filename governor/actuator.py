"""Force the Apply Layer to dry run: its environment file first, then its service, then proof of both.

The file is rewritten before anything else is tried and never written back: a restart that fails leaves a file which
says dry run for whoever starts the service next. Each step can be repeated, and a repetition changes nothing that
is already right, so a disarm interrupted anywhere is finished by doing it again.

Proof comes in three strengths. The file is always read back. `systemctl show` tells whether the service is a new
invocation: no answer is tolerated, the old invocation is not. The environment of the running process tells which
mode it really has, where it may be read (by root, or as the same user).

Everything here blocks. Whatever serves an event loop calls it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol, Self

import msgspec

from governor import envfile

NAME = "APPLY_MODE"
DRY_RUN = "dry_run"
Step = Literal["lock", "read", "backup", "write", "restart", "verify", "helper"]

_ROOM = "look for free space and for write access to that directory"
_TEXT_LIMIT = 500
_PART = 65_536
_SHORT_TIMEOUT_S = 3.0
"""For calls whose answer is welcome but not needed: they must not hold up the restart."""
_LOOK_AGAIN_S = 0.01
_ACL = "system.posix_acl_access"


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of a forced dry run; None where it is not known."""

    backup: str | None = None
    """Copy of the file as it was; None when it needed no change."""
    apply_mode: str | None = None
    """Mode the file gives, read back."""
    service: str
    invocation_before: str | None = None
    invocation_after: str | None = None
    active_state: str | None = None
    main_pid: int | None = None
    environ_mode: str | None = None
    """`APPLY_MODE` in the environment of the running main process."""
    notes: tuple[str, ...] = ()
    """What of the file's ownership could not be kept."""
    seconds: float = 0.0


class ActuatorError(Exception):
    """A step did not succeed; the message names it, what was seen and what to do. To be tried again."""

    def __init__(self, step: Step, message: str, proof: Proof) -> None:
        super().__init__(f"{step}: {message}")
        self.step: Step = step
        self.proof = proof


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """A disarm by hand whose event is still to be written."""

    reason: str
    context: dict[str, Any]
    operator: str
    timestamp_us: int
    proof: Proof | None = None
    """What was verified; None when file and service are still to be done."""


class Hand(Protocol):
    """What sets the Apply Layer to dry run: `Actuator` in this process, `governor.helper.Helper` through root's."""

    @property
    def config_path(self) -> Path: ...

    @property
    def service(self) -> str: ...

    def apply_mode(self) -> str | None:
        """Mode the file gives now; None where it is not known."""
        ...

    def locked(self) -> contextlib.AbstractContextManager[bool]:
        """Try once to take the lock; whether it is ours until the end of the block. Raises ActuatorError."""
        ...

    def force_dry_run(self, reason: str = "", /) -> Proof:
        """Do it and verify it, with the lock. Raises ActuatorError."""
        ...

    def describe(self) -> str:
        """Who does it, for `doctor` and the log."""
        ...


class PendingNote:
    """A note of a disarm that could not become an event, beside the config file or elsewhere.

    Args:
        config_path: the note lies beside it, and may be read by whoever may read it.
    """

    def __init__(self, config_path: Path) -> None:
        self.path = _beside(config_path, ".disarm-pending")
        self._config_path: Path | None = config_path

    @classmethod
    def at(cls, path: Path) -> Self:
        """One that lies elsewhere, and is its writer's own."""
        note = cls(path)
        note.path, note._config_path = path, None
        return note

    def write_pending(
        self, *, reason: str, context: dict[str, Any], operator: str, timestamp_us: int, proof: Proof | None
    ) -> None:
        """Leave the note, in place of an earlier one, with the lock.

        Raises:
            OSError: it cannot be written.
        """
        note = Pending(reason=reason, context=context, operator=operator, timestamp_us=timestamp_us, proof=proof)
        like = None
        if self._config_path is not None:
            with contextlib.suppress(OSError):
                like = _File(self._config_path, b"", self._config_path.stat())
        with _temporary(self.path, msgspec.json.encode(note), like, at_most=0o640) as (temp, _):
            temp.replace(self.path)
        _sync_directory(self.path)

    def read_pending(self) -> Pending | None:
        """Return the note, None without one. An unreadable one still tells that there was a disarm."""
        try:
            found = self.path.lstat()
        except OSError:
            return None
        content = b""
        try:
            content = _read(self.path).data
            return msgspec.json.decode(content, type=Pending)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            return Pending(
                reason="unreadable note",
                context={"error": str(error), "content": content[:_TEXT_LIMIT].decode(errors="replace")},
                operator="unknown",
                timestamp_us=found.st_mtime_ns // 1000,
            )

    def clear_pending(self, told: Pending) -> None:
        """Remove the note, if it is still this one; a newer one is to be told too.

        Raises:
            OSError: it cannot be removed.
        """
        if self.read_pending() != told:
            return
        aside = PendingNote.at(_beside(self.path, ".told"))
        self.path.replace(aside.path)
        if aside.read_pending() != told:  # written in between; where yet another one followed, that one counts
            with contextlib.suppress(FileExistsError):
                self.path.hardlink_to(aside.path)
        aside.path.unlink()
        _sync_directory(self.path)


class Actuator:
    """The Governor's one hand on the Apply Layer."""

    settle_s = 1.0
    """How long a new main process may take until its environment is its own."""

    def __init__(
        self,
        *,
        config_path: Path,
        service: str,
        clock: Callable[[], int],
        systemctl: str = "systemctl",
        timeout_s: float = 10,
    ) -> None:
        self.config_path = config_path
        self.service = service
        self._clock = clock
        self._systemctl = systemctl
        self._timeout_s = timeout_s
        self._last_read: tuple[bytes, str | None] = (b"", None)

    def apply_mode(self) -> str | None:
        """Mode the file gives now; None when it is missing, unreadable, refused by systemd, or sets none.

        The file is read each time, since a stat signature misses a second write within one clock tick; parsing it
        is saved while the bytes are the same.
        """
        try:
            data = _content(self.config_path)
        except OSError:
            return None
        last, mode = self._last_read
        if data != last:
            mode = None if envfile.refusal(data) else _mode(data)
            self._last_read = (data, mode)
        return mode

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Try once to take the lock beside the file; yields whether it is ours until the end of the block.

        Raises:
            ActuatorError: step `lock`, when there can be no lock at all.
        """
        target = _target(self.config_path)
        path = _beside(target, ".lock")
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context(_open_lock(path))
                taken = _flock(lock)
            except OSError as error:
                raise ActuatorError(
                    "lock",
                    f"cannot lock {path} ({_why(error)}); the directory of APPLY_CONFIG_PATH={self.config_path} must "
                    "exist and let the Governor write",
                    Proof(service=self.service),
                ) from error
            yield taken

    def describe(self) -> str:
        """Who does it, for `doctor` and the log."""
        uid = os.geteuid()
        return f"in-process as {'root' if uid == 0 else f'uid {uid}'}"

    def force_dry_run(self, _reason: str = "", /) -> Proof:
        """Back up and rewrite the file, restart the service, verify both. The caller holds the lock.

        Raises:
            ActuatorError: with the step that failed and what was seen until then.
        """
        return self._set(DRY_RUN)

    def put_back(self, mode: str) -> Proof:
        """The same with another mode than dry run, for a person who armed again. The caller holds the lock.

        Raises:
            ActuatorError: as `force_dry_run`.
        """
        return self._set(mode)

    def check_put_back(self, mode: str) -> None:
        """Look whether `put_back` can be tried, and change nothing.

        Raises:
            ActuatorError: the file cannot be read, edited or replaced, or there is no systemctl.
        """
        step: Step = "read"
        target = _target(self.config_path)
        try:
            data = _read(target).data
            step = "write"
            envfile.assign(data, NAME, mode)
            if not os.access(target.parent, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        except (OSError, ValueError) as error:
            why = _why(error) if isinstance(error, OSError) else str(error)
            raise ActuatorError(
                step,
                f"cannot set {NAME}={mode} in {self.config_path} ({why}); try it as root",
                Proof(service=self.service),
            ) from error
        if shutil.which(self._systemctl) is None:
            path = os.environ.get("PATH", "")
            raise ActuatorError("restart", f"no {self._systemctl} on PATH={path}", Proof(service=self.service))

    def _set(self, mode: str) -> Proof:
        started = time.monotonic()
        seen: dict[str, Any] = {"service": self.service}
        try:
            self._rewrite(seen, mode)
            environment_files = self._restart(seen)
            data = self._verify_file(seen, mode)
            self._verify_service(seen, data, environment_files, mode)
        except _StepError as error:
            raise ActuatorError(error.step, error.message, _proof(seen, started)) from error
        return _proof(seen, started)

    def _rewrite(self, seen: dict[str, Any], mode: str) -> None:
        try:
            original = _read(_target(self.config_path))
        except OSError as error:
            raise _StepError(
                "read",
                f"cannot read APPLY_CONFIG_PATH={self.config_path} ({_why(error)}); set APPLY_CONFIG_PATH to the "
                f"environment file of {self.service}, or stop {self.service} by hand",
            ) from error
        seen["apply_mode"] = _mode(original.data)
        try:
            wanted = envfile.assign(original.data, NAME, mode)
        except ValueError as error:
            raise _StepError("write", f"cannot edit {self.config_path} ({error}); set {NAME} by hand") from error
        if wanted == original.data:
            return
        try:
            seen["backup"] = str(self._back_up(original))
        except OSError as error:
            raise _StepError("backup", f"cannot copy {self.config_path} beside it ({_why(error)}); {_ROOM}") from error
        try:
            with _temporary(original.path, wanted, original) as (temp, notes):
                temp.replace(original.path)
            seen.update(apply_mode=mode, notes=notes)
            _sync_directory(original.path)
        except OSError as error:
            raise _StepError("write", f"cannot rewrite {original.path} ({_why(error)}); {_ROOM}") from error

    def _back_up(self, original: _File) -> Path:
        made = self._backup_of_an_earlier_try(original)
        if made is not None:
            return made
        moment = datetime.fromtimestamp(self._clock() / 1e6, UTC)
        first = _beside(self.config_path, f".bak.{moment:%Y%m%dT%H%M%SZ}")
        with _temporary(self.config_path, original.data, original) as (temp, _):
            path = _link_to_a_free_name(temp, first)
        _sync_directory(path)
        return path

    def _backup_of_an_earlier_try(self, original: _File) -> Path | None:
        """Find the backup of a try that ended before the rewrite: same bytes, and the file untouched since."""
        start = f"{self.config_path.name}.bak."
        for path in self.config_path.parent.iterdir():
            if path.name.startswith(start):
                with contextlib.suppress(OSError):
                    backup = _read(path)
                    if backup.data == original.data and backup.stat.st_ctime_ns >= original.stat.st_ctime_ns:
                        return path
        return None

    def _restart(self, seen: dict[str, Any]) -> tuple[str, ...]:
        """Restart the service and return the environment files that its unit names."""
        if shutil.which(self._systemctl) is None:
            raise _StepError(
                "restart",
                f"no {self._systemctl} on PATH={os.environ.get('PATH', '')}; the file says {seen['apply_mode']}, "
                f"{self.service} still runs as it did: restart it by hand",
            )
        seen["invocation_before"] = self._show().invocation
        self._call("reset-failed", self.service, timeout_s=_SHORT_TIMEOUT_S)
        answer = self._call("restart", self.service, timeout_s=self._timeout_s)
        shown = self._show()
        seen.update(invocation_after=shown.invocation, active_state=shown.active_state, main_pid=shown.main_pid)
        if answer.code != 0:
            raise _StepError(
                "restart",
                f"systemctl restart {self.service} {answer.told()}; the file says {seen['apply_mode']}, "
                f"{_state(shown)}: look at systemctl status {self.service}",
            )
        seen["notes"] = (*seen.get("notes", ()), *_doubts(self.service, shown))
        return shown.environment_files

    def _verify_file(self, seen: dict[str, Any], wanted: str) -> bytes:
        seen["apply_mode"] = None
        try:
            data = _read(self.config_path).data
        except OSError as error:
            raise _StepError("verify", f"cannot read {self.config_path} back ({_why(error)})") from error
        seen["apply_mode"] = mode = _mode(data)
        if mode != wanted:
            raise _StepError(
                "verify", f"{self.config_path} gives {_said(mode)} after it was rewritten; find out what else writes it"
            )
        return data

    def _verify_service(
        self, seen: dict[str, Any], data: bytes, environment_files: tuple[str, ...], wanted: str
    ) -> None:
        if seen["invocation_before"] is not None and seen["invocation_before"] == seen["invocation_after"]:
            raise _StepError(
                "verify",
                f"{self.service} is still invocation {seen['invocation_after']} after systemctl restart; restart it "
                "by hand",
            )
        ours = str(_target(self.config_path))
        named = _expanded(environment_files)
        refusal = envfile.refusal(data) if ours in named else None
        if refusal is not None:
            raise _StepError("verify", f"systemd does not load {self.config_path}: {refusal}; correct it by hand")
        environ = _environ(seen["main_pid"], self.settle_s)
        if environ is None:
            source, mode = _overriding_file(named, ours, wanted)
        else:
            source, mode = f"process {seen['main_pid']}", environ.get(NAME)
            seen["environ_mode"] = mode
        if mode != wanted and (mode is not None or (environ is not None and ours in named)):
            then = " and stop the service" if wanted == DRY_RUN else ""
            raise _StepError(
                "verify",
                f"{source} has {_said(mode)} although {self.config_path} says {wanted}: a later EnvironmentFile=, a "
                f"drop-in or Environment= overrides it; see systemctl cat {self.service}{then}",
            )

    def _show(self) -> _Shown:
        wanted = [word for name in _SHOWN for word in ("-p", name)]
        answer = self._call("show", self.service, *wanted, timeout_s=_SHORT_TIMEOUT_S)
        return _shown(answer.out if answer.code == 0 else "")

    def _call(self, *args: str, timeout_s: float) -> _Answer:
        # Into memory and not through pipes: a service that a simple systemctl starts itself would hold those open.
        with _memory("stdout") as out, _memory("stderr") as err:
            try:
                process = subprocess.Popen(  # noqa: S603 - a list, no shell, the operator's own PATH
                    [shutil.which(self._systemctl) or self._systemctl, *args],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=os.environ | {"LC_ALL": "C"},
                    start_new_session=True,
                )
            except OSError as error:
                return _Answer(None, "", f"cannot be started ({_why(error)})")
            with process:
                try:
                    code = process.wait(timeout_s)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    return _Answer(None, "", f"gave no answer within {timeout_s:g} s")
            return _Answer(code, _text(out), _text(err))


def mode_in(path: Path) -> str | None:
    """Mode a file gives, such as a backup; None when it cannot be read or gives none."""
    try:
        data = _read(path).data
    except OSError:
        return None
    return None if envfile.refusal(data) else _mode(data)


class _StepError(Exception):
    def __init__(self, step: Step, message: str) -> None:
        super().__init__(message)
        self.step: Step = step
        self.message = message


class _File(NamedTuple):
    path: Path
    data: bytes
    stat: os.stat_result


class _Answer(NamedTuple):
    code: int | None
    out: str
    err: str

    def told(self) -> str:
        text = " ".join((self.err or self.out).split())[:_TEXT_LIMIT]
        return text if self.code is None else f"ended with {self.code} ({text or 'no output'})"


_SHOWN = ("InvocationID", "ActiveState", "MainPID", "EnvironmentFiles")


class _Shown(NamedTuple):
    invocation: str | None
    active_state: str | None
    main_pid: int | None
    environment_files: tuple[str, ...]


def _shown(text: str) -> _Shown:
    """Read `systemctl show`, whatever of it is there."""
    lines = [line.partition("=") for line in text.splitlines()]
    values = {name: value.strip() for name, _, value in lines}
    pid = values.get("MainPID", "")
    return _Shown(
        values.get("InvocationID") or None,
        values.get("ActiveState") or None,
        int(pid) if pid.isdecimal() and int(pid) > 0 else None,
        tuple(value.partition(" (ignore_errors=")[0] for name, _, value in lines if name == "EnvironmentFiles"),
    )


def _doubts(service: str, shown: _Shown) -> tuple[str, ...]:
    """What a restart that reported success leaves open."""
    if shown.active_state in {"failed", "inactive"}:
        return (f"{service} is {shown.active_state} after its restart: it does not trade, nor does it run in dry run",)
    if shown.invocation is None:
        return (f"systemctl tells nothing of {service}: that it restarted could not be verified",)
    return ()


def _state(shown: _Shown) -> str:
    if shown.active_state in {"failed", "inactive"}:
        return f"the service is {shown.active_state}, which is safe, but not dry run"
    return f"the service is {shown.active_state or 'in an unknown state'} and may run as it did"


def _proof(seen: dict[str, Any], started: float) -> Proof:
    return Proof(**seen, seconds=round(time.monotonic() - started, 6))


def _mode(data: bytes) -> str | None:
    """Mode the file gives; where systemd's versions read it differently, the one that is not dry run."""
    return next((value for value in envfile.readings(data, NAME) if value != DRY_RUN), DRY_RUN)


def _said(mode: str | None) -> str:
    return f"no {NAME}" if mode is None else f"{NAME}={mode}"


def _environ(pid: int | None, settle_s: float) -> dict[str, str] | None:
    """Environment of a process, None where it may not be read.

    Between fork and exec a process still shows its parent's, so one without the mode is looked at again for a while.
    """
    until = time.monotonic() + settle_s
    while True:
        try:
            content = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return None
        pairs = [entry.partition("=") for entry in content.decode(errors="surrogateescape").split("\0") if entry]
        environ = {name: value for name, _, value in reversed(pairs)}
        if NAME in environ or time.monotonic() >= until:
            return environ or None
        time.sleep(_LOOK_AGAIN_S)


def _expanded(environment_files: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for pattern in environment_files:
        found += map(os.path.realpath, sorted(glob.glob(pattern)))  # noqa: PTH207 - the pattern is absolute
    return found


def _overriding_file(named: list[str], ours: str, wanted: str) -> tuple[str, str | None]:
    """Find the environment file after ours that sets another mode."""
    for path in named[named.index(ours) + 1 :] if ours in named else ():
        with contextlib.suppress(OSError):
            for mode in envfile.readings(_read(Path(path)).data, NAME):
                if mode not in {None, wanted}:
                    return path, mode
    return "", None


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _opened(path: Path, flags: int) -> IO[bytes]:
    def opener(name: str, _: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC, 0o600)

    return open(path, "wb" if flags & os.O_WRONLY else "rb", opener=opener)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _content(path: Path) -> bytes:
    """As `_read`, of the bytes alone: every plan comes here."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = part = os.read(descriptor, _PART)
        while len(part) == _PART:
            part = os.read(descriptor, _PART)
            content += part
        return content
    finally:
        os.close(descriptor)


def _read(path: Path) -> _File:
    """Read a regular file (a FIFO in its place would block for ever)."""
    with _opened(path, os.O_RDONLY | os.O_NONBLOCK) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return _File(path, file.read(), found)


@contextlib.contextmanager
def _temporary(
    target: Path, data: bytes, like: _File | None, *, at_most: int | None = None
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A complete file beside the target, on disk, with the owner and mode of another; gone at the end unless renamed.

    The name is fixed, so that what a killed process left goes with the next try; the lock makes that safe.
    """
    temp = target.with_name(f".{target.name}.tmp")
    temp.unlink(missing_ok=True)
    try:
        with _opened(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
            notes = () if like is None else _make_alike(file.fileno(), like, at_most)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temp, notes
    finally:
        temp.unlink(missing_ok=True)


def _make_alike(fd: int, like: _File, at_most: int | None) -> tuple[str, ...]:
    """Give a file the owner, access list and mode of another, never more; tell what could not be kept.

    Given the most its mode may be, it gets no access list.
    """
    mode = stat.S_IMODE(like.stat.st_mode) if at_most is None else 0o600 | (like.stat.st_mode & at_most)
    notes = []
    _give(fd, like.stat)
    now = os.fstat(fd)
    if now.st_uid != like.stat.st_uid:
        notes.append(f"owner was {like.stat.st_uid}, is {now.st_uid}")
    if now.st_gid != like.stat.st_gid:
        mode &= ~stat.S_IRWXG
        notes.append(f"group was {like.stat.st_gid}, is {now.st_gid}, which got no access")
    if at_most is None:
        _copy_access_list(fd, like.path)
    os.fchmod(fd, mode)
    return tuple(notes)


def _give(fd: int, like: os.stat_result) -> None:
    """Pass a file on to another's owner and group, or to the group alone, as far as that is allowed."""
    for uid in (like.st_uid, -1):
        try:
            os.fchown(fd, uid, like.st_gid)
        except OSError as error:
            # EINVAL: an owner who does not exist in this user namespace.
            if error.errno not in {errno.EPERM, errno.EINVAL}:
                raise
        else:
            return


def _copy_access_list(fd: int, source: Path) -> None:
    """Take over the POSIX access list: under one, the group bits of the mode are a mask and would grant too much."""
    with contextlib.suppress(OSError):
        os.removexattr(fd, _ACL)
    with contextlib.suppress(OSError):
        os.setxattr(fd, _ACL, os.getxattr(source, _ACL))


def _link_to_a_free_name(temp: Path, first: Path) -> Path:
    path, number = first, 0
    while True:
        try:
            path.hardlink_to(temp)
        except FileExistsError:
            number += 1
            path = _beside(first, f".{number}")
        else:
            return path


def _sync_directory(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_lock(path: Path) -> IO[bytes]:
    """Open the lock file, for those who may write the directory: who only reads in it must not hold a disarm up."""
    with contextlib.suppress(FileNotFoundError):
        return _opened(path, os.O_RDONLY)
    like = path.parent.stat()
    lock = _opened(path, os.O_RDONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        _give(lock.fileno(), like)
        os.fchmod(lock.fileno(), 0o600 | (like.st_mode & 0o022) * 3)  # whoever may write may read as well
    return lock


def _flock(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _memory(name: str) -> IO[bytes]:
    return open(os.memfd_create(name), "w+b")  # noqa: PTH123 - a file descriptor


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(1 << 20).decode(errors="replace")
