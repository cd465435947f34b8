"""Experiments and measurements; run as modules from the repository's root."""
