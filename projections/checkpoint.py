"""A checkpoint: the state at one event, in one value. A cache, never the truth.

The value is a line of JSON that says what it is, and the state behind it (msgpack, compressed). Whoever starts reads
it and the events after it. A checkpoint of another version, damaged, or of a history that is not the stream's is not
used: the state then comes from the first event, by the same fold.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import msgspec
import zstandard

from events.types import Head, SettingsLoaded
from projections.permits import Plan, Reservation
from projections.state import VERSION, Book, Counts, Mode, State, initial
from projections.table import Table
from projections.totals import Day

_LEVEL = 1
"""Compression costs less than the bytes it saves on the way to Redis; a higher level does not."""


class CheckpointError(ValueError):
    """The value cannot be used; the message says why."""


class _Header(msgspec.Struct, frozen=True):
    version: int
    seq: int
    hash: str
    digest: str
    """SHA-256 (HMAC with a key) over version, seq, hash and the body."""


class _Body(msgspec.Struct, frozen=True, array_like=True):
    time: int
    first_at: int | None
    mode: Mode
    settings: SettingsLoaded | None
    hold_until: int
    counts: Counts
    days: tuple[Day, ...]
    errors: tuple[int, ...]
    noted: tuple[int, ...]
    books: dict[str, Book]
    plans: dict[str, Plan]
    permits: dict[str, Reservation]
    entries: dict[str, int]
    results: dict[str, int]


_TABLES = ("books", "plans", "permits", "entries", "results")
_ENCODE = msgspec.msgpack.Encoder().encode
_DECODE = msgspec.msgpack.Decoder(_Body).decode


def write(state: State, *, key: bytes | None = None) -> bytes:
    """The state as one value.

    Args:
        state: all events up to `state.seq`.
        key: `GOV_AUDIT_KEY`, if the chain is keyed; the checkpoint is then as well.
    """
    values: dict[str, Any] = {name: getattr(state, name) for name in _Body.__struct_fields__ if name not in _TABLES}
    tables: dict[str, Any] = {name: dict(getattr(state, name).items()) for name in _TABLES}
    body = zstandard.ZstdCompressor(level=_LEVEL).compress(_ENCODE(_Body(**values, **tables)))
    header = _Header(version=VERSION, seq=state.seq, hash=state.hash, digest=_digest(VERSION, state.head, body, key))
    return msgspec.json.encode(header) + b"\n" + body


def read(value: bytes, *, key: bytes | None = None) -> State:
    """The state in a value.

    Raises:
        CheckpointError: it is of another version, damaged, or was written with another key.
    """
    line, _, body = value.partition(b"\n")
    try:
        version = msgspec.json.decode(line, type=dict[str, Any])["version"]
        if version != VERSION:
            raise CheckpointError(f"it is of version {version!r}, this program reads {VERSION}")
        header = msgspec.json.decode(line, type=_Header)
        head = Head(header.seq, header.hash)
        if not hmac.compare_digest(header.digest, _digest(version, head, body, key)):
            raise CheckpointError("its hash does not cover what is stored")
        content = _DECODE(zstandard.ZstdDecompressor().decompress(body))
    except (msgspec.MsgspecError, zstandard.ZstdError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"it cannot be read: {error!r}") from error
    state = initial()
    state.seq, state.hash = head
    for name in _Body.__struct_fields__:
        held = getattr(content, name)
        setattr(state, name, Table.of(held) if name in _TABLES else held)
    return state


def _digest(version: int, head: Head, body: bytes, key: bytes | None) -> str:
    covered = f"{version}\n{head.seq}\n{head.hash}\n".encode()
    made = hmac.new(key, covered, hashlib.sha256) if key else hashlib.sha256(covered)
    made.update(body)
    return made.hexdigest()
