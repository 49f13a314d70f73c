"""The loss on held-out images, after each epoch of both stages."""

import json

import pytest
import torch
from helpers import IMPROVED, SMALL, read_log, run_in
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets import ImageData, load_dataset
from diffusion.absorbing import TrainingNoise
from pipeline.run_folder import RunFolder
from pipeline.runtime.device import Machine
from pipeline.runtime.seeds import derive_seed
from pipeline.sampling.batches import encode_images
from pipeline.training import objectives
from pipeline.training.loop import Place, Trainer
from pipeline.training.objectives import HELD_OUT_IMAGES, some_held_out
from pipeline.training.schedules import Schedule
from pixels import to_float
from spiking_diffusion import SpikingDiffusion

HELD_OUT = 13  # in batches of 8 and 5


@pytest.fixture(scope="module")
def watched(cli, classes, tmp_path_factory):
    """A run with averaged weights, prototypes and labels, some of whose images are held out."""
    result = tmp_path_factory.mktemp("watched")
    outcome = cli(*classes, *IMPROVED, "--condition", "both", "--held_out", HELD_OUT, "--result_path", result)
    assert outcome.status == 0, outcome.err
    return run_in(result), outcome.out


def seeded(stage, batch):
    return torch.Generator().manual_seed(derive_seed(42, "held out", stage, batch))


def test_each_epoch_logs_it(watched, cli, grey, tmp_path):
    run, out = watched
    log = read_log(run)
    assert [line["stage"] for line in log] == ["vqsvae"] * 2 + ["sdid"] * 2
    assert all(line["held_out_loss"] > 0 for line in log) and out.count("held_out_loss") == 4
    assert cli(*grey, *SMALL, "--epochs", 1, "--stage", "vqsvae", "--result_path", tmp_path).status == 0
    assert all("held_out_loss" not in line for line in read_log(run_in(tmp_path))), "none are held out"


def test_tensorboard_and_report_show_it(cli, classes, watched):
    run, _ = watched
    for stage in ("vqsvae", "sdid"):
        events = EventAccumulator(str(run / "tensorboard" / stage))
        events.Reload()
        logged = [line["held_out_loss"] for line in read_log(run) if line["stage"] == stage]
        assert [event.value for event in events.Scalars(f"{stage}/held_out_loss")] == pytest.approx(logged)
    assert cli("--checkpoint", run, "--metrics", "codebook", report=True).status == 0
    html = (run / "report.html").read_text(encoding="utf-8")
    for stage in (1, 2):
        assert html.count(f"stage {stage}: loss; ×: on held-out images") >= 1
    assert html.count(", held-out images: from ") == 2 and "held_out_loss" not in html


def test_it_is_that_of_the_weights_that_are_kept(watched, classes):
    """Recomputed from the saved weights, which are averages, in evaluation mode, with the noise of each batch."""
    run, _ = watched
    data = load_dataset("ImageFolder", classes[3], image_size=16, held_out=HELD_OUT)
    model = SpikingDiffusion.load(run, device="cpu", precision="float32").model
    autoencoder, denoiser = model.autoencoder.eval(), model.denoiser.eval()
    autoencoder.clipped_error = True  # of training alone: it is not told by the weights
    losses = {"vqsvae": [], "sdid": []}
    with torch.no_grad():
        codes = encode_images(autoencoder, data.held_out, model.machine).long()
        told = denoiser.conditions.of(codes, data.held_out_labels, codebook=autoencoder.vq_layer)
        for batch, which in enumerate(torch.arange(HELD_OUT).split(8)):
            out = autoencoder(to_float(data.held_out[which]), data.variance, seeded(1, batch))
            losses["vqsvae"].append(out.loss.item() * len(which))
            generator = seeded(2, batch)
            known = objectives._dropped_out(told[which], generator)
            noise = model.diffusion.training_noise(len(which), model.grid, generator, "cross_entropy")
            loss = model.diffusion.loss(
                lambda tokens, t, known=known: denoiser(tokens, t, known),
                codes[which],
                TrainingNoise(*noise),
                "cross_entropy",
            )
            losses["sdid"].append(loss.item() * len(which))
    last = {line["stage"]: line["held_out_loss"] for line in read_log(run)}
    assert {stage: sum(each) / HELD_OUT for stage, each in losses.items()} == pytest.approx(last, rel=1e-5)


def test_every_epoch_has_the_same_noise(tmp_path):
    """Nothing but the noise changes this network's loss."""

    def losses(network, generator, batch):
        return {"loss": network(batch).sum() * 0 + torch.rand((), generator=generator)}

    with RunFolder(tmp_path) as run:
        place = Place(run, Schedule(3, 4, 0.1, seed=1), Machine(torch.device("cpu"), bf16=False))
        examples, network = (torch.ones(8, 2),), torch.nn.Linear(2, 1)
        Trainer((2, "sdid"), network, examples, losses, lambda *_: {}, place, run.model, held_out=examples).train()
    log = RunFolder(tmp_path).read_log()
    assert len({line["held_out_loss"] for line in log}) == 1 and len({line["loss"] for line in log}) == 3


def test_fsvae_has_one_too(cli, grey, tmp_path):
    tiny = ("--spike_steps", 4, "--hidden_channels", 4, "--num_samples", 3, "--device", "cpu", "--epochs", 2)
    options = ("--model", "snn-vae", "--held_out", 5, "--metrics", "mse", "--result_path", tmp_path)
    assert cli(*grey, *tiny, *options).status == 0
    lines = [json.loads(line) for line in (run_in(tmp_path, "snn-vae") / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["held_out_loss"] > 0 for line in lines)


@pytest.mark.parametrize("count", [0, 7, HELD_OUT_IMAGES, 2 * HELD_OUT_IMAGES + 1])
def test_its_cost_is_bounded(count):
    numbers = torch.arange(count)
    images = numbers.view(-1, 1, 1, 1)
    chosen = some_held_out(ImageData("numbers", images[:0], images[:0], images, held_out_labels=numbers))
    if not count:
        assert chosen is None
        return
    assert len(chosen.images) == min(count, HELD_OUT_IMAGES) and torch.equal(chosen.images.flatten(), chosen.labels)
    steps = chosen.labels.diff()
    assert chosen.labels[0] == 0 and steps.max() - steps.min() <= 1 and count - chosen.labels[-1] <= steps.max() + 1
