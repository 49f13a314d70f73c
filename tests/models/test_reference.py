"""What the networks compute is what the equations say (models/reference.py): outputs, gradients, running statistics.

In float64, to 1e-9.
"""

import re
from functools import partial
from typing import NamedTuple

import pytest
import torch
from helpers import FAST, ROOT
from torch import nn

from diffusion.absorbing import AbsorbingDiffusion
from models import SDID, VQSVAE, ResidualSDID, UNetSDID, choose_neuron, reference
from models.conditions import NOT_GIVEN

K = 10
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
NEURONS = {
    "lif": choose_neuron("lif"),
    "lif, other constants": choose_neuron("lif", tau=3.0, v_threshold=0.7),
    "if": choose_neuron("if"),
    "plif": choose_neuron("plif", tau=3.0),
    "plif, soft reset": choose_neuron("plif", v_reset=None),
    "fs": choose_neuron("fs"),
}


def lively(network):
    """In float64, with neurons that fire in every layer."""
    for norm in (layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 1, 3)
        nn.init.uniform_(norm.bias, 0.5, 1.5)
    return network.double()


class Outcome(NamedTuple):
    """Outputs, all gradients of a sum in which no two of them weigh alike, and running statistics."""

    outputs: list
    gradients: dict
    buffers: dict


def outcome(network, state, call, *inputs):
    network.load_state_dict(state)
    network.zero_grad()
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    out = call(*inputs)
    outputs = list(out) if isinstance(out, tuple) else [out]
    for each in outputs:
        if each.requires_grad:
            (each * torch.linspace(0.5, 1, each.numel()).view_as(each)).sum().backward(retain_graph=True)
    learned = {**dict(network.named_parameters()), **{f"input {i}": x for i, x in enumerate(inputs)}}
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad.clone() for name, x in learned.items()}
    return Outcome([each.detach() for each in outputs], gradients, {n: b.clone() for n, b in network.named_buffers()})


def agreed(network, training, name, bound, *inputs, **options):
    """What both computations of this name give."""
    network.train(training)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    calls = [partial(getattr(by, name), bound, **options) for by in (reference, FAST)]
    literal, fast = (outcome(network, state, call, *inputs) for call in calls)
    for theirs, ours in zip(literal.outputs, fast.outputs, strict=True):
        assert_close(ours, theirs)
    for theirs, ours in zip(literal[1:], fast[1:], strict=True):
        assert theirs.keys() == ours.keys()
        for key in theirs:
            assert_close(ours[key], theirs[key])
    return literal


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if theirs.is_floating_point():
        assert float((ours - theirs).abs().max()) <= 1e-9 * max(1.0, float(theirs.abs().max()))
    else:
        assert torch.equal(ours, theirs)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- stage 1 ----


def autoencoder(neuron="lif", **options):
    torch.manual_seed(0)
    small = dict(codebook_size=K, embedding_dim=6, hidden_channels=5, spike_steps=4)
    return lively(VQSVAE(2, **small | options, neuron=NEURONS[neuron]))


def some_images():
    return torch.rand(5, 2, 16, 12, generator=seeded()).double()


def some_spikes(*shape):
    return (torch.rand(*shape, generator=seeded()) < 0.4).double()


def some_codes(*shape):
    return torch.randint(K, shape, generator=seeded())


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_filters(steps):
    spikes = some_spikes(steps, 3, 4, 5, 5)
    nothing = nn.Identity()
    for name in ("postsynaptic_potential", "membrane_potential"):
        call = [partial(outcome, nothing, {}, getattr(by, name)) for by in (reference, FAST)]
        literal, fast = (each(spikes) for each in call)
        assert_close(fast.outputs[0], literal.outputs[0])
        assert_close(fast.gradients["input 0"], literal.gradients["input 0"])


@MODES
@pytest.mark.parametrize("neuron", NEURONS)
def test_encoder(neuron, training):
    model = autoencoder(neuron)
    found = agreed(model, training, "encoder", model, some_images())
    assert 0.05 < found.outputs[0].ne(0).double().mean() < 0.95 and found.gradients["encoder.snn_convs.0.weight"].any()
    assert ("encoder.snn_convs.2.w" in found.gradients) == neuron.startswith("plif")


@pytest.mark.parametrize("kind", ["both", "rate", "potential"])
def test_readout(kind):
    quantizer = autoencoder(readout=kind).vq_layer
    found = agreed(quantizer, True, "readout", quantizer, some_spikes(4, 5, 6, 4, 3))
    assert bool(found.gradients["alpha"].any()) == (kind == "both") and found.gradients["input 0"].any()


def test_codes_and_embeddings():
    quantizer = autoencoder().vq_layer
    found = agreed(quantizer, True, "nearest", quantizer, torch.randn(50, 6, 4, 3, generator=seeded()).double())
    assert found.outputs[0].unique().numel() == K
    agreed(quantizer, True, "embed", quantizer, found.outputs[0])


@MODES
@pytest.mark.parametrize("neuron", NEURONS)
def test_spike_generator(neuron, training):
    quantizer = autoencoder(neuron).vq_layer
    embedded = torch.randn(5, 6, 4, 3, generator=seeded()).double()
    found = agreed(quantizer, training, "spike_generator", quantizer, embedded)
    assert 0.05 < found.outputs[0].ne(0).double().mean() < 0.95 and found.gradients["input 0"].any()


