"""FSVAE, a fully spiking variational autoencoder (arXiv 2110.00375), a baseline of arXiv 2308.10187.

Its latents are spikes. Those of spike step t follow a Bernoulli distribution conditioned on the previous steps: a
spiking network represents its probability by k binary outputs, one of which is picked at random as the sample.

Unlike in FSVAE, the linear layers have no batch norm, as in the release of arXiv 2308.10187: a spike step then does not
depend on statistics of later ones, so that latents in training and in sampling have the same distribution. Initially
no neuron of these layers fires. In a trial on Fashion-MNIST (batches of 32, hidden_channels = 8), latents fired after
100 training steps, and the prior, whose first input has no spikes, after 900. With batch norm, it fires earlier, but
the reconstruction error at step 1,000 is the same.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.neurons import LIF, FromRest, Neuron
from models.spiking import full_precision, postsynaptic_potential
from models.vq_svae import Decoder, Encoder

FIRST_OWN_STEP = 5
TIE_NOISE = 1e-3


class FSVAEOutput(NamedTuple):
    """Reconstructions `images [N,C,H,W]` in [0,1], and three scalars: the training `loss = mse + mmd` and its terms.

    `mse` is the reconstruction error before clipping.
    """

    images: Tensor
    loss: Tensor
    mmd: Tensor
    mse: Tensor


class BernoulliNetwork(nn.Module):
    """Three linear layers, each followed by neurons: at each spike step, k binary candidates for each of L latents."""

    def __init__(self, inputs: int, latent_dim: int, candidates: int, neuron: Neuron = LIF):
        super().__init__()
        widths = (inputs, 2 * latent_dim, 4 * latent_dim, latent_dim * candidates)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.neurons = nn.ModuleList(neuron() for _ in self.layers)
        self.latent_dim = latent_dim

    def from_rest(self) -> Callable[[Tensor], Tensor]:
        """A function that computes one spike step per call: inputs `[N,inputs]` to candidates `[N,L,k]`.

        Between calls it keeps the state of the neurons.
        """
        neurons = [cast(FromRest, neuron) for neuron in self.neurons]
        states = [neuron.rest() for neuron in neurons]

        def step(x: Tensor) -> Tensor:
            for i, (layer, neuron) in enumerate(zip(self.layers, neurons, strict=True)):
                x, states[i] = neuron.step(layer(x), states[i])
            return x.unflatten(1, (self.latent_dim, -1))

        return step


def choose(candidates: Tensor, picks: Tensor) -> Tensor:
    """The `candidates [N,L,k]` at the indices `picks [N,L]`: `[N,L]`; only these receive a gradient."""
    return candidates.gather(2, picks[..., None])[..., 0]


class FSVAE(nn.Module):
    """Images to spiking latents and back, and a spiking prior over the latents.

    Args:
        channels: channels of the images.
        image_size: side of the square images, a multiple of 4. Raises ValueError if it is not.
        latent_dim: number of latents L.
        candidates: binary outputs k that represent a latent's probability.
        spike_steps: S.
        hidden_channels: channels of the first hidden layer; the second has twice as many.
        embedding_dim: channels of the encoder's output.
        neuron: makes the neurons of a layer.
    """

    downsampling = 4

    def __init__(
        self,
        channels: int = 1,
        image_size: int = 28,
        latent_dim: int = 56,
        candidates: int = 20,
        spike_steps: int = 16,
        hidden_channels: int = 32,
        embedding_dim: int = 16,
        neuron: Neuron = LIF,
    ):
        super().__init__()
        if image_size % self.downsampling:
            raise ValueError(f"image_size must be a multiple of {self.downsampling}, got {image_size}")
        side = image_size // self.downsampling
        features = embedding_dim * side**2
        self.channels, self.spike_steps = channels, spike_steps
        self.latent_dim, self.candidates = latent_dim, candidates
        self.encoder = Encoder(channels, hidden_channels, embedding_dim, spike_steps, neuron=neuron)
        self.to_latent = nn.Sequential(nn.Linear(features, latent_dim), neuron())
        self.posterior = BernoulliNetwork(2 * latent_dim, latent_dim, candidates, neuron)
        self.prior = BernoulliNetwork(latent_dim, latent_dim, candidates, neuron)
        self.from_latent = nn.Sequential(nn.Linear(latent_dim, features), neuron(), nn.Unflatten(2, (-1, side, side)))
        self.decoder = Decoder(channels, hidden_channels, embedding_dim, spike_steps, neuron=neuron)

    @staticmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, int]:
        """All options but `spike_steps`, inferred from its weights. Raises KeyError for those of another network."""
        hidden, channels = weights["encoder.snn_convs.0.weight"].shape[:2]
        embedding_dim = len(weights["encoder.snn_convs.6.weight"])
        latent_dim, features = weights["to_latent.0.weight"].shape
        return dict(
            channels=channels,
            image_size=FSVAE.downsampling * math.isqrt(features // embedding_dim),
            latent_dim=latent_dim,
            candidates=len(weights["prior.layers.2.weight"]) // latent_dim,
            hidden_channels=hidden,
            embedding_dim=embedding_dim,
        )

    def noise(self, seed: int, samples: Iterable[int]) -> Tensor:
        """Picks int64 `[S,N,L]` in 0..k-1 for these samples; those of sample i depend only on `seed` and i."""
        shape = (self.spike_steps, self.latent_dim)
        picks = [np.random.default_rng((seed, i)).integers(self.candidates, size=shape) for i in samples]
        return torch.from_numpy(np.stack(picks, 1))

    def encode(self, images: Tensor, picks: Tensor) -> Tensor:
        """Images `[N,C,H,W]` in [0,1] to latents `[S,N,L]` drawn from the posterior with `picks [S,N,L]`."""
        return self._draw(self.posterior, picks, self._features(images))[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[S,N,L]` to images `[N,C,H,W]` in [0,1]."""
        return (self._pixels(latents) + 0.5).clamp(0, 1)

    def sample(self, picks: Tensor) -> Tensor:
        """Latents `[S,N,L]` drawn from the prior with `picks [S,N,L]`, one spike step after another."""
        return self._draw(self.prior, picks)[0]

    def forward(self, images: Tensor, generator: torch.Generator | None = None, p: float = 0.0) -> FSVAEOutput:
        """Reconstruct images `[N,C,H,W]` in [0,1] from latents drawn with `generator`.

        The loss is the mean squared error, not divided by the pixels' variance, as in the release, plus FSVAE's MMD:
        the mean squared difference between the postsynaptic potentials of the mean spikes of posterior and prior.
        `p` is the probability of scheduled sampling, see `_prior_means`; training raises it from 0.1 to 0.3.
        """
        shape = (self.spike_steps, len(images), self.latent_dim)
        picks = torch.randint(self.candidates, shape, generator=generator, device=images.device)
        latents, posterior = self._draw(self.posterior, picks, self._features(images))
        prior = self._prior_means(latents.detach(), p, generator)
        mmd = F.mse_loss(postsynaptic_potential(posterior), postsynaptic_potential(prior))
        y = self._pixels(latents)
        mse = F.mse_loss(y, images - 0.5)
        return FSVAEOutput((y + 0.5).clamp(0, 1), mse + mmd, mmd, mse)

    def _features(self, images: Tensor) -> Tensor:
        """Images in [0,1] to the posterior's input spikes x `[S,N,L]`."""
        spikes = self.encoder(images - 0.5).flatten(2)  # [S,N,D,h,w] -> [S,N,D*h*w]
        with full_precision(spikes):
            return self.to_latent(spikes.to(self.to_latent[0].weight.dtype))

    def _draw(self, network: BernoulliNetwork, picks: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents drawn from q(z_t | x_<=t, z_<t), or without `features` x from p(z_t | z_<t), and their mean spikes.

        All are `[S,N,L]`; the means are over the candidates. No gradient passes from a step to the latents of the
        previous one, as in FSVAE.
        """
        step, dtype = network.from_rest(), next(network.parameters()).dtype
        z = torch.zeros(picks.shape[1:], dtype=dtype, device=picks.device)
        latents, means = [], []
        with full_precision(z):
            for t, pick in enumerate(picks):
                candidates = step(z if features is None else torch.cat((features[t], z), 1))
                latents.append(choose(candidates, pick))
                means.append(candidates.mean(2))
                z = latents[-1].detach()
        return torch.stack(latents), torch.stack(means)

    def _prior_means(self, latents: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
        """Mean spikes `[S,N,L]` of the prior given the posterior's `latents [S,N,L]`.

        Scheduled sampling: with probability `p` for each image and step from the sixth on, the prior's next input is
        its own prediction, as in `sample`: the majority of the candidates, with a little noise to break ties.
        """
        step, z = self.prior.from_rest(), torch.zeros_like(latents[0])
        dtype, device = z.dtype, z.device
        means = []
        with full_precision(z):
            for t, latent in enumerate(latents):
                means.append(step(z).mean(2))
                noise = torch.randn(z.shape, generator=generator, dtype=dtype, device=device)
                own = (means[-1].detach() + TIE_NOISE * noise > 0.5).to(dtype)
                draws = torch.rand(len(z), 1, generator=generator, dtype=dtype, device=device)
                chosen = (draws < p) & (t >= FIRST_OWN_STEP)
                z = torch.where(chosen, own, latent)
        return torch.stack(means)

    def _pixels(self, latents: Tensor) -> Tensor:
        """Latents `[S,N,L]` to pixels `[N,C,H,W]` in (-1,1)."""
        with full_precision(latents):
            spikes = self.from_latent(latents)
        return self.decoder(spikes)
