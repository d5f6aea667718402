import asyncio
import hashlib
import hmac
import itertools
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import fakeredis
import pytest
import redis.asyncio

from events import store
from events.chain import GENESIS
from events.codec import encode_all
from events.keys import Keys
from events.store import (
    Ack,
    Commit,
    ConflictError,
    EventStore,
    HaltedError,
    LateError,
    MemoryStore,
    RedisStore,
    RefusedError,
    Require,
    RequirementError,
    StoreError,
    UnavailableError,
    Write,
)
from events.types import AutoDisarm, Entry, ErrorRecorded, Event, Head
from tests.servers import KINDS, Kind, RedisServer

KEYS = Keys()
PLANS, RESULTS = KEYS.plans, KEYS.results
PERMIT, LIST = KEYS.permit("plan-1"), KEYS.executions("BTCUSDT")
AT = 1_763_870_400_123_456
GROUP = "governor"


def error(detail: str = "somebody's") -> Event:
    return ErrorRecorded(kind="plan_lost", detail=detail)


def one(after: Head = GENESIS, **parts: Any) -> Commit:
    """A commit of one event."""
    return of([error()], after, **parts)


def of(events: Iterable[Event], after: Head = GENESIS, **parts: Any) -> Commit:
    return Commit(expected=after, entries=encode_all(events, after=after, at=AT), **parts)


def end_of(commit: Commit) -> Head:
    return commit.entries[-1].head


async def grow(to: EventStore, count: int) -> Head:
    """Commit `count` events one after the other, whatever is there already."""
    after = await to.head()
    for number in range(count):
        commit = of([error(str(number))], after)
        await to.commit(commit)
        after = end_of(commit)
    return after


# ---------------------------------------------------------------- where the tests run


class InMemory:
    """The store without a server."""

    def __init__(self) -> None:
        self.memory = MemoryStore(lambda: 1_763_870_400_123)
        self.store: EventStore = self.memory
        self._delivered: dict[str, list[str]] = {}

    def another(self) -> EventStore:
        return self.store

    async def set(self, key: str, value: bytes) -> None:
        await self.store.write([Write("set", key, (value,))])

    async def value(self, key: str) -> list[bytes] | None:
        held = self.memory.get(key)
        return list(held) if held is not None else None

    async def expires_ms(self, key: str) -> int | None:
        return self.memory._keys[key][1]

    async def deliver(self, stream: str, count: int) -> list[str]:
        self._delivered[stream] = [f"{n}-0" for n in range(1, count + 1)]
        return self._delivered[stream]

    async def pending(self, stream: str) -> list[str]:
        done = {ack.entry_id for ack in self.memory.acknowledged if (ack.stream, ack.group) == (stream, GROUP)}
        return [entry_id for entry_id in self._delivered[stream] if entry_id not in done]

    async def raw(self) -> list[dict[bytes, bytes]]:
        return [
            {
                b"event": entry.name.encode(),
                b"seq": str(entry.seq).encode(),
                b"timestamp": entry.timestamp.encode(),
                b"data": entry.data,
                b"hash": entry.hash.encode(),
            }
            for entry in self.memory.entries
        ]

    async def dump(self) -> object:
        return list(self.memory.entries), set(self.memory.acknowledged), dict(self.memory._keys)


class OnServer:
    """The store on a server, real or not."""

    def __init__(self, client: Callable[[], redis.asyncio.Redis]) -> None:
        self._client = client
        self.redis: Any = client()
        self.store: EventStore = RedisStore(self.redis, stream=KEYS.events, halt=KEYS.halt)

    def another(self) -> EventStore:
        return RedisStore(self._client(), stream=KEYS.events, halt=KEYS.halt)

    async def set(self, key: str, value: bytes) -> None:
        await self.redis.set(key, value)

    async def value(self, key: str) -> list[bytes] | None:
        match await self.redis.type(key):
            case b"string":
                return [await self.redis.get(key)]
            case b"list":
                return list(await self.redis.lrange(key, 0, -1))
            case kind:
                assert kind == b"none"
                return None

    async def expires_ms(self, key: str) -> int | None:
        at = await self.redis.pexpiretime(key)
        return None if at == -1 else int(at)

    async def deliver(self, stream: str, count: int) -> list[str]:
        for number in range(1, count + 1):
            await self.redis.xadd(stream, {"n": number}, id=f"{number}-0")
        await self.redis.xgroup_create(stream, GROUP, id="0")
        ((_, entries),) = await self.redis.xreadgroup(GROUP, "one", {stream: ">"}, count=count)
        return [entry_id.decode() for entry_id, _ in entries]

    async def pending(self, stream: str) -> list[str]:
        rows = await self.redis.xpending_range(stream, GROUP, "-", "+", 100_000)
        return [row["message_id"].decode() for row in rows]

    async def raw(self) -> list[dict[bytes, bytes]]:
        return [fields for _, fields in await self.redis.xrange(KEYS.events)]

    async def dump(self) -> object:
        """Everything on the server: types, contents, ends of life, what is pending."""
        found = {}
        for key in sorted(await self.redis.keys("*")):
            kind = await self.redis.type(key)
            content: object
            match kind:
                case b"stream":
                    groups = await self.redis.xinfo_groups(key)
                    content = (
                        await self.redis.xrange(key),
                        [await self.redis.xpending_range(key, group["name"], "-", "+", 1000) for group in groups],
                    )
                    # How long ago something was delivered goes on by itself.
                    for rows in content[1]:
                        for row in rows:
                            del row["time_since_delivered"]
                case b"hash":
                    content = await self.redis.hgetall(key)
                case _:
                    content = await self.value(key.decode())
            found[key] = (kind, content, await self.redis.pexpiretime(key))
        return found


