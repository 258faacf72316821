"""Scores, metrics and diagnostics of trained classifiers."""
