"""MoRA and LoRA: new weights against their formula in PyTorch's layout and float64, and the towers
that run on them.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from setups import Setup

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.methods import mora

ROWS, TOKENS = 3, 6


def make_setup(text='random:llama-tiny', **fields):
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', 'mora'
  config.backbones.text.path, config.backbones.image.path = text, 'random:clip-vit-tiny'
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.mesh.data, config.text.max_tokens, config.train.batch_size = 1, TOKENS, ROWS
  config.update_from_flattened_dict({f'mora.{name}': x for name, x in fields.items()})
  setup = Setup(CLASSIFIER.validate(config), optax.sgd(1e-2))
  frozen = setup.frozen()
  state = setup.begin(frozen)
  return setup, frozen, {'params': state.params, 'statistics': state.statistics}


def moved(variables, seed=0):
  """Variables some steps later."""
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), variables['params']
  )
  return {**variables, 'params': params}


def kernel(params, letter, layer):
  """W of a layer as PyTorch has it, float64[outputs, inputs]."""
  w = np.asarray(params['layers'][f'{letter}_proj']['kernel'][layer], np.float64)
  return w.reshape(len(w), -1).T


def by_formula(method, variables, frozen, modality, letter, layer):
  """W', columns normalised over outputs."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
  other = {'image': 'text', 'text': 'image'}[modality]
  w = kernel(frozen[modality], letter, layer - method.adapters.num_layers)
  own = w + method.scale * (p[f'{modality}_{letter}_down'] @ p[f'{modality}_{letter}_up'])[layer].T
  if not method.adapters.shared:
    return own

  def shared(factors):
    a, b = (np.asarray(factors[f'{m}_shared'][layer], np.float64) for m in (modality, other))
    return (a @ (b.T @ b) @ a.T)[:, : len(w)]

  start = shared(variables['statistics']) if method.from_pretrained else 0.0
  both = w + method.scale * (shared(p) - start).T
  total = 0.0
  for part, v in (('shared', both), ('own', own)):
    magnitude = p[f'{modality}_{letter}_{part}_share'][layer] * np.linalg.norm(w, axis=0)
    total += magnitude * v / np.linalg.norm(v, axis=0)
  return total


