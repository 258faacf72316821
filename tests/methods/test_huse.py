"""HUSE: its losses against float64, its shared classifier, what class names are to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from setups import Setup

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.methods import huse
from molt_jax.methods.base import Training

ROWS, TOKENS, WIDTH = 6, 5, 5


def make_config(**overrides):
  config = CLASSIFIER.default()
  config.dataset.path, config.method = 'unread', 'huse'
  config.backbones.text.path, config.backbones.image.path = (
    'random:llama-tiny',
    'random:clip-vit-tiny',
  )
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.mesh.data, config.text.max_tokens, config.train.batch_size = 1, TOKENS, ROWS
  config.huse.width, config.huse.dropout = 8, 0.0
  config.update_from_flattened_dict(overrides)
  return CLASSIFIER.validate(config)


def make_batch(present):
  """Six examples with these modalities."""
  rng = np.random.default_rng(0)
  return {
    'image_states': rng.normal(size=(ROWS, 1, 3, 192)).astype(np.float32),
    'text_states': rng.normal(size=(ROWS, 1, TOKENS, 64)).astype(np.float32),
    'token_mask': np.tile(np.array(present)[:, 1:], (1, TOKENS)),
    'present': np.array(present),
    'label': rng.integers(0, 3, ROWS).astype(np.int32),
    'weight': np.ones(ROWS, np.float32),
  }


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_semantic_loss_is_that_of_a_loop_in_float64():
  rng = np.random.default_rng(0)
  z_bc, names_bd = unit(rng.normal(size=(ROWS, WIDTH))), unit(rng.normal(size=(ROWS, 4)))
  counted_b = np.array([True, True, False, True, True, True])
  total, count = 0.0, 0
  for m in np.flatnonzero(counted_b):
    for n in np.flatnonzero(counted_b):
      own, wanted = 1 - z_bc[m] @ z_bc[n], 1 - names_bd[m] @ names_bd[n]
      total += (own - wanted) ** 2 * (min(own, wanted) <= 0.5)
      count += 1
  z_bc[2] = np.nan
  found = huse.semantic(jnp.float32(z_bc), jnp.float32(names_bd), counted_b, margin=0.5)
  np.testing.assert_allclose(found, total / count, rtol=1e-5)
  slope = jax.jit(
    jax.grad(lambda z: huse.semantic(z, jnp.float32(names_bd), counted_b, margin=0.5))
  )
  assert np.all(np.isfinite(slope(jnp.float32(np.where(counted_b[:, None], z_bc, 0)))))


@pytest.fixture(scope='module')
def made():
  """(setup, frozen towers, the state that a run begins with, a compiled call)."""
  setup = Setup(make_config(), optax.identity(), ('red', 'dark red', 'dog'))
  frozen = setup.frozen()
  state = setup.begin(frozen)
  variables = {'params': state.params, 'statistics': state.statistics}

  def call(batch, training):
    features = setup.method.features({}, batch)
    how = Training({'dropout': jax.random.key(0)}, update=False) if training else None
    return setup.method(variables, {}, features, batch, batch['present'], how)

  return setup, frozen, state, jax.jit(call, static_argnums=1)


def outputs(made, batch, training=False):
  return made[-1](batch, training)


def test_probabilities_are_the_mean_of_those_of_both_modalities(made):
  batch = make_batch([[True, True]] * ROWS)
  keep = functools.partial(np.tile, reps=(6, 1))
  both, image, text = (
    np.exp(outputs(made, batch | {'present': keep(np.array(m))}).logits_bk)
    for m in ([True, True], [True, False], [False, True])
  )
  np.testing.assert_allclose(both.sum(axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(both, (image + text) / 2, atol=1e-5)


def test_branches_of_an_example_with_one_modality_are_that_one(made):
  batch = make_batch([[True, True], [True, False], [False, True]] * 2)
  out = outputs(made, batch, training=True)
  image_bk, text_bk = (np.asarray(out.branches_bk[m]) for m in ('image', 'text'))
  complete = batch['present'].all(axis=1)
  same = np.all(image_bk == text_bk, axis=1)
  np.testing.assert_array_equal(same, ~complete)
  gap_b = np.asarray(out.losses_b['gap'])
  assert np.all(gap_b[~complete] == 0) and np.all(gap_b[complete] > 0)


def test_class_names_are_compared_with_the_text_towers_mean_states(made):
  setup, frozen, state, _ = made
  names = np.asarray(state.statistics[huse.NAMES], np.float64)
  np.testing.assert_allclose(np.linalg.norm(names, axis=1), 1, atol=1e-5)
  tower = setup.assembly.towers['text']
  found = huse.names.sentences(tower, setup.assembly.class_names, '{}')
  tokens_kt, mask_kt = found.tokens_kt, found.mask_kt
  tower, last = setup.method.modules['text'], setup.method.states['text']
  run = jax.jit(lambda p, *x: tower.apply(p, *x, states=last)[-1])
  states = run({'params': frozen['text']}, tokens_kt, mask_kt)
  mean = np.stack([np.asarray(x)[m].mean(axis=0) for x, m in zip(states, mask_kt, strict=True)])
  np.testing.assert_allclose(names, unit(mean - mean.mean(axis=0)), atol=1e-4)
  # From a store the towers' parameters are not there, and are loaded for the names.
  again = setup.begin(dict.fromkeys(frozen)).statistics[huse.NAMES]
  np.testing.assert_allclose(again, names, atol=1e-6)


def test_microbatches_are_refused_where_pairs_of_a_batch_are_compared():
  with pytest.raises(UserError, match='semantic loss compares all examples'):
    Setup(make_config(**{'train.accumulate': 2}), optax.identity())
