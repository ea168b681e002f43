"""The relevance measure: marginals, joint relevance, events, conditionals and flows, computed from a recording.

Imports: errors, imports, events, model, kernels, functional, composites, recording.
"""

from .flow_graph import FlowGraph
from .flow_heat_maps import flow_maps
from .layer_profile import profile
from .measure import RelevanceMeasure
from .reconstruction import Reconstruction

__all__ = ["FlowGraph", "Reconstruction", "RelevanceMeasure", "flow_maps", "profile"]
