"""One Markdown table, and a plot, of the metrics of all runs in some folders, alongside published values.

python scripts/results_table.py result/reproduce --output docs/table.md --plot docs/table.png

Each value has a letter that stands for its protocol, explained below the table: only values with the same letter are
comparable. "not run" means that the run lacks the metric. Each setting of sampling has a row of its own. Evaluations
of the same weights with different seeds (`--checkpoint RUN --seed N --result_path DIR_N`) become one row, with the mean
and the half-width of the 95 % confidence interval where values differ.
"""

import argparse
import statistics
import string
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

from errors import UserError, reported
from files import expand
from pipeline.checkpoints import check_place, write_file
from pipeline.evaluation.records import comparable, sampling_of
from pipeline.lineage import costs
from pipeline.options.parser import as_typed
from pipeline.options.sections import DEFAULTS
from pipeline.run_folder import RunFolder
from pipeline.runtime.terminal import print_anywhere
from pipeline.sampling.grids import check_figure_place, save_figure

COLUMNS = {
    "paper_fid": "FID, paper protocol",
    "fid": "FID, 10,000 against test",
    "fid_50k": "FID, 50,000 against train",
    "clean_fid": "clean-fid, 10,000 at 32x32",
    "clean_fid_5k": "clean-fid, 5,000 at 32x32",
    "reconstruction_fid": "FID of reconstructions",
    "reconstruction_clean_fid": "clean-fid of reconstructions",
    "other_fid": "FID, other protocols",
    "kid": "KID",
    "inception_score": "IS",
    "fad": "FAD",
    "reconstruction_fad": "FAD of reconstructions",
    "classifier_frechet": "classifier distance",
    "classifier_recall": "recall, classifier features",
    "label_accuracy": "recognised as their class",
    "mse": "MSE",
    "ssim": "SSIM",
    "energy_sample": "energy of a sample",
}
"""Name in metrics.json to heading; columns without values are left out, except for those of FID."""

PAPER, CLEAN = "the paper's: 1,280 images, see the release's protocol", "clean-fid, 5,000 generated against test"
DDIM = "clean-fid, 10,000 generated against test"
FAD = "published weights; 10,000 generated against test, by the configuration in the release"
TRAIN = "50,000 generated against the training split"
OWN, RECONSTRUCTION = "protocol not stated", "reconstruction error as published"
PUBLISHED = {
    ("Spiking-Diffusion (paper)", "paper_fid", PAPER): {
        "MNIST": 37.50,
        "FMNIST": 91.98,
        "KMNIST": 59.23,
        "Letters": 67.41,
        "CIFAR10": 120.5,
    },
    ("its baseline (implied by the paper)", "paper_fid", PAPER): {
        "MNIST": 90.58,
        "FMNIST": 113.21,
        "KMNIST": 166.89,
        "Letters": 95.96,
        "CIFAR10": 218.61,
    },
    ("FSVAE (published)", "clean_fid_5k", CLEAN): {"MNIST": 97.06, "FMNIST": 90.12, "CIFAR10": 175.5},
    ("FSVAE (published)", "inception_score", OWN): {"MNIST": 6.209, "FMNIST": 4.551, "CIFAR10": 2.945},
    ("FSVAE (published)", "mse", RECONSTRUCTION): {"MNIST": 0.031, "FMNIST": 0.031, "CIFAR10": 0.066},
    ("ESVAE (published)", "clean_fid_5k", CLEAN): {"MNIST": 117.8, "FMNIST": 125.3, "CIFAR10": 127.0},
    ("ESVAE (published)", "mse", RECONSTRUCTION): {"MNIST": 0.013, "FMNIST": 0.019, "CIFAR10": 0.045},
    ("SGAD (published)", "other_fid", OWN): {"MNIST": 69.64, "FMNIST": 165.42, "CIFAR10": 181.50},
    ("SDDPM (published)", "fid_50k", TRAIN): {"MNIST": 29.48, "FMNIST": 21.38, "CIFAR10": 19.73},
    ("SDM (published)", "fid_50k", TRAIN): {"CIFAR10": 15.45},
    ("FSDDIM, 8 spike steps (published)", "clean_fid", DDIM): {"MNIST": 3.99, "FMNIST": 11.78, "CIFAR10": 46.14},
    ("FSDDIM, 8 spike steps (published)", "fad", FAD): {"MNIST": 5.71, "FMNIST": 4.91, "CIFAR10": 12.61},
    ("FSDDIM, 4 spike steps (published)", "clean_fid", DDIM): {"MNIST": 7.48, "FMNIST": 9.17, "CIFAR10": 51.46},
    ("FSDDIM, 4 spike steps (published)", "fad", FAD): {"MNIST": 3.62, "FMNIST": 9.25, "CIFAR10": 8.63},
}
"""(Model, column, protocol) to data set to value, as published by the authors."""


