import itertools
import urllib.error

import cleanfid.fid
import cleanfid.utils
import numpy as np
import pytest
import pytorch_fid.inception
import scipy.linalg
import scipy.ndimage
import torch
import torchvision
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance, get_activations

from errors import UserError
from metrics import fid as fid_module
from metrics import inception as inception_module
from metrics import manifold
from metrics.classifier import (
    Classifier,
    accuracy,
    class_balance,
    classifier_distance,
    classifier_features,
    classifier_logits,
    mean_confidence,
)
from metrics.codebook import perplexity, usage
from metrics.fad import FadAutoencoder, fad, fad_features, load_published, to_fad_range, to_fad_size
from metrics.fid import fid, inception_score, kid, paper_fid
from metrics.frechet import feature_statistics, frechet_distance, frechet_distance_of_release
from metrics.inception import (
    FID_WEIGHTS_URL,
    PAPER_WEIGHTS_URL,
    clean_features,
    clean_resize,
    inception_features,
    inception_logits,
    load_inception,
    load_paper_inception,
)
from metrics.manifold import manifold_metrics
from metrics.reconstruction import mse, ssim


def save_random_inception(path, **options):
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(init_weights=False, **options)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # keeps the signal alive
        if isinstance(module, torch.nn.BatchNorm2d):
            for each, low in (
                (module.weight, 0.7),
                (module.running_var, 0.7),
                (module.bias, 0),
                (module.running_mean, 0),
            ):
                torch.nn.init.uniform_(each, low, low + 0.6)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the keys and shapes of pytorch-fid's (its patches change no shape), and random weights."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    return save_random_inception(path, num_classes=1008, aux_logits=False)


@pytest.fixture(scope="module")
def inception(weights):
    return load_inception(weights, "cpu")


@pytest.fixture(scope="module")
def paper_weights(tmp_path_factory):
    """A file with the keys and shapes of torchvision's, and random weights."""
    return save_random_inception(tmp_path_factory.mktemp("inception") / "imagenet.pth")


def random_features(count, size=64, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


def waves(count, size):
    """Correlated features `[count,size]` in [-1,1] from a formula: the same numbers on every machine."""
    row, column = np.arange(count)[:, None], np.arange(1, size + 1)
    return np.cos(0.7 * row * column).cumsum(1) / column


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


def test_ssim_is_pinned():
    """By Wang et al. 2004: 11x11 Gaussian window with sigma 1.5, K = 0.01 and 0.03, the mean over *all* positions.

    Images are mirrored at their borders. torchmetrics 1.4.0 and 1.4.1 leave out the five outermost pixels: 0.88271.
    """
    wave, other = waves(28, 28), np.sin(np.outer(np.arange(28), np.arange(28)) / 50)
    images = np.stack([0.5 + wave / 2, 0.5 + other / 2])
    reconstructions = 0.7 * images + 0.3 * images[:, :, ::-1] ** 2

    def local_mean(x):
        return scipy.ndimage.gaussian_filter(x, 1.5, radius=5, mode="mirror", axes=(1, 2))

    mean1, mean2 = local_mean(images), local_mean(reconstructions)
    variance1, variance2 = local_mean(images**2) - mean1**2, local_mean(reconstructions**2) - mean2**2
    covariance = local_mean(images * reconstructions) - mean1 * mean2
    contrast = (2 * covariance + 0.03**2) / (variance1 + variance2 + 0.03**2)
    expected = ((2 * mean1 * mean2 + 0.01**2) / (mean1**2 + mean2**2 + 0.01**2) * contrast).mean()
    assert expected == pytest.approx(0.87978, abs=1e-5)
    arguments = (torch.from_numpy(x).float().unsqueeze(1) for x in (images, reconstructions))
    assert ssim(*arguments) == pytest.approx(expected, abs=1e-4)


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


def test_frechet_distance_takes_the_root_of_the_product_and_the_release_another():
    generator = np.random.default_rng(0)
    sigma1, sigma2 = random_covariance(generator, 6), random_covariance(generator, 6)
    assert not np.allclose(sigma1 @ sigma2, sigma2 @ sigma1)
    zero, traces = np.zeros(6), np.trace(sigma1 + sigma2)
    distance = frechet_distance(zero, sigma1, zero, sigma2)
    assert distance == pytest.approx(traces - 2 * np.trace(scipy.linalg.sqrtm(sigma1 @ sigma2)).real)
    u, s, vt = np.linalg.svd(sigma1 @ sigma2)
    of_release = frechet_distance_of_release(zero, sigma1, zero, sigma2)
    assert of_release == pytest.approx(traces - 2 * np.trace(u @ np.diag(np.sqrt(s)) @ vt))
    assert distance < 0.95 * of_release


def test_frechet_distance_of_the_release_is_right_where_covariances_commute():
    mu1, mu2, std1, std2 = np.random.default_rng(0).uniform(0.1, 2, size=(4, 5))
    arguments = mu1, np.diag(std1**2), mu2, np.diag(std2**2)
    assert frechet_distance_of_release(*arguments) == pytest.approx(frechet_distance(*arguments))


@pytest.fixture
def theirs(weights, monkeypatch):
    """pytorch-fid's network as the package builds it."""
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state)
    return pytorch_fid.inception.InceptionV3


