"""Events to stored bytes and back, one decode path for every reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

import msgspec

from events import chain
from events.types import ALL, BY_NAME, AutoDisarm, Entry, Event, Head, Recorded

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]

UPCASTERS: dict[tuple[str, int], Upcaster] = {}
"""(event name, version n) -> what turns that data into version n + 1. One step each."""

_ENCODER = msgspec.json.Encoder(decimal_format="number")
_DECODERS: dict[str, msgspec.json.Decoder[Event]] = {cls.NAME: msgspec.json.Decoder(cls) for cls in ALL}
_OBJECT = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal)
_SECOND = 1_000_000


class CodecError(ValueError):
    """A stored event that cannot be read: unknown name or version, or data of another shape."""


def check_ladder(types: Iterable[type[Event]] = ALL, steps: dict[tuple[str, int], Upcaster] = UPCASTERS) -> None:
    """Hold the upcasters to the types: every older version has exactly one step, and nothing is left over.

    Raises:
        CodecError: a step is missing, or leads from a version or name that does not exist.
    """
    wanted = {(cls.NAME, version) for cls in types for version in range(1, cls.VERSION)}
    if missing := wanted - steps.keys():
        raise CodecError(f"no upcaster for {sorted(missing)}")
    if spare := steps.keys() - wanted:
        raise CodecError(f"upcasters that lead nowhere: {sorted(spare)}")


check_ladder()


def seconds(at: int) -> str:
    """Microseconds since the epoch as unix seconds with six decimals."""
    return f"{at // _SECOND}.{at % _SECOND:06d}"


def microseconds(timestamp: str) -> int:
    """Inverse of `seconds`.

    Raises:
        CodecError: not unix seconds with six decimals.
    """
    whole, dot, fraction = timestamp.partition(".")
    if not (timestamp.isascii() and dot and len(fraction) == 6 and fraction.isdecimal() and whole.isdecimal()):
        raise CodecError(f"timestamp {timestamp!r} is not unix seconds with six decimals")
    return int(whole) * _SECOND + int(fraction)


def dumps(value: object) -> bytes:
    """JSON of any event part, decimals as numbers."""
    return _ENCODER.encode(value)


def encode(event: Event, *, after: Head, at: int, key: bytes | None = None) -> Entry:
    """The entry that continues the stream after `after`."""
    data, timestamp, seq = _ENCODER.encode(event), seconds(at), after.seq + 1
    digest = chain.link(after.hash, event.NAME, seq, timestamp, data, key=key)
    return Entry(event.NAME, seq, timestamp, data, digest)


def encode_all(events: Iterable[Event], *, after: Head, at: int, key: bytes | None = None) -> list[Entry]:
    """Entries for events of one moment, each linked to the one before."""
    entries: list[Entry] = []
    for event in events:
        entries.append(encode(event, after=after, at=at, key=key))
        after = Head(entries[-1].seq, entries[-1].hash)
    return entries


def plain_fields(entry: Entry) -> list[tuple[str, bytes]]:
    """Fields an entry carries beside the five of every entry, for readers with nothing but redis-cli."""
    if entry.name != AutoDisarm.NAME:
        return []
    data = msgspec.json.decode(entry.data)
    return [
        ("reason", str(data["reason"]).encode()),
        ("context", dumps(data["context"])),
        ("action_taken", str(data["action_taken"]).encode()),
    ]


def decode(entry: Entry) -> Recorded:
    """Read a stored entry, through the upcasters where it is older than its type.

    Raises:
        CodecError: see there; the message names the event and the problem.
    """
    cls = BY_NAME.get(entry.name)
    if cls is None:
        raise CodecError(f"event {entry.seq}: unknown event {entry.name!r}")
    try:
        event = _DECODERS[entry.name].decode(entry.data)
        if event.v != cls.VERSION:
            event = _upcast(cls, entry)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        event = _upcast(cls, entry, error)
    try:
        at = microseconds(entry.timestamp)
    except CodecError as problem:
        raise CodecError(f"event {entry.seq}: {entry.name} cannot be read: {problem}") from None
    return Recorded(entry.seq, at, event, entry.hash)


def _upcast(cls: type[Event], entry: Entry, error: Exception | None = None) -> Event:
    try:
        data = _OBJECT.decode(entry.data)
        version = data["v"]
        if version == cls.VERSION or not 1 <= version < cls.VERSION:
            raise CodecError(
                f"event {entry.seq}: {entry.name} version {version!r} cannot be read "
                f"(this program knows 1 to {cls.VERSION}){f': {error}' if error else ''}"
            )
        for step in range(version, cls.VERSION):
            data = UPCASTERS[cls.NAME, step](data) | {"v": step + 1}
        return msgspec.convert(data, cls, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError) as problem:
        raise CodecError(f"event {entry.seq}: {entry.name} cannot be read: {problem}") from problem
