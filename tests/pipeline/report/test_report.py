"""The report: what the page shows, what it says where something is missing, and how a browser finds it."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import SMALL

from datasets import needs_download
from pipeline.report import run_view
from pipeline.report.report import SECTIONS
from pipeline.report.run_view import RunView, nearest
from pipeline.sampling.grids import grid, ungrid
from scripts import report

NASTY = """<img src=x onerror="document.title='run'">&'$x_1$"""
SCRIPT = "<script>document.title='run'</script>"


@pytest.fixture
def page(capsys):
    """The page that the script makes of runs, and what it says on stderr."""

    def write(output, *runs, options=()):
        report.main([*map(str, runs), "--output", str(output), *map(str, options)])
        captured = capsys.readouterr()
        assert captured.out == f"{output}\n"
        return output.read_text(encoding="utf-8"), captured.err

    return write


def notes(html):
    return re.findall(r'<p class="note">(.*?)</p>', html)


def picture_count(html):
    return len(re.findall("<img ", html))


# ---- what is there, and what is not ----


def test_a_training_ends_with_a_report(finished):
    html = (finished.path / "report.html").read_text(encoding="utf-8")
    assert notes(html) == []
    assert picture_count(html) == 5 and html.count('<svg role="img"') == 7
    assert all(f'<section id="{key}">' in html for key in (*SECTIONS, "curves", "time", "metrics", "settings"))
    for record in json.loads((finished.path / "metrics.json").read_text(encoding="utf-8")):
        assert record["name"].replace("_", "_<wbr>") in html and record["protocol"] in html
    assert not re.search(r"""(src|href)=["'](?!data:|#)|url\((?!#)|@import""", html)
    assert str(finished.path / "report.html") in finished.outcome.out


def test_no_report(cli, small, tmp_path):
    outcome = cli(*small, "--stage", "vqsvae", "--result_path", tmp_path)
    assert outcome.status == 0 and "report.html" not in outcome.out
    assert not list(tmp_path.rglob("report.html"))


def test_sampling_writes_no_report(cli, run):
    (run / "report.html").unlink()
    assert cli("--checkpoint", run, "--stage", "sample", report=True).status == 0
    assert not (run / "report.html").exists()


def test_a_folder_of_results_alone(cli, run, page, tmp_path):
    elsewhere = tmp_path / "results"
    assert cli("--checkpoint", run, "--result_path", elsewhere, "--metrics", "mse", report=True).status == 0
    written = (elsewhere / "report.html").read_text(encoding="utf-8")
    again, err = page(tmp_path / "page.html", elsewhere)
    for html in (written, again):
        assert picture_count(html) == 5 and html.count('<svg role="img"') == 5, "no energy"
        of_energy = notes(html)
        assert all(re.match("metrics.json has no (firing rates|energy): --metrics energy", note) for note in of_energy)
        assert len(of_energy) == 2
    assert err == ""


@pytest.mark.parametrize(
    ("gone", "reasons"),
    [
        ("diff_result", ["a denoiser belongs beside the autoencoder"]),
        ("metrics.json", ["There is no metrics.json", "no metrics.json"]),
        ("log.jsonl", ["There is no log.jsonl"]),
        ("model.pth", ["model.pth does not exist"]),
        ("samples", []),
    ],
)
def test_what_is_missing_is_said(gone, reasons, run, page, tmp_path):
    whole = picture_count(page(tmp_path / "before.html", run)[0])
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    html, err = page(tmp_path / "after.html", run)
    assert err == "" and all(any(reason in note for note in notes(html)) for reason in reasons)
    assert picture_count(html) == {"diff_result": 1, "model.pth": 0}.get(gone, whole)


def test_weights_alone(run, page, tmp_path):
    """As the original release leaves them: nobody knows what they are of."""
    for path in (run / "config.json", run / "metrics.json", run / "log.jsonl", run / "samples" / "images.npz"):
        path.unlink()
    html, err = page(tmp_path / "page.html", run)
    assert picture_count(html) == 0 and err == ""
    assert sum("it would tell which data" in note for note in notes(html)) == 4


