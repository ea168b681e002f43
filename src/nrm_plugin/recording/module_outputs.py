"""Collection of module outputs during any forward pass, such as the forward pass of a measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import UnknownLayerError, unknown_layer
from ..kernels.forward_state import without_torch_function
from .module_names import first_name, module_names
from .taps import Nested


@contextmanager
def module_outputs(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, list[Any]]]:
    """Context manager that collects detached copies of the outputs of modules, one per call.

    Args:
        model: The network; the hooks are removed on exit.
        layers: Names of modules.

    Raises:
        UnknownLayerError: If one of the names does not refer to a module.
    """
    names = module_names(model)
    modules = {name: module for module, name in names.items()}
    outputs: dict[str, list[Any]] = {layer: [] for layer in layers}
    with ExitStack() as stack:
        for layer, calls in outputs.items():
            name = layer if layer in modules else first_name(layer, names)
            if name not in modules:
                raise UnknownLayerError(unknown_layer(layer, [name for name in modules if name]))

            @without_torch_function
            def store(module: nn.Module, args: Any, output: Any, calls: list[Any] = calls) -> None:
                calls.append(_copied(output))

            stack.callback(modules[name].register_forward_hook(store).remove)
        yield outputs


def tensors_of(output: Any) -> dict[int | str, Tensor]:
    """Returns the tensors in a module output, keyed by tuple position, mapping key or dataclass field.

    Tensors in nested containers have keys joined by dots, of type :class:`Nested`.
    """
    tensors: dict[int | str, Tensor] = {}
    for key, value in _entries(output).items():
        if isinstance(value, Tensor):
            tensors[key] = value
        else:
            tensors |= {Nested(f"{key}.{inner}"): tensor for inner, tensor in tensors_of(value).items()}
    return tensors


def _entries(output: Any) -> dict[Any, Any]:
    if isinstance(output, Mapping):
        return {key if isinstance(key, (int, str)) else str(key): value for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {}


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach().clone()  # a later in-place activation may overwrite the output
    if isinstance(output, (list, tuple)):
        return [_copied(item) for item in output]
    return {key: _copied(item) for key, item in output.items()} if isinstance(output, dict) else output
