"""Laws that every method of the table holds: strict absence, gradients where they belong, stored
features as good as live ones, hidden states of any layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from setups import Setup

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.methods import METHODS
from molt_jax.data.modalities import PATTERNS
from molt_jax.features.frozen import load_frozen
from molt_jax.methods.parts.ridge_kernels import Examples
from molt_jax.profiling.flops import decoder_flops, matmul_flops, vision_flops
from molt_jax.runtime import sharding

ROWS, TOKENS = 6, 5
PAIR = {'backbones.text.path': 'random:clip-text-tiny'}  # It shares a space with the image tower.
NAMED = ('mmrlpp', 'coop', 'cocoop')  # With class names, which need such a pair.
CASES = {name: {'method': name, **(PAIR if name in NAMED else {})} for name in METHODS} | {
  'mmbt': {
    'method': 'mmbt',
    'backbones.text.trainable': r'layers/3/(q|v)_proj/.*',
    'backbones.image.trainable': 'layers/5/.*_proj/kernel',
  },
  'molt, layers of its own': {'method': 'molt', 'molt.layers': 'image=0,3,-1;text=1:4'},
  'molt, trained upper layers': {
    'method': 'molt',
    'backbones.text.trainable': r'layers/3/.*_proj/.*|norm/scale',
    'backbones.image.trainable': 'layers/[45]/(q|v)_proj/kernel',
  },
  'late fusion, a whole tower trained': {
    'method': 'late_fusion',
    'backbones.image.trainable': '.*',
  },
}


def make_config(overrides):
  config = CLASSIFIER.default()
  config.dataset.path = 'unread'
  config.backbones.text.path = 'random:llama-tiny'
  config.backbones.image.path = 'random:clip-vit-tiny'
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.mesh.data, config.text.max_tokens, config.train.batch_size = 1, TOKENS, ROWS
  config.molt.width, config.classifier.hidden, config.classifier.dropout = 8, 8, 0.0
  config.cca.num_directions = 4
  config.prototypes.width = config.huse.width = config.albef.width = config.albef.space = 8
  config.albef.num_layers, config.albef.queue, config.albef.dropout = 1, 12, 0.0
  config.knn.examples = config.probe.landmarks = 48
  for section in (config.mmrl, config.mmrlpp):
    section.width, section.num_tokens = 8, 2
  config.pmf.hidden, config.maple.num_layers = 8, 2
  config.coop.num_tokens = config.cocoop.num_tokens = 2
  config.prompt_fuse.num_tokens, config.mmbt.cells = 2, 2
  config.map.num_layers, config.dcp.num_layers, config.dcp.num_tokens = 1, 2, 2
  config.update_from_flattened_dict(overrides)
  return CLASSIFIER.validate(config)


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  present = np.array([[1, 1], [1, 1], [1, 0], [0, 1], [1, 1], [0, 1]], bool)
  lengths = np.where(present[:, 1], rng.integers(1, TOKENS + 1, ROWS), 0)
  return {
    'image': rng.normal(size=(ROWS, 64, 64, 3)).astype(np.float32),
    'tokens': rng.integers(2, 200, (ROWS, TOKENS)).astype(np.int32),
    'token_mask': np.arange(TOKENS)[None] < lengths[:, None],
    'present': present,
    'label': rng.integers(0, 3, ROWS).astype(np.int32),
    'weight': np.ones(ROWS, np.float32),
  }


def fouled(batch):
  """The batch with NaN and foreign tokens where a modality is missing."""
  no_image, no_text = ~batch['present'].T
  return batch | {
    'image': np.where(no_image[:, None, None, None], np.float32(np.nan), batch['image']),
    'tokens': np.where(no_text[:, None], np.int32(7), batch['tokens']),
    'token_mask': batch['token_mask'] | no_text[:, None],
  }


class Case:
  """A method, its towers, a state; the optimiser's state is the gradient."""

  def __init__(self, overrides):
    tx = optax.chain(optax.trace(decay=0.0), optax.scale(-1e-2))
    self.setup = Setup(make_config(overrides), tx)
    self.frozen = self.setup.frozen()
    self.state = self.setup.begin(self.frozen)
    if self.setup.method.closed_form:
      self.state = self.state.replace(statistics=self._fitted())
    self.step = self.setup.step()
    self.answer = jax.jit(self._answer)

  def _fitted(self):
    """What is in closed form, fitted to a few batches."""
    method, made = self.setup.method, []
    inputs = jax.jit(lambda batch: method.fit_inputs(*self._read(batch)))
    for seed in range(1, 9):
      batch = make_batch(seed)
      target = np.eye(3, dtype=np.float32)[batch['label']]
      made.append((jax.device_get(inputs(batch)), batch['present'], target))
    examples = Examples(*jax.tree.map(lambda *x: np.concatenate(x), *made))
    statistics = dict(self.state.statistics)
    for name, own in method.fit(examples, examples).items():
      like = statistics[name]
      statistics[name] = jax.tree.map(lambda x, y: np.asarray(x, y.dtype), {**like, **own}, like)
    return statistics

  def _read(self, batch):
    return self.variables, self.frozen, self.setup.method.features(self.frozen, batch), batch

  def _answer(self, variables, frozen, batch, present_bm):
    method = self.setup.method
    features = method.features(frozen, batch)
    return method(variables, frozen, features, batch, present_bm).logits_bk

  def predict(self, variables, frozen, batch):
    """Logits in evaluation, for what is present."""
    return self.answer(variables, frozen, batch, batch['present'])

  @property
  def variables(self):
    return {'params': self.state.params, 'statistics': self.state.statistics}


