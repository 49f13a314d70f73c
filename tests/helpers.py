"""What tests of several rooms share: options of small runs, image files, and how to read and compare runs."""

import io
import json
import os
import struct
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn

import main
from datasets import load_dataset
from diffusion.absorbing import AbsorbingDiffusion, TrainingNoise
from errors import UserError
from models.spiking import SpikingStack, membrane_weights, postsynaptic_potential, weighted_sum
from pipeline.checkpoints import load_weights

ROOT = Path(__file__).resolve().parents[1]

GOLDEN = dict(np.load(Path(__file__).with_name("golden.npz")))
"""Inputs, weights and outputs of the release's own modules, in float64."""

SMALL = (
    *("--spike_steps", 4, "--hidden_channels", 8, "--denoiser_channels", 4, "--codebook_size", 8, "--embedding_dim", 8),
    *("--batch_size", 4, "--lr", 0.03, "--num_samples", 5, "--device", "cpu", "--precision", "float32"),
)
"""Options of networks that learn something in a second."""

LIVELY = ("--revive_codes", "--clipped_error")
"""Options of snn-vq-vae with which even these use many codes, so that no two samples are alike."""

IMPROVED = (
    *("--preset", "improved", "--hidden_channels", 8, "--denoiser_channels", 48, "--denoiser_blocks", 1),
    *("--fixed_norm", 0.6, "--condition", "prototype"),
    *("--codebook_size", 8, "--batch_size", 8, "--epochs", 2, "--diffusion_epochs", 2, "--num_samples", 5),
    *("--device", "cpu", "--precision", "float32", "--metrics", "mse,codebook,energy"),
)
"""Options of a small run with the improved preset."""

PRECISION = ("--precision", os.environ["TEST_PRECISION"]) if "TEST_PRECISION" in os.environ else ()
"""Options for programs that a test starts in processes of their own; in this one, the fixture `precision` does it."""


def without(options, *names):
    """Options but for those of these names, and their values."""
    left, words = [], list(options)
    while words:
        name = words.pop(0)
        value = [words.pop(0)] if words and not str(words[0]).startswith("--") else []
        left += [] if name in names else [name, *value]
    return left


def of_network(options):
    """Those of a small run that say what it is made of, without those that only its training has."""
    training = ("--epochs", "--diffusion_epochs", "--batch_size", "--lr", "--revive_codes", "--clipped_error")
    return without(options, *training)


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def call_main(*arguments, report=False):
    """The command line in this process; a report is left out unless it is asked for, since it takes half a second."""
    arguments = arguments if report else (*arguments, "--no-report")
    out, err, status = io.StringIO(), io.StringIO(), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small gain nothing from several threads
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code
        finally:
            torch.set_num_threads(threads)
    return Outcome(status, out.getvalue(), err.getvalue())


def interrupt(*_):
    """Replaces some function: Ctrl-C while it runs."""
    raise KeyboardInterrupt


# ---- image files ----


def noise(*shape, seed=0):
    """Random levels uint8 of this shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def complaint(*args, **options):
    """The message of the UserError that `load_dataset` raises: one line."""
    with pytest.raises(UserError) as caught:
        load_dataset(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_bars(folder, count, size, colour, seed):
    """Images of bright bars on black, a different one in each."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        pixels = np.zeros((size, size, 3) if colour else (size, size), np.uint8)
        left = generator.integers(size - 4)
        pixels[:, left : left + 4] = generator.integers(100, 256, 3 if colour else 1)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


def make_image_folder(path, size, colour):
    """A data set for `--dataset_name ImageFolder`: 120 training and 4 test images."""
    write_bars(path / "train", 120, size, colour, seed=1)
    write_bars(path / "test", 4, size, colour, seed=2)
    return path


