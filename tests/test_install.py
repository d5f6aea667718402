"""deploy/install.sh, run for real: in a mount namespace with directories of its own, and a stand-in systemctl.

What systemd itself makes of it is tested on a booted one, in tests/systemd.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from governor import deploying, envfile, settings
from tests.conftest import NewServer, build, missing
from tests.daemon import wait_for

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PYTHON = "/usr/bin/python3"
SOURCES = ("governor", "events", "projections", "deploy", "pyproject.toml", "README.md", "LICENSE")
KEY, SECRET = "k" * 60 + "0001", "s" * 60 + "0002"
TESTNET = f"export NOT=taken\n  BINANCE_TESTNET_API_KEY = '{KEY}'\nBINANCE_TESTNET_API_SECRET={SECRET}\nOTHER=x\n"
MOUNTED = ("etc", "opt", "run", "var/lib", "usr/local/bin", "usr/local/share", "home")
UNITS = (
    "quantum-governor.service",
    "quantum-governor-disarm.socket",
    "quantum-governor-disarm@.service",
    "quantum-governor-deadman.service",
    "quantum-governor-dashboard.service",
)

SYSTEMCTL = r"""#!/bin/bash
# Keeps which units are there, active and enabled in files, and a log of what it was asked.
set -u
echo "$*" >>"$STAND_IN/log"
words=()
for word in "$@"; do [[ $word == -* ]] || words+=("$word"); done
verb=${words[0]} unit=${words[1]:-}
case $verb in
    is-active) [[ -e $STAND_IN/active.$unit ]] ;;
    is-enabled) [[ -e $STAND_IN/enabled.$unit ]] ;;
    enable) touch "$STAND_IN/enabled.$unit" ;;
    disable) rm -f "$STAND_IN/enabled.$unit" ;;
    restart | start)
        [[ ! -e $STAND_IN/fails.$unit ]] || { echo "Job for $unit failed." >&2; exit 1; }
        touch "$STAND_IN/active.$unit" ;;
    try-restart) ;;
    stop) rm -f "$STAND_IN/active.$unit" ;;
    show)
        if [[ $* == *LoadState* ]]; then
            [[ -e /etc/systemd/system/$unit ]] && echo loaded || echo not-found
        else
            echo ActiveState=failed
        fi ;;
    daemon-reload | reset-failed) ;;
    *) echo "unknown: $*" >&2; exit 64 ;;
esac
"""


def host_can() -> None:
    """Skip where it cannot be tried."""
    if os.geteuid() != 0:
        missing("the installation has to be root")
    for tool in ("unshare", "systemd-analyze", "systemd-sysusers", "runuser", "setpriv"):
        if shutil.which(tool) is None:
            missing(f"{tool} is not there")
    enough = "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))"
    if subprocess.run([PYTHON, "-I", "-c", enough], capture_output=True, check=False).returncode:
        missing(f"{PYTHON} is not 3.11 or later with venv")


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of the lock files, for the system's Python."""
    host_can()
    directory = tmp_path_factory.mktemp("wheelhouse")
    subprocess.run([PYTHON, "-I", "-m", "venv", directory / "venv"], check=True)
    subprocess.run(
        [directory / "venv/bin/python", "-m", "pip", "-q", "--disable-pip-version-check", "download", "-d",
         directory / "wheels", "--only-binary", ":all:", "--require-hashes", "-r", DEPLOY / "requirements.txt",
         "-r", DEPLOY / "requirements-build.txt"],
        check=True,
    )  # fmt: skip
    return directory / "wheels"


