r"""Kernels: what one call of a module or function does to relevance, as a linear map.

.. math:: R_i = \sum_j T_{ij} R_j, \qquad c_j = \sum_i T_{ij}

A kernel hands relevance down (``pull``), hands values up (``push``, the transpose), knows its column sums and the
kernel of absolute values. Shapes: the output of the call is ``(N, *out)``, relevance is ``(K, N, *out)`` with ``K``
vectors at once, and what comes back is ``(K, N, *in)``, one tensor for each input of the call.

Source: MEASURE, section 2.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import NRMError
from ..model.linear_maps import Maps, side_by_side

Residual = Literal["redistribute", "sink"]
RESIDUALS: tuple[Residual, ...] = ("redistribute", "sink")

DENSE_LIMIT = 4096
"""Columns up to which the kernel of absolute values is formed one column after the other."""


def gain(column_sum: Tensor, limit: float) -> Tensor:
    r"""Factor by which a column is rescaled so that less of it is absorbed.

    .. math::
        g(c) = \begin{cases} 1/c & c \ge 1/G \\ 1 + (G-1)\,G\,c & 0 < c < 1/G \\ 1 & c \le 0 \end{cases}

    Continuous, between 1 and ``G`` where ``c <= 1``, never flips a sign.

    Args:
        column_sum: ``c``, any shape.
        limit: ``G``, at least 1; ``math.inf`` gives ``1/c`` for every positive ``c``.

    Returns:
        ``g``, the shape of ``column_sum``.

    Source: MEASURE, section 2 (ours).
    """
    restored = column_sum.clamp(min=torch.finfo(column_sum.dtype).tiny).reciprocal_()
    if not math.isfinite(limit):
        return restored.masked_fill_(column_sum < least(column_sum, limit), 1)
    # The one is the smaller of the two where it holds; a comparison would take longer than all this.
    return torch.minimum(restored, column_sum.clamp(min=0).mul_((limit - 1) * limit).add_(1), out=restored)


def least(column_sum: Tensor, limit: float) -> float:
    """The smallest column sum whose whole loss the gain makes up for, so that nothing goes to the sink."""
    return max(1 / limit, torch.finfo(column_sum.dtype).tiny)


def deficit(column_sum: Tensor, factor: Tensor, limit: float) -> Tensor:
    """Share ``1 - g c`` of a column that goes to the sink; exactly 0 where the gain makes up for the loss."""
    rest = 1 - factor * column_sum
    return rest.mul_(column_sum < least(column_sum, limit))


Scale = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]
"""Column sums to gain and deficit, entry by entry; None for a gain of one and for a deficit of zero everywhere."""


def scale_of(residual: Residual, limit: float) -> Scale:
    """What a normalization does to columns.

    Args:
        residual: As in the composite.
        limit: Largest gain ``G``.
    """

    def sink(column_sum: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return None, 1 - column_sum

    def redistribute(column_sum: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # Where all is restored there is less to do; elsewhere than on a CPU the question would have to wait.
        if (
            column_sum.device.type == "cpu"
            and column_sum.numel()
            and bool(column_sum.amin() >= least(column_sum, limit))
        ):
            return column_sum.reciprocal(), None
        factor = gain(column_sum, limit)
        return factor, deficit(column_sum, factor, limit)

    return sink if residual == "sink" else redistribute


def scales(column_sum: Tensor, scale: Scale) -> tuple[Tensor | None, Tensor | None]:
    """Gain and deficit of the columns, any shape; None for a gain of one and a deficit of zero everywhere."""
    if column_sum.device.type != "cpu":
        return scale(column_sum)
    factor, rest = None, None
    for at in blocks(column_sum):
        part, lost = scale(column_sum[at])
        if part is not None:
            factor = torch.empty_like(column_sum) if factor is None else factor
            factor[at] = part
        if lost is not None:
            rest = torch.zeros_like(column_sum) if rest is None else rest
            rest[at] = lost
    return factor, rest


Block = tuple[slice, ...]


def blocks(like: Tensor, size: int = 1 << 16) -> Iterator[Block]:
    """Splits ``(N, C, …)`` by sample and dimension 1 into blocks of about this many entries, which fit a cache."""
    if like.numel() <= size or like.ndim < 2:
        yield tuple(slice(None) for _ in like.shape)
        return
    width = max(1, size // max(1, like[0, 0].numel()))
    step = max(1, width // like.shape[1])
    for sample in range(0, like.shape[0], step):
        for first in range(0, like.shape[1], width):
            yield (slice(sample, sample + step), slice(first, first + width))


class Kernel(ABC):
    """The linear map of one call, before normalization."""

    is_stochastic = False
    """True when every column sums to one exactly, so that there is neither gain nor sink."""

    @abstractmethod
    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        """``(K, N, *out)`` at the output to ``(K, N, *in)`` at each input."""

    @abstractmethod
    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        r"""The same with :math:`|T_{ij}|`."""

    def push(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        """The transpose: values ``(K, N, *in)`` at the inputs to ``(K, N, *out)`` at an output of this shape.

        ``None`` stands for zeros.
        """
        first = next(value for value in values if value is not None)
        with torch.inference_mode(False), torch.enable_grad():
            seed = first.new_zeros((1, *shape)).requires_grad_()
            parts = self.pull(seed)
            pairs = zip(parts, values, strict=True)
            chosen = [(part, value) for part, value in pairs if value is not None and part.requires_grad]
            if not chosen:  # the values lie at gates
                return first.new_zeros((len(first), *shape))
            return _vjp([part for part, _ in chosen], seed, [value.unsqueeze(1) for _, value in chosen])[0].squeeze(1)

    def push_bound(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        r"""At least :math:`\sum_i |T_{ij}| v_i` for values ``(K, N, *in)`` without sign; here just that."""
        first = next(value for value in values if value is not None)
        with torch.inference_mode(False), torch.enable_grad():
            seed = first.new_zeros((1, *shape)).requires_grad_()
            parts = self.pull_absolute(seed)
            found = zip(parts, values, strict=True)
            # A kernel whose branches are all zero hands down zeros that depend on nothing.
            pairs = [(part.squeeze(0), v) for part, v in found if v is not None and part.requires_grad]
            if not pairs:
                return first.new_zeros((len(first), *shape))
            rows = [
                torch.autograd.grad([p for p, _ in pairs], seed, [v[k] for _, v in pairs], retain_graph=True)[0]
                for k in range(len(first))
            ]
        return torch.cat(rows)

    def reach(self, relevance: Tensor | None) -> bool:
        """Makes what the kernel lacks for this relevance (None for any); true when that changed its column sums."""
        return False

    def column_sum(self, like: Tensor) -> Tensor:
        """``c``, the shape of the output ``like``: the transpose applied to ones."""
        with torch.inference_mode(False), torch.enable_grad():
            seed = torch.zeros_like(like).unsqueeze(0).requires_grad_()
            totals = [part.sum() for part in self.pull(seed) if part.requires_grad]  # zeros at a gate depend on nothing
            if not totals:
                return torch.zeros_like(like)
            (column,) = torch.autograd.grad(totals, seed)
        return column.squeeze(0)


class IdentityKernel(Kernel):
    """Hands relevance through as it is: activations, dropout, batch normalization after fusion."""

    is_stochastic = True

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (relevance,)

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (relevance,)

    def push(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        (value,) = values
        assert value is not None
        return value


@dataclass
class Branch:
    r"""One branch ``k`` of a rule at one call: modified input, modified layer.

    Attributes:
        input: ``in_k``, ``(N, *in)``.
        factor: ``m_k(1)``, ``(N, *out)``.
        sign: ``ρ_k`` in :math:`\mathrm{reducer} = \sum_k \rho_k\, in_k \odot g_k`.
        maps: :math:`J_k` and its transpose.
        modified: Makes the modified weight, where the module has one.
    """

    input: Tensor
    factor: Tensor
    sign: float
    maps: Maps
    modified: Callable[[], Tensor] | None = None

    @property
    def weight(self) -> Tensor | None:
        """The modified weight."""
        return None if self.modified is None else self.modified()

    def pull(self, relevance: Tensor) -> Tensor:
        """What it hands down, ``(K, N, *out)`` to ``(K, N, *in)``."""
        return _signed(self.sign, _times(self.maps.down(self.factor * relevance), self.input))

    def push(self, values: Tensor) -> Tensor:
        """The transpose."""
        return _signed(self.sign, self.factor * self.maps.up(self.input * values))


def _times(made: Tensor, factor: Tensor) -> Tensor:
    """The product; in the memory of what was just made, if it has its own."""
    if torch.is_grad_enabled() or not all(made.stride()):
        return made * factor
    return made.mul_(factor)


def _signed(sign: float, values: Tensor) -> Tensor:
    return values if sign == 1 else sign * values


Branches = tuple[list[Branch], Tensor | None]
"""Branches, and their column sums ``(N, *out)``; or, with the gain in their factors, the deficit, None for zero."""


class BranchKernel(Kernel):
    r"""A rule on an affine module, in the form in which Zennit writes rules.

    .. math:: R = \sum_k \rho_k\, in_k \odot J_k^\top (m_k(1) \odot R'), \qquad
              c = \sum_k \rho_k\, m_k(1) \odot J_k in_k

    Args:
        ready: Branches whose sign and input are not zero, and their column sums or deficit.
        is_normalized: Whether the gain is in the factors, so that this is the normalized kernel.
        waiting: Makes further ones, which matter only where the factors of those that are ready are zero (γ at
            negative outputs); they are made when relevance arrives there.
        like: A tensor of the shape of the input, ``(N, *in)``.
        rerun: ``(input, weight) -> image`` of the module without its bias; None for a module without weights.
        weight: The unmodified weight; None for a module without weights.
        is_injective: Whether an input entry meets an output entry through one weight only (false where padding
            repeats entries), so that absolute values may be taken factor by factor.
        groups: Groups of a convolution.
        is_transposed: Whether the first dimension of the weight is that of the input channels.
    """

    def __init__(
        self,
        ready: Branches,
        is_normalized: bool,
        waiting: Callable[[], Branches] | None,
        like: Tensor,
        rerun: Callable[[Tensor, Tensor], Tensor] | None = None,
        weight: Tensor | None = None,
        is_injective: bool = True,
        groups: int = 1,
        is_transposed: bool = False,
    ) -> None:
        self.branches, self._rest = ready
        self.is_normalized = is_normalized
        self._waiting = waiting
        self._like = like
        self.rerun = rerun
        self.weight = weight
        self.is_injective = is_injective
        self.groups, self.is_transposed = groups, is_transposed

    def reach(self, relevance: Tensor | None) -> bool:
        if self._waiting is None or (relevance is not None and not self._is_waited_for(relevance)):
            return False
        branches, rest = self._waiting()
        self._waiting = None
        self.branches = [*self.branches, *branches]
        if not self.is_normalized:
            self._rest = rest if self._rest is None or rest is None else self._rest + rest
        else:  # a column with branches of the one kind has none of the other, where its deficit is one
            self._rest = None if self._rest is None or rest is None else self._rest + rest - 1
        return True

    def _is_waited_for(self, relevance: Tensor) -> bool:
        try:
            arrived = relevance != 0
            for branch in self.branches:
                arrived = arrived & (branch.factor == 0)
            return bool(arrived.any())
        except RuntimeError:  # batched gradients do not tell values
            return True

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        parts = [_pull_together(group, relevance) for group in self._groups()]
        return (_total(parts) if parts else relevance.new_zeros((len(relevance), *self._like.shape)),)

    def _groups(self) -> list[list[Branch]]:
        """Branches with the same factor together."""
        groups: dict[int, list[Branch]] = {}
        for branch in self.branches:
            groups.setdefault(id(branch.factor), []).append(branch)
        return list(groups.values())

    def push(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        (value,) = values
        assert value is not None
        parts = [branch.push(value) for branch in self.branches]
        return _total(parts) if parts else value.new_zeros((len(value), *shape))

    @property
    def deficit(self) -> Tensor | None:
        """Share of each column that goes to the sink, ``(N, *out)``; None for zero. Of a normalized kernel only."""
        return self._rest

    def column_sum(self, like: Tensor) -> Tensor:
        if not self.is_normalized and self._rest is not None:
            return self._rest
        return torch.ones_like(like) if self._rest is None else 1 - self._rest

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        if not self.is_injective:
            return dense_absolute(self, relevance)
        separated = self._separated()
        if separated is None:
            plain = self.weight is None or self.rerun is None or self.is_transposed
            return dense_absolute(self, relevance) if plain else (self._elementwise(relevance),)
        total = relevance.new_zeros((len(relevance), *self._like.shape))
        for source, factor, carry in separated:
            total = total + source.abs() * carry(factor.abs() * relevance)
        return (total,)

    def push_bound(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        r"""At least :math:`\sum_i |T_{ij}| v_i`: the branches each without sign, so that nothing cancels among them.

        Exact where each entry of the kernel is in one branch only, as for Zennit's rules but ZBox, and no padding
        repeats entries.
        """
        (value,) = values
        assert value is not None
        rerun, weights = self.rerun, [branch.weight for branch in self.branches]
        if rerun is None or any(weight is None for weight in weights):
            return super().push_bound(values, shape)
        total = value.new_zeros((len(value), *shape))
        with torch.no_grad():
            for branch, weight in zip(self.branches, weights, strict=True):
                assert weight is not None
                arriving = (branch.input.detach().abs() * value).flatten(0, 1)
                carried = rerun(arriving, weight.detach().abs()).view(len(value), -1, *shape[1:])
                total.addcmul_(carried, branch.factor.detach().abs().expand(shape), value=abs(branch.sign))
        return total

    def _separated(self) -> list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] | None:
        r"""Terms ``(a, m, J^T)`` with :math:`T_{ij} = \sum a_i |w_{ij}| m_j` of which each entry meets only one.

        The modified weights of a rule are, on the positive and on the negative weights apart, multiples of the
        weight. Branches with the same factor are added up first (ZBox), the others must not overlap.
        """
        signs = (None,) if self.weight is None else (1.0, -1.0)
        terms = []
        for sign in signs:
            groups: list[tuple[Tensor, Tensor]] = []
            for branch in self.branches:
                multiple = self._multiple(branch, sign)
                if multiple is None:
                    return None
                source = (branch.sign * multiple) * branch.input.detach()
                for index, (other, factor) in enumerate(groups):
                    if branch.factor is factor or torch.equal(branch.factor, factor):
                        groups[index] = (other + source, factor)
                        break
                else:
                    groups.append((source, branch.factor))
            if _overlap(groups):
                return None
            terms += [(source, factor, self._carry(sign)) for source, factor in groups]
        return terms

    def _elementwise(self, relevance: Tensor) -> Tensor:
        """``Σ_j |T_ij| R_j`` from the patches that the outputs read, one channel after the other; for any branches."""
        assert self.weight is not None
        assert self.rerun is not None
        like = self.branches[0].input.detach()
        size = self.weight[0].numel()
        picks = torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, *self.weight.shape[1:])
        picks = picks.repeat(self.groups, *(1,) * (picks.ndim - 1))  # picks weight by weight what a channel reads
        channel = -1 if self.weight.ndim == 2 else 1
        with torch.no_grad():
            patches = [
                self.rerun(branch.sign * branch.input.detach(), picks).movedim(channel, -1) for branch in self.branches
            ]
        total = relevance.new_zeros((len(relevance), *patches[0].shape))
        per_group = len(self.weight) // self.groups
        for number in range(len(self.weight)):
            start = number // per_group * size
            part = _total(
                read[..., start : start + size]
                * _row(branch, number)
                * branch.factor.select(channel, number).unsqueeze(-1)
                for read, branch in zip(patches, self.branches, strict=True)
            )
            arriving = relevance.select(channel if channel < 0 else channel + 1, number).unsqueeze(-1)
            total[..., start : start + size] += part.abs() * arriving
        leaf = like.requires_grad_()
        with torch.enable_grad():
            image = self.rerun(leaf, picks)
        return _vjp([image], leaf, [total.movedim(-1, channel if channel < 0 else channel + 1)])[0]

    def _multiple(self, branch: Branch, sign: float | None) -> float | None:
        """λ with ``weight_k = λ weight`` on the weights of one sign; None when there is no such number."""
        if sign is None:
            return 1.0
        assert self.weight is not None
        weight = branch.weight
        assert weight is not None
        chosen = (self.weight * sign) > 0
        here, modified = self.weight[chosen], weight[chosen]
        if here.numel() == 0:
            return 0.0
        multiple = float((modified / here)[0])
        tolerance = 1e3 * torch.finfo(here.dtype).eps * float(here.abs().max()) * max(1.0, abs(multiple))
        return multiple if float((modified - multiple * here).abs().max()) <= tolerance else None

    def _carry(self, sign: float | None) -> Callable[[Tensor], Tensor]:
        if sign is None:
            return self.branches[0].maps.down
        assert self.weight is not None
        assert self.rerun is not None
        leaf = self._like.detach().requires_grad_()
        with torch.enable_grad():
            image = self.rerun(leaf, (self.weight * sign).clamp(min=0))
        return lambda relevance: _vjp([image], leaf, [relevance])[0]

    def channel_edges(self, relevance: Tensor) -> Tensor:
        r"""Channel × channel joint relevance across this step.

        .. math:: J_{noi} = \sum_k \sum_\tau W_k[o,i,\tau]\; \frac{\partial}{\partial W_k[o,i,\tau]}
                  \langle \mathrm{branch}_k(\rho_k in_k),\, m_k(1) \odot R \rangle_n

        Args:
            relevance: ``(N, *out)``, already multiplied by the gain.

        Returns:
            ``(N, K_out, K_in)``, zero between channels of different groups.

        Source: MEASURE, section 4.
        """
        if self.rerun is None or self.weight is None:
            raise NRMError("there is no channel matrix across a step without weights.")
        self.reach(relevance.unsqueeze(0))
        rows = []
        for sample in range(len(relevance)):
            edges: Tensor = torch.zeros_like(self.weight)
            for branch in self.branches:
                weight = branch.weight
                assert weight is not None
                arriving = (branch.factor[sample] * relevance[sample]).unsqueeze(0)
                slope = self._weight_gradient(branch, weight, branch.input[sample : sample + 1].detach(), arriving)
                edges = torch.addcmul(edges, weight.detach(), slope, value=branch.sign)
            rows.append(edges.flatten(2).sum(-1) if edges.ndim > 2 else edges)
        return self._scattered(torch.stack(rows))

    def _weight_gradient(self, branch: Branch, weight: Tensor, source: Tensor, relevance: Tensor) -> Tensor:
        """``∂⟨branch(source), relevance⟩ / ∂W`` of one sample."""
        if branch.maps.weight_gradient is not None:
            return branch.maps.weight_gradient(source, relevance)
        assert self.rerun is not None
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_()
            image = self.rerun(source, leaf)
        return torch.autograd.grad(image, leaf, relevance)[0]

    def _scattered(self, edges: Tensor) -> Tensor:
        """``(N, rows, columns of one group)`` to all channels, outputs first."""
        samples, rows, inner = edges.shape
        per_group = rows // self.groups
        full = edges.new_zeros(samples, self.groups, per_group, self.groups, inner)
        index = torch.arange(self.groups)
        full[:, index, :, index] = edges.reshape(samples, self.groups, per_group, inner).transpose(0, 1)
        full = full.reshape(samples, rows, self.groups * inner)
        return full.transpose(1, 2) if self.is_transposed else full


class VjpKernel(Kernel):
    """A rule that is only known as a function that hands relevance down.

    Args:
        function: ``(N, *out)`` to ``(N, *in)`` for each input; linear and differentiable.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.function = function

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        if len(relevance) == 1:
            return tuple(part.unsqueeze(0) for part in self.function(relevance[0]))
        return tuple(torch.vmap(self.function)(relevance))

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return dense_absolute(self, relevance)


def dense_absolute(kernel: Kernel, relevance: Tensor, chunk: int = 64) -> tuple[Tensor, ...]:
    r"""``Σ_j |T_ij| R_j`` from the columns of ``T``, formed a chunk at a time.

    Args:
        kernel: Any kernel whose samples do not mix.
        relevance: ``(K, N, *out)``.
        chunk: Columns formed at once.

    Returns:
        ``(K, N, *in)`` for each input.

    Raises:
        NRMError: The output has more than ``DENSE_LIMIT`` entries a sample.
    """
    size = math.prod(relevance.shape[2:])
    if size > DENSE_LIMIT:
        raise NRMError(
            f"the walk variation needs |T| of a step with {size} outputs a sample, and its rule gives no closed form "
            f"for it (forming it column by column stops at {DENSE_LIMIT}). Ask for `variation(layer)`, which is exact "
            "for every rule, or use a rule of Zennit without padding modes."
        )
    kernel.reach(None)
    flat = relevance.flatten(2)
    totals: list[Tensor] | None = None
    for start in range(0, size, chunk):
        width = min(chunk, size - start)
        unit = relevance.new_zeros((width, relevance.shape[1], size))
        unit[torch.arange(width), :, start + torch.arange(width)] = 1
        columns = kernel.pull(unit.reshape(width, *relevance.shape[1:]))
        weights = flat[:, :, start : start + width]
        sums = [torch.einsum("knj,jn...->kn...", weights, column.abs()) for column in columns]
        totals = sums if totals is None else [old + new for old, new in zip(totals, sums, strict=True)]
    assert totals is not None
    return tuple(totals)


def linear_in_relevance(kernel: Kernel, like: Tensor) -> bool:
    """Whether ``pull`` is linear, tried on random relevance of both signs at the first sample."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((2, *like.shape), generator=generator, dtype=like.dtype).to(like.device)
    first, second = noise[:1], noise[1:]
    kernel.reach(None)
    with torch.no_grad():
        combined = kernel.pull(first - 2 * second)
        apart = [one - 2 * two for one, two in zip(kernel.pull(first), kernel.pull(second), strict=True)]
    tolerance = math.sqrt(torch.finfo(like.dtype).eps)
    return all(
        bool((left - right).abs().max() <= tolerance * max(1e-30, float(right.abs().max())))
        for left, right in zip(combined, apart, strict=True)
        if left.numel()
    )


def _vjp(images: list[Tensor], inputs: Tensor | list[Tensor], relevance: list[Tensor]) -> tuple[Tensor, ...]:
    """Vector–Jacobian products with a leading dimension of ``K`` vectors; the graph is kept."""
    create = torch.is_grad_enabled()
    if len(relevance[0]) == 1:
        parts = torch.autograd.grad(images, inputs, [item[0] for item in relevance], True, create)
        return tuple(part.unsqueeze(0) for part in parts)
    return torch.autograd.grad(images, inputs, relevance, True, create, is_grads_batched=True)


def _pull_together(branches: list[Branch], relevance: Tensor) -> Tensor:
    """What branches with the same factor hand down; from the few channels of an image they do it in one go."""
    first = branches[0]
    down = side_by_side([branch.maps for branch in branches]) if len(branches) > 1 else None
    if down is None:
        return _total(branch.pull(relevance) for branch in branches)
    inputs = torch.stack([_signed(branch.sign, branch.input) for branch in branches], 1)
    return (down(first.factor * relevance) * inputs).sum(2)


def _row(branch: Branch, number: int) -> Tensor:
    """The modified weights of one output channel, in a row."""
    assert branch.weight is not None
    return branch.weight[number].flatten()


def _total(parts: Iterable[Tensor]) -> Tensor:
    first, *rest = parts
    return functools.reduce(torch.add, rest, first)


def _overlap(groups: list[tuple[Tensor, Tensor]]) -> bool:
    for index, (source, factor) in enumerate(groups):
        for other, across in groups[:index]:
            if bool(((source != 0) & (other != 0)).any()) and bool(((factor != 0) & (across != 0)).any()):
                return True
    return False
