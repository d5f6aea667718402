"""Names of the keys, in one place. `<date>` is the UTC date."""

from __future__ import annotations

import datetime as dt
from functools import lru_cache

DAY_US = 86_400_000_000
_EPOCH = dt.date(1970, 1, 1).toordinal()


def day_of(at: int) -> int:
    """UTC day number (days since the epoch) of a time in microseconds."""
    return at // DAY_US


@lru_cache(maxsize=64)
def date_of(day: int) -> str:
    """`YYYY-MM-DD` of a day number."""
    return dt.date.fromordinal(_EPOCH + day).isoformat()


class Keys:
    """Key names under one prefix (`GOV_KEY_PREFIX`, the account's namespace)."""

    def __init__(self, prefix: str = "quantum") -> None:
        self.prefix = prefix
        self.plans = f"{prefix}:stream:apply.plan"
        self.results = f"{prefix}:stream:apply.result"
        self.events = f"{prefix}:stream:governor.events"
        self.state = f"{prefix}:governor:state"
        self.halt = f"{prefix}:governor:halt"
        self.lease = f"{prefix}:governor:lease"
        self.snapshot = f"{prefix}:governor:snapshot"
        self.restorer = f"{prefix}:governor:restorer"

    def permit(self, plan_id: str) -> str:
        return f"{self.prefix}:permit:{plan_id}"

    def block(self, plan_id: str) -> str:
        return f"{self.prefix}:governor:block:{plan_id}"

    def executions(self, symbol: str) -> str:
        return f"{self.prefix}:governor:exec:{symbol}"

    def daily(self, symbol: str, day: int) -> str:
        return f"{self.prefix}:governor:daily:{symbol}:{date_of(day)}"

    def daily_qty(self, symbol: str, day: int) -> str:
        return f"{self.prefix}:governor:daily_qty:{symbol}:{date_of(day)}"

    def disarm(self, day: int) -> str:
        return f"{self.prefix}:governor:disarm:{date_of(day)}"
