"""The ReLU and the FSVAE baseline, and the ablations of the VQ-SVAE."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import as_modules

from models import FSVAE, VQSVAE, VQVAE
from models.neurons import LIF
from models.quantizer import Codebook, SpikingQuantizer, poisson_spikes
from models.spiking import postsynaptic_potential
from parts import SPIKE_GENERATORS

DOUBLE = {"dtype": torch.float64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_vqvae():
    torch.manual_seed(0)
    return VQVAE(codebook_size=10, embedding_dim=6, hidden_channels=5)


def small_fsvae():
    """An FSVAE whose neurons fire, which a fresh one's do only after some training."""
    torch.manual_seed(0)
    model = FSVAE(
        channels=1, image_size=12, latent_dim=7, candidates=5, spike_steps=9, hidden_channels=4, embedding_dim=3
    )
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.normal_(0, 2 / layer.in_features**0.5)
                layer.bias.uniform_(0, 2)
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 1
        model(torch.rand(16, 1, 12, 12))  # gives them the running statistics of this batch
    return model.double()


def ablated(**options):
    torch.manual_seed(0)
    return VQSVAE(codebook_size=10, embedding_dim=6, spike_steps=4, hidden_channels=5, **options).double()


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


# --- VQ-VAE


def test_vqvae_has_the_names_of_the_release():
    modules = [f"{part}.convs.{i}" for part in ("encoder", "decoder") for i in (0, 2, 4)]
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert set(VQVAE().state_dict()) == expected | {"vq_layer.embeddings.weight"}


@torch.no_grad()
def test_vqvae_by_its_definition():
    """Codes and images from the weights alone; the loss is the VQ-VAE's, the error divided by the variance."""
    model, images = small_vqvae().double(), torch.rand(3, 1, 12, 16, **DOUBLE)
    w = model.state_dict()
    x = F.relu(F.conv2d(images - 0.5, w["encoder.convs.0.weight"], w["encoder.convs.0.bias"], 2, 1))
    x = F.relu(F.conv2d(x, w["encoder.convs.2.weight"], w["encoder.convs.2.bias"], 2, 1))
    x = F.conv2d(x, w["encoder.convs.4.weight"], w["encoder.convs.4.bias"])
    embeddings = w["vq_layer.embeddings.weight"]
    codes = torch.cdist(x.permute(0, 2, 3, 1).flatten(0, 2), embeddings).argmin(1).view(3, 3, 4)
    q = embeddings[codes].permute(0, 3, 1, 2)
    y = F.relu(F.conv_transpose2d(q, w["decoder.convs.0.weight"], w["decoder.convs.0.bias"], 2, 1, 1))
    y = F.relu(F.conv_transpose2d(y, w["decoder.convs.2.weight"], w["decoder.convs.2.bias"], 2, 1, 1))
    y = F.conv_transpose2d(y, w["decoder.convs.4.weight"], w["decoder.convs.4.bias"], 1, 1) + 0.5
    assert torch.equal(model.encode(images), codes)
    torch.testing.assert_close(model.decode(codes), y.clamp(0, 1))
    out = model(images, variance=0.25)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.images, y.clamp(0, 1))
    torch.testing.assert_close(out.loss, 1.25 * (q - x).square().mean() + 4 * (y - images).square().mean())


def test_gradient_passes_straight_through_the_codebook():
    codebook, encoded = Codebook(10, 6), torch.randn(2, 6, 3, 3, requires_grad=True)
    weights = torch.randn(2, 6, 3, 3)
    out = codebook(encoded)
    torch.testing.assert_close(out.quantized, codebook.decode(out.codes))
    encoded_grad, codebook_grad = torch.autograd.grad(
        (out.quantized * weights).sum(), (encoded, codebook.embeddings.weight), allow_unused=True
    )
    assert torch.equal(encoded_grad, weights)
    assert codebook_grad is None, "embeddings learn from the codebook loss alone"
    assert torch.autograd.grad(out.loss, codebook.embeddings.weight)[0].any()


def test_vqvae_learns():
    """Reconstructs images of bright and dark cells far better than any single image could."""
    torch.manual_seed(0)
    model = VQVAE(codebook_size=40, embedding_dim=3, hidden_channels=8)
    cells = (torch.rand(8, 1, 4, 4) < 0.5).float()
    images = F.interpolate(cells, scale_factor=4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        loss = model(images, variance=0.25).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.mse_loss(model.decode(model.encode(images)), images) < 0.3 * images.var(0).mean()


@torch.no_grad()
def test_vqvae_is_not_rounded_under_autocast():
    model, images = small_vqvae(), torch.rand(4, 1, 12, 12)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)
    assert torch.equal(rounded.codes, expected.codes)
    assert torch.equal(rounded.images, expected.images)


