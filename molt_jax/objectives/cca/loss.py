"""Canonical correlation as a loss: exact value, closed-form gradient, finite for every finite
input.

For two views X [n, d1], Y [n, d2] with centred rows, S11 = X'X + r1 I, S22 = Y'Y + r2 I and S12 =
X'Y,

  corr = || S11^(-1/2) S12 S22^(-1/2) ||_*      (nuclear norm: the sum of canonical correlations,
  Andrew et al. 2013) loss = -corr / min(n - 1, d1, d2)             in [-1, 0]

The ridge r = ridge * tr(X'X) / d is relative to the mean eigenvalue, so the loss does not depend on
the scale of a view.

How it is computed. With the Gram matrix K = X X', R = K (K + r)^(-1) and any factor T T' = R, corr
= || T_x' T_y ||_*. Each view picks the smaller of two spaces at trace time, [n, n] (Gram) or [d, d]
(covariance), so n = 32 samples of width 1024 never build a 1024 x 1024 matrix. With the polar
factor W of A = T_x' T_y (A = W H), and `back` B_x the map from factor to view space,

  d corr / dX = (I - R_x) T_y W' B_x,    then made orthogonal to X: that is what a ridge that moves
  with tr(X'X) adds.

Nothing differentiates through `eigh` or `svd`, whose derivatives are infinite at the repeated
eigenvalues every small batch has.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from molt_jax.objectives.cca.decompositions import either, in_turn, singular_values, svd

SOLVERS = ('eigh', 'newton_schulz')

_EPS = float(jnp.finfo(jnp.float32).eps)
_LARGEST = float(jnp.finfo(jnp.float32).max)
_NEARLY_ORTHOGONAL = (
  0.1  # ||A'A - I||_F below which the iteration without an SVD has converged in float32.
)
_WELL_CONDITIONED = (
  200.0  # Bound of a condition number up to which Cholesky takes the place of an SVD.
)
# Share of the ridge in the least eigenvalue of K + r from which on K (K + r)^(-1) has no accurate
# Cholesky factor.
_MOSTLY_RIDGE = 0.9
# Singular values of A that rounding has taken above 1 by less keep their sign in the iteration.
_MARGIN = 1.1
_MIN_ROWS = 3  # Two samples always correlate perfectly.


class Centred(NamedTuple):
  """A view with weighted mean zero and unit Frobenius norm: x_nd = xc_nd / inverse_norm, row by row
  times sqrt(weight).
  """

  x_nd: jax.Array
  inverse_norm: jax.Array
  mean_d: jax.Array


class Rows(NamedTuple):
  """What the weights say about the rows: their roots, as they are and as a unit vector (the
  direction of the mean), and how many count.
  """

  root_weight_n: jax.Array
  unit_n: jax.Array
  count: jax.Array


class Factor(NamedTuple):
  """How a view is whitened.

  Attributes:
    t: T [n, k] with T T' = K (K + r)^(-1), as matrices to be multiplied in the cheapest order of
      what they stand in, so that no more products than need be are as long as n.
    back: the map B [k, d] back to the view, likewise.
    residual_nn: I - T T', where it is known without cancellation (Gram space).
    scale: 1 over a bound of the singular values of T, which a large ridge makes small.
    is_sound: whether it can be used; None: it can.
  """

  t: tuple[jax.Array, ...]
  back: tuple[jax.Array, ...]
  residual_nn: jax.Array | None
  scale: jax.Array
  is_sound: jax.Array | None = None


def cca_loss(x_nd, y_nd, *, weight_n=None, ridge=1e-3, solver='eigh'):
  """Negative mean canonical correlation of two views.

  Computed in float32 at the highest matrix precision whatever the input type. Batched over leading
  axes: [L, n, d] gives [L]. Under `jit` on a sharded batch the statistics are those of the global
  batch, to rounding; a gradient that equals one device's to the bit takes rows that were brought
  together (`with_sharding_constraint`) first. First derivatives only; `weight_n` and `ridge` get
  none.

  Args:
    x_nd: [..., n, d1] samples of one view.
    y_nd: [..., n, d2] the same samples in the other view.
    weight_n: [n] or [..., n] non-negative weight of each row, any numeric type. A row of weight 0
      is as if it were not there, whatever it holds.
    ridge: scalar >= 0; ridge of each covariance relative to its mean eigenvalue.
    solver: 'eigh' (Cholesky and `svd`; the reference) or 'newton_schulz' (Cholesky and matrix
      products only, for accelerators). The second works on S itself: its relative error grows like
      eps ||S||_F / r, and for r < 4 eps ||S||_F it takes the way of the first.

  Returns:
    [...] float32 in [-1, 0]: minus the sum of correlations over min(rows - 1, d1, d2), counting the
    rows of positive weight. 0 with zero gradient for fewer than three such rows or a view that is
    constant over them. With 'eigh', directions that a view does not span (with singular values
    below 4 eps sqrt(max(n, d)) of the largest) get no gradient; with 'newton_schulz' one of
    rounding, some hundredths of 1 / sqrt(r), the size it has in weak directions. A gradient beyond
    float32's range (of a view of size 1e-38, say) becomes its largest number. Finite for every
    finite input; NaN in a row that counts comes out as NaN.

  Raises:
    ValueError: shapes that do not pair up, or an unknown solver.
  """
  arguments = _check(x_nd, y_nd, weight_n, ridge, solver)
  return _over_leading_axes(functools.partial(_loss, solver), arguments)


def _over_leading_axes(function, arguments):
  """The function of one pair of views, over their leading axes; the last argument, the ridge, is
  that of all pairs.
  """
  for _ in range(arguments[0].ndim - 2):
    function = jax.vmap(function, in_axes=(0, 0, 0, None))
  return function(*arguments)


def canonical_correlations(x_nd, y_nd, *, weight_n=None, ridge=1e-3):
  """Canonical correlations in descending order, [..., min(n, d1, d2)] float32; directions that do
  not exist read 0. No gradient flows.

  Arguments and errors as for `cca_loss`; the same ridge, so their sum is that loss times minus the
  number of directions.
  """
  arguments = _check(x_nd, y_nd, weight_n, ridge, 'eigh')
  return _over_leading_axes(_spectrum, lax.stop_gradient(arguments))


@in_turn
def _spectrum(x_nd, y_nd, weight_n, ridge):
  with jax.default_matmul_precision('highest'):
    rows = weigh_rows(weight_n)
    x, y = (whiten(centre(view, rows).x_nd, rows, ridge, 'eigh') for view in (x_nd, y_nd))
    scale = x.scale * y.scale
    s_k = singular_values(cross(x, y) * scale)
  return jnp.where(rows.count >= _MIN_ROWS, jnp.minimum(s_k / scale, 1.0), 0.0)


def _check(x_nd, y_nd, weight_n, ridge, solver):
  """Pairs up the arguments; weights become float32 over every row, the ridge a float32 scalar."""
  x_nd, y_nd = jnp.asarray(x_nd), jnp.asarray(y_nd)
  if x_nd.ndim < 2 or x_nd.shape[:-1] != y_nd.shape[:-1] or not x_nd.size or not y_nd.size:
    raise ValueError(
      f'cca: views must be [..., n, d1] and [..., n, d2] with the same rows, got {x_nd.shape} '
      'and '
      f'{y_nd.shape}'
    )
  if solver not in SOLVERS:
    raise ValueError(f'cca: solver {solver!r} is not one of {SOLVERS}')
  if isinstance(ridge, int | float) and not 0 <= ridge < float('inf'):
    raise ValueError(f'cca: ridge must be finite and at least 0, got {ridge}')
  weight_n = jnp.ones(x_nd.shape[-2]) if weight_n is None else jnp.asarray(weight_n)
  if weight_n.shape not in (x_nd.shape[-2:-1], x_nd.shape[:-1]):
    raise ValueError(
      f'cca: weight must be {x_nd.shape[-2:-1]} or {x_nd.shape[:-1]}, got {weight_n.shape}'
    )
  weight_n = jnp.broadcast_to(lax.stop_gradient(weight_n).astype(jnp.float32), x_nd.shape[:-1])
  return x_nd, y_nd, weight_n, lax.stop_gradient(jnp.asarray(ridge, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(solver, x_nd, y_nd, weight_n, ridge):
  return _computed(solver, with_gradients=False)(x_nd, y_nd, weight_n, ridge)


def _loss_fwd(solver, x_nd, y_nd, weight_n, ridge):
  loss, dx_nd, dy_nd = _computed(solver, with_gradients=True)(x_nd, y_nd, weight_n, ridge)
  return loss, (
    dx_nd,
    dy_nd,
    jnp.zeros((), x_nd.dtype),
    jnp.zeros((), y_nd.dtype),
    jnp.zeros_like(weight_n),
    jnp.zeros_like(ridge),
  )


def _loss_bwd(solver, saved, g):
  dx_nd, dy_nd, like_x, like_y, *no_gradients = saved
  return _as_like(g * dx_nd, like_x), _as_like(g * dy_nd, like_y), *no_gradients


def _as_like(gradient_nd, like):
  """Cast to the type of the input, where what is beyond its range becomes its largest number."""
  largest = jnp.finfo(like.dtype).max.astype(jnp.float32)
  return jnp.clip(gradient_nd, -largest, largest).astype(like.dtype)


_loss.defvjp(_loss_fwd, _loss_bwd)


@functools.cache
def _computed(solver, *, with_gradients):
  """`_loss_and_gradients`, or the value alone (XLA drops what is not used), of one pair of views,
  to be mapped over others.
  """

  def compute(*arguments):
    result = _loss_and_gradients(*arguments, solver)
    return result if with_gradients else result[0]

  return in_turn(compute)


def _loss_and_gradients(x_nd, y_nd, weight_n, ridge, solver):
  """Loss and its float32 gradients."""
  with jax.default_matmul_precision('highest'):
    rows = weigh_rows(weight_n)
    centred_x, centred_y = centre(x_nd, rows), centre(y_nd, rows)
    result, is_sound = _attempt(centred_x, centred_y, rows, ridge, solver)
    if is_sound is not None:
      result = either(
        is_sound,
        lambda result, *_: result,
        lambda _, *views: _attempt(*views, 'svd')[0],
        result,
        centred_x,
        centred_y,
        rows,
        ridge,
      )
  return result


def _attempt(centred_x, centred_y, rows, ridge, solver):
  """(loss, gradients), and whether to believe them; None: always."""
  x, y = (whiten(centred.x_nd, rows, ridge, solver) for centred in (centred_x, centred_y))
  a_kj = cross(x, y)
  scale = x.scale * y.scale
  scaled_corr, w_kj = _POLAR[solver](a_kj * scale)
  num_directions = jnp.clip(
    rows.count - 1, 1, min(centred_x.x_nd.shape[1], centred_y.x_nd.shape[1])
  )
  share = jnp.where(rows.count >= _MIN_ROWS, 1.0 / num_directions, 0.0)
  loss = jnp.clip(-share * (scaled_corr / scale), -1.0, 0.0)
  dx_nd = _pull_back(x, y, a_kj, w_kj.T, centred_x, rows, share)
  dy_nd = _pull_back(y, x, a_kj.T, w_kj, centred_y, rows, share)
  are_sound = [factor.is_sound for factor in (x, y) if factor.is_sound is not None]
  is_sound = jnp.all(jnp.stack([*are_sound, jnp.isfinite(scaled_corr)])) if are_sound else None
  return (loss, dx_nd, dy_nd), is_sound


def cross(x, y):
  """A = T_x' T_y of two `Factor`s, [k, j]; its singular values are the canonical correlations."""
  return jnp.linalg.multi_dot([*(_turned(m) for m in reversed(x.t)), *y.t])


