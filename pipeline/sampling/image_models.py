"""Trained models as the evaluation uses them: they reconstruct images, draw new ones, and cost energy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.absorbing import AbsorbingDiffusion, SamplingNoise
from errors import UserError
from models import FSVAE, Denoiser, VQAutoencoder
from models.conditions import NOT_GIVEN
from pipeline.options.sections import ANY
from pipeline.runtime.device import Machine
from pipeline.runtime.processes import is_rank_0
from pipeline.sampling.batches import decode_codes, draw_codes, encode_images, in_batches
from pipeline.sampling.cost import Cost, Parts, count_parts, sums
from pipeline.sampling.grids import trajectory_images
from pipeline.sampling.labels import find_labels
from pipeline.sampling.masks import nearest_visible
from pipeline.sampling.settings import Settings, check_sample_steps
from pixels import to_float, to_uint8
from progress import progress_bar

MOST_MOMENTS = 12  # of a trajectory
TEST_IMAGES = "test images"


class ImageModel(Protocol):
    """Interface of the two models below. Images are uint8 `[N,C,H,W]`; sample i does not depend on its batch."""

    @property
    def record(self) -> dict[str, Any]:
        """What samples depend on besides the weights, as JSON values."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images through the autoencoder."""

    def draw_images(self, samples: range) -> Tensor:
        """The samples with these numbers."""

    def labels_of(self, samples: range) -> Tensor | None:
        """The labels `[N]` that these samples are drawn with; None if it draws without."""

    @property
    def drawn(self) -> str:
        """How it draws, in words."""

    def cost(self, images: Tensor) -> Cost:
        """The cost of a few real images, and of as many samples."""


