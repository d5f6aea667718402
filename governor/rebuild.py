"""Writes the public keys again from the events, and removes what the events do not explain. Never a permit.

A rebuild is a commit without events: it happens only if the stream still ends where the fold ended, so it is safe
beside a live daemon, and twice is once. Keys carry a life of a day from their last write; what is older than that at
the present moment is not written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import redis.asyncio

from events.keys import DAY_US, Keys, day_of
from events.store import Commit, ConflictError, UnavailableError, Write
from events.types import Head
from governor.ledger import Ledger
from projections import views
from projections.state import State

KINDS = ("exec", "daily", "daily_qty", "disarm")


class KeyDifference(msgspec.Struct, frozen=True, kw_only=True):
    """A public key that is not what the events say."""

    key: str
    expected: str | list[str] | None
    """None: the events do not explain this key."""
    actual: str | list[str] | None
    """None: it is missing, or of another type."""


def expected(state: State, keys: Keys, now: int) -> dict[str, Write]:
    """Every public key the events ask for at `now` (microseconds), as the write that makes it.

    That is the state, the disarm of the last day, and of each symbol the executions of the last day and today's totals.
    """
    wanted = [views.state_write(state, keys)]
    if state.mode.disarm is not None and now - state.mode.disarm.at < DAY_US:
        wanted.append(views.disarm_write(state, keys))
    today = day_of(max(now, state.time))
    for symbol, book in state.books.items():
        current = {keys.daily(symbol, today), keys.daily_qty(symbol, today)}
        if book.executions and now - book.executions[-1] < DAY_US:
            current.add(keys.executions(symbol))
        wanted += [w for w in views.symbol_writes(state, symbol, keys) if w.op != "del" and w.key in current]
    return {write.key: write for write in wanted}


async def found(client: redis.asyncio.Redis, keys: Keys) -> dict[str, list[bytes]]:
    """The public keys there are, each with its value or list; of another type: empty.

    Raises:
        UnavailableError: they cannot be read.
    """
    look: Callable[..., Any] = client.execute_command
    held: dict[str, list[bytes]] = {}
    try:
        names = [keys.state]
        for kind in KINDS:
            pattern = f"{_escaped(keys.prefix)}:governor:{kind}:*"
            names += [_name(name) async for name in client.scan_iter(pattern, count=1000)]
        for name in names:
            kind = _name(await look("TYPE", name))
            if kind == "string":
                held[name] = [await look("GET", name) or b""]
            elif kind == "list":
                held[name] = await look("LRANGE", name, 0, -1)
            elif kind != "none":
                held[name] = []
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error
    return held


def compare(wanted: dict[str, Write], held: dict[str, list[bytes]]) -> list[KeyDifference]:
    """What is missing, other, or not explained by the events."""
    names = sorted(wanted.keys() | held.keys())
    return [
        KeyDifference(key=name, expected=_shown(should), actual=_shown(has))
        for name in names
        if (should := list(wanted[name].values) if name in wanted else None) != (has := held.get(name))
    ]


async def rebuild(ledger: Ledger, client: redis.asyncio.Redis, now: int, *, check: bool) -> list[KeyDifference]:
    """Compare, and unless it only checks, mend. Folds again where somebody wrote meanwhile.

    Args:
        ledger: opened; its state is the whole history.
        client: for looking at keys.
        now: the clock, microseconds.
        check: compare only.

    Returns:
        The differences that were found (and mended).

    Raises:
        StoreError: Redis cannot be read or written.
    """
    while True:
        wanted = expected(ledger.state, ledger.keys, now)
        # Yesterday's totals live on until a day after they were last written; nobody misses them, and they may stay.
        leftover = {w.key for symbol, _ in ledger.state.books.items()
                    for w in views.symbol_writes(ledger.state, symbol, ledger.keys)}  # fmt: skip
        held = {
            name: values
            for name, values in (await found(client, ledger.keys)).items()
            if name in wanted or name not in leftover
        }
        differences = compare(wanted, held)
        head = Head(ledger.state.seq, ledger.state.hash)
        try:
            if check:
                await ledger.catch_up()
            elif differences:
                writes = [wanted.get(difference.key, Write("del", difference.key)) for difference in differences]
                await ledger.store.commit(Commit(expected=head, entries=(), writes=writes))
        except ConflictError:
            await ledger.catch_up()
        if head == Head(ledger.state.seq, ledger.state.hash):
            return differences


def _shown(values: Sequence[bytes] | None) -> str | list[str] | None:
    if values is None:
        return None
    texts = [value.decode(errors="replace") for value in values]
    return texts[0] if len(texts) == 1 else texts


def _name(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode(errors="surrogateescape")


def _escaped(prefix: str) -> str:
    return "".join(f"\\{char}" if char in "*?[]\\" else char for char in prefix)
