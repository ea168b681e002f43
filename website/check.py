"""Fails if a built page loads anything from another host: ``python -m website.check build/site``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|object|embed)\b[^>]*\b(?:src|data)=[\"']?(?:https?:)?//[^\"' >]+"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|icon))[^>]*\bhref=[\"']?(?:https?:)?//[^\"' >]+"
    r"|url\([\"']?(?:https?:)?//[^)]+|@import\s+[\"'](?:https?:)?//[^\"']+"
)


def loaded(text: str) -> list[str]:
    """Returns the resources that a page or style sheet loads from other hosts; hyperlinks are not loaded."""
    return LOADED.findall(text)


def main() -> None:
    """Runs the check from the command line."""
    folder = Path(sys.argv[1])
    pages = [path for ending in ("html", "css") for path in sorted(folder.rglob(f"*.{ending}"))]
    faults = [f"{path}: {text}" for path in pages for text in loaded(path.read_text())]
    if faults or not pages:
        sys.exit("\n".join(faults) or f"no pages in {folder}")
    print(f"{len(pages)} pages and style sheets load nothing from other hosts.")


if __name__ == "__main__":
    main()
