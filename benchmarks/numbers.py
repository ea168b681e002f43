"""docs/numbers.md: the main results, and the commands that reproduce them.

``python -m benchmarks.numbers`` reads the committed results of the other benchmarks and writes the tables; it does not
measure anything itself.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faithfulness.metrics import verdict
from benchmarks.faithfulness.page import compared
from benchmarks.markdown import grid, with_part

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/numbers.md"
Results = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One row of the tables.

    Args:
        text: The claim.
        source: Name of the results file without suffix, and of the module that writes it.
        figure: Formats the measured figure.
        page: The page with the details.
    """

    text: str
    source: str
    figure: Callable[[Results], str]
    page: str

    @property
    def command(self) -> str:
        """The command that reproduces the figure."""
        named = {
            "speed": "make bench",
            "special_cases": "make special-cases",
            "faithfulness": "make faithfulness",
            "references": "make references",
            "hugging_face": "make hugging-face",
            "recurrent_and_graphs": "make graph-networks",
        }
        return named.get(self.source, f"python -m benchmarks.{self.source}")


def ratio(work: str, reference: str, model: str = "vgg16") -> Callable[[Results], str]:
    """Returns the time of a computation as a multiple of a reference, on one thread."""

    def figure(results: Results) -> str:
        runs = [run for run in results["runs"] if run["model"] == model and run["threads"] == 1]
        seconds = next(run for run in runs if run["allocator"] == "default")["seconds"]
        return f"{seconds[work] / seconds[reference]:.3g} ×"

    return figure


def peak(results: Results) -> str:
    """Returns the peak memory in addition to the net, as a multiple of a plain gradient's."""
    peaks = results["peak memory of vgg16 in MiB"]
    above = {name: value - peaks["nothing"] for name, value in peaks.items()}
    return f"{above['EpsilonPlusFlat'] / above['plain']:.2g} ×"


def differences(reference: str) -> Callable[[Results], str]:
    """Returns the largest difference over the rows that are compared with a package, or with formulas."""

    def figure(results: Results) -> str:
        rows = [row for row in results["rows"] if row["reference"].startswith(reference)]
        return f"{max(row['difference'] for row in rows):.0e} ({len(rows)} method{'s' * (len(rows) > 1)})"

    return figure


def violation(composite: str) -> Callable[[Results], str]:
    """Returns the largest error of mass + sink + bypass = 1."""

    def figure(results: Results) -> str:
        every = results["rows"] if "rows" in results else results["recurrent"] + results["graphs"]
        rows = [row for row in every if row.get("composite", composite) == composite and "error" in row]
        return f"{max(row.get('error_taps', row['error']) for row in rows):.0e} ({len(rows)} models)"

    return figure


def changed(results: Results) -> str:
    """Returns the number of models that had to be modified."""
    measured = [row for row in results["rows"] if "is_unchanged" in row]
    models = {(row["package"], row["model"]) for row in measured}
    return f"{sum(not row['is_unchanged'] for row in measured)} of {len(models)}"


def certified(results: Results) -> str:
    """Returns the number of walks certified to be the largest, by rule and image size."""
    return "; ".join(
        f"{row['size']} pixels, {row['rule']}: {row['certified']} of {row['walks']}" for row in results["rows"]
    )


def flow_cost(results: Results) -> str:
    """Returns the time of a flow graph as a multiple of the marginals of all layers."""
    return f"{min(results['seconds']['flow']) / min(results['seconds']['marginals']):.0f} ×"


def speedup(results: Results) -> str:
    """Returns the time of the other package as a multiple of ours, by net."""
    return "; ".join(f"{run['net']}: {run['factor']:.1f} ×" for run in results["runs"])


def throughput(results: Results) -> str:
    """Returns the throughput as a share of the measure alone, by net."""
    shares = results["throughput"].items()
    return "; ".join(f"{net}: {row['share of the bare measure']['wall']:.2f}" for net, row in shares)


def class_probability(method: str) -> Callable[[Results], str]:
    """Returns the probability of the class with a tenth to a seventh of the channels retained, by net."""

    def figure(results: Results) -> str:
        cells = []
        for net, count in zip(results["nets"], (31, 11), strict=True):
            rows = (row for row in net["rows"] if row["method"] == method and row["fill"] == "zero")
            probability = next(row for row in rows if row["kept"] == count)["probability"][0]
            cells.append(f"{count} of {sum(net['channels'])}: {probability:.2f}")
        return "; ".join(cells)

    return figure


def variation(rule: str) -> Callable[[Results], str]:
    """Returns the largest walk variation on a deep net with random weights."""
    return lambda results: f"{results['rows']['vgg16'][rule]['variation']:.0e}"


