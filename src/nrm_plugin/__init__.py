"""Normalized relevance measure for Zennit and Captum."""

from .attribution import NRM, JointNRM, LayerNRM, NeuronNRM
from .attributors import NRMAttributor
from .canonizers import FuseBatchNorm
from .composites import Normalized, NRMAbsolute, NRMDefault
from .concepts import ConceptNRM, condition_event
from .coverage import Coverage, coverage
from .dataloading import DataLoaderNRM
from .events import ABSORBED, Event, at
from .flow import FlowGraph, patches
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
from .rules import Absolute, ConservingEpsilon, Relative

__all__ = [
    "ABSORBED",
    "NRM",
    "Absolute",
    "ConceptNRM",
    "ConservingEpsilon",
    "Coverage",
    "DataLoaderNRM",
    "Event",
    "FlowGraph",
    "FuseBatchNorm",
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
    "Normalized",
    "Relative",
    "RelevanceMeasure",
    "at",
    "condition_event",
    "coverage",
    "patches",
    "register_kernel",
]
