"""Attention by cuDNN, as far as a machine without a GPU can tell: JAX's kernel has no batching rule
but for axis 0, computes in bfloat16, and runs on NVIDIA's GPUs alone.
"""

import flax.linen as nn
import jax
import numpy as np
import pytest

from molt_jax.errors import UserError
from molt_jax.towers import loading

TOWERS = (
  ('text', 'llama-tiny'),
  ('text', 'bert-tiny'),
  ('text', 'clip-text-tiny'),
  ('image', 'clip-vit-tiny'),
)
plain = jax.nn.dot_product_attention


def cudnn_alone(query, *arguments, implementation=None, **options):
  """What JAX's does of what it is given, with the limit of cuDNN's."""
  is_batched = type(query).__name__ == 'BatchTracer'
  if implementation == 'cudnn' and is_batched:
    raise NotImplementedError('only batch_dim 0')
  return plain(query, *arguments, implementation='xla', **options)


@pytest.mark.parametrize(('modality', 'name'), TOWERS)
def test_towers_are_made_without_a_batched_kernel(modality, name, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', cudnn_alone)
  spec = loading.describe_tower(f'random:{name}', modality=modality)
  made = [
    nn.unbox(loading.abstract_params(spec.make_module('bfloat16', attention)))
    for attention in ('cudnn', 'xla')
  ]
  assert jax.tree.structure(made[0]) == jax.tree.structure(made[1])
  for a, b in zip(*map(jax.tree.leaves, made), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize(
  ('platform', 'dtype', 'says'),
  [
    ('cpu', 'bfloat16', r"attention: 'cudnn' needs an NVIDIA GPU, and JAX runs on a cpu here"),
    ('gpu', 'float32', r"attention: 'cudnn' needs bfloat16, and the towers compute in float32"),
  ],
)
def test_where_it_cannot_run_it_is_refused_by_name(platform, dtype, says, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  spec = loading.describe_tower('random:clip-vit-tiny', modality='image')
  with pytest.raises(UserError, match=says):
    spec.make_module(np.dtype(dtype) if dtype == 'float32' else dtype, 'cudnn')
