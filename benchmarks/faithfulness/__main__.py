"""Measures attribution methods on trained nets, and writes JSON, pages and figures.

``make faithfulness`` installs Quantus and zennit-crp and runs ``python -m benchmarks.faithfulness``, which measures
everything; ``ARGS="--only latent"``, ``planted`` or ``input`` measures one part and leaves the other results
unchanged; ``--render`` only writes the pages and figures from the results.

With ``--weights FILE --model vgg16 --images FOLDER`` the same is run on a net of torchvision and printed as JSON;
results that need Quantus or zennit-crp are omitted there if these are not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.default_composite import RESAMPLES
from benchmarks.faithfulness import latent, page, quantus_metrics
from benchmarks.faithfulness.nets import NETS, own_net
from benchmarks.faithfulness.tasks import PARTS, RESULTS_OF_PART, Results, run
from benchmarks.speed import environment

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/faithfulness.json"


def missing() -> list[str]:
    """Returns the packages that some of the results need and that are not installed."""
    installed = {"Quantus": quantus_metrics.IS_INSTALLED, "zennit-crp": latent.HAS_CRP}
    return [name for name, is_installed in installed.items() if not is_installed]


def measure(parts: Sequence[str], nets: Sequence[str], samples: int, processes: int, out: Path) -> Results:
    """Measures these parts, and saves after each net; other results are unchanged."""
    stored: Results = json.loads(out.read_text()) if out.exists() else {}
    started, load = time.perf_counter(), os.getloadavg()[0]
    packages = {"quantus": version("quantus"), "zennit-crp": version("zennit-crp")}
    is_whole = set(parts) == set(PARTS) and set(nets) == set(NETS)
    spent: dict[str, list[int]] = {}
    for name, results, seconds in run(parts, nets, samples, processes):
        for part, result in results.items():
            if part == name:
                stored[part] = result
            else:
                stored.setdefault(part, {})[name] = result
        for part in {"latent", "input"} & set(stored):  # in the order of the code, not of completion
            stored[part] = {net: stored[part][net] for net in NETS if net in stored[part]}
        spent |= seconds
        print(", ".join(f"{key}: {clock} s" for key, (clock, _) in seconds.items()), file=sys.stderr, flush=True)
        stored["environment"] = {**environment(), **packages, "threads": 1, "processes": processes}
        stored["settings"] = {"samples": samples, "seed": 0, "resamples": RESAMPLES}
        if is_whole:
            stored["time"] = {
                "seconds": round(time.perf_counter() - started),
                "seconds of processors": sum(processor for _, processor in spent.values()),
                "load before": round(load, 1),
                "load after": round(os.getloadavg()[0], 1),
                "seconds of clock and processor": spent,
            }
        out.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    return stored


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faithfulness", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--samples", type=int, default=512, help="for each net (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure only these parts")
    parser.add_argument("--nets", choices=NETS, nargs="+", help="measure only these nets")
    parser.add_argument("--processes", type=int, default=2, help="nets measured in parallel (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="only write the pages and their figures")
    parser.add_argument("--model", default="vgg16", help="torchvision model for --weights (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="file with a state dict of --model")
    parser.add_argument("--images", type=Path, help="folder with images, for --weights")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    parts = options.only or list(PARTS)
    absent = missing()
    if options.weights:
        if options.images is None:
            parser.error("--weights needs --images FOLDER with the images to explain.")
        for name in absent:
            print(f"{name} is not installed; results that need it are omitted.", file=sys.stderr)
        net = own_net(options.model, options.weights, options.images, options.samples)
        results = {part: RESULTS_OF_PART[part](net) for part in parts if part in RESULTS_OF_PART}
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return
    if options.render:
        page.render(json.loads(RESULTS.read_text()))
        return
    if absent:
        parser.error(
            f"{' and '.join(absent)} would be missing from the results; `make faithfulness` installs what is needed "
            "and measures. Stored results are unchanged; --render writes the pages from them."
        )
    results = measure(parts, options.nets or list(NETS), options.samples, options.processes, options.out)
    if options.out == RESULTS:
        page.render(results)


if __name__ == "__main__":
    main()
