"""Train, evaluate and print rows of the table of results. A row is a recipe: calls of main.py, and nothing else.

python scripts/reproduce.py --list
python scripts/reproduce.py --rows fmnist-improved
python scripts/reproduce.py --rows all --jobs 3 --max_minutes 60 -- --device cuda --fid_weights FILE

What was interrupted, or stopped by --max_minutes, goes on when the same command is typed again; what is finished is
left alone. Everything after -- is passed to each call of main.py. With several jobs, what they print goes to log.txt in
the folder of each row.
"""

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

from errors import UserError
from files import expand
from pipeline.lineage import costs
from pipeline.options.declaration import POSITIVE, Role, number
from pipeline.options.parser import as_read, build_parser, option_in_words
from pipeline.options.presets import PRESETS
from pipeline.options.sections import DEFAULTS, is_place, with_role
from pipeline.run_folder import RunFolder
from pipeline.runtime.terminal import print_anywhere
from scripts.results_table import read_rows, table

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (1, 2, 3)  # a set of samples each
HELD_OUT = {"MNIST": 5001, "FMNIST": 5000, "KMNIST": 600, "Letters": 3000, "CIFAR10": 5000}
"""Training images of each data set that are never trained on."""

AVERAGED = "--lr_schedule cosine --ema_decay 0.999"

REHEARSED_TRAINING = "--train_images 600 --held_out 100 --eval_batch_size 256"
REHEARSED_EVALUATION = "--num_samples 64 --metrics energy"
"""What --rehearse puts in the place of a recipe's images, samples and metrics; each stage has one epoch then."""


class Recipe(NamedTuple):
    """Options of one training of a stage after another, each of which begins with the weights of the one before it, and
    of the evaluation of each set of samples.
    """

    dataset: str
    trainings: tuple[str, ...]
    model: str = "snn-vq-vae"
    evaluation: str = "--num_samples 10000"


def faithful(epochs: int, at_2: int, at_16: int) -> tuple[str, ...]:
    """The paper's method, with most of SDID's epochs at two spike steps and the last at the paper's sixteen."""
    sdid = f"--stage sdid {AVERAGED} --fixed_norm 0.3 --temperature 1"
    return (
        f"--stage vqsvae --epochs {epochs} --lr 2e-3 {AVERAGED} --sort_codes",
        f"{sdid} --denoiser_spike_steps 2 --diffusion_lr 4e-3 --diffusion_epochs {at_2}",
        f"{sdid} --denoiser_spike_steps 16 --diffusion_lr 2e-3 --diffusion_epochs {at_16}",
    )


STROKES = " --downsampling 4 --codebook_size 16"  # a position of each 4x4 pixels is enough for what was written


def improved(dataset: str, epochs: int, sdid: int, codes: str = "") -> Recipe:
    """The improved preset with other numbers of epochs, and perhaps other codes."""
    stages = f"vqsvae --epochs {epochs}", f"sdid --diffusion_epochs {sdid}"
    trainings = tuple(f"--preset improved --stage {stage}{codes}" for stage in stages)
    return Recipe(dataset, trainings, PRESETS["improved"]["model"])


def short(options: str = "") -> tuple[str, ...]:
    """The paper's method in little time, with one thing changed."""
    sdid = "--stage sdid --denoiser_spike_steps 4 --diffusion_epochs 1 --temperature 1"
    return tuple(f"{training} {options}".strip() for training in ("--stage vqsvae --epochs 2", sdid))


def compared(options: str = "") -> Recipe:
    """A row of the table of ablations, evaluated in little time as well."""
    return Recipe("FMNIST", short(options), evaluation="--num_samples 5000 --metrics fad,classifier,mse,energy")


