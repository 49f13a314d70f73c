"""Records of metrics.json: what each holds, how they are merged, and the table that is printed.

name, value             the metric
protocol                how it is computed, in words
split, num_real         the real images, of which `dataset` and `real_sha256` say what they are
num_generated           how many samples it is of
sampling                the settings that these were drawn with: passes, temperatures, guidance, labels, order, seed
drawn                   the same, or another origin of the images, in words
network                 digest of the feature network; values of different networks are not comparable
seed                    of what is random in the metric itself
weights                 digest of the networks that are evaluated
processor, versions, …  what else its value depends on
"""

from collections.abc import Mapping
from typing import Any

from datasets import ImageData
from pipeline.checkpoints import write_json
from pipeline.run_folder import RunFolder, versions
from pipeline.runtime.device import Machine, describe_machine
from pipeline.runtime.processes import on_rank_0

Record = Mapping[str, Any]


def make_record(
    name: str, value: float, protocol: str, *, data: ImageData, split: str, real: int, generated: int = 0, **more: Any
) -> dict:
    """One metric as stored in metrics.json, with what is needed to compare it; `real` counts images of `split`."""
    counts = {"num_generated": generated, "num_real": real}
    digests = "+".join(data.fingerprint[part]["sha256"] for part in split.split("+"))
    images = {"dataset": data.name, "real_sha256": digests}
    return {"name": name, "value": value, "protocol": protocol, "split": split, **counts, **images, **more}


def context(machine: Machine) -> dict[str, Any]:
    """What a metric's value depends on besides protocol, images and weights."""
    return {"precision": machine.precision, **describe_machine(machine.device), "versions": versions()}


@on_rank_0
def write_records(run: RunFolder, records: list[dict], machine: Machine, weights: str) -> None:
    """Merge records of the networks with the digest `weights` into metrics.json, and print them as a table.

    A record of the same metric is replaced if its split, its feature network and the settings of its samples are the
    same, or if it does not say them, being older than these fields. The others are kept if they are of the same
    weights; those of other or unknown weights are dropped, and a line says which.
    """
    records = [{**record, **context(machine), "weights": weights} for record in records]
    others = [old for old in run.read_records() if not any(_replaces(record, old) for record in records)]
    kept = [record for record in others if record.get("weights") == weights]
    try:  # what cannot be written is printed, and what cannot be printed is written
        if dropped := dict.fromkeys(record["name"] for record in others if record.get("weights") != weights):
            print(f"{run.metrics}: dropped metrics of other weights: {', '.join(dropped)}")
        print_records(records)
    finally:
        write_json(run.metrics, [*kept, *records])


def _replaces(record: Record, old: Record) -> bool:
    """Whether an older record is of the same metric, or may be."""
    same = all(record[key] == old[key] for key in ("name", "split"))
    same_network = old.get("network") in (None, record.get("network"))
    return same and same_network and sampling_of(old) in ({}, sampling_of(record))


def sampling_of(record: Record) -> dict[str, Any]:
    """The settings that its samples were drawn with; empty for what is of no samples, or does not say.

    Whether the temperature was typed or chosen on held-out images makes no difference to samples.
    """
    return {key: value for key, value in record.get("sampling", {}).items() if key != "temperature_chosen"}


def print_records(records: list[dict]) -> None:
    """Print a table of metrics with their protocols."""
    if not records:
        return
    for drawn in dict.fromkeys(record["drawn"] for record in records if "drawn" in record):
        print(f"\ngenerated images: {drawn}")
    width = max(len(record["name"]) for record in records)
    print(f"\n{'metric':{width}}  {'value':>10}  protocol")
    said = None
    for record in records:
        protocol = describe(record)
        print(f"{record['name']:{width}}  {record['value']:10.4f}  {'same' if protocol == said else protocol}")
        said = protocol


def comparable(record: Record, dataset: str) -> str:
    """The same, and what tells its real images and its feature network from others: equal if values are comparable.

    `dataset` is that of the run, for a record that is older than these fields.
    """
    digests = {"real images": record.get("real_sha256"), "network": record.get("network")}
    named = [f"{what} {digest[:6]}" for what, digest in digests.items() if digest]
    name = record.get("dataset", dataset)
    of = f" of {name}" if name else ""
    return ", ".join([f"{describe(record)}{of}", *named])


def describe(record: Record) -> str:
    """Protocol of a metric and the images it was computed on, in one line."""
    counts = {"generated": record["num_generated"], f"{record['split']} images": record["num_real"]}
    return f"{record['protocol']} ({', '.join(f'{number} {what}' for what, number in counts.items() if number)})"
