"""Plots as inline SVG, in the text colour of the page, so that they are legible in light and dark themes.

matplotlib, whose import takes a second, is imported when the first plot is drawn.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

INK = "#010203"  # placeholder, replaced by the text colour in the SVG
COLOURS = ("#3d85c6", "#e0762f", "#3c9d63", "#b565c9", "#d14d63", "#7f8790")  # contrast of 3 on white and near-black
DASHES = ("", "6 3", "2 2")  # as in SVG's stroke-dasharray, in points
WIDTH = 3.8  # inches
MARGINS = {"left": 0.16, "right": 0.96, "bottom": 0.19, "top": 0.89}  # of a line plot; automatic ones double the time
LONGEST_NAME = 32
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "svg.fonttype": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
}


class Line(NamedTuple):
    """Line style of a run in all plots."""

    colour: str
    dash: str


class Curve(NamedTuple):
    """One line of a plot, with this marker at its points."""

    name: str
    line: Line
    x: Sequence[float]
    y: Sequence[float]
    marker: str = "."


class Plot(NamedTuple):
    """An SVG element with a text alternative for screen readers."""

    svg: Markup


def in_digits(value: float) -> str:
    """A number with four significant digits; from 1,000 on, rounded to an integer."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def line_of(number: int) -> Line:
    """The line style of the run with this number; the first eighteen are distinct."""
    return Line(COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)])


def line_plot(title: str, x_label: str, curves: Sequence[Curve], logarithmic: bool) -> Plot:
    """Curves over a logarithmic x axis; `logarithmic` is for the y axis. The text alternative names the curves."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with rc_context(STYLE):
        figure = Figure((WIDTH, 2.6))
        axes = figure.subplots(gridspec_kw=MARGINS)
        for curve in curves:
            dashes = [float(length) for length in curve.line.dash.split()]
            (line,) = axes.plot(curve.x, curve.y, color=curve.line.colour, marker=curve.marker, markersize=4)
            if dashes:
                line.set_dashes(dashes)
        axes.set(title=title, xlabel=x_label, xscale="log", yscale="log" if logarithmic else "linear")
        _label(axes.xaxis, EngFormatter(sep=""))
        if logarithmic:
            _label(axes.yaxis, "{x:g}")
        ranges = (f"{curve.name}: from {in_digits(curve.y[0])} to {in_digits(curve.y[-1])}" for curve in curves)
        return Plot(_svg(figure, f"Line plot of {title}. {'; '.join(ranges)}."))


def _label(axis: "Axis", formatter: "Formatter | str") -> None:
    """Label a logarithmic axis without powers of ten, with more ticks if it spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def bar_plot(title: str, groups: Mapping[str, Mapping[str, float]], colour: str) -> Plot:
    """Horizontal bars by group and name, with a shared axis."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    bars = sum(map(len, groups.values()))
    with rc_context({**STYLE, "axes.grid.axis": "x", "ytick.major.size": 0}):
        figure = Figure((WIDTH, 0.7 + 0.35 * len(groups) + 0.18 * bars), layout="constrained")
        heights = [len(group) + 0.5 for group in groups.values()]
        rows = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, group) in zip(rows, groups.items(), strict=True):
            drawn = axes.barh(range(len(group)), list(group.values()), color=colour)
            axes.bar_label(drawn, fmt=in_digits, padding=2, fontsize=8)
            axes.set_yticks(range(len(group)), map(_shortened, group), fontsize=8)
            axes.set_ylim(len(group) - 0.4, -0.6)
            axes.set_title(_shortened(name), loc="left", fontsize=9)
            axes.margins(x=0.2)
        rows[-1].set_xlabel(title)
        values = (
            f"{name}: " + ", ".join(f"{bar} {in_digits(value)}" for bar, value in group.items())
            for name, group in groups.items()
        )
        return Plot(_svg(figure, f"Bars: {title}. {'; '.join(values)}."))


def _shortened(name: str) -> str:
    """A name, cut at its start if it would leave too little room for the bars."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _svg(figure: "Figure", alt: str) -> Markup:
    """The figure as an element of the page, in which ids must be unique."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": alt}):  # ids that are reproducible, and unique in the page
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return Markup(text.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(alt), 1))
