"""The benchmark of the gate: one table on stderr, one JSON document on stdout.

    python -m tests.benchmarks [--quick | --full] [--size NAME=NUMBER] [--server valkey|redis7] [--json FILE] [FIGURE …]

Every figure stands beside its floor, measured in the same run in alternating short blocks, so that noise hits both:
what counts are the ratios. Nothing else should run on the machine meanwhile. Exit code 0: all were measured, whatever
they say; 1: one could not be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tests.benchmarks import alone, gate
from tests.benchmarks.figures import FULL, QUICK, USUAL, Figure, Sizes, table
from tests.servers import KINDS, Kind, RedisServer

FIGURES: dict[str, Callable[[RedisServer, Sizes], Figure]] = {
    "permit": gate.permit,
    "exchange": gate.with_exchange,
    "throughput": gate.throughput,
    "deciding": alone.deciding,
    "reading": alone.reading,
    "start": alone.start,
    "memory": alone.memory,
    "breach": gate.breach,
    "fsync": gate.fsync,
    "status": alone.status,
}
"""In the order of the table. A start goes on with the history that was read, and writes to it."""


class Found(NamedTuple):
    """What a run found."""

    figures: list[Figure]
    failures: dict[str, str]
    """Figures that could not be measured, and why."""


def measured(
    names: Sequence[str], sizes: Sizes, *, kind: Kind = "valkey", told: Callable[[Figure], None] = lambda _: None
) -> Found:
    """The figures of these names, in the order of the table. One that fails does not take the others with it.

    Args:
        names: keys of `FIGURES`.
        sizes: how much is measured.
        kind: which server.
        told: called with each figure as soon as it is there.
    """
    found = Found([], {})
    with RedisServer(kind, appendonly=True) as server:
        for name in (name for name in FIGURES if name in names):
            if not (name == "start" and "reading" in names):
                server.ask("FLUSHALL")
            try:
                figure = FIGURES[name](server, sizes)
            except Exception as error:  # noqa: BLE001 - whatever it was, it is told
                found.failures[name] = f"{type(error).__name__}: {error}"
            else:
                told(figure)
                found.figures.append(figure)
    return found


def document(found: Found, sizes: Sizes, about: dict[str, Any]) -> dict[str, Any]:
    """Everything, as plain JSON values."""
    told = {"sizes": sizes, "figures": found.figures, "failures": found.failures}
    return {**about, **{name: msgspec.to_builtins(value) for name, value in told.items()}}


def setting(kind: Kind) -> dict[str, Any]:
    """What it ran on."""
    with RedisServer(kind) as server:
        info = server.ask("INFO", "server")
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "client": f"redis-py {version('redis')}, hiredis {version('hiredis')}, uvloop {version('uvloop')}",
        "server": f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {info['redis_version']}",
        "aof": "everysec",
    }


def resized(sizes: Sizes, given: Sequence[str]) -> Sizes:
    """Some of the sizes changed.

    Raises:
        ValueError: names what is no size, or its value.
    """
    for text in given:
        name, _, number = text.partition("=")
        if name not in Sizes.__struct_fields__ or not number.isdecimal() or int(number) < 1:
            known = ", ".join(Sizes.__struct_fields__)
            raise ValueError(f"--size {text!r}: expected NAME=NUMBER, the number at least 1, the name one of {known}")
        sizes = msgspec.structs.replace(sizes, **{name: int(number)})
    return sizes


def main(words: Sequence[str]) -> None:
    options = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)} (all)")
    options.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it runs; its numbers say nothing"
    )
    options.add_argument("--full", action="store_true", help="1,000,000 events, and as many plans a day")
    options.add_argument("--size", action="append", default=[], metavar="NAME=NUMBER", help="change one of the sizes")
    options.add_argument("--server", choices=KINDS, default="valkey")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the document here too")
    given = options.parse_args(words)
    if unknown := [name for name in given.figures if name not in FIGURES]:
        options.error(f"unknown figure {unknown[0]!r}, expected one of {', '.join(FIGURES)}")
    try:
        sizes = resized(QUICK if given.quick else FULL if given.full else USUAL, given.size)
    except ValueError as error:
        options.error(str(error))
    alone.quiet()
    begun = time.monotonic()
    about = setting(given.server)
    tell = partial(print, file=sys.stderr, flush=True)
    tell(", ".join(f"{name} {value}" for name, value in about.items()))
    found = measured(
        given.figures or tuple(FIGURES), sizes, kind=given.server,
        told=lambda figure: tell(f"{time.monotonic() - begun:5.0f} s  {figure.name}: {figure.how}"),
    )  # fmt: skip
    tell("", *table(found.figures), sep="\n")
    for name, why in found.failures.items():
        tell(f"{name} was not measured: {why}")
    text = json.dumps(document(found, sizes, about), ensure_ascii=False)
    if given.json is not None:
        given.json.write_text(text + "\n")
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(text + "\n")
    sys.exit(1 if found.failures else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
