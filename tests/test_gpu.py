"""The program on a CUDA device, compared with the CPU; skipped where there is none. `make test-gpu` runs it alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import IMPROVED, LIVELY, SMALL, read_images, read_log, read_metrics, run_in, with_steady_current

from models import SDID, VQSVAE, ResidualSDID, UNetSDID
from models.neurons import IF, LIF, PLIF
from pipeline.runtime.device import choose_machine
from pipeline.training.averaging import moving_average

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

GPU = torch.device("cuda")


@pytest.fixture
def float32():
    """Convolutions on the GPU compute in float32, as `--precision float32` chooses, not in TF32."""
    choose_machine("cuda", "float32")


@pytest.mark.parametrize("neuron", [LIF, IF, PLIF])
def test_a_neuron_is_that_of_the_cpu(neuron):
    """Spikes and gradients; the currents are multiples of 1/8, so that each processor computes potentials exactly."""
    torch.manual_seed(0)
    currents = torch.randint(-8, 24, (4, 3, 8, 5, 5)) / 8
    cotangent = torch.randn(currents.shape)
    results = []
    for device in ("cpu", "cuda"):
        x = currents.to(device).requires_grad_()
        spikes = neuron().to(device)(x)
        (gradient,) = torch.autograd.grad(spikes, x, cotangent.to(device))
        results.append((spikes.cpu(), gradient.cpu()))
    (spikes, gradient), (gpu_spikes, gpu_gradient) = results
    assert torch.equal(spikes, gpu_spikes) and 0.1 < spikes.mean() < 0.9
    torch.testing.assert_close(gpu_gradient, gradient)


@torch.no_grad()
def test_bfloat16_does_not_silence_a_neuron_just_above_its_threshold():
    """As on the CPU, where the networks' tests say why it is the ninth step."""
    with torch.autocast("cuda", torch.bfloat16):
        spikes = with_steady_current(1.003).to(GPU)(torch.ones(16, 1, 1, 1, 1, device=GPU))
    assert spikes.flatten().nonzero().tolist() == [[8]]


def networks():
    torch.manual_seed(0)
    tokens, t = torch.randint(0, 11, (6, 4, 4)), torch.randint(1, 17, (6,))
    return {
        "sdid": (SDID(10, spike_steps=4, denoiser_channels=8), (tokens, t)),
        "residual": (ResidualSDID(10, 2, denoiser_channels=16, denoiser_blocks=2, grid=(4, 4)), (tokens, t)),
        "unet": (UNetSDID(10, 2, denoiser_channels=48, denoiser_blocks=2, grid=(4, 4)), (tokens, t)),
        "vq-svae": (VQSVAE(1, 10, 6, spike_steps=4, hidden_channels=5), (torch.rand(6, 1, 8, 8) - 0.5, 0.1)),
    }


@pytest.mark.parametrize("name", ["sdid", "residual", "unet", "vq-svae"])
def test_networks_in_training_are_those_of_the_cpu(name, float32):
    """Loss and gradients of a batch; a neuron near its threshold may fire on one of them only, hence the tolerance."""
    model, inputs = networks()[name]
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        out = model.train()(*(each.to(device) if isinstance(each, torch.Tensor) else each for each in inputs))
        loss = out.loss if name == "vq-svae" else out.float().logsumexp(1).mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_logits_at_chosen_positions_are_those_of_the_whole_grid(float32):
    model, (tokens, t) = networks()["sdid"]
    model.to(GPU)
    tokens, t = tokens.to(GPU), t.to(GPU)
    with torch.no_grad():
        for _ in range(20):
            model.train()(tokens, t)
        model.eval()
        where = torch.rand(tokens.shape, device=GPU) < 0.3
        whole = model(tokens, t).permute(0, 2, 3, 1)[where]
        close = (model.logits_at(tokens, t, where) - whole).abs().amax(1) < 1e-3
    assert close.float().mean() > 0.9


def test_averages_are_those_of_the_cpu():
    averages = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        average = moving_average(model.to(device), 0.5)
        for step in range(4):
            with torch.no_grad():
                model.weight.fill_(step)
            average.update_parameters(model)
        averages.append(average.module.weight.detach().cpu())
    torch.testing.assert_close(*averages)


@pytest.fixture(scope="module")
def trained(grey, cli, tmp_path_factory):
    """Runs of both presets on the GPU, in the precision that it has."""
    runs = {}
    for name, options in (("faithful", (*SMALL, *LIVELY)), ("improved", IMPROVED)):
        result = tmp_path_factory.mktemp(name)
        lengths = ("--epochs", 2, "--diffusion_epochs", 2, "--ema_decay", 0.9)
        device = ("--device", "cuda", "--precision", "auto", "--result_path", result)
        outcome = cli(*grey, *options, *lengths, "--metrics", "mse,codebook,energy", *device)
        assert outcome.status == 0, outcome.err
        runs[name] = run_in(result)
    return runs


@pytest.mark.parametrize("preset", ["faithful", "improved"])
def test_a_run_learns_and_is_evaluated(preset, trained):
    log = read_log(trained[preset])
    first, second = (line["mse"] for line in log if line["stage"] == "vqsvae")
    assert second < first
    assert "mse" in read_metrics(trained[preset])


@pytest.mark.parametrize("preset", ["faithful", "improved"])
def test_weights_of_the_gpu_draw_nearly_the_same_images_on_the_cpu(preset, trained, cli, tmp_path):
    images = []
    for device in ("cpu", "cuda"):
        call = ("--checkpoint", trained[preset], "--stage", "sample", "--num_samples", 8, "--precision", "float32")
        outcome = cli(*call, "--device", device, "--result_path", tmp_path / device)
        assert outcome.status == 0, outcome.err
        images.append(read_images(tmp_path / device).astype(int))
    assert np.abs(images[0] - images[1]).mean() < 0.2 * np.abs(images[0] - images[0].mean()).mean() + 1


def test_a_run_is_resumed(trained, cli, tmp_path):
    run = Path(shutil.copytree(trained["faithful"], tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"diffusion_epochs": 3}))
    outcome = cli("--resume", run, "--device", "cuda")
    assert outcome.status == 0, outcome.err
    assert [line["epoch"] for line in read_log(run) if line["stage"] == "sdid"] == [1, 2, 3]
