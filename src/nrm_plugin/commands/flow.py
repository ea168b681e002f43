"""The flow of relevance of a picture: what is computed, and the files that are written."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from ..dataset.images import Picture, open_picture, shown
from ..errors import NRMError
from ..measure.flow_graph import FlowGraph
from ..measure.flow_heat_maps import Maps, flow_maps
from ..measure.layer_profile import ProfileRow, profile
from ..measure.measure import RelevanceMeasure
from ..measure.partitions import patches
from ..plots.flow import MAX_GROUPS as MOST
from ..plots.flow import flow_figure, profile_figure
from ..plots.flow_html import save_sankey
from ..plots.heatmaps import save
from ..plots.ribbons import DARK, LIGHT
from .explain_images import COMMON
from .explanation import Chooser, Request, RequestError, check_layers, measured
from .model_loading import Subject
from .output_files import PACKAGES, class_name, free_name, quietly, short

HTML_MISSING = "no HTML page: plotly is not installed (pip install 'nrm-plugin[html]')"


@dataclass(frozen=True)
class FlowOptions:
    """What is shown of a flow.

    Attributes:
        top: Most groups of a layer.
        coverage: Share of the absolute mass of each layer that its groups are to hold; None for no such limit.
        patches: Patches of the picture along each side.
        dark: Pictures for a dark background.
    """

    top: int = 8
    coverage: float | None = None
    patches: int = 4
    dark: bool = False


@dataclass(frozen=True)
class FlowOutcome:
    """What became of one picture.

    Attributes:
        path: Its file.
        picture: What was read; None where there is none.
        outputs: Of the model, ``(K,)``.
        target: The class that is explained.
        graph: The flow.
        maps: Heat maps of its nodes.
        files: What was written.
        problems: What was not possible.
    """

    path: Path
    picture: Picture | None = None
    outputs: Tensor | None = None
    target: int = 0
    graph: FlowGraph | None = None
    maps: Maps = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def flows(
    paths: Sequence[Path], subject: Subject, request: Request, options: FlowOptions, out: Path
) -> Iterator[FlowOutcome]:
    """The flows of pictures, one by one; each is written before the next is read.

    Args:
        paths: The files; one that is named twice is read once.
        subject: The model, on the device of the request.
        request: What to ask; its layers are those of the flow.
        options: What to show.
        out: Folder that exists.

    Raises:
        NRMError: No picture can be explained so.
    """
    taken: set[str] = set()
    for path in dict.fromkeys(paths):
        try:
            yield _flow(open_picture(path), subject, request, options, out, taken)
        except COMMON:
            raise
        except (NRMError, OSError) as error:
            text = str(error) if isinstance(error, NRMError) else f"{error.strerror or error}"
            yield FlowOutcome(path, problems=[text if shown(path) in text else f"{shown(path)}: {text}"])


def _flow(
    picture: Picture, subject: Subject, request: Request, options: FlowOptions, out: Path, taken: set[str]
) -> FlowOutcome:
    inputs = subject.prepare(picture.image).to(request.device)
    chooser = Chooser(subject, request.target)
    mu = measured(subject, inputs, request, chooser)
    check_layers(mu, subject, request.layers)
    graph, maps = _graph(mu, subject, request, options)
    plain = mu
    if request.residual != "sink":
        plain = measured(subject, inputs, replace(request, residual="sink", gain_limit=None), chooser)
    rows = profile(mu, request.layers, plain)
    found = FlowOutcome(picture.path, picture, chooser.outputs.cpu(), chooser.target, graph, maps)
    found.files.extend(_write(found, rows, subject, request, options, out, taken))
    return found


def _graph(mu: RelevanceMeasure, subject: Subject, request: Request, options: FlowOptions) -> tuple[FlowGraph, Maps]:
    height, width = mu.shape("input")[-2:]
    if options.patches > min(height, width):
        raise RequestError(f"--patches {options.patches} are more than the {height}×{width} pixels that the net gets.")
    cut = patches((height, width), options.patches)
    named = {
        number: f"row {number // options.patches}, col {number % options.patches}" for number in range(cut.max() + 1)
    }
    classes = {number: class_name(subject, number) for number in range(len(subject.categories))}
    names: dict[str, Mapping[int, str]] = {"input": named}
    names |= {"output": classes} if any(classes.values()) else {}
    limits = {"top": options.top, "coverage": options.coverage}
    try:
        graph = mu.flow(request.layers, {"input": cut}, names=names, **limits)  # type: ignore[arg-type]
        return graph, flow_maps(mu, graph, {"input": cut})
    except NRMError as error:
        raise RequestError(f"--layers {' '.join(map(shown, request.layers))}: {error}") from error


def _settings(found: FlowOutcome, subject: Subject, request: Request, options: FlowOptions) -> dict[str, Any]:
    picture = found.picture
    assert picture is not None
    return {
        "image": shown(picture.path.name),
        "image_sha256": picture.digest,
        "model": shown(subject.name),
        "weights": subject.weights,
        "target": found.target,
        "target_name": class_name(subject, found.target),
        "composite": request.composite,
        "residual": request.residual,
        "gain_limit": request.gain_limit,
        "layers": list(request.layers),
        "top": options.top,
        "coverage": options.coverage,
        "patches": options.patches,
        "preparation": subject.prepare.settings,
    }


def _write(
    found: FlowOutcome,
    rows: Sequence[ProfileRow],
    subject: Subject,
    request: Request,
    options: FlowOptions,
    out: Path,
    taken: set[str],
) -> list[Path]:
    """PNG, page, numbers and layers under a name that is free, or that the same question had before."""
    graph = found.graph
    assert graph is not None
    about = json.loads(json.dumps(_settings(found, subject, request, options)))
    ends = ["flow.png", "flow.json", "layers.png", *(["flow.html"] if find_spec("plotly") else [])]
    stem = free_stem(out, found.path.stem, about, ends, taken, "flow.json")
    files = [out / f"{stem}-{end}" for end in ends]
    name = class_name(subject, found.target)
    target = f"“{short(name)}”" if name else f"class {found.target}"
    random = "  (random weights)" if subject.weights == "none" else ""
    heading = f"{short(found.path.name)}: flow of relevance for {target}{random}"
    paper = (DARK if options.dark else LIGHT).paper
    with quietly():
        save(flow_figure(graph, heading, options.dark, found.maps), files[0], paper)
        save(profile_figure(rows, heading.replace("flow of relevance", "layers"), options.dark), files[2], paper)
    versions = {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}
    more = {"settings": about, "device": request.device, "versions": versions}
    more["profile"] = [vars(row) for row in rows]
    files[1].write_text(json.dumps(graph.to_dict() | more, allow_nan=False) + "\n", encoding="utf-8")
    if len(files) > 3:
        save_sankey(graph, files[3], heading.replace(r"\$", "$"), found.maps)
    return files


def free_stem(
    out: Path, stem: str, about: Mapping[str, Any], ends: Sequence[str], taken: set[str], numbers: str
) -> str:
    """The beginning of names of files: one that is free, or that the same question had before.

    Args:
        out: Folder.
        stem: What it should be.
        about: The question.
        ends: What follows in the names.
        taken: Names that others of this call have; the new one is added.
        numbers: The end of the JSON file that holds the question, under ``"settings"``.
    """
    return free_name(out, stem, ends, taken, lambda name: _known(out / f"{name}-{numbers}") == about)


def _known(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


__all__ = ["HTML_MISSING", "MOST", "FlowOptions", "FlowOutcome", "flows"]
