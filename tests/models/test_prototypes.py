"""The prototype of an image as the condition of the residual denoiser."""

import numpy as np
import pytest
import torch
from helpers import IMPROVED, run_in

from diffusion.absorbing import AbsorbingDiffusion
from models import ResidualSDID, reference
from models.conditions import NOT_GIVEN, Conditions
from models.prototypes import Prototypes
from models.quantizer import Codebook
from pipeline.checkpoints import load_weights, write_json
from pipeline.run_folder import RunFolder

K, GRID = 6, (4, 4)


@pytest.fixture
def codebook():
    """Embeddings along a line, so that a mean of codes is a code."""
    codebook = Codebook(K, 2)
    codebook.embeddings.weight.data = torch.tensor([[float(k), 0.0] for k in range(K)])
    return codebook


@pytest.fixture
def groups():
    """Codes of 40 images, which are codes 0 to 2, and of 10, which are codes 4 and 5 in the middle."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 3, (40, *GRID), generator=generator)
    high = torch.where(torch.rand(10, *GRID, generator=generator) < 0.5, 4, 5)
    return torch.cat((low, high)).to(torch.int16)


def fitted(codes, codebook, count=2):
    prototypes = Prototypes(count, K, 8, 2, GRID)
    prototypes.fit(codes, codebook, seed=0)
    return prototypes


def test_average_grids_are_found(groups, codebook):
    prototypes = fitted(groups, codebook)
    low, high = prototypes.counts.argsort(descending=True).tolist()
    assert prototypes.counts[[low, high]].tolist() == [40, 10]
    for number, members in ((low, groups[:40]), (high, groups[40:])):
        mean = members.double().mean(0)
        assert ((prototypes.grids[number] - mean).abs() <= 0.5).all(), "the code nearest to the mean embedding"
        assert (prototypes.nearest(members, codebook) == number).all()


def test_every_image_is_counted_once_and_the_same_seed_finds_the_same(codebook):
    codes = torch.randint(0, K, (300, *GRID), generator=torch.Generator().manual_seed(1))
    first, second = fitted(codes, codebook, 20), fitted(codes, codebook, 20)
    assert first.counts.sum() == 300 and torch.equal(first.grids, second.grids)
    distances = (codes[:, None].double() - first.grids.double()).square().flatten(2).sum(2)  # [N,G]
    nearest = first.nearest(codes, codebook)
    assert torch.equal(distances.gather(1, nearest[:, None])[:, 0], distances.amin(1))
    assert torch.equal(nearest.bincount(minlength=20), first.counts)


def test_more_prototypes_than_kinds_of_image(codebook, recwarn):
    codes = torch.arange(3).view(3, 1, 1).expand(3, *GRID).repeat(10, 1, 1)
    prototypes = fitted(codes, codebook, 7)
    assert prototypes.counts.sum() == 30 and (prototypes.grids[prototypes.nearest(codes, codebook)] == codes).all()
    assert not recwarn.list, "nothing the user could do about it"


def test_drawn_as_often_as_they_occur(codebook):
    prototypes = Prototypes(4, K, 8, 2, GRID)
    prototypes.counts.copy_(torch.tensor([30, 0, 10, 0]))
    conditions = Conditions(prototypes, labels=None)
    drawn = conditions.of_samples(0, range(4000))
    assert drawn.shape == (4000, 1) and set(drawn.flatten().tolist()) == {0, 2}
    assert (drawn == 0).double().mean() == pytest.approx(0.75, abs=0.001)
    assert torch.equal(conditions.of_samples(0, [7, 3]), drawn[[7, 3]]), "whatever it is drawn together with"
    assert not torch.equal(conditions.of_samples(1, range(4000)), drawn)


def test_they_enter_as_spikes(groups, codebook):
    """Each code adds its column of weights; none adds nothing."""
    prototypes = fitted(groups, codebook)
    assert not prototypes(torch.tensor([0, 1])).any(), "no influence at first"
    torch.nn.init.normal_(prototypes.embed.weight)
    currents = prototypes(torch.tensor([1, NOT_GIVEN]))
    assert currents.shape == (2, 8, 2, 2) and not currents[1].any()
    weight, square = prototypes.embed.weight, prototypes.grids[1, :2, 2:]
    expected = sum(weight[:, int(square[y, x]), y, x] for y in (0, 1) for x in (0, 1))
    torch.testing.assert_close(currents[0, :, 0, 1], expected)


def small(**options):
    torch.manual_seed(0)
    return ResidualSDID(K, denoiser_channels=16, denoiser_blocks=1, grid=GRID, **options).eval()


@torch.no_grad()
def test_a_network_without_them_is_taken_over():
    before, after = small(), small(prototypes=3)
    torch.nn.init.normal_(before.head.weight)
    after.load_pretrained(before.state_dict())
    tokens, t = torch.randint(0, K + 1, (5, *GRID)), torch.ones(5)
    torch.testing.assert_close(after(tokens, t, torch.tensor([[0], [1], [2], [0], [NOT_GIVEN]])), before(tokens, t))
    assert ResidualSDID.options_of(after.state_dict())["prototypes"] == 3
    assert ResidualSDID.options_of(before.state_dict())["prototypes"] == 0
    again = small(prototypes=2)
    again.load_pretrained(after.state_dict())  # another number of prototypes, which have to be fitted
    assert torch.equal(again.prototypes.embed.weight, after.prototypes.embed.weight)
    for other in (
        ResidualSDID(K, denoiser_channels=32, denoiser_blocks=1, grid=GRID),
        ResidualSDID(K, denoiser_channels=16, denoiser_blocks=2, grid=GRID),
    ):
        with pytest.raises(RuntimeError):
            after.load_pretrained(other.state_dict())


@torch.no_grad()
def test_step_by_step_is_the_same(groups, codebook):
    denoiser = small(prototypes=2).double()
    denoiser.prototypes.fit(groups, codebook, seed=0)
    torch.nn.init.normal_(denoiser.prototypes.embed.weight)
    tokens, t, told = groups[:4].long(), torch.ones(4), torch.tensor([[0], [1], [NOT_GIVEN], [1]])
    tokens[:, :2] = K
    fast, untold = denoiser(tokens, t, told), denoiser(tokens, t)
    torch.testing.assert_close(reference.residual_sdid(denoiser, tokens, told), fast)
    same = [torch.equal(one, other) for one, other in zip(fast, untold, strict=True)]
    assert same == [False, False, True, False]


def test_each_sample_is_told_its_own():
    """A denoiser that draws what it is told, images of one batch being at different timesteps."""
    diffusion = AbsorbingDiffusion(K, 16)
    told = torch.arange(20) % K

    def denoiser(tokens, t, where, number):
        codes = number.view(-1, 1, 1).expand(tokens.shape)[where]
        return torch.nn.functional.one_hot(codes, K) * 1000.0

    drawn = diffusion.sample(denoiser, diffusion.noise(0, range(20), GRID), condition=told)
    assert torch.equal(drawn, told.view(-1, 1, 1).expand(drawn.shape))


# ---- in a run ----

SMALL = (*IMPROVED, "--epochs", 1, "--diffusion_epochs", 1, "--metrics", "energy")


@pytest.fixture
def told(cli, grey, tmp_path):
    """A run whose denoiser was trained with prototypes."""
    outcome = cli(*grey, *SMALL, "--images_per_prototype", 10, "--result_path", tmp_path)
    assert (outcome.status, outcome.err) == (0, "")
    return run_in(tmp_path)


def test_added_to_a_run_that_had_none(cli, grey, tmp_path):
    outcome = cli(*grey, *SMALL, "--condition", "none", "--result_path", tmp_path / "before")
    assert (outcome.status, outcome.err) == (0, "")
    before = run_in(tmp_path / "before")
    config = RunFolder(before).read_config()
    del config["condition"], config["images_per_prototype"]  # as in a run made before there were prototypes
    write_json(RunFolder(before).config, config)
    plain = ("--stage", "sdid", "--diffusion_epochs", 1, "--result_path", tmp_path / "plain")
    assert cli(*grey, "--start_from", before, *plain).status == 0
    kept = load_weights(RunFolder(run_in(tmp_path / "plain")).denoiser)
    assert not any(name.startswith("prototypes") for name in kept), "they are not added by the preset"
    more = ("--stage", "sdid", "--condition", "prototype", "--images_per_prototype", 10, "--diffusion_epochs", 1)
    outcome = cli(*grey, "--start_from", before, *more, "--result_path", tmp_path / "after")
    assert (outcome.status, outcome.err) == (0, "")
    weights = load_weights(RunFolder(run_in(tmp_path / "after")).denoiser)
    assert weights["prototypes.counts"].sum() == 120 and len(weights["prototypes.counts"]) == 12
    assert weights["prototypes.embed.weight"].any(), "learned"
    fewer = ("--stage", "sdid", "--train_images", 60, "--diffusion_lr", 1e-9, "--ema_decay", 0, "--diffusion_epochs", 1)
    begin = ("--start_from", run_in(tmp_path / "after"), "--result_path", tmp_path / "again")
    assert cli(*grey, *begin, *fewer).status == 0
    again = load_weights(RunFolder(run_in(tmp_path / "again")).denoiser)
    assert again["prototypes.counts"].sum() == 60 and len(again["prototypes.counts"]) == 6, "of the images there are"
    torch.testing.assert_close(again["prototypes.embed.weight"], weights["prototypes.embed.weight"], atol=1e-6, rtol=0)


def test_samples_are_told_and_fillings_are_not(told, cli, monkeypatch, float64):
    asked, original = [], ResidualSDID.logits_at
    monkeypatch.setattr(ResidualSDID, "logits_at", lambda self, *told: asked.append(told) or original(self, *told))
    images = []
    for count in (3, 5):
        assert cli("--checkpoint", told, "--stage", "sample", "--num_samples", count).status == 0
        images.append(np.load(told / "samples" / "images.npz")["images"])
    assert (images[0] == images[1][:3]).all(), "a sample is the same whatever it is drawn together with"
    assert asked and all(len(told) == 4 and (told[3] >= 0).all() for told in asked)
    asked.clear()
    assert cli("--checkpoint", told, "--stage", "inpaint").status == 0
    assert asked and all(len(told) == 3 for told in asked)
