"""What sums over all pairs of a batch share: the pairs in blocks, the weights of rows.

A batch of B rows has B^2 pairs. `over_columns` visits them in blocks of all rows against at most
`BLOCK_COLUMNS` of them and recomputes each block on the way back, so that no B x B array lives.
Rows may be split over devices: a block then is split alike, and only columns travel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_COLUMNS = 1024
# Of embeddings, which are of length one: so that fourth powers and sums over pairs stay in float32.
LARGEST = 1e6


def over_columns(step, carry, columns):
  """Folds `step(carry, block) -> carry` over blocks of the columns.

  Args:
    step: its `block` is a tree like `columns` with [n, ...] leaves, n <= BLOCK_COLUMNS; blocks have
      one size, filled up with zeros.
    columns: a tree of arrays [B, ...]; one leaf should be a weight, so that `step` can tell the
      filling by its weight of 0.
  """
  num_rows = len(jax.tree.leaves(columns)[0])
  num_blocks = -(-num_rows // BLOCK_COLUMNS)
  size = -(-num_rows // num_blocks)

  def blocks(x):
    x = jnp.pad(x, [(0, num_blocks * size - num_rows)] + [(0, 0)] * (x.ndim - 1))
    # Every num_blocks-th row makes a block: each device holds a part of each block, so none has to
    # send all of its rows at once.
    return jnp.moveaxis(x.reshape(size, num_blocks, *x.shape[1:]), 1, 0)

  return lax.scan(
    lambda c, block: (jax.checkpoint(step, prevent_cse=False)(c, block), None),
    carry,
    jax.tree.map(blocks, columns),
  )[0]


def dots(rows_bc, columns_nc):
  """Inner products [B, n], in full float32."""
  return jnp.einsum('bc,nc->bn', rows_bc, columns_nc, precision='highest')


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def in_range(x, largest):
  """Numbers beyond `largest` as that; infinity stays, the sign of something gone wrong."""
  return jnp.where(jnp.isinf(x), x, jnp.clip(x, -largest, largest))


@in_range.defjvp
def _(largest, values, slopes):  # What is beyond gets a gradient too, and no mask is kept for that.
  return in_range(*values, largest), *slopes


def present_rows(weight_b, *arrays_bc):
  """Returns (weight_b, *arrays_bc) in float32, without weights ones.

  Rows of weight 0 are not read and get no gradient; numbers beyond LARGEST count as LARGEST.
  """
  if weight_b is None:
    weight_b = jnp.ones(len(arrays_bc[0]))
  else:
    weight_b = lax.stop_gradient(weight_b).astype(jnp.float32)
  is_present_b1 = weight_b[:, None] > 0
  read = (jnp.where(is_present_b1, x_bc.astype(jnp.float32), 0.0) for x_bc in arrays_bc)
  return weight_b, *(in_range(x_bc, LARGEST) for x_bc in read)


def weighted_mean(value_b, weight_b):
  """sum w v / sum w; 0 when every weight is 0."""
  return jnp.sum(weight_b * value_b) / jnp.maximum(jnp.sum(weight_b), jnp.finfo(jnp.float32).tiny)
