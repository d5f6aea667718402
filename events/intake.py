"""Reading the plan and result streams through a consumer group.

A delivery stays pending until the commit that decides it acknowledges it, so a crash in between delivers it
again. Deliveries are read in two steps, as the facts of redis ask: after a start or any error first what is
pending (id 0), then what is new (`>`); a lost reply would otherwise reorder plans silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import redis.asyncio
import redis.exceptions

from events.store import StoreError, UnavailableError

FIELDS, FIELD_BYTES = 256, 70_000
GROUP = "governor"
CONSUMER = "governor"


class Delivery(NamedTuple):
    """One stream entry as delivered."""

    stream: str
    entry_id: str
    fields: dict[str, str] | None
    """None: the entry was trimmed from the stream while it was pending."""


class Intake:
    """The consumer group `governor` on some streams, one consumer.

    Args:
        connection: its own client, since reads block.
        streams: stream name to the id its group is created at (`0`: from the beginning, `$`: from now on).
    """

    def __init__(self, connection: redis.asyncio.Redis, streams: dict[str, str]) -> None:
        self._redis = connection
        self._streams = streams
        self._pending = dict.fromkeys(streams, "0")
        self._drained = False

    async def open(self) -> None:
        """Create what is missing of streams and groups, and begin with what is pending.

        Raises:
            UnavailableError: no server.
        """
        for stream, start in self._streams.items():
            try:
                await self._redis.xgroup_create(stream, GROUP, id=start, mkstream=True)
            except redis.exceptions.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise StoreError(f"cannot create group {GROUP!r} on {stream}: {error}") from error
            except Exception as error:
                raise UnavailableError(f"{type(error).__name__}: {error}") from error
        self._pending = dict.fromkeys(self._streams, "0")
        self._drained = False

    async def read(self, *, count: int, block_s: float) -> list[Delivery]:
        """The next deliveries in stream order: pending ones first, then new ones, waiting for those.

        Raises:
            UnavailableError: no server or no answer; call `open` and go on, what was in flight is pending.
            StoreError: the stream or its group is gone; `open` makes them again.
        """
        try:
            while not self._drained:
                if deliveries := await self._read_pending(count):
                    return deliveries
            block = max(1, int(block_s * 1000))
            wanted = dict.fromkeys(self._streams, ">")
            return _deliveries(
                await self._redis.xreadgroup(GROUP, CONSUMER, wanted, count=count, block=block)  # type: ignore[arg-type]
            )
        except redis.exceptions.ResponseError as error:
            raise StoreError(str(error)) from error
        except Exception as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge what needs no event.

        Raises:
            UnavailableError: no server; they will be delivered again, which is harmless.
        """
        try:
            for delivery in deliveries:
                await self._redis.xack(delivery.stream, GROUP, delivery.entry_id)
        except Exception as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error

    async def _read_pending(self, count: int) -> list[Delivery]:
        reply = await self._redis.xreadgroup(GROUP, CONSUMER, self._pending, count=count)  # type: ignore[arg-type]
        deliveries = _deliveries(reply)
        for delivery in deliveries:
            self._pending[delivery.stream] = delivery.entry_id
        self._drained = not deliveries
        return deliveries


def _deliveries(reply: Any) -> list[Delivery]:
    return [
        Delivery(_text(stream), _text(entry_id), _fields(fields))
        for stream, entries in reply or []
        for entry_id, fields in entries
    ]


def _fields(fields: Any) -> dict[str, str] | None:
    """Fields as text, cut far behind what an event keeps, so that what waits stays bounded."""
    if not fields:
        return None
    return {_text(name[:FIELD_BYTES]): _text(value[:FIELD_BYTES]) for name, value in islice(fields.items(), FIELDS)}


def _text(raw: bytes | str) -> str:
    """Text for an event: bytes that are no UTF-8 stay readable and tell what they were."""
    return raw if isinstance(raw, str) else raw.decode(errors="backslashreplace")
