"""The options of the command line: names, types, defaults and help."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DATASETS
from diffusion.absorbing import LOSSES, REVEAL_ORDERS
from errors import UserError
from models import AUTOENCODERS, DENOISERS
from models.quantizer import READOUTS, SPIKE_GENERATORS
from pipeline.evaluation import METRICS, names_of
from pipeline.machine import PRECISIONS
from pipeline.masks import MASKS
from pipeline.presets import PRESETS
from pipeline.stages import STAGES
from pipeline.training import LR_SCHEDULES

SWITCH = argparse.BooleanOptionalAction  # what a preset switches on, --no-... switches off


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


def temperature(text: str) -> float | str:
    """An argparse type: a positive number, or "auto"."""
    return text if text == "auto" else number(float, 1e-9)(text)


def checkpoint(text: str) -> Path:
    """An argparse type: a file of weights, or a run folder for the one in it."""
    return Path(text) / "model.pth" if Path(text).is_dir() else Path(text)


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage text."""

    def error(self, message: str) -> None:
        """Raise UserError, which the program says."""
        raise UserError(f"{message} (--help lists the options)")


def build_parser(description: str) -> Parser:
    """All options, in groups."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=layout, allow_abbrev=False)
    whole, positive = number(int, 1, 10**9), number(float, 1e-9)
    width = number(int, 1, 4096)

    def group(title: str) -> Callable[..., None]:
        section = parser.add_argument_group(title)

        def add(name: str, help: str, default: Any = None, **how: Any) -> None:
            shown = ",".join(default) if isinstance(default, list) else default
            section.add_argument(name, help=help + (f" [{shown}]" if default else ""), default=default, **how)

        return add

    add = group("run")
    add("--preset", "defaults of other options: the paper's, or those of better pictures", "faithful", choices=PRESETS)
    add("--stage", "which part of the pipeline to run", "all", choices=STAGES)
    add(
        "--checkpoint",
        "evaluate this model.pth, or the one in this folder, of a run or of the original release",
        type=checkpoint,
        metavar="FILE",
    )
    start = (
        "begin with this run's networks; one that it lacks, with none; --stage sdid keeps its autoencoder [untrained]"
    )
    add("--start_from", start, type=Path, metavar="RUN")
    add("--resume", "go on with this run folder, or its last.pth", type=Path, metavar="RUN")
    where = "where run folders are made; with --checkpoint, the folder for its results [result; beside the checkpoint]"
    add("--result_path", where, type=Path, metavar="DIR")
    add("--max_minutes", "stop each stage after M minutes, saved and resumable [no limit]", type=positive, metavar="M")
    add("--save_every", "save every M minutes of training, besides after each epoch", 10.0, type=positive, metavar="M")
    add("--seed", "of everything that is random", 42, type=number(int, 0, 2**32 - 1), metavar="N")
    add("--device", "auto (CUDA where there is one), cpu, cuda or cuda:N", "auto")
    add("--compile", "train through torch.compile [off]", False, action="store_true")
    add("--precision", "auto is bf16 where the processor has it", "auto", choices=PRECISIONS)

    add = group("data")
    add("--dataset_name", "the data set; Digits needs no download", "Digits", choices=DATASETS)
    add("--data_path", "where data sets are, or are downloaded to", Path("data"), type=Path, metavar="DIR")
    add("--train_images", "use N training images, of ImageFolder evenly of all folders [all]", type=whole, metavar="N")
    add("--held_out", "keep N of them, evenly spread, out of training [0]", 0, type=number(int, 0), metavar="N")
    add(
        "--image_size",
        "side of ImageFolder's images, a multiple of 4 from 8 [32]",
        type=number(int, 8, 4096),
        metavar="N",
    )
    add("--channels", "of ImageFolder's images: 1 grey, 3 colour [as they are]", type=int, choices=(1, 3))

    add = group("model")
    add("--model", "the autoencoder", "snn-vq-vae", choices=AUTOENCODERS)
    add("--spike_steps", "spike steps S of every layer", 16, type=number(int, 1, 1024), metavar="S")
    add("--codebook_size", "number of codes K", 128, type=number(int, 2, 32767), metavar="K")
    add("--embedding_dim", "width of a code's embedding", 16, type=width, metavar="D")
    add(
        "--hidden_channels",
        "channels of the autoencoder's first layer; its second has twice as many",
        32,
        type=width,
        metavar="N",
    )
    add("--downsampling", "side of an image over side of its grid of codes", 4, type=int, choices=(2, 4))
    add("--revive_codes", "move codes that a batch does not use to where it has data [off]", False, action=SWITCH)
    add("--denoiser", "the paper's or the residual network", "sdid", choices=DENOISERS)
    add(
        "--denoiser_channels",
        "of the denoiser: sdid's first block, its widest has 8 times as many; all of residual's blocks",
        64,
        type=width,
        metavar="N",
    )
    add(
        "--denoiser_spike_steps",
        "spike steps of the denoiser [as --spike_steps]",
        type=number(int, 1, 1024),
        metavar="S",
    )
    add("--denoiser_blocks", "of the residual denoiser", 4, type=number(int, 1, 1000), metavar="N")
    told = "condition the residual denoiser on the nearest of some average pictures, one for N training images [none]"
    add("--images_per_prototype", told, 0, type=number(int, 0, 10**9), metavar="N")
    add("--readout", "an ablation: what the quantiser sees of the spikes", "both", choices=READOUTS)
    add("--spike_generator", "an ablation: how codes become spikes", "adaptive", choices=SPIKE_GENERATORS)

    add = group("training")
    add("--epochs", "of stage 1, the autoencoder", 100, type=whole, metavar="N")
    add("--diffusion_epochs", "of stage 2, the denoiser", 200, type=whole, metavar="N")
    add("--batch_size", "of both stages; several processes share it", 32, type=whole, metavar="N")
    add("--lr", "learning rate", 1e-3, type=number(float, 1e-9, 1), metavar="X")
    add("--diffusion_lr", "learning rate of stage 2 [as --lr]", type=number(float, 1e-9, 1), metavar="X")
    add("--lr_schedule", "over all epochs of a stage", "constant", choices=LR_SCHEDULES)
    average = "decay of the moving average of weights that is kept and evaluated; 0: the last weights are [0]"
    add("--ema_decay", average, 0.0, type=number(float, 0, 0.999999), metavar="X")
    fixed = "share of stage 2's steps, the last ones, in which batch norm's statistics are held fixed [0]"
    add("--fixed_norm", fixed, 0.0, type=number(float, 0, 1), metavar="X")
    add("--clipped_error", "no loss for output beyond black and white [off]", False, action=SWITCH)
    add("--loss", "of stage 2", "reweighted_elbo", choices=LOSSES)

    add = group("sampling and evaluation")
    add(
        "--temperature",
        "divides the logits; 1 samples the distribution as learned, auto chooses, on held-out images, one throughout",
        0.65,
        type=temperature,
        metavar="X",
    )
    final = "what it changes to, evenly while tokens are revealed; not with auto [as --temperature]"
    add("--final_temperature", final, type=number(float, 1e-9), metavar="X")
    add("--sample_steps", "timesteps of sampling, up to T, the number of an image's codes [T]", type=whole, metavar="N")
    add("--reveal_order", "spread: few tokens at first, and far apart from each other", "random", choices=REVEAL_ORDERS)
    many = number(int, 1, 10**6)
    add("--num_samples", "images to draw [as many as the figures need]", type=many, metavar="N")
    add("--eval_batch_size", "images at once in encoding and sampling", 64, type=whole, metavar="N")
    add("--mask", f"what --stage inpaint fills in: {', '.join(MASKS)}, or an image's white", "right", metavar="M")
    add("--png", "write each sample as a PNG file, too [off]", False, action="store_true")
    add("--metrics", f"of {', '.join(METRICS)} [all that can be had]", type=names_of(METRICS), metavar="A,B")
    add("--reference", "the real images of FID, KID, IS, PRDC and classifier", "test", choices=("test", "train"))
    add("--fid_weights", "pytorch-fid's Inception weights [downloaded]", type=Path, metavar="FILE")
    add("--paper_fid_weights", "torchvision's Inception weights [downloaded]", type=Path, metavar="FILE")
    add("--fad_weights", "the published FAD autoencoders [own, trained once]", type=Path, metavar="DIR")
    return parser
