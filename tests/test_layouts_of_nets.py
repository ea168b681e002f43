"""A batch has the values of its samples, whichever dimension of each tensor holds them.

Covers: nrm_plugin.recording.sample_independence, nrm_plugin.recording.sample_rows,
nrm_plugin.functional.rowwise_functions.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from nrm_plugin import (
    NRM,
    DataLoaderNRM,
    JointNRM,
    LayerNRM,
    NeuronNRM,
    NRMAbsolute,
    NRMAttributor,
    NRMDefault,
    Plan,
    RelevanceMeasure,
    at,
    top_walks,
)
from nrm_plugin.errors import FoldingError, InputError
from tests.conftest import in_turn

WIDTH, LENGTH, TARGET = 4, 3, 1
Layout = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
LAYOUTS: dict[str, Callable[[int], Layout]] = {
    "batch first": lambda n: (lambda h: h, lambda h: h),
    "time first": lambda n: (lambda h: h.transpose(0, 1), lambda h: h.transpose(0, 1)),
    "folded": lambda n: (lambda h: h.flatten(0, 1), lambda h: h.unflatten(0, (n, LENGTH))),
    "folded, time first": lambda n: (
        lambda h: h.transpose(0, 1).flatten(0, 1),
        lambda h: h.unflatten(0, (LENGTH, n)).transpose(0, 1),
    ),
    "windows": lambda n: (lambda h: h.reshape(n * LENGTH, 1, WIDTH), lambda h: h.reshape(n, LENGTH, WIDTH)),
    "batch in the middle": lambda n: (lambda h: h.transpose(0, 1).unsqueeze(0), lambda h: h[0].transpose(0, 1)),
    "one long sequence": lambda n: (
        lambda h: h.reshape(1, n * LENGTH, WIDTH),
        lambda h: h.reshape(n, LENGTH, WIDTH),
    ),
    "one long sequence per head": lambda n: (
        lambda h: h.reshape(1, n * LENGTH, 1, WIDTH).expand(-1, -1, 2, -1).transpose(1, 2),
        lambda h: h.mean(1).reshape(n, LENGTH, WIDTH),
    ),
    "reversed": lambda n: (lambda h: h.flip(0), lambda h: h.flip(0)),
    "padded windows": lambda n: (
        lambda h: nn.functional.pad(h, (0, 0, 0, 1)).reshape(n * 2, -1, WIDTH),
        lambda h: h.reshape(n, LENGTH + 1, WIDTH)[:, :LENGTH],
    ),
}
"""From ``(N, T, C)`` and back, with the channels last."""


class Folding(nn.Module):
    """Each layer runs in a layout of its own; optionally in double precision, or with a constant added."""

    def __init__(self, names: list[str], constants: list[bool], promoted: list[bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in names)
        self.names, self.constants, self.promoted = names, constants, promoted
        self.head = nn.Linear(WIDTH, 3)
        self.constant = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer, name, constant, promoted in zip(self.layers, self.names, self.constants, self.promoted, strict=True):
            fold, back = LAYOUTS[name](len(x))
            own = layer(fold(h))
            own = own + self.constant if constant else own
            own = own * torch.ones(WIDTH, dtype=torch.double) if promoted else own
            h = h + back(own.relu()).to(x.dtype)
        return self.head(h.mean(1))


@st.composite
def nets(draw: st.DrawFn, promotions: bool = False) -> tuple[Folding, Tensor]:
    depth = draw(st.integers(1, 3))
    names = draw(st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=depth, max_size=depth))
    constants = draw(st.lists(st.booleans(), min_size=depth, max_size=depth))
    promoted = draw(st.lists(st.booleans() if promotions else st.just(False), min_size=depth, max_size=depth))
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype = torch.float if promotions else torch.double
    net = Folding(names, constants, promoted).to(dtype).eval()
    return net, torch.randn(draw(st.integers(2, 4)), LENGTH, WIDTH, dtype=dtype)


def assert_same(whole: Tensor, alone: list[Tensor], tolerance: float = 1e-6) -> None:
    """The kernels of sums have a floor that depends on a row of the tensor, hence the tolerance."""
    torch.testing.assert_close(whole, torch.cat(alone), atol=tolerance, rtol=tolerance)


@pytest.mark.medium
@settings(max_examples=15, deadline=None)
@given(nets(), st.integers(0, 2))
def test_every_query_of_a_batch_has_the_values_of_its_samples(case, layer):
    net, x = case
    name = f"layers.{layer % len(net.names)}"
    mu = RelevanceMeasure(net, x, TARGET, composite=NRMDefault())
    alone = [RelevanceMeasure(net, one[None], TARGET, composite=NRMDefault()) for one in x]
    assert mu.shape(name)[0] == len(x)
    assert mu.marginal(name).shape[1:] == alone[0].marginal(name).shape[1:] == mu.shape(name)[1:]
    event, below = at(name).channel([0, 2]), at("input").channel(1)
    assume(bool((mu(event) != 0).all()))  # otherwise nothing is conditional on the event
    queries: list[Callable[[RelevanceMeasure], Tensor]] = [
        lambda mu: mu.marginal(name),
        lambda mu: mu.marginal(name, over="channel"),
        lambda mu: mu.marginal(name, over="position"),
        lambda mu: mu.marginal(name, joint=below),
        lambda mu: mu.marginal("input", given=event, min_ratio=0),
        lambda mu: mu.marginal("input", joint=[event])[0],
        lambda mu: mu(event),
        lambda mu: mu(at(name)[..., 3]),
        lambda mu: mu(at(name)[0]),
        lambda mu: mu(event & below),
        lambda mu: mu(~at(name)),
        lambda mu: mu.conditional(below, name),
        lambda mu: mu.joint("output", name),
        lambda mu: mu.joint(name, "input"),
        lambda mu: mu.joint(name, "input", over=("position", "channel")),
        lambda mu: mu.sink(name),
        lambda mu: mu.bypass(name),
        lambda mu: mu.variation(name),
        lambda mu: mu.walk_variation(),
        lambda mu: mu.outputs,
    ]
    for ask in queries:
        assert_same(ask(mu), [ask(one) for one in alone])


@pytest.mark.medium
@settings(max_examples=10, deadline=None)
@given(nets())
def test_a_plan_of_a_batch_in_any_layout_is_replayed(case):
    net, x = case
    plan = Plan(net, x, composite=NRMDefault())
    for _ in range(3):
        x = torch.randn_like(x)
        mu = plan(x, TARGET)
        alone = [RelevanceMeasure(net, one[None], TARGET, composite=NRMDefault()) for one in x]
        expected = [one.marginal(one.layers) for one in alone]
        for name, marginal in mu.marginal(mu.layers).items():
            assert_same(marginal, [one[name] for one in expected])
        assert_same(mu.sink("input"), [one.sink("input") for one in alone])
    assert "recorded every time" not in plan.explain()


@pytest.mark.medium
@pytest.mark.parametrize(("name", "live"), in_turn(sorted(LAYOUTS), range(3)))
def test_samples_without_relevance_keep_their_rows(name, live):
    """Only one sample has relevance below the activations, so that no other sample can be told from it."""
    torch.manual_seed(0)
    net = Folding([name, name], [True, False], [False, False]).double().eval()
    with torch.no_grad():
        net.layers[0].weight.abs_()
        net.constant.zero_()
    signs = torch.full((3, 1, 1), -1.0, dtype=torch.double)
    signs[live] = 1.0
    x = torch.rand(3, LENGTH, WIDTH, dtype=torch.double) + 0.5
    plan = Plan(net, signs * x, composite=NRMDefault())
    for batch in (signs * x, signs.roll(1, 0) * x, x):
        alone = [RelevanceMeasure(net, one[None], TARGET, composite=NRMDefault()) for one in batch]
        expected = [one.marginal(one.layers) for one in alone]
        for mu in (RelevanceMeasure(net, batch, TARGET, composite=NRMDefault()), plan(batch, TARGET)):
            for tap, marginal in mu.marginal(mu.layers).items():
                assert_same(marginal, [one[tap] for one in expected])


class Sorted(nn.Module):
    """A layer runs on the samples in the order of their values, or in an order among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        order = x.sum(1).argsort() if order is None else order
        return self.head(self.layer(x[order]).relu()[order.argsort()])


