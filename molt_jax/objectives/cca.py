"""Canonical correlation as a loss: exact value, closed-form gradient, finite for every finite input.

For two views X [n, d1], Y [n, d2] with centred rows, S11 = X'X + r1 I, S22 = Y'Y + r2 I and S12 = X'Y,

  corr = || S11^(-1/2) S12 S22^(-1/2) ||_*      (nuclear norm: the sum of canonical correlations, Andrew et al. 2013)
  loss = -corr / min(n - 1, d1, d2)             in [-1, 0]

The ridge r = ridge * tr(X'X) / d is relative to the mean eigenvalue, so the loss does not depend on the scale of a view.

How it is computed. With the Gram matrix K = X X', R = K (K + r)^(-1) and any factor T T' = R, corr = || T_x' T_y ||_*. Each view picks the
smaller of two spaces at trace time, [n, n] (Gram) or [d, d] (covariance), so n = 32 samples of width 1024 never build a 1024 x 1024 matrix.
With the polar factor W of A = T_x' T_y (A = W H), and `back` B_x the map from factor to view space,

  d corr / dX = (I - R_x) T_y W' B_x,    then made orthogonal to X: that is what a ridge that moves with tr(X'X) adds.

Nothing differentiates through `eigh` or `svd`, whose derivatives are infinite at the repeated eigenvalues every small batch has.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

SOLVERS = ('eigh', 'newton_schulz')

_EPS = float(jnp.finfo(jnp.float32).eps)
_JITTER = 16 * _EPS  # Relative to each diagonal entry of a matrix to be factored; divided out again.
_MIN_SPREAD = 1e-30  # A view that deviates from its mean by less counts as constant; its gradient, 1 / spread, would leave float32.
_NEARLY_ORTHOGONAL = 0.1  # ||A'A - I||_F below which the iteration without an SVD has converged in float32.
_WELL_CONDITIONED = 200.0  # Bound of a condition number up to which Cholesky needs no graded basis.
_MIN_ROWS = 3  # Two samples always correlate perfectly.


class Centred(NamedTuple):
  """A view with weighted mean zero and unit Frobenius norm: x_nd = xc_nd / inverse_norm, row by row times sqrt(weight)."""

  x_nd: jax.Array
  inverse_norm: jax.Array
  mean_d: jax.Array


class Rows(NamedTuple):
  """What the weights say about the rows: their roots, as they are and as a unit vector (the direction of the mean), and how many count."""

  root_weight_n: jax.Array
  unit_n: jax.Array
  count: jax.Array


class Factor(NamedTuple):
  """T [n, k] with T T' = K (K + r)^(-1) and the map B [k, d] back to the view, both as matrices to be multiplied in the cheapest order of what they
  stand in (so that no more products than need be are as long as n), and I - T T' where it is known without cancellation (Gram space)."""

  t: tuple[jax.Array, ...]
  back: tuple[jax.Array, ...]
  residual_nn: jax.Array | None


def cca_loss(x_nd, y_nd, *, weight_n=None, ridge=1e-3, solver='eigh'):
  """Negative mean canonical correlation of two views.

  Computed in float32 at the highest matrix precision whatever the input type. Batched over leading axes: [L, n, d] gives [L]. Under `jit` on a
  sharded batch the statistics are those of the global batch, to rounding; a gradient that equals one device's to the bit takes rows that were
  brought together (`with_sharding_constraint`) first. First derivatives only; `weight_n` and `ridge` get none.

  Args:
    x_nd: [..., n, d1] samples of one view.
    y_nd: [..., n, d2] the same samples in the other view.
    weight_n: [n] or [..., n] non-negative weight of each row, any numeric type. A row of weight 0 is as if it were not there, whatever it holds.
    ridge: scalar >= 0; ridge of each covariance relative to its mean eigenvalue.
    solver: 'eigh' (`eigh` and `svd`; the reference) or 'newton_schulz' (Cholesky and matrix products only, for accelerators). The second works
      on S itself: its relative error grows like eps ||S||_F / r, and a ridge below 4 eps ||S||_F is raised to that.

  Returns:
    [...] float32 in [-1, 0]: minus the sum of correlations over min(rows - 1, d1, d2), counting the rows of positive weight. 0 with zero
    gradient for fewer than three such rows or a view that is constant over them. With 'eigh', directions that a view does not span get no gradient.

  Raises:
    ValueError: shapes that do not pair up, or an unknown solver.
  """
  x_nd, y_nd, weight_n, ridge = _check(x_nd, y_nd, weight_n, ridge, solver)
  return _batched(functools.partial(_loss, solver), x_nd.ndim - 2)(x_nd, y_nd, weight_n, ridge)