@functools.cache
def case(name):
  return Case(CASES[name])


@pytest.mark.parametrize('name', CASES)
def test_content_of_a_missing_modality_changes_no_bit(name):
  c, batch = case(name), make_batch()
  clean = jax.device_get(c.step(c.state, c.frozen, batch))
  foul = jax.device_get(c.step(c.state, c.frozen, fouled(batch)))
  jax.tree.map(np.testing.assert_array_equal, foul, clean)
  logits = [c.predict(c.variables, c.frozen, b) for b in (batch, fouled(batch))]
  np.testing.assert_array_equal(*logits)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((clean[0].params, logits)))


@pytest.mark.parametrize('name', CASES)
def test_all_that_is_trained_has_a_gradient_and_three_steps_lower_the_loss(name):
  c, batch = case(name), make_batch()
  if not c.setup.method.is_trained:
    pytest.skip('nothing is trained')
  state, losses, alive = c.state, [], {}
  for _ in range(3):
    state, metrics = c.step(state, c.frozen, batch)
    losses.append(float(metrics['loss']))
    # Of a product that begins as zero, one factor has a gradient from the second step on.
    for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state[0].trace):
      name = jax.tree_util.keystr(path)
      alive[name] = alive.get(name, False) or bool(np.any(np.asarray(x)))
  # A bias under a softmax over keys, or a scale whose effect a later norm takes away.
  dead = [name for name, is_alive in alive.items() if not is_alive]
  assert [name for name in dead if 'kernel' in name or 'prompt' in name] == []
  assert losses[-1] < losses[0]


@pytest.mark.parametrize('name', CASES)
def test_stored_features_are_as_good_as_live_ones(name):
  c, batch = case(name), make_batch()
  reads = c.setup.method.reads
  if any(r.run_from == 0 and not r.states for r in reads.values()):
    pytest.skip('a tower that is run from its input on has no features')
  features = jax.jit(c.setup.method.features)(c.frozen, batch)
  stored = {k: v for k, v in batch.items() if k not in ('image', 'tokens')}
  for modality in ('image', 'text'):
    stored[f'{modality}_states'] = jnp.moveaxis(features.of(modality), 0, 1)
  live = c.predict(c.variables, c.frozen, batch)
  np.testing.assert_allclose(c.predict(c.variables, c.frozen, stored), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['pmf', 'mora', 'mmrl'])
