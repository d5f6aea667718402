"""Plans that are trimmed, doubled, huge, unreadable, from the future, or of a symbol each; and what is left pending."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from events import store
from events.intake import CONSUMER, GROUP, PENDING_EVERY_S, SHA, Delivery, Intake, Lost
from events.keys import Keys
from events.store import StoreError
from governor.gate import PermitDenied, PermitGate
from governor.plans import FIELDS_BYTES
from governor.sim.apply_layer import plan_fields
from governor.sim.exchange import Fault
from tests.daemon import Daemon, daemon, events_of, publish, wait_for
from tests.proxy import Proxy
from tests.servers import Kind, RedisServer
from tests.test_end_to_end import CREDENTIALS, Exchange, result

PLANS, RESULTS = Keys().plans, Keys().results
ALONE = {
    "GOV_MAX_EXEC_PER_HOUR": "off",
    "GOV_MAX_EXEC_PER_5MIN": "off",
    "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "off",
    "GOV_MAX_REDUCE_QTY_PER_DAY": "off",
    "GOV_DISARM_ON_ERROR_COUNT": "off",
}
"""Without credentials no exchange is asked."""
ANY = ALONE | CREDENTIALS


class Clock:
    """Seconds, passed by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Streams:
    """Plan and result streams on a real server, and intakes that read them."""

    def __init__(self, connection: Any, new: Callable[[], redis.asyncio.Redis]) -> None:
        self.redis = connection
        self._new = new
        self.clock = Clock()
        self.told: list[Lost] = []

    async def tell(self, lost: Lost) -> None:
        self.told.append(lost)

    async def opened(self, **more: Any) -> Intake:
        options: dict[str, Any] = {"on_lost": self.tell, "clock": self.clock, **more}
        intake = Intake(self._new(), {PLANS: "0", RESULTS: "$"}, **options)
        await intake.open()
        return intake

    async def add(self, first: int, last: int, *, stream: str = PLANS, keep: int | None = None) -> None:
        """Entries of these numbers, the stream trimmed to the last `keep` as the producer does."""
        for number in range(first, last + 1):
            await self.redis.xadd(stream, {"n": number}, id=f"{number}-0")
        if keep is not None:
            await self.redis.xtrim(stream, maxlen=keep, approximate=False)


@pytest.fixture
async def streams(flushed: RedisServer) -> AsyncIterator[Streams]:
    async with AsyncExitStack() as stack:

        def new() -> redis.asyncio.Redis:
            client = store.client(host=flushed.host, port=flushed.port, socket_timeout=5)
            stack.push_async_callback(client.aclose)
            return client

        yield Streams(new(), new)


def numbers(deliveries: list[Delivery]) -> list[int]:
    return [int(delivery.entry_id.partition("-")[0]) for delivery in deliveries]


async def read(intake: Intake, count: int = 100) -> list[int]:
    """Numbers of everything one read gives, acknowledged."""
    deliveries = await intake.read(count=count, block_s=0.001)
    await intake.acknowledge(deliveries)
    return numbers(deliveries)


# -- trimmed before they were read ---------------------------------------------------------------------------------


async def test_plans_trimmed_unread_are_told_with_how_many_before_anything_behind_them_is_read(
    streams: Streams,
) -> None:
    read_before: list[int] = []
    at: list[list[int]] = []

    async def tell(lost: Lost) -> None:
        await streams.tell(lost)
        at.append(list(read_before))

    intake = await streams.opened(on_lost=tell)
    await streams.add(1, 4)
    read_before += await read(intake)
    for first, last, keep in ((5, 14, 3), (15, 15, 4), (16, 40, 10), (41, 41, 0), (42, 60, 1)):
        await streams.add(first, last, keep=keep)
        streams.clock.now += 10  # it had not read for a while
        read_before += await read(intake)
    assert [(lost.stream, lost.after, lost.missing) for lost in streams.told] == [
        (PLANS, "4-0", 7),
        (PLANS, "15-0", 15),
        (PLANS, "40-0", 1),
        (PLANS, "41-0", 18),
    ]
    assert read_before == [1, 2, 3, 4, 12, 13, 14, 15, *range(31, 41), 60]
    assert [seen[-1] for seen in at] == [4, 15, 40, 40]


