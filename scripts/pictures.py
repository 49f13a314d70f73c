"""Draw a contact sheet of runs: real images, and of each run reconstructions of these and samples.

python scripts/pictures.py pretrained/fmnist-faithful pretrained/fmnist --output docs/fmnist_improved.png

The runs are of one data set, whose first test images are the real ones. Samples are drawn with the settings of each
run and its seed; the last run has three rows of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

import pipeline.runtime.threads  # noqa: F401  before torch

# isort: split
import torch
from torch import Tensor

from errors import UserError, reported
from files import expand
from pipeline.checkpoints import check_place
from pipeline.run_folder import RunFolder
from pipeline.runtime.terminal import print_anywhere
from pipeline.sampling.grids import grid, named_rows, save_png
from pipeline.session import open_session

COLUMNS = 15
ROWS_OF_THE_LAST = 3


def contact_sheet(folders: Sequence[Path], data_path: Path | None) -> Tensor:
    """The picture, uint8 `[3,H,W]`. Raises UserError if the runs are of several data sets."""
    place: dict[str, Any] = {"data_path": data_path} if data_path else {}
    sessions = [open_session(checkpoint=RunFolder(folder).model, stage="sample", **place) for folder in folders]
    datasets = {session.options.data.dataset_name for session in sessions}
    if len(datasets) > 1:
        raise UserError(f"the runs are of several data sets, {', '.join(sorted(datasets))}: draw one at a time")
    real = sessions[-1].data.test[:COLUMNS]
    names, rows = ["real"], [real]
    for folder, session in zip(folders, sessions, strict=True):
        model, count = session.read_model(), ROWS_OF_THE_LAST if folder == folders[-1] else 1
        names += [f"{folder.name}, reconstructed", f"{folder.name}, samples", *[""] * (count - 1)]
        rows += [model.reconstruct(real), model.draw_images(range(count * len(real)))]
    return named_rows(grid(torch.cat(rows), len(real)), names)


def main(arguments: list[str] | None = None) -> None:
    """Draw it; a mistake of the user is one line on stderr and exit status 2."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=expand, metavar="RUN", help="run folder")
    parser.add_argument("--output", required=True, type=expand, metavar="FILE", help="the picture, a PNG")
    parser.add_argument("--data_path", type=expand, metavar="DIR", help="folder of the data sets [as in the run]")
    args = parser.parse_args(arguments)
    with reported():
        if args.output.suffix.lower() != ".png":
            raise UserError(f"{args.output} is to be a PNG: let its name end in .png")
        check_place(args.output)
        save_png(args.output, contact_sheet(args.runs, args.data_path))
    print(args.output)


if __name__ == "__main__":
    main()
