"""Attribution methods with the interfaces of Captum, Zennit and zennit-crp; they translate arguments.

Imports: errors, events, model, kernels, composites, recording, measure.
"""
