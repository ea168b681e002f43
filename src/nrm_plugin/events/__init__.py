"""Events: sets of walks, defined by Boolean formulas over the neurons that each walk crosses.

The package also provides decision diagrams for events and converts events to and from JSON.

Imports: errors.
"""

from .event import ABSORBED, Absorbed, All, Any_, Atom, Attended, Event, Not, at

__all__ = ["ABSORBED", "Absorbed", "All", "Any_", "Atom", "Attended", "Event", "Not", "at"]
