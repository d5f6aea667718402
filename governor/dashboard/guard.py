"""What every answer carries, and which requests are answered at all."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from governor.settings import Settings

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OTHER_SITES = ("cross-site", "same-site")
"""What a browser says of a request that another page began."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def error(told: str, status: int, **headers: str) -> Response:
    """A refusal, in a sentence."""
    return JSONResponse({"error": told}, status, {"Cache-Control": "no-store", **headers})


def hosts_of(settings: Settings) -> frozenset[str]:
    """Names the dashboard may be asked for."""
    own = settings.dashboard_host.lower()
    return frozenset((*LOOPBACK, f"[{own}]" if ":" in own else own, *settings.dashboard_allowed_hosts))


class Guard:
    """ASGI around everything: no name but ours (a foreign page could make its own name lead here), and the headers.

    Args:
        app: what is guarded.
        hosts: names it may be asked for, in lower case.
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str]) -> None:
        self.app = app
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        given = headers.getlist("host")
        if len(given) == 1 and host_name(given[0]) in self._hosts:
            if scope["path"].startswith("/api/") and headers.get("sec-fetch-site") in OTHER_SITES:
                # It could read nothing, and have us work: streams are few, and a plan may take the whole history.
                await error("refused: it comes from another site", 403)(scope, receive, with_headers)
                return
            await self.app(scope, receive, with_headers)
            return
        told = "this name is not one of the dashboard's; DASHBOARD_ALLOWED_HOSTS has those beside its own"
        await error(told, 421)(scope, receive, with_headers)


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    name, bracket, _ = host.lower().partition("]")
    return name + bracket if bracket else name.partition(":")[0]


def address(request: Request, *, behind_proxy: bool) -> str:
    """Who asks: the peer, or whom the proxy names last."""
    peer = request.client.host if request.client is not None else "unknown"
    forwarded = request.headers.getlist("x-forwarded-for") if behind_proxy else []
    if not forwarded:
        return peer
    try:
        return str(ipaddress.ip_address(forwarded[-1].rpartition(",")[2].strip()))
    except ValueError:
        return peer


def foreign(request: Request, *, behind_proxy: bool) -> str | None:
    """Why a request that changes something is not taken for one of our own page; None where it is."""
    if request.headers.get("x-governor") != "1":
        return "the header X-Governor: 1 is missing"
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is None and origin is None:
        return "neither Origin nor Sec-Fetch-Site says which page this comes from"
    if site not in (None, "same-origin"):
        return f"it comes from another site ({site[:20]})"
    scheme = "https" if behind_proxy else request.url.scheme
    if origin is not None and origin.lower() != f"{scheme}://{request.headers['host'].lower()}":
        return "it comes from a page of another origin"
    return None
