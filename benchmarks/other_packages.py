"""Conservation check of convolutional models from other packages, without model-specific code.

``python -m benchmarks.other_packages`` measures every model of ``other_models.py`` with an installed package, writes
the results as JSON, and renders the tables of ``docs/other-packages.md``. ``--packages`` and ``--models`` select a
subset and leave the other results unchanged, and ``--before`` what was not measured since a time; figures that change
are printed. ``--render`` only rewrites the page. None of the packages is a dependency: install those of interest.
Nothing is downloaded, weights are as initialized by the builders.
"""

import argparse
import fnmatch
import gc
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlusFlat
from zennit.core import Composite

from benchmarks.architectures import compact, environment, markdown, message, most
from benchmarks.markdown import small
from benchmarks.other_models import PACKAGES, Case
from benchmarks.reruns import add_option, by_size, changes, dated, is_due, replace
from nrm_plugin import NRMDefault, RelevanceMeasure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/other_packages.json"
PAGE = ROOT / "docs/other-packages.md"
COMPOSITES: dict[str, Composite] = {"NRMDefault": NRMDefault(), "EpsilonPlusFlat": EpsilonPlusFlat()}
LIMITS = {"conservation": 1e-4, "sink": 0.05, "variation": 1.1}
SEED, STATISTICS = 0, 4


# -- measuring ------------------------------------------------------------------------------------------------------


def drawn(shapes: list[tuple[int, ...]], batch: int, seed: int) -> tuple[Tensor, ...]:
    """Returns noise as inputs."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """Returns a model with random weights that depend only on the seed.

    Some packages draw random numbers when they are imported, which happens once per process, in the first builder that
    needs them. The model is therefore built again after imports, so that its weights do not depend on earlier models.
    """
    imported = -1
    while imported != len(sys.modules):
        imported = len(sys.modules)
        torch.manual_seed(SEED)
        np.random.seed(SEED)
        model = build()
    return model


def draw_zeros(model: nn.Module) -> None:
    """Redraws layers with zero-initialized weights because their output does not depend on the input."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim > 1 and not bool(weight.any()):
            nn.init.normal_(weight, std=0.02)