Record = dict[str, Any]

STANDARD = ("both", "adaptive", "lif", None)  # not an ablation; None: the run is older than the option


class Value(NamedTuple):
    """A number and its protocol; `half_width` is that of its confidence interval, 0 for a single number.

    Values of one column are comparable if their protocol is the same.
    """

    value: float
    protocol: str
    half_width: float = 0.0


class Row(NamedTuple):
    """One model on one data set: values by column, of samples drawn with one setting (empty: of none, or unknown).

    `training` is empty for published values. `drawn` says in words how samples were drawn. `weights` is the digest of
    the evaluated weights.
    """

    dataset: str
    model: str
    training: str
    values: dict[str, list[Value]]
    sampling: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    drawn: str = ""
    weights: str = ""

    def first(self, column: str) -> float:
        """The value of a column; of several protocols, that of the first."""
        return self.values[column][0].value


class Evaluated(NamedTuple):
    """Whose records are put together: those of one model's weights."""

    dataset: str
    model: str
    training: str
    weights: str


def read_rows(runs: Sequence[RunFolder]) -> list[Row]:
    """The rows of runs: for each model, one for each setting of sampling; sets of samples with other seeds are merged.

    Metrics of a model without samples are in each of its rows. Raises UserError if a run has no config.json that says
    what was trained.
    """
    records: dict[Evaluated, list[Record]] = defaultdict(list)
    for run in runs:
        model = _model(run)
        for record in run.read_records():
            records[Evaluated(*model, record.get("weights") or str(run.path))].append(record)
    return [row for model, found in records.items() for row in _rows(model, found)]


def _model(run: RunFolder) -> tuple[str, str, str]:
    """Data set, name and training of the model that a run trained."""
    options = run.trained.read_config()
    if not {"dataset_name", "model"} <= options.keys():
        missing = f"{run.trained.config} does not say which model the metrics in {run.path} are for"
        raise UserError(f"{missing}: restore the file that the run wrote, or leave the folder out")
    ablation = [options[key] for key in ("readout", "spike_generator", "neuron") if options.get(key) not in STANDARD]
    neuron = {key: options.get(key, DEFAULTS[key]) for key in ("tau", "v_threshold", "v_reset")}
    ablation += [f"{key} {as_typed(key, value)}" for key, value in neuron.items() if value != DEFAULTS[key]]
    improved = ["improved"] if options.get("preset") == "improved" else []
    condition = [f"condition {options['condition']}"] if options.get("condition", "none") != "none" else []
    spent = [f"{cost.stage}: {cost.images:,} images, {cost.time}" for cost in costs(run.trained.lineage)]
    model = ", ".join([options["model"], *improved, *condition, *ablation])
    return options["dataset_name"], model, "; ".join(spent) or "training not recorded"


