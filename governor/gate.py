"""The client of the gate: what an Apply Layer asks before it sends an order.

    gate = PermitGate(redis.Redis(retry=Retry(NoBackoff(), 0)))
    try:
        permit = gate.consume(plan_id, symbol="BTCUSDT")
    except PermitDenied as denied:
        ...  # no order; denied.reason says why
    else:
        ...  # one order, of permit.computed_qty

A permit is good for one execution. `consume.lua` checks and deletes it in one step, so however many ask,
one at most is granted. Whatever goes wrong on the way is a denial: a reply lost after the script ran costs
the permit and grants nothing. A client that retries by itself (redis-py does, ten times, unless told
otherwise) asks again after such a loss and finds no permit: denied as well, only later and with the reason
`no_permit`.

`wait_s` bounds the waiting for a permit that is not there yet; how long one look may take is for the
client's `socket_timeout` to say. With access rules, the client's user needs `~quantum:permit:*
%R~quantum:governor:state %R~quantum:governor:block:* %R~quantum:governor:halt +get +exists +del +time +script|load`
and the selector `(~quantum:permit:* ~quantum:governor:state ~quantum:governor:block:* ~quantum:governor:halt
+evalsha)`: EVALSHA wants its keys writable, whatever the script does with them.

Apart from the standard library this module needs only the client it is given.
"""

import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    import redis as redis_py
    import redis.asyncio as redis_asyncio

__all__ = ["AsyncPermitGate", "Permit", "PermitDenied", "PermitGate"]

_SCRIPT: Final = Path(__file__).with_name("consume.lua").read_bytes()
# Names the script, as EVALSHA wants it; protects nothing.
_SCRIPT_SHA: Final = hashlib.sha1(_SCRIPT, usedforsecurity=False).hexdigest()

_PLAN_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SYMBOL: Final = re.compile(r"[A-Z0-9_]{1,32}")
_FIRST_PAUSE_S: Final = 0.001
_LONGEST_PAUSE_S: Final = 0.020

