"""A history that got lost comes back from the daemon's own disk, and one that contradicts it stops the permits."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from events.chain import GENESIS
from events.codec import decode, encode, encode_all
from events.journal import Journal
from events.keys import Keys
from events.segments import DiskError
from events.store import Commit, MemoryStore, StoreError, Write
from events.types import Entry, ErrorRecorded, Recovered
from governor.connection import Door, store_on
from governor.connection import client as client_of
from governor.durability import Server
from governor.gate import PermitGate
from governor.history import Keeper, QuarantineError
from governor.ledger import Ledger, Proposal
from governor.settings import load
from governor.sim.apply_layer import result_fields
from tests.conftest import NewServer
from tests.daemon import Daemon, daemon, events_of, fields_of, publish, wait_for
from tests.proxy import Proxy
from tests.servers import RedisServer

STREAM = "quantum:stream:governor.events"
STATE = "quantum:governor:state"


@pytest.fixture
def one(flushed: RedisServer, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose permits live for three seconds, with some history: two permits consumed."""
    environ = {"GOV_FALLBACK_QTY": "0.001", "GOV_PERMIT_TTL_SEC": "3"}
    with flushed.client() as client, daemon(tmp_path, port=flushed.port, environ=environ) as running:
        for plan_id in ("a", "b"):
            permitted(client, plan_id, "BTCUSDT")
            PermitGate(client).consume(plan_id, symbol="BTCUSDT")
        wait_for(lambda: len(events_of(client, "PERMIT_CONSUMED")) == 2)
        yield running


def permitted(client: redis.Redis, plan_id: str, symbol: str) -> None:
    publish(client, plan_id, symbol)
    wait_for(lambda: client.exists(f"quantum:permit:{plan_id}"), what=f"a permit for {plan_id}")


def blocked(client: redis.Redis, plan_id: str, symbol: str) -> str:
    """Publish a plan and wait for its block record: the reason."""
    publish(client, plan_id, symbol)
    found: Any = wait_for(lambda: client.get(f"quantum:governor:block:{plan_id}"), what=f"a block of {plan_id}")
    return str(json.loads(found)["reason"])


def after_the_hold(client: redis.Redis, symbol: str = "ETHUSDT") -> None:
    """Plans are permitted again once the hold is over."""
    tried = iter(range(1000))

    def passes() -> bool:
        plan_id = f"after{next(tried)}"
        publish(client, plan_id, symbol, "UPDATE_SL")
        wait_for(lambda: client.exists(f"quantum:permit:{plan_id}", f"quantum:governor:block:{plan_id}"))
        return bool(client.exists(f"quantum:permit:{plan_id}"))

    wait_for(passes, what="a permit after the hold")


def stored(client: redis.Redis) -> list[Entry]:
    found: Any = client.xrange(STREAM)
    return [Entry(f["event"], int(f["seq"]), f["timestamp"], f["data"].encode(), f["hash"]) for _, f in found]


def fill(client: redis.Redis, entries: list[Entry]) -> None:
    client.delete(STREAM)
    for entry in entries:
        client.xadd(STREAM, cast("Any", fields_of(entry)), id=f"{entry.seq}-0")


def journaled(one: Daemon, home: Path, digest: str) -> bool:
    """Whether this daemon's own journal has the event of that hash."""
    (slot,) = re.findall(r'"slot": "([^"]+)"', one.log)
    assert slot.startswith(str(home))
    return any(digest.encode() in path.read_bytes() for path in Path(slot).glob("events-*.log"))


LOSSES: dict[str, Callable[[redis.Redis], Any]] = {
    "everything": lambda client: client.flushall(),
    "the event stream": lambda client: client.delete(STREAM),
    "the tail": lambda client: fill(client, stored(client)[:-4]),
}


@pytest.mark.parametrize("what", list(LOSSES))
@pytest.mark.parametrize("running", [True, False], ids=["under a running daemon", "while it is away"])
def test_what_redis_lost_comes_back_with_the_public_keys_and_a_hold_and_never_a_permit(
    one: Daemon, client: redis.Redis, what: str, *, running: bool
) -> None:
    permitted(client, "c", "ETHUSDT")
    if not running:
        wait_for(lambda: not client.exists("quantum:permit:c"))
        wait_for(lambda: len(events_of(client, "PERMIT_EXPIRED")) == 1)
        one.kill()
    before = stored(client)
    LOSSES[what](client)
    if not running:
        one.start()
    wait_for(lambda: events_of(client, "HISTORY_RESTORED"), what="HISTORY_RESTORED")
    assert blocked(client, "d", "SOLUSDT") == "history_hold"
    after = stored(client)
    assert after[: len(before)] == before
    assert client.exists(STATE, "quantum:governor:exec:BTCUSDT") == 2
    if what == "everything":
        assert not client.exists("quantum:permit:c"), "a permit is never written back"
    publish(client, "a", "BTCUSDT")
    wait_for(lambda: [d for d in events_of(client, "DECISION") if d["reason"] == "duplicate_plan"])
    after_the_hold(client)
    audit = one.json("replay")
    assert (audit["differences"], audit["chain"]) == ([], "ok")
    assert one.json("rebuild", "--check")["differences"] == []


