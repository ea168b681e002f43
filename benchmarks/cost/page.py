"""Tables of docs/cost-details.md: measured / target, and the profile of every row that exceeds a target."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cost.ways import (
    AGAIN,
    CAPTUM,
    COMPOSITES,
    CONSTANTS,
    DYNAMIC_LRP,
    FIRST,
    LXT,
    PLAIN,
    PLANNED,
    RECORDED,
    STATE,
    ZENNIT,
    ZENNIT_FIRST,
)
from benchmarks.tables import grid

DETAILS = Path(__file__).parents[2] / "docs/cost-details.md"
Row = dict[str, Any]

LIGHT = ("MobileNetV2", "MobileNetV3-small", "EfficientNet-B0", "ConvNeXt-atto", "GhostNetV3-0.5")
SEQUENCES = ("BERT-base, 128 tokens", "decoder, 512 tokens", "LSTM, 100 steps", "GCN, 10,000 nodes")
TARGETS: dict[str, tuple[float, float | None]] = {
    "VGG16 224": (1.6, 2.0),
    "ResNet-50 224": (1.6, 3.0),
    "ResNet-50 64": (1.6, 4.0),
    "ResNet-50 32": (2.0, 5.0),
    **dict.fromkeys(("ResNet-18 224", "ViT-B/16", "DeiT-tiny", "Swin-T"), (1.7, 3.0)),
    **dict.fromkeys(LIGHT, (1.8, 4.0)),
    **dict.fromkeys(SEQUENCES, (2.0, 4.0)),
    "500 tiny layers": (3.0, None),
}
"""Upper limits of a plan's call with all marginals, and of its first call, relative to a plain gradient."""
OF_ZENNIT, FIRST_OF_ZENNIT, OF_OTHERS = 0.7, 1.0, 1.0
PEAK, FIRST_PEAK, PEAK_OF_ZENNIT = 2.0, 2.5, 1.0
TIMM_MEDIAN, TIMM_WORST, TIMM_FIRST = 1.8, 4.0, 4.0


@dataclass(frozen=True)
class Figure:
    """A measured number and its target."""

    value: float | None
    target: float | None = None

    @property
    def is_missed(self) -> bool:
        """True if the target is exceeded or the number is not finite."""
        return self.value is not None and self.target is not None and not self.value <= self.target

    @property
    def factor(self) -> float | None:
        """The number as a multiple of its target."""
        return None if self.value is None or self.target is None else self.value / self.target

    def __str__(self) -> str:
        if self.value is None:
            return ""
        target = "" if self.target is None else f" / {self.target:g}"
        return f"{self.value:.3g}{target}{' ✗' if self.is_missed else ''}"


@dataclass(frozen=True)
class Named:
    """A figure of one net."""

    figure: Figure
    net: str

    def __str__(self) -> str:
        return f"{self.figure} ({self.net})"


def ratio(row: Row, way: str, reference: str = PLAIN) -> float | None:
    """Returns the median time of a computation as a multiple of another's, or None if one of them is missing."""
    ratios = row.get("ratios", {})
    if way not in ratios or reference not in ratios:
        return None
    value: float = ratios[way][0] / ratios[reference][0]
    return value


def figures(row: Row, composite: str) -> dict[str, Figure]:
    """Returns the numbers of one net, number of threads and composite, by column."""
    plan, first = TARGETS.get(row["net"], (None, None)) if row.get("batch", 1) == 1 else (None, None)
    planned, called = f"{PLANNED}, {composite}", f"{FIRST}, {composite}"
    of_zennit, first_of_zennit = (None, None) if row.get("without rule") else (OF_ZENNIT, FIRST_OF_ZENNIT)
    return {
        "plan": Figure(ratio(row, planned), plan),
        "first call": Figure(ratio(row, called), first),
        "recorded": Figure(ratio(row, f"{RECORDED}, {composite}")),
        "marginals again": Figure(ratio(row, f"{AGAIN}, {composite}")),
        "Zennit": Figure(ratio(row, ZENNIT)),
        "plan : Zennit": Figure(ratio(row, planned, ZENNIT), of_zennit),
        "first call : Zennit": Figure(ratio(row, called, ZENNIT_FIRST), first_of_zennit),
        "plan : Captum": Figure(ratio(row, planned, CAPTUM), OF_OTHERS),
        "plan : LXT": Figure(ratio(row, planned, LXT), OF_OTHERS),
        "plan : DynamicLRP": Figure(ratio(row, planned, DYNAMIC_LRP), OF_OTHERS),
    }


