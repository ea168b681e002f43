"""docs/default-composite.md and docs/default-composite-details.md: their tables and the figure, from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.markdown import with_part

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/default-composite.md"
DETAILS = ROOT / "docs/default-composite-details.md"
FIGURE = ROOT / "docs/images/default_composite.png"

CHOSEN, POLICY = "NRMDefault", "G = 2"
POLICIES = ("sink", "G = 2", "G = ∞")
ZENNIT = ("EpsilonPlus", "EpsilonPlusFlat", "EpsilonGammaBox", "LRP-0", "ε 0.25 everywhere")  # under every policy
FAITHFULNESS = ("flip", "span", "pooled")  # reported as mean and 95% interval over samples
SUMMARIZED = (CHOSEN, *ZENNIT, "γ 0.25, ε, Flat", "γ 0.1, ε, Flat", "NRMAbsolute")
"""Composites of the short page."""


def render(results: dict[str, Any]) -> None:
    """Writes the tables of both pages, and the figure."""
    for path in (PAGE, DETAILS):
        path.write_text(rendered(path, results), encoding="utf-8")
    draw(results)


def rendered(path: Path, results: dict[str, Any]) -> str:
    """Returns one page with the tables of these results."""
    parts = {"summary": summary_table} if path == PAGE else {
        "composites": composite_tables,
        "policies": policy_table,
        "paired": paired_table,
        "untrained": untrained_table,
    }  # fmt: skip
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = with_part(text, name, part(results))
    return text


def summary_table(results: dict[str, Any]) -> str:
    """Returns a table of faithfulness by net, and the largest sink and variation over nets, by composite."""
    nets = [
        {row["composite"]: row for row in net["rows"] if row["policy"] == POLICY} for net in results["nets"].values()
    ]
    lines = []
    for composite in SUMMARIZED:
        rows = [net[composite] for net in nets]
        cells = [", ".join(f"{round(row[key][0], 2) + 0:.2f}" for key in ("pooled", "flip")) for row in rows]
        sink, variation = max(row["sink"] + 0 for row in rows), max(row["variation"][1] for row in rows)
        known = [row[composite] for row in results["untrained"].values() if composite in row]
        untrained = brief(max(row[1] for row in known)) if known else ""
        name = f"**{composite}**" if composite == CHOSEN else composite
        lines.append([name, *cells, f"{sink:.2f}", f"{variation:.0f}", untrained])
    columns = ["largest sink", "largest variation", "largest variation, untrained"]
    return markdown(["composite", *results["nets"], *columns], lines)


def composite_tables(results: dict[str, Any]) -> str:
    """Returns one table for each net, under the chosen policy."""
    header = "composite|sink|tap variation, max|walk variation|flip ↓|span ↑|pooled ↑".split("|")
    parts = []
    for name, net in results["nets"].items():
        rows = {(row["composite"], row["policy"]): row for row in net["rows"]}
        lines = []
        for composite in dict.fromkeys(row["composite"] for row in net["rows"]):
            row = rows[composite, POLICY]
            lines.append(
                [
                    f"**{composite}**" if composite == CHOSEN else composite,
                    f"{row['sink'] + 0:.3f}",
                    f"{row['variation'][0]:.1f}, {row['variation'][1]:.0f}",
                    f"{row['walk'][0]:.2g}" if row["walk"][0] < 100 else f"{row['walk'][0]:.0f}",
                    *(spread(row[key]) for key in FAITHFULNESS),
                ]
            )
        parts.append(
            f"**{name}** ({100 * net['accuracy']:.1f}% accuracy, {net['channels']} channels; "
            f"flip in random order {net['flip_random_order'][0]:.2f})\n\n" + markdown(header, lines)
        )
    return "\n".join(parts)


def policy_table(results: dict[str, Any]) -> str:
    """Returns a table of residual policies side by side, for Zennit's composites."""
    lines = []
    for name, net in results["nets"].items():
        rows = {(row["composite"], row["policy"]): row for row in net["rows"]}
        for composite in ZENNIT:
            by_policy = [rows[composite, policy] for policy in POLICIES]
            lines.append(
                [
                    name,
                    composite,
                    *(
                        " / ".join(cells)
                        for cells in (
                            [f"{row['sink'] + 0:.2f}" for row in by_policy],
                            [f"{row['variation'][1]:.0f}" for row in by_policy],
                            [f"{row['flip'][0]:.3f}" for row in by_policy],
                            [f"{row['pooled'][0]:.3f}" for row in by_policy],
                        )
                    ),
                ]
            )
    return markdown(["net", "composite", "sink", "tap variation, max", "flip ↓", "pooled ↑"], lines)


