"""Targets of the benchmark of speed, and the tables of docs/speed.md and docs/speed-details.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.markdown import grid, with_part

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/speed.md"
DETAILS = ROOT / "docs/speed-details.md"
CONDITIONS = 64
TOKENS = 512
Results = dict[str, Any]

PLAIN = "plain gradient"
JOINTS = "all neighboring channel pairs"
MAPS = f"{CONDITIONS} conditional maps of features.28 at the input"
BETWEEN = f"{CONDITIONS} conditions at features.26, map at features.19"
BARE = f"{CONDITIONS} plain partial gradients from features.28"
GIVEN = "μ(features.14[3] given j), every neuron j above"
CRP_PAIRS = "zennit-crp, all neighboring channel pairs"

Targets = list[tuple[str, str, str, float]]
"""``(model, computation, reference, upper bound)``."""
TARGETS: Targets = [
    *(("vgg16", f"all marginals, {name}", PLAIN, 1.6) for name in ("EpsilonPlus", "EpsilonPlusFlat")),
    *(("vgg16", f"all marginals, {name}", f"zennit, {name}", 0.5) for name in ("EpsilonPlus", "EpsilonPlusFlat")),
    *(("vgg16", f"all marginals, {name}", PLAIN, 2.2) for name in ("EpsilonGammaBox", "NRMDefault")),
    ("vgg16", "all marginals, EpsilonGammaBox", "zennit, EpsilonGammaBox", 0.4),
    ("vgg16", "all marginals, NRMDefault", "zennit, EpsilonGammaBox", 0.4),
    *(("vit_b_16", f"all marginals, {name}", PLAIN, 2.0) for name in ("EpsilonPlus", "NRMDefault")),
    *(("decoder", f"all marginals, {name}", PLAIN, 2.5) for name in ("EpsilonPlus", "NRMDefault")),
    *(("resnet50", f"all marginals, {name}", PLAIN, 2.0) for name in ("EpsilonPlus", "NRMDefault")),
    ("vgg16", f"{JOINTS}, EpsilonPlus", PLAIN, 2.3),
    ("vgg16", f"{JOINTS}, EpsilonPlus", CRP_PAIRS, 1e-3),
    ("vgg16", MAPS, f"zennit-crp, {MAPS}", 0.25),
    ("vgg16", MAPS, BARE, 2.0),
    ("vgg16", BETWEEN, f"zennit-crp, {BETWEEN}", 0.05),
    ("vgg16", GIVEN, "repeated marginal query, EpsilonPlusFlat", 1.0),
]

NETS = {"vgg16": "VGG16", "resnet50": "ResNet-50", "vit_b_16": "ViT-B/16", "decoder": "decoder, 512 tokens"}
"""Names of the nets in the summary."""
MARGINALS = "all marginals, "


def render(results: Results) -> None:
    """Writes the tables of both pages."""
    for path in (PAGE, DETAILS):
        path.write_text(rendered(path, results))


def rendered(path: Path, results: Results) -> str:
    """Returns one page with the tables of these results."""
    text = path.read_text()
    for name, part in (summaries(results) if path == PAGE else details(results)).items():
        text = with_part(text, name, part)
    return text


def summaries(results: Results) -> dict[str, str]:
    """Returns the tables of the short page: marginals of all layers, and other queries."""
    runs = [run for run in results["runs"] if run["allocator"] == "default"]
    measured = {
        (run["model"], work, reference, run["threads"]): _cell(value, most)
        for run in runs
        for work, reference, value, most in ratios(run)
    }
    targets = {(model, work, reference): most for model, work, reference, most in TARGETS}
    threads = sorted({run["threads"] for run in runs})
    return {
        "marginals": _marginals(measured, targets, threads),
        "queries": _queries(measured, threads),
        "peaks": _peaks(results),
    }


def _marginals(measured: dict[Any, str], targets: dict[Any, float], threads: list[int]) -> str:
    """Returns the times of all marginals, relative to a gradient and to Zennit, by net and composite."""
    found: dict[tuple[str, str], list[str]] = {}
    for model, work, reference, _ in TARGETS:
        if work.startswith(MARGINALS):
            found.setdefault((model, work), []).append(reference)
    lines = []
    for (model, work), references in found.items():
        shown = references if len(references) > 1 else [*references, ""]
        cells = [measured.get((model, work, reference, count), "") for reference in shown for count in threads]
        bounds = ", ".join(f"{targets[model, work, reference]:.3g}" for reference in references)
        lines.append([NETS[model], work.removeprefix(MARGINALS), *cells, bounds])
    heads = [f"× {name}, {_threads(count)}" for name in ("gradient", "Zennit") for count in threads]
    return grid(f"| network | composite | {' | '.join(heads)} | targets |", lines)


def _queries(measured: dict[Any, str], threads: list[int]) -> str:
    """Returns the times of joint and conditional relevance."""
    lines = [
        [
            work,
            "zennit-crp" if reference.startswith("zennit-crp") else reference.removesuffix(", EpsilonPlusFlat"),
            *(measured.get((model, work, reference, count), "") for count in threads),
            f"{most:.3g}",
        ]
        for model, work, reference, most in TARGETS
        if not work.startswith(MARGINALS)
    ]
    return grid(f"| query on VGG16 | relative to | {' | '.join(map(_threads, threads))} | target |", lines)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def details(results: Results) -> dict[str, str]:
    """Returns the tables of the page of details."""
    return {
        "times": "\n".join([_times(results["runs"]), "", _agreement(results), "", _place(results)]),
        "precision": _errors(results["runs"]),
        "bfloat16": _factors(results["runs"]),
    }


def _columns(runs: list[Results]) -> Iterator[tuple[Results, str]]:
    """Yields every run with the head of its column."""
    for run in runs:
        yield run, f"{_threads(run['threads'])}, {run['allocator']}"


def _times(runs: list[Results]) -> str:
    columns = list(dict.fromkeys(header for _, header in _columns(runs)))
    rows: dict[tuple[str, str, str, float], dict[str, float]] = {}
    for run, header in _columns(runs):
        for work, reference, value, most in ratios(run):
            rows.setdefault((run["model"], work, reference, most), {})[header] = value
    lines = [
        [model, work, reference, f"{most:.3g}"] + [_cell(values.get(column), most) for column in columns]
        for (model, work, reference, most), values in rows.items()
    ]
    return grid(f"| net | computation | relative to | target | {' | '.join(columns)} |", lines)


def _agreement(results: Results) -> str:
    shown = ", ".join(f"{value:.0e} to {name}" for name, value in results["runs"][0]["differences"].items())
    return f"Agreement with other packages on one thread, checked before timing: largest relative difference {shown}."


def _errors(runs: list[Results]) -> str:
    lines = [
        [f"{run['model']}, {name}", f"{errors['error / V']:.1e}", f"{errors['heat map']:.1e}"]
        for run in {run["model"]: run for run in reversed(runs)}.values()
        for name, errors in run["reduced precision"].items()
    ]
    return grid("| reduced precision | conservation error / V | heat map, relative difference from float32 |", lines)


def _factors(runs: list[Results]) -> str:
    columns = list(dict.fromkeys(header for _, header in _columns(runs)))
    factors_of: dict[str, dict[str, str]] = {}
    for run, header in _columns(runs):
        for work in run["seconds"]:
            if f"{work}, bfloat16" in run["seconds"]:
                factor = run["seconds"][f"{work}, bfloat16"] / run["seconds"][work]
                factors_of.setdefault(f"{run['model']}, {work}", {})[header] = f"{factor:.2f}"
    lines = [[name, *(factors.get(column, "") for column in columns)] for name, factors in factors_of.items()]
    return grid(f"| time with layers in bfloat16, × float32 | {' | '.join(columns)} |", lines)


def _peaks(results: Results) -> str:
    peaks = results["peak memory of vgg16 in MiB"]
    above = {name: value - peaks["nothing"] for name, value in peaks.items() if name != "nothing"}
    lines = [
        ["plain gradient" if name == "plain" else name, f"{value:.0f}", f"{value / above['plain']:.2f}"]
        for name, value in above.items()
    ]
    return grid("| peak memory in addition to the net, VGG16 | MiB | × plain gradient (target 2) |", lines)


def _place(results: Results) -> str:
    place = results["environment"]
    return (
        f"Python {place['python']}, torch {place['torch']}, zennit {place['zennit']}, captum {place['captum']}, "
        f"{place['cores']} cores of {place['processor']}, images of {results['size']} × {results['size']} pixels, "
        f"{TOKENS} tokens, float32. ✗: target missed. zennit-crp was timed on a sample of conditions and "
        "extrapolated linearly."
    )


def _cell(value: float | None, most: float) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if value <= most else f"{value:.3g} ✗"


def ratios(run: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """Returns the ``(computation, reference, measured, target)`` of one run."""
    seconds = run["seconds"]
    return [
        (work, reference, seconds[work] / seconds[reference], most)
        for model, work, reference, most in TARGETS
        if model == run["model"] and work in seconds and reference in seconds
    ]
