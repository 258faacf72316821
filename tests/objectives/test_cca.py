"""The CCA loss against float64 NumPy, scikit-learn and cca-zoo, at the edges, and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from molt_jax.objectives.cca import linalg
from molt_jax.objectives.cca.diagnostics import effective_rank, fit_directions
from molt_jax.objectives.cca.loss import SOLVERS, canonical_correlations, cca_loss
from molt_jax.runtime import sharding


def oracle(x_nd, y_nd, ridge, weight_n=None):
  """Loss and gradients in float64 from the d x d definition (Andrew et al. 2013), with the ridge's
  own movement.
  """
  x_nd, y_nd = np.asarray(x_nd, np.float64), np.asarray(y_nd, np.float64)
  w_n1 = np.ones((len(x_nd), 1)) if weight_n is None else np.asarray(weight_n, np.float64)[:, None]
  views = []
  for v_nd in (x_nd, y_nd):
    root_nd = np.sqrt(w_n1) * (v_nd - (w_n1 * v_nd).sum(0) / w_n1.sum())
    s_dd = root_nd.T @ root_nd
    e_d, u_dd = np.linalg.eigh(s_dd + ridge * np.trace(s_dd) / len(s_dd) * np.eye(len(s_dd)))
    views.append((root_nd, (u_dd / np.sqrt(e_d)) @ u_dd.T))
  (a_nd, p_dd), (b_nd, q_dd) = views
  u_dk, s_k, v_kd = np.linalg.svd(p_dd @ a_nd.T @ b_nd @ q_dd, full_matrices=False)
  k = min(int((w_n1 > 0).sum()) - 1, x_nd.shape[1], y_nd.shape[1])
  there_k = (s_k > 1e-9) & (
    np.arange(len(s_k)) < k
  )  # Directions without correlation get no gradient.
  u_dk, s_k, v_kd = u_dk[:, there_k], s_k[there_k], v_kd[there_k]

  def gradient(one_nd, other_nd, p_dd, q_dd, u_dk, v_dk):
    inner_dd = -0.5 * (p_dd @ u_dk * s_k) @ (p_dd @ u_dk).T
    g_nd = 2 * one_nd @ inner_dd + other_nd @ (q_dd @ v_dk) @ (p_dd @ u_dk).T
    g_nd = g_nd + 2 * np.trace(inner_dd) * ridge / len(p_dd) * one_nd
    g_nd = np.sqrt(w_n1) * (g_nd - np.sqrt(w_n1) * (np.sqrt(w_n1) * g_nd).sum(0) / w_n1.sum())
    return -g_nd / k

  return (
    -s_k.sum() / k,
    gradient(a_nd, b_nd, p_dd, q_dd, u_dk, v_kd.T),
    gradient(b_nd, a_nd, q_dd, p_dd, v_kd.T, u_dk),
  )


def pair(n, d1, d2, seed=0, shared=3, dtype=np.float32):
  """Two views with a few shared factors among independent noise."""
  rng = np.random.default_rng([seed, n, d1, d2])
  z_ns = rng.normal(size=(n, shared))
  x_nd, y_nd = (z_ns @ rng.normal(size=(shared, d)) + 2 * rng.normal(size=(n, d)) for d in (d1, d2))
  return x_nd.astype(dtype), y_nd.astype(dtype)


@functools.partial(jax.jit, static_argnums=4)
def jitted(x_nd, y_nd, weight_n, ridge, solver):
  return jax.value_and_grad(
    lambda x, y: cca_loss(x, y, weight_n=weight_n, ridge=ridge, solver=solver), argnums=(0, 1)
  )(x_nd, y_nd)


def loss_and_gradients(x_nd, y_nd, weight_n=None, *, ridge=1e-3, solver='eigh'):
  """One compilation for each shape and solver: tests share shapes, because compiling is what takes
  their time.
  """
  return jitted(
    x_nd,
    y_nd,
    jnp.ones(len(x_nd)) if weight_n is None else jnp.asarray(weight_n, jnp.float32),
    ridge,
    solver,
  )


spectrum = jax.jit(canonical_correlations)


def relative(value, expected):
  return np.linalg.norm(np.asarray(value, np.float64) - expected) / np.linalg.norm(expected)


def assert_matches(result, expected, *, value=1e-5, gradient=1e-3):
  loss, gradients = result
  assert relative(loss, expected[0]) <= value
  for got, want in zip(gradients, expected[1:], strict=True):
    assert relative(got, want) <= gradient


# Exactness.


SHAPES = [(3, 5, 5), (32, 256, 200), (64, 64, 64), (65, 64, 64), (200, 64, 48), (96, 8, 128)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('ridge', [1e-3, 0.1])
def test_value_and_gradient_match_float64(shape, ridge):
  x_nd, y_nd = pair(*shape)
  assert_matches(loss_and_gradients(x_nd, y_nd, ridge=ridge), oracle(x_nd, y_nd, ridge))
  for scale, shift in ((1e-4, 0), (1e4, 0), (1, 10), (1e4, 10)):
    moved_nd = (scale * (x_nd + shift * x_nd.std(0, keepdims=True))).astype(np.float32)
    assert_matches(loss_and_gradients(moved_nd, y_nd, ridge=ridge), oracle(moved_nd, y_nd, ridge))


@pytest.mark.parametrize('shape', [(32, 256, 200), (64, 64, 64)], ids=str)
def test_dominating_directions_match_float64(shape):
  """Most of the energy in three directions, as the channels of a language model have it."""
  rng = np.random.default_rng(0)
  x_nd, y_nd = pair(*shape)
  scale_d = np.where(np.arange(shape[1]) < 3, 30.0, rng.uniform(0.5, 2, shape[1]))[None, :]
  x_nd = (x_nd * scale_d).astype(np.float32)
  assert_matches(loss_and_gradients(x_nd, y_nd), oracle(x_nd, y_nd, 1e-3))


@pytest.mark.parametrize('shape', [(32, 256, 200), (200, 64, 48), (400, 160, 140)], ids=str)
def test_any_condition_number_matches_float64(shape):
  """Well-conditioned views go without eigenvectors; to either side of where that ends, and at it,
  the value is the same.
  """
  x_nd, y_nd = pair(*shape)
  left, _, right = np.linalg.svd(x_nd - x_nd.mean(0), full_matrices=False)
  for condition in (1, 4, 10, 20, 40, 80, 160, 1e3, 1e5):
    spectrum_k = np.geomspace(1, condition**-0.5, len(right))
    graded_nd = (left * spectrum_k @ right).astype(np.float32)
    assert_matches(loss_and_gradients(graded_nd, y_nd, ridge=0.1), oracle(graded_nd, y_nd, 0.1))


@pytest.mark.parametrize('scale', [1e-20, 1, 1e20])
def test_bound_of_the_norm_of_a_wide_matrix(scale):
  k, rng = 200, np.random.default_rng(0)
  q_kk = np.linalg.qr(rng.normal(size=(k, k)))[0]
  spectra = np.ones(k), np.eye(k)[0], np.arange(k) < 2, rng.random(k) ** 2, np.geomspace(1, 1e-6, k)
  for e_k in spectra:
    bound = linalg.norm_bound(jnp.asarray(scale * (q_kk * e_k) @ q_kk.T, jnp.float32))
    assert 0.99 * max(e_k) < bound / scale < 1.7 * max(e_k)
  assert not linalg.norm_bound(jnp.full((k, k), jnp.nan)) < np.inf


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_newton_schulz_is_the_same_function(shape):
  x_nd, y_nd = pair(*shape)
  assert_matches(
    loss_and_gradients(x_nd, y_nd, solver='newton_schulz'),
    oracle(x_nd, y_nd, 1e-3),
    value=2e-5,
    gradient=2e-3,
  )


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('shape', [(32, 256, 200), (200, 64, 48)], ids=str)
def test_fractional_weights_match_float64(shape, solver):
  x_nd, y_nd = pair(*shape)
  weight_n = np.random.default_rng(1).uniform(0, 3, shape[0]) * (np.arange(shape[0]) % 5 > 0)
  assert_matches(
    loss_and_gradients(x_nd, y_nd, jnp.asarray(weight_n), solver=solver),
    oracle(x_nd, y_nd, 1e-3, weight_n),
  )


def test_low_rank_under_a_large_ridge_matches_float64():
  """Such a view is whitened by Cholesky, like one of full rank. Of what centring has left in place
  of singular values of 0, no gradient.
  """
  for seed in range(8):
    rng = np.random.default_rng(seed)
    x_nd, y_nd = pair(9, 8, 8, seed=seed)
    # Whole numbers: of rank 2 exactly.
    x_nd = np.round(2 * x_nd[:, :2]) @ rng.integers(-3, 4, (2, 8)).astype(np.float32)
    for weight_n in (rng.uniform(0.1, 3, 9), 10 ** rng.uniform(-4, 0, 9)):
      weight_n = weight_n.astype(np.float32)
      expected = oracle(x_nd, y_nd, 0.1, weight_n)
      assert_matches(loss_and_gradients(x_nd, y_nd, weight_n, ridge=0.1), expected)


def test_gradient_matches_central_differences():
  x_nd, y_nd = pair(32, 256, 200)
  direction_nd = np.random.default_rng(2).normal(size=x_nd.shape)
  plus, minus = (oracle(x_nd + step * direction_nd, y_nd, 0.01)[0] for step in (1e-6, -1e-6))
  _, (dx_nd, _) = loss_and_gradients(x_nd, y_nd, ridge=0.01)
  assert np.sum(np.asarray(dx_nd) * direction_nd) == pytest.approx((plus - minus) / 2e-6, rel=1e-3)


@pytest.mark.parametrize('solver', SOLVERS)
def test_scale_shift_rotation_and_order_do_not_matter(solver):
  x_nd, y_nd = pair(65, 64, 64)
  rotation_dd = np.linalg.qr(np.random.default_rng(3).normal(size=(64, 64)))[0]
  order_n = np.random.default_rng(4).permutation(65)
  loss, (dx_nd, _) = loss_and_gradients(x_nd, y_nd, solver=solver)
  moved = [
    (7.5e-4 * x_nd, y_nd),
    (x_nd + 10, y_nd - 3),
    (x_nd @ rotation_dd, y_nd),
    (x_nd[order_n], y_nd[order_n]),
    (-x_nd, y_nd),
  ]
  for x2_nd, y2_nd in moved:
    assert (
      relative(loss_and_gradients(np.float32(x2_nd), np.float32(y2_nd), solver=solver)[0], loss)
      <= 1e-5
    )
  assert relative(loss_and_gradients(y_nd, x_nd, solver=solver)[0], loss) <= 1e-6
  assert abs(np.sum(dx_nd * (x_nd - x_nd.mean(0, keepdims=True)))) <= 1e-5 * np.linalg.norm(
    dx_nd
  ) * np.linalg.norm(x_nd)
  assert np.abs(dx_nd.sum(0)).max() <= 1e-5 * np.linalg.norm(dx_nd)


@pytest.mark.parametrize('shape', [(3, 5, 5), (32, 1024, 1024), (96, 8, 8)], ids=str)
def test_value_never_exceeds_the_number_of_directions(shape):
  for ridge in (0.0, 1e-6, 1e-3):
    x_nd, _ = pair(*shape)
    s_k = np.asarray(spectrum(x_nd, x_nd, ridge=ridge))
    assert s_k.sum() <= min(shape[0] - 1, *shape[1:]) * (1 + 1e-6) and s_k.max() <= 1


def test_equals_linear_cca_as_the_ridge_vanishes():
  cross = pytest.importorskip('sklearn.cross_decomposition')
  x_nd, y_nd = pair(400, 6, 5)
  s_k = np.asarray(spectrum(x_nd, y_nd, ridge=1e-9))
  model = cross.CCA(n_components=3, max_iter=2000, tol=1e-10).fit(x_nd, y_nd)
  a_nk, b_nk = model.transform(x_nd, y_nd)
  np.testing.assert_allclose(
    s_k[:3], [np.corrcoef(a_nk[:, i], b_nk[:, i])[0, 1] for i in range(3)], atol=2e-4
  )
  loss, _ = loss_and_gradients(x_nd, y_nd, ridge=1e-9)
  np.testing.assert_allclose(s_k.mean(), -np.float32(loss), rtol=1e-5)


def test_equals_cca_zoo_as_the_ridge_vanishes():
  linear = pytest.importorskip('cca_zoo.linear')
  x_nd, y_nd = (view_nd.astype(np.float64) for view_nd in pair(400, 6, 5))
  model = linear.CCA(n_components=4).fit([x_nd, y_nd])
  a_nk, b_nk = model.transform([x_nd, y_nd])
  expected = [np.corrcoef(np.asarray(a_nk)[:, i], np.asarray(b_nk)[:, i])[0, 1] for i in range(4)]
  np.testing.assert_allclose(
    np.asarray(spectrum(x_nd, y_nd, ridge=1e-9))[:4], np.abs(expected), atol=1e-4
  )


# Absent and padded rows, layers, types, mistakes.


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize(
  ('shape', 'present'),
  [((32, 256, 200), 20), ((65, 64, 64), 40), ((200, 64, 48), 150), ((200, 64, 48), 30)],
)
def test_rows_of_weight_zero_are_not_there(shape, present, solver):
  """Also where the rows alone would be computed in another space (n < d) than with their
  padding.
  """
  x_nd, y_nd = pair(*shape)
  is_present_n = np.isin(
    np.arange(shape[0]), np.random.default_rng(5).permutation(shape[0])[:present]
  )
  expected = oracle(x_nd[is_present_n], y_nd[is_present_n], 1e-3)
  x_nd[~is_present_n], y_nd[~is_present_n] = np.nan, np.inf
  loss, gradients = loss_and_gradients(x_nd, y_nd, is_present_n, solver=solver)
  assert_matches((loss, [g_nd[is_present_n] for g_nd in gradients]), expected)
  assert not any(np.any(g_nd[~is_present_n]) for g_nd in gradients)


def test_layers_are_a_batch_axis():
  x_lnd, y_lnd = (
    np.stack(views)
    for views in zip(*(pair(10, 16, 12, seed=seed) for seed in range(3)), strict=True)
  )
  weight_n = jnp.arange(10) > 1
  loss_l, pull_back = jax.vjp(jax.jit(lambda x: cca_loss(x, y_lnd, weight_n=weight_n)), x_lnd)
  (gradient_lnd,) = pull_back(jnp.asarray([1.0, 0.0, 2.0]))
  for l, share in enumerate((1, 0, 2)):
    expected_loss, expected_nd, _ = oracle(x_lnd[l, 2:], y_lnd[l, 2:], 1e-3)
    np.testing.assert_allclose(loss_l[l], expected_loss, rtol=1e-5)
    np.testing.assert_allclose(
      gradient_lnd[l, 2:], share * expected_nd, atol=1e-3 * np.abs(expected_nd).max()
    )
  assert spectrum(x_lnd, y_lnd).shape == (3, 10)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_is_cast_up_first(dtype):
  x_nd, y_nd = (jnp.asarray(view_nd, dtype) for view_nd in pair(200, 64, 48))
  loss, (dx_nd, dy_nd) = loss_and_gradients(x_nd, y_nd)
  assert loss.dtype == jnp.float32 and dx_nd.dtype == dy_nd.dtype == dtype
  assert_matches(
    (loss, (dx_nd, dy_nd)),
    oracle(x_nd.astype(jnp.float32), y_nd.astype(jnp.float32), 1e-3),
    gradient=1e-2,
  )
  for spoiler in sorted(SPOILERS):
    spoiled_nd = SPOILERS[spoiler](np.asarray(x_nd, np.float32), np.random.default_rng(0))
    largest = float(jnp.finfo(dtype).max)
    loss, gradients = loss_and_gradients(
      jnp.asarray(np.clip(spoiled_nd, -largest, largest), dtype), y_nd
    )
    assert -1 <= loss <= 0 and all(bool(jnp.isfinite(g_nd).all()) for g_nd in gradients)


@pytest.mark.parametrize(
  'arguments',
  [
    {'y_nd': np.zeros((5, 3))},
    {'x_nd': np.zeros(4)},
    {'weight_n': np.ones(3)},
    {'solver': 'qr'},
    {'ridge': -1.0},
    {'ridge': float('nan')},
  ],
  ids=lambda a: next(iter(a)),
)
def test_mistakes_are_named(arguments):
  with pytest.raises(ValueError, match=r'^cca: '):
    cca_loss(**({'x_nd': np.zeros((4, 3)), 'y_nd': np.zeros((4, 3))} | arguments))


# Near the ends of float32.


@pytest.mark.parametrize(
  ('weak', 'light', 'exponent'), [(1, 1e-8, -120), (1e-4, 1, 124)], ids=['tiny', 'huge']
)
def test_gradient_in_range_of_a_view_whose_inverse_norm_is_not(weak, light, exponent):
  """A view 2^k times as large has a gradient 2^k times as small.

  Rows of small weight make the norm smaller than a gradient's inverse, weak directions larger.
  """
  x_nd, y_nd = pair(9, 8, 8)
  x_nd[:, 1:] *= weak
  weight_n = np.where(np.arange(len(x_nd)) == 0, 1, light)
  results = [
    loss_and_gradients(np.ldexp(x_nd, k), y_nd, weight_n, ridge=1e-10) for k in (0, exponent)
  ]
  (loss, (dx_nd, dy_nd)), (scaled_loss, (scaled_dx_nd, scaled_dy_nd)) = results
  assert scaled_loss == loss and np.array_equal(scaled_dy_nd, dy_nd)
  scaled_dx_nd = np.ldexp(np.asarray(scaled_dx_nd, np.float64), exponent)
  # A CPU flushes single entries to 0.
  assert relative(scaled_dx_nd, np.asarray(dx_nd, np.float64)) <= 1e-4


@pytest.mark.parametrize('shape', [(9, 8, 8), (32, 256, 200)], ids=str)
def test_a_constant_column_does_not_matter_however_large(shape):
  """Nor does it take the place of its view in float32's range."""
  x_nd, y_nd = pair(*shape)
  x_nd = np.ldexp(x_nd, -20)
  x_nd[:, 1] = 0
  expected, expected_gradients = loss_and_gradients(x_nd, y_nd)
  assert expected < 0
  x_nd[:, 1] = -np.finfo(np.float32).max
  loss, gradients = loss_and_gradients(x_nd, y_nd)
  assert loss == expected
  for g_nd, expected_nd in zip(gradients, expected_gradients, strict=True):
    assert np.array_equal(g_nd, expected_nd)


