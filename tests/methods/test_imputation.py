"""The map that translates an absent modality, against ridge regression (scikit-learn) and against
the canonical form in float64 NumPy.
"""

import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from molt_jax.methods.parts.imputation import CrossModalImputation, Moments

LAYERS, ROWS, WIDTH, RIDGE = 2, 60, 7, 1e-3


@pytest.fixture(scope='module')
def pairs():
  """x, y float32[L, N, C] with canonical correlations of their own in each layer, far from centred,
  and weights with rows that must not be read.
  """
  rng = np.random.default_rng(0)
  shared = rng.normal(size=(LAYERS, ROWS, WIDTH))
  mix_x, mix_y = rng.normal(size=(2, LAYERS, WIDTH, WIDTH))
  x_lnc = shared @ mix_x + 5 * rng.normal(size=(LAYERS, 1, WIDTH))
  y_lnc = (shared * np.linspace(1, 0.1, WIDTH) + rng.normal(size=(LAYERS, ROWS, WIDTH))) @ mix_y - 3
  weight_n = (rng.random(ROWS) < 0.8).astype(np.float32)
  x_lnc[:, weight_n == 0] = np.nan
  return x_lnc.astype(np.float32), y_lnc.astype(np.float32), weight_n


def moments(pairs, cuts, put=lambda x: x):
  m, update = Moments.empty(LAYERS, WIDTH), jax.jit(Moments.update)
  for part in np.split(np.arange(ROWS), cuts):
    m = update(m, *(put(view_lnc[:, part]) for view_lnc in pairs[:2]), pairs[2][part])
  return m


def live(pairs, layer):
  x_lnc, y_lnc, weight_n = pairs
  return (view_lnc[layer, weight_n > 0].astype(np.float64) for view_lnc in (x_lnc, y_lnc))


@pytest.mark.parametrize('cuts', [[], [20, 40], [1, 2, 59]])
def test_the_map_is_ridge_regression_whatever_the_batches(pairs, cuts):
  fitted = moments(pairs, cuts).solve(ridge=RIDGE)
  for layer in range(LAYERS):
    x_nc, y_nc = live(pairs, layer)
    centred_nc = x_nc - x_nc.mean(0)
    oracle = Ridge(alpha=RIDGE * np.trace(centred_nc.T @ centred_nc) / WIDTH).fit(x_nc, y_nc)
    np.testing.assert_allclose(
      x_nc @ fitted['kernel_lcc'][layer] + fitted['bias_lc'][layer],
      oracle.predict(x_nc),
      rtol=2e-4,
      atol=2e-4,
    )


def test_the_map_shrinks_each_canonical_direction_by_its_correlation(pairs):
  fitted = moments(pairs, [30]).solve(ridge=RIDGE)
  for layer in range(LAYERS):
    x_nc, y_nc = (view_nc - view_nc.mean(0) for view_nc in live(pairs, layer))

    def root(view_nc, power):
      s_cc = view_nc.T @ view_nc
      e_c, u_cc = np.linalg.eigh(s_cc + RIDGE * np.trace(s_cc) / WIDTH * np.eye(WIDTH))
      return (u_cc * e_c**power) @ u_cc.T

    u_ck, rho_k, v_kc = np.linalg.svd(root(x_nc, -0.5) @ x_nc.T @ y_nc @ root(y_nc, -0.5))
    assert rho_k.min() < 0.1 and 0.6 < rho_k.max() < 1
    canonical_cc = root(x_nc, -0.5) @ (u_ck * rho_k) @ v_kc @ root(y_nc, 0.5)
    np.testing.assert_allclose(fitted['kernel_lcc'][layer], canonical_cc, rtol=1e-3, atol=1e-4)


def test_moments_of_a_batch_sharded_over_devices_are_those_of_the_whole(pairs):
  rows = jax.NamedSharding(
    jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)), jax.P(None, 'data')
  )
  whole = moments(pairs, [20])
  sharded = moments(pairs, [20], put=lambda x_lnc: jax.device_put(x_lnc, rows))
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-3), sharded, whole)


def test_a_constant_view_predicts_the_mean():
  x_lnc, y_lnc = np.ones((1, 5, 3), np.float32), np.arange(15, dtype=np.float32).reshape(1, 5, 3)
  fitted = Moments.empty(1, 3).update(x_lnc, y_lnc, np.ones(5, np.float32)).solve(ridge=RIDGE)
  np.testing.assert_allclose(
    x_lnc @ fitted['kernel_lcc'] + fitted['bias_lc'][:, None],
    np.broadcast_to(y_lnc.mean(1, keepdims=True), (1, 5, 3)),
  )


def test_only_gaps_are_filled_and_none_before_the_fit(pairs):
  x_lnc, y_lnc = np.nan_to_num(pairs[0][:, :4]), pairs[1][:, :4]
  available_nm = np.array([[True, True], [True, False], [False, True], [False, False]])
  module = CrossModalImputation(LAYERS, WIDTH)
  variables = module.init(jax.random.key(0), x_lnc, y_lnc, available_nm)
  image, text, available = module.apply(variables, x_lnc, y_lnc, available_nm)
  for got, expected in ((image, x_lnc), (text, y_lnc), (available, available_nm)):
    np.testing.assert_array_equal(got, expected)
  fitted = moments(pairs, []).solve(ridge=RIDGE)
  maps = {
    'to_text': fitted,
    'to_image': {name: -value for name, value in fitted.items()},
    'pairs': np.float32(60),
  }
  image, text, available = module.apply({'statistics': maps}, x_lnc, y_lnc, available_nm)
  np.testing.assert_array_equal(available, [[True, True]] * 3 + [[False, False]])
  np.testing.assert_array_equal(image[:, [0, 1, 3]], x_lnc[:, [0, 1, 3]])
  np.testing.assert_array_equal(text[:, [0, 2, 3]], y_lnc[:, [0, 2, 3]])

  def predict(x_lc):
    return np.einsum('lc,lce->le', x_lc, fitted['kernel_lcc']) + fitted['bias_lc']

  np.testing.assert_allclose(text[:, 1], predict(x_lnc[:, 1]), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(image[:, 2], -predict(y_lnc[:, 2]), rtol=1e-4, atol=1e-4)
