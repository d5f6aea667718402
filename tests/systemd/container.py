"""A machine of its own with a real systemd: Debian in a container, on the kernel of this host.

What takes long is built once and kept in a cache: the root file system (mmdebstrap, from this machine's own package
sources) and the wheels of the product's dependencies, resolved by the Python in there. Everything else is extracted
for each container, survives its reboots and is removed at the end. The container has a network of its own: nothing in
it reaches further than its loopback.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.daemon import wait_for

P = ParamSpec("P")
T = TypeVar("T")

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("GOVERNOR_CI_CACHE", "/var/cache/governor-ci"))
PACKAGES = (
    "ca-certificates", "curl", "dbus", "iproute2", "libpam-systemd", "polkitd", "procps", "python3", "python3-venv",
    "redis-server", "systemd", "systemd-sysv",
)  # fmt: skip
WHEELS = "/var/lib/wheels"
_PREFIX = "governor-container-"
_TREE_BYTES = 4 << 30
"""More than a tree ever takes, with room for everybody else."""
_CLONE_NEWNET = 0x40000000
_LEFT_OUT = (
    ".git",
    ".venv",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    ".coverage*",
    "var",
    "build",
    "dist",
    "*.egg-info",
)


class ContainerUnavailableError(Exception):
    """This machine cannot run one; the message says what is missing."""


def needed() -> None:
    """See that this machine can build and boot a container.

    Raises:
        ContainerUnavailableError: it cannot.
    """
    if os.geteuid() != 0:
        raise ContainerUnavailableError("booting a container needs root: run the tests in tests/systemd as root")
    programs = {"mmdebstrap": "mmdebstrap", "systemd-nspawn": "systemd-container", "zstd": "zstd", "tar": "tar",
                "nsenter": "util-linux", "setpriv": "util-linux"}  # fmt: skip
    packages = [package for program, package in programs.items() if shutil.which(program) is None]
    if packages:
        raise ContainerUnavailableError("programs are missing: apt-get install " + " ".join(dict.fromkeys(packages)))
    if _release() is None or not _sources():
        raise ContainerUnavailableError("no package sources of a Debian or Ubuntu release in /etc/apt")


def prepared() -> tuple[Path, Path]:
    """The root file system (a tar.zst) and the directory of wheels, built where the cache has none.

    Raises:
        ContainerUnavailableError: this machine cannot build them.
    """
    needed()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may ask at the same time; one builds
        rootfs = _rootfs()
        return rootfs, _wheels(rootfs)


def _rootfs() -> Path:
    release = _release()
    assert release is not None
    wanted = CACHE / f"rootfs-{release}-{_key(release, *PACKAGES)}.tar.zst"
    if not wanted.exists():
        part = wanted.with_name("part.tar.zst")
        proxies = subprocess.run(
            ["apt-config", "dump", "--format", '%f "%v";%n', "Acquire::http::Proxy", "Acquire::https::Proxy"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            sources = Path(scratch, "sources.list")
            sources.write_text(_sources())
            options = Path(scratch, "proxies")
            options.write_text(proxies)
            _built(
                "mmdebstrap", "--quiet", "--variant=minbase", f"--aptopt={options}", f"--include={','.join(PACKAGES)}",
                release, str(part), str(sources),
            )  # fmt: skip
        part.rename(wanted)
    return wanted


def _wheels(rootfs: Path) -> Path:
    """Wheels for the container's Python, of everything an installation needs."""
    files = [CHECKOUT / "deploy" / name for name in ("requirements.txt", "requirements-build.txt")]
    wanted = CACHE / f"wheels-{_key(rootfs.name, *(file.read_text() for file in files))}"
    if not wanted.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            root, part = Path(scratch, "root"), Path(scratch, "wheels")
            part.mkdir()
            extract(rootfs, root)
            for file in files:
                shutil.copy(file, root / "root")
            asked = " ".join(f"-r /root/{file.name}" for file in files)
            script = (
                "python3 -m venv /root/venv && "
                f"/root/venv/bin/pip --no-input download -q -d /wheels --only-binary=:all: {asked}"
            )
            binds, environ = _pip_as_here()
            _built(
                "systemd-nspawn", "--quiet", "--directory", str(root), "--as-pid2", "--pipe", "--register=no",
                "--keep-unit", "--timezone=off", "--resolv-conf=replace-host", f"--bind={part}:/wheels",
                *(f"--bind-ro={path}" for path in binds), *(f"--setenv={line}" for line in environ), "sh", "-c", script,
            )  # fmt: skip
            part.rename(wanted)
    return wanted