# Always finite.


def assert_finite(x_nd, y_nd, weight_n=None):
  for solver in SOLVERS:
    loss, gradients = loss_and_gradients(x_nd, y_nd, weight_n, solver=solver)
    assert -1 <= loss <= 0
    assert all(bool(jnp.isfinite(g_nd).all()) for g_nd in gradients)
  return loss_and_gradients(x_nd, y_nd, weight_n)


SPOILERS = {
  'nothing': lambda v, rng: v,
  'zeros': lambda v, rng: 0 * v,
  'constant rows': lambda v, rng: np.repeat(v[:1], len(v), axis=0),
  'all one number': lambda v, rng: np.full_like(v, 0.1),
  'duplicate rows': lambda v, rng: v[rng.integers(0, len(v), len(v))],
  'one direction': lambda v, rng: v[:, :1] * rng.normal(size=(1, v.shape[1])).astype(np.float32),
  'huge': lambda v, rng: v * np.float32(1e37),
  'tiny': lambda v, rng: v * np.float32(1e-36),
  'largest': lambda v, rng: np.sign(v) * np.finfo(np.float32).max,
  'far away': lambda v, rng: v + np.float32(1e6),
  'mixed scales': lambda v, rng: (
    v * (10.0 ** rng.integers(-30, 30, (1, v.shape[1]))).astype(np.float32)
  ),
  'binary': lambda v, rng: (v > 1).astype(np.float32),
}


