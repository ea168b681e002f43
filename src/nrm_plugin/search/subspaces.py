r"""Relevant subspaces of a layer, fitted on a batch and queried as taps.

The relevance of a layer is the product of activation and context, :math:`R_i = a_i c_i`. Orthonormal directions
:math:`U_k` decompose it into one part per subspace:

.. math:: R^{(k)}_i = a_i\, (U_k U_k^\top c)_i, \qquad \sum_k R^{(k)}_i = R_i, \qquad
          \sum_i R^{(k)}_i = (U_k^\top a)^\top (U_k^\top c)

These parts are the result of LRP-0 in a layer :math:`a \to U^\top a \to U U^\top a`. :func:`with_subspaces` inserts
this layer with one neuron for each pair of a subspace and a neuron. Relevance is then never divided by the activation
of a direction. The rest, and the use of the parts as a tap of the measure, are new in this package.

Source: Chormai et al., arXiv 2212.14855 (PRCA and DRSA), for the directions and the virtual layer;
docs/subspaces.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import InputError, brief
from ..functional import FunctionCall, register_kernel
from ..kernels.base import Kernel
from ..model.replaced_layers import Replacement, with_replaced

FLOOR = 1e-4
"""Largest absolute activation of a silent neuron, as a fraction of the largest in the sample.

Silent neurons have no context. It would be arbitrarily large for rules that assign relevance to them.
"""


@dataclass(frozen=True, eq=False)
class Subspaces:
    r"""Orthogonal subspaces of a layer's channel space and their complement (the rest).

    Attributes:
        basis: :math:`U = (U_1 | \dots | U_K)`, of shape ``(C, d)``, with orthonormal columns.
        sizes: Number of columns in each subspace; their sum is ``d``.
        dim: Channel dimension of the layer's output: 1 for feature maps and vectors, -1 for tokens.

    Raises:
        InputError: If the columns are not orthonormal or the sizes do not add up to their number.

    Examples:
        >>> Subspaces(torch.eye(4)[:, :3], (1, 2)).parts(torch.ones(5, 4)).shape
        torch.Size([5, 3, 4])
    """

    basis: Tensor
    sizes: tuple[int, ...]
    dim: int = 1

    def __post_init__(self) -> None:
        basis = self.basis
        if basis.ndim != 2 or not basis.is_floating_point() or sum(self.sizes) != basis.shape[1] or min(self.sizes) < 1:
            raise InputError(
                f"a basis (C, d) needs sizes of at least 1 that add up to d; got {tuple(basis.shape)} and {self.sizes}."
            )
        gram = basis.T @ basis
        off = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())
        if not off <= (1e-4 if basis.dtype == torch.float32 else 1e-8):
            raise InputError(
                f"the columns of a basis must be orthonormal; UᵀU deviates from the identity by {off:.2g}."
            )

    def __len__(self) -> int:
        """Returns the number of subspaces, excluding the rest."""
        return len(self.sizes)

    def parts(self, values: Tensor) -> Tensor:
        r"""Computes the projections :math:`U_k U_k^\top a` of the activations and the remainder.

        Args:
            values: The activations :math:`a`, of shape ``(N, …)``.

        Returns:
            A tensor of shape ``(N, K + 1, …)`` with the K projections, followed by the remainder.

        Examples:
            >>> Subspaces(torch.eye(2)[:, :1], (1,)).parts(torch.tensor([[3.0, 4.0]]))
            tensor([[[3., 0.],
                     [0., 4.]]])
        """
        projected = self._projected(values)
        return torch.stack([*projected, values - sum(projected[1:], projected[0])], 1)

    def split(self, values: Tensor, relevance: Tensor) -> Tensor:
        r"""Splits the relevance of a layer into parts of shape ``(…, N, K + 1, *shape)`` that sum to it.

        The last part is the rest: the relevance of directions outside all subspaces and all relevance of silent
        neurons. A neuron is silent and has no context :math:`c = R / a` if its absolute activation is at most 1e-4
        times the largest in the sample.

        Args:
            values: Activations of shape ``(N, *shape)``.
            relevance: Relevance of the same neurons, of shape ``(…, N, *shape)``.

        Examples:
            >>> parts = Subspaces(torch.eye(4)[:, :3], (1, 2)).split(torch.ones(5, 4), torch.rand(5, 4))
            >>> parts.sum(-1).shape
            torch.Size([5, 3])
        """
        inverse, silent = _inverse(values)
        context = relevance * inverse
        projected = self._projected(context, values.ndim)
        rest = (context - sum(projected[1:], projected[0])) * values + relevance * silent
        return torch.stack([*(part * values for part in projected), rest], -values.ndim)

    def _split_absolute(self, values: Tensor, mass: Tensor) -> Tensor:
        """Splits nonnegative masses like :meth:`split`, but with the absolute kernel."""
        inverse, silent = _inverse(values)
        context = mass * inverse.abs()
        whole = torch.eye(len(self.basis), dtype=values.dtype, device=values.device)
        matrices = [columns @ columns.T for columns in self._columns(values)]
        left = whole - sum(matrices[1:], matrices[0])
        *parts, rest = (self._along(context, matrix.abs(), values.ndim) * values.abs() for matrix in (*matrices, left))
        return torch.stack([*parts, rest + mass * silent], -values.ndim)

    def _columns(self, like: Tensor) -> list[Tensor]:
        ends = list(accumulate(self.sizes, initial=0))
        basis = self.basis.to(like)
        return [basis[:, first:last] for first, last in pairwise(ends)]

    def _projected(self, values: Tensor, dims: int | None = None) -> list[Tensor]:
        dims = values.ndim if dims is None else dims
        return [self._along(values, columns @ columns.T, dims) for columns in self._columns(values)]

    def _along(self, values: Tensor, matrix: Tensor, dims: int) -> Tensor:
        """Multiplies by a matrix along the channel dimension, one of the last ``dims`` dimensions."""
        at = self.dim % dims - dims
        if values.shape[at] != len(matrix):
            raise InputError(
                f"the subspaces have {len(matrix)} channels, but the layer has {values.shape[at]} in dimension "
                f"{self.dim} of {tuple(values.shape[-dims:])}; fit them on this layer, or set dim=."
            )
        return (values.movedim(at, -1) @ matrix).movedim(-1, at)


def _inverse(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``1 / a``, with zeros for silent neurons, and a mask of the silent neurons."""
    size = values.abs()
    silent = size <= FLOOR * size.flatten(1).amax(1).view(-1, *(1,) * (values.ndim - 1))
    return torch.where(silent, 0.0, 1 / torch.where(silent, 1.0, values)), silent.to(values)


