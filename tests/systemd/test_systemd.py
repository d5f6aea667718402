"""The governor as it is deployed, under a real systemd: installed, trading, disarming, broken, rebooted, removed.

Every scenario begins with everything running and trading, and uses symbols of its own. What they measure is told at
the end of the run, see `--figures`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.systemd.desk import (
    APPLY,
    APPLY_ENV,
    DEADMAN,
    GOVERNOR,
    GOVERNOR_ENV,
    HANGS,
    LOCK_HOLDER,
    REDIS,
    SOURCE,
    Desk,
)

DASHBOARD = "quantum-governor-dashboard.service"
DROP_INS = "/etc/systemd/system/quantum-governor.service.d"
SOCKET = "/run/quantum-governor-disarm.sock"
OURS = ("/etc", "/opt/quantum", "/usr/local")
WITHIN_S = 2.0
"""The longest that a breach may take until the Apply Layer is proven to be in dry run."""


# -- the installation ------------------------------------------------------------------------------------------------


def test_installing_again_changes_and_restarts_nothing(desk: Desk) -> None:
    units = (GOVERNOR, APPLY, "quantum-governor-disarm.socket")

    def seen() -> tuple[str, list[str]]:
        files = desk.machine.sh(f"find {' '.join(OURS)} -xdev -printf '%p %y %m %u:%g %T@ %l\\n' | sort")
        return files, [desk.invocation(unit) for unit in units]

    before = seen()
    assert all(before[1])
    said = desk.install("--no-proof")
    assert seen() == before
    assert "nothing changed, nothing restarted" in said


def test_a_dry_run_says_what_an_upgrade_would_do_and_does_nothing(desk: Desk) -> None:
    desk.machine.sh(f"echo '# a newer one' >> {SOURCE}/governor/__init__.py")
    try:
        before = desk.tree(*OURS), desk.invocation(GOVERNOR)
        said = desk.install("--dry-run")
        assert (desk.tree(*OURS), desk.invocation(GOVERNOR)) == before
    finally:
        desk.machine.sh(f"sed -i '$d' {SOURCE}/governor/__init__.py")
    assert "would: " in said
    assert "nothing was changed" in said


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/etc/quantum", "750 root:quantum"),
        (GOVERNOR_ENV, "640 root:quantum"),
        (APPLY_ENV, "640 root:quantum"),
        ("/etc/quantum/governor.credentials", "700 root:root"),
        ("/etc/quantum/governor.credentials/BINANCE_TESTNET_API_SECRET", "600 root:root"),
        ("/etc/quantum/governor.credentials/REDIS_PASSWORD", "600 root:root"),
        ("/etc/systemd/system/quantum-governor.service", "644 root:root"),
        ("/usr/local/bin/governor", "755 root:root"),
        ("/opt/quantum/governor/current/venv/bin/python", "755 root:root"),
        ("/opt/quantum/governor/current/libexec/quantum-governor-disarm", "755 root:root"),
        ("/var/lib/quantum-governor", "700 quantum-governor:quantum-governor"),
        (SOCKET, "600 quantum-governor:quantum-governor"),
    ],
    ids=lambda value: value if value.startswith("/") else "",
)
def test_what_was_installed_has_its_owner_and_mode(installed: Desk, path: str, expected: str) -> None:
    assert installed.machine.sh(f"stat -L -c '%a %U:%G' {path}").strip() == expected


def test_the_service_can_change_nothing_it_runs(desk: Desk) -> None:
    found = desk.machine.sh(
        "find /opt/quantum /usr/local/bin /etc/systemd /etc/quantum -writable ! -type l",
        user="quantum-governor",
        check=False,
    )
    assert found == ""


def test_nobody_else_can_read_a_secret(desk: Desk) -> None:
    wanted = "".join(f"{secret}\n" for secret in desk.secrets.values())
    places = "/etc /opt /usr/local /var /root /home /run /tmp /proc/[0-9]*/environ /proc/[0-9]*/cmdline"
    look = f"grep -rlsF -D skip -f - {places} || true"
    as_root = desk.machine.sh(look, stdin=wanted).split()
    assert {"/etc/exchange.env", APPLY_ENV} <= set(as_root), "the search itself finds them"
    assert not [path for path in as_root if path.startswith("/opt/quantum") or path.endswith("cmdline")]
    assert desk.machine.sh(look, stdin=wanted, user="nobody") == ""


def test_nothing_logged_is_a_secret(desk: Desk) -> None:
    desk.governor("doctor", check=False)
    journal = desk.machine.journal()
    assert "quantum-governor" in journal
    assert [name for name, secret in desk.secrets.items() if secret in journal] == []


def test_the_service_is_a_user_without_any_rights(desk: Desk) -> None:
    machine = desk.machine
    status = machine.read(f"/proc/{machine.property(GOVERNOR, 'MainPID')}/status")
    seen = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.MULTILINE))
    user = machine.sh("id -u quantum-governor").strip()
    assert user not in ("0", "")
    assert seen["Uid"].split() == [user] * 4
    assert [seen[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")] == ["0" * 16] * 4
    assert (seen["NoNewPrivs"], seen["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize(
    ("unit", "most"), [(GOVERNOR, 1.5), (DASHBOARD, 1.5), ("quantum-governor-disarm@.service", 2.0), (DEADMAN, 2.0)]
)
def test_systemd_finds_little_exposed(desk: Desk, unit: str, most: float) -> None:
    said = desk.machine.run("systemd-analyze", "security", "--no-pager", unit.replace("@.", "@1."), check=False).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert found, said
    assert float(found[1]) <= most


def test_systemd_accepts_every_unit(desk: Desk) -> None:
    units = desk.machine.sh("find /etc/systemd/system/quantum-governor* -type f -not -path '*.d/*'").split()
    assert len(units) == 5
    assert "quantum-governor" not in desk.machine.sh(f"systemd-analyze verify --man=no {' '.join(units)} 2>&1")


def test_the_doctor_finds_a_healthy_system(desk: Desk) -> None:
    desk.trade(desk.new_symbol())
    done = desk.machine.run("/usr/local/bin/governor", "doctor", "--json", check=False, timeout_s=90)
    told = json.loads(done.stdout)
    assert [check for check in told["checks"] if check["verdict"] == "fail"] == []
    assert (told["ok"], done.returncode) == (True, 0)


def test_an_installation_keeps_the_proof_of_a_healthy_system(desk: Desk) -> None:
    desk.trade(desk.new_symbol())
    kept = "/var/lib/quantum-governor/proof.txt"
    said = desk.install()
    proof = desk.machine.read(kept)
    assert proof.splitlines()[-1] == "exit code: 0"
    assert GOVERNOR in proof
    assert kept in said
    assert desk.machine.sh(f"stat -c '%a %U' {kept}").strip() == "600 quantum-governor"
    assert [name for name, secret in desk.secrets.items() if secret in proof] == []


# -- trading ---------------------------------------------------------------------------------------------------------


def test_plans_flow_through_permits_to_executions(desk: Desk) -> None:
    symbol = desk.new_symbol()
    executed = desk.trade(symbol, 2)
    assert [event["executed"] for event in executed] == [True, True]
    decided = {event["data"]["plan_id"]: event["data"] for event in desk.events("DECISION")}
    for event in executed:
        decision = decided[event["plan_id"]]
        assert (decision["verdict"], decision["computed_qty"], decision["computed_notional"]) == ("EXECUTE", 1, 100)
        assert desk.event("PERMIT_CONSUMED", plan_id=event["plan_id"])
    with desk.client() as client:
        assert client.llen(f"quantum:governor:exec:{symbol}") == 2


def post(desk: Desk, client: httpx.Client, path: str, **told: str) -> httpx.Response:
    return desk.machine.inside(client.post, path, json=told)


def test_the_dashboard_shows_with_a_readers_rights_and_acts_as_a_user_without_any(desk: Desk) -> None:
    machine, own = desk.machine, "/etc/quantum/dashboard.credentials"
    page = "http://127.0.0.1:8045"
    try:
        machine.sh(f"install -D -m 600 /etc/redis/passwords/dashboard {own}/REDIS_PASSWORD")
        machine.sh("echo REDIS_USERNAME=dashboard > /etc/quantum/dashboard.env")
        desk.install("--no-proof")
        machine.systemctl("start", DASHBOARD)

        def up_to_date() -> Any:
            status, body = machine.http("/api/snapshot", port=8045)
            told = json.loads(body) if status == 200 else None
            fine = told and told["health"]["events"]["trusted"] and told["health"]["daemon"]["ready"]
            return told if fine else None

        shown = machine.wait_for(up_to_date, what="a dashboard that is up to date")
        assert shown["control"]["enabled"] is False
        assert shown["status"]["state"] == "ARMED"
        pid = machine.property(DASHBOARD, "MainPID")
        environ = machine.environ(pid) or {}
        assert not [name for name in environ if name.startswith("BINANCE_TESTNET")]
        seen = dict(re.findall(r"^(\w+):\s+(.*)$", machine.read(f"/proc/{pid}/status"), re.MULTILINE))
        assert seen["Uid"].split()[0] not in ("0", machine.sh("id -u quantum-governor").strip())
        assert [seen[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")] == ["0" * 16] * 4
        with httpx.Client(base_url=page, headers={"Origin": page, "X-Governor": "1"}, timeout=40) as client:
            assert post(desk, client, "/api/login", token="x" * 20).status_code == 403
            machine.sh(
                f"rm {own}/REDIS_PASSWORD /etc/quantum/dashboard.env\n"
                f"(umask 077; echo a-token-of-the-machines-own > {own}/DASHBOARD_TOKEN)"
            )
            assert f"{DASHBOARD} restarted" in desk.install("--no-proof")
            assert post(desk, client, "/api/login", token="a-token-of-the-machines-own").status_code == 200
            done = post(desk, client, "/api/disarm", reason="from the page").json()
            assert (done["state"], done["done"], done["code"]) == ("DISARMED", True, 0)
            assert desk.apply_mode() == "dry_run"
            assert desk.event("MANUAL_DISARM", reason="from the page", operator="dashboard:127.0.0.1")
            armed = post(desk, client, "/api/rearm", reason="seen", typed="rearm").json()
            assert (armed["state"], armed["code"]) == ("ARMED", 0)
            assert desk.apply_mode() == "dry_run"
        assert "a-token-of-the-machines-own" not in machine.journal()
    finally:
        machine.systemctl("stop", DASHBOARD, check=False)
        machine.sh(f"rm -rf {own} /etc/quantum/dashboard.env")
        desk.install("--no-proof")


def test_a_blocked_plan_leaves_its_reason_for_an_hour(desk: Desk) -> None:
    plan = desk.new_plan("FLATUSDT")
    desk.propose(plan)
    told = desk.event("EXECUTION", plan_id=plan["plan_id"])["data"]
    assert (told["executed"], told["error"]) == (False, "missing_permit_or_redis")
    with desk.client() as client:
        key = f"quantum:governor:block:{plan['plan_id']}"
        value: Any = client.get(key)
        life: Any = client.ttl(key)
    assert json.loads(value)["symbol"] == "FLATUSDT"
    assert 3500 < life <= 3600


# -- a disarm --------------------------------------------------------------------------------------------------------


def test_a_burst_disarms_with_a_proof(desk: Desk) -> None:
    machine = desk.machine
    owner = machine.sh(f"stat -c '%a %U:%G' {APPLY_ENV}")
    was = machine.read(APPLY_ENV)
    before, backups, epoch = desk.invocation(APPLY), set(desk.backups()), desk.state()["epoch"]
    outstanding = desk.new_plan(desk.new_symbol(), forgets=True)
    desk.propose(outstanding)
    desk.event("DECISION", plan_id=outstanding["plan_id"], verdict="EXECUTE")
    with desk.client() as client:
        assert client.exists(f"quantum:permit:{outstanding['plan_id']}")

    plan = desk.breach()
    done = desk.event("AUTO_DISARM", epoch=epoch + 1)

    assert done["data"]["reason"] == "burst_limit_breach"
    assert done["data"]["context"] == {"symbol": plan["symbol"], "exec_5min": 3, "limit": 2}
    assert done["data"]["action_taken"] == "APPLY_MODE=dry_run + restart"
    assert desk.event("PERMIT_REVOKED", plan_id=outstanding["plan_id"])
    with desk.client() as client:
        assert not client.exists(f"quantum:permit:{outstanding['plan_id']}")
    proof, after = done["data"]["proof"], desk.invocation(APPLY)
    assert after != before
    assert (proof["invocation_before"], proof["invocation_after"]) == (before, after)
    assert (proof["apply_mode"], proof["environ_mode"], proof["active_state"]) == ("dry_run", "dry_run", "active")
    assert desk.running_mode() == "dry_run"
    assert machine.read(APPLY_ENV) == was.replace("APPLY_MODE=testnet", "APPLY_MODE=dry_run")
    assert machine.sh(f"stat -c '%a %U:%G' {APPLY_ENV}") == owner
    (backup,) = set(desk.backups()) - backups
    assert backup == proof["backup"]
    assert machine.read(backup) == was
    assert machine.sh(f"stat -c '%a %U:%G' {backup}") == owner
    assert desk.json("status", check=False)["state"] == "DISARMED"
    assert machine.run("/usr/local/bin/governor", "status", check=False).returncode == 3


@pytest.mark.parametrize("time_around", range(5))
def test_a_breach_is_stopped_at_once_and_proven_within_two_seconds(desk: Desk, time_around: int) -> None:
    outstanding = desk.new_plan(desk.new_symbol(), forgets=True)
    desk.propose(outstanding)
    desk.event("DECISION", plan_id=outstanding["plan_id"], verdict="EXECUTE")
    symbol = desk.new_symbol()
    desk.trade(symbol, 2)
    plan, epoch = desk.new_plan(symbol), desk.state()["epoch"]
    desk.propose(plan)
    done = desk.event("AUTO_DISARM", epoch=epoch + 1)
    seen = time.time()
    received = desk.event("PLAN_RECEIVED", plan_id=plan["plan_id"])
    written = int(received["data"]["entry_id"].partition("-")[0]) / 1000
    revoked = desk.event("PERMIT_REVOKED", plan_id=outstanding["plan_id"])
    desk.measured("plan that breaches written to permits revoked", revoked["at"] - written)
    desk.measured("plan that breaches written to Apply Layer proven in dry run", done["at"] - written)
    desk.measured("of that, file, restart and verification", done["data"]["proof"]["seconds"])
    assert desk.running_mode() == "dry_run"
    assert seen - written < WITHIN_S, "seen from outside, looking included"


def test_nothing_trades_until_somebody_arms_it_again(desk: Desk) -> None:
    desk.breach()
    desk.wait_for_state("DISARMED")
    desk.wait_done()
    desk.set_mode("testnet")  # somebody edits the file, which is not what arms it
    desk.event("APPLY_MODE_DRIFTED", epoch=desk.state()["epoch"], apply_mode="testnet")
    plan = desk.new_plan(desk.new_symbol())
    desk.propose(plan)
    refused = desk.event("EXECUTION", plan_id=plan["plan_id"])["data"]
    assert (refused["executed"], refused["error"]) == (False, "missing_permit_or_redis")
    desk.governor("rearm", "--reason", "looked into it")
    rearmed = desk.events("REARMED")[-1]["data"]
    assert (rearmed["reason"], rearmed["operator"]) == ("looked into it", "root")
    assert desk.trade(desk.new_symbol())[0]["executed"]


def test_rearm_puts_the_file_back_where_it_is_asked_to(desk: Desk) -> None:
    desk.breach()
    desk.wait_for_state("DISARMED")
    desk.wait_done()
    assert desk.running_mode() == "dry_run"
    before = desk.invocation(APPLY)
    desk.governor("rearm", "--reason", "fixed", "--restore")
    assert (desk.apply_mode(), desk.running_mode()) == ("testnet", "testnet")
    assert desk.invocation(APPLY) != before
    assert desk.trade(desk.new_symbol())[0]["executed"]


def test_a_person_disarms_by_hand(desk: Desk) -> None:
    before = desk.invocation(APPLY)
    desk.governor("disarm", "--reason", "bad fills")
    event = desk.wait_done()
    assert (event["event"], event["data"]["reason"], event["data"]["operator"]) == (
        "MANUAL_DISARM",
        "bad fills",
        "root",
    )
    assert (desk.apply_mode(), desk.running_mode()) == ("dry_run", "dry_run")
    assert desk.invocation(APPLY) != before


def test_an_apply_layer_that_may_not_be_restarted_any_more_is_restarted_for_a_disarm(desk: Desk) -> None:
    machine = desk.machine
    machine.systemctl("reset-failed", APPLY)
    for _ in range(5):  # as often as systemd allows within ten seconds
        machine.systemctl("restart", APPLY)
    before = desk.invocation(APPLY)
    desk.governor("disarm", "--reason", "restarted by somebody")
    desk.wait_done()
    assert (desk.apply_mode(), desk.running_mode()) == ("dry_run", "dry_run")
    assert desk.invocation(APPLY) != before


def test_an_apply_layer_that_somebody_stopped_stays_stopped(desk: Desk) -> None:
    desk.machine.systemctl("stop", APPLY)
    desk.governor("disarm", "--reason", "stopped by somebody")
    desk.wait_done()
    assert (desk.apply_mode(), desk.running_mode()) == ("dry_run", None)


def test_a_drill_disarms_and_trades_again(desk: Desk) -> None:
    before, epoch = desk.invocation(APPLY), desk.state()["epoch"]
    said = desk.governor("doctor", "--drill", "--yes", "--restore")
    assert "armed again" in said
    assert desk.event("MANUAL_DISARM", epoch=epoch + 1)["data"]["reason"] == "drill"
    assert (desk.state()["state"], desk.state()["epoch"]) == ("ARMED", epoch + 2)
    assert (desk.apply_mode(), desk.running_mode()) == ("testnet", "testnet")
    assert desk.invocation(APPLY) != before
    assert desk.trade(desk.new_symbol())[0]["executed"]


def as_root(desk: Desk) -> None:
    """Set it up as docs/installing.md says, run by root."""
    told = desk.machine.read(f"{SOURCE}/docs/installing.md")
    lines = re.search(r"systemctl edit quantum-governor.service\n(\[Service\]\n(?:\w+=.*\n)+)", told)
    assert lines, "docs/installing.md has no drop-in"
    desk.machine.write(f"{DROP_INS}/other-way.conf", lines[1])


def with_polkit(desk: Desk) -> None:
    """Set it up as deploy/polkit says, for this directory."""
    rules = "50-quantum-governor.rules"
    desk.machine.sh(
        f"install -m 0644 {SOURCE}/deploy/polkit/{rules} /etc/polkit-1/rules.d/\n"
        "chown root:quantum-governor /etc/quantum\n"
        "chmod 2770 /etc/quantum\n"
        f"rm -f {APPLY_ENV}.lock"
    )
    told = desk.machine.read(f"{SOURCE}/deploy/polkit/{rules}")
    lines = re.findall(r"^//.* (\w+=(?:<[^>]+>|\S+))", told.partition("[Service]")[2], re.MULTILINE)
    assert lines, f"deploy/polkit/{rules} has no drop-in"
    drop_in = "\n".join(["[Service]", *lines, ""]).replace("<that directory>", "/etc/quantum")
    desk.machine.write(f"{DROP_INS}/other-way.conf", drop_in)


@pytest.mark.parametrize("way", [as_root, with_polkit], ids=lambda way: way.__name__)
def test_the_other_ways_to_disarm_work_as_documented(desk: Desk, way: Callable[[Desk], None]) -> None:
    machine = desk.machine
    settings, group = machine.read(GOVERNOR_ENV), machine.sh(f"stat -c '%a %G' {APPLY_ENV}")
    try:
        way(desk)
        desk.configure(GOV_DISARM_SOCKET="")
        machine.systemctl("daemon-reload")
        machine.systemctl("restart", GOVERNOR)
        desk.wait_ready()
        before, backups = desk.invocation(APPLY), len(desk.backups())
        desk.breach()
        desk.wait_for_state("DISARMED")
        proof = desk.wait_done()["data"]["proof"]
        assert (proof["apply_mode"], proof["invocation_before"]) == ("dry_run", before)
        assert proof["invocation_after"] == desk.invocation(APPLY) != before
        assert (desk.apply_mode(), desk.running_mode(), len(desk.backups())) == ("dry_run", "dry_run", backups + 1)
        assert machine.sh(f"stat -c '%a %G' {APPLY_ENV}") == group
    finally:
        machine.sh(
            f"rm -f {DROP_INS}/other-way.conf /etc/polkit-1/rules.d/50-quantum-governor.rules\n"
            "chown root:quantum /etc/quantum\n"
            f"chmod 0750 /etc/quantum\nchmod g-s /etc/quantum\ncat > {GOVERNOR_ENV}\n"
            f"chown root:quantum {APPLY_ENV}\nchmod 0640 {APPLY_ENV}\nrm -f {APPLY_ENV}.lock\n"
            f"systemctl daemon-reload\nsystemctl restart {GOVERNOR}",
            stdin=settings,
        )
    desk.wait_ready()


# -- what the service's user may do ----------------------------------------------------------------------------------


def talk(desk: Desk, said: bytes, *, user: str = "quantum-governor", at: str = SOCKET) -> str:
    """Connect as a user, say something once the lock is ours, return all that was answered, or the error's name."""
    script = f"""
import socket
with socket.socket(socket.AF_UNIX) as link:
    link.settimeout(30)
    try:
        link.connect({at!r})
        answered = link.recv(4096)
        link.sendall({said!r})
        link.shutdown(socket.SHUT_WR)
        while more := link.recv(4096):
            answered += more
        print(answered.decode())
    except OSError as error:
        print(type(error).__name__)
"""
    return desk.machine.run("python3", "-I", "-c", script, user=user).stdout


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\n",
        b"x" * 201 + b"\n",
        b"bad\x1b[2J\n",
        b"\xff\xfe\n",
        b"no line end",
        b'{"config_path": "/etc/passwd"}\x00\n',
        b"y" * 100_000,
    ],
    ids=["nothing", "empty", "long", "escape", "not utf-8", "no end", "nul", "flood"],
)
def test_the_helper_does_nothing_without_a_reason(desk: Desk, said: bytes) -> None:
    before = desk.invocation(APPLY), desk.machine.read(APPLY_ENV)
    answered = talk(desk, said)
    assert '"taken"' in answered or "Error" in answered
    assert '"invocation_after"' not in answered
    assert (desk.invocation(APPLY), desk.machine.read(APPLY_ENV)) == before


