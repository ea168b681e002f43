"""Search for the walks, sets of neurons and subspaces with the most relevance; restriction, and ablation.

Imports: errors, imports, events, kernels, functional, recording, measure.
"""
