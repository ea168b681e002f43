"""Recording of one run of the model as a graph, and passes that propagate relevance over this graph.

The nodes of the graph are *steps*, calls of layers or functions that propagate relevance by a rule or kernel, and *0/1
routes*, operations such as indexing that only copy values. A *tap* (hook point) is a recorded tensor with a layer name.

No other package runs a model.

Imports: errors, events, model, kernels, functional, composites.
"""