@pytest.mark.parametrize("user", ["nobody", "quantum"])
def test_nobody_else_may_speak_to_the_helper(desk: Desk, user: str) -> None:
    assert talk(desk, b"let me in\n", user=user).strip() == "PermissionError"


def test_a_reason_only_ever_disarms(desk: Desk) -> None:
    before = desk.invocation(APPLY)
    answered = talk(desk, b"APPLY_MODE=testnet; systemctl stop redis-server\n").split("\n")
    proof = json.loads([line for line in answered if line][-1])
    assert (proof["environ_mode"], proof["apply_mode"]) == ("dry_run", "dry_run")
    assert (desk.apply_mode(), desk.running_mode()) == ("dry_run", "dry_run")
    assert desk.invocation(APPLY) != before
    assert desk.machine.property(REDIS, "ActiveState") == "active"


@pytest.mark.parametrize(
    "command",
    [
        ["systemctl", "--no-ask-password", "restart", APPLY],
        ["systemctl", "--no-ask-password", "start", APPLY],
        ["systemctl", "--no-ask-password", "stop", GOVERNOR],
        ["systemd-run", "--no-ask-password", "--wait", "--pipe", "id"],
        ["sh", "-c", f"echo APPLY_MODE=testnet >> {APPLY_ENV}"],
        ["sh", "-c", f"touch {APPLY_ENV}.bak.mine"],
        ["cat", "/etc/quantum/governor.credentials/REDIS_PASSWORD"],
        ["cat", "/etc/quantum/testnet.env"],
    ],
    ids=["restart", "start", "stop", "systemd-run", "write", "create", "credential", "other secret"],
)
def test_the_services_user_can_do_none_of_it_itself(desk: Desk, command: list[str]) -> None:
    before = desk.invocation(APPLY), desk.machine.read(APPLY_ENV)
    assert desk.machine.run(*command, user="quantum-governor", check=False).returncode != 0
    assert (desk.invocation(APPLY), desk.machine.read(APPLY_ENV)) == before


