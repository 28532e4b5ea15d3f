"""Cells become records: originals, methods by name, runs, comparisons."""
