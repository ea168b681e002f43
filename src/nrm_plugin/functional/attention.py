r"""Attention: which tokens a token draws on, and what of them.

.. math:: O_{ik} = \sum_j A_{ij} V_{jk}, \qquad A = \mathrm{softmax}(Q K^\top)

By default the weights ``A`` are constants and all relevance goes to the values. ``attention="halves"`` hands one half
to the weights, and from there to queries and keys, as AttnLRP (arXiv 2402.05602) does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.rule_reader import read_rule_at
from ..model.affine import Weightless
from ..rules import Absolute
from .elementwise import PlacedKernel, elementwise
from .registry import FunctionCall, Slot, kernel
from .unknown import Unknown

Attention = Literal["value", "halves"]
ATTENTIONS: tuple[Attention, ...] = ("value", "halves")
FUSED = "scaled_dot_product_attention"


@kernel(FUSED)
def fused(call: FunctionCall) -> Kernel:
    r"""All to the values, by absolute share.

    .. math:: T_{ik,jk} = \frac{A_{ij} |V_{jk}|}{\sum_{j'} A_{ij'} |V_{j'k}|}

    The weights are read off the function itself, which hands out ``A`` where the values are the identity: so masks,
    causality and groups of queries mean what they mean there.

    Source: MEASURE, section 5 (ours).
    """
    slot = call.argument(2, "value")
    shapes = [value.shape for value in call.values]
    if call.argument(4, "dropout_p", 0.0):
        return Unknown(UnsupportedOperationError(_DROPPED.format(where=call.path or "the model")), shapes)
    assert isinstance(slot, Slot), "taken apart when it ran"
    value = call.values[slot.number]
    unit = torch.eye(value.shape[-2], dtype=value.dtype, device=value.device)
    filled = list(call.values)
    filled[slot.number] = unit.expand(*value.shape[:-1], len(unit))
    with torch.no_grad():
        weights = call.run(*filled)

    def run(source: Tensor) -> Tensor:
        heads = 1 if source.ndim < 3 or weights.ndim != source.ndim else weights.shape[-3] // source.shape[-3]
        return torch.matmul(weights, source.repeat_interleave(heads, -3) if heads > 1 else source)

    return PlacedKernel(read_rule_at(Absolute(), Weightless(run), value, call.path), slot.number, shapes)


_DROPPED = (
    "relevance arrived at 'scaled_dot_product_attention' in {where} with dropout_p > 0, which draws at random. Hand it "
    "`dropout_p=self.p if self.training else 0.0`, and call `model.eval()`."
)


def in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` as the operations that it is made of."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    hidden = scores.detach().amax(-1, keepdim=True) == -math.inf
    if bool(hidden.any()):  # a query that may look at nothing gets nothing
        weights = weights.masked_fill(hidden, 0.0)
    return torch.matmul(nn.functional.dropout(weights, dropout_p, training=dropout_p > 0), value)


@kernel("softmax")
def softmax(call: FunctionCall) -> Kernel:
    """The identity per element; with ``attention="halves"`` the rule of AttnLRP."""
    if call.attention != "halves":
        return elementwise(call)
    dim = call.argument(1, "dim")
    with torch.no_grad():
        output = call.run(*call.values)
    return SoftmaxKernel(call.values[0], output, -1 if dim is None else int(dim))


class SoftmaxKernel(Kernel):
    r"""Softmax by its first-order Taylor expansion, whose constant term is a bias.

    .. math:: R_i = x_i \Bigl(R_i - s_i \sum_j R_j\Bigr)

    Args:
        source: Scores ``x``; those that a mask has set to minus infinity have no share.
        output: ``s``.
        dim: Dimension along which ``s`` adds up to one.

    Source: AttnLRP, arXiv 2402.05602, proposition 3.1.
    """

    def __init__(self, source: Tensor, output: Tensor, dim: int) -> None:
        self.scores = torch.where(output == 0, torch.zeros_like(source), source)
        self.output, self.dim = output, dim % output.ndim + 1

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (self.scores * (relevance - self.output * relevance.sum(self.dim, keepdim=True)),)

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        others = relevance.sum(self.dim, keepdim=True) - relevance
        return (self.scores.abs() * ((1 - self.output) * relevance + self.output * others),)


def is_taken_apart(attention: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the fused function is run in parts: where relevance goes to the weights as well, or to them alone."""
    value = args[2] if len(args) > 2 else kwargs.get("value")
    return attention == "halves" or not (isinstance(value, Tensor) and value.requires_grad)


# -- where heads, queries and keys are ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where heads and tokens are in a product of attention weights and values.

    Attributes:
        shared: Dimensions of the output that weights and values share, from the left, as negative numbers: samples
            first, heads last; of one alone it has to be told what it is.
        queries: The dimension of the tokens that are given something, in the output.
        keys: For every input that relevance goes to, its number and the dimension of the tokens that are drawn on.
    """

    shared: tuple[int, ...]
    queries: int
    keys: tuple[tuple[int, int], ...]


def layout(call: FunctionCall, output: Tensor) -> Layout | None:
    """Of the fused function, and of a product of which one factor is a gate; None for anything else."""
    if call.name == FUSED:
        value = call.argument(2, "value")
        found = Layout(tuple(range(-output.ndim, -2)), -2, ((value.number, -2),)) if isinstance(value, Slot) else None
        return found if output.ndim >= 2 else None
    if len(call.saved) != 2 or sum(call.gates) != 1 or call.name not in ("matmul", "einsum"):
        return None
    first = call.argument(0, "input")
    if call.name == "einsum":
        return _layout_by_letters(call)
    if not isinstance(first, Slot) or output.ndim < 2 or any(value.ndim < 2 for value in call.values):
        return None
    gate = call.gates.index(True)
    is_left = first.number == gate
    keys = [(1 - gate, -2 if is_left else -1)] + [(gate, -1 if is_left else -2)] * (call.attention == "halves")
    return Layout(tuple(range(-output.ndim, -2)), -2 if is_left else -1, tuple(keys))


def _layout_by_letters(call: FunctionCall) -> Layout | None:
    words = letters(call)
    if words is None:
        return None
    gate = call.gates.index(True)
    weights, values, made = words[gate], words[1 - gate], words[2]
    shared = [letter for letter in made if letter in weights and letter in values]
    queries = [letter for letter in made if letter in weights and letter not in values]
    keys = [letter for letter in weights if letter in values and letter not in made]
    if len(queries) != 1 or len(keys) != 1:
        return None
    of_keys = [(1 - gate, values.index(keys[0]) - len(values))]
    if call.attention == "halves":
        of_keys.append((gate, weights.index(keys[0]) - len(weights)))
    places = tuple(made.index(letter) - len(made) for letter in shared)
    return Layout(places, made.index(queries[0]) - len(made), tuple(of_keys))


def letters(call: FunctionCall) -> tuple[str, str, str] | None:
    """The letters of both operands and of the output of an ``einsum``, with some for the dots; None where not known."""
    equation = call.args[0]
    if not isinstance(equation, str) or "->" not in equation:
        return None
    left, made = equation.replace(" ", "").split("->")
    words = left.split(",")
    if len(words) != 2:
        return None
    count = max(value.ndim - len(word.replace("...", "")) for word, value in zip(words, call.values, strict=True))
    dots = "".join(chr(0x3B1 + number) for number in range(count))
    spelled = []
    for word, value in zip(words, call.values, strict=True):
        own = value.ndim - len(word.replace("...", ""))
        spelled.append(word.replace("...", dots[len(dots) - own :]))
    return spelled[0], spelled[1], made.replace("...", dots)


__all__ = ["ATTENTIONS", "FUSED", "Attention", "Layout", "in_parts", "is_taken_apart", "layout"]
