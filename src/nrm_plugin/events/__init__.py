"""Events: sets of walks, written as formulas over the neurons that a walk crosses.

The package also holds decision diagrams of events, and events as JSON.
Imports: errors.
"""

from .event import ABSORBED, Absorbed, All, Any_, Atom, Attended, Event, Not, at

__all__ = ["ABSORBED", "Absorbed", "All", "Any_", "Atom", "Attended", "Event", "Not", "at"]
