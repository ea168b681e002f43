"""Events: sets of walks, defined by Boolean formulas over the neurons that a walk crosses.

The package also provides decision diagrams of events and their conversion to JSON. Imports: errors.
"""

from .event import ABSORBED, Absorbed, All, Any_, Atom, Attended, Event, Not, at

__all__ = ["ABSORBED", "Absorbed", "All", "Any_", "Atom", "Attended", "Event", "Not", "at"]
