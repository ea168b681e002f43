"""Complex tensors: they have no kernel, but may feed a gate, which passes no relevance to them.

The functions between real tensors and real tensors form one step, which raises when relevance arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class RealSources:
    """The real tensors that complex ones were computed from.

    Attributes:
        tensors: The real tensors, each once.
        name: The first function that returned a complex tensor.
    """

    tensors: tuple[Tensor, ...] = ()
    name: str = ""


class ComplexTensors:
    """The real sources of the complex tensors of a forward pass."""

    def __init__(self) -> None:
        self._sources: dict[Any, RealSources] = {}

    def sources_of(self, arguments: Iterable[Any]) -> RealSources:
        """The real tensors behind the complex ones among some arguments."""
        tensors: dict[int, Tensor] = {}
        name = ""
        for tensor in _complex_in(arguments):
            sources = self._sources.get(tensor.grad_fn, RealSources())
            name = name or sources.name
            tensors.update({id(source): source for source in sources.tensors})
        return RealSources(tuple(tensors.values()), name)

    def remember(self, output: Any, tensors: Sequence[Tensor], name: str) -> Any:
        """Stores the sources of complex tensors that a function returned; returns the same output."""
        for tensor in _complex_in((output,)):
            self._sources[tensor.grad_fn] = RealSources(tuple(tensors), name)
        return output


def _complex_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_complex() and value.grad_fn is not None:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _complex_in(value)


def map_items(output: Any, change: Callable[[Any], Any]) -> Any:
    """What a function returned with each of several items changed."""
    return type(output)([change(item) for item in output]) if isinstance(output, (list, tuple)) else change(output)


__all__ = ["ComplexTensors", "RealSources", "map_items"]
