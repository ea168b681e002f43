"""Tables of the docs, rendered from committed results by one function each; nothing is measured here.

``python -m benchmarks.tables`` writes all of them; every benchmark writes its own at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
Found = dict[str, Any]


def grid(head: str, rows: Iterable[Sequence[object]]) -> str:
    """Markdown; ``head`` is its first line."""
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([head, rule, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def small(number: float, digits: int = 0) -> str:
    """A formatted mass; 0 below one in a million."""
    return "0" if abs(number) < 1e-6 else f"{number:.{digits}e}" if abs(number) < 5e-4 else f"{number:.3f}"


# -- one function for each file of results; it returns its tables by their mark ----------------------------------------


def attention(found: Found) -> dict[str, str]:
    """Attention models of torchvision."""
    cells = (
        (row["model"], row["blocks"], f"{row['error']:.0e}", f"{row['residual']:.3f}", f"{row['constants']:.3f}",
         f"{row['variation']:.2f}", f"{row['variation, EpsilonPlusFlat']:.2g}", f"{row['output']:.0e}")
        for row in found["rows"]
    )  # fmt: skip
    return {"table": grid("| model | blocks | error | residual | constants | V | V, EpsilonPlusFlat | output |", cells)}


def hugging_face(found: Found) -> dict[str, str]:
    """Further models."""
    rows = [row for row in found["rows"] if "failed" not in row]
    cells = (
        (row["model"], row["taps"], f"{row['error']:.0e}", f"{row['constants']:.3f}",
         f"{row['variation at the input']:.2f}")
        for row in rows
    )  # fmt: skip
    return {"further": grid("| model | taps | error | constants | V |", cells)}


def recurrent_and_graphs(found: Found) -> dict[str, str]:
    """Networks, layers and pooling."""

    def cells(rows: list[Found]) -> Iterable[Sequence[object]]:
        for row in rows:
            absorbed = small(row["residual"]), small(row["constants"])
            yield row["network"], row["taps"], f"{row['error']:.0e}", *absorbed, f"{row['largest variation']:.1f}"

    head = "| network | taps | error | residual | constants | variation |"
    layers = head.replace("network", "layer")
    return {"recurrent": grid(head, cells(found["recurrent"])), "graphs": grid(layers, cells(found["graphs"]))}


def relative(found: Found) -> dict[str, str]:
    """Comparison of rules, net by net."""
    shown = {"vgg16": "VGG16", "vgg19": "VGG19", "resnet50": "ResNet-50"}
    rules = {"LRP-ε": "LRP-ε, ε = 0.1", "LRP-γ": "LRP-γ, γ = 0.25"}
    rows = []
    for net, by_rule in found["rows"].items():
        for number, (rule, row) in enumerate(by_rule.items()):
            size = f"{row['variation']:.2g}" if row["variation"] >= 1e4 else f"{row['variation']:.0f}"
            flipping = f"{row['pixel flipping']:.3f}" if "pixel flipping" in row else ""
            first = "" if number else shown.get(net, net)
            rows.append([first, rules.get(rule, rule), size.replace("e+", "e"), flipping, f"{row['error']:.2g}"])
    return {"measured": grid("| net | rule | largest walk variation | pixel flipping | difference at 1e-30 |", rows)}


def top_walks(found: Found) -> dict[str, str]:
    """The search compared with a greedy graph."""
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
        for row in found["rows"]
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


def selection(found: Found) -> dict[str, str]:
    """Probability of the class by channels kept, net by net."""
    drawn = {}
    for net in found["nets"]:
        rows = {(row["method"], row["kept"], row["fill"]): row for row in net["rows"]}
        places, cells = SHOWN[net["net"]], []
        for method, name in METHODS.items():
            of_method = [rows[method, *place] for place in places]
            shown = ["{:.2f} ({:.2f}–{:.2f})".format(*row["probability"]) for row in of_method]
            cells.append([name, *shown, f"{of_method[0]['seconds']:.1f}"])
        columns = " | ".join(f"{kept}, {fill}" for kept, fill in places)
        drawn[net["net"]] = grid(f"| kept of {sum(net['channels'])}, ablation | {columns} | seconds |", cells)
    return drawn


def flow(found: Found) -> dict[str, str]:
    """A sentence."""
    factor = min(found["seconds"]["flow"]) / min(found["seconds"]["marginals"])
    layers = ", ".join(f"`{layer}`" for layer in reversed(found["layers"][1:]))
    graph = f"A flow graph of VGG16 at 224 pixels over {layers} and 16 patches of `input`, with `top=8`,"
    return {"measured": f"{graph} takes {factor:.0f} times as long as the marginals of all layers."}


def sweep(found: Found) -> dict[str, str]:
    """The cost of a sweep."""
    share = {net: row["share of the bare measure"]["wall"] for net, row in found["throughput"].items()}
    samples = {net: row["samples"] for net, row in found["throughput"].items()}
    bare = "throughput relative to the measure alone in a loop, loader excluded"
    read, memory = found["read"], found["memory"]
    rows = [
        (f"{bare}: VGG16, images of 128 pixels, {samples['vgg16']} samples", f"{share['vgg16']:.2f}", "0.85"),
        (
            f"the same: the small net of the demo, {samples['demo digits']} samples",
            f"{share['demo digits']:.2f}",
            "0.85",
        ),
        (
            f"memory at the end of {memory['samples']:,} samples relative to that after {memory['samples'] // 10:,}",
            f"{memory['last beside a tenth']:.2f}",
            "1.02",
        ),
        (
            f"query for the top nine samples of a channel in {read['rows'] / 1e6:.2f} million rows",
            f"{read['seconds for the top nine, at most']:.2f} s",
            "1 s",
        ),
        ("the same before the rows are sorted", f"{read['of unsorted shards, at most']:.2f} s", ""),
    ]
    return {"measured": grid("| | measured | target |", rows)}


PAGES: dict[str, tuple[str, Callable[[Found], dict[str, str]]]] = {
    "attention": ("attention.md", attention),
    "hugging_face": ("attention.md", hugging_face),
    "recurrent_and_graphs": ("recurrent-and-graphs.md", recurrent_and_graphs),
    "relative": ("relative.md", relative),
    "flow": ("flow.md", flow),
    "top_walks": ("critical-paths.md", top_walks),
    "selection": ("critical-paths.md", selection),
    "sweep": ("data-sets.md", sweep),
}


def rendered(source: str, page: str) -> str:
    """The page with the tables of the committed results."""
    found = json.loads((RESULTS / f"{source}.json").read_text())
    for mark, table in PAGES[source][1](found).items():
        head, rest = page.split(f"<!-- {mark} -->")
        page = f"{head}<!-- {mark} -->\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return page


def write(source: str) -> None:
    """Writes the tables of one file of results."""
    page = ROOT / "docs" / PAGES[source][0]
    page.write_text(rendered(source, page.read_text()))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name in PAGES:
        write(name)
