"""Edge scores compared as circuits, by MIB's metrics: ``python -m benchmarks.circuits``."""