def _pull_back(own, other, a_kj, w_jk, centred, rows, share):
  """Gradient of -share corr with respect to one view; A and W' are those from the own factor to the
  other.
  """
  if own.residual_nn is None:
    g_nd = jnp.linalg.multi_dot([*other.t, w_jk, *own.back]) - jnp.linalg.multi_dot(
      [*own.t, a_kj @ w_jk, *own.back]
    )
  else:
    g_nd = jnp.linalg.multi_dot([own.residual_nn, *other.t, w_jk, *own.back])
  g_nd -= (
    jnp.sum(g_nd * centred.x_nd) * centred.x_nd
  )  # The ridge follows the trace: no gradient along X itself.
  g_nd -= rows.unit_n[:, None] * (rows.unit_n @ g_nd)[None, :]
  g_nd *= -share * rows.root_weight_n[:, None]
  g_nd = jnp.where(rows.root_weight_n[:, None] > 0, g_nd * centred.inverse_norm, 0.0)
  return jnp.clip(g_nd, -_LARGEST, _LARGEST)


def weigh_rows(weight_n):
  """`Rows` of float32 weights [n]; negative weights count as 0."""
  weight_n = jnp.maximum(weight_n, 0.0)
  weight_n = weight_n / jnp.maximum(jnp.max(weight_n), jnp.finfo(jnp.float32).tiny)
  root_n = jnp.sqrt(weight_n)
  unit_n = root_n * lax.rsqrt(jnp.maximum(jnp.sum(weight_n), 1e-6))
  return Rows(root_n, unit_n, jnp.sum(weight_n > 0))


