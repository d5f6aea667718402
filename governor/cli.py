"""The command line. Each command imports what it needs, so that asking is quick at night too."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from governor import audit, listing, printing, shell
from governor.alerts.command import alerts
from governor.console import (
    DIFFERS,
    DONE,
    FAILED,
    Number,
    fail,
    from_option,
    history,
    json_option,
    no_color_option,
    operator,
    pages,
    print_json,
    reason_option,
    settings_of,
)
from governor.console import run as end_with
from governor.manual import Group, codes

if TYPE_CHECKING:
    from governor.settings import Settings


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    examples=(
        ("governor run", "the daemon, as systemd starts it"),
        ("governor status", "the state, windows and totals"),
        ("governor status --watch", "the same, live"),
        ("governor events --follow", "events as they happen"),
        ("governor explain PLAN_ID", "one plan's life"),
        ("governor replay", "audit: does every decision follow?"),
        ("governor rebuild --check", "do the public keys say it too?"),
        ("governor dashboard", "all of it in a browser"),
        ('governor disarm --reason "bad fills"', "stop trading now"),
        ("governor doctor", "is everything as it should be?"),
    ),
    exits=codes(differs="not ARMED or THROTTLED (status), or something differs", redis=True),
    see=("governor COMMAND --help", "docs/operating.md", "man governor"),
)
@click.version_option(package_name="quantum-governor")
@click.option(
    "--env-file",
    type=click.Path(path_type=Path, readable=False),
    metavar="PATH",
    help="Take settings from a file as systemd reads an EnvironmentFile=; a variable of the environment wins over it.",
)
def main(*, env_file: Path | None) -> None:  # noqa: ARG001 - read once settings are asked for, so that --help needs no file
    """The last gate before a trading bot's orders.

    Settings come from the environment; `governor settings` shows the effective ones. Every command that answers has
    --json: one JSON document on stdout, everything else on stderr. check has exit codes of its own.
    """
    if os.environ.get("NO_COLOR"):
        click.get_current_context().color = False


@main.command(
    examples=(
        ("governor run", "with the settings of the environment"),
        ("governor --env-file /etc/quantum/governor.env run", "with those of a file"),
    ),
    exits=codes("ended by SIGTERM or SIGINT", redis=False),
    see=("governor doctor", "docs/installing.md", "docs/settings.md"),
)
def run() -> None:
    """Run the daemon until SIGTERM.

    It waits for Redis, and says so in the log and on /readyz, instead of ending.
    """
    from governor import daemon  # noqa: PLC0415 - each command imports what it needs

    sys.exit(daemon.main(settings_of()))


@main.command(
    examples=(
        ("governor demo", "live, until Ctrl-C"),
        ("governor demo --seconds 30 --json", "half a minute, then what happened"),
    ),
    exits=codes(redis=False),
    see=("governor run", "governor status --watch"),
)
@click.option("--seconds", type=Number(min=1), help="Run without the live view for so long, then sum up.")
@click.option("--speed", type=Number(1, 10), default=1.0, show_default=True, help="Tell the story faster.")
@click.option("--var", "directory", default="var", show_default=True, help="Where the demo keeps its data.")
@click.option("--port", type=int, default=0, help="Port of the embedded server; a free one by default.")
@click.option("--svg", type=click.Path(dir_okay=False, writable=True), help="Keep a picture of the live view.")
@json_option
def demo(*, seconds: float | None, speed: float, directory: str, port: int, svg: str | None, as_json: bool) -> None:
    """Everything on an embedded server, with a simulated exchange and Apply Layer.

    The daemon is the real one, as a process of its own. Within a minute: permits, blocks with their reasons, an
    expiry, a burst that disarms, the Apply Layer set to dry run, and a re-arm. The dashboard runs beside it, on
    http://127.0.0.1:8045 or another free port, and its last line tells how every other command finds the demo from
    a second terminal. Permits live 12 seconds there, so that one can be seen to expire. Ctrl-C leaves nothing running.
    Without a terminal, what happens is told line by line.
    """
    try:
        from governor import demo as the_demo  # noqa: PLC0415
    except ImportError as error:
        fail(f"the demo needs the packages of the extra 'demo': pip install '.[demo]' ({error})", FAILED)
    code = the_demo.main(directory=directory, port=port, seconds=seconds, speed=speed, svg=svg, as_json=as_json)
    sys.exit(code)


@main.command(
    examples=(
        ("governor dashboard", "on http://127.0.0.1:8045"),
        ("DASHBOARD_TOKEN_FILE=/etc/token governor dashboard", "with control, for who knows the token"),
    ),
    exits=codes("ended by SIGTERM or SIGINT", redis=False),
    see=("governor status --watch", "docs/dashboard.md"),
)
def dashboard() -> None:
    """Show all of it in a browser, until SIGTERM.

    A process of its own that only reads; on http://127.0.0.1:8045 unless DASHBOARD_HOST and DASHBOARD_PORT say
    otherwise. With DASHBOARD_TOKEN_FILE a person who knows the token can disarm and re-arm there. It waits for Redis,
    and says so on the page, instead of ending.
    """
    loaded = settings_of(logs=True)
    try:
        from governor.dashboard import serving  # noqa: PLC0415
    except ImportError as error:
        fail(f"the dashboard needs the packages of the extra 'dashboard': pip install '.[dashboard]' ({error})", FAILED)
    sys.exit(serving.main(loaded))


@main.command(
    examples=(
        ("governor status", "once"),
        ("governor status --watch", "live, in a pane of its own"),
        ("governor status --watch 5", "the same over a slow line"),
        ("governor status --json", "for a program"),
    ),
    exits=codes(
        "ARMED or THROTTLED; --watch ended by q",
        differs="DISARMED, or there is no event at all",
        exit_130="--watch ended by Ctrl-C, 143 by SIGTERM",
    ),
    see=("governor events --follow", "governor check", "governor doctor", "docs/operating.md"),
)
@click.option(
    "--watch",
    "-w",
    "every_s",
    is_flag=False,
    flag_value="1",
    type=Number(0.1, 3600),
    metavar="[SECONDS]",
    help="Stay, and show it as it changes, on the whole terminal: drawn every SECONDS (1), a change of the state at "
    "once. q or Ctrl-C ends it.",
)
@no_color_option
@from_option
@json_option
def status(*, every_s: float | None, files: tuple[Path, ...], as_json: bool) -> None:
    """The state, and every symbol's windows and totals against its limits.

    With --from the state at the end of an exported history. With --watch also verdicts as they come, outstanding
    permits with their seconds, whether the daemon is ready, and the last disarm with its proof; when Redis does not
    answer it says since when, and goes on when it is back.
    """
    if every_s is not None:
        _watch(every_s, files=files, as_json=as_json)

    async def work() -> int:
        settings = settings_of(logs=True)
        if files:
            told = await _described_file(settings, files)
        else:
            told = await _described(settings)
        if as_json:
            print_json(told)
        elif told["state"] is None:
            from governor.by_hand import nothing_here  # noqa: PLC0415

            click.echo(nothing_here(settings))
        else:
            printing.print_status(told)
        return DONE if told["state"] in ("ARMED", "THROTTLED") else DIFFERS

    end_with(work())


def _watch(every_s: float, *, files: tuple[Path, ...], as_json: bool) -> NoReturn:
    if files or as_json:
        raise click.UsageError("--watch shows what happens now, on a terminal: it goes without --from and --json")
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        raise click.UsageError(
            "--watch needs a terminal that can move its cursor: standard output is none. "
            "Without --watch the state is printed once; events --follow prints lines"
        )
    settings = settings_of()
    from governor.logs import configure  # noqa: PLC0415
    from governor.watch import watch  # noqa: PLC0415

    configure(log_format=settings.log_format, level="CRITICAL")  # a line in between would spoil the picture
    end_with(watch(settings, every_s=every_s, color=click.get_current_context().color is not False))


async def _described(settings: Settings) -> dict[str, Any]:
    from governor import status as views  # noqa: PLC0415
    from governor.connection import connected, ledger_on, now  # noqa: PLC0415

    async with connected(settings) as client:
        ledger = ledger_on(client, settings)
        await ledger.open()
        (halt,) = await ledger.store.values(ledger.keys.halt)
        told = views.describe_live(ledger.state, views.policy_of(ledger.state, settings.policy), now())
    return told | {"halted": None if halt is None else halt.decode(errors="replace")}


async def _described_file(settings: Settings, files: tuple[Path, ...]) -> dict[str, Any]:
    from governor import status as views  # noqa: PLC0415
    from governor.rebuild import fold_all  # noqa: PLC0415

    async with history(settings, files) as store:
        state, _ = await fold_all(pages(store, label="reading"), key=settings.chain_key)
    return views.describe(state, views.policy_of(state, settings.policy), state.time) | {"halted": None}


@main.command(
    examples=(
        ("governor settings", "the environment's"),
        ("governor --env-file governor.env settings", "those of a file, before it is installed"),
    ),
    exits=codes(redis=False),
    see=("governor doctor", "docs/settings.md"),
)
@json_option
def settings(*, as_json: bool) -> None:
    """The effective settings, secrets masked."""
    loaded = settings_of()
    if as_json:
        print_json({"settings": loaded.effective, "limits": loaded.symbol_texts, "warnings": loaded.warnings})
        return
    for name, value in loaded.effective.items():
        click.echo(f"{name}={value}")
    for symbol, limits in loaded.symbol_texts.items():
        click.echo(f"[{symbol}] " + " ".join(f"{name}={value}" for name, value in limits.items()))
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)


@main.command(
    examples=(
        ('governor disarm --reason "bad fills"', "now"),
        ('redis-cli SET quantum:governor:halt "bad fills"', "the same with nothing but redis-cli"),
    ),
    exits=codes(
        "DISARMED, the Apply Layer proven to be in dry run",
        exit_1="DISARMED, but the Apply Layer could not be forced yet",
        exit_4="Redis not reachable: file and service were done first, the event follows",
    ),
    see=("governor rearm", "governor status", "docs/operating.md"),
)
@reason_option
@json_option
def disarm(reason: str, *, as_json: bool) -> None:
    """Stop trading now: every permit dies, the Apply Layer goes to dry run and is restarted.

    Works with and without a running daemon, and without Redis too (then file and service first, the event later,
    exit 4).
    """

    async def work() -> int:
        from governor import by_hand  # noqa: PLC0415

        told = await by_hand.disarm(settings_of(logs=True, stopping=True), reason=reason, operator=operator())
        if as_json:
            print_json(told)
        else:
            click.echo(told["message"])
        return int(told["code"])

    end_with(work())


def _apply_mode(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and (value == "dry_run" or not re.fullmatch(r"[A-Za-z0-9_./:@%+,-]+", value)):
        raise click.BadParameter(f"{value!r}, expected another mode than dry_run, in plain letters, such as testnet")
    return value


@main.command(
    examples=(
        ('governor rearm --reason "limits checked" --restore', "and the Apply Layer trades again"),
        ('governor rearm --reason "limits checked" --apply-mode testnet', "in a mode that is named"),
        ('governor rearm --reason "old server" --accept-history', "ends a quarantine"),
    ),
    exits=codes("armed, and put back where that was asked", exit_1="refused, or armed and not put back"),
    see=("governor disarm", "governor status", "docs/operating.md"),
)
@reason_option
@click.option("--force", is_flag=True, help="Although a disarm is unfinished or the emergency brake is set.")
@click.option(
    "--accept-history",
    is_flag=True,
    help="Take Redis' history where it contradicts the daemon's journal: ends a quarantine.",
)
@click.option(
    "--restore/--no-restore",
    default=None,
    help="Then set APPLY_MODE back to what it was before the disarm and restart the Apply Layer, or do not; "
    "on a terminal it is asked, elsewhere nothing is put back.",
)
@click.option(
    "--apply-mode",
    metavar="MODE",
    callback=_apply_mode,
    help="Put back this mode, where the one before the disarm is not known or not meant.",
)
@json_option
def rearm(
    reason: str, *, force: bool, accept_history: bool, restore: bool | None, apply_mode: str | None, as_json: bool
) -> None:
    """Arm again after a disarm: permits are granted from here on.

    The Apply Layer's file and service are put back only where you say so. That needs write access to the file.
    """
    if apply_mode is not None and restore is False:
        raise click.UsageError("--apply-mode and --no-restore contradict each other")
    asks = not as_json and sys.stdin.isatty() and sys.stderr.isatty()

    async def work() -> int:
        from governor import by_hand  # noqa: PLC0415

        told = await by_hand.rearm(
            settings_of(logs=True),
            reason=reason,
            operator=operator(),
            force=force,
            accept_history=accept_history,
            restore=restore,
            apply_mode=apply_mode,
            ask=partial(click.confirm, err=True) if asks else None,
        )
        if as_json:
            print_json(told)
        else:
            click.echo(told["message"], err=told["code"] != DONE)
        return int(told["code"])

    end_with(work())


@main.command(
    examples=(
        ("sudo governor doctor", "every part of it"),
        ("sudo governor doctor --full", "with the whole history verified"),
        ("sudo governor doctor --drill --restore", "a disarm and a re-arm, timed"),
    ),
    exits=codes("nothing failed", exit_1="a check failed"),
    see=("governor check", "docs/doctor.md", "docs/troubleshooting.md"),
)
@click.option("--full", is_flag=True, help="Verify every event, archived ones too, and not only the last 10,000.")
@click.option("--drill", is_flag=True, help="Disarm and re-arm for real, and time it. Asks first.")
@click.option("--yes", is_flag=True, help="With --drill: do not ask.")
@click.option(
    "--restore/--no-restore",
    default=None,
    help="With --drill: at its end set APPLY_MODE back and restart the Apply Layer, or leave it in dry run; on a "
    "terminal it is asked, elsewhere it is left.",
)
@json_option
def doctor(*, full: bool, drill: bool, yes: bool, restore: bool | None, as_json: bool) -> None:
    """Look at the running system: each check says what was seen, and what to do.

    Writes and changes nothing, apart from --drill. As root it sees most; what it may not see it skips.
    """
    if not drill and (yes or restore is not None):
        raise click.UsageError("--yes and --restore belong to --drill")
    if drill and full:
        raise click.UsageError("--full belongs to the checks, not to --drill")
    settings = settings_of()
    from governor.logs import configure  # noqa: PLC0415

    configure(log_format=settings.log_format, level="CRITICAL")  # the checks tell it
    end_with(_drill(settings, yes=yes, restore=restore, as_json=as_json) if drill else _doctor(settings, full, as_json))


async def _doctor(settings: Settings, full: bool, as_json: bool) -> int:  # noqa: FBT001
    from governor import doctor as checks  # noqa: PLC0415

    env_file: Path | None = click.get_current_context().find_root().params.get("env_file")
    found, code = await checks.examine(settings, environ=os.environ, env_file=env_file, full=full)
    if as_json:
        print_json(checks.as_json(found))
    else:
        checks.print_checks(found)
    return code


async def _drill(settings: Settings, *, yes: bool, restore: bool | None, as_json: bool) -> int:
    from governor import drill  # noqa: PLC0415

    asks = sys.stdin.isatty() and sys.stderr.isatty()
    if not (yes or asks):
        raise click.UsageError("a drill disarms for real: say --yes where nobody can be asked")
    before = await drill.prepare(settings, restore=restore)
    if before.refusal is not None:
        fail(f"no drill: {before.refusal}", FAILED)
    if not yes:
        click.echo(drill.explanation(settings, before), err=True)
        if click.prompt("Type drill to go on", default="", show_default=False, err=True).strip() != "drill":
            fail("no drill: nothing was done", FAILED)
        if restore is None and before.trades:
            restore = click.confirm(f"Set APPLY_MODE back to {before.apply_mode} at the end?", err=True)
    told = await drill.carry_out(settings, before, operator=operator(), restore=bool(restore))
    if as_json:
        print_json(told)
    else:
        drill.print_drill(told)
    return int(told["code"])


for command in (*listing.COMMANDS, *audit.COMMANDS, *shell.COMMANDS, alerts):
    main.add_command(command)
