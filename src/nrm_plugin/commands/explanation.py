"""Computation of the explanation of one image. This module neither prints nor writes files."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..dataset.images import LoadedImage
from ..errors import CancellationError, NRMError, NullEventError
from ..events.event import at
from ..measure.layer_averages import layer_average, layers_by_resolution
from ..measure.measure import RelevanceMeasure
from ..plots.flow_thumbnails import Photo
from .event_syntax import Condition
from .model_loading import LoadedModel
from .photos import photo
from .request import Against, Request, RequestError, check_layers, compared_with, explained_class, measure_of

RESOLUTIONS = 2
"""Number of resolutions over which a heat map is averaged, counted from the output; chosen in docs/real.md."""


@dataclass(frozen=True)
class Totals:
    """Relevance at one tap; mass, sink and bypass sum to 1, or to -1 for a negative difference.

    Attributes:
        mass, sink, bypass, variation: As in :class:`~nrm_plugin.RelevanceMeasure`.
    """

    mass: float
    sink: float
    bypass: float
    variation: float


@dataclass(frozen=True)
class LayerExplanation:
    """The explanation of one layer.

    Attributes:
        name: Name of the tap.
        relevance: Relevance of each neuron, without the batch dimension.
        mass: Mass of each channel, ``(C,)``.
        totals: Totals of the layer.
        top: The channels with the largest absolute mass.
        heat_maps: Joint relevance of each of these channels with the pixels, ``(len(top), H, W)``.
    """

    name: str
    relevance: Tensor
    mass: Tensor
    totals: Totals
    top: list[int]
    heat_maps: Tensor


@dataclass(frozen=True)
class ConditionalExplanation:
    """The explanation under one condition.

    Attributes:
        condition: The condition.
        mass: Mass of the event.
        relevance: Relevance of the inputs given the event, ``(C, H, W)``, with the sign of the mass if the class is
            compared with others, or None if the mass is zero or nearly cancels.
        problem: The reason why the relevance is undefined.
    """

    condition: Condition
    mass: float
    relevance: Tensor | None
    problem: str = ""


@dataclass(frozen=True)
class Average:
    """Relevance averaged over layers.

    Attributes:
        layers: The layers, starting with the last one.
        relevance: ``(H, W)``, interpolated to the pixels; positive values are evidence for the class.
    """

    layers: list[str]
    relevance: Tensor


@dataclass(frozen=True)
class Explanation:
    """The explanation of one image; tensors are on the CPU.

    Attributes:
        source: The image file.
        image: The preprocessed image, ``(3, S, S)`` in [0, 1].
        outputs: Outputs of the model, ``(K,)``.
        target: The explained class.
        against: What the class is compared with.
        difference: The explained difference of outputs, or None if the class is not compared with others.
        relevance: Relevance of the inputs, ``(C, S, S)``. Like the relevance of layers and the totals, it is multiplied
            by the sign of the difference, so that positive relevance is evidence for the class.
        totals: Totals at the inputs.
        layers: The requested layers.
        given: The requested conditions.
        photo: The image for figures, including the part that the model did not see.
        reference: Name or file of the reference image, or None without one.
        average: The mean over late layers, or None if it is not requested.
    """

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
    average: Average | None = None


def explanation(loaded: LoadedModel, source: LoadedImage, request: Request) -> Explanation:
    """Explains one image.

    Args:
        loaded: The model, on the device of the request.
        source: The image.
        request: The request.

    Raises:
        RequestError: If the target, the layers or the conditions do not match the model, or if the model fails.
        NRMError: If the model cannot be measured with these rules.
    """
    inputs = loaded.preprocessing(source.image).to(request.device)
    mu = measure_of(loaded, inputs, request)
    check_layers(mu, loaded, [*request.layers, *(name for given in request.given for name in given.layers)])
    relevance = float(mu.sign) * mu.marginal("input")[0]
    against = compared_with(loaded, request, mu.outputs)
    return Explanation(
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
        _average(mu, loaded) if request.averaged else None,
    )


def _average(mu: RelevanceMeasure, loaded: LoadedModel) -> Average:
    layers = layers_by_resolution(mu)[:RESOLUTIONS]
    if layers[0] == "input":
        raise RequestError(
            f"--averaged needs a layer with positions that no relevance bypasses; {loaded.name} has none. Leave it out."
        )
    return Average(layers, layer_average(mu, layers)[0].cpu())


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
            f"positive and negative relevance of these walks cancel to {100 * mass:.2g} %, which is too small to "
            "divide by"
        )
        return ConditionalExplanation(condition, mass, None, f"{problem}. Select fewer channels")
    except NRMError as error:
        raise RequestError(f"--given {condition.text!r}: {error}") from error
