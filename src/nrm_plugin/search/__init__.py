"""Search for walks, sets of neurons and subspaces; restriction and ablation; learned features and attribution graphs.

Imports: errors, imports, events, model, kernels, functional, recording, measure.
"""
