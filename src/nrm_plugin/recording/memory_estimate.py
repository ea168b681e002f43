r"""Estimates of the memory and time of a measure, without values of weights and inputs.

The recording and one pass for all marginals run on tensors that only have shapes, so the peak is the largest sum

.. math:: \max_t \sum_{\text{tensors alive at } t} \mathrm{bytes}

over the operations :math:`t` of the computation itself, rather than a model of it. Nothing is fitted. The method is new
in this package.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils.flop_counter import FlopCounterMode

from ..composites import normalize
from ..errors import InputError
from ..model.inputs_and_outputs import Call, Output
from ..model.model_protection import named_tensors, preserved
from ..model.quantized import plain_tensors
from ..model.shapes_without_values import valueless
from ..model.trace_guards import uncollected
from .places import Buffer
from .propagation import Vectors, Visitor, pull
from .recording import Recording
from .shapes_only import ShapesOnly
from .stored_outputs import size_of

PER_OPERATION, PER_FLOP, PER_BYTE = 2.5e-4, 3.0, 10.0
"""Time per operation in seconds, and multipliers for the measured times per FLOP and per byte."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated cost of a measure, for one recording and one pass that computes all marginals.

    Attributes:
        peak: Peak memory in bytes, in addition to the model and its inputs.
        weights: Size of the parameters and buffers of the model in bytes.
        inputs: Size of the inputs in bytes.
        seconds: Time on the device of the model; only the order of magnitude is reliable.
        flops: Number of multiplications and additions in one forward pass.
        bytes_by_kind: Sizes in bytes of the tensors at the peak, keyed by the operation that allocated them, with the
            largest first; their sum is ``peak``.

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


def memory_estimate(model: nn.Module, call: Call, output: Output | None = None) -> MemoryEstimate:
    """Estimates the memory and time of a measure by computing it on tensors without values.

    Raises:
        InputError: If the control flow or a shape in the model depends on values.
    """
    own = [tensor for _, tensor in named_tensors(model)]
    tensors = [*call.tensors, *call.indices.values()]
    device = tensors[0].device
    try:
        with preserved(model):  # a module may store a tensor, such as a position table, for its later calls
            forward, counter = _forward(model, call, own, device)
            mode = _measured(model, call, output, own, device)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise InputError(
            f"the memory of this model cannot be estimated, because it reads values ({error.func}), on which its "
            "control flow or a shape may depend. Measure one sample, and multiply by the number of samples."
        ) from error
    is_meta = any(tensor.device.type == "meta" for tensor in own)
    flops = counter.get_total_flops()
    seconds = float("nan") if is_meta else _seconds(device, flops, forward)
    weights, inputs = sum(map(size_of, own)), sum(map(size_of, tensors))
    sizes = {name: size for name, size in mode.bytes_at_peak.most_common() if size}
    return MemoryEstimate(mode.peak, weights, inputs, seconds, flops, sizes)


def _mode(own: list[Tensor], device: torch.device) -> ShapesOnly:
    return ShapesOnly([part for tensor in own for part in plain_tensors(tensor)], device)


def _forward(
    model: nn.Module, call: Call, own: list[Tensor], device: torch.device
) -> tuple[ShapesOnly, FlopCounterMode]:
    """Runs only the model, which raises an error if it reads values."""
    mode = _mode(own, device)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops})
    shapes = call.changed(mode.shapes, mode.shapes)
    with torch.no_grad(), _frozen(own), _plain_attention(), mode, counter:
        shapes.run(model, list(shapes.tensors))
    return mode, counter


def _grouped_flops(rows: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    """Returns the number of operations of a product of each row with one of several weights."""
    return int(2 * math.prod(rows) * weights[-1])


def _measured(
    model: nn.Module, call: Call, output: Output | None, own: list[Tensor], device: torch.device
) -> ShapesOnly:
    """Records the model and computes the marginals of its inputs."""
    mode = _mode(own, device)
    mode.answers = True
    shapes = call.changed(mode.shapes, mode.shapes)
    with mode, valueless():
        with uncollected():
            recording = Recording(model, shapes, normalize(None, None, None, None), output)
        outputs = recording.outputs()
        start = recording.started(torch.zeros_like(outputs))
        with torch.inference_mode(False), torch.no_grad():
            pull(recording.graph, [(recording.graph.output, {"": start})], _Lowest(recording))
    return mode


class _Lowest(Visitor[str]):
    """Visitor that stores the relevance of the first input."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._ends = {tap.place for tap in recording.taps.end_taps[:1]}
        self._maps: list[Tensor] = []

    def at_buffer(self, buffer: Buffer, vectors: Vectors[str]) -> Vectors[str]:
        if buffer in self._ends:
            layout = self._recording.samples.layout(buffer)  # may run the model on two copies of the sample
            self._maps += [layout.unfold(vector) for vector in vectors.values()]
        return vectors


@contextmanager
def _frozen(tensors: list[Tensor]) -> Iterator[None]:
    """Context manager in which no parameter requires gradients, whose history torch's counter of FLOPs would read."""
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    try:
        for tensor in trained:
            tensor.requires_grad_(False)
        yield
    finally:
        for tensor in trained:
            tensor.requires_grad_(True)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Context manager in which torch's attention layers run as separate operations, as in a recording."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _seconds(device: torch.device, flops: int, forward: ShapesOnly) -> float:
    """Estimates the time of a measure from the measured times of a matrix product and a sum on the device."""
    a = torch.ones(384, 384, device=device)
    per_flop = _timed(lambda: a @ a, device) / (2 * 384**3)
    b = torch.ones(1 << 20, device=device)
    per_byte = _timed(lambda: b + b, device) / (4 << 20)
    return PER_OPERATION * forward.operations + PER_FLOP * flops * per_flop + PER_BYTE * forward.moved * per_byte


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
