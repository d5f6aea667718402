"""Events to stored bytes and back, one decode path for every reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

import msgspec

from events import chain
from events.types import (
    ALL,
    BY_NAME,
    AutoDisarm,
    Check,
    Decision,
    Entry,
    Event,
    Execution,
    Head,
    PlanReceived,
    Recorded,
)

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]

UPCASTERS: dict[tuple[str, int], Upcaster] = {}
"""(event name, version n) -> what turns that data into version n + 1. One step each."""

_ENCODER = msgspec.json.Encoder(decimal_format="number")
Decoders = Mapping[str, msgspec.json.Decoder[Event]]
"""By event name."""
_DECODERS: dict[str, msgspec.json.Decoder[Event]] = {cls.NAME: msgspec.json.Decoder(cls) for cls in ALL}
WHOLE: Decoders = _DECODERS


def _left_out(name: str) -> str:
    return f"-{name}"


class _PlanReceived(PlanReceived, frozen=True, kw_only=True, rename=_left_out):
    fields: dict[str, str] = msgspec.field(default_factory=dict)


class _Decision(Decision, frozen=True, kw_only=True, rename=_left_out):
    checks: tuple[Check, ...] = ()
    position_amt: Decimal | None = None
    mark_price: Decimal | None = None
    legs: dict[str, Decimal] | None = None


class _Execution(Execution, frozen=True, kw_only=True, rename=_left_out):
    fields: dict[str, str] = msgspec.field(default_factory=dict)


FOLDED: Decoders = _DECODERS | {cls.NAME: msgspec.json.Decoder(cls) for cls in (_PlanReceived, _Decision, _Execution)}
"""For a fold: what no fold looks at is left out. The names given to those fields are in no event, so that they keep
their defaults; reading them takes half of the time of a start."""
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
    digits = timestamp.replace(".", "", 1)
    if len(digits) < 7 or timestamp[-7] != "." or not (digits.isascii() and digits.isdecimal()):
        raise CodecError(f"timestamp {timestamp!r} is not unix seconds with six decimals")
    return int(digits)


def dumps(value: object) -> bytes:
    """JSON of any event part, decimals as numbers."""
    return _ENCODER.encode(value)


def encode(event: Event, *, after: Head, at: int, key: bytes | None = None) -> Entry:
    """The entry that continues the stream after `after`."""
    return encode_all((event,), after=after, at=at, key=key)[0]


def encode_all(events: Iterable[Event], *, after: Head, at: int, key: bytes | None = None) -> list[Entry]:
    """Entries for events of one moment, each linked to the one before."""
    entries: list[Entry] = []
    timestamp = seconds(at)
    seq, digest = after
    for event in events:
        data, seq = _ENCODER.encode(event), seq + 1
        digest = chain.link(digest, event.NAME, seq, timestamp, data, key=key)
        entries.append(Entry(event.NAME, seq, timestamp, data, digest))
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


def decode(entry: Entry, decoders: Decoders = WHOLE) -> Recorded:
    """Read a stored entry, through the upcasters where it is older than its type.

    Args:
        entry: as it is stored.
        decoders: `WHOLE`, or `FOLDED` where the event is folded and nothing else.

    Raises:
        CodecError: see there; the message names the event and the problem.
    """
    decoder = decoders.get(entry.name)
    if decoder is None:
        raise CodecError(f"event {entry.seq}: unknown event {entry.name!r}")
    try:
        event = decoder.decode(entry.data)
        if event.v != event.VERSION:
            event = _upcast(BY_NAME[entry.name], entry)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        event = _upcast(BY_NAME[entry.name], entry, error)
    try:
        return Recorded(entry.seq, microseconds(entry.timestamp), event, entry.hash)
    except CodecError as problem:
        raise CodecError(f"event {entry.seq}: {entry.name} cannot be read: {problem}") from None


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
