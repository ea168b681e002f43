"""Mean flow of relevance over a stored sweep, or its difference between two classes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dataset.glocal import difference, flow_of_sweep
from ..dataset.glocal_plots import difference_figure
from ..dataset.stored_sweep import Sweep
from ..errors import printable
from ..measure.flow_graph import FlowError, FlowGraph
from ..plots.flow import flow_figure
from ..plots.flow_html import save_sankey
from . import messages
from .flow_groups import resolution
from .output_files import json_stem, save_figure, short, versions, write_json, writing
from .request import RequestError, target_of
from .resolved_options import class_names

NORMALIZED = re.compile(r"^Normalized\((.*)\)$")
"""Pattern of a composite's name in a manifest. The figures of images name only the composite within."""


@dataclass(frozen=True)
class Classes:
    """Selection of the samples to average in a sweep.

    Attributes:
        target: Explained class of the samples, or None for all samples.
        minus: Class whose mean flow is subtracted, or None.
        categories: Class names, or empty if unknown.
    """

    target: int | None
    minus: int | None
    categories: Sequence[str]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Classes:
        """Creates the selection from command-line options."""
        categories = class_names(options.classes) if options.classes else []
        count = len(categories) or None
        given = (options.target, options.minus)
        target, minus = (None if text is None else target_of(text, categories, count) for text in given)
        return cls(target, minus, categories)

    def name(self, target: int) -> str:
        """Returns the name of a class, or its index if the name is unknown."""
        return printable(self.categories[target]) if target < len(self.categories) else str(target)

    def title(self, preposition: str) -> str:
        """Returns the classes for a heading, or an empty string if all samples are averaged."""
        first = "" if self.target is None else f" {preposition} class {self.name(self.target)}"
        return first + ("" if self.minus is None else f" minus class {self.name(self.minus)}")


def print_mean_flow(options: argparse.Namespace) -> int:
    """Prints the mean flow of a sweep, writes its files, and returns the exit status.

    Raises:
        RequestError: If options conflict or if the class is unknown.
        FlowError: If the sweep does not contain the queries required for this flow.
    """
    given = [name for name, value in (("IMAGE", options.images), ("--model", options.model)) if value]
    if given:
        raise RequestError(f"--from reads a sweep and takes no {' and no '.join(given)}.")
    if options.against is not None:
        raise RequestError("--from reads a sweep, whose classes were compared by the --against of nrm-plugin sweep.")
    if options.minus is not None and options.target is None:
        raise RequestError("--minus compares two classes: give the other one with --target.")
    sweep = Sweep.open(options.sweep)
    classes = Classes.of(options)
    _check_names(sweep, classes.categories)
    graph = mean_flow(sweep, options.layers, classes, options.top, options.coverage)
    print(f"{printable(sweep.path)}: mean flow{classes.title('of')}{_compared(sweep, classes)}")
    for line in messages.layers(graph):
        print(printable(line))
    for line in messages.files(_write(options, sweep, graph, classes)):
        print(line)
    return 0


def _check_names(sweep: Sweep, categories: Sequence[str]) -> None:
    """Raises :class:`RequestError` if there are known to be more or fewer class names than outputs."""
    for query in sweep.queries.values():
        groups = query.groups or ()
        for layer, count in zip(query.layers, groups, strict=False):
            if layer == "output" and len(categories) not in (0, count):
                raise RequestError(
                    f"there are {len(categories)} class names, but the model of the sweep has {count} outputs. "
                    "--classes takes a file with one name on each line, in the order of the outputs."
                )


def mean_flow(
    sweep: Sweep, layers: Sequence[str], classes: Classes, top: int | None, coverage: float | None
) -> FlowGraph:
    """Computes the mean flow over the samples of a class or the difference between two classes."""
    if classes.minus is None:
        return _mean(sweep, layers, classes.target, classes, top=top, coverage=coverage)
    first, second = (_mean(sweep, layers, one, classes, top=None) for one in (classes.target, classes.minus))
    return difference(first, second).smaller(top=top, coverage=coverage)


def _mean(sweep: Sweep, layers: Sequence[str], target: int | None, classes: Classes, **limits: Any) -> FlowGraph:
    names = {"output": classes.categories} if classes.categories else None
    if "against" in sweep.manifest.settings:
        names = {"output": ["class" if target is None else classes.name(target)]}
    stored = [query.layers for query in sweep.queries.values() if query.kind == "Joint"]
    is_upwards = len(layers) > 1 and (layers[1], layers[0]) in stored
    downwards = list(layers)[::-1] if is_upwards else list(layers)
    try:
        return flow_of_sweep(sweep, downwards, target, names=names, **limits)
    except FlowError as error:
        command = f" Or: nrm-plugin sweep --joint --layers {' '.join(downwards)}"
        raise FlowError(f"{error}{command if 'flow_queries' in str(error) else ''}") from error


def _compared(sweep: Sweep, classes: Classes) -> str:
    """Describes the contrast of the classes in a sweep, for a heading."""
    against = sweep.manifest.settings.get("against")
    if against is None:
        return ""
    return f" rather than {f'class {classes.name(against)}' if isinstance(against, int) else 'the other classes'}"


def made_by_sweep(sweep: Sweep) -> str:
    """Returns the model, the rules and the reference of a sweep for a figure, as far as its manifest has them.

    An example is "VGG · NRMDefault · no reference".
    """
    settings = sweep.manifest.settings
    model, rules = settings.get("model", {}).get("class", ""), settings.get("composite", {}).get("name", "")
    rules = NORMALIZED.sub(r"\1", rules)
    return " · ".join(printable(word) for word in (model, rules, "no reference") if word) if rules else printable(model)


def _write(options: argparse.Namespace, sweep: Sweep, graph: FlowGraph, classes: Classes) -> list[Path]:
    settings = {
        "sweep": sweep.manifest.fingerprint, "layers": list(options.layers), "target": classes.target,
        "minus": classes.minus, "top": options.top, "coverage": options.coverage, "dark": options.dark,
        **({"classes": list(classes.categories)} if classes.categories else {}),
    }  # fmt: skip
    name = sweep.path.resolve().name
    ends = ["flow.json", f"flow.{options.kind}", "flow.html"]
    stem = json_stem(options.out, name, ends, set(), settings)
    numbers, figure, page = [options.out / f"{stem}-{end}" for end in ends]
    heading = f"{short(name)}: mean flow of relevance{classes.title('for')}{_compared(sweep, classes)}"
    made = made_by_sweep(sweep)
    title = short(name) + heading.removeprefix(short(name)).replace("$", r"\$")
    if classes.target is None or classes.minus is None:
        drawn = flow_figure(graph, title, options.dark, width=options.width, made=made)
    else:
        both = (classes.name(classes.target), classes.name(classes.minus))
        drawn = difference_figure(graph, *both, title, options.dark, width=options.width, made=made)
    save_figure(drawn, figure, options.dark, resolution(options.width))
    write_json(numbers, graph.to_dict() | {"settings": settings, "versions": versions()})
    with writing(page) as temporary:
        save_sankey(graph, temporary, heading.replace(r"\$", "$"), made=made)
    return [figure, numbers, page]
