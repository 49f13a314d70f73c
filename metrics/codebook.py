"""Usage of a codebook."""

import torch
from torch import Tensor


def usage(codes: Tensor, codebook_size: int) -> float:
    """Fraction of the codebook that occurs in `codes` (integers [N,h,w]), from 1/K to 1.

    Raises ValueError as `perplexity` does.
    """
    return (_frequencies(codes, codebook_size) > 0).double().mean().item()


def perplexity(codes: Tensor, codebook_size: int) -> float:
    """exp(entropy) of the code frequencies, from 1 (a single code) to K (all codes equally frequent).

    `codes` are integers [N,h,w]; raises ValueError if there are none, or one is outside 0..codebook_size-1.
    """
    return torch.special.entr(_frequencies(codes, codebook_size)).sum().exp().item()


def _frequencies(codes: Tensor, codebook_size: int) -> Tensor:
    """Relative frequency of each code, float64 [K]."""
    if not codes.numel() or codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(f"codes must be at least one integer in 0..{codebook_size - 1}")
    return torch.bincount(codes.flatten(), minlength=codebook_size).double() / codes.numel()
