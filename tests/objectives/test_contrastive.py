"""Contrastive losses against float64 PyTorch, with absent rows, half precision, in blocks, and
sharded.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optional_torch import torch

from molt_jax.objectives import pairwise
from molt_jax.objectives.contrastive import NEEDS, OBJECTIVES, PairEmbeddings, info_nce, pair_loss

FIELDS = (
  'image',
  'text',
  'image_augmented',
  'text_augmented',
  'image_independent',
  'text_independent',
  'image_independent_augmented',
  'text_independent_augmented',
)
CLIP = {'v2t': 0.5, 't2v': 0.5}
# Each way of summing over pairs once: the other objectives are InfoNCE of other embeddings.
EVERY_KIND = {
  'v2t': 0.5,
  'orthogonality': 1,
  'uniformity': 0.1,
  'brownian_bridge': 1,
  'geometric_original': 0.2,
  'geometric_augmented': 0.2,
}


def unit_rows(rng, b, c):
  x_bc = rng.normal(size=(b, c))
  return (x_bc / np.linalg.norm(x_bc, axis=1, keepdims=True)).astype(np.float32)


def embeddings(b, c, seed=0, weight_b=None):
  """Eight views of a batch; the augmented and the other modality's resemble the first."""
  rng = np.random.default_rng([seed, b, c])
  base_bc = rng.normal(size=(b, c))
  noisy = [base_bc + rng.normal(size=(b, c)) for _ in FIELDS]
  views = {
    f'{name}_bc': (x_bc / np.linalg.norm(x_bc, axis=1, keepdims=True)).astype(np.float32)
    for name, x_bc in zip(FIELDS, noisy, strict=True)
  }
  return PairEmbeddings(**views, weight_b=weight_b)


def oracle(anchor_bc, positive_bc, scale):
  """Loss and gradients (anchor, positive, scale) by PyTorch's cross-entropy in float64."""
  leaves = [
    torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    for x in (anchor_bc, positive_bc, scale)
  ]
  logits_bb = leaves[2] * leaves[0] @ leaves[1].T
  loss = torch.nn.functional.cross_entropy(logits_bb, torch.arange(len(logits_bb)))
  loss.backward()
  return loss.item(), [leaf.grad.numpy() for leaf in leaves]


@jax.jit
def loss_and_gradients(anchor_bc, positive_bc, scale, weight_b=None):
  return jax.value_and_grad(
    lambda a, p, s: info_nce(a, p, s, weight_b=weight_b), argnums=(0, 1, 2)
  )(anchor_bc, positive_bc, scale)


