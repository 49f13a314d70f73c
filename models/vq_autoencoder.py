"""What the vector-quantised autoencoders share: the way of an image to codes and back, and the loss."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.quantizer import Codebook


class VQOutput(NamedTuple):
    """`images [N,C,H,W]` in [0,1], `codes [N,h,w]`, and scalars: `loss`, the sum that is minimised, and its parts.

    `quantizer_loss` is the codebook's lines of the loss, `mse` the unscaled reconstruction error before clipping.
    """

    images: Tensor
    codes: Tensor
    loss: Tensor
    quantizer_loss: Tensor
    mse: Tensor


class VQAutoencoder(nn.Module):
    """Image to codes and back. Owns the shift of pixels between [0,1] outside and [-0.5,0.5] inside.

    Args:
        channels: of the images.
        codebook_size: number of embeddings K.
        encoder: pixels to what `vq_layer` quantises.
        vq_layer: the codebook.
        decoder: what `vq_layer` puts out to pixels.
    """

    downsampling = 4  # side of an image over side of its grid of codes
    spike_steps = 1  # runs of each layer for one image; spiking models have more

    def __init__(
        self, channels: int, codebook_size: int, *, encoder: nn.Module, vq_layer: Codebook, decoder: nn.Module
    ):
        super().__init__()
        self.channels, self.codebook_size = channels, codebook_size
        self.encoder, self.vq_layer, self.decoder = encoder, vq_layer, decoder

    def encode(self, images: Tensor) -> Tensor:
        """Images `[N,C,H,W]` in [0,1] to codes int64 `[N,H/4,W/4]`."""
        return self.vq_layer.encode(self.encoder(images - 0.5))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[N,h,w]` to images `[N,C,4h,4w]` in [0,1]."""
        return (self.decoder(self.vq_layer.decode(codes)) + 0.5).clamp(0, 1)

    def forward(self, images: Tensor, variance: float = 1.0, generator: torch.Generator | None = None) -> VQOutput:
        """Reconstruct images `[N,C,H,W]` in [0,1].

        `variance` of the training pixels scales the error in the loss. `generator` is for what is random in a
        quantiser: only Poisson spikes are, and without a generator they are those of `decode`.
        """
        quantized = self.vq_layer(self.encoder(images - 0.5), generator)
        y = self.decoder(quantized.quantized)
        mse = F.mse_loss(y, images - 0.5)
        loss = quantized.loss + mse / variance
        return VQOutput((y + 0.5).clamp(0, 1), quantized.codes, loss, quantized.loss, mse)
