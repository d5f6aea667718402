"""The real dashboard as a real process, and a reader of its stream."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.daemon import wait_for

TOKEN = "a-token-of-more-than-16-characters"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def token_file(directory: Path, token: str = TOKEN, mode: int = 0o600) -> str:
    path = directory / "dashboard-token"
    path.write_text(f"{token}\n")
    path.chmod(mode)
    return str(path)


class Dashboard:
    """A dashboard that listens, and a client of it that comes from its own page."""

    def __init__(self, home: Path, environ: Mapping[str, str]) -> None:
        self._log = home / f"dashboard-{time.monotonic_ns()}.log"
        self.environ = dict(environ) | {"DASHBOARD_PORT": environ.get("DASHBOARD_PORT", "0"), "GOV_LOG_FORMAT": "json"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "governor", "dashboard"], env=self.environ, stdout=log, stderr=log
            )
        self.port = int(wait_for(self._port, within_s=20, what="the dashboard"))
        self.url = f"http://127.0.0.1:{self.port}"
        page = {"Origin": self.url, "X-Governor": "1"}
        self.http = httpx.Client(base_url=self.url, headers=page, timeout=40, trust_env=False)

    def _port(self) -> str:
        assert self.process.poll() is None, self.log
        found = re.search(r'"dashboard_port": (\d+)', self.log)
        return found[1] if found else ""

    @property
    def log(self) -> str:
        return self._log.read_text()

    def snapshot(self) -> Any:
        answer = self.http.get("/api/snapshot")
        assert answer.status_code == 200
        return answer.json()

    def wait(self, look: Callable[[Any], Any], *, within_s: float = 10.0) -> Any:
        """The first snapshot of which something is true."""

        def seen() -> Any:
            found = self.snapshot()
            return found if look(found) else None

        return wait_for(seen, within_s=within_s, what="the dashboard's news")

    def ready(self) -> Any:
        """The first snapshot that is up to date."""
        return self.wait(lambda told: told["health"]["events"]["trusted"])

    def login(self, token: str = TOKEN) -> httpx.Response:
        return self.http.post("/api/login", json={"token": token})

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(10)

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextmanager
def dashboard(home: Path, environ: Mapping[str, str], **more: str) -> Iterator[Dashboard]:
    """A running dashboard, killed at the end if it is still there."""
    one = Dashboard(home, {**environ, **more})
    try:
        yield one
    finally:
        one.close()


class Watching:
    """An open stream, read by a thread of its own."""

    def __init__(self, url: str) -> None:
        self.messages: list[tuple[str, Any]] = []
        self.ended = threading.Event()
        self.headers: httpx.Headers | None = None
        self._client = httpx.Client(timeout=30, trust_env=False)
        self._thread = threading.Thread(target=self._read, args=(f"{url}/api/stream",), daemon=True)
        self._thread.start()

    def _read(self, url: str) -> None:
        name = ""
        try:
            with self._client.stream("GET", url) as answer:
                self.headers = answer.headers
                for line in answer.iter_lines():
                    field, _, value = line.partition(": ")
                    if field == "event":
                        name = value
                    elif field == "data":
                        self.messages.append((name, json.loads(value)))
        except httpx.HTTPError:
            pass
        finally:
            self.ended.set()

    def of(self, name: str) -> list[Any]:
        return [data for event, data in list(self.messages) if event == name]

    def wait(self, name: str, look: Callable[[Any], Any] = bool, *, within_s: float = 10.0) -> Any:
        """The first message of a name of which something is true."""
        return wait_for(
            lambda: next((data for data in self.of(name) if look(data)), None), within_s=within_s, what=f"a {name}"
        )

    def close(self) -> None:
        self._client.close()


@contextmanager
def watching(url: str) -> Iterator[Watching]:
    """An open stream."""
    one = Watching(url)
    try:
        yield one
    finally:
        one.close()
