"""Export of a plan as a ``torch.export`` program that returns outputs and relevance and needs only PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, MissingExtraError, UnsupportedOperationError
from ..measure.layer_taps import Layer
from ..model.autocast import working_dtype
from ..model.inputs_and_outputs import Call
from ..recording.recording import Reference
from .planned_measure import PlannedMeasure, Settings, TracedRecording
from .program import Program
from .program_cache import Programs
from .trace import Operation

aten = torch.ops.aten


class EveryShortcut(frozenset[str]):
    """Set of all shortcuts (faster computations that are valid only for some values).

    A trace in which they are all disabled is valid for all values.
    """

    def __contains__(self, shortcut: object) -> bool:
        return True

    def __bool__(self) -> bool:
        return True

    def __or__(self, other: Any) -> EveryShortcut:
        return self


def explained_model(
    settings: Settings,
    make_call: Callable[[], tuple[Call, Reference | None]],
    tensors: list[Tensor],
    layers: Sequence[Layer],
) -> tuple[ExplainedModel, list[Tensor]]:
    """Traces a model and the marginals of layers, taking no shortcuts that depend on values.

    Args:
        settings: The settings of the plan.
        make_call: Function that returns the arguments of the model call and, if any, the reference.
        tensors: The tensors among these arguments.
        layers: The layers whose marginals are traced.

    Returns:
        The module and example arguments.

    Raises:
        UnsupportedOperationError: If the computation cannot be replayed for other inputs.
    """
    programs = Programs()
    programs.disabled_shortcuts = EveryShortcut()
    with torch.enable_grad():
        whole = replace(settings, max_memory=None)  # a trace needs all tensors of the recording
        recorded = TracedRecording(whole, make_call, tensors, programs.disabled_shortcuts)
    mu = PlannedMeasure(settings, programs, make_call, tensors, None, _predicted, None, recorded)
    mu.marginal(list(layers))
    if programs.latest is None:
        why = programs.reason_not_replayable or "; ".join(programs.lines(())) or "the query was not traced"
        raise UnsupportedOperationError(
            f"the plan cannot be exported: {why}. Rewrite this part of the model, or compute measures in Python."
        )
    names = [layer if isinstance(layer, str) else str(layer) for layer in layers]
    module = ExplainedModel(programs.latest, names, recorded.outputs[0])
    return module, [*tensors, torch.full((len(recorded.outputs[0]),), -1, device=recorded.outputs[0].device)]


def _predicted(outputs: Tensor) -> Tensor:
    """Returns the one-hot start vector of the predicted class of each sample."""
    scores = outputs.reshape(len(outputs), -1)
    return torch.zeros_like(scores).scatter(1, scores.argmax(1, keepdim=True), 1).reshape(outputs.shape)


class ExplainedModel(nn.Module):
    """Module that computes the outputs of a model and their relevance with a fixed sequence of tensor operations.

    Args:
        program: The compiled tensor operations, traced with all value-dependent shortcuts disabled.
        layers: Names of the layers whose relevance is returned.
        outputs: Example outputs, from which the shape and dtype of the outputs are taken.

    Raises:
        InputError: If the outputs do not have shape ``(N, K)`` or ``(N,)``.
        UnsupportedOperationError: If the operations depend on values in a way that a program cannot verify.
    """

    def __init__(self, program: Program, layers: Sequence[str], outputs: Tensor) -> None:
        super().__init__()
        if outputs.ndim > 2:
            raise InputError(
                f"the explained outputs have shape {tuple(outputs.shape)}, but an exported program takes one class for "
                "each sample, so the outputs must be (N, K) or (N,). Select such outputs by Plan(…, output=…)."
            )
        self.layers = list(layers)
        self._program, self._dtype = program, working_dtype(outputs.dtype)
        self._constants: dict[int, _Constant] = {}
        known: dict[Any, tuple[str, Tensor]] = {}
        for number, constant in program.constants.items():
            base, dims = _in_memory_order(constant)
            # Matrices of weights are views of the weights. Each block of memory is stored once.
            key = (base.data_ptr(), base.numel(), base.dtype)
            name, _ = known.setdefault(key, (f"c{number}", base))
            if name == f"c{number}":
                is_whole = base.untyped_storage().nbytes() == base.numel() * base.element_size()
                self.register_buffer(name, base if is_whole else base.clone())
            self._constants[number] = _Constant(name, base.shape, dims, constant.shape)
        for one in program.operations:
            _check_exportable(one)

    def forward(self, *tensors: Tensor) -> dict[str, Any]:
        """Computes the outputs, the targets, the relevance of each layer, and whether it is valid.

        Args:
            tensors: The tensors of a model call, followed by the int64 targets of shape ``(N,)``, where -1 stands for
                the class with the largest output.

        Returns:
            A dictionary with the keys ``"outputs"``; ``"target"``, of shape ``(N,)``; ``"relevance"``, keyed by layer;
            and ``"is_valid"``, of shape ``(N,)``, which is False for samples whose relevance must not be used.
        """
        *inputs, target = tensors
        program = self._program
        values: dict[int, Tensor] = {
            number: getattr(self, one.buffer).view(one.stored).permute(one.dims).expand(one.shape)
            for number, one in self._constants.items()
        }
        values.update(zip(program.inputs, inputs, strict=True))
        checks: list[Tensor] = []
        self._run(program.operations[: program.until], values, checks)
        unfolded, outputs = (values[number] for number in program.outputs)
        scores = unfolded.reshape(len(unfolded), -1)
        target = torch.where(target == -1, scores.argmax(1), target)
        start = target[:, None] == torch.arange(scores.shape[1], device=scores.device)
        values[program.start[0]] = start.to(self._dtype).reshape(unfolded.shape)
        self._run(program.operations[program.until :], values, checks)
        relevance = {
            layer: values[number].clone() for layer, number in zip(self.layers, program.results[0], strict=True)
        }
        is_valid = (target >= 0) & (target < scores.shape[1])
        for part in relevance.values():
            is_valid = is_valid & part.isfinite().flatten(1).all(1)
        for check in checks:
            is_valid = is_valid & check
        return {"outputs": outputs.clone(), "target": target, "relevance": relevance, "is_valid": is_valid}

    def _run(self, operations: Sequence[Operation], values: dict[int, Tensor], checks: list[Tensor]) -> None:
        for one in operations:
            args, kwargs = one.call.arguments([values[number] for number in one.reads])
            if one.expected is not None:
                checks.append(_CHECKS[one.function](one.expected, *args))
                continue
            result = one.function(*args, **kwargs)
            for number, item in zip(one.results, result if one.is_sequence else [result], strict=True):
                if number is not None:
                    values[number] = item


@dataclass(frozen=True)
class _Constant:
    """Place of a constant in the buffers of a module.

    Attributes:
        buffer: Name of the buffer.
        stored: Shape in which the elements are stored.
        dims: Permutation of this shape that restores the strides.
        shape: Shape of the constant, to which the permuted elements are expanded.
    """

    buffer: str
    stored: torch.Size
    dims: list[int]
    shape: torch.Size


def _in_memory_order(constant: Tensor) -> tuple[Tensor, list[int]]:
    """Returns the elements of a constant as a contiguous tensor, and the permutation that restores its strides.

    Repeated elements are returned once.
    """
    constant = constant.detach()
    for dim in range(constant.ndim):
        if constant.stride(dim) == 0 and constant.shape[dim] > 1:
            constant = constant.narrow(dim, 0, 1)
    order = sorted(range(constant.ndim), key=constant.stride, reverse=True)
    base = constant.permute(order)
    if not base.is_contiguous():
        order = list(range(constant.ndim))
        base = constant.contiguous()
    return base, [order.index(dim) for dim in range(constant.ndim)]


def _is_value(expected: Any, tensor: Tensor) -> Tensor:
    equal: Tensor = tensor.reshape(()) == expected
    return equal


def _are_equal(expected: Any, one: Tensor, other: Tensor) -> Tensor:
    equal: Tensor = (one == other).all() == expected
    return equal


_CHECKS: dict[Any, Any] = {
    aten._local_scalar_dense.default: _is_value,
    aten.is_nonzero.default: lambda expected, tensor: (tensor.reshape(()) != 0) == expected,
    aten.equal.default: _are_equal,
}
"""Functions that compare a result read as a Python value with its expected value, keyed by operation."""


def _check_exportable(one: Operation) -> None:
    if one.shapes is not None or (one.expected is not None and one.function not in _CHECKS):
        raise UnsupportedOperationError(
            f"the plan cannot be exported: shapes or values depend on the inputs ({one.function}, {one.origin}), and a "
            "program of tensor operations is fixed. Rewrite this part of the model without the dependence."
        )


def save(module: ExplainedModel, tensors: Sequence[Tensor], path: Path) -> None:
    """Saves a module as a ``torch.export`` program, or as an ONNX file if the path ends in ``.onnx``.

    Args:
        module: The module to save.
        tensors: Example arguments of the module: the tensors of a call and the targets.
        path: Path of the file.

    Raises:
        MissingExtraError: If the path ends in ``.onnx`` and onnx or onnxscript is not installed.
        FileNotFoundError: If the folder of the path does not exist.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {str(path.parent)!r} does not exist. Create it first.")
    is_onnx = path.suffix == ".onnx"
    if is_onnx and None in (importlib.util.find_spec("onnx"), importlib.util.find_spec("onnxscript")):
        raise MissingExtraError("an ONNX file needs PyTorch's exporter: pip install onnx onnxscript.")
    with torch.no_grad():
        program = torch.export.export(module, tuple(tensors), strict=False)
    if is_onnx:
        torch.onnx.export(program, (), path, dynamo=True)
    else:
        torch.export.save(program, path)


__all__ = ["EveryShortcut", "ExplainedModel", "save"]
