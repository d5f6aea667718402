import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import fakeredis
import pytest
import redis.asyncio

from events import store
from events.intake import CONSUMER, GROUP, Delivery, Intake
from events.keys import Keys
from events.store import StoreError, UnavailableError
from tests.servers import KINDS, Kind, RedisServer
from tests.test_store import Proxy, start_again

PLANS, RESULTS = Keys().plans, Keys().results


class Place:
    """Plan and result streams on a server, empty."""

    def __init__(self, stack: AsyncExitStack, client: Callable[[], redis.asyncio.Redis]) -> None:
        self._stack = stack
        self._client = client
        self.redis: Any = self.client()

    def client(self) -> redis.asyncio.Redis:
        client = self._client()
        self._stack.push_async_callback(client.aclose)
        return client

    def intake(self, streams: dict[str, str] | None = None) -> Intake:
        return Intake(self.client(), streams or {PLANS: "0", RESULTS: "$"})

    async def opened(self, streams: dict[str, str] | None = None) -> Intake:
        intake = self.intake(streams)
        await intake.open()
        return intake

    async def add(self, stream: str, *numbers: int) -> None:
        for number in numbers:
            await self.redis.xadd(stream, {"n": number}, id=f"{number}-0")

    async def blocked(self) -> None:
        """Return when somebody waits in a blocking command."""
        async with asyncio.timeout(5):
            while (await self.redis.info("clients"))["blocked_clients"] == 0:
                pass


def on(server: RedisServer, stack: AsyncExitStack) -> Place:
    return Place(stack, lambda: store.client(host=server.host, port=server.port, socket_timeout=5))


def entry(stream: str, number: int) -> Delivery:
    return Delivery(stream, f"{number}-0", {"n": str(number)})


def numbers(deliveries: list[Delivery]) -> list[int]:
    return [int(delivery.entry_id.partition("-")[0]) for delivery in deliveries]


async def read(intake: Intake, count: int = 100) -> list[Delivery]:
    return await intake.read(count=count, block_s=0.01)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as closing:
        yield closing


@pytest.fixture(params=["fakeredis", *KINDS])
async def place(
    request: pytest.FixtureRequest, running_server: Callable[[Kind], RedisServer], stack: AsyncExitStack
) -> Place:
    if request.param == "fakeredis":
        shared = fakeredis.FakeServer()
        return Place(stack, lambda: fakeredis.FakeAsyncRedis(server=shared, protocol=2))
    place = on(running_server(request.param), stack)
    await place.redis.flushall()
    return place


@pytest.fixture
async def real(server: RedisServer, stack: AsyncExitStack) -> Place:
    place = on(server, stack)
    await place.redis.flushall()
    return place


# ---------------------------------------------------------------- groups


async def test_plans_written_before_the_first_start_are_read_and_results_are_not(place: Place) -> None:
    await place.add(PLANS, 1)
    await place.add(RESULTS, 1)
    intake = await place.opened()
    await place.add(PLANS, 2)
    await place.add(RESULTS, 2)
    assert await read(intake) == [entry(PLANS, 1), entry(PLANS, 2), entry(RESULTS, 2)]


async def test_opening_makes_streams_that_are_not_there(place: Place) -> None:
    await place.opened()
    assert await place.redis.exists(PLANS, RESULTS) == 2
    assert [group["name"] for group in await place.redis.xinfo_groups(PLANS)] == [GROUP.encode()]


async def test_a_group_that_is_there_keeps_its_place(place: Place) -> None:
    first = await place.opened()
    await place.add(PLANS, 1)
    await first.acknowledge(await read(first))
    await place.add(PLANS, 2)
    second = await place.opened()
    await second.open()
    assert await read(second) == [entry(PLANS, 2)]


async def test_a_key_that_is_no_stream_is_told(place: Place) -> None:
    await place.redis.set(PLANS, "no stream")
    with pytest.raises(StoreError, match=PLANS) as caught:
        await place.intake().open()
    assert not isinstance(caught.value, UnavailableError)


# ---------------------------------------------------------------- order


async def test_deliveries_come_in_stream_order_however_few_are_asked_for(place: Place) -> None:
    intake = await place.opened({PLANS: "0"})
    await place.add(PLANS, *range(1, 8))
    pages = [numbers(await read(intake, 3)) for _ in range(4)]
    assert pages == [[1, 2, 3], [4, 5, 6], [7], []]


