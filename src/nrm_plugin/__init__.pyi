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
from .measure.flow_graph import FlowGraph
from .measure.group_search import find_groups
from .measure.layer_groups import Groups
from .measure.measure import RelevanceMeasure
from .measure.partitions import patches
from .measure.reconstruction import Reconstruction, reconstruct
from .plan.plan import Plan
from .recording.coverage import Coverage, coverage
from .rules import Absolute, ConservingEpsilon, Relative
from .search.ablation import ablation, activations
from .search.neuron_walks import NeuronWalk, best_walk
from .search.selection import CurvePoint, Restriction, Selection, mse, restriction, select_neurons, smape
from .search.sets import TopSets, top_sets
from .search.subspaces import Subspaces, drsa, prca, with_subspaces
from .search.walks import GroupWalk, TopWalks, top_walks

__version__: str

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
    "Groups",
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
    "best_walk",
    "condition_event",
    "coverage",
    "drsa",
    "explain_text",
    "find_groups",
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