@pytest.mark.medium
@pytest.mark.parametrize("is_given", [False, True])
def test_a_plan_of_samples_in_an_order_by_values_has_their_values(is_given):
    torch.manual_seed(0)
    net = Sorted().double().eval()
    plan = None
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(5, WIDTH, dtype=torch.double)
        further = {"additional_forward_args": (torch.randperm(5),)} if is_given else {}
        plan = plan or Plan(net, x, composite=NRMDefault(), **further)
        alone = [RelevanceMeasure(net, one[None], TARGET, composite=NRMDefault()) for one in x]
        mu = plan(x, TARGET, **further)
        for name in ("input", "layer", "head"):
            assert_same(mu.marginal(name), [one.marginal(name) for one in alone])


@pytest.mark.medium
@settings(max_examples=10, deadline=None)
@given(nets(promotions=True))
def test_layers_that_are_promoted_to_double_have_the_values_of_the_samples(case):
    net, x = case
    mu = RelevanceMeasure(net, x, TARGET)
    alone = [RelevanceMeasure(net, one[None], TARGET) for one in x]
    queries: list[Callable[[RelevanceMeasure], Tensor]] = [
        lambda mu: mu.marginal("layers.0", over="channel"),
        lambda mu: mu(at("layers.0").channel(1)),
        lambda mu: mu.joint("layers.0", "input"),
    ]
    for ask in queries:
        assert_same(ask(mu).float(), [ask(one).float() for one in alone], 1e-3)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(nets(), st.integers(0, 2))
