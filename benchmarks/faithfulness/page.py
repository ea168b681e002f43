"""docs/faithfulness.md: its tables between markers, and its pictures, from the results."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.default_composite import markdown
from benchmarks.faithfulness import latent, pixels, planted
from benchmarks.faithfulness.metrics import Contest, verdict

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/faithfulness.md"
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
Results = dict[str, Any]


def render(results: Results) -> None:
    """Writes the page and its pictures."""
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results)


def rendered(text: str, results: Results) -> str:
    """The page with the tables of these results."""
    tables = {
        "verdicts": verdicts(results),
        "places of channels": standings(results["latent"], latent.CONTEST),
        "places of pixels": standings(results["input"], pixels.CONTEST),
        "latent": "\n".join(methods(name, net, latent.CONTEST) for name, net in results["latent"].items()),
        "planted": planted_tables(results["planted"]),
        "input": "\n".join(methods(name, net, pixels.CONTEST) for name, net in results["input"].items()),
        "pairs": pairs(results),
        "where": where(results),
    }
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, rest = text.split(start)
        text = before + start + "\n" + table + "\n" + end + rest.split(end)[1]
    return text


def contests(results: Results) -> Iterator[tuple[str, str, Contest, Results]]:
    """Part, what was asked, who competed, and the result."""
    for part, contest in (("latent", latent.CONTEST), ("input", pixels.CONTEST)):
        for name, net in results[part].items():
            yield part, name, contest, net
    for question, found in results["planted"]["questions"].items():
        is_edges = question != "channels of all layers"
        yield ("planted" if is_edges else "latent"), f"planted, {question}", (
            planted.EDGES if is_edges else planted.CHANNELS
        ), found  # fmt: skip


def verdicts(results: Results) -> str:
    """The default composite against the best other method of each metric."""
    lines, counted = [], Counter[str]()
    for part, name, contest, found in contests(results):
        for key in contest.better:
            best = found["best"][key]
            ahead = best["ahead"][DEFAULTS[part]]
            word = verdict(ahead)
            counted[word] += 1
            kind = "channels" if part == "latent" else "pixels" if part == "input" else "edges"
            lines.append([kind, name, key + _arrow(contest, key), best["other"], _signed(ahead), _loud(word)])
    header = ["of", "net", "metric", "best other", "NRMDefault is ahead by", ""]
    total = sum(counted.values())
    counts = ", ".join(f"{word} in {counted[word]}" for word in ("better", "even", "worse"))
    head = f"Of {total} comparisons: {counts}."
    return head + "\n\n" + markdown(header, lines)


def standings(nets: Results, contest: Contest) -> str:
    """Mean place of every method over the flipping metrics of each net, 1 for the best; the best on average first."""
    keys = [key for key in contest.better if key.startswith(("logit", "same", "deletion", "insertion"))]
    places: dict[str, list[float | None]] = {}
    names = dict.fromkeys(name for net in nets.values() for name in net["methods"] if name not in contest.apart)
    for name in names:
        places[name] = [_mean_place(name, net["methods"], contest, keys) for net in nets.values()]
    known = {name: [place for place in row if place is not None] for name, row in places.items()}
    order = sorted(known, key=lambda name: sum(known[name]) / len(known[name]))
    lines = []
    for name in order:
        shown = f"**{name}**" if name in contest.ours else name
        cells = ["" if place is None else f"{place:.1f}" for place in places[name]]
        mean = sum(known[name]) / len(known[name])
        lines.append([shown.replace("|", r"\|"), *cells, f"{mean:.1f}"])
    return markdown(["method, mean place", *nets, "mean"], lines)


def _mean_place(name: str, found: Results, contest: Contest, keys: list[str]) -> float | None:
    if name not in found:
        return None
    others = [row for row in found if row not in contest.apart]
    ahead = [
        sum(contest.better[key] * (found[row][key][0] - found[name][key][0]) > 0 for row in others) for key in keys
    ]
    return 1 + sum(ahead) / len(ahead)


def methods(name: str, found: Results, contest: Contest) -> str:
    """One net: a row for each method, bold where it is ours, and the best of each column with a star."""
    keys = list(contest.better)
    best = {}
    for key in keys:
        ranked = [row for row in found["methods"] if row not in contest.apart]
        best[key] = max(ranked, key=lambda row: contest.better[key] * found["methods"][row][key][0])
    lines = []
    for row, values in found["methods"].items():
        shown = f"**{row}**" if row in contest.ours else f"*{row}*" if row in contest.apart else row
        lines.append([shown.replace("|", r"\|"), *(_cell(values[key]) + " ★" * (best[key] == row) for key in keys)])
    about = f"{found['samples']} samples, accuracy {100 * found['accuracy']:.1f} %" if "samples" in found else ""
    head = f"**{name}**" + (f" ({about})" if about else "")
    return head + "\n\n" + markdown(["method", *(key + _arrow(contest, key) for key in keys)], lines)


def planted_tables(found: Results) -> str:
    """The three questions, and how well the paths were planted."""
    within, between = (found[f"same without weights {where} streams"] for where in ("within", "between"))
    head = (
        f"{found['samples']} samples, accuracy {100 * found['accuracy']:.1f} %. Without the weights between streams "
        f"{100 * between:.1f} % of the predictions stay the same, without those within streams {100 * within:.1f} %.\n"
    )
    parts = [methods(name, part, planted.CHANNELS if name.startswith("channels") else planted.EDGES)
             for name, part in found["questions"].items()]  # fmt: skip
    return "\n".join([head, *parts])


def pairs(results: Results) -> str:
    """Ours against the other method with the same rules."""
    lines = []
    for _, name, contest, found in contests(results):
        for pair, values in found["pairs"].items():
            one, other = pair.split(" : ")
            words = Counter(verdict(ahead) for ahead in values.values())
            most = sorted(values, key=lambda key: -abs(values[key][0]))[:2]
            shown = "; ".join(f"{key}{_arrow(contest, key)}: {_signed(values[key])}" for key in most)
            counts = " / ".join(str(words[word]) for word in ("better", "even", "worse"))
            lines.append([name, one, other, counts, shown])
    return markdown(["net", "ours", "beside", "better / even / worse", "largest differences"], lines)


def where(results: Results) -> str:
    """Versions, machine, settings."""
    place, settings = results["environment"], results["settings"]
    named = ", ".join(f"{name} {place[name]}" for name in ("python", "torch", "torchvision", "zennit", "captum"))
    seconds = ", ".join(f"{value} s ({part})" for part, value in results["seconds"].items())
    return (
        f"{settings['samples']} samples for each net, seed {settings['seed']}, {settings['resamples']} bootstrap "
        f"resamples; {named}; {place['threads']} thread of {place['processor']}. On a machine with other work "
        f"the parts took {seconds}.\n"
    )


def _arrow(contest: Contest, key: str) -> str:
    return " ↑" if contest.better[key] > 0 else " ↓"


def _cell(values: list[float]) -> str:
    mean, low, high = values
    if mean > 1000:
        return f"{mean:.0e}"
    return f"{mean:.3f} ± {(high - low) / 2:.3f}"


def _signed(values: list[float]) -> str:
    mean, low, high = (f"{value:+.3f}" for value in values)
    return f"{mean} [{low}, {high}]"


def _loud(word: str) -> str:
    return f"**{word}**" if word == "worse" else word


# -- pictures -------------------------------------------------------------------------------------------------------


def save(figure: Any, name: str, dpi: int) -> None:
    """A small file: 256 colours are enough for lines and text."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    pyplot.close(figure)
    Image.open(buffer).convert("RGB").quantize(256).save(IMAGES / f"{name}.png", optimize=True)


