"""The feature extractor of FID: pytorch-fid's InceptionV3 up to its last pooling (2,048 features)."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytorch_fid.inception
import torch
from pytorch_fid.inception import FID_WEIGHTS_URL
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url
from tqdm import tqdm

from errors import UserError


def load_inception(weights: Path | None, device: torch.device | str) -> nn.Module:
    """The network, ready to use: from the local file `weights`, or downloaded once into torch.hub's cache.

    Raises UserError, which says where the file is to be had, for whatever stands in the way of the weights.
    """
    try:
        inception = _build(_read(weights))
    except Exception as error:  # a file that is not the right one can fail in any way while it is unpickled
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise UserError(
            f"cannot load the Inception weights from {weights or 'the network'} ({reason}); "
            f"download {FID_WEIGHTS_URL} and name the file with --fid_weights PATH"
        ) from error
    return inception.eval().to(device)


def _read(weights: Path | None) -> dict[str, Tensor]:
    if weights is None:
        return load_state_dict_from_url(FID_WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
    return torch.load(weights, map_location="cpu", weights_only=True)


def _build(state_dict: dict[str, Tensor]) -> nn.Module:
    # pytorch-fid takes no weights: its constructor always calls this downloader, found by name in its own
    # module. Answering that one call leaves the architecture, patched blocks and all, to pytorch-fid.
    with patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state_dict):
        return pytorch_fid.inception.InceptionV3()


@torch.inference_mode()
def inception_features(images: Tensor, inception: nn.Module, batch_size: int = 64) -> np.ndarray:
    """Features, float32 [N,2048], of pictures, uint8 [N,C,H,W] with C = 1 (repeated to 3) or 3.

    Runs on the device of `inception`, which resizes to 299x299 and scales to [-1,1] itself. Raises ValueError
    for other pictures.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"uint8 [N,1 or 3,H,W] expected, not {images.dtype} {list(images.shape)}")
    device = next(inception.parameters()).device
    features = []
    for batch in tqdm(images.split(batch_size), desc="Inception features", unit="batch", disable=None):
        batch = batch.to(device).expand(-1, 3, -1, -1).float() / 255  # [n,C,H,W] -> [n,3,H,W]
        features.append(inception(batch)[0].flatten(1).cpu())  # [n,2048,1,1] -> [n,2048]
    return torch.cat(features).numpy()
