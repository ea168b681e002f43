"""Names of taps, and errors for layers, calls, tensors and sides that a measure does not have.

Covers: nrm_plugin.measure.layer_taps.
"""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import NameMapComposite
from zennit.rules import Epsilon, Pass

from nrm_plugin import NRM, LayerNRM, RelevanceMeasure, at
from nrm_plugin.errors import EventError, HookedContainerError, UnknownLayerError
from nrm_plugin.events.serialization import event_from_json, event_to_json
from nrm_plugin.recording.module_outputs import module_outputs
from tests.error_cases import MeasuredNet, build, error_cases


@pytest.fixture(scope="module")
def measured():
    return MeasuredNet()


@error_cases(
    ("near", lambda mu: mu.marginal("con"), UnknownLayerError, "'con'", "Similar names: 'conv'", "measure.layers"),
    ("near call", lambda mu: mu.marginal("block.3"), UnknownLayerError, "'block.3'", "'block.0'", "'block.1'"),
    ("far", lambda mu: mu.sink("zzzzz"), UnknownLayerError, "'zzzzz'", "'input', 'conv'", "measure.layers"),
    ("empty", lambda mu: mu.bypass(""), UnknownLayerError, "''", "measure.layers"),
    ("never called", lambda mu: mu.marginal("unused"), UnknownLayerError, "'unused'", "never called have no tap"),
    ("in an event", lambda mu: mu(at("conv")[1] & ~at("bloc")), UnknownLayerError, "'bloc'", "'block'"),
    ("in a condition", lambda mu: mu(at("conv"), given=at("pol")), UnknownLayerError, "'pol'", "'pool'"),
    ("in a list", lambda mu: mu.marginal(["conv", "pol"]), UnknownLayerError, "'pol'", "'pool'"),
    ("in a joint map", lambda mu: mu.marginal("conv", joint=at("pol")), UnknownLayerError, "'pol'", "'pool'"),
    ("in explain", lambda mu: mu.explain(at("pol")), UnknownLayerError, "'pol'", "'pool'"),
    ("in joint", lambda mu: mu.joint("head", "pol"), UnknownLayerError, "'pol'", "'pool'"),
    ("its shape", lambda mu: mu.shape("pol"), UnknownLayerError, "'pol'", "'pool'"),
    ("another model's", lambda mu: mu.marginal(build().head), UnknownLayerError, "Linear", "not a module of the"),
    ("its event", lambda mu: mu(at(build().conv)[0]), UnknownLayerError, "Conv2d", "model.modules()", "or its name"),
    ("number", lambda mu: mu.marginal(3), EventError, "a name", "or a module", "got int: 3. Quote the name", "'3'"),
    ("none", lambda mu: mu.variation(None), EventError, "a name", "got NoneType"),
    ("dict", lambda mu: mu.marginal([{}]), EventError, "a name", "got dict"),
    ("list", lambda mu: mu.sink(["conv"]), EventError, "one layer is needed", "['conv']"),
    ("at list", lambda mu: at(["conv"]), EventError, "a name", "got list: ['conv']"),
    ("indexed", lambda mu: mu.marginal(at("conv")[0]), EventError, "at('conv')[0] is an event", "or joint="),
    ("formula", lambda mu: mu.marginal(~at("conv")), EventError, "~at('conv') is an event", "joint="),
    ("sink side", lambda mu: mu.marginal(at("conv", side="sink")), EventError, "is not a single tap", "Use mu("),
    ("taps of a sink", lambda mu: mu.taps_of("conv", "sink"), EventError, "not a tap", "Use mu("),
    ("taps of a number", lambda mu: mu.taps_of(3), EventError, "a name", "got int"),
    ("side", lambda mu: at("conv", side="up"), EventError, "side='up'", "'input', 'output', 'sink'"),
    ("side of taps", lambda mu: mu.taps_of("conv", "up"), EventError, "side='up'", "'input', 'output', 'sink'"),
    ("reused", lambda mu: mu.marginal("lin"), UnknownLayerError, "'lin' was called 2 times", "call=0", "'any'"),
    ("no such call", lambda mu: mu(at("lin", call=2)), UnknownLayerError, "'lin' has no call 2", "[0, 1]"),
    ("no such call by name", lambda mu: mu.marginal("lin:5"), UnknownLayerError, "'lin' has no call 5", "[0, 1]"),
    ("negative call", lambda mu: mu(at("lin", call=-1)), UnknownLayerError, "no call -1", "[0, 1]"),
    ("call by word", lambda mu: at("lin", call="each"), EventError, "call='each'", "index of the call", "'any'"),
    ("call by truth", lambda mu: at("lin", call=True), EventError, "call=True", "index of the call"),
    (
        "any call",
        lambda mu: mu.marginal(at("lin", call="any")),
        EventError,
        "call='any'",
        "not a single tap",
        "Use mu(",
    ),
    ("items", lambda mu: mu.marginal("halves"), UnknownLayerError, "'halves' has 2 tensors", "item=", "0, 1"),
    ("no such item", lambda mu: mu(at("halves", item=2)), UnknownLayerError, "2 tensors", "0, 1", "got 2"),
    ("item of one", lambda mu: mu(at("conv", item=1)), UnknownLayerError, "'conv' is a single tensor", "omit item="),
    ("item unhashable", lambda mu: at("halves", item=[0]), EventError, "item=[0]", "index or key"),
    ("sink of a route", lambda mu: mu(at("flat", side="sink")), UnknownLayerError, "only routes", "steps are 'head'"),
    ("sink of none", lambda mu: mu(at("pol", side="sink")), UnknownLayerError, "'pol'", "'pool'"),
    ("sink of a call", lambda mu: mu(at("pool", side="sink", call=4)), UnknownLayerError, "no call 4", "[0]"),
    ("sink of calls", lambda mu: mu(at("lin", side="sink")), UnknownLayerError, "called 2 times", "call=0", "'any'"),
)
def test_a_query_for_an_invalid_layer_raises(measured, case, error, words):
    with measured.raises(error, *words):
        case(measured.mu)


