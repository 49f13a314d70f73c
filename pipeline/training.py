"""Training: one epoch loop, and the two stages that use it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion.absorbing import AbsorbingDiffusion
from errors import UserError
from models import FSVAE, SDID
from models.vq_autoencoder import VQAutoencoder
from pipeline.generators import PriorSampling
from pipeline.machine import Machine
from pipeline.pictures import grid, save_png, to_float
from pipeline.run_folder import RunFolder, save_weights
from pipeline.sampling import decode_codes, draw_codes, encode_images

PREVIEW_IMAGES = 16
PREVIEW_TEMPERATURE = 0.65  # of the release's pictures during training
SCHEDULED_SAMPLING = (0.1, 0.3)  # probability in the first epoch, and after the last, of FSVAE

Losses = dict[str, Tensor]
LossFunction = Callable[[Tensor, torch.Generator], Losses]


@dataclass(frozen=True)
class Schedule:
    """How long and how to train one stage."""

    epochs: int
    batch_size: int
    lr: float
    seed: int
    max_minutes: float | None = None


@dataclass
class Progress:
    """Where a stage stands: whole epochs done, steps done in the next, and that epoch's sums so far."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers: every epoch and step has its own, so resuming needs no random state."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Trainer:
    """Trains one network on a tensor of examples; the order of examples and all noise follow from the seed.

    Args:
        stage: its number (1 or 2) and name, for seeds, log and progress bar.
        model: trained in place.
        examples: `[N,...]`; kept on the machine's device as a whole.
        losses: a batch and a generator to scalars by name; the one called "loss" is minimised, all are logged.
        preview: called after each epoch, with its number, in evaluation mode.
        checkpoint: where the weights of `model` go after each epoch.
    """

    def __init__(
        self,
        stage: tuple[int, str],
        model: nn.Module,
        examples: Tensor,
        losses: LossFunction,
        preview: Callable[[int], None],
        *,
        run: RunFolder,
        checkpoint: Path,
        schedule: Schedule,
        machine: Machine,
    ):
        self.number, self.name = stage
        self.model, self.losses, self.preview = model, losses, preview
        self.examples = examples.to(machine.device)
        self.run, self.checkpoint, self.schedule, self.machine = run, checkpoint, schedule, machine
        self.optimizer = torch.optim.AdamW(model.parameters(), schedule.lr, betas=(0.9, 0.999), weight_decay=1e-3)
        self.progress = Progress()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `save` wrote to last.pth."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(state["epoch"], state["step"], state["sums"])

    def save(self) -> None:
        """Write the weights, and last.pth."""
        progress = {"epoch": self.progress.epoch, "step": self.progress.step, "sums": self.progress.sums}
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        save_weights(self.checkpoint, states["model"])
        save_weights(self.run.last, {"stage": self.name, **progress, **states})

    def train(self) -> bool:
        """Train to the last epoch; False if the time was over before. Saves after each epoch and at the end."""
        deadline = time.monotonic() + 60 * (self.schedule.max_minutes or float("inf"))
        while self.progress.epoch < self.schedule.epochs:
            if not self._train_epoch(deadline):
                self.save()
                return False
            self.save()
            self.model.eval()
            self.preview(self.progress.epoch)
            if time.monotonic() > deadline and self.progress.epoch < self.schedule.epochs:
                return False
        return True

    def _train_epoch(self, deadline: float) -> bool:
        """The rest of the current epoch; False if the time was over before its end."""
        schedule, progress, count = self.schedule, self.progress, len(self.examples)
        epoch_seed = (schedule.seed, self.number, progress.epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(*epoch_seed)))
        batches = order.to(self.examples.device).split(schedule.batch_size)
        generator = torch.Generator(self.machine.device)
        sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in progress.sums.items()}
        first = progress.step * schedule.batch_size
        title = f"stage {self.number} ({self.name}) epoch {progress.epoch + 1}/{schedule.epochs}"
        started = time.monotonic()
        self.model.train()
        with tqdm(total=count, initial=first, desc=title, unit=" images", leave=False, disable=None) as bar:
            for indices in batches[progress.step :]:
                generator.manual_seed(derive_seed(*epoch_seed, progress.step))
                losses = self._step(self.examples[indices], generator)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach().double() * len(indices)
                progress.step += 1
                bar.update(len(indices))
                if progress.step % 10 == 0 and not bar.disable:
                    bar.set_postfix(loss=f"{losses['loss'].item():.4f}")
                if time.monotonic() > deadline and progress.step < len(batches):
                    progress.sums = {name: value.item() for name, value in sums.items()}
                    return False
        means = {name: value.item() / count for name, value in sums.items()}
        self._end_epoch(title, means, count - first, time.monotonic() - started)
        return True

    def _end_epoch(self, title: str, means: dict[str, float], images: int, seconds: float) -> None:
        if not math.isfinite(means["loss"]):
            raise UserError(f"{title}: the loss is {means['loss']}: begin a new run with a lower --lr")
        rate = images / seconds
        cost = {"images": images, "images_per_second": round(rate, 2)}
        self.run.log(self.name, self.progress.epoch + 1, {**means, **cost})
        figures = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(f"{title}: {figures}, {rate:.0f} images/s", flush=True)
        self.progress = Progress(self.progress.epoch + 1)

    def _step(self, batch: Tensor, generator: torch.Generator) -> Losses:
        with self.machine.autocast():
            losses = self.losses(batch, generator)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.step()
        return losses


