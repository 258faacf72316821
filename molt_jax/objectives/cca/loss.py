"""Canonical correlation as a loss: exact value, closed-form gradient, finite for finite input.

For two views X [n, d1], Y [n, d2] with centred rows,

  S11 = X'X + r1 I,   S22 = Y'Y + r2 I,   S12 = X'Y
  corr = || S11^(-1/2) S12 S22^(-1/2) ||_*      the nuclear norm: the sum of canonical correlations
                                                (Andrew et al. 2013)
  loss = -corr / min(n - 1, d1, d2)             in [-1, 0]

The ridge r = ridge * tr(X'X) / d is relative to the mean eigenvalue, so the loss does not depend on
the scale of a view.

How it is computed. With the Gram matrix K = X X', R = K (K + r)^(-1) and any factor T T' = R, corr
= || T_x' T_y ||_*. Each view picks the smaller of two spaces at trace time, [n, n] (Gram) or [d, d]
(covariance), so n = 32 samples of width 1024 never build a 1024 x 1024 matrix. With the polar
factor W of A = T_x' T_y (A = W H), and `back` B_x the map from factor to view space,

  d corr / dX = (I - R_x) T_y W' B_x,

then made orthogonal to X: that is what a ridge that moves with tr(X'X) adds. Nothing differentiates
through `eigh` or `svd`, whose derivatives are infinite at the repeated eigenvalues that every small
batch has.

Which path the default takes. `cca.estimator=moving_average` compares k = 16 directions over n rows
of the batch and 4 k that stand for the past: views [n + 4 k, k], thus covariance space, whitened by
Cholesky (`solver='eigh'`), the polar factor of a [k, k] matrix by SVD. The Gram space serves
`cca.estimator=batch` alone, where the width exceeds the batch.

The functions below come in the order of the calls: `cca_loss` -> `_loss` (the derivative rule) ->
`_loss_and_gradients` -> `_solved` -> `_attempt`, which calls `whitening` and `polar`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from molt_jax.objectives.cca.linalg import LARGEST, in_turn, or_else, singular_values
from molt_jax.objectives.cca.polar import POLAR
from molt_jax.objectives.cca.whitening import centre, cross, weigh_rows, whiten

SOLVERS = ('eigh', 'newton_schulz')
_MIN_ROWS = 3  # Two samples always correlate perfectly.


def cca_loss(x_nd, y_nd, *, weight_n=None, ridge=1e-3, solver='eigh'):
  """Negative mean canonical correlation of two views.

  Computed in float32 at the highest matrix precision whatever the input type. Batched over leading
  axes: [L, n, d] gives [L]. Under `jit` on a sharded batch the statistics are those of the global
  batch, but bring its rows together first, both views and the weights by one collective
  (`with_sharding_constraint` of them side by side): the gradient is then that of one device to the
  bit. Otherwise each sum over rows is a collective of its own, and XLA's virtual CPU devices, which
  take independent ones in any order, can wait for each other without end. First derivatives only;
  `weight_n` and `ridge` get none.

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


def canonical_correlations(x_nd, y_nd, *, weight_n=None, ridge=1e-3):
  """Canonical correlations in descending order, [..., min(n, d1, d2)] float32.

  Directions that do not exist read 0. No gradient flows.

  Arguments and errors as for `cca_loss`; the same ridge, so their sum is that loss times minus the
  number of directions.
  """
  arguments = _check(x_nd, y_nd, weight_n, ridge, 'eigh')
  return _over_leading_axes(_spectrum, lax.stop_gradient(arguments))


def _over_leading_axes(function, arguments):
  """Maps the function of one pair of views over their leading axes.

  The last argument, the ridge, is that of all pairs.
  """
  for _ in range(arguments[0].ndim - 2):
    function = jax.vmap(function, in_axes=(0, 0, 0, None))
  return function(*arguments)


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
      f'and {y_nd.shape}'
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
  return _loss_and_gradients(x_nd, y_nd, weight_n, ridge, solver, with_gradients=False)


