"""Estimators: what the moving average counts, how its gradient flows, that its state is exact, and
that it learns planted correlations.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from molt_jax.objectives.cca import diagnostics
from molt_jax.objectives.cca.estimators import make_estimator
from molt_jax.objectives.cca.loss import canonical_correlations, cca_loss
from molt_jax.profiling import collectives
from molt_jax.runtime import sharding

LAYERS, BATCH, WIDTH, K, WINDOW = 2, 8, 12, 3, 40
ESTIMATOR = make_estimator('moving_average', num_directions=K, window=WINDOW)
STEP = jax.jit(ESTIMATOR.loss)
fit_directions, held_out_correlations, effective_rank, modality_gap = map(
  jax.jit,
  (
    diagnostics.fit_directions,
    diagnostics.held_out_correlations,
    diagnostics.effective_rank,
    diagnostics.modality_gap,
  ),
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


def project(state, name, view_lbd):
  return jnp.einsum('lbd,ldk->lbk', view_lbd, state[f'projection_{name}_ldk'], precision='highest')


def test_is_the_cca_of_everything_it_has_seen():
  """With weights that decay by 1 - 7/40 a step."""
  loss, state, aux = run(range(4))
  x_lnd, y_lnd, weight_n = (
    np.concatenate(parts, axis=0 if i == 2 else 1)
    for i, parts in enumerate(zip(*map(batch, range(4)), strict=True))
  )
  weight_n = weight_n * np.repeat((1 - (BATCH - 1) / WINDOW) ** np.arange(3, -1, -1), BATCH)
  expected_l = jax.jit(cca_loss)(
    project(state, 'x', x_lnd), project(state, 'y', y_lnd), weight_n=weight_n
  )
  np.testing.assert_allclose(loss, expected_l.mean(), rtol=1e-4)
  np.testing.assert_allclose(aux['correlation'], -expected_l, rtol=1e-4)


def test_resumed_state_goes_on_bit_for_bit():
  whole = run(range(9))
  first = jax.tree.map(lambda array: jnp.asarray(np.array(array)), run(range(4))[1])
  jax.tree.map(np.testing.assert_array_equal, whole, run(range(4, 9), first))


def test_absent_rows_are_not_read_and_do_not_count():
  _, state, _ = run(range(3))
  x_lbd, y_lbd, weight_b = batch(3)
  x_lbd[:, weight_b == 0], y_lbd[:, weight_b == 0] = np.nan, np.inf
  jax.tree.map(
    np.testing.assert_array_equal, STEP(state, x_lbd, y_lbd, weight_b), STEP(state, *batch(3))
  )
  loss, after, _ = STEP(state, x_lbd, y_lbd, np.zeros(BATCH, np.float32))
  assert np.isfinite(loss)
  assert after['past']['weight'] == state['past']['weight']


def test_identical_zero_and_badly_scaled_views_stay_finite():
  x_lbd, _, weight_b = batch(0)
  for views in ((x_lbd, x_lbd), (0 * x_lbd, x_lbd), (1e-9 * x_lbd, 1e9 * x_lbd)):
    state = ESTIMATOR.init(LAYERS, WIDTH)
    for _ in range(3):
      loss, state, aux = STEP(state, *views, weight_b)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((loss, state, aux)))


def test_a_correlation_with_a_past_that_is_not_there_is_no_number():
  _, state, aux = run([0])
  assert np.isnan(aux['held_out_correlation']).all()
  _, _, aux = STEP(state, *batch(1))
  assert np.isfinite(aux['held_out_correlation']).all()


def test_gradient_is_that_of_the_current_rows_times_all_over_current_weight():
  """Against central differences of the loss that counts the batch's rows alone, times the gain."""
  _, state, _ = run(range(3))
  x_lbd, y_lbd, weight_b = batch(3)
  past_weight = (1 - 7 / WINDOW) * float(state['past']['weight'])
  gain = (past_weight + weight_b.sum()) / weight_b.sum()
  direction_lbd = np.random.default_rng(0).normal(size=x_lbd.shape).astype(np.float32)
  plus, minus = (
    STEP(state, x_lbd + step * direction_lbd, y_lbd, weight_b)[0] for step in (1e-2, -1e-2)
  )
  gradient_lbd = jax.jit(jax.grad(lambda x: ESTIMATOR.loss(state, x, y_lbd, weight_b)[0]))(x_lbd)
  assert float(jnp.sum(gradient_lbd * direction_lbd)) == pytest.approx(
    gain * float(plus - minus) / 2e-2, rel=2e-2
  )


@pytest.mark.parametrize('name', ['moving_average', 'batch'])
def test_sharded_batch_gives_the_single_device_result_after_one_collective(name):
  """Of several independent ones, virtual devices take any first, and can wait for each other."""
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  place = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, P(*spec)))  # noqa: E731

  def stepping(gather):
    made = make_estimator(name, num_directions=K, window=WINDOW, gather=gather)

    def loss(x_lbd, y_lbd, state, weight_b):
      value, state, aux = made.loss(state, x_lbd, y_lbd, weight_b)
      return value, (state, aux)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

  state = run(range(3))[1] if name == 'moving_average' else {}
  x_lbd, y_lbd, weight_b = batch(3)
  whole = (
    place(x_lbd, None, 'data'),
    place(y_lbd, None, 'data'),
    place(state),
    place(weight_b, 'data'),
  )
  step = stepping(sharding.gather_rows(mesh)).lower(*whole).compile()
  width = 2 * (K if name == 'moving_average' else WIDTH) + 1
  found = collectives.compiled_collectives(step.as_text())
  assert [(kind, size) for kind, size, _ in found] == [('all-gather', 4 * LAYERS * BATCH * width)]
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(got, want, atol=2e-6),
    step(*whole),
    stepping(None)(x_lbd, y_lbd, state, weight_b),
  )


