"""DINOv3's vision transformer (Siméoni et al. 2025)."""

from molt_jax.towers.dinov3.config import Dinov3Config

__all__ = ['Dinov3Config']
