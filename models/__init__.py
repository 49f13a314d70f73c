"""The networks, and the tables of them that the command line offers."""

import inspect
from typing import Any

from torch import nn

from models.fsvae import FSVAE
from models.residual_sdid import ResidualSDID
from models.sdid import SDID
from models.vq_svae import VQSVAE
from models.vq_vae import VQVAE

DENOISERS: dict[str, type[nn.Module]] = {"sdid": SDID, "residual": ResidualSDID}
AUTOENCODERS: dict[str, type[nn.Module]] = {"snn-vq-vae": VQSVAE, "vq-vae": VQVAE, "snn-vae": FSVAE}


def model_options(name: str) -> tuple[str, ...]:
    """Names of the options of an autoencoder of the table; raises ValueError naming the valid ones."""
    return _options(AUTOENCODERS, name)


def denoiser_options(name: str) -> tuple[str, ...]:
    """Names of the options of a denoiser of the table; raises ValueError naming the valid ones."""
    return _options(DENOISERS, name)


def build_model(name: str, **options: Any) -> nn.Module:
    """An autoencoder of the table; raises ValueError, which names the valid ones, for a wrong name or option."""
    return _build(AUTOENCODERS, name, options)


def build_denoiser(name: str, **options: Any) -> nn.Module:
    """A denoiser of the table; raises ValueError, which names the valid ones, for a wrong name or option."""
    return _build(DENOISERS, name, options)


def _options(table: dict[str, type[nn.Module]], name: str) -> tuple[str, ...]:
    if name not in table:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(table)}")
    return tuple(inspect.signature(table[name]).parameters)


def _build(table: dict[str, type[nn.Module]], name: str, options: dict[str, Any]) -> nn.Module:
    known = _options(table, name)
    if strange := sorted(set(options).difference(known)):
        raise ValueError(f"{name} has no option {', '.join(strange)}: its options are {', '.join(known)}")
    return table[name](**options)


__all__ = [
    "AUTOENCODERS",
    "DENOISERS",
    "FSVAE",
    "SDID",
    "VQSVAE",
    "VQVAE",
    "ResidualSDID",
    "build_denoiser",
    "build_model",
    "denoiser_options",
    "model_options",
]
