"""Which file of the program may import which: what docs/code.md says of it."""

import ast

import pytest
from helpers import ROOT

LAYERS = (
    *("runtime", "checkpoints", "run_folder", "options", "sampling", "networks", "resuming", "session"),
    *("samples", "lineage", "start", "training", "evaluation", "report", "from_python", "stages", "program"),
)
"""What `pipeline/` consists of; each imports only itself and those before it."""


def imported(path):
    """Dotted names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def parts_of(path):
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_no_import_goes_up(layer):
    place = ROOT / "pipeline" / layer
    for path in parts_of(place if place.is_dir() else place.with_suffix(".py")):
        others = {name.split(".")[1] for name in imported(path) if name.startswith("pipeline.")}
        assert others <= {*LAYERS[: LAYERS.index(layer) + 1]}, path


def test_no_layer_is_left_out():
    found = {path.stem for path in (ROOT / "pipeline").iterdir()}
    assert found - {"__init__", "__pycache__"} == {*LAYERS}


@pytest.mark.parametrize("room", ["models", "diffusion", "metrics"])
def test_the_method_knows_no_program(room):
    for path in parts_of(ROOT / room):
        others = {name.split(".")[0] for name in imported(path)} - {room}
        assert not others & {"pipeline", "models", "diffusion", "metrics"}, path