def test_connections_without_end_do_not_keep_a_disarm_from_happening(desk: Desk) -> None:
    script = f"""
import socket
for _ in range(300):
    with socket.socket(socket.AF_UNIX) as link:
        try:
            link.connect({SOCKET!r})
        except OSError:
            pass
"""
    desk.machine.run("python3", "-I", "-c", script, user="quantum-governor")
    desk.breach()
    desk.wait_for_state("DISARMED")
    desk.wait_done()
    assert desk.running_mode() == "dry_run"


# -- what breaks -----------------------------------------------------------------------------------------------------


def test_a_killed_governor_is_back_and_goes_on(desk: Desk) -> None:
    before, epoch, last = desk.invocation(GOVERNOR), desk.state()["epoch"], desk.last_seq()
    began = time.monotonic()
    desk.machine.systemctl("kill", "--kill-who=main", "--signal=KILL", GOVERNOR)
    desk.machine.wait_for(lambda: desk.invocation(GOVERNOR) not in ("", before), what="a new governor")
    desk.wait_ready()
    desk.measured("killed to ready again", time.monotonic() - began)
    assert desk.trade(desk.new_symbol())[0]["executed"]
    assert desk.last_seq() > last
    assert (desk.state()["state"], desk.state()["epoch"]) == ("ARMED", epoch)
    assert desk.apply_mode() == "testnet"


