"""The networks and losses agree with the published release's numbers (golden.npz, float64) to 1e-9."""

import numpy as np
import pytest
import torch
from helpers import GOLDEN

from diffusion.absorbing import AbsorbingDiffusion
from models import SDID, VQSVAE
from models.spiking import BACKENDS, membrane_weights, postsynaptic_potential, use_backend, weighted_sum


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


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield


@pytest.fixture
def vqsvae(backend):
    prefix = "vqsvae.w."
    weights = {name.removeprefix(prefix): golden(name) for name in GOLDEN if name.startswith(prefix)}
    model = VQSVAE(**VQSVAE.options_of(weights))
    model.load_state_dict(weights)
    return model.double()


@pytest.fixture
def sdid(backend):
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


def test_filters():
    spikes = golden("psp.in")
    assert_close(postsynaptic_potential(spikes), "psp.out")
    assert_close(weighted_sum(membrane_weights(16, like=spikes), spikes), "membrane.out")


def test_parameter_counts():
    assert sum(p.numel() for p in VQSVAE().parameters()) == 50_658
    assert sum(p.numel() for p in SDID().parameters()) == 3_101_504


@torch.no_grad()
def test_autoencoder_in_evaluation_mode(vqsvae, images):
    vqsvae.eval()
    spikes = vqsvae.encoder(images - 0.5)
    quantized = vqsvae.vq_layer(spikes)
    assert_close(spikes.mean(0), "vqsvae.eval.encoder_rate")
    assert torch.equal(quantized.codes, golden("vqsvae.eval.codes"))
    assert torch.equal(vqsvae.encode(images), golden("vqsvae.eval.codes"))
    assert_close(quantized.quantized.mean(0), "vqsvae.eval.generated_spike_rate")
    assert_close(vqsvae.decoder(quantized.quantized), "vqsvae.eval.recon")
    expected = (golden("vqsvae.eval.recon") + 0.5).clamp(0, 1)
    torch.testing.assert_close(vqsvae.decode(quantized.codes), expected, rtol=0, atol=1e-9)


def test_autoencoder_in_training_mode(vqsvae, images):
    out = vqsvae.train()(images, variance=float(golden("data_variance")))
    assert_close(out.quantizer_loss, "vqsvae.train.vq_loss")
    assert_close(out.mse, "vqsvae.train.mse")
    assert_close(out.loss - out.quantizer_loss, "vqsvae.train.recon_loss")
    out.loss.backward()
    assert_gradients(vqsvae, "vqsvae.train.gradnorm.")


def test_denoiser_and_losses(sdid):
    diffusion = AbsorbingDiffusion(128, 49)
    tokens, codes, mask, t = masked_tokens()
    logits = sdid.train()(tokens, t)
    assert_close(logits, "sdid.train.logits")
    cross_entropy = diffusion.cross_entropy(logits, codes, mask)
    assert_close(cross_entropy, "sdid.cross_entropy")
    for kind in ("elbo", "reweighted_elbo"):
        loss = diffusion.weighted_loss(cross_entropy, t, kind)
        assert_close(loss, f"sdid.loss.{kind}")
    loss.backward()
    assert_gradients(sdid, "sdid.train.gradnorm.")
    buffers = dict(sdid.named_buffers())
    for name in (name for name in GOLDEN if name.startswith("sdid.after_train.")):
        assert_close(buffers[name.removeprefix("sdid.after_train.")], name)
    with torch.no_grad():
        assert_close(sdid.eval()(tokens, t), "sdid.eval.logits")
