"""A small trained network and held-out digits, included in the package.

Imports: nothing of this package.
"""

from .model import DigitsCNN, DigitsVGG, enlarge, load_digits, load_model

__all__ = ["DigitsCNN", "DigitsVGG", "enlarge", "load_digits", "load_model"]