async def test_what_is_pending_comes_before_what_is_new(place: Place) -> None:
    before = await place.opened()
    await place.add(PLANS, 1, 2, 3)
    await place.add(RESULTS, 1)
    delivered = await read(before)
    await before.acknowledge([delivered[1]])
    await place.add(PLANS, 4, 5)
    await place.add(RESULTS, 2)
    after = await place.opened()
    pages = [await read(after, 1) for _ in range(6)]
    by_stream = {stream: [d for page in pages for d in page if d.stream == stream] for stream in (PLANS, RESULTS)}
    assert [numbers(deliveries) for deliveries in by_stream.values()] == [[1, 3, 4, 5], [1, 2]]


async def test_pending_entries_are_read_to_the_end_before_anything_new(place: Place) -> None:
    before = await place.opened({PLANS: "0"})
    await place.add(PLANS, *range(1, 6))
    await read(before)
    await place.add(PLANS, 6)
    after = await place.opened({PLANS: "0"})
    assert [numbers(await read(after, 2)) for _ in range(4)] == [[1, 2], [3, 4], [5], [6]]


async def test_what_was_not_acknowledged_is_delivered_again_after_opening(place: Place) -> None:
    intake = await place.opened()
    await place.add(PLANS, 1, 2)
    first = await read(intake)
    for _ in range(2):  # after a delivery of what was new, and after one of what was pending
        await intake.open()
        assert await read(intake) == first == [entry(PLANS, 1), entry(PLANS, 2)]
    await intake.acknowledge(first)
    await intake.open()
    assert await read(intake) == []


async def test_an_acknowledgement_concerns_its_own_stream_only(place: Place) -> None:
    intake = await place.opened()
    await place.add(PLANS, 1)
    await place.add(RESULTS, 1)
    await intake.acknowledge([d for d in await read(intake) if d.stream == PLANS])
    await intake.open()
    assert await read(intake) == [entry(RESULTS, 1)]


async def test_a_second_group_on_the_stream_changes_nothing(place: Place) -> None:
    intake = await place.opened({PLANS: "0"})
    await place.redis.xgroup_create(PLANS, "somebody else", id="0")
    await place.add(PLANS, 1)
    await place.redis.xreadgroup("somebody else", CONSUMER, {PLANS: ">"})
    assert await read(intake) == [entry(PLANS, 1)]


async def test_a_new_entry_ends_the_wait(real: Place) -> None:
    intake = await real.opened()
    reading = asyncio.create_task(intake.read(count=10, block_s=4))
    await real.blocked()
    await real.add(PLANS, 1)
    async with asyncio.timeout(3):
        assert await reading == [entry(PLANS, 1)]


async def test_reading_ends_with_nothing_when_nothing_comes(place: Place) -> None:
    intake = await place.opened()
    assert await intake.read(count=10, block_s=0) == []


# ---------------------------------------------------------------- what a stream may hold


async def test_an_entry_trimmed_while_it_was_pending_is_delivered_without_fields(place: Place) -> None:
    before = await place.opened({PLANS: "0"})
    await place.add(PLANS, 1, 2, 3)
    await read(before)
    await place.redis.xtrim(PLANS, maxlen=1, approximate=False)
    after = await place.opened({PLANS: "0"})
    deliveries = await read(after)
    assert deliveries == [Delivery(PLANS, "1-0", None), Delivery(PLANS, "2-0", None), entry(PLANS, 3)]
    await after.acknowledge(deliveries)
    await after.open()
    assert await read(after) == []


async def test_bytes_that_are_no_utf8_stay_readable(place: Place) -> None:
    intake = await place.opened()
    await place.redis.xadd(PLANS, {"name": b"a\xff\xfeb", b"\xc3\x28": "ü", "nul": b"\x00"})
    (delivery,) = await read(intake)
    fields = delivery.fields
    assert fields == {"name": r"a\xff\xfeb", r"\xc3(": "ü", "nul": "\x00"}


async def test_clients_that_decode_are_read_the_same(real: Place, server: RedisServer, stack: AsyncExitStack) -> None:
    async with server.async_client(decode_responses=True) as client:
        intake = Intake(client, {PLANS: "0"})
        await intake.open()
        await real.redis.xadd(PLANS, {"a": "ü"}, id="1-0")
        assert await read(intake) == [Delivery(PLANS, "1-0", {"a": "ü"})]


