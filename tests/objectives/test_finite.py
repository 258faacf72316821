"""Finite in, finite out: every objective, estimator and diagnostic on hostile inputs, and right
where it can be.

Inputs of one table go through one compiled, vmapped program for each function.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molt_jax.objectives import cross_entropy
from molt_jax.objectives.cca import diagnostics
from molt_jax.objectives.cca.estimators import make_estimator
from molt_jax.objectives.cca.loss import SOLVERS, canonical_correlations, cca_loss
from molt_jax.objectives.contrastive import OBJECTIVES, PairEmbeddings

LARGEST = float(np.finfo(np.float32).max)
N, D = 12, 8


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def repeated(x_nd):
  return x_nd[:, [0, 1, 0, 1, 0, 1, 0, 1]]


HOSTILE = {  # Views [N, D] of which nothing is known but that they are finite.
  'zero': lambda x_nd: 0 * x_nd,
  'one number': lambda x_nd: 0 * x_nd + np.float32(0.1),
  'largest number': lambda x_nd: 0 * x_nd + LARGEST,
  'equal rows': lambda x_nd: 0 * x_nd + x_nd[:1],
  'denormal': lambda x_nd: x_nd * 1e-41,
  'least number': lambda x_nd: np.where(x_nd > 0, 1e-45, 0),
  'tiny': lambda x_nd: x_nd * 1e-30,
  'huge': lambda x_nd: x_nd * 1e37,
  'largest': lambda x_nd: np.sign(x_nd) * LARGEST,
  'zero columns': lambda x_nd: x_nd * (np.arange(D) > 2),
  'equal columns': repeated,
  'duplicate rows': lambda x_nd: x_nd[[0, 1, 2] * 4],
  'one direction': lambda x_nd: x_nd[:, :1] * x_nd[:1],
  'one entry': lambda x_nd: x_nd * (np.arange(N * D).reshape(N, D) == 5),
  'one row apart': lambda x_nd: x_nd[:1] + np.float32(1e20) * (np.arange(N) == 3)[:, None],
  'all scales': lambda x_nd: x_nd * 10.0 ** np.linspace(-44, 38, D),
  'far away': lambda x_nd: x_nd + np.float32(1e7),
}
WEIGHTS = {
  'ones': np.ones(N),
  'none': np.zeros(N),
  'one': np.arange(N) == 4,
  'two': np.arange(N) < 2,
  'three': np.arange(N) < 3,
  'some': np.arange(N) % 3 > 0,
  'tiny': np.full(N, 1e-30),
  'huge': np.full(N, 1e30),
  'of every size': 10.0 ** np.linspace(-30, 30, N),
}


def hostile(name, x_nd):
  return np.clip(HOSTILE[name](x_nd.astype(np.float64)), -LARGEST, LARGEST).astype(np.float32)


def views():
  """[(x [N, D], y [N, D])]: each hostile view beside a normal one, beside itself, and beside the
  next.
  """
  names = list(HOSTILE)
  pairs = [(hostile(name, normal(i, N, D)), normal(99, N, D)) for i, name in enumerate(names)]
  pairs += [(x_nd, x_nd) for x_nd, _ in pairs]
  return pairs + [(one[0], other[0]) for one, other in zip(pairs, pairs[1:], strict=False)]


def stacked(*more):
  """Every combination of `views`, of WEIGHTS and of what else is given, each stacked."""
  table = [(*pair, weight_n) for pair in views() for weight_n in WEIGHTS.values()]
  table = [(*row, value) for row in table for value in (more or [0.0])]
  return [np.stack(column).astype(np.float32) for column in zip(*table, strict=True)]


def all_finite(tree):
  return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# Canonical correlation.


@functools.cache
def many(solver):
  def one(x_nd, y_nd, weight_n, ridge):
    def loss(x_nd, y_nd):
      return cca_loss(x_nd, y_nd, weight_n=weight_n, ridge=ridge, solver=solver)

    return jax.value_and_grad(loss, argnums=(0, 1))(x_nd, y_nd)

  return jax.jit(jax.vmap(one))


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('width', [D, 2 * N], ids=['covariance', 'gram'])
def test_cca_is_finite_whatever_is_finite(solver, width):
  x_pnd, y_pnd, weight_pn, ridge_p = stacked(0.0, 1e-38, 1e-8, 1e-3, 1.0, 1e30)
  x_pnd, y_pnd = (np.concatenate([v] * (width // D), axis=2) for v in (x_pnd, y_pnd))
  loss_p, gradients = many(solver)(x_pnd, y_pnd, weight_pn, ridge_p)
  assert all_finite(gradients) and np.all((loss_p >= -1) & (loss_p <= 0))
  assert not any(np.any(np.asarray(g_pnd)[weight_pn == 0]) for g_pnd in gradients)


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('shape', [(12, 8, 20), (9, 8, 8)], ids=str)
def test_a_view_without_variance_costs_nothing_and_gets_nothing(solver, shape):
  n, d1, d2 = shape
  constants = [np.full((n, d1), value, np.float32) for value in (0, 1e-45, 1e-41, 0.1, -7, LARGEST)]
  constants += [np.repeat(normal(0, 1, d1), n, axis=0)]
  ridges = np.float32([0, 1e-45, 1e-12, 1e-8, 1e-3, 10])
  x_pnd = np.repeat(constants, len(ridges), axis=0)
  y_pnd, weight_pn = np.stack([normal(1, n, d2)] * len(x_pnd)), np.ones(x_pnd.shape[:2], np.float32)
  loss_p, gradients = many(solver)(x_pnd, y_pnd, weight_pn, np.tile(ridges, len(constants)))
  assert not any(np.any(leaf) for leaf in (loss_p, *gradients))


@pytest.mark.parametrize('solver', SOLVERS)
def test_the_scale_of_a_view_does_not_matter(solver):
  """From the least normal numbers to the largest: the same loss, gradients by the inverse scale, as
  far as float32 goes.
  """
  x_nd, y_nd = normal(0, N, D), normal(1, N, 2 * N)
  x_nd = np.sign(x_nd) * np.clip(np.abs(x_nd), 0.1, 2)
  y_nd[:, :3] += x_nd[:, :3]
  scales = np.float32([1, 2e-37, 1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30, 1.6e38])
  x_pnd = x_nd[None] * scales[:, None, None]
  y_pnd, weight_pn = np.stack([y_nd] * len(scales)), np.ones((len(scales), N), np.float32)
  loss_p, (dx_pnd, dy_pnd) = many(solver)(
    x_pnd, y_pnd, weight_pn, np.full(len(scales), 1e-3, np.float32)
  )
  np.testing.assert_allclose(loss_p, loss_p[0], rtol=1e-6)
  np.testing.assert_allclose(
    dy_pnd, np.broadcast_to(dy_pnd[:1], dy_pnd.shape), rtol=1e-3, atol=1e-6
  )
  in_range = (scales > 1e-36) & (scales < 1e36)
  rescaled_pnd = np.asarray(dx_pnd, np.float64) * scales[:, None, None].astype(np.float64)
  np.testing.assert_allclose(
    rescaled_pnd[in_range],
    np.broadcast_to(dx_pnd[:1], dx_pnd[in_range].shape),
    rtol=1e-3,
    atol=1e-6,
  )


def test_copies_of_columns_change_nothing_without_a_ridge():
  """They leave singular values of rounding; taken for directions, they would correlate with
  anything.
  """
  for n, d in ((40, 6), (16, 24)):
    weight_pn = np.ones((20, n), np.float32)
    weight_pn[10:] = 10.0 ** np.random.default_rng(0).uniform(-6, 0, (10, n))
    x_pnd, y_pnd = normal(2, 20, n, d), normal(3, 20, n, 5)
    copied_pnd = np.concatenate([x_pnd[:, :, :3]] * (d // 3), axis=2)
    want_p, _ = many('eigh')(x_pnd[:, :, :3], y_pnd, weight_pn, np.zeros(20, np.float32))
    got_p, _ = many('eigh')(copied_pnd, y_pnd, weight_pn, np.zeros(20, np.float32))
    np.testing.assert_allclose(got_p * min(d, 5), want_p * 3, rtol=1e-4)


@jax.jit
def diagnosed(x_nd, y_nd):
  """Correlations of the pairs that directions were fitted to, effective rank, modality gap."""
  directions = diagnostics.fit_directions(x_nd, y_nd)
  held_out = diagnostics.held_out_correlations(directions, x_nd, y_nd)
  return held_out, diagnostics.effective_rank(x_nd), diagnostics.modality_gap(x_nd, y_nd)


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(solver, bad):
  """In a row that counts; `test_cca.py` has the others."""
  x_nd, y_nd = normal(0, 9, 8), normal(1, 9, 8)
  x_nd[2, 3] = bad
  loss_p, _ = many(solver)(
    x_nd[None], y_nd[None], np.ones((1, 9), np.float32), np.zeros(1, np.float32)
  )
  assert np.isnan(loss_p).all()
  if solver == 'eigh':
    held_out, rank, gap = diagnosed(x_nd, y_nd)
    assert np.isnan(jax.jit(canonical_correlations)(x_nd, y_nd)).all()
    assert np.isnan(held_out).any() and np.isnan(rank) and np.isnan(gap)


def test_hostile_pairs_are_as_in_float64(fuzz):
  outcomes = fuzz('cca', count=2, seed=1)['outcomes']
  for solver in SOLVERS:
    right, ill_posed = (
      outcomes[f'{solver} loss: finite{which}'] for which in (' and right', ', ill posed')
    )
    assert right > 4 * ill_posed and right + ill_posed == 1000


# Estimators and diagnostics.


@pytest.mark.parametrize('solver', SOLVERS)
def test_the_moving_average_is_finite_whatever_is_finite(solver):
  """Three steps, each on other hostile pairs: also what an extreme batch leaves behind, and a
  normal one after it.
  """
  estimator = make_estimator('moving_average', num_directions=3, window=40, solver=solver)

  def one(state, x_nd, y_nd, weight_n):
    def loss(x_nd, y_nd):
      value, new_state, aux = estimator.loss(state, x_nd[None], y_nd[None], weight_n)
      return value, (new_state, aux)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_nd, y_nd)

  step = jax.jit(jax.vmap(one))
  x_pnd, y_pnd, weight_pn, _ = stacked()
  state = jax.tree.map(lambda leaf: np.stack([leaf] * len(x_pnd)), estimator.init(1, D))
  for shift in (0, 1, 7):
    roll = functools.partial(np.roll, shift=shift, axis=0)
    weight_p = np.clip(roll(weight_pn), 0, 1e6).sum(axis=1)
    has_past_p = (state['past']['weight'] > 0) & (weight_p < 40)  # A batch of the window's size is
    (loss_p, (state, aux)), gradients = step(state, roll(x_pnd), roll(y_pnd), roll(weight_pn))
    held_out_p = np.asarray(aux.pop('held_out_correlation'))[:, 0]
    np.testing.assert_array_equal(np.isfinite(held_out_p), has_past_p)  # all that counts.
    assert all_finite((loss_p, state, aux, gradients)) and np.all((loss_p >= -1) & (loss_p <= 0))
    assert not any(np.any(np.asarray(g_pnd)[roll(weight_pn) == 0]) for g_pnd in gradients)
  (loss_p, _), gradients = step(
    state, 0 * x_pnd + normal(0, N, D), 0 * y_pnd + normal(1, N, D), 0 * weight_pn + 1
  )
  assert all_finite((loss_p, gradients))


@pytest.mark.parametrize('scale', [1e-15, 1e-6, 1e6, 1e11])
def test_the_scale_of_a_view_does_not_matter_to_the_moving_average(scale):
  estimator = make_estimator('moving_average', num_directions=3, window=40)
  step = jax.jit(estimator.loss)
  states = [estimator.init(1, D)] * 2
  for seed in range(4):
    x_lbd, y_lbd = normal([seed, 0], 1, N, D), normal([seed, 1], 1, N, D)
    (one, states[0], _), (other, states[1], _) = (
      step(state, factor * x_lbd, y_lbd)
      for state, factor in zip(states, np.float32([1, scale]), strict=True)
    )
    np.testing.assert_allclose(other, one, rtol=1e-4)


def test_diagnostics_are_finite_whatever_is_finite():
  @jax.jit
  @jax.vmap
  def measure(x_nd, y_nd, weight_n, other_nd, ridge):
    directions = diagnostics.fit_directions(x_nd, y_nd, weight_n=weight_n, ridge=ridge)
    held_out = [
      diagnostics.held_out_correlations(directions, *pair, weight_n=weight_n)
      for pair in ((x_nd, y_nd), (other_nd, y_nd), (x_nd, other_nd))
    ]
    return (
      directions,
      held_out,
      canonical_correlations(x_nd, y_nd, weight_n=weight_n, ridge=ridge),
      diagnostics.effective_rank(x_nd, weight_n=weight_n),
      diagnostics.modality_gap(x_nd, y_nd, weight_n=weight_n),
    )

  x_pnd, y_pnd, weight_pn, ridge_p = stacked(0.0, 1e-3)
  results = measure(x_pnd, y_pnd, weight_pn, np.roll(x_pnd, 1, axis=0), ridge_p)
  assert all_finite(results)
  _, held_out, correlations_pk, rank_p, gap_p = results
  assert (
    np.max(np.abs(held_out)) <= 1 + 1e-5
    and np.max(correlations_pk) <= 1
    and np.min(correlations_pk) >= 0
  )
  assert np.max(rank_p) <= D * (1 + 1e-5) and np.max(gap_p) <= 2 + 1e-5


@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_diagnostics_do_not_depend_on_the_scale(scale):
  x_nd, y_nd = normal(0, 30, 6), normal(1, 30, 6) * np.float32(1)
  y_nd[:, 0] += x_nd[:, 0]
  one, other = (diagnosed(view_nd, y_nd) for view_nd in (x_nd, np.float32(scale) * x_nd))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4), one, other)


def test_a_constant_held_out_view_correlates_with_nothing():
  x_nd, y_nd = normal(0, 30, 6), normal(1, 30, 5)
  directions = diagnostics.fit_directions(x_nd, y_nd)
  constant_nd = np.repeat(x_nd[:1], 30, axis=0)
  assert not np.any(diagnostics.held_out_correlations(directions, constant_nd, y_nd))


# A vmap over pairs: on a CPU, LAPACK's calls in a batch waited for each other.


@pytest.mark.parametrize('solver', SOLVERS)
def test_vmap_is_a_loop(solver):
  x_pnd, y_pnd = normal(0, 40, 12, 8), normal(1, 40, 12, 20)
  weight_pn, ridge_p = np.ones((40, 12), np.float32), np.geomspace(1e-6, 1, 40).astype(np.float32)
  weight_pn[1::2, :4] = 0
  x_pnd[::5, :, 1] = x_pnd[::5, :, 0]
  loss_p, gradients = many(solver)(x_pnd, y_pnd, weight_pn, ridge_p)
  one = jax.jit(functools.partial(cca_loss, solver=solver))
  alone = [
    one(*row[:2], weight_n=row[2], ridge=row[3])
    for row in zip(x_pnd, y_pnd, weight_pn, ridge_p, strict=True)
  ]
  np.testing.assert_allclose(loss_p, alone, rtol=2e-5)
  shared = jax.jit(
    jax.vmap(jax.vmap(lambda x, y: cca_loss(x, y, solver=solver), (0, None)), (None, 0))
  )
  grid_pq = shared(x_pnd[:3], y_pnd[:4])
  assert grid_pq.shape == (4, 3)
  np.testing.assert_allclose(grid_pq[2, 1], one(x_pnd[1], y_pnd[2]), rtol=2e-5)


# The other objectives.


ROWS = {
  'normal': lambda e_bc: e_bc,
  'zero': lambda e_bc: 0 * e_bc,
  'one of zeros': lambda e_bc: e_bc * (np.arange(N) > 0)[:, None],
  'equal': lambda e_bc: 0 * e_bc + e_bc[:1],
  'opposite': lambda e_bc: e_bc * np.where(np.arange(N) % 2, 1, -1)[:, None],
  'denormal': lambda e_bc: e_bc * 1e-41,
  'huge': lambda e_bc: e_bc * 1e20,
  'largest': lambda e_bc: np.sign(e_bc) * LARGEST,
}
FIELDS = [field for field in PairEmbeddings.__dataclass_fields__ if field.endswith('_bc')]


@pytest.mark.parametrize('name', OBJECTIVES)
def test_objectives_of_pairs_are_finite_whatever_is_finite(name):
  def one(arrays, error_b, weight_b, scale):
    def loss(arrays, error_b):
      embeddings = PairEmbeddings(**arrays, image_error_b=error_b, weight_b=weight_b)
      return OBJECTIVES[name](embeddings, scale, jax.random.key(0))

    return jax.value_and_grad(loss, argnums=(0, 1))(arrays, error_b)

  unit_bc = normal(0, N, D) / np.linalg.norm(normal(0, N, D), axis=1, keepdims=True)
  other_bc = normal(1, N, D) / np.linalg.norm(normal(1, N, D), axis=1, keepdims=True)
  table = [
    (first(unit_bc), second(other_bc), weight_b, scale)
    for first in ROWS.values()
    for second in (ROWS['normal'], ROWS['largest'], first)
    for weight_b in (WEIGHTS[w] for w in ('ones', 'none', 'one', 'some', 'tiny'))
    for scale in (1.0, 100.0, 1e6)
  ]
  one_pbc, other_pbc, weight_pb, scale_p = (
    np.stack(c).astype(np.float32) for c in zip(*table, strict=True)
  )
  arrays = {field: (one_pbc, other_pbc)[i % 2] for i, field in enumerate(FIELDS)}
  error_pb = np.abs(one_pbc[:, :, 0])
  loss_p, (gradients, error_gradient) = jax.jit(jax.vmap(one))(arrays, error_pb, weight_pb, scale_p)
  assert all_finite((loss_p, gradients, error_gradient))
  assert not any(
    np.any(np.asarray(g)[weight_pb == 0]) for g in (*gradients.values(), error_gradient)
  )


LOGITS = {
  'normal': lambda z_bk: z_bk,
  'zero': lambda z_bk: 0 * z_bk,
  'largest': lambda z_bk: np.sign(z_bk) * LARGEST,
  'one of the largest': lambda z_bk: np.where(np.arange(5) == 2, LARGEST, z_bk),
  'least': lambda z_bk: 0 * z_bk - LARGEST,
  'denormal': lambda z_bk: z_bk * 1e-41,
}


@pytest.mark.parametrize('temperature', [0.01, 2.0, 100.0])
@pytest.mark.parametrize('multi_label', [False, True])
def test_losses_of_logits_are_finite_whatever_is_finite(multi_label, temperature):
  kind = cross_entropy.KINDS[multi_label]
  label = np.eye(5)[np.arange(N) % 5] if multi_label else np.arange(N) % 5

  def one(z_bk, teacher_bk, weight_b):
    def entropy(z_bk):
      return kind.cross_entropy(z_bk, label, weight_b, jnp.ones(5) * 3)[0]

    def divergence(z_bk):
      return kind.distillation(z_bk, teacher_bk, weight_b, temperature)[0]

    return jax.value_and_grad(entropy)(z_bk), jax.value_and_grad(divergence)(z_bk)

  table = [
    (first(normal(0, N, 5)), second(normal(1, N, 5)), weight_b)
    for first in LOGITS.values()
    for second in LOGITS.values()
    for weight_b in (WEIGHTS[w] for w in ('ones', 'none', 'some', 'tiny'))
  ]
  z_pbk, teacher_pbk, weight_pb = (np.stack(c).astype(np.float32) for c in zip(*table, strict=True))
  results = jax.jit(jax.vmap(one))(z_pbk, teacher_pbk, weight_pb)
  assert all_finite(results)
  for loss_p, gradient_pbk in results:
    assert np.min(loss_p) >= -1e-3 and not np.any(np.asarray(gradient_pbk)[weight_pb == 0])


def test_infinity_is_not_taken_for_a_large_number():
  z_bk, unit_bc = np.zeros((N, 5), np.float32), normal(0, N, D)
  z_bk[0, 1] = unit_bc[0, 1] = np.inf
  ones_b = np.ones(N, np.float32)
  assert not np.isfinite(
    cross_entropy.softmax_cross_entropy(z_bk, np.zeros(N, int), weight_b=ones_b)[0]
  )
  for name in ('v2t', 'geometric_original'):
    embeddings = PairEmbeddings(unit_bc, normal(1, N, D))
    assert not np.isfinite(OBJECTIVES[name](embeddings, 10.0, jax.random.key(0)))
