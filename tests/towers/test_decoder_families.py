"""Decoders of every family against Hugging Face transformers, field by field."""

import jax
import numpy as np
import pytest
import transformers
from decoders import MODELS, SIZES, hidden_states, make
from flax import linen as nn
from optional_torch import needs_torch

from molt_jax.data import packing
from molt_jax.errors import UserError
from molt_jax.runtime import sharding
from molt_jax.towers import base, loading, quantize
from molt_jax.towers.decoder import Decoder, DecoderConfig

pytestmark = needs_torch

YARN = {
  'rope_type': 'yarn',
  'rope_theta': 100.0,
  'factor': 4.0,
  'original_max_position_embeddings': 16,
}
LONGROPE = {
  'rope_type': 'longrope',
  'rope_theta': 100.0,
  'short_factor': [1.0, 1.5, 2.0, 3.0],
  'long_factor': [1.0, 4.0, 9.0, 16.0],
}
TYPES = ['full_attention', 'sliding_attention', 'full_attention']
WINDOWS = {'use_sliding_window': True, 'sliding_window': 3, 'max_window_layers': 1}
# (family, fields of its config.json, other values of them that must give other states).
CASES = {
  'mistral': ('mistral', {}, {}),
  'mistral, window': ('mistral', {'sliding_window': 4}, {'sliding_window': None}),
  'mistral, width of heads': ('mistral', {'head_dim': 6}, {}),
  'qwen2': ('qwen2', {}, {}),
  'qwen2, windows above': ('qwen2', WINDOWS, {'max_window_layers': 2}),
  'qwen2, yarn': ('qwen2', {'rope_parameters': YARN}, {'rope_parameters': {**YARN, 'factor': 2.0}}),
  'qwen3': ('qwen3', {}, {}),
  'qwen3, biases and yarn': (
    'qwen3',
    {
      'attention_bias': True,
      'rope_parameters': {
        **YARN,
        'beta_fast': 4.0,
        'beta_slow': 0.5,
        'mscale': 2.0,
        'mscale_all_dim': 1.0,
        'truncate': False,
      },
    },
    {'rope_parameters': {**YARN, 'beta_fast': 4.0, 'beta_slow': 0.5, 'attention_factor': 1.0}},
  ),
  'qwen3, layer types': (
    'qwen3',
    {**WINDOWS, 'layer_types': TYPES},
    {'layer_types': TYPES[1:] + TYPES[:1]},
  ),
  'gemma2': ('gemma2', {'attn_logit_softcapping': 2.0}, {'attn_logit_softcapping': 3.0}),
  'gemma2, no cap, biases': (
    'gemma2',
    {'attn_logit_softcapping': None, 'attention_bias': True, 'query_pre_attn_scalar': 20},
    {'query_pre_attn_scalar': 8},
  ),
  'gemma2, wide windows': ('gemma2', {'sliding_window': 6}, {'sliding_window': 3}),
  'gemma3': ('gemma3_text', {}, {'sliding_window': 4}),
  'gemma3, ropes': (
    'gemma3_text',
    {
      'rope_parameters': {
        'full_attention': {'rope_type': 'linear', 'rope_theta': 1000.0, 'factor': 4.0},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 10.0},
      },
    },
    {'rope_parameters': {'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0}}},
  ),
  'gemma3, both ways': (
    'gemma3_text',
    {'use_bidirectional_attention': True, 'sliding_window': 4, 'hidden_activation': 'gelu'},
    {'use_bidirectional_attention': False},
  ),
  'opt': ('opt', {}, {}),
  'opt, norm after': (
    'opt',
    {'do_layer_norm_before': False, 'word_embed_proj_dim': 20},
    {},
  ),
  'opt, no weights': (
    'opt',
    {
      'enable_bias': False,
      'layer_norm_elementwise_affine': False,
      'activation_function': 'gelu',
      '_remove_final_layer_norm': True,
    },
    {'activation_function': 'relu'},
  ),
  'phi3': ('phi3', {}, {}),
  'phi3, window, part rotated': (
    'phi3',
    {
      'sliding_window': 4,
      'rope_parameters': {
        'rope_type': 'default',
        'rope_theta': 100.0,
        'partial_rotary_factor': 0.75,
      },
    },
    {'sliding_window': 3},
  ),
  'phi3, longrope': (
    'phi3',
    {'rope_parameters': LONGROPE, 'original_max_position_embeddings': 16},
    {'rope_parameters': {**LONGROPE, 'attention_factor': 1.0}},
  ),
  'smollm3': ('smollm3', {}, {'no_rope_layers': [1, 1, 1]}),
  'smollm3, windows': (
    'smollm3',
    {**WINDOWS, 'no_rope_layers': [0, 1, 0], 'attention_bias': True, 'mlp_bias': True},
    {'no_rope_layers': [0, 1, 1]},
  ),
}


@pytest.mark.parametrize('case', CASES)
def test_every_layer_matches_hugging_face(case, tower_of, states_of, relative_error, batch):
  family, fields, others = CASES[case]
  tokens_bt, mask_bt = batch[0][:3], batch[1][:3]
  model = make(family, fields)
  expected = hidden_states(model, tokens_bt, mask_bt)
  tower = tower_of(model)
  assert tower.family.name == family
  assert relative_error(states_of(tower, tokens_bt, mask_bt), expected, mask_bt).max() <= 1e-4
  if others:
    other = hidden_states(make(family, {**fields, **others}), tokens_bt, mask_bt)
    assert relative_error(other, expected, mask_bt).max() > 1e-3


@pytest.mark.parametrize('case', ['mistral, window', 'gemma2', 'gemma3', 'opt', 'smollm3, windows'])
def test_packed_texts_have_the_states_of_padded_ones(
  case, tower_of, states_of, relative_error, batch
):
  """Windows and positions count within a text, wherever it lies among the others."""
  tokens_bt, mask_bt = batch
  tower = tower_of(make(*CASES[case][:2]))
  group = packing.groups(len(mask_bt), (1, 1))
  position_gn = packing.token_positions(mask_bt, group, size=30)['token_position']
  padded = states_of(tower, tokens_bt, mask_bt)
  packed = states_of(tower, tokens_bt, mask_bt, position_gn)
  assert relative_error(packed, padded, mask_bt).max() <= 1e-5
  if case == 'gemma2':  # Nor does padding reach a text.
    other_bt = np.where(mask_bt, tokens_bt, (tokens_bt + 17) % 97)
    other = states_of(tower, other_bt, mask_bt)
    np.testing.assert_array_equal(other[:, mask_bt], padded[:, mask_bt])
    assert np.isfinite(padded).all()


@pytest.mark.parametrize('case', ['gemma3', 'smollm3, windows'])
def test_layers_keep_what_is_their_own_wherever_a_run_begins(case, tower_of, batch):
  """The upper layers run alone, loaded without the lower ones, with a hook before each."""
  tokens_bt, mask_bt = batch[0][:2], batch[1][:2]
  model = make(*CASES[case][:2])
  tower = tower_of(model)
  path, how = tower.identity['path'], {'dtype': 'float32', 'attention': 'xla'}
  upper = loading.load_tower(path, modality='text', first_layer=1, **how)
  assert 'embedding' not in upper.params

  @jax.jit
  def run(params, upper_params):
    bound = tower.module.bind({'params': params})
    whole = bound(tokens_bt, mask_bt, states=(1, 3))
    bound = upper.module.bind({'params': upper_params})
    shift = jax.numpy.zeros((2, 1))
    hook = {'before': lambda h_btd, insert: h_btd + insert[0], 'inserts': shift}
    last, _ = bound.run(whole[0], mask_bt, start=1, stop=3, **hook)
    return whole[1], bound.finish(last)

  whole, upper_last = run(tower.params, upper.params)
  np.testing.assert_allclose(upper_last[mask_bt], whole[mask_bt], rtol=1e-4, atol=1e-5)


def test_the_text_model_of_gemma_3_is_read_of_the_whole(hf, states_of, relative_error, tmp_path):
  text = make('gemma3_text')
  vision = {'hidden_size': 16, 'intermediate_size': 16, 'num_hidden_layers': 1, 'image_size': 28}
  vision |= {'num_attention_heads': 2, 'patch_size': 14}
  config = transformers.Gemma3Config(text_config=text.config.to_dict(), vision_config=vision)
  whole = transformers.Gemma3ForConditionalGeneration(config)
  whole.model.language_model.load_state_dict(text.state_dict())
  path = hf.save(whole, tmp_path)
  tower = loading.load_tower(path, modality='text', dtype='float32', attention='xla')
  assert tower.family.name == 'gemma3_text'
  tokens_bt, mask_bt = np.arange(5)[None], np.ones((1, 5), bool)
  expected = hidden_states(text, tokens_bt, mask_bt)
  assert relative_error(states_of(tower, tokens_bt, mask_bt), expected).max() <= 1e-4


def test_tensors_that_are_several_in_one_are_refused_by_name(hf, tmp_path):
  path = hf.save(make('phi3'), tmp_path)
  config = tmp_path / 'config.json'
  config.write_text(
    config.read_text().replace('"num_key_value_heads": 2', '"num_key_value_heads": 4')
  )
  with pytest.raises(UserError, match='layers.0.self_attn.qkv_proj.weight has 64 rows.*of 96'):
    loading.describe_tower(path, modality='text')


@pytest.fixture(scope='module')
def named():
  """Abstract parameters of the smallest named architecture of each family, boxed."""
  found = {}
  for row in base.FAMILIES:
    if row.module is Decoder:
      name = next(name for name in row.architectures if name.endswith('-tiny'))
      files = loading.open_files(f'random:{name}', modality='text')
      assert files.tokenizer().encode('red', 8)
      found[row.name] = loading.abstract_params(
        loading.make_module(files, dtype='float32', attention='xla')
      )
  assert set(found) == {'llama', *MODELS}
  return found


def test_parameters_are_split_over_devices_by_their_names(named):
  for family, boxed in named.items():
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for leaf in leaves:
      assert len(leaf.names) == leaf.value.ndim and set(leaf.names) <= set(sharding.RULES), family
    split = {n for leaf in leaves for n in leaf.names if sharding.RULES[n] == 'model'}
    assert split == {'vocab', 'heads', 'kv_heads', 'mlp'}, family


def test_all_matrices_of_the_layers_are_quantised(named, tower_of, states_of, batch):
  for family, boxed in named.items():
    found = {path.split('/')[1] for path in quantize.plan(boxed, 'int8')}
    gate = set() if family == 'opt' else {'gate_proj'}
    assert found == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj'} | gate, family
  tokens_bt, mask_bt = batch
  exact = tower_of(make('gemma3_text'))
  how = {'dtype': 'float32', 'attention': 'xla', 'quantization': 'int8'}
  coarse = loading.load_tower(exact.identity['path'], modality='text', **how)
  one, two = (np.asarray(states_of(t, tokens_bt, mask_bt))[:, mask_bt] for t in (exact, coarse))
  drift = np.linalg.norm(one - two, axis=-1) / np.linalg.norm(one, axis=-1)
  assert 1e-4 < np.median(drift[-1]) < 0.05


BASE = {**SIZES, 'num_hidden_layers': 2}


@pytest.mark.parametrize(
  'family, changes, says',
  [
    ('mistral', {'layer_types': ['full_attention'] * 2}, 'layer_types'),
    ('mistral', {'num_local_experts': 8}, "'num_local_experts', unknown"),
    ('qwen2', {'use_mrope': True}, 'use_mrope = True'),
    ('qwen2', {'layer_types': TYPES[:2]}, 'no sliding_window in use'),
    ('qwen2', {**WINDOWS, 'layer_types': TYPES}, '3 layer_types for num_hidden_layers = 2'),
    ('qwen2', {'is_causal': False}, 'is_causal = False'),
    ('qwen3', {'num_experts': 8}, "'num_experts', unknown"),
    ('qwen3', {'head_dim': 7}, 'heads of width 7'),
    ('gemma2', {'hidden_activation': 'silu'}, "hidden_activation = 'silu'"),
    ('gemma2', {'use_bidirectional_attention': True}, 'use_bidirectional_attention'),
    ('gemma3_text', {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping'),
    ('gemma3_text', {'rope_parameters': {'rope_type': 'default'}}, 'full_attention'),
    ('gemma3_text', {'sliding_window_pattern': 0}, 'sliding_window_pattern = 0'),
    ('opt', {'ffn_dim': None}, 'lacks ffn_dim'),
    ('opt', {'ffn_dim': 8, 'activation_function': 'swish'}, "activation_function = 'swish'"),
    ('phi3', {'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "'linear'.*longrope"),
    ('phi3', {'rope_scaling': {**LONGROPE, 'long_factor': [1.0]}}, '1 numbers in long_factor'),
    ('phi3', {'partial_rotary_factor': 0.4}, 'rotates 3 channels'),
    ('smollm3', {'no_rope_layers': [1]}, '1 no_rope_layers for num_hidden_layers = 2'),
    ('smollm3', {'no_rope_layer_interval': 0}, 'no_rope_layer_interval = 0'),
    ('mixtral', {}, "model_type = 'mixtral'"),
    ('gemma3n_text', {}, "model_type = 'gemma3n_text'"),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(family, changes, says):
  fields = {k: v for k, v in BASE.items() if family != 'opt' or k in MODELS['opt'][1]}
  with pytest.raises(UserError, match=says) as error:
    DecoderConfig.from_hf({'model_type': family, **fields, **changes})
  assert '\n' not in str(error.value)


def test_older_names_and_places_of_rotations_are_read_alike():
  def read(family, **changes):
    return DecoderConfig.from_hf({'model_type': family, **BASE, **changes})

  plain = {k: v for k, v in LONGROPE.items() if k not in ('rope_type', 'rope_theta')}
  old = {'original_max_position_embeddings': 16, 'rope_theta': 100.0}
  expected = read('phi3', **old, rope_parameters=LONGROPE)
  assert expected.max_positions == 16 and expected.ropes[0].amplitude > 1
  for kind in ('su', 'yarn', 'longrope'):
    assert read('phi3', **old, rope_scaling={'type': kind, **plain}) == expected
  linear = {'rope_type': 'linear', 'factor': 8.0}
  new = {
    'full_attention': {**linear, 'rope_theta': 1e6},
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
  }
  assert read('gemma3_text', rope_scaling=linear) == read('gemma3_text', rope_parameters=new)
  assert read('gemma3_text', rope_scaling=linear) != read('gemma3_text')


def test_longer_texts_than_longrope_was_pretrained_on_are_refused():
  config = {**BASE, 'model_type': 'phi3', 'rope_parameters': LONGROPE}
  read = DecoderConfig.from_hf({**config, 'original_max_position_embeddings': 16})
  module = Decoder(read, jax.numpy.dtype('float32'), 'xla')
  with pytest.raises(UserError, match='17 tokens for a phi3 tower with 16 positions'):
    module.check_length(17)
