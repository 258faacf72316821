"""MAP and DCP: what their prompts are, by their formulas in float64, and each example run by hand
without padding; keys and values in front against tokens in front.
"""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from setups import Setup

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.methods import dcp
from molt_jax.methods import map as missing_aware
from molt_jax.methods.parts import cases
from molt_jax.towers import loading, stack

ROWS, TOKENS = 3, 6
LLAMA, BERT, CLIP = 'random:llama-tiny', 'random:bert-tiny', 'random:clip-text-tiny'


def make_setup(method, text, **fields):
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', method
  config.backbones.text.path, config.backbones.image.path = text, 'random:clip-vit-tiny'
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.mesh.data, config.text.max_tokens, config.train.batch_size = 1, TOKENS, ROWS
  config.classifier.hidden = 8
  config.dataset.modalities = fields.pop('modalities', 'image,text')
  shrunk = {'num_layers': 2, 'num_tokens': 2} | fields
  config.update_from_flattened_dict({f'{method}.{name}': x for name, x in shrunk.items()})
  setup = Setup(CLASSIFIER.validate(config), optax.sgd(1e-2))
  frozen = setup.frozen()
  return setup, frozen, {'params': setup.begin(frozen).params, 'statistics': {}}


def make_batch():
  """A complete example, an image alone, a text alone."""
  rng = np.random.default_rng(0)
  lengths = np.array([4, 0, 4])
  return {
    'image': rng.normal(size=(ROWS, 64, 64, 3)).astype(np.float32),
    'tokens': rng.integers(2, 200, (ROWS, TOKENS)).astype(np.int32),
    'token_mask': np.arange(TOKENS)[None] < lengths[:, None],
    'present': np.array([[1, 1], [1, 0], [0, 1]], bool),
    'label': np.zeros(ROWS, np.int32),
    'weight': np.ones(ROWS, np.float32),
  }


class Sequence:
  """One example's way through one tower, layer by layer, with tokens in front."""

  def __init__(self, setup, frozen, batch, row, modality):
    self.tower = setup.method.modules[modality].bind({'params': frozen[modality]})
    self.is_text, self.begin = modality == 'text', setup.method.begin[modality]
    self.front = jnp.zeros((0, self.tower.config.hidden_size))
    content = batch['image'][row]
    if self.is_text:
      content = jnp.asarray(batch['tokens'][row][batch['token_mask'][row]])
    own_td = self.tower.embed(content[None])[0]
    self.first, self.rest, self.layer = own_td[: self.begin], own_td[self.begin :], 0

  def run(self, **how):
    """Runs the next layer."""
    parts = self.first, self.front, self.rest
    h_pd = jnp.concatenate(parts)
    count, begin = len(self.front), self.begin
    if self.is_text:
      behind = range(begin, begin + len(self.rest))
      how['positions_bt'] = jnp.asarray([[*range(begin), *[0] * count, *behind]])
    mask = jnp.ones((1, len(h_pd)), bool)
    next_layer = {'start': self.layer, 'stop': self.layer + 1}
    h_pd = self.tower.run(h_pd[None], mask, **next_layer, **how)[0][0]
    self.first, self.front, self.rest = np.split(h_pd, [begin, begin + count])
    self.layer += 1

  def read(self):
    while self.layer < self.tower.config.num_layers:
      self.run()
    h_td = jnp.concatenate([self.first, self.rest])[None]
    mask = jnp.ones(h_td.shape[:2], bool)
    return np.asarray(self.tower.pool(self.tower.finish(h_td), None, mask)[0], np.float64)


def dense(params, x):
  return x @ np.asarray(params['kernel'], np.float64) + np.asarray(params['bias'], np.float64)


def gelu(x):
  return np.asarray(nn.gelu(jnp.asarray(x), approximate=False), np.float64)


def norm(params, x):
  centred = x - x.mean(-1, keepdims=True)
  unit = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-6)
  return unit * np.asarray(params['scale'], np.float64) + np.asarray(params['bias'], np.float64)


def read_of(setup, frozen, batch, row, run):
  """What the classifier reads of an example; `run` puts prompts into each tower."""
  parts = []
  for column, modality in enumerate(('image', 'text')):
    if modality not in setup.method.reads:
      continue
    alone = not batch['present'][row, 1 - column]
    if batch['present'][row, column]:
      sequence = Sequence(setup, frozen, batch, row, modality)
      run(sequence, modality, int(alone))
      parts.append(sequence.read())
    else:
      parts.append(np.zeros(setup.method.modules[modality].config.hidden_size))
  return np.concatenate(parts)