def test_a_hanging_governor_is_killed_by_the_watchdog_and_is_back(desk: Desk) -> None:
    machine, before = desk.machine, desk.invocation(GOVERNOR)
    pid = machine.property(GOVERNOR, "MainPID")
    began, at = time.monotonic(), time.time()
    machine.run("kill", "-STOP", pid)
    machine.wait_for(lambda: desk.invocation(GOVERNOR) not in ("", before), within_s=60, what="a new governor")
    desk.wait_ready()
    desk.measured("hang to ready again", time.monotonic() - began)
    assert "Watchdog timeout" in machine.journal(since=at)
    assert desk.trade(desk.new_symbol())[0]["executed"]


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_redis_goes_and_comes_back_and_nothing_is_lost(desk: Desk, how: str) -> None:
    machine = desk.machine
    desk.trade(desk.new_symbol())
    invocation, last, hashes = desk.invocation(GOVERNOR), desk.last_seq(), desk.hashes()
    if how == "stop":
        machine.systemctl("stop", REDIS)
        machine.wait_for(lambda: machine.http("/readyz")[0] == 503, what="a governor that says it is not ready")
        machine.systemctl("start", REDIS)
    else:
        redis_was = desk.invocation(REDIS)
        machine.systemctl("kill", "--kill-who=main", "--signal=KILL", REDIS)
        machine.wait_for(lambda: desk.invocation(REDIS) not in ("", redis_was), what="a new Redis")
    desk.wait_ready()
    machine.systemctl("restart", APPLY)
    assert desk.invocation(GOVERNOR) == invocation
    assert desk.last_seq() >= last
    assert desk.hashes()[: len(hashes)] == hashes
    assert desk.trade(desk.new_symbol())[0]["executed"]
    told = desk.json("replay")
    assert (told["chain"], told["differences"]) == ("ok", [])


