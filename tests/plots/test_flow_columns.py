"""Selection of the nodes of a flow that are drawn."""

from __future__ import annotations

import numpy as np

from nrm_plugin.measure.flow_graph import FlowGraph
from nrm_plugin.plots.flow_columns import without_output
from tests.plots.test_flow_caption import layer


def test_the_output_of_a_difference_is_not_drawn():
    output, above, below = (layer(name, ("1", "2"), (0.5, -0.5)) for name in ("output", "conv", "input"))
    graph = FlowGraph((output, above, below), (np.ones((4, 4)), np.eye(4)))
    drawn = without_output(graph)
    assert [one.name for one in drawn.layers] == ["conv", "input"]
    np.testing.assert_array_equal(drawn.joints[0], np.eye(4))
    two = FlowGraph((output, below), (np.ones((4, 4)),))
    assert without_output(two) is two
    assert without_output(drawn) is drawn
