import io
import multiprocessing
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import files
from datasets import ImageData, digest
from errors import UserError
from files import cache_folder
from metrics.classifier import accuracy, classifier_features, classifier_logits
from metrics.fad import FadAutoencoder, fad_features, to_fad_range, to_fad_size
from metrics.frechet import feature_statistics
from models.kernels import compiled
from pipeline.evaluation import feature_networks
from pipeline.evaluation.cache import cached
from pipeline.evaluation.feature_networks import classifier, fad_network, kept_features
from pipeline.runtime.device import choose_machine

MACHINE = choose_machine("cpu", "float32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and trainings of 80 steps that take a second."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files._warn.cache_clear()
    monkeypatch.setattr(feature_networks, "BATCH_SIZE", 8)
    monkeypatch.setattr(feature_networks, "FEWEST_STEPS", 80)
    for name in ("CLASSIFIER", "AUTOENCODER"):
        monkeypatch.setattr(feature_networks, name, getattr(feature_networks, name)._replace(epochs=1))
    return tmp_path / "cache" / "spiking-diffusion"


def bars(count, channels=1, seed=0):
    """Noisy images 8x8 with a bright bar, lying (class 0) or standing (class 1)."""
    generator = np.random.default_rng(seed)
    labels = torch.arange(count) % 2
    images = torch.from_numpy(generator.integers(0, 60, (count, channels, 8, 8), dtype=np.uint8))
    for image, label, place in zip(images, labels, generator.integers(0, 8, count), strict=True):
        (image[:, place] if label == 0 else image[:, :, place])[:] = 255
    return images, labels


def make_data(name="Bars", channels=1, labels=True):
    (train, train_labels), (test, test_labels) = bars(128, channels), bars(40, channels, seed=1)
    if not labels:
        train_labels = test_labels = None
    return ImageData(name, train, test, train[:0], train_labels, test_labels)


def no_training(*_):
    pytest.fail("trained again")


def test_cache_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache" / "spiking-diffusion"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "spiking-diffusion"


def test_arrays_are_computed_once(cache):
    arrays = {"a": np.arange(6).reshape(2, 3), "b.c": np.float32(0.5)}
    assert cached("name", lambda: arrays) is arrays
    kept = cached("name", no_training)
    assert kept.keys() == arrays.keys() and all((kept[key] == arrays[key]).all() for key in arrays)
    assert kept["a"].dtype == np.int64 and kept["b.c"].dtype == np.float32
    assert [path.name for path in cache.iterdir()] == ["name.npz"]


def test_damaged_file_is_replaced(cache, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand times would take a while
    arrays = cached("name", lambda: {"a": np.arange(10), "b": np.ones(3)})
    path = cache / "name.npz"
    whole = path.read_bytes()
    flipped = [whole[:place] + bytes((whole[place] ^ 1,)) + whole[place + 1 :] for place in range(len(whole))]
    cut = [whole[:length] for length in (0, 10, len(whole) // 2, len(whole) - 1)]
    noticed = []
    for content in flipped + cut:
        path.write_bytes(content)
        computed = []
        kept = cached("name", lambda: computed.append(1) or arrays)  # noqa: B023 (called at once)
        assert kept.keys() == arrays.keys() and all((kept[key] == arrays[key]).all() for key in arrays)
        assert path.read_bytes() == (whole if computed else content)  # a date, say, may be any
        warned = capsys.readouterr().err
        files._warn.cache_clear()
        assert warned.startswith(f"warning: {path} is damaged (") == bool(computed) and warned.count("\n") <= 1
        noticed.append(bool(computed))
    assert sum(noticed) > len(whole) / 2 and all(noticed[-len(cut) :])
    assert [file.name for file in cache.iterdir()] == ["name.npz"]


# ---- a cache that cannot be used ----


def without_home(monkeypatch, tmp_path):
    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(RuntimeError):
        Path.home()


def below_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))


def that_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "cache").touch()


def in_a_folder_that_takes_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")


def on_a_full_disk(monkeypatch, tmp_path):
    def part_of(path):
        part = path.with_name(path.name + ".part")
        part.symlink_to("/dev/full")
        return part

    monkeypatch.setattr(files, "part_of", part_of)


OBSTACLES = [without_home, below_a_file, that_is_a_file]
OBSTACLES += [in_a_folder_that_takes_none] if Path("/proc/self").exists() else []
OBSTACLES += [on_a_full_disk] if Path("/dev/full").exists() else []


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.__name__)
def test_a_cache_that_cannot_be_written_costs_one_warning(obstacle, tmp_path, monkeypatch, capsys):
    obstacle(monkeypatch, tmp_path)
    for name in ("one", "another", "another"):
        assert cached(name, lambda name=name: {"a": np.array(name)}) == {"a": name}
    warned = capsys.readouterr().err
    assert warned.startswith("warning: cannot write to the cache in ") and warned.count("\n") == 1
    assert not list(tmp_path.rglob("*.part"))