Place = InMemory | OnServer


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as closing:
        yield closing


def fake(stack: AsyncExitStack) -> OnServer:
    shared = fakeredis.FakeServer()

    def client() -> redis.asyncio.Redis:
        made: redis.asyncio.Redis = fakeredis.FakeAsyncRedis(server=shared, protocol=2)
        stack.push_async_callback(made.aclose)
        return made

    return OnServer(client)


def real_place(server: RedisServer, stack: AsyncExitStack) -> OnServer:
    return OnServer(lambda: connect(server.port, stack))


def connect(port: int, stack: AsyncExitStack, **options: Any) -> redis.asyncio.Redis:
    """A client as the program itself makes it."""
    made = store.client(host="127.0.0.1", port=port, **{"socket_timeout": 5} | options)
    stack.push_async_callback(made.aclose)
    return made


async def emptied(server: RedisServer, stack: AsyncExitStack) -> OnServer:
    place = real_place(server, stack)
    await place.redis.flushall()
    await place.redis.script_flush()
    return place


@pytest.fixture(params=["memory", "fakeredis", *KINDS])
async def place(
    request: pytest.FixtureRequest, running_server: Callable[[Kind], RedisServer], stack: AsyncExitStack
) -> Place:
    """Every store there is, empty."""
    match request.param:
        case "memory":
            return InMemory()
        case "fakeredis":
            return fake(stack)
        case kind:
            return await emptied(running_server(kind), stack)


@pytest.fixture(params=["fakeredis", *KINDS])
async def on_server(
    request: pytest.FixtureRequest, running_server: Callable[[Kind], RedisServer], stack: AsyncExitStack
) -> OnServer:
    """Every store on Redis keys, empty."""
    return fake(stack) if request.param == "fakeredis" else await emptied(running_server(request.param), stack)


@pytest.fixture
async def real(server: RedisServer, stack: AsyncExitStack) -> OnServer:
    """A store on the shared real server, empty."""
    return await emptied(server, stack)


@pytest.fixture
async def own(own_server: RedisServer, stack: AsyncExitStack) -> OnServer:
    """A store on a real server that only this test uses."""
    return real_place(own_server, stack)


def start_again(server: RedisServer) -> None:
    """Start a server that was killed, and return when it has read its data."""
    server.start()
    with server.client() as client:
        while client.info("persistence")["loading"]:
            pass


async def refused(place: Place, commit: Commit, kind: type[StoreError]) -> Any:
    """Check that a commit is refused and nothing at all is written; return the error."""
    before = await place.dump()
    with pytest.raises(kind) as caught:
        await place.store.commit(commit)
    assert type(caught.value) is kind
    assert await place.dump() == before
    return caught.value


def everything(after: Head, acks: Iterable[Ack] = ()) -> dict[str, Any]:
    """Parts of a commit that would change every kind of key."""
    return {
        "writes": [
            Write("set", PERMIT, (b"granted",), 60_000),
            Write("list", LIST, (b"2", b"1"), 86_400_000),
            Write("del", "kept"),
        ],
        "acks": list(acks),
        "after": after,
    }


# ---------------------------------------------------------------- appending


async def test_an_empty_stream_ends_at_event_0(place: Place) -> None:
    assert await place.store.head() == GENESIS == Head(0, "0" * 64)
    assert await place.store.read(0) == []


async def test_a_commit_appends_its_events_and_moves_the_head(place: Place) -> None:
    first = of([error("a"), error("b")])
    await place.store.commit(first)
    assert await place.store.head() == end_of(first)
    second = of([error("ü\x00\n")], end_of(first))
    await place.store.commit(second)
    assert await place.store.read(0) == [*first.entries, *second.entries]
    assert [entry.seq for entry in await place.store.read(0)] == [1, 2, 3]


async def test_a_commit_of_a_thousand_events_is_one_step(place: Place) -> None:
    commit = of(error(str(number)) for number in range(1000))
    await place.store.commit(commit)
    assert await place.store.read(0) == commit.entries


@pytest.mark.parametrize("key", [None, b"a key"])
async def test_hash_covers_the_previous_hash_and_the_stored_bytes(place: Place, key: bytes | None) -> None:
    after = GENESIS
    for batch in ([error("a"), error("ü")], [error("c")]):
        entries = encode_all(batch, after=after, at=AT, key=key)
        await place.store.commit(Commit(expected=after, entries=entries))
        after = entries[-1].head
    previous = b"0" * 64
    for seq, fields in enumerate(await place.raw(), start=1):
        covered = b"\n".join((previous, fields[b"event"], b"%d" % seq, fields[b"timestamp"], fields[b"data"]))
        made = hmac.new(key, covered, "sha256") if key else hashlib.sha256(covered)
        assert fields[b"hash"] == made.hexdigest().encode()
        previous = fields[b"hash"]
    assert previous.decode() == (await place.store.head()).hash


async def test_entry_ids_are_the_numbers_of_the_events(on_server: OnServer) -> None:
    await grow(on_server.store, 3)
    assert [entry_id for entry_id, _ in await on_server.redis.xrange(KEYS.events)] == [b"1-0", b"2-0", b"3-0"]


