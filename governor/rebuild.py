"""Writes the public keys again from the events, and removes what the events do not explain. Never a permit.

Everything is folded from the first event: what a checkpoint says is compared as any other key, never believed. A
rebuild is a commit without events: it happens only if the stream still ends where the fold ended, so it is safe beside
a live daemon, and twice is once. Keys carry a life of a day from their last write; what is older than that at the
present moment is not written again.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Sequence
from typing import Any

import msgspec
import redis.asyncio

from events import chain
from events.codec import decode
from events.keys import Keys
from events.store import Commit, ConflictError, UnavailableError, Write
from events.types import Entry
from governor.ledger import Ledger
from projections import checkpoint, views
from projections.state import State, digest, evolve, initial

KINDS = ("exec", "daily", "daily_qty", "disarm")


class KeyDifference(msgspec.Struct, frozen=True, kw_only=True):
    """A public key that is not what the events say."""

    key: str
    expected: str | list[str] | None
    """None: the events do not explain this key."""
    actual: str | list[str] | None
    """None: it is missing, or of another type."""


async def fold_all(
    read: AsyncIterable[Sequence[Entry]], *, key: bytes | None, checkpoint_value: bytes | None = None
) -> tuple[State, str | None]:
    """Fold a whole history, verifying it.

    Args:
        read: pages of it, from the first event.
        key: `GOV_AUDIT_KEY`, if the chain is keyed.
        checkpoint_value: what stands where the checkpoint is kept.

    Returns:
        The state, and what is wrong with the checkpoint, if anything.

    Raises:
        ChainError: the chain does not hold.
    """
    state = initial()
    kept: State | None = None
    problem: str | None = None
    if checkpoint_value is not None:
        try:
            kept = checkpoint.read(checkpoint_value, key=key)
            problem = f"it is of event {kept.seq}, which is not in the history"
        except checkpoint.CheckpointError as error:
            problem = str(error)
    async for entries in read:
        for entry in chain.verify(entries, after=state.head, key=key):
            evolve(state, decode(entry))
            if kept is not None and entry.seq == kept.seq:
                problem = None if digest(state) == digest(kept) else "it is not what the events up to it lead to"
    return state, problem


async def found(client: redis.asyncio.Redis, keys: Keys) -> dict[str, list[bytes]]:
    """The public keys there are, each with its value or list; of another type: empty.

    Raises:
        UnavailableError: they cannot be read.
    """
    names = [keys.state]
    try:
        for kind in KINDS:
            pattern = f"{_escaped(keys.prefix)}:governor:{kind}:*"
            names += [_name(name) async for name in client.scan_iter(pattern, count=1000)]
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error
    held = {name: await _held(client, name) for name in names}
    return {name: values for name, values in held.items() if values is not None}


async def _held(client: redis.asyncio.Redis, name: str) -> list[bytes] | None:
    """A key's value or list; of another type: empty; None where there is none."""
    ask: Callable[..., Any] = client.execute_command
    try:
        kind = _name(await ask("TYPE", name))
        if kind == "string":
            return [await ask("GET", name) or b""]
        if kind == "list":
            values: list[bytes] = await ask("LRANGE", name, 0, -1)
            return values
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error
    return None if kind == "none" else []


def compare(wanted: dict[str, Write], held: dict[str, list[bytes]]) -> list[KeyDifference]:
    """What is missing, other, or not explained by the events."""
    names = sorted(wanted.keys() | held.keys())
    return [
        KeyDifference(key=name, expected=_shown(should), actual=_shown(has))
        for name in names
        if (should := list(wanted[name].values) if name in wanted else None) != (has := held.get(name))
    ]


async def look(
    ledger: Ledger, client: redis.asyncio.Redis, now: int, read: AsyncIterable[Sequence[Entry]], *, follow: bool
) -> list[KeyDifference]:
    """Compare the public keys with a history, and write nothing.

    Args:
        ledger: over the stream, not opened; its state is the whole history when this returns.
        client: for looking at keys.
        now: the clock, microseconds.
        read: the history, from the first event.
        follow: whether it is the stream's, which may go on meanwhile; then it is compared where it holds still.

    Raises:
        StoreError: Redis cannot be read.
        ChainError: the chain does not hold.
    """
    wrong = await _fold(ledger, client, read)
    while True:
        head = ledger.state.head
        differences = wrong + await _compare(ledger.state, client, ledger.keys, now)
        if follow:
            await ledger.catch_up()
        if head == ledger.state.head:
            return differences


async def mend(
    ledger: Ledger, client: redis.asyncio.Redis, now: int, read: AsyncIterable[Sequence[Entry]]
) -> list[KeyDifference]:
    """The same, and make every key what the events say. Folds on where somebody wrote meanwhile.

    Returns:
        The differences that were found, and mended.

    Raises:
        StoreError: Redis cannot be read or written.
        ChainError: the chain does not hold.
    """
    wrong = await _fold(ledger, client, read)
    while True:
        differences = wrong + await _compare(ledger.state, client, ledger.keys, now)
        if not differences:
            return []
        wanted = views.expected(ledger.state, ledger.keys, now)
        writes = [wanted.get(difference.key, Write("del", difference.key)) for difference in differences]
        try:
            await ledger.store.commit(Commit(expected=ledger.state.head, entries=(), writes=writes))
        except ConflictError:
            await ledger.catch_up()
        else:
            return differences


async def _fold(
    ledger: Ledger, client: redis.asyncio.Redis, read: AsyncIterable[Sequence[Entry]]
) -> list[KeyDifference]:
    """Fold the history into the ledger. Returns the checkpoint, if it is not what the events lead to."""
    name = ledger.keys.snapshot
    held = await _held(client, name)
    ledger.state, problem = await fold_all(
        read, key=ledger.audit_key, checkpoint_value=None if held is None else b"".join(held)
    )
    return [] if problem is None else [KeyDifference(key=name, expected=None, actual=problem)]


async def _compare(state: State, client: redis.asyncio.Redis, keys: Keys, now: int) -> list[KeyDifference]:
    wanted = views.expected(state, keys, now)
    # Yesterday's totals live on until a day after they were last written; nobody misses them, and they may stay.
    leftover = {write.key for symbol, _ in state.books.items() for write in views.symbol_writes(state, symbol, keys)}
    held = await found(client, keys)
    return compare(wanted, {name: held[name] for name in held if name in wanted or name not in leftover})


def _shown(values: Sequence[bytes] | None) -> str | list[str] | None:
    if values is None:
        return None
    texts = [value.decode(errors="replace") for value in values]
    return texts[0] if len(texts) == 1 else texts


def _name(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode(errors="surrogateescape")


def _escaped(prefix: str) -> str:
    return "".join(f"\\{char}" if char in "*?[]\\" else char for char in prefix)
