"""What the commands share: exit codes, options, the settings, and how they end."""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import getpass
import math
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from events.files import FileStore
    from events.store import EventStore
    from events.types import Entry, Head
    from governor.settings import Settings

DONE, FAILED, DIFFERS, NO_REDIS, BAD_SETTINGS = 0, 1, 3, 4, 78
CODES = (
    "\b\nExit codes: 0 done, 1 failed, 2 usage, 3 neither ARMED nor THROTTLED (status)\n"
    "or something differs (replay, rebuild --check), "
    "4 Redis not reachable, 78 bad settings."
)
PAGE = 1000
LONG = 20_000
"""Events from which on a person is shown how far it is."""

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def _no_color(context: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's order
    if value:
        context.color = False


no_color_option = click.option(
    "--no-color",
    is_flag=True,
    expose_value=False,
    callback=_no_color,
    help="No colours, as with NO_COLOR in the environment or where the output is no terminal.",
)
from_option = click.option(
    "--from",
    "files",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="Read exported files, or directories of them, instead of Redis (repeatable).",
)


def _reason(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter("say why; it is recorded")
    return value.strip()[:500]


reason_option = click.option("--reason", required=True, metavar="TEXT", callback=_reason, help="Why. It is recorded.")


def settings_of(*, logs: bool = False, stopping: bool = False) -> Settings:
    """The effective settings; a wrong one ends the program."""
    from governor.settings import SettingsError  # noqa: PLC0415

    try:
        settings = load_settings(stopping=stopping)
    except SettingsError as error:
        fail(str(error), BAD_SETTINGS)
    if logs:
        from governor.logs import configure  # noqa: PLC0415

        configure(log_format=settings.log_format, level=settings.log_level)
    return settings


def load_settings(*, stopping: bool = False) -> Settings:
    """The effective settings, --env-file with them.

    Raises:
        SettingsError: one is wrong, or the file cannot be read.
    """
    from governor.settings import load, load_for_stop  # noqa: PLC0415

    _read_env_file(stopping=stopping)
    return (load_for_stop if stopping else load)(os.environ)


def _read_env_file(*, stopping: bool) -> None:
    """What --env-file names becomes part of the environment; what is in the environment already stays.

    A file systemd would not take whole does not keep a person from stopping.
    """
    context = click.get_current_context(silent=True)
    path: Path | None = context.find_root().params.get("env_file") if context is not None else None
    if path is None:
        return
    from governor.envfile import effective, variables  # noqa: PLC0415
    from governor.settings import STOPPING, SettingsError  # noqa: PLC0415

    data = b""
    try:
        data = path.read_bytes()
        given = variables(data)
    except PermissionError as error:
        raise SettingsError(
            f"--env-file {path}: {operator()} may not read it; try sudo, or as a member of its group"
        ) from error
    except OSError as error:
        raise SettingsError(f"--env-file {path}: expected a readable file: {error.strerror}") from error
    except ValueError as error:
        if not stopping:
            raise SettingsError(f"--env-file {path}: {error}") from error
        click.echo(f"governor: warning: --env-file {path}: {error}", err=True)
        read = {name: effective(data, name) for name in STOPPING}
        given = {name: value for name, value in read.items() if value is not None and "\0" not in value}
    os.environ.update({name: value for name, value in given.items() if name not in os.environ})


def run(work: Coroutine[Any, Any, int]) -> NoReturn:
    """Do a command's work and end with its exit code."""
    from events.store import StoreError, UnavailableError  # noqa: PLC0415

    try:
        sys.exit(asyncio.run(work))
    except UnavailableError as error:
        fail(f"Redis is not reachable: {error}", NO_REDIS)
    except (StoreError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            sys.exit(130)
        fail(str(error), FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


@asynccontextmanager
async def history(settings: Settings, files: Sequence[Path]) -> AsyncIterator[EventStore | FileStore]:
    """The events: in exported files where some are given, else in Redis with the archive before it."""
    if files:
        from events.files import FileStore  # noqa: PLC0415

        yield FileStore(files)
        return
    from governor.connection import connected, store_on  # noqa: PLC0415

    async with connected(settings) as client:
        yield store_on(client, settings)


async def pages(store: EventStore | FileStore, *, label: str) -> AsyncIterator[list[Entry]]:
    """Every event from the first, a page at a time; on a terminal a long history shows how far it is.

    Raises:
        UnavailableError: Redis does not answer.
        DamagedError: behind what was given out there is something that is no event.
    """
    gc.freeze()  # what was imported need not be looked at again and again
    seq = 0
    with progress(await length(store), label=label) as told:
        while entries := await _page(store, seq):
            yield entries
            seq = entries[-1].seq
            told(len(entries))


async def length(store: EventStore | FileStore) -> int:
    """How many events there are; 0 where the last one is no event."""
    from events.store import StoreError, UnavailableError  # noqa: PLC0415

    try:
        return (await store.head()).seq
    except UnavailableError:
        raise
    except StoreError:
        return 0


class DamagedError(ValueError):
    """Something in the history is no event; `seq` is the last one before it."""

    def __init__(self, seq: int, problem: str) -> None:
        super().__init__(problem)
        self.seq = seq


async def _page(store: EventStore | FileStore, seq: int) -> list[Entry]:
    from events.store import StoreError, UnavailableError  # noqa: PLC0415

    try:
        return await store.read(seq, limit=PAGE)
    except UnavailableError:
        raise
    except (StoreError, ValueError):
        pass
    found: list[Entry] = []  # one by one, up to the one that cannot be read
    while True:
        try:
            entries = await store.read(seq, limit=1)
        except UnavailableError:
            raise
        except (StoreError, ValueError) as error:
            if found:
                return found
            raise DamagedError(seq, str(error)) from error
        if not entries:
            return found
        found += entries
        seq = entries[-1].seq


@contextmanager
def progress(total: int, *, label: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where it is a terminal and the work is long."""
    if total < LONG or not sys.stderr.isatty():
        yield lambda _count: None
        return
    with click.progressbar(length=total, label=label, file=sys.stderr, show_pos=True) as bar:
        yield bar.update


def operator() -> str:
    """Who is acting."""
    return os.environ.get("SUDO_USER") or getpass.getuser()


def fail(message: str, code: int) -> NoReturn:
    """End with a message on stderr."""
    click.echo(f"governor: {message}", err=True)
    sys.exit(code)


def print_json(value: Any) -> None:
    """One JSON document."""
    from events.codec import dumps  # noqa: PLC0415

    click.echo(dumps(value).decode())


def head_of(text: str | None, *, option: str) -> Head | None:
    """`SEQ:HASH`."""
    from events.types import Head  # noqa: PLC0415

    if text is None:
        return None
    seq, _, digest = text.partition(":")
    if not (seq.isascii() and seq.isdecimal() and digest):
        raise click.BadParameter(f"{text!r}, expected SEQ:HASH", param_hint=option)
    return Head(int(seq), digest)


class Number(click.FloatRange):
    """A number in a range; what is not a number is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def moment(text: str, now_us: int, *, option: str) -> int:
    """A point in time, microseconds: ISO 8601 (UTC unless it says otherwise), unix seconds, or `-2h`."""
    try:
        if text.startswith("-") and text[-1:] in UNITS_S:
            return now_us - duration(text[1:], option=option)
        try:
            return round(float(text) * 1e6)
        except ValueError:
            when = dt.datetime.fromisoformat(text)
            return round((when if when.tzinfo else when.replace(tzinfo=dt.UTC)).timestamp() * 1e6)
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{text!r}, expected ISO 8601, unix seconds, or -2h (s, m, h, d)", param_hint=option
        ) from None


def duration(text: str, *, option: str) -> int:
    """A span such as `15m` or `90s`, microseconds."""
    try:
        return round(float(text[:-1]) * UNITS_S[text[-1:]] * 1e6)
    except (ValueError, KeyError, OverflowError):
        raise click.BadParameter(f"{text!r}, expected a span such as 90s, 15m, 2h, 1d", param_hint=option) from None