async def test_an_entry_has_the_five_fields_and_no_other(on_server: OnServer) -> None:
    commit = one()
    await on_server.store.commit(commit)
    (entry,) = commit.entries
    assert await on_server.raw() == [
        {
            b"event": b"ERROR_RECORDED",
            b"seq": b"1",
            b"timestamp": b"1763870400.123456",
            b"data": entry.data,
            b"hash": entry.hash.encode(),
        }
    ]


async def test_auto_disarm_carries_reason_context_and_action_as_plain_fields_too(on_server: OnServer) -> None:
    context: dict[str, str | int] = {"symbol": "BTCUSDT", "exec_5min": 3, "limit": 2}
    event = AutoDisarm(
        reason="burst_limit_breach", context=context, action_taken="APPLY_MODE=dry_run + restart", epoch=2
    )
    commit = of([error(), event])
    await on_server.store.commit(commit)
    plain, disarm = await on_server.raw()
    assert len(plain) == 5
    assert {name: disarm[name] for name in (b"reason", b"context", b"action_taken")} == {
        b"reason": b"burst_limit_breach",
        b"context": b'{"symbol":"BTCUSDT","exec_5min":3,"limit":2}',
        b"action_taken": b"APPLY_MODE=dry_run + restart",
    }
    assert len(disarm) == 8
    assert await on_server.store.read(0) == commit.entries


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("expected", ["before", "beyond", "another", "empty"])
async def test_a_commit_at_another_head_is_refused_and_told_both(place: Place, expected: str) -> None:
    await place.set("kept", b"1")
    ids = await place.deliver(PLANS, 1)
    actual = await grow(place.store, 2)
    head = {
        "before": Head(1, (await place.store.read(0))[0].hash),
        "beyond": Head(3, actual.hash),
        "another": Head(2, "f" * 64),
        "empty": GENESIS,
    }[expected]
    conflict = await refused(place, one(**everything(head, [Ack(PLANS, GROUP, ids[0])])), ConflictError)
    assert (conflict.expected, conflict.actual) == (head, actual)


async def test_a_commit_that_expects_a_stream_where_there_is_none_is_told_the_beginning(place: Place) -> None:
    conflict = await refused(place, one(**everything(Head(7, "a" * 64))), ConflictError)
    assert conflict.actual == GENESIS


@pytest.mark.parametrize(("present", "there"), [(True, False), (False, True)])
async def test_an_unmet_requirement_refuses_the_commit_and_tells_which(
    place: Place,
    present: bool,  # noqa: FBT001
    there: bool,  # noqa: FBT001
) -> None:
    await place.set("kept", b"1")
    head = await grow(place.store, 1)
    if there:
        await place.set("asked", b"")
    requires = [Require("kept", present=True), Require("gone", present=False), Require("asked", present)]
    unmet = await refused(place, one(requires=requires, **everything(head)), RequirementError)
    assert (unmet.index, unmet.key) == (2, "asked")


async def test_met_requirements_let_the_commit_happen(place: Place) -> None:
    await place.set(PERMIT, b"granted")
    requires = [Require(PERMIT, present=True), Require("gone", present=False)]
    await place.store.commit(one(requires=requires, writes=[Write("del", PERMIT)]))
    assert await place.value(PERMIT) is None
    assert (await place.store.head()).seq == 1


async def test_the_emergency_brake_refuses_what_grants(place: Place) -> None:
    await place.set(KEYS.halt, b"news \xff")
    halted = await refused(place, one(grants=True, **everything(GENESIS)), HaltedError)
    assert halted.value == "news \ufffd"


async def test_the_emergency_brake_refuses_nothing_else(place: Place) -> None:
    await place.set(KEYS.halt, b"news")
    await place.store.commit(one(**everything(GENESIS)))
    assert (await place.store.head()).seq == 1


async def test_without_the_emergency_brake_a_permit_is_granted(place: Place) -> None:
    await place.store.commit(one(grants=True, **everything(GENESIS)))
    assert await place.value(PERMIT) == [b"granted"]


async def test_a_grant_that_comes_too_late_writes_nothing(place: Place) -> None:
    late = await refused(place, one(grants=True, not_after_us=1, **everything(GENESIS)), LateError)
    assert "too late" in str(late)
    await place.store.commit(one(not_after_us=1, **everything(GENESIS)))  # it grants nothing, so it may


async def test_a_commit_tells_which_keys_it_was_to_delete_were_gone(place: Place) -> None:
    await place.store.write([Write("set", "there", (b"1",))])
    deletes = [Write("del", "gone"), Write("set", "new", (b"1",)), Write("del", "there"), Write("list", "empty")]
    assert await place.store.commit(one(writes=deletes)) == {"gone"}
    assert [await place.store.exists(key) for key in ("gone", "there", "new")] == [False, False, True]


@pytest.mark.parametrize("parts", [{"requires": [Require("a", present=True)]}, {"grants": True}])
async def test_a_commit_without_events_cannot_require_or_grant(place: Place, parts: dict[str, Any]) -> None:
    before = await place.dump()
    with pytest.raises(ValueError, match="nothing to protect"):
        await place.store.commit(Commit(GENESIS, [], **parts))
    assert await place.dump() == before


async def test_a_brake_of_another_type_is_a_brake(on_server: OnServer) -> None:
    await on_server.redis.hset(KEYS.halt, "a", "b")
    halted = await refused(on_server, one(grants=True, **everything(GENESIS)), HaltedError)
    assert halted.value == ""


