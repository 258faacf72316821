"""What methods share that run the towers' upper layers themselves: the vector that is read of a
tower.
"""

import jax


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
