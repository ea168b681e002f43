"""Decision diagrams of events compared with truth tables."""

from __future__ import annotations

import itertools
import operator

from hypothesis import given
from hypothesis import strategies as st

from nrm_plugin import at
from nrm_plugin.events.diagram import FALSE, TRUE, Diagram
from nrm_plugin.events.event import All, Event, Not

LEVELS = [0, 0, 1, 2, 2]
"""The tap of each variable."""
ATOMS = [at("conv")[neuron] for neuron in range(len(LEVELS))]
VARIABLES: dict[Event, int] = {atom: variable for variable, atom in enumerate(ATOMS)}

EVENTS = st.recursive(
    st.sampled_from(ATOMS),
    lambda parts: st.one_of(
        parts.map(operator.invert),
        st.builds(operator.and_, parts, parts),
        st.builds(operator.or_, parts, parts),
    ),
    max_leaves=12,
)


def truth(event: Event, answers: int) -> bool:
    """Returns True if an event holds, where bit ``v`` is the value of variable ``v``."""
    if event in VARIABLES:
        return bool(answers >> VARIABLES[event] & 1)
    if isinstance(event, Not):
        return not truth(event.part, answers)
    return (all if isinstance(event, All) else any)([truth(part, answers) for part in event.parts])


def truth_table(event: Event) -> tuple[bool, ...]:
    return tuple(truth(event, answers) for answers in range(2 ** len(LEVELS)))


def cofactors(table: tuple[bool, ...], variable: int) -> set[tuple[bool, ...]]:
    """What remains of a truth table once the variables before this one are decided, where it depends on this one."""
    step = 2**variable
    remaining = {table[above::step] for above in range(step)}
    return {rest for rest in remaining if rest[::2] != rest[1::2]}


@given(EVENTS, st.sets(st.sampled_from(LEVELS)))
def test_a_walk_decides_an_event_and_atoms_of_taps_that_it_does_not_cross_are_false(event, crossed):
    diagram = Diagram(LEVELS)
    root = diagram.build(event, VARIABLES)
    mask = sum(1 << variable for variable, level in enumerate(LEVELS) if level in crossed)
    for answers in range(2 ** len(LEVELS)):
        node = root
        for level in sorted(crossed):
            node = diagram.step(node, level, answers & mask)
        assert diagram.step(node, max(LEVELS), 0) == (TRUE if truth(event, answers & mask) else FALSE)


@given(EVENTS, EVENTS)
def test_events_have_the_same_node_exactly_if_they_have_the_same_truth_table(first, second):
    diagram = Diagram(LEVELS)
    nodes = [diagram.build(event, VARIABLES) for event in (first, second, ~first, first & second, first | second)]
    tables = [truth_table(event) for event in (first, second, ~first, first & second, first | second)]
    for i, k in itertools.combinations(range(len(nodes)), 2):
        assert (nodes[i] == nodes[k]) == (tables[i] == tables[k])


@given(EVENTS)
def test_a_node_depends_on_the_variables_that_change_its_truth_table(event):
    diagram = Diagram(LEVELS)
    root = diagram.build(event, VARIABLES)
    table = truth_table(event)
    assert diagram.variables(root) == {
        v for v in range(len(LEVELS)) if any(table[answers] != table[answers ^ 1 << v] for answers in range(len(table)))
    }
    first = min(diagram.variables(root), default=None)
    assert diagram.level(root) == (max(LEVELS) + 1 if first is None else LEVELS[first])
    for level in set(LEVELS):
        assert diagram.is_touched(root, level) == (first is not None and LEVELS[first] <= level)


@given(EVENTS, EVENTS)
def test_width_is_the_largest_number_of_cofactors_undecided_at_one_tap(first, second):
    diagram = Diagram(LEVELS)
    roots = [diagram.build(event, VARIABLES) for event in (first, second)]
    tables = [truth_table(event) for event in (first, second)]
    numbers = dict.fromkeys(LEVELS, 0)
    for variable, level in enumerate(LEVELS):
        numbers[level] += len(set.union(*(cofactors(table, variable) for table in tables)))
    assert diagram.width(roots) == max(numbers.values())


def test_a_formula_with_an_exponential_disjunctive_form_has_width_two():
    pairs = 12
    atoms = [at("conv")[neuron] for neuron in range(2 * pairs)]
    event = atoms[0] | atoms[1]
    for left, right in zip(atoms[2::2], atoms[3::2], strict=True):
        event = event & (left | right)
    diagram = Diagram([variable // 2 for variable in range(2 * pairs)])
    assert diagram.width([diagram.build(event, {atom: variable for variable, atom in enumerate(atoms)})]) == 2
