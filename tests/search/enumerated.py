"""Measures of one sample with the enumerated masses of all walks over groups, which test the results of searches."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import nn

from nrm_plugin import RelevanceMeasure
from nrm_plugin.errors import EventError
from tests.nets import rule_maps, tiny_nets, zennit_composite
from tests.oracles import enumerate_walks

NETS = ["chain_mlp", "conv_chain", "conv1d_chain", "skip", "no_bias_relu"]
slowly = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


class Enumerated:
    """A measure of one sample, some of its layers, and the joint relevance of their groups by enumeration."""

    def __init__(self, case, rules, residual, gain_limit, layers, over):
        composite = zennit_composite(case.spec, rules)
        self.mu = RelevanceMeasure(
            case.net, case.x, start=case.start, composite=composite, residual=residual, gain_limit=gain_limit
        )
        self.layers, self.over = layers, over
        walks = enumerate_walks(case.spec, case.x[0], case.start[0], rules, residual, gain_limit)
        self.spread = max(1.0, walks.variation())
        joint = walks.joint(*((name, 0) for name in layers))
        for axis, name in enumerate(layers):
            shape = walks.shapes[walks.node(name)]
            if over == "channel":
                parts = np.split(joint, shape[0], axis)
                joint = np.concatenate([part.sum(axis, keepdims=True) for part in parts], axis)
        self.joint = joint

    def check(self, top):
        """Checks masses, distinctness, bound and certificates of a result; returns all absolute masses in order."""
        masses = np.abs(self.joint).flatten()
        tolerance = 1e-9 * self.spread
        groups = [walk.groups for walk in top.walks]
        assert len(set(groups)) == len(groups)
        for walk in top.walks:
            assert abs(walk.mass - self.joint[walk.groups]) <= tolerance
        rest = [abs(self.joint[place]) for place in np.ndindex(*self.joint.shape) if place not in set(groups)]
        assert max(rest, default=0.0) <= top.missed + tolerance
        ranked = np.sort(masses)[::-1]
        for number, walk in enumerate(top.walks):
            assert walk.certified == (abs(walk.mass) >= top.missed)
            if walk.certified:
                assert abs(abs(walk.mass) - ranked[number]) <= tolerance
        return ranked


@st.composite
def enumerated(draw, names=NETS, rules=None):
    case = draw(tiny_nets(names, max_batch=1))
    chosen = draw(rule_maps(case)) if rules is None else rules(case)
    taps = [node.tap for node in case.spec if node.kind != "stack"][::-1]
    picked = draw(st.lists(st.sampled_from(taps), min_size=1, max_size=4, unique=True))
    layers = sorted(picked, key=taps.index)
    policy = draw(st.sampled_from([("sink", 2.0), ("redistribute", 1.0), ("redistribute", 2.0)]))
    return Enumerated(case, chosen, *policy, layers, draw(st.sampled_from(["channel", "neuron"])))


def ordered(search):
    """The result of a search; discards cases with layers on two branches, neither of which is below the other."""
    try:
        return search()
    except EventError:
        assume(False)


def conv_net(channels=(6, 8, 7, 5), seed=0):
    """Layers 6, 4, 2 and 0 of 5, 7, 8 and 6 channels."""
    torch.manual_seed(seed)
    layers = []
    for below, above in itertools.pairwise((1, *channels)):
        layers += [nn.Conv2d(below, above, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * 36, 3)).eval()
