"""Which metrics are computed on which images, what is printed where one cannot be, and the choice of a temperature."""

import itertools
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from datasets import ImageData
from errors import UserError
from metrics.extraction import extract
from metrics.frechet import feature_statistics, frechet_distance
from models import FSVAE, SDID, VQSVAE, VQVAE
from pipeline.evaluation import metrics as evaluation
from pipeline.evaluation import model_metrics, temperature
from pipeline.evaluation.feature_networks import FadNetwork
from pipeline.evaluation.loaders import FeatureNetwork
from pipeline.evaluation.metrics import Evaluation, Metric
from pipeline.evaluation.model_metrics import energy_records, reconstruction_records
from pipeline.options import EvaluationOptions
from pipeline.run_folder import RunFolder
from pipeline.runtime.device import Machine
from pipeline.sampling.image_models import CodeDiffusion, PriorSampling

CPU = Machine(torch.device("cpu"), bf16=False)


class Pooling(torch.nn.Module):
    """Stands for a feature network: 4 numbers of an image."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() * self.scale, 2).flatten(1)


def pooled(images, network):
    return extract(images, network, network, 5, "pooling")


def noise(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8))


@pytest.fixture
def data():
    labels = torch.arange(9) % 3
    return ImageData("noise", noise(9, 1), noise(7, 2) // 2, noise(70, 3) // 3, labels, labels[:7])


@pytest.fixture(autouse=True)
def pooling(monkeypatch, tmp_path):
    """Two feature networks instead of the real ones, and two metrics on the first; those used are counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = []

    def load(name, **more):
        return lambda options, data, machine: loaded.append(name) or FeatureNetwork(Pooling(), pooled, name, **more)

    def refuse(*_):
        raise UserError("it cannot be downloaded")

    networks = {"free": load("free"), "fixed": load("fixed", fixed=(4, 5)), "missing": refuse}
    monkeypatch.setattr(evaluation, "LOADERS", networks)

    def distance(seen):
        return {"distance": frechet_distance(*feature_statistics(seen.generated), *feature_statistics(seen.real))}

    table = {
        "distance": Metric("free", 6, 3, distance),
        "counts": Metric("fixed", 4, 5, lambda seen: {"n": len(seen.generated), "m": len(seen.real)}, "test"),
        "both": Metric("missing", 2, 0, distance),
        "more": Metric("missing", 2, 0, distance),
    }
    monkeypatch.setattr(evaluation, "GENERATED_METRICS", table)
    return loaded


def prepared(data, num_samples=None, **options):
    return Evaluation(EvaluationOptions(**options), data, CPU, 3, num_samples)


def test_all_that_can_be_had_and_what_cannot_is_said_in_one_line(data, pooling, capsys):
    ready = prepared(data)
    assert list(ready.metrics) == ["distance", "counts"] and ready.images_needed == 6
    assert capsys.readouterr().out == "no both, more: it cannot be downloaded\n"
    records = {record["name"]: record for record in ready.compute(noise(8), "so")}
    assert sorted(pooling) == ["fixed", "free"]  # each network is loaded once
    statistics = (feature_statistics(pooled(images, Pooling())) for images in (noise(8), data.test))
    (mu, sigma), (real_mu, real_sigma) = statistics
    assert records["distance"]["value"] == pytest.approx(frechet_distance(mu, sigma, real_mu, real_sigma))
    expected = {"protocol": "free", "drawn": "so", "split": "test", "num_generated": 8, "num_real": 7, "seed": 3}
    assert records["distance"].items() >= expected.items()
    assert (records["n"]["value"], records["m"]["value"]) == (4, 5)
    assert (records["n"]["num_generated"], records["n"]["num_real"]) == (4, 5)
    (n, m) = ready.compute(noise(8), "so", metrics=["counts"], whole=True)
    assert (n["value"], m["value"], n["num_generated"]) == (8, 5, 8)


def test_against_the_training_split_where_the_protocol_leaves_it_open(data):
    ready = prepared(data, reference="train")
    records = {record["name"]: record for record in ready.compute(noise(6), "so")}
    assert (records["distance"]["split"], records["distance"]["num_real"]) == ("train", 9)
    assert (records["n"]["split"], records["n"]["num_real"]) == ("test", 5)


