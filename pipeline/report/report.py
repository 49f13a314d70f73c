"""The page as a whole: tables and plots over all runs, and the template filled in."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from markupsafe import Markup

from pipeline.checkpoints import write_file
from pipeline.options.declaration import Role
from pipeline.options.parser import option_in_words
from pipeline.options.sections import DECLARATIONS, DEFAULTS, with_role
from pipeline.report.plots import Curve, Plot, line_plot
from pipeline.report.run_view import Missing, RunView, Shown, attempt
from pipeline.runtime import processes
from pipeline.session import Session

TEMPLATE = Path(__file__).with_name("template.html")
NONE = "–"  # an empty cell of a table
MAIN_SETTINGS = ("preset", "dataset_name", "model", "denoiser", "epochs", "diffusion_epochs")
"""Listed for a single run even if they have their default values."""

HELD_OUT = "held_out_loss"
"""The logged value that is drawn beside "loss"."""

TITLES = {
    "mse": "mean squared error",
    "quantizer_loss": "quantiser loss",
    "codebook_usage": "share of the codes in use",
    "mmd": "maximum mean discrepancy",
}
"""Headings of logged values whose names are not self-explanatory."""

SECTIONS: dict[str, tuple[str, Callable[[RunView], Shown]]] = {
    "samples": ("Samples", RunView.samples),
    "trajectory": ("How a sample takes shape", RunView.trajectory),
    "reconstructions": ("Reconstructions", RunView.reconstructions),
    "nearest": ("Nearest training images", RunView.nearest),
    "spikes": ("Spikes of each layer", RunView.firing_rates),
    "energy": ("Energy of each layer", RunView.energy),
}
"""Sections that show the runs side by side: anchor to heading and contents."""

CurveKey = tuple[int, str, str]
Value = TypeVar("Value")


class Row(NamedTuple):
    """A row of a table: one value for each run, as text."""

    name: str
    about: str
    values: list[str]


class Summary(NamedTuple):
    """Rows of a table, or plots, over all runs; and sentences that say what is missing of some."""

    contents: list[Any]
    gaps: list[str]


def write_report(sessions: Sequence[Session], path: Path) -> None:
    """Write the page that shows these runs. Of several processes, rank 0 does it on its own.

    What is missing or fails is replaced by a note. Raises UserError if the file cannot be written.
    """
    if processes.is_rank_0():
        with processes.alone():
            write_file(path, render(sessions).encode("utf-8", "backslashreplace"))


def render(sessions: Sequence[Session]) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here because importing it takes time

    runs = [RunView(session, number) for number, session in enumerate(sessions)]
    whitespace: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    loader = FileSystemLoader(TEMPLATE.parent)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **whitespace)
    pages.filters["breakable"] = breakable
    return pages.get_template(TEMPLATE.name).render(
        runs=runs,
        settings=settings(runs),
        costs=of_each("the cost of", runs, RunView.costs),
        metrics=metrics(runs),
        circumstances=of_each("the metrics of", runs, RunView.circumstances),
        curves=curves(runs),
        sections={key: (title, of_each(f"{key} of", runs, show)) for key, (title, show) in SECTIONS.items()},
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def breakable(text: str) -> Markup:
    """A name with possible line breaks between its parts."""
    return Markup("<wbr>").join(re.split(r"(?<=[_/])", text))


def of_each(what: str, runs: Sequence[RunView], show: Callable[[RunView], Value]) -> list[Value | Missing]:
    """The result of `show` for each run, or why it failed."""
    return [attempt(f"{what} {run.name}", partial(show, run)) for run in runs]


def settings(runs: Sequence[RunView]) -> list[Row]:
    """The settings in which the runs differ; for a single run, the main settings and those that are not defaults."""
    rows = []
    for name in with_role(Role.SETTING):
        row = Row(name, DECLARATIONS[name].help, [setting(run, name) for run in runs])
        telling = row.values[0] not in (NONE, option_in_words(name, DEFAULTS[name])) or name in MAIN_SETTINGS
        if len(set(row.values)) > 1 or (len(runs) == 1 and telling):
            rows.append(row)
    return rows


def setting(run: RunView, name: str) -> str:
    """The value of a run's option, as text."""
    has_option = run.is_known and run.options.concern(name)
    return option_in_words(name, run.options.values()[name]) if has_option else NONE


def metrics(runs: Sequence[RunView]) -> Summary:
    """A row for each metric, protocol, set of real images and feature network: only values in a row are comparable."""
    tables, gaps = _found(runs, of_each("the metrics of", runs, RunView.metrics))
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    names = list(dict.fromkeys(name for name, _ in keys))
    rows = [
        Row(name, protocol, [tables.get(run.name, {}).get((name, protocol), NONE) for run in runs])
        for name, protocol in sorted(keys, key=lambda key: names.index(key[0]))
    ]
    return Summary(rows, gaps)


def curves(runs: Sequence[RunView]) -> Summary:
    """A plot of each logged value, with a line for each run on the same data set with the same loss.

    The loss on held-out images is in the plot of the loss.
    """
    logs, gaps = _found(runs, of_each("the curves of", runs, RunView.curves))
    keys = sorted({key: None for log in logs.values() for key in log if key[1] != HELD_OUT}, key=lambda key: key[0])
    kinds = Counter((stage, name) for stage, name, _ in keys)
    plots = []
    for key in keys:
        stage, name, kind = key
        title = f"stage {stage}: {TITLES.get(name, name)}{f' ({kind})' if kinds[stage, name] > 1 else ''}"
        plots.append(attempt(f"the curve of {name}", partial(curve_plot, key, title, list(logs.values()))))
    return Summary(plots, gaps)


def curve_plot(key: CurveKey, title: str, logs: Sequence[dict[CurveKey, Curve]]) -> Plot:
    """The plot of one value, from the curves of the runs that have it."""
    (stage, name, kind), lines = key, [log[key] for log in logs if key in log]
    held_out = stage, HELD_OUT, kind
    unseen = [log[held_out] for log in logs if name == "loss" and held_out in log]
    if unseen:
        title += "; ×: on held-out images"
        lines += [curve._replace(name=f"{curve.name}, held-out images", marker="x") for curve in unseen]
    logarithmic = name != "codebook_usage" and all(value > 0 for line in lines for value in line.y)
    return line_plot(title, "images seen", lines, logarithmic)


def _found(runs: Sequence[RunView], each: Sequence[Value | Missing]) -> tuple[dict[str, Value], list[str]]:
    """What was found, by run, and what is missing."""
    found = {run.name: value for run, value in zip(runs, each, strict=True) if not isinstance(value, Missing)}
    gaps = [f"{run.name}: {gap.reason}" for run, gap in zip(runs, each, strict=True) if isinstance(gap, Missing)]
    return found, gaps
