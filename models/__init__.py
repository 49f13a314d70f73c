"""The networks, and the tables from which the command line chooses one by name.

Constructor parameters have the names of the command line's options (pipeline/options.py).
"""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from models.denoiser import Denoiser
from models.fsvae import FSVAE
from models.residual_sdid import ResidualSDID
from models.sdid import SDID
from models.vq_autoencoder import VQAutoencoder
from models.vq_svae import VQSVAE
from models.vq_vae import VQVAE

DENOISERS: dict[str, type[Denoiser]] = {"sdid": SDID, "residual": ResidualSDID}
Autoencoder = VQAutoencoder | FSVAE
AUTOENCODERS: dict[str, type[VQAutoencoder] | type[FSVAE]] = {"snn-vq-vae": VQSVAE, "vq-vae": VQVAE, "snn-vae": FSVAE}


Network = TypeVar("Network", bound=nn.Module)


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


def _options(table: Mapping[str, type[nn.Module]], name: str) -> tuple[str, ...]:
    if name not in table:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(table)}")
    return tuple(inspect.signature(table[name]).parameters)


def _build(table: Mapping[str, type[Network]], name: str, options: dict[str, Any]) -> Network:
    known = _options(table, name)
    if unknown := sorted(set(options).difference(known)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}: its options are {', '.join(known)}")
    return table[name](**options)


__all__ = [
    "AUTOENCODERS",
    "DENOISERS",
    "FSVAE",
    "SDID",
    "VQSVAE",
    "VQVAE",
    "Autoencoder",
    "Denoiser",
    "ResidualSDID",
    "VQAutoencoder",
    "build_denoiser",
    "build_model",
    "denoiser_options",
    "model_options",
]