async def test_plans_trimmed_between_two_full_reads_are_told_although_no_time_has_passed(streams: Streams) -> None:
    intake = await streams.opened()
    await streams.add(1, 50)
    seen = await read(intake, 10)
    await streams.add(51, 60, keep=20)
    while found := await read(intake, 10):
        seen += found
    assert (seen, [lost.missing for lost in streams.told]) == ([*range(1, 11), *range(41, 61)], [30])


async def test_on_the_very_first_start_nothing_is_missed_and_after_it_everything_is(streams: Streams) -> None:
    await streams.add(1, 10, keep=3)
    intake = await streams.opened()
    await streams.add(11, 11, keep=3)  # the first one that the group was there for
    assert await read(intake) == [9, 10, 11]
    assert [lost.missing for lost in streams.told] == [1]


async def test_a_group_made_before_the_first_plan_misses_what_was_trimmed_before_its_first_read(
    streams: Streams,
) -> None:
    intake = await streams.opened()
    await streams.add(1, 10, keep=3)
    assert await read(intake) == [8, 9, 10]
    assert streams.told == [Lost(PLANS, "0-0", 7)]


async def test_a_stream_of_which_nothing_is_left_is_told(streams: Streams) -> None:
    intake = await streams.opened()
    await streams.add(1, 2)
    await read(intake)
    await streams.add(3, 9, keep=0)
    intake = await streams.opened()
    assert await read(intake) == []
    assert streams.told == [Lost(PLANS, "2-0", 7)]
    await streams.add(10, 12, keep=0)
    await streams.add(13, 14)
    assert await read(await streams.opened()) == [13, 14]
    assert streams.told[1:] == [Lost(PLANS, "9-0", 3)]


async def test_what_could_not_be_told_is_found_again_and_what_was_told_is_known_by_its_marker(streams: Streams) -> None:
    intake = await streams.opened()
    await streams.add(1, 4)
    await read(intake)
    await streams.add(5, 14, keep=3)

    async def fail(lost: Lost) -> None:
        await streams.tell(lost)
        raise StoreError("killed before it was passed")

    with pytest.raises(StoreError):
        await read(await streams.opened(on_lost=fail))
    await streams.add(15, 19, keep=3)
    assert await read(await streams.opened()) == [17, 18, 19]
    first, second = streams.told
    assert (first.missing, second.missing) == (7, 12)
    assert second.untold([]) == 12
    assert second.untold(["4-0", "17-0", first.marker]) == 5
    assert second.untold([first.marker, second.marker]) == 0
    assert first.untold([second.marker]) == 0
    assert await read(await streams.opened()) == []
    assert len(streams.told) == 2


async def test_a_gap_that_a_peer_has_passed_meanwhile_is_not_passed_backwards(streams: Streams) -> None:
    mine = await streams.opened()
    await streams.add(1, 4)
    await read(mine)
    await streams.add(5, 14, keep=3)
    theirs = await streams.opened()
    seen: list[int] = []

    async def tell(lost: Lost) -> None:
        await streams.tell(lost)
        seen.extend(await read(theirs))

    mine.on_lost = tell
    streams.clock.now += 10
    assert await read(mine) == []
    assert seen == [12, 13, 14]
    assert [lost.marker for lost in streams.told] == ["4-0+7", "4-0+7"]


async def test_plans_deleted_after_they_were_read_and_results_are_never_called_lost_plans(
    streams: Streams,
) -> None:
    intake = await streams.opened()
    await streams.add(1, 5)
    await streams.add(1, 5, stream=RESULTS)
    await read(intake)
    await streams.redis.xdel(PLANS, "2-0", "4-0")
    await streams.add(6, 9)
    await streams.add(6, 12, stream=RESULTS, keep=1)
    streams.clock.now += 10
    assert await read(intake) == [6, 7, 8, 9, 12]
    assert streams.told == []


