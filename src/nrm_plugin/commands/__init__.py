"""The command ``nrm-plugin``: its arguments, messages and output files.

``cli`` imports the module of a subcommand only to run it.
Imports: errors, events, model, kernels, composites, recording, measure, attribution, search, plan, plots, dataset,
demo.
"""
