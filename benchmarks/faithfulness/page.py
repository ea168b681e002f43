"""docs/faithfulness.md and docs/faithfulness-details.md: their tables between markers and their figures."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.default_composite_page import markdown
from benchmarks.faithfulness import latent, pixels, planted
from benchmarks.faithfulness.metrics import Comparison, verdict
from benchmarks.markdown import with_part

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/faithfulness.md"
DETAILS = ROOT / "docs/faithfulness-details.md"
IMAGES = ROOT / "docs/images"
DEFAULTS = {"latent": "μ, NRMDefault", "planted": "μ(A & B), NRMDefault", "input": "NRMDefault"}
DRAWN = {
    "μ, NRMDefault": "C3",
    "μ, EpsilonPlus": "C1",
    "LRP EpsilonPlus": "C0",
    "gradient × activation": "C2",
    "LayerConductance": "C4",
    "activation": "C5",
    latent.DROPS: "0.3",
    "chance": "0.7",
}
CASCADES = {
    "NRMDefault": "C3",
    "EpsilonPlusFlat, normalized": "C1",
    "EpsilonGammaBox, normalized": "C4",
    "NRMAbsolute": "C5",
    "Zennit EpsilonPlusFlat": "C0",
    "InputXGradient": "C2",
    "GradCAM": "0.5",
}
FLIPS = ("logit", "same", "deletion", "insertion", "ROAD")
"""Prefixes of the metrics that ablate channels or pixels."""
LABELS = {"precision, half as many": "precision at k/2", "precision = recall": "R-precision"}
"""The names of metrics on the page, where they differ from those in the results."""
KINDS = {"latent": "channels", "input": "pixels", "planted": "edges"}
"""The scores of each part of the results."""

Results = dict[str, Any]


def render(results: Results) -> None:
    """Writes both pages and their figures."""
    for path in (PAGE, DETAILS):
        path.write_text(rendered(path, results), encoding="utf-8")
    draw(results)


def rendered(path: Path, results: Results) -> str:
    """Returns one page with the tables of these results."""
    text = path.read_text(encoding="utf-8")
    for name, table in (summaries(results) if path == PAGE else details(results)).items():
        text = with_part(text, name, table)
    return text


def summaries(results: Results) -> dict[str, str]:
    """Returns the generated parts of the short page."""
    return {"choices": choices(results), "counts": counts(results)}


def details(results: Results) -> dict[str, str]:
    """Returns the generated parts of the page of details."""
    return {
        "verdicts": verdicts(results),
        "places of channels": standings(results["latent"], latent.COMPARISON),
        "places of pixels": standings(results["input"], pixels.COMPARISON),
        "latent": "\n".join(methods(name, net, latent.COMPARISON) for name, net in results["latent"].items()),
        "planted": planted_tables(results["planted"]),
        "input": "\n".join(methods(name, net, pixels.COMPARISON) for name, net in results["input"].items()),
        "pairs": pairs(results),
        "agreement": agreement(results),
        "where": where(results),
    }


def comparisons(results: Results) -> Iterator[tuple[str, str, Comparison, Results]]:
    """Yields the part, name, comparison and result of each."""
    for part, comparison in (("latent", latent.COMPARISON), ("input", pixels.COMPARISON)):
        for name, net in results[part].items():
            yield part, name, comparison, net
    for question, result in results["planted"]["questions"].items():
        is_edges = question != "channels of all layers"
        yield ("planted" if is_edges else "latent"), f"planted, {question}", (
            planted.EDGES if is_edges else planted.CHANNELS
        ), result  # fmt: skip


def compared(results: Results) -> Iterator[tuple[str, str, Comparison, str, Results]]:
    """Yields the kind of scores, net, comparison, metric and best other method, for each metric."""
    for part, name, comparison, result in comparisons(results):
        for key in comparison.better:
            yield KINDS[part], name, comparison, key, {**result["best"][key], "default": DEFAULTS[part]}


def counts(results: Results) -> str:
    """Returns the number of metrics in which the default composite is better than, tied with or worse than the best."""
    counted: dict[str, Counter[str]] = {}
    for kind, name, _, _, best in compared(results):
        networks = "transformer" if "transformer" in name else "convolutional networks"
        group = kind if kind == "edges" else f"{kind}, {networks}"
        counted.setdefault(group, Counter())[verdict(best["ahead"][best["default"]])] += 1
    counted["all"] = sum(counted.values(), Counter())
    words = ("better", "tied", "worse")
    lines = [
        [group, *(str(verdicts[word]) for word in words)] for group, verdicts in sorted(counted.items(), key=_all_last)
    ]
    return markdown(["scores of", *words], lines)


def _all_last(row: tuple[str, Any]) -> tuple[bool, str]:
    return row[0] == "all", row[0]


def verdicts(results: Results) -> str:
    """Compares the default composite with the best other method of each metric."""
    lines = []
    for kind, name, comparison, key, best in compared(results):
        ahead = best["ahead"][best["default"]]
        word = _emphasized(verdict(ahead))
        lines.append([kind, name, _label(comparison, key), best["other"], _signed(ahead), word])
    return markdown(["scores of", "network", "metric", "best other", "difference of NRMDefault", "verdict"], lines)


COMPOSITES = {
    "NRMDefault": ("μ, NRMDefault", "μ(A & B), NRMDefault", "NRMDefault"),
    "EpsilonGammaBox": ("μ, EpsilonGammaBox", "", "EpsilonGammaBox, normalized"),
    "EpsilonPlus(Flat)": ("μ, EpsilonPlus", "μ(A & B), EpsilonPlus", "EpsilonPlusFlat, normalized"),
    "NRMAbsolute": ("μ, NRMAbsolute", "μ(A & B), NRMAbsolute", "NRMAbsolute"),
    "LRP-0, sink": ("μ, LRP-0", "μ(A & B), LRP-0", ""),
}
"""Name of each composite in the results for channels, edges and pixels."""


def choices(results: Results) -> str:
    """Returns the mean rank of each of our composites among all methods, and the best other method, by question."""
    lines = []
    for question, evaluated in questions(results).items():
        ranks: dict[str, list[float]] = {}
        for by_method, comparison, keys in evaluated:
            for name in by_method:
                rank = None if name in comparison.unranked else _mean_rank(name, by_method, comparison, keys)
                if rank is not None:
                    ranks.setdefault(name, []).append(rank)
        means = {name: sum(row) / len(row) for name, row in ranks.items() if len(row) == len(evaluated)}
        ours = [next((means[name] for name in names if name in means), None) for names in COMPOSITES.values()]
        least = min(rank for rank in ours if rank is not None)
        cells = ["" if one is None else f"**{one:.1f}**" if one == least else f"{one:.1f}" for one in ours]
        other = min((name for name in means if name not in evaluated[0][1].ours), key=means.__getitem__)
        lines.append([question, *cells, f"{other}: {means[other]:.1f}", str(len(means))])
    return markdown(["evaluation", *COMPOSITES, "best other", "methods"], lines)


def questions(results: Results) -> dict[str, list[tuple[Results, Comparison, list[str]]]]:
    """Returns the methods with their values, comparison and metrics, for each net of a question."""

    def nets(
        part: str, comparison: Comparison, keys: list[str], transformer: bool
    ) -> list[tuple[Results, Comparison, list[str]]]:
        of_part = results[part]
        return [
            (net["methods"], comparison, keys)
            for name, net in of_part.items()
            if ("transformer" in name) == transformer
        ]

    channels = list(latent.COMPARISON.better)
    zero = [key for key in channels if key.endswith("zero")]
    flips = [key for key in pixels.COMPARISON.better if key.startswith(FLIPS)]
    planted_channels, *edges = results["planted"]["questions"].values()
    both = {
        "stability of heat maps under noise": ["sensitivity"],
        "sensitivity of heat maps to the explained output": ["random logit"],
        "sensitivity of heat maps to the parameters": ["cascade, area"],
    }
    return {
        "planted edges": [(result["methods"], planted.EDGES, list(planted.BETTER)) for result in edges],
        "planted channels": [(planted_channels["methods"], planted.CHANNELS, list(planted.BETTER))],
        "channels set to zero, convolutional networks":
            nets("latent", latent.COMPARISON, zero, False),
        "channels set to zero, transformer": nets("latent", latent.COMPARISON, zero, True),
        "pixels, convolutional networks": nets("input", pixels.COMPARISON, flips, False),
        "pixels, transformer": nets("input", pixels.COMPARISON, flips, True),
    } | {
        question: [net for transformer in (False, True) for net in nets("input", pixels.COMPARISON, keys, transformer)]
        for question, keys in both.items()
    }  # fmt: skip


def standings(nets: Results, comparison: Comparison) -> str:
    """Returns the mean rank of every method over the flipping metrics of each net, 1 is best; sorted by the average."""
    keys = [key for key in comparison.better if key.startswith(FLIPS)]
    ranks: dict[str, list[float | None]] = {}
    names = dict.fromkeys(name for net in nets.values() for name in net["methods"] if name not in comparison.unranked)
    for name in names:
        ranks[name] = [_mean_rank(name, net["methods"], comparison, keys) for net in nets.values()]
    known = {name: [rank for rank in row if rank is not None] for name, row in ranks.items()}
    order = sorted(known, key=lambda name: sum(known[name]) / len(known[name]))
    lines = []
    for name in order:
        shown = f"**{name}**" if name in comparison.ours else name
        cells = ["" if rank is None else f"{rank:.1f}" for rank in ranks[name]]
        mean = sum(known[name]) / len(known[name])
        lines.append([shown.replace("|", r"\|"), *cells, f"{mean:.1f}"])
    return markdown(["method, mean rank", *nets, "mean"], lines)


def _mean_rank(name: str, by_method: Results, comparison: Comparison, keys: list[str]) -> float | None:
    if name not in by_method:
        return None
    others = [row for row in by_method if row not in comparison.unranked]
    ahead = [
        sum(comparison.better[key] * (by_method[row][key][0] - by_method[name][key][0]) > 0 for row in others)
        for key in keys
    ]
    return 1 + sum(ahead) / len(ahead)


def methods(name: str, result: Results, comparison: Comparison) -> str:
    """Returns the table of one net, one row per method; ours are bold, and a star marks the best of each column."""
    keys = list(comparison.better)
    best = {}
    for key in keys:
        ranked = [row for row in result["methods"] if row not in comparison.unranked]
        best[key] = max(ranked, key=lambda row: comparison.better[key] * result["methods"][row][key][0])
    lines = []
    for row, values in result["methods"].items():
        shown = f"**{row}**" if row in comparison.ours else f"*{row}*" if row in comparison.unranked else row
        lines.append([shown.replace("|", r"\|"), *(_cell(values[key]) + " ★" * (best[key] == row) for key in keys)])
    about = f"{result['samples']} samples, accuracy {100 * result['accuracy']:.1f}%" if "samples" in result else ""
    head = f"**{name}**" + (f" ({about})" if about else "")
    return head + "\n\n" + markdown(["method", *(_label(comparison, key) for key in keys)], lines)


def planted_tables(result: Results) -> str:
    """Returns the three tables on planted paths, and the effect of the planted weights."""
    within, between = (result[f"same without weights {where} streams"] for where in ("within", "between"))
    head = (
        f"{result['samples']} samples, accuracy {100 * result['accuracy']:.1f}%. Without the weights between streams, "
        f"{100 * between:.1f}% of the predictions are unchanged; without those within streams, {100 * within:.1f}%.\n"
    )
    parts = [methods(name, part, planted.CHANNELS if name.startswith("channels") else planted.EDGES)
             for name, part in result["questions"].items()]  # fmt: skip
    return "\n".join([head, *parts])


def pairs(results: Results) -> str:
    """Compares ours with the other method that uses the same rules."""
    lines = []
    for _, name, comparison, result in comparisons(results):
        for pair, values in result["pairs"].items():
            one, other = pair.split(" : ")
            words = Counter(verdict(ahead) for ahead in values.values())
            most = sorted(values, key=lambda key: -abs(values[key][0]))[:2]
            shown = "; ".join(f"{_label(comparison, key)}: {_signed(values[key])}" for key in most)
            counts = " / ".join(str(words[word]) for word in ("better", "tied", "worse"))
            lines.append([name, one, other, counts, shown])
    return markdown(["network", "ours", "compared with", "better / tied / worse", "largest differences"], lines)


def where(results: Results) -> str:
    """Returns versions, machine and settings."""
    place, settings = results["environment"], results["settings"]
    packages = ("python", "torch", "torchvision", "zennit", "captum", "quantus", "zennit-crp")
    named = ", ".join(f"{name} {place[name]}" for name in packages)
    minutes = {key: round(results["time"][key] / 60) for key in ("seconds", "seconds of processors")}
    return (
        f"{settings['samples']} samples for each network, seed {settings['seed']}, {settings['resamples']} bootstrap "
        f"resamples; {named}; {place['processes']} processes of one thread each, on {place['processor']}. The whole "
        f"command took {minutes['seconds']} minutes ({minutes['seconds of processors']} minutes of CPU time) "
        "on a shared machine.\n"
    )


def agreement(results: Results) -> str:
    """Returns the agreement of pixel flipping with Quantus."""
    differences = [net["differences to Quantus"] for net in results["input"].values()]
    logit, softmax = (max(net[key] for net in differences) for key in ("logit", "softmax"))
    found = (
        f"largest difference between two curves is {logit:.0e} in logits and {softmax:.0e} in softmax outputs"
        if logit or softmax
        else "curves are identical, for logits and for softmax outputs"
    )
    samples = f"the first {pixels.COMPARED} samples of each network"
    return f"Pixel flipping was compared with Quantus on {samples}. The {found}.\n"


def _label(comparison: Comparison, key: str) -> str:
    return LABELS.get(key, key) + (" ↑" if comparison.better[key] > 0 else " ↓")


def _cell(values: list[float]) -> str:
    mean, low, high = values
    if mean > 1000:
        return f"{mean:.0e}"
    return f"{mean:.3f} ± {(high - low) / 2:.3f}"


def _signed(values: list[float]) -> str:
    mean, low, high = (f"{value:+.3f}" for value in values)
    return f"{mean} [{low}, {high}]"


def _emphasized(word: str) -> str:
    return f"**{word}**" if word == "worse" else word


# -- figures --------------------------------------------------------------------------------------------------------


def save(figure: Any, name: str, dpi: int) -> None:
    """Saves a small file; 256 colors suffice for lines and text."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    pyplot.close(figure)
    Image.open(buffer).convert("RGB").quantize(256).save(IMAGES / f"{name}.png", optimize=True)


