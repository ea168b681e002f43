"""Conservation check of every convolutional architecture in torchvision, without model-specific code.

``python -m benchmarks.architectures`` measures all classification, segmentation and video models without attention,
writes the results as JSON, and renders the tables of ``docs/architectures.md``. ``--models`` and ``--composite`` select
a subset and leave the other results unchanged, and ``--before`` what was not measured since a time; figures that change
are printed. ``--render`` only rewrites the page.
"""

import argparse
import fnmatch
import gc
import json
import math
import platform
import re
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from zennit.composites import EpsilonPlusFlat
from zennit.core import Composite

from benchmarks.markdown import small
from benchmarks.reruns import add_option, by_size, changes, dated, is_due, replace
from nrm_plugin import FuseBatchNorm, NRMAbsolute, NRMDefault, RelevanceMeasure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/architectures.json"
PAGE = ROOT / "docs/architectures.md"

ATTENTION = ("vit_*", "swin*", "maxvit*", "mvit*")
FAMILIES = {"classification": models, "segmentation": models.segmentation, "video": models.video}
COMPOSITES: dict[str, Composite] = {
    "NRMDefault": NRMDefault(),
    "EpsilonPlusFlat": EpsilonPlusFlat(),
    "EpsilonPlusFlat, fused": EpsilonPlusFlat(canonizers=[FuseBatchNorm()]),
    "NRMAbsolute": NRMAbsolute(),
}
FULL, SMALL = 224, 96
LARGE = 30e6
"""Models with more parameters run on small images: full ones take minutes and do not change the graph."""
OWN_SIZE = {"inception_v3": 299}
CLIPS = {"s3d": (16, 224)}  # the last pooling of S3D requires this size; the others pool adaptively
CLIP = (8, 112)
SEED, STATISTICS = 0, 4

LIMITS = {"conservation": 1e-4, "sink": 0.05, "variation": 1.5}


def listed() -> dict[str, str]:
    """Returns the family of every builder."""
    return {name: family for family, module in FAMILIES.items() for name in models.list_models(module=module)}


def has_attention(name: str) -> bool:
    """Returns True if a model is excluded."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in ATTENTION)


def shape_of(name: str, parameters: int, size: int | None = None) -> tuple[int, ...]:
    """Returns the input shape of a model, ``(C, H, W)`` or ``(C, T, H, W)``."""
    if listed()[name] == "video":
        frames, side = CLIPS.get(name, CLIP)
        return (3, frames, side if name in CLIPS or size is None else size, side if name in CLIPS else size or side)
    side = size or OWN_SIZE.get(name, SMALL if parameters > LARGE or listed()[name] == "segmentation" else FULL)
    return (3, side, side)


def build(name: str) -> nn.Module:
    """Returns a model with random weights in evaluation mode."""
    torch.manual_seed(SEED)
    options: dict[str, Any] = {}
    if listed()[name] == "segmentation":
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model.eval()


def settle(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Sets the statistics of batch normalization from one batch of noise; dropout stays disabled."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        if norms:
            model(torch.randn(STATISTICS, *shape))
    model.eval()


def target_of(model: nn.Module, x: Tensor) -> int | tuple[int, int, int]:
    """Returns the index of the largest output; for segmentation, at the center pixel."""
    with torch.no_grad():
        output = model(x)
    if not isinstance(output, Tensor):
        scores = output["out"][0]
        row, column = scores.shape[1] // 2, scores.shape[2] // 2
        return int(scores[:, row, column].argmax()), row, column
    return int(output[0].argmax())


def measured(model: nn.Module, x: Tensor, target: Any, composite: Composite) -> dict[str, Any]:
    """Returns the results of the conservation check of one model under one composite."""
    start = time.perf_counter()
    mu = RelevanceMeasure(model, x, [target], composite=composite)
    layers = mu.layers
    mass = {layer: float(values.sum()) for layer, values in mu.marginal(layers).items()}
    seconds = time.perf_counter() - start
    # Every query checks the weights for in-place changes, which takes longer than the query; there are none here.
    mu._check_fresh = lambda: None  # type: ignore[method-assign]
    variation = {layer: float(mu.variation(layer)) for layer in layers}
    total = {layer: mass[layer] + float(mu.sink(layer)) + float(mu.bypass(layer)) for layer in layers}
    error = {layer: abs(total[layer] - 1) / max(1.0, variation[layer]) for layer in layers}
    blocks = block_outputs(model, layers)
    worst = most(blocks, variation)
    return {
        "taps": len(layers),
        "blocks": len(blocks),
        "error": error[most(["input", *blocks], error)],
        "error_taps": error[most(layers, error)],
        "error_tap": most(layers, error),
        "residual": float(mu.sink("input", kind="residual")),
        "constants": float(mu.sink("input", kind="constants")),
        "variation_input": variation["input"],
        "variation_blocks": variation[worst],
        "variation_block": worst,
        "variation_taps": variation[most(layers, variation)],
        "variation_tap": most(layers, variation),
        "seconds": seconds,
    }


def most(layers: list[str], values: dict[str, float]) -> str:
    """Returns the layer with the largest value; NaN counts as the largest."""
    return max(layers, key=lambda layer: math.inf if math.isnan(values[layer]) else values[layer])


def block_outputs(model: nn.Module, layers: list[str]) -> list[str]:
    """Returns the taps at outputs of modules with children, and at the output of the model."""
    containers = {name for name, module in model.named_modules() if module._modules}
    return [layer for layer in layers if layer == "output" or re.split(r"[:\[]", layer)[0] in containers]


def run(name: str, composites: list[str], size: int | None) -> Iterator[dict[str, Any]]:
    """Yields the rows of one model."""
    row: dict[str, Any] = {"model": name, "family": listed()[name]}
    try:
        model = build(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        shape = shape_of(name, parameters, size)
        row |= {"parameters": parameters, "shape": shape}
        settle(model, shape)
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(SEED + 1))
        target = target_of(model, x)
    except Exception as error:
        yield from ({**row, "composite": composite, "failed": message(error)} for composite in composites)
        return
    for composite in composites:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                metrics = measured(model, x, target, COMPOSITES[composite])
            notes = sorted({f"{type(item.message).__name__}: {item.message}" for item in caught})
            yield {**row, "composite": composite, **metrics, **({"warnings": notes} if notes else {})}
        except Exception as error:
            yield {**row, "composite": composite, "failed": message(error)}
        gc.collect()


def message(error: Exception) -> str:
    """Returns the error as a table cell."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def faults(row: dict[str, Any]) -> list[str]:
    """Returns the limits that a row exceeds."""
    if "failed" in row:
        return ["failed"]
    checks = {
        "conservation": (row["error_taps"], LIMITS["conservation"]),
        "sink": (row["residual"], LIMITS["sink"] if row["composite"] == "NRMDefault" else math.inf),
        "V input": (row["variation_input"], LIMITS["variation"]),
        "V blocks": (row["variation_blocks"], LIMITS["variation"] if row["composite"] == "NRMAbsolute" else math.inf),
    }
    return [name for name, (value, limit) in checks.items() if not abs(float(value)) <= limit]


