"""A measure leaves the model unchanged, is independent of other measures, and frees its memory.

Covers: nrm_plugin.model.shallow_copies, nrm_plugin.model.model_protection.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlusFlat, GuidedBackprop
from zennit.layer import Sum

from nrm_plugin import ABSORBED, NRM, LayerNRM, Normalized, NRMAbsolute, RelevanceMeasure, at
from nrm_plugin.errors import (
    CancellationError,
    FoldingError,
    NonlinearRuleError,
    NRMError,
    NullEventError,
    StaleMeasureError,
    TargetError,
    UncoveredLayerError,
    UnknownLayerError,
)
from nrm_plugin.model.model_protection import Fingerprint, named_tensors
from tests.conftest import images, slow_but, state_of, untouched

pytestmark = pytest.mark.zennit


class Net(nn.Module):
    """In-place ReLUs, batch norm, a frozen layer, a reused module, a skip connection, dropout, a further buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.conv, self.relu, self.add = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), Sum()
        self.pool, self.drop = nn.AvgPool2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(16, 5)
        self.register_buffer("note", torch.arange(3))
        self.conv.weight.requires_grad_(False)
        self.note_of_user = "a value set by the user"

    def forward(self, x):
        x = self.stem(x)
        x = self.relu(self.add(torch.stack([x, self.relu(self.conv(x))], -1)))
        return self.head(self.drop(self.pool(x)).flatten(1))


def build(seed=0):
    torch.manual_seed(seed)
    net = Net().eval()
    with torch.no_grad():
        net.stem[1].running_mean.normal_()
        net.stem[1].running_var.uniform_(0.5, 2)
    net.stem[0].weight.grad = torch.ones_like(net.stem[0].weight)
    return net


@pytest.fixture
def net():
    return build()


@pytest.fixture
def x():
    return images(8)


A, B = at("stem.2")[1], at("pool")[2]
QUERIES = {
    "marginal": lambda mu: mu.marginal("pool"),
    "channels": lambda mu: mu.marginal("stem", over="channel"),
    "marginals": lambda mu: mu.marginal(["input", "conv", "output"]),
    "heat map with an event": lambda mu: mu.marginal("input", joint=A),
    "relevance above an event": lambda mu: mu.marginal("pool", joint=A | ~B),
    "given": lambda mu: mu.marginal("input", given=at("pool")),
    "sink": lambda mu: mu.sink("input"),
    "residual": lambda mu: mu.sink("input", kind="residual"),
    "sinks": lambda mu: mu.sinks(),
    "sink above several": lambda mu: mu.sink_above([at("conv"), at("input")]),
    "bypass": lambda mu: mu.bypass("conv"),
    "variation": lambda mu: mu.variation("conv"),
    "walk variation": lambda mu: mu.walk_variation(),
    "event": lambda mu: mu(A & ~B),
    "events": lambda mu: mu([A, B, A | B, ABSORBED, at("head", side="sink")]),
    "conditional": lambda mu: mu.conditional(A, "pool"),
    "matrix": lambda mu: mu.joint("pool", "stem"),
    "matrices": lambda mu: mu.joints(["pool", "stem"])[0],
    "explain": lambda mu: mu.explain(A, given=B),
    "output": lambda mu: mu.output,
}


def answers(mu, names=QUERIES):
    return {name: QUERIES[name](mu) for name in names}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        if isinstance(first[name], str):
            assert first[name] == second[name]
        else:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


# -- the model stays unchanged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["sink", "redistribute"])
def test_constructing_a_measure_leaves_the_model_unchanged(net, x, residual):
    with untouched(net, x):
        RelevanceMeasure(net, x, 1, residual=residual)


@pytest.mark.parametrize("query", QUERIES)
def test_queries_leave_the_model_unchanged(net, x, query):
    mu = RelevanceMeasure(net, x, 1)
    with untouched(net, x):
        QUERIES[query](mu)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize(
    "mode", slow_but([torch.no_grad, torch.inference_mode, torch.enable_grad], torch.inference_mode)
)
def test_queries_work_in_every_gradient_mode(net, x, query, mode):
    expected = QUERIES[query](RelevanceMeasure(net, x, 1))
    mu = RelevanceMeasure(net, x, 1)
    with untouched(net, x), mode():
        answer = QUERIES[query](mu)
    assert_same({query: expected}, {query: answer})


