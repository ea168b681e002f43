"""The commands of the shell: arguments, the files that they write and the messages that they print.

Imports: errors, events, kernels, composites, recording, measure, plots, dataset, demo.
"""
