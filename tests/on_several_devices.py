"""Measures of models on several pretended devices equal those of the same models on the CPU.

tests/test_several_devices.py runs this file in a process of its own, because the pretended devices stay in the process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import nrm_plugin as nrm
from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.dataset.evaluation import Evaluation
from nrm_plugin.dataset.example_search import find_references
from nrm_plugin.dataset.glocal import mean_flow
from nrm_plugin.dataset.mean_conditionals import MeanConditionals
from nrm_plugin.dataset.queries import Activation, Conditional, EventMass, Joint, Maps, Marginal, Peak, Sink
from nrm_plugin.dataset.statistics import ClasswiseRelevance
from nrm_plugin.errors import RandomnessWarning
from nrm_plugin.measure.flow_heat_maps import mapped_flow
from nrm_plugin.measure.layer_averages import layer_average
from nrm_plugin.model.autocast import asked, exact
from nrm_plugin.model.devices import random_states
from tests.feature_nets import Decoder, random_dictionary

pytestmark = pytest.mark.filterwarnings("ignore:PRETEND reports that you have 2 available devices")

CPU, FIRST, SECOND = "cpu", "pretend:0", "pretend:1"
LAYOUTS = [(FIRST, SECOND), (CPU, FIRST), (SECOND, CPU)]


class Net(nn.Module):
    """Convolutions, batch norm, a skip connection, attention and a gate, alternating between two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.skip = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)
        self.body, self.gate = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 6)
        self.attention, self.scale = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem.weight.device, self.body.weight.device
        y = self.norm(self.stem(x)).relu()
        y = self.body(y.to(second)).relu().to(first) + self.skip(y)
        y = nn.functional.max_pool2d(y, 2).flatten(2).transpose(1, 2).to(second)
        y = self.scale(y + self.attention(y, y, y)[0])
        y = y * self.gate(y.to(first)).sigmoid().to(second)
        return self.head(y.mean(1))

    @staticmethod
    def on(first: str, second: str) -> Net:
        torch.manual_seed(0)
        net = Net().eval().double()
        net.norm.running_mean.normal_(), net.norm.running_var.uniform_(0.5, 2)
        for name, layer in net.named_children():
            layer.to(first if name in ("stem", "norm", "skip", "gate") else second)
        return net


def decoder_on(first: str, second: str) -> nn.Module:
    """A transformer whose two blocks are on two devices, as Accelerate distributes it."""
    net = Decoder(seed=1).eval().double()
    net.embed.to(first), net.blocks[0].to(first)
    net.place = nn.Parameter(net.place.to(first))
    for part in (net.blocks[1], net.norm, net.head):
        part.to(second)
        part.register_forward_pre_hook(lambda module, args: (args[0].to(second),))
    return net


torch.manual_seed(1)
X, REFERENCE, OTHER = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
IDS = torch.tensor([[1, 4, 2, 7], [3, 3, 9, 0]])
TAPS = ["input", "stem", "norm", "body", "skip", "attention", "scale", "gate", "output"]
A, B, C = at("body").channel([1, 3]), at("stem").channel(2), at("scale").channel(1)


