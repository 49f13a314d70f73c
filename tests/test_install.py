"""What the README, the Makefile and the requirements promise about Python and packages."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

from pipeline.run_folder import PACKAGES

ANY_PYTHON = "3.11, 3.12 or 3.13"


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return {each.name: each.specifier for each in (Requirement(line) for line in lines if not line.startswith("#"))}


@pytest.fixture
def make(tmp_path):
    """`make install` with a program in the place of Python that says this version, and fails at all else."""
    if shutil.which("make") is None:
        pytest.skip("needs make")

    def run(version):
        python, venv = tmp_path / "python", tmp_path / "venv"
        if version:
            python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo Python {version} || touch {tmp_path}/went_on\n')
            python.chmod(0o755)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "install", f"PYTHON={python}", f"VENV={venv}"]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("version", ["2.7.18", "3.1.1", "3.10.13", "3.14.0", "3.110.0", None])
def test_make_refuses_other_pythons_in_one_line(version, make, tmp_path):
    done = make(version)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout
    assert f"Python {ANY_PYTHON} is needed" in line and (version or "not found") in line
    assert "make install PYTHON=python3.12" in line
    assert not (tmp_path / "venv").exists() and not (tmp_path / "went_on").exists()


@pytest.mark.parametrize("version", ["3.11.0", "3.12.13", "3.13.1"])
def test_make_takes_the_pythons_of_the_readme(version, make, tmp_path):
    make(version)
    assert (tmp_path / "went_on").exists()


def test_all_files_name_the_same_pythons():
    readme, makefile = ((ROOT / name).read_text() for name in ("README.md", "Makefile"))
    assert f"Python {ANY_PYTHON}" in readme and f"Python {ANY_PYTHON}" in makefile
    assert tomllib.loads((ROOT / "ruff.toml").read_text())["target-version"] == "py311"
    assert not re.search(r"Python 3\.(\d|10)\b", readme + makefile)


def test_tested_versions_are_allowed():
    ranges = requirements("requirements.txt") | requirements("requirements-dev.txt")
    tested = requirements("requirements-tested.txt")
    assert tested.keys() == ranges.keys()
    for name, pinned in tested.items():
        (exact,) = pinned
        assert exact.version in ranges[name] and any(bound.operator == ">=" for bound in ranges[name]), name


def imported_by(folders):
    """Names of the distributions whose packages the Python files in these folders import."""
    distributions = packages_distributions()
    files = [ast.parse(path.read_text()) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(file)]
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    packages = {name.split(".")[0] for name in imported} & distributions.keys() - sys.stdlib_module_names
    return {distributions[name][0].lower() for name in packages}


def test_what_the_program_imports_is_required():
    needed = imported_by(("models", "diffusion", "metrics", "pipeline"))
    assert needed > {"torch", "spikingjelly", "jinja2"} and needed <= requirements("requirements.txt").keys()


def test_versions_of_what_metrics_import_are_recorded():
    needed = imported_by(("metrics",))
    assert needed >= {"torch", "torchmetrics", "pytorch-fid", "numpy"}
    assert needed - {"tqdm"} <= set(PACKAGES)  # which draws the progress bar only
