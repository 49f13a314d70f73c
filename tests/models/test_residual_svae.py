"""The residual autoencoder: what its codes are, and what reaches them."""

import numpy as np
import pytest
import torch
from helpers import as_modules, read_metrics, run_in
from torch import nn

from metrics.energy import count_layers, of_weights
from models import ResidualSVAE, choose_neuron
from models.neurons import FewSpikes
from models.residual_svae import SentNumbers
from spiking_diffusion import SpikingDiffusion

FS = choose_neuron("fs")


def made(training=False, **options):
    """A small one in float64, whose running statistics have seen images."""
    torch.manual_seed(0)
    model = ResidualSVAE(hidden_channels=6, **options).double()
    for _ in range(0 if training else 30):
        model(some_images(model.channels))
    return model.train(training)


def some_images(channels=1, count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, 16, 12, generator=generator).double()


@pytest.mark.parametrize("downsampling", [2, 4])
@pytest.mark.parametrize(("neuron", "spike_steps"), [("fs", 1), ("lif", 3)])
@torch.no_grad()
def test_a_code_is_the_number_that_a_neuron_sends(downsampling, neuron, spike_steps):
    model = made(downsampling=downsampling, neuron=choose_neuron(neuron), spike_steps=spike_steps, codebook_size=4)
    images = some_images()
    codes = model.encode(images)
    assert codes.shape == (3, 2 * 16 // downsampling, 2 * 12 // downsampling) and model.downsampling * 2 == downsampling
    assert len(codes.unique()) == 4 and len(model.encode(images[:1]).unique()) > 1
    numbers = []
    hook = model.encoder.fire_codes.lif.register_forward_hook(lambda _, __, sent: numbers.append(sent[0]))
    out = model(images)
    hook.remove()
    assert torch.equal(nn.functional.pixel_shuffle(numbers[0], 2)[:, 0], codes.double())  # 0, 1, 2, 3 with 2 digits
    assert torch.equal(out.codes, codes) and torch.equal(out.images, model.decode(codes)) and out.quantizer_loss == 0
    assert torch.equal(model.decode(codes[1:2]), out.images[1:2]), "no image depends on another"
    assert out.images.std() > 0.01 and out.images.shape == images.shape
    changed = codes.clone()
    changed[:, 0, 0] = 3 - changed[:, 0, 0]
    differs = (model.decode(changed) != out.images).flatten(0, 1).any(0)
    assert differs[0, 0] and not differs.all() if downsampling == 2 else differs.any()


@pytest.mark.parametrize("downsampling", [2, 4])
def test_every_weight_learns(downsampling):
    model = made(training=True, downsampling=downsampling, neuron=FS, codebook_size=8, autoencoder_blocks=2)
    model(some_images()).loss.backward()
    still = [name for name, weight in model.named_parameters() if weight.requires_grad and not weight.grad.any()]
    assert still == []
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == [
        "vq_layer.embeddings.weight"
    ]


@pytest.mark.parametrize("spike_steps", [1, 3])
@torch.no_grad()
def test_layers_called_as_modules_at_each_step_agree(spike_steps):
    model = made(spike_steps=spike_steps, downsampling=4, neuron=choose_neuron("lif"))
    fast = model(some_images())
    with as_modules(model):
        literal = model(some_images())
    assert torch.equal(fast.codes, literal.codes) and torch.allclose(fast.images, literal.images, atol=1e-9)


@torch.no_grad()
def test_every_layer_but_the_first_receives_spikes():
    model = made(neuron=FS, downsampling=4)
    layers = of_weights(count_layers(model, lambda: model(some_images()), images=3))
    multiplied = [name for name, counted in layers.items() if counted.macs]
    assert multiplied == ["encoder.embed"] and len(layers) == 14
    assert all(counted.acs for name, counted in layers.items() if name != "encoder.embed")


@pytest.mark.parametrize("codebook_size", [3, 12, 1, 512])
def test_other_sizes_than_powers_of_2_are_refused(codebook_size):
    with pytest.raises(ValueError, match=r"^codebook_size must be a power of 2 from 2 to 256, got"):
        ResidualSVAE(codebook_size=codebook_size)


def test_the_last_neurons_of_the_encoder_send_numbers_whatever_the_others_are():
    sending = [name for name, layer in made(spike_steps=2).named_modules() if isinstance(layer, FewSpikes)]
    assert sending == ["encoder.fire_codes.lif"]


def test_noise_of_codes_stays_near_them():
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


RUN = ("--model", "residual-svae", "--neuron", "fs", "--spike_steps", 1, "--codebook_size", 8, "--hidden_channels", 4)
OF_DENOISER = ("--denoiser", "residual", "--denoiser_channels", 16, "--sample_steps", 5, "--condition", "prototype")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_both_stages_of_a_run(precision, cli, grey, tmp_path):
    computing = ("--precision", precision, "--metrics", "mse,codebook,energy", "--result_path", tmp_path)
    trained = cli(*grey, *RUN, *OF_DENOISER, "--code_noise", 0.5, "--epochs", 1, "--diffusion_epochs", 1, *computing)
    assert trained.status == 0, trained.err
    run = run_in(tmp_path, "residual-svae")
    metrics = read_metrics(run)
    assert metrics["codebook_usage"]["value"] > 0.5 and metrics["energy_sample"]["acs"] > 0
    model = SpikingDiffusion.load(run)
    codes = model.encode(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    assert codes.shape == (2, 8, 8) and model.decode(codes).shape == (2, 1, 16, 16)
    for stage in (("sample",), ("inpaint", "--mask", "left")):
        outcome = cli(*grey, "--checkpoint", run, "--stage", *stage, "--num_samples", 2)
        assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--codebook_size", 12), "--codebook_size must be a power of 2 from 2 to 256, got 12"),
        (("--sort_codes",), "residual-svae has no --sort_codes: leave it out"),
        (("--embedding_dim", 4), "residual-svae has no --embedding_dim: leave it out"),
        (("--revive_codes",), "residual-svae has no --revive_codes: leave it out"),
    ],
    ids=str,
)
def test_what_it_does_not_have_is_refused(options, said, cli, grey, tmp_path):
    outcome = cli(*grey, *RUN, *options, "--result_path", tmp_path)
    assert outcome.status == 2 and said in outcome.err and outcome.err.count("\n") == 1
