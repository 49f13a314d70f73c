"""A prototype as a condition of a denoiser: which of a set of average code grids is nearest to the image."""

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.quantizer import Codebook, nearest_rows
from models.spiking import full_precision, one_hot

MAX_ITERATIONS = 10  # of k-means
CHUNK = 4096  # grids whose embeddings are held in memory at a time


class Prototypes(nn.Module):
    """Conditions a denoiser on one of G prototypes, which are average grids of codes.

    In training it is the prototype nearest to the image. For a sample, a prototype is drawn in proportion to its
    frequency among the training images, so that the global structure, which is hard to sample code by code, is fixed
    from the start (compare representation-conditioned generation, arXiv 2312.03701). Its codes enter as one-hot spikes
    through a convolution whose weights are initially zero.

    Buffers, set by `fit`: the prototypes `grids`, int32 `[G,h,w]`, and `counts`, int64 `[G]`, the number of training
    images nearest to each.

    Args:
        count: number of prototypes G.
        codebook_size: number of codes K.
        channels: channels C of the output currents.
        patch: side of the patch of codes that becomes one position.
        grid: height h and width w of the grid of codes.
    """

    grids: Tensor
    counts: Tensor

    def __init__(self, count: int, codebook_size: int, channels: int, patch: int, grid: tuple[int, int]):
        super().__init__()
        self.codebook_size = codebook_size
        self.register_buffer("grids", torch.zeros(count, *grid, dtype=torch.int32))
        self.register_buffer("counts", torch.zeros(count, dtype=torch.int64))
        self.embed = one_hot(nn.Conv2d(codebook_size, channels, patch, stride=patch, bias=False))
        nn.init.zeros_(self.embed.weight)

    def forward(self, indices: Tensor) -> Tensor:
        """Indices `[N]`, negative where none is given, to currents `[N,C,h/patch,w/patch]`; zeros for none."""
        codes = self.grids[indices.clamp_min(0)].long()
        spikes = F.one_hot(codes, self.codebook_size) * (indices >= 0).view(-1, 1, 1, 1)
        return self.embed(spikes.permute(0, 3, 1, 2).to(self.embed.weight))  # [N,h,w,K] -> [N,K,h,w]

    def fit(self, codes: Tensor, codebook: Codebook, seed: int) -> Tensor:
        """Set the prototypes to the codes nearest to the mean embeddings of G clusters of `codes [N,h,w]`, N >= G.

        The clusters are found by k-means on the embeddings, average-pooled over 2x2 codes. Returns the index of the
        prototype nearest to each of the codes, as `nearest` does.
        """
        from sklearn.cluster import KMeans  # here because importing scikit-learn takes a second
        from sklearn.exceptions import ConvergenceWarning

        count = len(self.grids)
        coarse = torch.cat([F.avg_pool2d(part, 2, ceil_mode=True).flatten(1) for part in _embedded(codes, codebook)])
        kmeans = KMeans(count, init="random", n_init=1, max_iter=MAX_ITERATIONS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than clusters: harmless
            clusters = kmeans.fit_predict(coarse.cpu().numpy())
        device = codebook.embeddings.weight.device
        clusters = torch.from_numpy(clusters).to(device).long()
        sums = torch.zeros(count, codebook.embeddings.embedding_dim, *codes.shape[1:], device=device)
        for members, part in zip(clusters.split(CHUNK), _embedded(codes, codebook), strict=True):
            sums.index_add_(0, members, part)
        sizes = clusters.bincount(minlength=count).clamp_min(1)
        self.grids.copy_(codebook.nearest_codes(sums / sizes.view(-1, 1, 1, 1)))
        nearest = self.nearest(codes, codebook)
        self.counts.copy_(nearest.bincount(minlength=count))
        return nearest

    def nearest(self, codes: Tensor, codebook: Codebook) -> Tensor:
        """Indices int64 `[N]` of the prototypes whose embeddings are nearest to those of `codes [N,h,w]`."""
        with torch.no_grad(), full_precision(codebook.embeddings.weight):
            centres = torch.cat([part.flatten(1) for part in _embedded(self.grids, codebook)])
            return torch.cat([nearest_rows(part.flatten(1), centres) for part in _embedded(codes, codebook)])


@torch.no_grad()
def _embedded(codes: Tensor, codebook: Codebook) -> Iterator[Tensor]:
    """The embeddings of `codes [N,h,w]`, in chunks `[n,D,h,w]`."""
    for part in codes.split(CHUNK):
        yield codebook.embed(part.long().to(codebook.embeddings.weight.device))
