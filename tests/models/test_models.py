"""Properties of the networks: no state between calls, gradients, what is computed where, and in which type."""

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import as_modules, with_steady_current
from torch import nn

from diffusion.absorbing import AbsorbingDiffusion
from metrics.energy import count_layers, of_weights
from models import (
    FSVAE,
    SDID,
    VQSVAE,
    VQVAE,
    Denoiser,
    ResidualSDID,
    ResidualSVAE,
    UNetSDID,
    build_denoiser,
    build_model,
    denoiser_options,
    model_options,
    reference,
)
from models.kernels import compiled
from models.neurons import IF, LIF, PLIF
from models.quantizer import Codebook
from parts import AUTOENCODERS, DENOISERS, find_part

KERNELS = pytest.mark.skipif(not compiled.available(), reason="no C++ compiler")


def small_autoencoder(channels=1):
    torch.manual_seed(0)
    return VQSVAE(channels, codebook_size=10, embedding_dim=6, spike_steps=4, hidden_channels=5)


def small_denoiser():
    """An SDID whose running statistics have seen data, so that its neurons fire in evaluation mode."""
    torch.manual_seed(0)
    model = SDID(codebook_size=10, spike_steps=4, denoiser_channels=4)
    with torch.no_grad():
        for _ in range(30):
            model(*random_tokens())
    return model.eval()


def exact_denoiser():
    """An SDID that float32 computes exactly, in whatever order: weights are sixteenths, batch norm multiplies by 8."""
    torch.manual_seed(0)
    model = SDID(codebook_size=10, spike_steps=4, denoiser_channels=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((16 * parameter).round() / 16)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.constant_(norm.weight, 8.0)
        norm.eps = 1e-30  # nothing in float32; 0 is refused by some versions of torch
    return model


def random_tokens(samples=6, side=5):
    return torch.randint(0, 11, (samples, side, side)), torch.randint(1, side * side + 1, (samples,))


def test_unknown_model_names_the_valid_ones():
    for function in (build_model, model_options):
        with pytest.raises(ValueError, match="snn-vq-vae, residual-svae, vq-vae, snn-vae"):
            function("snn-vq-vea")
    for function in (build_denoiser, denoiser_options):
        with pytest.raises(ValueError, match="sdid, residual"):
            function("snn-vq-vae")


@pytest.mark.parametrize(
    ("build", "options_of", "table"),
    [(build_model, model_options, AUTOENCODERS), (build_denoiser, denoiser_options, DENOISERS)],
    ids=["autoencoder", "denoiser"],
)
def test_a_network_takes_its_own_options_alone(build, options_of, table):
    values = dict(
        channels=3,
        codebook_size=16,
        embedding_dim=6,
        spike_steps=2,
        hidden_channels=4,
        image_size=12,
        denoiser_channels=48,
    )
    for name in table:
        own = {key: value for key, value in values.items() if key in options_of(name)}
        assert type(build(name, **own)) is find_part(table, name)
        others = values.keys() - own.keys()
        for strange in ("widht", *others):  # misspelt, or of another network
            with pytest.raises(ValueError, match=f"^{name} has no option {strange}: its options are "):
                build(name, **own, **{strange: 4})
    assert set(model_options("vq-vae")) == {"channels", "codebook_size", "embedding_dim", "hidden_channels"}
    assert build_denoiser("sdid", denoiser_channels=4).conv1[0].out_channels == 4


OPTIONS = {
    VQSVAE: {"channels": 3, "codebook_size": 20, "embedding_dim": 6, "hidden_channels": 4},
    ResidualSVAE: {
        **{"channels": 3, "codebook_size": 16, "hidden_channels": 4, "downsampling": 4, "autoencoder_blocks": 2}
    },
    VQVAE: {"channels": 3, "codebook_size": 20, "embedding_dim": 6, "hidden_channels": 4},
    FSVAE: {
        **{"channels": 3, "image_size": 20, "latent_dim": 7, "candidates": 3},
        **{"hidden_channels": 4, "embedding_dim": 6},
    },
    SDID: {"codebook_size": 20, "denoiser_channels": 4},
    ResidualSDID: {
        "codebook_size": 20,
        "denoiser_channels": 16,
        "denoiser_blocks": 2,
        "prototypes": 3,
        "classes": 5,
        "grid": (4, 6),
        "patch": 2,
        "margin": 1,
    },
    UNetSDID: {
        "codebook_size": 20,
        "denoiser_channels": 48,
        "denoiser_blocks": 2,
        "prototypes": 3,
        "classes": 5,
        "grid": (4, 8),
        "patch": 2,
    },
}


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_options_are_read_off_the_weights(kind):
    assert kind.options_of(kind(**OPTIONS[kind]).state_dict()) == OPTIONS[kind]
    others = {**VQSVAE().state_dict()} if kind is not VQSVAE else VQVAE().state_dict()
    with pytest.raises(KeyError):
        kind.options_of(others)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)], ids=["squares of tokens", "single tokens"])
