"""The parts that can be exchanged, by the names that the command line has for them: one of your own is a line here.

A part that needs PyTorch stands in its own module, and the table says where: "module:attribute", imported when it is
used. So the command line is read, and mistakes in it are told, before the seconds that PyTorch takes to import.
"""

import math
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

DATASETS = {
    "MNIST": "datasets:load_mnist",
    "FMNIST": "datasets:load_fmnist",
    "KMNIST": "datasets:load_kmnist",
    "Letters": "datasets:load_letters",
    "CIFAR10": "datasets:load_cifar10",
    "Digits": "datasets:load_digits",
    "ImageFolder": "image_folders:load_folder",
}
"""Data sets (`--dataset_name`): functions of a folder and the number of training images, to a `datasets.Source`."""

CODE_MODELS = {
    "snn-vq-vae": "models.vq_svae:VQSVAE",
    "residual-svae": "models.residual_svae:ResidualSVAE",
    "vq-vae": "models.vq_vae:VQVAE",
}
"""Autoencoders with codes, hence with a second stage: classes derived from `models.vq_autoencoder.VQAutoencoder`."""

AUTOENCODERS = {**CODE_MODELS, "snn-vae": "models.fsvae:FSVAE"}
"""Networks of stage 1 (`--model`); their constructors' parameters have the names of the options."""

DENOISERS = {
    "sdid": "models.sdid:SDID",
    "residual": "models.residual_sdid:ResidualSDID",
    "unet": "models.unet_sdid:UNetSDID",
}
"""Networks of stage 2 (`--denoiser`): classes derived from `models.denoiser.Denoiser`; parameters as above."""

NEURONS = {
    "lif": "models.neurons:LIF",
    "if": "models.neurons:IF",
    "plif": "models.neurons:PLIF",
    "fs": "models.neurons:FewSpikes",
}
"""Neurons of the spiking networks (`--neuron`): classes derived from `models.neurons.FromRest`; parameters as above."""

TAU, V_THRESHOLD, V_RESET = 2.0, 1.0, 0.0
"""The paper's neuron: time constant in spike steps, threshold, and the potential after a spike (`None`: soft reset)."""

DIGITS, FEW_SPIKES_RANGE = 4, 4.0
"""The few-spikes neuron: its time steps, in which it sends a number in binary digits, and a bound of that number."""

MEMBRANE_DECAY, FILTER_TAU = 0.8, 2.0
"""The paper's filters of spikes: decay of the membrane readout, time constant of the postsynaptic potential."""

READOUTS = {"both": None, "rate": 1.0, "potential": 0.0}
"""How encoder spikes become vectors (`--readout`): the fixed value of `alpha`, or None if it is learned."""

SPIKE_GENERATORS = ("adaptive", "repeat", "poisson")
"""How embeddings become the decoder's input; see `models.quantizer.SpikingQuantizer.generate_spikes`."""

LOSSES = ("reweighted_elbo", "elbo", "cross_entropy", "spread_cross_entropy")
"""Losses of stage 2 (`--loss`); see `diffusion.absorbing.AbsorbingDiffusion.weighted_loss`."""

WARM_UP = 0.02  # of the cosine schedule: fraction of the steps
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: min(1, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2,
}
"""Learning-rate schedules (`--lr_schedule`): the factor of the rate when this fraction of all steps is done."""

REVEAL_ORDERS = {"random": "diffusion.absorbing:RANDOM", "spread": "diffusion.absorbing:SPREAD"}
"""Orders in which tokens are revealed (`--reveal_order`): a `diffusion.absorbing.RevealOrder` each."""

SAMPLE_METRICS = {
    "fid": "pipeline.evaluation.protocols:FID",
    "fid_50k": "pipeline.evaluation.protocols:FID_50K",
    "clean_fid": "pipeline.evaluation.protocols:CLEAN_FID",
    "clean_fid_5k": "pipeline.evaluation.protocols:CLEAN_FID_5K",
    "kid": "pipeline.evaluation.protocols:KID",
    "is": "pipeline.evaluation.protocols:INCEPTION_SCORE",
    "prdc": "pipeline.evaluation.protocols:PRDC",
    "paper_fid": "pipeline.evaluation.protocols:PAPER_FID",
    "fad": "pipeline.evaluation.protocols:FAD",
    "classifier": "pipeline.evaluation.protocols:CLASSIFIER",
    "recognition": "pipeline.evaluation.protocols:RECOGNITION",
    "memorisation": "pipeline.evaluation.protocols:MEMORISATION",
}
"""Metrics of generated images (`--metrics`): a `pipeline.evaluation.protocols.Metric` each."""

MASKS: dict[str, Callable] = {
    "left": lambda y, x: x < 0.5,
    "right": lambda y, x: x >= 0.5,
    "top": lambda y, x: y < 0.5,
    "bottom": lambda y, x: y >= 0.5,
    "center": lambda y, x: (abs(y - 0.5) < 0.25) & (abs(x - 0.5) < 0.25),
}
"""What is hidden for inpainting (`--mask`), given y and x, the position in the image from 0 to 1."""


def find_part(table: Mapping[str, str], name: str) -> Any:
    """The part of this name, imported now. Raises ValueError, which lists the names, if the table has no such one."""
    if name not in table:
        raise ValueError(f"there is no {name!r}: choose one of {', '.join(table)}")
    return resolve_name(table[name])
