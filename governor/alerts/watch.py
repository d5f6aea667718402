"""Stands between the daemon and its alerts: reads how things are, folds, and hands over what is to be told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from events.types import Recorded
from governor import disarming
from governor.alerts.delivery import Count, Delivery, Message
from governor.alerts.messages import Alert, Place, render
from governor.alerts.rules import AlertRules, ExchangeHealth, Readings
from governor.alerts.targets import targets_of
from governor.ledger import UNKNOWN
from governor.logs import Logger
from governor.settings import Settings
from projections.state import State

if TYPE_CHECKING:
    from governor.service import Governor

log = Logger("governor.alerts")

LOOK_S = 0.25
FLUSH_S = 1.5
"""How long a stop waits for alerts under way."""


class Alerts:
    """The alerts of one daemon.

    Args:
        settings: where to send them, and what they say.
        count: told how each attempt or alert ended, from any thread.
        clock: microseconds since the epoch.

    Raises:
        SettingsError: they cannot be sent as the settings have it.
    """

    def __init__(self, settings: Settings, count: Count, *, clock: Callable[[], int]) -> None:
        after_us = round(settings.alert_after_s * 1_000_000)
        self.exchange = ExchangeHealth(after_us=after_us)
        self.place = place_of(settings)
        self._clock = clock
        self._rules = AlertRules(self.place, after_us=after_us)
        self._delivery = Delivery(targets_of(settings.alert_urls), count)

    @property
    def waiting(self) -> int:
        """Alerts that have not arrived yet."""
        return self._delivery.waiting

    def event(self, recorded: Recorded, state: State) -> None:
        """Told of every event that this governor is to tell, once it is folded."""
        if self._delivery.targets:
            self._tell(self._rules.event(recorded, state, self._clock()))

    async def watch(self, governor: Governor) -> None:
        """Tell how things are, for ever; where nobody is to be told, it ends at once."""
        while self._delivery.targets:
            try:
                self._tell(self._rules.look(self.readings(governor), self._clock()))
            except Exception:
                log.exception("watching for alerts failed in an unexpected way")
            await asyncio.sleep(LOOK_S)

    def readings(self, governor: Governor) -> Readings:
        """How things are. Only the active governor tells, apart from a lost Redis: then nobody knows who is active."""
        quarantine = governor.quarantine or ""
        problem = governor.ledger.problem or ""
        redis = None if problem == UNKNOWN else "" if problem == quarantine else problem
        if not governor.active:
            return Readings(redis=redis)
        return Readings(
            redis=redis,
            quarantine=quarantine,
            journal=(governor.ledger.keeper.behind or "") if governor.ledger.keeper is not None else "",
            exchange=self.exchange.lost,
            unfinished=disarming.pending(governor.ledger.state),
        )

    def called(self, endpoint: str, outcome: str) -> None:
        """One call to the exchange ended."""
        self.exchange.called(endpoint, outcome, self._clock())

    def close(self) -> None:
        """Send what is left, for a short while."""
        self._delivery.close(FLUSH_S)

    def _tell(self, alerts: list[Alert]) -> None:
        for alert in alerts:
            title, body = render(alert, self.place)
            log.info("alert", kind=alert.kind, title=title, seq=alert.seq)
            self._delivery.put(Message(title, body, alert.tone))


def place_of(settings: Settings) -> Place:
    """Whose alerts these are."""
    return Place(
        account=settings.key_prefix,
        host=socket.gethostname(),
        link=settings.alert_link,
        config_path=str(settings.apply_config_path),
        service=settings.apply_service,
        policy=settings.policy,
    )
