"""Finite in, finite out: every head on hostile states, and what the statistics keep of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molt_jax.methods.parts.attention import PooledLayerNorm
from molt_jax.methods.parts.imputation import Moments
from molt_jax.methods.parts.inputs import INPUT_NORMS, Inputs
from molt_jax.methods.parts.interface import Tokens

LARGEST = float(np.finfo(np.float32).max)
HOSTILE = {
  'zero': lambda x: 0 * x,
  'one number': lambda x: 0 * x + 7,
  'largest': lambda x: np.sign(x) * LARGEST,
  'huge': lambda x: np.clip(x * 1e25, -LARGEST, LARGEST),
  'large': lambda x: x * 1e12,
  'denormal': lambda x: x * 1e-41,
  'tiny': lambda x: x * 1e-19,
  'zero channels': lambda x: x * (np.arange(x.shape[-1]) > 3),
  'all scales': lambda x: np.clip(x * 10.0 ** np.linspace(-44, 38, x.shape[-1]), -LARGEST, LARGEST),
}


def hostile(states, kind):
  change = lambda x: HOSTILE[kind](x.astype(np.float64)).astype(np.float32)  # noqa: E731
  return states.replace(image_lbid=change(states.image_lbid), text_lbtd=change(states.text_lbtd))


def all_finite(tree):
  return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('kind', HOSTILE)
def test_heads_are_finite_whatever_is_finite(each_case, presence, kind):
  """Logits, loss, gradients and statistics; also of normal states after hostile ones, and of
  hostile ones after normal ones.
  """
  states = hostile(each_case.batch.states, kind)
  orders = ((states, each_case.batch.states), (each_case.batch.states, states))
  for first, second in orders:
    statistics = each_case.statistics
    for each in (first, second):
      (loss, (out, parts, statistics)), gradients = each_case.run(
        presence['mixed'], each, statistics or None
      )
      assert all_finite((loss, out, parts, statistics, gradients))


@pytest.mark.parametrize('name', ['default', 'paper', 'late_fusion'])
def test_infinity_is_not_taken_for_a_large_number(case, presence, name):
  case = case(name)
  states = case.batch.states.replace(
    image_lbid=np.where(np.arange(11) == 2, np.inf, case.batch.states.image_lbid).astype(np.float32)
  )
  assert not np.isfinite(case.predict(case.variables, states, presence['mixed']).logits_bk).all()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('norm', INPUT_NORMS)
def test_inputs_in_their_usual_range_are_not_touched(norm, dtype):
  """Bit for bit what the norm alone makes of them, up to the largest number of 16 bits."""
  x_lbtd = jnp.asarray(
    np.random.default_rng(0).normal(size=(2, 4, 3, 5)) * [1, 1e-3, 100, 1e4, 5e4 / 4], dtype
  )
  mask_bt, all_b = np.ones((4, 3), bool), np.ones(4, bool)
  module = Inputs(num_layers=2, width=5, norm=norm, strategy='robust', dtype=jnp.float32)
  variables = module.init(jax.random.key(0), x_lbtd, mask_bt, all_b, all_b, train=False)
  sequence = module.apply(variables, x_lbtd, mask_bt, all_b, all_b, train=False)
  alone = INPUT_NORMS[norm]()
  plain = alone.apply(
    {'statistics': variables['statistics']['norm']} if norm == 'standardize' else {},
    x_lbtd,
    mask_bt,
    train=False,
  )
  np.testing.assert_array_equal(sequence.tokens.x_lbtd, plain.astype(jnp.float32))


@pytest.mark.parametrize('kind', HOSTILE)
def test_pooled_norm_has_a_finite_gradient(kind):
  x_lbtd = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
  x_lbtd = np.clip(HOSTILE[kind](x_lbtd), -1e14, 1e14).astype(
    np.float32
  )  # Of what projections of states can be.
  mask_bt = np.array([[True] * 4, [True, False, True, False], [False] * 4])
  module = PooledLayerNorm()
  variables = nn.unbox(module.init(jax.random.key(0), Tokens(x_lbtd), mask_bt))
  pooled, gradient = jax.value_and_grad(
    lambda x: jnp.sum(module.apply(variables, Tokens(x), mask_bt) ** 2)
  )(jnp.asarray(x_lbtd))
  assert all_finite((pooled, gradient)) and not np.any(np.asarray(gradient)[:, 2])


@pytest.mark.parametrize('ridge', [1e-30, 1e-3, 1e6])
@pytest.mark.parametrize('kind', HOSTILE)
def test_translation_is_finite_whatever_is_finite(kind, ridge):
  x_lnc, y_lnc = np.random.default_rng(0).normal(size=(2, 1, 30, 4)).astype(np.float32)
  x_lnc[..., 3] = x_lnc[..., 2]
  spoiled_lnc, ones_n = (
    HOSTILE[kind](x_lnc.astype(np.float64)).astype(np.float32),
    np.ones(30, np.float32),
  )
  for views in ((spoiled_lnc, y_lnc), (y_lnc, spoiled_lnc), (spoiled_lnc, spoiled_lnc)):
    moments = Moments.empty(1, 4)
    for part in (slice(10), slice(10, 30)):
      moments = moments.update(*(view_lnc[:, part] for view_lnc in views), ones_n[part])
    assert all_finite((moments, moments.solve(ridge=ridge)))


def test_translation_by_copies_of_a_channel_is_that_by_the_channel():
  """At the smallest ridge: what float32 rounds in the sums would else be taken for a direction."""
  rng = np.random.default_rng(0)
  x_lnc, y_lnc = (
    rng.normal(size=(1, 500, 3)).astype(np.float32),
    rng.normal(size=(1, 500, 6)).astype(np.float32),
  )
  y_lnc[..., :3] += x_lnc
  copied_lnc, ones_n = np.concatenate([x_lnc, x_lnc], axis=2), np.ones(500, np.float32)
  fitted = Moments.empty(1, 6).update(copied_lnc, y_lnc, ones_n).solve(ridge=1e-20)
  slope_ce = np.linalg.lstsq(x_lnc[0] - x_lnc[0].mean(0), y_lnc[0] - y_lnc[0].mean(0))[0]
  want_ne = (x_lnc[0] - x_lnc[0].mean(0)) @ slope_ce + y_lnc[0].mean(0)
  np.testing.assert_allclose(
    copied_lnc[0] @ fitted['kernel_lcc'][0] + fitted['bias_lc'][0], want_ne, atol=1e-3
  )
