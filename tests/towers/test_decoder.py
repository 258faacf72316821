"""LLaMA as a text tower against Hugging Face transformers, field by field."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import linen as nn
from optional_torch import torch

from molt_jax.data import packing
from molt_jax.errors import UserError
from molt_jax.towers import architectures, loading
from molt_jax.towers.decoder import Decoder, DecoderConfig, Rope

LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 100.0,
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 100.0, 'factor': 3.0}
WIDE = {
  'vocab_size': 131,
  'hidden_size': 40,
  'intermediate_size': 24,
  'num_hidden_layers': 5,
  'num_attention_heads': 5,
  'num_key_value_heads': 5,
}


def plain_rope(theta):
  return Rope(tuple((theta ** (-np.arange(0, 8, 2) / 8)).tolist()))


# Overrides of the Hugging Face config -> a wrong value of ours that must break parity (none: a
# wrong value does not even load).
CASES = {
  'plain': ({}, {}),
  'rope_theta': (
    {'rope_parameters': {'rope_type': 'default', 'rope_theta': 100.0}},
    {'ropes': (plain_rope(10000.0),)},
  ),
  'linear_rope': ({'rope_parameters': LINEAR}, {'ropes': (plain_rope(100.0),)}),
  'llama3_rope': (
    {'rope_parameters': LLAMA3},
    {'ropes': (plain_rope(100.0),)},
  ),
  'multi_head': ({'num_key_value_heads': 4}, {}),
  'multi_query': ({'num_key_value_heads': 1}, {}),
  'head_dim': ({'head_dim': 6}, {}),
  'attention_bias': ({'attention_bias': True}, {'qkv_bias': False, 'out_bias': False}),
  'mlp_bias': ({'mlp_bias': True}, {'mlp_bias': False}),
  'rms_norm_eps': ({'rms_norm_eps': 0.1}, {'norm_eps': 1e-6}),
  'sizes': (WIDE, {}),
}


def apply(tower, method, *inputs, **options):
  return jax.jit(lambda p, *x: tower.module.apply({'params': p}, *x, **options, method=method))(
    tower.params, *inputs
  )


@pytest.fixture(scope='module')
def plain(hf, tower_of):
  model = hf.llama()
  return model, tower_of(model)


@pytest.mark.parametrize('overrides, wrong', CASES.values(), ids=CASES)
def test_every_layer_matches_hugging_face(
  hf, tower_of, states_of, relative_error, batch, overrides, wrong
):
  tokens_bt, mask_bt = batch
  model = hf.llama(**overrides)
  tower = tower_of(model)
  expected = hf.text_states(model, tokens_bt, mask_bt)
  assert relative_error(states_of(tower, tokens_bt, mask_bt), expected, mask_bt).max() <= 1e-4
  if wrong:
    module = tower.module.clone(config=dataclasses.replace(tower.config, **wrong))
    assert (
      relative_error(states_of(tower, tokens_bt, mask_bt, module=module), expected, mask_bt).max()
      > 1e-3
    )


def test_bfloat16_errs_no_more_than_hugging_face_does(
  hf, tower_of, states_of, relative_error, batch
):
  tokens_bt, mask_bt = batch
  model = hf.llama(initializer_range=0.1)
  tower = tower_of(model, dtype='bfloat16')
  assert {x.dtype for x in jax.tree.leaves(tower.params)} == {jnp.dtype('bfloat16')}
  exact = hf.text_states(model, tokens_bt, mask_bt)
  theirs = relative_error(
    hf.text_states(model.to(torch.bfloat16), tokens_bt, mask_bt), exact, mask_bt
  )
  ours = relative_error(states_of(tower, tokens_bt, mask_bt).astype(jnp.float32), exact, mask_bt)
  assert ours.max() <= max(2 * theirs.max(), 2**-7)


def test_fewer_states_are_the_last_ones(plain, states_of, batch):
  tower = plain[1]
  all_lbtd = states_of(tower, *batch)
  for n in (1, 3):
    np.testing.assert_allclose(
      apply(tower, None, *batch, states=range(-n, 0)), all_lbtd[-n:], rtol=1e-4, atol=1e-5
    )
  for n in (0, 5):
    with pytest.raises(UserError, match='from 0 to 3'):
      tower.module.apply({'params': tower.params}, *batch, states=range(-n, 0))


def test_more_tokens_than_positions_are_refused(plain):
  tower = plain[1]
  with pytest.raises(UserError, match='65 tokens.*64 positions.*text.max_tokens'):
    tower.module.apply(
      {'params': tower.params},
      jnp.zeros((1, 65), jnp.int32),
      jnp.ones((1, 65), bool),
      states=range(-1, 0),
    )


def test_padding_changes_no_valid_bit_and_empty_rows_stay_finite(plain, states_of, batch):
  tokens_bt, mask_bt = batch
  other_bt = np.where(mask_bt, tokens_bt, (tokens_bt + 17) % 97)
  first, second = (np.asarray(states_of(plain[1], t, mask_bt)) for t in (tokens_bt, other_bt))
  assert not np.array_equal(first, second)
  np.testing.assert_array_equal(first[:, mask_bt], second[:, mask_bt])
  assert np.isfinite(first).all() and np.isfinite(second).all()


@pytest.mark.parametrize('shards, size', [(1, 30), (2, 20)])
def test_packed_tokens_are_the_padded_ones(
  hf, plain, states_of, relative_error, batch, shards, size
):
  tokens_bt, mask_bt = batch
  model, tower = plain
  position_gn = packing.token_positions(
    mask_bt, packing.groups(len(mask_bt), (shards, 1)), size=size
  )['token_position']
  packed = apply(tower, None, tokens_bt, mask_bt, position_gn, states=range(-4, 0))
  assert relative_error(packed, hf.text_states(model, tokens_bt, mask_bt), mask_bt).max() <= 1e-4
  np.testing.assert_allclose(
    packed[:, mask_bt], states_of(tower, tokens_bt, mask_bt)[:, mask_bt], rtol=1e-5, atol=1e-5
  )
  assert np.isfinite(packed).all()


def test_runs_of_layers_compose(plain, states_of, batch):
  tower = plain[1]
  tokens_bt, mask_bt = batch
  expected = states_of(tower, tokens_bt, mask_bt)
  h_btd = apply(tower, 'embed', tokens_bt)
  np.testing.assert_array_equal(h_btd, expected[0])
  np.testing.assert_array_equal(apply(tower, 'run', h_btd, mask_bt, start=1, stop=1)[0], h_btd)
  for start, stop in ((0, 1), (1, 3)):
    h_btd, _ = apply(tower, 'run', h_btd, mask_bt, start=start, stop=stop)
  np.testing.assert_allclose(apply(tower, 'finish', h_btd), expected[-1], rtol=1e-5, atol=1e-5)


def test_tokens_can_be_inserted_between_layers(hf, plain, relative_error, batch):
  """Inserted in front: equal to Hugging Face's layers on the longer sequence; rotary positions
  matter only by their differences.
  """
  model, tower = plain
  tokens_bt, mask_bt = (x[:2] for x in batch)
  h_btd, _ = apply(tower, 'run', apply(tower, 'embed', tokens_bt), mask_bt, start=0, stop=1)
  h_btd = jnp.concatenate([jnp.full((2, 3, 32), 0.5), h_btd], axis=1)
  mask_bt = np.concatenate([np.ones((2, 3), bool), mask_bt], axis=1)
  out, _ = apply(tower, 'run', h_btd, mask_bt, start=1, stop=3)
  with torch.inference_mode():
    x = torch.tensor(np.asarray(h_btd))
    for layer in model.layers[1:]:
      x = layer(
        x, position_embeddings=model.rotary_emb(x, torch.arange(14)[None]), attention_mask=None
      )  # Causal; right padding needs no mask.
  assert relative_error(out[None], x.numpy()[None], mask_bt).max() <= 1e-4
  further_bt = np.arange(14)[None] + 20
  shifted, _ = apply(tower, 'run', h_btd, mask_bt, start=1, stop=3, positions_bt=further_bt)
  np.testing.assert_allclose(shifted, out, rtol=1e-3, atol=1e-3)


def test_gradient_reaches_inserted_tokens(hf, plain):
  model, tower = plain
  rng = np.random.default_rng(0)
  h_btd, weight_btd = (rng.standard_normal((2, 7, 32)).astype(np.float32) for _ in range(2))
  x = torch.tensor(h_btd, requires_grad=True)
  (model(inputs_embeds=x).last_hidden_state * torch.tensor(weight_btd)).sum().backward()

  def loss(h_btd):
    bound = tower.module.bind({'params': tower.params})
    return (
      bound.finish(bound.run(h_btd, jnp.ones((2, 7), bool), start=0, stop=3)[0]) * weight_btd
    ).sum()

  np.testing.assert_allclose(jax.jit(jax.grad(loss))(h_btd), x.grad.numpy(), rtol=1e-3, atol=1e-4)


def _deep(num_layers):
  config = {
    **architectures.LLAMA['llama-tiny'],
    'hidden_size': 128,
    'intermediate_size': 512,
    'num_hidden_layers': num_layers,
  }
  module = Decoder(DecoderConfig.from_hf(config), jnp.dtype('float32'), 'xla')
  return module, nn.unbox(loading.abstract_params(module))


@pytest.mark.parametrize('direction', ['forward', 'backward'])
def test_running_some_layers_copies_no_weights(direction):
  module, params = _deep(12)
  h_btd, mask_bt = (
    jax.ShapeDtypeStruct((1, 4, 128), jnp.float32),
    jax.ShapeDtypeStruct((1, 4), bool),
  )

  def run(params, h_btd, mask_bt):
    return module.apply({'params': params}, h_btd, mask_bt, start=2, stop=11, method='run')[0].sum()

  f = run if direction == 'forward' else jax.grad(run, argnums=1)
  memory = jax.jit(f).lower(params, h_btd, mask_bt).compile().memory_analysis()
  one_layer = sum(x.size * 4 for x in jax.tree.leaves(params['layers'])) / 12
  assert memory.temp_size_in_bytes < 3 * one_layer


def test_program_size_does_not_grow_with_depth(batch):
  def size(num_layers):
    module, params = _deep(num_layers)
    f = jax.jit(lambda p, t, m: module.apply({'params': p}, t, m, states=range(-2, 0)))
    return len(f.lower(params, *batch).as_text().splitlines())

  assert size(2) == size(40)


@pytest.mark.parametrize('name', ['llama-7b', 'llama-13b', 'llama-70b', 'smollm2-135m'])
def test_full_size_models_trace_without_weights(name):
  config = architectures.LLAMA[name]
  module = Decoder(DecoderConfig.from_hf(config), jnp.dtype('bfloat16'), 'xla')
  params = nn.unbox(loading.abstract_params(module))
  with torch.device('meta'):
    theirs = transformers.LlamaModel(
      transformers.LlamaConfig(**{k: v for k, v in config.items() if k != 'model_type'})
    )
  assert sum(x.size for x in jax.tree.leaves(params)) == sum(p.numel() for p in theirs.parameters())
  tokens_bt, mask_bt = jax.ShapeDtypeStruct((2, 9), jnp.int32), jax.ShapeDtypeStruct((2, 9), bool)
  out = jax.eval_shape(
    lambda p, t, m: module.apply({'params': p}, t, m, states=range(-4, 0)),
    params,
    tokens_bt,
    mask_bt,
  )
  assert out.shape == (4, 2, 9, config['hidden_size']) and out.dtype == jnp.bfloat16


def test_every_parameter_has_known_logical_axes(hf):
  config = DecoderConfig.from_hf(hf.llama(attention_bias=True, mlp_bias=True).config.to_dict())
  boxed = loading.abstract_params(Decoder(config, jnp.dtype('float32'), 'xla'))
  leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert all(
    isinstance(x, nn.LogicallyPartitioned) and len(x.names) == x.value.ndim for x in leaves
  )
  assert {n for x in leaves for n in x.names} == {
    'layers',
    'vocab',
    'embed',
    'heads',
    'kv_heads',
    'head_dim',
    'mlp',
  }


BASE = {
  'model_type': 'llama',
  'vocab_size': 8,
  'hidden_size': 8,
  'intermediate_size': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'max_position_embeddings': 128,
}


@pytest.mark.parametrize(
  'changes, says',
  [
    ({'model_type': 'mixtral'}, "model_type = 'mixtral'.*mistral"),
    ({'hidden_act': 'gelu'}, "hidden_act = 'gelu'.*'silu'"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'sliding_window': 16}, 'sliding_window = 16'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
    ({'rope_interleaved': True}, 'rope_interleaved'),
    (
      {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}},
      "rope_type = 'dynamic'.*'linear', 'llama3'",
    ),
    ({'rope_parameters': {'rope_type': 'longrope', 'factor': 2.0}}, "'longrope'"),
    ({'rope_scaling': {'rope_type': 'linear'}}, "'linear'.*factor"),
    (
      {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0, 'attention_factor': 1.2}},
      'attention_factor',
    ),
    ({'num_key_value_heads': 3}, 'num_key_value_heads = 3'),
    ({'num_attention_heads': 3}, 'num_attention_heads = 3'),
    ({'hidden_size': None}, 'lacks hidden_size'),
  ],
)
def test_unimplemented_values_are_refused_by_name(changes, says):
  with pytest.raises(UserError, match=says):
    DecoderConfig.from_hf({**BASE, **changes})


def test_old_and_new_rope_descriptions_read_alike():
  def read(**changes):
    return DecoderConfig.from_hf({**BASE, **changes})

  assert (
    read()
    == read(rope_theta=10000.0, rope_scaling=None)
    == read(rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0})
  )
  assert read(rope_theta=100.0, rope_scaling={'type': 'linear', 'factor': 3.0}) == read(
    rope_parameters=LINEAR
  )
  old = {k: v for k, v in LLAMA3.items() if k != 'rope_theta'}
  assert read(rope_theta=100.0, rope_scaling=old) == read(rope_parameters=LLAMA3)