@dataclass(frozen=True)
class CodeDiffusion:
    """A vector-quantised autoencoder, and a denoiser of its codes on a `grid` (h, w); without, it only reconstructs."""

    autoencoder: VQAutoencoder
    denoiser: Denoiser | None
    grid: tuple[int, int]
    machine: Machine
    seed: int
    settings: Settings
    batch_size: int = 64
    class_names: tuple[str, ...] | None = None  # of all labels, in their order

    @property
    def _denoiser(self) -> Denoiser:
        """The denoiser. Raises ValueError for a model that only reconstructs."""
        if self.denoiser is None:
            raise ValueError("this model has no denoiser: it only reconstructs")
        return self.denoiser

    @property
    def diffusion(self) -> AbsorbingDiffusion:
        """With as many timesteps as an image has codes."""
        return AbsorbingDiffusion(self.autoencoder.codebook_size, math.prod(self.grid))

    @property
    def record(self) -> dict[str, Any]:
        """See ImageModel."""
        return {
            "seed": self.seed,
            "grid": list(self.grid),
            **self.settings.record(self.diffusion.num_timesteps),
            "spike_steps": [self.autoencoder.spike_steps, self._denoiser.spike_steps],
            "spike_generator": getattr(self.autoencoder.vq_layer, "spike_generator", None),
            "precision": self.machine.precision,
        }

    @property
    def has_labels(self) -> bool:
        """Whether a class can be asked for."""
        return self._denoiser.labels is not None

    def asked(self, labels: Sequence[int | str] | None = None, **settings: Any) -> "CodeDiffusion":
        """The same model, set to draw these classes (see `find_labels`) at settings by the names of `Settings`.

        None keeps its own labels; the word "any" alone stands for no class in particular. A temperature that is named
        counts as not chosen, unless it is said. Raises UserError if the model lacks the conditions or the timesteps, or
        has no such class.
        """
        if "temperature" in settings:
            settings = {"temperature_chosen": False, **settings}
        if labels is not None:
            settings["labels"] = self._numbers_of(labels)
        chosen = replace(self.settings, **settings)
        check_sample_steps(chosen.sample_steps, self.diffusion.num_timesteps)
        if chosen.guidance and not self._denoiser.conditions:
            raise UserError("guidance needs a denoiser with a condition, and this one has none: leave it out")
        return replace(self, settings=chosen)

    def _numbers_of(self, labels: Sequence[int | str]) -> tuple[int, ...]:
        """The numbers of classes."""
        if list(labels) == [ANY]:
            return ()
        known = self._denoiser.labels
        if known is None:
            raise UserError(
                "this denoiser is not conditioned on labels: omit them, or train a run with --preset improved"
            )
        return find_labels(labels, known.present, self.class_names)

    def name_of(self, label: int) -> str:
        """Name of a class."""
        return self.class_names[label] if self.class_names else str(label)

    def encode(self, images: Tensor) -> Tensor:
        """Codes `[N,h,w]`."""
        return encode_images(self.autoencoder, images, self.machine, self.batch_size)

    def _decode(self, codes: Tensor) -> Tensor:
        return decode_codes(self.autoencoder, codes, self.machine, self.batch_size)

    def reconstruct(self, images: Tensor) -> Tensor:
        """See ImageModel."""
        return self._decode(self.encode(images))

    def draw_images(self, samples: range) -> Tensor:
        """See ImageModel."""
        return self._decode(self._draw_codes(samples)[0])

    def labels_of(self, samples: range) -> Tensor | None:
        """See ImageModel."""
        condition = self.condition_of(samples) if self._denoiser.labels else None
        return None if condition is None else condition[:, -1]

    @property
    def drawn(self) -> str:
        """See ImageModel."""
        evenly = ["evenly spaced conditions"] if self._denoiser.conditions else []
        return self.settings.in_words(self.name_of, *evenly)

    def trajectory(self) -> Tensor:
        """Trajectory of sample 0, uint8 `[2,L,3,H,W]`: its codes, and the image determined so far, at L moments.

        The first is before the first pass, the last after the last, and no pass is shown twice.
        """
        diffusion, (codes, noise) = self.diffusion, self._draw_codes(range(1))
        passes = [diffusion.num_timesteps + 1, *noise.reveal_times.unique().flip(0).tolist()]
        chosen = torch.linspace(0, len(passes) - 1, min(MOST_MOMENTS, len(passes))).round().int().tolist()
        moments = [passes[number] for number in chosen]
        tokens = torch.cat([diffusion.trajectory(codes, noise, t) for t in moments])
        return trajectory_images(tokens, decode_codes(self.autoencoder, codes, self.machine)[0], diffusion.mask_token)

    def inpaint(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Images with the pixels `hidden`, bool `[H,W]`, inpainted; image i with the noise and the label of sample i.

        The codes of positions with a hidden pixel are drawn, given those of the others. To encode these, hidden pixels
        are replaced by the nearest visible ones, so nothing leaks from the hidden region. The completed images are then
        encoded and decoded once more: at the border, what is drawn is thus decoded next to the image's own pixels.
        """
        seen = self.encode(images[..., *nearest_visible(hidden)]).long()
        a_side = self.autoencoder.codes_a_side
        positions = F.max_pool2d(hidden[None].float(), self.autoencoder.downsampling * a_side)[0] > 0
        drawn_codes = positions.repeat_interleave(a_side, 0).repeat_interleave(a_side, 1)  # [h,w]
        tokens = torch.where(drawn_codes, self.diffusion.mask_token, seen)
        codes, _ = self._draw_codes(range(len(images)), tokens)
        completed = torch.where(hidden, self._decode(codes), images)
        return torch.where(hidden, self.reconstruct(completed), images)

    def _draw_codes(self, samples: range, given: Tensor | None = None) -> tuple[Tensor, SamplingNoise]:
        settings = self.settings
        noise = self.diffusion.noise(self.seed, samples, self.grid, settings.sample_steps, settings.reveal_order)
        condition = self.condition_of(samples) if given is None else self._condition_of_given(samples)
        codes = draw_codes(
            self._denoiser,
            self.diffusion,
            noise,
            settings,
            self.machine,
            self.batch_size,
            given=given,
            condition=condition,
        )
        return codes, noise

    def condition_of(self, samples: range) -> Tensor | None:
        """The conditions `[N,J]` of the samples with these indices; None without any. See `Conditions`."""
        labels = self.settings.labels
        each = [labels[i % len(labels)] for i in samples] if labels else None
        return self._denoiser.conditions.of_samples(self.seed, samples, each)

    def _condition_of_given(self, samples: range) -> Tensor | None:
        """The same where some codes are given: those belong to another prototype, but may have the label."""
        condition = self.condition_of(samples) if self.settings.labels else None
        if condition is not None:
            condition[:, :-1] = NOT_GIVEN
        return condition

    def cost(self, images: Tensor) -> Cost:
        """See ImageModel; a sample is a pass of the denoiser at each timestep of the schedule, and a decoding.

        With guidance there are two passes per timestep, one of them without the last condition. The denoiser's inputs
        are those of the sampler. `denoiser_pass` is the mean over passes.
        """
        model, denoiser, device, samples = self.autoencoder, self._denoiser, self.machine.device, range(len(images))
        pixels, (codes, noise) = to_float(images.to(device)), self._draw_codes(samples)
        codes, passes = codes.to(device), self._passes(codes, noise, samples)

        def run_passes() -> None:
            with progress_bar(len(passes), "counting energy", "passes", shown=is_rank_0()) as bar:
                for inputs in passes:
                    denoiser(*inputs)
                    bar.update()

        parts: Parts = {
            "encode": (model, lambda: model.encode(pixels)),
            "decode": (model, lambda: model.decode(codes)),
            "denoiser_pass": (denoiser, run_passes),
        }
        layers, rates = count_parts(parts, len(images))
        layers["denoiser_pass"] = {name: 1 / len(passes) * each for name, each in layers["denoiser_pass"].items()}
        operations = sums(layers)
        operations["sample"] = len(passes) * operations["denoiser_pass"] + operations["decode"]
        at_each = "each on what the sampler has at its timestep, two at each timestep with guidance"
        protocols = {
            "encode": TEST_IMAGES,
            "decode": "codes of samples",
            "denoiser_pass": f"mean over the passes of a sample, {at_each}",
            "sample": f"denoiser passes, {at_each}, and a decoding",
        }
        return Cost(operations, layers, rates, protocols, len(passes))

    def _passes(self, codes: Tensor, noise: SamplingNoise, samples: range) -> list[tuple[Tensor | None, ...]]:
        """The denoiser's inputs in each pass that led to `codes [N,h,w]`: tokens, t, condition."""
        diffusion, device, condition = self.diffusion, self.machine.device, self.condition_of(samples)
        condition = None if condition is None else condition.to(device)
        conditions = [condition]
        if self.settings.guidance and condition is not None:
            conditions.append(self._denoiser.conditions.without_last(condition))
        schedule = diffusion.timesteps(self.settings.sample_steps, self.settings.reveal_order)
        timesteps = torch.tensor(schedule, device=device)
        return [
            (diffusion.trajectory(codes, noise, int(t) + 1).to(device), t.expand(len(codes)), each)
            for t in timesteps
            for each in conditions
        ]


@dataclass(frozen=True)
class PriorSampling:
    """A variational autoencoder that draws its latents from a prior of its own."""

    autoencoder: FSVAE
    machine: Machine
    seed: int
    batch_size: int = 64
    drawn = "drawn from its prior"

    @property
    def record(self) -> dict[str, Any]:
        """See ImageModel."""
        return {"seed": self.seed, "spike_steps": self.autoencoder.spike_steps, "precision": self.machine.precision}

    def reconstruct(self, images: Tensor) -> Tensor:
        """See ImageModel; latents are drawn from the posterior."""
        model = self.autoencoder

        def compute_images(part: Tensor, picks: Tensor) -> Tensor:
            return model.decode(model.encode(to_float(images[part].to(self.machine.device)), picks))

        return self._by_sample(range(len(images)), compute_images, "reconstructing")

    def draw_images(self, samples: range) -> Tensor:
        """See ImageModel."""
        model = self.autoencoder
        return self._by_sample(samples, lambda _, picks: model.decode(model.sample(picks)), "sampling")

    def labels_of(self, samples: range) -> None:
        """See ImageModel."""

    @torch.no_grad()
    def _by_sample(self, samples: range, images_of: Callable[[Tensor, Tensor], Tensor], title: str) -> Tensor:
        self.autoencoder.eval()

        def compute(part: Tensor) -> Tensor:
            picks = self.autoencoder.noise(self.seed, part.tolist()).to(self.machine.device)
            return to_uint8(images_of(part, picks))

        with self.machine.autocast():
            return in_batches(torch.tensor(samples), self.batch_size, title, compute)

    def cost(self, images: Tensor) -> Cost:
        """See ImageModel; a sample is one run of the prior and one of the decoder."""
        model, pixels = self.autoencoder, to_float(images.to(self.machine.device))
        picks = model.noise(self.seed, range(len(images))).to(self.machine.device)
        with torch.no_grad():
            latents = model.eval().sample(picks)
        parts: Parts = {
            "encode": (model, lambda: model.encode(pixels, picks)),
            "decode": (model, lambda: model.decode(latents)),
            "sample": (model, lambda: model.decode(model.sample(picks))),
        }
        protocols = {"encode": TEST_IMAGES, "decode": "latents of samples", "sample": "prior and decoding"}
        layers, rates = count_parts(parts, len(images))
        return Cost(sums(layers), layers, rates, protocols)
