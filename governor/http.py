"""`/metrics`, `/healthz` and `/readyz`, served from a thread of their own.

The answers are asked of the event loop, so a loop that hangs shows as one; rendering happens in the thread, so a
scrape never holds up a permit.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import CollectorRegistry

Answer = tuple[bool, dict[str, Any]]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class' name
        pass


class HttpServer:
    """The three routes.

    Args:
        host: where to listen.
        port: 0 takes a free one, told by `port`.
        registry: metrics.
        healthy: whether the loop is alive, and what to say.
        ready: whether plans are being decided, and what to say.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        registry: CollectorRegistry,
        healthy: Callable[[], Answer],
        ready: Callable[[], Answer],
    ) -> None:
        self._routes: dict[str, Callable[[], tuple[int, str, bytes]]] = {
            "/metrics": lambda: (200, CONTENT_TYPE_LATEST, generate_latest(registry)),
            "/healthz": lambda: _answer(healthy()),
            "/readyz": lambda: _answer(ready()),
        }
        self._server = make_server(host, port, self._app, _Server6 if ":" in host else _Server, _Quiet)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _app(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        route = self._routes.get(environ.get("PATH_INFO", ""))
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            status, kind, body = 405, "text/plain", b"only GET\n"
        elif route is None:
            status, kind, body = 404, "text/plain", b"/metrics /healthz /readyz\n"
        else:
            status, kind, body = route()
        # An answer to HEAD has the same headers and no body.
        sent = [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]
        words = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}
        headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
        if status == 405:
            headers.append(("Allow", "GET, HEAD"))
        start_response(f"{status} {words[status]}", headers)
        return sent


def _answer(answer: Answer) -> tuple[int, str, bytes]:
    fine, content = answer
    return (200 if fine else 503), "application/json", msgspec.json.encode(content) + b"\n"
