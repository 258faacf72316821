"""Generators of hostile inputs, see ../fuzz.py."""
