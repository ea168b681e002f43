"""Walks end at the rows that ids among the inputs select, however the model changes and looks up its ids.

The expected values are those of the rest of the model, which takes the selected rows as its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from zennit.composites import NameMapComposite
from zennit.rules import Epsilon

from nrm_plugin import NRM, LayerNRM, RelevanceMeasure, at
from nrm_plugin.errors import InputError

IDS = torch.tensor([[0, 1, 2, 3], [4, 2, 2, 0], [5, 5, 1, 3]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TABLE = drawn(40, 6)


class Rest(nn.Module):
    """What follows the rows of a sample, ``(N, T, C)`` or ``(N, C)``."""

    def __init__(self, features: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(features, 5).double(), nn.Linear(5, 3).double()

    def forward(self, rows: Tensor) -> Tensor:
        hidden = torch.relu(self.a(rows))
        return self.b(hidden.mean(1) if hidden.ndim == 3 else hidden)


class Model(nn.Module):
    """A function of ids and a table, and the rest."""

    def __init__(self, look: Callable[[Tensor, Tensor], Tensor], features: int = 6) -> None:
        super().__init__()
        self.table, self.look, self.rest = nn.Parameter(TABLE.clone()), look, Rest(features)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rest(self.look(ids, self.table))


def written(ids: Tensor) -> Tensor:
    full = torch.full((len(ids), 6), 7)
    full[:, 1:5] = ids
    return full


def copied(ids: Tensor) -> Tensor:
    full = torch.zeros(len(ids), 6, dtype=torch.long)
    full[:, 2:].copy_(ids)
    return full


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda t: t,
    "transposed twice": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: t[:, 1:],
    "one column": lambda t: t[:, 2],
    "shifted": lambda t: t + 1,
    "shifted from the right": lambda t: 3 + t,
    "hashed": lambda t: (t * 31 + 7) % 39,
    "xor": lambda t: t ^ 5,
    "clamped": lambda t: t.clamp(1, 3),
    "in place": lambda t: t.add_(2).clamp_(max=5),
    "stacked": lambda t: torch.stack([t, t + 1], 2).flatten(1),
    "padded": lambda t: functional.pad(t, (0, 2), value=9),
    "with a class token": lambda t: torch.cat([torch.full((len(t), 1), 8), t], 1),
    "where": lambda t: torch.where(t == 2, 11, t),
    "masked": lambda t: t.masked_fill(t > 3, 0),
    "written into another tensor": written,
    "copied into another tensor": copied,
    "converted": lambda t: t.int().to(torch.int64),
    "rolled": lambda t: t.roll(1, 1).flip(1),
    "bigrams": lambda t: torch.cat([t[:, :-1] * 6 + t[:, 1:]], 1),
    "remapped by a table of integers": lambda t: torch.arange(39, -1, -1)[t],
    "divided": lambda t: torch.div(t, 2, rounding_mode="floor"),
    "through floating point": lambda t: (t.float() * 2).round().long(),
    "split": lambda t: torch.cat([c + k for k, c in enumerate(t.unbind(1))]).view(4, -1).t(),
    "embedded in a list": lambda t: torch.stack([row for row in t]),
}

LOOKUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.embedding": lambda t, w: functional.embedding(t, w),
    "torch.embedding": lambda t, w: torch.embedding(w, t),
    "aten": lambda t, w: torch.ops.aten.embedding(w, t),
    "index": lambda t, w: w[t],
    "index of columns": lambda t, w: w.t()[:, t].movedim(0, -1),
    "index_select": lambda t, w: w.index_select(0, t.flatten()).view(*t.shape, -1),
    "gather": lambda t, w: w[None].expand(len(t), -1, -1).gather(1, t[..., None].expand(-1, -1, 6)),
    "take": lambda t, w: torch.take(w, t[..., None] * 6 + torch.arange(6)),
    "take_along_dim": lambda t, w: torch.take_along_dim(w[None], t[..., None], 1),
    "computed table": lambda t, w: torch.cat([w[:20] * 2, w[20:]])[t],
    "rows of a batch of tables": lambda t, w: w.expand(len(t), -1, -1)[torch.arange(len(t))[:, None], t],
    "by a module": lambda t, w: nn.Embedding(*w.shape, _weight=w)(t),
    "without gradients": lambda t, w: look_without_gradients(t, w),
    "out": lambda t, w: torch.index_select(w, 0, t[:, 0], out=torch.empty(len(t), 6, dtype=w.dtype)),
}


def look_without_gradients(ids: Tensor, table: Tensor) -> Tensor:
    with torch.no_grad():
        return table[ids + 0]


def compared(model: nn.Module, ids: Tensor, rows: Tensor, rest: nn.Module, prefix: str = "") -> None:
    """The lowest tap of a model of ids has the relevance of the rows as inputs of the rest."""
    expected = RelevanceMeasure(rest.eval(), rows.detach().clone(), 1)
    mu = RelevanceMeasure(model.eval(), ids, 1)
    lowest = mu.layers[0]
    assert torch.allclose(
        mu.marginal(at("rest.a", side="input")), expected.marginal(at(prefix + "a", side="input")), atol=1e-12
    )
    assert torch.allclose(mu(at(lowest)).double(), expected(at("input")), atol=1e-6), lowest
    assert torch.allclose(mu.sink(lowest).double(), expected.sink("input"), atol=1e-6)
    if mu.shape(lowest) == rows.shape:
        assert torch.allclose(mu.marginal(lowest).double(), expected.marginal("input"), atol=1e-6), lowest
    assert float(mu.marginal(lowest).abs().sum()) > 0.1


@pytest.mark.parametrize("name", CHANGES)
def test_ids_are_followed_through_functions_of_integers(name: str) -> None:
    change = CHANGES[name]
    model, ids = Model(lambda t, w: functional.embedding(change(t), w)), IDS.clone()
    compared(model, ids, TABLE[change(IDS.clone())], model.rest)
    assert torch.equal(ids, IDS)


@pytest.mark.parametrize("name", LOOKUPS)
def test_every_lookup_of_ids_ends_walks(name: str) -> None:
    model = Model(LOOKUPS[name])
    compared(model, IDS, LOOKUPS[name](IDS, TABLE), model.rest)


ONE_HOT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float": lambda t, w: functional.one_hot(t, 40).float().double(),
    "to": lambda t, w: functional.one_hot(t, 40).to(w),
    "type_as": lambda t, w: functional.one_hot(t, num_classes=40).type_as(w),
    "times a number": lambda t, w: (functional.one_hot(t, 40) * 1.0).double(),
    "bag": lambda t, w: functional.one_hot(t, 40).sum(1).double(),
    "scatter": lambda t, w: w.new_zeros(*t.shape, 40).scatter_(2, t[..., None], 1.0),
    "scatter of integers": lambda t, w: torch.zeros(*t.shape, 40).long().scatter(-1, t[..., None], 1).double(),
}


@pytest.mark.parametrize("name", ONE_HOT)
def test_one_hot_vectors_of_ids_are_inputs(name: str) -> None:
    model = Model(ONE_HOT[name], 40)
    compared(model, IDS, ONE_HOT[name](IDS, TABLE), model.rest)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_rows_are_inputs(mode: str) -> None:
    model = Model(lambda t, w: functional.embedding_bag(t, w, mode=mode))
    compared(model, IDS, functional.embedding_bag(IDS, TABLE, mode=mode), model.rest)


class Weighted(nn.Module):
    """A bag of rows with weights that are an input as well, or the same written out."""

    def __init__(self, is_bag: bool, **options: Any) -> None:
        super().__init__()
        self.table, self.rest, self.is_bag, self.options = nn.Parameter(TABLE.clone()), Rest(), is_bag, options

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        if self.is_bag:
            bag = functional.embedding_bag(ids, self.table, mode="sum", per_sample_weights=weights, **self.options)
            return self.rest(bag)
        rows = functional.embedding(ids, self.table) * weights[..., None]
        if "padding_idx" in self.options:
            rows = rows * (ids != self.options["padding_idx"])[..., None]
        return self.rest(rows.sum(1))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}])
def test_weights_of_a_bag_may_be_an_input_beside_the_ids(options: dict[str, Any]) -> None:
    """Regression test: an error stated that the ids select no rows."""
    weights = drawn(3, 4, seed=3).abs() + 0.1
    bag, rows = (RelevanceMeasure(Weighted(is_bag, **options).eval(), (IDS, weights), 1) for is_bag in (True, False))
    assert torch.equal(bag.outputs, bag.outputs)
    torch.testing.assert_close(bag.outputs, rows.outputs)
    for layer in ("rest.a", "rest.b"):
        torch.testing.assert_close(bag.marginal(layer), rows.marginal(layer))
    (looked_up,) = [layer for layer in bag.layers if layer.endswith("embedding")]
    (expected,) = [layer for layer in rows.layers if layer.endswith("embedding")]
    torch.testing.assert_close(bag.marginal(looked_up), rows.marginal(expected))
    total = bag(at(looked_up)) + bag(at("input")) + bag.sink("rest.a")
    torch.testing.assert_close(bag(at("rest.a")) + bag.sink("rest.a"), total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_a_table_of_a_bag_may_be_computed_from_the_inputs(mode: str) -> None:
    class Computed(nn.Module):
        def __init__(self, is_bag: bool) -> None:
            super().__init__()
            self.rest, self.is_bag = Rest(), is_bag

        def forward(self, table: Tensor) -> Tensor:
            table = table[0].tanh()
            if self.is_bag:
                return self.rest(functional.embedding_bag(IDS[:1], table, mode=mode))
            rows = table[IDS[:1]]
            return self.rest(rows.sum(1) if mode == "sum" else rows.mean(1))

    x = drawn(1, 40, 6, seed=4)
    bag, rows = (RelevanceMeasure(Computed(is_bag).eval(), x, 1) for is_bag in (True, False))
    torch.testing.assert_close(bag.outputs, rows.outputs)
    torch.testing.assert_close(bag.marginal("input"), rows.marginal("input"), atol=1e-6, rtol=1e-6)


class Own(nn.Module):
    """An embedding of the user's own: scaled, with positions and token types that are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(TABLE.clone())
        self.places = nn.Embedding(40, 6, _weight=drawn(40, 6, seed=1))
        self.types = nn.Embedding(40, 6, _weight=drawn(40, 6, seed=2))

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).expand_as(ids)
        return self.added(self.table[ids], places, torch.zeros_like(ids))

    def added(self, rows: Tensor, places: Tensor, types: Tensor) -> Tensor:
        return rows * 2 + self.places(places) + self.types(types)


