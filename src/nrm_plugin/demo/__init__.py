"""A small trained network and held-out digits, bundled with the package, and a downloadable network for photographs.

Imports: errors.
"""

from .model import DigitsCNN, DigitsVGG, enlarge, load_digits, load_model

__all__ = ["DigitsCNN", "DigitsVGG", "enlarge", "load_digits", "load_model"]
