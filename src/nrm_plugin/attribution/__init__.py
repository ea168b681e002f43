"""Attribution methods with the interfaces of Captum, Zennit and zennit-crp, as thin adapters of the measure.

Imports: errors, events, model, kernels, composites, recording, measure, plan.
"""