async def test_looking_costs_nothing_while_plans_are_read_as_they_come(flushed: RedisServer, streams: Streams) -> None:
    intake = await streams.opened()
    await read(intake)

    async def evaluated() -> int:
        stats: Any = await streams.redis.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha", "xpending"))

    before = await evaluated()
    for number in range(1, 30):
        await streams.add(number, number)
        assert await read(intake) == [number]
        streams.clock.now += 0.1
    assert await evaluated() == before


# -- left pending --------------------------------------------------------------------------------------------------


async def idle(streams: Streams, *ids: str, seconds: int = 3_600) -> None:
    """As if these had been delivered long ago."""
    await streams.redis.xclaim(PLANS, GROUP, CONSUMER, 0, ids, idle=seconds * 1000, justid=True)


async def test_what_a_peer_of_the_same_name_left_pending_is_taken_over_once_its_time_is_over(streams: Streams) -> None:
    mine = await streams.opened()
    await read(mine)
    peer = await streams.opened()
    await streams.add(1, 5)
    given = await peer.read(count=100, block_s=0.001)
    await peer.acknowledge(given[:1])
    await streams.add(6, 7)
    own = await mine.read(count=100, block_s=0.001)
    assert numbers(own) == [6, 7]
    streams.clock.now += PENDING_EVERY_S
    assert await mine.read(count=100, block_s=0.001) == [], "it may still be deciding them"
    await idle(streams, "2-0", "3-0", "4-0", "6-0", "7-0")
    await streams.redis.xtrim(PLANS, minid="4-0", approximate=False)
    streams.clock.now += PENDING_EVERY_S - 1
    assert await mine.read(count=100, block_s=0.001) == [], "not looked yet"
    streams.clock.now += 1
    assert await mine.read(count=100, block_s=0.001) == [
        Delivery(PLANS, "2-0", None),
        Delivery(PLANS, "3-0", None),
        Delivery(PLANS, "4-0", {"n": "4"}),
    ]
    for _ in range(5):  # not acknowledged, as while they wait for the exchange: nothing comes twice
        await idle(streams, "2-0", "3-0", "4-0", "6-0", "7-0")
        streams.clock.now += PENDING_EVERY_S
        assert await mine.read(count=100, block_s=0.001) == []


async def test_however_many_are_left_pending_all_are_taken_over_page_by_page(streams: Streams) -> None:
    mine, peer = await streams.opened(), await streams.opened()
    await read(mine)
    await streams.add(1, 1_100)
    seen: list[int] = []
    while page := await peer.read(count=200, block_s=0.001):
        seen += numbers(page)
    assert seen == list(range(1, 1_101))
    await idle(streams, *(f"{number}-0" for number in seen))
    streams.clock.now += PENDING_EVERY_S
    taken: list[int] = []
    while page := await mine.read(count=200, block_s=0.001):
        taken += numbers(page)
        await mine.acknowledge(page)
    assert taken == seen
    assert mine._given[PLANS] == set(), "what is acknowledged is forgotten"


async def test_a_read_that_arrives_after_its_client_gave_up_on_it_loses_nothing(
    flushed: RedisServer, streams: Streams
) -> None:
    with Proxy(flushed.port) as proxy:
        client = store.client(host="127.0.0.1", port=proxy.port, socket_timeout=5)
        try:
            intake = Intake(client, {PLANS: "0"}, on_lost=streams.tell, clock=streams.clock)
            await intake.open()
            assert await read(intake) == []
            trip = proxy.trip(b"XREADGROUP", "late")
            await streams.add(1, 3)
            with pytest.raises(StoreError):
                await read(intake)
            await intake.open()
            assert await read(intake) == [1, 2, 3]
            await streams.add(4, 5)
            trip.release()  # the server gives 4 and 5 to nobody
        finally:
            await client.aclose()
        assert (await streams.redis.xpending(PLANS, GROUP))["pending"] == 2
        intake = await streams.opened()
        await streams.redis.xack(PLANS, GROUP, "0-0")
        assert await read(intake) == [4, 5]


