"""Features of the two Inception networks (Inception v3, Szegedy et al. 2016).

FID, KID, Inception score, precision and recall use pytorch-fid's network, ported from TensorFlow, with 1,008 classes.
clean-fid has the same network, but resizes images otherwise. The paper's FID uses torchvision's network with ImageNet
weights and the preprocessing of the authors' release.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_fid.inception import (
    FID_WEIGHTS_URL,
    FIDInceptionA,
    FIDInceptionC,
    FIDInceptionE_1,
    FIDInceptionE_2,
)
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import Inception_V3_Weights, inception_v3
from torchvision.models.inception import BasicConv2d

from errors import UserError
from metrics.extraction import Progress, extract
from metrics.fad import SIDE as FSVAE_SIDE
from metrics.fad import to_fad_size
from pixels import to_float

PAPER_WEIGHTS_URL = Inception_V3_Weights.IMAGENET1K_V1.url
SIDE = 299  # of Inception's input
BATCH_SIZE = 16  # for each thread: the fastest on one core and on two


def load_inception(weights: Path | None, device: torch.device | str) -> nn.Module:
    """pytorch-fid's network without its last layer, in evaluation mode on `device`.

    Its weights are read from the file `weights`, or, if that is None, downloaded once to torch.hub's cache. Raises
    UserError, which says where to download them, if they cannot be loaded.
    """
    return _load(_build, weights, FID_WEIGHTS_URL, "--fid_weights").to(device)


def load_paper_inception(weights: Path | None, device: torch.device | str) -> nn.Module:
    """torchvision's network without its last layer; otherwise as `load_inception`.

    It expects images in [0,1] and normalises them itself. As in the release, `inception_features` gives it images that
    are already normalised to [-1,1].
    """
    return _load(_build_paper, weights, PAPER_WEIGHTS_URL, "--paper_fid_weights").to(device)


def _load(build: Callable[[], nn.Module], weights: Path | None, url: str, option: str) -> nn.Module:
    """A network whose output is the average of Mixed_7c over all positions, [N,2048].

    Batch norm is folded into the convolutions, which changes features by rounding alone. The weight of the last layer,
    which is removed, is kept as `class_weight`.
    """
    try:
        if weights is None:
            state = load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        inception = build()
        inception.load_state_dict(state)
    except Exception as error:  # unpickling a wrong file can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise UserError(
            f"cannot load the Inception weights from {weights or 'the network'} ({reason}); "
            f"download {url} and name the file with {option} PATH"
        ) from error
    # not part of the state: the digest of that is of what features depend on
    weight = inception.get_parameter("fc.weight").detach()
    inception.register_buffer("class_weight", weight, persistent=False)  # [classes,2048]
    inception.fc = nn.Identity()
    return _folded(inception.eval().requires_grad_(False)).to(memory_format=torch.channels_last)


def _folded(network: nn.Module) -> nn.Module:
    """The network with each batch norm folded into the convolution before it, in float64, in place."""
    for block in network.modules():
        if isinstance(block, BasicConv2d):
            block.conv = fuse_conv_bn_eval(block.conv.double(), block.bn.double()).float()
            block.bn = nn.Identity()
    return network


def _build() -> nn.Module:
    # as pytorch_fid.inception.fid_inception_v3, which would also download the weights
    inception = inception_v3(weights=None, init_weights=False, num_classes=1008, aux_logits=False)
    inception.Mixed_5b = FIDInceptionA(192, pool_features=32)
    inception.Mixed_5c = FIDInceptionA(256, pool_features=64)
    inception.Mixed_5d = FIDInceptionA(288, pool_features=64)
    inception.Mixed_6b = FIDInceptionC(768, channels_7x7=128)
    inception.Mixed_6c = FIDInceptionC(768, channels_7x7=160)
    inception.Mixed_6d = FIDInceptionC(768, channels_7x7=160)
    inception.Mixed_6e = FIDInceptionC(768, channels_7x7=192)
    inception.Mixed_7b = FIDInceptionE_1(1280)
    inception.Mixed_7c = FIDInceptionE_2(2048)
    return inception


def _build_paper() -> nn.Module:
    return inception_v3(weights=None, init_weights=False, transform_input=True)


def inception_features(
    images: Tensor, inception: nn.Module, batch_size: int | None = None, progress: Progress | None = None
) -> np.ndarray:
    """Features, float32 [N,2048], of images uint8 [N,C,H,W] with C = 1 (repeated to 3) or 3, by either network.

    As pytorch-fid: images are resized bilinearly to 299x299 and scaled to [-1,1]. Runs on the device of `inception`.
    Raises ValueError for other images.
    """

    def features(batch: Tensor) -> Tensor:
        resized = F.interpolate(to_float(batch, torch.float32), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return inception(_rgb(2 * resized - 1))

    return extract(images, features, inception, batch_size or BATCH_SIZE * torch.get_num_threads(), progress)


def clean_features(
    images: Tensor, inception: nn.Module, batch_size: int | None = None, progress: Progress | None = None
) -> np.ndarray:
    """As `inception_features`, but resized as in clean-fid's mode "clean" (Parmar et al. 2022), by `load_inception`.

    Smaller images are first resized to 32x32, with 8 bits, as by FSVAE and FSDDIM. Pillow then resizes each channel, in
    float32, by its bicubic filter to 299x299. Values are clipped to [0,255] and scaled to [-1,1) as (x - 128) / 128.
    """

    def features(batch: Tensor) -> Tensor:
        return inception(_rgb((clean_resize(batch).to(batch.device) - 128) / 128))

    return extract(images, features, inception, batch_size or BATCH_SIZE * torch.get_num_threads(), progress)


def clean_resize(images: Tensor) -> Tensor:
    """Images uint8 [N,C,H,W] as clean-fid's network sees them: float32 [N,C,299,299] in [0,255]."""
    if max(images.shape[-2:]) < FSVAE_SIDE:
        images = to_fad_size(images)
    channels = images.float().flatten(0, 1).cpu().numpy()
    bicubic = Image.Resampling.BICUBIC
    resized = [np.asarray(Image.fromarray(channel).resize((SIDE, SIDE), bicubic)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).clip(0, 255).unflatten(0, images.shape[:2])


def _rgb(images: Tensor) -> Tensor:
    """Images [n,C,H,W] with three channels, in the memory format in which convolutions are fastest."""
    return images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def inception_logits(features: np.ndarray, inception: nn.Module) -> np.ndarray:
    """Logits, float32 [N,1008], for the Inception score, from features [N,2048] of the same network.

    The bias of the last layer is left out, as in torch-fidelity ("logits_unbiased").
    """
    return features @ inception.get_buffer("class_weight").cpu().numpy().T
