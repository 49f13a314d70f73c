"""Networks and losses, and the equations, agree with the published release's numbers (golden.npz, float64) to 1e-9."""

import numpy as np
import pytest
import torch
from helpers import FAST, GOLDEN

from models import SDID, VQSVAE, reference


def golden(name):
    return torch.from_numpy(np.array(GOLDEN[name]))


def assert_close(actual, name):
    expected = golden(name)
    scale = expected.abs().max()
    assert actual.shape == expected.shape
    assert (actual.detach() - expected).abs().max() <= 1e-9 * scale, name


def assert_gradients(network, prefix):
    for name, parameter in network.named_parameters():
        expected = float(golden(prefix + name))
        assert float(parameter.grad.norm()) == pytest.approx(expected, rel=1e-9, abs=1e-12), name


@pytest.fixture(params=[FAST, reference], ids=["networks", "equations"])
def by(request):
    """What computes."""
    return request.param


@pytest.fixture
def vqsvae():
    prefix = "vqsvae.w."
    weights = {name.removeprefix(prefix): golden(name) for name in GOLDEN if name.startswith(prefix)}
    model = VQSVAE(**VQSVAE.options_of(weights))
    model.load_state_dict(weights)
    return model.double()


@pytest.fixture
def sdid():
    model = SDID().double()
    for i, name in enumerate(GOLDEN["sdid.param_order"]):
        parameter = model.get_parameter(str(name))
        z = torch.from_numpy(np.random.RandomState(1000 + i).standard_normal(tuple(parameter.shape)))
        if parameter.dim() == 4:
            z *= (2 / parameter[0].numel()) ** 0.5
        else:
            z = 0.1 * z + (1 if name.endswith("1.weight") else 0)
        parameter.data.copy_(z)
    return model


@pytest.fixture
def images():
    return golden("image_u8").double() / 255


def masked_tokens():
    codes, mask = golden("sdid.codes")[:, 0], golden("sdid.mask")[:, 0]
    return torch.where(mask, 128, codes), codes, mask, golden("sdid.t")


def test_filters(by):
    spikes = golden("psp.in")
    assert_close(by.postsynaptic_potential(spikes), "psp.out")
    assert_close(by.membrane_potential(spikes), "membrane.out")


def test_parameter_counts():
    assert sum(p.numel() for p in VQSVAE().parameters()) == 50_658
    assert sum(p.numel() for p in SDID().parameters()) == 3_101_504


@torch.no_grad()
def test_autoencoder_in_evaluation_mode(by, vqsvae, images):
    quantizer, codes = vqsvae.eval().vq_layer, golden("vqsvae.eval.codes")
    assert_close(by.encoder(vqsvae, images).mean(0), "vqsvae.eval.encoder_rate")
    assert torch.equal(by.encode(vqsvae, images), codes) and torch.equal(by.reconstruct(vqsvae, images).codes, codes)
    generated = by.spike_generator(quantizer, by.embed(quantizer, codes))
    assert_close(generated.mean(0), "vqsvae.eval.generated_spike_rate")
    assert_close(by.decoder(vqsvae, generated), "vqsvae.eval.recon")
    expected = (golden("vqsvae.eval.recon") + 0.5).clamp(0, 1)
    torch.testing.assert_close(by.decode(vqsvae, codes), expected, rtol=0, atol=1e-9)


def test_autoencoder_in_training_mode(by, vqsvae, images):
    out = by.reconstruct(vqsvae.train(), images, float(golden("data_variance")))
    assert_close(out.quantizer_loss, "vqsvae.train.vq_loss")
    assert_close(out.mse, "vqsvae.train.mse")
    assert_close(out.loss - out.quantizer_loss, "vqsvae.train.recon_loss")
    out.loss.backward()
    assert_gradients(vqsvae, "vqsvae.train.gradnorm.")


def test_denoiser_and_losses(by, sdid):
    tokens, codes, mask, t = masked_tokens()
    fresh = {name: value.clone() for name, value in sdid.train().state_dict().items()}
    logits = by.sdid(sdid, tokens, t)
    assert_close(logits, "sdid.train.logits")
    assert_close(by.cross_entropy(logits, codes, mask), "sdid.cross_entropy")
    for kind in ("elbo", "reweighted_elbo"):
        sdid.load_state_dict(fresh)
        loss = by.diffusion_loss(sdid, codes, t, mask, kind)
        assert_close(loss, f"sdid.loss.{kind}")
    loss.backward()
    assert_gradients(sdid, "sdid.train.gradnorm.")
    buffers = dict(sdid.named_buffers())
    for name in (name for name in GOLDEN if name.startswith("sdid.after_train.")):
        assert_close(buffers[name.removeprefix("sdid.after_train.")], name)
    with torch.no_grad():
        assert_close(by.sdid(sdid.eval(), tokens, t), "sdid.eval.logits")
