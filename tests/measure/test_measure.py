"""The measure compared with enumerated walks: every query of docs/measure.md.

Covers: nrm_plugin.measure.decision_diagram, nrm_plugin.measure.event_masses, nrm_plugin.measure.marginals,
nrm_plugin.measure.query_passes, nrm_plugin.measure.recording_properties,
nrm_plugin.recording.forward_observer, nrm_plugin.recording.recording.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from nrm_plugin import ABSORBED, Event, RelevanceMeasure, at
from nrm_plugin.errors import TargetError
from tests.nets import Case, rule_maps, tiny_net, tiny_nets, zennit_composite
from tests.oracles import Epsilon, Node, Walks, ZPlus, enumerate_walks

POLICIES = [("sink", 2.0), ("redistribute", 1.0), ("redistribute", 2.0), ("redistribute", math.inf)]
NETS = ["chain_mlp", "conv_chain", "conv1d_chain", "skip", "fork", "reused"]

slowly = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
policies = st.sampled_from(POLICIES)


class Both:
    """The measure of a case and its enumerated walks, sample by sample."""

    def __init__(self, case: Case, rules: dict, residual: str, gain_limit: float) -> None:
        self.case, self.rules = case, rules
        composite = zennit_composite(case.spec, rules)
        self.mu = RelevanceMeasure(
            case.net, case.x, start=case.start, composite=composite, residual=residual, gain_limit=gain_limit
        )
        self.walks = [
            enumerate_walks(case.spec, x, s, rules, residual, gain_limit)
            for x, s in zip(case.x, case.start, strict=True)
        ]

    def per_sample(self, query: Callable[[Walks], object]) -> torch.Tensor:
        return torch.as_tensor(np.stack([np.asarray(query(walks)) for walks in self.walks]))

    @property
    def spread(self) -> float:
        return max(walks.variation() for walks in self.walks)

    def agree(self, ours: torch.Tensor, query: Callable[[Walks], object]) -> None:
        expected = self.per_sample(query)
        assert ours.shape == expected.shape
        scale = max(1.0, self.spread)
        assert float((ours - expected).abs().max()) <= 1e-10 * scale


def layer(node: Node, case: Case):
    """The tap of a node of the specification."""
    if case.name == "fork" and node.kind == "stack":
        return at("stack", call=int(node.tap[-1]) - 1)
    calls = sum(other.tap == node.tap for other in case.spec)
    return at(node.tap, call=node.call) if calls > 1 else at(node.tap)


@st.composite
def measured(draw: st.DrawFn, names: list[str] = NETS) -> Both:
    case = draw(tiny_nets(names, max_batch=2))
    rules = draw(rule_maps(case))
    return Both(case, rules, *draw(policies))


@st.composite
def atoms(draw: st.DrawFn, both: Both) -> tuple[Event, Callable[[Walks], np.ndarray]]:
    if draw(st.integers(0, 9)) == 0:
        return ABSORBED, lambda walks: ~walks.survives
    node = draw(st.sampled_from(both.case.spec))
    shape = both.walks[0].shapes[both.case.spec.index(node)]
    size = math.prod(shape)
    chosen = draw(st.sets(st.integers(0, size - 1), max_size=size))
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(chosen)] = True
    if node.module is not None and draw(st.integers(0, 5)) == 0 and is_step(node):
        sink = at(node.tap, side="sink", call=node.call)
        return sink[mask.reshape(shape)], lambda walks: walks.absorbed_in(node.tap, node.call, chosen)
    return layer(node, both.case)[mask.reshape(shape)], lambda walks: walks.crosses(node.tap, node.call, chosen)


def is_step(node: Node) -> bool:
    return node.kind in ("linear", "sum", "avgpool")


@st.composite
def formulas(draw: st.DrawFn, both: Both, depth: int = 3) -> tuple[Event, Callable[[Walks], np.ndarray]]:
    kind = draw(st.sampled_from(["atom", "and", "or", "not", "minus"])) if depth else "atom"
    if kind == "atom":
        return draw(atoms(both))
    left, by_left = draw(formulas(both, depth - 1))
    if kind == "not":
        return ~left, lambda walks: ~by_left(walks)
    right, by_right = draw(formulas(both, depth - 1))
    if kind == "and":
        return left & right, lambda walks: by_left(walks) & by_right(walks)
    if kind == "or":
        return left | right, lambda walks: by_left(walks) | by_right(walks)
    return left - right, lambda walks: by_left(walks) & ~by_right(walks)


@pytest.mark.medium
@slowly
@given(measured())
def test_every_tap_has_the_enumerated_marginal_sink_and_bypass(both: Both) -> None:
    for node in both.case.spec:
        name = layer(node, both.case)
        both.agree(both.mu.marginal(name), lambda walks, n=node: walks.marginal(*n.key))
        split = both.per_sample(lambda walks, n=node: tuple(walks.split(*n.key)))
        assert torch.allclose(both.mu.sink(name), split[:, 1], atol=1e-10 * max(1, both.spread))
        assert torch.allclose(both.mu.bypass(name), split[:, 2], atol=1e-10 * max(1, both.spread))
        both.agree(both.mu.variation(name), lambda walks, n=node: walks.tap_variation(*n.key))


@pytest.mark.medium
@slowly
@given(measured())
def test_mass_sink_and_bypass_of_every_tap_sum_to_one(both: Both) -> None:
    for node in both.case.spec:
        name = layer(node, both.case)
        total = both.mu.marginal(name).flatten(1).sum(1) + both.mu.sink(name) + both.mu.bypass(name)
        assert float((total - 1).abs().max()) <= 1e-10 * max(1, both.spread)


@pytest.mark.medium
@slowly
@given(measured(), st.data())
def test_any_formula_has_the_enumerated_mass(both: Both, data: st.DataObject) -> None:
    drawn = [data.draw(formulas(both)) for _ in range(3)]
    batched = both.mu([event for event, _ in drawn])
    for row, (event, mask) in zip(batched, drawn, strict=True):
        both.agree(row, lambda walks, m=mask: walks.mass(m(walks)))
        both.agree(both.mu(event), lambda walks, m=mask: walks.mass(m(walks)))


@pytest.mark.medium
@slowly
@given(measured(), st.data())
def test_conditionals_are_ratios_of_enumerated_masses(both: Both, data: st.DataObject) -> None:
    (a, in_a), (b, in_b) = data.draw(formulas(both)), data.draw(formulas(both))
    masses = both.per_sample(lambda walks: walks.mass(in_b(walks)))
    assume(float(masses.abs().min()) > 1e-3)
    ours = both.mu(a, given=b, min_ratio=0)
    expected = both.per_sample(lambda walks: walks.conditional(in_a(walks), in_b(walks)))
    assert float((ours - expected).abs().max()) <= 1e-7 * max(1, both.spread)


@pytest.mark.medium
@slowly
@given(measured(), st.data())
def test_joint_maps_are_enumerated_whether_the_event_is_above_or_below(both: Both, data: st.DataObject) -> None:
    event, mask = data.draw(formulas(both))
    for node in both.case.spec:
        ours = both.mu.marginal(layer(node, both.case), joint=event)
        both.agree(ours, lambda walks, n=node: walks.marginal(*n.key, event=mask(walks)))


@pytest.mark.slow
@slowly
@given(measured(), st.data())
def test_maps_of_several_events_equal_those_of_each(both: Both, data: st.DataObject) -> None:
    events = [data.draw(formulas(both))[0] for _ in range(3)]
    node = data.draw(st.sampled_from(both.case.spec))
    name = layer(node, both.case)
    together = both.mu.marginal([name, "input"], joint=events)
    for number, event in enumerate(events):
        assert torch.allclose(together[name][number], both.mu.marginal(name, joint=event), atol=1e-12)
        assert torch.allclose(together["input"][number], both.mu.marginal("input", joint=event), atol=1e-12)


@pytest.mark.medium
@slowly
@given(measured(["chain_mlp", "conv1d_chain", "fork", "skip"]), st.data())
def test_the_transposed_pass_is_the_enumeration_from_each_neuron(both: Both, data: st.DataObject) -> None:
    spec = both.case.spec
    upper = data.draw(st.sampled_from(spec[1:]))
    below = [node for node in spec if upper.key in {spec[n].key for n in both.walks[0].above(*node.key)}]
    lower = data.draw(st.sampled_from(below))
    size = math.prod(both.walks[0].shapes[spec.index(lower)])
    chosen = data.draw(st.sets(st.integers(0, size - 1)))
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(chosen)] = True
    event = layer(lower, both.case)[mask.reshape(both.walks[0].shapes[spec.index(lower)])]
    ours = both.mu.conditional(event, layer(upper, both.case)).flatten(1)
    rules, settings_ = both.rules, both.mu.composite.normalization
    for sample, x in enumerate(both.case.x):
        for neuron in range(ours.shape[1]):
            walks = enumerate_walks(spec, x, neuron, rules, settings_.residual, settings_.gain_limit, top=upper.key)
            expected = walks.mass(walks.crosses(*lower.key, chosen))
            assert abs(float(ours[sample, neuron]) - expected) <= 1e-10 * max(1, walks.variation())


@pytest.mark.medium
@slowly
@given(measured())
def test_walk_variation_is_the_enumerated_one(both: Both) -> None:
    both.agree(both.mu.walk_variation() / both.spread, lambda walks: walks.variation() / both.spread)


@pytest.mark.medium
@slowly
@given(measured(["chain_mlp", "conv_chain", "conv1d_chain", "fork"]), st.data())
def test_the_joint_matrix_of_two_taps_is_enumerated(both: Both, data: st.DataObject) -> None:
    spec = both.case.spec
    upper = data.draw(st.sampled_from(spec[1:]))
    below = [node for node in spec if upper.key in {spec[n].key for n in both.walks[0].above(*node.key)}]
    lower = data.draw(st.sampled_from(below))
    ours = both.mu.joint(layer(upper, both.case), layer(lower, both.case), over="neuron")
    both.agree(ours, lambda walks: walks.joint(upper.key, lower.key))


@pytest.mark.medium
@slowly
@given(measured(), st.data())
def test_mass_is_additive_even_where_it_is_negative(both: Both, data: st.DataObject) -> None:
    (a, _), (b, _) = data.draw(formulas(both)), data.draw(formulas(both))
    mu = both.mu
    assert torch.allclose(mu(a | b) + mu(a & b), mu(a) + mu(b), atol=1e-10 * max(1, both.spread))
    assert torch.allclose(mu(a) + mu(~a), torch.ones_like(mu(a)), atol=1e-10 * max(1, both.spread))
    assert torch.allclose(mu(a - b), mu(a & ~b), atol=1e-12)


@slowly
@given(measured(), st.data())
def test_a_partition_of_a_tap_sums_to_its_mass(both: Both, data: st.DataObject) -> None:
    node = data.draw(st.sampled_from(both.case.spec))
    name = layer(node, both.case)
    shape = both.mu.shape(name)
    size = shape[1:].numel()
    labels = torch.as_tensor(data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)))
    cells = [name[(labels == cell).reshape(shape[1:])] for cell in range(3)]
    assert torch.allclose(both.mu(cells).sum(0), both.mu(name), atol=1e-10 * max(1, both.spread))
    assert torch.allclose(both.mu(cells[0] | cells[1] | cells[2]), both.mu(name), atol=1e-10 * max(1, both.spread))


@pytest.mark.medium
@slowly
@given(measured(), st.data())
def test_chain_rule_and_bayes_both_ways(both: Both, data: st.DataObject) -> None:
    (a, in_a), (b, in_b) = data.draw(formulas(both)), data.draw(formulas(both))
    masses = both.per_sample(lambda walks: (walks.mass(in_a(walks)), walks.mass(in_b(walks))))
    assume(float(masses.abs().min()) > 1e-3)
    mu = both.mu
    joint, tolerance = mu(a & b), 1e-8 * max(1, both.spread)
    assert torch.allclose(mu(a, given=b, min_ratio=0) * mu(b), joint, atol=tolerance)
    assert torch.allclose(mu(b, given=a, min_ratio=0) * mu(a), joint, atol=tolerance)


@pytest.mark.parametrize("name", ["conv_chain", "skip", "fork"])
def test_given_survival_marginals_are_forward_times_backward(name: str) -> None:
    """By contrast, the plain scores of a leaky rule are not the marginals of any measure."""
    for seed in range(20):
        case = tiny_net(name, seed)
        rules = {node.tap: Epsilon(0.3) for node in case.spec if node.kind == "linear"}
        both = Both(case, rules, "sink", 2.0)
        if min(abs(walks.mass(walks.survives)) for walks in both.walks) > 1e-2:
            break
    differs = False
    for node in case.spec[:-1]:
        tap = layer(node, case)
        survived = both.mu.marginal(tap, given=~ABSORBED, min_ratio=0)
        both.agree(survived, lambda walks, n=node: walks.given(walks.survives).marginal(*n.key))
        plain = both.mu.marginal(tap)
        rescaled = plain / both.mu(~ABSORBED).reshape(-1, *(1,) * (plain.ndim - 1))
        differs |= node.tap != "input" and not torch.allclose(rescaled, survived, atol=1e-3)
        totals = plain.flatten(1).sum(1)
        differs |= not torch.allclose(totals, torch.ones_like(totals), atol=1e-3)
    assert differs


def test_lrp_0_on_a_bias_free_relu_net_is_gradient_times_input() -> None:
    case = tiny_net("no_bias_relu", seed=1, batch=3)
    rules = {node.tap: Epsilon(1e-15) for node in case.spec if node.kind == "linear"}
    composite = zennit_composite(case.spec, rules)
    mu = RelevanceMeasure(case.net, case.x, start=case.start, composite=composite, residual="sink")
    x = case.x.clone().requires_grad_()
    output = (case.net(x) * case.start).sum(1)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    expected = (gradient * x / output[:, None]).detach()
    assert torch.allclose(mu.marginal("input"), expected, atol=1e-9 * float(expected.abs().max()))
    assert torch.allclose(mu.output, output.detach())


def test_a_concept_heat_map_in_a_chain_is_the_joint_and_divided_the_conditional() -> None:
    """Concept relevance propagation masks the relevance at a layer and propagates the rest."""
    case = tiny_net("conv_chain", seed=5, batch=2)
    rules = {node.tap: ZPlus() for node in case.spec if node.kind == "linear"}
    composite = zennit_composite(case.spec, rules)
    mu = RelevanceMeasure(case.net, case.x, start=case.start, composite=composite, residual="sink")
    x = case.x.clone().requires_grad_()
    with composite.context(case.net):
        handle = case.net.relu1.register_forward_hook(lambda module, args, output: _keep_channel(output, 1))
        output = case.net(x)
        (heat_map,) = torch.autograd.grad(output, x, case.start)
        handle.remove()
    event = at("relu1")[1]
    assert torch.allclose(mu.marginal("input", joint=event), heat_map, atol=1e-12)
    mass = heat_map.flatten(1).sum(1) + mu(event & ABSORBED)
    conditional = mu.marginal("input", given=event, min_ratio=0)
    assert torch.allclose(conditional, heat_map / mass.reshape(-1, 1, 1, 1), atol=1e-10)


def _keep_channel(output: torch.Tensor, channel: int) -> torch.Tensor:
    output = output.clone()
    mask = torch.zeros_like(output)
    mask[:, channel] = 1
    output.register_hook(lambda relevance: relevance * mask)
    return output


# -- outputs and targets ----------------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head, self.aux = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.hidden(x))
        return {"logits": self.head(hidden), "aux": self.aux(hidden)}


@pytest.fixture(scope="module")
def two_heads() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return TwoHeads().eval(), torch.randn(6, 3)


@pytest.mark.parametrize(("output", "key"), [(None, "logits"), ("aux", "aux")])
def test_the_outputs_are_those_of_the_model(two_heads, output, key) -> None:
    net, x = two_heads
    mu = RelevanceMeasure(net, x, 1, output=output)
    assert torch.equal(mu.outputs, net(x)[key])
    assert not mu.outputs.requires_grad
    torch.testing.assert_close(mu.outputs[:, 1], mu.output)


def test_the_outputs_of_a_measure_from_a_layer_are_those_of_the_layer(two_heads) -> None:
    net, x = two_heads
    mu = RelevanceMeasure(net, x, 2, output=at("hidden"))
    torch.testing.assert_close(mu.outputs, net.hidden(x))


def test_the_outputs_without_samples_have_the_shape_that_the_model_returns() -> None:
    net = nn.Linear(3, 2).eval()
    x = torch.randn(7, 3)
    mu = RelevanceMeasure(net, x, (4, 1), batched=False)
    assert torch.equal(mu.outputs, net(x))


def test_changing_the_outputs_does_not_change_the_measure(two_heads) -> None:
    net, x = two_heads
    mu, other = RelevanceMeasure(net, x, 1), RelevanceMeasure(net, x, 1)
    mu.outputs.zero_()
    assert torch.equal(mu.outputs, net(x)["logits"])
    assert torch.equal(mu.marginal("input"), other.marginal("input"))


@pytest.mark.recorded
def test_a_target_may_be_a_function_of_the_outputs(two_heads) -> None:
    net, x = two_heads
    calls = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    predicted = RelevanceMeasure(net, x, lambda outputs: outputs.argmax(1))
    handle.remove()
    assert len(calls) == 1  # the model runs once
    classes = net(x)["logits"].argmax(1)
    assert len(set(classes.tolist())) > 1
    assert torch.equal(predicted.marginal("input"), RelevanceMeasure(net, x, classes).marginal("input"))


@pytest.mark.parametrize("target", [1, [0, 4, 2, 3, 1, 0], torch.tensor(3), np.array([2] * 6), (2,)])
def test_the_function_may_return_any_target(two_heads, target) -> None:
    net, x = two_heads
    expected = RelevanceMeasure(net, x, target).marginal("input")
    assert torch.equal(RelevanceMeasure(net, x, lambda outputs: target).marginal("input"), expected)


@pytest.mark.recorded
def test_the_function_sees_the_outputs_of_a_graph_as_the_model_returns_them() -> None:
    net = nn.Linear(3, 2).eval()
    x = torch.randn(7, 3)
    shapes = []

    def strongest(outputs: torch.Tensor) -> tuple[int, int]:
        shapes.append(outputs.shape)
        return divmod(int(outputs.argmax()), 2)

    mu = RelevanceMeasure(net, x, strongest, batched=False)
    assert shapes == [(7, 2)]
    assert torch.equal(mu.output, net(x).max().detach().reshape(1))
    scores = nn.Sequential(net, nn.Flatten(0), nn.Unflatten(0, (1, 14))).eval()  # one row of scores for the graph
    row = RelevanceMeasure(scores, x, lambda outputs: 5, batched=False)
    assert float(row.output) == float(scores(x)[0, 5].detach())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("cat", r"returned str: 'cat'. It must return a target"),
        (0.5, "returned float: 0.5"),
        (max, "returned builtin_function_or_method"),
        (None, "must select which of its 5 entries"),
        (torch.ones(6), "dtype torch.float32, but is an index"),
        (9, "target 9 of sample 0 is out of range"),
    ],
)
def test_a_function_that_does_not_return_a_target_raises(two_heads, returned, message) -> None:
    net, x = two_heads
    with pytest.raises(TargetError, match=message):
        RelevanceMeasure(net, x, lambda outputs: returned)
