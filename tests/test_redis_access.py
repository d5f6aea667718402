"""Who may do what in Redis, over which connections, and what the server has to keep: deploy/redis on real servers."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from events import store
from events.keys import Keys
from events.store import UnavailableError
from governor import access
from governor.connection import client as client_of
from governor.connection import connected
from governor.durability import Finding, durability
from governor.gate import PermitDenied, PermitGate
from governor.settings import SettingsError, load, load_for_stop
from governor.sim.apply_layer import result_fields
from tests.conftest import NewServer, build, missing
from tests.daemon import Daemon, daemon, events_of, publish, wait_for
from tests.golden import entries as golden
from tests.servers import KINDS, Kind, RedisServer
from tests.test_audit import BEFORE, STREAM, fill
from tests.test_gate import permit_json

DEPLOY = Path(__file__).parent.parent / "deploy" / "redis"
USERS = ("governor", "apply", "auditor", "dashboard", "operator")
MADE = lru_cache(golden)
KEYS = Keys()
PERMITTING = {"GOV_MAX_REDUCE_QTY_PER_DAY": "off", "GOV_FALLBACK_QTY": "0.001"}


def make_users(passwords: Path, *options: str) -> str:
    done = subprocess.run(
        [DEPLOY / "users.sh", "--passwords", passwords, *options], capture_output=True, text=True, check=True
    )
    return done.stdout


class Guarded(RedisServer):
    """A server with the users of deploy/redis; this side logs in as `admin` unless it says otherwise."""

    more: Mapping[str, Any] = {}
    """Options of this side's clients."""

    def __init__(self, kind: Kind, home: Path, *, prefix: str = "quantum", **options: Any) -> None:
        self.home = home
        self.rules = home / "users.acl"
        self.rules.write_text(make_users(home / "passwords", "--prefix", prefix))
        given = {"aclfile": str(self.rules)} | dict(options.pop("options", {}))
        super().__init__(kind, options=given, **options)

    def password(self, user: str) -> str:
        return (self.home / "passwords" / user).read_text().strip()

    def rights_of(self, user: str) -> list[str]:
        """The rules behind the name, a selector as one."""
        (line,) = (line for line in self.rules.read_text().splitlines() if line.startswith(f"user {user} "))
        return re.findall(r"\([^)]*\)|\S+", line.split(" ", 2)[2])

    def environ(self, user: str = "governor") -> dict[str, str]:
        return {"REDIS_USERNAME": user, "REDIS_PASSWORD": self.password(user)}

    def refused(self) -> set[tuple[str, str]]:
        """User and what was refused, of everything refused since the log was reset."""
        with self.client() as admin:
            entries: Any = admin.acl_log()
        return {(entry["username"], entry["object"]) for entry in entries}

    @contextlib.contextmanager
    def client(self, *, user: str = "admin", password: str = "", **options: Any) -> Iterator[redis.Redis]:
        login: dict[str, Any] = {"username": user, "password": password or self.password(user)}
        with super().client(**login, **self.more, **options) as client:
            yield client

    def async_client(self, *, decode_responses: bool = True, protocol: int = 2, user: str = "admin") -> Any:
        return store.client(host=self.host, port=self.port, username=user, password=self.password(user))


@pytest.fixture(scope="module")
def guarded_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Kind], Guarded]]:
    started: dict[Kind, Guarded] = {}
    with contextlib.ExitStack() as stack:

        def get(kind: Kind) -> Guarded:
            if kind not in started:
                build(kind).close()  # skips where there is no such program
                started[kind] = stack.enter_context(Guarded(kind, tmp_path_factory.mktemp(kind)))
            return started[kind]

        yield get


@pytest.fixture(params=KINDS)
def guarded(request: pytest.FixtureRequest, guarded_servers: Callable[[Kind], Guarded]) -> Guarded:
    """A server of each kind with the users, emptied."""
    server = guarded_servers(request.param)
    with server.client() as admin, contextlib.suppress(redis.ConnectionError):
        admin.acl_load()  # Redis 7.0 ends every connection then, this one too
    with server.client() as admin:
        admin.flushall()
        admin.script_flush()
        admin.acl_log_reset()
    return server


# -- the rules, one by one -----------------------------------------------------------------------------------------

P, E, R = "quantum:stream:apply.plan", STREAM, "quantum:stream:apply.result"
PERMIT, BLOCK, STATE = "quantum:permit:p1", "quantum:governor:block:p1", "quantum:governor:state"
HALT, LEASE, SNAPSHOT = "quantum:governor:halt", "quantum:governor:lease", "quantum:governor:snapshot"
EXEC, DAILY = "quantum:governor:exec:BTCUSDT", "quantum:governor:daily:BTCUSDT:2026-01-25"
SCRIPT = "return redis.call('TIME')"
SHA = "26f0e4c5bb5cc4d2ed1ad4da2e8b4e8b56f6bd45"
CONNECTION = ["PING", "CLIENT SETNAME me", "CLIENT ID", "HELLO 2", "SELECT 0"]
READING_KEYS = [
    f"GET {STATE}", f"MGET {STATE} {SNAPSHOT}", f"EXISTS {HALT}", f"TYPE {EXEC}", f"LRANGE {EXEC} 0 -1", f"TTL {DAILY}",
    f"PTTL {BLOCK}",
]  # fmt: skip
READING_EVENTS = [f"XRANGE {E} - +", f"XREVRANGE {E} + -", f"XREAD COUNT 1 STREAMS {E} 0", f"XLEN {E}"]

