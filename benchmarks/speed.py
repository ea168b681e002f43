"""How long a measure takes, as a multiple of one plain input gradient measured beside it.

``python -m benchmarks.speed`` prints the ratios and writes them as JSON with the environment; ``make bench`` does it on
one thread and on all. Each round runs every piece of work once, in turn, so that a noisy neighbour meets all of them;
the ratio is that of the fastest rounds. Before anything is timed the results are compared with those of Zennit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm
from zennit.composites import EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from zennit.core import Composite

from nrm_plugin import NRMDefault, RelevanceMeasure, at

RESULTS = Path(__file__).parent / "results/speed.json"
COMPOSITES: dict[str, Callable[[], Composite]] = {
    "EpsilonPlus": EpsilonPlus,
    "EpsilonPlusFlat": EpsilonPlusFlat,
    "EpsilonGammaBox": lambda: EpsilonGammaBox(low=-3.0, high=3.0),
    "NRMDefault": NRMDefault,
}
TARGET = 3
CONVOLUTIONS = [f"features.{number}" for number in (28, 26, 24, 21, 19, 17, 14, 12, 10, 7, 5, 2, 0)]
CONDITIONS = 64


def build(name: str) -> nn.Module:
    """A net of torchvision with random weights; batch-norm statistics of one batch in training mode."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None)
    with torch.no_grad():
        if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
            net.train()(torch.randn(8, 3, 96, 96))
    return net.eval().requires_grad_(False)


def plain_gradient(net: nn.Module, x: Tensor, composite: Composite | None = None) -> Tensor:
    """The input gradient of one logit of each sample; in the context of a composite, Zennit's relevance."""
    leaf = x.clone().requires_grad_()
    if composite is None:
        output = net(leaf)
        return torch.autograd.grad(output[:, TARGET].sum(), leaf)[0]
    with composite.context(net):
        output = net(leaf)
        start = torch.zeros_like(output)
        start[:, TARGET] = 1
        return torch.autograd.grad(output, leaf, start)[0]


def all_marginals(net: nn.Module, x: Tensor, composite: Composite) -> dict[str, Tensor]:
    """Marginals of all taps and the sinks, normalized."""
    mu = RelevanceMeasure(net, x, TARGET, composite=composite)
    marginals: dict[str, Tensor] = mu.marginal(mu.layers)
    mu.sinks()
    return marginals


def partial_gradients(net: nn.Module, x: Tensor, layer: str, count: int) -> list[Tensor]:
    """One forward pass, and bare gradients from single channels of a layer to the input."""
    seen: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda *call: seen.append(call[-1].clone()))
    leaf = x.clone().requires_grad_()
    net(leaf)
    handle.remove()
    ones = torch.ones_like(seen[0][:, 0])
    return [torch.autograd.grad(seen[0][:, k], leaf, ones, retain_graph=True)[0] for k in range(count)]


