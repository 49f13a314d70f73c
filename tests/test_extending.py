"""docs/extending.md: its examples are added to a copy of the repository, a file and a line each, and used."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL

import parts

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
LINES = re.findall(r'^    ([A-Z_]+): ("\w+": "\w+:\w+")$', PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The program in a copy of the repository with all examples, as a function of its arguments."""
    copy = tmp_path_factory.mktemp("copy") / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "pretrained", "tests", "result", "docs", "data"))
    for name, content in FILES.items():
        (copy / name).write_text(content, encoding="utf-8")
    text = (copy / "parts.py").read_text(encoding="utf-8")
    for table, line in LINES:
        text = re.sub(rf"^{table} = {{\n?", lambda found, line=line: f"{found[0]}{line},", text, count=1, flags=re.M)
    (copy / "parts.py").write_text(text, encoding="utf-8")

    def call(*arguments):
        command = [sys.executable, str(copy / "main.py"), *map(str, arguments), "--no-report"]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_the_page_has_an_example_of_each_kind():
    assert [table for table, _ in LINES] == ["NEURONS", "DENOISERS", "DATASETS", "SAMPLE_METRICS", "REVEAL_ORDERS"]
    assert all(isinstance(getattr(parts, table), dict) for table, _ in LINES)
    assert [line.split('"')[3].split(":")[0] + ".py" for _, line in LINES] == list(FILES)


def test_the_examples_train_sample_and_are_evaluated(extended, tmp_path):
    """In one run: stripes, quadratic neurons, a local denoiser, drawn line by line; then a metric of one's own."""
    trained = extended(
        *("--dataset_name", "Stripes", "--neuron", "quadratic", "--tau", "3", "--denoiser", "local", *SMALL),
        *("--train_images", "200", "--epochs", "1", "--diffusion_epochs", "1", "--batch_size", "100"),
        *("--reveal_order", "raster", "--metrics", "energy", "--result_path", tmp_path),
    )
    assert "quadratic, tau 3, v_threshold 1 (SpikingJelly, not fused)" in trained
    assert "Stripes: 200 training" in trained and "stage 2   local" in trained
    run = tmp_path / "Stripes" / "snn-vq-vae"
    extended("--checkpoint", run, "--metrics", "sliced", "--num_samples", "500")
    records = {record["name"]: record for record in json.loads((run / "metrics.json").read_text())}
    distance = records["sliced_wasserstein"]
    assert distance["value"] > 0 and distance["num_generated"] == 500 and distance["num_real"] == 200
    assert distance["sampling"]["reveal_order"] == "raster" and records["energy_sample"]["value"] > 0
