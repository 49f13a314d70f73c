"""The settings of samples: how they follow from the options, describe and record themselves."""

import json
from dataclasses import dataclass

import pytest
from helpers import ROOT

from pipeline.options.sections import DEFAULTS, SamplingOptions
from pipeline.sampling import settings
from pipeline.sampling.settings import Settings
from spiking_diffusion import SpikingDiffusion

ALL = Settings(0.9, 0.7, 22, "spread", 1.5, (7, 0))


def test_they_are_the_options_of_sampling_resolved():
    assert Settings.of(SamplingOptions(0.9, 0.7, 22, labels=("bag",))) == Settings(0.9, 0.7, 22)
    to_choose = Settings.of(SamplingOptions("auto", 0.7, guidance=2.0))
    assert to_choose == Settings(1.0, None, guidance=2.0), "one temperature for all timesteps"


@pytest.mark.parametrize(
    ("drawn_with", "words"),
    [
        (Settings(), "temperature 1, all timesteps, well"),
        (Settings(temperature_chosen=True), "temperature 1 chosen on held-out training images, all timesteps, well"),
        (ALL, "temperature 0.9 changing to 0.7, 22 timesteps, spread order, well, guidance 1.5, classes no 7, no 0"),
    ],
)
def test_in_words(drawn_with, words):
    assert drawn_with.in_words(lambda label: f"no {label}", "well") == words


def test_a_record_is_json_and_names_every_setting():
    record = ALL.record(49)
    assert (
        json.loads(json.dumps(record))
        == record
        == {
            "temperature": 0.9,
            "final_temperature": 0.7,
            "temperature_chosen": False,
            "sample_steps": 22,
            "reveal_order": "spread",
            "guidance": 1.5,
            "labels": [7, 0],
        }
    )
    assert Settings().record(49)["sample_steps"] == 49


@dataclass(frozen=True)
class More(Settings):
    top_k: int = 0


def test_a_setting_that_is_declared_is_described_and_recorded(monkeypatch):
    monkeypatch.setitem(DEFAULTS, "top_k", 0)
    assert More(top_k=5).record(9)["top_k"] == 5
    assert More(top_k=5).in_words(str) == "temperature 1, all timesteps, top_k 5"
    assert More().in_words(str) == Settings().in_words(str)
    assert vars(Settings()).keys() >= settings.IN_SENTENCES


@pytest.mark.parametrize("packed", ["fmnist", "mnist-faithful"])
def test_the_records_of_the_packed_weights_are_found_again(packed):
    """By the same keys, values and words."""
    folder = ROOT / "pretrained" / packed
    records = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    recorded = next(each for each in records if each["name"] == "fad")
    said = recorded["sampling"]
    asked = {key: said[key] for key in ("temperature", "final_temperature", "reveal_order", "guidance")}
    steps = None if "all timesteps" in recorded["drawn"] else said["sample_steps"]
    model = SpikingDiffusion.load(folder, device="cpu", seed=said["seed"], precision=said["precision"]).model
    model = model.asked(sample_steps=steps, labels=said["labels"] or None, **asked)
    assert model.record == said and model.drawn == recorded["drawn"]
