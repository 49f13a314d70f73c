"""Absorbing-state discrete diffusion over grids of codes (arXiv 2308.10187; D3PM, arXiv 2107.03006).

A token is masked by timestep t with probability t/T and stays masked; a denoiser learns to predict masked tokens. This
file knows no network and no image: a denoiser is passed in.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("reweighted_elbo", "elbo", "cross_entropy", "spread_cross_entropy")
REVEAL_ORDERS = {"random": 1, "spread": 2}
"""Orders in which a sample's tokens are revealed, and the pace of each; see `AbsorbingDiffusion.noise`."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Tokens `[N,h,w]` and timesteps `[N]` to logits `[N,K,h,w]`."""

LocalDenoiser = Callable[..., Tensor]
"""Tokens `[N,h,w]`, timesteps `[N]` and wanted positions, bool `[N,h,w]` with P set, to their logits `[P,K]`.

Where there is one, the condition `[N]` follows.
"""


class SamplingNoise(NamedTuple):
    """All that is random in drawing N samples: when each token is revealed, and the number that picks its code.

    `reveal_times` int64 `[N,h,w]` in 1..T, `uniforms` float64 `[N,h,w]` in [0,1).
    """

    reveal_times: Tensor
    uniforms: Tensor


class AbsorbingDiffusion:
    """Forward process, losses and sampler for codes 0..codebook_size-1; the mask token is `codebook_size`."""

    def __init__(self, codebook_size: int, num_timesteps: int):
        self.mask_token = codebook_size
        self.num_timesteps = num_timesteps

    def q_sample(self, codes: Tensor, t: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mask each token of `codes [N,h,w]` with probability `t/T`, `t [N]`; returns tokens and mask `[N,h,w]`."""
        uniforms = torch.rand(codes.shape, generator=generator, device=codes.device)
        mask = uniforms < (t / self.num_timesteps).view(-1, 1, 1)
        return torch.where(mask, self.mask_token, codes), mask

    def q_spread(self, codes: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mask `codes [N,h,w]` as samples in the spread order are at a moment uniform on their passes.

        Returns tokens and mask `[N,h,w]`, and the timesteps `[N]` in 1..T.
        """
        count, height, width = codes.shape
        how = {"generator": generator, "device": codes.device}
        order = spread_order(torch.rand(count, 2, height, width, **how))
        gone = torch.rand(count, **how) ** REVEAL_ORDERS["spread"]
        revealed = (self.num_timesteps * gone).long()
        t, mask = self.num_timesteps - revealed, order >= revealed.view(-1, 1, 1)
        return torch.where(mask, self.mask_token, codes), mask, t

    def cross_entropy(self, logits: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy in nats summed over the masked tokens of each image: `[N]`."""
        nll = F.cross_entropy(logits, codes, reduction="none")  # [N,h,w]
        return (nll * mask).flatten(1).sum(1)

    def weighted_loss(self, cross_entropy: Tensor, t: Tensor, kind: str = "reweighted_elbo") -> Tensor:
        """Batch mean of the loss in bits per token, from `cross_entropy [N]` and `t [N]`.

        "elbo": `CE / t * T / (T ln 2)`. "reweighted_elbo": `(1 - t/T) CE / (T ln 2)`, whose weight is 0 at t = T, so
        the very first prediction of sampling is never trained directly; this is the release's default and kept.
        "cross_entropy" and "spread_cross_entropy": `CE / (T ln 2)`, every masked token weighs the same, at t = T too.
        """
        total = self.num_timesteps
        weighted = {
            "reweighted_elbo": (1 - t / total) * cross_entropy,
            "elbo": cross_entropy / t * total,
            "cross_entropy": cross_entropy,
            "spread_cross_entropy": cross_entropy,
        }
        return weighted[kind].mean() / (math.log(2) * total)

    def loss(
        self,
        denoiser: Denoiser,
        codes: Tensor,
        generator: torch.Generator,
        kind: str = "reweighted_elbo",
        part: slice = slice(None),
    ) -> Tensor:
        """Training loss for `codes [N,h,w]`, t drawn uniformly from 1..T for each image.

        "spread_cross_entropy" has the masks of `q_spread` instead: those that sampling in this order will meet. With
        `part`, the loss of these images alone, whose noise is what they have in the whole batch.
        """
        if kind == "spread_cross_entropy":
            tokens, mask, t = self.q_spread(codes, generator)
        else:
            t = torch.randint(1, self.num_timesteps + 1, (len(codes),), generator=generator, device=codes.device)
            tokens, mask = self.q_sample(codes, t, generator)
        codes, t, tokens, mask = (values[part] for values in (codes, t, tokens, mask))
        logits = denoiser(tokens, t)
        return self.weighted_loss(self.cross_entropy(logits, codes, mask), t, kind)

    def noise(
        self,
        seed: int,
        samples: Iterable[int],
        grid: tuple[int, int],
        sample_steps: int | None = None,
        reveal_order: str = "random",
    ) -> SamplingNoise:
        """The noise of the samples with these numbers; sample i has the same whatever it is drawn together with.

        Tokens are revealed at `sample_steps` (T) of the timesteps. "random": the process's own times, independent and
        uniform on 1..T. "spread": in `spread_order`, and slowly at first; with fewer timesteps than tokens, those that
        are revealed together then depend less on each other.
        """
        generators = [np.random.default_rng((seed, i)) for i in samples]
        if reveal_order == "random":
            times = torch.from_numpy(np.stack([g.integers(1, self.num_timesteps + 1, grid) for g in generators]))
        else:
            keys = torch.from_numpy(np.stack([g.random((2, *grid)) for g in generators]))
            times = self.num_timesteps - spread_order(keys)
        uniforms = torch.from_numpy(np.stack([g.random(grid) for g in generators]))
        return SamplingNoise(self.reveal_schedule(times, sample_steps, REVEAL_ORDERS[reveal_order]), uniforms)

    def reveal_schedule(self, reveal_times: Tensor, sample_steps: int | None = None, pace: int = 1) -> Tensor:
        """Reveal times rounded up to the next of `sample_steps` timesteps, T at the most.

        At the end of step j of J, `(j/J)^pace` of the time from T to 0 has gone by, but a timestep at least for each
        step: with pace 1 they are spread evenly over 1..T. Raises ValueError for a number of steps not in 1..T.
        """
        total = self.num_timesteps
        steps = total if sample_steps is None else sample_steps
        if not 1 <= steps <= total:
            raise ValueError(f"sample_steps must lie in 1..{total}, got {steps}")
        gone = [max(j, total * j**pace // steps**pace) for j in range(steps)]
        timesteps = total - torch.tensor(gone[::-1], device=reveal_times.device)
        return timesteps[torch.searchsorted(timesteps, reveal_times)]

    def timesteps(self, sample_steps: int | None = None, reveal_order: str = "random") -> list[int]:
        """The timesteps at which tokens can be revealed, from the first, T or less, to the last; see `noise`."""
        all_times = torch.arange(1, self.num_timesteps + 1)
        times = self.reveal_schedule(all_times, sample_steps, REVEAL_ORDERS[reveal_order])
        return times.unique().flip(0).tolist()

    @torch.no_grad()
    def sample(
        self,
        denoiser: LocalDenoiser,
        noise: SamplingNoise,
        temperature: float = 1.0,
        given: Tensor | None = None,
        final_temperature: float | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Draw codes int64 `[N,h,w]`; those that are not the mask token in `given [N,h,w]` stay as they are.

        `condition [N]` is what else the denoiser is told of each sample.

        The temperature changes evenly from `temperature` at t = T to `final_temperature` (the same) at t = 0.

        In the random order a token that is still masked is revealed with probability 1/t at t = T..1, hence at a time
        uniform on 1..T. A timestep that reveals nothing in an image changes nothing, so each image goes straight to its
        next reveal: images of one batch are at different t, and only logits of revealed tokens are asked for.
        """
        times = noise.reveal_times
        temperatures = self._temperatures(times, temperature, final_temperature)
        tokens = torch.full_like(times, self.mask_token) if given is None else given.clone()
        active = torch.arange(len(tokens), device=tokens.device)
        conditions = () if condition is None else (condition,)
        while len(active):
            hidden = tokens[active] == self.mask_token
            t = torch.where(hidden, times[active], 0).flatten(1).amax(1)
            active, t = active[t > 0], t[t > 0]
            where = (tokens[active] == self.mask_token) & (times[active] == t.view(-1, 1, 1))
            if len(active):
                logits = denoiser(tokens[active], t, where, *(each[active] for each in conditions))
                revealed = tokens[active]
                revealed[where] = draw(logits, noise.uniforms[active][where], temperatures[active][where])
                tokens[active] = revealed
        return tokens

    @torch.no_grad()
    def sample_every_timestep(
        self,
        denoiser: Denoiser,
        noise: SamplingNoise,
        temperature: float = 1.0,
        final_temperature: float | None = None,
    ) -> Tensor:
        """The sampler written out: all T timesteps, the whole grid at each. Same codes as `sample`, for comparison."""
        temperatures = self._temperatures(noise.reveal_times, temperature, final_temperature)
        tokens = torch.full_like(noise.reveal_times, self.mask_token)
        for t in range(self.num_timesteps, 0, -1):
            logits = denoiser(tokens, torch.full((len(tokens),), t, device=tokens.device))
            where = noise.reveal_times == t
            tokens[where] = draw(logits.permute(0, 2, 3, 1)[where], noise.uniforms[where], temperatures[where])
        return tokens

    def _temperatures(self, times: Tensor, first: float, last: float | None) -> Tensor:
        """Float64, of the shape of `times`."""
        change = 0.0 if last is None else last - first
        return first + change * (1 - times.double() / self.num_timesteps)

    def trajectory(self, codes: Tensor, noise: SamplingNoise, t: int) -> Tensor:
        """Tokens `[N,h,w]` as they were after timestep t of the run that drew `codes` from `noise` (t = T+1: none)."""
        return torch.where(noise.reveal_times >= t, codes, self.mask_token)


def spread_places(height: int, width: int) -> Tensor:
    """Numbers from 0, int64 `[h,w]`: cells that are half a height, half a width or both apart have the same one."""
    rows, columns = -(-height // 2), -(-width // 2)
    return torch.arange(rows * columns).view(rows, columns).repeat(2, 2)[:height, :width]


def spread_order(keys: Tensor) -> Tensor:
    """Orders of the cells of N grids, int64 `[N,h,w]` from 0, in which cells of one place follow one another.

    `keys [N,2,h,w]` are random numbers in [0,1): of the places, by which these are sorted, and of each one's cells.
    """
    turns = keys[:, 0].flatten(1).argsort(1).argsort(1)[:, spread_places(*keys.shape[2:]).to(keys.device)]
    return (turns + keys[:, 1]).flatten(1).argsort(1).argsort(1).view_as(turns)


def draw(logits: Tensor, uniforms: Tensor, temperatures: Tensor) -> Tensor:
    """Codes int64 `[P]` from `softmax(logits / temperatures)` of logits `[P,K]`, by inverting its sum at `uniforms`."""
    probabilities = torch.softmax(logits.double() / temperatures[:, None], 1)
    return (probabilities.cumsum(1) < uniforms[:, None]).sum(1).clamp_max(logits.shape[1] - 1)
