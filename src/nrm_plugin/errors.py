"""Exception types. Each message says what was asked, what was found, why it is wrong and what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType


class NRMError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(NRMError, ValueError):
    """Inputs that no measure can be taken of: empty, non-finite, of a wrong type, dtype or device."""


class TargetError(NRMError, ValueError):
    """A target or start vector that does not fit the output of the model."""


class GradModeError(NRMError, RuntimeError):
    """A measure was asked for under ``torch.no_grad`` or ``torch.inference_mode``."""


class ModelStateError(NRMError, RuntimeError):
    """The model cannot be recorded in its present state (training mode, hooks of another composite)."""


class UnknownLayerError(NRMError, KeyError):
    """No tap of that name."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would escape the line breaks of the message.
        return str(self.args[0]) if self.args else ""


class HookedContainerError(UnknownLayerError):
    """The tap lies inside a module that a rule treats as one step."""


class EventError(NRMError, ValueError):
    """An event that does not fit the tap it speaks of: index out of range, mask of a wrong shape."""


class NullEventError(NRMError, ZeroDivisionError):
    """Conditioning on an event that no walk with a mass satisfies."""


class CancellationError(NRMError, ZeroDivisionError):
    """Conditioning on an event whose positive and negative walks cancel."""


class StaleMeasureError(NRMError, RuntimeError):
    """A parameter was changed in place after the measure had been taken."""


class UnsupportedRuleError(NRMError, TypeError):
    """A rule that cannot be read as a linear kernel on the module it was given to."""


class NonlinearRuleError(UnsupportedRuleError):
    """A rule that is not linear in the relevance it hands down (deconvnet, guided backpropagation)."""


class UnsupportedOperationError(NRMError, TypeError):
    """Relevance arrived at an operation that has no kernel."""


class UncoveredLayerError(UnsupportedOperationError):
    """The composite gives no rule to a layer that is no 0/1 route."""


class FoldingError(NRMError, ValueError):
    """The first dimension of a tap is not the batch, so its entries cannot be told apart by sample."""


class MissingExtraError(NRMError, ImportError):
    """An optional dependency is needed and not installed."""


class BatchNormWarning(UserWarning):
    """A dense layer and a batch normalization were fused, and the bias takes most of the relevance."""


class MemoryBudgetWarning(UserWarning):
    """Memory ran out on the way, and less was done at once."""


def unknown_layer(name: str, known: Iterable[str]) -> str:
    """Message for a layer name that no tap has; near names first."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    listing = ", ".join(repr(item) for item in (near or names[:8]))
    return (
        f"there is no tap named {name!r} in this measure. "
        f"{'Near names' if near else 'Some of its taps'}: {listing}. "
        "`measure.layers` lists all of them; a module that the forward pass never called has no tap."
    )


def samples(flags: Sequence[bool]) -> str:
    """The indices of the samples for which a flag is set, as text."""
    found = [index for index, flag in enumerate(flags) if flag]
    shown = ", ".join(map(str, found[:10])) + (", …" if len(found) > 10 else "")
    return f"sample{'s' if len(found) != 1 else ''} {shown}"


def shortened_outside(name: str, kind: str) -> str:
    """Message for a layer that torch.autocast would run, where the books could not be kept in float32."""
    return (
        f"layer {name!r} ({kind}) runs under torch.autocast, which would hand relevance from layer to layer in half "
        "precision, where its sums lose their digits. Leave torch.autocast around the model, or take a "
        "RelevanceMeasure inside of it: that runs the layers in the short format and keeps the books in float32."
    )


def extra(module: str, name: str) -> ModuleType:
    """An optional dependency.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"this needs {module.partition('.')[0]}: pip install 'nrm-plugin[{name}]'.") from error
