"""Kernel ridge regression beside a head: against scikit-learn and float64, and strict absence."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods.parts import (
  kernel_ridge,
  ridge_calibration,
  ridge_judging,
  ridge_solver,
)
from molt_jax.methods.parts.ridge_kernels import Examples

LAYERS, CELLS, IMAGE_WIDTH, TEXT_WIDTH, TOKENS, CLASSES = 2, 5, 6, 4, 3, 3
TRAINING, HELD = 60, 30


def make_states(n, seed):
  """Hidden states of n examples, class centres in both modalities, texts of unequal length."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, CLASSES, n)
  centres = np.random.default_rng(99)
  image = centres.normal(size=(CLASSES, LAYERS, CELLS, IMAGE_WIDTH))[label]
  text = centres.normal(size=(CLASSES, LAYERS, 1, TEXT_WIDTH))[label]
  image = image + 2 * rng.normal(size=image.shape)
  text = text + 2 * rng.normal(size=(n, LAYERS, TOKENS, TEXT_WIDTH))
  mask_bt = np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (n, 1))
  states = HiddenStates(
    np.moveaxis(image, 0, 1).astype(np.float32),
    np.moveaxis(text, 0, 1).astype(np.float32),
    mask_bt,
  )
  return states, label


def make_examples(states, label, present_bm):
  pooled = {}
  for modality in ('image', 'text'):
    found = kernel_ridge.pool_modality(states, present_bm, modality)
    pooled[modality] = {group: np.asarray(x) for group, x in found.items()}
  return Examples(pooled, present_bm, np.eye(CLASSES, dtype=np.float32)[label])


@pytest.fixture(scope='module')
def fitted():
  """A fitted regression, its examples, and more of them with every pattern of presence."""
  present_bm = np.ones((TRAINING, 2), bool)
  present_bm[:6, 0], present_bm[6:12, 1] = False, False
  training = make_examples(*make_states(TRAINING, 0), present_bm)
  held = make_examples(*make_states(HELD, 1), np.ones((HELD, 2), bool))
  variables = ridge_solver.fit(training, held, landmarks=64, multi_label=False)
  return variables, training, held


def flat(x_blnd, mean_lnd, scale_lnd):
  return ((x_blnd - mean_lnd) * scale_lnd).reshape(len(x_blnd), -1).astype(np.float64)


def kernel_of(own, pooled, others):
  """The kernel in float64, of groups as the docstring of `kernel_ridge` defines them."""
  state, total = int(own['state']), 0.0
  for weight, group in zip(own['group_weight'], kernel_ridge.GROUPS, strict=True):
    rows = slice(None) if group == 'mean' else slice(state, state + 1)
    space = own[f'{group}_mean_lnd'], own[f'{group}_scale_lnd']
    x_bc, z_mc = (flat(p[group][:, rows], *space) for p in (pooled, others))
    squared_bmc = np.square(x_bc[:, None] - z_mc[None])
    total = total + weight * np.exp(-kernel_ridge.GAMMA * squared_bmc.mean(axis=2))
  return total


class Answers(NamedTuple):
  """Answers less the mean, and the mean itself."""

  change_bk: np.ndarray
  mean_bk: np.ndarray


def answered(gram_nn, target_nk, test_hn, ridge):
  mean_k = target_nk.mean(axis=0)
  model = KernelRidge(alpha=ridge, kernel='precomputed').fit(gram_nn, target_nk - mean_k)
  change_hk = model.predict(test_hn)
  return Answers(change_hk, np.tile(mean_k, (len(change_hk), 1)))


def without_each(gram_nn, target_nk, ridge):
  """The answer to each training example of a regression that was fitted to the others."""
  found = []
  for i in range(len(gram_nn)):
    others = np.arange(len(gram_nn)) != i
    gram = gram_nn[np.ix_(others, others)]
    found.append(answered(gram, target_nk[others], gram_nn[i : i + 1, others], ridge))
  return Answers(*map(np.concatenate, zip(*found, strict=True)))


def least_loss(*judged):
  """The mean of the log losses of examples held out and left out, at the best temperature; the
  latter count as 32.
  """

  def loss(logits_of):
    pairs = [(logits_of(answers), target_bk) for answers, target_bk in judged]
    losses = [ridge_calibration.log_loss(z, target, False) for z, target in pairs]
    return np.average(losses, weights=[HELD, 32])

  temperatures = ridge_judging.TEMPERATURES
  return min(loss(lambda x, t=t: t * (x.change_bk + x.mean_bk)) for t in temperatures)


