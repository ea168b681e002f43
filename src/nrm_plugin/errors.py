"""Exceptions and warnings.

Messages name the argument or layer, the given value, the cause of the error, and a remedy.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from types import ModuleType


class NRMError(Exception):
    """Base class of all exceptions of this package."""


class InputError(NRMError, ValueError):
    """Raised if inputs are empty, contain NaN or infinity, or have an unsupported type, dtype or device."""


class DifferenceError(InputError):
    """Raised if a reference does not match the inputs or if the model executes different operations on the two."""


class TargetError(NRMError, ValueError):
    """Raised if a target or start vector does not match the output of the model."""


class GradModeError(NRMError, RuntimeError):
    """Raised if a measure is constructed under ``torch.no_grad`` or ``torch.inference_mode``."""


class ModelStateError(NRMError, RuntimeError):
    """Raised if the model cannot be recorded, for example in training mode or with hooks of another composite."""


class UnknownLayerError(NRMError, KeyError):
    """Raised if no recorded tap (hook point) has the given name."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would escape line breaks in the message.
        return str(self.args[0]) if self.args else ""


class HookedContainerError(UnknownLayerError):
    """Raised if a tap lies inside a container that has a rule of its own and is therefore recorded as one step."""


class EventError(NRMError, ValueError):
    """Raised if an event does not fit its tap, for example if an index is out of range or a mask has another shape."""


class NullEventError(NRMError, ZeroDivisionError):
    """Raised if no walk with nonzero mass belongs to the conditioning event. The conditional is then undefined."""


class CancellationError(NRMError, ZeroDivisionError):
    """Raised if the positive and negative mass of the conditioning event nearly cancel."""


class NonFiniteError(NRMError, ArithmeticError):
    """Raised if relevance is NaN or infinite, due to such values in the model or to overflow."""


class StaleMeasureError(NRMError, RuntimeError):
    """Raised if a parameter was modified in place after the measure was constructed."""


class UnsupportedRuleError(NRMError, TypeError):
    """Raised if a rule cannot be expressed as a linear kernel."""


class NonlinearRuleError(UnsupportedRuleError):
    """Raised if a rule is not linear in the propagated relevance (deconvnet, guided backpropagation)."""


class UnsupportedOperationError(NRMError, TypeError):
    """Raised if relevance reaches an operation for which no kernel is registered."""


class UncoveredLayerError(UnsupportedOperationError):
    """Raised if a layer that is not a 0/1 route has no rule in the composite."""


class StorageError(NRMError, TypeError):
    """Raised if a measure is copied or pickled. Store the results of its queries instead."""


class FoldingError(NRMError, ValueError):
    """Raised if the elements of a tensor cannot be assigned to samples, for example if the model mixes samples."""


class MissingExtraError(NRMError, ImportError):
    """Raised if a feature requires an optional dependency that is not installed."""


class BatchNormWarning(UserWarning):
    """Issued if the bias of a layer fused with batch normalization absorbs most of the relevance."""


class PrecisionWarning(UserWarning):
    """Issued if the explained difference is barely larger than the rounding error of the outputs."""


class RandomnessWarning(UserWarning):
    """Issued if the model draws random numbers in evaluation mode. The measure then describes a single draw."""


class MemoryBudgetWarning(UserWarning):
    """Issued if a query runs out of memory and continues in smaller chunks."""


MEMORY = re.compile("out of ?memory|not enough memory|allocate memory|DefaultCPUAllocator", re.IGNORECASE)
"""Pattern that matches the type and message of torch's out-of-memory errors. Running out of CPU memory raises a plain
RuntimeError."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Returns True if an error or one of its causes is an out-of-memory error."""
    if error is None:
        return False
    is_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    is_of_torch = isinstance(error, RuntimeError) and MEMORY.search(f"{type(error).__name__}: {error}") is not None
    return is_memory or is_of_torch or is_out_of_memory(error.__cause__)