@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
  shape=st.sampled_from([(3, 5, 5), (9, 8, 8), (12, 8, 20)]),
  spoil=st.tuples(st.sampled_from(sorted(SPOILERS)), st.sampled_from(sorted(SPOILERS))),
  identical=st.booleans(),
  dtype=st.sampled_from([np.float32, jnp.bfloat16, np.float16]),
  present=st.sampled_from([0, 1, 2, 3, 5, 100]),
  seed=st.integers(0, 10),
)
def test_always_finite(shape, spoil, identical, dtype, present, seed):
  rng = np.random.default_rng(seed)
  views = [
    SPOILERS[name](view_nd, rng)
    for name, view_nd in zip(spoil, pair(*shape, seed=seed), strict=True)
  ]
  if identical and shape[1] == shape[2]:
    views[1] = views[0]
  largest = float(jnp.finfo(dtype).max)
  views = [
    np.clip(view_nd, -largest, largest).astype(dtype).astype(np.float32) for view_nd in views
  ]
  assert_finite(*views, rng.permutation(shape[0]) < present)


@pytest.mark.parametrize('shape', [(32, 256, 200), (200, 64, 48)], ids=str)
@pytest.mark.parametrize('spoiler', sorted(SPOILERS))
def test_finite_at_real_sizes(shape, spoiler):
  x_nd, y_nd = pair(*shape)
  assert_finite(jnp.asarray(SPOILERS[spoiler](x_nd, np.random.default_rng(0))), y_nd)