class Host:
    """A host of one's own: the directories an installation writes to, and what systemctl was asked."""

    def __init__(self, home: Path, wheels: Path, *, source: Path = ROOT) -> None:
        self.home, self.wheels = home, wheels
        self.checkout = home / "checkout"
        self.stand_in = home / "systemctl"
        (home / "bin").mkdir(parents=True)
        self.stand_in.mkdir()
        for name in MOUNTED:
            (home / "root" / name).mkdir(parents=True)
        shutil.copytree("/etc", self.path("/etc"), symlinks=True, dirs_exist_ok=True, ignore=_special)
        for unit in UNITS:
            self.path(f"/etc/systemd/system/{unit}").unlink(missing_ok=True)
        self.path("/run/systemd/system").mkdir(parents=True)
        self.path("/run/lock").mkdir()
        self.path("/usr/local/share/man").mkdir()  # as Debian has it
        self.checkout.mkdir()
        for name in SOURCES:
            if (source / name).is_dir():
                shutil.copytree(source / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source / name, self.checkout)
        tool = home / "bin" / "systemctl"
        tool.write_text(SYSTEMCTL)
        tool.chmod(0o755)

    def copy(self, home: Path) -> Host:
        """Return one just like this."""
        home.mkdir()
        for name in ("bin", "systemctl", "checkout", *(f"root/{name}" for name in MOUNTED)):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-al" if name == "root/opt" else "-a", self.home / name, home / name], check=True)
        one = copy.copy(self)
        one.home, one.checkout, one.stand_in = home, home / "checkout", home / "systemctl"
        return one

    def path(self, inside: str) -> Path:
        """Where a path of the host lies."""
        return self.home / "root" / inside.lstrip("/")

    def write(self, inside: str, text: str, mode: int = 0o640) -> Path:
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    @property
    def asked(self) -> list[str]:
        log = self.stand_in / "log"
        return log.read_text().splitlines() if log.exists() else []

    def acted(self) -> list[str]:
        """What changed something about the units, since it was last asked."""
        seen = [call for call in self.asked if not re.search(r"\b(is-active|is-enabled|show|reset-failed)\b", call)]
        (self.stand_in / "log").unlink(missing_ok=True)
        return seen

    def command(self, *words: str, **environ: str) -> list[str]:
        binds = "".join(f'mount --bind "{self.home}/root/{name}" /{name}; ' for name in MOUNTED)
        return [
            "unshare", "--mount", "--propagation", "private", "sh", "-euc", f'{binds} exec "$@"', "sh",
            "env", "-i", f"PATH={self.home}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/nowhere",
            f"STAND_IN={self.stand_in}", *(f"{name}={value}" for name, value in environ.items()), *words,
        ]  # fmt: skip

    def run(self, *words: str, code: int = 0, **environ: str) -> str:
        """Run a command on the host; what it said, on both."""
        done = subprocess.run(
            self.command(*words, **environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout
        assert KEY not in done.stdout
        assert SECRET not in done.stdout
        return done.stdout

    def install(self, *options: str, code: int = 0) -> str:
        more = () if {"--rollback", "--uninstall"} & set(options) else ("--wheelhouse", str(self.wheels))
        return self.run(str(self.checkout / "deploy/install.sh"), *more, *options, code=code)

    def tree(self) -> dict[str, tuple[str, int, int, int]]:
        """Everything there is, with its content, mode and owner."""
        found = {}
        root = self.home / "root"
        for path in sorted(root.rglob("*")):
            status = path.lstat()
            content = (
                str(path.readlink())
                if path.is_symlink()
                else hashlib.sha256(path.read_bytes()).hexdigest()
                if path.is_file()
                else ""
            )
            found[str(path.relative_to(root))] = (content, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
        return found

    @property
    def current(self) -> str:
        return str(self.path("/opt/quantum/governor/current").readlink())

    @property
    def releases(self) -> list[str]:
        return sorted(path.name for path in self.path("/opt/quantum/governor/releases").iterdir())

    def who(self, inside: str) -> str:
        """Mode, owner and group, as the host names them."""
        status = self.path(inside).lstat()
        names = [
            {line.split(":")[2]: line.split(":")[0] for line in self.path(f"/etc/{file}").read_text().splitlines()}
            for file in ("passwd", "group")
        ]
        user, group = names[0][str(status.st_uid)], names[1][str(status.st_gid)]
        return f"{stat.S_IMODE(status.st_mode):o} {user}:{group}"

    def offer(self, other: Host | None = None) -> str:
        """Put the release of this checkout there, as if it had been built before; its name."""
        found = re.search(r"release (\S+), on", self.install("--dry-run", "--no-start"))
        assert found
        self.acted()
        release = self.path(f"/opt/quantum/governor/releases/{found[1]}")
        release.parent.mkdir(parents=True, exist_ok=True)
        built = next((other or self).path("/opt/quantum/governor/releases").glob("*-*"))
        subprocess.run(["cp", "-al", built, release], check=True)
        shutil.rmtree(release / "deploy")
        shutil.copytree(self.checkout / "deploy", release / "deploy")
        return found[1]

    def another_release(self, text: str = "another") -> str:
        """Change the checkout; the release it becomes is there as if it had been built before."""
        with (self.checkout / "governor/__init__.py").open("a") as file:
            file.write(f"# {text}\n")
        return self.offer()


def _special(directory: str, names: list[str]) -> list[str]:
    """What in /etc is neither file nor directory."""
    return [name for name in names if not (Path(directory, name).is_file() or Path(directory, name).is_dir())]


def bare(home: Path, installed: Host) -> Host:
    """A host on which nothing was installed, but the release is built: that takes the time."""
    one = Host(home, installed.wheels, source=installed.checkout)
    one.write("/etc/quantum/apply-layer.env", "APPLY_MODE=testnet\n")
    one.write("/etc/systemd/system/quantum-apply-layer.service", "[Service]\nExecStart=/bin/sleep infinity\n", 0o644)
    one.offer(installed)
    return one


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheelhouse: Path) -> Iterator[Host]:
    """A host with an installation that was not started; for looking at only."""
    one = Host(tmp_path_factory.mktemp("installed") / "host", wheelhouse)
    one.write("/etc/quantum/testnet.env", TESTNET, 0o600)
    one.install("--no-start")
    yield one
    shutil.rmtree(one.home)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, installed: Host) -> Iterator[Host]:
    """A host on which nothing was installed; to be copied."""
    one = bare(tmp_path_factory.mktemp("empty") / "host", installed)
    yield one
    shutil.rmtree(one.home)


@pytest.fixture
def host(tmp_path: Path, empty: Host) -> Iterator[Host]:
    """A host on which nothing was installed, but the release is built: that takes the time."""
    one = empty.copy(tmp_path / "host")
    yield one
    shutil.rmtree(one.home)


@pytest.fixture
def ready(host: Host, new_server: NewServer) -> Host:
    """A host whose settings name a Redis that keeps what it is told."""
    server = new_server("valkey", appendonly=True)
    host.write("/etc/quantum/governor.env", f"REDIS_PORT={server.port}\nGOV_REQUIRE_DURABLE=true\n")
    return host


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, empty: Host) -> Iterator[Host]:
    """A host on which it was installed and started; to be copied."""
    one = empty.copy(tmp_path_factory.mktemp("started") / "host")
    with build("valkey", appendonly=True) as server:
        one.write("/etc/quantum/governor.env", f"REDIS_PORT={server.port}\nGOV_REQUIRE_DURABLE=true\n")
        one.install("--no-proof")
        one.acted()
        yield one
    shutil.rmtree(one.home)