async def test_an_event_stream_of_another_type_is_refused(on_server: OnServer) -> None:
    await on_server.redis.set(KEYS.events, "no stream")
    await refused(on_server, one(**everything(GENESIS)), RefusedError)
    for ask in (on_server.store.head(), on_server.store.read(0)):
        with pytest.raises(RefusedError):
            await ask


async def test_following_a_key_that_is_no_stream_is_refused(real: OnServer) -> None:
    await real.redis.set(KEYS.events, "no stream")
    with pytest.raises(RefusedError):
        await real.store.follow(0, timeout_s=1)


async def test_a_stream_to_acknowledge_on_of_another_type_refuses_the_commit(on_server: OnServer) -> None:
    await on_server.redis.set(RESULTS, "no stream")
    ids = await on_server.deliver(PLANS, 1)
    acks = [Ack(PLANS, GROUP, ids[0]), Ack(RESULTS, GROUP, "1-0")]
    refusal = await refused(on_server, one(**everything(GENESIS, acks)), RefusedError)
    assert RESULTS in str(refusal)


@pytest.mark.parametrize(
    "fields", [{"note": "x"}, {"event": "X", "seq": "x", "hash": "y"}, {"seq": "1", "hash": b"\xff"}]
)
async def test_a_foreign_entry_at_the_end_of_the_stream_is_told_and_nothing_is_written(
    on_server: OnServer, fields: dict[Any, Any]
) -> None:
    head = await grow(on_server.store, 1)
    await on_server.redis.xadd(KEYS.events, fields)
    before = await on_server.dump()
    with pytest.raises(StoreError):
        await on_server.store.commit(one(**everything(head)))
    assert await on_server.dump() == before
    for ask in (on_server.store.head(), on_server.store.read(0)):
        with pytest.raises(StoreError, match="is no event"):
            await ask


async def test_nothing_is_written_where_the_tail_was_deleted_by_hand(on_server: OnServer) -> None:
    await grow(on_server.store, 2)
    await on_server.redis.xdel(KEYS.events, "2-0")
    before = await on_server.dump()
    with pytest.raises(StoreError):
        await on_server.store.commit(one(**everything(await on_server.store.head())))
    assert await on_server.dump() == before


async def test_a_stream_that_was_emptied_is_a_conflict(on_server: OnServer) -> None:
    head = await grow(on_server.store, 2)
    await on_server.redis.delete(KEYS.events)
    conflict = await refused(on_server, one(**everything(head)), ConflictError)
    assert conflict.actual == GENESIS


# ---------------------------------------------------------------- keys and acknowledgements


async def test_a_commit_sets_replaces_and_deletes_keys(place: Place) -> None:
    await place.set(PERMIT, b"old")
    await place.set("gone", b"old")
    await place.store.write([Write("list", LIST, (b"9", b"8", b"7"))])
    await place.store.commit(
        one(
            writes=[
                Write("set", PERMIT, (b"new\x00\xff",), 60_000),
                Write("list", LIST, (b"3", b"2"), 86_400_000),
                Write("del", "gone"),
                Write("del", "never there"),
                Write("set", "for ever", (b"",)),
                Write("list", "list for ever", (b"1",)),
            ]
        )
    )
    assert await place.value(PERMIT) == [b"new\x00\xff"]
    assert await place.value(LIST) == [b"3", b"2"]
    assert await place.value("gone") is None
    assert await place.value("for ever") == [b""]
    assert await place.expires_ms("for ever") is None
    assert await place.expires_ms("list for ever") is None


async def test_a_list_without_values_is_no_key(place: Place) -> None:
    await place.store.write([Write("list", LIST, (b"9",))])
    await place.store.commit(one(writes=[Write("list", LIST, (), 1000)]))
    assert await place.value(LIST) is None


async def test_later_writes_of_a_commit_win(place: Place) -> None:
    writes = [Write("set", "a", (b"1",), 1000), Write("del", "a"), Write("set", "a", (b"2",))]
    await place.store.commit(one(writes=writes))
    assert (await place.value("a"), await place.expires_ms("a")) == ([b"2"], None)


@pytest.mark.parametrize("by", ["commit", "write"])
async def test_a_key_lives_exactly_as_long_as_asked(place: Place, by: str) -> None:
    writes = [Write("set", PERMIT, (b"granted",), 59_999), Write("list", LIST, (b"1",), 86_400_001)]
    earliest = await place.store.clock() // 1000
    await (place.store.commit(one(writes=writes)) if by == "commit" else place.store.write(writes))
    latest = await place.store.clock() // 1000 + 1
    for key, ttl in ((PERMIT, 59_999), (LIST, 86_400_001)):
        expires = await place.expires_ms(key)
        assert expires is not None
        assert earliest - 1 <= expires - ttl <= latest


async def test_a_public_key_of_another_type_is_simply_replaced(on_server: OnServer) -> None:
    for key in ("set", "list", "del"):
        await on_server.redis.hset(key, "a", "b")
    await on_server.redis.set("list too", "text")
    await on_server.store.commit(
        one(
            writes=[
                Write("set", "set", (b"1",), 1000),
                Write("list", "list", (b"1",)),
                Write("del", "del"),
                Write("list", "list too", (b"2", b"1")),
            ]
        )
    )
    found = [await on_server.value(key) for key in ("set", "list", "del", "list too")]
    assert found == [[b"1"], [b"1"], None, [b"2", b"1"]]


