"""What a trained model is to the evaluation: something that reconstructs images, draws new ones, and costs energy."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion.absorbing import AbsorbingDiffusion, SamplingNoise
from metrics.energy import Operations, count, firing_rates
from models import FSVAE
from models.spiking import set_plain
from models.vq_autoencoder import VQAutoencoder
from pipeline.runtime.device import Machine
from pipeline.sampling.batches import decode_codes, draw_codes, encode_images, in_batches
from pipeline.sampling.grids import to_float, to_uint8, trajectory_picture

TRAJECTORY_MOMENTS = 12


@dataclass(frozen=True)
class Cost:
    """Synaptic operations of each part of a model and of a whole sample, per image, and firing rates of its layers."""

    operations: dict[str, Operations]
    firing_rates: dict[str, float]


class Generator(Protocol):
    """The two kinds of model below. Images are uint8 `[N,C,H,W]`; sample i is the same whatever it is drawn with."""

    @property
    def settings(self) -> dict[str, Any]:
        """What samples depend on besides the weights and the temperature, as JSON can hold it."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images through the autoencoder."""

    def draw(self, samples: range) -> Tensor:
        """The samples with these numbers."""

    def cost(self, images: Tensor) -> Cost:
        """What a few real images and their samples cost."""


@contextmanager
def literally(model: nn.Module) -> Iterator[None]:
    """Context in which every layer of `model` runs as a module, at each spike step, in evaluation mode."""
    set_plain(model.eval(), True)
    try:
        yield
    finally:
        set_plain(model, False)


