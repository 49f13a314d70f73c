"""Records of the metrics of a model itself: reconstruction quality, codebook use, energy; each with its protocol."""

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor

from datasets import ImageData
from metrics.codebook import perplexity, usage
from metrics.energy import PICOJOULES_PER_AC, PICOJOULES_PER_MAC, of_weights
from metrics.reconstruction import mse, ssim
from pipeline.evaluation.image_records import Evaluation
from pipeline.evaluation.protocols import real_images
from pipeline.evaluation.records import make_record
from pipeline.options.sections import FLOORS, RECONSTRUCTED
from pipeline.sampling.image_models import CodeDiffusion, ImageModel
from pixels import to_float

ENERGY_IMAGES = 16

COUNTED = ("macs", "acs", "spikes", "updates")
ONCE = "without spikes: each layer once, one-hot input looked up"
ENERGIES = {
    "": ("energy", f"{PICOJOULES_PER_MAC} pJ a MAC, {PICOJOULES_PER_AC} pJ an AC"),
    "_without_spikes": ("dense_energy", f"{ONCE}, {PICOJOULES_PER_MAC} pJ a MAC"),
}
BESIDE = {
    "_neurons": ("neuron_energy", f"updates of neurons, {PICOJOULES_PER_MAC} pJ each"),
    "_memory": ("memory", "reading and writing of weights, potentials and spikes"),
    "_memory_without_spikes": ("dense_memory", f"{ONCE}, reading and writing of weights and values"),
}
"""Endings of the names of records, to fields of `Operations` and protocols; the second are not part of the first."""


def reconstructions(model: ImageModel, evaluation: Evaluation, wanted: Collection[str]) -> Tensor | None:
    """Of `evaluation.reconstructed`, uint8 `[M,C,H,W]`; None where no metric needs them."""
    needed = {"mse", "ssim"} & set(wanted) or _floors(evaluation)
    return model.reconstruct(real_images(evaluation.data, evaluation.reconstructed)) if needed else None


def autoencoder_records(
    model: ImageModel, reconstructed: Tensor | None, evaluation: Evaluation, wanted: Collection[str]
) -> list[dict]:
    """Metrics of the autoencoder: MSE and SSIM of its reconstructions, and codebook use, of the same split."""
    records = []
    data, split = evaluation.data, evaluation.reconstructed
    images = real_images(data, split)
    record = partial(make_record, data=data, split=split, real=len(images), seed=evaluation.seed)
    mean = "reconstructions as 8-bit images in [0,1], mean over all"
    if reconstructed is not None:
        pair = to_float(images), to_float(reconstructed)
        if "mse" in wanted:
            records.append(record("mse", mse(*pair), f"{mean} pixels"))
        if "ssim" in wanted:
            records.append(record("ssim", ssim(*pair), f"{mean} images, torchmetrics"))
    if "codebook" in wanted and isinstance(model, CodeDiffusion):
        codes, size = model.encode(images), model.autoencoder.codebook_size
        records += [
            record("codebook_usage", usage(codes, size), f"share of the {size} codes that occur"),
            record("codebook_perplexity", perplexity(codes, size), "exp of the code entropy in nats"),
        ]
    return records


def floor_records(reconstructed: Tensor, evaluation: Evaluation) -> list[dict]:
    """Metrics of reconstructions, better than which samples can hardly be; empty in processes other than rank 0."""
    drawn = f"reconstructions of the {evaluation.reconstructed} split"
    records = evaluation.compute(reconstructed, drawn, metrics=_floors(evaluation), whole=True)
    return [record | {"name": RECONSTRUCTED + record["name"]} for record in records]


def _floors(evaluation: Evaluation) -> list[str]:
    """Which metrics are computed of reconstructions, too: not those whose protocol has another split."""
    own = (None, evaluation.reconstructed)
    return [name for name, each in evaluation.metrics.items() if RECONSTRUCTED + name in FLOORS and each.split in own]


def energy_records(model: ImageModel, data: ImageData, seed: int) -> list[dict]:
    """Energy in µJ per image of each part and of a whole sample, with and without spikes, and the mean firing rate.

    Of a whole sample, also what neurons and memory access take. Encoding is measured on ENERGY_IMAGES test images,
    everything that produces a sample on as many samples.
    """
    images = data.test[:ENERGY_IMAGES]
    cost = model.cost(images)
    record_of = partial(make_record, data=data, split="test", seed=seed)
    on_test = partial(record_of, real=len(images))
    on_samples = partial(record_of, real=0, generated=len(images), drawn=model.drawn, sampling=model.record)
    records = []
    for part, counted in cost.operations.items():
        record, on = on_test if part == "encode" else on_samples, cost.protocols[part]
        more: dict[str, dict[str, Any]] = {
            "": {name: getattr(counted, name) for name in COUNTED},
            "_without_spikes": {"macs": counted.dense_macs},
        }
        if part == "sample":
            more[""]["passes"] = cost.passes
            more |= {kind: {} for kind in BESIDE}
        if part in cost.layers:
            more[""]["layers"] = {name: each.energy / 1e6 for name, each in of_weights(cost.layers[part]).items()}
        for kind, counts in more.items():
            quantity, protocol = (ENERGIES | BESIDE)[kind]
            value, protocol = getattr(counted, quantity) / 1e6, f"µJ an image, {protocol}; {on}"
            records.append(record(f"energy_{part}{kind}", value, protocol, **counts))
    if cost.firing_rates:
        mean = sum(cost.firing_rates.values()) / len(cost.firing_rates)
        protocol = "spikes per neuron and spike step, mean over layers, of encoding, decoding and drawing"
        records.append(on_samples("firing_rate", mean, protocol, real=len(images), layers=cost.firing_rates))
    return records