def test_a_start_waits_for_redis_and_is_not_given_up(desk: Desk) -> None:
    machine = desk.machine
    machine.systemctl("stop", GOVERNOR, REDIS)
    machine.systemctl("start", "--no-block", GOVERNOR)
    machine.wait_for(lambda: machine.http("/readyz")[0] == 503, what="a governor that waits")
    restarts = machine.property(GOVERNOR, "NRestarts")
    began = time.monotonic()
    machine.systemctl("start", REDIS)
    desk.wait_ready()
    machine.wait_for(lambda: machine.property(GOVERNOR, "ActiveState") == "active", what="an active unit")
    desk.measured("Redis back to ready", time.monotonic() - began)
    assert machine.property(GOVERNOR, "NRestarts") == restarts


def cannot_be_kept_up(desk: Desk) -> None:
    """Kill it whenever it is up until systemd gives up."""
    machine = desk.machine

    def given_up() -> bool:
        if machine.property(GOVERNOR, "ActiveState") == "failed":
            return True
        machine.systemctl("kill", "--kill-who=main", "--signal=KILL", GOVERNOR, check=False)
        return False

    machine.wait_for(given_up, within_s=90, what="systemd giving up")


def cannot_be_started(desk: Desk) -> None:
    """Break a setting and restart."""
    desk.configure(GOV_MAX_EXEC_PER_HOUR="three")
    desk.machine.systemctl("restart", GOVERNOR, check=False)


