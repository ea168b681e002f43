r"""Estimates of the memory and time of a measure from tensor shapes, without running the model.

The forward pass is run on tensors without values. The peak memory of one recording and one pass for all marginals is
estimated as

.. math:: \sum_k c_k \,\mathrm{bytes}_k

where ``bytes_k`` is the total size of the results of all operations of kind ``k``. The nonnegative coefficients ``c_k``
minimize the mean relative error on a CPU over 37 pairs of a network and an input size, for which the largest error is
15.5%; docs/features.md lists the errors for other networks. The method is new in this package.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..errors import InputError
from ..model.inputs_and_outputs import Call
from ..model.model_protection import named_tensors
from .units import size_of

COEFFICIENTS = {
    "convolution": 0.78,
    "product": 0.94,
    "attention": 9.31,
    "scores": 1.38,
    "batch_norm": 0.45,
    "norm": 8.55,
    "pool": 1.35,
    "mean": 3.69,
    "activation": 2.57,
    "arithmetic": 1.38,
    "other": 1.08,
    "fused_weights": 1.05,
    "attention_weights": 0.13,
    "functional_weights": 0.87,
    "largest": 2.22,
    "input": 4.62,
}
"""Coefficients ``c_k``: peak memory per byte of results, for each kind of operation."""

KINDS = {
    "convolution": "convolution",
    "linear": "mm addmm",
    "product": "bmm baddbmm",
    "scores": "_softmax _safe_softmax _log_softmax",
    "mean": "mean sum _adaptive_avg_pool2d avg_pool2d",
    "activation": "relu gelu silu tanh hardswish hardtanh sigmoid hardsigmoid elu leaky_relu",
    "arithmetic": "add mul",
}
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
PER_OPERATION, PER_FLOP, PER_BYTE = 2.5e-4, 3.0, 10.0
"""Time per operation in seconds and factors of the measured times per FLOP and per byte."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated cost of one recording and one pass that computes all marginals.

    Attributes:
        peak: Peak memory in bytes, in addition to the model and its inputs.
        weights: Size of the parameters and buffers of the model in bytes.
        inputs: Size of the inputs in bytes.
        seconds: Time on the device of the model in seconds. Only the order of magnitude is reliable.
        flops: Number of multiplications and additions in one forward pass.
        bytes_by_kind: Total size of the results in bytes, for each kind of operation.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> estimate = coverage(net, torch.randn(5, 3), memory=True)
        >>> estimate.weights, estimate.inputs, estimate.flops
        (104, 60, 200)
    """

    peak: int
    weights: int
    inputs: int
    seconds: float
    flops: int
    bytes_by_kind: dict[str, int]

    @property
    def total(self) -> int:
        """Peak memory in bytes, including the model and its inputs.

        Examples:
            >>> estimate = coverage(nn.Linear(3, 2), torch.randn(5, 3), memory=True)
            >>> estimate.total == estimate.peak + estimate.weights + estimate.inputs
            True
        """
        return self.peak + self.weights + self.inputs

    def __str__(self) -> str:
        parts = {"measure": self.peak, "weights": self.weights, "inputs": self.inputs, "together": self.total}
        lines = [f"{name:<9} {size / 2**20:10.1f} MiB" for name, size in parts.items()]
        return "\n".join([*lines, f"time      {self.seconds:10.2g} s, order of magnitude"])


def memory_estimate(model: nn.Module, call: Call) -> MemoryEstimate:
    """Estimates the memory and time of a measure by running the model on tensors without values.

    Raises:
        InputError: If the control flow or a shape in the model depends on values.
    """
    log, counter = _Log(), FlopCounterMode(display=False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    shadows = call.changed(fake.from_tensor, fake.from_tensor)
    with torch.no_grad(), _plain_attention(), _called_weights(model, log):
        try:
            with fake, counter, log:
                shadows.run(model, list(shadows.tensors))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise InputError(
                f"the memory of this model cannot be estimated, since it reads values ({error.func}), on which its "
                "control flow or a shape may depend. Measure one sample, and multiply by the number of samples."
            ) from error
    tensors = [*call.tensors, *call.indices.values()]
    own = [tensor for _, tensor in named_tensors(model)]
    sizes = log.with_weights(model, sum(_bytes(tensor) for tensor in call.tensors))
    seconds = _seconds(own[0].device if own else tensors[0].device, counter.get_total_flops(), log, sizes)
    peak = sum(COEFFICIENTS.get(kind, 0.0) * size for kind, size in sizes.items())
    weights, inputs = sum(map(size_of, own)), sum(map(size_of, tensors))
    return MemoryEstimate(int(peak), weights, inputs, seconds, counter.get_total_flops(), dict(sizes))


def _bytes(tensor: Tensor) -> int:
    """Returns the size in bytes of the relevance of a tensor, in at least float32, or 0 for integer tensors."""
    return tensor.numel() * max(tensor.element_size(), 4) if tensor.is_floating_point() else 0


class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Torch dispatch mode that accumulates the size in bytes of results, for each kind of operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.sizes: Counter[str] = Counter()
        self.operations = 0
        self.called = 0
        self._convolutions: dict[int, tuple[int, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default and args[1].ndim == 3:
            # Without values, the operation only accepts bfloat16. The product with one weight has the same size.
            result = args[0] @ args[1][0]
            self._add("mm", args[:2], result)
            return result
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        returns = function._schema.returns
        is_view = any(item.alias_info is not None and not item.alias_info.is_write for item in returns)
        if isinstance(first, Tensor) and not is_view:
            self._add(function._schema.name.partition("::")[2].rstrip("_"), args, first)
        return result

    def _add(self, name: str, args: Any, result: Tensor) -> None:
        self.operations += 1
        kind = _kind(name)
        size = _bytes(args[0]) if kind == "mean" else _bytes(result)
        self.sizes[kind] += size
        self.sizes["largest"] = max(self.sizes["largest"], _bytes(result))
        if kind == "attention":
            query, key = args[0], args[1]
            self.sizes["scores"] += query.shape[:-1].numel() * key.shape[-2] * max(query.element_size(), 4)
        elif kind == "linear":
            self.sizes["functional_weights"] += _bytes(args[-1])
        elif kind == "convolution":
            self._convolutions[id(result)] = _bytes(args[1]), result
        elif kind == "batch_norm" and id(args[0]) in self._convolutions:
            self.sizes["fused_weights"] += self._convolutions[id(args[0])][0]

    def with_weights(self, model: nn.Module, inputs: int) -> Counter[str]:
        """Returns all sizes. The weights of attention and functional layers are kept apart from linear layers."""
        sizes = self.sizes.copy()
        attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
        own = [(module.in_proj_weight, module.out_proj.weight) for module in attention]
        sizes["attention_weights"] = sum(_bytes(weight) for pair in own for weight in pair if weight is not None)
        apart = sizes["functional_weights"] - self.called - sizes["attention_weights"]
        sizes["functional_weights"], sizes["input"] = max(apart, 0), inputs
        return sizes


def _kind(name: str) -> str:
    if "scaled_dot_product" in name:
        return "attention"
    if "batch_norm" in name:
        return "batch_norm"
    if "norm" in name:
        return "norm"
    return _KIND_OF.get(name, "pool" if "pool" in name else "other")


@contextmanager
def _called_weights(model: nn.Module, log: _Log) -> Iterator[None]:
    """Context manager that adds the weight of each linear layer to the log when the layer is called."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        log.called += _bytes(module.weight)  # type: ignore[arg-type]

    handles = [module.register_forward_hook(hook) for module in model.modules() if type(module) is nn.Linear]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Context manager in which torch's attention layers run as separate operations, as they do in a recording."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _seconds(device: torch.device, flops: int, log: _Log, sizes: Counter[str]) -> float:
    """Estimates the time of a measure in seconds from timings of a matrix product and a sum on the device."""
    if device.type == "meta":
        return float("nan")
    a = torch.ones(384, 384, device=device)
    per_flop = _timed(lambda: a @ a, device) / (2 * 384**3)
    b = torch.ones(1 << 20, device=device)
    per_byte = _timed(lambda: b + b, device) / (4 << 20)
    moved = sum(size for kind, size in sizes.items() if kind != "largest")
    return PER_OPERATION * log.operations + PER_FLOP * flops * per_flop + PER_BYTE * moved * per_byte


def _timed(run: Any, device: torch.device, times: int = 4) -> float:
    run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["MemoryEstimate", "memory_estimate"]
