"""Copies are told from new images."""

import numpy as np
import pytest

from errors import UserError
from metrics import memorisation as module
from metrics.memorisation import memorisation


def normal(count, seed, spread=1.0):
    return (np.random.default_rng(seed).normal(size=(count, 6)) * spread).astype(np.float32)


def test_new_images_of_the_same_distribution_score_a_half():
    result = memorisation(normal(1000, 1), normal(3000, 2), normal(1000, 3))
    assert result == (pytest.approx(0.5, abs=0.03), pytest.approx(0.5, abs=0.05))


def test_copies_score_one():
    training = normal(300, 2)
    copies = training + 0.001 * normal(300, 4)
    result = memorisation(copies, training, normal(300, 3))
    assert result.nearer > 0.99 and result.nearest_is_training == 1


def test_a_tenth_of_copies_shows():
    training = normal(1000, 2)
    samples = np.concatenate((training[:100], normal(900, 1)))
    assert memorisation(samples, training, normal(1000, 3)).nearer == pytest.approx(0.1 + 0.9 * 0.5, abs=0.03)


def test_little_variety_is_not_copying():
    result = memorisation(normal(1000, 1, 0.6), normal(2000, 2), normal(2000, 3))
    assert result.nearer > 0.7 and result.nearest_is_training == pytest.approx(0.5, abs=0.06)


def test_by_hand():
    samples, training, unseen = (np.array(rows, np.float32)[:, None] for rows in ([1, 12], [0, 10], [11, 15, 3]))
    # squared distances to training: samples 1, 4; unseen 1, 25, 9. Two training images, and unseen 11 and 15:
    assert memorisation(samples, training, unseen) == ((0.5 + 1 + 1 + 0 + 1 + 1) / 6, 0.5)


def test_blocks_do_not_matter(monkeypatch):
    sets = normal(50, 1), normal(70, 2), normal(40, 3)
    whole = memorisation(*sets)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert memorisation(*sets) == pytest.approx(whole)


def test_an_empty_set_is_refused():
    with pytest.raises(UserError, match="memorisation needs at least 1 unseen images, not 0"):
        memorisation(normal(5, 1), normal(5, 2), normal(0, 3))
