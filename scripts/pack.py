"""Make a small copy of a run to share: weights in half precision, options, log, metrics; no optimizer, no images.

python scripts/pack.py RUN_FOLDER pretrained/fmnist

The copy is a run folder: `python main.py --checkpoint pretrained/fmnist` evaluates it, and with `--stage sample` draws
images from it.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

import torch

from errors import UserError
from image_files import expand
from pipeline.checkpoints import load_weights, save_weights, write_json
from pipeline.declaration import Role
from pipeline.options import DEFAULTS, with_role
from pipeline.run_folder import RunFolder
from pipeline.runtime.terminal import print_anywhere


def pack(run: RunFolder, copy: RunFolder) -> None:
    """Write the copy. Raises UserError if the run is incomplete."""
    config = run.read_config()
    if not config:
        raise UserError(f"{run.path} is not a run folder: it has no config.json")
    for source, target in ((run.model, copy.model), (run.denoiser, copy.denoiser)):
        save_weights(target, {name: compact(value) for name, value in load_weights(source).items()})
    kept = {key for key in with_role(Role.SETTING) if not key.endswith(("_path", "_weights"))}
    write_json(copy.config, {key: value for key, value in config.items() if key in kept or key not in DEFAULTS})
    for source, target in ((run.metrics, copy.metrics), (run.log_file, copy.log_file)):
        if source.exists():
            shutil.copy(source, target)


def compact(value: torch.Tensor) -> torch.Tensor:
    """The value as it is packed; loading restores the type.

    Weights are kept in half precision, except per-channel values such as batch norm's, which are few and sensitive.
    Integers, such as the codes of prototypes, are kept as bytes where these hold them.
    """
    if value.is_floating_point():
        return value.half() if value.dim() > 1 else value
    return value.byte() if value.numel() and value.min() >= 0 and value.max() <= 255 else value


def main(arguments: list[str] | None = None) -> None:
    """Pack; a mistake of the user is one line on stderr and exit status 2."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=expand, help="a run folder")
    parser.add_argument("copy", type=expand, help="folder for the copy")
    args = parser.parse_args(arguments)
    try:
        pack(RunFolder(args.run), RunFolder(args.copy))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    size = sum(path.stat().st_size for path in args.copy.rglob("*.pth")) / 2**20
    print(f"{args.copy}: {size:.1f} MiB of weights")


if __name__ == "__main__":
    main()
