"""Evaluation of sweep queries on a batch, with targets and predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..composites import Normalized
from ..errors import InputError, NRMError, TargetError
from ..events.event import Atom
from ..measure.measure import RelevanceMeasure
from ..model.inputs_and_outputs import Output
from ..model.targets import chosen_target
from ..recording.module_outputs import module_outputs
from .batched_queries import QueryResults, Requirements
from .queries import Query
from .sweep_layout import SweepError

Target = Literal["prediction", "label"] | int | Callable[[Any], Any] | None
Unpack = Callable[[Any], tuple[Any, Any]]
LABELS = ("label", "labels")
NO_CLASS = -1
"""Value that stands for a target or prediction that is not a class index."""


@dataclass(frozen=True)
class BatchResults:
    """Results of the queries for a batch.

    Attributes:
        sample: Sample indices in the dataset, of shape ``(n,)``.
        target: Explained classes, of shape ``(n,)``, or -1 if the target is not a class.
        prediction: Predicted classes, of shape ``(n,)``, or -1 if the model is not a classifier.
        values: Results keyed by query name, of shape ``(n, *groups)``.
    """

    sample: NDArray[np.int64]
    target: NDArray[np.int32]
    prediction: NDArray[np.int32]
    values: Mapping[str, NDArray[Any]]


class Evaluation:
    """Callable that evaluates the queries of a sweep on a batch.

    Args:
        model: The network, in evaluation mode.
        queries: The queries of the sweep.
        composite: Composite that assigns normalized rules.
        target: ``"prediction"``, ``"label"``, a class, a function that returns the targets of a given batch, or None
            for a model with a single output.
        unpack: Function that splits a batch into inputs and labels. Defaults to :func:`unpacked`.
        output: As in :class:`~nrm_plugin.RelevanceMeasure`.
        against: As in :class:`~nrm_plugin.RelevanceMeasure`.
    """

    def __init__(
        self,
        model: nn.Module,
        queries: Sequence[Query],
        composite: Normalized,
        target: Target = "prediction",
        unpack: Unpack | None = None,
        output: Output | Atom | None = None,
        against: Any = None,
    ) -> None:
        check_target(target)
        self.model, self.queries, self.composite = model, tuple(queries), composite
        self.target, self.unpack, self.output, self.against = target, unpack or unpacked, output, against
        self.needed = Requirements(self.queries)
        self.is_double = dtype_of(model) == torch.float64

    def __call__(self, sample: Sequence[int], batch: Any) -> BatchResults:
        """Evaluates a batch.

        Args:
            sample: Indices of the samples in the dataset.
            batch: The batch, as collated by the data loader.

        Raises:
            NRMError: If the measure cannot be computed for these inputs or if a query does not match the model.
        """
        inputs, labels = self.unpack(batch)
        inputs = moved(inputs, device_of(self.model))
        target = batch_target(self.target, labels, batch)
        modules = {str(atom.layer) for atom in self.needed.activations} - {"input", "output"}
        with torch.inference_mode(False), torch.enable_grad(), module_outputs(self.model, modules) as outputs:
            # A resumed sweep must be bitwise identical, so plans are not used: their results differ by rounding errors.
            mu = RelevanceMeasure(
                self.model, inputs, target, composite=self.composite, output=self.output, against=self.against
            )
        if mu.batch != len(sample):
            raise SweepError(
                f"a batch of {len(sample)} samples has inputs of {mu.batch}; the first dimension must be the batch."
            )
        explained = mu.outputs
        activations = {atom: _activation(atom, outputs, inputs, mu) for atom in self.needed.activations}
        results = QueryResults(mu, self.needed, activations)
        dtype = np.float64 if self.is_double else np.float32
        values = {query.name: results.of(query).cpu().numpy().astype(dtype, copy=False) for query in self.queries}
        targets = _classes(chosen_target(target, explained), mu.batch)
        predictions = _classes(predicted_classes(explained) if _has_classes(explained) else None, mu.batch)
        return BatchResults(np.asarray(sample, np.int64), targets, predictions, values)


def check_target(target: Any) -> None:
    """Raises :class:`SweepError` unless ``target`` is valid."""
    is_class = isinstance(target, int) and not isinstance(target, bool) and target >= 0
    if not (target in (None, "prediction", "label") or is_class or callable(target)):
        raise SweepError(
            f"target={target!r} is unknown; choose 'prediction', 'label', the index of a class, a function of the "
            "batch, or None for a model with a single output."
        )


def unpacked(batch: Any) -> tuple[Any, Any]:
    """Splits a batch into inputs and labels.

    Args:
        batch: A tensor, a pair ``(inputs, labels)``, or a mapping of keyword arguments for the model, with the labels
            under the key ``label`` or ``labels``.

    Raises:
        SweepError: If the batch has none of these forms.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABELS if key in batch), None)
        return {key: value for key, value in batch.items() if key not in LABELS}, labels
    if isinstance(batch, (list, tuple)) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    got = f"{len(batch)} parts" if isinstance(batch, (list, tuple)) else type(batch).__name__
    raise SweepError(
        f"a batch must be inputs, (inputs, labels), or a mapping with 'label'; got {got}. Pass unpack=, a function "
        "that returns (inputs, labels)."
    )


