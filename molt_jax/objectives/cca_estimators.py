"""Estimators of canonical correlation that carry signal when the batch is smaller than the width.

With n <= d the canonical correlations of a batch are 1 whatever the data, and with any d those of independent views read about 0.85 sqrt(d / n).
`memory` compares k random directions instead of all d, over the current batch and the pairs of the last steps: 0.04 on independent views with the
sizes below. `experiments/cca_study.py` compares it with moving averages of covariances, the projection alone and the Eckart-Young loss.

What an estimator remembers is an explicit pytree that belongs into the train state, so that a resumed run goes on exactly.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from molt_jax.objectives.cca import cca_loss
from molt_jax.objectives.cca_diagnostics import fit_directions, held_out_correlations


class CCAEstimator(NamedTuple):
  """A pair of pure functions, clean under jit, grad and a batch sharded over a mesh (statistics of the global batch).

  init(num_layers, width) -> state, a pytree of float32 arrays. Equal arguments give equal states.
  loss(state, x_lbd, y_lbd, weight_b=None) -> (loss, new_state, aux). `loss` is a scalar in [-1, 0], the mean over layers of minus the mean
    canonical correlation; `new_state` carries no gradient; `aux` holds float32 arrays [L] to log. Rows of weight 0 are not read.
  """

  init: Callable
  loss: Callable


def make_estimator(name, *, num_directions=16, memory_size=8192, ridge=1e-3, solver='eigh', seed=0):
  """The `CCAEstimator` called `name`.

  'batch': all d directions over the current batch alone; no state. aux: 'correlation'.
  'memory': `num_directions` random orthonormal directions of each view (those of `seed`, fixed), over the current batch and the `memory_size`
    pairs before it. Remembered pairs are values; the gradient flows through the current rows, scaled by all weight over current weight, so
    that its size is that of the gradient through every row. aux: 'correlation', and 'held_out_correlation', the mean correlation of the
    current batch along directions fitted on the memory alone, which is 0 on average for independent views.

  Args:
    name: 'batch' or 'memory'.
    num_directions: at least 1; no more than the width.
    memory_size: at least 0. It should be a few hundred times `num_directions`; absent rows take a slot of weight 0.
    ridge, solver: as for `cca_loss`.
    seed: of the random directions.

  Raises:
    ValueError: an unknown name or a size out of range.
  """
  if name not in ESTIMATORS:
    raise ValueError(f'cca: estimator {name!r} is not one of {tuple(ESTIMATORS)}')
  if num_directions < 1 or memory_size < 0:
    raise ValueError(f'cca: num_directions must be at least 1 and memory_size at least 0, got {num_directions} and {memory_size}')
  return ESTIMATORS[name](num_directions, memory_size, seed, {'ridge': ridge, 'solver': solver})


def _batch(num_directions, memory_size, seed, options):
  del num_directions, memory_size, seed

  def loss(state, x_lbd, y_lbd, weight_b=None):
    loss_l = cca_loss(x_lbd, y_lbd, weight_n=weight_b, **options)
    return jnp.mean(loss_l), state, {'correlation': -lax.stop_gradient(loss_l)}

  return CCAEstimator(lambda num_layers, width: {}, loss)


def _memory(num_directions, memory_size, seed, options):
  def init(num_layers, width):
    if num_directions > width:
      raise ValueError(f'cca: num_directions must be at most the width {width}, got {num_directions}')
    rng = np.random.default_rng(seed)
    projections = (np.linalg.qr(rng.normal(size=(num_layers, width, num_directions)))[0] for _ in range(2))
    slots = (num_layers, memory_size, num_directions)
    return {
      **{name: jnp.asarray(p_ldk, jnp.float32) for name, p_ldk in zip(('projection_x_ldk', 'projection_y_ldk'), projections, strict=True)},
      'x_lmk': jnp.zeros(slots), 'y_lmk': jnp.zeros(slots), 'weight_m': jnp.zeros(memory_size),
    }

  def loss(state, x_lbd, y_lbd, weight_b=None):
    weight_b = jnp.ones(x_lbd.shape[1]) if weight_b is None else lax.stop_gradient(weight_b).astype(jnp.float32)
    x_lbk, y_lbk = _project(x_lbd, state['projection_x_ldk'], weight_b), _project(y_lbd, state['projection_y_ldk'], weight_b)
    weight_n = jnp.concatenate([weight_b, state['weight_m']])
    gain = jnp.sum(weight_n) / jnp.maximum(jnp.sum(weight_b), jnp.finfo(jnp.float32).eps)
    x_lnk = jnp.concatenate([_with_gain(x_lbk, gain), state['x_lmk']], axis=1)
    y_lnk = jnp.concatenate([_with_gain(y_lbk, gain), state['y_lmk']], axis=1)
    loss_l = cca_loss(x_lnk, y_lnk, weight_n=weight_n, **options)
    aux = {'correlation': -loss_l, 'held_out_correlation': _held_out(state, x_lbk, y_lbk, weight_b, options['ridge'])}
    kept = {'x_lmk': x_lnk[:, :memory_size], 'y_lmk': y_lnk[:, :memory_size], 'weight_m': weight_n[:memory_size]}
    return jnp.mean(loss_l), state | lax.stop_gradient(kept), lax.stop_gradient(aux)

  return CCAEstimator(init, loss)


def _project(view_lbd, projection_ldk, weight_b):
  view_lbd = jnp.where(weight_b[None, :, None] > 0, view_lbd.astype(jnp.float32), 0.0)
  return jnp.einsum('lbd,ldk->lbk', view_lbd, lax.stop_gradient(projection_ldk), precision='highest')


def _with_gain(array, gain):
  """The array, its gradient times `gain`."""
  value = lax.stop_gradient(array)
  return value + gain * (array - value)


def _held_out(state, x_lbk, y_lbk, weight_b, ridge):
  """Mean correlation of the batch along directions fitted on the memory, [L]; 0 while that is empty."""
  def one_layer(layer):
    x_mk, y_mk, x_bk, y_bk = layer
    directions = fit_directions(x_mk, y_mk, weight_n=state['weight_m'], ridge=ridge)
    return jnp.mean(held_out_correlations(directions, x_bk, y_bk, weight_n=weight_b))

  if not state['weight_m'].size:
    return jnp.zeros(x_lbk.shape[0])
  return lax.map(one_layer, lax.stop_gradient((state['x_lmk'], state['y_lmk'], x_lbk, y_lbk)))


ESTIMATORS = {'batch': _batch, 'memory': _memory}
