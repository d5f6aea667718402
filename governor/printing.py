"""What the commands print for a person."""

from __future__ import annotations

from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from governor.telling import clean
from governor.times import utc

if TYPE_CHECKING:
    from pathlib import Path

    from events.files import Header
    from events.types import Recorded
    from governor.replay import Replay


def event_fields(recorded: Recorded) -> dict[str, Any]:
    """An event as a JSON object."""
    import msgspec  # noqa: PLC0415

    data = msgspec.structs.asdict(recorded.event)
    return {"seq": recorded.seq, "timestamp": recorded.at / 1e6, "event": recorded.event.NAME, "data": data}


def segment_fields(path: Path, header: Header) -> dict[str, Any]:
    """An exported or archived file as a JSON object."""
    return {"file": str(path), "events": header.events, "head": {"seq": header.head.seq, "hash": header.head.hash}}


def event_line(recorded: Recorded) -> str:
    """An event as a line."""
    from governor.levels import colour_of  # noqa: PLC0415 - the events' types take a while to make

    data = event_fields(recorded)["data"]
    shown = [
        f"{name}={clean(str(data[name]))}"
        for name in (
            "plan_id", "symbol", "action", "verdict", "reason", "computed_qty", "computed_notional", "source", "permit",
            "kind", "detail", "operator", "epoch", "action_taken", "step", "error", "count",
        )
        if data.get(name) is not None
    ]  # fmt: skip
    if "apply_mode" in data and "verdict" not in data:  # every decision has it as well
        shown.append(f"apply_mode={clean(str(data['apply_mode']))}")
    name = click.style(f"{recorded.event.NAME:<22}", fg=colour_of(recorded.event))
    return f"{recorded.seq:>8}  {utc(recorded.at / 1e6)}  {name} {' '.join(shown)}"


def print_status(told: dict[str, Any]) -> None:
    """What `describe` tells."""
    colour = {"ARMED": "green", "THROTTLED": "yellow"}.get(told["state"], "red")
    reason = f"  ({clean(told['reason'])})" if told["reason"] else ""
    click.echo(f"{click.style(told['state'], fg=colour, bold=True)}{reason}  since {utc(told['since'])}"
               f"  epoch {told['epoch']}  event {told['seq']}")  # fmt: skip
    if told["halted"] is not None:
        click.secho(f"emergency brake: {clean(told['halted'])}", fg="red")
    if told["throttle"]:
        causes = ", ".join(f"{cause['reason']} ({cause['symbol'] or 'all'})" for cause in told["throttle"]["causes"])
        click.echo(f"throttled until {utc(told['throttle']['until'])}: {causes}")
    if told["disarm"] and not told["disarm"]["done"]:
        click.secho(
            f"DISARM UNFINISHED after {told['disarm']['attempts']} attempts: {clean(str(told['disarm']['error']))}",
            fg="red",
        )
    if told["drift"] is not None:
        click.secho(f"DRIFT: the Apply Layer's file says APPLY_MODE={clean(told['drift'])}, set by hand", fg="red")
    row = "{:<14} {:>9} {:>9} {:>22} {:>22}  {}"
    if told["symbols"]:
        click.echo(row.format("symbol", "1 h", "5 min", "USD today", "quantity today", "next allowed"))
    for symbol, values in told["symbols"].items():
        click.echo(
            row.format(
                symbol,
                *(_of(values[name]) for name in ("exec_1h", "exec_5min", "daily_notional", "daily_qty")),
                _next(values["next_allowed"], told),
            )
        )  # fmt: skip
    click.echo(f"all symbols today: {_of(told['total_daily_notional'])} USD    errors: {_of(told['errors'])}    "
               f"permits outstanding: {len(told['permits'])}")  # fmt: skip
    counts = told["counts"]
    click.echo(f"plans {counts['plans']} = {counts['allowed']} allowed + {counts['blocked']} blocked + "
               f"{counts['skipped']} skipped; {counts['rejected']} rejected")  # fmt: skip


def print_replay(found: Replay, *, show_all: bool, err: bool = False) -> None:
    """The three verdicts and the differences; on stderr where stdout is for something else."""
    tell = partial(click.echo, err=err)
    broken = found.chain
    chain = broken if isinstance(broken, str) else f"BROKEN at event {broken['broken_at']}: {broken['problem']}"
    tell(f"integrity     {chain}")
    tell(f"completeness  {'ok' if found.complete else 'THE EXPECTED HEAD IS NOT IN THE HISTORY'}")
    tell(f"agreement     {len(found.differences) or 'no'} differences in {found.decisions} decisions, "
               f"{found.events} events")  # fmt: skip
    for difference in found.differences if show_all else found.differences[:1]:
        tell(f"  event {difference.seq}  plan {difference.plan_id}  {difference.field}")
        tell(f"    recorded  {difference.recorded}")
        tell(f"    computed  {difference.computed}")
    tell(f"digest        {found.digest}  state {found.state}")
    tell(f"head          {found.head.seq}:{found.head.hash}")


def _next(at: float | None, told: dict[str, Any]) -> str:
    if at is None:
        return "never"
    if at > told["time"]:
        return utc(at)
    return "once re-armed" if told["state"] == "DISARMED" else "now"


def _of(pair: dict[str, Any]) -> str:
    limit = pair["limit"]
    return f"{Decimal(pair['used']):f}/{'off' if limit is None else format(Decimal(limit), 'f')}"