MAY: Mapping[str, list[str]] = {
    "governor": [
        *CONNECTION, *READING_KEYS, *READING_EVENTS, "INFO", "CONFIG GET appendfsync",
        f"ACL DRYRUN default XADD {E} * f v", "CLUSTER SLOTS", "TIME",
        f"SCRIPT LOAD {SCRIPT}", "SCAN 0", f"SET {PERMIT} x PX 1000", f"DEL {PERMIT} {HALT} {BLOCK}", f"GET {PERMIT}",
        f"RPUSH {EXEC} 1", f"PEXPIRE {EXEC} 1000", f"SET {HALT} why", f"SET {SNAPSHOT} x", f"SET {LEASE} x",
        f"XADD {E} 1-0 f v", f"XTRIM {E} MINID 0-0", f"XINFO STREAM {E}", f"EXISTS {E}", f"TYPE {E}",
        f"XGROUP CREATE {P} governor 0 MKSTREAM", f"XGROUP CREATE {R} governor $ MKSTREAM",
        f"XGROUP SETID {P} governor 0", f"XREADGROUP GROUP governor governor STREAMS {P} {R} > >",
        f"XACK {P} governor 1-0", f"XPENDING {P} governor", f"XINFO GROUPS {P}", f"XINFO STREAM {R}", f"EXISTS {P}",
        f"TYPE {R}", f"XLEN {P}", f"XRANGE {P} - +", f"XREVRANGE {P} + -",
        f"EVALSHA {SHA} 5 {E} {HALT} {PERMIT} {P} {R}", f"EVAL {SCRIPT} 1 {P}",
    ],
    "apply": [
        *CONNECTION, "TIME", f"XADD {P} MAXLEN ~ 10000 * plan_id p1", f"XADD {R} * plan_id p1",
        f"GET {PERMIT}", f"EXISTS {PERMIT}", f"TTL {PERMIT}", f"PTTL {PERMIT}", f"DEL {PERMIT}", f"GETDEL {PERMIT}",
        f"GET {STATE}", f"GET {BLOCK}", f"EXISTS {STATE}", f"SCRIPT LOAD {SCRIPT}",
        f"EVALSHA {SHA} 4 {PERMIT} {STATE} {BLOCK} {HALT}", f"EXISTS {HALT}",
    ],
    "auditor": [
        *CONNECTION, *READING_KEYS, *READING_EVENTS, "INFO", "TIME", "SCAN 0", f"GET {PERMIT}", f"XRANGE {P} - +",
        f"XRANGE {R} - +", f"XPENDING {P} governor", f"XINFO STREAM {P}", f"XINFO GROUPS {R}",
    ],
    "dashboard": [*CONNECTION, *READING_KEYS, *READING_EVENTS, "INFO", "TIME"],
    "operator": [
        *CONNECTION, *READING_EVENTS, "INFO", "TIME", f"GET {STATE}", f"EXISTS {HALT}", f"TTL {DAILY}",
        f"LRANGE {EXEC} 0 -1", f"SET {HALT} why",
    ],
}  # fmt: skip
"""By user: what it is for. Arguments are split at spaces but for the script's."""

NOBODY = [
    "FLUSHALL", "FLUSHDB", "KEYS *", "SHUTDOWN NOSAVE", "CONFIG SET appendonly no", "CONFIG REWRITE",
    "ACL LIST", "ACL SETUSER apply on", "ACL LOG", "MONITOR", "CLIENT LIST", "CLIENT KILL ID 1", "CLIENT PAUSE 1",
    "CLIENT TRACKING ON", "SAVE", "BGREWRITEAOF", "REPLICAOF NO ONE", "SLOWLOG GET", "SCRIPT FLUSH", "FUNCTION LIST",
    "SWAPDB 0 1", "PUBLISH c m", "SUBSCRIBE c", "MODULE LIST", "SORT other", "OBJECT ENCODING quantum:governor:state",
    "GET other", "SET other x", "DEL other", "GET other:permit:p1", "XADD other * f v", "DUMP quantum:permit:p1",
    f"DEL {E}", f"UNLINK {E}", f"XDEL {E} 1-0", f"XSETID {E} 1-0", f"RENAME {PERMIT} other", f"COPY {PERMIT} other",
    f"RESTORE {PERMIT} 0 x", f"MIGRATE h 1 {PERMIT} 0 1", f"SET {E} x", f"SETEX {PERMIT} 9 x", f"GETSET {PERMIT} x",
    f"APPEND {PERMIT} x", f"EXPIRE {PERMIT} 9999", f"PERSIST {PERMIT}", f"XGROUP DESTROY {P} governor",
    f"XGROUP CREATECONSUMER {P} governor c", f"XAUTOCLAIM {P} governor c 0 0", f"DEL {P}", f"XTRIM {P} MAXLEN 0",
    f"XTRIM {R} MAXLEN 0", "MULTI",
]  # fmt: skip
"""What none of the users may, but for `admin`."""
READERS = [
    f"SET {PERMIT} x", f"SET {STATE} x", f"DEL {PERMIT}", f"GETDEL {PERMIT}", f"DEL {STATE}", f"DEL {HALT}",
    f"RPUSH {EXEC} 1", f"XADD {E} * f v", f"XADD {P} * f v", f"XADD {R} * f v", f"XTRIM {E} MINID 0",
    f"XACK {P} governor 1-0", f"XREADGROUP GROUP governor governor STREAMS {P} >", f"XGROUP SETID {P} governor 0",
    f"EVAL {SCRIPT} 0", f"EVALSHA {SHA} 0", f"SCRIPT LOAD {SCRIPT}", "CONFIG GET *", f"SET {LEASE} x",
]  # fmt: skip
"""What nobody may who only reads."""

