"""The user's model: layers, inputs and outputs, and how the model is run without being modified.

Relevance is not computed here.

Imports: errors, imports.
"""
