"""The public keys of the contract as a view of the state.

A key is always written whole, from the state, so writing it twice is writing it once and a deleted key heals
with the next event that touches it. Which keys an event touches is told here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import lru_cache
from typing import assert_never

from events.codec import dumps, seconds
from events.decimals import text
from events.keys import DAY_US, Keys, day_of
from events.store import Write
from events.types import (
    ApplyModeDrifted,
    ApplyModeRestored,
    AutoDisarm,
    Decision,
    DisarmFailed,
    DisarmStarted,
    DriftEnded,
    ErrorRecorded,
    Event,
    Execution,
    HistoryAccepted,
    HistoryRestored,
    ManualDisarm,
    PermitConsumed,
    PermitExpired,
    PermitRevoked,
    PlanLost,
    PlanReceived,
    PlanRejected,
    Rearmed,
    Recovered,
    SettingsLoaded,
    Throttled,
    UnpermittedExecution,
)
from projections import windows
from projections.state import State

DAY_MS = 86_400_000


def touched(events: Iterable[Event]) -> tuple[set[str], bool]:
    """Symbols whose keys may have changed, and whether the state did."""
    symbols: set[str] = set()
    mode = False
    for event in events:
        match event:
            case Decision():
                if event.verdict == "EXECUTE":
                    symbols.add(event.symbol)
            case PermitExpired():
                symbols.add(event.symbol)
            case Execution():
                if event.counted:
                    symbols.add(event.symbol)
            case Throttled() | Recovered() | DisarmStarted() | Rearmed() | SettingsLoaded():
                mode = True
            case (
                PlanReceived()
                | PlanRejected()
                | PlanLost()
                | PermitConsumed()
                | PermitRevoked()
                | UnpermittedExecution()
                | ErrorRecorded()
                | AutoDisarm()
                | ManualDisarm()
                | DisarmFailed()
                | ApplyModeDrifted()
                | DriftEnded()
                | ApplyModeRestored()
                | HistoryRestored()
                | HistoryAccepted()
            ):
                pass
            case _:
                assert_never(event)
    return symbols, mode


def writes(before: State, after: State, events: Iterable[Event], keys: Keys) -> list[Write]:
    """Everything to write in the commit that leads from `before` to `after` by `events`."""
    symbols, mode = touched(events)
    found = []
    for symbol in sorted(symbols):
        found += symbol_writes(after, symbol, keys, there=[day.day for day in before.book(symbol).days])
    if mode:
        found.append(state_write(after, keys))
        if before.mode.disarm is not None and after.mode.disarm is None:
            days = {day_of(before.mode.disarm.at), day_of(after.time)}
            found += [Write("del", keys.disarm(day)) for day in sorted(days)]
        elif after.mode.disarm is not None:
            found.append(disarm_write(after, keys))
    return found


@lru_cache(maxsize=100_000)
def _seconds(time: int) -> bytes:
    """The same executions are written again with each new one."""
    return seconds(time).encode()


def state_write(state: State, keys: Keys) -> Write:
    """`quantum:governor:state`."""
    mode = state.mode
    content = {
        "state": mode.state,
        "since": _unix(mode.since),
        "reason": mode.reason,
        "epoch": mode.epoch,
        "seq": mode.seq,
    }
    return Write("set", keys.state, (dumps(content),))


def disarm_write(state: State, keys: Keys) -> Write:
    """`quantum:governor:disarm:<date>` of the disarm in force.

    Raises:
        ValueError: there is none.
    """
    disarm = state.mode.disarm
    if disarm is None:
        raise ValueError("no disarm is in force")
    content = {"reason": disarm.reason, "context": disarm.context, "timestamp": _unix(disarm.at)}
    return Write("set", keys.disarm(day_of(disarm.at)), (dumps(content),), DAY_MS)


def symbol_writes(state: State, symbol: str, keys: Keys, *, there: Container[int] | None = None) -> list[Write]:
    """`exec`, `daily` and `daily_qty` of one symbol: the list newest first, the totals of today and yesterday.

    Args:
        state: to be shown.
        symbol: which.
        keys: their names.
        there: days of which there are totals, None for any: only those are deleted.
    """
    book = state.book(symbol)
    newest = tuple(map(_seconds, reversed(book.executions[-windows.KEPT :])))
    found = [Write("list", keys.executions(symbol), newest, DAY_MS)]
    today = day_of(state.time)
    days = {counted.day: counted for counted in book.days}
    for day in (today - 1, today):
        if (counted := days.get(day)) is not None:
            notional, quantity = text(counted.notional).encode(), text(counted.quantity).encode()
            found.append(Write("set", keys.daily(symbol, day), (notional,), DAY_MS))
            found.append(Write("set", keys.daily_qty(symbol, day), (quantity,), DAY_MS))
        elif there is None or day in there:
            found += [Write("del", keys.daily(symbol, day)), Write("del", keys.daily_qty(symbol, day))]
    return found


def expected(state: State, keys: Keys, now: int) -> dict[str, Write]:
    """Every public key the events ask for at `now` (microseconds), as the write that makes it.

    That is the state, the disarm of the last day, and of each symbol the executions of the last day and today's totals.
    """
    wanted = [state_write(state, keys)]
    if state.mode.disarm is not None and now - state.mode.disarm.at < DAY_US:
        wanted.append(disarm_write(state, keys))
    today = day_of(max(now, state.time))
    for symbol, book in state.books.items():
        current = {keys.daily(symbol, today), keys.daily_qty(symbol, today)}
        if book.executions and now - book.executions[-1] < DAY_US:
            current.add(keys.executions(symbol))
        wanted += [w for w in symbol_writes(state, symbol, keys) if w.op != "del" and w.key in current]
    return {write.key: write for write in wanted}


def _unix(at: int) -> float:
    return at / 1_000_000
