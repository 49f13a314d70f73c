"""Feature networks, trained once for each data set, and their features of real images, computed once."""

import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import ImageData, digest
from errors import UserError
from metrics.classifier import Classifier
from metrics.extraction import Progress
from metrics.fad import FadAutoencoder, Statistics, fad_features, load_published, to_fad_range, to_fad_size
from metrics.frechet import feature_statistics
from pipeline.evaluation.cache import cached
from pipeline.runtime.device import Machine, Network
from pipeline.runtime.seeds import seeded
from pixels import to_float
from progress import progress_bar

BATCH_SIZE = 128
NETWORK_SEED = 0  # not the run's: all runs on a data set are judged by one network
FEWEST_STEPS = 1000  # small data sets get more epochs
CHUNK = 500  # images whose features are kept in one file: at most, what an interruption loses

Loss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
Of_contra = TypeVar("Of_contra", bound=nn.Module, contravariant=True)


class Extract(Protocol[Of_contra]):
    """Computes features float32 [N,D] of images uint8 [N,C,H,W] by a network of its kind."""

    __name__: str

    def __call__(self, images: Tensor, network: Of_contra, /, *, progress: Progress | None = None) -> np.ndarray:
        """`progress` is told how many more images are done."""


class Training(NamedTuple):
    """How one kind of network is trained."""

    name: str
    epochs: int
    lr: float
    rate: int  # images/s on two cores of a CPU, to say how long it takes
    loss: Loss


class FadNetwork(NamedTuple):
    """What FAD needs: the network, where it is from, and mean and covariance of the test split's latents."""

    network: FadAutoencoder
    protocol: str
    reference: Statistics


def classifier(data: ImageData, machine: Machine, seed: int = NETWORK_SEED) -> tuple[Classifier, str]:
    """A classifier trained on `data`'s training split, and its protocol. Raises UserError if there are no classes."""
    if data.train_labels is None:
        raise UserError(f"{data.name} has no classes for a classifier to learn: leave out the metrics that need one")
    classes = int(data.train_labels.max()) + 1
    examples = data.train, data.train_labels
    return _trained(CLASSIFIER, lambda: Classifier(data.shape[0], classes), data.name, examples, machine, seed)


def fad_network(data: ImageData, fad_weights: Path | None, machine: Machine, seed: int = NETWORK_SEED) -> FadNetwork:
    """The published network and statistics from the folder `fad_weights` where it has them for `data`, else our own.

    Our own has the same architecture, with the channels of `data`, and is trained on its training split. Raises
    UserError as `load_published` does, or if there are no training images.
    """
    with seeded(seed):  # of weights that are replaced
        published = load_published(fad_weights, data.name) if fad_weights else None
    if published:
        network, reference = published
        return FadNetwork(network.to(machine.device), "published weights", reference)
    examples = (to_fad_size(data.train),)
    network, protocol = _trained(AUTOENCODER, lambda: FadAutoencoder(data.shape[0]), data.name, examples, machine, seed)
    features = kept_features(network, fad_features, data.test, f"{data.name}-test")
    return FadNetwork(network, protocol, feature_statistics(features))


def kept_features(network: Network, extract: Extract[Network], images: Tensor, name: str) -> np.ndarray:
    """`extract(images, network)`, float32 [N,D] of images uint8 [N,C,H,W], computed once.

    They are kept in parts, each as soon as it is ready, so that an interrupted extraction goes on where it was. `name`
    is part of the file names; the cache key also depends on the part's images and the weights.
    """
    weights = digest(network.state_dict())
    parts: list[np.ndarray] = []
    with progress_bar(len(images), f"features, {name}") as bar:

        def features(part: Tensor) -> np.ndarray:
            key = f"{extract.__name__}-{name}-{len(part)}-{digest(part)}-{weights}"
            return cached(key, lambda: {"features": extract(part, network, progress=bar.update)})["features"]

        for part in images.split(CHUNK):
            parts.append(features(part))
            bar.update(sum(map(len, parts)) - bar.n)  # by those that were kept
    return np.concatenate(parts)


def _trained(
    training: Training,
    build: Callable[[], Network],
    name: str,
    examples: tuple[Tensor, ...],
    machine: Machine,
    seed: int,
) -> tuple[Network, str]:
    """The network of `build` after `training` on `examples` (each [N,...]), from the cache if it is there.

    Raises UserError where there are no examples.
    """
    count = len(examples[0])
    if not count:
        raise UserError(f"{name} has no training images for the {training.name} to learn")
    with seeded(seed):
        network = build()
    epochs = max(training.epochs, math.ceil(FEWEST_STEPS * BATCH_SIZE / count))
    settings = f"{epochs} epochs, batches of {BATCH_SIZE}, lr {training.lr}, seed {seed}"
    # the weights before training stand for the architecture, the source for loss, scaling and optimiser
    how = digest(network.state_dict(), settings, _source(network))
    key = f"{training.name.replace(' ', '_')}-{name}-train-{count}-{digest(*examples)}-{how}"

    def train() -> dict[str, np.ndarray]:
        minutes = math.ceil(epochs * count / training.rate / 60)
        print(f"training the {training.name} on {name} once, about {minutes} min on two cores", flush=True)
        _train(training, network, examples, epochs, machine, seed)
        return {key: value.cpu().numpy() for key, value in network.state_dict().items()}

    weights = cached(key, train)
    network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    network = machine.to_device(network)  # one that was trained just now is in that order of memory, too
    return network.eval().requires_grad_(False), f"own {training.name}, {epochs} epochs"


def _source(network: nn.Module) -> str:
    """The code that decides what training makes of a network: that of this module and of the network's."""
    return "".join(inspect.getsource(sys.modules[name]) for name in (__name__, type(network).__module__))


def _train(
    training: Training, network: nn.Module, examples: tuple[Tensor, ...], epochs: int, machine: Machine, seed: int
) -> None:
    machine.to_device(network).train()
    count = len(examples[0])
    optimizer = torch.optim.AdamW(network.parameters(), training.lr)
    steps = epochs * math.ceil(count / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    with progress_bar(epochs * count, f"training the {training.name}") as bar:
        for _ in range(epochs):
            for indices in torch.randperm(count, generator=generator).split(BATCH_SIZE):
                loss = training.loss(network, tuple(part[indices].to(machine.device) for part in examples))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(len(indices))


def _classification_loss(network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(network(to_float(images)), labels)


def _reconstruction_loss(network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    images = to_fad_range(batch[0])
    return F.mse_loss(network(images), images)


CLASSIFIER = Training("classifier", epochs=4, lr=4e-3, rate=2000, loss=_classification_loss)
AUTOENCODER = Training("FAD autoencoder", epochs=3, lr=4e-3, rate=1200, loss=_reconstruction_loss)
