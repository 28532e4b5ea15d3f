"""Rows of data, the one training loop, what it costs, and how its outcome is judged."""
