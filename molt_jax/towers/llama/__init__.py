"""LLaMA: Touvron et al. 2023, and decoders of the same architecture."""

from molt_jax.towers.llama.config import LlamaConfig, RopeScaling
from molt_jax.towers.llama.model import Llama

__all__ = ['Llama', 'LlamaConfig', 'RopeScaling']
