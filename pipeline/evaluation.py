"""The figures of a run, each with its protocol, and the table that is printed at the end."""

import json
from argparse import Namespace

from torch import Tensor, nn

from errors import UserError
from metrics.codebook import perplexity, usage
from metrics.fid import FEWEST_IMAGES, fid
from metrics.inception import load_inception
from metrics.reconstruction import mse, ssim
from pipeline.machine import Machine
from pipeline.pictures import to_float
from pipeline.run_folder import RunFolder, write_whole
from pipeline.sampling import decode_codes, encode_images

METRICS = ("fid", "mse", "ssim", "codebook")
FID_IMAGES = 10_000  # generated for FID, as is usual


def record(name: str, value: float, protocol: str, *, split: str, real: int, generated: int = 0, seed: int) -> dict:
    """One figure of metrics.json; everything that is needed to compare it is beside it."""
    counts = {"num_generated": generated, "num_real": real}
    return {"name": name, "value": value, "protocol": protocol, "split": split, **counts, "seed": seed}


def load_fid_network(options: Namespace, real: Tensor, machine: Machine) -> nn.Module | None:
    """The Inception network if FID is wanted and can be had; otherwise None, after one line that says why.

    Asked for before anything is drawn, so that no thousands of images are drawn for a figure that cannot be computed.
    """
    if "fid" not in options.metrics:
        return None
    if options.num_samples is not None and options.num_samples < FID_IMAGES:
        print(f"no FID: --num_samples {options.num_samples} is fewer than the {FID_IMAGES} images it is defined on")
        return None
    if len(real) < FEWEST_IMAGES:
        print(f"no FID: it needs {FEWEST_IMAGES} real images, and the test split has {len(real)}")
        return None
    try:
        return load_inception(options.fid_weights, machine.device)
    except UserError as error:
        print(f"no FID: {error}")
        return None


def reconstruction_figures(model: nn.Module, test: Tensor, options: Namespace, machine: Machine) -> list[dict]:
    """MSE, SSIM and codebook figures of the autoencoder on all of `test`, uint8 `[N,C,H,W]`."""
    codes = encode_images(model, test, machine, options.eval_batch_size)
    pair = to_float(test), to_float(decode_codes(model, codes, machine, options.eval_batch_size))
    size = model.codebook_size
    mean = "reconstructions as 8-bit images in [0,1], mean over all"
    table = (  # metric, name, protocol, value
        ("mse", "mse", f"{mean} pixels", lambda: mse(*pair)),
        ("ssim", "ssim", f"{mean} images, torchmetrics", lambda: ssim(*pair)),
        ("codebook", "codebook_usage", f"share of the {size} codes that occur", lambda: usage(codes, size)),
        ("codebook", "codebook_perplexity", "exp of the code entropy in nats", lambda: perplexity(codes, size)),
    )
    about = {"split": "test", "real": len(test), "seed": options.seed}
    return [
        record(name, value(), protocol, **about) for metric, name, protocol, value in table if metric in options.metrics
    ]


def fid_figure(generated: Tensor, real: Tensor, inception: nn.Module, options: Namespace) -> dict:
    """FID of `generated` against `real`, both uint8 `[N,C,H,W]`."""
    weights, steps = options.fid_weights or "as published", options.sample_steps or "all"
    protocol = f"pytorch-fid pool3, weights {weights}, temperature {options.temperature:g}, {steps} timesteps"
    value = fid(generated, real, inception)
    return record("fid", value, protocol, split="test", real=len(real), generated=len(generated), seed=options.seed)


def write_figures(run: RunFolder, figures: list[dict]) -> None:
    """Write metrics.json and print the table."""
    write_whole(run.metrics, (json.dumps(figures, indent=1) + "\n").encode())
    if not figures:
        return
    width = max(len(figure["name"]) for figure in figures)
    print(f"\n{'figure':{width}}  {'value':>10}  protocol")
    for figure in figures:
        against = f"{figure['num_real']} {figure['split']} images"
        counts = f"{figure['num_generated']} generated, {against}" if figure["num_generated"] else against
        print(f"{figure['name']:{width}}  {figure['value']:10.4f}  {figure['protocol']} ({counts})")
