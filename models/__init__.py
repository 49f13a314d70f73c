"""The two networks, and the table of autoencoders that the command line offers."""

from torch import Tensor, nn

from models.sdid import SDID
from models.vq_svae import VQSVAE

AUTOENCODERS: dict[str, type[nn.Module]] = {"snn-vq-vae": VQSVAE}


def build_model(name: str, **options: int) -> nn.Module:
    """An autoencoder of the table with its options; raises ValueError naming the valid names."""
    if name not in AUTOENCODERS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[name](**options)


def autoencoder_options(weights: dict[str, Tensor]) -> dict[str, int]:
    """All options of an autoencoder but `spike_steps`, read off its weights. KeyError if they are of something else."""
    hidden, channels = weights["encoder.snn_convs.0.weight"].shape[:2]
    codebook_size, embedding_dim = weights["vq_layer.embeddings.weight"].shape
    return dict(channels=channels, hidden=hidden, codebook_size=codebook_size, embedding_dim=embedding_dim)


def denoiser_options(weights: dict[str, Tensor]) -> dict[str, int]:
    """All options of an SDID but `spike_steps`, read off its weights. KeyError if they are of something else."""
    return dict(codebook_size=len(weights["conv6.0.weight"]), width=len(weights["conv1.0.weight"]))


__all__ = ["AUTOENCODERS", "SDID", "VQSVAE", "autoencoder_options", "build_model", "denoiser_options"]
