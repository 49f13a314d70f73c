"""Absorbing-state discrete diffusion over grids of codes (arXiv 2308.10187; D3PM, arXiv 2107.03006).

A token is masked by timestep t with probability t/T and then stays masked; a denoiser learns to predict masked tokens.
Nothing here depends on networks, images or processes: a denoiser is a function passed in as an argument, and all noise
is drawn beforehand, separately for each example.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from parts import REVEAL_ORDERS, find_part

Predict = Callable[[Tensor, Tensor], Tensor]
"""Tokens `[N,h,w]` and timesteps `[N]` to logits `[N,K,h,w]`."""

PredictAt = Callable[..., Tensor]
"""Tokens `[N,h,w]`, timesteps `[N]` and positions, bool `[N,h,w]` with P set, to the logits there `[P,K]`.

If there is a condition `[N,...]`, it is the fourth argument.
"""


class TrainingNoise(NamedTuple):
    """All random quantities in the loss of N examples: timesteps `t` int64 `[N]` in 1..T, and which tokens are masked.

    `mask` is bool `[N,h,w]`.
    """

    t: Tensor
    mask: Tensor


class SamplingNoise(NamedTuple):
    """All random quantities in N samples: when each token is revealed, and the uniform number that determines its code.

    `reveal_times` int64 `[N,h,w]` in 1..T, `uniforms` float64 `[N,h,w]` in [0,1).
    """

    reveal_times: Tensor
    uniforms: Tensor


class RevealOrder(NamedTuple):
    """An order in which tokens are revealed, and how fast.

    `times` draws when each token is revealed, int64 `[N,h,w]` in 1..T, from a generator for each of N samples, the grid
    (h, w) and T. `exponent` is that of the schedule; see `AbsorbingDiffusion.reveal_schedule`.
    """

    times: Callable[[list[np.random.Generator], tuple[int, int], int], Tensor]
    exponent: int


class AbsorbingDiffusion:
    """Forward process, losses and sampler with `num_timesteps` T, for codes 0..K-1; `codebook_size` K is the mask."""

    def __init__(self, codebook_size: int, num_timesteps: int):
        self.mask_token = codebook_size
        self.num_timesteps = num_timesteps

    def training_noise(
        self, count: int, grid: tuple[int, int], generator: torch.Generator, kind: str = "reweighted_elbo"
    ) -> TrainingNoise:
        """The noise of `count` training examples with the given `grid` (h, w), on the device of `generator`.

        Timesteps are uniform on 1..T, and tokens are masked independently with probability t/T. For
        "spread_cross_entropy", tokens are masked as in a sample in the spread order, at a uniformly drawn step.
        """
        if kind == "spread_cross_entropy":
            return self._spread_noise(count, grid, generator)
        device = generator.device
        t = torch.randint(1, self.num_timesteps + 1, (count,), generator=generator, device=device)
        uniforms = torch.rand(count, *grid, generator=generator, device=device)
        return TrainingNoise(t, uniforms < (t / self.num_timesteps).view(-1, 1, 1))

    def _spread_noise(self, count: int, grid: tuple[int, int], generator: torch.Generator) -> TrainingNoise:
        device = generator.device
        order = spread_order(torch.rand(count, 2, *grid, generator=generator, device=device))
        elapsed = torch.rand(count, generator=generator, device=device) ** SPREAD.exponent
        revealed = (self.num_timesteps * elapsed).long()
        return TrainingNoise(self.num_timesteps - revealed, order >= revealed.view(-1, 1, 1))

    def q_sample(self, codes: Tensor, mask: Tensor) -> Tensor:
        """The tokens of `codes [N,h,w]` under a `mask [N,h,w]`: `[N,h,w]`."""
        return torch.where(mask, self.mask_token, codes)

    def cross_entropy(self, logits: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy in nats summed over the masked tokens of each image: `[N]`."""
        nll = F.cross_entropy(logits, codes, reduction="none")  # [N,h,w]
        return (nll * mask).flatten(1).sum(1)

    def weighted_loss(self, cross_entropy: Tensor, t: Tensor, kind: str = "reweighted_elbo") -> Tensor:
        """Batch mean of the loss in bits per token, from `cross_entropy [N]` in nats and timesteps `t [N]`.

        "elbo": `CE / t * T / (T ln 2)`, the evidence lower bound. "reweighted_elbo": `(1 - t/T) CE / (T ln 2)`, the
        release's default; since its weight is 0 at t = T, the first prediction of sampling is never trained directly.
        "cross_entropy" and "spread_cross_entropy": `CE / (T ln 2)`, equal weights for all masked tokens.
        """
        total = self.num_timesteps
        weighted = {
            "reweighted_elbo": (1 - t / total) * cross_entropy,
            "elbo": cross_entropy / t * total,
            "cross_entropy": cross_entropy,
            "spread_cross_entropy": cross_entropy,
        }
        return weighted[kind].mean() / (math.log(2) * total)

    def loss(self, denoiser: Predict, codes: Tensor, noise: TrainingNoise, kind: str = "reweighted_elbo") -> Tensor:
        """Mean training loss of `codes [N,h,w]` in bits per token, given `training_noise` of the same kind."""
        logits = denoiser(self.q_sample(codes, noise.mask), noise.t)
        return self.weighted_loss(self.cross_entropy(logits, codes, noise.mask), noise.t, kind)

    def noise(
        self,
        seed: int,
        samples: Iterable[int],
        grid: tuple[int, int],
        sample_steps: int | None = None,
        reveal_order: str = "random",
    ) -> SamplingNoise:
        """Noise for the samples with these indices on a `grid` (h, w); that of sample i depends only on `seed` and i.

        Tokens are revealed at `sample_steps` of the timesteps, by default at all T. Orders are "random": at independent
        times, uniform on 1..T, as the forward process masks them; and "spread": in `spread_order`, few at first. If
        there are fewer timesteps than tokens, tokens revealed together depend less on each other in the latter. Raises
        ValueError for `sample_steps` outside 1..T.
        """
        generators = [np.random.default_rng((seed, i)) for i in samples]
        order = find_part(REVEAL_ORDERS, reveal_order)
        times = order.times(generators, grid, self.num_timesteps)
        uniforms = torch.from_numpy(np.stack([g.random(grid) for g in generators]))
        return SamplingNoise(self.reveal_schedule(times, sample_steps, order.exponent), uniforms)

    def reveal_schedule(self, reveal_times: Tensor, sample_steps: int | None = None, exponent: int = 1) -> Tensor:
        """Reveal times in 1..T, of any shape, rounded up to the next of `sample_steps` timesteps.

        After step j of J, a fraction `(j/J)^exponent` of the time from T to 0 has elapsed, but at least one timestep in
        each step; with exponent 1 the steps are evenly spaced. Raises ValueError for `sample_steps` outside 1..T.
        """
        total = self.num_timesteps
        steps = total if sample_steps is None else sample_steps
        if not 1 <= steps <= total:
            raise ValueError(f"sample_steps must lie in 1..{total}, got {steps}")
        elapsed = [max(j, total * j**exponent // steps**exponent) for j in range(steps)]
        timesteps = total - torch.tensor(elapsed[::-1], device=reveal_times.device)
        return timesteps[torch.searchsorted(timesteps, reveal_times)]

    def timesteps(self, sample_steps: int | None = None, reveal_order: str = "random") -> list[int]:
        """The timesteps at which tokens can be revealed, in descending order; see `noise`."""
        all_times = torch.arange(1, self.num_timesteps + 1)
        times = self.reveal_schedule(all_times, sample_steps, find_part(REVEAL_ORDERS, reveal_order).exponent)
        return times.unique().flip(0).tolist()

    @torch.no_grad()
    def sample(
        self,
        denoiser: PredictAt,
        noise: SamplingNoise,
        temperature: float = 1.0,
        given: Tensor | None = None,
        final_temperature: float | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Draw codes int64 `[N,h,w]`; tokens of `given [N,h,w]` that are not masked are kept.

        The temperature changes linearly from `temperature` at t = T to `final_temperature` at t = 0, or is constant
        if that is None. `condition [N,...]` is passed on to the denoiser.

        In the reverse process a masked token is revealed with probability 1/t at each t = T..1, hence at a time uniform
        on 1..T. A timestep that reveals nothing in an image changes nothing and is skipped: images of one batch are at
        different t, and the denoiser is asked for the logits of revealed tokens only.
        """
        times = noise.reveal_times
        temperatures = self._temperatures(times, temperature, final_temperature)
        tokens = torch.full_like(times, self.mask_token) if given is None else given.clone()
        active = torch.arange(len(tokens), device=tokens.device)
        conditions = () if condition is None else (condition,)
        while len(active):
            masked = tokens[active] == self.mask_token
            t = torch.where(masked, times[active], 0).flatten(1).amax(1)
            active, t = active[t > 0], t[t > 0]
            where = (tokens[active] == self.mask_token) & (times[active] == t.view(-1, 1, 1))
            if len(active):
                logits = denoiser(tokens[active], t, where, *(each[active] for each in conditions))
                revealed = tokens[active]
                revealed[where] = codes_from_logits(logits, noise.uniforms[active][where], temperatures[active][where])
                tokens[active] = revealed
        return tokens

    def _temperatures(self, times: Tensor, first: float, last: float | None) -> Tensor:
        """Temperatures at `times`, float64 of the same shape."""
        change = 0.0 if last is None else last - first
        return first + change * (1 - times.double() / self.num_timesteps)

    def trajectory(self, codes: Tensor, noise: SamplingNoise, t: int) -> Tensor:
        """Tokens `[N,h,w]` after timestep t of the sampling that gave `codes` from `noise`; all masked for t = T+1."""
        return torch.where(noise.reveal_times >= t, codes, self.mask_token)


def spread_groups(height: int, width: int) -> Tensor:
    """Groups of distant cells, int64 `[h,w]` from 0: cells half a height, half a width or both apart share a group."""
    rows, columns = -(-height // 2), -(-width // 2)
    return torch.arange(rows * columns).view(rows, columns).repeat(2, 2)[:height, :width]


def spread_order(keys: Tensor) -> Tensor:
    """Random orders of the cells of N grids, int64 ranks `[N,h,w]` from 0, in which cells of a group are consecutive.

    `keys [N,2,h,w]` in [0,1) are random: the first sort the groups (see `spread_groups`), the second the cells of each.
    """
    turns = keys[:, 0].flatten(1).argsort(1).argsort(1)[:, spread_groups(*keys.shape[2:]).to(keys.device)]
    return (turns + keys[:, 1]).flatten(1).argsort(1).argsort(1).view_as(turns)


def _random_times(generators: list[np.random.Generator], grid: tuple[int, int], total: int) -> Tensor:
    return torch.from_numpy(np.stack([g.integers(1, total + 1, grid) for g in generators]))


def _spread_times(generators: list[np.random.Generator], grid: tuple[int, int], total: int) -> Tensor:
    return total - spread_order(torch.from_numpy(np.stack([g.random((2, *grid)) for g in generators])))


RANDOM = RevealOrder(_random_times, exponent=1)
SPREAD = RevealOrder(_spread_times, exponent=2)


def codes_from_logits(logits: Tensor, uniforms: Tensor, temperatures: Tensor) -> Tensor:
    """Codes int64 `[P]` drawn from `softmax(logits / temperatures)` by inverting its cumulative sum at `uniforms`.

    `logits` are `[P,K]`, `uniforms` in [0,1) and `temperatures` `[P]`.
    """
    probabilities = torch.softmax(logits.double() / temperatures[:, None], 1)
    return (probabilities.cumsum(1) < uniforms[:, None]).sum(1).clamp_max(logits.shape[1] - 1)
