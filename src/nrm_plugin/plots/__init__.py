"""Plots of heat maps, flows, layer profiles and colored text.

Relevance is not computed here.

Imports: errors, measure, attribution.
"""

from .flow import flow_figure
from .flow_caption import flow_caption
from .flow_finding import flow_finding
from .flow_html import sankey, save_sankey
from .flow_thumbnails import Photo
from .heatmaps import budgets, cell_sums, heat_map, heat_maps, image_and_heat_map, joint, save
from .layer_profile import profile_figure
from .text import text_figure, text_html
from .text_page import text_page

__all__ = [
    "Photo",
    "budgets",
    "cell_sums",
    "flow_caption",
    "flow_figure",
    "flow_finding",
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
