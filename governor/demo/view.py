"""The live view: the state, windows and totals as bars, plans and verdicts as they come, permits with their seconds."""

from __future__ import annotations

import datetime as dt
from collections import deque
from decimal import Decimal
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from events.types import Decision, Recorded
from governor.policy import Policy
from governor.status import describe
from projections.state import State

COLOURS = {"ARMED": "green", "THROTTLED": "yellow", "DISARMED": "red"}
ICONS = {"ARMED": "●", "THROTTLED": "◐", "DISARMED": "■"}
_ALWAYS = (
    "DISARM_STARTED", "AUTO_DISARM", "MANUAL_DISARM", "DISARM_FAILED", "REARMED", "THROTTLED", "RECOVERED",
    "PLAN_REJECTED", "PERMIT_EXPIRED", "PERMIT_CONSUMED", "PERMIT_REVOKED", "UNPERMITTED_EXECUTION",
)  # fmt: skip


class View:
    """Renders a state; `note` is told every event."""

    def __init__(self, *, lines: int = 12) -> None:
        self.tells = ""
        self._events: deque[Text] = deque(maxlen=lines)

    def note(self, recorded: Recorded) -> None:
        """Keep a line about an event worth seeing."""
        event = recorded.event
        time = dt.datetime.fromtimestamp(recorded.at / 1e6, dt.UTC).strftime("%H:%M:%S")
        if isinstance(event, Decision):
            colour = {"EXECUTE": "green", "BLOCK": "yellow"}.get(event.verdict, "dim")
            amount = (
                f"{event.computed_qty} ({event.computed_notional} USD)" if event.verdict == "EXECUTE" else event.reason
            )
            self._line(
                time, event.verdict, f"{event.plan_id:<14} {event.symbol:<9} {event.action:<20} {amount}", colour
            )
        elif event.NAME in _ALWAYS:
            colour = "red" if "DISARM" in event.NAME or "UNPERMITTED" in event.NAME else "cyan"
            words = [str(getattr(event, name)) for name in ("plan_id", "symbol", "source", "reason", "action_taken")
                     if getattr(event, name, None)]  # fmt: skip
            self._line(time, event.NAME, " ".join(words), colour)

    def _line(self, time: str, word: str, rest: str, colour: str) -> None:
        self._events.append(
            Text.assemble((f"{time} ", "dim"), (f"{word:<22}", f"bold {colour}"), rest, overflow="ellipsis")
        )

    def render(self, state: State, policy: Policy, now: int, *, apply_mode: str | None) -> RenderableType:
        """The whole picture."""
        told = describe(state, policy, now)
        return Group(
            self._head(told, apply_mode),
            _symbols(told),
            Panel(Group(*self._events), title="plans and verdicts", title_align="left", border_style="dim"),
            _permits(told, now),
            Text(self.tells, style="italic dim"),
        )

    def _head(self, told: dict[str, Any], apply_mode: str | None) -> Panel:
        colour = COLOURS[told["state"]]
        counts = told["counts"]
        mode = (apply_mode or "unknown", "bold red" if apply_mode == "dry_run" else "bold green")
        text = Text.assemble(
            (f"{ICONS[told['state']]} {told['state']}", f"bold {colour}"),
            f"  {told['reason'] or ''}   epoch {told['epoch']}   event {told['seq']}   Apply Layer: ",
            mode,
            f"\n{counts['plans']} plans = {counts['allowed']} allowed + {counts['blocked']} blocked + "
            f"{counts['skipped']} skipped   {counts['rejected']} rejected   "
            f"errors {told['errors']['used']}/{told['errors']['limit']}",
        )
        return Panel(text, title="Governor", title_align="left", border_style=colour)


def _symbols(told: dict[str, Any]) -> Table:
    table = Table(box=None, expand=True, padding=(0, 1))
    for title in ("symbol", "last hour", "last 5 min", "USD today"):
        table.add_column(title, header_style="dim")
    for symbol, values in sorted(told["symbols"].items()):
        table.add_row(symbol, *(_bar(values[name]) for name in ("exec_1h", "exec_5min", "daily_notional")))
    return table


def _bar(pair: dict[str, Any], width: int = 12) -> Text:
    used, limit = Decimal(pair["used"]), pair["limit"]
    if limit is None:
        return Text(f"{used:.0f} / off")
    share = float(used / limit) if limit else 1.0
    filled = min(width, round(share * width))
    colour = "red" if share >= 1 else "yellow" if share >= 0.8 else "green"
    return Text.assemble(("█" * filled, colour), ("░" * (width - filled), "dim"), f" {used:.0f}/{limit}")


def _permits(told: dict[str, Any], now: int) -> Text:
    if not told["permits"]:
        return Text("no permit outstanding", style="dim")
    parts = [f"{p['plan_id']} {max(0.0, p['expires_at'] - now / 1e6):.0f} s" for p in told["permits"]]
    return Text.assemble(("permits outstanding: ", "bold"), "   ".join(parts))
