"""Seeds of everything that is random in a training, derived from the seed of the run.

Each epoch and step has a seed of its own, so that resuming needs no random state. No two are alike: every purpose has
a range of its own within the 32 bits that torch's generator on the CPU reads of a seed, and counts on from a place in
it that depends on the run's seed. (Hashes of all steps would meet by chance: a long training has 400,000.)

The noise of samples is not derived here: see `AbsorbingDiffusion.noise`, `FSVAE.noise` and `Conditions.of_samples`.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PURPOSES = ("weights", "order", "noise", "statistics", "statistics order", "prototypes", "held out")
"""Initial weights; order of an epoch; noise of a step; noise and order of batch-norm recalibration; k-means; noise of
the held-out loss. A new one comes last, so that the others keep their seeds."""

SEEDS = 2**28  # of a purpose in a stage: 7 purposes and 2 stages fit into 32 bits
STEPS = 2**22  # at most, of a process in a stage; that leaves room for 64 processes

_one_at_a_time = threading.RLock()


def derive_seed(seed: int, purpose: str, stage: int, index: int = 0) -> int:
    """One seed, of 32 bits: `index` counts the epochs, steps or batches of a stage (1 or 2).

    Raises ValueError for a purpose that is not one of PURPOSES.
    """
    place = 2 * PURPOSES.index(purpose) + stage - 1
    first = int.from_bytes(hashlib.sha256(f"{seed} {purpose} {stage}".encode()).digest()[:4], "big")
    return place * SEEDS + (first + index) % SEEDS


def own_seed(seed: int, process: int) -> int:
    """The seed that the process of this number has in the place of a derived one; the first process has that itself."""
    place, index = divmod(seed, SEEDS)
    return place * SEEDS + (index + process * STEPS) % SEEDS


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context in which new networks draw their weights on the CPU from this seed.

    PyTorch draws them from a generator that the whole program shares; afterwards that goes on as if nothing had been
    drawn. One thread at a time is in such a context.
    """
    with _one_at_a_time, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
