"""Plans: the tensor operations of a measure and its queries, traced once and replayed for other inputs.

A trace is a list of tensor operations, and a program is a simplified and compiled trace. The package contains tracing,
simplification, compilation, export, and measures that answer queries by running programs.

Imports: errors, events, model, kernels, composites, recording, measure.
"""
