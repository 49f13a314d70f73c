"""Numbers for codes that a denoiser reads as plain numbers, as SDID does: similar codes get similar numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor


def code_order(codes: Tensor, codebook_size: int) -> Tensor:
    """Which code each of the numbers 0..K-1 should stand for: int64 `[K]`, given the `codes [N,h,w]` of many images.

    Codes are similar if they have similar neighbours. The codes in use are put in a line, along a short path from one
    to the next that begins with the most frequent, and spread evenly over the numbers; unused codes fill the gaps. The
    mask token, K, is thus farthest from the most frequent code.
    """
    codes = codes.long()
    used, counts = codes.unique(return_counts=True)
    contexts = _contexts(codes, used, codebook_size)
    distances = torch.cdist(contexts, contexts)
    line = used[_two_opt(_nearest_neighbours(distances, int(counts.argmax())), distances)]
    order = torch.full((codebook_size,), -1)
    order[torch.arange(len(used)) * codebook_size // len(used)] = line
    numbers = torch.arange(codebook_size)
    order[order < 0] = numbers[~torch.isin(numbers, used)]
    return order


def _contexts(codes: Tensor, used: Tensor, codebook_size: int) -> Tensor:
    """Square roots of how often each code is a neighbour of the L `used` ones, by direction: float64 `[L,8(K+1)]`.

    Beyond the edge is one more code. Euclidean distances of these are Hellinger distances of the frequencies, but for a
    factor.
    """
    beyond = codebook_size
    windows = F.pad(codes, (1, 1, 1, 1), value=beyond).unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)  # [N,h,w,9]
    rows, size = torch.searchsorted(used, codes) * (beyond + 1), len(used) * (beyond + 1)
    joint = [(rows + windows[..., i]).flatten().bincount(minlength=size) for i in range(9) if i != 4]
    counts = torch.stack([each.view(len(used), -1) for each in joint], 1).double()
    return (counts / counts.sum(2, keepdim=True)).sqrt().flatten(1)


def _nearest_neighbours(distances: Tensor, first: int) -> Tensor:
    """A path from the point `first` to the nearest of the L points, and always on to the nearest left: int64 `[L]`."""
    path, left = [first], distances.clone()
    for _ in range(len(distances) - 1):
        left[:, path[-1]] = torch.inf
        path.append(int(left[path[-1]].argmin()))
    return torch.tensor(path)


def _two_opt(path: Tensor, distances: Tensor) -> Tensor:
    """The path `[L]`, parts of which are reversed as long as that makes it shorter (2-opt); its first point stays."""
    end = F.pad(distances, (0, 1, 0, 1))  # a last point that is at no distance from the others
    path = F.pad(path, (0, 1), value=len(distances))
    while True:
        d, edges = end[path][:, path], end[path[:-1], path[1:]]
        gain = (edges[:, None] + edges - d[:-1, :-1] - d[1:, 1:]).triu(1)  # of replacing edges i, i+1 and j, j+1
        i, j = divmod(int(gain.argmax()), len(edges))
        if gain[i, j] < 1e-9:
            return path[:-1]
        path[i + 1 : j + 1] = path[i + 1 : j + 1].flip(0)
