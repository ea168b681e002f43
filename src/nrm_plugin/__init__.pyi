from .attribution.attributor import NRMAttributor
from .attribution.concepts import ConceptNRM, condition_event
from .attribution.dataloader import DataLoaderNRM
from .attribution.joint_nrm import JointNRM
from .attribution.layer_nrm import LayerNRM
from .attribution.neuron_nrm import NeuronNRM
from .attribution.nrm import NRM
from .attribution.text import TextExplanation, explain_text
from .canonizers import FuseBatchNorm
from .composites import (
    Normalized,
    NRMAbsolute,
    NRMDefault,
    NRMEpsilonAlpha2Beta1,
    NRMEpsilonAlpha2Beta1Flat,
    NRMEpsilonGammaBox,
    NRMEpsilonPlus,
    NRMEpsilonPlusFlat,
    NRMExcitationBackprop,
    NRMRelative,
)
from .events.event import ABSORBED, Event, at
from .functional.canonizer import Interception
from .functional.registry import register_kernel
from .measure.attention_sinks import attention_sinks
from .measure.flow_graph import FlowGraph
from .measure.group_search import find_groups
from .measure.layer_groups import Groups
from .measure.measure import RelevanceMeasure
from .measure.partitions import patches
from .measure.reconstruction import Reconstruction, reconstruct
from .plan.plan import Plan
from .recording.coverage import Coverage, coverage
from .recording.memory_estimate import MemoryEstimate
from .rules import Absolute, ConservingEpsilon, Relative
from .search.ablation import ablation, activations
from .search.attribution_graph import AttributionGraph, GraphNode, influence
from .search.dictionaries import Crosscoder, Dictionary
from .search.dictionary_files import load_dictionary, load_transcoders
from .search.feature_graph import attribution_graph
from .search.features import completeness, feature_groups, reconstruction_errors, replacement, with_features
from .search.group_sets import TopSets, top_sets
from .search.neuron_walks import NeuronWalk, best_walk
from .search.selection import CurvePoint, Restriction, Selection, mse, restriction, select_neurons, smape
from .search.steering import steered
from .search.subspaces import Subspaces, drsa, prca, with_subspaces
from .search.walks import GroupWalk, TopWalks, top_walks

__version__: str

__all__ = [
    "ABSORBED",
    "NRM",
    "Absolute",
    "AttributionGraph",
    "ConceptNRM",
    "ConservingEpsilon",
    "Coverage",
    "Crosscoder",
    "CurvePoint",
    "DataLoaderNRM",
    "Dictionary",
    "Event",
    "FlowGraph",
    "FuseBatchNorm",
    "GraphNode",
    "GroupWalk",
    "Groups",
    "Interception",
    "JointNRM",
    "LayerNRM",
    "MemoryEstimate",
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
    "Plan",
    "Reconstruction",
    "Relative",
    "RelevanceMeasure",
    "Restriction",
    "Selection",
    "Subspaces",
    "TextExplanation",
    "TopSets",
    "TopWalks",
    "ablation",
    "activations",
    "at",
    "attention_sinks",
    "attribution_graph",
    "best_walk",
    "completeness",
    "condition_event",
    "coverage",
    "drsa",
    "explain_text",
    "feature_groups",
    "find_groups",
    "influence",
    "load_dictionary",
    "load_transcoders",
    "mse",
    "patches",
    "prca",
    "reconstruct",
    "reconstruction_errors",
    "register_kernel",
    "replacement",
    "restriction",
    "select_neurons",
    "smape",
    "steered",
    "top_sets",
    "top_walks",
    "with_features",
    "with_subspaces",
]
