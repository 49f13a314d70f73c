"""Fréchet autoencoder distance (FAD) of FSVAE (Kamata et al. 2022, arXiv 2110.00375), and its network."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from errors import UserError
from metrics.counts import check_enough
from metrics.extraction import Progress, extract
from metrics.frechet import feature_statistics, frechet_distance

FAD_IMAGES = 5000  # generated
SIDE = 32  # of the network's input
WIDTHS = (32, 64, 128, 256)
FEATURES = 64
PUBLISHED = {"MNIST": "mnist", "FMNIST": "fashion"}  # data set to prefix of the published files

Statistics = tuple[np.ndarray, np.ndarray]


class FadAutoencoder(nn.Module):
    """Images float [N,C,32,32] in [-1,1] to 64 latents and back; the weights are named as in the published files."""

    def __init__(self, channels: int):
        super().__init__()
        down, up = (channels, *WIDTHS), (*WIDTHS[::-1], WIDTHS[0])
        pixels = (SIDE // 2 ** len(WIDTHS)) ** 2
        self.encoder = nn.Sequential(*(_block(nn.Conv2d(a, b, 3, stride=2, padding=1), b) for a, b in pairwise(down)))
        self.latent_layer = nn.Linear(WIDTHS[-1] * pixels, FEATURES)
        self.decoder_input = nn.Linear(FEATURES, WIDTHS[-1] * pixels)
        *blocks, last = (_block(_double(a, b), b) for a, b in pairwise(up))
        self.decoder = nn.Sequential(*blocks)
        self.final_layer = nn.Sequential(*last, nn.ConvTranspose2d(WIDTHS[0], channels, 3, padding=1), nn.Tanh())

    def encode(self, images: Tensor) -> Tensor:
        """Latents [N,64]."""
        return self.latent_layer(self.encoder(images).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions, of the shape and range of `images`."""
        side = SIDE // 2 ** len(WIDTHS)
        hidden = self.decoder_input(self.encode(images)).view(-1, WIDTHS[-1], side, side)
        return self.final_layer(self.decoder(hidden))


def _block(convolution: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.LeakyReLU())


def _double(channels: int, out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, out, 3, stride=2, padding=1, output_padding=1)


def load_published(folder: Path, name: str) -> tuple[FadAutoencoder, Statistics] | None:
    """Network and statistics of the test split (mean [64], covariance [64,64]) as published with FSVAE.

    Encoder and latent layer are read from `folder/stat_checkpoints/PREFIX_64.pth`, the statistics from
    `folder/stats/PREFIX_test_64.npz`. None if there are no weights for the data set `name`. Raises UserError if
    `folder` is not the published one or a file cannot be read.
    """
    if not (folder / "stat_checkpoints").is_dir():
        raise UserError(f"{folder} has no subfolder stat_checkpoints: --fad_weights must name the folder that has it")
    weights = folder / "stat_checkpoints" / f"{PUBLISHED.get(name)}_64.pth"
    statistics = folder / "stats" / f"{PUBLISHED.get(name)}_test_64.npz"
    if not weights.exists():
        return None
    network = FadAutoencoder(channels=1)
    parts = {"encoder": network.encoder, "latent_layer": network.latent_layer}
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        for part, module in parts.items():
            module.load_state_dict({key: state[f"{part}.{key}"] for key in module.state_dict()})
        with np.load(statistics) as stored:
            reference = stored["mu"].astype(np.float64), stored["sigma"].astype(np.float64)
    except Exception as error:  # unpickling a wrong or damaged file can raise anything
        raise UserError(
            f"cannot use {weights} with {statistics} ({type(error).__name__}): restore the published files"
        ) from error
    return network.eval(), reference


def fad_features(
    images: Tensor, network: FadAutoencoder, batch_size: int = 500, progress: Progress | None = None
) -> np.ndarray:
    """Latents, float32 [N,64], of images uint8 [N,C,H,W]. Raises ValueError for other images."""
    return extract(
        to_fad_size(images), lambda batch: network.encode(to_fad_range(batch)), network, batch_size, progress
    )


def to_fad_size(images: Tensor) -> Tensor:
    """Images uint8 [N,C,H,W], resized bilinearly to uint8 [N,C,32,32].

    Pillow resizes them, as for the published statistics: other libraries round some pixels differently.
    """
    if images.shape[-2:] == (SIDE, SIDE):
        return images
    mode = "L" if images.shape[1] == 1 else "RGB"
    resized = torch.empty(len(images), SIDE, SIDE, images.shape[1], dtype=torch.uint8)
    for slot, pixels in zip(resized, images.permute(0, 2, 3, 1).contiguous().cpu().numpy(), strict=True):
        image = Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        slot.copy_(torch.from_numpy(np.array(image)).view_as(slot))
    return resized.permute(0, 3, 1, 2).contiguous()  # [N,32,32,C] -> [N,C,32,32]


def to_fad_range(images: Tensor) -> Tensor:
    """Images uint8 of any shape to float in [-1,1]."""
    return images / 127.5 - 1


def fad(generated: np.ndarray, reference: Statistics) -> float:
    """FAD of `fad_features` [N,64], given the mean [64] and covariance [64,64] of the test split's; 0 is best.

    The published protocol has `FAD_IMAGES`. Raises UserError unless there are more images than features.
    """
    check_enough("FAD", FEATURES + 1, generated=generated)
    return frechet_distance(*feature_statistics(generated), *reference)
