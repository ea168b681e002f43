"""What the site shows and is no file in docs/: the pages of the repository's root, notebooks, the reference."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
REFERENCE: dict[str, tuple[str, set[str]]] = {
    "measure": ("The measure, its events, and what a model's steps get", {"measure", "events", "coverage"}),
    "composites": ("Composites and rules", {"composites", "named", "rules", "canonizers", "functional"}),
    "captum-and-zennit": (
        "Classes for Captum and Zennit",
        {"attribution", "attributors", "concepts", "dataloading"},
    ),
    "walks": ("Walks, flows, selections and pictures", set()),  # and whatever is in no other group
}
BY_MODULE: dict[str, tuple[str, dict[str, str]]] = {
    "kernels": ("Kernels", {"functional": "*"}),
    "figures": (
        "Figures and pages",
        {
            "plots": "*",
            "measure": "profile flow_maps",
        },
    ),
    "data-sets": (
        "Data sets",
        {
            "dataset": "*",
            "dataset.examples": "references References",
            "dataset.maximization": "find_references",
            "dataset.crops": "crops Crop",
            "dataset.reference_plots": "reference_figure",
            "dataset.statistics": "ClasswiseRelevance JointRelevance",
            "dataset.glocal": "mean_flow flow_queries flow_of_sweep difference",
            "dataset.prototypes": "find_prototypes vectors_of_sweep Prototypes",
            "dataset.glocal_plots": "difference_figure prototypes_figure",
        },
    ),
    "demo": ("The embedded net", {"demo": "load_digits load_model"}),
}
"""Names that are imported from modules, since they need an extra or are of one use; ``*`` is what a package exports."""


def as_page(text: str) -> str:
    """A Markdown file of the repository's root with its links as they are in docs/."""
    text = text.replace("](docs/", "](")
    for source, page in ROOT_PAGES.items():
        text = text.replace(f"]({source})", f"]({page})")
    return text


def public_names() -> dict[str, str]:
    """Every public name and the module that it comes from."""
    tree = ast.parse((ROOT / "src/nrm_plugin/__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {
        alias.asname or alias.name: str(node.module) for node in imports for alias in node.names if alias.name[0] != "_"
    }


def exported(module: str) -> list[str]:
    """``__all__`` of a package inside this one, without what the whole package exports too."""
    tree = ast.parse((ROOT / "src/nrm_plugin" / module / "__init__.py").read_text())
    listed = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    return sorted(set(ast.literal_eval(listed)) - set(public_names()))


def reference() -> dict[str, str]:
    """Pages of the reference by name."""
    pages = {page: [f"# {title}"] for page, (title, _) in REFERENCE.items()}
    for name, module in public_names().items():
        page = next((page for page, (_, modules) in REFERENCE.items() if module.split(".")[0] in modules), "walks")
        path = f"{name}.{name}" if module.split(".")[-1] == name else name  # a function called like its module
        pages[page].append(f"::: nrm_plugin.{path}")
    for page, (title, modules) in BY_MODULE.items():
        pages[page] = [f"# {title}"]
        for module, listed in modules.items():
            names = exported(module) if listed == "*" else listed.split()
            pages[page] += [f"::: nrm_plugin.{module}.{name}" for name in names]
    found = {page: "\n\n".join(parts) + "\n" for page, parts in pages.items()}
    intro = "All are in `nrm_plugin.errors`. What to do about each is in [troubleshooting](../troubleshooting.md)."
    directive = "::: nrm_plugin.errors\n    options:\n      show_root_heading: false\n"
    found["errors"] = f"# Errors and warnings\n\n{intro}\n\n{directive}"
    return found
