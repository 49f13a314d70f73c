"""Soak test: repeats runs in one process and checks that no memory, open file, thread or process leaks.

python scripts/soak.py               # 12 rounds
python scripts/soak.py --rounds 200
"""

import argparse
import io
import itertools
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

import pipeline.runtime.threads  # noqa: F401  before torch

# isort: split
import torch

import main as program
from pipeline.runtime.terminal import print_anywhere

MEBIBYTE = 2**20
LEAK = 2 * MEBIBYTE  # bytes in each of the last three rounds; caches are full after seven
OPTIONS = (
    *("--dataset_name", "Digits", "--train_images", "64", "--batch_size", "16", "--device", "cpu"),
    *("--spike_steps", "2", "--hidden_channels", "4", "--denoiser_channels", "2", "--codebook_size", "8"),
    *("--epochs", "1", "--diffusion_epochs", "1", "--num_samples", "4"),
)
METRICS = ("--metrics", "mse,ssim,codebook")  # the others would train feature networks


def state() -> dict[str, int]:
    """Resources of this process: memory in bytes; number of open files, threads and child processes. Linux only."""
    own = Path("/proc/self")
    children = (own / "task" / str(os.getpid()) / "children").read_text(encoding="utf-8").split()
    return {
        "memory": int((own / "statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(list((own / "fd").iterdir())),
        "threads": len(list((own / "task").iterdir())),
        "processes": len(children),
    }


def one_round() -> None:
    """A complete run, which is then resumed for another epoch and evaluated."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        run = Path(folder) / "Digits" / "snn-vq-vae"
        program.main([*OPTIONS, *METRICS, "--no-report", "--result_path", folder])
        program.main(["--resume", str(run), "--diffusion_epochs", "2", "--no-report"])
        program.main(["--checkpoint", str(run / "model.pth"), *METRICS])


def main(arguments: list[str] | None = None) -> None:
    """Print the resources in use after each round; exit status 1 if they grow."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="number of rounds, at least 12 [12]")
    rounds = max(12, parser.parse_args(arguments).rounds)
    torch.set_num_threads(1)
    states = []
    for i in range(rounds):
        one_round()
        states.append(state())
        held = ", ".join(f"{count} {name}" for name, count in states[-1].items() if name != "memory")
        print(f"round {i + 1}: {states[-1]['memory'] / MEBIBYTE:.0f} MiB, {held}", flush=True)
    growths = [after["memory"] - before["memory"] for before, after in itertools.pairwise(states[1:])]
    leaks = [name for name in ("files", "threads", "processes") if states[-1][name] > states[1][name]]
    if min(growths[-3:]) > LEAK:
        leaks.append("memory")
    print(f"leaks: {', '.join(leaks)}" if leaks else f"no leak in {rounds} rounds")
    sys.exit(bool(leaks) or None)


if __name__ == "__main__":
    main()
