"""The table at the top of docs/cost.md: the cost of each net in one line."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.cost.page import Row, figures, memory, usable
from benchmarks.cost.ways import COMPOSITES
from benchmarks.tables import grid

HEAD = "| network | gradient | plan | first call | recorded | Zennit | break-even, inputs | peak memory of a plan |"


def summary(results: dict[str, Any]) -> str:
    """Returns the table of all nets with one thread; each range is that of both composites."""
    rows = [row for row in usable(results.get("rows", [])) if row["threads"] == 1]
    return grid(HEAD, [cells(row, largest_batch(row["net"], results.get("peaks", []))) for row in rows])


def cells(row: Row, peak: Row | None) -> list[str]:
    """Returns one line of the table."""
    of = [figures(row, composite) for composite in COMPOSITES]
    times = {
        name: [figure.value for found in of if (figure := found[name]).value is not None]
        for name in ("plan", "first call", "recorded", "Zennit")
    }
    peaks = [] if peak is None else [memory(peak, composite)["plan"].value for composite in COMPOSITES]
    paying = [pays_from(found["first call"].value, found["plan"].value, found["recorded"].value) for found in of]
    gradient = f"{1e3 * row['seconds']['plain gradient'][0]:.0f} ms"
    return [
        row["net"],
        gradient,
        *(ranged([value for value in values if value is not None]) for values in times.values()),
        ranged([number for number in paying if number is not None]),
        ranged([value for value in peaks if value is not None]),
    ]


def pays_from(first: float | None, plan: float | None, recorded: float | None) -> float | None:
    """Returns the number of inputs from which making and using a plan takes less time than recordings, if any."""
    if first is None or plan is None or recorded is None or recorded <= plan:
        return None
    return max(1, math.ceil((first - plan) / (recorded - plan)))


def ranged(values: list[float]) -> str:
    """Returns the smallest and the largest value with two digits, or one of them if both look the same."""
    if not values:
        return ""
    low, high = (f"{value:.0f}" if value >= 100 else f"{value:.2g}" for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def largest_batch(net: str, peaks: list[Row]) -> Row | None:
    """Returns the peaks of a net with the most samples."""
    return max((row for row in peaks if row["net"] == net), key=lambda row: row["batch"], default=None)
