"""Faithfulness of relevances compared with other attribution methods: ``python -m benchmarks.faithfulness``."""