def test_older_weights_have_no_margin_until_they_are_trained_further(grid):
    shape = {"codebook_size": 10, "denoiser_channels": 16, "denoiser_blocks": 1, "grid": grid}
    older, wider = ResidualSDID(**shape, margin=0).double(), ResidualSDID(**shape).double()
    weights = older.state_dict()
    options = ResidualSDID.options_of(weights)
    assert (options["grid"], options["margin"]) == (grid, 0)
    wider.load_pretrained(weights)
    tokens, t = torch.randint(0, 11, (6, *grid)), torch.ones(6, dtype=torch.int64)
    torch.testing.assert_close(wider(tokens, t), older(tokens, t))


@pytest.mark.parametrize("kind", [ResidualSDID, UNetSDID])
def test_every_weight_of_a_residual_denoiser_meets_spikes(kind):
    """Operations are accumulates alone; a width that its heads cannot share is refused."""
    model = kind(codebook_size=10, spike_steps=3, denoiser_channels=48, denoiser_blocks=2, grid=(4, 4)).eval()
    tokens = torch.randint(0, 11, (6, 4, 4))
    layers = of_weights(count_layers(model, lambda: model(tokens, torch.ones(6).long()), 6, 3))
    assert all(each.macs == 0 < each.acs for each in layers.values())
    assert all(each.acs < 3 * each.dense_macs for name, each in layers.items() if name != "embed"), "that is looked up"
    with pytest.raises(ValueError, match=r"^denoiser_channels must be a multiple of"):
        kind(denoiser_channels=24)


def test_an_image_keeps_its_size_on_a_finer_grid():
    images = torch.rand(2, 3, 12, 16)
    out = VQSVAE(3, codebook_size=5, embedding_dim=6, spike_steps=2, hidden_channels=4, downsampling=2)(images)
    assert out.images.shape == images.shape and out.codes.shape == (2, 6, 8)


def test_dead_codes_move_to_where_vectors_are():
    """Embeddings far from all vectors are replaced by some of them; used ones, and all in evaluation mode, stay."""
    torch.manual_seed(0)
    encoded = torch.rand(8, 4, 5, 5)
    codebook = Codebook(20, 4, revive_codes=True)
    far = codebook.embeddings.weight.data[10:] = torch.full((10, 4), 100.0)
    codebook.eval()(encoded)
    assert torch.equal(codebook.embeddings.weight[10:], far)
    used = codebook.nearest_codes(encoded).unique()
    before = codebook.embeddings.weight.detach().clone()
    out = codebook.train()(encoded)
    after = codebook.embeddings.weight.detach()
    assert torch.equal(after[used], before[used])
    vectors = encoded.permute(0, 2, 3, 1).flatten(0, 2)
    assert all((vectors == embedding).all(1).any() for embedding in after[10:])
    assert out.codes.unique().numel() > used.numel(), "the batch itself is quantised with them"


@pytest.mark.parametrize("build", [lambda: small_autoencoder(3), lambda: VQVAE(3, 10, 6, 5)])
def test_renumbered_codes_stand_for_the_same(build):
    torch.manual_seed(0)
    model, images, order = build(), torch.rand(20, 3, 8, 8), torch.randperm(10)
    with torch.no_grad():
        for norm in (module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)):
            nn.init.constant_(norm.weight, 8.0)  # neurons fire
        alone = torch.arange(10).view(-1, 1, 1)
        before, decoded = model(images), model.decode(alone)
        assert decoded.mean((1, 2, 3)).unique().numel() > 1
        model.renumber(order)
        after = model(images)
        assert torch.equal(order[after.codes], before.codes) and torch.equal(after.images, before.images)
        assert torch.equal(model.decode(alone), decoded[order])


def test_clipped_error_leaves_out_what_clipping_mends():
    model = VQSVAE(codebook_size=5, embedding_dim=6, spike_steps=2, hidden_channels=4, clipped_error=True)
    y = torch.tensor([-0.9, -0.1, 0.8, 0.1, 0.7], requires_grad=True)
    pixels = torch.tensor([-0.5, -0.5, 0.5, 0.5, 0.2])
    error = model._error(y, pixels)
    assert error.item() == pytest.approx((0.4**2 + 0.4**2 + 0.5**2) / 5)
    error.backward()
    assert y.grad[[0, 2]].tolist() == [0, 0] and (y.grad[[1, 3, 4]] != 0).all()
    assert model.decoder.snn_convs[-1].bias.item() == 0