def random_files(folder, channels, count=3, size=28):
    """Images uint8 `[N,C,H,W]`, and the files that hold them."""
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)
    images[0] //= 4
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).squeeze().numpy()).save(path)
    return images, paths


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_features_are_those_of_pytorch_fid(channels, inception, theirs, tmp_path):
    images, paths = random_files(tmp_path, channels)
    features = inception_features(images, inception, batch_size=2)
    assert features.shape == (3, 2048) and features.std(axis=0).max() > 0.01
    expected = get_activations(paths, theirs().eval(), batch_size=3, num_workers=0)
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 40)])
def test_images_are_resized_exactly_as_by_clean_fid(channels, size, tmp_path):
    """Images of 28x28 are first resized to 32x32 and saved with 8 bits, as FSDDIM's references are."""
    images, paths = random_files(tmp_path, channels, size=size)
    if size < 32:
        for path in paths:
            Image.open(path).resize((32, 32), Image.Resampling.BILINEAR).save(path)
    expected = np.stack([read_resized(str(path)).numpy() for path in paths])  # [N,3,299,299]
    resized = clean_resize(images)
    assert resized.shape == (3, channels, 299, 299)
    np.testing.assert_array_equal(np.broadcast_to(resized.numpy(), expected.shape), expected)


def read_resized(path):
    return cleanfid.utils.ResizeDataset([path], mode="clean")[0]


def test_clean_features_are_those_of_clean_fid(inception, theirs, tmp_path):
    """Its network is a file to download: here it is pytorch-fid's, on the pixels as clean-fid scales them."""
    images, paths = random_files(tmp_path, 3, size=32)
    network = theirs(resize_input=False, normalize_input=False).eval()

    def clean_network(pixels):
        return network((pixels - 128) / 128)[0].flatten(1)

    files = [str(path) for path in paths]
    options = {"num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    expected = cleanfid.fid.get_files_features(files, clean_network, batch_size=3, mode="clean", **options)
    features = clean_features(images, inception, batch_size=2)
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(features - inception_features(images, inception)).max() > 0.01, "another protocol"


@pytest.mark.parametrize("samples", [(300, 400), (40, 30)])  # more and fewer than features
def test_fid_is_that_of_both_packages(samples, monkeypatch):
    monkeypatch.setattr(fid_module, "FEWEST_IMAGES", 2)
    ours, real = waves(samples[0], 64).astype(np.float32), random_features(samples[1]) + 1
    statistics = itertools.chain(*((each.mean(axis=0), np.cov(each, rowvar=False)) for each in (ours, real)))
    assert fid(ours, real) == pytest.approx(calculate_frechet_distance(*statistics), abs=1e-3)
    assert fid(ours, real) == pytest.approx(cleanfid.fid.fid_from_feats(ours, real), abs=1e-3)


@pytest.mark.parametrize("features", [inception_features, clean_features])
def test_grey_is_repeated(features, inception):
    grey = torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8)
    colour = grey.repeat(1, 3, 1, 1)
    np.testing.assert_allclose(features(grey, inception), features(colour, inception), rtol=1e-3, atol=1e-4)