def mask(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 3 == 0


CORE: dict[str, Callable[[RelevanceMeasure], Any]] = {
    "marginals": lambda mu: mu.marginal(TAPS),
    "events": lambda mu: [mu(A & B), mu(~A - B), mu(at("body").channel(mask(6)) | C), mu(nrm.ABSORBED)],
    "given": lambda mu: [mu.marginal("stem", given=A), mu.marginal("scale", joint=B)],
    "joint": lambda mu: mu.joint("scale", "stem"),
    "absorbed": lambda mu: [mu.sink("input"), mu.bypass("gate"), mu.variation("stem"), mu.output],
}
QUERIES = {
    **CORE,
    "single marginals": lambda mu: [mu.marginal(tap) for tap in TAPS],
    "groups": lambda mu: [mu.marginal("body", over="channel"), mu.marginal("stem", over=mask(4, 1, 1).long())],
    "masks": lambda mu: [mu(at("body", side="input")[1]), mu(at("body")[mask(6, 4, 4)] & ~B)],
    "conditions": lambda mu: [mu(A, given=B), mu(B, given=A), mu.marginal("stem", given=~nrm.ABSORBED)],
    "conditional": lambda mu: [mu.conditional(B, "scale"), mu.conditional(B)["body"]],
    "joint of positions": lambda mu: mu.joint("scale", "stem", over=("channel", "position")),
    "joint of labels": lambda mu: mu.joint("body", "input", over=(mask(6, 1, 1).long(), "channel")),
    "joints": lambda mu: mu.joints(["head", "scale", "body", "stem"]),
    "sinks": lambda mu: [sum(mu.sinks(kind).values(), 0 * mu.output) for kind in ("residual", "constants")],
    "walk variation": lambda mu: mu.walk_variation(),
}
"""Questions to a measure. Masks and labels are on the CPU."""

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": {"reference": REFERENCE},
    "classes": {"target": [1, 3]},
    "function": {"target": lambda outputs: outputs.argmax(1)},
    "start": {"target": None, "start": torch.tensor([[0.0, 2, 1, 0, -1]] * 2, dtype=torch.float64)},
    "against a class": {"against": 0},
    "against the rest": {"against": "rest"},
    "tangents": {"reference": REFERENCE, "slopes": "tangent"},
    "rules on differences": {"reference": REFERENCE, "composite": nrm.NRMDefault()},
    "references": {"reference": [REFERENCE, OTHER]},
    "rest and reference": {"reference": REFERENCE, "against": "rest"},
    "plus flat": {"composite": nrm.NRMEpsilonPlusFlat()},
    "gamma box": {"composite": nrm.NRMEpsilonGammaBox(low=-3.0, high=3.0)},
    "alpha beta": {"composite": nrm.NRMEpsilonAlpha2Beta1()},
    "absolute": {"composite": nrm.NRMAbsolute()},
    "relative": {"composite": nrm.NRMRelative()},
    "sink": {"residual": "sink"},
    "halves": {"composite": nrm.Normalized(nrm.NRMDefault(), attention="halves")},
    "fused": {"composite": nrm.NRMDefault(canonizers=[nrm.FuseBatchNorm()])},
    "in parts": {"max_memory": 3000},
    "reference in parts": {"reference": REFERENCE, "max_memory": 3000},
    "one sample": {"batched": False, "target": (0, 1)},
}
"""Arguments of a measure."""


def on(device: str, value: Any) -> Any:
    """The arguments, with inputs moved to a device. Other tensors stay on the CPU."""
    is_input = any(value is tensor for tensor in (X, REFERENCE, OTHER))
    return value.to(device) if is_input else [on(device, item) for item in value] if isinstance(value, list) else value


@functools.cache
def measure(layout: tuple[str, str], name: str = "default") -> RelevanceMeasure:
    settings = {"target": 1, **{key: on(layout[0], value) for key, value in SETTINGS[name].items()}}
    return RelevanceMeasure(Net.on(*layout), X.to(layout[0]), **settings)


