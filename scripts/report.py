"""Write one self-contained HTML page that shows a run, or several side by side.

python scripts/report.py result/MNIST/snn-vq-vae
python scripts/report.py pretrained/fmnist pretrained/mnist --data_path data --output report.html

Whatever the run folder lacks is computed from its weights. Reconstructions and nearest training images need the data
set; nothing is downloaded.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

import pipeline.runtime.threads  # noqa: F401  before torch

# isort: split
from errors import UserError, reported
from files import expand
from pipeline.checkpoints import check_place
from pipeline.report.report import write_report
from pipeline.run_folder import RunFolder
from pipeline.runtime.terminal import print_anywhere
from pipeline.session import Session, open_session


def open_run(folder: Path, data_path: Path | None) -> Session:
    """The session of a run folder, or of a folder that `--checkpoint` wrote. Raises UserError if it is neither."""
    run = RunFolder(folder)
    trained = run.trained
    if not any(path.exists() for path in (trained.config, trained.model, run.metrics)):
        raise UserError(f"{folder} is not a run folder: it has no config.json, model.pth or metrics.json")
    options: dict[str, Any] = {"result_path": folder} if trained is not run else {}
    options |= {"data_path": data_path} if data_path else {}
    return open_session(checkpoint=trained.model, stage="sample", **options)


def main(arguments: list[str] | None = None) -> None:
    """Write the page; a mistake of the user is one line on stderr and exit status 2."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=expand, metavar="RUN", help="run folder")
    parser.add_argument("--output", type=expand, metavar="FILE", help="the page [report.html in the run folder]")
    parser.add_argument("--data_path", type=expand, metavar="DIR", help="folder of the data sets [as in the run]")
    args = parser.parse_args(arguments)
    with reported():
        if len(args.runs) > 1 and not args.output:
            raise UserError("several runs: name the page with --output")
        output = args.output or RunFolder(args.runs[0]).report
        sessions = [open_run(run, args.data_path) for run in args.runs]
        check_place(output)
        write_report(sessions, output)
    print(output)


if __name__ == "__main__":
    main()
