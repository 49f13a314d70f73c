"""What a figure of metrics.json is, and the table of them that is printed."""

from typing import Any

from pipeline.run_folder import RunFolder, write_json


def record(name: str, value: float, protocol: str, *, split: str, real: int, generated: int = 0, **more: Any) -> dict:
    """One figure of metrics.json; everything that is needed to compare it is beside it."""
    counts = {"num_generated": generated, "num_real": real}
    return {"name": name, "value": value, "protocol": protocol, "split": split, **counts, **more}


def write_figures(run: RunFolder, figures: list[dict]) -> None:
    """Write metrics.json and print the table."""
    write_json(run.metrics, figures)
    print_figures(figures)


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
