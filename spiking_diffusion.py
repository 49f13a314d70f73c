"""The library under the command line: a trained model with arrays in and out, training, and evaluation.

model = SpikingDiffusion.load("pretrained/fmnist")
images = model.sample(16, seed=1)

Arrays may be NumPy arrays, tensors or lists, of any integer type; results are NumPy arrays. What a caller can mend
raises UserError, a ValueError whose message is one line that names the argument; it is raised before anything is
computed or written. Every function computes as the command line does, in any thread and in whatever mode torch is, and
leaves torch's settings and random numbers as they were.
"""

import pipeline.runtime.threads  # noqa: F401  before torch

# isort: split
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from arrays import PIXELS, as_images, as_integers, as_mask, checked, image_data
from datasets import ImageData, load_dataset
from errors import UserError
from models.vq_autoencoder import VQAutoencoder
from parts import DATASETS, SAMPLE_METRICS
from pipeline.from_python import in_python, library_call
from pipeline.options.configuration import assemble, check_weights
from pipeline.options.declaration import autoencoder_weights, comma_separated
from pipeline.options.parser import as_read
from pipeline.options.sections import DataOptions, EvaluationOptions, SamplingOptions, names
from pipeline.runtime.device import choose_machine
from pipeline.sampling.batches import decode_codes
from pipeline.sampling.image_models import CodeDiffusion
from pipeline.session import Session, open_session

__all__ = [
    "ImageData",
    "SpikingDiffusion",
    "UserError",
    "evaluate",
    "image_data",
    "load_dataset",
    "train_autoencoder",
    "train_denoiser",
]

Array = ArrayLike | Tensor
Labels = int | str | Sequence[int | str] | Array
"""Classes, by number or name; "all" stands for all of them. A text may name several, separated by commas."""


