"""Sets of channels that the benchmark of groups compares with groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.groups.__main__ import ablation
from benchmarks.groups.joints import same_mass
from benchmarks.tables import groups


@pytest.mark.parametrize("seed", range(5))
def test_sets_have_the_sizes_and_the_masses_of_groups_and_other_channels(seed):
    draw = torch.Generator().manual_seed(seed)
    mass = torch.randn(200, generator=draw).double() / 200
    groups = torch.nn.functional.one_hot(torch.randint(8, (200,), generator=draw)).T
    sets = same_mass(mass, groups, draws=3)
    assert sets.shape == (24, 200)
    again = groups.repeat(3, 1)
    assert torch.equal(sets.sum(1), again.sum(1))
    torch.testing.assert_close(sets.double() @ mass, again.double() @ mass, atol=5e-4, rtol=0)
    assert float((sets * again).sum(1).double().div(again.sum(1)).mean()) < 0.3  # an eighth by chance
    assert not torch.equal(sets[:8], sets[8:16])


def test_a_group_of_all_channels_or_of_none_has_only_one_set_of_its_size():
    mass = torch.arange(4.0)
    groups = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    assert torch.equal(same_mass(mass, groups, draws=1), groups)


def test_correlations_and_differences_are_means_over_sets_layers_and_draws():
    draw = np.random.default_rng(0)
    parts = []
    for _ in range(4):
        part = {}
        for place in range(2):
            for name, count in (("groups", 8), ("same mass", 24), ("alone", 8), ("random", 8)):
                part[f"{name} {place} mass"] = draw.standard_normal(count)
                part[f"{name} {place} change"] = draw.standard_normal(count)
            part[f"groups {place} change"] = 2 * part[f"groups {place} mass"]
        parts.append(part)
    found = ablation(parts, ("a", "b"))
    assert found["groups"]["correlation"]["mean"] == pytest.approx(1)
    wanted = np.mean([np.abs(part[f"groups {place} mass"]).mean() for part in parts for place in range(2)])
    assert found["groups"]["difference"]["mean"] == pytest.approx(wanted)
    rows = [
        (part[f"same mass {place} mass"][row : row + 8], part[f"same mass {place} change"][row : row + 8])
        for part in parts for place in range(2) for row in (0, 8, 16)
    ]  # fmt: skip
    each = [np.corrcoef(mass, change)[0, 1] for mass, change in rows]
    assert found["same mass"]["correlation"]["mean"] == pytest.approx(np.mean(each))
    assert found["groups minus same mass"]["correlation"]["mean"] == pytest.approx(1 - np.mean(each))
    assert all("each" not in figures for figures in found.values())


def test_sets_that_a_network_lacks_are_left_out_of_its_row():
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6, "inputs": 4}
    measured = {name: {"correlation": figure, "difference": figure} for name in ("groups", "alone", "random")}
    kappa = dict.fromkeys(("groups", "strongest and rest", "k-means of activations", "random"), figure)
    rest = {"kappa": kappa, "times the best other": figure, "halves": {"own": 1, "other": 1, "kept": 1}}
    nets = {
        "one": {"default": {**rest, "ablation": measured | {"same mass": measured["groups"]}}},
        "other": {"default": {**rest, "ablation": measured}},
    }
    head, _, one, other = groups({"nets": nets})["ablated"].splitlines()
    assert "r: same size and mass | r: by mass" in head
    assert one.count("0.50 (0.40–0.60)") == 4
    assert other.count("–  |".replace("  ", " ")) == 2