@pytest.mark.parametrize("breaks", [cannot_be_started, cannot_be_kept_up], ids=["a broken setting", "killed for ever"])
def test_a_governor_that_is_given_up_disarms(desk: Desk, breaks: Callable[[Desk], None]) -> None:
    machine = desk.machine
    desk.trade(desk.new_symbol())
    before, epoch, backups = desk.invocation(APPLY), desk.state()["epoch"], desk.backups()
    settings = machine.read(GOVERNOR_ENV)
    began = time.monotonic()
    try:
        breaks(desk)
        machine.wait_for(lambda: desk.running_mode() == "dry_run", within_s=30, what="the dead man's disarm")
        desk.measured(f"{breaks.__name__} to dry run".replace("_", " "), time.monotonic() - began)
    finally:
        machine.sh(f"cat > {GOVERNOR_ENV}", stdin=settings)
    machine.wait_for(lambda: machine.property(DEADMAN, "ActiveState") == "inactive", what="its end")
    assert machine.property(DEADMAN, "Result") == "success"
    assert (desk.apply_mode(), len(desk.backups())) == ("dry_run", len(backups) + 1)
    assert desk.invocation(APPLY) != before

    machine.sh(f"systemctl reset-failed {GOVERNOR}\nsystemctl start {GOVERNOR}")
    desk.wait_ready()
    desk.wait_for_state("DISARMED")
    event = desk.wait_done()
    assert (event["event"], event["data"]["operator"]) == ("MANUAL_DISARM", "systemd")
    assert event["data"]["reason"] == "governor cannot be kept up"
    assert desk.state()["epoch"] == epoch + 1

    desk.restore()
    machine.systemctl("restart", GOVERNOR)
    desk.wait_ready()
    assert desk.trade(desk.new_symbol())[0]["executed"], "a note that was told disarms no second time"
    assert desk.state()["state"] == "ARMED"


