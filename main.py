"""Spiking-Diffusion: train, sample and evaluate from the shell. `python main.py --help` lists everything.

python -u main.py --dataset_name MNIST --model snn-vq-vae
python -u main.py --dataset_name MNIST --model snn-vq-vae --checkpoint result/MNIST/snn-vq-vae/model.pth
python -u main.py --resume result/MNIST/snn-vq-vae
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DATASETS
from diffusion.absorbing import LOSSES
from errors import UserError
from models import AUTOENCODERS
from pipeline.evaluation import METRICS
from pipeline.machine import PRECISIONS, choose_machine
from pipeline.run_folder import RunFolder
from pipeline.stages import STAGES, Pipeline

HERE_AND_NOW = ("resume", "checkpoint", "stage", "max_minutes", "device", "precision")
"""Options of one call of the program, which a run's config.json does not pass on to the next."""

IDENTITY = ("dataset_name", "image_size", "channels", "model")
"""Options that whoever uses a run's networks must share with it."""

UNCHANGEABLE = (
    *IDENTITY,
    *(
        "train_images",
        "codebook_size",
        "embedding_dim",
        "spike_steps",
        "hidden_channels",
        "denoiser_channels",
    ),
    *("batch_size", "lr", "loss", "seed"),
)
"""Options that a resumed training must share with its beginning."""

PATHS = ("data_path", "result_path", "fid_weights")


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """An argparse type: a number of this kind from `low` to `high`."""
    bounds = f"at least {low}" if high == float("inf") else f"from {low} to {high}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not {bounds}" + (", a whole number" if kind is int else ""))
        return value

    return parse


def metric_list(text: str) -> list[str]:
    """An argparse type: names of METRICS, separated by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
    return names


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage text."""

    def error(self, message: str) -> None:
        """Print the mistake; exit status 2."""
        self.exit(2, f"error: {message} (--help lists the options)\n")


