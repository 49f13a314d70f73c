"""The loss curves of the release's first iterations on Fashion-MNIST are matched or beaten.

Needs the real files: set SPIKING_DIFFUSION_DATA to a --data_path that holds FashionMNIST/raw. About ten
minutes on two cores.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from datasets import load_dataset
from diffusion.absorbing import AbsorbingDiffusion
from models import SDID, VQSVAE

CURVES = json.loads(Path(__file__).with_name("curves_FMNIST.json").read_text())
DATA = os.environ.get("SPIKING_DIFFUSION_DATA")

pytestmark = pytest.mark.skipif(
    DATA is None or not (Path(DATA) / "FashionMNIST" / "raw").is_dir(),
    reason="no Fashion-MNIST: set SPIKING_DIFFUSION_DATA to a --data_path that holds it",
)

TOLERANCE = 1.1
"""Runs of different rounding part after some 80 iterations, when the codebook is rearranged, and meet again."""

DENOISER_TOLERANCE = 1.2
"""The denoiser's loss grows with the codes that the autoencoder came to use; divided by their bits hardly."""


def block_means(values, size):
    return [sum(values[i : i + size]) / size for i in range(0, len(values), size)]


def train(model, iterations, loss_and_value):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-3)
    values = []
    for i in range(iterations):
        loss, value = loss_and_value(slice(32 * i, 32 * i + 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(value.item())
    return values


@pytest.mark.parametrize("reference", CURVES["seeds"], ids=lambda r: f"seed{r['seed']}")
def test_curves(reference):
    data = load_dataset("FMNIST", DATA)
    images = data.train[: 32 * 300].float() / 255
    torch.manual_seed(reference["seed"])
    model = VQSVAE()

    def step(part):
        out = model(images[part], reference["variance"])
        return out.loss, out.mse

    mse = block_means(train(model, 300, step), 50)
    expected = reference["train_mse_mean_per_50"]
    assert mse[0] == pytest.approx(expected[0], rel=0.03), "the same start"
    assert mse[-1] <= TOLERANCE * expected[-1]
    model.eval()
    with torch.no_grad():
        test = model(data.test[:1000].float() / 255)
        assert test.mse <= TOLERANCE * reference["test_mse_first_1000"]
        codes = torch.cat([model.encode(part) for part in images[:4800].split(200)])
    if "sdid_loss_mean_per_25" not in reference:
        return
    denoiser, diffusion = SDID(), AbsorbingDiffusion(128, 49)
    generator = torch.Generator().manual_seed(0)

    def denoiser_step(part: slice) -> list:
        noise = diffusion.training_noise(len(codes[part]), (7, 7), generator)
        return [diffusion.loss(denoiser, codes[part], noise)] * 2

    losses = train(denoiser, 150, denoiser_step)
    per_bit = block_means(losses, 25)[-1] / math.log2(len(test.codes.unique()))
    expected_per_bit = reference["sdid_loss_mean_per_25"][-1] / math.log2(reference["codes_used_test"])
    assert per_bit <= DENOISER_TOLERANCE * expected_per_bit
