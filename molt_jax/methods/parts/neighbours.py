"""Nearest neighbours among training examples, by the cosine of their pooled hidden states.

An example's similarity to a training example is the mean of the cosines over the modalities that
both have. The k most similar ones vote with weights exp((s - s_1) / T), as in Wu et al. (CVPR
2018), and so does the mean of all labels, as one vote of weight one: without it a class that no
neighbour has would have an infinite loss.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from molt_jax.data.modalities import MODALITIES, PATTERNS
from molt_jax.methods.parts import ridge_kernels, ridge_solver
from molt_jax.methods.parts.interface import unit
from molt_jax.methods.parts.ridge_kernels import Examples
from molt_jax.runtime import compiling

TEMPERATURE = 0.07
COUNTS = (1, 2, 3, 5, 10, 20, 50)  # What k is chosen from.
_BLOCK = 512  # Examples that are compared at once while k is chosen.
_NOTHING = -4.0  # Below every cosine.


def empty(widths: Mapping[str, int | None], *, examples: int, num_classes: int) -> dict[str, Any]:
  """Returns the variables of neighbours that are none yet.

  Args:
    widths: modality -> channels of its pooled states, None for one that is not used.
    examples: M, the most there can be.
    num_classes: K.
  """
  found: dict[str, Any] = {
    'label_mk': jnp.zeros((examples, num_classes)),
    'mean_k': jnp.zeros((num_classes,)),
    'count_v': jnp.zeros((len(PATTERNS),), jnp.int32),
  }
  for modality, width in widths.items():
    if width is not None:
      found[modality] = {
        'mean_c': jnp.zeros((width,)),
        'scale_c': jnp.zeros((width,)),
        'units_mc': jnp.zeros((examples, width), jnp.float16),
        'has_m': jnp.zeros((examples,), bool),
      }
  return found


def nearest(
  variables: Mapping[str, Any], pooled: Mapping[str, jax.Array], present_bm: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns (weights float32[B, N], labels float32[B, N, K]) of the N nearest, the nearest first;
  weight 0: there is none.

  Args:
    variables: as in `empty`, fitted.
    pooled: modality -> float32[B, C].
    present_bm: bool[B, 2], the modalities that may be read; no bit of another enters.
  """
  total_bm, count_bm = 0.0, 0.0
  for column, modality in enumerate(MODALITIES):
    if modality in variables and modality in pooled:
      own = variables[modality]
      x_bc = jnp.where(present_bm[:, column, None], pooled[modality], 0)
      x_bc = (x_bc - own['mean_c'][None]) * own['scale_c'][None]
      cosine_bm = jnp.matmul(unit(x_bc), own['units_mc'].astype(jnp.float32).T, precision='highest')
      both_bm = present_bm[:, column, None] & own['has_m'][None]
      total_bm += jnp.where(both_bm, cosine_bm, 0.0)
      count_bm += both_bm.astype(jnp.float32)
  score_bm = jnp.where(count_bm > 0, total_bm / jnp.maximum(count_bm, 1), _NOTHING)
  most = min(COUNTS[-1], score_bm.shape[1])
  score_bn, index_bn = jax.lax.top_k(score_bm, most)
  weight_bn = jnp.exp((score_bn - score_bn[:, :1]) / TEMPERATURE)
  return jnp.where(score_bn > _NOTHING, weight_bn, 0.0), jnp.take(
    variables['label_mk'], index_bn, axis=0
  )


def probabilities(
  weight_bn: jax.Array, label_bnk: jax.Array, mean_k: jax.Array, count_b: jax.Array
) -> jax.Array:
  """Returns the share of the votes of the nearest `count_b` that each class has, float32[B, K]."""
  rank_1n = jnp.arange(weight_bn.shape[1])[None]
  weight_bn = jnp.where(rank_1n < count_b[:, None], weight_bn, 0.0)
  votes_bk = jnp.einsum('bn,bnk->bk', weight_bn, label_bnk, precision='highest')
  return (votes_bk + mean_k[None]) / (jnp.sum(weight_bn, axis=1, keepdims=True) + 1)