def plain(value: Any) -> Any:
    """Results as nested lists of tensors and numbers."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return torch.as_tensor(value) if isinstance(value, np.ndarray) else value


def check_same(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    pairs = list(zip(tree_leaves(plain(found)), tree_leaves(plain(expected)), strict=True))
    assert pairs
    for one, other in pairs:
        assert isinstance(one, Tensor) == isinstance(other, Tensor)
        if isinstance(one, Tensor):
            torch.testing.assert_close(one.cpu(), other.cpu(), rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert one == (pytest.approx(other, rel=tolerance, nan_ok=True) if isinstance(one, float) else other)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("name", ["default", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_queries(layout, name, query):
    ask = QUERIES[query]
    check_same(ask(measure(layout, name)), ask(measure((CPU, CPU), name)))


@pytest.mark.parametrize("name", list(SETTINGS)[2:])
def test_all_settings(name):
    for ask in CORE.values():
        check_same(ask(measure(LAYOUTS[0], name)), ask(measure((CPU, CPU), name)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_on_the_device_of_their_tap(layout):
    mu, net = measure(layout), Net.on(*layout)
    for tap, values in mu.marginal(TAPS[1:-1]).items():
        where = [parameter.device for parameter in net.get_submodule(tap).parameters()]
        assert values.device == mu.conditional(B).get(tap, values).device == where[0]
    totals = [mu(A), mu(A & B), mu.sink("stem"), mu.bypass("stem"), mu.output, mu.outputs, mu.walk_variation()]
    assert {total.device for total in totals} == {torch.device(layout[1])}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sinks_are_events(layout):
    for event in (at("gate", side="sink"), at("body", side="sink") & C):
        check_same(measure(layout)(event), measure((CPU, CPU))(event))


LAYERS = ["scale", "body", "stem"]


def planned(net: Net, x: Tensor, **settings: Any) -> list[Any]:
    plan, results = nrm.Plan(net, x), []
    for shift in (0, 0.1, 0.2):
        mu = plan(x + shift, target=1, **settings)
        results += [mu.marginal(LAYERS), mu(A & B), mu.joint("body", "stem"), mu.sink("input")]
    return results


def ablated(net: Net, x: Tensor, fill: str) -> Tensor:
    reference = {layer: values.cpu() for layer, values in nrm.activations(net, x, ["body", "stem"]).items()}
    with nrm.ablation(net, {"body": mask(6), "stem": mask(4)}, fill, reference):
        return net(x)


def swept(net: Net, x: Tensor) -> Any:
    queries = [
        *(Marginal("body", "channel"), Marginal("stem", "channel", given=A), Maps("stem"), Joint("body", "stem")),
        *(EventMass(A & B), EventMass(B, given=A), Conditional(B, "scale"), Sink("stem")),
        *(Activation("stem"), Activation("body"), Peak("stem"), Peak("body", of="activation")),
    ]
    return Evaluation(net, queries, nrm.NRMDefault(), 1, against=0)([0, 1], (x.cpu(), 1)).values


def in_subspaces(net: Net, x: Tensor) -> Any:
    values = nrm.activations(net, x, ["skip"])["skip"]
    fitted = nrm.prca(values, nrm.RelevanceMeasure(net, x, 1).marginal("skip"), [1, 2])
    given = nrm.Subspaces(torch.eye(4, dtype=torch.float64)[:, :2], (1, 1))
    mu = RelevanceMeasure(nrm.with_subspaces(net, {"skip": fitted, "norm": given}), x, 1)
    return [mu.marginal("skip.subspaces", over="channel"), mu.joint("skip.subspaces", "norm.subspaces")]


def differentiated(net: Net, x: Tensor) -> Tensor:
    with nrm.NRMEpsilonPlus().context(net) as modified:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(modified(leaf)[:, 1].sum(), leaf)[0]


def ranked(net: Net, x: Tensor) -> Tensor:
    batches = [(x.cpu(), torch.tensor([1, 2]))]
    return find_references(net, batches, LAYERS[1:], unit="output", device=x.device).of("stem").values


def updated(metric: Any, *arguments: Any) -> Any:
    metric.update(*arguments)
    return metric.compute()


def of(net: Net, x: Tensor, **settings: Any) -> RelevanceMeasure:
    return RelevanceMeasure(net, x, 1, **settings)


FULL = {"return_convergence_delta": True, "return_sink": True}
TOOLS: dict[str, Callable[[Net, Tensor], Any]] = {
    "flow": lambda net, x: of(net, x[:1]).flow(["output", *LAYERS], top=2),
    "flow of groups": lambda net, x: of(net, x[:1]).flow(LAYERS, over="groups", k=2),
    "flow with maps": lambda net, x: mapped_flow(of(net, x[:1]), LAYERS),
    "mean flow": lambda net, x: mean_flow([of(net, x[:1]), of(net, x[1:])], LAYERS),
    "groups": lambda net, x: nrm.find_groups(of(net, x), LAYERS, k=2).labels,
    "walks": lambda net, x: [nrm.top_walks(of(net, x[:1], max_memory=m), LAYERS, 3).mass for m in (None, 3000)],
    "best walks": lambda net, x: nrm.top_walks(of(net, x[:1], composite=nrm.NRMAbsolute()), k=2, over="neuron").mass,
    "sets": lambda net, x: str(nrm.top_sets(of(net, x[:1]), ["scale", "body"], [2, 2])),
    "selection": lambda net, x: nrm.select_neurons(of(net, x), LAYERS, error={"smape": 50.0}, rounds=2).kept,
    "ablation": lambda net, x: [ablated(net, x, fill) for fill in ("zero", "mean", "resample")],
    "layer average": lambda net, x: layer_average(of(net, x), ["body", "skip", "stem"]),
    "NRM": lambda net, x: nrm.NRM(net).attribute(x, target=1, baselines=0.0, **FULL),
    "LayerNRM": lambda net, x: nrm.LayerNRM(net, [net.stem, net.body]).attribute(x, target=1, **FULL),
    "NeuronNRM": lambda net, x: nrm.NeuronNRM(net, net.gate).attribute(x, (1, 2)),
    "JointNRM": lambda net, x: nrm.JointNRM(net, net.body, net.stem).attribute(x, target=1),
    "DataLoaderNRM": lambda net, x: nrm.DataLoaderNRM(nrm.NRM(net)).attribute([(x,), (x,)], target=1),
    "ConceptNRM": lambda net, x: nrm.ConceptNRM(net).attribute(x, [{"y": 1, "body": [1], "stem": [2]}]),
    "gradient": differentiated,
    "plan": planned,
    "plan with reference": lambda net, x: planned(net, x, reference=x.flip(0)),
    "subspaces": in_subspaces,
    "bfloat16": lambda net, x: [
        of(net.bfloat16(), x.bfloat16()).marginal(LAYERS),
        of(net, x.bfloat16()).joint(*LAYERS[:2]),
    ],
    "attention sinks": lambda net, x: nrm.attention_sinks(of(net, x), "attention"),
    "deconvolution": lambda net, x: nrm.reconstruct(net, x, at("body").channel(1)).images,
    "sweep": swept,
    "references": ranked,
    "mean conditionals": lambda net, x: updated(MeanConditionals((6, 4), "body", "stem"), of(net, x)).matrix,
    "mean relevance": lambda net, x: updated(ClasswiseRelevance(6, 5, "body"), of(net, x), torch.tensor([1, 2])).mean,
}
"""Functions and classes that use measures."""


@pytest.mark.parametrize("name", TOOLS)
def test_all_tools(name):
    check_same(TOOLS[name](Net.on(*LAYOUTS[0]), X.to(FIRST)), TOOLS[name](Net.on(CPU, CPU), X))


def of_decoder(layout: tuple[str, str], ids: Tensor, **settings: Any) -> list[Any]:
    net = decoder_on(*layout)
    mu = RelevanceMeasure(net, ids.to(layout[0]), (-1, 3), **settings)
    heads = at("blocks.1.attn").head(1).pair(3, 0), at("blocks.0.attn").head(0)
    sites = [] if settings else [mu.marginal(site) for site in mu.sites]
    return [mu.marginal("blocks.0"), mu(heads[0] & heads[1]), mu.joint("blocks.1", "blocks.0.mlp.0"), *sites]


@pytest.mark.parametrize("settings", [{}, {"max_memory": 2000}, {"reference": IDS.flip(0)}], ids=str)
def test_transformers(settings):
    moved = {key: value.to(FIRST) if isinstance(value, Tensor) else value for key, value in settings.items()}
    check_same(of_decoder(LAYOUTS[0], IDS, **moved), of_decoder((CPU, CPU), IDS, **settings))


@pytest.mark.parametrize("layer", ["mlp", "mlp.1"])
def test_features_are_on_the_device_of_their_layer(layer):
    def answers(layout: tuple[str, str]) -> list[Any]:
        net = decoder_on(*layout)
        width = 8 if layer == "mlp" else 16
        dictionary = random_dictionary(width, 12, 1)
        model = nrm.with_features(net, {f"blocks.{k}.{layer}": dictionary for k in range(2)})
        mu = RelevanceMeasure(model, IDS.to(layout[0]), (-1, 3))
        return [mu.marginal(f"blocks.{k}.{layer}.features") for k in range(2)] + [nrm.completeness(mu, model)]

    check_same(answers(LAYOUTS[0]), answers((CPU, CPU)))


class TimeFirst(nn.Module):
    """Recurrent layers and attention over the first dimension, on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(8, 6), nn.TransformerEncoderLayer(6, 2, 12)

    def forward(self, x: Tensor) -> Tensor:
        states = self.first(x.transpose(0, 1))[0]
        return self.second(states.to(self.second.linear1.weight.device)).to(x.device).mean(0)