@pytest.mark.parametrize("end", ["revoked", "consumed"])
def test_a_permit_that_came_back_with_a_server_is_dead_where_its_end_was_lost(
    own_server: RedisServer, tmp_path: Path, end: str
) -> None:
    with own_server.client() as client, daemon(tmp_path, port=own_server.port, GOV_FALLBACK_QTY="0.001") as one:
        permitted(client, "x", "BTCUSDT")
        events, state, permit = stored(client), client.get(STATE), client.get("quantum:permit:x")
        if end == "revoked":
            one.command("disarm", "--reason", "bad fills")
            wait_for(lambda: events_of(client, "MANUAL_DISARM"))
        else:
            PermitGate(client).consume("x", symbol="BTCUSDT")
            proposal = {"plan_id": "x", "symbol": "BTCUSDT"}
            done = result_fields(proposal, executed=True, qty="0.001", error="", now=time.time())
            client.xadd("quantum:stream:apply.result", cast("Any", done))
            wait_for(lambda: events_of(client, "PERMIT_CONSUMED"))
        wait_for(lambda: journaled(one, tmp_path, stored(client)[-1].hash), what="the end in the journal")
        one.kill()
        fill(client, events)
        client.set(STATE, cast("Any", state))
        client.set("quantum:permit:x", cast("Any", permit), ex=60)
        one.start()
        wait_for(lambda: events_of(client, "HISTORY_RESTORED"))
        assert not client.exists("quantum:permit:x")


def test_a_server_that_was_killed_and_came_back_whole_holds_nothing_back(
    own_server: RedisServer, tmp_path: Path
) -> None:
    own_server.stop()
    own_server._settings["appendonly"] = "yes"
    own_server.start()
    with own_server.client() as client, daemon(tmp_path, port=own_server.port, GOV_FALLBACK_QTY="0.001") as one:
        permitted(client, "a", "BTCUSDT")
        own_server.kill()
        own_server.start()
        permitted(client, "b", "ETHUSDT")
        assert events_of(client, "HISTORY_RESTORED") == []
        assert one.json("replay")["differences"] == []


def test_a_server_that_kept_nothing_gets_all_of_it_back(own_server: RedisServer, tmp_path: Path) -> None:
    with (
        own_server.client() as client,
        daemon(tmp_path, port=own_server.port, GOV_FALLBACK_QTY="0.001", GOV_PERMIT_TTL_SEC="3") as one,
    ):
        permitted(client, "a", "BTCUSDT")
        before = stored(client)
        own_server.kill()
        own_server.start()
        wait_for(lambda: events_of(client, "HISTORY_RESTORED"))
        assert stored(client)[: len(before)] == before
        assert blocked(client, "b", "SOLUSDT") == "history_hold"
        after_the_hold(client)
        assert one.json("replay")["differences"] == []


def other_history(client: redis.Redis) -> None:
    """The last events are other ones: a backup of another server, say."""
    entries = stored(client)
    kept = entries[:-3]
    head = kept[-1].head
    for _ in range(5):
        kept.append(encode(Recovered(), after=head, at=decode(entries[-1]).at))
        head = kept[-1].head
    fill(client, kept)


