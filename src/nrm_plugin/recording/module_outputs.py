"""Copies of the outputs of modules while a model runs, also in the forward pass that a measure records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import UnknownLayerError, unknown_layer
from ..kernels.forward_state import without_torch_function


@contextmanager
def module_outputs(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, list[Any]]]:
    """Copies the outputs of modules inside this context: one entry per call, with detached tensors.

    Args:
        model: The network; the hooks are removed at the end.
        layers: Names of modules.

    Raises:
        UnknownLayerError: No module has this name.
    """
    modules = dict(model.named_modules())
    outputs: dict[str, list[Any]] = {layer: [] for layer in layers}
    with ExitStack() as stack:
        for layer, calls in outputs.items():
            if layer not in modules:
                raise UnknownLayerError(unknown_layer(layer, [name for name in modules if name]))

            @without_torch_function
            def store(module: nn.Module, args: Any, output: Any, calls: list[Any] = calls) -> None:
                calls.append(_copied(output))

            stack.callback(modules[layer].register_forward_hook(store).remove)
        yield outputs


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach().clone()  # a later in-place activation may overwrite the output
    if isinstance(output, (list, tuple)):
        return [_copied(item) for item in output]
    return {key: _copied(item) for key, item in output.items()} if isinstance(output, dict) else output
