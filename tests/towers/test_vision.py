"""Vision transformers against Hugging Face transformers: each family field by field, at other
resolutions too. CLIP's is in test_clip.py.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from optional_torch import needs_torch, torch

from molt_jax.config import default_config
from molt_jax.errors import UserError
from molt_jax.runtime import sharding
from molt_jax.towers import architectures, base, loading
from molt_jax.towers.vision import positions

PLAIN, REGISTERS = 'Dinov2Model', 'Dinov2WithRegistersModel'
SIGLIP, VIT, DINOV3 = 'SiglipVisionModel', 'ViTModel', 'DINOv3ViTModel'
TINY = {'num_hidden_layers': 2}
# What differs from the tiny model, and a wrong reading of it that must be seen.
CASES = {
  'DINOv2, plain': (PLAIN, {}, {'layer_scale': False}),
  'DINOv2, hidden_act': (PLAIN, {'hidden_act': 'quick_gelu'}, {'hidden_act': 'gelu'}),
  'DINOv2, layer_norm_eps': (PLAIN, {'layer_norm_eps': 0.1}, {'layer_norm_eps': 1e-6}),
  'DINOv2, mlp_ratio': (PLAIN, {'mlp_ratio': 3}, {}),
  'DINOv2, qkv_bias': (PLAIN, {'qkv_bias': False}, {}),
  'DINOv2, use_swiglu_ffn': (PLAIN, {'use_swiglu_ffn': True}, {'hidden_act': 'gelu'}),
  'DINOv2, sizes': (
    PLAIN,
    {'hidden_size': 40, 'num_hidden_layers': 1, 'num_attention_heads': 5, 'image_size': 32},
    {},
  ),
  'registers': (REGISTERS, {'num_register_tokens': 2, 'use_swiglu_ffn': True}, {}),
  'SigLIP, plain': (SIGLIP, {}, {'hidden_act': 'quick_gelu'}),
  'SigLIP, hidden_act': (SIGLIP, {'hidden_act': 'gelu'}, {}),
  'SigLIP, layer_norm_eps': (SIGLIP, {'layer_norm_eps': 0.5}, {'layer_norm_eps': 1e-6}),
  'SigLIP, vision_use_head': (SIGLIP, {'vision_use_head': False, 'intermediate_size': 40}, {}),
  'ViT, plain': (VIT, {}, {}),
  'ViT, hidden_act': (VIT, {'hidden_act': 'gelu_pytorch_tanh'}, {'hidden_act': 'quick_gelu'}),
  'ViT, layer_norm_eps': (VIT, {'layer_norm_eps': 0.1}, {'layer_norm_eps': 1e-12}),
  'ViT, qkv_bias': (VIT, {'qkv_bias': False}, {}),
  'DINOv3, plain': (DINOV3, {'num_register_tokens': 2}, {'layer_scale': False}),
  'DINOv3, rope_theta': (DINOV3, {'rope_theta': 10.0, 'image_size': 32}, {'rope_theta': 100.0}),
  'DINOv3, query_bias, key_bias': (DINOV3, {'query_bias': False, 'key_bias': True}, {}),
  'DINOv3, value_bias, proj_bias': (DINOV3, {'value_bias': False, 'proj_bias': False}, {}),
  'DINOv3, mlp_bias, layer_norm_eps': (DINOV3, {'mlp_bias': False, 'layer_norm_eps': 0.1}, {}),
  'DINOv3, use_gated_mlp': (DINOV3, {'use_gated_mlp': True, 'hidden_act': 'silu'}, {}),
}


def _images(size):
  return np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)


def _load(hf, model, path, **how):
  """The tower, whose files ask for pictures of the size of the pretraining."""
  hf.save(model, path)
  size = model.config.image_size
  asked = {'image_processor_type': 'BitImageProcessor', 'size': size, 'crop_size': size}
  (path / 'preprocessor_config.json').write_text(json.dumps(asked))
  heads = () if getattr(model.config, 'vision_use_head', True) is False else ('pool',)
  return loading.load_tower(str(path), modality='image', dtype='float32', heads=heads, **how)


def _outputs(tower, image_bhwc):
  """All hidden states, what is pooled of the last, its tokens after the final norm."""

  def run(params, image_bhwc):
    bound = tower.module.bind({'params': params})
    states = bound(image_bhwc, states=range(tower.config.num_layers + 1))
    if not tower.module.heads:
      return states, None, None
    return states, bound.pool(states[-1]), bound.norm_tokens(states[-1])

  return jax.jit(run)(tower.params, image_bhwc)


@pytest.mark.parametrize('name, overrides, wrong', CASES.values(), ids=CASES)
def test_every_layer_matches_hugging_face(
  hf, states_of, relative_error, tmp_path, name, overrides, wrong
):
  model = hf.vision(name, **{**TINY, **overrides})
  image_bhwc = _images(model.config.image_size)
  expected = hf.see(model, image_bhwc)
  states = np.stack(expected.hidden_states)
  tower = _load(hf, model, tmp_path)
  ours, pooled_bd, normed_bid = _outputs(tower, image_bhwc)
  assert ours.shape[2] == tower.config.num_tokens
  assert relative_error(ours, states).max() <= 1e-4
  if tower.module.heads:
    assert relative_error(normed_bid, expected.last_hidden_state).max() <= 1e-4
    if tower.config.class_token:
      np.testing.assert_array_equal(pooled_bd, normed_bid[:, 0])
    if name != VIT:  # Which puts a layer of the pretraining on the class token.
      np.testing.assert_allclose(pooled_bd, expected.pooler_output, rtol=1e-3, atol=1e-4)
  if wrong:
    module = tower.module.clone(config=dataclasses.replace(tower.config, **wrong))
    assert relative_error(states_of(tower, image_bhwc, module=module), states).max() > 1e-3


OTHER_SIZES = [
  (PLAIN, 24),
  (PLAIN, 72),
  (REGISTERS, 24),
  (SIGLIP, 56),
  (VIT, 24),
  (DINOV3, 24),
  ('CLIPVisionModel', 56),
]


@pytest.mark.parametrize('name, resolution', OTHER_SIZES)
def test_other_resolutions_are_those_of_hugging_face(
  hf, states_of, relative_error, tmp_path, name, resolution
):
  model = hf.vision(name, **TINY, image_size=40)
  image_bhwc = _images(resolution)
  how = {} if 'DINO' in name.upper() else {'interpolate_pos_encoding': True}
  expected = hf.image_states(model, image_bhwc, **how)
  tower = _load(hf, model, tmp_path, resolution=resolution)
  assert relative_error(states_of(tower, image_bhwc), expected).max() <= 1e-4
  assert tower.preprocess.size == tower.config.image_size == resolution


@needs_torch
@pytest.mark.parametrize('antialias', [False, True])
@pytest.mark.parametrize('old, new', [(37, 8), (37, 16), (4, 7), (3, 3), (2, 5), (5, 1)])
def test_grids_are_resampled_as_pytorch_does(old, new, antialias):
  grid_pd = np.random.default_rng(0).standard_normal((old * old, 3))
  theirs = torch.nn.functional.interpolate(
    torch.tensor(grid_pd.reshape(1, old, old, 3)).permute(0, 3, 1, 2),
    size=(new, new),
    mode='bicubic',
    align_corners=False,
    antialias=antialias,
  )
  expected_pd = theirs.permute(0, 2, 3, 1).reshape(new * new, 3).numpy()
  ours = positions.resample(grid_pd, old, new, antialias=antialias)
  np.testing.assert_allclose(ours, expected_pd, rtol=0, atol=1e-6)


def test_files_with_the_names_of_transformers_5_load_alike(hf, tmp_path):
  model = hf.vision(PLAIN, **{**TINY, 'use_swiglu_ffn': True})
  tower = _load(hf, model, tmp_path / 'old')
  shutil.copytree(tmp_path / 'old', tmp_path / 'new')
  named = {f'dinov2.{name}': w.numpy() for name, w in model.state_dict().items()}
  assert any('gate_proj' in name for name in named)
  safetensors.numpy.save_file(named, tmp_path / 'new' / 'model.safetensors', {'format': 'pt'})
  again = loading.load_tower(
    str(tmp_path / 'new'), modality='image', dtype='float32', heads=('pool',)
  )
  jax.tree.map(np.testing.assert_array_equal, again.params, tower.params)


def test_a_preprocessor_says_which_size_is_read(hf, states_of, relative_error, tmp_path):
  """As published: positions of 518 pixels, pictures of 256 with a crop of 224."""
  model = hf.vision(PLAIN, **TINY, image_size=64)
  hf.save(model, tmp_path)
  processor = transformers.models.bit.image_processing_pil_bit.BitImageProcessorPil(
    size={'shortest_edge': 40}, crop_size={'height': 24, 'width': 24}
  )
  processor.save_pretrained(tmp_path)
  path = str(tmp_path)
  tower = loading.load_tower(path, modality='image', dtype='float32')
  assert (tower.config.image_size, tower.preprocess.scaled) == (24, 40)
  expected = hf.image_states(model, _images(24))
  assert relative_error(states_of(tower, _images(24)), expected).max() <= 1e-4
  (tmp_path / 'preprocessor_config.json').rename(tmp_path / 'kept')
  usual = loading.describe_tower(path, modality='image').preprocess
  assert (usual.size, usual.scaled, usual.mean[0]) == (224, 256, 0.485)
  (tmp_path / 'kept').rename(tmp_path / 'preprocessor_config.json')
  small = loading.describe_tower(path, modality='image', resolution=16)
  assert (small.preprocess.size, small.preprocess.scaled) == (16, 27)
  own = loading.describe_tower(path, modality='image', resolution=24)
  assert own.identity == tower.identity
  assert small.identity['resolution'] == '16'
  assert small.identity['sha256'] != own.identity['sha256']
  with pytest.raises(UserError, match='resolution: 20, which patches of 8 .*such as 16, or 0 for'):
    loading.describe_tower(path, modality='image', resolution=20)


def test_int8_and_model_parallel(states_of, relative_error):
  path, image_bhwc = 'random:dinov2-with-registers-tiny', _images(56)
  whole = loading.load_tower(path, modality='image', dtype='float32')
  coded = loading.load_tower(path, modality='image', dtype='float32', quantization='int8')
  assert relative_error(states_of(coded, image_bhwc), states_of(whole, image_bhwc)).max() < 0.05
  config = default_config()
  config.mesh.data, config.mesh.model = 1, 3
  mesh = sharding.make_mesh(config)
  split = loading.load_tower(
    path, modality='image', dtype='float32', shardings=sharding.param_shardings(mesh)
  )
  for name in ('q_proj', 'o_proj', 'up_proj', 'down_proj'):
    kernel = split.params['layers'][name]['kernel']
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
  assert relative_error(states_of(split, image_bhwc), states_of(whole, image_bhwc)).max() < 1e-5


FULL_SIZE = {
  **dict.fromkeys(architectures.DINOV2, PLAIN),
  **dict.fromkeys(architectures.DINOV2_WITH_REGISTERS, REGISTERS),
  **dict.fromkeys(architectures.SIGLIP_VISION, SIGLIP),
  **dict.fromkeys(architectures.VIT, VIT),
  **dict.fromkeys(architectures.DINOV3, DINOV3),
}
# Parameters, in widths, that have no use here: the token of masked patches, a pooler.
UNUSED = {PLAIN: lambda d: d, REGISTERS: lambda d: d, VIT: lambda d: d * d + d, DINOV3: lambda d: d}


SMALL = ('dinov2-small', 'dinov2-with-registers-small', 'dinov3-vits16', 'siglip-tiny', 'vit-tiny')


def _slow_unless_small(name):
  return name if name in SMALL else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize('name', [_slow_unless_small(name) for name in FULL_SIZE])
def test_full_size_models_have_the_parameters_of_hugging_face(name):
  kind = FULL_SIZE[name]
  files = loading.open_files(f'random:{name}', modality='image')
  module = loading.make_module(files, dtype='bfloat16', attention='xla', heads=('pool',))
  boxed = loading.abstract_params(module)
  known = set(sharding.RULES)
  for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
    assert len(leaf.names) == leaf.value.ndim and known.issuperset(leaf.names)
  sizes = {k: v for k, v in files.config.items() if k != 'model_type'}
  with torch.device('meta'):
    theirs = getattr(transformers, kind)(getattr(transformers, kind[:-5] + 'Config')(**sizes))
  unused = UNUSED.get(kind, lambda d: 0)(files.config['hidden_size'])
  count = sum(x.size for x in jax.tree.leaves(nn.unbox(boxed)))
  assert count == sum(p.numel() for p in theirs.parameters()) - unused


@pytest.mark.parametrize('path', ['random:dinov3-tiny', 'random:siglip-tiny'])
def test_tokens_in_front_that_nobody_reads_change_nothing(relative_error, path):
  """What methods insert stands before the patches; rotary positions stay with these."""
  tower = loading.load_tower(path, modality='image', dtype='float32')

  def run(params, image_bhwc):
    bound = tower.module.bind({'params': params})
    hidden_bid = bound.embed(image_bhwc)
    alone, _ = bound.run(hidden_bid, start=0, stop=2)
    b, count = len(hidden_bid), hidden_bid.shape[1]
    more_bid = jnp.concatenate([jnp.ones((b, 3, hidden_bid.shape[2])), hidden_bid], axis=1)
    keys_bi = jnp.broadcast_to(jnp.arange(count + 3) >= 3, (b, count + 3))
    both, _ = bound.run(more_bid, start=0, stop=2, keys_bt=keys_bi)
    return alone, both[:, 3:], bound.pool(alone)

  alone, both, pooled_bd = jax.jit(run)(tower.params, _images(64))
  assert relative_error(both, alone).max() < 1e-5
  whole = alone[:, 0] if tower.config.class_token else alone.mean(axis=1)
  np.testing.assert_allclose(pooled_bd, whole, rtol=1e-5, atol=1e-6)


# Facts about files that are on the hub, every key as it is written there.
DINOV2_SMALL = {
  'apply_layernorm': True,
  'architectures': ['Dinov2Model'],
  'attention_probs_dropout_prob': 0.0,
  'drop_path_rate': 0.0,
  'hidden_act': 'gelu',
  'hidden_dropout_prob': 0.0,
  'hidden_size': 384,
  'image_size': 518,
  'initializer_range': 0.02,
  'layer_norm_eps': 1e-06,
  'layerscale_value': 1.0,
  'mlp_ratio': 4,
  'model_type': 'dinov2',
  'num_attention_heads': 6,
  'num_channels': 3,
  'num_hidden_layers': 12,
  'out_features': ['stage12'],
  'out_indices': [12],
  'patch_size': 14,
  'qkv_bias': True,
  'reshape_hidden_states': True,
  'stage_names': ['stem', *(f'stage{k}' for k in range(1, 13))],
  'torch_dtype': 'float32',
  'transformers_version': '4.32.0.dev0',
  'use_swiglu_ffn': False,
}
SIGLIP_BASE = {
  'architectures': ['SiglipModel'],
  'initializer_factor': 1.0,
  'model_type': 'siglip',
  'text_config': {'model_type': 'siglip_text_model'},
  'torch_dtype': 'float32',
  'transformers_version': '4.37.0.dev0',
  'vision_config': {'model_type': 'siglip_vision_model'},
}
SO400M = {
  **SIGLIP_BASE,
  'vision_config': {
    'hidden_size': 1152,
    'image_size': 384,
    'intermediate_size': 4304,
    'model_type': 'siglip_vision_model',
    'num_attention_heads': 16,
    'num_hidden_layers': 27,
    'patch_size': 14,
  },
}
VIT_BASE = {
  'architectures': ['ViTForImageClassification'],
  'attention_probs_dropout_prob': 0.0,
  'encoder_stride': 16,
  'hidden_act': 'gelu',
  'hidden_dropout_prob': 0.0,
  'hidden_size': 768,
  'id2label': {'0': 'tench, Tinca tinca'},
  'image_size': 224,
  'initializer_range': 0.02,
  'intermediate_size': 3072,
  'label2id': {'tench, Tinca tinca': 0},
  'layer_norm_eps': 1e-12,
  'model_type': 'vit',
  'num_attention_heads': 12,
  'num_channels': 3,
  'num_hidden_layers': 12,
  'patch_size': 16,
  'qkv_bias': True,
  'transformers_version': '4.13.0.dev0',
}
DINOV3_SMALL = {
  'architectures': ['DINOv3ViTModel'],
  'attention_dropout': 0.0,
  'drop_path_rate': 0.0,
  'dtype': 'float32',
  'hidden_act': 'gelu',
  'hidden_size': 384,
  'image_size': 224,
  'initializer_range': 0.02,
  'intermediate_size': 1536,
  'key_bias': False,
  'layer_norm_eps': 1e-05,
  'layerscale_value': 1.0,
  'mlp_bias': True,
  'model_type': 'dinov3_vit',
  'num_attention_heads': 6,
  'num_channels': 3,
  'num_hidden_layers': 12,
  'num_register_tokens': 4,
  'patch_size': 16,
  'pos_embed_jitter': None,
  'pos_embed_rescale': 2.0,
  'pos_embed_shift': None,
  'proj_bias': True,
  'query_bias': True,
  'rope_theta': 100.0,
  'transformers_version': '4.56.0.dev0',
  'use_gated_mlp': False,
  'value_bias': True,
}
GIANT = {
  **DINOV2_SMALL,
  'hidden_size': 1536,
  'num_attention_heads': 24,
  'num_hidden_layers': 40,
  'use_swiglu_ffn': True,
}
WITH_REGISTERS = {
  **DINOV2_SMALL,
  'architectures': ['Dinov2WithRegistersModel'],
  'model_type': 'dinov2_with_registers',
  'num_register_tokens': 4,
}
# Configuration -> (width, width of the MLP, tokens of an image of the pretraining).
PUBLISHED = {
  'DINOv2-S': (DINOV2_SMALL, (384, 1536, 1 + 37**2)),
  'DINOv2-g': (GIANT, (1536, 4096, 1 + 37**2)),
  'DINOv2-S, registers': (WITH_REGISTERS, (384, 1536, 5 + 37**2)),
  'SigLIP B/16': (SIGLIP_BASE, (768, 3072, 14**2)),
  'SigLIP so400m/14': (SO400M, (1152, 4304, 27**2)),
  'ViT-B/16': (VIT_BASE, (768, 3072, 1 + 14**2)),
  'DINOv3-S': (DINOV3_SMALL, (384, 1536, 5 + 14**2)),
}


def _read(config):
  return base.family_of(config, 'image', 'x').config.from_hf(config)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_configurations_open(name):
  config, expected = PUBLISHED[name]
  made = _read(config)
  assert (made.hidden_size, made.intermediate_size, made.num_tokens) == expected


@pytest.mark.parametrize('name', [PLAIN, REGISTERS, SIGLIP, VIT, DINOV3, 'SiglipModel'])
def test_all_that_transformers_writes_is_known(name):
  config = getattr(transformers, name.removesuffix('Model') + 'Config')()
  assert _read(config.to_dict()) == _read(json.loads(config.to_json_string()))


NO_SIZES = [-1, 10**11, 1.5, True, '8', [8], None, float('nan')]
SIZES = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'image_size', 'patch_size')
OWN_SIZES = {
  DINOV2_SMALL['model_type']: ('mlp_ratio',),
  WITH_REGISTERS['model_type']: ('num_register_tokens',),
  VIT_BASE['model_type']: ('intermediate_size',),
  DINOV3_SMALL['model_type']: ('intermediate_size', 'num_register_tokens'),
}
PLAINLY = {c['model_type']: c for c in (DINOV2_SMALL, WITH_REGISTERS, VIT_BASE, DINOV3_SMALL)}
PLAINLY['siglip_vision_model'] = SO400M['vision_config']


@pytest.mark.parametrize('name', PLAINLY)
def test_what_is_no_size_or_not_known_is_refused(name):
  for key in SIZES + OWN_SIZES.get(name, ()):
    for value in NO_SIZES:
      if key == 'mlp_ratio' and value == 1.5:
        continue
      with pytest.raises(UserError, match=key) as error:
        _read({**PLAINLY[name], key: value})
      assert '\n' not in str(error.value)
  for key in ('zzz', '', 'Hidden_size', 'num_experts'):
    with pytest.raises(UserError, match=f'has {key!r}, unknown here'):
      _read({**PLAINLY[name], key: None})


VALUES = st.sampled_from([None, True, 0, 1, 2, 3, 7, 1 << 20, -1, 0.5, 1e-9, 1e300, 'gelu', [], {}])


@given(st.data())
@settings(max_examples=200)
def test_any_values_give_a_configuration_or_one_line(data):
  config = dict(PLAINLY[data.draw(st.sampled_from(sorted(PLAINLY)))])
  for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
    config[key] = data.draw(VALUES)
  try:
    made = _read(config)
  except UserError as error:
    assert '\n' not in str(error)
    return
  assert made.intermediate_size >= 1 and made.hidden_size % made.num_heads == 0
  assert made.num_tokens > made.num_prefix_tokens >= 0


@pytest.mark.parametrize(
  'name, changes, says',
  [
    ('DINOv2-S', {'mlp_ratio': 1e-6}, 'mlp_ratio = 1e-06, which makes 0'),
    ('DINOv2-S', {'num_register_tokens': 4}, "'num_register_tokens', unknown here"),
    ('DINOv2-S', {'hidden_act': 'gelu_new'}, "hidden_act = 'gelu_new'"),
    ('DINOv2-S', {'num_channels': 1}, 'num_channels = 1'),
    ('DINOv2-S', {'image_size': [224, 448]}, 'image_size'),
    ('DINOv2-S', {'num_attention_heads': 7}, 'num_attention_heads = 7'),
    ('DINOv2-S', {'image_size': 8}, 'image_size = 8'),
    ('DINOv2-S', {'architectures': ['Dinov2ForDepth']}, 'architectures'),
    ('DINOv2-S', {'mlp_ratio': 0}, 'mlp_ratio = 0'),
    ('SigLIP B/16', {'vision_config': {'num_patches': 256}}, "vision_config has 'num_patches'"),
    ('SigLIP B/16', {'model_type': 'siglip2'}, 'siglip2.*siglip2-base-patch16-224'),
    ('ViT-B/16', {'use_mask_token': True}, "'use_mask_token', unknown here"),
    ('ViT-B/16', {'model_type': 'deit'}, 'second class token'),
    ('DINOv3-S', {'num_attention_heads': 64}, 'heads of width 6.*multiple of 4'),
    ('DINOv3-S', {'rope_theta': 0}, 'rope_theta = 0'),
  ],
)
def test_unimplemented_values_are_refused_by_name(name, changes, says):
  with pytest.raises(UserError, match=says) as error:
    _read({**PUBLISHED[name][0], **changes})
  assert '\n' not in str(error.value)