@pytest.fixture
def running(tmp_path: Path, started: Host) -> Iterator[Host]:
    """A host on which it was installed and started."""
    one = started.copy(tmp_path / "host")
    yield one
    shutil.rmtree(one.home)


# -- what is there afterwards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/opt/quantum", "755 root:root"),
        ("/opt/quantum/governor", "755 root:root"),
        ("/opt/quantum/governor/releases", "755 root:root"),
        ("/opt/quantum/governor/current/libexec/quantum-governor-disarm", "755 root:root"),
        ("/usr/local/bin/governor", "755 root:root"),
        ("/usr/local/share/man/man1/governor.1", "644 root:root"),
        ("/usr/local/share/bash-completion/completions/governor", "644 root:root"),
        ("/etc/quantum/governor.env", "640 root:quantum"),
        ("/etc/quantum/governor.credentials", "700 root:root"),
        ("/etc/quantum/governor.credentials/BINANCE_TESTNET_API_KEY", "600 root:root"),
        ("/etc/quantum/governor.credentials/BINANCE_TESTNET_API_SECRET", "600 root:root"),
        *((f"/etc/systemd/system/{unit}", "644 root:root") for unit in UNITS),
        ("/etc/systemd/system/quantum-governor.service.d/credentials.conf", "644 root:root"),
    ],
)
def test_everything_has_its_owner_and_mode(installed: Host, path: str, expected: str) -> None:
    inside = path.replace("/current/", f"/{installed.current}/")
    assert installed.who(inside) == expected


def test_nothing_in_a_release_can_be_changed_by_anybody_but_root(installed: Host) -> None:
    found = list(installed.path("/opt/quantum").rglob("*"))
    assert len(found) > 500
    for path in found:
        status = path.lstat()
        assert (status.st_uid, status.st_gid) == (0, 0), path
        assert path.is_symlink() or not status.st_mode & 0o022, path
        assert path.is_symlink() or status.st_mode & 0o004, path
        assert path.name != "__pycache__" or "/venv/" in str(path)


def test_a_release_says_what_it_consists_of(installed: Host) -> None:
    release = installed.path(f"/opt/quantum/governor/{installed.current}")
    listed = (release / "installed.txt").read_text()
    assert re.search(r"^quantum-governor==\d", listed, re.MULTILINE)
    assert re.search(r"^redis==\d", listed, re.MULTILINE)
    assert not list((release / "venv").glob("lib/python*/site-packages/pip"))
    assert {path.name for path in release.iterdir()} == {"venv", "libexec", "deploy", "installed.txt"}
    assert {path.name.rstrip("0123456789.") for path in (release / "venv/bin").iterdir()} == {"python"}


def test_a_secret_is_only_where_it_belongs(installed: Host) -> None:
    found = {
        str(path.relative_to(installed.home / "root")): stat.S_IMODE(path.stat().st_mode)
        for path in (installed.home / "root").rglob("*")
        if path.is_file() and not path.is_symlink() and {KEY, SECRET} & set(re.findall(r"\w+", _text(path)))
    }
    assert found == {
        "etc/quantum/testnet.env": 0o600,
        "etc/quantum/governor.credentials/BINANCE_TESTNET_API_KEY": 0o600,
        "etc/quantum/governor.credentials/BINANCE_TESTNET_API_SECRET": 0o600,
    }


def _text(path: Path) -> str:
    return path.read_bytes().decode("latin-1") if path.stat().st_size < 1_000_000 else ""


def test_the_service_gets_the_secrets_that_are_there(installed: Host) -> None:
    drop_in = installed.path("/etc/systemd/system/quantum-governor.service.d/credentials.conf").read_text()
    credentials = "/etc/quantum/governor.credentials"
    assert drop_in.splitlines()[1:] == [
        "[Service]",
        f"LoadCredential=BINANCE_TESTNET_API_KEY:{credentials}/BINANCE_TESTNET_API_KEY",
        f"LoadCredential=BINANCE_TESTNET_API_SECRET:{credentials}/BINANCE_TESTNET_API_SECRET",
    ]


def test_the_settings_are_the_template_and_every_other_setting_as_a_comment(installed: Host) -> None:
    text = installed.path("/etc/quantum/governor.env").read_text()
    assert text.startswith((DEPLOY / "governor.env").read_text())
    assert deploying.unmentioned(text) == []
    assert envfile.variables(text.encode()) == envfile.variables((DEPLOY / "governor.env").read_bytes())


def test_the_command_has_the_settings_and_the_secrets_of_the_service(installed: Host) -> None:
    said = installed.run("governor", "settings")
    assert "GOV_REQUIRE_DURABLE=true" in said
    assert "BINANCE_TESTNET_API_SECRET=(set)" in said
    assert "GOV_REQUIRE_DURABLE=false" in installed.run("governor", "settings", GOV_REQUIRE_DURABLE="false")


def test_bash_completes_the_command_for_everybody_and_man_finds_its_page(installed: Host) -> None:
    script = """
        source /usr/local/share/bash-completion/completions/governor
        COMP_WORDS=(governor events --name DISARM_S) COMP_CWORD=3
        _governor_completion governor
        echo "${COMPREPLY[@]}"
    """
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
    assert installed.run(*nobody, "bash", "-c", script).strip() == "DISARM_STARTED"
    if shutil.which("man") is not None:
        assert installed.run("man", "-M", "/usr/local/share/man", "-w", "governor").strip().endswith("man1/governor.1")


