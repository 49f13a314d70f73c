"""Feature networks, trained once for each data set, and their features of real images, computed once."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import ImageData, digest
from errors import UserError
from metrics.classifier import Classifier
from metrics.fad import FadAutoencoder, Statistics, fad_features, load_published, to_fad_range, to_fad_size
from metrics.frechet import feature_statistics
from pipeline.evaluation.cache import cached
from pipeline.runtime.device import Machine, Network
from progress import progress_bar

BATCH_SIZE = 128
NETWORK_SEED = 0  # not the run's: all runs on a data set are judged by one network
FEWEST_STEPS = 1000  # small data sets get more epochs

Loss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


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
    published = load_published(fad_weights, data.name) if fad_weights else None
    if published:
        network, reference = published
        return FadNetwork(network.to(machine.device), "published weights", reference)
    examples = (to_fad_size(data.train),)
    network, protocol = _trained(AUTOENCODER, lambda: FadAutoencoder(data.shape[0]), data.name, examples, machine, seed)
    features = reference_features(network, fad_features, data.test, f"{data.name}-test")
    return FadNetwork(network, protocol, feature_statistics(features))


def reference_features(
    network: Network, extract: Callable[[Tensor, Network], np.ndarray], images: Tensor, name: str
) -> np.ndarray:
    """`extract(images, network)`, float32 [N,D] of images uint8 [N,C,H,W], computed once.

    `name`, data set and split, is part of the file name; the cache key also depends on the images and the weights.
    """
    key = f"{extract.__name__}-{name}-{len(images)}-{digest(images)}-{digest(network.state_dict())}"
    return cached(key, lambda: {"features": extract(images, network)})["features"]


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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build()
    epochs = max(training.epochs, math.ceil(FEWEST_STEPS * BATCH_SIZE / count))
    settings = f"{epochs} epochs, batches of {BATCH_SIZE}, lr {training.lr}, seed {seed}"
    # the weights before training stand for the architecture
    file_name = training.name.replace(" ", "_")
    key = f"{file_name}-{name}-train-{count}-{digest(*examples)}-{digest(network.state_dict(), settings)}"

    def train() -> dict[str, np.ndarray]:
        minutes = math.ceil(epochs * count / training.rate / 60)
        print(f"training the {training.name} on {name} once, about {minutes} min on two cores", flush=True)
        _train(training, network, examples, epochs, machine, seed)
        return {key: value.cpu().numpy() for key, value in network.state_dict().items()}

    weights = cached(key, train)
    network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return network.to(machine.device).eval().requires_grad_(False), f"own {training.name}, {epochs} epochs"


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
    return F.cross_entropy(network(images / 255), labels)


def _reconstruction_loss(network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    images = to_fad_range(batch[0])
    return F.mse_loss(network(images), images)


CLASSIFIER = Training("classifier", epochs=4, lr=4e-3, rate=2000, loss=_classification_loss)
AUTOENCODER = Training("FAD autoencoder", epochs=3, lr=4e-3, rate=1200, loss=_reconstruction_loss)
