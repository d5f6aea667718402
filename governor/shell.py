"""The commands for other programs: a monitoring plugin, and completion for shells."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from governor.console import Number, duration, json_option, load_settings, print_json
from governor.manual import Command

if TYPE_CHECKING:
    from governor.plugin import Result, Thresholds

UNKNOWN = 3
LATE_S = 1.0
"""So long after its time an answer that still does not come is given up, whatever holds it up."""


class Plugin(Command):
    """Whatever goes wrong is UNKNOWN, exit code 3: the usual codes mean something else to whoever runs a plugin."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*args, **options)
        except click.UsageError as error:
            self._tell(error)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            self._tell(error)
        except Exception as error:  # noqa: BLE001 - a plugin that broke does not know how it is
            unknown(f"{type(error).__name__}: {error}")

    @staticmethod
    def _tell(error: click.UsageError) -> NoReturn:
        error.show()
        unknown(error.format_message())


def unknown(why: str) -> NoReturn:
    """End as a plugin does that cannot say how it is."""
    click.echo(f"GOVERNOR UNKNOWN - {' '.join(why.split()).replace('|', '/')}")
    sys.exit(UNKNOWN)


@click.command(
    cls=Plugin,
    examples=(
        ("governor check", "once, for a person"),
        ("governor check -w 60 -c 80 --limits", "sooner, and for every symbol's limits"),
        ("governor check --age-warning 1h --age-critical 6h", "where plans come all the time"),
    ),
    exits={0: "OK", 1: "WARNING", 2: "CRITICAL", 3: "UNKNOWN, wrong options and settings too"},
    see=("governor doctor", "docs/monitoring.md"),
)
@click.option(
    "--warning",
    "-w",
    type=Number(0, 100),
    default=80,
    show_default=True,
    metavar="PERCENT",
    help="WARNING from this share of a limit on.",
)
@click.option(
    "--critical",
    "-c",
    type=Number(0, 100),
    default=100,
    show_default=True,
    metavar="PERCENT",
    help="CRITICAL from this share on.",
)
@click.option("--limits", is_flag=True, help="Hold every symbol's windows and totals to them, not only the errors.")
@click.option("--age-warning", metavar="SPAN", help="WARNING when the last event is so old, as 1h; never by default.")
@click.option("--age-critical", metavar="SPAN", help="CRITICAL when it is so old.")
@click.option(
    "--no-daemon", is_flag=True, help="Do not ask the daemon on METRICS_HOST and METRICS_PORT: it is on another host."
)
@click.option(
    "--timeout",
    "-t",
    "timeout_s",
    type=Number(0.1, 3600),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="UNKNOWN when it takes longer.",
)
@json_option
def check(
    *,
    warning: float,
    critical: float,
    limits: bool,
    age_warning: str | None,
    age_critical: str | None,
    no_daemon: bool,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Look once, as a Nagios or Icinga plugin: one line, performance data, and an exit code.

    Exit codes are the plugin convention's, not those of the other commands. CRITICAL: DISARMED, a disarm that is
    unfinished, drift, the emergency brake, Redis not reachable, events that cannot be read, the daemon down or not
    ready (a quarantine and a journal that cannot be written too), its loop standing still for 15 s, a plan waiting
    for 10 s. WARNING: THROTTLED, permits held back, a plan waiting for 5 s, what else the daemon notes. Errors count
    by their share of GOV_DISARM_ON_ERROR_COUNT.
    """
    _give_up_after(timeout_s + LATE_S)
    if warning > critical:
        raise click.UsageError(f"--warning {warning:g} is above --critical {critical:g}: expected it to come first")
    from governor.plugin import Thresholds  # noqa: PLC0415

    ages = [
        None if span is None else duration(span, option=option) / 1e6
        for span, option in ((age_warning, "--age-warning"), (age_critical, "--age-critical"))
    ]
    result = _look(Thresholds(warning, critical, *ages), daemon=not no_daemon, limits=limits, timeout_s=timeout_s)
    if as_json:
        print_json(result.as_json())
    else:
        click.echo(result.line())
    sys.stdout.flush()
    os._exit(result.code)  # a look-up that still hangs in a thread would hold up the end


def _look(thresholds: Thresholds, **options: Any) -> Result:
    import asyncio  # noqa: PLC0415

    from governor.logs import configure  # noqa: PLC0415
    from governor.plugin import examine  # noqa: PLC0415
    from governor.settings import SettingsError  # noqa: PLC0415

    try:
        settings = load_settings()
    except SettingsError as error:
        unknown(str(error))
    configure(log_format=settings.log_format, level="CRITICAL")  # what there is to tell is on the line
    return asyncio.run(examine(settings, thresholds, **options))


def _give_up_after(seconds: float) -> None:
    def late(_number: int, _frame: FrameType | None) -> None:
        os.write(sys.stdout.fileno(), f"GOVERNOR UNKNOWN - no answer within {seconds - LATE_S:g} s\n".encode())
        os._exit(UNKNOWN)

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)


@click.command(
    cls=Command,
    examples=(
        ("source <(governor completion bash)", "for this bash; in ~/.bashrc for every one"),
        ("governor completion zsh > ~/.zfunc/_governor", "with ~/.zfunc in fpath before compinit"),
        ("governor completion fish > ~/.config/fish/completions/governor.fish", "for every fish"),
    ),
    exits={0: "done", 2: "usage"},
    see=("docs/operating.md",),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, options, event names and settings in a shell.

    deploy/install.sh puts the one for bash in place.
    """
    from click.shell_completion import ShellComplete, get_completion_class  # noqa: PLC0415

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    # Not its own `source`: that starts a bash to look how old it is.
    click.echo(ShellComplete.source(kind(root, {}, "governor", "_GOVERNOR_COMPLETE")))


COMMANDS: tuple[click.Command, ...] = (check, completion)
