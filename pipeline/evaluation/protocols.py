"""The protocols of the metrics of generated images: network, counts of images, split, and how values are computed.

`SAMPLE_METRICS` in parts.py is the table of their names.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets import ImageData
from metrics.classifier import (
    FEATURES,
    accuracy,
    class_balance,
    classifier_distance,
    classifier_logits,
    mean_confidence,
)
from metrics.fad import FAD_IMAGES, fad
from metrics.fad import FEATURES as FAD_FEATURES
from metrics.fid import (
    FEWEST_IMAGES,
    FEWEST_SCORED,
    FID_IMAGES,
    FULL_RANK,
    KID_SUBSET_SIZE,
    PAPER_IMAGES,
    fid,
    inception_score,
    kid,
    paper_fid,
)
from metrics.frechet import feature_statistics, frechet_distance
from metrics.inception import inception_logits
from metrics.manifold import manifold_metrics
from metrics.memorisation import memorisation
from pipeline.evaluation.cache import forget
from pipeline.evaluation.feature_networks import kept_features
from pipeline.evaluation.loaders import FeatureNetwork

GENERATED = "generated"  # in the names of cached features of images that are not of a data set
DAYS_KEPT = 7.0  # those features
MEMORISATION_IMAGES = 1000
RECOGNITION_IMAGES = 500
Values = dict[str, float]


class Features:
    """Features of generated and of real images, each extracted when first used; `seed` is for KID's subsets.

    `split` names the reference split, or several, as in "train+held_out", and `first`, where it is not None, how many
    of its images are used. `labels [N]` are those that the generated images were drawn with; None where they were drawn
    without, or the data set has no classes.
    """

    def __init__(
        self,
        source: FeatureNetwork[Any],
        images: Tensor,
        data: ImageData,
        split: str,
        first: int | None,
        seed: int,
        labels: Tensor | None = None,
    ):
        self.source, self.images, self.data, self.seed = source, images, data, seed
        self.network = source.network
        self.split, self.first = split, first
        self.labels = None if labels is None or data.class_names is None else labels[: len(images)]

    @cached_property
    def generated(self) -> np.ndarray:
        """Of the generated images: `[N,D]`; from the cache if they are there."""
        forget(f"*-{GENERATED}-*", DAYS_KEPT)
        return kept_features(self.network, self.source.extract, self.images, GENERATED)

    @cached_property
    def logits(self) -> np.ndarray:
        """The classifier's, of the generated images: `[N,L]`; the network must be the classifier."""
        return classifier_logits(self.generated, self.network)

    @cached_property
    def real(self) -> np.ndarray:
        """Of the real images of the reference split: `[M,D]`."""
        return self.of(self.split)

    @property
    def real_labels(self) -> Tensor:
        """Of the real images of the reference split: `[M]`; the data set must have classes."""
        return getattr(self.data, f"{self.split}_labels")

    def of_class(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the generated and of the real images with this label."""
        assert self.labels is not None
        return self.generated[(self.labels == label).numpy()], self.real[(self.real_labels == label).numpy()]

    @property
    def real_count(self) -> int:
        """The number of real images."""
        return len(real_images(self.data, self.split)[: self.first])

    def of(self, split: str) -> np.ndarray:
        """Of the images of a split: `[M,D]`; from the cache if they are there."""
        name, images = f"{Path(self.data.name).name}-{split}", real_images(self.data, split)[: self.first]
        return kept_features(self.network, self.source.extract, images, name)


def real_images(data: ImageData, split: str) -> Tensor:
    """Images uint8 `[M,C,H,W]` of a split, or of several, as in "train+held_out"."""
    return torch.cat([getattr(data, part) for part in split.split("+")])


class Metric(NamedTuple):
    """How a metric of generated images is computed.

    Attributes:
        network: whose features it is computed from.
        generated: the number of generated images: the first, if there are more.
        real: the smallest number of real images.
        values: computes its values, by name.
        split: the reference split that its protocol fixes, whatever `--reference` says.
        protocol: what has to be reported besides its network.
        fewest: where it is named, it is computed of fewer images, too, generated or real, down to this number, and
            then has another name; None: it is not.
        first_real: the number of real images, where the protocol fixes it.
        at_least: `generated` is the smallest number, and all images are used.
        by_name: it is computed only where it is named.
    """

    network: str
    generated: int
    real: int
    values: Callable[[Features], Values]
    split: str | None = None
    protocol: str = ""
    fewest: int | None = None
    first_real: int | None = None
    at_least: bool = False
    by_name: bool = False

    def least(self, side: str) -> int:
        """The smallest number of images on a side, "generated" or "real", that it is computed of where it is named."""
        protocol: int = getattr(self, side)
        return protocol if self.fewest is None else min(self.fewest, protocol)

    def marked(self, name: str, generated: int, real: int) -> str:
        """The name of a value that is computed of so many images: another one if the protocol has more."""
        short = [count for count, of in ((generated, self.generated), (real, self.real)) if count < of]
        return f"{name}_{min(short)}_images" if short else name


def _fid(name: str, network: str, generated: int, real: int = FULL_RANK, **more: Any) -> Metric:
    def values(features: Features) -> Values:
        return {name: fid(features.generated, features.real)}

    return Metric(network, generated, real, values, fewest=FEWEST_IMAGES, **more)


def _paper_fid(features: Features) -> Values:
    return {"paper_fid": paper_fid(features.generated, features.real)}


def _fad(features: Features) -> Values:
    return {"fad": fad(features.generated, features.source.reference)}


def _kid(features: Features) -> Values:
    return dict(zip(("kid", "kid_std"), kid(features.generated, features.real, features.seed), strict=True))


def _inception_score(features: Features) -> Values:
    score = inception_score(inception_logits(features.generated, features.network))
    return dict(zip(("inception_score", "inception_score_std"), score, strict=True))


def _prdc(features: Features) -> Values:
    return manifold_metrics(features.generated, features.real)._asdict()


def _classifier_metrics(features: Features) -> Values:
    prdc = {f"classifier_{name}": value for name, value in _prdc(features).items()}
    return {"classifier_frechet": classifier_distance(features.generated, features.real), **prdc}


def _recognition(features: Features) -> Values:
    """The share of images drawn with a label that are recognised as it, if there are any; what else logits tell."""
    drawn, real = features.logits, classifier_logits(features.real, features.network)
    values = {
        "classifier_accuracy": accuracy(real, features.real_labels),
        "confidence": mean_confidence(drawn),
        "confidence_real": mean_confidence(real),
        "class_balance": class_balance(drawn),
    }
    return values if features.labels is None else {"label_accuracy": accuracy(drawn, features.labels), **values}


def _memorisation(features: Features) -> Values:
    unseen = features.of("held_out" if len(features.data.held_out) else "test")
    result = memorisation(features.generated, features.of("train"), unseen)
    return {"memorisation": result.nearer, "memorisation_nearest": result.nearest_is_training}


def _distance_of_class(features: Features, label: int) -> float | None:
    """Fréchet distance within a class; None where it has no more images than there are features."""
    generated, real = features.of_class(label)
    if min(len(generated), len(real)) <= generated.shape[1]:
        return None
    return frechet_distance(*feature_statistics(generated), *feature_statistics(real))


def _accuracy_of_class(features: Features, label: int) -> float | None:
    """Fraction of the images drawn with this label that are classified as it; None if there are no such images."""
    assert features.labels is not None
    own = features.labels == label
    return accuracy(features.logits[own.numpy()], features.labels[own]) if own.any() else None


PER_CLASS = {"fad": _distance_of_class, "classifier_frechet": _distance_of_class, "label_accuracy": _accuracy_of_class}
"""What is computed of each class, too, for images that were drawn with labels."""

UNSEEN = "against held-out images, or where none are held out, test images"
FID = _fid("fid", "inception", FID_IMAGES)
FID_50K = _fid(
    "fid_50k", "inception", 50_000, 50_000, split="train+held_out", protocol="as SDDPM and SDM", by_name=True
)
CLEAN_FID = _fid("clean_fid", "clean inception", FID_IMAGES, protocol="as FSDDIM")
CLEAN_FID_5K = _fid("clean_fid_5k", "clean inception", 5000, protocol="as FSVAE and ESVAE")
KID = Metric("inception", FID_IMAGES, KID_SUBSET_SIZE, _kid, fewest=KID_SUBSET_SIZE)
INCEPTION_SCORE = Metric("inception classifier", FID_IMAGES, 0, _inception_score, fewest=FEWEST_SCORED)
PRDC = Metric("inception", FID_IMAGES, FULL_RANK, _prdc, fewest=FEWEST_IMAGES)
PAPER_FID = Metric("paper", PAPER_IMAGES, PAPER_IMAGES, _paper_fid, "test", first_real=PAPER_IMAGES)
FAD = Metric("fad", FAD_IMAGES, 0, _fad, "test", fewest=FAD_FEATURES + 1)
CLASSIFIER = Metric("classifier", FAD_IMAGES, FEATURES + 1, _classifier_metrics, at_least=True)
RECOGNITION = Metric("classifier", RECOGNITION_IMAGES, 1, _recognition, at_least=True)
MEMORISATION = Metric("classifier", MEMORISATION_IMAGES, 1, _memorisation, "train", UNSEEN, at_least=True)
