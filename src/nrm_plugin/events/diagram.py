"""Ordered decision diagrams of events, which decide step by step whether a walk belongs to an event.

The variables are ordered as a walk crosses their taps (hook points), from the output to the input. Crossing a tap
decides all atoms at this tap, and a node represents the formula that remains to be decided. A pass propagates one
relevance vector per live node at each tap. The largest number of live nodes is the width of the diagram. It can be 2
even if the disjunctive normal form of the formula has exponential size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .event import All, Any_, Event, Not

FALSE, TRUE = 0, 1


@dataclass
class Diagram:
    """Reduced ordered decision diagram with shared nodes and one root per event.

    Variables are numbered in walk order, and ``levels[v]`` is the index of the tap that decides variable ``v``. Node 0
    is false and node 1 is true.
    """

    levels: Sequence[int]
    _nodes: list[tuple[int, int, int]] = field(default_factory=list)
    _unique: dict[tuple[int, int, int], int] = field(default_factory=dict)
    _memo: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        end = len(self.levels)
        self._nodes = [(end, FALSE, FALSE), (end, TRUE, TRUE)]

    def build(self, event: Event, variables: Mapping[Event, int]) -> int:
        """Adds an event to the diagram and returns its node.

        Args:
            event: The event to add.
            variables: Index of the variable that represents each atom.
        """
        if isinstance(event, Not):
            return self._negate(self.build(event.part, variables))
        if isinstance(event, (All, Any_)):
            both = self._and if isinstance(event, All) else self._or
            result = TRUE if isinstance(event, All) else FALSE
            for part in event.parts:
                result = both(result, self.build(part, variables))
            return result
        return self._make(variables[event], FALSE, TRUE)

    def level(self, node: int) -> int:
        """Returns the index of the tap that decides a node. Terminal nodes have the index after the last tap."""
        variable = self._nodes[node][0]
        return self.levels[variable] if variable < len(self.levels) else max(self.levels, default=-1) + 1

    def step(self, node: int, level: int, answers: int) -> int:
        """Returns the node reached after a walk has crossed tap ``level``.

        Args:
            node: The node before the crossing.
            level: Index of the tap that was crossed. Undecided atoms of higher taps count as false.
            answers: Bit mask of the variables that are true.
        """
        while node > TRUE and self.level(node) <= level:
            variable, low, high = self._nodes[node]
            node = high if answers >> variable & 1 else low
        return node

    def is_touched(self, node: int, level: int) -> bool:
        """Returns True if crossing tap ``level`` can change the node."""
        return node > TRUE and self.level(node) <= level

    def variables(self, node: int) -> set[int]:
        """Returns the variables on which a node depends."""
        variables: set[int] = set()
        stack = [node]
        seen = set()
        while stack:
            current = stack.pop()
            if current <= TRUE or current in seen:
                continue
            seen.add(current)
            variable, low, high = self._nodes[current]
            variables.add(variable)
            stack += [low, high]
        return variables

    def width(self, roots: Sequence[int]) -> int:
        """Returns the maximum number of undecided nodes at any one tap, over all roots."""
        alive: dict[int, set[int]] = {}
        for root in roots:
            stack, seen = [root], set()
            while stack:
                node = stack.pop()
                if node <= TRUE or node in seen:
                    continue
                seen.add(node)
                alive.setdefault(self.level(node), set()).add(node)
                stack += self._nodes[node][1:]
        return max((len(nodes) for nodes in alive.values()), default=0)

    def _make(self, variable: int, low: int, high: int) -> int:
        if low == high:
            return low
        key = (variable, low, high)
        if key not in self._unique:
            self._unique[key] = len(self._nodes)
            self._nodes.append(key)
        return self._unique[key]

    def _negate(self, node: int) -> int:
        return self._apply("not", node, TRUE)

    def _and(self, left: int, right: int) -> int:
        return self._apply("and", left, right)

    def _or(self, left: int, right: int) -> int:
        return self._apply("or", left, right)

    def _apply(self, operation: str, left: int, right: int) -> int:
        settled = _SETTLED[operation](left, right)
        if settled is not None:
            return settled
        key = (operation, left, right)
        if key not in self._memo:
            variable = min(self._nodes[left][0], self._nodes[right][0])
            low = self._apply(operation, self._branch(left, variable, 1), self._branch(right, variable, 1))
            high = self._apply(operation, self._branch(left, variable, 2), self._branch(right, variable, 2))
            self._memo[key] = self._make(variable, low, high)
        return self._memo[key]

    def _branch(self, node: int, variable: int, side: int) -> int:
        return self._nodes[node][side] if self._nodes[node][0] == variable else node


def _settled_and(left: int, right: int) -> int | None:
    if FALSE in (left, right):
        return FALSE
    if left in (TRUE, right):
        return right
    return left if right == TRUE else None


def _settled_or(left: int, right: int) -> int | None:
    if TRUE in (left, right):
        return TRUE
    if left in (FALSE, right):
        return right
    return left if right == FALSE else None


def _settled_not(node: int, _: int) -> int | None:
    return 1 - node if node <= TRUE else None


_SETTLED: dict[str, Callable[[int, int], int | None]] = {
    "and": _settled_and,
    "or": _settled_or,
    "not": _settled_not,
}
