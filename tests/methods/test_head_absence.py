"""An absent modality is never fed: nothing under it reaches an output, a gradient or a statistic,
and the parameters do not depend on it.
"""

import flax.linen as nn
import jax
import numpy as np
import pytest

STRATEGIES = ['default', 'null_two_heads', 'zero_multi_label', 'late_fusion_null']
JUNK = {
  'nan': lambda rng, shape: np.full(shape, np.nan),
  'huge': lambda rng, shape: np.where(rng.random(shape) < 0.5, np.inf, -3e38),
  'random': lambda rng, shape: rng.normal(size=shape) * 50,
}


def with_junk(states, present_bm, kind):
  """Taps with junk in absent rows and under text padding, and another token mask in absent rows."""
  rng = np.random.default_rng(3)
  absent_image, absent_text = (~present_bm[None, :, m, None, None] for m in (0, 1))

  def junk(x):
    return JUNK[kind](rng, x.shape).astype(np.float32)

  unread = absent_text | ~states.text_mask_bt[None, :, :, None]
  return states.replace(
    image_lbid=np.where(absent_image, junk(states.image_lbid), states.image_lbid),
    text_lbtd=np.where(unread, junk(states.text_lbtd), states.text_lbtd),
    text_mask_bt=np.where(
      present_bm[:, 1:], states.text_mask_bt, rng.random(states.text_mask_bt.shape) < 0.5
    ),
  )


def assert_same_bits(actual, expected):
  jax.tree.map(
    lambda a, e: np.testing.assert_array_equal(np.asarray(a), np.asarray(e)), actual, expected
  )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))


def assert_close(actual, expected, tolerance=2e-6):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(
      a, e, rtol=0, atol=tolerance * max(1e-3, np.abs(e).max())
    ),
    actual,
    expected,
  )


@pytest.mark.parametrize('kind', JUNK)
def test_content_of_an_absent_modality_changes_no_bit_in_training(each_case, presence, kind):
  for present_bm in presence.values():
    assert_same_bits(
      each_case.run(present_bm, with_junk(each_case.batch.states, present_bm, kind)),
      each_case.run(present_bm),
    )


@pytest.mark.parametrize('name', STRATEGIES)
def test_content_of_an_absent_modality_changes_no_bit_in_evaluation(case, presence, name):
  case = case(name)
  for present_bm in presence.values():
    clean = case.predict(case.variables, case.batch.states, present_bm)
    for kind in JUNK:
      assert_same_bits(
        case.predict(case.variables, with_junk(case.batch.states, present_bm, kind), present_bm),
        clean,
      )


@pytest.mark.parametrize('name', STRATEGIES)
@pytest.mark.parametrize('pattern, gone', [('no_text', 'text_lbtd'), ('no_image', 'image_lbid')])
def test_a_tower_that_was_not_run_equals_one_that_is_masked(case, presence, name, pattern, gone):
  case, present_bm = case(name), presence[pattern]
  masked = case.predict(case.variables, case.batch.states, present_bm)
  assert_close(
    case.predict(case.variables, case.batch.states.replace(**{gone: None}), present_bm), masked
  )
  # What was not run is absent, whatever present_bm says.
  assert_close(
    case.predict(
      case.variables, case.batch.states.replace(**{gone: None}), np.ones_like(present_bm)
    ),
    masked,
  )


def test_gradients_without_a_tower_equal_the_masked_ones(case, presence):
  case, present_bm = case('null_two_heads'), presence['no_text']
  assert_close(
    case.run(present_bm, case.batch.states.replace(text_lbtd=None)), case.run(present_bm)
  )


def test_parameters_do_not_depend_on_what_is_present(each_case):
  case, states = each_case, each_case.batch.states

  def init(states):
    return nn.unbox(jax.eval_shape(case.init, jax.random.key(0), states, np.ones((24, 2), bool)))

  expected = init(states)
  assert init(states.replace(text_lbtd=None)) == init(states.replace(image_lbid=None)) == expected
  has_null = any(
    'null' in jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(expected)
  )
  assert has_null == (case.config.missing.strategy == 'null')


@pytest.mark.parametrize('name', STRATEGIES)
def test_a_row_does_not_depend_on_the_others(case, presence, name):
  case, states, present_bm = case(name), case(name).batch.states, presence['mixed'].copy()
  expected = np.asarray(
    case.predict(case.variables, states, present_bm).logits_bk
  )  # Done before its inputs are changed in place.
  others = np.arange(24) % 2 == 1
  changed = states.replace(image_lbid=states.image_lbid.copy(), text_lbtd=states.text_lbtd.copy())
  changed.image_lbid[:, others] += 1
  changed.text_lbtd[:, others] *= -2
  present_bm[others] = present_bm[others][:, ::-1]
  np.testing.assert_array_equal(
    case.predict(case.variables, changed, present_bm).logits_bk[~others], expected[~others]
  )
  order = np.random.default_rng(0).permutation(24)
  shuffled = states.replace(
    image_lbid=states.image_lbid[:, order],
    text_lbtd=states.text_lbtd[:, order],
    text_mask_bt=states.text_mask_bt[order],
  )
  np.testing.assert_array_equal(
    case.predict(case.variables, shuffled, presence['mixed'][order]).logits_bk, expected[order]
  )


def test_a_text_without_tokens_is_an_absent_text(case):
  case, states = case('default'), case('default').batch.states
  both, no_text = np.ones((24, 2), bool), np.tile([True, False], (24, 1))
  empty = states.replace(text_mask_bt=np.zeros_like(states.text_mask_bt))
  assert_same_bits(
    case.predict(case.variables, empty, both), case.predict(case.variables, states, no_text)
  )


@pytest.mark.parametrize('name', STRATEGIES)
def test_rows_without_anything_stay_finite_and_leave_the_others_alone(case, presence, name):
  case, present_bm = case(name), presence['mixed'].copy()
  present_bm[3] = False
  weight_b = np.where(np.arange(24) == 3, 0, 1).astype(np.float32)
  result = case.run(present_bm, weight_b=weight_b)
  assert_same_bits(
    case.run(present_bm, with_junk(case.batch.states, present_bm, 'nan'), weight_b=weight_b), result
  )
