"""Tables of docs/real.md and docs/real-details.md."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import grid, with_bounds

Results = dict[str, Any]

REAL = {
    "SRG, plain": "SRG, plain ↑", "SRG, blur": "SRG, blur ↑", "insertion": "insertion ↑", "deletion": "deletion ↓",
    "inside": "inside mask ↑", "pointing": "pointing ↑", "own": "own share ↑", "wins": "wins ↑",
    "other class": "other class ↓",
}  # fmt: skip
"""Metrics of explanations of trained networks, with the direction that is better."""
SHOWN = ("SRG, plain", "deletion", "inside", "pointing", "own", "wins")
"""Metrics of the comparison by network."""
CHOSEN_ON = {"EfficientNet-Lite0": "all", "VGG16": "one"}
"""Networks on which settings were chosen; all others are held out."""
SEEN = ("Fashion-MNIST, VGG", "Fashion-MNIST, residual")
"""Networks on which no setting was chosen, but on which variants were evaluated before the choice."""
OTHER_PACKAGES = ("GradCAM", "DeepLift", "IntegratedGradients", "expected gradients")
"""Prefixes of the methods of other packages. The other methods are further settings of the measure."""

SHORT = {"GradCAM, signed, against the rest": "signed GradCAM", "IntegratedGradients, 20 steps": "IntegratedGradients"}
"""Names of methods in the summary, where they differ from those in the results."""


def real(results: Results) -> dict[str, str]:
    """Returns the tables of counts, of all metrics, and of those in which another method is better."""
    return {
        "counts": _counts(results["nets"]),
        "compared": _compared(results["nets"]),
        "losses": _losses(results["nets"]),
    }


def real_summary(results: Results) -> dict[str, str]:
    """Returns the map that is shown first and the methods of other packages, by network."""
    lines = []
    for net, measured in results["nets"].items():
        first, *_ = measured["methods"]
        foreign = _of_other_packages(measured["methods"], first)
        places = [_place(foreign, key) for key in SHOWN]
        cells = [
            f"{foreign[first]['SRG, plain']['samples']}",
            "no" if net in CHOSEN_ON else "partly" if net in SEEN else "yes",
        ]
        for key in ("SRG, plain", "own"):
            size = foreign[first][key]["samples"]
            means = {name: row[key]["mean"][0] for name, row in foreign.items() if row[key]["samples"] == size}
            best = max(set(means) - {first}, key=means.__getitem__)
            cells += [f"{means[first]:.2f}", f"{means['GradCAM']:.2f}", f"{means[best]:.2f}, {SHORT.get(best, best)}"]
        lines.append([net, *cells, " / ".join(str(places.count(place)) for place in (1, 0, -1))])
    names = ("ours", "GradCAM", "best other")
    columns = " | ".join(f"{metric}: {name}" for metric in ("SRG", "own share") for name in names)
    return {"summary": grid(f"| network | images | held out | {columns} | better / level / worse |", lines)}


def _of_other_packages(methods: Results, first: str) -> Results:
    """Returns the first method and those of other packages."""
    return {name: row for name, row in methods.items() if name == first or name.startswith(OTHER_PACKAGES)}


def _compared(nets: Results) -> str:
    """Returns the metrics of every network, and the lead of the first method in SRG."""
    rows = []
    for net, measured in nets.items():
        for number, (name, row) in enumerate(measured["methods"].items()):
            shown = [with_bounds(row[key]["mean"]) for key in SHOWN]
            ahead = with_bounds(row["SRG, plain"]["behind"], sign="+") if number else ""
            counts = f"{row['SRG, plain']['samples']}, {row['own']['samples']}"
            rows.append(["" if number else net, name, *shown, ahead, counts, row["seconds"]])
    head = " | ".join(REAL[key] for key in SHOWN)
    return grid(f"| network | method | {head} | SRG: first row minus this row | photographs, explanations of pairs "
                "| seconds |", rows)  # fmt: skip


def _losses(nets: Results) -> str:
    """Returns the table of metrics in which another method is significantly better than the first one."""
    losses = []
    for net, measured in nets.items():
        ours, *others = measured["methods"].items()
        for key in (key for key in REAL if key in ours[1]):
            ahead = {name: row[key]["behind"] for name, row in others if row[key]["behind"][2] < 0}
            best = sorted(ahead, key=lambda name, of=ahead: of[name][0])
            if best:
                losses.append([net, REAL[key], best[0], with_bounds(ahead[best[0]], sign="+"), len(best)])
    return grid("| network | metric | best method | map shown first - best method | methods ahead |", losses)


def _counts(nets: Results) -> str:
    """Counts, by network, the metrics in which the first method is first, tied with the best other, or behind."""
    rows, sums = [], {"held out": [0, 0, 0, 0], "all": [0, 0, 0, 0]}
    for net, measured in nets.items():
        methods = measured["methods"]
        first, *_ = methods
        foreign = _of_other_packages(methods, first)
        keys = [key for key in SHOWN if key in methods[first]]
        places = [_place(methods, key) for key in keys]
        behind = [_place(foreign, key) for key in keys].count(-1)
        counts = [*(places.count(place) for place in (1, 0, -1)), behind]
        rows.append(
            [
                net,
                CHOSEN_ON.get(net, "none, but evaluated before" if net in SEEN else "none, held out"),
                len(places),
                *counts,
            ]
        )
        for group in ("all",) if net in CHOSEN_ON else ("held out", "all"):
            sums[group] = [sum(pair) for pair in zip(sums[group], counts, strict=True)]
    rows += [[f"*{group}*", "", sum(counts[:3]), *counts] for group, counts in sums.items()]
    count, whole = (sum(sums[group][:3]) for group in ("held out", "all"))
    sentence = (
        f"**First or level in {count - sums['held out'][2]} of {count} comparisons on the held-out networks**, and in "
        f"{whole - sums['all'][2]} of {whole} on all networks. Compared only with the methods of other packages, it is "
        f"first or level in {count - sums['held out'][3]} and {whole - sums['all'][3]} comparisons."
    )
    head = (
        "| network | settings chosen on it | comparisons | first | level | behind "
        "| behind a method of another package |"
    )
    return f"{sentence}\n\n{grid(head, rows)}"


def _place(methods: Results, key: str) -> int:
    """Returns 1 if the first method is significantly better than all others, -1 if worse than any, and 0 otherwise."""
    behind = [row[key]["behind"] for row in list(methods.values())[1:] if key in row]
    if any(interval[2] < 0 for interval in behind):
        return -1
    return int(all(interval[1] > 0 for interval in behind))
