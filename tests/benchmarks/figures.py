"""What a benchmark finds: figures of lines, each beside its floor, and the table of them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

Samples = list[float]
"""Of one block."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One number, and the one it is held to."""

    what: str
    value: float
    unit: str
    floor: float | None = None
    """The same of the bare version, measured in the same run."""
    ratio: float | None = None
    """Value to floor."""
    spread: tuple[float, float] | None = None
    """The least and the greatest ratio of a block."""
    must: str = "stated"
    """What is asked of it."""
    reached: bool | None = None
    """None: nothing is asked."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """What one benchmark found."""

    name: str
    how: str
    """How it was measured, in a sentence or two."""
    lines: tuple[Line, ...]
    blocks: int
    samples: int
    """Of the value, over all blocks; the floor has as many."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    blocks: int
    rounds: int
    """Timed plans of a block."""
    exchange_rounds: int
    waiting: int
    """Plans that wait where decisions a second are counted."""
    floods: int
    """How often they are."""
    decisions: int
    """Decided alone."""
    events: int
    """Length of the history that is read."""
    readings: int
    """How often it is."""
    starts: int
    day: int
    """Plans of a day, where memory is looked at."""
    days: int
    breaches: int
    commands: int
    """Runs of `governor status`."""


QUICK = Sizes(
    blocks=2, rounds=10, exchange_rounds=5, waiting=400, floods=1, decisions=500, events=12_000, readings=1, starts=1,
    day=400, days=2, breaches=2, commands=1,
)  # fmt: skip
USUAL = Sizes(
    blocks=20, rounds=200, exchange_rounds=25, waiting=20_000, floods=3, decisions=20_000, events=100_000, readings=3,
    starts=5, day=40_000, days=3, breaches=100, commands=20,
)  # fmt: skip
FULL = msgspec.structs.replace(USUAL, events=1_000_000, day=1_000_000, starts=9)


def at(values: Sequence[float], percent: int) -> float:
    """The value that so many percent of them do not exceed."""
    return sorted(values)[-(-len(values) * percent // 100) - 1]


def compared(
    what: str, ours: Sequence[Samples], floors: Sequence[Samples], percent: int, most: float, *, unit: str = "ms"
) -> Line:
    """A percentile over all blocks beside the floor's, which it may exceed so many times."""
    value, floor = (at([one for block in blocks for one in block], percent) for blocks in (ours, floors))
    ratios = [at(mine, percent) / at(bare, percent) for mine, bare in zip(ours, floors, strict=True)]
    return Line(
        what=what,
        value=value,
        unit=unit,
        floor=floor,
        ratio=value / floor,
        spread=(min(ratios), max(ratios)),
        must=f"≤ {most:g} x floor",
        reached=value <= most * floor,
    )


def held_within(line: Line, more: float) -> Line:
    """The same line, which may exceed its floor by so much, in its own unit."""
    assert line.floor is not None
    return msgspec.structs.replace(
        line, must=f"≤ floor + {more:g} {line.unit}", reached=line.value <= line.floor + more
    )


def rated(what: str, ours: Sequence[float], floors: Sequence[float], least: float | None, *, unit: str) -> Line:
    """A rate, the median of the blocks, beside the floor's, of which it has to be a part."""
    ratios = [mine / bare for mine, bare in zip(ours, floors, strict=True)]
    ratio = at(ratios, 50)
    return Line(
        what=what,
        value=at(ours, 50),
        unit=unit,
        floor=at(floors, 50),
        ratio=ratio,
        spread=(min(ratios), max(ratios)),
        must="stated" if least is None else f"≥ {least:g} x floor",
        reached=None if least is None else ratio >= least,
    )


def table(figures: Sequence[Figure]) -> list[str]:
    """For a terminal."""
    head = ("figure", "", "value", "floor", "ratio", "over blocks", "asked", "")
    rows = [head] + [
        (
            figure.name if number == 0 else "",
            line.what,
            f"{_number(line.value)} {line.unit}",
            "" if line.floor is None else _number(line.floor),
            "" if line.ratio is None else f"{line.ratio:.2f}",
            "" if line.spread is None else f"{line.spread[0]:.2f} to {line.spread[1]:.2f}",
            line.must,
            "" if line.reached is None else "yes" if line.reached else "NO",
        )
        for figure in figures
        for number, line in enumerate(figure.lines)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