@pytest.mark.parametrize(
  ('placement', 'text', 'modalities'),
  [('input', LLAMA, 'text'), ('attention', CLIP, 'image,text')],
)
def test_map_adds_prompts_of_the_case_to_the_first_layers(placement, text, modalities):
  setup, frozen, variables = make_setup('map', text, placement=placement, modalities=modalities)
  batch, params = make_batch(), variables['params']
  batch['present'] &= [modalities != 'text', True]

  def run(sequence, modality, alone):
    for prompts_kd in params[f'{modality}_prompts'][alone]:
      if placement == 'input':
        sequence.front = jnp.concatenate([prompts_kd, sequence.front])
        sequence.run()
        continue
      heads = missing_aware.key_heads(sequence.tower.config)
      key, value = (x_d.reshape(1, 1, 1, *heads) for x_d in prompts_kd)
      sequence.run(additions={'prefix': (key, value)})

  found_bk = jax.jit(setup.logits)(variables, frozen, batch)
  x_d = read_of(setup, frozen, batch, 0, run)
  hidden = gelu(norm(params['norm'], dense(params['first'], x_d)))
  expected_k = dense(params['last'], hidden)
  np.testing.assert_allclose(found_bk[0], expected_k, rtol=1e-3, atol=5e-5)


def test_dcp_prompts_follow_from_layer_to_layer_and_look_at_the_input():
  setup, frozen, variables = make_setup('dcp', LLAMA)
  batch, params = make_batch(), jax.tree.map(np.asarray, variables['params'])

  def narrow(name, x):
    return dense(params[f'{name}_1'], gelu(dense(params[f'{name}_0'], x)))

  def run(sequence, modality, alone):
    case = (1 if modality == 'image' else 2) if alone else 0
    below = {m: params[f'{m}_prompts'][case].astype(np.float64) for m in ('image', 'text')}
    common = narrow(f'common_maps_{modality}', params['common_prompts'][case])
    looks = [params[f'looks_{modality}_{n}'] for n in range(4)]
    q_nd = dense(looks[0], params[f'{modality}_dynamic_prompts'][alone])
    own_td = np.concatenate([sequence.first, sequence.rest]).astype(np.float64)
    k_td, v_td = dense(looks[1], own_td), dense(looks[2], own_td)
    weights_nt = np.exp(q_nd @ k_td.T / np.sqrt(q_nd.shape[1]))
    weights_nt /= weights_nt.sum(-1, keepdims=True)
    dynamic = dense(looks[3], weights_nt @ v_td)
    flowing = jnp.asarray(np.concatenate([common, dynamic]), jnp.float32)
    for layer in range(2):
      both = np.concatenate([below['image'], below['text']], axis=-1)
      below = {
        m: narrow(f'maps_{m}_{layer}', norm(params[f'norms_{m}_{layer}'], both)) for m in below
      }
      new = jnp.asarray(below[modality], jnp.float32)
      sequence.front = jnp.concatenate([new, flowing])
      sequence.run()
      flowing = sequence.front[len(new) :]

  found_bk = jax.jit(setup.logits)(variables, frozen, batch)
  expected_k = dense(params['head'], read_of(setup, frozen, batch, 2, run))
  np.testing.assert_allclose(found_bk[2], expected_k, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize('train_dynamic', [True, False])
def test_queries_of_dynamic_prompts_are_trained_unless_it_is_as_published(train_dynamic):
  prompts = dcp.Prompts(1, 2, {'text': 16}, train_dynamic, 3)
  params = jax.jit(prompts.init)(jax.random.key(0))['params']
  h_btd = jax.random.normal(jax.random.key(1), (1, 4, 16))

  def loss(params):
    bound = prompts.bind({'params': params})
    return jnp.sum(jnp.square(bound.dynamic_prompts('text', jnp.zeros(1, int), h_btd, None)))

  gradient = jax.jit(jax.grad(loss))(params)
  assert np.any(np.asarray(gradient['text_dynamic_prompts'])) == train_dynamic
  assert np.any(np.asarray(gradient['looks_text_0']['kernel']))


@pytest.mark.parametrize('name', [LLAMA, 'random:gemma2-tiny', BERT, CLIP, 'random:clip-vit-tiny'])
def test_keys_and_values_in_front_are_tokens_in_front(name):
  """A layer on [a; x] leaves of x what it makes of x with the keys and values of a."""
  modality = 'image' if 'vit' in name else 'text'
  tower = loading.load_tower(name, modality=modality, dtype='float32')
  bound = tower.module.bind({'params': tower.params})
  rng, width = np.random.default_rng(0), tower.config.hidden_size
  a, x = (rng.normal(size=(2, n, width)).astype(np.float32) for n in (3, 5))
  both, lengths = jnp.concatenate([a, x], axis=1), np.array([5, 2])
  how = {'start': 0, 'stop': 1}
  rotated, own = {}, {}
  if modality == 'text':
    rotated = {'positions_bt': jnp.asarray([[0, 0, 0, *range(5)]])}
    own = {'positions_bt': jnp.arange(5)[None]}
  mask_bt = np.arange(5)[None] < lengths[:, None]
  whole_bt = np.concatenate([np.ones((2, 3), bool), mask_bt], axis=1)
  expected, _ = bound.run(both, whole_bt, **how, **rotated)
  seen = {}

  def keep(next_fun, args, kwargs, context):
    found = next_fun(*args, **kwargs)
    if context.module.name in ('k_proj', 'v_proj', 'k_norm'):
      seen[context.module.name[0]] = found
    return found

  layer = jax.tree.map(lambda x: x[0], stack.nn.unbox(tower.params['layers']))
  with nn.intercept_methods(keep):
    if modality == 'image' or name == CLIP:
      bound.layer.apply({'params': layer}, jnp.asarray(a))
    elif name == BERT:
      bound.layer.apply({'params': layer}, jnp.asarray(a), None)
    else:
      angles = bound._angles(jnp.zeros((1, 3)), which=0)
      bound.layer.apply({'params': layer}, jnp.asarray(a), angles, jnp.full(2, 3))
  prefix = {'prefix': (seen['k'][None], seen['v'][None])}
  found, _ = bound.run(jnp.asarray(x), mask_bt, **how, **own, additions=prefix)
  valid = mask_bt if modality == 'text' else np.ones_like(mask_bt)
  np.testing.assert_allclose(
    np.asarray(found)[valid], np.asarray(expected)[:, 3:][valid], rtol=2e-5, atol=2e-5
  )


def test_parameters_of_a_clip_pair():
  """MAP: a set for complete examples and one for each tower's own; the original has three sets of
  221,184 in all for one tower. DCP: beside the queries, 5.8 million, as published.
  """
  widths = {'image': 768, 'text': 512}
  prompts = missing_aware.Prompts(6, 16, widths, widths, 512, 23)
  params = jax.eval_shape(prompts.init, jax.random.key(0), jnp.zeros((1, 1280)))['params']
  found = sum(params[f'{m}_prompts'].size for m in widths)
  assert found == 2 * 6 * 16 * (768 + 512)
  prompts = dcp.Prompts(6, 12, widths, True, 23)
  params = jax.eval_shape(prompts.init, jax.random.key(0))['params']
  maps = sum(2 * 1280 + (1280 * 80 + 80) + (80 * d + d) for d in widths.values())
  common = sum((512 * 32 + 32) + (32 * d + d) for d in widths.values())
  attention = sum(4 * (d * d + d) for d in widths.values())
  queries = 2 * 12 * 1280
  prompts = 3 * 12 * (1280 + 512)
  head = 1280 * 23 + 23
  total = 6 * maps + common + attention + queries + prompts + head
  assert sum(x.size for x in jax.tree.leaves(params)) == total
  # Published beside it: two norms and the projection of the image; without queries and head.
  assert round((total - queries - head + 2 * (768 + 512) + 768 * 512) / 1e6, 1) == 5.8


def test_prompts_are_in_six_layers_or_in_all_of_the_shallower_tower():
  towers = {}
  for name, depth in (('image', 12), ('text', 30)):
    architecture = types.SimpleNamespace(num_layers=depth)
    towers[name] = types.SimpleNamespace(config=architecture)
  assert cases.layers_with_prompts('map.num_layers', 0, towers) == 6
  assert cases.layers_with_prompts('map.num_layers', 12, towers) == 12
  towers['image'].config.num_layers = 4
  assert cases.layers_with_prompts('map.num_layers', 0, towers) == 4


@pytest.mark.parametrize(
  ('method', 'fields', 'words'),
  [
    ('map', {'num_layers': 5}, 'config.map.num_layers: 5, but the text tower has 4'),
    ('dcp', {'num_layers': 5}, 'config.dcp.num_layers: 5, but the text tower has 4'),
    ('map', {'placement': 'attention', 'num_tokens': 3}, 'give an even number'),
  ],
)
def test_what_cannot_be_prompted_is_refused(method, fields, words):
  with pytest.raises(UserError, match=words):
    make_setup(method, LLAMA, **fields)
