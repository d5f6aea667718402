"""Whether a daemon answers on METRICS_HOST and METRICS_PORT, and what it says of itself."""

from __future__ import annotations

from typing import Any

import msgspec

from governor.settings import Settings


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


async def ask(client: Any, base: str) -> Readiness:
    """Ask an httpx.AsyncClient's `base`/readyz. Never raises for what the other side does."""
    import httpx  # noqa: PLC0415 - takes as long to import as everything else

    try:
        answer = await client.get(f"{base}/readyz")
        told = answer.json()
        problems, notes = tuple(map(str, told["problems"])), tuple(map(str, told.get("notes", ())))
        ready = answer.status_code == 200 and not problems
        return Readiness(base, True, ready, bool(told.get("active", True)), problems, notes)
    except httpx.HTTPError as error:
        return Readiness(base, problems=(f"{base} does not answer ({str(error) or type(error).__name__})",))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Readiness(base, problems=(f"{base}/readyz is not Governor's",))


def session(within_s: float) -> Any:
    """An HTTP client to ask with, that takes no proxy from the environment.

    It takes a while to make, mostly of importing: nothing that is timed may be under way meanwhile.
    """
    import httpx  # noqa: PLC0415

    # It is plain HTTP: reading all certificates would take longer than to ask.
    return httpx.AsyncClient(trust_env=False, timeout=within_s, verify=False)  # noqa: S501