def _batched(function, num_axes):
  """vmap over leading axes (not over the last argument); on a CPU one after the other.

  There jaxlib's batched LAPACK calls wait, on a thread of XLA's pool, for work they have put into the same pool: two at once on two cores hang.
  """
  if not num_axes:
    return function
  inner = _batched(function, num_axes - 1)

  def one_by_one(*arrays):
    return lax.map(lambda slices: inner(*slices, arrays[-1]), arrays[:-1])

  at_once = jax.vmap(inner, in_axes=(0, 0, 0, None))
  return lambda *arrays: lax.platform_dependent(*arrays, cpu=one_by_one, default=at_once)


def canonical_correlations(x_nd, y_nd, *, weight_n=None, ridge=1e-3):
  """Canonical correlations in descending order, [..., min(n, d1, d2)] float32; directions that do not exist read 0. No gradient flows.

  Arguments and errors as for `cca_loss`; the same ridge, so their sum is that loss times minus the number of directions.
  """
  x_nd, y_nd, weight_n, ridge = _check(x_nd, y_nd, weight_n, ridge, 'eigh')

  def spectrum(x_nd, y_nd, weight_n, ridge):
    with jax.default_matmul_precision('highest'):
      rows = weigh_rows(weight_n)
      x, y = (whiten(centre(view, rows).x_nd, rows, ridge, 'eigh') for view in (x_nd, y_nd))
      s = jnp.linalg.svd(cross(x, y), compute_uv=False)
    return jnp.where(rows.count >= _MIN_ROWS, jnp.minimum(s, 1.0), 0.0)

  return lax.stop_gradient(_batched(spectrum, x_nd.ndim - 2)(x_nd, y_nd, weight_n, ridge))


