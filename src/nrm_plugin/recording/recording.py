"""Runs a model once under a composite. No other module runs a model for a measure."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..composites import Normalized
from ..events.event import Atom
from ..kernels.forward_state import forward_pass
from ..model.autocast import asked_for, exact, layers_in
from ..model.checks import check_model, check_module
from ..model.guard import Fingerprint, preserved
from ..model.inputs_and_outputs import Call, Output, explained_output
from .graph import Graph
from .observer import Observer
from .samples import Samples
from .structure import Structure
from .taps import OUTPUT, Label, Taps

_RECORDING = threading.RLock()


class Recording:
    """One forward pass of a model under a composite.

    Args:
        model: Any module.
        call: The call of the model.
        composite: Rules and normalization.
        output: The output at which the measure starts, if there are several; or a tap inside the model.

    Attributes:
        structure: Graph, taps and samples, which do not depend on values.
        output: The output, with its history.
        fingerprint: State of the weights during the forward pass.

    Raises:
        InputError: A measure cannot start at this output.
        ModelStateError: The model is in training mode, or has hooks of another composite.
        GradModeError: Gradients are disabled.
        UncoveredLayerError: A layer has no rule.
        UnsupportedOperationError: An operation has no kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        composite: Normalized,
        output: Output | Atom | None = None,
    ) -> None:
        check_module(model)
        indices = list(call.indices.values())
        inner = output if isinstance(output, Atom) else None
        observer = Observer(model, indices, call.batched, inner)
        with ExitStack() as around:
            around.enter_context(_RECORDING)  # another thread may be recording this model, which then has its hooks
            check_model(model, call.tensors)
            device = (*call.tensors, *indices)[0].device
            for block in (preserved(model), forward_pass(observer), torch.enable_grad(), _precision(device)):
                around.enter_context(block)
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_leaf:  # a computed buffer is a constant by its history
                    tensor.requires_grad_(False)
            passed = [observer.input(tensor, item) for item, tensor in zip(call.items, call.tensors, strict=True)]
            with ExitStack() as stack:
                stack.enter_context(composite.context(model))
                observer.watch(stack)
                with call.checked_ids(lambda: observer.has_lookups):
                    returned = call.run(model, passed)
        self.fingerprint = Fingerprint(model)
        if isinstance(output, Atom):
            returned, output = observer.inner_output(output), None
        self.output: Tensor = explained_output(returned, output, call.batch, call.batched)
        observer.see(Label(OUTPUT, "output", 0, None), self.output)
        self.structure = Structure(observer, self.output, call.batch, call.batched)

    @property
    def graph(self) -> Graph:
        """The graph of steps and routes."""
        return self.structure.graph

    @property
    def taps(self) -> Taps:
        """The taps, by name and by place."""
        return self.structure.taps

    @property
    def samples(self) -> Samples:
        """The samples of each tensor."""
        return self.structure.samples


@contextmanager
def _precision(device: torch.device) -> Iterator[None]:
    """Runs layers in the reduced precision of autocast, and all other operations in float32 or float64."""
    with layers_in(asked_for(device)), exact(device):
        yield


__all__ = ["Recording"]
