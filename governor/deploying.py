"""What deploy/install.sh asks of the release it installs: `python -I -m governor.deploying COMMAND …`.

The settings are known here and nowhere else, and a secret goes from file to file without being anybody's argument
or output.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import click

from governor import envfile
from governor.alerts.targets import targets_of
from governor.console import BAD_SETTINGS, FAILED, NO_REDIS, fail
from governor.settings import TABLE, Row, Settings, load

EXCHANGE = ("BINANCE_TESTNET_API_KEY", "BINANCE_TESTNET_API_SECRET")
"""What an installation takes over from the file of the bot's own credentials."""
SECRETS = tuple(row.name for row in TABLE if row.secret)
CREDENTIALS = "/etc/quantum/governor.credentials"
_WIDTH = 118
_REDIS_S = 10
Copied = Literal["copied", "kept", "kept, although the other file has another one", "not there"]


@click.group()
def main() -> None:
    """What the installation asks of a release."""


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
def comments(path: Path) -> None:
    """The settings an environment file does not mention, as comments to add to it."""
    data = _bytes(path)
    added = describe(unmentioned(data.decode(errors="replace")))
    if not added:
        return
    try:
        before = envfile.variables(data)
        if envfile.variables(data + b"\n" + added.encode()) != before:
            raise ValueError("expected an end that is no open quote and no backslash")
    except ValueError as error:
        fail(f"{path}: {error}", BAD_SETTINGS)
    click.echo(added, nl=False)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice([row.name for row in TABLE if not row.secret]))
def values(path: Path, names: tuple[str, ...]) -> None:
    """What an environment file gives settings, else their defaults: a line for each."""
    try:
        given = {row.name: row.default for row in TABLE} | envfile.variables(_bytes(path))
    except ValueError as error:
        fail(f"{path}: {error}", BAD_SETTINGS)
    click.echo("".join(f"{given[name]}\n" for name in names), nl=False)


@main.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
def secrets(path: Path | None) -> None:
    """The names of all secret settings; with PATH those which that environment file gives a value."""
    try:
        given = dict.fromkeys(SECRETS, "x") if path is None else envfile.variables(_bytes(path))
    except ValueError as error:
        fail(f"{path}: {error}", BAD_SETTINGS)
    click.echo("".join(f"{name}\n" for name in SECRETS if given.get(name)), nl=False)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Write nothing.")
def credentials(source: Path, directory: Path, *, dry_run: bool) -> None:
    """Copy the exchange credentials of an environment file into files of their own, where there are none yet."""
    try:
        for name, outcome in copy_credentials(_bytes(source), directory, dry_run=dry_run):
            click.echo(f"{name} {outcome}")
    except (OSError, ValueError) as error:
        fail(f"{source}: {error}", FAILED)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--offline", is_flag=True, help="Do not ask Redis.")
def check(path: Path, *, offline: bool) -> None:
    """Whether a governor would start with these settings: on this Redis, too.

    Ends with 78 where it would not, and with 4 where Redis does not answer.
    """
    try:
        settings = load({**os.environ, **envfile.variables(_bytes(path))})
        targets_of(settings.alert_urls)
    except ValueError as error:
        fail(f"{path}: {error}", BAD_SETTINGS)
    for warning in settings.warnings:
        click.echo(f"note: {path}: {warning}")
    if offline:
        return
    from events.store import StoreError, UnavailableError  # noqa: PLC0415 - only this command needs the client

    try:
        why = asyncio.run(_forgets(settings))
    except (UnavailableError, TimeoutError) as error:
        fail(f"Redis is not reachable: {str(error) or 'no answer'}", NO_REDIS)
    except StoreError as error:
        fail(str(error), FAILED)
    if why is not None and settings.require_durable:
        fail(
            f"GOV_REQUIRE_DURABLE is true, expected a server that keeps what it is told: {why}",
            BAD_SETTINGS,
        )


async def _forgets(settings: Settings) -> str | None:
    from governor.connection import connected  # noqa: PLC0415 - as above
    from governor.durability import durability, refusal  # noqa: PLC0415

    async with asyncio.timeout(_REDIS_S), connected(settings) as client:
        return refusal(await durability(client), attested=settings.durability_attested)


def unmentioned(text: str) -> list[Row]:
    """Rows of the settings that an environment file neither sets nor has in a comment."""
    return [row for row in TABLE if not re.search(rf"^[ \t#;]*{row.name}\b", text, re.MULTILINE)]


def describe(rows: Iterable[Row]) -> str:
    """Comments for an environment file: what a setting is, and below it, on a line of its own, its default.

    A comment behind a value would become part of it once the line is put into force.
    """
    return "".join(f"\n{_comment(row)}" for row in rows)


def _comment(row: Row) -> str:
    where = [f"{row.name}: a secret, in {CREDENTIALS}/{row.name}. {row.help}"] if row.secret else [row.help]
    lines = textwrap.wrap(where[0].replace("`", ""), _WIDTH, break_long_words=False, break_on_hyphens=False)
    lines += [] if row.secret else [f"{row.name}={row.default}"]
    return "".join(f"# {line}\n" for line in lines)


def copy_credentials(data: bytes, directory: Path, *, dry_run: bool = False) -> Iterator[tuple[str, Copied]]:
    """Copy what is not in the directory yet; yields each name and what became of it.

    Raises:
        ValueError: the file cannot be read as systemd would.
        OSError: the directory cannot be written.
    """
    found = envfile.variables(data)
    for name in EXCHANGE:
        there = directory / name
        given = found.get(name, "")
        if there.exists():
            same = not given or there.read_text().strip() == given
            yield name, "kept" if same else "kept, although the other file has another one"
        elif not given:
            yield name, "not there"
        else:
            if not dry_run:
                _write_secret(there, given)
            yield name, "copied"


def _write_secret(path: Path, text: str) -> None:
    """A file that only its owner may read, from its first byte on."""
    descriptor, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temp).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temp).unlink()
        raise


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"{path}: expected a readable file: {error.strerror}", BAD_SETTINGS)


if __name__ == "__main__":
    main()
