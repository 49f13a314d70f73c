"""The way of a run through its stages: train the autoencoder, train the denoiser, sample, evaluate."""

import sys
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from datasets import ImageData, load_dataset
from errors import UserError
from models import AUTOENCODERS, FSVAE
from models.vq_autoencoder import VQAutoencoder
from pipeline.checkpoints import load_weights, save_weights
from pipeline.configuration import Call
from pipeline.evaluation.metrics import Evaluation
from pipeline.evaluation.model_metrics import energy_figures, reconstruction_figures
from pipeline.evaluation.records import write_figures
from pipeline.evaluation.temperature import check_held_out, choose_temperature
from pipeline.networks import Networks
from pipeline.options import METRICS, SAMPLE_METRICS, as_written
from pipeline.runtime.device import Machine
from pipeline.runtime.processes import from_writer
from pipeline.runtime.seeds import derive_seed
from pipeline.sampling.batches import GRID_IMAGES, encode_images, read_samples, write_samples, write_single_files
from pipeline.sampling.generators import CodeDiffusion, Generator, PriorSampling
from pipeline.sampling.grids import GREY, grid, save_png
from pipeline.sampling.masks import hidden_pixels
from pipeline.training.loop import Schedule, Trainer
from pipeline.training.objectives import fsvae_trainer, sdid_trainer, vqsvae_trainer

INPAINTED_IMAGES = 16
FILLINGS = 4  # of each image


