"""Normalized relevance measure for Zennit and Captum."""

from .composites import Normalized, NRMAbsolute, NRMDefault
from .events import ABSORBED, Event, at
from .measure import RelevanceMeasure
from .rules import Absolute

__all__ = ["ABSORBED", "Absolute", "Event", "NRMAbsolute", "NRMDefault", "Normalized", "RelevanceMeasure", "at"]