# -- large ---------------------------------------------------------------------------------------------------------


async def test_a_page_of_large_entries_ends_at_a_number_of_bytes_and_loses_none(streams: Streams) -> None:
    intake = await streams.opened()
    for number in range(1, 41):
        await streams.redis.xadd(PLANS, {"plan_id": number, "steps": b"x" * 1_000_000}, id=f"{number}-0")
    pages = []
    while page := await intake.read(count=200, block_s=0.001):
        pages.append(page)
    assert [n for page in pages for n in numbers(page)] == list(range(1, 41))
    assert max(map(len, pages)) <= 20
    fields = pages[0][0].fields
    assert fields is not None
    assert (fields["plan_id"], FIELDS_BYTES < len(fields["steps"]) < 2 * FIELDS_BYTES) == ("1", True)


async def test_what_a_decision_uses_is_kept_however_large_the_fields_before_it(streams: Streams) -> None:
    intake = await streams.opened()
    await streams.redis.xadd(PLANS, {f"big{n}": b"\xff" * 50_000 for n in range(20)} | {"symbol": "BTCUSDT"})
    (delivery,) = await intake.read(count=1, block_s=0.001)
    fields = delivery.fields
    assert fields is not None
    assert fields["symbol"] == "BTCUSDT"
    assert sum(map(len, fields.values())) < 2 * FIELDS_BYTES


# -- the daemon ----------------------------------------------------------------------------------------------------


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    with Exchange() as one:
        for symbol in ("BTCUSDT", "ETHUSDT"):
            one.set(symbol, "0.020", "1000")
        yield one


@pytest.fixture
def valkey(running_server: Callable[[Kind], RedisServer]) -> RedisServer:
    """One kind, emptied: the server has no part in what is held with it."""
    one = running_server("valkey")
    with one.client() as client:
        client.flushall()
    return one


@pytest.fixture
def valkey_client(valkey: RedisServer) -> Iterator[redis.Redis]:
    with valkey.client() as one:
        yield one


