"""The user's model: its layers, its inputs and outputs, and running it without modifying it.

Relevance is not computed here.

Imports: errors, imports.
"""
