"""Figures of generated images: a run's samples, or any pictures, against a data set or other pictures.

python scripts/evaluate.py RUN_FOLDER                            its samples/images.npz, its data set
python scripts/evaluate.py GENERATED --dataset_name MNIST        pictures, a data set
python scripts/evaluate.py GENERATED REAL --metrics fid,kid      pictures, pictures

Pictures are a folder of image files, or an .npz file (key "images", uint8 [N,H,W,C]).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

from datasets import DATASETS, PICTURE_ENDINGS, ImageData, load_dataset
from errors import UserError
from pipeline.evaluation import Evaluation
from pipeline.figures import context, print_figures
from pipeline.files import write_json
from pipeline.machine import choose_machine
from pipeline.options import SAMPLE_METRICS, EvaluationOptions, expanded, names, parse_metrics
from pipeline.run_folder import RunFolder
from pipeline.terminal import print_anywhere


def main(arguments: list[str] | None = None) -> None:
    """Print the figures with their protocols; for a mistake of the user, one line on stderr and exit status 2."""
    print_anywhere()
    args = parse(arguments)
    try:
        figures = evaluate(args)
        if args.output:
            write_json(args.output, figures)
        print_figures(figures)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("generated", type=expanded, help="generated pictures, or a run folder")
    add("real", type=expanded, nargs="?", help="real pictures; absent for a run or with --dataset_name")
    add("--dataset_name", choices=DATASETS, help="the real pictures are this data set")
    add("--data_path", type=expanded, help="where the data set is [that of the run, else data]")
    add("--metrics", type=parse_metrics(SAMPLE_METRICS), help=f"of {','.join(SAMPLE_METRICS)} [all available]")
    add("--reference", choices=("test", "train"), default="test", help="split of the real side [test]")
    add("--fid_weights", type=expanded, help="pytorch-fid's Inception weights [downloaded]")
    add("--paper_fid_weights", type=expanded, help="torchvision's Inception weights [downloaded]")
    add("--fad_weights", type=expanded, help="folder of the published FAD autoencoders [own, trained once]")
    add("--seed", type=int, default=42, help="of KID's subsets, and of networks that are trained [42]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--output", type=expanded, help="also write the figures to this JSON file")
    return parser.parse_args(arguments)


def evaluate(args: argparse.Namespace) -> list[dict]:
    """The figures, as in a run's metrics.json."""
    machine = choose_machine(args.device, "float32")
    if args.real and args.dataset_name:
        raise UserError("real pictures and --dataset_name are two real sides: give one of them")
    if args.real:
        data, generated = as_data(args.real), args.generated
    elif args.dataset_name:
        data, generated = load_dataset(args.dataset_name, args.data_path or "data"), args.generated
    else:
        data, generated = load_data_of(args.generated, args.data_path), args.generated / "samples" / "images.npz"
    images = load_pictures(generated)
    ours, theirs = list(images.shape[2:]), list(data.test.shape[2:])
    if ours != theirs:
        raise UserError(
            f"the pictures in {generated} are {ours} pixels, those of {data.name} {theirs}: make them alike"
        )
    options = EvaluationOptions(**{key: getattr(args, key) for key in names(EvaluationOptions)})
    evaluation = Evaluation(options, data, machine, args.seed, len(images))
    figures = evaluation.figures(to_channels(images, data.test.shape[1]), str(generated))
    return [{**figure, **context(machine)} for figure in figures]


def as_data(path: Path) -> ImageData:
    """Pictures as the test split of a data set that has no other."""
    pictures = load_pictures(path)
    return ImageData(str(path), train=pictures[:0], test=pictures, held_out=pictures[:0])


def load_data_of(run_folder: Path, data_path: Path | None) -> ImageData:
    """The data set of a run, prepared as for its training; from `data_path`, or from where the run had it."""
    run = RunFolder(run_folder).trained
    config = run.read_config()
    if not config:
        reason = f"{run_folder} is not the folder of a run, it has no config.json"
        raise UserError(f"{reason}: name one, or say what is real: REAL or --dataset_name")
    try:
        name, data_path = config["dataset_name"], data_path or config.get("data_path", "data")
        options = {key: config[key] for key in ("train_images", "held_out", "image_size", "channels")}
    except KeyError as error:
        raise UserError(f"{run.config} is not the config of a run: it has no {error}") from error
    return load_dataset(name, data_path, **options)


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Images uint8 [N,C,H,W] with so many channels: grey is repeated, three equal ones are made one.

    Raises UserError for colours where the real side is grey.
    """
    if images.shape[1] <= channels:
        return images.expand(-1, channels, -1, -1)
    if (images != images[:, :1]).any():
        raise UserError("the generated pictures have colours, the real ones are grey")
    return images[:, :1]


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
            raise UserError(f"{path} is {width}x{height}, unlike the pictures before it; all must have one size")
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