async def test_a_commit_acknowledges_entries_of_several_streams(place: Place) -> None:
    plans, results = await place.deliver(PLANS, 4), await place.deliver(RESULTS, 2)
    acks = [Ack(PLANS, GROUP, plans[2]), Ack(RESULTS, GROUP, results[0]), Ack(PLANS, GROUP, plans[0])]
    await place.store.commit(one(acks=acks))
    assert await place.pending(PLANS) == [plans[1], plans[3]]
    assert await place.pending(RESULTS) == [results[1]]


async def test_a_commit_may_only_acknowledge(place: Place) -> None:
    (entry_id,) = await place.deliver(PLANS, 1)
    head = await grow(place.store, 1)
    await place.store.commit(Commit(head, [], acks=[Ack(PLANS, GROUP, entry_id)]))
    assert await place.pending(PLANS) == []
    assert await place.store.head() == head


async def test_a_commit_that_only_acknowledges_needs_the_head_too(place: Place) -> None:
    (entry_id,) = await place.deliver(PLANS, 1)
    await grow(place.store, 1)
    await refused(place, Commit(GENESIS, [], acks=[Ack(PLANS, GROUP, entry_id)]), ConflictError)
    assert await place.pending(PLANS) == [entry_id]


async def test_acknowledging_what_is_no_longer_there_is_fine(on_server: OnServer) -> None:
    await on_server.redis.xadd(PLANS, {"a": "b"})
    acks = [Ack(PLANS, "no such group", "1-0"), Ack("no such stream", GROUP, "1-0")]
    await on_server.store.commit(one(acks=acks))
    assert (await on_server.store.head()).seq == 1


async def test_thousands_of_values_and_acknowledgements_are_one_step(on_server: OnServer) -> None:
    values = tuple(b"%d" % number for number in range(9001))
    await on_server.deliver(PLANS, 1)
    acks = [Ack(PLANS, GROUP, f"{number}-0") for number in range(1, 9002)]
    await on_server.store.commit(one(writes=[Write("list", LIST, values, 60_000)], acks=acks))
    assert await on_server.value(LIST) == list(values)
    assert await on_server.expires_ms(LIST) is not None
    assert await on_server.pending(PLANS) == []


# ---------------------------------------------------------------- reading


async def test_reading_goes_on_page_by_page(place: Place) -> None:
    await grow(place.store, 7)
    pages = [await place.store.read(after, limit=3) for after in (0, 3, 6, 7, 99)]
    assert [[entry.seq for entry in page] for page in pages] == [[1, 2, 3], [4, 5, 6], [7], [], []]


async def test_following_gives_what_is_there_at_once(place: Place) -> None:
    await grow(place.store, 3)
    async with asyncio.timeout(5):
        assert [entry.seq for entry in await place.store.follow(1, timeout_s=60)] == [2, 3]


async def test_following_waits_for_the_next_event(place: Place) -> None:
    head = await grow(place.store, 1)
    async with asyncio.timeout(5):
        follower = asyncio.create_task(place.another().follow(1, timeout_s=4))
        await asyncio.sleep(0)
        await place.store.commit(one(head))
        assert [entry.seq for entry in await follower] == [2]


async def test_following_ends_without_events_when_none_come(place: Place) -> None:
    await grow(place.store, 1)
    assert await place.store.follow(1, timeout_s=0.02) == []
    assert await place.store.follow(1, timeout_s=0) == []


async def test_following_is_not_woken_by_an_acknowledgement(place: Place) -> None:
    (entry_id,) = await place.deliver(PLANS, 1)
    follower = asyncio.create_task(place.another().follow(0, timeout_s=4))
    await asyncio.sleep(0)
    await place.store.commit(Commit(GENESIS, [], acks=[Ack(PLANS, GROUP, entry_id)]))
    await place.store.commit(one())
    assert [entry.seq for entry in await follower] == [1]


async def test_two_can_follow_one_stream(place: Place) -> None:
    first, second = place.another(), place.another()
    followers = [asyncio.create_task(each.follow(0, timeout_s=4)) for each in (first, second)]
    await asyncio.sleep(0)
    await place.store.commit(one())
    assert [len(found) for found in await asyncio.gather(*followers)] == [1, 1]


async def test_values_are_none_where_there_is_no_key(place: Place) -> None:
    await place.set("a", b"1")
    await place.set("empty", b"")
    assert await place.store.values("a", "b", "empty", "a") == [b"1", None, b"", b"1"]
    assert await place.store.values() == []


async def test_writing_needs_no_event_and_no_head(place: Place) -> None:
    await grow(place.store, 1)
    await place.set("gone", b"1")
    await place.store.write(
        [
            Write("set", "a", (b"1",)),
            Write("list", LIST, (b"2", b"1")),
            Write("del", "gone"),
            Write("list", "none", ()),
        ]
    )
    assert [await place.value(key) for key in ("a", LIST, "gone", "none")] == [[b"1"], [b"2", b"1"], None, None]
    assert (await place.store.head()).seq == 1


async def test_the_clock_is_the_servers_in_microseconds(on_server: OnServer) -> None:
    seconds, micros = await on_server.redis.time()
    assert 0 <= await on_server.store.clock() - (seconds * 1_000_000 + micros) < 60_000_000


def test_keys_in_memory_end_with_the_clock_they_were_given() -> None:
    now = 1_000
    memory = MemoryStore(lambda: now)
    asyncio.run(memory.write([Write("set", "a", (b"1",), 500)]))
    assert asyncio.run(memory.clock()) == 1_000_000
    now = 1_499
    assert memory.get("a") == (b"1",)
    now = 1_500
    assert memory.get("a") is None
    assert not memory.take("a")


