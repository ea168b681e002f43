"""Mean and variance over a dataset equal those of numpy over all samples, whatever the batches.

Covers: nrm_plugin.dataset.moments.
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
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from nrm_plugin import RelevanceMeasure
from nrm_plugin.dataset.statistics import ClasswiseRelevance, JointRelevance, Moments
from nrm_plugin.errors import InputError, MissingExtraError

ROOT = Path(__file__).parents[2]


def expected(values: np.ndarray, target: np.ndarray, classes: int, correction: int = 1):
    """The same, class by class, by numpy's own functions."""
    shape = (classes, *values.shape[1:])
    mean, variance = np.full(shape, np.nan), np.full(shape, np.nan)
    for number in range(classes):
        rows = values[target == number]
        if len(rows):
            mean[number] = rows.mean(0)
        if len(rows) > correction:
            variance[number] = rows.var(0, ddof=correction)
    return np.bincount(target, minlength=classes), mean, variance


def equal(moments, count, mean, variance, rtol=1e-9):
    assert moments.samples.tolist() == list(count)
    np.testing.assert_allclose(moments.mean, mean, rtol=rtol, atol=1e-14)
    np.testing.assert_allclose(moments.variance, variance, rtol=rtol, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
    correction=st.sampled_from([0, 1]),
)
def test_any_batches_give_the_moments_of_all_samples(sizes, seed, correction):
    draw = np.random.default_rng(seed)
    values, target = draw.normal(size=(sum(sizes), 3)), draw.integers(0, 4, sum(sizes))
    metric = ClasswiseRelevance(3, 5, correction=correction)
    for rows, labels in zip(np.split(values, np.cumsum(sizes)), np.split(target, np.cumsum(sizes)), strict=True):
        metric.update(torch.from_numpy(rows), torch.from_numpy(labels))
    count, mean, variance = expected(values, target, 5, correction)
    moments = metric.compute()
    assert moments.samples.tolist() == count.tolist()
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moments.variance, variance, rtol=1e-9, atol=1e-12)


def test_a_small_variance_around_a_large_mean_is_accurate():
    """The error of a difference of sums of squares would exceed the variance."""
    draw = np.random.default_rng(0)
    values = 1e8 + draw.normal(size=(5000, 2))
    metric = ClasswiseRelevance(2)
    for rows in np.array_split(values, 61):
        metric.update(torch.from_numpy(rows))
    moments = metric.compute()
    np.testing.assert_allclose(moments.variance, values.var(0, ddof=1), rtol=1e-7)
    naive = ((values**2).sum(0) - values.sum(0) ** 2 / len(values)) / (len(values) - 1)
    assert np.abs(naive / values.var(0, ddof=1) - 1).max() > 1e-3


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 6)]
    return nn.Sequential(*layers).double().eval()


@pytest.mark.medium
def test_measures_are_counted_by_marginals_and_joint_relevance(net):
    x = torch.randn((11, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 5])
    metric = ClasswiseRelevance(5, 6, layer="2")
    joints = JointRelevance((5, 4), 6, upper="2", lower="0")
    together = JointRelevance((5, 4), upper="2", lower="0")
    for at in (slice(0, 4), slice(4, 5), slice(5, 11)):
        mu = RelevanceMeasure(net, x[at], target[at])
        metric.update(mu, target[at])
        joints.update(mu, target[at])
        together.update(mu)
    marginal, joint = [], []
    for sample, label in zip(x, target, strict=True):  # one by one
        mu = RelevanceMeasure(net, sample[None], int(label))
        marginal.append(mu.marginal("2")[0].flatten(1).sum(1).numpy())
        joint.append(mu.joint("2", "0")[0].numpy())
    equal(metric.compute(), *expected(np.stack(marginal), target.numpy(), 6))
    equal(joints.compute(), *expected(np.stack(joint), target.numpy(), 6))
    moments = together.compute()
    assert moments.samples.item() == 11
    np.testing.assert_allclose(moments.mean, np.mean(joint, 0), rtol=1e-10)
    np.testing.assert_allclose(moments.variance, np.var(joint, 0, ddof=1), rtol=1e-10)
    # The mean is the joint relevance of a measure.
    np.testing.assert_allclose(moments.mean.sum(1), np.mean(marginal, 0), rtol=1e-10)


@pytest.mark.skipif(not hasattr(torchmetrics.Metric, "merge_state"), reason="this torchmetrics merges no states")
def test_merge_of_torchmetrics_works():
    values, target = torch.randn((9, 3), dtype=torch.float64), torch.randint(0, 2, (9,))
    whole, other = ClasswiseRelevance(3, 2), ClasswiseRelevance(3, 2)
    whole.update(values[:4], target[:4])
    other.update(values[4:], target[4:])
    whole.merge_state(other)
    equal(whole.compute(), *expected(values.numpy(), target.numpy(), 2))


