"""Hidden states of a batch: what is absent is never fed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molt_jax.features import hidden_states

LAST_TWO = {'image': (-2, -1), 'text': (-2, -1)}


@pytest.fixture(scope='module')
def towers(hf, tower_of):
  return tower_of(hf.clip()), tower_of(hf.llama())


def example(rng, present):
  present = np.array(present, bool)
  return {
    'image': rng.standard_normal((len(present), 20, 20, 3)).astype(np.float32),
    'tokens': rng.integers(0, 97, (len(present), 6)).astype(np.int32),
    'token_mask': np.arange(6)[None] < np.array([[6], [3], [5], [1]])[: len(present)],
    'present': present,
  }


def modules(towers):
  return {'image': towers[0].module, 'text': towers[1].module}


def run(towers, batch, *, image=True, text=True):
  frozen = {
    'image': towers[0].params if image else None,
    'text': towers[1].params if text else None,
  }
  extract = jax.jit(lambda f, b: hidden_states.extract(modules(towers), f, b, LAST_TWO))
  return extract(frozen, batch)


def test_states_are_those_of_the_towers(towers, states_of):
  batch = example(np.random.default_rng(0), [[1, 1]] * 3)
  out = run(towers, batch)
  np.testing.assert_allclose(
    out.image_lbid, states_of(towers[0], batch['image'])[-2:], rtol=1e-4, atol=1e-5
  )
  valid = batch['token_mask']
  np.testing.assert_allclose(
    out.text_lbtd[:, valid],
    states_of(towers[1], batch['tokens'], valid)[-2:, valid],
    rtol=1e-4,
    atol=1e-5,
  )
  np.testing.assert_array_equal(out.text_mask_bt, valid)


def test_no_content_of_an_absent_modality_changes_a_bit(towers):
  rng = np.random.default_rng(0)
  batch = example(rng, [[1, 1], [0, 1], [1, 0], [0, 1]])
  junk = {k: v.copy() for k, v in batch.items()}
  junk['image'][1], junk['image'][3] = np.nan, 1e30
  junk['tokens'][2], junk['token_mask'][2] = 10**9, True
  one, other = run(towers, batch), run(towers, junk)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)
    assert np.isfinite(np.asarray(b, np.float32)).all()
  assert not one.text_mask_bt[2].any() and one.text_mask_bt[0].all()


@pytest.mark.parametrize('side', ['image', 'text'])
def test_a_tower_without_parameters_is_not_run(towers, side):
  batch = example(np.random.default_rng(0), [[1, 1]] * 2)
  out = run(towers, batch, **{side: False})
  states = {'image': out.image_lbid, 'text': out.text_lbtd}
  assert states.pop(side) is None
  (kept,) = states.values()
  assert kept.shape[:2] == (2, 2)
  nothing = {'image': None, 'text': None}
  none = hidden_states.extract(nothing, nothing, batch, LAST_TWO)
  assert none.image_lbid is None and none.text_lbtd is None


def test_no_gradient_reaches_the_towers(towers):
  batch = example(np.random.default_rng(0), [[1, 1]] * 2)

  def loss(frozen):
    out = hidden_states.extract(modules(towers), frozen, batch, LAST_TWO)
    return out.image_lbid.sum() + out.text_lbtd.sum()

  gradient = jax.jit(jax.grad(loss))({'image': towers[0].params, 'text': towers[1].params})
  assert all(not jnp.any(x) for x in jax.tree.leaves(gradient))