def rss(one: Daemon) -> int:
    assert one.process is not None
    return int(Path(f"/proc/{one.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def backlog(client: redis.Redis, number: int, *, first: int = 0, keep: int = 10_000) -> None:
    pipe = client.pipeline(transaction=False)
    for n in range(first, first + number):
        fields: Any = plan_fields({"plan_id": f"p{n}", "symbol": "BTCUSDT", "action": "UPDATE_SL"}, now=time.time())
        pipe.xadd(PLANS, fields, maxlen=keep, approximate=False)
    pipe.execute()


def settled(client: redis.Redis) -> bool:
    groups: Any = client.xinfo_groups(PLANS)
    last: Any = client.xrevrange(PLANS, count=1)
    return bool(groups[0]["pending"] == 0 and groups[0]["last-delivered-id"] == last[0][0])


def test_plans_trimmed_while_the_daemon_was_away_are_told_once_however_often_it_is_killed_over_it(
    flushed: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with Proxy(flushed.port) as proxy, daemon(tmp_path, port=proxy.port, environ=ALONE) as one:
        publish(client, "before", "BTCUSDT", "UPDATE_SL")
        wait_for(lambda: settled(client))
        one.kill()
        wait_for(lambda: client.info("clients")["blocked_clients"] == 0)
        backlog(client, 60, keep=20)
        for _ in range(3):
            skipped = proxy.trip(SHA["skip"].encode(), "stall")
            one.start(ready=False)
            skipped.wait()  # told, and not yet passed
            one.kill()
            skipped.cancel()
        backlog(client, 10, first=60, keep=20)
        cut = proxy.trip(SHA["skip"].encode(), "after")
        one.start()
        wait_for(lambda: settled(client))
        assert cut.happened == 1
        told = events_of(client, "PLAN_LOST")
        assert [event["count"] for event in told] == [40, 10]
        assert len(events_of(client, "ERROR_RECORDED")) == 2
        assert {e["kind"] for e in events_of(client, "ERROR_RECORDED")} == {"plan_lost"}
        decided = [event["plan_id"] for event in events_of(client, "DECISION")]
        assert decided == ["before", *(f"p{n}" for n in range(50, 70))]
        assert one.json("status")["counts"]["lost"] == 50
        assert one.json("replay")["differences"] == []


def test_on_the_first_start_nothing_is_called_lost(flushed: RedisServer, client: redis.Redis, tmp_path: Path) -> None:
    backlog(client, 60, keep=20)
    with daemon(tmp_path, port=flushed.port, environ=ALONE):
        wait_for(lambda: settled(client))
    assert len(events_of(client, "DECISION")) == 20
    assert events_of(client, "PLAN_LOST") == []


def test_plans_trimmed_while_they_were_pending_are_told_and_never_permitted(
    flushed: RedisServer, client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=flushed.port, base_url=exchange.base_url, environ=ANY) as one:
        exchange.sim.faults = lambda request: Fault.HANG if request.symbol else None
        for n in range(4):
            publish(client, f"p{n}", "BTCUSDT")
        wait_for(lambda: client.xpending(PLANS, GROUP)["pending"] == 4)
        one.kill()
        client.xtrim(PLANS, maxlen=1, approximate=False)
        exchange.sim.faults = None
        one.start()
        assert PermitGate(client).consume("p3", symbol="BTCUSDT", wait_s=5).plan_id == "p3"
        wait_for(lambda: settled(client))
        assert sum(event["count"] for event in events_of(client, "PLAN_LOST")) == 3
        assert [event["plan_id"] for event in events_of(client, "DECISION")] == ["p3"]
        for n in range(3):
            with pytest.raises(PermitDenied):
                PermitGate(client).consume(f"p{n}", symbol="BTCUSDT", wait_s=0)


def test_the_same_plan_id_ten_times_is_permitted_once_whatever_lies_between(
    valkey: RedisServer, valkey_client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=valkey.port, base_url=exchange.base_url, environ=ANY) as one:
        pipe = valkey_client.pipeline(transaction=True)
        for symbol in ("BTCUSDT", "ETHUSDT") * 2:  # also where another symbol, with a queue of its own, has it
            publish(pipe, "again", symbol)
        pipe.execute()
        wait_for(lambda: len(events_of(valkey_client, "DECISION")) == 4)
        (first,) = (event for event in events_of(valkey_client, "DECISION") if event["verdict"] == "EXECUTE")
        PermitGate(valkey_client).consume("again", symbol=first["symbol"])
        for _ in range(3):
            publish(valkey_client, "again", first["symbol"])
        wait_for(lambda: len(events_of(valkey_client, "DECISION")) == 7)
        one.kill()
        one.start()
        for _ in range(3):
            publish(valkey_client, "again", first["symbol"])
        wait_for(lambda: len(events_of(valkey_client, "DECISION")) == 10)
        told = Counter((event["verdict"], event["reason"]) for event in events_of(valkey_client, "DECISION"))
    assert told == {("EXECUTE", None): 1, ("SKIP", "duplicate_plan"): 9}
    assert valkey_client.exists("quantum:permit:again") == 0


def test_entries_of_a_megabyte_are_decided_in_bounded_memory_and_kept_cut(
    valkey: RedisServer, valkey_client: redis.Redis, tmp_path: Path
) -> None:
    for n in range(150):
        publish(valkey_client, f"p{n}", f"S{n % 5}USDT", "UPDATE_SL", new_sl="7" * 1_000_000)
    with daemon(tmp_path, port=valkey.port, environ=ALONE) as one:
        wait_for(lambda: settled(valkey_client), within_s=30)
        used = rss(one)
        publish(valkey_client, "after", "BTCUSDT", "UPDATE_SL")
        assert PermitGate(valkey_client).consume("after", symbol="BTCUSDT", wait_s=3).plan_id == "after"
    received = events_of(valkey_client, "PLAN_RECEIVED")
    assert {event["plan_id"] for event in received} == {*(f"p{n}" for n in range(150)), "after"}
    assert {event["truncated"] for event in received[:-1]} == {True}
    assert max(len(event["fields"]["new_sl_proposed"]) for event in received) <= FIELDS_BYTES
    assert used < 150 * 2**20, f"{used / 2**20:.0f} MiB"


def test_a_symbol_a_plan_leaves_memory_and_metrics_bounded(
    valkey: RedisServer, valkey_client: redis.Redis, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=valkey.port, environ=ALONE | {"GOV_FALLBACK_QTY": "1"}) as one:
        sizes, lines = [], []
        for part in range(2):
            pipe = valkey_client.pipeline(transaction=False)
            for n in range(2_500 * part, 2_500 * (part + 1)):
                publish(pipe, f"p{n}", f"S{n}USDT", "FULL_CLOSE_PROPOSED")
            pipe.execute()
            wait_for(lambda: settled(valkey_client), within_s=40)
            sizes.append(rss(one))
            lines.append(one.http("/metrics").count("\n"))
        assert one.json("status")["counts"]["allowed"] == 5_000
    assert lines[0] == lines[1] < 1_500, lines
    assert sizes[1] - sizes[0] < 25 * 2**20, [f"{size / 2**20:.0f} MiB" for size in sizes]
    assert sizes[1] < 120 * 2**20, [f"{size / 2**20:.0f} MiB" for size in sizes]


def test_bytes_that_are_no_utf8_in_any_field_of_a_plan_or_result_stop_nothing(
    valkey: RedisServer, valkey_client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    good: Any = {n.encode(): v.encode() for n, v in plan_fields(
        {"plan_id": "x", "symbol": "BTCUSDT", "action": "UPDATE_SL"}, now=time.time()
    ).items()}  # fmt: skip
    with daemon(tmp_path, port=valkey.port, base_url=exchange.base_url, environ=ANY) as one:
        for name in good:
            valkey_client.xadd(PLANS, good | {b"plan_id": b"id-" + name, name: b"\xff\xc3\x28\x00"})
            valkey_client.xadd(PLANS, good | {b"plan_id": b"name-" + name, b"\xf0\x28" + name: b"\xff"})
        valkey_client.xadd(
            RESULTS, {b"plan_id": b"\xff", b"executed": b"\xfe", b"\xff": b"\xff", b"steps_results": b"\xff"}
        )
        publish(valkey_client, "fine", "BTCUSDT")
        assert PermitGate(valkey_client).consume("fine", symbol="BTCUSDT", wait_s=3).plan_id == "fine"
        wait_for(lambda: settled(valkey_client))
        decided = {event["plan_id"] for event in events_of(valkey_client, "DECISION") if event["verdict"] == "EXECUTE"}
        assert {"name-" + name.decode() for name in good} <= decided, "a name nobody reads is no problem"
        assert len(events_of(valkey_client, "PLAN_RECEIVED", "PLAN_REJECTED")) == 2 * len(good) + 1
        assert one.json("replay")["differences"] == []
        assert any(r"\xff" in str(event["fields"]) for event in events_of(valkey_client, "PLAN_RECEIVED"))


def test_a_plan_from_the_future_is_refused_by_its_entrys_id_and_not_by_what_its_timestamp_field_says(
    valkey: RedisServer, valkey_client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=valkey.port, base_url=exchange.base_url, environ=ANY) as one:
        fields: Any = plan_fields({"plan_id": "claims", "symbol": "BTCUSDT", "action": "PARTIAL_25"}, now=4e9)
        valkey_client.xadd(PLANS, fields)
        assert PermitGate(valkey_client).consume("claims", symbol="BTCUSDT").plan_id == "claims"
        ahead = int(time.time() * 1000) + 3_600_000
        valkey_client.xadd(PLANS, fields | {"plan_id": "ahead"}, id=f"{ahead}-0")
        # The server gives what follows an id that is no lower: everything is from the future now.
        publish(valkey_client, "behind", "BTCUSDT")
        wait_for(lambda: len(events_of(valkey_client, "PLAN_REJECTED")) == 2)
        for plan_id in ("ahead", "behind"):
            block = json.loads(str(valkey_client.get(f"quantum:governor:block:{plan_id}")))
            assert block["reason"] == "invalid_plan"
            assert valkey_client.exists(f"quantum:permit:{plan_id}") == 0
        assert all("in the future" in event["reason"] for event in events_of(valkey_client, "PLAN_REJECTED"))
        assert 'quantum_govern_error_total{kind="malformed_plan"} 2.0' in one.http("/metrics")
        assert "alive" in one.http("/healthz")


def test_results_for_unknown_plans_are_told_apart_by_what_they_claim(
    valkey: RedisServer, valkey_client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    valkey_client.xgroup_create(RESULTS, GROUP, id="0", mkstream=True)
    old: Any = {"plan_id": "old", "symbol": "BTCUSDT", "executed": "True", "decision": "EXECUTE", "error": ""}
    valkey_client.xadd(RESULTS, old, id="1-0")
    with daemon(tmp_path, port=valkey.port, base_url=exchange.base_url, environ=ANY) as one:
        for n in range(300):
            valkey_client.xadd(RESULTS, old | {"plan_id": f"never-{n}", "executed": "False", "decision": "BLOCKED"})
        valkey_client.xadd(RESULTS, {"executed": "perhaps"})
        publish(valkey_client, "fine", "BTCUSDT")
        assert PermitGate(valkey_client).consume("fine", symbol="BTCUSDT").plan_id == "fine"
        wait_for(lambda: valkey_client.xpending(RESULTS, GROUP)["pending"] == 0)
        (told,) = events_of(valkey_client, "EXECUTION")
        assert (told["plan_id"], told["permit"]) == ("old", "unknown")
        assert one.json("status")["state"] == "ARMED"
        result(valkey_client, "nobody", "BTCUSDT", "0.1")
        (done,) = wait_for(lambda: events_of(valkey_client, "AUTO_DISARM"))
        assert done["reason"] == "unpermitted_execution"
        assert [event["plan_id"] for event in events_of(valkey_client, "UNPERMITTED_EXECUTION")] == ["nobody"]


def test_ten_thousand_plans_of_one_symbol_at_once_are_decided_in_order_and_only_the_limit_is_permitted(
    valkey: RedisServer, valkey_client: redis.Redis, exchange: Exchange, tmp_path: Path
) -> None:
    limits = {"GOV_MAX_EXEC_PER_HOUR": "3", "GOV_MAX_EXEC_PER_5MIN": "off", "GOV_MAX_PLAN_AGE_SEC": "600"}
    with daemon(tmp_path, port=valkey.port, base_url=exchange.base_url, environ=ANY | limits) as one:
        pipe = valkey_client.pipeline(transaction=False)
        for n in range(10_000):
            publish(pipe, f"p{n}", "BTCUSDT")
        began = time.monotonic()
        pipe.execute()
        wait_for(lambda: settled(valkey_client), within_s=60)
        seconds = time.monotonic() - began
        counts = one.json("status")["counts"]
    assert (counts["plans"], counts["allowed"], counts["blocked"], counts["lost"]) == (10_000, 3, 9_997, 0)
    decided = [int(event["plan_id"][1:]) for event in events_of(valkey_client, "DECISION")]
    assert decided == list(range(10_000))
    assert seconds < 40