def _null_projector(rows):
  """Projects on what no centred view can contain: absent rows and the mean."""
  return (
    jnp.diag(jnp.where(rows.root_weight_n > 0, 0.0, 1.0))
    + rows.unit_n[:, None] * rows.unit_n[None, :]
  )


def centre(x_nd, rows):
  """`Centred` view. Exact zeros for a constant column: a row is subtracted before the mean is, and
  scaling is by powers of two.

  Rows of weight 0 are never read, so they may hold NaN.
  """
  valid_n1 = rows.root_weight_n[:, None] > 0
  x_nd = jnp.where(valid_n1, x_nd.astype(jnp.float32), 0.0)
  size = magnitude(x_nd)
  x_nd = x_nd * (1 / size)
  first_n1 = jnp.arange(x_nd.shape[0])[:, None] == jnp.argmax(valid_n1)
  first_d = jnp.sum(jnp.where(first_n1, x_nd, 0.0), axis=0)
  x_nd = jnp.where(valid_n1, x_nd - first_d[None, :], 0.0)
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
  # The gradient of a tiny view can leave float32, and by rounding the mean of a huge one.
  inverse_norm = jnp.minimum(inverse * jnp.minimum((1 / spread) * (1 / size), _LARGEST), _LARGEST)
  mean_d = jnp.clip((first_d + mean_d * spread) * size, -_LARGEST, _LARGEST)
  return Centred(x_nd * inverse, inverse_norm, mean_d)