def test_batch_estimator_is_the_plain_loss():
  estimator = make_estimator('batch')
  x_lbd, y_lbd, weight_b = batch(0)
  loss, state, aux = jax.jit(estimator.loss)(estimator.init(LAYERS, WIDTH), x_lbd, y_lbd, weight_b)
  np.testing.assert_allclose(
    loss, jax.jit(cca_loss)(x_lbd, y_lbd, weight_n=weight_b).mean(), rtol=1e-6
  )
  assert state == {} and aux['correlation'].shape == (LAYERS,)


@pytest.mark.parametrize(
  'arguments',
  [('mean', {}), ('moving_average', {'num_directions': 0}), ('moving_average', {'window': -1})],
  ids=str,
)
def test_mistakes_are_named(arguments):
  with pytest.raises(ValueError, match=r'^cca: '):
    make_estimator(arguments[0], **arguments[1])
  with pytest.raises(ValueError, match='at most the width 12'):
    make_estimator('moving_average').init(1, WIDTH)


def test_every_product_is_at_the_highest_precision():
  """Accelerators round the factors of others to half of float32's digits and fewer."""
  arguments = ESTIMATOR.init(LAYERS, WIDTH), *batch(0)
  for platform in ('tpu', 'cuda'):
    lowered = STEP.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    products = re.findall('dot_general .*', lowered)
    assert products and all('precision = [HIGHEST, HIGHEST]' in p for p in products)


# Signal.


def sample(key, n, width, rho_1k):
  """Pairs whose first coordinates correlate by `rho_1k`, the others not at all."""
  a_nd, e_nd = jax.random.normal(key, (2, n, width))
  rho_1d = jnp.pad(rho_1k, ((0, 0), (0, width - rho_1k.shape[1])))
  return a_nd, rho_1d * a_nd + jnp.sqrt(1 - rho_1d**2) * e_nd


def test_independent_views_read_near_zero_where_the_batch_reads_one():
  estimator = make_estimator('moving_average')
  step = jax.jit(estimator.loss)
  state = estimator.init(1, 256)
  held_out = []
  for i in range(3):
    x_nd, y_nd = sample(jax.random.key(i), 4096, 256, jnp.zeros((1, 1)))
    _, state, aux = step(state, x_nd[None], y_nd[None])
    held_out.append(float(aux['held_out_correlation'][0]))
  assert aux['correlation'][0] <= 0.05
  assert np.isnan(held_out[0]) and np.abs(held_out[1:]).max() <= 0.03
  assert jax.jit(cca_loss)(x_nd[:64], y_nd[:64]) < -0.99


def test_linear_encoders_find_planted_directions():
  """Batch 64 in width 96: the estimator reaches the population's sum, which the batch alone never
  sees.
  """
  width, rho_1k, steps = 96, jnp.asarray([[0.9, 0.7, 0.5]]), 700
  estimator = make_estimator('moving_average', num_directions=4, window=2048)
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
    [
      v @ p @ state[f'projection_{view}_ldk'][0]
      for view, v, p in zip(
        'xy', sample(jax.random.key(seed), 8192, width, rho_1k), params, strict=True
      )
    ]
    for seed in (2, 3)
  )
  assert float(held_out_correlations(fit_directions(*fit), *measure).sum()) >= 0.95 * float(
    rho_1k.sum()
  )


# Diagnostics.


def test_fitted_directions_reproduce_the_training_correlations_and_ignore_absent_rows():
  x_nd, y_nd = (np.array(v) for v in sample(jax.random.key(0), 300, 6, jnp.asarray([[0.9, 0.5]])))
  weight_n = np.arange(300) < 250
  expected_k = canonical_correlations(x_nd[:250], y_nd[:250], ridge=1e-8)
  x_nd[250:] = np.nan
  directions = fit_directions(x_nd, y_nd, weight_n=jnp.asarray(weight_n), ridge=1e-8)
  np.testing.assert_allclose(
    held_out_correlations(directions, x_nd, y_nd, weight_n=jnp.asarray(weight_n)),
    expected_k,
    atol=1e-4,
  )
  u_nk = (x_nd[:250] - directions.mean_x_d[None, :]) @ directions.x_dk
  np.testing.assert_allclose(u_nk.T @ u_nk, np.eye(6), atol=1e-3)


def test_effective_rank_and_modality_gap():
  rng = np.random.default_rng(0)
  one_nd = rng.normal(size=(50, 1)) * rng.normal(size=(1, 8))
  assert effective_rank(jnp.asarray(one_nd)) == pytest.approx(1, abs=0.01)
  assert effective_rank(jnp.asarray(np.concatenate([np.eye(8), -np.eye(8)]))) == pytest.approx(
    8, rel=1e-5
  )
  assert effective_rank(jnp.ones((5, 4))) == 0
  x_nd, y_nd = (
    jnp.tile(jnp.asarray([[3.0, 0.0]]), (4, 1)),
    jnp.tile(jnp.asarray([[0.0, 7.0]]), (4, 1)),
  )
  assert modality_gap(x_nd, y_nd) == pytest.approx(2**0.5)
  assert modality_gap(x_nd, x_nd.at[0].set(jnp.nan), weight_n=jnp.arange(4) > 0) == pytest.approx(
    0, abs=1e-6
  )
