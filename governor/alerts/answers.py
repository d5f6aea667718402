"""What services answer, read no further than it takes: one that goes on for ever would fill the gate's memory."""

from __future__ import annotations

import contextlib
import io
import time
from typing import Any

MOST_BYTES = 1_000_000
WITHIN_S = 10.0
"""For the body; its status tells already whether the alert was taken."""
_PART = 65_536


def bound() -> None:
    """Have `requests`, which only apprise uses here, read what is answered up to a size and for a time."""
    from requests import adapters, sessions  # noqa: PLC0415 - it comes with apprise

    names = vars(sessions)
    if names["HTTPAdapter"] is not adapters.HTTPAdapter:
        return

    class Bounded(adapters.HTTPAdapter):
        def send(self, *given: Any, **options: Any) -> Any:
            response = super().send(*given, **options)
            response.raw = io.BytesIO(_body(response))
            return response

    names["HTTPAdapter"] = Bounded


def _body(response: Any) -> bytes:
    from urllib3.exceptions import HTTPError  # noqa: PLC0415

    body, until = bytearray(), time.monotonic() + WITHIN_S
    with contextlib.closing(response), contextlib.suppress(HTTPError, OSError):
        while len(body) < MOST_BYTES and time.monotonic() < until:
            part = response.raw.read1(_PART, decode_content=True)
            if not part:
                break
            body += part
    return bytes(body)
