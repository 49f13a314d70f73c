"""Labels as a condition of the residual denoiser, alone and with prototypes: what is told, drawn, and asked for."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, run_in, write_bars
from PIL import Image

from datasets import load_dataset
from diffusion.absorbing import AbsorbingDiffusion
from errors import UserError
from models import ResidualSDID, reference
from models.conditions import NOT_GIVEN
from models.labels import Labels
from models.quantizer import Codebook
from pipeline.checkpoints import load_checkpoint, load_weights, save_weights, write_json
from pipeline.options.configuration import DEFAULTS, resolve
from pipeline.options.declaration import comma_separated
from pipeline.run_folder import RunFolder
from pipeline.runtime import processes
from pipeline.runtime.device import Machine
from pipeline.sampling.batches import draw_codes
from pipeline.sampling.grids import GREY, ZOOM, class_grid, grid
from pipeline.sampling.image_models import CodeDiffusion
from pipeline.sampling.labels import find_labels
from pipeline.sampling.settings import Settings
from pipeline.training.loop import Place
from pipeline.training.objectives import sdid_trainer
from pipeline.training.schedules import Schedule
from scripts import pack
from spiking_diffusion import SpikingDiffusion

PRETRAINED = ROOT / "pretrained"
K, GRID, CLASSES = 6, (4, 4), 3
SHAPES = {"label": {"classes": CLASSES}, "both": {"prototypes": 4, "classes": CLASSES}}
COUNTS = torch.tensor([[3, 0, 0], [2, 5, 0], [0, 0, 0], [0, 9, 0]])  # no image has label 2


def denoiser_of(shape):
    """A small denoiser whose conditions make a difference, counted as in COUNTS."""
    torch.manual_seed(0)
    denoiser = ResidualSDID(K, denoiser_channels=16, denoiser_blocks=1, grid=GRID, **SHAPES[shape]).eval()
    denoiser.labels.counts.copy_(COUNTS if denoiser.prototypes else COUNTS.sum(0))
    if denoiser.prototypes:
        denoiser.prototypes.grids.random_(K)
        torch.nn.init.normal_(denoiser.prototypes.embed.weight)
    torch.nn.init.normal_(denoiser.labels.embed.weight)
    return denoiser


# ---- what enters ----


def test_a_label_enters_as_a_spike_through_weights_for_every_position():
    labels = Labels(CLASSES, 8, (2, 3))
    assert not labels(torch.arange(CLASSES)).any(), "no influence at first"
    torch.nn.init.normal_(labels.embed.weight)
    currents = labels(torch.tensor([2, NOT_GIVEN, 0]))
    assert torch.equal(currents[[0, 2]], labels.embed.weight[[2, 0]]) and not currents[1].any()


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_step_by_step_is_the_same(shape):
    denoiser = denoiser_of(shape).double()
    tokens, t = torch.randint(0, K + 1, (4, *GRID)), torch.ones(4)
    told = torch.tensor([[0, 1], [NOT_GIVEN, NOT_GIVEN], [1, NOT_GIVEN], [NOT_GIVEN, 2]])[
        :, -len(denoiser.conditions) :
    ]
    fast, untold = denoiser(tokens, t, told), denoiser(tokens, t)
    torch.testing.assert_close(reference.residual_sdid(denoiser, tokens, told), fast)
    same = [torch.equal(one, other) for one, other in zip(fast, untold, strict=True)]
    assert same == (told == NOT_GIVEN).all(1).tolist()


@torch.no_grad()
def test_conditions_are_taken_over_where_they_are_the_same():
    before, after = denoiser_of("label"), denoiser_of("both")
    embedded = after.prototypes.embed.weight.clone()
    after.load_pretrained(before.state_dict())
    assert torch.equal(after.labels.embed.weight, before.labels.embed.weight)
    assert torch.equal(after.prototypes.embed.weight, embedded) and torch.equal(after.labels.counts, COUNTS)
    assert ResidualSDID.options_of(after.state_dict()).items() >= SHAPES["both"].items()
    plain = ResidualSDID(K, denoiser_channels=16, denoiser_blocks=1, grid=GRID)
    plain.load_pretrained(after.state_dict())
    assert not plain.conditions and torch.equal(plain.position, after.position), "those it lacks are left out"
    fewer = ResidualSDID(K, denoiser_channels=16, denoiser_blocks=1, grid=GRID, classes=CLASSES - 1)
    with pytest.raises(RuntimeError):
        fewer.load_pretrained(before.state_dict())


# ---- what is drawn ----

EVENLY = 0.001  # how much frequencies among 4,000 or 2,000 samples may differ from those in training


def frequencies(drawn):
    counts = torch.zeros(COUNTS.shape).index_put_(tuple(drawn.T), torch.ones(len(drawn)), accumulate=True)
    return counts / len(drawn)


def test_a_sample_has_the_conditions_of_a_training_image():
    conditions = denoiser_of("both").conditions
    drawn = conditions.of_samples(0, range(4000))
    torch.testing.assert_close(frequencies(drawn), COUNTS / COUNTS.sum(), atol=EVENLY, rtol=0)
    assert torch.equal(conditions.of_samples(0, [7, 3]), drawn[[7, 3]]), "whatever it is drawn together with"
    asked = conditions.of_samples(0, range(4000), [i % 2 for i in range(4000)])
    assert torch.equal(asked[:, 1], torch.arange(4000) % 2)
    shares = torch.stack([asked[label::2, 0].bincount(minlength=4) for label in (0, 1)], 1) / 2000
    torch.testing.assert_close(shares, COUNTS[:, :2] / COUNTS.sum(0)[:2], atol=EVENLY, rtol=0)
    assert torch.equal(conditions.of_samples(0, [8, 3], [0, 1]), asked[[8, 3]])
    with pytest.raises(ValueError):
        conditions.of_samples(0, [0], [2])


@pytest.mark.parametrize("seed", range(5))
def test_even_a_few_samples_have_each_condition_about_as_often_as_it_occurs(seed):
    """Independent draws would miss by more: 20 of them, by 0.1 (one standard deviation of a condition of 0.3)."""
    for count in (20, 100):
        drawn = denoiser_of("both").conditions.of_samples(seed, range(count))
        torch.testing.assert_close(frequencies(drawn), COUNTS / COUNTS.sum(), atol=2 / count, rtol=0)


def test_labels_alone():
    conditions = denoiser_of("label").conditions
    assert torch.equal(conditions.of_samples(0, range(5), [1, 0, 1, 1, 0]), torch.tensor([[1], [0], [1], [1], [0]]))
    drawn = conditions.of_samples(0, range(4000))
    assert drawn.double().mean() == pytest.approx(14 / 19, abs=EVENLY)


def test_what_occurs_together_is_counted():
    codebook = Codebook(K, 2)
    codebook.embeddings.weight.data = torch.tensor([[float(k), 0.0] for k in range(K)])
    codes = torch.tensor([0] * 30 + [5] * 20).view(-1, 1, 1).expand(-1, *GRID)
    labels = torch.tensor([0] * 10 + [1] * 20 + [1] * 5 + [2] * 15)
    denoiser = ResidualSDID(K, denoiser_channels=16, denoiser_blocks=1, grid=GRID, prototypes=2, classes=3)
    denoiser.conditions.fit(codes, labels, codebook, seed=0)
    low, high = denoiser.prototypes.nearest(codes[[0, -1]], codebook).tolist()
    assert denoiser.labels.counts[[low, high]].tolist() == [[10, 20, 0], [0, 5, 15]]
    assert denoiser.labels.present == [0, 1, 2] and denoiser_of("both").labels.present == [0, 1]


# ---- guidance ----


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_guidance_strengthens_the_last_condition(shape):
    denoiser = denoiser_of(shape).double()
    told = denoiser.conditions.of_samples(0, range(4))
    tokens, t, where = torch.full((4, *GRID), K), torch.ones(4), torch.rand(4, *GRID) < 0.5
    without = denoiser.conditions.without_last(told)
    assert (without[:, -1] == NOT_GIVEN).all() and torch.equal(without[:, :-1], told[:, :-1])
    given, dropped = (denoiser.logits_at(tokens, t, where, each) for each in (told, without))
    guided = denoiser.guided_logits_at(1.5, tokens, t, where, told)
    torch.testing.assert_close(guided, 2.5 * given - 1.5 * dropped)


@pytest.mark.parametrize(("guidance", "passes"), [(0.0, 1), (2.0, 2)])
def test_guidance_takes_two_passes_and_none_takes_one(guidance, passes, monkeypatch):
    denoiser, calls = denoiser_of("both"), []
    forward = denoiser.logits_at
    monkeypatch.setattr(denoiser, "logits_at", lambda *told: calls.append(told) or forward(*told))
    diffusion, machine = AbsorbingDiffusion(K, 16), Machine(torch.device("cpu"), bf16=False)
    noise, condition = diffusion.noise(0, range(2), GRID, 1), denoiser.conditions.of_samples(0, range(2))
    draw_codes(denoiser, diffusion, noise, Settings(guidance=guidance), machine, condition=condition)
    assert len(calls) == passes


# ---- names ----

NAMES = ("T-shirt/top", "7", "Bag")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ((0, 2), (0, 2)),
        (("2", " 2 "), (2, 2)),
        (("bag", "T-SHIRT/TOP"), (2, 0)),
        (("7", np.int64(1)), (1, 1)),
        (("all",), (0, 1, 2)),
        (("ALL",), (0, 1, 2)),
    ],
)
def test_classes_by_name_or_number(wanted, found):
    assert find_labels(wanted, [0, 1, 2], NAMES) == found


def test_classes_whose_names_differ_by_case_alone():
    assert find_labels(["A", "a", "1", "B", "b"], [0, 1, 2], ("A", "a", "b")) == (0, 1, 1, 2, 2)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (("Ab", "aB"), "AB"),
        (("Cat", "cat"), "CAT"),
        (("cat", "cat"), "cat"),
        (("Straße", "strasse"), "STRASSE"),
        (("dark blue", "Dark  Blue"), "dark Blue"),
        (("e\u0301", "É"), "é"),
    ],
)
def test_a_word_that_several_names_may_mean(names, word):
    with pytest.raises(UserError) as caught:
        find_labels([word], [0, 1], names)
    assert f"class 0 ({names[0]}) or 1 ({names[1]})" in str(caught.value) and "\n" not in str(caught.value)
    assert find_labels([word], [1], names) == (1,), "no image has the other label"
    assert find_labels(["1", 0], [0, 1], names) == (1, 0)


def test_names_that_are_typed_otherwise():
    """An exact name comes before a number, other spellings too; what has a comma is asked for by its number."""
    names = ("3", "straße", "cafe\u0301 ", "a,b", "all")
    assert find_labels(["3", "STRASSE", "Café", "all"], range(5), names) == (0, 1, 2, 4)
    assert find_labels(comma_separated("3,4"), range(5), names) == (0, 4)
    assert find_labels([3], range(5), names) == (3,), "an integer is a number"


def test_no_class():
    with pytest.raises(UserError, match=r"no class is named: choose from 0 \(T-shirt/top\)"):
        find_labels([], [0, 1, 2], NAMES)


@pytest.mark.parametrize("wanted", ["8", "shoe", 3, -1])
def test_a_class_that_is_not_there(wanted):
    with pytest.raises(UserError, match=r"choose from 0 \(T-shirt/top\), 2 \(Bag\), all or any") as error:
        find_labels([wanted], [0, 2], NAMES)
    assert "\n" not in str(error.value) and find_labels(["all"], [0, 2], None) == (0, 2)


def test_a_row_for_each_class():
    """Of images that are of the classes in turn; the names are before them."""
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 1, 5, 5) * 30
    page = class_grid(images, ["bag", "a longer name"], 3)
    pictures = page[:, :, -3 * (5 * ZOOM + ZOOM) :]
    expected = grid(images[[0, 2, 4, 1, 3, 5]], 3)
    assert torch.equal(pictures, expected[:, :, -pictures.shape[2] :])
    names = page[:, :, : page.shape[2] - expected.shape[2]]
    assert names.shape[2] > 100 and all((half != GREY).any() for half in names.chunk(2, 1))


# ---- training ----


def test_each_condition_is_dropped_by_itself(tmp_path, monkeypatch):
    """For a tenth of the images, in whatever part of the batch a process computes; the others are told their own."""
    denoiser, codebook, seen = denoiser_of("both"), Codebook(K, 2), []
    machine = Machine(torch.device("cpu"), bf16=False)
    model = CodeDiffusion(SimpleNamespace(vq_layer=codebook, codebook_size=K), denoiser, GRID, machine, 0, Settings())
    codes, labels = torch.randint(K, (1000, *GRID)).to(torch.int16), torch.arange(1000) % CLASSES
    told = denoiser.conditions.of(codes, labels, codebook=codebook)
    assert torch.equal(told, torch.stack((denoiser.prototypes.nearest(codes, codebook), labels), 1))

    def network(tokens, t, condition):
        seen.append(condition)
        return torch.zeros(len(tokens), K, *GRID, requires_grad=True)

    with RunFolder(tmp_path) as run:
        schedule = Schedule(epochs=1, batch_size=10, lr=0.1, seed=0)
        trainer = sdid_trainer(denoiser, model, (codes, told), None, "elbo", Place(run, schedule, machine))
        for number, count in ((0, 1), (1, 2)):  # one process, and the second of two
            monkeypatch.setattr(processes, "rank", lambda number=number: number)
            monkeypatch.setattr(processes, "size", lambda count=count: count)
            trainer._share_of_losses(network, trainer.examples[:], torch.Generator().manual_seed(0))
    whole, half = seen
    assert torch.equal(whole[500:], half)
    dropped = whole == NOT_GIVEN
    torch.testing.assert_close(dropped.double().mean(0), torch.full((2,), 0.1).double(), atol=0.05, rtol=0)
    assert dropped.all(1).double().mean() == pytest.approx(0.01, abs=0.016)
    assert torch.equal(whole[~dropped], told[~dropped])


# ---- in a run ----

SMALL = (
    *("--preset", "improved", "--hidden_channels", 8, "--denoiser_channels", 48, "--denoiser_blocks", 1),
    *("--codebook_size", 8, "--batch_size", 8, "--epochs", 1, "--diffusion_epochs", 1, "--num_samples", 5),
    *("--device", "cpu", "--precision", "float32", "--metrics", "energy"),
)


CONDITIONS = [("--condition", "label"), ("--condition", "both")]


@pytest.fixture(scope="module", params=CONDITIONS, ids=lambda options: options[1])
def trained(request, cli, classes, tmp_path_factory):
    """A run whose denoiser was trained with labels."""
    result = tmp_path_factory.mktemp("conditioned")
    outcome = cli(*classes, *SMALL, *request.param, "--result_path", result)
    assert (outcome.status, outcome.err) == (0, "")
    return run_in(result)


def samples_of(folder):
    with np.load(folder / "samples" / "images.npz") as archive:
        return archive["images"], json.loads(str(archive["settings"]))


def test_rows_of_classes(trained, cli, tmp_path, float64):
    """Sample i is the same whatever it is drawn together with, and what was asked for is saved with it."""
    images = []
    for count, dtype in ((5, torch.float64), (20, torch.float64), (5, torch.float32)):
        torch.set_default_dtype(dtype)
        call = ("--checkpoint", trained, "--stage", "sample", "--num_samples", count, "--guidance", 1)
        outcome = cli(*call, "--labels", "sea,0", "--precision", "float32", "--result_path", tmp_path)
        assert (outcome.status, outcome.err) == (0, "")
        drawn, settings = samples_of(tmp_path)
        assert settings["labels"] == [1, 0] and settings["guidance"] == 1
        assert "guidance 1, classes sea, dark blue" in settings["drawn"]
        images.append(drawn)
    assert (images[0] == images[1][:5]).all()
    model = SpikingDiffusion.load(trained, device="cpu", precision="float32")
    assert model.class_names == ("dark blue", "sea")
    theirs = model.sample(5, labels=[1, "dark blue"], guidance=1.0)
    assert (theirs.transpose(0, 2, 3, 1) == images[2]).all()
    assert (model.sample(5, labels="sea", guidance=1)[[0, 2]] == theirs[[0, 2]]).all()
    any_class = SpikingDiffusion.load(trained, device="cpu", precision="float32", labels="any")
    assert (any_class.sample(5) == model.sample(5, labels="any")).all() and any_class.model.settings.labels == ()
    asked = SpikingDiffusion.load(trained, device="cpu", precision="float32", labels="sea", guidance=1.0)
    assert (asked.sample(5, labels="any", guidance=0) == model.sample(5)).all()
    assert (asked.sample(5) == model.sample(5, labels=np.int64(1), guidance=1)).all()
    hidden = np.arange(16) > 8 + np.zeros((16, 1))
    each = [model.inpaint(theirs, hidden, labels=label) for label in (0, 1)]
    mixed = model.inpaint(theirs, hidden, labels=np.array([1, 0, 1, 1, 0]))
    assert (mixed == np.where(np.array([1, 0, 1, 1, 0])[:, None, None, None], each[1], each[0])).all()
    for labels in (None, "any"):
        with pytest.raises(UserError, match="guidance when inpainting is of the labels"):
            model.inpaint(theirs, np.zeros(theirs.shape[2:], bool), labels=labels, guidance=1)


def test_inpainting_as_a_class(trained, cli, tmp_path, monkeypatch):
    told, draw = [], ResidualSDID.logits_at
    monkeypatch.setattr(ResidualSDID, "logits_at", lambda self, *inputs: told.append(inputs) or draw(self, *inputs))
    call = ("--checkpoint", trained, "--stage", "inpaint", "--result_path", tmp_path)
    for labels, expected in ((("--labels", "all"), {0, 1}), (("--labels", "sea"), {1}), (("--labels", "any"), None)):
        told.clear()
        outcome = cli(*call, *labels)
        assert outcome.status == 0 and (tmp_path / "samples" / "inpainted.png").exists()
        (said,) = re.findall(r"images .* each completed (.*)", outcome.out)
        assert ("classes" in said) == bool(expected) and said.count("sea") == (expected is not None), "each once"
        if expected is None:
            assert all(len(inputs) == 3 for inputs in told)
        else:
            conditions = torch.cat([inputs[3] for inputs in told])
            assert set(conditions[:, -1].tolist()) == expected and (conditions[:, :-1] == NOT_GIVEN).all()


@pytest.mark.parametrize("options", [(), ("--labels", "own"), ("--labels", "own", "--guidance", 2)])
def test_inpainting_each_image_as_its_own_class(options, trained, classes, cli, tmp_path, monkeypatch):
    """The default; the four completions of an image are all of its class."""
    asked, inpaint = [], CodeDiffusion.inpaint
    monkeypatch.setattr(CodeDiffusion, "inpaint", lambda self, *inputs: asked.append(self) or inpaint(self, *inputs))
    call = ("--checkpoint", trained, "--stage", "inpaint", "--num_samples", 3, "--result_path", tmp_path)
    assert (outcome := cli(*call, *options)).status == 0, outcome.err
    assert re.search(r"3, each completed 4 times: .*, each as its own class\n", outcome.out)
    own = load_dataset("ImageFolder", classes[3], image_size=16).test_labels[:3]
    assert set(own.tolist()) == {0, 1} and asked[0].labels_of(range(12)).tolist() == own.repeat(4).tolist()
    assert asked[0].settings.guidance == (2 if "--guidance" in options else 0)
    page = Image.open(tmp_path / "samples" / "inpainted.png")
    assert page.width > 4 + 3 * 51 and page.height == 3 + 6 * 51, "six rows, with names before them"


def test_own_classes_are_found_by_name(trained, cli, tmp_path, monkeypatch):
    """In other data a class may have another number; one that the denoiser does not know is refused."""
    asked, inpaint = [], CodeDiffusion.inpaint
    monkeypatch.setattr(CodeDiffusion, "inpaint", lambda self, *inputs: asked.append(self) or inpaint(self, *inputs))
    for split in ("train", "test"):
        for name in ("black", "dark blue", "sea"):
            write_bars(tmp_path / "data" / split / name, 3, 16, colour=False, seed=len(split))
    call = ("--checkpoint", trained, "--stage", "inpaint", "--data_path", tmp_path / "data", "--result_path", tmp_path)
    outcome = cli(*call)
    assert outcome.status == 2 and "no class 'black': choose from 0 (dark blue), 1 (sea)" in outcome.err
    shutil.rmtree(tmp_path / "data" / "test" / "black")
    assert cli(*call).status == 0
    numbers = load_dataset("ImageFolder", tmp_path / "data", image_size=16).test_labels
    assert set(numbers.tolist()) == {1, 2} and asked[0].settings.labels == tuple((numbers - 1).tolist())


def test_own_classes_of_images_without_any(trained, grey, cli, tmp_path, monkeypatch):
    asked, inpaint = [], CodeDiffusion.inpaint
    monkeypatch.setattr(CodeDiffusion, "inpaint", lambda self, *inputs: asked.append(self) or inpaint(self, *inputs))
    call = ("--checkpoint", trained, "--stage", "inpaint", "--data_path", grey[3], "--result_path", tmp_path)
    assert cli(*call).status == 0 and asked[0].settings.labels == ()
    outcome = cli(*call, "--labels", "own")
    assert outcome.status == 2 and "--labels own: ImageFolder has no labels" in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stage", "sample", "--labels", "boot"), "no class 'boot': choose from 0 (dark blue), 1 (sea), all or any"),
        (("--stage", "sample", "--labels", "all", "--num_samples", 1), "say 2 at least"),
        (
            ("--stage", "evaluate", "--labels", "all"),
            "--labels has no effect in --stage evaluate, only in --stage sample or in --stage inpaint",
        ),
        (("--stage", "sample", "--guidance", -1), "not from 0 to 100"),
        (
            ("--stage", "inpaint", "--guidance", 1, "--labels", "any"),
            "--stage inpaint is of the labels, and here are none",
        ),
        (("--stage", "sample", "--labels", "own"), "no class 'own'"),
        (("--stage", "sample", "--condition", "none"), "made with different options: omit --condition ("),
        (("--stage", "sample", "--denoiser_blocks", 3), "made with different options: omit --denoiser_blocks ("),
        (("--stage", "evaluate", "--readout", "rate"), "made with different options: omit --readout (both in the run)"),
    ],
)
def test_what_cannot_be_asked_for(options, words, trained, cli):
    outcome = cli("--checkpoint", trained, *options)
    assert outcome.status == 2 and words in outcome.err and outcome.err.count("\n") == 1


def test_runs_without_labels_say_so(cli, grey, finished, tmp_path):
    outcome = cli(*grey, *SMALL, "--condition", "label", "--result_path", tmp_path)
    assert outcome.status == 2 and "ImageFolder has no labels" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "ImageFolder").exists(), "found before anything is trained"
    outcome = cli(*grey, *SMALL, "--condition", "none", "--guidance", 1, "--result_path", tmp_path)
    assert outcome.status == 2 and "--guidance needs a denoiser with a condition" in outcome.err
    outcome = cli("--checkpoint", finished.path, "--stage", "sample", "--labels", "1")
    assert outcome.status == 2 and "sdid has no --labels" in outcome.err
    model = SpikingDiffusion.load(finished.path, device="cpu", precision="float32")
    with pytest.raises(UserError, match="not conditioned on labels"):
        model.sample(2, labels=1)
    with pytest.raises(UserError, match="guidance needs a denoiser with a condition"):
        model.sample(2, guidance=1)


def test_stopped_and_resumed_is_the_same(trained, cli, classes, tmp_path):
    condition = RunFolder(trained).read_config()["condition"]
    options = next(options for options in CONDITIONS if condition in options)
    stopped = cli(*classes, *SMALL, *options, "--result_path", tmp_path, "--max_minutes", 1e-4)
    run = run_in(tmp_path)
    while "saved" in stopped.out:
        stopped = cli("--resume", run, "--max_minutes", 0.005)
    assert stopped.status == 0
    ours, theirs = load_weights(RunFolder(run).denoiser), load_weights(RunFolder(trained).denoiser)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["labels.counts"].sum() == 120 and ours["labels.embed.weight"].any()


def test_runs_from_before_there_was_the_option(cli, classes, tmp_path):
    """One with prototypes is resumed with them."""
    prototypes = ("--condition", "prototype", "--max_minutes")
    for name, minutes in (("whole", 10), ("stopped", 1e-4)):
        assert cli(*classes, *SMALL, *prototypes, minutes, "--result_path", tmp_path / name).status == 0
    whole, run = (RunFolder(run_in(tmp_path / name)) for name in ("whole", "stopped"))
    state = load_checkpoint(run.last)
    del state["run"]["condition"]
    save_weights(run.last, state)
    config = {key: value for key, value in run.read_config().items() if key not in ("condition", "class_names")}
    write_json(run.config, config)
    assert cli("--resume", run.path).status == 0
    ours, theirs = load_weights(run.denoiser), load_weights(whole.denoiser)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("prototypes", "condition"), [(50, "prototype"), (0, "none")])
def test_packed_runs_from_before_there_was_the_option(prototypes, condition, tmp_path):
    config = RunFolder(PRETRAINED / "mnist").read_config() | {"images_per_prototype": prototypes}
    del config["condition"]
    old = RunFolder(tmp_path / "old")
    old.path.mkdir()
    write_json(old.config, config)
    assert resolve(["--checkpoint", str(old.path)]).options.denoiser.condition == condition
    start = ("--start_from", str(old.path), "--stage", "sdid", "--denoiser", "residual", "--result_path", str(tmp_path))
    options = resolve([*start, "--condition", "both"]).options.denoiser
    assert (options.condition, options.images_per_prototype) == ("both", prototypes or DEFAULTS["images_per_prototype"])


def test_packed(trained, cli, tmp_path):
    """Which has no data set beside it, but the names of its classes."""
    pack.pack(RunFolder(trained), RunFolder(tmp_path))
    outcome = cli("--checkpoint", tmp_path, "--stage", "sample", "--labels", "Sea", "--num_samples", 3)
    assert (outcome.status, outcome.err) == (0, "") and samples_of(tmp_path)[1]["labels"] == [1]


def test_added_to_a_run_that_had_none(trained, cli, classes, tmp_path):
    cli(*classes, *SMALL, "--condition", "prototype", "--result_path", tmp_path / "before")
    before = run_in(tmp_path / "before")
    more = ("--stage", "sdid", "--condition", "both", "--diffusion_epochs", 1, "--result_path", tmp_path / "after")
    outcome = cli(*classes, "--start_from", before, *more)
    assert (outcome.status, outcome.err) == (0, "")
    weights = load_weights(RunFolder(run_in(tmp_path / "after")).denoiser)
    assert weights["labels.counts"].shape == (6, 2) and weights["labels.embed.weight"].any(), "learned"
