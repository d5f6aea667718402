"""What was measured along one axis, as a picture: small, its text as text, the same points always the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from governor.plot import STYLE, check_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GATE, FLOOR, OTHER = "#0060a8", "#8a8a8a", "#b3530b"
DASH = (0, (4, 2))
DOTS = (0, (1, 2))
WIDTH_IN, HEIGHT_IN = 4.0, 3.4


class Line(msgspec.Struct, frozen=True):
    """One line of a panel."""

    key: str
    """Of the values of a point; points without it are left out."""
    label: str
    color: str = GATE
    dashed: bool = False
    marker: str = "o"
    goes_on: bool = False
    """Beyond the last point that has a value it is drawn on in proportion to x, dotted."""


class Panel(msgspec.Struct, frozen=True):
    """One diagram."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    log: bool = True
    marks: tuple[tuple[float, str], ...] = ()
    """Values worth a line of their own, and what they are."""


class Point(msgspec.Struct, frozen=True):
    """What was measured at one place of an axis."""

    x: int
    values: dict[str, float]
    others: float
    """Part of all processors that went to what is none of ours meanwhile, 0 to 1."""
    again: int = 0
    """How often it was measured again."""


def draw(title: str, along: str, panels: Sequence[Panel], points: Sequence[Point], path: Path, *, noisy: float) -> None:
    """Draw the panels side by side.

    Args:
        title: of the picture.
        along: what x counts.
        panels: what is shown.
        points: by ascending x.
        path: .svg or .png; overwritten.
        noisy: a point of which others took at least this part has an empty marker.

    Raises:
        ValueError: the name ends neither in .svg nor in .png.
        PlotUnavailableError: matplotlib is missing.
        OSError: it cannot be written.
    """
    check_target(path)
    import matplotlib as mpl  # noqa: PLC0415 - optional, and slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN * len(panels), HEIGHT_IN), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        for number, panel in enumerate(panels, start=1):
            _panel(figure.add_subplot(1, len(panels), number), panel, points, along, noisy)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else {"Software": None})


def _panel(ax: Axes, panel: Panel, points: Sequence[Point], along: str, noisy: float) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator  # noqa: PLC0415

    ax.set_xscale("log")
    if panel.log:
        ax.set_yscale("log")
    for line in panel.lines:
        _line(ax, line, points, noisy)
    for value, what in panel.marks:
        ax.axhline(value, color="#404040", linewidth=0.8, linestyle=DOTS)
        ax.annotate(what, (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
    if not panel.log:
        ax.set_ylim(0, 1.25 * ax.get_ylim()[1])  # room for the legend
    else:
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlim(points[0].x / 1.3, points[-1].x * 1.3)
    ax.xaxis.set_major_locator(FixedLocator([float(point.x) for point in points]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda x, _: short(x))
    ax.yaxis.set_major_formatter("{x:,.6g}")
    ax.tick_params(labelsize=8)
    ax.set_xlabel(along, fontsize=9)
    ax.set_ylabel(panel.unit, fontsize=9)
    ax.set_title(panel.title, loc="left", fontsize=10)
    ax.grid(color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(fontsize=7, frameon=False, handlelength=3.2)


def _line(ax: Axes, line: Line, points: Sequence[Point], noisy: float) -> None:
    known = [point for point in points if line.key in point.values]
    if not known:
        return
    style: dict[str, Any] = {"color": line.color, "linewidth": 1.4, "linestyle": DASH if line.dashed else "-"}
    xs, ys = [point.x for point in known], [point.values[line.key] for point in known]
    ax.plot(xs, ys, label=line.label, marker=line.marker, markersize=4, **style)
    empty = [(x, y) for x, y, point in zip(xs, ys, known, strict=True) if point.others >= noisy]
    for x, y in empty:
        ax.plot([x], [y], marker=line.marker, markersize=4, color=line.color, markerfacecolor="white")
    last = points[-1].x
    if line.goes_on and last > xs[-1]:
        beyond = ys[-1] * last / xs[-1]
        ax.plot([xs[-1], last], [ys[-1], beyond], color=line.color, linewidth=1.0, linestyle=DOTS)


def short(x: float) -> str:
    """A count for an axis: 300, 10k, 10M."""
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if x >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"