def test_from_a_stored_state_only_the_layers_above_it_run(name):
  c, batch = case(name), make_batch()
  method = c.setup.method
  upper = load_frozen(c.setup.config, c.setup.mesh, method.reads, stored=True)
  below = 0
  for modality, reads in method.reads.items():
    config = method.modules[modality].config
    kept = {len(x) for x in jax.tree.leaves(upper[modality]['layers'])}
    assert kept == {config.num_layers - reads.lowest}
    lower = dataclasses.replace(config, num_layers=max(reads.states))
    sizes = (ROWS, TOKENS) if modality == 'text' else (ROWS,)
    below += {'text': decoder_flops, 'image': vision_flops}[modality](lower, *sizes)
  features = jax.eval_shape(method.features, c.frozen, batch)
  stored = {k: v for k, v in batch.items() if k not in ('image', 'tokens')}
  for modality in method.reads:
    states = features.of(modality)
    stored[f'{modality}_states'] = np.zeros(np.array(states.shape)[[1, 0, 2, 3]], states.dtype)
  # All layers that there are run live; what the features take is what is saved.
  live = matmul_flops(c.answer, c.variables, c.frozen, batch, batch['present'])
  from_store = matmul_flops(c.answer, c.variables, upper, stored, batch['present'])
  taken = matmul_flops(method.features, c.frozen, batch)
  assert from_store == live - taken and taken == below


@pytest.mark.parametrize('name', CASES)
def test_a_pattern_is_what_an_example_without_the_modality_gets(name):
  c, batch = case(name), make_batch()
  batch['present'][:], batch['token_mask'][:] = True, True
  for keep in PATTERNS:
    masked = batch | {'present': batch['present'] & keep}
    kept = c.answer(c.variables, c.frozen, batch, masked['present'])
    alone = c.predict(c.variables, c.frozen, masked)
    rounding = 1e-5 * max(1, np.abs(alone).max())
    np.testing.assert_allclose(kept, alone, rtol=0, atol=rounding)


@pytest.mark.slow  # Compiles every method once more.
@pytest.mark.parametrize('name', CASES)
def test_two_devices_compute_what_one_does(name):
  c, batch = case(name), make_batch()
  other = Setup(make_config(CASES[name] | {'mesh.data': 2}), c.setup.tx)
  frozen, put = other.frozen(), sharding.put_batch(batch, other.mesh)
  if c.setup.method.is_trained and not c.setup.method.closed_form:
    state, expected = c.step(c.state, c.frozen, batch)
    found_state, found = other.step()(other.begin(frozen), frozen, put)
    assert float(found['loss']) == pytest.approx(float(expected['loss']), rel=1e-5)
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(found_state.params), strict=True)
    for one, two in pairs:
      np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)
    return
  # It begins with statistics that are fitted: what they are fitted to, and what they answer.
  method, variables = other.method, jax.device_put(c.variables, sharding.replicated(other.mesh))
  passes = [
    jax.jit(lambda v, f, b, m=m: m.fit_inputs(v, f, m.features(f, b), b))
    for m in (c.setup.method, method)
  ]
  inputs = passes[0](c.variables, c.frozen, batch), passes[1](variables, frozen, put)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5), *inputs)
  answer = jax.jit(lambda v, f, b: other.logits(v, f, b))(variables, frozen, put)
  expected = c.predict(c.variables, c.frozen, batch)
  np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)


def test_trained_towers_begin_as_they_were_loaded():
  name = 'molt, trained upper layers'
  c, plain = case(name), Setup(make_config({'method': 'molt'}), optax.identity())
  same = jax.tree.map(lambda x: x, plain.state().params)
  variables = {'params': same, 'statistics': plain.state().statistics}
  batch = make_batch()
  expected = plain.logits(variables, plain.frozen(), batch)
  params = {**same, 'towers': c.state.params['towers']}
  found = c.predict({'params': params, 'statistics': c.state.statistics}, c.frozen, batch)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  paths = jax.tree_util.tree_leaves_with_path(c.state.params['towers'])
  names = {jax.tree_util.keystr(path) for path, _ in paths}
  assert len(names) == 7 + 1 + 4, names


def test_layers_name_the_states_that_are_read():
  method = case('molt, layers of its own').setup.method
  assert method.states == {'image': (0, 3, 6), 'text': (1, 2, 3)}
  assert {m: r.states for m, r in method.reads.items()} == method.states