def magnitude(x, axis=None):
  """The power of two just below the largest entry, so that dividing by it is exact; its inverse is
  representable too.
  """
  largest = jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None)
  bits = lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
  return jnp.clip(lax.bitcast_convert_type(bits, jnp.float32), 2.0**-120, 2.0**126)


def whiten(x_nd, rows, ridge, solver):
  """`Factor` of a centred view, in Gram space when n <= d."""
  n, d = x_nd.shape
  in_gram_space = n <= d
  s_kk = x_nd @ x_nd.T if in_gram_space else _turned(x_nd) @ x_nd
  return _WHITEN[solver][in_gram_space](x_nd, s_kk, ridge / d, rows)


def _scale(r):
  """Of the `Factor` for ridge r, S having trace 1: the singular values of T are at most (1 +
  r)^(-1/2).
  """
  return jnp.sqrt(jnp.maximum(r, 1.0))


def _whiten_gram_eigh(x_nd, k_nn, r, rows):
  """By Cholesky where that is accurate, else by an SVD of the view.

  The mean is known not to be in K, and is turned into one of the rows by a reflection; absent rows
  are known too. Of what is left, K + r is factored and R as well: K + r must be well-conditioned
  and R not much smaller than 1.
  """
  n = k_nn.shape[0]
  at = jnp.argmax(rows.unit_n)
  v_n = rows.unit_n + jax.nn.one_hot(at, n)
  h_nn = jnp.eye(n) - (2 / (v_n @ v_n)) * v_n[:, None] * v_n[None, :]
  is_left_n = (rows.root_weight_n > 0) & (jnp.arange(n) != at)
  g_nd = x_nd - (2 / (v_n @ v_n)) * v_n[:, None] * (v_n @ x_nd)[None, :]
  g_nd = jnp.where(is_left_n[:, None], g_nd, 0.0)
  m_nn = jnp.where(is_left_n[:, None] & is_left_n[None, :], h_nn @ k_nn @ h_nn, 0.0)
  whole_nn = m_nn + jnp.diag(jnp.where(is_left_n, r, jnp.trace(m_nn) / n))
  inverse_l_nn = _inverse_cholesky(whole_nn)
  j_nn = inverse_l_nn.T @ inverse_l_nn
  r_nn = j_nn @ m_nn
  l_nn = jnp.linalg.cholesky(r_nn + jnp.diag(jnp.where(is_left_n, 0.0, 1.0)))
  back_nn = solve_triangular(l_nn, j_nn, lower=True)
  t_nn = h_nn @ jnp.where(is_left_n[:, None], l_nn, 0.0)
  factor = Factor((t_nn,), (back_nn, g_nd), r * (h_nn @ j_nn @ h_nn.T), _scale(r))
  is_accurate = _is_well_conditioned(whole_nn, j_nn) & (r * _row_sum(j_nn) < _MOSTLY_RIDGE)
  return either(
    is_accurate,
    lambda factor, *_: factor,
    lambda _, x_nd, r: _whiten_gram_svd(x_nd, None, r, None),
    factor,
    x_nd,
    r,
  )


