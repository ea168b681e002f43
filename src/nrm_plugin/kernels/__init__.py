"""Kernels: what one call of a layer does to relevance, as a normalized linear map.

Reads Zennit's rules as kernels, and makes each call of a module a step of the computation graph.
Imports: errors, model, rules.
"""
