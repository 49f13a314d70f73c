"""Plot what runs' log.jsonl say of their training: error of stage 1 and loss of stage 2, over the images seen.

python scripts/plot_curves.py result/FMNIST/snn-vq-vae pretrained/mnist --output curves.png

A point is the mean over one epoch. Losses compare where they are of the same kind, which the legend says.
"""

import argparse
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

from errors import UserError
from image_files import expand
from pipeline.run_folder import RunFolder
from pipeline.runtime.terminal import print_anywhere
from pipeline.sampling.grids import save_figure


def curve(log: list[dict[str, Any]], stage: int) -> tuple[list[int], list[float]]:
    """Images seen, and the mean squared error (stage 1) or loss (stage 2) of the epochs of a stage."""
    epochs = [line for line in log if (line["stage"] == "sdid") == (stage == 2)]
    seen = accumulate(line["images"] for line in epochs)
    return list(seen), [line["mse" if stage == 1 else "loss"] for line in epochs]


def plot(runs: dict[Path, RunFolder], picture: Path) -> None:
    """Write the plot. Raises UserError for a folder without a log."""
    import matplotlib.pyplot as plt  # here because importing it takes a second
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for path, run in runs.items():
        log, loss = run.read_log(), run.read_config().get("loss")
        if not log:
            raise UserError(f"{path} has no log.jsonl with an epoch in it: is it the folder of a run?")
        for axis, stage, label in zip(axes, (1, 2), (path, f"{path}: {loss}"), strict=True):
            seen, values = curve(log, stage)
            axis.plot(seen, values, marker=".", label=label if seen else None)
    for axis, title in zip(axes, ("stage 1: mean squared error", "stage 2: loss, bits a token"), strict=True):
        axis.set(title=f"{title}, in training", xlabel="images seen", xscale="log")
        axis.xaxis.set_minor_formatter("")
        if axis.lines:
            axis.legend(fontsize="small")
    axes[0].set_yscale("log")
    axes[0].yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    save_figure(picture, figure)


def main(arguments: list[str] | None = None) -> None:
    """Plot; a mistake of the user is one line on stderr and exit status 2."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=expand, help="run folders")
    parser.add_argument("--output", required=True, type=expand, metavar="PICTURE", help="image file")
    args = parser.parse_args(arguments)
    try:
        plot({path: RunFolder(path) for path in args.runs}, args.output)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
