"""The figure of docs/joint-relevance.md."""
from typing import Any


def draw(results: dict[str, Any]) -> None:
    pass
