"""Who may act: one token in a file, sessions in memory, and a limit on guessing."""

from __future__ import annotations

import hmac
import math
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from governor.settings import SettingsError

NAME = "DASHBOARD_TOKEN_FILE"
SHORTEST = 16
LONGEST = 1024
SESSION_S = 12 * 3600.0
"""A session ends so long after the login. It does not end earlier for being idle: a stop that asks for a token at
night is no stop."""
SESSIONS = 100
WINDOW_S = 60.0
FAILURES = 5
"""Of one address within the window; after that it has to wait, whatever it says."""
ALL_FAILURES = 30
"""The same for all addresses together."""
ADDRESSES = 1_000


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        SettingsError: it cannot be read, others may read it, or what it holds is no token.
    """
    try:
        others = path.stat().st_mode & 0o007
        token = path.read_text().strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"{NAME} is {str(path)!r}, expected a readable text file: {why}") from None
    if others:
        raise SettingsError(f"{NAME} is {str(path)!r}, expected a file that others may not read: chmod o= {path}")
    if not SHORTEST <= len(token) <= LONGEST:
        raise SettingsError(f"{NAME} is {str(path)!r}, expected a token of at least {SHORTEST} characters in it")
    return token


class Failures:
    """How long somebody who guessed has to wait.

    Args:
        clock: seconds of any clock that goes on.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._all: deque[float] = deque(maxlen=ALL_FAILURES)
        self._by_address: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, address: str) -> int:
        """Whole seconds until the next attempt is looked at; 0: now."""
        mine = self._by_address.get(address, deque())
        return max(_wait(mine, FAILURES, self._clock()), _wait(self._all, ALL_FAILURES, self._clock()))

    def note(self, address: str) -> None:
        """A wrong token."""
        at = self._clock()
        self._all.append(at)
        self._by_address.setdefault(address, deque(maxlen=FAILURES)).append(at)
        self._by_address.move_to_end(address)
        if len(self._by_address) > ADDRESSES:
            self._by_address.popitem(last=False)


def _wait(times: deque[float], most: int, at: float) -> int:
    return max(0, math.ceil(times[0] + WINDOW_S - at)) if len(times) == most else 0


class Sessions:
    """Who is logged in. Only hashes are kept.

    Args:
        token: what opens one.
        clock: seconds of any clock that goes on.
    """

    def __init__(self, token: str, clock: Callable[[], float]) -> None:
        self._token = sha256(token.encode()).digest()
        self._clock = clock
        self._open: OrderedDict[bytes, float] = OrderedDict()

    def login(self, token: str) -> str | None:
        """The id of a new session; None for a wrong token."""
        given = sha256(token.encode(errors="replace")).digest()
        if not hmac.compare_digest(given, self._token):
            return None
        session = secrets.token_urlsafe(32)
        self._open[_hash(session)] = self._clock()
        if len(self._open) > SESSIONS:
            self._open.popitem(last=False)
        return session

    def valid(self, session: str | None) -> bool:
        """Whether this is the id of a session that has not ended."""
        if not session:
            return False
        began = self._open.get(_hash(session))
        if began is None:
            return False
        if self._clock() - began >= SESSION_S:
            self.logout(session)
            return False
        return True

    def logout(self, session: str | None) -> None:
        """End it, if there is one."""
        self._open.pop(_hash(session or ""), None)


def _hash(session: str) -> bytes:
    return sha256(session.encode(errors="replace")).digest()
