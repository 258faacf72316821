"""A view centred and whitened, in whichever of two spaces is the smaller.

For n rows of width d, the Gram space is [n, n] and the covariance space [d, d]; `whiten` chooses at
trace time. Each way of whitening exists in both:

  eigh            Cholesky where it is accurate, an SVD of the view else
  newton_schulz   Cholesky and matrix products alone
  svd             what the two fall back to
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from molt_jax.objectives.cca.linalg import (
  EPS,
  LARGEST,
  either,
  inverse_cholesky,
  is_well_conditioned,
  norm_bound,
  or_else,
  products_suffice,
  svd,
)
from molt_jax.objectives.cca.polar import newton_schulz_polar, newton_schulz_root

# Share of the ridge in the least eigenvalue of K + r from which on K (K + r)^(-1) has no accurate
# Cholesky factor. In that of S + r, below it, no direction is one of rounding.
_MOSTLY_RIDGE = 0.9


class Rows(NamedTuple):
  """What the weights say about the rows.

  Attributes:
    root_weight_n: square roots of the weights.
    unit_n: the same as a unit vector, the direction of the mean.
    count: rows of positive weight.
  """

  root_weight_n: jax.Array
  unit_n: jax.Array
  count: jax.Array


class Centred(NamedTuple):
  """A view with weighted mean zero and unit Frobenius norm.

  x_nd = xc_nd / norm, row by row times sqrt(weight). 1 / norm = inverse_norm * inverse_size, which
  alone can be beyond float32 where a gradient is not: multiply by one after the other.
  """

  x_nd: jax.Array
  inverse_norm: jax.Array
  inverse_size: jax.Array
  mean_d: jax.Array


class Factor(NamedTuple):
  """How a view is whitened.

  Attributes:
    t: T [n, k] with T T' = K (K + r)^(-1), as matrices to be multiplied in the cheapest order of
      what they stand in, so that no more products than need be are as long as n.
    back: the map B [k, d] back to the view, likewise.
    residual_nn: I - T T', where it is known without cancellation (Gram space).
    scale: 1 over a bound of the singular values of T, which a large ridge makes small.
    is_sound: whether it can be used; None: it can.
    rounding: singular values of T up to this, times `scale`, may stand for directions that the view
      does not have; None: none do.
  """

  t: tuple[jax.Array, ...]
  back: tuple[jax.Array, ...]
  residual_nn: jax.Array | None
  scale: jax.Array
  is_sound: jax.Array | None = None
  rounding: jax.Array | None = None


def weigh_rows(weight_n):
  """`Rows` of float32 weights [n]; negative weights count as 0."""
  weight_n = jnp.maximum(weight_n, 0.0)
  weight_n = weight_n / jnp.maximum(jnp.max(weight_n), jnp.finfo(jnp.float32).tiny)
  root_n = jnp.sqrt(weight_n)
  unit_n = root_n * lax.rsqrt(jnp.maximum(jnp.sum(weight_n), 1e-6))
  return Rows(root_n, unit_n, jnp.sum(weight_n > 0))


def centre(x_nd, rows):
  """`Centred` view.

  Exact zeros for a constant column: a row is subtracted before the mean is, and scaling is by
  powers of two.

  Rows of weight 0 are never read, so they may hold NaN.
  """
  valid_n1 = rows.root_weight_n[:, None] > 0
  x_nd = x_nd.astype(jnp.float32)
  first_d = jnp.where(jnp.any(valid_n1), x_nd[jnp.argmax(valid_n1)], 0.0)
  x_nd = jnp.where(valid_n1, x_nd, first_d[None, :])
  # The size of what differs: beside a constant column, the others can be too small for float32.
  # Half of a difference is always in range.
  above_d, below_d = (0.5 * end(x_nd, axis=0) - 0.5 * first_d for end in (jnp.max, jnp.min))
  size = magnitude(jnp.maximum(above_d, -below_d))
  start_d = first_d * (1 / size)
  # A constant column can leave float32 here; one that is not finite is to be NaN.
  same_d = jnp.where(jnp.isfinite(first_d), first_d, jnp.nan)
  x_nd = jnp.where(x_nd == same_d[None, :], 0.0, x_nd * (1 / size) - start_d[None, :])
  spread = magnitude(x_nd)
  x_nd = x_nd * (1 / spread)
  mean_d = jnp.zeros_like(first_d)
  for _ in range(2):  # The second pass removes the rounding of the first.
    step_d = (rows.unit_n * rows.unit_n) @ x_nd
    x_nd, mean_d = jnp.where(valid_n1, x_nd - step_d[None, :], 0.0), mean_d + step_d
  x_nd = x_nd * rows.root_weight_n[:, None]
  norm = jnp.sqrt(jnp.sum(x_nd * x_nd))
  is_constant = norm == 0
  inverse = jnp.where(is_constant, 0.0, 1.0 / jnp.where(is_constant, 1.0, norm))
  inverse_norm = jnp.minimum(inverse * (1 / spread), LARGEST)
  # By rounding, the mean of a huge view can leave float32.
  mean_d = jnp.where(mean_d == 0, first_d, (start_d + mean_d * spread) * size)
  mean_d = jnp.clip(mean_d, -LARGEST, LARGEST)
  return Centred(x_nd * inverse, inverse_norm, 1 / size, mean_d)


def magnitude(x, axis=None):
  """The power of two just below the largest entry, so that dividing by it is exact.

  Its inverse is representable too.
  """
  largest = jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None)
  bits = lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
  return jnp.clip(lax.bitcast_convert_type(bits, jnp.float32), 2.0**-120, 2.0**126)


def whiten(x_nd, rows, ridge, solver):
  """`Factor` of a centred view, in Gram space when n < d."""
  n, d = x_nd.shape
  # Of equal sizes the covariance space takes fewer products.
  in_gram_space = n < d
  s_kk = x_nd @ x_nd.T if in_gram_space else x_nd.T @ x_nd
  return _WHITEN[solver][in_gram_space](x_nd, s_kk, ridge / d, rows)


def cross(x, y):
  """A = T_x' T_y of two `Factor`s, [k, j]; its singular values are the canonical correlations."""
  return jnp.linalg.multi_dot([*(m.T for m in reversed(x.t)), *y.t])


