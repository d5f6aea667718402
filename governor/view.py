"""The live view's picture: lines of text that fit a terminal of any size.

`governor status --watch` and the demo show the same one. It is drawn from what `governor.status.describe` tells, and
`note` is told every event.
"""

from __future__ import annotations

import datetime as dt
import textwrap
from collections import deque
from collections.abc import Sequence
from decimal import ROUND_DOWN, Decimal
from typing import Any

import msgspec
from rich.text import Text

from events.decimals import text
from events.types import Decision, Event, Recorded
from governor.last_disarm import LastDisarm, fold
from governor.levels import colour_of, level_of
from governor.readiness import Readiness
from governor.telling import clean, span

COLOURS = {"ARMED": "green", "THROTTLED": "yellow", "DISARMED": "red"}
ICONS = {"ARMED": "●", "THROTTLED": "◐", "DISARMED": "■"}
_WORD = 15
_KEPT = 300
_TALL = 32
"""Rows from which on the state takes three of them."""
_SHORT = 16
"""Rows below which what can be done without is left out."""
_WIDE = 110
"""Columns from which on quantities are shown."""
_ORDINARY_BUT_SHOWN = frozenset({"REARMED", "RECOVERED", "PERMIT_EXPIRED", "PERMIT_CONSUMED", "DRIFT_ENDED",
                                 "APPLY_MODE_RESTORED"})  # fmt: skip
_WORDS = ("plan_id", "symbol", "source", "kind", "detail", "reason", "operator", "action_taken", "step", "error",
          "apply_mode", "count")  # fmt: skip


class Around(msgspec.Struct, frozen=True):
    """What a picture shows beside the state. Times are microseconds since the epoch."""

    now: int
    place: str = ""
    """Where the events come from."""
    heard_at: int | None = None
    """When the events were last heard of; None: never yet."""
    problem: str | None = None
    """Why they are not heard of now."""
    stale: bool = False
    daemon: Readiness | None = None
    """What the daemon says of itself; None while it was not asked."""
    halted: str | None = None
    """The emergency brake, if it is set."""
    apply_mode: str | None = None
    tells: str = ""
    """What is going on, in a demo."""
    hint: str = ""
    """What can be pressed."""


