"""Normalisation of the states against float64 NumPy, and what stands in for an absent modality."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molt_jax.methods.parts.inputs import INPUT_NORMS, STRATEGIES, Inputs

LAYERS, BATCH, TOKENS, WIDTH = 2, 4, 3, 5


def inputs(norm, strategy='robust', dtype=jnp.float32):
  return Inputs(num_layers=LAYERS, width=WIDTH, norm=norm, strategy=strategy, dtype=dtype)


def batches(count):
  """Batches far from standard, each with its own scale; a mask, presence and row weights."""
  rng = np.random.default_rng(0)
  for _ in range(count):
    x_lbtd = rng.normal(size=(LAYERS, BATCH, TOKENS, WIDTH)) * rng.uniform(
      0.1, 3, WIDTH
    ) + np.array([1000.0, 0, -5, 0.1, 30])
    yield (
      x_lbtd.astype(np.float32),
      rng.random((BATCH, TOKENS)) < 0.7,
      rng.random(BATCH) < 0.7,
      rng.random(BATCH) < 0.8,
    )


def apply_train(module, variables, *args):
  tokens, mutated = module.apply(variables, *args, train=True, mutable=['statistics'])
  return tokens, {**variables, **mutated}


def test_statistics_are_those_of_all_counted_tokens():
  module, seen = inputs('standardize'), []
  first = next(batches(1))
  variables = module.init(jax.random.key(0), *first, train=True)
  assert variables['statistics']['norm']['count'] == 0
  for x_lbtd, mask_bt, present_b, counted_b in batches(6):
    sequence, variables = apply_train(module, variables, x_lbtd, mask_bt, present_b, counted_b)
    seen.append(x_lbtd[:, mask_bt & present_b[:, None] & counted_b[:, None]].astype(np.float64))
    tokens_lnd = np.concatenate(seen, axis=1)
    mean_ld, deviation_ld = tokens_lnd.mean(1), tokens_lnd.std(1)
    valid_bt = mask_bt & present_b[:, None]
    expected = (x_lbtd - mean_ld[:, None, None]) / deviation_ld[:, None, None]
    np.testing.assert_allclose(
      sequence.tokens.x_lbtd[:, valid_bt], expected[:, valid_bt], rtol=1e-3, atol=2e-3
    )  # Channel 0 is at 1000 +- 1.
    np.testing.assert_allclose(
      sequence.tokens.x_lbtd[:, valid_bt][..., 1:],
      expected[:, valid_bt][..., 1:],
      rtol=2e-5,
      atol=2e-5,
    )
  statistics = variables['statistics']['norm']
  assert statistics['count'] == tokens_lnd.shape[1]
  np.testing.assert_allclose(statistics['mean'], mean_ld, rtol=1e-6, atol=1e-5)
  np.testing.assert_allclose(statistics['m2'], tokens_lnd.var(1) * tokens_lnd.shape[1], rtol=1e-4)


def test_evaluation_reads_the_statistics_and_leaves_them_alone():
  module = inputs('standardize')
  args = next(batches(1))
  trained, variables = apply_train(
    module, module.init(jax.random.key(0), *args, train=False), *args
  )
  evaluated, mutated = module.apply(variables, *args, train=False, mutable=['statistics'])
  jax.tree.map(np.testing.assert_array_equal, evaluated, trained)
  jax.tree.map(
    np.testing.assert_array_equal, dict(mutated), {'statistics': variables['statistics']}
  )


def test_a_batch_without_the_modality_leaves_the_statistics_alone():
  module = inputs('standardize')
  args = next(batches(1))
  _, variables = apply_train(module, module.init(jax.random.key(0), *args, train=False), *args)
  _, after = apply_train(
    module, variables, None, np.zeros((BATCH, 1), bool), np.zeros(BATCH, bool), np.ones(BATCH, bool)
  )
  jax.tree.map(np.testing.assert_array_equal, after, variables)


def test_no_gradient_flows_through_the_statistics():
  module = inputs('standardize')
  x_lbtd, mask_bt, present_b, counted_b = next(batches(1))
  variables = module.init(jax.random.key(0), x_lbtd, mask_bt, present_b, counted_b, train=False)

  def total(x_lbtd):
    sequence, after = apply_train(module, variables, x_lbtd, mask_bt, present_b, counted_b)
    return jnp.sum(sequence.tokens.x_lbtd), after['statistics']['norm']

  gradient, statistics = jax.grad(total, has_aux=True)(x_lbtd)
  deviation_ld = np.sqrt(statistics['m2'] / statistics['count'])
  expected = np.where(
    (mask_bt & present_b[:, None])[None, :, :, None], 1 / deviation_ld[:, None, None], 0
  )
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_before_the_first_update_and_in_constant_channels_the_deviation_is_one():
  module = inputs('standardize')
  x_lbtd = np.full((LAYERS, BATCH, TOKENS, WIDTH), 3.7, np.float32) * np.array(
    [0, 1, -200, 1e-20, 1e6], np.float32
  )
  everything = x_lbtd, np.ones((BATCH, TOKENS), bool), np.ones(BATCH, bool), np.ones(BATCH, bool)
  variables = module.init(jax.random.key(0), *everything, train=False)
  np.testing.assert_array_equal(
    module.apply(variables, *everything, train=False).tokens.x_lbtd, x_lbtd
  )
  sequence, variables = apply_train(module, variables, *everything)
  np.testing.assert_allclose(sequence.tokens.x_lbtd, np.zeros_like(x_lbtd), atol=1)
  later = module.apply(
    variables, x_lbtd + np.float32(0.5), *everything[1:], train=False
  ).tokens.x_lbtd
  np.testing.assert_allclose(later[..., :4], np.full_like(x_lbtd[..., :4], 0.5), atol=1e-3)


def test_statistics_of_bfloat16_taps_are_float32():
  x_lbtd, *rest = next(batches(1))
  module, x_lbtd = inputs('standardize', dtype=jnp.bfloat16), jnp.asarray(x_lbtd, jnp.bfloat16)
  sequence, variables = apply_train(
    module, module.init(jax.random.key(0), x_lbtd, *rest, train=False), x_lbtd, *rest
  )
  assert sequence.tokens.x_lbtd.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  counted = rest[0] & rest[1][:, None] & rest[2][:, None]
  np.testing.assert_allclose(
    variables['statistics']['norm']['mean'],
    np.asarray(x_lbtd, np.float64)[:, counted].mean(1),
    rtol=1e-6,
    atol=1e-6,
  )


def test_rms_divides_each_token_by_its_root_mean_square():
  x_lbtd, mask_bt, _, counted_b = next(batches(1))
  tokens = (
    inputs('rms')
    .apply({}, x_lbtd, mask_bt, np.ones(BATCH, bool), counted_b, train=False)
    .tokens.x_lbtd
  )
  expected = x_lbtd / np.sqrt(np.square(x_lbtd.astype(np.float64)).mean(-1, keepdims=True))
  np.testing.assert_allclose(tokens[:, mask_bt], expected[:, mask_bt], rtol=1e-5)


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('norm', INPUT_NORMS)
def test_what_placeholder_for_an_absent_row(norm, strategy):
  x_lbtd, mask_bt, present_b, counted_b = next(batches(1))
  mask_bt[:, 0] = True
  present_b = np.array([True, False, True, False])
  module = inputs(norm, strategy)
  variables = module.init(jax.random.key(0), x_lbtd, mask_bt, present_b, counted_b, train=False)
  sequence = module.apply(variables, x_lbtd, mask_bt, present_b, counted_b, train=False)
  np.testing.assert_array_equal(sequence.mask_bt, mask_bt & present_b[:, None])
  assert not np.any(sequence.tokens.x_lbtd[:, ~present_b])
  if not STRATEGIES[strategy].placeholder:
    assert sequence.placeholder_l11d is None
    np.testing.assert_array_equal(sequence.available_b, present_b)
    return
  assert sequence.available_b.all()
  placeholder = (
    variables['params']['null'].unbox() if strategy == 'null' else np.zeros((LAYERS, WIDTH))
  )
  assert (np.abs(placeholder).max() > 0) == (strategy == 'null')
  np.testing.assert_array_equal(sequence.placeholder_l11d, placeholder[:, None, None, :])


@pytest.mark.parametrize('strategy', ['robust', 'null', 'zero'])
def test_what_may_be_read_is_normalised_once_whatever_a_view_takes(strategy):
  module = inputs('standardize', strategy)
  x_lbtd, mask_bt, content_b, counted_b = next(batches(1))
  present_b = content_b & (np.arange(BATCH) % 2 == 0)
  variables = module.init(jax.random.key(0), x_lbtd, mask_bt, present_b, counted_b, train=False)
  whole, seen = apply_train(module, variables, x_lbtd, mask_bt, content_b, counted_b)
  view, mutated = module.apply(
    variables,
    x_lbtd,
    mask_bt,
    present_b,
    counted_b,
    train=True,
    mutable=['statistics'],
    content_b=content_b,
  )
  chex.assert_trees_all_equal(mutated['statistics'], seen['statistics'])
  np.testing.assert_array_equal(view.tokens.x_lbtd, whole.tokens.x_lbtd)
  np.testing.assert_array_equal(view.mask_bt, whole.mask_bt)
  alone = module.apply(variables, x_lbtd, mask_bt, present_b, counted_b, train=False)
  np.testing.assert_array_equal(view.available_b, alone.available_b)