def test_progress_is_told_in_images(inception):
    done = []
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    assert len(inception_features(images, inception, batch_size=2, progress=done.append)) == 3
    assert done == [2, 1]


@pytest.mark.parametrize("extract", [inception_features, clean_features, fad_features, classifier_features])
@pytest.mark.parametrize("images", [torch.rand(1, 3, 32, 32), torch.zeros(1, 2, 32, 32, dtype=torch.uint8)])
def test_other_images_are_refused(images, extract):
    with pytest.raises(ValueError, match="uint8"):
        extract(images, torch.nn.Identity())


def test_logits_are_those_of_the_weights_file_without_bias(inception, weights):
    features = random_features(3, 2048)
    state = torch.load(weights, weights_only=True)
    biased = torch.nn.functional.linear(torch.from_numpy(features), state["fc.weight"], state["fc.bias"])
    logits = inception_logits(features, inception)
    assert logits.shape == (3, 1008) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, (biased - state["fc.bias"]).numpy(), atol=1e-5)


def test_paper_features_are_normalised_twice(paper_weights):
    """Against torchvision's network as it is, whose own input and last convolutions are watched."""
    network = torchvision.models.inception_v3(init_weights=False, transform_input=True).eval()
    network.load_state_dict(torch.load(paper_weights, weights_only=True))
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    images[1] //= 4
    seen = {}
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.update(first=inputs[0]))
    network.Mixed_7c.register_forward_hook(lambda _, __, output: seen.update(last=output))
    enlarged = torch.nn.Upsample(size=(299, 299), mode="bilinear")(images.repeat(1, 3, 1, 1) / 255)
    with torch.inference_mode():
        network(enlarged * 2 - 1)
    red = (enlarged[:, 0] * 2 - 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
    torch.testing.assert_close(seen["first"][:, 0], red)
    features = inception_features(images, load_paper_inception(paper_weights, "cpu"), batch_size=1)
    assert features.shape == (2, 2048) and features.std(axis=0).max() > 0.01
    np.testing.assert_allclose(features, seen["last"].mean((2, 3)).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("load", "url", "option"),
    [
        (load_inception, FID_WEIGHTS_URL, " --fid_weights PATH"),
        (load_paper_inception, PAPER_WEIGHTS_URL, " --paper_fid_weights PATH"),
    ],
)
def test_weights_without_network_tell_where_to_get_them(load, url, option, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(inception_module, "load_state_dict_from_url", offline)
    with pytest.raises(UserError) as caught:
        load(None, "cpu")
    message = str(caught.value)
    assert url in message and option in message and "\n" not in message


def test_local_weights_never_touch_the_network(weights, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("went to the network"))
    network = load_inception(weights, "cpu")
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_downloaded_weights_are_those_of_pytorch_fid(weights, monkeypatch):
    def download(url, **options):
        assert url == FID_WEIGHTS_URL and options["weights_only"]
        return torch.load(weights, weights_only=True)

    monkeypatch.setattr(inception_module, "load_state_dict_from_url", download)
    expected, downloaded = (load_inception(path, "cpu").state_dict() for path in (weights, None))
    assert expected.keys() == downloaded.keys() and not any("bn" in name for name in expected), "folded"
    assert all(torch.equal(downloaded[name], value) for name, value in expected.items())


def test_batch_norm_is_folded_exactly(weights):
    """In float64, so that the folded weights are those that float32 can hold best."""
    state = torch.load(weights, weights_only=True)
    folded = load_inception(weights, "cpu").state_dict()
    for name in ("Conv2d_1a_3x3", "Mixed_7c.branch_pool"):
        part = {key.removeprefix(f"{name}."): value.double() for key, value in state.items() if key.startswith(name)}
        scale = part["bn.weight"] / (part["bn.running_var"] + 0.001).sqrt()
        weight = part["conv.weight"] * scale[:, None, None, None]
        bias = part["bn.bias"] - part["bn.running_mean"] * scale
        torch.testing.assert_close(folded[f"{name}.conv.weight"], weight.float(), rtol=1e-7, atol=0)
        torch.testing.assert_close(folded[f"{name}.conv.bias"], bias.float(), rtol=1e-6, atol=1e-8)


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


@pytest.mark.parametrize(
    ("metric", "fewest"),
    [(fid, 129), (paper_fid, 1280), (lambda a, b: kid(a, b, 0), 1000), (classifier_distance, 129)],
)
def test_distance_between_too_few_images_is_refused(metric, fewest, monkeypatch):
    monkeypatch.setattr(fid_module, "KID_SUBSETS", 2)
    enough, few = random_features(fewest, 2), random_features(fewest - 1, 2)
    with pytest.raises(UserError, match=f"{fewest} generated images, not {fewest - 1}"):
        metric(few, enough)
    with pytest.raises(UserError, match=f"{fewest} real images, not {fewest - 1}"):
        metric(enough, few)
    metric(enough, enough)


def test_fid_and_frechet_distance_are_pinned():
    """By scipy's matrix square root, on two sets of unequal size whose covariances do not commute."""
    ours, theirs = waves(2100, 4), 1.5 * waves(2048, 4)[:, ::-1] + [0, 0.1, 0, 0.2]
    sigma1, sigma2 = np.cov(ours.T), np.cov(theirs.T)
    difference = ours.mean(0) - theirs.mean(0)
    expected = difference @ difference + np.trace(sigma1 + sigma2 - 2 * scipy.linalg.sqrtm(sigma1 @ sigma2).real)
    assert expected == pytest.approx(0.738535, rel=1e-5)
    assert fid(ours, theirs) == pytest.approx(expected, rel=1e-6)
    statistics = feature_statistics(ours), feature_statistics(theirs)
    assert frechet_distance(*statistics[0], *statistics[1]) == pytest.approx(expected, rel=1e-6)
    assert fid(ours, ours) == pytest.approx(0, abs=1e-9)


def test_paper_fid_takes_the_first_images_of_each_side():
    ours, theirs = random_features(1280), random_features(1280, seed=1) * 2
    expected = frechet_distance_of_release(*feature_statistics(ours), *feature_statistics(theirs))
    longer = np.concatenate((ours, 9 * theirs)), np.concatenate((theirs, 9 * ours))
    assert paper_fid(*longer) == pytest.approx(expected)


def test_kid_of_two_halves_of_a_set_is_near_zero(monkeypatch):
    monkeypatch.setattr(fid_module, "KID_SUBSETS", 10)
    features = random_features(4000)
    mean, deviation = kid(features[:2000], features[2000:], seed=0)
    moved, _ = kid(features[:2000] + 0.5, features[2000:], seed=0)
    assert abs(mean) < 2e-3 and 0 < deviation < 0.02 and moved > 0.1
    assert kid(features[:2000], features[2000:], seed=0) == (mean, deviation)
    assert kid(features[:2000], features[2000:], seed=1) != (mean, deviation)


def test_kid_is_pinned(monkeypatch):
    """By its definition: the unbiased estimate over all pairs. With 1,000 images a side, every subset is the set."""
    monkeypatch.setattr(fid_module, "KID_SUBSETS", 2)
    ours, theirs = waves(1000, 4), 1.2 * waves(1000, 4)[:, ::-1] + 0.1

    def kernel(x, y):
        return (x @ y.T / 4 + 1) ** 3

    def off_diagonal(x):
        return (kernel(x, x).sum() - np.trace(kernel(x, x))) / (1000 * 999)

    expected = off_diagonal(ours) + off_diagonal(theirs) - 2 * kernel(ours, theirs).mean()
    assert expected == pytest.approx(0.181023, rel=1e-5)
    mean, deviation = kid(ours.astype(np.float32), theirs.astype(np.float32), seed=0)
    assert mean == pytest.approx(expected, rel=1e-3) and deviation < 1e-4


def test_inception_score_is_pinned():
    """By its definition, exp of the mean of KL(p(y|x) || p(y)), for ten parts of the images in torchmetrics' order."""
    logits = 3 * waves(1000, 5)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    def score(part):
        return np.exp((part * np.log(part / part.mean(0))).sum(1).mean())

    assert score(p) == pytest.approx(1.246774, rel=1e-5)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).numpy()
    scores = [score(part) for part in np.split(p[order], 10)]
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)), rel=1e-5)
    assert np.mean(scores) == pytest.approx(score(p), rel=0.01)


