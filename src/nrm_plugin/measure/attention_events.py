"""Conversion of events on attention heads, tokens and query-key pairs into events on recorded tensors (taps)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import EventError, brief
from ..events.event import Absorbed, All, Any_, Atom, Attended, Event, at
from ..events.neuron_index import Index, show
from ..functional.attention import Layout
from ..kernels.step import Step
from ..recording.head_dims import head_dim
from ..recording.module_names import OUTPUT
from ..recording.recording import Recording
from ..recording.transformer_sites import PART


def plain(atom: Atom | Absorbed | Attended, recording: Recording) -> Event:
    """Rewrites an event on attention pairs as an equivalent event over taps (hook points).

    Other events are returned unchanged.

    A walk through a pair (query, key) crosses the attention output at the query token and then the values at the key
    token (or the attention weights, if the rule propagates relevance to them). It stays within one head.

    Raises:
        EventError: If the layer does not call attention exactly once, or if the head or token does not exist.
        UnknownLayerError: If the event names a layer that does not exist.
    """
    if isinstance(atom, Atom):
        atom = _part(atom, recording)
    if not isinstance(atom, Attended):
        return atom
    events = [_event(atom, step, recording) for step in _steps_of(atom, recording)]
    return events[0] if len(events) == 1 else Any_(tuple(events))


def head_count(recording: Recording, layer: str) -> int | None:
    """Returns the number of heads of an attention layer, given by site or tap name. Returns None for other layers."""
    name, calls = recording.taps.called(layer, "output", None)
    steps = [vertex.step for vertex in recording.graph.vertices if vertex.step is not None]
    step = next((s for s in steps if s.name == name and s.call in calls and s.attention is not None), None)
    if step is None:
        return None
    dim = _head_dim(step, recording)
    if dim is not None and not _is_of_samples(step, dim, recording):
        return int(step.shape[dim])
    return _count_of_heads(step, step.shape[dim] if dim is not None else 1, recording)


def _part(atom: Atom, recording: Recording) -> Atom | Attended:
    """Resolves a site name such as ``blocks.1.attn.head.3`` or ``blocks.1.mlp.neuron.17`` to a head or neuron."""
    match = PART.fullmatch(atom.layer) if isinstance(atom.layer, str) and atom.index is None else None
    if match is None or atom.side != "output" or recording.taps.calls_of(match[0]):
        return atom
    whole = match["site"] or match["layer"]
    if recording.taps.site(whole) is None and not (match["site"] and recording.taps.calls_of(whole)):
        return atom
    if match["site"]:
        return at(match["site"]).head(int(match["head"]))
    return at(match["layer"]).channel(int(match["neuron"]))


def _event(atom: Attended, step: Step, recording: Recording) -> Event:
    layout: Layout = step.attention
    shape = step.shape
    mask = torch.ones(shape, dtype=torch.bool)
    if atom.heads is not None:
        mask &= _of_heads(atom, atom.heads, step, shape, recording)
    if atom.queries is not None:
        mask &= _along(shape, layout.queries, _chosen(atom, "token", atom.queries, shape[layout.queries]))
    (output,) = recording.taps.find(step.name, "output", step.call)
    above = at(step.name, call=step.call)[_shortened(output.layout.unfold(mask))]
    if atom.keys is None:
        return above
    below: list[Event] = []
    single = len(recording.taps.items(step.name, "input", step.call)) == 1
    for number, dim in layout.keys:
        tap = at(step.name, "input", step.call, None if single else number)
        (place,) = recording.taps.find(tap.layer, tap.side, tap.call, tap.item)
        size = place.tensor_shape
        chosen = _chosen(atom, "token", atom.keys, size[dim])
        below.append(tap[_shortened(place.layout.unfold(_along(size, dim, chosen).expand(size)))])
    return All((above, below[0] if len(below) == 1 else Any_(tuple(below))))


def _of_heads(atom: Attended, index: Index, step: Step, shape: torch.Size, recording: Recording) -> Tensor:
    """Returns a mask of the selected heads. Heads have their own dimension or share one with the samples."""
    dim = _head_dim(step, recording)
    rows = shape[dim] if dim is not None else 1
    if dim is not None and not _is_of_samples(step, dim, recording):
        return _along(shape, dim, _chosen(atom, "head", index, rows))
    count = _count_of_heads(step, rows, recording)
    if count is None:
        raise EventError(
            f"{atom}: the heads of {step.name!r} cannot be distinguished from the {recording.samples.count} samples in "
            f"its dimension of {rows}. Construct a measure of one sample."
        )
    chosen = _chosen(atom, "head", index, count).repeat(rows // count)
    return _along(shape, dim, chosen) if dim is not None else chosen.reshape(())


def _head_dim(step: Step, recording: Recording) -> int | None:
    vertices = recording.graph.vertices
    return head_dim(recording.graph, next(n for n, vertex in enumerate(vertices) if vertex.step is step))


def _is_of_samples(step: Step, dim: int, recording: Recording) -> bool:
    """Returns True if the samples, too, are in a dimension."""
    return bool(recording.samples.batched and dim == step.attention.shared[0])


def _count_of_heads(step: Step, rows: int, recording: Recording) -> int | None:
    owner = next((module for module, name in recording.taps.modules.items() if name == _owner(step)), None)
    if isinstance(owner, nn.MultiheadAttention):
        return int(owner.num_heads)
    return rows // recording.samples.count if rows % recording.samples.count == 0 else None


def _chosen(atom: Attended, what: str, index: Index, count: int) -> Tensor:
    """Returns a boolean mask of shape ``(count,)`` of the selected heads or tokens."""
    chosen = torch.zeros(count, dtype=torch.bool)
    try:
        chosen[index.value] = True
    except IndexError as error:
        raise EventError(
            f"{atom}: no {what} {show(index.value)}; the attention has {count} {what}s, 0 to {count - 1}."
        ) from error
    return chosen


def _along(shape: torch.Size, dim: int, chosen: Tensor) -> Tensor:
    view = [1] * len(shape)
    view[dim] = -1
    return chosen.view(view)


def _shortened(mask: Tensor) -> Tensor:
    """Reduces the sample dimension to size one if the mask is the same for all samples."""
    return mask[0] if len(mask) == 1 or bool((mask == mask[:1]).all()) else mask


def _steps_of(atom: Attended, recording: Recording) -> list[Step]:
    """Returns the steps that compute the attention of a layer, one for each selected call."""
    name, calls = recording.taps.called(atom.atom.layer, "output", atom.atom.call)
    steps = [vertex.step for vertex in reversed(recording.graph.vertices) if vertex.step is not None]
    known = [step for step in steps if step.attention is not None]
    own = [step for step in known if step.name == name]
    if own:
        return [step for step in own if step.call in calls]
    inside = [step for step in known if name == OUTPUT or step.name.startswith(f"{name.removeprefix('.')}.")]
    of_calls = recording.taps.calls_of(name)
    if len(inside) == len(of_calls):
        return [inside[of_calls.index(call)] for call in calls]
    if inside:
        raise EventError(f"{atom}: {name!r} has {len(inside)} attention calls; choose one of: {_expressions(inside)}.")
    others = f" These layers do: {_expressions(known)}." if known else " No layer does."
    raise EventError(f"{atom}: {name!r} computes no attention on which the output depends.{others}")


def _expressions(steps: list[Step], most: int = 8) -> str:
    """Formats each step as the shortest unambiguous ``at(…)`` expression, separated by commas."""
    names, owners = [step.name for step in steps], [_owner(step) for step in steps]
    texts = []
    for step, name, owner in zip(steps, names, owners, strict=True):
        alone = owner and owners.count(owner) == 1
        call = f", call={step.call}" if names.count(name) > 1 else ""
        texts.append(f"at({brief(owner)})" if alone else f"at({name!r}{call})")
    return ", ".join(texts[:most]) + (" and more" if len(texts) > most else "")


def _owner(step: Step) -> str:
    """Returns the path of the module that called the operation of a step."""
    return step.name.rpartition(".")[0]


__all__ = ["head_count", "plain"]
