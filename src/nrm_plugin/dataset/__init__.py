"""Measures of whole datasets: stored sweeps, statistics, reference examples, glocal flows and prototypes.

Imports: errors, imports, events, model, kernels, composites, recording, measure, plan, plots.
"""

from .queries import Activation, Bypass, Conditional, EventMass, Joint, Maps, Marginal, Peak, Query, Sink, Variation
from .ray_engine import SweepBatches
from .stored_sweep import Sweep
from .sweep_layout import Manifest, QueryInfo, SweepError
from .sweep_runner import sweep

__all__ = [
    "Activation",
    "Bypass",
    "Conditional",
    "EventMass",
    "Joint",
    "Manifest",
    "Maps",
    "Marginal",
    "Peak",
    "Query",
    "QueryInfo",
    "Sink",
    "Sweep",
    "SweepBatches",
    "SweepError",
    "Variation",
    "sweep",
]
