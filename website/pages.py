"""The sources for Sphinx, in the layout of the repository: ``python -m website.pages build/pages``.

The README becomes the home page with the navigation, notebooks become Markdown with their outputs, and the reference is
generated from a table. All other pages are copied unchanged, so that their links work in both places.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

from notebooks.run import as_markdown, notebooks

ROOT = Path(__file__).parents[1]

REFERENCE: dict[str, tuple[str, dict[str, str]]] = {
    "measure": (
        "The measure and its events",
        {"": "RelevanceMeasure at Event ABSORBED Plan coverage Coverage MemoryEstimate"},
    ),
    "composites": (
        "Composites and rules",
        {
            "": """Normalized NRMDefault NRMAbsolute NRMEpsilonPlus NRMEpsilonPlusFlat NRMEpsilonAlpha2Beta1
            NRMEpsilonAlpha2Beta1Flat NRMEpsilonGammaBox NRMExcitationBackprop NRMRelative ConservingEpsilon Absolute
            Relative FuseBatchNorm"""
        },
    ),
    "captum-and-zennit": (
        "Classes for Captum and Zennit",
        {"": "NRM LayerNRM NeuronNRM JointNRM NRMAttributor DataLoaderNRM ConceptNRM condition_event"},
    ),
    "text": ("Text models", {"": "explain_text TextExplanation"}),
    "walks": (
        "Walks, flows, selections and subspaces",
        {
            "": """FlowGraph patches find_groups Groups top_walks TopWalks GroupWalk top_sets TopSets best_walk
            NeuronWalk restriction Restriction select_neurons Selection CurvePoint ablation activations mse
            smape prca drsa with_subspaces Subspaces reconstruct Reconstruction""",
            "search.group_walks": "group_walks GroupWalks",
            "measure.partitions": "segments",
        },
    ),
    "features": (
        "Learned features",
        {
            "": """Dictionary Crosscoder load_dictionary load_transcoders with_features feature_groups
            reconstruction_errors replacement completeness attribution_graph AttributionGraph GraphNode influence
            attention_sinks steered"""
        },
    ),
    "figures": (
        "Figures and pages",
        {
            "plots": """heat_map image_and_heat_map heat_maps joint budgets save flow_figure flow_finding flow_caption
            Photo cell_sums profile_figure sankey save_sankey text_figure text_html text_page""",
            "measure": "profile flow_maps",
            "measure.flow_heat_maps": "mapped_flow MappedFlow flow_maps_and_pairs",
            "measure.layer_averages": "layer_map layer_average late_layers layers_by_resolution blurred smoothed",
            "measure.pixel_maps": "pixel_map covered focused focused_pixels light_gamma is_fine_grained",
            "measure.plain_ground": "plain_ground",
        },
    ),
    "data-sets": (
        "Datasets",
        {
            "dataset": """sweep Sweep Query Marginal Joint Conditional EventMass Sink Bypass Variation Maps Activation
            Peak SweepBatches Manifest QueryInfo SweepError""",
            "dataset.examples": "references References",
            "dataset.example_search": "find_references",
            "dataset.crops": "crops Crop",
            "dataset.reference_plots": "reference_figure",
            "dataset.statistics": "ClasswiseRelevance JointRelevance",
            "dataset.mean_conditionals": "MeanConditionals",
            "dataset.relevance_matrix": "RelevanceMatrix",
            "dataset.glocal": "mean_flow flow_queries flow_of_sweep difference",
            "dataset.prototypes": "find_prototypes vectors_of_sweep Prototypes",
            "dataset.glocal_plots": "difference_figure prototypes_figure",
        },
    ),
    "kernels": (
        "Kernels",
        {"": "register_kernel Interception", "functional": "Kernel SplitKernel BroadcastKernel FunctionCall"},
    ),
    "demo": (
        "Networks of the demo",
        {
            "demo": "load_digits load_model",
            "demo.photo_network": "load_photo_network load_photo imagenet_names normalized",
        },
    ),
    "errors": (
        "Errors and warnings",
        {
            "errors": """NRMError InputError DifferenceError TargetError GradModeError ModelStateError UnknownLayerError
            HookedContainerError StorageError EventError NullEventError CancellationError NonFiniteError
            StaleMeasureError UnsupportedRuleError NonlinearRuleError UnsupportedOperationError UncoveredLayerError
            FoldingError MissingExtraError BatchNormWarning MemoryBudgetWarning PrecisionWarning RandomnessWarning"""
        },
    ),
}
"""Pages of the reference: title, and names by module of the package ("" is the package itself), with the most used
names first."""

INTRODUCTIONS = {"errors": "Remedies are listed in :doc:`troubleshooting </docs/troubleshooting>`."}

NAVIGATION = {
    "Tutorial": [f"notebooks/{path.stem}" for path in notebooks()],
    "How to": """docs/explain docs/flow docs/groups docs/critical-paths docs/subspaces docs/features docs/text
        docs/attention docs/recurrent-and-graphs docs/data-sets docs/references docs/plans docs/memory docs/batch-norm
        docs/relative docs/own-kernel docs/drop-in docs/troubleshooting""".split(),
    "Coming from": "docs/from-captum-lrp docs/from-zennit docs/from-zennit-crp".split(),
    "Mathematics": "docs/measure docs/differences docs/special-cases".split(),
    "Numbers": """docs/numbers docs/real docs/real-details docs/joint-relevance docs/joint-relevance-details docs/cost
        docs/cost-details docs/speed docs/speed-details docs/default-composite docs/default-composite-details
        docs/faithfulness docs/faithfulness-details docs/circuits docs/known-circuit docs/critical-paths-details
        docs/architectures docs/other-packages docs/mutants docs/mutants-details""".split(),
    "Reference": [f"reference/{page}" for page in REFERENCE],
    "Project": "docs/design docs/claims docs/stability docs/coverage CONTRIBUTING CHANGELOG".split(),
}
"""All pages except the home page, by heading of the sidebar."""


def home() -> str:
    """Returns the README, with the navigation."""
    trees = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", *pages, "```"])
        for caption, pages in NAVIGATION.items()
    ]
    text = (ROOT / "README.md").read_text().replace("](notebooks)", f"]({NAVIGATION['Tutorial'][0]}.md)")
    return "\n\n".join([text, *trees]) + "\n"


def documented(page: str) -> list[str]:
    """Returns the full names on a page of the reference, in order."""
    return [
        ".".join(filter(None, ("nrm_plugin", module, name)))
        for module, names in REFERENCE[page][1].items()
        for name in names.split()
    ]


def reference(page: str) -> str:
    """Returns a page of the reference."""
    title, _ = REFERENCE[page]
    head = f"{title}\n{'=' * len(title)}"
    return "\n\n".join([head, INTRODUCTIONS.get(page, ""), *map(directive, documented(page))]) + "\n"


def directive(path: str) -> str:
    """Returns the Sphinx directive that documents an object."""
    module, _, name = path.rpartition(".")
    documented_object = getattr(importlib.import_module(module), name)
    if not isinstance(documented_object, type):
        return f".. autofunction:: {path}" if callable(documented_object) else f".. autodata:: {path}\n   :no-value:"
    bases = "" if documented_object.__bases__ == (object,) else "\n   :show-inheritance:"
    if issubclass(documented_object, Exception):
        return f".. autoexception:: {path}{bases}"
    return f".. autoclass:: {path}\n   :members:\n   :special-members: __call__{bases}"


def write(folder: Path) -> None:
    """Writes all pages and their images."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "notebooks").mkdir()
    (folder / "reference").mkdir()
    (folder / "index.md").write_text(home())
    stability = folder / "docs/stability.md"
    stability.write_text(stability.read_text().replace("](../website/pages.py)", "](../reference/measure.rst)"))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy2(ROOT / name, folder)
    for path in notebooks():
        text, images = as_markdown(path)
        (folder / f"notebooks/{path.stem}.md").write_text(text)
        for name, image in images.items():
            (folder / "notebooks" / name).write_bytes(image)
    for page in REFERENCE:
        (folder / f"reference/{page}.rst").write_text(reference(page))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
