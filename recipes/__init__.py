"""One paper per file; recipes never import each other."""