RECIPES = {
    "mnist-faithful": Recipe("MNIST", faithful(6, 40, 8)),
    "fmnist-faithful": Recipe("FMNIST", faithful(6, 20, 8)),
    "kmnist-faithful": Recipe("KMNIST", faithful(50, 120, 8)),
    "letters-faithful": Recipe("Letters", faithful(12, 40, 4)),
    "cifar10-faithful": Recipe("CIFAR10", faithful(8, 20, 4)),
    "mnist-improved": improved("MNIST", 10, 24, STROKES),
    "fmnist-improved": improved("FMNIST", 10, 24),
    "kmnist-improved": improved("KMNIST", 60, 240, STROKES),
    "letters-improved": improved("Letters", 20, 60, STROKES),
    "cifar10-improved": improved("CIFAR10", 10, 120),
    **{f"{name.lower()}-vq-vae": Recipe(name, short(), "vq-vae") for name in HELD_OUT},
    "fmnist-short": compared(),
    "fmnist-short-if": compared("--neuron if"),
    "fmnist-short-plif": compared("--neuron plif"),
    "fmnist-short-fs": compared("--neuron fs --spike_steps 1 --denoiser_spike_steps 1"),
    "fmnist-short-rate": compared("--readout rate"),
    "fmnist-short-potential": compared("--readout potential"),
    "fmnist-short-repeat": compared("--spike_generator repeat"),
    "fmnist-short-poisson": compared("--spike_generator poisson"),
    "fmnist-short-snn-vae": Recipe("FMNIST", short()[:1], "snn-vae"),
}
"""The rows, by name. The short ones compare ablations and a baseline with their control, in equal and little time."""


class Job(NamedTuple):
    """A row in the making: in which folder, and with what in addition to its recipe."""

    recipe: Recipe
    folder: Path
    passed_on: tuple[str, ...] = ()
    rehearsed: bool = False

    def run(self, number: int) -> RunFolder:
        """The run folder of a training; the first is number 0."""
        return RunFolder(self.folder / str(number + 1) / self.recipe.dataset / self.recipe.model)

    @property
    def last_run(self) -> RunFolder:
        """The run folder of the last training, which is evaluated."""
        return self.run(len(self.recipe.trainings) - 1)

    def training(self, number: int) -> list[str]:
        """The options of main.py for a training."""
        recipe, run = self.recipe, self.run(number)
        options = recipe.trainings[number]
        data = f"--dataset_name {recipe.dataset} --held_out {HELD_OUT[recipe.dataset]}"
        if self.rehearsed:
            options, data = re.sub(r"epochs \d+", "epochs 1", options), f"{data} {REHEARSED_TRAINING}"
        place = ["--result_path", str(run.path.parents[1])]
        start = ["--start_from", str(self.run(number - 1).path)] if number else []
        return [*data.split(), "--model", recipe.model, *options.split(), *start, *place, *self.passed_on]

    def evaluation(self, seed: int) -> list[str]:
        """The options of main.py for the evaluation of a set of samples."""
        what = REHEARSED_EVALUATION if self.rehearsed else self.recipe.evaluation
        return ["--checkpoint", str(self.last_run.path), "--seed", str(seed), *what.split(), *self.passed_on]

    def is_evaluated(self, seed: int) -> bool:
        """Whether metrics.json has records of the samples with this seed."""
        return any(record.get("sampling", {}).get("seed") == seed for record in self.last_run.read_records())

    def next_call(self) -> list[str] | None:
        """The options of main.py for what is to be done next; None if the row is finished.

        Raises UserError if what is there was begun with other options.
        """
        for training in range(len(self.recipe.trainings)):
            options, run = self.training(training), self.run(training)
            if not run.last.is_file():
                return options
            if other := differences(run, options):
                raise UserError(f"{run.path} was begun with {', '.join(other)}: choose another --result_path")
            if run.unfinished_stage():
                return ["--resume", str(run.path), *self.passed_on]
        return next((self.evaluation(seed) for seed in SEEDS if not self.is_evaluated(seed)), None)


def differences(run: RunFolder, options: list[str]) -> list[str]:
    """The options of a run that are not those of these options for main.py, as far as they last."""
    saved, typed = run.read_config(), vars(build_parser("").parse_args(options))
    wanted = DEFAULTS | PRESETS[typed.get("preset", DEFAULTS["preset"])] | typed
    lasting = [*with_role(Role.SETTING), "stage"]
    names = [name for name in typed if name in lasting and name in saved and not is_place(name)]
    other = [name for name in names if as_read(name, saved[name]) != wanted[name]]
    return [f"--{name} {option_in_words(name, as_read(name, saved[name]))}" for name in other]