@pytest.mark.parametrize('shape', [(32, 256, 200), (200, 64, 48)], ids=str)
@pytest.mark.parametrize(
  ('spoil', 'present'),
  [
    (lambda v: 0 * v, 300),
    (lambda v: 0 * v + np.float32(0.3), 300),
    (lambda v: 0 * v + v[:1], 300),
    (lambda v: v, 2),
    (lambda v: v, 1),
    (lambda v: v, 0),
  ],
  ids=['zero view', 'one number', 'constant rows', 'two rows', 'one row', 'no row'],
)
def test_what_is_undefined_is_zero(shape, spoil, present):
  x_nd, y_nd = pair(*shape)
  loss, gradients = assert_finite(spoil(x_nd), y_nd, np.arange(shape[0]) < present)
  assert loss == 0 and not any(np.any(g_nd) for g_nd in gradients)


def test_duplicated_rows_are_one_direction_less():
  """Each row twice in both views: the value of the distinct rows, over the directions of all rows,
  and no gradient from rounding.
  """
  x_nd, y_nd = (np.repeat(view_nd[:16], 2, axis=0) for view_nd in pair(32, 256, 200))
  loss, (dx_nd, _) = loss_and_gradients(x_nd, y_nd, np.arange(32) % 2)
  twice, (dx2_nd, _) = loss_and_gradients(x_nd, y_nd)
  np.testing.assert_allclose(twice, loss * 15 / 31, rtol=1e-5)
  assert np.abs(dx2_nd).max() < np.abs(dx_nd).max()


