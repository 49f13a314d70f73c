"""Choosing a sampling temperature on held-out training images, never on the test split."""

import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets import ImageData, digest
from errors import UserError
from metrics.fad import FEATURES, Statistics, fad_features
from metrics.frechet import feature_statistics, frechet_distance
from pipeline.checkpoints import write_json
from pipeline.evaluation.feature_networks import FadNetwork, fad_network, kept_features
from pipeline.run_folder import RunFolder
from pipeline.runtime.device import Machine
from pipeline.runtime.processes import from_rank_0
from pipeline.sampling.image_models import CodeDiffusion, ImageModel
from pipeline.session import Session

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
IMAGES = 500  # drawn at each, from the same noise, so that they differ by the temperature alone


def check_held_out(data: ImageData) -> None:
    """Raise UserError if too few images are held out to choose a temperature."""
    if len(data.held_out) <= FEATURES:
        fewest = f"more than {FEATURES} images that no training sees, not {len(data.held_out)}"
        raise UserError(f"--temperature auto needs {fewest}: train with --held_out 1001, or choose a temperature")


@dataclass(frozen=True)
class _HeldOut:
    """How far samples are from the held-out images. The first process alone asks, and then loads the networks."""

    data: ImageData
    fad_weights: Path | None
    machine: Machine

    @cached_property
    def fad(self) -> FadNetwork:
        """The network whose features are compared."""
        return fad_network(self.data, self.fad_weights, self.machine)

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance of the held-out images' features."""
        name = f"{self.data.name}-held_out"
        return feature_statistics(kept_features(self.fad.network, fad_features, self.data.held_out, name))

    def distance(self, images: Tensor) -> float:
        """Fréchet autoencoder distance of images uint8 `[N,C,H,W]`."""
        return frechet_distance(*feature_statistics(fad_features(images, self.fad.network)), *self.statistics)

    def identity(self) -> dict[str, str]:
        """Digests of what the distance depends on."""
        return {"held_out": digest(self.data.held_out), "fad_network": digest(self.fad.network.state_dict())}

    def protocol(self) -> str:
        """What the distance is, in words."""
        count = len(self.data.held_out)
        return f"Fréchet autoencoder distance ({self.fad.protocol}) of {IMAGES} samples to {count} held-out images"


def choose_temperature(
    model: CodeDiffusion, data: ImageData, fad_weights: Path | None, run: RunFolder, weights: str
) -> float:
    """The one of TEMPERATURES with the smallest Fréchet autoencoder distance between samples and held-out images.

    Writes all distances to temperature.json, with what they depend on: a later call with the same settings draws no
    images. `weights` is the digest of the model's. Raises UserError where too few images are held out.
    """
    check_held_out(data)
    held_out = _HeldOut(data, fad_weights, model.machine)
    path = run.path / "temperature.json"
    settings = {"weights": weights, **model.record, "temperatures": list(TEMPERATURES), "images": IMAGES}
    depends_on = from_rank_0(lambda: settings | held_out.identity())
    chosen = from_rank_0(lambda: _chosen_before(path, depends_on))
    if chosen is not None:
        return chosen
    distances = {}
    for temperature in TEMPERATURES:
        images = model.asked(temperature=temperature).draw_images(range(IMAGES))
        distances[temperature] = from_rank_0(partial(held_out.distance, images))
        print(f"temperature {temperature:g}: distance to held-out images {distances[temperature]:.2f}", flush=True)
    best = min(distances, key=distances.__getitem__)
    protocol = from_rank_0(held_out.protocol)
    write_json(path, {"temperature": best, "distances": distances, "protocol": protocol, "depends_on": depends_on})
    return best


def _read(path: Path) -> tuple[float | None, dict[str, Any]]:
    """The temperature in the file, and what it depends on; None where there is none."""
    try:
        content = dict(**json.loads(path.read_text(encoding="utf-8")))
        depends_on = dict(**content["depends_on"])
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{path} cannot be read ({error}): the temperature has to be chosen again")
        return None, {}
    temperature = content.get("temperature")
    return (temperature, depends_on) if temperature in TEMPERATURES else (None, {})


def _chosen_before(path: Path, depends_on: dict[str, Any]) -> float | None:
    """The temperature in the file, if it was chosen with the same networks, settings and images."""
    temperature, before = _read(path)
    if temperature is None or before != depends_on:
        return None
    print(f"temperature {temperature:g}, as chosen before in {path}")
    return temperature


def recorded_temperature(run: RunFolder, weights: str) -> float:
    """The temperature that an evaluation has chosen for `weights`, a digest. Raises UserError if none has."""
    temperature, before = _read(run.path / "temperature.json")
    if temperature is None or before.get("weights") != weights:
        raise UserError(f"no temperature has been chosen for the weights in {run.path}: evaluate them, or name one")
    return temperature


def at_recorded_temperature(session: Session, model: CodeDiffusion) -> CodeDiffusion:
    """The model at the temperature of the options; with "auto", at the one that an evaluation has chosen.

    Nothing is drawn, and no data are needed. Raises UserError if none has been chosen.
    """
    if session.options.sampling.temperature != "auto":
        return model
    temperature = recorded_temperature(session.run, session.networks.digest())
    return model.asked(temperature=temperature, temperature_chosen=True)


def with_temperature(session: Session, model: ImageModel) -> ImageModel:
    """The model at the temperature of the options; with "auto", at one that is chosen on held-out images."""
    o = session.options
    if o.sampling.temperature != "auto" or not isinstance(model, CodeDiffusion):
        return model
    weights = session.networks.digest()
    temperature = choose_temperature(model, session.data, o.evaluation.fad_weights, session.run, weights)
    return model.asked(temperature=temperature, temperature_chosen=True)