def test_inception_score_of_uniform_logits_is_one():
    assert inception_score(np.full((1000, 10), 3.0, np.float32)) == pytest.approx((1, 0))


def test_inception_score_of_certain_and_balanced_logits_is_the_number_of_classes():
    logits = 100 * np.eye(4, dtype=np.float32)[np.arange(20_000) % 4]
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(4, rel=2e-3) and deviation < 0.01


def test_inception_score_leaves_the_random_state_alone():
    logits = random_features(1000)
    torch.manual_seed(5)
    first = inception_score(logits)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    assert inception_score(logits) == first
    with pytest.raises(UserError, match="1000 generated images, not 999"):
        inception_score(logits[:-1])


def test_manifold_metrics_of_identical_sets_are_one():
    features = random_features(200)
    assert manifold_metrics(features, features) == (1, 1, 1, 1)


def test_manifold_metrics_of_sets_far_apart_are_zero():
    assert manifold_metrics(random_features(50), random_features(60) + 100) == (0, 0, 0, 0)


def test_manifold_metrics_by_hand():
    real = np.array([[0.0], [1], [10], [-5]])  # balls ]-1,1[, ]0,2[, ]1,19[, ]-10,0[
    generated = np.array([[0.5], [0.25], [3], [30], [31]])  # balls ].25,.75[, ]0,.5[, ].5,5.5[, ]29,31[, ]30,32[
    values = manifold_metrics(generated, real, neighbours=1)
    assert values == pytest.approx((3 / 5, 1 / 4, (2 + 2 + 1) / 5, 3 / 4))


