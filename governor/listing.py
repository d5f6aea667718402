"""`governor events`: what happened, and what happens, chosen and coloured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import click

from governor import printing
from governor.console import (
    DIFFERS,
    DONE,
    PAGE,
    fail,
    from_option,
    history,
    json_option,
    moment,
    no_color_option,
    print_json,
    settings_of,
)
from governor.console import run as end_with
from governor.manual import Command, codes

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from events.files import FileStore
    from events.store import EventStore
    from events.types import Head, Recorded
    from governor.settings import Settings

CLOCK_BACK_US = 60_000_000
"""By so much a clock may have stepped back between two events, where events are looked for by their time."""


class _EventName(click.ParamType[str]):
    """An event's name; completed, and held against those there are."""

    name = "EVENT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from events.types import BY_NAME  # noqa: PLC0415

        if (known := value.upper()) in BY_NAME:
            return str(known)
        from difflib import get_close_matches  # noqa: PLC0415

        near = get_close_matches(known, BY_NAME, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(BY_NAME)}"
        raise click.BadParameter(f"{value!r} is no event; {hint}", ctx, param)

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's way
        param: click.Parameter,  # noqa: ARG002 - the same
        incomplete: str,
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem  # noqa: PLC0415

        from events.types import BY_NAME  # noqa: PLC0415

        return [CompletionItem(name) for name in BY_NAME if name.startswith(incomplete.upper())]


NAME = _EventName()


@click.command(
    cls=Command,
    examples=(
        ("governor events -n 200", "the last 200"),
        ("governor events --follow --level warning", "only what is not ordinary, as it comes"),
        ("governor events --since -2h --verdict BLOCK --symbol BTCUSDT", "what was blocked in two hours"),
        ("governor events --name DISARM_STARTED -n 1 --json", "the last disarm, with its context"),
        ("governor events --export all.jsonl.zst", "a verified copy of everything"),
    ),
    exits=codes(differs="not exported, the chain does not hold", exit_130="interrupted"),
    see=("governor explain", "governor status --watch", "docs/events.md"),
)
@click.option("--follow", "-f", is_flag=True, help="Go on as new ones come, over a restart of Redis too.")
@click.option(
    "--limit",
    "-n",
    type=click.IntRange(min=0),
    show_default="50, with --since all",
    help="How many of the last ones; 0 for all.",
)
@click.option("--since", metavar="TIME", help="Only events from then on: ISO 8601, unix seconds, or -2h (s, m, h, d).")
@click.option("--name", multiple=True, type=NAME, help="Only events of this name (repeatable).")
@click.option("--plan", metavar="PLAN_ID", help="Only events of this plan.")
@click.option("--symbol", help="Only events of this symbol, in capitals or not.")
@click.option(
    "--verdict",
    multiple=True,
    type=click.Choice(["EXECUTE", "BLOCK", "SKIP"]),
    help="Only decisions with this verdict (repeatable).",
)
@click.option(
    "--level",
    type=click.Choice(["info", "warning", "critical"]),
    help="Only events that matter so much, or more: warning leaves out what is ordinary.",
)
@click.option(
    "--export",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write all of them, verified, to a file: .jsonl or .jsonl.zst. Every command with --from reads it.",
)
@no_color_option
@from_option
@json_option
def events(
    *,
    follow: bool,
    limit: int | None,
    since: str | None,
    target: Path | None,
    files: tuple[Path, ...],
    as_json: bool,
    **chosen: Any,
) -> None:
    """Print events, oldest first. With --follow, --json gives a document a line.

    Yellow is what is not ordinary (level warning: blocked plans, errors, throttling, what was lost), red what needs
    somebody (critical: a disarm and what became of it, an execution nobody permitted, drift), green a permit and what
    ends a trouble.
    """
    chooses = limit is not None or since is not None or any(value not in (None, ()) for value in chosen.values())
    if target is not None and (follow or chooses):
        raise click.UsageError("--export writes all events: it goes without --follow and what chooses some of them")
    if files and follow:
        raise click.UsageError("a file does not grow: --follow goes without --from")
    from governor.connection import now  # noqa: PLC0415

    since_us = None if since is None else moment(since, now(), option="--since")
    settings = settings_of()
    if target is not None:
        end_with(_export(settings, files, target, as_json=as_json))
    choice = _Choice(**chosen)
    most = (0 if since_us is not None else 50) if limit is None else limit

    async def work() -> int:
        async with history(settings, files) as store:
            found, head = await _past(store, choice, since_us, most, quick=not files)
            if as_json and not follow:
                print_json([printing.event_fields(recorded) for recorded in found])
                return DONE
            # Whoever has seen a line can rely on it: from here on, no trouble with the server ends this.
            at = await _time_of(store, head) if follow else ""
            for recorded in found:
                _print_event(recorded, as_json=as_json)
            if follow:
                await _go_on(settings, cast("EventStore", store), head, choice, since_us or 0, at=at, as_json=as_json)
            return DONE

    end_with(work())


