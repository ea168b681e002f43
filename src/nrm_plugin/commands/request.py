"""Requests (target, layers, conditions, rules and device) and their validation against a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..composites import Normalized, normalize
from ..errors import HookedContainerError, NRMError, TargetError, UncoveredLayerError, is_out_of_memory
from ..kernels.normalization import Residual
from ..measure.measure import RelevanceMeasure
from ..model.contrast import REST
from ..plan.reuse import measures_of
from .composite_names import composite_of
from .event_syntax import Condition
from .image_references import reference_image
from .model_loading import LoadedModel
from .options import CHANNELS

MOST_CLASSES = 2**31
"""Upper bound on class indices. They are stored in 32 bits."""
SECANTS = "secants"
"""Name that selects secant slopes between an image and its reference instead of a composite."""
NONE = "none"
"""Value of ``against`` that explains the output of a class without a contrast."""
Against = int | str | None
"""Contrast of the explained class: another class, :data:`~nrm_plugin.model.contrast.REST`, or None."""
INDEX = re.compile(r"\s*[+-]?[0-9]{1,4000}\s*")
"""Pattern of class indices, as opposed to class names."""


class RequestError(NRMError, ValueError):
    """Raised if a request does not match the model, regardless of the image."""


@dataclass(frozen=True)
class Request:
    """Computation settings shared by all images.

    Attributes:
        target: Index or name of the explained class, or None for the predicted class.
        against: Index or name of the class that serves as a contrast, ``"rest"`` or ``"none"``. None selects ``"rest"``
            if there are several classes.
        layers: Layers whose channels are listed.
        given: Conditions, each with its own heat map.
        composite: Name of the composite in Zennit's registry, or :data:`SECANTS`.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.
        device: Device to compute on.
        channels: Number of channels per layer for which heat maps are drawn.
        reference: Name or file of the reference image, or None if there is none.
        map: Heat maps to plot, such as :data:`~nrm_plugin.commands.options.BOTH`, or None for commands without
            ``--map``.
        layers_reference: Reference image used only for the map of late layers, or None.
        finds_background: Whether to use the plain background of an image, if it has one, as its reference.
    """

    target: str | None = None
    against: str | None = None
    layers: tuple[str, ...] = ()
    given: tuple[Condition, ...] = ()
    composite: str = "nrm_default"
    residual: Residual = "redistribute"
    gain_limit: float | None = 2.0
    device: str = "cpu"
    channels: int = CHANNELS
    reference: str | None = None
    map: str | None = None
    layers_reference: str | None = None
    finds_background: bool = False


def check_device(name: str) -> torch.device:
    """Returns the device with the given name. Checks that it is usable.

    Raises:
        RequestError: If the device is not available.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        available = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        available += ["mps"] if torch.backends.mps.is_available() else []
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise RequestError(f"--device {name} cannot be used: {reason}. Available: {', '.join(available)}.") from error
    return device


# -- target ---------------------------------------------------------------------------------------------------------


def explained_class(loaded: LoadedModel, requested: str | None, outputs: Tensor) -> int:
    """Returns the index of the explained class for one image.

    Args:
        loaded: The loaded model, with its preprocessing.
        requested: Index or name of the class, or None for the predicted class.
        outputs: Outputs of the model, of shape ``(1, K)``, or ``(1,)`` for a single class.

    Raises:
        RequestError: If the model is not a classifier or if the class is unknown.
    """
    if outputs.ndim > 2 or outputs.numel() == 0:
        raise RequestError(
            f"the output of {loaded.name} has shape {tuple(outputs.shape)}, but a classifier is needed, "
            "with one output for each class. Wrap the model in a module that reduces its output to these."
        )
    check_class_names(loaded, outputs.numel())
    return int(outputs.argmax()) if requested is None else target_of(requested, loaded.categories, outputs.numel())