def make(kind='mora', targets='qkv', scale=0.1, start='pretrained'):
  """A method, weights of three layers of two towers, and new variables. The text tower has fewer
  heads of keys and values, so S is cut to their width.
  """
  widths = {'image': 12, 'text': 8}
  outputs = {'image': dict.fromkeys('qkv', 12), 'text': {'q': 8, 'k': 4, 'v': 4}}
  begins = start == 'pretrained'
  shared = {'shared': kind == 'mora', 'share': 0.5 if begins else 1.0}
  adapters = mora.Adapters(2, 3, targets, widths, outputs, num_classes=3, **shared)
  method = mora.MoRA(adapters, scale, begins, {}, {})
  rng, frozen = np.random.default_rng(0), {}
  for m, width in widths.items():
    layers = {}
    for letter, outs in outputs[m].items():
      kernel = rng.normal(size=(3, width, outs // 2, 2)).astype(np.float32)
      layers[f'{letter}_proj'] = {'kernel': jnp.asarray(kernel)}
    frozen[m] = {'layers': layers}
  return method, frozen, method.init(jax.random.key(0))


@pytest.mark.parametrize('kind', ['lora', 'mora'])
def test_new_weights_are_those_of_the_formula(kind):
  method, frozen, variables = make(kind)
  variables = moved(variables)
  for modality in ('image', 'text'):
    merged = method.merged(variables, frozen[modality], modality)
    for letter in 'qkv':
      for layer in range(2):
        expected = by_formula(method, variables, frozen, modality, letter, layer)
        found = kernel(merged, letter, layer - 2)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
      # The layer below stays as it is.
      old, new = (kernel(x, letter, 0) for x in (frozen[modality], merged))
      np.testing.assert_array_equal(old, new)


def test_lora_merged_is_lora_beside_the_weights():
  method, frozen, variables = make('lora')
  variables = moved(variables)
  x_bd = np.random.default_rng(1).normal(size=(5, 8))
  down, up = (np.asarray(variables['params'][f'text_q_{n}'][-1], float) for n in ('down', 'up'))
  beside = x_bd @ kernel(frozen['text'], 'q', -1).T + method.scale * (x_bd @ down) @ up
  merged = method.merged(variables, frozen['text'], 'text')
  np.testing.assert_allclose(x_bd @ kernel(merged, 'q', -1).T, beside, rtol=1e-4, atol=1e-5)


def test_the_towers_run_on_the_new_weights():
  """Against the whole towers, called with them as their own."""
  setup, frozen, variables = make_setup()
  variables = moved(variables)
  rng = np.random.default_rng(1)
  batch = {
    'image': rng.normal(size=(ROWS, 64, 64, 3)).astype(np.float32),
    'tokens': rng.integers(2, 200, (ROWS, TOKENS)).astype(np.int32),
    'token_mask': np.arange(TOKENS)[None] < np.array([6, 0, 3])[:, None],
    'present': np.array([[1, 1], [1, 0], [0, 1]], bool),
  }
  read = []
  for column, modality in enumerate(('image', 'text')):
    merged = setup.method.merged(variables, frozen[modality], modality)
    tower = setup.method.modules[modality].bind({'params': merged})
    inputs = (batch['image'],) if modality == 'image' else (batch['tokens'], batch['token_mask'])
    mask = None if modality == 'image' else batch['token_mask']
    pooled_bd = tower.pool(tower(*inputs, states=(-1,))[0], None, mask)
    read.append(np.where(batch['present'][:, column, None], pooled_bd, 0))
  head = jax.tree.map(np.asarray, variables['params']['head'])
  expected_bk = np.concatenate(read, axis=-1) @ head['kernel'] + head['bias']
  found_bk = jax.jit(setup.logits)(variables, frozen, batch)
  np.testing.assert_allclose(found_bk, expected_bk, rtol=1e-3, atol=1e-4)


def test_training_begins_with_the_pretrained_towers():
  def worst(method, frozen, variables):
    ratios = []
    for modality, weights in frozen.items():
      new = method.merged(variables, weights, modality)
      for letter in 'qkv':
        w, own = kernel(weights, letter, -1), kernel(new, letter, -1)
        ratios.append(np.linalg.norm(own - w) / np.linalg.norm(w))
    return max(ratios)

  method, frozen, variables = make()
  assert worst(method, frozen, variables) < 1e-6
  narrow = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), frozen)
  assert worst(method, narrow, variables) == 0
  still = dataclasses.replace(method, scale=0.0)  # W for any f_1 + f_2 = 1 and any factors.
  params = moved(variables)['params']
  for name in params:
    if name.endswith('own_share'):
      params[name] = 1 - params[name.replace('own', 'shared')]
  assert worst(still, frozen, {**variables, 'params': params}) < 1e-6
  assert worst(*make('lora')) == 0
  assert worst(*make(start='published', scale=0.001)) > 0.4


def test_parameters_of_the_published_size():
  """CLIP ViT-B/16, two layers, two projections each, rank 4: 61 thousand beside the classifier."""
  widths = {'image': 768, 'text': 512}
  outputs = {m: dict.fromkeys('qkv', d) for m, d in widths.items()}
  adapters = mora.Adapters(2, 4, 'qv', widths, outputs, shared=True, share=0.5, num_classes=23)
  params = jax.eval_shape(adapters.init, jax.random.key(0), jnp.zeros((1, 1280)))['params']
  head = params.pop('head')
  assert sum(x.size for x in jax.tree.leaves(params)) == 61_440
  assert sum(x.size for x in jax.tree.leaves(head)) == 1280 * 23 + 23


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'mora.num_layers': 5}, 'config.mora.num_layers'),
    ({'dataset.modalities': 'text'}, 'config.mora.kind'),
    ({'backbones.quantization': 'int8'}, 'config.backbones.quantization'),
  ],
)
def test_what_cannot_be_adapted_is_refused(fields, words):
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', 'mora'
  config.backbones.text.path = 'random:llama-tiny'
  config.backbones.image.path = 'random:clip-vit-tiny'
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=words):
    _ = Setup(config, optax.identity()).method


def test_projections_wider_than_their_tower_are_refused():
  config = CLASSIFIER.default()
  width = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=8))
  outputs = {m: {'q': 16, 'k': 8, 'v': 8} for m in ('image', 'text')}
  towers = dict.fromkeys(outputs, width)
  with pytest.raises(UserError, match='no wider than their tower, but q of the image tower'):
    mora._check_shared(config, towers, outputs)
