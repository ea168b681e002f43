"""Tables of docs/critical-paths.md and docs/critical-paths-details.md."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import grid

Results = dict[str, Any]


def top_walks(results: Results) -> dict[str, str]:
    """Returns the table that compares the search with a greedy graph."""
    head = (
        "| pixels, rule | certified | largest | 100th | missed ≤ | mass of the 100 | greedy: mass "
        "| greedy walks ≥ our 100th | seconds, greedy |"
    )
    rows = [
        (
            f"{row['size']}, {row['rule']}", f"{row['certified']} of {row['walks']}", f"{row['largest']:.3g}",
            f"{row['smallest']:.3g}", f"{row['missed']:.2g}", f"{row['mass']:.3g}", f"{row['greedy_mass']:.3g}",
            row["greedy_among_ours"], f"{row['seconds']:.0f}, {row['greedy_seconds']:.0f}",
        )
        for row in results["rows"]
    ]  # fmt: skip
    return {"walks": grid(head, rows)}


SHOWN = {
    "digits_vgg": [(21, "zero"), (31, "zero"), (42, "zero"), (62, "zero"), (104, "mean"), (156, "resample")],
    "digits_cnn": [
        (8, "zero"), (11, "zero"), (15, "zero"), (23, "zero"), (38, "zero"), (38, "mean"), (57, "resample"),
    ],
}  # fmt: skip
METHODS = {
    "select_neurons (ε, z⁺)": "`select_neurons` (ε, z⁺)",
    "marginal (ε, z⁺)": "marginal (ε, z⁺)",
    "plain LRP": "plain LRP (EpsilonPlus)",
    "LayerConductance": "Captum's LayerConductance",
    "select_neurons (absolute)": "`select_neurons` (absolute)",
    "marginal (absolute)": "marginal (absolute)",
    "activation": "activation",
    "chance": "chance",
}


def selection(results: Results) -> dict[str, str]:
    """Probability of the class by number of channels retained, by net."""
    tables = {}
    for net in results["nets"]:
        rows = {(row["method"], row["kept"], row["fill"]): row for row in net["rows"]}
        places, cells = SHOWN[net["net"]], []
        for method, name in METHODS.items():
            of_method = [rows[method, *place] for place in places]
            shown = ["{:.2f} ({:.2f}–{:.2f})".format(*row["probability"]) for row in of_method]
            cells.append([name, *shown, f"{of_method[0]['seconds']:.1f}"])
        columns = " | ".join(f"{kept}, {fill}" for kept, fill in places)
        tables[net["net"]] = grid(
            f"| channels retained (of {sum(net['channels'])}), ablation | {columns} | seconds |", cells
        )
    return tables


SUMMARIZED = {
    "digits_vgg": [(31, "zero"), (62, "zero"), (104, "mean"), (156, "resample")],
    "digits_cnn": [(11, "zero"), (38, "zero"), (38, "mean"), (57, "resample")],
}
"""Numbers of channels retained and kinds of ablation of the summary, by net."""
NETWORKS = {"digits_vgg": "digits, VGG", "digits_cnn": "digits, CNN"}
CHOSEN = "select_neurons (ε, z⁺)"
COMPARED = {
    "marginal (ε, z⁺)": "marginal",
    "marginal (absolute)": "marginal, `NRMAbsolute`",
    "plain LRP": "plain LRP",
    "LayerConductance": "LayerConductance",
}
"""Methods that the summary compares with the selection, with their names."""


def rounded(value: float) -> str:
    """Formats a factor with two digits, and with commas if it is large."""
    return f"{value:.2g}" if value < 10 else f"{float(f'{value:.2g}'):,.0f}"


def top_walks_summary(results: Results) -> dict[str, str]:
    """Returns how many walks are certified, and their mass relative to that of a greedy graph."""
    rows = [
        (
            f"{row['size']} × {row['size']}", row["rule"], f"{row['certified']} of {row['walks']}",
            f"{rounded(row['missed'] / row['largest'])} ×", f"{row['mass'] / row['greedy_mass']:.2f} ×",
            f"{row['seconds']:.0f}, {row['greedy_seconds']:.0f}",
        )
        for row in results["rows"]
    ]  # fmt: skip
    head = "image | rule | certified | missed ≤, relative to the largest | mass relative to greedy | seconds, greedy"
    return {"walks": grid(f"| {head} |", rows)}


def selection_summary(results: Results) -> dict[str, str]:
    """Returns the probability of the class for the selection and for other methods, with paired comparisons."""
    lines = []
    for net in results["nets"]:
        rows = {(row["method"], row["kept"], row["fill"]): row for row in net["rows"]}
        for kept, fill in SUMMARIZED[net["net"]]:
            name = f"{NETWORKS[net['net']]}, {sum(net['channels'])}"
            cells = [name, kept, fill, f"{rows[CHOSEN, kept, fill]['probability'][0]:.2f}"]
            for method in COMPARED:
                row = rows[method, kept, fill]
                _, low, high = row["behind_select_neurons"]
                place = "worse" if low > 0 else "better" if high < 0 else "level"
                cells.append(f"{row['probability'][0]:.2f}, {place}")
            lines.append(cells)
    head = "network, channels | retained | ablation | `select_neurons` | " + " | ".join(COMPARED.values())
    return {"selection": grid(f"| {head} |", lines)}
