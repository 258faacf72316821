"""The image tower against Hugging Face transformers, field by field."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import linen as nn
from optional_torch import torch

from molt_jax.errors import UserError
from molt_jax.towers import architectures, loading
from molt_jax.towers.clip import ClipVisionConfig
from molt_jax.towers.vision import VisionTransformer

CASES = {
  'plain': ({}, {}),
  'gelu': ({'hidden_act': 'gelu'}, {'hidden_act': 'quick_gelu'}),
  'quick_gelu': ({'hidden_act': 'quick_gelu'}, {'hidden_act': 'gelu'}),
  'layer_norm_eps': ({'layer_norm_eps': 0.1}, {'layer_norm_eps': 1e-5}),
  'patch_size': ({'patch_size': 4, 'image_size': 20}, {}),
  'sizes': (
    {
      'hidden_size': 40,
      'intermediate_size': 24,
      'num_hidden_layers': 2,
      'num_attention_heads': 5,
      'image_size': 32,
    },
    {},
  ),
}


def _images(size):
  return np.random.default_rng(0).standard_normal((3, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize('overrides, wrong', CASES.values(), ids=CASES)
def test_every_layer_matches_hugging_face(
  hf, tower_of, states_of, relative_error, overrides, wrong
):
  model = hf.clip(**overrides)
  tower = tower_of(model)
  image_bhwc = _images(model.config.image_size)
  expected = hf.image_states(model, image_bhwc)
  ours = states_of(tower, image_bhwc)
  assert relative_error(ours, expected).max() <= 1e-4
  assert ours.shape[2] == tower.config.num_tokens
  if wrong:
    module = tower.module.clone(config=dataclasses.replace(tower.config, **wrong))
    assert relative_error(states_of(tower, image_bhwc, module=module), expected).max() > 1e-3


def test_bfloat16_errs_no_more_than_hugging_face_does(hf, tower_of, states_of, relative_error):
  model = hf.clip(initializer_range=0.1)
  tower = tower_of(model, dtype='bfloat16')
  exact = hf.image_states(model, _images(20))
  theirs = relative_error(hf.image_states(model.to(torch.bfloat16), _images(20)), exact)
  ours = relative_error(states_of(tower, _images(20)).astype(jnp.float32), exact)
  assert ours.max() <= max(2 * theirs.max(), 2**-7)


def test_fewer_states_and_runs_of_layers(hf, tower_of, states_of):
  tower = tower_of(hf.clip())
  all_lbid = states_of(tower, _images(20))
  bound = tower.module.bind({'params': tower.params})
  np.testing.assert_allclose(
    jax.jit(lambda x: bound(x, states=range(-2, 0)))(_images(20)),
    all_lbid[-2:],
    rtol=1e-4,
    atol=1e-5,
  )
  h_bid = jax.jit(bound.embed)(_images(20))
  for start, stop in ((0, 1), (1, 3)):
    h_bid = jax.jit(functools.partial(bound.run, start=start, stop=stop))(h_bid)[0]
  np.testing.assert_allclose(h_bid, all_lbid[-1], rtol=1e-5, atol=1e-5)
  for n in (0, 5):
    with pytest.raises(UserError, match='from 0 to 3'):
      bound(_images(20), states=range(-n, 0))
  with pytest.raises(UserError, match='20, 20, 3'):
    bound(_images(24), states=range(-1, 0))


@pytest.mark.parametrize(
  'name', ['clip-vit-b-32', 'clip-vit-b-16', 'clip-vit-l-14', 'clip-vit-l-14-336']
)
def test_full_size_models_trace_without_weights(name):
  config = architectures.CLIP_VISION[name]
  module = VisionTransformer(ClipVisionConfig.from_hf(config), jnp.dtype('bfloat16'), 'xla')
  params = nn.unbox(loading.abstract_params(module))
  with torch.device('meta'):
    theirs = transformers.CLIPVisionModel(
      transformers.CLIPVisionConfig(**{k: v for k, v in config.items() if k != 'model_type'})
    )
  unused = 2 * config['hidden_size']  # post_layernorm
  assert (
    sum(x.size for x in jax.tree.leaves(params))
    == sum(p.numel() for p in theirs.parameters()) - unused
  )
  size = config['image_size']
  out = jax.eval_shape(
    lambda p, x: module.apply({'params': p}, x, states=range(-4, 0)),
    params,
    jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
  )
  assert out.shape == (4, 2, 1 + (size // config['patch_size']) ** 2, config['hidden_size'])


def test_every_parameter_has_known_logical_axes():
  boxed = loading.abstract_params(
    VisionTransformer(
      ClipVisionConfig.from_hf(architectures.CLIP_VISION['clip-vit-tiny']),
      jnp.dtype('float32'),
      'xla',
    )
  )
  leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert all(
    isinstance(x, nn.LogicallyPartitioned) and len(x.names) == x.value.ndim for x in leaves
  )
  assert {n for x in leaves for n in x.names} == {
    'layers',
    'embed',
    'heads',
    'head_dim',
    'mlp',
    'patch',
    'position',
  }


def test_a_whole_clip_config_gives_its_vision_part():
  whole = transformers.CLIPConfig(
    vision_config={'hidden_size': 64, 'num_attention_heads': 2, 'patch_size': 16}
  )
  part = ClipVisionConfig.from_hf(whole.vision_config.to_dict())
  assert (
    ClipVisionConfig.from_hf(whole.to_dict())
    == ClipVisionConfig.from_hf(whole.to_diff_dict())
    == part
  )
  assert part.hidden_size == 64 and part.num_layers == 12


@pytest.mark.parametrize(
  'changes, says',
  [
    ({'model_type': 'siglip_vision_model'}, 'siglip_vision_model'),
    ({'hidden_act': 'gelu_new'}, "hidden_act = 'gelu_new'.*'quick_gelu' or 'gelu'"),
    ({'num_channels': 1}, 'num_channels = 1'),
    ({'image_size': [224, 448]}, 'image_size'),
    ({'num_attention_heads': 7}, 'num_attention_heads = 7'),
    ({'image_size': 8}, 'image_size = 8'),
  ],
)
def test_unimplemented_values_are_refused_by_name(changes, says):
  with pytest.raises(UserError, match=says):
    ClipVisionConfig.from_hf({'model_type': 'clip_vision_model', **changes})