# -- results and page -----------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Returns the versions and settings of the measurement."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "zennit", "nrm-plugin")},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }


def stored(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the rows of a results file, keyed by model and composite; empty if the file does not exist."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {(row["model"], row["composite"]): row for row in rows}


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the rows of the same model and composite; other processes may have added rows in the meantime."""
    merged = stored(path) | {(row["model"], row["composite"]): row for row in rows}
    order = list(listed())
    ordered = sorted(
        merged.values(), key=lambda row: (order.index(row["model"]), list(COMPOSITES).index(row["composite"]))
    )
    lines = ",\n".join(json.dumps(compact(row), ensure_ascii=False) for row in ordered)
    replace(path, f'{{"environment": {json.dumps(environment())},\n"rows": [\n{lines}\n]}}\n')


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """Rounds numbers to four significant digits; converts infinities and NaN, which JSON lacks, to strings."""

    def short(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)

    return {key: short(value) for key, value in row.items()}


def line(row: dict[str, Any]) -> list[str]:
    """Returns one row of a table."""
    size = "×".join(map(str, row["shape"][1:])) if "shape" in row else "?"
    if "failed" in row:
        return [row["model"], size, row["failed"], *[""] * 6, "failed"]
    figures = {
        "error": ".0e",
        "error_taps": ".0e",
        "residual": ".3g",
        "constants": ".3g",
        "variation_input": ".3g",
        "variation_blocks": ".3g",
        "seconds": ".1f",
    }
    cells = [f"{float(row[key]):{form}}" for key, form in figures.items()]
    return [row["model"], size, *cells, ", ".join(faults(row))]


HEADER = "model|input|error, blocks|error, taps|residual|constants|V input|V blocks, max|s|exceeds".split("|")


def tables(results: dict[str, Any]) -> str:
    """Returns the environment, a summary, and one table with a row for each model."""
    rows = results["rows"]
    left_out = [name for name in listed() if has_attention(name)]
    missing = [
        f"{name} ({composite})"
        for name in listed()
        if not has_attention(name)
        for composite in COMPOSITES
        if not any((row["model"], row["composite"]) == (name, composite) for row in rows)
    ]
    parts = [
        ", ".join(f"{key} {value}" for key, value in results["environment"].items()),
        f"Excluded because they use attention: {', '.join(left_out)}.",
        *([f"**Not run:** {', '.join(missing)}."] if missing else []),
        summary(rows),
    ]
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["composite"]] = row
    if by_model:
        names = [f"{composite.rpartition(', ')[2]}: {title}" for composite, title in SHOWN]
        lines = [across(of_model) for of_model in by_model.values()]
        parts.append(markdown(["model", "input", "error", "s", *names], lines))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


SHOWN = {
    ("NRMDefault", "V input"): "variation_input",
    ("NRMDefault", "V blocks"): "variation_blocks",
    ("EpsilonPlusFlat", "residual"): "residual",
    ("EpsilonPlusFlat", "V input"): "variation_input",
    ("EpsilonPlusFlat", "V blocks"): "variation_blocks",
    ("EpsilonPlusFlat, fused", "residual"): "residual",
    ("EpsilonPlusFlat, fused", "V input"): "variation_input",
    ("EpsilonPlusFlat, fused", "V blocks"): "variation_blocks",
}
"""The figures of each model on the page. The others are the same for all models: no residual, and V = 1."""


def across(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the row of one model on the page; figures that exceed their limits are bold."""
    first = rows.get("NRMDefault", next(iter(rows.values())))
    failed = [row["failed"] for row in rows.values() if "failed" in row]
    if failed:
        return [first["model"], "?", failed[0], *[""] * (1 + len(SHOWN))]
    error = f"{max(float(row['error_taps']) for row in rows.values()):.0e}"
    cells = [f"**{error}**" if any("conservation" in faults(row) for row in rows.values()) else error]
    cells.append(f"{float(first['seconds']):.1f}")
    for (composite, title), key in SHOWN.items():
        row = rows.get(composite)
        if row is None:
            cells.append("")
            continue
        value = float(row[key])
        cell = small(value) if key == "residual" else three_digits(value)
        cells.append(f"**{cell}**" if title in faults(row) else cell)
    return [first["model"], "×".join(map(str, first["shape"][1:])), *cells]


def three_digits(value: float) -> str:
    """Formats a number with three digits, and large ones without an exponent."""
    return f"{value:.3g}" if not 1000 <= value < 1e6 else f"{value:,.0f}"


def summary(rows: list[dict[str, Any]]) -> str:
    """Returns the worst figures of each composite, with the model."""
    keys = {
        "error": ("error_taps", ".1e"),
        "residual": ("residual", ".2g"),
        "constants": ("constants", ".2g"),
        "V input": ("variation_input", ""),
        "V blocks": ("variation_blocks", ""),
    }
    lines = []
    for composite in COMPOSITES:
        selected = [row for row in rows if row["composite"] == composite]
        done = [row for row in selected if "failed" not in row]
        cells = []
        for key, form in keys.values():
            values = {row["model"]: float(row[key]) for row in done}
            worst = most(list(values), values) if values else None
            shown = {name: f"{value:{form}}" if form else three_digits(value) for name, value in values.items()}
            cells.append("" if worst is None else shown[worst] + f" ({worst})" * (len(set(shown.values())) > 1))
        exceeded = [name for row in selected for name in faults(row)]
        counts = ", ".join(f"{exceeded.count(name)} × {name}" for name in dict.fromkeys(exceeded))
        lines.append([composite, f"{len(done)} of {len(selected)}", *cells, counts or "none"])
    return markdown(["composite", "measured", *keys, "exceeds"], lines)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """Returns a table."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |\n" for row in rows)


def render(results: dict[str, Any]) -> None:
    """Writes the tables between the markers of the page."""
    start, end = "<!-- results -->\n", "<!-- end results -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    PAGE.write_text(before + start + "\n" + tables(results) + "\n" + end + rest.split(end)[1], encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Measures the models and renders the page, or only renders it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=main.__doc__)
    parser.add_argument("--models", nargs="+", default=["*"], help="names or patterns (default: all)")
    parser.add_argument("--composite", nargs="+", default=list(COMPOSITES), choices=list(COMPOSITES))
    parser.add_argument("--size", type=int, help="height and width of the images (default: by number of parameters)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write, or to read with --render")
    parser.add_argument("--render", action="store_true", help="only rewrite the page from the JSON")
    add_option(parser)
    options = parser.parse_args(arguments)
    if not options.render:
        chosen = [name for name in listed() if any(fnmatch.fnmatch(name, pattern) for pattern in options.models)]
        print(f"excluded because they use attention: {', '.join(name for name in chosen if has_attention(name))}")
        print("  ".join(HEADER))
        known = stored(options.out)
        names = [name for name in chosen if not has_attention(name)]
        for name in by_size(names, known.values()) if options.before else names:
            due = [key for key in options.composite if is_due(known.get((name, key)), options.before)]
            for row in run(name, due, options.size) if due else ():
                save(options.out, [dated(row)])
                print(f"{row['composite']:>22}  " + "  ".join(line(row)), flush=True)
                for change in changes(known.get((name, row["composite"])), compact(row)):
                    print(f"{'changed':>22}  {change}", flush=True)
            gc.collect()
    if options.out == RESULTS:
        render(json.loads(options.out.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
