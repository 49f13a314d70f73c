"""The tables of exchangeable parts, and the command line that is read without importing any of them."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT

import parts
from parts import find_part

TABLES = ("DATASETS", "AUTOENCODERS", "DENOISERS", "NEURONS", "REVEAL_ORDERS", "SAMPLE_METRICS")
HEAVY = {"torch", "numpy", "scipy", "PIL", "sklearn", "joblib", "torchvision", "spikingjelly", "tqdm"}


@pytest.mark.parametrize("table", TABLES)
def test_every_part_is_where_its_table_says(table):
    names = getattr(parts, table)
    assert names and all(find_part(names, name) is not None for name in names)
    with pytest.raises(ValueError, match=f"no 'lost': choose one of {', '.join(names)}"):
        find_part(names, "lost")


def test_no_table_of_paths_is_left_out():
    paths = {
        name
        for name, table in vars(parts).items()
        if isinstance(table, dict) and not name.startswith("_") and any(":" in str(value) for value in table.values())
    }
    assert paths == {*TABLES, "CODE_MODELS"}


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "--spike_steps"),
        (["--bogus", "3"], 2, "unrecognized arguments: --bogus 3"),
        (["--dataset_name", "MNSIT"], 2, "'MNIST'|MNIST"),
        (["--epochs", "0"], 2, "from 1 to"),
        (["--checkpoint", "."], 2, None),  # a command that runs: here the modules are imported
    ],
)
def test_help_and_mistakes_import_nothing_that_takes_long(arguments, status, said, tmp_path):
    code = (
        "import json, sys; sys.path.insert(0, sys.argv.pop(1)); import main\n"
        "try: main.main()\n"
        "finally: json.dump(sorted(name for name in sys.modules if '.' not in name), open('modules', 'w'))"
    )
    command = [sys.executable, "-c", code, str(ROOT), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    loaded = HEAVY & set(json.loads((tmp_path / "modules").read_text()))
    if said is None:
        assert "torch" in loaded
    else:
        assert not loaded and any(word in done.stdout + done.stderr for word in said.split("|"))
        assert (done.stderr == "") if status == 0 else done.stderr.count("\n") == 1
