"""Elements of a flow drawing, with positions in points from the upper left corner."""

from __future__ import annotations

from dataclasses import dataclass

from ..measure.flow_graph import FlowNode

BAR, MARGIN = 4.5, 8.0
"""Width of a bar and margin around the drawing, in points."""
LINE = 1.22
"""Line spacing, as a multiple of the font size."""
LEAST_LETTERS = 5.0
"""Smallest font size of the legend, in points."""
SMALLEST = 4.5
"""Smallest font size of names and notes between two bars, in points. Notes that do not fit at this size are omitted."""


@dataclass(frozen=True)
class Box:
    """Rectangle, given by its upper left corner, width and height."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """The x-coordinate of the right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """The y-coordinate of the lower edge."""
        return self.y + self.height


@dataclass(frozen=True)
class Label:
    """Line of text, with the position of its vertically centered anchor, its font size and its tone."""

    x: float
    y: float
    text: str
    size: float
    anchor: str = "middle"
    tone: str = "ink"
    is_bold: bool = False


@dataclass(frozen=True)
class DrawnNode:
    """Position and appearance of a node.

    Attributes:
        node: The node of the flow graph.
        column: Index of the column, from the left.
        box: Bounding box of the whole node.
        thumbnail: Position of the thumbnail, or None if there is none.
        bars: Bars on both sides, where ribbons are attached, each with a tone: ``positive``, ``negative``, ``rest``,
            ``sink`` or ``bypass``.
        labels: Lines of text.
    """

    node: FlowNode
    column: int
    box: Box
    thumbnail: Box | None
    bars: tuple[tuple[Box, str], ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Band:
    """Position and appearance of a ribbon between a node on the left and a node on the right.

    Attributes:
        lower: Key of the lower node, on the left.
        upper: Key of the upper node, on the right.
        value: Joint relevance.
        start: Left end point of the center line.
        end: Right end point of the center line.
        width: Width of the ribbon.
        tone: As in :class:`DrawnNode`.
        strength: Opacity of the band.
    """

    lower: str
    upper: str
    value: float
    start: tuple[float, float]
    end: tuple[float, float]
    width: float
    tone: str
    strength: float


@dataclass(frozen=True)
class Scene:
    """Layout of a complete drawing.

    Attributes:
        width: Width of the drawing.
        height: Height of the drawing.
        photo: Position of the photograph, or None if there is none.
        labels: Title, caption and column headings.
        legend: Lines of the legend below the flow.
        nodes: The nodes of the flow.
        bands: The ribbons of the flow.
        unit: Points per unit of relevance.
        omitted: Total absolute relevance of the ribbons that are too thin to be drawn.
    """

    width: float
    height: float
    photo: Box | None
    labels: tuple[Label, ...]
    legend: tuple[Label, ...]
    nodes: tuple[DrawnNode, ...]
    bands: tuple[Band, ...]
    unit: float
    omitted: float

    @property
    def bottom(self) -> float:
        """The lower end of the flow, above the legend."""
        return self.height - MARGIN - sum(LINE * label.size for label in self.legend)


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a flow drawing. Lengths are in points.

    Attributes:
        width: Width of the drawing.
        letters: Font size of node names.
        ratio: Height-to-width ratio of the thumbnails, or 0 if there are none.
        sides: Thumbnail width in each column.
        lines: Number of text lines per node in each column.
        notes: Number of additional lines for notes per node in each column, 0 to 3.
        bare: Whether the channels of each column are named only by their numbers, for lack of space.
    """

    width: float
    letters: float
    ratio: float
    sides: tuple[float, ...]
    lines: tuple[int, ...]
    notes: tuple[int, ...]
    bare: tuple[bool, ...]

    @property
    def small(self) -> float:
        """Font size of the legend and of the second line of column headings."""
        return max(0.9 * self.letters, LEAST_LETTERS)

    @property
    def gap(self) -> float:
        """Horizontal space between two columns."""
        nodes = sum(self.node(column) for column in range(len(self.sides)))
        return (self.width - 2 * MARGIN - nodes) / max(len(self.sides) - 1, 1)

    def text(self, column: int) -> float:
        """Returns the height of the text lines of a node."""
        return (self.lines[column] + self.notes[column]) * LINE * self.letters + 1

    def node(self, column: int) -> float:
        """Returns the width of a node, including its two bars."""
        return self.sides[column] + 2 * BAR

    def x(self, column: int) -> float:
        """Returns the x-coordinate of the left edge of a column."""
        return MARGIN + sum(self.node(before) + self.gap for before in range(column))


__all__ = ["Band", "Box", "DrawnNode", "Label", "Scene", "Sizes"]
