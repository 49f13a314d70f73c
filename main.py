"""Spiking-Diffusion: train, sample and evaluate from the shell. `python main.py --help` lists everything.

python -u main.py --dataset_name MNIST --model snn-vq-vae
python -u main.py --dataset_name MNIST --model snn-vq-vae --checkpoint result/MNIST/snn-vq-vae/model.pth
python -u main.py --resume result/MNIST/snn-vq-vae
torchrun --nproc_per_node 4 main.py --dataset_name MNIST
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import openmp  # noqa: F401  before torch
from errors import UserError
from models import model_options
from pipeline import distributed
from pipeline.interruption import Interrupted
from pipeline.machine import choose_machine, keep_freed_memory
from pipeline.options import build_parser
from pipeline.presets import PRESETS
from pipeline.run_folder import IDENTITY, NETWORKS, UNCHANGEABLE, RunFolder, as_written
from pipeline.stages import Pipeline

HERE_AND_NOW = ("resume", "checkpoint", "result_path", "start_from", "stage", "max_minutes", "device", "compile")
"""Options of one call of the program, which a run's config.json does not pass on to the next."""

RESUMED = ("start_from", "stage")
"""Of these, what it passes on to `--resume`."""

MODEL_OPTIONS = (
    *("codebook_size", "embedding_dim", "downsampling", "revive_codes", "clipped_error"),
    *("readout", "spike_generator"),
)
"""Options that not every model has."""


def resolve(arguments: list[str] | None) -> tuple[argparse.Namespace, RunFolder]:
    """Options and run folder of this call; a run that exists passes on its options, the command line overrides them."""
    parser = build_parser(__doc__.replace("`", ""))
    start = networks_of(parser.parse_args(arguments).start_from, parser)
    parser.set_defaults(**start)
    options = parser.parse_args(arguments)
    own = {key for key in MODEL_OPTIONS if key not in model_options(options.model)}
    idle = [f"--{key}" for key in sorted(own) if getattr(options, key) != parser.get_default(key)]
    if idle:
        raise UserError(f"{options.model} has no {', '.join(idle)}: leave out")
    preset = PRESETS[options.preset]
    if own & set(preset):
        raise UserError(f"--preset {options.preset} is for snn-vq-vae: {options.model} has not all of its options")
    parser.set_defaults(**preset | start)
    run = RunFolder(find_folder(options))
    begins = not (options.resume or options.checkpoint)
    first = run.denoiser if options.stage == "sdid" and not options.start_from else run.model
    makes = first if begins and options.stage in ("all", "vqsvae", "sdid") else None
    if makes and makes.exists():
        ways = f"go on with --resume {run.path}, evaluate with --checkpoint {run.model}"
        raise UserError(f"{makes} is there already: {ways}, or choose another --result_path")
    saved = {} if makes == run.model else run.read_config()
    if options.resume and not saved:
        raise UserError(f"{run.path} is not the folder of a run: it has no config.json")
    passed_on = set(vars(options)).difference(HERE_AND_NOW).union(RESUMED if options.resume else ())
    kept = {key: value for key, value in saved.items() if key in passed_on}
    parser.set_defaults(**kept)  # argparse converts strings as if they had been typed
    options = parser.parse_args(arguments)
    fixed = UNCHANGEABLE if options.resume else IDENTITY
    if options.resume and run.denoiser.exists():
        fixed = (*fixed, "epochs")  # stage 1 is over
    changed = [
        f"--{key} ({saved[key]} in the run)"
        for key in fixed
        if key in saved and saved[key] != as_written(getattr(options, key))
    ]
    if changed:
        raise UserError(f"{run.path} was made with other options: leave out {', '.join(changed)}")
    if options.temperature == "auto" and options.final_temperature != parser.get_default("final_temperature"):
        raise UserError("--temperature auto chooses one for all timesteps: leave out --final_temperature")
    options.image_shape = saved.get("image_shape")
    for key in ("fid_weights", "paper_fid_weights", "fad_weights"):
        path = getattr(options, key)
        if path and not path.exists():
            raise UserError(f"--{key} {path} is not there: mend the path, or leave the option out")
    if options.checkpoint and options.result_path:
        evaluated, run = run.path.resolve(), RunFolder(options.result_path)
        if (run.model.exists() or run.config.exists()) and run.path.resolve() != evaluated:
            raise UserError(f"{run.path} is the folder of another run: choose another --result_path")
    return options, run


def networks_of(start: Path | None, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options that `--start_from` brings along; one that its run has no word of has its default."""
    if start is None:
        return {}
    config = RunFolder(start).read_config()
    if not config:
        raise UserError(f"--start_from {start} is not the folder of a run: it has no config.json")
    return {key: config.get(key, parser.get_default(key)) for key in NETWORKS}


def find_folder(options: argparse.Namespace) -> Path:
    """The run folder: the one resumed, that of the checkpoint, or the one named after data set and model."""
    if options.resume and options.checkpoint:
        raise UserError("--resume trains on and --checkpoint evaluates: give one of them")
    if options.start_from and (options.resume or options.checkpoint):
        raise UserError("--start_from begins a new run: leave out --resume and --checkpoint")
    if options.checkpoint and options.stage in ("vqsvae", "sdid"):
        raise UserError("--checkpoint evaluates a trained model: to train on, use --resume with its run folder")
    if options.resume and options.result_path:
        raise UserError("--resume goes on in the folder of the run: leave out --result_path")
    if options.resume:
        return options.resume.parent if options.resume.suffix == ".pth" else options.resume
    if options.checkpoint:
        return options.checkpoint.parent
    return (options.result_path or Path("result")) / options.dataset_name / options.model


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
