from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar, cast

K = TypeVar("K")
V = TypeVar("V")


class Table(Generic[K, V]):
    """A mapping that can be forked: the fork reads through to its base and keeps what is written to itself.

    A batch of plans is decided on a fork, each plan on what the one before left. The base only ever sees
    events that were committed.
    """

    __slots__ = ("_base", "_own")

    def __init__(self, base: Table[K, V] | None = None) -> None:
        self._base = base
        self._own: dict[K, V | None] = {}

    @classmethod
    def of(cls, pairs: dict[K, V]) -> Table[K, V]:
        """A table of these pairs, oldest first; the mapping is taken over."""
        table = cls()
        table._own = cast("dict[K, V | None]", pairs)
        return table

    def fork(self) -> Table[K, V]:
        return Table(self)

    def rebase(self, base: Table[K, V]) -> None:
        """Read through to another table, which has the same pairs as the one it was forked from."""
        self._base = base

    def get(self, key: K) -> V | None:
        if self._base is None or key in self._own:
            return self._own.get(key)
        return self._base.get(key)

    def set(self, key: K, value: V) -> None:
        """Write a value. A key that is already there keeps its place in the order."""
        self._own[key] = value

    def renew(self, key: K, value: V) -> None:
        """Write a value as the newest."""
        if key in self._own:
            del self._own[key]
        self._own[key] = value

    def pop(self, key: K) -> V | None:
        """Discard a key. Returns its value; None where it was not there."""
        if self._base is None:
            return self._own.pop(key, None)
        value = self.get(key)
        self._own[key] = None
        return value

    def drop_while(self, old: Callable[[V], bool]) -> None:
        """Discard the oldest pairs, up to the first whose value is not `old`. Not of a fork."""
        gone = []
        for key, value in self._own.items():
            if not old(cast("V", value)):
                break
            gone.append(key)
        for key in gone:
            del self._own[key]

    def keep(self, count: int) -> None:
        """Discard the oldest pairs beyond so many. Not of a fork."""
        for key in list(islice(self._own, max(0, len(self._own) - count))):
            del self._own[key]

    def items(self) -> Iterator[tuple[K, V]]:
        """All pairs, oldest first."""
        if self._base is not None:
            for key, value in self._base.items():
                if key not in self._own:
                    yield key, value
        for key, own in self._own.items():
            if own is not None:
                yield key, own

    def __len__(self) -> int:
        return sum(1 for _ in self.items()) if self._base is not None else len(self._own)
