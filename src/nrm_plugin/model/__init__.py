"""The user's model: its layers, inputs and outputs, and how it is run without being modified.

Relevance is not computed here.

Imports: errors, imports.
"""
