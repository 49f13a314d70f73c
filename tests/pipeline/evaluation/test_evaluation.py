"""Which metrics are computed on which images, what is printed where one cannot be, and the choice of a temperature."""

import itertools
import json
import os
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from datasets import ImageData
from errors import UserError
from metrics.extraction import extract
from metrics.frechet import feature_statistics, frechet_distance
from models import FSVAE, SDID, VQSVAE, VQVAE, ResidualSVAE
from parts import SAMPLE_METRICS
from pipeline.evaluation import image_records, loaders, protocols, temperature
from pipeline.evaluation.feature_networks import FadNetwork
from pipeline.evaluation.image_records import Evaluation
from pipeline.evaluation.loaders import LOADERS, FeatureNetwork
from pipeline.evaluation.model_records import autoencoder_records, energy_records, floor_records, reconstructions
from pipeline.evaluation.protocols import Metric
from pipeline.options.sections import EvaluationOptions
from pipeline.run_folder import RunFolder
from pipeline.runtime.device import Machine
from pipeline.sampling.image_models import CodeDiffusion, PriorSampling
from pipeline.sampling.settings import Settings

TABLE = image_records.GENERATED_METRICS  # of the program, which tests replace
CPU = Machine(torch.device("cpu"), bf16=False)


class Pooling(torch.nn.Module):
    """Stands for a feature network: 4 numbers of an image."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() * self.scale, 2).flatten(1)


def pooled(images, network, progress=None):
    return extract(images, network, network, 5, progress)


def noise(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8))


@pytest.fixture
def data():
    labels = torch.arange(9) % 3
    return ImageData("noise", noise(9, 1), noise(7, 2) // 2, noise(70, 3) // 3, labels, labels[:7])


@pytest.fixture(autouse=True)
def pooling(monkeypatch, tmp_path):
    """Two feature networks instead of the real ones, and two metrics on the first; those used are counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = []

    def load(name):
        return lambda options, data, machine: loaded.append(name) or FeatureNetwork(Pooling(), pooled, name)

    def refuse(*_):
        raise UserError("it cannot be downloaded")

    networks = {"free": load("free"), "fixed": load("fixed"), "missing": refuse}
    monkeypatch.setattr(image_records, "LOADERS", networks)

    def distance(seen):
        return {"distance": frechet_distance(*feature_statistics(seen.generated), *feature_statistics(seen.real))}

    def counts(seen):
        return {"n": len(seen.generated), "m": len(seen.real)}

    table = {
        "distance": Metric("free", 6, 3, distance, at_least=True),
        "counts": Metric("fixed", 4, 5, counts, "test", first_real=5),
        "both": Metric("missing", 2, 0, distance),
        "more": Metric("missing", 2, 0, distance),
    }
    monkeypatch.setattr(image_records, "GENERATED_METRICS", table)
    return loaded


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "spiking-diffusion"


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
    asked = []
    original = Pooling.forward
    monkeypatch.setattr(Pooling, "forward", lambda self, images: asked.append(len(images)) or original(self, images))
    assert prepared(data, metrics=["distance"]).compute(noise(6), "so") == first and not asked
    assert prepared(data, metrics=["distance"]).compute(noise(6, 9), "so") != first
    assert sum(asked) == 6  # generated images only


def test_features_of_generated_images_are_kept_for_a_week(data, cache):
    prepared(data, metrics=["distance"]).compute(noise(6), "so")
    (generated,), (real,) = cache.glob("*-generated-*"), cache.glob("*-test-*")
    for path, days in ((generated, 8), (real, 800)):
        os.utime(path, (time.time() - 86400 * days,) * 2)
    prepared(data, metrics=["distance"]).compute(noise(6, 9), "so")
    assert not generated.exists() and real.exists() and len(list(cache.glob("*-generated-*"))) == 1
    prepared(data, metrics=["distance"]).compute(noise(6, 10), "so")
    assert len(list(cache.glob("*-generated-*"))) == 2


@pytest.fixture
def few(monkeypatch):
    """A metric that also exists of fewer images than its protocol has, and one that is for those who name it."""

    def distance(seen):
        return {"distance": frechet_distance(*feature_statistics(seen.generated), *feature_statistics(seen.real))}

    table = {
        "distance": Metric("free", 6, 7, distance, fewest=3),
        "long": Metric("free", 9, 7, lambda seen: {"long": len(seen.real)}, "train+held_out", fewest=3, by_name=True),
    }
    monkeypatch.setattr(image_records, "GENERATED_METRICS", table)