def missed(row: Row, composite: str) -> dict[str, Figure]:
    """Returns the numbers that exceed their targets."""
    return {name: figure for name, figure in figures(row, composite).items() if figure.is_missed}


def memory(row: Row, composite: str) -> dict[str, Figure]:
    """Returns the peaks of one net, batch size and composite, by column."""
    found = row["MiB"]

    def factor(way: str, reference: str = PLAIN) -> float | None:
        return found[way] / found[reference] if way in found and found.get(reference, 0) > 0 else None

    planned, called = f"{PLANNED}, {composite}", f"{FIRST}, {composite}"
    return {
        "gradient, MiB": Figure(found.get(PLAIN)),
        "Zennit": Figure(factor(ZENNIT_FIRST)),
        "plan": Figure(factor(planned), PEAK),
        "first call": Figure(factor(called), FIRST_PEAK),
        "plan : Zennit": Figure(factor(planned, ZENNIT_FIRST), PEAK_OF_ZENNIT),
    }


# -- tables -----------------------------------------------------------------------------------------------------------


def table(rows: list[Row], of: Callable[[Row, str], dict[str, Figure]], names: str, first: Callable[[Row], str]) -> str:
    """Returns a table with two lines per row, one for each composite."""
    lines, heads = [], list[str]()
    for row in rows:
        for composite in COMPOSITES:
            columns = of(row, composite)
            heads = list(columns)
            lines.append([first(row), composite, *columns.values()])
    return grid("| " + " | ".join([*names.split("|"), "composite", *heads]) + " |", lines)


def usable(rows: list[Row]) -> list[Row]:
    """Returns the rows with times, in the order of the targets."""
    order = list(TARGETS)
    timed = (row for row in rows if "ratios" in row)
    return sorted(timed, key=lambda row: (order.index(row["net"]), row.get("batch", 1)))


INTRODUCTIONS = {
    "times": "Times are relative to one input gradient. A column *a : b* is the time of *a* divided by that of *b*. "
    "In most rows, a plan takes one to two gradients, and a first call takes much longer.",
    "batches": "The columns are the same, for several samples at once. A plan takes less time than Zennit.",
    "peaks": "Peaks are relative to the peak of the gradient, which is given in MiB. On most convolutional networks, "
    "they are smaller for larger batches, because the constants of a plan do not grow with the batch.",
    "timm": "The table shows the median and the worst of the models. The worst is far from the median.",
    "failed": "These computations raised an error or failed the comparison before timing, so they are in no table.",
    "agreement": "Each row shows the largest difference between two ways of computing the same relevance, and where it "
    "occurs.",
    "missed": "Each entry lists the missed targets of a network and composite, and where the time or the memory goes.",
}
"""What the reader should see in each kind of table."""


