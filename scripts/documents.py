"""Write the tables of README.md and docs/results.md from the records of the packed weights.

python scripts/documents.py            # each table stands between "<!-- table: NAME -->" and "<!-- end -->"
python scripts/documents.py --check    # changes nothing; exit status 1 if a table is not up to date

Numbers come from pretrained/*/metrics.json and its lineage, from docs/records/*.json, which scripts/evaluate.py wrote
of random training images, and from the published values in scripts/results_table.py. None is typed.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

from pipeline.lineage import costs
from pipeline.run_folder import RunFolder
from pipeline.runtime.terminal import print_anywhere
from scripts.results_table import COLUMNS, PUBLISHED, half_width

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/results.md")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {"MNIST": "MNIST", "FMNIST": "Fashion-MNIST"}
PROTOCOLS = ("fid", "clean_fid", "clean_fid_5k", "fid_50k")

Record = dict[str, Any]


class Packed(NamedTuple):
    """Packed weights: their folder, data set and preset, and their records."""

    folder: str
    dataset: str
    preset: str

    @property
    def run(self) -> RunFolder:
        """Their run folder."""
        return RunFolder(ROOT / "pretrained" / self.folder)

    def value(self, name: str, digits: int | None = None, scale: float = 1) -> str:
        """A metric, the mean over the sets of samples that were evaluated, with its half-width if there are several."""
        return number([scale * record["value"] for record in self.run.read_records() if record["name"] == name], digits)


PACKED = (
    Packed("fmnist", "FMNIST", "improved"),
    Packed("mnist", "MNIST", "improved"),
    Packed("fmnist-faithful", "FMNIST", "faithful"),
    Packed("mnist-faithful", "MNIST", "faithful"),
)


def number(values: Sequence[float], digits: int | None = None) -> str:
    """Mean and half-width of the 95 % confidence interval; by default with three significant digits, at least."""
    if not values:
        return "not run"
    mean, half = statistics.fmean(values), half_width(list(values))
    if digits is None:
        digits = next((digits for limit, digits in ((1, 3), (10, 2), (100, 1)) if abs(mean) < limit), 0)
    return f"{mean:,.{digits}f}{f' ± {half:,.{digits}f}' if half else ''}"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(cells)} |\n".replace("| ---", "|---").replace("--- |", "---|") for cells in lines)


Show = Callable[[Packed], str]
"""What a table has about packed weights, in words."""


def _pair(first: str, second: str, digits: int, between: str = ", ") -> Show:
    return lambda packed: between.join(packed.value(name, digits) for name in (first, second))


def _training(stage: int) -> Show:
    def cost(packed: Packed) -> str:
        spent = next(each for each in costs(packed.run.lineage) if each.stage.startswith(f"stage {stage}"))
        return f"{spent.images:,}; {spent.time}"

    return cost


def _fad(packed: Packed) -> str:
    """With the number of samples."""
    counts = {record["num_generated"] for record in packed.run.read_records() if record["name"] == "fad"}
    return f"{packed.value('fad')}{''.join(f', of {count:,}' for count in counts)}"


def _codes(packed: Packed) -> str:
    size = packed.run.read_config()["codebook_size"]
    return f"{packed.value('codebook_usage', 0, scale=size)} of {size}, {packed.value('codebook_perplexity', 1)}"


def _recognised(packed: Packed) -> str:
    """Empty for a denoiser that knows no classes."""
    drawn = packed.value("label_accuracy")
    return "" if drawn == "not run" else f"{drawn}; {packed.value('classifier_accuracy')}"


ROWS: dict[str, Show] = {
    "FID, 10,000 samples": lambda packed: packed.value("fid"),
    "FID of reconstructions": lambda packed: packed.value("reconstruction_fid"),
    "FAD, and of how many samples": _fad,
    "FAD of reconstructions": lambda packed: packed.value("reconstruction_fad"),
    "Fréchet distance, classifier features": lambda packed: packed.value("classifier_frechet"),
    "precision, recall, classifier features": _pair("classifier_precision", "classifier_recall", 2),
    "samples recognised as their class; real test images": _recognised,
    "reconstruction MSE, SSIM": lambda packed: f"{packed.value('mse', 4)}, {packed.value('ssim', 3)}",
    "codes in use, perplexity": _codes,
    "energy per sample; of the same networks without spikes, µJ": _pair(
        "energy_sample", "energy_sample_without_spikes", 0, "; "
    ),
    "training images seen by stage 1; time": _training(1),
    "training images seen by stage 2; time": _training(2),
}
"""Rows of a table of packed weights, by their names."""

LEFT_OUT_OF_THE_README = (
    "FAD of reconstructions",
    "Fréchet distance, classifier features",
    "reconstruction MSE, SSIM",
    "codes in use, perplexity",
)


def summary() -> str:
    """All packed weights side by side, a metric in each row."""
    return _side_by_side({f"{packed.preset}, {NAMES[packed.dataset]}": packed for packed in PACKED}, ROWS)


def of_preset(preset: str) -> str:
    """The packed weights of one preset, with the rows that matter most."""
    columns = {NAMES[packed.dataset]: packed for packed in PACKED if packed.preset == preset}
    return _side_by_side(columns, (name for name in ROWS if name not in LEFT_OUT_OF_THE_README))


def _side_by_side(columns: dict[str, Packed], names: Iterable[str]) -> str:
    """Packed weights in columns; a row that none of them has is left out."""
    rows = ([name, *map(ROWS[name], columns.values())] for name in names)
    return markdown(["", *columns], (row for row in rows if any(row[1:])))


def fid() -> str:
    """FID by protocol: published values, ours, and those of real images."""
    rows = []
    for dataset, name in NAMES.items():
        rows += [[name, *row] for row in (*_published(dataset), *_ours(dataset))]
    return markdown(["data set", "", *(COLUMNS[name] for name in PROTOCOLS), "other protocols"], rows)


def _published(dataset: str) -> list[list[str]]:
    """A row for each published model."""
    found: dict[str, dict[str, str]] = {}
    for (model, column, protocol), values in PUBLISHED.items():
        if dataset in values and "fid" in column:
            place, words = (column, "") if column in PROTOCOLS else ("other", f" ({protocol})")
            found.setdefault(model, {})[place] = f"{values[dataset]:.2f}{words}"
    return [[model, *(row.get(column, "") for column in (*PROTOCOLS, "other"))] for model, row in found.items()]


def _ours(dataset: str) -> list[list[str]]:
    """Samples and reconstructions of the packed weights, and random training images."""
    rows = []
    for packed in PACKED:
        if packed.dataset == dataset:
            rows.append([packed.preset, *(packed.value(column) for column in PROTOCOLS), ""])
            floors = [packed.value(f"reconstruction_{column}") for column in ("fid", "clean_fid")]
            rows.append([f"{packed.preset}, reconstructions of the test images", *floors, "", "", ""])
    real = [number(_values(of_real_images(dataset), column)) for column in PROTOCOLS]
    return [*rows, ["random training images", *real, ""]]


def of_real_images(dataset: str) -> list[Record]:
    """The records of random training images, as if they were generated."""
    files = sorted((ROOT / "docs" / "records").glob("*.json"))
    records = (record for file in files for record in json.loads(file.read_text(encoding="utf-8")))
    return [record for record in records if record["dataset"] == dataset]


def _values(records: Iterable[Record], name: str) -> list[float]:
    return [record["value"] for record in records if record["name"] == name]


def by_class() -> str:
    """Metrics of each class, of the first set of samples."""
    names = {"label_accuracy": 3, "fad": 1, "classifier_frechet": 2}
    rows = []
    for packed in PACKED:
        records = {record["name"]: record.get("per_class", {}) for record in reversed(packed.run.read_records())}
        for label in records.get("label_accuracy", {}):
            cells = [number([records[name][label]], digits) for name, digits in names.items()]
            rows.append([NAMES[packed.dataset], label, *cells])
    return markdown(["", "class", "recognised as it", "FAD", "Fréchet distance, classifier features"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "improved": lambda: of_preset("improved"),
    "faithful": lambda: of_preset("faithful"),
    "summary": summary,
    "fid": fid,
    "by_class": by_class,
}


def written(text: str) -> str:
    """A document with its tables written anew."""
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def main(arguments: list[str] | None = None) -> None:
    """Write the tables, or check them."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which documents are not up to date")
    check = parser.parse_args(arguments).check
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        if (after := written(before)) != before:
            stale.append(name)
            if not check:
                path.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'not up to date' if check else 'written'}: {', '.join(stale)}")
    sys.exit(bool(stale and check) or None)


if __name__ == "__main__":
    main()
