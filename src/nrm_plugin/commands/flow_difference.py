"""Difference between two flows: of two classes in one image, or of one class in two images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..dataset.glocal import difference
from ..dataset.images import LoadedImage, load_image
from ..errors import NRMError, printable
from ..measure.flow_graph import FlowGraph
from ..measure.flow_heat_maps import MappedFlow, NodeMaps, mapped_flow
from ..measure.layer_groups import Groups
from ..measure.measure import RelevanceMeasure
from ..measure.partitions import Names, partition
from ..plots.flow import flow_figure
from ..plots.flow_columns import without_output
from ..plots.flow_finding import difference_finding
from ..plots.flow_html import save_sankey
from ..plots.flow_notes import Counts
from ..plots.flow_places import place_name
from ..plots.flow_thumbnails import Photo
from ..plots.ribbons import short_percent
from . import messages
from .flow_groups import FlowOptions, Regions, channel_counts, division, regions_of
from .image_loop import Printed
from .model_loading import LoadedModel
from .output_files import (
    class_name,
    explained_title,
    image_settings,
    json_stem,
    made_by,
    save_figure,
    short,
    versions,
    write_json,
    writing,
)
from .photos import photo, side_by_side
from .request import (
    NONE,
    Request,
    RequestError,
    check_layers,
    compared_with,
    explained_class,
    measure_of,
    target_of,
)

CHANNELS = 16
"""Number of channels per layer in both flows: the channels whose relevance differs most."""


@dataclass(frozen=True)
class Side:
    """One of the two compared flows.

    Attributes:
        image: Image that this flow explains.
        request: The request, including the class.
        mu: The measure for the class and the image.
        target: The explained class.
        name: Label that distinguishes the two flows.
    """

    image: LoadedImage
    request: Request
    mu: RelevanceMeasure
    target: int
    name: str


def explain_difference(
    loaded: LoadedModel, image: LoadedImage, request: Request, options: FlowOptions, out: Path, taken: set[str]
) -> Printed:
    """Writes the difference between two flows; see :func:`~nrm_plugin.commands.image_flow.explain_flow`.

    By default, each flow explains a single output without a contrast. The difference from other classes would be
    negative for a class that is not predicted, and the two flows would not be comparable.
    """
    if request.against is None:
        request = replace(request, against=NONE)
    first, second = sides(loaded, image, request, options.minus or "")
    graph, maps, maps_at, regions, counts = flow_difference(loaded, first, second, options)
    settings: dict[str, Any] = image_settings(
        loaded, request, image.path, image.digest, first.target, compared_with(loaded, request, first.mu.outputs)
    )
    settings |= {"top": options.top, "patches": options.patches, "minus": second.name}
    ends = ["difference.json", f"difference.{options.kind}", "difference.html"]
    stem = json_stem(out, image.path.stem, ends, taken, settings)
    numbers, figure, page = [out / f"{stem}-{end}" for end in ends]
    places = {key: place_name(mask, maps.get(key)) for key, mask in regions.items()}
    parts: dict[str, Any] = {
        "maps": maps,
        "image": _photo(loaded, first, second, regions),
        "caption": f"{_softmax(first, second)}{_sides_of_photo(first, second)}".strip(),
        "finding": difference_finding(graph, first.name, second.name, places),
        "signs": tuple(
            f"more evidence for {one.name}, or less for {other.name}"
            for one, other in ((first, second), (second, first))
        ),
        "maps_at": maps_at,
        "counts": counts,
        "made": made_by(loaded, request),
    }
    sentences = {"finding": parts["finding"], "caption": parts["caption"]}
    heading = _heading(loaded, first, second)
    shown_graph = without_output(graph)
    drawn = flow_figure(shown_graph, heading, options.dark, width=options.width, **parts)
    save_figure(drawn, figure, options.dark, options.dpi)
    write_json(numbers, graph.to_dict() | {"settings": settings, "versions": versions()} | sentences)
    with writing(page) as temporary:
        save_sankey(shown_graph, temporary, heading.replace(r"\$", "$"), **parts)
    outputs, compared = first.mu.outputs.flatten(), compared_with(loaded, request, first.mu.outputs)
    lines = [
        *messages.image(loaded, image, outputs, first.target, compared),
        f"  flow of {first.name} minus flow of {second.name}: {parts['finding']}. {parts['caption']}",
        *messages.files([figure, numbers, page]),
    ]
    return Printed([printable(line) for line in lines])


def _photo(loaded: LoadedModel, first: Side, second: Side, regions: Regions) -> Photo:
    """Returns the explained image or both images side by side."""
    one, other = (photo(loaded, side.image, loaded.preprocessing(side.image.image)) for side in (first, second))
    return replace(one, regions=regions) if first.image is second.image else side_by_side(one, other, regions)


def _sides_of_photo(first: Side, second: Side) -> str:
    return "" if first.image is second.image else f"Left: {first.name}; right: {second.name}. "


def _heading(loaded: LoadedModel, first: Side, second: Side) -> str:
    names = f"{short(first.name)} minus {short(second.name)}"
    if first.image is second.image:
        return f"{short(first.image.path.name)}: flow of relevance for {names}"
    return f"flow of relevance for {explained_title(loaded, first.target, None)}: {names}"


def _softmax(*both: Side) -> str:
    """Describes the softmax values of both explained outputs. Returns an empty string for a single output."""
    if both[0].mu.outputs.numel() < 2:
        return ""
    shares = [float(side.mu.outputs.flatten().double().softmax(0)[side.target]) for side in both]
    said = [f"{short_percent(share)} for {side.name}" for share, side in zip(shares, both, strict=True)]
    return f"The softmax is {' and '.join(said)}. "


def sides(loaded: LoadedModel, image: LoadedImage, request: Request, minus: str) -> tuple[Side, Side]:
    """Returns the two flows to compare. ``minus`` is an image file or another class of the same image.

    Raises:
        RequestError: If ``minus`` is the explained class or is neither an image nor a class.
    """
    other = load_image(Path(minus)) if Path(minus).is_file() else None
    mu, target = _measured(loaded, image, request)
    if other is not None:
        pair = (printable(image.path.name), printable(other.path.name))
        requests = (request, replace(request, target=str(target)))
        mus = (mu, _measured(loaded, other, requests[1])[0])
        images = (image, other)
        return _sides(images, requests, mus, (target, target), pair)
    second = replace(request, target=minus)
    try:
        counter = target_of(minus, loaded.categories, mu.outputs.numel(), "--minus")
    except RequestError as error:
        raise RequestError(f"{error} There is no image {printable(minus)} either.") from error
    if counter == target:
        raise RequestError(f"--minus {minus}: this is the explained class. Give another class, or an image.")
    against, _ = _measured(loaded, image, second)
    names = tuple(class_name(loaded, one) or f"class {one}" for one in (target, counter))
    return _sides((image, image), (request, second), (mu, against), (target, counter), names)


def _sides(
    images: Sequence[LoadedImage],
    requests: Sequence[Request],
    mus: Sequence[RelevanceMeasure],
    targets: Sequence[int],
    names: Sequence[str],
) -> tuple[Side, Side]:
    first, second = (Side(*one) for one in zip(images, requests, mus, targets, names, strict=True))
    return first, second


def _measured(loaded: LoadedModel, image: LoadedImage, request: Request) -> tuple[RelevanceMeasure, int]:
    inputs = loaded.preprocessing(image.image).to(request.device)
    mu = measure_of(loaded, inputs, request)
    check_layers(mu, loaded, request.layers)
    return mu, explained_class(loaded, request.target, mu.outputs)


def flow_difference(
    loaded: LoadedModel, first: Side, second: Side, options: FlowOptions
) -> tuple[FlowGraph, NodeMaps, str, Regions, Counts]:
    """Computes the difference between two flows over the same groups and between their joint heat maps.

    Returns:
        The graph; heat maps keyed by node; the layer whose positions the maps show, or an empty string for pixels;
        regions of the input nodes, of shape ``(H, W)``; and the number of channels of each group of channels.

    Raises:
        RequestError: If the layers or the patches do not match the model.
    """
    layers = first.request.layers
    inputs = loaded.preprocessing(first.image.image)
    divided = division(loaded, first.mu, first.request, options, loaded.preprocessing.inverse(inputs))
    over = dict(divided.over)
    for layer in layers:
        if layer not in over and layer != "output":
            over[layer] = _differing(first.mu, second.mu, layer)
    if first.mu.shape("output")[1:].numel() > 1:
        over["output"] = _classes(loaded, first.mu, {first.target, second.target})
    names = {} if divided.groups is None else _group_names(divided.groups)
    names = {
        layer: given for layer, given in {**divided.names, **names}.items() if not isinstance(over.get(layer), dict)
    }
    try:
        flows = [mapped_flow(side.mu, layers, over, top=None, names=names) for side in (first, second)]
    except NRMError as error:
        raise RequestError(f"--layers {' '.join(map(printable, layers))}: {error}") from error
    graph = _counted(difference(flows[0].graph, flows[1].graph), first.mu, over)
    graph = graph.smaller(top=max(options.top, options.count))
    graph = graph if divided.groups is None else replace(graph, origin=divided.groups.origin)
    joints = [_joint_maps(flow) for flow in flows]
    keys = {node.key for node in graph.nodes if node.kind == "group"} & joints[0].keys() & joints[1].keys()
    maps = {key: joints[0][key] - joints[1][key] for key in keys}
    regions = regions_of(graph, over)
    return graph, maps, flows[0].layer if flows[0].positions else "", regions, channel_counts(graph, divided.groups)


def _classes(loaded: LoadedModel, mu: RelevanceMeasure, targets: set[int]) -> dict[str, torch.Tensor]:
    """Returns a mask of the output of each class, keyed by class name."""
    labels = torch.arange(mu.shape("output")[1:].numel()).reshape(mu.shape("output")[1:])
    return {class_name(loaded, target) or f"class {target}": labels == target for target in sorted(targets)}


def _group_names(groups: Groups) -> dict[str, Names]:
    return {layer: list(names) for layer, names in zip(groups.layers, groups.names, strict=True)}


def _counted(graph: FlowGraph, mu: RelevanceMeasure, over: Mapping[str, Any]) -> FlowGraph:
    """Adds the channels outside all groups to the number of groups of each layer that are not shown."""
    layers = []
    for layer in graph.layers:
        kind = over.get(layer.name)
        more = partition(mu._tap(layer.name), "channel", None).count - len(kind) if isinstance(kind, Mapping) else 0
        layers.append(replace(layer, others=layer.others + more))
    return replace(graph, layers=tuple(layers))


def _joint_maps(flow: MappedFlow) -> dict[str, np.ndarray]:
    """Converts conditional heat maps to the joint relevance of each node with the positions."""
    masses = {node.key: abs(node.mass) for node in flow.graph.nodes}
    return {key: masses[key] * values for key, values in flow.maps.items()}


def _differing(first: RelevanceMeasure, second: RelevanceMeasure, layer: str) -> dict[str, torch.Tensor]:
    """Returns masks of the channels whose relevance differs most, keyed by channel name."""
    masses = [float(mu.sign) * mu.marginal(layer, over="channel")[0].flatten() for mu in (first, second)]
    order = (masses[0] - masses[1]).abs().argsort(descending=True, stable=True)[:CHANNELS].tolist()
    labels = partition(first._tap(layer), "channel", None).labels
    return {f"channel {channel}": labels == channel for channel in sorted(order)}
