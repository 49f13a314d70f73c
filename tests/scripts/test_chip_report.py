"""What networks take on chips: by hand for a layer, by a maker's example, and as a report."""

import shutil

import pytest
import torch
from helpers import ROOT
from torch import nn

from metrics.energy import Operations
from models.integer_layers import IntegerConv2d
from pipeline.run_folder import RunFolder
from scripts import chip_report
from scripts.chips import CHIPS, KIBI, Layer

SPECK, LOIHI, SPINNAKER = CHIPS


def layer_of(module, inputs, counted=None):
    """A layer with an input of this shape `(C,H,W)`."""
    with torch.no_grad():
        outputs = module(torch.zeros(1, *inputs)).shape[1:]
    return Layer("layer", module, inputs, tuple(outputs), counted or Operations(acs=1))


@pytest.mark.parametrize(
    ("module", "side", "rows", "fan_in", "fan_out"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), 8, 8 * 3 - 2, 4 * 9, 6 * 9),
        (nn.Conv2d(4, 6, 3, padding=1), 2, 4, 4 * 4, 6 * 4),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), 8, 4 * 3 - 1, 4 * 9, 6 * 4),
        (nn.Conv2d(4, 6, 4, stride=2, padding=1, bias=False), 8, 4 * 4 - 2, 4 * 16, 6 * 4),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), 8, 8 * 3 - 1, 4 * 4, 6 * 9),
        (nn.ConvTranspose2d(4, 6, 8, bias=False), 1, 8, 4, 6 * 64),
    ],
    ids=["3x3", "of_2x2", "stride_2", "4x4_stride_2", "transposed", "one_hot"],
)
def test_connections_by_hand(module, side, rows, fan_in, fan_out):
    """Rows of the kernel meet rows of the grid so many times; 4 channels become 6."""
    layer, before = layer_of(module, (4, side, side)), module.weight.clone()
    assert layer.connections() == (4 * 6 * rows**2, fan_in, fan_out)
    assert torch.equal(module.weight, before) and layer.weights == module.weight.numel()


def test_groups_and_whole_numbers_have_their_connections():
    groups = nn.Conv2d(4, 6, 1, groups=2)
    assert layer_of(groups, (4, 5, 5)).connections() == (25 * 12, 2, 3)
    assert layer_of(IntegerConv2d(groups, 0.25), (4, 5, 5)).connections() == (25 * 12, 2, 3)


def test_speck_needs_by_its_makers_example():
    """From its documentation: 16 to 32 channels, 3x3, 64x64 take 8 Ki of weights and 128 Ki of neurons, too many."""
    example = layer_of(nn.Conv2d(16, 32, 3, padding=1), (16, 64, 64))
    assert SPECK.needs(example).broken == ("128 Ki neurons of 64 Ki",)
    half = SPECK.needs(layer_of(nn.Conv2d(16, 16, 3, padding=1), (16, 64, 64)))
    assert not half.broken and str(half) == "1 core: 4 Ki weights and 64 Ki neurons, one of 3 cores"


@pytest.mark.parametrize(
    ("module", "inputs", "broken"),
    [
        (nn.ConvTranspose2d(2, 2, 4), (2, 4, 4), "ConvTranspose2d 4x4, not a convolution"),
        (nn.Conv2d(4, 4, 1, groups=4), (4, 8, 8), "4 groups, not 1"),
        (nn.Conv2d(4, 4, (1, 3)), (4, 8, 8), "kernel 1x3, not square and up to 16"),
        (nn.Conv2d(4, 4, 3, stride=3), (4, 9, 9), "stride 3, not 1, 2, 4 or 8"),
        (nn.Conv2d(2000, 1, 1), (2000, 2, 2), "2000 channels of 1024"),
        (nn.Conv2d(1, 1, 3), (1, 80, 80), "map of side 78, not up to 64"),
        (nn.Conv2d(128, 64, 3, padding=1), (128, 8, 8), "128 Ki weights of 64 Ki"),
        (nn.Conv2d(64, 64, 3, padding=1), (64, 32, 32), "64 Ki weights and 64 Ki neurons, which no core has together"),
    ],
)
def test_each_limit_of_speck_is_named(module, inputs, broken):
    assert broken in SPECK.needs(layer_of(module, inputs)).broken


def test_real_values_are_no_input_of_speck():
    layer = layer_of(nn.Conv2d(1, 2, 3), (1, 8, 8), Operations(macs=5))
    assert SPECK.needs(layer).broken == ("input is not spikes",)


def test_layers_that_fit_the_same_cores_do_not_all_have_room():
    """Two cores have 64 Ki weights; a small layer fits any."""
    large, small = layer_of(nn.Conv2d(64, 64, 3), (64, 8, 8)), layer_of(nn.Conv2d(2, 2, 1), (2, 8, 8))
    assert SPECK.placed([large] * 3 + [small]) == 3
    assert SPECK.placed([small] * 10) == 9
    assert SPECK.placed([layer_of(nn.Conv2d(4, 4, 1, groups=4), (4, 8, 8))]) == 0


def test_layers_are_split_over_equal_cores():
    neurons, weights = layer_of(nn.Conv2d(1, 5, 1), (1, 64, 64)), layer_of(nn.Conv2d(512, 512, 3), (512, 3, 3))
    assert str(LOIHI.needs(neurons)) == "3 cores: 20,480 of 8,192 neurons"
    assert str(LOIHI.needs(weights)) == "12 cores: 2,304 of 192 KiB"
    assert SPINNAKER.needs(neurons).cores == 2, "160 KiB of neurons"
    assert str(SPINNAKER.needs(weights)) == "19 cores: 2,308 of 128 KiB"
    assert weights.weights == 2304 * KIBI
    assert LOIHI.placed([weights] * 11) == 10 and SPINNAKER.placed([weights] * 9) == 8


def test_the_report_of_a_run(finished, capsys):
    chip_report.main([str(finished.path)])
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| `")]
    names = [row[0].strip("| `") for row in rows]
    assert names.count("encoder.snn_convs.0") == names.count("conv6.0") == names.count("decoder.snn_convs.6") == 2
    (first, on_chips) = (row for row in rows if "encoder.snn_convs.0" in row[0])
    assert first[1:8] == ["Conv2d 3x3", "1×16×16 → 8×8×8", "512", f"{8 * 23**2:,}", "9", "32", "0.1"]
    assert first[8] == "0" and first[9] == f"{4 * 8 * 23**2:,} of real values |"
    assert on_chips[1] == "input is not spikes" and on_chips[2].startswith("1 core: ")
    assert "Speck 2f, 9 cores; it has no LIF neurons, but IF." in out and "Loihi 2, 128 cores." in out
    assert "the search for the nearest of 8 embeddings" in out
    assert "16 passes of the denoiser on 4×4 codes and a decoding" in out


def test_runs_without_a_denoiser_are_refused(tmp_path, capsys):
    run = shutil.copytree(ROOT / "pretrained" / "fmnist-faithful", tmp_path / "run")
    RunFolder(run).denoiser.unlink()
    with pytest.raises(SystemExit) as exit_:
        chip_report.main([str(run)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
