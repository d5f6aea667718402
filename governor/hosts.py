"""Which exchange addresses may be asked: the testnets, loopback, and the mainnet only where it is allowed."""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

TESTNET = "https://testnet.binancefuture.com"
HOSTS = ("testnet.binancefuture.com", "demo-fapi.binance.com")
MAINNET = "fapi.binance.com"


def check_base_url(url: str, *, allow_mainnet: bool) -> str:
    """A base URL that may be asked: an allow-listed host over https, or loopback.

    Returns:
        `scheme://host[:port]`, rebuilt from the parts that were checked.

    Raises:
        ValueError: any other; the message names the value and what is allowed.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")
    # Nothing beside the place: no user, no path, nothing around an address in brackets.
    bare = parts.netloc.lower() == place and not (parts.path.strip("/") or parts.query or parts.fragment)
    local = _is_loopback(host) and parts.scheme in ("http", "https")
    listed = parts.scheme == "https" and port in (None, 443) and host in (*HOSTS, *([MAINNET] if allow_mainnet else []))
    if not bare or not (local or listed):
        allowed = ", ".join(f"https://{name}" for name in HOSTS)
        mainnet = "" if allow_mainnet else f"; https://{MAINNET} needs GOV_ALLOW_MAINNET=true"
        shown = re.sub(r"//[^/]*@", "//***@", re.split(r"[?#]", url)[0])[:100]
        raise ValueError(f"{shown!r}, expected {allowed}, or loopback{mainnet}")
    return f"{parts.scheme}://{place}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ("%" not in host and ip_address(host).is_loopback)
    except ValueError:
        return False