def test_the_command_says_who_may_use_it(installed: Host) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
    said = installed.run(*nobody, "governor", "settings", code=78)
    assert "--env-file /etc/quantum/governor.env: " in said
    assert "may not read it" in said
    assert "Usage:" in installed.run(*nobody, "governor", "status", "--help")


def test_archives_are_written_as_the_user_that_has_to_read_them(host: Host, new_server: NewServer) -> None:
    server = new_server("valkey")
    with server.client() as client:
        client.config_set("requirepass", "open-sesame")
    host.write("/etc/quantum/governor.env", f"REDIS_PORT={server.port}\nGOV_ARCHIVE_DIR=/run/archive\n")
    host.write("/etc/quantum/governor.credentials/REDIS_PASSWORD", "open-sesame\n", 0o600)
    host.path("/etc/quantum/governor.credentials").chmod(0o700)
    host.install("--no-start")
    archive = host.path("/run/archive")
    archive.mkdir()
    shutil.chown(archive, *_account(host))
    said = host.run("governor", "archive", "--before", "-1d")
    assert "denied" not in said
    assert {path.stat().st_uid for path in archive.rglob("*")} <= {_account(host)[0]}


def _account(host: Host) -> tuple[int, int]:
    line = next(line for line in host.path("/etc/passwd").read_text().splitlines() if line.startswith("quantum-gov"))
    return int(line.split(":")[2]), int(line.split(":")[3])


# -- running it again -------------------------------------------------------------------------------------------------


def test_a_second_run_changes_and_restarts_nothing(running: Host) -> None:
    before = running.tree()
    said = running.install("--no-proof")
    assert "nothing changed, nothing restarted" in said
    assert running.tree() == before
    assert running.acted() == []


def test_a_dry_run_changes_nothing_on_a_new_host(host: Host) -> None:
    before = host.tree()
    said = host.install("--dry-run")
    assert "would: user quantum-governor" in said
    assert "would: quantum-governor.service started" in said
    assert (host.tree(), host.acted()) == (before, [])


def test_a_dry_run_says_what_an_upgrade_would_do(running: Host) -> None:
    release = running.another_release()
    before = running.tree()
    said = running.install("--dry-run", "--no-proof")
    assert f"would: active release: {release}" in said
    assert "would: quantum-governor.service restarted" in said
    assert "would: quantum-apply-layer.service restarted" in said
    assert (running.tree(), running.acted()) == (before, [])


def test_a_first_run_starts_the_helper_then_the_governor_then_restarts_the_apply_layer(ready: Host) -> None:
    ready.install("--no-proof")
    assert ready.acted() == [
        "daemon-reload",
        "--quiet enable quantum-governor-disarm.socket",
        "--quiet enable quantum-governor.service",
        "restart quantum-governor-disarm.socket",
        "restart quantum-governor.service",
        "try-restart quantum-apply-layer.service",
    ]


def test_a_setting_that_changed_restarts_the_governor_alone(running: Host) -> None:
    with running.path("/etc/quantum/governor.env").open("a") as file:
        file.write("GOV_MAX_EXEC_PER_HOUR=4\n")
    running.install("--no-proof")
    assert running.acted() == ["restart quantum-governor.service"]


def test_a_credential_that_was_added_or_changed_restarts_the_governor_alone(running: Host) -> None:
    key = running.write("/etc/quantum/governor.credentials/GOV_AUDIT_KEY", "one\n", 0o644)
    running.install("--no-proof")
    assert running.acted() == ["daemon-reload", "restart quantum-governor.service"]
    assert running.who("/etc/quantum/governor.credentials/GOV_AUDIT_KEY") == "600 root:root"
    key.write_text("two\n")
    running.install("--no-proof")
    assert running.acted() == ["restart quantum-governor.service"]


def test_a_new_release_restarts_both_and_the_one_before_stays(running: Host) -> None:
    first = running.current
    second = running.another_release()
    assert f"installed: release {second}" in running.install("--no-proof")
    assert running.acted() == ["restart quantum-governor.service", "try-restart quantum-apply-layer.service"]
    assert running.current == f"releases/{second}"
    assert str(running.path("/opt/quantum/governor/previous").readlink()) == first


def test_a_governor_that_was_stopped_is_started(running: Host) -> None:
    (running.stand_in / "active.quantum-governor.service").unlink()
    running.install("--no-proof")
    assert running.acted() == ["restart quantum-governor.service"]


def test_few_releases_are_kept(host: Host) -> None:
    releases = host.path("/opt/quantum/governor/releases")
    for number in range(6):
        (releases / f"0.0.{number}-{number:012x}").mkdir()
        os.utime(releases / f"0.0.{number}-{number:012x}", (number, number))
    host.install("--no-start")
    assert host.releases == [f"0.0.{number}-{number:012x}" for number in (4, 5)] + [Path(host.current).name]


# -- settings and secrets ---------------------------------------------------------------------------------------------

OWN = b"; mine\r\n  GOV_MAX_EXEC_PER_HOUR = 7\nMETRICS_PORT='9000'\n#GOV_LEASE_SEC=5\nGOV_KILL_SCORE_CRITICAL=0.5"