class Pipeline:
    """One run: its options, its folder, its machine, and the stages as methods.

    Args:
        call: what the command line asks for.
        machine: device and precision.
    """

    def __init__(self, call: Call, machine: Machine):
        self.options, self.run, self.recorded = call
        self.machine = machine
        self.networks = Networks(self.options, self.run, machine)
        self.last: dict[str, Any] = {}
        if self.options.run.resume:
            self.run.lock()
            self.last = from_writer(self.run.read_last)

    @cached_property
    def data(self) -> ImageData:
        """The data set, loaded when a stage first needs it. Raises UserError if a training cannot go on with it."""
        o = self.options.data
        load = partial(
            load_dataset,
            o.dataset_name,
            o.data_path,
            train_images=o.train_images,
            held_out=o.held_out,
            image_size=o.image_size,
            channels=o.channels,
        )
        data = from_writer(load)
        if self.recorded["image_shape"] and data.shape != tuple(self.recorded["image_shape"]):
            shapes = f"{data.shape}, those of the run were {tuple(self.recorded['image_shape'])}"
            raise UserError(f"the images in {o.data_path} are {shapes} (channels, height, width): mend --data_path")
        if (changed := self._changed(data)) and self.options.run.resume:
            raise UserError(f"{changed}; a training cannot go on with other data: mend --data_path, or begin a new run")
        return data

    def _changed(self, data: ImageData) -> str | None:
        """In what the data set is not the one that the run was trained with, in words; None where it is, or unknown."""
        before, now = self.recorded["data"] or {}, data.fingerprint
        splits = [f"{split} ({now[split]['count']} images, then {before[split]['count']})" for split in before]
        other = [words for words, split in zip(splits, before, strict=True) if before[split] != now[split]]
        return f"{self.options.data.data_path} has other images than the run: {', '.join(other)}" if other else None

    def code_grid(self) -> tuple[int, int]:
        """Height and width of an image's codes. Raises UserError if --sample_steps are more than the timesteps."""
        shape = self.recorded["image_shape"] or self.data.shape
        height, width = (side // self.options.autoencoder.downsampling for side in shape[1:])
        most, steps = height * width, self.options.sampling.sample_steps
        if steps is not None and steps > most:
            raise UserError(f"images of this size have {most} timesteps: say --sample_steps {most} instead of {steps}")
        return height, width

    def execute(self) -> None:
        """Run the stages that `--stage` names, in order; end after one whose time was over."""
        o = self.options.run
        stage = o.stage
        if stage in ("all", "vqsvae", "sdid") and not o.checkpoint:
            self._begin_training()
            trainings = {"vqsvae": self.train_autoencoder, "sdid": self.train_sdid}
            for name, train in trainings.items():
                if stage in (name, "all") and not train():
                    minutes = f"--max_minutes {o.max_minutes:g} are over"
                    print(f"{minutes}: saved; {self.run.how_to_go_on}")
                    return
        if stage == "sample":
            self.sample()
        if stage == "inpaint":
            self.inpaint()
        if stage in ("all", "evaluate"):
            self.evaluate()
        print(f"\nthe run is in {self.run.path}:")
        for path in self.run.contents():
            print(f"  {path}")

    @property
    def has_denoiser(self) -> bool:
        """Whether the model has a second stage; otherwise it draws from a prior of its own."""
        return AUTOENCODERS[self.options.autoencoder.model] is not FSVAE

    def train_autoencoder(self) -> bool:
        """Stage 1; False if the time was over before its last epoch."""
        if self._has_stage_1():
            return True
        o, data = self.options.training, self.data
        torch.manual_seed(derive_seed(self.options.run.seed, "weights", 1))
        model = self.networks.new_autoencoder(*data.shape[:2])
        if not self.last:  # a training that goes on has its weights
            self.networks.begin_autoencoder(model)
        model = self.machine.place(model)
        settings = {"run": self.run, "schedule": self._schedule(o.epochs, o.lr), "machine": self.machine}
        if self.has_denoiser:
            trainer = vqsvae_trainer(model, data.train, data.test, data.variance, **settings)
        else:
            trainer = fsvae_trainer(model, data.train, data.test, **settings)
        return self._train(trainer)

    def _has_stage_1(self) -> bool:
        """Whether a run that goes on has its autoencoder: it is at stage 2, or that was all it had to train."""
        alone = self.options.run.resume and not self.last and from_writer(self.run.model.is_file)
        return bool(alone) or self.last.get("stage") == "sdid"

    def train_sdid(self) -> bool:
        """Stage 2, on the codes of the training images; False if the time was over before its last epoch."""
        if not self.has_denoiser:
            return True
        o = self.options.training
        vqsvae = self.load_autoencoder()
        codes = encode_images(vqsvae, self.data.train, self.machine, self.options.sampling.eval_batch_size)
        torch.manual_seed(derive_seed(self.options.run.seed, "weights", 2))
        denoiser = self.machine.place(self._new_denoiser())
        if self.last.get("stage") != "sdid":  # a training that goes on has weights and prototypes
            self.networks.begin_denoiser(denoiser)
            self.networks.fit_prototypes(denoiser, codes, vqsvae)
        schedule = self._schedule(o.diffusion_epochs, o.diffusion_lr or o.lr, o.fixed_norm)
        settings = {"run": self.run, "schedule": schedule, "machine": self.machine}
        return self._train(sdid_trainer(denoiser, self._code_diffusion(vqsvae, denoiser), codes, o.loss, **settings))

    def _new_denoiser(self) -> nn.Module:
        return self.networks.new_denoiser(self.code_grid(), len(self.data.train))

    def load_autoencoder(self) -> nn.Module:
        """The trained autoencoder."""
        return self.networks.load_autoencoder((self.recorded["image_shape"] or self.data.shape)[0])

    def sample(self) -> None:
        """Draw images and write them."""
        self.draw(self.load_generator(), self.options.sampling.num_samples or GRID_IMAGES)

    def inpaint(self) -> None:
        """Fill in the hidden part of test images, each FILLINGS times, and write a picture of it."""
        if not self.has_denoiser:
            raise UserError(
                f"--stage inpaint: {self.options.autoencoder.model} has no codes to keep; snn-vq-vae and vq-vae have"
            )
        generator, _ = self._with_temperature(self.load_generator())
        o = self.options.sampling
        images = self.data.test[: o.num_samples or INPAINTED_IMAGES]
        hidden = hidden_pixels(o.mask, *images.shape[2:])
        filled = generator.inpaint(images.repeat(FILLINGS, 1, 1, 1), hidden)
        rows = torch.cat((images, torch.where(hidden, GREY, images).byte(), filled))
        save_png(self.run.samples / "inpainted.png", grid(rows, len(images)))

    def evaluate(self) -> None:
        """Compute the metrics that are asked for and write them to metrics.json.

        Images are drawn only if one of these needs them, or at the end of a training. Metrics of the autoencoder alone
        need no denoiser.
        """
        o = self.options
        self.run.read_figures()  # damage is said now, not after the samples are drawn
        wanted = METRICS if o.evaluation.metrics is None else o.evaluation.metrics
        trained = o.run.stage == "all" and not o.run.checkpoint
        of_samples = trained or bool(set(wanted) & set(SAMPLE_METRICS))
        generator = self.load_generator(of_samples or "energy" in wanted)
        evaluation = self._evaluation()
        figures = []
        if of_samples:
            count = o.sampling.num_samples or evaluation.images_needed or GRID_IMAGES
            figures += evaluation.figures(*self.draw(generator, count, reuse=True))
        figures += reconstruction_figures(generator, evaluation, wanted)
        if "energy" in wanted:
            figures += energy_figures(generator, self.data.test, o.run.seed)
        if changed := self._changed(self.data):
            print(f"warning: {changed}", file=sys.stderr)
            figures = [figure | {"data": changed} for figure in figures]
        if self.run.path != self.networks.trained.path:
            figures = [figure | {"checkpoint": as_written(o.run.checkpoint)} for figure in figures]
        write_figures(self.run, figures, self.machine, self.networks.digest())  # by one process

    def _evaluation(self) -> Evaluation:
        """Raises UserError where a metric that is asked for by name cannot be computed."""
        o = self.options
        if "codebook" in (o.evaluation.metrics or ()) and not self.has_denoiser:
            raise UserError(f"--metrics codebook: {o.autoencoder.model} has no codes")
        return Evaluation(o.evaluation, self.data, self.machine, o.run.seed, o.sampling.num_samples)

    def draw(self, generator: Generator, count: int, reuse: bool = False) -> tuple[Tensor, str]:
        """`count` images, uint8 `[N,C,H,W]`, drawn and written; and a word on how they were drawn.

        With `reuse`, those of an earlier call are taken if they were drawn alike. Where there is a denoiser, its
        temperature is chosen first if that was left to us, and a trajectory is written.
        """
        folder, chosen = self.run.samples, ""
        if isinstance(generator, CodeDiffusion):
            generator, chosen = self._with_temperature(generator)
        how = generator.drawn + chosen
        settings = generator.settings | {"drawn": how, "weights": self.networks.digest()}
        images = from_writer(partial(read_samples, folder, settings, count)) if reuse else None
        if images is not None:
            print(f"the {count} images are those in {folder / 'images.npz'}, which were drawn with the same settings")
        else:
            if isinstance(generator, CodeDiffusion):
                save_png(folder / "trajectory.png", generator.trajectory())
            images = generator.draw(range(count))
            write_samples(folder, images, settings)
        if self.options.sampling.png:
            write_single_files(folder / "png", images)
        return images, how

    def _with_temperature(self, generator: CodeDiffusion) -> tuple[CodeDiffusion, str]:
        if self.options.sampling.temperature != "auto":
            return generator, ""
        fad_weights = self.options.evaluation.fad_weights
        temperature = choose_temperature(generator, self.data, fad_weights, self.run, self.networks.digest())
        return replace(generator, temperature=temperature), ", chosen on held-out training images"

    def load_generator(self, draws: bool = True) -> Generator:
        """The trained networks; one that does not draw needs no denoiser.

        Raises UserError if they are not there or do not fit each other. Asked for first, so that a wrong path costs no
        time.
        """
        autoencoder = self.load_autoencoder()
        self.run.check_writable()
        if not self.has_denoiser:
            o = self.options
            return PriorSampling(autoencoder, self.machine, o.run.seed, o.sampling.eval_batch_size)
        return self._code_diffusion(autoencoder, self.networks.load_denoiser(autoencoder) if draws else None)

    def _code_diffusion(self, autoencoder: VQAutoencoder, denoiser: nn.Module | None) -> CodeDiffusion:
        """The two networks together as the options say; at temperature 1 where that is still to be chosen."""
        o = self.options.sampling
        how = {key: getattr(o, key) for key in ("temperature", "final_temperature", "sample_steps", "reveal_order")}
        if o.temperature == "auto":
            how |= {"temperature": 1.0, "final_temperature": None}
        how["batch_size"] = o.eval_batch_size
        return CodeDiffusion(autoencoder, denoiser, self.code_grid(), self.machine, self.options.run.seed, **how)

    def _schedule(self, epochs: int, lr: float, fixed_norm: float = 0.0) -> Schedule:
        o, run = self.options.training, self.options.run
        how = {"lr_schedule": o.lr_schedule, "ema_decay": o.ema_decay, "fixed_norm": fixed_norm}
        return Schedule(epochs, o.batch_size, lr, run.seed, run.max_minutes, run.save_every, **how)

    def _begin_training(self) -> None:
        """Find what is wrong with data, options and folder before hours are spent; record the options."""
        o, networks = self.options, self.networks
        if self.data.variance == 0:
            raise UserError("all training images are of one and the same colour: nothing can be learned from them")
        self.run.read_log()
        self.run.read_figures()
        stage, size = o.run.stage, o.autoencoder.codebook_size
        if stage == "sdid" and not self.has_denoiser:
            raise UserError(f"--stage sdid: {o.autoencoder.model} draws from its own prior and has no second stage")
        if stage == "sdid" and (codes := self.load_autoencoder().codebook_size) != size:
            raise UserError(f"{networks.autoencoder_path} has {codes} codes: say so with --codebook_size {codes}")
        if stage != "vqsvae" and self.has_denoiser:
            self._check_denoiser()
        if stage == "all":
            self._check_evaluation()
        options = {key: as_written(value) for key, value in o.values().items() if key not in ("resume", "checkpoint")}
        self.recorded = {"image_shape": self.data.shape, "data": self.data.fingerprint}
        self.run.write_config(options | self.recorded)
        if not o.run.resume:
            self.run.remove_last()
        if networks.autoencoder_path != self.run.model:
            save_weights(self.run.model, from_writer(partial(load_weights, networks.autoencoder_path)))
            networks.autoencoder_path = self.run.model

    def _check_denoiser(self) -> None:
        """Raise UserError if stage 2 could not begin as it is asked to; say so if it begins untrained after all."""
        denoiser = self._new_denoiser()
        if self.last.get("stage") != "sdid" and not self.networks.begin_denoiser(denoiser):
            print(f"{self.options.run.start_from} has no denoiser: the new one begins untrained")

    def _check_evaluation(self) -> None:
        """Raise UserError if the evaluation after the training could not do what is asked for.

        Its networks are let go of, so that the training has the memory.
        """
        if self.options.evaluation.metrics is not None:
            self._evaluation()
        if self.options.sampling.temperature == "auto" and self.has_denoiser:
            check_held_out(self.data)

    def _train(self, trainer: Trainer) -> bool:
        if self.last.get("stage") == trainer.name:
            try:
                trainer.restore(self.last)
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                raise UserError(f"{self.run.last} does not fit its config.json: put back both as written") from error
        return trainer.train()