def write_idx(folder, prefix, images):
    """A split of a data set as MNIST stores it, with labels 1, 2, 3, 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">4i", 2051, *images.shape)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    labels = struct.pack(">2i", 2049, len(images)) + bytes(1 + i % 3 for i in range(len(images)))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


# ---- networks ----


@torch.no_grad()
def with_steady_current(current):
    """A stack of one neuron, which receives `current` at each of 16 steps at which its input is a spike."""
    stack = SpikingStack(nn.Conv2d(1, 1, 1), spike_steps=16).eval()
    for parameter, value in zip(stack.parameters(), (1, 0, 1, current - 1), strict=True):  # convolution, batch norm
        parameter.fill_(value)
    return stack


def _diffusion(codes, codebook_size):
    return AbsorbingDiffusion(codebook_size, codes[0].numel())


FAST = SimpleNamespace(
    postsynaptic_potential=postsynaptic_potential,
    membrane_potential=lambda spikes: weighted_sum(membrane_weights(len(spikes), like=spikes), spikes),
    encoder=lambda model, images: model.encoder(images - 0.5),
    readout=lambda quantizer, spikes: quantizer.readout(spikes),
    nearest=lambda quantizer, r: quantizer.nearest_codes(r),
    embed=lambda quantizer, codes: quantizer.embed(codes),
    spike_generator=lambda quantizer, q: quantizer.generate_spikes(q),
    decoder=lambda model, spikes: model.decoder(spikes),
    encode=lambda model, images: model.encode(images),
    decode=lambda model, codes: model.decode(codes),
    reconstruct=lambda model, images, variance=1.0: model(images, variance),
    sdid=lambda network, tokens, t: network(tokens, t),
    residual_sdid=lambda network, tokens, condition=None: network(tokens, torch.ones(len(tokens)), condition),
    unet_sdid=lambda network, tokens, condition=None: network(tokens, torch.ones(len(tokens)), condition),
    cross_entropy=lambda logits, codes, mask: _diffusion(codes, logits.shape[1]).cross_entropy(logits, codes, mask),
    diffusion_loss=lambda network, codes, t, mask, kind: _diffusion(codes, network.codebook_size).loss(
        network, codes, TrainingNoise(t, mask), kind
    ),
)
"""The networks, under the names that models/reference.py has for what they compute."""


@contextmanager
def as_modules(network):
    """Context in which each layer of a network is called as a module, at every spike step: nothing stands in for it."""
    hooks = [layer.register_forward_hook(lambda *_: None) for layer in network.modules()]
    yield
    for hook in hooks:
        hook.remove()


def layer_by_layer(stack, x, readout=None):
    """What a stack computes, from its modules alone; `x` and `readout` as for its forward."""
    x = x if x.dim() == 5 else x.expand(stack.spike_steps, *x.shape)
    for layer in stack:
        x = layer(x) if isinstance(layer, BaseNode) else layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x if readout is None else torch.tensordot(readout, x, 1)


# ---- run folders ----


def run_in(result_path, model=None):
    """The run folder of a model below `--result_path`, for ImageFolder; by default the one that is there.

    While there is none, that of the default model.
    """
    runs = result_path / "ImageFolder"
    there = [run.name for run in runs.iterdir()] if runs.is_dir() else []
    return runs / (model or (there or ["snn-vq-vae"])[0])


def read_log(run):
    """log.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("time", "images_per_second")} for line in lines]


def read_images(run):
    """The samples of a run, uint8[N,H,W,C]."""
    with np.load(run / "samples" / "images.npz") as archive:
        return archive["images"]


def read_metrics(run):
    """The records of metrics.json by name."""
    return {record["name"]: record for record in json.loads((run / "metrics.json").read_text())}


def assert_same_weights(first, second):
    """Of both networks, bit for bit."""
    for name in ("model.pth", "diff_result/diff_model.pth"):
        one, other = load_weights(first / name), load_weights(second / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def assert_same_run(first, second):
    """The same weights, log, samples and metrics."""
    assert_same_weights(first, second)
    assert read_log(first) == read_log(second)
    assert np.array_equal(read_images(first), read_images(second))
    assert read_metrics(first) == read_metrics(second)