# -- fitting --------------------------------------------------------------------------------------------------------


def prca(values: Tensor, relevance: Tensor, sizes: int | Sequence[int], dim: int = 1) -> Subspaces:
    r"""Finds the directions that carry the most relevance over a batch (principal relevant component analysis).

    .. math:: \max_{U^\top U = I} \mathrm E[(U^\top a)^\top (U^\top c)]

    The solutions are the leading eigenvectors of :math:`\mathrm E[a c^\top + c a^\top]`. The expectation is over
    samples and positions.

    Args:
        values: Activations of a layer, of shape ``(N, …)``.
        relevance: Relevance of these neurons, such as ``mu.marginal(layer)``.
        sizes: Number of directions in each subspace, in decreasing order of relevance, or a single number for one
            subspace.
        dim: Channel dimension of ``values``.

    Raises:
        InputError: If the tensors differ in shape or have fewer channels than directions.

    Examples:
        >>> prca(torch.rand(10, 4, 3, 3), torch.rand(10, 4, 3, 3), [1, 1]).basis.shape
        torch.Size([4, 2])

    Source: arXiv 2212.14855.
    """
    a, c = _vectors(values, relevance, dim)
    wanted = _sizes(sizes, a.shape[1])
    covariance = a.T @ c / len(a)
    _, vectors = torch.linalg.eigh(covariance + covariance.T)
    return Subspaces(vectors.flip(1)[:, : sum(wanted)].to(values.dtype), wanted, dim)