def test_taking_a_key_in_memory_works_once() -> None:
    memory = MemoryStore()
    asyncio.run(memory.write([Write("set", "a", (b"1",))]))
    assert [memory.take("a"), memory.take("a")] == [True, False]


# ---------------------------------------------------------------- several committers


async def test_of_many_commits_at_one_head_exactly_one_wins(place: Place) -> None:
    stores = [place.another() for _ in range(4)]
    head = GENESIS
    for _ in range(3):
        commits = [of([error(str(number))], head) for number in range(50)]
        done = await asyncio.gather(
            *(each.commit(commit) for each, commit in zip(itertools.cycle(stores), commits, strict=False)),
            return_exceptions=True,
        )
        (winner,) = [
            commit for commit, outcome in zip(commits, done, strict=True) if not isinstance(outcome, Exception)
        ]
        conflicts = [outcome for outcome in done if isinstance(outcome, ConflictError)]
        assert len(conflicts) == 49
        assert {(conflict.expected, conflict.actual) for conflict in conflicts} == {(head, end_of(winner))}
        head = end_of(winner)
    assert await place.store.head() == head


async def test_fifty_committers_that_try_again_make_one_history_without_a_gap(place: Place) -> None:
    stores = [place.another() for _ in range(4)]

    async def insist(to: EventStore, detail: str) -> None:
        head = await to.head()
        while True:
            try:
                await to.commit(of([error(detail), error(detail)], head))
                return
            except ConflictError as conflict:
                head = conflict.actual

    async with asyncio.timeout(20):
        await asyncio.gather(
            *(insist(each, str(n)) for each, n in zip(itertools.cycle(stores), range(50), strict=False))
        )
    entries = await place.store.read(0)
    assert [entry.seq for entry in entries] == list(range(1, 101))
    assert entries[0::2] != entries[1::2]
    # Both events of a commit stand side by side, and every commit is there once.
    details = [entry.data for entry in entries]
    assert details[0::2] == details[1::2]
    assert len(set(details)) == 50


async def test_a_server_that_forgot_the_script_is_given_it_again(on_server: OnServer) -> None:
    head = GENESIS
    for _ in range(3):
        commit = one(head)
        await on_server.store.commit(commit)
        head = end_of(commit)
        await on_server.redis.script_flush()
    assert await on_server.store.head() == head


# ---------------------------------------------------------------- servers that cannot write


async def test_a_server_out_of_memory_refuses_and_writes_nothing(own: OnServer) -> None:
    ids = await own.deliver(PLANS, 1)
    head = await grow(own.store, 1)
    await own.redis.config_set("maxmemory", 1)
    await refused(own, one(**everything(head, [Ack(PLANS, GROUP, ids[0])])), RefusedError)
    await own.redis.config_set("maxmemory", 0)
    await own.store.commit(one(head))


async def test_a_replica_refuses_and_writes_nothing(own: OnServer) -> None:
    ids = await own.deliver(PLANS, 1)
    head = await grow(own.store, 1)
    await own.redis.replicaof("127.0.0.1", 1)
    await refused(own, one(**everything(head, [Ack(PLANS, GROUP, ids[0])])), RefusedError)
    await own.redis.replicaof("NO", "ONE")
    await own.store.commit(one(head))


async def test_a_server_that_misses_its_replicas_refuses_and_writes_nothing(own: OnServer) -> None:
    head = await grow(own.store, 1)
    await own.redis.config_set("min-replicas-to-write", 1)
    await refused(own, one(**everything(head)), RefusedError)


async def test_a_user_without_the_right_is_refused_and_nothing_is_written(
    own: OnServer, own_server: RedisServer, stack: AsyncExitStack
) -> None:
    head = await grow(own.store, 1)
    await own.redis.execute_command("ACL", "SETUSER", "reader", "on", ">word", "~*", "+@read", "+script|load")
    before = await own.dump()
    client = connect(own_server.port, stack, username="reader", password="word")
    reader = RedisStore(client, stream=KEYS.events, halt=KEYS.halt)
    assert await reader.head() == head
    with pytest.raises(RefusedError):
        await reader.commit(one(**everything(head)))
    assert await own.dump() == before


async def test_a_server_that_is_gone_is_unavailable(own: OnServer, own_server: RedisServer) -> None:
    await grow(own.store, 1)
    own_server.kill()
    asks: list[Callable[[], Awaitable[object]]] = [
        lambda: own.store.commit(one()),
        own.store.head,
        lambda: own.store.read(0),
        lambda: own.store.follow(0, timeout_s=1),
        lambda: own.store.values("a"),
        lambda: own.store.write([Write("del", "a")]),
        own.store.clock,
    ]
    for ask in [*asks, *asks]:  # first on the connection that broke, then on a new one
        with pytest.raises(UnavailableError):
            await ask()


