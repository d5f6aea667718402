"""The governor installed beside an Apply Layer on a machine with systemd, and a person at the desk who looks at it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from tests.systemd.container import WHEELS, Container
from tests.systemd.stand_ins.exchange import PORT, SYMBOLS

GOVERNOR = "quantum-governor.service"
APPLY = "quantum-apply-layer.service"
REDIS = "redis-server.service"
EXCHANGE = "exchange.service"
DEADMAN = "quantum-governor-deadman.service"
APPLY_ENV = "/etc/quantum/apply-layer.env"
GOVERNOR_ENV = "/etc/quantum/governor.env"
HANGS = "/run/apply-layer-hangs"
"""While this file is there the Apply Layer does not come up."""
LOCK_HOLDER = "lock-holder.service"
EVENTS = "quantum:stream:governor.events"
STAND_INS = Path(__file__).parent / "stand_ins"
SOURCE = "/root/governor"


class Desk:
    """What a person on that machine does and sees."""

    def __init__(self, machine: Container) -> None:
        self.machine = machine
        self.figures: list[tuple[str, float]] = []
        """What was measured, in seconds, and not told yet."""
        self.before = ""
        """The tree as it was before the installation."""
        self.secrets: dict[str, str] = {}
        """Made up for this machine, by what they are for."""
        self._symbols = iter(SYMBOLS)
        self._numbers = itertools.count(1)

    # Set up.

    def prepare(self) -> None:
        """Everything a host has before the governor is installed: Redis, a trading Apply Layer, its exchange."""
        machine = self.machine
        for path in STAND_INS.glob("*.py"):
            machine.write(f"/opt/stand-ins/{path.name}", path.read_text())
        for path in STAND_INS.glob("*.service"):
            machine.write(f"/etc/systemd/system/{path.name}", path.read_text())
        machine.sh(
            "python3 -m venv /opt/stand-ins/venv\n"
            f"/opt/stand-ins/venv/bin/pip install -q --no-index --find-links {WHEELS} {SOURCE} h11\n"
            "useradd --system --user-group --no-create-home --shell /usr/sbin/nologin quantum\n"
            "install -d -m 0750 -o root -g quantum /etc/quantum",
            timeout_s=120,
        )
        key, secret = self._secret("key"), self._secret("secret")
        machine.write("/etc/exchange.env", f"API_KEY={key}\nAPI_SECRET={secret}\n", mode="0600")
        testnet = f"BINANCE_TESTNET_API_KEY={key}\nBINANCE_TESTNET_API_SECRET={secret}\n"
        machine.write("/etc/quantum/testnet.env", testnet, mode="0600")
        self._prepare_redis()
        login = f"REDIS_USERNAME=apply\nREDIS_PASSWORD={self.password('apply')}\n"
        lines = f"# how the Apply Layer trades\nAPPLY_MODE=testnet\n{login}"
        machine.write(APPLY_ENV, lines, mode="0640", owner="root:quantum")
        machine.systemctl("daemon-reload")
        machine.systemctl("restart", REDIS)
        machine.systemctl("enable", "--now", REDIS, EXCHANGE, APPLY)

    def _secret(self, name: str) -> str:
        self.secrets[name] = secrets.token_hex(20)
        return self.secrets[name]

    def _prepare_redis(self) -> None:
        """Debian's Redis with the configuration and the users that come with the governor."""
        machine, source = self.machine, f"{SOURCE}/deploy/redis"
        users = machine.sh(f"bash {source}/users.sh --passwords /etc/redis/passwords")
        machine.write("/etc/redis/users.acl", users, mode="0640", owner="redis:redis")
        machine.sh(
            f"install -m 0640 -o redis -g redis {source}/quantum-redis.conf /etc/redis/\n"
            "echo include /etc/redis/quantum-redis.conf >> /etc/redis/redis.conf"
        )
        for user in ("admin", "governor", "apply"):
            self.secrets[user] = self.password(user)

    def password(self, user: str) -> str:
        """A Redis user's password."""
        return self.machine.read(f"/etc/redis/passwords/{user}").strip()

    def install(self, *options: str) -> str:
        """Run the installation from the checkout. Returns what it said."""
        return self.machine.run(f"{SOURCE}/deploy/install.sh", "--wheelhouse", WHEELS, *options, timeout_s=300).stdout

    def install_and_configure(self) -> None:
        """The first installation: without a start, then with the settings of this machine."""
        self.before = self.tree()
        self.install("--no-start")
        credential = "/etc/quantum/governor.credentials/REDIS_PASSWORD"
        self.machine.sh(f"install -m 0600 /etc/redis/passwords/governor {credential}")
        self.configure(BINANCE_BASE_URL=f"http://127.0.0.1:{PORT}", REDIS_USERNAME="governor")
        self.install("--no-proof")

    def tree(self, *directories: str) -> str:
        """Every file below directories (all but what is not on disk), with type, mode, owner and where it links to."""
        return self.machine.sh(f"find {' '.join(directories or '/')} -xdev -printf '%p %y %m %u:%g %l\\n' | sort")

    def measured(self, name: str, seconds: float) -> None:
        """Remember how long something took."""
        self.figures.append((name, seconds))

    # Act.

    def new_symbol(self) -> str:
        """A symbol nobody has traded yet, so that no window of an earlier scenario counts."""
        return next(self._symbols)

    def new_plan(self, symbol: str, action: str = "PARTIAL_25", **more: Any) -> dict[str, Any]:
        """A proposal for the Apply Layer."""
        return {"plan_id": f"plan-{next(self._numbers)}-{int(time.time())}", "symbol": symbol, "action": action, **more}

    def propose(self, *proposals: dict[str, Any]) -> None:
        """Have the Apply Layer publish plans, and take the permits it gets."""
        inside = f"/proc/{self.machine.pid}/root/run/quantum-apply-layer/proposals"

        def opened() -> int:
            try:
                return os.open(inside, os.O_WRONLY | os.O_NONBLOCK) + 1
            except OSError as error:
                if error.errno not in (errno.ENXIO, errno.ENOENT):
                    raise
                return 0

        fifo = self.machine.wait_for(opened, what="an Apply Layer that listens") - 1
        with os.fdopen(fifo, "wb") as lines:
            lines.write(json.dumps(list(proposals)).encode() + b"\n")

    def trade(self, symbol: str, times: int = 1) -> list[dict[str, Any]]:
        """Have that many plans executed, one after the other. Returns the EXECUTION events' data."""
        done = []
        for _ in range(times):
            plan = self.new_plan(symbol)
            self.propose(plan)
            done.append(self.event("EXECUTION", plan_id=plan["plan_id"])["data"])
        return done

    def breach(self) -> dict[str, Any]:
        """Trade a new symbol up to its limit and publish the plan that goes past it. Returns that plan."""
        symbol = self.new_symbol()
        self.trade(symbol, 2)
        plan = self.new_plan(symbol)
        self.propose(plan)
        return plan

    def configure(self, **settings: str) -> None:
        """Set settings in governor.env."""
        self.machine.sh(f"cat >> {GOVERNOR_ENV}", stdin="".join(f"{k}={v}\n" for k, v in settings.items()))

    def governor(self, *words: str, check: bool = True) -> str:
        """Run a command of the governor as root. Returns what it printed."""
        return self.machine.run("/usr/local/bin/governor", *words, check=check, timeout_s=90).stdout

    def json(self, *words: str, check: bool = True) -> Any:
        """The same with --json."""
        return json.loads(self.governor(*words, "--json", check=check))

    def set_mode(self, mode: str) -> None:
        """Edit the Apply Layer's file as a person does, and restart it."""
        self.machine.sh(f"sed -i 's/^APPLY_MODE=.*/APPLY_MODE={mode}/' {APPLY_ENV}\nsystemctl restart {APPLY}")

    def restore(self) -> None:
        """Bring everything back to trading, whatever the last scenario left."""
        machine = self.machine
        machine.sh(f"rm -f {HANGS}\nsystemctl stop {LOCK_HOLDER} 2>/dev/null || true\nsystemctl reset-failed")
        machine.systemctl("start", REDIS, EXCHANGE, GOVERNOR)
        self.wait_ready()
        if self.state()["state"] == "DISARMED":
            self.wait_done()
            self.governor("rearm", "--reason", "the next scenario")
        if self.apply_mode() != "testnet" or self.running_mode() != "testnet":
            self.set_mode("testnet")

    # Look.

    @contextlib.contextmanager
    def client(self) -> Iterator[redis.Redis]:
        """A client of the Redis in there."""
        with self.machine.redis(username="admin", password=self.secrets["admin"]) as client:
            yield client

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Events by name (all without one), oldest first: event, seq, at (seconds), data."""
        with self.client() as client:
            entries: Any = client.xrange(EVENTS)
        return [
            {"event": f["event"], "seq": int(f["seq"]), "at": float(f["timestamp"]), "data": json.loads(f["data"])}
            for _, f in entries
            if not names or f["event"] in names
        ]

    def event(self, name: str, *, after: int = 0, within_s: float = 20.0, **data: Any) -> dict[str, Any]:
        """Wait for an event of a name, later than a sequence number and with that data."""

        def found() -> dict[str, Any] | None:
            for event in self.events(name):
                if event["seq"] > after and all(event["data"].get(key) == value for key, value in data.items()):
                    return event
            return None

        seen = self.machine.wait_for(found, within_s=within_s, what=f"{name} {data}")
        assert seen is not None
        return seen

    def hashes(self) -> list[str]:
        """The chain's links, oldest first."""
        with self.client() as client:
            entries: Any = client.xrange(EVENTS)
        return [fields["hash"] for _, fields in entries]

    def last_seq(self) -> int:
        """Number of the last event."""
        events = self.events()
        return events[-1]["seq"] if events else 0

    def state(self) -> dict[str, Any]:
        """The state as outside readers see it."""
        with self.client() as client:
            value: Any = client.get("quantum:governor:state")
        return json.loads(value) if value else {}

    def wait_for_state(self, state: str) -> None:
        """Wait until outside readers see a state."""
        self.machine.wait_for(lambda: self.state().get("state") == state, what=f"the state {state}")

    def wait_ready(self, *, within_s: float = 60.0) -> None:
        """Wait until the governor says that it is ready."""

        def ready() -> bool:
            with contextlib.suppress(redis.RedisError):
                return self.machine.http("/readyz")[0] == 200 and bool(self.state())
            return False

        self.machine.wait_for(ready, within_s=within_s, what="a ready governor")

    def wait_done(self, *, within_s: float = 60.0) -> dict[str, Any]:
        """Wait until the disarm under way is proven. Returns its AUTO_DISARM or MANUAL_DISARM event."""
        epoch = self.state()["epoch"]

        def done() -> dict[str, Any] | None:
            events = self.events("AUTO_DISARM", "MANUAL_DISARM")
            return next((event for event in events if event["data"]["epoch"] == epoch), None)

        seen = self.machine.wait_for(done, within_s=within_s, what=f"the proof of epoch {epoch}")
        assert seen is not None
        return seen

    def apply_mode(self) -> str:
        """The mode in the Apply Layer's file."""
        found = re.findall(r"^APPLY_MODE=(.*)$", self.machine.read(APPLY_ENV), re.MULTILINE)
        assert len(found) == 1, found
        return str(found[0])

    def running_mode(self) -> str | None:
        """The mode in the environment of the running Apply Layer, None where none runs."""
        environ = self.machine.environ(self.machine.property(APPLY, "MainPID"))
        return environ.get("APPLY_MODE") if environ else None

    def invocation(self, unit: str) -> str:
        """What names this run of a unit."""
        return self.machine.property(unit, "InvocationID")

    def backups(self) -> list[str]:
        """Names of the backups beside the Apply Layer's file."""
        return self.machine.sh(f"ls {APPLY_ENV}.bak.* 2>/dev/null || true").split()
