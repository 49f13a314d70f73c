"""Speed of training, encoding and sampling on this machine, and how much the exact optimisations contribute.

python scripts/benchmark.py --json FILE        all modes, some minutes
python scripts/benchmark.py --mode fast        one mode
python scripts/benchmark.py --figure FILE      plot of a denoiser pass's time against the share of spikes
python scripts/benchmark.py --scaling          cost per image as the number of images grows

Trained networks are measured on codes that they draw and on the images decoded from them, because the cost of a layer
depends on how many of its neurons fire. With --spike_steps or --denoiser_channels, untrained networks of that size are
measured instead.

"reference" is the unoptimised computation in float32: SpikingJelly's neuron, every layer at every spike step, every
timestep over the whole grid, the release's batch sizes, freed memory returned to the system. "fast" is what main.py
does; it alternates with "dense", the same without event-driven convolutions. Each mode runs in its own process, so that
its peak memory is measured separately.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

import pipeline.runtime.threads  # noqa: F401  before torch

# isort: split
import torch
from torch import Tensor, nn

from diffusion.absorbing import AbsorbingDiffusion
from errors import UserError, reported
from files import expand
from models import SDID, VQSVAE, choose_neuron, reference
from models.kernels import event_conv
from models.neurons import Neuron
from pipeline.checkpoints import check_place, load_weights, write_json
from pipeline.options.sections import PRECISIONS, NeuronOptions, names
from pipeline.run_folder import RunFolder, versions
from pipeline.runtime.device import Machine, choose_machine, describe_machine, find_device, keep_freed_memory
from pipeline.runtime.terminal import print_anywhere
from pipeline.sampling.batches import decode_codes, draw_codes, encode_images
from pipeline.sampling.grids import check_figure_place, save_figure
from pipeline.sampling.settings import Settings
from pixels import to_float

Trained = TypeVar("Trained", VQSVAE, SDID)

TRAINED = Path(__file__).resolve().parents[1] / "pretrained" / "fmnist-faithful"
CODES, SIDE, GRID = 128, 28, 7
IMAGES = 64  # distinct images
LEARNING_RATE = 1e-6  # so low that trained weights and firing rates hardly change
VARIANTS = {"reference": ("reference",), "fast": ("fast", "dense")}
"""What each mode measures, in turn."""

LARGEST_SHARE = dict(event_conv.LARGEST_SHARE)
REFERENCE_BATCH = {"stage1_train": 32, "stage2_train": 32, "encode": 32, "sample": 16}
FAST_BATCH = {"stage1_train": 64, "stage2_train": 64, "encode": 256, "sample": 64}
FIGURE_SHIFTS = (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
"""Added to the bias of batch norm, before a threshold of 1, to make neurons fire more or less."""


def networks(args: argparse.Namespace) -> tuple[VQSVAE, SDID]:
    """The trained networks of `--run`, or untrained ones of the requested size."""
    if args.spike_steps or args.denoiser_channels:
        torch.manual_seed(0)
        steps = args.spike_steps or 16
        return VQSVAE(spike_steps=steps), SDID(spike_steps=steps, denoiser_channels=args.denoiser_channels or 64)
    run = RunFolder(args.run)
    config = run.require_config()
    steps = config["spike_steps"]
    denoiser_steps = config.get("denoiser_spike_steps") or steps
    neuron = choose_neuron(**{name: config[name] for name in names(NeuronOptions) if name in config})
    return load(VQSVAE, run.model, steps, neuron), load(SDID, run.denoiser, denoiser_steps, neuron)


def load(kind: type[Trained], path: Path, spike_steps: int, neuron: Neuron) -> Trained:
    """One of the paper's networks with trained weights. Raises UserError for the weights of another network."""
    weights = load_weights(path)
    try:
        options: dict[str, Any] = kind.options_of(weights)
        network = kind(**options, spike_steps=spike_steps, neuron=neuron)
        network.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} is not for the paper's networks: name another --run") from error
    return network


