"""Metrics of generated images: of a run's samples, or of any images, against a data set or other images.

python scripts/evaluate.py RUN_FOLDER                            its samples/images.npz against its data set
python scripts/evaluate.py GENERATED --dataset_name MNIST        images against a data set
python scripts/evaluate.py GENERATED REAL --metrics fid,kid      images against other images
python scripts/evaluate.py --dataset_name MNIST --seed 1         10,000 random training images, as if generated

Images are a folder of image files, searched recursively, or an .npy or .npz file: [N,H,W], [N,H,W,1] or
[N,H,W,3] of integers from 0 to 255, uint16 or bool; an .npz file must hold one array, or one named "images".
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

import pipeline.runtime.threads  # noqa: F401  before torch

# isort: split
import torch
from torch import Tensor

from datasets import ImageData, load_dataset
from errors import UserError, reported
from files import expand
from image_files import alternate, find_images, folders_of, read_images, take
from metrics.fid import FID_IMAGES
from parts import DATASETS, SAMPLE_METRICS
from pipeline.checkpoints import check_place, write_json
from pipeline.evaluation.image_records import evaluate_images
from pipeline.evaluation.records import print_records
from pipeline.options.declaration import number, parse_metrics
from pipeline.options.sections import EvaluationOptions, names
from pipeline.run_folder import RunFolder
from pipeline.runtime.device import choose_machine, find_device, keep_freed_memory
from pipeline.runtime.terminal import print_anywhere


def main(arguments: list[str] | None = None) -> None:
    """Print the metrics with their protocols; for a mistake of the user, one line on stderr and exit status 2."""
    print_anywhere()
    args = parse(arguments)
    with reported():
        check_place(args.output)
        keep_freed_memory()
        records = evaluate(args)
        try:  # what cannot be written is printed, and what cannot be printed is written
            print_records(records)
        finally:
            if args.output:
                write_json(args.output, records)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("generated", type=expand, nargs="?", help="generated images, or a run folder; or training images, if omitted")
    add("real", type=expand, nargs="?", help="real images; omit for a run folder or with --dataset_name")
    add("--dataset_name", choices=DATASETS, help="use this data set as the real images")
    add("--data_path", type=expand, help="where the data set is [that of the run, else data]")
    add("--held_out", type=int, help="training images of --dataset_name left out, as in the run that is compared [0]")
    among = f"of {','.join(SAMPLE_METRICS)} [all available, but not fid_50k]"
    add("--metrics", type=parse_metrics(SAMPLE_METRICS), help=among)
    add("--num_samples", type=number(int, 1), help="use the first N images, or N random ones [all, or 10,000]")
    add("--reference", choices=("test", "train"), default="test", help="split that real images are taken from [test]")
    add("--fid_weights", type=expand, help="pytorch-fid's Inception weights [downloaded]")
    add("--paper_fid_weights", type=expand, help="torchvision's Inception weights [downloaded]")
    add("--fad_weights", type=expand, help="folder of the published FAD autoencoders [own, trained once]")
    add("--seed", type=int, default=42, help="random seed, for KID's subsets and random images [42]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--output", type=expand, help="also write the metrics to this JSON file")
    return parser.parse_args(arguments)


def evaluate(args: argparse.Namespace) -> list[dict]:
    """The metrics, as in a run's metrics.json."""
    find_device(args.device)  # reports a mistake before images are read
    data, images, drawn = load_sides(args)
    ours, theirs = list(images.shape[2:]), list(data.test.shape[2:])
    if ours != theirs:
        raise UserError(f"the images in {drawn} are {ours} pixels, those of {data.name} {theirs}: resize one set")
    options = {key: getattr(args, key) for key in names(EvaluationOptions)}
    pixels, machine = to_channels(images, data.test.shape[1]), choose_machine(args.device, "float32")
    return evaluate_images(pixels, data, EvaluationOptions(**options), machine, args.seed, drawn)


def load_sides(args: argparse.Namespace) -> tuple[ImageData, Tensor, str]:
    """The real side, the generated images uint8 [N,C,H,W], and where these are from."""
    if args.real and args.dataset_name:
        raise UserError("both real images and --dataset_name are given: leave one out")
    if args.held_out and not args.dataset_name:
        raise UserError("--held_out is for --dataset_name: leave it out, or name the data set")
    if not (args.generated or args.dataset_name):
        raise UserError("nothing to evaluate: name a run folder, images, or --dataset_name")
    if args.real:
        data, generated = as_data(args.real), args.generated
    elif args.dataset_name:
        data = load_dataset(args.dataset_name, args.data_path or "data", held_out=args.held_out or 0)
        generated = args.generated
    else:
        data, generated = load_data_of(args.generated, args.data_path), args.generated / "samples" / "images.npz"
    if generated is None:
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(args.seed))
        return data, data.train[chosen[: args.num_samples or FID_IMAGES]], "random training images"
    return data, load_images(generated)[: args.num_samples], str(generated)


def as_data(path: Path) -> ImageData:
    """Images as the test split of a data set without other splits."""
    images = load_images(path)
    return ImageData(str(path), train=images[:0], test=images, held_out=images[:0])


def load_data_of(run_folder: Path, data_path: Path | None) -> ImageData:
    """The data set of a run, prepared as for its training, from `data_path` or else from where the run found it."""
    run = RunFolder(run_folder).trained
    config = run.read_config()
    if not config:
        reason = f"{run_folder} is not a run folder, it has no config.json"
        raise UserError(f"{reason}: name one, or give the real images with REAL or --dataset_name")
    try:
        name, data_path = config["dataset_name"], data_path or config.get("data_path", "data")
        options = {key: config[key] for key in ("train_images", "held_out", "image_size", "channels")}
    except KeyError as error:
        raise UserError(f"{run.config} is not the config of a run: it has no {error}") from error
    return load_dataset(name, data_path, **options)


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Images uint8 [N,C,H,W] with this many channels: grey is repeated, three equal channels become one.

    Raises UserError if the images have colours but the real ones are grey.
    """
    if images.shape[1] <= channels:
        return images.expand(-1, channels, -1, -1)
    if (images != images[:, :1]).any():
        raise UserError("the generated images have colours, the real ones are grey")
    return images[:, :1]


def load_images(path: Path) -> Tensor:
    """The images that `find_images` finds at `path`, uint8 [N,C,H,W]; C is 1 if all are grey, else 3."""
    path = expand(path)
    images = find_images(path)
    pixels = read_images(take(images, alternate(folders_of(images, path))))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)  # [N,H,W,C] -> [N,C,H,W]


if __name__ == "__main__":
    main()
