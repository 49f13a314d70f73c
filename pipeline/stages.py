"""The way of a run through its stages: train the autoencoder, train the denoiser, sample, evaluate."""

from argparse import Namespace
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from datasets import ImageData, load_dataset
from diffusion.absorbing import AbsorbingDiffusion
from errors import UserError
from models import SDID, autoencoder_options, build_model, denoiser_options
from pipeline.evaluation import FID_IMAGES, fid_figure, load_fid_network, reconstruction_figures, write_figures
from pipeline.machine import Machine
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
Network = TypeVar("Network", bound=nn.Module)


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
        trained = RunFolder(options.checkpoint.parent) if options.checkpoint else run
        self.autoencoder_path, self.denoiser_path = options.checkpoint or run.model, trained.denoiser
        self.last = load_weights(run.last) if options.resume else {}

    @cached_property
    def data(self) -> ImageData:
        """The data set, loaded when a stage first needs it."""
        o = self.options
        return load_dataset(
            o.dataset_name,
            o.data_path,
            train_images=o.train_images,
            image_size=o.image_size,
            channels=o.channels,
        )

    def execute(self) -> None:
        """Run the stages that `--stage` names, in order; end after one whose time was over."""
        stage = self.options.stage
        if stage in ("all", "vqsvae", "sdid") and not self.options.checkpoint:
            self._record_options()
            trainings = {"vqsvae": self.train_vqsvae, "sdid": self.train_sdid}
            for name, train in trainings.items():
                if stage in (name, "all") and not train():
                    minutes = f"{self.options.max_minutes:g} minutes are over"
                    print(f"{minutes}: saved; go on with: python main.py --resume {self.run.path}")
                    return
        if stage == "sample":
            self.sample()
        if stage in ("all", "evaluate"):
            self.evaluate()
        print(f"\nthe run is in {self.run.path}:")
        for path in sorted(self.run.path.rglob("*")):
            if path.is_file() and not path.name.startswith("events.") and "_epoch_" not in path.name:
                print(f"  {path}")

    def train_vqsvae(self) -> bool:
        """Stage 1; False if the time was over before its last epoch."""
        if self.last.get("stage") == "sdid":
            return True
        o, data = self.options, self.data
        if data.variance == 0:
            raise UserError(f"all training images of {o.dataset_name} are of one even colour: nothing can be learned")
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
            self._place(model),
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
        trainer = sdid_trainer(self._place(denoiser), vqsvae, diffusion, codes, o.loss, **settings)
        return self._train(trainer, "sdid")

    def sample(self) -> None:
        """Draw images and write them."""
        self.draw(self.load_autoencoder(), self.load_denoiser(), self.options.num_samples or GRID_IMAGES)

    def evaluate(self) -> None:
        """Draw images, as many as the figures need, and compute the figures."""
        o, test = self.options, self.data.test
        vqsvae, denoiser = self.load_autoencoder(), self.load_denoiser()
        if vqsvae.channels != test.shape[1]:
            raise UserError(
                f"{self.autoencoder_path} is for images of {vqsvae.channels} channels, {o.dataset_name} has {test.shape[1]}"
            )
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
        height, width = (o.image_shape or self.data.shape)[1:]
        grid = (height // vqsvae.downsampling, width // vqsvae.downsampling)
        diffusion = AbsorbingDiffusion(vqsvae.codebook_size, grid[0] * grid[1])
        if o.sample_steps is not None and o.sample_steps > diffusion.num_timesteps:
            raise UserError(f"--sample_steps {o.sample_steps}: this model has {diffusion.num_timesteps} timesteps")
        noise = diffusion.noise(o.seed, range(count), grid)
        how = {"temperature": o.temperature, "sample_steps": o.sample_steps, "batch_size": o.eval_batch_size}
        codes = draw_codes(denoiser, diffusion, noise, self.machine, **how)
        images = decode_codes(vqsvae, codes, self.machine, o.eval_batch_size)
        write_samples(self.run.samples, images, o.png)
        write_trajectory(self.run, diffusion, codes, noise, images[0], o.sample_steps)
        return images

    def load_autoencoder(self) -> nn.Module:
        """The autoencoder of the checkpoint, shaped after its weights."""
        build = lambda **shape: build_model(self.options.model, **shape)  # noqa: E731
        return self._load(self.autoencoder_path, build, autoencoder_options)

    def load_denoiser(self) -> SDID:
        """The denoiser beside the checkpoint, shaped after its weights."""
        return self._load(self.denoiser_path, SDID, denoiser_options)

    def _load(self, path: Path, build: Callable[..., Network], shape_of: Callable[[dict], dict]) -> Network:
        weights = load_weights(path)
        try:
            network = build(**shape_of(weights), spike_steps=self.options.spike_steps)
            network.load_state_dict(weights)
        except (KeyError, AttributeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{path} does not hold the weights of this network ({str(error).splitlines()[-1].strip()})"
            ) from error
        return self._place(network)

    def _record_options(self) -> None:
        self.options.image_shape = self.data.shape
        options = {key: value for key, value in vars(self.options).items() if key not in ("resume", "checkpoint")}
        self.run.write_config({key: str(value) if isinstance(value, Path) else value for key, value in options.items()})

    def _place(self, network: Network) -> Network:
        return network.to(self.machine.device, memory_format=torch.channels_last)

    def _train(self, trainer: Trainer, stage: str) -> bool:
        if self.last.get("stage") == stage:
            trainer.restore(self.last)
        return trainer.train()
