"""The figure of docs/joint-relevance.md: correlation with path patching, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FIGURE = "joint-relevance.png"
TITLES = {"zero": "patched with zero activations", "input": "patched with the reference input"}
DRAWN = {
    "joint, tangents": ("C0", "o", "joint, tangents"),
    "joint, secants": ("C3", "o", "joint, secants"),
    "joint, NRMDefault": ("C2", "o", "joint, default, no reference"),
    "joint, EpsilonPlusFlat": ("0.5", "D", "joint, EpsilonPlusFlat"),
    "best product": ("black", "|", "best product of single scores"),
}


def draw(results: dict[str, Any], images: Path) -> None:
    """Draws the figure into a folder, with one panel for each reference and one row for each kind of sets."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [(name, kind) for name, net in results["nets"].items() for kind in net["kinds"]]
    gaps = [sum(1 for k in range(1, n + 1) if rows[k][0] != rows[k - 1][0]) for n in range(len(rows))]
    height = [-(n + 1.3 * gap) for n, gap in enumerate(gaps)]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 0.9 + 0.27 * -height[-1]), sharey=True, layout="constrained")
    for axis, (start, title) in zip(panels, TITLES.items(), strict=True):
        for (name, kind), y in zip(rows, height, strict=True):
            if start not in results["nets"][name]["kinds"][kind]["references"]:
                axis.text(0.5, y, "not measured", color="0.5", fontsize=8, ha="center", va="center",
                          transform=axis.get_yaxis_transform())  # fmt: skip
            measured = results["nets"][name]["kinds"][kind]["references"].get(start, {"scores": {}})
            for number, (score, (colour, marker, label)) in enumerate(DRAWN.items()):
                one = measured["scores"].get(measured.get("best product") if score == "best product" else score)
                if one is None:
                    continue
                mean, low, high = one["correlation"]
                place = y + 0.12 * (2 - number)
                axis.plot([low, high], [place, place], color=colour, lw=1)
                size = 9 if marker == "|" else 4
                axis.plot(mean, place, marker, color=colour, ms=size, mew=2 if marker == "|" else 0, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("correlation with exact path patching, with 95% interval", fontsize=9)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.set_xlim(right=1.01)
    panels[0].set_yticks(height, [kind for _, kind in rows], fontsize=8)
    for number, (name, _) in enumerate(rows):
        if number == 0 or rows[number - 1][0] != name:
            panels[0].text(-0.02, height[number] + 0.75, name, transform=panels[0].get_yaxis_transform(), ha="right",
                           va="center", fontsize=9, weight="bold")  # fmt: skip
    figure.suptitle("Agreement of scores with exact path patching: higher is better", fontsize=11, weight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[: len(DRAWN)], labels[: len(DRAWN)], loc="outside lower center", ncols=len(DRAWN), fontsize=9)
    figure.get_layout_engine().set(w_pad=0.1)  # the longest name of a row would touch the edge
    figure.savefig(images / FIGURE, dpi=80)
    pyplot.close(figure)