def drsa(
    values: Tensor,
    relevance: Tensor,
    sizes: Sequence[int],
    dim: int = 1,
    steps: int = 300,
    restarts: int = 3,
    seed: int = 0,
) -> Subspaces:
    r"""Finds subspaces relevant for different samples (disentangled relevant subspace analysis).

    .. math:: \max_{U^\top U = I} \; M^{1/2}_k\, M^2_n \big[ \max(0, (U_k^\top a_n)^\top (U_k^\top c_n)) \big]

    where :math:`a_n` are activations, :math:`c_n` are contexts (relevance divided by activation), and :math:`M^p[x] =
    (\mathrm{mean}\; x^p)^{1/p}` are power means. The mean over samples favors a few large values, and the mean over
    subspaces favors the use of all subspaces. The objective is maximized by gradient ascent; after each step, the
    basis is projected onto the matrices with orthonormal columns. The decreasing step size, and the selection of the
    best of several restarts, are new in this package.

    Args:
        values: Activations of a layer, of shape ``(N, …)``.
        relevance: Relevance of these neurons.
        sizes: Number of directions in each subspace.
        dim: Channel dimension of ``values``.
        steps: Number of ascent steps.
        restarts: Number of random initializations; the best result is returned.
        seed: Random seed for the initializations.

    Raises:
        InputError: If the tensors differ in shape or have fewer channels than directions.

    Examples:
        >>> drsa(torch.rand(10, 4), torch.rand(10, 4), [2, 2], steps=5).sizes
        (2, 2)

    Source: arXiv 2212.14855.
    """
    a, c = _vectors(values, relevance, dim)
    wanted = _sizes(sizes, a.shape[1])
    a, c = a / _rms(a), c / _rms(c)
    draw = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(restarts):
        start = torch.randn(a.shape[1], sum(wanted), generator=draw, dtype=torch.float64).to(a)
        results.append(_ascent(a, c, wanted, _nearest(start), steps))
    _, best = max(results, key=lambda pair: pair[0])
    return Subspaces(_nearest(best).to(values.dtype), wanted, dim)


def _ascent(a: Tensor, c: Tensor, sizes: tuple[int, ...], basis: Tensor, steps: int) -> tuple[float, Tensor]:
    best = (float(disentanglement(a, c, basis, sizes)), basis)
    for step in range(steps):
        leaf = basis.detach().requires_grad_()
        with torch.inference_mode(False), torch.enable_grad():
            (gradient,) = torch.autograd.grad(disentanglement(a, c, leaf, sizes), leaf)
        norm = float(gradient.norm())
        if norm == 0:
            break
        basis = _nearest(basis + 0.5 * (1 - step / steps) * basis.norm() / norm * gradient)
        best = max(best, (float(disentanglement(a, c, basis, sizes)), basis), key=lambda pair: pair[0])
    return best


def disentanglement(a: Tensor, c: Tensor, basis: Tensor, sizes: Sequence[int]) -> Tensor:
    """Computes the objective of :func:`drsa` for activations and contexts of shape ``(n, C)``."""
    products = (a @ basis) * (c @ basis)
    relevance = torch.stack([part.sum(1) for part in torch.split(products, list(sizes), 1)], 1)
    over_samples = (relevance.clamp(min=0).square().mean(0) + 1e-24).sqrt()  # the root has no finite gradient at zero
    objective: Tensor = over_samples.sqrt().mean().square()
    return objective


def _nearest(matrix: Tensor) -> Tensor:
    """Returns the nearest matrix with orthonormal columns (the orthogonal polar factor)."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _rms(vectors: Tensor) -> float:
    return float(vectors.square().sum(1).mean().sqrt()) or 1.0


def _vectors(values: Tensor, relevance: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Returns the activations and contexts of all samples and positions, as two tensors of shape ``(n, C)``."""
    if values.shape != relevance.shape or values.ndim < 2:
        raise InputError(
            f"activations {tuple(values.shape)} and relevance {tuple(relevance.shape)} must have the same shape (N, …)."
        )
    with torch.no_grad():
        context = relevance.detach() * _inverse(values.detach())[0]
        flat = [part.movedim(dim, -1).flatten(0, -2).double() for part in (values.detach(), context)]
        return flat[0], flat[1]


def _sizes(sizes: int | Sequence[int], channels: int) -> tuple[int, ...]:
    wanted = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not wanted or min(wanted) < 1 or sum(wanted) > channels:
        raise InputError(f"sizes={brief(sizes)}: give at least 1 for each subspace, and at most {channels} in total.")
    return wanted


# -- the inserted layer ---------------------------------------------------------------------------------------------


