"""The state as a reader wants it: used, limit and what is left, and when there is room again."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from events.decimals import ZERO, total
from events.keys import day_of
from governor import policy
from governor.policy import Limits, Policy
from projections import errors, totals, windows
from projections.state import Book, State


def policy_of(state: State, default: Policy) -> Policy:
    """The policy in force according to the events, else `default`."""
    loaded = state.settings
    return policy.from_texts(loaded.settings, loaded.limits) if loaded is not None else default


def describe(state: State, rules: Policy, now: int) -> dict[str, Any]:
    """Everything `governor status` tells, as plain JSON values (decimals stay decimals)."""
    mode, at = state.mode, max(now, state.time)
    disarm = mode.disarm
    limit = rules.total_notional_per_day
    return {
        "state": mode.state,
        "since": unix(mode.since),
        "reason": mode.reason,
        "epoch": mode.epoch,
        "seq": state.seq,
        "hash": state.hash,
        "time": unix(at),
        "throttle": None
        if mode.until is None
        else {
            "until": unix(mode.until),
            "causes": [{"symbol": symbol, "reason": reason} for symbol, reason in mode.causes],
        },
        "disarm": None
        if disarm is None
        else {
            "reason": disarm.reason,
            "context": disarm.context,
            "manual": disarm.manual,
            "operator": disarm.operator,
            "done": disarm.done,
            "attempts": disarm.attempts,
            "error": disarm.error,
            "notes": list(disarm.notes),
        },
        "drift": mode.drift,
        "hold_until": unix(state.hold_until) if state.hold_until > now else None,
        "symbols": {
            symbol: symbol_status(book, rules.of(symbol), at, rules, throttled=mode.throttles(symbol))
            for symbol, book in state.books.items()
        },
        "total_daily_notional": amount(totals.on(state.days, day_of(at)).notional, limit),
        "errors": {
            "used": errors.count(state.errors, now=at, window=rules.error_window_us),
            "limit": rules.disarm_on_errors,
        },
        "permits": [
            {"plan_id": plan_id, "symbol": held.symbol, "qty": held.quantity, "notional": held.notional,
             "expires_at": unix(held.expires_us)}
            for plan_id, held in state.permits.items()
        ],
        "counts": {name: getattr(state.counts, name) for name in state.counts.__struct_fields__},
        "settings": state.settings.digest if state.settings is not None else None,
    }  # fmt: skip


def describe_live(state: State, rules: Policy, now: int) -> dict[str, Any]:
    """The same of a stream as it is, where an empty one has no state: nobody ever ran there."""
    told = describe(state, rules, now)
    return told if state.seq else told | {"state": None, "since": None, "epoch": None}


def symbol_status(book: Book, limits: Limits, at: int, rules: Policy, *, throttled: bool) -> dict[str, Any]:
    """Windows and totals of one symbol against its limits."""
    today = totals.on(book.days, day_of(at))
    per_5min = limits.per_5min
    if throttled and rules.throttle_per_5min is not None:
        per_5min = rules.throttle_per_5min if per_5min is None else min(per_5min, rules.throttle_per_5min)
    waits = [
        windows.next_free(book.executions, now=at, window=window, limit=limit)
        for window, limit in ((windows.HOUR_US, limits.per_hour), (windows.FIVE_MINUTES_US, per_5min))
        if limit is not None
    ]
    never = None in waits
    return {
        "exec_1h": window_status(book.executions, at, windows.HOUR_US, limits.per_hour),
        "exec_5min": window_status(book.executions, at, windows.FIVE_MINUTES_US, limits.per_5min),
        "daily_notional": amount(today.notional, limits.notional_per_day),
        "daily_qty": amount(today.quantity, limits.qty_per_day),
        "next_allowed": None if never else unix(max((w for w in waits if w is not None), default=at)),
        "throttled": throttled,
    }


def window_status(times: tuple[int, ...], at: int, window: int, limit: int | None) -> dict[str, Any]:
    """Executions in a window, the limit, and what is left of it."""
    used = windows.count(times, now=at, window=window)
    return {"used": used, "limit": limit, "left": None if limit is None else max(0, limit - used)}


def amount(used: Decimal, limit: Decimal | None) -> dict[str, Any]:
    """An amount used today, its limit, and what is left of it."""
    return {
        "used": used,
        "limit": limit,
        "left": None if limit is None else max(ZERO, total(limit, used.copy_negate())),
    }


def unix(at: int) -> float:
    """Unix seconds."""
    return at / 1_000_000
