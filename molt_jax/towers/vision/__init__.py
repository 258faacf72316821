"""Vision transformers (Dosovitskiy et al. 2021): what those of CLIP, DINOv2 and others share."""

from molt_jax.towers.vision.config import VisionConfig
from molt_jax.towers.vision.model import VisionTransformer, patches

__all__ = ['VisionConfig', 'VisionTransformer', 'patches']
