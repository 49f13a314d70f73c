"""Metrics of generated images: which are available, and how they are computed, each with its protocol."""

from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from datasets import ImageData
from errors import UserError
from metrics.classifier import (
    FEATURES,
    accuracy,
    class_balance,
    classifier_distance,
    classifier_logits,
    mean_confidence,
)
from metrics.counts import check_enough
from metrics.fad import FAD_IMAGES, fad
from metrics.fid import (
    FEWEST_IMAGES,
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
from pipeline.evaluation.feature_networks import reference_features
from pipeline.evaluation.loaders import LOADERS, FeatureNetwork
from pipeline.evaluation.records import context, make_record
from pipeline.options import EvaluationOptions
from pipeline.runtime.device import Machine
from pipeline.runtime.processes import from_rank_0, is_rank_0

FID_IMAGES = 10_000  # generated for FID, as is usual
MEMORISATION_IMAGES = 1000
RECOGNITION_IMAGES = 500
Values = dict[str, float]


class Features:
    """Features of generated and of real images, each extracted when first used; `seed` is for KID's subsets.

    The number of generated images is that of the protocol, or with `whole` all. `labels [N]` are those that they were
    drawn with; None where they were drawn without, or the data set has no classes.
    """

    def __init__(
        self,
        source: FeatureNetwork[Any],
        images: Tensor,
        data: ImageData,
        split: str,
        seed: int,
        whole: bool = False,
        labels: Tensor | None = None,
    ):
        self.source, self.data, self.seed = source, data, seed
        self.network = source.network
        self.split = "test" if source.fixed else split
        first, real_first = source.fixed or (None, None)
        self.real_first: int | None = real_first
        self.images = images if whole else images[:first]
        self.labels = None if labels is None or data.class_names is None else labels[: len(self.images)]

    @cached_property
    def generated(self) -> np.ndarray:
        """Of the generated images: `[N,D]`."""
        return self.source.extract(self.images, self.network)

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

    def real_images(self, split: str) -> Tensor:
        """The images of a split, as many as the protocol says."""
        return getattr(self.data, split)[: self.real_first]

    def of(self, split: str) -> np.ndarray:
        """Of the images of a split: `[M,D]`; from the cache if they are there."""
        name = f"{Path(self.data.name).name}-{split}"
        return reference_features(self.network, self.source.extract, self.real_images(split), name)


class Metric(NamedTuple):
    """How a metric of generated images is computed.

    Attributes:
        network: whose features it is computed from.
        generated: the smallest number of generated images.
        real: the smallest number of real images.
        values: computes its values, by name.
        split: the reference split that its protocol fixes, whatever `--reference` says.
        protocol: what has to be reported besides its network.
    """

    network: str
    generated: int
    real: int
    values: Callable[[Features], Values]
    split: str | None = None
    protocol: str = ""


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

GENERATED_METRICS = {
    "fid": Metric("inception", FID_IMAGES, FEWEST_IMAGES, lambda both: {"fid": fid(both.generated, both.real)}),
    "kid": Metric("inception", FID_IMAGES, KID_SUBSET_SIZE, _kid),
    "is": Metric("inception", FID_IMAGES, 0, _inception_score),
    "prdc": Metric("inception", FID_IMAGES, FEWEST_IMAGES, _prdc),
    "paper_fid": Metric(
        "paper",
        PAPER_IMAGES,
        PAPER_IMAGES,
        lambda both: {"paper_fid": paper_fid(both.generated, both.real)},
        split="test",
    ),
    "fad": Metric("fad", FAD_IMAGES, 0, lambda both: {"fad": fad(both.generated, both.source.reference)}, "test"),
    "classifier": Metric("classifier", FAD_IMAGES, FEATURES + 1, _classifier_metrics),
    "recognition": Metric("classifier", RECOGNITION_IMAGES, 1, _recognition),
    "memorisation": Metric(
        "classifier",
        MEMORISATION_IMAGES,
        1,
        _memorisation,
        "train",
        "against held-out images, or where none are held out, test images",
    ),
}


class Evaluation:
    """The available metrics of generated images, determined before any image is drawn.

    Args:
        options: which metrics, the reference split, and the feature networks' weights. Where no metrics are named, all
            that are available are computed, and a line, by `say`, tells which are not.
        data: the real images, and what feature networks are trained on.
        machine: where the feature networks run.
        seed: of KID's subsets.
        num_samples: number of generated images; None: as many as the metrics need.

    Of several processes, rank 0 alone has the networks and computes the metrics. Raises UserError if a metric that is
    named cannot be computed.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        data: ImageData,
        machine: Machine,
        seed: int,
        num_samples: int | None = None,
        say: Callable[[str], None] = print,
    ):
        self.options, self.data, self.machine = options, data, machine
        self.seed, self.num_samples = seed, num_samples
        self.networks: dict[str, FeatureNetwork[Any] | UserError] = {}
        wanted = [name for name in GENERATED_METRICS if options.metrics is None or name in options.metrics]
        obstacles = from_rank_0(lambda: {name: self._obstacle(GENERATED_METRICS[name]) for name in wanted})
        self.metrics = {name: GENERATED_METRICS[name] for name in wanted if not obstacles[name]}
        for obstacle in filter(None, dict.fromkeys(obstacles.values())):
            missing = f"no {', '.join(name for name in wanted if obstacles[name] == obstacle)}: {obstacle}"
            if options.metrics is not None:
                raise UserError(missing)
            say(missing)

    @property
    def images_needed(self) -> int:
        """The number of generated images that the metrics need; 0 if there is none to compute."""
        return max((metric.generated for metric in self.metrics.values()), default=0)

    def _obstacle(self, metric: Metric) -> str | None:
        """Why a metric cannot be computed; None if it can."""
        try:
            if self.num_samples is not None:
                check_enough("this", metric.generated, generated=range(self.num_samples))
            check_enough("this", metric.real, real=getattr(self.data, metric.split or self.options.reference))
            self._load(metric.network)
        except UserError as error:
            return str(error)
        return None

    def _load(self, name: str) -> FeatureNetwork[Any]:
        """The feature network of this name; loaded once. Raises the same UserError each time if it is not available."""
        if name not in self.networks:
            try:
                self.networks[name] = LOADERS[name](self.options, self.data, self.machine)
            except UserError as error:
                self.networks[name] = error
        network = self.networks[name]
        if isinstance(network, UserError):
            raise network
        return network

    def compute(
        self,
        images: Tensor,
        drawn: str,
        metrics: Collection[str] | None = None,
        whole: bool = False,
        labels: Tensor | None = None,
    ) -> list[dict]:
        """Metric records of generated `images`, uint8 `[N,C,H,W]`; `drawn` says how they were drawn.

        Of all available metrics, or of those in `metrics`; empty in processes other than rank 0. `whole` and `labels`
        as in `Features`.
        """
        computed = self.metrics if is_rank_0() else {}
        chosen = [metric for name, metric in computed.items() if metrics is None or name in metrics]
        networks = {metric.network for metric in chosen}
        features = {
            name: Features(self._load(name), images, self.data, self.options.reference, self.seed, whole, labels)
            for name in networks
        }
        return [
            self._record(metric, name, value, features[metric.network]) | {"drawn": drawn}
            for metric in chosen
            for name, value in metric.values(features[metric.network]).items()
        ]

    def _record(self, metric: Metric, name: str, value: float, features: Features) -> dict:
        split = metric.split or features.split
        protocol = ", ".join(filter(None, (features.source.protocol, metric.protocol)))
        counts = {"real": len(features.real_images(split)), "generated": len(features.images)}
        record = make_record(name, value, protocol, split=split, **counts, seed=self.seed)
        if per_class := self._per_class(name, features):
            record["per_class"] = per_class
        return record

    def _per_class(self, name: str, features: Features) -> Values:
        """A metric of each class, by the class's name, where it has one and there are enough images of the class."""
        if name not in PER_CLASS or features.labels is None:
            return {}
        names = self.data.class_names or ()
        values = {each: PER_CLASS[name](features, label) for label, each in enumerate(names)}
        return {each: value for each, value in values.items() if value is not None}


def evaluate_images(
    images: Tensor,
    data: ImageData,
    options: EvaluationOptions,
    machine: Machine,
    seed: int,
    drawn: str,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Metric records of images uint8 `[N,C,H,W]` from anywhere, `drawn` says where; the rest as in `Evaluation`."""
    evaluation = Evaluation(options, data, machine, seed, len(images), say)
    return [{**record, **context(machine)} for record in evaluation.compute(images, drawn)]
