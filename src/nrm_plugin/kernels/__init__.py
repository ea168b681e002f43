"""Kernels: the propagation of relevance through one call of a layer, as a normalized linear map.

The package converts Zennit's rules to kernels, and makes each module call a step of the computation graph.
Imports: errors, model, rules.
"""
