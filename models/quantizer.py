"""Spiking vector quantiser: learned readout, nearest code, losses, and the adaptive spike generator."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.spiking import (
    SpikingStack,
    full_precision,
    membrane_weights,
    postsynaptic_potential,
    weighted_sum,
)

COMMITMENT = 0.25


class QuantizerOutput(NamedTuple):
    """`spikes [S,N,D,h,w]` for the decoder, integer `codes [N,h,w]`, and the scalar `loss`."""

    spikes: Tensor
    codes: Tensor
    loss: Tensor


def codebook_loss(quantized: Tensor, encoded: Tensor) -> Tensor:
    """`|q - stop(e)|^2 + 0.25 |stop(q) - e|^2`, means over elements (VQ-VAE, arXiv 1711.00937, equation 3)."""
    return F.mse_loss(quantized, encoded.detach()) + COMMITMENT * F.mse_loss(quantized.detach(), encoded)


class SpikingQuantizer(nn.Module):
    """Maps encoder spikes to the nearest of `codebook_size` embeddings and back to spikes.

    `alpha` mixes the membrane readout (weight `1 - alpha`) with the firing rate. It is neither clamped nor excluded
    from weight decay, as in the release.
    """

    def __init__(self, codebook_size: int, embedding_dim: int, spike_steps: int):
        super().__init__()
        self.spike_steps = spike_steps
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.embeddings = nn.Embedding(codebook_size, embedding_dim)
        # The adaptive spike generator, under the release's name so that its checkpoints load.
        self.poisson = SpikingStack(nn.Conv2d(embedding_dim, embedding_dim, 1), spike_steps=spike_steps)

    def readout(self, spikes: Tensor) -> Tensor:
        """`(1 - alpha) sum_i 0.8^(S-1-i) s_i + alpha mean_i s_i`: `[S,N,D,h,w]` to `[N,D,h,w]`."""
        membrane = membrane_weights(self.spike_steps, like=self.alpha)
        return weighted_sum((1 - self.alpha) * membrane + self.alpha / self.spike_steps, spikes)

    def nearest_codes(self, encoded: Tensor) -> Tensor:
        """Index of the nearest embedding by squared distance: `[N,D,h,w]` to int64 `[N,h,w]`."""
        with torch.no_grad(), full_precision(encoded):
            vectors = encoded.permute(0, 2, 3, 1)  # [N,D,h,w] -> [N,h,w,D]
            weight = self.embeddings.weight
            return (weight.square().sum(1) - 2 * vectors @ weight.T).argmin(-1)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes `[N,h,w]` to their embeddings `[N,D,h,w]`."""
        return self.embeddings(codes).permute(0, 3, 1, 2)  # [N,h,w,D] -> [N,D,h,w]

    def generate_spikes(self, embedded: Tensor) -> Tensor:
        """Adaptive spike generator: embeddings `[N,D,h,w]`, repeated at every step, to spikes `[S,N,D,h,w]`."""
        return self.poisson(embedded)

    def encode(self, spikes: Tensor) -> Tensor:
        """Encoder spikes `[S,N,D,h,w]` to codes `[N,h,w]`."""
        return self.nearest_codes(self.readout(spikes))

    def forward(self, spikes: Tensor) -> QuantizerOutput:
        """Quantise encoder spikes `[S,N,D,h,w]`; the gradient passes straight through the nearest-code step."""
        encoded = self.readout(spikes)
        codes = self.nearest_codes(encoded)
        embedded = self.embed(codes)
        generated = self.generate_spikes(encoded + (embedded - encoded).detach())
        potentials = (postsynaptic_potential(s.to(encoded.dtype)) for s in (generated, spikes))
        return QuantizerOutput(generated, codes, codebook_loss(embedded, encoded) + codebook_loss(*potentials))
