"""What a what-if audit tells: the outcome as frozen values, and its table for a reader."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from functools import reduce
from types import MappingProxyType

import msgspec

from events.decimals import ZERO, text, total
from events.types import Context
from governor.times import utc

ASSUMPTIONS: Mapping[str, str] = MappingProxyType({
    "positions": "plans decided with the last recorded position and price: the exchange was not asked at the time",
    "positions_unknown": "plans blocked because the exchange had never told the symbol's position before",
    "consumption": "permits taken for consumed at the end of their time: nobody can know whether they would have been",
    "results_left_out": "recorded results left out: their plans are permitted in one of the two worlds only",
    "apply_mode": "decisions under an assumed APPLY_MODE: the recorded one follows from disarms that are not the same",
    "rearms": "re-arms assumed after disarms that only the other world has",
    "taken_as_recorded": "plans that cannot be decided again and were taken as recorded",
})  # fmt: skip
"""What is counted under `Outcome.assumptions`, for a reader."""


class Verdict(msgspec.Struct, frozen=True):
    """A verdict and its reason."""

    verdict: str
    reason: str | None


class Assumed(msgspec.Struct, frozen=True, kw_only=True):
    """Market data nobody asked for at the time. None in every field: it had never been asked for before."""

    position_amt: Decimal | None = None
    """Size of the position the plan touches, base units."""
    mark_price: Decimal | None = None
    """USD; None also where that answer held none."""
    seq: int | None = None
    """Of the decision that recorded it."""
    age_s: float | None = None
    """How old it was, seconds."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that would have been decided otherwise."""

    plan_id: str
    seq: int
    """Of its recorded decision."""
    at: float
    """Unix seconds."""
    symbol: str
    recorded: Verdict
    computed: Verdict
    assumed: Assumed | None
    """None: it was decided with what the exchange had told, or without it."""


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """Granted and not taken back, and what was executed after it had been taken back."""

    executions: int = 0
    notional: Decimal = ZERO
    """USD; 0 where there was no price."""
    quantity: Decimal = ZERO
    """Base units."""


class MovedBoth(msgspec.Struct, frozen=True, kw_only=True):
    """The same as recorded and under the other settings."""

    recorded: Moved = Moved()
    computed: Moved = Moved()


class Disarmed(msgspec.Struct, frozen=True, kw_only=True):
    """One disarm, as recorded or under the other settings."""

    seq: int
    """Of the recorded event that is, or led to, the disarm."""
    at: float
    """Unix seconds."""
    reason: str
    context: Context
    matched: bool
    """Whether both settings disarm here. If not it is avoided (recorded) or added (computed)."""
    already: bool
    """Not matched because it is disarmed already under the other settings."""