LIBRARIES = ("nrm_plugin", "torch", "zennit", "captum")
"""Packages whose stack frames are skipped when a warning is attributed to a line of user code."""


def warn(message: str, category: type[Warning]) -> None:
    """Issues a warning attributed to the innermost caller outside :data:`LIBRARIES`."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def unknown_layer(name: str, known: Iterable[str]) -> str:
    """Returns the error message for an unknown tap name, with suggestions of similar names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    listing = ", ".join(repr(item) for item in (near or names[:8]))
    return (
        f"no tap named {brief(name)} in this measure. "
        f"{'Similar names' if near else 'Some of its taps'}: {listing}. "
        "`measure.layers` lists all of them; modules that the forward pass never called have no tap."
    )


def samples(flags: Sequence[bool]) -> str:
    """Formats the indices of the flagged samples, such as ``samples 0, 3``."""
    indices = [str(index) for index, flag in enumerate(flags) if flag]
    more = ", …" if len(indices) > 10 else ""
    return f"sample{'s' if len(indices) != 1 else ''} {', '.join(indices[:10])}{more}"


SHOWN = 8
"""Maximum number of elements of a collection shown in a message."""


def brief(value: object, length: int = 120) -> str:
    """Formats a value for an error message, abbreviating long values.

    Tensors and modules are represented by their class. Tensors are also represented by their shape and dtype.

    Args:
        value: Any value given by the user.
        length: Maximum length in characters; collections may be twice as long.
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}>"
    if hasattr(value, "named_modules"):
        return f"<{type(value).__name__}>"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return _brief_entries(value, length)
    text = " ".join(repr(value).split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def printable(text: object) -> str:
    """Escapes the characters that XML and figures cannot contain: control characters, line breaks and surrogates."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def _brief_entries(values: Collection[object], length: int) -> str:
    first, entry = list(islice(values, SHOWN)), max(16, length // 2)
    if isinstance(values, dict):
        shown = [f"{brief(key, entry)}: {brief(values[key], entry)}" for key in first]
    else:
        shown = [brief(item, entry) for item in first]
    text = ", ".join(shown)
    rest = len(values) - len(first)
    opening, closing = (
        ("[", "]") if isinstance(values, list) else ("(", ")") if isinstance(values, tuple) else ("{", "}")
    )
    text = text if len(text) <= 2 * length else f"{text[: 2 * length - 1]}…"
    comma = "," if isinstance(values, tuple) and len(values) == 1 else ""
    return f"{opening}{text}{comma}{f', … {rest} more' if rest > 0 else ''}{closing}"


def autocast_outside(name: str, kind: str) -> str:
    """Returns the error message for a layer called under ``torch.autocast`` inside a composite's context."""
    return (
        f"layer {name!r} ({kind}) runs under torch.autocast, which would propagate relevance in half precision, too "
        "imprecise for its sums. Call the model outside of torch.autocast, or construct a RelevanceMeasure inside "
        "it, which runs the layers in half precision but propagates relevance in float32."
    )


def derivative_inside(path: str = "") -> str:
    """Returns the error message for a model that calls autograd in its forward pass, for example to compute forces."""
    where = f" in {path!r}" if path else ""
    return (
        f"the model computes a derivative in its forward pass{where}, with torch.autograd or backward(). There, "
        "autograd propagates relevance instead of gradients, so the derivative would be wrong. Measure the model "
        "without it, such as an energy without forces; or compute it in a separate module, and assign a rule to this "
        "module in the composite's layer_map."
    )


def extra(module: str, name: str) -> ModuleType:
    """Imports a module that is provided by an optional dependency.

    Args:
        module: Full name of the module.
        name: The extra of this package that installs the dependency.

    Raises:
        MissingExtraError: If the dependency is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"this needs {module.partition('.')[0]}: pip install 'nrm-plugin[{name}]'.") from error