def with_subspaces(model: nn.Module, subspaces: Mapping[str, Subspaces]) -> nn.Module:
    """Returns a copy of a model that exposes the subspaces of some layers as taps.

    The copy shares the weights of the model and computes the same outputs; the given model is not modified. A layer
    ``"conv"`` is replaced with ``"conv.layer"`` (the layer itself) and ``"conv.subspaces"``, of shape
    ``(N, K + 1, *shape)``, with one channel per subspace and a last channel for the rest. The tap ``"conv"`` remains
    the output of the layer. Composites that map names to rules must use ``"conv.layer"``.

    Args:
        model: The network to extend.
        subspaces: Subspaces keyed by layer name; each of these layers must return a single tensor.

    Raises:
        UnknownLayerError: If one of the layers is not in the model.
        InputError: If one of the layers contains another.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> cut = with_subspaces(net, {"1": Subspaces(torch.eye(4)[:, :2], (1, 1))})
        >>> mu = RelevanceMeasure(cut, torch.randn(5, 3), 1)
        >>> masses = mu.marginal("1.subspaces", over="channel")
        >>> masses.shape, torch.allclose(masses.sum(1), mu.marginal("1").sum(1), atol=1e-5)
        (torch.Size([5, 3]), True)
        >>> mu.marginal("input", joint=at("1.subspaces")[0]).shape
        torch.Size([5, 3])
    """

    def decomposed(of: Subspaces) -> Replacement:
        return lambda layer: _WithSubspaces(layer, of)

    return with_replaced(model, {name: decomposed(of) for name, of in subspaces.items()}, "subspaces")


class _WithSubspaces(nn.Module):
    """Module that wraps a layer, splits its output into one part per subspace, and returns the sum of the parts."""

    def __init__(self, layer: nn.Module, subspaces: Subspaces) -> None:
        super().__init__()
        self.layer, self.subspaces = layer, _Parts(subspaces)
        self.training = layer.training
        self.subspaces.training = layer.training

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        values: Tensor = self.layer(*args, **kwargs)
        return subspace_sum(self.subspaces(values), values, self.subspaces.of)


class _Parts(nn.Module):
    """Module that splits the output of a layer into one part per subspace and one for the rest."""

    nrm_channel_dim: ClassVar[int] = 1

    def __init__(self, of: Subspaces) -> None:
        super().__init__()
        self.of = of

    def forward(self, values: Tensor) -> Tensor:
        return subspace_parts(values, self.of)


def subspace_parts(values: Tensor, subspaces: Subspaces) -> Tensor:
    """Applies :meth:`Subspaces.parts` as a function recorded as a step."""
    if has_torch_function((values,)):
        parts: Tensor = handle_torch_function(subspace_parts, (values,), values, subspaces)
        return parts
    return subspaces.parts(values)


def subspace_sum(parts: Tensor, values: Tensor, subspaces: Subspaces) -> Tensor:
    """Returns the sum of all parts, bitwise equal to ``values``."""
    if has_torch_function((parts, values)):
        total: Tensor = handle_torch_function(subspace_sum, (parts, values), parts, values, subspaces)
        return total
    return values.clone()


class _PartsKernel(Kernel):
    """Kernel that sends all relevance of a neuron's parts to the neuron itself."""

    is_stochastic = True

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (relevance.sum(-self.dims),)

    pull_absolute = pull


class _SumKernel(Kernel):
    """Kernel that distributes the relevance of the sum over the parts by :meth:`Subspaces.split`."""

    is_stochastic = True

    def __init__(self, subspaces: Subspaces, values: Tensor) -> None:
        self.subspaces, self.values = subspaces, values

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return self.subspaces.split(self.values, relevance), torch.zeros_like(relevance)

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return self.subspaces._split_absolute(self.values, relevance), torch.zeros_like(relevance)


@register_kernel(subspace_parts)
def _parts_kernel(call: FunctionCall) -> Kernel:
    return _PartsKernel(call.values[0].ndim)


@register_kernel(subspace_sum)
def _sum_kernel(call: FunctionCall) -> Kernel:
    subspaces: Subspaces = call.args[2]
    return _SumKernel(subspaces, call.values[1])


__all__ = ["Subspaces", "disentanglement", "drsa", "prca", "with_subspaces"]