def test_settings_that_are_there_are_kept_to_the_byte(host: Host) -> None:
    path = host.path("/etc/quantum/governor.env")
    path.write_bytes(OWN)
    path.chmod(0o600)
    host.install("--no-start")
    added = path.read_bytes().removeprefix(OWN)
    assert added.startswith(b"\n\n# ")
    assert not [line for line in added.splitlines() if line and not line.startswith(b"#")]
    assert envfile.variables(path.read_bytes()) == envfile.variables(OWN)
    assert b"GOV_LEASE_SEC" not in added
    assert host.who("/etc/quantum/governor.env") == "600 root:root", "tighter than asked for stays"
    before = path.read_bytes()
    host.install("--no-start")
    assert path.read_bytes() == before


def test_settings_that_others_may_read_are_closed(host: Host) -> None:
    host.write("/etc/quantum/governor.env", "REDIS_PASSWORD=hunter2\n", 0o644)
    said = host.install("--no-start")
    assert host.who("/etc/quantum/governor.env") == "640 root:quantum"
    assert "holds REDIS_PASSWORD" in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("GOV_MAX_EXEC_PER_HOUR=many\n", "GOV_MAX_EXEC_PER_HOUR"),
        ("# up to here\\\nGOV_MAX_EXEC_PER_HOUR=5\n", "GOV_MAX_EXEC_PER_HOUR"),
        ('GOV_MAX_EXEC_PER_HOUR="5', "no open quote"),
    ],
    ids=["value", "comment", "quote"],
)
def test_settings_that_cannot_be_used_stop_it_before_anything_is_switched(host: Host, text: str, told: str) -> None:
    host.write("/etc/quantum/governor.env", text)
    said = host.install("--no-start", code=1)
    assert told in said
    assert host.path("/etc/quantum/governor.env").read_text().startswith(text)
    assert not host.path("/opt/quantum/governor/current").is_symlink()
    assert not host.path("/etc/systemd/system/quantum-governor.service").exists()
    assert host.acted() == []


def test_a_redis_that_forgets_stops_it_before_anything_is_switched(host: Host, new_server: NewServer) -> None:
    server = new_server("valkey")
    host.write("/etc/quantum/governor.env", f"REDIS_PORT={server.port}\nGOV_REQUIRE_DURABLE=true\n")
    said = host.install("--no-proof", code=1)
    assert "GOV_REQUIRE_DURABLE is true" in said
    assert host.acted() == []
    assert not host.path("/opt/quantum/governor/current").is_symlink()


def test_a_redis_that_is_away_stops_it_before_anything_is_switched(host: Host) -> None:
    host.write("/etc/quantum/governor.env", "REDIS_PORT=1\n")
    assert "Redis is not reachable" in host.install("--no-proof", code=1)
    assert host.acted() == []


def test_credentials_that_are_there_win_over_the_bots(host: Host) -> None:
    host.write("/etc/quantum/testnet.env", TESTNET, 0o600)
    mine = host.write("/etc/quantum/governor.credentials/BINANCE_TESTNET_API_KEY", "mine\n", 0o600)
    said = host.install("--no-start")
    assert mine.read_text() == "mine\n"
    assert "BINANCE_TESTNET_API_KEY is kept, although the other file has another one" in said
    assert host.path("/etc/quantum/governor.credentials/BINANCE_TESTNET_API_SECRET").read_text() == SECRET + "\n"


def test_without_credentials_it_says_what_decides_then(host: Host) -> None:
    said = host.install("--no-start")
    assert "quantity limits decide" in said
    assert not host.path("/etc/systemd/system/quantum-governor.service.d/credentials.conf").exists()


def test_a_profile_is_taken_on_a_first_installation_only(host: Host) -> None:
    host.install("--no-start", "--profile", "moderate")
    path = host.path("/etc/quantum/governor.env")
    given = envfile.variables(path.read_bytes())
    assert given.items() >= envfile.variables((DEPLOY / "profiles/moderate.env").read_bytes()).items()
    before = path.read_bytes()
    assert "keeps its limits" in host.install("--no-start", "--profile", "aggressive")
    assert path.read_bytes() == before


def test_a_file_the_governor_may_not_read_is_told_with_what_mends_it(host: Host) -> None:
    host.path("/etc/quantum/apply-layer.env").chmod(0o600)
    said = host.install("--no-start")
    chgrp, chmod = re.findall(r"^    (ch\w+ .*)$", said, re.MULTILINE)
    host.run("sh", "-euc", f"{chgrp}; {chmod}")
    assert "cannot read" not in host.install("--no-start")


def test_an_apply_layer_elsewhere_gets_drop_ins(host: Host) -> None:
    place = "/home/qt/bot/apply-layer.env"
    host.write(place, "APPLY_MODE=testnet\n")
    text = host.write("/etc/quantum/governor.env", f"APPLY_CONFIG_PATH={place}\nGOV_JOURNAL_DIR=/run/journal\n")
    host.install("--no-start")
    units = host.path("/etc/systemd/system")
    drop_ins = {path.parent.name: path.read_text().splitlines()[2:] for path in units.glob("quantum*.d/paths.conf")}
    helper = ["ProtectHome=no", "ReadWritePaths=-/home/qt/bot"]
    assert drop_ins == {
        "quantum-governor-disarm@.service.d": helper,
        "quantum-governor-deadman.service.d": helper,
        "quantum-governor.service.d": ["ProtectHome=read-only", "ReadWritePaths=-/run/journal"],
    }
    text.write_text("")
    host.install("--no-start")
    assert list(units.glob("quantum*.d/paths.conf")) == []


