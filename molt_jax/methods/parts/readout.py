"""What methods share that run the towers' upper layers themselves: the vector that is read of a
tower.
"""

import jax
import jax.numpy as jnp


def projected(tower, last_btd: jax.Array, mask_bt: jax.Array | None = None) -> jax.Array:
  """Returns what stands for a whole input, [B, D] or, where the tower has a projection into a space
  that it shares with another one, there.

  Args:
    tower: a bound tower.
    last_btd: what leaves its last layer; where the tower has a head of its own, before its norm.
    mask_bt: of a text, its tokens; None: an image.
  """
  pooled_bd = tower.pool(last_btd, None, mask_bt)
  return tower.project(pooled_bd) if 'projection' in tower.heads else pooled_bd


def unit(x_bc: jax.Array) -> jax.Array:
  """Vectors of length one; zero stays zero."""
  square_b1 = jnp.sum(jnp.square(x_bc), axis=-1, keepdims=True)
  return x_bc * jax.lax.rsqrt(jnp.maximum(square_b1, 1e-12))
