"""Kinds of damage at five severities, for a batch of images, from a seed."""