def test_lif_by_hand():
    current = torch.tensor([1.5, 1.5, 1.5, 3.0])
    # H: 0.75, 1.125 -> fires and resets, 0.75, 1.875 -> fires
    assert LIF()(current[:, None]).flatten().tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "neuron", [LIF(), LIF(3.0, 0.7, None), IF(), PLIF(3.0, v_reset=-0.2)], ids=["LIF", "soft", "IF", "PLIF"]
)
def test_a_neuron_step_by_step_is_the_whole_neuron(neuron):
    torch.manual_seed(0)
    current = torch.randn(12, 50, dtype=torch.float64) + 1.5
    results = []
    for whole in (True, False):
        inputs, state, spikes = current.clone().requires_grad_(), neuron.rest(), []
        neuron.zero_grad()
        for x in [] if whole else inputs:
            spike, state = neuron.step(x, state)
            spikes.append(spike)
        out = neuron(inputs) if whole else torch.stack(spikes)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), inputs.grad, *(parameter.grad for parameter in neuron.parameters())))
    torch.testing.assert_close(*results)
    assert 0.1 < results[0][0].mean() < 0.9


def test_lif_in_bfloat16_has_a_float32_membrane():
    """Currents that bfloat16 holds give the spikes that they give in float32."""
    current = (torch.randn(16, 2000, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()
    spikes = LIF()(current)
    assert spikes.dtype == torch.bfloat16
    assert torch.equal(spikes.float(), LIF()(current.float()))


@pytest.mark.parametrize("path", ["fused", "plain", "modules"])
@torch.no_grad()
def test_bfloat16_does_not_silence_a_neuron_just_above_its_threshold(path, monkeypatch):
    """A steady current x charges a neuron at rest to x (1 - 2^-s); in bfloat16, 1.003 is 1, which is never reached."""
    stack = with_steady_current(1.003)
    if path == "plain":  # as on a GPU, or without a compiler
        monkeypatch.setattr(compiled, "available", lambda: False)
    with as_modules(stack) if path == "modules" else nullcontext(), torch.autocast("cpu", torch.bfloat16):
        spikes = stack(torch.ones(16, 1, 1, 1, 1))
    assert torch.tensor(1.003, dtype=torch.bfloat16) == 1
    assert spikes.flatten().nonzero().tolist() == [[8]]  # 2^-9 < 0.003 / 1.003 < 2^-8


def test_lif_surrogate_gradient():
    """One step: H = x / 2 and ds/dH = 1 / (1 + (pi (H - 1))^2)."""
    x = torch.tensor([[0.8, 2.0, 3.4]], dtype=torch.float64, requires_grad=True)
    LIF()(x).sum().backward()
    h = x.detach() / 2
    torch.testing.assert_close(x.grad, 0.5 / (1 + (torch.pi * (h - 1)) ** 2))


@torch.no_grad()
def test_no_state_survives_a_call():
    model, denoiser = small_autoencoder().eval(), small_denoiser()
    images, (tokens, t) = torch.rand(6, 1, 12, 12), random_tokens()
    codes = model.encode(images)
    for call in (
        lambda: model.encode(images),
        lambda: model.decode(codes),
        lambda: model(images).loss,
        lambda: denoiser(tokens, t),
        lambda: denoiser.logits_at(tokens, t, tokens == 10),
    ):
        assert torch.equal(call(), call())


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    model = small_autoencoder(channels=3).double().eval()
    images = torch.rand(5, 3, 16, 12, dtype=torch.float64)
    codes = model.encode(images)
    assert codes.shape == (5, 4, 3)
    assert torch.equal(model.encode(images[2:3]), codes[2:3])
    torch.testing.assert_close(model.decode(codes)[2:3], model.decode(codes[2:3]))


@torch.no_grad()
def test_reconstruction_is_the_decoding_of_the_codes():
    model = small_autoencoder().double().eval()
    images = torch.rand(4, 1, 12, 12, dtype=torch.float64)
    out = model(images)
    torch.testing.assert_close(model.decode(out.codes), out.images)
    assert torch.equal(model.encode(images), out.codes)
    assert out.images.min() >= 0 and out.images.max() <= 1


@torch.no_grad()
def test_logits_at_chosen_positions():
    """Only part of the grid is computed, and the logits there are the same; including corners and empty samples."""
    denoiser = small_denoiser().double()
    tokens, t = random_tokens(samples=8, side=7)
    logits = denoiser(tokens, t)
    assert logits.std() > 0
    where = torch.rand(tokens.shape) < 0.05
    where[0], where[1, 0, 0], where[2] = False, True, True
    expected = logits.permute(0, 2, 3, 1)[where]
    torch.testing.assert_close(denoiser.logits_at(tokens, t, where), expected)


@pytest.mark.parametrize("make", [exact_denoiser, lambda: small_denoiser().double()], ids=["float32", "float64"])
def test_fast_sampler_gives_the_codes_of_every_timestep(make):
    """Same reveal times, same uniform numbers, same codes: only part of the grid at only some timesteps, or all."""
    denoiser, diffusion = make(), AbsorbingDiffusion(10, 49)
    noise = diffusion.noise(0, range(24), (7, 7))
    fast = diffusion.sample(denoiser.logits_at, noise)
    assert torch.equal(reference.sample(partial(reference.sdid, denoiser), *noise, 10), fast)
    assert len(fast.unique()) > 5


def test_logits_at_refuses_training_mode():
    with pytest.raises(RuntimeError, match="evaluation mode"):
        small_denoiser().train().logits_at(*random_tokens(), torch.ones(6, 5, 5, dtype=torch.bool))


@torch.no_grad()
def test_falls_back_to_spikingjelly_where_nothing_compiles(monkeypatch):
    """Without a compiler: one warning however many calls, and the same result."""
    model = small_autoencoder().double().eval()
    images = torch.rand(4, 1, 12, 12, dtype=torch.float64)
    expected = model(images).images
    compiled._library.cache_clear()
    monkeypatch.setattr(compiled, "_load", lambda: (_ for _ in ()).throw(OSError("no C++ compiler found")))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.testing.assert_close(model(images).images, expected)
            model(images)
        assert [str(w.message) for w in caught if "fused LIF" in str(w.message)] == [str(caught[0].message)]
    finally:
        compiled._library.cache_clear()


@KERNELS
def test_bfloat16_stays_close_to_float32(monkeypatch):
    """Spikes are exact in bfloat16; what differs is the rounding of weights and currents."""
    model = small_autoencoder()
    images = torch.rand(16, 1, 12, 12)
    types, losses, convolve = set(), [], torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *args: types.add((y := convolve(*args)).dtype) or y)
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses.append(float(model(images).loss.detach()))
        assert (torch.bfloat16 in types) == bf16
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_the_local_denoiser_multiplies_few_sizes(monkeypatch):
    """Of any number of positions: whoever keeps something for each size of a product would otherwise keep thousands."""
    torch.manual_seed(0)
    denoiser = SDID(5, 4, 4).eval()
    sizes, original = set(), torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: sizes.add(x.shape[1]) or original(x, weight))
    for samples in range(1, 7):
        where = torch.rand(samples, 5, 5) < 0.3
        where[0, 0, 0] = True
        logits = denoiser.logits_at(torch.zeros(samples, 5, 5).long(), torch.full((samples,), 3), where)
        assert logits.shape == (where.sum(), 5)
    assert sizes <= {64, 128, 192}


