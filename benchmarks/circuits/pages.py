"""Tables of docs/circuits.md and docs/known-circuit.md."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import grid, with_bounds

Results = dict[str, Any]


def circuits(results: Results) -> dict[str, str]:
    """Returns the tables of differences from the reference measure, and of edge scores by net."""
    head = "| score | CMD ↓ | CPR ↑ | CMD, one circuit ↓ | edges ↑ | nodes ↑ | passes | passes, time | edges, time |"
    tables = {}
    for name, net in results["nets"].items():
        rows = []
        for score, row in net["scores"].items():
            cells = ["{:.3f} ({:.3f}–{:.3f})".format(*row[key]) for key in ("CMD", "CPR")]
            cells += [f"{row[key][0]:.3f}" for key in ("CMD, one circuit", "single edges", "single nodes")]
            forward, backward = results["passes"][score]
            rows.append([score, *cells, f"{forward} + {backward}", *(f"{time:.1f}" for time in net["time"][score])])
        tables[name] = grid(head, rows)
    nets, key = results["nets"].values(), "CMD minus that of the reference measure"
    rows = [
        [score, *(with_bounds(net["scores"][score][key], 3, "+") for net in nets)]
        for score in results["passes"]
        if any(net["scores"][score][key][0] for net in nets)
    ]
    kinds = (f"{name}, {net['edges']:,} edges" for name, net in results["nets"].items())
    tables["differences"] = grid(f"| Δ CMD relative to the reference measure | {' | '.join(kinds)} |", rows)
    if "cost" in results:
        costs = ([job, *(f"{net[job]:.1f}" for net in results["cost"].values())] for job in results["cost"]["vgg16"])
        tables["cost"] = grid(f"| method | {' | '.join(results['cost'])} |", costs)
    return tables


def known_circuit(results: Results) -> dict[str, str]:
    """Returns the tables of AUROC, of the program by heads and neurons, and of its masses for one number."""
    rows = []
    for score, row in results["scores"].items():
        cells = ["{:.3f} ({:.3f}–{:.3f})".format(*row[key]) for key in COMPARED]
        forward, backward = results["passes"][score]
        rows.append([score, *cells, f"{forward} + {backward}"])
    masses = {
        name: mass for found in results["flow"]["masses"].values() for name, mass in found.items() if name != "erase"
    }
    predicted = results["flow"]["predicted"]
    program = [
        [name, place, read, percentage(masses[name]), percentage(predicted.get(name, 0.0))]
        for name, place, read in results["operations"]
        if name in masses
    ]
    counts = [[key, f"{results[key]:,}"] for key in COUNTS]
    return {
        "scores": grid(f"| score | {' | '.join(COMPARED.values())} | forward + backward passes |", rows),
        "program": grid("| value | where | reads | measured | by the program |", program),
        "counts": grid("| network and pairs | number |", counts),
    }


COMPARED = {
    "edges": "known edges ↑",
    "edges that share a column": "known edges, among those sharing a column ↑",
    "nodes": "known nodes ↑",
    "active edges": "active edges ↑",
    "active edges that share a column": "active edges, among those sharing a column ↑",
    "CMD": "CMD ↓",
}
COUNTS = (
    "layers", "heads", "neurons", "edges", "known edges", "edges that share a column", "active edges", "nodes",
    "known nodes", "pairs",
)  # fmt: skip


def percentage(mass: float) -> str:
    """Formats a mass as a percentage."""
    return f"{100 * mass:.4g}%"
