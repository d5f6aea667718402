"""The what-if audit as a picture: totals of the day and states over time, as recorded and under other settings."""

from __future__ import annotations

import datetime as dt
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from governor.outcome import Outcome, Panel, Series

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")
# Told apart without colour too: by line width and dash, by hatch and by name.
RECORDED: dict[str, Any] = {"color": "#595959", "linewidth": 2.4, "alpha": 0.75}
COMPUTED: dict[str, Any] = {"color": "#0060a8", "linewidth": 1.3}
LIMIT: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (4, 3))}
STATES: dict[str, dict[str, Any]] = {
    "ARMED": {"facecolor": "#cfe8dc", "hatch": None},
    "THROTTLED": {"facecolor": "#f6d27a", "hatch": "//"},
    "DISARMED": {"facecolor": "#d0533f", "hatch": "xx"},
}
EDGE = "#404040"
NEAR = 3.0
"""A limit more than this many times above all that was moved is named instead of drawn."""
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "governor",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "timezone": "UTC",
    "date.epoch": "1970-01-01T00:00:00",
}


class PlotUnavailableError(RuntimeError):
    """The packages that draw are not installed."""


def check_target(path: Path) -> None:
    """Whether a picture can be written there, without drawing it.

    Raises:
        ValueError: the name ends neither in .svg nor in .png.
        PlotUnavailableError: matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{str(path)!r} is no picture this can write, expected a name ending in {' or '.join(FORMATS)}"
        )
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 - optional, and slow to import
    except ImportError as error:
        raise PlotUnavailableError(
            f"a picture needs the packages of the extra 'plot': pip install '.[plot]' ({error})"
        ) from None


def plot(outcome: Outcome, path: Path) -> None:
    """Draw an outcome. The same outcome gives the same bytes.

    Args:
        outcome: what was found.
        path: .svg or .png; overwritten.

    Raises:
        ValueError: the name ends neither in .svg nor in .png.
        PlotUnavailableError: matplotlib is missing.
        OSError: it cannot be written.
    """
    check_target(path)
    import matplotlib as mpl  # noqa: PLC0415 - optional, and slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    series = outcome.series
    heights = [1.5, *([1.0] * (len(series.panels) - 1)), 0.75]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.9 * sum(heights) + 1.4), layout="constrained")
        axes: Sequence[Axes] = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
        title = textwrap.fill(f"what if {outcome.changes}", 90)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        for number, (ax, panel) in enumerate(zip(axes[:-1], series.panels, strict=True)):
            _totals(ax, panel, series, first=number == 0)
        _bands(axes[-1], series)
        figure.align_ylabels(axes[:-1])
        _time_axis(axes[-1], series)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else {"Software": None})


def _totals(ax: Axes, panel: Panel, series: Series, *, first: bool) -> None:
    """One panel: the total as two lines, its limits as dashed ones."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    highest = max(value for _, value in (*panel.recorded, *panel.computed))
    handles: list[Line2D] = []
    for totals, style, label in ((panel.recorded, RECORDED, "recorded"), (panel.computed, COMPUTED, "what if")):
        drawn = ax.plot(*_steps(totals, series), drawstyle="steps-post", label=label, **style)
        handles += drawn if first else []
    same = panel.recorded_limit == panel.computed_limit
    limits = [(panel.recorded_limit, RECORDED["color"], "limit" if same else "limit recorded")]
    limits += [] if same else [(panel.computed_limit, COMPUTED["color"], "limit what if")]
    for limit, color, label in limits:
        values = [value for _, value in limit if value is not None]
        near = bool(values) and min(values) <= NEAR * highest
        if near:
            ax.plot(*_steps(limit, series), drawstyle="steps-post", color=color, **LIMIT)
        last = limit[-1][1]
        told = f"{label} " + ("off" if last is None else f"{last:,.10g}")
        handles.append(Line2D([], [], color=color, label=told, **(LIMIT if near else {"linestyle": "none"})))
    top = ax.get_ylim()[1] if highest or len(ax.get_lines()) > 2 else 1.0
    ax.set_ylim(-0.03 * top, top)  # a line at zero is seen
    ax.set_ylabel(panel.unit)
    ax.yaxis.set_major_formatter("{x:,.10g}")
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)
    what = "notional" if panel.unit == "USD" else "quantity"
    ax.set_title(f"{panel.symbol or 'all symbols'}: {what} of the UTC day", loc="left", fontsize=10)
    _legend(ax, handles)


def _bands(ax: Axes, series: Series) -> None:
    """The states as two bands."""
    from matplotlib.patches import Patch  # noqa: PLC0415

    for row, states in ((1, series.recorded_states), (0, series.computed_states)):
        starts = [_days(at) for at, _ in states]
        for name, style in STATES.items():
            spans = [
                (start, until - start)
                for (_, state), start, until in zip(states, starts, [*starts[1:], _days(series.end)], strict=False)
                if state == name
            ]
            ax.broken_barh(spans, (row - 0.4, 0.8), edgecolor=EDGE, linewidth=0, **style)
    ax.set_yticks([1, 0], ["recorded", "what if"])
    ax.set_ylim(-0.55, 1.55)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_title("state", loc="left", fontsize=10)
    _legend(ax, [Patch(edgecolor=EDGE, linewidth=0.3, label=name, **style) for name, style in STATES.items()])


def _legend(ax: Axes, handles: Sequence[Artist]) -> None:
    """One line above the panel, at its right."""
    ax.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles), fontsize=8, frameon=False,
        borderaxespad=0.2, handlelength=2.5,
    )  # fmt: skip


def _time_axis(ax: Axes, series: Series) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter  # noqa: PLC0415

    locator = AutoDateLocator(tz=dt.UTC)  # type: ignore[no-untyped-call]
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=dt.UTC))  # type: ignore[no-untyped-call]
    ax.set_xlim(_days(series.start), _days(max(series.end, series.start + 1)))
    ax.set_xlabel("time (UTC)")


def _steps(steps: Sequence[tuple[float, float | None]], series: Series) -> tuple[list[float], list[float]]:
    """Times and values up to the end; a gap where there is no value."""
    values = [float("nan") if value is None else value for _, value in steps]
    return [*(_days(at) for at, _ in steps), _days(series.end)], [*values, values[-1]]


def _days(unix: float) -> float:
    """How matplotlib counts time: days since the epoch."""
    return unix / 86_400
