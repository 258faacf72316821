"""Frozen towers: architectures, weights, tokenizers, taps."""
