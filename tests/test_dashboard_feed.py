"""What the dashboard folds and shows is what the events say, however it came to read them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import redis
from msgspec.structs import replace

from events.chain import GENESIS
from events.codec import decode, dumps, encode
from events.types import Decision, Entry, Event, Execution, Head, PlanRejected
from governor.connection import connected, ledger_on, now
from governor.dashboard import feed as feeds
from governor.dashboard.chart import STEP_US, STEPS
from governor.dashboard.feed import Feed
from governor.dashboard.incidents import incident
from governor.explain import Explainer, explain
from governor.settings import load
from projections.state import digest, fold
from tests.daemon import fields_of, until
from tests.servers import RedisServer
from tests.test_audit import STREAM, fill
from tests.test_properties import walk

SEEDS = (0, 1, 4)
HOUR_US = 3_600_000_000


@cache
def happened(seed: int) -> tuple[tuple[int, Event], ...]:
    """Two daemons' random history, as if it had just come to its end, in the last 20 hours."""
    with ThreadPoolExecutor(1) as elsewhere:  # it runs loops of its own
        recorded = [decode(entry) for entry in elsewhere.submit(walk, seed).result().store.entries]
    first, last, end = min(one.at for one in recorded), max(one.at for one in recorded), now() - 5_000_000
    return tuple((end - (last - one.at) * 20 * HOUR_US // (last - first), one.event) for one in recorded)


def stored(events: tuple[tuple[int, Event], ...] | list[tuple[int, Event]], after: Head = GENESIS) -> list[Entry]:
    found = []
    for at, event in events:
        found.append(encode(event, after=after, at=at))
        after = Head(found[-1].seq, found[-1].hash)
    return found


def append(client: redis.Redis, entries: list[Entry]) -> None:
    for entry in entries:
        fields: Any = fields_of(entry)
        if entry.name == "AUTO_DISARM":
            data = json.loads(entry.data)
            fields |= {"reason": data["reason"], "context": dumps(data["context"])}
            fields |= {"action_taken": data["action_taken"]}
        client.xadd(STREAM, fields, id=f"{entry.seq}-0")


@contextlib.asynccontextmanager
async def following(server: RedisServer, **environ: str) -> AsyncIterator[Feed]:
    settings = load({"REDIS_HOST": server.host, "REDIS_PORT": str(server.port), "HOME": "/nowhere", **environ})
    async with connected(settings, answer_s=2) as connection:
        feed = Feed(settings, connection)
        task = asyncio.create_task(feed.run())
        try:
            yield feed
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def at_event(feed: Feed, seq: int) -> bool:
    return feed.error is None and feed.state is not None and feed.state.seq == seq


def shown(feed: Feed, at: int) -> dict[str, Any]:
    """Everything that is shown of single events."""
    assert feed.state is not None
    day = feed.day
    found: dict[str, Any] = {"plans": list(day.plans.values()), "incidents": list(day.incidents)}
    found |= {"chart": day.chart.told(feed.state, at), "last": dict(day.last), "last_disarm": day.last_disarm}
    decoded: dict[str, Any] = json.loads(dumps(found))
    return decoded


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_random_history_is_folded_and_shown_the_same_followed_read_at_once_or_from_a_checkpoint(
    seed: int, flushed: RedisServer, client: redis.Redis
) -> None:
    entries = stored(happened(seed))
    half = len(entries) // 2
    everything = fold(map(decode, entries))
    append(client, entries[:half])
    async with following(flushed) as live:
        await until(lambda: at_event(live, half))
        for part in range(half, len(entries), 97):
            append(client, entries[part : part + 97])
            await until(lambda part=part: at_event(live, min(part + 97, len(entries))))  # type: ignore[misc]
        assert live.state is not None
        assert digest(live.state) == digest(everything)
        assert live.began_again is None
        async with following(flushed) as late:
            await until(lambda: at_event(late, len(entries)))
            assert late.state is not None
            assert digest(late.state) == digest(everything)
            at = now()
            assert shown(late, at) == shown(live, at)
            assert {**live.status(at), "symbols": ...} == {**late.status(at), "symbols": ...}
        async with connected(live.settings, answer_s=2) as connection:
            ledger = ledger_on(connection, live.settings)
            await ledger.open()
            await ledger.write_checkpoint()
        async with following(flushed) as quick:
            await until(lambda: at_event(quick, len(entries)))
            assert quick.state is not None
            assert digest(quick.state) == digest(everything)
            assert shown(quick, at) == shown(live, at)


@pytest.mark.parametrize("seed", SEEDS)
async def test_rows_and_chart_add_up_to_what_the_state_has(
    seed: int, flushed: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("governor.dashboard.day.PLANS_KEPT", 1_000_000)
    entries = stored(happened(seed))
    append(client, entries)
    async with following(flushed) as feed:
        await until(lambda: at_event(feed, len(entries)))
        state = feed.state
        assert state is not None
        at = now()
        chart = feed.day.chart.told(state, at)
    begins = (at // STEP_US - STEPS + 1) * STEP_US
    recent = [decode(entry) for entry in entries if decode(entry).at >= begins]
    verdicts = [one.event.verdict for one in recent if isinstance(one.event, Decision)]
    assert sum(chart["allowed"]) == verdicts.count("EXECUTE") > 0
    assert sum(chart["blocked"]) == verdicts.count("BLOCK") > 0
    assert sum(chart["skipped"]) == verdicts.count("SKIP")
    assert sum(chart["rejected"]) == sum(isinstance(one.event, PlanRejected) for one in recent)
    assert len(chart["t"]) == len(chart["state"]) == len(chart["notional"]) == STEPS
    assert all(later - earlier == 300 for earlier, later in pairwise(chart["t"]))
    told = feed.status(at)
    assert chart["notional"][-1] == told["total_daily_notional"]["used"]
    assert all(amount >= 0 for amount in chart["notional"])
    assert chart["state"][-1] is not None
    again = {one.event.plan_id for one in recent if isinstance(one.event, Execution) and one.event.counted}
    latest = {row["plan_id"]: row for row in feed.day.plans.values() if row["verdict"] in ("EXECUTE", "BLOCK")}
    held = {plan_id: row["permit"] for plan_id, row in latest.items() if row["permit"] is not None}
    assert held
    for plan_id, permit in held.items():
        plan = state.plan(plan_id)
        assert plan is not None
        assert permit["status"] == plan.permit or plan_id in again
    assert [row["seq"] for row in feed.day.plans.values()] == sorted(row["seq"] for row in feed.day.plans.values())


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_plan_is_explained_from_a_state_kept_before_it_as_from_the_first_event(
    seed: int, flushed: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "ANCHOR_EVENTS", 20)
    entries = stored(happened(seed))
    append(client, entries[:30])
    quick = 0
    async with following(flushed) as feed:
        await until(lambda: at_event(feed, 30))
        append(client, entries[30:])
        await until(lambda: at_event(feed, len(entries)))
        for plan_id in {row["plan_id"] for row in feed.day.plans.values() if row["plan_id"]}:
            state = feed.before(plan_id)
            if state is None:
                continue
            quick += 1
            short = Explainer(plan_id, state=state)
            for entry in entries[state.seq :]:
                if short.wants(entry):
                    short.feed(decode(entry))
            assert short.finish() == explain(plan_id, map(decode, entries))
    assert quick > 20


async def test_only_the_last_day_and_only_so_many_events_are_read_for_rows(
    flushed: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = list(happened(0))
    older = [(at - 30 * HOUR_US, event) for at, event in events[:200]]
    entries = stored(older + events)
    append(client, entries)
    first = next(seq for seq, entry in enumerate(entries, 1) if decode(entry).at >= now() - 24 * HOUR_US)
    async with following(flushed) as feed:
        await until(lambda: at_event(feed, len(entries)))
        oldest = min(row["seq"] for row in feed.day.plans.values())
        assert oldest >= first
    monkeypatch.setattr(feeds, "EVENTS_READ", 50)
    async with following(flushed) as feed:
        await until(lambda: at_event(feed, len(entries)))
        assert min(row["seq"] for row in feed.day.plans.values()) > len(entries) - 50
        assert feed.state is not None
        assert digest(feed.state) == digest(fold(map(decode, entries)))


async def test_a_disarm_in_force_is_shown_with_its_proof_however_long_ago_it_began(
    flushed: RedisServer, client: redis.Redis
) -> None:
    events = list(happened(0))
    names = [event.NAME for _, event in events]
    end = next(i for i, name in enumerate(names) if name in ("AUTO_DISARM", "MANUAL_DISARM")) + 1
    entries = stored([(at - 100 * HOUR_US, event) for at, event in events[:end]])
    append(client, entries)
    async with following(flushed) as feed:
        await until(lambda: at_event(feed, end))
        assert not feed.day.plans
        assert feed.day.last_disarm is not None
        assert feed.day.last_disarm["done_at"] is not None


async def test_a_broken_chain_is_shown_as_such_with_the_last_state_that_held(
    flushed: RedisServer, client: redis.Redis
) -> None:
    entries = stored(happened(1))
    append(client, entries[:-1])
    async with following(flushed) as feed:
        await until(lambda: at_event(feed, len(entries) - 1))
        append(client, [replace(entries[-1], hash="0" * 64)])
        await until(lambda: feed.error is not None)
        told = feed.health()
        assert (told["reachable"], told["trusted"]) == (True, False)
        assert f"event {len(entries)}: its hash does not cover" in told["error"]
        assert feed.state is not None
        assert feed.state.seq == len(entries) - 1
        assert feed.status(now())["state"] is not None
        await until(lambda: feed.began_again is not None)
        client.delete(STREAM)
        append(client, entries)
        await until(lambda: at_event(feed, len(entries)))
        assert feed.health()["trusted"]


async def test_an_emptied_stream_and_one_that_came_back_are_followed_and_told(
    flushed: RedisServer, client: redis.Redis
) -> None:
    entries = stored(happened(1))
    append(client, entries)
    async with following(flushed) as feed:
        await until(lambda: at_event(feed, len(entries)))
        client.delete(STREAM)
        await until(lambda: at_event(feed, 0))
        assert feed.began_again is not None
        assert "the event stream ends at event 0" in feed.began_again["why"]
        assert feed.status(now())["state"] is None
        assert not feed.day.plans
        fill(client, entries)
        await until(lambda: at_event(feed, len(entries)))
        assert feed.state is not None
        assert digest(feed.state) == digest(fold(map(decode, entries)))
        assert feed.day.plans


async def test_a_shorter_history_than_the_one_seen_is_told(flushed: RedisServer, client: redis.Redis) -> None:
    entries = stored(happened(1))
    append(client, entries)
    async with following(flushed) as feed:
        await until(lambda: at_event(feed, len(entries)))
        client.delete(STREAM)
        append(client, entries[:-10])
        await until(lambda: at_event(feed, len(entries) - 10))
        assert feed.began_again is not None
        assert f"after event {len(entries)} had been seen" in feed.began_again["why"]


async def test_an_event_of_a_newer_program_is_told_and_does_not_end_the_feed(
    flushed: RedisServer, client: redis.Redis
) -> None:
    entries = stored(happened(1))
    append(client, entries[:20])
    async with following(flushed) as feed:
        await until(lambda: at_event(feed, 20))
        head = Head(entries[19].seq, entries[19].hash)
        strange = encode(decode(entries[0]).event, after=head, at=now())
        client.xadd(
            STREAM,
            {"event": "TELEPORTED", "seq": 21, "timestamp": strange.timestamp, "data": "{}", "hash": strange.hash},
            id="21-0",
        )
        await until(lambda: feed.error is not None)
        assert not feed.health()["trusted"]


def test_every_event_is_a_row_or_an_incident_or_a_part_of_a_plans_life() -> None:
    plain = {"PLAN_RECEIVED", "DECISION", "PERMIT_CONSUMED", "PERMIT_EXPIRED", "PERMIT_REVOKED", "EXECUTION",
             "PLAN_REJECTED"}  # fmt: skip
    for seed in SEEDS:
        for recorded in map(decode, stored(happened(seed))):
            told = incident(recorded)
            assert (told is None) == (recorded.event.NAME in plain), recorded.event.NAME
            if told is not None:
                assert isinstance(told["told"], str)
                assert told["level"] in ("info", "warning", "alarm")
                assert "\n" not in told["told"]
