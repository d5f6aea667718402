"""The way to a disarm for a governor that may not write the Apply Layer's file: root's helper behind a socket.

The helper (`deploy/libexec/quantum-governor-disarm`) takes the lock beside the file when it is connected to, does
everything when it is told why, and keeps the lock until the connection is closed. It can do nothing else, so a
governor that was taken over can stop trading and not start it.

Everything here blocks, as `governor.actuator` does.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from governor.actuator import Actuator, ActuatorError, Hand, PendingNote, Proof, Step
from governor.connection import now
from governor.logs import Logger
from governor.settings import Settings

log = Logger("governor.disarm")

DEADMAN_NOTE = Path("/var/lib/quantum-governor-disarm/disarm-pending")
"""What the dead man's run leaves for the governor: root's, to be read and not to be removed."""
REASON_CHARS = 200
_LONGEST_LINE = 1 << 16
_UNIT = "quantum-governor-disarm"
_LOOK = f"look at journalctl -t {_UNIT} and systemctl status {_UNIT}.socket"
T = TypeVar("T")


class _Lock(msgspec.Struct, frozen=True):
    lock: Literal["taken", "busy", "failed"]
    error: str = ""


class _Done(Proof, frozen=True, kw_only=True):
    step: Step | None = None
    error: str | None = None


class Helper:
    """Root's hand on the Apply Layer, with the shape of `Actuator`."""

    def __init__(
        self,
        socket_path: Path,
        *,
        config_path: Path,
        service: str,
        lock_s: float = 5,
        answer_s: float = 60,
    ) -> None:
        self.socket_path = socket_path
        self.config_path = config_path
        self.service = service
        self._lock_s = lock_s
        """systemd and a Python have to start first."""
        self._answer_s = answer_s
        """More than the helper gives its calls of systemctl together."""
        self._file = Actuator(config_path=config_path, service=service, clock=now)
        self._held: socket.socket | None = None
        self.problem: str | None = None
        """Why all that the helper can do is to stop the service; told when the lock is asked for."""

    def apply_mode(self) -> str | None:
        """Mode the file gives now; None when it is missing, unreadable, refused by systemd, or sets none."""
        return self._file.apply_mode()

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Have the helper try once to take the lock; yields whether it did. Ten seconds later it gives it back.

        Raises:
            ActuatorError: step `helper`: it cannot be reached, or does not answer.
        """
        with self._connected() as connection:
            answer = self._answer(connection, self._lock_s, _Lock)
            if answer.lock == "busy":
                yield False
                return
            self.problem = answer.error if answer.lock == "failed" else None
            self._held = connection
            try:
                yield True
            finally:
                if self._held is connection:
                    self._held = None

    def force_dry_run(self, reason: str = "", /) -> Proof:
        """Have it done and verified, for a reason that goes into the helper's log. The caller holds the lock.

        Raises:
            ActuatorError: with the step that failed and what was seen until then.
        """
        if self._held is None:
            raise self._error("force_dry_run() is for who has the lock")
        try:
            self._held.sendall(line_of(reason))
        except OSError as error:
            raise self._error(f"{self.socket_path} was closed ({_why(error)}): the lock was held too long") from error
        done = self._answer(self._held, self._answer_s, _Done)
        proof = Proof(**{name: getattr(done, name) for name in Proof.__struct_fields__})
        if done.error is not None or done.step is not None:
            raise ActuatorError(done.step or "helper", done.error or "failed without a word", proof)
        return proof

    def describe(self) -> str:
        """Who does it, for `doctor` and the log."""
        return f"helper at {self.socket_path}"

    def permitted(self) -> bool:
        """Whether this user may connect to what is there."""
        return os.access(self.socket_path, os.W_OK)

    def answers(self) -> bool:
        """Whether the helper is there and could do its work now. Nothing is done."""
        try:
            with self._connected() as connection:
                return self._answer(connection, self._lock_s, _Lock).lock != "failed"
        except ActuatorError:
            return False

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(self._lock_s)
            try:
                connection.connect(str(self.socket_path))
            except OSError as error:
                raise self._error(
                    f"cannot connect to GOV_DISARM_SOCKET={self.socket_path} ({_why(error)}); {_todo(error)}"
                ) from error
            yield connection

    def _answer(self, connection: socket.socket, within_s: float, wanted: type[T]) -> T:
        try:
            connection.settimeout(within_s)
            with connection.makefile("rb", buffering=0) as file:
                line = file.readline(_LONGEST_LINE)
        except OSError as error:
            raise self._error(f"the helper gave no answer within {within_s:g} s ({_why(error)}); {_LOOK}") from error
        if not line.endswith(b"\n"):
            raise self._error(f"the helper ended without an answer; {_LOOK}")
        try:
            return msgspec.json.decode(line, type=wanted)
        except msgspec.MsgspecError as error:
            raise self._error(f"the helper answered {line[:200]!r} ({error}); {_LOOK}") from error

    def _error(self, message: str) -> ActuatorError:
        return ActuatorError("helper", message, Proof(service=self.service))


def actuator_of(settings: Settings, *, clock: Callable[[], int] = now) -> Hand:
    """What the settings choose: the helper behind GOV_DISARM_SOCKET, without one this process itself."""
    config_path, service = settings.apply_config_path, settings.apply_service
    if settings.disarm_socket is not None:
        return Helper(settings.disarm_socket, config_path=config_path, service=service)
    return Actuator(config_path=config_path, service=service, clock=clock)


def hand_of_a_person(settings: Settings) -> Hand:
    """The same for a command: where the helper does not answer, ourselves, if we may write the file."""
    chosen = actuator_of(settings)
    if isinstance(chosen, Helper) and not chosen.answers() and writable(settings):
        log.warning("the helper does not answer, it is done without", socket=str(chosen.socket_path))
        return Actuator(config_path=settings.apply_config_path, service=settings.apply_service, clock=now)
    return chosen


def writable(settings: Settings) -> bool:
    """Whether this process may replace the Apply Layer's file."""
    return os.access(settings.apply_config_path.parent, os.W_OK)


def notes_of(settings: Settings, *, deadman: Path = DEADMAN_NOTE) -> tuple[PendingNote, ...]:
    """Every note that may tell of a disarm: a person's beside the file, the service user's own, the dead man's."""
    return (PendingNote(settings.apply_config_path), _own_note(settings), PendingNote.at(deadman))


def note_to_write(settings: Settings) -> PendingNote:
    """Where this process leaves its note."""
    beside = settings.disarm_socket is None or writable(settings)
    return PendingNote(settings.apply_config_path) if beside else _own_note(settings)


def _own_note(settings: Settings) -> PendingNote:
    return PendingNote.at(settings.state_dir / "disarm-pending")


def line_of(reason: str) -> bytes:
    """The one line the helper takes: 1 to 200 printable characters, whatever a person wrote."""
    plain = reason.encode(errors="replace").decode().replace("\N{REPLACEMENT CHARACTER}", "?")
    shown = "".join(char if char.isprintable() else " " for char in plain).strip()
    return (shown[:REASON_CHARS] or "no reason given").encode() + b"\n"


def _why(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _todo(error: OSError) -> str:
    match error:
        case FileNotFoundError() | ConnectionRefusedError():
            return f"systemctl restart {_UNIT}.socket, or with GOV_DISARM_SOCKET= the Governor does it itself"
        case PermissionError():
            return f"it is for SocketUser= of systemctl cat {_UNIT}.socket, and for root"
    return _LOOK
