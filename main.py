"""Spiking-Diffusion: train, sample and evaluate from the shell. `python main.py --help` lists everything.

python -u main.py --dataset_name MNIST --model snn-vq-vae
python -u main.py --dataset_name MNIST --model snn-vq-vae --checkpoint result/MNIST/snn-vq-vae/model.pth
python -u main.py --resume result/MNIST/snn-vq-vae
torchrun --nproc_per_node 4 main.py --dataset_name MNIST
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DATASETS
from diffusion.absorbing import LOSSES, REVEAL_ORDERS
from errors import UserError
from models import AUTOENCODERS, DENOISERS, model_options
from models.quantizer import READOUTS, SPIKE_GENERATORS
from pipeline import distributed
from pipeline.evaluation import METRICS, names_of
from pipeline.interruption import Interrupted
from pipeline.machine import PRECISIONS, choose_machine, keep_freed_memory
from pipeline.masks import MASKS
from pipeline.presets import PRESETS
from pipeline.run_folder import IDENTITY, UNCHANGEABLE, RunFolder
from pipeline.stages import STAGES, Pipeline
from pipeline.training import LR_SCHEDULES

HERE_AND_NOW = ("resume", "checkpoint", "stage", "max_minutes", "device", "compile")
"""Options of one call of the program, which a run's config.json does not pass on to the next."""

SWITCH = argparse.BooleanOptionalAction  # what a preset switches on, --no-... switches off

MODEL_OPTIONS = (
    "codebook_size",
    "embedding_dim",
    "downsampling",
    "revive_codes",
    "clipped_error",
    "readout",
    "spike_generator",
)
"""Options that not every model has."""


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


def build_parser() -> Parser:
    """All options, in groups."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__.replace("`", ""), formatter_class=layout, allow_abbrev=False)
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
        "evaluate this model.pth, or the one in this folder, of a run or of the original release; results go beside it",
        type=checkpoint,
        metavar="FILE",
    )
    add("--resume", "go on with this run folder, or its last.pth", type=Path, metavar="RUN")
    add("--result_path", "where run folders are made", Path("result"), type=Path, metavar="DIR")
    add("--max_minutes", "stop each stage after M minutes, saved and resumable [no limit]", type=positive, metavar="M")
    add("--save_every", "save every M minutes of training, besides after each epoch", 10.0, type=positive, metavar="M")
    add("--seed", "of everything that is random", 42, type=number(int, 0, 2**32 - 1), metavar="N")
    add("--device", "auto (CUDA where there is one), cpu, cuda or cuda:N", "auto")
    add("--compile", "train through torch.compile [off]", False, action="store_true")
    add("--precision", "auto is bf16 where the processor has it", "auto", choices=PRECISIONS)

    add = group("data")
    add("--dataset_name", "the data set; Digits needs no download", "Digits", choices=DATASETS)
    add("--data_path", "where data sets are, or are downloaded to", Path("data"), type=Path, metavar="DIR")
    add("--train_images", "use the first N training images [all]", type=whole, metavar="N")
    add("--held_out", "keep N of them, evenly spread, out of training [0]", 0, type=number(int, 0), metavar="N")
    add("--image_size", "side of ImageFolder's pictures, a multiple of 4 [32]", type=number(int, 4, 4096), metavar="N")
    add("--channels", "of ImageFolder's pictures: 1 grey, 3 colour [as they are]", type=int, choices=(1, 3))

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
    add("--clipped_error", "no loss for output beyond black and white [off]", False, action=SWITCH)
    add("--loss", "of stage 2", "reweighted_elbo", choices=LOSSES)

    add = group("sampling and evaluation")
    add(
        "--temperature",
        "divides the logits; 1 samples the distribution as learned, auto chooses on held-out images",
        0.65,
        type=temperature,
        metavar="X",
    )
    add("--sample_steps", "timesteps of sampling, up to T, the number of an image's codes [T]", type=whole, metavar="N")
    add("--reveal_order", "spread: tokens that are revealed together lie far apart", "random", choices=REVEAL_ORDERS)
    many = number(int, 1, 10**6)
    add("--num_samples", "images to draw [as many as the figures need]", type=many, metavar="N")
    add("--eval_batch_size", "images at once in encoding and sampling", 64, type=whole, metavar="N")
    add("--mask", f"what --stage inpaint fills in: {', '.join(MASKS)}, or a picture's white", "right", metavar="M")
    add("--png", "write each sample as a PNG file, too [off]", False, action="store_true")
    add("--metrics", f"of {', '.join(METRICS)} [all that can be had]", type=names_of(METRICS), metavar="A,B")
    add("--reference", "the real images of FID, KID, IS, PRDC and classifier", "test", choices=("test", "train"))
    add("--fid_weights", "pytorch-fid's Inception weights [downloaded]", type=Path, metavar="FILE")
    add("--paper_fid_weights", "torchvision's Inception weights [downloaded]", type=Path, metavar="FILE")
    add("--fad_weights", "the published FAD autoencoders [own, trained once]", type=Path, metavar="DIR")
    return parser


def resolve(arguments: list[str] | None) -> tuple[argparse.Namespace, RunFolder]:
    """Options and run folder of this call; a run that exists passes on its options, the command line overrides them."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    own = {key for key in MODEL_OPTIONS if key not in model_options(options.model)}
    idle = [f"--{key}" for key in sorted(own) if getattr(options, key) != parser.get_default(key)]
    if idle:
        raise UserError(f"{options.model} has no {', '.join(idle)}: leave out")
    preset = PRESETS[options.preset]
    if own & set(preset):
        raise UserError(f"--preset {options.preset} is for snn-vq-vae: {options.model} has not all of its options")
    parser.set_defaults(**preset)
    run = RunFolder(find_folder(options))
    begins = not (options.resume or options.checkpoint)
    makes = {"all": run.model, "vqsvae": run.model, "sdid": run.denoiser}.get(options.stage) if begins else None
    if makes and makes.exists():
        ways = f"go on with --resume {run.path}, evaluate with --checkpoint {run.model}"
        raise UserError(f"{makes} is there already: {ways}, or choose another --result_path")
    saved = {} if makes == run.model else run.read_config()
    if options.resume and not saved:
        raise UserError(f"{run.path} is not the folder of a run: it has no config.json")
    kept = {key: value for key, value in saved.items() if key in vars(options) and key not in HERE_AND_NOW}
    parser.set_defaults(**kept)  # argparse converts strings as if they had been typed
    options = parser.parse_args(arguments)
    fixed = UNCHANGEABLE if options.resume else IDENTITY
    if options.resume and run.denoiser.exists():
        fixed = (*fixed, "epochs")  # stage 1 is over
    changed = [
        f"--{key} ({saved[key]} in the run)"
        for key in fixed
        if saved.get(key, getattr(options, key)) != getattr(options, key)
    ]
    if changed:
        raise UserError(f"{run.path} was made with other options: leave out {', '.join(changed)}")
    options.image_shape = saved.get("image_shape")
    for key in ("fid_weights", "paper_fid_weights", "fad_weights"):
        path = getattr(options, key)
        if path and not path.exists():
            raise UserError(f"--{key} {path} is not there: mend the path, or leave the option out")
    return options, run


