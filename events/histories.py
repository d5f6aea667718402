"""How two histories relate: a journal's and a stream's, and a commit nobody saw the end of."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from events.chain import GENESIS
from events.types import Entry, Head

Verdict: TypeAlias = Literal["committed", "void", "lost"]


class Intent(msgspec.Struct, frozen=True):
    """A commit about to be made."""

    expected: Head
    entries: tuple[Entry, ...]
    server: str
    """Identity of the server process it goes to, such as its run_id."""

    @property
    def head(self) -> Head:
        """Where the stream ends once it is committed."""
        return self.entries[-1].head


class Relation(enum.Enum):
    """How journal and stream relate."""

    SAME = "same"
    STREAM_LONGER = "stream longer"
    """The journal is the beginning of the stream."""
    JOURNAL_LONGER = "journal longer"
    """The stream is the beginning of the journal."""
    CONTRADICTION = "contradiction"


class Comparison(NamedTuple):
    """What `compare` found."""

    relation: Relation
    at: Head | None
    """The last event both have; None in a contradiction, and where the stream has the journal's last event no more."""


def compare(
    journal_head: Head,
    journal_hash_at: Callable[[int], str | None],
    stream_head: Head,
    stream_hash_at: Callable[[int], str | None],
) -> Comparison:
    """How the journal and the stream relate.

    At most one hash is asked for, once: that of the shorter one's last event, in the longer one.

    Args:
        journal_head: `Journal.head`.
        journal_hash_at: `Journal.hash_at`.
        stream_head: where the stream ends.
        stream_hash_at: hash of a stream's event, None for one it no longer has because its beginning was archived.
            That is no contradiction. A journal that does not reach back to where the stream ends is one, because
            nothing can be written back then. An empty journal or stream is the beginning of everything.
    """
    shorter = min(journal_head, stream_head, key=lambda head: head.seq)
    found: str | None
    if journal_head.seq == stream_head.seq:
        relation, found = Relation.SAME, stream_head.hash
    elif shorter is journal_head:
        relation, found = Relation.STREAM_LONGER, _hash_at(stream_hash_at, shorter.seq)
        if found is None:
            return Comparison(relation, None)
    else:
        relation, found = Relation.JOURNAL_LONGER, _hash_at(journal_hash_at, shorter.seq)
    return Comparison(relation, shorter) if found == shorter.hash else Comparison(Relation.CONTRADICTION, None)


def settle(intent: Intent, stream_head: Head, hash_at_seq: Callable[[int], str | None], server: str) -> Verdict:
    """What became of a commit whose end nobody saw.

    Args:
        intent: what was about to be committed.
        stream_head: where the stream ends now.
        hash_at_seq: hash of a stream's event, None for one it does not have. Asked at most once, for one of the
            intent's.
        server: identity of the server process that was asked.

    Returns:
        "committed": it is in the stream. "void": it did not happen; something else stands in its place, or the same
        server process still ends where the commit began. "lost": it may have happened and been lost with the server.
        A stream whose beginning was archived beyond the intent cannot tell: "void", so that nothing unproven is kept.
        After "void" a copy of the commit may still arrive from a connection that was not closed; `Journal.append` takes
        its events like anybody's.
    """
    first, last = intent.entries[0], intent.entries[-1]
    if stream_head.seq >= first.seq:
        witness = intent.entries[min(stream_head.seq, last.seq) - first.seq]
        return "committed" if hash_at_seq(witness.seq) == witness.hash else "void"
    if stream_head == intent.expected and server == intent.server:
        return "void"
    return "lost"


def _hash_at(hash_at: Callable[[int], str | None], seq: int) -> str | None:
    return GENESIS.hash if seq == GENESIS.seq else hash_at(seq)