@pytest.mark.parametrize('pattern', [0, 1, 2])
def test_answers_are_those_of_scikit_learns_kernel_ridge(fitted, pattern):
  variables, training, held = fitted
  keep_m = np.array([[True, True], [True, False], [False, True]])[pattern]
  rows = training.present_bm[:, keep_m].all(axis=1)
  gram, test = 0.0, 0.0
  for share, modality in zip(variables['share_vm'][pattern], ('image', 'text'), strict=True):
    own, pooled = variables[modality], training.pooled[modality]
    gram = gram + share * kernel_of(own, pooled, pooled)
    test = test + share * kernel_of(own, held.pooled[modality], pooled)
  target_nk = training.target_bk[rows]
  gram_nn, test_hn = gram[np.ix_(rows, rows)], test[:, rows]
  changes, losses = [], []
  for ridge in ridge_solver.RIDGES:
    held_out = answered(gram_nn, target_nk, test_hn, ridge), held.target_bk
    left_out = without_each(gram_nn, target_nk, ridge), target_nk
    changes.append(held_out[0].change_bk)
    losses.append(least_loss(held_out, left_out))
  states, _ = make_states(HELD, 1)
  present_bm = np.tile(keep_m, (HELD, 1))
  found, able_bv = kernel_ridge.answers(variables, states, present_bm)
  found = found[:, pattern]
  assert np.all(np.argmax(able_bv, axis=1) == pattern)
  # Their offset is the mean of the targets, or stands for the shares of the classes.
  change = np.asarray(found) - variables['offset_vk'][pattern]
  np.testing.assert_allclose(change, changes[int(np.argmin(losses))], atol=3e-3)
  assert np.mean(np.argmax(found, 1) == held.target_bk.argmax(1)) > 0.6


@pytest.mark.parametrize('examples', [1, 5])
@pytest.mark.parametrize('landmarks', [10, 64, 150])
@pytest.mark.parametrize('kind', ['rbf', 'linear'])
def test_a_kernel_is_that_of_float64_however_many_landmarks_there_are(kind, landmarks, examples):
  rng = np.random.default_rng(landmarks)
  x = rng.normal(size=(examples, LAYERS, 2, TEXT_WIDTH)).astype(np.float32)
  z = rng.normal(size=(landmarks, LAYERS, 2, TEXT_WIDTH)).astype(np.float16)
  mean, scale = rng.normal(size=(2, LAYERS, 2, TEXT_WIDTH)).astype(np.float32)
  sizes = {'landmarks': landmarks, 'num_classes': CLASSES}
  own = kernel_ridge.empty({'image': (LAYERS, CELLS, TEXT_WIDTH), 'text': None}, **sizes)['image']
  own |= {'mean_mean_lnd': mean, 'mean_scale_lnd': scale, 'mean_landmarks_mlnd': z}
  own |= {'group_weight': np.array([1.0, 0.0], np.float32), 'state': np.int32(0)}
  pooled = {'mean': x, 'cells': np.zeros((examples, LAYERS, CELLS, TEXT_WIDTH), np.float32)}
  found = jax.jit(functools.partial(kernel_ridge.kernel, kind=kind))(own, pooled)
  x_bc, z_mc = flat(x, mean, scale), flat(z, 0, 1)
  if kind == 'linear':
    right = 1 + x_bc @ z_mc.T / x_bc.shape[1]
  else:
    right = np.exp(-kernel_ridge.GAMMA * np.square(x_bc[:, None] - z_mc[None]).mean(axis=2))
  np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


def test_fewer_landmarks_are_regression_in_the_space_that_they_span():
  training = make_examples(*make_states(TRAINING, 0), np.ones((TRAINING, 2), bool))
  held = make_examples(*make_states(HELD, 1), np.ones((HELD, 2), bool))
  variables = ridge_solver.fit(training, held, landmarks=20, multi_label=False)
  own = variables['image']
  landmarks = {g: x[:20] for g, x in training.pooled['image'].items()}
  k_nm = kernel_of(own, training.pooled['image'], landmarks)
  k_mm = k_nm[:20]
  mean_k = training.target_bk.mean(axis=0)
  right_mk = k_nm.T @ (training.target_bk - mean_k)
  # Normal equations of ridge regression whose penalty is alpha' K alpha.
  duals = [np.linalg.solve(k_nm.T @ k_nm + r * k_mm, right_mk) for r in ridge_solver.RIDGES]
  test_hm = kernel_of(own, held.pooled['image'], landmarks)
  states, _ = make_states(HELD, 1)
  found = kernel_ridge.answers(variables, states, np.tile([True, False], (HELD, 1)))[0][:, 1]
  change = np.asarray(found) - variables['offset_vk'][1]
  errors = [np.abs(change - test_hm @ dual_mk).max() for dual_mk in duals]
  assert min(errors) < 3e-3


def test_landmarks_that_are_alike_have_a_regression(monkeypatch):
  """Far more landmarks than channels: their linear kernel is singular; rounded to float32 it has
  eigenvalues below zero; of 600 as far below as of thousands with a larger jitter.
  """
  monkeypatch.setattr(ridge_solver, '_JITTER', 1e-7)
  count = 600
  training = make_examples(*make_states(count, 0), np.tile([True, False], (count, 1)))
  held = make_examples(*make_states(HELD, 1), np.tile([True, False], (HELD, 1)))
  how = {'landmarks': count, 'multi_label': False, 'kernel': 'linear'}
  variables = ridge_solver.fit(training, held, **how)
  own, state = variables['image'], int(variables['image']['state'])
  gram, test = 0.0, 0.0
  for weight, group in zip(own['group_weight'], kernel_ridge.GROUPS, strict=True):
    rows = slice(None) if group == 'mean' else slice(state, state + 1)
    space = own[f'{group}_mean_lnd'], own[f'{group}_scale_lnd']
    x_bc, z_mc = (flat(e.pooled['image'][group][:, rows], *space) for e in (training, held))
    gram = gram + weight * (1 + x_bc @ x_bc.T / x_bc.shape[1])
    test = test + weight * (1 + z_mc @ x_bc.T / x_bc.shape[1])
  found = test @ variables['dual_vmk'][1].astype(np.float64)
  mean_k, errors = training.target_bk.mean(axis=0), []
  for ridge in ridge_solver.RIDGES:
    model = KernelRidge(alpha=ridge, kernel='precomputed').fit(gram, training.target_bk - mean_k)
    errors.append(np.abs(found - model.predict(test)).max())
  assert min(errors) < 3e-3