MAY_NOT: Mapping[str, list[str]] = {
    "governor": [
        *NOBODY, f"XADD {P} * f v", f"XADD {R} * f v", f"XREADGROUP GROUP governor governor STREAMS {E} >",
        f"XGROUP CREATE {E} governor 0", f"XREAD STREAMS {P} 0", f"SET {P} x", f"EVAL {SCRIPT} 1 other",
        f"EVALSHA {SHA} 2 {E} other", "MSET quantum:permit:p1 x", f"GETDEL {PERMIT}",
    ],
    "apply": [
        *NOBODY, f"SET {PERMIT} x", f"SETNX {PERMIT} x", f"SET {STATE} x", f"DEL {STATE}", f"DEL {BLOCK}",
        f"GETDEL {STATE}", f"SET {BLOCK} x", f"DEL {HALT}", f"SET {HALT} x", f"GET {HALT}", f"GET {SNAPSHOT}",
        f"SET {LEASE} x", f"GET {DAILY}", f"XADD {E} * f v", f"XRANGE {E} - +", f"XREAD STREAMS {E} 0",
        f"XRANGE {P} - +", f"XREAD STREAMS {P} 0", f"XREADGROUP GROUP governor governor STREAMS {P} >",
        f"XACK {P} governor 1-0", f"EVALSHA {SHA} 1 {E}", f"EVAL {SCRIPT} 1 {PERMIT}",
        "SCAN 0", "INFO", "CONFIG GET *", "CLUSTER SLOTS",
    ],
    "auditor": [*NOBODY, *READERS],
    "dashboard": [
        *NOBODY, *READERS, f"GET {PERMIT}", f"EXISTS {PERMIT}", f"XRANGE {P} - +", f"XREAD STREAMS {R} 0", "SCAN 0",
        f"XINFO STREAM {E}", f"SET {HALT} x",
    ],
    "operator": [*NOBODY, *READERS, f"GET {PERMIT}", f"XRANGE {P} - +", "SCAN 0", f"SET {SNAPSHOT} x", f"MGET {STATE}"],
}  # fmt: skip


def names(client: redis.Redis) -> list[str]:
    found: Any = client.keys()
    return sorted(found)


def words(command: str) -> list[str]:
    """Split at spaces; the script is one word."""
    return [SCRIPT if word == "@" else word for word in command.replace(SCRIPT, "@").split()]


def answer(client: redis.Redis, command: str) -> str:
    """`ok`, or the error's text."""
    execute: Callable[..., Any] = client.execute_command
    try:
        execute(*words(command))
    except redis.exceptions.NoPermissionError as error:
        return f"NOPERM {error}"
    except redis.RedisError as error:
        return str(error)
    return "ok"


@pytest.mark.parametrize("user", USERS)
def test_a_user_may_do_what_it_is_for(guarded: Guarded, user: str) -> None:
    with guarded.client(user=user) as client:
        answers = {command: answer(client, command) for command in MAY[user]}
    assert {command: told for command, told in answers.items() if "NOPERM" in told} == {}
    assert guarded.refused() == set()


@pytest.mark.parametrize("user", USERS)
def test_a_user_may_do_nothing_else(guarded: Guarded, user: str) -> None:
    with guarded.client() as admin, guarded.client(user=user) as client:
        admin.set(PERMIT, "x")
        admin.set(STATE, "x")
        admin.xadd(E, {"f": "v"}, id="1-0")
        admin.xadd(P, {"f": "v"})
        before = {key: admin.dump(key) for key in names(admin)}
        answers = {command: answer(client, command) for command in MAY_NOT[user]}
        assert {command: told for command, told in answers.items() if not told.startswith("NOPERM")} == {}
        assert {key: admin.dump(key) for key in names(admin)} == before


@pytest.mark.parametrize("user", USERS)
def test_no_right_of_a_user_is_idle(guarded: Guarded, user: str) -> None:
    """Without any one of its commands or keys, something that the user is for is refused."""
    rules = guarded.rights_of(user)
    idle = []
    with guarded.client() as admin:
        for fewer, left_out in without_one(rules):
            asked: Any = admin.pipeline(transaction=False)
            asked.execute_command("ACL", "SETUSER", "less", "reset", *fewer)
            for command in MAY[user]:
                asked.execute_command("ACL", "DRYRUN", "less", *words(command))
            if set(asked.execute()) == {"OK"}:
                idle.append(left_out)
        admin.acl_deluser("less")
    assert idle == []


def without_one(rules: list[str]) -> Iterator[tuple[list[str], str]]:
    """The rules without one command or key pattern each, and which one."""
    for at, rule in enumerate(rules):
        if rule.startswith("("):
            inner = rule[1:-1].split()
            for index, part in enumerate(inner):
                fewer = f"({' '.join(inner[:index] + inner[index + 1 :])})"
                yield [*rules[:at], fewer, *rules[at + 1 :]], f"{part} of {rule}"
        elif rule.startswith(("+", "~", "%")):
            yield [*rules[:at], *rules[at + 1 :]], rule


def test_a_script_gives_nobody_rights_the_user_lacks(guarded: Guarded) -> None:
    forge = "return redis.call('SET', KEYS[1], ARGV[1])"
    with guarded.client() as admin, guarded.client(user="apply") as client:
        sha: Any = client.script_load(forge)
        for key in (PERMIT, STATE):
            with pytest.raises(redis.ResponseError, match=r"permissions|NOPERM|can't run this command"):
                client.evalsha(sha, 1, key, permit_json(time.time()))
        admin.set(STATE, "x")
        sha = client.script_load("return redis.call('DEL', KEYS[1])")
        with pytest.raises(redis.ResponseError, match=r"permissions|NOPERM|access at least one of the keys"):
            client.evalsha(sha, 1, STATE)
        assert names(admin) == [STATE]


def test_the_brake_can_be_lent_without_the_right_to_release_it(guarded: Guarded) -> None:
    """As docs/redis.md has it: SETNX neither replaces the key nor gives it an end."""
    with guarded.client() as admin, guarded.client(user="apply") as client:
        guarded.ask("ACL", "SETUSER", "apply", f"(%W~{HALT} +setnx)")
        assert client.setnx(HALT, "fills look wrong") == 1
        assert client.setnx(HALT, "no") == 0
        for command in (
            f"SET {HALT} no PX 1",
            f"DEL {HALT}",
            f"PEXPIRE {HALT} 1",
            f"GETDEL {HALT}",
            f"SETNX {PERMIT} x",
        ):
            assert answer(client, command).startswith("NOPERM"), command
        assert (admin.get(HALT), admin.ttl(HALT)) == ("fills look wrong", -1)