def test_manifold_metrics_against_loops(monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", 7)
    generated, real = random_features(30, 3), 1.5 * random_features(40, 3, seed=1) + 0.5

    def radius(x, points):
        return sorted(np.linalg.norm(x - y) for y in points)[5]  # the first is x itself

    def count(x, centres):
        return sum(np.linalg.norm(x - centre) < radius(centre, centres) for centre in centres)

    expected = (
        np.mean([count(x, real) > 0 for x in generated]),
        np.mean([count(x, generated) > 0 for x in real]),
        np.mean([count(x, real) for x in generated]) / 5,
        np.mean([any(np.linalg.norm(x - y) < radius(x, real) for y in generated) for x in real]),
    )
    assert len(set(expected)) == 4 and 0 < min(expected) < 1
    assert manifold_metrics(generated, real) == pytest.approx(expected)


def test_manifold_metrics_of_too_few_images_are_refused():
    with pytest.raises(UserError, match="6 generated images, not 5"):
        manifold_metrics(random_features(5), random_features(6))


@pytest.fixture
def published(tmp_path):
    """A folder laid out as FSVAE's, with random weights and a decoder of another layout; and its network."""
    torch.manual_seed(0)
    network = FadAutoencoder(1).eval()
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("decoder.")}
    for folder in ("stat_checkpoints", "stats"):
        (tmp_path / folder).mkdir()
    torch.save({**state, "decoder.other": torch.zeros(1)}, tmp_path / "stat_checkpoints" / "mnist_64.pth")
    np.savez(tmp_path / "stats" / "mnist_test_64.npz", mu=np.zeros(64, np.float32), sigma=np.eye(64))
    return tmp_path, network