def test_forward_reset_and_clone_of_torchmetrics_work():
    values, target = torch.randn((9, 3), dtype=torch.float64), torch.randint(0, 2, (9,))
    whole = ClasswiseRelevance(3, 2)
    batch = whole(values[:4], target[:4])
    equal(batch, *expected(values[:4].numpy(), target[:4].numpy(), 2))
    whole.update(values[4:], target[4:])
    equal(whole.compute(), *expected(values.numpy(), target.numpy(), 2))
    again = whole.clone()
    whole.reset()
    whole.update(values[:0], target[:0])
    assert whole.compute().samples.tolist() == [0, 0]
    assert whole.compute().mean.isnan().all()
    equal(again.compute(), *expected(values.numpy(), target.numpy(), 2))
    assert whole.half().moments.dtype == torch.float64  # torchmetrics does not convert states


@pytest.mark.parametrize(
    ("make", "update", "words"),
    [
        ({"groups": 3}, (torch.zeros(2, 4),), r"shape \(N, 3\), got \(2, 4\)"),
        ({"groups": 3}, ([1.0],), "got list"),
        ({"groups": 3}, (torch.full((2, 3), torch.nan),), "not finite"),
        ({"groups": 3}, (torch.zeros(2, 3), [0, 1]), "created without classes"),
        ({"groups": 3, "classes": 2}, (torch.zeros(2, 3),), "class of each sample"),
        ({"groups": 3, "classes": 2}, (torch.zeros(2, 3), [0, 2]), "classes 0 to 1, got 0 to 2"),
        ({"groups": 3, "classes": 2}, (torch.zeros(2, 3), [0]), "one integer for each of 2"),
        ({"groups": 3, "classes": 2}, (torch.zeros(2, 3), [0.0, 1.0]), "one integer"),
    ],
)
def test_an_invalid_batch_raises_and_is_not_counted(make, update, words):
    metric = ClasswiseRelevance(**make)
    metric.update(torch.ones(2, 3), [0, 1] if metric.classes else None)
    before = metric.moments.clone()
    with pytest.raises(InputError, match=words):
        metric.update(*update)
    assert torch.equal(metric.moments, before)


@pytest.mark.parametrize("sizes", [{"groups": 0}, {"groups": 3, "classes": True}, {"groups": 3.0}])
def test_sizes_are_integers(sizes):
    with pytest.raises(InputError, match="an integer of at least 1"):
        ClasswiseRelevance(**sizes)


def test_a_measure_needs_the_name_of_the_layer(net):
    mu = RelevanceMeasure(net, torch.randn((1, 1, 8, 8), dtype=torch.float64), 0)
    with pytest.raises(InputError, match="without layer="):
        ClasswiseRelevance(5).update(mu)
    with pytest.raises(InputError, match="upper= and lower="):
        JointRelevance((5, 4), lower="0").update(mu)


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "nrm_plugin.dataset.statistics")
    with pytest.raises(MissingExtraError, match=r"nrm-plugin\[statistics\]"):
        import nrm_plugin.dataset.statistics  # noqa: F401


def counted(rank: int, folder: Path) -> list[torch.Tensor]:
    """The results of one of two processes after both have counted their share of the samples."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=4)
    )
    values = load_file(folder / "values.safetensors")
    mine = slice(0, 13) if rank == 0 else slice(13, None)
    metric, joints, late = ClasswiseRelevance(6, 4), JointRelevance((2, 3)), ClasswiseRelevance(6, 4)
    for rows, labels in zip(values["values"][mine].split(5), values["target"][mine].split(5), strict=True):
        metric.update(rows, labels)
        joints.update(rows.reshape(-1, 2, 3))
        late.update(rows[:rank], labels[:rank])  # the first process has no samples
    results = [*metric.compute(), *joints.compute(), *late.compute()]
    torch.distributed.destroy_process_group()
    return results


OTHER = """
    import pathlib, sys
    from safetensors.torch import save_file
    sys.path.insert(0, sys.argv[2])
    from test_statistics import counted
    folder = pathlib.Path(sys.argv[1])
    results = counted(1, folder)
    save_file({str(place): part for place, part in enumerate(results)}, folder / "found.safetensors")
"""


@pytest.mark.slow
def test_two_processes_have_the_results_of_one(tmp_path):
    draw = torch.Generator().manual_seed(3)
    values = torch.randn((40, 6), generator=draw, dtype=torch.float64)
    target = torch.randint(0, 3, (40,), generator=draw)
    save_file({"values": values, "target": target}, tmp_path / "values.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(OTHER), str(tmp_path), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment) as other:
        first = counted(0, tmp_path)
        assert other.wait(timeout=240) == 0
    parts = load_file(tmp_path / "found.safetensors")
    for results in (first, [parts[str(place)] for place in range(9)]):
        equal(Moments(*results[:3]), *expected(values.numpy(), target.numpy(), 4))
        matrices = values.reshape(-1, 2, 3).numpy()
        assert results[3].item() == 40
        np.testing.assert_allclose(results[4], matrices.mean(0), rtol=1e-10)
        np.testing.assert_allclose(results[5], matrices.var(0, ddof=1), rtol=1e-10)
        seen = [number for number in range(13, 40) if (number - 13) % 5 == 0]
        equal(Moments(*results[6:]), *expected(values[seen].numpy(), target[seen].numpy(), 4))
