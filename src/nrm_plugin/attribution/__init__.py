"""Attribution methods with the interfaces of Captum, Zennit and zennit-crp, and explanations for text models.

Imports: errors, events, model, kernels, composites, recording, measure, plan.
"""
