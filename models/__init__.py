"""The networks, and the table of autoencoders that the command line offers."""

import inspect
from typing import Any

from torch import nn

from models.fsvae import FSVAE
from models.sdid import SDID
from models.vq_svae import VQSVAE
from models.vq_vae import VQVAE

AUTOENCODERS: dict[str, type[nn.Module]] = {"snn-vq-vae": VQSVAE, "vq-vae": VQVAE, "snn-vae": FSVAE}


def model_options(name: str) -> tuple[str, ...]:
    """Names of the options of an autoencoder of the table; raises ValueError naming the valid models."""
    if name not in AUTOENCODERS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(AUTOENCODERS)}")
    return tuple(inspect.signature(AUTOENCODERS[name]).parameters)


def build_model(name: str, **options: Any) -> nn.Module:
    """An autoencoder of the table with those of the `options` that it has.

    Raises ValueError naming the valid models, and for an option that no model has.
    """
    known = model_options(name)
    strange = set(options).difference(*map(model_options, AUTOENCODERS))
    if strange:
        raise ValueError(f"no model has the option {', '.join(sorted(strange))}")
    return AUTOENCODERS[name](**{key: value for key, value in options.items() if key in known})


__all__ = ["AUTOENCODERS", "FSVAE", "SDID", "VQSVAE", "VQVAE", "build_model", "model_options"]
