"""The daemon's inside on a store in memory: order, room, and plans that fail in unexpected ways."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from events.intake import GROUP, Delivery
from events.keys import Keys
from events.store import Ack, MemoryStore
from events.types import Decision, ErrorRecorded
from governor.actuator import Actuator, PendingNote
from governor.connection import now
from governor.ledger import Ledger
from governor.market import Market
from governor.notify import Notifier
from governor.service import WAITING_MOST, Governor
from governor.settings import load
from governor.sim.apply_layer import plan_fields

KEYS = Keys()


class FakeExchange:
    """Answers as told, and remembers who asked."""

    weight_used = 0
    weight_limit = 2400

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken: set[str] = set()
        self.held: dict[str, asyncio.Event] = {}

    async def market(self, symbol: str) -> Market:
        self.asked.append(symbol)
        if symbol in self.held:
            await self.held[symbol].wait()
        if symbol in self.broken:
            raise RuntimeError("nobody thought of this")
        return Market(legs={"BOTH": Decimal(1)}, mark_price=Decimal(10))

    async def warm_up(self) -> None: ...

    async def keep_alive(self) -> None: ...

    async def aclose(self) -> None: ...


class Running:
    """A governor whose ledger runs, without Redis."""

    def __init__(self, tmp_path: Path) -> None:
        settings = load(
            {
                "BINANCE_TESTNET_API_KEY": "k",
                "BINANCE_TESTNET_API_SECRET": "s",
                "GOV_MAX_EXEC_PER_HOUR": "off",
                "GOV_MAX_EXEC_PER_5MIN": "off",
                "APPLY_CONFIG_PATH": str(tmp_path / "apply-layer.env"),
            }
        )
        self.store = MemoryStore(lambda: now() // 1000)
        self.ledger = Ledger(self.store, KEYS, now)
        self.exchange = FakeExchange()
        self.governor = Governor(
            settings,
            ledger=self.ledger,
            intake=None,  # type: ignore[arg-type]
            exchange=self.exchange,
            actuator=Actuator(config_path=settings.apply_config_path, service="x.service", clock=now),
            note=PendingNote(settings.apply_config_path),
            notifier=Notifier({}),
            clock=now,
        )
        self._sequence = 0

    def plan(self, plan_id: str, symbol: str, action: str = "PARTIAL_25", **more: str) -> Delivery:
        self._sequence += 1
        fields = plan_fields({"plan_id": plan_id, "symbol": symbol, "action": action}, now=time.time()) | more
        return Delivery(KEYS.plans, f"{now() // 1000}-{self._sequence}", fields)

    def deliver(self, *deliveries: Delivery) -> None:
        self.governor._take(list(deliveries))

    async def settled(self, *symbols: str) -> None:
        while any(symbol in self.governor._queues for symbol in symbols or self.governor._queues):
            await asyncio.sleep(0)

    def decisions(self) -> list[Decision]:
        from events.codec import decode  # noqa: PLC0415

        return [event for entry in self.store.entries if isinstance(event := decode(entry).event, Decision)]

    def errors(self) -> list[ErrorRecorded]:
        from events.codec import decode  # noqa: PLC0415

        return [event for entry in self.store.entries if isinstance(event := decode(entry).event, ErrorRecorded)]


@asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    one = Running(tmp_path)
    task = asyncio.create_task(one.ledger.run())
    try:
        yield one
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_plan_that_fails_in_an_unexpected_way_blocks_that_plan_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        one.exchange.broken.add("BADUSDT")
        one.deliver(one.plan("a", "BADUSDT"), one.plan("b", "GOODUSDT"), one.plan("c", "BADUSDT", "UPDATE_SL"))
        await one.settled()
        told = {decision.plan_id: (decision.verdict, decision.reason) for decision in one.decisions()}
        assert told == {"a": ("BLOCK", "evaluation_error"), "b": ("EXECUTE", None), "c": ("EXECUTE", None)}
        assert [error.kind for error in one.errors()] == ["evaluation_error"]
        assert one.governor._waiting == 0


async def test_a_plan_whose_deciding_raises_is_blocked_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from governor import decider  # noqa: PLC0415

    real = decider.decide

    def decide(state: Any, plan: Any, *rest: Any, **more: Any) -> Any:
        if plan.plan_id == "poison":
            raise ZeroDivisionError
        return real(state, plan, *rest, **more)

    monkeypatch.setattr(decider, "decide", decide)
    async with running(tmp_path) as one:
        poison = one.plan("poison", "BTCUSDT", "UPDATE_SL")
        one.deliver(one.plan("before", "BTCUSDT", "UPDATE_SL"), poison, one.plan("after", "BTCUSDT", "UPDATE_SL"))
        await one.settled()
        assert [(d.plan_id, d.reason) for d in one.decisions()] == [
            ("before", None),
            ("poison", "evaluation_error"),
            ("after", None),
        ]
        assert Ack(KEYS.plans, GROUP, poison.entry_id) in one.store.acknowledged


async def test_a_slow_symbol_does_not_hold_up_another(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        one.exchange.held["SLOWUSDT"] = asyncio.Event()
        one.deliver(one.plan("slow", "SLOWUSDT"), one.plan("quick", "QUICKUSDT"))
        await one.settled("QUICKUSDT")
        assert [d.plan_id for d in one.decisions()] == ["quick"]
        one.exchange.held["SLOWUSDT"].set()
        await one.settled()
        assert [d.plan_id for d in one.decisions()] == ["quick", "slow"]


async def test_plans_of_one_symbol_are_decided_in_order_each_on_fresh_market_data(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        one.deliver(*(one.plan(f"p{n}", "BTCUSDT", "UPDATE_SL" if n % 3 else "PARTIAL_25") for n in range(40)))
        await one.settled()
        assert [d.plan_id for d in one.decisions()] == [f"p{n}" for n in range(40)]
        assert len(one.exchange.asked) == 14


async def test_the_exchange_is_not_asked_where_an_earlier_gate_fails(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        one.deliver(
            one.plan("a", "BTCUSDT", "NOBODY_KNOWS"),
            one.plan("b", "BTCUSDT", decision="SKIP"),
            one.plan("c", "BTCUSDT", kill_score="NaN"),
            one.plan("d", "BTCUSDT", "UPDATE_SL"),
        )
        await one.settled()
        assert one.exchange.asked == []


async def test_a_redelivered_entry_is_acknowledged_without_an_event(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        plan = one.plan("a", "BTCUSDT", "UPDATE_SL")
        one.deliver(plan, plan)
        await one.settled()
        seq = one.ledger.state.seq
        one.deliver(plan)
        await one.settled()
        assert (len(one.decisions()), one.ledger.state.seq) == (1, seq)


async def test_reading_pauses_while_too_many_plans_wait_and_goes_on_after(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        one.exchange.held["SLOWUSDT"] = asyncio.Event()
        one.deliver(*(one.plan(f"p{n}", "SLOWUSDT") for n in range(WAITING_MOST)))
        assert not one.governor._room.is_set()
        one.exchange.held["SLOWUSDT"].set()
        await one.settled()
        assert one.governor._room.is_set()
        assert one.governor._waiting == 0


async def test_an_entry_trimmed_while_pending_is_told_as_lost(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        one.deliver(Delivery(KEYS.plans, "1-1", None))
        await one.settled()
        assert [error.kind for error in one.errors()] == ["plan_lost"]
        assert one.ledger.state.counts.lost == 1
