"""Repeats a run in one process, which holds nothing else, and prints after each round what the process has in use.

As JSON, one line a round: bytes of memory; open files, threads and child processes. Linux only.
"""

import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import main

ROUNDS = 12
OPTIONS = (
    *("--dataset_name", "Digits", "--train_images", "64", "--batch_size", "16", "--device", "cpu"),
    *("--spike_steps", "2", "--hidden_channels", "4", "--denoiser_channels", "2", "--codebook_size", "8"),
    *("--epochs", "1", "--diffusion_epochs", "1", "--num_samples", "4"),
)
METRICS = ("--metrics", "mse,ssim,codebook")  # the others would train feature networks


def in_use():
    own = Path("/proc/self")
    return {
        "memory": int((own / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(list((own / "fd").iterdir())),
        "threads": len(list((own / "task").iterdir())),
        "processes": len((own / "task" / str(os.getpid()) / "children").read_text().split()),
    }


def one_round():
    """A complete run, which is then resumed for another epoch and evaluated."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        run = Path(folder) / "Digits" / "snn-vq-vae"
        main.main([*OPTIONS, *METRICS, "--no-report", "--result_path", folder])
        main.main(["--resume", str(run), "--diffusion_epochs", "2", "--no-report"])
        main.main(["--checkpoint", str(run), *METRICS])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for _ in range(ROUNDS):
        one_round()
        print(json.dumps(in_use()), flush=True)