def _rows(model: Evaluated, records: Sequence[Record]) -> Iterator[Row]:
    """A row for each setting of sampling; where there is none, one for all."""
    settings = [_but_seed(record) for record in records]
    drawn = [each for number, each in enumerate(settings) if each and each not in settings[:number]]
    for sampling in drawn or [{}]:
        own = [record for record, each in zip(records, settings, strict=True) if not each or each == sampling]
        columns = dict.fromkeys(record["name"] for record in own)
        values = {
            column: _merged([record for record in own if record["name"] == column], model.dataset) for column in columns
        }
        words = next((record["drawn"] for record in own if record.get("sampling")), "")
        yield Row(model.dataset, model.model, model.training, values, sampling, words, model.weights)


def _but_seed(record: Record) -> dict[str, Any]:
    """The settings that its samples were drawn with, but for the seed; empty for what is of no samples."""
    return {key: value for key, value in sampling_of(record).items() if key != "seed"}


def _merged(records: Sequence[Record], dataset: str) -> list[Value]:
    """For each protocol, the mean over the seeds."""
    values = []
    protocols = [comparable(record, dataset) for record in records]
    for protocol in dict.fromkeys(protocols):
        own = [record for record, each in zip(records, protocols, strict=True) if each == protocol]
        numbers = list({record.get("sampling", {}).get("seed"): record["value"] for record in own}.values())
        values.append(Value(statistics.fmean(numbers), protocol, half_width(numbers)))
    return values


def half_width(numbers: list[float]) -> float:
    """Half-width of the 95 % confidence interval of the mean, by Student's t; 0 for a single number."""
    if len(numbers) < 2:
        return 0.0
    return float(t.ppf(0.975, len(numbers) - 1)) * statistics.stdev(numbers) / len(numbers) ** 0.5


def published_rows(datasets: set[str]) -> Iterator[Row]:
    """The rows of PUBLISHED for these data sets."""
    for dataset in sorted(datasets):
        for model in dict.fromkeys(name for name, _, _ in PUBLISHED):
            values = {
                column: [Value(values[dataset], protocol)]
                for (name, column, protocol), values in PUBLISHED.items()
                if name == model and dataset in values
            }
            if values:
                yield Row(dataset, model, "", values)


