"""The step of a contrast, compared with models whose last layer has the fused weights, and with shares by hand.

Covers: nrm_plugin.measure.start.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from zennit.composites import EpsilonGammaBox, EpsilonPlusFlat, LayerMapComposite
from zennit.core import BasicHook
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, Pass, WSquare, ZBox, ZPlus

from nrm_plugin import NRMAbsolute, RelevanceMeasure, at, top_walks
from nrm_plugin.errors import UnknownLayerError, UnsupportedRuleError
from nrm_plugin.rules import Absolute, Relative
from tests.conftest import in_turn

CLASSES, FEATURES = 6, 16


@pytest.fixture(autouse=True)
def _in_double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def body() -> nn.Sequential:
    layers = (
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(16, FEATURES),
        nn.ReLU(),
    )
    return nn.Sequential(*layers)


class Linear(nn.Module):
    """Layers, and a linear head in ``spelling``."""

    def __init__(self, layers: nn.Module, weight: torch.Tensor, bias: torch.Tensor, spelling: str = "module") -> None:
        super().__init__()
        self.body, self.spelling = layers, spelling
        self.head = nn.Conv2d(FEATURES, len(weight), 1) if spelling == "conv" else nn.Linear(FEATURES, len(weight))
        self.head.weight = nn.Parameter(weight.reshape(self.head.weight.shape).clone())
        self.head.bias = nn.Parameter(bias.clone())

    def forward(self, x):
        h = self.body(x)
        if self.spelling == "function":
            return functional.linear(h, self.head.weight, self.head.bias)
        if self.spelling == "conv":
            return self.head(h[:, :, None, None]).flatten(1)
        if self.spelling == "views":
            scores = self.head(h.unsqueeze(1)).transpose(0, 2).contiguous()
            return scores.flip(0).view(len(self.head.weight), -1).t()[:, range(len(self.head.weight) - 1, -1, -1)]
        if self.spelling == "two":  # the other output is not explained
            return self.head(h), self.head(h).sum(1, keepdim=True)
        return self.head(h)


def by_hand(outputs: torch.Tensor, target: int, against: int | str) -> torch.Tensor:
    """The weights of the outputs of one sample."""
    weights = torch.zeros(CLASSES)
    if against == "rest":
        others = [number for number in range(CLASSES) if number != target]
        weights[others] = -outputs[others].exp() / outputs[others].exp().sum()
    else:
        weights[against] = -1
    weights[target] = 1
    return weights


def layer_map(rule):
    return LayerMapComposite([(nn.ReLU, Pass()), (nn.AvgPool2d, Norm()), (nn.Conv2d, rule), (nn.Linear, rule)])


COMPOSITES = {
    "default": lambda: None,
    "absolute": NRMAbsolute,
    "plus flat": EpsilonPlusFlat,
    "gamma box": lambda: EpsilonGammaBox(-3.0, 3.0),
    "gamma": lambda: layer_map(Gamma(0.25)),
    "z+": lambda: layer_map(ZPlus()),
    "alpha beta": lambda: layer_map(AlphaBeta(2, 1)),
    "w²": lambda: layer_map(WSquare()),
    "flat": lambda: layer_map(Flat()),
    "box": lambda: layer_map(ZBox(-1.0, 1.0)),
    "zero": lambda: layer_map(Epsilon(0.0)),
    "absolute rule": lambda: layer_map(Absolute()),
    "relative": lambda: layer_map(Relative()),
}


def answers(mu: RelevanceMeasure) -> list[torch.Tensor]:
    event = at("body.0").channel(1) & ~at("body.4")[2] | at("input")[0, 3, 3]
    rows = [mu.output, mu.walk_variation(), mu(event), mu.variation("body.4")]
    rows += [mu.marginal(layer) for layer in ("body.4", "body.0", "input")]
    rows += [mu.sink("input"), mu.joint("output", "body.0"), mu.joint("body.4", "body.0")]
    return rows + [mu.conditional(at("body.0").channel(3), layer) for layer in ("output", "body.4")]


def check(net: nn.Module, twin_of, x: torch.Tensor, target, against, **settings) -> None:
    """Compares each sample with a twin whose last layer has its fused weights."""
    mu = RelevanceMeasure(net, x, target, against=against, **settings)
    actual = answers(mu)
    outputs = net(x)[0] if isinstance(net(x), tuple) else net(x)
    targets = target if isinstance(target, list) else [target] * len(x)
    others = against if isinstance(against, list) else [against] * len(x)
    for number, (one, other) in enumerate(zip(targets, others, strict=True)):
        twin = twin_of(by_hand(outputs[number].detach(), one, other)).eval()
        expected = RelevanceMeasure(twin, x[number : number + 1], **{**settings, "output": None})
        for ours, theirs in zip(actual, answers(expected), strict=True):
            assert float((ours[number] - theirs[0]).abs().max()) <= 1e-9 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize(("composite", "against"), in_turn(COMPOSITES, [3, "rest", [0, 5, 1]]))
def test_every_rule_reads_the_fused_weights(composite, against):
    layers, weight, bias = body(), torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)
    net = Linear(layers, weight, bias).eval()

    def twin(s: torch.Tensor) -> nn.Module:
        return Linear(layers, (s @ weight)[None], (s @ bias)[None])

    x, target = torch.randn(3, 2, 6, 6), 2 if against != [0, 5, 1] else [2, 2, 4]
    check(net, twin, x, target, against, composite=COMPOSITES[composite]())


@pytest.mark.medium
@pytest.mark.parametrize(
    ("spelling", "residual"), in_turn(["function", "conv", "views", "two"], ["sink", "redistribute"])
)
def test_every_spelling_of_the_last_layer_is_fused(spelling, residual):
    layers, weight, bias = body(), torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)
    net = Linear(layers, weight, bias, spelling).eval()

    def twin(s: torch.Tensor) -> nn.Module:
        return Linear(layers, (s @ weight)[None], (s @ bias)[None], "conv" if spelling == "conv" else "module")

    output = 0 if spelling == "two" else None
    for composite in ("default", "gamma box"):
        settings = {"composite": COMPOSITES[composite](), "residual": residual, "output": output}
        check(net, twin, torch.randn(3, 2, 6, 6), 2, "rest", **settings)


def test_a_batch_normalization_of_the_outputs_is_fused():
    layers, weight, bias = body(), torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)
    norm = nn.BatchNorm1d(CLASSES)
    norm.running_mean, norm.running_var = torch.randn(CLASSES), torch.rand(CLASSES) + 0.5
    norm.weight, norm.bias = nn.Parameter(torch.randn(CLASSES)), nn.Parameter(torch.randn(CLASSES))
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias.detach() - norm.running_mean * scale
    net = Linear(layers, weight, bias)
    net.head = nn.Sequential(net.head, norm)

    def twin(s: torch.Tensor) -> nn.Module:
        return Linear(layers, (s * scale @ weight)[None], (s @ (scale * bias + shift))[None])

    check(net.eval(), twin, torch.randn(3, 2, 6, 6), 1, "rest")


def test_a_batch_normalization_of_the_features_is_fused():
    layers, weight, bias = body(), torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)
    norm = nn.BatchNorm1d(FEATURES)
    norm.running_mean, norm.running_var = torch.randn(FEATURES), torch.rand(FEATURES) + 0.5
    net = Linear(nn.Sequential(*layers, norm), weight, bias).eval()

    def twin(s: torch.Tensor) -> nn.Module:
        return Linear(net.body, (s @ weight)[None], (s @ bias)[None])

    check(net, twin, torch.randn(3, 2, 6, 6), 1, 4)


@pytest.mark.parametrize("rule", [Flat, ZPlus, Epsilon])
def test_positions_of_a_map_read_only_their_own_patches(rule):
    """One pixel of a segmentation: a twin convolution with the difference of two kernels."""
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, CLASSES, 3, padding=1)
    net = nn.Sequential(first, nn.ReLU(), second)
    twin = nn.Conv2d(4, 1, 3, padding=1)
    twin.weight = nn.Parameter((second.weight[1] - second.weight[4])[None].detach())
    twin.bias = nn.Parameter((second.bias[1] - second.bias[4])[None].detach())
    x = torch.randn(2, 2, 5, 5)
    for place in ((0, 0), (2, 3)):
        mu = RelevanceMeasure(net, x, (1, *place), against=(4, *place), composite=layer_map(rule()))
        expected = RelevanceMeasure(nn.Sequential(first, nn.ReLU(), twin), x, (0, *place), composite=layer_map(rule()))
        for layer in ("0", "input"):
            torch.testing.assert_close(mu.marginal(layer), expected.marginal(layer), rtol=1e-9, atol=1e-9)


class Tagger(nn.Module):
    """Ids to scores of words, with the times in the first dimension of all inner tensors if ``time_first``."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.embedding, self.lstm = nn.Embedding(20, 5), nn.LSTM(5, 7, batch_first=not time_first)
        self.head = nn.Linear(7, 20)

    def forward(self, ids):
        rows = self.embedding(ids)
        rows = rows.transpose(0, 1) if self.time_first else rows
        scores = self.head(self.lstm(rows)[0])
        return scores.transpose(0, 1) if self.time_first else scores


