"""Speed of training, encoding and sampling, and what the exact savings are worth on this machine.

python scripts/benchmark.py --json FILE      both modes, a few minutes
python scripts/benchmark.py --mode fast      one of them
python scripts/benchmark.py --scaling        cost per image as the number of images grows

Images are random; weights are fresh, with running statistics that have seen data. "plain" computes literally, in
float32: SpikingJelly's neuron, every layer at every spike step, every timestep over the whole grid, the release's batch
sizes, the system's way with freed memory. "fast" is what main.py does. Each mode runs in a process of its own, so that
its peak memory is its own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

from diffusion.absorbing import AbsorbingDiffusion
from errors import UserError
from models import SDID, VQSVAE
from models.spiking import use_backend
from pipeline.options import PRECISIONS
from pipeline.run_folder import versions
from pipeline.runtime.device import (
    Machine,
    choose_machine,
    describe_machine,
    find_device,
    keep_freed_memory,
)
from pipeline.runtime.terminal import print_anywhere
from pipeline.sampling.batches import draw_codes, encode_images

CODES, SIDE, GRID = 128, 28, 7
PLAIN_BATCH = {"stage1_train": 32, "stage2_train": 32, "encode": 32, "sample": 16}
FAST_BATCH = {"stage1_train": 64, "stage2_train": 64, "encode": 256, "sample": 64}


def training_step(model: nn.Module, loss: Callable[[], torch.Tensor], machine: Machine) -> Callable[[], None]:
    """A function that does one step of training as main.py does."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-3)

    def step() -> None:
        with machine.autocast():
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def tasks(machine: Machine, plain: bool, batch: dict[str, int], spike_steps: int, width: int) -> dict[str, Callable]:
    """What is timed: each function handles one batch, of the size that `batch` names."""
    device = machine.device
    torch.manual_seed(0)
    vqsvae, sdid = VQSVAE(spike_steps=spike_steps), SDID(spike_steps=spike_steps, denoiser_channels=width)
    for network in (vqsvae, sdid):
        network.to(device) if plain else machine.place(network)
    diffusion = AbsorbingDiffusion(CODES, GRID * GRID)
    images = torch.rand(batch["stage1_train"], 1, SIDE, SIDE, device=device)
    codes = torch.randint(0, CODES, (batch["stage2_train"], GRID, GRID), device=device)
    generator = torch.Generator(device).manual_seed(0)
    pictures = torch.randint(0, 256, (batch["encode"], 1, SIDE, SIDE), dtype=torch.uint8)
    noise = diffusion.noise(0, range(batch["sample"]), (GRID, GRID))

    def denoiser_loss() -> torch.Tensor:
        return diffusion.loss(sdid.train(), codes, diffusion.training_noise(len(codes), (GRID, GRID), generator))

    def sample() -> None:
        sdid.eval()
        if plain:
            diffusion.sample_every_timestep(sdid, type(noise)(*(values.to(device) for values in noise)))
        else:
            draw_codes(sdid, diffusion, noise, machine, temperature=1.0, batch_size=batch["sample"])

    return {
        "stage1_train": training_step(vqsvae, lambda: vqsvae.train()(images, 0.1).loss, machine),
        "stage2_train": training_step(sdid, denoiser_loss, machine),
        "encode": lambda: encode_images(vqsvae, pictures, machine, batch["encode"]),
        "sample": sample,
    }


