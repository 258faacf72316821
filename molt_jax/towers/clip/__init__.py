"""CLIP's two transformers: Radford et al. 2021."""

from molt_jax.towers.clip.config import ClipTextConfig, ClipVisionConfig
from molt_jax.towers.clip.text import ClipText

__all__ = ['ClipText', 'ClipTextConfig', 'ClipVisionConfig']
