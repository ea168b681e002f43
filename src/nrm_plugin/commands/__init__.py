"""The command ``nrm-plugin``: arguments, messages, and the files that its commands write.

``cli`` imports the module of a command only when the command is run.
Imports: errors, events, model, kernels, composites, recording, measure, attribution, plan, plots, dataset, demo.
"""