@pytest.mark.parametrize("time_first", [False, True])
def test_samples_of_a_sequence_model_are_independent(time_first):
    net, ids = Tagger(time_first).eval(), torch.randint(20, (2, 3))
    targets = [(2, 2), (1, 5)]
    mu = RelevanceMeasure(net, ids, targets, against=lambda outputs: (2, 7))
    layers = ["embedding", "lstm[0]", "output"]
    together = mu.marginal(layers)
    for number, target in enumerate(targets):
        alone = RelevanceMeasure(net, ids[number : number + 1], target, against=(2, 7)).marginal(layers)
        for layer in layers:
            torch.testing.assert_close(together[layer][number], alone[layer][0], rtol=1e-9, atol=1e-12)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x):
        return self.first(x) + self.second(x).relu()


UNFUSED = {
    "relu": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU()),
    "softmax": lambda: nn.Sequential(nn.Linear(4, 5), nn.Softmax(1)),
    "sum": Sum,
}


@pytest.mark.parametrize("residual", ["sink", "redistribute"])
@pytest.mark.parametrize("kind", UNFUSED)
def test_other_outputs_have_shares(kind, residual):
    """μ is then the sum of the measures of the outputs, each times s f / g."""
    net, x = UNFUSED[kind](), torch.randn(3, 4)
    outputs = net(x).detach()
    s = torch.tensor([0.5, -1.5, 2.0, 0.25, -0.75])
    mu = RelevanceMeasure(net, x, against=lambda outputs: s, residual=residual)
    shares = s * outputs / (s * outputs).sum(1, keepdim=True)
    each = [RelevanceMeasure(net, x, number, residual=residual) for number in range(5)]
    for layer in ("input", mu.layers[-2]):
        expected = sum(shares[:, number, None] * one.marginal(layer) for number, one in enumerate(each))
        torch.testing.assert_close(mu.marginal(layer), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mu.output, (s * outputs).sum(1))