@MODES
@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("downsampling", [4, 2])
def test_decoder(downsampling, neuron, training):
    model = autoencoder(neuron, downsampling=downsampling)
    found = agreed(model, training, "decoder", model, some_spikes(4, 5, 6, 4, 3))
    assert found.outputs[0].std() > 0.01 and found.gradients["decoder.snn_convs.0.weight"].any()


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("readout", ["both", "rate", "potential"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_reconstruction_and_loss(readout, steps, training):
    model = autoencoder(readout=readout, spike_steps=steps)
    found = agreed(model, training, "reconstruct", model, some_images(), torch.tensor(0.1).double())
    assert all(found.gradients[f"{part}.weight"].any() for part in ("encoder.snn_convs.0", "vq_layer.embeddings"))
    assert steps == 1 or found.outputs[1].unique().numel() > 1, "several codes"


def test_images_to_codes_and_back():
    model = autoencoder().eval()
    (codes,) = agreed(model, False, "encode", model, some_images()).outputs
    (images,) = agreed(model, False, "decode", model, codes).outputs
    assert_close(images, reference.reconstruct(model, some_images()).images.detach())


# ---- stage 2 ----


def denoiser(neuron="lif", steps=4):
    torch.manual_seed(0)
    return lively(SDID(K, steps, 4, neuron=NEURONS[neuron]))


def corrupted(grid=(5, 5)):
    """Codes, timesteps and masks of six images."""
    codes, diffusion = some_codes(6, *grid), AbsorbingDiffusion(K, grid[0] * grid[1])
    return codes, *diffusion.training_noise(6, grid, seeded())


def test_forward_process():
    codes, t, mask = corrupted()
    generator = seeded()
    assert torch.equal(torch.randint(1, 26, (6,), generator=generator), t)
    uniforms = torch.rand(6, 5, 5, generator=generator)
    tokens = reference.corrupt(codes, t, uniforms, K)
    assert torch.equal(AbsorbingDiffusion(K, 25).q_sample(codes, mask), tokens) and 0 < mask.double().mean() < 1


@MODES
@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("steps", [1, 4])
def test_sdid(steps, neuron, training):
    network, (codes, t, mask) = denoiser(neuron, steps), corrupted()
    found = agreed(network, training, "sdid", network, torch.where(mask, K, codes), t)
    assert found.outputs[0].shape == (6, K, 5, 5) and found.gradients["conv1.0.weight"].any()


@pytest.mark.parametrize("kind", ["reweighted_elbo", "elbo"])
def test_diffusion_loss(kind):
    network, (codes, t, mask) = denoiser(), corrupted()
    logits = torch.randn(6, K, 5, 5, generator=seeded()).double()
    literal, fast = (by.cross_entropy(logits, codes, mask) for by in (reference, FAST))
    assert_close(fast, literal)
    found = agreed(network, True, "diffusion_loss", network, codes, t, mask, kind=kind)
    assert found.gradients["conv6.0.weight"].any()


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_reverse_process(temperature):
    network, diffusion = denoiser().eval(), AbsorbingDiffusion(K, 25)
    noise = diffusion.noise(0, range(12), (5, 5))
    codes = reference.sample(partial(reference.sdid, network), *noise, K, temperature)
    assert torch.equal(diffusion.sample(network.logits_at, noise, temperature), codes)
    assert codes.max() < K and len(codes.unique()) > 5


# ---- the residual denoiser and the U-Net ----


@MODES
@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize(
    ("kind", "computation", "grid"),
    [
        (ResidualSDID, "residual_sdid", (4, 6)),
        (ResidualSDID, "residual_sdid", (5, 3)),
        (UNetSDID, "unet_sdid", (4, 6)),
        (UNetSDID, "unet_sdid", (24, 16)),
    ],
    ids=["squares of tokens", "single tokens", "U-Net of single tokens", "U-Net of squares"],
)
@pytest.mark.parametrize("told", [True, False])
def test_residual_denoisers(told, kind, computation, grid, neuron, training):
    torch.manual_seed(0)
    conditions = dict(prototypes=3, classes=2) if told else {}
    network = lively(kind(K, 3, 48, 2, grid=grid, neuron=NEURONS[neuron], **conditions))
    tokens, condition = torch.randint(0, K + 1, (6, *grid)), ()
    if told:
        condition = (torch.tensor([[0, 1], [NOT_GIVEN, 0], [2, NOT_GIVEN], [NOT_GIVEN, NOT_GIVEN], [1, 1], [2, 0]]),)
        nn.init.normal_(network.prototypes.embed.weight), nn.init.normal_(network.labels.embed.weight)
        network.prototypes.grids.copy_(some_codes(3, *grid))
    found = agreed(network, training, computation, network, tokens, *condition)
    assert found.outputs[0].shape == (6, K, *grid) and found.gradients["embed.weight"].any()
    if not training:
        where, t = torch.rand(tokens.shape) < 0.3, torch.ones(6)
        expected = found.outputs[0].movedim(1, 3)[where]
        assert_close(network.logits_at(tokens, t, where, *condition).detach(), expected)


# ---- the table in docs/method.md ----


def rows():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    lines = text.split("## The equations")[1].split("\n## ")[0].splitlines()
    return [line for line in lines if re.match(r"\| \d+ \|", line)]


def test_each_row_names_its_function_what_computes_it_and_its_test():
    for number, row in enumerate(rows(), 1):
        links = re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)\)", row)
        assert len(links) == 3 and row.startswith(f"| {number} |") and links[0][1] == "models/reference.py"
        for name, file in links:
            assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name
        assert getattr(reference, links[0][0]).__doc__.startswith(f"({number}) ")


def test_each_equation_of_the_reference_has_a_row():
    numbered = [f for f in vars(reference).values() if re.match(r"\(\d+\) [^t]", getattr(f, "__doc__", None) or "")]
    assert len(numbered) == len(rows()) == 17
