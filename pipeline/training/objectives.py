"""The loss of each network, and its preview after each epoch."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from datasets import ImageData, Split
from diffusion.absorbing import TrainingNoise
from errors import say_on_stderr
from metrics.codebook import usage
from models import FSVAE, Denoiser
from models.conditions import NOT_GIVEN
from models.vq_autoencoder import VQAutoencoder
from pipeline.run_folder import RunFolder
from pipeline.runtime import processes
from pipeline.sampling.batches import decode_codes, encode_images
from pipeline.sampling.grids import grid, save_png
from pipeline.sampling.image_models import CodeDiffusion, PriorSampling
from pipeline.training.loop import Batch, Losses, Place, Trainer, Values
from pixels import to_float

PREVIEW_IMAGES = 16
HELD_OUT_IMAGES = 2000  # at most, whose loss is computed after each epoch
USAGE_IMAGES = 1000  # of the test split, whose codes tell the codebook's usage after each epoch
FEWEST_CODES = 0.02  # of the codebook; a usage below this, or of one code, is warned about
CONDITION_DROPOUT = 0.1  # fraction of the training images of which a condition is dropped, each by itself
SCHEDULED_SAMPLING = (0.1, 0.3)  # probability in the first epoch, and after the last, of FSVAE


def some_held_out(data: ImageData) -> Split | None:
    """The held-out images whose loss is computed after each epoch, evenly spaced ones; None if none are held out."""
    total, count = len(data.held_out), min(HELD_OUT_IMAGES, len(data.held_out))
    return Split(data.held_out, data.held_out_labels).take(torch.arange(count) * total // count) if count else None


def vqsvae_trainer(model: VQAutoencoder, data: ImageData, place: Place) -> Trainer:
    """Stage 1: the autoencoder on the training images; previews show test images over their reconstructions."""
    run, machine, test, variance, unseen = place.run, place.machine, data.test, data.variance, some_held_out(data)
    shown = test[:PREVIEW_IMAGES]

    def losses(network: nn.Module, generator: torch.Generator, batch: Tensor) -> Losses:
        out = network(to_float(batch), variance, generator)
        return {"loss": out.loss, "mse": out.mse, "quantizer_loss": out.quantizer_loss}

    def preview(model: VQAutoencoder, epoch: int) -> Values:
        codes = encode_images(model, test[:USAGE_IMAGES], machine)
        rows = torch.cat((shown, decode_codes(model, codes[: len(shown)], machine)))
        show(run, "vqsvae", "reconstructions", grid(rows, len(shown)), epoch)
        share = usage(codes, model.codebook_size)
        if share < max(FEWEST_CODES, 1.5 / model.codebook_size) and processes.is_rank_0():
            cause = f"warning: epoch {epoch}: the codebook is collapsing: only {share:.1%} of its codes are used"
            say_on_stderr(f"{cause}; if this lasts, begin a new run with a smaller --codebook_size or --lr")
        return {"codebook_usage": share}

    return Trainer(
        (1, "vqsvae"), model, (data.train,), losses, preview, place, run.model, held_out=unseen and (unseen.images,)
    )


def fsvae_trainer(model: FSVAE, data: ImageData, place: Place) -> Trainer:
    """The variational autoencoder on the training images; previews show test images and samples of the prior."""
    run, schedule, unseen = place.run, place.schedule, some_held_out(data)
    shown = data.test[:PREVIEW_IMAGES]

    def losses(network: nn.Module, generator: torch.Generator, batch: Tensor) -> Losses:
        first, last = SCHEDULED_SAMPLING
        p = first + (last - first) * trainer.progress.epoch / schedule.epochs if network.training else last
        out = network(to_float(batch), generator, p)
        return {"loss": out.loss, "mse": out.mse, "mmd": out.mmd}

    def preview(model: FSVAE, epoch: int) -> Values:
        prior = PriorSampling(model, place.machine, schedule.seed)
        rows = torch.cat((shown, prior.reconstruct(shown)))
        show(run, "vae", "reconstructions", grid(rows, len(shown)), epoch)
        show(run, "vae", "samples", grid(prior.draw_images(range(PREVIEW_IMAGES)), PREVIEW_IMAGES // 2), epoch)
        return {}

    trainer = Trainer(
        (1, "vae"), model, (data.train,), losses, preview, place, run.model, held_out=unseen and (unseen.images,)
    )
    return trainer


def sdid_trainer(
    denoiser: Denoiser, model: CodeDiffusion, examples: Batch, held_out: Batch | None, loss: str, place: Place
) -> Trainer:
    """Stage 2: the denoiser on examples, codes `[N,h,w]` and, if it has any, their conditions `[N,J]`.

    `held_out` are such of images that are not trained on. Previews are what `model` draws with the denoiser.

    Each condition is dropped for some images: inpainting has none, and guidance compares predictions with and without.
    """
    run, diffusion = place.run, model.diffusion

    def with_noise(batch: Batch, random: torch.Generator) -> Batch:
        codes, *told = batch
        known = [_dropped_out(each, random) for each in told]
        return codes.long(), *diffusion.training_noise(len(codes), model.grid, random, loss), *known

    def losses(
        network: Denoiser, _: torch.Generator, codes: Tensor, t: Tensor, mask: Tensor, condition: Tensor | None = None
    ) -> Losses:
        noise = TrainingNoise(t, mask)
        return {"loss": diffusion.loss(lambda tokens, t: network(tokens, t, condition), codes, noise, loss)}

    def preview(denoiser: Denoiser, epoch: int) -> Values:
        images = replace(model, denoiser=denoiser).draw_images(range(PREVIEW_IMAGES))
        show(run, "sdid", "samples", grid(images, PREVIEW_IMAGES // 2), epoch)
        return {}

    return Trainer((2, "sdid"), denoiser, examples, losses, preview, place, run.denoiser, with_noise, held_out)


def _dropped_out(conditions: Tensor, random: torch.Generator) -> Tensor:
    """Conditions `[N,J]`, some of them replaced by NOT_GIVEN."""
    dropped = torch.rand(conditions.shape, generator=random, device=conditions.device) < CONDITION_DROPOUT
    return torch.where(dropped, NOT_GIVEN, conditions)


def show(run: RunFolder, stage: str, name: str, image: Tensor, epoch: int) -> None:
    """Keep a preview, uint8 `[3,H,W]`, as a file and in TensorBoard."""
    save_png(run.samples / f"{name}_epoch_{epoch:03d}.png", image)
    run.log_image(stage, name, image, epoch)
