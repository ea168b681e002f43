"""Time of a measure as a multiple of one plain input gradient, and compared with other packages.

``python -m benchmarks.speed`` (``make bench``) prints a table of measured ratios and targets, and writes the times as
JSON with the environment. Each run is a separate process: with one thread, with all threads, and with one thread and
an allocator that retains freed memory (glibc's default returns the largest tensors to the system). Every round of a
run executes each computation once, so that load from other processes affects all of them; the ratio is taken between
the fastest rounds. Results are compared before they are timed.

zennit-crp is timed on a sample of conditions and extrapolated linearly. Without it (``make test-hosts`` installs it)
its rows are omitted.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from captum.attr import LRP
from torch import Tensor, nn
from tqdm import tqdm
from zennit.composites import EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from zennit.core import Composite

from benchmarks.decoder import WIDTH, Decoder
from benchmarks.speed_page import (
    BARE,
    BETWEEN,
    CONDITIONS,
    CRP_PAIRS,
    GIVEN,
    JOINTS,
    MAPS,
    PLAIN,
    TOKENS,
    ratios,
    render,
)
from nrm_plugin import Normalized, NRMDefault, RelevanceMeasure, at

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/speed.json"
COMPOSITES: dict[str, Callable[[], Composite]] = {
    "EpsilonPlus": EpsilonPlus,
    "EpsilonPlusFlat": EpsilonPlusFlat,
    "EpsilonGammaBox": lambda: EpsilonGammaBox(low=-3.0, high=3.0),
    "NRMDefault": NRMDefault,
}
TARGET = 3
CONVOLUTIONS = [f"features.{number}" for number in (28, 26, 24, 21, 19, 17, 14, 12, 10, 7, 5, 2, 0)]
SAMPLE = 8
SHORT = 96
"""Height and width of the image for the comparison of reduced precision on a CPU."""
RETAINING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}

RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""Freed memory is returned to the system immediately, so that a peak contains no unused memory."""


def build(name: str) -> nn.Module:
    """Returns a net of torchvision with random weights and batch-norm statistics from one batch."""
    torch.manual_seed(0)
    net = Decoder() if name == "decoder" else getattr(torchvision.models, name)(weights=None)
    if name.startswith("vit"):
        nn.init.normal_(net.heads.head.weight, std=0.02)  # torchvision initializes it with zeros
    with torch.no_grad():
        if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
            net.train()(torch.randn(8, 3, 96, 96))
    return net.eval().requires_grad_(False)  # type: ignore[no-any-return]


def inputs(name: str, size: int) -> Tensor:
    """Returns an image; embedded tokens for the decoder."""
    return torch.randn(1, TOKENS, WIDTH) if name == "decoder" else torch.randn(1, 3, size, size)


def plain_gradient(net: nn.Module, x: Tensor, composite: Composite | None = None) -> Tensor:
    """Returns the input gradient of one logit of each sample; in the context of a composite, Zennit's relevance."""
    leaf = x.clone().requires_grad_()
    if composite is None:
        output = net(leaf)
        return torch.autograd.grad(output[:, TARGET].sum(), leaf)[0]
    with composite.context(net):
        output = net(leaf)
        start = torch.zeros_like(output)
        start[:, TARGET] = 1
        return torch.autograd.grad(output, leaf, start)[0]


def all_marginals(
    net: nn.Module, x: Tensor, composite: Composite, reduced: torch.dtype | None = None
) -> tuple[RelevanceMeasure, dict[str, Tensor]]:
    """Returns the marginals of all taps and all sinks, normalized; optionally with layers in reduced precision."""
    with torch.autocast(x.device.type, reduced or torch.bfloat16, enabled=reduced is not None):
        mu = RelevanceMeasure(net, x, TARGET, composite=composite)
        marginals: dict[str, Tensor] = mu.marginal(mu.layers)
        mu.sinks()
    return mu, marginals


