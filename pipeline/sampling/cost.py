"""What a model costs: synaptic operations and firing rates of its parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metrics.energy import Operations, count_layers, firing_rates
from models import Autoencoder, Denoiser

Parts = dict[str, tuple[Autoencoder | Denoiser, Callable[[], Any]]]
"""Parts of a model that are counted: a network, and a function that runs it."""


@dataclass(frozen=True)
class Cost:
    """Synaptic operations of each part of a model and of a whole sample, per image, and firing rates of its layers.

    `layers` has the operations of each part by layer, `protocols` what each part was counted on. `passes` is the
    number of a denoiser's passes in a sample.
    """

    operations: dict[str, Operations]
    layers: dict[str, dict[str, Operations]]
    firing_rates: dict[str, float]
    protocols: dict[str, str]
    passes: int = 0


def count_parts(parts: Parts, images: int) -> tuple[dict[str, dict[str, Operations]], dict[str, float]]:
    """Operations of each call per image and layer, and firing rates; in float32."""
    measured = {name: _measure(*part, images) for name, part in parts.items()}
    layers = {name: counted for name, (counted, _) in measured.items()}
    rates = {f"{name}: {layer}": rate for name, (_, own) in measured.items() for layer, rate in own.items()}
    return layers, rates


def sums(layers: dict[str, dict[str, Operations]]) -> dict[str, Operations]:
    """Operations of each part."""
    return {name: sum(own.values(), Operations()) for name, own in layers.items()}


def _measure(
    model: Autoencoder | Denoiser, call: Callable[[], Any], images: int
) -> tuple[dict[str, Operations], dict[str, float]]:
    """Operations and firing rates in one run, as neurons are not counted."""
    counted: list[dict[str, Operations]] = []
    model.eval()
    rates = firing_rates(model, lambda: counted.append(count_layers(model, call, images, model.spike_steps)))
    return counted[0], rates
