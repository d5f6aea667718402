"""Which alerts follow from what happens: a fold of events, conditions and time, with nothing of the world in it.

An event is told when it is folded live. A condition is told once it has lasted; so is its end. The same thing, or many
of one kind, are told at once only so often; what is held back is counted and told with the last one.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import msgspec

from events.types import DisarmStarted, Recorded
from governor.alerts import messages
from governor.alerts.conditions import CONDITIONS, of_condition
from governor.alerts.messages import KINDS, TOLD, Alert, Place
from projections.state import Disarm, State

AT_ONCE = 3
"""Alerts of one kind told within its quiet time; the others are summed up."""
REFUSALS = ("auth", "rate_limited", "banned", "waf_blocked")
"""Answers of the exchange after which it is not asked for a while: there will be no second one to go by."""
ANSWERS = ("bad_symbol", "bad_request", "stale_price", "internal", "clock", "no_exchange")
"""Troubles with one question, not with the exchange."""


class Readings(NamedTuple):
    """How things are. A condition is empty while all is well, says what is wrong, or is None where nobody knows."""

    redis: str | None = None
    quarantine: str | None = None
    journal: str | None = None
    exchange: str | None = None
    unfinished: Disarm | None = None
    """The disarm that has no proof yet."""


class AlertRules:
    """The fold.

    Args:
        place: whose alerts they are.
        after_us: how long something has to be lost, or back.
    """

    def __init__(self, place: Place, *, after_us: int) -> None:
        self.place = place
        self._calm = Calm()
        self._watches = {
            name: Watch(
                lost_after_us=after_us if condition.lost_waits else 0,
                back_after_us=after_us if condition.back_waits else 0,
            )
            for name, condition in CONDITIONS.items()
        }
        self._epoch = 0
        """Of the last disarm whose beginning was told."""

    def event(self, recorded: Recorded, state: State, now: int) -> list[Alert]:
        """What to tell now that an event was folded; `state` is the one after it."""
        if recorded.event.NAME not in TOLD:
            return []
        alert = messages.of_event(recorded, state, self.place)
        if alert is None:
            return []
        told: list[Alert] = []
        if isinstance(recorded.event, DisarmStarted):
            self._epoch = recorded.event.epoch
        elif alert.kind in ("disarm_failed", "disarm_done"):
            told = self._unfinished(state.mode.disarm, now)
        if alert.kind == "disarm_done":
            self._calm.forget("disarm_failed")
        return told + self._calm.offer(alert, now)

    def look(self, readings: Readings, now: int) -> list[Alert]:
        """What to tell of how things are, and of what was held back."""
        told: list[Alert] = []
        for name, watch in self._watches.items():
            if (turned := watch.look(getattr(readings, name), now)) is not None:
                lost, why, lasted_us = turned
                alert = of_condition(name, lost=lost, why=why, lasted_us=lasted_us, at_us=now)
                told += self._calm.offer(alert, now)
        return told + self._unfinished(readings.unfinished, now) + self._calm.due(now)

    def _unfinished(self, disarm: Disarm | None, now: int) -> list[Alert]:
        """A disarm of which nothing was told yet, before anything else is told of it."""
        if disarm is None or disarm.epoch == self._epoch:
            return []
        self._epoch = disarm.epoch
        return self._calm.offer(messages.unfinished(disarm, now, self.place), now)


class Watch:
    """One condition: what was told of it, and since when it is another one."""

    def __init__(self, *, lost_after_us: int, back_after_us: int) -> None:
        self._lost_after_us = lost_after_us
        self._back_after_us = back_after_us
        self._lost = False
        self._lost_us = 0
        self._since: int | None = None

    def look(self, reading: str | None, now: int) -> tuple[bool, str, int] | None:
        """Whether it was lost or came back, why, and how long it was away, microseconds. None: nothing to tell."""
        if reading is None or bool(reading) == self._lost:
            self._since = None
            return None
        since = self._since = now if self._since is None else self._since
        if now - since < (self._back_after_us if self._lost else self._lost_after_us):
            return None
        self._lost, self._since = not self._lost, None
        if self._lost:
            self._lost_us = since
        return self._lost, reading, since - self._lost_us


class _Held(NamedTuple):
    alert: Alert
    others: int
    since_us: int


class Calm:
    """Lets the first ones through and sums the rest up."""

    def __init__(self) -> None:
        self._told: dict[str, deque[tuple[int, str]]] = {}
        """The last times and subjects of each kind."""
        self._held: dict[str, _Held] = {}
        self._latest_us = 0
        """When the latest thing that was told happened."""

    def offer(self, alert: Alert, now: int) -> list[Alert]:
        """The alert, unless the same was just told, or too many of its kind were; then it is held back."""
        told = self._told.setdefault(alert.kind, deque(maxlen=AT_ONCE))
        recent = [subject for at, subject in told if now - at < KINDS[alert.kind].quiet_us]
        held = self._held.get(alert.kind)
        if held is None and len(recent) < AT_ONCE and alert.subject not in recent:
            told.append((now, alert.subject))
            self._latest_us = max(self._latest_us, alert.at_us)
            return [alert]
        self._held[alert.kind] = _Held(
            alert, 0 if held is None else held.others + 1, alert.at_us if held is None else held.since_us
        )
        return []

    def due(self, now: int) -> list[Alert]:
        """What was held back and may be told now, the oldest first."""
        kinds = [kind for kind in self._held if now - self._told[kind][-1][0] >= KINDS[kind].quiet_us]
        return [
            self._summed(held, now) for held in sorted(map(self._held.pop, kinds), key=lambda held: held.alert.at_us)
        ]

    def _summed(self, held: _Held, now: int) -> Alert:
        alert, others, since_us = held
        self._told[alert.kind].append((now, alert.subject))
        # The last message on a phone is taken for how it is: DISARMED must not stand there after RE-ARMED.
        earlier = "EARLIER: " if alert.at_us < self._latest_us else ""
        self._latest_us = max(self._latest_us, alert.at_us)
        return msgspec.structs.replace(alert, headline=f"{earlier}{alert.headline}", more=others, since_us=since_us)

    def forget(self, kind: str) -> None:
        """What was held back of a kind is not worth telling any more."""
        self._held.pop(kind, None)


class ExchangeHealth:
    """Whether the exchange answers, from its calls one by one."""

    def __init__(self, *, after_us: int) -> None:
        self._after_us = after_us
        self._kind = ""
        self._since = self._last = 0

    def called(self, endpoint: str, outcome: str, now: int) -> None:
        """One call ended. Only a signed one says that the key is accepted again."""
        if outcome == "ok":
            if self._kind != "auth" or endpoint.startswith("position"):
                self._kind = ""
        elif outcome not in ANSWERS and self._kind != "auth":
            if not self._kind:
                self._since = now
            self._kind, self._last = outcome, now

    @property
    def lost(self) -> str:
        """The kind of trouble, once calls have failed for long enough with none answered in between; else empty."""
        lasts = self._last - self._since >= self._after_us
        return self._kind if lasts or self._kind in REFUSALS else ""