def _pip_as_here() -> tuple[list[str], list[str]]:
    """How this machine's pip reaches its index: paths to show to the container, variables to set in it."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    values = dict(re.findall(r"^(?:global|install|download|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE))
    values.setdefault("cert", "/etc/ssl/certs/ca-certificates.crt")
    words = [word.removeprefix("file://") for value in values.values() for word in value.split()]
    # A file: URL of an index is the directory above what is in it, which it refers to.
    paths = {str(Path(word).parent if word.endswith("/simple") else Path(word)) for word in words if word[:1] == "/"}
    environ = [f"PIP_{name.upper().replace('-', '_')}={value}" for name, value in values.items()]
    environ += [
        f"{name}={os.environ[name]}" for name in ("http_proxy", "https_proxy", "no_proxy") if name in os.environ
    ]
    return sorted(path for path in paths if Path(path).exists()), environ


def extract(rootfs: Path, root: Path) -> None:
    """Unpack a root file system into a new directory."""
    root.mkdir()
    _built("tar", "--zstd", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", str(root), "-xf", str(rootfs))


def _room() -> Path:
    """Where a tree is fast: in memory where there is plenty, for an installation syncs its whole file system."""
    memory = Path("/dev/shm")  # noqa: S108 - the directory made in it has a random name and is ours alone
    plenty = memory.is_mount() and shutil.disk_usage(memory).free > _TREE_BYTES
    return memory if plenty else CACHE


def _clear(room: Path) -> None:
    """Remove the trees of tests that were killed: those that nobody holds the lock of."""
    for tree in room.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (tree / "alive").open() as alive:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(tree, ignore_errors=True)


def copy_checkout(to: Path) -> None:
    """Copy the repository as a fresh clone would have it."""
    shutil.copytree(CHECKOUT, to, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))


def _release() -> str | None:
    """The code name of this machine's own release."""
    found = re.search(r"^VERSION_CODENAME=\"?(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    return found and found[1]


def _sources() -> str:
    """The sources of that release that this machine's apt has, as lines of a sources.list."""
    release = _release() or "none"
    lines: list[str] = []
    for path in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))):
        if path.suffix == ".list" and path.is_file():
            lines += [line for line in path.read_text().splitlines() if re.match(r"deb\s", line)]
        elif path.suffix == ".sources":
            for stanza in re.split(r"\n\s*\n", path.read_text()):
                lines += _one_line_style(stanza)
    wanted = rf"deb\s+(\[.*?\]\s+)?\S+\s+{release}(-\w+)?\s"
    return "".join(f"{line}\n" for line in dict.fromkeys(lines) if re.match(wanted, line))


def _one_line_style(stanza: str) -> list[str]:
    fields = {name.lower(): value.split() for name, value in re.findall(r"^([\w-]+):[ \t]*(.*)$", stanza, re.MULTILINE)}
    if "deb" not in fields.get("types", []) or fields.get("enabled") == ["no"]:
        return []
    signed = fields.get("signed-by", [])
    option = f"[signed-by={signed[0]}] " if signed and signed[0].startswith("/") else ""
    components = " ".join(fields.get("components", []))
    return [f"deb {option}{uri} {suite} {components}" for uri in fields["uris"] for suite in fields["suites"]]