class Text(nn.Module):
    def __init__(self, takes_rows: bool = False) -> None:
        super().__init__()
        self.own, self.rest, self.takes_rows = Own(), Rest(), takes_rows

    def forward(self, ids: Tensor) -> Tensor:
        if not self.takes_rows:
            return self.rest(self.own(ids))
        places = torch.arange(ids.shape[1]).expand(len(ids), -1)
        return self.rest(self.own.added(ids, places, torch.zeros_like(places)))


@pytest.mark.parametrize("ids", [IDS, torch.arange(4)[None].repeat(2, 1), torch.zeros(2, 4, dtype=torch.long)])
def test_positions_and_types_equal_to_the_ids_are_constants(ids: Tensor) -> None:
    compared(Text(), ids, TABLE[ids], Text(takes_rows=True), "rest.")


@pytest.mark.parametrize("ruled", ["own", "own.places"])
def test_a_rule_for_the_embedding_changes_nothing(ruled: str) -> None:
    composite = NameMapComposite([([ruled, "rest.a", "rest.b"], Epsilon())])
    plain = NameMapComposite([(["rest.a", "rest.b"], Epsilon())])
    one, two = (RelevanceMeasure(Text().eval(), IDS, 1, composite=c) for c in (composite, plain))
    assert torch.equal(one.marginal("own.getitem"), two.marginal("own.getitem"))


