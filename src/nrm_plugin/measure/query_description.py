"""Description of a query: formula, meaning in words and cost."""

from __future__ import annotations

from ..events.event import Absorbed, All, Any_, Atom, Attended, Event, Not
from ..events.neuron_index import show
from ..recording.recording import Recording
from .conditions import check_event
from .decision_diagram import DecisionDiagram


def explanation(recording: Recording, event: Event, given: Event | None) -> str:
    """Describes a query in three lines: formula, meaning in words and cost."""
    check_event(event)
    if given is not None:
        check_event(given, "given= takes one event. ")
    diagram = DecisionDiagram(recording, [event] if given is None else [event & given, given])
    formula = f"μ({event})" if given is None else f"μ({event} | {given}) = μ({event & given}) / μ({given})"
    subject = f"the share of relevance carried by the walks that {words(event)}"
    if given is not None:
        subject = (
            f"among the walks that {words(given)}, the share of relevance carried by those that also {words(event)}"
        )
    steps, all_steps = _steps(diagram)
    width = diagram.nodes.width(diagram.roots)
    return (
        f"{formula}\n{subject[0].upper()}{subject[1:]}.\n"
        f"Cost: one pass over {steps} of {all_steps} steps, with at most {max(1, width)} "
        f"relevance vector{'s' if width > 1 else ''} for an undecided walk."
    )


def words(event: Event) -> str:
    """Describes an event in words, as a predicate that completes the phrase "the walks that …"."""
    if isinstance(event, Absorbed):
        return "are absorbed anywhere"
    if isinstance(event, Not):
        return _negated(event.part)
    if isinstance(event, All):
        return " and ".join(_inner(part) for part in event.parts)
    if isinstance(event, Any_):
        return "either " + " or ".join(_inner(part) for part in event.parts)
    if isinstance(event, Attended):
        return _attended(event)
    assert isinstance(event, Atom)
    return _atom(event)


def _inner(event: Event) -> str:
    return f"({words(event)})" if isinstance(event, (All, Any_)) else words(event)


def _negated(event: Event) -> str:
    if isinstance(event, Absorbed):
        return "reach the input"
    if isinstance(event, Atom) and event.side == "sink":
        return words(event).replace("are absorbed", "are not absorbed")
    if isinstance(event, (Atom, Attended)):
        is_whole = isinstance(event, Atom) and event.index is None
        others = "" if is_whole else "cross other neurons, "
        return f"do not {words(event)} (they {others}bypass it, or are absorbed above it)"
    return f"do not ({words(event)})"


def _atom(atom: Atom) -> str:
    name = atom.layer if isinstance(atom.layer, str) else type(atom.layer).__name__
    where = f"{name!r}" + (f" in call {atom.call}" if atom.call is not None else "")
    if atom.side == "input":
        where = f"the input of {where}"
    if atom.index is not None:
        key = show(atom.index.value)
        where = f"{where} in channel {key}" if atom.along_channel else f"{where} at [{key}]"
    return f"are absorbed in {where}" if atom.side == "sink" else f"cross {where}"


def _attended(event: Attended) -> str:
    atom = event.atom
    name = atom.layer if isinstance(atom.layer, str) else type(atom.layer).__name__
    text = f"pass through the attention of {name!r}" + (f" in call {atom.call}" if atom.call is not None else "")
    for what, index in (("in head", event.heads), ("from query token", event.queries), ("to key token", event.keys)):
        text += "" if index is None else f" {what} {show(index.value)}"
    return text


def _steps(diagram: DecisionDiagram) -> tuple[int, int]:
    """Returns the number of steps that a query visits and the total number of steps."""
    vertices = diagram.recording.graph.vertices
    steps = [number for number, vertex in enumerate(vertices) if vertex.step is not None]
    levels = [diagram.depends(root) for root in diagram.roots]
    needed = [number for number in steps if any(depends & diagram.open[number] for depends in levels)]
    return len(needed), len(steps)