def compared_with(loaded: LoadedModel, request: Request, outputs: Tensor) -> Against:
    """Returns the contrast of the explained class for one image.

    Args:
        loaded: The loaded model, with its preprocessing.
        request: The request, including the requested contrast.
        outputs: Outputs of the model, of shape ``(1, K)``, or ``(1,)`` for a single class.

    Raises:
        RequestError: If the contrast is unknown or is the explained class itself.
    """
    count = outputs.numel()
    if request.against == NONE or (request.against is None and count == 1):
        return None
    if request.against in (None, REST):
        return REST
    assert request.against is not None
    index = target_of(request.against, loaded.categories, count, "--against")
    if index == explained_class(loaded, request.target, outputs):
        raise RequestError(
            f"--against {request.against}: this is the explained class. Give another class, rest or none, or another "
            "--target."
        )
    return index


def check_class_names(loaded: LoadedModel, count: int) -> None:
    """Raises :class:`RequestError` if class names are known but there are not as many as outputs."""
    if len(loaded.categories) not in (0, count):
        raise RequestError(
            f"there are {len(loaded.categories)} class names, but {loaded.name} has {count} outputs. --classes takes a "
            "file with one name on each line, in the order of the outputs."
        )


def output_count(loaded: LoadedModel, inputs: Any = None) -> int | None:
    """Returns the number of outputs, or None if the model fails on the inputs or is not a classifier.

    Args:
        loaded: The loaded model, with its preprocessing.
        inputs: Inputs of one sample. Defaults to a black image.
    """
    parameter = next(loaded.model.parameters(), torch.empty(0))
    size = loaded.preprocessing.size
    black = parameter.new_zeros(1, len(loaded.preprocessing.mean), size, size)
    try:
        with torch.no_grad():
            outputs = loaded.model(black if inputs is None else inputs.to(parameter))
        return int(outputs.shape[1]) if outputs.ndim == 2 else None
    except Exception:  # any error that the model raises for such inputs is reported by the sweep itself
        return None


def target_of(requested: str, categories: Sequence[str], count: int | None, option: str = "--target") -> int:
    """Converts the index or name of a class to its index.

    Args:
        requested: Index or case-insensitive name.
        categories: Class names, or empty if unknown.
        count: Number of classes, or None if unknown.
        option: Name of the command-line option, for error messages.

    Raises:
        RequestError: If the class is unknown or its name ambiguous. The message lists similar names.
    """
    indices = "" if count is None else f", 0 to {count - 1}"
    if INDEX.fullmatch(requested):
        index = int(requested)
        if not 0 <= index < (MOST_CLASSES if count is None else count):
            raise RequestError(
                f"{option} {index} is out of range: the indices of classes start at 0."
                if count is None
                else f"{option} {index} is out of range: the model has {count} classes{indices}."
            )
        return index
    if not categories:
        raise RequestError(
            f"{option} {requested!r} is a name, but the class names of these weights are not known. Give the "
            f"index{indices}, or a file with the names, one on each line: --classes FILE."
        )
    folded = [name.casefold() for name in categories]
    key = " ".join(requested.casefold().split())
    matches = [index for index, name in enumerate(folded) if name == key]
    if len(matches) > 1:
        raise RequestError(f"{option} {requested!r} is the name of {len(matches)} classes. Give the index: {matches}.")
    if matches and count is not None and matches[0] >= count:
        raise RequestError(f"{option} {requested!r} is class {matches[0]}, but the model has only {count} classes.")
    if matches:
        return matches[0]
    near = _similar_classes(key, folded, categories)
    hint = f"Similar names: {near}." if near else f"Give the name as the model has it, or the index{indices}."
    raise RequestError(f"no class named {requested!r}. {hint}")


def _similar_classes(key: str, folded: list[str], categories: Sequence[str]) -> str:
    containing = [name for name in folded if key and key in name]
    near = list(dict.fromkeys([*containing[:5], *difflib.get_close_matches(key, folded, n=5, cutoff=0.6)]))[:5]
    return ", ".join(f"{categories[folded.index(name)]} ({folded.index(name)})" for name in near)


# -- model ----------------------------------------------------------------------------------------------------------


class failures_of_the_model:  # noqa: N801  (a context manager)
    """Context manager that converts exceptions raised by the model to a one-line :class:`RequestError`."""

    def __init__(self, loaded: LoadedModel, inputs: Tensor) -> None:
        self._name, self._shape = loaded.name, tuple(inputs.shape)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, NRMError) and not is_out_of_memory(error):
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            shape = "×".join(map(str, self._shape))
            raise RequestError(
                f"{self._name} fails on an input of shape {shape} ({reason[:300]}). If the model needs another input, "
                "see --size, --mean and --std."
            ) from error


