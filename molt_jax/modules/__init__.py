"""Trainable modules: attention, MoLT, fusion, rivals."""
