"""The loaders of the feature networks that metrics are computed from, each with its protocol."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
from torch import Tensor, nn

from datasets import ImageData
from metrics.classifier import Classifier, classifier_features
from metrics.fad import FAD_IMAGES, FadAutoencoder, fad_features
from metrics.fid import PAPER_IMAGES
from metrics.inception import inception_features, load_inception, load_paper_inception
from pipeline.evaluation.feature_networks import classifier, fad_network
from pipeline.options import EvaluationOptions
from pipeline.runtime.device import Machine, Network
from pipeline.runtime.seeds import seeded


@dataclass(frozen=True)
class FeatureNetwork(Generic[Network]):
    """A network whose features of images some metrics are computed from.

    Attributes:
        network: the network.
        extract: images uint8 `[N,C,H,W]` and the network to features `[N,D]`.
        protocol: what has to be reported with it.
        fixed: the numbers of generated and real images, where the protocol fixes them; the split is then test.
        reference: statistics of the test split that come with the network; only for FAD.
    """

    network: Network
    extract: Callable[[Tensor, Network], np.ndarray]
    protocol: str
    fixed: tuple[int, int] | None = None
    reference: Any = None


def _inception(options: EvaluationOptions, data: ImageData, machine: Machine) -> FeatureNetwork[nn.Module]:
    with seeded(0):  # of weights that are replaced
        network = load_inception(options.fid_weights, machine.device)
    weights = options.fid_weights or "as published"
    return FeatureNetwork(network, inception_features, f"pytorch-fid's Inception, weights {weights}")


def _paper_inception(options: EvaluationOptions, data: ImageData, machine: Machine) -> FeatureNetwork[nn.Module]:
    with seeded(0):
        network = load_paper_inception(options.paper_fid_weights, machine.device)
    protocol = "the release's: ImageNet Inception, normalised twice, SVD root"
    return FeatureNetwork(network, inception_features, protocol, fixed=(PAPER_IMAGES, PAPER_IMAGES))


def _fad(options: EvaluationOptions, data: ImageData, machine: Machine) -> FeatureNetwork[FadAutoencoder]:
    network, origin, statistics = fad_network(data, options.fad_weights, machine)
    fixed = FAD_IMAGES, len(data.test)
    return FeatureNetwork(network, fad_features, f"autoencoder at 32x32, {origin}", fixed, statistics)


def _classifier(options: EvaluationOptions, data: ImageData, machine: Machine) -> FeatureNetwork[Classifier]:
    network, origin = classifier(data, machine)
    return FeatureNetwork(network, classifier_features, origin)


Loader = Callable[[EvaluationOptions, ImageData, Machine], FeatureNetwork[Any]]
LOADERS: dict[str, Loader] = {
    "inception": _inception,
    "paper": _paper_inception,
    "fad": _fad,
    "classifier": _classifier,
}
"""Loaders of feature networks. They raise UserError if there is none for the data set, or no weights."""
