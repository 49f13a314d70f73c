"""Metrics: which can be computed, and how."""
