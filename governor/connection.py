"""What every command needs to reach Redis: options from the settings, and the clock."""

from __future__ import annotations

import time
from typing import Any

from governor.settings import Settings


def now() -> int:
    """Wall clock, microseconds since the epoch."""
    return time.time_ns() // 1000


def redis_options(settings: Settings) -> dict[str, Any]:
    """Connection options for every client of the program."""
    return {
        "host": settings.redis_host,
        "port": settings.redis_port,
        "db": settings.redis_db,
        "username": settings.redis_username or None,
        "password": settings.redis_password or None,
        "ssl": settings.redis_tls,
    }
