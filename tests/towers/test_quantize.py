"""Quantised towers against NumPy's rounding of the same matrices and Hugging Face's forward pass
with those.
"""

import copy
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from optional_torch import torch

from molt_jax.config import default_config
from molt_jax.errors import UserError
from molt_jax.runtime import sharding
from molt_jax.towers import loading, quantize
from molt_jax.towers.decoder import Decoder, DecoderConfig
from molt_jax.towers.hugging_face_files import HuggingFaceFiles

GROUP = 32


def matrices(params, path, shape):
  """(codes, scales, codes times scales) of int8 matrices as Hugging Face has them, [layers][out,
  in].
  """
  coded = params['layers'][path]['kernel']

  def turned(x):
    return np.swapaxes(
      np.broadcast_to(np.asarray(x, np.float32), coded.qvalue.shape).reshape(-1, *shape[::-1]), 1, 2
    )

  return turned(coded.qvalue), turned(coded.scale), turned(coded.qvalue) * turned(coded.scale)


def int4_error_bound(w_oi, group):
  """Half a level of 16 between the extremes (and zero) of each output and group of inputs, plus the
  zero point's and the scale's rounding.
  """
  w_ogi = w_oi.reshape(len(w_oi), -1, group)
  span_og = np.maximum(w_ogi.max(2), 0) - np.minimum(w_ogi.min(2), 0)
  return np.repeat(span_og / 15 * 1.1 + span_og * 2.0**-8, group, axis=1)


def dense_of(model, layer):
  """Our name -> Hugging Face's matrix of a layer."""
  if hasattr(model, 'layers'):
    one = model.layers[layer]
    parts = (one.self_attn, 'qkvo'), (one.mlp, ('gate', 'up', 'down'))
    return {
      f'{name}_proj': getattr(part, f'{name}_proj') for part, names in parts for name in names
    }
  one = model.encoder.layers[layer]
  return {
    'q_proj': one.self_attn.q_proj,
    'k_proj': one.self_attn.k_proj,
    'v_proj': one.self_attn.v_proj,
    'o_proj': one.self_attn.out_proj,
    'up_proj': one.mlp.fc1,
    'down_proj': one.mlp.fc2,
  }


@pytest.fixture(scope='module')
def saved(hf, tmp_path_factory):
  """Models with whole groups of 32 inputs, and where they are saved."""
  models = {
    'text': hf.llama(
      hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1
    ),
    'image': hf.clip(hidden_size=64),
  }
  return {
    kind: (model, hf.save(model, tmp_path_factory.mktemp(kind))) for kind, model in models.items()
  }


def load(path, kind, **options):
  return loading.load_tower(path, modality=kind, attention='xla', **{'dtype': 'float32', **options})


@pytest.fixture(scope='module')
def loaded(saved):
  return functools.cache(
    lambda kind, quantization: load(saved[kind][1], kind, quantization=quantization)
  )


@pytest.fixture(scope='module')
def inputs(batch):
  image_bhwc = np.random.default_rng(0).standard_normal((2, 20, 20, 3)).astype(np.float32)
  return {'text': batch, 'image': (image_bhwc,)}


@pytest.mark.parametrize('kind', ['text', 'image'])
def test_int8_matrices_are_rounded_and_the_tower_computes_with_them(
  hf, saved, loaded, states_of, relative_error, inputs, kind
):
  model, tower = copy.deepcopy(saved[kind][0]), loaded(kind, 'int8')
  for layer in range(3):
    for name, dense in dense_of(model, layer).items():
      w_oi = dense.weight.detach().numpy()
      codes_oi, scale_oi, coded_oi = (x[layer] for x in matrices(tower.params, name, w_oi.shape))
      np.testing.assert_allclose(
        scale_oi, np.broadcast_to(np.abs(w_oi).max(1, keepdims=True) / 127.5, w_oi.shape), rtol=1e-6
      )
      assert (
        np.abs(codes_oi).max() >= 127 and (np.abs(codes_oi - w_oi / scale_oi) < 0.5 + 1e-4).all()
      ), name
      dense.weight.data = torch.tensor(coded_oi)
  theirs = (
    hf.text_states(model, *inputs[kind])
    if kind == 'text'
    else hf.image_states(model, *inputs[kind])
  )
  mask_bt = inputs[kind][1] if kind == 'text' else None
  assert relative_error(states_of(tower, *inputs[kind]), theirs, mask_bt).max() < 1e-5


@pytest.mark.parametrize('kind', ['text', 'image'])
def test_int4_errs_by_half_a_level_of_its_group(saved, loaded, kind):
  model, _ = saved[kind]
  params = jax.jit(quantize.dequantize)(loaded(kind, 'int4').params)
  for name, dense in dense_of(model, 1).items():
    w_oi = dense.weight.detach().numpy()
    ours_oi = (
      np.asarray(params['layers'][name]['kernel'][1], np.float32).reshape(w_oi.shape[::-1]).T
    )
    group = np.gcd(
      w_oi.shape[1] // (model.config.num_attention_heads if name == 'o_proj' else 1), GROUP
    )
    error_oi = np.abs(ours_oi - w_oi)
    assert (error_oi <= int4_error_bound(w_oi, group)).all(), name
    assert error_oi.max() > np.abs(w_oi).max() / 100  # It is quantised at all.


