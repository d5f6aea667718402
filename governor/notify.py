"""systemd's notification socket, as sd_notify(3) describes it: a datagram to `NOTIFY_SOCKET`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Tells systemd READY, STATUS, WATCHDOG and STOPPING; does nothing where there is no systemd."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID", _pid()) == _pid()
        self.watchdog_s = int(usec) / 1e6 if mine and usec.isdecimal() and int(usec) > 0 else None
        """Seconds within which systemd wants to hear from us; None when it does not."""

    def send(self, **state: str) -> None:
        """Send assignments such as `READY="1"`. A socket that cannot be reached is no reason to stop trading safety."""
        if not self._address:
            return
        # A line break in a value would begin an assignment of its own.
        message = "\n".join(f"{name}={' '.join(value.split())}" for name, value in state.items()).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as link:
            try:
                link.sendto(message, self._address)
            except OSError:
                return


def _pid() -> str:
    return str(os.getpid())