def vqsvae_trainer(model: VQAutoencoder, train: Tensor, test: Tensor, variance: float, **options: Any) -> Trainer:
    """Stage 1: the autoencoder on `train`, uint8 `[N,C,H,W]`; previews show `test` over its reconstructions."""
    run, machine = options["run"], options["machine"]
    shown = test[:PREVIEW_IMAGES]

    def losses(batch: Tensor, generator: torch.Generator) -> Losses:
        out = model(to_float(batch), variance, generator)
        return {"loss": out.loss, "mse": out.mse, "quantizer_loss": out.quantizer_loss}

    def preview(epoch: int) -> None:
        codes = encode_images(model, shown, machine)
        rows = torch.cat((shown, decode_codes(model, codes, machine)))
        show(run, "reconstructions", grid(rows, len(shown)), epoch)

    return Trainer((1, "vqsvae"), model, train, losses, preview, checkpoint=run.model, **options)


def fsvae_trainer(model: FSVAE, train: Tensor, test: Tensor, **options: Any) -> Trainer:
    """The variational autoencoder on `train`, uint8 `[N,C,H,W]`; previews show `test` and samples of the prior."""
    run, schedule = options["run"], options["schedule"]
    shown = test[:PREVIEW_IMAGES]
    generator_of = PriorSampling(model, options["machine"], schedule.seed)

    def losses(batch: Tensor, generator: torch.Generator) -> Losses:
        first, last = SCHEDULED_SAMPLING
        p = first + (last - first) * trainer.progress.epoch / schedule.epochs
        out = model(to_float(batch), generator, p)
        return {"loss": out.loss, "mse": out.mse, "mmd": out.mmd}

    def preview(epoch: int) -> None:
        rows = torch.cat((shown, generator_of.reconstruct(shown)))
        show(run, "reconstructions", grid(rows, len(shown)), epoch)
        show(run, "samples", grid(generator_of.draw(range(PREVIEW_IMAGES)), PREVIEW_IMAGES // 2), epoch)

    trainer = Trainer((1, "vae"), model, train, losses, preview, checkpoint=run.model, **options)
    return trainer


def sdid_trainer(
    denoiser: SDID, vqsvae: VQAutoencoder, diffusion: AbsorbingDiffusion, codes: Tensor, loss: str, **options: Any
) -> Trainer:
    """Stage 2: the denoiser on `codes [N,h,w]`; previews are samples that `vqsvae` decodes."""
    run, machine, seed = options["run"], options["machine"], options["schedule"].seed

    def losses(batch: Tensor, generator: torch.Generator) -> Losses:
        return {"loss": diffusion.loss(denoiser, batch.long(), generator, loss)}

    def preview(epoch: int) -> None:
        noise = diffusion.noise(seed, range(PREVIEW_IMAGES), tuple(codes.shape[1:]))
        drawn = draw_codes(denoiser, diffusion, noise, machine, temperature=PREVIEW_TEMPERATURE)
        show(run, "samples", grid(decode_codes(vqsvae, drawn, machine), PREVIEW_IMAGES // 2), epoch)

    return Trainer((2, "sdid"), denoiser, codes, losses, preview, checkpoint=run.denoiser, **options)


def show(run: RunFolder, name: str, picture: Tensor, epoch: int) -> None:
    """Keep a preview, uint8 `[3,H,W]`, as a file and in TensorBoard."""
    save_png(run.samples / f"{name}_epoch_{epoch:03d}.png", picture)
    run.log_picture(name, picture, epoch)
