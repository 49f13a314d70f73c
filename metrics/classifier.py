"""Metrics from a classifier that is trained on the data set's own classes, and the classifier."""

import math

import numpy as np
import torch
from scipy.stats import entropy
from torch import Tensor, nn

from metrics.counts import check_enough
from metrics.extraction import Progress, extract
from metrics.frechet import feature_statistics, frechet_distance
from pixels import to_float

FEATURES = 128


class Classifier(nn.Module):
    """Images float [N,C,H,W] in [0,1], of any size from 8x8, to logits [N,K]."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            *_block(channels, 32, stride=1),
            *_block(32, 32, stride=2),
            *_block(32, 64, stride=1),
            *_block(64, FEATURES, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N,K]."""
        return self.head(self.body(images))


def _block(channels: int, out: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU()


def classifier_features(
    images: Tensor, network: Classifier, batch_size: int = 500, progress: Progress | None = None
) -> np.ndarray:
    """Input of the last layer, float32 [N,128], for images uint8 [N,C,H,W]. Raises ValueError for other images."""
    return extract(images, lambda batch: network.body(to_float(batch)), network, batch_size, progress)


@torch.inference_mode()
def classifier_logits(features: np.ndarray, network: Classifier) -> np.ndarray:
    """Logits, float32 [N,K], from `classifier_features` [N,128] of the same network."""
    return network.head(torch.from_numpy(features).to(network.head.weight.device)).cpu().numpy()


def classifier_distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Fréchet distance between `classifier_features` [N,128] and [M,128]; 0 is best.

    Raises UserError unless each set has more images than there are features.
    """
    check_enough("the classifier distance", FEATURES + 1, generated=generated, real=real)
    return frechet_distance(*feature_statistics(generated), *feature_statistics(real))


def accuracy(logits: np.ndarray, labels: Tensor) -> float:
    """Fraction of images, given their logits [N,K], whose predicted class is their label, int64 [N]."""
    return (logits.argmax(axis=1) == labels.numpy()).mean().item()


def mean_confidence(logits: np.ndarray) -> float:
    """Mean probability of the predicted class, for logits [N,K]: near 1 if every image clearly belongs to one class."""
    return torch.from_numpy(logits).double().softmax(1).amax(1).mean().item()


def class_balance(logits: np.ndarray) -> float:
    """Entropy of the predicted classes, for logits [N,K], over its maximum: 1 if all are equally frequent."""
    shares = np.bincount(logits.argmax(axis=1)) / len(logits)
    return entropy(shares).item() / math.log(logits.shape[1]) if logits.shape[1] > 1 else 1.0