def test_data_that_are_not_there(run, page, tmp_path):
    html, err = page(tmp_path / "page.html", run, options=("--data_path", tmp_path / "nowhere"))
    assert picture_count(html) == 3 and err == ""
    assert sum(str(tmp_path / "nowhere") in note for note in notes(html)) == 2


def test_nothing_is_downloaded(tmp_path):
    assert needs_download("MNIST", tmp_path) and needs_download("CIFAR10", tmp_path)
    assert not needs_download("Digits", tmp_path) and not needs_download("ImageFolder", tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            assert needs_download("MNIST", tmp_path)
            (raw / f"{split}-{kind}-ubyte").touch()
    assert not needs_download("MNIST", tmp_path)


def test_other_data_than_those_of_the_training(run, page, grey, tmp_path):
    other = shutil.copytree(grey[3], tmp_path / "other")
    next((other / "train").iterdir()).unlink()
    html, _ = page(tmp_path / "page.html", run, options=("--data_path", other))
    assert html.count("has different images from those of the run: train (119 images now, 120 in the run)") == 2


@pytest.mark.parametrize("model", ["snn-vae", "vq-vae"])
def test_other_models(model, cli, grey, tmp_path):
    options = dict(zip(SMALL[::2], SMALL[1::2], strict=True)) | {"--epochs": 1, "--diffusion_epochs": 1}
    if model == "snn-vae":
        options = {name: value for name, value in options.items() if not re.search("codebook|denoiser|diffusion", name)}
    words = [word for pair in options.items() for word in pair]
    outcome = cli(*grey, *words, "--model", model, "--result_path", tmp_path, report=True)
    assert outcome.status == 0 and "the report lacks" not in outcome.err
    html = (tmp_path / "ImageFolder" / model / "report.html").read_text(encoding="utf-8")
    assert picture_count(html) == {"snn-vae": 3, "vq-vae": 5}[model]
    assert ("no sample takes shape" in html) == (model == "snn-vae")


def test_a_part_that_fails_does_not_cost_the_rest(cli, run, monkeypatch):
    monkeypatch.setattr(run_view, "animation", lambda *_: 1 / 0)
    outcome = cli("--checkpoint", run, "--metrics", "mse", report=True)
    assert outcome.status == 0 and str(run / "report.html") in outcome.out
    assert outcome.err.splitlines() == [
        f"warning: the report lacks trajectory of {run} (ZeroDivisionError: division by zero)"
    ]
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "could not be drawn (ZeroDivisionError: division by zero)" in html and picture_count(html) == 3


def test_samples_of_other_weights_are_not_shown(run, page, tmp_path):
    before, _ = page(tmp_path / "before.html", run)
    assert "5 samples: temperature 0.65" in before
    weights = torch.load(run / "model.pth", weights_only=True)
    torch.save({name: value * 1.01 if value.dim() > 1 else value for name, value in weights.items()}, run / "model.pth")
    assert "64 samples: temperature 0.65" in page(tmp_path / "after.html", run)[0]


def test_samples_that_were_asked_for_by_class_have_a_column_for_each(run, page, tmp_path):
    path, shape = run / "samples" / "images.npz", (11, 16, 16, 1)
    with np.load(path) as archive:
        settings = json.loads(str(archive["settings"])) | {"labels": [0, 3, 7]}
    np.savez_compressed(path, images=np.zeros(shape, np.uint8), settings=np.array(json.dumps(settings)))
    assert 'alt="Grid of 9 samples, 3 a row"' in page(tmp_path / "page.html", run)[0]


@pytest.mark.parametrize("arguments", [["NOWHERE"], ["RUN", "RUN"]], ids=["no run", "no output"])
def test_mistakes(arguments, run, tmp_path, capsys):
    names = {"NOWHERE": tmp_path / "nowhere", "RUN": run}
    with pytest.raises(SystemExit) as exit_:
        report.main([str(names[word]) for word in arguments])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "is not a run folder" in err or "--output" in err


def test_a_run_that_was_moved_away_from_its_feature_networks(run, page, tmp_path):
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps(config | {"fad_weights": str(tmp_path / "gone")}), encoding="utf-8")
    assert picture_count(page(tmp_path / "page.html", run)[0]) == 5


