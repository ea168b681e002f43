"""zennit-crp with a Normalized composite, on its own objects; and its conditions as queries to the measure.

Its wheel pins a Zennit version that is too old, so it is installed without dependencies: `make test-hosts`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from zennit.composites import EpsilonPlusFlat

from benchmarks.default_composite import Net
from benchmarks.faithfulness import latent, planted
from benchmarks.special_case_rows import ROWS
from nrm_plugin import ConceptNRM, Normalized, RelevanceMeasure, at
from nrm_plugin.dataset.example_search import find_references
from tests.conftest import untouched
from tests.nets import tiny_net, zennit_composite
from tests.oracles import enumerate_walks

pytest.importorskip("crp.attribution", reason="zennit-crp is not installed; `make test-hosts` installs it")

from crp.attribution import AttributionGraph, CondAttribution
from crp.concepts import ChannelConcept
from crp.graph import trace_model_graph
from crp.helper import load_maximization, load_statistics
from crp.visualization import FeatureVisualization


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(80, 6)]
    return nn.Sequential(*layers).double().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def heat(model, x, conditions, rules, **options):
    """The result of CondAttribution."""
    leaf = x.clone().requires_grad_()
    with untouched(model):
        return CondAttribution(model)(leaf, conditions, rules, **options)


CONDITIONS = [
    [{"2": [3], "y": [1]}],
    [{"2": [0, 3], "0": [1], "y": [4]}],
    [{"y": [2]}],
    [{"5": [2], "2": [1], "y": [2]}],
]
EVENTS = [at("2")[3], at("2")[[0, 3]] & at("0")[1], None, at("5")[2] & at("2")[1]]


@pytest.mark.parametrize("residual", ["sink", "redistribute"])
@pytest.mark.parametrize("exclude_parallel", [True, False])
@pytest.mark.parametrize(("conditions", "event"), list(zip(CONDITIONS, EVENTS, strict=True)), ids=str)
def test_its_heat_map_in_a_chain_equals_the_joint_marginal(net, x, conditions, event, exclude_parallel, residual):
    rules = Normalized(EpsilonPlusFlat(), residual=residual)
    theirs = heat(net, x, conditions, rules, record_layer=["0"], exclude_parallel=exclude_parallel)
    mu = RelevanceMeasure(net, x, conditions[0]["y"][0], composite=rules)
    scale = mu.output.reshape(-1, 1, 1, 1)
    same(theirs.heatmap, (mu.marginal("input", joint=event) * scale).sum(1))
    if "0" not in conditions[0]:  # for a layer of the condition, the result depends on torch's version
        same(theirs.relevances["0"], mu.marginal("0", joint=event) * scale)
    same(theirs.prediction.detach(), net(x))
    same(ConceptNRM(net, rules).attribute(x, conditions)[0].sum(1), theirs.heatmap)


def test_a_list_of_conditions_equals_each_condition_alone(net, x):
    rules = Normalized(EpsilonPlusFlat())
    conditions = [{"2": [channel], "y": [1]} for channel in range(5)] + [{"0": [2], "y": [0]}, {"y": [0, 3]}]
    ours = ConceptNRM(net, rules).attribute(x, conditions)
    assert ours.shape == (7, 3, 3, 8, 8)
    for number, condition in enumerate(conditions):
        same(ours[number].sum(1), heat(net, x, [condition], rules).heatmap)
    single = x[:1]
    together = heat(net, single, conditions[:5], rules).heatmap
    same(ours[:5, 0].sum(1), together)
    same(ours[:5].sum(0), ConceptNRM(net, rules).attribute(x, [{"y": [1]}])[0])
    given = ConceptNRM(net, rules).attribute(x, conditions[:1], conditional=True, unit="measure")[0]
    mu = RelevanceMeasure(net, x, 1, composite=rules)
    same(given, mu.marginal("input", given=at("2")[0]))


def test_its_generate_and_its_start_layer_work(net, x):
    rules, attribution = Normalized(EpsilonPlusFlat()), CondAttribution(net)
    conditions = [{"2": [channel], "y": [1]} for channel in range(5)]
    leaf = x[:1].clone().requires_grad_()
    maps = [part.heatmap for part in attribution.generate(leaf, conditions, rules, batch_size=2, verbose=False)]
    same(torch.cat(maps), ConceptNRM(net, rules).attribute(x[:1], conditions)[:, 0].sum(1))
    inner = attribution(x.clone().requires_grad_(), [{"2": [3]}], rules, start_layer="2")
    mask = torch.zeros(3, 5, 4, 4, dtype=torch.float64)
    mask[:, 3] = net[:3](x)[:, 3].clamp(min=0)  # the in-place ReLU has overwritten the values that it stored
    mu = RelevanceMeasure(net, x, start=mask, output=at("2"), composite=rules)
    same(inner.heatmap, (mu.marginal("input") * mask.flatten(1).sum(1).reshape(-1, 1, 1, 1)).sum(1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_the_edges_of_its_attribution_graph_are_joint_masses(net, x):
    """Without its own normalization, ``abs_norm``, edges are masses times the output."""
    rules = Normalized(EpsilonPlusFlat())
    sample = x[:1].clone().requires_grad_()
    graph = trace_model_graph(net, x[:1], ["0", "2", "5"])
    attributor = AttributionGraph(CondAttribution(net), graph, {"0": ChannelConcept(), "2": ChannelConcept()})
    nodes, connections = attributor(sample, rules, 3, "2", 1, width=[4], abs_norm=False)
    mu = RelevanceMeasure(net, x[:1], 1, composite=rules)
    joint = mu.joint("2", "0")[0, 3] * mu.output
    edges = {target[1]: value for target, value in _edges(connections, ("2", 3))}
    assert set(edges) == set(range(4))
    for channel, value in edges.items():
        assert float(value) == pytest.approx(float(joint[channel]), rel=1e-6, abs=1e-12)
    assert {("2", 3), ("0", 0)} <= {tuple(node[:2]) for node in nodes}


def _edges(connections, parent):
    return [((layer, channel), value) for layer, channel, value in connections[parent]]


# -- walks that bypass the layer of the condition -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_at_a_skip_connection_the_oracle_agrees_with_the_measure(seed):
    """With ``exclude_parallel=False``, zennit-crp masks within one full pass, so walks over the skip connection count.

    With ``exclude_parallel=True`` it starts again at the layer and agrees with the measure.
    """
    case = tiny_net("skip", seed=seed, batch=1)
    target = int(case.start[0].argmax())
    rules = Normalized(zennit_composite(case.spec), residual="sink")
    walks = enumerate_walks(case.spec, case.x[0], case.start[0], residual="sink")
    case.net.requires_grad_(False)  # CondAttribution does so permanently
    scale = float(case.net(case.x)[0, target])
    size = case.net.block.conv2.out_channels
    for channel in range(size):
        shape = walks.marginal("block.conv2").shape
        inside = torch.arange(torch.Size(shape).numel()).reshape(shape)[channel].flatten().tolist()
        event = walks.crosses("block.conv2", indices=inside)
        expected = torch.as_tensor(walks.marginal("input", event=event)) * scale
        condition = [{"block.conv2": [channel], "y": [target]}]
        ours = ConceptNRM(case.net, rules).attribute(case.x, condition)[0, 0]
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
        excluded = heat(case.net, case.x, condition, rules, exclude_parallel=True).heatmap[0]
        torch.testing.assert_close(excluded, expected.sum(0), rtol=1e-8, atol=1e-10)
        mixed = heat(case.net, case.x, condition, rules, exclude_parallel=False).heatmap[0]
        with_bypass = torch.as_tensor(walks.marginal("input", event=event | ~walks.crosses("block.conv2"))) * scale
        torch.testing.assert_close(mixed, with_bypass.sum(0), rtol=1e-8, atol=1e-10)
        assert float((mixed - expected.sum(0)).abs().max()) > 1e-6


def test_conditions_of_another_form_raise(net, x):
    from nrm_plugin.errors import EventError, UnknownLayerError

    explainer = ConceptNRM(net)
    for conditions, words in (
        ([], "no condition"),
        ([("2", [3])], "a condition is a mapping"),
        ([{"2": "3", "y": [1]}], "list of channel numbers"),
        ([{"2": [0.5], "y": [1]}], "list of channel numbers"),
        ([{"2": [3], "y": [99]}], "'y' names output 99"),
        ([{"2": [99], "y": [1]}], "99"),
    ):
        with untouched(net, x), pytest.raises(EventError, match=words):
            explainer.attribute(x, conditions)
    with pytest.raises(UnknownLayerError, match="'7'"):
        explainer.attribute(x, [{"7": [3], "y": [1]}])


@pytest.mark.parametrize("row", [row for row in ROWS if row.needs == "crp"], ids=lambda row: row.method)
def test_the_expression_on_the_page_of_special_cases_equals_its_result(row):
    assert row.difference() <= row.tolerance


def test_the_migration_page_runs_with_it_installed():
    """Its snippets are marked ``py``; those of this package, marked ``python``, are also tested without it."""
    page = (Path(__file__).parents[2] / "docs/from-zennit-crp.md").read_text()
    snippets = re.findall(r"```(?:py|python)\n(.*?)```", page, re.S)
    assert len(snippets) == 4
    exec(compile("\n".join(snippets), "from-zennit-crp.md", "exec"), {})


# -- its use in the faithfulness benchmark --------------------------------------------------------------------------


def test_its_relevance_of_channels_equals_ours_in_units_of_the_layer(net, x):
    target = net(x).argmax(1)
    theirs = latent.concept_relevance(net, ["1", "3"], x, target)
    mu = RelevanceMeasure(net, x, target, composite=EpsilonPlusFlat(), residual="sink")
    for layer, part in zip(["1", "3"], theirs, strict=True):
        ours = mu.marginal(layer).sum((2, 3))
        expected = ours / ours.abs().sum(1, keepdim=True) * mu.output.sign()[:, None]
        torch.testing.assert_close(part, expected, rtol=1e-7, atol=1e-12)  # it adds 1e-10 to the sum


def test_its_edges_equal_our_joint_with_a_sink():
    body, weight, bias = planted.streams_net(), torch.randn(3, 4, 8), torch.randn(3, 4)
    dense, _ = planted.plant(body, weight, bias, 0.05)
    dense.double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    net = Net("planted", dense, images, torch.arange(2), torch.zeros(1, 3, 1, 1), 1.0)
    for rules in planted.CONCEPTS.values():
        mu = RelevanceMeasure(dense, images, net.target, composite=rules(), residual="sink")
        for upper, lower in [(1, 0), (3, 0)]:
            theirs = planted.concept_edges(net, images, net.target, (upper, lower), rules())
            assert float(theirs.abs().max()) > 1e-3
            ours = mu.joint(planted.LAYERS[upper], planted.LAYERS[lower]) * mu.output[:, None, None]
            torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-9)


# -- reference examples ---------------------------------------------------------------------------------------------


def same_references(ours, samples, values, positions):
    """Checks that all values, and the samples of unique values, are equal; returns the share of unique values."""
    samples, values, positions = (torch.as_tensor(part.copy()).T for part in (samples, values, positions))
    torch.testing.assert_close(ours.values[:, : values.shape[1]], values, rtol=1e-6, atol=1e-12)  # it adds 1e-10
    compared = 0
    for group, row in enumerate(values):
        gaps = (row.diff().abs() > 1e-8).tolist()
        unique = [a and b for a, b in zip([True, *gaps], [*gaps, True], strict=True)]
        for rank, is_unique in enumerate(unique):
            if is_unique:
                compared += 1
                assert int(ours.samples[group, rank]) == int(samples[group, rank])
                assert int(ours.positions[group, rank]) == int(positions[group, rank])
    return compared / values.numel()


@pytest.mark.parametrize("abs_norm", [True, False])
@pytest.mark.parametrize("max_target", ["sum", "max"])
def test_our_references_equal_those_of_its_feature_visualization(net, tmp_path, max_target, abs_norm, capsys):
    draw = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn((90, 3, 8, 8), generator=draw, dtype=torch.float64),
                         torch.randint(0, 6, (90,), generator=draw))  # fmt: skip
    rules, layers = EpsilonPlusFlat(), ["0", "2"]
    concepts = {layer: ChannelConcept() for layer in layers}
    theirs = FeatureVisualization(
        CondAttribution(net), data, concepts, max_target=max_target, abs_norm=abs_norm, path=str(tmp_path)
    )
    theirs.run(rules, 0, len(data), batch_size=12)
    unit = "layer" if abs_norm else "output"
    options = {"composite": rules, "residual": "sink", "reduce": max_target, "batch_size": 17}
    with untouched(net):
        ours = find_references(net, data, layers, 40, unit=unit, **options)
    for layer in layers:
        for by, most, stats in (
            ("relevance", theirs.RelMax, theirs.RelStats),
            ("activation", theirs.ActMax, theirs.ActStats),
        ):
            assert same_references(ours.of(layer, by), *load_maximization(most.PATH, layer)) > 0.85
            for target in range(6):
                stored = load_statistics(stats.PATH, layer, target)
                assert same_references(ours.of(layer, by, target), *stored) > 0.85
