"""Attribution methods with the interfaces of Captum, Zennit and zennit-crp; they only translate arguments.

Imports: errors, events, model, kernels, composites, recording, measure.
"""
