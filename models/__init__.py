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
    """Names of the options of an autoencoder of the table; raises ValueError naming the valid models."""
    if name not in AUTOENCODERS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(AUTOENCODERS)}")
    return tuple(inspect.signature(AUTOENCODERS[name]).parameters)


def build_denoiser(name: str, **options: Any) -> nn.Module:
    """A denoiser of the table, with those of the `options` that it has."""
    return _build(DENOISERS[name], options)


def build_model(name: str, **options: Any) -> nn.Module:
    """An autoencoder of the table with those of the `options` that it has.

    Raises ValueError naming the valid models, and for an option that no model has.
    """
    model_options(name)  # raises where there is no such model
    strange = set(options).difference(*map(model_options, AUTOENCODERS))
    if strange:
        raise ValueError(f"no model has the option {', '.join(sorted(strange))}")
    return _build(AUTOENCODERS[name], options)


def _build(kind: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    return kind(**{key: options[key] for key in inspect.signature(kind).parameters if key in options})


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
    "model_options",
]
