"""Relevance matrices against means of conditionals one sample at a time, stored files, and several processes.

Covers: nrm_plugin.dataset.relevance_matrix.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from zennit.composites import EpsilonPlus

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.dataset.mean_conditionals import MeanConditionals
from nrm_plugin.dataset.relevance_matrix import RelevanceMatrix
from nrm_plugin.errors import InputError, MissingExtraError

ROOT = Path(__file__).parents[2]


class Skip(nn.Module):
    """A convolution with a skip connection, so that walks bypass it, and biases, so that walks are absorbed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3 * 25, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head((x + torch.relu(self.conv(x))).flatten(1))


def net_and_images(count: int = 11):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Skip().double().eval(), torch.randn(count, 1, 5, 5).double()


def one_by_one(net, x, upper, lower, channels=(3, 3)):
    """Weighted means of conditionals, each from a query of its own."""
    total, off, weight = np.zeros(channels[::-1]), np.zeros(channels[0]), np.zeros(channels[0])
    for sample in x:
        mu = RelevanceMeasure(net, sample[None], 1, residual="sink", composite=EpsilonPlus())
        for j in range(channels[0]):
            condition = at(upper)[j]
            mass = float(mu(condition))
            for i in range(channels[1]):
                total[i, j] += abs(mass) * float(mu(at(lower)[i], given=condition, min_ratio=0))
            off[j] += abs(mass) * float(mu(~at(lower), given=condition, min_ratio=0))
            weight[j] += abs(mass)
    return total / weight, off / weight, weight / len(x)


@pytest.mark.medium
@pytest.mark.parametrize(("upper", "lower"), [("conv", "stem")])
def test_the_matrix_is_the_weighted_mean_of_conditionals(upper, lower):
    net, x = net_and_images(6)
    metric = MeanConditionals((3, 3), upper, lower)
    for rows in x.split(4):
        metric.update(RelevanceMeasure(net, rows, 1, residual="sink", composite=EpsilonPlus()))
    found = metric.compute()
    matrix, off, weight = one_by_one(net, x, upper, lower)
    np.testing.assert_allclose(found.matrix, matrix, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.off, off, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.weight, weight, rtol=1e-10)
    assert (found.samples, found.upper, found.lower) == (6, "conv", "stem")


def test_columns_and_what_leaves_them_sum_to_one():
    net, x = net_and_images()
    leaving = []
    for upper, lower in (("conv", "stem"), ("stem", "input"), ("head", "conv")):
        groups = tuple(RelevanceMeasure(net, x[:1], 1).shape(layer)[1] for layer in (upper, lower))
        metric = MeanConditionals(groups, upper, lower)
        metric.update(RelevanceMeasure(net, x, 2, residual="sink", composite=EpsilonPlus()))
        found = metric.compute()
        seen = found.weight > 0
        torch.testing.assert_close((found.matrix.sum(0) + found.off)[seen], torch.ones(int(seen.sum())).double())
        assert bool(found.matrix[:, ~seen].isnan().all())
        leaving.append(float(found.off[seen].abs().max()))
    assert max(leaving) > 1e-3  # biases absorb, and walks bypass


def test_one_sample_is_predicted_exactly_and_new_ones_by_the_mean():
    net, x = net_and_images()
    metric = MeanConditionals((3, 1), "stem", "input")
    metric.update(RelevanceMeasure(net, x[:1], 1))
    mu = RelevanceMeasure(net, x[:1], 1)
    predicted = metric.compute().apply(mu.marginal("stem", over="channel"))
    torch.testing.assert_close(predicted, mu.marginal("input", over="channel"), rtol=0, atol=1e-10)
    other = RelevanceMeasure(net, x[1:2], 1).marginal("stem", over="channel")
    expected = sum(float(other[0, j]) * metric.compute().matrix[:, j] for j in range(3))
    torch.testing.assert_close(metric.compute().apply(other)[0], expected)