def measure_of(
    loaded: LoadedModel,
    inputs: Tensor,
    request: Request,
    references: Callable[[Tensor], list[Tensor]] | None = None,
    composite: Normalized | None = None,
) -> RelevanceMeasure:
    """Returns the measure for one preprocessed image.

    Args:
        loaded: The loaded model, with its preprocessing.
        inputs: The preprocessed image.
        request: Settings of the computation.
        references: Function that returns several references, given the reference image of the request.
        composite: Rules to use instead of those of the request.

    Raises:
        RequestError: If the target does not match the model, the model fails, or the composite has no rule for a layer.
    """

    def target(outputs: Tensor) -> int | None:
        index = explained_class(loaded, request.target, outputs)
        return index if outputs.ndim == 2 else None

    def against(outputs: Tensor) -> int | str:
        compared = compared_with(loaded, request, outputs)
        assert compared is not None
        return compared

    is_alone = request.against == NONE or (request.against is None and not _has_classes(loaded, inputs))
    rules = composite or _rules(loaded, inputs, request)
    try:
        with failures_of_the_model(loaded, inputs):
            compared = None if is_alone else against
            if request.reference is not None:
                image = reference_image(loaded, inputs, request.reference)
                return RelevanceMeasure(
                    loaded.model, inputs, target, against=compared, composite=rules,
                    reference=image if references is None else references(image),
                )  # fmt: skip
            return measures_of(rules)(loaded.model, inputs, target, against=compared, composite=rules)
    except TargetError as error:
        remedy = "" if is_alone else " In a command: --against none explains the output of the class alone."
        raise TargetError(f"{error}{remedy}") from error
    except UncoveredLayerError as error:
        layer = str(error).partition(" has no rule")[0]
        raise RequestError(
            f"--composite {request.composite} has no rule for {layer}, whose gradient alone does not conserve "
            "relevance. Choose another composite, such as nrm_default or epsilon_plus_flat."
        ) from error


def _has_classes(loaded: LoadedModel, inputs: Tensor) -> bool:
    """Returns True if there are several classes. The model is run only if the class names are unknown."""
    count = len(loaded.categories) or output_count(loaded, inputs) or 1
    return count > 1


def _rules(loaded: LoadedModel, inputs: Tensor, request: Request) -> Normalized | None:
    """Returns the composite of a request, or None for secant slopes to a reference.

    Composites are cached. Measures of different images share a plan only if they use the same composite object.
    """
    if request.composite == SECANTS:
        return None
    key = (request.composite, request.residual, request.gain_limit, inputs.device)
    if key not in loaded.rules:
        composite = composite_of(request.composite, loaded.preprocessing.bounds(inputs))
        loaded.rules[key] = normalize(composite, request.residual, request.gain_limit, None)
    return loaded.rules[key]


def check_layers(mu: RelevanceMeasure, loaded: LoadedModel, names: Sequence[str]) -> None:
    """Raises :class:`RequestError` with similar names if the model lacks one of the named layers."""
    for name in names:
        calls = [layer for layer in mu.layers if layer.startswith(f"{name}:")]
        if name in mu.layers:
            continue
        if len(calls) > 1:
            raise RequestError(f"{name} is called {len(calls)} times. Give one of the calls: {', '.join(calls)}.")
        try:
            mu.shape(name)
        except HookedContainerError as error:
            raise RequestError(str(error)) from error
        except NRMError as error:
            if name in mu._recording.taps.fused:
                raise RequestError(f"{error} Or explain the output of the class alone: --against none.") from error
            # A block that returns the output of its last layer is listed among the taps by the name of that layer.
            modules = [module for module, _ in loaded.model.named_modules() if module]
            near = difflib.get_close_matches(name, dict.fromkeys([*mu.layers, *modules]), n=5, cutoff=0.4)
            hint = f"Similar names: {', '.join(near)}. " if near else ""
            raise RequestError(
                f"{loaded.name} has no layer {name!r}. {hint}To list them: nrm-plugin layers --model {loaded.name}"
            ) from None
