"""Objectives: pure functions with masks in."""
