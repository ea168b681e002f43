r"""Kernels of fused attention and softmax, and the head and token dimensions of attention.

.. math:: O_{ik} = \sum_j A_{ij} V_{jk}, \qquad A = \mathrm{softmax}(Q K^\top)

By default, the weights ``A`` are treated as constants. All relevance is propagated to the values. With
``attention="halves"``, half of it is propagated to the weights, and from there to queries and keys, as in AttnLRP
(arXiv 2402.05602).

Source: docs/attention.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..rules import Absolute
from .function_call import FunctionCall, Slot
from .registry import kernel_of
from .unsupported import UnknownKernel

Attention = Literal["value", "halves"]
ATTENTIONS: tuple[Attention, ...] = ("value", "halves")
FUSED = "scaled_dot_product_attention"


@kernel_of(FUSED)
def fused_attention(call: FunctionCall) -> Kernel:
    r"""Returns the kernel that propagates all relevance to the values, in proportion to their absolute contributions.

    .. math:: T_{ik,jk} = \frac{A_{ij} |V_{jk}|}{\sum_{j'} A_{ij'} |V_{j'k}|}

    The weights ``A`` are obtained by calling the function with the identity matrix as the values. Masks, causality and
    grouped queries are therefore handled as in torch.
    """
    slot = call.argument(2, "value")
    if call.argument(4, "dropout_p", 0.0):
        return UnknownKernel(UnsupportedOperationError(_DROPOUT.format(where=call.path or "the model")), call.shapes)
    assert isinstance(slot, Slot), "decomposed when it ran"
    value = call.values[slot.number]
    unit = torch.eye(value.shape[-2], dtype=value.dtype, device=value.device)
    inputs = list(call.values)
    inputs[slot.number] = unit.expand(*value.shape[:-1], len(unit))
    with torch.no_grad():
        weights = call.run(*inputs)

    def run(source: Tensor) -> Tensor:
        heads = 1 if source.ndim < 3 or weights.ndim != source.ndim else weights.shape[-3] // source.shape[-3]
        return torch.matmul(weights, source.repeat_interleave(heads, -3) if heads > 1 else source)

    return call._by_rule(Absolute(), slot.number, run)


_DROPOUT = (
    "relevance arrived at 'scaled_dot_product_attention' in {where} with dropout_p > 0, which is random. Pass "
    "`dropout_p=self.p if self.training else 0.0`, and call `model.eval()`."
)


def decomposed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes ``scaled_dot_product_attention`` from elementary operations, all of which have kernels."""
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
    is_masked = scores.detach().amax(-1, keepdim=True) == -math.inf
    if bool(is_masked.any()):  # the output of a query without keys is zero
        weights = weights.masked_fill(is_masked, 0.0)
    return torch.matmul(nn.functional.dropout(weights, dropout_p, training=dropout_p > 0), value)


@kernel_of("softmax")
def softmax(call: FunctionCall) -> Kernel:
    """Returns the kernel of softmax: the elementwise identity or, for ``attention="halves"``, the AttnLRP rule."""
    if call.settings.attention != "halves":
        return call.identity()
    dim = call.argument(1, "dim")
    with torch.no_grad():
        output = call.run(*call.values)
    return SoftmaxKernel(call.values[0], output, -1 if dim is None else int(dim))


class SoftmaxKernel(Kernel):
    r"""Kernel of softmax by first-order Taylor expansion, whose constant term is treated as a bias.

    .. math:: R_i = x_i \Bigl(R_i - s_i \sum_j R_j\Bigr)

    Args:
        source: The scores ``x``. Masked scores (minus infinity) receive no relevance.
        output: The output ``s`` of softmax.
        dim: Dimension along which ``s`` sums to one.

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


def is_decomposed(attention: str, value: Any) -> bool:
    """Returns True if fused attention must be decomposed. Its weights can then receive relevance."""
    return attention == "halves" or not (isinstance(value, Tensor) and value.requires_grad)


# -- dimensions of heads, queries and keys ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Head and token dimensions of a product of attention weights and values.

    Attributes:
        shared: Output dimensions shared by weights and values, from left to right, as negative indices: samples first,
            heads last. A single dimension may be either of the two.
        queries: Dimension of the query tokens in the output.
        keys: Index of each input that receives relevance, with its key-token dimension.
    """

    shared: tuple[int, ...]
    queries: int
    keys: tuple[tuple[int, int], ...]


def layout(call: FunctionCall, output: Tensor) -> Layout | None:
    """Returns the layout of fused attention or of a product with a gate, and None for other calls."""
    if call.name == FUSED:
        value = call.argument(2, "value")
        if not isinstance(value, Slot) or output.ndim < 2:
            return None
        return Layout(tuple(range(-output.ndim, -2)), -2, ((value.number, -2),))
    if len(call.inputs) != 2 or sum(call.gates) != 1 or call.name not in ("matmul", "einsum"):
        return None
    first = call.argument(0, "input")
    if call.name == "einsum":
        return _layout_of_einsum(call)
    if not isinstance(first, Slot) or output.ndim < 2 or any(value.ndim < 2 for value in call.values):
        return None
    gate = call.gates.index(True)
    is_left = first.number == gate
    keys = [(1 - gate, -2 if is_left else -1)] + [(gate, -1 if is_left else -2)] * (call.settings.attention == "halves")
    return Layout(tuple(range(-output.ndim, -2)), -2 if is_left else -1, tuple(keys))


def _layout_of_einsum(call: FunctionCall) -> Layout | None:
    terms = subscripts_of(call)
    if terms is None:
        return None
    gate = call.gates.index(True)
    weights, values, output = terms[gate], terms[1 - gate], terms[2]
    shared = [letter for letter in output if letter in weights and letter in values]
    queries = [letter for letter in output if letter in weights and letter not in values]
    keys = [letter for letter in weights if letter in values and letter not in output]
    if len(queries) != 1 or len(keys) != 1:
        return None
    keys_of_inputs = [(1 - gate, values.index(keys[0]) - len(values))]
    if call.settings.attention == "halves":
        keys_of_inputs.append((gate, weights.index(keys[0]) - len(weights)))
    dims = tuple(output.index(letter) - len(output) for letter in shared)
    return Layout(dims, output.index(queries[0]) - len(output), tuple(keys_of_inputs))


def subscripts_of(call: FunctionCall) -> tuple[str, str, str] | None:
    """Returns the subscripts of both operands and the output of an ``einsum``, with ellipses replaced by Greek letters.

    Returns None if the output subscripts are implicit or if there are not exactly two operands.
    """
    equation = call.args[0]
    if not isinstance(equation, str) or "->" not in equation:
        return None
    left, output = equation.replace(" ", "").split("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    count = max(value.ndim - len(term.replace("...", "")) for term, value in zip(terms, call.values, strict=True))
    dots = "".join(chr(0x3B1 + number) for number in range(count))
    expanded = []
    for term, value in zip(terms, call.values, strict=True):
        own = value.ndim - len(term.replace("...", ""))
        expanded.append(term.replace("...", dots[len(dots) - own :]))
    return expanded[0], expanded[1], output.replace("...", dots)


__all__ = ["ATTENTIONS", "FUSED", "Attention", "Layout", "decomposed_attention", "is_decomposed", "layout"]
