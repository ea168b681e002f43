"""What the commands print. ASCII apart from names, so that every terminal can show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..dataset.images import shown
from ..measure.flow_graph import FlowGraph
from .explain_images import Outcome
from .explanation import Request, Share
from .flow import FlowOutcome
from .model_loading import Subject
from .output_files import class_name

BEST = 5
"""Classes that are listed."""


def heading(subject: Subject, request: Request) -> str:
    """One line on how all pictures of a call are explained."""
    limit = f", gain limit {request.gain_limit:g}" if request.residual == "redistribute" else ""
    model = f"{shown(subject.name)} (weights: {subject.weights})"
    return f"{model} by {request.composite}, residual {request.residual}{limit}, on {request.device}"


def outcome(subject: Subject, found: Outcome) -> Iterator[str]:
    """The lines on one picture that was explained."""
    answer = found.answer
    if answer is None:
        return
    yield shown(found.path)
    yield from (f"  note: it {note}" for note in answer.picture.notes)
    yield from classes(subject, answer.outputs, answer.target)
    yield f"  relevance {_share(answer.share, 'at the pixels')}"
    for layer in answer.layers:
        yield f"  {layer.name}: {_share(layer.share, 'crosses it')}, variation {layer.share.variation:.3g}"
        yield from _columns([f"channel {channel:<5} {_percent(float(layer.mass[channel]))}" for channel in layer.top])
    for given in answer.given:
        if given.relevance is not None:
            yield f"  given {given.condition.text}: mass {_percent(given.mass).strip()}"
        else:
            yield f"  given {given.condition.text}: not drawn, see below"
    yield from (f"  -> {shown(path)}" for path in found.files)


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> Iterator[str]:
    """Rows under their headings, in columns."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def flow(subject: Subject, found: FlowOutcome) -> Iterator[str]:
    """The lines on the flow of one picture."""
    if found.graph is None or found.outputs is None or found.picture is None:
        return
    yield shown(found.path)
    yield from (f"  note: it {note}" for note in found.picture.notes)
    yield from classes(subject, found.outputs, found.target)
    yield from layers(found.graph)
    yield from (f"  -> {shown(path)}" for path in found.files)


def layers(graph: FlowGraph) -> Iterator[str]:
    """One line for each layer of a flow."""
    for layer in graph.layers:
        held, groups = sum(layer.masses), len(layer.groups) + layer.others
        parts = [f"{_percent(held).strip()} in {len(layer.groups)} of {groups} groups"]
        parts += [f"{_percent(layer.rest).strip()} in the rest"] if layer.others else []
        parts += [f"{_percent(layer.sink).strip()} absorbed above"] if round(layer.sink, 4) else []
        parts += [f"{_percent(layer.bypass).strip()} around it"] if round(layer.bypass, 4) else []
        yield f"  {layer.name}: {', '.join(parts)}"
    if graph.carried is not None:
        yield f"  through shown groups in all layers: {_percent(graph.carried).strip()}"


def classes(subject: Subject, outputs: Tensor, target: int) -> Iterator[str]:
    """The classes of the largest outputs, and the one that is explained."""
    shares = torch.softmax(outputs.double(), 0)
    best = outputs.argsort(descending=True, stable=True)[:BEST].tolist()
    listed = best if target in best else [*best, target]
    several = len(outputs) > 1
    names = {index: class_name(subject, index) for index in listed}
    width = max(len(name) for name in names.values())
    for index in listed:
        mark = "  <- explained" if index == target else ""
        number = f"{100 * float(shares[index]):6.2f} %" if several else f"output {float(outputs[index]):.4g}"
        yield f"  {index:4} {names[index]:{width}}{'  ' if width else ' '}{number}{mark}"


def _share(share: Share, where: str) -> str:
    text = f"{_percent(share.mass).strip()} {where}, {_percent(share.sink).strip()} absorbed above"
    return text + (f", {_percent(share.bypass).strip()} around it" if round(share.bypass, 4) else "")


def _percent(value: float) -> str:
    # Adding zero turns a -0.00 into 0.00.
    return f"{round(100 * value, 2) + 0.0:7.2f} %"


def _columns(cells: Sequence[str], across: int = 2) -> Iterator[str]:
    width = max((len(cell) for cell in cells), default=0)
    for start in range(0, len(cells), across):
        yield ("    " + "   ".join(cell.ljust(width) for cell in cells[start : start + across])).rstrip()
