"""Frozen towers: architectures, weights, tokenizers."""
