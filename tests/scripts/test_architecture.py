"""The figure of the networks shows what they are."""

import shutil

import pytest
from helpers import ROOT

from scripts import architecture

FAITHFUL = ROOT / "pretrained" / "fmnist-faithful"


def test_shapes_are_those_of_the_networks():
    encoder, denoiser, decoder = architecture.columns(FAITHFUL)
    shapes = [[step.leaves for step in steps] for steps in (encoder, denoiser, decoder)]
    spikes = [[leaves[1:] for leaves in column if len(leaves) == 4] for column in shapes]
    assert spikes[0] == [(32, 14, 14), (64, 7, 7), (16, 7, 7)]
    assert spikes[1] == [(width, 7, 7) for width in (64, 128, 256, 512, 256)]
    assert spikes[2] == [(16, 7, 7), (64, 14, 14), (32, 28, 28)]
    assert shapes[0][0] == shapes[2][-1] == (1, 28, 28) and shapes[0][-1] == shapes[2][0] == (7, 7)
    assert shapes[1][0] == (2, 7, 7) and shapes[1][-2] == (128, 7, 7)
    assert encoder[1].words == "conv 3×3, stride 2\nbatch norm, LIF" and encoder[1].shape == "16 × 32 × 14 × 14"


def test_it_is_drawn_and_other_networks_are_refused(tmp_path, capsys):
    run = shutil.copytree(FAITHFUL, tmp_path / "run")
    architecture.main(["--run", str(run), "--output", str(tmp_path / "figure.svg")])
    assert "<svg" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
    improved = ROOT / "pretrained" / "fmnist"
    with pytest.raises(SystemExit) as exit_:
        architecture.main(["--run", str(improved), "--output", str(tmp_path / "other.png")])
    assert exit_.value.code == 2 and not (tmp_path / "other.png").exists()
    assert capsys.readouterr().err == f"error: {improved} does not have the paper's networks\n"
