"""scripts/reproduce.py and scripts/results_table.py: the matrix of runs, and what is made of their records."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from parts import SAMPLE_METRICS
from pipeline.options.parser import as_written, build_parser
from pipeline.options.sections import DEFAULTS
from scripts import reproduce, results_table

RECORD = {"drawn": "temperature 1", "split": "test", "num_generated": 5000, "num_real": 10000, "dataset": "MNIST"}
TRAINING = "stage 1 (vqsvae): 3,600 images, 30 min; stage 2 (sdid): 7,200 images, 1 h 0 min"


@pytest.fixture
def calls(monkeypatch):
    """The calls of main.py that reproduce makes; those that name KMNIST fail."""
    made = []

    def call(arguments):
        made.append(arguments[3:])
        return SimpleNamespace(returncode=int("KMNIST" in arguments))

    monkeypatch.setattr(reproduce.subprocess, "run", call)
    return made


def test_the_matrix_is_run_and_a_failure_does_not_stop_it(calls, tmp_path, capsys):
    place = ["--result_path", str(tmp_path), "--", "--device", "cpu"]
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(
            ["--datasets", "KMNIST", "MNIST", "--models", "vq-vae", "readout-rate", "--budget", "paper", *place]
        )
    assert exit_.value.code == 1 and "failed: KMNIST/vq-vae, KMNIST/readout-rate" in capsys.readouterr().err
    assert len(calls) == 4
    expected = ["--dataset_name", "MNIST", "--result_path", str(tmp_path / "paper" / "readout-rate")]
    assert calls[3][:4] == expected and calls[3][-2:] == ["--device", "cpu"]
    text = " ".join(calls[3])
    assert "--readout rate" in text and "--epochs 100 --diffusion_epochs 200" in text and "--temperature auto" in text


@pytest.fixture
def begun(tmp_path):
    """A function that leaves what a run of the matrix leaves, when it has begun or is finished."""

    def begin(dataset, finished, *place):
        args, passed_on = reproduce.parse(list(place))
        (variant,) = args.models
        options = build_parser("").parse_args(reproduce.command(args, dataset, variant, passed_on)[3:])
        run = args.result_path / args.budget / variant / dataset / variant
        run.mkdir(parents=True)
        config = {key: as_written(value) for key, value in (DEFAULTS | vars(options)).items()}
        (run / "config.json").write_text(json.dumps(config))
        if finished:
            (run / "metrics.json").touch()
        return run

    return begin


def test_finished_runs_are_left_alone_and_others_resumed(calls, begun, tmp_path):
    place = ["--models", "snn-vae", "--budget", "short", "--result_path", str(tmp_path)]
    begun("MNIST", True, *place)
    run = begun("FMNIST", False, *place)
    reproduce.main(["--datasets", "MNIST", "FMNIST", *place])
    assert calls == [["--resume", str(run)]]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("other", "named"),
    [
        (["--seed", "4"], "--seed 3"),
        (["--seed", "3", "--preset", "improved"], "--preset faithful"),
        (["--seed", "3", "--metrics", "mse"], "--metrics all"),
    ],
    ids=["seed", "preset", "metrics"],
)
def test_a_run_with_other_options_is_not_called_finished(other, named, finished, calls, begun, tmp_path, capsys):
    """Nor is it resumed: what differs is named, and the other runs go on."""
    place = ["--models", "vq-vae", "--budget", "short", "--result_path", str(tmp_path), "--"]
    begun("MNIST", finished, *place, "--seed", "3")
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(["--datasets", "MNIST", "FMNIST", *place, *other])
    said = capsys.readouterr()
    assert exit_.value.code == 1 and named in said.out and "failed: MNIST/vq-vae" in said.err
    assert [call[1] for call in calls] == ["FMNIST"]


def test_options_of_budgets_and_variants_are_those_of_main(cli, tmp_path):
    """Asked of the program itself, which stops at the data set that does not exist."""
    for variant in reproduce.VARIANTS:
        for budget in reproduce.BUDGETS:
            args, passed_on = reproduce.parse(["--budget", budget, "--result_path", str(tmp_path / "result")])
            call = reproduce.command(args, "ImageFolder", variant, ["--data_path", str(tmp_path), *passed_on])
            outcome = cli(*call[3:])
            assert outcome.status == 2 and "holds 0 images" in outcome.err


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