def draw(results: Results) -> None:
    """Curves of neuron flipping, and bars of recovery."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    nets = results["latent"]
    figure, grid = pyplot.subplots(len(nets), 4, figsize=(13, 2.9 * len(nets)), squeeze=False, layout="constrained")
    for axes, (name, net) in zip(grid, nets.items(), strict=True):
        places = [(f"{order} first, {fill}") for fill in latent.FILLS for order in ("most", "least")]
        for axis, key in zip(axes, places, strict=True):
            for method, colour in DRAWN.items():
                if method in net["curves"]:
                    style = {"lw": 2.2} if method.startswith("μ") else {"lw": 1.2}
                    axis.plot(latent.SHARES, net["curves"][method][key], label=method, color=colour, **style)
            axis.set_title(f"{name}: {key}", fontsize=9)
            axis.set_xlabel("share of all channels ablated", fontsize=8)
        axes[0].set_ylabel("target logit, of its mean", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(DRAWN), fontsize=8)
    save(figure, "faithfulness_channels", dpi=70)

    questions = list(results["planted"]["questions"].items())
    figure, row = pyplot.subplots(1, len(questions), figsize=(13, 4), layout="constrained")
    for axis, (question, found) in zip(row, questions, strict=True):
        contest = planted.CHANNELS if question.startswith("channels") else planted.EDGES
        names = sorted(found["methods"], key=lambda one: found["methods"][one]["average precision"][0])
        for height, name in enumerate(names):
            mean, low, high = found["methods"][name]["average precision"]
            colour = "C3" if name in contest.ours else "C1" if name in planted.CONCEPTS else "0.6"
            axis.barh(height, mean, xerr=[[mean - low], [high - mean]], color=colour)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_title(question, fontsize=9)
        axis.set_xlabel("average precision", fontsize=8)
        axis.set_xlim(0, 1)
    save(figure, "faithfulness_paths", dpi=75)

    nets = results["input"]
    keys = ("logit, most first, zero", "logit, least first, blur", "sensitivity")
    figure, grid = pyplot.subplots(len(nets), 3, figsize=(13, 3.1 * len(nets)), squeeze=False, layout="constrained")
    for axes, (name, net) in zip(grid, nets.items(), strict=True):
        names = list(net["methods"])[::-1]
        for axis, key in zip(axes, keys, strict=True):
            for height, method in enumerate(names):
                mean, low, high = net["methods"][method][key]
                colour = "C3" if method in pixels.CONTEST.ours else "0.3"
                axis.errorbar(mean, height, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt=".", color=colour)
            axis.set_title(f"{name}: {key}{_arrow(pixels.CONTEST, key)}", fontsize=9)
            axis.set_yticks(range(len(names)), names if axis is axes[0] else [], fontsize=7)
            axis.grid(axis="x", color="0.9")
            if key == "sensitivity":
                axis.set_xscale("symlog", linthresh=0.1)
                axis.set_xlim(-0.05, 5)  # maps that are zero all over are beyond
    save(figure, "faithfulness_pixels", dpi=62)
