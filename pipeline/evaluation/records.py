"""Records of metrics.json: what each holds, how they are merged, and the table that is printed."""

from typing import Any

from pipeline.checkpoints import write_json
from pipeline.run_folder import RunFolder, versions
from pipeline.runtime.device import Machine, describe_machine
from pipeline.runtime.processes import on_rank_0


def make_record(
    name: str, value: float, protocol: str, *, split: str, real: int, generated: int = 0, **more: Any
) -> dict:
    """One metric as stored in metrics.json, with everything needed to compare it."""
    counts = {"num_generated": generated, "num_real": real}
    return {"name": name, "value": value, "protocol": protocol, "split": split, **counts, **more}


def context(machine: Machine) -> dict[str, Any]:
    """What a metric's value depends on besides protocol, images and weights."""
    return {"precision": machine.precision, **describe_machine(machine.device), "versions": versions()}


@on_rank_0
def write_records(run: RunFolder, records: list[dict], machine: Machine, weights: str) -> None:
    """Merge records of the networks with the digest `weights` into metrics.json, and print them as a table.

    A record of the same name, protocol and split is replaced. The others are kept if they are of the same weights;
    those of other or unknown weights are dropped, and a line says which.
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


def _identity(record: dict) -> tuple[str, str, str]:
    return record["name"], record["protocol"], record["split"]


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


def describe(record: dict) -> str:
    """Protocol of a metric and the images it was computed on, in one line."""
    counts = {"generated": record["num_generated"], f"{record['split']} images": record["num_real"]}
    return f"{record['protocol']} ({', '.join(f'{number} {what}' for what, number in counts.items() if number)})"