def logits(
  variables: Mapping[str, Any],
  pooled: Mapping[str, jax.Array],
  present_bm: jax.Array,
  *,
  multi_label: bool,
) -> jax.Array:
  """Returns log-probabilities, of several labels their logits, float32[B, K]; zeros where nothing
  was fitted. Arguments as `nearest` has them.
  """
  weight_bn, label_bnk = nearest(variables, pooled, present_bm)
  # Of the three patterns an example has its own, the first whose modalities are all there.
  able_bv = jnp.stack([present_bm[:, pattern].all(axis=1) for pattern in PATTERNS], axis=1)
  count_b = jnp.take(variables['count_v'], jnp.argmax(able_bv, axis=1))
  found_bk = probabilities(weight_bn, label_bnk, variables['mean_k'], count_b)
  found_bk = jnp.clip(found_bk, 1e-6, 1 - 1e-6)
  logits_bk = jnp.log(found_bk) - (jnp.log1p(-found_bk) if multi_label else 0.0)
  return jnp.where(jnp.any(variables['count_v'] > 0), logits_bk, 0.0)


def fit(training: Examples, held: Examples, *, examples: int, multi_label: bool) -> dict[str, Any]:
  """Returns the variables of `empty`: training examples, and k of each missing pattern by the log
  loss of examples held out (k = 10 where these are too few).

  Args:
    training: at most `examples` of them are compared with, the first.
    held: to choose by.
    examples: M of the variables.
    multi_label: whether an example can have several labels.
  """
  target_nk = training.target_bk
  label_mk = _padded(target_nk[:examples], examples)
  found = {'label_mk': label_mk, 'mean_k': target_nk.mean(axis=0)}
  for modality, pooled in training.pooled.items():
    x_nc = pooled['mean'].astype(np.float32)
    # A text without a token is none.
    has_n = training.present_bm[:, MODALITIES.index(modality)] & np.any(x_nc, axis=1)
    mean_c, scale_c = ridge_kernels.space(x_nc[has_n] if has_n.any() else x_nc)
    units_mc = np.asarray(unit((x_nc[:examples] - mean_c) * scale_c), np.float16)
    found[modality] = {
      'mean_c': mean_c,
      'scale_c': scale_c,
      'units_mc': _padded(units_mc, examples),
      'has_m': _padded(has_n[:examples], examples),
    }
  counts = [_choose(found, held, pattern_m, multi_label) for pattern_m in PATTERNS]
  return {**found, 'count_v': np.array(counts, np.int32)}


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
  return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def _choose(variables, held, pattern_m, multi_label) -> int:
  """The k of one missing pattern."""
  rows = held.having(pattern_m)
  if len(rows) < ridge_solver.LEAST:
    return 10
  search = compiling.jit(nearest)
  losses = np.zeros(len(COUNTS))
  for block in np.array_split(rows, -(-len(rows) // _BLOCK)):
    pooled = {m: groups['mean'][block].astype(np.float32) for m, groups in held.pooled.items()}
    present_bm = np.tile(pattern_m, (len(block), 1))
    weight_bn, label_bnk = search(variables, pooled, present_bm)
    for n, count in enumerate(COUNTS):
      count_b = np.full(len(block), count)
      found_bk = probabilities(weight_bn, label_bnk, variables['mean_k'], count_b)
      losses[n] += _log_loss(np.asarray(found_bk), held.target_bk[block], multi_label)
  return COUNTS[int(np.argmin(losses))]


def _log_loss(found_bk, target_bk, multi_label) -> float:
  found_bk = np.clip(found_bk, 1e-6, 1 - 1e-6)
  loss_bk = -target_bk * np.log(found_bk)
  if multi_label:
    loss_bk -= (1 - target_bk) * np.log1p(-found_bk)
  return float(loss_bk.sum())