@pytest.mark.parametrize(
    ("generated", "real", "name"),
    [(6, 7, "distance"), (8, 7, "distance"), (5, 7, "distance_5_images"), (8, 4, "distance_4_images")],
)
def test_fewer_images_than_the_protocol_has_are_another_metric(generated, real, name, data, few):
    ready = prepared(replace(data, test=data.test[:real]), generated, metrics=["distance"])
    (record,) = ready.compute(noise(generated), "so")
    assert (record["name"], record["num_generated"], record["num_real"]) == (name, min(generated, 6), real)
    assert ("fewer images" in record["protocol"]) == (name != "distance")


def test_fewer_images_are_accepted_where_the_metric_is_named_and_down_to_a_limit(data, few, capsys):
    with pytest.raises(UserError, match="no distance: this needs at least 3 generated images, not 2"):
        prepared(data, 2, metrics=["distance"])
    with pytest.raises(UserError, match="no distance: this needs at least 3 real images, not 2"):
        prepared(replace(data, test=data.test[:2]), metrics=["distance"])
    assert not prepared(data, 5).metrics
    assert "the protocol has 6 generated images, not 5" in capsys.readouterr().out


def test_what_is_long_is_computed_only_where_it_is_named(data, few):
    assert prepared(data).metrics.keys() == {"distance"} and prepared(data).images_needed == 6
    ready = prepared(data, metrics=["distance", "long"], reference="test")
    assert ready.images_needed == 9
    short, long = ready.compute(noise(9), "so")
    assert (short["num_generated"], short["num_real"]) == (6, 7)
    assert (long["num_generated"], long["num_real"], long["value"]) == (9, 79, 79), "training and held-out images"
    assert long["split"] == "train+held_out"


def test_the_network_is_recorded_by_its_weights(data, monkeypatch):
    def digests(scale):
        network = Pooling()
        network.scale.data *= scale
        monkeypatch.setitem(image_records.LOADERS, "free", lambda *_: FeatureNetwork(network, pooled, "so"))
        return {each["network"] for each in prepared(data, metrics=["distance"]).compute(noise(6), "so")}

    assert digests(1) == digests(1) != digests(2) and len(digests(1)) == 1


def test_the_protocols_of_the_field():
    """Numbers and reference as in docs/metrics.md."""
    table = {name: (metric.network, metric.generated, metric.split) for name, metric in TABLE.items()}
    assert table["fid"] == ("inception", 10_000, None) and table["fid_50k"] == ("inception", 50_000, "train+held_out")
    assert table["clean_fid"] == ("clean inception", 10_000, None)
    assert table["clean_fid_5k"] == ("clean inception", 5000, None)
    assert table.keys() == set(SAMPLE_METRICS) and all(metric.network in LOADERS for metric in TABLE.values())
    assert [name for name, metric in TABLE.items() if metric.by_name] == ["fid_50k"]


def test_weights_without_the_last_layer_give_no_inception_score(data, monkeypatch):
    network = Pooling()
    network.register_buffer("class_weight", torch.full((3, 4), torch.nan), persistent=False)
    monkeypatch.setattr(loaders, "load_inception", lambda *_: network)
    monkeypatch.setattr(image_records, "LOADERS", LOADERS)
    monkeypatch.setattr(image_records, "GENERATED_METRICS", {name: TABLE[name] for name in ("fid", "is")})
    with pytest.raises(UserError, match="no is: fid_weights has no weights of the last layer"):
        prepared(data, 2000, metrics=["is"], fid_weights="fid_weights")
    network.class_weight.zero_()
    assert prepared(data, 2000, metrics=["is"], fid_weights="fid_weights").metrics


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"metrics": ["both"]}, "no both: it cannot be downloaded"),
        (
            {"metrics": ["distance"], "num_samples": 5},
            "no distance: this needs at least 6 generated images, not 5: give 6 or more",
        ),
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
    def record(self):
        return {"seed": self.seed}

    def asked(self, temperature):
        return replace(self, temperature=temperature)

    def draw_images(self, samples):
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
    drawn, draw = [], Stub.draw_images
    monkeypatch.setattr(Stub, "draw_images", lambda self, samples: drawn.append(1) or draw(self, samples))
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
    """Whatever of a generator changes its samples changes its record, weights aside."""
    generator = code_diffusion(VQSVAE(1, 5, 4, 3, 4))
    machine = Machine(torch.device("cpu"), bf16=True)
    changes = {"seed": 1, "grid": (2, 1), "machine": machine}
    settings = {"sample_steps": 3, "reveal_order": "spread", "temperature": 2.0, "final_temperature": 0.5}
    records = [replace(generator, **{name: value}).record for name, value in changes.items()]
    records += [generator.asked(**{name: value}).record for name, value in settings.items()]
    records += [code_diffusion(VQSVAE(1, 5, 4, 2, 4)).record, generator.record]
    records.append(code_diffusion(VQSVAE(1, 5, 4, 3, 4, spike_generator="repeat")).record)
    assert len({json.dumps(each) for each in records}) == len(records)
    whole = replace(generator, batch_size=9).asked(sample_steps=4)
    assert whole.record == generator.record, "all four timesteps"