@pytest.mark.parametrize("running", [True, False], ids=["under a running daemon", "while it is away"])
def test_a_history_that_contradicts_the_journal_is_quarantined_until_a_person_accepts_it(
    one: Daemon, client: redis.Redis, *, running: bool
) -> None:
    if not running:
        one.kill()
    other_history(client)
    theirs = stored(client)
    if not running:
        one.start()
    assert blocked(client, "c", "ETHUSDT") == "quarantined"
    told = wait_for(lambda: (found := one.readiness())["problems"] and found)
    assert not told["ready"]
    assert "two histories" in told["problems"][0]
    assert stored(client) == theirs, "the stream is not ours to write"
    assert not client.exists("quantum:permit:c")
    assert one.command("rearm", "--accept-history").returncode == 2, "a reason is needed"
    done = one.command("rearm", "--accept-history", "--reason", "restored from the other host")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: one.readiness()["ready"], what="ready")
    (accepted,) = events_of(client, "HISTORY_ACCEPTED")
    assert (accepted["reason"], accepted["operator"]) == ("restored from the other host", "tester")
    after_the_hold(client)
    assert list(one.home.rglob("*until-*")), "the old journal was kept"
    one.kill()
    one.start()
    permitted(client, "after-the-restart", "XRPUSDT")
    assert one.json("replay")["chain"] == "ok"


@pytest.mark.parametrize("alive", [True, False], ids=["a daemon that wakes up later", "a daemon that starts later"])
def test_a_disarm_by_hand_begins_no_second_history_on_an_emptied_server(
    one: Daemon, client: redis.Redis, *, alive: bool
) -> None:
    assert one.process is not None
    before = stored(client)
    if alive:
        one.process.send_signal(signal.SIGSTOP)
    else:
        one.kill()
    client.flushall()
    refused = one.command("rearm", "--reason", "nothing there")
    assert refused.returncode == 1
    assert "lost its events, which the journal in" in refused.stderr
    done = one.command("disarm", "--reason", "bad fills", "--json")
    assert done.returncode == 4, done.stderr
    told = json.loads(done.stdout)
    assert told["done"], "file and service did not wait"
    assert "lost its events" in told["message"]
    assert not client.exists(STREAM)
    assert client.exists("quantum:governor:halt")
    if alive:
        one.process.send_signal(signal.SIGCONT)
    else:
        one.start()
    wait_for(lambda: events_of(client, "MANUAL_DISARM"), what="the disarm as events")
    assert stored(client)[: len(before)] == before, "the history goes on"
    assert [event["reason"] for event in events_of(client, "DISARM_STARTED")] == ["bad fills"], "told once"
    wait_for(lambda: not client.exists("quantum:governor:halt"), what="the brake to be taken off")
    assert one.command("rearm", "--reason", "all is well").returncode == 0
    after_the_hold(client)
    assert [event["reason"] for event in events_of(client, "DISARM_STARTED")] == ["bad fills"], "told once"


def test_what_others_wrote_is_taken_over_by_the_journal(one: Daemon, client: redis.Redis) -> None:
    one.command("disarm", "--reason", "drill")
    one.command("rearm", "--reason", "checked")
    one.kill()
    one.command("disarm", "--reason", "while it was away")
    one.command("rearm", "--reason", "checked")
    one.start()
    wait_for(lambda: len(events_of(client, "SETTINGS_LOADED")) == 2)
    before = stored(client)
    client.delete(STREAM)
    wait_for(lambda: events_of(client, "HISTORY_RESTORED"))
    assert stored(client)[: len(before)] == before


def test_two_daemons_on_one_host_take_a_journal_each_and_both_know_everything(
    one: Daemon, client: redis.Redis, tmp_path: Path
) -> None:
    second = Daemon(tmp_path / "second", port=int(one.environ["REDIS_PORT"]), environ={"GOV_FALLBACK_QTY": "0.001"})
    second.environ["HOME"] = one.environ["HOME"]
    second.environ["GOV_PERMIT_TTL_SEC"] = "3"
    second.start()
    try:
        permitted(client, "c", "ETHUSDT")
        (account,) = one.home.rglob("journal/*/quantum")
        assert sorted(path.name for path in account.iterdir() if path.name.isdigit()) == ["0", "1"]
        one.kill()
        before = stored(client)
        wait_for(lambda: journaled(second, one.home, before[-1].hash), what="the second one to know everything")
        client.flushall()
        wait_for(lambda: events_of(client, "HISTORY_RESTORED"))
        assert stored(client)[: len(before)] == before
    finally:
        second.kill()


