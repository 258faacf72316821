"""Estimators of canonical correlation that carry signal when the batch is smaller than the width.

With n <= d the canonical correlations of a batch are 1 whatever the data, and with any d those of
independent views read about 0.85 sqrt(d / n). `moving_average` compares k random directions instead
of all d, over the current batch and the past: 0.04 on independent views with the sizes below.
`experiments/cca_study.py` compares it with the batch, with the projection alone and with the
Eckart-Young loss.

What an estimator remembers is an explicit pytree that belongs into the train state, so that a
resumed run goes on exactly.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from molt_jax.objectives.cca.diagnostics import fit_directions, held_out_correlations
from molt_jax.objectives.cca.linalg import in_turn, raised_cholesky
from molt_jax.objectives.cca.loss import cca_loss
from molt_jax.objectives.moments import TINY, Moments, merge
from molt_jax.objectives.pairwise import in_range


class CCAEstimator(NamedTuple):
  """Three pure functions, clean under jit, grad and a batch sharded over a mesh.

  Statistics are those of the global batch.

  Attributes:
    init: (num_layers, width) -> state, a pytree of float32 arrays. Equal arguments give equal
      states.
    loss: (state, x_lbd, y_lbd, weight_b=None) -> (loss, new_state, aux). `loss` is a scalar in
      [-1, 0], the mean over layers of minus the mean canonical correlation; `new_state` carries no
      gradient; `aux` holds float32 arrays [L] to log. Rows of weight 0 are not read.
    past: state -> (x_lpk, y_lpk, weight_p), rows that stand for all pairs seen, along the k
      directions projection_x_ldk and projection_y_ldk of the state; None for an estimator without
      a past.
  """

  init: Callable
  loss: Callable
  past: Callable


def make_estimator(
  name, *, num_directions=16, window=8192, ridge=1e-3, solver='eigh', seed=0, gather=None
):
  """The `CCAEstimator` called `name`.

  'batch': all d directions over the current batch alone; no state. aux: 'correlation'.

  'moving_average': `num_directions` random orthonormal directions of each view (those of `seed`,
  fixed), over the current batch and the past: means and covariances that decay by 1 - (weight of
  the batch) / window at each step. The past is a value; the gradient flows through the current
  rows, scaled by all weight over current weight, so that its size is that of the gradient through
  every row. aux: 'correlation', and 'held_out_correlation', the mean correlation of the current
  batch along directions fitted on the past alone, which is 0 on average for independent views, and
  NaN before there is a past. Its sums of squares are float32: numbers beyond 1e12 along a direction
  count as 1e12, and weights beyond 1e6 as 1e6; what deviates by less than 1e-19 counts as constant
  once it is past.

  Args:
    name: 'batch' or 'moving_average'.
    num_directions: k, at least 1; no more than the width.
    window: pairs, at least 0; 0 is the projection alone. It should be a few hundred times
      `num_directions`.
    ridge, solver: as for `cca_loss`.
    seed: of the random directions.
    gather: brings rows [L, B, j] that are split over devices to each of them; None: they are not
      split. Applied once, to what is compared (after the projection) and its weights together, so
      that all of CCA comes after one collective and has none of its own.

  Raises:
    ValueError: an unknown name or a size out of range.
  """
  if name not in ESTIMATORS:
    raise ValueError(f'cca: estimator {name!r} is not one of {tuple(ESTIMATORS)}')
  if num_directions < 1 or window < 0:
    raise ValueError(
      f'cca: num_directions must be at least 1 and window at least 0, got {num_directions} and '
      f'{window}'
    )
  return ESTIMATORS[name](num_directions, window, seed, gather, {'ridge': ridge, 'solver': solver})


def _batch(num_directions, window, seed, gather, options):
  del num_directions, window, seed

  def loss(state, x_lbd, y_lbd, weight_b=None):
    weight_b = _float32_weights(weight_b, x_lbd.shape[1])
    x_lbd, y_lbd, weight_b = _together(gather, x_lbd, y_lbd, weight_b)
    loss_l = cca_loss(x_lbd, y_lbd, weight_n=weight_b, **options)
    return jnp.mean(loss_l), state, {'correlation': -lax.stop_gradient(loss_l)}

  return CCAEstimator(lambda num_layers, width: {}, loss, lambda state: None)


def _moving_average(num_directions, window, seed, gather, options):
  average = _MovingAverage(num_directions, window, seed, gather, options)
  return CCAEstimator(average.init, average.loss, lambda state: _points(state['past'], 1.0))


@dataclasses.dataclass(frozen=True, eq=False)
class _MovingAverage:
  """Keeps weight, mean and scatter of all earlier pairs, each weighted by its decay since.

  Both views lie side by side in them, j = 2 k. Attributes: as the arguments of `make_estimator`;
  `options` are those of `cca_loss`.
  """

  num_directions: int
  window: float
  seed: int
  gather: Callable | None
  options: dict[str, Any]

  def init(self, num_layers, width):
    """See `CCAEstimator`."""
    k, j = self.num_directions, 2 * self.num_directions
    if k > width:
      raise ValueError(f'cca: num_directions must be at most the width {width}, got {k}')
    rng = np.random.default_rng(self.seed)
    x_ldk, y_ldk = (np.linalg.qr(rng.normal(size=(num_layers, width, k)))[0] for _ in range(2))
    return {
      'projection_x_ldk': jnp.asarray(x_ldk, jnp.float32),
      'projection_y_ldk': jnp.asarray(y_ldk, jnp.float32),
      'past': {
        'weight': jnp.zeros(()),
        'mean_lj': jnp.zeros((num_layers, j)),
        'scatter_ljj': jnp.zeros((num_layers, j, j)),
      },
    }

  def loss(self, state, x_lbd, y_lbd, weight_b=None):
    """See `CCAEstimator`."""
    weight_b = jnp.clip(_float32_weights(weight_b, x_lbd.shape[1]), 0.0, _MOST_WEIGHT)
    x_lbk, y_lbk = (
      _project(view_lbd, state[f'projection_{name}_ldk'], weight_b)
      for name, view_lbd in (('x', x_lbd), ('y', y_lbd))
    )
    x_lbk, y_lbk, weight_b = _together(self.gather, x_lbk, y_lbk, weight_b)
    decay = jnp.maximum(1 - jnp.sum(weight_b) / max(self.window, 1e-6), 0.0)
    x_lpk, y_lpk, weight_p = lax.stop_gradient(_points(state['past'], decay))
    weight_n = jnp.concatenate([weight_b, weight_p])
    gain = jnp.minimum(jnp.sum(weight_n) / jnp.maximum(jnp.sum(weight_b), TINY), _LARGEST_GRADIENT)
    x_lnk, y_lnk = (
      jnp.concatenate([_with_gain(now, gain), then], axis=1)
      for now, then in ((x_lbk, x_lpk), (y_lbk, y_lpk))
    )
    loss_l = cca_loss(x_lnk, y_lnk, weight_n=weight_n, **self.options)
    past, batch = (x_lpk, y_lpk, weight_p), (x_lbk, y_lbk, weight_b)
    aux = {
      'correlation': -loss_l,
      'held_out_correlation': _held_out(past, batch, self.options['ridge']),
    }
    kept = _updated(state['past'], decay, jnp.concatenate([x_lbk, y_lbk], axis=2), weight_b)
    return jnp.mean(loss_l), lax.stop_gradient(state | {'past': kept}), lax.stop_gradient(aux)


ESTIMATORS = {'batch': _batch, 'moving_average': _moving_average}
# So that squares, times weights, times d or a window, stay in float32.
_LARGEST, _MOST_WEIGHT = 1e12, 1e6
_MILLIONTH = 2.0**-20
_LARGEST_GRADIENT = 1e30  # Its products with the projection do so as well.


def _float32_weights(weight_b, count):
  return jnp.ones(count) if weight_b is None else lax.stop_gradient(weight_b).astype(jnp.float32)


def _together(gather, x_lbj, y_lbj, weight_b):
  """Both views and their weights, all rows on each device, by one collective.

  XLA's CPU devices take independent collectives in any order: one that waits for the first and one
  that waits for the second wait for ever.
  """
  if gather is None:
    return x_lbj, y_lbj, weight_b
  weight_lb1 = jnp.broadcast_to(weight_b[None, :, None], (*x_lbj.shape[:2], 1))
  whole_lbj = gather(jnp.concatenate([x_lbj, y_lbj, weight_lb1], axis=2))
  ends = x_lbj.shape[2], x_lbj.shape[2] + y_lbj.shape[2]
  x_lbj, y_lbj, weight_lb1 = jnp.split(whole_lbj, ends, axis=2)
  return x_lbj, y_lbj, weight_lb1[0, :, 0]


def _points(past, decay):
  """Rows that stand for the past: 4 k points with its mean and covariance.

  With C = L L', they are mean +- sqrt(2 k) L_i.
  """
  num_points = 2 * past['mean_lj'].shape[1]
  std_lj = jnp.sqrt(jnp.diagonal(past['scatter_ljj'], axis1=1, axis2=2))
  unit_lj = jnp.where(std_lj > 0, 1 / jnp.where(std_lj > 0, std_lj, 1.0), 0.0)
  correlation_ljj = past['scatter_ljj'] * unit_lj[:, :, None] * unit_lj[:, None, :]
  root_ljj = jax.vmap(_root)(correlation_ljj)
  scale_lj = std_lj * jnp.sqrt(num_points / 2 / jnp.maximum(past['weight'], TINY))
  offset_lpj = jnp.swapaxes(root_ljj * scale_lj[:, :, None], 1, 2)
  points_lpj = past['mean_lj'][:, None, :] + jnp.concatenate([offset_lpj, -offset_lpj], axis=1)
  return *jnp.split(points_lpj, 2, axis=2), jnp.full(
    num_points, decay * past['weight'] / num_points
  )


@in_turn
def _root(correlation_jj):
  """A Cholesky factor, which always exists, of a little more than rounding on the diagonal."""
  return raised_cholesky(correlation_jj, jnp.float32(1e-5))[0]


def _updated(past, decay, z_lbj, weight_b):
  """The past, decayed, and one more batch."""
  weight = jnp.sum(weight_b)
  share_b = weight_b / jnp.maximum(weight, TINY)
  mean_lj = jnp.einsum('b,lbj->lj', share_b, z_lbj, precision='highest')
  centred_lbj = (z_lbj - mean_lj[:, None, :]) * jnp.sqrt(weight_b)[None, :, None]
  scatter_ljj = jnp.einsum('lbi,lbj->lij', centred_lbj, centred_lbj, precision='highest')
  seen = Moments(decay * past['weight'], past['mean_lj'], decay * past['scatter_ljj'])
  merged = merge(
    seen,
    Moments(weight, mean_lj, scatter_ljj),
    lambda weight, step_lj: weight * step_lj[:, :, None] * step_lj[:, None, :],
  )
  return {'weight': merged.weight, 'mean_lj': merged.mean, 'scatter_ljj': merged.scatter}


def _project(view_lbd, projection_ldk, weight_b):
  view_lbd = jnp.where(weight_b[None, :, None] > 0, view_lbd.astype(jnp.float32), 0.0)
  # By a millionth of the projection, no sum leaves float32, and k numbers are clipped, not d.
  projection_ldk = lax.stop_gradient(projection_ldk) * _MILLIONTH
  z_lbk = jnp.einsum('lbd,ldk->lbk', view_lbd, projection_ldk, precision='highest')
  return in_range(z_lbk, _LARGEST * _MILLIONTH) / _MILLIONTH


@jax.custom_vjp
def _with_gain(array, gain):
  """The array, its gradient times `gain`."""
  del gain
  return array


def _with_gain_bwd(gain, g):
  g = jnp.clip(g, -_LARGEST_GRADIENT, _LARGEST_GRADIENT) * gain
  return jnp.clip(g, -_LARGEST_GRADIENT, _LARGEST_GRADIENT), jnp.zeros_like(gain)


_with_gain.defvjp(lambda array, gain: (array, gain), _with_gain_bwd)


def _held_out(past, batch, ridge):
  """Mean correlation of the batch along directions fitted on the past, [L]; NaN without a past.

  past, batch: (rows of x [L, p, k], rows of y [L, p, k], weights [p]).
  """
  (x_lpk, y_lpk, weight_p), (x_lbk, y_lbk, weight_b) = past, batch

  def one_layer(x_pk, y_pk, x_bk, y_bk):
    directions = fit_directions(x_pk, y_pk, weight_n=weight_p, ridge=ridge)
    return jnp.mean(held_out_correlations(directions, x_bk, y_bk, weight_n=weight_b))

  held_out_l = jax.vmap(one_layer)(*lax.stop_gradient((x_lpk, y_lpk, x_lbk, y_lbk)))
  return jnp.where(jnp.sum(weight_p) > 0, held_out_l, jnp.nan)
