"""Positions of the samples of a batch in each tensor of a recording.

The first dimension of a tensor is not always the batch: attention over windows folds windows into it, and other layers
have time or heads first. Therefore, no layout is assumed. The relevance of each sample is scaled at the output by a
different power of two, and the relative change of an element identifies its sample. No other module assumes that the
first dimension of a tensor indexes samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FoldingError
from ..model.shapes_without_values import is_valueless
from ..model.targets import one_row, sample_sums
from ..model.trace_guards import audit, is_traced, note_not_replayable, untraced
from .graph import Graph
from .places import Buffer, Place, Sink
from .propagation import Cost, Vectors, Visitor, pull, push
from .sample_layout import Layout, doubled, layouts_of, unreached

BITS = 4
"""Number of bits of the sample index that one relevance vector encodes, by factors from 1 to 2¹⁵."""
RATIO = 1e-3
"""Largest deviation of a binary logarithm from an integer for an element that depends on a single sample."""
RANGE = 40
"""Bound on the absolute binary exponent of max|R| in a pass of encoded relevance."""
MIXED = 1e-3
"""Largest fraction of Σ|R| in elements of several samples that is attributed to rounding."""


class Samples:
    """Position of the samples of a batch in each tensor of a recording (its layout).

    Args:
        graph: The graph of the recording.
        count: Number of samples.
        batched: Whether the inputs have a batch dimension. Otherwise, each tensor belongs to one sample.
        is_plain: Whether the samples are known to be independent rows of every tensor.
        shapes_of_two: Function that returns the shape of each named tensor in a run on two samples. It is called at
            most once, if there is only one sample and its position is unknown.

    Attributes:
        leaves: Relevance of the inputs in the pass of :meth:`find`, keyed by vertex.
        output_has_rows: Whether the rows of the output are the samples, as for the output of a model.
        inputs: The vertices of the model inputs, whose rows are the samples.
        labels: The labels of each tensor.
        rows: For a single sample, the vertices whose rows are proven to be the samples.
        may_mix: Whether values outside the graph may combine samples.
        are_fixed: Whether the sample positions are independent of the input values.
    """

    def __init__(
        self,
        graph: Graph,
        count: int,
        batched: bool,
        is_plain: bool,
        shapes_of_two: Callable[[], Mapping[Hashable, torch.Size]] = dict,
    ) -> None:
        self.graph, self.count, self.batched, self.is_plain = graph, count, batched, is_plain
        self.leaves: dict[int, Tensor] = {}
        self.output_has_rows = True
        self.inputs: set[int] = set()
        self.rows: set[int] = set()
        self.may_mix = self.are_fixed = False
        self._plain, self._whole = Layout(0, count), Layout(None, 1)
        self.labels: dict[Buffer, list[Hashable]] = {}
        self._run_two = shapes_of_two if batched and count == 1 and not is_plain else dict
        self._shapes_of_two: Mapping[Hashable, torch.Size] | None = None
        self._layouts: dict[Buffer, Layout | None] = {}
        self._several: dict[Buffer, list[Layout]] = {}
        self._labels: dict[Buffer, Tensor] = {}

    # -- layouts ----------------------------------------------------------------------------------------------

    def layout(self, place: Place | Sink) -> Layout:
        """Returns the layout that converts the tensor at a place to the form ``(N, …)``.

        Raises:
            FoldingError: If no dimension can be divided among the samples.
        """
        if self.is_plain:
            return self._plain
        if not self.batched:
            return self._whole
        layout = self._known(place)
        if layout is None:
            raise self.error(f"a tensor of shape {tuple(self.graph.shape(self.buffer(place)))}")
        return layout

    def _known(self, place: Place | Sink) -> Layout | None:
        buffer = self.buffer(place)
        if buffer not in self._layouts:
            fitting = self._several.get(buffer)
            self._layouts[buffer] = self._looked_up(buffer) if fitting is None else self._chosen(buffer, fitting)
        return self._layouts[buffer]

    def buffer(self, place: Place | Sink) -> Buffer:
        """Returns the buffer of the tensor at a place."""
        return Buffer(place.vertex, 0) if isinstance(place, Sink) else self.graph.buffer(place)

    def _looked_up(self, buffer: Buffer) -> Layout | None:
        if self.count == 1:
            return self._of_one(buffer)
        if buffer != self.graph.output:
            return self._of_unreached(buffer)
        return self._plain if self.output_has_rows else self._of_output()

    def _of_one(self, buffer: Buffer) -> Layout:
        """Returns the layout of a tensor of one sample, along the dimension that doubles for two samples."""
        shape = self.graph.shape(buffer)
        if buffer.vertex in self.rows:
            return self._plain
        if self._shapes_of_two is None:
            self._shapes_of_two, self._run_two = self._run_two(), dict
        shapes = [self._shapes_of_two[label] for label in self.labels.get(buffer, ()) if label in self._shapes_of_two]
        layouts = [doubled(shape, other) for other in shapes]
        layout = next((layout for layout in layouts if layout is not None), None)
        return layout or (self._plain if shape[:1] == (1,) else self._whole)

    def _of_unreached(self, buffer: Buffer) -> Layout | None:
        """Returns a layout of a tensor without relevance, such as the one of the nearest tensor with the same shape."""
        shape = self.graph.shape(buffer)
        if self.has_constant_layouts:
            by_inputs = self._of_inputs(buffer)
            if by_inputs is not None:
                return self._repeatable(by_inputs[0] if len(by_inputs) == 1 else unreached(shape, self.count))
        for other in [other for other in self._several if self.graph.shape(other) == shape]:
            self._known(other)
        same = [
            other
            for other, layout in list(self._layouts.items())
            if layout is not None and layout.slices is None and self.graph.shape(other) == shape
        ]
        if same:
            return self._layouts[min(same, key=lambda other: abs(other.vertex - buffer.vertex))]
        return unreached(shape, self.count) or next(iter(self._of_inputs(buffer) or ()), None)

    def _chosen(self, buffer: Buffer, fitting: list[Layout]) -> Layout | None:
        """Selects a layout of a tensor whose relevance is too small to determine exactly one."""
        by_inputs = self._of_inputs(buffer, self._labels[buffer]) or []
        if len(by_inputs) == 1 and self._holds(by_inputs[0], self._labels[buffer]):
            return self._repeatable(by_inputs[0])
        return self._repeatable(fitting[0]) if fitting and (len(fitting) == 1 or fitting[0].is_plain) else None

    @property
    def has_constant_layouts(self) -> bool:
        """True if layouts are constants of a trace and must therefore be valid for all values."""
        return self.are_fixed and is_traced()

    def _repeatable(self, layout: Layout | None) -> Layout | None:
        """Returns the layout unchanged. Tells an active trace if the layout may be invalid for other values."""
        if self.has_constant_layouts and layout is not None and layout.is_assumed:
            note_not_replayable("some samples have no relevance in a tensor, so that their positions in it are unknown")
        return layout

    def _holds(self, layout: Layout, labels: Tensor) -> bool:
        """Returns True if a layout agrees with the known samples of a tensor's elements."""
        form = layout.shape(labels.shape)
        rows = torch.arange(self.count, device=labels.device).reshape(-1, *(1,) * (len(form) - 1))
        return bool(((labels == layout.fold(rows.expand(form))) | (labels < 0)).all())

    def _of_output(self) -> Layout | None:
        """Returns the layout of a tensor inside the model at which the measure starts."""
        fitting = self._of_inputs(self.graph.output) or []
        if not fitting:
            self._raise_if_unsupported()
        return fitting[0] if fitting else None

    def _of_inputs(self, buffer: Buffer, known: Tensor | None = None) -> list[Layout] | None:
        """Determines the layouts of a tensor from the input samples on which each of its elements depends.

        Args:
            buffer: The tensor whose layout is determined.
            known: The sample of each element, or -1 if it is unknown, to supplement the result.

        Returns:
            The consistent layouts, or None if the tensor does not depend on the inputs.
        """
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode(False), torch.no_grad(), audit():
            for vertex in sorted(self.inputs):
                leaf = self.graph.vertices[vertex].leaf
                assert leaf is not None
                noise = torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device) + 0.5
                vectors = _encoded(noise, self._plain, leaf.shape, self.count)
                values, _ = push(self.graph, Buffer(vertex, 0), buffer, torch.stack(list(vectors.values())))
                if values is None:
                    continue
                with self.inspecting():
                    labels = _Labels.of(dict(zip(vectors, values, strict=True)), self.count)
                    if labels.are_known and not labels.are_mixed:
                        samples, mass = labels.samples, labels.mass
                        if known is not None and bool(((samples < 0) & (known >= 0)).any()):
                            samples, mass = torch.where(samples < 0, known, samples), torch.ones_like(mass)
                        return layouts_of(samples, self.count, mass, is_last=True)
        return None

    def inspecting(self) -> AbstractContextManager[None]:
        """Context manager for determining positions from relevance. In a trace, fixed positions are constants."""
        return untraced() if self.are_fixed else nullcontext()

    def _raise_if_unsupported(self) -> None:
        """Raises an error if an operation without a kernel lies between the inputs and the output."""
        vertex, number = self.graph.vertices[self.graph.output.vertex], self.graph.output.number
        metadata = vertex.node._input_metadata[number]
        ones = torch.ones(metadata.shape, dtype=vertex.dtypes[number], device=metadata.device)
        with torch.inference_mode(False), torch.no_grad():
            pull(self.graph, [(self.graph.output, {-1: ones})], _Finder(self))

    # -- finding them -----------------------------------------------------------------------------------------

    def find(self, start: Tensor) -> Cost:
        """Locates the samples in each tensor by one pass, with one vector plus one for every 4 bits of N.

        Args:
            start: Relevance of the outputs, positive wherever it can be nonzero.

        Raises:
            FoldingError: If elements of a tensor depend on several samples.
        """
        vectors = _encoded(start, self.layout(self.graph.output), start.shape, self.count)
        finder = _Finder(self)
        try:
            return pull(self.graph, [(self.graph.output, vectors)], finder)
        finally:  # if the pass raises an error, the samples above the operation without a kernel are known
            self._layouts.update(finder.layouts)
            self._several = finder.several
            self._labels, self.leaves = finder.labels, finder.leaves

    # -- sums over samples ------------------------------------------------------------------------------------

    def sums(self, tensor: Tensor, place: Place | None) -> Tensor | None:
        """Sums a tensor at a place over the elements of each sample. Returns None if the samples are unknown."""
        if self.count == 1:
            return sample_sums(one_row(tensor))
        if self.is_plain:
            return sample_sums(tensor)
        if place is None:
            return None
        labels = self._labels.get(self.buffer(place))
        if labels is None:
            if self._known(place) is None and not bool(tensor.any()):  # such as a constant, which has no samples
                return tensor.new_zeros(self.count)
            return sample_sums(self.layout(place).unfold(tensor))
        if bool(((labels < 0) & (tensor != 0)).any()):
            layout = self._known(place)
            return None if layout is None else sample_sums(layout.unfold(tensor))
        total = tensor.new_zeros(self.count)
        return total.index_add_(0, labels.clamp(min=0).flatten().long(), tensor.flatten())

    def checked_sums(self, tensor: Tensor, what: str, place: Place | None = None) -> Tensor:
        """Sums a tensor at a place over the elements of each sample. Returns shape ``(N,)``.

        Raises:
            FoldingError: If the samples are unknown.
        """
        sums = self.sums(tensor, place)
        if sums is None:
            raise self.error(what)
        return sums

    def error(self, what: str) -> FoldingError:
        """Returns the error for elements that cannot be assigned to one sample."""
        return FoldingError(
            f"the elements of {what} cannot be assigned to samples: they belong to several of the {self.count} "
            "samples, or no dimension can be divided among the samples. Measure one sample at a time, or pass "
            "batched=False, which treats the whole batch as one sample."
        )


