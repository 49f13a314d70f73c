"""FID between two sets of pictures, or of a run's samples against the data set it was trained on.

python scripts/evaluate_fid.py GENERATED REAL   folders of pictures, or .npz files (images: uint8 [N,H,W,C])
python scripts/evaluate_fid.py RUN_FOLDER       its samples/images.npz against the data set of its config.json
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

from datasets import PICTURE_ENDINGS, load_dataset
from errors import UserError
from metrics.fid import check_enough, fid
from metrics.inception import load_inception
from pipeline.machine import find_device


def main(arguments: list[str] | None = None) -> None:
    """Print the figure with its protocol; for a mistake of the user, one line on stderr and exit status 2."""
    args = parse(arguments)
    try:
        print(evaluate(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("generated", type=Path, help="generated pictures (folder or .npz), or a run folder")
    parser.add_argument("real", type=Path, nargs="?", help="real pictures (folder or .npz); absent for a run")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="real side of a run")
    parser.add_argument("--fid_weights", type=Path, help="pytorch-fid's weights file; downloaded if absent")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures a pass through Inception")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(arguments)


def evaluate(args: argparse.Namespace) -> str:
    """The line to print: FID, the two sides with their counts, and the weights."""
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {args.batch_size}")
    device = find_device(args.device)
    if args.real is None:
        real, real_name = load_split(args.generated, args.split)
        generated_name = args.generated / "samples" / "images.npz"
        generated = load_pictures(generated_name)
    else:
        generated_name, generated = args.generated, load_pictures(args.generated)
        real_name, real = args.real, load_pictures(args.real)
    check_enough(generated, real)
    inception = load_inception(args.fid_weights, device)
    figure = fid(generated, real, inception, args.batch_size)
    return (
        f"FID {figure:.4f} | generated: {len(generated)} images, {generated_name} | "
        f"real: {len(real)} images, {real_name} | "
        f"features: pytorch-fid Inception pool3, weights {args.fid_weights or 'downloaded'}"
    )


def load_split(run_folder: Path, split: str) -> tuple[Tensor, str]:
    """Real pictures of a run, uint8 [N,C,H,W], prepared as for its training, and what to call them."""
    path = run_folder / "config.json"
    try:
        config = json.loads(path.read_text())
        name, data_path = config["dataset_name"], config["data_path"]
        shape = {key: config[key] for key in ("image_size", "channels")}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; with one path, that path must be a run folder") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not the config of a run ({error})") from error
    return getattr(load_dataset(name, data_path, **shape), split), f"{name} {split} split"


def load_pictures(path: Path) -> Tensor:
    """Pictures, uint8 [N,C,H,W], of a folder (in order of name, as RGB) or of an .npz file."""
    if path.is_dir():
        return _load_folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _load_npz(path)
    raise UserError(f"{path} is not there as a folder or an .npz file")


def _load_folder(folder: Path) -> Tensor:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_ENDINGS)
    if not paths:
        raise UserError(f"no pictures in {folder}")
    pictures = [_load_picture(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            height, width, _ = picture.shape
            raise UserError(f"{path} is {width}x{height}, unlike the pictures before it; FID needs one size")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # [N,H,W,3] -> [N,3,H,W]


def _load_picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("RGB"))  # [H,W,3]; grey is repeated, as Inception wants it
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise UserError(f"{path} is no picture that can be read") from error


def _load_npz(path: Path) -> Tensor:
    try:
        with np.load(path) as archive:
            pictures = archive["images"]
    except Exception as error:  # not an archive, not whole, or without the key
        raise UserError(f'{path} is no .npz file with a key "images"') from error
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] not in (1, 3):
        raise UserError(f"{path} must hold uint8 [N,H,W,1 or 3], not {pictures.dtype} {list(pictures.shape)}")
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)  # [N,H,W,C] -> [N,C,H,W]


if __name__ == "__main__":
    main()