def make(name: str, job: Job, deadline: float, to_file: bool) -> str:
    """Make what is left of a row; what became of it, in words: "finished", "time is up", or what failed."""
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.folder / "log.txt" if to_file else None
    try:
        while options := job.next_call():
            minutes = (deadline - time.monotonic()) / 60
            if minutes <= 0:
                return "time is up"
            limit = [] if "--checkpoint" in options or math.isinf(minutes) else ["--max_minutes", f"{minutes:.3f}"]
            print(f"== {name}: main.py {shlex.join(options)}", flush=True)
            if not succeeds([sys.executable, "-u", str(ROOT / "main.py"), *options, *limit], log):
                return f"failed: see {log}" if log else "failed"
    except UserError as error:
        return f"failed: {error}"
    return "finished"


def succeeds(call: list[str], log: Path | None) -> bool:
    """Whether a call of main.py ends well; what it prints goes to the end of a file, if one is named."""
    if log is None:
        return not subprocess.run(call).returncode
    with log.open("a", encoding="utf-8") as file:
        return not subprocess.run(call, stdout=file, stderr=subprocess.STDOUT).returncode


def listed(name: str, job: Job) -> str:
    """A recipe as commands, and what it cost, if the packed weights of this name are of it."""
    calls = [job.training(number) for number in range(len(job.recipe.trainings))]
    calls += [job.evaluation(seed) for seed in SEEDS]
    lineage = RunFolder(ROOT / "pretrained" / name).lineage
    of_recipe = [entry for entry in lineage if "images" in entry and "note" not in entry]
    spent = costs(lineage) if len(of_recipe) == len(job.recipe.trainings) else []
    cost = "; ".join(f"{each.stage}: {each.images:,} images, {each.time}" for each in spent)
    lines = (f"    python -u main.py {shlex.join(call)}" for call in calls)
    return "\n".join([f"{name}: {cost or 'no weights yet'}", *lines])


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """The command line, and what is passed on to main.py."""
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", choices=[*RECIPES, "all"], default=["all"], metavar="ROW", help="names of rows, or all")
    add("--list", action="store_true", help="only print the recipes")
    add("--jobs", type=number(int, 1), default=1, metavar="N", help="rows that are made at the same time")
    add(
        "--max_minutes",
        type=number(float, POSITIVE),
        default=math.inf,
        metavar="M",
        help="stop trainings then, ready to go on",
    )
    add("--rehearse", action="store_true", help="600 images, an epoch, few samples: whether all commands run")
    add("--result_path", type=expand, default=Path("result/rows"), metavar="DIR", help="a folder for each row is here")
    return parser.parse_args(arguments[:cut]), tuple(arguments[cut + 1 :])


def main(arguments: list[str] | None = None) -> None:
    """Make the rows; one that fails does not stop the others, and makes the exit status 1."""
    print_anywhere()
    args, passed_on = parse(arguments)
    names = list(RECIPES) if "all" in args.rows else args.rows
    jobs = {name: Job(RECIPES[name], args.result_path / name, passed_on, args.rehearse) for name in names}
    if args.list:
        print("\n".join(listed(name, job) for name, job in jobs.items()))
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    deadline = time.monotonic() + 60 * args.max_minutes
    outcomes = {}
    with ThreadPoolExecutor(args.jobs) as workers:
        ends = {name: workers.submit(make, name, jobs[name], deadline, args.jobs > 1) for name in names}
        try:
            for name, end in ends.items():
                outcomes[name] = end.result()
                print(f"== {name}: {outcomes[name]}", flush=True)
        except KeyboardInterrupt:  # which the running calls have received, too: they save, and no other begins
            workers.shutdown(cancel_futures=True)
            sys.exit(130)
    finished = [jobs[name].last_run for name, outcome in outcomes.items() if outcome == "finished"]
    if finished:
        print(table(read_rows(finished)))
    if any(outcome.startswith("failed") for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
