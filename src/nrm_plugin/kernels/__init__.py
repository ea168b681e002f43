"""Kernels: the propagation of relevance through one call of a layer, as a normalized linear map.

Zennit's rules are converted to kernels, and each call of a layer becomes a *step*, a node of the computation graph
whose gradient is relevance.

Imports: errors, model, rules.
"""
