"""Normalized relevance measures for Zennit and Captum.

Public names are declared in ``__init__.pyi`` and imported lazily.
"""

import lazy_loader

from .imports import install

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
install()