def _rounding(shape):
  """Of the largest singular value of a view."""
  return 4 * EPS * max(shape) ** 0.5


def _scale(r):
  """`Factor.scale`: S has trace 1, so T's singular values are at most (1 + r)^(-1/2)."""
  return jnp.sqrt(jnp.maximum(r, 1.0))


def _whiten_covariance_eigh(x_nd, s_dd, r, rows):
  """By Cholesky where that is accurate, else by an SVD of the view.

  Any square root whitens: with S + r = L L', T = X L^(-T) and B = L^(-1).
  """
  del rows
  whole_dd = s_dd + r * jnp.eye(s_dd.shape[0])
  inverse_l_dd = inverse_cholesky(whole_dd)
  inverse_dd = inverse_l_dd.T @ inverse_l_dd
  square = norm_bound(inverse_dd)  # Of the norm of B.
  # What rounding has left in place of a singular value of 0, B enlarges. The view has norm 1: that
  # of S is at most its largest singular value, and mostly not far below.
  rounding = _rounding(x_nd.shape) * jnp.linalg.norm(s_dd) * jnp.sqrt(square) * _scale(r)
  rounding = jnp.where(r * square < _MOSTLY_RIDGE, 0.0, rounding)
  is_accurate = is_well_conditioned(whole_dd, inverse_dd)
  by_cholesky = x_nd, inverse_l_dd, inverse_l_dd, rounding
  found = or_else(is_accurate, by_cholesky, _covariance_by_svd, x_nd, r)
  return _covariance_factor(*found, _scale(r))


def _whiten_covariance_svd(x_nd, s_dd, r, rows):
  del s_dd, rows
  return _covariance_factor(*_covariance_by_svd(x_nd, r), _scale(r))


def _covariance_by_svd(x_nd, r):
  u_nd, t_d, back_d, _, v_dd = _whitened_svd(x_nd, r)
  return u_nd, jnp.diag(t_d), back_d[:, None] * v_dd, jnp.zeros(())


def _covariance_factor(left_nd, right_dd, back_dd, rounding, scale):
  """Of T = left right'."""
  return Factor((left_nd, right_dd.T), (back_dd,), None, scale, rounding=rounding)


def _whiten_covariance_newton_schulz(x_nd, s_dd, r, rows):
  """By Cholesky alone: accurate relative to the largest direction only."""
  del rows
  scale = _scale(r)
  inverse_l_dd = inverse_cholesky((s_dd + r * jnp.eye(s_dd.shape[0])) / scale**2) / scale
  # T itself: L^(-1) (X' Y) L^(-T) would round relative to 1 / r, not to its root.
  is_sound = products_suffice(s_dd, r, inverse_l_dd)
  return Factor((x_nd @ inverse_l_dd.T,), (inverse_l_dd,), None, scale, is_sound)


def _whiten_gram_eigh(x_nd, k_nn, r, rows):
  """The same with the Gram matrix.

  The mean is known not to be in K, and is turned into one of the rows by a reflection; absent rows
  are known too. Of what is left, K + r is factored and R as well: K + r must be well-conditioned
  and R not much smaller than 1.
  """
  n = k_nn.shape[0]
  at = jnp.argmax(rows.unit_n)
  v_n = rows.unit_n + jax.nn.one_hot(at, n)
  v_n = v_n * lax.rsqrt(0.5 * (v_n @ v_n))  # H = I - v v'.
  is_left_n = (rows.root_weight_n > 0) & (jnp.arange(n) != at)
  m_nn = jnp.where(is_left_n[:, None] & is_left_n[None, :], _reflected(k_nn, v_n), 0.0)
  whole_nn = m_nn + jnp.diag(jnp.where(is_left_n, r, jnp.trace(m_nn) / n))
  inverse_l_nn = inverse_cholesky(whole_nn)
  j_nn = inverse_l_nn.T @ inverse_l_nn
  is_accurate = is_well_conditioned(whole_nn, j_nn) & (r * norm_bound(j_nn) < _MOSTLY_RIDGE)
  return either(
    is_accurate,
    _gram_by_cholesky,
    lambda x_nd, r, *_: _whiten_gram_svd(x_nd, None, r, None),
    x_nd,
    r,
    m_nn,
    j_nn,
    v_n,
    is_left_n,
  )


