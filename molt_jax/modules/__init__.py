"""Trainable modules: inputs, attention, MoLT, fusion, baselines; `heads.make_head` builds one by name."""
