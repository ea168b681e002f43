"""docs/numbers.md: what is claimed, the figure that was measured, and the command that measures it again.

``python -m benchmarks.numbers`` reads the committed results of the other benchmarks and writes the table; it measures
nothing itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faithfulness.metrics import verdict
from benchmarks.faithfulness.page import compared

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/numbers.md"
Found = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One line of the page.

    Args:
        text: What is claimed.
        source: The file of results without its ending, which is also the module that writes it.
        figure: What to show of it.
        page: Where more is said.
    """

    text: str
    source: str
    figure: Callable[[Found], str]
    page: str

    @property
    def command(self) -> str:
        """What measures it again."""
        named = {"speed": "make bench", "special_cases": "make special-cases", "faithfulness": "make faithfulness"}
        return named.get(self.source, f"python -m benchmarks.{self.source}")


def over(work: str, beside: str, model: str = "vgg16") -> Callable[[Found], str]:
    """Time of some work as a multiple of another's, on one thread."""

    def figure(found: Found) -> str:
        runs = [run for run in found["runs"] if run["model"] == model and run["threads"] == 1]
        seconds = next(run for run in runs if run["allocator"] == "default")["seconds"]
        return f"{seconds[work] / seconds[beside]:.3g} ×"

    return figure


def peak(found: Found) -> str:
    """Peak memory above the net as a multiple of a plain gradient's."""
    peaks = found["peak memory of vgg16 in MiB"]
    above = {name: value - peaks["nothing"] for name, value in peaks.items()}
    return f"{above['EpsilonPlusFlat'] / above['plain']:.2g} ×"


def differences(beside: str) -> Callable[[Found], str]:
    """Largest difference of the rows that were compared with a package, or with formulas."""

    def figure(found: Found) -> str:
        rows = [row for row in found["rows"] if row["beside"].startswith(beside)]
        return f"{max(row['difference'] for row in rows):.0e}, {len(rows)} row{'s' * (len(rows) > 1)}"

    return figure


def books(composite: str) -> Callable[[Found], str]:
    """Largest error of mass + sink + bypass = 1."""

    def figure(found: Found) -> str:
        rows = [row for row in found["rows"] if row.get("composite", composite) == composite and "error" in row]
        return f"{max(row.get('error_taps', row['error']) for row in rows):.0e}, {len(rows)} models"

    return figure


def changed(found: Found) -> str:
    """How many models were left otherwise than they were."""
    measured = [row for row in found["rows"] if "is_unchanged" in row]
    models = {(row["package"], row["model"]) for row in measured}
    return f"{sum(not row['is_unchanged'] for row in measured)} of {len(models)}"


def certified(found: Found) -> str:
    """Walks proven to be the largest, under the rule without signs."""
    return ", ".join(f"{row['rule']}: {row['certified']} of {row['walks']}" for row in found["rows"])


def flipping(composite: str) -> Callable[[Found], str]:
    """Area between the two orders of pixel flipping, net by net; larger is better."""

    def figure(found: Found) -> str:
        cells = []
        for name, net in found["nets"].items():
            row = next((row for row in net["rows"] if row["composite"] == composite and row["policy"] == "G = 2"), None)
            if row is not None:
                cells.append(f"{name}: {row['span'][0]:.2f}")
        return "; ".join(cells)

    return figure


def verdicts(found: Found) -> str:
    """The default composite beside the best other method of each metric."""
    counted = Counter(verdict(best["ahead"][best["default"]]) for *_, best in compared(found))
    return ", ".join(f"{word} in {counted[word]}" for word in ("better", "even", "worse"))


def recovered(one: str, other: str) -> Callable[[Found], str]:
    """Average precision of planted edges between neighbouring layers."""

    def figure(found: Found) -> str:
        methods = found["planted"]["questions"]["neighbouring layers"]["methods"]
        return " : ".join(f"{methods[name]['average precision'][0]:.2f}" for name in (one, other))

    return figure


