"""Whether a daemon answers on METRICS_HOST and METRICS_PORT, and what it says of itself."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

import msgspec

from governor.http_client import Answer, HttpClient, UnreadableError
from governor.settings import Settings

IDLE_S = 60.0
MOST_BYTES = 16_000_000
"""Of an answer; the metrics of thousands of symbols are less."""


class Readiness(msgspec.Struct, frozen=True):
    """What /readyz said, or that it said nothing."""

    base: str
    """Where it was asked."""
    answers: bool = False
    ready: bool = False
    active: bool = False
    """Whether this governor reads plans; False for a standby."""
    problems: tuple[str, ...] = ()
    """Why it is not ready, or does not answer."""
    notes: tuple[str, ...] = ()

    @property
    def standby(self) -> bool:
        """Ready to take over from the active one."""
        return self.ready and not self.active


def base_url(settings: Settings) -> str:
    """The address at which a daemon with these settings is asked."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.metrics_host, settings.metrics_host)  # noqa: S104 - asked
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.metrics_port}"


class Routes:
    """What a daemon with these settings serves, asked over plain HTTP. Closed by `aclose`.

    Args:
        settings: where it listens.
        within_s: how long it has for an answer.
    """

    def __init__(self, settings: Settings, *, within_s: float) -> None:
        self.base = base_url(settings)
        self._within_s = within_s
        self._http = HttpClient(self.base, {}, connections=2, idle_s=IDLE_S)

    async def get(self, path: str) -> Answer:
        """Ask once.

        Raises:
            OSError: it does not answer, or not in time.
            UnreadableError: with more than `MOST_BYTES`.
        """
        async with asyncio.timeout(self._within_s):
            return await self._http.get(path, {}, most=MOST_BYTES)

    async def readiness(self) -> Readiness:
        """Ask /readyz. Never raises for what the other side does."""
        try:
            answer = await self.get("/readyz")
            told = json.loads(answer.body)
            problems, notes = tuple(map(str, told["problems"])), tuple(map(str, told.get("notes", ())))
            ready = answer.status == HTTPStatus.OK and not problems
            return Readiness(self.base, True, ready, bool(told.get("active", True)), problems, notes)
        except (OSError, UnreadableError) as error:
            return Readiness(
                self.base, problems=(f"{self.base} does not answer ({str(error) or type(error).__name__})",)
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return Readiness(self.base, problems=(f"{self.base}/readyz is not Governor's",))

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()