def _whiten_gram_svd(x_nd, k_nn, r, rows):
  del k_nn, rows
  u_nn, t_n, back_n, rest_n, v_nd = _whitened_svd(x_nd, r)
  residual_nn = (u_nn * rest_n[None, :]) @ u_nn.T
  return Factor((u_nn * t_n[None, :],), (jnp.diag(back_n), v_nd), residual_nn, _scale(r))


def _whiten_covariance_eigh(x_nd, s_dd, r, rows):
  """The same with the covariance. Any square root whitens: with S + r = L L', T = X L^(-T) and B =
  L^(-1).
  """
  del rows
  whole_dd = s_dd + r * jnp.eye(s_dd.shape[0])
  inverse_l_dd = _inverse_cholesky(whole_dd)
  factor = Factor((x_nd, inverse_l_dd.T), (inverse_l_dd,), None, _scale(r))
  is_accurate = _is_well_conditioned(whole_dd, inverse_l_dd.T @ inverse_l_dd)
  return either(
    is_accurate,
    lambda factor, *_: factor,
    lambda _, x_nd, r: _whiten_covariance_svd(x_nd, None, r, None),
    factor,
    x_nd,
    r,
  )


def _whiten_covariance_svd(x_nd, s_dd, r, rows):
  del s_dd, rows
  u_nd, t_d, back_d, _, v_dd = _whitened_svd(x_nd, r)
  return Factor((u_nd, jnp.diag(t_d)), (back_d[:, None] * v_dd,), None, _scale(r))


