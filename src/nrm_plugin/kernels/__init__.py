"""Kernels: the propagation of relevance through one call of a layer, as a normalized linear map.

The package reads Zennit's rules as kernels, and makes each call of a module a step of the computation graph.
Imports: errors, model, rules.
"""