def test_a_bots_own_keys_give_it_no_more_of_ours(guarded: Guarded) -> None:
    """As docs/redis.md has it: rights outside of the selectors do not mix with those in them."""
    with guarded.client(user="apply") as client:
        guarded.ask("ACL", "SETUSER", "apply", "~bot:*", "+@all", "-@dangerous")
        assert answer(client, "SET bot:position x") == "ok"
        for command in (
            f"SET {PERMIT} x",
            f"SET {HALT} x",
            f"DEL {E}",
            f"XADD {E} * f v",
            f"RENAME bot:position {PERMIT}",
        ):
            assert answer(client, command).startswith("NOPERM"), command


def test_nobody_gets_in_without_a_name_or_with_a_wrong_password(guarded: Guarded) -> None:
    with redis.Redis(host=guarded.host, port=guarded.port, retry=Retry(NoBackoff(), 0)) as nobody:
        with pytest.raises(redis.AuthenticationError):
            nobody.ping()
        with guarded.client() as admin:
            admin.set(PERMIT, "x")
        assert answer(nobody, f"DEL {PERMIT}") != "ok"
        assert guarded.ask("EXISTS", PERMIT) == 1
    with guarded.client(user="governor", password="wrong" * 8) as wrong, pytest.raises(redis.AuthenticationError):
        wrong.ping()


# -- making the file -----------------------------------------------------------------------------------------------


def test_the_same_passwords_give_the_same_file_and_it_has_none_of_them(tmp_path: Path) -> None:
    kept = tmp_path / "passwords"
    first = make_users(kept)
    made = {file.name: file.read_text().strip() for file in kept.iterdir()}
    assert set(made) == {"admin", *USERS}
    assert len(set(made.values())) == 6
    assert all(len(password) == 64 for password in made.values())
    assert {file.stat().st_mode & 0o777 for file in kept.iterdir()} == {0o600}
    assert kept.stat().st_mode & 0o777 == 0o700
    assert make_users(kept) == first
    assert not any(password in first for password in made.values())
    assert all(line.startswith("user ") for line in first.splitlines())
    (kept / "apply").write_text("a-password-of-a-persons-own\n")
    changed = make_users(kept)
    assert [a.split()[1] for a, b in zip(first.splitlines(), changed.splitlines(), strict=True) if a != b] == ["apply"]