def test_a_journal_that_cannot_be_written_means_no_permit_and_a_clear_state(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    place = tmp_path / "disk"
    place.write_text("not a directory")
    environ = {"GOV_FALLBACK_QTY": "0.001", "GOV_JOURNAL_DIR": str(place / "journal")}
    with daemon(tmp_path, port=flushed.port, environ=environ) as one:
        assert blocked(client, "a", "BTCUSDT") == "quarantined"
        told = one.readiness()
        assert not told["ready"]
        assert str(place) in told["problems"][0]
        (decision,) = events_of(client, "DECISION")
        assert (decision["reason"], decision["history"]) == ("quarantined", "quarantined")
        place.unlink()
        wait_for(lambda: one.readiness()["ready"], what="ready")
        permitted(client, "b", "BTCUSDT")
        assert one.json("replay")["differences"] == []


def test_a_journal_on_disk_before_every_permit(flushed: RedisServer, client: redis.Redis, tmp_path: Path) -> None:
    environ = {"GOV_FALLBACK_QTY": "0.001", "GOV_JOURNAL_FSYNC": "always"}
    with daemon(tmp_path, port=flushed.port, environ=environ) as one:
        permitted(client, "a", "BTCUSDT")
        journal = b"".join(path.read_bytes() for path in one.home.rglob("events-*.log"))
        assert b'"plan_id":"a"' in journal


class Pair:
    """Two journals beside one store, the first one's governor active, and a clock."""

    def __init__(self, home: Path) -> None:
        self.now_us = 0
        self.run_id = "run"
        self.store = MemoryStore(lambda: self.now_us // 1000)
        self.ledgers = [self.ledger(home / "one", active=True), self.ledger(home / "other", active=False)]

    def ledger(self, home: Path, *, active: bool) -> Ledger:
        async def identify() -> Server:
            return Server(self.run_id, "replid", "", "master", 0, "127.0.0.1:1")

        keeper = Keeper(
            lambda: Journal.open(home), identify, permit_ttl_us=1, clock=lambda: self.now_us, active=lambda: active
        )
        return Ledger(self.store, Keys(), lambda: self.now_us, keeper=keeper)

    async def write(self, which: int, text: str) -> None:
        """One of them commits an event; the other one does not look."""
        await self.ledgers[which].catch_up()
        await self.ledgers[which].propose(lambda *_: Proposal([ErrorRecorded(kind="plan_lost", detail=text)]))

    async def look(self, which: int, *, after_s: float) -> str | None:
        """One of them looks again; what it says, if it has to wait or stops."""
        self.now_us += int(after_s * 1e6)
        try:
            await self.ledgers[which].catch_up()
        except StoreError as error:
            keeper = self.ledgers[which].keeper
            assert keeper is not None
            keeper.doubt()
            return str(error)
        return None

    async def waits(self, which: int) -> float:
        """Seconds until one of them goes on."""
        keeper = self.ledgers[which].keeper
        assert keeper is not None
        keeper.doubt()
        waited = 0.0
        while await self.look(which, after_s=0 if waited == 0 else 0.5) is not None:
            waited += 0.5
            assert waited < 60
        return waited

    def told(self) -> list[str]:
        found = (decode(entry).event for entry in self.store.entries)
        return [event.detail if isinstance(event, ErrorRecorded) else event.NAME for event in found]


@pytest.fixture
async def pair(tmp_path: Path) -> Pair:
    """Both know one event, and one of them has written another, when the store loses everything."""
    pair = Pair(tmp_path)
    await pair.write(0, "first")
    await pair.look(1, after_s=0.1)
    await pair.write(0, "second")
    pair.store.entries.clear()
    return pair


async def test_what_was_lost_is_written_back_at_once_and_nothing_new_before_the_longest_journal_spoke(
    pair: Pair,
) -> None:
    assert "further than event 1" in str(await pair.look(1, after_s=0.1))
    assert pair.told() == ["first"]
    assert "further than event 2" in str(await pair.look(0, after_s=0.1))
    assert pair.told() == ["first", "second"]
    assert "further than event 2" in str(await pair.look(1, after_s=0.1))
    assert await pair.look(0, after_s=0.4) is None
    assert pair.told() == ["first", "second", "HISTORY_RESTORED"]
    assert await pair.look(1, after_s=0.1) is None, "others have settled it"
    assert pair.told() == ["first", "second", "HISTORY_RESTORED"]


async def test_who_may_not_know_the_end_waits_longer_and_goes_on_when_nobody_else_does(pair: Pair) -> None:
    assert await pair.waits(1) == 5.0
    assert pair.told() == ["first", "HISTORY_RESTORED"]
    assert "two histories" in str(await pair.look(0, after_s=0.1)), "a person decides"


async def test_nothing_is_appended_while_another_one_knows_more(pair: Pair) -> None:
    await pair.store.write([Write("set", Keys().restorer, (b"7 somebody",), 2000)])
    assert "the governor whose journal ends at event 7 writes them back" in str(await pair.look(0, after_s=0.6))
    assert pair.told() == ["first", "second"]
    assert await pair.look(0, after_s=1.5) is None, "a claim that nobody renews dies"


async def test_one_that_was_active_goes_on_at_once_after_a_restart_with_everything_there(pair: Pair) -> None:
    assert await pair.waits(0) == 0.5
    assert await pair.look(1, after_s=0.1) is None
    pair.run_id = "after the restart"
    assert await pair.waits(1) == 3.0, "somebody may know what it does not"
    pair.run_id = "after another one"
    assert await pair.waits(0) == 0.0


async def test_one_that_is_killed_before_it_told_tells_when_it_is_back(pair: Pair, tmp_path: Path) -> None:
    assert await pair.look(0, after_s=0.1) is not None
    keeper = pair.ledgers[0].keeper
    assert keeper is not None
    keeper.close()
    pair.ledgers[0] = pair.ledger(tmp_path / "one", active=False)
    assert await pair.waits(0) == 0.5, "it had written the last event"
    assert pair.told() == ["first", "second", "HISTORY_RESTORED"]


async def test_a_server_emptied_between_the_comparison_and_the_reading_begins_no_second_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tmp_path)
    await pair.write(0, "first")
    keeper = pair.ledgers[0].keeper
    assert keeper is not None
    keeper.close()
    restarted = pair.ledger(tmp_path / "one", active=True)
    keeper = restarted.keeper
    assert keeper is not None
    compare = keeper.reconcile

    async def and_then_it_is_emptied(ledger: Ledger) -> None:
        await compare(ledger)
        pair.store.entries.clear()

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "reconcile", and_then_it_is_emptied)
        with pytest.raises(StoreError, match="lost its end while it was read"):
            await restarted.open()
    pair.ledgers[0] = restarted
    assert await pair.waits(0) == 0.5
    assert pair.told() == ["first", "HISTORY_RESTORED"]


