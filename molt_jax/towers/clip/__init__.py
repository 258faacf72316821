"""CLIP's two transformers: Radford et al. 2021."""

from molt_jax.towers.clip.config import ClipTextConfig, ClipVisionConfig
from molt_jax.towers.clip.layers import patches
from molt_jax.towers.clip.text import ClipText
from molt_jax.towers.clip.vision import ClipVision

__all__ = ['ClipText', 'ClipTextConfig', 'ClipVision', 'ClipVisionConfig', 'patches']
