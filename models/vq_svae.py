"""VQ-SVAE: the spiking vector-quantised autoencoder (arXiv 2308.10187)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.quantizer import SpikingQuantizer
from models.spiking import SpikingStack, membrane_weights


class VQSVAEOutput(NamedTuple):
    """`images [N,C,H,W]` in [0,1], `codes [N,h,w]`, and scalars: `loss`, the sum that is minimised, and its parts.

    `quantizer_loss` is the two codebook lines of the loss, `mse` the unscaled reconstruction error before clipping.
    """

    images: Tensor
    codes: Tensor
    loss: Tensor
    quantizer_loss: Tensor
    mse: Tensor


class Encoder(nn.Module):
    """Pixels `[N,C,H,W]`, the same at each spike step, to spikes `[S,N,D,H/4,W/4]`."""

    def __init__(self, channels: int, hidden: int, embedding_dim: int, spike_steps: int):
        super().__init__()
        self.snn_convs = SpikingStack(
            nn.Conv2d(channels, hidden, 3, stride=2, padding=1),
            nn.Conv2d(hidden, 2 * hidden, 3, stride=2, padding=1),
            nn.Conv2d(2 * hidden, embedding_dim, 1),
            spike_steps=spike_steps,
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.snn_convs(x)


class Decoder(nn.Module):
    """Spikes `[S,N,D,h,w]` to pixels `[N,C,4h,4w]` in (-1,1): tanh of the last layer's membrane potential."""

    def __init__(self, channels: int, hidden: int, embedding_dim: int, spike_steps: int):
        super().__init__()
        up = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}
        self.snn_convs = SpikingStack(
            nn.ConvTranspose2d(embedding_dim, 2 * hidden, **up),
            nn.ConvTranspose2d(2 * hidden, hidden, **up),
            head=nn.ConvTranspose2d(hidden, channels, 3, padding=1),
            spike_steps=spike_steps,
        )
        self.spike_steps = spike_steps

    def forward(self, spikes: Tensor) -> Tensor:
        """See the class."""
        weights = membrane_weights(self.spike_steps, like=self.snn_convs[-1].weight)
        return torch.tanh(self.snn_convs(spikes, readout=weights))


class VQSVAE(nn.Module):
    """Image to codes and back. Owns the shift of pixels between [0,1] outside and [-0.5,0.5] inside.

    Args:
        channels: of the images.
        codebook_size: number of embeddings K.
        embedding_dim: their width D.
        spike_steps: S.
        hidden: channels of the first hidden layer; the second has twice as many.
    """

    downsampling = 4  # side of an image over side of its grid of codes

    def __init__(
        self,
        channels: int = 1,
        codebook_size: int = 128,
        embedding_dim: int = 16,
        spike_steps: int = 16,
        hidden: int = 32,
    ):
        super().__init__()
        self.channels, self.codebook_size = channels, codebook_size
        self.encoder = Encoder(channels, hidden, embedding_dim, spike_steps)
        self.vq_layer = SpikingQuantizer(codebook_size, embedding_dim, spike_steps)
        self.decoder = Decoder(channels, hidden, embedding_dim, spike_steps)

    def encode(self, images: Tensor) -> Tensor:
        """Images `[N,C,H,W]` in [0,1] to codes int64 `[N,H/4,W/4]`."""
        return self.vq_layer.encode(self.encoder(images - 0.5))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[N,h,w]` to images `[N,C,4h,4w]` in [0,1]."""
        spikes = self.vq_layer.generate_spikes(self.vq_layer.embed(codes))
        return (self.decoder(spikes) + 0.5).clamp(0, 1)

    def forward(self, images: Tensor, variance: float = 1.0) -> VQSVAEOutput:
        """Reconstruct images `[N,C,H,W]` in [0,1]; `variance` of the training pixels scales the error in the loss."""
        quantized = self.vq_layer(self.encoder(images - 0.5))
        y = self.decoder(quantized.spikes)
        mse = F.mse_loss(y, images - 0.5)
        loss = quantized.loss + mse / variance
        return VQSVAEOutput((y + 0.5).clamp(0, 1), quantized.codes, loss, quantized.loss, mse)
