"""Recurrent layers: the output of torch, matrices written out by hand, and pairs of equivalent nets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from zennit.composites import EpsilonPlus, LayerMapComposite, NameMapComposite
from zennit.core import Composite
from zennit.rules import Epsilon, Norm, Pass, ZPlus
from zennit.types import Activation, AvgPool, Linear

from nrm_plugin import ABSORBED, Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure, at, coverage
from tests.conftest import slow_but, untouched

FEATURES, HIDDEN, TIMES = 3, 4, 4
KINDS = ("LSTM", "GRU", "RNN")
SERIES = torch.randn((3, TIMES, FEATURES), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LENGTHS = torch.tensor([2, 4, 3])


class Classifier(nn.Module):
    """A recurrent layer and a head on its last state, or on all of its outputs."""

    def __init__(self, kind: str, read: str = "last", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"batch_first": True, **options}
        self.rnn, self.read, self.batch_first = getattr(nn, kind)(FEATURES, HIDDEN, **options), read, True
        size = (options.get("proj_size") or HIDDEN) * (1 + bool(options.get("bidirectional")))
        self.head = nn.Linear(size, 2)
        self.double().eval()

    def forward(self, x: Tensor, state: Any = None, lengths: Tensor | None = None) -> Tensor:
        if not self.rnn.batch_first:
            x = x.transpose(0, 1)
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, self.rnn.batch_first, enforce_sorted=False)
        y, final = self.rnn(x, state)
        if lengths is not None and self.read != "last":
            y, _ = pad_packed_sequence(y, self.rnn.batch_first)
        if self.read == "last":
            h = final[0] if isinstance(final, tuple) else final
            directions = 1 + self.rnn.bidirectional
            return self.head(torch.cat(list(h[-directions:]), -1))
        y = y if self.rnn.batch_first else y.transpose(0, 1)
        return self.head(y.sum(1) if self.read == "sum" else y.mean(1))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "time first": {"batch_first": False},
}
CASES = [(kind, name) for kind in KINDS for name in OPTIONS] + [("LSTM", "projected"), ("RNN", "relu")]
OPTIONS |= {
    "projected": {"proj_size": 3, "num_layers": 2, "bidirectional": True},
    "relu": {"nonlinearity": "relu"},
}


def measure(net: nn.Module, x: Tensor = SERIES, composite: Composite | None = None, **options: Any) -> RelevanceMeasure:
    return RelevanceMeasure(net, x, 1, composite=composite or NRMAbsolute(), **options)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("read", slow_but(["last", "mean"], "last"))
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_loop_returns_the_output_of_the_layer_and_conserves_relevance(kind, name, read):
    net = Classifier(kind, read, **OPTIONS[name]).float()
    x = SERIES.float()
    with untouched(net, x):
        mu = RelevanceMeasure(net, x, 1)
    assert float((mu.output - net(x)[:, 1]).detach().abs().max()) <= 1e-5
    names = ["input", "rnn[0]", *[f"rnn.hidden_l0:{time}" for time in range(TIMES)], "output"]
    for tap in [tap for tap in names if tap in mu.layers]:
        total = mu.marginal(tap).sum() + (mu.sink(tap) + mu.bypass(tap)).sum()
        assert float((total - 3).abs() / 3) <= 1e-4 * max(1, float(mu.variation(tap).max()))
    assert float(mu.sink("input", "residual").abs().max()) <= 0.05
    assert not any(bool(value.any()) for value in mu.sinks("constants").values())


# -- matrices ---------------------------------------------------------------------------------------------------------


def by_size(weight: Tensor, a: Tensor) -> Tensor:
    """``|a_i w_ji| / Σ_i |a_i w_ji|`` with the floor of the rule."""
    part = weight.abs() * (a.abs() + 1e-6 * a.abs().mean())
    return part / part.sum(1, keepdim=True)


def share(a: Tensor, b: Tensor) -> Tensor:
    return a.abs() / (a.abs() + b.abs())


def lstm_walks(x: Tensor, w: list[Tensor], h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor]:
    """``T[t][j, i]``, what the last hidden neuron ``j`` passes to input ``i`` at time ``t``, and to initial states."""
    w_ih, w_hh, b_ih, b_hh = w
    size = w_hh.shape[1]
    h = torch.zeros(size).double() if h0 is None else h0
    c = torch.zeros(size).double() if c0 is None else c0
    steps = []
    signal = slice(2 * size, 3 * size)
    for number, value in enumerate(x):
        from_x, from_h = w_ih @ value + b_ih, w_hh @ h + b_hh
        i, f, g, o = (from_x + from_h).reshape(4, size)
        fresh, old = i.sigmoid() * g.tanh(), f.sigmoid() * c
        above = torch.ones(size).double() if number == 0 else share(from_x[signal], from_h[signal])
        if number == 0 and h0 is not None:
            above = share(from_x[signal], w_hh[signal] @ h)
        steps.append((share(old, fresh), above, by_size(w_ih[signal], value), by_size(w_hh[signal], h)))
        c = old + fresh
        h = o.sigmoid() * c.tanh()
    to_cell, to_inputs = torch.eye(size).double(), []  # relevance of the cell state, by neuron at the end
    from_state = torch.zeros(size).double()
    for number in range(len(x) - 1, -1, -1):
        keep, above, down_x, down_h = steps[number]
        to_signal = to_cell * (1 - keep)
        to_inputs.insert(0, (to_signal * above) @ down_x)
        to_hidden = (to_signal * (1 - above)) @ down_h
        if number == 0:
            from_state = (to_cell * keep).sum(1) + to_hidden.sum(1)
        to_cell = to_cell * keep + to_hidden
    return torch.stack(to_inputs, 1), from_state


def gru_walks(x: Tensor, w: list[Tensor], h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, b_ih, b_hh = w
    size = w_hh.shape[1]
    h = torch.zeros(size).double() if h0 is None else h0
    steps, new = [], slice(2 * size, 3 * size)
    for number, value in enumerate(x):
        x_r, x_z, x_n = (w_ih @ value + b_ih).reshape(3, size)
        h_r, h_z, h_n = (w_hh @ h + b_hh).reshape(3, size)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        above = share(x_n, r * h_n)
        if number == 0:
            above = torch.ones(size).double() if h0 is None else share(x_n, r * (w_hh[new] @ h))
        steps.append((share(z * h, (1 - z) * n), above, by_size(w_ih[new], value), by_size(w_hh[new], h)))
        h = (1 - z) * n + z * h
    to_cell, to_inputs = torch.eye(size).double(), []
    for keep, above, down_x, down_h in reversed(steps):
        to_signal = to_cell * (1 - keep)
        to_inputs.insert(0, (to_signal * above) @ down_x)
        to_cell = to_cell * keep + (to_signal * (1 - above)) @ down_h
    return torch.stack(to_inputs, 1), to_cell.sum(1)


def rnn_walks(x: Tensor, w: list[Tensor], h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, b_ih, b_hh = w
    h = torch.zeros(w_hh.shape[1]).double() if h0 is None else h0
    steps = []
    for number, value in enumerate(x):
        from_x, from_h = w_ih @ value + b_ih, w_hh @ h + b_hh
        above = share(from_x, from_h)
        if number == 0:
            above = torch.ones(len(h)).double() if h0 is None else share(from_x, w_hh @ h)
        steps.append((above, by_size(w_ih, value), by_size(w_hh, h)))
        h = (from_x + from_h).tanh()
    to_cell, to_inputs = torch.eye(len(h)).double(), []
    for above, down_x, down_h in reversed(steps):
        to_inputs.insert(0, (to_cell * above) @ down_x)
        to_cell = (to_cell * (1 - above)) @ down_h
    return torch.stack(to_inputs, 1), to_cell.sum(1)


WALKS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"LSTM": lstm_walks, "GRU": gru_walks, "RNN": rnn_walks}


class Last(nn.Module):
    """The last hidden state, of the layer or of a loop over its cell."""

    def __init__(self, layer: nn.RNNBase, is_cell: bool) -> None:
        super().__init__()
        self.layer, self.is_cell = layer, is_cell
        if is_cell:
            self.layer = getattr(nn, f"{type(layer).__name__}Cell")(FEATURES, HIDDEN).double()
            for name, parameter in self.layer.named_parameters():
                parameter.data = getattr(layer, f"{name}_l0").data

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        if not self.is_cell:
            final = self.layer(x, state)[1]
            return (final[0] if isinstance(final, tuple) else final)[0]
        state = state if state is None else tuple(s[0] for s in state) if isinstance(state, tuple) else state[0]
        for time in range(x.shape[1]):
            state = self.layer(x[:, time], state)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("is_cell", [False, True], ids=["layer", "cell"])
@pytest.mark.parametrize("has_state", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_cells_are_the_matrices_written_out_here(kind, has_state, is_cell):
    torch.manual_seed(3)
    layer = getattr(nn, kind)(FEATURES, HIDDEN, batch_first=True).double()
    x, h0, c0 = SERIES[0, :3], torch.randn(HIDDEN).double(), torch.randn(HIDDEN).double()
    weights = [p.detach() for p in layer.parameters()]
    walks, ended = WALKS[kind](x, weights, *((h0, c0) if has_state else (None, None)))
    given = tuple(s.expand(1, HIDDEN, HIDDEN) for s in (h0, c0))
    state = (given if kind == "LSTM" else given[0]) if has_state else None
    rules = Normalized(NRMAbsolute(), residual="sink")
    mu = RelevanceMeasure(
        Last(layer, is_cell).eval(),
        x.expand(HIDDEN, *x.shape),
        start=torch.eye(HIDDEN).double(),
        composite=rules,
        additional_forward_args=(state,),
    )
    close(mu.marginal("input"), walks)
    close(mu.sink("input", "constants"), ended if has_state else torch.zeros(HIDDEN).double())
    close(mu.sink("input", "residual"), torch.zeros(HIDDEN).double())
    assert not has_state or float(ended.min()) > 1e-3


# -- pairs ------------------------------------------------------------------------------------------------------------


COMPOSITES = {"default": NRMDefault, "absolute": NRMAbsolute, "plus": EpsilonPlus}


def check_same_measure(
    mu: RelevanceMeasure, nu: RelevanceMeasure, rows: slice = slice(None), times: int = TIMES, tolerance: float = 1e-9
) -> None:
    close(mu.output[rows], nu.output)
    bound = tolerance * float(mu.variation("input").max())
    close(mu.marginal("input")[rows, :times], nu.marginal("input"), bound)
    close(mu.sink("input")[rows], nu.sink("input"), bound)


@pytest.mark.parametrize("rules", COMPOSITES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_and_a_loop_over_its_cell_agree(kind, rules):
    torch.manual_seed(1)
    layer = getattr(nn, kind)(FEATURES, HIDDEN, batch_first=True).double()
    pair = [measure(Last(layer, is_cell).eval(), composite=COMPOSITES[rules]()) for is_cell in (False, True)]
    check_same_measure(*pair)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rules"), list(zip(KINDS, COMPOSITES, strict=True)))
def test_a_batch_and_its_samples_agree(kind, rules):
    net = Classifier(kind, bidirectional=True, num_layers=2)
    mu = measure(net, composite=COMPOSITES[rules]())
    for row in range(len(SERIES)):
        check_same_measure(mu, measure(net, SERIES[row : row + 1], COMPOSITES[rules]()), slice(row, row + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "read", "rules"),
    [*[(kind, "last", "default") for kind in KINDS], ("LSTM", "sum", "plus"), ("GRU", "sum", "absolute")],
)
def test_a_packed_batch_and_its_truncated_samples_agree(kind, read, rules):
    net = Classifier(kind, read, bidirectional=True, num_layers=2, batch_first=rules != "plus")
    mu = measure(net, composite=COMPOSITES[rules](), additional_forward_args=(None, LENGTHS))
    close(mu.output, net(SERIES, None, LENGTHS)[:, 1].detach())
    floor = 1e-6 if rules == "absolute" else 1e-9  # what the rule of a sum passes to zeros, here the padding
    assert all(float(value.abs().max()) <= floor for value in mu.sinks("constants").values())
    for row, length in enumerate(LENGTHS.tolist()):
        cut = measure(net, SERIES[row : row + 1, :length], COMPOSITES[rules]())
        check_same_measure(mu, cut, slice(row, row + 1), length, floor)
        assert not mu.marginal("input")[row, length:].any()


def test_the_padding_of_a_packed_batch_is_a_constant_of_its_sample():
    class Padded(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, LENGTHS, True, enforce_sorted=False)
            y, _ = pad_packed_sequence(self.rnn(packed)[0], True, padding_value=0.5)
            return self.head(y.sum(1))

    mu = measure(Padded("GRU"))
    constants = mu.sink("input", "constants")
    assert constants[1] == 0
    assert float(constants[0]) > float(constants[2]) > 0.01
    close(mu.marginal("input").flatten(1).sum(1) + mu.sink("input"), torch.ones(3).double())


@pytest.mark.medium
@pytest.mark.parametrize("kind", slow_but(KINDS, "GRU"))
def test_directions_and_layers_equal_stacked_single_layers(kind):
    both = Classifier(kind, "sum", bidirectional=True, num_layers=2)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.head = nn.ModuleList(), both.head
            for layer in range(2):
                for suffix in ("", "_reverse"):
                    part = getattr(nn, kind)(FEATURES if layer == 0 else 2 * HIDDEN, HIDDEN, batch_first=True).double()
                    for name, parameter in part.named_parameters():
                        parameter.data = getattr(both.rnn, name.replace("l0", f"l{layer}") + suffix).data
                    self.parts.append(part)

        def forward(self, x: Tensor) -> Tensor:
            for layer in range(2):
                forth, back = self.parts[2 * layer], self.parts[2 * layer + 1]
                x = torch.cat([forth(x)[0], back(x.flip(1))[0].flip(1)], -1)
            return self.head(x.sum(1))

    check_same_measure(measure(both), measure(Apart().eval()))


def test_one_sequence_without_a_batch_is_one_sample():
    class Single(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][-1])

    net, batch = Single("LSTM"), Classifier("LSTM")
    mu, nu = measure(net, SERIES[0], batched=False), measure(batch, SERIES[:1])
    close(mu.marginal("input"), nu.marginal("input"), 1e-6)  # another floor of the rule for inputs of zero
    close(mu(at("input")[3, 1]), nu(at("input")[3, 1]), 1e-6)


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "state"), [("LSTM", "cell"), ("GRU", "hidden"), ("RNN", "hidden")])
@pytest.mark.parametrize("is_reverse", [False, True])
def test_walks_cross_a_state_exactly_if_they_end_at_earlier_inputs(kind, state, is_reverse):
    net = Classifier(kind, bidirectional=True)
    with torch.no_grad():
        net.head.weight[:, slice(0, HIDDEN) if is_reverse else slice(HIDDEN, None)] = 0
    mu = measure(net)
    by_time = mu.marginal("input").sum(2)
    name = f"rnn.{state}_l0{'_reverse' if is_reverse else ''}"
    for time in range(TIMES):
        read = by_time[:, time:] if is_reverse else by_time[:, : time + 1]
        close(mu(at(name, call=time)), read.sum(1), 1e-5)  # the floor of a rule for inputs of zero
    assert mu.shape(f"{name}:0") == (3, HIDDEN)
    event = at(name, call=1)[2] & at("input")[3 if is_reverse else 0]
    assert bool((mu(event) > 0).all())


@pytest.mark.medium
def test_a_given_state_may_be_an_input():
    class Started(Classifier):
        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            return self.head(self.rnn(x, state.unsqueeze(0))[1][0])

    torch.manual_seed(0)
    net, h0 = Started("GRU"), torch.randn(3, HIDDEN).double()
    mu = RelevanceMeasure(net, (SERIES, h0), 1, composite=NRMAbsolute())
    nu = measure(net, additional_forward_args=(h0,))
    close(mu.marginal("input[1]").sum(1), nu.sink("input", "constants"), 1e-2)  # there the bias is a summand of its own
    close(nu(ABSORBED), nu.sink("input"))
    total = mu.marginal("input[0]").flatten(1).sum(1) + mu.marginal("input[1]").sum(1)
    close(total, torch.ones(3).double())


@pytest.mark.medium
def test_an_initial_state_of_zeros_equals_none():
    net = Classifier("LSTM", num_layers=2)
    zeros = torch.zeros(2, 3, HIDDEN).double()
    some = torch.zeros_like(zeros)
    some[:, 1] = 1.0
    mu, nu = measure(net), measure(net, additional_forward_args=((some, some),))
    check_same_measure(mu, measure(net, additional_forward_args=((zeros, zeros),)))
    close(mu.marginal("input")[[0, 2]], nu.marginal("input")[[0, 2]])
    assert (nu.sink("input", "constants") > 1e-3).tolist() == [False, True, False]


# -- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_a_rule_for_the_layer_is_the_rule_of_its_linear_maps():
    base = [(Activation, Pass()), (AvgPool, Norm())]
    net = Classifier("LSTM", bidirectional=True)
    everywhere = LayerMapComposite([*base, (Linear, ZPlus())])
    by_kind = LayerMapComposite([*base, (nn.LSTM, ZPlus()), (Linear, Epsilon())])
    by_name = NameMapComposite([(["rnn"], ZPlus()), (["head"], Epsilon())])
    mu, nu, named = (measure(net, composite=rules) for rules in (everywhere, by_kind, by_name))
    steps = {row.rule for row in coverage(net, SERIES, by_kind).rows if row.name.startswith("rnn.linear")}
    assert steps == {"ZPlus"}
    nu.marginal("input")
    close(nu.marginal("input"), named.marginal("input"))
    assert not torch.allclose(mu.marginal("input"), nu.marginal("input"))
    cell = Last(nn.GRU(FEATURES, HIDDEN, batch_first=True).double(), True).eval()
    rows = coverage(cell, SERIES, LayerMapComposite([*base, (nn.GRUCell, ZPlus()), (Linear, Epsilon())])).rows
    assert {row.rule for row in rows if row.operation == "linear"} == {"ZPlus"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_of_the_composite_propagates_the_same_relevance(kind):
    net, x = Classifier(kind), SERIES.clone().requires_grad_()
    expected = measure(net).marginal("input")
    weights = copy.deepcopy(net.state_dict())
    with Normalized(NRMAbsolute()).context(net) as modified:
        (relevance,) = torch.autograd.grad(modified(x)[:, 1].sum(), x)
    close(relevance, expected)
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