def draw_images(vqsvae: VQSVAE, sdid: SDID, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes `[N,h,w]` drawn by the networks, the same ones in every mode, and their images, uint8 `[N,1,H,W]`."""
    machine, diffusion = Machine(device, bf16=False), AbsorbingDiffusion(CODES, GRID * GRID)
    noise = diffusion.noise(0, range(IMAGES), (GRID, GRID))
    codes = draw_codes(machine.to_device(sdid), diffusion, noise, Settings(), machine)
    return codes, decode_codes(machine.to_device(vqsvae), codes, machine)


@torch.no_grad()
def shares_of_spikes(sdid: SDID, tokens: Tensor, t: Tensor) -> dict[str, float]:
    """Share of spikes among the inputs of each convolution that has spikes, in evaluation mode."""
    sdid, shares = copy.deepcopy(sdid).eval(), {}
    for name in ("conv2", "conv3", "conv4", "conv5", "conv6"):
        conv = next(sdid.get_submodule(name).children())
        conv.register_forward_pre_hook(lambda _, inputs, name=name: shares.update({name: inputs[0].mean().item()}))
    sdid(tokens, t)
    return shares


def training_step(model: nn.Module, loss: Callable[[], torch.Tensor], machine: Machine) -> Callable[[], None]:
    """A function that performs one training step as main.py does."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-3)

    def step() -> None:
        with machine.autocast():
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def tasks(
    machine: Machine, literal: bool, batch: dict[str, int], vqsvae: VQSVAE, sdid: SDID, codes: Tensor, images: Tensor
) -> dict[str, Callable]:
    """The functions that are timed: each processes one batch, of the size given in `batch`."""
    device = machine.device
    for network in (vqsvae, sdid):
        call_layers(network.to(device)) if literal else machine.to_device(network)

    def some(values: Tensor, task: str) -> Tensor:
        return values[torch.arange(batch[task]) % len(values)]

    diffusion = AbsorbingDiffusion(CODES, GRID * GRID)
    pixels = to_float(some(images, "stage1_train").to(device))
    codes = some(codes, "stage2_train").to(device)
    training_noise = diffusion.training_noise(len(codes), (GRID, GRID), torch.Generator(device).manual_seed(0))
    to_encode = some(images, "encode")
    noise = diffusion.noise(0, range(batch["sample"]), (GRID, GRID))
    times, uniforms = (values.to(device) for values in noise)

    def sample() -> None:
        sdid.eval()
        if literal:
            reference.sample(sdid, times, uniforms, CODES)
        else:
            draw_codes(sdid, diffusion, noise, Settings(), machine, batch["sample"])

    return {
        "stage1_train": training_step(vqsvae, lambda: vqsvae.train()(pixels, 0.1).loss, machine),
        "stage2_train": training_step(sdid, lambda: diffusion.loss(sdid.train(), codes, training_noise), machine),
        "encode": lambda: encode_images(vqsvae, to_encode, machine, batch["encode"]),
        "sample": sample,
    }


def call_layers(network: nn.Module) -> None:
    """Have each layer called as a module, at every spike step, as our networks do where a layer has a hook."""
    network.to(memory_format=torch.contiguous_format)
    for layer in network.modules():
        layer.register_forward_hook(lambda *_: None)


def seconds(task: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, including the GPU work that it starts."""
    started = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(args: argparse.Namespace, mode: str) -> dict[str, dict]:
    """For each variant of a mode, the median images/s of each task, with what it depends on.

    That is the share of spikes, batch sizes and precision; the process's peak memory in MiB is also given.
    """
    literal = mode == "reference"
    machine = choose_machine(args.device, "float32" if literal else args.precision)
    if not literal:
        keep_freed_memory()
    default = REFERENCE_BATCH if literal else FAST_BATCH
    batch = {name: args.batch_size or size for name, size in default.items()}
    vqsvae, sdid = networks(args)
    codes, images = draw_images(vqsvae, sdid, machine.device)
    rates: dict[str, dict[str, float]] = {variant: {} for variant in VARIANTS[mode]}
    for name, task in tasks(machine, literal, batch, vqsvae, sdid, codes, images).items():
        warm_up, repeats = (1, max(1, args.repeats // 3)) if name == "sample" else (3, args.repeats)
        times: dict[str, list[float]] = {variant: [] for variant in rates}
        for _ in range(warm_up + repeats):
            for variant in rates:
                use_events(-1 if variant == "dense" else None)
                times[variant].append(seconds(task, machine.device))
        for variant, values in times.items():
            rates[variant][name] = round(batch[name] / statistics.median(values[warm_up:]), 3)
            print(f"{variant:6} {name:13} {rates[variant][name]:10.2f} images/s", flush=True)
    shares = shares_of_spikes(sdid, *masked(codes, machine.device))
    print(f"{mode:6} {'spikes':13} ", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()), flush=True)
    facts: dict[str, Any] = {"spikes": shares, "batch": batch, "precision": machine.precision}
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes
    facts["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
    if machine.device.type == "cuda":
        facts["peak_device_memory_mib"] = round(torch.cuda.max_memory_allocated(machine.device) / 2**20)
    return {variant: {**measured, **facts} for variant, measured in rates.items()}


def masked(codes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens `[N,h,w]` and timesteps `[N]` as they occur in training."""
    diffusion = AbsorbingDiffusion(CODES, GRID * GRID)
    noise = diffusion.training_noise(len(codes), (GRID, GRID), torch.Generator().manual_seed(0))
    return diffusion.q_sample(codes, noise.mask).to(device), noise.t.to(device)


def use_events(share: float | None = None) -> None:
    """Compute convolutions from events up to this share of spikes: 1 for always, -1 for never, None as main.py does."""
    event_conv.LARGEST_SHARE.update(LARGEST_SHARE if share is None else dict.fromkeys(LARGEST_SHARE, share))


@torch.no_grad()
def draw_figure(args: argparse.Namespace) -> dict:
    """Time of a denoiser's pass over the whole grid against its share of spikes, dense and event-driven; CPU only.

    Processor time excludes what other programs take meanwhile and adds up over threads.
    """
    import matplotlib.pyplot as plt  # here because importing it takes a second

    machine = choose_machine("cpu", args.precision)
    keep_freed_memory()
    vqsvae, trained = networks(args)
    tokens, t = masked(draw_images(vqsvae, trained, machine.device)[0], machine.device)
    points = []
    for shift in FIGURE_SHIFTS:
        sdid = copy.deepcopy(trained).eval()
        for module in sdid.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.add_(shift)
        shares = shares_of_spikes(sdid, tokens, t)
        times: dict[str, list[float]] = {"dense": [], "events": []}
        for _ in range(args.repeats):
            for variant, largest in (("dense", -1), ("events", 1)):
                use_events(largest)
                started = time.process_time()
                with machine.autocast():
                    sdid(tokens, t)
                times[variant].append(time.process_time() - started)
        milliseconds = {variant: 1e3 * statistics.median(values) for variant, values in times.items()}
        points.append(
            {"share": statistics.mean(shares[name] for name in ("conv2", "conv3", "conv4", "conv5")), **milliseconds}
        )
        print("share {share:.3f}: dense {dense:.0f} ms, event-driven {events:.0f} ms".format(**points[-1]), flush=True)
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    share = [100 * point["share"] for point in points]
    axis.plot(share, [point["dense"] for point in points], marker="s", label="dense")
    axis.plot(share, [point["events"] for point in points], marker="o", label="event-driven")
    axis.axvline(share[FIGURE_SHIFTS.index(0)], ls=":", color="grey", label="trained weights")
    axis.set(
        xlabel="neurons that fire at a spike step, %",
        ylabel=f"processor time of a pass over {len(tokens)} grids, ms",
        ylim=(0, None),
    )
    axis.legend()
    save_figure(args.figure, figure)
    return {"denoiser_pass": points, "precision": machine.precision}


def scaling(args: argparse.Namespace) -> dict:
    """Milliseconds per image of encoding and sampling N images as N grows, with a small network to keep it short."""
    machine = choose_machine(args.device, args.precision)
    keep_freed_memory()
    vqsvae, sdid = VQSVAE(spike_steps=2), SDID(spike_steps=2, denoiser_channels=4)
    diffusion = AbsorbingDiffusion(CODES, GRID * GRID)
    table = {}
    for count in (1_000, 10_000, 60_000):
        images = torch.randint(0, 256, (count, 1, SIDE, SIDE), dtype=torch.uint8)
        noise = diffusion.noise(0, range(count), (GRID, GRID))
        encode = seconds(partial(encode_images, vqsvae, images, machine, 256), machine.device)
        sample = seconds(partial(draw_codes, sdid, diffusion, noise, Settings(), machine, 256), machine.device)
        table[count] = {"encode": round(1e3 * encode / count, 4), "sample": round(1e3 * sample / count, 4)}
        times = ", ".join(f"{task} {milliseconds:.3f} ms" for task, milliseconds in table[count].items())
        print(f"{count:6} images: {times} per image")
    return table


def in_own_process(arguments: list[str], mode: str) -> dict:
    """The measurements of one mode, made in a new process whose output is passed on."""
    command = [sys.executable, __file__, *arguments, "--mode", mode, "--json", "-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        sys.exit(done.returncode)  # it has printed the reason
    *lines, last = done.stdout.splitlines()
    print("\n".join(lines), flush=True)
    return {variant: json.loads(last)[variant] for variant in VARIANTS[mode]}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the results, and write them as JSON."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("all", *VARIANTS), default="all")
    parser.add_argument("--run", type=expand, default=TRAINED, help="folder of a run")
    parser.add_argument(
        "--figure", type=expand, metavar="FILE", help="instead, plot the time of a pass against the share of spikes"
    )
    parser.add_argument("--scaling", action="store_true", help="instead, time 1,000, 10,000 and 60,000 images")
    parser.add_argument("--json", metavar="FILE", help="write the measurements to FILE; -: to standard output")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="precision of the fast mode")
    parser.add_argument("--batch_size", type=int, help="batch size of all tasks [each mode has its own]")
    parser.add_argument("--spike_steps", type=int, help="of untrained networks [16]")
    parser.add_argument("--denoiser_channels", type=int, help="of the first block of an untrained denoiser [64]")
    parser.add_argument("--repeats", type=int, default=7, help="repeats of each task, of sampling a third [7]")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    output = None if args.json in (None, "-") else expand(args.json)
    with reported():
        check_place(output)
        check_figure_place(args.figure)
        machine = {**describe_machine(find_device(args.device)), "cores": os.cpu_count(), "versions": versions()}
        if args.scaling:
            measured = {"machine": machine, "milliseconds_an_image": scaling(args)}
        elif args.figure:
            measured = {"machine": machine, **draw_figure(args)}
        elif args.mode == "all":
            modes = in_own_process(arguments, "reference") | in_own_process(arguments, "fast")
            measured = {"machine": machine, **modes}
            for base in ("reference", "dense"):
                ratio = {name: round(modes["fast"][name] / modes[base][name], 2) for name in REFERENCE_BATCH}
                measured[f"fast_over_{base}"] = ratio
                print(f"fast / {base:6}", ", ".join(f"{name} {value:.2f}" for name, value in ratio.items()))
        else:
            measured = {"machine": machine, **measure(args, args.mode)}
        if output:
            write_json(output, measured)
        elif args.json:
            print(json.dumps(measured))


if __name__ == "__main__":
    main()