def test_flows_and_the_captum_classes_of_a_batch_have_the_values_of_its_samples(case, layer):
    net, x = case
    name = f"layers.{layer % len(net.names)}"
    methods: list[Callable[[Tensor], Tensor]] = [
        lambda x: NRM(net).attribute(x, target=TARGET),
        lambda x: LayerNRM(net, name).attribute(x, target=TARGET),
        lambda x: JointNRM(net, name, "input").attribute(x, target=TARGET),
        lambda x: NeuronNRM(net, name).attribute(x, lambda h: h.flatten(1)[:, 1]),
        lambda x: NRMAttributor(net)(x, torch.eye(3, dtype=torch.double)[[TARGET] * len(x)])[1].marginal(name),
        lambda x: DataLoaderNRM(LayerNRM(net, name)).attribute([x], target=TARGET),
    ]
    for method in methods:
        assert_same(method(x), [method(one[None]) for one in x])
    mu = RelevanceMeasure(net, x, TARGET, composite=NRMDefault())
    for sample, one in enumerate(x):
        alone = RelevanceMeasure(net, one[None], TARGET, composite=NRMDefault()).flow(["output", name, "input"])
        flow = mu.flow(["output", name, "input"], sample=sample)
        masses = [[node.mass for node in graph.nodes] for graph in (flow, alone)]
        torch.testing.assert_close(*(torch.tensor(values) for values in masses), atol=1e-6, rtol=1e-6)