def settle(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Sets the statistics of batch normalization from one batch; dropout stays disabled."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.track_running_stats:
            norm.train().momentum = 1.0
    with torch.no_grad():
        if norms:
            model(*inputs)
    model.eval()


def chosen(returned: Any, output: Any) -> Tensor:
    """Returns the explained tensor among the outputs of a model."""
    if output is None:
        output = next((key for key in ("logits", "out") if not isinstance(returned, Tensor) and key in returned), None)
    if output is None:
        return (
            returned
            if isinstance(returned, Tensor)
            else next(iter(returned.values() if hasattr(returned, "values") else returned))
        )
    if callable(output):
        return output(returned)  # type: ignore[no-any-return]
    return getattr(returned, output) if isinstance(output, str) and hasattr(returned, output) else returned[output]  # type: ignore[no-any-return]


def target_of(scores: Tensor) -> Any:
    """Returns the largest channel, at the center of all other dimensions."""
    if scores.ndim == 1:
        return None
    middle = [size // 2 for size in scores.shape[2:]]
    return (int(scores[(0, slice(None), *middle)].argmax()), *middle) if middle else int(scores[0].argmax())


def measured(model: nn.Module, inputs: tuple[Tensor, ...], output: Any, composite: Composite) -> dict[str, Any]:
    """Returns the results of the conservation check of one model under one composite."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        returned = model(*inputs)
    output = None if isinstance(returned, Tensor) else output
    scores = chosen(returned, output)
    target = target_of(scores)
    expected = (
        scores.reshape(-1)[:1]
        if target is None
        else scores[(0, *target) if isinstance(target, tuple) else (0, target)].reshape(1)
    )
    start = time.perf_counter()
    options = {} if target is None else {"target": [target]}
    mu = RelevanceMeasure(
        model, inputs if len(inputs) > 1 else inputs[0], output=output, composite=composite, **options
    )
    layers = mu.layers
    mass = {layer: float(values.sum()) for layer, values in mu.marginal(layers).items()}
    seconds = time.perf_counter() - start
    mu._check_fresh = lambda: None  # type: ignore[method-assign]  # the weights do not change here
    variation = {layer: float(mu.variation(layer)) for layer in layers}
    error = {
        layer: abs(mass[layer] + float(mu.sink(layer)) + float(mu.bypass(layer)) - 1) / max(1.0, variation[layer])
        for layer in layers
    }
    taps = [layer for layer in layers if layer == "input" or layer.startswith("input[")]
    return {
        "taps": len(layers),
        "difference": float((mu.output - expected).abs().max()) / max(1.0, float(expected.abs().max())),
        "is_unchanged": all(torch.equal(value, before[key]) for key, value in model.state_dict().items()),
        "error": error[most(layers, error)],
        "error_tap": most(layers, error),
        "residual": sum(float(value.sum()) for value in mu.sinks("residual").values()),
        "constants": sum(float(value.sum()) for value in mu.sinks("constants").values()),
        "variation": max(variation[tap] for tap in taps),
        "variation_taps": variation[most(layers, variation)],
        "seconds": seconds,
    }


def run(package: str, name: str, case: Case, composites: Sequence[str] = tuple(COMPOSITES)) -> Iterator[dict[str, Any]]:
    """Yields the rows of one model; one row if it cannot be built."""
    build, shapes, output = case
    row: dict[str, Any] = {
        "package": package,
        "version": version(package.replace("_", "-")),
        "model": name,
        "shapes": shapes,
    }
    try:
        model = built(build).eval().requires_grad_(False)
        draw_zeros(model)
        settle(model, drawn(shapes, STATISTICS, SEED))
        inputs = drawn(shapes, 1, SEED + 1)
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    except Exception as error:
        yield {**row, "composite": "NRMDefault", "failed": f"cannot be built: {reason(error)}"}
        return
    for composite in composites:
        try:
            yield {**row, "composite": composite, **measured(model, inputs, output, COMPOSITES[composite])}
        except Exception as error:
            yield {**row, "composite": composite, "failed": reason(error)}
        gc.collect()


def reason(error: Exception) -> str:
    """Returns the error message without local paths."""
    return re.sub(r"/\S*/site-packages/", "", message(error))


def faults(row: dict[str, Any]) -> list[str]:
    """Returns the limits that a row exceeds."""
    if "failed" in row:
        return ["failed"]
    default = row["composite"] == "NRMDefault"
    checks = {
        "conservation": (row["error"], LIMITS["conservation"]),
        "output": (row["difference"], LIMITS["conservation"]),
        "sink": (row["residual"], LIMITS["sink"] if default else math.inf),
        "variation": (row["variation"], LIMITS["variation"] if default else math.inf),
        "state": (0.0 if row["is_unchanged"] else math.inf, 0.0),
    }
    return [name for name, (value, limit) in checks.items() if not abs(float(value)) <= limit]


# -- results --------------------------------------------------------------------------------------------------------


def stored(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Returns the rows of a file, keyed by package, model and composite; empty if the file does not exist."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {(row["package"], row["model"], row["composite"]): row for row in rows}


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the rows of the same package, model and composite."""
    merged = stored(path) | {(row["package"], row["model"], row["composite"]): row for row in rows}
    lines = ",\n".join(json.dumps(compact(row), ensure_ascii=False) for row in merged.values())
    replace(path, f'{{"environment": {json.dumps(environment())},\n"rows": [\n{lines}\n]}}\n')


COLUMNS = "package|version|models|measured|error|residual|constants|V input, NRMDefault|limits exceeded".split("|")


def tables(results: dict[str, Any]) -> str:
    """Returns the environment, a summary for each package, failures and exceeded limits."""
    rows = results["rows"]
    packages = dict.fromkeys(row["package"] for row in rows)
    lines = [summary(package, [row for row in rows if row["package"] == package]) for package in packages]
    lines.append(summary("all", rows))
    failed = {(row["package"], row["model"]): row["failed"] for row in rows if "failed" in row}
    exceeding = [row for row in rows if "failed" not in row and faults(row)]
    exceeding.sort(key=lambda row: -float(row["variation"]))
    cells = [
        [f"{row['package']}: {row['model']}", *(_cell(row, *limited) for limited in LIMITED.items())]
        for row in exceeding
    ]
    names = {
        package: list(dict.fromkeys(row["model"] for row in rows if row["package"] == package)) for package in packages
    }
    return "\n\n".join(
        [
            ", ".join(f"{key} {value}" for key, value in results["environment"].items()),
            markdown(COLUMNS, lines).rstrip(),
            "## Models that raise an error",
            markdown(
                ["model", "message"],
                [[f"{package}: {name}", _sentence(text)] for (package, name), text in failed.items()],
            ).rstrip(),
            "## Models that exceed a limit",
            markdown(["model", "V input", "residual"], cells).rstrip(),
            "## All models",
            "\n".join(f"- **{package}**: {', '.join(names[package])}" for package in packages),
        ]
    )


LIMITED = {"variation": "variation", "residual": "sink"}
"""Figures shown of the models that exceed a limit, with the name of the limit."""


def _cell(row: dict[str, Any], key: str, limit: str) -> str:
    cell = small(float(row[key])) if key == "residual" else f"{float(row[key]):.3g}"
    return f"**{cell}**" if limit in faults(row) else cell


def _sentence(text: str) -> str:
    """Returns the first sentence of a message."""
    found = re.match(r".*?\.(?=\s|$)", text)
    return found[0] if found else text


def summary(package: str, rows: list[dict[str, Any]]) -> list[str]:
    """Returns the worst figures of a package."""
    done = [row for row in rows if "failed" not in row]
    default = [row for row in done if row["composite"] == "NRMDefault"]

    def worst(key: str, rows: list[dict[str, Any]], form: str) -> str:
        return f"{max((float(row[key]) for row in rows), default=math.nan):{form}}"

    versions = {row["version"] for row in rows}
    models = {(row["package"], row["model"]) for row in rows}
    failed = {(row["package"], row["model"]) for row in rows if "failed" in row}
    counts = [name for row in done for name in faults(row)]
    return [
        package,
        versions.pop() if len(versions) == 1 else "",
        str(len(models)),
        str(len(models - failed)),
        worst("error", done, ".0e"),
        worst("residual", default, ".2g"),
        worst("constants", default, ".2g"),
        worst("variation", default, ".3g"),
        ", ".join(f"{counts.count(name)} × {name}" for name in dict.fromkeys(counts)),
    ]


def render(results: dict[str, Any]) -> None:
    """Writes the tables between the markers of the page."""
    start, end = "<!-- results -->\n", "<!-- end results -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    PAGE.write_text(before + start + "\n" + tables(results) + "\n\n" + end + rest.split(end)[1], encoding="utf-8")


def print_row(row: dict[str, Any], old: dict[str, Any] | None) -> None:
    """Prints the figures of a row, and which of them changed."""
    keys = ("error", "difference", "residual", "constants", "variation", "seconds")
    shown = row.get("failed") or " ".join(f"{key} {row[key]:.2g}" for key in keys)
    name = f"{row['package']}/{row['model']} {row['composite']}"
    print(f"{name}: {shown} {' '.join(faults(row)).upper()}", flush=True)
    for change in changes(old, compact(row)):
        print(f"{name}: changed: {change}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Measures the models and renders the page, or only renders it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.other_packages", description=main.__doc__)
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), choices=list(PACKAGES))
    parser.add_argument("--models", nargs="+", default=["*"], help="names or patterns (default: all)")
    parser.add_argument("--composite", nargs="+", default=list(COMPOSITES), choices=list(COMPOSITES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write")
    parser.add_argument("--render", action="store_true", help="only rewrite the page from the JSON")
    add_option(parser)
    options = parser.parse_args(arguments)
    if options.render:
        return render(json.loads(options.out.read_text(encoding="utf-8")))
    warnings.simplefilter("ignore")
    for package in options.packages:
        try:
            version(package.replace("_", "-"))
        except PackageNotFoundError:
            print(f"{package} is not installed", flush=True)
            continue
        known = stored(options.out)
        cases = PACKAGES[package]()
        chosen = [name for name in cases if any(fnmatch.fnmatch(name, pattern) for pattern in options.models)]
        own = [row for row in known.values() if row["package"] == package]
        for name in by_size(chosen, own) if options.before else chosen:
            due = [key for key in options.composite if is_due(known.get((package, name, key)), options.before)]
            for row in run(package, name, cases[name], due) if due else ():
                save(options.out, [dated(row)])
                print_row(row, known.get((package, name, row["composite"])))
            gc.collect()
    if options.out == RESULTS:
        render(json.loads(options.out.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
