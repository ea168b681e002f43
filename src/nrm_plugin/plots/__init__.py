"""Plots of heat maps, flows, layer profiles and coloured text. This package computes no relevance.

Imports: errors, measure, attribution.
"""

from .flow import flow_figure, profile_figure
from .flow_html import sankey, save_sankey
from .heatmaps import budgets, heat_map, heat_maps, image_and_heat_map, joint, save
from .text import text_figure, text_html
from .text_page import text_page

__all__ = [
    "budgets",
    "flow_figure",
    "heat_map",
    "heat_maps",
    "image_and_heat_map",
    "joint",
    "profile_figure",
    "sankey",
    "save",
    "save_sankey",
    "text_figure",
    "text_html",
    "text_page",
]
