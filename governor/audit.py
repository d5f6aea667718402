"""The commands that read the event stream, or an exported copy of it, and what keeps it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from governor import printing
from governor.console import (
    DIFFERS,
    DONE,
    FAILED,
    duration,
    fail,
    from_option,
    head_of,
    history,
    json_option,
    moment,
    pages,
    print_json,
    settings_of,
)
from governor.console import run as end_with
from governor.manual import Command, codes

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from events.types import Head
    from governor.settings import Settings


@click.command(
    cls=Command,
    examples=(
        ("governor explain PLAN_ID", "why it was blocked, or what became of its permit"),
        ("governor explain PLAN_ID --from 2026-01.jsonl.zst", "from an exported history"),
    ),
    exits=codes(exit_1="no event knows the plan"),
    see=("governor events", "docs/gates.md"),
)
@click.argument("plan_id")
@from_option
@json_option
def explain(plan_id: str, *, files: tuple[Path, ...], as_json: bool) -> None:
    """One plan's life: what was asked, what the exchange said, every check, and what became of the permit."""

    async def work() -> int:
        from events.codec import decode  # noqa: PLC0415
        from governor.explain import Explainer  # noqa: PLC0415
        from governor.telling import lines  # noqa: PLC0415

        explainer = Explainer(plan_id)
        async with history(settings_of(), files) as store:
            async for entries in pages(store, label="reading"):
                for entry in entries:
                    if explainer.wants(entry):
                        explainer.feed(decode(entry))
        told = explainer.finish()
        if as_json:
            print_json(told)
        else:
            click.echo("\n".join(lines(told)))
        return DONE if told["known"] else FAILED

    end_with(work())


