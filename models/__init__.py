"""The networks; `parts.py` has the tables from which the command line chooses one by name.

Constructor parameters have the names of the command line's options (pipeline/options/).
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from models.denoiser import Denoiser
from models.fsvae import FSVAE
from models.neurons import Neuron
from models.residual_sdid import ResidualSDID
from models.residual_svae import ResidualSVAE
from models.sdid import SDID
from models.unet_sdid import UNetSDID
from models.vq_autoencoder import VQAutoencoder
from models.vq_svae import VQSVAE
from models.vq_vae import VQVAE
from parts import AUTOENCODERS, DENOISERS, NEURONS, find_part

Autoencoder = VQAutoencoder | FSVAE


def model_options(name: str) -> tuple[str, ...]:
    """Names of an autoencoder's options. Raises ValueError, which lists the valid names, for an unknown one."""
    return _options(AUTOENCODERS, name)


def denoiser_options(name: str) -> tuple[str, ...]:
    """Names of a denoiser's options. Raises ValueError, which lists the valid names, for an unknown one."""
    return _options(DENOISERS, name)


def build_model(name: str, **options: Any) -> Autoencoder:
    """A new autoencoder. Raises ValueError, which lists the valid choices, for an unknown name or option."""
    return _build(AUTOENCODERS, name, options)


def build_denoiser(name: str, **options: Any) -> Denoiser:
    """A new denoiser. Raises ValueError, which lists the valid choices, for an unknown name or option."""
    return _build(DENOISERS, name, options)


def neuron_options(name: str) -> tuple[str, ...]:
    """Names of a neuron's options. Raises ValueError, which lists the valid names, for an unknown one."""
    return _options(NEURONS, name)


def choose_neuron(neuron: str = "lif", **options: Any) -> Neuron:
    """What networks take as `neuron`. Raises ValueError, which lists the valid names, for an unknown one.

    Options that it does not have are left out.
    """
    known = neuron_options(neuron)
    return partial(find_part(NEURONS, neuron), **{key: value for key, value in options.items() if key in known})


def _options(table: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(inspect.signature(find_part(table, name)).parameters)


def _build(table: Mapping[str, str], name: str, options: dict[str, Any]) -> Any:
    known = _options(table, name)
    if unknown := sorted(set(options).difference(known)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}: its options are {', '.join(known)}")
    return find_part(table, name)(**options)


__all__ = [
    "FSVAE",
    "SDID",
    "VQSVAE",
    "VQVAE",
    "Autoencoder",
    "Denoiser",
    "ResidualSDID",
    "ResidualSVAE",
    "UNetSDID",
    "VQAutoencoder",
    "build_denoiser",
    "build_model",
    "choose_neuron",
    "denoiser_options",
    "model_options",
    "neuron_options",
]