def _gram_by_cholesky(x_nd, r, m_nn, j_nn, v_n, is_left_n):
  """From M = H K H of the rows that are left and J = (M + r)^(-1), where R = J M."""
  l_nn = jnp.linalg.cholesky(j_nn @ m_nn + jnp.diag(jnp.where(is_left_n, 0.0, 1.0)))
  back_nn = solve_triangular(l_nn, j_nn, lower=True)
  g_nd = jnp.where(is_left_n[:, None], x_nd - v_n[:, None] * (v_n @ x_nd)[None, :], 0.0)
  t_nn = jnp.where(is_left_n[:, None], l_nn, 0.0)
  t_nn -= v_n[:, None] * (v_n @ t_nn)[None, :]
  return Factor((t_nn,), (back_nn, g_nd), r * _reflected(j_nn, v_n), _scale(r))


def _reflected(a_nn, v_n):
  """H A H with H = I - v v', a reflection, of a symmetric A."""
  u_n = a_nn @ v_n
  u_n -= 0.5 * (v_n @ u_n) * v_n
  return a_nn - v_n[:, None] * u_n[None, :] - u_n[:, None] * v_n[None, :]


def _whiten_gram_svd(x_nd, k_nn, r, rows):
  del k_nn, rows
  u_nn, t_n, back_n, rest_n, v_nd = _whitened_svd(x_nd, r)
  residual_nn = (u_nn * rest_n[None, :]) @ u_nn.T
  return Factor((u_nn * t_n[None, :],), (jnp.diag(back_n), v_nd), residual_nn, _scale(r))


def _whiten_gram_newton_schulz(x_nd, k_nn, r, rows):
  """With K + r = L L' and O the polar factor of L, (K + r)^(-1/2) = O L^(-1).

  R is then a product with itself, never negative.
  """
  eye_nn, null_nn = jnp.eye(k_nn.shape[0]), _null_projector(rows)
  span_nn = eye_nn - null_nn
  scale = _scale(r)
  whole_nn = k_nn / scale**2 + null_nn / k_nn.shape[0] + (r / scale**2) * eye_nn
  l_nn = jnp.linalg.cholesky(whole_nn)
  o_nn = newton_schulz_polar(
    l_nn * lax.rsqrt(jnp.sqrt(jnp.sum(whole_nn * whole_nn))), smallest=5e-4
  )
  m_nn = o_nn @ solve_triangular(l_nn, span_nn, lower=True)
  g_nd = (m_nn / scale) @ x_nd
  t_nn, inverse_t_nn = newton_schulz_root(g_nd @ g_nd.T * scale**2, span_nn)
  back_nn = inverse_t_nn @ m_nn
  residual_nn = (r / scale**2) * (m_nn @ m_nn.T)
  is_sound = products_suffice(k_nn, r, t_nn, back_nn)
  return Factor((t_nn / scale,), (back_nn, g_nd), residual_nn, scale, is_sound)


def _whitened_svd(x_nd, r):
  """X = U s V': (U, the diagonals of T, B and I - R in its basis, V').

  Without the directions that are no more than rounding.

  Not from the eigenvectors of S: where S has an eigenvalue w, those of zero are off by eps / w, and
  hold a singular value eps / sqrt(w) that is not there.
  """
  u_nk, s_k, v_kd = svd(x_nd)
  is_there_k = s_k > _rounding(x_nd.shape) * jnp.max(s_k)
  whole_k = s_k * s_k + r
  back_k = jnp.where(is_there_k, lax.rsqrt(jnp.where(is_there_k, whole_k, 1.0)), 0.0)
  rest_k = jnp.where(is_there_k, r / jnp.where(is_there_k, whole_k, 1.0), 1.0)
  return u_nk, s_k * back_k, back_k, rest_k, v_kd


def _null_projector(rows):
  """Projects on what no centred view can contain: absent rows and the mean."""
  return (
    jnp.diag(jnp.where(rows.root_weight_n > 0, 0.0, 1.0))
    + rows.unit_n[:, None] * rows.unit_n[None, :]
  )


_WHITEN = {  # By solver, and by whether in Gram space.
  'eigh': {True: _whiten_gram_eigh, False: _whiten_covariance_eigh},
  'newton_schulz': {True: _whiten_gram_newton_schulz, False: _whiten_covariance_newton_schulz},
  'svd': {True: _whiten_gram_svd, False: _whiten_covariance_svd},  # What the others fall back to.
}
