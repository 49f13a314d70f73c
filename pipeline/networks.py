"""The networks of a run: new ones to be trained, and trained ones loaded from files."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from datasets import ImageData, digest
from errors import UserError
from models import (
    Autoencoder,
    Denoiser,
    build_denoiser,
    build_model,
    choose_neuron,
    denoiser_options,
    model_options,
)
from models.integer import are_whole, in_whole_numbers
from models.neurons import Neuron
from models.vq_autoencoder import VQAutoencoder
from parts import AUTOENCODERS, DENOISERS, find_part
from pipeline.checkpoints import load_weights
from pipeline.options.sections import CONDITIONS, Options
from pipeline.run_folder import RunFolder
from pipeline.runtime.device import Machine, Network
from pipeline.runtime.processes import from_rank_0
from pipeline.runtime.seeds import derive_seed, seeded


class Networks:
    """Builds and loads the networks that the options specify.

    Trained ones are those of `--checkpoint`, else those of the run folder; the denoiser is found beside the
    autoencoder. Stage 2 alone, begun with `--start_from`, has the autoencoder of that run until it has a copy. Where
    options or files do not fit each other, UserError is raised.
    """

    def __init__(self, options: Options, run: RunFolder, machine: Machine):
        self.options, self.machine = options, machine
        checkpoint, start = options.run.checkpoint, options.run.start_from
        self.trained = RunFolder(checkpoint.parent) if checkpoint else run
        self.start = RunFolder(start) if start else None
        self.autoencoder_path = checkpoint or run.model
        if self.start and options.run.stage == "sdid" and not from_rank_0(run.model.is_file):
            self.autoencoder_path = self.start.model

    def new_autoencoder(self, channels: int, image_size: int) -> Autoencoder:
        """A new autoencoder for stage 1, still on the CPU, with the initial weights of the run's seed."""
        o = self.options.autoencoder
        options = _chosen(model_options(o.model), vars(o), channels=channels, image_size=image_size, neuron=self.neuron)
        with self._initial_weights(1):
            return build_model(o.model, **options)

    def new_denoiser(self, grid: tuple[int, int], data: ImageData) -> Denoiser:
        """The same for stage 2: a denoiser for a `grid` (h, w) of codes of the images in `data`."""
        o = self.options.denoiser
        options = _chosen(
            denoiser_options(o.denoiser),
            vars(o),
            codebook_size=self.options.autoencoder.codebook_size,
            spike_steps=self._denoiser_spike_steps,
            prototypes=self._prototypes(len(data.train)),
            classes=self._classes(data),
            grid=grid,
            neuron=self.neuron,
        )
        with self._initial_weights(2):
            return build_denoiser(o.denoiser, **options)

    @contextmanager
    def _initial_weights(self, stage: int) -> Iterator[None]:
        """The random numbers of a stage's initial weights. A ValueError, which names an option, is a UserError."""
        try:
            with seeded(derive_seed(self.options.run.seed, "weights", stage)):
                yield
        except ValueError as error:
            raise UserError(f"--{error}") from error

    def begin_autoencoder(self, autoencoder: nn.Module) -> None:
        """Initialise a new autoencoder from `--start_from`, if given."""
        if self.start:
            self._load_pretrained(autoencoder.load_state_dict, self.start.model)

    def begin_denoiser(self, denoiser: Denoiser) -> bool:
        """Initialise a new denoiser from `--start_from`, if given; False if that run has only stage 1.

        With `--new_denoiser` it keeps its random initial weights.
        """
        start = self.start
        if not start or self.options.run.new_denoiser:
            return True
        if not from_rank_0(start.config.is_file):
            raise UserError(f"{start.path}, which stage 2 is to begin with, is missing: restore it")
        if from_rank_0(lambda: start.model.is_file() and not start.denoiser.is_file()):
            return False
        self._load_pretrained(denoiser.load_pretrained, start.denoiser)
        return True

    def fit_conditions(
        self, denoiser: Denoiser, codes: Tensor, labels: Tensor | None, autoencoder: VQAutoencoder
    ) -> Tensor | None:
        """Fit a new denoiser's conditions to the codes `[N,h,w]` and `labels [N]` of the training images.

        Returns the conditions `[N,J]` of these images; None if it has none.
        """

        def fitted() -> tuple[dict[str, Tensor], Tensor | None]:
            seed = derive_seed(self.options.run.seed, "prototypes", 2)
            conditions = denoiser.conditions.fit(codes, labels, autoencoder.vq_layer, seed)
            weights = {name: value.cpu() for name, value in denoiser.state_dict().items()}
            return weights, None if conditions is None else conditions.cpu()

        if not denoiser.conditions:
            return None
        weights, conditions = from_rank_0(fitted)
        denoiser.load_state_dict(weights)
        return conditions

    def load_autoencoder(self, channels: int) -> Autoencoder:
        """The trained autoencoder, whose shape is inferred from its weights, for images with this many channels."""
        path, model = self.autoencoder_path, self.options.autoencoder.model
        kind = f"the autoencoder {model}, which a run keeps in model.pth"
        build = partial(build_model, model, **self._not_in_weights(model))
        autoencoder = self._load(path, kind, build, find_part(AUTOENCODERS, model).options_of)
        if autoencoder.channels != channels:
            data = self.options.data.dataset_name
            raise UserError(f"{path} is for images of {autoencoder.channels} channels, {data} has {channels}")
        return autoencoder

    def load_denoiser(self, autoencoder: VQAutoencoder) -> Denoiser:
        """The trained denoiser of this autoencoder's codes."""
        name = self.options.denoiser.denoiser
        path, kind = self.trained.denoiser, find_part(DENOISERS, name)
        if not self.has_trained_denoiser():
            raise UserError(f"{path} does not exist: a denoiser belongs beside the autoencoder; --stage sdid trains it")
        build = partial(kind, spike_steps=self._denoiser_spike_steps, **self._neuron_of(denoiser_options(name)))
        denoiser = self._load(path, f"a denoiser of the kind {name}", build, kind.options_of)
        codes, wanted = autoencoder.codebook_size, denoiser.codebook_size
        if codes != wanted:
            raise UserError(f"{path} is for {wanted} codes, {self.autoencoder_path} has {codes}: use those of one run")
        return denoiser

    def has_trained_denoiser(self) -> bool:
        """Whether there is a denoiser beside the trained autoencoder."""
        return from_rank_0(self.trained.denoiser.is_file)

    def digest(self) -> str:
        """Identifies the trained weights in this folder, of both networks if both are there."""
        paths = (self.autoencoder_path, self.trained.denoiser)
        return digest(*(load_weights(path) for path in paths if path.is_file()))

    @property
    def neuron(self) -> Neuron:
        """Makes the neurons of a layer."""
        return choose_neuron(**vars(self.options.neuron))

    @property
    def _denoiser_spike_steps(self) -> int:
        return self.options.denoiser.denoiser_spike_steps or self.options.autoencoder.spike_steps

    def _not_in_weights(self, model: str) -> dict[str, Any]:
        """Options of an autoencoder that cannot be inferred from its weights."""
        names = {"spike_steps", "downsampling", "readout", "spike_generator"}
        known = model_options(model)
        return _chosen(names.intersection(known), vars(self.options.autoencoder)) | self._neuron_of(known)

    def _neuron_of(self, known: Iterable[str]) -> dict[str, Neuron]:
        """The neuron, if it is among the options that a network knows."""
        return _chosen({"neuron"}.intersection(known), {"neuron": self.neuron})

    def _prototypes(self, images: int) -> int:
        """Number of prototypes of the denoiser."""
        share = self.options.denoiser.images_per_prototype
        if "prototype" not in CONDITIONS[self.options.denoiser.condition]:
            return 0
        if share > images:
            raise UserError(f"too few training images ({images}): use --images_per_prototype {images} or less")
        return images // share

    def _classes(self, data: ImageData) -> int:
        """Number of classes whose labels the denoiser is conditioned on."""
        if "label" not in CONDITIONS[self.options.denoiser.condition]:
            return 0
        if data.class_names is None:
            condition = self.options.denoiser.condition
            raise UserError(f"--condition {condition}: {data.name} has no labels; use --condition prototype or none")
        return len(data.class_names)

    def _load_pretrained(self, load: Callable[[dict[str, Tensor]], Any], path: Path) -> None:
        """Load another run's weights with `load`."""
        weights = from_rank_0(partial(load_weights, path))
        if are_whole(weights):
            raise UserError(f"{path} is in whole numbers, which cannot be trained: name the run that it was made of")
        try:
            load(weights)
        except RuntimeError as error:
            raise UserError(f"{path} is of a different network: omit the options that change its shape") from error

    def _load(self, path: Path, kind: str, build: Callable[..., Network], shape_of: Callable[[dict], dict]) -> Network:
        weights = from_rank_0(partial(load_weights, path))
        try:
            with seeded(0):  # of weights that are replaced
                network = build(**shape_of(weights))
            if are_whole(weights):
                in_whole_numbers(network)
            network.load_state_dict(weights)
        except (KeyError, AttributeError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{path} does not hold the weights of {kind}") from error
        return self.machine.to_device(network)


def _chosen(names: Iterable[str], options: dict[str, Any], **others: Any) -> dict[str, Any]:
    """The options with these names; `others` take precedence, and options of neither keep the network's defaults."""
    known = options | others
    return {name: known[name] for name in names if name in known}