def test_the_real_side_comes_from_the_cache_and_is_the_same(data, monkeypatch):
    first = prepared(data, metrics=["distance"]).compute(noise(6), "so")
    monkeypatch.setattr(evaluation, "reference_features", evaluation.reference_features)
    asked = []
    original = Pooling.forward
    monkeypatch.setattr(Pooling, "forward", lambda self, images: asked.append(len(images)) or original(self, images))
    assert prepared(data, metrics=["distance"]).compute(noise(6), "so") == first
    assert sum(asked) == 6  # generated images only


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"metrics": ["both"]}, "no both: it cannot be downloaded"),
        ({"metrics": ["distance"], "num_samples": 5}, "no distance: this needs at least 6 generated images, not 5"),
    ],
)
def test_what_was_asked_for_by_name_is_never_left_out(changed, words, data):
    with pytest.raises(UserError, match=words):
        prepared(data, **changed)


def test_too_few_real_images(data, capsys):
    few = replace(data, test=data.test[:2])
    assert "distance" not in prepared(few).metrics
    assert "no distance: this needs at least 3 real images, not 2" in capsys.readouterr().out


def test_too_few_real_images_in_the_split_that_the_protocol_fixes(data, capsys):
    few = replace(data, test=data.test[:2])
    assert list(prepared(few, reference="train").metrics) == ["distance"]
    assert "no counts: this needs at least 5 real images, not 2" in capsys.readouterr().out


def test_no_networks_are_loaded_for_too_few_samples(data, pooling):
    assert prepared(data, num_samples=1).images_needed == 0 and pooling == []


# ---- the choice of a temperature ----


@dataclass(frozen=True)
class Stub:
    """A generator whose samples come near the held-out images at 0.8."""

    target: torch.Tensor
    machine: Machine = CPU
    seed: int = 0
    temperature: float = 1.0

    @property
    def settings(self):
        return {"seed": self.seed}

    def draw(self, samples):
        shift = abs(self.temperature - 0.8) * 300
        return (self.target[: len(samples)].float() + shift).clamp(0, 255).byte()


@pytest.fixture
def pooled_fad(monkeypatch):
    """The stand-in instead of the FAD network."""
    monkeypatch.setattr(temperature, "fad_network", lambda *_: FadNetwork(Pooling(), "pooling", None))
    monkeypatch.setattr(temperature, "fad_features", pooled)


def test_the_temperature_is_that_nearest_to_the_held_out_images(data, tmp_path, pooled_fad):
    changed = replace(data, test=data.test * 0)
    chosen = temperature.choose_temperature(Stub(data.held_out), changed, None, RunFolder(tmp_path / "run"), "weights")
    written = json.loads((tmp_path / "run" / "temperature.json").read_text())
    assert chosen == written["temperature"] == 0.8
    assert min(written["distances"], key=written["distances"].get) == "0.8"
    assert written["distances"]["1.0"] > written["distances"]["0.9"] > written["distances"]["0.8"]


def test_a_temperature_is_chosen_once(data, tmp_path, pooled_fad, monkeypatch, capsys):
    """And anew where weights, sampling, held-out images or the FAD network are others, or the file is damaged."""
    drawn, draw = [], Stub.draw
    monkeypatch.setattr(Stub, "draw", lambda self, samples: drawn.append(1) or draw(self, samples))
    stub, run = Stub(data.held_out), RunFolder(tmp_path / "run")

    def images_drawn(generator=stub, data=data, weights="weights"):
        drawn.clear()
        assert temperature.choose_temperature(generator, data, None, run, weights) == 0.8
        return len(drawn)

    assert images_drawn() == 6 and images_drawn() == 0
    assert "temperature 0.8, as chosen before" in capsys.readouterr().out
    assert images_drawn(weights="others") == 6 and images_drawn(weights="others") == 0
    assert images_drawn(replace(stub, seed=1)) == 6
    brighter = replace(data, held_out=data.held_out + 1)
    assert images_drawn(Stub(brighter.held_out), brighter) == 6 and images_drawn(Stub(brighter.held_out), brighter) == 0
    other = Pooling()
    other.scale.data *= 2
    monkeypatch.setattr(temperature, "fad_network", lambda *_: FadNetwork(other, "pooling", None))
    assert images_drawn(Stub(brighter.held_out), brighter) == 6
    (run.path / "temperature.json").write_text("{")
    assert images_drawn(Stub(brighter.held_out), brighter) == 6
    assert "temperature.json cannot be read" in capsys.readouterr().out