def _encoded(values: Tensor, layout: Layout, shape: torch.Size, count: int) -> Vectors[int]:
    """Scales values by powers of two that encode the sample index.

    Returns:
        The values, with key -1, and scaled values for every 4 bits of the sample index, keyed by the number of the
        first bit.
    """
    form = layout.shape(shape)
    rows = torch.arange(count, device=values.device).reshape(-1, *(1,) * (len(form) - 1))
    vectors: Vectors[int] = {-1: values}
    for shift in range(0, (count - 1).bit_length(), BITS):
        factor = (2.0 ** ((rows >> shift) % (1 << BITS))).to(values.dtype)
        vectors[shift] = values * layout.fold(factor.expand(form))
    return vectors


def _in_range(vectors: Vectors[int]) -> Vectors[int]:
    """Scales all vectors by a common power of two if their values are very large or, after stabilizers, very small."""
    largest = float(vectors[-1].abs().max()) if vectors[-1].numel() else 0.0
    if not 0 < largest < 2**-RANGE and not 2**RANGE < largest < math.inf:
        return vectors
    factor = 2.0 ** min(-math.floor(math.log2(largest)), 120)  # within the range of float32
    return {shift: vector * factor for shift, vector in vectors.items()}


@dataclass(frozen=True)
class _Labels:
    """Sample to which each element of a tensor belongs, decoded from the relative change of its relevance.

    Attributes:
        samples: The sample of each element, or -1 where no relevance arrives.
        mass: ``|R|`` of each element.
        are_mixed: Whether some elements depend on several samples.
    """

    samples: Tensor
    mass: Tensor
    are_mixed: bool

    @classmethod
    def of(cls, vectors: Vectors[int], count: int) -> _Labels:
        plain = vectors[-1]
        mass = plain.abs()
        labels = torch.zeros(plain.shape, dtype=torch.int32, device=plain.device)
        is_pure = is_known = mass > torch.finfo(plain.dtype).tiny * 2**24  # below, the ratio is rounded
        for shift, vector in vectors.items():
            if shift >= 0:
                exponent = (vector / plain).log2_()  # nan if the signs differ
                power = exponent.round()
                is_pure = is_pure & (exponent.sub_(power).abs_() <= RATIO)
                labels += power.nan_to_num_(0.0, 0.0, 0.0).to(torch.int32) << shift
        are_mixed = bool((mass * (is_known & ~is_pure)).sum() > MIXED * mass.sum())
        return cls(torch.where(is_pure & (labels < count), labels, -1), mass, are_mixed)

    @property
    def are_known(self) -> bool:
        """True if the sample of at least one element is known."""
        return bool((self.samples >= 0).any())