async def test_a_disk_that_fails_during_the_comparison_does_not_end_a_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def identify() -> Server:
        return Server("run", "replid", "", "master", 1, "127.0.0.1:1")

    def history(text: str) -> list[Entry]:
        return encode_all([ErrorRecorded(kind="plan_lost", detail=text)], after=GENESIS, at=1)

    now_us = 0
    keeper = Keeper(lambda: Journal.open(tmp_path), identify, permit_ttl_us=1, clock=lambda: now_us)
    ledger = Ledger(MemoryStore(), Keys("quantum"), lambda: now_us, keeper=keeper)
    await ledger.store.commit(Commit(expected=GENESIS, entries=history("theirs")))
    with Journal.open(tmp_path) as journal:
        journal.append(history("ours"))
    with pytest.raises(QuarantineError, match="two histories"):
        await keeper.reconcile(ledger)
    with monkeypatch.context() as patched:

        def fails(*_: object) -> None:
            raise DiskError("cannot be read: Input/output error")

        patched.setattr("governor.history.compare", fails)
        for _ in range(2):
            now_us += 2_000_000
            with pytest.raises(QuarantineError, match="two histories"):
                await ledger.catch_up()
    assert keeper.quarantine is not None
    assert keeper.verdict == "quarantined"


async def test_a_connection_that_leads_to_another_process_is_not_used_before_it_was_looked_at(
    own_server: RedisServer,
) -> None:
    door = Door()
    one = client_of(load({"REDIS_HOST": own_server.host, "REDIS_PORT": str(own_server.port)}), door=door)
    try:
        await door.look(one)
        await one.set("a", 1)
        own_server.restart()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                await one.set("a", 2)
        await door.look(one)
        assert await one.set("a", 3)
    finally:
        await one.aclose()


async def test_no_commit_goes_to_the_process_before_once_another_was_looked_at(new_server: NewServer) -> None:
    before, after = new_server(), new_server()
    door = Door()
    with Proxy(before.port) as proxy:
        settings = load({"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(proxy.port)})
        one = client_of(settings, door=door)
        store = store_on(one, settings)
        try:
            await door.look(one)
            happened = [ErrorRecorded(kind=kind, detail="") for kind in ("first", "second")]
            first, second = encode_all(happened, after=GENESIS, at=1)
            await store.commit(Commit(expected=GENESIS, entries=[first]))
            proxy.upstream = after.port
            await one.connection_pool.disconnect(inuse_connections=False)
            await door.look(one)
            with pytest.raises(StoreError):
                await store.commit(Commit(expected=first.head, entries=[second]))
        finally:
            await one.aclose()
    with before.client() as client:
        assert client.xlen(STREAM) == 1
