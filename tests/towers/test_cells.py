"""Means over the cells of an image, against PyTorch's adaptive average pooling."""

import types

import numpy as np
import pytest
from optional_torch import needs_torch, torch

from molt_jax.features import cells


def architecture(grid, registers=0, class_token=True):
  prefix = int(class_token) + registers
  return types.SimpleNamespace(
    grid=grid,
    class_token=class_token,
    num_prefix_tokens=prefix,
    num_tokens=prefix + grid**2,
  )


@needs_torch
@pytest.mark.parametrize(
  ('grid', 'count', 'registers', 'class_token'),
  [(8, 4, 0, True), (7, 3, 4, True), (5, 2, 0, False), (3, 1, 1, True)],
)
def test_cells_are_adaptive_average_pooling(grid, count, registers, class_token):
  own = architecture(grid, registers, class_token)
  x_lbid = np.random.default_rng(0).normal(size=(2, 3, own.num_tokens, 5)).astype(np.float32)
  found = np.asarray(cells.pool(x_lbid, own, count))
  assert found.shape[2] == cells.num_tokens(own, count)
  patches = x_lbid[:, :, own.num_prefix_tokens :].reshape(6, grid, grid, 5)
  pooled = torch.nn.functional.adaptive_avg_pool2d(
    torch.tensor(patches).double().permute(0, 3, 1, 2), count
  )
  expected = pooled.permute(0, 2, 3, 1).reshape(2, 3, count**2, 5).numpy()
  np.testing.assert_allclose(found[:, :, int(class_token) :], expected, atol=1e-6)
  if class_token:
    np.testing.assert_array_equal(found[:, :, 0], x_lbid[:, :, 0])


@pytest.mark.parametrize('count', [0, 4, 9])
def test_as_many_cells_as_patches_leave_every_token(count):
  own = architecture(4, registers=2)
  x_lbid = np.zeros((1, 1, own.num_tokens, 2), np.float32)
  assert cells.pool(x_lbid, own, count) is x_lbid
  assert cells.num_tokens(own, count) == own.num_tokens