def test_settings_are_all_that_samples_depend_on():
    """Whatever of a generator changes its samples changes its settings, weights aside."""
    generator = code_diffusion(VQSVAE(1, 5, 4, 3, 4))
    changes = {"seed": 1, "grid": (2, 1), "sample_steps": 3, "reveal_order": "spread", "temperature": 2.0}
    changes |= {"final_temperature": 0.5}
    changes["machine"] = Machine(torch.device("cpu"), bf16=True)
    settings = [replace(generator, **{name: value}).settings for name, value in changes.items()]
    settings += [code_diffusion(VQSVAE(1, 5, 4, 2, 4)).settings, generator.settings]
    settings.append(code_diffusion(VQSVAE(1, 5, 4, 3, 4, spike_generator="repeat")).settings)
    assert len({json.dumps(each) for each in settings}) == len(settings)
    assert replace(generator, batch_size=9, sample_steps=4).settings == generator.settings, "all four timesteps"


def test_a_temperature_is_not_chosen_on_few_images_or_on_the_test_split(data, tmp_path):
    few = replace(data, held_out=data.held_out[:64])
    with pytest.raises(UserError, match="--held_out"):
        temperature.choose_temperature(Stub(data.held_out), few, None, RunFolder(tmp_path), "weights")


# ---- generators ----


def code_diffusion(autoencoder, **changed):
    return CodeDiffusion(autoencoder, SDID(5, 3, 4), (2, 2), CPU, 0, **{"batch_size": 3, **changed})


def generators():
    torch.manual_seed(0)
    return {
        "snn-vq-vae": code_diffusion(VQSVAE(1, 5, 4, 3, 4)),
        "vq-vae": code_diffusion(VQVAE(1, 5, 4, 4)),
        "snn-vae": PriorSampling(FSVAE(1, 8, 6, 4, spike_steps=3, hidden_channels=4), CPU, 0, batch_size=3),
    }