@dataclass(frozen=True)
class CodeDiffusion:
    """A vector-quantised autoencoder, and a denoiser of its codes on a `grid` (h, w); without, it only reconstructs."""

    autoencoder: VQAutoencoder
    denoiser: nn.Module | None
    grid: tuple[int, int]
    machine: Machine
    seed: int
    temperature: float = 1.0
    final_temperature: float | None = None
    sample_steps: int | None = None
    reveal_order: str = "random"
    batch_size: int = 64

    @property
    def diffusion(self) -> AbsorbingDiffusion:
        """Of as many timesteps as an image has codes."""
        return AbsorbingDiffusion(self.autoencoder.codebook_size, math.prod(self.grid))

    @property
    def settings(self) -> dict[str, Any]:
        """See Generator."""
        spike_steps = [self.autoencoder.spike_steps, self.denoiser.spike_steps]
        return {
            "seed": self.seed,
            "grid": list(self.grid),
            "sample_steps": self.sample_steps,
            "reveal_order": self.reveal_order,
            "spike_steps": spike_steps,
            "spike_generator": getattr(self.autoencoder.vq_layer, "spike_generator", None),
            "precision": self.machine.precision,
        }

    def conditions(self, codes: Tensor) -> list[Tensor]:
        """What the denoiser is told of images with these `codes [N,h,w]`: nothing, or prototypes' numbers `[N]`."""
        prototypes = self.denoiser.prototypes
        return [prototypes.nearest(codes, self.autoencoder.vq_layer)] if prototypes else []

    def encode(self, images: Tensor) -> Tensor:
        """Codes `[N,h,w]`."""
        return encode_images(self.autoencoder, images, self.machine, self.batch_size)

    def reconstruct(self, images: Tensor) -> Tensor:
        """See Generator."""
        return decode_codes(self.autoencoder, self.encode(images), self.machine, self.batch_size)

    def draw(self, samples: range) -> Tensor:
        """See Generator."""
        return decode_codes(self.autoencoder, self._draw_codes(samples)[0], self.machine, self.batch_size)

    def trajectory(self) -> Tensor:
        """How sample 0 came about, a picture uint8 `[3,H,W]`."""
        diffusion, (codes, noise) = self.diffusion, self._draw_codes(range(1))
        moments = torch.linspace(diffusion.num_timesteps + 1, 1, TRAJECTORY_MOMENTS).round().int().tolist()
        tokens = torch.cat([diffusion.trajectory(codes, noise, t) for t in moments])
        return trajectory_picture(tokens, decode_codes(self.autoencoder, codes, self.machine)[0], diffusion.mask_token)

    def inpaint(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Images with the pixels `hidden`, bool `[H,W]`, filled in; image i by the noise of sample i.

        The codes that are kept are those whose encoder sees no hidden pixel, so nothing of what was there is known.
        """
        diffusion = self.diffusion
        unknown = self.autoencoder.sees(hidden)
        tokens = torch.where(unknown, diffusion.mask_token, self.encode(images).long())
        codes, _ = self._draw_codes(range(len(images)), tokens)
        return torch.where(hidden, decode_codes(self.autoencoder, codes, self.machine, self.batch_size), images)

    def _draw_codes(self, samples: range, given: Tensor | None = None) -> tuple[Tensor, SamplingNoise]:
        noise = self.diffusion.noise(self.seed, samples, self.grid, self.sample_steps, self.reveal_order)
        prototypes = self.denoiser.prototypes if given is None else None  # of what is given there is another
        condition = prototypes.draw(self.seed, samples) if prototypes else None
        how = {"temperature": self.temperature, "final_temperature": self.final_temperature}
        how |= {"given": given, "condition": condition}
        return draw_codes(self.denoiser, self.diffusion, noise, self.machine, self.batch_size, **how), noise

    def cost(self, images: Tensor) -> Cost:
        """The denoiser sees the codes of `images`, masked at timesteps drawn from the seed; a sample is T passes.

        It is told their prototypes, if it has some, at each pass.
        """
        model, diffusion, device = self.autoencoder, self.diffusion, self.machine.device
        pixels, codes = to_float(images.to(device)), self.encode(images).to(device).long()
        generator = torch.Generator(device).manual_seed(self.seed)
        t = torch.randint(1, diffusion.num_timesteps + 1, (len(images),), generator=generator, device=device)
        tokens, _ = diffusion.q_sample(codes, t, generator)
        conditions = self.conditions(codes)
        parts = {
            "encode": (model, lambda: model.encode(pixels)),
            "decode": (model, lambda: model.decode(codes)),
            "denoiser_pass": (self.denoiser, lambda: self.denoiser(tokens, t, *conditions)),
        }
        cost = _cost(parts, len(images))
        passes = self.sample_steps or diffusion.num_timesteps
        sample = passes * cost.operations["denoiser_pass"] + cost.operations["decode"]
        return Cost({**cost.operations, "sample": sample}, cost.firing_rates)


@dataclass(frozen=True)
class PriorSampling:
    """A variational autoencoder that draws its latents from a prior of its own."""

    autoencoder: FSVAE
    machine: Machine
    seed: int
    batch_size: int = 64

    @property
    def settings(self) -> dict[str, Any]:
        """See Generator."""
        return {"seed": self.seed, "spike_steps": self.autoencoder.spike_steps, "precision": self.machine.precision}

    def reconstruct(self, images: Tensor) -> Tensor:
        """See Generator; latents are drawn from the posterior."""
        model = self.autoencoder

        def pictures(part: Tensor, picks: Tensor) -> Tensor:
            return model.decode(model.encode(to_float(images[part].to(self.machine.device)), picks))

        return self._by_sample(range(len(images)), pictures, "reconstructing")

    def draw(self, samples: range) -> Tensor:
        """See Generator."""
        model = self.autoencoder
        return self._by_sample(samples, lambda _, picks: model.decode(model.sample(picks)), "sampling")

    @torch.no_grad()
    def _by_sample(self, samples: range, pictures: Callable[[Tensor, Tensor], Tensor], title: str) -> Tensor:
        self.autoencoder.eval()

        def compute(part: Tensor) -> Tensor:
            picks = self.autoencoder.noise(self.seed, part.tolist()).to(self.machine.device)
            return to_uint8(pictures(part, picks))

        with self.machine.autocast():
            return in_batches(torch.tensor(samples), self.batch_size, title, compute)

    def cost(self, images: Tensor) -> Cost:
        """See Generator; a sample is one run of the prior and one of the decoder."""
        model, pixels = self.autoencoder, to_float(images.to(self.machine.device))
        picks = model.noise(self.seed, range(len(images))).to(self.machine.device)
        with torch.no_grad():
            latents = model.eval().sample(picks)
        parts = {
            "encode": (model, lambda: model.encode(pixels, picks)),
            "decode": (model, lambda: model.decode(latents)),
            "sample": (model, lambda: model.decode(model.sample(picks))),
        }
        return _cost(parts, len(images))


def _cost(parts: dict[str, tuple[nn.Module, Callable[[], Any]]], images: int) -> Cost:
    """Counts each call on so many images; float32, no savings."""
    operations, rates = {}, {}
    for name, (model, call) in parts.items():
        with literally(model):
            operations[name] = count(model, call, images, model.spike_steps)
            rates |= {f"{name}: {layer}": rate for layer, rate in firing_rates(model, call).items()}
    return Cost(operations, rates)
