"""Estimators: what the memory counts, how its gradient flows, that its state is exact, and that it learns planted correlations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from molt_jax.objectives import cca_diagnostics
from molt_jax.objectives.cca import canonical_correlations, cca_loss
from molt_jax.objectives.cca_estimators import make_estimator

LAYERS, BATCH, WIDTH, K, SLOTS = 2, 8, 12, 3, 40
ESTIMATOR = make_estimator('memory', num_directions=K, memory_size=SLOTS)
STEP = jax.jit(ESTIMATOR.loss)
fit_directions, held_out_correlations, effective_rank, modality_gap = map(
  jax.jit, (cca_diagnostics.fit_directions, cca_diagnostics.held_out_correlations, cca_diagnostics.effective_rank, cca_diagnostics.modality_gap)
)


def batch(seed, n=BATCH):
  rng = np.random.default_rng(seed)
  x_lbd, y_lbd = rng.normal(size=(2, LAYERS, n, WIDTH)).astype(np.float32)
  return x_lbd, (x_lbd + y_lbd).astype(np.float32), (np.arange(n) != seed % n).astype(np.float32)


def run(steps, state=None):
  state = ESTIMATOR.init(LAYERS, WIDTH) if state is None else state
  for seed in steps:
    loss, state, aux = STEP(state, *batch(seed))
  return loss, state, aux


def test_memory_is_the_cca_of_everything_it_has_seen():
  loss, state, aux = run(range(4))
  seen = [np.concatenate(parts, axis=-1 if i == 2 else 1) for i, parts in enumerate(zip(*(batch(seed) for seed in range(4)), strict=True))]
  projected = [np.einsum('lbd,ldk->lbk', view, state[f'projection_{name}_ldk']) for name, view in zip('xy', seen[:2], strict=True)]
  expected_l = jax.jit(cca_loss)(*projected, weight_n=seen[2])
  np.testing.assert_allclose(loss, expected_l.mean(), rtol=1e-5)
  np.testing.assert_allclose(aux['correlation'], -expected_l, rtol=1e-5)
  assert state['weight_m'].sum() == 4 * (BATCH - 1)


def test_oldest_pairs_leave_first():
  _, long, _ = run(range(12))
  _, short, _ = run(range(7, 12))
  for name in ('x_lmk', 'y_lmk', 'weight_m'):
    np.testing.assert_array_equal(long[name], short[name])


def test_resumed_state_goes_on_bit_for_bit():
  whole = run(range(9))
  first = jax.tree.map(lambda array: jnp.asarray(np.array(array)), run(range(4))[1])
  jax.tree.map(np.testing.assert_array_equal, whole, run(range(4, 9), first))


def test_absent_rows_are_not_read_and_do_not_count():
  _, state, _ = run(range(3))
  x_lbd, y_lbd, weight_b = batch(3)
  x_lbd[:, weight_b == 0], y_lbd[:, weight_b == 0] = np.nan, np.inf
  spoiled = STEP(state, x_lbd, y_lbd, weight_b)
  jax.tree.map(np.testing.assert_array_equal, spoiled, STEP(state, *batch(3)))
  loss, after, _ = STEP(state, x_lbd, y_lbd, np.zeros(BATCH, np.float32))
  assert np.isfinite(loss) and after['weight_m'].sum() == state['weight_m'].sum()


def test_gradient_is_that_of_the_current_rows_times_all_over_current_weight():
  _, state, _ = run(range(3))
  x_lbd, y_lbd, weight_b = batch(3)
  projection = state['projection_x_ldk']
  y_lnk = jnp.concatenate([jnp.einsum('lbd,ldk->lbk', y_lbd, state['projection_y_ldk']), state['y_lmk']], axis=1)
  weight_n = jnp.concatenate([weight_b, state['weight_m']])

  def whole(x_lnk):
    return cca_loss(x_lnk, y_lnk, weight_n=weight_n).mean()

  x_lnk = jnp.concatenate([jnp.einsum('lbd,ldk->lbk', x_lbd, projection), state['x_lmk']], axis=1)
  gain = weight_n.sum() / weight_b.sum()
  expected_lbd = gain * jnp.einsum('lbk,ldk->lbd', jax.jit(jax.grad(whole))(x_lnk)[:, :BATCH], projection)
  gradient_lbd = jax.jit(jax.grad(lambda x: ESTIMATOR.loss(state, x, y_lbd, weight_b)[0]))(x_lbd)
  np.testing.assert_allclose(gradient_lbd, expected_lbd, atol=1e-4 * np.abs(expected_lbd).max())


def test_sharded_batch_gives_the_single_device_result():
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  x_lbd, y_lbd, weight_b = batch(3)
  place = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, P(*spec)))  # noqa: E731
  _, state, _ = run(range(3))
  got = STEP(place(state), place(x_lbd, None, 'data'), place(y_lbd, None, 'data'), place(weight_b, 'data'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, STEP(state, x_lbd, y_lbd, weight_b))


def test_batch_estimator_is_the_plain_loss():
  estimator = make_estimator('batch')
  x_lbd, y_lbd, weight_b = batch(0)
  loss, state, aux = jax.jit(estimator.loss)(estimator.init(LAYERS, WIDTH), x_lbd, y_lbd, weight_b)
  np.testing.assert_allclose(loss, jax.jit(cca_loss)(x_lbd, y_lbd, weight_n=weight_b).mean(), rtol=1e-6)
  assert state == {} and aux['correlation'].shape == (LAYERS,)


@pytest.mark.parametrize('arguments', [('mean', {}), ('memory', {'num_directions': 0}), ('memory', {'memory_size': -1})], ids=str)
def test_mistakes_are_named(arguments):
  with pytest.raises(ValueError, match=r'^cca: '):
    make_estimator(arguments[0], **arguments[1])
  with pytest.raises(ValueError, match='at most the width 12'):
    make_estimator('memory').init(1, WIDTH)


# Signal.


def sample(key, n, width, rho_1k):
  """Pairs whose first coordinates correlate by `rho_1k`, the others not at all."""
  a_nd, e_nd = jax.random.normal(key, (2, n, width))
  rho_1d = jnp.pad(rho_1k, ((0, 0), (0, width - rho_1k.shape[1])))
  return a_nd, rho_1d * a_nd + jnp.sqrt(1 - rho_1d**2) * e_nd


def test_independent_views_read_near_zero_where_the_batch_reads_one():
  estimator = make_estimator('memory')
  step = jax.jit(estimator.loss)
  state = estimator.init(1, 256)
  held_out = []
  for i in range(3):
    x_nd, y_nd = sample(jax.random.key(i), 4096, 256, jnp.zeros((1, 1)))
    _, state, aux = step(state, x_nd[None], y_nd[None])
    held_out.append(float(aux['held_out_correlation'][0]))
  assert aux['correlation'][0] <= 0.05
  assert np.abs(held_out).max() <= 0.03 and held_out[0] == 0
  assert jnp.mean(canonical_correlations(x_nd[:64], y_nd[:64])[:63]) > 0.99


def test_linear_encoders_find_planted_directions():
  """Batch 64 in width 96: the memory reaches the population's sum, which the batch alone never sees."""
  width, rho_1k, steps = 96, jnp.asarray([[0.9, 0.7, 0.5]]), 700
  estimator = make_estimator('memory', num_directions=4, memory_size=2048)
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

  def step(carry, i):
    params, moments, state = carry
    x_bd, y_bd = sample(jax.random.fold_in(jax.random.key(0), i), 64, width, rho_1k)

    def loss(params):
      value, state_, _ = estimator.loss(state, (x_bd @ params[0])[None], (y_bd @ params[1])[None])
      return value, state_

    gradients, state = jax.grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(gradients, moments)
    return (optax.apply_updates(params, updates), moments, state), None

  params = jax.random.normal(jax.random.key(1), (2, width, width)) / width**0.5
  carry = params, optimizer.init(params), estimator.init(1, width)
  (params, _, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))(carry)
  fit, measure = (
    [v @ p @ state[f'projection_{name}_ldk'][0] for name, v, p in zip('xy', sample(jax.random.key(seed), 8192, width, rho_1k), params, strict=True)]
    for seed in (2, 3)
  )
  assert float(held_out_correlations(fit_directions(*fit), *measure).sum()) >= 0.95 * float(rho_1k.sum())