def find_folder(options: argparse.Namespace) -> Path:
    """The run folder: the one resumed, that of the checkpoint, or the one named after data set and model."""
    if options.resume and options.checkpoint:
        raise UserError("--resume trains on and --checkpoint evaluates: give one of them")
    if options.checkpoint and options.stage in ("vqsvae", "sdid"):
        raise UserError("--checkpoint evaluates a trained model: to train on, use --resume with its run folder")
    if options.resume:
        return options.resume.parent if options.resume.suffix == ".pth" else options.resume
    if options.checkpoint:
        return options.checkpoint.parent
    return options.result_path / options.dataset_name / options.model


def stop(message: str, status: int = 2) -> None:
    """End the program with one line on stderr; of several processes that end, the first has said why."""
    if distributed.is_first_to_end():
        print(*message.splitlines(), file=sys.stderr)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> None:
    """Run the stages; a mistake of the user is one line on stderr and exit status 2."""
    with distributed.joined():
        try:
            with distributed.in_contact():
                options, run = distributed.from_writer(lambda: resolve(arguments))
                keep_freed_memory()
                machine = choose_machine(options.device, options.precision, options.compile)
            with run, distributed.in_contact():
                Pipeline(options, run, machine).execute()
        except UserError as error:
            stop(f"error: {error}")
        except Interrupted as interrupted:
            stop(str(interrupted), interrupted.status)
        except KeyboardInterrupt:
            stop("interrupted: --resume with the run folder goes on from its last save", 130)
        except OSError as error:
            stop(f"error: {error}")
        except RuntimeError as error:
            if "out of memory" not in str(error) and "allocate memory" not in str(error):
                raise
            stop("error: out of memory: choose a smaller --batch_size, --eval_batch_size or network")


if __name__ == "__main__":
    main()