def work_on(net: nn.Module, x: Tensor, is_vgg: bool) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name; the plain gradient first."""
    work: dict[str, Callable[[], object]] = {"plain gradient": lambda: plain_gradient(net, x)}
    for name, make in COMPOSITES.items():
        if name in ("EpsilonPlus", "NRMDefault") or is_vgg:
            work[f"all marginals, {name}"] = lambda make=make: all_marginals(net, x, make())  # type: ignore[misc]
        if is_vgg and name != "NRMDefault":
            work[f"zennit, {name}"] = lambda make=make: plain_gradient(net, x, make())  # type: ignore[misc]
    if not is_vgg:
        return work

    def joints(composite: Composite) -> object:
        mu = RelevanceMeasure(net, x, TARGET, composite=composite)
        return mu.joints(CONVOLUTIONS), mu.sinks()

    def repeated() -> object:
        return asked.marginal(asked.layers)

    def conditional() -> object:
        return asked.conditional(at("features.14")[3], "features.28")

    def maps() -> object:
        mu = RelevanceMeasure(net, x, TARGET, composite=EpsilonPlusFlat())
        return mu.marginal("input", joint=[at("features.28")[k] for k in range(CONDITIONS)])

    def between() -> object:
        mu = RelevanceMeasure(net, x, TARGET, composite=EpsilonPlusFlat())
        return mu.marginal("features.19", joint=[at("features.26")[k] for k in range(CONDITIONS)])

    asked = RelevanceMeasure(net, x, TARGET, composite=EpsilonPlusFlat())
    asked.marginal("input")
    work["all neighbouring channel pairs, EpsilonPlus"] = lambda: joints(EpsilonPlus())
    work["all neighbouring channel pairs, NRMDefault"] = lambda: joints(NRMDefault())
    work["marginals asked again, EpsilonPlusFlat"] = repeated
    work["μ(features.14[3] given j) for all of features.28"] = conditional
    work[f"{CONDITIONS} conditional maps of features.28 at the input"] = maps
    work[f"{CONDITIONS} conditions at features.26 read at features.19"] = between
    work[f"{CONDITIONS} bare partial gradients from features.28"] = lambda: partial_gradients(
        net, x, "features.28", CONDITIONS
    )
    return work


def check(net: nn.Module, x: Tensor) -> float:
    """The largest relative difference to Zennit at the input, with the residual in the sink."""
    worst = 0.0
    for make in (EpsilonPlus, EpsilonPlusFlat, COMPOSITES["EpsilonGammaBox"]):
        theirs = plain_gradient(net, x, make())
        ours = RelevanceMeasure(net, x, TARGET, composite=make(), residual="sink").marginal("input")
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


def measure(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of some rounds; what takes longest is run twice at most."""
    best: dict[str, float] = {}
    slow: set[str] = set()
    for number in tqdm(range(rounds), desc="rounds", leave=False):
        for name, run in work.items():
            if number > 1 and name in slow:
                continue
            gc.collect()
            started = time.perf_counter()
            run()
            took = time.perf_counter() - started
            best[name] = min(took, best.get(name, took))
            if took > 10 * best["plain gradient"]:
                slow.add(name)
    return best


def peaks(model: str, size: int) -> dict[str, float]:
    """Peak memory in MiB of a process of its own for each piece of work; the net itself is in all of them."""
    found = {}
    for what in ("nothing", "plain", "marginals"):
        command = [sys.executable, "-m", "benchmarks.speed", "--peak", what, "--models", model, "--size", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        found[what] = float(done.stdout)
    return found


def peak_of(what: str, model: str, size: int) -> float:
    """Runs one piece of work and tells the peak of this process in MiB."""
    net, x = build(model), torch.randn(1, 3, size, size)
    if what == "plain":
        plain_gradient(net, x)
    elif what == "marginals":
        all_marginals(net, x, EpsilonPlusFlat())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet50"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", choices=["nothing", "plain", "marginals"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak_of(args.peak, args.models[0], args.size))
        return
    found: dict[str, Any] = {"environment": environment(), "size": args.size, "runs": []}
    for model in args.models:
        net, x = build(model), torch.randn(1, 3, args.size, args.size)
        difference = check(net, x) if model.startswith("vgg") else None
        for threads in dict.fromkeys(args.threads):
            torch.set_num_threads(threads)
            seconds = measure(work_on(net, x, model.startswith("vgg")), args.rounds)
            ratios = {name: value / seconds["plain gradient"] for name, value in seconds.items()}
            found["runs"].append(
                {"model": model, "threads": threads, "difference to zennit": difference, "seconds": seconds}
            )
            report(model, threads, seconds, ratios)
    if "vgg16" in args.models:
        found["peak memory in MiB, vgg16"] = peaks("vgg16", args.size)
        print("peak memory in MiB:", found["peak memory in MiB, vgg16"])
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def report(model: str, threads: int, seconds: dict[str, float], ratios: dict[str, float]) -> None:
    """Prints one table."""
    print(f"\n{model}, {threads} thread{'s' * (threads > 1)}: one plain gradient is {seconds['plain gradient']:.3f} s")
    for name, ratio in ratios.items():
        theirs = seconds.get(name.replace("all marginals", "zennit"))
        beside = f"{seconds[name] / theirs:8.2f} × Zennit" if theirs and name.startswith("all marginals") else ""
        print(f"{ratio:9.2f} ×{beside:18s}  {name}")


def environment() -> dict[str, object]:
    """Versions and machine."""
    packages = {name: version(name) for name in ("torch", "torchvision", "zennit", "captum")}
    return {"python": platform.python_version(), **packages, "machine": platform.machine(), "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
