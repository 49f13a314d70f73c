"""What a figure of metrics.json is, and the table of them that is printed."""

from typing import Any

from pipeline.checkpoints import write_json
from pipeline.run_folder import RunFolder, versions
from pipeline.runtime.device import Machine, describe_machine
from pipeline.runtime.processes import by_writer


def record(name: str, value: float, protocol: str, *, split: str, real: int, generated: int = 0, **more: Any) -> dict:
    """One figure of metrics.json; everything that is needed to compare it is beside it."""
    counts = {"num_generated": generated, "num_real": real}
    return {"name": name, "value": value, "protocol": protocol, "split": split, **counts, **more}


def context(machine: Machine) -> dict[str, Any]:
    """What the value of a figure depends on besides its protocol, the images and the weights."""
    return {"precision": machine.precision, **describe_machine(machine.device), "versions": versions()}


@by_writer
def write_figures(run: RunFolder, figures: list[dict], machine: Machine, weights: str) -> None:
    """Merge figures of networks with the digest `weights` into metrics.json, and print the table of them.

    A figure that is there by the same name, protocol and split is replaced, others stay if they are of the same
    weights. Those of other weights, or of weights they do not know, are dropped, and a line says which.
    """
    figures = [{**figure, **context(machine), "weights": weights} for figure in figures]
    computed = {_identity(figure) for figure in figures}
    others = [figure for figure in run.read_figures() if _identity(figure) not in computed]
    write_json(run.metrics, [*(figure for figure in others if figure.get("weights") == weights), *figures])
    if dropped := dict.fromkeys(figure["name"] for figure in others if figure.get("weights") != weights):
        print(f"{run.metrics}: dropped figures of other weights: {', '.join(dropped)}")
    print_figures(figures)


def _identity(figure: dict) -> tuple[str, str, str]:
    return figure["name"], figure["protocol"], figure["split"]


def print_figures(figures: list[dict]) -> None:
    """Print a table of figures with their protocols."""
    if not figures:
        return
    for drawn in dict.fromkeys(figure["drawn"] for figure in figures if "drawn" in figure):
        print(f"\ngenerated images: {drawn}")
    width = max(len(figure["name"]) for figure in figures)
    print(f"\n{'figure':{width}}  {'value':>10}  protocol")
    said = None
    for figure in figures:
        protocol = describe(figure)
        print(f"{figure['name']:{width}}  {figure['value']:10.4f}  {'same' if protocol == said else protocol}")
        said = protocol


def describe(figure: dict) -> str:
    """Protocol of a figure and the images it is of, in a line."""
    counts = {"generated": figure["num_generated"], f"{figure['split']} images": figure["num_real"]}
    return f"{figure['protocol']} ({', '.join(f'{number} {what}' for what, number in counts.items() if number)})"
