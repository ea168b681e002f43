"""Faithfulness of relevance compared with other attribution methods: ``python -m benchmarks.faithfulness``."""