def test_samples_are_found_on_all_devices():
    def answers(first: str, second: str) -> list[Any]:
        torch.manual_seed(2)
        net = TimeFirst().eval().double()
        net.first.to(first), net.second.to(second)
        x = torch.randn(2, 4, 8, dtype=torch.float64).to(first)
        mu = of(net, x)
        return [mu.marginal(["input", "first", "second.linear1"]), mu.joint("second", "first"), mu.outputs]

    check_same(answers(FIRST, SECOND), answers(CPU, CPU))


@pytest.mark.parametrize("layout", [*LAYOUTS, (CPU, CPU)])
def test_layers_under_autocast(layout):
    """Only layers on devices of the type of the autocast run in half precision."""
    net, x = Net.on(*layout).float(), X.float().to(layout[0])
    full = of(net, x).marginal("stem")
    for kind in ("cpu", "pretend"):
        with torch.autocast(kind, torch.bfloat16):
            mu = of(net, x)
            short = mu.marginal("stem")
        is_used = any(torch.device(device).type == kind for device in layout)
        assert torch.equal(short.cpu(), full.cpu()) is not is_used
        assert short.dtype == torch.float32
        torch.testing.assert_close(short, full, rtol=0, atol=0.05)


def test_the_dtype_of_autocast_is_known_for_each_type_of_device():
    with torch.autocast("pretend", torch.float16):
        assert asked() == {"pretend": torch.float16}
        with torch.autocast("cpu", torch.bfloat16):
            assert asked() == {"cpu": torch.bfloat16, "pretend": torch.float16}
            with exact():
                assert asked() == {}
    assert asked() == {}


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).to(FIRST), nn.Linear(4, 2).to(SECOND)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).to(SECOND)
        return self.second(y * torch.rand(y.shape[1:], device=SECOND))


