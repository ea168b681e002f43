"""Normalized relevance measure for Zennit and Captum."""

from .attribution import NRM, JointNRM, LayerNRM, NeuronNRM
from .attributors import NRMAttributor
from .canonizers import FuseBatchNorm
from .composites import Normalized, NRMAbsolute, NRMDefault
from .concepts import ConceptNRM, condition_event
from .coverage import Coverage, coverage
from .dataloading import DataLoaderNRM
from .events import ABSORBED, Event, at
from .flow_graph import FlowGraph
from .functional import Interception, register_kernel
from .measure import RelevanceMeasure
from .named import (
    NRMEpsilonAlpha2Beta1,
    NRMEpsilonAlpha2Beta1Flat,
    NRMEpsilonGammaBox,
    NRMEpsilonPlus,
    NRMEpsilonPlusFlat,
    NRMExcitationBackprop,
    NRMRelative,
)
from .neuron_sets import TopSets, top_sets
from .neuron_walks import NeuronWalk, best_walk
from .partitions import patches
from .reconstruct import Reconstruction, reconstruct
from .restriction import (
    CurvePoint,
    Restriction,
    Selection,
    ablation,
    activations,
    mse,
    restriction,
    select_neurons,
    smape,
)
from .rules import Absolute, ConservingEpsilon, Relative
from .subspaces import Subspaces, drsa, prca, with_subspaces
from .version import __version__ as __version__
from .walks import GroupWalk, TopWalks, top_walks

__all__ = [
    "ABSORBED",
    "NRM",
    "Absolute",
    "ConceptNRM",
    "ConservingEpsilon",
    "Coverage",
    "CurvePoint",
    "DataLoaderNRM",
    "Event",
    "FlowGraph",
    "FuseBatchNorm",
    "GroupWalk",
    "Interception",
    "JointNRM",
    "LayerNRM",
    "NRMAbsolute",
    "NRMAttributor",
    "NRMDefault",
    "NRMEpsilonAlpha2Beta1",
    "NRMEpsilonAlpha2Beta1Flat",
    "NRMEpsilonGammaBox",
    "NRMEpsilonPlus",
    "NRMEpsilonPlusFlat",
    "NRMExcitationBackprop",
    "NRMRelative",
    "NeuronNRM",
    "NeuronWalk",
    "Normalized",
    "Reconstruction",
    "Relative",
    "RelevanceMeasure",
    "Restriction",
    "Selection",
    "Subspaces",
    "TopSets",
    "TopWalks",
    "ablation",
    "activations",
    "at",
    "best_walk",
    "condition_event",
    "coverage",
    "drsa",
    "mse",
    "patches",
    "prca",
    "reconstruct",
    "register_kernel",
    "restriction",
    "select_neurons",
    "smape",
    "top_sets",
    "top_walks",
    "with_subspaces",
]
