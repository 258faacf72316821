"""What the CCA of two views looks like: directions fitted on one set and measured on another,
effective rank, modality gap.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from molt_jax.objectives.cca.linalg import EPS, LARGEST, in_turn, singular_values, svd
from molt_jax.objectives.cca.whitening import centre, cross, magnitude, weigh_rows, whiten


class Directions(NamedTuple):
  """k pairs of canonical directions.

  Of a sample x_d, the canonical variables are (x_d - mean_x_d) @ x_dk.
  """

  mean_x_d: jax.Array
  mean_y_d: jax.Array
  x_dk: jax.Array
  y_dk: jax.Array


def fit_directions(x_nd, y_nd, *, weight_n=None, ridge=1e-3):
  """Canonical directions of [n, d1] and [n, d2], strongest first.

  Args:
    x_nd, y_nd, weight_n, ridge: as for `cca_loss`, without leading axes.

  Returns:
    `Directions` with k = min(n, d1, d2); zero where fewer exist.
  """
  x_nd, y_nd, weight_n, ridge = lax.stop_gradient(
    (jnp.asarray(x_nd), jnp.asarray(y_nd), _weights(weight_n, x_nd), jnp.float32(ridge))
  )
  rows = weigh_rows(weight_n)
  with jax.default_matmul_precision('highest'):
    view_x, view_y = centre(x_nd, rows), centre(y_nd, rows)
  return _fit(view_x, view_y, rows, ridge)


@in_turn
@jax.default_matmul_precision('highest')
def _fit(view_x, view_y, rows, ridge):
  x, y = (whiten(view.x_nd, rows, ridge, 'eigh') for view in (view_x, view_y))
  p_ks, _, q_sj = svd(cross(x, y) * (x.scale * y.scale))
  x_dk = _directions(view_x, x, p_ks.T)
  y_dk = _directions(view_y, y, q_sj)
  return Directions(view_x.mean_d, view_y.mean_d, x_dk, y_dk)


def _directions(view, factor, turn_ks):
  """Columns [d, k] of one view, from its `Centred`, its `Factor` and singular vectors as rows."""
  direction_kd = jnp.linalg.multi_dot([turn_ks, *factor.back])
  return jnp.clip(direction_kd.T * view.inverse_norm * view.inverse_size, -LARGEST, LARGEST)


def _weights(weight_n, x_nd):
  return jnp.ones(x_nd.shape[0]) if weight_n is None else jnp.asarray(weight_n).astype(jnp.float32)


@jax.default_matmul_precision('highest')
def held_out_correlations(directions, x_nd, y_nd, *, weight_n=None):
  """Pearson correlation of each pair of canonical variables, [k] float32 in [-1, 1].

  On rows that the directions have not seen.

  Its expectation on independent views is 0 for any number of rows, where that of
  `canonical_correlations` is about 0.85 sqrt(d / n).

  Args:
    directions: `Directions`, usually fitted on training rows.
    x_nd, y_nd: [m, d1], [m, d2] rows to measure.
    weight_n: [m] non-negative; rows of weight 0 are not read.
  """
  rows = weigh_rows(_weights(weight_n, x_nd))

  def variables(view_nd, direction_dk):
    """Centred, of length 1, times the roots of the weights; 0 where only rounding is left."""
    direction_dk = direction_dk / magnitude(direction_dk, axis=0)
    v_nk = centre(view_nd, rows).x_nd @ direction_dk
    v_nk -= rows.unit_n[:, None] * (rows.unit_n @ v_nk)[None, :]
    norm_k = jnp.linalg.norm(v_nk, axis=0)
    is_nothing_k = norm_k <= 4 * EPS * jnp.linalg.norm(direction_dk, axis=0)
    return jnp.where(
      is_nothing_k[None, :], 0.0, v_nk / jnp.where(is_nothing_k, 1.0, norm_k)[None, :]
    )

  a_nk, b_nk = variables(x_nd, directions.x_dk), variables(y_nd, directions.y_dk)
  return lax.stop_gradient(jnp.sum(a_nk * b_nk, axis=0))


def effective_rank(x_nd, *, weight_n=None):
  """exp of the entropy of the covariance's normalised eigenvalues (Roy and Vetterli 2007).

  1 for one direction, d for a sphere; 0 if constant.
  """
  return _effective_rank(*lax.stop_gradient((jnp.asarray(x_nd), _weights(weight_n, x_nd))))


@in_turn
def _effective_rank(x_nd, weight_n):
  with jax.default_matmul_precision('highest'):
    s_k = singular_values(centre(x_nd, weigh_rows(weight_n)).x_nd)
  e_k = s_k * s_k
  entropy = -jnp.sum(e_k * jnp.log(jnp.where(e_k == 0, 1.0, e_k)))
  return jnp.where(jnp.sum(e_k) == 0, 0.0, jnp.exp(entropy))


def modality_gap(x_nd, y_nd, *, weight_n=None):
  """Distance between the centroids of two views of unit rows (Liang et al. 2022), in [0, 2].

  The rows are brought to unit length first.
  """
  share_n = weigh_rows(_weights(weight_n, x_nd)).unit_n ** 2

  def centroid(view_nd):
    view_nd = jnp.where(share_n[:, None] > 0, view_nd.astype(jnp.float32), 0.0)
    view_nd = view_nd / magnitude(view_nd, axis=1)
    length_n1 = jnp.linalg.norm(view_nd, axis=1, keepdims=True)
    return jnp.sum(share_n[:, None] * view_nd / jnp.where(length_n1 > 0, length_n1, 1.0), axis=0)

  return lax.stop_gradient(jnp.linalg.norm(centroid(x_nd) - centroid(y_nd)))
