"""What modules return while a measure is taken of the model, without a run of their own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, UnknownLayerError, unknown_layer
from ..kernels.forward_state import without_torch_function


class Activity:
    """Keeps what some modules return, in a context; the hooks are gone after it.

    Args:
        model: The network.
        layers: Names of its modules.

    Raises:
        UnknownLayerError: A name that is no module.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        for layer in layers:
            if layer not in modules:
                raise UnknownLayerError(
                    f"activations are what a module returns: {unknown_layer(layer, [name for name in modules if name])}"
                )
        self._modules = {layer: modules[layer] for layer in layers}
        self._seen: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Activity:
        for layer, module in self._modules.items():

            @without_torch_function
            def keep(module: nn.Module, args: Any, output: Any, layer: str = layer) -> None:
                if not isinstance(output, Tensor) or layer in self._seen:
                    why = "is called more than once" if layer in self._seen else "returns no tensor"
                    raise InputError(f"{layer!r} {why}, so it has no one activation to rank by.")
                self._seen[layer] = output.detach().clone()  # an activation that follows may write over it

            self._stack.callback(module.register_forward_hook(keep).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stack.close()

    def taken(self) -> dict[str, Tensor]:
        """What was kept of the last run; forgets it.

        Raises:
            InputError: A module was not called.
        """
        missing = [layer for layer in self._modules if layer not in self._seen]
        if missing:
            raise InputError(f"{missing[0]!r} was not called, so it has no activation to rank by.")
        seen, self._seen = self._seen, {}
        return seen
