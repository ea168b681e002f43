"""The search for partitions, against exhaustive search and plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nrm_plugin.measure.dependence import dependence, find_partitions, group_sums, kept, move_members
from tests.oracles import brute_kappa


@pytest.mark.parametrize("seed", range(3))
def test_the_kept_share_is_that_of_its_definition(seed):
    random = np.random.default_rng(seed)
    joint = random.random((5, 7)) + random.normal(size=(5, 7))
    rows, columns = random.integers(3, size=5), random.integers(2, size=7)
    part = dependence(joint)
    assert np.abs(part.sum(0)).max() < 1e-12
    assert np.abs(part.sum(1)).max() < 1e-12
    assert kept(part, rows, columns) == pytest.approx(brute_kappa(joint, rows, columns), rel=1e-12)
    assert 0 <= kept(part, rows, columns) <= 1
    assert kept(part, np.arange(5), np.arange(7)) == pytest.approx(1)


def test_independent_layers_have_no_dependence_and_cancelled_sums_do_not_divide():
    random = np.random.default_rng(0)
    joint = np.outer(random.random(4), random.random(6))
    assert not dependence(joint).any()
    assert math.isnan(kept(dependence(joint), np.zeros(4, int), np.zeros(6, int)))
    cancelled = np.array([[1.0, -1.0], [-2.0, 2.0]])
    assert (dependence(cancelled) == cancelled).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_best_of_all_partitions_of_a_small_matrix(seed):
    random = np.random.default_rng(seed)
    joint = random.random((5, 5)) ** 4
    part = dependence(joint)
    found = find_partitions([part], [2, 2], restarts=20, seed=0, fixed=[None, None])
    labelings = [np.array(labels) for labels in itertools.product(range(2), repeat=5)]
    best = max(brute_kappa(joint, rows, columns) for rows in labelings for columns in labelings)
    assert brute_kappa(joint, *found) == pytest.approx(best, rel=1e-9)


def test_planted_groups_of_three_layers_are_found_at_once():
    random = np.random.default_rng(1)
    labels = [random.integers(4, size=size) for size in (20, 30, 25)]
    block = np.eye(4) + 0.05
    joints = [block[above][:, below] * random.uniform(0.9, 1.1, (len(above), len(below)))
              for above, below in itertools.pairwise(labels)]  # fmt: skip
    found = find_partitions([dependence(joint) for joint in joints], [4, 4, 4], 4, 0, [None] * 3)
    for own, planted in zip(found, labels, strict=True):
        assert len({*zip(own.tolist(), planted.tolist(), strict=True)}) == 4


def test_the_same_seed_gives_the_same_partition_and_fixed_ones_stay():
    random = np.random.default_rng(2)
    parts = [dependence(random.random((12, 10))), dependence(random.random((10, 11)))]
    given = np.arange(12) % 3
    first, again = (find_partitions(parts, [3, 3, 3], 3, 5, [given, None, None]) for _ in range(2))
    assert all((one == two).all() for one, two in zip(first, again, strict=True))
    assert (first[0] == np.arange(12) % 3).all()


def test_every_move_raises_the_objective_by_the_gain_of_its_definition():
    random = np.random.default_rng(3)
    values, labels = random.normal(size=(30, 6)), random.integers(4, size=30)
    size = np.abs(group_sums(values, labels, 4)).sum()
    for _ in range(20):
        moves = move_members(values, labels, 4, random.permutation(30))
        after = sum(np.abs(values[labels == group].sum(0)).sum() for group in range(4))
        assert after > size if moves else after == pytest.approx(size)
        size = after
    assert moves == 0
    for member, group in itertools.product(range(30), range(4)):  # no single move is better
        moved = labels.copy()
        moved[member] = group
        assert sum(np.abs(values[moved == one].sum(0)).sum() for one in range(4)) <= size + 1e-9