def test_settings_of_several_runs_are_those_that_differ(cli, small, run, page, tmp_path):
    outcome = cli(*small, "--stage", "vqsvae", "--codebook_size", 6, "--result_path", tmp_path)
    assert outcome.status == 0
    html, _ = page(tmp_path / "page.html", run, tmp_path / "ImageFolder" / "snn-vq-vae")
    table = html[html.index('<section id="settings">') :]
    assert re.findall(r'<th scope="row">(.*?)<small>', table) == ["codebook_<wbr>size"]
    assert re.findall(r'<td class="value">(.*?)</td>', table) == ["8", "6"]


# ---- the numbers in it ----


def test_values_of_several_settings_are_told_apart(run):
    """Layers are those of the last; and an old record, which does not say its settings, is not the first's equal."""
    records = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    later = []
    for record in records:
        if record["name"] in ("firing_rate", "energy_denoiser_pass", "energy_sample"):
            settings = {"sampling": {**record["sampling"], "sample_steps": 2}, "drawn": "two timesteps"}
            later.append(record | settings | ({"layers": {"all: layer": 0.125}} if "layers" in record else {}))
            del record["sampling"]
    (run / "metrics.json").write_text(json.dumps([*records, *later]), encoding="utf-8")
    view = RunView(report.open_run(run, None), 0)
    for shown in (view.firing_rates(), view.energy()):
        assert "all" in shown.figures[0].svg and "layer 0.1250" in shown.figures[0].svg
        assert shown.caption.endswith(" Samples: two timesteps.")
    (text,) = [value for (name, _), value in view.metrics().items() if name == "energy_sample"]
    assert "sample steps None" in text and "sample steps 2" in text


def test_old_records_are_of_the_data_set_of_their_run(run):
    """So that those of two data sets do not share a row."""
    records = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    for record in records:
        del record["dataset"], record["real_sha256"]
    (run / "metrics.json").write_text(json.dumps(records), encoding="utf-8")
    assert all(" of ImageFolder" in key for _, key in RunView(report.open_run(run, None), 0).metrics())


