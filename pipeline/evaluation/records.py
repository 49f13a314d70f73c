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

import json
from collections.abc import Mapping
from typing import Any

from datasets import ImageData
from pipeline.checkpoints import write_json
from pipeline.run_folder import RunFolder, versions
from pipeline.runtime.device import Machine, describe_machine
from pipeline.runtime.processes import on_rank_0


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
    same. The others are kept if they are of the same weights; those of other or unknown weights are dropped, and a line
    says which.
    """
    records = [{**record, **context(machine), "weights": weights} for record in records]
    computed = {_identity(record) for record in records}
    others = [record for record in run.read_records() if _identity(record) not in computed]
    kept = [record for record in others if record.get("weights") == weights]
    try:  # what cannot be written is printed, and what cannot be printed is written
        if dropped := dict.fromkeys(record["name"] for record in others if record.get("weights") != weights):
            print(f"{run.metrics}: dropped metrics of other weights: {', '.join(dropped)}")
        print_records(records)
    finally:
        write_json(run.metrics, [*kept, *records])


IDENTITY = ("name", "split", "network", "sampling")


def _identity(record: Mapping[str, Any]) -> str:
    return json.dumps([record.get(key) for key in IDENTITY], sort_keys=True)


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


def comparable(record: dict) -> str:
    """The same, and what tells its real images and its feature network from others: equal if values are comparable."""
    digests = {"real images": record.get("real_sha256"), "network": record.get("network")}
    named = [f"{what} {digest[:6]}" for what, digest in digests.items() if digest]
    of = f" of {record['dataset']}" if "dataset" in record else ""
    return ", ".join([f"{describe(record)}{of}", *named])


def describe(record: dict) -> str:
    """Protocol of a metric and the images it was computed on, in one line."""
    counts = {"generated": record["num_generated"], f"{record['split']} images": record["num_real"]}
    return f"{record['protocol']} ({', '.join(f'{number} {what}' for what, number in counts.items() if number)})"