@pytest.mark.parametrize('shape', [(30, 256, 200), (200, 64, 48)], ids=str)
def test_duplicates_are_as_in_float64(shape):
  """Of rows and of columns: singular values of rounding beside small true ones, in whose
  eigenvectors they mix.
  """
  for seed in range(4):
    x_nd, y_nd = pair(*shape, seed=seed)
    x_nd *= np.geomspace(1, 1e-3, shape[1], dtype=np.float32)[None, :]
    x_nd[1], x_nd[:, 40:60] = x_nd[0], x_nd[:, :20]
    loss, gradients = loss_and_gradients(x_nd, y_nd)
    want_loss, *want_gradients = oracle(x_nd, y_nd, 1e-3)
    assert relative(loss, want_loss) <= 1e-5
    for got_nd, want_nd in zip(gradients, want_gradients, strict=True):
      assert relative(got_nd, want_nd) <= 2e-3


@pytest.mark.parametrize(
  'shape', [(24, 40, 36), (90, 20, 16)], ids=str
)  # Of no other test: `lax.cond` keeps what it has traced.
def test_a_decomposition_that_fails(monkeypatch, shape):
  """As LAPACK's divide and conquer now and then does on a matrix like any other: all it returns is
  NaN.
  """
  svd = jnp.linalg.svd
  monkeypatch.setattr(
    jnp.linalg, 'svd', lambda a_kj, **how: jax.tree.map(lambda m: m * jnp.nan, svd(a_kj, **how))
  )
  x_nd, y_nd = pair(*shape)
  x_nd[1::2], y_nd[1::3] = x_nd[::2], y_nd[:1]  # Duplicates: singular values of 0 among those of 1.
  loss, gradients = jax.jit(jax.value_and_grad(cca_loss, argnums=(0, 1)))(x_nd, y_nd)
  want_loss, *want_gradients = oracle(x_nd, y_nd, 1e-3)
  assert relative(loss, want_loss) <= 1e-5
  for got_nd, want_nd in zip(gradients, want_gradients, strict=True):
    assert relative(got_nd, want_nd) <= 1e-3
  correlations_k = np.asarray(jax.jit(canonical_correlations)(x_nd, y_nd))
  count = min(shape[0] - 1, *shape[1:])
  assert relative(correlations_k.sum(), -count * want_loss) <= 1e-5
  directions = jax.jit(fit_directions)(x_nd, y_nd)
  x_nk, y_nk = (
    (v - v.mean(0)) @ np.asarray(w, np.float64)
    for v, w in ((x_nd, directions.x_dk), (y_nd, directions.y_dk))
  )
  np.testing.assert_allclose((x_nk * y_nk).sum(0), correlations_k, atol=1e-4)
  squares_k = np.linalg.svd(x_nd - x_nd.mean(0), compute_uv=False) ** 2
  share_k = squares_k[squares_k > 0] / squares_k.sum()
  rank = jax.jit(effective_rank)(x_nd)
  assert rank == pytest.approx(np.exp(-np.sum(share_k * np.log(share_k))), rel=1e-5)


