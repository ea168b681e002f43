"""What is known of functions: which have a kernel, which only route, which are made of others.

A function goes by its name without the marks of its spelling: ``torch.add``, ``Tensor.add_``, ``Tensor.__radd__`` and
``operator.iadd`` on tensors are all ``add``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from ..kernels.base import Kernel
from ..kernels.forward_state import Saved
from .gates import Gates
from .rule_lookup import RuleLookup

Handler = Callable[["FunctionCall"], Kernel]
Rewrite = Callable[..., Any]
H = TypeVar("H", bound=Callable[..., Any])

KERNELS: dict[str, Handler] = {}
REWRITES: dict[str, Rewrite] = {}
BY_FUNCTION: dict[Any, Handler] = {}

_ARITHMETIC = frozenset("add sub mul truediv div matmul pow floordiv mod and or xor".split())
_OTHER_NAMES = {
    "subtract": "sub",
    "multiply": "mul",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "rtruediv": "rdiv",
    "radd": "add",
    "rmul": "mul",
    "clip": "clamp",
    "absolute": "abs",
    "negative": "neg",
    "concat": "cat",
    "concatenate": "cat",
    "swish": "silu",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "mm": "matmul",
    "bmm": "matmul",
    "dot": "matmul",
    "mv": "matmul",
    "arctan": "atan",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
    "arcsin": "asin",
    "arccos": "acos",
    "fix": "trunc",
    "sgn": "sign",
    "expit": "sigmoid",
    "psi": "digamma",
    "gammaln": "lgamma",
    "fmax": "maximum",
    "fmin": "minimum",
}
_PREFIXES = ("special_", "linalg_")
"""Of functions in namespaces of torch; what follows is the name."""


@dataclass
class FunctionCall:
    """One call of a function on tensors that carry relevance.

    Attributes:
        name: The function's name, as the registry knows it.
        function: The function.
        path: Path of the module that called it.
        args: Its arguments, with the tensors that carry relevance replaced by their numbers in ``saved``.
        kwargs: Its keyword arguments, likewise.
        saved: The tensors that carry relevance, in order: the inputs of the step.
        gates: Which of them are gates.
        producers: The autograd nodes that made them.
        rules: Looks up the composite's rule of a module.
        sums: How sums share: ``"absolute"`` or ``"signed"``.
        attention: What a product of two tensors hands to attention weights: ``"value"`` for nothing, or ``"halves"``.
    """

    name: str
    function: Callable[..., Any]
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    saved: list[Saved]
    gates: tuple[bool, ...]
    producers: tuple[Any, ...]
    rules: RuleLookup
    sums: str = "absolute"
    attention: str = "value"
    owner: nn.Module | None = None

    @property
    def values(self) -> list[Tensor]:
        """The inputs that carry relevance, detached, as they were when the function ran."""
        return [saved.tensor for saved in self.saved]

    def run(self, *values: Tensor) -> Any:
        """The function on other inputs; constants and options as they were."""
        return self.function(
            *(fill(value, values) for value in self.args), **{k: fill(v, values) for k, v in self.kwargs.items()}
        )

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """One argument by position or keyword."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(keyword, default)


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor that carries relevance among the arguments of a call."""

    number: int


def fill(value: Any, tensors: tuple[Tensor, ...]) -> Any:
    """Arguments with tensors in place of slots."""
    if isinstance(value, Slot):
        return tensors[value.number]
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(fill(item, tensors) for item in value)
    return value


@dataclass
class Name:
    """The name of a function and whether this spelling writes in place."""

    base: str
    in_place: bool = field(default=False)


def name_of(function: Any) -> Name:
    """The name of a function without the marks of its spelling."""
    name = str(getattr(function, "__name__", function)).partition(".")[0]
    in_place = False
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name[:1] == "i" and name[1:] in _ARITHMETIC:
            name, in_place = name[1:], True
    elif name.endswith("_"):
        name, in_place = name.rstrip("_"), True
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return Name(_OTHER_NAMES.get(name, name), in_place)


def kernel(*names: str) -> Callable[[H], H]:
    """Registers the kernel of functions by their names."""

    def decorate(handler: H) -> H:
        KERNELS.update(dict.fromkeys(names, handler))
        return handler

    return decorate


def rewrite(*names: str) -> Callable[[H], H]:
    """Registers what functions are made of: Python code that runs in their place."""

    def decorate(body: H) -> H:
        REWRITES.update(dict.fromkeys(names, body))
        return body

    return decorate


def register_kernel(*functions: Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Gives functions a kernel, or another one than they have.

    The handler is called when relevance first arrives at a call of the function. It gets the
    :class:`FunctionCall` and returns a :class:`~nrm_plugin.kernels.base.Kernel` with one input for each of its values.

    Args:
        functions: Functions as the model calls them, such as ``torch.add`` or a custom operator. All spellings of a
            torch function (method, operator, in place) are meant.

    Raises:
        TypeError: Something is not callable.

    Example:
        >>> @register_kernel(torch.special.entr)
        ... def entropy(call):
        ...     return IdentityKernel()
    """
    for function in functions:
        if not callable(function):
            raise TypeError(f"register_kernel takes functions, got {type(function).__name__}.")

    def decorate(handler: Handler) -> Handler:
        for function in functions:
            BY_FUNCTION[function] = handler
            module = getattr(function, "__module__", None) or ""
            if module.startswith("torch") or type(function).__name__ in (
                "builtin_function_or_method",
                "method_descriptor",
            ):
                KERNELS[name_of(function).base] = handler
        return handler

    return decorate


def handler_of(function: Any, name: Name) -> Handler | None:
    """The handler of a function, if it has one."""
    try:
        found = BY_FUNCTION.get(function)
    except TypeError:
        found = None
    return found or KERNELS.get(name.base)


__all__ = ["FunctionCall", "Gates", "Handler", "Slot", "handler_of", "kernel", "name_of", "register_kernel", "rewrite"]
