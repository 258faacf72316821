"""The regularisers of Jiang et al. (2023) against their formulas in float64 PyTorch, value and
gradients, and at the edges.
"""

import functools
import importlib.util
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optional_torch import torch

from molt_jax.objectives import latent_structure, pairwise

# The formulas, with loops over pairs where the paper has them.


def orthogonality(z, own):
  return sum((z[j] @ own[j]) ** 2 for j in range(len(z))) / len(z)


def uniformity(own):
  n = range(len(own))
  return sum(torch.exp(-2 * (own[j] - own[k]).square().sum()) for j in n for k in n) / len(own)


def brownian_bridge(v, t, augmented, time):
  total = 0
  for j in range(len(v)):
    mean = time[j] * v[j] + (1 - time[j]) * t[j]
    total = total + (augmented[j] - mean / mean.norm()).square().sum()
  return total / len(v)


def geometric_original(v, t):
  n = range(len(v))
  return sum(
    (v[j] @ t[k] - v[k] @ t[j]) ** 2 + (v[j] @ v[k] - t[j] @ t[k]) ** 2 for j in n for k in n
  ) / len(v)


def geometric_augmented(v, t, va, ta):
  n = range(len(v))
  within = sum(
    (v[j] @ v[k] - va[j] @ va[k]) ** 2 + (t[j] @ t[k] - ta[j] @ ta[k]) ** 2 for j in n for k in n
  )
  return (within + sum((v[j] @ t[j] - va[j] @ ta[j]) ** 2 for j in n)) / len(v)


FORMULAS = {  # Name -> (formula, number of views, whether it takes times)
  'orthogonality': (orthogonality, 2, False),
  'uniformity': (uniformity, 1, False),
  'brownian_bridge': (brownian_bridge, 3, True),
  'geometric_original': (geometric_original, 2, False),
  'geometric_augmented': (geometric_augmented, 4, False),
}


def oracle(name, views, time_b):
  """Value and gradients in float64."""
  formula, _, timed = FORMULAS[name]
  leaves = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in views]
  value = formula(*leaves, *([torch.tensor(np.asarray(time_b, np.float64))] if timed else []))
  value.backward()
  return value.item(), [leaf.grad.numpy() for leaf in leaves]


@functools.partial(jax.jit, static_argnums=0)
def ours(name, views, time_b, weight_b):
  timed = FORMULAS[name][2]

  def loss(views):
    return getattr(latent_structure, name)(*views, *([time_b] if timed else []), weight_b=weight_b)

  return jax.value_and_grad(loss)(tuple(views))


def make_views(count, b=10, c=6, seed=0):
  rng = np.random.default_rng(seed)
  base_bc = rng.normal(size=(b, c))
  views = [base_bc + rng.normal(size=(b, c)) for _ in range(count)]
  return [
    (x_bc / np.linalg.norm(x_bc, axis=1, keepdims=True)).astype(np.float32) for x_bc in views
  ], rng.uniform(size=b).astype(np.float32)


@pytest.mark.parametrize('name', FORMULAS)
def test_value_and_gradients_match_the_formula(name, monkeypatch):
  """In blocks of three columns: the last is not full."""
  monkeypatch.setattr(pairwise, 'BLOCK_COLUMNS', 3)
  views, time_b = make_views(FORMULAS[name][1])
  value, gradients = ours(name, views, time_b, np.ones(10, np.float32))
  want, want_gradients = oracle(name, views, time_b)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for got_bc, want_bc in zip(gradients, want_gradients, strict=True):
    np.testing.assert_allclose(got_bc, want_bc, atol=3e-6 * max(1, np.abs(want_bc).max()))


@pytest.mark.parametrize('name', FORMULAS)
def test_absent_rows_are_as_if_never_there(name):
  views, time_b = make_views(FORMULAS[name][1])
  present_b = np.arange(10) % 3 != 1
  spoiled = [
    np.where(present_b[:, None], x_bc, [[np.nan, np.inf][i % 2]]).astype(np.float32)
    for i, x_bc in enumerate(views)
  ]
  value, gradients = ours(name, spoiled, time_b, np.float32(present_b))
  want, want_gradients = oracle(name, [x_bc[present_b] for x_bc in views], time_b[present_b])
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for got_bc, want_bc in zip(gradients, want_gradients, strict=True):
    np.testing.assert_allclose(
      got_bc[present_b], want_bc, atol=3e-6 * max(1, np.abs(want_bc).max())
    )
    assert not np.any(got_bc[~present_b])
  for leaf in jax.tree.leaves(ours(name, spoiled, time_b, np.zeros(10, np.float32))):
    assert not np.any(leaf)


@pytest.mark.parametrize('name', FORMULAS)
def test_half_precision_is_cast_up_first(name):
  views, time_b = make_views(FORMULAS[name][1])
  views = [jnp.asarray(x_bc, jnp.bfloat16) for x_bc in views]
  value = getattr(latent_structure, name)(*views, *([time_b] if FORMULAS[name][2] else []))
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(
    value, oracle(name, [np.asarray(x_bc, np.float32) for x_bc in views], time_b)[0], rtol=1e-5
  )


