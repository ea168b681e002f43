"""Joint relevance compared with exact path patching, on several kinds of nets."""
