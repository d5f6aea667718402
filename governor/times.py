"""Times for a reader."""

from __future__ import annotations

import datetime as dt


def utc(unix: float) -> str:
    """Unix seconds as `2026-01-24 12:00:00.000Z`."""
    return dt.datetime.fromtimestamp(unix, dt.UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"
