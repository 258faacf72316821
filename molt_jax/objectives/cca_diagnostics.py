"""What the CCA of two views looks like: directions fitted on one set and measured on another, effective rank, modality gap."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from molt_jax.objectives.cca import centre, cross, weigh_rows, whiten


class Directions(NamedTuple):
  """k pairs of canonical directions: of a sample x_d, the canonical variables are (x_d - mean_x_d) @ x_dk."""

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
  with jax.default_matmul_precision('highest'):
    rows = weigh_rows(jnp.ones(x_nd.shape[0]) if weight_n is None else weight_n.astype(jnp.float32))
    view_x, view_y = centre(x_nd, rows), centre(y_nd, rows)
    x, y = (whiten(view.x_nd, rows, ridge, 'eigh') for view in (view_x, view_y))
    p_ks, _, q_sj = jnp.linalg.svd(cross(x, y), full_matrices=False)
    x_kd, y_kd = (jnp.linalg.multi_dot([turn, *factor.back]) for factor, turn in ((x, p_ks.T), (y, q_sj)))
  return lax.stop_gradient(Directions(view_x.mean_d, view_y.mean_d, x_kd.T * view_x.inverse_norm, y_kd.T * view_y.inverse_norm))


def held_out_correlations(directions, x_nd, y_nd, *, weight_n=None):
  """Pearson correlation of each pair of canonical variables on rows that the directions have not seen, [k] float32 in [-1, 1].

  Its expectation on independent views is 0 for any number of rows, where that of `canonical_correlations` is about 0.85 sqrt(d / n).

  Args:
    directions: `Directions`, usually fitted on training rows.
    x_nd, y_nd: [m, d1], [m, d2] rows to measure.
    weight_n: [m] non-negative; rows of weight 0 are not read.
  """
  weight_n = jnp.ones(x_nd.shape[0]) if weight_n is None else jnp.maximum(weight_n.astype(jnp.float32), 0.0)
  weight_n = weight_n / jnp.maximum(jnp.sum(weight_n), jnp.finfo(jnp.float32).tiny)

  def variables(view_nd, mean_d, direction_dk):
    view_nd = jnp.where(weight_n[:, None] > 0, view_nd.astype(jnp.float32) - mean_d[None, :], 0.0)
    v_nk = jnp.matmul(view_nd, direction_dk, precision='highest')
    v_nk -= jnp.sum(weight_n[:, None] * v_nk, axis=0, keepdims=True)
    norm_k = jnp.sqrt(jnp.sum(weight_n[:, None] * v_nk * v_nk, axis=0))
    return v_nk / jnp.where(norm_k > 0, norm_k, 1.0)[None, :]

  a_nk = variables(x_nd, directions.mean_x_d, directions.x_dk)
  b_nk = variables(y_nd, directions.mean_y_d, directions.y_dk)
  return lax.stop_gradient(jnp.sum(weight_n[:, None] * a_nk * b_nk, axis=0))


def effective_rank(x_nd, *, weight_n=None):
  """exp of the entropy of the covariance's normalised eigenvalues (Roy and Vetterli 2007): 1 for one direction, d for a sphere; 0 if constant."""
  with jax.default_matmul_precision('highest'):
    rows = weigh_rows(jnp.ones(x_nd.shape[0]) if weight_n is None else weight_n.astype(jnp.float32))
    x_nd = centre(x_nd, rows).x_nd
    e_k = jnp.linalg.eigvalsh(x_nd @ x_nd.T if x_nd.shape[0] <= x_nd.shape[1] else x_nd.T @ x_nd)
  e_k = jnp.maximum(e_k, 0.0)
  entropy = -jnp.sum(jnp.where(e_k > 0, e_k * jnp.log(jnp.where(e_k > 0, e_k, 1.0)), 0.0))
  return lax.stop_gradient(jnp.where(jnp.sum(e_k) > 0, jnp.exp(entropy), 0.0))


def modality_gap(x_nd, y_nd, *, weight_n=None):
  """Distance between the centroids of two views whose rows are first brought to unit length (Liang et al. 2022); in [0, 2]."""
  weight_n = jnp.ones(x_nd.shape[0]) if weight_n is None else jnp.maximum(weight_n.astype(jnp.float32), 0.0)
  weight_n = weight_n / jnp.maximum(jnp.sum(weight_n), jnp.finfo(jnp.float32).tiny)

  def centroid(view_nd):
    view_nd = jnp.where(weight_n[:, None] > 0, view_nd.astype(jnp.float32), 0.0)
    length_n1 = jnp.linalg.norm(view_nd, axis=1, keepdims=True)
    return jnp.sum(weight_n[:, None] * view_nd / jnp.where(length_n1 > 0, length_n1, 1.0), axis=0)

  return lax.stop_gradient(jnp.linalg.norm(centroid(x_nd) - centroid(y_nd)))