def test_fad_network_and_statistics_as_published(published):
    folder, network = published
    loaded, (mu, sigma) = load_published(folder, "MNIST")
    images = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8)
    features = fad_features(images, loaded, batch_size=2)
    assert features.shape == (5, 64) and not loaded.training
    with torch.inference_mode():
        hidden = network.encoder(images.float() / 255 * 2 - 1)
        expected = network.latent_layer(hidden.reshape(5, 1024))
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)
    assert (mu == 0).all() and (sigma == np.eye(64)).all() and mu.dtype == np.float64


def test_fad_weights_that_are_absent_or_damaged(published):
    folder, _ = published
    assert load_published(folder, "FMNIST") is None and load_published(folder, "KMNIST") is None
    with pytest.raises(UserError, match="--fad_weights"):
        load_published(folder / "nowhere", "MNIST")
    for path in (folder / "stats" / "mnist_test_64.npz", folder / "stat_checkpoints" / "mnist_64.pth"):
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        with pytest.raises(UserError, match=path.name):
            load_published(folder, "MNIST")
        path.write_bytes(whole)
    torch.save({"encoder.0.0.weight": torch.zeros(32, 1, 3, 3)}, folder / "stat_checkpoints" / "mnist_64.pth")
    with pytest.raises(UserError, match="KeyError"):
        load_published(folder, "MNIST")


@pytest.mark.parametrize("channels", [1, 3])
def test_fad_autoencoder_restores_shape_and_range(channels):
    images = to_fad_range(torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8))
    assert images.min() >= -1 and images.max() <= 1
    reconstructions = FadAutoencoder(channels)(images)
    assert reconstructions.shape == images.shape and reconstructions.abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_images_for_fad_are_resized_by_pillow(channels):
    images = torch.randint(0, 256, (2, channels, 40, 28), dtype=torch.uint8)
    resized = to_fad_size(images)
    assert resized.shape == (2, channels, 32, 32) and resized.dtype == torch.uint8
    for image, small in zip(images.flatten(0, 1), resized.flatten(0, 1), strict=True):  # one channel at a time
        expected = Image.fromarray(image.numpy()).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(small.numpy(), np.array(expected))
    assert torch.equal(to_fad_size(resized), resized)


def test_fad_is_of_more_images_than_features():
    features = random_features(5000)
    reference = np.ones(64), 4 * np.eye(64)
    assert fad(features, reference) == frechet_distance(*feature_statistics(features), *reference)
    assert fad(features, reference) == pytest.approx(64 * (1 + 1), rel=0.03)
    with pytest.raises(UserError, match="65 generated images, not 64"):
        fad(features[:64], reference)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 12)])
def test_classifier_features_give_its_logits(shape):
    torch.manual_seed(0)
    network = Classifier(shape[0], classes=5)
    images = torch.randint(0, 256, (7, *shape), dtype=torch.uint8)
    features = classifier_features(images, network, batch_size=3)
    logits = classifier_logits(features, network)
    with torch.inference_mode():
        expected = network(images.float() / 255)
    assert features.shape == (7, 128) and logits.shape == (7, 5)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)


def test_what_logits_tell_by_hand():
    probabilities = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.5, 0.2, 0.3]]
    logits = np.log(np.array(probabilities))  # classes 0, 0, 2, 0
    assert accuracy(logits, torch.tensor([0, 1, 2, 2])) == 0.5
    assert mean_confidence(logits) == pytest.approx((0.7 + 0.6 + 0.8 + 0.5) / 4)
    assert class_balance(logits) == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(3))
    assert class_balance(np.eye(3)) == pytest.approx(1) and class_balance(logits[:2]) == 0


def test_classifier_distance_is_the_frechet_distance():
    ours, theirs = random_features(200, 128), random_features(300, 128, seed=1) + 1
    assert classifier_distance(ours, theirs) == frechet_distance(*feature_statistics(ours), *feature_statistics(theirs))