def tables(results: dict[str, Any]) -> str:
    """Returns all tables and the environment, as Markdown."""
    place = results["environment"]
    rows, parts = results.get("rows", []), list[str]()
    parts.append(", ".join(f"{key} {value}" for key, value in place.items()) + ". ✗: target missed.")
    for count in sorted({row["threads"] for row in rows}):
        of_count = [row for row in usable(rows) if row["threads"] == count]
        parts += [f"### Time, {threads_of(count)}", INTRODUCTIONS["times"]]
        parts.append(table(of_count, figures, "net", lambda row: row["net"]))
        parts.append(loads(of_count))
    if of_batch := usable(results.get("batches", [])):
        parts += ["### Time of batches, 1 thread", INTRODUCTIONS["batches"]]
        parts += [table(of_batch, figures, "net|batch", batch_of), loads(of_batch)]
    if "peaks" in results:
        order = list(TARGETS)
        sorted_rows = sorted(results["peaks"], key=lambda row: (order.index(row["net"]), row["batch"]))
        parts += ["### Peak memory", INTRODUCTIONS["peaks"], table(sorted_rows, memory, "net|batch", batch_of)]
    if "timm" in results:
        parts += ["### timm", INTRODUCTIONS["timm"], timm_table(results["timm"]), loads(results["timm"])]
    measured = [*rows, *results.get("batches", []), *results.get("timm", [])]
    notes = [*failures(measured), *peak_failures(results.get("peaks", []))]
    parts += [
        "### Failed",
        *([INTRODUCTIONS["failed"], "\n".join(f"- {text}" for text in notes)] if notes else ["Nothing."]),
    ]
    if measured:
        parts += ["### Agreement before timing", INTRODUCTIONS["agreement"], agreement(measured)]
    missed = [f"- {text}" for text in misses(results)]
    parts += ["### Targets missed", *([INTRODUCTIONS["missed"], "\n".join(missed)] if missed else ["None."])]
    return "\n\n".join(parts)


def overview(results: dict[str, Any]) -> str:
    """Returns how many rows hold each target, and the row that misses it by the largest factor."""
    rows = usable(results.get("rows", []))
    kinds: list[tuple[str, list[Row], Callable[[Row, str], dict[str, Figure]]]] = [
        (f"time, {threads_of(count)}", [row for row in rows if row["threads"] == count], figures)
        for count in sorted({row["threads"] for row in rows})
    ]
    kinds.append(("time of batches, 1 thread", usable(results.get("batches", [])), figures))
    kinds.append(("peak memory", results.get("peaks", []), memory))
    lines = []
    for kind, some, of in kinds:
        found: dict[str, list[Named]] = {}
        for row in some:
            for composite in COMPOSITES:
                for column, figure in of(row, composite).items():
                    found.setdefault(column, []).append(Named(figure, f"{named(row)}, {composite}"))
        lines += [[kind, column, *held_by(some)] for column, some in found.items()]
    of_timm: dict[str, list[Named]] = {}
    for composite, column, count, median, worst in timm_figures(results.get("timm", [])):
        of_timm.setdefault(f"{column}, median of {count}", []).append(Named(median, composite))
        of_timm.setdefault(f"{column}, worst of {count}", []).append(Named(worst.figure, f"{worst.net}, {composite}"))
    lines += [["timm", column, *held_by(some)] for column, some in of_timm.items()]
    return grid("| | figure | targets that hold | largest miss |", [line for line in lines if line[2] != "0 of 0"])


def held_by(figures: list[Named]) -> tuple[str, str]:
    """Returns how many figures hold their target, and the largest miss."""
    factors = {one: one.figure.factor for one in figures}
    known = {one: factor for one, factor in factors.items() if factor is not None}
    wrong = [one for one in known if one.figure.is_missed]
    largest = max(wrong, key=lambda one: known[one], default=None)
    return f"{len(known) - len(wrong)} of {len(known)}", "" if largest is None else str(largest)


def threads_of(count: int) -> str:
    """Returns the number of threads in words."""
    return f"{count} thread{'s' * (count > 1)}"


def named(row: Row) -> str:
    """Returns the net, with its batch size if that is not one."""
    return f"{row['net']}, batch {row['batch']}" if row.get("batch", 1) > 1 else str(row["net"])


def batch_of(row: Row) -> str:
    """Returns the cells of the net and of its batch size."""
    return f"{row['net']} | {row['batch']}"


def label_of(row: Row) -> str:
    """Returns the net with its batch size, if that is not one, and the number of threads."""
    return f"{named(row)}, {threads_of(row['threads'])}"


