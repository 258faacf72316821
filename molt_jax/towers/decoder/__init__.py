"""Decoders as text towers: LLaMA (Touvron et al. 2023) and what came after it, and OPT."""

from molt_jax.towers.decoder.config import DecoderConfig
from molt_jax.towers.decoder.model import Decoder
from molt_jax.towers.decoder.rope import Rope

__all__ = ['Decoder', 'DecoderConfig', 'Rope']