def test_position_ids_that_are_passed_are_an_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.rest = Own(), Rest()

        def forward(self, ids: Tensor, places: Tensor) -> Tensor:
            return self.rest(self.own.table[ids] + self.own.places(places))

    class Rows(Two):
        def forward(self, rows: Tensor, places: Tensor) -> Tensor:
            return self.rest(rows + places)

    places = torch.arange(4).expand(3, -1)
    mu = RelevanceMeasure(Two().eval(), (IDS, places), 1)
    rows = RelevanceMeasure(Rows().eval(), (TABLE[IDS], drawn(40, 6, seed=1)[places]), 1)
    assert torch.allclose(mu.marginal("own.places"), rows.marginal("input[1]"))
    assert torch.allclose(mu.marginal("getitem"), rows.marginal("input[0]"))
    mu = RelevanceMeasure(Two().eval(), IDS, 1, additional_forward_args=places)
    assert "own.places" not in mu.layers
    mu = RelevanceMeasure(Two().eval(), (IDS, IDS), 1)  # the same tensor twice is two inputs
    assert {"own.places", "getitem"} <= set(mu.layers)


class Masked(nn.Module):
    """As in transformers: ids and a mask of integers, which is a factor, a length, and a bias of scores."""

    def __init__(self, takes_rows: bool = False) -> None:
        super().__init__()
        self.tokens, self.rest = nn.Embedding(40, 6, _weight=TABLE.clone()), Rest()
        self.takes_rows = takes_rows

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        rows = input_ids if self.takes_rows else self.tokens(input_ids)
        scores = rows @ rows.transpose(1, 2) + (1 - attention_mask[:, None].double()) * -1e9
        mixed = scores.softmax(-1) @ rows
        return self.rest((mixed * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", ["keywords", "positions"])
def test_a_mask_of_integers_is_a_constant(kind: str) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    inputs: Any = {"input_ids": IDS, "attention_mask": mask} if kind == "keywords" else (IDS, mask)
    mu = RelevanceMeasure(Masked().eval(), inputs, 1)
    rows = RelevanceMeasure(Masked(takes_rows=True).eval(), TABLE[IDS], 1, additional_forward_args=mask)
    assert torch.allclose(mu.marginal("tokens"), rows.marginal("input"), atol=1e-12)
    assert torch.allclose(mu.sink("tokens"), rows.sink("input"), atol=1e-12)


def test_positions_counted_from_a_mask_that_is_passed_by_keyword_are_constants() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.rest = Own(), Rest()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.rest(self.own.table[input_ids] + self.own.places(attention_mask.cumsum(1) * attention_mask))

    mu = RelevanceMeasure(Counted().eval(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, 1)
    assert "own.places" not in mu.layers
    positions = Model(lambda t, w: w[t] + drawn(40, 6, seed=1)[(t != 5).long().cumsum(1)])
    assert sum(name.startswith("getitem") for name in RelevanceMeasure(positions.eval(), IDS, 1).layers) == 1


def test_ids_of_another_dtype_in_a_table_of_numbers() -> None:
    """Columns of ids among the columns of numbers, all in floating point."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kinds, self.rest = nn.Embedding(40, 6, _weight=TABLE.clone()), Rest(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(torch.cat([self.kinds(x[:, 0].round().long()), x[:, 1:]], 1))

    class Rows(Table):
        def forward(self, x: Tensor) -> Tensor:
            return self.rest(x)

    x = torch.cat([torch.tensor([[3.0], [1.0], [0.2]]).double(), drawn(3, 2)], 1)
    rows = torch.cat([TABLE[[3, 1, 0]], x[:, 1:]], 1)
    mu, expected = RelevanceMeasure(Table().eval(), x, 1), RelevanceMeasure(Rows().eval(), rows, 1)
    assert torch.allclose(mu.marginal("kinds"), expected.marginal("input")[:, :6], atol=1e-12)
    assert torch.allclose(mu.marginal("input")[:, 1:], expected.marginal("input")[:, 6:], atol=1e-12)
    assert not mu.marginal("input")[:, 0].any()
    only = Model(lambda t, w: w[t.long()])
    compared(only, IDS.double(), TABLE[IDS], only.rest)
    with pytest.raises(InputError, match=r"LayerNRM\(model, 'getitem'\)"):
        NRM(only).attribute(IDS.double(), target=1)


def test_numbers_computed_by_layers_and_then_rounded_select_constants() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.book, self.rest = nn.Linear(4, 6).double(), nn.Embedding(40, 6).double(), Rest()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            return self.rest(hidden + self.book(hidden.argmax(1)) + self.book((hidden * 3).long().clamp(0, 9)[:, 0]))

    assert not any("book" in name for name in RelevanceMeasure(Quantized().eval(), drawn(3, 4), 1).layers)


def test_ids_that_index_a_signal_or_weights_are_constants() -> None:
    """Such as the last step of each sequence, the edges of a graph, and the matrix of a relation."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest, self.tokens = Rest(), nn.Embedding(40, 6, _weight=TABLE.clone())
            self.matrices = nn.Parameter(drawn(40, 6, 6))

        def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
            last = self.tokens(ids)[torch.arange(len(ids)), lengths - 1]
            return self.rest(torch.bmm(last[:, None], self.matrices[lengths])[:, 0])

    lengths = torch.tensor([4, 2, 3])
    both = RelevanceMeasure(Last().eval(), (IDS, lengths), 1)
    alone = RelevanceMeasure(Last().eval(), IDS, 1, additional_forward_args=lengths)
    assert both.layers == alone.layers
    assert torch.equal(both.marginal("tokens"), alone.marginal("tokens"))


def test_degrees_of_a_graph_are_constants() -> None:
    class Degrees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kinds, self.rest = nn.Embedding(40, 6, _weight=TABLE.clone()), Rest()

        def forward(self, kinds: Tensor, edges: Tensor) -> Tensor:
            degree = torch.zeros(len(kinds)).double().scatter_add_(0, edges[:, 1], torch.ones(len(edges)).double())
            scale = (1 + degree).rsqrt()
            encoded = TABLE[torch.bincount(edges[:, 1], minlength=len(kinds))] + TABLE[edges.argmax(1).sum()]
            messages = (self.kinds(kinds) + encoded)[edges[:, 0]] * (scale[edges[:, 0]] * scale[edges[:, 1]])[:, None]
            return self.rest(torch.zeros(len(kinds), 6).double().index_add(0, edges[:, 1], messages))

    edges = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]])
    kinds = torch.tensor([3, 1, 7])
    both = RelevanceMeasure(Degrees().eval(), (kinds, edges), (0, 1), batched=False)
    alone = RelevanceMeasure(Degrees().eval(), kinds, (0, 1), additional_forward_args=edges, batched=False)
    assert both.layers == alone.layers
    assert torch.equal(both.marginal("kinds"), alone.marginal("kinds"))