def test_products_follow_a_chain():
    """In a chain whose middle layer has one neuron per channel, and one sample, the product is the conditional."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double().eval()
    mu = RelevanceMeasure(net, torch.randn(1, 3).double(), 1, residual="sink", composite=EpsilonPlus())

    def matrix(upper, lower, groups):
        metric = MeanConditionals(groups, upper, lower)
        metric.update(mu)
        return metric.compute()

    product = matrix("2", "0", (5, 4)).then(matrix("0", "input", (4, 3)))
    direct = matrix("2", "input", (5, 3))
    torch.testing.assert_close(product.matrix, direct.matrix, rtol=0, atol=1e-10)
    torch.testing.assert_close(product.off, direct.off, rtol=0, atol=1e-10)
    assert (product.upper, product.lower) == ("2", "input")
    with pytest.raises(InputError, match="cannot be followed"):
        direct.then(direct)


def test_matrices_are_stored(tmp_path):
    draw = torch.Generator().manual_seed(0)
    matrix = torch.rand(3, 2, generator=draw)
    one = RelevanceMatrix(matrix, 1 - matrix.sum(0), torch.rand(2, generator=draw), 7, "a", "b")
    one.save(tmp_path / "one.safetensors")
    read = RelevanceMatrix.load(tmp_path / "one.safetensors")
    assert (read.samples, read.upper, read.lower) == (7, "a", "b")
    assert all(torch.equal(getattr(read, key), getattr(one, key)) for key in ("matrix", "off", "weight"))
    assert repr(read) == "RelevanceMatrix(2 groups of 'a' to 3 of 'b', 7 samples)"


def test_invalid_arguments_raise(tmp_path):
    from safetensors.torch import save_file

    net, x = net_and_images(2)
    metric = MeanConditionals((2, 3), "conv", "stem")
    with pytest.raises(InputError, match=r"created for groups \(2, 3\), but the layers have \(3, 3\)"):
        metric.update(RelevanceMeasure(net, x, 1))
    assert int(metric.samples) == 0
    with pytest.raises(InputError, match="needs off and weight"):
        RelevanceMatrix(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2), 1)
    with pytest.raises(InputError, match=r"applies to relevance \(N, 2\)"):
        RelevanceMatrix(torch.zeros(3, 2), torch.zeros(2), torch.zeros(2), 1).apply(torch.zeros(4, 3))
    save_file({"matrix": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is not a file of"):
        RelevanceMatrix.load(tmp_path / "other.safetensors")


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "nrm_plugin.dataset.mean_conditionals")
    with pytest.raises(MissingExtraError, match=r"nrm-plugin\[statistics\]"):
        import nrm_plugin.dataset.mean_conditionals  # noqa: F401


def counted(rank: int, folder: Path) -> RelevanceMatrix:
    """The matrix of one of two processes after both have counted their share of the samples."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=4)
    )
    net, x = net_and_images()
    metric = MeanConditionals((3, 3), "conv", "stem")
    metric.update(RelevanceMeasure(net, x[:4] if rank == 0 else x[4:], 1))
    result = metric.compute()
    torch.distributed.destroy_process_group()
    return result


OTHER = """
    import pathlib, sys
    sys.path.insert(0, sys.argv[2])
    from test_mean_conditionals import counted
    counted(1, pathlib.Path(sys.argv[1])).save(pathlib.Path(sys.argv[1]) / "found.safetensors")
"""


@pytest.mark.slow
def test_two_processes_have_the_matrix_of_one(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(OTHER), str(tmp_path), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment) as other:
        first = counted(0, tmp_path)
        assert other.wait(timeout=240) == 0
    net, x = net_and_images()
    whole = MeanConditionals((3, 3), "conv", "stem")
    whole.update(RelevanceMeasure(net, x, 1))
    for found in (first, RelevanceMatrix.load(tmp_path / "found.safetensors")):
        torch.testing.assert_close(found.matrix, whole.compute().matrix, rtol=1e-10, atol=0)
        assert found.samples == 11