def test_metrics_do_not_need_a_cache(tmp_path, monkeypatch, capsys):
    below_a_file(monkeypatch, tmp_path)
    data = make_data()
    network, _ = classifier(data, MACHINE, seed=0)
    features = kept_features(network, classifier_features, data.test, "Bars-test")
    assert accuracy(classifier_logits(features, network), data.test_labels) > 0.9
    assert fad_network(data, None, MACHINE, seed=0).reference[0].shape == (64,)
    assert capsys.readouterr().err.count("\n") == 1


def fill(barrier):
    """Fill the cache without a warning; be just before the move to the final name when the other process is, too."""
    sync = os.fsync

    def meet(descriptor):
        sync(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            barrier.wait(120)

    os.fsync, files._warn = meet, sys.exit
    assert cached("name", lambda: {"a": np.arange(1000)})["a"][999] == 999


def test_two_processes_fill_the_cache_at_once(cache):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=fill, args=(barrier,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (cached("name", no_training)["a"] == np.arange(1000)).all()
    assert [path.name for path in cache.iterdir()] == ["name.npz"]


def test_what_a_killed_process_left_is_removed_later(cache):
    cache.mkdir(parents=True)
    old, new = cache / "name.npz.0123abcd.part", cache / "name.npz.4567abcd.part"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    cached("name", lambda: {"a": np.arange(3)})
    assert sorted(cache.iterdir()) == [cache / "name.npz", new], "another process may be writing the new one"


# ---- the compiled kernels ----


@pytest.fixture(scope="module")
def compiler():
    if not compiled.available():
        pytest.skip("no C++ compiler")


@pytest.fixture
def kernels(compiler, monkeypatch):
    """Kernels that compile in a few seconds."""
    monkeypatch.setattr(compiled, "FLAGS", tuple(flag for flag in compiled.FLAGS if flag != "-O3"))


def no_compiler(command, run=subprocess.run, **options):
    assert "-o" not in command, "compiled again"
    return run(command, **options)  # to ask it for its version


def test_kernels_are_kept_and_damage_is_replaced(kernels, cache, monkeypatch, capsys):
    compiled._load()
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", no_compiler)
        assert compiled._load().moments_float32 and capsys.readouterr().err == ""
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.unlink()  # this process has loaded the file: to change that one would end it
    path.write_bytes(damaged)
    assert compiled._load().moments_float32
    assert capsys.readouterr().err == f"warning: {path} is damaged (ValueError): recreating it\n"
    assert len(path.read_bytes()) == len(whole) and path.read_bytes() != damaged
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize("obstacle", [without_home, below_a_file], ids=lambda obstacle: obstacle.__name__)
def test_kernels_do_not_need_a_cache(kernels, obstacle, tmp_path, monkeypatch, capsys):
    obstacle(monkeypatch, tmp_path)
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    assert compiled._load().moments_float32
    assert capsys.readouterr().err.count("warning: cannot write to the cache in ") == 1
    assert not list(tmp_path.glob("tmp*"))


def test_digest_depends_on_values_types_shapes_names_and_order():
    numbers = torch.arange(4, dtype=torch.int32)
    different = [
        *((numbers,), (numbers + 1,), (numbers.long(),), (numbers.view(2, 2),), (numbers.float(),), ("a",), ("b",)),
        *(({"a": numbers},), ({"b": numbers},), ("a", "b"), ("b", "a"), (numbers, "a"), ("a", numbers)),
    ]
    digests = [digest(*parts) for parts in different]
    assert len(set(digests)) == len(digests) and all(len(text) == 16 for text in digests)
    transposed = torch.arange(4, dtype=torch.int32).view(2, 2).T
    assert digest(transposed) == digest(transposed.contiguous()) != digest(transposed.T)


@pytest.mark.parametrize("channels", [1, 3])
def test_classifier_learns_and_is_kept(channels, monkeypatch, capsys):
    data = make_data(channels=channels)
    network, protocol = classifier(data, MACHINE, seed=0)
    assert protocol == "own classifier, 5 epochs"
    assert capsys.readouterr().out == "training the classifier on Bars once, about 1 min on two cores\n"
    logits = classifier_logits(classifier_features(data.test, network), network)
    assert logits.shape == (40, 2) and accuracy(logits, data.test_labels) > 0.9
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())

    monkeypatch.setattr(feature_networks, "_train", no_training)
    again, _ = classifier(data, MACHINE, seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert capsys.readouterr().out == ""


def test_classifier_follows_from_the_seed_alone(cache, monkeypatch):
    data = make_data()
    torch.manual_seed(5)
    first, _ = classifier(data, MACHINE, seed=0)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    for path in cache.iterdir():
        path.unlink()
    second, _ = classifier(data, MACHINE, seed=0)
    assert torch.equal(first.head.weight, second.head.weight)
    other, _ = classifier(data, MACHINE, seed=1)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_other_images_or_settings_are_another_network(cache, monkeypatch):
    monkeypatch.setattr(feature_networks, "_train", lambda *_: None)
    data = make_data()
    classifier(data, MACHINE, seed=0)
    data.train[0, 0, 0, 0] += 1
    classifier(data, MACHINE, seed=0)
    data.train_labels[:2] = data.train_labels[:2].flip(0)
    classifier(data, MACHINE, seed=0)
    classifier(data, MACHINE, seed=1)
    monkeypatch.setattr(feature_networks, "FEWEST_STEPS", 81)
    classifier(data, MACHINE, seed=1)
    assert len(list(cache.glob("classifier-Bars-train-128-*.npz"))) == 5


def test_data_without_classes_has_no_classifier():
    with pytest.raises(UserError, match="Bars has no classes"):
        classifier(make_data(labels=False), MACHINE, seed=0)


def test_own_fad_network_learns(capsys):
    data = make_data(channels=3, labels=False)
    network, protocol, reference = fad_network(data, None, MACHINE, seed=0)
    assert protocol == "own FAD autoencoder, 5 epochs"
    assert capsys.readouterr().out.startswith("training the FAD autoencoder on Bars once")
    images = to_fad_range(to_fad_size(data.test))
    with torch.inference_mode():
        error = (network(images) - images).square().mean()
    assert error < images.square().mean() / 2  # which is about the error before training
    mu, sigma = feature_statistics(fad_features(data.test, network))
    np.testing.assert_allclose(reference[0], mu)
    np.testing.assert_allclose(reference[1], sigma)


def test_nothing_to_learn_from_is_refused():
    images, _ = bars(10)
    with pytest.raises(UserError, match="no training images"):
        fad_network(ImageData("Bars", images[:0], images, images[:0]), None, MACHINE, seed=0)


def test_published_fad_network_is_preferred(tmp_path, monkeypatch):
    published = FadAutoencoder(1)
    (tmp_path / "stat_checkpoints").mkdir()
    (tmp_path / "stats").mkdir()
    torch.save(published.state_dict(), tmp_path / "stat_checkpoints" / "fashion_64.pth")
    np.savez(tmp_path / "stats" / "fashion_test_64.npz", mu=np.arange(64.0), sigma=np.eye(64))
    trained = []
    monkeypatch.setattr(feature_networks, "_train", lambda *arguments: trained.append(arguments))

    network, protocol, (mu, _) = fad_network(make_data("FMNIST"), tmp_path, MACHINE, seed=0)
    assert protocol == "published weights" and mu[63] == 63 and not trained
    assert torch.equal(network.latent_layer.weight, published.latent_layer.weight)
    _, protocol, _ = fad_network(make_data("KMNIST"), tmp_path, MACHINE, seed=0)
    assert protocol.startswith("own") and len(trained) == 1


def test_features_are_kept_for_images_and_weights(cache):
    images, _ = bars(20)
    torch.manual_seed(0)
    networks = FadAutoencoder(1), FadAutoencoder(1)
    expected = fad_features(images, networks[0])
    calls = []

    def extract(images, network, progress=None):
        calls.append(network)
        return fad_features(images, network, progress=progress)

    for _ in range(2):
        np.testing.assert_array_equal(kept_features(networks[0], extract, images, "Bars-test"), expected)
    assert len(calls) == 1
    kept_features(networks[1], extract, images, "Bars-test")
    kept_features(networks[0], extract, images[1:], "Bars-test")
    assert len(calls) == 3
    assert len(list(cache.glob("extract-Bars-test-20-*.npz"))) == 2


def test_an_interrupted_extraction_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr(feature_networks, "CHUNK", 8)
    images, _ = bars(20)
    network, done = FadAutoencoder(1), []
    expected = fad_features(images, network)

    def extract(images, network, progress=None):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(images))
        return fad_features(images, network, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        kept_features(network, extract, images, "Bars-test")
    done[:] = []
    features = kept_features(network, extract, images, "Bars-test")
    assert done == [4], "the third part alone"
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_the_bar_counts_images_also_those_that_were_kept(monkeypatch):
    shown = []

    class Bar(tqdm):
        def __init__(self, total, title):
            super().__init__(total=total, file=io.StringIO())

        def update(self, n=1):
            result = super().update(n)
            shown.append(self.n)
            return result

    monkeypatch.setattr(feature_networks, "progress_bar", Bar)
    monkeypatch.setattr(feature_networks, "CHUNK", 8)
    images, _ = bars(20)
    network = FadAutoencoder(1)

    def extract(images, network, progress=None):
        return fad_features(images, network, batch_size=5, progress=progress)

    kept_features(network, extract, images, "Bars-test")
    assert sorted(set(shown)) == [5, 8, 13, 16, 20] and shown[-1] == 20
    shown.clear()
    kept_features(network, extract, images, "Bars-test")
    assert shown == [8, 16, 20]