def test_a_temperature_is_not_chosen_on_few_images_or_on_the_test_split(data, tmp_path):
    few = replace(data, held_out=data.held_out[:64])
    with pytest.raises(UserError, match="--held_out"):
        temperature.choose_temperature(Stub(data.held_out), few, None, RunFolder(tmp_path), "weights")


# ---- generators ----


def code_diffusion(autoencoder, denoiser=None, grid=(2, 2)):
    return CodeDiffusion(autoencoder, denoiser or SDID(5, 3, 4), grid, CPU, 0, Settings(), batch_size=3)


def generators():
    torch.manual_seed(0)
    return {
        "snn-vq-vae": code_diffusion(VQSVAE(1, 5, 4, 3, 4)),
        "residual-svae": code_diffusion(ResidualSVAE(1, 4, 3, 4, downsampling=4), SDID(4, 3, 4), (4, 4)),
        "vq-vae": code_diffusion(VQVAE(1, 5, 4, 4)),
        "snn-vae": PriorSampling(FSVAE(1, 8, 6, 4, spike_steps=3, hidden_channels=4), CPU, 0, batch_size=3),
    }


@pytest.mark.parametrize("name", ["snn-vq-vae", "residual-svae", "vq-vae", "snn-vae"])
def test_samples_do_not_depend_on_the_batch(name, float64):
    generator = generators()[name]
    images = generator.draw_images(range(8))
    assert images.shape == (8, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(replace(generator, batch_size=8).draw_images(range(2, 7)), images[2:7])
    assert torch.equal(replace(generator, batch_size=1).reconstruct(noise(4)), generator.reconstruct(noise(4)))


@pytest.mark.parametrize("name", ["snn-vq-vae", "residual-svae", "vq-vae", "snn-vae"])
def test_cost_is_counted_and_leaves_the_model_as_it_was(name):
    generator = generators()[name]
    before = generator.draw_images(range(4))
    cost = generator.cost(noise(4))
    assert torch.equal(generator.draw_images(range(4)), before)
    assert set(cost.operations) >= {"encode", "decode", "sample"} and cost.operations["encode"].macs > 0
    assert all(0 <= rate <= 1 for rate in cost.firing_rates.values()) and cost.firing_rates
    # 3x3 weights at stride 2 from 8 to 4 to 2 positions an axis, then 1x1: 3n-1 of them meet no padding
    if name in ("snn-vq-vae", "vq-vae"):
        assert cost.operations["encode"].dense_macs == 11**2 * 4 + 5**2 * 4 * 8 + 2**2 * 8 * 4
    if name == "vq-vae":
        assert cost.operations["encode"].acs == 0
        assert cost.operations["encode"].macs == cost.operations["encode"].dense_macs
    else:
        assert cost.operations["encode"].macs != cost.operations["encode"].dense_macs


def test_a_sample_costs_a_pass_of_the_denoiser_at_each_timestep_and_a_decoding():
    whole = generators()["snn-vq-vae"]
    for generator, passes in ((whole, 4), (whole.asked(sample_steps=3), 3)):
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
    """The floor of whatever draws the autoencoder's codes: by the same network and reference, of all test images."""
    generator = generators()["vq-vae"]

    def distance(seen):
        return {"distance": frechet_distance(*feature_statistics(seen.generated), *feature_statistics(seen.real))}

    floors = {name: Metric("free", 4, 3, distance) for name in ("fad", "fid", "clean_fid")}
    monkeypatch.setattr(image_records, "GENERATED_METRICS", {**floors, "kid": Metric("free", 4, 3, distance)})

    def records_of(*names):
        ready = prepared(data, metrics=names)
        reconstructed = reconstructions(generator, ready, names)
        return [] if reconstructed is None else floor_records(reconstructed, ready)

    records = records_of(*image_records.GENERATED_METRICS)
    assert len(records) == 3
    ours, real = (pooled(images, Pooling()) for images in (generator.reconstruct(data.test), data.test))
    expected = frechet_distance(*feature_statistics(ours), *feature_statistics(real))
    for record in records:
        assert record["name"] == "reconstruction_distance" and record["value"] == pytest.approx(expected)
        assert record["num_generated"] == 7 and "reconstructions" in record["drawn"]
    assert records_of("fid") == [records[1]] == records_of("reconstruction_fid")
    too_few = {"fid": Metric("free", 8, 3, distance), "kid": Metric("free", 4, 3, distance)}
    monkeypatch.setattr(image_records, "GENERATED_METRICS", too_few)
    assert records_of("fid") == []
    monkeypatch.setattr(CodeDiffusion, "reconstruct", lambda *_: pytest.fail("in vain"))
    assert records_of("kid") == []


def test_held_out_images_are_reconstructed_where_choices_are_made_by_them(data, monkeypatch):
    """No value of the test split is computed then: a metric whose protocol has that split is refused."""
    generator = generators()["vq-vae"]
    monkeypatch.setitem(image_records.LOADERS, "free", lambda *_: FeatureNetwork(Pooling(), pooled, "so"))

    def count(seen):
        return {"count": len(seen.generated) + len(seen.real) / 100}

    table = {"fid": Metric("free", 9, 3, count, fewest=2), "fad": Metric("free", 2, 0, count, "test")}
    monkeypatch.setattr(image_records, "GENERATED_METRICS", table)
    held = replace(data, held_out=data.test[:4])
    names = ("reconstruction_fid", "mse")
    ready = prepared(held, metrics=names, reference="held_out")
    assert ready.images_needed == 0 and ready.reconstructed == "held_out"
    reconstructed = reconstructions(generator, ready, names)
    (floor,) = floor_records(reconstructed, ready)
    assert floor["name"] == "reconstruction_count_4_images" and floor["value"] == 4.04 and floor["split"] == "held_out"
    (error,) = autoencoder_records(generator, reconstructed, ready, names)
    assert error["split"] == "held_out" and error["num_real"] == 4
    assert ready.compute(reconstructed, "so") == []

    with pytest.raises(UserError, match="reconstruction_fad is of the test split: leave out --reference"):
        prepared(held, metrics=("reconstruction_fad",), reference="held_out")
    assert prepared(held, metrics=("reconstruction_fad",)).metrics.keys() == {"fad"}
    for names in (None, ("mse",)):
        with pytest.raises(UserError, match="no images are held out; a training with --held_out"):
            prepared(replace(data, held_out=data.test[:0]), metrics=names, reference="held_out")


def test_images_drawn_with_labels_are_judged_class_by_class(data, monkeypatch):
    """The share that is classified as the label, and distances within a class where it has enough images."""
    network = Pooling()
    network.head = torch.nn.Linear(4, 2)  # an image is a boot if it is brighter than grey
    network.head.weight.data, network.head.bias.data = torch.tensor([[-1.0], [1]]).repeat(1, 4), torch.tensor([1e3, 0])
    monkeypatch.setitem(image_records.LOADERS, "free", lambda *_: FeatureNetwork(network, pooled, "so"))

    monkeypatch.setattr(protocols, "classifier_distance", lambda *_: 1.0)  # of more images
    monkeypatch.setattr(protocols, "_prdc", lambda _: {})
    table = {
        "classifier": Metric("free", 6, 3, protocols._classifier_metrics, at_least=True),
        "recognition": Metric("free", 6, 3, protocols._recognition, at_least=True),
    }
    monkeypatch.setattr(image_records, "GENERATED_METRICS", table)
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
