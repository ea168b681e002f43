"""A small trained network and the digits it has never seen, shipped with the package."""

from nrm_plugin.demo.model import DigitsCNN, DigitsVGG, enlarge, load_digits, load_model

__all__ = ["DigitsCNN", "DigitsVGG", "enlarge", "load_digits", "load_model"]