def _whitened_svd(x_nd, r):
  """X = U s V': (U, the diagonals of T, B and I - R in its basis, V'), without the directions that
  are no more than rounding.

  Not from the eigenvectors of S: where S has an eigenvalue w, those of zero are off by eps / w, and
  hold a singular value eps / sqrt(w) that is not there.
  """
  u_nk, s_k, v_kd = svd(x_nd)
  is_there_k = s_k > 4 * _EPS * max(x_nd.shape) ** 0.5 * jnp.max(s_k)
  whole_k = s_k * s_k + r
  back_k = jnp.where(is_there_k, lax.rsqrt(jnp.where(is_there_k, whole_k, 1.0)), 0.0)
  rest_k = jnp.where(is_there_k, r / jnp.where(is_there_k, whole_k, 1.0), 1.0)
  return u_nk, s_k * back_k, back_k, rest_k, v_kd


def _is_well_conditioned(a_kk, inverse_kk):
  """Whether Cholesky lost no more than a few bits: the condition number is at most the product of
  the largest row sums of A and its inverse.
  """
  return (
    _row_sum(a_kk) * _row_sum(inverse_kk) < _WELL_CONDITIONED
  )  # Not so for NaN, of a Cholesky factor that is not there.


def _row_sum(a_kk):
  """The largest, of magnitudes: a bound of the norm."""
  return jnp.max(jnp.sum(jnp.abs(a_kk), axis=1))


def _products_suffice(s_kk, r, *matrices):
  """Whether Cholesky and products alone can tell S + r from r, and did: the matrices they made are
  finite.
  """
  is_finite = jnp.stack([jnp.all(jnp.isfinite(m)) for m in matrices])
  return (r >= 4 * _EPS * jnp.sqrt(jnp.sum(s_kk * s_kk))) & jnp.all(is_finite)


def _whiten_gram_newton_schulz(x_nd, k_nn, r, rows):
  """With K + r = L L' and O the polar factor of L, (K + r)^(-1/2) = O L^(-1); R is then a product
  with itself, never negative.
  """
  eye_nn, null_nn = jnp.eye(k_nn.shape[0]), _null_projector(rows)
  span_nn = eye_nn - null_nn
  scale = _scale(r)
  whole_nn = k_nn / scale**2 + null_nn / k_nn.shape[0] + (r / scale**2) * eye_nn
  l_nn = jnp.linalg.cholesky(whole_nn)
  o_nn = _newton_schulz_polar(
    l_nn * lax.rsqrt(jnp.sqrt(jnp.sum(whole_nn * whole_nn))), smallest=5e-4
  )
  m_nn = o_nn @ solve_triangular(l_nn, span_nn, lower=True)
  g_nd = (m_nn / scale) @ x_nd
  t_nn, inverse_t_nn = _newton_schulz_root(g_nd @ g_nd.T * scale**2, span_nn)
  back_nn = inverse_t_nn @ m_nn
  residual_nn = (r / scale**2) * (m_nn @ m_nn.T)
  is_sound = _products_suffice(k_nn, r, t_nn, back_nn)
  return Factor((t_nn / scale,), (back_nn, g_nd), residual_nn, scale, is_sound)


def _whiten_covariance_newton_schulz(x_nd, s_dd, r, rows):
  """`_whiten_covariance_eigh` by Cholesky alone: accurate relative to the largest direction
  only.
  """
  del rows
  scale = _scale(r)
  inverse_l_dd = _inverse_cholesky((s_dd + r * jnp.eye(s_dd.shape[0])) / scale**2) / scale
  # T itself: L^(-1) (X' Y) L^(-T) would round relative to 1 / r, not to its root.
  is_sound = _products_suffice(s_dd, r, inverse_l_dd)
  return Factor((x_nd @ inverse_l_dd.T,), (inverse_l_dd,), None, scale, is_sound)