def assert_close(got, want, tolerance=1e-6):
  """Each leaf to `tolerance` of its largest element, or of 1 where all are small."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(
      np.asarray(g, np.float64), w, atol=tolerance * max(1.0, np.abs(w).max()), rtol=0
    )


@pytest.mark.parametrize('block', [1024, 5])
def test_value_and_gradients_match_float64(block, monkeypatch):
  """In one block, and in five of which the last is not full."""
  monkeypatch.setattr(pairwise, 'BLOCK_COLUMNS', block)
  e, compute = embeddings(24, 8), jax.jit(jax.value_and_grad(info_nce, argnums=(0, 1, 2)))
  for scale in (1.0, 14.3, 100.0):
    assert_close(compute(e.image_bc, e.text_bc, scale), oracle(e.image_bc, e.text_bc, scale), 3e-6)


def test_gradient_of_a_block_of_absent_rows_is_zero(monkeypatch):
  monkeypatch.setattr(pairwise, 'BLOCK_COLUMNS', 4)
  e, weight_b = embeddings(16, 8), np.float32([1] * 3 + [0] * 13)
  loss, gradients = jax.jit(
    jax.value_and_grad(lambda a, p: info_nce(a, p, 10.0, weight_b=weight_b), argnums=(0, 1))
  )(e.image_bc, e.text_bc)
  want, want_gradients = oracle(e.image_bc[:3], e.text_bc[:3], 10.0)
  assert_close((loss, [g[:3] for g in gradients]), (want, want_gradients[:2]))
  assert not any(np.any(g[3:]) for g in gradients)


def test_absent_rows_are_as_if_never_there():
  e, weight_b = embeddings(24, 8), np.float32(np.arange(24) % 3 > 0)
  spoiled = [
    np.where(weight_b[:, None] > 0, x_bc, bad)
    for x_bc, bad in ((e.image_bc, np.nan), (e.text_bc, np.inf))
  ]
  loss, gradients = loss_and_gradients(*spoiled, 14.3, weight_b)
  present = weight_b > 0
  want, (da_bc, dp_bc, ds) = oracle(e.image_bc[present], e.text_bc[present], 14.3)
  assert_close(
    (loss, gradients[0][present], gradients[1][present], gradients[2]), (want, da_bc, dp_bc, ds)
  )
  assert not any(np.any(g[~present]) for g in gradients[:2])


def test_no_rows_cost_nothing_and_one_row_has_no_negative():
  e = embeddings(24, 8)
  for weight_b in (np.zeros(24, np.float32), np.float32(np.arange(24) == 5)):
    for leaf in jax.tree.leaves(loss_and_gradients(e.image_bc, e.text_bc, 14.3, weight_b)):
      np.testing.assert_allclose(leaf, 0, atol=1e-5)


def test_a_weight_is_a_multiplicity():
  e, times_b = embeddings(10, 8), np.arange(10) % 4
  repeated = [np.repeat(x_bc, times_b, axis=0) for x_bc in (e.image_bc, e.text_bc)]
  np.testing.assert_allclose(
    info_nce(e.image_bc, e.text_bc, 5.0, weight_b=times_b), oracle(*repeated, 5.0)[0], rtol=1e-6
  )


def test_uninformative_embeddings_cost_the_logarithm_of_the_batch():
  same_bc = np.tile(unit_rows(np.random.default_rng(0), 1, 8), (24, 1))
  np.testing.assert_allclose(info_nce(same_bc, same_bc, 100.0), np.log(24), rtol=1e-5)


def test_half_precision_is_cast_up_first():
  e = jax.tree.map(lambda x: x.astype(jnp.bfloat16), embeddings(24, 8))
  loss, (da_bc, _, _) = loss_and_gradients(e.image_bc, e.text_bc, 14.3)
  assert loss.dtype == jnp.float32 and da_bc.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    loss, oracle(e.image_bc.astype(jnp.float32), e.text_bc.astype(jnp.float32), 14.3)[0], rtol=1e-5
  )


def test_vmap_is_a_loop():
  stacked = [
    np.stack(x)
    for x in zip(
      *((e.image_bc, e.text_bc) for e in (embeddings(24, 8, seed) for seed in range(3))),
      strict=True,
    )
  ]
  got = jax.vmap(lambda a, p: jax.grad(info_nce)(a, p, 14.3))(*stacked)
  for i in range(3):
    assert_close(got[i], oracle(stacked[0][i], stacked[1][i], 14.3)[1][0], 3e-6)


def test_pair_loss_is_the_weighted_sum_of_its_parts():
  e = embeddings(24, 8)
  loss, parts = jax.jit(
    lambda e: pair_loss(e, {**CLIP, 'v2v': 0.25, 't2t': 0}, 14.3, jax.random.key(0))
  )(e)
  pairs = {
    'v2t': (e.image_bc, e.text_bc),
    't2v': (e.text_bc, e.image_bc),
    'v2v': (e.image_bc, e.image_augmented_bc),
  }
  want = {name: oracle(*pair, 14.3)[0] for name, pair in pairs.items()}
  assert_close(parts, want)
  np.testing.assert_allclose(
    loss, 0.5 * want['v2t'] + 0.5 * want['t2v'] + 0.25 * want['v2v'], rtol=1e-6
  )
  separation = pair_loss(e, {'contrastive_separation': 1}, 14.3, jax.random.key(0))[1][
    'contrastive_separation'
  ]
  own = [
    (e.image_independent_bc, e.image_independent_augmented_bc),
    (e.text_independent_bc, e.text_independent_augmented_bc),
  ]
  np.testing.assert_allclose(separation, sum(oracle(*pair, 14.3)[0] for pair in own), rtol=1e-6)
  assert pair_loss(e, {}, 14.3, jax.random.key(0))[0] == 0


def test_the_key_draws_the_times_of_the_bridge():
  e = embeddings(24, 8)
  one, again, other = (
    pair_loss(e, {'brownian_bridge': 1}, 1.0, jax.random.key(seed))[0] for seed in (0, 0, 1)
  )
  assert one == again != other


def test_what_cannot_be_computed_is_refused():
  e = PairEmbeddings(
    **{f'{name}_bc': getattr(embeddings(4, 8), f'{name}_bc') for name in ('image', 'text')}
  )
  with pytest.raises(ValueError, match='no objective i2t; known: v2t'):
    pair_loss(e, {'i2t': 1}, 1.0, jax.random.key(0))
  needy = {name: fields for name, fields in NEEDS.items() if 'image_bc' not in fields}
  assert set(NEEDS) == set(OBJECTIVES) and len(needy) == 8
  for name, fields in needy.items():
    with pytest.raises(ValueError, match=f'{name} needs {fields[0]}'):
      pair_loss(e, {name: 1}, 1.0, jax.random.key(0))


# On four devices.


def value_and_gradients(e, scale, weights):
  return jax.value_and_grad(
    lambda e, s: pair_loss(e, weights, s, jax.random.key(3)), argnums=(0, 1), has_aux=True
  )(e, scale)


@pytest.fixture(scope='module')
def mesh():
  return jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))


def test_four_devices_equal_one(mesh, monkeypatch):
  monkeypatch.setattr(pairwise, 'BLOCK_COLUMNS', 16)  # Two blocks.
  e = embeddings(32, 8, weight_b=np.float32(np.arange(32) % 5 > 0))
  step = jax.jit(functools.partial(value_and_gradients, weights=EVERY_KIND))
  alone = step(jax.device_put(e, jax.devices()[0]), 14.3)
  sharded = step(jax.device_put(e, NamedSharding(mesh, P('data'))), 14.3)
  assert_close(sharded, jax.tree.map(np.asarray, alone))


def test_no_device_holds_more_than_its_share_of_the_pairs(mesh):
  b, c, block = 4096, 512, 4096 * 4096 // 4
  row = jax.ShapeDtypeStruct((b, c), jnp.float32, sharding=NamedSharding(mesh, P('data')))
  compiled = (
    jax.jit(functools.partial(value_and_gradients, weights=CLIP))
    .lower(PairEmbeddings(row, row), 14.3)
    .compile()
  )
  shapes = [
    np.prod([int(n) for n in shape.split(',')])
    for shape in re.findall(r'f32\[([\d,]+)\]', compiled.as_text())
  ]
  assert max(shapes) < block
  # Everything temporary together, blocks and gathered rows, stays below two blocks.
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * block
