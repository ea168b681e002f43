"""Tables of docs/joint-relevance.md and docs/joint-relevance-details.md."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.markdown import grid, with_bounds

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
ERROR = "error minus best product"
"""The key of this difference, which earlier results do not contain."""
METRICS = {"correlation": ("minus best product", 1), "error": (ERROR, -1)}
"""By metric: the key of the paired difference from the best product, and +1 if large values are better."""
FIGURES = [(key, fill) for key in ("correlation", "SRG") for fill in PATCHED]
SUMMARIZED = {
    "joint, secants": "secants",
    "joint, tangents": "tangents",
    "joint, NRMDefault": "`NRMDefault`, no reference",
}
"""Scores of the summary, with their names."""
SCORES = ("tangents", "secants")
"""Scores that are counted, each in rows of its own."""
MIXED = "tangents or secants"
"""Tangents for single channels or heads in two layers, and secants otherwise; counted in a sentence only."""


def path_patching(results: Results) -> dict[str, str]:
    """Returns the tables of joint relevance against the best product, and of correlations with path patching."""
    found = {"standing": _standing(results), "differences": _differences(results)}
    for name, net in results["nets"].items():
        rows, errors = [], []
        for kind, start, measured in _rows(net):
            scores, best = measured["scores"], measured["best product"]
            closest = measured.get("closest product", best)
            shown = [scores.get(score) for score in JOINTS]
            about = kind, PATCHED[start]
            cells = [f"{row['correlation'][0]:.3f}" if row else "" for row in shown]
            rows.append([*about, *cells, f"{scores[best]['correlation'][0]:.3f}, {_short(best)}"])
            wrong = [f"{row['error']:.2f}" if row else "" for row in shown]
            behind = [with_bounds(row[ERROR], sign="+") if row and ERROR in row else "" for row in shown[:2]]
            errors.append([*about, *wrong, f"{scores[closest]['error']:.2f}, {_short(closest)}", *behind])
        columns = f"| sets | patched with | {' | '.join(JOINTS.values())} | best product |"
        found[name] = grid(columns, rows)
        found[f"{name}, errors"] = grid(f"{columns} tangents - best product | secants - best product |", errors)
    found["places"] = _places(results)
    return found | {f"{name}, channels": table for name, table in _channels(results)}


def path_patching_summary(results: Results) -> dict[str, str]:
    """Joint relevance compared with the best product, by network: wins, ties and losses, and median differences."""
    lines, sums = [], {score: [0] * 3 for score in SUMMARIZED}
    for name, net in results["nets"].items():
        settings = [measured["scores"] for *_, measured in _rows(net)]
        cells = []
        for score in SUMMARIZED:
            behind = [scores[score]["minus best product"] for scores in settings]
            places = [(low > 0) - (high < 0) for _, low, high in behind]
            counts = [places.count(place) for place in (1, 0, -1)]
            sums[score] = [one + other for one, other in zip(sums[score], counts, strict=True)]
            means = [mean for mean, *_ in behind]
            cells += [_counts(counts), f"{median(means):+.2f} ({min(means):+.2f} to {max(means):+.2f})"]
        lines.append([name, len(settings), *cells])
    whole = [cell for counts in sums.values() for cell in (f"**{_counts(counts)}**", "")]
    lines.append(["**all**", sum(sums["joint, secants"]), *whole])
    head = " | ".join(f"{name} | difference" for name in SUMMARIZED.values())
    return {"summary": grid(f"| network | settings | {head} |", lines)}


def _counts(counts: list[int]) -> str:
    return " / ".join(map(str, counts))


def _rows(net: Results) -> Iterator[tuple[str, str, Results]]:
    for kind, one in net["kinds"].items():
        for start, measured in one["references"].items():
            yield kind, start, measured


def _short(product: str) -> str:
    return product.removeprefix("product of ")


def _differences(results: Results) -> str:
    rows = []
    for name, net in results["nets"].items():
        for kind, start, measured in _rows(net):
            shown = [measured["scores"].get(score) for score in list(JOINTS)[:3]]
            ahead = [with_bounds(row["minus best product"], 3, "+") if row else "" for row in shown]
            rows.append([name, kind, PATCHED[start], *ahead, with_bounds(measured["secants minus tangents"], 3, "+")])
    return grid("| network | sets | patched with | tangents | secants | default | secants - tangents |", rows)


def _standing(results: Results) -> str:
    """Counts the rows in which joint relevance is better than, tied with or worse than the best product.

    Nets whose errors have no intervals are not counted by error.
    """
    rows, sums = [], {score: [0] * 6 for score in (*SCORES, MIXED)}
    for name, net in results["nets"].items():
        for score, total in sums.items():
            counts = [count for metric in METRICS for count in _counted(net, score, metric)]
            if score in SCORES:
                rows.append([name, score, *counts[:3], *(counts[3:] if any(counts[3:]) else [""] * 3)])
            sums[score] = [one + other for one, other in zip(total, counts, strict=True)]
    rows += [["*all*", score, *sums[score]] for score in SCORES]
    head = " | ".join(f"{metric}: {place}" for metric in METRICS for place in ("better", "level", "worse"))
    (right, settings, close, measured), secants, mixed = (_at_least_level(sums[score]) for score in (*SCORES, MIXED))
    said = (
        f"Joint relevance is at least level with the best product in {right} of {settings} settings by correlation "
        f"and {close} of {measured} by error with tangents, and in {secants[0]} of {secants[1]} and {secants[2]} of "
        f"{secants[3]} with secants. With tangents for single channels or heads in two layers, and secants for all "
        f"other sets, the counts are {mixed[0]} of {mixed[1]} and {mixed[2]} of {mixed[3]}."
    )
    return f"{said}\n\n{grid(f'| network | score | {head} |', rows)}"


def _at_least_level(counts: list[int]) -> tuple[int, int, int, int]:
    """Returns in how many settings a score is better or level, and of how many: by correlation, and by error."""
    return counts[0] + counts[1], sum(counts[:3]), counts[3] + counts[4], sum(counts[3:])


def _counted(net: Results, score: str, metric: str) -> list[int]:
    key, better = METRICS[metric]
    places = []
    for kind, _, measured in _rows(net):
        slopes = score if score in SCORES else "tangents" if is_edge(kind) else "secants"
        row = measured["scores"][f"joint, {slopes}"]
        if key in row:
            places.append(better * ((row[key][1] > 0) - (row[key][2] < 0)))
    return [places.count(place) for place in (1, 0, -1)]


def is_edge(kind: str) -> bool:
    """Returns True if the chains of a kind are edges between single neurons of two layers."""
    return kind.startswith("single") and "2 layers" in kind


def _channels(results: Results) -> Iterator[tuple[str, str]]:
    """Yields the tables of the channels of all layers in one ranking, by net."""
    columns = " | ".join(f"{key}, {PATCHED[fill]}" for key, fill in FIGURES)
    for name, fills in _rankings(results):
        cells = (
            [score, *("{:.3f} ({:.3f}–{:.3f})".format(*fills[fill][score][key]) for key, fill in FIGURES)]
            for score in fills["zero"]
        )
        yield name, grid(f"| score | {columns} |", cells)


def _rankings(results: Results) -> Iterator[tuple[str, Results]]:
    return ((name, net["channels"]) for name, net in results["nets"].items() if "channels" in net)


def _places(results: Results) -> str:
    """Counts the columns in which each score is first or within the interval of the first."""
    columns = [{score: row[key] for score, row in fills[fill].items()}
               for _, fills in _rankings(results) for key, fill in FIGURES]  # fmt: skip
    counts = {
        score: sum(column[score][0] >= max(column.values())[1] for column in columns)
        for score in (columns[0] if columns else ())
    }
    first = sorted(((score, count) for score, count in counts.items() if count), key=lambda one: -one[1])
    others = [("all others", 0)] if len(first) < len(counts) else []
    return grid(f"| score | columns of {len(columns)} |", [*first, *others])