def _loss_fwd(solver, x_nd, y_nd, weight_n, ridge):
  loss, dx_nd, dy_nd = _loss_and_gradients(x_nd, y_nd, weight_n, ridge, solver, with_gradients=True)
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


def _loss_and_gradients(x_nd, y_nd, weight_n, ridge, solver, *, with_gradients):
  """Loss and its float32 gradients, or the loss alone."""
  with jax.default_matmul_precision('highest'):
    rows = weigh_rows(weight_n)
    centred_x, centred_y = centre(x_nd, rows), centre(y_nd, rows)
  return _solved(solver, with_gradients=with_gradients)(centred_x, centred_y, rows, ridge)


@functools.cache
def _solved(solver, *, with_gradients):
  """From centred views on: what calls LAPACK, thus one pair of views after the other on a CPU."""

  @jax.default_matmul_precision('highest')
  def solve(centred_x, centred_y, rows, ridge):
    result, is_sound = _attempt(centred_x, centred_y, rows, ridge, solver)
    if is_sound is not None:
      views = centred_x, centred_y, rows, ridge
      result = or_else(is_sound, result, lambda *views: _attempt(*views, 'svd')[0], *views)
    # XLA drops what is not used.
    return result if with_gradients else result[0]

  return in_turn(solve)


def _attempt(centred_x, centred_y, rows, ridge, solver):
  """(loss, gradients), and whether to believe them; None: always."""
  x, y = (whiten(centred.x_nd, rows, ridge, solver) for centred in (centred_x, centred_y))
  a_kj = cross(x, y)
  scale = x.scale * y.scale
  roundings = [factor.rounding for factor in (x, y) if factor.rounding is not None]
  rounding = functools.reduce(jnp.maximum, roundings, 0.0)
  scaled_corr, w_kj, is_sound = POLAR[solver](a_kj * scale, rounding)
  num_directions = jnp.clip(
    rows.count - 1, 1, min(centred_x.x_nd.shape[1], centred_y.x_nd.shape[1])
  )
  share = jnp.where(rows.count >= _MIN_ROWS, 1.0 / num_directions, 0.0)
  loss = jnp.clip(-share * (scaled_corr / scale), -1.0, 0.0)
  dx_nd = _pull_back(x, y, a_kj, w_kj.T, centred_x, rows, share)
  dy_nd = _pull_back(y, x, a_kj.T, w_kj, centred_y, rows, share)
  are_sound = [factor.is_sound for factor in (x, y) if factor.is_sound is not None]
  can_fail = bool(are_sound or roundings)
  is_sound = jnp.all(jnp.stack([*are_sound, is_sound])) if can_fail else None
  return (loss, dx_nd, dy_nd), is_sound


def _pull_back(own, other, a_kj, w_jk, centred, rows, share):
  """Gradient of -share corr with respect to one view.

  A and W' are those from the own factor to the other.
  """
  if own.residual_nn is None:
    g_nd = jnp.linalg.multi_dot([*other.t, w_jk, *own.back]) - jnp.linalg.multi_dot(
      [*own.t, a_kj @ w_jk, *own.back]
    )
  else:
    g_nd = jnp.linalg.multi_dot([own.residual_nn, *other.t, w_jk, *own.back])
  # The ridge follows the trace: no gradient along X itself.
  g_nd -= jnp.sum(g_nd * centred.x_nd) * centred.x_nd
  g_nd -= rows.unit_n[:, None] * (rows.unit_n @ g_nd)[None, :]
  g_nd *= -share * rows.root_weight_n[:, None]
  g_nd *= centred.inverse_norm
  g_nd = jnp.where(rows.root_weight_n[:, None] > 0, g_nd * centred.inverse_size, 0.0)
  return jnp.clip(g_nd, -LARGEST, LARGEST)