def flipping(composite: str) -> Callable[[Results], str]:
    """Returns the area between both orders of pixel flipping, by net; larger is better."""

    def figure(results: Results) -> str:
        cells = []
        for name, net in results["nets"].items():
            row = next((row for row in net["rows"] if row["composite"] == composite and row["policy"] == "G = 2"), None)
            if row is not None:
                cells.append(f"{name}: {row['span'][0]:.2f}")
        return "; ".join(cells)

    return figure


def mutants(results: Results) -> str:
    """Returns the share of detected mutants among those tried, without equivalent ones."""
    rows = results["packages"].values()
    detected = sum(row["killed"] + row["timed out"] for row in rows)
    equivalent = sum(row["judgement"].startswith("equivalent") for row in results["survivors"])
    tried = sum(row["tried"] for row in rows)
    return f"{100 * detected / (tried - equivalent):.1f}% of {tried - equivalent}"


def verdicts(results: Results) -> str:
    """Returns the default composite compared with the best other method of each metric."""
    counted = Counter(verdict(best["ahead"][best["default"]]) for *_, best in compared(results))
    return ", ".join(f"{word} in {counted[word]}" for word in ("better", "tied", "worse"))


def recovered(one: str, other: str) -> Callable[[Results], str]:
    """Returns the average precision of planted edges between neighboring layers."""

    def figure(results: Results) -> str:
        methods = results["planted"]["questions"]["neighboring layers"]["methods"]
        return " vs. ".join(f"{methods[name]['average precision'][0]:.2f}" for name in (one, other))

    return figure


def distance(score: str) -> Callable[[Results], str]:
    """Returns the circuit-model distance of a score, by network."""
    return lambda results: "; ".join(
        f"{name}: {net['scores'][score]['CMD'][0]:.3f}" for name, net in results["nets"].items()
    )


def patching(results: Results) -> str:
    """Returns the settings in which joint relevance by secants is better than the best product of scores."""
    rows = [
        measured["scores"]["joint, secants"]["minus best product"]
        for net in results["nets"].values()
        for kind in net["kinds"].values()
        for measured in kind["references"].values()
    ]
    better, worse = sum(low > 0 for _, low, _ in rows), sum(high < 0 for *_, high in rows)
    return f"better in {better}, level in {len(rows) - better - worse}, worse in {worse}"


def leads(other: str) -> Callable[[Results], str]:
    """Returns by how much the first map ranks patches better than another method (SRG), by net; losses are negative."""

    def figure(results: Results) -> str:
        found = ((name, net["methods"].get(other)) for name, net in results["nets"].items())
        return "; ".join(f"{name}: {row['SRG, plain']['behind'][0]:+.2f}" for name, row in found if row)

    return figure


