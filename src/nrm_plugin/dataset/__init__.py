"""Measures of whole datasets: stored sweeps, statistics, reference examples, glocal flows and prototypes.

A sweep evaluates queries on all samples of a dataset and stores the results. A reference example is a sample in which a
neuron or group has a large relevance or activation. (The reference of a single measure is something else: a baseline
input.)

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
