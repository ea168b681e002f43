"""Repetition of a benchmark of many models: selects the rows to measure, and reports the figures that change.

Every row has the time of its measurement. ``--before TIME`` measures only rows that are missing or older, smallest
models first, and rows are stored one by one, so that an interrupted run continues where it stopped.
"""

import argparse
import datetime
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

IGNORED = {"seconds", "date", "version", "error", "difference", "error_taps", "error_tap"}
"""Keys that no two runs share: times, and errors, which are rounding errors and have a limit of their own."""
ROUNDING = 1e-3
"""Largest change of a figure, relative to max(1, its size), that is attributed to float32."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--before``."""
    parser.add_argument(
        "--before",
        metavar="TIME",
        type=moment,
        help="only rows that are missing or were measured before this time (UTC, such as 2026-11-29 or "
        "2026-11-29T20:40), smallest models first",
    )


def moment(text: str) -> str:
    """Parses a day or time, in the format of stored rows, which sorts by time."""
    return datetime.datetime.fromisoformat(text).isoformat(timespec="minutes")


def dated(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row with the current time (UTC)."""
    return {**row, "date": datetime.datetime.now(datetime.UTC).replace(tzinfo=None).isoformat(timespec="minutes")}


def is_due(row: dict[str, Any] | None, before: str | None) -> bool:
    """Returns True if a row is to be measured: always without ``before``, else if it is missing or older."""
    return before is None or row is None or row.get("date", "") < before


def by_size(names: Iterable[str], rows: Iterable[dict[str, Any]]) -> list[str]:
    """Sorts models by their stored number of parameters; models without a row come last."""
    sizes = {row["model"]: row["parameters"] for row in rows if "parameters" in row}
    return sorted(names, key=lambda name: (name not in sizes, sizes.get(name, 0)))


def replace(path: Path, text: str) -> None:
    """Writes a file at once: a run that is interrupted leaves the old rows, and other processes read no part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def changes(old: dict[str, Any] | None, new: dict[str, Any]) -> list[str]:
    """Returns the figures of a row that differ from the stored ones, as ``key: old → new``.

    Numbers may differ by rounding. Names of taps where a figure is attained are compared only if the figure changed.
    """
    if old is None:
        return []
    keys = [key for key in {**old, **new} if key not in IGNORED]
    numbers = [key for key in keys if _is_number(old.get(key)) and _is_number(new.get(key))]
    changed = [key for key in numbers if not _is_close(float(old[key]), float(new[key]))]
    changed += [key for key in ("failed", "warnings", "is_unchanged") if old.get(key) != new.get(key)]
    changed += [key for key in keys if (key in old) != (key in new) and key not in changed]
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in dict.fromkeys(changed)]


def _is_number(value: Any) -> bool:
    """Returns True for a stored number; infinities and NaN are stored as text."""
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("inf", "-inf", "nan")


def _is_close(old: float, new: float) -> bool:
    return str(old) == str(new) or abs(new - old) <= ROUNDING * max(1.0, abs(old))
