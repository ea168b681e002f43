"""Sketches of joint relevance, and the search for groups that starts from them, against exact joint relevance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure, find_groups
from nrm_plugin.errors import EventError
from nrm_plugin.measure import joint_sketches
from nrm_plugin.measure.dependence import dependence, kept
from nrm_plugin.measure.joint_sketches import PairJoints

LAYERS = ["4", "2", "0"]


def wide_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 18, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(18, 3),
    ).double()  # fmt: skip


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return RelevanceMeasure(wide_net(), torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)).double(), 1)


@pytest.fixture
def sketched(monkeypatch):
    """All joint relevance of members is sketched."""
    monkeypatch.setattr(joint_sketches, "FEW", 0)
    monkeypatch.setattr(joint_sketches, "neighbor_matrix", lambda *args: None)
    monkeypatch.setattr(joint_sketches, "local_joint", lambda *args: None)


@pytest.mark.usefixtures("sketched")
def test_a_sketch_of_full_rank_is_the_joint_relevance_of_each_sample(mu, monkeypatch):
    monkeypatch.setattr(joint_sketches, "RANK", 24)
    joints = PairJoints(mu, LAYERS, ["channel", "channel", "position"])
    for pair, over in enumerate([("channel", "channel"), ("channel", "position")]):
        matrix, exact = joints.of_members(pair)
        assert not exact
        assert torch.allclose(matrix, mu.joint(*LAYERS[pair : pair + 2], over=over).flatten(2), atol=1e-12)


@pytest.mark.usefixtures("sketched")
def test_a_sketch_of_low_rank_is_the_projection_on_its_range(mu, monkeypatch):
    monkeypatch.setattr(joint_sketches, "RANK", 5)
    matrix, _ = PairJoints(mu, LAYERS, ["channel"] * 3).of_members(0)
    joint = mu.joint("4", "2")
    assert torch.linalg.matrix_rank(matrix).tolist() == [5, 5]
    basis = torch.linalg.svd(matrix)[0][:, :, :5]
    assert torch.allclose(matrix, basis @ basis.mT @ joint, atol=1e-12)


def test_masses_and_joints_of_groups_are_those_of_the_measure(mu):
    joints = PairJoints(mu, LAYERS, ["channel"] * 3)
    assert torch.allclose(joints.masses(1), mu.marginal("2", over="channel"))
    assert joints.of_members(0)[1]
    groups = joints.labels(0, torch.arange(18) // 6)
    by_hand = mu.joint("4", "2").reshape(2, 3, 6, 24).sum(2)
    assert torch.allclose(joints.of_groups(0, groups, "channel"), by_hand)
    with pytest.raises(EventError, match="is not below"):
        PairJoints(mu, LAYERS[::-1], ["channel"] * 3)


@pytest.mark.usefixtures("sketched")
def test_groups_from_a_sketch_keep_nearly_as_much_as_groups_from_all_joint_relevance(mu, monkeypatch):
    monkeypatch.setattr(joint_sketches, "RANK", 6)
    found = find_groups(mu, LAYERS, 4)
    assert all(math.isnan(share) for share in found.kappas)
    monkeypatch.undo()
    best = find_groups(mu, LAYERS, 4)
    assert shares_of(mu, found) > 0.85 * best.kappa
    assert sum(found.masses[0]) == pytest.approx(float(mu.marginal("4").sum(dim=(1, 2, 3)).mean()))


def test_groups_from_marginals_keep_nearly_as_much_as_groups_from_all_joint_relevance(mu, monkeypatch):
    best = find_groups(mu, LAYERS, 4)
    monkeypatch.setattr(joint_sketches, "FEW", 0)
    monkeypatch.setattr(joint_sketches, "neighbor_matrix", lambda *args: None)
    found = find_groups(mu, LAYERS, 4)
    assert all(math.isnan(share) for share in found.kappas)
    assert shares_of(mu, found) > 0.85 * best.kappa


def shares_of(mu, groups) -> float:
    """The mean share of the dependence that groups keep."""
    parts = [dependence(mu.joint(*LAYERS[n : n + 2]).mean(0).numpy()) for n in range(2)]
    shares = [kept(part, *(labels.numpy() for labels in groups.labels[n : n + 2])) for n, part in enumerate(parts)]
    return float(np.mean(shares))