def _turned(x_nk):
  """X', written out: on a CPU, products that sum over many rows are then up to twice as fast."""
  return lax.optimization_barrier(x_nk.T)


def _inverse_cholesky(a_kk):
  return solve_triangular(jnp.linalg.cholesky(a_kk), jnp.eye(a_kk.shape[0]), lower=True)


def _polar_svd(a_kj):
  """Nuclear norm and polar factor; directions without correlation get none.

  The A of a batch smaller than the width is all but orthogonal, beside rows and columns of zeros.
  Then a few products are faster than an SVD.
  """
  square_jj = a_kj.T @ a_kj
  off_jj = square_jj - jnp.diag(jnp.where(jnp.diag(square_jj) > 0, 1.0, 0.0))
  is_nearly_orthogonal = jnp.sum(off_jj * off_jj) < _NEARLY_ORTHOGONAL**2
  return either(is_nearly_orthogonal, _polar_of_nearly_orthogonal, _polar_by_svd, a_kj)


def _polar_by_svd(a_kj):
  p_ks, s_s, q_sj = svd(a_kj)
  return jnp.sum(s_s), (p_ks * (s_s > 8 * _EPS)[None, :]) @ q_sj


def _polar_of_nearly_orthogonal(a_kj):
  """By x -> (3 x - x^3) / 2, which takes 1 - e to 1 - 1.5 e^2 or so: from 0.1 off to float32's
  rounding in three steps.
  """
  w_kj = a_kj
  for _ in range(3):
    w_kj = 1.5 * w_kj - 0.5 * w_kj @ (w_kj.T @ w_kj)
  return jnp.sum(w_kj * a_kj), w_kj


def _polar_newton_schulz(a_kj):
  """The same by matrix products. Singular values below 1e-4 are not fully turned to 1."""
  w_kj = _newton_schulz_polar(a_kj / _MARGIN, smallest=1e-4)
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
  """R^(1/2) and R^(-1/2) on the span of R, eigenvalues in [0, 1], by the coupled iteration; roots
  below 1e-2 are not fully resolved.
  """

  def step(carry, coefficient):
    y_nn, z_nn = carry
    linear, cubic = coefficient
    t_nn = linear * span_nn + cubic * (z_nn @ y_nn)
    return (y_nn @ t_nn, t_nn @ z_nn), None

  return lax.scan(step, (r_nn, span_nn), _newton_schulz_coefficients(1e-2))[0]


def _newton_schulz_coefficients(smallest):
  """(linear, cubic) per step: the cubic that brings [smallest, 1] closest to 1, then the same for
  its image, until it is 1 in float32.

  x -> (3 s x - (s x)^3) / 2 with s^2 = 3 / (1 + l + l^2) maps both ends of [l, 1] to the same value
  (Chen and Chow 2014).
  """
  steps, low = [], smallest
  while 1 - low > _EPS / 4:
    scale = (3 / (1 + low + low * low)) ** 0.5
    steps.append((1.5 * scale, -0.5 * scale**3))
    low = min(1.0, 1.5 * scale * low - 0.5 * (scale * low) ** 3)
  return jnp.asarray(steps, jnp.float32)


_POLAR = {'eigh': _polar_svd, 'newton_schulz': _polar_newton_schulz, 'svd': _polar_by_svd}
_WHITEN = {  # By solver, and by whether in Gram space.
  'eigh': {True: _whiten_gram_eigh, False: _whiten_covariance_eigh},
  'newton_schulz': {True: _whiten_gram_newton_schulz, False: _whiten_covariance_newton_schulz},
  'svd': {True: _whiten_gram_svd, False: _whiten_covariance_svd},  # What the others fall back to.
}