# -- the dashboard ----------------------------------------------------------------------------------------------------

DASHBOARD = "quantum-governor-dashboard.service"


def test_the_dashboard_can_be_started_and_is_not(running: Host) -> None:
    assert running.path(f"/etc/systemd/system/{DASHBOARD}").exists()
    assert not (running.stand_in / f"enabled.{DASHBOARD}").exists()
    assert not (running.stand_in / f"active.{DASHBOARD}").exists()
    said = running.run("/opt/quantum/governor/current/venv/bin/python", "-I", "-m", "governor", "dashboard", "--help")
    assert "DASHBOARD_TOKEN_FILE" in said
    imports = "import governor.dashboard.serving"
    running.run("/opt/quantum/governor/current/venv/bin/python", "-I", "-c", imports)


def test_the_dashboard_gets_its_own_secrets_before_the_governors_and_never_the_exchanges(host: Host) -> None:
    host.write("/etc/quantum/testnet.env", TESTNET, 0o600)
    for name in ("REDIS_PASSWORD", "GOV_AUDIT_KEY"):
        host.write(f"/etc/quantum/governor.credentials/{name}", "governors\n", 0o600)
    for name in ("REDIS_PASSWORD", "DASHBOARD_TOKEN"):
        host.write(f"/etc/quantum/dashboard.credentials/{name}", "the dashboards own\n", 0o644)
    host.install("--no-start")
    own, governors = "/etc/quantum/dashboard.credentials", "/etc/quantum/governor.credentials"
    drop_in = host.path(f"/etc/systemd/system/{DASHBOARD}.d/credentials.conf").read_text()
    assert drop_in.splitlines()[2:] == [
        f"LoadCredential=REDIS_PASSWORD:{own}/REDIS_PASSWORD",
        f"LoadCredential=GOV_AUDIT_KEY:{governors}/GOV_AUDIT_KEY",
        f"LoadCredential=DASHBOARD_TOKEN:{own}/DASHBOARD_TOKEN",
        "Environment=DASHBOARD_TOKEN_FILE=%d/DASHBOARD_TOKEN",
    ]
    for path in (own, f"{own}/DASHBOARD_TOKEN"):
        assert host.path(path).stat().st_mode & 0o077 == 0


def test_a_dashboard_that_runs_is_restarted_with_what_it_shows_and_with_nothing_else(running: Host) -> None:
    (running.stand_in / f"active.{DASHBOARD}").touch()
    running.install("--no-proof")
    assert running.acted() == [f"restart {DASHBOARD}"]
    running.install("--no-proof")
    assert running.acted() == []
    running.write("/etc/quantum/dashboard.env", "DASHBOARD_PORT=8055\n")
    running.install("--no-proof")
    assert running.acted() == [f"restart {DASHBOARD}"]


# -- when it goes wrong -----------------------------------------------------------------------------------------------


def test_killed_in_the_middle_it_is_simply_run_again(running: Host) -> None:
    before = running.current
    with (running.checkout / "governor/__init__.py").open("a") as file:
        file.write("# built for real\n")
    command = running.command(str(running.checkout / "deploy/install.sh"), "--wheelhouse", str(running.wheels))
    part = running.path("/opt/quantum/governor/releases/.building")
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for((part / "release/venv/pyvenv.cfg").exists, within_s=60, what="a venv")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (part.exists(), running.current, running.acted()) == (True, before, [])
    said = running.install("--no-proof")
    assert "installed: release" in said
    assert running.current != before
    assert not part.exists()
    assert "GOV_REQUIRE_DURABLE=true" in running.run("governor", "settings")


def test_a_governor_that_does_not_come_up_is_told_and_tried_again(ready: Host) -> None:
    fails = ready.stand_in / "fails.quantum-governor.service"
    fails.touch()
    said = ready.install("--no-proof", code=1)
    assert "was not ready" in said
    assert "--rollback" in said
    fails.unlink()
    ready.acted()
    ready.install("--no-proof")
    assert ready.acted() == ["restart quantum-governor.service", "try-restart quantum-apply-layer.service"]


def test_a_rollback_goes_back_and_forth(running: Host) -> None:
    first = running.current
    running.another_release()
    running.install("--no-proof")
    second = running.current
    running.acted()
    for expected in (first, second):
        running.install("--rollback")
        assert running.current == expected
        assert running.acted() == ["restart quantum-governor.service"]


def test_without_a_release_before_there_is_no_rollback(running: Host) -> None:
    assert "no release to go back to" in running.install("--rollback", code=1)
    assert running.acted() == []


def test_two_at_a_time_are_refused(host: Host) -> None:
    assert "another one is running" in host.run(
        "flock", "/etc/systemd/system", str(host.checkout / "deploy/install.sh"), "--dry-run", code=1
    )


def test_it_wants_root(host: Host) -> None:
    host.home.chmod(0o755)
    for parent in (host.home.parent, *host.home.parent.parents):
        if parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
    assert "has to run as root" in host.run(*nobody, "bash", str(host.checkout / "deploy/install.sh"), code=1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--frob",), "unknown: --frob"),
        (("--profile", "brave"), "expected one of aggressive conservative moderate"),
        (("--wheelhouse", "/nowhere"), "--wheelhouse /nowhere: expected a directory"),
        (("--rollback", "--uninstall"), "one of --rollback and --uninstall"),
        (("--python",), "--python needs a value"),
    ],
    ids=["unknown", "profile", "wheelhouse", "both", "value"],
)
def test_a_wrong_option_is_named(installed: Host, options: tuple[str, ...], told: str) -> None:
    before = installed.tree()
    assert told in installed.run(str(installed.checkout / "deploy/install.sh"), *options, code=2)
    assert installed.tree() == before