def test_identical_views_correlate_fully():
  x_nd, _ = pair(96, 8, 8)
  np.testing.assert_allclose(spectrum(x_nd, x_nd, ridge=1e-6), 1, atol=1e-5)


# Sharded.


@pytest.mark.parametrize(
  ('num_devices', 'shape', 'solver'),
  [
    (2, (32, 256, 200), 'eigh'),
    (4, (32, 256, 200), 'eigh'),
    (2, (200, 64, 48), 'eigh'),
    (4, (200, 64, 48), 'newton_schulz'),
  ],
  ids=str,
)
def test_statistics_are_those_of_the_global_batch(num_devices, shape, solver):
  x_nd, y_nd = pair(*shape)
  weight_n = jnp.asarray(np.arange(shape[0]) % 7 > 0, jnp.float32)
  mesh = jax.make_mesh(
    (num_devices,), ('data',), devices=jax.devices()[:num_devices], axis_types=(AxisType.Auto,)
  )
  place = lambda array: jax.device_put(array, NamedSharding(mesh, P('data')))  # noqa: E731

  @jax.jit
  def gathered(x_nd, y_nd, weight_n):
    """All rows on each device, by one collective."""
    whole_nd = jnp.concatenate([x_nd, y_nd, weight_n[:, None]], axis=1)
    whole_nd = sharding.gather_rows(mesh)(whole_nd[None])[0]
    x_nd, y_nd, weight_n1 = jnp.split(whole_nd, (shape[1], shape[1] + shape[2]), axis=1)
    return jitted(x_nd, y_nd, weight_n1[:, 0], 1e-3, solver)

  single = loss_and_gradients(x_nd, y_nd, weight_n, solver=solver)
  sharded = gathered(place(x_nd), place(y_nd), place(weight_n))
  for got, want in zip(jax.tree.leaves(sharded), jax.tree.leaves(single), strict=True):
    assert relative(got, want) <= 1e-6
