"""Packing and unpacking of tokens against plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np

from molt_jax.towers.packing import Packing

MASK = np.arange(5) < np.array([[2], [0], [5], [1]])
POSITION = np.array(
  [[0, 1, 10, 10, 10, 10], [0, 1, 2, 3, 4, 5]], np.int32
)  # Two groups of two rows: [2, 0] and [5, 1] tokens.


def test_pack_unpack_and_sum_are_plain_indexing():
  x_btc = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
  packing = Packing.of(POSITION, MASK.shape)
  packed_gnc = packing.pack(x_btc)
  np.testing.assert_array_equal(packed_gnc[0], np.concatenate([x_btc[0, :2], np.zeros((4, 3))]))
  np.testing.assert_array_equal(packed_gnc[1], np.concatenate([x_btc[2], x_btc[3, :1]]))
  np.testing.assert_array_equal(packing.unpack(packed_gnc, 4), np.where(MASK[:, :, None], x_btc, 0))
  sums_bc = x_btc.sum(axis=1, where=MASK[:, :, None])
  np.testing.assert_allclose(
    packing.sum_rows(jnp.stack([packed_gnc, -packed_gnc]), 4), [sums_bc, -sums_bc], rtol=1e-6
  )
  assert packing.pack(MASK).tolist() == [[True] * 2 + [False] * 4, [True] * 6]


def test_gradients_are_those_of_the_linear_maps():
  """Of pack and of unpack: the transpose of their matrices, found column by column."""
  packing = Packing.of(POSITION, MASK.shape)
  maps = {'pack': (packing.pack, (4, 5)), 'unpack': (lambda x_gn: packing.unpack(x_gn, 4), (2, 6))}
  for function, shape in maps.values():
    units = np.eye(np.prod(shape), dtype=np.float32).reshape(-1, *shape)
    matrix = np.stack([np.ravel(function(unit)) for unit in units])
    out = np.random.default_rng(1).normal(size=function(units[0]).shape).astype(np.float32)
    (slope,) = jax.vjp(function, jnp.zeros(shape))[1](out)
    np.testing.assert_allclose(np.ravel(slope), matrix @ out.ravel(), rtol=1e-6, atol=1e-6)