def table(rows: list[Row]) -> str:
    """The Markdown table, each value with the letter of its protocol, followed by the protocols."""
    columns = [name for name in COLUMNS if name in ("fid", "paper_fid") or any(name in row.values for row in rows)]
    letters: dict[tuple[str, str], str] = {}

    def cell(row: Row, column: str) -> str:
        if column not in row.values:
            return "not run" if row.training else ""
        return "; ".join(number(column, each) for each in row.values[column])

    def number(column: str, each: Value) -> str:
        letter = letters.setdefault((column, each.protocol), _letter(len(letters)))
        return f"{each.value:.4g}{f' ± {each.half_width:.2g}' if each.half_width else ''} <sup>{letter}</sup>"

    lines = [
        f"| data set | model | training; samples | {' | '.join(COLUMNS[column] for column in columns)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for row in sorted(rows, key=lambda row: row.dataset):
        cells = " | ".join(cell(row, column) for column in columns)
        how = "; ".join(filter(None, (row.training, row.drawn)))
        lines.append(f"| {row.dataset} | {row.model} | {how} | {cells} |")
    notes = [f"- {letter}: {COLUMNS[column]}: {protocol}" for (column, protocol), letter in letters.items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def _letter(number: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    first, last = divmod(number, 26)
    return (_letter(first - 1) if first else "") + string.ascii_lowercase[last]


def plot(rows: list[Row], path: Path) -> None:
    """Bars of the distances (lower is better), one panel per data set and distance; published ones in grey.

    Raises UserError if no run has any.
    """
    import matplotlib.pyplot as plt  # here because importing it takes a second

    distances = ("paper_fid", "fid", "fad", "classifier_frechet")
    panels = [
        (dataset, column, [row for row in rows if row.dataset == dataset and column in row.values])
        for dataset in sorted({row.dataset for row in rows})
        for column in distances
    ]
    panels = [panel for panel in panels if any(row.training for row in panel[2])]
    if not panels:
        raise UserError(f"no run has {', '.join(distances[:-1])} or {distances[-1]}: evaluate one with --metrics fad")
    figure, axes = plt.subplots(len(panels), squeeze=False, figsize=(8, 2.2 * len(panels)), layout="constrained")
    for axis, (dataset, column, shown) in zip(axes[:, 0], panels, strict=True):
        values = [row.first(column) for row in shown]
        colours = ["tab:blue" if row.training else "lightgrey" for row in shown]
        axis.bar_label(axis.barh([row.model for row in shown], values, color=colours), fmt="%.3g", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(f"{dataset}: {COLUMNS[column]} (lower is better)", fontsize="medium")
    save_figure(path, figure)


def plot_classes(rows: list[Row], path: Path) -> None:
    """How many samples are recognised as their class, against how diverse they are; one panel per data set.

    Each trained network is a line through its samples with different guidance, or a vertical one if it knows no
    classes. Raises UserError if no run has both values.
    """
    import matplotlib.pyplot as plt  # here because importing it takes a second

    x, y = "classifier_recall", "label_accuracy"
    rows = sorted((row for row in rows if x in row.values), key=_guidance)
    datasets = sorted({row.dataset for row in rows if y in row.values})
    if not datasets:
        raise UserError(f"no run has {x} and {y}: evaluate one that was trained with labels")
    figure, axes = plt.subplots(1, len(datasets), squeeze=False, figsize=(5.5 * len(datasets), 5), layout="constrained")
    for axis, dataset in zip(axes[0], datasets, strict=True):
        shown = [row for row in rows if row.dataset == dataset]
        for number, weights in enumerate(dict.fromkeys(row.weights for row in shown)):
            points = [row for row in shown if row.weights == weights]
            points = [row for row in points if y in row.values] or points
            recalls, name = [row.first(x) for row in points], f"{points[0].model}; {points[0].training}"
            style: dict[str, Any] = {"color": f"C{number}", "label": name}
            if y not in points[0].values:
                axis.axvline(recalls[0], linestyle="dotted", **style)
                continue
            accuracies = [row.first(y) for row in points]
            axis.plot(recalls, accuracies, marker="o", **style)
            for row, *point in zip(points, recalls, accuracies, strict=True):
                axis.annotate(f"{_guidance(row):g}", point, xytext=(4, 4), textcoords="offset points")
        real = next(row.first("classifier_accuracy") for row in shown if "classifier_accuracy" in row.values)
        axis.axhline(real, color="grey", linestyle="dashed", label="real test images")
        axis.set(title=f"{dataset}; at the points, guidance", xlabel=COLUMNS[x], ylabel=COLUMNS[y])
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    save_figure(path, figure)


def _guidance(row: Row) -> float:
    """With which the samples were drawn."""
    return float(row.sampling.get("guidance", 0))


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or write it; a mistake of the user is one line on stderr and exit status 2."""
    print_anywhere()
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("folders", nargs="+", type=expand, help="run folders, or folders that contain some")
    parser.add_argument("--output", type=expand, help="Markdown file [printed instead]")
    parser.add_argument("--plot", type=expand, help="also plot the distances to this image file")
    parser.add_argument("--classes_plot", type=expand, help="plot the share recognised as their class against recall")
    args = parser.parse_args(arguments)
    runs = [RunFolder(path.parent) for folder in args.folders for path in sorted(folder.rglob("metrics.json"))]
    with reported():
        check_place(args.output)
        for figure in (args.plot, args.classes_plot):
            check_figure_place(figure)
        rows = read_rows(runs)
        if not rows:
            raise UserError(f"no metrics.json below {', '.join(map(str, args.folders))}: evaluate a run first")
        rows += published_rows({row.dataset for row in rows})
        if args.output:
            write_file(args.output, table(rows).encode())
        else:
            print(table(rows))
        if args.plot:
            plot(rows, args.plot)
        if args.classes_plot:
            plot_classes(rows, args.classes_plot)


if __name__ == "__main__":
    main()
