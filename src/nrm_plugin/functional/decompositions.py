"""Decompositions of functions into functions that have kernels."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedOperationError
from ..model.shapes_without_values import has_values
from .registry import DECOMPOSITIONS, decomposition_of


@decomposition_of("trace")
def _trace(input: Tensor) -> Tensor:
    return input.diagonal().sum()


@decomposition_of("inner")
def _inner(input: Tensor, other: Tensor) -> Tensor:
    if input.ndim == 0 or other.ndim == 0:
        return input * other
    result: Tensor = torch.tensordot(input, other, dims=([-1], [-1]))
    return result


@decomposition_of("vecdot")
def _vecdot(x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    return (x * y).sum(dim)


@decomposition_of("glu")
def _glu(input: Tensor, dim: int = -1) -> Tensor:
    signal, gate = input.chunk(2, dim)
    return signal * gate.sigmoid()


@decomposition_of("lerp")
def _lerp(input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return input * (1 - weight) + end * weight


@decomposition_of("addcmul")
def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + tensor1 * tensor2 * value


@decomposition_of("addcdiv")
def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + tensor1 / tensor2 * value


@decomposition_of("addmm")
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    is_layer = mat1.requires_grad and not (mat2.requires_grad or input.requires_grad) and beta == alpha == 1
    if is_layer and input.shape == mat2.shape[1:]:  # a rule then treats the bias as in a layer
        return nn.functional.linear(mat1, mat2.T, input)
    return _weighted_sum(input, torch.matmul(mat1, mat2), beta, alpha)


@decomposition_of("addmv")
def _addmv(input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _weighted_sum(input, torch.matmul(mat, vec), beta, alpha)


@decomposition_of("baddbmm")
def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _weighted_sum(input, torch.matmul(batch1, batch2), beta, alpha)


@decomposition_of("addbmm")
def _addbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _weighted_sum(input, torch.matmul(batch1, batch2).sum(0), beta, alpha)


def _weighted_sum(input: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    product = product if alpha == 1 else product * alpha
    if beta == 0:  # as in torch, the input is then ignored, even if it is nan
        return product
    return product + (input if beta == 1 else input * beta)


@decomposition_of("grouped_mm", "_grouped_mm")
def _grouped(
    mat_a: Tensor, mat_b: Tensor, *, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    if offs is None:
        result = torch.matmul(mat_a, mat_b)
    elif mat_a.ndim == 2 and mat_b.ndim == 3:
        # Without values, the rows are divided evenly among the groups.
        bounds = offs[:-1].cpu().long() if has_values(offs) else len(mat_b)
        rows = mat_a.tensor_split(bounds)
        result = torch.cat([torch.matmul(part, mat_b[group]) for group, part in enumerate(rows)])
    else:
        raise UnsupportedOperationError(
            f"grouped_mm of shapes {tuple(mat_a.shape)} and {tuple(mat_b.shape)} with offsets has no kernel: only rows "
            "in groups, (rows, in) and (groups, in, out), have one. Multiply group by group instead."
        )
    return result if bias is None else result + bias


@decomposition_of("bilinear")
def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    products = input1.unsqueeze(-1) * input2.unsqueeze(-2)
    return nn.functional.linear(products.flatten(-2), weight.flatten(1), bias)


@decomposition_of("diff")
def _diff(
    input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Tensor:
    parts = [part for part in (prepend, input, append) if part is not None]
    result = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    for _ in range(n):
        length = result.shape[dim] - 1
        result = result.narrow(dim, 1, length) - result.narrow(dim, 0, length)
    return result


@decomposition_of("nanmean")
def _nanmean(input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    count = (~input.isnan()).sum(dim, keepdim)
    return _nansum(input, dim, keepdim, dtype=dtype) / count


@decomposition_of("nansum")
def _nansum(input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return torch.where(input.isnan(), 0.0, input).sum(dim, keepdim, dtype=dtype)


@decomposition_of("var")
def _var(input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **options: Any) -> Tensor:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    mean = input.mean(dim, keepdim=True)
    correction = options.get("correction")
    freedom = input.numel() // mean.numel() - (int(unbiased) if correction is None else correction)
    return (input - mean).square().sum(dim, keepdim=keepdim) / freedom


@decomposition_of("std")
def _std(input: Tensor, *args: Any, **options: Any) -> Tensor:
    return input.var(*args, **options).sqrt()


@decomposition_of("var_mean")
def _var_mean(input: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return input.var(*args, **options), _mean_of_variance(input, *args, **options)


@decomposition_of("std_mean")
def _std_mean(input: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return input.std(*args, **options), _mean_of_variance(input, *args, **options)


def _mean_of_variance(
    input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **options: Any
) -> Tensor:
    """Computes the mean. Takes the arguments of a variance."""
    return input.mean(None if isinstance(dim, bool) else dim, keepdim=keepdim)


# -- layers -----------------------------------------------------------------------------------------------------------


@decomposition_of("embedding")
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *options: Any,
    **more: Any,
) -> Any:
    """Looks up rows of a table that the model computes."""
    return NotImplemented if input.is_floating_point() or max_norm is not None else weight[input]


@decomposition_of("embedding_bag")
def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Looks up and sums rows of a table. Applies if the model computes the table or the weights of the rows."""
    if input.is_floating_point() or offsets is not None or mode == "max":  # torch.embedding_bag has the table first
        return NotImplemented
    rows = functional.embedding(input, weight)
    used = torch.ones_like(input) if padding_idx is None else (input != padding_idx).to(input.dtype)
    rows = rows if padding_idx is None else rows * used.unsqueeze(-1)
    rows = rows if per_sample_weights is None else rows * per_sample_weights.unsqueeze(-1)
    total = rows.sum(1)
    return total if mode == "sum" else total / used.sum(1, keepdim=True).clamp(min=1)


def is_computed_layer(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any) -> bool:
    """Returns True if a functional layer has a bias and the model computes its weight or its bias."""
    return bias is not None and (weight.requires_grad or bias.requires_grad)


def product_and_bias(
    function: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor, *args: Any, **options: Any
) -> Tensor:
    """Computes a layer as a product plus a bias. Each of the two has its own kernel."""
    return function(input, weight, None, *args, **options) + bias.reshape(-1, *(1,) * (weight.ndim - 2))


# -- torch functions that are written in Python --------------------------------------------------------------------


def python_body(function: Any) -> Callable[..., Any] | None:
    """Copies a torch function without ``__torch_function__`` dispatch. Returns None if it is not written in Python."""
    code = getattr(function, "__code__", None)
    checks = [word for word in code.co_names if word.startswith("has_torch_function")] if code is not None else []
    if code is None or not checks:
        return None
    space = {**function.__globals__, **dict.fromkeys(checks, _never)}
    body = types.FunctionType(code, space, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _never(*args: Any) -> bool:
    return False


__all__ = ["DECOMPOSITIONS", "is_computed_layer", "product_and_bias", "python_body"]
