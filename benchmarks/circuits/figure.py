"""The figure of docs/circuits.md: faithfulness of circuits as a function of the fraction of edges they contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FIGURE = Path(__file__).parents[2] / "docs/images/circuits.png"
DRAWN = {
    "EAP-IG, 8 steps": ("C0", "-"),
    "reference measure": ("C3", "-"),
    "RelP": ("C1", "-"),
    "EAP": ("C2", "--"),
    "gradient × activation": ("0.4", "-"),
    "LRP-0": ("C4", ":"),
    "random": ("0.75", "-"),
}


def draw(results: dict[str, Any]) -> None:
    """Draws the figure, with one panel for each net."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    nets = results["nets"]
    figure, row = pyplot.subplots(1, len(nets), figsize=(13, 3.4), sharey=True, squeeze=False, layout="constrained")
    for axis, (name, net) in zip(row[0], nets.items(), strict=True):
        axis.axhline(1, color="0.85", lw=1)
        for score, (colour, style) in DRAWN.items():
            width = {"reference measure": 2.2, "EAP-IG, 8 steps": 3.6}.get(score, 1.4)
            alpha = 0.5 if score == "EAP-IG, 8 steps" else 1.0
            f = net["scores"][score]["f, absolute"]
            axis.plot(results["shares"], f, style, color=colour, lw=width, alpha=alpha, label=score)
        axis.set_xscale("log")
        axis.set_xlim(0.005, 1)
        axis.set_title(f"{name}, {net['edges']:,} edges", fontsize=10)
        axis.set_xlabel("fraction k of the edges, largest |score| first", fontsize=9)
    row[0][0].set_ylabel("faithfulness f of the circuit", fontsize=9)
    handles, labels = row[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(DRAWN), fontsize=9)
    figure.savefig(FIGURE, dpi=80)
    pyplot.close(figure)
