"""`--drawn_codes`: the decoder alone learns to decode what the denoiser has drawn in part."""

import json

import numpy as np
import pytest
import torch
from helpers import IMPROVED, read_log, run_in

from pipeline.checkpoints import load_weights
from pipeline.sampling import image_models
from pipeline.session import open_session

DRAWN = ("--stage", "vqsvae", "--drawn_codes", "--epochs", 2, "--lr", 1e-3, "--ema_decay", 0.5)


@pytest.fixture(scope="module")
def start(cli, classes, tmp_path_factory):
    """A run of both stages, with conditions."""
    result = tmp_path_factory.mktemp("start")
    outcome = cli(*classes, *IMPROVED, "--condition", "both", "--held_out", 10, "--result_path", result)
    assert outcome.status == 0, outcome.err
    return run_in(result)


@pytest.fixture(scope="module")
def drawn(cli, classes, start, tmp_path_factory):
    result = tmp_path_factory.mktemp("drawn")
    outcome = cli(*classes, *DRAWN, "--held_out", 10, "--start_from", start, "--result_path", result)
    assert outcome.status == 0, outcome.err
    return run_in(result), outcome.out


def test_nothing_but_the_decoder_changes(start, drawn):
    run, out = drawn
    before, after = load_weights(start / "model.pth"), load_weights(run / "model.pth")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    learned = {name for name in before if name.startswith("decoder.") and name.endswith("weight")}
    assert learned <= changed
    old, new = (load_weights(folder / "diff_result/diff_model.pth") for folder in (start, run))
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert f"2 epochs of the decoder alone, on codes that the denoiser of {start} has drawn in part" in out
    assert [sorted(line) for line in read_log(run)] == [
        sorted(("codebook_usage", "epoch", "held_out_loss", "images", "loss", "mse", "quantizer_loss", "stage"))
    ] * 2


def test_the_run_can_be_used_and_says_where_its_weights_come_from(cli, start, drawn, tmp_path):
    run, _ = drawn
    config, old = (json.loads((folder / "config.json").read_text()) for folder in (run, start))
    assert config["lineage"][:2] == old["lineage"]
    entry = config["lineage"][2]
    assert (entry["stage"], entry["options"]["drawn_codes"], len(config["lineage"])) == ("vqsvae", True, 3)
    assert entry["weights_before"] == old["lineage"][0]["weights_after"] != entry["weights_after"]
    for name in ("sample_steps", "reveal_order", "temperature", "final_temperature"):
        assert config[name] == old[name]
    outcome = cli("--checkpoint", run, "--stage", "sample", "--num_samples", 3, "--result_path", tmp_path)
    assert outcome.status == 0, outcome.err


def test_it_is_resumed(cli, classes, start, drawn, tmp_path):
    short = (*DRAWN, "--held_out", 10, "--max_minutes", 1e-6)
    assert cli(*classes, *short, "--start_from", start, "--result_path", tmp_path).status == 0
    run = run_in(tmp_path)
    while "reached: saved" in (outcome := cli("--resume", run)).out:
        assert outcome.status == 0, outcome.err
    assert outcome.status == 0, outcome.err
    wanted, found = load_weights(drawn[0] / "model.pth"), load_weights(run / "model.pth")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_codes_are_given_and_drawn_as_in_a_sample(start, monkeypatch):
    session = open_session(checkpoint=start / "model.pth", device="cpu")
    model = session.read_model()
    images = session.data.train
    codes = model.encode(images).long()
    assert model.redrawn(images, session.data.train_labels).shape == codes.shape
    for kept, expected in ((1.0, codes), (0.0, None)):
        monkeypatch.setattr(image_models, "KEPT", (kept, kept))
        found = model.redrawn(images, session.data.train_labels)
        assert expected is None or torch.equal(found, expected)
    assert found.max() < model.autoencoder.codebook_size and not torch.equal(found, codes)
    monkeypatch.setattr(image_models, "KEPT", (0.5, 0.5))
    found = model.asked(sample_steps=3, reveal_order="spread").redrawn(images, session.data.train_labels)
    same = (found == codes).flatten(1).sum(1)
    assert (same >= codes[0].numel() / 2).all() and not (same == codes[0].numel()).all(), "half of them are given"
    times = model.diffusion.noise(model.seed, range(len(images)), model.grid, None, "spread").reveal_times
    first = times > model.diffusion.num_timesteps / 2
    assert torch.equal(found[first], codes[first]), "those that a sample begins with"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--drawn_codes needs a trained denoiser: name its run with --start_from"),
        (("--embedding_dim", 5), "has an autoencoder of other options: omit --embedding_dim"),
        (("--stage", "sdid"), "--drawn_codes"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options, said, cli, classes, start, tmp_path):
    place = ("--start_from", start) if options else ()
    outcome = cli(*classes, *DRAWN, *options, *place, "--result_path", tmp_path)
    assert outcome.status == 2 and said in outcome.err and outcome.err.count("\n") == 1


def test_a_run_without_denoiser_is_refused(cli, classes, tmp_path):
    first = ("--stage", "vqsvae", "--epochs", 1, "--hidden_channels", 4, "--result_path", tmp_path / "1")
    assert cli(*classes, *first).status == 0
    run = run_in(tmp_path / "1")
    outcome = cli(*classes, *DRAWN, "--start_from", run, "--result_path", tmp_path / "2")
    assert outcome.status == 2 and f"{run} has no denoiser to draw codes: --stage sdid trains one" in outcome.err


def test_noise_of_codes_stays_near_them():
    from models.residual_svae import SentNumbers

    layer = SentNumbers(8, code_noise=0.5).double()
    numbers = (torch.arange(8).double() / 2).repeat(1, 1, 1000, 1).requires_grad_()
    out = layer(numbers, torch.Generator().manual_seed(0))
    steps = ((out.quantized - numbers) * 2).detach()
    assert set(steps.unique().tolist()) == {-1, 0, 1}
    shares = np.array([(steps == step).double().mean((0, 1, 2)).numpy() for step in (-1, 0, 1)])
    assert np.allclose(shares[:, 1:-1], [[0.25], [0.5], [0.25]], atol=0.05)
    assert shares[0, 0] == 0 == shares[2, -1], "there are no others beyond the last"
    assert torch.equal(out.codes, (2 * numbers[:, 0]).long()), "codes are those of the image"
    out.quantized.sum().backward()
    assert (numbers.grad == 1).all()
    assert torch.equal(out.quantized, layer(numbers, torch.Generator().manual_seed(0)).quantized)
    assert torch.equal(layer.eval()(numbers).quantized, numbers)
