"""The base class of the vector-quantised autoencoders: images to codes and back, and the loss."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.quantizer import Codebook


class VQOutput(NamedTuple):
    """Reconstructions `images [N,C,H,W]` in [0,1], `codes [N,h,w]`, the scalar training `loss` and its two terms.

    `loss = quantizer_loss + mse / variance`. `mse` is measured before clipping; for `clipped_error` see VQAutoencoder.
    """

    images: Tensor
    codes: Tensor
    loss: Tensor
    quantizer_loss: Tensor
    mse: Tensor


class VQAutoencoder(nn.Module, ABC):
    """Images to codes and back. Pixels are in [0,1] outside and shifted to [-0.5,0.5] inside.

    Args:
        channels: channels of the images.
        codebook_size: number of embeddings K.
        encoder: maps pixels to the vectors or spikes that `vq_layer` quantises.
        vq_layer: the codebook.
        decoder: maps the output of `vq_layer` to pixels.
        clipped_error: the reconstruction loss ignores errors that clipping to [0,1] removes.
    """

    downsampling = 4  # side of an image divided by the side of its grid of codes
    codes_a_side = 1  # of the square of codes that stands for one position of the encoder's output
    spike_steps = 1  # runs of each layer for one image; more in spiking models

    def __init__(
        self,
        channels: int,
        codebook_size: int,
        *,
        encoder: nn.Module,
        vq_layer: Codebook,
        decoder: nn.Module,
        clipped_error: bool = False,
    ):
        super().__init__()
        self.channels, self.codebook_size, self.clipped_error = channels, codebook_size, clipped_error
        self.encoder, self.vq_layer, self.decoder = encoder, vq_layer, decoder

    @staticmethod
    @abstractmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, Any]:
        """All options that determine the shapes of the weights, inferred from these.

        Raises KeyError for the weights of another network.
        """

    def encode(self, images: Tensor) -> Tensor:
        """Images `[N,C,H,W]` in [0,1] to codes int64 `[N,h,w]`, h = H / downsampling."""
        return self.vq_layer.encode(self.encoder(images - 0.5))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[N,h,w]` to images `[N,C,H,W]` in [0,1]."""
        return (self.decoder(self.vq_layer.decode(codes)) + 0.5).clamp(0, 1)

    @torch.no_grad()
    def renumber(self, order: Tensor) -> None:
        """Let number i stand for what code `order[i]` of `order [K]`, a permutation, has stood for until now.

        Images of the same embeddings stay the same.
        """
        weight = self.vq_layer.embeddings.weight
        weight.copy_(weight[order.to(weight.device)])

    def forward(self, images: Tensor, variance: float = 1.0, generator: torch.Generator | None = None) -> VQOutput:
        """Reconstruct images `[N,C,H,W]` in [0,1].

        `variance`, that of the training pixels, divides the reconstruction loss. `generator` draws the vectors for
        dead-code restart, and Poisson spikes; without it these spikes are those of `decode`.
        """
        quantized = self.vq_layer(self.encoder(images - 0.5), generator)
        y = self.decoder(quantized.quantized)
        mse = self._error(y, images - 0.5)
        loss = quantized.loss + mse / variance
        return VQOutput((y + 0.5).clamp(0, 1), quantized.codes, loss, quantized.loss, mse)

    def _error(self, y: Tensor, pixels: Tensor) -> Tensor:
        """Mean squared error of the decoder's output `y` before clipping, except for what `clipped_error` ignores."""
        if self.clipped_error:
            beyond = ((pixels <= -0.5) & (y < pixels)) | ((pixels >= 0.5) & (y > pixels))
            y = torch.where(beyond, pixels, y)
        return F.mse_loss(y, pixels)