def _check(x_nd, y_nd, weight_n, ridge, solver):
  """Pairs up the arguments; weights become float32 over every row, the ridge a float32 scalar."""
  x_nd, y_nd = jnp.asarray(x_nd), jnp.asarray(y_nd)
  if x_nd.ndim < 2 or x_nd.shape[:-1] != y_nd.shape[:-1] or not x_nd.size or not y_nd.size:
    raise ValueError(f'cca: views must be [..., n, d1] and [..., n, d2] with the same rows, got {x_nd.shape} and {y_nd.shape}')
  if solver not in SOLVERS:
    raise ValueError(f'cca: solver {solver!r} is not one of {SOLVERS}')
  if isinstance(ridge, int | float) and not 0 <= ridge < float('inf'):
    raise ValueError(f'cca: ridge must be finite and at least 0, got {ridge}')
  weight_n = jnp.ones(x_nd.shape[-2]) if weight_n is None else jnp.asarray(weight_n)
  if weight_n.shape not in (x_nd.shape[-2:-1], x_nd.shape[:-1]):
    raise ValueError(f'cca: weight must be {x_nd.shape[-2:-1]} or {x_nd.shape[:-1]}, got {weight_n.shape}')
  weight_n = jnp.broadcast_to(lax.stop_gradient(weight_n).astype(jnp.float32), x_nd.shape[:-1])
  return x_nd, y_nd, weight_n, lax.stop_gradient(jnp.asarray(ridge, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(solver, x_nd, y_nd, weight_n, ridge):
  return _loss_and_gradients(x_nd, y_nd, weight_n, ridge, solver)[0]


def _loss_fwd(solver, x_nd, y_nd, weight_n, ridge):
  loss, dx_nd, dy_nd = _loss_and_gradients(x_nd, y_nd, weight_n, ridge, solver)
  return loss, (dx_nd, dy_nd, jnp.zeros((), x_nd.dtype), jnp.zeros((), y_nd.dtype), jnp.zeros_like(weight_n), jnp.zeros_like(ridge))


def _loss_bwd(solver, saved, g):
  dx_nd, dy_nd, like_x, like_y, *no_gradients = saved
  return _as_like(g * dx_nd, like_x), _as_like(g * dy_nd, like_y), *no_gradients


def _as_like(gradient_nd, like):
  """Cast to the type of the input, where what is beyond its range becomes its largest number."""
  largest = jnp.finfo(like.dtype).max.astype(jnp.float32)
  return jnp.clip(gradient_nd, -largest, largest).astype(like.dtype)


_loss.defvjp(_loss_fwd, _loss_bwd)


def _loss_and_gradients(x_nd, y_nd, weight_n, ridge, solver):
  """Loss and its float32 gradients; a caller who wants the value alone pays for nothing else, since XLA drops what is not used."""
  with jax.default_matmul_precision('highest'):
    rows = weigh_rows(weight_n)
    centred_x, centred_y = centre(x_nd, rows), centre(y_nd, rows)
    x, y = (whiten(centred.x_nd, rows, ridge, solver) for centred in (centred_x, centred_y))
    a_kj = cross(x, y)
    corr, w_kj = _POLAR[solver](a_kj)
    num_directions = jnp.clip(rows.count - 1, 1, min(x_nd.shape[-1], y_nd.shape[-1]))
    share = jnp.where(rows.count >= _MIN_ROWS, 1.0 / num_directions, 0.0)
    dx_nd = _pull_back(x, y, a_kj, w_kj.T, centred_x, rows)
    dy_nd = _pull_back(y, x, a_kj.T, w_kj, centred_y, rows)
  return jnp.clip(-share * corr, -1.0, 0.0), -share * dx_nd, -share * dy_nd


def cross(x, y):
  """A = T_x' T_y of two `Factor`s, [k, j]; its singular values are the canonical correlations."""
  return jnp.linalg.multi_dot([*(_turned(m) for m in reversed(x.t)), *y.t])


def _pull_back(own, other, a_kj, w_jk, centred, rows):
  """Gradient of corr with respect to one view; A and W' are those from the own factor to the other."""
  if own.residual_nn is None:
    g_nd = jnp.linalg.multi_dot([*other.t, w_jk, *own.back]) - jnp.linalg.multi_dot([*own.t, a_kj @ w_jk, *own.back])
  else:
    g_nd = jnp.linalg.multi_dot([own.residual_nn, *other.t, w_jk, *own.back])
  g_nd -= jnp.sum(g_nd * centred.x_nd) * centred.x_nd  # The ridge follows the trace: no gradient along X itself.
  g_nd -= rows.unit_n[:, None] * (rows.unit_n @ g_nd)[None, :]
  return g_nd * rows.root_weight_n[:, None] * centred.inverse_norm


def weigh_rows(weight_n):
  """`Rows` of float32 weights [n]; negative weights count as 0."""
  weight_n = jnp.maximum(weight_n, 0.0)
  weight_n = weight_n / jnp.maximum(jnp.max(weight_n), jnp.finfo(jnp.float32).tiny)
  root_n = jnp.sqrt(weight_n)
  unit_n = root_n * lax.rsqrt(jnp.maximum(jnp.sum(weight_n), 1e-6))
  return Rows(root_n, unit_n, jnp.sum(weight_n > 0))


def _null_projector(rows):
  """Projects on what no centred view can contain: absent rows and the mean."""
  return jnp.diag(jnp.where(rows.root_weight_n > 0, 0.0, 1.0)) + rows.unit_n[:, None] * rows.unit_n[None, :]


def centre(x_nd, rows):
  """`Centred` view. Exact zeros for a constant column: a row is subtracted before the mean is, and scaling is by powers of two.

  Rows of weight 0 are never read, so they may hold NaN.
  """
  valid_n1 = rows.root_weight_n[:, None] > 0
  x_nd = jnp.where(valid_n1, x_nd.astype(jnp.float32), 0.0)
  size = _magnitude(x_nd)
  x_nd = x_nd * (1 / size)
  first_n1 = jnp.arange(x_nd.shape[0])[:, None] == jnp.argmax(valid_n1)
  first_d = jnp.sum(jnp.where(first_n1, x_nd, 0.0), axis=0)
  x_nd = jnp.where(valid_n1, x_nd - first_d[None, :], 0.0)
  spread = _magnitude(x_nd)
  x_nd = x_nd * (1 / spread)
  mean_d = jnp.zeros_like(first_d)
  for _ in range(2):  # The second pass removes the rounding of the first.
    step_d = (rows.unit_n * rows.unit_n) @ x_nd
    x_nd, mean_d = jnp.where(valid_n1, x_nd - step_d[None, :], 0.0), mean_d + step_d
  x_nd = x_nd * rows.root_weight_n[:, None]
  norm = jnp.sqrt(jnp.sum(x_nd * x_nd))
  is_constant = norm * spread * size < _MIN_SPREAD
  inverse = jnp.where(is_constant, 0.0, 1.0 / jnp.where(is_constant, 1.0, norm))
  return Centred(x_nd * inverse, inverse * (1 / spread) * (1 / size), (first_d + mean_d * spread) * size)


def _magnitude(x_nd):
  """The power of two just below the largest entry, so that dividing by it is exact; its inverse is representable too."""
  bits = lax.bitcast_convert_type(jnp.max(jnp.abs(x_nd)), jnp.uint32) & jnp.uint32(0x7F800000)
  return jnp.clip(lax.bitcast_convert_type(bits, jnp.float32), 2.0**-120, 2.0**126)


def whiten(x_nd, rows, ridge, solver):
  """`Factor` of a centred view, in Gram space when n <= d."""
  n, d = x_nd.shape
  in_gram_space = n <= d
  whiten_by, floor = _WHITEN[solver, in_gram_space]
  s_kk = x_nd @ x_nd.T if in_gram_space else _turned(x_nd) @ x_nd
  r = jnp.maximum(jnp.maximum(ridge / d, 1e-12), floor * jnp.sqrt(jnp.sum(s_kk * s_kk)))
  return whiten_by(x_nd, s_kk, r, rows)


def _whiten_gram_eigh(x_nd, k_nn, r, rows):
  """In a basis U of the rows in which the view is graded, G = U'X, Cholesky is accurate relative to each row.

  A well-conditioned K is so in any basis whose vectors span its known null space: a reflection does it. Any other takes the eigenvectors of K.
  """
  simple, fits = _reflected(x_nd, k_nn, r, rows)
  u_nn, g_nd, m_nn, inverse_l_nn, is_resolved_n = lax.cond(fits, lambda *_: simple, _in_eigenvectors, x_nd, k_nn, r, rows)
  j_nn = inverse_l_nn.T @ inverse_l_nn
  r_nn = j_nn @ m_nn
  r_nn = (r_nn + r_nn.T) / (2 + 2 * _JITTER)
  root_nn, back_nn = _root_and_solution(r_nn + jnp.diag(jnp.where(is_resolved_n, _JITTER * jnp.diag(r_nn), 1.0)), j_nn)
  return Factor((u_nn @ jnp.where(is_resolved_n[:, None], root_nn, 0.0),), (back_nn, g_nd), r * (u_nn @ j_nn @ u_nn.T))


def _reflected(x_nd, k_nn, r, rows):
  """The basis of the reflection that takes the mean to one row, all absent rows being known: what `_in_eigenvectors` returns, and whether it fits."""
  n = k_nn.shape[0]
  at = jnp.argmax(rows.unit_n)
  v_n = rows.unit_n + jax.nn.one_hot(at, n)
  h_nn = jnp.eye(n) - (2 / (v_n @ v_n)) * v_n[:, None] * v_n[None, :]
  is_resolved_n = (rows.root_weight_n > 0) & (jnp.arange(n) != at)
  twice = is_resolved_n[:, None] & is_resolved_n[None, :]
  g_nd = jnp.where(is_resolved_n[:, None], x_nd - (2 / (v_n @ v_n)) * v_n[:, None] * (v_n @ x_nd)[None, :], 0.0)
  m_nn = jnp.where(twice, h_nn @ k_nn @ h_nn, 0.0)
  unit = jnp.trace(m_nn) / n
  whole_nn = m_nn + jnp.diag(jnp.where(is_resolved_n, r, unit))
  inverse_l_nn = _inverse_cholesky(whole_nn)
  return (h_nn, g_nd, m_nn, inverse_l_nn, is_resolved_n), _is_well_conditioned(whole_nn, inverse_l_nn)


def _in_eigenvectors(x_nd, k_nn, r, rows):
  """The eigenvectors U of K as basis: (U, G = U'X, M = G G', the inverse of the Cholesky factor of M + r, which rows of G are no noise).

  What lies in the known null space is moved to a negative eigenvalue, well apart from small true ones. Singular values are read from G and not
  from eigh: their squares then carry noise eps^2 instead of eps, which decides whether duplicated rows look like a direction of their own.
  """
  n = k_nn.shape[0]
  gap = 1.0 / n
  e_n, u_nn = jnp.linalg.eigh(k_nn - gap * _null_projector(rows))
  g_nd = jnp.where(e_n > -gap / 2, 1.0, 0.0)[:, None] * (u_nn.T @ x_nd)
  is_resolved_n = _is_resolved(jnp.sum(g_nd * g_nd, axis=1), r, max(x_nd.shape))
  g_nd = jnp.where(is_resolved_n[:, None], g_nd, 0.0)
  m_nn = g_nd @ g_nd.T
  return u_nn, g_nd, m_nn, _inverse_root(m_nn + r * jnp.eye(n)), is_resolved_n


def _whiten_covariance_eigh(x_nd, s_dd, r, rows):
  """The same with the covariance: as it is where it is well-conditioned, else in its eigenvectors.

  Any square root whitens: with S + r = L L', T = X L^(-T) and B = L^(-1).
  """
  del rows
  whole_dd = s_dd + r * jnp.eye(s_dd.shape[0])
  inverse_l_dd = _inverse_cholesky(whole_dd)

  def in_eigenvectors(x_nd, inverse_l_dd):
    del inverse_l_dd
    _, v_dd = jnp.linalg.eigh(s_dd)
    g_nd = x_nd @ v_dd
    is_resolved_d = _is_resolved(jnp.sum(g_nd * g_nd, axis=0), r, max(x_nd.shape))
    g_nd = jnp.where(is_resolved_d[None, :], g_nd, 0.0)
    inverse_l_dd = _inverse_root(_turned(g_nd) @ g_nd + r * jnp.eye(s_dd.shape[0]))
    return g_nd, inverse_l_dd, inverse_l_dd @ jnp.where(is_resolved_d[:, None], v_dd.T, 0.0)

  g_nd, inverse_l_dd, back_dd = lax.cond(
      _is_well_conditioned(whole_dd, inverse_l_dd), lambda x_nd, inverse_l_dd: (x_nd, inverse_l_dd, inverse_l_dd), in_eigenvectors,
      x_nd, inverse_l_dd)
  return Factor((g_nd, inverse_l_dd.T), (back_dd,), None)


def _is_well_conditioned(a_kk, inverse_l_kk):
  """Whether Cholesky lost no more than a few bits: the condition number is at most the product of the largest row sums of A and its inverse."""
  size, inverse_size = (jnp.max(jnp.sum(jnp.abs(m_kk), axis=1)) for m_kk in (a_kk, inverse_l_kk.T @ inverse_l_kk))
  return size * inverse_size < _WELL_CONDITIONED  # Not so for NaN, of a Cholesky factor that is not there.


def _whiten_gram_newton_schulz(x_nd, k_nn, r, rows):
  """With K + r = L L' and O the polar factor of L, (K + r)^(-1/2) = O L^(-1); R is then a product with itself, never negative."""
  eye_nn, null_nn = jnp.eye(k_nn.shape[0]), _null_projector(rows)
  span_nn = eye_nn - null_nn
  k_nn = k_nn + null_nn / k_nn.shape[0] + r * eye_nn
  l_nn = jnp.linalg.cholesky(k_nn)
  o_nn = _newton_schulz_polar(l_nn * lax.rsqrt(jnp.sqrt(jnp.sum(k_nn * k_nn))), smallest=5e-4)
  m_nn = o_nn @ solve_triangular(l_nn, span_nn, lower=True)
  g_nd = m_nn @ x_nd
  t_nn, inverse_t_nn = _newton_schulz_root(g_nd @ g_nd.T, span_nn)
  return Factor((t_nn,), (inverse_t_nn, m_nn, g_nd), r * (m_nn @ m_nn.T))


def _whiten_covariance_newton_schulz(x_nd, s_dd, r, rows):
  """`_whiten_covariance_eigh` without the change of basis: accurate relative to the largest direction only."""
  del rows
  inverse_l_dd = _inverse_cholesky(s_dd + r * jnp.eye(s_dd.shape[0]))
  return Factor((x_nd @ inverse_l_dd.T,), (inverse_l_dd,), None)


def _turned(x_nk):
  """X', written out: on a CPU, products that sum over many rows are then up to twice as fast."""
  return lax.optimization_barrier(x_nk.T)


def _is_resolved(w_k, r, size):
  """Which squared singular values stand out of float32's noise and matter beside the ridge."""
  return w_k > jnp.maximum((4 * _EPS) ** 2 * size * jnp.max(w_k), _JITTER * r)


def _inverse_cholesky(a_kk):
  return solve_triangular(jnp.linalg.cholesky(a_kk), jnp.eye(a_kk.shape[0]), lower=True)


def _inverse_root(a_kk):
  """W with W'W = A^(-1)."""
  return _root_and_solution(a_kk, jnp.eye(a_kk.shape[0]))[1]


def _root_and_solution(a_kk, b_kj):
  """(L, L^(-1) B) with L L' = A, a graded matrix without negative eigenvalues but for rounding.

  By Cholesky. Eigenvectors in float32 can leave a direction that is not there (of duplicate rows) nearly parallel to one that is, though far shorter;
  rounding may then take a pivot below zero. L is then read from the eigenvectors of A with unit diagonal, and L^(-1) leaves out what is rounding.
  """
  def by_eigenvectors(a_kk, b_kj):
    scale_k = jnp.sqrt(jnp.maximum(jnp.diag(a_kk), jnp.finfo(jnp.float32).tiny))
    e_k, v_kk = jnp.linalg.eigh(a_kk / (scale_k[:, None] * scale_k[None, :]))
    is_there_k = e_k > 2 * len(a_kk) * _EPS
    root_k = jnp.where(is_there_k, jnp.sqrt(jnp.maximum(e_k, 0.0)), 0.0)
    inverse_k = jnp.where(is_there_k, lax.rsqrt(jnp.maximum(e_k, _EPS)), 0.0)
    return scale_k[:, None] * v_kk * root_k[None, :], inverse_k[:, None] * (v_kk.T @ (b_kj / scale_k[:, None]))

  l_kk = jnp.linalg.cholesky(a_kk)
  by_cholesky = l_kk, solve_triangular(l_kk, b_kj, lower=True)
  return lax.cond(jnp.all(jnp.isfinite(l_kk)), lambda *_: by_cholesky, by_eigenvectors, a_kk, b_kj)


def _polar_svd(a_kj):
  """Nuclear norm and polar factor; directions without correlation get none.

  The A of a batch smaller than the width is all but orthogonal, beside rows and columns of zeros. Then a few products are faster than an SVD.
  """
  square_jj = a_kj.T @ a_kj
  off_jj = square_jj - jnp.diag(jnp.where(jnp.diag(square_jj) > 0, 1.0, 0.0))
  return lax.cond(jnp.sum(off_jj * off_jj) < _NEARLY_ORTHOGONAL**2, _polar_of_nearly_orthogonal, _polar_by_svd, a_kj)


def _polar_by_svd(a_kj):
  """Divide and conquer (LAPACK's gesdd) can fail to converge on a finite matrix, rarely and on a CPU; all it returns is then NaN."""
  p_ks, s_s, q_sj = jnp.linalg.svd(a_kj, full_matrices=False)
  found = jnp.sum(s_s), (p_ks * (s_s > 8 * _EPS)[None, :]) @ q_sj
  return lax.cond(jnp.all(jnp.isfinite(s_s)), lambda _: found, _polar_by_eigenvectors, a_kj)


def _polar_by_eigenvectors(a_kj):
  """The same from the eigenvectors V of A'A: singular values are the lengths of the columns of A V, so that those near 0 are not noise of A'A."""
  _, v_jj = jnp.linalg.eigh(a_kj.T @ a_kj)
  g_kj = a_kj @ v_jj
  s_j = jnp.linalg.norm(g_kj, axis=0)
  return jnp.sum(s_j), (g_kj * jnp.where(s_j > 8 * _EPS, 1 / jnp.maximum(s_j, _EPS), 0.0)[None, :]) @ v_jj.T


def _polar_of_nearly_orthogonal(a_kj):
  """By x -> (3 x - x^3) / 2, which takes 1 - e to 1 - 1.5 e^2 or so: from 0.1 off to float32's rounding in three steps."""
  w_kj = a_kj
  for _ in range(3):
    w_kj = 1.5 * w_kj - 0.5 * w_kj @ (w_kj.T @ w_kj)
  return jnp.sum(w_kj * a_kj), w_kj


def _polar_newton_schulz(a_kj):
  """The same by matrix products. Singular values below 1e-4 are not fully turned to 1."""
  w_kj = _newton_schulz_polar(a_kj, smallest=1e-4)
  return jnp.sum(w_kj * a_kj), w_kj


def _newton_schulz_polar(a_kj, smallest):
  """Polar factor of a matrix with singular values in [smallest, 1]."""
  def step(w_ks, coefficient):
    linear, cubic = coefficient
    return linear * w_ks + cubic * (w_ks @ (w_ks.T @ w_ks)), None

  is_wide = a_kj.shape[0] < a_kj.shape[1]
  w_ks, _ = lax.scan(step, a_kj.T if is_wide else a_kj, _newton_schulz_coefficients(smallest))
  return w_ks.T if is_wide else w_ks


def _newton_schulz_root(r_nn, span_nn):
  """R^(1/2) and R^(-1/2) on the span of R, eigenvalues in [0, 1], by the coupled iteration; roots below 1e-2 are not fully resolved."""
  def step(carry, coefficient):
    y_nn, z_nn = carry
    linear, cubic = coefficient
    t_nn = linear * span_nn + cubic * (z_nn @ y_nn)
    return (y_nn @ t_nn, t_nn @ z_nn), None

  return lax.scan(step, (r_nn, span_nn), _newton_schulz_coefficients(1e-2))[0]


def _newton_schulz_coefficients(smallest):
  """(linear, cubic) per step: the cubic that brings [smallest, 1] closest to 1, then the same for its image, until it is 1 in float32.

  x -> (3 s x - (s x)^3) / 2 with s^2 = 3 / (1 + l + l^2) maps both ends of [l, 1] to the same value (Chen and Chow 2014).
  """
  steps, low = [], smallest
  while 1 - low > _EPS / 4:
    scale = (3 / (1 + low + low * low)) ** 0.5
    steps.append((1.5 * scale, -0.5 * scale**3))
    low = min(1.0, 1.5 * scale * low - 0.5 * (scale * low) ** 3)
  return jnp.asarray(steps, jnp.float32)


_POLAR = {'eigh': _polar_svd, 'newton_schulz': _polar_newton_schulz}
_WHITEN = {  # (solver, in Gram space): how, and the smallest ridge that keeps its Cholesky factor real, relative to ||S||_F
  ('eigh', True): (_whiten_gram_eigh, 0.0),
  ('eigh', False): (_whiten_covariance_eigh, 0.0),
  ('newton_schulz', True): (_whiten_gram_newton_schulz, 4 * _EPS),
  ('newton_schulz', False): (_whiten_covariance_newton_schulz, 4 * _EPS),
}
