"""Where alerts go: apprise, which knows a hundred services. Imported only where alerts are sent.

A URL of apprise holds a password or token, anywhere in it. So a target is called by its place in the setting and by
the name of its service, and what a service answers is shown without any piece of its URL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from governor.alerts import answers
from governor.alerts.messages import Tone
from governor.settings import SettingsError

INSTALL = "pip install 'quantum-governor[alerts]'"
_parts = re.compile(r"[/?&=@#]+").split
"""A user and password, a token, a host: each is hidden as a whole,"""
_pieces = re.compile(r"[^A-Za-z0-9]+").split
"""and then piece by piece, where only some of it is shown."""
SECRET_LEAST = 4
"""What is shorter is too common to be hidden."""


class Sending(NamedTuple):
    """One way to reach somebody."""

    name: str
    """Such as `1 Telegram`."""
    send: Callable[[str, str, Tone], str | None]
    """Title, body, tone; waits for the service. None: it was taken; else why not."""


def targets_of(urls: Sequence[str]) -> list[Sending]:
    """What the setting names, in its order.

    Raises:
        SettingsError: a URL apprise cannot use, or there is no apprise.
    """
    if not urls:
        return []
    try:
        import apprise  # noqa: PLC0415 - 0.2 s and 16 MB, only where it is asked for
    except ImportError as error:
        raise SettingsError(
            f"GOV_ALERT_URLS is set, expected the packages of the extra 'alerts': {INSTALL} ({error})"
        ) from None
    answers.bound()
    asset = apprise.AppriseAsset(
        storage_mode="memory", service_timeout=0, result_log_disk_size=0, allow_templates=False, async_mode=False
    )
    asset.app_id, asset.app_desc, asset.app_url = "Governor", "Quantum Governor", ""
    return [_target(apprise, asset, number, url, len(urls)) for number, url in enumerate(urls, 1)]


def _target(apprise: Any, asset: Any, number: int, url: str, count: int) -> Sending:
    service = apprise.Apprise.instantiate(url, asset=asset)
    if service is None:
        raise SettingsError(
            f"GOV_ALERT_URLS is (hidden), expected URLs apprise can use: number {number} of {count}, "
            f"{url.partition(':')[0]}://…, is none (docs/alerting.md)"
        )
    if service.request_rate_per_sec == apprise.NotifyBase.request_rate_per_sec:
        service.request_rate_per_sec = 0  # 5.5 s between messages where nobody asked for it; the rules keep them few
    everyone = apprise.Apprise(service, asset=asset)

    def send(title: str, body: str, tone: Tone) -> str | None:
        try:
            # Without a limit of apprise's own it stays in this thread, which a process that ends does not wait for.
            result = everyone.notify(body=body, title=title, notify_type=tone, body_format="text")
        except Exception as error:  # noqa: BLE001 - a hundred services: whatever it is, it was not sent
            return without(f"{type(error).__name__}: {error}", url)
        if result:
            return None
        return without("; ".join(dict.fromkeys(entry.message for entry in result.logs())) or "not sent", url)

    return Sending(f"{number} {service.service_name}", send)


def without(text: str, url: str) -> str:
    """Text on one line, without the pieces of a URL that may be secret."""
    pieces: set[str] = set()
    for part in _parts(url.partition("://")[2]):
        for spelled in (part, unquote(part), quote(unquote(part), safe="")):
            pieces |= {spelled, *spelled.split(":", 1), *_pieces(spelled)}
    for piece in sorted((piece for piece in pieces if len(piece) >= SECRET_LEAST), key=len, reverse=True):
        text = re.sub(re.escape(piece), "…", text, flags=re.IGNORECASE)
    return " ".join(text.split())[:300]
