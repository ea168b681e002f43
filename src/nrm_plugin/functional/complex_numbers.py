"""Complex numbers: no kernel is known of them, but on the way to a gate they do no harm.

What lies between real numbers and real numbers is one step, which raises when relevance arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor


class Complexes:
    """What the complex tensors of a forward pass were made of: real ones, and the first function that made them so."""

    def __init__(self) -> None:
        self._behind: dict[Any, tuple[list[Tensor], str]] = {}

    def behind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], str]:
        """The real tensors, each once, behind the complex ones among the arguments of a function."""
        found: dict[int, Tensor] = {}
        first = ""
        for tensor in _complex_in((*args, *kwargs.values())):
            sources, name = self._behind.get(tensor.grad_fn, ((), ""))
            first = first or name
            found.update({id(source): source for source in sources})
        return list(found.values()), first

    def noted(self, output: Any, behind: list[Tensor], name: str) -> Any:
        """The same output; of complex ones it is kept what they were made of."""
        for tensor in _complex_in((output,)):
            self._behind[tensor.grad_fn] = behind, name
        return output


def _complex_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_complex() and value.grad_fn is not None:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _complex_in(value)


def each(output: Any, change: Callable[[Any], Any]) -> Any:
    """What a function returned, changed one by one where it is several."""
    return type(output)([change(item) for item in output]) if isinstance(output, (list, tuple)) else change(output)


__all__ = ["Complexes", "each"]