def test_a_second_account_has_users_of_its_own(tmp_path: Path) -> None:
    second = make_users(tmp_path / "p", "--prefix", "{alice}", "--suffix", "-alice")
    assert [line.split()[1] for line in second.splitlines()] == [f"{user}-alice" for user in USERS]
    assert "~{alice}:permit:*" in second
    assert "quantum" not in second
    server = Guarded("redis7", tmp_path, prefix="{quantum}")
    with server.rules.open("a") as rules:
        rules.write(make_users(tmp_path / "passwords", "--prefix", "{alice}", "--suffix", "-alice"))
    with server, server.client(user="governor-alice") as alice, server.client(user="governor") as first:
        assert answer(alice, "SET {alice}:permit:p1 x") == answer(first, "SET {quantum}:permit:p1 x") == "ok"
        assert answer(alice, "SET {quantum}:permit:p1 x").startswith("NOPERM")
        assert answer(first, "GET {alice}:permit:p1").startswith("NOPERM")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "--passwords is missing"),
        (["--passwords"], "--passwords needs a value"),
        (["--passwords", "p", "--prefix", "a b"], "--prefix is 'a b', expected letters"),
        (["--passwords", "p", "--prefix", "a*"], "--prefix is 'a*', expected letters"),
        (["--passwords", "p", "--suffix", "("], "--suffix is '(', expected letters"),
        (["--passwords", "p", "--all"], "--all is no option, expected"),
        (["--passwords", "short"], "short/apply: expected one line of at least 16 printable characters"),
    ],
)
def test_what_cannot_be_a_user_is_refused_with_the_reason(tmp_path: Path, options: list[str], problem: str) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "apply").write_text("secret\n")
    done = subprocess.run([DEPLOY / "users.sh", *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert problem in done.stderr


# -- in use --------------------------------------------------------------------------------------------------------


def tell_result(client: redis.Redis, plan_id: str, symbol: str, qty: str) -> None:
    fields = result_fields({"plan_id": plan_id, "symbol": symbol}, executed=True, qty=qty, error="", now=time.time())
    client.xadd(R, fields)  # type: ignore[arg-type]


def go_through_everything(server: RedisServer, one: Daemon, bot: redis.Redis, admin: redis.Redis) -> None:
    """Plans, permits used, left and taken back, results, a burst, a re-arm, the brake, and plans lost unread."""
    publish(bot, "used", "BTCUSDT")
    permit = PermitGate(bot).consume("used", symbol="BTCUSDT")
    tell_result(bot, "used", "BTCUSDT", str(permit.computed_qty))
    publish(bot, "plain", "ETHUSDT")
    wait_for(lambda: bot.get("quantum:permit:plain"))
    assert bot.delete("quantum:permit:plain") == 1, "as a client without the gate does"
    publish(bot, "left", "SOLUSDT")
    publish(bot, "broken", "SOLUSDT", kill_score="x")
    wait_for(lambda: events_of(admin, "PERMIT_EXPIRED"))
    for number in range(3):
        publish(bot, f"burst{number}", "XRPUSDT")
    wait_for(lambda: events_of(admin, "AUTO_DISARM"))
    with pytest.raises(PermitDenied, match="blocked:"):
        PermitGate(bot).consume("burst2", symbol="XRPUSDT")
    assert one.command("rearm", "--reason", "looked at").returncode == 0
    one.stop()
    admin.xtrim(P, maxlen=0, approximate=False)
    publish(bot, "unread", "BTCUSDT")
    admin.xtrim(P, maxlen=0, approximate=False)
    one.start()
    wait_for(lambda: events_of(admin, "PLAN_LOST"))


def test_the_daemon_and_every_command_need_no_more_than_the_users_have(guarded: Guarded, tmp_path: Path) -> None:
    quick = {"GOV_PERMIT_TTL_SEC": "2", **PERMITTING, "GOV_CHECKPOINT_EVENTS": "10"}
    with contextlib.ExitStack() as stack:
        admin, bot = (stack.enter_context(guarded.client(user=user)) for user in ("admin", "apply"))
        brake = stack.enter_context(guarded.client(user="operator"))
        one = stack.enter_context(daemon(tmp_path, port=guarded.port, environ=guarded.environ() | quick))
        go_through_everything(guarded, one, bot, admin)
        brake.set(HALT, "a person")
        wait_for(lambda: [event for event in events_of(admin, "MANUAL_DISARM") if event["operator"] == "redis"])
        wait_for(lambda: admin.exists(SNAPSHOT))
        admin.delete(STATE)
        wait_for(lambda: admin.exists(STATE), what="the state is written again")
        assert one.command("rearm", "--reason", "again").returncode == 0
        assert one.command("disarm", "--reason", "by hand").returncode == 0
        for words_ in (["rebuild", "--check"], ["checkpoint"]):
            done = one.command(*words_)
            assert done.returncode == 0, (words_, done.stderr)
        assert one.readiness()["problems"] == []
        assert guarded.refused() == set()


def test_old_events_are_archived_and_read_with_the_rights_there_are(guarded: Guarded, tmp_path: Path) -> None:
    with guarded.client() as admin:
        fill(admin, MADE())
        by_governor = Daemon(tmp_path, port=guarded.port, environ=guarded.environ())
        assert by_governor.json("rebuild")["events"] == len(MADE())
        assert by_governor.json("archive", "--before", BEFORE)["trimmed"] == len(MADE()) - admin.xlen(STREAM) > 0
        auditor, dashboard = guarded.environ("auditor"), guarded.environ("dashboard")
        for environ, commands in (
            (auditor, ["status", "explain p1", "replay", "rebuild --check"]),
            (dashboard, ["status", "events"]),
        ):
            for command in commands:
                done = by_governor.command(*command.split(), **environ)
                assert (done.returncode, done.stderr) in ((0, ""), (3, "")), (command, done.stderr)
        export = by_governor.command("events", "--export", str(tmp_path / "all.jsonl.zst"), **auditor)
        assert export.returncode == 0, export.stderr
        assert guarded.refused() == set()
        admin.delete(STATE)
        before = {key: admin.dump(key) for key in names(admin)}
        for command in ("rebuild", "archive --before 2026-01-26", "checkpoint"):
            done = by_governor.command(*command.split(), **auditor)
            assert done.returncode != 0, command
            assert "permissions" in done.stderr, command
        assert {key: admin.dump(key) for key in names(admin)} == before


# -- the self-test -------------------------------------------------------------------------------------------------


async def asked(server: Guarded, user: str, keys: Keys = KEYS) -> tuple[Finding, ...]:
    async with server.async_client(user=user) as connection:
        return await access.missing(connection, keys)


async def test_the_governor_lacks_nothing_and_the_others_lack_much(guarded: Guarded) -> None:
    assert await asked(guarded, "admin") == ()
    assert await asked(guarded, "governor") == ()
    assert access.refusal("governor", ()) is None
    for user in ("apply", "auditor", "dashboard", "operator"):
        found = await asked(guarded, user)
        assert access.refusal(user, found) is not None
    (finding,) = await asked(guarded, "dashboard")
    assert finding == Finding(f"EVAL {P}", "NOPERM", "allowed", "bad"), "without EVAL nothing else can be asked"
    assert len(await asked(guarded, "governor", Keys("other"))) > 40


async def test_each_right_that_is_missing_is_named_and_asking_changes_nothing(guarded: Guarded) -> None:
    with guarded.client() as admin:
        dirty = admin.info("persistence")["rdb_changes_since_last_save"]
        ask: Any = admin.execute_command
        for right in access.rights(KEYS):
            command = right.command.lower().replace(" ", "|")
            ask("ACL", "SETUSER", "less", "reset", "on", ">x", "~*", "+@all", f"-{command}")
            async with store.client(host=guarded.host, port=guarded.port, username="less", password="x") as connection:
                found = await access.missing(connection, KEYS)
            named = {finding.name: finding.verdict for finding in found}
            if command == "eval":
                assert set(named) == {f"EVAL {P}"}
            else:
                assert named[right.name] == right.verdict
                assert all(name.startswith(right.command) for name in named)
        admin.acl_deluser("less")
        assert admin.dbsize() == 0
        assert admin.info("persistence")["rdb_changes_since_last_save"] == dirty


async def test_each_key_that_may_not_be_touched_is_named(guarded: Guarded) -> None:
    everything = {key for right in access.rights(KEYS) for key in right.keys}
    with guarded.client() as admin:
        for key in sorted(everything):
            others = [f"~{other}" for other in everything if not fnmatch.fnmatchcase(key, other)]
            guarded.ask("ACL", "SETUSER", "less", "reset", "on", ">x", "+@all", *others)
            async with store.client(host=guarded.host, port=guarded.port, username="less", password="x") as connection:
                found = await access.missing(connection, KEYS)
            wanted = {right.name for right in access.rights(KEYS) if key in right.keys}
            assert {finding.name for finding in found} >= wanted, key
        admin.acl_deluser("less")


def test_the_rights_asked_for_are_all_that_the_daemon_needs(guarded: Guarded, tmp_path: Path) -> None:
    """A user with exactly these and no other right goes through everything."""
    rules = ["on", ">x", "+@connection", "-@dangerous", "+info", "+config|get", "+acl|dryrun"]
    for right in access.rights(KEYS):
        if right.verdict == "bad" or right.command in ("SET", "INFO"):
            keys = " ".join(f"~{key}" for key in right.keys)
            rules.append(f"({keys} +{right.command.lower().replace(' ', '|')})")
    environ = {"REDIS_USERNAME": "exact", "REDIS_PASSWORD": "x", "GOV_PERMIT_TTL_SEC": "2"}
    with contextlib.ExitStack() as stack:
        admin, bot = (stack.enter_context(guarded.client(user=user)) for user in ("admin", "apply"))
        guarded.ask("ACL", "SETUSER", "exact", "reset", *rules)
        one = stack.enter_context(daemon(tmp_path, port=guarded.port, environ=environ | PERMITTING))
        go_through_everything(guarded, one, bot, admin)
        assert guarded.refused() == set()
        admin.acl_deluser("exact")


async def test_a_server_that_cannot_tell_stops_nobody(guarded: Guarded) -> None:
    class Refuses:
        async def execute_command(self, *_: object) -> None:
            raise redis.ResponseError("unknown command 'EVAL'")

    assert await access.missing(Refuses(), KEYS) == ()  # type: ignore[arg-type]
    with guarded.client() as admin:
        admin.config_set("maxmemory", "1")
        try:
            assert await asked(guarded, "governor") == (), "a full server refuses to write, and that is not asked for"
        finally:
            admin.config_set("maxmemory", "0")


async def test_a_server_that_is_away_or_knows_no_such_user_is_unavailable(
    guarded: Guarded, new_server: NewServer
) -> None:
    gone = new_server("redis7")
    async with store.client(host=gone.host, port=gone.port) as connection:
        gone.kill()
        with pytest.raises(UnavailableError):
            await access.missing(connection, KEYS)
    async with store.client(host=guarded.host, port=guarded.port, username="nobody", password="x") as connection:
        with pytest.raises(UnavailableError, match=r"WRONGPASS|invalid username"):
            await access.missing(connection, KEYS)


def test_a_refusal_names_the_user_and_what_it_lacks() -> None:
    found = [Finding(f"SET key{number}", "NOPERM", "allowed", "bad") for number in range(8)]
    assert access.refusal("bot", found[:2]) == (
        "REDIS_USERNAME is 'bot', expected a user whose access rules allow: SET key0, SET key1 "
        "(deploy/redis/users.acl has the rules)"
    )
    assert "SET key5 and 2 more (" in str(access.refusal("bot", found))
    assert access.refusal("bot", [Finding("SCAN", "NOPERM", "allowed", "warn")]) is None


def test_a_daemon_without_its_rights_does_not_start_and_says_which(guarded: Guarded, tmp_path: Path) -> None:
    one = Daemon(tmp_path, port=guarded.port, environ=guarded.environ("apply"))
    one.start(ready=False)
    assert one.process is not None
    assert one.process.wait(10) == 78
    assert "REDIS_USERNAME is 'apply', expected a user whose access rules allow: EVAL" in one.log
    with guarded.client() as admin:
        fewer = [rule.replace("+xadd ", "").replace("+xtrim ", "") for rule in guarded.rights_of("governor")]
        guarded.ask("ACL", "SETUSER", "governor", "reset", *fewer)
        one.environ |= guarded.environ()
        one.start(ready=False)
        assert one.process.wait(10) == 78
        assert f'"right": "XADD {E}", "needed_by_daemon": true' in one.log
        assert f'"right": "XTRIM {E}", "needed_by_daemon": false' in one.log
        assert f"allow: XADD {E} (deploy/redis" in one.log
        assert admin.dbsize() == 0


def test_rights_that_are_taken_away_while_it_runs_are_told_and_missed_no_longer_than_they_are_away(
    guarded: Guarded, tmp_path: Path
) -> None:
    with (
        guarded.client() as admin,
        guarded.client(user="apply") as bot,
        daemon(tmp_path, port=guarded.port, environ=guarded.environ() | PERMITTING) as one,
    ):
        publish(bot, "before", "BTCUSDT")
        PermitGate(bot).consume("before", symbol="BTCUSDT")
        fewer = [rule.replace("+xadd ", "") for rule in guarded.rights_of("governor")]
        guarded.ask("ACL", "SETUSER", "governor", "reset", *fewer)
        publish(bot, "meanwhile", "BTCUSDT")
        wait_for(lambda: "xadd" in str(one.readiness()["problems"]).lower(), what="the missing right in /readyz")
        assert not bot.exists("quantum:permit:meanwhile")
        admin.acl_load()
        with guarded.client(user="apply") as again:
            assert PermitGate(again).consume("meanwhile", symbol="BTCUSDT", wait_s=8).plan_id == "meanwhile"
        wait_for(lambda: one.readiness()["problems"] == [])


# -- who gets in without a password --------------------------------------------------------------------------------


def settings_for(server: RedisServer, **environ: str) -> Any:
    return load({"REDIS_HOST": server.host, "REDIS_PORT": str(server.port), **environ})


OPEN = Finding("default user", "may write permits, without a password", "off, or with a password", "warn")


async def about_default(server: RedisServer, **environ: str) -> tuple[Finding, ...]:
    settings = settings_for(server, **environ)
    async with connected(settings) as connection:
        return await access.default_user(connection, settings)


async def test_a_server_open_to_all_is_told_and_one_that_is_not_is_not(flushed: RedisServer, guarded: Guarded) -> None:
    assert await about_default(flushed) == (OPEN,)
    with flushed.client() as admin:
        assert admin.dbsize() == 0
    governor = guarded.environ()
    assert await about_default(guarded, **governor) == ()
    guarded.ask("ACL", "SETUSER", "default", "on", "nopass")
    assert await about_default(guarded, **governor) == (OPEN,)
    guarded.ask("ACL", "SETUSER", "default", "on", "resetpass", ">password")
    assert await about_default(guarded, REDIS_PASSWORD="password") == ()
    assert await about_default(guarded, **governor) == ()
    guarded.kill()
    try:
        assert await about_default(guarded, **governor) == ()
    finally:
        guarded.start()


async def test_a_default_user_as_whom_the_server_forgets_is_told(guarded: Guarded, tmp_path: Path) -> None:
    for rules in (["-@all"], ["+@all", "-xadd"], ["+@all", "resetkeys"]):
        guarded.ask("ACL", "SETUSER", "default", *rules)
        (finding,) = await about_default(guarded, **guarded.environ())
        assert (finding.seen, finding.verdict) == ("may not write events", "bad")
    assert await about_default(guarded, **guarded.environ("apply")) == (), "who may not ask cannot tell"
    with Configured(guarded.kind, tmp_path) as server:
        server.ask("ACL", "SETUSER", "default", "-@all")
        home = tmp_path / "home"
        home.mkdir()
        one = Daemon(home, port=server.port, environ=server.environ() | {"GOV_REQUIRE_DURABLE": "true"})
        one.start(ready=False)
        assert one.process is not None
        assert one.process.wait(10) == 78
        assert "its default user may not write events, expected off, with all rights" in one.log


def test_the_daemon_tells_at_start_that_everybody_may_write_permits(flushed: RedisServer, tmp_path: Path) -> None:
    with daemon(tmp_path, port=flushed.port) as one:
        assert one.log.count("may write permits, without a password") == 1


# -- the server's configuration ------------------------------------------------------------------------------------


class Configured(Guarded):
    """A server started from deploy/redis/quantum-redis.conf; only what names this machine is put in its place."""

    edits: Mapping[str, str] = {}

    def _spawn(self) -> None:
        text = (DEPLOY / "quantum-redis.conf").read_text()
        for old, new in {
            "/etc/redis/users.acl": str(self.rules),
            "port 6379": f"port {self.port}",
            **self.edits,
        }.items():
            assert old in text
            text = text.replace(old, new)
        config = self.data_dir / "quantum-redis.conf"
        config.write_text(text)
        with (self.data_dir / "server.log").open("ab") as log:
            command = [self._program, str(config), "--dir", str(self.data_dir)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.data_dir)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_configuration_keeps_what_it_is_told(kind: Kind, tmp_path: Path) -> None:
    build(kind).close()
    with Configured(kind, tmp_path) as server:
        async with server.async_client(user="governor") as connection:
            kept = await durability(connection)
        assert kept.verdict == "ok", kept
        home = tmp_path / "home"
        home.mkdir()
        environ = server.environ() | {"GOV_REQUIRE_DURABLE": "true"}
        with daemon(home, port=server.port, environ=environ) as one, server.client() as admin:
            publish(admin, "p1", "BTCUSDT")
            wait_for(lambda: events_of(admin, "DECISION"))
            told = [line for line in one.log.splitlines() if '"warning"' in line and '"active"' not in line]
            assert [line for line in told if "decision" not in line and "error_recorded" not in line] == []
            count = admin.xlen(STREAM)
        server.kill()
        server.start()
        with server.client() as admin:
            assert admin.xlen(STREAM) >= count > 0
            assert admin.config_get("save")["save"] == "3600 1"


# -- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As docs/redis.md makes them: an authority, a server's and a client's certificate; and another authority."""
    if shutil.which("openssl") is None:
        missing("openssl is not on PATH: apt-get install openssl")
    home = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=home, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        openssl(
            "req",
            "-x509",
            *key,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.crt",
            "-days",
            "3650",
            "-subj",
            f"/CN={name}",
        )
    (home / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", "-new", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = (
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "825",
        )
        openssl(*sign, "-out", f"{name}.crt", "-extfile", "names")
    openssl("pkey", "-in", "client.key", "-out", "locked.key", "-aes256", "-passout", "pass:secret")
    (home / "both.pem").write_bytes((home / "client.crt").read_bytes() + (home / "client.key").read_bytes())
    return home


class Encrypted(Configured):
    """The same with the TLS section of the file in force. Redis 7 alone: the package's Valkey is built without TLS."""

    def __init__(self, home: Path, certificates: Path, *, clients: str = "yes") -> None:
        super().__init__("redis7", home)
        self.certificates = certificates
        self.more = {
            "ssl": True,
            "ssl_ca_certs": str(certificates / "ca.crt"),
            "ssl_certfile": str(certificates / "client.crt"),
            "ssl_keyfile": str(certificates / "client.key"),
        }
        self.edits = {
            f"\nport {self.port}\n": "\nport 0\n",
            "# port 0\n": "",
            f"# tls-port {self.port}": f"tls-port {self.port}",
            **{f"# tls-{name}": f"tls-{name}" for name in ("cert-file", "key-file", "ca-cert-file", "protocols")},
            "# tls-auth-clients no": f"tls-auth-clients {clients}",
            "/etc/redis/tls": str(certificates),
        }

    def environ(self, user: str = "governor") -> dict[str, str]:
        return super().environ(user) | {
            "REDIS_TLS": "true",
            "REDIS_TLS_CA": str(self.certificates / "ca.crt"),
            "REDIS_TLS_CERT": str(self.certificates / "client.crt"),
            "REDIS_TLS_KEY": str(self.certificates / "client.key"),
        }


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Encrypted]:
    build("redis7").close()
    with Encrypted(tmp_path_factory.mktemp("encrypted"), certificates) as server:
        yield server


def test_daemon_commands_and_the_client_speak_tls_with_certificates_on_both_sides(
    encrypted: Encrypted, tmp_path: Path
) -> None:
    limits = {**PERMITTING, "GOV_REQUIRE_DURABLE": "true"}
    with (
        daemon(tmp_path, port=encrypted.port, environ=encrypted.environ() | limits) as one,
        encrypted.client(user="apply") as bot,
    ):
        publish(bot, "p1", "BTCUSDT")
        assert PermitGate(bot).consume("p1", symbol="BTCUSDT").plan_id == "p1"
        assert one.json("status")["state"] == "ARMED"
        assert one.command("status", REDIS_HOST="localhost").returncode == 0
        done = one.command("status", REDIS_TLS_CERT=str(encrypted.certificates / "both.pem"), REDIS_TLS_KEY="")
        assert done.returncode == 0, done.stderr


async def test_a_prefix_with_a_hash_tag_speaks_tls_too(encrypted: Encrypted) -> None:
    settings = settings_for(encrypted, GOV_KEY_PREFIX="{quantum}", **encrypted.environ("admin"))
    async with connected(settings) as connection:
        assert await connection.ping() is True


async def test_sentinels_and_the_primary_they_tell_of_get_the_same_certificates(encrypted: Encrypted) -> None:
    settings = settings_for(encrypted, REDIS_SENTINELS="127.0.0.1:1", **encrypted.environ())
    connection = client_of(settings)
    pool: Any = connection.connection_pool
    options = {
        "ssl_ca_certs": str(settings.redis_tls_ca),
        "ssl_certfile": str(settings.redis_tls_cert),
        "ssl_keyfile": str(settings.redis_tls_key),
    }
    assert options.items() <= pool.connection_kwargs.items()
    assert options.items() <= pool.sentinel_manager._options.items()
    await connection.aclose()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        pytest.param({"REDIS_TLS_CA": "other.crt"}, "CERTIFICATE_VERIFY_FAILED", id="another authority"),
        pytest.param({"REDIS_TLS_CA": ""}, "CERTIFICATE_VERIFY_FAILED", id="the system's authorities"),
        pytest.param(
            {"REDIS_TLS_CERT": "", "REDIS_TLS_KEY": ""}, "CERTIFICATE_REQUIRED|reset by peer", id="no certificate"
        ),
        pytest.param({"REDIS_TLS_CERT": "other.crt", "REDIS_TLS_KEY": "other.key"}, "UNKNOWN_CA", id="a foreign one"),
        pytest.param({"REDIS_TLS": "false"}, "127.0.0.1", id="no TLS"),
    ],
)
def test_who_does_not_trust_or_is_not_trusted_is_told_so(
    encrypted: Encrypted, tmp_path: Path, changed: dict[str, str], told: str
) -> None:
    files = {name: str(encrypted.certificates / value) if "." in value else value for name, value in changed.items()}
    one = Daemon(tmp_path, port=encrypted.port, environ=encrypted.environ() | files)
    done = one.command("status")
    assert done.returncode == 4
    assert re.search(told, done.stderr)
    assert "\n" not in done.stderr.strip()


