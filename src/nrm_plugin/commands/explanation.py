"""Explanation of one image. Nothing is printed or written here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..dataset.images import LoadedImage
from ..errors import CancellationError, NRMError, NullEventError
from ..events.event import at
from ..measure.layer_averages import late_layers, layer_average
from ..measure.measure import RelevanceMeasure
from ..measure.pixel_maps import covered, focused_pixels, is_fine_grained, light_gamma
from ..plots.flow_thumbnails import Photo
from .event_syntax import Condition
from .image_references import ground_name
from .model_loading import LoadedModel
from .options import BOTH, OF_LAYERS
from .photos import photo
from .request import (
    NONE,
    SECANTS,
    Against,
    Request,
    RequestError,
    check_layers,
    compared_with,
    explained_class,
    measure_of,
)


@dataclass(frozen=True)
class Totals:
    """Relevance totals at one tap. Mass, sink and bypass sum to 1, or to -1 if a negative difference is explained.

    Attributes:
        mass: Mass of the walks that cross the tap.
        sink: Mass absorbed above the tap.
        bypass: Mass of the walks that bypass the tap.
        variation: Tap variation, at least 1.
    """

    mass: float
    sink: float
    bypass: float
    variation: float


@dataclass(frozen=True)
class LayerExplanation:
    """Explanation of one layer.

    Attributes:
        name: Name of the layer.
        relevance: Relevance of each neuron, without the batch dimension.
        mass: Mass (total relevance) of each channel, of shape ``(C,)``.
        totals: Relevance totals at the layer.
        top: Channels with the largest absolute mass.
        heat_maps: Joint relevance of each of these channels with the pixels, of shape ``(len(top), H, W)``.
    """

    name: str
    relevance: Tensor
    mass: Tensor
    totals: Totals
    top: list[int]
    heat_maps: Tensor


@dataclass(frozen=True)
class ConditionalExplanation:
    """Explanation conditional on an event.

    Attributes:
        condition: The condition (text and event).
        mass: Mass of the event.
        relevance: Relevance of the inputs given the event, of shape ``(C, H, W)``. If the class is contrasted with
            others, it has the sign of the mass. None if the mass is zero or nearly cancels.
        problem: Reason for undefined relevance.
    """

    condition: Condition
    mass: float
    relevance: Tensor | None
    problem: str = ""


@dataclass(frozen=True)
class LayerMap:
    """Relevance map averaged over late layers.

    Attributes:
        layers: The layers, from the last to the first.
        relevance: Map of shape ``(H, W)``, interpolated to pixels. Positive values are evidence for the class.
        reference: Name or file of the reference image, or None if there is none.
    """

    layers: list[str]
    relevance: Tensor
    reference: str | None


@dataclass(frozen=True)
class Explanation:
    """Explanation of one image. Tensors are on the CPU.

    Attributes:
        request: The request, with the reference that was chosen for this image.
        source: The image file.
        image: The preprocessed image, of shape ``(3, S, S)`` with values in [0, 1].
        outputs: Outputs of the model, of shape ``(K,)``.
        target: The explained class.
        against: The contrast of the explained class.
        difference: The explained difference between outputs, or None if there is no contrast.
        relevance: Relevance of the inputs, of shape ``(C, S, S)``. Like the relevance of layers and the totals, it is
            multiplied by the sign of the difference. Positive relevance is then evidence for the class.
        totals: Relevance totals at the inputs.
        layers: Explanations of the requested layers.
        given: Explanations conditional on the requested events.
        photo: The image for figures, including the part that the model's crop leaves out.
        reference: Name or file of the reference image, or None if there is none.
        layer_map: Relevance map averaged over late layers, or None if it was not requested or the model has no such
            layers.
        pixel_map: Heat map of :func:`~nrm_plugin.measure.pixel_maps.pixel_map`, of shape ``(H, W)``, with the plain
            background of the image as the reference. None if the background is not plain.
        shows_pixels: Whether to plot the relevance of the pixels.
        notes: Deviations from the request, with their reasons.
    """

    request: Request
    source: LoadedImage
    image: Tensor
    outputs: Tensor
    target: int
    against: Against
    difference: float | None
    relevance: Tensor
    totals: Totals
    layers: list[LayerExplanation]
    given: list[ConditionalExplanation]
    photo: Photo
    reference: str | None = None
    layer_map: LayerMap | None = None
    pixel_map: Tensor | None = None
    shows_pixels: bool = True
    notes: tuple[str, ...] = ()


def explanation(loaded: LoadedModel, source: LoadedImage, request: Request) -> Explanation:
    """Explains one image.

    Args:
        loaded: The model, on the device given in the request.
        source: The image to explain.
        request: Target, layers, conditions, rules and device.

    Raises:
        RequestError: If the target, the layers or the conditions do not match the model or if the model fails.
        NRMError: If no measure of the model can be constructed with these rules.
    """
    inputs = loaded.preprocessing(source.image).to(request.device)
    ground = ground_name(loaded, inputs) if request.finds_background else None
    on_ground = None if ground is None else _on_ground(loaded, source, inputs, request, ground)
    if isinstance(on_ground, Explanation):
        return on_ground
    result = _without_ground(loaded, source, inputs, request)
    return result if on_ground is None else replace(result, notes=(*result.notes, on_ground))


def _on_ground(
    loaded: LoadedModel, source: LoadedImage, inputs: Tensor, request: Request, ground: str
) -> Explanation | str:
    """Explains the difference from the plain background. Returns a note with the reason if this is not possible.

    Args:
        loaded: The loaded model, with its preprocessing.
        source: The image to explain.
        inputs: The preprocessed image.
        request: Settings of the computation.
        ground: The color of the background, as the name of a reference.
    """
    request = replace(request, composite=SECANTS, reference=ground, layers_reference=None, finds_background=False)
    note = f"the plain background of the image, {ground}, is not its reference: "
    alone = replace(request, against=NONE)
    try:
        if not is_fine_grained(measure_of(loaded, inputs, alone)):
            return f"{note}most relevance of single pixels cancels in this model"
        result = _of_one_measure(loaded, source, inputs, request, measure_of(loaded, inputs, request))
        if request.map == OF_LAYERS:
            return result
        mu = measure_of(loaded, inputs, alone, lambda ground: covered(inputs, ground), light_gamma())
        return replace(result, pixel_map=focused_pixels(mu)[0].cpu())
    except NRMError as error:
        return f"{note}{str(error).partition('. ')[0]}"


def _without_ground(loaded: LoadedModel, source: LoadedImage, inputs: Tensor, request: Request) -> Explanation:
    result = _of_one_measure(loaded, source, inputs, request, measure_of(loaded, inputs, request))
    if request.layers_reference is None or result.notes:
        return result
    apart = replace(request, composite=SECANTS, reference=request.layers_reference)
    try:
        return replace(result, layer_map=_layer_map(measure_of(loaded, inputs, apart), apart.reference))
    except NRMError as error:
        layer_map = _layer_map(measure_of(loaded, inputs, request), request.reference)
        reason = str(error).partition(". ")[0]  # without the remedy, since no reference was requested
        note = f"the coarse heat map is not compared with the blurred image: {reason}. It explains the output itself"
        return replace(result, layer_map=layer_map, notes=(note,))


def _of_one_measure(
    loaded: LoadedModel, source: LoadedImage, inputs: Tensor, request: Request, mu: RelevanceMeasure
) -> Explanation:
    check_layers(mu, loaded, [*request.layers, *(name for given in request.given for name in given.layers)])
    relevance = float(mu.sign) * mu.marginal("input")[0]
    against = compared_with(loaded, request, mu.outputs)
    is_mapped = request.map in (BOTH, OF_LAYERS)
    notes = _without_layers(loaded, request) if is_mapped and not _has_late_layers(loaded, mu, inputs) else ()
    is_apart = notes or request.layers_reference is not None
    return Explanation(
        request,
        source,
        loaded.preprocessing.inverse(inputs).cpu(),
        mu.outputs.flatten().cpu(),
        explained_class(loaded, request.target, mu.outputs),
        against,
        None if against is None else float(mu.output),
        relevance.cpu(),
        _totals(mu, "input", relevance),
        [_layer(mu, name, request.channels) for name in request.layers],
        [_conditional(mu, condition, against) for condition in request.given],
        photo(loaded, source, inputs),
        request.reference,
        _layer_map(mu, request.reference) if is_mapped and not is_apart else None,
        shows_pixels=request.map != OF_LAYERS,
        notes=notes,
    )


def _layer_map(mu: RelevanceMeasure, reference: str | None) -> LayerMap | None:
    """Computes the relevance map of late layers. Returns None if the model has no late layers with positions."""
    layers = late_layers(mu)
    return LayerMap(layers, layer_average(mu, layers)[0].cpu(), reference) if layers else None


def _has_late_layers(loaded: LoadedModel, mu: RelevanceMeasure, inputs: Tensor) -> bool:
    """Returns True if a model has late layers.

    The result is cached. A planned measure would have to record the model to determine it.
    """
    shape = tuple(inputs.shape)
    if shape not in loaded.has_late_layers:
        loaded.has_late_layers[shape] = bool(late_layers(mu))
    return loaded.has_late_layers[shape]


def _without_layers(loaded: LoadedModel, request: Request) -> tuple[str, ...]:
    """Returns a note that the model has no late layers.

    Raises:
        RequestError: If only the map of late layers is requested.
    """
    reason = f"{loaded.name} has no late layers with positions, which all relevance crosses, on two grids"
    if request.map == OF_LAYERS:
        raise RequestError(f"--map layers: {reason}. Use --map pixels.")
    return (f"no coarse heat map: {reason}",)


def _totals(mu: RelevanceMeasure, layer: str, relevance: Tensor) -> Totals:
    numbers = (relevance.sum(), mu.sign * mu.sink(layer), mu.sign * mu.bypass(layer), mu.variation(layer))
    return Totals(*(float(number) for number in numbers))


def _layer(mu: RelevanceMeasure, name: str, channels: int) -> LayerExplanation:
    sign = float(mu.sign)
    relevance = sign * mu.marginal(name)
    mass = sign * mu.marginal(name, over="channel")[0].flatten()
    order = mass.abs().argsort(descending=True, stable=True)[:channels].tolist()
    top = [index for index in order if mass[index] != 0]
    heat_maps = sign * mu.marginal("input", joint=[at(name).channel(channel) for channel in top])[:, 0].sum(1)
    totals = _totals(mu, name, relevance[0])
    return LayerExplanation(name, relevance[0].cpu(), mass.cpu(), totals, top, heat_maps.cpu())


def _conditional(mu: RelevanceMeasure, condition: Condition, against: Against) -> ConditionalExplanation:
    mass = 0.0
    try:
        mass = float(mu.sign * mu(condition.event))
        relevance = mu.marginal("input", given=condition.event)[0].cpu()
        # Evidence for the class is positive, even if the difference or the condition is negative.
        is_against = against is not None and mass < 0
        return ConditionalExplanation(condition, mass, -relevance if is_against else relevance)
    except NullEventError:
        return ConditionalExplanation(condition, mass, None, "no relevance passes through these walks")
    except CancellationError:
        problem = (
            f"positive and negative relevance of these walks cancel to {100 * mass:.2g}%, which is too small to "
            "divide by"
        )
        return ConditionalExplanation(condition, mass, None, f"{problem}. Select fewer channels")
    except NRMError as error:
        raise RequestError(f"--given {condition.text!r}: {error}") from error
