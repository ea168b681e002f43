"""Facts about the model: its layers, its inputs and outputs, and how it is run without being changed.

No relevance is computed here.
Imports: errors.
"""
