"""Registry of kernels, and of decompositions into functions that have kernels, keyed by function name.

All variants of a function share one name: ``torch.add``, ``Tensor.add_``, ``Tensor.__radd__`` and ``operator.iadd`` on
tensors are all ``add``.
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
"""Prefixes of the names of functions in torch's namespaces."""
_OPERATORS = ("aten", "prim", "prims", "torchvision")
"""Namespaces whose operators are looked up by name."""
_DIFFERENT = frozenset(["linalg_norm", "linalg_cross", "linalg_vander", "linalg_lu_solve"])
"""Functions whose signature differs from the function without the prefix."""


@dataclass(frozen=True)
class FunctionName:
    """Normalized name of a function.

    Attributes:
        base: Name shared by all variants of the function.
        in_place: Whether this variant writes to its first argument.
    """

    base: str
    in_place: bool = False


def name_of(function: Any) -> FunctionName:
    """Returns the normalized name of a function, such as ``add`` for ``Tensor.__iadd__``."""
    name = str(getattr(function, "__name__", function)).partition(".")[0]
    in_place = False
    if (owner := _foreign_owner(function)) is not None:
        return FunctionName(f"{owner}.{name}")
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name[:1] == "i" and name[1:] in _ARITHMETIC:
            name, in_place = name[1:], True
    elif name.endswith("_"):
        name, in_place = name.rstrip("_"), True
    for prefix in _NAMESPACES:
        name = name if name in _DIFFERENT else name.removeprefix(prefix)
    return FunctionName(_SYNONYMS.get(name, name), in_place)


def _foreign_owner(function: Any) -> str | None:
    """Returns the namespace of a function that is not part of torch, or None for torch's own functions."""
    owner = str(getattr(function, "__module__", None) or "torch")
    if owner.startswith("torch._ops."):  # custom operators; torch's operators are in aten
        space = owner.removeprefix("torch._ops.")
        return None if space in _OPERATORS else space
    return None if owner.partition(".")[0] in ("torch", "nrm_plugin", "_operator") else owner


def kernel_of(*names: str) -> Callable[[Function], Function]:
    """Decorator that registers a kernel factory for the functions with the given names."""
    return _registering(KERNELS, names)


def decomposition_of(*names: str) -> Callable[[Function], Function]:
    """Decorator that registers a decomposition of the functions with the given names into functions with kernels."""
    return _registering(DECOMPOSITIONS, names)


def _registering(table: dict[str, Any], names: tuple[str, ...]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        assert not table.keys() & set(names), "the module that is imported later would win"
        table.update(dict.fromkeys(names, function))
        return function

    return decorate


def register_kernel(*functions: Callable[..., Any]) -> Callable[[KernelFactory], KernelFactory]:
    """Decorator that registers the kernel of one or more functions, replacing any existing one.

    The decorated function is called when relevance first reaches a call of one of the functions. It receives the
    :class:`~nrm_plugin.functional.FunctionCall` and returns a kernel with one input for each of ``call.values``, the
    tensors that receive relevance. Four methods of the call return the kernels that most functions need:

    - ``call.identity()``: relevance passes to the first input, elementwise,
    - ``call.split(shares)``: each input receives a given fraction, elementwise,
    - ``call.route()``: relevance passes to the elements that the function copied,
    - ``call.by_rule(rule)``: a Zennit rule is applied, for functions that are linear in their input.

    For any other linear map, return a subclass of :class:`nrm_plugin.functional.Kernel`.

    Args:
        functions: Functions as called by the model, such as ``torch.add`` or a custom operator. For a torch function,
            the kernel applies to all of its variants (method, operator, in place).

    Raises:
        TypeError: If an argument is not callable.

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
    """Returns True if a function is part of torch. Such functions are looked up by the name that all variants share."""
    module = getattr(function, "__module__", None) or ""
    return module.partition(".")[0] in ("torch", "torchvision") or type(function).__name__ in (
        "builtin_function_or_method",
        "method_descriptor",
    )


def kernel_factory_of(function: Any, name: FunctionName) -> KernelFactory | None:
    """Returns the factory of a function's kernel, or None if the function has no kernel."""
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