def draw(results: Results) -> None:
    """Draws curves of neuron flipping, bars of recovery, and metrics of heat maps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    nets = results["latent"]
    figure, grid = pyplot.subplots(len(nets), 4, figsize=(13, 2.9 * len(nets)), squeeze=False, layout="constrained")
    for axes, (name, net) in zip(grid, nets.items(), strict=True):
        keys = [(f"{order} first, {fill}") for fill in latent.FILLS for order in ("most", "least")]
        for axis, key in zip(axes, keys, strict=True):
            for method, colour in DRAWN.items():
                if method in net["curves"]:
                    style = {"lw": 2.2} if method.startswith("μ") else {"lw": 1.2}
                    axis.plot(latent.SHARES, net["curves"][method][key], label=method, color=colour, **style)
            axis.set_title(f"{name}: {key}", fontsize=9)
            axis.set_xlabel("share of all channels ablated", fontsize=8)
        axes[0].set_ylabel("target logit / mean", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(DRAWN), fontsize=8)
    save(figure, "faithfulness_channels", dpi=70)

    questions = list(results["planted"]["questions"].items())
    figure, row = pyplot.subplots(1, len(questions), figsize=(13, 4), layout="constrained")
    for axis, (question, result) in zip(row, questions, strict=True):
        comparison = planted.CHANNELS if question.startswith("channels") else planted.EDGES
        names = sorted(result["methods"], key=lambda one: result["methods"][one]["average precision"][0])
        for height, name in enumerate(names):
            mean, low, high = result["methods"][name]["average precision"]
            colour = "C3" if name in comparison.ours else "C1" if name in planted.CONCEPTS else "0.6"
            axis.barh(height, mean, xerr=[[mean - low], [high - mean]], color=colour)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_title(question, fontsize=9)
        axis.set_xlabel("average precision", fontsize=8)
        axis.set_xlim(0, 1)
    save(figure, "faithfulness_paths", dpi=75)

    nets = results["input"]
    keys = ("logit, most first, zero", "ROAD, least first", "sensitivity")
    figure, grid = pyplot.subplots(len(nets), 4, figsize=(13, 3.2 * len(nets)), squeeze=False, layout="constrained")
    for axes, (name, net) in zip(grid, nets.items(), strict=True):
        names = list(net["methods"])[::-1]
        for axis, key in zip(axes, keys, strict=False):
            for height, method in enumerate(names):
                mean, low, high = net["methods"][method][key]
                colour = "C3" if method in pixels.COMPARISON.ours else "0.3"
                axis.errorbar(mean, height, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt=".", color=colour)
            axis.set_title(_label(pixels.COMPARISON, key), fontsize=9)
            axis.set_yticks(range(len(names)), names if axis is axes[0] else [], fontsize=7)
            axis.grid(axis="x", color="0.9")
        for method, colour in CASCADES.items():
            curve = net["cascades"][method]
            axes[3].plot([step / (len(curve) - 1) for step in range(len(curve))], curve, label=method, color=colour)
        axes[0].set_ylabel(name, fontsize=9)
        axes[3].set_title("rank correlation, new parameters ↓", fontsize=9)
        axes[3].set_xlabel("share of the steps, from the last layer down", fontsize=8)
        axes[3].set_ylim(0, 1.02)
    handles, labels = grid[0][3].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(CASCADES), fontsize=8)
    save(figure, "faithfulness_pixels", dpi=68)
