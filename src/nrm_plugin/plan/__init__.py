"""Plans: the tensor operations of a measure and its queries, traced once and replayed for other inputs.

Contents: tracing of computations, simplification of traces, programs, and measures whose queries run programs.

Imports: errors, events, model, kernels, composites, recording, measure.
"""
