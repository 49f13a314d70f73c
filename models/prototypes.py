"""What a picture is like as a whole, told to a denoiser before it draws codes: the nearest of some average grids."""

import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from models.quantizer import Codebook, nearest_rows
from models.spiking import full_precision

NO_PROTOTYPE = -1
"""In place of a prototype's number: the denoiser is told nothing."""

ROUNDS = 10  # of k-means
AT_ONCE = 4096  # grids whose embeddings are held in memory


class Prototypes(nn.Module):
    """A condition of the denoiser: of G average grids of codes, the one nearest to the image.

    For a sample one is drawn, as often as it is the nearest to a training image: how a picture hangs together, which is
    hard to draw code by code, is known from the start (compare arXiv 2312.03701). Its codes enter as spikes, through a
    convolution whose weights begin at zero.

    Buffers, which `fit` finds: `grids` int32 `[G,h,w]`; `counts` int64 `[G]`, of the training images nearest to each.

    Args:
        count: number of prototypes G.
        codebook_size: number of codes K.
        width: channels of the currents that come out.
        patch: side of the square of codes that becomes one position.
        grid: height and width of the grid of codes.
    """

    def __init__(self, count: int, codebook_size: int, width: int, patch: int, grid: tuple[int, int]):
        super().__init__()
        self.codebook_size = codebook_size
        self.register_buffer("grids", torch.zeros(count, *grid, dtype=torch.int32))
        self.register_buffer("counts", torch.zeros(count, dtype=torch.int64))
        self.embed = nn.Conv2d(codebook_size, width, patch, stride=patch, bias=False)
        nn.init.zeros_(self.embed.weight)

    def forward(self, chosen: Tensor) -> Tensor:
        """Numbers `[N]` in 0..G-1 or NO_PROTOTYPE to currents `[N,width,h/patch,w/patch]`, for that 0."""
        codes = self.grids[chosen.clamp_min(0)].long()
        spikes = F.one_hot(codes, self.codebook_size) * (chosen != NO_PROTOTYPE).view(-1, 1, 1, 1)
        return self.embed(spikes.permute(0, 3, 1, 2).to(self.embed.weight))  # [N,h,w,K] -> [N,K,h,w]

    def fit(self, codes: Tensor, codebook: Codebook, seed: int) -> None:
        """Find the prototypes of `codes [N,h,w]`, N >= G: mean embeddings of groups, as the codes nearest to them.

        The groups are those of k-means on embeddings that are averaged over squares of 2x2 codes.
        """
        count = len(self.grids)
        coarse = torch.cat([F.avg_pool2d(part, 2, ceil_mode=True).flatten(1) for part in _embedded(codes, codebook)])
        kmeans = KMeans(count, init="random", n_init=1, max_iter=ROUNDS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of images that are all alike: it does no harm
            groups = kmeans.fit_predict(coarse.cpu().numpy())
        device = codebook.embeddings.weight.device
        groups = torch.from_numpy(groups).to(device).long()
        sums = torch.zeros(count, codebook.embeddings.embedding_dim, *codes.shape[1:], device=device)
        for members, part in zip(groups.split(AT_ONCE), _embedded(codes, codebook), strict=True):
            sums.index_add_(0, members, part)
        self.grids.copy_(codebook.nearest_codes(sums / groups.bincount(minlength=count).clamp_min(1).view(-1, 1, 1, 1)))
        self.counts.copy_(self.nearest(codes, codebook).bincount(minlength=count))

    def nearest(self, codes: Tensor, codebook: Codebook) -> Tensor:
        """Numbers int64 `[N]` of the prototypes whose embeddings are nearest to those of `codes [N,h,w]`."""
        with torch.no_grad(), full_precision(codebook.embeddings.weight):
            centres = torch.cat([part.flatten(1) for part in _embedded(self.grids, codebook)])
            return torch.cat([nearest_rows(part.flatten(1), centres) for part in _embedded(codes, codebook)])

    def draw(self, seed: int, samples: Iterable[int]) -> Tensor:
        """Numbers int64 `[N]` for the samples with these numbers, by how often the prototypes occur."""
        ends = self.counts.cumsum(0).cpu().numpy()
        images = [np.random.default_rng((seed, sample, 1)).integers(ends[-1]) for sample in samples]
        return torch.from_numpy(ends.searchsorted(images, "right"))


@torch.no_grad()
def _embedded(codes: Tensor, codebook: Codebook) -> Iterator[Tensor]:
    """The embeddings of `codes [N,h,w]`, in parts `[n,D,h,w]` of AT_ONCE."""
    for part in codes.split(AT_ONCE):
        yield codebook.embed(part.long().to(codebook.embeddings.weight.device))