def test_what_each_asks_for_costs_nothing():
  (v_bc, t_bc), time_b = make_views(2)
  basis_bc = np.eye(10, dtype=np.float32)
  assert latent_structure.orthogonality(basis_bc, np.roll(basis_bc, 1, axis=0)) == 0
  assert float(latent_structure.geometric_original(v_bc, v_bc)) < 1e-10
  # A rotation of everything is no change of geometry.
  turn_cc = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0].astype(np.float32)
  assert (
    float(latent_structure.geometric_augmented(v_bc, t_bc, v_bc @ turn_cc, t_bc @ turn_cc)) < 1e-10
  )
  mean_bc = time_b[:, None] * v_bc + (1 - time_b[:, None]) * t_bc
  mean_bc /= np.linalg.norm(mean_bc, axis=1, keepdims=True)
  assert float(latent_structure.brownian_bridge(v_bc, t_bc, mean_bc, time_b)) < 1e-10
  # Far from each other, only j = k is left of the uniformity sum; equal features make it N.
  np.testing.assert_allclose(latent_structure.uniformity(4 * basis_bc), 1, rtol=1e-6)
  np.testing.assert_allclose(latent_structure.uniformity(np.tile(v_bc[:1], (10, 1))), 10, rtol=1e-5)


def test_opposite_embeddings_have_a_finite_bridge():
  v_bc = make_views(1)[0][0]
  value, gradient_bc = jax.value_and_grad(latent_structure.brownian_bridge)(
    v_bc, -v_bc, v_bc, jnp.full(10, 0.5)
  )
  np.testing.assert_allclose(value, 1, rtol=1e-5)
  assert np.all(np.isfinite(gradient_bc))


# Theorem 3.1: perfectly aligned features lose at least the information gap.


def load_experiment():
  folder = pathlib.Path(__file__).parents[2] / 'experiments'
  sys.path.insert(0, str(folder))
  try:
    spec = importlib.util.spec_from_file_location('information_gap', folder / 'information_gap.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  finally:
    sys.path.remove(str(folder))
  return module


@pytest.fixture(scope='module')
def gap():
  return load_experiment()


def entropy(p):
  p = p[p > 0]
  return -np.sum(p * np.log(p))


def best_aligned_loss(p_vty):
  """Least H(Y | Z) over all pairs of features that always agree, by trying every labelling of both
  inputs.
  """
  p_vt = p_vty.sum(axis=2)
  values, best = range(len(p_vt)), np.inf
  for z_v in itertools.product(values, repeat=p_vt.shape[0]):
    for z_t in itertools.product(values, repeat=p_vt.shape[1]):
      if all(z_v[v] == z_t[t] for v, t in zip(*np.nonzero(p_vt), strict=True)):
        p_zy = np.stack([p_vty[np.array(z_v) == z].sum(axis=(0, 1)) for z in values])
        best = min(best, entropy(p_zy.ravel()) - entropy(p_zy.sum(axis=1)))
  return best


def test_aligned_features_are_functions_of_the_common_part(gap):
  """Exact, on random joint distributions with many impossible pairs, against enumeration; and the
  bound of the theorem.
  """
  rng = np.random.default_rng(0)
  strict = 0
  for _ in range(20):
    p_vty = rng.uniform(size=(4, 4, 3)) * (rng.uniform(size=(4, 4, 1)) < 0.35)
    if not np.all(p_vty.sum(axis=(1, 2))):
      continue
    p_vty /= p_vty.sum()
    truth = gap.exact(p_vty)
    entropy_y = entropy(p_vty.sum(axis=(0, 1)))
    assert truth['image'] == pytest.approx(
      entropy_y + entropy(p_vty.sum(axis=(1, 2))) - entropy(p_vty.sum(axis=1).ravel())
    )
    assert truth['text'] == pytest.approx(
      entropy_y + entropy(p_vty.sum(axis=(0, 2))) - entropy(p_vty.sum(axis=0).ravel())
    )
    assert truth['aligned'] == pytest.approx(
      best_aligned_loss(p_vty) - (entropy(p_vty.ravel()) - entropy(p_vty.sum(axis=2).ravel())),
      abs=1e-9,
    )
    assert truth['aligned'] >= truth['gap'] - 1e-9
    strict += (
      truth['aligned'] < entropy_y - 1e-3
    )  # Not only because aligned features can say nothing.
  assert strict >= 5


def test_trained_features_lose_the_information_gap_when_aligned(gap):
  """Known information: the text shows 1 of the label's 4 bits, or each shows 3 and 2 in common.
  Losses to 0.02 nats.
  """
  cases = ['the text shows 1 of 4', 'each shows 3, 2 in common']
  truths = [gap.exact(gap.joint(*gap.CASES[name])) for name in cases]
  np.testing.assert_allclose([truth['gap'] / np.log(2) for truth in truths], [3, 0], atol=1e-9)
  excess, distance = gap.measure_all(cases, [0.0, 300.0], [0], 600)
  assert np.all(np.abs(excess[:, 0]) < 0.02)
  assert np.all(distance[:, 1] < 1e-4)
  np.testing.assert_allclose(excess[:, 1, 0], [truth['aligned'] for truth in truths], atol=0.02)
