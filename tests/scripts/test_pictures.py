"""The contact sheet shows what its rows say."""

import shutil

import pytest
import torch
from helpers import ROOT
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from pipeline.sampling.grids import ungrid
from scripts import pictures
from spiking_diffusion import SpikingDiffusion, load_dataset


def test_rows_of_two_runs(finished, grey, tmp_path, capsys):
    first, last = (shutil.copytree(finished.path, tmp_path / name) for name in ("first", "last"))
    output = tmp_path / "sheet.png"
    pictures.main([str(first), str(last), "--output", str(output)])
    assert capsys.readouterr().out == f"{output}\n"
    sheet = pil_to_tensor(Image.open(output))
    real = load_dataset("ImageFolder", grey[3], image_size=16).test  # 4 of them
    model = SpikingDiffusion.load(finished.path, precision="float32")  # as in the run
    few, samples = (torch.from_numpy(model.sample(count * len(real))) for count in (1, 3))
    reconstructed = torch.from_numpy(model.decode(model.encode(real)))
    rows = [real, reconstructed, few, reconstructed, *samples.split(4)]
    width = len(real) * 3 * 17 + 3
    tiles = ungrid(sheet[:, :, -width:], 16, 16)
    assert tiles.shape == (7, 4, 3, 16, 16), "real; two rows of the first run; four of the last"
    assert torch.equal(tiles[:, :, :1], torch.stack(rows))


def test_mistakes(finished, tmp_path, capsys):
    for runs, output, words in (
        ([finished.path, ROOT / "pretrained" / "fmnist"], "sheet.png", "several data sets, FMNIST, ImageFolder"),
        ([tmp_path / "missing"], "sheet.png", "missing"),
        ([finished.path], "sheet.jpg", "let its name end in .png"),
    ):
        with pytest.raises(SystemExit) as exit_:
            pictures.main([*map(str, runs), "--output", str(tmp_path / output)])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and words in error and error.count("\n") == 1
    assert not list(tmp_path.glob("sheet.*"))
