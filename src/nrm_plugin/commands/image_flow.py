"""The flow of relevance for one image: figure, page, numbers and layer profile."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from ..dataset.images import LoadedImage, shown
from ..errors import NRMError
from ..measure.flow_graph import FlowGraph
from ..measure.flow_heat_maps import NodeMaps, flow_maps
from ..measure.layer_profile import ProfileRow, profile
from ..measure.measure import RelevanceMeasure
from ..measure.partitions import patches
from ..plots.flow import flow_figure, profile_figure
from ..plots.flow_html import save_sankey
from . import messages
from .model_loading import LoadedModel
from .output_files import (
    class_name,
    explained_title,
    image_settings,
    json_stem,
    save_figure,
    short,
    versions,
    weights_title,
    write_json,
    writing,
)
from .per_image import Printed
from .request import Against, Request, RequestError, check_layers, compared_with, explained_class, measure_of


def has_page() -> bool:
    """Returns whether an interactive page can be written."""
    return find_spec("plotly") is not None


def print_missing_page() -> None:
    """Prints to stderr the reason why no interactive page was written."""
    if not has_page():
        print(
            "nrm-plugin: note: no HTML page: plotly is not installed (pip install 'nrm-plugin[html]')", file=sys.stderr
        )


@dataclass(frozen=True)
class FlowOptions:
    """Options of a flow figure.

    Attributes:
        top: Maximum number of channels of a layer.
        coverage: Fraction of the absolute mass of each layer that the shown channels must cover; None for no limit.
        patches: Patches of the image along each side.
        dark: Whether figures are for a dark background.
    """

    top: int = 8
    coverage: float | None = None
    patches: int = 4
    dark: bool = False


@dataclass(frozen=True)
class ImageFlow:
    """The flow for one image.

    Attributes:
        outputs: Outputs of the model, ``(K,)``.
        target: The explained class.
        against: What the class is compared with.
        difference: The explained difference of outputs; None if the class is compared with nothing.
        graph: The flow.
        heat_maps: Heat maps of the nodes.
        profile: Profile of the layers, compared with plain LRP.
    """

    outputs: Tensor
    target: int
    against: Against
    difference: float | None
    graph: FlowGraph
    heat_maps: NodeMaps
    profile: Sequence[ProfileRow]


def explain_flow(
    loaded: LoadedModel, image: LoadedImage, request: Request, options: FlowOptions, out: Path, taken: set[str]
) -> Printed:
    """Writes the flow of relevance for one image.

    Args:
        loaded: The model, on the device of the request.
        image: The image.
        request: The request, with the layers of the flow.
        options: Options of the figure.
        out: An existing folder.
        taken: Used file names, as in :func:`~nrm_plugin.commands.output_files.free_stem`.

    Raises:
        RequestError: If the target, the layers or the patches do not fit the model, or the model fails.
        NRMError: If the model cannot be measured with these rules.
        OSError: If a file cannot be written.
    """
    flow = image_flow(loaded, image, request, options)
    files = _write(flow, loaded, image, request, options, out, taken)
    lines = [
        *messages.image(loaded, image, flow.outputs, flow.target, flow.against),
        *messages.difference(loaded, flow.target, flow.against, flow.difference),
        *messages.layers(flow.graph),
        *messages.files(files),
    ]
    return Printed(lines)


def image_flow(loaded: LoadedModel, image: LoadedImage, request: Request, options: FlowOptions) -> ImageFlow:
    """Computes the flow of relevance for one image; see :func:`explain_flow` for arguments and errors."""
    inputs = loaded.preprocessing(image.image).to(request.device)
    mu = measure_of(loaded, inputs, request)
    check_layers(mu, loaded, request.layers)
    graph, heat_maps = _graph(mu, loaded, request, options)
    plain = mu
    if request.residual != "sink":
        plain = measure_of(loaded, inputs, replace(request, residual="sink", gain_limit=None))
    target = explained_class(loaded, request.target, mu.outputs)
    against = compared_with(loaded, request, mu.outputs)
    difference = None if against is None else float(mu.output)
    return ImageFlow(
        mu.outputs.flatten(), target, against, difference, graph, heat_maps, profile(mu, request.layers, plain)
    )


def _graph(
    mu: RelevanceMeasure, loaded: LoadedModel, request: Request, options: FlowOptions
) -> tuple[FlowGraph, NodeMaps]:
    height, width = mu.shape("input")[-2:]
    count = options.patches
    if count > min(height, width):
        raise RequestError(f"--patches {count} is more than the {height}×{width} pixels of the model's input.")
    over = {"input": patches((height, width), count)}
    classes = {number: class_name(loaded, number) for number in range(len(loaded.categories))}
    names: dict[str, Mapping[int, str]] = {"input": patch_names(count)}
    target, against = explained_class(loaded, request.target, mu.outputs), compared_with(loaded, request, mu.outputs)
    if against is not None:  # the output is one number
        names["output"] = {0: class_name(loaded, target) or f"class {target}"}
    elif any(classes.values()):
        names["output"] = classes
    try:
        graph = mu.flow(request.layers, over, top=options.top, coverage=options.coverage, names=names)
        return graph, flow_maps(mu, graph, over)
    except NRMError as error:
        raise RequestError(f"--layers {' '.join(map(shown, request.layers))}: {error}") from error


def patch_names(count: int) -> dict[int, str]:
    """Returns names of ``count`` × ``count`` patches by row and column."""
    return {number: "row {}, col {}".format(*divmod(number, count)) for number in range(count**2)}


def _write(
    flow: ImageFlow,
    loaded: LoadedModel,
    image: LoadedImage,
    request: Request,
    options: FlowOptions,
    out: Path,
    taken: set[str],
) -> list[Path]:
    """Writes figure, numbers, profile and page."""
    settings: dict[str, Any] = image_settings(loaded, request, image.path, image.digest, flow.target, flow.against)
    settings |= {"top": options.top, "coverage": options.coverage, "patches": options.patches}
    ends = ["flow.json", "flow.png", "layers.png", *(["flow.html"] if has_page() else [])]
    stem = json_stem(out, image.path.stem, ends, taken, settings)
    numbers, figure, layers, *page = [out / f"{stem}-{end}" for end in ends]
    target = f"{explained_title(loaded, flow.target, flow.against)}{weights_title(loaded)}"
    heading = f"{short(image.path.name)}: flow of relevance for {target}"
    save_figure(flow_figure(flow.graph, heading, options.dark, flow.heat_maps), figure, options.dark)
    profile_heading = f"{short(image.path.name)}: layers for {target}"
    save_figure(profile_figure(flow.profile, profile_heading, options.dark), layers, options.dark)
    more = {"settings": settings, "device": request.device, "versions": versions()}
    write_json(numbers, flow.graph.to_dict() | more | {"profile": [vars(row) for row in flow.profile]})
    for path in page:
        with writing(path) as temporary:
            save_sankey(flow.graph, temporary, heading.replace(r"\$", "$"), flow.heat_maps)
    return [figure, numbers, layers, *page]
