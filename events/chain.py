"""The hash chain over the stored bytes: each entry's hash covers the one before it."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Iterator
from hashlib import sha256

from events.types import Entry, Head

GENESIS = Head(0, "0" * 64)


class ChainError(Exception):
    """The stored history is not the one that was written."""

    def __init__(self, seq: int, problem: str) -> None:
        super().__init__(f"event {seq}: {problem}")
        self.seq = seq
        """The first event at which the chain does not hold."""
        self.problem = problem


def link(previous: str, name: str, seq: int, timestamp: str, data: bytes, *, key: bytes | None = None) -> str:
    """Hash of one entry: SHA-256 (HMAC with a key) of previous, name, seq, timestamp, data, one a line."""
    covered = f"{previous}\n{name}\n{seq}\n{timestamp}\n".encode() + data
    if key:
        return hmac.digest(key, covered, "sha256").hex()
    return sha256(covered).hexdigest()


def verify(entries: Iterable[Entry], *, after: Head = GENESIS, key: bytes | None = None) -> Iterator[Entry]:
    """Pass entries on while each continues the one before.

    Args:
        entries: in stream order.
        after: the entry before the first.
        key: `GOV_AUDIT_KEY`, if the chain is keyed.

    Raises:
        ChainError: a number is missing or out of order, or a hash does not cover what is stored.
    """
    last, previous = after
    for entry in entries:
        seq = entry.seq
        if seq != last + 1:
            raise ChainError(seq, f"follows event {last}, expected {last + 1}")
        if key is None:  # `link`, in place: this runs for every event that is read
            found = sha256(f"{previous}\n{entry.name}\n{seq}\n{entry.timestamp}\n".encode() + entry.data).hexdigest()
        else:
            found = link(previous, entry.name, seq, entry.timestamp, entry.data, key=key)
        if found != entry.hash:
            raise ChainError(seq, "its hash does not cover what is stored and the hash before it")
        last, previous = seq, found
        yield entry
