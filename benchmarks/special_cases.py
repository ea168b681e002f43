"""Known methods as expressions of this package, and their differences from the original implementations.

``python -m benchmarks.special_cases`` evaluates every expression of docs/special-cases.md, computes the same with the
method's own package or with its published formula in :mod:`benchmarks.known_methods`, writes the largest differences
as JSON and renders the page. Rows with a missing package keep their previous figure; `make special-cases` measures
all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.markdown import with_part
from benchmarks.special_case import Row
from benchmarks.special_case_rows import ROWS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/special_cases.json"
PAGE = ROOT / "docs/special-cases.md"


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the table of docs/special-cases.md")
    args = parser.parse_args()
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    if not args.render:
        RESULTS.write_text(json.dumps(measured(before), indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(rendered(json.loads(RESULTS.read_text()), PAGE.read_text()))


def key(row: dict[str, Any] | Row) -> tuple[str, str]:
    """Identifies a row."""
    return (row["method"], row["reference"]) if isinstance(row, dict) else (row.method, row.reference)


def measured(before: dict[str, Any]) -> dict[str, Any]:
    """Returns the differences of all rows; rows that cannot be run keep their previous result."""
    previous = {key(row): row for row in before["rows"]}
    rows = []
    for row in ROWS:
        if row.is_available:
            about = {"method": row.method, "arxiv": row.arxiv, "expression": row.expression, "reference": row.reference}
            rows.append({**about, "difference": float(f"{row.difference():.1e}")})
            print(f"{rows[-1]['difference']:8.0e}  {row.method}: {row.reference}")
        elif key(row) in previous:
            rows.append(previous[key(row)])
            print(f"{'previous':>8}  {row.method}: {row.reference}, because {row.needs} is not installed")
    packages = ("torch", "zennit", "captum", *(row.needs for row in ROWS if row.needs and row.is_available))
    names = {"crp": "zennit-crp"}
    versions = {name: version(name) for name in dict.fromkeys(names.get(package, package) for package in packages)}
    return {
        "environment": {**before.get("environment", {}), "python": platform.python_version(), **versions},
        "rows": rows,
    }


def rendered(results: dict[str, Any], page: str) -> str:
    """Returns the page with the table of these results."""
    lines = ["| method | this package | compared with | largest difference |", "|---|---|---|---|"]
    for row in results["rows"]:
        paper = f" ([{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']}))" if row["arxiv"] else ""
        expression = row["expression"].replace("|", "\\|")
        lines.append(f"| {row['method']}{paper} | `{expression}` | {row['reference']} | {row['difference']:.0e} |")
    place = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    return with_part(page, "measured", "\n".join([*lines, "", f"Measured with {place}."]))


if __name__ == "__main__":
    main()
