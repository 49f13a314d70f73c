"""scripts/reproduce.py and scripts/results_table.py: rows from recipes, and what is made of their records."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from errors import UserError
from parts import SAMPLE_METRICS
from pipeline.options.parser import as_written, build_parser
from pipeline.options.sections import DEFAULTS
from pipeline.run_folder import RunFolder
from scripts import reproduce, results_table
from scripts.reproduce import RECIPES, SEEDS, Job, Recipe, short

RECORD = {"drawn": "temperature 1", "split": "test", "num_generated": 5000, "num_real": 10000, "dataset": "MNIST"}
TRAINING = "stage 1 (vqsvae): 3,600 images, 30 min; stage 2 (sdid): 7,200 images, 1 h 0 min"


@pytest.fixture
def calls(monkeypatch):
    """The calls of main.py that reproduce makes, as lists of options; those of "broken" rows fail, nothing is run."""
    made = []

    def call(arguments, **_):
        made.append(arguments[3:])
        return SimpleNamespace(returncode=int("broken" in " ".join(arguments)))

    monkeypatch.setattr(reproduce.subprocess, "run", call)
    return made


def leave(options, epochs, of=1):
    """Leave what a training with these options of main.py leaves after some of its epochs."""
    chosen = DEFAULTS | vars(build_parser("").parse_args(options))
    run = RunFolder(Path(chosen["result_path"]) / chosen["dataset_name"] / chosen["model"])
    run.path.mkdir(parents=True, exist_ok=True)
    config = {key: as_written(value) for key, value in chosen.items()} | {"epochs": of, "diffusion_epochs": of}
    run.config.write_text(json.dumps(config))
    torch.save({"stage": chosen["stage"], "epoch": epochs}, run.last)
    return run


@pytest.fixture
def job(tmp_path):
    recipe = Recipe("MNIST", ("--stage vqsvae --epochs 3", "--stage sdid --diffusion_epochs 4 --temperature 1"))
    return Job(recipe, tmp_path / "row", ("--device", "cpu"))


def test_a_row_is_trained_evaluated_and_then_left_alone(job):
    """Each call follows from what the ones before have left."""
    first = job.next_call()
    place = ["--result_path", str(job.folder / "1"), "--device", "cpu"]
    data = ["--dataset_name", "MNIST", "--held_out", "5001", "--model", "snn-vq-vae"]
    assert first == [*data, "--stage", "vqsvae", "--epochs", "3", *place]
    run = leave(first, epochs=2, of=3)
    assert job.next_call() == ["--resume", str(run.path), "--device", "cpu"]
    leave(first, epochs=3, of=3)
    second = job.next_call()
    assert second[6:8] == ["--stage", "sdid"] and second[second.index("--start_from") + 1] == str(run.path)
    last = leave(second, epochs=4, of=4)
    records = []
    for seed in SEEDS:
        evaluation = ["--checkpoint", str(last.path), "--seed", str(seed), "--num_samples", "10000", "--device", "cpu"]
        assert job.next_call() == evaluation
        records.append({"name": "fid", "value": 1.0, "protocol": "", "sampling": {"seed": seed}, **RECORD})
        last.metrics.write_text(json.dumps(records))
    assert job.next_call() is None


def test_a_training_with_other_options_is_named_and_not_gone_on_with(job):
    leave([*job.training(0), "--lr", "0.5"], epochs=1, of=3)
    with pytest.raises(UserError, match=r"was begun with --lr 0\.5: choose another --result_path"):
        job._replace(recipe=Recipe("MNIST", ("--stage vqsvae --epochs 3 --lr 0.1",))).next_call()


def test_the_feature_networks_may_be_named_after_the_training(job):
    for training, epochs in enumerate((3, 4)):
        leave(job.training(training), epochs, of=epochs)
    places = ("--fid_weights", "weights.pth", "--data_path", "elsewhere")
    assert job._replace(passed_on=places).next_call()[-4:] == [*places]


def test_a_row_that_fails_does_not_stop_the_others(calls, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "RECIPES", {"broken": RECIPES["mnist-faithful"], "whole": RECIPES["mnist-vq-vae"]})
    monkeypatch.setattr(Job, "next_call", lambda job: job.training(0) if job.folder not in done else None)
    monkeypatch.setattr(reproduce, "read_rows", lambda runs: runs)
    monkeypatch.setattr(reproduce, "table", lambda rows: f"the table of {len(rows)}")
    done = set()
    run = reproduce.subprocess.run

    def finish(arguments, **more):
        result = run(arguments, **more)
        if not result.returncode:
            done.add(tmp_path / "whole")
        return result

    monkeypatch.setattr(reproduce.subprocess, "run", finish)
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(["--jobs", "2", "--result_path", str(tmp_path)])
    said = capsys.readouterr().out
    assert exit_.value.code == 1 and len(calls) == 2
    assert f"broken: failed: see {tmp_path / 'broken' / 'log.txt'}" in said and "whole: finished" in said
    assert "the table of 1" in said


def test_trainings_are_told_how_much_time_is_left(calls, tmp_path, capsys):
    reproduce.main(
        ["--rows", "mnist-faithful", "--max_minutes", "0.002", "--result_path", str(tmp_path), "--", "--seed", "3"]
    )
    limit = calls[0].index("--max_minutes")
    assert 0 < float(calls[0][limit + 1]) <= 0.002 and calls[0][limit - 2 : limit] == ["--seed", "3"]
    assert "mnist-faithful: time is up" in capsys.readouterr().out


def test_every_recipe_is_made_of_options_that_main_takes(cli, tmp_path):
    """Asked of the program itself, which stops at the data that are not there, or at the run to begin with."""
    for name, recipe in RECIPES.items():
        assert name.split("-")[0] == recipe.dataset.lower()
        for rehearsed in (False, True):
            job = Job(recipe, tmp_path / name, ("--data_path", str(tmp_path / "none")), rehearsed)
            for number in range(len(recipe.trainings)):
                options = job.training(number)
                outcome = cli(*options)
                missing = "lacks" if number == 0 else "--start_from"
                assert outcome.status == 2 and (missing in outcome.err or "config.json" in outcome.err), outcome.err


@pytest.mark.parametrize("mistake", [["--jobs", "0"], ["--max_minutes", "-1"], ["--rows", "lost"]], ids=" ".join)
def test_mistakes_are_told_before_anything_is_run(mistake, calls, capsys):
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(mistake)
    assert exit_.value.code == 2 and not calls and mistake[0] in capsys.readouterr().err


def test_the_list_has_every_row_and_runs_nothing(calls, capsys):
    reproduce.main(["--list"])
    said = capsys.readouterr().out
    assert not calls and all(f"{name}: " in said for name in RECIPES)
    assert "    python -u main.py --dataset_name FMNIST --held_out 5000 --model snn-vq-vae --stage vqsvae" in said


def test_a_rehearsal_makes_a_whole_row(tmp_path, monkeypatch, capsys):
    """With the real program, on the digits that need no download."""
    small = "--spike_steps 2 --hidden_channels 4 --embedding_dim 4 --denoiser_channels 4 --batch_size 100"
    monkeypatch.setattr(reproduce, "RECIPES", {"digits": Recipe("Digits", short(small))})
    monkeypatch.setitem(reproduce.HELD_OUT, "Digits", 100)
    monkeypatch.setattr(reproduce, "SEEDS", (1,))
    reproduce.main(["--rehearse", "--result_path", str(tmp_path), "--", "--device", "cpu"])
    said = capsys.readouterr().out
    assert said.count("== digits: main.py") == 3 and "| Digits | snn-vq-vae | stage 1 (vqsvae): 500 images" in said


def make_run(folder, dataset, records, more=None, **options):
    """A run folder with records (name, value, protocol); `more` is recorded with each of them."""
    folder.mkdir(parents=True)
    config = {
        "dataset_name": dataset,
        "model": "snn-vq-vae",
        "readout": "both",
        "spike_generator": "adaptive",
        **options,
    }
    config["lineage"] = [{"stage": stage, "images": 3600, "minutes": 30} for stage in ("vqsvae", "sdid", "sdid")]
    (folder / "config.json").write_text(json.dumps(config))
    shared = RECORD | (more or {})
    content = [{"name": name, "value": value, "protocol": protocol, **shared} for name, value, protocol in records]
    (folder / "metrics.json").write_text(json.dumps(content))


def test_table_and_plot(tmp_path):
    make_run(tmp_path / "runs" / "a", "MNIST", [("fad", 12.345, "own"), ("mse", 0.5, "mean"), ("unknown", 1, "x")])
    make_run(tmp_path / "runs" / "deep" / "b", "MNIST", [("fad", 7, "published")], readout="rate")
    chosen = dict(neuron="plif", tau=3.0, v_threshold=1.0, v_reset=None)
    make_run(tmp_path / "runs" / "neuron", "MNIST", [("mse", 1, "mean")], **chosen)
    outputs = ["--output", str(tmp_path / "table.md"), "--plot", str(tmp_path / "plot.png")]
    results_table.main([str(tmp_path / "runs"), *outputs])
    text = (tmp_path / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    head, ours, rate = rows[0], rows[2], rows[3]
    assert ours[:3] == ["MNIST", "snn-vq-vae", TRAINING] and rate[1] == "snn-vq-vae, rate"
    own = "FID, 10,000 against test"
    column = {name: head.index(name) for name in (own, "FID, paper protocol", "FAD", "MSE")}
    assert ours[column[own]] == ours[column["FID, paper protocol"]] == "not run"
    assert ours[column["FAD"]].startswith("12.35 ") and rate[column["FAD"]].startswith("7 ")
    letters = [row[column["FAD"]].split("<sup>")[1] for row in (ours, rate)]
    assert letters[0] != letters[1]  # other protocols
    assert "FAD: own (5000 generated, 10000 test images) of MNIST" in text and "SSIM" not in text
    paper = next(row for row in rows if row[1] == "Spiking-Diffusion (paper)")
    assert paper[column["FID, paper protocol"]].startswith("37.5 ") and paper[column["FAD"]] == ""
    assert "FMNIST" not in text
    assert "snn-vq-vae, plif, tau 3, v_reset soft" in {row[1] for row in rows}
    assert Image.open(tmp_path / "plot.png").size[0] > 300


def test_seeds_of_the_same_weights_are_one_row(tmp_path, capsys):
    for name, weights, seed, fad in (
        ("a", "w", 1, 3.0),
        ("b", "w", 2, 4.0),
        ("again", "w", 2, 4.0),
        ("c", "w", 3, 5.0),
        ("d", "other", 1, 9.0),
    ):
        values, more = [("fad", fad, "own"), ("mse", 0.5, "mean")], {"weights": weights, "sampling": {"seed": seed}}
        make_run(tmp_path / name, "MNIST", values, more)
    results_table.main([str(tmp_path)])
    ours = [line for line in capsys.readouterr().out.splitlines() if "| snn-vq-vae |" in line]
    assert len(ours) == 2
    assert "4 ± 2.5 <sup>" in ours[0]  # t = 4.303, standard deviation 1, three values
    assert "| 0.5 <sup>" in ours[0] and "| 9 <sup>" in ours[1]


def test_accuracy_is_plotted_against_recall(tmp_path, monkeypatch, capsys):
    """One line for the guidances of the same weights; a vertical one for a network that knows no classes.

    What the samples were drawn with is a field: no words are read.
    """
    figures = []
    monkeypatch.setattr(results_table, "save_figure", lambda path, figure: figures.append(figure))
    for name, weights, guidance, metrics in (
        (
            "guided",
            "w",
            0.5,
            {"classifier_recall": 0.6, "label_accuracy": 0.85, "classifier_accuracy": 0.9},
        ),
        ("plain", "w", 0, {"classifier_recall": 0.6, "label_accuracy": 0.8, "classifier_accuracy": 0.9}),
        ("of classifier alone", "w", 3, {"classifier_recall": 0.5}),
        ("unconditional", "v", 0, {"classifier_recall": 0.7}),
    ):
        values = [(metric, value, "own") for metric, value in metrics.items()]
        make_run(tmp_path / name, "MNIST", values, {"weights": weights, "sampling": {"guidance": guidance}})
    results_table.main([str(tmp_path), "--classes_plot", str(tmp_path / "plot.png")])
    (axes,) = figures[0].axes
    assert [line.get_xydata().tolist() for line in axes.lines[:2]] == [
        [[0.6, 0.8], [0.6, 0.85]],
        [[0.7, 0.0], [0.7, 1.0]],
    ]
    assert [text.get_text() for text in axes.texts] == ["0", "0.5"]
    assert "label_accuracy" in refused(capsys, tmp_path / "unconditional", "--classes_plot", tmp_path / "plot.png")


def shown(capsys, *folders):
    """The rows of the table, as lists of cells, and the legend."""
    results_table.main([str(folder) for folder in folders])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "| snn-vq-vae |" in line]
    return rows, [line for line in lines if line.startswith("- ")]


@pytest.mark.parametrize("other", [{"network": "b" * 16}, {"real_sha256": "b" * 16}, {"dataset": "FMNIST"}])
def test_only_values_of_the_same_network_and_images_are_comparable(other, tmp_path, capsys):
    """They have different letters, and are not averaged, although their protocol reads the same."""
    same = {"weights": "w", "network": "a" * 16, "real_sha256": "a" * 16}
    for number, more in enumerate(({}, {}, other)):
        values, sampling = [("fad", 3.0 + number, "own")], {"sampling": {"seed": number}}
        make_run(tmp_path / str(number), "MNIST", values, same | sampling | more)
    (row,), legend = shown(capsys, tmp_path)
    (cell,) = [cell for cell in row if "<sup>" in cell]
    assert cell.startswith("3.5 ± ") and "; 5 <sup>" in cell
    assert sum("FAD: own" in line for line in legend) == 2


def test_each_setting_of_sampling_has_a_row(tmp_path, capsys):
    """With the metrics of the autoencoder, which have none, in each; energies of other passes are never mixed."""
    for steps, value in ((22, 700.0), (49, 1400.0)):
        more = {"weights": "w", "sampling": {"seed": 1, "sample_steps": steps}, "drawn": f"{steps} timesteps"}
        make_run(tmp_path / str(steps), "MNIST", [("energy_sample", value, "µJ")], more)
    make_run(tmp_path / "all", "MNIST", [("mse", 0.5, "mean")], {"weights": "w"})
    rows, legend = shown(capsys, tmp_path)
    energies = {row[2].split("; ")[-1]: row[-1].split()[0] for row in rows}
    assert energies == {"22 timesteps": "700", "49 timesteps": "1400"}
    assert all("0.5 <sup>" in " ".join(row) for row in rows) and sum("energy" in line for line in legend) == 1


def test_columns_are_metrics_that_runs_have(finished):
    known = {"paper_fid", "fid", "kid", "fad"}
    assert known <= results_table.COLUMNS.keys() and known <= SAMPLE_METRICS.keys()
    named = {record["name"] for record in json.loads((finished.path / "metrics.json").read_text())}
    assert {"mse", "ssim", "energy_sample"} <= named & results_table.COLUMNS.keys()


def test_the_table_of_a_real_run(run, capsys):
    results_table.main([str(run)])
    line = next(line for line in capsys.readouterr().out.splitlines() if "| ImageFolder | snn-vq-vae |" in line)
    assert "stage 2 (sdid): 240 images" in line and "temperature 0.65, all timesteps" in line


def refused(capsys, *arguments):
    """The one line that a mistake leaves on stderr."""
    with pytest.raises(SystemExit) as exit_:
        results_table.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    return error


def test_the_table_of_results_that_were_written_elsewhere(cli, run, tmp_path, capsys, monkeypatch):
    """`--checkpoint X --result_path Y` leaves no config.json in Y: what was trained is found in X, from anywhere."""
    monkeypatch.chdir(run.parent)
    assert cli("--checkpoint", run.name, "--result_path", tmp_path / "elsewhere", "--num_samples", 5).status == 0
    monkeypatch.chdir(tmp_path)
    results_table.main([str(tmp_path / "elsewhere")])
    assert "| ImageFolder | snn-vq-vae | stage 1 (vqsvae): 240 images" in capsys.readouterr().out
    (run / "config.json").unlink()
    assert f"{run / 'config.json'} does not say which model" in refused(capsys, tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', "3"])
def test_damaged_files_of_a_run(name, content, run, capsys):
    (run / name).write_text(content)
    assert str(run / name) in refused(capsys, run)


def test_nothing_to_plot(tmp_path, capsys):
    make_run(tmp_path / "a", "MNIST", [("mse", 0.5, "mean")])
    with pytest.raises(SystemExit):
        results_table.main([str(tmp_path), "--plot", str(tmp_path / "plot.png")])
    assert "no run has paper_fid, fid, fad or classifier_frechet" in capsys.readouterr().err


def test_no_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        results_table.main([str(tmp_path)])
    assert exit_.value.code == 2 and "evaluate a run first" in capsys.readouterr().err


def test_letters():
    assert [results_table._letter(i) for i in (0, 25, 26, 27, 52)] == ["a", "z", "aa", "ab", "ba"]
