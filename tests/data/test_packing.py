"""Where real tokens are: sizes, groups of rows, positions."""

import numpy as np
import pytest

from molt_jax.data import packing


@pytest.mark.parametrize(
  'length,padded', [(0, 16), (1, 16), (16, 16), (17, 32), (33, 64), (65, 100), (100, 100)]
)
def test_lengths_that_batches_are_padded_to(length, padded):
  assert packing.padded_length(length, 100) == padded
  assert packing.padded_length(length, 8) == 8


def test_sizes_of_packed_batches_are_few_and_near():
  sizes = [packing.packed_size(n) for n in range(4097)]
  assert all(n <= size <= max(16, 1.25 * n) for n, size in enumerate(sizes))
  assert sorted(set(sizes))[:9] == [16, 20, 24, 28, 32, 40, 48, 56, 64] and len(set(sizes)) == 33


def test_nearly_every_batch_keeps_to_the_usual_size():
  rng = np.random.default_rng(0)
  lengths_n = np.minimum(1 + rng.geometric(0.2, 3000), 16)
  usual = packing.usual_size(lengths_n, 64)
  assert usual == packing.packed_size(usual) < 0.6 * 16 * 64
  assert (
    np.mean([lengths_n[rng.choice(3000, 64, replace=False)].sum() <= usual for _ in range(2000)])
    > 0.995
  )
  assert packing.usual_size([], 64) == packing.usual_size([0, 0], 64) == 16


def test_groups_are_the_rows_that_a_device_takes_at_once():
  assert packing.groups(8, (1, 1)).tolist() == [list(range(8))]
  assert packing.groups(8, (2, 1)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert packing.groups(8, (2, 2)).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_positions_are_those_of_the_real_tokens_in_order():
  mask_bt = np.arange(20)[None, :] < np.array([3, 0, 20, 1, 5, 2])[:, None]
  rows = packing.groups(6, (2, 1))
  position_gn = packing.token_positions(mask_bt, rows)['token_position']
  assert position_gn.shape == (2, 24) and position_gn.dtype == np.int32
  assert position_gn[0].tolist() == [0, 1, 2, *range(40, 60), 60] and position_gn[1].tolist() == [
    0,
    *range(20, 25),
    40,
    41,
    *[60] * 16,
  ]


def test_nothing_is_packed_where_nothing_is_gained():
  assert packing.token_positions(np.ones((2, 16), bool), packing.groups(2, (1, 1))) == {}