# ---------------------------------------------------------------- streams that go away


@pytest.mark.parametrize("gone", ["stream", "group", "everything"])
async def test_a_stream_or_group_that_is_gone_is_told_and_opening_makes_it_again(place: Place, gone: str) -> None:
    intake = await place.opened()
    await place.add(PLANS, 1)
    await intake.acknowledge(await read(intake))
    await remove(place, gone)
    with pytest.raises(StoreError) as caught:
        await read(intake)
    assert not isinstance(caught.value, UnavailableError)
    await intake.open()
    assert numbers(await read(intake)) == ([1] if gone == "group" else [])
    await place.add(PLANS, 2)
    assert await read(intake) == [entry(PLANS, 2)]


@pytest.mark.parametrize("gone", ["stream", "group", "everything"])
async def test_a_stream_or_group_that_goes_while_it_is_waited_for_is_told(real: Place, gone: str) -> None:
    intake = await real.opened()
    reading = asyncio.create_task(intake.read(count=10, block_s=4))
    await real.blocked()
    await remove(real, gone)
    async with asyncio.timeout(3):
        with pytest.raises(StoreError) as caught:
            await reading
    assert not isinstance(caught.value, UnavailableError)
    await intake.open()
    await real.add(PLANS, 1)
    assert await read(intake) == [entry(PLANS, 1)]


@pytest.mark.parametrize("gone", ["stream", "group"])
async def test_a_stream_that_goes_while_entries_are_pending_is_told(place: Place, gone: str) -> None:
    before = await place.opened()
    await place.add(PLANS, 1)
    await read(before)
    after = await place.opened()
    await remove(place, gone)
    with pytest.raises(StoreError):
        await read(after)


async def remove(place: Place, what: str) -> None:
    match what:
        case "stream":
            await place.redis.delete(PLANS)
        case "group":
            await place.redis.xgroup_destroy(PLANS, GROUP)
        case _:
            await place.redis.flushall()


# ---------------------------------------------------------------- servers that go away


async def test_a_server_that_is_gone_is_unavailable(own_server: RedisServer, stack: AsyncExitStack) -> None:
    intake = await on(own_server, stack).opened()
    own_server.kill()
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await read(intake)
        with pytest.raises(UnavailableError):
            await intake.open()
        with pytest.raises(UnavailableError):
            await intake.acknowledge([entry(PLANS, 1)])


async def test_a_server_that_goes_while_it_is_waited_for_is_unavailable(
    own_server: RedisServer, stack: AsyncExitStack
) -> None:
    place = on(own_server, stack)
    intake = await place.opened()
    reading = asyncio.create_task(intake.read(count=10, block_s=4))
    await place.blocked()
    own_server.kill()
    async with asyncio.timeout(3):
        with pytest.raises(UnavailableError):
            await reading


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_lost_or_reordered_by_a_restart_of_the_server(
    kind: Kind, new_server: Callable[..., RedisServer], stack: AsyncExitStack
) -> None:
    server = new_server(kind, appendonly=True, appendfsync="always")
    place = on(server, stack)
    intake = await place.opened({PLANS: "0"})
    await place.add(PLANS, 1, 2, 3)
    await intake.acknowledge((await read(intake, 2))[:1])
    server.kill()
    with pytest.raises(UnavailableError):
        await read(intake)
    start_again(server)
    await intake.open()
    assert [numbers(await read(intake)) for _ in range(2)] == [[2], [3]]


async def test_a_lost_answer_changes_no_order(real: Place, server: RedisServer, stack: AsyncExitStack) -> None:
    proxy = await stack.enter_async_context(Proxy(server.port, b"XREADGROUP\r\n"))
    behind = Place(stack, lambda: store.client(host="127.0.0.1", port=proxy.port, socket_timeout=5))
    intake = await behind.opened({PLANS: "0"})
    assert await read(intake) == []
    await real.add(PLANS, 1, 2)
    proxy.cut = "after"
    with pytest.raises(UnavailableError):
        await read(intake, 1)
    await intake.open()
    assert [numbers(await read(intake, 1)) for _ in range(2)] == [[1], [2]]
