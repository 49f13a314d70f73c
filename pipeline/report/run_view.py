"""What the page shows of one run: read from its folder if it is there, else computed with its networks and data."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from datasets import ImageData, needs_download
from errors import UserError, say_on_stderr
from pipeline.evaluation.records import comparable, sampling_of
from pipeline.evaluation.temperature import at_recorded_temperature
from pipeline.lineage import Cost, costs, images_before
from pipeline.report.pictures import Picture, animation, picture
from pipeline.report.plots import Curve, Plot, bar_plot, in_digits, line_of
from pipeline.run_folder import LOG_KEYS
from pipeline.sampling.grids import ungrid
from pipeline.sampling.image_models import CodeDiffusion, ImageModel
from pipeline.sampling.sample_files import GRID_IMAGES, load_samples
from pipeline.session import Session
from pixels import to_float

COLUMNS = 8  # of the grids
CHUNK = 4096  # training images compared at a time
PARTS = ("encode", "decode", "denoiser_pass", "sample")
ENERGY = "energy, µJ per image"

Value = TypeVar("Value")


class Shown(NamedTuple):
    """Pictures or plots, and what they show."""

    figures: Sequence[Picture | Plot]
    caption: str


class Missing(NamedTuple):
    """Why something is left out."""

    reason: str


class Drawn(NamedTuple):
    """Samples, uint8 `[N,C,H,W]`; a description of how they were drawn; and the `trajectory [2,L,3,H,W]` of the first.

    The trajectory is None for a model without one. `classes` is the number of classes that took turns, or 0.
    """

    images: Tensor
    description: str
    trajectory: Tensor | None
    classes: int = 0


def attempt(what: str, compute: Callable[[], Value]) -> Value | Missing:
    """What `compute` returns, or why it failed: a page with a gap is better than an error after a training.

    A UserError says that something is missing; any other exception is a bug, which is also reported on stderr.
    """
    try:
        return compute()
    except UserError as error:
        return Missing(str(error))
    except Exception as error:  # whatever a library raises; nothing that was trained or measured may depend on it
        reason = f"{type(error).__name__}: {error}"
        say_on_stderr(f"warning: the report lacks {what} ({reason})")
        return Missing(f"This could not be drawn ({reason}).")


class RunView:
    """One run; `number` counts the runs of the page from 0."""

    def __init__(self, session: Session, number: int):
        self.session, self.options = session, session.options
        self.trained = session.networks.trained
        self.name, self.line = str(session.run.path).encode("utf-8", "backslashreplace").decode(), line_of(number)

    @cached_property
    def is_known(self) -> bool:
        """Whether the options are those of the run; a folder of weights without config.json does not record them."""
        return self.session.has_data or bool(self.trained.read_config())

    def model(self, draws: bool = True) -> ImageModel:
        """The trained model. Raises UserError if there is none."""
        if not self.is_known:
            raise UserError(f"{self.trained.config} does not exist: it would tell which data the weights are for.")
        return self.session.read_model(draws)

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.json. Raises UserError if there are none."""
        records = self.session.run.read_records()
        if not records:
            raise UserError("There is no metrics.json: the run has not been evaluated.")
        return records

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl. Raises UserError if there are none."""
        log = self.trained.read_log()
        if not log:
            raise UserError("There is no log.jsonl with a finished epoch.")
        return log

    @cached_property
    def data(self) -> ImageData:
        """The data set. Raises UserError if it is not in its folder; nothing is downloaded for a report."""
        o = self.options.data
        if not self.is_known:
            raise UserError(f"{self.trained.config} does not exist: it would tell which data the run is of.")
        if not self.session.has_data and needs_download(o.dataset_name, o.data_path):
            raise UserError(f"{o.dataset_name} is not in {o.data_path}: use scripts/report.py --data_path DIR.")
        return self.session.data

    @property
    def other_data(self) -> str:
        """A sentence that says how the data differ from the training's; empty if they do not."""
        change = self.session.data_change(self.data)
        return f" {change}." if change else ""

    @cached_property
    def drawn(self) -> Drawn:
        """The samples in the run folder if these weights drew them, else new ones. Raises UserError as `model` does."""
        folder, found = self.session.run.samples, load_samples(self.session.run.samples)
        if found and found[1].get("weights") == self.session.networks.digest():
            images, settings = found
            strip = folder / "trajectory.png"
            trajectory = ungrid(pil_to_tensor(Image.open(strip)), *images.shape[2:]) if strip.exists() else None
            return Drawn(images[:GRID_IMAGES], settings["drawn"], trajectory, len(settings.get("labels", ())))
        model = self.model()
        if not isinstance(model, CodeDiffusion):
            return Drawn(model.draw_images(range(GRID_IMAGES)), model.drawn, None)
        model = at_recorded_temperature(self.session, model)
        return Drawn(model.draw_images(range(GRID_IMAGES)), model.drawn, model.trajectory())

    def curves(self) -> dict[tuple[int, str, str], Curve]:
        """Each logged value against the images seen, by stage number, name, and what it is comparable within."""
        curves = {}
        for stage in (1, 2):
            epochs = [line for line in self.log if stage_of(line) == stage]
            seen = list(accumulate(line["images"] for line in epochs))
            before = images_before(self.trained.lineage, epochs[0]["stage"], seen[-1]) if epochs else 0
            seen = [before + images for images in seen]
            for key in dict.fromkeys(key for line in epochs for key in line if key not in {*LOG_KEYS, "time"}):
                points = [(images, line[key]) for images, line in zip(seen, epochs, strict=True) if key in line]
                x, y = zip(*points, strict=True)
                curves[stage, key, self._kind(stage)] = Curve(self.name, self.line, x, y)
        return curves

    def _kind(self, stage: int) -> str:
        """What the losses of a stage depend on besides the network: the data set, and the loss that was chosen."""
        o = self.options
        return o.data.dataset_name + (
            f", {o.training.loss}" if stage == 2 else ", clipped error" * o.autoencoder.clipped_error
        )

    def metrics(self) -> dict[tuple[str, str], str]:
        """The values, as text, by name and protocol; if there are several, each with the settings of its samples."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in self.records:
            dataset = self.options.data.dataset_name if self.is_known else ""
            found.setdefault((record["name"], comparable(record, dataset)), []).append(record)
        return {key: _side_by_side(records) for key, records in found.items()}

    def circumstances(self) -> list[str]:
        """What else is known of the metrics: how the images were drawn, and whether the data are those of the run."""
        return list(
            dict.fromkeys(record[key] for record in self.records for key in ("drawn", "data_change") if key in record)
        )

    def costs(self) -> list[Cost]:
        """What each stage cost, over all trainings that led to the weights. Raises UserError if that is not known."""
        found = costs(self.trained.lineage)
        if not found:
            raise UserError("config.json has no lineage that says which trainings led to these weights.")
        return found

    def samples(self) -> Shown:
        """A grid of samples; if classes were requested, with a column for each."""
        images, classes = self.drawn.images, self.drawn.classes
        columns = COLUMNS
        if 1 < classes < len(images):
            columns, images = classes, images[: len(images) // classes * classes]
        alt = f"Grid of {len(images)} samples, {columns} a row"
        return Shown([picture(images, columns, alt)], f"{len(images)} samples: {self.drawn.description}.")

    def trajectory(self) -> Shown:
        """How the first sample took shape, as an animation and as a strip."""
        moments = self.drawn.trajectory
        if moments is None:
            raise UserError("The model draws from a prior: no sample takes shape step by step.")
        what = "grid of codes from all masked to finished, and the part of the image decided so far"
        alt = f"The first sample takes shape: {what}"
        figures = [
            animation(moments.transpose(0, 1), f"Animation. {alt}"),  # [2,L,...] -> [L,2,...]
            picture(
                moments.flatten(0, 1), moments.shape[1], f"{alt}; at {moments.shape[1]} moments from left to right"
            ),
        ]
        return Shown(figures, f"The first sample takes shape: {what}.")

    def reconstructions(self) -> Shown:
        """Test images above their reconstructions."""
        originals = self.data.test[:COLUMNS]
        pairs = torch.cat((originals, self.model(draws=False).reconstruct(originals)))
        caption = "Test images; below each, its reconstruction."
        return Shown([picture(pairs, len(originals), caption)], caption + self.other_data)

    def nearest(self) -> Shown:
        """Samples above the training images nearest to them."""
        train, images = self.data.train, self.drawn.images
        places, distances = nearest(images, train)
        _, usual = nearest(self.data.test[: len(images)], train)
        pairs = torch.cat((images[:COLUMNS], train[places[:COLUMNS]]))
        alt = "Samples; below each, the training image nearest in pixels."
        caption = (
            f"{alt} RMS distance of {len(distances)} samples to theirs: median {distances.median():.3f}, smallest "
            f"{distances.min():.3f}; of {len(usual)} test images: {usual.median():.3f}, {usual.min():.3f} (black to "
            f"white: 1; a copy: 0).{self.other_data}"
        )
        return Shown([picture(pairs, min(COLUMNS, len(images)), alt)], caption)

    def firing_rates(self) -> Shown:
        """Spikes of each layer."""
        layers: dict[str, float] = self.latest.get("firing_rate", {}).get("layers", {})
        if not layers:
            raise UserError("metrics.json has no firing rates: --metrics energy computes them.")
        groups: dict[str, dict[str, float]] = {}
        for name, rate in layers.items():
            part, _, layer = name.partition(": ")
            groups.setdefault(part, {})[layer] = rate
        title = "spikes per neuron and spike step"
        caption = f"Share of the neurons of each layer that fire at a spike step.{self._settings_of('firing_rate')}"
        return Shown([bar_plot(title, groups, self.line.colour)], caption)

    def energy(self) -> Shown:
        """Energy of each layer, or of each part if the records are older than the count by layer."""
        parts = [self.latest[f"energy_{name}"] for name in PARTS if f"energy_{name}" in self.latest]
        if not parts:
            raise UserError("metrics.json has no energy: --metrics energy computes it.")
        groups = {part["name"].removeprefix("energy_"): part["layers"] for part in parts if "layers" in part}
        caption = "Energy of each layer with synapses; the protocols are among the metrics."
        if not groups:
            groups = {"parts": {part["name"].removeprefix("energy_"): part["value"] for part in parts}}
            if "denoiser_pass" in groups["parts"]:  # a sample takes many passes and would dwarf the rest
                groups["parts"].pop("sample", None)
            caption = "Energy of each part. metrics.json has no values by layer: --metrics energy computes them."
        return Shown([bar_plot(ENERGY, groups, self.line.colour)], caption + self._settings_of("energy_sample"))

    @cached_property
    def latest(self) -> dict[str, dict[str, Any]]:
        """The records by name; of several settings of sampling, those that were computed last."""
        return {record["name"]: record for record in self.records}

    def _settings_of(self, name: str) -> str:
        """How the samples of the latest record of this name were drawn, if there are others."""
        several = sum(record["name"] == name for record in self.records) > 1
        return f" Samples: {self.latest[name].get('drawn', 'unknown')}." if several else ""


def stage_of(line: dict[str, Any]) -> int:
    """The number of the stage of a line of log.jsonl."""
    return 2 if line["stage"] == "sdid" else 1


def _side_by_side(records: Sequence[dict[str, Any]]) -> str:
    """The values of one metric, as text."""
    if len(records) == 1:
        return in_digits(records[0]["value"])
    settings = [sampling_of(record) for record in records]
    keys = dict.fromkeys(key for each in settings for key in each)
    changed = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
    words = [", ".join(f"{key.replace('_', ' ')} {each.get(key)}" for key in changed) for each in settings]
    return "; ".join(f"{in_digits(each['value'])} ({how})" for each, how in zip(records, words, strict=True))


def nearest(images: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest of `train [M,C,H,W]` to each of `images [N,C,H,W]`, and the distance to it: both `[N]`.

    The distance is the root mean square over the pixels on the scale [0,1]. All are uint8.
    """
    flat, least = to_float(images.flatten(1)), torch.full((len(images),), float("inf"))
    places = torch.zeros(len(images), dtype=torch.int64)
    for start in range(0, len(train), CHUNK):
        distances, here = torch.cdist(flat, to_float(train[start : start + CHUNK].flatten(1))).min(1)
        places = torch.where(distances < least, here + start, places)
        least = torch.minimum(least, distances)
    exact = (flat - to_float(train[places].flatten(1))).square().mean(1).sqrt()  # cdist rounds away small distances
    return places, exact