def reduced_precision(net: nn.Module, x: Tensor) -> dict[str, dict[str, float]]:
    """Returns the conservation error with layers in reduced precision, and difference from the heat map in float32."""
    deviations = {}
    for reduced in (torch.bfloat16, torch.float16):
        for name in ("EpsilonPlus", "NRMDefault"):
            _, exact = all_marginals(net, x, COMPOSITES[name]())
            mu, maps = all_marginals(net, x, COMPOSITES[name](), reduced)
            errors = [
                float(((values.sum() + mu.sink(tap) + mu.bypass(tap) - 1).abs() / mu.variation(tap)).max())
                for tap, values in maps.items()
            ]
            off = (maps["input"] - exact["input"]).abs().sum() / exact["input"].abs().sum()
            deviations[f"{name}, {str(reduced).removeprefix('torch.')}"] = {
                "error / V": max(errors),
                "heat map": float(off),
            }
    return deviations


def partial_gradients(net: nn.Module, x: Tensor, layer: str, count: int) -> list[Tensor]:
    """Runs one forward pass, and computes plain gradients from single channels of a layer to the input."""
    seen: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda *call: seen.append(call[-1].clone()))
    leaf = x.clone().requires_grad_()
    net(leaf)
    handle.remove()
    ones = torch.ones_like(seen[0][:, 0])
    return [torch.autograd.grad(seen[0][:, k], leaf, ones, retain_graph=True)[0] for k in range(count)]


def concept_maps(net: nn.Module, x: Tensor, upper: str, lower: str | None, count: int) -> Tensor:
    """Returns zennit-crp's relevance for single channels at the input, or at a layer."""
    from crp.attribution import CondAttribution

    conditions = [{"y": [TARGET], upper: [channel]} for channel in range(count)]
    recorded = [] if lower is None else [lower]
    leaf = x.clone().requires_grad_()
    parts = CondAttribution(net).generate(
        leaf, conditions, EpsilonPlusFlat(), record_layer=recorded, batch_size=SAMPLE, verbose=False
    )
    return torch.cat([part.heatmap if lower is None else part.relevances[lower] for part in parts])


Work = dict[str, Callable[[], object]]


def marginals_work(net: nn.Module, x: Tensor, is_vgg: bool) -> Work:
    """Returns the timed computations: a plain gradient, all marginals, Zennit's relevance, and Captum's LRP."""
    work: Work = {PLAIN: lambda: plain_gradient(net, x)}
    for name, make in COMPOSITES.items():
        if name in ("EpsilonPlus", "NRMDefault") or is_vgg:
            work[f"all marginals, {name}"] = lambda make=make: all_marginals(net, x, make())  # type: ignore[misc]
            if torch.get_num_threads() == 1:
                work[f"all marginals, {name}, bfloat16"] = lambda make=make: all_marginals(  # type: ignore[misc]
                    net, x, make(), torch.bfloat16
                )
        if is_vgg and name != "NRMDefault":
            work[f"zennit, {name}"] = lambda make=make: plain_gradient(net, x, make())  # type: ignore[misc]
    if is_vgg:
        work["captum LRP"] = lambda: LRP(net).attribute(x, target=TARGET)
    return work


def queries_work(net: nn.Module, x: Tensor) -> tuple[Work, dict[str, float]]:
    """Returns joints and conditionals on VGG16, and factors to extrapolate computations timed on a sample."""

    def joints(composite: Composite) -> object:
        mu = RelevanceMeasure(net, x, TARGET, composite=composite)
        return mu.joints(CONVOLUTIONS), mu.sinks()

    def maps(upper: str, lower: str) -> object:
        mu = RelevanceMeasure(net, x, TARGET, composite=EpsilonPlusFlat())
        return mu.marginal(lower, joint=[at(upper)[k] for k in range(CONDITIONS)])

    recorded = RelevanceMeasure(net, x, TARGET, composite=EpsilonPlusFlat())
    recorded.marginal("input")
    work: Work = {
        f"{JOINTS}, EpsilonPlus": lambda: joints(EpsilonPlus()),
        f"{JOINTS}, NRMDefault": lambda: joints(NRMDefault()),
        "repeated marginal query, EpsilonPlusFlat": lambda: recorded.marginal(recorded.layers),
        GIVEN: lambda: recorded.conditional(at("features.14")[3]),
        MAPS: lambda: maps("features.28", "input"),
        BETWEEN: lambda: maps("features.26", "features.19"),
        BARE: lambda: partial_gradients(net, x, "features.28", CONDITIONS),
    }
    if importlib.util.find_spec("crp") is None:
        return work, {}
    channels = sum(net.get_submodule(name).out_channels for name in CONVOLUTIONS[:-1])  # type: ignore[misc]
    work[f"zennit-crp, {MAPS}"] = lambda: concept_maps(net, x, "features.28", None, SAMPLE)
    work[f"zennit-crp, {BETWEEN}"] = lambda: concept_maps(net, x, "features.26", "features.19", SAMPLE)
    work[CRP_PAIRS] = lambda: concept_maps(net, x, "features.14", "features.12", SAMPLE)
    parts = CONDITIONS / SAMPLE
    return work, {f"zennit-crp, {MAPS}": parts, f"zennit-crp, {BETWEEN}": parts, CRP_PAIRS: channels / SAMPLE}


