"""Resolution of events: layer names and indices are replaced by tensors of a recording and neuron masks.

An event is a formula over atoms, such as ``at("conv1")[3]``. An atom names a layer and neurons. Resolving it determines
the place (a tensor, an input of a step, or the sink of a step) and the mask that this name stands for in one recording.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EventError
from ..events.event import Absorbed, Any_, Atom, Attended, Event
from ..recording.places import Buffer, Edge, Sink
from ..recording.recording import Recording
from ..recording.sample_layout import Layout
from .attention_events import plain


@dataclass(frozen=True, eq=False, repr=False)
class Located(Event):
    """Resolved atom: the event that a walk crosses a tensor at a neuron in a mask, or is absorbed at such a neuron.

    Attributes:
        place: Where in the recording this occurs: a tensor, an input of a step (call of a layer or function), or the
            sink of a step, where walks are absorbed.
        mask: Boolean mask of neurons, of shape ``(N, *shape)``, or ``(1, *shape)`` if it is the same for all samples.
    """

    place: Buffer | Edge | Sink
    mask: Tensor

    def __str__(self) -> str:
        return f"{self.place}[mask of {int(self.mask.sum())}]"


class Locator:
    """Resolves each atom of an event to the place in the recording where it occurs, and to a mask of neurons.

    Atoms that resolve to the same place and mask become the same object.

    Args:
        recording: The recording of the forward pass.

    Attributes:
        atoms_at: Maps each place to the atoms resolved there.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._known: dict[Event, Event] = {}
        self.atoms_at: dict[Buffer | Edge | Sink, list[Located]] = {}

    def __call__(self, event: Event) -> Event:
        """Returns the same formula, with :class:`Located` atoms and ``ABSORBED`` in place of the given atoms.

        Raises:
            EventError: If an index does not match the shape of its tap.
            UnknownLayerError: If no tap has this name.
        """
        return event.mapped(self._located)

    def _located(self, atom: Event) -> Event:
        if atom not in self._known:
            self._known[atom] = self._looked_up(atom)
        return self._known[atom]

    def _looked_up(self, atom: Event) -> Event:
        if isinstance(atom, Absorbed):
            return atom
        assert isinstance(atom, (Atom, Attended))
        event = plain(atom, self._recording)
        if event is not atom:
            return self(event)
        assert isinstance(atom, Atom)
        parts = []
        for place, shape, dim in self._places(atom):
            layout = self._recording.samples.layout(place)
            mask = mask_of(atom, shape, dim, layout)
            parts.append(self._shared(place, mask if layout.is_plain else layout.fold(mask)))
        return parts[0] if len(parts) == 1 else Any_(tuple(parts))

    def _places(self, atom: Atom) -> list[tuple[Buffer | Edge | Sink, torch.Size, int]]:
        """Looks up the places that an atom refers to, each with the shape and channel dimension of its tensor."""
        taps = self._recording.taps
        if atom.side == "sink":
            return [self._sink(vertex) for vertex in taps.find_sinks(atom.layer, atom.call)]
        selected = taps.find(atom.layer, atom.side, atom.call, atom.item)
        return [(tap.place, tap.tensor_shape, tap.tensor_channel_dim) for tap in selected]

    def _sink(self, vertex: int) -> tuple[Sink, torch.Size, int]:
        output, samples, taps = Buffer(vertex, 0), self._recording.samples, self._recording.taps
        usual = 1 if samples.batched else -1
        channel_dim = taps.at(output).tensor_channel_dim if output in taps.index else usual
        return Sink(vertex), self._recording.graph.shape(output), channel_dim

    def _shared(self, place: Buffer | Edge | Sink, mask: Tensor) -> Located:
        known = self.atoms_at.setdefault(place, [])
        for other in known:
            if other.mask.shape == mask.shape and torch.equal(other.mask, mask):
                return other
        known.append(Located(place, mask))
        return known[-1]


def mask_of(atom: Atom, shape: torch.Size, channel_dim: int, layout: Layout) -> Tensor:
    """Computes the neuron mask of an atom, with samples first.

    An index applies to all dimensions of the tensor except the sample dimension. If windows, heads or views share this
    dimension with the samples, the index applies to all of them; a mask may have an additional dimension for them.

    Args:
        atom: The atom whose neurons are selected.
        shape: Shape of the tensor.
        channel_dim: Channel dimension of the tensor.
        layout: Layout of the tensor.

    Returns:
        A boolean tensor of shape ``(N, …)``, or ``(1, …)`` if it is the same for all samples.

    Raises:
        EventError: If the index does not match the tap.
    """
    in_tensor = channel_dim % max(len(shape), 1)
    channel_dim, shape = layout.channel_dim(channel_dim, len(shape)), layout.shape(shape)
    inner = torch.Size(shape[1:])
    if atom.index is None:
        return torch.ones((1, *inner), dtype=torch.bool)
    value = atom.index.value
    if atom.along_channel:
        return _channels(atom, shape, channel_dim)
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        if value.shape == inner:
            return value.clone().unsqueeze(0)
        if value.shape == layout.inner_of_views(inner, in_tensor):
            return layout.in_all_views(value, in_tensor).unsqueeze(0)
        if value.shape == shape:
            return value.clone()
        raise EventError(
            f"{atom}: a mask of shape {tuple(value.shape)} does not fit the tap. Its neurons have shape "
            f"{tuple(inner)}, with one mask for each of the {shape[0]} samples {tuple(shape)}. For a mask over "
            "channels use `at(layer).channel(mask)`."
        )
    selected = _selected(atom, layout.inner_of_views(inner, in_tensor))
    return layout.in_all_views(selected, in_tensor).unsqueeze(0)


def _channels(atom: Atom, shape: torch.Size, channel_dim: int) -> Tensor:
    if channel_dim % len(shape) == 0:
        raise EventError(f"{atom}: the tap of shape {tuple(shape)} has no channels.")
    view = [1] * len(shape)
    view[channel_dim] = -1
    chosen = _selected(atom, torch.Size([shape[channel_dim]]))
    return chosen.view(view).expand(1, *shape[1:]).clone()


def _selected(atom: Atom, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    assert atom.index is not None
    try:
        mask[atom.index.value] = True
    except (IndexError, TypeError, RuntimeError, ValueError, OverflowError) as error:
        raise EventError(
            f"{atom}: the index does not fit the neurons of the tap, which have shape {tuple(shape)} "
            f"(the batch is not indexed): {error}."
        ) from error
    return mask


__all__ = ["Located", "Locator", "mask_of"]