# -- reboots ---------------------------------------------------------------------------------------------------------


def power_cut(desk: Desk) -> None:
    """Everything ends at once."""
    desk.machine.kill()


def shutdown(desk: Desk) -> None:
    """Everything is stopped in order."""
    desk.machine.poweroff()


def before_anything_was_done(desk: Desk) -> None:
    """Hold the lock beside the file, so that the disarm is an intention and nothing else."""
    hold = ("flock", "--no-fork", f"{APPLY_ENV}.lock", "sleep", "600")
    desk.machine.run("systemd-run", "--quiet", f"--unit={LOCK_HOLDER}", *hold)
    desk.breach()
    desk.wait_for_state("DISARMED")
    assert desk.apply_mode() == "testnet"


def while_the_apply_layer_restarts(desk: Desk) -> None:
    """Have its start hang: the file says dry run, the service is on its way, nothing is proven."""
    desk.machine.sh(f"touch {HANGS}")
    desk.breach()
    desk.wait_for_state("DISARMED")
    desk.machine.wait_for(
        lambda: desk.machine.property(APPLY, "ActiveState") == "activating", what="a start that hangs"
    )
    assert desk.apply_mode() == "dry_run"


@pytest.mark.parametrize("end", [power_cut, shutdown], ids=lambda end: end.__name__)
@pytest.mark.parametrize(
    "stage", [before_anything_was_done, while_the_apply_layer_restarts], ids=lambda stage: stage.__name__
)
def test_a_reboot_in_the_middle_of_a_disarm_finishes_it(
    desk: Desk, stage: Callable[[Desk], None], end: Callable[[Desk], None]
) -> None:
    backups, epoch = desk.backups(), desk.state()["epoch"]
    stage(desk)
    assert not [event for event in desk.events("AUTO_DISARM") if event["data"]["epoch"] == epoch + 1]
    end(desk)
    machine = desk.machine
    machine.boot()
    desk.wait_ready()
    event = desk.wait_done()
    assert (event["event"], event["data"]["epoch"]) == ("AUTO_DISARM", epoch + 1)
    assert (desk.apply_mode(), desk.running_mode()) == ("dry_run", "dry_run")
    assert len(desk.backups()) == len(backups) + 1
    assert len([event for event in desk.events("AUTO_DISARM") if event["data"]["epoch"] == epoch + 1]) == 1
    assert desk.state()["state"] == "DISARMED"
    told = desk.json("replay")
    assert (told["chain"], told["differences"]) == ("ok", [])


