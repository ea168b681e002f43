"""Groups found on a stored sweep, and its flows over groups, against the measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nrm_plugin import find_groups, patches
from nrm_plugin.dataset import Sweep
from nrm_plugin.dataset.glocal import flow_of_sweep, mean_flow
from nrm_plugin.errors import InputError
from nrm_plugin.measure.flow_graph import FlowError
from tests.dataset.test_glocal import LAYERS, batches, cuts, data, net, same, stored  # noqa: F401


@pytest.mark.medium
@pytest.mark.parametrize("target", [None, 1])
def test_groups_of_a_sweep_are_those_of_its_measures(net, data, stored, target):  # noqa: F811
    means = Sweep.open(stored).mean_joints(LAYERS, target)
    measures = batches(net, data, 4, lambda y: target in (None, y))
    expected = find_groups(measures, LAYERS, 2, {"input": patches((4, 4), 2)})
    groups = find_groups(means, LAYERS, 2)
    assert all(torch.equal(one, two) for one, two in zip(groups.labels, expected.labels, strict=True))
    assert groups.samples == expected.samples
    np.testing.assert_allclose(groups.kappas, expected.kappas, rtol=1e-6)
    assert groups.examples[0] == ()
    if target is None:
        assert find_groups(Sweep.open(stored), LAYERS, 2) == groups


@pytest.mark.medium
def test_a_flow_of_a_sweep_over_groups_is_that_of_the_measures(net, data, stored):  # noqa: F811
    groups = find_groups(Sweep.open(stored), LAYERS, 2)
    graph = flow_of_sweep(stored, LAYERS, groups=groups, top=None)
    same(graph, mean_flow(batches(net, data, 5), LAYERS, groups=groups, top=None), carried=False)
    assert cuts(graph) == pytest.approx([1] * 4)
    assert len(graph.layers[1].groups) == 2
    other = find_groups(batches(net, data, 5), LAYERS[1:], 2, {"body.0": "position"})
    with pytest.raises(InputError, match="the sweep stores"):
        flow_of_sweep(stored, LAYERS, groups=other)


def test_missing_queries_and_samples_raise(stored):  # noqa: F811
    with pytest.raises(FlowError, match="the sweep has no Joint"):
        find_groups(Sweep.open(stored), ["output", "body.0"])
    with pytest.raises(FlowError, match="no samples with target 9"):
        Sweep.open(stored).mean_joints(LAYERS, 9)
