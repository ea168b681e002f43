"""One batch of samples through one measure: targets, predictions, and the answers to all queries."""

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
from ..model.inputs import Output
from ..model.targets import start_vector
from ..recording.module_outputs import module_outputs
from .batched_queries import Answers, Asked
from .queries import Query
from .sweep_layout import SweepError

Target = Literal["prediction", "label"] | int | Callable[[Any], Any] | None
Unpack = Callable[[Any], tuple[Any, Any]]
LABELS = ("label", "labels")
NONE = -1
"""Target or prediction of a sample that has none."""


@dataclass(frozen=True)
class Evaluated:
    """The answers for some samples.

    Attributes:
        sample: Places in the data set, ``(n,)``.
        target: Explained classes, ``(n,)``; -1 where the target is no class.
        prediction: Classes of the largest outputs, ``(n,)``; -1 where the outputs are no classes.
        values: Of each query, ``(n, *groups)``.
    """

    sample: NDArray[np.int64]
    target: NDArray[np.int32]
    prediction: NDArray[np.int32]
    values: Mapping[str, NDArray[Any]]


class Evaluation:
    """What a sweep does to every batch.

    Args:
        model: The network, in evaluation mode.
        queries: What is asked.
        composite: Rules.
        target: ``"prediction"``, ``"label"``, a class, a function that finds the targets in a batch, or None where the
            model has a single output.
        unpack: Finds inputs and labels in a batch; :func:`unpacked` by default.
        output: As in :class:`~nrm_plugin.RelevanceMeasure`.
    """

    def __init__(
        self,
        model: nn.Module,
        queries: Sequence[Query],
        composite: Normalized,
        target: Target = "prediction",
        unpack: Unpack | None = None,
        output: Output | Atom | None = None,
    ) -> None:
        check_target(target)
        self.model, self.queries, self.composite = model, tuple(queries), composite
        self.target, self.unpack, self.output = target, unpack or unpacked, output
        self.asked = Asked(queries)
        self.is_double = dtype_of(model) == torch.float64

    def __call__(self, sample: Sequence[int], batch: Any) -> Evaluated:
        """The answers for one batch.

        Args:
            sample: Places of its samples in the data set.
            batch: What the loader hands out.

        Raises:
            NRMError: The model has no measure of these inputs, or a query does not fit it.
        """
        inputs, labels = self.unpack(batch)
        inputs = moved(inputs, device_of(self.model))
        chooser = _Chooser(self.target, labels, batch)
        modules = {str(atom.layer) for atom in self.asked.activations} - {"input", "output"}
        with torch.inference_mode(False), torch.enable_grad(), module_outputs(self.model, modules) as returned:
            mu = RelevanceMeasure(self.model, inputs, start=chooser, composite=self.composite, output=self.output)
        if mu.batch != len(sample):
            raise SweepError(
                f"a batch of {len(sample)} samples has inputs of {mu.batch}; their first dimension is the samples."
            )
        activations = {atom: _activation(atom, returned, inputs, chooser.outputs) for atom in self.asked.activations}
        answers = Answers(mu, self.asked, activations)
        kind = np.float64 if self.is_double else np.float32
        values = {query.name: answers.of(query).cpu().numpy().astype(kind, copy=False) for query in self.queries}
        return Evaluated(np.asarray(sample, np.int64), chooser.targets, chooser.predictions, values)


def check_target(target: Any) -> None:
    """Raises :class:`SweepError` unless this can be the target of a sweep."""
    is_class = isinstance(target, int) and not isinstance(target, bool) and target >= 0
    if not (target in (None, "prediction", "label") or is_class or callable(target)):
        raise SweepError(
            f"target={target!r} is unknown; choose 'prediction', 'label', the number of a class, a function of the "
            "batch, or None for a model with a single output."
        )


def unpacked(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch.

    Args:
        batch: A tensor; ``(inputs, labels)``; or a mapping, whose ``label`` or ``labels`` are the labels while the
            model takes the others by keyword.

    Raises:
        SweepError: Something else.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABELS if key in batch), None)
        return {key: value for key, value in batch.items() if key not in LABELS}, labels
    if isinstance(batch, (list, tuple)) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    what = f"{len(batch)} parts" if isinstance(batch, (list, tuple)) else type(batch).__name__
    raise SweepError(
        f"a batch is inputs, (inputs, labels), or a mapping with 'label'; got {what}. Say what is what by unpack=, a "
        "function that returns (inputs, labels)."
    )


