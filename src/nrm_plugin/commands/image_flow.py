"""Flow of relevance for one image: its figure, raw values, HTML page and layer profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dataset.images import LoadedImage
from ..errors import NRMError, printable
from ..measure.flow_graph import FlowGraph, FlowLayer
from ..measure.flow_heat_maps import MappedFlow, NodeMaps, mapped_flow
from ..measure.layer_groups import Groups
from ..measure.layer_profile import ProfileRow, profile
from ..measure.measure import RelevanceMeasure
from ..plots.flow import flow_figure
from ..plots.flow_caption import Walks, flow_caption
from ..plots.flow_finding import flow_finding, groups_of, sign_of
from ..plots.flow_html import save_sankey
from ..plots.flow_notes import Pairs
from ..plots.flow_places import half_area, place_name
from ..plots.flow_thumbnails import Photo, region_areas
from ..plots.layer_profile import profile_figure
from ..plots.ribbons import short_percent
from ..search.group_walks import group_walks, least_passes
from . import messages
from .flow_groups import Division, FlowOptions, channel_counts, division, regions_of
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
    weights_title,
    write_json,
    writing,
)
from .photos import crop_note, margin_note, margins, photo
from .request import Against, Request, RequestError, check_layers, compared_with, explained_class, measure_of

MOST_PASSES, LISTED_WALKS = 150, 12
"""Maximum number of partial passes for walks over groups and number of walks listed on the page."""
NO_REST = 1e-6
"""Absolute relevance below which the outputs that are not shown have none."""
LEAST_NEXT = 0.01
"""Softmax value above which a caption mentions the second class."""
LOWERS = ("what lowers the score", "what raises it")
"""Descriptions of positive and negative relevance for a negative score without a contrast."""
IN_MARGINS = "mostly margin"
"""Location of a part that lies mostly in the margins that make an image square."""
LEAST_PROFILE = 0.01
"""Fraction of relevance lost at a layer above which the layer profile is plotted."""


@dataclass(frozen=True)
class ImageFlow:
    """Flow of relevance for one image.

    Attributes:
        outputs: Outputs of the model, of shape ``(K,)``.
        target: The explained class.
        against: The contrast of the explained class.
        difference: The explained difference between outputs, or None if there is no contrast.
        explained: The explained output, difference or change, which is 100% of the relevance.
        graph: Flow of relevance through the layers.
        heat_maps: Heat maps of the nodes.
        pairs: Joint relevance of nodes in non-adjacent layers.
        photo: The image, with the patches of the nodes.
        groups: The groups, or None if they were not requested.
        maps_at: Layer whose positions the heat maps show, or empty for single pixels.
        walks: The strongest walks over groups, or empty if computing all walks would take too many passes.
        profile: Layer profile, compared with plain LRP.
        next_class: Name of the class with the largest output other than the explained class.
        rival: Name of the contrast, if it is a single class.
        name: Name of the explained class.
        has_reference: Whether the flow explains a change from a reference image.
        margins: Fraction of the model input that pads an image that is not square.
        margin_relevance: Fraction of the relevance that comes from these margins.
    """

    outputs: Tensor
    target: int
    against: Against
    difference: float | None
    explained: float
    graph: FlowGraph
    heat_maps: NodeMaps
    pairs: Pairs
    photo: Photo
    groups: Groups | None
    maps_at: str
    walks: Walks
    profile: Sequence[ProfileRow]
    next_class: str = ""
    rival: str = ""
    name: str = ""
    has_reference: bool = False
    margins: float = 0.0
    margin_relevance: float = 0.0

    @property
    def lowers(self) -> bool:
        """True if positive relevance lowers the score of the class, because its score is negative and has no contrast.

        Differences and changes have the sign of the evidence for the class instead.
        """
        return self.difference is None and not self.has_reference and self.explained < 0


def explain_flow(
    loaded: LoadedModel, image: LoadedImage, request: Request, options: FlowOptions, out: Path, taken: set[str]
) -> Printed:
    """Computes the flow of relevance for one image and writes its files.

    Args:
        loaded: The model, on the device given in the request.
        image: The image to explain.
        request: The request, including the layers of the flow.
        options: Options of the flow figure.
        out: Output folder, which must exist.
        taken: File names that are in use, as in :func:`~nrm_plugin.commands.output_files.free_stem`.

    Raises:
        RequestError: If the target, the layers or the patches do not match the model or if the model fails.
        NRMError: If no measure of the model can be constructed with these rules.
        OSError: If a file cannot be written.
    """
    flow = image_flow(loaded, image, request, options)
    files = _write(flow, loaded, image, request, options, out, taken)
    lines = [
        *messages.image(loaded, image, flow.outputs, flow.target, flow.against),
        *messages.crop_note(flow.photo),
        *messages.difference(loaded, flow.target, flow.against, flow.difference),
        f"  {finding(flow)}",
        *messages.layers(flow.graph),
        *messages.files(files),
    ]
    return Printed(lines)


def image_flow(loaded: LoadedModel, image: LoadedImage, request: Request, options: FlowOptions) -> ImageFlow:
    """Computes the flow of relevance for one image; see :func:`explain_flow` for arguments and errors."""
    inputs = loaded.preprocessing(image.image).to(request.device)
    mu = measure_of(loaded, inputs, request)
    check_layers(mu, loaded, request.layers)
    shown_image = photo(loaded, image, inputs)
    flow, divided = _flow(mu, loaded, request, options, shown_image)
    graph = flow.graph
    plain = mu if request.reference is None else None
    if plain is not None and request.residual != "sink":
        plain = measure_of(loaded, inputs, replace(request, residual="sink", gain_limit=None))
    target = explained_class(loaded, request.target, mu.outputs)
    against = compared_with(loaded, request, mu.outputs)
    difference = None if against is None else float(mu.output)
    regions = regions_of(graph, divided.over)
    return ImageFlow(
        mu.outputs.flatten(), target, against, difference, float(mu.output), graph, flow.maps, flow.pairs,
        replace(shown_image, regions=regions), divided.groups,
        flow.layer if flow.positions else "", _walks(mu, graph, divided.groups),
        profile(mu, request.layers, plain), _next_class(loaded, mu.outputs.flatten(), target),
        _class(loaded, against) if isinstance(against, int) else "", _class(loaded, target),
        request.reference is not None, margins(loaded, image), _margin_relevance(mu, shown_image),
    )  # fmt: skip


def _flow(
    mu: RelevanceMeasure, loaded: LoadedModel, request: Request, options: FlowOptions, image: Photo
) -> tuple[MappedFlow, Division]:
    """Returns the flow with its heat maps and the grouping of the neurons in each layer."""
    try:
        divided = division(loaded, mu, request, options, torch.as_tensor(image.image))
        flow = mapped_flow(
            mu, request.layers, divided.over, top=options.top, coverage=options.coverage, names=divided.names,
            groups=divided.groups,
        )  # fmt: skip
        return flow, divided
    except RequestError:
        raise
    except NRMError as error:
        raise RequestError(f"--layers {' '.join(map(printable, request.layers))}: {error}") from error


def _margin_relevance(mu: RelevanceMeasure, shown: Photo) -> float:
    """Returns the fraction of the relevance that comes from the margins around an image."""
    if shown.content is None:
        return 0.0
    margin = torch.as_tensor(~shown.content, device=mu.outputs.device)
    return float(mu.sign * (mu.marginal("input")[0] * margin).sum())


def _walks(mu: RelevanceMeasure, graph: FlowGraph, groups: Groups | None) -> Walks:
    """Returns the strongest walks over groups, or an empty list if computing them would take too many passes."""
    if groups is None or not all(layer.name in groups.layers and _shows_all(layer) for layer in graph.layers):
        return []
    counts = [len(groups.names[groups.layers.index(layer.name)]) for layer in graph.layers]
    if len(counts) < 3 or least_passes(counts) > MOST_PASSES:
        return []
    shown = {node.key for node in graph.nodes if node.kind == "group"}
    walks = group_walks(mu, [layer.name for layer in graph.layers], groups).through_nodes(LISTED_WALKS)
    return [(keys, mass) for keys, mass in walks if shown.issuperset(keys)]


def _shows_all(layer: FlowLayer) -> bool:
    """Returns True if the shown groups of a layer have all of its relevance, such as a single explained class."""
    return not layer.others or (layer.name == "output" and abs(layer.rest) < NO_REST)


def _write(
    flow: ImageFlow,
    loaded: LoadedModel,
    image: LoadedImage,
    request: Request,
    options: FlowOptions,
    out: Path,
    taken: set[str],
) -> list[Path]:
    """Writes the figure, raw values and HTML page. Returns the paths written.

    The layer profile is also written if relevance is lost at a layer, and the groups if they were computed.
    """
    settings: dict[str, Any] = image_settings(loaded, request, image.path, image.digest, flow.target, flow.against)
    settings |= {"top": options.top, "coverage": options.coverage, "patches": options.patches}
    settings |= {} if options.groups is None else {"groups": printable(options.groups)}
    is_plain = all(_is_whole(row) for row in flow.profile)
    ends = ["flow.json", f"flow.{options.kind}", "flow.html", *([] if is_plain else ["layers.png"])]
    ends += ["groups.safetensors"] if isinstance(options.groups, int) else []
    stem = json_stem(out, image.path.stem, ends, taken, settings)
    numbers, figure, page, *layers = [out / f"{stem}-{end}" for end in ends]
    stored = [layers.pop()] if isinstance(options.groups, int) else []
    target = f"{explained_title(loaded, flow.target, flow.against, request.reference)}{weights_title(loaded)}"
    heading = f"{short(image.path.name)}: flow of relevance for {target}"
    parts: dict[str, Any] = {"maps": flow.heat_maps, "image": flow.photo, "caption": caption(flow)}
    parts |= {"maps_at": flow.maps_at, "walks": flow.walks, "pairs": flow.pairs}
    parts |= {"counts": channel_counts(flow.graph, flow.groups), "finding": finding(flow)}
    parts |= {"made": made_by(loaded, request)}
    parts |= {"signs": LOWERS} if flow.lowers else {}
    drawn = flow_figure(flow.graph, heading, options.dark, width=options.width, **parts)
    save_figure(drawn, figure, options.dark, options.dpi)
    for path in layers:
        profile_heading = f"{short(image.path.name)}: layers for {target}"
        save_figure(profile_figure(flow.profile, profile_heading, options.dark), path, options.dark)
    more = {"settings": settings, "device": request.device, "versions": versions()}
    more |= {"finding": finding(flow), "caption": caption(flow)}
    write_json(numbers, flow.graph.to_dict() | more | {"profile": [vars(row) for row in flow.profile]})
    with writing(page) as temporary:
        save_sankey(flow.graph, temporary, heading.replace(r"\$", "$"), **parts)
    for path in stored:
        assert flow.groups is not None
        with writing(path) as temporary:
            flow.groups.save(temporary)
    return [figure, numbers, page, *layers, *stored]


def caption(flow: ImageFlow) -> str:
    """Returns the caption of a flow, including the part of the image that the model did not see."""
    said = flow_caption(
        flow.graph, _target(flow), walks=flow.walks, areas=region_areas(flow.photo), places=_places(flow)
    )
    notes = (crop_note(flow.photo), margin_note(flow.margins, flow.margin_relevance))
    return " ".join(filter(None, (_rank(flow), _whole(flow), said, *notes)))


def finding(flow: ImageFlow) -> str:
    """Returns the title of the figure."""
    sign = sign_of(flow.graph)
    maps = [flow.heat_maps[node.key] for node in groups_of(flow.graph.layers[0]) if node.key in flow.heat_maps]
    half = half_area(sign * maps[0]) if len(maps) == 1 else 1.0
    return flow_finding(flow.graph, _target(flow), _places(flow), region_areas(flow.photo), half)


def _target(flow: ImageFlow) -> str:
    """Returns the name of the explained output for use in sentences."""
    return f"the negative score of {flow.name}" if flow.lowers else flow.name


def _places(flow: ImageFlow) -> dict[str, str]:
    regions, areas = flow.photo.regions, region_areas(flow.photo)
    return {
        key: place_name(mask, flow.heat_maps.get(key)) if key in areas else IN_MARGINS for key, mask in regions.items()
    }


def _rank(flow: ImageFlow) -> str:
    """Describes the softmax value and rank of the explained class. Returns an empty string for a single output."""
    if len(flow.outputs) < 2:
        return ""
    softmax = flow.outputs.double().softmax(0)
    share = short_percent(float(softmax[flow.target]))
    rank = 1 + int((flow.outputs > flow.outputs[flow.target]).sum())
    if rank == 1:
        second = float(softmax.topk(2).values[1])
        is_close = bool(flow.next_class) and second >= LEAST_NEXT
        after = f"; the next is {flow.next_class} with {short_percent(second)}" if is_close else ""
        return f"The model predicts this class, with a softmax of {share}{after}."
    first = f"; the first is {flow.next_class} with {short_percent(float(softmax.max()))}" if flow.next_class else ""
    return f"The model does not predict this class: its softmax of {share} has rank {rank}{first}."


def _whole(flow: ImageFlow) -> str:
    """Describes the output, difference or change that equals 100%, or -100% if it is a negative difference or change.

    Returns an empty string if it is zero.
    """
    if flow.explained == 0:
        return ""
    score = "its score" if len(flow.outputs) > 1 else "the output"
    sign = "−" if flow.explained < 0 and not flow.lowers else ""
    value = f"{flow.explained:.3g}".replace("-", "−")
    others = f"that of {flow.rival}" if flow.rival else "the softmax-weighted mean of the other scores"
    if flow.difference is not None:
        end = ", compared with the reference image" if flow.has_reference else ""
        return f"{sign}100% is a difference of {value} between {score} and {others}{end}."
    if flow.has_reference:
        return f"{sign}100% is a change of {value} in {score}, compared with the reference image."
    return f"100% is {score} of {value}{', which red lowers and blue raises' if flow.lowers else ''}."


def _class(loaded: LoadedModel, index: int) -> str:
    """Returns the class name in quotation marks, or the class index."""
    name = class_name(loaded, index)
    return f"“{name}”" if name else f"class {index}"


def _next_class(loaded: LoadedModel, outputs: Tensor, target: int) -> str:
    """Returns the name of the class with the largest output other than the explained class."""
    order = [index for index in outputs.argsort(descending=True).tolist() if index != target]
    name = class_name(loaded, order[0]) if order else ""
    return f"“{name}”" if name else ""


def _is_whole(row: ProfileRow) -> bool:
    """Returns True if all relevance crosses a layer, in the measure and in plain LRP."""
    parts = (row.sink, row.bypass, abs(row.mass) - 1, abs(row.plain or row.mass) - 1)
    return max(map(abs, parts)) < LEAST_PROFILE
