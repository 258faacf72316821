"""The vision transformer of ImageNet (Dosovitskiy et al. 2021), and those of its architecture, such
as DINO (Caron et al. 2021).
"""

from molt_jax.towers.vit.config import VitConfig

__all__ = ['VitConfig']
