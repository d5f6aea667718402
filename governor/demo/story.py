"""What happens in the demo: the proposals of one busy minute, and the person who re-arms."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

Proposal = dict[str, Any]


class Scene(NamedTuple):
    """Proposals published together, so many seconds after the start."""

    at: float
    proposals: list[Proposal]
    tells: str


REARM_AFTER_S = 11.0
"""How long the person takes to look at a disarm."""


def scenes() -> Iterator[Scene]:
    """The first minute, then a slow trickle of whatever a bot might want."""
    yield Scene(1, [_plan("btc-1", "BTCUSDT", "PARTIAL_25")], "a quarter of the position: permitted")
    yield Scene(3, [_plan("ltc-1", "LTCUSDT", "PARTIAL_50")], "another symbol, another window")
    yield Scene(
        5, [_plan("ada-1", "ADAUSDT", "PARTIAL_25", forgets=True)], "permitted, but the client never comes for it"
    )
    yield Scene(7, [_plan("btc-2", "BTCUSDT", "PARTIAL_25", decision="SKIP")], "not meant to trade: skipped")
    yield Scene(9, [_plan("btc-3", "BTCUSDT", "UPDATE_SL", kill_score=0.91)], "kill score critical: only closes pass")
    yield Scene(11, [_plan("ltc-1", "LTCUSDT", "PARTIAL_50")], "the same plan again: once is enough")
    yield Scene(13, [_plan("sol-1", "SOLUSDT", "FULL_CLOSE_PROPOSED")], "nothing there to close")
    yield Scene(15, [_plan("ltc-2", "LTCUSDT", "MARTINGALE")], "an action nobody knows")
    yield Scene(17, [_plan("btc-4", "BTCUSDT", "UPDATE_SL", new_sl=16900)], "a trailed stop has a window of its own")
    yield Scene(20, [_plan("ltc-3", "LTCUSDT", "PARTIAL_75", kill_score="NaN")], "a kill score that is no number")
    yield Scene(23, [_plan("eth-1", "ETHUSDT", "FULL_CLOSE_PROPOSED")], "more than a day may move: blocked, throttled")
    yield Scene(27, [_plan("ada-2", "ADAUSDT", "PARTIAL_50")], "room again: the unused permit was taken back")
    burst = [_plan(f"ltc-burst-{n}", "LTCUSDT", "PARTIAL_25") for n in (1, 2)]
    yield Scene(33, burst, "a burst: third execution within five minutes")
    yield Scene(39, [_plan("btc-5", "BTCUSDT", "PARTIAL_25")], "disarmed: nothing passes")
    yield Scene(50, [_plan("btc-6", "BTCUSDT", "PARTIAL_25")], "armed again by a person: permitted")
    yield Scene(53, [_plan("ada-3", "ADAUSDT", "PARTIAL_25")], "and on")
    chance = random.Random(7)  # noqa: S311 - a story, no secret
    for n in range(1, 10_000):
        symbol = chance.choice(["BTCUSDT", "LTCUSDT", "ADAUSDT"])
        action = chance.choice(["PARTIAL_25", "PARTIAL_50", "UPDATE_SL"])
        # With three executions an hour, most of an hour is waiting.
        decision = "EXECUTE" if n % 4 == 0 else "SKIP"
        plan = _plan(f"{symbol[:3].lower()}-more-{n}", symbol, action, decision=decision)
        yield Scene(54 + 6.0 * n, [plan], "life goes on")


def _plan(plan_id: str, symbol: str, action: str, **more: Any) -> Proposal:
    return {"plan_id": plan_id, "symbol": symbol, "action": action, **more}
