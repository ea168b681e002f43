"""A small trained network and held-out digits, included in the package; a network for photographs, fetched by name.

Imports: errors.
"""

from .model import DigitsCNN, DigitsVGG, enlarge, load_digits, load_model

__all__ = ["DigitsCNN", "DigitsVGG", "enlarge", "load_digits", "load_model"]
