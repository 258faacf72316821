"""What is measured of pooled pairs: nothing of too few, and nothing of what does not vary."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molt_jax.evaluation.diagnostics import HELD_OUT, PairDiagnostics
from molt_jax.objectives.cca.estimators import make_estimator

LAYERS, WIDTH, DIRECTIONS = 2, 6, 3
RANKS, GAP = {'effective_rank_image', 'effective_rank_text'}, {'modality_gap'}
FITTED = {'correlation', 'top_correlation'}
ESTIMATOR = make_estimator('moving_average', num_directions=DIRECTIONS, window=1000)


def observed(count, *, constant=False, seed=0):
  """Diagnostics that have seen this many pairs."""
  rng = np.random.default_rng(seed)
  x_lbc, y_lbc = rng.normal(size=(2, LAYERS, count, WIDTH)).astype(np.float32)
  if constant:
    x_lbc[0] = 0
  found = PairDiagnostics()
  pooled = {'pooled_image_lbc': jnp.array(x_lbc)[None], 'pooled_text_lbc': jnp.array(y_lbc)[None]}
  out = types.SimpleNamespace(**pooled)
  batch = {'weight': jnp.ones(count), 'present': jnp.ones((count, 2), bool)}
  found.observe(batch | {'keep': jnp.ones((count, 1, 2), bool)}, out)
  return found


@functools.cache
def trained(count):
  """The state of ESTIMATOR after this many pairs."""
  state = ESTIMATOR.init(LAYERS, WIDTH)
  if count:
    rng = np.random.default_rng(1)
    x_lbc, y_lbc = rng.normal(size=(2, LAYERS, count, WIDTH)).astype(np.float32)
    state = jax.jit(ESTIMATOR.loss)(state, x_lbc, y_lbc)[1]
  return state


@pytest.mark.parametrize(
  ('seen', 'past', 'names'),
  [
    (0, 50, set()),
    (1, 50, GAP | FITTED),
    (2, 50, GAP | FITTED),
    (3, 50, GAP | RANKS | FITTED | set(HELD_OUT)),
    (9, 0, GAP | RANKS),
    (9, DIRECTIONS, GAP | RANKS),
    (9, 50, GAP | RANKS | FITTED | set(HELD_OUT)),
  ],
)
def test_only_what_the_pairs_determine_is_there(seen, past, names):
  found = observed(seen).compute(ESTIMATOR, trained(past), ridge=1e-3)
  assert set(found) == names
  for value_l in found.values():
    assert len(value_l) == LAYERS and np.isfinite(value_l).all()


def test_a_layer_without_variation_has_no_held_out_correlation():
  found = observed(9, constant=True).compute(ESTIMATOR, trained(50), ridge=1e-3)
  for name in HELD_OUT:
    assert found[name][0] is None and np.isfinite(found[name][1])


def test_an_estimator_without_a_past_has_no_correlation():
  estimator = make_estimator('batch')
  assert set(observed(9).compute(estimator, {}, ridge=1e-3)) == GAP | RANKS


@pytest.mark.parametrize(('here', 'there'), [(2, 9), (9, 2), (0, 9)])
def test_too_few_pairs_make_no_picture(here, there):
  how = {'batch_size': 4, 'ridge': 1e-3, 'layer_weights_l': None, 'split': 'test', 'step': 1}
  assert observed(here).picture(observed(there, seed=1), **how) is None
  shown = observed(9).picture(observed(9, seed=1), **how)
  assert next(shown._faults(), None) is None
