"""Hostile pairs of views for the CCA loss, compared with its definition in float64.

A trial is PAIRS pairs of one shape, each with a ridge, weights, scales and defects of its own,
through `jit(vmap(value_and_grad(cca_loss)))` with each solver. It raises if a loss is not in [-1,
0], a gradient is not finite or not zero in a row of weight 0, any bit depends on what such rows
hold, or a pair that is well posed in float32 has another loss or gradient than in float64.

A pair is well posed where the definition itself moves by less than a limit when a view moves by
what float32 rounds away, and where a solver resolves the least of its directions (`Limit`).
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from molt_jax.objectives.cca.loss import SOLVERS, cca_loss

PAIRS = 500
SHAPES = ((1, 2, 3), (3, 5, 5), (6, 3, 2), (9, 8, 8), (12, 8, 20), (16, 24, 17), (40, 6, 5))
FLOAT32 = np.finfo(np.float32)
EPS, TINY, LARGEST = float(FLOAT32.eps), float(FLOAT32.tiny), float(FLOAT32.max)
NOISE = 8 * EPS  # Of the norm of a view.
CUT, NO_CUT = 2e-5, 1e-11  # Singular values below are noise beside the largest.


class Limit(NamedTuple):
  """When a number is compared, and how exactly.

  Attributes:
    movement: most that what float32 rounds away may move the number (a gradient, relative to its
      norm).
    least: singular values below this, of T or of A, are not fully resolved.
    of_s: share of eps ||S||_F / r that counts as movement, of the loss or of the terms of a
      gradient.
    tolerance: the number may be off by this and ten times its movement.
  """

  movement: float
  least: float
  of_s: float
  tolerance: float


LIMITS = {
  'eigh': (Limit(1e-3, 0, 0, 2e-5), Limit(1e-2, 0, 0, 2e-3)),
  'newton_schulz': (Limit(1e-3, 0, 0.2, 5e-4), Limit(1e-2, 2e-2, 1, 5e-3)),
}  # Of the loss, of its gradients.


# Pairs.


def _some_columns(rng, x_nd, value):
  return np.where(rng.random((1, x_nd.shape[1])) < rng.random(), value, x_nd)


def _graded(rng, x_nd):
  """A spectrum from 1 down to as little as 1e-8."""
  u_nk, s_k, v_kd = np.linalg.svd(x_nd, full_matrices=False)
  return u_nk * np.geomspace(1, 10.0 ** rng.uniform(-8, 0), len(s_k)) @ v_kd


def _low_rank(rng, x_nd):
  rank = min(rng.integers(1, 3), x_nd.shape[1])
  return x_nd[:, :rank] @ rng.normal(size=(rank, x_nd.shape[1]))


def _outlier(rng, x_nd):
  is_outlier_n1 = np.arange(len(x_nd))[:, None] == len(x_nd) // 2
  return x_nd * np.where(is_outlier_n1, 10.0 ** rng.uniform(0, 10), 1)


def _one_entry(rng, x_nd):
  return x_nd * (np.arange(x_nd.size).reshape(x_nd.shape) == rng.integers(x_nd.size))


def _dominated(rng, x_nd):
  return x_nd * np.where(np.arange(x_nd.shape[1]) == 0, 10.0 ** rng.uniform(0, 5), 1)


DEFECTS = {
  'none': lambda rng, x_nd: x_nd,
  'zero': lambda rng, x_nd: 0 * x_nd,
  'one number': lambda rng, x_nd: 0 * x_nd + np.float32(10.0 ** rng.uniform(-40, 38)),
  'equal rows': lambda rng, x_nd: 0 * x_nd + x_nd[:1],
  'constant columns': lambda rng, x_nd: _some_columns(rng, x_nd, np.float32(rng.normal())),
  'denormal': lambda rng, x_nd: x_nd * 10.0 ** rng.uniform(-45, -38),
  'denormal columns': lambda rng, x_nd: _some_columns(rng, x_nd, 1e-45),
  'one entry': _one_entry,
  'equal columns': lambda rng, x_nd: x_nd[:, rng.integers(0, x_nd.shape[1], x_nd.shape[1])],
  'duplicate rows': lambda rng, x_nd: x_nd[rng.integers(0, len(x_nd), len(x_nd))],
  'low rank': _low_rank,
  'graded': _graded,
  'dominated': _dominated,
  'mixed scales': lambda rng, x_nd: x_nd * 10.0 ** rng.uniform(-40, 30, (1, x_nd.shape[1])),
  'far away': lambda rng, x_nd: x_nd + 10.0 ** rng.uniform(1, 6),
  'outlier': _outlier,
  'largest': lambda rng, x_nd: np.sign(x_nd) * LARGEST,
  'binary': lambda rng, x_nd: (x_nd > 0.5) * 1.0,
}
SCALES = (
  lambda rng: 1.0,
  lambda rng: 10.0 ** rng.uniform(-3, 3),
  lambda rng: 10.0 ** rng.uniform(-44, 38),
)
RIDGES = (
  lambda rng: 0.0,
  lambda rng: 1e-3,
  lambda rng: 10.0 ** rng.uniform(-12, 0),
  lambda rng: 10.0 ** rng.uniform(-40, 6),
)
WEIGHTS = (
  lambda rng, n: np.ones(n),
  lambda rng, n: rng.permutation(n) < rng.integers(0, n + 1),
  lambda rng, n: rng.permutation(n) < rng.integers(0, 5),
  lambda rng, n: rng.uniform(0.1, 3, n) * (rng.random(n) < 0.8),
  lambda rng, n: 10.0 ** rng.uniform(-1, 1, n) * 10.0 ** rng.uniform(-30, 30),
  lambda rng, n: 10.0 ** rng.uniform(-6, 0, n) * (rng.random(n) < 0.8),
)


def _one_of(rng, choices):
  return choices[rng.integers(len(choices))]


def pair(rng, n, d1, d2):
  """Returns ((x [n, d1], y [n, d2], weight [n], ridge), float32 and finite, the names of the
  defects).
  """
  z_ns = rng.normal(size=(n, 2))
  noise = 10.0 ** rng.uniform(-3, 1)
  views = [z_ns @ rng.normal(size=(2, d)) + noise * rng.normal(size=(n, d)) for d in (d1, d2)]
  if d1 == d2 and rng.random() < 0.1:
    views[1] = views[0] * rng.choice([1, -1])
  names = [_one_of(rng, list(DEFECTS)) if rng.random() < 0.6 else 'none' for _ in views]
  views = [DEFECTS[name](rng, view) for name, view in zip(names, views, strict=True)]
  views = [view * _one_of(rng, SCALES)(rng) for view in views]
  x_nd, y_nd = (np.clip(view, -LARGEST, LARGEST).astype(np.float32) for view in views)
  weight_n = _one_of(rng, WEIGHTS)(rng, n).astype(np.float32)
  return (x_nd, y_nd, weight_n, np.float32(_one_of(rng, RIDGES)(rng))), '/'.join(names)


# The definition in float64, of many pairs at once.


class Reference(NamedTuple):
  """What float64 says of P pairs.

  Attributes:
    loss_p: [P].
    gradients: of the two views, [P, n, d].
    moved_p: [3, P], how far loss and gradients move when the views do by NOISE; gradients relative
      to their norm.
    terms_p: [3, P], size of the terms that a gradient is the difference of, relative to its norm.
    rounded_a_p: [3, P], what rounding does to the direction of the least correlation, which counts
      like the others' in a gradient.
    rounded_s_p: [P], eps ||S||_F / r of the worse view, 0 where newton_schulz does not work on S.
    least_p: [P], the least of the singular values of both T and of A, relative to their bounds; 0
      where a view does not span all its directions.
  """

  loss_p: np.ndarray
  gradients: list[np.ndarray]
  moved_p: np.ndarray
  terms_p: np.ndarray
  rounded_a_p: np.ndarray
  rounded_s_p: np.ndarray
  least_p: np.ndarray


class Whitened(NamedTuple):
  """T, B of `molt_jax.objectives.cca.loss`, a bound of the singular values of T, and the least
  beside it.
  """

  t_pnk: np.ndarray
  back_pkd: np.ndarray
  bound_p: np.ndarray
  least_p: np.ndarray


def _roots(weight_pn):
  """sqrt(weight) relative to the largest, [P, n, 1], and the same as a unit vector."""
  root_pn = np.sqrt(weight_pn / np.maximum(weight_pn.max(axis=1, keepdims=True), 1e-300))
  length_p1 = np.maximum(np.linalg.norm(root_pn, axis=1, keepdims=True), 1e-300)
  return root_pn[:, :, None], (root_pn / length_p1)[:, :, None]


def _norm(x_pnd):
  return np.linalg.norm(x_pnd, axis=(1, 2), keepdims=True)


def _inverse(x):
  return np.where(x > 0, 1 / np.where(x > 0, x, 1), 0)


def _least(x_pk):
  """The least positive number of each row; 1 where there is none."""
  return np.where(x_pk > 0, x_pk, 1).min(axis=1)


def centred(view_pnd, weight_pn):
  """Returns the views minus their weighted mean, times sqrt(weight), over their norm; and the
  norm.
  """
  is_live_pn1 = weight_pn[:, :, None] > 0
  # A CPU reads denormal numbers as 0.
  is_read_pnd = is_live_pn1 & (np.abs(view_pnd) >= TINY)
  view_pnd = np.where(is_read_pnd, view_pnd.astype(np.float64), 0)
  first_p11 = np.argmax(is_live_pn1, axis=1)[:, :, None]
  # Without the first row, equal rows are exactly 0.
  view_pnd = np.where(is_live_pn1, view_pnd - np.take_along_axis(view_pnd, first_p11, axis=1), 0)
  root_pn1, unit_pn1 = _roots(weight_pn)
  mean_p1d = (unit_pn1**2 * view_pnd).sum(axis=1, keepdims=True)
  view_pnd = np.where(is_live_pn1, view_pnd - mean_p1d, 0) * root_pn1
  return view_pnd * _inverse(_norm(view_pnd)), _norm(view_pnd)


def _whitened(view_pnd, ridge_p, most_p, cut):
  """Without the directions below `cut` of the largest."""
  u_pnk, s_pk, v_pkd = np.linalg.svd(view_pnd, full_matrices=False)
  r_p1 = ridge_p[:, None] / view_pnd.shape[2]
  is_there_pk = s_pk > np.maximum(cut * s_pk[:, :1], 1e-200)
  is_full_p = is_there_pk.sum(axis=1) >= most_p
  back_pk = is_there_pk / np.sqrt(np.where(is_there_pk, s_pk**2 + r_p1, 1))
  bound_p1 = np.sqrt(1 / np.maximum(r_p1, 1))
  t_pnk = u_pnk * (s_pk * back_pk)[:, None, :]
  least_p = np.where(is_full_p, _least(s_pk * back_pk / bound_p1), 0)
  return Whitened(t_pnk, back_pk[:, :, None] * v_pkd, bound_p1[:, 0], least_p)


def _gradient(own_pnd, own, other, polar_pjk, weight_pn):
  """d corr / d view, and the size of the terms that it is the difference of."""
  root_pn1, unit_pn1 = _roots(weight_pn)
  whole_pnk = other.t_pnk @ polar_pjk
  projected_pnk = own.t_pnk @ (own.t_pnk.transpose(0, 2, 1) @ whole_pnk)
  g_pnd = (whole_pnk - projected_pnk) @ own.back_pkd
  g_pnd -= (g_pnd * own_pnd).sum(axis=(1, 2), keepdims=True) * own_pnd
  g_pnd -= unit_pn1 * (unit_pn1 * g_pnd).sum(axis=1, keepdims=True)
  return g_pnd * root_pn1, _norm(whole_pnk) * _norm(own.back_pkd)


def definition(views, weight_pn, ridge_p, cut):
  """Returns (loss [P], gradients, sizes of their terms, least [P]), of views as `centred` leaves
  them.
  """
  count_p = (weight_pn > 0).sum(axis=1)
  x, y = (_whitened(v, ridge_p, np.minimum(count_p - 1, v.shape[2]), cut) for v in views)
  left_pks, s_ps, right_psj = np.linalg.svd(
    x.t_pnk.transpose(0, 2, 1) @ y.t_pnk, full_matrices=False
  )
  is_there_ps = s_ps > 1e-9 * np.maximum(s_ps[:, :1], 1e-300)
  polar_pkj = (left_pks * is_there_ps[:, None, :]) @ right_psj
  most = min(view_pnd.shape[2] for view_pnd in views)
  share_p = np.where(count_p >= 3, 1 / np.clip(count_p - 1, 1, most), 0)
  gradients = (
    _gradient(views[0], x, y, polar_pkj.transpose(0, 2, 1), weight_pn),
    _gradient(views[1], y, x, polar_pkj, weight_pn),
  )
  gradients = [[-share_p[:, None, None] * m for m in g] for g in gradients]
  relative_ps = np.where(is_there_ps, s_ps, 0) / (x.bound_p * y.bound_p)[:, None]
  least = np.stack([x.least_p, y.least_p, _least(relative_ps)])
  return -share_p * s_ps.sum(axis=1), *zip(*gradients, strict=True), least


def _noisy(rng, view_pnd, weight_pn):
  e_pnd = rng.normal(size=view_pnd.shape) * (weight_pn > 0)[:, :, None]
  return view_pnd + NOISE * _norm(view_pnd) / np.sqrt(view_pnd[0].size) * e_pnd


def _rounding_of_s(view_pnd, ridge_p):
  s_pk = np.linalg.svd(view_pnd, compute_uv=False)
  rounding_p = EPS * np.linalg.norm(s_pk**2, axis=1)
  r_p = ridge_p / view_pnd.shape[2]
  return np.where(r_p >= 3 * rounding_p, rounding_p / np.maximum(r_p, 1e-300), 0)


def reference(pairs, rng):
  """Returns the `Reference` of pairs (x, y, weight, ridge), each stacked."""
  *views, weight_pn, ridge_p = (np.asarray(a) for a in pairs)
  weight_pn, ridge_p = weight_pn.astype(np.float64), ridge_p.astype(np.float64)
  views, norms = zip(*(centred(view_pnd, weight_pn) for view_pnd in views), strict=True)
  loss_p, gradients, terms, least_p = definition(views, weight_pn, ridge_p, CUT)
  others = [definition(views, weight_pn, ridge_p, NO_CUT)]
  for _ in range(2):
    noisy = [_noisy(rng, view_pnd, weight_pn) for view_pnd in views]
    others.append(definition(noisy, weight_pn, ridge_p, CUT))
  moved_p = [np.max([np.abs(other[0] - loss_p) for other in others], axis=0)]
  terms_p = [np.ones_like(loss_p)]
  for i, g_pnd in enumerate(gradients):
    inverse_p = _inverse(_norm(g_pnd))[:, 0, 0]
    moved_p.append(np.max([_norm(o[1][i] - g_pnd)[:, 0, 0] for o in others], axis=0) * inverse_p)
    size_p = np.abs(terms[i])[:, 0, 0]
    terms_p.append(np.where((size_p > 0) & (inverse_p == 0), np.inf, size_p * inverse_p))
  rounded_s_p = np.max([_rounding_of_s(view_pnd, ridge_p) for view_pnd in views], axis=0)
  gradients = [g_pnd * _inverse(norm_p11) for g_pnd, norm_p11 in zip(gradients, norms, strict=True)]
  rounded_a_p = EPS / least_p[2] * np.array([[0], [1], [1]])
  return Reference(
    loss_p,
    gradients,
    np.stack(moved_p),
    np.stack(terms_p),
    rounded_a_p,
    rounded_s_p,
    least_p.min(axis=0),
  )


# The product.


@functools.cache
def compiled(solver):
  """Loss and gradients of many pairs, one program for each shape."""

  def one(x_nd, y_nd, weight_n, ridge):
    def loss(x_nd, y_nd):
      return cca_loss(x_nd, y_nd, weight_n=weight_n, ridge=ridge, solver=solver)

    loss, gradients = jax.value_and_grad(loss, argnums=(0, 1))(x_nd, y_nd)
    return loss, *gradients

  return jax.jit(jax.vmap(one))


def with_others_in_absent_rows(pairs, value):
  """The same pairs, rows of weight 0 filled with `value`."""
  x_pnd, y_pnd, weight_pn, ridge_p = pairs
  is_live_pn1 = weight_pn[:, :, None] > 0
  filled = [np.where(is_live_pn1, view_pnd, np.float32(value)) for view_pnd in (x_pnd, y_pnd)]
  return *filled, weight_pn, ridge_p


def always_true_of(results, weight_pn):
  """bool[P]: in range, finite, nothing in rows of weight 0."""
  loss_p, *gradients = results
  holds_p = (loss_p >= -1) & (loss_p <= 0)
  for g_pnd in gradients:
    holds_p &= np.isfinite(g_pnd).all(axis=(1, 2))
    holds_p &= ~np.any(g_pnd * (weight_pn == 0)[:, :, None], axis=(1, 2))
  return holds_p


def same_bits(results, others):
  """bool[P]."""
  pairs = zip(results, others, strict=True)
  return np.all([(a == np.asarray(b)).reshape(len(a), -1).all(axis=1) for a, b in pairs], axis=0)


def _flushed(wanted_pnd):
  """[P], the norm of the entries that a CPU can flush to 0.

  Many small entries are more than a few percent of a gradient whose norm is far above TINY, so that
  the norm alone does not tell. Twice TINY: an entry may be rounded, by much less, before it is
  flushed.
  """
  return _norm(np.where(np.abs(wanted_pnd) < 2 * TINY, wanted_pnd, 0))[:, 0, 0]


def judge(solver, results, expected):
  """Returns (bool[3, P], whether loss and gradients can be compared; bool[3, P], whether they are
  right).
  """
  limits = LIMITS[solver]
  is_posed, is_right = [], []
  for i, wanted in enumerate((expected.loss_p, *expected.gradients)):
    limit = limits[min(i, 1)]
    got, axes = results[i].astype(np.float64), tuple(range(1, wanted.ndim))
    size_p = np.linalg.norm(wanted, axis=axes) if axes else np.ones_like(wanted)
    error_p = np.linalg.norm(got - wanted, axis=axes) if axes else np.abs(got - wanted)
    relative_p = 16 * EPS + limit.of_s * expected.rounded_s_p
    off_p = expected.moved_p[i] + 16 * expected.rounded_a_p[i] + expected.terms_p[i] * relative_p
    if axes:
      off_p = off_p + _flushed(wanted) * _inverse(size_p)
    largest_p = np.abs(wanted).max(axis=axes) if axes else 0 * wanted
    # Beyond float32's range a gradient is clipped.
    is_in_range_p = largest_p < 1e-2 * LARGEST
    is_posed.append((off_p < limit.movement) & (expected.least_p >= limit.least) & is_in_range_p)
    off_p = np.minimum(off_p, limit.movement)
    is_right.append(error_p <= (limit.tolerance + 10 * off_p) * size_p)
  return np.stack(is_posed), np.stack(is_right)


def trial(rng, folder):
  """One shape, both solvers; see `fuzz.py`."""
  del folder
  shape = _one_of(rng, SHAPES)
  made = [pair(rng, *shape) for _ in range(PAIRS)]
  pairs = [np.stack(column) for column in zip(*(arrays for arrays, _ in made), strict=True)]
  expected, outcomes = reference(pairs, rng), {}
  for solver in SOLVERS:
    results = [np.asarray(m) for m in compiled(solver)(*pairs)]
    _must_hold(
      always_true_of(results, pairs[2]), f'{solver}: not finite or out of range', shape, made
    )
    for value in (np.nan, -np.inf):
      again = compiled(solver)(*with_others_in_absent_rows(pairs, value))
      _must_hold(same_bits(results, again), f'{solver}: absent rows matter', shape, made)
    is_posed, is_right = judge(solver, results, expected)
    for what, posed_p, right_p in zip(('loss', 'dx', 'dy'), is_posed, is_right, strict=True):
      _must_hold(right_p | ~posed_p, f'{solver}: {what} is not that of float64', shape, made)
      outcomes[f'{solver} {what}: finite and right'] = int(posed_p.sum())
      outcomes[f'{solver} {what}: finite, ill posed'] = int((~posed_p).sum())
  return outcomes


def _must_hold(holds_p, message, shape, made):
  if not holds_p.all():
    failed = np.flatnonzero(~holds_p)
    raise AssertionError(
      f'{message}: {len(failed)} pairs of shape {shape}, pair {failed[0]} ({made[failed[0]][1]})'
    )