# --- ablations


def test_readout_ablations():
    spikes = (torch.rand(4, 2, 6, 3, 3) < 0.5).double()
    rate, potential = (SpikingQuantizer(10, 6, 4, readout=kind).double() for kind in ("rate", "potential"))
    torch.testing.assert_close(rate.readout(spikes), spikes.mean(0))
    expected = 0.8**3 * spikes[0] + 0.8**2 * spikes[1] + 0.8 * spikes[2] + spikes[3]
    torch.testing.assert_close(potential.readout(spikes), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("readout", ["rate", "potential"])
def test_a_fixed_readout_stays_fixed(readout):
    """No gradient and no weight decay, under the name that the learned one has."""
    model = ablated(readout=readout)
    before = model.state_dict()["vq_layer.alpha"].clone()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    model(torch.rand(4, 1, 12, 12, **DOUBLE)).loss.backward()
    optimizer.step()
    assert model.state_dict()["vq_layer.alpha"] == before == {"rate": 1, "potential": 0}[readout]


def test_poisson_spikes_fire_at_the_clipped_rate():
    rates = torch.tensor([-0.5, 0.1, 0.5, 0.9, 1.5]).expand(1, 40, 5, 5)  # [N,D,h,w], the rates along w
    for generator in (None, seeded(1)):
        spikes = poisson_spikes(rates, 50, generator)
        assert set(spikes.unique().tolist()) == {0, 1}
        measured = spikes.mean((0, 1, 2, 3))
        torch.testing.assert_close(measured, torch.tensor([0, 0.1, 0.5, 0.9, 1]), rtol=0, atol=0.02)


def test_poisson_gradient_is_that_of_the_probability():
    rates = torch.tensor([-0.5, 0.3, 1.5]).view(1, 3, 1, 1).requires_grad_()
    poisson_spikes(rates, 4).sum().backward()
    assert rates.grad.flatten().tolist() == [0, 4, 0]


def test_poisson_draws():
    """Without a generator always the same ones, for each image; with one its own."""
    rates = torch.full((6, 2, 3, 3), 0.5)
    fixed = poisson_spikes(rates, 8)
    assert torch.equal(fixed, poisson_spikes(rates, 8))
    assert torch.equal(fixed[:, 2:3], poisson_spikes(rates[:1], 8))
    drawn = poisson_spikes(rates, 8, seeded(1))
    assert torch.equal(drawn, poisson_spikes(rates, 8, seeded(1)))
    assert not torch.equal(drawn, poisson_spikes(rates, 8, seeded(2)))
    assert not torch.equal(drawn[:, 0], drawn[:, 1])


def test_repeated_embeddings():
    """The decoder gets the embeddings; the loss compares their potentials `q (1 - 0.5^i)` with those of the spikes."""
    quantizer = SpikingQuantizer(10, 6, 4, spike_generator="repeat").double()
    spikes = (torch.rand(4, 2, 6, 3, 3) < 0.5).double()
    out = quantizer(spikes)
    r, q = quantizer.readout(spikes), quantizer.embed(out.codes)
    torch.testing.assert_close(out.quantized, q)
    assert torch.equal(quantizer.decode(out.codes), q)
    filtered = torch.stack([q * (1 - 0.5**i) for i in (1, 2, 3, 4)])
    expected = 1.25 * (q - r).square().mean() + 1.25 * (filtered - postsynaptic_potential(spikes)).square().mean()
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("kind", SPIKE_GENERATORS)
def test_layers_called_as_modules_agree_on_each_spike_generator(kind):
    """Same losses and gradients in float64, and decoding the codes gives the reconstruction."""
    model, images = ablated(spike_generator=kind), torch.rand(5, 1, 12, 12, **DOUBLE)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert any("vq_layer.poisson" in name for name in state) == (kind == "adaptive")
    results = []
    for context in (as_modules, nullcontext):
        model.load_state_dict(state)
        with context(model):
            out = model.train()(images, 0.1, seeded())
        first = model.encoder.snn_convs[0].weight
        assert torch.autograd.grad(out.mse, first, retain_graph=True)[0].any(), "the error reaches the encoder"
        results.append([out.loss.detach(), *gradients_of(model, out.loss)])
        with torch.no_grad(), context(model):
            torch.testing.assert_close(model.eval().decode(model.encode(images)), model(images).images)
            torch.testing.assert_close(model.decode(model.encode(images[1:2])), model(images).images[1:2])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("option", ["readout", "spike_generator"])
def test_unknown_ablation_names_the_valid_ones(option):
    with pytest.raises(ValueError, match=r"unknown .*: choose one of .*(rate|repeat)"):
        ablated(**{option: "mean"})


# --- FSVAE


def run_from_rest(network, inputs):
    """Candidates `[S,N,L,k]` of a BernoulliNetwork for `inputs [S,N,...]`, by layers over all steps at once."""
    x = inputs
    for layer in network.layers:
        x = LIF()(layer(x))
    return x.unflatten(2, (network.latent_dim, -1))


@torch.no_grad()
def test_stepping_equals_running_each_prefix_from_rest():
    """Latents of the prior, and of the posterior, each drawn by running the network anew over all steps so far."""
    model, images = small_fsvae().eval(), torch.rand(6, 1, 12, 12, **DOUBLE)
    picks = model.noise(3, range(6))
    x = model._features(images)
    drawn = {"prior": model.sample(picks), "posterior": model.encode(images, picks)}
    for name, latents in drawn.items():
        given = torch.zeros(1, 6, 7, **DOUBLE)
        for t, pick in enumerate(picks):
            inputs = given if name == "prior" else torch.cat((x[: t + 1], given), 2)
            last = run_from_rest(getattr(model, name), inputs)[-1]  # [N,L,k]
            z = torch.stack([last[..., i] for i in range(5)])[pick, torch.arange(6)[:, None], torch.arange(7)]
            given = torch.cat((given, z[None]))
        assert torch.equal(latents, given[1:]), name
        assert 0.05 < latents.mean() < 0.95, "some fire, some do not"


@torch.no_grad()
def test_fsvae_keeps_no_state():
    model, images = small_fsvae().eval(), torch.rand(6, 1, 12, 12, **DOUBLE)
    picks = model.noise(0, range(6))
    latents = model.encode(images, picks)
    calls = (
        lambda: model.encode(images, picks),
        lambda: model.decode(latents),
        lambda: model.sample(picks),
        lambda: model(images, seeded(), 0.5).loss,
    )
    for call in calls:
        assert torch.equal(call(), call())


@torch.no_grad()
def test_fsvae_image_does_not_depend_on_its_batch():
    model, images = small_fsvae().eval(), torch.rand(6, 1, 12, 12, **DOUBLE)
    all_picks, one = model.noise(0, range(6)), model.noise(0, [4])
    assert torch.equal(all_picks[:, 4:5], one)
    latents = model.sample(all_picks)
    assert torch.equal(latents[:, 4:5], model.sample(one))
    assert torch.equal(model.encode(images, all_picks)[:, 4:5], model.encode(images[4:5], one))
    torch.testing.assert_close(model.decode(latents)[4:5], model.decode(latents[:, 4:5]))
    assert not torch.equal(latents[:, 0], latents[:, 1])


def test_picks_are_uniform():
    """So a latent fires with the probability that its candidates' mean says."""
    picks = small_fsvae().noise(0, range(200))
    assert picks.shape == (9, 200, 7)
    shares = picks.flatten().bincount() / picks.numel()
    torch.testing.assert_close(shares, torch.full((5,), 0.2), rtol=0, atol=0.02)


@torch.no_grad()
def test_fsvae_reconstruction_is_the_decoding_of_the_latents():
    model, images = small_fsvae().eval(), torch.rand(6, 1, 12, 12, **DOUBLE)
    out = model(images, seeded(5))
    picks = torch.randint(5, (9, 6, 7), generator=seeded(5))
    torch.testing.assert_close(model.decode(model.encode(images, picks)), out.images)
    torch.testing.assert_close(out.loss, out.mse + out.mmd)
    assert out.images.min() >= 0 and out.images.max() <= 1


@torch.no_grad()
def test_fsvae_error_is_not_divided_by_the_variance():
    """A decoder that puts out one grey for every pixel: the error is known."""
    model, images = small_fsvae().eval(), torch.rand(6, 1, 12, 12, **DOUBLE)
    head = model.decoder.snn_convs[-1]
    head.weight.zero_()
    head.bias.zero_()
    torch.testing.assert_close(model(images, seeded()).mse, (0.5 - images).square().mean())


@torch.no_grad()
def test_mmd_is_zero_where_prior_and_posterior_agree():
    """A posterior that ignores the image, with the prior's weights; scheduled sampling gives the prior other inputs."""
    model, images = small_fsvae().eval(), torch.rand(6, 1, 12, 12, **DOUBLE)
    assert model(images, seeded()).mmd > 0.001
    for mine, other in zip(model.posterior.layers, model.prior.layers, strict=True):
        mine.weight[:, : -other.in_features] = 0
        mine.weight[:, -other.in_features :] = other.weight
        mine.bias.copy_(other.bias)
    assert model(images, seeded()).mmd == 0
    assert model(images, seeded(), p=1.0).mmd > 0.001


@torch.no_grad()
def test_mmd_by_hand():
    """Posterior always fires and prior never: the mean of the squared potentials `(1 - 0.5^i)^2`."""
    model = small_fsvae().eval()
    for network, current in ((model.posterior, 4.0), (model.prior, -4.0)):
        network.layers[-1].weight.zero_()
        network.layers[-1].bias.fill_(current)
    expected = sum((1 - 0.5**i) ** 2 for i in range(1, 10)) / 9
    assert float(model(torch.rand(2, 1, 12, 12, **DOUBLE)).mmd) == pytest.approx(expected)


@torch.no_grad()
def test_scheduled_sampling_switches_on():
    """From the sixth step on the next input is the prior's own: always at p = 1, else in this share of the images."""
    model = small_fsvae().eval()
    latents = (torch.rand(9, 300, 7) < 0.5).double()
    given, own, some = (model._prior_means(latents, p, seeded()) for p in (0.0, 1.0, 0.3))
    torch.testing.assert_close(given, run_from_rest(model.prior, F.pad(latents, (0, 0, 0, 0, 1, -1))).mean(3))
    assert torch.equal(own[:6], given[:6])
    changed = latents.clone()
    changed[5:] = 1 - changed[5:]
    assert torch.equal(model._prior_means(changed, 1.0, seeded()), own), "what the posterior drew is not looked at"
    follows_own = (some[6] == own[6]).all(1) & (own[6] != given[6]).any(1)
    assert float(follows_own.double().mean()) == pytest.approx(0.3, abs=0.1)
    assert ((some[6] == own[6]).all(1) | (some[6] == given[6]).all(1)).all()


@torch.no_grad()
def test_own_latents_of_the_prior_are_what_most_candidates_say():
    model = small_fsvae().eval()
    latents = (torch.rand(9, 50, 7) < 0.5).double()
    own = model._prior_means(latents, 1.0, seeded())
    inputs = torch.cat((torch.zeros(1, 50, 7, **DOUBLE), latents[:5], (own[5:8] > 0.5).double()))
    torch.testing.assert_close(own, run_from_rest(model.prior, inputs).mean(3))


def test_layers_called_as_modules_agree_on_fsvae():
    """Same loss and gradients in float64; each parameter but the biases before batch norm has a gradient."""
    model, images = small_fsvae(), torch.rand(6, 1, 12, 12, **DOUBLE)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for context in (as_modules, nullcontext):
        model.load_state_dict(state)
        with context(model):
            loss = model.train()(images, seeded(), 0.3).loss
        results.append([loss.detach(), *gradients_of(model, loss)])
    torch.testing.assert_close(*results)
    names = [name for name, _ in model.named_parameters()]
    for name, gradient in zip(names, results[1][1:], strict=True):
        assert gradient.any() or "coder" in name, name


def test_a_silent_fsvae_can_learn_to_fire():
    """No latent of a fresh one fires, but the surrogate gradient reaches the encoder."""
    torch.manual_seed(0)
    model, images = FSVAE(image_size=12, spike_steps=4, hidden_channels=4), torch.rand(4, 1, 12, 12)
    assert not model.encode(images, model.noise(0, range(4))).any()
    model(images).loss.backward()
    assert model.encoder.snn_convs[0].weight.grad.any()


def test_drawn_latents_enter_the_next_step_without_gradient():
    """The last latents learn through potentials alone: none of the gradient goes by way of earlier draws."""
    model, images = small_fsvae(), torch.rand(6, 1, 12, 12, **DOUBLE)
    picks = model.noise(0, range(6))
    latents, means = model._draw(model.posterior, picks, model._features(images))
    last = torch.autograd.grad(means[-1].sum(), model.posterior.layers[-1].weight)[0]
    given = torch.cat((torch.zeros(1, 6, 7, **DOUBLE), latents[:-1].detach()))
    model.zero_grad()
    x = model._features(images)
    run_from_rest(model.posterior, torch.cat((x, given), 2)).mean(3)[-1].sum().backward()
    torch.testing.assert_close(last, model.posterior.layers[-1].weight.grad)


def test_fsvae_image_size_must_fit():
    with pytest.raises(ValueError, match="multiple of 4"):
        FSVAE(image_size=30)