def loads(rows: list[Row]) -> str:
    """Rounds, load of the machine by other processes, and the rows that were measured on each processor."""
    found = [row["load"] for row in rows if "load" in row]
    if not found:
        return ""
    nets: dict[str, list[str]] = {}
    for row in rows:
        nets.setdefault(row.get("processor", ""), []).append(named(row).removeprefix("timm/"))
    usual = max(nets, key=lambda processor: len(nets[processor]))
    others = [f" On {processor}: {', '.join(names)}." for processor, names in nets.items() if processor != usual]
    start = f"Measured on {usual}, load" if usual else "Load"
    return f"{start} of the machine meanwhile: {min(found):.2g} to {max(found):.2g} processes.{''.join(others)}"


def timm_table(rows: list[Row]) -> str:
    """Returns the medians and worst figures over the models of timm."""
    return grid("| composite | figure | models | median | worst |", timm_figures(rows))


def timm_figures(rows: list[Row]) -> list[tuple[str, str, int, Figure, Named]]:
    """Returns the number of models, the median and the worst figure, for each composite and column."""
    targets = {"plan": (TIMM_MEDIAN, TIMM_WORST), "first call": (TIMM_FIRST, None), "recorded": (None, None)}
    targets |= {"marginals again": (None, None), "Zennit": (None, None), "plan : Zennit": (OF_ZENNIT, 1.0)}
    lines: list[tuple[str, str, int, Figure, Named]] = []
    for composite in COMPOSITES:
        for column, (median, worst) in targets.items():
            values = {row["net"].removeprefix("timm/"): figures(row, composite)[column].value for row in rows}
            found = {name: value for name, value in values.items() if value is not None}
            if found:
                largest = max(found, key=lambda name: found[name])
                middle = Figure(statistics.median(found.values()), median)
                lines.append((composite, column, len(found), middle, Named(Figure(found[largest], worst), largest)))
    return lines


def failures(rows: list[Row]) -> Iterator[str]:
    """Yields the rows without times, or without a plan."""
    for row in rows:
        if "failed run" in row:
            yield f"{label_of(row)}: {row['failed run']}"
        for fault in row.get("faults", []):
            yield f"{named(row)}: {fault}"
        for composite, text in row.get("not planned", {}).items():
            yield f"{named(row)}, {composite}, no plan: {text}"


def peak_failures(rows: list[Row]) -> Iterator[str]:
    """Yields the computations without a peak, except those of other packages."""
    for row in rows:
        for way, error in row["failed"].items():
            if way != ZENNIT_FIRST:
                yield f"{row['net']}, batch {row['batch']}, peak memory of {way}: {error}"


def agreement(rows: list[Row]) -> str:
    """Returns the largest differences of all rows."""
    largest: dict[str, tuple[float, str]] = {}
    for row in rows:
        for name, off in row.get("differences", {}).items():
            for kind, value in off.items():
                key = f"{name}, {'one neuron' if kind == 'neuron' else 'sum over neurons'}"
                largest[key] = max(largest.get(key, (0.0, "")), (value, row["net"]))
    lines = [[name, f"{value:.0e}", net] for name, (value, net) in largest.items()]
    return grid("| compared with | largest difference / V | net |", lines)


def misses(results: dict[str, Any]) -> Iterator[str]:
    """Yields every exceeded target, by how much it is exceeded, and where the time goes; one entry per net."""
    rows = usable(results.get("rows", []))
    for several in [[row for row in rows if row["net"] == net] for net in dict.fromkeys(row["net"] for row in rows)]:
        yield from entries(several, several[0]["net"])
    for row in usable(results.get("batches", [])):
        yield from entries([row], named(row))
    for row in results.get("peaks", []):
        for composite in COMPOSITES:
            exceeded = {name: figure for name, figure in memory(row, composite).items() if figure.is_missed}
            if exceeded:
                label = f"{row['net']}, batch {row['batch']}, {composite}, peak memory"
                yield f"**{label}**: {listed(exceeded)}.{held(row, composite)}"


