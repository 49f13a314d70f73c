"""The two Inception networks (Szegedy et al. 2016) whose features are compared, and their weights.

FID, KID, Inception score, precision and recall: the network of pytorch-fid (ported from TensorFlow, 1,008 classes).
The paper's FID: torchvision's network with ImageNet weights, fed as the authors' release feeds it.
"""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytorch_fid.inception
import torch
import torch.nn.functional as F
from pytorch_fid.inception import FID_WEIGHTS_URL
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url
from torchvision.models import Inception_V3_Weights, inception_v3

from errors import UserError
from metrics.extraction import extract

PAPER_WEIGHTS_URL = Inception_V3_Weights.IMAGENET1K_V1.url


def load_inception(weights: Path | None, device: torch.device | str) -> nn.Module:
    """pytorch-fid's network, ready to use: from the local file `weights`, or downloaded once into torch.hub's cache.

    Raises UserError, which says where the file is to be had, for whatever stands in the way of the weights.
    """
    return _load(_build, weights, FID_WEIGHTS_URL, "--fid_weights").to(device)


def load_paper_inception(weights: Path | None, device: torch.device | str) -> nn.Module:
    """torchvision's network without its last layer, from torchvision's weights file; otherwise as `load_inception`."""
    return _load(_build_paper, weights, PAPER_WEIGHTS_URL, "--paper_fid_weights").to(device)


def _load(build: Callable[[dict[str, Tensor]], nn.Module], weights: Path | None, url: str, option: str) -> nn.Module:
    try:
        if weights is None:
            state = load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        return build(state).eval().requires_grad_(False)
    except Exception as error:  # a file that is not the right one can fail in any way while it is unpickled
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise UserError(
            f"cannot load the Inception weights from {weights or 'the network'} ({reason}); "
            f"download {url} and name the file with {option} PATH"
        ) from error


def _build(state: dict[str, Tensor]) -> nn.Module:
    # pytorch-fid takes no weights: its constructor always calls this downloader, found by name in its own
    # module. Answering that one call leaves the architecture, patched blocks and all, to pytorch-fid.
    with patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state):
        inception = pytorch_fid.inception.InceptionV3()
    inception.register_buffer("class_weight", state["fc.weight"])  # [1008,2048], which pytorch-fid drops
    return inception


def _build_paper(state: dict[str, Tensor]) -> nn.Module:
    inception = inception_v3(weights=None, transform_input=True, init_weights=False)
    inception.load_state_dict(state)
    inception.fc = nn.Identity()  # what is left ends with the average of Mixed_7c over all positions
    return inception


def inception_features(images: Tensor, inception: nn.Module, batch_size: int = 64) -> np.ndarray:
    """Features, float32 [N,2048], of images uint8 [N,C,H,W] with C = 1 (repeated to 3) or 3.

    Runs on the device of `inception` (of `load_inception`), which resizes to 299x299 and scales to [-1,1] itself.
    Raises ValueError for other images.
    """

    def features(batch: Tensor) -> Tensor:
        return inception(_to_rgb(batch))[0].flatten(1)  # [n,2048,1,1] -> [n,2048]

    return extract(images, features, inception, batch_size, "Inception features")


def inception_logits(features: np.ndarray, inception: nn.Module) -> np.ndarray:
    """Logits, float32 [N,1008], for the Inception score, from features [N,2048] of the same network.

    Without the bias of the last layer, which is the convention of torch-fidelity ("logits_unbiased").
    """
    return features @ inception.class_weight.cpu().numpy().T


def paper_inception_features(images: Tensor, inception: nn.Module, batch_size: int = 64) -> np.ndarray:
    """The release's features, float32 [N,2048], of images uint8 [N,C,H,W], by the network of `load_paper_inception`.

    Images in [0,1] are enlarged bilinearly to 299x299 and scaled to [-1,1]; the network, which expects [0,1], then
    normalises them a second time. Raises ValueError for other images.
    """

    def features(batch: Tensor) -> Tensor:
        enlarged = F.interpolate(_to_rgb(batch), size=(299, 299), mode="bilinear", align_corners=False)
        return inception(enlarged * 2 - 1)

    return extract(images, features, inception, batch_size, "Inception features (paper)")


def _to_rgb(batch: Tensor) -> Tensor:
    return batch.expand(-1, 3, -1, -1).float() / 255  # [n,C,H,W] -> [n,3,H,W] in [0,1]