def moved(inputs: Any, device: torch.device) -> Any:
    """Moves tensors, including those in nested tuples, lists and mappings, to a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: moved(value, device) for key, value in inputs.items()}
    return type(inputs)(moved(value, device) for value in inputs) if isinstance(inputs, (list, tuple)) else inputs


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the first parameter or buffer of a model, or the CPU if there are none."""
    return next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Returns the dtype of the first floating-point parameter or buffer of a model."""
    return next((item.dtype for item in _tensors(model) if item.is_floating_point()), torch.get_default_dtype())


def batch_target(target: Target, labels: Any, batch: Any) -> Any:
    """Resolves the target of the measure for a batch.

    Args:
        target: As in :class:`Evaluation`.
        labels: Labels of the batch, or None.
        batch: The batch. It is passed to a target function.

    Raises:
        SweepError: If the target is ``"label"`` but there are no labels.
    """
    if target == "prediction":
        return predicted_classes
    if target == "label":
        if labels is None:
            raise SweepError(
                "target='label', but the data have no labels. Return (inputs, labels), pass unpack= to select the "
                "labels, or set target='prediction'."
            )
        return torch.as_tensor(labels)
    return target(batch) if callable(target) else target


def predicted_classes(outputs: Tensor) -> Tensor:
    """Returns the predicted classes, as a tensor of shape ``(N,)``.

    Raises:
        SweepError: If the model is not a classifier.
    """
    if not _has_classes(outputs):
        raise SweepError(
            f"target='prediction' needs outputs (N, classes), got {tuple(outputs.shape)}. Select the "
            "output by output=, or pass a function of the batch as the target."
        )
    return outputs.argmax(1)


def _has_classes(outputs: Tensor) -> bool:
    return outputs.ndim == 2 and outputs.shape[1] > 0


def _classes(targets: Any, count: int) -> NDArray[np.int32]:
    """Converts targets to one class index per sample, or -1 if a target has several coordinates."""
    try:
        numbers = torch.as_tensor(NO_CLASS if targets is None else targets).detach().cpu().to(torch.int32)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.tensor(NO_CLASS, dtype=torch.int32)
    if numbers.numel() not in (1, count):
        numbers = torch.tensor(NO_CLASS, dtype=torch.int32)
    return numbers.reshape(-1).expand(count).numpy().copy()


def _activation(atom: Atom, outputs: Mapping[str, list[Any]], inputs: Any, mu: RelevanceMeasure) -> Tensor:
    if atom.layer == "output":
        return mu.outputs
    if atom.layer == "input" and isinstance(inputs, Tensor):
        return inputs
    call = atom.call or 0
    if atom.side != "output" or isinstance(call, str):
        raise SweepError(f"activations are outputs of modules, got {atom}.")
    calls = outputs.get(str(atom.layer), [])
    if call >= len(calls) or (atom.call is None and len(calls) > 1):
        raise SweepError(f"{atom} is called {len(calls)} times. Select a call: at({atom.layer!r}, call=0).")
    value = calls[call] if atom.item is None else calls[call][atom.item]
    if not isinstance(value, Tensor):
        raise SweepError(f"{atom} is not a single tensor. Select one of its tensors: at(layer, item=…).")
    return mu._in_form(atom, value)


SYSTEMATIC: tuple[type[BaseException], ...] = (MemoryError, torch.OutOfMemoryError, NRMError)
"""Types of errors not caused by individual samples, except :class:`InputError` and :class:`TargetError`."""


def is_due_to_samples(error: BaseException) -> bool:
    """Returns True if individual samples might have caused an error. The other samples can then still be evaluated."""
    return isinstance(error, (InputError, TargetError)) or not isinstance(error, SYSTEMATIC)


__all__ = [
    "BatchResults",
    "Evaluation",
    "Target",
    "Unpack",
    "check_target",
    "device_of",
    "dtype_of",
    "is_due_to_samples",
    "predicted_classes",
]