def seconds(task: Callable[[], None], device: torch.device) -> float:
    """Wall-clock time of one call, to the end of what it started."""
    started = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(args: argparse.Namespace, plain: bool) -> dict:
    """Images/s of each task (median of the repeats, after a warm-up) and the process's peak memory in MiB."""
    machine = choose_machine(args.device, "float32" if plain else args.precision, args.compile and not plain)
    if not plain:
        keep_freed_memory()
    default = PLAIN_BATCH if plain else FAST_BATCH
    batch = {name: args.batch_size or size for name, size in default.items()}
    figures = {}
    for name, task in tasks(machine, plain, batch, args.spike_steps, args.denoiser_channels).items():
        for _ in range(1 if name == "sample" else 3):
            seconds(task, machine.device)
        repeats = args.repeats if name != "sample" else max(1, args.repeats // 3)
        times = [seconds(task, machine.device) for _ in range(repeats)]
        figures[name] = round(batch[name] / statistics.median(times), 3)
        print(f"{'plain' if plain else 'fast':6} {name:13} {figures[name]:10.2f} images/s", flush=True)
    peak = {"peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}
    if machine.device.type == "cuda":
        peak["peak_device_memory_mib"] = round(torch.cuda.max_memory_allocated(machine.device) / 2**20)
    return {**figures, **peak, "batch": batch, "precision": machine.precision}


def scaling(args: argparse.Namespace) -> dict:
    """Milliseconds an image of encoding and sampling N images, N growing; a small network, so that it ends."""
    machine = choose_machine(args.device, args.precision)
    keep_freed_memory()
    vqsvae, sdid = VQSVAE(spike_steps=2), SDID(spike_steps=2, denoiser_channels=4)
    diffusion = AbsorbingDiffusion(CODES, GRID * GRID)
    table = {}
    for count in (1_000, 10_000, 60_000):
        pictures = torch.randint(0, 256, (count, 1, SIDE, SIDE), dtype=torch.uint8)
        noise = diffusion.noise(0, range(count), (GRID, GRID))
        encode = seconds(lambda p=pictures: encode_images(vqsvae, p, machine, 256), machine.device)
        sample = seconds(
            lambda n=noise: draw_codes(sdid, diffusion, n, machine, temperature=1.0, batch_size=256), machine.device
        )
        table[count] = {"encode": round(1e3 * encode / count, 4), "sample": round(1e3 * sample / count, 4)}
        print(
            f"{count:6} images: encode {table[count]['encode']:.3f} ms, sample {table[count]['sample']:.3f} ms an image"
        )
    return table


def in_own_process(arguments: list[str], mode: str) -> dict:
    """The figures of one mode, measured in a fresh process whose lines are passed on."""
    command = [sys.executable, __file__, *arguments, "--mode", mode, "--json", "-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    *lines, last = done.stdout.splitlines()
    print("\n".join(lines), flush=True)
    return json.loads(last)[mode]


def main() -> None:
    """Measure, print a table, write JSON."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("both", "plain", "fast"), default="both")
    parser.add_argument("--scaling", action="store_true", help="time N = 1,000, 10,000 and 60,000 images instead")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for one line on standard output")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the fast mode")
    parser.add_argument("--compile", action="store_true", help="torch.compile in the fast mode")
    parser.add_argument("--batch_size", type=int, help="for all tasks; otherwise each mode has its own")
    parser.add_argument("--spike_steps", type=int, default=16)
    parser.add_argument("--denoiser_channels", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7, help="of each task; a third of them for sampling")
    args = parser.parse_args()
    try:
        machine = {**describe_machine(find_device(args.device)), "cores": os.cpu_count(), "versions": versions()}
        if args.scaling:
            figures = {"machine": machine, "milliseconds_an_image": scaling(args)}
        elif args.mode == "both":
            modes = {mode: in_own_process(sys.argv[1:], mode) for mode in ("plain", "fast")}
            ratio = {name: round(modes["fast"][name] / modes["plain"][name], 2) for name in PLAIN_BATCH}
            figures = {"machine": machine, **modes, "ratio": ratio}
            print("ratio  " + ", ".join(f"{name} {value:.2f}" for name, value in ratio.items()))
        else:
            plain = args.mode == "plain"
            with use_backend("reference" if plain else "fast"):
                figures = {"machine": machine, args.mode: measure(args, plain)}
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.json == "-":
        print(json.dumps(figures))
    elif args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
