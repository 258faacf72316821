"""Means over the cells of an image: fewer tokens that keep the layout.

The patches of a vision transformer lie on a grid. Its class token, and the mean of the patches in
each of g x g cells, say what is where in 1 + g^2 tokens; a store of them is smaller than one of all
patches, and a head over them faster.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def num_tokens(architecture: Any, cells: int) -> int:
  """Returns the tokens of an image, class token and cells.

  Args:
    architecture: of the tower, a `towers.vision.config.VisionConfig`.
    cells: along a side; 0, or as many as there are patches or more: every token stays.
  """
  if not pools(architecture, cells):
    return architecture.num_tokens
  return int(architecture.class_token) + cells**2


def pools(architecture: Any, cells: int) -> bool:
  """Whether there are more patches than cells."""
  return 0 < cells < architecture.grid


def pool(states_lbid: jax.Array, architecture: Any, cells: int) -> jax.Array:
  """Returns class token and cell means of hidden states, [L, B, 1 + cells^2, D], row by row.

  Where the patches of a side do not divide evenly, cells share patches at their borders (as
  adaptive average pooling has them). Registers are left out.

  Args:
    states_lbid: all tokens of an image.
    architecture, cells: as in `num_tokens`.
  """
  if not pools(architecture, cells):
    return states_lbid
  prefix, side = architecture.num_prefix_tokens, architecture.grid
  share_cs = jnp.asarray(_shares(side, cells), states_lbid.dtype)
  l, b, _, d = states_lbid.shape
  patches = states_lbid[:, :, prefix:].reshape(l, b, side, side, d)
  means = jnp.einsum('lbyxd,cy,ex->lbced', patches, share_cs, share_cs)
  means = means.reshape(l, b, cells**2, d).astype(states_lbid.dtype)
  return jnp.concatenate([states_lbid[:, :, : int(architecture.class_token)], means], axis=2)


def _shares(side: int, cells: int) -> np.ndarray:
  """float32[cells, side], the weight of each row of patches in each row of cells."""
  shares = np.zeros((cells, side), np.float32)
  for cell in range(cells):
    start, stop = cell * side // cells, -(-(cell + 1) * side // cells)
    shares[cell, start:stop] = 1 / (stop - start)
  return shares