def paired_table(results: dict[str, Any]) -> str:
    """Returns a table of the chosen composite and policy against the best others under any policy."""
    lines = []
    for name, net in results["nets"].items():
        for key in ("flip", "pooled"):
            sign = 1 if key == "flip" else -1
            others = [row for row in net["rows"] if row["composite"] != CHOSEN]
            zennit = [row for row in others if row["composite"] in ZENNIT]
            for kind, rows in (("Zennit's rules", zennit), ("variants", [r for r in others if r not in zennit])):
                best = min(rows, key=lambda row: sign * row[key][0])
                lines.append(
                    [
                        name,
                        f"{key} {'↓' if key == 'flip' else '↑'}",
                        kind,
                        f"{best['composite']}, {best['policy']}",
                        spread(best["chosen_minus_this"][key], "+"),
                    ]
                )
    return markdown(["net", "metric", "best of", "composite", f"{CHOSEN} - composite"], lines)


def untrained_table(results: dict[str, Any]) -> str:
    """Returns a table of residual sink and variation at the input of every untrained net."""
    nets = results["untrained"]
    names = list(next(iter(nets.values())))
    lines = [[net, *(", ".join(brief(value) for value in row[name]) for name in names)] for net, row in nets.items()]
    return markdown(["net", *names], lines)


def brief(value: float) -> str:
    """Formats a value with two decimals, or in scientific notation if it is large."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0e}"


def spread(values: list[float], sign: str = "") -> str:
    """Returns the mean and interval as a cell."""
    mean, low, high = (f"{value:{sign}.3f}" for value in values)
    return f"{mean} [{low}, {high}]"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """Returns a table."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(results: dict[str, Any]) -> None:
    """Draws the figure: rows are nets, columns are metrics, and markers are residual policies."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = {
        "flip": "flip: remaining logit, most relevant\npatches first (lower is better)",
        "pooled": "pooled: correlation of channel mass\nwith logit drop (higher is better)",
        "walk": "walk variation, median\n(lower is better)",
    }
    figure, grid = pyplot.subplots(
        len(results["nets"]), len(columns), figsize=(11, 13), sharey=True, layout="constrained"
    )
    first = next(iter(results["nets"]))
    for axes, (name, net) in zip(grid, results["nets"].items(), strict=True):
        names = list(dict.fromkeys(row["composite"] for row in net["rows"]))
        for axis, (key, title) in zip(axes, columns.items(), strict=True):
            for offset, (policy, mark) in enumerate(zip(POLICIES, "s.^", strict=True)):
                rows = [row for row in net["rows"] if row["policy"] == policy]
                middle = [row[key][0] for row in rows]
                ends = None if key == "walk" else [[abs(row[key][i] - row[key][0]) for row in rows] for i in (1, 2)]
                height = [names.index(row["composite"]) + 0.25 * (offset - 1) for row in rows]
                size = 9 if mark == "." else 4
                axis.errorbar(middle, height, xerr=ends, fmt=mark, markersize=size, linewidth=1, label=policy)
            axis.axhspan(names.index(CHOSEN) - 0.5, names.index(CHOSEN) + 0.5, color="0.9", zorder=0)
            axis.set_title(title if name == first else "", fontsize=9)
            axis.grid(axis="x", color="0.9")
            axis.set_xscale("log" if key == "walk" else "linear")
            if key != "walk":
                axis.locator_params(axis="x", nbins=6)
        axes[0].set_yticks(range(len(names)), names, fontsize=8)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        axes[0].set_ylabel(name)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, title="residual policy")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=90)
    pyplot.close(figure)