class _Finder(Visitor[int]):
    """Callbacks of a pass that determine which dimension of each tensor indexes the samples."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.layouts: dict[Buffer, Layout | None] = {}
        self.several: dict[Buffer, list[Layout]] = {}
        self.labels: dict[Buffer, Tensor] = {}
        self.leaves: dict[int, Tensor] = {}
        self._last: tuple[Buffer, Tensor] | None = None

    def at_buffer(self, buffer: Buffer, vectors: Vectors[int]) -> Vectors[int]:
        vectors = _in_range(vectors)
        if self.samples.graph.vertices[buffer.vertex].leaf is not None:
            self.leaves[buffer.vertex] = vectors[-1]
        if self._last is not None and vectors[-1].is_set_to(self._last[1]):  # relevance is unchanged by a step
            self._copy(self._last[0], buffer)
            return vectors
        self._last = buffer, vectors[-1]
        with self.samples.inspecting():
            labels = _Labels.of(vectors, self.samples.count)
            if is_valueless():  # layouts are then derived from shapes
                return vectors
            fitting = layouts_of(labels.samples, self.samples.count, labels.mass) if labels.are_known else []
        if labels.are_mixed:
            raise self.samples.error(f"a tensor of shape {tuple(labels.mass.shape)}")
        if labels.are_known:
            # A layout that is assumed may fit the few known slices by coincidence.
            is_certain = len(fitting) == 1 and (not fitting[0].is_assumed or fitting[0].is_plain)
            if is_certain and not (fitting[0].is_assumed and self.samples.has_constant_layouts):
                self.layouts[buffer] = fitting[0]
            else:
                self.several[buffer] = fitting
                self.labels[buffer] = labels.samples
        return vectors

    def _copy(self, known: Buffer, buffer: Buffer) -> None:
        if known in self.layouts:
            self.layouts[buffer] = self.layouts[known]
        if known in self.several:
            self.several[buffer] = self.several[known]
        if known in self.labels:
            self.labels[buffer] = self.labels[known]


__all__ = ["Samples"]
