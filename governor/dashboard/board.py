"""What everybody is told: the snapshot, and what changes of it, encoded once for all."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

from events.codec import dumps
from governor.connection import now, place
from governor.dashboard.feed import Feed
from governor.dashboard.streams import Client, Hub, message
from governor.dashboard.vitals import Vitals
from governor.settings import Settings
from projections.state import initial

LOOK_S = 0.1
TICK_S = 0.2
"""At most this often what changed is told, and"""
QUIET_S = 1.0
"""at least this often that nothing did."""
SHARE = 0.1
"""Of the time goes into telling; with thousands of symbols it is told less often."""
CHART_S = 10.0


class Board:
    """Puts together what `feed` and `vitals` know.

    Args:
        settings: of the governor that is looked at.
        feed: the state and the events.
        vitals: the daemon's and Redis' health.
        version: of this program.
        controls: whether a person can log in and act.
    """

    def __init__(self, settings: Settings, feed: Feed, vitals: Vitals, *, version: str, controls: bool) -> None:
        self.feed, self._vitals = feed, vitals
        self._control = {logged_in: dumps({"enabled": controls, "logged_in": logged_in}) for logged_in in (False, True)}
        self._settings = settings
        self._about = about(settings, version)
        self._made: tuple[int, float, bytes] | None = None

    @property
    def seq(self) -> int:
        """The last event that is known."""
        state = self.feed.state
        return 0 if state is None else state.seq

    def control(self, *, logged_in: bool) -> bytes:
        """The document's part `control`."""
        return self._control[logged_in]

    def snapshot(self, *, logged_in: bool) -> bytes:
        """The full document."""
        made = self._made
        if made is None or made[0] != self.feed.version or time.monotonic() - made[1] > TICK_S:
            made = self._made = (self.feed.version, time.monotonic(), dumps(self._document(now())))
        return self._with_control(made[2], logged_in=logged_in)

    def chart(self) -> bytes:
        """The chart's message."""
        return dumps({"chart": self._chart(now())})

    def tick(self) -> bytes:
        """What changes all the time, without `control`."""
        return dumps(self._now(now()))

    def _with_control(self, document: bytes, *, logged_in: bool) -> bytes:
        return document[:-1] + b',"control":' + self._control[logged_in] + b"}"

    def tick_for(self, tick: bytes, client: Client) -> bytes:
        """The tick's message for one client."""
        return message("tick", self._with_control(tick, logged_in=client.logged_in()), self.seq)

    def _now(self, at: int) -> dict[str, Any]:
        return {
            "now": at / 1e6,
            "status": self.feed.status(at),
            "health": {"events": self.feed.health()}
            | self._vitals.health(self.feed.latency_s, credentials=self.feed.credentials),
            "last_disarm": self.feed.day.last_disarm,
        }

    def _document(self, at: int) -> dict[str, Any]:
        day = self.feed.day
        return self._now(at) | {
            "seq": self.seq,
            "about": self._about | {"exchange": self._settings.base_url if self.feed.credentials else None},
            "plans": list(reversed(day.plans.values())),
            "incidents": list(reversed(day.incidents)),
            "chart": self._chart(at),
        }

    def _chart(self, at: int) -> dict[str, Any]:
        return self.feed.day.chart.told(self.feed.state or initial(), at)


def about(settings: Settings, version: str) -> dict[str, Any]:
    """What does not change."""
    host = socket.gethostname()
    return {
        "version": version,
        "host": host,
        "prefix": settings.key_prefix,
        "redis": place(settings),
        "apply_config_path": str(settings.apply_config_path),
        "apply_service": settings.apply_service,
        "page_title": f"Governor {settings.key_prefix} on {host}",
    }


async def publish(board: Board, feed: Feed, hub: Hub) -> None:
    """Tell everybody what changes, until cancelled."""
    version, ticked, charted, cost = -1, 0.0, time.monotonic(), 0.0
    day = feed.day
    while True:
        await asyncio.sleep(LOOK_S)
        if not hub.clients:
            day = feed.day
            day.take()
            continue
        began = time.monotonic()
        if feed.day is not day:  # it began again: everybody needs everything
            day = feed.day
            _snapshots(board, hub)
            continue
        wait = max(TICK_S if feed.version != version else QUIET_S, cost / SHARE)
        if began - ticked >= min(wait, QUIET_S) - LOOK_S / 2:
            version, ticked = feed.version, began
            tick = board.tick()
            hub.send(lambda client, tick=tick: board.tick_for(tick, client))  # type: ignore[misc]
            for name, rows in zip(("plans", "incidents"), day.take(), strict=True):
                if rows:
                    _tell(hub, name, dumps({"rows": rows}), board.seq)
        if began - charted >= CHART_S:
            charted = began
            _tell(hub, "chart", board.chart(), board.seq)
        cost = time.monotonic() - began


def _tell(hub: Hub, event: str, data: bytes, seq: int) -> None:
    what = message(event, data, seq)
    hub.send(lambda _client: what)


def _snapshots(board: Board, hub: Hub) -> None:
    made = {
        logged_in: message("snapshot", board.snapshot(logged_in=logged_in), board.seq) for logged_in in (False, True)
    }
    hub.send(lambda client: made[client.logged_in()])
