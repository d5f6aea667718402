"""Check of the alerts: whether the daemon could send them. Sends nothing."""

from __future__ import annotations

import os

from governor.alerts.targets import targets_of
from governor.checks import AS_ROOT, Findings, Look, some
from governor.disarming import in_thread
from governor.settings import SettingsError


async def alerts(look: Look, found: Findings) -> None:
    """Whether each URL is one that apprise can use."""
    urls = look.settings.alert_urls
    if not urls:
        if os.geteuid() == 0:
            found.skip("GOV_ALERT_URLS is empty: the daemon tells nobody")
        else:
            found.skip("GOV_ALERT_URLS is empty, or not for this user to read", AS_ROOT)
        return
    try:
        targets = await in_thread(lambda: targets_of(urls))
    except SettingsError as error:
        found.fail(str(error), "Correct GOV_ALERT_URLS (docs/alerting.md): the daemon does not start with it.")
        return
    found.ok(f"targets: {some([target.name for target in targets])}; not tried, governor alerts test does that")
