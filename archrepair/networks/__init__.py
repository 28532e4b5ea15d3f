"""Networks by name and any other; their blocks, and their neurons."""