def test_a_python_that_cannot_be_used_is_refused(host: Host) -> None:
    own = host.write("/home/qt/python", f'#!/bin/sh\nexec -a /home/qt/python {PYTHON} "$@"\n', 0o755)
    shutil.copy2(Path(PYTHON).resolve(), own)
    before = host.tree()
    assert "expected Python 3.11 or later" in host.install("--python", "/bin/true", "--no-start", code=1)
    assert "where the service may not look" in host.install("--python", "/home/qt/python", "--no-start", code=1)
    assert host.tree() == before


# -- the proof --------------------------------------------------------------------------------------------------------


def prove_with(host: Host, script: str) -> None:
    host.write("/opt/said", "")
    proof = host.checkout / "deploy/proof.sh"
    proof.write_text(f"#!/bin/sh\necho asked >>/opt/said\n{script}\n")
    proof.chmod(0o755)
    host.another_release("its proof")


def test_the_proof_is_kept_for_its_owner_alone_and_not_asked_for_again(ready: Host) -> None:
    state = ready.path("/var/lib/quantum-governor")
    ready.install("--no-start")
    prove_with(ready, "echo all is well")
    state.mkdir(mode=0o700)
    shutil.chown(state, *_account(ready))
    victim = ready.write("/etc/victim", "untouched")
    (state / "proof.txt").symlink_to("/etc/victim")
    assert "all is well" in ready.install()
    assert victim.read_text() == "untouched"
    assert (state / "proof.txt").read_text() == "all is well\nexit code: 0\n"
    assert ready.who("/var/lib/quantum-governor/proof.txt") == "600 quantum-governor:quantum-governor"
    assert "all is well" not in ready.install()
    assert ready.path("/opt/said").read_text() == "asked\n"


def test_a_proof_that_fails_is_told_and_asked_for_again(ready: Host) -> None:
    ready.install("--no-start")
    prove_with(ready, "echo no permits; exit 1")
    state = ready.path("/var/lib/quantum-governor")
    state.mkdir(mode=0o700)
    shutil.chown(state, *_account(ready))
    for _ in range(2):
        assert "the proof found something" in ready.install(code=3)
    assert ready.path("/opt/said").read_text() == "asked\nasked\n"
    assert (state / "proof.txt").read_text().endswith("exit code: 1\n")


# -- removing it ------------------------------------------------------------------------------------------------------


def accounts(tree: dict[str, tuple[str, int, int, int]]) -> dict[str, tuple[str, int, int, int]]:
    """A tree without the backups that useradd and its like make, and the bare times they note."""
    return {
        path: seen
        for path, seen in tree.items()
        if not re.fullmatch(r"etc/(passwd|group|g?shadow|sub[ug]id)-?|etc/\.pwd\.lock|run/systemd/.*", path)
    }


def test_an_uninstallation_leaves_nothing(host: Host, new_server: NewServer) -> None:
    built = host.path("/opt/quantum").rename(host.home / "quantum")
    before = host.tree()
    names = {line.split(":")[0] for line in host.path("/etc/passwd").read_text().splitlines()}
    built.rename(host.path("/opt/quantum"))
    server = new_server("valkey", appendonly=True)
    host.write("/etc/quantum/testnet.env", TESTNET, 0o600)
    host.write("/etc/quantum/governor.env", f"REDIS_PORT={server.port}\n")
    host.install("--no-proof")
    for state in ("quantum-governor", "quantum-governor-disarm"):
        host.write(f"/var/lib/{state}/journal/file", "events")
    host.write("/etc/quantum/apply-layer.env.lock", "")
    said = host.install("--uninstall", "--yes")
    host.path("/etc/quantum/testnet.env").unlink()
    assert "removed" in said
    assert accounts(host.tree()) == accounts(before)
    assert {line.split(":")[0] for line in host.path("/etc/passwd").read_text().splitlines()} == names
    assert "quantum" not in host.path("/etc/group").read_text()
    assert not [path for path in host.stand_in.iterdir() if path.name.startswith(("active", "enabled"))]


def test_an_uninstallation_can_keep_the_data(running: Host) -> None:
    running.write("/var/lib/quantum-governor/journal/file", "events")
    before = running.path("/etc/quantum/governor.env").read_bytes()
    running.install("--uninstall", "--yes", "--keep-data")
    assert running.path("/etc/quantum/governor.env").read_bytes() == before
    assert running.path("/var/lib/quantum-governor/journal/file").read_text() == "events"
    assert not running.path("/opt/quantum").exists()
    assert _account(running)


def test_an_uninstallation_asks_first(running: Host) -> None:
    before = running.tree()
    assert "--yes" in running.install("--uninstall", code=1)
    assert "would: removed: /opt/quantum/governor" in running.install("--uninstall", "--dry-run")
    assert (running.tree(), running.acted()) == (before, [])


def test_it_can_be_removed_by_the_release_itself_and_removed_twice(running: Host) -> None:
    script = "/opt/quantum/governor/current/deploy/install.sh"
    assert "holds no checkout" in running.run(script, "--no-start", code=1)
    assert "removed" in running.run(script, "--uninstall", "--yes")
    assert "nothing to remove" in running.install("--uninstall", "--yes")