class Times(nn.Module):
    def forward(self, x):
        return x * 1.0


def test_fused_and_unfused_spellings_agree_where_the_rule_is_linear_in_the_weights():
    """LRP-0 without biases; another operation on top prevents fusion."""
    net, x = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False)), torch.randn(6, 4)
    for against in (3, "rest"):
        fused, unfused = (
            RelevanceMeasure(model, x, 1, against=against, composite=layer_map(Epsilon(0.0)))
            for model in (net, nn.Sequential(*net, Times()))
        )
        assert unfused.marginal("2").shape == (6, 5)
        for layer in ("1", "input"):
            torch.testing.assert_close(fused.marginal(layer), unfused.marginal(layer), rtol=1e-9, atol=1e-12)


def test_the_output_is_one_number():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    mu = RelevanceMeasure(net, torch.randn(5, 3), 0, against=1)
    assert mu.layers == ["input", "0", "1", "output"]
    assert torch.equal(mu.marginal("output"), torch.ones(5, 1))
    assert torch.equal(mu(at("output")[0]), torch.ones(5))
    assert mu.outputs.shape == (5, 2)
    assert mu.marginal(at("2", side="input")).shape == (5, 4)
    assert torch.equal(mu(at("2", side="sink")), mu.sinks().get("2", torch.zeros(5)))
    with pytest.raises(UnknownLayerError, match=r"'2' is fused with the contrast.*'output'"):
        mu.marginal("2")


def test_walks_have_the_masses_of_events():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(1, 3)
    mu = RelevanceMeasure(net, x, 0, against="rest")
    for walk in top_walks(mu, ["output", "1", "input"], 3).walks:
        first, second, third = walk.groups
        mass = mu(at("output")[first] & at("1")[second] & at("input")[third])
        torch.testing.assert_close(mass, torch.tensor([walk.mass]), rtol=1e-9, atol=1e-12)


def test_an_inner_layer_may_be_compared():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh()), torch.randn(2, 3)
    inner = RelevanceMeasure(net, x, 0, against="rest", output=at("2"))
    torch.testing.assert_close(
        inner.marginal("input"), RelevanceMeasure(net[:3], x, 0, against="rest").marginal("input"), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_formats_sum_to_one_in_float32(dtype):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).to(dtype)
    mu = RelevanceMeasure(net, torch.randn(3, 4).to(dtype), 0, against="rest")
    assert mu.marginal("input").dtype == torch.float32
    total = mu.marginal("input").sum(1) + mu.sink("input")
    assert float((total - 1).abs().max()) < 1e-5 * float(mu.walk_variation().max())


class OwnBackward(BasicHook):
    def backward(self, module, grad_input, grad_output):
        return super().backward(module, grad_input, grad_output)


def test_a_rule_with_its_own_backward_raises():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedRuleError, match=r"OwnBackward of layer '2'.*BasicHook's modifiers"):
        RelevanceMeasure(net, torch.randn(1, 3), 0, against=1, composite=layer_map(OwnBackward()))