def test_random_draws_on_another_device_than_the_input_are_noticed_and_undone():
    before = random_states()
    assert len(before) == 3
    with pytest.warns(RandomnessWarning):
        mu = of(Drawing().eval(), torch.randn(2, 3).to(FIRST), max_memory=1)
    after = random_states()
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])
    torch.testing.assert_close(mu(at("first")), torch.ones(2).to(SECOND), rtol=0, atol=1)


# -- the pretended devices themselves ---------------------------------------------------------------------------------

ONE, TWO, HERE, INDEX = torch.ones(3, device=FIRST), torch.ones(3, device=SECOND), torch.ones(3), torch.tensor([0, 2])
NUMBER = torch.tensor(2.0)
ACCEPTED: dict[str, Callable[[], Any]] = {
    "numbers on the CPU": lambda: (ONE * NUMBER, FIRST),
    "numbers in torch.where": lambda: (torch.where(ONE > 0, ONE, NUMBER), FIRST),
    "indices on the CPU": lambda: (ONE[INDEX], FIRST),
    "masks on the CPU": lambda: (ONE[HERE > 0], FIRST),
    "copies": lambda: (HERE.clone().copy_(TWO), CPU),
    "moves": lambda: (ONE.to(TWO), SECOND),
    "new tensors": lambda: (TWO.new_tensor([1.0]) + torch.tensor([1.0], device=SECOND), SECOND),
    "ranges": lambda: (torch.arange(3, device=SECOND) + torch.eye(3, device=SECOND), SECOND),
}
REJECTED: dict[str, Callable[[], Any]] = {
    "two devices": lambda: ONE + TWO,
    "a vector on the CPU": lambda: ONE + HERE,
    "a number elsewhere": lambda: HERE + ONE.sum(),
    "a written vector": lambda: HERE.clone().add_(ONE.sum()),
    "a number that is no element": lambda: torch.clamp(ONE, min=NUMBER),
    "concatenation": lambda: torch.cat([ONE, TWO]),
    "a matrix product": lambda: ONE @ HERE,
    "an index_select": lambda: ONE.index_select(0, INDEX),
    "an index elsewhere": lambda: HERE[INDEX.to(FIRST)],
    "an embedding": lambda: nn.functional.embedding(INDEX, torch.ones(3, 2, device=FIRST)),
    "a generator of the CPU": lambda: torch.rand(3, device=FIRST, generator=torch.Generator()),
    "NumPy": lambda: ONE.numpy(),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    result, device = ACCEPTED[name]()
    assert result.device == torch.device(device)


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name):
    with pytest.raises((RuntimeError, TypeError)):
        REJECTED[name]()


def test_gradients_are_on_the_device_of_their_tensor():
    leaf = torch.ones(3, device=FIRST, requires_grad=True)
    (leaf.to(SECOND) * TWO * 2).sum().cpu().backward()
    assert leaf.grad.device == leaf.device
    assert leaf.grad.tolist() == [2.0] * 3