class SecondsBoth(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds in a state."""

    recorded: float
    computed: float


class StatesBoth(msgspec.Struct, frozen=True, kw_only=True):
    """The state at the end."""

    recorded: str
    computed: str


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of the UTC day over time: steps of (unix seconds, value from then on)."""

    symbol: str | None
    """None: over all symbols."""
    unit: str
    """`USD`, or `base units` for a symbol that never had a price."""
    recorded: tuple[tuple[float, float], ...]
    computed: tuple[tuple[float, float], ...]
    recorded_limit: tuple[tuple[float, float | None], ...]
    """None: off."""
    computed_limit: tuple[tuple[float, float | None], ...]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """What a picture needs; bounded, however long the history is."""

    start: float
    """Unix seconds."""
    end: float
    panels: tuple[Panel, ...]
    """All symbols first, then those that moved most."""
    recorded_states: tuple[tuple[float, str], ...]
    computed_states: tuple[tuple[float, str], ...]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What would have been otherwise."""

    events: int
    plans: int
    decisions: int
    overrides: dict[str, str]
    limits: dict[str, dict[str, str]] | None
    """Limits of single symbols in place of the recorded ones; None: the recorded ones."""
    differences: tuple[Difference, ...]
    newly_allowed: int
    newly_blocked: int
    reason_changed: int
    """Not allowed in both, for another reason."""
    symbols: dict[str, MovedBoth]
    recorded_disarms: tuple[Disarmed, ...]
    computed_disarms: tuple[Disarmed, ...]
    seconds: dict[str, SecondsBoth]
    """In each state, from the first event to the last."""
    state: StatesBoth
    assumptions: dict[str, int]
    """How often something was assumed, by kind: see ASSUMPTIONS."""
    series: Series

    @property
    def avoided(self) -> tuple[Disarmed, ...]:
        """Recorded disarms the other settings do not have."""
        return tuple(disarm for disarm in self.recorded_disarms if not disarm.matched)

    @property
    def added(self) -> tuple[Disarmed, ...]:
        """Disarms only the other settings have."""
        return tuple(disarm for disarm in self.computed_disarms if not disarm.matched)

    @property
    def changes(self) -> str:
        """What the other settings are, in one line."""
        changes = [f"{name}={value}" for name, value in self.overrides.items()]
        if self.limits is not None:
            changes.append(f"limits of {_number(len(self.limits), 'symbol')}")
        return ", ".join(changes) or "nothing changed"


# -- for a reader --------------------------------------------------------------------------------------------------

SHOWN = 10
"""Rows of each table, unless all are asked for."""


def lines(outcome: Outcome, *, everything: bool = False) -> list[str]:
    """An outcome for a person: the answer first, then what it rests on.

    Args:
        outcome: what was found.
        everything: every symbol, disarm and difference instead of the first ones.
    """
    most = None if everything else SHOWN
    return [
        *_answer(outcome),
        *_symbol_lines(outcome, most),
        *_disarm_lines(outcome, most),
        *_time_lines(outcome),
        *_assumption_lines(outcome),
        *_difference_lines(outcome, most),
    ]


def _answer(outcome: Outcome) -> list[str]:
    was = reduce(total, (both.recorded.notional for both in outcome.symbols.values()), ZERO)
    now = reduce(total, (both.computed.notional for both in outcome.symbols.values()), ZERO)
    of = f" of {_number(outcome.plans, 'plan')}"
    plans = [
        f"{found:,} {what}"
        for found, what in (
            (outcome.newly_allowed, "newly allowed"),
            (outcome.newly_blocked, "newly blocked"),
            (outcome.reason_changed, "not allowed for another reason"),
        )
        if found
    ]
    avoided, added = len(outcome.avoided), len(outcome.added)
    was_disarms, now_disarms = len(outcome.recorded_disarms), len(outcome.computed_disarms)
    return [
        f"what if {outcome.changes}",
        "  plans      " + (", ".join(plans) + of if plans else f"the same verdict and reason for all{of}"),
        f"  notional   {_money(now)} USD instead of {_money(was)} ({_change(was, now)})",
        f"  disarms    {now_disarms} instead of {was_disarms}: {avoided} avoided, {added} added",
        f"  state      {outcome.state.computed} at the end, recorded {outcome.state.recorded}",
    ]


def _symbol_lines(outcome: Outcome, most: int | None) -> list[str]:
    def size(symbol: str) -> tuple[Decimal, Decimal, str]:
        both = outcome.symbols[symbol]
        change = total(both.computed.notional, both.recorded.notional.copy_negate()).copy_abs()
        return -change, -max(both.recorded.notional, both.computed.notional), symbol

    rows = []
    for symbol in sorted(outcome.symbols, key=size):
        was, now = outcome.symbols[symbol].recorded, outcome.symbols[symbol].computed
        rows.append([
            symbol, _money(was.notional), _money(now.notional), _change(was.notional, now.notional),
            text(was.quantity), text(now.quantity), str(was.executions), str(now.executions),
        ])  # fmt: skip
    head = ["moved", "USD recorded", "what if", "change", "qty recorded", "what if", "executions recorded", "what if"]
    return _table(head, rows, most)


def _disarm_lines(outcome: Outcome, most: int | None) -> list[str]:
    found = [(disarm, "avoided") for disarm in outcome.avoided] + [(disarm, "added") for disarm in outcome.added]
    found += [(disarm, "in both") for disarm in outcome.recorded_disarms if disarm.matched]
    rows = []
    for disarm, how in sorted(found, key=lambda pair: pair[0].seq):
        context = " ".join(f"{name}={value}" for name, value in disarm.context.items())
        rows.append([
            utc(disarm.at), how + (" (disarmed already)" if disarm.already else ""), disarm.reason, context,
        ])  # fmt: skip
    return _table(["disarms", "", "reason", ""], rows, most, left=4)


def _time_lines(outcome: Outcome) -> list[str]:
    rows = [
        [name, _span(both.recorded), _span(both.computed), _signed_span(both.computed - both.recorded)]
        for name, both in outcome.seconds.items()
    ]
    return _table(["time in state", "recorded", "what if", "change"], rows, None)


def _assumption_lines(outcome: Outcome) -> list[str]:
    found = [f"  {count:>7,}  {ASSUMPTIONS[kind]}" for kind, count in outcome.assumptions.items() if count]
    return ["", "assumed", *found] if found else ["", "assumed: nothing"]


def _difference_lines(outcome: Outcome, most: int | None) -> list[str]:
    rows = []
    for each in outcome.differences:
        assumed = each.assumed
        if assumed is None:
            how = ""
        elif assumed.seq is None:
            how = "position never told"
        else:
            how = (
                f"assumed: position {assumed.position_amt}, price {assumed.mark_price}, {_span(assumed.age_s or 0)} old"
            )
        was, now = each.recorded, each.computed
        rows.append([
            utc(each.at), each.symbol, each.plan_id, was.reason or was.verdict, "->", now.reason or now.verdict, how,
        ])  # fmt: skip
    return _table(["plans", "symbol", "plan_id", "recorded", "", "what if", ""], rows, most, left=7)


def _table(head: list[str], rows: list[list[str]], most: int | None, *, left: int = 1) -> list[str]:
    """Rows under a head, the first `left` columns flush left; nothing without rows."""
    if not rows:
        return []
    shown = rows[:most]
    widths = [max(len(row[at]) for row in (head, *shown)) for at in range(len(head))]
    found = [
        "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *shown)
    ]
    more = len(rows) - len(shown)
    return ["", *found, *([f"and {more:,} more"] if more else [])]


def _number(count: int, of: str) -> str:
    return f"{count:,} {of}" + ("" if count == 1 else "s")


def _money(amount: Decimal) -> str:
    return f"{amount:,.2f}"


def _change(was: Decimal, now: Decimal) -> str:
    change = total(now, was.copy_negate())
    return f"{change:+,.2f}" if change else "0"


def _span(seconds: float) -> str:
    """`1d 02:03:04`, tenths below a minute."""
    if 0 < seconds < 60:
        return f"{seconds:.1f} s"
    days, rest = divmod(round(seconds), 86_400)
    return (f"{days}d " if days else "") + f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def _signed_span(seconds: float) -> str:
    return "0" if not seconds else ("+" if seconds > 0 else "-") + _span(abs(seconds))
