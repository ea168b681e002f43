"""Complex tensors of a forward pass, represented as functions of the real tensors from which they are computed.

Complex tensors are not taps (hook points): all functions between their real sources and the next real tensor form a
single step, whose kernel is derived by evaluating the expression at other real tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import UnsupportedOperationError
from ..kernels.forward_state import Saved
from ..model.nested_tensors import tensors_in
from .observed_call import ObservedCall


@dataclass(frozen=True, eq=False)
class RealSource:
    """Real tensor from which complex tensors are computed.

    Attributes:
        tensor: The tensor, with its autograd graph.
        saved: The values of the tensor.
        version: The version counter at which the values were saved.
    """

    tensor: Tensor
    saved: Saved
    version: int

    @property
    def is_overwritten(self) -> bool:
        """True if the tensor was modified in place. Its autograd graph then belongs to later values."""
        return self.tensor._version != self.version


@dataclass(frozen=True, eq=False)
class Expression:
    """Complex tensor, expressed as a function of the real tensors from which it was computed.

    Attributes:
        name: Name of the first function that returned a complex tensor.
        function: Torch function that was called.
        args: Positional arguments, with sources and expressions in place of tensors that depend on the model inputs.
        kwargs: Keyword arguments, in the same form.
        sources: Distinct real sources of all arguments.
        item: Index of the result among several outputs, or None for a single output.
        writes: Whether the function writes to its first argument and returns it.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: tuple[RealSource, ...]
    item: int | None = None
    writes: bool = False

    def on(self, values: Sequence[Tensor]) -> Any:
        """Evaluates the expression with other values for its sources."""
        return self._value(dict(zip(map(id, self.sources), values, strict=True)))

    def _value(self, known: dict[int, Any]) -> Any:
        if id(self) not in known:
            args = _filled(self.args, known)
            if self.writes:
                args = (args[0].clone(), *args[1:])
            result = self.function(*args, **{key: _filled(value, known) for key, value in self.kwargs.items()})
            result = args[0] if self.writes else result
            known[id(self)] = result if self.item is None else result[self.item]
        return known[id(self)]


@dataclass
class ComplexTensors:
    """The complex tensors of a forward pass, each as a function of the real tensors from which it was computed."""

    _expressions: dict[Any, Expression] = field(default_factory=dict)  # by autograd node
    _sources: dict[int, RealSource] = field(default_factory=dict)  # by identity of the tensor

    def are_among(self, arguments: Iterable[Any]) -> bool:
        """Returns True if any of the arguments is a complex tensor of this pass."""
        return any(self._expression_of(tensor) is not None for tensor in tensors_in(tuple(arguments)))

    def expression(self, call: ObservedCall) -> Expression:
        """Returns the expression of a call's result, before the call runs."""
        written = call.overwritten
        args = tuple(self._template(value) for value in call.args)
        if written is not None and args[0] is written:  # a constant before this call
            args = (written.detach().clone(), *args[1:])
        kwargs = {key: self._template(value) for key, value in call.kwargs.items()}
        parts = list(_parts_in((args, tuple(kwargs.values()))))
        sources: dict[int, RealSource] = {}
        for part in parts:
            sources.update({id(one): one for one in (part.sources if isinstance(part, Expression) else (part,))})
        name = next((part.name for part in parts if isinstance(part, Expression)), call.name.base)
        writes = written is not None
        return Expression(name, call.function, args, kwargs, tuple(sources.values()), writes=writes)

    def remember(self, tensor: Tensor, expression: Expression) -> Tensor:
        """Stores the expression of a tensor if the tensor is complex. Returns the tensor."""
        if tensor.is_complex() and tensor.grad_fn is not None:
            self._expressions[tensor.grad_fn] = expression
        return tensor

    def _expression_of(self, tensor: Tensor) -> Expression | None:
        return self._expressions.get(tensor.grad_fn) if tensor.is_complex() and tensor.grad_fn is not None else None

    def _template(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.requires_grad and value.is_floating_point():
                return self._source_of(value)
            expression = self._expression_of(value)
            if expression is None and value.is_complex() and value.requires_grad:
                raise UnsupportedOperationError(
                    "a complex tensor was written to through a view of a part of it, as in z[0] += y, which has no "
                    "kernel. Write z[0] = z[0] + y."
                )
            return expression or value
        return type(value)([self._template(item) for item in value]) if type(value) in (list, tuple) else value

    def _source_of(self, tensor: Tensor) -> RealSource:
        source = self._sources.get(id(tensor))
        if source is None or source.is_overwritten:
            source = self._sources[id(tensor)] = RealSource(tensor, Saved(tensor), tensor._version)
        return source


def _filled(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, RealSource):
        return known[id(value)]
    if isinstance(value, Expression):
        return value._value(known)
    return type(value)([_filled(item, known) for item in value]) if type(value) in (list, tuple) else value


def _parts_in(values: Iterable[Any]) -> Iterator[Expression | RealSource]:
    for value in values:
        if isinstance(value, (Expression, RealSource)):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _parts_in(value)


def map_items(output: Any, change: Callable[[Any], Any]) -> Any:
    """Applies a function to the result of a call, or to each item of a tuple or list."""
    return type(output)([change(item) for item in output]) if isinstance(output, (list, tuple)) else change(output)


__all__ = ["ComplexTensors", "Expression", "RealSource", "map_items"]
