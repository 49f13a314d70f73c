"""The library under the command line: a trained model with NumPy arrays in and out, training, and evaluation.

model = SpikingDiffusion.load("pretrained/fmnist")
images = model.sample(16, seed=1)
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import ImageData
from errors import UserError
from models.vq_autoencoder import VQAutoencoder
from parts import DATASETS
from pipeline.configuration import assemble
from pipeline.declaration import autoencoder_weights
from pipeline.evaluation.metrics import Evaluation
from pipeline.evaluation.records import context
from pipeline.evaluation.temperature import at_recorded_temperature
from pipeline.options import SAMPLE_METRICS, EvaluationOptions, names
from pipeline.parser import as_read
from pipeline.runtime.device import choose_machine
from pipeline.sampling.batches import decode_codes
from pipeline.sampling.image_models import CodeDiffusion
from pipeline.session import Session
from pipeline.stages import train

Labels = int | str | Sequence[int | str]
"""Classes, by number or name; "all" stands for all of them."""


class SpikingDiffusion:
    """A trained spiking autoencoder and the denoiser of its codes.

    Images are NumPy arrays uint8 `[N,C,H,W]`, codes int64 `[N,h,w]`. `model` holds the networks and the sampling
    settings, for whoever needs them as PyTorch modules.
    """

    def __init__(self, model: CodeDiffusion):
        self.model = model

    @classmethod
    def load(
        cls, path: str | Path, device: str = "auto", precision: str = "auto", **options: Any
    ) -> "SpikingDiffusion":
        """The model in a run folder, in a packed copy of one, or in a model.pth beside its diff_result/.

        `options` are named as on the command line and override those of the run, such as `temperature=0.8` or
        `sample_steps=20`. Raises UserError if there is no such model, if it draws from a prior instead of codes, or if
        its temperature, `auto`, has not been chosen by an evaluation.
        """
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

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 `[N,C,H,W]` to codes int64 `[N,h,w]`. Raises ValueError for images of another shape or type."""
        return self.model.encode(self._checked(images)).long().numpy()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes, integers `[N,h,w]` in 0..K-1, to images uint8 `[N,C,H,W]`. Raises ValueError for other codes."""
        grid, size = self.model.grid, self.model.autoencoder.codebook_size
        if codes.dtype.kind not in "iu" or codes.shape[1:] != grid or not len(codes):
            raise ValueError(f"integers [N,{grid[0]},{grid[1]}] expected, not {codes.dtype} {list(codes.shape)}")
        if not 0 <= codes.min() <= codes.max() < size:
            raise ValueError(f"codes from 0 to {size - 1} expected, not {codes.min()} to {codes.max()}")
        model = self.model
        tensor = torch.from_numpy(np.ascontiguousarray(codes, dtype=np.int64))
        return decode_codes(model.autoencoder, tensor, model.machine, model.batch_size).numpy()

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes that can be asked for, in the order of their numbers; None if the run recorded none."""
        return self.model.class_names

    def sample(
        self, count: int, seed: int | None = None, labels: Labels | None = None, guidance: float | None = None
    ) -> np.ndarray:
        """Draw `count` images uint8 `[N,C,H,W]`; image i depends on seed, i and its label alone.

        Args:
            count: N, at least 1.
            seed: by default, the run's.
            labels: classes to draw, by number or name; image i is of labels[i modulo their number]. By default those
                that the model was loaded with, or any.
            guidance: weight of classifier-free guidance; by default, the run's.

        Raises UserError for labels, guidance or a seed that the model cannot follow.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        return self._asked(seed, labels, guidance).draw(range(count)).numpy()

    def inpaint(
        self,
        images: np.ndarray,
        hidden: np.ndarray,
        seed: int | None = None,
        labels: Labels | None = None,
        guidance: float | None = None,
    ) -> np.ndarray:
        """Draw the pixels `hidden`, bool `[H,W]`, of images uint8 `[N,C,H,W]` anew, given the others; see `sample`.

        The codes of cells with a hidden pixel are drawn anew, and nothing of what was there is known. `labels` may be
        one for each image. `guidance` is of the labels: without them, UserError.
        """
        asked = self._asked(seed, labels, guidance)
        if guidance and not asked.labels:
            raise UserError("guidance when inpainting is of the labels: name them, or leave it out")
        pixels = self._checked(images)
        if hidden.dtype != bool or hidden.shape != self.image_shape[1:]:
            raise ValueError(
                f"hidden must be bool {list(self.image_shape[1:])}, not {hidden.dtype} {list(hidden.shape)}"
            )
        return asked.inpaint(pixels, torch.from_numpy(hidden)).numpy()

    def _asked(self, seed: int | None, labels: Labels | None, guidance: float | None) -> CodeDiffusion:
        given = {"seed": seed, "guidance": guidance}
        values = {name: as_read(name, value, "") for name, value in given.items() if value is not None}
        wanted = [labels] if isinstance(labels, str | int | np.integer) else labels
        return replace(self.model, **values).asked(wanted)

    def _checked(self, images: np.ndarray) -> torch.Tensor:
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or not len(images):
            shape = ",".join(map(str, self.image_shape))
            raise ValueError(f"images uint8 [N,{shape}] expected, not {images.dtype} {list(images.shape)}")
        return torch.from_numpy(np.ascontiguousarray(images))


def train_autoencoder(data: ImageData, result_path: str | Path, **options: Any) -> Path:
    """Train stage 1 on a data set and return the run folder, which is made below `result_path`.

    `options` are named as on the command line; `held_out` is that of the data. Images of your own, not loaded with
    `load_dataset`, have the name "ImageFolder" and sides that are multiples of `downsampling`. Raises UserError where
    the program would end with a message.
    """
    return _train("vqsvae", data, result_path, options)


def train_denoiser(data: ImageData, result_path: str | Path, **options: Any) -> Path:
    """Train stage 2 on the codes of a data set, in the folder where `train_autoencoder` left the autoencoder."""
    return _train("sdid", data, result_path, options)


def _train(stage: str, data: ImageData, result_path: str | Path, options: dict[str, Any]) -> Path:
    if data.name not in DATASETS:
        raise UserError(f"there is no data set {data.name}: images of your own have the name ImageFolder")
    about = {"dataset_name": data.name, "held_out": len(data.held_out)}
    session = open_session(data, stage=stage, result_path=Path(result_path), **{**about, **options})
    with session.run:
        train(session)
    return session.run.path


def evaluate(
    images: np.ndarray,
    data: ImageData,
    metrics: tuple[str, ...] | None = None,
    *,
    drawn: str = "",
    device: str = "auto",
    seed: int = 42,
    **options: Any,
) -> list[dict[str, Any]]:
    """Metrics of generated images, uint8 `[N,C,H,W]`, against a data set: records as in metrics.json.

    `metrics` are names of `--metrics`, by default all that are available. `drawn` is recorded as the images' origin.
    Further options: `reference`, `fid_weights`, `paper_fid_weights`, `fad_weights`. Raises UserError if a metric or
    an option does not exist, or a metric that is named cannot be computed.
    """
    machine = choose_machine(device, "float32")
    if unknown := set(metrics or ()) - set(SAMPLE_METRICS):
        known = ", ".join(SAMPLE_METRICS)
        raise UserError(f"no metric of images is named {', '.join(sorted(unknown))}: choose from {known}")
    if unknown := set(options) - set(names(EvaluationOptions)):
        raise UserError(f"the evaluation has no option {', '.join(sorted(unknown))}")
    values = {name: as_read(name, value, "") for name, value in {"metrics": metrics, **options}.items()}
    evaluation = Evaluation(EvaluationOptions(**values), data, machine, seed, len(images))
    records = evaluation.compute(torch.from_numpy(np.ascontiguousarray(images)), drawn)
    return [{**record, **context(machine)} for record in records]


def open_session(data: ImageData | None = None, **options: Any) -> Session:
    """A session with options named as on the command line, on the device that they name."""
    call = assemble(options)
    o = call.options.run
    return Session(call, choose_machine(o.device, o.precision), data)
