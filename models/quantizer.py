"""Vector quantisers: the codebook, and the spiking quantiser with its learned readout and spike generator."""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.neurons import LIF, Neuron
from models.reduction import SINGLE_PROCESS, Reduction
from models.spiking import (
    SpikingStack,
    full_precision,
    membrane_weights,
    postsynaptic_potential,
    weighted_sum,
)
from parts import READOUTS, SPIKE_GENERATORS

COMMITMENT = 0.25


class QuantizerOutput(NamedTuple):
    """The decoder's input `quantized`, integer `codes [N,h,w]` and the scalar `loss`.

    `quantized` is embeddings `[N,D,h,w]` or spikes `[S,N,D,h,w]`, with a straight-through gradient to the encoder.
    """

    quantized: Tensor
    codes: Tensor
    loss: Tensor


def codebook_loss(quantized: Tensor, encoded: Tensor) -> Tensor:
    """`|q - stop(e)|^2 + 0.25 |stop(q) - e|^2`, means over elements (VQ-VAE, arXiv 1711.00937, equation 3)."""
    return F.mse_loss(quantized, encoded.detach()) + COMMITMENT * F.mse_loss(quantized.detach(), encoded)


def poisson_spikes(rates: Tensor, spike_steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Spikes `[S,N,D,h,w]`, each 1 with probability `clip(rates, 0, 1)`, for `rates [N,D,h,w]`.

    A spike has the gradient of its probability (straight-through estimator). With a `generator`, each is drawn
    independently; without one, thresholds are fixed and shared by all images, so that no image depends on its batch.
    """
    if generator is None:
        shape, generator = (spike_steps, 1, *rates.shape[1:]), torch.Generator().manual_seed(0)
    else:
        shape = (spike_steps, *rates.shape)
    thresholds = torch.rand(shape, generator=generator, device=generator.device).to(rates.device)
    probabilities = rates.clamp(0, 1)
    spikes = (thresholds < probabilities).to(rates.dtype)
    return spikes + (probabilities - probabilities.detach())


def nearest_rows(vectors: Tensor, table: Tensor) -> Tensor:
    """Index of the row of `table [K,D]` that is nearest to each of `vectors [...,D]`, by squared distance: `[...]`."""
    return (table.square().sum(1) - 2 * vectors @ table.T).argmin(-1)


class Codebook(nn.Module):
    """`codebook_size` embeddings of dimension `embedding_dim`, drawn from N(0,1) (VQ-VAE, arXiv 1711.00937).

    With `revive_codes`, embeddings that a training batch does not use are replaced by encoded vectors of that batch
    (dead-code restart, as in Jukebox, arXiv 2005.00341); the first batch thus initialises the codebook with data.

    `reduction` combines the processes that train together: a code is dead if no process uses it, and all processes
    restart it at a vector of the first process.
    """

    def __init__(self, codebook_size: int, embedding_dim: int, revive_codes: bool = False):
        super().__init__()
        self.embeddings = nn.Embedding(codebook_size, embedding_dim)
        self.revive_codes = revive_codes
        self.reduction: Reduction = SINGLE_PROCESS

    def nearest_codes(self, encoded: Tensor) -> Tensor:
        """Index of the nearest embedding by squared distance: `[N,D,h,w]` to int64 `[N,h,w]`."""
        with torch.no_grad(), full_precision(encoded):
            table = self.embeddings.weight
            return nearest_rows(encoded.to(table.dtype).permute(0, 2, 3, 1), table)  # [N,D,h,w] -> [N,h,w,D]

    def embed(self, codes: Tensor) -> Tensor:
        """Codes `[N,h,w]` to their embeddings `[N,D,h,w]`."""
        return self.embeddings(codes).permute(0, 3, 1, 2)  # [N,h,w,D] -> [N,D,h,w]

    def encode(self, encoded: Tensor) -> Tensor:
        """The encoder's output `[N,D,h,w]` to codes `[N,h,w]`."""
        return self.nearest_codes(encoded)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[N,h,w]` to the decoder's input `[N,D,h,w]`."""
        return self.embed(codes)

    def forward(self, encoded: Tensor, generator: torch.Generator | None = None) -> QuantizerOutput:
        """Quantise `encoded [N,D,h,w]`, with a straight-through gradient.

        `generator` draws the vectors at which dead codes are restarted; nothing else is random.
        """
        codes = self.nearest_codes(encoded)
        if self.training and self.revive_codes:
            self._restart_dead_codes(encoded.detach(), codes, generator)
            codes = self.nearest_codes(encoded)
        embedded = self.embed(codes)
        return QuantizerOutput(encoded + (embedded - encoded).detach(), codes, codebook_loss(embedded, encoded))

    @torch.no_grad()
    def _restart_dead_codes(self, encoded: Tensor, codes: Tensor, generator: torch.Generator | None) -> None:
        """Replace the embeddings that `codes [N,h,w]` do not use by random vectors of `encoded [N,D,h,w]`."""
        weight, vectors = self.embeddings.weight, encoded.permute(0, 2, 3, 1).flatten(0, 2)  # [N*h*w,D]
        used = torch.zeros(len(weight), device=weight.device).index_fill_(0, codes.flatten(), 1)
        picks = torch.randint(len(vectors), (len(weight),), generator=generator, device=weight.device)
        fresh = self.reduction.first(vectors[picks].to(weight.dtype))
        weight.copy_(torch.where(self.reduction.total(used)[:, None] > 0, weight, fresh))


class SpikingQuantizer(Codebook):
    """Maps encoder spikes to the nearest of `codebook_size` embeddings and back to spikes.

    `alpha` is the weight of the firing rate, and `1 - alpha` that of the membrane potential. As in the release, it is
    neither clamped nor excluded from weight decay. Two arguments are for ablations: `readout`, one of READOUTS, may fix
    `alpha` so that only one of the two is read; `spike_generator` is one of SPIKE_GENERATORS. Raises ValueError for
    other values.
    """

    def __init__(
        self,
        codebook_size: int,
        embedding_dim: int,
        spike_steps: int,
        readout: str = "both",
        spike_generator: str = "adaptive",
        revive_codes: bool = False,
        neuron: Neuron = LIF,
    ):
        super().__init__(codebook_size, embedding_dim, revive_codes)
        _check_choice("readout", readout, READOUTS)
        _check_choice("spike_generator", spike_generator, SPIKE_GENERATORS)
        self.spike_steps, self.spike_generator = spike_steps, spike_generator
        fixed = READOUTS[readout]
        self.alpha = nn.Parameter(torch.tensor(0.5 if fixed is None else fixed), requires_grad=fixed is None)
        if spike_generator == "adaptive":  # under the release's name so that its checkpoints load
            conv = nn.Conv2d(embedding_dim, embedding_dim, 1)
            self.poisson = SpikingStack(conv, spike_steps=spike_steps, neuron=neuron)

    def readout(self, spikes: Tensor) -> Tensor:
        """`(1 - alpha) sum_i 0.8^(S-1-i) s_i + alpha mean_i s_i`: `[S,N,D,h,w]` to `[N,D,h,w]`."""
        membrane = membrane_weights(self.spike_steps, like=self.alpha)
        return weighted_sum((1 - self.alpha) * membrane + self.alpha / self.spike_steps, spikes)

    def generate_spikes(self, embedded: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Embeddings `[N,D,h,w]` to the decoder's input.

        "adaptive": spikes `[S,N,D,h,w]` of a convolution, batch norm and neurons that receive the embeddings at every
        step.
        "poisson": spikes as in `poisson_spikes`, drawn by `generator`. "repeat": not spikes but the embeddings
        themselves, `[N,D,h,w]`, which the decoder receives at every step.
        """
        if self.spike_generator == "adaptive":
            return self.poisson(embedded)
        if self.spike_generator == "poisson":
            return poisson_spikes(embedded, self.spike_steps, generator)
        return embedded

    def encode(self, encoded: Tensor) -> Tensor:
        """Encoder spikes `[S,N,D,h,w]` to codes `[N,h,w]`."""
        return self.nearest_codes(self.readout(encoded))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[N,h,w]` to the decoder's input; deterministic, see `poisson_spikes`."""
        return self.generate_spikes(self.embed(codes))

    def forward(self, encoded: Tensor, generator: torch.Generator | None = None) -> QuantizerOutput:
        """Quantise encoder spikes `[S,N,D,h,w]`, with a straight-through gradient past the nearest-code step.

        The loss also compares the postsynaptic potentials of the generated spikes with those of the encoder's. Where
        the spike generator has no parameters ("repeat", "poisson"), the straight-through gradient lets this term still
        pull the readout towards the encoder's spikes; repeated embeddings are filtered as if they were spikes.
        """
        straight, codes, loss = super().forward(self.readout(encoded), generator)
        generated = self.generate_spikes(straight, generator)
        steps = generated if generated.dim() == 5 else generated.expand(self.spike_steps, *generated.shape)
        potentials = (postsynaptic_potential(s.to(straight.dtype)) for s in (steps, encoded))
        return QuantizerOutput(generated, codes, loss + codebook_loss(*potentials))


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