# -- the files it installs --------------------------------------------------------------------------------------------


def test_the_template_and_every_profile_can_be_loaded() -> None:
    for path in (DEPLOY / "governor.env", *sorted((DEPLOY / "profiles").glob("*.env"))):
        given = envfile.variables(path.read_bytes())
        assert given
        assert settings.load(given).warnings == (), path
    assert sorted(path.stem for path in (DEPLOY / "profiles").glob("*.env")) == [
        "aggressive", "conservative", "moderate",
    ]  # fmt: skip


def test_the_conservative_profile_is_the_default() -> None:
    given = envfile.variables((DEPLOY / "profiles/conservative.env").read_bytes())
    defaults = {row.name: row.default for row in settings.TABLE}
    assert given.items() <= defaults.items()
    assert given.items() <= envfile.variables((DEPLOY / "governor.env").read_bytes()).items()


def test_a_profile_sets_only_what_the_template_sets() -> None:
    template = envfile.variables((DEPLOY / "governor.env").read_bytes())
    for path in sorted((DEPLOY / "profiles").glob("*.env")):
        assert envfile.variables(path.read_bytes()).keys() <= template.keys(), path


def test_a_comment_put_into_force_is_the_default() -> None:
    text = deploying.describe(settings.TABLE)
    assert envfile.variables(text.encode()) == {}
    in_force = envfile.variables(re.sub(r"^# (?=[A-Z_0-9]+=)", "", text, flags=re.MULTILINE).encode())
    assert in_force == {row.name: row.default for row in settings.TABLE if not row.secret}
    assert settings.load(in_force).digest == settings.load({}).digest
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_locked_packages_are_those_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for name, wanted in (
        ("requirements.txt", project["project"]["dependencies"]),
        ("requirements.txt", project["project"]["optional-dependencies"]["dashboard"]),
        ("requirements-build.txt", project["build-system"]["requires"]),
    ):
        text = (DEPLOY / name).read_text()
        pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))
        for requirement in map(Requirement, wanted):
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
        entries = re.split(r"\n(?=[a-z])", text)
        assert all("--hash=sha256:" in entry for entry in entries if "==" in entry.partition("\n")[0])
        assert "://" not in text


@pytest.mark.parametrize("unit", ["quantum-governor.service", "quantum-governor-dashboard.service"])
def test_the_unit_is_hardened(unit: str) -> None:
    host_can()
    said = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", DEPLOY / "systemd" / unit],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = re.search(rf"exposure level for {unit}: ([\d.]+)", said)
    assert found, said
    assert float(found[1]) <= 1.5


def test_the_scripts_are_clean() -> None:
    scripts = [DEPLOY / "install.sh", DEPLOY / "bin/governor"]
    for script in scripts:
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is not None:
        # SC2317: it cannot see that main() calls do_$action.
        done = subprocess.run(["shellcheck", "-e", "SC2317", *scripts], capture_output=True, text=True, check=False)
        assert done.stdout == ""


# -- governor --env-file ----------------------------------------------------------------------------------------------


def governor(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-m", "governor", *words], env=environ, capture_output=True, text=True, check=False
    )


def test_a_file_gives_settings_as_systemd_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "governor.env"
    path.write_text("  REDIS_PORT = '7000'\nexport REDIS_DB=3\nREDIS_HOST=a\nREDIS_HOST=b # c\n")
    path.write_text(path.read_text().replace(" # c", ""))
    said = governor("--env-file", str(path), "settings").stdout
    assert {"REDIS_PORT=7000", "REDIS_DB=0", "REDIS_HOST=b"} <= set(said.splitlines())


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "governor.env"
    path.write_text("REDIS_PORT=7000\nREDIS_DB=3\n")
    said = governor("--env-file", str(path), "settings", REDIS_PORT="7001").stdout
    assert {"REDIS_PORT=7001", "REDIS_DB=3"} <= set(said.splitlines())
    assert "wins over it" in " ".join(governor("--help").stdout.split())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "expected a readable file: No such file"),
        (b"REDIS_PORT=1\0", "NUL byte"),
        (b"# all of it\\\nREDIS_PORT=1\n", "before and since 254 read REDIS_PORT differently"),
        (b"REDIS_PORT=none\n", "REDIS_PORT is 'none'"),
    ],
    ids=["missing", "nul", "two readings", "value"],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "governor.env"
    if content is not None:
        path.write_bytes(content)
    done = governor("--env-file", str(path), "settings")
    assert (done.returncode, done.stdout) == (78, "")
    assert told in done.stderr
    assert governor("--env-file", str(path), "settings", "--help").returncode == 0


def test_a_broken_file_does_not_keep_a_person_from_stopping(tmp_path: Path) -> None:
    path = tmp_path / "governor.env"
    path.write_bytes(b"REDIS_PORT=1\nAPPLY_CONFIG_PATH=/nowhere/apply-layer.env\n# x\\\nGOV_LEASE_SEC=2\nB=\0\n")
    done = governor("--env-file", str(path), "disarm", "--reason", "now", PATH="/nowhere", HOME=str(tmp_path))
    assert done.returncode != 78, done.stderr
    assert "warning: --env-file" in done.stderr
    assert "/nowhere/apply-layer.env" in done.stdout + done.stderr


def test_names_systemd_would_ignore_are_left_out() -> None:
    assert envfile.variables(b"A=1\nexport B=2\nC D=3\n1E=4\nA=5\n") == {"A": "5"}