class View:
    """Draws pictures.

    Args:
        plain: for a terminal that cannot show more than ASCII.
    """

    def __init__(self, *, plain: bool = False) -> None:
        self.last_disarm: LastDisarm | None = None
        self._events: deque[Recorded] = deque(maxlen=_KEPT)
        self._full, self._empty = ("#", ".") if plain else ("█", "░")
        self._plain = plain

    def begin(self, last: LastDisarm | None, before: Sequence[Recorded]) -> None:
        """Start anew, with the last disarm and the events from before."""
        self._events.clear()
        for recorded in before:
            self.note(recorded)
        self.last_disarm = last

    def note(self, recorded: Recorded) -> None:
        """Take in an event."""
        self.last_disarm = fold(self.last_disarm, recorded)
        if worth_seeing(recorded.event):
            self._events.append(recorded)

    def lines(self, told: dict[str, Any] | None, around: Around, *, width: int, height: int) -> list[Text]:
        """The whole picture, at most `height` lines and `width` columns. `told` is None before the first news."""
        top = self._banner(told, around, width, tall=height >= _TALL)
        foot = [_footer(told, around, width)]
        if told is None or told["state"] is None:
            return _fitted([*top, *_loud(told, around, width), *_daemon(around, width)], foot, width, height)
        top += [_since(told, around), *_loud(told, around, width), *_daemon(around, width)]
        top += [_disarm(self.last_disarm, told), *self._totals(told, width, short=height < _SHORT)]
        rest = max(0, height - len(top) - len(foot))
        symbols, permits = self._symbols(told, around, width), _permits(told, around.now)
        if height < _SHORT and not told["permits"]:
            permits = []
        for_events = min(len(self._events) + 1, max(4, rest // 3))
        symbols = _cut(symbols, max(2, rest - len(permits[:3]) - for_events), "symbols")
        permits = _cut(permits, max(1, rest - len(symbols) - for_events), "permits")
        left = rest - len(symbols) - len(permits) - 1
        shown = [event_text(recorded) for recorded in list(self._events)[-left:]] if left > 0 else []
        middle = [*symbols, *permits, Text("plans and verdicts", style="dim underline"), *shown]
        return _fitted([*top, *middle], foot, width, height)

    def _banner(self, told: dict[str, Any] | None, around: Around, width: int, *, tall: bool) -> list[Text]:
        """The state, as word, icon and colour, over the whole width."""
        state = None if told is None else told["state"]
        if around.stale or state is None:
            icon, word = "!" if self._plain else "▲", "STALE" if state is not None else "NO DATA"
            gone = "" if around.heard_at is None else f"for {_ago(around, around.heard_at)}"
            colour, why = "magenta", "" if state is None else f"{gone}  last known: {state}"
        else:
            icon = {"ARMED": "*", "THROTTLED": "~", "DISARMED": "#"}[state] if self._plain else ICONS[state]
            word, colour, why = state, COLOURS[state], _why(told)
        style = f"bold reverse {colour}"
        epoch = "" if told is None or state is None else f"epoch {told['epoch']} "
        row = Text(f" {icon} {word}  {why}", style=style)
        row.truncate(max(0, width - len(epoch) - 1), overflow="ellipsis")
        row.append(" " * max(0, width - row.cell_len - len(epoch)) + epoch)
        blank = Text(" " * width, style=style)
        return [blank, row, blank.copy()] if tall else [row]

    def _totals(self, told: dict[str, Any], width: int, *, short: bool) -> list[Text]:
        """Errors and totals against their limits, and what became of all plans, where there is room for it."""
        cells, counts = 10 if width >= _WIDE else 5, told["counts"]
        limits = Text.assemble(
            "errors ", self._bar(told["errors"], cells),
            "   all symbols today ", self._bar(told["total_daily_notional"], cells), " USD",
        )  # fmt: skip
        plans = Text(f"{counts['plans']} plans = {counts['allowed']} allowed + {counts['blocked']} blocked + "
                     f"{counts['skipped']} skipped; {counts['rejected']} rejected")  # fmt: skip
        if limits.cell_len + 3 + plans.cell_len <= width:
            return [Text.assemble(limits, "   ", plans)]
        return [limits] if short else [limits, plans]

    def _symbols(self, told: dict[str, Any], around: Around, width: int) -> list[Text]:
        """A line a symbol, the last active first: windows and totals as bars, and when it is allowed again."""
        if not told["symbols"]:
            return [Text("no symbol has traded yet", style="dim")]
        names = ["exec_1h", "exec_5min", "daily_notional", *(["daily_qty"] if width >= _WIDE else [])]
        titles = ["1 h", "5 min", "USD today", "quantity today"]
        first = min(14, max(6, *(len(symbol) for symbol in told["symbols"])))
        column = max(6, (width - first - 16) // len(names) - 2)
        head = Text(f"{'symbol':<{first}}  " + "".join(f"{title:<{column}}  " for title in titles[: len(names)])
                    + "next allowed", style="dim underline")  # fmt: skip
        found = [head]
        for symbol, values in reversed(told["symbols"].items()):
            row = Text(f"{_short(clean(symbol), first):<{first}}  ")
            for name in names:
                bar = self._bar(values[name], min(16, column - 5), room=column)
                bar.truncate(column, overflow="ellipsis")
                row.append_text(bar).append(" " * (column - bar.cell_len + 2))
            found.append(row.append_text(_next(values, told, halted=around.halted is not None)))
        return found

    def _bar(self, pair: dict[str, Any], cells: int, *, room: int = 1000) -> Text:
        """Used of a limit, as a bar of at most `cells` and as numbers, in `room` columns; the numbers come first."""
        used, limit = Decimal(pair["used"]), pair["limit"]
        if limit is None:
            return Text(f"{_amount(used)}/off")
        share = float(used / limit) if limit else 1.0
        colour = "red" if share >= 1 else "yellow" if share >= 0.8 else "green"
        numbers = f"{_amount(used)}/{_amount(Decimal(limit))}"
        cells = min(cells, room - len(numbers) - 1)
        if cells < 3:
            return Text(numbers, style=colour)
        filled = min(cells, int(share * cells) or bool(used))  # never full before it is
        bar = Text.assemble((self._full * filled, colour), (self._empty * (cells - filled), "dim"))
        return bar.append(" ").append(numbers, "" if share < 0.8 else colour)


def worth_seeing(event: Event) -> bool:
    """Whether it says something to a person who watches: verdicts, permits' ends, and all that is not ordinary."""
    return isinstance(event, Decision) or level_of(event) != "info" or event.NAME in _ORDINARY_BUT_SHOWN


def event_text(recorded: Recorded) -> Text:
    """An event as a line."""
    event = recorded.event
    if isinstance(event, Decision):
        permitted = event.verdict == "EXECUTE"
        amount = (
            f"{_digits(event.computed_qty)} ({_digits(event.computed_notional)} USD)" if permitted else event.reason
        )
        word, rest = event.verdict, f"{event.plan_id:<12} {event.symbol:<9} {amount}  {event.action}"
    else:
        values = [getattr(event, name, None) for name in _WORDS]
        word, rest = event.NAME, " ".join(str(value) for value in values if value is not None)
    skipped = isinstance(event, Decision) and event.verdict == "SKIP"
    style = "dim" if skipped else f"bold {colour_of(event) or 'cyan'}"
    return Text.assemble((f"{_clock(recorded.at)} ", "dim"), (f"{word:<{_WORD}} ", style), clean(rest))


def _why(told: dict[str, Any] | None) -> str:
    if told is None or not told["reason"]:
        return ""
    context = (told["disarm"] or {}).get("context") or {}
    shown = " ".join(f"{name}={value}" for name, value in context.items() if name not in ("noted_us", "reason"))
    return clean(f"{told['reason']}  {shown}")


def _since(told: dict[str, Any], around: Around) -> Text:
    at = round(told["since"] * 1e6)
    found = Text.assemble("since ", (_utc(at), "bold"), f" ({_ago(around, at)})")
    if told["disarm"] and told["disarm"]["operator"]:
        found.append(f", by {clean(told['disarm']['operator'])}")
    if told["throttle"] is not None:
        causes = ", ".join(f"{cause['reason']} ({cause['symbol'] or 'all'})" for cause in told["throttle"]["causes"])
        left = _whole(told["throttle"]["until"] - around.now / 1e6)
        found.append(f", throttled for {left} more: {clean(causes)}", "yellow")
    if around.apply_mode is not None:
        found.append("   Apply Layer: ").append(clean(around.apply_mode), "bold red" if around.apply_mode == "dry_run"
                                                else "bold green")  # fmt: skip
    return found


def _loud(told: dict[str, Any] | None, around: Around, width: int) -> list[Text]:
    """What must not be overlooked: in full, in as many lines as that takes."""
    found = []
    if around.stale:
        since = "yet" if around.heard_at is None else f"since {_utc(around.heard_at)}"
        found.append(f"STALE: no answer from Redis at {around.place} {since}, trying again: {_one(around.problem)}")
    elif told is None or told["state"] is None:
        found.append(f"no event at {around.place}: no daemon has ever run here" if around.heard_at is not None
                     else f"reading the events at {around.place}")  # fmt: skip
    if around.halted is not None:
        found.append(f"EMERGENCY BRAKE: {clean(around.halted)}")
    if told is not None and told["state"] is not None:
        found += _told_loud(told, around)
    return _wrapped(found, width)


def _told_loud(told: dict[str, Any], around: Around) -> list[str]:
    found = []
    disarm = told["disarm"]
    if disarm and not disarm["done"]:
        why = f" after {disarm['attempts']} attempts: {clean(disarm['error'] or '')}" if disarm["attempts"] else ""
        found.append(f"DISARM UNFINISHED{why}: the Apply Layer is not proven to be in dry run")
    if told["drift"] is not None:
        found.append(f"DRIFT: the Apply Layer's file says APPLY_MODE={clean(told['drift'])}, set by hand")
    if told["hold_until"] is not None:
        found.append(f"no permits for {_whole(told['hold_until'] - around.now / 1e6)} more: history was lost")
    return found


def _daemon(around: Around, width: int) -> list[Text]:
    daemon = around.daemon
    if daemon is None:
        return []
    if not daemon.ready:
        word = "daemon NOT READY" if daemon.answers else "DAEMON DOES NOT ANSWER"
        return _wrapped([f"{word}: {clean('; '.join(daemon.problems))}"], width)
    found = Text.assemble("daemon ", ("ready, active" if daemon.active else "ready, standby", "green"))
    return [found.append("".join(f"   {clean(note)}" for note in daemon.notes), "yellow")]


def _disarm(last: LastDisarm | None, told: dict[str, Any]) -> Text:
    """The last disarm, and whether it is proven."""
    found = Text("last disarm ")
    if last is None:
        return found.append("none" if not told["counts"]["disarms"] else "long ago", "dim")
    found.append(f"{_utc(last.at)}, ")
    if last.proven_at is None:
        failed = f" after {last.attempts} attempts: {clean(last.error or '')}" if last.attempts else ""
        found.append(f"NOT PROVEN{failed}", "bold red")
    else:
        found.append(f"proven {span((last.proven_at - last.at) / 1e6)} later", "green")
    if last.rearmed_at is not None:
        found.append(f", re-armed {_clock(last.rearmed_at)}Z")
    return found.append(
        f": {clean(last.reason)}" + ("" if last.action_taken is None else f", {clean(last.action_taken)}")
    )


def _permits(told: dict[str, Any], now: int) -> list[Text]:
    if not told["permits"]:
        return [Text("no permit outstanding", style="dim")]
    found = [Text(f"{len(told['permits'])} outstanding permits", style="dim underline")]
    for permit in told["permits"]:
        left = max(0.0, permit["expires_at"] - now / 1e6)
        amount = f"{_digits(permit['qty'])} ({_digits(permit['notional'])} USD)"
        what = clean(f"{permit['plan_id']:<12} {permit['symbol']:<9} {amount}")
        found.append(Text.assemble((f"{left:>4.0f} s  ", "bold"), what))
    return found


def _next(values: dict[str, Any], told: dict[str, Any], *, halted: bool) -> Text:
    if values["next_allowed"] is None:
        return Text("never", style="red")
    wait = values["next_allowed"] - told["time"]
    if wait <= 0:
        if told["state"] == "DISARMED":
            return Text("once re-armed", style="red")
        shut = "brake is set" if halted else "held back" if told["hold_until"] is not None else ""
        return Text(shut, style="red") if shut else Text("now", style="green")
    minutes = -(-wait // 60)
    found = Text(f"in {span(minutes * 60) if minutes > 1 else _whole(max(1.0, wait))}", style="yellow")
    return found.append("  throttled" if values["throttled"] else "", "yellow")


def _footer(told: dict[str, Any] | None, around: Around, width: int) -> Text:
    """What is going on or can be pressed; behind it, as far as there is room, where and when that is."""
    left = _short(around.tells or around.hint, width)
    seq = [] if told is None or told["state"] is None else [f"event {told['seq']}"]
    parts = [*seq, around.place, f"{_clock(around.now)} UTC"]
    while parts and len(left) + 2 + len("   ".join(parts)) > width:
        parts.pop(0)
    right = "   ".join(parts)
    return Text(left + " " * (width - len(left) - len(right)) + right, style="dim")


def _fitted(body: list[Text], foot: list[Text], width: int, height: int) -> list[Text]:
    """As many lines as there is room for; the last line stays the last."""
    room = max(1, height - len(foot))
    found = body[:room] + [Text("")] * (room - len(body)) + foot
    for line in found:
        line.truncate(width, overflow="ellipsis")
    return found[:height]


def _cut(lines: Sequence[Text], most: int, what: str) -> list[Text]:
    """The first ones, and how many more there are; the first line is a heading."""
    if len(lines) <= most:
        return list(lines)
    kept = max(1, most - 1)
    return [*lines[:kept], Text(f"and {len(lines) - kept} more {what}", style="dim")][:most]


def _wrapped(lines: Sequence[str], width: int) -> list[Text]:
    return [Text(row, style="bold red") for line in lines for row in textwrap.wrap(line, max(20, width))]


def _amount(value: Decimal) -> str:
    """An amount as short as it may be without lying about a limit that is reached."""
    return text(value.quantize(Decimal("0.01"), ROUND_DOWN)).removesuffix(".00") if value >= 100 else text(value)


def _digits(value: Decimal | None) -> str:
    return "?" if value is None else text(value)


def _short(value: str, width: int) -> str:
    return value if len(value) <= width else value[: max(0, width - 1)] + "…" * (width > 0)


def _one(problem: str | None) -> str:
    return clean(problem or "silence")


def _ago(around: Around, at: int) -> str:
    seconds = (around.now - at) / 1e6
    return _whole(seconds if seconds < 120 else seconds // 60 * 60)


def _whole(seconds: float) -> str:
    """A duration in whole seconds: what changes faster nobody reads, and every change is sent over the line."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else span(whole)


def _clock(at: int) -> str:
    return dt.datetime.fromtimestamp(at / 1e6, dt.UTC).strftime("%H:%M:%S")


def _utc(at: int) -> str:
    return dt.datetime.fromtimestamp(at / 1e6, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