_SENTENCES: Final = {
    "no_permit": "there is no permit for it",
    "blocked": "the Governor blocked it",
    "expired": "its permit has expired",
    "wrong_symbol": "its permit is for another symbol",
    "not_granted": "its permit does not grant it",
    "already_consumed": "its permit is marked as consumed",
    "stale_epoch": "its permit's epoch is over, or the Governor's state is missing or DISARMED",
    "malformed": "the permit, the plan_id or the symbol is malformed",
    "redis_error": "Redis gave no usable answer",
}


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to execute one plan once, with the quantity and notional it was granted for."""

    granted: bool
    symbol: str
    decision: str
    computed_qty: Decimal
    computed_notional: Decimal
    created_at: float
    consumed: bool
    plan_id: str
    expires_at: float
    epoch: int
    seq: int


class PermitDenied(Exception):  # noqa: N818  (the name is the contract's; a denial is an answer)
    """The plan must not be executed.

    Attributes:
        code: Always `missing_permit_or_redis`, the one code an Apply Layer has to report.
        reason: `no_permit`, `blocked:<reason>`, `expired`, `wrong_symbol`, `not_granted`, `already_consumed`,
            `stale_epoch`, `malformed` or `redis_error`; for the last, `__cause__` is the client's exception.
        plan_id: The plan asked for.
        symbol: The symbol asked for; None for a peek.
    """

    code: Final = "missing_permit_or_redis"

    def __init__(self, plan_id: str, symbol: str | None, reason: str) -> None:
        super().__init__(plan_id, symbol, reason)
        self.plan_id = plan_id
        self.symbol = symbol
        self.reason = reason

    def __str__(self) -> str:
        on = "" if self.symbol is None else f" on {self.symbol!r:.40}"
        why = _SENTENCES.get(self.reason.partition(":")[0], "the gate refused it")
        return f"Plan {self.plan_id!r:.140}{on} must not be executed: {why} ({self.reason})."


class PermitGate:
    """Consumes permits through a `redis.Redis` client; safe to share between threads.

    Args:
        redis: The client. Best without retries of its own, see the module's note.
        key_prefix: The Governor's `GOV_KEY_PREFIX`.
        clock: Monotonic seconds, to measure `wait_s`.
        sleep: Called with seconds between two looks.
    """

    def __init__(
        self,
        redis: "redis_py.Redis",
        *,
        key_prefix: str = "quantum",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._execute: Callable[..., Any] = redis.execute_command
        self._prefix = key_prefix
        self._clock = clock
        self._sleep = sleep

    def consume(self, plan_id: str, *, symbol: str, wait_s: float = 1.2) -> Permit:
        """Take the plan's permit, waiting up to `wait_s` seconds for it to appear.

        Only a missing permit is waited for; a block record or any other denial ends it at once. A denial
        leaves the permit where it is, except one of another epoch, which is deleted.

        Raises:
            PermitDenied: There is no valid permit, or Redis could not be asked.
        """
        ask = _Ask(self._prefix, plan_id, symbol, "consume")
        pauses = _pauses(self._clock() + wait_s, self._clock)
        while True:
            try:
                return ask.read(self._run(ask))
            except PermitDenied as denied:
                pause = next(pauses, None) if denied.reason == "no_permit" else None
                if pause is None:
                    raise
            self._sleep(pause)

    def peek(self, plan_id: str) -> Permit:
        """Return the plan's permit as `consume` would, for any symbol, and leave it in place: for dry runs.

        Raises:
            PermitDenied: `consume` would be denied.
        """
        ask = _Ask(self._prefix, plan_id, None, "peek")
        return ask.read(self._run(ask))

    def _run(self, ask: "_Ask") -> object:
        try:
            try:
                return self._execute(*ask.command, **_AS_BYTES)
            except Exception as error:
                if not _is_no_script(error):
                    raise
                self._execute("SCRIPT LOAD", _SCRIPT)
                return self._execute(*ask.command, **_AS_BYTES)
        except Exception as error:
            raise ask.denied("redis_error") from error


class AsyncPermitGate:
    """Consumes permits through a `redis.asyncio.Redis` client; safe to share between tasks.

    Cancelling `consume` may lose the permit, never grant it twice.

    Args:
        redis: The client. Best without retries of its own, see the module's note.
        key_prefix: The Governor's `GOV_KEY_PREFIX`.
        clock: Monotonic seconds, to measure `wait_s`.
        sleep: Awaited with seconds between two looks; `asyncio.sleep` by default.
    """

    def __init__(
        self,
        redis: "redis_asyncio.Redis",
        *,
        key_prefix: str = "quantum",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] | None = None,
    ) -> None:
        import asyncio  # noqa: PLC0415  (a synchronous bot need not load it)

        self._execute: Callable[..., Awaitable[Any]] = redis.execute_command
        self._prefix = key_prefix
        self._clock = clock
        self._sleep = sleep or asyncio.sleep

    async def consume(self, plan_id: str, *, symbol: str, wait_s: float = 1.2) -> Permit:
        """Take the plan's permit; see `PermitGate.consume`.

        Raises:
            PermitDenied: There is no valid permit, or Redis could not be asked.
        """
        ask = _Ask(self._prefix, plan_id, symbol, "consume")
        pauses = _pauses(self._clock() + wait_s, self._clock)
        while True:
            try:
                return ask.read(await self._run(ask))
            except PermitDenied as denied:
                pause = next(pauses, None) if denied.reason == "no_permit" else None
                if pause is None:
                    raise
            await self._sleep(pause)

    async def peek(self, plan_id: str) -> Permit:
        """Return the plan's permit and leave it in place; see `PermitGate.peek`.

        Raises:
            PermitDenied: `consume` would be denied.
        """
        ask = _Ask(self._prefix, plan_id, None, "peek")
        return ask.read(await self._run(ask))

    async def _run(self, ask: "_Ask") -> object:
        try:
            try:
                return await self._execute(*ask.command, **_AS_BYTES)
            except Exception as error:
                if not _is_no_script(error):
                    raise
                await self._execute("SCRIPT LOAD", _SCRIPT)
                return await self._execute(*ask.command, **_AS_BYTES)
        except Exception as error:
            raise ask.denied("redis_error") from error


# redis-py's word for "the reply's bytes, whatever decode_responses says": a client that decodes would fail on
# bytes that are not UTF-8, after the permit is gone.
_AS_BYTES: Final = {"NEVER_DECODE": True}


class _Ask:
    """One question to the script: its command, and how its reply reads."""

    def __init__(self, prefix: str, plan_id: str, symbol: str | None, mode: Literal["consume", "peek"]) -> None:
        self._plan_id = plan_id
        self._symbol = symbol
        # Only a peek may leave the symbol open: a consume that was handed None must not take just any permit.
        if not _matches(_PLAN_ID, plan_id) or not (mode == "peek" or _matches(_SYMBOL, symbol)):
            raise self.denied("malformed")
        keys = (
            f"{prefix}:permit:{plan_id}",
            f"{prefix}:governor:state",
            f"{prefix}:governor:block:{plan_id}",
            f"{prefix}:governor:halt",
        )
        self.command = ("EVALSHA", _SCRIPT_SHA, len(keys), *keys, plan_id, symbol or "", mode)

    def denied(self, reason: str) -> PermitDenied:
        return PermitDenied(self._plan_id, self._symbol, reason)

    def read(self, reply: object) -> Permit:
        match reply:
            case [b"granted" | "granted", bytes() | str() as text]:
                permit = self._parse(_text(text))
            case [b"denied" | "denied", bytes() | str() as reason]:
                raise self.denied(_text(reason))
            case _:
                raise self.denied("redis_error")
        # A connection out of step would hand us the answer to somebody else's question.
        if permit.plan_id != self._plan_id or self._symbol not in {None, permit.symbol}:
            raise self.denied("redis_error")
        return permit

    def _parse(self, text: str) -> Permit:
        try:
            return _permit(text)
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise self.denied("malformed") from error


def _permit(text: str) -> Permit:
    """Read what the script has checked already, with the money fields exactly as written."""
    fields = json.loads(text, parse_float=Decimal, parse_int=Decimal, strict=False)
    return Permit(
        granted=fields["granted"],
        symbol=fields["symbol"],
        decision=fields["decision"],
        computed_qty=fields["computed_qty"],
        computed_notional=fields["computed_notional"],
        created_at=float(fields["created_at"]),
        consumed=fields["consumed"],
        plan_id=fields["plan_id"],
        expires_at=float(fields["expires_at"]),
        epoch=int(fields["epoch"]),
        seq=int(fields["seq"]),
    )


def _pauses(deadline: float, clock: Callable[[], float]) -> Iterator[float]:
    """Yield how long to sleep before each further look; the last look falls on the deadline."""
    pause = _FIRST_PAUSE_S
    while (left := deadline - clock()) > 0:
        yield min(pause, left)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def _is_no_script(error: Exception) -> bool:
    from redis.exceptions import NoScriptError  # noqa: PLC0415  (loaded by then: the client raised it)

    return isinstance(error, NoScriptError)
