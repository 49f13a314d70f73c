import urllib.error

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from PIL import Image
from pytorch_fid.fid_score import get_activations

from errors import UserError
from metrics import inception as inception_module
from metrics.codebook import perplexity, usage
from metrics.fid import FEWEST_IMAGES, fid
from metrics.frechet import feature_statistics, frechet_distance
from metrics.inception import FID_WEIGHTS_URL, inception_features, load_inception
from metrics.reconstruction import mse, ssim


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the keys and shapes of pytorch-fid's (its patches change no shape), and random weights."""
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # keeps the signal alive
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return load_inception(weights, "cpu")


def random_covariance(generator, size):
    factor = generator.normal(size=(size, size))
    return factor @ factor.T / size


def test_mse_is_exact():
    images = torch.zeros(3, 1, 4, 4)
    reconstructions = images.clone()
    reconstructions[2] = 0.5
    assert mse(images, reconstructions) == pytest.approx(0.25 / 3)


def test_ssim_of_identical_images_is_one():
    images = torch.rand(3, 3, 28, 28)
    assert ssim(images, images) == pytest.approx(1.0)


def test_ssim_does_not_depend_on_the_batch_size():
    images = torch.rand(5, 1, 28, 28)
    reconstructions = (images + 0.2 * torch.rand(images.shape)).clamp(0, 1) * torch.linspace(0, 1, 5).view(5, 1, 1, 1)
    one_by_one = np.mean([ssim(a[None], b[None]) for a, b in zip(images, reconstructions, strict=True)])
    for batch_size in (2, 4, 256):
        assert ssim(images, reconstructions, batch_size) == pytest.approx(one_by_one, abs=1e-6)
    assert 0 < one_by_one < 0.9


@pytest.mark.parametrize("measure", [mse, ssim])
def test_unlike_images_are_refused(measure):
    images = torch.rand(2, 1, 28, 28)
    with pytest.raises(ValueError, match="equal shapes"):
        measure(images, images[:1])
    with pytest.raises(ValueError, match="floats"):
        measure(images, (images * 255).byte())


def test_codebook_in_uniform_use():
    codes = torch.arange(16).repeat(3).view(3, 4, 4)
    assert usage(codes, 16) == 1
    assert perplexity(codes, 16) == pytest.approx(16)


def test_codebook_with_one_code():
    codes = torch.full((3, 4, 4), 7)
    assert usage(codes, 16) == 1 / 16
    assert perplexity(codes, 16) == pytest.approx(1)


@pytest.mark.parametrize("codes", [torch.tensor([[[16]]]), torch.tensor([[[-1]]]), torch.zeros(0, 4, 4).long()])
def test_codes_outside_the_codebook_are_refused(codes):
    with pytest.raises(ValueError, match=r"0\.\.15"):
        perplexity(codes, 16)


def test_feature_statistics():
    mu, sigma = feature_statistics(np.array([[0, 0], [2, 4]], dtype=np.float32))
    assert mu.tolist() == [1, 2] and sigma.tolist() == [[2, 4], [4, 8]]
    assert mu.dtype == sigma.dtype == np.float64
    with pytest.raises(ValueError, match="at least 2"):
        feature_statistics(np.zeros((1, 2)))


@pytest.mark.parametrize("samples", [10, 500])  # fewer and more than features
def test_frechet_distance_of_identical_sets_is_zero(samples):
    statistics = feature_statistics(np.random.default_rng(0).normal(size=(samples, 64)))
    assert frechet_distance(*statistics, *statistics) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_diagonal_gaussians():
    generator = np.random.default_rng(0)
    mu1, mu2 = generator.normal(size=(2, 5))
    std1, std2 = generator.uniform(0.1, 2, size=(2, 5))
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((std1 - std2) ** 2)
    assert frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected)


def test_frechet_distance_takes_the_root_of_the_product_and_not_the_release_s_shortcut():
    generator = np.random.default_rng(0)
    sigma1, sigma2 = random_covariance(generator, 6), random_covariance(generator, 6)
    assert not np.allclose(sigma1 @ sigma2, sigma2 @ sigma1)
    zero, traces = np.zeros(6), np.trace(sigma1 + sigma2)
    distance = frechet_distance(zero, sigma1, zero, sigma2)
    assert distance == pytest.approx(traces - 2 * np.trace(scipy.linalg.sqrtm(sigma1 @ sigma2)).real)
    u, s, vt = np.linalg.svd(sigma1 @ sigma2)
    assert distance < 0.95 * (traces - 2 * np.trace(u @ np.diag(np.sqrt(s)) @ vt))


def test_inception_features_are_those_of_pytorch_fid(inception, tmp_path):
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    features = inception_features(images, inception, batch_size=2)
    assert features.shape == (3, 2048) and features.std(axis=0).max() > 0.01
    theirs = get_activations(paths, inception, batch_size=3, num_workers=0)
    np.testing.assert_allclose(features, theirs, rtol=1e-3, atol=1e-4)


def test_grey_is_repeated(inception):
    grey = torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8)
    colour = grey.repeat(1, 3, 1, 1)
    np.testing.assert_array_equal(inception_features(grey, inception), inception_features(colour, inception))


@pytest.mark.parametrize("images", [torch.rand(1, 3, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.uint8)])
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        inception_features(images, torch.nn.Identity())


def test_weights_without_network_tell_where_to_get_them(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(inception_module, "load_state_dict_from_url", offline)
    with pytest.raises(UserError) as caught:
        load_inception(None, "cpu")
    message = str(caught.value)
    assert FID_WEIGHTS_URL in message and "--fid_weights PATH" in message and "\n" not in message


def test_local_weights_never_touch_the_network(weights, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("went to the network"))
    network = load_inception(weights, "cpu")
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_downloaded_weights_are_those_of_pytorch_fid(weights, monkeypatch):
    def download(url, **options):
        assert url == FID_WEIGHTS_URL and options["weights_only"]
        return torch.load(weights, weights_only=True)

    monkeypatch.setattr(inception_module, "load_state_dict_from_url", download)
    expected = torch.load(weights, weights_only=True)["Conv2d_1a_3x3.conv.weight"]
    assert torch.equal(load_inception(None, "cpu").blocks[0][0].conv.weight, expected)


@pytest.mark.parametrize("content", ["absent", "empty", "rubbish", "other keys", "no weights"])
def test_wrong_weights_are_one_line(content, tmp_path):
    path = tmp_path / "weights.pth"
    if content == "empty":
        path.touch()
    elif content == "rubbish":
        path.write_bytes(b"<html>not found</html>\n" * 100)
    elif content == "other keys":
        torch.save({"weight": torch.zeros(1)}, path)
    elif content == "no weights":
        torch.save([1, 2], path)
    with pytest.raises(UserError) as caught:
        load_inception(path, "cpu")
    message = str(caught.value)
    assert str(path) in message and FID_WEIGHTS_URL in message and "\n" not in message


def test_fid_of_too_few_images_is_refused():
    enough, few = (torch.zeros(count, 1, 1, 1, dtype=torch.uint8) for count in (FEWEST_IMAGES, FEWEST_IMAGES - 1))
    with pytest.raises(UserError, match="2048 generated images, not 2047"):
        fid(few, enough, torch.nn.Identity())
    with pytest.raises(UserError, match="2048 real images, not 2047"):
        fid(enough, few, torch.nn.Identity())