PLAIN = "plain gradient"
VIOLATION = "Largest conservation error"
TOPICS = {
    "Agreement with other packages": [
        Claim("Largest difference from Zennit's relevance at nine layers of VGG11", "special_cases",
              differences("zennit, VGG11"), "special-cases.md"),
        Claim("Largest difference from Captum's methods", "special_cases", differences("captum, "), "special-cases.md"),
        Claim("Largest difference from zennit-crp", "special_cases", differences("zennit-crp"), "special-cases.md"),
        Claim("Largest difference from LXT", "special_cases", differences("LXT"), "special-cases.md"),
        Claim("Largest difference from published formulas", "special_cases", differences("formula"),
              "special-cases.md"),
    ],
    "Conservation": [
        Claim(f"{VIOLATION}: torchvision without attention", "architectures", violation("NRMDefault"),
              "architectures.md"),
        Claim(f"{VIOLATION}: vision transformers of torchvision", "attention", violation("NRMDefault"), "attention.md"),
        Claim(f"{VIOLATION}: models of 16 other packages", "other_packages", violation("NRMDefault"),
              "other-packages.md"),
        Claim(f"{VIOLATION}: further models of Hugging Face", "hugging_face", violation("NRMDefault"), "attention.md"),
        Claim(f"{VIOLATION}: recurrent networks and layers of torch_geometric", "recurrent_and_graphs",
              violation("NRMDefault"), "recurrent-and-graphs.md"),
        Claim("Models of other packages that a measure modified", "other_packages", changed, "other-packages.md"),
    ],
    "Speed and memory": [
        Claim("All marginals of VGG16 with EpsilonPlus: time relative to a plain gradient", "speed",
              ratio("all marginals, EpsilonPlus", PLAIN), "speed.md"),
        Claim("All marginals of VGG16 with EpsilonPlus: time relative to Zennit's pass for the input map",
              "speed", ratio("all marginals, EpsilonPlus", "zennit, EpsilonPlus"), "speed.md"),
        Claim("All marginals of ResNet-50 with NRMDefault: time relative to a plain gradient", "speed",
              ratio("all marginals, NRMDefault", PLAIN, "resnet50"), "speed.md"),
        Claim("Joint relevance of all channel pairs in neighboring layers of VGG16: time relative to a plain gradient",
              "speed", ratio("all neighboring channel pairs, EpsilonPlus", PLAIN), "speed.md"),
        Claim("64 conditional maps of VGG16: time relative to zennit-crp", "speed",
              ratio("64 conditional maps of features.28 at the input",
                    "zennit-crp, 64 conditional maps of features.28 at the input"), "speed.md"),
        Claim("All marginals of VGG16: peak memory relative to a plain gradient", "speed", peak, "speed.md"),
        Claim("Flow over five layers of VGG16 with eight groups each: time relative to the marginals of all layers",
              "flow", flow_cost, "flow.md"),
        Claim("Reference examples: time of zennit-crp relative to ours, for the same examples", "references", speedup,
              "references.md"),
        Claim("Throughput of a sweep relative to the measure alone", "sweep", throughput, "data-sets.md"),
    ],
    "Faithfulness": [
        Claim("NRMDefault compared with the best other attribution method, over 75 metrics", "faithfulness", verdicts,
              "faithfulness.md"),
        Claim("Average precision for planted edges, NRMDefault: joint relevance vs. product of marginals",
              "faithfulness", recovered("μ(A & B), NRMDefault", "μ(A) μ(B), NRMDefault"), "faithfulness.md"),
        Claim("Average precision for planted edges, LRP-0: joint relevance vs. product of gradient × activation",
              "faithfulness", recovered("μ(A & B), LRP-0", "gradient × activation, product"), "faithfulness.md"),
        Claim("Correlation with path patching: joint relevance by secants compared with the best product, 50 settings",
              "path_patching", patching, "joint-relevance.md"),
        Claim("Ranking of image patches: SRG of the map shown first minus SRG of GradCAM", "real", leads("GradCAM"),
              "real.md"),
        Claim("Ranking of image patches: SRG of the map shown first minus SRG of DeepLift", "real", leads("DeepLift"),
              "real.md"),
        Claim("Pixel flipping, area between the two orders: NRMDefault", "default_composite", flipping("NRMDefault"),
              "default-composite.md"),
        Claim("Pixel flipping, area between the two orders: EpsilonPlus", "default_composite", flipping("EpsilonPlus"),
              "default-composite.md"),
        Claim("Distance of circuits from the network (CMD, lower is better): reference measure, one backward pass",
              "circuits", distance("reference measure"), "circuits.md"),
        Claim("Distance of circuits from the network: EAP-IG, eight backward passes", "circuits",
              distance("EAP-IG, 8 steps"), "circuits.md"),
        Claim("Distance of circuits from the network: EAP, one backward pass", "circuits", distance("EAP"),
              "circuits.md"),
    ],
    "Selection and search": [
        Claim("Probability of the class when few channels are retained: `select_neurons`", "selection",
              class_probability("select_neurons (ε, z⁺)"), "critical-paths.md"),
        Claim("Probability of the class when few channels are retained: plain LRP", "selection",
              class_probability("plain LRP"), "critical-paths.md"),
        Claim("Probability of the class when few channels are retained: LayerConductance", "selection",
              class_probability("LayerConductance"), "critical-paths.md"),
        Claim("Largest of 550 billion walks that are certified within a minute", "top_walks", certified,
              "critical-paths.md"),
    ],
    "Stability and tests": [
        Claim("Walk variation on VGG16 with random weights (lower is better): relative rule", "relative",
              variation("relative"), "relative.md"),
        Claim("Walk variation on VGG16 with random weights: LRP-0", "relative", variation("LRP-0"), "relative.md"),
        Claim("Mutants of kernels, events and measure that the tests detect", "mutants", mutants, "mutants.md"),
    ],
}  # fmt: skip
CLAIMS = [claim for claims in TOPICS.values() for claim in claims]


def rendered(page: str) -> str:
    """Returns the page with the tables of the committed results."""
    results = {claim.source: json.loads((RESULTS / f"{claim.source}.json").read_text()) for claim in CLAIMS}
    lines = []
    for topic, claims in TOPICS.items():
        rows = [
            [claim.text, claim.figure(results[claim.source]), title(claim.page), f"`{claim.command}`"]
            for claim in claims
        ]
        lines += [f"## {topic}", "", grid("| result | measured | page | reproduce with |", rows), ""]
    text = with_part(page, "measured", "\n".join(lines).rstrip())
    places: dict[str, list[str]] = {}
    for source, stored in results.items():
        if "environment" in stored:
            place = ", ".join(f"{name} {value}" for name, value in stored["environment"].items())
            places.setdefault(place, []).append(f"`{source}.json`")
    return with_part(text, "software", "\n".join(f"- {', '.join(files)}: {place}" for place, files in places.items()))


def title(page: str) -> str:
    """Returns a link to a page, with its title."""
    first = (ROOT / "docs" / page).read_text().partition("\n")[0]
    return f"[{first.removeprefix('# ')}]({page})"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(rendered(PAGE.read_text()))
