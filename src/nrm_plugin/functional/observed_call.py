"""Function calls as observed by interception, before kernels are assigned to them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .function_call import Slot
from .registry import FunctionName, name_of

_LEAVING = frozenset("item tolist numpy array bool float int index equal allclose is_nonzero".split())
"""Functions that convert tensor values to Python objects."""
WRITERS = frozenset("copy fill zero setitem masked_fill index_put index_fill set".split())
"""Functions that write to their first argument or a copy of it, which autograd records."""


@dataclass(frozen=True, eq=False)
class ObservedCall:
    """Function call observed by interception.

    Attributes:
        function: Torch function that was called.
        name: Normalized name of the function.
        args: Positional arguments.
        kwargs: Keyword arguments.
        inputs: The arguments that receive relevance, in order.
        slots: Positional arguments, with a :class:`Slot` in place of each input.
        keyword_slots: Keyword arguments except ``out``, with a :class:`Slot` in place of each input.
        path: Path of the module that called the function.
    """

    function: Callable[..., Any]
    name: FunctionName
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Tensor, ...]
    slots: tuple[Any, ...]
    keyword_slots: dict[str, Any]
    path: str

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> ObservedCall:
        """Creates the record of a call from a function and its arguments."""
        inputs: list[Tensor] = []
        slots = tuple(_with_slots(value, inputs) for value in args)
        keyword_slots = {key: _with_slots(value, inputs) for key, value in kwargs.items() if key != "out"}
        name = _as_called(name_of(function), args, kwargs)
        return cls(function, name, args, kwargs, tuple(inputs), slots, keyword_slots, path)

    def run(self) -> Any:
        """Calls the function with the observed arguments."""
        return self.function(*self.args, **self.kwargs)

    def leaves(self, result: Any) -> bool:
        """Returns True if the function returned Python objects, as ``int(x)`` does and ``x.int()`` does not."""
        items = result if isinstance(result, (list, tuple)) else (result,)
        return self.name.base in _LEAVING and not all(isinstance(item, Tensor) for item in items)

    def argument(self, position: int, keyword: str) -> Any:
        """Returns an argument by position or keyword, or None if it is not given."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(keyword)

    @property
    def is_in_place(self) -> bool:
        """True if this variant of the function writes to its first argument."""
        return self.name.in_place or bool(self.kwargs.get("inplace"))

    @property
    def target(self) -> Tensor | None:
        """Tensor that receives the result, or None if the result is a new tensor."""
        target = self.kwargs.get("out", self.args[0] if self.args and self.is_in_place else None)
        return target if isinstance(target, Tensor) else None

    @property
    def overwritten(self) -> Tensor | None:
        """Tensor that the call may overwrite, or None."""
        target = self.args[0] if self.args and self.name.base in WRITERS and "out" not in self.kwargs else self.target
        return target if isinstance(target, Tensor) else None

    @property
    def has_constants(self) -> bool:
        """True if any argument is a number, or a tensor that receives no relevance."""
        values = (*self.args, *self.kwargs.values())
        count = sum(isinstance(value, Tensor) for value in values)
        return len(self.inputs) < count or any(isinstance(value, (int, float)) for value in self.args)

    def out_of_place(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Returns the out-of-place variant of the function and its keyword arguments."""
        if self.keyword_slots.get("inplace"):
            return self.function, {**self.keyword_slots, "inplace": False}
        # This is not a method, since a step that stores a method would form a reference cycle with the tensors of this
        # call.
        return (partial(_on_copy, self.function) if self.name.in_place else self.function), self.keyword_slots


def _on_copy(function: Callable[..., Any], first: Any, *rest: Any, **options: Any) -> Any:
    return function(first.clone() if isinstance(first, Tensor) else first, *rest, **options)


def _with_slots(value: Any, inputs: list[Tensor]) -> Any:
    """Replaces the tensors that receive relevance with slots and appends them to ``inputs``."""
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_floating_point():
            inputs.append(value)
            return Slot(len(inputs) - 1)
        return value
    if type(value) in (list, tuple):
        return type(value)(_with_slots(item, inputs) for item in value)
    return value


def _as_called(name: FunctionName, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FunctionName:
    """Returns the name of a function that is equivalent for these arguments, or ``name`` if there is none.

    For example, ``x.clamp(min=0)`` is equivalent to ReLU, and ``x.max(y)`` to ``maximum``.
    """
    if name.base in ("max", "min"):
        is_pair = isinstance(args[1] if len(args) > 1 else kwargs.get("other"), Tensor)
        return FunctionName(f"{name.base}imum", name.in_place) if is_pair else name
    if name.base not in ("clamp", "clamp_min"):
        return name
    least = args[1] if len(args) > 1 else kwargs.get("min")
    most = args[2] if len(args) > 2 else kwargs.get("max")
    is_relu = most is None and isinstance(least, (int, float)) and least == 0
    return FunctionName("relu", name.in_place) if is_relu else name


def source_line() -> str:
    """Returns the location and text of the line in the user's code that called the function."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and "/nrm_plugin/" not in frame.filename:
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "unknown line"


__all__ = ["WRITERS", "ObservedCall", "source_line"]
