"""Towers within the file of a whole model: what comes back is what was written."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.runtime import sealed
from molt_jax.towers import kept, loading

LAST = 2  # The last state that is read.


@pytest.mark.parametrize(
  ('modality', 'name', 'resolution'),
  [
    ('text', 'gemma3-tiny', 0),
    ('text', 'roberta-tiny', 0),
    ('text', 'siglip-text-tiny', 0),
    ('image', 'clip-vit-tiny', 0),
    ('image', 'dinov2-with-registers-tiny', 28),
    ('image', 'dinov3-tiny', 0),
  ],
)
def test_a_tower_comes_back_as_it_was(tmp_path, modality, name, resolution):
  spec = loading.describe_tower(f'random:{name}', modality=modality, resolution=resolution)
  shapes = nn.unbox(loading.abstract_params(spec.make_module('bfloat16', 'xla')))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32).astype(x.dtype), shapes)
  sealed.write(tmp_path / 'a.molt', kept.members(spec, params, LAST), {})
  path = kept.path_of(tmp_path / 'a.molt', modality)
  how = {'modality': modality, 'resolution': resolution}
  found = kept.load_tower(path, dtype='bfloat16', **how)
  assert (found.family, found.config, found.identity) == (spec.family, spec.config, spec.identity)
  assert (found.preprocess, found.hf_config) == (spec.preprocess, spec.hf_config)
  if modality == 'text':
    for text in ('', 'Some words, and more of them', 'naïve 🦓'):
      assert found.tokenizer.encode(text, 16) == spec.tokenizer.encode(text, 16)
  wanted = dict(kept.named_leaves(params))
  leaves = dict(kept.named_leaves(found.params))
  assert leaves.keys() == wanted.keys()
  for leaf, x in leaves.items():
    x, y = np.asarray(x), wanted[leaf]
    if leaf.startswith('layers/'):
      assert not x[LAST:].any()  # Of layers that nothing reads there is nothing.
      x, y = x[:LAST], y[:LAST]
    assert x.dtype == y.dtype and x.tobytes() == y.tobytes()
  with pytest.raises(UserError, match='give the same'):
    kept.describe_tower(path, modality=modality, quantization='int8')