def test_a_certificate_for_another_host_is_refused(encrypted: Encrypted, tmp_path: Path) -> None:
    hosts = Daemon(tmp_path, port=encrypted.port, environ=encrypted.environ() | {"REDIS_HOST": "ip6-localhost"})
    done = hosts.command("status", REDIS_HOST="127.1")
    assert done.returncode == 4
    assert "mismatch" in done.stderr or "CERTIFICATE_VERIFY_FAILED" in done.stderr


def test_a_daemon_that_does_not_trust_the_server_waits_and_says_why(encrypted: Encrypted, tmp_path: Path) -> None:
    wrong = encrypted.environ() | {"REDIS_TLS_CA": str(encrypted.certificates / "other.crt")}
    with daemon(tmp_path, port=encrypted.port, environ=wrong, ready=False) as one:
        wait_for(lambda: "waiting for the event store" in one.log and "CERTIFICATE_VERIFY_FAILED" in one.log)
        assert one.process is not None
        assert one.process.poll() is None


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        pytest.param(
            {"REDIS_TLS_CA": "/no/ca"}, "REDIS_TLS_CA is '/no/ca', expected a readable file: No such", id="gone"
        ),
        pytest.param({"REDIS_TLS_CA": "ca.crt"}, "REDIS_TLS_CA is 'ca.crt', expected an absolute path", id="relative"),
        pytest.param(
            {"REDIS_TLS_CA": "@ca.key"}, "REDIS_TLS_CA is '@ca.key', expected certificates in PEM", id="a key"
        ),
        pytest.param({"REDIS_TLS_KEY": "@server.key"}, "REDIS_TLS_KEY is '@server.key', expected", id="another's key"),
        pytest.param({"REDIS_TLS_KEY": "@locked.key"}, "in PEM, without a passphrase", id="a key with a passphrase"),
        pytest.param({"REDIS_TLS_KEY": ""}, "REDIS_TLS_CERT is '@client.crt' and REDIS_TLS_KEY is ''", id="no key"),
        pytest.param(
            {"REDIS_TLS_CERT": ""}, "REDIS_TLS_KEY is '@client.key' without REDIS_TLS_CERT", id="no certificate"
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(certificates: Path, changed: dict[str, str], problem: str) -> None:
    good = {"REDIS_TLS_CA": "@ca.crt", "REDIS_TLS_CERT": "@client.crt", "REDIS_TLS_KEY": "@client.key"}
    place = {name: value.replace("@", f"{certificates}/") for name, value in (good | changed).items()}
    with pytest.raises(SettingsError, match=re.escape(problem.replace("@", f"{certificates}/"))):
        load({"REDIS_TLS": "true", **place})
    if "absolute" not in problem:
        assert load_for_stop({"REDIS_TLS": "true", **place}).redis_tls, "a stop by hand works without Redis"
    assert load({"REDIS_TLS": "false", **place} if "absolute" not in problem else {}).warnings or "absolute" in problem


def test_files_for_tls_without_tls_are_warned_about(certificates: Path) -> None:
    (warning,) = load({"REDIS_TLS_CA": str(certificates / "ca.crt")}).warnings
    assert warning == "REDIS_TLS_CA is set and REDIS_TLS is false: nothing is encrypted"


def test_a_disarm_by_hand_works_although_a_certificate_is_gone(encrypted: Encrypted, tmp_path: Path) -> None:
    one = Daemon(tmp_path, port=encrypted.port, environ=encrypted.environ() | {"REDIS_TLS_CA": "/no/ca"})
    assert one.command("status").returncode == 78
    done = one.command("disarm", "--reason", "now")
    assert done.returncode == 4
    assert "APPLY_MODE=dry_run" in one.config.read_text()
    assert "Redis is not reachable" in done.stdout
