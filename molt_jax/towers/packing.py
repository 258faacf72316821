"""Texts without their padding: what a transformer does token by token runs on real tokens alone,
laid end to end.

Only attention looks at more than one token, and it is cheap; it gets its rows back, padded, and so
needs no mask across texts. Rows are packed in G groups of as many rows each, in their order, so
that rows that are split over devices (G a multiple of the devices) never leave their own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Packing(NamedTuple):
  """Where tokens are, in G groups of M = (rows of a group) x T positions.

  Attributes:
    position_gn: int32[G, N], of each packed token among the M positions of its group's rows; M
      where there is none.
    slot_gm: int32[G, M], of each position among the N packed tokens; N at padding.
  """

  position_gn: jax.Array
  slot_gm: jax.Array

  @classmethod
  def of(cls, position_gn: jax.Array, shape_bt: tuple[int, int]) -> 'Packing':
    """The packing of rows [B, T] whose real tokens are at `position_gn`, as the data pipeline gives
    them.
    """
    (b, t), (g, n) = shape_bt, position_gn.shape
    place = jax.vmap(
      lambda position_n: (
        jnp.full(b // g * t, n, jnp.int32)
        .at[position_n]
        .set(jnp.arange(n, dtype=jnp.int32), mode='drop')
      )
    )
    return cls(position_gn, place(position_gn))

  def pack(self, x_bt: jax.Array) -> jax.Array:
    """[B, T, ...] -> [G, N, ...]; zero in unused places."""
    g, m = self.slot_gm.shape
    return _take(x_bt.reshape(g, m, *x_bt.shape[2:]), self.position_gn, self.slot_gm)

  def unpack(self, x_gn: jax.Array, rows: int) -> jax.Array:
    """[G, N, ...] -> [B, T, ...], B = `rows`; zero at padding."""
    return _take(x_gn, self.slot_gm, self.position_gn).reshape(rows, -1, *x_gn.shape[2:])

  def sum_rows(self, x_lgnc: jax.Array, rows: int) -> jax.Array:
    """The sum over each row's tokens, [L, G, N, C] -> [L, B, C], B = `rows`, by a product with
    zeros and ones.
    """
    g, m = self.slot_gm.shape
    row_gn = self.position_gn // (m * g // rows)  # Past the last row in unused places.
    belongs_grn = (row_gn[:, None, :] == jnp.arange(rows // g)[None, :, None]).astype(x_lgnc.dtype)
    sum_lgrc = jnp.einsum('grn,lgnc->lgrc', belongs_grn, x_lgnc, precision='highest')
    return sum_lgrc.reshape(len(x_lgnc), rows, -1)


@jax.custom_vjp
def _take(x_gm, index_gn, back_gm):
  """x[g, index[g, n]], zero where the index is past the end. `back_gm` undoes it, so the transpose
  is a gather too, and not a slow scatter.
  """
  del back_gm
  return jax.vmap(lambda x_m, index_n: jnp.take(x_m, index_n, axis=0, mode='fill', fill_value=0))(
    x_gm, index_gn
  )


def _take_forward(x_gm, index_gn, back_gm):
  return _take(x_gm, index_gn, back_gm), (index_gn, back_gm)


def _take_backward(indices, slope_gn):
  index_gn, back_gm = indices
  return _take(slope_gn, back_gm, index_gn), None, None


_take.defvjp(_take_forward, _take_backward)
