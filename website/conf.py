"""Sphinx settings. `make docs` builds the site into build/site; neither the build nor the pages download anything."""

from __future__ import annotations

import html
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

from website.pages import REFERENCE, documented

project = "nrm-plugin"
copyright = "nrm-plugin developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a changelog repeats its headings
default_role = "code"
highlight_language = "python"

autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 140
add_module_names = False
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "nrm-plugin"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
pygments_style = "friendly"
pygments_dark_style = "github-dark"

REFERENCE_PATHS = {path.rpartition(".")[2]: path for page in REFERENCE for path in documented(page)}


def formula(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Renders a formula as MathML, which browsers support natively."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    try:
        mathml = convert(node.astext(), display=display)
    except Exception as error:
        logging.getLogger(__name__).warning("no MathML of %s: %r", node.astext(), error, location=node)
        mathml = html.escape(node.astext())
    tag = "div" if display == "block" else "span"
    translator.body.append(f'<{tag} class="formula">{mathml}</{tag}>')
    raise nodes.SkipNode


def public_reference(app: Any, env: Any, node: Any, text: nodes.Element) -> nodes.Element | None:
    """Resolves a reference to the defining module of an object as one to its public path."""
    parts = node.get("reftarget", "").split(".")
    for index, part in enumerate(parts):
        if node.get("refdomain") == "py" and part in REFERENCE_PATHS:
            target = ".".join([REFERENCE_PATHS[part], *parts[index + 1 :]])
            domain = env.get_domain("py")
            return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, text)
    return None


def without_types(app: Any, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Prevents napoleon from reading the text before a colon in a property's docstring as its type."""
    if what in {"attribute", "property"}:
        lines[:0] = ["..", ""]


def short_cells(app: Any, doctree: nodes.document) -> None:
    """Marks short table cells, so that numbers do not wrap at their minus signs."""
    for cell in doctree.findall(nodes.entry):
        cell["classes"] += ["short"] * (len(cell.astext()) <= 12)


def setup(app: Any) -> None:
    """Registers the functions of this module with Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(formula, None), block_renderers=(formula, None))
    app.connect("autodoc-process-docstring", without_types, priority=400)
    app.connect("doctree-read", short_cells)
    app.connect("missing-reference", public_reference)