def test_nothing_of_a_missing_modality_enters(fitted):
  variables = fitted[0]
  states, _ = make_states(HELD, 2)
  present_bm = np.array([[True, True], [True, False], [False, True]])[np.arange(HELD) % 3]
  answer = jax.jit(kernel_ridge.answers)
  clean, able_bv = answer(variables, states, present_bm)
  expected_bv = np.stack([present_bm.all(1), present_bm[:, 0], present_bm[:, 1]], axis=1)
  np.testing.assert_array_equal(able_bv, expected_bv)
  image, text = states.image_lbid.copy(), states.text_lbtd.copy()
  image[:, ~present_bm[:, 0]], text[:, ~present_bm[:, 1]] = np.nan, 3e38
  mask_bt = states.text_mask_bt ^ ~present_bm[:, 1:]
  foul, _ = answer(variables, HiddenStates(image, text, mask_bt), present_bm)
  np.testing.assert_array_equal(clean, foul)
  assert np.all(np.isfinite(clean))


def test_a_pattern_without_examples_leaves_the_heads_logits():
  present_bm = np.tile([True, False], (TRAINING, 1))
  states, label = make_states(TRAINING, 0)
  training = make_examples(states, label, present_bm)
  variables = ridge_solver.fit(training, training, landmarks=64, multi_label=False)
  assert list(variables['temperature_v'] > 0) == [False, True, False]
  present_bm = np.array([[True, True], [True, False], [False, True]])[np.arange(TRAINING) % 3]
  answers = kernel_ridge.answers(variables, states, present_bm)
  logits_bk = np.random.default_rng(3).normal(size=(TRAINING, CLASSES)).astype(np.float32)
  mixed = kernel_ridge.combine(variables, logits_bk, *answers, multi_label=False)
  changed_b = np.abs(np.asarray(mixed) - logits_bk).max(axis=1) > 1e-3
  np.testing.assert_array_equal(changed_b, np.arange(TRAINING) % 3 == 1)


@pytest.mark.parametrize('multi_label', [False, True])
def test_weights_are_those_of_the_least_log_loss(multi_label):
  rng = np.random.default_rng(5)
  label = rng.integers(0, CLASSES, 200)
  target_bk = np.eye(CLASSES, dtype=np.float32)[label]
  right_bk = (4 * (target_bk - 0.5) + rng.normal(size=target_bk.shape)).astype(np.float32)
  noise_bk = rng.normal(size=target_bk.shape).astype(np.float32)
  experts_bvk = np.stack([right_bk, noise_bk, right_bk], axis=1)
  how = {'multi_label': multi_label}
  weight, weight_v = ridge_calibration.calibrate(
    noise_bk, experts_bvk, target_bk, [True, True, False], **how
  )
  assert weight == 0 and weight_v[0] > 0.5 and not weight_v[1:].any()
  weight, weight_v = ridge_calibration.calibrate(
    right_bk, experts_bvk, target_bk, [False, True, False], **how
  )
  assert weight == 1 and weight_v[1] == 0.25 and not weight_v[[0, 2]].any()


@pytest.mark.parametrize('multi_label', [False, True])
def test_a_modality_that_tells_nothing_answers_with_the_shares_of_the_classes(multi_label):
  rng = np.random.default_rng(7)
  share_k = np.array([0.75, 0.2, 0.05])
  examples = []
  for seed, count in ((0, 200), (1, 400)):
    states, _ = make_states(count, seed)
    label = rng.choice(CLASSES, count, p=share_k)  # Whatever the image and the text show.
    examples.append(make_examples(states, label, np.tile([True, False], (count, 1))))
  training, held = examples
  how = {'multi_label': multi_label}
  variables = ridge_solver.fit(training, held, landmarks=200, **how)
  states, _ = make_states(HELD, 2)
  answer_bvk, _ = kernel_ridge.answers(variables, states, np.tile([True, False], (HELD, 1)))
  expert_bvk = np.asarray(kernel_ridge.experts(answer_bvk, variables['temperature_v'], **how))
  p_bk = np.exp(expert_bvk[:, 1])
  p_bk = p_bk / (1 + p_bk) if multi_label else p_bk
  expected_k = training.target_bk.mean(axis=0)
  np.testing.assert_allclose(p_bk, np.tile(expected_k, (HELD, 1)), atol=0.03)