@pytest.mark.parametrize('method, low, high', [('int8', 1e-3, 0.05), ('int4', 0.03, 0.5)])
def test_drift_of_hidden_states(loaded, states_of, inputs, method, low, high):
  tokens_bt, mask_bt = inputs['text']
  exact, coded = (
    np.asarray(states_of(loaded('text', q), tokens_bt, mask_bt)) for q in ('none', method)
  )
  drift = np.linalg.norm(coded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
  assert (drift[0] == 0).all() and low < drift[-1][mask_bt].mean() < high


@pytest.mark.parametrize('method, bits', [('int8', 8), ('int4', 4)])
def test_codes_take_the_bits_they_say(method, bits):
  module = loading.make_module(
    loading.open_files('random:llama-7b', modality='text'), dtype='bfloat16', attention='xla'
  )
  params = nn.unbox(quantize.abstract_params(loading.abstract_params(module), method))
  layers = jax.tree.leaves(params['layers'], is_leaf=quantize.is_quantized)
  coded = [leaf for leaf in layers if quantize.is_quantized(leaf)]
  assert len(coded) == 7 and sum(x.qvalue.size for x in coded) == 32 * (
    4 * 4096**2 + 3 * 4096 * 11008
  )
  extra = sum(
    y.size * y.dtype.itemsize * 8 if y.dtype != jnp.int4 else y.size * 4
    for x in coded
    for y in (x.scale, x.zero_point)
    if y is not None
  )
  assert extra / sum(x.qvalue.size for x in coded) < {8: 0.02, 4: 0.63}[bits]
  assert all(x.qvalue.dtype == method for x in coded)


def test_loading_never_holds_the_tower_in_full_precision(saved, monkeypatch):
  held, read = [], HuggingFaceFiles.read

  def watch(self, name, shape):
    held.append(sum(x.nbytes for x in jax.live_arrays()))
    return read(self, name, shape)

  monkeypatch.setattr(HuggingFaceFiles, 'read', watch)
  before = sum(x.nbytes for x in jax.live_arrays())
  tower = load(saved['text'][1], 'text', quantization='int8')
  final = sum(x.nbytes for x in jax.tree.leaves(tower.params))
  largest = 4 * 64 * 96
  assert max(held) - before <= final + 2 * largest
  assert final < 0.45 * sum(
    x.size * 4 for x in jax.tree.leaves(jax.eval_shape(quantize.dequantize, tower.params))
  )


@pytest.mark.parametrize('method', ['int8', 'int4'])
def test_codes_and_scales_split_over_devices(saved, loaded, states_of, inputs, method):
  config = default_config()
  config.mesh.data, config.mesh.model = 1, 2
  mesh = sharding.make_mesh(config)
  split = load(
    saved['text'][1], 'text', quantization=method, shardings=sharding.param_shardings(mesh)
  )
  for name, axis in (('up_proj', 2), ('down_proj', 1), ('o_proj', 1)):
    codes = split.params['layers'][name]['kernel'].qvalue
    assert (
      codes.sharding.spec[axis] == 'model'
      and codes.addressable_shards[0].data.shape[axis] * 2 == codes.shape[axis]
    )
  whole = loaded('text', method)
  for a, b in zip(jax.tree.leaves(split.params), jax.tree.leaves(whole.params), strict=True):
    np.testing.assert_array_equal(
      np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32)
    )
  np.testing.assert_allclose(
    states_of(split, *inputs['text']), states_of(whole, *inputs['text']), atol=2e-4
  )


def test_a_quantised_tower_is_another_tower(saved):
  path = saved['text'][1]
  plain, *coded = (
    loading.describe_tower(path, modality='text', quantization=q).identity
    for q in ('none', 'int8', 'int4')
  )
  assert 'quantization' not in plain and [x['quantization'] for x in coded] == ['int8', 'int4']
  assert len({x['sha256'] for x in (plain, *coded)}) == 3
  assert load(path, 'text', quantization='int8').identity == coded[0]


@pytest.mark.parametrize(
  'method, direction', [('int8', 'forward'), ('int8', 'backward'), ('int4', 'backward')]
)
def test_one_layer_at_a_time_is_scaled_back(method, direction):
  config = DecoderConfig.from_hf(
    {
      'vocab_size': 97,
      'hidden_size': 128,
      'intermediate_size': 384,
      'num_hidden_layers': 24,
      'num_attention_heads': 4,
    }
  )
  module = Decoder(config, jnp.dtype('float32'), 'xla')
  boxed = loading.abstract_params(module)
  params = nn.unbox(quantize.abstract_params(boxed, method))

  def run(params, h_btd, mask_bt):
    return module.apply({'params': params}, h_btd, mask_bt, start=0, stop=24, method='run')[0].sum()

  f = run if direction == 'forward' else jax.grad(run, argnums=1)
  memory = (
    jax.jit(f)
    .lower(
      params, jax.ShapeDtypeStruct((1, 4, 128), jnp.float32), jax.ShapeDtypeStruct((1, 4), bool)
    )
    .compile()
    .memory_analysis()
  )
  one_layer = sum(x.size * 4 for x in jax.tree.leaves(nn.unbox(boxed)['layers'])) / 24
  # XLA's CPU backend unpacks int4 to a byte each before the loop; other backends read it packed.
  unpacked = 24 * one_layer / 4 * (9 / 8) if method == 'int4' else 0
  assert memory.temp_size_in_bytes < unpacked + 2 * one_layer


def test_without_qwix_only_quantisation_is_refused(saved, monkeypatch, states_of, inputs):
  monkeypatch.setitem(sys.modules, 'qwix', None)
  states_of(load(saved['text'][1], 'text'), *inputs['text'])
  with pytest.raises(UserError, match='config.backbones.quantization: int8 needs the package qwix'):
    load(saved['text'][1], 'text', quantization='int8')
