"""What an answer of the exchange means, as values: kinds of trouble, and how long to leave the exchange alone.

ExchangeError.kind, one of:

* no answer
  x timeout          our deadline passed
  x connection       refused, reset, or cut short
* stopped, every call
  x rate_limited     429, -1003
  x banned           418, -1003 "banned until"
  x waf_blocked      403
* stopped, signed calls
  x auth             401, -1002, -1022, -2008, -2014, -2015
* no data
  x server_timeout   408, -1006, -1007
  x server_error     other 5xx, -1000, -1001
  x overloaded       -1008
  x bad_response     not the expected shape, or a number no exchange would send
  x stale_price      the mark price is older than allowed
* our side
  x clock            -1021, also after one resync
  x bad_symbol       -1121, -1122
  x bad_request      any other 4xx
  x retired          -5000, 404
  x internal         a bug here
* not asked
  x no_exchange      no credentials; set by the service, never raised
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

STOPPED = ("rate_limited", "banned", "waf_blocked")
ERROR_KINDS: tuple[str, ...] = (
    *("timeout", "connection"),
    *STOPPED,
    "auth",
    *("server_timeout", "server_error", "overloaded", "bad_response", "stale_price"),
    *("clock", "bad_symbol", "bad_request", "retired", "internal", "no_exchange"),
)
SECOND_TRY_AFTER_S: Mapping[str, float] = {
    "connection": 0.0,
    "bad_response": 0.0,
    "server_timeout": 0.0,
    "server_error": 0.2,
    "overloaded": 0.2,
}
"""Kinds worth one more attempt, with the pause before it in seconds; no other kind is tried again as it is."""

_MAX_DETAIL = 200
_MAX_STOP_S = 259_200.0  # the longest ban the exchange gives
_BAN_MARGIN_S = 1.0
_PAUSES_S: Mapping[str, tuple[float, float]] = {
    "rate_limited": (5.0, 40.0),
    "waf_blocked": (60.0, 480.0),
    "banned": (120.0, _MAX_STOP_S),
    # A key that was refused stays refused until somebody acts, and a storm of 401s ends in a ban; a minute is
    # short enough for a key that is being exchanged.
    "auth": (60.0, 60.0),
}
_BY_CODE: Mapping[int, str] = {
    -1000: "server_error",
    -1001: "server_error",
    -1002: "auth",
    -1006: "server_timeout",
    -1007: "server_timeout",
    -1008: "overloaded",
    -1021: "clock",
    -1022: "auth",
    -1121: "bad_symbol",
    -1122: "bad_symbol",
    -2008: "auth",
    -2014: "auth",
    -2015: "auth",
    -5000: "retired",
}
_BY_STATUS: Mapping[int, str] = {401: "auth", 403: "waf_blocked", 404: "retired", 408: "server_timeout"}
_BANNED_UNTIL = re.compile(r"banned until ([0-9]{13})")
# Keys, secrets and signatures are 64 characters long; what echoes one must not pass it on.
_SECRET_LIKE = re.compile(r"signature=[^&\s]*|[A-Za-z0-9+/=]{32,}")


class ExchangeError(Exception):
    """The exchange gave no usable answer; `kind` says why, and nothing in it holds a URL, key or signature.

    Attributes:
        kind: one of `ERROR_KINDS`.
        code: the exchange's own code (negative), if it sent one.
        status: HTTP status, if there was an answer.
        detail: short text for a person, at most 200 characters.
        wait_s: seconds the exchange asked to be left alone, if it said so.
    """

    def __init__(
        self,
        kind: str,
        detail: str = "",
        *,
        code: int | None = None,
        status: int | None = None,
        wait_s: float | None = None,
    ) -> None:
        self.kind = kind
        self.code = code
        self.status = status
        self.detail = safe_text(detail)
        self.wait_s = wait_s
        super().__init__(kind, self.detail)

    def __str__(self) -> str:
        facts = [f"status {self.status}" if self.status else "", f"code {self.code}" if self.code else ""]
        return ": ".join(part for part in (self.kind, ", ".join(filter(None, facts)), self.detail) if part)


def safe_text(text: str) -> str:
    """One printable line of at most 200 characters, without anything that looks like a key or a signature."""
    line = "".join(char if char.isprintable() else " " for char in text[: 20 * _MAX_DETAIL])
    return _SECRET_LIKE.sub("***", line)[:_MAX_DETAIL]


class _Refusal(msgspec.Struct):
    code: object = None
    msg: object = None


_REFUSAL = msgspec.json.Decoder(_Refusal)


def refusal(status: int, headers: Mapping[str, str], body: bytes, server_ms: int) -> ExchangeError | None:
    """Read an answer as a refusal.

    Args:
        status: HTTP status.
        headers: case-insensitive or lower-case names.
        body: the whole body.
        server_ms: the exchange's clock now, milliseconds since the epoch.

    Returns:
        None for a 2xx answer that is no error object; its shape is still to be checked.
    """
    code, message = _code_and_message(body)
    if 200 <= status < 300 and code is None:
        return None
    kind = _kind(status, code, message)
    wait_s = _wait_s(headers, message, server_ms) if kind in STOPPED else None
    return ExchangeError(kind, message, code=code, status=status, wait_s=wait_s)


def _code_and_message(body: bytes) -> tuple[int | None, str]:
    if body[:64].lstrip()[:1] != b"{":
        return None, ""
    try:
        found = _REFUSAL.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, ""
    code = found.code if isinstance(found.code, int) and found.code < 0 else None
    return code, found.msg if isinstance(found.msg, str) else ""


def _kind(status: int, code: int | None, message: str) -> str:
    """Status first where it stops everything, then the code, then the status."""
    if status == 418 or _BANNED_UNTIL.search(message):
        return "banned"
    if status == 429 or code == -1003:
        return "rate_limited"
    if code is not None and code in _BY_CODE:
        return _BY_CODE[code]
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status >= 500:
        return "server_error"
    return "bad_request" if 400 <= status < 500 else "bad_response"


def _wait_s(headers: Mapping[str, str], message: str, server_ms: int) -> float | None:
    """The longest wait the answer asks for; a ban that is already over asks for none."""
    waits = []
    told = headers.get("retry-after", "")
    if told.isascii() and told.isdigit():
        waits.append(float(told[:9]))
    if ban := _BANNED_UNTIL.search(message):
        waits.append((int(ban[1]) - server_ms) / 1000 + _BAN_MARGIN_S)
    longest = max(waits, default=0.0)
    return min(max(longest, 1.0), _MAX_STOP_S) if longest > 0 else None


@dataclass(slots=True)
class Breaker:
    """Holds calls back after the exchange said stop.

    Attributes:
        until_us: microseconds since the epoch; calls are held back before it.
        kind: why.
        strikes: stops in a row without a good answer between them; each doubles the next pause.
        opened: how often it has opened.
    """

    until_us: int = 0
    kind: str = "banned"
    strikes: int = 0
    opened: int = 0

    def check(self, now_us: int) -> None:
        """Raise ExchangeError while calls are held back."""
        if now_us < self.until_us:
            raise ExchangeError(self.kind, f"held back for {(self.until_us - now_us) / 1e6:.0f} s more")

    def trip(self, error: ExchangeError, now_us: int) -> None:
        """Hold calls back for as long as the error says, else for the kind's own pause.

        Calls that were on their way together count as one strike.
        """
        if now_us >= self.until_us:
            self.strikes += 1
            self.opened += 1
        shortest, longest = _PAUSES_S[error.kind]
        if error.wait_s is None:
            pause = min(shortest * 2.0 ** min(self.strikes - 1, 16), longest)
            # Up to a tenth more, so that two governors behind one address do not come back together.
            pause *= 1 + random.random() / 10  # noqa: S311 - no secret
        else:
            pause = max(error.wait_s, shortest) if error.kind == "waf_blocked" else error.wait_s
        until_us = now_us + int(pause * 1e6)
        if until_us > self.until_us:
            self.until_us, self.kind = until_us, error.kind

    def good(self, now_us: int) -> None:
        """Forget the strikes: the exchange answered, and not while it was being left alone."""
        if now_us >= self.until_us:
            self.strikes = 0