class SpikingDiffusion:
    """A trained spiking autoencoder and the denoiser of its codes.

    Images are NumPy arrays uint8 `[N,C,H,W]`, codes int64 `[N,h,w]`. `model` holds the networks and the sampling
    settings, for whoever needs them as PyTorch modules; converted by `.half()`, `.bfloat16()` or `.double()`, they
    compute in that type.
    """

    def __init__(self, model: CodeDiffusion):
        self.model = model

    @classmethod
    @library_call()
    def load(
        cls, path: str | Path, device: str = "auto", precision: str = "auto", **options: Any
    ) -> "SpikingDiffusion":
        """The model in a run folder, in a packed copy of one, or in a model.pth beside its diff_result/.

        `options` are named as on the command line and override those of the run, such as `temperature=0.8` or
        `sample_steps=20`. Raises UserError if there is no such model, if it draws from a prior instead of codes, or if
        its temperature, `auto`, has not been chosen by an evaluation.
        """
        from pipeline.evaluation.temperature import at_recorded_temperature  # here because it loads much that is not

        _refuse(options, {"stage", "checkpoint"}, "load reads a model to draw with")
        _refuse(options, {"num_samples", "png", "report"}, "it draws and writes nothing by itself")
        options |= {"labels": _words(options["labels"])} if "labels" in options else {}
        weights = autoencoder_weights(str(path))
        session = open_session(checkpoint=weights, stage="sample", device=device, precision=precision, **options)
        autoencoder = session.load_autoencoder()
        if not isinstance(autoencoder, VQAutoencoder):
            raise UserError(f"{path} is of {session.options.autoencoder.model}, which has no codes")
        model = session.code_diffusion(autoencoder, session.networks.load_denoiser(autoencoder))
        return cls(at_recorded_temperature(session, model))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        model = self.model
        height, width = (side * model.autoencoder.downsampling for side in model.grid)
        return model.autoencoder.channels, height, width

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes that can be asked for, in the order of their numbers; None if the run recorded none."""
        return self.model.class_names

    @library_call()
    def encode(self, images: Array) -> np.ndarray:
        """Images `[N,C,H,W]`, whole numbers from 0 to 255, to codes int64 `[N,h,w]`. Raises UserError for others."""
        return self.model.encode(self._images(images)).long().numpy()

    @library_call()
    def decode(self, codes: Array) -> np.ndarray:
        """Codes, whole numbers `[N,h,w]` in 0..K-1, to images uint8 `[N,C,H,W]`. Raises UserError for others."""
        model = self.model
        checked = as_integers(codes, "codes", ("N", *model.grid), (0, model.autoencoder.codebook_size - 1))
        return decode_codes(model.autoencoder, checked, model.machine, model.batch_size).numpy()

    @library_call()
    def sample(
        self,
        count: int,
        seed: int | None = None,
        labels: Labels | None = None,
        guidance: float | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Draw `count` images uint8 `[N,C,H,W]`; image i depends on seed, i and its label alone.

        Args:
            count: N, at least 1.
            seed: as all that follow, by default that which the model was loaded with, or the run's.
            labels: classes to draw, by number or name; image i is of labels[i modulo their number]. By default any.
            guidance: weight of classifier-free guidance.
            settings: `temperature`, which divides the logits; `final_temperature`, that at the last timestep,
                approached linearly; `sample_steps`, the number of denoising timesteps, at most that of an image's
                codes; `reveal_order`, "random" or "spread".

        Raises UserError for settings that do not exist, and for labels, guidance, timesteps or other values that the
        model cannot follow.
        """
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            raise UserError(f"count must be a whole number, at least 1, not {count!r}")
        model = self._asked(seed, labels, guidance=guidance, **settings)
        return model.draw_images(range(count)).numpy()

    @library_call()
    def inpaint(
        self,
        images: Array,
        hidden: Array,
        seed: int | None = None,
        labels: Labels | None = None,
        guidance: float | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Draw the pixels `hidden`, True or 1 in `[H,W]`, of images `[N,C,H,W]` anew, given the others; see `sample`.

        The codes of cells with a hidden pixel are drawn anew, and nothing of what was there is known. `labels` may be
        one for each image. `guidance` is of the labels: without them, UserError.
        """
        model = self._asked(seed, labels, guidance=guidance, **settings)
        if guidance and not model.settings.labels:
            raise UserError("guidance when inpainting is of the labels: name them, or leave it out")
        pixels, mask = self._images(images), as_mask(hidden, "hidden", self.image_shape[1:])
        if not mask.any():
            raise UserError("hidden has no pixel that is True: there is nothing to inpaint")
        return model.inpaint(pixels, mask).numpy()

    def _asked(self, seed: int | None = None, labels: Labels | None = None, **settings: Any) -> CodeDiffusion:
        """The model at these settings, where they are not None."""
        if unknown := set(settings) - set(names(SamplingOptions)):
            known = ", ".join(["seed", *names(SamplingOptions)])
            raise UserError(f"sampling has no setting {', '.join(sorted(unknown))}: choose from {known}")
        values = {name: as_read(name, value, "") for name, value in settings.items() if value is not None}
        if values.get("temperature") == "auto":
            raise UserError('temperature must be a number here: load with temperature="auto" takes the chosen one')
        model = self.model if seed is None else replace(self.model, seed=as_read("seed", seed, ""))
        return model.asked(_words(labels), **values)

    def _images(self, images: Array) -> Tensor:
        return as_images(images, "images", ("N", *self.image_shape))


def _words(values: Any) -> list[int | str] | None:
    """What was named, by names and numbers: a list of them, an array, one alone, or a text with commas."""
    if values is None:
        return None
    if isinstance(values, str):
        return list(comma_separated(values))
    if isinstance(values, Tensor | np.ndarray | np.generic):
        values = values.tolist()
    each = list(values) if isinstance(values, Sequence) else [values]
    plain: list[Any] = [one.tolist() if isinstance(one, Tensor | np.ndarray) else one for one in each]
    return plain


def _refuse(options: dict[str, Any], unwanted: set[str], reason: str) -> None:
    """Raise UserError for options that have no place in a call."""
    if wrong := sorted(unwanted & options.keys()):
        raise UserError(f"{reason}: leave out {', '.join(wrong)}")


def train_autoencoder(data: ImageData, result_path: str | Path | None = None, **options: Any) -> Path:
    """Train stage 1 on a data set and return the run folder, which is made below `result_path` ("result").

    `data` are from `load_dataset`, or from arrays by `image_data`; sides of the images are multiples of `downsampling`.
    `options` are named as on the command line, without those of the data set. A training that has stopped, at
    `max_minutes` or by a signal, goes on with `resume=` its folder in the place of `result_path`. Raises UserError
    where the program would end with a message, and Interrupted, when it has saved, after a signal.
    """
    return _train("vqsvae", data, result_path, options)


def train_denoiser(data: ImageData, result_path: str | Path | None = None, **options: Any) -> Path:
    """Train stage 2 on the codes of a data set, in the folder where `train_autoencoder` left the autoencoder."""
    return _train("sdid", data, result_path, options)


@library_call()
def _train(stage: str, data: ImageData, result_path: str | Path | None, options: dict[str, Any]) -> Path:
    from pipeline.stages import train  # here because drawing needs nothing of it

    _refuse_data(options)
    _refuse(options, {"stage", "checkpoint"}, "the function says what is done")
    _refuse(options, {"report"}, "scripts/report.py writes reports")
    data = checked(data)
    if data.name not in DATASETS:
        raise UserError(f"there is no data set {data.name}: images of your own have the name ImageFolder")
    if not len(data.train):
        raise UserError("data.train is empty: there is nothing to learn from")
    place: dict[str, Any] = {} if result_path is None else {"result_path": result_path}
    about = {} if "resume" in options else {"dataset_name": data.name}
    call = assemble({"stage": stage, **place, **about, **options})
    o = call.options.run
    with call.run:
        session = Session(call, choose_machine(o.device, o.precision), data)
        if not train(session):
            print(in_python(f"--max_minutes {o.max_minutes:g} reached: saved; {call.run.resume_hint}"))
    return call.run.path


def _refuse_data(options: dict[str, Any]) -> None:
    _refuse(options, set(names(DataOptions)), "the data set is passed as it is, so load_dataset has its options")


@library_call()
def evaluate(
    images: Array,
    data: ImageData,
    metrics: str | Sequence[str] | None = None,
    *,
    drawn: str = "",
    device: str = "auto",
    seed: int = 42,
    **options: Any,
) -> list[dict[str, Any]]:
    """Metrics of generated images, uint8 `[N,C,H,W]`, against a data set: records as in metrics.json.

    `metrics` are names of `--metrics`, by default all that are available. `drawn` is recorded as the images' origin.
    Further options: `reference`, `fid_weights`, `paper_fid_weights`, `fad_weights`. Raises UserError if a metric or
    an option does not exist, if the images are not of the size and channels of the data set, or if a metric that is
    named cannot be computed.
    """
    from pipeline.evaluation.image_records import evaluate_images  # here because drawing needs nothing of it

    wanted = _words(metrics)
    unknown = set(map(str, wanted or ())) - set(SAMPLE_METRICS)
    if unknown or wanted == []:
        wrong = f"no metric of images is named {', '.join(sorted(unknown))}" if unknown else "metrics: none is named"
        raise UserError(f"{wrong}: choose from {', '.join(SAMPLE_METRICS)}")
    _refuse_data(options)
    if unknown := set(options) - set(names(EvaluationOptions)):
        raise UserError(f"the evaluation has no option {', '.join(sorted(unknown))}")
    values = {name: as_read(name, value, "") for name, value in {"metrics": wanted, **options}.items()}
    chosen, seed = EvaluationOptions(**values), as_read("seed", seed, "")
    check_weights(chosen)
    machine = choose_machine(as_read("device", device, ""), "float32")
    data = checked(data)
    pixels = as_integers(images, "images", ("N", *data.shape), PIXELS, np.uint8)
    return evaluate_images(pixels, data, chosen, machine, seed, drawn, lambda line: print(in_python(line)))