def moved(inputs: Any, device: torch.device) -> Any:
    """Inputs on a device; also inside of tuples and mappings."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: moved(value, device) for key, value in inputs.items()}
    return type(inputs)(moved(value, device) for value in inputs) if isinstance(inputs, (list, tuple)) else inputs


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """What the model computes in."""
    return next((item.dtype for item in _tensors(model) if item.is_floating_point()), torch.get_default_dtype())


class _Chooser:
    """The start of a measure, chosen when the outputs are there: the model then runs only once."""

    def __init__(self, target: Target, labels: Any, batch: Any) -> None:
        self.target, self.labels, self.batch = target, labels, batch
        self.outputs = torch.empty(0)
        self.targets = self.predictions = np.empty(0, np.int32)

    def __call__(self, outputs: Tensor) -> Tensor:
        self.outputs = outputs
        found = outputs.argmax(1) if outputs.ndim == 2 and outputs.shape[1] else None
        self.predictions = _classes(found, len(outputs))
        targets = self._targets(found)
        self.targets = _classes(targets, len(outputs))
        return start_vector(outputs, targets)

    def _targets(self, predictions: Tensor | None) -> Any:
        if self.target == "prediction":
            if predictions is None:
                raise SweepError(
                    f"target='prediction' needs outputs (N, classes), got {tuple(self.outputs.shape)}. Choose the "
                    "output by output=, or the target by a function of the batch."
                )
            return predictions
        if self.target == "label":
            if self.labels is None:
                raise SweepError(
                    "target='label', but a sample of the data is inputs alone. Say what is the label by unpack=."
                )
            return torch.as_tensor(self.labels)
        if callable(self.target):
            return self.target(self.batch)
        return self.target


def _classes(targets: Any, count: int) -> NDArray[np.int32]:
    """Targets as one number for each sample."""
    try:
        numbers = torch.as_tensor(NONE if targets is None else targets).detach().cpu().to(torch.int32)
        return numbers.reshape(-1).expand(count).numpy().copy() if numbers.numel() == 1 else _of(numbers, count)
    except (TypeError, ValueError, RuntimeError):  # a target of several coordinates is no class
        return np.full(count, NONE, np.int32)


def _of(numbers: Tensor, count: int) -> NDArray[np.int32]:
    if numbers.numel() != count:
        raise TargetError(f"there are {numbers.numel()} targets for {count} samples.")
    return numbers.reshape(-1).numpy().copy()


# -- what the model computes ----------------------------------------------------------------------------------------


def _activation(atom: Atom, returned: Mapping[str, list[Any]], inputs: Any, outputs: Tensor) -> Tensor:
    if atom.layer == "output":
        return outputs
    if atom.layer == "input" and isinstance(inputs, Tensor):
        return inputs
    call = atom.call or 0
    if atom.side != "output" or isinstance(call, str):
        raise SweepError(f"activations are those that a module returns; got {atom}.")
    calls = returned.get(str(atom.layer), [])
    if call >= len(calls) or (atom.call is None and len(calls) > 1):
        raise SweepError(f"{atom} is called {len(calls)} times. Say which call: at({atom.layer!r}, call=0).")
    value = calls[call] if atom.item is None else calls[call][atom.item]
    if not isinstance(value, Tensor):
        raise SweepError(f"{atom} is not a single tensor. Select one of them: at(layer, item=…).")
    return value


SYSTEMATIC: tuple[type[BaseException], ...] = (MemoryError, torch.OutOfMemoryError, NRMError)


def is_of_samples(error: BaseException) -> bool:
    """Whether an error may be due to single samples, so that the others can be evaluated without them."""
    return isinstance(error, (InputError, TargetError)) or not isinstance(error, SYSTEMATIC)


__all__ = ["Evaluated", "Evaluation", "Target", "Unpack", "check_target", "device_of", "dtype_of", "is_of_samples"]
