"""SigLIP's vision transformer (Zhai et al. 2023), and SigLIP 2's of fixed resolution (Tschannen et
al. 2025).
"""

from molt_jax.towers.siglip.config import SiglipVisionConfig

__all__ = ['SiglipVisionConfig']