# Diagnostics.


def test_fitted_directions_reproduce_the_training_correlations_and_ignore_absent_rows():
  x_nd, y_nd = (np.array(v) for v in sample(jax.random.key(0), 300, 6, jnp.asarray([[0.9, 0.5]])))
  weight_n = np.arange(300) < 250
  expected_k = canonical_correlations(x_nd[:250], y_nd[:250], ridge=1e-8)
  x_nd[250:] = np.nan
  directions = fit_directions(x_nd, y_nd, weight_n=jnp.asarray(weight_n), ridge=1e-8)
  np.testing.assert_allclose(held_out_correlations(directions, x_nd, y_nd, weight_n=jnp.asarray(weight_n)), expected_k, atol=1e-4)
  u_nk = (x_nd[:250] - directions.mean_x_d[None, :]) @ directions.x_dk
  np.testing.assert_allclose(u_nk.T @ u_nk, np.eye(6), atol=1e-3)


def test_effective_rank_and_modality_gap():
  rng = np.random.default_rng(0)
  one_nd = rng.normal(size=(50, 1)) * rng.normal(size=(1, 8))
  assert effective_rank(jnp.asarray(one_nd)) == pytest.approx(1, abs=0.01)
  assert effective_rank(jnp.asarray(np.concatenate([np.eye(8), -np.eye(8)]))) == pytest.approx(8, rel=1e-5)
  assert effective_rank(jnp.ones((5, 4))) == 0
  x_nd, y_nd = jnp.tile(jnp.asarray([[3.0, 0.0]]), (4, 1)), jnp.tile(jnp.asarray([[0.0, 7.0]]), (4, 1))
  assert modality_gap(x_nd, y_nd) == pytest.approx(2**0.5)
  assert modality_gap(x_nd, x_nd.at[0].set(jnp.nan), weight_n=jnp.arange(4) > 0) == pytest.approx(0, abs=1e-6)