def test_the_fine_level_of_a_unet_has_few_enough_positions():
    patches = {grid: UNetSDID(10, grid=grid).patch for grid in [(14, 14), (16, 16), (28, 28), (32, 32), (64, 64)]}
    assert patches == {(14, 14): 1, (16, 16): 1, (28, 28): 2, (32, 32): 2, (64, 64): 4}
    with pytest.raises(
        ValueError, match=r"^downsampling must leave a grid of codes with even sides for a U-Net, got 7x7"
    ):
        UNetSDID(grid=(7, 7))


@pytest.mark.parametrize("kind", [SDID, ResidualSDID, UNetSDID])
def test_a_denoiser_without_conditions_takes_none(kind):
    model, tokens = (
        kind(codebook_size=10, spike_steps=2, denoiser_channels=48).eval(),
        torch.randint(0, 11, (2, 14, 14)),
    )
    t, condition, where = torch.ones(2).long(), torch.tensor([[0], [1]]), torch.ones(tokens.shape, dtype=torch.bool)
    assert isinstance(model, Denoiser) and not model.conditions
    for call in (lambda: model(tokens, t, condition), lambda: model.logits_at(tokens, t, where, condition)):
        with pytest.raises(ValueError, match="no condition"):
            call()
    assert model.logits_at(tokens, t, where, None).shape == (2 * 14 * 14, 10)