class _Choice(NamedTuple):
    """Which events were asked for; what is empty or None lets all pass."""

    name: tuple[str, ...]
    plan: str | None
    symbol: str | None
    verdict: tuple[str, ...]
    level: str | None

    def takes(self, recorded: Recorded) -> bool:
        from governor.levels import LEVELS, level_of  # noqa: PLC0415

        event = recorded.event
        return (
            (not self.name or event.NAME in self.name)
            and (self.plan is None or getattr(event, "plan_id", None) == self.plan)
            and (self.symbol is None or (getattr(event, "symbol", None) or "").upper() == self.symbol.upper())
            and (not self.verdict or getattr(event, "verdict", None) in self.verdict)
            and (self.level is None or LEVELS.index(level_of(event)) >= LEVELS.index(self.level))
        )


async def _past(
    store: EventStore | FileStore, choice: _Choice, since_us: int | None, most: int, *, quick: bool
) -> tuple[list[Recorded], Head]:
    """The last `most` events that were asked for (0: all of them), and where the history ends.

    `quick` where the store is as quick in one place as in another; a file is read from its beginning each time.
    """
    from events.codec import decode  # noqa: PLC0415
    from events.reading import before  # noqa: PLC0415

    head = await store.head()
    seq = max(0, head.seq - most) if most and not any(choice) else 0
    if quick and since_us is not None:
        # Clocks step back: it is looked for a little earlier.
        seq = max(seq, await before(store, since_us - CLOCK_BACK_US, last=head.seq))
    found: list[Recorded] = []
    while seq < head.seq and (entries := await store.read(seq, limit=PAGE)):
        seq = entries[-1].seq
        fresh = [decode(entry) for entry in entries if entry.seq <= head.seq]
        found += [recorded for recorded in fresh if recorded.at >= (since_us or 0) and choice.takes(recorded)]
        found = found[-most:] if most else found
    return found, head


async def _time_of(store: EventStore | FileStore, head: Head) -> str:
    """When the last event was, as its entry says it; "0" for none."""
    last = await store.read(head.seq - 1, limit=1) if head.seq else []
    return last[0].timestamp if last else "0"


async def _go_on(
    settings: Settings, store: EventStore, head: Head, choice: _Choice, since_us: int, *, at: str, as_json: bool
) -> None:
    from events.codec import decode  # noqa: PLC0415
    from governor.following import follow  # noqa: PLC0415

    def tell(what: str) -> None:
        click.echo(f"governor: {what}", err=True)

    async for entries in follow(store, head, at=at, key=settings.chain_key, tell=tell):
        for recorded in map(decode, entries):
            if recorded.at >= since_us and choice.takes(recorded):
                _print_event(recorded, as_json=as_json)


def _print_event(recorded: Recorded, *, as_json: bool) -> None:
    if as_json:
        print_json(printing.event_fields(recorded))
    else:
        click.echo(printing.event_line(recorded))


async def _export(settings: Settings, files: tuple[Path, ...], target: Path, *, as_json: bool) -> int:
    from events.chain import ChainError  # noqa: PLC0415
    from events.files import export  # noqa: PLC0415

    try:
        async with history(settings, files) as store:
            header = await export(store, target, key=settings.chain_key)
    except ChainError as error:
        fail(f"not exported, the chain does not hold: {error}", DIFFERS)
    if as_json:
        print_json(printing.segment_fields(target, header))
    else:
        click.echo(f"{header.events} events in {target}, head {header.head.seq}:{header.head.hash}")
    return DONE


COMMANDS: tuple[click.Command, ...] = (events,)