@pytest.mark.medium
@settings(max_examples=8, deadline=None)
@given(nets(), st.integers(0, 2))
def test_walks_cross_the_channels_of_a_twin_in_the_usual_layout(case, layer):
    net, x = case
    name = f"layers.{layer % len(net.names)}"
    twin = Folding(["batch first"] * len(net.names), net.constants, net.promoted).double().eval()
    twin.load_state_dict(net.state_dict())
    walks = []
    for model in (net, twin):
        mu = RelevanceMeasure(model, x[:1], TARGET, composite=NRMAbsolute())
        walks.append(top_walks(mu, [name, "input"], 3, ["channel", "neuron"], budget=float("inf")).walks)
    for walk, other in zip(*walks, strict=True):
        assert walk.groups == other.groups
        assert walk.mass == pytest.approx(other.mass, abs=1e-6)


# -- forms that are promised ------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A linear layer, a function, and a head."""

    def __init__(self, function: Callable[[Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.first(x).relu()))


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=batch_first), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.rnn.batch_first:
            return self.head(self.rnn(x)[0].mean(1))
        return self.head(self.rnn(x.transpose(0, 1))[0].mean(0))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("length", [1, 4, 5])
def test_a_layer_with_time_in_front_has_the_form_of_its_twin(count, length):
    """Also for one sample, and for as many times as samples."""
    x, shapes = torch.randn(count, length, 3), []
    for batch_first in (True, False):
        torch.manual_seed(0)
        mu = RelevanceMeasure(Recurrent(batch_first).eval(), x, 1)
        shapes.append((mu.marginal("rnn[0]"), mu.marginal("rnn[0]", over="channel"), mu.channel_dim("rnn[0]") % 3))
    assert [part.shape for part in shapes[0][:2]] == [part.shape for part in shapes[1][:2]]
    for ours, twin in zip(shapes[0][:2], shapes[1][:2], strict=True):
        torch.testing.assert_close(ours, twin, atol=1e-5, rtol=0)
    assert shapes[0][2] == shapes[1][2] == 2


@pytest.mark.parametrize("count", [1, 3])
def test_views_in_the_batch_come_after_the_samples(count):
    torch.manual_seed(0)

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x.flatten(0, 1)).relu().mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))

    net, x = Views().eval(), torch.randn(count, 2, 1, 6, 6)
    mu = RelevanceMeasure(net, x, 1)
    assert mu.shape("conv") == (count, 2, 5, 4, 4)
    assert mu.channel_dim("conv") == 2
    assert mu.marginal("conv", over="channel").shape == (count, 5)
    row = torch.stack([mu.marginal("conv")[:, view, 3].sum((1, 2)) for view in range(2)])
    torch.testing.assert_close(mu(at("conv")[3]), row.sum(0))  # an index selects in all views
    mask = torch.zeros(2, 5, 4, 4, dtype=torch.bool)
    mask[1, 3] = True
    torch.testing.assert_close(mu(at("conv")[mask]), row[1])  # a mask may distinguish them


def _grouped(h: Tensor) -> Tensor:
    """A convolution with one group for each sample."""
    weight = torch.linspace(-1, 1, 6 * 6).reshape(6, 6, 1).to(h).repeat(len(h), 1, 1)
    return functional.conv1d(h.reshape(1, -1, 1), weight, groups=len(h)).reshape(len(h), 6)


