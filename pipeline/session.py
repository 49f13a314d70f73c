"""What every stage of a call works with: options, run folder, device, data and trained networks."""

from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from datasets import ImageData, load_dataset
from errors import UserError
from models import Autoencoder, Denoiser, VQAutoencoder
from parts import CODE_MODELS, find_part
from pipeline.networks import Networks
from pipeline.options.configuration import Call, assemble
from pipeline.options.parser import as_written
from pipeline.options.sections import CODES, OWN, DataOptions, names
from pipeline.resuming import read_last
from pipeline.runtime.device import Machine, choose_machine
from pipeline.runtime.processes import from_rank_0
from pipeline.sampling.image_models import CodeDiffusion, ImageModel, PriorSampling
from pipeline.sampling.sample_files import drawn_with, inpainted_of
from pipeline.sampling.settings import Settings, check_sample_steps


class Session:
    """One call of the program.

    Args:
        call: options and run folder.
        machine: device and precision.
        data: the data set, if it is there already, and the options of the call are then those that are true of it;
            otherwise it is loaded when a stage first needs it.

    Attributes:
        last: what last.pth holds of a training that is resumed, else empty.
        program: the program that wrote it, in words; config.json will name this one.
    """

    def __init__(self, call: Call, machine: Machine, data: ImageData | None = None):
        self.options, self.run, self.recorded = call
        self.machine, self._given = machine, data
        if data is not None:
            self.options = replace(self.options, data=replace(self.options.data, **data.facts))
        self.networks = Networks(self.options, self.run, machine)
        self.last: dict[str, Any] = {}
        self.program = ""
        if self.options.run.resume:
            self.run.lock()
            self.last = from_rank_0(partial(read_last, self.run))
            self.program = self.run.program

    @cached_property
    def data(self) -> ImageData:
        """The data set. Raises UserError if it is not the one that a resumed training began with."""
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
        data = self._given or from_rank_0(load)
        if self.recorded["image_shape"] and data.shape != tuple(self.recorded["image_shape"]):
            shapes = f"{data.shape}, those of the run were {tuple(self.recorded['image_shape'])}"
            raise UserError(f"the images in {self._place} are {shapes} (channels, height, width): {self._remedy}")
        if (change := self.data_change(data)) and self.options.run.resume:
            raise UserError(f"{change}; training cannot continue on different data: {self._remedy}")
        return data

    @property
    def _place(self) -> str:
        """Where the images are, in words."""
        return "data" if self._given else str(self.options.data.data_path)

    @property
    def _remedy(self) -> str:
        """What to do if they are not those of the run."""
        return "pass those of the run" if self._given else "correct --data_path"

    def described(self) -> dict[str, Any]:
        """The options as config.json has them: those of a run, but of data that are given only what is true of them."""
        left_out = {"resume", "checkpoint"}
        if self._given:
            left_out |= set(names(DataOptions)) - self._given.facts.keys()
        return {key: as_written(value) for key, value in self.options.values().items() if key not in left_out}

    @property
    def has_data(self) -> bool:
        """Whether the data set is in memory already."""
        return self._given is not None or "data" in vars(self)

    def data_change(self, data: ImageData) -> str | None:
        """How the data differ from those the run was trained on; None if they do not, or if that is unknown."""
        before, now = self.recorded["data"] or {}, data.fingerprint
        changed = [split for split in before if before[split] != now[split]]
        counts = [f"{name} ({now[name]['count']} images now, {before[name]['count']} in the run)" for name in changed]
        if not counts:
            return None
        return f"{self._place} has different images from those of the run: {', '.join(counts)}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.recorded["image_shape"] or self.data.shape
        return channels, height, width

    @property
    def code_grid(self) -> tuple[int, int]:
        """Height and width of an image's grid of codes. Raises UserError if it has fewer timesteps than asked for."""
        o = self.options.autoencoder
        a_side = find_part(CODE_MODELS, o.model).codes_a_side
        height, width = (side // o.downsampling * a_side for side in self.image_shape[1:])
        check_sample_steps(self.options.sampling.sample_steps, height * width)
        return height, width

    @property
    def has_codes(self) -> bool:
        """Whether the model has codes and a denoiser of them; otherwise it draws from its own prior."""
        return self.options.autoencoder.model in CODES

    def load_autoencoder(self) -> Autoencoder:
        """The trained autoencoder."""
        return self.networks.load_autoencoder(self.image_shape[0])

    def load_vq_autoencoder(self) -> VQAutoencoder:
        """The trained autoencoder of a model that has codes."""
        autoencoder = self.load_autoencoder()
        assert isinstance(autoencoder, VQAutoencoder)
        return autoencoder

    def load_model(self, draws: bool = True) -> ImageModel:
        """The trained model; one that does not draw needs no denoiser.

        Raises UserError if its files are missing or inconsistent.
        """
        model = self.read_model(draws)
        self.check_results()
        self.run.check_writable()
        return model

    def check_results(self) -> None:
        """Raise UserError if the folder that this call writes to holds results of another run."""
        facts = [*self.run.read_records(), drawn_with(self.run.samples)]
        checkpoints = {inpainted_of(self.run.samples), *(fact.get("checkpoint") for fact in facts)}
        others = checkpoints - {None, self.evaluated}
        if others:
            raise UserError(f"{self.run.path} holds results of {others.pop()}: choose another --result_path")

    @property
    def evaluated(self) -> str | None:
        """The checkpoint whose results go to a folder other than its own; None if they go to the run's."""
        elsewhere = self.run.path != self.networks.trained.path
        return str(as_written(self.options.run.checkpoint)) if elsewhere else None

    def read_model(self, draws: bool = True) -> ImageModel:
        """The same, for a folder that may be read-only."""
        autoencoder = self.load_autoencoder()
        if isinstance(autoencoder, VQAutoencoder):
            return self.code_diffusion(autoencoder, self.networks.load_denoiser(autoencoder) if draws else None)
        return PriorSampling(autoencoder, self.machine, self.options.run.seed, self.options.drawing.eval_batch_size)

    def code_diffusion(self, autoencoder: VQAutoencoder, denoiser: Denoiser | None) -> CodeDiffusion:
        """Both networks with the sampling options; at temperature 1 if it is still to be chosen."""
        o = self.options
        class_names = self.recorded["class_names"]
        model = CodeDiffusion(
            autoencoder,
            denoiser,
            self.code_grid,
            self.machine,
            o.run.seed,
            Settings.of(o.sampling),
            o.drawing.eval_batch_size,
            tuple(class_names) if class_names else None,
        )
        labels = None if o.run.stage == "inpaint" and o.sampling.labels == (OWN,) else o.sampling.labels
        return model.asked(labels) if denoiser else model


def open_session(data: ImageData | None = None, **options: Any) -> Session:
    """A session with options named as on the command line, on the device that they name."""
    call = assemble(options)
    o = call.options.run
    return Session(call, choose_machine(o.device, o.precision), data)
