"""No two random streams of a run are the same one."""

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import IMPROVED

from pipeline import networks
from pipeline.runtime import processes, seeds
from pipeline.runtime.seeds import PURPOSES, SEEDS, STEPS, derive_seed, own_seed
from pipeline.training import loop as training


def test_seeds_are_32_bits_and_follow_from_what_they_are_for():
    """Pinned: whoever changes them raises LAST_VERSION, as a run that is resumed would go on with others."""
    assert (derive_seed(42, "weights", 1), derive_seed(42, "noise", 2, 7)) == (117658001, 1500389361)
    assert 2 * len(PURPOSES) * SEEDS <= 2**32 and 64 * STEPS == SEEDS
    assert [derive_seed(42, purpose, 2, 5) // SEEDS for purpose in PURPOSES] == [1, 3, 5, 7, 9, 11, 13]
    with pytest.raises(ValueError):
        derive_seed(42, "odrer", 1)


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_no_two_seeds_of_a_long_run_are_alike(seed):
    """A purpose counts on from a place in its range, past the end of which comes the beginning."""
    steps = torch.arange(400_000)
    drawn = []
    for purpose, stage in itertools.product(PURPOSES, (1, 2)):
        first = derive_seed(seed, purpose, stage)
        assert [derive_seed(seed, purpose, stage, int(i)) for i in steps[:3]] == [
            first // SEEDS * SEEDS + (first + i) % SEEDS for i in range(3)
        ]
        start = [own_seed(first, process) for process in (0, 1, 63)]
        drawn += [place // SEEDS * SEEDS + (place + steps) % SEEDS for place in start]
    drawn = torch.cat(drawn)
    assert len(drawn.unique()) == len(drawn) and drawn.min() >= 0 and drawn.max() < 2**32


def test_other_processes_have_seeds_of_the_same_purpose():
    for purpose, process in itertools.product(PURPOSES, (1, 2, 63)):
        seed = derive_seed(1, purpose, 2, 10**6)
        assert own_seed(seed, 0) == seed != own_seed(seed, process)
        assert own_seed(seed, process) // SEEDS == seed // SEEDS


def test_own_noise_is_not_that_of_another_step(monkeypatch):
    """Where a process adds its number to the seed, it has the noise of the first one's next steps."""
    streams = {}
    for rank, step in itertools.product(range(4), range(50)):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        generator = torch.Generator().manual_seed(derive_seed(42, "noise", 1, step))
        streams[rank, step] = tuple(torch.rand(4, generator=processes.own_noise(generator)).tolist())
    assert len(set(streams.values())) == len(streams)


USED = []


class Recorded(torch.Generator):
    """A generator that notes its seeds."""

    def manual_seed(self, seed):
        USED.append(seed)
        return super().manual_seed(seed)


def test_no_two_streams_of_a_run_are_alike(cli, grey, tmp_path, monkeypatch):
    """All seeds that a run with prototypes, averaged weights and fixed statistics derives, and those that it uses."""
    derived = {}

    def recording(*arguments):
        derived[arguments] = seeds.derive_seed(*arguments)
        return derived[arguments]

    for module in (networks, training):
        monkeypatch.setattr(module, "derive_seed", recording)
    monkeypatch.setattr(torch, "Generator", Recorded)
    USED.clear()
    with mock.patch.object(networks, "seeded", wraps=seeds.seeded) as weights:
        outcome = cli(*grey, *IMPROVED, "--held_out", 9, "--result_path", tmp_path)
    assert (outcome.status, outcome.err) == (0, "")
    drawn = {call.args[0] for call in weights.call_args_list} - {0}  # the seed of weights that are then replaced
    used = {*USED, *drawn}
    assert len(drawn) == 2
    assert {purpose for _, purpose, *_ in derived} == set(PURPOSES)
    assert used <= set(derived.values()), "all generators are seeded by derived seeds"
    streams = [torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in derived.values()]
    streams += [torch.from_numpy(np.random.default_rng((42, sample)).random(4)).float() for sample in range(100)]
    streams += [torch.from_numpy(np.random.default_rng((42, sample, 1)).random(4)).float() for sample in range(100)]
    assert len(torch.stack(streams).unique(dim=0)) == len(streams)
    assert len(set(derived.values())) == len(derived) > 60
