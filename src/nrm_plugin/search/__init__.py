"""Searches for the walks, sets of neurons and subspaces that carry most relevance, and what remains without the rest.

Imports: errors, events, kernels, functional, recording, measure.
"""