@pytest.mark.parametrize(
    "query",
    [
        lambda mu: mu.marginal("block.0"),
        lambda mu: mu(at("block.1")[2]),
        lambda mu: mu(at("block.0", side="input")),
        lambda mu: mu.marginal("input", joint=at("block.0")),
        lambda mu: mu(at("block.0", side="sink")),
    ],
)
def test_taps_inside_a_container_with_a_rule_raise(measured, query):
    rules = NameMapComposite([(["block", "conv", "lin", "head", "pool"], Epsilon()), (["relu"], Pass())])
    mu = RelevanceMeasure(measured.net, measured.x, 1, composite=rules)
    torch.testing.assert_close(mu(at("block")) + mu.sink("block") + mu.bypass("block"), torch.ones(2))
    with measured.raises(
        HookedContainerError, "lies inside 'block'", "assigns a rule", "input or output", "modules inside"
    ):
        query(mu)


def test_events_on_layers_of_another_model_raise(measured):
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 5)).eval()
    mu = RelevanceMeasure(other, measured.x, 1)
    assert mu(at("1")[2]).shape == (2,)
    with measured.raises(UnknownLayerError, "no tap named '1'", "measure.layers"):
        measured.mu(at("1")[2])
    with measured.raises(UnknownLayerError, "Linear is not a module of the measured model", model=other):
        measured.mu(at(other[1])[2])
    with measured.raises(UnknownLayerError, "no tap named 'conv'", "'input', '0'", model=other):
        mu(at("conv")[2])
    with measured.raises(EventError, "at('input')[0, 4]", "(1, 4, 4)", model=other):
        mu(at("input")[0, 4])