def differences(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Returns the largest relative differences to other packages, with ``residual="sink"``, before the timing."""

    def relative(ours: Tensor, theirs: Tensor) -> float:
        return float((ours - theirs).norm() / theirs.norm())

    largest = {
        f"zennit, {name}": relative(
            RelevanceMeasure(net, x, TARGET, composite=make(), residual="sink").marginal("input"),
            plain_gradient(net, x, make()),
        )
        for name, make in COMPOSITES.items()
        if name != "NRMDefault"
    }
    mu = RelevanceMeasure(net, x, TARGET, composite=Normalized(EpsilonPlusFlat(), residual="sink"))
    if importlib.util.find_spec("crp") is not None:
        scale = float(net(x)[0, TARGET])
        events = [at("features.28")[k] for k in range(SAMPLE)]
        theirs = concept_maps(net, x, "features.28", None, SAMPLE)
        largest["zennit-crp, maps"] = relative(scale * mu.marginal("input", joint=events)[:, 0].sum(1), theirs)
    pairs = mu.joints(CONVOLUTIONS[:3])[0]
    masked = mu.marginal("features.26", over="channel", joint=[at("features.28")[k] for k in range(SAMPLE)])
    largest["channel pairs, masked passes"] = relative(pairs[:, :SAMPLE], masked.transpose(0, 1))
    return largest


def measured(work: Work, rounds: int) -> dict[str, float]:
    """Returns the seconds of the fastest round; slow computations run only once or twice."""
    best: dict[str, float] = {}
    slow: dict[str, int] = {}
    for number in tqdm(range(rounds), desc="rounds", leave=False):
        for name, run in work.items():
            if number >= slow.get(name, rounds):
                continue
            gc.collect()
            _wait()
            started = time.perf_counter()
            run()
            _wait()
            took = time.perf_counter() - started
            best[name] = min(took, best.get(name, took))
            slow[name] = 1 if took > 12 else 2 if took > 4 else rounds
    return best


def _wait() -> None:
    """Synchronizes with an accelerator, which runs asynchronously."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def run(model: str, threads: int, rounds: int, size: int, queries: bool, device: str) -> dict[str, Any]:
    """Runs all measurements of one process."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    net, x = build(model).to(device), inputs(model, size).to(device)
    is_vgg = model.startswith("vgg")
    small = x if device != "cpu" else x[..., :SHORT, :SHORT]  # CPUs without float16 take a minute for a large image
    deviations = differences(net, x) if is_vgg and queries else {}
    work, extent = marginals_work(net, x, is_vgg), dict[str, float]()
    seconds = measured(work, rounds)
    if is_vgg and queries:
        more, extent = queries_work(net, x)
        seconds |= measured(more, rounds)
    seconds = {name: value * extent.get(name, 1.0) for name, value in seconds.items()}
    extrapolated = {name: SAMPLE for name in extent}
    precision = reduced_precision(net, small) if queries and threads == 1 else {}
    return {
        "seconds": seconds,
        "differences": deviations,
        "timed on this many conditions": extrapolated,
        "reduced precision": precision,
    }


def peak_of(work: str, model: str, size: int, device: str) -> float:
    """Runs one computation and returns the peak memory of the process, or of the accelerator, in MiB."""
    net, x = build(model).to(device), inputs(model, size).to(device)
    if work == "plain":
        plain_gradient(net, x)
    elif work != "nothing":
        all_marginals(net, x, COMPOSITES[work]())
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def spawned(*options: object, **environment: str) -> Any:
    """Runs this module in another process and parses its last line."""
    command = [sys.executable, "-m", "benchmarks.speed", *map(str, options)]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=variables)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224, help="height and width of the image (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu", help="or cuda; results then go to speed-cuda.json")
    parser.add_argument("--models", nargs="+", help="only these models")
    parser.add_argument("--quick", action="store_true", help="marginals only, one thread")
    parser.add_argument("--one-thread", action="store_true", help="skip the runs with all threads")
    parser.add_argument("--render", action="store_true", help="only write the tables of the docs")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "THREADS", "QUERIES"), help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=2, metavar=("WORK", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak_of(*args.peak, args.size, args.device))
        return
    if args.one:
        model, threads, queries = args.one
        print(json.dumps(run(model, int(threads), args.rounds, args.size, queries == "yes", args.device)))
        return
    if args.render:
        render(json.loads(RESULTS.read_text()))
        return
    cores = os.cpu_count() or 1
    others = ("resnet50", "vit_b_16", "decoder")
    plans = [("vgg16", 1, "default"), ("vgg16", 1, "retains memory"), *((name, 1, "default") for name in others)]
    if args.device != "cpu":
        plans = [(name, 1, "default") for name in ("vgg16", *others)]
        args.out = args.out.with_name("speed-cuda.json") if args.out == RESULTS else args.out
    elif cores > 1 and not args.quick and not args.one_thread:
        plans += [(name, cores, "default") for name in ("vgg16", *others)]
    plans = [plan for plan in plans if not args.models or plan[0] in args.models]
    results: dict[str, Any] = {"environment": environment(), "size": args.size, "runs": []}
    for model, threads, allocator in plans:
        queries = "no" if args.quick or allocator != "default" or model not in ("vgg16", "resnet50") else "yes"
        variables = RETAINING if allocator != "default" else {}
        sizes = ("--rounds", args.rounds, "--size", args.size, "--device", args.device)
        result = spawned("--one", model, threads, queries, *sizes, **variables)
        results["runs"].append({"model": model, "threads": threads, "allocator": allocator, **result})
        report(results["runs"][-1])
    sizes = ("--size", args.size, "--device", args.device)
    peaks = {work: spawned("--peak", work, "vgg16", *sizes, **RETURNING) for work in ("nothing", "plain", *COMPOSITES)}
    results["peak memory of vgg16 in MiB"] = peaks
    print("\npeak memory in addition to the net, in MiB and as a multiple of a plain gradient's (target: 2.0)")
    for work in ("plain", *COMPOSITES):
        above = peaks[work] - peaks["nothing"]
        print(f"{above:9.0f} {above / (peaks['plain'] - peaks['nothing']):9.2f}  {work}")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if args.out == RESULTS:
        render(results)


def report(run: dict[str, Any]) -> None:
    """Prints one run."""
    seconds, threads = run["seconds"], run["threads"]
    print(f"\n{run['model']}, {threads} thread{'s' * (threads > 1)}, allocator: {run['allocator']}")
    for name, value in run["differences"].items():
        print(f"  differs by {value:.1e} from {name}")
    for name, value in seconds.items():
        sampled = " (extrapolated)" if name in run["timed on this many conditions"] else ""
        print(f"{value:9.3f} s {value / seconds[PLAIN]:9.2f} × plain  {name}{sampled}")
    print(f"{'measured':>10} {'target':>8}")
    for work, reference, value, most in ratios(run):
        print(f"{value:10.3g} {most:8.3g} {'  ' if value <= most else '✗ '}{work} : {reference}")


def environment() -> dict[str, object]:
    """Returns the versions and machine."""
    packages = {name: version(name) for name in ("torch", "torchvision", "zennit", "captum")}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = os.cpu_count()
    return {
        "python": platform.python_version(),
        **packages,
        "machine": platform.machine(),
        "processor": processor,
        "cores": cores,
    }


if __name__ == "__main__":
    main()
