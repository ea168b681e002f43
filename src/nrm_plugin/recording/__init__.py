"""Recording of one run of the model as a graph of steps and passes that propagate relevance over this graph.

No other package runs a model.

Imports: errors, events, model, kernels, functional, composites.
"""