def entries(rows: list[Row], label: str) -> Iterator[str]:
    """Yields the misses of one net, by composite; the profile of one thread serves all."""
    for composite in COMPOSITES:
        exceeded = {row["threads"]: missed(row, composite) for row in rows}
        found = {count: figures for count, figures in exceeded.items() if figures}
        if found:
            parts = [f"{threads_of(count)}: {listed(figures)}." for count, figures in sorted(found.items())]
            names = {name for figures in found.values() for name in figures}
            why = next((text for row in rows if (text := reasons(row, composite, names))), "")
            yield f"**{label}, {composite}**: {' '.join(parts)}{why}"


def held(row: Row, composite: str) -> str:
    """Returns what a plan holds, as multiples of the peak of a plain gradient."""
    found, plain = row["MiB"], row["MiB"].get(PLAIN, 0)
    if f"{STATE}, {composite}" not in found or plain <= 0:
        return ""
    constants, state = (found[f"{what}, {composite}"] / plain for what in (CONSTANTS, STATE))
    return f" Of it, constants {constants:.2g}, tensors that the forward pass leaves for the relevance {state:.2g}."


def listed(figures: dict[str, Figure]) -> str:
    """Returns the figures with their names."""
    return ", ".join(f"{name} {figure}" for name, figure in figures.items())


def reasons(row: Row, composite: str, exceeded: Iterable[str]) -> str:
    """Describes where the time of the computations that exceed a target goes."""
    is_slow = any(name.startswith("plan") for name in exceeded)
    text = reason(row.get("profiles", {}).get(composite)) if is_slow else ""
    parts = row.get("stages", {}).get(composite)
    if parts is None or not any(name.startswith("first call") for name in exceeded):
        return text
    plain = row["seconds"][PLAIN][0]
    return f"{text} First call, in gradients: {staged(parts, plain)}."


def staged(parts: dict[str, float], plain: float) -> str:
    """Returns the stages of a first call as multiples of a plain gradient, the largest first."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds / plain:.2g}" for name, seconds in ordered)


def reason(profile: Row | None, top: int = 4) -> str:
    """Returns the profile in a sentence."""
    if profile is None:
        return ""
    operators = list(profile["operators"].items())[:top]
    shares = ", ".join(f"`{short(name)}` {share:.0%} ({calls} calls)" for name, (share, calls) in operators)
    return f" Plan: outside of operators {profile['outside operators']:.0%}; {shares}."


def short(operator: str) -> str:
    """Returns the name without its namespace."""
    return operator.rpartition("::")[2]


def profile_text(way: str, profile: Row) -> str:
    """Returns a profile for the terminal."""
    lines = [
        f"{way}: {1e3 * profile['seconds']:.1f} ms, {profile['calls']} operator calls",
        f"{profile['outside operators']:7.1%}  outside of operators (Python, autograd's engine, dispatch)",
    ]
    lines += [f"{share:7.1%}  {name}, {calls} calls" for name, (share, calls) in profile["operators"].items()]
    return "\n".join(lines)


def stages_text(parts: dict[str, float], plain: float, composite: str) -> str:
    """Returns the stages of a first call for the terminal."""
    lines = [f"{FIRST}, {composite}: {sum(parts.values()) / plain:.2f} plain gradients"]
    return "\n".join([*lines, *(f"{seconds / plain:7.2f}  {name}" for name, seconds in parts.items())])


def line(row: Row) -> str:
    """Returns one row for the terminal, while others are measured."""
    label = label_of(row)
    if "ratios" not in row:
        return f"{label}: {row.get('failed run') or '; '.join(row['faults'])}"
    shown = {name: f"{value[0]:.2f} ({value[1]:.2f}–{value[2]:.2f})" for name, value in row["ratios"].items()}
    plain = row["seconds"][PLAIN][0]
    return "\n".join(
        [f"{label}: plain gradient {1e3 * plain:.1f} ms, {row['rounds']} rounds, load {row.get('load')}"]
        + [f"    {cell}  {name}" for name, cell in shown.items() if name != PLAIN]
        + [f"    no {name}: {text}" for name, text in row["failed"].items()]
    )
