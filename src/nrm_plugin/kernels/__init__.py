"""Kernels: what one call of a layer does to relevance, as a normalized linear map.

Zennit's rules are read here, and each call becomes a step of the computation graph.
Imports: errors, model, rules.
"""
