"""Writes the generated parts of docs/cost.md and docs/cost-details.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cost.page import DETAILS, overview, tables
from benchmarks.cost.summary import summary
from benchmarks.markdown import with_part

SHORT = DETAILS.with_name("cost.md")
PARTS = {SHORT: {"summary": summary}, DETAILS: {"overview": overview, "measured": tables}}
"""The functions that generate the parts of each page, by the marker at their start."""


def write(results: dict[str, Any]) -> None:
    """Writes the tables of both pages."""
    for page in PARTS:
        page.write_text(rendered(results, page))


def rendered(results: dict[str, Any], page: Path) -> str:
    """Returns one page with the tables of these results."""
    text = page.read_text()
    for mark, part in PARTS[page].items():
        text = with_part(text, mark, part(results))
    return text
