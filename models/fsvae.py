"""FSVAE, a fully spiking variational autoencoder (arXiv 2110.00375), as a baseline of arXiv 2308.10187.

Its latents are spikes: those of step t follow a Bernoulli distribution given by what came before, of which a spiking
network represents the probability by k binary outputs, and a draw is one of them picked at random.

Its linear layers have batch norm over batch and spike steps, as in FSVAE. In the release they have none; then the
prior, which begins with no spikes as its input, stays silent, and all samples are one and the same image.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.spiking import SpikingStack, full_precision, postsynaptic_potential
from models.vq_svae import Decoder, Encoder

FIRST_OWN_STEP = 5
TIE_NOISE = 1e-3


class FSVAEOutput(NamedTuple):
    """`images [N,C,H,W]` in [0,1], and scalars: `loss`, the sum that is minimised, of `mmd` and `mse`.

    `mse` is the reconstruction error before clipping.
    """

    images: Tensor
    loss: Tensor
    mmd: Tensor
    mse: Tensor


class SpikingLinears(SpikingStack):
    """Linear layers, each followed by batch norm and LIF."""

    def __init__(self, *widths: int, spike_steps: int):
        super().__init__(*(nn.Conv2d(*pair, 1) for pair in pairwise(widths)), spike_steps=spike_steps)

    def forward(self, x: Tensor) -> Tensor:
        """Spikes `[S,N,F]` to spikes `[S,N,F']`."""
        with full_precision(x):
            return super().forward(x.to(self[0].weight.dtype)[..., None, None]).flatten(2)

    def from_rest(self) -> Callable[[Tensor], Tensor]:
        """A function that goes one spike step on each time it is called, `[N,F]` to `[N,F']`, without gradient.

        For inputs that depend on earlier outputs. A neuron knows the past only by its potential, so this gives what
        `forward` would give in evaluation mode: batch norm takes its running statistics, in training mode, too,
        because those of the batch take all steps.
        """
        blocks = [self[i : i + 2] for i in range(0, len(self), 3)]
        potentials = [0.0] * len(blocks)

        @torch.no_grad()
        def step(x: Tensor) -> Tensor:
            for i, (linear, norm) in enumerate(blocks):
                x = F.linear(x, linear.weight[:, :, 0, 0], linear.bias)
                x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
                charged = potentials[i] + (x - potentials[i]) / 2  # the equations of LIF
                x = (charged >= 1).to(x.dtype)
                potentials[i] = charged * (1 - x)
            return x

        return step


def choose(candidates: Tensor, picks: Tensor) -> Tensor:
    """Of `candidates [...,L,k]` those with the indices `picks [...,L]`: `[...,L]`; the gradient goes to these."""
    return candidates.gather(-1, picks[..., None])[..., 0]


class FSVAE(nn.Module):
    """Image to spiking latents and back, and a spiking prior to draw latents from.

    Args:
        channels: of the images.
        image_size: side of the square images, a multiple of 4.
        latent_dim: number of latents L.
        candidates: binary outputs k that represent a latent's probability.
        spike_steps: S.
        hidden: channels of the first hidden layer; the second has twice as many.
        embedding_dim: channels of the encoder's output.
    """

    downsampling = 4

    def __init__(
        self,
        channels: int = 1,
        image_size: int = 28,
        latent_dim: int = 56,
        candidates: int = 20,
        spike_steps: int = 16,
        hidden: int = 32,
        embedding_dim: int = 16,
    ):
        super().__init__()
        if image_size % self.downsampling:
            raise ValueError(f"image_size must be a multiple of {self.downsampling}, got {image_size}")
        self.channels, self.image_size, self.spike_steps = channels, image_size, spike_steps
        self.latent_dim, self.candidates = latent_dim, candidates
        features = embedding_dim * (image_size // self.downsampling) ** 2
        widths = (2 * latent_dim, 4 * latent_dim, latent_dim * candidates)
        self.encoder = Encoder(channels, hidden, embedding_dim, spike_steps)
        self.to_latent = SpikingLinears(features, latent_dim, spike_steps=spike_steps)
        self.posterior = SpikingLinears(2 * latent_dim, *widths, spike_steps=spike_steps)
        self.prior = SpikingLinears(latent_dim, *widths, spike_steps=spike_steps)
        self.from_latent = SpikingLinears(latent_dim, features, spike_steps=spike_steps)
        self.decoder = Decoder(channels, hidden, embedding_dim, spike_steps)

    @staticmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, int]:
        """All options but `spike_steps`, read off a model's weights. KeyError if they are of something else."""
        hidden, channels = weights["encoder.snn_convs.0.weight"].shape[:2]
        embedding_dim = len(weights["encoder.snn_convs.6.weight"])
        latent_dim, features = weights["to_latent.0.weight"].shape[:2]
        return dict(
            channels=channels,
            image_size=FSVAE.downsampling * math.isqrt(features // embedding_dim),
            latent_dim=latent_dim,
            candidates=len(weights["prior.6.weight"]) // latent_dim,
            hidden=hidden,
            embedding_dim=embedding_dim,
        )

    def noise(self, seed: int, samples: Iterable[int]) -> Tensor:
        """The picks of the samples with these numbers, int64 `[S,N,L]` in 0..k-1; each has its own generator."""
        shape = (self.spike_steps, self.latent_dim)
        picks = [np.random.default_rng((seed, i)).integers(self.candidates, size=shape) for i in samples]
        return torch.from_numpy(np.stack(picks, 1))

    def encode(self, images: Tensor, picks: Tensor) -> Tensor:
        """Images `[N,C,H,W]` in [0,1] to latents `[S,N,L]` drawn from the posterior with `picks [S,N,L]`.

        Without gradient; `forward` is for training.
        """
        return self._draw(self.posterior, picks, self._features(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[S,N,L]` to images `[N,C,H,W]` in [0,1]."""
        return (self._pixels(latents) + 0.5).clamp(0, 1)

    def sample(self, picks: Tensor) -> Tensor:
        """Latents `[S,N,L]` drawn from the prior, each step's given the steps before, with `picks [S,N,L]`."""
        return self._draw(self.prior, picks)

    def forward(self, images: Tensor, generator: torch.Generator | None = None, p: float = 0.0) -> FSVAEOutput:
        """Reconstruct images `[N,C,H,W]` in [0,1] from latents drawn with `generator`.

        The loss is the plain mean squared error, not divided by the pixels' variance, as in the release, and the MMD
        of FSVAE: the squared difference of the potentials that the mean spikes of posterior and prior evoke.
        `p`, which training raises from 0.1 to 0.3, is the probability of scheduled sampling, see `_prior_inputs`.

        As in FSVAE, latents are drawn first, step by step; given them, all steps run at once, with gradient.
        """
        shape = (self.spike_steps, len(images), self.latent_dim)
        picks = torch.randint(self.candidates, shape, generator=generator, device=images.device)
        x = self._features(images)
        drawn = self._draw(self.posterior, picks, x.detach())
        before = torch.cat((torch.zeros_like(drawn[:1]), drawn[:-1]))
        posterior = self._split(self.posterior(torch.cat((x, before), 2)))
        latents = choose(posterior, picks)
        prior = self._split(self.prior(self._prior_inputs(latents.detach(), p, generator)))
        mmd = F.mse_loss(postsynaptic_potential(posterior.mean(3)), postsynaptic_potential(prior.mean(3)))
        y = self._pixels(latents)
        mse = F.mse_loss(y, images - 0.5)
        return FSVAEOutput((y + 0.5).clamp(0, 1), mse + mmd, mmd, mse)

    def _features(self, images: Tensor) -> Tensor:
        """Images in [0,1] to the spikes x `[S,N,L]` that the posterior is given."""
        return self.to_latent(self.encoder(images - 0.5).flatten(2))

    def _split(self, spikes: Tensor) -> Tensor:
        """Output of posterior or prior `[...,L*k]` as the k candidates of each latent `[...,L,k]`."""
        return spikes.unflatten(-1, (self.latent_dim, self.candidates))

    def _draw(self, network: SpikingLinears, picks: Tensor, features: Tensor | None = None) -> Tensor:
        """Latents `[S,N,L]`, each step's from `network` given those of the step before, beside `features [S,N,L]`."""
        step = network.from_rest()
        z = torch.zeros(picks.shape[1:], dtype=network[0].weight.dtype, device=picks.device)
        latents = []
        with full_precision(z):
            for t, pick in enumerate(picks):
                z = choose(self._split(step(z if features is None else torch.cat((features[t], z), 1))), pick)
                latents.append(z)
        return torch.stack(latents)

    def _prior_inputs(self, latents: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
        """What the prior is given at each step, `[S,N,L]`: the posterior's `latents` of the step before, or its own.

        Scheduled sampling: with probability `p` for each image and step from the sixth on, the prior's own z_t is what
        it is given next, as it will be in `sample`: what most candidates say; a little noise breaks ties.
        """
        step, z = self.prior.from_rest(), torch.zeros_like(latents[0])
        like = {"generator": generator, "dtype": z.dtype, "device": z.device}
        inputs = []
        with full_precision(z):
            for t, latent in enumerate(latents):
                inputs.append(z)
                mean = self._split(step(z)).mean(2) + TIE_NOISE * torch.randn(z.shape, **like)
                own = (t >= FIRST_OWN_STEP) & (torch.rand(len(z), 1, **like) < p)
                z = torch.where(own, (mean > 0.5).to(z.dtype), latent)
        return torch.stack(inputs)

    def _pixels(self, latents: Tensor) -> Tensor:
        """Latents `[S,N,L]` to pixels `[N,C,H,W]` in (-1,1)."""
        side = self.image_size // self.downsampling
        return self.decoder(self.from_latent(latents).unflatten(2, (-1, side, side)))