class Of(nn.Module):
    """A function of a model's own parts."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def linear(inputs: int, outputs: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).double()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def same_at_all_names(mu: RelevanceMeasure) -> None:
    """Every name in the list is that of a tap with its share of relevance, also in an event that was stored as JSON."""
    assert len(set(mu.layers)) == len(mu.layers)
    maps = mu.marginal(mu.layers)
    assert list(maps) == mu.layers
    for name in mu.layers:
        event = event_from_json(json.loads(json.dumps(event_to_json(at(name)))))
        assert torch.allclose(mu(event), maps[name].flatten(1).sum(1)), name
        assert torch.allclose(mu(event) + mu.sink(name) + mu.bypass(name), torch.ones(3).double()), name


@pytest.mark.parametrize("nested", [False, True])
def test_children_named_input_and_output_have_taps_of_their_own(nested: bool) -> None:
    def run(parts: nn.Module, x: Tensor) -> Tensor:
        children = dict(parts.named_children())
        first, second, last = children.values()
        return last(torch.relu(second(torch.relu(first(x)))))

    def net(*names: str) -> nn.Module:
        layers = [linear(4, 5), linear(5, 6, 1), linear(6, 2, 2)]
        parts = [nn.Sequential(layer) if nested else layer for layer in layers]
        return Of(run, **dict(zip(names, parts, strict=True))).eval()

    plain, reserved = net("a", "b", "c"), net("input", "output", "c")
    expected, mu = RelevanceMeasure(plain, X, 1), RelevanceMeasure(reserved, X, 1)
    same_at_all_names(mu)
    spelled = {"a": ".input", "b": ".output"}
    assert [spelled.get(name, name) for name in expected.layers if "." not in name] == [
        name for name in mu.layers if "." not in name[1:]
    ]
    for name, other in {**spelled, "input": "input", "output": "output", "c": "c"}.items():
        assert torch.equal(mu.marginal(other), expected.marginal(name)), name
        assert torch.equal(mu.sink(other), expected.sink(name))
    for side in ("input", "output"):
        assert torch.equal(mu(at(reserved.input, side=side)[1:3]), expected(at("a", side=side)[1:3]))
    if not nested:
        assert torch.equal(mu(at(reserved.input, side="sink")), expected(at("a", side="sink")))
    assert LayerNRM(reserved, reserved.output).attribute(X, target=1).shape == (3, 6)
    inner = RelevanceMeasure(reserved, X, start=torch.ones_like, output=at(reserved.output))
    assert inner.outputs.shape == (3, 6)
    with module_outputs(reserved, [".input"]) as outputs:
        reserved(X)
    assert torch.equal(outputs[".input"][0], reserved.input(X))


def test_the_function_that_a_child_named_input_returns_is_no_second_name() -> None:
    net = Of(
        lambda s, x: s.o(s.input(x)), input=Of(lambda s, x: s.a(x).sin(), a=linear(4, 5)), o=linear(5, 2, 1)
    ).eval()
    assert RelevanceMeasure(net, X, 1).layers == ["input", "input.a", ".input", "o", "output"]


KEYS = {
    "digits": {"0": 1, "pool": 2},
    "numbers": {0: 1, 1: 2},
    "a number and its digits": {0: 1, "0": 2},
    "brackets": {"x[1]": 1, "x": 2, "y[": 3, "]": 4},
    "dots, spaces, slashes and colons": {"a.b": 1, "a b": 2, "a/b": 3, "a:0": 4, "": 5},
    "quotes": {"'a'": 1, '"a"': 2},
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("calls", [1, 2])
def test_every_key_of_a_mapping_is_reached_by_its_name(name: str, calls: int) -> None:
    keys = KEYS[name]
    body = Of(lambda s, x: {key: s.a(x) * factor for key, factor in keys.items()}, a=linear(4, 4))

    def run(s: nn.Module, x: Tensor) -> Tensor:
        for _ in range(calls):
            returned = s.get_submodule("body")(x)
            x = torch.relu(sum(part / factor for part, factor in zip(returned.values(), keys.values(), strict=True)))
        return s.o(x)

    mu = RelevanceMeasure(Of(run, body=body, o=linear(4, 2, 1)).eval(), X, 1)
    same_at_all_names(mu)
    for call in range(calls):
        shares = [mu(at("body", call=call, item=key)) for key in keys]
        expected = [mu(at("body.mul", call=call * len(keys) + number)) for number in range(len(keys))]
        assert torch.equal(torch.stack(shares), torch.stack(expected))


@pytest.mark.parametrize("key", ["0", "x[1]", "a b", "a/b", "a:0", "[", "]", "conv[0]:1"])
def test_modules_with_unusual_names_are_reached(key: str) -> None:
    parts = nn.ModuleDict({key: linear(4, 4), "other": linear(4, 4, 1)})
    net = Of(lambda s, x: s.o(torch.relu(s.parts[key](x)) + s.parts["other"](x)), parts=parts, o=linear(4, 2, 2)).eval()
    mu = RelevanceMeasure(net, X, 1)
    same_at_all_names(mu)
    assert torch.equal(mu.marginal(f"parts.{key}"), mu.marginal(parts[key]))


@dataclass
class Features:
    low: Tensor
    high: list[Tensor]


Point = namedtuple("Point", "x y")

NESTED: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], list[Tensor]], list[Any]]] = {
    "dataclass": (lambda a, b: Features(a, [b]), lambda r: [r.low, r.high[0]], ["low", "high.0"]),
    "namedtuple": (lambda a, b: Point(a, b), lambda r: [r.x, r.y], [0, 1]),
    "mapping of lists": (lambda a, b: {"p": [a, b]}, lambda r: r["p"], ["p.0", "p.1"]),
    "tuple in a tuple": (lambda a, b: (a, (b, None)), lambda r: [r[0], r[1][0]], [None, "1.0"]),
    "list of mappings": (lambda a, b: [{"0": a}, {"0": b}], lambda r: [r[0]["0"], r[1]["0"]], ["0.0", "1.0"]),
}


@pytest.mark.parametrize("name", NESTED)
def test_tensors_in_nested_containers_are_taps(name: str) -> None:
    packed, unpacked, items = NESTED[name]
    body = Of(lambda s, x: packed(s.a(x), s.b(x)), a=linear(4, 4), b=linear(4, 4, 1))
    net = Of(lambda s, x: s.o(sum(unpacked(s.get_submodule("body")(x)))), body=body, o=linear(4, 2, 2)).eval()
    mu = RelevanceMeasure(net, X, 1)
    same_at_all_names(mu)
    for item, layer in zip(items, ("body.a", "body.b"), strict=True):
        assert torch.equal(mu.marginal(at("body", item=item)), mu.marginal(layer)), item


def test_the_input_side_of_the_model_itself_is_its_input():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(y)

    model, inputs = Added().eval(), (torch.randn(5, 4), torch.randn(5, 2))
    expected = NRM(model).attribute(inputs, target=1)
    found = LayerNRM(model, model).attribute(inputs, target=1, attribute_to_layer_input=True)
    torch.testing.assert_close(found, expected)
    mu = RelevanceMeasure(model, inputs, 1)
    torch.testing.assert_close(mu(at(model, side="input", item=1)[0]), mu(at("input", item=1)[0]))
