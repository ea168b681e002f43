"""Tables of docs/joint-relevance.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.markdown import grid

Results = dict[str, Any]
JOINTS = {
    "joint, tangents": "tangents",
    "joint, secants": "secants",
    "joint, NRMDefault": "default",
    "joint, EpsilonPlusFlat": "EpsilonPlusFlat",
    "joint, NRMAbsolute": "NRMAbsolute",
    "zennit-crp, EpsilonPlusFlat": "zennit-crp",
}
PATCHED = {"zero": "zero", "input": "reference input"}
METRICS = {"correlation": ("minus best product", 1), "error": ("error minus best product", -1)}
"""By metric: the key of the paired difference from the best product, and +1 if large values are better."""
SCORES = ("tangents", "secants", "by the rule")
"""Scores that are counted. The rule is tangents for single neurons in two layers, and secants otherwise."""


def path_patching(results: Results) -> dict[str, str]:
    """Joint relevance compared with the best product in all nets, and correlations with path patching by net."""
    found = {"standing": _standing(results), "differences": _differences(results)}
    for name, net in results["nets"].items():
        rows, errors = [], []
        for kind, start, measured in _rows(net):
            scores, best, closest = measured["scores"], measured["best product"], measured["closest product"]
            shown = [scores.get(score) for score in JOINTS]
            about = kind, PATCHED[start]
            cells = [f"{row['correlation'][0]:.3f}" if row else "" for row in shown]
            rows.append([*about, *cells, f"{scores[best]['correlation'][0]:.3f}, {_short(best)}"])
            wrong = [f"{row['error']:.2f}" if row else "" for row in shown]
            behind = [_difference(row["error minus best product"], 2) for row in shown[:2] if row]
            errors.append([*about, *wrong, f"{scores[closest]['error']:.2f}, {_short(closest)}", *behind])
        columns = f"| sets | patched with | {' | '.join(JOINTS.values())} | best product |"
        found[name] = grid(columns, rows)
        found[f"{name}, errors"] = grid(f"{columns} tangents minus it | secants minus it |", errors)
    return found | {f"{name}, channels": table for name, table in _channels(results)}


def _rows(net: Results) -> Iterator[tuple[str, str, Results]]:
    for kind, one in net["kinds"].items():
        for start, measured in one["references"].items():
            yield kind, start, measured


def _short(product: str) -> str:
    return product.removeprefix("product of ")


def _difference(values: list[float], digits: int = 3) -> str:
    return "{:+.{d}f} ({:+.{d}f} to {:+.{d}f})".format(*values, d=digits)


def _differences(results: Results) -> str:
    rows = []
    for name, net in results["nets"].items():
        for kind, start, measured in _rows(net):
            shown = [measured["scores"].get(score) for score in list(JOINTS)[:3]]
            ahead = [_difference(row["minus best product"]) if row else "" for row in shown]
            rows.append([name, kind, PATCHED[start], *ahead, _difference(measured["secants minus tangents"])])
    return grid("| network | sets | patched with | tangents | secants | default | secants minus tangents |", rows)


def _standing(results: Results) -> str:
    """Rows in which joint relevance is better than the best product, level with it, or worse, by net and metric."""
    rows, sums = [], {score: [0] * 6 for score in SCORES}
    for name, net in results["nets"].items():
        for score in SCORES:
            cells = [count for metric in METRICS for count in _counted(net, score, metric)]
            rows.append([name, score, *cells])
            sums[score] = [one + other for one, other in zip(sums[score], cells, strict=True)]
    rows += [["*all*", score, *cells] for score, cells in sums.items()]
    head = " | ".join(f"{metric}: {place}" for metric in METRICS for place in ("better", "level", "worse"))
    said = [
        f"{score}: {cells[0] + cells[1]} of {sum(cells[:3])} by correlation, "
        f"{cells[3] + cells[4]} of {sum(cells[3:])} by error"
        for score, cells in sums.items()
    ]
    return f"First or level, {'; '.join(said)}.\n\n" + grid(f"| network | score | {head} |", rows)


def _counted(net: Results, score: str, metric: str) -> list[int]:
    key, better = METRICS[metric]
    places = []
    for kind, _, measured in _rows(net):
        slopes = score if score != SCORES[2] else "tangents" if is_edge(kind) else "secants"
        _, low, high = measured["scores"][f"joint, {slopes}"][key]
        places.append(better * ((low > 0) - (high < 0)))
    return [places.count(place) for place in (1, 0, -1)]


def is_edge(kind: str) -> bool:
    """Returns whether the chains of a kind are edges between single neurons of two layers."""
    return kind.startswith("single") and "2 layers" in kind


def _channels(results: Results) -> Iterator[tuple[str, str]]:
    """Yields the channels of all layers in one ranking, by net, and the places of our scores."""
    figures = [(key, fill) for key in ("correlation", "SRG") for fill in PATCHED]
    columns = " | ".join(f"{key}, {PATCHED[fill]}" for key, fill in figures)
    for name, net in results["nets"].items():
        if "channels" not in net:
            continue
        fills = net["channels"]
        cells = (
            [score, *("{:.3f} ({:.3f}–{:.3f})".format(*fills[fill][score][key]) for key, fill in figures)]
            for score in fills["zero"]
        )
        places = {
            score: sum(fills[fill][score][f"{key} minus best other"][2] >= 0 for key, fill in figures)
            for score in fills["zero"]
            if score.startswith("μ")
        }
        said = "; ".join(f"{score.removeprefix('μ, ')} {count}" for score, count in places.items())
        yield name, f"First or level, of {len(figures)} columns: {said}.\n\n{grid(f'| score | {columns} |', cells)}"
