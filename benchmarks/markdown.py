"""Formatting of Markdown tables, and their insertion into pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def grid(head: str, rows: Iterable[Sequence[object]]) -> str:
    """Returns a table in Markdown; ``head`` is its first line."""
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([head, rule, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def with_bounds(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Formats a mean with the bounds of its interval; with ``sign="+"``, positive numbers have a sign."""
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in values)
    return f"{mean} ({low} to {high})"


def small(number: float, digits: int = 0) -> str:
    """Formats a mass; values below one in a million are 0."""
    return "0" if abs(number) < 1e-6 else f"{number:.{digits}e}" if abs(number) < 5e-4 else f"{number:.3f}"


def with_part(page: str, mark: str, part: str) -> str:
    """Returns a page with the text between ``<!-- mark -->`` and the next ``<!-- end -->`` replaced.

    Raises:
        ValueError: If the page does not have the mark exactly once.
    """
    head, rest = page.split(f"<!-- {mark} -->")
    return f"{head}<!-- {mark} -->\n{part}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