def test_integers_that_are_looked_up_nowhere_raise() -> None:
    for look in (lambda t, w: t.double() @ w[:4], lambda t, w: (t == 2).double() @ w[:4], lambda t, w: t @ w[:4]):
        with pytest.raises(InputError, match=r"F\.one_hot looks up"):
            RelevanceMeasure(Model(look).eval(), IDS, 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_bytes_and_truth_values_raise(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"{dtype}.*`\.float\(\)` \(ids with `\.long\(\)`\)"):
        RelevanceMeasure(Model(lambda t, w: w[t.long()]).eval(), IDS.to(dtype), 1)


def test_a_table_of_columns_has_one_tap_for_each_embedding() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.kinds, self.rest = nn.ModuleList(nn.Embedding(6, 2) for _ in range(4)).double(), Rest(9)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.rest(torch.cat([*(kind(ids[:, k]) for k, kind in enumerate(self.kinds)), x], 1))

    net, x = Columns().eval(), drawn(3, 1)
    rows = torch.cat([*(kind(IDS[:, k]) for k, kind in enumerate(net.kinds)), x], 1).detach()
    expected = RelevanceMeasure(net.rest, rows, 1).marginal("input")
    mu = RelevanceMeasure(net, (IDS, x), 1)
    for k, part in enumerate(expected[:, :8].split(2, 1)):
        assert torch.allclose(mu.marginal(f"kinds.{k}"), part, atol=1e-12)
        assert LayerNRM(net, net.kinds[k]).attribute((IDS, x), target=1).shape == (3, 2)
    assert torch.allclose(mu.marginal(at("input")), expected[:, 8:], atol=1e-12)


IN_PYTHON: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tolist": lambda t, w: torch.stack([w[row] for row in t.tolist()]),
    "numpy": lambda t, w: w[torch.from_numpy(t.numpy())],
    "array": lambda t, w: w[torch.from_numpy(np.asarray(t) + 1)],
    "item": lambda t, w: torch.stack([torch.stack([w[one.item()] for one in row]) for row in t]),
    "int": lambda t, w: torch.stack([torch.stack([w[int(one)] for one in row]) for row in t]),
    "tensor of a list": lambda t, w: functional.embedding(torch.tensor((t + 1).tolist()), w),
}


@pytest.mark.parametrize("name", IN_PYTHON)
def test_ids_that_are_read_as_numbers_of_python_raise_and_name_the_line(name: str) -> None:
    with pytest.raises(
        InputError, match=r"Python or NumPy numbers, by '\w+' .*test_integer_inputs.py.*Look up the tensor itself"
    ):
        RelevanceMeasure(Model(IN_PYTHON[name]).eval(), IDS, 1)