def test_after_a_boot_it_is_ready_by_itself(desk: Desk) -> None:
    machine = desk.machine
    desk.trade(desk.new_symbol())
    machine.poweroff()
    began = time.monotonic()
    machine.boot()
    desk.wait_ready()
    desk.measured("boot to ready, seen from outside", time.monotonic() - began)
    unit = machine.show(GOVERNOR, "ActiveEnterTimestampMonotonic", "InactiveExitTimestampMonotonic")
    started, ready = (int(unit[f"{name}TimestampMonotonic"]) / 1e6 for name in ("InactiveExit", "ActiveEnter"))
    desk.measured("of that, start of the unit to ready", ready - started)
    assert desk.trade(desk.new_symbol())[0]["executed"]


# -- another release, and none ---------------------------------------------------------------------------------------


def test_an_upgrade_restarts_it_and_a_rollback_goes_back(desk: Desk) -> None:
    machine = desk.machine
    first, before = machine.sh("readlink /opt/quantum/governor/current"), desk.invocation(GOVERNOR)
    settings = machine.read(GOVERNOR_ENV)
    machine.sh(f"echo '# a newer one' >> {SOURCE}/governor/__init__.py")
    try:
        desk.install("--no-proof")
    finally:
        machine.sh(f"sed -i '$d' {SOURCE}/governor/__init__.py")
    second, between = machine.sh("readlink /opt/quantum/governor/current"), desk.invocation(GOVERNOR)
    assert (second != first, between != before) == (True, True)
    assert machine.read(GOVERNOR_ENV) == settings
    assert desk.trade(desk.new_symbol())[0]["executed"]
    desk.install("--rollback")
    assert machine.sh("readlink /opt/quantum/governor/current") == first
    assert desk.invocation(GOVERNOR) != between
    desk.wait_ready()
    assert desk.trade(desk.new_symbol())[0]["executed"]


def test_an_uninstallation_leaves_nothing(desk: Desk) -> None:
    machine = desk.machine
    machine.run(f"{SOURCE}/deploy/install.sh", "--uninstall", "--yes")
    # Written by others all the time, or kept on purpose: the events in Redis, and the backups, which may hold secrets.
    by_others = (
        r"^/(var/log|var/lib/redis|var/lib/systemd|var/cache|var/tmp|root/\.|opt/stand-ins|etc/redis)\b"
        rf"|^/etc/(passwd|group|shadow|gshadow)-|^{re.escape(APPLY_ENV)}\.bak\.|\.pyc |__pycache__"
    )

    def lines(tree: str) -> set[str]:
        return {line for line in tree.splitlines() if not re.search(by_others, line)}

    assert lines(desk.tree()) == lines(desk.before)
    assert "quantum-governor" not in machine.sh("getent passwd; getent group")
    assert "quantum-governor" not in machine.systemctl("list-units", "--all", "--plain", "--no-legend")
    assert "quantum-governor" not in machine.systemctl("list-unit-files", "--plain", "--no-legend")
    assert "quantum-governor" not in machine.sh("ls /run /tmp /var/tmp")
    assert machine.property(APPLY, "ActiveState") == "active"
    assert desk.apply_mode() == "testnet"