async def test_a_server_that_dies_while_it_is_followed_is_unavailable(own: OnServer, own_server: RedisServer) -> None:
    follower = asyncio.create_task(own.another().follow(0, timeout_s=4))
    async with asyncio.timeout(5):
        while (await own.redis.info("clients"))["blocked_clients"] == 0:
            pass
        own_server.kill()
        with pytest.raises(UnavailableError):
            await follower


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_committed_is_there_after_a_crash_and_a_restart(
    kind: Kind, new_server: Callable[..., RedisServer], stack: AsyncExitStack
) -> None:
    server = new_server(kind, appendonly=True, appendfsync="always")
    place = real_place(server, stack)
    ids = await place.deliver(PLANS, 2)
    commit = one(**everything(GENESIS, [Ack(PLANS, GROUP, ids[0])]))
    await place.store.commit(commit)
    before = await place.dump()
    server.kill()
    with pytest.raises(UnavailableError):
        await place.store.head()
    start_again(server)
    assert await place.dump() == before
    # The script is known again without a word, though the restart forgot it.
    await place.store.commit(one(end_of(commit)))


# ---------------------------------------------------------------- connections that break


Cut = Literal["before", "half", "after", "silence", "late"]
"""Where to cut: before the request is passed on, in the middle of it, after the server's answer; never answer at
all; or cut at once and pass the request on later."""