PLAIN = "plain gradient"
CLAIMS = [
    Claim("All marginals of VGG16 by EpsilonPlus, beside a plain gradient", "speed",
          over("all marginals, EpsilonPlus", PLAIN), "speed.md"),
    Claim("the same beside Zennit's own pass, which has the input only", "speed",
          over("all marginals, EpsilonPlus", "zennit, EpsilonPlus"), "speed.md"),
    Claim("All marginals of ResNet-50 by the default composite, beside a plain gradient", "speed",
          over("all marginals, NRMDefault", PLAIN, "resnet50"), "speed.md"),
    Claim("Joint relevance of all neighbouring channel pairs of VGG16, beside a plain gradient", "speed",
          over("all neighbouring channel pairs, EpsilonPlus", PLAIN), "speed.md"),
    Claim("64 conditional maps, beside zennit-crp", "speed",
          over("64 conditional maps of features.28 at the input",
               "zennit-crp, 64 conditional maps of features.28 at the input"), "speed.md"),
    Claim("Peak memory of all marginals of VGG16, beside a plain gradient", "speed", peak, "speed.md"),
    Claim("Plain Zennit relevance at nine layers of VGG11, largest difference", "special_cases",
          differences("zennit, VGG11"), "special-cases.md"),
    Claim("Captum's methods, largest difference", "special_cases", differences("captum, "), "special-cases.md"),
    Claim("zennit-crp, largest difference", "special_cases", differences("zennit-crp"), "special-cases.md"),
    Claim("LXT, largest difference", "special_cases", differences("LXT"), "special-cases.md"),
    Claim("Published formulas, largest difference", "special_cases", differences("formula"), "special-cases.md"),
    Claim("mass + sink + bypass = 1, all taps, models of torchvision without attention", "architectures",
          books("NRMDefault"), "architectures.md"),
    Claim("the same, vision transformers", "attention", books("NRMDefault"), "attention.md"),
    Claim("the same, models of 16 other packages", "other_packages", books("NRMDefault"), "other-packages.md"),
    Claim("Models of other packages that a measure changed", "other_packages", changed, "other-packages.md"),
    Claim("The hundred largest of 550 billion walks, certified after a minute", "top_walks", certified,
          "critical-paths.md"),
    Claim("Pixel flipping, area between both orders, NRMDefault", "default_composite", flipping("NRMDefault"),
          "default-composite.md"),
    Claim("the same, EpsilonPlus", "default_composite", flipping("EpsilonPlus"), "default-composite.md"),
    Claim("NRMDefault beside the best other attribution method of each metric", "faithfulness", verdicts,
          "faithfulness.md"),
    Claim("Average precision of planted edges: joint relevance by NRMDefault, product of its marginals", "faithfulness",
          recovered("μ(A & B), NRMDefault", "μ(A) μ(B), NRMDefault"), "faithfulness.md"),
    Claim("the same by LRP-0: joint relevance, gradient × activation of both ends", "faithfulness",
          recovered("μ(A & B), LRP-0", "gradient × activation, product"), "faithfulness.md"),
]  # fmt: skip


def rendered(page: str) -> str:
    """The page with the table of the committed results."""
    results = {claim.source: json.loads((RESULTS / f"{claim.source}.json").read_text()) for claim in CLAIMS}
    lines = ["| claim | measured | again by | more |", "|---|---|---|---|"]
    for claim in CLAIMS:
        figure = claim.figure(results[claim.source])
        lines.append(f"| {claim.text} | {figure} | `{claim.command}` | [{claim.page[:-3]}]({claim.page}) |")
    lines += ["", "Measured with", ""]
    for source, found in results.items():
        place = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
        lines.append(f"- `{source}.json`: {place}")
    head, rest = page.split("<!-- measured -->")
    _, tail = rest.split("<!-- end -->")
    return head + "<!-- measured -->\n" + "\n".join(lines) + "\n<!-- end -->" + tail


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
