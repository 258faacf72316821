"""DINOv2 against Hugging Face transformers, field by field, at other resolutions too."""

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
from optional_torch import needs_torch, torch

from molt_jax.config import default_config
from molt_jax.errors import UserError
from molt_jax.runtime import sharding
from molt_jax.towers import architectures, loading
from molt_jax.towers.dinov2 import Dinov2Config, Dinov2WithRegistersConfig
from molt_jax.towers.vision import VisionTransformer, positions

PLAIN, REGISTERS = 'Dinov2Model', 'Dinov2WithRegistersModel'
TINY = {'mlp_ratio': 2, 'num_hidden_layers': 2}
# What differs from the tiny model, and a wrong reading of it that must be seen.
CASES = {
  'plain': (PLAIN, {}, {'layer_scale': False}),
  'gelu_pytorch_tanh': (PLAIN, {'hidden_act': 'gelu_pytorch_tanh'}, {'hidden_act': 'quick_gelu'}),
  'layer_norm_eps': (PLAIN, {'layer_norm_eps': 0.1}, {'layer_norm_eps': 1e-6}),
  'mlp_ratio': (PLAIN, {'mlp_ratio': 3}, {}),
  'qkv_bias': (PLAIN, {'qkv_bias': False}, {}),
  'use_swiglu_ffn': (PLAIN, {'use_swiglu_ffn': True, 'mlp_ratio': 4}, {'hidden_act': 'gelu'}),
  'sizes': (
    PLAIN,
    {'hidden_size': 40, 'num_hidden_layers': 1, 'num_attention_heads': 5, 'image_size': 32},
    {},
  ),
  'registers': (REGISTERS, {}, {}),
  'num_register_tokens': (REGISTERS, {'num_register_tokens': 2, 'use_swiglu_ffn': True}, {}),
}


def _images(size):
  return np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)


def _load(hf, model, path, **how):
  """The tower, whose files ask for pictures of the size of the pretraining."""
  hf.save(model, path)
  size = model.config.image_size
  asked = {'image_processor_type': 'BitImageProcessor', 'size': size, 'crop_size': size}
  (path / 'preprocessor_config.json').write_text(json.dumps(asked))
  return loading.load_tower(str(path), modality='image', dtype='float32', heads=('pool',), **how)


def _outputs(tower, image_bhwc):
  """All hidden states, what is pooled of the last, its tokens after the final norm."""

  def run(params, image_bhwc):
    bound = tower.module.bind({'params': params})
    states = bound(image_bhwc, states=range(tower.config.num_layers + 1))
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
  assert relative_error(normed_bid, expected.last_hidden_state).max() <= 1e-4
  np.testing.assert_array_equal(pooled_bd, normed_bid[:, 0])
  np.testing.assert_allclose(pooled_bd, expected.pooler_output, rtol=1e-3, atol=1e-4)
  if wrong:
    module = tower.module.clone(config=dataclasses.replace(tower.config, **wrong))
    assert relative_error(states_of(tower, image_bhwc, module=module), states).max() > 1e-3


@pytest.mark.parametrize('name, resolution', [(PLAIN, 24), (PLAIN, 72), (REGISTERS, 24)])
def test_other_resolutions_are_those_of_hugging_face(
  hf, states_of, relative_error, tmp_path, name, resolution
):
  model = hf.vision(name, **TINY, image_size=40)
  image_bhwc = _images(resolution)
  expected = hf.image_states(model, image_bhwc)
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


@pytest.mark.parametrize('name', [*architectures.DINOV2, *architectures.DINOV2_WITH_REGISTERS])
def test_full_size_models_have_the_parameters_of_hugging_face(name):
  plain = name in architectures.DINOV2
  table = architectures.DINOV2 if plain else architectures.DINOV2_WITH_REGISTERS
  config = table[name]
  ours = (Dinov2Config if plain else Dinov2WithRegistersConfig).from_hf(config)
  module = VisionTransformer(ours, jnp.dtype('bfloat16'), 'xla', heads=('pool',))
  boxed = loading.abstract_params(module)
  known = set(sharding.RULES)
  for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
    assert len(leaf.names) == leaf.value.ndim and known.issuperset(leaf.names)
  kind = PLAIN if plain else REGISTERS
  sizes = {k: v for k, v in config.items() if k != 'model_type'}
  with torch.device('meta'):
    theirs = getattr(transformers, kind)(getattr(transformers, kind[:-5] + 'Config')(**sizes))
  unused = config['hidden_size']  # The token of masked patches.
  count = sum(x.size for x in jax.tree.leaves(nn.unbox(boxed)))
  assert count == sum(p.numel() for p in theirs.parameters()) - unused


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


def test_published_configurations_open():
  made = Dinov2Config.from_hf(DINOV2_SMALL)
  assert (made.hidden_size, made.grid, made.num_tokens) == (384, 37, 1370)
  giant = {**DINOV2_SMALL, 'hidden_size': 1536, 'num_attention_heads': 24, 'use_swiglu_ffn': True}
  assert Dinov2Config.from_hf(giant).intermediate_size == 4096
  registers = {**DINOV2_SMALL, 'model_type': 'dinov2_with_registers', 'num_register_tokens': 4}
  registers['architectures'] = ['Dinov2WithRegistersModel']
  assert Dinov2WithRegistersConfig.from_hf(registers).num_prefix_tokens == 5
  for kind, ours in (('Dinov2', Dinov2Config), ('Dinov2WithRegisters', Dinov2WithRegistersConfig)):
    ours.from_hf(getattr(transformers, f'{kind}Config')().to_dict())


@pytest.mark.parametrize(
  'changes, says',
  [
    ({'model_type': 'dinov2_with_registers'}, 'model_type'),
    ({'num_register_tokens': 4}, "'num_register_tokens', unknown here"),
    ({'hidden_act': 'gelu_new'}, "hidden_act = 'gelu_new'"),
    ({'num_channels': 1}, 'num_channels = 1'),
    ({'image_size': [224, 448]}, 'image_size'),
    ({'num_attention_heads': 7}, 'num_attention_heads = 7'),
    ({'image_size': 8}, 'image_size = 8'),
    ({'architectures': ['Dinov2ForDepth']}, 'architectures'),
    ({'mlp_ratio': 0}, 'mlp_ratio = 0'),
  ],
)
def test_unimplemented_values_are_refused_by_name(changes, says):
  with pytest.raises(UserError, match=says):
    Dinov2Config.from_hf({**DINOV2_SMALL, **changes})