CONCATENATED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "grouped convolution": (_grouped, lambda h: h @ torch.linspace(-1, 1, 36).reshape(6, 6).to(h).t()),
    "one row": (lambda h: h.reshape(1, -1).tanh().reshape(len(h), -1), torch.tanh),
    "one dimension": (lambda h: h.flatten().tanh().view_as(h), torch.tanh),
    "one row of tokens": (
        lambda h: h.reshape(1, -1, 3).tanh().reshape(len(h), 6),
        lambda h: h.view(len(h), 2, 3).tanh().flatten(1),
    ),
}
"""Functions in which all samples lie along one dimension with other entries, and the same with samples as rows."""


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", CONCATENATED)
def test_an_index_selects_the_same_neurons_if_the_samples_are_concatenated(name, count):
    """Regression test: the index selected all channels for several samples, but one channel for a single sample."""
    torch.manual_seed(0)
    concatenated, rows = (Rows(function).double().eval() for function in CONCATENATED[name])
    rows.load_state_dict(concatenated.state_dict())
    x = torch.rand(count, 3, dtype=torch.double)
    mu, expected = (RelevanceMeasure(net, x, 1, composite=NRMAbsolute()) for net in (concatenated, rows))
    layer, other = (m.layers[m.layers.index("relu") + 1] for m in (mu, expected))
    inner = expected.shape(other)[1:]
    assert mu.shape(layer)[1:].numel() == inner.numel()
    for neuron in range(inner.numel()):
        place = torch.unravel_index(torch.tensor(neuron), inner)
        index = tuple(int(number) for number in place)
        in_layer = index if len(mu.shape(layer)) == len(inner) + 1 else (*index, 0)
        torch.testing.assert_close(mu(at(layer)[in_layer]), expected(at(other)[index]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        mu.marginal(layer, over="channel"), expected.marginal(other, over="channel"), atol=1e-6, rtol=1e-6
    )


LOOPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "dot product": (lambda row: row @ torch.linspace(-1, 1, 6).to(row), lambda h: h @ torch.linspace(-1, 1, 6).to(h)),
    "sum": (lambda row: row.sum(), lambda h: h.sum(1)),
    "largest": (lambda row: row.max(), lambda h: h.amax(1)),
    "norm": (lambda row: torch.linalg.vector_norm(row), lambda h: torch.linalg.vector_norm(h, dim=1)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_number_of_one_sample_is_a_tap(name):
    """Regression test: in a loop over samples, queries at zero-dimensional tensors raised FoldingError."""
    one, several = LOOPS[name]
    looped = Rows(lambda h: torch.stack([one(row) for row in h])[:, None].expand(-1, 6) * h.sigmoid())
    batched = Rows(lambda h: several(h)[:, None].expand(-1, 6) * h.sigmoid())
    batched.load_state_dict(looped.state_dict())
    x = torch.rand(3, 3, dtype=torch.double)
    mu, expected = (RelevanceMeasure(net.double().eval(), x, 1, composite=NRMAbsolute()) for net in (looped, batched))
    assert_same(mu.marginal("input"), [expected.marginal("input")])
    assert set(mu.marginal(mu.layers)) == set(mu.layers)
    numbers = [layer for layer in mu.layers if mu.shape(layer) == (3,) and layer != "stack"]
    for layer in mu.layers:
        mass = mu.marginal(layer).reshape(3, -1).sum(1) + mu.sink(layer) + mu.bypass(layer)
        torch.testing.assert_close(mass, torch.ones(3, dtype=torch.double), atol=1e-6, rtol=0)
    if name != "largest":  # which only routes relevance
        assert len(numbers) >= 3
    for layer in numbers:
        assert torch.equal(mu(at(layer)), mu.marginal(layer))
        assert torch.equal(mu.marginal("input", joint=at(layer)).sum(1) != 0, mu.marginal(layer) != 0)
        assert int((mu.marginal(layer) != 0).sum()) == 1


class Uneven(nn.Module):
    """A layer of tokens of which samples have different numbers, in one tensor without padding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.tokens = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.rnn, self.head = nn.GRU(5, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.kind == "packed sequence":
            packed = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
            packed = packed._replace(data=self.tokens(packed.data))
            return self.head(self.rnn(packed)[1][-1])
        own = torch.arange(h.shape[1]) < lengths[:, None]
        if self.kind == "mask":
            tokens = self.tokens(h[own])
            padded = torch.zeros(*own.shape, 5, dtype=x.dtype).masked_scatter(own[..., None], tokens)
            return self.head(padded.sum(1))
        tokens = self.tokens(torch.cat([row[:length] for row, length in zip(h, lengths, strict=True)]))
        if self.kind == "concatenation":
            return self.head(torch.stack([part.mean(0) for part in tokens.split(lengths.tolist())]))
        return self.head(tokens.new_zeros(len(x), 5).index_add(0, own.nonzero()[:, 0], tokens))


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["packed sequence", "mask", "concatenation", "index"])
def test_samples_with_different_numbers_of_tokens_are_padded(kind):
    torch.manual_seed(0)
    net, x, lengths = Uneven(kind).double().eval(), torch.randn(3, 6, WIDTH).double(), torch.tensor([3, 6, 2])

    def measured(rows: slice) -> RelevanceMeasure:
        return RelevanceMeasure(net, x[rows], TARGET, additional_forward_args=(lengths[rows],))

    def padded(values: Tensor, dim: int) -> Tensor:
        return torch.cat([values, values.new_zeros(*values.shape[:dim], 6, *values.shape[dim + 1 :])], dim)

    mu = measured(slice(None))
    assert mu.shape("tokens") == (3, 6, 5)
    queries: list[tuple[Callable[[RelevanceMeasure], Tensor], int]] = [
        (lambda mu: mu.marginal("tokens"), 1),
        (lambda mu: mu.marginal("tokens", joint=at("input").channel(1)), 1),
        (lambda mu: mu.joint("tokens", "first", over=("position", "channel")), 1),
        (lambda mu: mu.marginal("tokens", over="channel"), 0),
        (lambda mu: mu.marginal("first", joint=at("tokens").channel([0, 2])), 0),
        (lambda mu: mu.joint("tokens", "input"), 0),
        (lambda mu: mu.joint("output", "tokens"), 0),
        (lambda mu: mu(at("tokens")), 0),
        (lambda mu: mu(~at("tokens").channel(1)), 0),
        (lambda mu: mu(at("tokens")[1] & at("first")[0]), 0),
        (lambda mu: mu.sink("tokens"), 0),
        (lambda mu: mu.variation("tokens"), 0),
    ]
    for row in range(3):
        alone = measured(slice(row, row + 1))
        for ask, dim in queries:
            ours, own = ask(mu)[row : row + 1], ask(alone)
            own = padded(own, dim).narrow(dim, 0, ours.shape[dim]) if dim else own
            torch.testing.assert_close(ours, own, atol=1e-6, rtol=1e-6)


# -- samples that mix -------------------------------------------------------------------------------------------------


def _without_gradient(h: Tensor) -> Tensor:
    with torch.no_grad():
        mean = h.mean(0)
    return h - mean


def _written(h: Tensor) -> Tensor:
    h = h.clone()
    h[1:] += h[:-1].clone()
    return h


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda h: h.softmax(0),
    "standard deviation": lambda h: h / (1 + h.std(0)),
    "detached mean": lambda h: h - h.detach().mean(0),
    "mean without a gradient": _without_gradient,
    "largest value": lambda h: h * (1 + h.max().item()),
    "gate": lambda h: h * h.mean(0, keepdim=True).sigmoid(),
    "normalize": lambda h: nn.functional.normalize(h, dim=0),
    "layer norm": lambda h: nn.functional.layer_norm(h, h.shape),
    "sort": lambda h: h.sort(0)[0],
    "order": lambda h: h[h.sum(1).argsort()],
    "running maximum": lambda h: h.cummax(0)[0],
    "gram": lambda h: torch.einsum("nc,mc,md->nd", h, h, h),
    "neighbour": lambda h: h + h.roll(1, 0),
    "pairs": lambda h: (h.view(2, 2, 6) + h.view(2, 2, 6).mean(1, keepdim=True)).view(4, 6),
    "halves": lambda h: h + torch.cat([h[2:], h[:2]]),
    "written": _written,
    "mirrored": lambda h: h + h.flip(0),
    "norms over the batch": lambda h: torch.renorm(h, 2, 1, 0.5),
    "number of values": lambda h: h * len(torch.unique((h * 2).round())),
    "number of runs": lambda h: h / (1 + torch.unique_consecutive((h * 2).round().flatten()).shape[0]),
    "reordered output": lambda h: h.flip(0),
}


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_depend_on_each_other_raise(name):
    torch.manual_seed(0)
    net, x = Rows(MIXING[name]).eval(), torch.rand(4, 3)
    asks: list[Callable[[], object]] = [
        lambda: RelevanceMeasure(net, x, 1),
        lambda: NRM(net).attribute(x, target=1),
        lambda: LayerNRM(net, "first").attribute(x, target=1),
        lambda: JointNRM(net, "first", "input").attribute(x, target=1),
        lambda: NRMAttributor(net)(x, torch.eye(2)[[1] * 4]),
    ]
    for ask in asks:
        with pytest.raises(FoldingError, match="batched=False"):
            ask()


THRESHOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "above the mean": lambda h: h * (h > h.mean()).float(),
    "where": lambda h: torch.where(h > h.detach().mean(0), h, 0.1 * h),
    "branch": lambda h: 2 * h if h.mean() > 0.4 else h,
    "largest row": lambda h: h * (1 + (torch.arange(len(h)) == h.sum(1).argmax()).float()[:, None]),
    "largest norms": lambda h: h * (1 + torch.zeros(len(h)).index_fill(0, h.norm(dim=1).topk(2)[1], 1.0)[:, None]),
}


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("seed", range(4))
def test_samples_that_depend_on_each_other_by_a_threshold_raise(name, seed):
    """A slight change of other samples crosses few thresholds, and most branches were not noticed."""
    torch.manual_seed(seed)
    net, x = Rows(THRESHOLDS[name]).eval(), torch.randn(4, 3)
    with pytest.raises(FoldingError):
        RelevanceMeasure(net, x, 1)


class Lookup(nn.Module):
    """Rows of a short table, selected by ids; the gate compares each sample with the batch."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.head, self.gate = nn.Embedding(6, 4), nn.Linear(4, 2), gate
        self.seen: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.seen.append(ids.detach().clone())
        return self.head(self.gate(self.table(ids.long()).sum(1)))


@pytest.mark.parametrize("dtype", [torch.long, torch.float])
@pytest.mark.recorded
def test_ids_remain_in_their_range_while_samples_are_exchanged(dtype):
    torch.manual_seed(0)
    net, ids = Lookup(lambda h: h.flip(0).flip(0)).eval(), torch.tensor([[0, 1], [5, 5], [2, 3]]).to(dtype)
    mu, alone = RelevanceMeasure(net, ids, 1), [RelevanceMeasure(net, row[None], 1) for row in ids]
    assert len(net.seen) > 4  # the exchanges have taken place
    assert all(bool(((seen >= 0) & (seen < 6)).all()) for seen in net.seen)
    assert_same(mu.marginal("table"), [one.marginal("table") for one in alone])
    with pytest.raises(FoldingError):
        RelevanceMeasure(Lookup(lambda h: h * (h > h.mean()).float()).eval(), ids, 1)


def test_a_model_that_checks_the_range_of_its_inputs_has_a_measure():
    def in_range(x: Tensor) -> Tensor:
        assert 0 <= float(x.detach().min()) <= float(x.detach().max()) <= 1
        return x

    torch.manual_seed(0)
    net, x = Rows(lambda h: h.flip(0).flip(0)), torch.rand(4, 3)
    ranged = nn.Sequential(Rows(lambda h: h)).eval()
    ranged[0].forward = lambda x: net(in_range(x))  # type: ignore[method-assign]
    expected = RelevanceMeasure(net.eval(), x, 1).marginal("input")
    torch.testing.assert_close(RelevanceMeasure(ranged, x, 1).marginal("input"), expected)


def test_a_constant_without_relevance_needs_no_samples():
    """Regression test: every query raised, since zeros into which values are written have no sample dimension."""
    torch.manual_seed(0)
    index = torch.tensor([0, 1, 2, 0, 1, 2])
    net = Rows(lambda h: torch.zeros_like(h).scatter_reduce(1, index.expand(len(h), 6), h, "amax")).double().eval()
    x = torch.rand(3, 3, dtype=torch.double)
    mu, alone = RelevanceMeasure(net, x, 1), [RelevanceMeasure(net, row[None], 1) for row in x]
    for layer in mu.layers:
        assert_same(mu.marginal(layer), [one.marginal(layer) for one in alone])
        assert_same(mu.sink(layer), [one.sink(layer) for one in alone])


def test_a_gated_neuron_inside_is_rejected_too():
    torch.manual_seed(0)
    net = Rows(MIXING["detached mean"], last=nn.Identity()).eval()
    with pytest.raises(FoldingError):
        NeuronNRM(net, "head").attribute(torch.rand(4, 3), 1)


PERMUTING: dict[str, Callable[[Tensor], Tensor]] = {
    "there and back": lambda h: h.flip(0).tanh().flip(0),
    "roll": lambda h: h.roll(1, 0).relu().roll(-1, 0),
    "index": lambda h: h[list(range(len(h)))[::-1]].tanh().flip(0),
    "columns": lambda h: (h.t() * torch.linspace(0, 1, 6)[:, None]).t(),
    "sorted channels": lambda h: h.sort(1)[0],
    "mask": lambda h: torch.where(h > 0.3, h, 0.1 * h),
    "largest channel": lambda h: h / (1 + h.max(1, keepdim=True)[0]),
    "norm of each sample": lambda h: torch.renorm(h, 2, 0, 0.5),
}


@pytest.mark.parametrize("name", PERMUTING)
def test_samples_that_only_change_places_do_not_mix(name):
    torch.manual_seed(0)
    net, x = Rows(PERMUTING[name]).double().eval(), torch.rand(4, 3, dtype=torch.double)
    mu, alone = RelevanceMeasure(net, x, 1), [RelevanceMeasure(net, one[None], 1) for one in x]
    for layer in mu.layers:
        assert_same(mu.marginal(layer), [one.marginal(layer) for one in alone])


def test_a_model_that_draws_at_random_is_not_taken_for_one_that_mixes():
    net = Rows(lambda h: (h * torch.rand_like(h)).flip(0).flip(0)).eval()
    assert RelevanceMeasure(net, torch.rand(4, 3), 1).marginal("input").shape == (4, 3)


def test_the_whole_batch_as_one_sample():
    torch.manual_seed(0)
    net, x = Rows(lambda h: h - h.mean(0)).eval(), torch.rand(4, 3)
    mu = RelevanceMeasure(net, x, (2, 1), batched=False)
    expected = mu.marginal("input")[0] * mu.output
    torch.testing.assert_close(NRM(net, batched=False).attribute(x, target=(2, 1)), expected)
    relevance, delta = LayerNRM(net, "first", batched=False).attribute(x, (2, 1), return_convergence_delta=True)
    assert relevance.shape == (4, 6)
    assert delta.shape == (1,)
    assert float(delta.abs()) < 1e-5
    joint = JointNRM(net, "first", "input", batched=False).attribute(x, (2, 1))
    assert joint.shape == (1, 6, 3)
    assert NeuronNRM(net, "first", batched=False).attribute(x, (2, 1)).shape == (4, 3)
    with pytest.raises(InputError, match="batched=False"):
        DataLoaderNRM(NRM(net, batched=False)).attribute([x], target=(2, 1))
    start = torch.zeros(4, 2)
    start[2, 1] = 1
    _, attributed = NRMAttributor(net, batched=False)(x, start)
    torch.testing.assert_close(attributed.marginal("input"), mu.marginal("input"))


@pytest.mark.recorded
def test_hooks_see_the_inputs_of_the_user_alone():
    net, x, seen = Rows(lambda h: h.flip(0).flip(0)).eval(), torch.rand(4, 3), []
    net.first.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().clone()))
    RelevanceMeasure(net, x, 1).marginal("first")
    assert len(seen) == 1
    assert torch.equal(seen[0], x)