def test_nearest_training_images(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(256, (50, 1, 6, 5), generator=generator, dtype=torch.uint8)
    monkeypatch.setattr(run_view, "CHUNK", 7)
    images = train[[3, 49, 20]].clone()
    images[1] = (images[1].int() - 1).clamp_min(0).byte()
    places, distances = nearest(images, train)
    assert places.tolist() == [3, 49, 20]
    assert distances[0] == distances[2] == 0
    assert distances[1] == pytest.approx((images[1].double() - train[49]).square().mean().sqrt().item() / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_ungrid_undoes_grid(channels):
    images = torch.randint(256, (6, channels, 4, 5), dtype=torch.uint8)
    assert torch.equal(ungrid(grid(images, 3), 4, 5).flatten(0, 1), images.expand(6, 3, 4, 5))


def test_energy_of_layers_adds_up(finished):
    records = json.loads((finished.path / "metrics.json").read_text(encoding="utf-8"))
    for part in ("encode", "decode", "denoiser_pass"):
        (record,) = [each for each in records if each["name"] == f"energy_{part}"]
        assert len(record["layers"]) > 2 and sum(record["layers"].values()) == pytest.approx(record["value"])


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium. Without one the tests are skipped, but fail where CI is set."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        wanted = "needs Chromium: apt-get install chromium"
        pytest.fail(wanted) if os.environ.get("CI") == "true" else pytest.skip(wanted)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # as root it needs this
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page as a file; whatever it complains of or requests is noted."""

    def open_page(path, width=1400, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.noted = []
        page.on("console", lambda message: page.noted.append(message.text))
        page.on("pageerror", lambda error: page.noted.append(str(error)))
        page.on("request", lambda request: page.noted.append(request.url))
        page.goto(path.as_uri())
        page.evaluate("Promise.all([...document.images].map(image => image.decode()))")
        return page

    return open_page


@pytest.fixture
def nasty(run, page, tmp_path):
    """A page of two runs whose names, data set and records hold HTML."""
    (run.parent / NASTY).mkdir()
    moved = run.rename(run.parent / NASTY / SCRIPT.replace("/", "-"))
    plain = shutil.copytree(moved, tmp_path / "plain")
    config = json.loads((moved / "config.json").read_text(encoding="utf-8"))
    config |= {"data_path": f"{tmp_path}/{SCRIPT}"}
    (moved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    records = json.loads((moved / "metrics.json").read_text(encoding="utf-8"))
    layers = {f"encode: {NASTY}": 0.5, f"{SCRIPT}: {SCRIPT}": 0.25}
    for record in records:
        record |= {"protocol": NASTY + record["protocol"]} | ({"layers": layers} if "layers" in record else {})
    (moved / "metrics.json").write_text(json.dumps(records), encoding="utf-8")
    log = [json.loads(line) | {SCRIPT: 0.5} for line in (moved / "log.jsonl").read_text().splitlines()]
    (moved / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    page(tmp_path / "page.html", moved, plain)
    return tmp_path / "page.html"


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("kind", ["training", "side by side"])
def test_nothing_overflows_and_all_is_there(kind, width, finished, nasty, visit):
    path = finished.path / "report.html" if kind == "training" else nasty
    page = visit(path, width)
    assert page.noted == [path.as_uri()] + [url for url in page.noted if url.startswith("data:")]
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    images = page.evaluate("[...document.images].map(image => [image.naturalWidth, image.alt])")
    assert len(images) == {"training": 5, "side by side": 8}[kind]
    assert all(natural > 0 and len(alt) > 10 for natural, alt in images)
    plots = "[...document.querySelectorAll('svg[role=img]')].map(plot => [plot.clientWidth, plot.ariaLabel])"
    drawn = page.evaluate(plots)
    assert len(drawn) >= 7 and all(shown > 200 and len(alt) > 20 for shown, alt in drawn)
    assert path.stat().st_size < 5e6


def test_html_in_names_is_shown_and_not_run(nasty, visit):
    page = visit(nasty)
    assert page.title() != "run"
    assert page.evaluate("[...document.querySelectorAll('script, img[src=x]')].length") == 0
    text = page.evaluate("document.body.textContent")
    assert text.count(NASTY) > 10 and text.count(SCRIPT) >= 5
    alts = page.evaluate("[...document.querySelectorAll('[aria-label]')].map(each => each.ariaLabel).join()")
    assert NASTY in alts and SCRIPT in alts


def test_colours_follow_the_reader(finished, visit):
    """Text of the page and of its plots; printed, it is black whatever the screen is like."""
    colours = {}
    for scheme in ("light", "dark"):
        page = visit(finished.path / "report.html", color_scheme=scheme)
        colours[scheme] = page.evaluate("getComputedStyle(document.body).color")
        assert page.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == colours[scheme]
        page.emulate_media(media="print", color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert colours["light"] != colours["dark"]


def test_motion_can_be_turned_off(finished, visit):
    shown = {}
    for motion in ("no-preference", "reduce"):
        page = visit(finished.path / "report.html", reduced_motion=motion)
        shown[motion] = page.evaluate("document.querySelector('.animation').checkVisibility()")
    assert shown == {"no-preference": True, "reduce": False}
