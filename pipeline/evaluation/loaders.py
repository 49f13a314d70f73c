"""The loaders of the feature networks that metrics are computed from, each with its protocol."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic

from torch import nn

from datasets import ImageData, digest
from errors import UserError
from metrics.classifier import Classifier, classifier_features
from metrics.fad import SIDE as FSVAE_SIDE
from metrics.fad import FadAutoencoder, fad_features
from metrics.inception import clean_features, inception_features, load_inception, load_paper_inception
from pipeline.evaluation.feature_networks import Extract, classifier, fad_network
from pipeline.options.sections import EvaluationOptions
from pipeline.runtime.device import Machine, Network
from pipeline.runtime.seeds import seeded


@dataclass(frozen=True)
class FeatureNetwork(Generic[Network]):
    """A network whose features of images some metrics are computed from.

    Attributes:
        network: the network.
        extract: images uint8 `[N,C,H,W]` and the network to features `[N,D]`.
        protocol: what has to be reported with it.
        reference: statistics of the test split that come with the network; only for FAD.
    """

    network: Network
    extract: Extract[Network]
    protocol: str
    reference: Any = None

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that stand for the network's weights."""
        return digest(self.network.state_dict())


def _inception(options: EvaluationOptions, data: ImageData, machine: Machine) -> FeatureNetwork[nn.Module]:
    network = _published(options, machine)
    return FeatureNetwork(network, inception_features, "pytorch-fid's Inception")


def _inception_classifier(options: EvaluationOptions, data: ImageData, machine: Machine) -> FeatureNetwork[nn.Module]:
    source = _inception(options, data, machine)
    if not source.network.get_buffer("class_weight").isfinite().all():
        raise UserError(f"{options.fid_weights} has no weights of the last layer")
    return source


def _clean_inception(options: EvaluationOptions, data: ImageData, machine: Machine) -> FeatureNetwork[nn.Module]:
    enlarged = f", images first resized to {FSVAE_SIDE}x{FSVAE_SIDE}" if max(data.shape[1:]) < FSVAE_SIDE else ""
    return FeatureNetwork(_published(options, machine), clean_features, f"clean-fid's Inception, mode clean{enlarged}")


def _published(options: EvaluationOptions, machine: Machine) -> nn.Module:
    with seeded(0):  # of weights that are replaced
        return load_inception(options.fid_weights, machine.device)


def _paper_inception(options: EvaluationOptions, data: ImageData, machine: Machine) -> FeatureNetwork[nn.Module]:
    with seeded(0):
        network = load_paper_inception(options.paper_fid_weights, machine.device)
    protocol = "the release's: ImageNet Inception, normalised twice, SVD root"
    return FeatureNetwork(network, inception_features, protocol)


def _fad(options: EvaluationOptions, data: ImageData, machine: Machine) -> FeatureNetwork[FadAutoencoder]:
    network, origin, statistics = fad_network(data, options.fad_weights, machine)
    return FeatureNetwork(network, fad_features, f"autoencoder at 32x32, {origin}", statistics)


def _classifier(options: EvaluationOptions, data: ImageData, machine: Machine) -> FeatureNetwork[Classifier]:
    network, origin = classifier(data, machine)
    return FeatureNetwork(network, classifier_features, origin)


Loader = Callable[[EvaluationOptions, ImageData, Machine], FeatureNetwork[Any]]
LOADERS: dict[str, Loader] = {
    "inception": _inception,
    "inception classifier": _inception_classifier,
    "clean inception": _clean_inception,
    "paper": _paper_inception,
    "fad": _fad,
    "classifier": _classifier,
}
"""Loaders of feature networks. They raise UserError if there is none for the data set, or no weights."""
