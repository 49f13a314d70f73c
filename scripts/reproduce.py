"""Train and evaluate models on data sets, one run after another: the rows of the paper's tables.

python scripts/reproduce.py --datasets FMNIST --models snn-vq-vae vq-vae --budget short
python scripts/reproduce.py --datasets MNIST FMNIST --budget paper -- --fad_weights DIR --device cuda:1

Finished runs are skipped, interrupted ones resumed. Everything after -- is passed to main.py unchanged.
scripts/results_table.py then makes the table.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

from errors import UserError
from files import expand
from parts import DATASETS
from pipeline.options.declaration import Role
from pipeline.options.parser import as_read, build_parser, option_in_words
from pipeline.options.presets import PRESETS
from pipeline.options.sections import DECLARATIONS, DEFAULTS, with_role
from pipeline.run_folder import RunFolder
from pipeline.runtime.terminal import print_anywhere

MAIN = Path(__file__).resolve().parents[1] / "main.py"

PAPERS_DATASETS = ("MNIST", "FMNIST", "KMNIST", "Letters", "CIFAR10")

VARIANTS: dict[str, tuple[str, ...]] = {
    "snn-vq-vae": ("--model", "snn-vq-vae"),
    "vq-vae": ("--model", "vq-vae"),
    "snn-vae": ("--model", "snn-vae"),
    "readout-rate": ("--model", "snn-vq-vae", "--readout", "rate"),
    "readout-potential": ("--model", "snn-vq-vae", "--readout", "potential"),
    "generator-repeat": ("--model", "snn-vq-vae", "--spike_generator", "repeat"),
    "generator-poisson": ("--model", "snn-vq-vae", "--spike_generator", "poisson"),
    "neuron-if": ("--model", "snn-vq-vae", "--neuron", "if"),
    "neuron-plif": ("--model", "snn-vq-vae", "--neuron", "plif"),
}
"""The paper's model, its baselines, and the ablations of its readout, spike generator and neurons."""

BUDGETS: dict[str, tuple[str, ...]] = {
    "smoke": (
        *("--train_images", "1200", "--held_out", "200", "--epochs", "2", "--diffusion_epochs", "2"),
        *("--spike_steps", "4", "--hidden_channels", "8", "--denoiser_channels", "8", "--eval_batch_size", "256"),
    ),
    "short": ("--held_out", "5001", "--epochs", "4", "--diffusion_epochs", "1"),
    "paper": ("--held_out", "5001", "--epochs", "100", "--diffusion_epochs", "200"),
}
"""smoke: minutes, to check that everything runs; short: hours; paper: the paper's schedule, days; on two cores."""


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is passed on to main.py."""
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=PAPERS_DATASETS)
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=["snn-vq-vae", "vq-vae", "snn-vae"])
    parser.add_argument("--budget", choices=BUDGETS, required=True)
    parser.add_argument("--result_path", type=expand, default=Path("result/reproduce"))
    return parser.parse_args(arguments[:cut]), arguments[cut + 1 :]


def command(args: argparse.Namespace, dataset: str, variant: str, passed_on: list[str]) -> list[str] | None:
    """The command that one run still needs; None if it is finished.

    Raises UserError if what is there was begun with other options.
    """
    options = VARIANTS[variant]
    place = args.result_path / args.budget / variant
    run = RunFolder(place / dataset / options[1])
    call = [sys.executable, "-u", str(MAIN)]
    new = ["--dataset_name", dataset, "--result_path", str(place)]
    budget = ["--temperature", "auto", *BUDGETS[args.budget]]
    wanted = [*new, *options, *of_model(options[1], budget), *passed_on]
    if not run.config.exists():
        return [*call, *wanted]
    if other := differences(run, wanted):
        raise UserError(f"{run.path} was begun with {', '.join(other)}: choose another --result_path")
    return None if run.metrics.exists() else [*call, "--resume", str(run.path), *passed_on]


def differences(run: RunFolder, arguments: list[str]) -> list[str]:
    """The options of a run that are not those of this command line: those that last, and what it was to compute."""
    saved, typed = run.read_config(), vars(build_parser(__doc__ or "").parse_args(arguments))
    wanted = DEFAULTS | PRESETS[typed.get("preset", DEFAULTS["preset"])] | typed
    lasting = [*with_role(Role.SETTING), "stage", "metrics", "num_samples"]
    names = [name for name in lasting if name in saved and not name.endswith(("_path", "_weights"))]
    other = [name for name in names if as_read(name, saved[name]) != wanted[name]]
    return [f"--{name} {option_in_words(name, as_read(name, saved[name]))}" for name in other]


def of_model(model: str, arguments: list[str]) -> list[str]:
    """The options, with their values, that the model has: one without codes has no second stage."""
    pairs = [arguments[i : i + 2] for i in range(0, len(arguments), 2)]
    owners = [DECLARATIONS[name.removeprefix("--")].of for name, _ in pairs]
    return [word for pair, own in zip(pairs, owners, strict=True) if not own or model in own for word in pair]


def main(arguments: list[str] | None = None) -> None:
    """Run the matrix; a run that fails does not stop the others, and makes the exit status 1."""
    print_anywhere()
    args, passed_on = parse(arguments)
    failed = []
    for dataset in args.datasets:
        for variant in args.models:
            try:
                call = command(args, dataset, variant, passed_on)
            except UserError as error:
                print(f"\n== {dataset}, {variant}: {error}", flush=True)
                failed.append(f"{dataset}/{variant}")
                continue
            print(f"\n== {dataset}, {variant}: {'finished' if call is None else ' '.join(call[2:])}", flush=True)
            if call and subprocess.run(call).returncode:
                failed.append(f"{dataset}/{variant}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