def build_parser() -> Parser:
    """All options, in groups."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__.replace("`", ""), formatter_class=layout, allow_abbrev=False)
    whole, positive = number(int, 1), number(float, 1e-9)

    def group(title: str) -> Callable[..., None]:
        section = parser.add_argument_group(title)

        def add(name: str, help: str, default: Any = None, **how: Any) -> None:
            shown = ",".join(default) if isinstance(default, list) else default
            section.add_argument(name, help=help + (f" [{shown}]" if default else ""), default=default, **how)

        return add

    add = group("run")
    add("--stage", "which part of the pipeline to run", "all", choices=STAGES)
    add(
        "--checkpoint",
        "evaluate this model.pth, of a run or of the original release",
        type=Path,
        metavar="FILE",
    )
    add("--resume", "go on with this run folder, or its last.pth", type=Path, metavar="RUN")
    add("--result_path", "where run folders are made", Path("result"), type=Path, metavar="DIR")
    add("--max_minutes", "stop each stage after M minutes, saved and resumable", type=positive, metavar="M")
    add("--seed", "of everything that is random", 42, type=number(int, 0, 2**32 - 1), metavar="N")
    add("--device", "auto (CUDA where there is one), cpu, cuda or cuda:N", "auto")
    add("--precision", "auto is bf16 where the processor has it", "auto", choices=PRECISIONS)

    add = group("data")
    add("--dataset_name", "the data set; Digits needs no download", "Digits", choices=DATASETS)
    add("--data_path", "where data sets are, or are downloaded to", Path("data"), type=Path, metavar="DIR")
    add("--train_images", "use the first N training images [all]", type=whole, metavar="N")
    add("--image_size", "side of ImageFolder's pictures, a multiple of 4 [32]", type=whole, metavar="N")
    add("--channels", "of ImageFolder's pictures: 1 grey, 3 colour [as they are]", type=int, choices=(1, 3))

    add = group("model")
    add("--model", "the autoencoder", "snn-vq-vae", choices=AUTOENCODERS)
    add("--spike_steps", "spike steps S", 16, type=number(int, 1, 1024), metavar="S")
    add("--codebook_size", "number of codes K", 128, type=number(int, 2, 32767), metavar="K")
    add("--embedding_dim", "width of a code's embedding", 16, type=whole, metavar="D")
    add(
        "--hidden_channels",
        "of the autoencoder's first layer, half of its second",
        32,
        type=whole,
        metavar="N",
    )
    add(
        "--denoiser_channels",
        "of the denoiser's first block, an 8th of its widest",
        64,
        type=whole,
        metavar="N",
    )

    add = group("training")
    add("--epochs", "of stage 1, the autoencoder", 100, type=whole, metavar="N")
    add("--diffusion_epochs", "of stage 2, the denoiser", 200, type=whole, metavar="N")
    add("--batch_size", "of both stages", 32, type=whole, metavar="N")
    add("--lr", "learning rate of both stages", 1e-3, type=positive, metavar="X")
    add("--loss", "of stage 2", "reweighted_elbo", choices=LOSSES)

    add = group("sampling and evaluation")
    add(
        "--temperature",
        "divides the logits; 1 samples the distribution as learned",
        0.65,
        type=positive,
        metavar="X",
    )
    add("--sample_steps", "timesteps of sampling [all T of them]", type=whole, metavar="N")
    add("--num_samples", "images to draw [10000 where FID is computed, else 64]", type=whole, metavar="N")
    add("--eval_batch_size", "images at once in encoding and sampling", 64, type=whole, metavar="N")
    add("--png", "write each sample as a PNG file, too", False, action="store_true")
    add("--metrics", "figures to compute", list(METRICS), type=metric_list, metavar="A,B")
    add("--fid_weights", "pytorch-fid's Inception weights [downloaded]", type=Path, metavar="FILE")
    return parser


def resolve(arguments: list[str] | None) -> tuple[argparse.Namespace, RunFolder]:
    """Options and run folder of this call; a run that exists passes on its options, the command line overrides them."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    run = RunFolder(find_folder(options))
    if options.stage in ("all", "vqsvae") and not (options.resume or options.checkpoint):
        if run.last.exists() or run.model.exists():
            raise UserError(f"{run.path} holds a run: --resume {run.path}, or choose another --result_path")
        return options, run
    if options.stage == "sdid" and run.denoiser.exists() and not options.resume:
        raise UserError(f"{run.path} holds a denoiser: --resume {run.path}, or choose another --result_path")
    saved = run.read_config()
    if options.resume and not saved:
        raise UserError(f"{run.path} is not the folder of a run: it has no config.json")
    kept = {key: value for key, value in saved.items() if key in vars(options) and key not in HERE_AND_NOW}
    parser.set_defaults(**{key: Path(value) if key in PATHS and value else value for key, value in kept.items()})
    options = parser.parse_args(arguments)
    fixed = UNCHANGEABLE if options.resume else IDENTITY
    changed = [
        f"--{key} ({saved[key]} in the run)"
        for key in fixed
        if saved.get(key, getattr(options, key)) != getattr(options, key)
    ]
    if changed:
        raise UserError(f"{run.path} was made with other options: leave out {', '.join(changed)}")
    options.image_shape = saved.get("image_shape")
    return options, run


def find_folder(options: argparse.Namespace) -> Path:
    """The run folder: the one resumed, that of the checkpoint, or the one named after data set and model."""
    if options.resume and options.checkpoint:
        raise UserError("--resume trains on and --checkpoint evaluates: give one of them")
    if options.checkpoint and options.stage in ("vqsvae", "sdid"):
        raise UserError("--checkpoint evaluates a trained model: to train on, use --resume with its run folder")
    if options.resume:
        return options.resume.parent if options.resume.suffix == ".pth" else options.resume
    if options.checkpoint and (options.checkpoint.parent / "config.json").is_file():
        return options.checkpoint.parent
    return options.result_path / options.dataset_name / options.model


def main(arguments: list[str] | None = None) -> None:
    """Run the stages; a mistake of the user is one line on stderr and exit status 2."""
    try:
        options, run = resolve(arguments)
        machine = choose_machine(options.device, options.precision)
        Pipeline(options, run, machine).execute()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
