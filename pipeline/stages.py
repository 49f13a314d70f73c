"""The way of a run through its stages: train the autoencoder, train the denoiser, sample, evaluate."""

import math
from argparse import Namespace
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets import ImageData, load_dataset
from diffusion.absorbing import AbsorbingDiffusion
from errors import UserError
from models import AUTOENCODERS, SDID, autoencoder_options, build_model, denoiser_options
from pipeline.evaluation import FID_IMAGES, fid_figure, load_fid_network, reconstruction_figures, write_figures
from pipeline.machine import Machine, Network
from pipeline.run_folder import RunFolder, load_weights
from pipeline.sampling import (
    GRID_IMAGES,
    decode_codes,
    draw_codes,
    encode_images,
    write_samples,
    write_trajectory,
)
from pipeline.training import Schedule, Trainer, derive_seed, sdid_trainer, vqsvae_trainer

STAGES = ("all", "vqsvae", "sdid", "sample", "evaluate")


class Pipeline:
    """One run: its options, its folder, its machine, and the stages as methods.

    Args:
        options: everything the command line resolved; see main.py.
        run: where the results go.
        machine: device and precision.

    The networks that are sampled and evaluated are those of `--checkpoint`, else those of the run folder; the
    denoiser is found beside the autoencoder.
    """

    def __init__(self, options: Namespace, run: RunFolder, machine: Machine):
        self.options, self.run, self.machine = options, run, machine
        self.autoencoder_path = options.checkpoint or run.model
        self.last = run.read_last() if options.resume else {}

    @cached_property
    def data(self) -> ImageData:
        """The data set, loaded when a stage first needs it."""
        o = self.options
        data = load_dataset(
            o.dataset_name,
            o.data_path,
            train_images=o.train_images,
            held_out=o.held_out,
            image_size=o.image_size,
            channels=o.channels,
        )
        if o.image_shape and data.shape != tuple(o.image_shape):
            shapes = f"the images in {o.data_path} are {data.shape}, those of the run were {tuple(o.image_shape)}"
            raise UserError(f"{shapes} (channels, height, width): mend --data_path")
        return data

    def code_grid(self) -> tuple[int, int]:
        """Height and width of an image's codes. Raises UserError if --sample_steps are more than the timesteps."""
        o = self.options
        height, width = (side // AUTOENCODERS[o.model].downsampling for side in (o.image_shape or self.data.shape)[1:])
        if o.sample_steps is not None and o.sample_steps > height * width:
            raise UserError(f"--sample_steps {o.sample_steps}: images of this size have {height * width} timesteps")
        return height, width

    def execute(self) -> None:
        """Run the stages that `--stage` names, in order; end after one whose time was over."""
        stage = self.options.stage
        if stage in ("all", "vqsvae", "sdid") and not self.options.checkpoint:
            self._begin_training()
            trainings = {"vqsvae": self.train_vqsvae, "sdid": self.train_sdid}
            for name, train in trainings.items():
                if stage in (name, "all") and not train():
                    minutes = f"--max_minutes {self.options.max_minutes:g} are over"
                    print(f"{minutes}: saved; go on with: python -u main.py --resume {self.run.path}")
                    return
        if stage == "sample":
            self.sample()
        if stage in ("all", "evaluate"):
            self.evaluate()
        print(f"\nthe run is in {self.run.path}:")
        for path in self.run.contents():
            print(f"  {path}")

    def train_vqsvae(self) -> bool:
        """Stage 1; False if the time was over before its last epoch."""
        if self.last.get("stage") == "sdid":
            return True
        o, data = self.options, self.data
        torch.manual_seed(o.seed)
        model = build_model(
            o.model,
            channels=data.shape[0],
            codebook_size=o.codebook_size,
            embedding_dim=o.embedding_dim,
            spike_steps=o.spike_steps,
            hidden=o.hidden_channels,
        )
        schedule = Schedule(o.epochs, o.batch_size, o.lr, o.seed, o.max_minutes)
        trainer = vqsvae_trainer(
            self.machine.place(model),
            data.train,
            data.test,
            data.variance,
            run=self.run,
            schedule=schedule,
            machine=self.machine,
        )
        return self._train(trainer, "vqsvae")

    def train_sdid(self) -> bool:
        """Stage 2, on the codes of the training images; False if the time was over before its last epoch."""
        o = self.options
        vqsvae = self.load_autoencoder()
        codes = encode_images(vqsvae, self.data.train, self.machine, o.eval_batch_size)
        torch.manual_seed(derive_seed(o.seed, 2))
        denoiser = SDID(o.codebook_size, o.spike_steps, o.denoiser_channels)
        schedule = Schedule(o.diffusion_epochs, o.batch_size, o.lr, o.seed, o.max_minutes)
        diffusion = AbsorbingDiffusion(o.codebook_size, codes[0].numel())
        settings = {"run": self.run, "schedule": schedule, "machine": self.machine}
        trainer = sdid_trainer(self.machine.place(denoiser), vqsvae, diffusion, codes, o.loss, **settings)
        return self._train(trainer, "sdid")

    def sample(self) -> None:
        """Draw images and write them."""
        self.draw(*self.load_networks(), self.options.num_samples or GRID_IMAGES)

    def evaluate(self) -> None:
        """Draw images, as many as the figures need, and compute the figures."""
        vqsvae, denoiser = self.load_networks()
        o, test = self.options, self.data.test
        inception = load_fid_network(o, test, self.machine)
        count = o.num_samples or (FID_IMAGES if inception is not None else GRID_IMAGES)
        images = self.draw(vqsvae, denoiser, count)
        figures = reconstruction_figures(vqsvae, test, o, self.machine)
        if inception is not None:
            figures.append(fid_figure(images, test, inception, o))
        write_figures(self.run, figures)

    def draw(self, vqsvae: nn.Module, denoiser: SDID, count: int) -> Tensor:
        """Draw `count` images, write them with a grid and a trajectory, and return them, uint8 `[N,C,H,W]`."""
        o = self.options
        grid = self.code_grid()
        diffusion = AbsorbingDiffusion(vqsvae.codebook_size, math.prod(grid))
        noise = diffusion.noise(o.seed, range(count), grid)
        how = {"temperature": o.temperature, "sample_steps": o.sample_steps, "batch_size": o.eval_batch_size}
        codes = draw_codes(denoiser, diffusion, noise, self.machine, **how)
        images = decode_codes(vqsvae, codes, self.machine, o.eval_batch_size)
        write_samples(self.run.samples, images, o.png)
        write_trajectory(self.run, diffusion, codes, noise, images[0], o.sample_steps)
        return images

    def load_networks(self) -> tuple[nn.Module, SDID]:
        """The autoencoder, and the denoiser beside it. Raises UserError if they do not fit each other.

        Asked for first, so that a wrong path costs no time.
        """
        vqsvae, path = self.load_autoencoder(), self.run.denoiser
        if not path.is_file():
            raise UserError(f"{path} is not there: a denoiser belongs beside the autoencoder; --stage sdid trains it")
        denoiser = self._load(path, "a denoiser", SDID, denoiser_options)
        codes, wanted = vqsvae.codebook_size, denoiser.codebook_size
        if codes != wanted:
            raise UserError(f"{path} is for {wanted} codes, {self.autoencoder_path} has {codes}: take both of one run")
        self.run.check_writable()
        return vqsvae, denoiser

    def load_autoencoder(self) -> nn.Module:
        """The autoencoder of the checkpoint, shaped after its weights. Raises UserError if it does not fit the data."""
        o, path = self.options, self.autoencoder_path
        kind = f"the autoencoder {o.model}, which a run keeps in model.pth"
        vqsvae = self._load(path, kind, partial(build_model, o.model), autoencoder_options)
        channels = (o.image_shape or self.data.shape)[0]
        if vqsvae.channels != channels:
            raise UserError(f"{path} is for images of {vqsvae.channels} channels, {o.dataset_name} has {channels}")
        return vqsvae

    def _load(self, path: Path, kind: str, build: Callable[..., Network], shape_of: Callable[[dict], dict]) -> Network:
        weights = load_weights(path)
        try:
            network = build(**shape_of(weights), spike_steps=self.options.spike_steps)
            network.load_state_dict(weights)
        except (KeyError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not hold the weights of {kind}") from error
        return self.machine.place(network)

    def _begin_training(self) -> None:
        """Find what is wrong with data, options and folder before hours are spent; record the options."""
        if self.data.variance == 0:
            raise UserError("all training images are of one and the same colour: nothing can be learned from them")
        self.code_grid()
        if self.options.stage == "sdid":
            codes = self.load_autoencoder().codebook_size
            if codes != self.options.codebook_size:
                raise UserError(f"{self.autoencoder_path} has {codes} codes: say so with --codebook_size {codes}")
        self.options.image_shape = self.data.shape
        options = {key: value for key, value in vars(self.options).items() if key not in ("resume", "checkpoint")}
        self.run.write_config({key: str(value) if isinstance(value, Path) else value for key, value in options.items()})

    def _train(self, trainer: Trainer, stage: str) -> bool:
        if self.last.get("stage") == stage:
            try:
                trainer.restore(self.last)
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                raise UserError(f"{self.run.last} does not fit its config.json: put back both as written") from error
        return trainer.train()