@pytest.mark.medium
def test_writing_to_an_answer_does_not_change_the_measure(net, x):
    mu = RelevanceMeasure(net, x, 1)
    expected = copy.deepcopy(answers(mu))
    for value in answers(mu).values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, torch.Tensor):
                assert not tensor.requires_grad
                tensor.fill_(7)
    assert_same(answers(mu), expected)


def test_canonizers_leave_the_model_unchanged(net, x):
    rules = EpsilonPlusFlat(canonizers=[SequentialMergeBatchNorm()])
    with untouched(net, x):
        answers(RelevanceMeasure(net, x, 1, composite=rules))


def test_captum_classes_leave_the_model_unchanged(net, x):
    with untouched(net, x):
        NRM(net).attribute(x, target=1)
        LayerNRM(net, net.conv).attribute(x, target=1)
        LayerNRM(net, ["conv", net.pool], composite=NRMAbsolute()).attribute(x, target=1, return_convergence_delta=True)


@pytest.mark.parametrize("training", [{}, {"stem.2": True, "head": True}, {"": True}])
def test_the_training_mode_of_each_module_is_preserved(net, x, training):
    """Only active dropout and batch norm raise in training mode."""
    for name, mode in training.items():
        net.get_submodule(name).training = mode
    with untouched(net, x):
        answers(RelevanceMeasure(net, x, 1))


@pytest.mark.medium
def test_inputs_may_require_gradients_and_receive_none(net, x):
    expected = answers(RelevanceMeasure(net, x, 1))
    x = x.requires_grad_()
    with untouched(net, x):
        assert_same(answers(RelevanceMeasure(net, x, 1)), expected)
    with_history = x * 1
    assert_same(answers(RelevanceMeasure(net, with_history, 1)), expected)


@pytest.mark.recorded
def test_hooks_of_the_user_run_and_are_preserved(net, x):
    calls = []
    net.conv.register_forward_hook(lambda module, inputs, output: calls.append(output.detach().clone()))
    handle = net.conv.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    expected = state_of(net)
    answers(RelevanceMeasure(net, x, 1))
    assert [type(item) for item in calls] == [str, torch.Tensor]
    assert state_of(net) == expected
    handle.remove()
    net(x)
    assert len(calls) == 3


def test_attributes_written_by_the_recorded_forward_pass_are_discarded(net, x):
    """A cached activation, for example, would keep the autograd graph of the recording alive."""

    class Caching(Net):
        def forward(self, x):
            self.note_of_user = super().forward(x)
            return self.note_of_user

    torch.manual_seed(0)
    caching = Caching().eval()
    with untouched(caching, x):
        RelevanceMeasure(caching, x, 1)


def test_modules_with_parametrizations_are_left_unchanged(x):
    net = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), weight_norm(nn.Linear(144, 5)))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    for number in (0, 3):
        plain[number].weight.data.copy_(net[number].weight.detach())
        plain[number].bias.data.copy_(net[number].bias.detach())
    with untouched(net, x):
        relevance = RelevanceMeasure(net, x, 1, composite=EpsilonPlusFlat()).marginal("input")
    torch.testing.assert_close(relevance, RelevanceMeasure(plain, x, 1, composite=EpsilonPlusFlat()).marginal("input"))


# -- also after an exception --------------------------------------------------------------------------------------


class Broken(nn.Module):
    def forward(self, x):
        raise ArithmeticError("broken on purpose")


