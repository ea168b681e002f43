"""What is known of functions by name: the kernels of some, and the decompositions of others into these.

A function is looked up by its name without the marks of its spelling: ``torch.add``, ``Tensor.add_``,
``Tensor.__radd__`` and ``operator.iadd`` on tensors are all ``add``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..kernels.base import Kernel
from .function_call import FunctionCall

KernelFactory = Callable[[FunctionCall], Kernel]
Decomposition = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])

KERNELS: dict[str, KernelFactory] = {}
KERNELS_BY_FUNCTION: dict[Any, KernelFactory] = {}
DECOMPOSITIONS: dict[str, Decomposition] = {}

_ARITHMETIC = frozenset("add sub mul truediv div matmul pow floordiv mod and or xor".split())
_SYNONYMS = {
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
_NAMESPACES = ("special_", "linalg_")
"""Prefixes of functions in namespaces of torch."""
_DIFFERENT = frozenset(["linalg_norm", "linalg_cross", "linalg_vander", "linalg_lu_solve"])
"""Functions that do not take the arguments of the function of that name outside of the namespace."""


@dataclass(frozen=True)
class FunctionName:
    """The name of a function.

    Attributes:
        base: The name without the marks of its spelling.
        in_place: Whether this spelling writes to its first argument.
    """

    base: str
    in_place: bool = False


def name_of(function: Any) -> FunctionName:
    """The name of a function without the marks of its spelling."""
    name = str(getattr(function, "__name__", function)).partition(".")[0]
    in_place = False
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name[:1] == "i" and name[1:] in _ARITHMETIC:
            name, in_place = name[1:], True
    elif name.endswith("_"):
        name, in_place = name.rstrip("_"), True
    for prefix in _NAMESPACES:
        name = name if name in _DIFFERENT else name.removeprefix(prefix)
    return FunctionName(_SYNONYMS.get(name, name), in_place)


def kernel_of(*names: str) -> Callable[[Function], Function]:
    """Registers the kernel of functions by their names."""
    return _registering(KERNELS, names)


def decomposition_of(*names: str) -> Callable[[Function], Function]:
    """Registers Python code that replaces functions and consists of operations with kernels."""
    return _registering(DECOMPOSITIONS, names)


def _registering(table: dict[str, Any], names: tuple[str, ...]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        assert not table.keys() & set(names), "the later of two modules that are imported would win"
        table.update(dict.fromkeys(names, function))
        return function

    return decorate


def register_kernel(*functions: Callable[..., Any]) -> Callable[[KernelFactory], KernelFactory]:
    """Gives functions a kernel, or replaces the one that they have.

    The decorated function is called when relevance first arrives at a call of one of the functions. It receives the
    :class:`~nrm_plugin.functional.FunctionCall` and returns a kernel with one input for each of ``call.values``, the
    tensors that carry relevance. Four methods of the call return the kernels that most functions need:

    - ``call.identity()``: relevance passes to the first input, elementwise,
    - ``call.split(shares)``: each input receives its share, elementwise,
    - ``call.route()``: relevance passes to the entries that the function copied,
    - ``call.by_rule(rule)``: a Zennit rule, for functions that are linear in their input.

    For any other linear map, return a subclass of :class:`nrm_plugin.functional.Kernel`.

    Args:
        functions: Functions as the model calls them, such as ``torch.add`` or a custom operator. For a function of
            torch the kernel is that of all its spellings (method, operator, in place).

    Raises:
        TypeError: An argument is not callable.

    Example:
        >>> @register_kernel(torch.special.entr)
        ... def entropy(call):
        ...     return call.identity()
    """
    for function in functions:
        if not callable(function):
            raise TypeError(f"register_kernel takes functions, got {type(function).__name__}.")

    def decorate(factory: KernelFactory) -> KernelFactory:
        for function in functions:
            KERNELS_BY_FUNCTION[function] = factory
            if _is_of_torch(function):
                KERNELS[name_of(function).base] = factory
        return factory

    return decorate


def _is_of_torch(function: Any) -> bool:
    """Whether a function is known by name: its other spellings are other objects."""
    module = getattr(function, "__module__", None) or ""
    return module.startswith("torch") or type(function).__name__ in ("builtin_function_or_method", "method_descriptor")


def kernel_factory_of(function: Any, name: FunctionName) -> KernelFactory | None:
    """What makes the kernel of a function; None for a function without a kernel."""
    try:
        factory = KERNELS_BY_FUNCTION.get(function)
    except TypeError:  # not hashable
        factory = None
    return factory or KERNELS.get(name.base)


__all__ = [
    "DECOMPOSITIONS",
    "KERNELS",
    "KERNELS_BY_FUNCTION",
    "FunctionName",
    "KernelFactory",
    "decomposition_of",
    "kernel_factory_of",
    "kernel_of",
    "name_of",
    "register_kernel",
]
