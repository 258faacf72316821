"""Methods that train nothing: nearest neighbours against a loop in float64, a linear probe against
scikit-learn's ridge regression; as runs.
"""

import json

import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from molt_jax import train
from molt_jax.evaluation import trained
from molt_jax.methods.parts import kernel_ridge, neighbours, ridge_solver
from molt_jax.methods.parts.ridge_kernels import Examples

TRAINING, HELD, CLASSES = 40, 25, 3
WIDTHS = {'image': 6, 'text': 4}
PATTERNS = np.array([[True, True], [True, False], [False, True]])


def make_examples(count, seed, present_bm=None):
  """Pooled states around class centres, zeros where absent."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, CLASSES, count)
  present_bm = np.ones((count, 2), bool) if present_bm is None else present_bm
  pooled = {}
  for column, (modality, width) in enumerate(WIDTHS.items()):
    centres = np.random.default_rng(9 + column).normal(size=(CLASSES, width))
    x_bc = 3 + centres[label] + 0.7 * rng.normal(size=(count, width))
    pooled[modality] = {'mean': np.where(present_bm[:, column, None], x_bc, 0).astype(np.float16)}
  return Examples(pooled, present_bm, np.eye(CLASSES, dtype=np.float32)[label])


@pytest.fixture(scope='module')
def fitted():
  """(variables, training examples with gaps, others)."""
  present_bm = PATTERNS[np.arange(TRAINING) % 3]
  training, held = make_examples(TRAINING, 0, present_bm), make_examples(HELD, 1)
  return neighbours.fit(training, held, examples=64, multi_label=False), training, held


def oracle(training, held, keep_m, count):
  """log of the votes' shares, float64[B, K]."""
  cosines = np.full((2, HELD, TRAINING), np.nan)
  for column, modality in enumerate(WIDTHS):
    if keep_m[column]:
      x, z = (np.float64(e.pooled[modality]['mean']) for e in (held, training))
      has = training.present_bm[:, column]
      mean, deviation = z[has].mean(0), z[has].std(0)
      deviation = deviation + 1e-3 + 1e-3 * np.abs(mean)
      x, z = (x - mean) / deviation, (z - mean) / deviation
      cosine = (x @ z.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(z, axis=1)[None]
      cosines[column] = np.where(has[None], cosine, np.nan)
  found = []
  for b in range(HELD):
    parts = cosines[:, b]
    there = np.isfinite(parts).sum(0)
    score = np.where(there > 0, np.nansum(parts, axis=0) / np.maximum(there, 1), -np.inf)
    best = [n for n in np.argsort(-score)[:count] if np.isfinite(score[n])]
    weight = np.exp((score[best] - score[best[0]]) / 0.07)
    votes = weight @ training.target_bk[best] + training.target_bk.mean(0)
    found.append(np.log(votes / (weight.sum() + 1)))
  return np.array(found)


@pytest.mark.parametrize('pattern', [0, 1, 2])
def test_neighbours_vote_as_in_a_loop(fitted, pattern):
  variables, training, held = fitted
  keep_m = PATTERNS[pattern]
  pooled = {m: groups['mean'].astype(np.float32) for m, groups in held.pooled.items()}
  present_bm = np.tile(keep_m, (HELD, 1))
  found = neighbours.logits(variables, pooled, present_bm, multi_label=False)
  expected, losses = {}, {}
  for count in neighbours.COUNTS:
    expected[count] = oracle(training, held, keep_m, count)
    losses[count] = -(held.target_bk * expected[count]).sum(1).mean()
  count = int(variables['count_v'][pattern])
  # Up to the rounding of what is kept.
  assert losses[count] <= min(losses.values()) + 1e-3
  np.testing.assert_allclose(found, expected[count], atol=2e-2)
  assert np.mean(np.argmax(found, 1) == held.target_bk.argmax(1)) > 0.55


def test_neighbours_read_nothing_of_a_missing_modality(fitted):
  variables = fitted[0]
  rng = np.random.default_rng(4)
  pooled = {m: rng.normal(size=(HELD, width)).astype(np.float32) for m, width in WIDTHS.items()}
  present_bm = PATTERNS[np.arange(HELD) % 3]
  foul = {}
  for column, modality in enumerate(WIDTHS):
    foul[modality] = np.where(present_bm[:, column, None], pooled[modality], np.nan)
  answer = jax.jit(lambda p: neighbours.logits(variables, p, present_bm, multi_label=False))
  np.testing.assert_array_equal(answer(foul), answer(pooled))
  assert np.all(np.isfinite(answer(foul)))


def test_neighbours_of_several_labels_give_each_its_share(fitted):
  _, training, held = fitted
  several = Examples(training.pooled, training.present_bm, 1 - training.target_bk)
  variables = neighbours.fit(several, held, examples=64, multi_label=True)
  pooled = {m: groups['mean'].astype(np.float32) for m, groups in held.pooled.items()}
  present_bm = np.ones((HELD, 2), bool)
  logits = neighbours.logits(variables, pooled, present_bm, multi_label=True)
  weight_bn, label_bnk = neighbours.nearest(variables, pooled, present_bm)
  count_b = np.full(HELD, variables['count_v'][0])
  share = neighbours.probabilities(weight_bn, label_bnk, variables['mean_k'], count_b)
  inside = (share > 1e-5) & (share < 1 - 1e-5)
  sigmoid = 1 / (1 + np.exp(-np.float64(logits)))
  np.testing.assert_allclose(sigmoid[inside], share[inside], atol=1e-5)
  np.testing.assert_allclose(share.sum(axis=1), 2, atol=1e-3)


def grouped(examples):
  """The same examples as the regression has them: the mean alone of one hidden state."""
  pooled = {}
  for modality, groups in examples.pooled.items():
    x_bl1d = groups['mean'][:, None, None]
    pooled[modality] = {'mean': np.concatenate([0 * x_bl1d, x_bl1d], axis=2), 'cells': x_bl1d}
  return Examples(pooled, examples.present_bm, examples.target_bk)


def test_a_linear_probe_is_scikit_learns_ridge_regression():
  training, held = grouped(make_examples(TRAINING, 0)), grouped(make_examples(HELD, 1))
  variables = ridge_solver.fit(
    training, held, landmarks=TRAINING, multi_label=False, kernel='linear'
  )
  own, pooled = variables['text'], held.pooled['text']
  kernel_bm = np.asarray(kernel_ridge.kernel(own, pooled, 'linear'))
  found = kernel_bm @ variables['dual_vmk'][2]

  def inputs(examples):
    x_blnd = examples.pooled['text']['mean'].astype(np.float64)
    z_bc = ((x_blnd - own['mean_mean_lnd']) * own['mean_scale_lnd']).reshape(len(x_blnd), -1)
    return np.concatenate([z_bc / np.sqrt(z_bc.shape[1]), np.ones((len(z_bc), 1))], axis=1)

  errors = []
  for ridge in ridge_solver.RIDGES:
    model = Ridge(alpha=ridge, fit_intercept=False)
    mean_k = training.target_bk.mean(axis=0)
    model.fit(inputs(training), training.target_bk - mean_k)
    errors.append(np.abs(model.predict(inputs(held)) - found).max())
  assert min(errors) < 3e-3
  # Where the kernels tell nothing: the mean of the targets, or the shares of the classes.
  count_k = training.target_bk.sum(axis=0)
  shares_k = np.log((count_k + 1) / (TRAINING + len(count_k))) / variables['temperature_v'][2]
  offsets = [np.abs(variables['offset_vk'][2] - x_k).max() for x_k in (mean_k, shares_k)]
  assert min(offsets) < 1e-5


def test_a_run_is_one_step_that_learns_the_colours(make_tiny_config, tmp_path):
  config = make_tiny_config()
  config.method, config.knn.examples = 'knn', 64
  train.train(config, tmp_path / 'run')
  before = json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
  assert before['step'] == 1
  assert before['results']['text_absent']['accuracy'] > 0.8
  assert jax.tree.leaves(trained.open(tmp_path / 'run').variables()['params']) == []
  config.train.epochs *= 2  # It has ended all the same.
  train.train(config, tmp_path / 'run')
  after = json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
  assert after['results'] == before['results']