class BrokenIn(nn.Module):
    """Raises in its forward pass after its submodule has run."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 5)

    def forward(self, x):
        self.touched = self.lin(x)
        raise ArithmeticError("broken on purpose")


@pytest.mark.parametrize("broken", [Broken, BrokenIn])
def test_a_model_that_raises_midway_is_left_unchanged(net, x, broken):
    net = nn.Sequential(net, nn.ReLU(inplace=True), broken(), nn.Linear(5, 5)).eval()
    expected = RelevanceMeasure(net[0], x, 1).marginal("input")
    with untouched(net, x), pytest.raises(ArithmeticError, match="broken on purpose"):
        RelevanceMeasure(net, x, 1)
    assert not torch.overrides._get_current_function_mode_stack()
    torch.testing.assert_close(RelevanceMeasure(net[0], x, 1).marginal("input"), expected)
    with pytest.raises(ArithmeticError), Normalized(EpsilonPlusFlat()).context(net):
        net(x.clone().requires_grad_())
    assert not torch.overrides._get_current_function_mode_stack()
    torch.testing.assert_close(RelevanceMeasure(net[0], x, 1).marginal("input"), expected)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"target": 99}, TargetError),
        ({"target": None}, TargetError),
        ({"start": [1.0, -1.0, 0.0, 0.0, 0.0]}, TargetError),
        ({"target": 1, "composite": GuidedBackprop(), "uncovered": "gradient"}, NonlinearRuleError),
        ({"target": 1, "composite": GuidedBackprop()}, NRMError),
        ({"target": 1, "residual": "nowhere"}, ValueError),
        ({"target": 1, "additional_forward_args": 3}, TypeError),
    ],
)
def test_invalid_arguments_leave_the_model_unchanged(net, x, arguments, error):
    with untouched(net, x), pytest.raises(error):
        RelevanceMeasure(net, x, **arguments)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        (lambda mu: mu.marginal("nowhere"), UnknownLayerError),
        (lambda mu: mu(at("pool")[99]), NRMError),
        (lambda mu: mu(A, given=at("pool")[[]]), NullEventError),
        (lambda mu: mu.marginal("input", over="nothing"), ValueError),
        (lambda mu: mu.conditional(B, "stem"), NRMError),
        (lambda mu: mu.joint("stem", "pool"), NRMError),
        (lambda mu: mu(A, given=at("pool"), min_ratio=9), CancellationError),
    ],
)
def test_a_query_that_raises_changes_nothing(net, x, query, error):
    mu = RelevanceMeasure(net, x, 1)
    expected = answers(mu)
    with untouched(net, x), pytest.raises(error):
        query(mu)
    assert_same(answers(mu), expected)


def test_a_layer_without_a_rule_leaves_the_model_unchanged(x):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 5), nn.PReLU()).eval()
    net[1].forward = net[1].forward  # an attribute of the user that a canonizer could delete
    with untouched(net, x), pytest.raises(UncoveredLayerError):
        RelevanceMeasure(net, x, 1, composite=GuidedBackprop())


# -- several measures at once -------------------------------------------------------------------------------------


@pytest.fixture
def pair(net, x):
    return RelevanceMeasure(net, x, 1), RelevanceMeasure(net, 2 * x, 3, composite=NRMAbsolute(), residual="sink")


@pytest.fixture
def alone(x):
    first = RelevanceMeasure(build(), x, 1)
    second = RelevanceMeasure(build(), 2 * x, 3, composite=NRMAbsolute(), residual="sink")
    return answers(first), answers(second)


@pytest.mark.medium
def test_interleaved_queries_to_two_measures_do_not_interfere(net, x, pair, alone):
    results = {}, {}
    with untouched(net, x):
        for name in QUERIES:
            for mu, result in zip(pair, results, strict=True):
                result[name] = QUERIES[name](mu)
    for result, expected in zip(results, alone, strict=True):
        assert_same(result, expected)


@pytest.mark.medium
def test_queries_to_two_measures_from_two_threads_do_not_interfere(net, x, pair, alone):
    with untouched(net, x), ThreadPoolExecutor(2) as threads:
        for _ in range(5):
            for result, expected in zip(threads.map(answers, pair), alone, strict=True):
                assert_same(result, expected)


@pytest.mark.medium
@pytest.mark.recorded
def test_many_threads_can_query_one_measure(net, x, alone):
    mu = RelevanceMeasure(net, x, 1)
    with untouched(net, x), ThreadPoolExecutor(4) as threads:
        for result in threads.map(answers, [mu] * 8):
            assert_same(result, alone[0])


@pytest.mark.medium
@pytest.mark.recorded
def test_measures_can_be_constructed_in_parallel_threads(net, x, alone):
    start = threading.Barrier(4)

    def construct(target):
        start.wait()
        return [answers(RelevanceMeasure(net, x, target), ["marginal", "event", "sink"]) for _ in range(4)]

    with untouched(net, x), ThreadPoolExecutor(4) as threads:
        for results in threads.map(construct, [1] * 4):
            for result in results:
                assert_same(result, {name: alone[0][name] for name in result})


@pytest.mark.slow
@pytest.mark.recorded
def test_a_measure_outlives_its_model_and_inputs(x):
    expected = answers(RelevanceMeasure(build(), x, 1))
    inputs = x.clone()
    mu = RelevanceMeasure(build(), inputs, 1)
    inputs.zero_()
    del inputs
    gc.collect()
    assert_same(answers(mu), expected)


# -- in-place operations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [None, EpsilonPlusFlat(), NRMAbsolute()], ids=["default", "plus", "absolute"])
def test_in_place_activations_give_the_same_numbers(net, x, rules):
    in_place = answers(RelevanceMeasure(net, x, 1, composite=rules))
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    assert_same(answers(RelevanceMeasure(net, x, 1, composite=rules)), in_place)


def test_an_in_place_first_layer_does_not_overwrite_the_input(x):
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(192, 4)).eval()
    with untouched(net, x):
        mu = RelevanceMeasure(net, x, 1)
        torch.testing.assert_close(mu.marginal("0"), mu.marginal("input"))


# -- memory -------------------------------------------------------------------------------------------------------


def tensors_alive():
    gc.collect()
    return sum(1 for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter))


def leaves(mu):
    """The tensors at which walks end."""
    return [vertex.leaf for vertex in mu._recording.graph.vertices if vertex.leaf is not None]


@pytest.mark.slow
def test_memory_is_freed_with_the_measure(net, x):
    answers(RelevanceMeasure(net, x, 1))
    before = tensors_alive()
    mu = RelevanceMeasure(net, x, 1)
    answers(mu)
    kernels = [vertex.step.kernel for vertex in mu._recording.graph.vertices if vertex.step is not None]
    items = (mu, mu._recording, mu._recording.output, *leaves(mu), *kernels)
    references = [weakref.ref(item) for item in items]
    del mu, kernels, items
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    assert tensors_alive() == before


@pytest.mark.slow
def test_memory_is_freed_without_the_garbage_collector(net, x):
    """A shortage of GPU memory does not trigger the collector."""
    gc.collect()
    gc.disable()
    try:
        mu = RelevanceMeasure(net, x, 1)
        answers(mu)
        leaf = weakref.ref(leaves(mu)[0])
        output = weakref.ref(mu._recording.output)
        del mu
        assert (leaf(), output()) == (None, None)
    finally:
        gc.enable()


@pytest.mark.slow
def test_memory_is_freed_when_the_constructor_raises(net, x):
    net = nn.Sequential(net, Broken()).eval()
    for _ in range(2):
        before = tensors_alive()
        with pytest.raises(ArithmeticError):
            RelevanceMeasure(net, x, 1)
    assert tensors_alive() == before


@pytest.mark.slow
def test_queries_do_not_accumulate_memory(net, x):
    mu = RelevanceMeasure(net, x, 1)
    answers(mu)
    before = tensors_alive()
    for _ in range(3):
        answers(mu)
    assert tensors_alive() == before


# -- a modified model ---------------------------------------------------------------------------------------------


def add_in_place(net):
    with torch.no_grad():
        net.conv.weight.add_(1.0)


def write_through_data(net):
    net.head.bias.data.mul_(2.0)


def write_one_entry_through_data(net):
    net.head.weight.data[3, 5] = 7.0


def step_an_optimizer(net):
    optimizer = torch.optim.SGD([net.stem[0].weight], lr=0.1)
    optimizer.step()


def change_a_buffer(net):
    net.stem[1].running_mean += 1.0


def load_other_weights(net):
    net.load_state_dict(build(1).state_dict())


CHANGES = [
    (add_in_place, "conv.weight"),
    (write_through_data, "head.bias"),
    (write_one_entry_through_data, "head.weight"),
    (step_an_optimizer, "stem.0.weight"),
    (change_a_buffer, "stem.1.running_mean"),
    (load_other_weights, "stem.0.weight"),
]


@pytest.mark.medium
@pytest.mark.parametrize(("change", "name"), CHANGES)
@pytest.mark.recorded
def test_changing_a_parameter_in_place_makes_the_measure_stale(net, x, change, name):
    mu = RelevanceMeasure(net, x, 1)
    answers(mu)
    change(net)
    for query in QUERIES.keys() - {"explain", "output"}:
        with untouched(net, x), pytest.raises(StaleMeasureError, match=rf"{name}.*changed in place.*again"):
            QUERIES[query](mu)
    fresh = RelevanceMeasure(net, x, 1)
    answers(fresh)


@pytest.mark.parametrize("index", [7, (slice(None), 5)], ids=["row", "column"])
def test_a_row_or_column_of_a_large_weight_that_is_written_through_data_makes_the_measure_stale(index):
    net = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 2)).eval()
    mu = RelevanceMeasure(net, torch.randn(2, 4), 1)
    mu.marginal("input")
    net[2].weight.data[index] = 3.0
    with pytest.raises(StaleMeasureError, match=r"2\.weight"):
        mu.marginal("input")


@pytest.mark.recorded
def test_replacing_parameters_does_not_affect_a_measure(net, x):
    mu = RelevanceMeasure(net, x, 1)
    expected = answers(mu)
    net.head = nn.Linear(16, 5)
    net.conv.weight = nn.Parameter(torch.zeros_like(net.conv.weight))
    assert_same(answers(mu), expected)


def test_a_new_measure_can_be_constructed_after_one_is_stale(net, x):
    """A measure stays stale when its weights are restored; a new one equals the first."""
    expected = answers(RelevanceMeasure(net, x, 1))
    mu = RelevanceMeasure(net, x, 1)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    add_in_place(net)
    with pytest.raises(StaleMeasureError):
        mu.marginal("pool")
    torch.testing.assert_close(mu.output, expected["output"])
    net.load_state_dict(weights)
    assert_same(answers(RelevanceMeasure(net, x, 1)), expected)


def test_training_continues_after_a_measure(net, x):
    reference = copy.deepcopy(net)
    mu = RelevanceMeasure(net, x, 1)
    answers(mu)
    for model in (net, reference):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for parameter, expected in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.medium
def test_a_model_of_torchvision_is_left_unchanged():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None, num_classes=4).eval()
    x = images(32)
    with untouched(net, x):
        mu = RelevanceMeasure(net, x, 1)
        mu.marginal("input")
        mu(at("layer3")[0] & at("layer1")[1])


# -- tensors of a model ------------------------------------------------------------------------------------------------


def test_the_tensors_of_a_model_are_its_parameters_and_buffers_each_once(net):
    net.tied = nn.Linear(16, 5)
    net.tied.weight = net.head.weight
    net.also = net.stem[1]
    expected = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    named = named_tensors(net)
    assert len(named) == len(expected)
    assert all(expected[name] is tensor for name, tensor in named)


@pytest.mark.parametrize("width", [3, 5000])
def test_nan_in_a_buffer_neither_hides_nor_feigns_a_change(width):
    net = nn.Module()
    net.register_buffer("note", torch.full((2, width), float("nan")))
    net.note[0, ::2] = 1.0
    fingerprint = Fingerprint(net)
    assert fingerprint.changed() == []
    net.note.data[0] = 2.0  # does not change the version
    assert fingerprint.changed() == ["note"]


# -- buffers that the model writes in place ------------------------------------------------------------------------


class Averaging(nn.Module):
    """Multiplies by a running average of products of its features, which it updates in place in each call."""

    def __init__(self, write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.write = nn.Linear(4, 6), nn.Linear(6, 3), write
        self.register_buffer("average", torch.rand(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        self.write(self.average, products(hidden))
        return self.b((hidden @ self.average).mean(1))


def products(hidden: Tensor) -> Tensor:
    rows = hidden.detach().flatten(0, 1)
    return rows.T @ rows


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "in place": lambda average, new: average.mul_(0.5).add_(new * 0.5),
    "copy": lambda average, new: average.copy_(new),
    "by an index": lambda average, new: average.__setitem__(slice(0, 3), new[:3]),
    "through data": lambda average, new: average.data.mul_(0.5).add_(new * 0.5),
    "out": lambda average, new: torch.add(average, new, out=average),
}


@pytest.mark.parametrize("name", WRITES)
def test_buffers_that_the_model_writes_in_place_are_restored(name):
    x = torch.rand(1, 5, 4, generator=torch.Generator().manual_seed(1))
    net, twin = Averaging(WRITES[name]).eval(), Averaging(lambda average, new: None).eval()
    WRITES[name](twin.average, products(twin.a(x).relu()))
    before = net.average.clone()
    mu = RelevanceMeasure(net, x, 1)
    assert torch.equal(net.average, before)
    expected = RelevanceMeasure(twin, x, 1)  # the values that the buffer had in the forward pass
    torch.testing.assert_close(mu.output, expected.output)
    torch.testing.assert_close(mu.marginal("a"), expected.marginal("a"))
    assert torch.equal(net.average, before)
    with pytest.raises(FoldingError):
        RelevanceMeasure(net, x.repeat(3, 1, 1) * torch.arange(1, 4)[:, None, None], 1)
    assert torch.equal(net.average, before)
