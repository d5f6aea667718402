"""`governor alerts`: whether they would arrive."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import click

from governor.console import BAD_SETTINGS, DONE, FAILED, fail, json_option, print_json, settings_of
from governor.console import run as end_with
from governor.manual import Group, codes

if TYPE_CHECKING:
    from governor.alerts.targets import Sending
    from governor.settings import Settings

WITHIN_S = 20.0
"""How long a target has for the test."""


_EXAMPLES = (
    ("sudo governor alerts test", "with the URLs of the service"),
    ("governor alerts test --json", "for a program"),
)
_EXITS = codes("every target took it", exit_1="one did not, or there is none", redis=False)
_SEE = ("governor doctor", "docs/alerting.md")


@click.group(cls=Group, examples=_EXAMPLES, exits=_EXITS, see=_SEE)
def alerts() -> None:
    """What the daemon tells people by phone, chat or mail (GOV_ALERT_URLS)."""


@alerts.command(examples=_EXAMPLES, exits=_EXITS, see=_SEE)
@json_option
def test(*, as_json: bool) -> None:
    """Send a test message to every target now, and say of each whether it took it.

    The daemon is not needed, and neither is Redis. Exit code 0 when all of them did, else 1.
    """
    settings = settings_of()
    if not settings.alert_urls:
        fail("GOV_ALERT_URLS is empty: there is nobody to send to (docs/alerting.md)", FAILED)
    end_with(_test(settings, as_json=as_json))


async def _test(settings: Settings, *, as_json: bool) -> int:
    from governor.alerts.targets import targets_of  # noqa: PLC0415 - only where it is asked for
    from governor.settings import SettingsError  # noqa: PLC0415

    try:
        sendings = targets_of(settings.alert_urls)
    except SettingsError as error:
        fail(str(error), BAD_SETTINGS)
    told = await asyncio.gather(*(_try(sending, settings) for sending in sendings))
    if as_json:
        print_json({"sent": sum(one["sent"] for one in told), "targets": told})
    else:
        for one in told:
            outcome = click.style("sent  ", fg="green") if one["sent"] else click.style("FAILED", fg="red", bold=True)
            click.echo(f"{outcome} {one['target']}, {one['seconds']} s" + (f": {one['error']}" if one["error"] else ""))
    return DONE if all(one["sent"] for one in told) else FAILED


async def _try(sending: Sending, settings: Settings) -> dict[str, Any]:
    from governor.alerts.messages import of_test, render  # noqa: PLC0415
    from governor.alerts.watch import place_of  # noqa: PLC0415
    from governor.connection import now  # noqa: PLC0415
    from governor.disarming import in_thread  # noqa: PLC0415 - its threads do not hold up the end

    alert = of_test(now())
    title, body = render(alert, place_of(settings))
    began = time.monotonic()
    error: str | None
    try:
        error = await asyncio.wait_for(in_thread(lambda: sending.send(title, body, alert.tone)), WITHIN_S)
    except TimeoutError:
        error = f"no answer within {WITHIN_S:g} s"
    seconds = round(time.monotonic() - began, 2)
    return {"target": sending.name, "sent": error is None, "error": error, "seconds": seconds}