@pytest.mark.parametrize("name", ["snn-vq-vae", "vq-vae", "snn-vae"])
def test_samples_do_not_depend_on_the_batch(name, float64):
    generator = generators()[name]
    images = generator.draw(range(8))
    assert images.shape == (8, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(replace(generator, batch_size=8).draw(range(2, 7)), images[2:7])
    assert torch.equal(replace(generator, batch_size=1).reconstruct(noise(4)), generator.reconstruct(noise(4)))


@pytest.mark.parametrize("name", ["snn-vq-vae", "vq-vae", "snn-vae"])
def test_cost_is_counted_and_leaves_the_model_as_it_was(name):
    generator = generators()[name]
    before = generator.draw(range(4))
    cost = generator.cost(noise(4))
    assert torch.equal(generator.draw(range(4)), before)
    assert set(cost.operations) >= {"encode", "decode", "sample"} and cost.operations["encode"].macs > 0
    assert all(0 <= rate <= 1 for rate in cost.firing_rates.values()) and cost.firing_rates
    # 3x3 weights at stride 2 from 8 to 4 to 2 positions an axis, then 1x1: 3n-1 of them meet no padding
    if name != "snn-vae":
        assert cost.operations["encode"].dense_macs == 11**2 * 4 + 5**2 * 4 * 8 + 2**2 * 8 * 4
    if name == "vq-vae":
        assert cost.operations["encode"].acs == 0
        assert cost.operations["encode"].macs == cost.operations["encode"].dense_macs
    else:
        assert cost.operations["encode"].macs != cost.operations["encode"].dense_macs


def test_a_sample_costs_a_pass_of_the_denoiser_at_each_timestep_and_a_decoding():
    whole = generators()["snn-vq-vae"]
    for generator, passes in ((whole, 4), (replace(whole, sample_steps=3), 3)):
        parts = generator.cost(noise(4)).operations
        assert parts["sample"] == passes * parts["denoiser_pass"] + parts["decode"]


def test_energy_in_microjoules():
    generator = generators()["snn-vq-vae"]
    of_four = ImageData("own", train=noise(1), test=noise(4), held_out=noise(1))
    records = {record["name"]: record for record in energy_records(generator, of_four, 0)}
    counted = generator.cost(noise(4)).operations["sample"]
    assert records["energy_sample"]["value"] == pytest.approx((4.6 * counted.macs + 0.9 * counted.acs) / 1e6)
    assert records["energy_sample_without_spikes"]["value"] == pytest.approx(4.6 * counted.dense_macs / 1e6)
    assert records["energy_sample"]["macs"] == counted.macs and records["energy_sample"]["acs"] == counted.acs
    assert records["firing_rate"]["layers"].keys() >= {"encode: encoder.snn_convs.2", "denoiser_pass: conv1.2"}


def test_reconstructions_are_scored_as_samples_are(data, monkeypatch):
    """FAD of the autoencoder, the floor of whatever draws its codes: by the same network and reference."""
    generator = generators()["vq-vae"]
    monkeypatch.setattr(model_metrics, "FAD_IMAGES", 7)
    table = {**evaluation.GENERATED_METRICS, "fad": evaluation.GENERATED_METRICS["distance"]}
    monkeypatch.setattr(evaluation, "GENERATED_METRICS", table)
    ready = prepared(data, metrics=["fad"])
    (record,) = reconstruction_records(generator, ready, ["fad"])
    reconstructed, real = (pooled(images, Pooling()) for images in (generator.reconstruct(data.test), data.test))
    expected = frechet_distance(*feature_statistics(reconstructed), *feature_statistics(real))
    assert record["name"] == "reconstruction_fad" and record["value"] == pytest.approx(expected)
    assert record["num_generated"] == 7 and "reconstructions" in record["drawn"]
    monkeypatch.setattr(model_metrics, "FAD_IMAGES", 8)
    assert reconstruction_records(generator, ready, ["fad"]) == []


def test_images_drawn_with_labels_are_judged_class_by_class(data, monkeypatch):
    """The share that is classified as the label, and distances within a class where it has enough images."""
    network = Pooling()
    network.head = torch.nn.Linear(4, 2)  # an image is a boot if it is brighter than grey
    network.head.weight.data, network.head.bias.data = torch.tensor([[-1.0], [1]]).repeat(1, 4), torch.tensor([1e3, 0])
    monkeypatch.setitem(evaluation.LOADERS, "free", lambda *_: FeatureNetwork(network, pooled, "so"))

    monkeypatch.setattr(evaluation, "classifier_distance", lambda *_: 1.0)  # of more images
    monkeypatch.setattr(evaluation, "_prdc", lambda _: {})
    table = {
        "classifier": Metric("free", 6, 3, evaluation._classifier_metrics),
        "recognition": Metric("free", 6, 3, evaluation._recognition),
    }
    monkeypatch.setattr(evaluation, "GENERATED_METRICS", table)
    named = replace(data, test_labels=torch.tensor([0, 0, 0, 0, 0, 1, 1]), class_names=("bag", "boot"))
    labels, bright = torch.tensor([0, 1, 0, 0, 1, 0, 0]), torch.tensor([0, 1, 0, 0, 0, 0, 1], dtype=torch.uint8)
    images = noise(7) // 4 + 180 * bright.view(-1, 1, 1, 1)
    records = {record["name"]: record for record in prepared(named).compute(images, "so", labels=labels)}
    assert records["label_accuracy"]["value"] == pytest.approx(5 / 7)
    assert records["label_accuracy"]["per_class"] == {"bag": 0.8, "boot": 0.5}
    assert records["class_balance"]["value"] == pytest.approx(0.863, abs=1e-3), "two boots and five bags"
    statistics = (feature_statistics(pooled(part, Pooling())) for part in (images[labels == 0], named.test[:5]))
    distance = frechet_distance(*itertools.chain(*statistics))
    assert records["classifier_frechet"]["per_class"] == {"bag": pytest.approx(distance)}, "boots are too few"
    for model, its_labels in ((named, None), (data, labels)):  # drawn without labels; a data set without names
        records = {each["name"]: each for each in prepared(model).compute(images, "so", labels=its_labels)}
        assert "label_accuracy" not in records and "per_class" not in records["classifier_frechet"]