def _overridable(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    from governor.whatif import OVERRIDABLE  # noqa: PLC0415

    return [f"{name}=" for name in OVERRIDABLE if name.startswith(incomplete)]


@click.command(
    cls=Command,
    examples=(
        ("governor replay", "audit everything"),
        ("governor replay --at -2h", "the state two hours ago"),
        ("governor replay --anchor >> /mnt/elsewhere/anchors", "a head for --expect-head"),
        ("governor replay --from 2026-01.jsonl.zst", "audit an exported history"),
        ("governor replay --what-if GOV_MAX_EXEC_PER_HOUR=5 --plot five.svg", "another limit"),
    ),
    exits=codes("nothing differs", differs="something differs, or the history does not hold"),
    see=("governor explain", "docs/auditing.md", "docs/what-if.md"),
)
@click.option("--at", metavar="TIME", help="Stop there: ISO 8601, unix seconds, or -2h (s, m, h, d).")
@click.option("--at-seq", type=click.IntRange(min=0), metavar="N", help="Stop after event N.")
@click.option("--expect-head", metavar="SEQ:HASH", help="A head kept elsewhere that the history must contain.")
@click.option("--anchor", is_flag=True, help="Print only the head, SEQ:HASH, for keeping elsewhere.")
@click.option("--all", "show_all", is_flag=True, help="List every difference, not only the first.")
@click.option(
    "--what-if",
    "changes",
    multiple=True,
    metavar="NAME=VALUE",
    shell_complete=_overridable,
    help="Decide under another setting (repeatable).",
)
@click.option(
    "--limits",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What-if: limits of single symbols, a file as GOV_LIMITS_FILE.",
)
@click.option("--rearm-after", metavar="SPAN", help="What-if: assume a person re-arms so long after an added disarm.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What-if: draw totals and states under both settings, .svg or .png.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="what the machine has",
    metavar="N",
    help="Audit a long history with up to N processes; more than 2 are no help.",
)
@from_option
@json_option
def replay(
    *,
    at: str | None,
    at_seq: int | None,
    expect_head: str | None,
    anchor: bool,
    show_all: bool,
    changes: tuple[str, ...],
    limits: Path | None,
    rearm_after: str | None,
    picture: Path | None,
    jobs: int,
    files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Audit: decide every recorded plan again from its recorded inputs, and compare.

    Tells three verdicts apart: integrity (the hash chain), completeness (no gaps; the history contains a head that
    was kept elsewhere), agreement (every decision follows from its inputs). Writes nothing and needs no daemon. With
    --at or --at-seq the state as it was is printed as by `status`.

    With --what-if or --limits it decides under other settings instead, the state evolving as it then would have, and
    tells what would have changed.
    """
    other = bool(changes or limits)
    if (rearm_after or picture) and not other:
        raise click.UsageError("--rearm-after and --plot belong to --what-if or --limits")
    if other and (expect_head or anchor):
        raise click.UsageError("--expect-head and --anchor belong to an audit, not to a what-if")
    change = _change(changes, limits, rearm_after, picture) if other else None

    async def work() -> int:
        from governor.connection import now  # noqa: PLC0415

        settings = settings_of()
        until = None if at is None else moment(at, now(), option="--at")
        if change is not None:
            return await _what_if(settings, files, until, at_seq, change, show_all=show_all, as_json=as_json)
        return await _audit(
            settings, files, until, at_seq, head_of(expect_head, option="--expect-head"),
            jobs=jobs, anchor=anchor, show_all=show_all, as_json=as_json,
        )  # fmt: skip

    end_with(work())


class _Change(NamedTuple):
    """What a what-if changes, and how it is shown."""

    overrides: dict[str, str]
    limits: dict[str, dict[str, str]] | None
    rearm_after_us: int | None
    picture: Path | None


def _change(changes: tuple[str, ...], limits: Path | None, rearm_after: str | None, picture: Path | None) -> _Change:
    from governor.plot import PlotUnavailableError, check_target  # noqa: PLC0415
    from governor.settings import SettingsError, limits_file  # noqa: PLC0415
    from governor.whatif import parse_overrides  # noqa: PLC0415

    try:
        overrides = parse_overrides(changes)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--what-if") from None
    try:
        by_symbol = None if limits is None else limits_file("--limits", str(limits))
    except SettingsError as error:
        raise click.BadParameter(str(error), param_hint="--limits") from None
    try:
        if picture is not None:
            check_target(picture)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--plot") from None
    except PlotUnavailableError as error:
        fail(str(error), FAILED)
    span = None if rearm_after is None else duration(rearm_after, option="--rearm-after")
    return _Change(overrides, by_symbol, span, picture)


async def _what_if(
    settings: Settings,
    files: tuple[Path, ...],
    until: int | None,
    at_seq: int | None,
    change: _Change,
    *,
    show_all: bool,
    as_json: bool,
) -> int:

    from events.chain import GENESIS, ChainError, verify  # noqa: PLC0415
    from events.codec import decode  # noqa: PLC0415
    from governor.plot import plot  # noqa: PLC0415
    from governor.whatif import WhatIf, lines  # noqa: PLC0415
    from projections.state import digest  # noqa: PLC0415

    key = settings.chain_key
    what_if = WhatIf(change.overrides, limits=change.limits, rearm_after_us=change.rearm_after_us)
    head, done = GENESIS, False
    try:
        async with history(settings, files) as store:
            async for entries in pages(store, label="deciding"):
                wanted = []
                for entry in verify(entries, after=head, key=key):
                    recorded = decode(entry)
                    done = (until is not None and recorded.at > until) or (at_seq is not None and recorded.seq > at_seq)
                    if done:
                        break
                    wanted.append(recorded)
                    head = entry.head
                what_if.feed(wanted)
                if done:
                    break
    except ChainError as error:
        fail(f"nothing follows from a history that does not hold: {error}", DIFFERS)
    outcome = what_if.finish()
    if change.picture is not None:
        plot(outcome, change.picture)
    if as_json:
        told = {name: getattr(outcome, name) for name in outcome.__struct_fields__ if name != "series"}
        recorded_state = what_if.recorded
        print_json(told | {"chain": "ok", "digest": digest(recorded_state), "state": recorded_state.mode.state})
    else:
        click.echo("\n".join(lines(outcome, everything=show_all)))
    return DIFFERS if outcome.differences else DONE


async def _audit(
    settings: Settings,
    files: tuple[Path, ...],
    until: int | None,
    at_seq: int | None,
    expect: Head | None,
    *,
    jobs: int,
    anchor: bool,
    show_all: bool,
    as_json: bool,
) -> int:
    from governor import status as views  # noqa: PLC0415
    from governor.parallel import Source, audit  # noqa: PLC0415

    found, state = await audit(Source(settings, files, expect), jobs=jobs, until_us=until, until_seq=at_seq)
    then: dict[str, Any] | None = None
    if state is not None and (until is not None or at_seq is not None):
        then = views.describe(state, views.policy_of(state, settings.policy), until or state.time)
    if as_json:
        print_json(
            {name: getattr(found, name) for name in found.__struct_fields__}
            | {"head": {"seq": found.head.seq, "hash": found.head.hash}}
            | ({} if then is None else {"status": then})
        )
    elif anchor and found.clean:
        click.echo(f"{found.head.seq}:{found.head.hash}")
    else:
        if then is not None and state is not None and state.seq:
            printing.print_status(then | {"halted": None})
        elif then is not None:
            click.echo("there was no event yet")
        printing.print_replay(found, show_all=show_all, err=anchor)
    return DONE if found.clean else DIFFERS


@click.command(
    cls=Command,
    examples=(
        ("governor rebuild --check", "compare only"),
        ("governor rebuild", "mend them"),
        ("governor rebuild --from /backup/all.jsonl.zst", "after Redis lost its events"),
    ),
    exits=codes(differs="with --check: something differs"),
    see=("governor replay", "docs/promises.md"),
)
@click.option("--check", is_flag=True, help="Compare only; exit 3 when something differs.")
@from_option
@json_option
def rebuild(*, check: bool, files: tuple[Path, ...], as_json: bool) -> None:
    """Write the public keys again from the events, and remove what the events do not explain.

    Never writes a permit, is safe beside a running daemon, and twice is once. A checkpoint that is not what the
    events lead to is removed as well.

    With --from it first writes back to the stream what an exported history has and the stream lost (a Redis that was
    emptied or lost its tail), and holds permits back for one permit's life; with --check it only compares the keys
    with that history.
    """

    async def work() -> int:
        settings = settings_of(logs=True)
        told = await (_check(settings, files) if check else _mend(settings, files))
        differences = told["differences"]
        if as_json:
            print_json(told)
        else:
            if told.get("events_restored"):
                click.echo(f"{told['events_restored']} events written back to the stream")
            for difference in differences:
                click.echo(f"{difference.key}\n  expected  {difference.expected}\n  actual    {difference.actual}")
            click.echo(f"{len(differences)} differences in {told['events']} events" + ("" if check else ", all mended"))
        return DIFFERS if check and differences else DONE

    end_with(work())


async def _check(settings: Settings, files: tuple[Path, ...]) -> dict[str, Any]:
    from governor.connection import connected, ledger_on, now  # noqa: PLC0415
    from governor.rebuild import look  # noqa: PLC0415

    async with connected(settings) as client, history(settings, files) as store:
        ledger = ledger_on(client, settings)
        differences = await look(ledger, client, now(), pages(store, label="folding"), follow=not files)
    return {"events": ledger.state.seq, "keys_written": 0, "differences": differences}


async def _mend(settings: Settings, files: tuple[Path, ...]) -> dict[str, Any]:
    from governor.connection import connected, ledger_on, now  # noqa: PLC0415
    from governor.rebuild import mend  # noqa: PLC0415

    restored: dict[str, Any] = {}
    async with connected(settings) as client:
        if files:
            restored = {"events_restored": await _restore(settings, client, files)}
        async with history(settings, ()) as store:
            ledger = ledger_on(client, settings)
            differences = await mend(ledger, client, now(), pages(store, label="folding"))
    return {"events": ledger.state.seq, "keys_written": len(differences), "differences": differences} | restored


async def _restore(settings: Settings, client: Redis, files: tuple[Path, ...]) -> int:
    from events.files import FileStore  # noqa: PLC0415
    from governor.connection import ledger_on  # noqa: PLC0415
    from governor.restore import restore  # noqa: PLC0415

    key = settings.chain_key
    copy = FileStore(files)
    return await restore(
        ledger_on(client, settings), copy, pages(copy, label="restoring"), key=key, default=settings.policy
    )


@click.command(
    cls=Command,
    examples=(
        ("governor archive --before -90d", "from a timer"),
        ("governor archive --before 2026-01-01", "up to a day"),
    ),
    exits=codes(exit_1="failed, nothing was trimmed"),
    see=("governor events --export", "docs/operating.md"),
)
@click.option(
    "--before",
    required=True,
    metavar="DATE",
    help="Events older than this UTC day: YYYY-MM-DD, or -90d for so many days ago.",
)
@json_option
def archive(*, before: str, as_json: bool) -> None:
    """Move old events from Redis to files, one a UTC day, in GOV_ARCHIVE_DIR.

    Each file is written, read back and verified, and only when all of them are is the stream trimmed. From then on
    files and stream are one history: every command and the daemon read the files where the stream no longer has the
    events. Keep them with your backups.
    """

    async def work() -> int:
        from events.archive import archive as move  # noqa: PLC0415
        from events.keys import date_of, day_of  # noqa: PLC0415
        from governor.connection import connected, ledger_on, now, stream_on  # noqa: PLC0415

        clock = now()
        day = day_of(moment(before, clock, option="--before"))
        settings = settings_of(logs=True)
        async with connected(settings) as client:
            ledger = ledger_on(client, settings)
            await ledger.open()
            if ledger.state.seq:
                await ledger.write_checkpoint()  # so that a start does not need the files
            done = await move(
                stream_on(client, settings),
                settings.archive_dir,
                before_day=day,
                today=day_of(clock),
                key=settings.chain_key,
            )
        if as_json:
            print_json(
                {
                    "before": date_of(day),
                    "directory": str(settings.archive_dir),
                    "written": [printing.segment_fields(*each) for each in done.written],
                    "verified": [printing.segment_fields(*each) for each in done.verified],
                    "trimmed": done.trimmed,
                }
            )
        else:
            for path, header in done.written:
                click.echo(f"{path}  {header.events} events, up to {header.head.seq}:{header.head.hash}")
            click.echo(f"{done.trimmed} events trimmed from the stream")
        return DONE

    end_with(work())


@click.command(
    cls=Command,
    examples=(("governor checkpoint", "before an upgrade of a long history"),),
    exits=codes(),
    see=("governor run", "docs/settings.md"),
)
@json_option
def checkpoint(*, as_json: bool) -> None:
    """Write a checkpoint now: the next start reads it and the events behind it, instead of all of them.

    The daemon has this done by itself, see GOV_CHECKPOINT_EVENTS and GOV_CHECKPOINT_SEC.
    """

    async def work() -> int:
        from governor.checkpointing import give_way  # noqa: PLC0415
        from governor.connection import connected, ledger_on  # noqa: PLC0415

        settings = settings_of(logs=True)
        give_way()
        async with connected(settings) as client:
            ledger = ledger_on(client, settings)
            await ledger.open()
            size = await ledger.write_checkpoint()
        if as_json:
            print_json({"seq": ledger.state.seq, "hash": ledger.state.hash, "bytes": size})
        else:
            click.echo(f"checkpoint of event {ledger.state.seq} written, {size} bytes")
        return DONE

    end_with(work())


COMMANDS: tuple[click.Command, ...] = (explain, replay, rebuild, archive, checkpoint)
