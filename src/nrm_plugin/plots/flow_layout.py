"""Layout of a flow: the positions of nodes, ribbons, thumbnails and text, in points from the upper left corner.

The same layout is used for the figure and the HTML page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..measure.flow_graph import FlowGraph, FlowLayer, FlowNode
from .arrays import Array
from .flow_bands import flow_bands
from .flow_columns import LEAST_OFF, drawn_columns, is_difference, layer_note, node_name, tone_of
from .flow_notes import BOTH_SIGNS, DENSITIES, NOTES, OVERALL, Counts, counted, lines_of_notes
from .flow_parts import BAR, LEAST_LETTERS, LINE, MARGIN, SMALLEST, Box, DrawnNode, Label, Scene, Sizes
from .flow_text import cut, text_width, wrapped_lines
from .ribbons import short_percent

NARROW = 5.0
"""Width in inches below which a figure with long columns becomes taller to keep thumbnails legible."""
CHANNELS, NUMBERS = "“Ch.” are channels.", "Numbers below thumbnails are those of channels."
"""Sentences of the legend about names below thumbnails."""
GAP = 9.0
"""Vertical space between two nodes, in points."""
WIDER, BESIDE = 1.5, 140.0
"""Largest width of the photograph, relative to a square one, and minimum space for the finding next to it in points."""
SHORT = 2
"""Maximum number of nodes in a column with room for three-line names."""
LEAST = 20.0
"""Smallest width of a thumbnail, in points."""
CANCELS = 0.05
"""Fraction of the ribbons of a node below which its mass is the result of a cancellation."""
Column = Sequence[tuple[int, FlowNode]]
Notes = Mapping[str, Sequence[str]]


# -- the scene ------------------------------------------------------------------------------------------------------


def flow_scene(
    graph: FlowGraph,
    heading: str = "",
    caption: str = "",
    key: str = "",
    width: float | None = None,
    thumbnails: Mapping[str, object] | None = None,
    ratio: float = 1.0,
    photo_ratio: float | None = None,
    notes: Notes | None = None,
    counts: Counts | None = None,
    finding: str = "",
) -> Scene:
    """Computes the layout of a flow.

    Args:
        graph: Flow graph to lay out.
        heading: Title of the figure. If ``finding`` is given, the heading is a smaller line above it.
        caption: Text below the title.
        key: Legend below the flow. A note about omitted ribbons is appended to it.
        width: Width in inches; by default 7.2, or more if there are more than three layers or long columns.
        thumbnails: Thumbnails, keyed by node; only the keys are used.
        ratio: Height-to-width ratio of the thumbnails.
        photo_ratio: Height-to-width ratio of the photograph next to the caption, or None if there is no photograph.
        notes: Candidate notes to show below the name of each node, keyed by node. The candidates of a node are sorted
            from longest to shortest, and the longest that fits is shown.
        counts: Number of channels of each group, keyed by node. It is shown where there is enough space.
        finding: The main finding, shown as the title.

    Raises:
        FlowError: If a layer has too many groups for a figure.
    """
    thumbnails = thumbnails or {}
    columns = drawn_columns(graph)
    notes = notes or {}
    sizes = _sizes(columns, width, ratio if thumbnails else 0.0, notes)
    if counts:
        columns = [_counted(column, counts, sizes, number) for number, column in enumerate(columns)]
        sizes = _sizes(columns, width, ratio if thumbnails else 0.0, notes)
    photo, labels, top = _header(sizes, (heading, finding, caption), photo_ratio)
    labels += _column_headings(graph, sizes, top)
    top += 2 * LINE * sizes.letters + 8
    stacks = _stacks(graph, columns)
    heights = [[_rows(sizes, number, node, thumbnails) for _, node in column] for number, column in enumerate(columns)]
    unit, room = _unit(stacks, heights, sizes)
    lines = {key: said for number, column in enumerate(columns) for key, said in _noted(column, notes, sizes, number)}
    nodes = [
        node
        for number, column in enumerate(columns)
        for node in _placed(
            graph, number, column, stacks[number], heights[number], unit, room, top, sizes, thumbnails, lines
        )
    ]
    bands, omitted = flow_bands(graph, columns, nodes, unit)
    bottom = max([node.box.bottom for node in nodes], default=top + 20) + 10
    note = (
        f"Ribbons thinner than a hairline, together {short_percent(omitted)}, are not drawn." if omitted > 1e-3 else ""
    )
    written = " ".join(label.text for node in nodes for label in node.labels)
    pale = [(node, label.text) for node in nodes for label in node.labels if label.tone == "pale"]
    noted = {node.column > 0 for node, text in pale if not text.startswith("+")}
    terms = [said for said, is_upper in ((DENSITIES, False), (NOTES, True)) if is_upper in noted]
    terms += [BOTH_SIGNS] if any(said.startswith("+") for said in lines.values()) else []
    terms += [OVERALL] if any("overall" in said for said in lines.values()) else []
    terms += [CHANNELS] if "\u00a0ch." in written else []
    terms += [NUMBERS] if any(sizes.bare) else []
    legend = _legend("\n".join(filter(None, (key, " ".join(terms), note))), bottom, sizes)
    end = bottom + MARGIN + sum(LINE * label.size for label in legend)
    return Scene(sizes.width, end, photo, tuple(labels), legend, tuple(nodes), tuple(bands), unit, omitted)


def _legend(text: str, top: float, sizes: Sizes) -> tuple[Label, ...]:
    """Returns the lines of the legend below the flow."""
    size = sizes.small
    lines = wrapped_lines(text, 0.99 * sizes.width - 2 * MARGIN, size)
    return tuple(
        Label(MARGIN, top + 5 + row * LINE * size, line, size, "start", "pale") for row, line in enumerate(lines)
    )


def _counted(
    column: list[tuple[int, FlowNode]], counts: Counts, sizes: Sizes, number: int
) -> list[tuple[int, FlowNode]]:
    """Returns a column whose labels include the numbers of channels if all of them fit below the thumbnails."""
    for unit in ("channels", "ch."):
        longer = [(row, counted(node, counts, unit)) for row, node in column]
        widest = max((text_width(node_name(node), sizes.letters) for _, node in longer), default=0.0)
        if widest < sizes.sides[number]:
            return longer
    return column


def _sizes(columns: Sequence[Column], width: float | None, ratio: float, notes: Notes) -> Sizes:
    count, longest = max(len(columns), 1), max((len(column) for column in columns), default=1)
    points = 72 * (max(7.2, 1.9 * count, 0.8 * longest) if width is None else width)
    letters = float(np.clip(points / (14.5 * count), 5.0, 7.2))
    sides, lines, bare = [], [], []
    for column in columns:  # a long column has smaller thumbnails
        widest = max((text_width(_one_line(node), letters) for _, node in column), default=0.0)
        largest = float(np.clip(0.44 * points / count, 20, 84))
        tall = 1.1 if points > 72 * NARROW else 1.35
        longer = tall * points / max(len(column), 1) - 2 * LINE * letters - GAP
        sides.append(max(min(largest, longer / ratio), min(0.6 * largest, 44), LEAST) if ratio else 0.6 * largest)
        channels = [_shorter(node) for _, node in column if _shorter(node) != node_name(node)]
        bare.append(bool(ratio) and any(text_width(name, letters) > sides[-1] for name in channels))
        names = [_fitting(node, sides[-1], letters, bare[-1]) for _, node in column]
        most = max((len(wrapped_lines(name, sides[-1], letters)) for name in names), default=1)
        lines.append(1 if widest < 0.8 * sides[-1] else 1 + min(most, 3 if len(column) <= SHORT else 2))
    sizes = Sizes(points, letters, ratio, tuple(sides), tuple(lines), (0,) * len(columns), tuple(bare))
    noted = [[said for _, said in _noted(column, notes, sizes, number)] for number, column in enumerate(columns)]
    return replace(sizes, notes=tuple(max((said.count("\n") + 1 for said in row), default=0) for row in noted))


def _noted(column: Column, notes: Notes, sizes: Sizes, number: int) -> list[tuple[str, str]]:
    """Returns the nodes of a column that have a note, with its lines, which fit between two bars."""
    keys = [node.key for _, node in column]
    said = lines_of_notes(keys, notes, _room(sizes, number), _note_sizes(sizes.letters)[0])
    return [(key, text) for key, text in zip(keys, said, strict=True) if text]


def _room(sizes: Sizes, number: int) -> float:
    """Returns the width of a note in points."""
    return 0.98 * (sizes.sides[number] - 1)


def _note_sizes(letters: float) -> tuple[float, float]:
    """Returns the smallest and the largest font size of notes below names of a given font size."""
    largest = max(0.9 * letters, LEAST_LETTERS)
    return max(0.8 * largest, SMALLEST), largest


def _header(
    sizes: Sizes, texts: tuple[str, str, str], photo_ratio: float | None
) -> tuple[Box | None, list[Label], float]:
    """Returns the position of the photograph, the lines of text next to it, and the y-coordinate below them."""
    labels: list[Label] = []
    photo = None
    left, y = MARGIN, MARGIN
    if photo_ratio is not None:
        side = float(np.clip(0.22 * sizes.width, 72, 110))
        long = side * min(WIDER, 1 / photo_ratio)
        photo = Box(MARGIN, MARGIN, long, long * photo_ratio)
        left = photo.right + 10
    big, small = min(10.5, 1.4 * sizes.letters + 0.5), 1.08 * sizes.letters
    heading, finding, caption = texts
    is_titled = bool(finding and heading)
    first = (heading, small, False, "pale") if is_titled else (heading, big, True, "ink")
    rows = (first, (finding, big, True, "ink"), (caption, small, False, "ink"))
    for number, (text, size, is_bold, tone) in enumerate(rows):
        is_below = number == 2 or (number == 1 and sizes.width - left < BESIDE)
        if text and is_below and photo is not None and sizes.width < 72 * NARROW:  # below the photograph
            left, y = MARGIN, max(y, photo.bottom + 4)
        for line in wrapped_lines(text, sizes.width - left - MARGIN, size, is_bold):
            labels.append(Label(left, y + 0.5 * LINE * size, line, size, "start", tone, is_bold))
            y += LINE * size
        y += 3 if text else 0
    bottom = max(y, photo.bottom if photo else 0.0)
    return photo, labels, bottom + 10 if labels or photo else MARGIN


def _column_headings(graph: FlowGraph, sizes: Sizes, top: float) -> list[Label]:
    labels = []
    layers = graph.layers[::-1]
    for number, layer in enumerate(layers):
        x, anchor = sizes.x(number) + sizes.node(number) / 2, "middle"
        room = sizes.node(number) + sizes.gap / 2 - 4 if len(layers) > 1 else sizes.width - 2 * MARGIN
        if number == 0:
            x, anchor = MARGIN, "start"
        elif number == len(layers) - 1:
            x, anchor = sizes.width - MARGIN, "end"
        size = 1.1 * sizes.letters
        labels.append(Label(x, top + 4, cut(layer.name, room, size, True), size, anchor, "ink", True))
        note = cut(layer_note(layer, is_difference(graph)), room, sizes.small)
        labels.append(Label(x, top + 4 + LINE * size, note, sizes.small, anchor, "pale"))
    return labels


# -- positions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """Total positive and negative relevance of the ribbons on one side of a node."""

    positive: float
    negative: float

    @property
    def total(self) -> float:
        """The total absolute relevance."""
        return self.positive + self.negative


def _stacks(graph: FlowGraph, columns: Sequence[Sequence[tuple[int, FlowNode]]]) -> list[list[tuple[Stack, Stack]]]:
    """Returns the stacks of ribbons on the left and the right side of each node."""
    joints = [joint.T for joint in graph.joints[::-1]]
    result = []
    for number, column in enumerate(columns):
        rows = []
        for row, node in column:
            left = _signed(node, joints[number - 1][:, row], columns[number - 1]) if number else Stack(0, 0)
            right = _signed(node, joints[number][row], columns[number + 1]) if number < len(joints) else Stack(0, 0)
            alone = Stack(max(node.mass, 0.0), max(-node.mass, 0.0))
            rows.append((left, right) if graph.joints else (alone, alone))
        result.append(rows)
    return result


def _signed(node: FlowNode, values: Array, column: Sequence[tuple[int, FlowNode]]) -> Stack:
    shown = values[[row for row, _ in column]]
    return Stack(float(shown.clip(min=0).sum()), float(-shown.clip(max=0).sum()))


def _rows(sizes: Sizes, column: int, node: FlowNode, thumbnails: Mapping[str, object]) -> float:
    """Returns the height of the thumbnail and the text of a node."""
    return (sizes.sides[column] * sizes.ratio if node.key in thumbnails else 0.0) + sizes.text(column)


def _unit(
    stacks: Sequence[Sequence[tuple[Stack, Stack]]], heights: Sequence[Sequence[float]], sizes: Sizes
) -> tuple[float, float]:
    """Returns the number of points per unit of relevance and the height of the flow."""

    def filled(column: int, unit: float) -> float:
        both = zip(stacks[column], heights[column], strict=True)
        return sum(max(unit * max(left.total, right.total), least) + GAP for (left, right), least in both)

    columns = range(len(stacks))
    room = max([filled(column, 0.0) for column in columns] + [0.42 * sizes.width]) * 1.12
    low, high = 0.0, room / 0.05
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if max(filled(column, middle) for column in columns) <= room else (low, middle)
    return low, room


def _placed(
    graph: FlowGraph,
    number: int,
    column: Sequence[tuple[int, FlowNode]],
    stacks: Sequence[tuple[Stack, Stack]],
    heights: Sequence[float],
    unit: float,
    room: float,
    top: float,
    sizes: Sizes,
    thumbnails: Mapping[str, object],
    notes: Mapping[str, str],
) -> list[DrawnNode]:
    """Returns the nodes of a column with their positions, distributed over the height of the flow."""
    own = [
        max(unit * max(left.total, right.total), least) for (left, right), least in zip(stacks, heights, strict=True)
    ]
    space = (room - sum(own) - len(own) * GAP) / max(len(own), 1)
    space = min(space, 2.5 * sizes.letters)
    y = top + (room - sum(own) - len(own) * (GAP + space)) / 2 + space / 2
    layer = graph.layers[::-1][number]
    nodes = []
    for (_, node), sides, least, height in zip(column, stacks, heights, own, strict=True):
        box = Box(sizes.x(number), y, sizes.node(number), height)
        middle = y + height / 2
        inner = Box(box.x + BAR, middle - least / 2, sizes.sides[number], least - sizes.text(number))
        bars = _bars(layer, node, sides, number, len(graph.layers), box, middle, unit)
        thumbnail = inner if node.key in thumbnails else None
        is_between = any(bar.bottom > inner.bottom for bar, _ in bars)
        mass = mass_text(node, sides)
        labels = _labels(graph, number, node, mass, box, inner.bottom + 1, sizes, is_between)
        if node.key in notes:
            labels = (*labels, *_note(notes[node.key].split("\n"), labels[-1], sizes, number))
        nodes.append(DrawnNode(node, number, box, thumbnail, bars, labels))
        y += height + GAP + space
    return nodes


def _bars(
    layer: FlowLayer,
    node: FlowNode,
    sides: tuple[Stack, Stack],
    number: int,
    count: int,
    box: Box,
    middle: float,
    unit: float,
) -> tuple[tuple[Box, str], ...]:
    bars = []
    for stack, x, is_there in (
        (sides[0], box.x, number > 0 or count == 1),
        (sides[1], box.right - BAR, number < count - 1),
    ):
        y = middle - unit * stack.total / 2
        for value, sign in ((stack.positive, 1.0), (stack.negative, -1.0)):
            if is_there and value * unit > 0.02:
                tone = tone_of(node, layer, sign)
                bars.append((Box(x, y, BAR, value * unit), tone))
            y += value * unit
    return tuple(bars)


def mass_text(node: FlowNode, sides: tuple[Stack, Stack]) -> str:
    """Returns the mass of a node; for a rest or an off node in which relevance cancels, "+41% −40%" or "±40%"."""
    stack = max(sides, key=lambda side: side.total)
    if node.kind == "group" or abs(node.mass) >= CANCELS * stack.total or stack.total < 2 * LEAST_OFF:
        return short_percent(node.mass)
    positive, negative = short_percent(stack.positive), short_percent(stack.negative)
    return f"±{positive}" if positive == negative else f"+{positive} −{negative}"


def _labels(
    graph: FlowGraph, number: int, node: FlowNode, mass: str, box: Box, y: float, sizes: Sizes, is_between: bool
) -> tuple[Label, ...]:
    """Returns labels with the name and mass of a node. They must fit between its bars if ``is_between``."""
    last = len(graph.layers) - 1
    room = sizes.node(number) + 0.5 * sizes.gap if last else sizes.width
    x, anchor, size = box.x + box.width / 2, "middle", sizes.letters
    if is_between:
        room = sizes.sides[number] - 1
        fitting = _fitting(node, room, size, sizes.bare[number])
        texts = {1: [_one_line(node, mass)], 2: [fitting, mass]}.get(sizes.lines[number], [*fitting.split(), mass])
        widest = max((text_width(text, size) for text in texts), default=0.0)
        size *= float(np.clip(0.999 * room / max(widest, 1e-6), min(1.0, max(0.75, SMALLEST / size)), 1.0))
    elif number in (0, last) and text_width(node_name(node), size) / 2 > sizes.node(number) / 2 + MARGIN - 2:
        x, anchor = (box.x, "start") if number == 0 else (box.right, "end")
    tone = "ink" if node.kind == "off" or node.mass >= 0 else "negative"
    if sizes.lines[number] == 1:
        return (Label(x, y + 0.5 * LINE * size, _one_line(node, mass), size, anchor, tone, True),)
    name = _name_lines(_fitting(node, room, size, sizes.bare[number]), sizes.lines[number] - 1, room, size)
    labels = [Label(x, y + (row + 0.5) * LINE * size, text, size, anchor) for row, text in enumerate(name)]
    return (*labels, Label(x, y + (len(name) + 0.5) * LINE * size, mass, size, anchor, tone, True))


def _note(lines: Sequence[str], above: Label, sizes: Sizes, number: int) -> tuple[Label, ...]:
    """Returns labels for the lines of a note below another label."""
    least, size = _note_sizes(sizes.letters)
    widest = max(text_width(line, size) for line in lines)
    size = max(least, size * min(1.0, _room(sizes, number) / widest))
    y = above.y + 0.5 * LINE * (above.size + size)
    return tuple(
        Label(above.x, y + row * LINE * size, line, size, above.anchor, "pale") for row, line in enumerate(lines)
    )


def _name_lines(name: str, count: int, room: float, size: float) -> list[str]:
    """Breaks a name into at most ``count`` lines, shortening the last line if necessary."""
    lines = wrapped_lines(name, room, size) if count > 1 else [name]
    return [*lines[: count - 1], *([cut(" ".join(lines[count - 1 :]), room, size)] if len(lines) >= count else [])]


def _fitting(node: FlowNode, room: float, size: float, is_bare: bool = False) -> str:
    """Returns the name of a node, with "channel" abbreviated or omitted if it does not fit the available width."""
    name = node_name(node)
    if is_bare:
        return name.removeprefix("channel ")
    return name if text_width(name, size) <= room else _shorter(node)


def _shorter(node: FlowNode) -> str:
    return node_name(node).replace("channel ", "ch.\u00a0")


def _one_line(node: FlowNode, mass: str = "") -> str:
    return f"{node_name(node)}  {mass or short_percent(node.mass)}"


__all__ = ["SMALLEST", "flow_scene"]
