"""The public keys, held to what the events say."""

from __future__ import annotations

from typing import Any

from events.store import UnavailableError, Write
from governor import rebuild
from governor.checks import Findings, Look, some
from governor.rebuild import KeyDifference
from projections import views

TRIES = 10
SYMBOL_KINDS = ("exec", "daily", "daily_qty")


def is_of_a_symbol(look: Look, name: str) -> bool:
    """Whether a public key tells of one symbol's executions."""
    kind = name.removeprefix(f"{look.ledger.keys.prefix}:governor:").partition(":")[0]
    return kind in SYMBOL_KINDS


def tell(differing: list[KeyDifference], found: Findings) -> None:
    """A failure, if anything differs."""
    if differing:
        told = [f"{one.key} is {str(one.actual)[:60]}, expected {str(one.expected)[:60]}" for one in differing]
        found.fail(some(told), "governor rebuild writes the keys again; who else writes to them?")


def expected(look: Look) -> dict[str, Write]:
    """Every public key the events ask for now."""
    return views.expected(look.folded, look.ledger.keys, look.clock())


async def differences(look: Look, names: list[str]) -> list[KeyDifference]:
    """Keys that are not what the events say, seen while nothing was committed; or each time, if something always is."""
    ledger = look.ledger
    wrong: dict[str, KeyDifference] | None = None
    for _ in range(TRIES):
        before = ledger.state.seq
        wanted = {name: write for name, write in expected(look).items() if name in names}
        now = {one.key: one for one in rebuild.compare(wanted, await _held(look, wanted))}
        await ledger.catch_up()
        still = ledger.state.seq == before
        wrong = now if still or wrong is None else {name: now[name] for name in now if name in wrong}
        if still or not wrong:
            break
    return list((wrong or {}).values())


async def _held(look: Look, wanted: dict[str, Write]) -> dict[str, list[bytes]]:
    replies = await pipelined(
        look, [("LRANGE", name, 0, -1) if write.op == "list" else ("GET", name) for name, write in wanted.items()]
    )
    held: dict[str, list[bytes]] = {}
    for name, reply in zip(wanted, replies, strict=True):
        if isinstance(reply, Exception):
            held[name] = []  # of another type
        elif reply:
            held[name] = reply if isinstance(reply, list) else [reply]
    return held


async def pipelined(look: Look, commands: list[tuple[Any, ...]]) -> list[Any]:
    """Answers to some commands; what the server refuses is an answer too."""
    pipe = look.connection.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)
    try:
        answers: list[Any] = await pipe.execute(raise_on_error=False)
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error
    return answers
