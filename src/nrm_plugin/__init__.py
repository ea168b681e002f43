"""Normalized relevance measure for Zennit and Captum."""

from .attribution import NRM, JointNRM, LayerNRM, NeuronNRM
from .canonizers import FuseBatchNorm
from .composites import Normalized, NRMAbsolute, NRMDefault
from .coverage import Coverage, coverage
from .events import ABSORBED, Event, at
from .functional import Interception, register_kernel
from .measure import RelevanceMeasure
from .rules import Absolute, ConservingEpsilon

__all__ = [
    "ABSORBED",
    "NRM",
    "Absolute",
    "ConservingEpsilon",
    "Coverage",
    "Event",
    "FuseBatchNorm",
    "Interception",
    "JointNRM",
    "LayerNRM",
    "NRMAbsolute",
    "NRMDefault",
    "NeuronNRM",
    "Normalized",
    "RelevanceMeasure",
    "at",
    "coverage",
    "register_kernel",
]