class Proxy:
    """Passes bytes to a server and back, and breaks at the next request that contains `word`."""

    def __init__(self, port: int, word: bytes) -> None:
        self._upstream = port
        self._word = word
        self._tasks: set[asyncio.Task[None]] = set()
        self.cut: Cut | None = None
        self.late: Callable[[], Awaitable[None]] | None = None
        """Passes a request that was held back on and returns when the server has answered it."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", self._upstream)
        line = _Line(writer, *there)
        back = asyncio.create_task(line.answers())
        try:
            while data := await reader.read(1 << 20):
                if self.cut is None or self._word not in data:
                    line.upstream.write(data)
                    continue
                cut, self.cut = self.cut, None
                line.muted = True
                if cut == "late":
                    self.late = lambda: line.ask(data)
                    writer.close()
                    await asyncio.Future()  # the way to the server stays open until the test ends
                if cut == "half":
                    line.upstream.write(data[: len(data) // 2])
                    await line.upstream.drain()
                elif cut in ("after", "silence"):
                    await line.ask(data)
                if cut == "silence":
                    continue
                break
        except ConnectionError:
            pass
        finally:
            back.cancel()
            writer.close()
            line.upstream.close()


@dataclass
class _Line:
    """One connection through the proxy."""

    client: asyncio.StreamWriter
    answered: asyncio.StreamReader
    upstream: asyncio.StreamWriter
    muted: bool = False

    def __post_init__(self) -> None:
        self._answer = asyncio.Event()

    async def ask(self, data: bytes) -> None:
        self.upstream.write(data)
        await self._answer.wait()

    async def answers(self) -> None:
        while data := await self.answered.read(1 << 20):
            if self.muted:
                self._answer.set()
            else:
                self.client.write(data)


@dataclass
class Broken:
    """A store behind a proxy, beside one that reaches the server directly."""

    proxy: Proxy
    store: EventStore
    direct: OnServer

    async def sent(self) -> int:
        """How often the server ran the commit script."""
        stats = await self.direct.redis.info("commandstats")
        return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])

    async def lose(self, commit: Commit, cut: Cut) -> None:
        await self.direct.redis.config_resetstat()
        self.proxy.cut = cut
        with pytest.raises(UnavailableError):
            await self.store.commit(commit)


@pytest.fixture
async def broken(real: OnServer, server: RedisServer, stack: AsyncExitStack) -> Broken:
    proxy = await stack.enter_async_context(Proxy(server.port, b"EVALSHA\r\n"))
    client = connect(proxy.port, stack, socket_timeout=1)
    behind = Broken(proxy, RedisStore(client, stream=KEYS.events, halt=KEYS.halt), real)
    await behind.store.commit(one())  # the script is known and the connection is open
    return behind


@pytest.mark.parametrize(("cut", "written"), [("before", 0), ("half", 0), ("after", 1), ("silence", 1)])
async def test_a_lost_connection_is_unavailable_and_the_commit_is_there_at_most_once(
    broken: Broken, cut: Cut, written: int
) -> None:
    head = await broken.direct.store.head()
    commit = one(head, grants=True, writes=[Write("set", PERMIT, (b"granted",), 60_000)])
    await broken.lose(commit, cut)
    assert await broken.sent() == written
    assert [entry.hash for entry in await broken.store.read(1)] == [commit.entries[0].hash] * written
    assert await broken.direct.value(PERMIT) == ([b"granted"] if written else None)


@pytest.mark.parametrize("cut", ["before", "after"])
async def test_proposing_a_lost_commit_again_never_writes_it_twice(broken: Broken, cut: Cut) -> None:
    commit = one(await broken.direct.store.head())
    await broken.lose(commit, cut)
    if cut == "after":
        with pytest.raises(ConflictError) as conflict:
            await broken.store.commit(commit)
        assert conflict.value.actual == end_of(commit)
    else:
        await broken.store.commit(commit)
    assert [entry.seq for entry in await broken.store.read(0)] == [1, 2]


async def test_a_late_copy_of_a_lost_commit_changes_nothing(broken: Broken) -> None:
    await broken.lose(of([error("lost")], await broken.direct.store.head()), "late")
    await broken.store.commit(of([error("second try")], await broken.store.head()))
    before = await broken.direct.dump()
    assert broken.proxy.late is not None
    await broken.proxy.late()
    assert await broken.sent() == 2
    assert await broken.direct.dump() == before


async def test_the_client_never_repeats_a_command_by_itself(broken: Broken) -> None:
    commit: Commit = one(await broken.direct.store.head())
    await broken.lose(commit, "after")
    await broken.lose(commit, "after")
    assert await broken.sent() == 1


# ---------------------------------------------------------------- refusals, as a server words them


class Scripted:
    """A server that answers every commit script with one line."""

    def __init__(self, line: bytes) -> None:
        self._line = line

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            for _ in range(int(line[1:])):
                size = int((await reader.readline())[1:])
                word = (await reader.readexactly(size + 2))[:-2]
                line = b"EVALSHA" if word == b"EVALSHA" else line
                if word == b"LOAD":
                    line = b"LOAD"
            answers = {b"EVALSHA": self._line + b"\r\n", b"LOAD": b"$40\r\n" + b"a" * 40 + b"\r\n"}
            writer.write(answers.get(line, b"+OK\r\n"))
        writer.close()


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"-OOM command not allowed when used memory > 'maxmemory'.", RefusedError),
        (b"-READONLY You can't write against a read only replica.", RefusedError),
        (b"-NOREPLICAS Not enough good replicas to write.", RefusedError),
        (b"-MISCONF Errors writing to the AOF file: No space left on device", RefusedError),
        (b"-NOPERM User governor has no permissions to run the 'evalsha' command", RefusedError),
        (b"-ERR ACL failure in script: User governor has no permissions to run the 'xadd' command", RefusedError),
        (b"-WRONGTYPE Operation against a key holding the wrong kind of value", RefusedError),
        (b"-CLUSTERDOWN The cluster is down", RefusedError),
        (b"-CROSSSLOT Keys in request don't hash to the same slot", RefusedError),
        (b"-LOADING Redis is loading the dataset in memory", UnavailableError),
        (b"-BUSY Redis is busy running a script.", UnavailableError),
        (b"-NOAUTH Authentication required.", UnavailableError),
        (b"-NOSCRIPT No matching script.", UnavailableError),
        (b"-ERR something new", UnavailableError),
        (b"garbage", UnavailableError),
    ],
    ids=lambda value: value.decode().split(" ")[0] if isinstance(value, bytes) else None,
)
async def test_only_an_error_that_says_so_is_a_refusal(
    line: bytes, kind: type[StoreError], stack: AsyncExitStack
) -> None:
    scripted = await stack.enter_async_context(Scripted(line))
    async with connect(scripted.port, stack) as client:
        with pytest.raises(kind) as caught:
            await RedisStore(client, stream=KEYS.events, halt=KEYS.halt).commit(one())
    assert type(caught.value) is kind


# ---------------------------------------------------------------- entries


FIELDS = {b"event": b"RECOVERED", b"seq": b"7", b"timestamp": b"1.000000", b"data": b"{}", b"hash": b"ff"}


def test_an_entry_is_read_from_its_fields_whatever_else_they_hold() -> None:
    assert store.entry_of(FIELDS | {b"more": b"x"}) == Entry("RECOVERED", 7, "1.000000", b"{}", "ff")


@pytest.mark.parametrize("missing", FIELDS)
def test_an_entry_without_one_of_its_fields_is_refused(missing: bytes) -> None:
    with pytest.raises(KeyError):
        store.entry_of({name: value for name, value in FIELDS.items() if name != missing})


@pytest.mark.parametrize("wrong", [{b"seq": b"x"}, {b"seq": b""}, {b"hash": b"\xff"}, {b"event": b"\xff"}])
def test_an_entry_with_an_unreadable_field_is_refused(wrong: dict[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match=r"invalid|decode"):
        store.entry_of(FIELDS | wrong)


# ---------------------------------------------------------------- the client


async def blocked(server: RedisServer) -> None:
    """Return once some client waits in a blocking command."""
    with server.client() as client:
        while not client.info("clients")["blocked_clients"]:
            await asyncio.sleep(0)


async def test_a_command_that_was_cancelled_leaves_no_answer_for_the_next_one(server: RedisServer) -> None:
    async with store.client(host=server.host, port=server.port, socket_timeout=5) as client:
        waiting = asyncio.ensure_future(client.execute_command("BLPOP", "nothing", 5))
        await blocked(server)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with server.client() as other:
            other.rpush("nothing", "late")
        assert await client.execute_command("ECHO", "mine") == b"mine"


async def test_a_command_without_an_answer_in_time_leaves_none_for_the_next_one(server: RedisServer) -> None:
    async with store.client(host=server.host, port=server.port, socket_timeout=0.05) as client:
        with pytest.raises(redis.exceptions.TimeoutError):
            await client.execute_command("BLPOP", "never", 5)
        assert await client.execute_command("ECHO", "mine") == b"mine"


async def test_an_error_the_server_answers_with_keeps_the_connection(server: RedisServer) -> None:
    async with store.client(host=server.host, port=server.port, socket_timeout=5) as client:
        number = await client.execute_command("CLIENT ID")
        with pytest.raises(redis.exceptions.ResponseError, match="unknown command"):
            await client.execute_command("NONSENSE", 1, 2.5, b"three", "four")
        assert await client.execute_command("CLIENT ID") == number


async def test_what_a_server_does_not_take_is_given_up_in_time(own_server: RedisServer) -> None:
    async with store.client(host=own_server.host, port=own_server.port, socket_timeout=0.2) as client:
        await client.execute_command("PING")
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(redis.exceptions.TimeoutError, match="nothing was taken within"):
                await client.execute_command("SET", "large", b"x" * 50_000_000)
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        assert await client.execute_command("ECHO", "mine") == b"mine"
        assert await client.execute_command("EXISTS", "large") == 0, "what was given up is not sent later"
