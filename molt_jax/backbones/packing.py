"""Texts without their padding: what a transformer does token by token runs on real tokens alone, laid end to end.

Only attention looks at more than one token, and it is cheap; it gets its rows back, padded, and so needs no mask across texts. Rows are packed in
G groups of as many rows each, in their order, so that rows that are split over devices (G a multiple of the devices) never leave their own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Packing(NamedTuple):
  """Where tokens are, in G groups of M = (rows of a group) x T positions.

  Attributes:
    position_gn: int32[G, N], of each packed token among the M positions of its group's rows; M where there is none.
    slot_gm: int32[G, M], of each position among the N packed tokens; 0 at padding.
  """

  position_gn: jax.Array
  slot_gm: jax.Array

  @classmethod
  def of(cls, position_gn: jax.Array, shape_bt: tuple[int, int]) -> 'Packing':
    """The packing of rows [B, T] whose real tokens are at `position_gn`, as the data pipeline gives them."""
    (b, t), (g, n) = shape_bt, position_gn.shape
    place = jax.vmap(lambda position_n: jnp.zeros(b // g * t, jnp.int32).at[position_n].set(jnp.arange(n, dtype=jnp.int32), mode='drop'))
    return cls(position_gn, place(position_gn))

  def pack(self, x_bt: jax.Array) -> jax.Array:
    """[B, T, ...] -> [G, N, ...]; what is in unused places is finite if x is, and means nothing."""
    g, m = self.slot_gm.shape
    return _take(x_bt.reshape(g, m, *x_bt.shape[2:]), self.position_gn)

  def unpack(self, x_gn: jax.Array, rows: int) -> jax.Array:
    """[G, N, ...] -> [B, T, ...], B = `rows`; padding holds some token of its group."""
    return _take(x_gn, self.slot_gm).reshape(rows, -1, *x_gn.shape[2:])


def _take(x_gm, index_gn):
  return jax.vmap(lambda x_m, index_n: jnp.take(x_m, index_n, axis=0, mode='clip'))(x_gm, index_gn)
