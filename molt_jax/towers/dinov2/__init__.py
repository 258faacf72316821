"""DINOv2's vision transformer (Oquab et al. 2024), also with registers (Darcet et al. 2024)."""

from molt_jax.towers.dinov2.config import Dinov2Config, Dinov2WithRegistersConfig

__all__ = ['Dinov2Config', 'Dinov2WithRegistersConfig']