def _key(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _built(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"{shlex.join(command)}: exit code {done.returncode}\n{said}")


class Container:
    """One container on a directory tree. Boot it, power it off or kill it, and boot it again.

    Args:
        root: its root file system, extracted.
        name: host name of its own.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = name
        self.pid = 0
        """Its init, seen from here."""
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._cgroups: list[Path] = []
        self._console = root.with_name(f"{name}.console")

    def boot(self, *, within_s: float = 60.0) -> float:
        """Boot, and return when systemd has started everything. Returns the seconds it took."""
        began = time.monotonic()
        enter = 'while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs"; shift; done; shift; exec "$@"'
        command = [
            "sh", "-euc", enter, "sh", *(str(path) for path in self._make_cgroups()), "--",
            "setpriv", "--pdeathsig", "TERM",  # no container outlives its tests: it shuts down in order
            "systemd-nspawn", "--quiet", "--directory", str(self.root), "--boot", f"--machine={self.name}",
            "--register=no", "--keep-unit", "--private-network", "--resolv-conf=off", "--timezone=off",
            "--link-journal=no", "--console=pipe",
        ]  # fmt: skip
        with self._console.open("ab") as console:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
                env=os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )  # fmt: skip
        self.pid = self.wait_for(self._init, within_s=within_s, what="init")
        bus = Path(f"/proc/{self.pid}/root/run/systemd/private")
        self.wait_for(lambda: self._alive() and bus.exists(), within_s=within_s, what="systemd's socket")
        self._threads = ThreadPoolExecutor(1, initializer=_enter_network, initargs=(self.pid,))

        def up() -> bool:
            return self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded")

        self.wait_for(up, within_s=within_s, what="the end of booting")
        return time.monotonic() - began

    def poweroff(self) -> None:
        """Shut down in order; what does not want to is killed."""
        if self._nspawn is not None and self.pid and self._alive():
            self.run("systemctl", "poweroff", check=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._nspawn.wait(30)
        self.kill()

    def kill(self) -> None:
        """End everything in it at once, as a power cut would."""
        if self._nspawn is not None and self._alive():
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                if self.pid:
                    os.kill(self.pid, signal.SIGKILL)
                else:
                    self._nspawn.terminate()  # it takes down what it has started; killed, it could not
                self._nspawn.wait(10)
            self._nspawn.kill()
            self._nspawn.wait()
        if self._threads is not None:
            self._threads.shutdown()
        self._nspawn, self._threads, self.pid = None, None, 0
        for group in self._cgroups:
            for path in sorted((group, *group.rglob("*/")), reverse=True):
                with contextlib.suppress(OSError):  # something is still on its way out
                    path.rmdir()

    def run(
        self, *command: str, user: str = "", stdin: str = "", check: bool = True, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in there, as root or as another user with that user's groups."""
        assert self.pid, f"{shlex.join(command)}: the container is not running"
        become = []
        if user:
            group = self.run("id", "-g", user).stdout.strip()
            become = ["setpriv", f"--reuid={user}", f"--regid={group}", "--init-groups"]
        environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
                   "LANG": "C.UTF-8"}  # fmt: skip
        done = subprocess.run(
            ["nsenter", "--target", str(self.pid), "--all", "--", *become, *command],
            input=stdin, capture_output=True, text=True, check=False, timeout=timeout_s, env=environ,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def sh(self, script: str, **options: Any) -> str:
        """Run a shell script in there. Returns what it printed."""
        return self.run("sh", "-euc", script, **options).stdout

    def path(self, inside: str) -> Path:
        """A path in there, seen from here. No link is followed out of the tree, so name none."""
        return self.root / inside.lstrip("/")

    def read(self, path: str) -> str:
        """A file in there, symlinks followed as in there."""
        return self.run("cat", path).stdout

    def write(self, path: str, text: str, *, mode: str = "0644", owner: str = "root:root") -> None:
        """Write a file in there, and its directories."""
        user, _, group = owner.partition(":")
        self.run("install", "-D", "-m", mode, "-o", user, "-g", group, "/dev/stdin", path, stdin=text)

    def systemctl(self, *words: str, check: bool = True) -> str:
        """Return what systemctl answers, without spaces around it."""
        return self.run("systemctl", "--no-pager", *words, check=check).stdout.strip()

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        lines = self.systemctl("show", f"--property={','.join(properties)}", unit).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def property(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.show(unit, name)[name]

    def environ(self, pid: str) -> dict[str, str] | None:
        """What a process in there was started with, None where there is none (any more)."""
        lines = self.run("cat", f"/proc/{pid}/environ", check=False).stdout.split("\0")
        return dict(line.split("=", 1) for line in lines if line) or None

    def inside(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call a function in the network of the container."""
        assert self._threads is not None, "it is not running"
        return self._threads.submit(work, *args, **options).result()

    def redis(self, **options: Any) -> redis.Redis:
        """Return a client of the Redis in there that never retries by itself."""
        outer = self

        class Inside(redis.Connection):
            def _connect(self) -> Any:
                return outer.inside(super()._connect)

        pool = redis.ConnectionPool(
            connection_class=Inside, host="127.0.0.1", port=6379, decode_responses=True, protocol=2,
            retry=Retry(NoBackoff(), 0), socket_timeout=10, **options,
        )  # fmt: skip
        return redis.Redis.from_pool(pool)

    def http(self, path: str, *, port: int = 8044) -> tuple[int, str]:
        """Status and body of a page in there; status 0 where nobody answers."""

        def get() -> tuple[int, str]:
            try:
                with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except HTTPError as error:
                with error:
                    return error.code, error.read().decode()
            except OSError as error:
                return 0, str(error)

        return self.inside(get)

    def journal(self, unit: str = "", *, since: float = 0.0) -> str:
        """What a unit (all without one) has logged since a time in seconds since the epoch."""
        words = ["--no-pager", "--output=short-precise", f"--since=@{since:.6f}", *([f"--unit={unit}"] if unit else [])]
        if self.pid and self._alive():
            return self.run("journalctl", *words, check=False).stdout
        directory = self.root / "var/log/journal"
        done = subprocess.run(
            ["journalctl", f"--directory={directory}", *words], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def console(self) -> str:
        """What systemd printed while it booted and shut down."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def wait_for(self, look: Callable[[], T], *, within_s: float = 20.0, what: str = "it") -> T:
        """As `tests.daemon.wait_for`; a machine takes longer."""
        return wait_for(look, within_s=within_s, what=what)

    def _make_cgroups(self) -> list[Path]:
        """Make a control group of its own below ours: without, the services of two containers would share theirs."""
        own = dict(re.findall(r"^\d+:([^:]*):(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE))
        self._cgroups = []
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, kind = line.partition(" - ")
            root, mounted = fields.split()[3:5]
            hierarchy = "" if kind.startswith("cgroup2 ") else "name=systemd" if "name=systemd" in kind else None
            if hierarchy in own and root == "/":
                group = Path(mounted + own[hierarchy], f"{self.name}-{os.getpid()}")
                with contextlib.suppress(OSError):  # where there can be none, one container at a time has to do
                    group.mkdir(exist_ok=True)
                    self._cgroups.append(group)
        return self._cgroups

    def _alive(self) -> bool:
        return self._nspawn is not None and self._nspawn.poll() is None

    def _init(self) -> int:
        """The container's systemd: the child of nspawn that has become one."""
        assert self._alive(), f"the container did not start:\n{self.console()[-3000:]}"
        assert self._nspawn is not None
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                text = status.read_text()
                if re.search(rf"^PPid:\s+{self._nspawn.pid}$", text, re.MULTILINE) and text.startswith(
                    "Name:\tsystemd\n"
                ):
                    return int(status.parent.name)
        return 0


def _enter_network(pid: int) -> None:
    """Move this thread, and no other, into the network of a process."""
    with Path(f"/proc/{pid}/ns/net").open("rb") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network of process {pid}")


@contextlib.contextmanager
def container(name: str) -> Iterator[Container]:
    """A container with the wheels in `WHEELS` and the checkout in /root/governor, not booted yet; gone at the end.

    Raises:
        ContainerUnavailableError: this machine cannot run one.
    """
    rootfs, wheels = prepared()
    room = _room()
    _clear(room)
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=room, ignore_cleanup_errors=True) as scratch,
        Path(scratch, "alive").open("w") as alive,
    ):
        fcntl.flock(alive, fcntl.LOCK_EX)
        root = Path(scratch, "root")
        extract(rootfs, root)
        shutil.copytree(wheels, root / WHEELS.lstrip("/"))
        copy_checkout(root / "root/governor")
        (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        (root / "var/log/journal").mkdir(exist_ok=True)  # what it logged is there after a reboot
        one = Container(root, name)
        try:
            yield one
        finally:
            one.poweroff()


def main() -> None:
    """Build what the cache lacks, as a step of its own."""
    began = time.monotonic()
    rootfs, wheels = prepared()
    print(json.dumps({"rootfs": str(rootfs), "wheels": str(wheels), "seconds": round(time.monotonic() - began, 1)}))  # noqa: T201 - its answer


if __name__ == "__main__":
    main()
